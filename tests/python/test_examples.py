"""The examples, run as their users run them, on tiny settings."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import flatmtl
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"

for module in ("matplotlib", "rich", "scipy", "sklearn", "typer"):
    pytest.importorskip(module)


def load(name):
    sys.path.insert(0, str(EXAMPLES))  # the examples import each other as scripts do
    try:
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


def run(*command, expect=0):
    """Runs a command and returns what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_compose_places_one_image_in_each_corner():
    left, right = np.full((1, 2, 2), 5, np.uint8), np.full((1, 2, 2), 7, np.uint8)
    picture = load("pictures").compose(left, right, 3)[0]
    assert picture.tolist() == [[5, 5, 0], [5, 7, 7], [0, 7, 7]]


def test_demo_never_tests_on_a_digit_it_trained_on():
    demo = load("demo")
    data = demo.load_data(3, 100)
    assert data.train_sources.isdisjoint(data.test_sources)
    assert len(data.train_sources | data.test_sources) == 1797
    # The pictures are made of the digits they claim: the free 2 rows and columns show each digit alone.
    digits = demo.load_digits().images / 16
    for x, sources in ((data.train_x, data.train_sources), (data.test_x, data.test_sources)):
        edges = {digits[i, :2].astype(np.float32).tobytes() for i in sources}
        assert all(picture[0, :2, :8].numpy().tobytes() in edges for picture in x[:50])


def test_demo_gain_says_tie_where_the_interval_holds_zero():
    gain = load("demo").gain
    assert gain([1.0, 2.0, 3.0], [2.0, 2.0, 3.0]).endswith("tie")
    assert gain([1.0, 2.0, 3.0], [2.0, 3.1, 4.0]).startswith("+1.03 [")
    assert "tie" not in gain([1.0, 2.0, 3.0], [2.0, 3.1, 4.0])


def test_demo_writes_its_record_and_pictures(tmp_path):
    command = [sys.executable, EXAMPLES / "demo.py", "--quick", "--methods", "mgda", "--epochs", "2", "--jobs", "1"]
    printed = run(*command, "--out", tmp_path)
    assert "mgda + F-MTL" in printed
    assert {p.name for p in tmp_path.iterdir()} == {
        "record.json", "learning_curves.png", "conflicts.png", "sharpness.png",
    }  # fmt: skip
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["torch"] == torch.__version__
    assert sorted((r["method"], r["rho"]) for r in record["runs"]) == [("mgda", 0.0), ("mgda", 0.05)]
    for result in record["runs"]:
        for curve in ("loss", "sharpness", "train", "test"):
            assert np.shape(result[curve]) == (2, 2), curve  # epochs x tasks
            assert np.isfinite(result[curve]).all()
        assert all(0 <= share <= 1 for share in result["conflicts"])
        assert np.min(result["sharpness"]) > 0


def write_idx(path, array):
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes())


@pytest.fixture
def idx_folder(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    for name, count in (("train", 30), ("t10k", 20)):
        write_idx(folder / f"{name}-images-idx3-ubyte", rng.integers(256, size=(count, 28, 28), dtype=np.uint8))
        write_idx(folder / f"{name}-labels-idx1-ubyte", rng.integers(10, size=count, dtype=np.uint8))
    return folder


def test_multi_mnist_continues_bit_for_bit(idx_folder, tmp_path):
    command = [
        sys.executable, EXAMPLES / "multi_mnist.py", "--data", idx_folder, "--trunk", "lenet", "--pictures", 65,
        "--test-pictures", 10, "--batch", 32, "--epochs", 2, "--aggregator", "pcgrad", "--device", "cpu",
    ]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(*command, "--out", whole)
    run(*command, "--out", parts, "--stop-after", 1)
    assert len(json.loads((parts / "record.json").read_text())["epochs"]) == 1
    run(*command, "--out", parts)
    assert (whole / "record.json").read_bytes() == (parts / "record.json").read_bytes()
    first, second = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, parts))
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    epoch = json.loads((whole / "record.json").read_text())["epochs"][-1]
    assert set(epoch) >= {"epoch", "losses", "sharpness", "conflicts", "accuracy", "test_losses"}
    printed = run(*command, "--out", parts, "--rho", 0.5, expect=2)
    assert "rho" in printed


def test_idx_reader_refuses_a_file_that_is_cut_short(tmp_path):
    path = tmp_path / "images"
    write_idx(path, np.zeros((3, 4, 4), np.uint8))
    assert load("pictures").read_idx(path).shape == (3, 4, 4)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="47 bytes"):
        load("pictures").read_idx(path)


@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("cc") is None, reason="no cmake or no C compiler")
def test_plain_c_network_learns(tmp_path):
    if not list(Path(flatmtl.cmake_prefix_path).rglob("flatmtlConfig.cmake")):
        pytest.skip("flatmtl runs from the source tree, without the installed C library")
    build, csv = tmp_path / "build", tmp_path / "digits.csv"
    run("cmake", "-S", EXAMPLES / "plain_c", "-B", build, f"-DCMAKE_PREFIX_PATH={flatmtl.cmake_prefix_path}")
    run("cmake", "--build", build)
    run(sys.executable, EXAMPLES / "plain_c" / "export_digits.py", csv)
    for rho in ("0", "0.1"):
        last = [float(v) for v in run(build / "digits", csv, rho).strip().splitlines()[-1].split()[:5]]
        assert last[0] == 15  # the last epoch
        assert last[2] > 90, last  # test accuracy in %, digit
        assert last[4] > 85, last  # and parity
    assert "cannot be opened" in run(build / "digits", tmp_path / "missing.csv", expect=1)
