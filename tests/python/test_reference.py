"""The reference against closed forms, optimality conditions and other people's solvers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from flatmtl import reference
from flatmtl.reference import aggregators
from models import batch, closure_of, two_heads, values
from torch import Tensor, nn

F64 = torch.float64
SOLVED = ["mgda", "pcgrad", "cagrad", "imtl_g", "nash_mtl", "fairgrad"]
DEGREE = {"nash_mtl": 0.0, "fairgrad": -1 / 3}  # the others: 1
COMBINE = ["decomposed", "direct", "second", "each"]


def random_rows(seed: int, tasks: int | None = None, size: int | None = None, spread: float = 0.0) -> Tensor:
    """K x P standard normal rows; lengths spread over that many powers of ten."""
    g = torch.Generator().manual_seed(seed)
    tasks = tasks or int(torch.randint(1, 13, (), generator=g))
    size = size or tasks + int(torch.randint(1, 9, (), generator=g))
    rows = torch.randn(tasks, size, generator=g, dtype=F64)
    return rows * 10 ** (spread * (torch.rand(tasks, 1, generator=g, dtype=F64) - 0.5))


def close(a: Tensor, b: Tensor, rtol: float = 1e-10) -> bool:
    return bool((a - b).norm() <= rtol * b.norm())


# -- one and two tasks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gain"),
    [
        ("sum", 1.0),
        ("mean", 1.0),
        ("mgda", 1.0),
        ("pcgrad", 1.0),
        ("imtl_g", 1.0),
        ("cagrad", 1.4 / 1.16),
        ("nash_mtl", 1 / 5.0),
        ("fairgrad", 25 ** (-2 / 3)),
    ],
)
def test_one_task(name: str, gain: float) -> None:
    torch.testing.assert_close(reference.weights(torch.tensor([[25.0]]), name).item(), gain, rtol=1e-14, atol=0)


@pytest.mark.parametrize("seed", range(20))
def test_two_tasks_closed_forms(seed: int) -> None:
    rows = random_rows(seed, tasks=2, size=3, spread=2)
    gramian = rows @ rows.T
    (g11, g12), (_, g22) = gramian.tolist()
    d1, d2 = math.sqrt(g11), math.sqrt(g22)
    cosine = g12 / d1 / d2
    w1 = min(max((g22 - g12) / (g11 + g22 - 2 * g12), 0), 1)
    expected = {
        "mgda": [w1, 1 - w1],
        "pcgrad": [1 - min(g12, 0) / g11, 1 - min(g12, 0) / g22],
        "imtl_g": [d2 / (d1 + d2), d1 / (d1 + d2)],
        "nash_mtl": [1 / d1 / math.sqrt(1 + cosine), 1 / d2 / math.sqrt(1 + cosine)],
    }
    for name, w in expected.items():
        torch.testing.assert_close(reference.weights(gramian, name), torch.tensor(w, dtype=F64), rtol=1e-11, atol=1e-15)


# -- optimality conditions, relative to the size of the terms ---------------------------------------------------------


@pytest.mark.parametrize("spread", [0.0, 12.0])
@pytest.mark.parametrize("seed", range(40))
def test_optimality(seed: int, spread: float) -> None:
    rows = random_rows(seed, spread=spread)
    gramian = rows @ rows.T

    w = reference.weights(gramian, "mgda")
    excess = (gramian @ w - w @ gramian @ w) / (gramian.abs() @ w)
    assert (w >= 0).all()
    assert abs(w.sum() - 1) < 1e-13
    assert excess.min() >= -1e-12
    assert excess[w > 0].abs().max() <= 1e-12

    w = reference.weights(gramian, "nash_mtl")
    assert (w * (gramian @ w) - 1).abs().max() <= 1e-12 * (w * (gramian.abs() @ w)).max()
    for alpha in (0.5, 1.0, 2.0, 5.0):
        w = reference.weights(gramian, "fairgrad", alpha=alpha)
        assert (w > 0).all()
        assert ((gramian @ w - w ** (-1 / alpha)) / (gramian.abs() @ w)).abs().max() <= 1e-12

    w = reference.weights(gramian, "imtl_g")
    projections = gramian @ w / gramian.diagonal().sqrt()
    size = gramian.abs() @ w.abs() / gramian.diagonal().sqrt()
    assert abs(w.sum() - 1) <= 1e-10 * w.abs().sum()
    assert (projections - projections.mean()).abs().max() <= 1e-10 * size.max()


@pytest.mark.parametrize("c", [0.0, 0.1, 0.4, 0.9])
@pytest.mark.parametrize("seed", range(30))
def test_cagrad_is_the_worst_case_optimum(seed: int, c: float) -> None:
    """v = g_0 + (phi/||g_w||) g_w is on the ball around g_0, and the tasks in w are those with the least <g_i, v>."""
    rows = random_rows(seed)
    gramian = rows @ rows.T
    mean = rows.mean(0)
    correction = (1 + c**2) * reference.weights(gramian, "cagrad", c=c) - 1 / len(rows)
    assert correction.min() >= -1e-14 * correction.abs().max() - 1e-15
    assert abs((correction @ rows).norm() - c * mean.norm()) <= 1e-11 * mean.norm()
    gain = rows @ (mean + correction @ rows)
    size = gramian.abs() @ (correction.abs() + 1 / len(rows))
    on = correction > 1e-12
    if on.any():
        assert ((gain[on] - gain.min()) / size[on]).max() <= 1e-11


def test_cagrad_against_a_conic_solver() -> None:
    cvxpy = pytest.importorskip("cvxpy")
    for seed in range(10):
        rows = random_rows(seed)
        mean = rows.mean(0)
        v, worst = cvxpy.Variable(rows.shape[1]), cvxpy.Variable()
        ball = cvxpy.norm(v - mean.numpy()) <= 0.4 * float(mean.norm())
        cvxpy.Problem(cvxpy.Maximize(worst), [rows.numpy() @ v >= worst, ball]).solve(solver="CLARABEL")
        ours = 1.16 * reference.aggregate(rows, "cagrad")
        assert (rows @ ours).min() >= worst.value - 1e-7 * abs(worst.value)
        assert close(ours, torch.tensor(v.value), 1e-4)


@pytest.mark.parametrize("name", ["mgda", "pcgrad", "imtl_g"])
def test_against_torchjd(name: str) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    theirs = {
        "mgda": aggregation.MGDA(epsilon=1e-9, max_iters=20000), "pcgrad": aggregation.PCGrad(),
        "imtl_g": aggregation.IMTLG(),
    }[name]  # fmt: skip
    for seed in range(10):
        rows = random_rows(seed, tasks=2 if name == "pcgrad" else 3, size=7)
        assert close(reference.aggregate(rows, name), theirs(rows), 1e-3 if name == "mgda" else 1e-9)


def test_mgda_against_a_quadratic_programme() -> None:
    quadprog = pytest.importorskip("quadprog")
    import numpy as np

    for seed in range(20):
        rows = random_rows(seed)
        k = len(rows)
        constraints = np.vstack([np.ones(k), np.eye(k)]).T
        solution = quadprog.solve_qp((rows @ rows.T).numpy(), np.zeros(k), constraints, np.r_[1.0, np.zeros(k)], 1)[0]
        torch.testing.assert_close(
            reference.weights(rows @ rows.T, "mgda"), torch.from_numpy(solution), rtol=1e-9, atol=1e-11
        )


# -- properties of every method ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVED)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e30])
def test_degree(name: str, scale: float) -> None:
    rows = random_rows(3, tasks=5)
    expected = scale ** DEGREE.get(name, 1.0) * reference.aggregate(rows, name)
    assert close(reference.aggregate(scale * rows, name), expected, 1e-11)


@pytest.mark.parametrize("name", [n for n in SOLVED if n != "pcgrad"])
def test_permutation(name: str) -> None:
    rows = random_rows(4, tasks=6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert close(reference.aggregate(rows[order], name), reference.aggregate(rows, name), 1e-11)


@pytest.mark.parametrize("name", SOLVED)
def test_duplicates_and_zero_rows(name: str) -> None:
    g = torch.tensor([3.0, 4.0], dtype=F64)
    w = reference.weights(reference.gramian(torch.stack([g, g, g])), name)
    total = {"pcgrad": 3.0, "cagrad": 1.4 / 1.16, "nash_mtl": math.sqrt(3) / 5, "fairgrad": 3 * 75 ** (-2 / 3)}
    torch.testing.assert_close(w.sum().item(), total.get(name, 1.0), rtol=1e-12, atol=0)
    if name not in ("mgda", "cagrad"):  # of those the update alone is unique
        torch.testing.assert_close(w, w.mean().expand(3), rtol=1e-12, atol=0)
    w = reference.weights(torch.diag(torch.tensor([0.0, 4.0, 0.0])), name)
    if name == "mgda":
        assert w.tolist() == [0.5, 0, 0.5]
    elif name in ("imtl_g", "nash_mtl", "fairgrad"):
        assert w[0] == w[2] == 0
        assert w[1] > 0
    assert (reference.weights(torch.zeros(3, 3), name) == 0).all() == (name in ("imtl_g", "nash_mtl", "fairgrad"))


def test_pareto_stationary() -> None:
    rows = torch.tensor([[1.0, 2.0], [-1.0, -2.0]], dtype=F64)
    for name in ("imtl_g", "nash_mtl", "fairgrad"):
        assert (reference.weights(rows @ rows.T, name) == 0).all()
    assert (reference.aggregate(rows, "mgda") == 0).all()
    torch.testing.assert_close(reference.weights(rows @ rows.T, "cagrad"), torch.full((2,), 0.5 / 1.16, dtype=F64))
    triple = torch.tensor([[1.0, 0.3], [-0.2, 1.0], [-0.8, -1.3]], dtype=F64)  # they sum to 0
    for name in ("nash_mtl", "fairgrad"):
        assert (reference.weights(triple @ triple.T, name) == 0).all()


def test_pcgrad_orders() -> None:
    """Every order of the other tasks comes up equally often; the order depends on each of the four numbers."""
    counts: dict[tuple[int, ...], int] = {}
    for draw in range(6000):
        order = tuple(aggregators._others(1, 4, 5, draw, 0))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert all(850 < n < 1150 for n in counts.values())
    base = aggregators._others(0, 40, 1, 2, 3)
    assert sorted(base) == list(range(1, 40))
    for other in ((0, 40, 2, 2, 3), (0, 40, 1, 3, 3), (0, 40, 1, 2, 4)):
        assert aggregators._others(*other) != base


def test_rows_in_pieces() -> None:
    rows = random_rows(7, tasks=3, size=200_000).float()
    pieces = [[row[:7].reshape(7, 1), row[7:7], row[7:]] for row in rows]
    expected = rows.double() @ rows.double().T
    torch.testing.assert_close(reference.gramian(rows), expected, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(reference.gramian(pieces), expected, rtol=1e-12, atol=1e-9)
    whole, parts = reference.aggregate(rows, "cagrad"), reference.aggregate(pieces, "cagrad")
    assert [p.shape for p in parts] == [(7, 1), (0,), (199_993,)]
    assert whole.dtype == torch.float32
    torch.testing.assert_close(torch.cat([p.flatten() for p in parts]), whole)


def test_errors() -> None:
    with pytest.raises(ValueError, match="cagrad"):
        reference.weights(torch.eye(2), "adam")
    with pytest.raises(ValueError, match="row 1"):
        reference.weights(torch.tensor([[1.0, 0, 0], [0, math.nan, 0], [0, 0, 1]]), "mgda")
    with pytest.raises(ValueError, match="K x K"):
        reference.weights(torch.ones(2, 3), "mgda")
    with pytest.raises(ValueError, match="third"):
        reference.FlatMTL(torch.optim.SGD([torch.ones(1)]), combine="third")


# -- the step ---------------------------------------------------------------------------------------------------------


def quadratics(tasks: int = 3, size: int = 6) -> tuple[Tensor, list[Tensor], Callable[[], list[Tensor]]]:
    g = torch.Generator().manual_seed(11)
    theta = torch.randn(size, generator=g, dtype=F64).requires_grad_()
    roots = torch.randn(tasks, size, size, generator=g, dtype=F64)
    hessians = [a @ a.T for a in roots]
    return theta, hessians, lambda: [0.5 * theta @ h @ theta for h in hessians]


@pytest.mark.parametrize("name", ["sum", *SOLVED])
def test_flat_gradient_of_quadratics(name: str) -> None:
    """l_i = theta' H_i theta / 2: g_i = H_i theta and f_i = rho H_i g_i / ||g_i|| exactly (T2)."""
    theta, hessians, closure = quadratics()
    optimizer = reference.FlatMTL(torch.optim.SGD([theta], lr=0.1), aggregator=name, rho=0.01)
    optimizer.backward(closure)
    g = torch.stack([h @ theta.detach() for h in hessians])
    f = torch.stack([0.01 * h @ row / row.norm() for h, row in zip(hessians, g, strict=True)])
    pair = torch.cat([g, f])
    a, b = reference.step_weights(pair @ pair.T, None, name)
    assert close(theta.grad, a @ g + b @ f, 1e-9)


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("name", ["sum", "mean", *SOLVED])
def test_vectors_and_coefficients_agree(name: str, combine: str) -> None:
    """The step combines vectors, step_weights only Gramians: two ways to the same update."""
    theta, hessians, closure = quadratics()
    start = theta.detach().clone()
    optimizer = reference.FlatMTL(torch.optim.SGD([theta], lr=0.1), aggregator=name, rho=0.5, combine=combine)
    optimizer.backward(closure)
    assert torch.equal(theta.detach(), start)
    g = torch.stack([h @ start for h in hessians])
    s = torch.stack([h @ (start + 0.5 * row / row.norm()) for h, row in zip(hessians, g, strict=True)])
    pair = torch.cat([g, s - g])
    a, b = reference.step_weights(pair @ pair.T, s @ s.T, name, combine=combine)
    assert close(theta.grad, a @ g + b @ (s - g), 1e-10)


@pytest.mark.parametrize("options", [{}, {"adaptive": True}, {"norm": "joint"}, {"adaptive": True, "eta": 0.1}])
def test_sum_decomposed_equals_direct(options: dict) -> None:
    results = []
    for combine in ("decomposed", "direct"):
        model = two_heads(tasks=3)
        optimizer = reference.FlatMTL(
            torch.optim.Adam(model.parameters(), lr=0.01), aggregator="sum", combine=combine, **options
        )
        for i in range(4):
            optimizer.step(closure_of(model, *batch(i, tasks=3)))
        results.append(values(model))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-13)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


@pytest.mark.parametrize("name", ["sum", "mgda", "imtl_g"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("declared", [False, True])
def test_one_task_is_sam(name: str, adaptive: bool, declared: bool) -> None:
    model, twin = two_heads(tasks=1), two_heads(tasks=1)
    params, rho = list(twin.parameters()), 0.1
    optimizer = reference.FlatMTL(
        torch.optim.SGD(model.parameters(), lr=0.1), aggregator=name, rho=rho, adaptive=adaptive,
        shared=list(model.parameters()) if declared else None, combine="direct",
    )  # fmt: skip
    by_hand = torch.optim.SGD(params, lr=0.1)
    for i in range(5):
        x, y = batch(i, tasks=1)
        optimizer.step(closure_of(model, x, y))
        closure = closure_of(twin, x, y)
        g = flat(torch.autograd.grad(closure()[0], params))
        start = flat(params)
        t = start.abs() if adaptive else torch.ones_like(start)
        nn.utils.vector_to_parameters(start + rho * t**2 * g / (t * g).norm(), params)
        by_hand.zero_grad()
        closure()[0].backward()
        nn.utils.vector_to_parameters(start, params)
        by_hand.step()
        torch.testing.assert_close(values(model), values(twin), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("adaptive", [False, True])
def test_one_task_against_pytorch_optimizer(adaptive: bool) -> None:
    sam = pytest.importorskip("pytorch_optimizer").SAM
    model, twin = two_heads(tasks=1), two_heads(tasks=1)
    optimizer = reference.FlatMTL(
        torch.optim.SGD(model.parameters(), lr=0.1), aggregator="sum", rho=0.2, adaptive=adaptive
    )
    theirs = sam(twin.parameters(), torch.optim.SGD, rho=0.2, adaptive=adaptive, lr=0.1)
    for i in range(5):
        x, y = batch(i, tasks=1)
        optimizer.step(closure_of(model, x, y))
        closure = closure_of(twin, x, y)
        closure()[0].backward()
        theirs.first_step(zero_grad=True)
        closure()[0].backward()
        theirs.second_step(zero_grad=True)
    torch.testing.assert_close(values(model), values(twin), rtol=1e-6, atol=1e-8)  # theirs adds 1e-12 to the norm


@pytest.mark.parametrize("norm", ["separate", "joint"])
def test_radius(norm: str) -> None:
    """Separate norms move shared and own parameters rho_shared and rho_task; a joint norm moves both rho (T6)."""
    model = two_heads(tasks=2)
    x, y = batch()
    places: list[Tensor] = []

    def closure() -> list[Tensor]:
        places.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))
        return closure_of(model, x, y)()

    rho = (0.3, 0.4) if norm == "separate" else 0.5
    optimizer = reference.FlatMTL(torch.optim.SGD(model.parameters(), lr=0.1), rho=rho, norm=norm)
    optimizer.backward(closure)
    trunk = sum(p.numel() for p in model.trunk.parameters())
    head = sum(p.numel() for p in model.heads[0].parameters())
    assert len(places) == 3
    for task in (0, 1):
        moved = places[task + 1] - places[0]
        torch.testing.assert_close(moved.norm().item(), 0.5)
        if norm == "separate":
            torch.testing.assert_close(moved[:trunk].norm().item(), 0.3)
        assert (moved[trunk + (1 - task) * head :][:head] == 0).all()


def test_rho_zero_is_plain_aggregation() -> None:
    model = two_heads(tasks=2)
    x, y = batch()
    calls = []

    def closure() -> list[Tensor]:
        calls.append(1)
        return closure_of(model, x, y)()

    reference.FlatMTL(torch.optim.SGD(model.parameters(), lr=0.1), aggregator="mgda", rho=0.0).backward(closure)
    trunk = list(model.trunk.parameters())
    rows = [torch.autograd.grad(closure()[i], trunk) for i in range(2)]
    torch.testing.assert_close([p.grad for p in trunk], reference.aggregate(rows, "mgda"))
    assert len(calls) == 3  # one in the step


def test_batch_norm_and_random_numbers() -> None:
    model, twin = (two_heads(tasks=2, norm=True, dropout=0.5) for _ in range(2))
    x, y = batch()
    torch.manual_seed(5)
    masks: list[Tensor] = []
    model.trunk[-1].register_forward_hook(lambda _m, _i, out: masks.append(out.detach() == 0))
    reference.FlatMTL(torch.optim.SGD(model.parameters(), lr=0.1)).backward(closure_of(model, x, y))
    after = torch.get_rng_state()
    torch.manual_seed(5)
    twin(x)
    assert torch.equal(after, torch.get_rng_state())
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)


def test_parameters_come_back_after_an_exception() -> None:
    model = two_heads(tasks=2)
    x, y = batch()
    before, calls = values(model), []

    def closure() -> list[Tensor]:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("lost")
        return closure_of(model, x, y)()

    with pytest.raises(RuntimeError, match="lost"):
        reference.FlatMTL(torch.optim.SGD(model.parameters(), lr=0.1)).step(closure)
    assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))


def test_unreached_parameters_are_left_alone() -> None:
    model = two_heads(tasks=3)
    x, y = batch(tasks=3)
    model.heads[2].weight.grad = torch.ones_like(model.heads[2].weight)
    optimizer = reference.FlatMTL(torch.optim.SGD(model.parameters(), lr=0.1))
    before = values(model.heads[2])
    optimizer.step(lambda: closure_of(model, x, y)()[:2])
    assert model.heads[2].weight.grad is None
    assert all(torch.equal(a, b) for a, b in zip(values(model.heads[2]), before, strict=True))
