"""Whole steps: their arithmetic alone, one step on real models, and peak memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatmtl

from .. import _compare, reference
from . import contenders, machine, rows
from .models import Perceptron, ResNet18, Transformer
from .probes import Probes
from .settings import PARTS, Mode, Progress
from .timing import Effort, fits, interleave, threads

OURS, REFERENCE, FLOORS = contenders.OURS, contenders.REFERENCE, "sum of floors"
TORCHJD_ONE, TORCHJD_BOTH = "torchjd, rows g alone", "torchjd, g and f"
PASSES = "forwards and backwards"
METHODS = ("mgda", "cagrad")
LAYOUT = "ResNet-18"

Closure = Callable[[], list[Tensor]]


# -- arithmetic alone ---------------------------------------------------------------------------------------------------


class _Ready(torch.autograd.Function):
    """A loss whose gradient is there already: the row that it is given."""

    @staticmethod
    def forward(ctx: Any, row: Sequence[Tensor], *params: Tensor) -> Tensor:
        ctx.row = row
        return torch.ones(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return (None, *ctx.row)


class ReadyRows:
    """Parameters, and a closure whose K losses have the rows g as gradients when it is called first, the rows s later.

    What `FlatMTL.backward` takes beyond `passes` is the step outside forward and backward and without the wrapped
    optimizer's update.
    """

    def __init__(self, params: Sequence[Tensor], g: Sequence[Sequence[Tensor]], s: Sequence[Sequence[Tensor]]) -> None:
        self.params = [nn.Parameter(p.clone()) for p in params]
        self.g, self.s, self.calls = g, s, 0

    def closure(self) -> list[Tensor]:
        found = self.g if self.calls == 0 else self.s
        self.calls += 1
        return [_Ready.apply(row, *self.params) for row in found]  # type: ignore[no-untyped-call]

    def passes(self) -> None:
        """The K + 1 forwards and 2K backwards of a step, which compute nothing."""
        self.calls = 0
        losses = self.closure()
        for loss in losses:
            torch.autograd.grad(loss, self.params)
        for i in range(len(losses)):
            torch.autograd.grad(self.closure()[i], self.params)

    def step(self, optimizer: Any) -> list[Tensor]:
        """One step's update."""
        self.calls = 0
        optimizer.backward(self.closure)
        return [p.grad for p in self.params if p.grad is not None]


def arithmetic(
    method: str, tasks: int, numbers: int, layout: str, probes: Probes, effort: Effort, count: int
) -> dict[str, Any]:
    """Times of the step less those of its forwards and backwards, for one method; the ratios are to the sum of the
    floors: reading each g_i for its norm; saving, moving K times and restoring the parameters; reading g and s for the
    Gramians, and again for the update that is written."""
    k = tasks
    with threads(count):
        arena = rows.Arena((2 * k + 1) * numbers, out=2 * numbers)
        *matrix, theta = arena.rows(2 * k + 1, numbers)
        g, s = ([rows.cut(row, layout) for row in half] for half in (matrix[:k], matrix[k:]))
        saved, out = arena.out(numbers, 2)
        loss, perturbed = arena.rows(2 * k, numbers).split(k)
        works: dict[str, Callable[[], Any]] = {}
        for name, optimizer in ((OURS, flatmtl.FlatMTL), (REFERENCE, reference.FlatMTL)):
            # the reference writes f over s, which it owns in training: it gets a copy
            ready = ReadyRows(rows.cut(theta, layout), g, s if name == OURS else [[t.clone() for t in r] for r in s])
            wrapped: Any = optimizer(torch.optim.SGD(ready.params, lr=0.0), aggregator=method, rho=0.05)
            works[name] = partial(ready.step, wrapped)
        works[PASSES] = ReadyRows(rows.cut(theta, layout), g, s).passes
        found, absent = contenders.aggregations(method, k)
        if (theirs := found.get(contenders.TORCHJD)) is not None:
            works[TORCHJD_ONE] = lambda: theirs(loss)
            works[TORCHJD_BOTH] = lambda: theirs(loss) + theirs(perturbed - loss)
        copy, read, mix = probes.mix([theta], saved), probes.read(matrix), probes.mix(matrix, out)
        norms, moves = probes.read(matrix[:k]), [probes.mix([theta, row], out) for row in matrix[:k]]

        def floors() -> None:
            copy()
            norms()
            for move in moves:
                move()
            copy()
            read()
            mix()

        works[FLOORS] = floors
        times = interleave(works, effort, FLOORS, less=dict.fromkeys((OURS, REFERENCE), PASSES))
    return {
        "method": method, "tasks": k, "numbers": numbers, "layout": layout, "threads": count, "times": times,
        "absent": absent,
    }  # fmt: skip


# -- real models ----------------------------------------------------------------------------------------------------


def _resnet(tasks: int, batch: int, size: int) -> tuple[nn.Module, Tensor]:
    return ResNet18([10] * tasks), torch.randn(batch, 3, size, size)


def _transformer(tasks: int, batch: int, size: int) -> tuple[nn.Module, Tensor]:
    model = Transformer([10] * tasks, length=size)
    return model, torch.randint(model.vocabulary, (batch, size))


def _perceptron(tasks: int, batch: int, size: int) -> tuple[nn.Module, Tensor]:
    return Perceptron([10] * tasks, size), torch.randn(batch, size)


MODELS = {"ResNet-18": _resnet, "transformer": _transformer, "perceptron": _perceptron}
BATCHED: dict[str, bool | str] = {"batched=False": False, "batched=True": True, "batched='passes'": "passes"}


class Trained:
    """A model in training, and the ways of making a step with it. `bare` makes its forwards and backwards alone."""

    def __init__(self, name: str, tasks: int, batch: int, size: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model, self.x = MODELS[name](tasks, batch, size)
        self.targets = torch.randint(10, (tasks, batch))
        params = list(self.model.parameters())
        heads: Any = self.model.heads
        self.own = [list(head.parameters()) for head in heads]
        theirs = {p for head in self.own for p in head}
        self.shared = [p for p in params if p not in theirs]

    def closure(self) -> list[Tensor]:
        outputs = self.model(self.x)
        return [F.cross_entropy(out, y) for out, y in zip(outputs, self.targets, strict=True)]

    def bare(self, perturbed: bool = True) -> None:
        """K + 1 forwards and 2K backwards; without `perturbed` one forward and K backwards."""
        losses, kept = self.closure(), []  # as in a step, K gradients are alive while the others come
        for i, own in enumerate(self.own):
            kept.append(torch.autograd.grad(losses[i], self.shared + own, retain_graph=i + 1 < len(losses)))
        del losses
        for i, own in enumerate(self.own if perturbed else []):
            kept.append(torch.autograd.grad(self.closure()[i], self.shared + own))

    def optimizer(self, name: str, rho: float = 0.05, **options: Any) -> Any:
        wrapper: Any = flatmtl.FlatMTL if name == OURS else reference.FlatMTL
        return wrapper(torch.optim.SGD(self.model.parameters(), lr=1e-3), aggregator="cagrad", rho=rho, **options)


def model_step(name: str, tasks: int, batch: int, size: int, effort: Effort, count: int) -> dict[str, Any]:
    """Times of a step with plain SGD around it, beside the forwards and backwards alone."""
    with threads(count):
        works: dict[str, Callable[[], Any]] = {}
        for contender in (PASSES, OURS, REFERENCE):
            trained = Trained(name, tasks, batch, size)
            if contender == PASSES:
                works[contender] = trained.bare
                continue
            optimizer = trained.optimizer(contender)
            works[contender] = partial(optimizer.step, trained.closure)
        numbers = sum(p.numel() for p in trained.model.parameters())
        times = interleave(works, effort, PASSES)
    return {
        "model": name, "tasks": tasks, "batch": batch, "size": size, "numbers": numbers, "threads": count,
        "times": times,
    }  # fmt: skip


def batched_step(tasks: int, width: int, effort: Effort, count: int) -> dict[str, Any]:
    """Times of a step on a perceptron by the option `batched`; ratios to "batched=False"."""
    batch = 64
    with threads(count):
        works: dict[str, Callable[[], Any]] = {}
        for name, value in BATCHED.items():
            trained = Trained("perceptron", tasks, batch, width)
            works[name] = partial(trained.optimizer(OURS, batched=value).step, trained.closure)
        times = interleave(works, effort, "batched=False")
    return {"tasks": tasks, "width": width, "batch": batch, "threads": count, "times": times}


# -- memory -----------------------------------------------------------------------------------------------------------

SUM = "sum(losses).backward()"
PLAIN, NARROW = f"{OURS}, rho = 0", f"{OURS}, rows_dtype = bfloat16"


def memory(tasks: int, width: int) -> dict[str, Any]:
    """Peaks of resident memory during a step above that before it, each in a process of its own, in bytes; `row` is the
    size of one gradient of the shared parameters. None where it cannot be measured."""
    peaks = {name: _in_process(name, tasks, width) for name in (SUM, OURS, NARROW, PLAIN, REFERENCE)}
    row = 4 * 4 * (width * width + width)
    return {"tasks": tasks, "width": width, "row": row, "largest": 4 * width * width, "peaks": peaks}


def _in_process(name: str, tasks: int, width: int) -> int | None:
    command = [sys.executable, "-m", f"{__package__}.steps", name, str(tasks), str(width)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed:\n{result.stderr}")
    value: int | None = json.loads(result.stdout)
    return value


def _peak(name: str, tasks: int, width: int) -> int | None:
    """In this process, on the network of `python -m flatmtl compare` with 4 layers."""

    def make(width: int) -> Callable[[], object]:
        contender = REFERENCE if name == REFERENCE else OURS
        rho = 0.0 if name == PLAIN else 0.05
        subject = _compare.Contender(contender, _compare.Settings(tasks=tasks, width=width, batch=16, rho=rho))
        closure = subject.closure(0)
        if name == NARROW:
            sgd = torch.optim.SGD(subject.model.parameters(), lr=0.01)
            subject.step = flatmtl.FlatMTL(sgd, rho=rho, rows_dtype=torch.bfloat16).step
        if name != SUM:
            return lambda: subject.step(closure)

        def work() -> None:
            torch.stack(closure()).sum().backward()
            subject.model.zero_grad()

        return work

    small = make(8)  # loads all code first
    small()
    work = make(width)
    before = _compare._resident()
    peak = _compare._resident_peak_of(work)
    return None if before is None else max(peak - before, 0)


# -- the section ------------------------------------------------------------------------------------------------------


Todo = tuple[str, Callable[[Probes], dict[str, Any]]]


def plan(mode: Mode, parts: Sequence[str] = PARTS["steps"]) -> list[Todo]:
    """What to do, one thing after another: the list of the record that it belongs to, and what gives its entry."""
    count, effort = machine.cores(), mode.effort
    todo: list[Todo] = []

    def one(method: str, tasks: int, numbers: int, layout: str, count: int) -> None:
        if 4 * numbers * (4 * tasks + 6) <= 4 * mode.memory:
            todo.append(("arithmetic", lambda p: arithmetic(method, tasks, numbers, layout, p, effort, count)))

    for method in METHODS:
        for tasks in mode.step_tasks:
            for numbers in mode.step_numbers:
                for number in sorted({1, count} if mode.one_thread else {count}):
                    one(method, tasks, numbers, "one", number)
            if mode.name != "quick":
                one(method, tasks, rows.numbers(LAYOUT), LAYOUT, count)
    steps = Effort(0.0, mode.model_steps)
    for tasks in mode.resnet_tasks:
        arguments = ("ResNet-18", tasks, mode.resnet_batch, mode.resnet_size, steps, count)
        todo.append(("models", lambda _, arguments=arguments: model_step(*arguments)))  # type: ignore[misc]
    todo.append(("models", lambda _: model_step("transformer", 3, mode.resnet_batch, 32, steps, count)))
    for tasks in mode.step_tasks:
        for width in mode.batched_widths:
            todo.append(("batched", lambda _, t=tasks, w=width: batched_step(t, w, effort, count)))  # type: ignore[misc]
    todo.append(("memory", lambda _: memory(3, mode.memory_width)))
    return [(part, work) for part, work in todo if part in parts]


def run(mode: Mode, probes: Probes, progress: Progress, parts: Sequence[str] = PARTS["steps"]) -> dict[str, Any]:
    record: dict[str, Any] = {part: [] for part in parts}
    for part, work in plan(mode, parts):
        record[part].append(work(probes))
        progress(f"step: {part}")
    return {**record, "fits": growth(record.get("arithmetic", []))}


def growth(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    plain = [case for case in cases if case["layout"] == "one"]
    return fits(plain, "numbers", ("method", "tasks", "threads"))


if __name__ == "__main__":
    print(json.dumps(_peak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
