"""Contenders timed in turn, medians and quartiles, ratios round by round, and fits of growth."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How long to measure a case: until `seconds` have passed and at least `rounds` rounds are done, `most` at most.
    A sample repeats what is shorter than `sample` seconds."""

    seconds: float
    rounds: int = 5
    most: int = 200
    sample: float = 5e-4


def interleave(
    contenders: Mapping[str, Work], effort: Effort, base: str | None = None, others: Sequence[str] = (),
    less: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Times the contenders in turn, each first as often as last.

    Returns:
        For each the `median`, `lower` and `upper` quartile in seconds of one call, and the number of `rounds`. With
        `base` also `ratio`: the same of its time over that of the contender `base` in the same round, which a machine
        whose speed drifts disturbs least. `ratios` are those to each of `others`. From the time of a contender in
        `less` that of another in the same round is taken away first.
    """
    names = list(contenders)
    loops = {name: _loops(contenders[name], effort.sample) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    end, done = time.perf_counter() + effort.seconds, 0
    while done < effort.rounds or (done < effort.most and time.perf_counter() < end):
        for turn in range(len(names)):
            name = names[(done + turn) % len(names)]
            times[name].append(_timed(contenders[name], loops[name]))
        done += 1
    for name, part in (less or {}).items():
        times[name] = [a - b for a, b in zip(times[name], times[part], strict=True)]
    result: dict[str, dict[str, Any]] = {}
    for name in names:
        result[name] = {**summary(times[name]), "rounds": done}
        if base is not None and name != base:
            result[name]["ratio"] = _ratio(times[name], times[base])
        if others:
            result[name]["ratios"] = {other: _ratio(times[name], times[other]) for other in others if other != name}
    return result


def _ratio(times: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    return summary([a / b for a, b in zip(times, base, strict=True)])


def _loops(work: Work, sample: float) -> int:
    """Warms up, and says how many calls make a sample."""
    work()
    return max(1, math.ceil(sample / max(min(_timed(work, 1), _timed(work, 1)), 1e-9)))


def _timed(work: Work, loops: int) -> float:
    begin = time.perf_counter()
    for _ in range(loops):
        work()
    return (time.perf_counter() - begin) / loops


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return {"median": values[0], "lower": values[0], "upper": values[0]}
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "lower": lower, "upper": upper}


@contextmanager
def threads(number: int) -> Iterator[None]:
    """With so many of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def power_law(x: Sequence[float], y: Sequence[float]) -> dict[str, float] | None:
    """Least squares of log y = log factor + exponent log x, with the exponent's standard `error`; None of fewer than
    three different x. The error is that of the fit's residuals alone."""
    if len(set(x)) < 3:
        return None
    u, v = [math.log(a) for a in x], [math.log(b) for b in y]
    mean_u, mean_v = statistics.fmean(u), statistics.fmean(v)
    square = sum((a - mean_u) ** 2 for a in u)
    exponent = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / square
    residual = sum((b - mean_v - exponent * (a - mean_u)) ** 2 for a, b in zip(u, v, strict=True))
    error = math.sqrt(residual / (len(u) - 2) / square)
    return {"exponent": exponent, "error": error, "factor": math.exp(mean_v - exponent * mean_u), "points": len(u)}


def fits(cases: Sequence[dict[str, Any]], against: str, group: Sequence[str]) -> list[dict[str, Any]]:
    """A power law of every contender's median time against the field `against`, for each group of cases that are equal
    in the fields `group`."""
    points: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for case in cases:
        for name, entry in case["times"].items():
            key = (name, *(case[field] for field in group))
            points.setdefault(key, []).append((float(case[against]), entry["median"]))
    result = []
    for (name, *values), pairs in points.items():
        fit = power_law([x for x, _ in pairs], [y for _, y in pairs])
        if fit is not None:
            fields = dict(zip(group, values, strict=True))
            result.append({"contender": name, "against": against, **fields, **fit})
    return result
