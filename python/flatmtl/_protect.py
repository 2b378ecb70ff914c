"""What a step must give back: Ctrl-C held at the wrong moments, module buffers (BatchNorm statistics) and RNG."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


class HeldInterrupt:
    """Holds Ctrl-C (SIGINT) for the length of a `with` block, except inside `window()`, where the user's code runs.

    One interrupt ends the window it arrives in; whatever undoes the step is not interrupted again. An interrupt that
    arrives outside a window is delivered at the end of the block, or by `check()`.
    """

    def __init__(self) -> None:
        self._open = False
        self._pending: tuple[int, Any] | None = None
        self._previous: Any = None

    def __enter__(self) -> HeldInterrupt:
        if threading.current_thread() is threading.main_thread():
            previous = signal.getsignal(signal.SIGINT)
            if callable(previous):  # not SIG_DFL, SIG_IGN or a handler from C
                self._previous = previous
                signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, signum: int, frame: Any) -> None:
        if not self._open:
            self._pending = (signum, frame)
            return
        self._open = False  # before raising, so that a second one cannot reach the clean-up
        self._previous(signum, frame)
        self._open = True

    def window(self) -> _Window:
        return _Window(self)

    def check(self) -> None:
        """Delivers an interrupt that was held."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._previous(*pending)

    def __exit__(self, *exc: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self.check()


class _Window:
    """Not a generator, as windows open several times a task."""

    def __init__(self, held: HeldInterrupt) -> None:
        self._held = held

    def __enter__(self) -> None:
        self._held._open = True
        try:
            self._held.check()
        except BaseException:
            self._held._open = False
            raise

    def __exit__(self, *exc: object) -> None:
        self._held._open = False


class Buffers:
    """The buffers of the modules that a step's forward passes call: BatchNorm's running statistics and the like.

    Modules are found by a global forward pre-hook, which sees a module before it runs for the first time, and at once
    all modules inside it (scripted modules call theirs without hooks). `modules` overrides the search.
    """

    def __init__(self, modules: Iterable[nn.Module] | None = None) -> None:
        self._search = modules is None
        self._seen: dict[int, nn.Module] = {}  # by id; holds the module, so that the id stays its own
        self._slots: list[tuple[nn.Module, str, Tensor]] = []
        self._first: list[Tensor] = []  # values when first seen
        self._tensors: set[int] = set()
        for module in modules or ():
            self._see(module, ())

    def _see(self, module: nn.Module, args: Any) -> None:
        if id(module) in self._seen:
            return
        for child in module.modules():
            if id(child) in self._seen:
                continue
            self._seen[id(child)] = child
            for name, buffer in child.named_buffers(recurse=False):
                if id(buffer) not in self._tensors:
                    self._tensors.add(id(buffer))
                    self._slots.append((child, name, buffer))
                    self._first.append(buffer.detach().clone())

    def watching(self) -> AbstractContextManager[Any]:
        """Notes the modules that are called inside the `with` block that this begins."""
        return register_module_forward_pre_hook(self._see) if self._search else nullcontext()

    def values(self) -> list[Tensor]:
        """Copies of all buffers known so far."""
        return [_current(slot).detach().clone() for slot in self._slots]

    def restore(self, values: list[Tensor]) -> None:
        """Puts back what `values()` gave; buffers found since then get the value they were found with."""
        if not self._slots:
            return
        with torch.no_grad():
            for i, (module, name, buffer) in enumerate(self._slots):
                value = values[i] if i < len(values) else self._first[i]
                if _current((module, name, buffer)) is not buffer and not isinstance(module, torch.jit.ScriptModule):
                    module._buffers[name] = buffer  # the forward put another tensor in its place
                if buffer.shape == value.shape:
                    buffer.copy_(value)
                else:
                    buffer.set_(value.clone().untyped_storage(), 0, value.shape, value.stride())


def _current(slot: tuple[nn.Module, str, Tensor]) -> Tensor:
    module, name, buffer = slot
    current = getattr(module, name, buffer)
    return current if isinstance(current, Tensor) else buffer


class Rng:
    """States of torch's random generators: the CPU's, and those of `devices`."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = [(d, torch.get_device_module(d).get_rng_state(d)) for d in devices if d.type != "cpu"]

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._devices:
            torch.get_device_module(device).set_rng_state(state, device)


class Pass:
    """RNG and buffers as they stood before an unperturbed pass, for the perturbed passes to start from."""

    def __init__(self, buffers: Buffers, devices: list[torch.device]) -> None:
        self._buffers = buffers
        self._values = buffers.values()
        self._rng = Rng(devices)

    def restore(self, rng: bool = True) -> None:
        self._buffers.restore(self._values)
        if rng:
            self._rng.restore()


def noted(error: BaseException, note: str) -> None:
    """Adds a note to `error` (PEP 678; a plain attribute before Python 3.11)."""
    add: Callable[[str], None] | None = getattr(error, "add_note", None)
    if add is not None:
        add(note)
    else:
        error.__notes__ = [*getattr(error, "__notes__", []), note]  # type: ignore[attr-defined]
