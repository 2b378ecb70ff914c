"""Accelerate, Lightning and the Trainer in two processes with gloo: as one process with the whole batch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import framework_checks as checks
import pytest
import ranks


def needs(name: str) -> None:
    """Skips where it is not installed; imports nothing in this process."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}")


def test_accelerate(two: ranks.RankPool, tmp_path: Path) -> None:
    needs("accelerate")
    two(checks.accelerate_loop, 1, str(tmp_path / "1"))
    two(checks.accelerate_loop, 2, str(tmp_path / "2"))


def test_accelerate_with_fsdp(two: ranks.RankPool) -> None:
    needs("accelerate")
    two(checks.accelerate_fsdp)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ddp", "accumulated", "manual", "fsdp"])
def test_lightning(two: ranks.RankPool, form: str, tmp_path: Path) -> None:
    needs("lightning")
    two(checks.lightning_fit, form, str(tmp_path))


@pytest.mark.slow
def test_trainer_with_fsdp(two: ranks.RankPool, tmp_path: Path) -> None:
    needs("transformers")
    two(checks.trainer_fsdp, str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("micro", [1, 2])
def test_trainer(two: ranks.RankPool, micro: int, tmp_path: Path) -> None:
    needs("transformers")
    two(checks.trainer_run, micro, str(tmp_path))
