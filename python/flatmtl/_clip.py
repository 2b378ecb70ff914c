"""max_norm: combined gradients of a norm that is bounded, by their weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def clipped(
    a: Tensor, b: Tensor, pair: Tensor, direct: Tensor | None, max_norm: float, families: bool
) -> tuple[Tensor, Tensor]:
    """Weights of combined gradients of norm max_norm at most: of each family, or of the whole update."""
    count = len(a)
    if families:
        parts = [(a, pair[:count, :count]), (b, pair[count:, count:])]
        factors = [clip_factor(float(w @ gramian @ w), max_norm) for w, gramian in parts]
        return a * factors[0], b * factors[1]
    both = torch.cat([a, b])
    square = both @ pair @ both if direct is None else a @ direct @ a
    factor = clip_factor(float(square), max_norm)
    return a * factor, b * factor


def clip_factor(square: float, max_norm: float) -> float:
    return max_norm / math.sqrt(square) if square > max_norm**2 else 1.0
