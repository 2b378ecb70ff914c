"""Buffer methods: closed forms, the reference, torchjd, every backend, and their state in the optimizer."""

from __future__ import annotations

import io
from collections.abc import Iterator

import flatmtl
import pytest
import torch
from flatmtl import _generic, _native, _random, reference
from flatmtl.aggregators import BUFFER_AGGREGATORS, get_aggregator
from gradients import DTYPES, random_rows
from models import batch, closure_of, equal, two_heads, values
from torch import Tensor, nn

F64 = torch.float64
NAMES = ["graddrop", "moco", "db_mtl", "excess_mtl"]
CASES = [
    ("graddrop", {"seed": 3}), ("graddrop", {"seed": 4, "leak": (0.0, 0.5, 1.0)}), ("moco", {}),
    ("moco", {"normalize": False, "rho": 0.5, "beta": 1.0, "gamma": 2.0, "gamma_decay": 0.0}), ("db_mtl", {}),
    ("db_mtl", {"beta": 0.5, "decay": 0.7}), ("excess_mtl", {}), ("excess_mtl", {"eta": 1.0}),
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stream(steps: int, tasks: int = 3, size: int = 1000) -> Iterator[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield torch.randn(tasks, size, generator=g, dtype=F64), torch.rand(tasks, generator=g, dtype=F64) + 0.1


@pytest.mark.parametrize(("name", "options"), CASES)
def test_agrees_with_the_reference(name: str, options: dict) -> None:
    ours, theirs = get_aggregator(name, **options), reference.Buffers(name, **options)
    memory = None
    for t, (x, losses) in enumerate(stream(6)):
        memory = ours.fresh_memory(x) if memory is None else memory
        update = ours(x, losses=losses, memory=memory, draw=t)
        expected = theirs(x, losses=losses, draw=t)
        torch.testing.assert_close(update, expected, rtol=1e-9, atol=1e-11 * float(expected.abs().max()))


def test_sdmgrad_agrees_with_the_reference() -> None:
    ours, theirs = flatmtl.SDMGrad(lr=0.3), reference.Buffers("sdmgrad", lr=0.3)
    memory = None
    for (x, _), (y, _), (z, _) in zip(stream(4), list(stream(8))[4:], list(stream(12))[8:], strict=True):
        y, z = x + 0.5 * y, x + 0.5 * z
        memory = ours.fresh_memory(x) if memory is None else memory
        torch.testing.assert_close(ours(x, y, z, memory=memory), theirs(x, y, z), rtol=1e-9, atol=1e-12)


def test_sdmgrad_finds_the_minimum_of_its_objective() -> None:
    """With one batch three times, small steps and lambda: 1/2 ||g_u + lambda g_0||^2 over the simplex."""
    (x, _), *_ = stream(1, tasks=3, size=4)
    lam = 0.3
    method = flatmtl.SDMGrad(lam=lam, lr=0.05, iterations=20000)
    memory = method.fresh_memory(x)
    method(x, x, x, memory=memory)
    u = memory["values"].view(2, 3)[1]
    slope = x @ (x.T @ (u + lam / 3))
    assert float(u.sum()) == pytest.approx(1.0)
    on = u > 1e-12
    assert float(slope[on].max() - slope[on].min()) < 1e-9 * float(slope.abs().max())
    assert float(slope[on].max()) <= float(slope.min()) + 1e-9 * float(slope.abs().max())


def test_closed_forms() -> None:
    x = torch.tensor([[3.0, 0.0, -1.0], [1.0, 2.0, 4.0]], dtype=F64)
    same = x.abs()
    assert torch.equal(flatmtl.GradDrop()(same), same.sum(0))  # one sign: nothing is dropped
    assert torch.equal(flatmtl.GradDrop(leak=1.0)(x), x.sum(0))
    assert torch.equal(flatmtl.GradDrop()(torch.zeros(2, 3)), torch.zeros(3))
    # first steps. MoCo: y_i = l_i x_i / (2 ||x_i||)
    y = torch.tensor([2.0, 6.0], dtype=F64)[:, None] * x / x.norm(dim=1, keepdim=True) / 2
    w = torch.softmax(0.5 - 0.1 * (y @ y.T).sum(1) / 2, 0)
    torch.testing.assert_close(flatmtl.MoCo()(x, losses=[2.0, 6.0]), w @ y, rtol=1e-14, atol=0)
    # DB-MTL: a tenth of x_i / l_i, brought to one length
    v = x / torch.tensor([2.0, 6.0], dtype=F64)[:, None]
    n = v.norm(dim=1)
    torch.testing.assert_close(flatmtl.DBMTL()(x, losses=[2.0, 6.0]), 0.1 * (n.max() / n) @ v, rtol=1e-14, atol=0)
    # ExcessMTL: e = its first value, all weights 1
    torch.testing.assert_close(flatmtl.ExcessMTL()(x), x.sum(0), rtol=1e-15, atol=0)


def test_graddrop_is_torchjds(monkeypatch: pytest.MonkeyPatch) -> None:
    torchjd = pytest.importorskip("torchjd.aggregation")
    x, _ = next(stream(1, size=300))
    start = _random.start_sequence(5, 2, 0, 0)
    u = 0.5 + 0.5 * _random.signed_units(start, 0, 300, torch.device("cpu"))
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: u)
    for leak in (None, torch.tensor([0.0, 0.5, 1.0], dtype=F64)):
        ours = flatmtl.GradDrop(seed=5, leak=0.0 if leak is None else tuple(leak.tolist()))(x, draw=2)
        torch.testing.assert_close(ours, torchjd.GradDrop(leak=leak)(x), rtol=1e-13, atol=1e-14)


def test_graddrop_keeps_signs_as_often_as_it_says() -> None:
    x = torch.tensor([[3.0], [-1.0]], dtype=F64).expand(2, 20000).contiguous()
    kept = float((flatmtl.GradDrop(seed=1)(x) > 0).double().mean())
    assert abs(kept - 0.75) < 4 * (0.75 * 0.25 / 20000) ** 0.5
    assert not torch.equal(flatmtl.GradDrop(seed=1)(x), flatmtl.GradDrop(seed=1)(x, draw=1))


def test_scales_of_one_task() -> None:
    for name in ("excess_mtl", "db_mtl"):
        a, b = get_aggregator(name), get_aggregator(name)
        ma = mb = None
        for x, losses in stream(5):
            ma, mb = (a.fresh_memory(x), b.fresh_memory(x)) if ma is None else (ma, mb)
            scale = torch.tensor([1000.0, 1.0, 1.0], dtype=F64)
            u, v = a(x, losses=losses, memory=ma), b(scale[:, None] * x, losses=scale * losses, memory=mb)
            if name == "db_mtl":  # no unit of a loss matters
                torch.testing.assert_close(u, v, rtol=1e-12, atol=1e-14)
        if name == "excess_mtl":  # the weights do not change
            torch.testing.assert_close(ma["values"][6:], mb["values"][6:], rtol=1e-12, atol=0)


# -- backends ----------------------------------------------------------------------------------------------------------


def wide(rows: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[torch.rand_like(t, dtype=F64 if t.dtype == F64 else torch.float32) for t in row] for row in rows]


@pytest.mark.parametrize("piece", [_generic.PIECE, 7])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_generic_equals_native(dtype: torch.dtype, flat: bool, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_generic, "PIECE", piece)
    g, s = random_rows(3, 1, dtype), random_rows(3, 2, dtype) if flat else None
    a, b = torch.tensor([0.5, -1.0, 2.0], dtype=F64), torch.tensor([1.0, 3.0, -0.5], dtype=F64)
    keep, leak = torch.tensor([0.9, 0.0, 0.3], dtype=F64), torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    torch.manual_seed(0)
    one = wide(g)
    two = [[t.clone() for t in row] for row in one]
    tolerance = {"rtol": 1e-6 if dtype != F64 else 1e-12, "atol": 1e-7 if dtype != F64 else 1e-13}
    _native.moving_average_(one, g, s, a, b, keep)
    _generic.moving_average_(two, g, s, a, b, keep)
    torch.testing.assert_close(one, two, **tolerance)
    torch.testing.assert_close(_native.excess_(one, g, s, a, b), _generic.excess_(two, g, s, a, b), rtol=1e-6, atol=0)
    torch.testing.assert_close(one, two, **tolerance)
    other = None if s is None else random_rows(3, 4, dtype)
    cross = _native.cross_gramian(g, s, random_rows(3, 3, dtype), other, a, b)
    torch.testing.assert_close(
        cross, _generic.cross_gramian(g, s, random_rows(3, 3, dtype), other, a, b), rtol=1e-12, atol=1e-10
    )
    out, out_two = [torch.empty_like(t) for t in g[0]], [torch.empty_like(t) for t in g[0]]
    _native.graddrop_(out, g, s, a, b, leak, 1, 2, 3, 40)
    _generic.graddrop_(out_two, g, s, a, b, leak, 1, 2, 3, 40)
    torch.testing.assert_close(out, out_two, rtol=1.5 * torch.finfo(dtype).eps, atol=1e-12)
    _native.combine_buffers_(out, one, a)
    _generic.combine_buffers_(out_two, one, a)
    torch.testing.assert_close(out, out_two, rtol=1.5 * torch.finfo(dtype).eps, atol=1e-12)


def test_cross_gramian_and_counts_of_threads() -> None:
    rows, others = random_rows(20, 1, shapes=[(70_000,), (3,)]), random_rows(20, 2, shapes=[(70_000,), (3,)])
    one = torch.ones(20, dtype=F64)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        buffers = [[torch.zeros_like(t) for t in row] for row in rows]
        found.append(
            (_native.cross_gramian(rows, None, others, None, one, one), _native.excess_(buffers, rows, None, one, one))
        )
    x = torch.stack([torch.cat(row) for row in rows]).double()
    y = torch.stack([torch.cat(row) for row in others]).double()
    torch.testing.assert_close(found[0][0], x @ y.T, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(found[0][1], x.abs().sum(1), rtol=1e-12, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# -- in the optimizer --------------------------------------------------------------------------------------------------


def make(model: nn.Module, name: str, **options: object) -> flatmtl.FlatMTL:
    chosen = get_aggregator(name, **({"eta": 1.0} if name == "excess_mtl" else {}))
    return flatmtl.FlatMTL(torch.optim.SGD(model.parameters(), lr=0.1), aggregator=chosen, seed=7, **options)  # type: ignore[arg-type]


def families(model: nn.Module, x: Tensor, y: list[Tensor], rho: float) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, g and s of the trunk, by hand."""
    trunk = list(model.trunk.parameters())
    losses, g, s = [], [], []
    for i in range(3):
        own = [*trunk, *model.heads[i].parameters()]
        loss = closure_of(model, x, y)()[i]
        grads = torch.autograd.grad(loss, own)
        losses.append(loss.detach())
        g.append(torch.cat([d.flatten() for d in grads[: len(trunk)]]))
        if rho:
            norms = [
                torch.cat([d.flatten() for d in part]).norm() for part in (grads[: len(trunk)], grads[len(trunk) :])
            ]
            with torch.no_grad():
                old = [p.clone() for p in own]
                for k, (p, d) in enumerate(zip(own, grads, strict=True)):
                    p.add_(d * (rho / norms[k >= len(trunk)]))
            moved = torch.autograd.grad(closure_of(model, x, y)()[i], trunk)
            s.append(torch.cat([d.flatten() for d in moved]))
            with torch.no_grad():
                for p, v in zip(own, old, strict=True):
                    p.copy_(v)
    return torch.stack(losses), torch.stack(g), torch.stack(s) if rho else torch.stack(g)


@pytest.mark.parametrize("combine", ["decomposed", "direct"])
@pytest.mark.parametrize("rho", [0.0, 0.05])
@pytest.mark.parametrize("name", NAMES)
def test_the_step_by_hand(name: str, rho: float, combine: str) -> None:
    """Two families with memories of their own; MoCo, which is not of degree 1, with family_scale rms."""
    model = two_heads(tasks=3)
    optimizer = make(model, name, rho=rho, combine=combine)
    options = {"eta": 1.0} if name == "excess_mtl" else {"seed": 7} if name == "graddrop" else {}
    loss_family, flat_family = reference.Buffers(name, **options), reference.Buffers(name, **options)
    for t in range(4):
        x, y = batch(t, 3)
        losses, g, s = families(model, x, y, rho)

        def once(method: reference.Buffers, rows: Tensor, call: int, losses=losses, t=t) -> Tensor:
            rms = rows.square().sum(1).mean().sqrt() if name == "moco" else 1.0
            return rms * method(rows, losses=losses, draw=t, call=call)

        expected = once(loss_family, s if rho and combine == "direct" else g, 0)
        if rho and combine == "decomposed":
            expected = expected + once(flat_family, s - g, 1)
        optimizer.backward(closure_of(model, x, y))
        update = torch.cat([p.grad.flatten() for p in model.trunk.parameters()])
        torch.testing.assert_close(update, expected, rtol=1e-8, atol=1e-10)
        optimizer.step()


def test_sdmgrad_step_by_hand() -> None:
    model = two_heads(tasks=3)
    optimizer = make(model, "sdmgrad", rho=0.05)
    loss_family, flat_family = reference.Buffers("sdmgrad"), reference.Buffers("sdmgrad")
    for t in range(3):
        batches = [batch(3 * t + i, 3) for i in range(3)]
        rows = [families(model, *b, 0.05) for b in batches]
        expected = loss_family(*(g for _, g, _ in rows)) + flat_family(*(s - g for _, g, s in rows))
        optimizer.backward(lambda b: closure_of(model, *b)(), batches=batches)
        update = torch.cat([p.grad.flatten() for p in model.trunk.parameters()])
        torch.testing.assert_close(update, expected, rtol=1e-7, atol=1e-10)
        optimizer.step()
    with pytest.raises(ValueError, match="aggregator 'sdmgrad' needs 3 independent micro-batches"):
        optimizer.step(closure_of(model, *batch(0, 3)))


@pytest.mark.parametrize("name", [*NAMES, "sdmgrad"])
def test_checkpoints_resume_bit_for_bit(name: str) -> None:
    def run(optimizer: flatmtl.FlatMTL, model: nn.Module, first: int) -> None:
        for t in range(first, first + 3):
            batches = [batch(3 * t + i, 3) for i in range(3)]
            optimizer.step(lambda b: closure_of(model, *b)(), batches=batches)

    model, resumed = two_heads(tasks=3), two_heads(seed=1, tasks=3)
    optimizer = make(model, name)
    run(optimizer, model, 0)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    run(optimizer, model, 3)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    resumed.load_state_dict(loaded["model"])
    again = make(resumed, name)
    again.load_state_dict(loaded["optimizer"])
    run(again, resumed, 3)
    assert equal(values(model), values(resumed))
    if name not in ("graddrop", "sdmgrad"):
        loaded["optimizer"]["flatmtl"]["states"]["aggregator"]["loss"]["buffers"]["0"] = [torch.zeros(2)] * 3
        with pytest.raises(ValueError, match=r"'buffers'\[.0.\]\[0\] is a float32 tensor of shape \(2,\)"):
            again.load_state_dict(loaded["optimizer"])


def memories(optimizer: flatmtl.FlatMTL) -> list[Tensor]:
    state = optimizer.states.get("aggregator", {})
    found = []
    for family in ("loss", "flat"):
        found.append(state[family]["values"])
        found += [b for row in state[family]["buffers"].values() for b in row]
    return found


@pytest.mark.parametrize("name", NAMES[1:])
def test_absent_tasks_and_failures(name: str) -> None:
    model = two_heads(tasks=3)
    optimizer = make(model, name)
    for t in range(2):
        optimizer.step(closure_of(model, *batch(t, 3)))
    before = [m.clone() for m in memories(optimizer)]
    x, y = batch(5, 3)
    calls = 0

    def failing() -> list[Tensor]:
        nonlocal calls
        calls += 1
        return [loss * (float("nan") if calls == 4 else 1.0) for loss in closure_of(model, x, y)()]

    with pytest.raises(flatmtl.NonFiniteError):
        optimizer.step(failing)
    assert equal(before, memories(optimizer))
    optimizer.step(lambda: [loss if i != 1 else None for i, loss in enumerate(closure_of(model, x, y)())])
    after = memories(optimizer)
    count = len(before[0]) // 3
    assert torch.equal(before[0].view(count, 3)[:, 1], after[0].view(count, 3)[:, 1])
    state = optimizer.states["aggregator"]["loss"]["buffers"]
    old = dict(zip(state, [before[1 + 3 * k : 4 + 3 * k] for k in range(len(state))], strict=True))
    for key, row in state.items():
        assert torch.equal(row[1], old[key][1])
        assert not torch.equal(row[0], old[key][0])


def test_narrow_parameters_have_float32_buffers() -> None:
    model = two_heads(tasks=2, dtype=torch.bfloat16)
    optimizer = make(model, "db_mtl")
    optimizer.step(closure_of(model, *batch(0, dtype=torch.bfloat16)))
    buffers = optimizer.states["aggregator"]["loss"]["buffers"]
    assert {b.dtype for row in buffers.values() for b in row} == {torch.float32}
    assert next(model.parameters()).grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_grad_scaler_changes_nothing(name: str) -> None:
    results = []
    for scale in (1.0, 2.0**12):
        model = two_heads(tasks=3)
        optimizer, scaler = make(model, name), torch.amp.GradScaler("cpu", init_scale=scale)
        for t in range(3):
            optimizer.backward(closure_of(model, *batch(t, 3)), grad_scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
        results.append(values(model))
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_with_a_weighting_it_is_the_step_of_the_weighted_losses() -> None:
    weights = [0.5, 2.0, 3.0]
    for name in NAMES:
        one, two = two_heads(tasks=3), two_heads(tasks=3)
        a, b = make(one, name, weighting=flatmtl.FixedWeights(weights)), make(two, name)
        for t in range(3):
            x, y = batch(t, 3)
            a.step(closure_of(one, x, y))
            b.step(lambda x=x, y=y, two=two: [c * l for c, l in zip(weights, closure_of(two, x, y)(), strict=True)])  # noqa: E741
        for p, q in zip(values(one), values(two), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


def test_refusals() -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    sgd = torch.optim.SGD(parameters, lr=0.1)
    for options, message in [
        ({"combine": "each"}, "works with combine='decomposed' or 'direct', not 'each'"),
        ({"max_norm": 1.0}, "does not work with max_norm="),
    ]:
        with pytest.raises(ValueError, match=message):
            flatmtl.FlatMTL(sgd, aggregator="moco", **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'moco' needs losses="):
        flatmtl.aggregate(torch.ones(2, 3), "moco")
    with pytest.raises(TypeError, match="'graddrop' is no function of the Gramian"):
        flatmtl.weights(torch.eye(2), "graddrop")
    with pytest.raises(RuntimeError, match=r"losses: a loss is outside .* \(row 1, value 0\)"):
        flatmtl.DBMTL()(torch.ones(2, 3), losses=[1.0, 0.0])
    with pytest.raises(RuntimeError, match=r"rows: Inf or NaN \(row 1"):
        flatmtl.GradDrop()(torch.tensor([[1.0, 2.0], [torch.inf, 0.0]]))
    for bad in (lambda: flatmtl.GradDrop(leak=2.0), lambda: flatmtl.MoCo(beta=0.0), lambda: flatmtl.DBMTL(beta=1.0),
                lambda: flatmtl.ExcessMTL(eta=-1.0), lambda: flatmtl.SDMGrad(iterations=0)):  # fmt: skip
        with pytest.raises(ValueError, match="it must be"):
            bad()
    model = two_heads()
    with pytest.raises(ValueError, match="aggregator 'db_mtl' needs losses > 0, but that of task 1 is -"):
        make(model, "db_mtl").step(lambda: [l - 100.0 * i for i, l in enumerate(closure_of(model, *batch(0))())])  # noqa: E741
    assert set(BUFFER_AGGREGATORS) == set(flatmtl._ops.BUFFER_METHODS)


def test_opcheck() -> None:
    rows = random_rows(2, shapes=[(3, 4), (5,)])
    flat = [t for row in rows for t in row]
    one, half = torch.ones(2, dtype=F64), torch.full((2,), 0.5, dtype=F64)
    buffers = [torch.zeros_like(t) for t in flat]
    ops, check = torch.ops.flatmtl, torch.library.opcheck
    check(ops.moving_average_.default, (buffers, flat, [], 2, one, one, half))
    check(ops.cross_gramian.default, (flat, [], flat, [], 2, one, one))
    check(ops.graddrop_.default, (buffers[:2], flat, [], 2, one, one, half, 0, 0, 0, 0))
    check(ops.combine_buffers_.default, ([torch.zeros_like(t) for t in rows[0]], flat, 2, half))
    check(ops.buffer_weights.default, (torch.rand(2, dtype=F64), torch.zeros(2, dtype=F64), 2, []))


def scripted(rows: list[list[Tensor]], losses: Tensor, buffers: list[list[Tensor]], state: Tensor) -> list[Tensor]:
    return flatmtl.script.buffer_update(rows, losses, "moco", [], buffers, state)


def test_script() -> None:
    function = torch.jit.script(scripted)
    state, memory = flatmtl.script.buffer_state("moco", 3), None
    buffers: list[list[Tensor]] = []
    for t in range(3):
        rows, losses = random_rows(3, t), torch.tensor([1.0, 2.0, 0.5])
        memory = flatmtl.MoCo().fresh_memory(rows) if memory is None else memory
        buffers = buffers or [[torch.zeros_like(x) for x in row] for row in rows]
        update = function(rows, losses, buffers, state)
        assert equal(update, flatmtl.MoCo()(rows, losses=losses, memory=memory))
        assert torch.equal(state, memory["values"])
    for number, name in enumerate(flatmtl._ops.BUFFER_METHODS):
        assert flatmtl.script.buffer_method_number(name) == number
        assert flatmtl.script.buffer_state(name, 3).shape == get_aggregator(name).fresh_values(3).shape
