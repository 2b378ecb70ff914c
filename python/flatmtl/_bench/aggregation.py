"""From rows to update: the same method on the same rows by every contender."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import contenders, machine, rows
from .settings import Mode, Progress
from .timing import fits, interleave, threads

LAYOUT = "ResNet-18"
LIMIT = 1 << 30  # bytes of rows; contenders need several times as much


def plan(mode: Mode) -> list[tuple[str, int, int, str]]:
    """(method, K, P, layout)."""
    cases = [
        (method, tasks, numbers, "one")
        for method in mode.aggregation_methods
        for tasks in mode.aggregation_tasks
        for numbers in mode.aggregation_numbers
    ]
    if mode.name != "quick":
        cases += [("cagrad", tasks, rows.numbers(LAYOUT), LAYOUT) for tasks in (3, 10)]
    return [case for case in cases if 4 * case[1] * case[2] <= min(LIMIT, mode.memory)]


def run(mode: Mode, progress: Progress, cases: list[tuple[str, int, int, str]] | None = None) -> dict[str, Any]:
    """Record of the section. `difference` is that of the update's direction from ours, for methods that draw nothing.

    Rows in many tensors are joined into a matrix, as the other libraries need them, within the time of those; ours and
    the reference take them as they are.
    """
    cases = plan(mode) if cases is None else cases
    count = machine.cores()
    arena = rows.Arena(max(tasks * numbers for _, tasks, numbers, _ in cases))
    results = []
    with threads(count), torch.no_grad():
        for method, tasks, numbers, layout in cases:
            matrix = arena.rows(tasks, numbers)
            found, absent = contenders.aggregations(method, tasks)
            works = {name: _work(name, call, matrix, layout) for name, call in found.items()}
            contenders.seed(0)
            times = interleave(works, mode.effort, contenders.OURS)
            if method not in contenders.RANDOM or tasks == 2:
                ours = _flat(works[contenders.OURS]())
                for name, work in works.items():
                    times[name]["difference"] = _difference(ours, _flat(work()))
            results.append(
                {
                    "method": method,
                    "tasks": tasks,
                    "numbers": numbers,
                    "layout": layout,
                    "threads": count,
                    "times": times,
                    "absent": absent,
                }
            )
            progress(f"{method}, K = {tasks}, P = {numbers:,}")
    plain = [case for case in results if case["layout"] == "one"]
    return {
        "cases": results,
        "fits": fits(plain, "numbers", ("method", "tasks")) + fits(plain, "tasks", ("method", "numbers")),
    }


def _work(name: str, call: Any, matrix: Tensor, layout: str) -> Any:
    if layout == "one":
        return lambda: call(matrix)
    pieces = [rows.cut(row, layout) for row in matrix]
    if name in (contenders.OURS, contenders.REFERENCE):
        return lambda: call(pieces)

    def joined() -> list[Tensor]:
        update = call(torch.stack([torch.cat([t.view(-1) for t in row]) for row in pieces]))
        return rows.cut(update, layout)

    return joined


def _flat(update: Tensor | list[Tensor]) -> Tensor:
    return update.double() if isinstance(update, Tensor) else torch.cat([t.reshape(-1) for t in update]).double()


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a / a.norm() - b / b.norm()).norm())
