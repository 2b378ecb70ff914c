"""What flatmtl aims at, as ratios within one run, beside what the runs gave."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from . import kernels, steps

MEGABYTE = 1_000_000


def targets(page: dict[str, Any], table: Callable[..., Any]) -> list[Any]:
    """One table of targets; a list, empty if the page has nothing for any of them."""
    rows = [*_kernels(page.get("kernels")), *_steps(page.get("steps"))]
    if not rows:
        return []
    columns = ["", "target", "median", "best - worst", "cases"]
    return [table("targets", "Targets, as ratios within one run.", columns, rows)]


def _row(
    what: str, target: str, values: Iterable[float], text: str = "{:.2f}", larger: bool = False
) -> list[list[str]]:
    """The row, or none without values. `larger`: more is better."""
    found = sorted(values, reverse=larger)
    if not found:
        return []
    middle = len(found) // 2
    median = found[middle] if len(found) % 2 else (found[middle - 1] + found[middle]) / 2
    both = " - ".join(text.format(v) for v in (found[0], found[-1]))
    return [[what, target, text.format(median), both, str(len(found))]]


def _kernels(section: dict[str, Any] | None) -> Iterable[list[str]]:
    if section is None:
        return
    plain = [case for case in section["cases"] if case["layout"] == "one"]

    def ratios(kernel: str, dtype: str, most: int, least: int = 0) -> list[float]:
        return [
            case["times"][kernels.OURS]["ratio"]["median"]
            for case in plain
            if (case["kernel"], case["dtype"]) == (kernel, dtype) and least <= inputs(case) <= most
        ]

    def inputs(case: dict[str, Any]) -> int:
        return int(case["tasks"]) * (2 if case["kernel"].endswith("pair") else 1)

    def shares(kernel: str, dtype: str) -> list[float]:
        return [
            100 * case["operations"] / case["times"][kernels.OURS]["median"] / case["peak"]
            for case in plain
            if (case["kernel"], case["dtype"]) == (kernel, dtype) and inputs(case) >= 16
        ]

    def works(kernel: str, dtype: str, least: int, most: int) -> list[float]:
        """Times over those of the loop that reads the rows and multiplies as often, by K, on which both depend."""
        return [
            found["median"]
            for case in plain
            if (case["kernel"], case["dtype"]) == (kernel, dtype) and least <= case["tasks"] <= most
            if (found := case["times"][kernels.OURS].get("ratios", {}).get(kernels.WORK)) is not None
        ]

    for dtype in sorted({case["dtype"] for case in plain}, reverse=True):
        yield from _row(f"Gramian of at most 10 rows, {dtype} / reading them", "<= 1.10", ratios("gramian", dtype, 10))
        yield from _row(
            f"Gramian of 16 rows or more, {dtype}, share of the FMA peak", ">= 70 %", shares("gramian", dtype), "{:.0f} %",
            larger=True,
        )  # fmt: skip
        yield from _row(
            f"Gramian of g and f, 2K <= 10, {dtype} / reading", "<= 1.15", ratios("gramian_pair", dtype, 10)
        )
        yield from _row(
            f"Gramian of g and f, 2K >= 16, {dtype}, share of the FMA peak", "", shares("gramian_pair", dtype), "{:.0f} %",
            larger=True,
        )  # fmt: skip
        for kernel, name in (("gramian", "Gramian"), ("gramian_pair", "Gramian of g and f")):
            for least, most, size in ((1, 10, "K <= 10"), (16, 1 << 30, "K >= 16")):
                values = works(kernel, dtype, least, most)
                yield from _row(f"{name}, {size}, {dtype} / {kernels.WORK}", "", values)
        for kernel in ("combine", "combine_pair", "perturb", "copy"):
            yield from _row(f"{kernel}, {dtype} / its traffic", "<= 1.15", ratios(kernel, dtype, 1 << 30))
    pieces = [case["times"] for case in section["cases"] if case["layout"] != "one"]
    yield from _row(
        "Gramian in many tensors / in one, C interface", "<= 1.30", [t[kernels.C]["ratio"]["median"] for t in pieces]
    )
    yield from _row("all threads / one thread, any kernel", "<= 1.05", _threads(plain))


def _threads(plain: list[dict[str, Any]]) -> list[float]:
    keys = ("kernel", "tasks", "numbers", "dtype")
    alone = {tuple(c[k] for k in keys): c["times"][kernels.OURS]["median"] for c in plain if c["threads"] == 1}
    return [
        case["times"][kernels.OURS]["median"] / alone[key]
        for case in plain
        if case["threads"] > 1 and (key := tuple(case[k] for k in keys)) in alone
    ]


def _steps(section: dict[str, Any] | None) -> Iterable[list[str]]:
    if section is None:
        return
    large = [case["times"] for case in section["arithmetic"] if case["numbers"] >= 1_000_000]

    def times(name: str) -> list[float]:
        return [t[name]["median"] / t[steps.OURS]["median"] for t in large if name in t]

    what = "step outside passes, P >= 1,000,000"
    yield from _row(f"{what}: reference / flatmtl", ">= 5", times(steps.REFERENCE), larger=True)
    yield from _row(f"{what}: torchjd's aggregation of g / flatmtl", ">= 3", times(steps.TORCHJD_ONE), larger=True)
    yield from _row(f"{what}: torchjd's of g and of f / flatmtl", "", times(steps.TORCHJD_BOTH), larger=True)
    yield from _row(f"{what}: flatmtl / sum of floors", "<= 1.25", [t[steps.OURS]["ratio"]["median"] for t in large])
    for case in section["models"]:
        value = case["times"][steps.OURS]["ratio"]["median"]
        yield from _row(
            f"step / forwards and backwards, {case['model']}, {case['tasks']} heads", "<= 1.03", [value], "{:.3f}"
        )
    for case in section["memory"]:
        base, row = case["peaks"][steps.SUM], case["row"]
        count = case["tasks"]  # narrow: 2K rows of half the size, the last of them wide as it comes, and the copy
        for name, rows in ((steps.OURS, 2 * count + 1), (steps.NARROW, count + 1.5), (steps.PLAIN, count + 1)):
            if base is not None and case["peaks"].get(name) is not None:
                target = rows + (case["largest"] + MEGABYTE) / row
                yield from _row(
                    f"peak memory in rows, {name}", f"<= {target:.2f}", [(case["peaks"][name] - base) / row]
                )
