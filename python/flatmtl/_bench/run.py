"""One run of the benchmark: the sections asked for, and what they ran on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from . import aggregation, contenders, kernels, machine, solvers, steps
from .probes import Probes
from .settings import SECTIONS, Mode, Progress, chosen


def count(mode: Mode, what: Sequence[str]) -> int:
    """How often `progress` will be called. ValueError for a name that there is not, or that the mode has no case of."""
    sections = chosen(what)
    plans: dict[str, Callable[[], Sequence[Any]]] = {
        "kernels": lambda: kernels.plan(mode, sections["kernels"]),
        "solvers": lambda: solvers.plan(mode),
        "aggregation": lambda: aggregation.plan(mode),
        "steps": lambda: steps.plan(mode, sections["steps"]),
    }
    lengths = {section: len(plans[section]()) for section in sections}
    for section, length in lengths.items():
        if not length:
            raise ValueError(f"the {mode.name} run has no case of {section}: {', '.join(sections[section])}")
    return len(kernels.counts(mode)) + sum(lengths.values())


def run(
    mode: Mode, what: Sequence[str] = SECTIONS, progress: Progress = lambda _: None,
    save: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """Measures the limits of the machine and the sections or their parts, as "kernels" or "steps.memory", and gives a
    record for JSON, to `save` after each section too. ValueError as of `count`."""
    count(mode, what)
    parts = chosen(what)
    begin = time.perf_counter()
    record: dict[str, Any] = {"mode": mode.name, "machine": machine.facts(), "contenders": contenders.versions()}
    probes = Probes()
    record |= {"probes": probes.kind, "limits": kernels.limits(mode, probes, progress)}
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "kernels": lambda: kernels.run(mode, probes, progress, parts["kernels"]),
        "solvers": lambda: solvers.run(mode, progress),
        "aggregation": lambda: aggregation.run(mode, progress),
        "steps": lambda: steps.run(mode, probes, progress, parts["steps"]),
    }
    for name in parts:
        record[name] = sections[name]()
        record["seconds"] = time.perf_counter() - begin
        save(record)
    return record
