"""What HydaLearn and SLGrad do within a step: fake updates, held-out evaluations, weights of samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _losses
from ._point import Move

if TYPE_CHECKING:
    from ._step import Step
    from .main_task import HydaLearn

Validation = Callable[[], Any]


def check(weighting: Any, validation: Any, closure: Any, batches: Any, alone: bool) -> None:
    """Before a step: whether `validation` is there where it is needed, and there alone."""
    needed = hasattr(weighting, "per_sample")
    if validation is not None and not needed:
        raise TypeError(f"validation is given, but weighting {weighting!r} does not use it")
    if not needed:
        return
    if validation is None:
        raise TypeError(f"weighting {weighting.name!r} needs step(closure, validation=...)")
    if not callable(validation):
        raise TypeError(f"validation must be callable, but is {type(validation).__name__}")
    if not alone:
        raise ValueError(f"weighting {weighting.name!r} works in one process: held-out values differ by rank")
    if weighting.per_sample and (_losses.is_per_task(closure) or batches is not None):
        raise ValueError(f"weighting {weighting.name!r} needs one closure for all tasks, and no batches=")


def hydalearn(step: Step, weighting: HydaLearn, validation: Validation) -> list[float]:
    """c of the present tasks: gains on the held-out value by fake updates, which are undone."""
    names = [s.task for s in step.present]
    if weighting.main not in [s.task for s in step.tasks]:
        tasks = [s.task for s in step.tasks]
        raise ValueError(f"weighting 'hydalearn': main is {weighting.main!r}, but the tasks are {tasks!r}")
    sign = 1.0 if weighting.higher_is_better else -1.0
    before = sign * _value(step, validation)
    gains = []
    for state in step.present:
        indices = [*step.shared, *state.own]
        scales = [-_lr(step, weighting.lr, i) / step.loss_scale for i in indices]
        step.point.move(Move(indices, step.point.row(state.grads, indices), scales))
        gains.append(max(sign * _value(step, validation) - before, 0.0))
        step.point.restore(state.own)
    step.point.restore()
    total, count = sum(gains), len(gains)
    if total > 0.0:
        return [count * gain / total for gain in gains]
    return [float(count) if name == weighting.main else 0.0 for name in names]


def _lr(step: Step, lr: float | None, i: int) -> float:
    parameter = step.params[i]
    return (parameter.lr if lr is None else lr) * parameter.sign


def _value(step: Step, validation: Validation) -> float:
    """The held-out value where the parameters stand; random state and buffers are put back."""
    before = step.passes.snapshot()
    try:
        with step.interrupt.window(), torch.no_grad(), step.buffers.watching():
            value = float(validation())
    finally:
        before.restore()
    if not math.isfinite(value):
        raise RuntimeError(f"validation returned {value}; nothing was changed")
    return value


class SampleWeights:
    """The closure with weights of its samples: `weigh` finds them, then calls give one scalar a task."""

    def __init__(self, closure: Callable[..., Any], lr: float | None) -> None:
        self.closure, self.lr = closure, lr
        self.weights: list[Tensor | None] = []
        self._takes_task = _losses.takes_task(closure)

    def __call__(self) -> Any:
        container = self._losses()
        values = _values(container)
        if len(values) != len(self.weights):
            raise RuntimeError(f"closure returned {len(self.weights)} losses at first, but {len(values)} now")
        weighted = [
            None if v is None or w is None else (w * v).sum() for v, w in zip(values, self.weights, strict=True)
        ]
        return dict(zip(container, weighted, strict=True)) if isinstance(container, Mapping) else weighted

    def _losses(self) -> Any:
        return self.closure(task=None) if self._takes_task else self.closure()

    def weigh(self, step: Step, validation: Validation) -> None:
        """Look-ahead, held-out gradient, alignment of every sample. Leaves parameters, random state and buffers."""
        tensors, start = step.tensors, step.passes.snapshot()
        indices = range(len(tensors))
        try:
            with step.interrupt.window(), torch.enable_grad(), step.buffers.watching():
                values = [v for v in _values(self._losses()) if v is not None]
                mean = torch.stack([v.mean() for v in values]).sum()
                ahead = torch.autograd.grad(mean, tensors, materialize_grads=True)
            start.restore()
            scales = [-_lr(step, self.lr, i) for i in indices]
            step.point.move(Move(indices, step.point.row(list(ahead), indices), scales))
            with step.interrupt.window(), torch.enable_grad(), step.buffers.watching():
                value = validation()
                if not isinstance(value, Tensor) or value.dim() != 0 or not value.requires_grad:
                    raise TypeError("validation must return a scalar tensor with a graph, the main task's loss")
                held_out = torch.autograd.grad(value, tensors, allow_unused=True)
            step.point.restore()
            start.restore()
            with step.interrupt.window(), torch.enable_grad(), step.buffers.watching():
                self.weights = _alignment(_values(self._losses()), tensors, held_out)
        finally:
            step.point.restore()
            start.restore()


def _alignment(
    values: Sequence[Tensor | None], tensors: Sequence[Tensor], held_out: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """max(0, <d l_ts, v>), divided by their sum: the derivative by u of <SUM u_ts d l_ts, v>."""
    dummies = [None if v is None else torch.zeros_like(v, requires_grad=True) for v in values]
    losses = [(v, u) for v, u in zip(values, dummies, strict=True) if v is not None and u is not None]
    total = torch.stack([(v * u).sum() for v, u in losses]).sum()
    grads = torch.autograd.grad(total, tensors, create_graph=True, allow_unused=True)
    products = [(g * v).sum() for g, v in zip(grads, held_out, strict=True) if g is not None and v is not None]
    if products:
        found = torch.autograd.grad(torch.stack(products).sum(), [u for _, u in losses], materialize_grads=True)
    else:
        found = tuple(torch.zeros_like(v) for v, _ in losses)
    positive = [x.clamp(min=0.0) for x in found]
    scale = float(sum(x.double().sum() for x in positive))
    if not math.isfinite(scale):
        raise RuntimeError(f"the alignment of the samples' gradients with the held-out one is {scale}")
    weights = iter([x / scale if scale > 0.0 else x for x in positive])
    return [None if v is None else next(weights).detach() for v in values]


def _values(container: Any) -> list[Tensor | None]:
    values = list(container.values()) if isinstance(container, Mapping) else list(container)
    for task, value in zip(_losses.tasks_of(container), values, strict=True):
        if value is not None and (not isinstance(value, Tensor) or value.dim() != 1):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"weighting 'slgrad': loss of task {task!r} must have shape (B,), but is {shape}")
    return values


def prepare(step: Step, closure: Any, validation: Validation | None) -> Any:
    """The closure of the step: with the samples' weights, if the weighting is one of samples."""
    weighting = step.settings.weighting
    if validation is None or not getattr(weighting, "per_sample", False):
        return closure
    weighted = SampleWeights(closure, weighting.lr)  # type: ignore[union-attr]
    weighted.weigh(step, validation)
    return weighted
