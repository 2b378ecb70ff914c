"""`python -m flatmtl compare`: the table, the JSON, the memory, and the refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from flatmtl import _authors, reference
from flatmtl.__main__ import app
from typer.testing import CliRunner

SMALL = ["compare", "--tasks=3", "--width=16", "--depth=2", "--batch=8", "--steps=3", "--threads=1", "--dtype=float64"]


def test_table_and_json(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    file = tmp_path / "record.json"
    result = CliRunner().invoke(app, [*SMALL, "--authors-solvers", "--json", str(file)], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    for text in ("flatmtl (C)", "reference (PyTorch)", "authors' solver", "forward/backward", "quartiles", "memory"):
        assert text in result.output
    record = json.loads(file.read_text())
    assert record["parameters"] == 2 * (16 * 16 + 16) + 3 * (16 * 10 + 10)
    assert record["threads"] == 1
    contenders = record["contenders"]
    assert set(contenders) == {"flatmtl", "reference", "authors' solver", "forward/backward alone"}
    for entry in contenders.values():
        assert len(entry["times"]) == 3
        assert 0 < entry["lower"] <= entry["median"] <= entry["upper"]
        assert entry["peak"] is None or entry["peak"] >= 0
    assert contenders["reference"]["difference"] == 0
    assert contenders["flatmtl"]["difference"] <= 1e-11 * record["scale"]
    assert contenders["authors' solver"]["difference"] <= 1e-3 * record["scale"]


def test_memory_of_a_large_allocation_shows() -> None:
    from flatmtl import _compare

    before = _compare._resident()
    if before is None:
        pytest.skip("no /proc")
    assert _compare._resident_peak_of(lambda: torch.ones(8_000_000)) >= before + 30_000_000


@pytest.mark.parametrize("options", [["--aggregator=fixed"], ["--tasks=0"], ["--aggregator=sum", "--authors-solvers"]])
def test_refusals(options: list[str]) -> None:
    result = CliRunner().invoke(app, [*SMALL, *options])
    assert result.exit_code == 2


def test_missing_packages_are_named() -> None:
    code = "import sys; sys.modules['typer'] = None; import flatmtl.__main__"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "pip install 'flatmtl[cli]'" in result.stderr


@pytest.mark.parametrize(("name", "tolerance"), [("cagrad", 1e-2), ("imtl_g", 1e-9), ("fairgrad", 1e-3), ("mgda", 0.2)])
def test_authors_solvers_solve_the_same_problem(name: str, tolerance: float) -> None:
    if name in ("cagrad", "fairgrad"):
        pytest.importorskip("scipy")
    for seed in range(5):
        rows = torch.randn(3, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        exact = reference.aggregate(rows, name)
        theirs = _authors.solver(name)(rows @ rows.T) @ rows
        assert (theirs - exact).norm() <= tolerance * exact.norm()


def test_authors_nash_mtl() -> None:
    pytest.importorskip("cvxpy")
    rows = torch.randn(3, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = _authors.solver("nash_mtl")(rows @ rows.T)
    torch.testing.assert_close(theirs, reference.weights(rows @ rows.T, "nash_mtl"), rtol=1e-2, atol=0)
