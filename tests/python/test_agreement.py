"""The C path against the reference, two independent implementations: weights, then whole trainings, in f64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import flatmtl
import pytest
import torch
from flatmtl import reference
from models import batch, closure_of, two_heads, values
from torch import Tensor

F64 = torch.float64
OPTIONS: dict[str, list[dict]] = {
    "cagrad": [{}, {"c": 0.0}, {"c": 0.1}, {"c": 0.9}],
    "fairgrad": [{}, {"alpha": 0.5}, {"alpha": 1.0}, {"alpha": 5.0}],
    "pcgrad": [{}, {"seed": 123456789}],
    "gradvac": [{}, {"seed": 123456789, "beta": 0.5}],
    "aligned_mtl": [{}, {"scale": "median"}, {"scale": "rmse"}],
    "ntkmtl": [{}, {"exponent": 0.75}, {"exponent": 1}],
}
METHODS = list(reference.METHODS)


def summands(weights: Tensor, gramian: Tensor) -> Tensor:
    """Lengths of the w_i g_i, signed: what the weights mean whatever the lengths of the rows."""
    return weights * gramian.diagonal().sqrt()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("spread", [0, 8])
@pytest.mark.parametrize("tasks", range(1, 13))
@pytest.mark.parametrize("name", METHODS)
def test_weights(name: str, tasks: int, spread: float) -> None:
    for seed in range(8):
        g = torch.Generator().manual_seed(100 * tasks + seed)
        rows = torch.randn(tasks, tasks + 5, generator=g, dtype=F64)
        rows = rows * 10 ** (spread * (torch.rand(tasks, 1, generator=g, dtype=F64) - 0.5))
        gramian = rows @ rows.T
        for options in OPTIONS.get(name, [{}]):
            if name == "fixed":
                options = {"values": [float(i) - 1 for i in range(tasks)]}
            if name in ("upgrad", "dualproj") and seed % 2:
                options = {"preference": [1.0 + i % 3 for i in range(tasks)]}
            ours = summands(flatmtl.weights(gramian, name, draw=seed, **options), gramian)
            theirs = summands(reference.weights(gramian, name, draw=seed, **options), gramian)
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * float(theirs.abs().max()))


def test_weights_of_odd_families() -> None:
    """Zero, duplicate and antipodal rows, a vanishing sum: the update agrees, and zeros where there is no solution."""
    families = [
        [[0.0, 0.0], [1.0, 2.0]], [[0.0, 0.0], [0.0, 0.0], [3.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]],
        [[1.0, 2.0], [1.0, 2.0]], [[1.0, 2.0], [2.0, 4.0], [1.0, -1.0]], [[1.0, 2.0], [-1.0, -2.0]],
        [[1.0, 0.3], [-0.2, 1.0], [-0.8, -1.3]], [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5], [0.3, 0.3]],
    ]  # fmt: skip
    for family, name in itertools.product(families, METHODS):
        if name == "fixed":
            continue
        rows = torch.tensor(family, dtype=F64)
        ours, theirs = flatmtl.weights(rows @ rows.T, name), reference.weights(rows @ rows.T, name)
        assert bool((ours == 0).all()) == bool((theirs == 0).all()), (family, name)
        torch.testing.assert_close(
            ours @ rows,
            theirs @ rows,
            rtol=1e-9,
            atol=1e-12,
            msg=f"{family} {name}: {ours.tolist()} {theirs.tolist()}",
        )


def train(cls: type, tasks: int, **settings: object) -> list[Tensor]:
    model = two_heads(tasks=tasks, norm=True)
    optimizer = cls(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), **settings)
    for i in range(4):
        optimizer.step(closure_of(model, *batch(i, tasks=tasks)))
    return values(model)


def assert_same_training(name: str, tasks: int, **settings: object) -> None:
    theirs_options = {"values": [0.5, 2.0, 1.0][:tasks]} if name == "fixed" else None
    ours_object = flatmtl.Fixed([0.5, 2.0, 1.0][:tasks]) if name == "fixed" else name
    ours = train(flatmtl.FlatMTL, tasks, aggregator=ours_object, seed=7, **settings)
    theirs = train(reference.FlatMTL, tasks, aggregator=name, options=theirs_options, seed=7, **settings)
    start = values(two_heads(tasks=tasks, norm=True))
    moved = torch.cat([(a - b).flatten() for a, b in zip(theirs, start, strict=True)])
    difference = torch.cat([(a - b).flatten() for a, b in zip(ours, theirs, strict=True)])
    assert moved.norm() > 1e-3
    assert difference.norm() <= 1e-10 * moved.norm()


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("norm", ["separate", "joint"])
@pytest.mark.parametrize("combine", ["decomposed", "direct", "second", "each"])
@pytest.mark.parametrize("name", METHODS)
def test_trainings(name: str, combine: str, norm: str, adaptive: bool) -> None:
    assert_same_training(
        name, 3, combine=combine, norm=norm, adaptive=adaptive, eta=0.01 if adaptive else 0.0, rho=(0.05, 0.1)
    )


@pytest.mark.parametrize("name", METHODS)
def test_trainings_of_raw_methods(name: str) -> None:
    assert_same_training(name, 3, family_scale=None, rho=0.5)


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("rho", [0.0, 0.1])
@pytest.mark.parametrize("name", METHODS)
def test_trainings_of_few_tasks(name: str, rho: float, tasks: int) -> None:
    assert_same_training(name, tasks, rho=rho)
