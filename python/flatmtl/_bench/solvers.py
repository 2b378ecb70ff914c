"""A solve on a ready Gramian, for every method that has one, beside other implementations."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import aggregators
from . import contenders
from .settings import Mode, Progress
from .timing import fits, interleave, threads

METHODS = tuple(name for name in aggregators.AGGREGATORS if name not in ("sum", "mean", "fixed"))


def plan(mode: Mode) -> list[tuple[str, int]]:
    return [(method, tasks) for method in METHODS for tasks in mode.solver_tasks]


def gramian(tasks: int, seed: int = 0) -> Tensor:
    """Of K random vectors of 4K numbers with a common part, their lengths spread over a factor of 10: some conflict."""
    generator = torch.Generator().manual_seed(1000 * tasks + seed)
    rows = torch.randn(tasks, 4 * tasks, dtype=torch.float64, generator=generator)
    rows += 0.2 * torch.randn(4 * tasks, dtype=torch.float64, generator=generator)
    rows *= torch.logspace(0, 1, tasks, dtype=torch.float64)[torch.randperm(tasks, generator=generator)][:, None]
    return rows @ rows.T


def run(mode: Mode, progress: Progress, cases: list[tuple[str, int]] | None = None) -> dict[str, Any]:
    """Record of the section. `difference` of a contender is that of its update's direction from ours: the norm of the
    difference of the two updates divided by their norms."""
    results = []
    with threads(1), torch.no_grad():  # a K x K matrix is no work for two
        for method, tasks in plan(mode) if cases is None else cases:
            g = gramian(tasks)
            found, absent = contenders.solvers(method, tasks)
            times = interleave({name: partial(solve, g) for name, solve in found.items()}, mode.effort, contenders.OURS)
            ours = found[contenders.OURS](g)
            for name, solve in found.items():
                times[name]["difference"] = direction_difference(ours, solve(g), g)
            results.append({"method": method, "tasks": tasks, "times": times, "absent": absent})
            progress(f"solve {method}, K = {tasks}")
    return {"cases": results, "fits": fits(results, "tasks", ("method",))}


def direction_difference(a: Tensor, b: Tensor, g: Tensor) -> float:
    """|| a/|a| - b/|b| || in the norm of the update, |w|^2 = w'Gw."""
    a, b = (
        w.to(torch.float64) / (w.to(torch.float64) @ g @ w.to(torch.float64)).clamp(min=1e-300).sqrt() for w in (a, b)
    )
    return float(((a - b) @ g @ (a - b)).clamp(min=0).sqrt())
