"""What every rank of a group checks, for test_sharded.py."""

from __future__ import annotations

import math
import time
from typing import Any

import flatmtl
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import TwoHeads, batch, closure_of, two_heads, values
from sync_checks import Injected, close, losses_of, make, same_bits, split
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel


def whole(param: Tensor) -> Tensor:
    return (param.full_tensor() if isinstance(param, DTensor) else param).detach()


def shards(model: nn.Module) -> list[Tensor]:
    """Copies of the local shards of all parameters."""
    return [(p._local_tensor if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


def sharded(form: str, mesh: DeviceMesh | None = None, **options: Any) -> TwoHeads:
    """Width 5 and heads of 3 rows: uneven over 2 ranks, and without a row for the last of 4."""
    model = two_heads(width=5, **options)
    shard: dict[str, Any] = {} if mesh is None else {"mesh": mesh}
    if form == "kept":  # whole copies stay after forward and backward
        fully_shard(model.trunk, reshard_after_forward=False, **shard)
        fully_shard(model, reshard_after_forward=False, **shard)
        model.set_reshard_after_backward(False)  # type: ignore[operator]
    elif form == "mixed":  # plain heads, which nobody but the step averages
        fully_shard(model.trunk, **shard)
    else:
        fully_shard(model.trunk, **shard)
        fully_shard(model, **shard)
    return model


def equals_unsharded(rank: int, size: int, options: dict[str, Any], form: str, mesh_shape: Any = None) -> int:
    """Three steps are those of one process with whole parameters and the whole batch."""
    mesh = None if mesh_shape is None else init_device_mesh("cpu", mesh_shape, mesh_dim_names=("copy", "shard"))
    expected, model = two_heads(width=5), sharded(form, mesh)
    alone, together = make(expected, sync=None, **options), make(model, **options)
    params = list(model.parameters())  # model.parameters() are the whole ones where FSDP keeps these
    where = [(p._local_tensor if isinstance(p, DTensor) else p).data_ptr() for p in params]
    for seed in range(3):
        x, y = batch(seed)
        mine = split(x, y, size)[rank]
        losses = alone.step(closure_of(expected, x, y))
        if form == "batches":
            found = together.step(lambda b: losses_of(model, b), batches=split(*mine, 2))
        elif form == "closures":
            found = together.step([lambda i=i, b=mine: losses_of(model, b)[i] for i in range(2)])
        else:
            found = together.step(lambda b=mine: losses_of(model, b))
        close([*found], [*losses])
        close([together.last["losses"]], [alone.last["losses"]])
        if not math.isnan(alone.last["norms_loss"][0]):  # known: not of the sum of the gradients alone
            for name in ("weights_loss", "norms_loss", "norms_flat"):
                close([together.last[name]], [alone.last[name]])
        close([whole(p) for p in params], values(expected))
        with torch.no_grad():  # no copy of the perturbed point is left over
            close(model(x), expected(x))
    assert all(isinstance(p.grad, DTensor) == isinstance(p, DTensor) for p in params)
    assert where == [(p._local_tensor if isinstance(p, DTensor) else p).data_ptr() for p in params]
    assert together.state_dict()["flatmtl"]["roles"] == alone.state_dict()["flatmtl"]["roles"]
    return int(together.last["traffic_bytes"])


def tensor_parallel(rank: int, size: int) -> None:
    """DTensors without FSDP: every rank has the whole batch."""
    plan = {"trunk.0": ColwiseParallel(), "trunk.2": RowwiseParallel()}
    models = []
    for parallel in (False, True):
        torch.manual_seed(0)
        model = two_heads(width=8)
        model.trunk.append(nn.Linear(8, 8, dtype=torch.float64))
        models.append(parallelize_module(model, init_device_mesh("cpu", (size,)), plan) if parallel else model)
    expected, model = models
    alone, together = make(expected, sync=None), make(model)
    for seed in range(3):
        x, y = batch(seed)
        alone.step(closure_of(expected, x, y))
        together.step(closure_of(model, x, y))
        close([whole(p) for p in model.parameters()], values(expected))


def unused_and_foreign_parameters(rank: int, size: int) -> None:
    """A parameter that no loss reaches keeps grad None; one of another optimizer keeps the .grad it has."""
    model = sharded("all", tasks=3)
    ours = [p for name, p in model.named_parameters() if not name.startswith("heads.1")]
    optimizer = flatmtl.FlatMTL(torch.optim.SGD(ours, lr=0.1))
    foreign = model.heads[1].weight
    foreign.grad = torch.zeros_like(foreign) + 7.0
    old = foreign.grad
    mine = split(*batch(tasks=3), size)[rank]
    optimizer.step(lambda: losses_of(model, mine)[:2])
    assert foreign.grad is old
    assert torch.equal(whole(foreign.grad), torch.full((3, 5), 7.0, dtype=torch.float64))
    assert model.heads[2].weight.grad is None
    assert model.heads[0].weight.grad is not None


def absent_tasks(rank: int, size: int) -> None:
    """Absent on all ranks: left out. On some: all raise, and the group lives on."""
    expected, model = two_heads(width=5), sharded("all")
    alone, together = make(expected, sync=None), make(model)
    x, y = batch()
    mine = split(x, y, size)[rank]
    alone.step(lambda: [losses_of(expected, (x, y))[0], None])
    together.step(lambda: [losses_of(model, mine)[0], None])
    before = shards(model)
    with pytest.raises(ValueError, match="loss 1 is None on some ranks"):
        together.step(lambda: [loss if k == 0 or rank else None for k, loss in enumerate(losses_of(model, mine))])
    assert all(torch.equal(a, b) for a, b in zip(before, shards(model), strict=True))
    alone.step(closure_of(expected, x, y))
    together.step(lambda: losses_of(model, mine))
    close([whole(p) for p in model.parameters()], values(expected))


def non_finite(rank: int, size: int, perturbed: bool) -> None:
    model = sharded("all")
    optimizer = make(model)
    mine = split(*batch(), size)[rank]
    calls = []

    def closure() -> list[Tensor]:
        calls.append(0)
        factor = math.nan if rank == size - 1 and len(calls) == 1 + perturbed else 1.0
        return [loss * factor for loss in losses_of(model, mine)]

    before = shards(model)
    with pytest.raises(flatmtl.NonFiniteError, match="unperturbed" if not perturbed else "perturbed"):
        optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(before, shards(model), strict=True))
    optimizer.nonfinite = "skip"
    calls.clear()
    optimizer.step(closure)
    assert optimizer.last["skipped"]
    optimizer.step(closure)
    assert not optimizer.last["skipped"]


def grad_scaler(rank: int, size: int) -> None:
    """With torch's scaler and clipping, as in one process; an overflow on one rank skips the update on all."""
    expected, model = two_heads(width=5), sharded("all")
    runs = []
    for net in (expected, model):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
        runs.append((net, make(net, sync=None if net is expected else "auto"), scaler))
    for seed in range(4):
        x, y = batch(seed)
        mine = split(x, y, size)[rank]
        for net, optimizer, scaler in runs:
            here = net is expected or rank == size - 1
            factor = math.inf if seed == 1 and here else 1.0
            part = (x, y) if net is expected else mine
            optimizer.backward(lambda n=net, b=part, f=factor: [loss * f for loss in losses_of(n, b)], scaler)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            before = shards(net)
            scaler.step(optimizer)
            assert all(map(torch.equal, before, shards(net))) == (seed == 1)
            scaler.update()
        close([whole(p) for p in model.parameters()], values(expected))
        assert runs[0][2].get_scale() == runs[1][2].get_scale() == (2.0**12 if seed in (0, 3) else 2.0**11)


def grad_scaler_with_plain_parameters(rank: int, size: int) -> None:
    """torch's scaler cannot unscale DTensors and plain tensors together; it is refused before the passes."""
    model = sharded("mixed")
    optimizer, scaler = make(model), torch.amp.GradScaler("cpu")
    mine = split(*batch(), size)[rank]
    calls = []
    with pytest.raises(TypeError, match=r"grad_scaler: parameter .*\[0\] is a DTensor and parameter .*\[2\] is not"):
        optimizer.backward(lambda: calls.append(0), scaler)
    assert not calls
    optimizer.backward(lambda: losses_of(model, mine), torch.amp.GradScaler("cpu", enabled=False))
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        scaler.unscale_(optimizer)
    optimizer.step()


def failure(rank: int, size: int, at: int, form: str, timeout: float) -> None:
    """One rank fails inside a closure whose passes wait for all ranks: all raise, none hangs, all are as before."""
    if form == "ddp":
        model: nn.Module = two_heads(norm=True, dropout=0.2)
        run: nn.Module = DistributedDataParallel(model)
    else:
        model = run = sharded(form, dropout=0.2)
    optimizer = make(run)
    mine = split(*batch(), size)[rank]
    optimizer.step(lambda: losses_of(run, mine))
    calls = []

    def closure() -> list[Tensor]:
        calls.append(0)
        if rank == size - 1 and len(calls) == at + 1:
            raise Injected("injected")
        return losses_of(run, mine)

    def everything() -> list[Tensor]:
        state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        kept = [(t._local_tensor if isinstance(t, DTensor) else t).clone() for t in (*state, *grads)]
        return [*shards(model), *kept, *(b.clone() for b in model.buffers()), torch.get_rng_state()]

    before, start = everything(), time.monotonic()
    with pytest.raises(Exception) as raised:  # noqa: PT011
        optimizer.step(closure)
    waited = time.monotonic() - start
    assert waited < 2 * timeout + 5
    if rank == size - 1:
        assert isinstance(raised.value, Injected)
        assert waited < timeout  # it gives up, rather than wait for the others
    else:
        assert isinstance(raised.value, RuntimeError), raised.value
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    with pytest.raises(RuntimeError, match=r"process group was aborted"):
        optimizer.step(closure)


def refused(rank: int, size: int) -> None:
    model = sharded("all")
    for sync in ("local", None):
        with pytest.raises(ValueError, match=rf"sync={sync!r}: parameters are DTensors"):
            make(model, sync=sync).step(closure_of(model, *batch()))
    old = FullyShardedDataParallel(two_heads(), use_orig_params=True, device_id=torch.device("cpu"))
    before = [p.detach().clone() for p in old.parameters()]
    for options in ({}, {"sync": "exact"}, {"sync": None}):
        with pytest.raises(
            TypeError, match=r"FullyShardedDataParallel \(FSDP1\).*use torch.distributed.fsdp.fully_shard"
        ):
            make(old, **options).step(closure_of(old, *batch()))
    assert all(torch.equal(a, b) for a, b in zip(before, old.parameters(), strict=True))
    dist.barrier()
    assert same_bits(*shards(two_heads()))


def saves(rank: int, size: int, folder: str, flat: str, form: str) -> None:
    """Trains two steps and saves with torch.distributed.checkpoint."""
    model, optimizer = for_checkpoints(size, flat, form)
    for seed in range(2):
        x, y = batch(seed)
        optimizer.step(lambda b=split(x, y, size)[rank]: losses_of(model, b))
    dcp.save(app_state(model, optimizer), checkpoint_id=folder)


def loads(rank: int, size: int, folder: str, flat: str, form: str) -> None:
    """Loads on another number of ranks, and goes on as the run that never stopped."""
    expected = two_heads(width=5)
    alone = make(expected, sync=None, flat=flat)
    for seed in range(2):
        alone.step(closure_of(expected, *batch(seed)))
    model, optimizer = for_checkpoints(size, flat, form)
    state = app_state(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    close([whole(p) for p in model.parameters()], values(expected))
    assert optimizer.steps == 2
    assert optimizer.state_dict()["flatmtl"]["roles"] == alone.state_dict()["flatmtl"]["roles"]
    for seed in range(2, 4):
        x, y = batch(seed)
        mine = split(x, y, size)[rank]
        alone.step(closure_of(expected, x, y))
        optimizer.step(lambda b=mine: losses_of(model, b))
    close([whole(p) for p in model.parameters()], values(expected))


def for_checkpoints(size: int, flat: str, form: str) -> tuple[nn.Module, flatmtl.FlatMTL]:
    model = sharded("all") if form == "fsdp" else two_heads(width=5)
    return model, make(model, sync="exact", flat=flat)


def app_state(model: nn.Module, optimizer: flatmtl.FlatMTL) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "flatmtl": optimizer.flatmtl_state,
    }
