"""One run of the benchmark: the sections asked for, and what they ran on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from . import aggregation, contenders, kernels, machine, solvers, steps
from .probes import Probes
from .settings import SECTIONS, Mode, Progress


def count(mode: Mode, what: Sequence[str]) -> int:
    """How often `progress` will be called."""
    plans: dict[str, Callable[[Mode], Sequence[Any]]] = {
        "solvers": solvers.plan, "aggregation": aggregation.plan, "steps": steps.plan,
    }  # fmt: skip
    total = sum(len(plan(mode)) for name, plan in plans.items() if name in what)
    if "kernels" in what:
        planned = kernels.plan(mode)
        total += len(planned) + len({case.threads for case in planned})
    return total


def run(
    mode: Mode, what: Sequence[str] = SECTIONS, progress: Progress = lambda _: None,
    save: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """Measures the sections, and gives a record for JSON, to `save` after each section too. ValueError for an unknown
    section."""
    for name in what:
        if name not in SECTIONS:
            raise ValueError(f"there is no section {name!r}; there are {', '.join(SECTIONS)}")
    begin = time.perf_counter()
    record: dict[str, Any] = {"mode": mode.name, "machine": machine.facts(), "contenders": contenders.versions()}
    probes = Probes()
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "kernels": lambda: kernels.run(mode, probes, progress),
        "solvers": lambda: solvers.run(mode, progress),
        "aggregation": lambda: aggregation.run(mode, progress),
        "steps": lambda: steps.run(mode, probes, progress),
    }
    for name in SECTIONS:
        if name in what:
            record[name] = sections[name]()
            record["seconds"] = time.perf_counter() - begin
            save(record)
    return record
