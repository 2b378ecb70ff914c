"""Ops of buffer methods and of loss weightings: a wrong argument is named, and nothing has changed then."""

from __future__ import annotations

from collections.abc import Callable

import flatmtl  # noqa: F401  loads the ops
import pytest
import torch
from torch import Tensor

ops = torch.ops.flatmtl
MOCO, DB_MTL, EXCESS, SDMGRAD = 1, 2, 3, 4
UW, SI, FAMO, GRADNORM = 1, 4, 8, 9


class World:
    """Valid arguments for two tasks with two tensors each."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.rows = [torch.randn(shape, generator=g) for _ in range(2) for shape in ((2, 3), (4,))]
        self.perturbed = [torch.randn(row.shape, generator=g) for row in self.rows]
        self.memory = [torch.randn(row.shape, generator=g) for row in self.rows]
        self.out = [torch.zeros(2, 3), torch.zeros(4)]
        self.one = torch.ones(2, dtype=torch.float64)
        self.losses = torch.tensor([1.0, 2.0], dtype=torch.float64)
        self.state = torch.zeros(4, dtype=torch.float64)
        self.gramian = torch.eye(2, dtype=torch.float64)

    def everything(self) -> list[Tensor]:
        lists = (self.rows, self.perturbed, self.memory, self.out)
        return [t.clone() for ts in lists for t in ts] + [self.one.clone(), self.losses.clone(), self.state.clone()]

    def average(self, memory: list[Tensor] | None = None, rows: list[Tensor] | None = None, keep: Tensor | None = None,
                perturbed: list[Tensor] | None = None, a: Tensor | None = None) -> None:  # fmt: skip
        ops.moving_average_(
            self.memory if memory is None else memory, self.rows if rows is None else rows,
            self.perturbed if perturbed is None else perturbed, 2, self.one if a is None else a, self.one,
            self.one if keep is None else keep,
        )  # fmt: skip

    def update(self, method: int = MOCO, options: list[float] | None = None, state: Tensor | None = None,
               losses: Tensor | None = None, memory: list[Tensor] | None = None) -> None:  # fmt: skip
        ops.buffer_update(
            self.rows, 2, self.losses if losses is None else losses, method, options or [], 0,
            self.memory if memory is None else memory, self.state if state is None else state,
        )  # fmt: skip


NAN = torch.tensor([1.0, torch.nan], dtype=torch.float64)

CASES: dict[str, tuple[Callable[[World], object], str]] = {
    "rows of the average": (
        lambda w: w.average(rows=[*w.rows[:3], torch.ones(5)]),
        r"moving_average_: loss_rows\[1\]\[1\] has 5 elements, loss_rows\[0\]\[1\] has 4",
    ),
    "perturbed rows of the average": (
        lambda w: w.average(perturbed=w.perturbed[:2]),
        r"moving_average_: perturbed_rows has 2 tensors, but loss_rows has 2 a row: expected 2 rows of 2",
    ),
    "number of buffers": (lambda w: w.average(memory=w.memory[:3]), r"buffers has 3 tensors, which 2 tasks do not divide"),
    "shape of a buffer": (
        lambda w: w.average(memory=[t.reshape(-1) for t in w.memory]),
        r"buffers\[0\]\[0\] has another shape, or its elements in another order, than \[0\] of the rows",
    ),
    "dtype of the buffers": (
        lambda w: w.average(memory=[t.double() for t in w.memory]), r"buffers: the dtype is unknown or differs"
    ),
    "buffers among the rows": (
        lambda w: w.average(memory=w.rows), r"loss_rows: an output overlaps an input .*\(row 0, segment 0\)"
    ),
    "shape of keep": (lambda w: w.average(keep=w.one[:1]), r"keep has shape \(1,\); expected \(2,\)"),
    "dtype of keep": (lambda w: w.average(keep=w.one.float()), r"keep is float32; it must be float64"),
    "keep that is not finite": (lambda w: w.average(keep=NAN), r"keep: Inf or NaN \(row 1, value nan\)"),
    "a factor that is not finite": (lambda w: w.average(a=NAN), r"loss_factors: Inf or NaN \(row 1, value nan\)"),
    "excess": (
        lambda w: ops.excess_(w.memory, w.rows, [], 2, w.one, w.one[:1]),
        r"excess_: flat_factors has shape \(1,\); expected \(2,\)",
    ),
    "excess of no tasks": (lambda w: ops.excess_([], [], [], 0, w.one[:0], w.one[:0]), r"excess_: num_tasks is 0"),
    "cross_gramian": (
        lambda w: ops.cross_gramian(w.rows, [], w.memory[:2], [], 2, w.one, w.one),
        r"cross_gramian: other_loss_rows has 2 tensors, but loss_rows has 2 a row: expected 2 rows of 2",
    ),
    "seed of graddrop": (
        lambda w: ops.graddrop_(w.out, w.rows, [], 2, w.one, w.one, w.one, -1, 0, 0, 0),
        r"graddrop_: seed: .*value out of range \(value -1\)",
    ),
    "position of graddrop": (
        lambda w: ops.graddrop_(w.out, w.rows, [], 2, w.one, w.one, w.one, 0, 0, 0, -7),
        r"graddrop_: position: .*\(value -7\)",
    ),
    "out of graddrop": (
        lambda w: ops.graddrop_(w.rows[:2], w.rows, [], 2, w.one, w.one, w.one, 0, 0, 0, 0),
        r"graddrop_: loss_rows: an output overlaps",
    ),
    "weights of the buffers": (
        lambda w: ops.combine_buffers_(w.out, w.memory, 2, NAN), r"combine_buffers_: weights: Inf or NaN \(row 1"
    ),
    "out over weights": (
        lambda w: ops.combine_buffers_([w.one], [t.double() for t in (w.losses, w.one.clone())], 2, w.one),
        r"combine_buffers_: out: an output overlaps an input",
    ),
    "factors of no method": (
        lambda w: ops.buffer_factors(w.losses, w.one, w.state, 5, []), r"buffer_factors: method is 5; it must be between"
    ),
    "state of the factors": (
        lambda w: ops.buffer_factors(w.losses, w.one, w.state[:3], MOCO, []), r"state has shape \(3,\); expected \(4,\)"
    ),
    "a loss of db_mtl": (
        lambda w: ops.buffer_factors(w.losses - 1.0, w.one, w.state[:2], DB_MTL, []),
        r"losses: a loss is outside the range .*\(row 0, value 0\)",
    ),
    "weights of graddrop": (
        lambda w: ops.buffer_weights(w.one, w.state[:0], 0, []), r"buffer_weights: method: unknown method"
    ),
    "sums": (lambda w: ops.buffer_weights(w.one, w.state, MOCO, []), r"sums has shape \(2,\); expected \(2, 2\)"),
    "sums that are not finite": (
        lambda w: ops.buffer_weights(w.gramian * NAN, w.state, SDMGRAD, []), r"sums: Inf or NaN \(row 0"
    ),
    "options of an update": (lambda w: w.update(options=[0.5]), r"buffer_update: num_options: wrong number of options"),
    "update by sdmgrad": (lambda w: w.update(SDMGRAD), r"buffer_update: method: unknown method"),
    "state of an update": (lambda w: w.update(EXCESS), r"state has shape \(4,\); expected \(6,\)"),
    "state that is not finite": (
        lambda w: w.update(state=torch.tensor([0.0, 0.0, 0.5, torch.nan], dtype=torch.float64)),
        r"state: Inf or NaN \(row 3",
    ),
    "losses of an update": (lambda w: w.update(losses=-w.losses), r"losses: a loss is outside .*\(row 0, value -1\)"),
    "a loss too small": (
        lambda w: w.update(DB_MTL, losses=torch.tensor([1.0, 1e-300], dtype=torch.float64), state=w.state[:2]),
        r"rows: Inf or NaN \(row 1",
    ),
    "buffers of an update": (lambda w: w.update(memory=w.memory[:2]), r"buffers\[1\]\[0\] has 4 elements, buffers\[0\]\[0\] has 6"),
    "no weighting": (
        lambda w: ops.loss_weights(w.losses, None, 14, [], w.state), r"loss_weights: weighting is 14; it must be between"
    ),
    "no losses": (lambda w: ops.loss_weights(w.losses[:0], None, SI, [], w.state[:0]), r"loss_weights: num_tasks is 0"),
    "state of a weighting": (
        lambda w: ops.loss_weights(w.losses, None, UW, [], w.state), r"state has shape \(4,\); expected \(8,\)"
    ),
    "norms": (
        lambda w: ops.loss_weights(w.losses, None, GRADNORM, [], torch.zeros(10, dtype=torch.float64)),
        r"loss_weights: norms: is NULL",
    ),
    "a loss of 0": (
        lambda w: ops.loss_weights(w.losses - 2.0, None, SI, [], w.state[:0]), r"losses: a loss is outside .*\(row 0"
    ),
    "options of a weighting": (
        lambda w: ops.loss_weights(w.losses, None, UW, [-1.0, 0.0], torch.zeros(8, dtype=torch.float64)),
        r"loss_weights: options: .*\(value -1\)",
    ),
    "losses after": (
        lambda w: ops.loss_observe(w.losses, w.losses[:1], FAMO, [], torch.zeros(8, dtype=torch.float64)),
        r"loss_observe: losses_after has shape \(1,\); expected \(2,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_named(name):
    call, text = CASES[name]
    world = World()
    before = world.everything()
    with pytest.raises(RuntimeError, match=text):
        call(world)
    assert all(torch.equal(a, b) for a, b in zip(before, world.everything(), strict=True))
