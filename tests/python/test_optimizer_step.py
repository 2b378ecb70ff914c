"""What a step computes: closed forms, SAM at K = 1, roles, closure contracts, the record."""

from __future__ import annotations

import math
from collections import OrderedDict, namedtuple

import flatmtl
import pytest
import torch
import torch.nn.functional as F
from models import batch, closure_of, equal, two_heads, values
from torch import Tensor, nn

SGD = torch.optim.SGD


def quadratic(hessian: Tensor, x: Tensor) -> Tensor:
    return 0.5 * x @ hessian @ x


@pytest.fixture
def hessians() -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    roots = [torch.randn(4, 4, generator=g, dtype=torch.float64) for _ in range(2)]
    return [r @ r.T + torch.eye(4, dtype=torch.float64) for r in roots]


@pytest.fixture
def theta() -> nn.Parameter:
    return nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.3], dtype=torch.float64))


def test_quadratic_losses_match_the_closed_form(hessians: list[Tensor], theta: nn.Parameter) -> None:
    # f_i = rho H_i H_i x / ||H_i x||, exactly (algorithm T2); sum: update = SUM H_i x + f_i
    x, rho, lr = theta.detach().clone(), 0.1, 0.01
    optimizer = flatmtl.FlatMTL(SGD([theta], lr=lr), aggregator="sum", rho=rho)
    optimizer.step(lambda: [quadratic(h, theta) for h in hessians])
    g = [h @ x for h in hessians]
    f = [rho * h @ v / v.norm() for h, v in zip(hessians, g, strict=True)]
    torch.testing.assert_close(theta.detach(), x - lr * (g[0] + g[1] + f[0] + f[1]), rtol=1e-13, atol=0)
    torch.testing.assert_close(optimizer.last["norms_flat"], torch.stack([v.norm() for v in f]), rtol=1e-11, atol=0)


def test_linear_losses_rise_by_rho_times_the_norm(theta: nn.Parameter) -> None:
    a = [
        torch.tensor([3.0, 0.0, 4.0, 0.0], dtype=torch.float64),
        torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64),
    ]
    optimizer = flatmtl.FlatMTL(SGD([theta], lr=0.1), aggregator="sum", rho=0.5)
    optimizer.step(lambda: [v @ theta for v in a])
    torch.testing.assert_close(optimizer.last["sharpness"], torch.tensor([2.5, 0.5], dtype=torch.float64))
    assert optimizer.last["norms_flat"].tolist() == [0.0, 0.0]


def test_single_task_is_sam(hessians: list[Tensor], theta: nn.Parameter) -> None:
    x, rho = theta.detach().clone(), 0.3
    optimizer = flatmtl.FlatMTL(SGD([theta], lr=0.1), rho=rho)
    optimizer.step(lambda: quadratic(hessians[0], theta))
    g = hessians[0] @ x
    torch.testing.assert_close(theta.detach(), x - 0.1 * hessians[0] @ (x + rho * g / g.norm()), rtol=1e-13, atol=0)


@pytest.mark.parametrize("aggregator", ["sum", "mean", "mgda", "imtl_g"])
def test_one_shared_task_with_unit_gain_is_sam(aggregator: str, hessians: list[Tensor], theta: nn.Parameter) -> None:
    x, rho = theta.detach().clone(), 0.3
    optimizer = flatmtl.FlatMTL(SGD([theta], lr=0.1), aggregator=aggregator, rho=rho, shared=[theta])
    optimizer.step(lambda: [quadratic(hessians[0], theta)])
    g = hessians[0] @ x
    torch.testing.assert_close(theta.detach(), x - 0.1 * hessians[0] @ (x + rho * g / g.norm()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("aggregator", ["sum", "mean", flatmtl.Fixed([0.3, 2.0])])
def test_decomposed_equals_direct_for_linear_aggregators(aggregator: object) -> None:
    models = []
    for combine in ("decomposed", "direct"):
        model = two_heads()
        x, y = batch()
        optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), aggregator=aggregator, rho=0.1, combine=combine)
        for _ in range(3):
            optimizer.step(closure_of(model, x, y))
        models.append(values(model))
    for a, b in zip(*models, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("norm", "expected"), [("separate", math.sqrt(2) * 0.1), ("joint", 0.1)])
def test_length_of_the_displacement(norm: str, expected: float) -> None:
    model = two_heads()
    x, y = batch()
    start = values(model)
    lengths = []

    def closure() -> list[Tensor]:
        moved = [p.detach() - q for p, q in zip(model.parameters(), start, strict=True)]
        lengths.append(float(torch.cat([m.flatten() for m in moved]).norm()))
        return closure_of(model, x, y)()

    flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), rho=0.1, norm=norm).step(closure)
    assert lengths == pytest.approx([0.0, expected, expected], abs=1e-12)


def test_radii_of_shared_and_own_parameters_and_of_groups(theta: nn.Parameter) -> None:
    model = two_heads()
    x, y = batch()
    trunk, heads = list(model.trunk.parameters()), list(model.heads.parameters())
    base = SGD([{"params": trunk, "rho": 0.4}, {"params": heads}], lr=0.1)
    optimizer = flatmtl.FlatMTL(base, rho=(9.0, 0.2))
    start, seen = values(model), []

    def closure() -> list[Tensor]:
        seen.append([(p.detach() - q).flatten() for p, q in zip([*trunk, *heads], start, strict=True)])
        return closure_of(model, x, y)()

    optimizer.step(closure)
    assert float(torch.cat(seen[1][:2]).norm()) == pytest.approx(0.4)
    assert float(torch.cat(seen[1][2:4]).norm()) == pytest.approx(0.2)  # head of task 0
    assert float(torch.cat(seen[1][4:]).norm()) == 0.0  # head of task 1 stays in task 0's pass
    assert float(torch.cat(seen[2][4:]).norm()) == pytest.approx(0.2)


def test_adaptive_perturbation_follows_asam(hessians: list[Tensor], theta: nn.Parameter) -> None:
    x, rho, eta = theta.detach().clone(), 0.3, 0.1
    seen = []

    def closure() -> list[Tensor]:
        seen.append(theta.detach() - x)
        return [quadratic(h, theta) for h in hessians]

    flatmtl.FlatMTL(SGD([theta], lr=0.1), rho=rho, adaptive=True, eta=eta).step(closure)
    for h, moved in zip(hessians, seen[1:], strict=True):
        t, g = x.abs() + eta, h @ x
        torch.testing.assert_close(moved, rho * t**2 * g / (t * g).norm(), rtol=1e-13, atol=1e-15)


def test_maximize_perturbs_the_other_way(hessians: list[Tensor], theta: nn.Parameter) -> None:
    twin = nn.Parameter(theta.detach().clone())
    down = flatmtl.FlatMTL(SGD([theta], lr=0.1), rho=0.2)
    up = flatmtl.FlatMTL(SGD([twin], lr=0.1, maximize=True), rho=0.2)
    down.step(lambda: [quadratic(h, theta) for h in hessians])
    up.step(lambda: [-quadratic(h, twin) for h in hessians])
    torch.testing.assert_close(theta, twin, rtol=1e-14, atol=0)


def test_number_of_forwards_and_rho_zero() -> None:
    model, (x, y), calls = two_heads(tasks=3), batch(tasks=3), []

    def closure() -> list[Tensor]:
        calls.append(1)
        return closure_of(model, x, y)()

    flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1)).step(closure)
    assert len(calls) == 4
    calls.clear()
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), aggregator="sum", rho=0)
    expected = [p.detach() - 0.1 * g for p, g in zip(
        model.parameters(), torch.autograd.grad(sum(closure()), list(model.parameters())), strict=True)]  # fmt: skip
    calls.clear()
    optimizer.step(closure)
    assert len(calls) == 1
    for p, q in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-15)
    assert optimizer.last["perturbed_losses"].isnan().all()
    assert optimizer.last["weights_flat"].isnan().all()
    assert optimizer.last["weights_loss"].tolist() == [1.0, 1.0, 1.0]


# -- closure contracts ------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "left right")


@pytest.mark.parametrize(
    "wrap",
    [list, tuple, lambda v: dict(zip("ab", v, strict=True)), lambda v: OrderedDict(zip("ab", v, strict=True)),
     torch.stack, lambda v: torch.cat([w[None] for w in v]), lambda v: torch.hstack(v), lambda v: Pair(*v),
     lambda v: list(torch.stack(v)), lambda v: [torch.stack(v)[0], torch.stack(v)[-1]]],
    ids=["list", "tuple", "dict", "ordered", "stack", "cat", "hstack", "namedtuple", "unbind", "select"],
)  # fmt: skip
def test_containers_give_the_same_step(wrap: object) -> None:
    plain, model = two_heads(), two_heads()
    x, y = batch()
    flatmtl.FlatMTL(SGD(plain.parameters(), lr=0.1)).step(closure_of(plain, x, y))
    expected = closure_of(model, x, y)()
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1))
    losses = optimizer.step(lambda: wrap(closure_of(model, x, y)()))  # type: ignore[operator]
    assert equal(values(plain), values(model))
    got = list(losses.values()) if isinstance(losses, dict) else list(losses)
    assert [float(v) for v in got] == [float(v.detach()) for v in expected]
    assert not any(v.requires_grad for v in got)
    if not isinstance(losses, Tensor):
        kind = type(wrap([torch.zeros(()), torch.ones(())]))  # type: ignore[operator]
        assert type(losses) is (dict if issubclass(kind, dict) else kind)


def test_one_closure_a_task_and_closures_that_take_the_task() -> None:
    x, y = batch()
    results, ran = [], []

    def head(model: nn.Module, i: int) -> Tensor:
        ran.append(i)
        return F.cross_entropy(model.heads[i](model.trunk(x)), y[i])

    for form in ("all", "list", "dict", "task", "task_all"):
        model = two_heads()
        optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1))
        ran.clear()
        if form == "all":
            optimizer.step(closure_of(model, x, y))
        elif form == "list":
            losses = optimizer.step([lambda m=model: head(m, 0), lambda m=model: head(m, 1)])
            assert isinstance(losses, list)
            assert ran == [0, 1, 0, 1]
        elif form == "dict":
            losses = optimizer.step({"a": lambda m=model: head(m, 0), "b": lambda m=model: head(m, 1)})
            assert list(losses) == ["a", "b"]
            assert ran == [0, 1, 0, 1]
            assert optimizer.last["tasks"] == ["a", "b"]
        elif form == "task":
            optimizer.step(lambda task, m=model: [head(m, 0), head(m, 1)] if task is None else head(m, task))
            assert ran == [0, 1, 0, 1]
        else:
            optimizer.step(lambda task=7, m=model: [head(m, 0), head(m, 1)])
            assert ran == [0, 1] * 3
        results.append(values(model))
    for other in results[1:]:
        assert equal(results[0], other)


def test_vector_of_losses_without_scalars_needs_shared() -> None:
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for closure_kind in ("vector", "list"):
        model = nn.Sequential(nn.Linear(5, 4, dtype=torch.float64), nn.Linear(4, 2, dtype=torch.float64))

        def closure(model: nn.Module = model, kind: str = closure_kind) -> object:
            errors = model(x).square().mean(0)
            return errors if kind == "vector" else list(errors)

        with pytest.raises(RuntimeError, match=r"task 0 is an element of a vector.*shared="):
            flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1)).step(closure)
        optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), shared=[model[0]], aggregator="sum", rho=0.1)
        optimizer.step(closure)
        assert optimizer.state_dict()["flatmtl"]["roles"] == [-1, -1, 0, 0]


def test_own_parameters_under_shared_get_the_sum_of_their_perturbed_gradients() -> None:
    # both losses reach b, which `shared` leaves out
    a, b = (nn.Parameter(torch.tensor([v], dtype=torch.float64)) for v in (1.0, 2.0))
    optimizer = flatmtl.FlatMTL(SGD([a, b], lr=1.0), shared=[a], aggregator="sum", rho=(0.0, 0.5))
    optimizer.backward(lambda: [a.square().sum() + b.square().sum(), 3 * b.square().sum() + a.sum()])
    assert a.grad is not None
    assert float(a.grad) == pytest.approx(2.0 + 1.0)
    assert b.grad is not None
    assert float(b.grad) == pytest.approx(2 * 2.5 + 6 * 2.5)


# -- roles ------------------------------------------------------------------------------------------------------------


def test_roles_are_found_grow_and_are_saved() -> None:
    model = two_heads()
    unused = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    frozen = nn.Parameter(torch.zeros(2, dtype=torch.float64), requires_grad=False)
    x, y = batch()
    optimizer = flatmtl.FlatMTL(SGD([*model.parameters(), unused, frozen], lr=0.1, weight_decay=0.1))
    optimizer.step(closure_of(model, x, y))
    assert optimizer.state_dict()["flatmtl"]["roles"] == [-1, -1, 0, 0, 1, 1, None, None]
    assert unused.grad is None
    assert torch.equal(unused, torch.zeros(2, dtype=torch.float64))

    def crossed() -> list[Tensor]:  # task 0 now reads head 1 as well
        z = model.trunk(x)
        return [F.cross_entropy(model.heads[0](z) + model.heads[1](z), y[0]), F.cross_entropy(model.heads[1](z), y[1])]

    optimizer.step(crossed)
    assert optimizer.state_dict()["flatmtl"]["roles"] == [-1, -1, 0, 0, -1, -1, None, None]
    optimizer.step(closure_of(model, x, y))
    assert optimizer.state_dict()["flatmtl"]["roles"] == [-1, -1, 0, 0, -1, -1, None, None]


def test_tied_weights_count_once() -> None:
    model = two_heads()
    model.heads[1].weight = model.heads[0].weight
    x, y = batch()
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1))
    optimizer.step(closure_of(model, x, y))
    named = dict(model.named_parameters())
    roles = dict(zip(named, optimizer.state_dict()["flatmtl"]["roles"], strict=True))
    assert roles == {
        "trunk.0.weight": -1,
        "trunk.0.bias": -1,
        "heads.0.weight": -1,
        "heads.0.bias": 0,
        "heads.1.bias": 1,
    }


def test_absent_tasks_take_no_part() -> None:
    x, y = batch(tasks=3)
    results = []
    for kind in ("none", "zero", "without"):
        model = two_heads(tasks=3)
        optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), aggregator="mgda")

        def closure(model: nn.Module = model, kind: str = kind) -> list[Tensor | None]:
            losses: list[Tensor | None] = list(closure_of(model, x, y)())
            if kind == "none":
                losses[1] = None
            elif kind == "zero":
                losses[1] = losses[1] * 0.0  # type: ignore[operator]
            else:
                del losses[1]
            return losses

        got = optimizer.step(closure)
        results.append(values(model))
        if kind == "none":
            assert got[1] is None
        if kind != "without":
            assert optimizer.last["weights_loss"].isnan().tolist() == [False, True, False]
            assert model.heads[1].weight.grad is None
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])


def test_record() -> None:
    model, (x, y) = two_heads(), batch()
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), aggregator="mgda")
    assert optimizer.last == {}
    losses = optimizer.step(closure_of(model, x, y))
    record = optimizer.last
    assert record["tasks"] == [0, 1]
    assert record["losses"].tolist() == [float(v) for v in losses]
    assert torch.equal(record["sharpness"], record["perturbed_losses"] - record["losses"])
    assert (record["sharpness"] > 0).all()
    for key in ("norms_loss", "norms_flat", "weights_loss", "weights_flat"):
        assert record[key].shape == (2,)
        assert record[key].dtype == torch.float64
        assert record[key].isfinite().all()
    for key in ("cosine_loss", "cosine_flat"):
        torch.testing.assert_close(record[key].diagonal(), torch.ones(2, dtype=torch.float64))
        assert torch.equal(record[key], record[key].T)
    assert record["weights_loss"].sum() == pytest.approx(1.0)
    assert not record["pareto_stationary_loss"]
    assert not record["skipped"]


def test_pareto_stationary_shows_in_the_record() -> None:
    theta = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = flatmtl.FlatMTL(SGD([theta], lr=0.1), aggregator="nash_mtl", rho=0.1)
    a = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    optimizer.step(lambda: [theta @ a, -(theta @ a)])
    assert optimizer.last["pareto_stationary_loss"]
    assert optimizer.last["weights_loss"].tolist() == [0.0, 0.0]
    assert torch.equal(theta, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_and_channels_last_and_views(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, dtype=dtype).to(memory_format=torch.channels_last)
    odd = nn.Parameter(torch.randn(6, 8, dtype=dtype)[:, ::2])  # a strided leaf
    heads = nn.ModuleList(nn.Linear(4, 2, dtype=dtype) for _ in range(2))
    x = torch.randn(2, 3, 5, 5, dtype=dtype)
    params = [*conv.parameters(), odd, *heads.parameters()]
    pointers = [p.data_ptr() for p in params]
    optimizer = flatmtl.FlatMTL(SGD(params, lr=0.1), rho=0.05)
    for _ in range(2):
        optimizer.step(lambda: [(h(conv(x).mean((2, 3))).float().square().mean() + (odd.float() * c).square().sum())
                                for c, h in zip((0.1, 0.2), heads, strict=True)])  # fmt: skip
    assert [p.data_ptr() for p in params] == pointers
    assert all(p.grad is not None and p.grad.dtype == dtype and p.grad.shape == p.shape for p in params)
    assert all(bool(p.isfinite().all()) for p in params)


def test_mixed_dtypes_equal_one_dtype_when_exact() -> None:
    # values exact in f32: a mixed model must do what the all-f64 one does
    results = []
    for dtype in (torch.float64, torch.float32):
        a = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        b = nn.Parameter(torch.tensor([0.5, -1.0], dtype=dtype))
        optimizer = flatmtl.FlatMTL(SGD([a, b], lr=0.5), aggregator="mgda", rho=0.25)
        optimizer.backward(lambda a=a, b=b: [a.square().sum() + b.double().sum(), a.sum() - b.double().square().sum()])
        results.append((a.grad, b.grad.double()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


@pytest.mark.cuda
def test_cuda_and_parameters_on_two_devices() -> None:
    """The trunk on the GPU, heads on the GPU or on the CPU: the same trajectory as all on the CPU."""
    results = []
    x, y = batch()
    for trunk_device, head_device in (("cpu", "cpu"), ("cuda", "cuda"), ("cuda", "cpu")):
        model = two_heads(norm=True)
        model.trunk.to(trunk_device)
        model.heads.to(head_device)
        optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), rho=0.1, norm="joint")

        def closure(model: nn.Module = model, first: str = trunk_device, then: str = head_device) -> list[Tensor]:
            z = model.trunk(x.to(first)).to(then)
            return [F.cross_entropy(h(z), t.to(then)) for h, t in zip(model.heads, y, strict=True)]

        for _ in range(3):
            optimizer.step(closure)
        results.append([p.cpu() for p in values(model)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
