"""Parameters that are DTensors (FSDP2, tensor parallel): each rank works on its local shard.

Rows of gradients stay sharded. What is summed over parameters, norms and Gramians, is summed over the shards by an
all-reduce of the sums.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _losses
from ._losses import Loss


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; does not import torch.distributed.tensor where nothing else has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The local shard, sharing its memory; the tensor itself if it is not a DTensor."""
    shard: Tensor = tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return shard


def like(param: Tensor, shard: Tensor | None) -> Tensor | None:
    """`shard`, of the size of the parameter's own, as a DTensor with the parameter's placement."""
    if shard is None or not is_sharded(param) or is_sharded(shard):
        return shard
    return _like(param, shard)


def _like(param: Any, shard: Tensor) -> Tensor:
    made: Tensor = type(param.data).from_local(
        shard, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )
    return made


def cut(param: Any, values: Tensor) -> Tensor:
    """This rank's part of values of the size of the whole parameter."""
    if not is_sharded(param):
        return values
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    for dim, (start, length) in enumerate(zip(offset, shape, strict=True)):
        values = values.narrow(dim, min(start, values.shape[dim]), length)
    return values


class Shards:
    """The ranks that hold the shards of a parameter: groups of its device mesh, one for every dimension it is sharded
    over."""

    def __init__(self, param: Any, name: str = "") -> None:
        for placement in param.placements:
            if not (placement.is_shard() or placement.is_replicate()):
                raise TypeError(f"parameter {name} has placement {placement}; Shard and Replicate are supported")
        dims = [k for k, placement in enumerate(param.placements) if placement.is_shard()]
        self.groups = [param.device_mesh.get_group(k) for k in dims]
        self.key = (param.device_mesh, tuple(dims))


def shards(params: Sequence[Tensor], names: Iterable[str]) -> list[Shards | None]:
    """Of every parameter, one object for all of a kind; None for plain tensors."""
    kinds: dict[Any, Shards] = {}
    found: list[Shards | None] = []
    for param, name in zip(params, names, strict=True):
        kind = Shards(param, name) if is_sharded(param) else None
        found.append(None if kind is None else kinds.setdefault(kind.key, kind))
    return found


def check_unscalable(params: Sequence[tuple[str, Tensor]]) -> None:
    """Raises where GradScaler cannot unscale the gradients, which it hands to one operation a device and dtype: torch
    refuses plain tensors beside DTensors there. params: names and parameters."""
    seen: dict[Any, dict[bool, str]] = {}
    for name, p in params:
        kinds = seen.setdefault((p.device, p.dtype), {})
        kinds.setdefault(is_sharded(p), name)
        if len(kinds) == 2:
            raise TypeError(
                f"grad_scaler: parameter {kinds[True]} is a DTensor and parameter {kinds[False]} is not; GradScaler.unscale_ "
                "takes either kind, not both: shard all parameters, or use bfloat16 without a scaler"
            )


def gradients(
    losses: Sequence[Loss], params: Sequence[Tensor], scale: float, retain_graph: bool
) -> tuple[Tensor | None, ...]:
    """As `_losses.gradients`, by way of `.grad`, where FSDP leaves the reduced shards; local shards.

    `.grad` of the parameters is None before and after, that of every other leaf as it was.
    """
    edges = [loss.edge for loss in losses if loss.edge is not None]
    ours = {id(p) for p in params}
    others = {leaf for edge in edges for leaf in _losses.leaves(edge) if id(leaf) not in ours}
    before = [(leaf, leaf.grad) for leaf in others]
    seeds = [_losses.seed_of(edge, scale) for edge in edges]
    try:
        torch.autograd.backward(edges, seeds, retain_graph=retain_graph)
        return tuple(None if p.grad is None else _shard_of(p.grad, p) for p in params)
    finally:
        for p in params:
            p.grad = None
        for leaf, grad in before:
            leaf.grad = grad


def _shard_of(grad: Any, param: Any) -> Tensor:
    if not is_sharded(grad):
        plain: Tensor = grad
        return plain
    if grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    shard: Any = grad.to_local()
    return shard.wait() if hasattr(shard, "wait") else shard
