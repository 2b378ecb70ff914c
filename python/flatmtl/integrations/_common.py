"""What the adapters share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._sync import Alone
from ..optimizer import FlatMTL


def unwrapped(optimizer: Any, where: str) -> FlatMTL:
    """The FlatMTL inside a framework's wrappers; TypeError if there is none.

    Args:
        optimizer: what the framework has, a FlatMTL or a wrapper that holds it as `.optimizer`.
        where: who should have given a FlatMTL, for the message.
    """
    inner, outer = optimizer, None
    while inner is not None and inner is not outer:
        if type(inner).__init__ is FlatMTL.__init__:  # Lightning's wrapper says that it is a FlatMTL, but is not
            found: FlatMTL = inner
            return found
        inner, outer = getattr(inner, "optimizer", None), inner
    raise TypeError(f"{where} must be a flatmtl.FlatMTL, but is {type(optimizer).__name__}")


def refuse(condition: bool, message: str) -> None:
    if condition:
        raise RuntimeError(f"flatmtl: {message}")


def check_processes(optimizer: FlatMTL, processes: int, wrap: str) -> None:
    """RuntimeError if there are several processes that would train each for itself, though nobody said `sync=None`.

    Args:
        wrap: what wraps the model in DDP, for the message.
    """
    if processes > 1 and optimizer.sync == "auto" and type(optimizer._connected()) is Alone:
        optimizer._ranks = None  # to be settled anew, when the model is wrapped
        refuse(
            True,
            f"there are {processes} processes, but no DistributedDataParallel holds the optimizer's parameters, and each "
            f"would train for itself; {wrap}, or say FlatMTL(..., sync='exact')",
        )


def check_accelerator(accelerator: Any, optimizer: FlatMTL, wrap: str) -> None:
    """As `check_processes`, for an `accelerate.Accelerator`; and RuntimeError for the engines that own the backward."""
    kind = str(accelerator.distributed_type.value)
    engine = kind in ("DEEPSPEED", "MEGATRON_LM", "XLA")
    refuse(engine, f"Accelerate's {kind} is not supported: its backward pass takes one loss")
    refuse(kind == "FSDP" and not accelerator.is_fsdp2, "FSDP version 1 is not supported: set fsdp_version=2")
    check_processes(optimizer, accelerator.num_processes, wrap)


def total(losses: Any) -> Tensor:
    """Sum of the present tasks' losses, what frameworks show as the loss."""
    if isinstance(losses, Tensor):
        return losses.sum()
    values = losses.values() if isinstance(losses, Mapping) else losses
    return torch.stack([value for value in values if value is not None]).sum()


def named(losses: Any) -> dict[str, Tensor]:
    """The present tasks' losses by name; a list's are called "0", "1"."""
    if isinstance(losses, Tensor):
        losses = losses.reshape(-1)
    items = losses.items() if isinstance(losses, Mapping) else enumerate(losses)
    return {str(task): value for task, value in items if value is not None}
