"""features=: gradients that stop at the features, the trunk's one backward, and MT-COOL."""

from __future__ import annotations

from typing import Any

import flatmtl
import pytest
import torch
import torch.nn.functional as F
from flatmtl import flatness, reference
from models import TwoHeads, batch, closure_of, equal, two_heads, values
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.optim import SGD

LR, RHO = 0.1, 0.3


def feature_rows(model: TwoHeads, k: int, shift: list[Tensor] | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """z_i and the full gradients, by plain autograd."""
    x, y = batch(k, len(model.heads))
    z = model.trunk(x)
    rows, full = [], []
    for i, (head, target) in enumerate(zip(model.heads, y, strict=True)):
        loss = F.cross_entropy(head(z if shift is None else z + shift[i]), target)
        grads = torch.autograd.grad(loss, [z, *model.parameters()], retain_graph=True, materialize_grads=True)
        rows.append(grads[0])
        full.append(torch.cat([g.reshape(-1) for g in grads[1:]]))
    return rows, full


def expected_update(model: TwoHeads, rows: list[Tensor], full: list[Tensor], aggregator: str) -> Tensor:
    matrix = torch.stack([z.reshape(-1) for z in rows])
    gramian = matrix @ matrix.T
    w = reference.weights(gramian / (gramian.trace() / len(gramian)), aggregator)
    trunk = sum(p.numel() for p in model.trunk.parameters())
    out = torch.stack(full).sum(0)
    out[:trunk] = w @ torch.stack(full)[:, :trunk]
    return out


@pytest.mark.parametrize("aggregator", ["mgda", "imtl_g", "cagrad"])
def test_rho_0_is_the_aggregator_on_the_features_gramian(aggregator: str) -> None:
    model, plain = two_heads(tasks=3), two_heads(tasks=3)
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), aggregator=aggregator, rho=0.0, features=model.trunk)
    for k in range(3):
        rows, full = feature_rows(plain, k)
        before = parameters_to_vector(plain.parameters()).detach()
        optimizer.step(closure_of(model, *batch(k, 3)))
        after = parameters_to_vector(model.parameters()).detach()
        torch.testing.assert_close(
            after, before - LR * expected_update(plain, rows, full, aggregator), rtol=1e-9, atol=1e-12
        )
        torch.testing.assert_close(
            optimizer.last["norms_loss"], torch.stack([z.norm() for z in rows]), rtol=1e-12, atol=0
        )
        plain.load_state_dict(model.state_dict())


def test_sum_is_the_ordinary_step() -> None:
    a, b = two_heads(tasks=3), two_heads(tasks=3)
    for model, features in ((a, a.trunk), (b, None)):
        optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), aggregator="sum", rho=0.0, features=features)
        for k in range(3):
            optimizer.step(closure_of(model, *batch(k, 3)))
    for s, t in zip(values(a), values(b), strict=True):
        torch.testing.assert_close(s, t, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("mode", ["sam", "asam", "fsam"])
def test_sam_with_the_sum_is_the_ordinary_sam(mode: str) -> None:
    a, b = two_heads(norm=True), two_heads(norm=True)
    for model, features in ((a, a.trunk), (b, None)):
        optimizer = flatmtl.FlatMTL(
            SGD(model.parameters(), lr=LR), aggregator="sum", flat=mode, combine="direct", rho=RHO, features=features
        )
        for k in range(3):
            optimizer.step(closure_of(model, *batch(k)))
    for s, t in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(s, t, rtol=1e-10, atol=1e-13)


def test_sam_weights_come_from_the_perturbed_features() -> None:
    model, plain = two_heads(), two_heads()
    options: dict[str, Any] = {"flat": "sam", "combine": "direct", "rho": RHO, "norm": "joint", "aggregator": "mgda"}
    flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), features=model.trunk, **options).step(closure_of(model, *batch()))
    before = values(plain)
    grads = torch.autograd.grad(sum(closure_of(plain, *batch())()), list(plain.parameters()))  # type: ignore[arg-type]
    norm = torch.cat([g.reshape(-1) for g in grads]).norm()
    with torch.no_grad():
        for p, g in zip(plain.parameters(), grads, strict=True):
            p += RHO * g / norm
    update = expected_update(plain, *feature_rows(plain, 0), "mgda")
    start = torch.cat([p.reshape(-1) for p in before])
    torch.testing.assert_close(
        parameters_to_vector(model.parameters()).detach(), start - LR * update, rtol=1e-9, atol=1e-12
    )


def test_the_trunk_is_passed_back_through_once() -> None:
    model, count = two_heads(tasks=4), [0]

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            count[0] += 1
            return grad

    first = model.trunk[0]
    first.register_forward_hook(lambda module, args, out: Counted.apply(out))
    closure = closure_of(model, *batch(tasks=4))
    flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), rho=0.0, features=model.trunk).step(closure)
    assert count[0] == 1
    flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), flat="sam", combine="direct", features=model.trunk).step(closure)
    assert count[0] == 3  # one for the direction, one at the perturbed point
    flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), rho=0.0).step(closure)
    assert count[0] == 7


class Fork(nn.Module):
    """Two features; the heads share a layer above them, and one head reads the input too."""

    def __init__(self, leak: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(5, 4)
        self.above, self.heads = nn.Linear(8, 4), nn.ModuleList(nn.Linear(4, 3) for _ in range(2))
        self.leak = leak

    def forward(self, x: Tensor) -> list[Tensor]:
        u = torch.cat([self.a(x), self.b(x)], 1)
        if self.leak:
            u = u + torch.cat([F.linear(x, self.a.weight), self.b.weight.sum() * x[:, :4]], 1)
        v = self.above(u.tanh())
        return [head(v) for head in self.heads]


def test_several_features_and_shared_layers_above_them() -> None:
    torch.manual_seed(0)
    a = Fork().double()
    b = Fork().double()
    b.load_state_dict(a.state_dict())
    for model, features in ((a, [a.a, a.b]), (b, None)):
        optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), aggregator="sum", rho=0.0, features=features)
        for k in range(2):
            optimizer.step(closure_of(model, *batch(k)))
    for s, t in zip(values(a), values(b), strict=True):
        torch.testing.assert_close(s, t, rtol=1e-10, atol=1e-13)


def test_absent_and_failing_tasks() -> None:
    model = two_heads(norm=True)
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=LR, momentum=0.9), rho=0.0, features=model.trunk)
    x, y = batch()
    optimizer.step(closure_of(model, x, y))
    before, buffers = values(model), [b.clone() for b in model.buffers()]

    def closure() -> list[Tensor | None]:
        return [F.cross_entropy(model(x)[0], y[0]), None]

    optimizer.step(closure)
    assert optimizer.last["weights_loss"].isnan().tolist() == [False, True]
    assert not equal(before, values(model))
    before, buffers = values(model), [b.clone() for b in model.buffers()]

    def failing() -> list[Tensor]:
        losses = closure_of(model, x, y)()
        losses[1].register_hook(lambda g: g * float("nan"))
        return losses

    with pytest.raises(flatmtl.NonFiniteError, match="task 1"):
        optimizer.step(failing)
    assert equal(before, values(model))
    assert equal(buffers, list(model.buffers()))


def test_grad_scaler() -> None:
    results = []
    for enabled in (False, True):
        model = two_heads()
        optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), rho=0.0, features=model.trunk)
        scaler = torch.amp.GradScaler("cpu", init_scale=512.0, enabled=enabled)
        optimizer.backward(closure_of(model, *batch()), grad_scaler=scaler)
        scaler.step(optimizer)
        results.append(parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def test_mtcool_by_hand() -> None:
    model, plain = two_heads(tasks=3), two_heads(tasks=3)
    optimizer = flatmtl.FlatMTL(
        SGD(model.parameters(), lr=LR), flat="mtcool", features=model.trunk, rho=RHO, aggregator="sum"
    )
    for k in range(3):
        start = parameters_to_vector(plain.parameters()).detach()
        z, _ = feature_rows(plain, k)
        shift = [sum(z[j] for j in range(3) if j != i) for i in range(3)]
        shift = [RHO * s / s.norm() for s in shift]  # type: ignore[union-attr, operator]
        _, full = feature_rows(plain, k, shift)
        optimizer.step(closure_of(model, *batch(k, 3)))
        after = parameters_to_vector(model.parameters()).detach()
        torch.testing.assert_close(after, start - LR * torch.stack(full).sum(0), rtol=1e-9, atol=1e-12)
        plain.load_state_dict(model.state_dict())


def test_mtcool_of_one_task_is_the_plain_step() -> None:
    a, b = two_heads(tasks=1), two_heads(tasks=1)
    flatmtl.FlatMTL(SGD(a.parameters(), lr=LR), flat="mtcool", features=a.trunk).step(closure_of(a, *batch(tasks=1)))
    flatmtl.FlatMTL(SGD(b.parameters(), lr=LR), rho=0.0).step(closure_of(b, *batch(tasks=1)))
    for s, t in zip(values(a), values(b), strict=True):
        torch.testing.assert_close(s, t, rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="rho is -1"):
        flatness.MTCOOL(rho=-1.0)


def test_a_feature_that_is_computed_from_another_is_refused() -> None:
    model = two_heads()
    before = values(model)
    for features in ([model.trunk[0], model.trunk[1]], [model.trunk[1], nn.Identity()]):
        model.trunk.add_module("2", features[1]) if isinstance(features[1], nn.Identity) else None
        optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), rho=0.0, features=features)
        with pytest.raises(RuntimeError, match=r"features\[1\] is computed from features\[0\]|\[0\] is computed from"):
            optimizer.step(closure_of(model, *batch()))
    assert equal(before, values(model))


@pytest.mark.parametrize("options", [
    {"flat": "mtcool"}, {"flat": "sam", "combine": "direct"}, {"flat": "fsam", "combine": "direct"}, {"rho": 0.0},
])  # fmt: skip
def test_weighted_losses_are_losses_times_their_weights(options: dict[str, Any]) -> None:
    results, options = [], {"rho": RHO, **options}
    c = [0.3, 2.0, 1.5]
    for weighting in (None, flatmtl.FixedWeights(c)):
        model = two_heads(tasks=3)
        optimizer = flatmtl.FlatMTL(
            SGD(model.parameters(), lr=LR), features=model.trunk, aggregator="mgda", weighting=weighting, **options
        )
        for k in range(2):
            closure = closure_of(model, *batch(k, 3))
            optimizer.step(closure if weighting else lambda f=closure: [w * v for w, v in zip(c, f(), strict=True)])
        results.append(values(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{"flat": "mtcool"}, {"flat": "sam", "combine": "direct"}, {"rho": 0.0}])
def test_a_step_without_any_task(options: dict[str, Any]) -> None:
    model = two_heads()
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), features=model.trunk, **options)
    before = values(model)
    optimizer.step(lambda: [None, None])
    assert equal(before, values(model))
    assert optimizer.last["losses"].isnan().all()


def test_errors() -> None:
    model = two_heads()
    closure = closure_of(model, *batch())

    def make(**options: Any) -> flatmtl.FlatMTL:
        return flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), **options)

    with pytest.raises(ValueError, match="features= with flatness mode 'fmtl' and combine='decomposed'"):
        make(features=model.trunk)
    with pytest.raises(ValueError, match="combine='decomposed'"):
        make(features=model.trunk, flat="sam")
    with pytest.raises(ValueError, match="'mtcool' needs features="):
        make(flat="mtcool")
    with pytest.raises(TypeError, match=r"features\[1\] must be a module"):
        make(features=[model.trunk, torch.zeros(3)], rho=0.0)
    before = values(model)
    with pytest.raises(RuntimeError, match=r"features\[0\] \(Linear\) was not called"):
        make(features=nn.Linear(2, 2), rho=0.0).step(closure)
    with pytest.raises(ValueError, match="needs one closure for all tasks"):
        make(features=model.trunk, rho=0.0).step([lambda: closure()[0], lambda: closure()[1]])
    with pytest.raises(RuntimeError, match="called twice"):
        make(features=model.trunk, rho=0.0).step(lambda: [a + b for a, b in zip(closure(), closure(), strict=True)])
    with pytest.raises(TypeError, match="must be a tensor, but is list"):
        make(features=model, rho=0.0).step(closure)
    optimizer = make(features=model.trunk, rho=0.0)
    optimizer.param_groups[0]["rho"] = 0.1
    with pytest.raises(ValueError, match="needs rho = 0 in every param group"):
        optimizer.step(closure)
    assert equal(before, values(model))
    leaking = Fork(leak=True).double()
    with pytest.raises(RuntimeError, match="both through the features and beside them"):
        flatmtl.FlatMTL(SGD(leaking.parameters(), lr=LR), rho=0.0, features=[leaking.a, leaking.b]).step(
            closure_of(leaking, *batch())
        )


@pytest.mark.parametrize("options", [{"rho": 0.0}, {"flat": "sam", "combine": "direct"}])
def test_max_norm_clips_the_trunk_not_the_features(options: dict[str, Any]) -> None:
    model = two_heads()
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), features=model.trunk, max_norm=0.01, **options)
    optimizer.backward(closure_of(model, *batch()))
    grads = torch.cat([p.grad.reshape(-1) for p in model.trunk.parameters() if p.grad is not None])
    assert float(grads.norm()) == pytest.approx(0.01, rel=1e-12)


def test_ntkmtl_sr() -> None:
    model, plain = two_heads(tasks=3), two_heads(tasks=3)
    aggregator = flatmtl.NTKMTL(exponent=0.75, splits=4)
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), aggregator=aggregator, rho=0.0, features=model.trunk)
    optimizer.step(closure_of(model, *batch(0, 3)))
    rows, full = feature_rows(plain, 0)
    spectra = torch.stack([torch.linalg.matrix_norm(z.reshape(4, -1), ord=2) ** 2 for z in rows])
    w = (spectra.mean() / spectra) ** 0.75
    torch.testing.assert_close(optimizer.last["weights_loss"], w, rtol=1e-10, atol=0)
    trunk = sum(p.numel() for p in plain.trunk.parameters())
    start = parameters_to_vector(plain.parameters()).detach()
    expected = start[:trunk] - LR * (w @ torch.stack(full)[:, :trunk])
    torch.testing.assert_close(
        parameters_to_vector(model.parameters()).detach()[:trunk], expected, rtol=1e-9, atol=1e-12
    )
    with pytest.raises(ValueError, match="splits needs features="):
        flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), aggregator=aggregator)
    uneven = flatmtl.FlatMTL(
        SGD(model.parameters(), lr=LR), aggregator=flatmtl.NTKMTL(splits=5), rho=0.0, features=model.trunk
    )
    with pytest.raises(ValueError, match="splits is 5, but"):
        uneven.step(closure_of(model, *batch(0, 3)))
