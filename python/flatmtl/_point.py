"""Where the parameters stand: at theta, or moved to a perturbed point; and the copy to go back with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _backend, _sharded
from ._arithmetic import Arithmetic
from ._reserve import Reserve
from ._rounding import Rounding
from ._sync import Alone
from ._task import Parameter


@dataclass(frozen=True)
class Move:
    """Parameter i = saved + scale T^2 row, T = 1, or |saved| + eta if adaptive. Row and scales have one entry an index."""

    indices: Sequence[int]
    row: Sequence[Tensor]
    scales: Sequence[float]
    adaptive: bool = False
    eta: float = 0.0


class Point:
    """The parameters of a step, a copy of their values (`saved`), and the arithmetic on lists of them.

    `leaves` are the parameters; `tensors` the same, or the local shards of those that are DTensors, and all else is
    like `tensors`. Rows of gradients too, but for their dtype, which is up to `rounding`.
    """

    def __init__(
        self, params: Sequence[Parameter], sync: Alone, reserve: Reserve, rows_dtype: torch.dtype | None = None
    ) -> None:
        self.params = list(params)
        self.leaves = [p.tensor for p in params]
        self.tensors = [_sharded.local(t) for t in self.leaves]
        shards = _sharded.shards(self.leaves, [p.name for p in params])
        self.sharded = any(s is not None for s in shards)
        self.devices = sorted({t.device for t in self.tensors}, key=str)
        self.saved = [reserve.empty_like(p.index, t) for p, t in zip(params, self.tensors, strict=True)]
        self.arithmetic = Arithmetic(_backend.group(self.tensors, self.saved, shards), sync)
        self.arithmetic.copy_(self.saved, self.tensors)
        self.moved = False
        self.rounding = Rounding(self.tensors, rows_dtype)
        self._versions = self._now()
        self._strides = [t.stride() for t in self.tensors]
        self._zeros: dict[tuple[int, torch.dtype], Tensor] = {}

    def move(self, to: Move) -> None:
        self.moved = True
        self._perturb(to, [self.tensors[i] for i in to.indices])
        self._versions = self._now()

    def stack(self, indices: Iterable[int], moves: Sequence[Move]) -> dict[int, Tensor]:
        """(n, *shape) for the parameters with these indices: their values at the points of n moves."""
        stacks = {}
        for i in indices:
            saved = self.saved[i]
            stacks[i] = saved.new_empty_strided((len(moves), *saved.shape), (saved.numel(), *saved.stride()))
        for k, move in enumerate(moves):
            self._perturb(move, [stacks[i][k] for i in move.indices])
            for i in stacks.keys() - set(move.indices):
                stacks[i][k].copy_(self.saved[i])
        return stacks

    def _perturb(self, move: Move, out: list[Tensor]) -> None:
        saved = [self.saved[i] for i in move.indices]
        self.arithmetic.perturb_(out, saved, move.row, move.indices, move.scales, move.adaptive, move.eta)

    def restore(self, indices: Sequence[int] | None = None) -> None:
        """Puts parameters back, bit for bit: all, or the given ones of a point that another `move` follows."""
        if indices is not None and not indices:
            return
        self.arithmetic.copy_(self.tensors, self.saved, indices)
        self._versions = self._now()
        if indices is None:
            self.moved = False

    def rollback(self) -> None:
        """As `restore`, where something may have gone wrong anywhere."""
        if self.moved or self._now() != self._versions:
            self.arithmetic.copy_(self.tensors, self.saved)

    def accept(self) -> None:
        """The parameters' values are right as they are now: after the wrapped optimizer's update."""
        self._versions = self._now()

    def check_unchanged(self) -> None:
        """Raises if somebody else wrote to a parameter since the last `move` or `restore`."""
        found = self._now()
        if found == self._versions:
            return
        for p, before, now in zip(self.params, self._versions, found, strict=True):
            if before != now:
                raise RuntimeError(f"parameter {p.name} was changed in place by the closure")

    def row(self, gradients: Sequence[Tensor | None], indices: Sequence[int]) -> list[Tensor]:
        """The gradients at the indices, zeros where there is none."""
        return [self.zeros(i) if (g := gradients[i]) is None else g for i in indices]

    def fit(self, grads: Sequence[Tensor | None], indices: Sequence[int], dtypes: Sequence[torch.dtype]) -> bool:
        """Whether `fitted` would give back all of these gradients, of the parameters with these indices."""
        return all(g is None or self._fits(i, g, dtypes[i]) for g, i in zip(grads, indices, strict=True))

    def _fits(self, i: int, grad: Tensor, dtype: torch.dtype) -> bool:
        return grad.layout == torch.strided and grad.dtype == dtype and grad.stride() == self._strides[i]

    def fitted(self, i: int, grad: Tensor, dtype: torch.dtype | None = None, room: Tensor | None = None) -> Tensor:
        """A gradient of parameter i in the memory layout of the parameter; in this dtype, if it is given, and where it
        has to be copied in `room`, if that is given."""
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"gradient of parameter {self.params[i].name} is sparse ({grad.layout}); dense gradients are required"
            )
        dtype = dtype or grad.dtype
        if self._fits(i, grad, dtype):
            return grad
        return (torch.empty_like(self.tensors[i], dtype=dtype) if room is None else room).copy_(grad)

    def room(self, i: int) -> Tensor | None:
        """For `fitted`: memory for a gradient of parameter i, taken before the backward that gives it, if it will be
        rounded. Taken after it, what the allocator has of the wide gradients is left in holes between the rows."""
        dtype = self.rounding.fresh[i]
        return None if dtype == self.tensors[i].dtype else torch.empty_like(self.tensors[i], dtype=dtype)

    def narrow(self, i: int, grad: Tensor) -> Tensor:
        """A gradient of parameter i as rows are kept: rounded once, to nearest, where they are narrower."""
        return self.fitted(i, grad, self.rounding.row[i])

    def narrow_(self, row: list[Tensor | None]) -> None:
        """`narrow` of each entry, one after another, so that what is wide is freed on the way."""
        for i in range(len(row) if self.rounding.needed else 0):
            if (grad := row[i]) is not None:
                row[i] = self.narrow(i, grad)
            del grad

    def wide(self, i: int, grad: Tensor) -> Tensor:
        """A gradient of parameter i in the dtype of the parameter, to compute with."""
        return grad.to(self.tensors[i].dtype)

    def zeros(self, i: int) -> Tensor:
        """Zeros like a row at parameter i; one tensor for all who ask, not to be written to."""
        dtype = self.rounding.row[i]
        if (i, dtype) not in self._zeros:
            self._zeros[i, dtype] = torch.zeros_like(self.tensors[i], dtype=dtype)
        return self._zeros[i, dtype]

    def normal(self, i: int, generators: Mapping[torch.device, torch.Generator]) -> Tensor:
        """Standard normal numbers like parameter i, the same for it whole or in shards."""
        leaf, tensor = self.leaves[i], self.tensors[i]
        device = tensor.device
        drawn = torch.randn(leaf.shape, dtype=tensor.dtype, device=device, generator=generators[device])
        return torch.empty_like(tensor).copy_(_sharded.cut(leaf, drawn))

    def _now(self) -> list[tuple[int, int]]:
        return [(t._version, t.data_ptr()) for t in self.tensors]
