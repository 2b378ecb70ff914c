"""FlatMTL(weighting=...): plain weighted sums, the reference, state, absent tasks, failures, what is learned afterwards."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator

import flatmtl
import pytest
import torch
import torch.nn.functional as F
from flatmtl import reference
from flatmtl.weightings import WEIGHTINGS, get_weighting
from models import batch, closure_of, equal, two_heads, values
from torch import nn

F64 = torch.float64
TASKS = 3
OPTIONS: dict[str, dict] = {
    "fixed": {"values": [0.5, 2.0, 1.5]}, "dwa": {"epoch": 2}, "stch": {"epoch": 1, "warmup": 1}, "famo": {"lr": 0.3},
    "go4align": {"eta": 0.5, "groups": 2}, "gradnorm": {"lr": 0.2}, "bmtl": {"temperature": 0.3}, "slaw": {"beta": 0.5},
    "uw": {"lr": 0.2}, "imtl_l": {"lr": 0.2}, "rlw": {"seed": 5},
}  # fmt: skip
NAMES = sorted(WEIGHTINGS)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(model: nn.Module, name: str, **options: object) -> flatmtl.FlatMTL:
    options = {"aggregator": "sum", "rho": 0.0, **options}
    weighting = get_weighting(name, **OPTIONS.get(name, {}))
    return flatmtl.FlatMTL(torch.optim.SGD(model.parameters(), lr=0.1), weighting=weighting, **options)  # type: ignore[arg-type]


def run(optimizer: flatmtl.FlatMTL, model: nn.Module, steps: int, first: int = 0) -> None:
    for t in range(first, first + steps):
        optimizer.step(closure_of(model, *batch(t, TASKS)))


@pytest.mark.parametrize("name", NAMES)
def test_alone_it_is_the_gradient_of_the_weighted_sum(name: str) -> None:
    """For shared and own parameters, with the weights that the record tells."""
    model = two_heads(tasks=TASKS)
    optimizer = make(model, name)
    for t in range(4):
        closure = closure_of(model, *batch(t, TASKS))
        optimizer.backward(closure)
        c = optimizer.last["loss_weights"]
        assert (c > 0).all()
        expected = torch.autograd.grad(sum(c_i * loss for c_i, loss in zip(c.tolist(), closure())), model.parameters())  # noqa: B905
        for p, g in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-14)
        assert optimizer.last["weights_loss"].tolist() == [1.0] * TASKS  # the aggregator's, for the rows c_i g_i
        optimizer.step()


@pytest.mark.parametrize("rho", [0.0, 0.05])
@pytest.mark.parametrize(
    ("aggregator", "combine"), [("cagrad", "decomposed"), ("mgda", "direct"), ("nash_mtl", "each")]
)
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_reference(name: str, aggregator: str, combine: str, rho: float) -> None:
    if rho == 0.0 and combine != "decomposed":
        return
    model = two_heads(tasks=TASKS, norm=True)
    other = copy.deepcopy(model)
    ours = make(model, name, aggregator=aggregator, combine=combine, rho=rho)
    theirs = reference.FlatMTL(
        torch.optim.SGD(other.parameters(), lr=0.1), aggregator=aggregator, combine=combine, rho=rho,
        weighting=reference.Weighting(name, **OPTIONS.get(name, {})),
    )  # fmt: skip
    for t in range(5):
        x, y = batch(t, TASKS)
        ours.step(closure_of(model, x, y))
        theirs.step(closure_of(other, x, y))
    for p, q in zip(values(model), values(other), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    for a, b in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_resume_bit_for_bit(name: str) -> None:
    model = two_heads(tasks=TASKS)
    optimizer = make(model, name, aggregator="cagrad", rho=0.05)
    run(optimizer, model, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    run(optimizer, model, 3, first=3)

    resumed = two_heads(seed=1, tasks=TASKS)
    again = make(resumed, name, aggregator="cagrad", rho=0.05)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    resumed.load_state_dict(loaded["model"])
    again.load_state_dict(loaded["optimizer"])
    run(again, resumed, 3, first=3)
    assert equal(values(model), values(resumed))
    state, state_again = optimizer.states.get("weighting"), again.states.get("weighting")
    assert (state is None) == (len(get_weighting(name, **OPTIONS.get(name, {})).fresh_state(3)) == 0)
    assert state is None or torch.equal(state["values"], state_again["values"])


def test_checkpoints_of_another_weighting_are_refused() -> None:
    model = two_heads(tasks=TASKS)
    optimizer = make(model, "uw")
    run(optimizer, model, 1)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="state of weighting 'uw', but the optimizer has 'dwa'"):
        make(model, "dwa").load_state_dict(state)
    with pytest.raises(ValueError, match="state of weighting 'uw', but the optimizer has None"):
        flatmtl.FlatMTL(torch.optim.SGD(model.parameters(), lr=0.1)).load_state_dict(state)
    state["flatmtl"]["states"]["weighting"]["values"] = torch.zeros(5, dtype=F64)
    with pytest.raises(
        ValueError, match=r"state of the weighting 'uw': 'values' is .* must be a float64 tensor of shape \(12,\)"
    ):
        make(model, "uw").load_state_dict(state)


@pytest.mark.parametrize("how", ["none", "zero"])
@pytest.mark.parametrize("name", NAMES)
def test_absent_tasks_take_no_part(name: str, how: str) -> None:
    """The step is that of the other tasks, and the state of the absent one stays as it was."""
    model = two_heads(tasks=TASKS)
    optimizer = make(model, name)
    run(optimizer, model, 3)
    before = optimizer.states.get("weighting", {}).get("values", torch.zeros(0)).clone().view(-1, TASKS)
    x, y = batch(9, TASKS)

    def closure() -> list[torch.Tensor | None]:
        losses: list[torch.Tensor | None] = list(closure_of(model, x, y)())
        losses[1] = None if how == "none" else losses[1] * 0.0  # type: ignore[operator]
        return losses

    optimizer.step(closure)
    c = optimizer.last["loss_weights"]
    assert torch.isnan(c).tolist() == [False, True, False]
    after = optimizer.states.get("weighting", {}).get("values", torch.zeros(0)).view(-1, TASKS)
    assert torch.equal(before[:, 1], after[:, 1])
    assert not len(before) or not torch.equal(before[:, [0, 2]], after[:, [0, 2]]) or name == "stch"
    if name in ("dwa", "gradnorm", "slaw", "bmtl", "emtl"):
        assert float(c[0] + c[2]) == pytest.approx(2.0)


def test_failures_and_skipped_steps_change_no_state() -> None:
    for name in ("uw", "dwa", "famo", "gradnorm", "slaw"):
        model = two_heads(tasks=TASKS)
        optimizer = make(model, name, rho=0.05)
        run(optimizer, model, 2)
        before = optimizer.states["weighting"]["values"].clone()
        x, y = batch(5, TASKS)
        calls = 0

        def closure(x=x, y=y, model=model) -> list[torch.Tensor]:
            nonlocal calls
            calls += 1
            losses = closure_of(model, x, y)()
            return [loss * (float("nan") if calls > 2 else 1.0) for loss in losses]  # in a perturbed pass

        with pytest.raises(flatmtl.NonFiniteError):
            optimizer.step(closure)
        assert torch.equal(optimizer.states["weighting"]["values"], before)
        optimizer.nonfinite, calls = "skip", 0
        optimizer.step(closure)
        assert optimizer.last["skipped"]
        assert torch.equal(optimizer.states["weighting"]["values"], before)


@pytest.mark.parametrize("name", ["si", "gls", "famo", "gradnorm", "emtl"])
def test_a_loss_that_is_not_positive_names_its_task(name: str) -> None:
    model = two_heads(tasks=TASKS)
    optimizer = make(model, name)
    x, y = batch(0, TASKS)
    before = values(model)

    def closure() -> dict[str, torch.Tensor]:
        a, b, c = closure_of(model, x, y)()
        return {"depth": a, "normals": b - 100.0, "edges": c}

    with pytest.raises(ValueError, match="that of task 'normals' is -9"):
        optimizer.step(closure)
    assert equal(before, values(model))
    assert optimizer.steps == 0


class TestFamo:
    """The losses after the update: one forward, without a trace."""

    def setup(self, **options: object) -> tuple[nn.Module, flatmtl.FlatMTL, list[str], object]:
        model = two_heads(tasks=TASKS, norm=True, dropout=0.5)
        optimizer = make(model, "famo", **options)
        calls: list[str] = []
        x, y = batch(0, TASKS)

        def closure() -> list[torch.Tensor]:
            calls.append("grad" if torch.is_grad_enabled() else "no grad")
            return closure_of(model, x, y)()

        return model, optimizer, calls, closure

    def test_forwards_random_numbers_and_batchnorm(self) -> None:
        model, optimizer, calls, closure = self.setup()
        torch.manual_seed(3)
        optimizer.step(closure)
        assert calls == ["grad", "no grad"]
        after = torch.get_rng_state()
        statistics = [b.clone() for b in model.buffers()]
        other, plain, _, other_closure = self.setup()
        plain.settings.weighting = None
        torch.manual_seed(3)
        plain.step(other_closure)
        assert torch.equal(after, torch.get_rng_state())
        assert all(torch.equal(a, b) for a, b in zip(statistics, other.buffers(), strict=True))

    def test_it_learns_from_the_same_batch_with_the_same_masks(self) -> None:
        model, optimizer, _, closure = self.setup()
        torch.manual_seed(3)
        state = torch.get_rng_state()
        buffers = [b.clone() for b in model.buffers()]
        before = torch.stack(list(optimizer.step(closure)))
        torch.set_rng_state(state)
        for b, value in zip(model.buffers(), buffers, strict=True):
            b.copy_(value)
        with torch.no_grad():
            after = torch.stack(closure())  # type: ignore[operator]
        expected = get_weighting("famo", **OPTIONS["famo"])
        memory = expected.fresh_state(TASKS)
        expected.observe(before, after, memory)
        assert torch.equal(optimizer.states["weighting"]["values"], memory)

    def test_after_backward_it_waits_for_the_update(self) -> None:
        model, optimizer, calls, closure = self.setup(rho=0.05)
        optimizer.backward(closure)
        fresh = optimizer.states["weighting"]["values"].clone()
        assert not fresh.any()
        del calls[:]
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        assert calls == ["no grad"]
        assert optimizer.states["weighting"]["values"].any()
        optimizer.step()  # nothing is left to observe
        assert calls == ["no grad"]

    def test_micro_batches(self) -> None:
        model = two_heads(tasks=TASKS)
        optimizer = make(model, "famo", rho=0.05)
        batches = [batch(t, TASKS) for t in range(2)]
        count = 0

        def closure(b: tuple) -> list[torch.Tensor]:
            nonlocal count
            count += 1
            return closure_of(model, *b)()

        before = torch.stack(list(optimizer.step(closure, batches=batches)))
        assert count == 2 * (1 + TASKS + 1)
        with torch.no_grad():
            after = (torch.stack(closure(batches[0])) + torch.stack(closure(batches[1]))) / 2
        memory = optimizer.settings.weighting.fresh_state(TASKS)  # type: ignore[union-attr]
        optimizer.settings.weighting.observe(before, after, memory)  # type: ignore[union-attr]
        torch.testing.assert_close(optimizer.states["weighting"]["values"], memory, rtol=1e-12, atol=0)

    def test_an_exception_there_says_what_has_happened(self) -> None:
        model, optimizer, _, closure = self.setup()
        statistics = None

        def failing() -> list[torch.Tensor]:
            nonlocal statistics
            if not torch.is_grad_enabled():
                statistics = [b.clone() for b in model.buffers()]
                model(batch(0)[0])  # changes BatchNorm, draws
                raise ValueError("boom")
            return closure()  # type: ignore[operator]

        before = values(model)
        with pytest.raises(ValueError, match="boom") as info:
            optimizer.step(failing)
        assert "the update is made" in info.value.__notes__[0]
        assert not equal(before, values(model))
        assert not optimizer.states["weighting"]["values"].any()
        assert optimizer.steps == 1

    def test_no_gradients_are_kept_until_the_update(self) -> None:
        _, optimizer, _, closure = self.setup()
        optimizer.backward(closure)
        assert optimizer._after_update is not None
        assert all(not s.grads for s in optimizer._after_update.tasks)
        assert copy.deepcopy(optimizer)._after_update is None


def test_grad_scaler_changes_nothing() -> None:
    """GradNorm sees the norms without the scale."""
    for name in ("gradnorm", "emtl", "uw"):
        results = []
        for scale in (1.0, 2.0**16):
            model = two_heads(tasks=TASKS)
            optimizer = make(model, name, aggregator="cagrad", rho=0.05)
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            for t in range(3):
                optimizer.backward(closure_of(model, *batch(t, TASKS)), grad_scaler=scaler)
                scaler.step(optimizer)
                scaler.update()
            results.append((values(model), optimizer.states.get("weighting", {}).get("values", torch.zeros(0))))
        for p, q in zip(results[0][0], results[1][0], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-12, atol=1e-14)


def test_m_sharpness_takes_one_step_of_the_state() -> None:
    model = two_heads(tasks=TASKS)
    optimizer = make(model, "uw", rho=0.05, m_sharpness=True)
    losses = optimizer.step(lambda b: closure_of(model, *b)(), batches=[batch(0, TASKS), batch(1, TASKS)])
    assert optimizer.states["weighting"]["values"].view(4, TASKS)[0].tolist() == [1.0] * TASKS
    alone, memory = optimizer.settings.weighting, optimizer.settings.weighting.fresh_state(TASKS)  # type: ignore[union-attr]
    c = alone(torch.stack(list(losses)), state=memory)  # type: ignore[misc]
    assert torch.equal(optimizer.last["loss_weights"], c)
    torch.testing.assert_close(optimizer.states["weighting"]["values"], memory, rtol=1e-15, atol=0)


def test_one_task_and_names() -> None:
    model = nn.Linear(5, 3, dtype=F64)
    optimizer = flatmtl.FlatMTL(torch.optim.SGD(model.parameters(), lr=0.1), weighting="si", rho=0.0)
    x, (y, *_) = batch(0)
    optimizer.backward(lambda: [F.cross_entropy(model(x), y)])
    loss = F.cross_entropy(model(x), y)
    (g,) = torch.autograd.grad(loss, [model.weight])
    torch.testing.assert_close(model.weight.grad, g / loss.detach())
    assert "weighting=SI()" in repr(optimizer)
    with pytest.raises(ValueError, match="there is no weighting 'sii'"):
        flatmtl.FlatMTL(torch.optim.SGD(model.parameters(), lr=0.1), weighting="sii")
    with pytest.raises(ValueError, match="FixedWeights has 2 values for 1 tasks"):
        flatmtl.FlatMTL(torch.optim.SGD(model.parameters(), lr=0.1), weighting=flatmtl.FixedWeights([1.0, 2.0])).step(
            lambda: [F.cross_entropy(model(x), y)]
        )
