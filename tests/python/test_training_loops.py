"""Training loops: mixed precision, variants of the wrapped optimizer, clipping, radii per group, long disturbed runs."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from typing import Any

import flatmtl
import pytest
import torch
import torch.nn.functional as F
from flatmtl import reference
from models import TwoHeads, batch, closure_of, equal, two_heads, values
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.optim import SGD, Adam, AdamW


def train(
    cls: Any, model: TwoHeads, closure: Callable[[int], Callable[[], list[Tensor]]], steps: int = 3, **options: Any
) -> None:
    optimizer = cls(SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.2, **options)
    for k in range(steps):
        optimizer.step(closure(k))


def test_autocast_equals_the_reference() -> None:
    results = []
    for cls in (flatmtl.FlatMTL, reference.FlatMTL):
        model = two_heads(dtype=torch.float32, width=32)

        def closure(k: int, model: TwoHeads = model) -> Callable[[], list[Tensor]]:
            x, y = batch(k, dtype=torch.float32)

            def losses() -> list[Tensor]:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    out = model(x)
                    assert out[0].dtype == torch.bfloat16
                    return [F.cross_entropy(o.float(), t) for o, t in zip(out, y, strict=True)]

            return losses

        train(cls, model, closure)
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
        results.append(values(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_autocast_around_the_step_casts_the_parameters_anew_in_every_pass() -> None:
    """Autocast keeps the parameters it has cast until its outermost block ends: those of another point here."""
    results, after = [], []
    for around in (False, True):
        model = two_heads(dtype=torch.float32)
        optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), rho=0.3, weighting="famo")
        for k in range(2):
            closure = closure_of(model, *batch(k, dtype=torch.float32))

            def inside(closure: Callable[[], list[Tensor]] = closure) -> list[Tensor]:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    return closure()

            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
                optimizer.backward(closure if around else inside)
                after.append([float(loss.detach()) for loss in (closure if around else inside)()])
                optimizer.step()
        results.append([*values(model), optimizer.last["sharpness"], optimizer.states["weighting"]["values"]])
    assert (results[0][-2] != 0.0).all()
    assert equal(*results)
    assert after[:2] == after[2:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("aggregator", ["cagrad", "nash_mtl", "mgda", "imtl_g"])
def test_half_precision_models(dtype: torch.dtype, aggregator: str) -> None:
    # one step from one point: parameters differ by the rounding of the update alone
    results = []
    for cls in (flatmtl.FlatMTL, reference.FlatMTL):
        model = two_heads(dtype=dtype, width=32)
        optimizer = cls(SGD(model.parameters(), lr=0.1), rho=0.2, aggregator=aggregator)
        optimizer.backward(closure_of(model, *batch(dtype=dtype)))
        assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())
        results.append(torch.cat([p.grad.double().reshape(-1) for p in model.parameters() if p.grad is not None]))
    difference = (results[0] - results[1]).norm() / results[1].norm()
    assert difference < 4 * torch.finfo(dtype).eps


def test_f16_with_a_grad_scaler_backs_off_and_goes_on() -> None:
    model = two_heads(dtype=torch.float32)
    optimizer = flatmtl.FlatMTL(Adam(model.parameters(), lr=0.01))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    x, y = batch(dtype=torch.float32)

    def closure() -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.float16):
            return [F.cross_entropy(o, t) for o, t in zip(model(x), y, strict=True)]

    scales, moved = [], []
    for _ in range(40):
        before = values(model)
        losses = optimizer.backward(closure, grad_scaler=scaler)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        moved.append(not equal(before, values(model)))
        assert all(loss.isfinite() for loss in losses)
    assert not moved[0]
    assert moved[-1]
    assert scales[-1] < 2.0**40
    skipped = moved.index(True)
    assert scales[skipped - 1] == 2.0 ** (40 - skipped)  # halved by every skipped step
    assert all(v.isfinite().all() for v in values(model))


def test_a_closure_for_the_scaler_is_refused() -> None:
    model = two_heads()
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    closure = closure_of(model, *batch())
    optimizer.backward(closure, grad_scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    for prepare in (optimizer.zero_grad, lambda: optimizer.backward(closure, grad_scaler=scaler)):
        prepare()
        before = values(model)
        with pytest.raises(RuntimeError, match=r"optimizer\.backward\(closure, grad_scaler=scaler\)"):
            scaler.step(optimizer, closure)
        with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
            scaler.step(optimizer, closure=closure)
        assert equal(before, values(model))
    scaler.step(optimizer)
    assert not equal(before, values(model))


VARIANTS: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
    "weight_decay": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "amsgrad": lambda p: Adam(p, lr=0.05, amsgrad=True),
    "adamw_fused": lambda p: AdamW(p, lr=0.05, fused=True),
    "sgd_fused": lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
    "foreach": lambda p: Adam(p, lr=0.05, foreach=True),
    "for_loop": lambda p: Adam(p, lr=0.05, foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_wrapped_optimizer_get_the_same_gradient(name: str) -> None:
    # wrapped, and by hand with the gradient that backward leaves
    model, other = two_heads(), two_heads()
    optimizer, inner = (
        flatmtl.FlatMTL(VARIANTS[name](list(model.parameters()))),
        VARIANTS[name](list(other.parameters())),
    )
    pointers = [p.data_ptr() for p in model.parameters()]
    source = flatmtl.FlatMTL(SGD(other.parameters(), lr=0.0))
    for k in range(3):
        optimizer.step(closure_of(model, *batch(k)))
        source.backward(closure_of(other, *batch(k)))
        inner.step()
        assert equal(values(model), values(other))
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_maximize_is_the_negative_loss_minimized() -> None:
    a, b = two_heads(), two_heads()
    up = flatmtl.FlatMTL(SGD(a.parameters(), lr=0.1, maximize=True), rho=0.2, aggregator="mgda")
    down = flatmtl.FlatMTL(SGD(b.parameters(), lr=0.1), rho=0.2, aggregator="mgda")
    for k in range(3):
        up.step(lambda k=k: [-loss for loss in closure_of(a, *batch(k))()])
        down.step(closure_of(b, *batch(k)))
    for s, t in zip(values(a), values(b), strict=True):
        torch.testing.assert_close(s, t, rtol=1e-12, atol=1e-14)


def test_capturable_is_torchs_business() -> None:
    # torch's own check of device types comes through, and nothing of the step is lost before it
    model = two_heads()
    optimizer = flatmtl.FlatMTL(Adam(model.parameters(), lr=0.01, capturable=True))
    before = values(model)
    with pytest.raises(Exception, match="capturable"):
        optimizer.step(closure_of(model, *batch()))
    assert equal(before, values(model))


def test_lbfgs_is_refused() -> None:
    with pytest.raises(TypeError, match="LBFGS cannot be wrapped"):
        flatmtl.FlatMTL(torch.optim.LBFGS(two_heads().parameters()))


def test_radii_per_group() -> None:
    # the heads' group with radius 0 stays where it is in the perturbed passes; the trunk's moves by its own
    model = two_heads()
    groups = [{"params": model.trunk.parameters(), "rho": 0.3}, {"params": model.heads.parameters(), "rho": 0.0}]
    optimizer = flatmtl.FlatMTL(SGD(groups, lr=0.1))
    start, seen = values(model), []
    inner = closure_of(model, *batch())

    def closure() -> list[Tensor]:
        seen.append(values(model))
        return inner()

    optimizer.step(closure)
    trunk = len(list(model.trunk.parameters()))
    for point in seen[1:]:
        assert equal(point[trunk:], start[trunk:])
        moved = torch.cat([(a - b).reshape(-1) for a, b in zip(point[:trunk], start[:trunk], strict=True)])
        torch.testing.assert_close(moved.norm(), torch.tensor(0.3, dtype=torch.float64))


@pytest.mark.parametrize("aggregator", ["nash_mtl", "fairgrad"])
def test_max_norm_clips_each_family(aggregator: str) -> None:
    closure: Any = None
    updates = {}
    for max_norm in (None, 1e-3, 1e3):
        model = two_heads()
        closure = closure_of(model, *batch())
        optimizer = flatmtl.FlatMTL(
            SGD(model.parameters(), lr=0.1), aggregator=aggregator, family_scale=None, max_norm=max_norm, rho=0.1
        )
        optimizer.backward(closure)
        a, b = optimizer.last["weights_loss"], optimizer.last["weights_flat"]
        norms = []
        for w, family in ((a, "loss"), (b, "flat")):
            d = optimizer.last[f"norms_{family}"]
            gramian = optimizer.last[f"cosine_{family}"] * torch.outer(d, d)
            norms.append(float((w @ gramian @ w).sqrt()))
        updates[max_norm] = (norms, parameters_to_vector([p.grad for p in model.trunk.parameters()]))
    assert updates[1e-3][0] == pytest.approx([1e-3, 1e-3], rel=1e-9)
    assert updates[None][0] == updates[1e3][0]
    assert torch.equal(updates[None][1], updates[1e3][1])
    assert updates[None][0][0] == pytest.approx(2**0.5 if aggregator == "nash_mtl" else updates[None][0][0])
    for combine in ("direct", "second", "each"):
        model = two_heads()
        optimizer = flatmtl.FlatMTL(
            SGD(model.parameters(), lr=0.1), combine=combine, max_norm=1e-3, aggregator=aggregator
        )
        optimizer.backward(closure_of(model, *batch()))
        grads = torch.cat([p.grad.reshape(-1) for p in model.trunk.parameters() if p.grad is not None])
        assert float(grads.norm()) == pytest.approx(1e-3, rel=1e-9)
    with pytest.raises(ValueError, match="Invalid max_norm: 0"):
        flatmtl.FlatMTL(SGD(two_heads().parameters(), lr=0.1), max_norm=0)


# -- soak ---------------------------------------------------------------------------------------------------------------


class Injected(Exception):
    pass


def soak(steps: int, options: dict[str, Any]) -> None:
    """A run with failures and resumptions at random against the undisturbed one: bit-equal, and memory stays flat."""

    def start() -> tuple[TwoHeads, flatmtl.FlatMTL]:
        model = two_heads(tasks=3, norm=True, dropout=0.1)
        return model, flatmtl.FlatMTL(Adam(model.parameters(), lr=1e-3), rho=0.1, **options)

    def closure_at(model: TwoHeads, k: int) -> Callable[[], list[Tensor | None]]:
        x, y = batch(k % 7, 3)
        present = [random.Random(1000 * k + i).random() > 0.25 for i in range(3)]
        return lambda: [
            F.cross_entropy(o, t) if there else None for o, t, there in zip(model(x), y, present, strict=True)
        ]

    plain, optimizer = start()
    torch.manual_seed(1)
    for k in range(steps):
        optimizer.step(closure_at(plain, k))
    random_state = torch.get_rng_state()

    model, optimizer = start()
    torch.manual_seed(1)
    chance, sizes = random.Random(5), []
    for k in range(steps):
        closure = closure_at(model, k)
        while chance.random() < 0.2:
            call, fail_at = iter(range(99)), chance.randrange(4)

            def failing(closure: Any = closure, call: Any = call, fail_at: int = fail_at) -> Any:
                losses = closure()
                if next(call) == fail_at:
                    raise Injected
                return losses

            state = [values(model), torch.get_rng_state()]
            try:
                optimizer.step(failing)
            except Injected:
                assert equal(state[0], values(model))
                assert torch.equal(state[1], torch.get_rng_state())
                continue
            break
        else:
            optimizer.step(closure)
        if chance.random() < 0.05:
            model, optimizer = start_from(start, [model.state_dict(), optimizer.state_dict()])
        if k % (steps // 10) == steps // 20:
            gc.collect()
            sizes.append(sum(t.numel() for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)))
    assert equal(values(plain), values(model))
    assert torch.equal(random_state, torch.get_rng_state())
    assert sizes[-1] <= 1.05 * sizes[1]


def start_from(start: Callable[[], Any], saved: list[Any]) -> tuple[TwoHeads, flatmtl.FlatMTL]:
    state = torch.get_rng_state()
    model, optimizer = start()
    torch.set_rng_state(state)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    return model, optimizer


SOAKS = [{"aggregator": "pcgrad"}, {"aggregator": "cagrad", "every": 3}, {"flat": "fsam", "aggregator": "mgda"}]


@pytest.mark.parametrize("options", SOAKS[:1])
def test_short_soak(options: dict[str, Any]) -> None:
    soak(100, options)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("options", SOAKS)
def test_soak(options: dict[str, Any]) -> None:
    soak(10_000, options)
