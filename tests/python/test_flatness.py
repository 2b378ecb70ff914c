"""Flatness modes: against vectors by hand, against another library's SAM family, their cost, state and refusals."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import flatmtl
import pytest
import pytorch_optimizer
import torch
import torch.nn.functional as F
from flatmtl import flatness, reference
from models import TwoHeads, batch, closure_of, equal, two_heads, values
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import SGD

RHO, LR, STEPS = 0.3, 0.1, 4


class Oracle:
    """Gradients of all tasks as vectors over all parameters, at any point."""

    def __init__(self, tasks: int = 2) -> None:
        self.model = two_heads(tasks=tasks)
        self.tasks = tasks
        self.theta = parameters_to_vector(self.model.parameters()).detach()
        owner = {p: i for i, head in enumerate(self.model.heads) for p in head.parameters()}
        sizes = [(p.numel(), owner.get(p, -1)) for p in self.model.parameters()]
        self.owner = torch.cat([torch.full((n,), o) for n, o in sizes])
        self.shared = self.owner == -1
        self.k = 0

    def losses(self, theta: Tensor) -> list[Tensor]:
        vector_to_parameters(theta, self.model.parameters())
        return closure_of(self.model, *batch(self.k, self.tasks))()

    def rows(self, theta: Tensor) -> Tensor:
        params = list(self.model.parameters())
        return torch.stack(
            [
                torch.cat(
                    [
                        g.reshape(-1)
                        for g in torch.autograd.grad(loss, params, materialize_grads=True, retain_graph=True)
                    ]
                )
                for loss in self.losses(theta)
            ]
        )

    def move(self, direction: Tensor, own: Tensor, norm: str) -> Tensor:
        """theta + rho direction/||direction||, on two spheres or on one."""
        parts = [self.shared, own] if norm == "separate" else [self.shared | own]
        out = self.theta.clone()
        for part in parts:
            out[part] += RHO * direction[part] / direction[part].norm()
        return out

    def update(self, g: Tensor, f: Tensor, aggregator: str, combine: str) -> Tensor:
        """A(g) + A(f) or A(g + f) for shared parameters, g + f for own ones."""

        def a(x: Tensor) -> Tensor:
            gramian = x[:, self.shared] @ x[:, self.shared].T
            return reference.weights(gramian / (gramian.trace() / len(gramian)), aggregator) @ x

        out = a(g + f) if combine == "direct" else a(g) + a(f)
        return torch.where(self.shared, out, (g + f).sum(0))


def run(
    oracle: Oracle, mode: Any, shared: Callable[[TwoHeads], Any] | None = None, **options: Any
) -> tuple[list[Tensor], flatmtl.FlatMTL]:
    """Parameters after every step of the optimizer, on the oracle's batches."""
    model = two_heads(tasks=oracle.tasks)
    options["shared"] = None if shared is None else shared(model)
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), flat=mode, rho=RHO, **options)
    points = []
    for k in range(STEPS):
        optimizer.step(closure_of(model, *batch(k, oracle.tasks)))
        points.append(parameters_to_vector(model.parameters()).detach().clone())
    return points, optimizer


Flat = Callable[[Oracle, Tensor, dict[str, Any], str], Tensor]


def sam(o: Oracle, g: Tensor, state: dict[str, Any], norm: str) -> Tensor:
    return o.rows(o.move(g.sum(0), ~o.shared, norm)) - g


def gsam(o: Oracle, g: Tensor, state: dict[str, Any], norm: str) -> Tensor:
    s = g + sam(o, g, state, norm)
    c = g.sum(0) @ s.sum(0) / s.sum(0).square().sum()
    return s - 0.4 * (g - c * s) - g


def wsam(o: Oracle, g: Tensor, state: dict[str, Any], norm: str) -> Tensor:
    return 9.0 * sam(o, g, state, norm)


def fsam(o: Oracle, g: Tensor, state: dict[str, Any], norm: str) -> Tensor:
    total, mean = g.sum(0), state.get("mean")
    state["mean"] = total if mean is None else 0.9 * mean + 0.1 * total
    direction = total if mean is None else total - mean
    return o.rows(o.move(direction, ~o.shared, norm)) - g


def looksam(o: Oracle, g: Tensor, state: dict[str, Any], norm: str) -> Tensor:
    total = g.sum(0)
    if o.k % 2 == 0:
        f = sam(o, g, state, norm)
        s = g + f
        state["v"] = s - (s.sum(0) @ total) / (total @ total) * g
        return f
    return 0.7 * total.norm() / state["v"].sum(0).norm() * state["v"]


def fmtl(o: Oracle, g: Tensor, state: dict[str, Any], norm: str) -> Tensor:
    points = [o.rows(o.move(g[i], o.owner == i, norm))[i] for i in range(len(g))]
    return torch.stack(points) - g


def fmtl_every(o: Oracle, g: Tensor, state: dict[str, Any], norm: str) -> Tensor:
    if o.k % 2 == 0:
        f = fmtl(o, g, state, norm)
        s = g + f
        state["v"] = s - (s * g).sum(1, keepdim=True) / g.square().sum(1, keepdim=True) * g
        state["norm"] = g.norm(dim=1, keepdim=True)
        return f
    return g.norm(dim=1, keepdim=True) / state["norm"] * state["v"]


def fmtl_every_alpha(o: Oracle, g: Tensor, state: dict[str, Any], norm: str) -> Tensor:
    if o.k % 2 == 0:
        return fmtl_every(o, g, state, norm)
    return 0.2 * g.norm(dim=1, keepdim=True) / state["v"].norm(dim=1, keepdim=True) * state["v"]


def sgsu(o: Oracle, g: Tensor, state: dict[str, Any], norm: str) -> Tensor:
    return torch.stack([o.rows(o.theta - torch.where(o.shared, 0.2 * g[i], 0.0))[i] for i in range(len(g))]) - g


MODES: dict[str, tuple[Any, Flat]] = {
    "fmtl": ("fmtl", fmtl),
    "fmtl_every": (flatness.FMTL(every=2), fmtl_every),
    "fmtl_every_alpha": (flatness.FMTL(every=2, alpha=0.2), fmtl_every_alpha),
    "sam": ("sam", sam),
    "gsam": ("gsam", gsam),
    "wsam": ("wsam", wsam),
    "fsam": ("fsam", fsam),
    "looksam": (flatness.LookSAM(every=2), looksam),
    "sgsu": (flatness.SGSU(inner_lr=0.2), sgsu),
}


@pytest.mark.parametrize("aggregator", ["sum", "mgda"])
@pytest.mark.parametrize("combine", ["decomposed", "direct"])
@pytest.mark.parametrize("norm", ["separate", "joint"])
@pytest.mark.parametrize("mode", MODES)
def test_against_vectors_by_hand(mode: str, norm: str, combine: str, aggregator: str) -> None:
    option, flat = MODES[mode]
    oracle, state = Oracle(tasks=3), {}
    points, _ = run(oracle, option, norm=norm, combine=combine, aggregator=aggregator)
    for k, point in enumerate(points):
        oracle.k = k
        g = oracle.rows(oracle.theta)
        f = flat(oracle, g, state, norm)
        oracle.theta = oracle.theta - LR * oracle.update(g, f, aggregator, combine)
        torch.testing.assert_close(point, oracle.theta, rtol=1e-9, atol=1e-11)
        oracle.theta = point  # differences must not grow through the steps


@pytest.mark.parametrize("aggregator", ["sum", "mgda"])
@pytest.mark.parametrize("weighting", [None, flatmtl.FixedWeights([0.5, 2.0, 1.5])])
@pytest.mark.parametrize("mode", ["gsam", "looksam"])
def test_own_parameters_that_several_losses_reach(mode: str, weighting: Any, aggregator: str) -> None:
    """With shared= the trunk's bias is own, and all tasks reach it: the products of their gradients count in the sums."""
    option, flat = MODES[mode]
    oracle, state = Oracle(tasks=3), {}
    oracle.shared[40:48] = False
    c = torch.ones(3, 1).double() if weighting is None else torch.tensor(weighting.values)[:, None].double()
    points, _ = run(
        oracle, option, lambda m: [m.trunk[0].weight], norm="joint", aggregator=aggregator, weighting=weighting
    )
    rows = oracle.rows
    oracle.rows = lambda theta: c * rows(theta)  # type: ignore[method-assign]
    for k, point in enumerate(points):
        oracle.k = k
        g = oracle.rows(oracle.theta)
        f = flat(oracle, g, state, "joint")
        oracle.theta = oracle.theta - LR * oracle.update(g, f, aggregator, "decomposed")
        torch.testing.assert_close(point, oracle.theta, rtol=1e-9, atol=1e-11)
        oracle.theta = point


def test_asam_is_adaptive_sam() -> None:
    oracle = Oracle()
    a, _ = run(oracle, "asam", aggregator="mgda")
    b, _ = run(oracle, "sam", aggregator="mgda", adaptive=True, eta=0.01)
    c, _ = run(oracle, "sam", aggregator="mgda", adaptive=True)
    assert equal(a, b)
    assert not equal(b, c)
    d, _ = run(oracle, "asam", aggregator="mgda", eta=0.0)
    assert equal(c, d)


def theirs(kind: str, model: nn.Module) -> Callable[[Callable[[], Tensor]], None]:
    """A step of another library's optimizer on the sum of the losses."""
    params = list(model.parameters())
    if kind == "gsam":
        rho = type("Rho", (), {"step": lambda self: RHO})()
        optimizer: Any = pytorch_optimizer.GSAM(params, SGD(params, lr=LR), model, rho)

        def step(total: Callable[[], Tensor]) -> None:
            def closure() -> tuple[None, Tensor]:
                optimizer.base_optimizer.zero_grad()
                with torch.enable_grad():
                    loss = total()
                loss.backward()
                return None, loss

            optimizer.step(closure)

        return step
    if kind == "wsam":
        optimizer = pytorch_optimizer.WSAM(model, params, SGD, rho=RHO, decouple=False, lr=LR)
    else:
        cls = {"sam": pytorch_optimizer.SAM, "fsam": pytorch_optimizer.FriendlySAM}[kind]
        optimizer = cls(params, SGD, rho=RHO, lr=LR)

    def two_calls(total: Callable[[], Tensor]) -> None:
        total().backward()
        optimizer.first_step(zero_grad=True)
        total().backward()
        optimizer.second_step(zero_grad=True)

    return two_calls


@pytest.mark.parametrize("kind", ["sam", "gsam", "wsam", "fsam"])
def test_sum_on_one_sphere_is_the_other_librarys(kind: str) -> None:
    points, _ = run(Oracle(), kind, norm="joint", aggregator="sum")
    model = two_heads()
    step = theirs(kind, model)
    for k, point in enumerate(points):
        step(lambda k=k: sum(closure_of(model, *batch(k))()))  # type: ignore[misc]
        torch.testing.assert_close(
            parameters_to_vector(model.parameters()).detach(), point, rtol=1e-6, atol=1e-7
        )  # their norm is f32


def test_samo_on_its_two_ends() -> None:
    oracle = Oracle()
    points, _ = run(oracle, flatness.SAMO(alpha=1.0), aggregator="mgda")
    for k, point in enumerate(points):
        oracle.k = k
        g = oracle.rows(oracle.theta)
        direction = torch.where(oracle.shared, g.sum(0), 0.0)
        s = torch.stack(
            [
                oracle.rows(
                    oracle.move(torch.where(oracle.owner == i, g[i], direction), oracle.owner == i, "separate")
                )[i]
                for i in range(2)
            ]
        )
        oracle.theta = oracle.theta - LR * oracle.update(s, torch.zeros_like(s), "mgda", "direct")
        torch.testing.assert_close(point, oracle.theta, rtol=1e-9, atol=1e-11)
        oracle.theta = point


def test_samo_guesses_a_gradient() -> None:
    # One tensor, alpha = 0: eps_i = +- rho z/||z||, uphill for task i; equal losses leave it where it is
    theta = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    a = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.0, 0.0], [-1.0, 0.5, 2.0]], dtype=torch.float64)
    optimizer = flatmtl.FlatMTL(SGD([theta], lr=0.0), flat=flatness.SAMO(alpha=0.0), rho=RHO, aggregator="sum")
    optimizer.step(lambda: [1.0 + row @ theta + 0.0 * theta.square().sum() for row in a])
    rise = optimizer.last["sharpness"]
    assert rise[0] > 0.0
    assert rise[1] == 0.0
    assert rise[2] > 0.0
    assert rise[0] <= RHO * a[0].norm() * (1 + 1e-12)


def test_samo_draws_by_step_and_task_and_leaves_the_generator() -> None:
    oracle = Oracle()
    before = torch.get_rng_state()
    a, _ = run(oracle, "samo", seed=3)
    torch.rand(7)
    b, _ = run(oracle, "samo", seed=3)
    c, _ = run(oracle, "samo", seed=4)
    assert equal(a, b)
    assert not equal(a, c)
    torch.set_rng_state(before)


# (mode, options) -> forwards and backwards of a first step with K = 3 tasks, and of a second
K = 3
COSTS = [
    ("fmtl", {}, (K + 1, 2 * K), (K + 1, 2 * K)),
    ("fmtl", {"every": 2}, (K + 1, 2 * K), (1, K)),
    ("fmtl", {"rho": 0.0}, (1, K), (1, K)),
    ("sam", {}, (2, 2 * K), (2, 2 * K)),
    ("sam", {"combine": "direct"}, (2, K + 1), (2, K + 1)),
    ("asam", {}, (2, 2 * K), (2, 2 * K)),
    ("gsam", {}, (2, 2 * K), (2, 2 * K)),
    ("wsam", {}, (2, 2 * K), (2, 2 * K)),
    ("fsam", {"combine": "direct"}, (2, K + 1), (2, K + 1)),
    ("looksam", {"every": 2}, (2, 2 * K), (1, K)),
    ("samo", {}, (1 + 3 * K, 1 + K), (1 + 3 * K, 1 + K)),
    ("samo", {"combine": "decomposed"}, (1 + 3 * K, 2 * K), (1 + 3 * K, 2 * K)),
    ("sgsu", {}, (K + 1, 2 * K), (K + 1, 2 * K)),
    ("sgsu", {"rho": 0.0}, (K + 1, 2 * K), (K + 1, 2 * K)),
]


@pytest.mark.parametrize(("mode", "options", "first", "second"), COSTS)
def test_cost(
    mode: str, options: dict[str, Any], first: tuple[int, int], second: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = [0, 0]
    gradient = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[1] += 1
        return gradient(*args, **kwargs)

    model = two_heads(tasks=K)
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), flat=mode, **options)
    inner = closure_of(model, *batch(tasks=K))

    def closure() -> list[Tensor]:
        counts[0] += 1
        return inner()

    monkeypatch.setattr(torch.autograd, "grad", counted)
    for expected in (first, second):
        counts[:] = [0, 0]
        optimizer.step(closure)
        assert tuple(counts) == expected


STATEFUL = [flatness.FMTL(every=3), flatness.FSAM(), flatness.LookSAM(every=3), flatness.SAMO()]


@pytest.mark.parametrize("mode", STATEFUL, ids=lambda m: m.name)
def test_resumption_is_bit_equal(mode: flatness.Flatness) -> None:
    model = two_heads()
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=LR, momentum=0.9), flat=mode, rho=RHO)
    for k in range(8):
        if k == 4:
            stream = io.BytesIO()
            torch.save([optimizer.state_dict(), model.state_dict()], stream)
        optimizer.step(closure_of(model, *batch(k)))
    other = two_heads(seed=9)
    again = flatmtl.FlatMTL(SGD(other.parameters(), lr=LR, momentum=0.9), flat=mode, rho=RHO)
    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for k in range(4, 8):
        again.step(closure_of(other, *batch(k)))
    assert equal(values(model), values(other))


@pytest.mark.parametrize("mode", STATEFUL[:3], ids=lambda m: m.name)
def test_states_follow_their_parameters(mode: flatness.Flatness) -> None:
    """Frozen parameters, parameters frozen or added later, and a checkpoint for a model of another dtype."""
    runs = []
    for bias in (False, True):  # a run with a frozen parameter in front is that without it
        model = two_heads()
        frozen = [nn.Parameter(torch.zeros(3), requires_grad=False)] if bias else []
        optimizer = flatmtl.FlatMTL(SGD([*frozen, *model.parameters()], lr=LR), flat=mode, rho=RHO)
        for k in range(4):
            optimizer.step(closure_of(model, *batch(k)))
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        runs.append(values(model))
    assert equal(*runs)
    before = model.trunk[0].bias.detach().clone()
    model.trunk[0].weight.requires_grad_(False)  # type: ignore[union-attr]
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    optimizer.step(closure_of(model, *batch()))
    assert not torch.equal(before, model.trunk[0].bias)  # type: ignore[arg-type]
    model.trunk[0].weight.requires_grad_(True)  # type: ignore[union-attr]
    optimizer.step(closure_of(model, *batch()))
    narrow = two_heads(dtype=torch.float32)
    params = [*frozen, *narrow.parameters(), nn.Parameter(torch.zeros(2))]
    again = flatmtl.FlatMTL(SGD([{"params": params[:-1]}, {"params": params[-1:]}], lr=LR), flat=mode, rho=RHO)
    again.load_state_dict(optimizer.state_dict())
    again.step(closure_of(narrow, *batch(dtype=torch.float32)))


@pytest.mark.parametrize("mode", STATEFUL, ids=lambda m: m.name)
def test_a_failed_step_leaves_the_state(mode: flatness.Flatness) -> None:
    model = two_heads()
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), flat=mode, rho=RHO)
    for k in range(2):
        optimizer.step(closure_of(model, *batch(k)))
    before, state = values(model), copy.deepcopy(optimizer.state_dict())

    def bad() -> list[Tensor]:
        losses = closure_of(model, *batch(2))()
        return [losses[0], losses[1] * float("nan")]

    with pytest.raises(flatmtl.NonFiniteError):
        optimizer.step(bad)
    assert equal(before, values(model))
    assert same(state, optimizer.state_dict())


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_absent_tasks_keep_their_state_and_age() -> None:
    model = two_heads()
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), every=2, rho=RHO)

    def closure(present: tuple[int, ...]) -> Callable[[], list[Tensor | None]]:
        x, y = batch()
        return lambda: [
            F.cross_entropy(o, t) if i in present else None for i, (o, t) in enumerate(zip(model(x), y, strict=True))
        ]

    optimizer.step(closure((0, 1)))
    kept = optimizer.states["flat"]["orthogonal"][1]
    optimizer.step(closure((0,)))
    assert optimizer.states["flat"]["age"] == [2, 1]
    assert optimizer.states["flat"]["orthogonal"][1] is kept
    optimizer.step(closure((0, 1)))  # task 0 passes anew, task 1 reuses
    assert optimizer.states["flat"]["age"] == [1, 2]
    assert optimizer.last["perturbed_losses"].isnan().tolist() == [False, True]

    look = flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), flat="looksam", rho=RHO)
    look.step(closure((0,)))
    look.step(closure((0, 1)))  # nothing of task 1 to reuse
    assert look.states["flat"]["age"] == 1
    assert not look.last["perturbed_losses"].isnan().any()


@pytest.mark.parametrize("combine", ["decomposed", "direct"])
def test_tasks_without_gradients_leave_the_state(combine: str) -> None:
    model = two_heads()
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), flat="fsam", combine=combine)
    optimizer.step(closure_of(model, *batch()))
    before, closure = copy.deepcopy(optimizer.states["flat"]["mean"]), closure_of(model, *batch(1))
    torch.use_deterministic_algorithms(True)  # memory that nobody wrote to holds NaN
    try:
        optimizer.step(lambda: [0.0 * loss for loss in closure()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert equal(before, optimizer.states["flat"]["mean"])


@pytest.mark.parametrize("mode", ["fmtl", "sam", "gsam", "fsam", "looksam", "samo", "sgsu"])
def test_loss_scale_changes_nothing(mode: str) -> None:
    results = []
    for scale in (1.0, 1024.0):
        model = two_heads()
        every = 2 if mode in ("fmtl", "looksam") else None
        optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), flat=mode, every=every, rho=RHO)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)
        for k in range(3):
            optimizer.backward(closure_of(model, *batch(k)), grad_scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
        results.append(parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["fmtl", "sam", "fsam", "samo", "sgsu"])
def test_batchnorm_and_dropout_are_protected(mode: str) -> None:
    model, plain = (two_heads(norm=True, dropout=0.3) for _ in range(2))
    torch.manual_seed(1)
    flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), flat=mode).step(closure_of(model, *batch()))
    state = torch.get_rng_state()
    torch.manual_seed(1)
    closure_of(plain, *batch())()
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["sam", "samo", "sgsu", "gsam"])
def test_a_zero_loss_counts_as_absent_where_the_gradients_of_the_sum_are_enough(mode: str) -> None:
    results = []
    for absent in (lambda loss: None, lambda loss: loss * 0.0):
        model = two_heads()
        optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), flat=mode, combine="direct", aggregator="mgda")
        closure = closure_of(model, *batch())
        optimizer.step(closure)
        optimizer.step(lambda c=closure, a=absent: [(losses := c())[0], a(losses[1])])  # type: ignore[misc]
        results.append([*values(model), optimizer.last["weights_loss"][:1]])
        assert optimizer.last["weights_loss"][1].isnan()
        assert optimizer.roles.state(list(model.parameters())) == [-1, -1, 0, 0, 1, 1]
        assert model.heads[1].weight.grad is None
    assert equal(*results)


@pytest.mark.parametrize("norm", ["separate", "joint"])
@pytest.mark.parametrize("combine", ["decomposed", "direct"])
@pytest.mark.parametrize("absent", [lambda loss: None, lambda loss: loss * 0.0], ids=["None", "zero"])
def test_the_mean_of_an_absent_tasks_gradients_is_left(absent: Any, combine: str, norm: str) -> None:
    """The step is that of the other tasks alone, as are their radii, and what only the absent task reaches keeps its
    mean: its own parameters, and a shared one that this step's other loss leaves out."""
    results = []
    for alone in (False, True):
        model, offset = two_heads(), nn.Parameter(torch.ones(3, dtype=torch.float64))
        params = [*model.parameters(), offset]
        optimizer = flatmtl.FlatMTL(
            SGD(params, lr=LR), flat="fsam", combine=combine, norm=norm, rho=RHO, shared=[model.trunk, offset]
        )

        def losses(k: int, model: Any = model, offset: Tensor = offset) -> list[Tensor]:
            x, y = batch(k)
            one, two = model(x)
            return [F.cross_entropy(one, y[0]), F.cross_entropy(two + offset, y[1])]

        optimizer.step(lambda: losses(0))
        kept = [m.clone() for m in optimizer.states["flat"]["mean"][-3:]]
        if alone:
            optimizer.tasks = [0]
        for k in (1, 2):
            optimizer.step(lambda: losses(k)[:1] if alone else [losses(k)[0], absent(losses(k)[1])])  # noqa: B023
        assert equal(kept, optimizer.states["flat"]["mean"][-3:])
        results.append([*values(model), offset.detach(), *optimizer.states["flat"]["mean"]])
    assert equal(*results)


@pytest.mark.parametrize("combine", ["decomposed", "direct"])
def test_a_zero_loss_with_a_gradient_is_present(combine: str) -> None:
    results = []
    for shift in (False, True):
        model = two_heads()
        optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), flat="fsam", combine=combine, rho=RHO)
        at = [loss.detach() if shift else 0.0 for loss in closure_of(model, *batch())()]
        closure = closure_of(model, *batch())
        optimizer.step(lambda c=closure, at=at: [loss - x for loss, x in zip(c(), at, strict=True)])  # type: ignore[misc]
        results.append([*values(model), *optimizer.states["flat"]["mean"]])
    assert equal(*results)


@pytest.mark.parametrize("mode", [flatness.FMTL(every=2), flatness.LookSAM(every=2)])
def test_reuse_with_a_loss_of_weight_zero(mode: flatness.Flatness) -> None:
    """A task of weight 0 changes nothing."""
    results = []
    for tasks in ((0, 1), (1,)):
        model = two_heads()
        weighting = flatmtl.FixedWeights([0.0, 1.0] if len(tasks) == 2 else [1.0])
        optimizer = flatmtl.FlatMTL(
            SGD(model.parameters(), lr=LR), flat=mode, aggregator="sum", weighting=weighting, shared=model.trunk
        )
        for k in range(4):
            closure = closure_of(model, *batch(k))
            optimizer.step(lambda c=closure, t=tasks: [c()[i] for i in t])  # type: ignore[misc]
        results.append(values(model.trunk))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_sgsu_steps_along_the_weighted_loss() -> None:
    results = []
    for c in (None, [0.3, 2.0]):
        model = two_heads()
        weighting = None if c is None else flatmtl.FixedWeights(c)
        optimizer = flatmtl.FlatMTL(
            SGD(model.parameters(), lr=LR), flat=flatness.SGSU(inner_lr=0.5), aggregator="mgda", weighting=weighting
        )
        closure = closure_of(model, *batch())
        optimizer.step(closure if c else lambda f=closure: [0.3 * (losses := f())[0], 2.0 * losses[1]])
        results.append(values(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_options_and_errors() -> None:
    model: TwoHeads = two_heads()

    def make(**options: Any) -> flatmtl.FlatMTL:
        return flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), **options)

    with pytest.raises(ValueError, match=r"no flatness mode 'looksm'.*'looksam'"):
        make(flat="looksm")
    with pytest.raises(ValueError, match="'sam' has no option every, which is 3"):
        make(flat="sam", every=3)
    with pytest.raises(ValueError, match="every is 0"):
        make(every=0)
    with pytest.raises(TypeError, match="flat is a name"):
        make(flat=3)
    with pytest.raises(ValueError, match="m_sharpness=True: flatness mode FMTL"):
        make(every=2, m_sharpness=True)
    for wrong in (
        lambda: flatness.WSAM(gamma=1.0),
        lambda: flatness.GSAM(alpha=-1.0),
        lambda: flatness.FSAM(lmbda=2.0),
        lambda: flatness.SAMO(mu=0.0),
        lambda: flatness.SGSU(inner_lr=-1.0),
        lambda: flatness.FMTL(alpha=float("inf")),
    ):
        with pytest.raises(ValueError, match="must be"):
            wrong()
    assert make(flat="samo").settings.combine == "direct"
    assert make(flat="fmtl").settings.combine == "decomposed"
    one, other = make(flat="looksam"), make(flat="fsam")
    one.step(closure_of(model, *batch()))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="state of flat 'looksam', but the optimizer has 'fsam'"):
        other.load_state_dict(one.state_dict())
    broken = one.state_dict()
    broken["flatmtl"]["states"]["flat"]["orthogonal"][0][0] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"'orthogonal'\[0\]\[0\] is a float32 tensor of shape \(3,\)"):
        one.load_state_dict(broken)
    assert same(before, other.state_dict())
