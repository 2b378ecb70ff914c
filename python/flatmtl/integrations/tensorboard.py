"""`FlatMTL.last` in TensorBoard: `torch.utils.tensorboard.SummaryWriter`, tensorboardX, or whatever has `add_scalar`."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ._common import refuse, unwrapped


def log(writer: Any, optimizer: Any, step: int | None = None, *, prefix: str = "flatmtl") -> None:
    """Writes the record of the last step: `PREFIX/NAME/TASK` for a vector, `PREFIX/NAME/TASK-TASK` for a pair's cosine.

    Undefined values (NaN: absent tasks, rho=0) are left out. A step that `nonfinite="skip"` left out shows in
    `PREFIX/skipped`, and the Pareto-stationary flags in `PREFIX/pareto_stationary_loss` and `_flat`, as 0 or 1.

    Args:
        writer: has `add_scalar(tag, value, step)`.
        optimizer: a `FlatMTL` after a step, also in Lightning's or Accelerate's wrapper.
        step: the abscissa; by default the number of steps that the optimizer has made.
    """
    flat = unwrapped(optimizer, "optimizer")
    refuse(not flat.last, "there is nothing to log before the first step")
    step = flat.steps if step is None else step
    tasks = [str(task) for task in flat.last["tasks"]]
    for name, value in flat.last.items():
        if isinstance(value, bool):
            writer.add_scalar(f"{prefix}/{name}", float(value), step)
        elif isinstance(value, Tensor) and value.shape == (len(tasks),):
            for task, number in zip(tasks, value.tolist(), strict=True):
                if not math.isnan(number):
                    writer.add_scalar(f"{prefix}/{name}/{task}", number, step)
        elif isinstance(value, Tensor) and value.shape == (len(tasks), len(tasks)):
            for i, row in enumerate(value.tolist()):
                for j in range(i):
                    if not math.isnan(row[j]):
                        writer.add_scalar(f"{prefix}/{name}/{tasks[j]}-{tasks[i]}", row[j], step)


class Logger:
    """A post-step hook that logs every `every`-th step.

    >>> optimizer.register_step_post_hook(Logger(writer, every=10))
    """

    def __init__(self, writer: Any, every: int = 1, *, prefix: str = "flatmtl") -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {every!r}; it must be an integer, at least 1")
        self.writer, self.every, self.prefix = writer, every, prefix

    def __call__(self, optimizer: Any, args: Any = (), kwargs: Any = None) -> None:
        if optimizer.steps % self.every == 0:
            log(self.writer, optimizer, prefix=self.prefix)
