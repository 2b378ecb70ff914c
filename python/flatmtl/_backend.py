"""Which code does the arithmetic on a parameter: the C core, or torch's device-generic operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from . import _generic, _native

_NATIVE_DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.float16}


@dataclass
class Group:
    """Parameters of one device and dtype, which one backend call can take together."""

    backend: ModuleType
    indices: list[int]
    shards: Any = None  # `_sharded.Shards` if they are shards, which sums go over
    only: bool = False  # whether there is no other group, so that every index is in it

    def __post_init__(self) -> None:
        self._set = set(self.indices)

    def __contains__(self, index: int) -> bool:
        return index in self._set

    def positions(self, indices: Sequence[int]) -> Sequence[int]:
        """Which of `indices` are in the group, as positions in that list."""
        return range(len(indices)) if self.only else [k for k, i in enumerate(indices) if i in self._set]


def choose(param: Tensor, copy: Tensor) -> ModuleType:
    """The backend of one parameter; `copy` is empty_like of it, so equal strides mean that it is dense."""
    native = param.device.type == "cpu" and param.dtype in _NATIVE_DTYPES and param.stride() == copy.stride()
    # A Parameter around a subclass of Tensor is of that subclass.
    plain = type(param) is nn.Parameter or type(param.data) is Tensor
    return _native if native and plain else _generic


def group(params: Sequence[Tensor], copies: Sequence[Tensor], shards: Sequence[Any]) -> list[Group]:
    groups: dict[tuple[ModuleType, torch.device, torch.dtype, Any], list[int]] = {}
    for i, (param, copy, shard) in enumerate(zip(params, copies, shards, strict=True)):
        groups.setdefault((choose(param, copy), param.device, param.dtype, shard), []).append(i)
    return [Group(key[0], indices, key[3], len(groups) == 1) for key, indices in groups.items()]
