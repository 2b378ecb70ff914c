"""What `merge` made of the records of runs, a page, as tables, for the terminal and for docs/performance.md."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from . import kernels, steps
from .contenders import AUTHORS, LIBMTL, OURS, PYTORCH_OPTIMIZER, REFERENCE, TORCH, TORCHJD
from .targets import targets

ORDER = (OURS, REFERENCE, TORCHJD, AUTHORS, LIBMTL, PYTORCH_OPTIMIZER, TORCH)
LONG = 40  # a document shows a table of more rows folded


@dataclasses.dataclass
class Table:
    """Cells are text, the first column is set left."""

    name: str
    title: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        if len(self.rows) > LONG:
            return f"<details>\n<summary>{self.title}</summary>\n\n{body}\n\n</details>"
        return f"{self.title}\n\n{body}"


def tables(page: dict[str, Any]) -> list[Table]:
    """All tables that the page has the numbers for."""
    found = [_machine(page), *targets(page, Table)]
    makers: dict[str, Sequence[Callable[[dict[str, Any]], Iterable[Table]]]] = {
        "kernels": (_kernels, _layouts), "solvers": (_solvers,), "aggregation": (_aggregation,),
        "steps": (_arithmetic, _models, _batched, _memory),
    }  # fmt: skip
    for section, functions in makers.items():
        if section in page:
            for function in functions:
                found += function(page[section])
    return [*found, *_growth(page)]


def busy(page: dict[str, Any]) -> str | None:
    """What to say of a machine that had other work when a run began."""
    cores = page["machine"]["cores"]
    loads = [(run["load"], ", ".join(run["parts"])) for run in page["runs"]]
    found = [f"{load:.1f} before {what}" for load, what in loads if load is not None and load > 0.5 * cores]
    if not found:
        return None
    return (
        f"The load was {' and '.join(found)} on {cores} cores: these numbers say little, least those of several threads, "
        "which wait for each other."
    )


def into(text: str, found: Sequence[Table]) -> str:
    """The text with the tables between their markers, `<!-- bench: NAME -->` and `<!-- bench: end -->`. Markers without
    a table keep what is between them; ValueError if there are no markers."""
    by_name: dict[str, list[str]] = {}
    for table in found:
        by_name.setdefault(table.name, []).append(table.markdown())
    pattern = re.compile(r"(<!-- bench: (?!end)(\w+) -->\n)(.*?)(<!-- bench: end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError("there are no markers <!-- bench: NAME --> ... <!-- bench: end -->")

    def fill(match: re.Match[str]) -> str:
        parts = by_name.get(match[2])
        return match[0] if parts is None else match[1] + "\n" + "\n\n".join(parts) + "\n\n" + match[4]

    return pattern.sub(fill, text)


# -- cells --------------------------------------------------------------------------------------------------------------


def seconds(value: float) -> str:
    """With three digits and the unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:#.3g}".rstrip(".") + f" {unit}"
    return f"{value / 1e-9:.3g} ns"


def spread(entry: dict[str, float], text: Callable[[float], str]) -> str:
    return f"{text(entry['median'])} ({text(entry['lower'])} - {text(entry['upper'])})"


def ratio(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def number(value: int) -> str:
    return f"{value:,}"


def _time(times: dict[str, Any], name: str) -> str:
    return seconds(times[name]["median"]) if name in times else ""


def _over(times: dict[str, Any], name: str, other: str | None = None) -> str:
    """The ratio to the base of the case, or to another contender."""
    entry = times.get(name, {})
    found = entry.get("ratio") if other is None else entry.get("ratios", {}).get(other)
    return "" if found is None else spread(found, ratio)


# -- tables -------------------------------------------------------------------------------------------------------------


def _machine(page: dict[str, Any]) -> Table:
    facts = page["machine"]
    rows = [
        ["CPU", f"{facts['cpu']}, {facts['cores']} cores, {facts['system']}"],
        ["instruction set", f"flatmtl {facts['isa']}, torch {facts['torch_isa']}"],
        ["versions", f"flatmtl {facts['flatmtl']}, torch {facts['torch']}, Python {facts['python']}"],
    ]
    for number, run in enumerate(page["runs"], 1):
        several = len(page["runs"]) > 1
        begin = f"run {number}, " if several else ""
        about = f"{run['mode']}, {run['date']}, {run['seconds'] / 60:.0f} min, load before {_load(run)}"
        rows.append([f"run {number}: {', '.join(run['parts'])}" if several else "run", about])
        for limit in run["limits"]:
            count = limit["threads"]
            rows.append(
                [
                    f"{begin}{count} thread" + "s" * (count > 1),
                    f"read {limit['read'] / 1e9:.1f} GB/s, triad {limit['triad'] / 1e9:.1f} GB/s, "
                    f"FMA peak {limit['peak'] / 1e9:.0f} GFLOP/s in float32",
                ]
            )
        if run["probes"] == "torch":
            rows.append([f"{begin}limits", "measured with torch's operations, as no C compiler was found: too low"])
    for name, entry in page["contenders"].items():
        if name != OURS:
            rows.append([name, entry["version"] or f"absent ({entry['absent']})"])
    return Table("machine", "The machine, and the contenders.", ["", ""], rows)


def _load(run: dict[str, Any]) -> str:
    return "unknown" if run["load"] is None else f"{run['load']:.1f}"


def _kernels(section: dict[str, Any]) -> Iterable[Table]:
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for case in section["cases"]:
        if case["layout"] == "one":
            groups.setdefault((case["dtype"], case["threads"]), []).append(case)
    for (dtype, count), cases in groups.items():
        body = []
        for case in sorted(cases, key=lambda c: (kernels.KERNELS.index(c["kernel"]), c["tasks"], c["numbers"])):
            ours = case["times"][kernels.OURS]
            body.append(
                [
                    case["kernel"],
                    "" if case["kernel"] in ("perturb", "copy") else str(case["tasks"]),
                    number(case["numbers"]), seconds(ours["median"]),
                    f"{case['bytes'] / ours['median'] / 1e9:.1f}",
                    f"{100 * case['operations'] / ours['median'] / case['peak']:.0f} %",
                    _over(case["times"], kernels.OURS), _over(case["times"], kernels.OURS, kernels.WORK),
                    _over(case["times"], kernels.TORCH),
                ]
            )  # fmt: skip
        title = f"Kernels, {dtype}, {count} thread{'s' * (count > 1)}; ratios to the plain stream over the same bytes."
        columns = [
            "kernel",
            "K",
            "P",
            "time",
            "GB/s",
            "of FMA peak",
            "flatmtl / floor",
            f"flatmtl / {kernels.WORK}",
            "torch / floor",
        ]
        yield Table("kernels", title, columns, body)


def _layouts(section: dict[str, Any]) -> Iterable[Table]:
    body = []
    for case in section["cases"]:
        if case["layout"] == "one":
            continue
        times, pieces = case["times"], case["tensors"] * case["tasks"]
        shim = (times[kernels.OURS]["median"] - times[kernels.C]["median"]) / pieces
        body.append(
            [
                f"{case['layout']}, {case['tensors']} tensors", str(case["tasks"]), str(case["threads"]),
                _time(times, kernels.C), _over(times, kernels.C), _time(times, kernels.OURS),
                seconds(max(shim, 0.0)), _time(times, kernels.TORCH),
            ]
        )  # fmt: skip
    if body:
        title = "Gramian of rows in many tensors. Ratio: to the C interface on the same numbers in one tensor a row."
        columns = [
            "layout",
            "K",
            "threads",
            "C",
            "C / one tensor",
            "through torch",
            "that, a tensor",
            "torch: cat, J @ J.T",
        ]
        yield Table("layouts", title, columns, body)


def _columns(cases: Sequence[dict[str, Any]]) -> list[str]:
    return [name for name in ORDER if any(name in case["times"] for case in cases)]


def _solvers(section: dict[str, Any]) -> Iterable[Table]:
    names = _columns(section["cases"])
    body = [
        [case["method"], str(case["tasks"]), *(_time(case["times"], name) for name in names)]
        for case in section["cases"]
    ]
    yield Table("solvers", "A solve on a ready Gramian, one thread.", ["method", "K", *names], body)


def _aggregation(section: dict[str, Any]) -> Iterable[Table]:
    names = _columns(section["cases"])
    body = [
        [
            case["method"], str(case["tasks"]),
            number(case["numbers"]) + ("" if case["layout"] == "one" else f" ({case['layout']})"),
            *(_time(case["times"], name) for name in names),
        ]
        for case in section["cases"]
    ]  # fmt: skip
    yield Table("aggregation", "From rows to update.", ["method", "K", "P", *names], body)


def _arithmetic(section: dict[str, Any]) -> Iterable[Table]:
    names = [steps.OURS, steps.REFERENCE, steps.TORCHJD_ONE, steps.TORCHJD_BOTH, steps.FLOORS, steps.PASSES]
    body = [
        [
            case["method"], str(case["tasks"]),
            number(case["numbers"]) + ("" if case["layout"] == "one" else f" ({case['layout']})"),
            str(case["threads"]), *(_time(case["times"], name) for name in names), _over(case["times"], steps.OURS),
        ]
        for case in section["arithmetic"]
    ]  # fmt: skip
    if body:
        title = "A step outside forward and backward, without the wrapped optimizer's update."
        yield Table("arithmetic", title, ["method", "K", "P", "threads", *names, "flatmtl / floors"], body)


def _models(section: dict[str, Any]) -> Iterable[Table]:
    body = [
        [
            f"{case['model']}, {case['tasks']} heads, batch {case['batch']}", number(case["numbers"]),
            *(_time(case["times"], name) for name in (steps.PASSES, OURS, REFERENCE)),
            _over(case["times"], OURS), _over(case["times"], REFERENCE),
        ]
        for case in section["models"]
    ]  # fmt: skip
    if body:
        columns = ["model", "P", steps.PASSES, OURS, REFERENCE, "flatmtl / passes", "reference / passes"]
        yield Table("models", "One step in training, cagrad, plain SGD.", columns, body)


def _batched(section: dict[str, Any]) -> Iterable[Table]:
    plain, *others = steps.BATCHED
    body = [
        [
            str(case["tasks"]), str(case["width"]), *(_time(case["times"], name) for name in steps.BATCHED),
            *(_over(case["times"], name) for name in others),
        ]
        for case in section.get("batched", [])
    ]  # fmt: skip
    if body:
        title = "One step on a perceptron of three layers, a batch of 64, cagrad, plain SGD, by the option `batched`."
        columns = ["K", "width", *steps.BATCHED, *(f"{name} / {plain}" for name in others)]
        yield Table("batched", title, columns, body)


def _memory(section: dict[str, Any]) -> Iterable[Table]:
    for case in section["memory"]:
        base = case["peaks"][steps.SUM]
        body = [
            [
                name,
                "?" if peak is None else f"{peak / 1e6:.1f}",
                "?" if None in (peak, base) else rows_of(peak, base, case),
            ]
            for name, peak in case["peaks"].items()
        ]
        title = (
            f"Peak memory during a step, K = {case['tasks']}, a row of {case['row'] / 1e6:.1f} MB, largest parameter "
            f"{case['largest'] / 1e6:.1f} MB."
        )
        yield Table("memory", title, ["", "MB", f"rows beyond {steps.SUM}"], body)


def rows_of(peak: int, base: int, case: dict[str, Any]) -> str:
    return f"{(peak - base) / case['row']:.2f}"


def _growth(page: dict[str, Any]) -> Iterable[Table]:
    body = []
    for section in ("kernels", "solvers", "aggregation", "steps"):
        for fit in page.get(section, {}).get("fits", []):
            symbol = {"numbers": "P", "tasks": "K"}[fit["against"]]
            rest = {
                k: v
                for k, v in fit.items()
                if k not in ("contender", "against", "exponent", "error", "factor", "points")
            }
            what = ", ".join(
                f"{ {'tasks': 'K', 'numbers': 'P'}[key] } = {value:,}" if key in ("tasks", "numbers")
                else f"{value} threads" if key == "threads" else str(value)
                for key, value in rest.items()
            )  # fmt: skip
            body.append(
                [
                    section,
                    what,
                    fit["contender"],
                    f"{symbol}^{fit['exponent']:.2f} ± {fit['error']:.2f}",
                    str(fit["points"]),
                ]
            )
    if body:
        title = "Growth: least squares of log time against log P or log K; ± is the fit's standard error."
        yield Table("growth", title, ["", "case", "contender", "time grows as", "points"], body)
