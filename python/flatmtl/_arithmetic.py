"""The arithmetic of a step on lists of tensors, one a parameter, of any mixture of devices and dtypes.

Parameters are grouped by device, dtype and backend (`_native`: the C core; `_generic`: torch's own operations); what is
summed over parameters is summed over the groups. `indices` are positions in the list of all parameters, and rows list
one tensor an index.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _backend

Row = Sequence[Tensor]


class Arithmetic:
    def __init__(self, groups: Sequence[_backend.Group]) -> None:
        self.groups = list(groups)

    def copy_(self, to: Sequence[Tensor], source: Sequence[Tensor], indices: Sequence[int] | None = None) -> None:
        """to[i] = source[i] for the indices, or for all; both lists have one tensor a parameter."""
        for group in self.groups:
            at = group.indices if indices is None else [i for i in indices if i in group]
            if at:
                group.backend.copy_([to[i] for i in at], [source[i] for i in at])

    def perturb_(
        self, params: Row, saved: Row, row: Row, indices: Sequence[int], scales: Sequence[float], adaptive: bool,
        eta: float,
    ) -> None:  # fmt: skip
        """params = saved + scale T^2 row, T = 1 or |saved| + eta if adaptive."""
        for group in self.groups:
            at = group.positions(indices)
            if at:
                group.backend.perturb_(
                    [params[k] for k in at], [saved[k] for k in at], [row[k] for k in at], [scales[k] for k in at],
                    adaptive, eta,
                )  # fmt: skip

    def sq_norm(self, row: Row, indices: Sequence[int], params: Row | None = None, eta: float = 0.0) -> float:
        """Squared norm of a row; with params that of (|params| + eta) row."""
        total = 0.0
        for group in self.groups:
            at = group.positions(indices)
            if at:
                weights = None if params is None else [params[k] for k in at]
                total += float(group.backend.sq_norms([[row[k] for k in at]], weights, eta)[0])
        return total

    def gramian(self, rows: Sequence[Row], indices: Sequence[int]) -> Tensor:
        """(K, K) float64 on the CPU."""
        total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for group in self.groups:
            at = group.positions(indices)
            if at:
                total += group.backend.gramian(_at(rows, at))
        return total

    def gramian_pair(self, loss_rows: Sequence[Row], perturbed_rows: Sequence[Row], indices: Sequence[int]) -> Tensor:
        """Gramian of (g_1 .. g_K, f_1 .. f_K), f = s - g: (2K, 2K) float64 on the CPU."""
        total = torch.zeros(2 * len(loss_rows), 2 * len(loss_rows), dtype=torch.float64)
        for group in self.groups:
            at = group.positions(indices)
            if at:
                total += group.backend.gramian_pair(_at(loss_rows, at), _at(perturbed_rows, at))
        return total

    def combine_(
        self, out: Row, loss_rows: Sequence[Row], perturbed_rows: Sequence[Row] | None, indices: Sequence[int],
        loss_weights: Tensor, flat_weights: Tensor | None,
    ) -> None:  # fmt: skip
        """out = SUM_i a_i g_i, and + b_i (s_i - g_i) where perturbed rows are given. out: one tensor an index."""
        for group in self.groups:
            at = group.positions(indices)
            if not at:
                continue
            target, rows = [out[k] for k in at], _at(loss_rows, at)
            if perturbed_rows is None or flat_weights is None:
                group.backend.combine_(target, rows, loss_weights)
            else:
                group.backend.combine_pair_(target, rows, _at(perturbed_rows, at), loss_weights, flat_weights)


def _at(rows: Sequence[Row], positions: Sequence[int]) -> list[list[Tensor]]:
    return [[row[k] for k in positions] for row in rows]
