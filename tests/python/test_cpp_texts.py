"""The exceptions of the C++ optimizer say what those of the Python one say, word for word."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flatmtl
import pytest
import torch
from flatmtl import aggregators, flatness, weightings
from test_cpp import program  # noqa: F401  a fixture
from torch import Tensor

pytestmark = [
    pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("c++") is None, reason="no cmake or compiler"),
    pytest.mark.timeout(1200),  # the first time it compiles
]


class Tasks:
    """That of tests/cpp/refusals.cpp."""

    def __init__(self, **options: Any) -> None:
        def parameter(*values: float) -> Tensor:
            return torch.tensor(values, dtype=torch.float64).requires_grad_()

        self.w, self.a, self.b = parameter(1.0, 1.0), parameter(0.0, 0.0), parameter(2.0)
        self.optimizer = flatmtl.FlatMTL(torch.optim.SGD([self.w, self.a, self.b], lr=0.1), **options)

    def first(self) -> Tensor:
        return (self.w - self.a).square().sum()

    def second(self) -> Tensor:
        return (self.w * self.b).square().sum()

    def losses(self) -> list[Any]:
        return [self.first(), self.second()]


def step(closure: Callable[[Tasks, int], Any] = lambda t, call: t.losses(), before: int = 0, **options: Any) -> None:
    t = Tasks(**options)
    for _ in range(before):
        t.optimizer.step(t.losses)
    calls = iter(range(100))
    t.optimizer.step(lambda: closure(t, next(calls)))


def written(t: Tasks, call: int) -> list[Any]:
    if call == 1:
        with torch.no_grad():
            t.w.add_(1.0)
    return t.losses()


def one_parameter(w: Tensor) -> None:
    flatmtl.FlatMTL(torch.optim.SGD([w], lr=0.1)).step(
        lambda: torch.view_as_real(w).sum() if w.is_complex() else w.sum()
    )


A, W = aggregators, weightings
PYTHONS_ALONE = [*A.BUFFER_AGGREGATORS, "hydalearn", "slgrad", "mtcool"]
CASES: dict[str, Callable[[], Any]] = {
    "rho": lambda: Tasks(rho=-1.0),
    "rho, a pair": lambda: Tasks(rho=(0.5, math.inf)),
    "eta": lambda: Tasks(eta=-0.5),
    "norm": lambda: Tasks(norm="both"),
    "combine": lambda: Tasks(combine="sum"),
    "max_norm": lambda: Tasks(max_norm=0.0),
    "nonfinite": lambda: Tasks(nonfinite="ignore"),
    "seed": lambda: Tasks(seed=-1),
    "rows_dtype": lambda: Tasks(rows_dtype=torch.float32),
    "rows_dtype, float16": lambda: Tasks(rows_dtype=torch.float16),
    "no such aggregator": lambda: A.get_aggregator("NashMTL"),
    "no such aggregator, three are close": lambda: A.get_aggregator("grad"),
    "no such aggregator, none is close": lambda: A.get_aggregator("adam"),
    "no such weighting": lambda: W.get_weighting("gradnom"),
    "no such flatness mode": lambda: flatness.get_flatness("LookSAM2"),
    "fixed by name": lambda: A.get_aggregator("fixed"),
    "fixed, none": lambda: A.Fixed([]),
    "fixed, nan": lambda: A.Fixed([1.0, math.nan]),
    "pcgrad": lambda: A.PCGrad(-1),
    "cagrad": lambda: A.CAGrad(1.0),
    "fairgrad": lambda: A.FairGrad(0.0),
    "gradvac": lambda: A.GradVac(2.0),
    "aligned_mtl, scale": lambda: A.AlignedMTL("mean"),
    "aligned_mtl, tolerance": lambda: A.AlignedMTL("min", -0.5),
    "upgrad": lambda: A.UPGrad([0.5, -1.0]),
    "dualproj": lambda: A.DualProj([math.inf]),
    "ntkmtl": lambda: A.NTKMTL(1.5),
    "fixed weights by name": lambda: Tasks(weighting="fixed"),
    "fixed weights, none": lambda: W.FixedWeights([]),
    "fixed weights, negative": lambda: W.FixedWeights([1.0, -1.0]),
    "uw, lr": lambda: W.UW(0.0),
    "uw, initial": lambda: W.UW(0.1, math.nan),
    "dwa, temperature": lambda: W.DWA(math.inf),
    "dwa, epoch": lambda: W.DWA(2.0, 0),
    "rlw": lambda: W.RLW(-3),
    "stch, warmup": lambda: W.STCH(1.0, 25, -1),
    "imtl_l": lambda: W.IMTLL(-0.1),
    "famo, gamma": lambda: W.FAMO(0.1, -1.0),
    "famo, min_losses": lambda: W.FAMO(0.1, 0.0, [0.0, math.nan]),
    "gradnorm": lambda: W.GradNorm(-1.0),
    "go4align": lambda: W.GO4Align(0.1, 0),
    "slaw": lambda: W.SLAW(1.0),
    "bmtl": lambda: W.BMTL(0.0),
    "emtl": lambda: W.EMTL(-0.5),
    "values of fixed": lambda: step(aggregator=A.Fixed([1.0, 2.0, 3.0])),
    "preference": lambda: step(aggregator=A.UPGrad([1.0, 2.0, 3.0])),
    "values of fixed weights": lambda: step(weighting=W.FixedWeights([1.0])),
    "min_losses of famo": lambda: step(weighting=W.FAMO(0.1, 0.0, min_losses=[0.0, 0.0, 0.0])),
    "no losses": lambda: step(lambda t, call: []),
    "a vector": lambda: step(lambda t, call: [t.first(), t.w * 2]),
    "no graph": lambda: step(lambda t, call: [t.first(), t.second().detach()]),
    "a leaf": lambda: step(lambda t, call: [t.first(), torch.ones(()).requires_grad_()]),
    "complex": lambda: step(lambda t, call: [torch.complex(t.first(), t.second())]),
    "a matrix": lambda: step(lambda t, call: t.w.view(1, 2) * 1),
    "a vector computed as a whole": lambda: step(lambda t, call: (t.w - t.a).square()),
    "no closures": lambda: Tasks().optimizer.step([]),
    "no batches": lambda: Tasks().optimizer.step(lambda batch: [], batches=[]),
    "fewer tasks": lambda: step(lambda t, call: [t.first()], before=1),
    "fewer losses later": lambda: step(lambda t, call: [t.first()] if call else t.losses()),
    "None later": lambda: step(lambda t, call: [t.first(), None] if call else t.losses()),
    "a loss of nan": lambda: step(lambda t, call: [t.first(), t.second() * math.nan]),
    "a loss of inf": lambda: step(lambda t, call: [t.first(), t.second() * math.inf]),
    "a loss of -inf, perturbed": lambda: step(lambda t, call: [t.first(), t.second() * (-math.inf if call else 1.0)]),
    "a gradient of nan": lambda: step(lambda t, call: [t.first(), (t.second() - t.second()).sqrt()]),
    "written to": lambda: step(written),
    "a loss below 0, dwa": lambda: step(lambda t, call: [t.first(), t.second() * -1.0], weighting="dwa"),
    "a loss of 0, si": lambda: step(lambda t, call: [t.first(), t.second() - t.second().detach()], weighting="si"),
    "a loss below 0, stch": lambda: step(lambda t, call: [t.first(), t.second() * -0.25], 1, weighting="stch"),
    "a loss at its bound, famo": lambda: step(
        lambda t, call: [t.first(), t.second() * 0.0 - 1.5], weighting=W.FAMO(0.1, 0.0, min_losses=[0.0, -1.5])
    ),
    "complex parameters": lambda: one_parameter(torch.ones(2, dtype=torch.complex64).requires_grad_()),
    "no parameters": lambda: one_parameter(torch.ones(2)),
}


@pytest.fixture(scope="module")
def texts(program: Path) -> dict[str, str]:  # noqa: F811
    done = subprocess.run([program, "--refusals"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(line.split("\t", 1) for line in done.stdout.splitlines())  # type: ignore[misc]


def test_the_cases_are_the_same(texts):
    assert list(texts) == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_the_text_is_that_of_python(name, texts):
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        CASES[name]()
    expected = str(error.value)
    for method in PYTHONS_ALONE:  # in the list of what is known
        expected = expected.replace(f", {method!r}", "")
    assert texts[name] == expected
