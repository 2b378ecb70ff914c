"""What every rank of a group checks, for test_sync.py: functions of (rank, size, ...) that `RankPool` runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flatmtl
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from flatmtl import FlatMTL
from models import TwoHeads, batch, two_heads, values
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

Part = tuple[Tensor, list[Tensor]]


def split(x: Tensor, y: list[Tensor], parts: int) -> list[Part]:
    return list(zip(x.chunk(parts), zip(*(t.chunk(parts) for t in y), strict=True), strict=True))  # type: ignore[arg-type]


def losses_of(model: nn.Module, part: Part) -> list[Tensor]:
    return [F.cross_entropy(out, target) for out, target in zip(model(part[0]), part[1], strict=True)]


def make(model: nn.Module, **options: Any) -> FlatMTL:
    options = {"rho": 0.2, "aggregator": "mgda"} | options
    return FlatMTL(SGD(model.parameters(), lr=0.1, momentum=0.9), **options)


def same_bits(*tensors: Tensor) -> bool:
    """Whether all ranks have the same bits in these tensors."""
    flat = torch.cat([t.detach().reshape(-1).view(torch.uint8) for t in tensors])
    every = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(every, flat)
    return all(torch.equal(every[0], other) for other in every)


def close(a: list[Tensor], b: list[Tensor]) -> None:
    for s, t in zip(a, b, strict=True):
        torch.testing.assert_close(s, t, rtol=1e-10, atol=1e-12, equal_nan=True)


def equals_whole_batch(rank: int, size: int, options: dict[str, Any], form: str) -> int:
    """Three steps, each rank with its part of the batch, are three steps of one process with all of it."""
    whole, parts = two_heads(tasks=3), two_heads(tasks=3)
    alone, together = make(whole, sync=None, **options), make(parts, sync="exact", **options)
    for seed in range(3):
        x, y = batch(seed, tasks=3)
        mine = split(x, y, size)[rank]
        expected = alone.step(lambda b=(x, y): losses_of(whole, b))
        if form == "batches":
            losses = together.step(lambda b: losses_of(parts, b), batches=split(*mine, 2))
        elif form == "closures":
            losses = together.step([lambda i=i, b=mine: losses_of(parts, b)[i] for i in range(3)])
        elif form == "tensor":
            losses = together.step(lambda b=mine: torch.stack(losses_of(parts, b)))
        else:
            losses = together.step(lambda b=mine: losses_of(parts, b))
        close([*losses], expected)
        close([together.last["losses"], together.last["sharpness"], together.last["weights_loss"]],
              [alone.last["losses"], alone.last["sharpness"], alone.last["weights_loss"]])  # fmt: skip
        assert same_bits(*parts.parameters(), *losses)
    close(values(parts), values(whole))
    return int(together.last["traffic_bytes"])


def absent_tasks(rank: int, size: int) -> None:
    """Task 1 is in one micro-batch of rank 0 and in none of rank 1; rank 0 has two micro-batches, the others one."""
    pieces = split(*batch(size=4 * (size + 1)), size + 1)
    with_task = [True] + [False] * size

    def losses(model: nn.Module, k: int) -> list[Tensor | None]:
        found: list[Tensor | None] = [*losses_of(model, pieces[k])]
        return found if with_task[k] else [found[0], None]

    whole, parts = two_heads(), two_heads()
    alone, together = make(whole, sync=None), make(parts, sync="exact")
    numbers = [0, 1] if rank == 0 else [rank + 1]
    for _ in range(2):
        expected = alone.step(lambda k: losses(whole, k), batches=range(size + 1))
        close(together.step(lambda k: losses(parts, k), batches=numbers), expected)
        assert same_bits(*parts.parameters())
    close(values(parts), values(whole))


class Routed(nn.Module):
    """One of two experts by the data: a parameter is reached on some ranks only."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(5, 4, dtype=torch.float64) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(4, 1, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor, expert: int) -> list[Tensor]:
        z = self.experts[expert](x).tanh()
        return [head(z).square().mean() for head in self.heads]


def reached_on_one_rank(rank: int, size: int, sync: str) -> None:
    x, _ = batch()
    parts = x.chunk(size)
    torch.manual_seed(0)
    whole = Routed()
    torch.manual_seed(0)
    mine = Routed()
    alone = make(whole, sync=None, m_sharpness=sync == "local")
    together = make(mine, sync=sync)
    for _ in range(2):
        alone.step(lambda k: whole(parts[k], k % 2), batches=range(size))
        together.step(lambda: mine(parts[rank], rank % 2))
        assert same_bits(*mine.parameters())
    close(values(mine), values(whole))
    assert together.state_dict()["flatmtl"]["roles"] == alone.state_dict()["flatmtl"]["roles"]


def local_is_m_sharpness(rank: int, size: int, options: dict[str, Any]) -> None:
    whole, parts = two_heads(), two_heads()
    alone, together = make(whole, sync=None, m_sharpness=True, **options), make(parts, sync="local", **options)
    for seed in range(3):
        x, y = batch(seed)
        pieces = split(x, y, size)
        expected = alone.step(lambda b: losses_of(whole, b), batches=pieces)
        close(together.step(lambda b=pieces[rank]: losses_of(parts, b)), expected)
        close([together.last["sharpness"]], [alone.last["sharpness"]])
        assert same_bits(*parts.parameters())
    close(values(parts), values(whole))


def ddp(rank: int, size: int, options: dict[str, Any], norm: bool) -> None:
    """A model in DDP is found, and its ranks average."""
    whole, parts = two_heads(), two_heads(norm=norm)
    wrapped = DistributedDataParallel(parts, **options)
    alone, together = make(whole, sync=None), make(wrapped)
    for seed in range(3):
        x, y = batch(seed)
        mine = split(x, y, size)[rank]
        together.step(lambda b=mine: losses_of(wrapped, b))
        assert same_bits(*parts.parameters())
        if not norm:
            alone.step(lambda b=(x, y): losses_of(whole, b))
    if not norm:
        close(values(parts), values(whole))
    # DDP itself still works afterwards, once: the hooks reduce, forward after forward
    for _ in range(2):
        wrapped.zero_grad()
        sum(losses_of(wrapped, split(*batch(rank), 2)[0])).backward()
        assert same_bits(*(p.grad for p in parts.parameters()))


def without_sync(rank: int, size: int) -> None:
    """sync=None, and replicas that nobody said are replicas, do not communicate."""
    for options in ({"sync": None}, {}):
        model = two_heads()
        optimizer = make(model, **options)
        if rank == 0:  # alone
            optimizer.step(lambda m=model: losses_of(m, batch()))
            assert optimizer.last["traffic_bytes"] == 0


class Injected(Exception):
    pass


def snapshot(model: nn.Module, optimizer: FlatMTL) -> list[Tensor]:
    state = [v.clone() for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [*values(model), *(b.clone() for b in model.buffers()), *state, *grads, torch.get_rng_state()]


def failure(rank: int, size: int, at: int, error: str, sync: str, wrap: bool) -> None:
    """One rank fails at call `at` of the closure: all raise, everything is as before, and training goes on."""
    model, other = two_heads(norm=True, dropout=0.2), two_heads(norm=True, dropout=0.2)
    run = DistributedDataParallel(model, broadcast_buffers=False) if wrap else model
    optimizer, undisturbed = make(run, sync=sync), make(other, sync=sync)
    kinds = {"Injected": Injected, "KeyboardInterrupt": KeyboardInterrupt}
    last = size - 1
    for seed in range(2):
        mine = split(*batch(seed), size)[rank]
        calls = []

        def closure(m: nn.Module, b: Part = mine, calls: list[int] = calls) -> list[Tensor]:
            calls.append(0)
            if rank == last and len(calls) == at + 1:
                m(b[0])
                raise kinds[error]("injected")
            return losses_of(m, b)

        torch.manual_seed(rank)
        before = snapshot(model, optimizer)
        with pytest.raises(kinds[error] if rank == last else flatmtl.RankError, match="injected") as raised:
            optimizer.step(lambda c=closure: c(run))
        if rank != last:
            assert raised.value.rank == last
            assert error in str(raised.value)
        for a, b in zip(before, snapshot(model, optimizer), strict=True):
            assert torch.equal(a, b)
        optimizer.step(lambda b=mine: losses_of(run, b))
        torch.manual_seed(rank)
        undisturbed.step(lambda b=mine: losses_of(other, b))
        for a, b in zip(snapshot(model, optimizer), snapshot(other, undisturbed), strict=True):
            assert torch.equal(a, b)


def failure_outside_passes(rank: int, size: int) -> None:
    """Bad arguments, and Ctrl-C that was held until the update, on one rank."""
    model = two_heads()
    optimizer = make(model, sync="exact")
    mine = split(*batch(), size)[rank]
    optimizer.step(lambda: losses_of(model, mine))
    before = snapshot(model, optimizer)
    expected = ValueError if rank == 0 else flatmtl.RankError
    with pytest.raises(expected, match="batches is empty"):
        optimizer.step(lambda b: losses_of(model, b), batches=[] if rank == 0 else [mine])
    for a, b in zip(before, snapshot(model, optimizer), strict=True):
        assert torch.equal(a, b)
    optimizer.step(lambda: losses_of(model, mine))
    assert same_bits(*model.parameters())


def non_finite(rank: int, size: int, sync: str, nonfinite: str, perturbed: bool) -> None:
    """A loss that is NaN on one rank: all raise NonFiniteError, or all skip."""
    model = two_heads()
    optimizer = make(model, sync=sync, nonfinite=nonfinite)
    mine = split(*batch(), size)[rank]
    optimizer.step(lambda: losses_of(model, mine))
    before = values(model)
    calls = []

    def closure() -> list[Tensor]:
        calls.append(0)
        losses = losses_of(model, mine)
        if rank == size - 1 and len(calls) == 1 + perturbed:
            losses[0] = losses[0] * math.nan
        return losses

    if nonfinite == "raise":
        with pytest.raises(flatmtl.NonFiniteError) as raised:
            optimizer.step(closure)
        assert raised.value.task == 0
        assert raised.value.pass_ == ("perturbed" if perturbed else "unperturbed")
    else:
        optimizer.step(closure)
        assert optimizer.last["skipped"]
        assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))
    optimizer.step(lambda: losses_of(model, mine))
    assert same_bits(*model.parameters())


def grad_scaler(rank: int, size: int, sync: str) -> None:
    """An overflow on one rank skips the update on all, and their scales stay the same."""
    model = two_heads(dtype=torch.float32)
    optimizer = make(model, sync=sync)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, y = batch(dtype=torch.float32)
    mine = split(x, y, size)[rank]
    for step in range(3):
        overflow = step == 1 and rank == size - 1
        before = values(model)
        optimizer.backward(lambda o=overflow: [v * (math.inf if o else 1.0) for v in losses_of(model, mine)], scaler)
        scaler.step(optimizer)
        scaler.update()
        assert same_bits(*model.parameters())
        changed = any(not torch.equal(a, b) for a, b in zip(before, values(model), strict=True))
        assert changed == (step != 1)
        assert scaler.get_scale() == (2.0**10 if step == 0 else 2.0**9)


def disagreement(rank: int, size: int, what: str, message: str) -> None:
    """Every rank raises when something differs that must not."""
    model = two_heads(seed=rank if what == "values" else 0, tasks=2)
    options: dict[str, Any] = {"sync": "exact"}
    if what == "options":
        options["adaptive"] = rank == 1
    if what == "batches":
        options["m_sharpness"] = True
    optimizer = make(model, **options)
    if what == "rho":
        optimizer.param_groups[0]["rho"] = 0.1 * (rank + 1)
    x, y = batch()
    closure: Callable[..., Any] = lambda b=None: losses_of(model, (x, y))  # noqa: E731
    if what == "tasks":
        closure = lambda: dict(zip("ab" if rank == 0 else "ba", losses_of(model, (x, y)), strict=True))  # noqa: E731
    if what == "count":
        closure = lambda: losses_of(model, (x, y))[: 2 - rank]  # noqa: E731
    before = values(model)
    batches = [0] * (rank + 2) if what == "batches" else None
    with pytest.raises(ValueError, match=message):
        optimizer.step(closure, batches=batches)
    assert all(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))


def large_rows_and_layouts(rank: int, size: int, dtype: torch.dtype) -> None:
    """Several buckets, convolutions in channels_last, 16-bit numbers."""
    from flatmtl import _buckets

    _buckets.BUCKET_BYTES = 1 << 9
    try:
        torch.manual_seed(0)
        trunk = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        model = nn.ModuleList([trunk, nn.Linear(4, 2), nn.Linear(4, 2)]).to(dtype)
        x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(rank)).to(dtype)

        def closure() -> list[Tensor]:
            z = model[0](x).mean((2, 3))
            return [model[k](z).float().square().mean() for k in (1, 2)]

        optimizer = make(model, sync="exact")
        for _ in range(2):
            optimizer.step(closure)
        assert same_bits(*model.parameters())
        assert trunk.weight.grad is not None
        assert trunk.weight.grad.is_contiguous(memory_format=torch.channels_last)
    finally:
        _buckets.BUCKET_BYTES = 25 << 20


def parts_of(model: TwoHeads) -> tuple[int, int]:
    """Number of shared and of own parameters."""
    shared = sum(p.numel() for p in model.trunk.parameters())
    return shared, sum(p.numel() for p in model.heads.parameters())
