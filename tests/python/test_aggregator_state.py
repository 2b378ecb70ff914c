"""State of aggregators that learn from step to step: in the functions, in FlatMTL, in its checkpoints."""

from __future__ import annotations

import copy
import io

import flatmtl
import pytest
import torch
from models import batch, closure_of, equal, two_heads, values
from torch import Tensor
from torch.optim import SGD

F64 = torch.float64
COMBINATIONS = ["decomposed", "direct", "second", "each"]
TASKS = 4


def optimizer_of(model: torch.nn.Module, **options: object) -> flatmtl.FlatMTL:
    options = {"aggregator": flatmtl.GradVac(beta=0.5), "seed": 3, "rho": 0.2} | options
    return flatmtl.FlatMTL(SGD(model.parameters(), lr=0.3, momentum=0.9), **options)  # type: ignore[arg-type]


def step(optimizer: flatmtl.FlatMTL, model: torch.nn.Module, seed: int, absent: tuple[int, ...] = ()) -> None:
    def closure() -> list[Tensor | None]:
        losses: list[Tensor | None] = list(closure_of(model, *batch(seed, tasks=TASKS))())
        for i in absent:
            losses[i] = None
        return losses

    optimizer.step(closure)


def flat_state(optimizer: flatmtl.FlatMTL) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in optimizer.states["aggregator"].items() if k != "name"}


# -- functions --------------------------------------------------------------------------------------------------------


def test_functions_keep_the_state_they_are_given() -> None:
    rows = torch.randn(3, 7, dtype=F64, generator=torch.Generator().manual_seed(1))
    gradvac = flatmtl.GradVac(beta=0.25)
    assert gradvac.state_size(3) == 9
    state = gradvac.new_state(3)
    assert state is not None
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows, dim=2)
    gramian = flatmtl.gramian(rows)
    first = flatmtl.weights(gramian, gradvac, state=state)
    # For two tasks what is seen is the cosine itself; for more, that of gradients already turned.
    two = gradvac.new_state(2)
    flatmtl.weights(gramian[:2, :2], gradvac, state=two)
    torch.testing.assert_close(two, 0.25 * cosines[:2, :2].fill_diagonal_(0).flatten())
    second = flatmtl.weights(gramian, gradvac, state=state)
    assert not torch.equal(first, second)
    assert torch.equal(flatmtl.weights(gramian, gradvac), first)  # without a state every call is the first
    again = gradvac.new_state(3)
    updates = [flatmtl.aggregate(rows, gradvac, state=again) for _ in range(2)]
    torch.testing.assert_close(updates[1], second @ rows)
    assert torch.equal(state, again)
    assert torch.equal(gradvac(rows, state=gradvac.new_state(3)), updates[0])
    assert flatmtl.MGDA().new_state(3) is None


def test_state_that_does_not_fit_is_refused_and_left_alone() -> None:
    gramian = torch.eye(2, dtype=F64)
    with pytest.raises(ValueError, match="mgda has no state"):
        flatmtl.weights(gramian, "mgda", state=torch.zeros(4, dtype=F64))
    for bad in (torch.zeros(3, dtype=F64), torch.zeros(4), torch.zeros(2, 2, dtype=F64)):
        with pytest.raises(ValueError, match=r"gradvac needs a torch.float64 one of shape \(4,\)"):
            flatmtl.weights(gramian, "gradvac", state=bad)
    state = torch.tensor([0.0, 0.5, 1.5, 0.0], dtype=F64)
    with pytest.raises(RuntimeError, match=r"state.*1\.5"):
        flatmtl.weights(gramian, "gradvac", state=state)
    state = torch.full((4,), 0.5, dtype=F64)
    with pytest.raises(RuntimeError, match="row 1"):
        flatmtl.weights(torch.tensor([[1.0, 0], [torch.nan, 1]]), "gradvac", state=state)
    assert state.tolist() == [0.5] * 4


# -- the optimizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_checkpoint_resumes_bit_equal(combine: str) -> None:
    whole = two_heads(tasks=TASKS)
    optimizer = optimizer_of(whole, combine=combine)
    for seed in range(6):
        step(optimizer, whole, seed, absent=(seed % 4,) if seed % 2 else ())

    model = two_heads(tasks=TASKS)
    optimizer = optimizer_of(model, combine=combine)
    for seed in range(3):
        step(optimizer, model, seed, absent=(seed % 4,) if seed % 2 else ())
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = two_heads(seed=9, tasks=TASKS)
    optimizer = optimizer_of(model, combine=combine)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    forgetful = copy.deepcopy((model, optimizer))
    forgetful[1].states = {}
    for seed in range(3, 6):
        step(optimizer, model, seed, absent=(seed % 4,) if seed % 2 else ())
        step(forgetful[1], forgetful[0], seed, absent=(seed % 4,) if seed % 2 else ())
    assert equal(values(whole), values(model))
    assert not equal(values(whole), values(forgetful[0]))  # the state matters


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_entries_of_absent_tasks_stay(combine: str) -> None:
    model = two_heads(tasks=TASKS)
    optimizer = optimizer_of(model, combine=combine)
    step(optimizer, model, 0)
    before = flat_state(optimizer)
    assert set(before) == {"each": {"pairs", "loss"}, "direct": {"loss"}, "second": {"loss", "flat", "both"}}.get(
        combine, {"loss", "flat"}
    )
    step(optimizer, model, 1, absent=(1, 2))
    after = flat_state(optimizer)
    for call, old in before.items():
        changed = after[call] != old
        if call == "both":
            assert changed.any()
        elif call == "pairs":
            assert changed.flatten(1).any(1).tolist() == [True, False, False, True]
        else:
            off_diagonal = torch.tensor([[i != j and {i, j} <= {0, 3} for j in range(TASKS)] for i in range(TASKS)])
            assert torch.equal(changed[0], off_diagonal)


def test_families_are_apart_and_rho_zero_uses_the_loss_family_alone() -> None:
    model = two_heads(tasks=TASKS)
    optimizer = optimizer_of(model)
    step(optimizer, model, 0)
    both = flat_state(optimizer)
    assert not torch.equal(both["loss"], both["flat"])
    optimizer.param_groups[0]["rho"] = 0.0
    step(optimizer, model, 1)
    after = flat_state(optimizer)
    assert torch.equal(after["flat"], both["flat"])
    assert not torch.equal(after["loss"], both["loss"])


def test_a_step_that_fails_leaves_the_state() -> None:
    model = two_heads(tasks=TASKS)
    optimizer = optimizer_of(model)
    step(optimizer, model, 0)
    before = flat_state(optimizer)
    saved = optimizer.state_dict()["flatmtl"]["states"]["aggregator"]

    def closure() -> list[Tensor]:
        losses = closure_of(model, *batch(1, tasks=TASKS))()
        losses[2] = losses[2] * torch.inf
        return losses

    with pytest.raises(flatmtl.NonFiniteError):
        optimizer.step(closure)
    assert all(torch.equal(v, before[k]) for k, v in flat_state(optimizer).items())
    step(optimizer, model, 1)
    assert torch.equal(saved["loss"], before["loss"])  # a checkpoint is a copy


@pytest.mark.parametrize("spoil", [
    lambda s: s.update(loss=torch.zeros(1, 3, 3, dtype=F64)),
    lambda s: s.update(flat=torch.full((1, TASKS, TASKS), 2.0, dtype=F64)),
    lambda s: s.update(flat=torch.full((1, TASKS, TASKS), torch.nan, dtype=F64)),
    lambda s: s.update(flat=[1.0]),
    lambda s: s.update(name="mgda"),
], ids=["shape", "range", "nan", "type", "method"])  # fmt: skip
def test_bad_state_in_a_checkpoint_is_refused(spoil: object) -> None:
    model = two_heads(tasks=TASKS)
    optimizer = optimizer_of(model)
    step(optimizer, model, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    spoil(saved["flatmtl"]["states"]["aggregator"])  # type: ignore[operator]
    before = flat_state(optimizer)
    with pytest.raises(ValueError, match="state"):
        optimizer.load_state_dict(saved)
    assert all(torch.equal(v, before[k]) for k, v in flat_state(optimizer).items())


# -- torch's machinery ------------------------------------------------------------------------------------------------


def test_opcheck_and_compile_with_a_state() -> None:
    from flatmtl import _ops

    ops, number = torch.ops.flatmtl, _ops.METHODS["gradvac"]
    rows = torch.randn(6, 9, dtype=F64, generator=torch.Generator().manual_seed(2))
    pair = rows @ rows.T
    gramian = pair[:3, :3].contiguous()
    torch.library.opcheck(ops.weights_.default, (gramian, number, [], torch.zeros(9, dtype=F64)))
    torch.library.opcheck(ops.step_weights_.default, (pair, None, number, [], 0, 1, torch.zeros(18, dtype=F64)))

    def twice(state: Tensor) -> Tensor:
        ops.weights_(gramian, number, [0.5, 0.0, 0.0], state)
        return ops.weights_(gramian, number, [0.5, 0.0, 1.0], state) + state.sum()

    eager, compiled = torch.zeros(9, dtype=F64), torch.zeros(9, dtype=F64)
    expected = twice(eager)
    torch._dynamo.reset()
    result = torch.compile(twice, fullgraph=True, backend="aot_eager")(compiled)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert torch.equal(eager, compiled)
    with pytest.raises(RuntimeError, match=r"flatmtl::step_weights: state has shape \(9,\); expected \(18,\)"):
        ops.step_weights_(pair, None, number, [], 0, 1, torch.zeros(9, dtype=F64))
    with pytest.raises(RuntimeError, match=r"flatmtl::weights: state has shape \(9,\); expected \(0,\)"):
        ops.weights_(gramian, _ops.METHODS["mgda"], [], torch.zeros(9, dtype=F64))
