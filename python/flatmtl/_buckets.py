"""Gradients averaged over ranks in buckets of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

BUCKET_BYTES = 25 << 20

Part = tuple[list[Tensor | None], int, float]  # a row, the index of a parameter, and this rank's weight


def average(agreement: Any, parts: Sequence[Part], params: Sequence[Tensor]) -> None:
    """row[i] = SUM over ranks of weight row[i], for each part; None counts as zeros. Same parts in the same order on
    all ranks, and the same bits on all after.

    Results are slices of the buckets, in the memory layout of their parameters; what they replace is not written to,
    as autograd may hand out one tensor twice.
    """
    works = []
    for bucket in _buckets(parts, params):
        flat = torch.empty(sum(params[i].numel() for _, i, _ in bucket), dtype=params[bucket[0][1]].dtype,
                           device=params[bucket[0][1]].device)  # fmt: skip
        start = 0
        for row, i, weight in bucket:
            param, grad = params[i], row[i]
            size = param.numel()
            slot = _laid_out(flat, start, param)
            if grad is None or weight == 0.0:
                slot.zero_()
            else:
                torch.mul(grad, weight, out=slot)
            row[i] = slot
            start += size
        works.append(agreement.start_sum_(flat))
    for work in works:
        agreement.collective(work.wait)


def _buckets(parts: Sequence[Part], params: Sequence[Tensor]) -> Iterator[list[Part]]:
    """The parts by dtype and device, at most `BUCKET_BYTES` together, or one that is larger."""
    open_: dict[tuple[torch.dtype, torch.device], tuple[list[Part], int]] = {}
    for part in parts:
        param = params[part[1]]
        key, size = (param.dtype, param.device), param.numel() * param.element_size()
        bucket, filled = open_.get(key, ([], 0))
        if bucket and filled + size > BUCKET_BYTES:
            yield bucket
            bucket, filled = [], 0
        bucket.append(part)
        open_[key] = (bucket, filled + size)
    for bucket, _ in open_.values():
        yield bucket


def _laid_out(flat: Tensor, start: int, param: Tensor) -> Tensor:
    """The slice of `flat` that begins at `start`, with shape and strides of the parameter; contiguous if that does not
    lie densely in memory."""
    strides = torch.empty_like(param, device="meta").stride()
    return flat.as_strided(param.shape, strides, start)
