"""The commands `bench` and `bench-report` of `python -m flatmtl`."""

from __future__ import annotations

import json
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .settings import CHOICES, DEFAULT, FULL, MODES, QUICK, SECTIONS

Choice = Enum("Choice", {name: name for name in CHOICES}, type=str)  # type: ignore[misc]

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")]
PlotsFolder = Annotated[Path | None, typer.Option("--plots", help="Draw the pictures into this folder.")]
DocsFile = Annotated[Path | None, typer.Option("--docs", help="Put the tables between the markers of this file.")]


def bench(
    what: Annotated[
        list[Choice] | None,
        typer.Option(help="Sections to run, or parts of them; again for several; all sections by default."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="About a minute.")] = False,
    full: Annotated[bool, typer.Option("--full", help="More and larger cases: about an hour.")] = False,
    json_file: JsonFile = None,
    plots: PlotsFolder = None,
    docs: DocsFile = None,
) -> None:
    """Time kernels, solvers, aggregations and steps beside the machine's limits and other libraries, case by case in
    turn."""
    from . import run

    if quick and full:
        raise typer.BadParameter("--quick and --full exclude each other")

    def save(record: dict[str, Any]) -> None:  # after every section: a run that is cut short has its first ones
        if json_file is not None:
            json_file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    mode = MODES[(QUICK if quick else FULL if full else DEFAULT).name]
    names = [choice.value for choice in what] if what else list(SECTIONS)
    try:
        total = run.count(mode, names)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with warnings.catch_warnings(), Progress(*columns, console=console, transient=True) as bar:
        warnings.simplefilter("ignore")  # of other libraries, about their own dependencies
        job = bar.add_task("benchmark", total=total)
        record = run.run(mode, names, lambda what: bar.update(job, advance=1, description=what), save)
    _report([record], console, plots, docs)
    if json_file is not None:
        console.print(f"All numbers: {json_file}")


def bench_report(
    files: Annotated[
        list[Path],
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="What `bench --json` wrote. Of several, on one machine, the last that has a section gives it.",
        ),
    ],
    plots: PlotsFolder = None,
    docs: DocsFile = None,
) -> None:
    """Show the tables of earlier runs, draw their pictures, or put their tables into a document."""
    _report([json.loads(file.read_text(encoding="utf-8")) for file in files], Console(), plots, docs)


def _report(records: list[dict[str, Any]], console: Console, plots: Path | None, docs: Path | None) -> None:
    from . import report
    from .merge import merge

    try:
        page = merge(records)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    found = report.tables(page)
    if warning := report.busy(page):
        console.print(warning)
    for entry in found:
        table = Table(title=entry.title, title_justify="left")
        for i, column in enumerate(entry.columns):
            table.add_column(column, justify="right" if i else "left", no_wrap=not i and bool(column))
        for row in entry.rows:
            table.add_row(*row)
        console.print(table)
    if docs is not None:
        docs.write_text(report.into(docs.read_text(encoding="utf-8"), found), encoding="utf-8")
        console.print(f"Tables: {docs}")
    if plots is not None:
        from . import plots as drawing

        for path in drawing.draw(page, plots):
            console.print(f"Picture: {path}")
