"""SAMO: joint global and local perturbations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .._point import Move
from .._random import generator
from ._base import Flatness

if TYPE_CHECKING:
    from .._step import Step
    from .._task import TaskState


@dataclass(frozen=True)
class SAMO(Flatness):
    """SAMO (2507.07883): task i's point lies along a mixture of the global gradient and a cheap guess at its own.

    q_i = alpha g_0 + (1 - alpha) ghat_i, eps_i = rho q_i/||q_i||, with g_0 the gradient of the sum of the losses and
    ghat_i its zeroth-order (SPSA) estimate: for every parameter tensor d

        ghat_i^d = sign(l_i(theta + mu z) - l_i(theta - mu z)) (||g_0^d||/||z^d||) z^d,    z ~ N(0, I)

    The size of the difference cancels in the paper's layer-wise rescaling; where the two losses are equal, ghat_i = 0
    (the authors' code divides 0 by 0). Own parameters move along h_i. The update is A(s_1 .. s_K) (combine="direct" by
    default). z comes from a generator of its own, by seed, step and task: torch's generators are not touched. The two
    losses are those of the training mode with the step's draws of dropout; BatchNorm's statistics do not move.

    Options: alpha = 0.5, the share of the global part (their scripts: 0.5; 0.9 by default), mu = 0.01. Cost: 1 + 3K
    forwards, 1 + K backwards; 2K backwards with another `combine`.
    """

    alpha: float = 0.5
    mu: float = 0.01

    name = "samo"
    default_combine = "direct"

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"SAMO: alpha is {self.alpha}; it must be in [0, 1]")
        if not 0.0 < self.mu < math.inf:
            raise ValueError(f"SAMO: mu is {self.mu}; it must be a finite number > 0")

    def needs_task_gradients(self, combine: str) -> bool:
        return combine != "direct"

    def perturb(self, step: Step) -> None:
        row, own_all = step.summed_gradient()
        count = len(step.shared)
        shared, own = row[:count], dict(zip(own_all, row[count:], strict=True))
        norms = [math.sqrt(step.arithmetic.sq_norm([g], [i])) for i, g in zip(step.shared, shared, strict=True)]
        for state in step.present:
            direction = self._direction(step, state, shared, norms)
            h = [step.point.wide(i, own[i]) if direction is not shared else own[i] for i in state.own]
            adaptive = step.settings.adaptive
            sq_shared = step.sq_norm(direction, step.shared, adaptive)
            sq_own = step.sq_norm(h, state.own, adaptive)
            step.point.move(step.along_row([*direction, *h], state.own, sq_shared, sq_own))
            step.passes.perturbed(step.micro, [state])
            step.point.restore(state.own)

    def _direction(self, step: Step, state: TaskState, shared: list[Tensor], norms: list[float]) -> list[Tensor]:
        """q_i, one tensor a shared parameter."""
        if self.alpha == 1.0:
            return shared
        draws = {device: generator(device, step.settings.seed, step.draw, state.index) for device in step.point.devices}
        z = [step.point.normal(i, draws) for i in step.shared]
        differences = []
        for side in (self.mu, -self.mu):
            step.point.move(Move(step.shared, z, [side] * len(z)))
            (loss,) = step.passes.losses_here(step.micro, [state])
            differences.append(float(loss))
        rise = differences[0] - differences[1]
        sign = (rise > 0.0) - (rise < 0.0)
        direction = []
        for i, g, x, norm in zip(step.shared, shared, z, norms, strict=True):
            length = math.sqrt(step.arithmetic.sq_norm([x], [i]))
            scale = (1.0 - self.alpha) * sign * norm / length if length > 0.0 else 0.0
            direction.append(x.mul_(scale).add_(g, alpha=self.alpha))
        return direction
