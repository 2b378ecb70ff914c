"""Rows to measure on: K vectors of P numbers, in one tensor each or cut as the parameters of known models are."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .models import ResNet18, VisionTransformer

LAYOUTS = ("one", "500 x 400", "ResNet-18", "ViT")


@functools.cache
def shapes(layout: str) -> list[tuple[int, ...]]:
    """The shapes of one row's tensors: the 62 of a ResNet-18 with 1000 classes (11.7 million numbers), the 152 of a small vision
    transformer (5.7 million), or 500 of 400 numbers."""
    if layout == "500 x 400":
        return [(400,)] * 500
    models: dict[str, Callable[[], nn.Module]] = {"ResNet-18": lambda: ResNet18([1000]), "ViT": VisionTransformer}
    if layout not in models:
        raise ValueError(f"there is no layout {layout!r}; there are {LAYOUTS[1:]}")
    with torch.device("meta"):
        return [tuple(p.shape) for p in models[layout]().parameters()]


def numbers(layout: str) -> int:
    return sum(math.prod(shape) for shape in shapes(layout))


class Arena:
    """Memory that all cases of one dtype share, so that none pays for fresh pages. It holds normal random numbers; rows
    differ in where they begin in a sequence that repeats itself after a prime number of elements. `out` is apart, since
    what is written there (bits of any pattern) must not become a row."""

    PERIOD = 1_000_003

    def __init__(self, count: int, dtype: torch.dtype = torch.float32, out: int = 0) -> None:
        self.dtype, self.count = dtype, count
        self.numbers = torch.empty(count, dtype=dtype)
        self._out = torch.zeros(out, dtype=dtype)
        self.numbers[: self.PERIOD] = torch.randn(min(count, self.PERIOD), generator=torch.Generator().manual_seed(0))
        for begin in range(self.PERIOD, count, self.PERIOD):
            piece = self.numbers[begin : begin + self.PERIOD]
            piece.copy_(self.numbers[: len(piece)])

    def rows(self, count: int, length: int) -> Tensor:
        """(count, length), contiguous, to be read only."""
        if count * length > self.count:
            raise ValueError(f"the arena has {self.count} numbers; {count} rows of {length} were asked for")
        return self.numbers[: count * length].view(count, length)

    def out(self, length: int, count: int = 1) -> Tensor:
        """(count, length), contiguous, to write to."""
        if count * length > len(self._out):
            raise ValueError(
                f"the arena has room for {len(self._out)} numbers to write; {count} x {length} were asked for"
            )
        return self._out[: count * length].view(count, length)


def cut(row: Tensor, layout: str) -> list[Tensor]:
    """A row as tensors that lie one after another in its memory."""
    if layout == "one":
        return [row]
    pieces, begin = [], 0
    for shape in shapes(layout):
        size = math.prod(shape)
        pieces.append(row[begin : begin + size].view(shape))
        begin += size
    return pieces
