"""What the adapters share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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
