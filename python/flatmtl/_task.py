"""What a step knows of its parameters and of its tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ._losses import Task


class NonFiniteError(RuntimeError):
    """A loss or a gradient is Inf or NaN. `task` names it, `pass_` is "unperturbed" or "perturbed"."""

    def __init__(self, task: Task, pass_: str, what: str, value: float) -> None:
        self.task, self.pass_, self.what, self.value = task, pass_, what, value
        super().__init__(
            f"task {task!r}: {what} is not finite ({value}) in the {pass_} pass; nothing was changed. "
            "If this task is absent from the batch, return None as its loss; nonfinite='skip' skips such steps"
        )


@dataclass
class Parameter:
    """A parameter of the step: its radii (negative in groups that maximize), its name for messages and its place."""

    tensor: Tensor
    rho_shared: float
    rho_task: float
    name: str
    index: int = -1  # among all parameters of the optimizer, those without gradients too
    lr: float = 0.0

    @property
    def sign(self) -> float:
        """-1 in groups that maximize."""
        return math.copysign(1.0, self.rho_shared)


@dataclass(eq=False)
class TaskState:
    """One task in one step. Lists have one entry a parameter, None where the loss does not reach it.

    `grads` are g_i and h_i, empty in modes that need their sum alone; `perturbed` s_i and t_i, empty before the
    perturbed passes. Both are means over the micro-batches, and carry the loss scale.
    """

    task: Task
    index: int
    loss: Tensor | None = None  # 0-d, detached; None if the task is absent
    parts: int = 1  # number of micro-batches that the means are over
    grads: list[Tensor | None] = field(default_factory=list)
    perturbed: list[Tensor | None] = field(default_factory=list)
    perturbed_loss: Tensor | None = None
    reached: list[int] = field(default_factory=list)  # indices of the parameters that the loss reaches
    anywhere: list[int] | None = None  # those that it reaches on any rank, if there are several
    own: list[int] = field(default_factory=list)  # those that are its own
    reused: bool = False  # whether `perturbed` was made from an earlier step's
    sq_shared: float = 0.0  # squared norms of g_i and h_i, ASAM-weighted if adaptive
    sq_own: float = 0.0

    @property
    def touched(self) -> list[int]:
        """Indices of the parameters that the loss reaches, here or on another rank."""
        return self.reached if self.anywhere is None else self.anywhere

    @staticmethod
    def mean(parts: Sequence[Sequence[TaskState]]) -> list[TaskState]:
        """Means of losses and gradients over parts of the batch, each task's over the parts where it has a loss.

        A part where loss and gradient are zero has no perturbed pass, as nothing moves: it counts with its loss.
        """
        if len(parts) == 1:
            return list(parts[0])
        means = []
        for states in zip(*parts, strict=True):
            present = [s for s in states if s.loss is not None]
            mean = TaskState(states[0].task, states[0].index)
            if present:
                mean.parts = sum(s.parts for s in present)
                mean.loss = _mean_loss([s.loss for s in present])
                if any(s.perturbed_loss is not None for s in present):
                    mean.perturbed_loss = _mean_loss(
                        [s.loss if s.perturbed_loss is None else s.perturbed_loss for s in present]
                    )
                mean.reached = sorted({i for s in present for i in s.reached})
                mean.grads = _mean_row([s.grads for s in present])
                mean.perturbed = _mean_row([s.perturbed for s in present])
            means.append(mean)
        return means


def _mean_loss(values: Sequence[Tensor | None]) -> Tensor | None:
    found = [value for value in values if value is not None]
    return torch.stack(found).mean() if found else None


def _mean_row(rows: Sequence[list[Tensor | None]]) -> list[Tensor | None]:
    """The mean, parameter by parameter; a loss that does not reach one in some part has gradient 0 there."""
    if len(rows) == 1:
        return rows[0]
    out: list[Tensor | None] = []
    for column in zip(*(row for row in rows if row), strict=True):
        found = [g for g in column if g is not None]
        if not found:
            out.append(None)
            continue
        total = found[0] / len(rows)  # not in place: autograd may hand out one tensor twice
        for g in found[1:]:
            total.add_(g, alpha=1.0 / len(rows))
        out.append(total)
    return out


def check_square(square: float, task: Task, pass_: str) -> None:
    """Raises `NonFiniteError` where the squared norm of a gradient is not finite."""
    if not math.isfinite(square):
        raise NonFiniteError(task, pass_, "the gradient", math.sqrt(square) if square > 0 else square)


def check_losses(losses: Sequence[tuple[Task, Tensor]], pass_: str) -> None:
    if not losses:
        return
    numbers = torch.stack([value.double() for _, value in losses]).tolist()  # one synchronisation
    for (task, _), number in zip(losses, numbers, strict=True):
        if not math.isfinite(number):
            raise NonFiniteError(task, pass_, "the loss", number)
