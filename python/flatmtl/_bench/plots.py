"""Pictures of a page (`merge`), with matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import kernels, steps
from .contenders import AUTHORS, LIBMTL, OURS, PYTORCH_OPTIMIZER, REFERENCE, TORCH, TORCHJD

# One colour for a contender in all pictures (Okabe and Ito's, which colour-blind readers can tell apart).
COLOURS = {
    OURS: "#D55E00", REFERENCE: "#0072B2", TORCHJD: "#009E73", steps.TORCHJD_ONE: "#009E73",
    steps.TORCHJD_BOTH: "#56B4E9", TORCH: "#CC79A7", AUTHORS: "#CC79A7", LIBMTL: "#E69F00",
    PYTORCH_OPTIMIZER: "#999999", kernels.FLOOR: "#000000", steps.FLOORS: "#000000",
    kernels.WORK: "#999999",
}  # fmt: skip


def draw(record: dict[str, Any], folder: Path) -> list[Path]:
    """Writes bench_*.png for what the record holds; the files."""
    try:
        import matplotlib

        matplotlib.use("Agg")
    except ImportError:
        raise RuntimeError("plots need matplotlib: pip install 'flatmtl[bench]'") from None
    folder.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[dict[str, Any]], Any]] = {
        "bench_kernels_p": lambda r: _kernel_panels(r, "numbers"),
        "bench_kernels_k": lambda r: _kernel_panels(r, "tasks"),
        "bench_roofline": _roofline,
        "bench_solvers": _solvers,
        "bench_aggregation": _aggregation,
        "bench_step": _step,
    }
    written = []
    for name, drawing in drawings.items():
        figure = drawing(record)
        if figure is not None:
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=110, bbox_inches="tight")
    return written


def _panels(titles: Sequence[str], x: str) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    columns = min(3, len(titles))
    lines = -(-len(titles) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.9 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title, fontsize=9)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel(x, fontsize=8)
        axis.tick_params(which="both", labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[len(titles) :]:
        axis.set_axis_off()
    for line in range(lines):
        axes[line * columns].set_ylabel("time, s", fontsize=8)
    return figure, axes[: len(titles)]


def _curves(axis: Any, cases: Sequence[dict[str, Any]], against: str, names: Sequence[str]) -> None:
    """Medians as lines, quartiles as bands."""
    if against == "tasks":  # a few small integers: each has its mark
        marks = sorted({case[against] for case in cases})
        axis.set_xticks(marks, [str(mark) for mark in marks])
        axis.set_xticks([], minor=True)
    for name in names:
        points = sorted((case[against], case["times"][name]) for case in cases if name in case["times"])
        if not points:
            continue
        x, entries = [p for p, _ in points], [e for _, e in points]
        style = "--" if name in (kernels.FLOOR, kernels.WORK, steps.FLOORS) else "-"
        colour = COLOURS.get(name, "#666666")
        axis.plot(x, [e["median"] for e in entries], style, marker="o", ms=3, lw=1.3, color=colour, label=name)
        axis.fill_between(
            x, [e["lower"] for e in entries], [e["upper"] for e in entries], color=colour, alpha=0.2, lw=0
        )


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(len(handles), 5),
        fontsize=8,
        frameon=False,
    )


def _kernel_panels(record: dict[str, Any], against: str) -> Any:
    """Time against P at K = 3 (or the K nearest to it), or against K at the P nearest to a million."""
    cases = [c for c in record.get("kernels", {}).get("cases", []) if c["layout"] == "one" and c["dtype"] == "float32"]
    cases = [c for c in cases if c["threads"] == max(x["threads"] for x in cases)]
    if against == "tasks":
        cases = [c for c in cases if c["kernel"] not in ("perturb", "copy")]
    if not cases:
        return None
    fixed, wanted, symbol = ("tasks", 3, "K") if against == "numbers" else ("numbers", 1_000_000, "P")
    groups: dict[str, list[dict[str, Any]]] = {}
    for kernel in kernels.KERNELS:
        own = [c for c in cases if c["kernel"] == kernel]
        if own:
            nearest = min((c[fixed] for c in own), key=lambda v: abs(v - wanted))
            groups[kernel if fixed == "tasks" and nearest == 1 else f"{kernel}, {symbol} = {nearest:,}"] = [
                c for c in own if c[fixed] == nearest
            ]
    figure, axes = _panels(list(groups), "P" if against == "numbers" else "K")
    for axis, group in zip(axes, groups.values(), strict=True):
        _curves(axis, group, against, [kernels.OURS, kernels.TORCH, kernels.FLOOR, kernels.WORK])
    _legend(figure, axes)
    return figure


def _roofline(record: dict[str, Any]) -> Any:
    """Operations a second against operations a byte, below the machine's limits."""
    section = record.get("kernels", {})
    cases = [c for c in section.get("cases", []) if c["layout"] == "one" and c["operations"]]
    if not cases:
        return None
    counts = sorted({c["threads"] for c in cases})
    figure, axes = _panels([f"{n} thread{'s' * (n > 1)}" for n in counts], "operations a byte")
    markers = {"gramian": "o", "gramian_pair": "s", "combine": "^", "combine_pair": "v", "perturb": "D"}
    for axis, count in zip(axes, counts, strict=True):
        limit = next(item for item in section["limits"] if item["threads"] == count)
        own = [c for c in cases if c["threads"] == count]
        intensity = [c["operations"] / c["bytes"] for c in own]
        ends = [
            min(intensity) / 1.5,
            limit["peak"] / limit["read"],
            max(*intensity, limit["peak"] / limit["read"]) * 1.5,
        ]
        axis.plot(ends, [min(limit["read"] * x, limit["peak"]) / 1e9 for x in ends], color="black", lw=1.3)
        for kernel, marker in markers.items():
            for dtype, colour in (("float32", "#D55E00"), ("bfloat16", "#0072B2")):
                points = [
                    (x, c) for x, c in zip(intensity, own, strict=True) if (c["kernel"], c["dtype"]) == (kernel, dtype)
                ]
                if points:
                    axis.scatter(
                        [x for x, _ in points],
                        [c["operations"] / c["times"][kernels.OURS]["median"] / 1e9 for _, c in points],
                        s=14, marker=marker, color=colour, alpha=0.7, lw=0, label=f"{kernel}, {dtype}",
                    )  # fmt: skip
    axes[0].set_ylabel("GFLOP/s", fontsize=8)
    _legend(figure, axes)
    return figure


def _solvers(record: dict[str, Any]) -> Any:
    cases = record.get("solvers", {}).get("cases", [])
    return _by(cases, lambda c: c["method"], "tasks", "K", [OURS, REFERENCE, TORCHJD, AUTHORS])


def _aggregation(record: dict[str, Any]) -> Any:
    cases = [c for c in record.get("aggregation", {}).get("cases", []) if c["layout"] == "one"]
    if not cases:
        return None
    tasks = min({c["tasks"] for c in cases}, key=lambda k: abs(k - 3))
    own = [c for c in cases if c["tasks"] == tasks]
    names = [OURS, REFERENCE, TORCHJD, LIBMTL, PYTORCH_OPTIMIZER, TORCH]
    return _by(own, lambda c: f"{c['method']}, K = {c['tasks']}", "numbers", "P", names)


def _step(record: dict[str, Any]) -> Any:
    cases = [c for c in record.get("steps", {}).get("arithmetic", []) if c["layout"] == "one"]
    cases = [c for c in cases if c["threads"] == max(x["threads"] for x in cases)]
    names = [steps.OURS, steps.REFERENCE, steps.TORCHJD_ONE, steps.TORCHJD_BOTH, steps.FLOORS]
    return _by(cases, lambda c: f"{c['method']}, K = {c['tasks']}", "numbers", "P", names)


def _by(cases: Sequence[dict[str, Any]], title: Callable[[dict[str, Any]], str], against: str, x: str,
        names: Sequence[str]) -> Any:  # fmt: skip
    if not cases:
        return None
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        groups.setdefault(title(case), []).append(case)
    figure, axes = _panels(list(groups), x)
    for axis, group in zip(axes, groups.values(), strict=True):
        _curves(axis, group, against, names)
    _legend(figure, axes)
    return figure
