"""Two-task training on handwritten digits, with and without F-MTL: a table, pictures and a JSON record.

The digits are the 1,797 of scikit-learn (8 x 8). Two of them make a picture; task 1 names the one at the top left, task 2
the one at the bottom right. Each seed draws its own halves of the digits for training and for testing, its own pictures,
initial weights and batches; every method sees the same ones.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import queue
import signal
import statistics
import time
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import flatmtl
import numpy as np
import torch
import torch.nn.functional as F
import typer
from pictures import draw_pairs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor, nn

METHODS = ("sum", "mgda", "pcgrad", "cagrad", "imtl_g", "nash_mtl", "fairgrad")
CANVAS = 10
TEST_PICTURES = 2000
PROBE = 200  # training pictures on which sharpness is measured
BATCH = 50


class Run(NamedTuple):
    """One training."""

    method: str
    rho: float
    adaptive: bool
    seed: int
    pictures: int
    epochs: int
    probe_rho: float


class Data(NamedTuple):
    train_x: Tensor  # N x 1 x CANVAS x CANVAS, float32 in [0, 1]
    train_y: Tensor  # N x 2
    test_x: Tensor
    test_y: Tensor
    train_sources: frozenset[int]  # digits of scikit-learn's data set that training pictures are drawn from
    test_sources: frozenset[int]


def load_data(seed: int, pictures: int) -> Data:
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    parts: list[Tensor] = []
    for half, count in zip(halves, (pictures, TEST_PICTURES), strict=True):
        source = images[half], labels[half]
        x, y = draw_pairs(source, source, count, CANVAS, rng)
        parts += [x.float() / 16, y]
    train, test = (frozenset(int(i) for i in half) for half in halves)
    return Data(parts[0], parts[1], parts[2], parts[3], train, test)


class Network(nn.Module):
    """A small convolutional trunk with BatchNorm, and a linear head for each digit."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = (1, width, 2 * width, 4 * width)
        for i, stride in enumerate((1, 2, 2)):
            convolution = nn.Conv2d(channels[i], channels[i + 1], 3, stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(channels[i + 1]), nn.ReLU()]
        layers += [nn.Flatten(), nn.Linear(4 * width * 3 * 3, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList([nn.Linear(64, 10) for _ in range(2)])

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.trunk(x)
        return [head(features) for head in self.heads]


def task_losses(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    return [F.cross_entropy(output, y[:, i]) for i, output in enumerate(model(x))]


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    """Percent right, for each task."""
    return [100 * (out.argmax(1) == y[:, i]).float().mean().item() for i, out in enumerate(model(x))]


def train(run: Run, report: Any) -> dict[str, Any]:
    """Trains one network; calls report() after every epoch; returns the settings and the curves."""
    start = time.perf_counter()
    data = load_data(run.seed, run.pictures)
    torch.manual_seed(run.seed)
    model = Network()
    optimizer = flatmtl.FlatMTL(
        torch.optim.Adam(model.parameters(), lr=1e-3),
        aggregator=run.method, rho=run.rho, adaptive=run.adaptive, seed=run.seed,
    )  # fmt: skip
    # Sharpness is measured in the same way for every method: by the perturbed pass of a step that is never applied.
    probe = flatmtl.FlatMTL(torch.optim.SGD(model.parameters(), lr=0.0), aggregator="sum", rho=run.probe_rho)
    generator = torch.Generator().manual_seed(run.seed)
    curves: dict[str, list[Any]] = {name: [] for name in ("loss", "conflicts", "sharpness", "train", "test")}
    for _ in range(run.epochs):
        losses, cosines = [], []
        for batch in torch.randperm(run.pictures, generator=generator).split(BATCH):
            x, y = data.train_x[batch], data.train_y[batch]
            optimizer.step(lambda x=x, y=y: task_losses(model, x, y))
            losses.append(optimizer.last["losses"])
            cosines.append(optimizer.last["cosine_loss"][0, 1].item())
        model.eval()
        probe.backward(lambda: task_losses(model, data.train_x[:PROBE], data.train_y[:PROBE]))
        curves["loss"].append(torch.stack(losses).mean(0).tolist())
        curves["conflicts"].append(sum(c < 0 for c in cosines) / len(cosines))
        curves["sharpness"].append(probe.last["sharpness"].tolist())
        curves["train"].append(accuracy(model, data.train_x, data.train_y))
        curves["test"].append(accuracy(model, data.test_x, data.test_y))
        model.train()
        report()
    return run._asdict() | {"seconds": time.perf_counter() - start} | curves


# -- running them all, a process a core: the network is too small to gain from threads --------------------------------

_reports: Any = None


def _start_worker(reports: Any) -> None:
    global _reports
    _reports = reports
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches workers too: they end without a word
    torch.set_num_threads(1)


def _work(index: int, run: Run) -> dict[str, Any]:
    return train(run, lambda: _reports.put(index))


def train_all(runs: list[Run], jobs: int, console: Console) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        whole = progress.add_task(f"{len(runs)} trainings, epochs", total=sum(run.epochs for run in runs))
        bars: dict[int, Any] = {}
        with ProcessPoolExecutor(jobs, context, _start_worker, (reports,)) as pool:
            futures: list[Future[dict[str, Any]]] = [pool.submit(_work, i, run) for i, run in enumerate(runs)]
            try:
                while not all(future.done() for future in futures):
                    try:
                        index = reports.get(timeout=0.2)
                    except queue.Empty:
                        if any(f.exception() for f in wait(futures, 0, FIRST_EXCEPTION).done):
                            break
                        continue
                    run = runs[index]
                    if index not in bars:
                        name = f"  {label(run.method, run.rho)}, seed {run.seed}"
                        bars[index] = progress.add_task(name, total=run.epochs)
                    progress.advance(bars[index])
                    progress.advance(whole)
                    if futures[index].done() or progress.tasks[bars[index]].finished:
                        progress.update(bars[index], visible=False)
                progress.update(whole, completed=sum(run.epochs for run in runs))
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


# -- what is shown ----------------------------------------------------------------------------------------------------


def label(method: str, rho: float) -> str:
    return f"{method} + F-MTL" if rho > 0 else method


def spread(values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def gain(plain: list[float], flat: list[float]) -> str:
    """Mean of the differences seed by seed, with its 95 % confidence interval (Student's t)."""
    differences = [f - p for p, f in zip(plain, flat, strict=True)]
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.2f}"
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]" + (" tie" if abs(mean) <= half else "")


def table(results: list[dict[str, Any]]) -> Table:
    seeds = len({r["seed"] for r in results})
    out = Table(title=f"Test accuracy in % after the last epoch, mean ± standard deviation (seeds: {seeds})")
    for name in ("method", "task 1", "task 2", "mean", "training set", "gain by F-MTL [95 %]"):
        out.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for method in dict.fromkeys(r["method"] for r in results):
        means: dict[bool, list[float]] = {}
        for flat in (False, True):
            rows = sorted((r for r in results if r["method"] == method and (r["rho"] > 0) == flat), key=by_seed)
            final = [r["test"][-1] for r in rows]
            means[flat] = [statistics.mean(f) for f in final]
            cells = [spread([f[i] for f in final]) for i in range(2)]
            cells += [spread(means[flat]), spread([statistics.mean(r["train"][-1]) for r in rows])]
            cells.append(gain(means[False], means[True]) if flat else "")
            out.add_row(label(method, rows[0]["rho"]), *cells, end_section=flat)
    return out


def by_seed(result: dict[str, Any]) -> int:
    return int(result["seed"])


def draw(results: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Learning curves, share of conflicting batches and sharpness: means over seeds, one panel a method."""
    import matplotlib  # after the trainings: it takes a second

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = {
        "learning_curves": ("test", "test accuracy, mean of the tasks (%)", "linear"),
        "conflicts": ("conflicts", "share of batches whose gradients conflict", "linear"),
        "sharpness": ("sharpness", "rise of the loss at the perturbed point, mean of the tasks", "log"),
    }
    methods = list(dict.fromkeys(r["method"] for r in results))
    columns = min(4, len(methods))
    paths = []
    for name, (key, title, scale) in figures.items():
        shape = (math.ceil(len(methods) / columns), columns)
        figure, axes = plt.subplots(
            *shape, figsize=(3 * columns, 2.6 * shape[0] + 0.6), sharex=True, sharey=True, squeeze=False
        )
        for axis, method in zip(axes.flat, methods, strict=False):
            for flat, colour in ((False, "tab:gray"), (True, "tab:blue")):
                rows = [r[key] for r in results if r["method"] == method and (r["rho"] > 0) == flat]
                curves = np.array(rows, dtype=float)
                curves = curves.mean(axis=2) if curves.ndim == 3 else curves  # over the tasks
                epochs = np.arange(1, curves.shape[1] + 1)
                for curve in curves:
                    axis.plot(epochs, curve, color=colour, alpha=0.25, linewidth=0.8)
                axis.plot(epochs, curves.mean(axis=0), color=colour, label="F-MTL" if flat else "plain")
            axis.set(title=method, xlabel="epoch", yscale=scale)
            axis.grid(alpha=0.3)
        for axis in axes.flat[len(methods) :]:
            axis.set_visible(False)
        if key == "test":
            finals = [statistics.mean(r["test"][-1]) for r in results]
            axes.flat[0].set_ylim(min(finals) - 8, min(100.0, max(finals) + 1))
        axes.flat[0].legend(loc="best", fontsize=8)
        figure.suptitle(title)
        figure.tight_layout()
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths


def main(
    out: Annotated[Path, typer.Option(help="Folder for the record and the pictures.")] = Path("runs/demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds instead of minutes: 2 methods, 1 seed, 3 epochs.")
    ] = False,
    methods: Annotated[str | None, typer.Option(help="Aggregators, separated by commas.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds.  [default: 4]")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training set.  [default: 20]")] = None,
    pictures: Annotated[int | None, typer.Option(min=BATCH, help="Training pictures.  [default: 1000]")] = None,
    rho: Annotated[float, typer.Option(min=0.0, help="Radius of F-MTL's perturbation.")] = 0.05,
    adaptive: Annotated[bool, typer.Option("--adaptive", help="ASAM; wants a larger rho, say 2.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes.  [default: one a core, at most 8]")] = None,
) -> None:
    """Trains a two-task network on pictures of two handwritten digits, with and without F-MTL."""
    names = methods.split(",") if methods else list(METHODS[:4:3] if quick else METHODS)
    if unknown := set(names) - set(METHODS):
        raise typer.BadParameter(f"unknown: {', '.join(sorted(unknown))} (known: {', '.join(METHODS)})")
    if rho == 0.0:
        raise typer.BadParameter("rho must be greater than 0: the runs without F-MTL are made anyway")
    if pictures and pictures % BATCH == 1:
        raise typer.BadParameter(f"pictures must not be 1 more than a multiple of {BATCH}: BatchNorm needs 2")
    seeds, epochs, pictures = (
        seeds or (1 if quick else 5),
        epochs or (3 if quick else 20),
        pictures or (200 if quick else 1000),
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = jobs or min(cores, 8)
    runs = [
        Run(method, radius, adaptive, seed, pictures, epochs, 0.05)
        for seed in range(seeds) for method in names for radius in (rho, 0.0)
    ]  # fmt: skip
    console = Console()
    console.print(
        f"{len(runs)} trainings of {epochs} epochs on {pictures} pictures (tested on {TEST_PICTURES}), "
        f"rho = {rho:g}{', adaptive' if adaptive else ''}, {min(jobs, len(runs))} processes"
    )
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    results = train_all(runs, min(jobs, len(runs)), console)
    seconds = time.perf_counter() - start
    # As wide as it is, where the output is a file: cut columns help nobody.
    (console if console.is_terminal else Console(width=120)).print(table(results))
    console.print(
        "Gain: difference of the means, seed by seed, with its 95 % confidence interval; 'tie' where that holds 0."
    )
    record = {
        "flatmtl": flatmtl.__version__, "torch": torch.__version__, "cores": cores, "jobs": jobs, "seconds": seconds,
        "batch": BATCH, "test_pictures": TEST_PICTURES, "runs": results,
    }  # fmt: skip
    path = out / "record.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1))
    partial.replace(path)
    saved = [path, *draw(results, out)]
    console.print(f"{seconds:.0f} s of training. Saved: {', '.join(str(p) for p in saved)}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
