"""torch's wrappers of distributed models, found by the parameters they hold: DistributedDataParallel, FSDP2 modules,
and SyncBatchNorm."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_DDP_FLAGS = {"require_backward_grad_sync": False, "find_unused_parameters": False, "static_graph": False}


class Wrappers:
    """The wrappers in this process that hold one of the parameters."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        wanted = {id(p) for p in params}
        self.ddp: list[DistributedDataParallel] = []
        self.fsdp: list[Any] = []
        self.batch_norm = False
        fsdp_module = _fsdp_class()
        for thing in _instances(DistributedDataParallel, nn.SyncBatchNorm, fsdp_module):
            if not any(id(p) in wanted for p in thing.parameters()):
                continue
            if isinstance(thing, DistributedDataParallel):
                self.ddp.append(thing)
            elif isinstance(thing, fsdp_module):
                self.fsdp.append(thing)
            else:
                self.batch_norm = True

        self.foreign = [p for p in dict.fromkeys(p for m in self.fsdp for p in m.parameters()) if id(p) not in wanted]

    @property
    def holds_collectives(self) -> bool:
        """Whether a forward or backward pass waits for other ranks."""
        buffers = any(m.broadcast_buffers and m.modules_buffers for m in self.ddp)
        return bool(self.fsdp) or self.batch_norm or buffers

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """DDP without its own averages, which would see the gradients of some tasks only, and which a step of several
        backwards after one forward confuses. Its buffers are broadcast before the first forward, and not again."""
        flags = [*_DDP_FLAGS, "require_forward_param_sync"]
        before = [{flag: getattr(module, flag) for flag in flags} for module in self.ddp]
        grads = [(p, p.grad) for p in self.foreign]  # FSDP would add to them
        for p in self.foreign:
            p.grad = None
        for module in self.ddp:
            vars(module).update(_DDP_FLAGS)
        try:
            yield
        finally:
            for module, values in zip(self.ddp, before, strict=True):
                vars(module).update(values)
            for p, grad in grads:
                p.grad = grad

    def reshard(self) -> None:
        """Gathered copies of the parameters are given up, so that the next pass gathers them as they are then."""
        for module in self.fsdp:
            module.reshard()


def refuse_fsdp1(params: Sequence[Tensor]) -> None:
    """TypeError if a FullyShardedDataParallel holds one of the parameters: it reduces gradients in hooks that gradients
    of single tasks do not call."""
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None or not (dist.is_available() and dist.is_initialized()):  # without ranks there is none
        return
    wanted = {id(p) for p in params}
    for thing in _instances(module.FullyShardedDataParallel):
        if any(id(p) in wanted for p in thing.parameters()):
            raise TypeError(
                "parameters are held by torch's FullyShardedDataParallel (FSDP1), whose gradients of single tasks cannot "
                "be had: use torch.distributed.fsdp.fully_shard (FSDP2)"
            )


def _fsdp_class() -> type:
    from torch.distributed.fsdp import FSDPModule

    return FSDPModule


def _instances(*classes: type) -> list[Any]:
    """All objects of these classes: torch has no list of its wrappers. Looks at every object that there is."""
    kinds, todo = set[type](), [*classes]
    while todo:
        kind = todo.pop()
        if kind not in kinds:
            kinds.add(kind)
            todo += kind.__subclasses__()
    return [thing for thing in gc.get_objects() if type(thing) in kinds]
