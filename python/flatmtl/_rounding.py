"""When gradients are rounded to the dtype in which a step keeps its rows (`FlatMTL(rows_dtype=)`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Rounding:
    """Gradients of float32 parameters are rounded once, after the last mean or sum that they enter.

    Those are taken within a pass, over its micro-batches, ranks and closures, and at the end of a step whose parts
    (micro-batches or ranks) were perturbed each for itself. Without `rows_dtype` nothing is rounded.
    """

    def __init__(self, tensors: Sequence[Tensor], rows_dtype: torch.dtype | None) -> None:
        self._wide = [t.dtype for t in tensors]
        self._kept = [rows_dtype if rows_dtype and dtype == torch.float32 else dtype for dtype in self._wide]
        self.needed = self._kept != self._wide
        self._parts_to_come = self._pass_to_come = False

    def begin_step(self, means: bool) -> None:
        """`means`: whether means over the parts of the step are to be taken."""
        self._parts_to_come = means

    def begin_pass(self, means: bool) -> None:
        """`means`: whether what a backward gives in this pass enters a sum or a mean."""
        self._pass_to_come = means

    def end_means(self) -> None:
        """Those over the parts of the step are taken."""
        self._parts_to_come = False

    def fresh(self, i: int) -> torch.dtype:
        """The dtype in which a gradient of parameter i is kept as a backward gives it."""
        return self._wide[i] if self._pass_to_come else self.row(i)

    def row(self, i: int) -> torch.dtype:
        """That of parameter i in the rows that passes give at present."""
        return self._wide[i] if self._parts_to_come else self._kept[i]
