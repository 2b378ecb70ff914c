"""The torchrun example: a worker is killed, torchrun starts all again, and the result is that of an undisturbed run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "distributed" / "train.py"


def torchrun(out: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1",
               "--monitor-interval=0.1", str(SCRIPT), "--out", str(out), "--epochs", "3", "--pictures", "256",
               *arguments]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_goes_on_after_a_worker_is_killed(tmp_path: Path) -> None:
    undisturbed = torchrun(tmp_path / "undisturbed")
    killed = torchrun(tmp_path / "killed", "--kill-at", "6")  # in the second of three epochs of four steps
    assert undisturbed.count("start from") == 1
    assert re.findall(r"start from epoch (\d)", killed) == ["0", "1"]
    digests = [re.search(r"parameters: (\w+)", text) for text in (undisturbed, killed)]
    assert all(digests)
    assert digests[0][1] == digests[1][1]  # type: ignore[index]
