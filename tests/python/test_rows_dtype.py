"""FlatMTL(rows_dtype=torch.bfloat16): gradients rounded once, everything else as it is; memory, dtypes, refusals."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import flatmtl
import memory
import pytest
import rows_dtype_checks as checks
import torch
import torch.nn.functional as F
from flatmtl import _backend, _generic, _task, flatness, reference
from models import batch, closure_of, equal, two_heads, values
from torch import Tensor, nn
from torch.optim import SGD

F32, BF16 = torch.float32, torch.bfloat16


def rounded(x: Tensor) -> Tensor:
    return x.to(BF16).to(x.dtype)


@pytest.fixture
def round_by_hand(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes autograd's gradients of parameters numbers of bfloat16, in float32."""
    grad = torch.autograd.grad

    def by_hand(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = grad(outputs, inputs, *args, **kwargs)
        return tuple(rounded(g) if g is not None and x.is_leaf else g for g, x in zip(found, inputs, strict=True))

    def patch() -> None:
        monkeypatch.setattr(torch.autograd, "grad", by_hand)

    return patch


def train(
    options: dict[str, Any], form: str = "closure", rows_dtype: Any = None, dtype: torch.dtype = F32
) -> list[Tensor]:
    """Parameters and numbers of the record after three steps on three tasks."""
    model = two_heads(tasks=3, dtype=dtype, norm=True, dropout=0.2)
    if options.get("flat") == "mtcool":
        options = {**options, "features": model.trunk}
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1, momentum=0.9), rows_dtype=rows_dtype, **options)
    for k in range(3):
        x, y = batch(k, 3, dtype=dtype)
        losses = closure_of(model, x, y)
        if form == "closures":
            optimizer.step([lambda i=i, losses=losses: losses()[i] for i in range(3)])
        elif form == "absent":
            optimizer.step(lambda losses=losses, k=k: [None if i == k else loss for i, loss in enumerate(losses())])
        elif form == "batches":
            parts = list(zip(x.chunk(3), zip(*(t.chunk(3) for t in y), strict=True), strict=True))
            optimizer.step(lambda part: closure_of(model, *part)(), batches=parts)
        else:
            optimizer.step(losses)
    record = [optimizer.last[name] for name in ("norms_loss", "norms_flat", "weights_loss", "perturbed_losses")]
    return [*values(model), *(x.nan_to_num() for x in record)]


CASES: list[dict[str, Any]] = [
    {}, {"rho": 0.0}, {"adaptive": True, "eta": 0.1, "norm": "joint"}, {"max_norm": 0.1}, {"batched": True},
    {"batched": "passes"}, {"batched": "passes", "flat": "sgsu"},
    {"aggregator": "nash_mtl", "combine": "each"}, {"aggregator": "pcgrad", "combine": "second"},
    {"aggregator": "mgda", "combine": "direct"}, {"weighting": "gradnorm"}, {"weighting": "uw", "aggregator": "sum"},
    *({"flat": flat} for flat in ("sam", "asam", "gsam", "wsam", "fsam", "samo", "sgsu", "mtcool")),
    {"flat": "sam", "combine": "direct"}, {"flat": "samo", "combine": "decomposed"},
    {"flat": flatness.SAMO(alpha=1.0)}, *({"aggregator": name} for name in ("graddrop", "moco", "db_mtl", "excess_mtl")),
    {"aggregator": "moco", "combine": "direct", "weighting": "uw"}, {"aggregator": "graddrop", "rho": 0.0},
]  # fmt: skip


@pytest.mark.parametrize("options", CASES, ids=str)
def test_bits_are_those_of_gradients_rounded_by_hand(
    options: dict[str, Any], round_by_hand: Callable[[], None]
) -> None:
    name = getattr(options.get("flat"), "name", options.get("flat"))  # sums over closures are made before rounding
    forms = ["closure", "absent"] + ["closures"] * (
        name not in ("mtcool", "sam", "samo") and options.get("batched") != "passes"
    )
    found = {form: train(options, form, BF16) for form in forms}
    plain = train(options)
    round_by_hand()
    for form in forms:
        assert equal(found[form], train(options, form))
    assert not equal(found["closure"], plain)


MEANS: list[dict[str, Any]] = [
    {}, {"m_sharpness": True}, {"flat": "sam"}, {"flat": "sam", "combine": "direct"}, {"flat": "fsam"}, {"rho": 0.0},
    {"aggregator": "moco"},
]  # fmt: skip


@pytest.mark.parametrize("options", MEANS, ids=str)
def test_means_over_micro_batches_are_rounded_once(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found, plain = train(options, "batches", BF16), train(options, "batches")
    state = _task.TaskMean.state

    def by_hand(mean: _task.TaskMean) -> _task.TaskState:
        found = state(mean)
        for row in (found.grads, found.perturbed):
            row[:] = [None if x is None else rounded(x) for x in row]
        return found

    monkeypatch.setattr(_task.TaskMean, "state", by_hand)
    assert equal(found, train(options, "batches"))
    assert not equal(found, plain)


def test_batches_of_sdmgrad_are_kept_narrow(round_by_hand: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean decides the norms, so it is rounded too; the batches' own rows enter the update."""
    found = train({"aggregator": "sdmgrad", "rho": 0.0}, "batches", BF16)
    assert not equal(found, train({"aggregator": "sdmgrad", "rho": 0.0}, "batches"))
    round_by_hand()
    # With the batches' gradients rounded before the mean, norms differ in the last bits of bfloat16, weights hardly.
    for a, b in zip(found, train({"aggregator": "sdmgrad", "rho": 0.0}, "batches"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_against_float64_with_rounded_rows() -> None:
    """Algorithm 1 by hand, in float64 from the rounded g, s, t on."""
    model, rho = two_heads(dtype=F32), 0.3
    losses = closure_of(model, *batch(dtype=F32))
    trunk, heads = list(model.trunk.parameters()), [list(head.parameters()) for head in model.heads]
    saved = {p: p.detach().clone() for p in model.parameters()}

    def rows(i: int) -> tuple[list[Tensor], list[Tensor]]:
        grads = torch.autograd.grad(losses()[i], trunk + heads[i])
        wide = [g.to(BF16).double() for g in grads]
        return wide[: len(trunk)], wide[len(trunk) :]

    def norm(row: list[Tensor]) -> Tensor:
        return torch.cat([x.flatten() for x in row]).norm()

    def matrix(family: list[list[Tensor]]) -> Tensor:
        return torch.stack([torch.cat([x.flatten() for x in row]) for row in family])

    g, s, t = [], [], []
    for i in range(2):
        g_i, h_i = rows(i)
        g.append(g_i)
        with torch.no_grad():
            for params, row in ((trunk, g_i), (heads[i], h_i)):
                for p, x in zip(params, row, strict=True):
                    p.copy_(saved[p].double() + x * (rho / norm(row)))
        s_i, t_i = rows(i)
        s.append(s_i)
        t.append(t_i)
        with torch.no_grad():
            for p, value in saved.items():
                p.copy_(value)
    update: Any = 0.0
    f = matrix(s) - matrix(g)
    for family in (matrix(g), f):
        gramian = family @ family.T
        update = update + reference.weights(gramian / (gramian.trace() / 2), "mgda") @ family
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), aggregator="mgda", rho=rho, rows_dtype=BF16)
    optimizer.backward(losses)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in trunk]), update.float(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(optimizer.last["norms_flat"], f.norm(dim=1), rtol=1e-6, atol=0)
    for params, row in zip(heads, t, strict=True):
        assert all(torch.equal(p.grad, x.float()) for p, x in zip(params, row, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_parameters_keep_their_rows(dtype: torch.dtype) -> None:
    assert equal(train({}, rows_dtype=BF16, dtype=dtype), train({}, dtype=dtype))


def test_each_parameter_by_its_own_dtype() -> None:
    """A float32 trunk under float64 heads: own gradients are exact, and every .grad has its parameter's dtype."""
    model = two_heads(dtype=F32)
    model.heads.double()
    x, y = batch(dtype=F32)
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), aggregator="sum", rho=0.0, rows_dtype=BF16)

    def losses() -> list[Tensor]:
        z = model.trunk(x).double()
        return [F.cross_entropy(head(z), target) for head, target in zip(model.heads, y, strict=True)]

    optimizer.backward(losses)
    assert all(p.grad.dtype == p.dtype for p in model.parameters())
    found = losses()
    own = torch.autograd.grad(sum(found), list(model.heads.parameters()), retain_graph=True)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.heads.parameters(), own, strict=True))
    trunk = list(model.trunk.parameters())
    parts = [torch.autograd.grad(loss, trunk, retain_graph=True) for loss in found]
    for p, *gs in zip(trunk, *parts, strict=True):
        assert torch.equal(p.grad, sum(g.to(BF16).double() for g in gs).float())


def test_own_parameters_of_several_tasks_and_factors_are_summed_in_float32() -> None:
    """shared= leaves a parameter to two losses as own ones; a weighting multiplies them."""
    model = two_heads(dtype=F32)
    losses = closure_of(model, *batch(dtype=F32))
    weights = (0.3, 0.7)
    optimizer = flatmtl.FlatMTL(
        SGD(model.parameters(), lr=0.1), rho=0.0, shared=[model.trunk[0].bias], rows_dtype=BF16,
        weighting=flatmtl.FixedWeights(weights),
    )  # fmt: skip
    optimizer.backward(losses)
    weight = model.trunk[0].weight
    first, second = (torch.autograd.grad(loss, weight, retain_graph=True)[0].to(BF16).float() for loss in losses())
    assert torch.equal(weight.grad, first * weights[0] + second * weights[1])


# -- flat gradients kept between steps -------------------------------------------------------------------------------


def test_kept_flat_gradients_are_rows_too() -> None:
    """FMTL(every=2): v is computed in float32 from the rounded rows and rounded once; so is s = g + c v."""
    model = two_heads(dtype=F32)
    optimizer = flatmtl.FlatMTL(
        SGD(model.parameters(), lr=0.0), flat=flatness.FMTL(every=2), rho=0.3, aggregator="sum", combine="direct",
        rows_dtype=BF16,
    )  # fmt: skip
    losses = closure_of(model, *batch(dtype=F32))
    optimizer.step(losses)
    kept = optimizer.states["flat"]["orthogonal"]
    assert all(v is None or v.dtype == BF16 for row in kept for v in row)
    optimizer.step(losses)  # lr = 0: the same gradients again, so that the factor is 1
    params = list(model.trunk.parameters())
    rows = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses()]
    for k, p in enumerate(params):
        s = [(g[k].to(BF16).float() + v[k].float()).to(BF16).double() for g, v in zip(rows, kept, strict=True)]
        assert torch.equal(p.grad, (s[0] + s[1]).float())


STATEFUL = [flatness.FMTL(every=3), flatness.FSAM(), flatness.LookSAM(every=3)]


@pytest.mark.parametrize("mode", STATEFUL, ids=lambda m: m.name)
def test_resumption_is_bit_equal_and_other_states_load(mode: flatness.Flatness) -> None:
    def make(model: nn.Module, rows_dtype: Any) -> flatmtl.FlatMTL:
        return flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), flat=mode, rho=0.3, rows_dtype=rows_dtype)

    model = two_heads(dtype=F32)
    optimizer = make(model, BF16)
    for k in range(6):
        if k == 3:
            stream = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict()], stream)
        optimizer.step(closure_of(model, *batch(k, dtype=F32)))
    stream.seek(0)
    weights, state = torch.load(stream, weights_only=True)
    for rows_dtype in (BF16, None):
        resumed = two_heads(dtype=F32)
        resumed.load_state_dict(weights)
        other = make(resumed, rows_dtype)
        other.load_state_dict(copy.deepcopy(state))
        for k in range(3, 6):
            other.step(closure_of(resumed, *batch(k, dtype=F32)))
        assert equal(values(resumed), values(model)) == (rows_dtype is BF16)
        for a, b in zip(values(resumed), values(model), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


# -- what else runs beside -------------------------------------------------------------------------------------------


def test_a_grad_scaler_changes_nothing() -> None:
    """Losses scaled by a power of two: rounding scales with them."""
    found = []
    for scale in (1.0, 1024.0):
        model = two_heads(dtype=F32)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), rho=0.3, rows_dtype=BF16)
        optimizer.backward(closure_of(model, *batch(dtype=F32)), grad_scaler=scaler)
        found.append([p.grad / scale for p in model.parameters()])
    assert equal(*found)


def test_torchs_own_operations_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({}, {"adaptive": True, "aggregator": "moco"}, {"aggregator": "graddrop"}, {"flat": "fsam"}):
        expected = train(options, rows_dtype=BF16)
        with monkeypatch.context() as patch:
            patch.setattr(_backend, "choose", lambda param, copy: _generic)
            for a, b in zip(train(options, rows_dtype=BF16), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_held_out_values_with_a_parameter_that_a_loss_misses() -> None:
    """SLGrad's look-ahead makes gradients of its own, in float32; HydaLearn moves along the rows."""
    x, y = batch(dtype=F32)
    for weighting in (flatmtl.SLGrad(), flatmtl.HydaLearn(main=0)):
        models = []
        for rows_dtype in (BF16, None):
            model = two_heads(dtype=F32)
            spare = nn.Linear(8, 3)
            params = [*model.parameters(), *spare.parameters()]
            optimizer = flatmtl.FlatMTL(SGD(params, lr=0.1), rho=0.1, weighting=weighting, rows_dtype=rows_dtype)
            reduction = "none" if isinstance(weighting, flatmtl.SLGrad) else "mean"

            def losses(model: nn.Module = model, reduction: str = reduction) -> list[Tensor]:
                return [F.cross_entropy(o, t, reduction=reduction) for o, t in zip(model(x), y, strict=True)]

            for _ in range(3):
                optimizer.step(losses, validation=lambda model=model: closure_of(model, x, y)()[0])
            models.append(values(model))
        for a, b in zip(*models, strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("options", [{}, {"m_sharpness": True}], ids=str)
def test_a_loss_that_misses_a_shared_parameter(options: dict[str, Any]) -> None:
    """Its row is zero there, in the dtype of the others."""
    a, b = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0]))
    optimizer = flatmtl.FlatMTL(SGD([a, b], lr=0.1), aggregator="sum", rho=0.1, rows_dtype=BF16, **options)
    optimizer.backward(lambda c: [c * (a.sum() + b.sum()), c * (a[0] * b).sum(), c * a[1]], batches=[1.0, 3.0])
    assert b.grad is not None
    assert float(b.grad) == pytest.approx(2.0 * (1.0 + 1.0), rel=0.1)


@pytest.mark.parametrize(
    ("dtype", "text"),
    [
        (torch.float16, r"Invalid rows_dtype: torch.float16 .*bfloat16; float16 holds nothing above 65504"),
        (torch.float32, r"Invalid rows_dtype: torch.float32 \(expected None or torch.bfloat16\)"),
        ("bfloat16", r"Invalid rows_dtype: 'bfloat16' \(expected None or torch.bfloat16\)"),
    ],
)
def test_other_dtypes_are_refused(dtype: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        flatmtl.FlatMTL(SGD(two_heads().parameters(), lr=0.1), rows_dtype=dtype)


def test_rows_of_features_are_refused() -> None:
    model = two_heads(dtype=F32)
    with pytest.raises(ValueError, match=r"rows_dtype= with features="):
        flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), rho=0.0, features=model.trunk, rows_dtype=BF16)


def test_a_gradient_beyond_bfloat16_is_not_finite() -> None:
    """Above its largest number, 3.39e38, which float32 exceeds by a little."""
    theta = nn.Parameter(torch.zeros(2))
    optimizer = flatmtl.FlatMTL(SGD([theta], lr=0.1), rho=0.0, rows_dtype=BF16, shared=[theta])
    with pytest.raises(flatmtl.NonFiniteError, match="task 1: the gradient is not finite"):
        optimizer.step(lambda: [theta.sum(), 3.4e38 * theta[0]])
    assert torch.equal(theta.detach(), torch.zeros(2))


# -- memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "narrow", "wide"),
    [
        # K / 2 rows g, as many s, the last one wide too, and the copy of the parameters
        ({}, 1.5 + 1.5 + 1.0 + 1.0, 3.0 + 3.0 + 1.0),
        ({"flat": "sam"}, 1.5 + 1.5 + 1.0 + 1.0, 3.0 + 3.0 + 1.0),
        ({"rho": 0.0}, 1.5 + 1.0 + 1.0, 3.0 + 1.0),
    ],
    ids=str,
)
def test_peak_memory_in_rows(options: dict[str, Any], narrow: float, wide: float) -> None:
    peaks = []
    for rows_dtype in (BF16, None):
        model = memory.Layers(tasks=3)
        optimizer = flatmtl.FlatMTL(SGD(model.parameters, lr=0.1), rows_dtype=rows_dtype, **options)
        optimizer.step(model.losses)  # roles, and what torch keeps
        peaks.append(memory.peak_bytes(lambda optimizer=optimizer, model=model: optimizer.backward(model.losses)))
    assert peaks[0] / model.row <= narrow + model.slack
    assert peaks[1] / model.row >= wide - 0.01


def test_rows_lie_where_they_were_before_the_backward() -> None:
    """So that the wide gradients, which are freed, leave no holes between them."""
    model = memory.Layers(tasks=2)
    optimizer = flatmtl.FlatMTL(SGD(model.parameters, lr=0.1), rho=0.0, rows_dtype=BF16)
    events = []
    empty_like, grad = torch.empty_like, torch.autograd.grad

    def recorded(function: Any, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "backward" or kwargs.get("dtype") == BF16:
                events.append(name)
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", recorded(empty_like, "row"))
        patch.setattr(torch.autograd, "grad", recorded(grad, "backward"))
        optimizer.backward(model.losses)
    count = len(model.parameters)
    assert events == [*["row"] * count, "backward"] * 2


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_ranks_and_shards() -> None:
    import ranks

    with ranks.pool(2) as two:
        for sync in ("exact", "local"):
            two(checks.replicas, sync)
        two(checks.shards)
        two(checks.disagreement)
