"""Loss weightings alone: closed forms, fixed points, extreme losses, state, and agreement with the reference."""

from __future__ import annotations

import math

import flatmtl
import pytest
import torch
from flatmtl import reference
from flatmtl.weightings import WEIGHTINGS, Weighting, get_weighting
from hypothesis import given, settings
from hypothesis import strategies as st

F64 = torch.float64
NAMES = sorted(WEIGHTINGS)
OPTIONS: dict[str, list[dict]] = {
    "fixed": [{"values": [0.5, 2.0, 0.0, 3.0]}],
    "uw": [{}, {"lr": 0.1, "initial": 1.0}],
    "dwa": [{"epoch": 3}, {"epoch": 1, "temperature": 0.5}],
    "rlw": [{}, {"seed": 12345}],
    "stch": [{"epoch": 2, "warmup": 1}, {"epoch": 3, "warmup": 0, "mu": 0.25}],
    "imtl_l": [{}, {"lr": 0.5}],
    "famo": [{}, {"lr": 0.1, "gamma": 0.0, "min_losses": [0.0, -1.0, 0.01, 0.02]}],
    "gradnorm": [{}, {"alpha": 0.12, "lr": 0.3}],
    "go4align": [{}, {"eta": 0.5, "groups": 2}, {"groups": 3}, {"groups": 9}],
    "slaw": [{}, {"beta": 0.5}],
    "bmtl": [{}, {"temperature": 0.7}],
    "emtl": [{}, {"strength": 0.0}, {"strength": 1e4}],
}
CASES = [(name, options) for name in NAMES for options in OPTIONS.get(name, [{}])]


def make(name: str, options: dict) -> Weighting:
    return get_weighting(name, **options)


def sequence(steps: int, tasks: int = 4, seed: int = 0) -> list[tuple[list[float], list[float]]]:
    g = torch.Generator().manual_seed(seed)
    level = torch.rand(tasks, generator=g, dtype=F64) * 3 + 0.3
    found = []
    for t in range(steps):
        losses = level * torch.exp(0.2 * torch.randn(tasks, generator=g, dtype=F64)) * 0.97**t + 0.05
        norms = torch.rand(tasks, generator=g, dtype=F64) * 5 + 0.1
        found.append((losses.tolist(), norms.tolist()))
    return found


@pytest.mark.parametrize(("name", "options"), CASES)
def test_agrees_with_the_reference(name: str, options: dict) -> None:
    """Over a run in which tasks come and go."""
    ours, theirs = make(name, options), reference.Weighting(name, **options)
    state = ours.fresh_state(4)
    vectors = len(state) // 4
    for t, (losses, norms) in enumerate(sequence(25)):
        absent = {t % 7} if t > 4 else set()
        at = [i for i in range(4) if i not in absent]
        expected = theirs([None if i in absent else loss for i, loss in enumerate(losses)], norms, draw=t)
        part = state.view(vectors, 4)[:, at].reshape(-1).clone()
        opts = ours.option_values(4, draw=t, present=at)
        values = torch.tensor([losses[i] for i in at], dtype=F64)
        norm_values = torch.tensor([norms[i] for i in at], dtype=F64)
        c = torch.ops.flatmtl.loss_weights(values, norm_values, ours.number, opts, part)
        torch.testing.assert_close(c, torch.tensor([expected[i] for i in at], dtype=F64), rtol=1e-9, atol=0)
        after = [loss * (0.9 + 0.05 * i) for i, loss in enumerate(losses)]
        torch.ops.flatmtl.loss_observe(values, torch.tensor([after[i] for i in at], dtype=F64), ours.number, opts, part)
        theirs.observe([None if i in absent else loss for i, loss in enumerate(losses)], after)
        state.view(vectors, 4)[:, at] = part.view(vectors, len(at))


def test_two_tasks_by_hand() -> None:
    losses = [2.0, 8.0]
    expected = {
        "si": [0.5, 0.125],
        "gls": [1.0, 0.25],  # 4 / (2 l)
        "uw": [math.exp(0.5) / 2] * 2,
        "dwa": [1.0, 1.0],
        "stch": [0.5, 0.125],
        "imtl_l": [1.0, 1.0],
        "famo": [0.8, 0.2],
        "gradnorm": [1.0, 1.0],
        "slaw": [1.0, 1.0],
        "bmtl": [2 / (1 + math.exp(6 / 50)), 2 / (1 + math.exp(-6 / 50))],
    }
    for name, c in expected.items():
        torch.testing.assert_close(
            make(name, {})(losses, norms=[1.0, 1.0]), torch.tensor(c, dtype=F64), rtol=1e-14, atol=0
        )
    # one group: all risks' mean; with eta = 0, q = 1/2 and the risks are 1/2 * 10/2 and 1/2 * 10/8
    torch.testing.assert_close(make("go4align", {"eta": 0.0})(losses), torch.full((2,), 25 / 16, dtype=F64))
    torch.testing.assert_close(
        make("go4align", {"eta": 0.0, "groups": 2})(losses), torch.tensor([2.5, 0.625], dtype=F64)
    )
    # r = (1/2, 3/2), w = (1 + x, 1 - x): 2 x^2 + (2 x - 1)^2 / 4 is least at x = 1/6
    torch.testing.assert_close(make("emtl", {})([1.0, 3.0], norms=[1.0, 1.0]), torch.tensor([7 / 6, 5 / 6], dtype=F64))
    c = make("emtl", {"strength": 1e12})([1.0, 3.0], norms=[2.0, 1.0])
    torch.testing.assert_close(c[0] / c[1], torch.tensor(6.0, dtype=F64), rtol=1e-9, atol=0)  # ||g|| / l


@pytest.mark.parametrize(("name", "lr", "product"), [("uw", 0.025, 0.5), ("imtl_l", 0.01, 1.0)])
def test_learned_weights_settle_where_the_paper_says(name: str, lr: float, product: float) -> None:
    """c_i l_i is the same for all tasks: the log-loss."""
    weighting, losses = make(name, {"lr": lr}), torch.tensor([0.5, 3.0, 40.0], dtype=F64)
    state = weighting.fresh_state(3)
    for _ in range(3000):
        c = weighting(losses, state=state)
    torch.testing.assert_close(c * losses, torch.full((3,), product, dtype=F64), rtol=0.05, atol=0)


def test_gradnorm_settles_at_equal_norms() -> None:
    weighting, norms = make("gradnorm", {"lr": 0.002}), torch.tensor([1.0, 2.0, 4.0], dtype=F64)
    state = weighting.fresh_state(3)
    for _ in range(3000):
        c = weighting([1.0, 1.0, 1.0], norms=norms, state=state)
    assert float(c.sum()) == pytest.approx(3.0)
    torch.testing.assert_close(c * norms, (c * norms).mean().expand(3), rtol=0.02, atol=0)


def test_famo_weighs_tasks_that_fall_slowly_more() -> None:
    weighting = make("famo", {"gamma": 0.0})
    state = weighting.fresh_state(2)
    before = weighting([1.0, 1.0], state=state)
    for _ in range(20):
        weighting.observe([1.0, 1.0], [0.99, 0.5], state)
    after = weighting([1.0, 1.0], state=state)
    assert before.tolist() == [0.5, 0.5]
    assert after[0] > 0.6
    assert float(after.sum()) == pytest.approx(1.0)


def test_famo_survives_what_it_cannot_learn_from() -> None:
    weighting = make("famo", {})
    state = weighting.fresh_state(3)
    weighting.observe([1.0, 1.0, 2.0], [math.nan, 0.5, 1.0], state)
    view = state.view(4, 3)
    assert view[:, 0].tolist() == [0.0] * 4  # not even counted
    assert view[0].tolist() == [0.0, 1.0, 1.0]
    weighting.observe([1.0, 1.0, 2.0], [1.0, -3.0, math.inf], state)  # below its floor, and lost
    assert torch.isfinite(state).all()
    assert view[0].tolist() == [1.0, 2.0, 1.0]


def test_dwa_compares_epochs_of_its_own_steps() -> None:
    weighting = make("dwa", {"epoch": 2})
    state = weighting.fresh_state(2)
    for a, b in [(4.0, 4.0), (2.0, 4.0), (1.0, 3.0), (2.0, 3.0)]:
        assert weighting([a, b], state=state).tolist() == [1.0, 1.0]
    expected = 2 * torch.softmax(torch.tensor([0.5, 0.75], dtype=F64) / 2, 0)
    torch.testing.assert_close(weighting([1.0, 1.0], state=state), expected, rtol=1e-15, atol=0)


def test_scale_of_one_task() -> None:
    """Where the docstring says invariant, c_i l_i does not change with the task's unit."""
    for name, options in [
        ("si", {}), ("gls", {}), ("stch", {"epoch": 2, "warmup": 1}), ("slaw", {"beta": 0.5}), ("famo", {}),
    ]:  # fmt: skip
        weighting = make(name, options)
        states = [weighting.fresh_state(3), weighting.fresh_state(3)]
        for t, (losses, _) in enumerate(sequence(12, tasks=3)):
            scaled = [losses[0] * 1000.0, *losses[1:]]
            a = weighting(losses, state=states[0]) * torch.tensor(losses, dtype=F64)
            b = weighting(scaled, state=states[1]) * torch.tensor(scaled, dtype=F64)
            if name in ("famo", "slaw", "gls"):  # invariant up to a common factor
                a, b = a / a.sum(), b / b.sum()
            if not (name == "slaw" and t == 0):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
            weighting.observe(losses, [loss * 0.9 for loss in losses], states[0])
            weighting.observe(scaled, [loss * 0.9 for loss in scaled], states[1])


EXTREME = st.floats(min_value=1e-300, max_value=1e300) | st.sampled_from([5e-324, 1.7e308, 1.0])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(EXTREME, min_size=3, max_size=3), min_size=1, max_size=6),
    st.lists(st.floats(0.0, 1e150) | st.just(0.0), min_size=3, max_size=3),
)
def test_positive_losses_of_any_size_give_finite_weights(steps: list[list[float]], norms: list[float]) -> None:
    for name, options in CASES:
        if name == "fixed" or options.get("min_losses"):
            continue
        weighting = make(name, options)
        state = weighting.fresh_state(3)
        for t, losses in enumerate(steps):
            c = weighting(losses, norms=norms, state=state, draw=t)
            weighting.observe(losses, [loss / 2 for loss in losses], state)
            assert torch.isfinite(c).all(), (name, options, c)
            assert (c >= 0).all(), (name, options, c)
            assert torch.isfinite(state).all(), (name, options, state)


@pytest.mark.parametrize("name", ["si", "gls", "stch", "imtl_l", "gradnorm", "go4align", "emtl", "famo"])
@pytest.mark.parametrize("bad", [0.0, -1.5])
def test_losses_that_must_be_positive(name: str, bad: float) -> None:
    weighting = make(name, {})
    state = weighting.fresh_state(3)
    weighting([1.0, 2.0, 3.0], norms=[1.0, 1.0, 1.0], state=state)
    before = state.clone()
    with pytest.raises(RuntimeError, match=r"losses: a loss is outside the range .* \(row 1, value"):
        weighting([1.0, bad, 2.0], norms=[1.0, 1.0, 1.0], state=state)
    assert torch.equal(before, state)


@pytest.mark.parametrize("name", ["uw", "slaw", "bmtl", "rlw"])
def test_losses_of_any_sign(name: str) -> None:
    weighting = make(name, {})
    state = weighting.fresh_state(3)
    for t in range(3):
        assert torch.isfinite(weighting([-1.0, 0.0, 2.0 + t], state=state)).all()


@pytest.mark.parametrize("name", NAMES)
def test_one_task_and_many(name: str) -> None:
    for tasks in (1, 2, 64):
        options = {"values": [1.0] * tasks} if name == "fixed" else {}
        weighting = make(name, options)
        state = weighting.fresh_state(tasks)
        for t in range(3):
            g = torch.Generator().manual_seed(t)
            losses = torch.rand(tasks, generator=g) + 0.1
            c = weighting(losses, norms=torch.ones(tasks), state=state, draw=t)
            assert c.shape == (tasks,)
            if name in ("dwa", "gradnorm", "slaw", "bmtl", "emtl", "fixed"):
                assert float(c.sum()) == pytest.approx(tasks)
            if name in ("rlw", "famo"):
                assert float(c.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_permutation(name: str, options: dict) -> None:
    if name in ("fixed", "rlw") or options.get("min_losses"):
        return
    order = [2, 0, 3, 1]
    a, b = make(name, options), make(name, options)
    sa, sb = a.fresh_state(4), b.fresh_state(4)
    for losses, norms in sequence(8):
        c = a(losses, norms=norms, state=sa)
        d = b([losses[i] for i in order], norms=[norms[i] for i in order], state=sb)
        torch.testing.assert_close(d, c[order], rtol=1e-12, atol=0)


def test_rlw_draws() -> None:
    rlw = make("rlw", {"seed": 7})
    first, second = rlw([1.0] * 5, draw=3), rlw([1.0] * 5, draw=4)
    assert torch.equal(first, rlw([1.0] * 5, draw=3))
    assert not torch.equal(first, second)
    logits = torch.cat([rlw([1.0] * 64, draw=t).log() for t in range(100)]).view(100, 64)
    z = logits - logits.mean(1, keepdim=True)
    assert abs(float(z.std()) - 1) < 0.03
    assert abs(float((z**4).mean() / z.var() ** 2) - 3) < 0.25  # a normal distribution's kurtosis


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: flatmtl.UW(lr=0.0), "UW: lr is 0.0; it must be positive and finite"),
        (lambda: flatmtl.DWA(epoch=0), "DWA: epoch is 0; it must be an integer, at least 1"),
        (lambda: flatmtl.DWA(epoch=2.5), "DWA: epoch is 2.5"),
        (lambda: flatmtl.STCH(warmup=-1), "STCH: warmup is -1"),
        (lambda: flatmtl.SLAW(beta=1.0), r"SLAW: beta is 1.0; it must be in \[0, 1\)"),
        (lambda: flatmtl.FAMO(min_losses=[0.0, math.inf]), r"FAMO: min_losses\[1\] is inf"),
        (lambda: flatmtl.FixedWeights([1.0, -1.0]), r"FixedWeights: values\[1\] is -1.0; it must be >= 0"),
        (lambda: flatmtl.RLW(seed=-1), "seed is -1"),
        (lambda: flatmtl.BMTL(temperature=math.nan), "BMTL: temperature is nan"),
        (lambda: get_weighting("gradnom"), "there is no weighting 'gradnom'. Did you mean 'gradnorm'?"),
        (lambda: flatmtl.FixedWeights([1.0, 2.0])([1.0, 1.0, 1.0]), "FixedWeights has 2 values for 3 tasks"),
    ],
)
def test_wrong_options(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options()


def test_wrong_calls() -> None:
    with pytest.raises(TypeError, match="no option 'epochs'; its options are 'temperature', 'epoch'"):
        get_weighting("dwa", epochs=3)
    with pytest.raises(TypeError, match="weighting 'gradnorm' needs norms="):
        make("gradnorm", {})([1.0])
    with pytest.raises(RuntimeError, match=r"state has shape \(3,\); expected \(8,\)"):
        make("uw", {})([1.0, 2.0], state=torch.zeros(3, dtype=F64))
    with pytest.raises(RuntimeError, match=r"losses: Inf or NaN \(row 1"):
        make("uw", {})([1.0, math.nan])


def scripted(losses: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    c = flatmtl.script.loss_weights(losses, "famo", [], state)
    flatmtl.script.loss_observe(losses, losses * 0.5, "famo", [], state)
    return c


@pytest.mark.parametrize("compile_", [lambda f: f, torch.jit.script], ids=["eager", "script"])
def test_script(compile_) -> None:
    function, weighting = compile_(scripted), flatmtl.FAMO()
    state, expected_state = flatmtl.script.loss_state("famo", 3), weighting.fresh_state(3)
    losses = torch.tensor([1.0, 2.0, 5.0])
    for _ in range(3):
        c = function(losses, state)
        assert torch.equal(c, weighting(losses, state=expected_state))
        weighting.observe(losses, losses * 0.5, expected_state)
        assert torch.equal(state, expected_state)


def test_script_knows_every_weighting() -> None:
    for name, number in flatmtl._ops.WEIGHTINGS.items():
        assert flatmtl.script.weighting_number(name) == number
        assert (
            flatmtl.script.loss_state(name, 3).shape
            == get_weighting(name, **OPTIONS.get(name, [{}])[0]).fresh_state(3).shape
        )


def test_opcheck() -> None:
    losses, after = torch.rand(3, dtype=F64) + 1, torch.rand(3, dtype=F64) + 1
    for name in ("famo", "gradnorm", "si"):
        weighting = make(name, {})
        arguments = (weighting.number, weighting.option_values(3), weighting.fresh_state(3))
        torch.library.opcheck(torch.ops.flatmtl.loss_weights.default, (losses, after, *arguments))
        torch.library.opcheck(torch.ops.flatmtl.loss_observe.default, (losses, after, *arguments))
