"""Memory for copies of the parameters, kept from step to step."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Bytes. Smaller tensors come from memory that the allocator keeps itself.
LEAST = 1 << 20

_use_count = getattr(torch._C, "_storage_Use_Count", None)  # without it nothing is kept


@dataclass(frozen=True)
class _Kept:
    layout: tuple[Any, ...]  # of the parameter
    storage: torch.UntypedStorage
    strides: tuple[int, ...]

    def is_free(self) -> bool:
        """Whether no tensor has this memory, and nobody else the storage: no `.grad`, and nobody who has kept one."""
        if _use_count is None or _use_count(self.storage._cdata) != 1:
            return False
        return sys.getrefcount(self.storage) == 2 and not self.storage.is_shared()  # 2: here, and getrefcount's own


class Reserve:
    """Two copies of each large parameter on the CPU at most: the one that is its `.grad` now, and the one before.

    A step copies the parameters, and its copy becomes their `.grad`. Were it given back when that is let go of, the
    system would have to find it anew in the next step, page by page, which takes several times as long as the copying.
    """

    def __init__(self) -> None:
        self._kept: dict[int, list[_Kept]] = {}

    def empty_like(self, index: int, parameter: Tensor) -> Tensor:
        """As `torch.empty_like`, for the parameter of this index; in memory that was in use before if there is some."""
        small = parameter.numel() * parameter.element_size() < LEAST
        if _use_count is None or small or parameter.device.type != "cpu":
            return torch.empty_like(parameter)
        layout = (parameter.dtype, parameter.shape, parameter.stride())
        kept = [k for k in self._kept.get(index, []) if k.layout == layout]
        for k in kept:
            if k.is_free():
                return torch.empty(0, dtype=parameter.dtype).set_(k.storage, 0, parameter.shape, k.strides)
        fresh = torch.empty_like(parameter)
        self._kept[index] = [*kept[-1:], _Kept(layout, fresh.untyped_storage(), fresh.stride())]
        return fresh

    def __reduce__(self) -> tuple[type[Reserve], tuple[()]]:
        return Reserve, ()  # copies and pickles start without
