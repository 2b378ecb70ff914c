"""Weightings for a main task with auxiliaries: they weigh by what helps the main task on held-out data.

Both need what the closure does not give: `optimizer.step(closure, validation=...)`, a function of no arguments that
evaluates the main task on held-out data and returns one number. It is called within the step, with torch's random
state and the buffers of the modules it calls protected; it puts the model in evaluation mode itself if it wants to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .weightings import Weighting


class ValidatedWeighting(Weighting):
    """Base class. These have no part in the C core, and no state."""

    #: Whether the closure returns one loss a sample, (B,) a task, instead of scalars.
    per_sample: ClassVar[bool] = False

    def fresh_state(self, num_tasks: int) -> Tensor:
        return torch.zeros(0, dtype=torch.float64)

    def _check_options(self, lr: Any) -> None:
        if lr is not None and not (isinstance(lr, (int, float)) and 0.0 < lr < float("inf")):
            raise ValueError(f"{type(self).__name__}: lr is {lr!r}; it must be None or a positive finite number")

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        raise TypeError(f"weighting {self.name!r} works inside FlatMTL alone: step(closure, validation=...)")


@dataclass(frozen=True)
class HydaLearn(ValidatedWeighting):
    """HydaLearn: a task weighs as much as a step along its gradient alone improves the main task.

    For every task i a fake update theta - lr g_i, psi_i - lr h_i, and its gain delta_i = v(now) - v(after it) on the
    held-out value v; c_i / c_main = delta_i / delta_main, with SUM c = K. Gains below 0 count as 0; where no task has a
    gain, c_main = K. The ratio is the paper's; the normalisation and the clipping are reconstructed.

    `validation` returns the main task's loss on held-out data, or a metric with higher_is_better=True.

    Options: main, the main task's index or key (first: 0); lr, of the fake update, None for the param groups' own;
    higher_is_better. Cost: K + 1 evaluations on held-out data, forwards alone. Not invariant. Conflicts remain.

    Verboven et al., HydaLearn: Highly Dynamic Task Weighting for Multi-task Learning with Auxiliary Tasks,
    arXiv 2008.11643.
    """

    main: int | str = 0
    lr: float | None = None
    higher_is_better: bool = False

    name = "hydalearn"

    def __post_init__(self) -> None:
        self._check_options(self.lr)


@dataclass(frozen=True)
class SLGrad(ValidatedWeighting):
    """SLGrad: every sample of every task weighs as much as its gradient agrees with the main task's held-out one.

    The closure returns the losses of the samples, one (B,) tensor a task. With v the gradient of the held-out loss of
    the main task after a look-ahead step of size lr along the gradient of the sum of the tasks' means,

        w_ts = max(0, <d l_ts / d (theta, psi), v>), divided by their sum over all tasks and samples

    and the step is that of the losses SUM_s w_ts l_ts, w held constant in all its passes. Where all are 0 nothing is
    learned from the batch. The inner products come from one double backward instead of one backward a sample, so that
    the model must be twice differentiable. The look-ahead is undone (the authors' code leaves it in place).

    `validation` returns the main task's loss on held-out data, with a graph. The losses that a step returns are the
    weighted ones.

    Options: lr, of the look-ahead, None for the param groups' own. Cost beside the step: 2 forwards, 3 backwards, and
    one forward and backward on held-out data. Invariant: no. Conflicts remain.

    Grégoire et al., Sample-Level Weighting for Multi-Task Learning with Auxiliary Tasks, arXiv 2306.04519.
    """

    lr: float | None = None

    name = "slgrad"
    per_sample = True

    def __post_init__(self) -> None:
        self._check_options(self.lr)
