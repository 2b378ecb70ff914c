"""Looking at a model without leaving a trace: what `diagnose` and `landscape` share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import _losses
from ._losses import Task
from ._protect import Buffers, HeldInterrupt, Rng

T = TypeVar("T")


class Untouched:
    """A `with` block after which parameters, their `.grad`, buffers and torch's generators are as before, bit for bit.

    Also when it is left by an exception or Ctrl-C, which arrives only while the user's code runs, in `window()`.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, but is {type(model).__name__}")
        self.params = list(model.parameters())
        if not any(p.requires_grad for p in self.params):
            raise ValueError("no parameter of the model requires grad")
        self._interrupt = HeldInterrupt()
        self.window: Callable[[], Any] = self._interrupt.window
        self._model = model

    def __enter__(self) -> Untouched:
        self._interrupt.__enter__()
        self._saved = [p.detach().clone() for p in self.params]
        self._grads = [p.grad for p in self.params]
        self._buffers = Buffers()
        self._buffers._see(self._model, ())
        self._watching = self._buffers.watching()
        self._watching.__enter__()
        self._rng = Rng(sorted({p.device for p in self.params}, key=str))
        return self

    def rewind(self) -> None:
        """Buffers and generators as at the start."""
        self._buffers.restore([])
        self._rng.restore()

    def move(self, directions: Sequence[Sequence[Tensor]], steps: Sequence[float]) -> None:
        """Parameters to start + SUM_j steps[j] directions[j]; a direction has one tensor a parameter, in f32 or f64."""
        with torch.no_grad():
            for i, (p, start) in enumerate(zip(self.params, self._saved, strict=True)):
                value = start.to(directions[0][i].dtype)
                for direction, step in zip(directions, steps, strict=True):
                    value = value.add(direction[i], alpha=step)
                p.copy_(value)

    def __exit__(self, *exc: Any) -> None:
        with torch.no_grad():
            for p, value, grad in zip(self.params, self._saved, self._grads, strict=True):
                if not torch.equal(p, value):  # also where it holds NaN
                    p.copy_(value)
                p.grad = grad
        torch.clear_autocast_cache()
        self._watching.__exit__(None, None, None)
        self.rewind()
        self._interrupt.__exit__(*exc)


def evaluate(closure: Any, arguments: tuple[Any, ...], untouched: Untouched) -> tuple[list[Task], list[float]]:
    """The tasks, and their losses as numbers, NaN for an absent one."""
    torch.clear_autocast_cache()  # within an outer autocast it holds the parameters cast at another point
    with untouched.window(), torch.no_grad():
        if _losses.is_per_task(closure):
            _losses.check_closures(closure)
            tasks = _losses.tasks_of(closure)
            values = [_call(closure[task], arguments) for task in tasks]
        else:
            container = _call(closure, arguments)
            tasks = _losses.tasks_of(container)
            values = list(container.values()) if isinstance(container, dict) else _as_list(container)
    if not tasks:
        raise ValueError("closure returned no losses")
    for task, value in zip(tasks, values, strict=True):
        if value is not None and not (isinstance(value, Tensor) and value.dim() == 0):
            what = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"loss of task {task!r} must be a scalar tensor, but is {what}")
    return tasks, [float("nan") if value is None else float(value) for value in values]


def _call(closure: Any, arguments: tuple[Any, ...]) -> Any:
    return closure(*arguments, task=None) if _losses.takes_task(closure) else closure(*arguments)


def _as_list(container: Any) -> list[Any]:
    if isinstance(container, Tensor):
        return list(container.reshape(-1)) if container.dim() <= 1 else [container]
    if isinstance(container, (list, tuple)):
        return list(container)
    raise TypeError(
        "closure must return the task losses as a list, tuple, dict or 1-D tensor, "
        f"but returned {type(container).__name__}"
    )


def arguments_of(batches: Iterable[Any] | None) -> list[tuple[Any, ...]]:
    """Arguments of the closure: () once, or (batch,) for every batch."""
    if batches is None:
        return [()]
    arguments = [(batch,) for batch in batches]
    if not arguments:
        raise ValueError("batches is empty: expected at least one")
    return arguments


@contextmanager
def tracked(items: Sequence[T], description: str, show: bool | None) -> Iterator[Iterable[T]]:
    """The items, under a progress bar (rich's, else tqdm's) if `show`; None: if stderr is a terminal."""
    bar: Any = None
    if sys.stderr.isatty() if show is None else show:
        try:
            from rich.console import Console
            from rich.progress import track

            bar = track(items, description, console=Console(stderr=True), transient=True)
        except ImportError:
            with suppress(ImportError):
                from tqdm import tqdm

                bar = tqdm(items, description, leave=False)
    try:
        yield items if bar is None else bar
    finally:
        if bar is not None:
            bar.close()
