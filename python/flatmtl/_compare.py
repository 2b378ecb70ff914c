"""`python -m flatmtl compare`: the C step and the same algorithm in plain PyTorch, side by side."""

from __future__ import annotations

import dataclasses
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _authors, aggregators, reference
from .optimizer import FlatMTL

C, REFERENCE, AUTHORS, PASSES = "flatmtl", "reference", "authors' solver", "forward/backward alone"
WARM_UP = 2  # steps of every contender that are not timed
CLASSES = 10


@dataclasses.dataclass
class Settings:
    """What to compare on: a network of `depth` ReLU layers of `width`, and a linear head for each of `tasks` tasks."""

    tasks: int = 3
    width: int = 1024
    depth: int = 4
    batch: int = 64
    aggregator: str = "cagrad"
    combine: str = "decomposed"
    norm: str = "separate"
    rho: float = 0.05
    adaptive: bool = False
    dtype: str = "float32"
    threads: int = 0  # 0: torch's own choice
    steps: int = 20
    seed: int = 0
    authors_solvers: bool = False

    def contenders(self) -> list[str]:
        return [C, REFERENCE, AUTHORS] if self.authors_solvers else [C, REFERENCE]

    def check(self) -> None:
        """ValueError for what no contender can run."""
        for name in ("tasks", "width", "depth", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}")
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64, but is {self.dtype!r}")
        if self.aggregator == "fixed":
            raise ValueError("aggregator 'fixed' needs weights: compare sum or mean")
        aggregators.get_aggregator(self.aggregator)
        if self.authors_solvers:
            _authors.solver(self.aggregator)


class Network(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(settings.depth):
            layers += [nn.Linear(settings.width, settings.width), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(settings.width, CLASSES) for _ in range(settings.tasks))

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x)
        return [head(z) for head in self.heads]


class Contender:
    """A model, the same for all at the start, and an optimizer around plain SGD."""

    def __init__(self, name: str, settings: Settings) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.dtype = getattr(torch, settings.dtype)
        self.model = Network(settings).to(self.dtype)
        self.step = self._passes if name == PASSES else self._optimizer(name).step

    def _optimizer(self, name: str) -> Any:
        s = self.settings
        sgd = torch.optim.SGD(self.model.parameters(), lr=0.01)
        options = {"rho": s.rho, "adaptive": s.adaptive, "norm": s.norm, "combine": s.combine, "seed": s.seed}
        if name == C:
            return FlatMTL(sgd, aggregator=s.aggregator, **options)  # type: ignore[arg-type]
        aggregator = _authors.solver(s.aggregator) if name == AUTHORS else s.aggregator
        return reference.FlatMTL(sgd, aggregator=aggregator, **options)  # type: ignore[arg-type]

    def closure(self, step: int) -> Callable[[], list[Tensor]]:
        """The losses on batch number `step`, the same for all contenders."""
        s, g = self.settings, torch.Generator().manual_seed(self.settings.seed * 1_000_003 + step)
        x = torch.randn(s.batch, s.width, generator=g, dtype=self.dtype)
        targets = torch.randint(0, CLASSES, (s.tasks, s.batch), generator=g)
        return lambda: [F.cross_entropy(out, y) for out, y in zip(self.model(x), targets, strict=True)]

    def _passes(self, closure: Callable[[], list[Tensor]]) -> None:
        """The forwards and backwards of a step, and nothing else."""
        trunk, heads = list(self.model.trunk.parameters()), [list(h.parameters()) for h in self.model.heads]
        losses = closure()
        kept = []  # as in a step, K gradients are alive while the others come
        for i, loss in enumerate(losses):
            kept.append(torch.autograd.grad(loss, trunk + heads[i], retain_graph=i + 1 < len(losses)))
        del losses, loss
        for i in range(self.settings.tasks if self.settings.rho > 0 else 0):
            kept.append(torch.autograd.grad(closure()[i], trunk + heads[i]))


def run(settings: Settings, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Times all contenders, step by step in turn, and gives a record for JSON. Times in seconds, memory in bytes.

    The contenders start from equal parameters and see equal batches. `difference` is the largest absolute difference
    of a parameter from the reference's at the end; `scale` is the largest absolute parameter. `peak` is the largest
    resident memory during a step above that before it, each measured in a process of its own; None where it cannot be.
    """
    settings.check()
    with _threads(settings.threads):
        names = [*settings.contenders(), PASSES]
        contenders = {name: Contender(name, settings) for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        for step in range(WARM_UP + settings.steps):
            for turn in range(len(names)):  # every contender comes first as often as last
                name = names[(step + turn) % len(names)]
                closure = contenders[name].closure(step)
                begin = time.perf_counter()
                contenders[name].step(closure)
                elapsed = time.perf_counter() - begin
                if step >= WARM_UP:
                    times[name].append(elapsed)
            progress(f"step {step + 1}")
        threads = torch.get_num_threads()
    base = list(contenders[REFERENCE].model.parameters())
    count = sum(p.numel() for p in base)
    record: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "threads": threads,
        "parameters": count,
        "torch": torch.__version__,
        "scale": max(float(p.detach().abs().max()) for p in base),
        "contenders": {},
    }
    for name in names:
        entry: dict[str, Any] = {"times": times[name], **_summary(times[name])}
        if name != PASSES:
            pairs = zip(contenders[name].model.parameters(), base, strict=True)
            entry["difference"] = max(float((a - b).detach().abs().max()) for a, b in pairs)
        record["contenders"][name] = entry
    del contenders, base
    gc.collect()
    for name in names:
        record["contenders"][name]["peak"] = _peak_in_subprocess(name, settings)
        progress(f"memory of {name}")
    return record


def _summary(times: list[float]) -> dict[str, float]:
    if len(times) == 1:
        return {"median": times[0], "lower": times[0], "upper": times[0]}
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": median, "lower": lower, "upper": upper}


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if number:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- memory -----------------------------------------------------------------------------------------------------------


def _peak_in_subprocess(name: str, settings: Settings) -> int | None:
    command = [sys.executable, "-m", f"{__package__}._compare", name, json.dumps(dataclasses.asdict(settings))]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed:\n{result.stderr}")
    value: int | None = json.loads(result.stdout)
    return value


def _peak_of_a_step(name: str, settings: Settings) -> int | None:
    """Largest resident memory of this process during one step, above that before it."""
    with _threads(settings.threads):
        small = Contender(name, dataclasses.replace(settings, width=8, batch=2))  # loads all code first
        small.step(small.closure(0))
        contender = Contender(name, settings)
        closure = contender.closure(0)
        gc.collect()
        before = _resident()
        peak = _resident_peak_of(lambda: contender.step(closure))
    return None if before is None else max(peak - before, 0)


def _resident() -> int | None:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else None


def _resident_peak_of(work: Callable[[], object]) -> int:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    except OSError:
        work()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    work()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    print(json.dumps(_peak_of_a_step(sys.argv[1], Settings(**json.loads(sys.argv[2])))))
