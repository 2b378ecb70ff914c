"""A scripted training in a C++ program without Python: the same bits as in Python."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from flatmtl import _ops
from models import equal, values
from torch import Tensor, nn
from trainer import batches, make_trainer

SOURCE = Path(__file__).resolve().parents[1] / "libtorch"

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")


class Batches(nn.Module):
    """Data for a program that reads TorchScript."""

    def __init__(self, data: list[tuple[Tensor, list[Tensor]]]) -> None:
        super().__init__()
        self.inputs = [x for x, _ in data]
        self.targets = [y for _, y in data]

    @torch.jit.export
    def x(self, i: int) -> Tensor:
        return self.inputs[i]

    @torch.jit.export
    def y(self, i: int) -> list[Tensor]:
        return self.targets[i]


def run(*command, ok=True):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout if ok else done.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    build = tmp_path_factory.mktemp("libtorch")
    run("cmake", "-S", SOURCE, "-B", build, f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}")
    run("cmake", "--build", build, "--target", "train")
    return build / "train"


@pytest.mark.parametrize(
    ("kind", "options"), [("SGD", {"lr": 0.1, "momentum": 0.9}), ("Adam", {"lr": 0.01, "aggregator": "pcgrad"})]
)
def test_training_without_python(program, tmp_path, kind, options):
    data = batches(6)
    torch.jit.script(Batches(data)).save(tmp_path / "batches.pt")
    torch.jit.script(make_trainer(kind, **options)).save(tmp_path / "trainer.pt")
    printed = run(program, _ops.LIBRARY_PATH, tmp_path / "trainer.pt", tmp_path / "batches.pt", 6, tmp_path / "out.pt")

    expected = torch.jit.load(tmp_path / "trainer.pt")
    losses = [expected.train_step(x, y) for x, y in data]
    assert [[float(v) for v in line.split()] for line in printed.splitlines()] == [
        [pytest.approx(float(v), rel=1e-8) for v in pair] for pair in losses
    ]
    trained = torch.jit.load(tmp_path / "out.pt")
    assert equal(list(trained.state_dict().values()), list(expected.state_dict().values()))
    assert not equal(values(trained), values(torch.jit.load(tmp_path / "trainer.pt")))
    trained.train_step(*data[0])  # goes on
    assert trained.optimizer.steps == 7


def test_without_the_ops_the_error_names_them(program, tmp_path):
    torch.jit.script(make_trainer()).save(tmp_path / "trainer.pt")
    libc = "libc.so.6"  # loads, but registers nothing
    text = run(program, libc, tmp_path / "trainer.pt", tmp_path / "none.pt", 1, tmp_path / "out.pt", ok=False)
    assert "Unknown builtin op: flatmtl::" in text
