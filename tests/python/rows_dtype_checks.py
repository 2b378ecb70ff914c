"""What every rank checks of rows_dtype, for test_rows_dtype.py: functions of (rank, size, ...) that `RankPool` runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import batch, two_heads, values
from shard_checks import sharded, whole
from sync_checks import losses_of, make, same_bits, split
from torch import Tensor, nn

BF16 = torch.bfloat16


def steps(model: nn.Module, optimizer: Any, size: int, rank: int | None) -> None:
    """Three steps with this rank's part of the batch, or with all of it."""
    for seed in range(3):
        x, y = batch(seed, dtype=torch.float32)
        mine = (x, y) if rank is None else split(x, y, size)[rank]
        optimizer.backward(lambda mine=mine: losses_of(model, mine))
        for p in model.parameters():
            grad = whole(p.grad)
            assert grad.dtype == torch.float32
        optimizer.step()


def near(a: list[Tensor], b: list[Tensor]) -> None:
    """Within what a different last bit of some rounded gradients does."""
    for s, t in zip(a, b, strict=True):
        torch.testing.assert_close(s, t, rtol=1e-3, atol=1e-3)


def is_narrow(*grads: Tensor) -> bool:
    return all(torch.equal(g, g.to(BF16).float()) for g in grads)


def replicas(rank: int, size: int, sync: str) -> None:
    """The means over the ranks are rounded: own gradients, which the update takes as they are, show it."""
    for rows_dtype in (BF16, None):
        expected, model = (two_heads(dtype=torch.float32) for _ in range(2))
        alone = make(expected, sync=None, m_sharpness=sync == "local", rows_dtype=rows_dtype)
        for seed in range(3):
            x, y = batch(seed, dtype=torch.float32)
            parts = split(x, y, size)
            batches = parts if sync == "local" else [(x, y)]
            alone.step(lambda b, model=expected: losses_of(model, b), batches=batches)
        steps(model, make(model, sync=sync, rows_dtype=rows_dtype), size, rank)
        assert same_bits(*model.parameters())
        near(values(model), values(expected))
        assert is_narrow(*(p.grad for p in model.heads.parameters())) == (rows_dtype is BF16)


def shards(rank: int, size: int) -> None:
    """FSDP2: shards of the rows are rounded."""
    for rows_dtype in (BF16, None):
        expected, model = two_heads(width=5, dtype=torch.float32), sharded("all", dtype=torch.float32)
        steps(expected, make(expected, sync=None, rows_dtype=rows_dtype), size, None)
        steps(model, make(model, rows_dtype=rows_dtype), size, rank)
        near([whole(p) for p in model.parameters()], values(expected))
        assert is_narrow(*(whole(p.grad) for p in model.heads.parameters())) == (rows_dtype is BF16)


def disagreement(rank: int, size: int) -> None:
    model = two_heads(dtype=torch.float32)
    optimizer = make(model, sync="exact", rows_dtype=BF16 if rank else None)
    with pytest.raises(ValueError, match=r"options differ between ranks: .*rows_dtype=None.* on rank 0"):
        optimizer.step(lambda: losses_of(model, batch(dtype=torch.float32)))
