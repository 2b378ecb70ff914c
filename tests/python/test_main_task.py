"""HydaLearn and SLGrad: weights by hand, what they leave behind, their refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flatmtl
import pytest
import torch
import torch.nn.functional as F
from models import TwoHeads, batch, closure_of, equal, two_heads, values
from torch import Tensor
from torch.optim import SGD

LR = 0.1


def held_out(model: TwoHeads, k: int = 99) -> Callable[[], Tensor]:
    x, y = batch(k)
    return lambda: F.cross_entropy(model(x)[0], y[0])


def gradients(losses: list[Tensor], model: TwoHeads) -> list[list[Tensor]]:
    params = list(model.parameters())
    return [list(torch.autograd.grad(v, params, retain_graph=True, materialize_grads=True)) for v in losses]


def moved(model: TwoHeads, step: list[Tensor], lr: float) -> TwoHeads:
    other = two_heads()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p, g in zip(other.parameters(), step, strict=True):
            p -= lr * g
    return other


@pytest.mark.parametrize("lr", [None, 0.5])
def test_hydalearn_weighs_by_the_gain_on_held_out_data(lr: float | None) -> None:
    model = two_heads()
    model.heads[1].load_state_dict(model.heads[0].state_dict())
    x, y = batch()
    targets = [y[0], y[0]]  # an auxiliary that helps
    v = float(held_out(model, 0)().detach())
    losses = closure_of(model, x, targets)()
    gains = [max(v - float(held_out(moved(model, g, lr or LR), 0)().detach()), 0.0) for g in gradients(losses, model)]
    assert all(gains)
    expected = torch.tensor([2 * g / sum(gains) for g in gains], dtype=torch.float64)
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), weighting=flatmtl.HydaLearn(lr=lr), aggregator="sum")
    optimizer.step(closure_of(model, x, targets), validation=held_out(model, 0))
    torch.testing.assert_close(optimizer.last["loss_weights"], expected, rtol=1e-7, atol=0)


def test_hydalearn_metric_main_by_key_and_no_gain() -> None:
    model = two_heads()
    x, y = batch()

    def closure() -> dict[str, Tensor]:
        return {f"task{i}": v for i, v in enumerate(closure_of(model, x, y)())}

    options: dict[str, Any] = {"main": "task1", "higher_is_better": True}
    optimizer = flatmtl.FlatMTL(
        SGD(model.parameters(), lr=LR), weighting=flatmtl.HydaLearn(**options), aggregator="sum"
    )
    optimizer.step(closure, validation=lambda: -held_out(model)())
    up = optimizer.last["loss_weights"]
    assert bool((up > 0).any())
    assert float(up.sum()) == pytest.approx(2.0)
    optimizer.step(closure, validation=lambda: 1.0)  # constant: no gain anywhere
    assert optimizer.last["loss_weights"].tolist() == [0.0, 2.0]
    other = flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), weighting=flatmtl.HydaLearn(main=5))
    with pytest.raises(ValueError, match=r"main is 5, but the tasks are \['task0', 'task1'\]"):
        other.step(closure, validation=lambda: 1.0)


def per_sample(model: TwoHeads, k: int = 0) -> Callable[[], list[Tensor]]:
    x, y = batch(k)
    return lambda: [F.cross_entropy(o, t, reduction="none") for o, t in zip(model(x), y, strict=True)]


@pytest.mark.parametrize("rho", [0.0, 0.2])
def test_slgrad_weighs_samples_by_alignment(rho: float) -> None:
    model = two_heads()
    rows = per_sample(model)()
    mean = gradients([torch.stack([v.mean() for v in rows]).sum()], model)[0]
    ahead = moved(model, mean, LR)
    v = gradients([held_out(ahead)()], ahead)[0]
    products = torch.stack(
        [
            torch.stack(
                [
                    torch.stack([(a * b).sum() for a, b in zip(g, v, strict=True)]).sum()
                    for g in gradients(list(row), model)
                ]
            )
            for row in rows
        ]
    )
    w = products.clamp(min=0.0)
    w = w / w.sum()
    assert 0 < int((w == 0).sum()) < w.numel()
    other = two_heads()
    plain = flatmtl.FlatMTL(SGD(other.parameters(), lr=LR), aggregator="sum", rho=rho)
    plain.step(lambda: [(w[t] * row).sum() for t, row in enumerate(per_sample(other)())])
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), weighting="slgrad", aggregator="sum", rho=rho)
    losses = optimizer.step(per_sample(model), validation=held_out(model))
    torch.testing.assert_close(torch.stack(losses), torch.stack([(w[t] * rows[t].detach()).sum() for t in range(2)]))
    for a, b in zip(values(model), values(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["hydalearn", "slgrad"])
def test_nothing_else_changes(name: str) -> None:
    # BatchNorm and the random state move as in one forward, though held-out data and dropout were used
    model, plain = (two_heads(norm=True, dropout=0.3) for _ in range(2))

    def validation() -> Tensor:
        torch.rand(3)
        return held_out(model)()

    def make(m: TwoHeads) -> Callable[[], list[Tensor]]:
        return per_sample(m) if name == "slgrad" else closure_of(m, *batch())

    torch.manual_seed(3)
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), weighting=name)
    optimizer.step(make(model), validation=validation)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    make(plain)()
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["hydalearn", "slgrad"])
@pytest.mark.parametrize("fail_at", [0, 1])
def test_failures_undo_all(name: str, fail_at: int) -> None:
    model = two_heads(norm=True, dropout=0.3)
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=LR, momentum=0.9), weighting=name)
    closure = per_sample(model) if name == "slgrad" else closure_of(model, *batch())
    optimizer.step(closure, validation=held_out(model))
    before, rng, calls = [t.clone() for t in model.state_dict().values()], torch.get_rng_state(), iter(range(9))

    def failing() -> Any:
        value = held_out(model)()
        if next(calls) == fail_at:
            raise KeyError("injected")
        return value

    if name == "slgrad" and fail_at:
        return  # one evaluation alone
    with pytest.raises(KeyError, match="injected"):
        optimizer.step(closure, validation=failing)
    assert equal(before, [t.clone() for t in model.state_dict().values()])
    assert torch.equal(rng, torch.get_rng_state())


def test_refusals() -> None:
    model = two_heads()
    closure, validation = closure_of(model, *batch()), held_out(model)

    def make(weighting: Any) -> flatmtl.FlatMTL:
        return flatmtl.FlatMTL(SGD(model.parameters(), lr=LR), weighting=weighting)

    before = values(model)
    for name in ("hydalearn", "slgrad"):
        with pytest.raises(TypeError, match=r"needs step\(closure, validation=...\)"):
            make(name).step(closure)
        with pytest.raises(TypeError, match="validation must be callable"):
            make(name).step(closure, validation=3.0)
    with pytest.raises(TypeError, match="does not use it"):
        make("uw").step(closure, validation=validation)
    with pytest.raises(TypeError, match="without a closure"):
        make("hydalearn").step(validation=validation)
    with pytest.raises(ValueError, match=r"loss of task 0 must have shape \(B,\), but is \(\)"):
        make("slgrad").step(closure, validation=validation)
    with pytest.raises(TypeError, match="scalar tensor with a graph"):
        make("slgrad").step(per_sample(model), validation=lambda: 1.0)
    with pytest.raises(ValueError, match="one closure for all tasks"):
        make("slgrad").step([closure, closure], validation=validation)
    with pytest.raises(RuntimeError, match="validation returned nan"):
        make("hydalearn").step(closure, validation=lambda: float("nan"))
    with pytest.raises(ValueError, match="lr is -1"):
        flatmtl.HydaLearn(lr=-1)
    with pytest.raises(ValueError, match=r"no weighting 'hydralearn'.*'hydalearn'"):
        make("hydralearn")
    assert equal(before, values(model))
