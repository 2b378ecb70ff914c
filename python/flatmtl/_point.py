"""Where the parameters stand: at theta, or moved to a perturbed point; and the copy to go back with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import _backend, _sharded
from ._arithmetic import Arithmetic
from ._sync import Alone
from ._task import Parameter


class Point:
    """The parameters of a step, a copy of their values (`saved`), and the arithmetic on lists of them.

    `leaves` are the parameters; `tensors` the same, or the local shards of those that are DTensors, and all else is
    like `tensors`.
    """

    def __init__(self, params: Sequence[Parameter], sync: Alone) -> None:
        self.params = list(params)
        self.leaves = [p.tensor for p in params]
        self.tensors = [_sharded.local(t) for t in self.leaves]
        shards = _sharded.shards(self.leaves, [p.name for p in params])
        self.sharded = any(s is not None for s in shards)
        self.devices = sorted({t.device for t in self.tensors}, key=str)
        self.saved = [torch.empty_like(t) for t in self.tensors]
        self.arithmetic = Arithmetic(_backend.group(self.tensors, self.saved, shards), sync)
        self.arithmetic.copy_(self.saved, self.tensors)
        self.moved = False
        self._versions = self._now()
        self._zeros: dict[int, Tensor] = {}

    def move(
        self, indices: Sequence[int], row: Sequence[Tensor], scales: Sequence[float], adaptive: bool, eta: float
    ) -> None:
        """Parameter i = saved + scale T^2 row, for the indices; row and scales have one entry an index."""
        self.moved = True
        self.arithmetic.perturb_(
            [self.tensors[i] for i in indices], [self.saved[i] for i in indices], row, indices, scales, adaptive, eta
        )
        self._versions = self._now()

    def restore(self, indices: Sequence[int] | None = None) -> None:
        """Puts parameters back, bit for bit: all, or the given ones of a point that another `move` follows."""
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
        for p, before, now in zip(self.params, self._versions, self._now(), strict=True):
            if before != now:
                raise RuntimeError(f"parameter {p.name} was changed in place by the closure")

    def row(self, gradients: Sequence[Tensor | None], indices: Sequence[int]) -> list[Tensor]:
        """The gradients at the indices, zeros where there is none."""
        return [self.zeros(i) if (g := gradients[i]) is None else g for i in indices]

    def fitted(self, i: int, grad: Tensor) -> Tensor:
        """A gradient of parameter i in the memory layout of the parameter."""
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"gradient of parameter {self.params[i].name} is sparse ({grad.layout}); dense gradients are required"
            )
        if grad.stride() == self.tensors[i].stride():
            return grad
        return torch.empty_like(self.tensors[i]).copy_(grad)

    def zeros(self, i: int) -> Tensor:
        """Zeros like parameter i; one tensor for all who ask, not to be written to."""
        if i not in self._zeros:
            self._zeros[i] = torch.zeros_like(self.tensors[i])
        return self._zeros[i]

    def normal(self, i: int, generators: Mapping[torch.device, torch.Generator]) -> Tensor:
        """Standard normal numbers like parameter i, the same for it whole or in shards."""
        leaf, tensor = self.leaves[i], self.tensors[i]
        device = tensor.device
        drawn = torch.randn(leaf.shape, dtype=tensor.dtype, device=device, generator=generators[device])
        return torch.empty_like(tensor).copy_(_sharded.cut(leaf, drawn))

    def _now(self) -> list[tuple[int, int]]:
        return [(t._version, t.data_ptr()) for t in self.tensors]
