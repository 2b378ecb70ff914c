"""What is FlatMTL's own in a distributed checkpoint, beside what torch.distributed.checkpoint saves of an optimizer."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _sharded

if TYPE_CHECKING:
    from .optimizer import FlatMTL


class FlatMTLState:
    """`optimizer.flatmtl_state`: a torch.distributed.checkpoint Stateful, to be saved beside the optimizer's state.

    torch's `get_optimizer_state_dict` keeps `state` and `param_groups` and drops the rest: the roles of the parameters,
    the tasks, the number of steps, the seed, and the states of methods. They are one object of bytes here, so that they
    load on any number of ranks; gradients that a method keeps between steps (LookSAM) are whole in it, on every rank.
    The optimizer that loads it has the same parameters in the same order.
    """

    def __init__(self, optimizer: FlatMTL) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """With sharded parameters all ranks call it together."""
        own = self._optimizer._own_state()
        own["states"] = _rows(own["states"], self._optimizer._all_tensors(), _whole)
        buffer = io.BytesIO()
        torch.save(own, buffer)
        return {"flatmtl": buffer.getvalue()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = torch.load(io.BytesIO(state_dict["flatmtl"]), weights_only=True)
        own["states"] = _rows(own["states"], self._optimizer._all_tensors(), _part)
        self._optimizer._load_own_state(own)
        self._optimizer._loaded = own  # torch's helper loads the wrapped optimizer's state afterwards


def _rows(value: Any, params: Sequence[Tensor], change: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """A copy of the states of methods, with `change` made to every row of one tensor a parameter."""
    if isinstance(value, dict):
        return {key: _rows(item, params, change) for key, item in value.items()}
    if isinstance(value, list):
        if len(value) == len(params) and all(item is None or isinstance(item, Tensor) for item in value):
            return [None if item is None else change(param, item) for param, item in zip(params, value, strict=True)]
        return [_rows(item, params, change) for item in value]
    return value


def _whole(param: Tensor, shard: Tensor) -> Tensor:
    made: Any = _sharded.like(param, shard)
    return made.full_tensor().cpu() if _sharded.is_sharded(param) else made


def _part(param: Tensor, whole: Tensor) -> Tensor:
    local = _sharded.local(param)
    return torch.empty_like(local, dtype=whole.dtype).copy_(_sharded.cut(param, whole))
