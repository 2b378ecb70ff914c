"""The precision in which Gramians are summed."""

import subprocess
import sys

import flatmtl
import pytest
import torch
from flatmtl import _native, _ops

LENGTH = 98304 + 200


def rows(count, dtype=torch.float32, seed=0):
    return torch.randn(count, LENGTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(gramian, x):
    exact = x.double() @ x.double().T
    norms = exact.diagonal().sqrt()
    return float(((gramian - exact) / norms.outer(norms)).abs().max())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-8), (torch.bfloat16, 1e-7), (torch.float16, 1e-7)])
def test_errors(dtype, bound):
    x = rows(8, dtype)
    assert 1e-12 < error(flatmtl.gramian(x), x) < bound
    assert error(flatmtl.gramian(x, accumulate="f64"), x) < 1e-12


def test_few_or_short_or_double_rows_are_summed_in_f64():
    for x in (rows(3), rows(1, torch.bfloat16), rows(8)[:, :90000], rows(8).double()):
        assert torch.equal(flatmtl.gramian(x), flatmtl.gramian(x, accumulate="f64"))
    for x in (rows(4), rows(2, torch.bfloat16), rows(2, torch.float16)):
        assert not torch.equal(flatmtl.gramian(x), flatmtl.gramian(x, accumulate="f64"))


def test_pairs_of_rows():
    g, s = rows(4), rows(4, seed=1)
    args = [[x] for x in g], [[x] for x in s]
    pair, exact = _native.gramian_pair(*args), _native.gramian_pair(*args, _ops.ACCUMULATE["f64"])
    assert not torch.equal(pair, exact)
    assert error(pair, torch.cat([g, s - g])) < 1e-8
    few = [[x] for x in g[:3]], [[x] for x in s[:3]]
    assert torch.equal(_native.gramian_pair(*few), _native.gramian_pair(*few, _ops.ACCUMULATE["f64"]))


def test_aggregate_and_optimizer_pass_it_on():
    x = rows(6)
    auto, f64 = (flatmtl.aggregate(x, "mgda", accumulate=a) for a in ("auto", "f64"))
    assert not torch.equal(auto, f64)
    torch.testing.assert_close(auto, f64, rtol=1e-4, atol=1e-6)

    def step(accumulate):
        weight = torch.nn.Parameter(torch.ones(LENGTH))
        optimizer = flatmtl.FlatMTL(torch.optim.SGD([weight], lr=0.1), aggregator="mgda", accumulate=accumulate)
        optimizer.step(lambda: [(row * weight.square()).mean() for row in x])
        return optimizer.last["weights_loss"]

    auto, f64 = step("auto"), step("f64")
    assert auto.tolist() != f64.tolist()
    torch.testing.assert_close(auto, f64, rtol=1e-4, atol=1e-6)


def test_unknown_names():
    with pytest.raises(ValueError, match="accumulate is 'f32'"):
        flatmtl.gramian(rows(2), accumulate="f32")
    with pytest.raises(ValueError, match="accumulate"):
        flatmtl.FlatMTL(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), accumulate="f32")
    with pytest.raises(RuntimeError, match="accumulate is 2; it must be 0"):
        torch.ops.flatmtl.gramian([torch.ones(3)], 1, 2)


def test_bits_under_every_instruction_set_and_number_of_threads():
    code = (
        "import sys, torch, flatmtl\n"
        "x = torch.randn(7, 98504, generator=torch.Generator().manual_seed(0))\n"
        "for threads in 1, 2, 3, 7:\n"
        "    torch.set_num_threads(threads)\n"
        "    print(flatmtl.gramian(x).numpy().tobytes().hex())\n"
    )
    # All at once: most of the time is torch's start. An instruction set that the CPU lacks falls back to the best.
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={"FLATMTL_ISA": isa},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for isa in ("base", "avx2", "avx512", "neon")
    ]
    seen = set()
    for run in runs:
        out, errors = run.communicate()
        assert run.returncode == 0, errors
        seen.update(out.split())
    assert len(seen) == 1


@pytest.mark.parametrize("method", ["mgda", "cagrad", "imtl_g", "nash_mtl", "upgrad", "dualproj", "aligned_mtl"])
def test_dependent_rows_get_the_weights_of_f64(method):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 3, generator=generator) @ torch.randn(3, LENGTH, generator=generator)
    gramians = [flatmtl.gramian(x, accumulate=accumulate) for accumulate in ("auto", "f64")]
    assert torch.equal(*gramians)
    assert torch.isfinite(flatmtl.weights(gramians[0], method)).all()
