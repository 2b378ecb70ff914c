"""The C++ optimizer gives the bits of the Python one: the same trajectories, trained by both."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import flatmtl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("c++") is None, reason="no cmake or compiler"),
    pytest.mark.timeout(1200),  # the first time it compiles
]

DEFAULTS: dict[str, Any] = {
    "aggregator": "cagrad", "values": [], "rho_shared": 0.05, "rho_task": 0.05, "adaptive": False, "eta": -1.0,
    "norm": "separate", "combine": "", "family_scale": "rms", "replay_rng": True, "seed": 0,
    "give_shared": False, "dropout": 0.0, "batch_norm": False, "momentum": 0.9, "lr": 0.1, "form": "list",
    "dtype": torch.float32, "absent": False, "micro": 0, "m_sharpness": False,
    "max_norm": 0.0, "weighting": "", "weighting_values": [], "flat": "fmtl", "flat_values": [], "every": 0,
    "accumulate": "auto", "rows": "", "no_loss": -1, "slope": False,
}  # fmt: skip

RUNS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "plain sum": {"aggregator": "sum", "rho_shared": 0.0, "rho_task": 0.0},
    "batch norm and dropout": {"batch_norm": True, "dropout": 0.3},
    "dropout drawn afresh": {"dropout": 0.3, "replay_rng": False},
    "adaptive": {"adaptive": True, "eta": 0.01, "rho_shared": 1.0, "rho_task": 0.5, "norm": "joint"},
    "direct": {"combine": "direct", "aggregator": "mgda", "family_scale": "none"},
    "second": {"combine": "second", "aggregator": "nash_mtl"},
    "each": {"combine": "each", "aggregator": "fairgrad", "values": [1.5]},
    "pcgrad": {"aggregator": "pcgrad", "seed": 7, "absent": True},
    "fixed": {"aggregator": "fixed", "values": [0.5, 2.0, 1.0], "absent": True},
    "imtl_g, one closure a task": {"aggregator": "imtl_g", "form": "closures", "batch_norm": True, "dropout": 0.2},
    "closure with a task": {"form": "task", "batch_norm": True, "absent": True},
    "gradvac": {"aggregator": "gradvac", "values": [0.5], "seed": 3, "absent": True},
    "gradvac, second": {"aggregator": "gradvac", "values": [0.5], "combine": "second", "absent": True},
    "gradvac, each": {"aggregator": "gradvac", "values": [0.5], "combine": "each", "absent": True},
    "gradvac, plain": {"aggregator": "gradvac", "values": [0.5], "rho_shared": 0.0, "rho_task": 0.0},
    "aligned_mtl": {"aggregator": "aligned_mtl"},
    "upgrad": {"aggregator": "upgrad", "values": [0.2, 0.5, 0.3], "absent": True},
    "dualproj": {"aggregator": "dualproj"},
    "config": {"aggregator": "config"},
    "ntkmtl": {"aggregator": "ntkmtl", "values": [0.25]},
    "stacked losses": {"form": "stack", "momentum": 0.5},
    "micro-batches": {"micro": 4, "dropout": 0.3, "batch_norm": True, "absent": True},
    "micro-batches, one closure a task": {"micro": 2, "form": "closures", "batch_norm": True, "absent": True},
    "micro-batches, closure with a task": {"micro": 3, "form": "task", "dropout": 0.2, "aggregator": "ntkmtl"},
    "micro-batches, stacked, plain": {"micro": 4, "form": "stack", "rho_shared": 0.0, "rho_task": 0.0},
    "m-sharpness": {"micro": 4, "m_sharpness": True, "dropout": 0.3, "batch_norm": True, "absent": True},
    "m-sharpness, one closure a task": {"micro": 3, "m_sharpness": True, "form": "closures", "combine": "direct"},
    "max_norm": {"max_norm": 0.05},
    "max_norm, direct": {"max_norm": 0.05, "combine": "direct"},
    "max_norm, second": {"max_norm": 0.05, "combine": "second"},
    "max_norm, plain": {"max_norm": 0.05, "rho_shared": 0.0, "rho_task": 0.0},
    "fixed weights": {"weighting": "fixed", "weighting_values": [0.5, 0.0, 2.0], "absent": True},
    "uw": {"weighting": "uw", "weighting_values": [0.1, 0.2], "absent": True, "aggregator": "sum"},
    "dwa": {"weighting": "dwa", "weighting_values": [1.5, 1.0], "absent": True},
    "rlw": {"weighting": "rlw", "seed": 5, "absent": True, "dropout": 0.2},
    "si": {"weighting": "si", "combine": "direct", "max_norm": 0.4},
    "gls": {"weighting": "gls", "give_shared": True, "aggregator": "mgda"},
    "stch": {"weighting": "stch", "weighting_values": [0.5, 1.0, 1.0], "rho_shared": 0.0, "rho_task": 0.0},
    "imtl_l": {"weighting": "imtl_l", "weighting_values": [0.1], "aggregator": "imtl_g", "micro": 4},
    "famo": {"weighting": "famo", "batch_norm": True, "dropout": 0.2, "absent": True, "aggregator": "sum"},
    "famo, bounds": {"weighting": "famo", "weighting_values": [0.1, 0.0, -1.0, -2.0, 0.0], "form": "task"},
    "famo, micro-batches": {
        "weighting": "famo",
        "weighting_values": [0.1, 0.01],
        "micro": 4,
        "m_sharpness": True,
        "dropout": 0.2,
        "batch_norm": True,
        "absent": True,
    },
    "famo, one closure a task": {"weighting": "famo", "form": "closures", "dropout": 0.2, "replay_rng": False},
    "famo, stacked": {"weighting": "famo", "form": "stack", "adaptive": True},
    "gradnorm": {"weighting": "gradnorm", "weighting_values": [1.0, 0.1], "absent": True},
    "go4align": {"weighting": "go4align", "weighting_values": [0.1, 2.0], "combine": "second"},
    "slaw": {"weighting": "slaw", "weighting_values": [0.5], "micro": 2, "m_sharpness": True, "absent": True},
    "bmtl": {"weighting": "bmtl", "weighting_values": [2.0], "combine": "each"},
    "emtl": {"weighting": "emtl", "weighting_values": [3.0], "dtype": torch.float64},
    "sam": {"flat": "sam", "dropout": 0.3, "batch_norm": True, "absent": True},
    "sam, joint, sum": {"flat": "sam", "aggregator": "sum", "norm": "joint", "rho_shared": 0.2, "rho_task": 0.2},
    "sam, direct": {"flat": "sam", "combine": "direct", "dropout": 0.3, "batch_norm": True, "absent": True},
    "sam, direct, one closure a task": {"flat": "sam", "combine": "direct", "form": "closures", "absent": True},
    "sam, direct, shared given": {"flat": "sam", "combine": "direct", "give_shared": True, "form": "stack"},
    "sam, direct, micro-batches": {"flat": "sam", "combine": "direct", "micro": 4, "absent": True, "dropout": 0.2},
    "sam, direct, a task without loss": {"flat": "sam", "combine": "direct", "no_loss": 1, "aggregator": "imtl_g"},
    "a task without loss": {"no_loss": 2},
    "sam, direct, m-sharpness": {
        "flat": "sam",
        "combine": "direct",
        "micro": 4,
        "m_sharpness": True,
        "absent": True,
        "aggregator": "mgda",
    },
    "sam, m-sharpness, weighting": {
        "flat": "sam",
        "micro": 3,
        "m_sharpness": True,
        "absent": True,
        "weighting": "uw",
        "max_norm": 0.3,
    },
    "sam, direct, weighting": {"flat": "sam", "combine": "direct", "weighting": "dwa", "absent": True},
    "sam, closure with a task": {"flat": "sam", "form": "task", "aggregator": "imtl_g", "absent": True},
    "asam": {"flat": "asam", "rho_shared": 0.5, "rho_task": 0.5},
    "asam, direct, eta": {"flat": "asam", "eta": 0.1, "combine": "direct", "norm": "joint", "dtype": torch.float64},
    "gsam": {"flat": "gsam", "batch_norm": True, "absent": True},
    "gsam, shared given": {"flat": "gsam", "give_shared": True, "batch_norm": True, "weighting": "uw", "absent": True},
    "gsam, direct, weighting": {
        "flat": "gsam",
        "flat_values": [0.2],
        "combine": "direct",
        "weighting": "gls",
        "max_norm": 0.4,
    },
    "gsam, second, micro-batches": {"flat": "gsam", "combine": "second", "micro": 2, "absent": True},
    "gsam, bfloat16": {"flat": "gsam", "dtype": torch.bfloat16, "lr": 0.02, "momentum": 0.0},
    "wsam": {"flat": "wsam", "flat_values": [0.7], "dropout": 0.2, "absent": True},
    "wsam, direct, m-sharpness": {"flat": "wsam", "combine": "direct", "micro": 2, "m_sharpness": True},
    "wsam, weighting": {"flat": "wsam", "weighting": "slaw", "weighting_values": [0.5], "aggregator": "upgrad"},
    "fsam": {"flat": "fsam", "batch_norm": True, "dropout": 0.2, "absent": True},
    "fsam, direct": {"flat": "fsam", "flat_values": [0.5, 0.6], "combine": "direct", "absent": True},
    "fsam, direct, micro-batches": {"flat": "fsam", "combine": "direct", "micro": 3, "form": "closures"},
    "fsam, direct, a task without loss": {"flat": "fsam", "combine": "direct", "no_loss": 1, "absent": True},
    "fsam, direct, a loss of 0 with a gradient": {"flat": "fsam", "combine": "direct", "no_loss": 1, "slope": True},
    "fsam, shared given, a task without loss": {"flat": "fsam", "no_loss": 2, "give_shared": True, "batch_norm": True},
    "fsam, adaptive, weighting": {"flat": "fsam", "adaptive": True, "eta": 0.01, "weighting": "si", "rho_shared": 0.5},
    "fsam, bfloat16": {"flat": "fsam", "dtype": torch.bfloat16, "lr": 0.02, "momentum": 0.0},
    "looksam": {"flat": "looksam", "flat_values": [2.0, 0.7], "absent": True},
    "looksam, every 3": {"flat": "looksam", "every": 3, "dropout": 0.3, "batch_norm": True},
    "looksam, weighting": {
        "flat": "looksam",
        "flat_values": [3.0, 0.3],
        "weighting": "uw",
        "weighting_values": [0.1, 0.2],
        "max_norm": 0.5,
    },
    "looksam, a weight of 0": {
        "flat": "looksam",
        "flat_values": [2.0, 0.7],
        "weighting": "fixed",
        "weighting_values": [0.5, 0.0, 2.0],
    },
    "looksam, weighting, one task": {
        "flat": "looksam",
        "every": 3,
        "weighting": "fixed",
        "weighting_values": [0.3, 0.7, 1.1],
        "absent": "all but one",
    },
    "looksam, shared given": {"flat": "looksam", "every": 2, "give_shared": True, "batch_norm": True},
    "looksam, micro-batches": {"flat": "looksam", "every": 2, "micro": 4, "absent": True, "norm": "joint"},
    "every 2": {"every": 2, "absent": True, "dropout": 0.3, "batch_norm": True},
    "every 3, alpha": {"flat_values": [3.0, 0.6], "absent": True, "combine": "each"},
    "every 2, alpha, weighting": {"flat_values": [2.0, 0.6], "weighting": "uw", "weighting_values": [0.1, 0.2]},
    "every 2, weighting": {"every": 2, "weighting": "famo", "absent": True, "aggregator": "sum"},
    "every 2, a weight of 0": {
        "every": 2,
        "weighting": "fixed",
        "weighting_values": [0.5, 0.0, 2.0],
        "aggregator": "sum",
        "absent": True,
    },
    "every 3, weights of 0 now and then": {
        "every": 3,
        "weighting": "stch",
        "weighting_values": [1e-4, 1.0, 0.0],
        "aggregator": "sum",
    },
    "every 2, micro-batches": {"every": 2, "micro": 3, "absent": True, "form": "task"},
    "every 2, one closure a task": {"every": 2, "form": "closures", "combine": "direct", "max_norm": 0.3},
    "every 4, float64": {"every": 4, "dtype": torch.float64, "aggregator": "mgda"},
    "samo": {"flat": "samo", "batch_norm": True, "dropout": 0.3, "absent": True, "seed": 3},
    "samo, decomposed": {"flat": "samo", "flat_values": [0.2, 0.1], "combine": "decomposed", "absent": True},
    "samo, alpha 1": {"flat": "samo", "flat_values": [1.0, 0.01], "norm": "joint"},
    "samo, drawn afresh": {"flat": "samo", "replay_rng": False, "dropout": 0.3, "form": "closures"},
    "samo, micro-batches": {"flat": "samo", "micro": 2, "form": "task", "absent": True, "flat_values": [0.1, 0.05]},
    "samo, m-sharpness": {"flat": "samo", "micro": 4, "m_sharpness": True, "dropout": 0.2, "absent": True},
    "samo, weighting": {"flat": "samo", "weighting": "rlw", "adaptive": True, "eta": 0.01, "rho_shared": 0.5},
    "samo, float64": {"flat": "samo", "dtype": torch.float64, "flat_values": [0.3, 0.01]},
    "samo, bfloat16": {"flat": "samo", "dtype": torch.bfloat16, "lr": 0.02, "momentum": 0.0},
    "sgsu": {"flat": "sgsu", "rho_shared": 0.0, "rho_task": 0.0, "absent": True, "batch_norm": True},
    "sgsu, decomposed": {"flat": "sgsu", "flat_values": [0.1], "combine": "decomposed", "dropout": 0.2},
    "sgsu, m-sharpness, weighting": {
        "flat": "sgsu",
        "flat_values": [0.2],
        "micro": 3,
        "m_sharpness": True,
        "absent": True,
        "weighting": "gradnorm",
    },
    "bfloat16 rows": {"rows": "bfloat16", "batch_norm": True, "dropout": 0.2, "absent": True},
    "bfloat16 rows, plain": {"rows": "bfloat16", "rho_shared": 0.0, "rho_task": 0.0, "give_shared": True},
    "bfloat16 rows, adaptive, direct": {"rows": "bfloat16", "adaptive": True, "eta": 0.01, "combine": "direct"},
    "bfloat16 rows, micro-batches": {"rows": "bfloat16", "micro": 4, "absent": True, "weighting": "gradnorm"},
    "bfloat16 rows, m-sharpness": {"rows": "bfloat16", "micro": 4, "m_sharpness": True, "absent": True},
    "bfloat16 rows, one closure a task": {"rows": "bfloat16", "form": "closures", "give_shared": True},
    "bfloat16 rows, sam": {"rows": "bfloat16", "flat": "sam", "weighting": "uw", "absent": "all but one"},
    "bfloat16 rows, sam, direct": {"rows": "bfloat16", "flat": "sam", "combine": "direct", "micro": 2, "absent": True},
    "bfloat16 rows, sam, direct, m-sharpness": {
        "rows": "bfloat16",
        "flat": "sam",
        "combine": "direct",
        "micro": 4,
        "m_sharpness": True,
        "norm": "joint",
    },
    "bfloat16 rows, gsam": {"rows": "bfloat16", "flat": "gsam", "give_shared": True, "batch_norm": True},
    "bfloat16 rows, wsam": {"rows": "bfloat16", "flat": "wsam", "flat_values": [0.7], "weighting": "si"},
    "bfloat16 rows, fsam": {"rows": "bfloat16", "flat": "fsam", "absent": True},
    "bfloat16 rows, fsam, direct": {"rows": "bfloat16", "flat": "fsam", "combine": "direct", "absent": True},
    "bfloat16 rows, looksam": {"rows": "bfloat16", "flat": "looksam", "every": 2, "weighting": "uw", "absent": True},
    "bfloat16 rows, every 2": {"rows": "bfloat16", "every": 2, "weighting": "dwa", "absent": True, "max_norm": 0.3},
    "bfloat16 rows, samo": {"rows": "bfloat16", "flat": "samo", "adaptive": True, "eta": 0.01, "rho_shared": 0.5},
    "bfloat16 rows, samo, alpha 1": {"rows": "bfloat16", "flat": "samo", "flat_values": [1.0, 0.01], "absent": True},
    "bfloat16 rows, sgsu": {"rows": "bfloat16", "flat": "sgsu", "flat_values": [0.2], "combine": "decomposed"},
    "shared given": {"give_shared": True, "batch_norm": True},
    "float64": {"dtype": torch.float64, "batch_norm": True},
    # torch's C++ SGD with momentum rounds differently from the Python one in bfloat16
    "bfloat16": {"dtype": torch.bfloat16, "lr": 0.02, "momentum": 0.0},
}


@pytest.fixture(scope="session")
def program() -> Path:
    """The program of tests/cpp, built against the installed package."""
    build = ROOT / "build" / "cpp"
    prefixes = f"{flatmtl.cmake_prefix_path};{torch.utils.cmake_prefix_path}"
    for command in (
        ["cmake", "-S", ROOT / "tests" / "cpp", "-B", build, f"-DCMAKE_PREFIX_PATH={prefixes}"],
        ["cmake", "--build", build, "--target", "flatmtl_cpp_tests"],
    ):
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "flatmtl_cpp_tests"


def settings_of(changes: dict[str, Any]) -> dict[str, Any]:
    """One run: options, initial parameters and batches."""
    s = {**DEFAULTS, **changes}
    g = torch.Generator().manual_seed(5)

    def normal(*size: int, dtype: torch.dtype = s["dtype"]) -> Tensor:
        return (torch.randn(*size, generator=g, dtype=torch.float64) * 0.4).to(dtype)

    s["params"] = [normal(6, 5), normal(6)]
    for out, dtype in ((3, s["dtype"]), (1, s["dtype"]), (2, torch.float64)):
        s["params"] += [normal(out, 6, dtype=dtype), normal(out, dtype=dtype)]
    s["batches"] = [
        [normal(16, 5) * 3, torch.randint(0, 3, (16,), generator=g), normal(16, 1), normal(16, 2)] for _ in range(5)
    ]
    if s["micro"]:
        s["batches"] = [
            [list(part) for part in zip(*(t.chunk(s["micro"]) for t in b), strict=True)] for b in s["batches"]
        ]
    if s["absent"]:  # from the first micro-batch alone
        for batch, task in ((1, 2), (3, 1), *([(2, 1), (2, 3)] if s["absent"] == "all but one" else [])):
            first = s["batches"][batch][0] if s["micro"] else s["batches"][batch]
            first[task] = torch.empty(0)
    return s


class Python:
    """What tests/cpp/trajectory.cpp does."""

    def __init__(self, s: dict[str, Any]) -> None:
        self.s = s
        self.params = [nn.Parameter(p.clone()) for p in s["params"]]
        self.norm = nn.BatchNorm1d(6, dtype=s["dtype"]) if s["batch_norm"] else None
        if self.norm is not None:
            self.params += list(self.norm.parameters())
        self.batch: list[Tensor] = []

    def trunk(self) -> Tensor:
        h = F.linear(self.batch[0], self.params[0], self.params[1])
        if self.norm is not None:
            h = self.norm(h)
        return torch.dropout(torch.tanh(h), self.s["dropout"], True)

    def loss(self, task: int, h: Tensor) -> Tensor | None:
        w, b = self.params[2 + 2 * task], self.params[3 + 2 * task]
        target = self.batch[1 + task]
        if target.numel() == 0:
            return None
        out = F.linear(h.to(w.dtype), w, b)
        if task == self.s["no_loss"] and self.batch[0][0, 4] > 0.0:  # in some of the batches
            return (out - out.detach()).sum() if self.s["slope"] else (out * 0.0).sum()
        return F.cross_entropy(out, target) if task == 0 else F.mse_loss(out, target.to(out.dtype))

    def all(self, task: int | None = None) -> list[Tensor | None]:
        h = self.trunk()
        return [self.loss(i, h) if task in (None, i) else None for i in range(3)]

    def closure(self) -> Any:
        if self.s["form"] == "closures":
            return [lambda i=i: self.loss(i, self.trunk()) for i in range(3)]
        if self.s["form"] == "task":
            return lambda task: self.all(task)
        if self.s["form"] == "stack":
            return lambda: torch.stack([loss.double() for loss in self.all()])
        return lambda: self.all()

    def micro_closure(self) -> Any:
        def at(batch: list[Tensor], function: Any, *arguments: Any) -> Any:
            self.batch = batch
            return function(*arguments)

        if self.s["form"] == "closures":
            return [lambda batch, i=i: at(batch, lambda: self.loss(i, self.trunk())) for i in range(3)]
        if self.s["form"] == "task":
            return lambda batch, task: at(batch, self.all, task)
        closure = self.closure()
        return lambda batch: at(batch, closure)

    def aggregator(self) -> flatmtl.Aggregator:
        name, values = self.s["aggregator"], self.s["values"]
        if not values:
            return flatmtl.aggregators.get_aggregator(name)
        option = {
            "fixed": "values", "fairgrad": "alpha", "gradvac": "beta", "upgrad": "preference", "ntkmtl": "exponent",
        }[name]  # fmt: skip
        value = tuple(values) if option in ("values", "preference") else values[0]
        return flatmtl.aggregators.get_aggregator(name, **{option: value})

    def weighting(self) -> flatmtl.Weighting | None:
        name, values = self.s["weighting"], self.s["weighting_values"]
        cls = flatmtl.weightings.WEIGHTINGS.get(name)
        if cls is None or not values:
            return None if cls is None else cls()
        if name == "fixed":
            return cls(values)
        if name == "famo":
            return cls(*values[:2], min_losses=values[2:] or None)
        return cls(*[int(v) if f.type == "int" else v for v, f in zip(values, dataclasses.fields(cls), strict=True)])

    def flatness(self) -> flatmtl.flatness.Flatness:
        cls, values = flatmtl.flatness.FLATNESS[self.s["flat"]], self.s["flat_values"]
        names = cls.option_names()[: len(values)]
        return cls(**{k: int(v) if k == "every" else v for k, v in zip(names, values, strict=True)})

    def run(self) -> dict[str, list[Tensor]]:
        s = self.s
        sgd = torch.optim.SGD(self.params, lr=s["lr"], momentum=s["momentum"], weight_decay=1e-3)
        optimizer = flatmtl.FlatMTL(
            sgd, aggregator=self.aggregator(), rho=(s["rho_shared"], s["rho_task"]), adaptive=s["adaptive"],
            eta=None if s["eta"] < 0 else s["eta"], norm=s["norm"], combine=s["combine"] or None,
            flat=self.flatness(), every=s["every"] or None, accumulate=s["accumulate"],
            rows_dtype=torch.bfloat16 if s["rows"] else None,
            replay_rng=s["replay_rng"], seed=s["seed"],
            family_scale=None if s["family_scale"] == "none" else s["family_scale"],
            shared=self.params[:2] if s["give_shared"] else None, m_sharpness=s["m_sharpness"],
            max_norm=s["max_norm"] or None, weighting=self.weighting(),
        )  # fmt: skip
        torch.manual_seed(11)
        kept: dict[str, list[Tensor]] = {
            k: [] for k in ("losses", "weights_loss", "weights_flat", "sharpness", "cosine_flat", "loss_weights")
        }
        for batch in s["batches"]:
            if s["micro"]:
                optimizer.step(self.micro_closure(), batches=batch)
            else:
                self.batch = batch
                optimizer.step(self.closure())
            for key, values in kept.items():
                values.append(optimizer.last[key])
        buffers = [] if self.norm is None else list(self.norm.buffers())
        return {
            "params": [p.detach() for p in self.params],
            "grads": [torch.empty(0) if p.grad is None else p.grad for p in self.params],
            "buffers": [*buffers, torch.rand(3)],
            **kept,
        }


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    nan = a.isnan() & b.isnan() if a.is_floating_point() else torch.zeros_like(a, dtype=torch.bool)
    return bool(((a.contiguous().view(bits) == b.contiguous().view(bits)) | nan).all())


@pytest.fixture(scope="session")
def results(program, tmp_path_factory) -> dict[str, dict[str, list[Tensor]]]:
    directory = tmp_path_factory.mktemp("trajectories")
    runs = [{k: v for k, v in settings_of(changes).items() if k != "dtype"} for changes in RUNS.values()]
    torch.save(runs, directory / "in.pt")
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [str(program), "--trajectory", str(directory / "in.pt"), str(directory / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **threads})
    assert done.returncode == 0, done.stderr
    return dict(zip(RUNS, torch.load(directory / "out.pt", weights_only=False), strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_trajectories_are_equal_bit_for_bit(name, results):
    expected, found = Python(settings_of(RUNS[name])).run(), results[name]
    assert found.keys() == expected.keys()
    for key, tensors in expected.items():
        assert len(found[key]) == len(tensors)
        for i, (a, b) in enumerate(zip(tensors, found[key], strict=True)):
            assert same_bits(a, b), (key, i, a, b)


@pytest.mark.parametrize(("page", "least"), [("cpp.md", 8), ("c.md", 4)])
def test_the_code_of_the_documentation_is_compiled(page, least):
    """Every block stands, up to its indentation, in a program or the CMakeLists.txt of the consumer."""
    blocks = re.findall(r"```(cpp|cmake|c)\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)
    assert len(blocks) >= least
    files = {"cpp": "train.cpp", "cmake": "CMakeLists.txt", "c": "main.c"}
    for kind, block in blocks:
        source = [line.strip() for line in (ROOT / "tests" / "consumer" / files[kind]).read_text().splitlines()]
        lines = [line.strip() for line in block.rstrip().splitlines()]
        assert any(source[i : i + len(lines)] == lines for i in range(len(source))), block


def test_the_runs_differ(results):
    """The options do something: no two runs end at the same parameters."""
    ends = [torch.cat([p.double().flatten() for p in result["params"][:2]]) for result in results.values()]
    for i, a in enumerate(ends):
        assert not any(torch.equal(a, b) for b in ends[:i]), list(RUNS)[i]
