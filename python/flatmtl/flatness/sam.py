"""SAM on the sum of the losses and its variants: one perturbed point for all tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _state
from ._base import Flatness, orthogonal, recalled, stored, sums
from .fmtl import check_every, reuse

if TYPE_CHECKING:
    from .._step import Step


@dataclass(frozen=True)
class SAM(Flatness):
    """SAM (2010.01412) on the sum of the losses: all tasks are differentiated at one perturbed point.

    eps = rho g/||g|| with g = SUM_i g_i; s_i, t_i are the gradients of l_i at (theta + eps, psi + eps). With
    norm="separate" the shared and all own parameters move rho each, with "joint" rho together, as SAM does. With the
    aggregator "sum" the update is SAM's. Cost of K tasks: 2 forwards, 2K backwards; with combine="direct" K + 1
    backwards (the record then has no norms of the loss family).
    """

    name = "sam"

    def needs_task_gradients(self, combine: str) -> bool:
        return combine != "direct"

    def works_at_features(self, combine: str) -> bool:
        return not self.needs_task_gradients(combine)

    def perturb(self, step: Step) -> None:
        row, own = step.summed_gradient()
        row = self._direction(step, row, own)
        count = len(step.shared)
        adaptive = step.settings.adaptive
        sq_shared = step.sq_norm(row[:count], step.shared, adaptive)
        step.point.move(step.along_row(row, own, sq_shared, step.sq_norm(row[count:], own, adaptive)))
        del row  # memory of a gradient
        step.passes.perturbed(step.micro, step.present)

    def _direction(self, step: Step, row: list[Tensor], own: Sequence[int]) -> list[Tensor]:
        return row


@dataclass(frozen=True)
class ASAM(SAM):
    """ASAM (2102.11600): `SAM` with adaptive=True and eta = 0.01 unless `FlatMTL(eta=)` says otherwise.

    eps = rho T^2 g/||T g||, T = |theta| + eta, for every parameter (the paper leaves biases and BatchNorm out). Cost as
    `SAM`.
    """

    name = "asam"


@dataclass(frozen=True)
class GSAM(SAM):
    """GSAM (2203.08065): `SAM`'s gradient s minus alpha times the component of g orthogonal to it, g and s being sums.

    r = s - alpha (g - (<g, s>/<s, s>) s), which descends the surrogate gap; task by task r_i = (1 + alpha c) s_i -
    alpha g_i with the same c = <g, s>/<s, s>. Option: alpha = 0.4, as libraries have it. The paper's schedule of rho
    with the learning rate is the user's: rho is a key of the param groups. Cost: 2 forwards, 2K backwards.
    """

    alpha: float = 0.4

    name = "gsam"

    def __post_init__(self) -> None:
        _check_number("GSAM", "alpha", self.alpha)

    def needs_task_gradients(self, combine: str) -> bool:
        return True

    def transform(self, step: Step, pair: Tensor) -> tuple[Tensor, Tensor]:
        gg, gf, ff = sums(step, pair)
        ss = gg + 2.0 * gf + ff
        lack = (gf + ff) / ss if ss > 0.0 else 0.0  # 1 - c = <f, s>/<s, s>
        ones = torch.ones(len(step.present), dtype=torch.float64)
        return ones * (-self.alpha * lack), ones * (1.0 + self.alpha * (1.0 - lack))


@dataclass(frozen=True)
class WSAM(SAM):
    """WSAM (2305.15817), the coupled form: a s_i + (1 - a) g_i with a = gamma/(1 - gamma): f_i is multiplied by a.

    Option: gamma = 0.9 in [0, 1), the paper's, where a = 9; 0.5 is `SAM`. The decoupled form, which moves the
    parameters beside the optimizer, is left out. Cost: 2 forwards, 2K backwards.
    """

    gamma: float = 0.9

    name = "wsam"

    def __post_init__(self) -> None:
        if not 0.0 <= self.gamma < 1.0:
            raise ValueError(f"WSAM: gamma is {self.gamma}; it must be in [0, 1)")

    def needs_task_gradients(self, combine: str) -> bool:
        return True

    def transform(self, step: Step, pair: Tensor) -> tuple[Tensor, Tensor]:
        ones = torch.ones(len(step.present), dtype=torch.float64)
        return 0.0 * ones, ones * (self.gamma / (1.0 - self.gamma))


@dataclass(frozen=True)
class FSAM(SAM):
    """Friendly SAM (2403.12350): perturbs along the noise of the gradient, g - sigma m, m a moving average of g.

    g = SUM_i g_i. The first step takes g and sets m = g; later ones take g - sigma m with the m so far, and then m =
    lmbda m + (1 - lmbda) g, as the authors' code. Options: sigma = 1, lmbda = 0.9 (their runs have 0.6 to 0.95). State:
    P numbers. Cost as `SAM`.
    """

    sigma: float = 1.0
    lmbda: float = 0.9

    name = "fsam"
    has_state = True

    def __post_init__(self) -> None:
        _check_number("FSAM", "sigma", self.sigma)
        if not 0.0 <= self.lmbda <= 1.0:
            raise ValueError(f"FSAM: lmbda is {self.lmbda}; it must be in [0, 1]")

    def _direction(self, step: Step, row: list[Tensor], own: Sequence[int]) -> list[Tensor]:
        indices = [*step.shared, *own]
        absent = self._absent(step, indices, row)
        if len(absent) == len(indices):  # nothing is known of the gradient
            return row
        old = recalled(step, (step.states.get("flat") or {}).get("mean") or [])
        mean, direction = list(old), []
        with torch.no_grad():
            for i, g in zip(indices, row, strict=True):
                g = step.point.wide(i, g)
                if i in absent:
                    direction.append(g)
                    continue
                g = g / step.loss_scale if step.loss_scale != 1.0 else g
                m = None if (kept := old[i]) is None else step.point.wide(i, kept)
                direction.append(g if m is None else torch.sub(g, m, alpha=self.sigma))
                mean[i] = g.clone() if m is None else torch.lerp(g, m, self.lmbda)
        step.new_states["flat"] = {"name": self.name, "mean": stored(step, mean)}
        return direction

    def _absent(self, step: Step, indices: Sequence[int], row: Sequence[Tensor]) -> set[int]:
        """The parameters that no task of this step reaches but such whose loss is zero, and whose gradient is too.

        Where a single backward gives the gradient of all tasks, `step.present` does not tell yet who is absent.
        """
        present = {i for s in step.present if float(s.loss) != 0.0 for i in s.touched}  # type: ignore[arg-type]
        return {
            i for i, g in zip(indices, row, strict=True) if i not in present and step.sq_norm([g], [i], False) == 0.0
        }

    def check_state(self, state: dict[str, Any], num_tasks: int, params: Sequence[Tensor]) -> None:
        _state.row(_state.entry(state, "mean", self._what), f"{self._what}: 'mean'", params)


@dataclass(frozen=True)
class LookSAM(SAM):
    """LookSAM (2203.02714): `SAM` every `every` steps; in between, the reuse of its component orthogonal to g.

    With the sums g and s: v = s - (<s, g>/||g||^2) g at the last perturbed pass; steps in between take g + alpha
    (||g||/||v||) v. Task by task: v_i = s_i - c g_i with the common c, and f_i = alpha (||g||/||v||) v_i. Norms are
    global, as in the paper. Options: every = 5, alpha = 0.7, the paper's. Cost: 2 forwards and 2K backwards every
    `every`-th step, 1 and K in between; one row of P numbers a task between the steps. A task that was absent at the
    last perturbed pass brings the next one forward.
    """

    every: int = 5
    alpha: float = 0.7

    name = "looksam"
    has_state = True

    def __post_init__(self) -> None:
        check_every("LookSAM", self.every)
        _check_number("LookSAM", "alpha", self.alpha)

    def needs_task_gradients(self, combine: str) -> bool:
        return True

    def perturb(self, step: Step) -> None:
        old = step.states.get("flat")
        if old is None or old["age"] >= self.every or any(not old["orthogonal"][s.index] for s in step.present):
            super().perturb(step)
            return
        row, own = step.summed_gradient()
        norm = math.sqrt(step.sq_norm(row, [*step.shared, *own], False)) / step.loss_scale
        factor = self.alpha * norm / old["orthogonal_norm"] if old["orthogonal_norm"] > 0.0 else 0.0
        for i, state in enumerate(step.present):
            state.reused = True
            c = step.factor(i)
            reuse(step, state, old["orthogonal"][state.index], factor / c if c != 0.0 else 0.0)

    def finish(self, step: Step, pair: Tensor) -> None:
        old = step.states.get("flat")
        if old is not None and all(s.reused for s in step.present):
            step.new_states["flat"] = {**old, "age": old["age"] + 1}
            return
        gg, gf, ff = sums(step, pair)
        c = 1.0 + gf / gg if gg > 0.0 else 0.0
        rows: list[list[Tensor | None]] = [[] for _ in step.tasks]
        for i, state in enumerate(step.present):
            rows[state.index] = stored(step, orthogonal(step, state, c, step.factor(i)))
        norm = math.sqrt(max(ff - gf * gf / gg, 0.0) if gg > 0.0 else ff)
        step.new_states["flat"] = {"name": self.name, "age": 1, "orthogonal": rows, "orthogonal_norm": norm}

    def check_state(self, state: dict[str, Any], num_tasks: int, params: Sequence[Tensor]) -> None:
        _state.integer(state, "age", self._what)
        _state.rows(state, "orthogonal", self._what, num_tasks, params)
        _state.number(state, "orthogonal_norm", self._what)


def _check_number(mode: str, name: str, value: float) -> None:
    if not (isinstance(value, (int, float)) and 0.0 <= value < math.inf):
        raise ValueError(f"{mode}: {name} is {value!r}; it must be a finite number >= 0")
