"""Loss weightings inside a step: the factors c_i from what the step knows, and what is learned after the update.

A step with a weighting is the step of the losses c_i l_i with c held constant. Rows are not scaled in memory: c enters
the Gramians and the coefficients of the sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _validation
from ._protect import HeldInterrupt, noted
from ._task import TaskState
from .main_task import HydaLearn, SLGrad

if TYPE_CHECKING:
    from ._passes import Passes
    from ._step import Step
    from .weightings import Weighting


def factors(step: Step) -> list[float] | None:
    """c of the tasks in `step.present`; None without a weighting.

    Called again in the same step (for the means over micro-batches) it starts from the state before the step again.
    """
    weighting, present = step.settings.weighting, step.present
    if weighting is None:
        return None
    if not present:
        return []
    if isinstance(weighting, HydaLearn):
        return _validation.hydalearn(step, weighting, step.validation)
    if isinstance(weighting, SLGrad):
        return [1.0] * len(present)  # the weights are in the losses
    at = [s.index for s in present]
    losses = _numbers([s.loss for s in present])
    for state, loss in zip(present, losses.tolist(), strict=True):
        weighting.check_loss(loss, state.index, state.task)
    norms = None
    if weighting.needs_norms:
        norms = torch.tensor(_norms(step), dtype=torch.float64) / step.loss_scale
    options = weighting.option_values(len(step.tasks), seed=step.settings.seed, draw=step.draw, present=at)
    memory = _Memory(weighting, step.states.get("weighting"), len(step.tasks), at)
    c: Tensor = torch.ops.flatmtl.loss_weights(losses, norms, weighting.number, options, memory.part)
    step.new_states = memory.into(step.new_states)
    return c.tolist()


def _norms(step: Step) -> list[float]:
    """Norms of the gradients of the shared parameters, or of those at the features where they stop there."""
    if step.featured and (at := step.passes.at_features) is not None:
        return [math.sqrt(float(at.gramian([s.index]))) for s in step.present]
    rows = [step.point.row(s.grads, step.shared) for s in step.present]
    return [math.sqrt(square) for square in step.sq_norms(rows, step.shared, False)]


class _Memory:
    """The state of the present tasks, gathered, and put back into a copy of the whole."""

    def __init__(self, weighting: Weighting, state: dict[str, Any] | None, num_tasks: int, at: Sequence[int]) -> None:
        self.weighting, self.at = weighting, list(at)
        values = weighting.fresh_state(num_tasks) if state is None else state["values"].clone()
        self.values = values.view(-1, num_tasks)
        self.part = self.values[:, self.at].reshape(-1).contiguous()

    def into(self, states: dict[str, Any]) -> dict[str, Any]:
        if not self.values.numel():
            return states
        self.values[:, self.at] = self.part.view(-1, len(self.at))
        return {**states, "weighting": {"name": self.weighting.name, "values": self.values.reshape(-1)}}


class Observation:
    """What a weighting like FAMO does after the update: the losses of the same batch once more, forwards alone."""

    def __init__(self, step: Step) -> None:
        weighting = step.settings.weighting
        assert weighting is not None
        self.weighting, self.passes = weighting, step.passes
        self.micro = range(len(step.passes.arguments))
        self.tasks = [TaskState(s.task, s.index) for s in step.present]  # without their gradients
        self.num_tasks = len(step.tasks)
        self.losses = _numbers([s.loss for s in step.present])

    def __call__(self, states: dict[str, Any], interrupt: HeldInterrupt) -> dict[str, Any]:
        """The states of methods, with what was learned from the parameters as they are now."""
        try:
            after = _losses_now(self.passes, self.micro, self.tasks, interrupt)
        except BaseException as error:
            noted(
                error,
                f"flatmtl: raised while weighting {self.weighting.name!r} evaluated the losses after the update; the "
                "update is made, and the weighting has not learned from this step",
            )
            raise
        at = [s.index for s in self.tasks]
        memory = _Memory(self.weighting, states.get("weighting"), self.num_tasks, at)
        options = self.weighting.option_values(self.num_tasks, present=at)
        torch.ops.flatmtl.loss_observe(self.losses, after, self.weighting.number, options, memory.part)
        return memory.into(states)


def observation(step: Step) -> Observation | None:
    weighting = step.settings.weighting
    return Observation(step) if weighting is not None and weighting.observes and step.present else None


def _losses_now(passes: Passes, micro: Sequence[int], tasks: Sequence[TaskState], interrupt: HeldInterrupt) -> Tensor:
    """Losses where the parameters stand, (K,) float64; random generators and module buffers stay as they are."""
    passes.interrupt = interrupt
    passes.point.accept()
    before = passes.snapshot()
    try:
        with passes.sync.guard():
            return _numbers(passes.losses_here(micro, tasks))
    finally:
        before.restore()


def _numbers(losses: Sequence[Tensor | None]) -> Tensor:
    """(K,) float64 on the CPU, in one transfer."""
    return torch.stack([loss.double() for loss in losses if loss is not None]).cpu()
