"""Single gradient step update: a first-order inner step of every task."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._point import Move
from ._base import Flatness

if TYPE_CHECKING:
    from .._step import Step
    from .._task import TaskState


@dataclass(frozen=True)
class SGSU(Flatness):
    """Single gradient step update (2005.09910): every task's gradient after an inner step of its own.

    theta_i' = theta - inner_lr g_i; s_i, t_i are the gradients of l_i at (theta_i', psi_i); the update is A(s_1 ..
    s_K) (combine="direct" by default), the paper's with the aggregator "sum". Reconstructed from the paper's abstract
    in its first-order form: F-MTL's passes with eps_i = -inner_lr g_i, which is not normalised and does not use rho.
    Option: inner_lr = 0.01 (the paper's value is not known). Cost: K + 1 forwards, 2K backwards.
    """

    inner_lr: float = 0.01

    name = "sgsu"
    points_known = True
    uses_rho = False
    default_combine = "direct"

    def __post_init__(self) -> None:
        if not 0.0 <= self.inner_lr < math.inf:
            raise ValueError(f"SGSU: inner_lr is {self.inner_lr}; it must be a finite number >= 0")

    def perturb(self, step: Step) -> None:
        factors = {state.index: step.factor(k) for k, state in enumerate(step.present)}

        def move(state: TaskState) -> Move:
            rate = -self.inner_lr / step.loss_scale * factors[state.index]  # that of the loss c_i l_i with a weighting
            row = step.point.row(state.grads, step.shared)
            return Move(step.shared, row, [rate * step.params[i].sign for i in step.shared])

        step.perturb_each(step.present, move)
