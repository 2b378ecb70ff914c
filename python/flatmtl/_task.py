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


class RowMean:
    """The mean of gradient rows, parameter by parameter, taken as they come: one row is held, whatever their number.

    An entry that is None, and every entry of an empty row, counts as gradient 0.
    """

    def __init__(self) -> None:
        self._row: list[Tensor | None] = []  # means of the entries that there were
        self._counts: list[int] = []  # numbers of them
        self._rows = 0

    def add(self, row: Sequence[Tensor | None]) -> None:
        """May hold on to entries of the row, but does not write to them: autograd may hand out one tensor twice."""
        self._rows += 1
        if row and not self._row:
            self._row, self._counts = [None] * len(row), [0] * len(row)
        for i, g in enumerate(row):
            if g is None:
                continue
            self._counts[i] += 1
            count, mean = self._counts[i], self._row[i]
            if mean is None:
                self._row[i] = g
            else:  # the first mean is a tensor of our own, written to from then on
                self._row[i] = torch.lerp(mean, g, 0.5) if count == 2 else mean.lerp_(g, 1.0 / count)

    def take(self) -> list[Tensor | None]:
        """The mean; empty if every row was."""
        return [
            x if x is None or count == self._rows else x * (count / self._rows)
            for x, count in zip(self._row, self._counts, strict=True)
        ]


class TaskMean:
    """Means of one task's losses and gradients over the parts of the batch where it has a loss, taken as they come."""

    def __init__(self, task: Task, index: int) -> None:
        self._mean = TaskState(task, index, parts=0)
        self._losses: list[Tensor] = []
        self._perturbed_losses: list[Tensor | None] = []
        self._grads, self._perturbed = RowMean(), RowMean()

    def add(self, part: TaskState) -> None:
        """Copies what it needs of the part's rows, or holds on to them, and does not write to them.

        A part where loss and gradient are zero has no perturbed pass, as nothing moves: it counts with its loss.
        """
        if part.loss is None:
            return
        self._mean.parts += part.parts
        self._mean.reached = sorted({*self._mean.reached, *part.reached})
        self._losses.append(part.loss)
        self._perturbed_losses.append(part.perturbed_loss)
        self._grads.add(part.grads)
        self._perturbed.add(part.perturbed)

    def state(self) -> TaskState:
        mean = self._mean
        if self._losses:
            mean.loss = torch.stack(self._losses).mean()
            if any(value is not None for value in self._perturbed_losses):
                pairs = zip(self._losses, self._perturbed_losses, strict=True)
                mean.perturbed_loss = torch.stack([a if b is None else b for a, b in pairs]).mean()
            mean.grads, mean.perturbed = self._grads.take(), self._perturbed.take()
        return mean


class Means:
    """The tasks' means over so many parts of the batch. Those over a single part are what that part gave."""

    def __init__(self, parts: int) -> None:
        self._single = parts == 1
        self._parts: dict[int, TaskState] = {}
        self._means: dict[int, TaskMean] = {}

    def add(self, part: TaskState) -> None:
        """One task in one part, whose rows are taken out of it."""
        if self._single:
            self._parts[part.index] = part
            return
        self._means.setdefault(part.index, TaskMean(part.task, part.index)).add(part)
        part.grads, part.perturbed = [], []

    def states(self) -> list[TaskState]:
        """One a task, in the order of their indices."""
        found = self._parts or {index: mean.state() for index, mean in self._means.items()}
        return [found[index] for index in sorted(found)]


def numbers(values: Sequence[Tensor]) -> list[float]:
    """0-d tensors as floats, with one synchronisation for all of an accelerator."""
    if all(value.is_cpu for value in values):
        return [float(value) for value in values]
    return torch.stack([value.double() for value in values]).tolist()  # type: ignore[no-any-return]


def check_square(square: float, task: Task, pass_: str) -> None:
    """Raises `NonFiniteError` where the squared norm of a gradient is not finite."""
    if not math.isfinite(square):
        raise NonFiniteError(task, pass_, "the gradient", math.sqrt(square) if square > 0 else square)


def check_losses(losses: Sequence[tuple[Task, Tensor]], pass_: str) -> None:
    for (task, _), number in zip(losses, numbers([value for _, value in losses]), strict=True):
        if not math.isfinite(number):
            raise NonFiniteError(task, pass_, "the loss", number)
