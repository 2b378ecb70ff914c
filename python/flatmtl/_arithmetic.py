"""The arithmetic of a step on lists of tensors, one a parameter, of any mixture of devices and dtypes.

Parameters are grouped by device, dtype and backend (`_native`: the C core; `_generic`: torch's own operations); what is
summed over parameters is summed over the groups. `indices` are positions in the list of all parameters, and rows list
one tensor an index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _backend
from ._sync import Alone

Row = Sequence[Tensor]
Rows = Sequence[Row]


class Arithmetic:
    def __init__(self, groups: Sequence[_backend.Group], sync: Alone | None = None) -> None:
        self.groups, self.sync = list(groups), sync or Alone()
        self.accumulate = 0  # how Gramians are summed: `_ops.ACCUMULATE`

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
        return self.sq_norms([row], indices, params, eta)[0] if indices else 0.0

    def sq_norms(self, rows: Rows, indices: Sequence[int], params: Row | None = None, eta: float = 0.0) -> list[float]:
        """`sq_norm` of every row."""
        total, shards = [0.0] * len(rows), ShardSums(self.sync)
        for group in self.groups:
            at = group.positions(indices) if rows else []
            if at:
                weights = None if params is None else [params[k] for k in at]
                part = group.backend.sq_norms(_at(rows, at), weights, eta)
                if group.shards is None:
                    total = [a + b for a, b in zip(total, part.tolist(), strict=True)]
                else:
                    shards.add(group.shards, part)
        return [a + b for a, b in zip(total, shards.sum().tolist(), strict=True)] if shards else total

    def gramian(self, rows: Sequence[Row], indices: Sequence[int]) -> Tensor:
        """(K, K) float64 on the CPU."""
        total, shards = torch.zeros(len(rows), len(rows), dtype=torch.float64), ShardSums(self.sync)
        for group in self.groups:
            at = group.positions(indices)
            if at:
                part = group.backend.gramian(_at(rows, at), self.accumulate)
                if group.shards is None:
                    total += part
                else:
                    shards.add(group.shards, part)
        return total + shards.sum() if shards else total

    def gramian_pair(
        self, loss_rows: Sequence[Row], perturbed_rows: Sequence[Row], indices: Sequence[int], cross: bool = True
    ) -> Tensor:
        """Gramian of (g_1 .. g_K, f_1 .. f_K), f = s - g: (2K, 2K) float64 on the CPU. <g_i, f_j> = 0 without `cross`,
        in about half of the time."""
        total, shards = torch.zeros(2 * len(loss_rows), 2 * len(loss_rows), dtype=torch.float64), ShardSums(self.sync)
        for group in self.groups:
            at = group.positions(indices)
            if at:
                part = group.backend.gramian_pair(_at(loss_rows, at), _at(perturbed_rows, at), self.accumulate, cross)
                if group.shards is None:
                    total += part
                else:
                    shards.add(group.shards, part)
        return total + shards.sum() if shards else total

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

    # -- of the buffer methods: rows x_i = a_i g_i + b_i (s_i - g_i), or a_i g_i without perturbed rows ----------------

    def moving_average_(
        self, buffers: Rows, rows: Rows, perturbed: Rows | None, indices: Sequence[int], a: Tensor, b: Tensor,
        keep: Tensor,
    ) -> None:  # fmt: skip
        """y_i = x_i + keep_i (y_i - x_i)."""
        for group, at in self._places(indices):
            group.backend.moving_average_(_at(buffers, at), _at(rows, at), _at_or_none(perturbed, at), a, b, keep)

    def excess_(
        self, buffers: Rows, rows: Rows, perturbed: Rows | None, indices: Sequence[int], a: Tensor, b: Tensor
    ) -> Tensor:
        """r = sqrt(r^2 + x^2); SUM_p x_ip^2 / r_ip, (K,)."""
        total = torch.zeros(len(rows), dtype=torch.float64)
        for group, at in self._places(indices):
            total += group.backend.excess_(_at(buffers, at), _at(rows, at), _at_or_none(perturbed, at), a, b)
        return total

    def cross_gramian(
        self, rows: Rows, perturbed: Rows | None, others: Rows, others_perturbed: Rows | None, indices: Sequence[int],
        a: Tensor, b: Tensor,
    ) -> Tensor:  # fmt: skip
        """<x_i, y_j>, (K, K)."""
        total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for group, at in self._places(indices):
            total += group.backend.cross_gramian(
                _at(rows, at), _at_or_none(perturbed, at), _at(others, at), _at_or_none(others_perturbed, at), a, b
            )
        return total

    def graddrop_(
        self, out: Row, rows: Rows, perturbed: Rows | None, indices: Sequence[int], a: Tensor, b: Tensor, leak: Tensor,
        seed: int, draw: int, call: int,
    ) -> None:  # fmt: skip
        """The update of GradDrop."""
        position = 0
        for group, at in self._places(indices):
            target = [out[k] for k in at]
            group.backend.graddrop_(
                target, _at(rows, at), _at_or_none(perturbed, at), a, b, leak, seed, draw, call, position
            )
            position += sum(t.numel() for t in target)

    def combine_buffers_(self, out: Row, buffers: Rows, indices: Sequence[int], weights: Tensor) -> None:
        """out = SUM_i w_i y_i."""
        for group, at in self._places(indices):
            group.backend.combine_buffers_([out[k] for k in at], _at(buffers, at), weights)

    def _places(self, indices: Sequence[int]) -> list[tuple[_backend.Group, list[int]]]:
        found = [(group, list(group.positions(indices))) for group in self.groups]
        return [(group, at) for group, at in found if at]


def _at_or_none(rows: Rows | None, positions: Sequence[int]) -> list[list[Tensor]] | None:
    return None if rows is None else _at(rows, positions)


class ShardSums:
    """Sums over the shards of parameters that are spread over ranks; true if there are any."""

    def __init__(self, sync: Alone) -> None:
        self._sync = sync
        self._parts: dict[Any, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(self, shards: Any, part: Tensor) -> None:
        """Adds what this rank has; the same `shards` in the same order on all ranks."""
        before = self._parts.get(shards)
        self._parts[shards] = part.clone() if before is None else before + part

    def sum(self) -> Tensor:
        """The sum over all ranks, the same bits on each."""
        totals = [self._sync.sum_shards(part, shards.groups) for shards, part in self._parts.items()]
        return torch.stack(totals).sum(0)


def _at(rows: Sequence[Row], positions: Sequence[int]) -> list[list[Tensor]]:
    return [[row[k] for k in positions] for row in rows]
