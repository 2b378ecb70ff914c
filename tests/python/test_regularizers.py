"""DGR, AMTFL and VisATB against finite differences, closed forms and the reference step."""

import math

import flatmtl
import flatmtl.reference
import pytest
import torch
import torch.nn.functional as F
from flatmtl.helpers import AMTFL, mean_contributions, visatb_weights
from flatmtl.regularizers import DummyGradientNorm
from models import TwoHeads, batch, equal, two_heads, values
from torch import nn


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny tensors: on a busy machine threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def dgr_of(model, **options):
    return DummyGradientNorm(model.heads, F.cross_entropy, **({"weight": 0.3, "seed": 5} | options))


def with_dgr(model, regularizer, x, y):
    def closure():
        z = model.trunk(x)
        losses = [F.cross_entropy(head(z), t) for head, t in zip(model.heads, y, strict=True)]
        return [loss + r for loss, r in zip(losses, regularizer(z, y), strict=True)]

    return closure


# -- DGR --------------------------------------------------------------------------------------------------------------


def test_dgr_linear_head_closed_form():
    # L = mean (zW' + b - y)^2 over N x C, E the residuals: dL/dW = 2/(NC) E'z, dL/db = 2/(NC) sum of the rows of E
    torch.manual_seed(0)
    n, d, c = 7, 4, 3
    encoder = torch.randn(d, 6, dtype=torch.float64, requires_grad=True)
    x, y = torch.randn(n, 6, dtype=torch.float64), torch.randn(n, c, dtype=torch.float64)
    regularizer = DummyGradientNorm([nn.Linear(d, c, dtype=torch.float64)], F.mse_loss, weight=0.7, dummies=2, seed=1)
    (term,) = regularizer(x @ encoder.T, [y])
    z = x @ encoder.T
    expected = torch.zeros((), dtype=torch.float64)
    for head in regularizer.heads[0]:
        e = z @ head.weight.T + head.bias - y
        expected = expected + (2 / (n * c)) ** 2 * ((e.T @ z).square().sum() + e.sum(0).square().sum())
    expected = 0.7 / 2 * expected
    torch.testing.assert_close(term, expected, rtol=1e-12, atol=0)
    (got,), (want,) = (torch.autograd.grad(t, encoder) for t in (term, expected))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-14)


def test_dgr_gradient_is_that_of_finite_differences():
    model = TwoHeads(tasks=2)
    x, y = batch()
    deep = [nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double() for _ in range(2)]
    regularizer = DummyGradientNorm(deep, F.cross_entropy, weight=2.0, dummies=2, seed=0)
    torch.manual_seed(1)
    z = model.trunk(x).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: tuple(regularizer(t, y)), z)


def test_dgr_is_what_a_difference_along_the_gradient_estimates():
    # ((L(phi + eps d / |d|) - L(phi)) / eps)^2 with d = dL/dphi, the estimate in code of the method's name
    model = two_heads()
    x, y = batch()
    z = model.trunk(x).detach()
    regularizer = dgr_of(model, weight=1.0)
    head, eps = regularizer.heads[0][0], 1e-6
    with torch.enable_grad():
        head.requires_grad_(True)
        loss = F.cross_entropy(head(z), y[0])
        d = torch.autograd.grad(loss, list(head.parameters()))
        head.requires_grad_(False)
    norm = flat(d).norm()
    with torch.no_grad():
        for p, g in zip(head.parameters(), d, strict=True):
            p += eps * g / norm
        estimate = ((F.cross_entropy(head(z), y[0]) - loss) / eps) ** 2
        for p, g in zip(head.parameters(), d, strict=True):
            p -= eps * g / norm
    assert regularizer(z, y)[0].item() == pytest.approx(estimate.item(), rel=1e-4)


def test_dgr_reaches_the_encoder_alone():
    model = two_heads()
    x, y = batch()
    regularizer = dgr_of(model, dummies=2)
    torch.stack(regularizer(model.trunk(x), y)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.trunk.parameters())
    assert all(p.grad is None for p in [*model.heads.parameters(), *regularizer.parameters()])
    assert not any(p.requires_grad for p in regularizer.parameters())
    # Own features for each task: the term of one task does not touch those of the other.
    z = [model.trunk(x).detach().requires_grad_() for _ in range(2)]
    regularizer(z, y)[1].backward()
    assert z[0].grad is None
    assert z[1].grad.abs().sum() > 0


@pytest.mark.parametrize("aggregator", ["sum", "mgda", "cagrad", "nash_mtl"])
@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_dgr_inside_the_step_agrees_with_the_reference(aggregator, rho):
    x, y = batch()
    models = [two_heads() for _ in range(2)]
    regularizer = dgr_of(models[0])
    frozen = values(regularizer)
    optimizers = [
        library.FlatMTL(torch.optim.SGD(model.parameters(), lr=0.2), aggregator=aggregator, rho=rho)
        for library, model in zip((flatmtl, flatmtl.reference), models, strict=True)
    ]
    for _ in range(5):
        losses = [o.step(with_dgr(m, regularizer, x, y)) for o, m in zip(optimizers, models, strict=True)]
        torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(flat(values(models[0])), flat(values(models[1])), rtol=1e-9, atol=1e-11)
    assert equal(values(regularizer), frozen)
    # The heads stay own, the trunk shared: the term of task i adds no task to a parameter.
    plain = two_heads()
    other = flatmtl.FlatMTL(torch.optim.SGD(plain.parameters(), lr=0.2), aggregator=aggregator, rho=rho)
    other.step(lambda: [F.cross_entropy(o, t) for o, t in zip(plain(x), y, strict=True)])
    assert optimizers[0].state_dict()["flatmtl"]["roles"] == other.state_dict()["flatmtl"]["roles"]
    assert not torch.equal(plain.trunk[0].weight, models[0].trunk[0].weight)


def test_dgr_behind_the_aggregator_adds_to_the_update():
    model = two_heads()
    x, y = batch()
    regularizer = dgr_of(model)
    optimizer = flatmtl.FlatMTL(torch.optim.SGD(model.parameters(), lr=0.1), aggregator="cagrad", rho=0.05)
    closure = lambda: [F.cross_entropy(o, t) for o, t in zip(model(x), y, strict=True)]  # noqa: E731
    optimizer.backward(closure)
    update = [p.grad.clone() for p in model.parameters()]
    trunk = list(model.trunk.parameters())
    extra = torch.autograd.grad(torch.stack(regularizer(model.trunk(x), y)).sum(), trunk)
    torch.stack(regularizer(model.trunk(x), y)).sum().backward()
    for i, p in enumerate(model.parameters()):
        expected = update[i] + extra[i] if i < len(trunk) else update[i]
        torch.testing.assert_close(p.grad, expected)


def test_dgr_lowers_the_norm_it_penalises():
    norms = []
    for weight in (0.0, 3.0):
        model = two_heads()
        x, y = batch()
        regularizer, probe = dgr_of(model, weight=weight), dgr_of(model, weight=1.0)
        optimizer = flatmtl.FlatMTL(torch.optim.SGD(model.parameters(), lr=0.2), aggregator="mean", rho=0.05)
        for _ in range(40):
            optimizer.step(with_dgr(model, regularizer, x, y))
        with torch.no_grad():
            norms.append(sum(probe(model.trunk(x), y)).item())
    assert norms[1] < 0.8 * norms[0]


def test_dgr_dummies_are_drawn_anew_and_only_from_their_seed():
    model = two_heads()
    before = torch.get_rng_state()
    a, b, c = (dgr_of(model, seed=seed, dummies=2) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(values(a), values(b))
    assert not equal(values(a), values(c))
    weights = [model.heads[0].weight, model.heads[1].weight, *(h.weight for heads in a.heads for h in heads)]
    assert all(not torch.equal(weights[i], weights[j]) for i in range(6) for j in range(i))
    a.reset_parameters(2)
    assert equal(values(a), values(c))
    b.load_state_dict(c.state_dict())
    assert equal(values(b), values(c))


def test_dgr_without_gradient_mode_and_with_an_absent_task():
    model = two_heads()
    x, y = batch()
    regularizer = dgr_of(model)
    terms = regularizer(model.trunk(x), y)
    with torch.no_grad():
        plain = regularizer(model.trunk(x), y)
    assert [t.item() for t in plain] == [t.item() for t in terms]
    assert not any(t.requires_grad for t in plain)
    absent = regularizer(model.trunk(x), [None, y[1]])
    assert absent[0].item() == 0.0
    assert absent[1].item() == terms[1].item()


def test_dgr_bad_input():
    head = nn.Linear(4, 2)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    with pytest.raises(TypeError, match=r"heads\[1\]\.1 \(Own\) has parameters but no reset_parameters"):
        DummyGradientNorm([head, nn.Sequential(nn.Linear(4, 2), Own())], F.cross_entropy)
    with pytest.raises(TypeError, match=r"heads\[0\] must be a torch.nn.Module, but is function"):
        DummyGradientNorm([lambda z: z], F.cross_entropy)
    with pytest.raises(ValueError, match=r"heads\[0\] has no parameters"):
        DummyGradientNorm([nn.Identity()], F.cross_entropy)
    with pytest.raises(ValueError, match="heads is empty"):
        DummyGradientNorm([], F.cross_entropy)
    with pytest.raises(ValueError, match="weight must be a finite number >= 0, but is -1"):
        DummyGradientNorm([head], F.cross_entropy, weight=-1)
    with pytest.raises(ValueError, match="dummies must be an integer >= 1, but is 0"):
        DummyGradientNorm([head], F.cross_entropy, dummies=0)
    with pytest.raises(ValueError, match="loss has 2 functions, but there are 1 heads"):
        DummyGradientNorm([head], [F.cross_entropy, F.mse_loss])
    good = DummyGradientNorm([head], lambda o, t: F.cross_entropy(o, t, reduction="none"))
    with pytest.raises(ValueError, match="targets has 2 entries, but there are 1 heads"):
        good(torch.randn(3, 4), [torch.zeros(3).long()] * 2)
    with pytest.raises(ValueError, match=r"loss of task 0 must be a scalar, but has shape \(3,\)"):
        good(torch.randn(3, 4), [torch.zeros(3).long()])


# -- AMTFL ------------------------------------------------------------------------------------------------------------


def test_amtfl_terms_are_the_formulas():
    torch.manual_seed(0)
    amtfl = AMTFL(4, [3, 1], alpha=0.2, gamma=0.5, nonlinearity=torch.tanh).double()
    with torch.no_grad():
        amtfl.log_variance.copy_(torch.tensor([0.3, -0.7]))
    z, outputs = torch.randn(6, 4, dtype=torch.float64), [torch.randn(6, w, dtype=torch.float64) for w in (3, 1)]
    losses = [torch.tensor(1.5, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)]
    terms, reconstruction = amtfl(z, outputs, losses)
    for i, (s, loss) in enumerate([(0.3, 1.5), (-0.7, 0.4)]):
        l1 = sum(abs(v) for row in amtfl.feedback[i].tolist() for v in row)
        assert terms[i].item() == pytest.approx((1 + 0.2 * l1) * math.exp(-s) * loss + s / 2, rel=1e-6)
    error = 0.0
    for n in range(6):
        for k in range(4):
            fed = sum((o[n] @ b[:, k]).item() for o, b in zip(outputs, amtfl.feedback, strict=True))
            error += (z[n, k].item() - math.tanh(fed)) ** 2
    assert reconstruction.item() == pytest.approx(0.5 * error / 6, rel=1e-12)


def test_amtfl_without_feedback_is_uncertainty_weighting():
    # alpha = gamma = 0: the stationary log variance of a loss L is ln 2L, where the term is (1 + ln 2L) / 2.
    amtfl = AMTFL(4, [3], alpha=0.0, gamma=0.0).double()
    loss = torch.tensor(1.7, dtype=torch.float64)
    optimizer = torch.optim.SGD([amtfl.log_variance], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        (term,), _ = amtfl(torch.zeros(2, 4).double(), [torch.zeros(2, 3).double()], [loss])
        term.backward()
        optimizer.step()
    assert amtfl.log_variance.item() == pytest.approx(math.log(2 * 1.7), abs=1e-9)
    assert term.item() == pytest.approx((1 + math.log(2 * 1.7)) / 2, abs=1e-9)


def test_amtfl_lets_the_reliable_task_feed_back_more():
    # One task has labels, the other noise: both transfer weights shrink, the unreliable task's more.
    model = two_heads(width=8)
    x, y = batch(size=64)
    amtfl = AMTFL(8, [3, 3], alpha=0.05, gamma=1.0, nonlinearity=torch.tanh).double()
    with torch.no_grad():  # the same start for both
        amtfl.feedback[1].copy_(amtfl.feedback[0])
    y = [model.trunk(x)[:, :3].argmax(1), y[1]]
    params = [*model.parameters(), *amtfl.parameters()]
    optimizer = flatmtl.FlatMTL(torch.optim.Adam(params, lr=0.02), aggregator="cagrad", rho=0.05)

    def closure():
        z = model.trunk(x)
        outputs = [head(z) for head in model.heads]
        losses, reconstruction = amtfl(z, outputs, [F.cross_entropy(o, t) for o, t in zip(outputs, y, strict=True)])
        return [loss + reconstruction / 2 for loss in losses]

    for _ in range(100):
        optimizer.step(closure)
    assert amtfl.log_variance[0] < amtfl.log_variance[1] - 0.5
    assert amtfl.feedback[0].abs().sum() > 0
    assert all(torch.isfinite(p).all() for p in params)


def test_amtfl_bad_input():
    with pytest.raises(ValueError, match=r"features and outputs must be positive, but are 4 and \[3, 0\]"):
        AMTFL(4, [3, 0])
    with pytest.raises(ValueError, match="alpha must be a finite number >= 0, but is -1"):
        AMTFL(4, [3], alpha=-1)
    with pytest.raises(ValueError, match="losses has 1 entries, but there are 2 tasks"):
        AMTFL(4, [3, 1])(torch.zeros(2, 4), [torch.zeros(2, 3), torch.zeros(2, 1)], [torch.zeros(())])


# -- VisATB -----------------------------------------------------------------------------------------------------------


def test_visatb_weights_are_the_formula():
    given, received, done = [0.76, 0.35, 1.67], [1.29, 0.98, 0.52], [0.86, 0.35, 0.96]

    def softmax(v):
        e = [math.exp(x / 0.5) for x in v]
        return [3 * x / sum(e) for x in e]

    parts = zip(softmax(given), softmax([-r for r in received]), softmax([1 - d for d in done]), strict=True)
    expected = [0.25 * out + 0.25 * back + 0.5 * difficulty for out, back, difficulty in parts]
    w = visatb_weights(given, received, done)
    assert w.tolist() == pytest.approx(expected, rel=1e-12)
    assert w.sum().item() == pytest.approx(3.0)
    assert visatb_weights([1.0, 1.0], [0.3, 0.3], [0.5, 0.5]).tolist() == pytest.approx([1.0, 1.0])
    # Giving more, receiving less and being harder each raise a task's weight.
    base = visatb_weights([1.0, 1.0], [1.0, 1.0], [0.5, 0.5])
    for changed in (
        ([1.2, 1.0], [1.0, 1.0], [0.5, 0.5]),
        ([1, 1], [0.8, 1.0], [0.5, 0.5]),
        ([1, 1], [1, 1], [0.4, 0.5]),
    ):
        assert visatb_weights(*changed)[0] > base[0]
    flatmtl.FlatMTL(torch.optim.SGD(two_heads().parameters(), lr=0.1), aggregator=flatmtl.Fixed(w.tolist()))


def test_mean_contributions_leave_the_diagonal_out():
    given, received = mean_contributions([[9.0, 1.0, 2.0], [3.0, math.nan, 4.0], [5.0, 6.0, 9.0]])
    assert given.tolist() == [1.5, 3.5, 5.5]
    assert received.tolist() == [4.0, 3.5, 3.0]
    with pytest.raises(ValueError, match=r"matrix\[0, 1\] is inf"):
        mean_contributions([[0.0, math.inf], [1.0, 0.0]])
    with pytest.raises(ValueError, match=r"matrix must be K x K with K >= 2, but has shape \(1, 1\)"):
        mean_contributions([[1.0]])


def test_visatb_bad_input():
    with pytest.raises(ValueError, match=r"received must have one number a task, but has shape \(1,\)"):
        visatb_weights([1.0, 2.0], [1.0], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"performance\[1\] is nan"):
        visatb_weights([1.0, 2.0], [1.0, 1.0], [0.5, math.nan])
    with pytest.raises(ValueError, match="temperature must be a finite number > 0, but is 0"):
        visatb_weights([1.0], [1.0], [0.5], temperature=0)
