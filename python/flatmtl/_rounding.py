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
        self.row = self._kept  # of the rows that passes give at present, the dtypes
        self.fresh = self._kept  # of the gradients as a backward gives them

    def begin_step(self, means: bool) -> None:
        """`means`: whether means over the parts of the step are to be taken."""
        self.row = self.fresh = self._wide if means else self._kept

    def begin_pass(self, means: bool) -> None:
        """`means`: whether what a backward gives in this pass enters a sum or a mean."""
        self.fresh = self._wide if means else self.row

    def end_means(self) -> None:
        """Those over the parts of the step are taken."""
        self.row = self.fresh = self._kept
