"""The table "Aggregators on the Gramian" of docs/methods.md, every entry held against the code."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import flatmtl
import pytest
import torch
from flatmtl import _ops
from flatmtl.aggregators import AGGREGATORS
from torch import Tensor

F64 = torch.float64
DOCS = Path(__file__).parents[2] / "docs/methods.md"
SAMPLES = 300


def table() -> dict[str, dict[str, str]]:
    section = DOCS.read_text().split("## Aggregators on the Gramian")[1].split("\n## ")[0]
    lines = [line.strip().strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    header = [cell.strip() for cell in lines[0]]
    rows = [dict(zip(header, (cell.strip() for cell in line), strict=True)) for line in lines[2:]]
    return {row["name"].strip("`"): row for row in rows}


TABLE = table()


def update(rows: Tensor, name: str, draw: int = 0) -> Tensor:
    options = {"values": [1.0 + i for i in range(len(rows))]} if name == "fixed" else {}
    state = AGGREGATORS[name](**options).new_state(len(rows))
    if state is not None:  # targets as they may come to be
        state.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(draw))
    result = flatmtl.aggregate(rows, name, draw=draw, state=state, **options)
    assert isinstance(result, Tensor)
    return result


def families(tasks: int | None = None, full_rank: bool = False) -> list[Tensor]:
    """Random rows with conflicts: few dimensions, lengths apart, some almost opposite."""
    found = []
    for seed in range(SAMPLES):
        g = torch.Generator().manual_seed(seed)
        k = tasks or 2 + seed % 4
        size = k + seed % 3 if full_rank else 1 + seed % (k + 2)
        rows = torch.randn(k, size, generator=g, dtype=F64) + 0.5 * (seed % 2)
        found.append(rows * 10 ** (2 * torch.rand(k, 1, generator=g, dtype=F64) - 1))
    return found


def least_product(rows: Tensor, name: str, draw: int) -> float:
    """The least <update, g_i>, relative to the size of its terms."""
    weights = update(rows, name, draw)
    gramian = rows @ rows.T
    products = rows @ weights
    size = gramian.abs().sum(1) * max(1.0, float(weights.norm() / rows.norm(dim=1).min()))
    return float((products / size).min())


def test_the_table_names_every_method() -> None:
    assert set(TABLE) == set(_ops.METHODS)
    for name, row in TABLE.items():
        assert re.match(r"`(\w+)", row["class"])[1] == AGGREGATORS[name].__name__  # type: ignore[index]
        assert (row["state"] == "yes") == (_ops.state_size(_ops.METHODS[name], 3) > 0)


@pytest.mark.parametrize("name", TABLE)
def test_degree(name: str) -> None:
    degree = float(Fraction(TABLE[name]["degree"]))
    for seed, rows in enumerate(families(full_rank=True)[:40]):
        expected = update(rows, name, seed)
        for scale in (1e-30, 1e-3, 7.0, 1e30):
            found = update(scale * rows, name, seed)
            assert (found / scale**degree - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize("name", TABLE)
def test_invariant(name: str) -> None:
    same_line, same_direction, same_update = True, True, True
    for seed, rows in enumerate(families(full_rank=True)):
        scaled = rows.clone()
        scaled[seed % len(rows)] *= 37.0
        a, b = update(rows, name, seed), update(scaled, name, seed)
        if a.norm() <= 1e-9 * rows.norm() or b.norm() <= 1e-9 * rows.norm():
            continue
        turn = float((a / a.norm() - b / b.norm()).norm())
        same_direction &= turn <= 1e-7
        same_line &= turn <= 1e-7 or turn >= 2 - 1e-7
        same_update &= bool((a - b).norm() <= 1e-7 * a.norm())
    found = "update" if same_update else "direction" if same_direction else "up to sign" if same_line else "no"
    assert found == TABLE[name]["invariant"]


@pytest.mark.parametrize("name", TABLE)
def test_non_conflicting(name: str) -> None:
    def holds(sample: list[Tensor]) -> bool:
        return all(least_product(rows, name, seed) >= -1e-9 for seed, rows in enumerate(sample))

    if holds(families()):
        found = "yes"
    elif holds(families(full_rank=True)):
        found = "full rank"
    else:
        found = "two" if holds(families(tasks=2)) else "no"
    assert found == TABLE[name]["non-conflicting"]


@pytest.mark.parametrize("name", [n for n in TABLE if n not in ("fixed", "pcgrad", "gradvac")])
def test_permuting_the_tasks_permutes_the_update(name: str) -> None:
    for seed, rows in enumerate(families(full_rank=True)[:60]):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        expected = update(rows, name)
        assert (update(rows[order], name) - expected).norm() <= 1e-8 * max(expected.norm(), 1e-6 * rows.norm())


# -- torchjd ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "aligned_mtl", "config", "gradvac"])
def test_against_torchjd(name: str) -> None:
    jd, linalg = pytest.importorskip("torchjd.aggregation"), pytest.importorskip("torchjd.linalg")
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        tasks = 2 if name == "gradvac" else 2 + seed % 5  # two tasks: there is nothing to draw
        rows = torch.randn(tasks, 9, generator=g, dtype=F64) * 10 ** torch.rand(tasks, 1, generator=g, dtype=F64)
        factor, options, tolerance = 1.0, {}, 1e-9
        if name == "upgrad":
            theirs, tolerance = jd.UPGrad(projector=linalg.QuadprogProjector(norm_eps=0.0, reg_eps=1e-12)), 1e-6
        elif name == "dualproj":
            theirs, tolerance = jd.DualProj(projector=linalg.QuadprogProjector(norm_eps=0.0, reg_eps=1e-12)), 1e-6
        elif name == "aligned_mtl":
            scale = ["min", "median", "rmse"][seed % 3]
            theirs, factor, options = jd.AlignedMTL(scale_mode=scale), tasks, {"scale": scale}
        elif name == "config":
            theirs = jd.ConFIG()
        else:
            theirs, options = jd.GradVac(beta=0.25, eps=0.0), {"beta": 0.25}
        ours = AGGREGATORS[name](**options)
        state = ours.new_state(tasks)
        for _ in range(2):  # the second time from the targets of the first
            expected = factor * theirs(rows)
            found = ours(rows, state=state)
            assert (found - expected).norm() <= tolerance * expected.norm()
