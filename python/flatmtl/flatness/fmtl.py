"""F-MTL, and its reuse of flat gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _state
from ._base import Flatness, orthogonal, own_products, recalled, stored

if TYPE_CHECKING:
    from .._step import Step
    from .._task import TaskState


@dataclass(frozen=True)
class FMTL(Flatness):
    """F-MTL (arXiv 2211.13723, Algorithm 1): every task has its own perturbed point.

    s_i, t_i are the gradients of l_i at (theta + rho g_i/||g_i||, psi_i + rho h_i/||h_i||). Cost of K tasks: K + 1
    forwards, 2K backwards.

    With `every` = k > 1 a task's perturbed pass is made every k-th step alone; in between, its flat gradient is the
    last one's component orthogonal to the gradient, rescaled, after LookSAM (2203.02714), task by task:

        v_i = s_i - (<s_i, g_i>/||g_i||^2) g_i at the last perturbed pass;  f_i = (||g_i||/||g_i at that pass||) v_i

    or, if `alpha` is given, LookSAM's f_i = alpha (||g_i||/||v_i||) v_i. Cost then: (K + k)/k forwards, K + K/k
    backwards a step on average, and one row of P numbers a task between the steps.
    """

    every: int = 1
    alpha: float | None = None

    name = "fmtl"
    points_known = True

    @property
    def has_state(self) -> bool:  # type: ignore[override]
        return self.every > 1

    def __post_init__(self) -> None:
        check_every("FMTL", self.every)
        if self.alpha is not None and not 0.0 <= self.alpha < math.inf:
            raise ValueError(f"FMTL: alpha is {self.alpha}; it must be None or a finite number >= 0")

    def perturb(self, step: Step) -> None:
        old = step.states.get("flat") if self.every > 1 else None
        for state in step.present:
            if old is not None and old["orthogonal"][state.index] and old["age"][state.index] < self.every:
                state.reused = True
                self._reuse(step, state, old)
        step.perturb_each([s for s in step.present if not s.reused], step.along)

    def _reuse(self, step: Step, state: TaskState, old: dict[str, Any]) -> None:
        norm = _norm(step, state)
        k = state.index
        last, factor = (old["norm"][k], 1.0) if self.alpha is None else (old["orthogonal_norm"][k], self.alpha)
        factor *= norm / last if last > 0.0 else 0.0
        reuse(step, state, old["orthogonal"][k], factor)

    @property
    def needs_cross_products(self) -> bool:
        return self.every > 1

    def finish(self, step: Step, pair: Tensor) -> None:
        if self.every == 1:
            return
        total = len(step.tasks)
        old = step.states.get("flat") or {
            "age": [0] * total, "orthogonal": [[] for _ in range(total)], "norm": [0.0] * total,
            "orthogonal_norm": [0.0] * total,
        }  # fmt: skip
        new: dict[str, Any] = {"name": self.name, **{key: list(old[key]) for key in old if key != "name"}}
        count = len(step.present)
        for i, state in enumerate(step.present):
            k = state.index
            if state.reused:
                new["age"][k] += 1
                continue
            hh, ht, tt = own_products(step, i)
            gg, gf, ff = hh + float(pair[i, i]), ht + float(pair[i, count + i]), tt + float(pair[count + i, count + i])
            factor = step.factor(i)
            if factor == 0.0:  # of a weighting: the task has no part in the products, so the next step passes anew
                new["age"][k] = self.every
                continue
            c = 1.0 + gf / gg if gg > 0.0 else 0.0
            new["age"][k] = 1
            new["orthogonal"][k] = stored(step, orthogonal(step, state, c))
            new["norm"][k] = math.sqrt(gg) / factor
            new["orthogonal_norm"][k] = math.sqrt(max(ff - gf * gf / gg, 0.0) if gg > 0.0 else ff) / factor
        step.new_states["flat"] = new

    def check_state(self, state: dict[str, Any], num_tasks: int, params: Sequence[Tensor]) -> None:
        _state.one_a_task(state, "age", self._what, num_tasks, integers=True)
        _state.rows(state, "orthogonal", self._what, num_tasks, params)
        _state.one_a_task(state, "norm", self._what, num_tasks)
        _state.one_a_task(state, "orthogonal_norm", self._what, num_tasks)


def check_every(name: str, every: Any) -> None:
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"{name}: every is {every!r}; it must be an integer >= 1")


def reuse(step: Step, state: TaskState, kept: Sequence[Tensor | None], factor: float) -> None:
    """s_i = g_i + factor v_i, in place of a perturbed pass; `kept` is v_i."""
    state.perturbed = [None] * len(step.tensors)
    kept, wide = recalled(step, kept), step.point.wide
    with torch.no_grad():
        for i in state.reached:
            g, v = state.grads[i], kept[i]
            assert g is not None
            if v is not None:
                g = step.point.narrow(i, torch.add(wide(i, g), wide(i, v), alpha=factor * step.loss_scale))
            state.perturbed[i] = g


def _norm(step: Step, state: TaskState) -> float:
    """||(g_i, h_i)||, without the loss scale."""
    shared = step.sq_norm(step.point.row(state.grads, step.shared), step.shared, False)
    own = step.sq_norm(step.point.row(state.grads, state.own), state.own, False)
    return math.sqrt(shared + own) / step.loss_scale
