"""examples/deploy: trained in Python, fine-tuned in C++ without Python, the same bits as the fine-tuning in Python."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import flatmtl
import pytest
import torch

pytest.importorskip("sklearn")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "deploy"


def run(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def accuracies(text):
    return [float(found) for found in re.findall(r"([\d.]+) % (?:left|right)", text)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_fine_tuning_without_python(tmp_path):
    run(sys.executable, EXAMPLE / "train.py", tmp_path, 3)
    prefixes = f"{flatmtl.cmake_prefix_path};{torch.utils.cmake_prefix_path}"
    run("cmake", "-S", EXAMPLE, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefixes}")
    run("cmake", "--build", tmp_path / "build")
    tuned = run(tmp_path / "build" / "finetune", tmp_path)
    before, after = accuracies(tuned)[:2], accuracies(tuned)[2:]
    assert all(b < a - 20 for b, a in zip(before, after, strict=True))  # it learns
    checked = run(sys.executable, EXAMPLE / "check.py", tmp_path)
    assert "nothing, bit for bit" in checked
    assert accuracies(checked) == after
    losses = re.findall(r"step .*", tuned)
    assert len(losses) == 5
    assert re.findall(r"step .*", checked) == losses
    needed = run("ldd", tmp_path / "build" / "finetune")
    assert "libtorch_cpu" in needed
    assert "python" not in re.sub(r"\S*site-packages\S*", "", needed)
