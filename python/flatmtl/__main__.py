"""`python -m flatmtl`: the command line."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"python -m flatmtl needs {error.name}: pip install 'flatmtl[cli]'") from None

from . import _compare, _ops
from ._bench import cli as _bench
from ._compare import AUTHORS, PASSES, REFERENCE, WARM_UP, C, Settings

app = typer.Typer(help="flatmtl: flat-minima training for multi-task PyTorch models.", no_args_is_help=True)

Aggregator = Enum("Aggregator", {name: name for name in _ops.METHODS if name != "fixed"}, type=str)  # type: ignore[misc]
Combine = Enum("Combine", {name: name for name in _ops.COMBINE}, type=str)  # type: ignore[misc]
Norm = Enum("Norm", {"separate": "separate", "joint": "joint"}, type=str)
Dtype = Enum("Dtype", {"float32": "float32", "float64": "float64"}, type=str)


@app.callback()
def main() -> None:
    """flatmtl: flat-minima training for multi-task PyTorch models."""


@app.command()
def compare(
    tasks: Annotated[int, typer.Option(min=1, help="Number of tasks.")] = 3,
    width: Annotated[int, typer.Option(min=1, help="Width of the shared layers.")] = 1024,
    depth: Annotated[int, typer.Option(min=1, help="Number of shared layers.")] = 4,
    batch: Annotated[int, typer.Option(min=1, help="Examples in a batch.")] = 64,
    aggregator: Annotated[Aggregator, typer.Option(help="Method that weighs the tasks.")] = Aggregator("cagrad"),
    combine: Annotated[Combine, typer.Option(help="How the two families are combined.")] = Combine("decomposed"),
    norm: Annotated[Norm, typer.Option(help="Norms of shared and own parameters.")] = Norm("separate"),
    rho: Annotated[float, typer.Option(min=0, help="Radius of the perturbation; 0 is none.")] = 0.05,
    adaptive: Annotated[bool, typer.Option("--adaptive", help="Adaptive perturbation (ASAM).")] = False,
    dtype: Annotated[Dtype, typer.Option(help="Of parameters and gradients.")] = Dtype("float32"),
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0 leaves it to torch.")] = 0,
    steps: Annotated[int, typer.Option("--steps", "--repeats", min=1, help="Timed steps of each.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of parameters, batches and draws.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all numbers to this file.")] = None,
    authors_solvers: Annotated[
        bool, typer.Option("--authors-solvers", help="Also run the solver of the method's published code.")
    ] = False,
) -> None:
    """Time the C step against the same algorithm in plain PyTorch (flatmtl.reference), step by step in turn."""
    settings = Settings(
        tasks, width, depth, batch, aggregator.value, combine.value, norm.value, rho, adaptive, dtype.value, threads,
        steps, seed, authors_solvers,
    )  # fmt: skip
    try:
        settings.check()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console = Console()
    with Progress(console=console, transient=True) as bar:
        job = bar.add_task("comparing", total=WARM_UP + steps + len(settings.contenders()) + 1)
        record = _compare.run(settings, lambda what: bar.update(job, advance=1, description=what))
    show(record, console)
    if json_file is not None:
        json_file.write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"All numbers: {json_file}")


def show(record: dict[str, Any], console: Console) -> None:
    """The record of `_compare.run` as a table."""
    settings = Settings(**record["settings"])
    contenders = record["contenders"]
    passes, base = contenders[PASSES]["median"], contenders[REFERENCE]
    table = Table(
        title=f"{settings.tasks} tasks, {record['parameters']:,} parameters in {settings.dtype}, "
        f"{record['threads']} threads, {settings.aggregator}, {settings.combine}, rho {settings.rho:g}"
    )
    for title in ("", "time per step, ms", "quartiles", "of which the step, ms", "peak memory, MB", "difference"):
        table.add_column(title, justify="right" if title else "left")
    labels = {C: "flatmtl (C)", REFERENCE: "reference (PyTorch)", AUTHORS: "reference, authors' solver", PASSES: PASSES}
    for name, entry in contenders.items():
        table.add_row(
            labels[name],
            f"{1e3 * entry['median']:.2f}",
            f"{1e3 * entry['lower']:.2f} - {1e3 * entry['upper']:.2f}",
            "" if name == PASSES else f"{1e3 * (entry['median'] - passes):.2f}",
            "?" if entry["peak"] is None else f"{entry['peak'] / 1e6:.1f}",
            f"{entry['difference']:.1e}" if "difference" in entry and name != REFERENCE else "",
        )
    console.print(table)
    console.print(
        f"The C step takes {contenders[C]['median'] / base['median']:.2f} of the reference's time. Medians of "
        f"{settings.steps} steps; the step is what remains without the median of its forwards and backwards. "
        "Peak memory: during a step above that before it. Difference: largest of a parameter from the reference's "
        f"after {settings.steps + WARM_UP} steps; the largest parameter is {record['scale']:.2g}."
    )


app.command()(_bench.bench)
app.command()(_bench.bench_report)


if __name__ == "__main__":
    app(prog_name="python -m flatmtl")
