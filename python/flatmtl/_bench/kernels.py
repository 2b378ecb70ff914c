"""The kernels beside the time of their own memory traffic and the machine's arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from . import machine, rows
from .native import Core
from .probes import Probes
from .settings import PARTS, Mode, Progress
from .timing import Effort, fits, interleave, threads

KERNELS = ("gramian", "gramian_pair", "combine", "combine_pair", "perturb", "copy")
OURS, C, FLOOR, TORCH = "flatmtl", "flatmtl (C)", "floor", "torch"
WORK = "read and multiply"
ONE = "flatmtl (C), one tensor"
BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """`numbers` is P, of one row. A pair has 2 `tasks` rows."""

    kernel: str
    tasks: int
    numbers: int
    dtype: str
    threads: int
    layout: str = "one"

    @property
    def inputs(self) -> int:
        """Rows that are read."""
        return {"gramian_pair": 2 * self.tasks, "combine_pair": 2 * self.tasks, "perturb": 2, "copy": 1}.get(
            self.kernel, self.tasks
        )

    @property
    def outputs(self) -> int:
        return 0 if self.kernel.startswith("gramian") else 1

    @property
    def traffic(self) -> int:
        """Bytes read and written."""
        return (self.inputs + self.outputs) * self.numbers * BYTES[self.dtype]

    @property
    def products(self) -> int:
        """Multiply-adds that a Gramian needs for one number of each row: a triangle; two of a pair, as what lies between
        g and s - g is not asked for. 0 of other kernels."""
        triangle = self.tasks * (self.tasks + 1) // 2
        return {"gramian": triangle, "gramian_pair": 2 * triangle}.get(self.kernel, 0)

    @property
    def operations(self) -> int:
        """Additions and multiplications, a pair's differences with them."""
        differences = self.tasks if self.kernel == "gramian_pair" else 0
        others = {"perturb": 2, "copy": 0}.get(self.kernel, 2 * self.inputs)
        return (2 * self.products + differences if self.products else others) * self.numbers


def part(case: dict[str, Any]) -> str:
    """The part of the section that a case of the record belongs to."""
    return str(case["dtype"] if case["layout"] == "one" else "layouts")


def counts(mode: Mode) -> list[int]:
    """Numbers of threads."""
    return sorted({1, machine.cores()} if mode.one_thread else {machine.cores()})


def plan(mode: Mode, parts: Sequence[str] = PARTS["kernels"]) -> list[Case]:
    """All cases that fit into memory, those of one dtype together."""
    cases = [
        Case(kernel, tasks, numbers, dtype, count)
        for dtype in mode.kernel_dtypes
        for numbers in mode.kernel_numbers
        for kernel in KERNELS
        for tasks in (mode.kernel_tasks if kernel not in ("perturb", "copy") else (1,))
        for count in counts(mode)
    ]
    cases += [
        Case("gramian", tasks, rows.numbers(layout), "float32", count, layout)
        for layout in rows.LAYOUTS[1:]
        for tasks in (3, 10)
        for count in counts(mode)
    ]
    return [case for case in cases if case.traffic <= _memory(mode) and part(dataclasses.asdict(case)) in parts]


def _memory(mode: Mode) -> int:
    _, available = machine.memory()
    return mode.memory if available is None else min(mode.memory, available // 2)


def limits(mode: Mode, probes: Probes, progress: Progress) -> list[dict[str, Any]]:
    """Those of the machine, for each number of threads."""
    found = []
    for count in counts(mode):
        with threads(count):
            bandwidth = probes.bandwidth(max(_memory(mode) >> 20, 8))
            found.append({"threads": count, **bandwidth, "peak": probes.peak(count)})
        progress(f"limits with {count} threads")
    return found


def run(mode: Mode, probes: Probes, progress: Progress, parts: Sequence[str] = PARTS["kernels"]) -> dict[str, Any]:
    """Record of the section: the `cases`, and the `fits`."""
    cases = plan(mode, parts)
    results: list[dict[str, Any]] = []
    arena: rows.Arena | None = None
    for case in cases:
        dtype = getattr(torch, case.dtype)
        if arena is None or arena.dtype != dtype:
            arena = None  # frees the old one first
            own = [other for other in cases if other.dtype == case.dtype]
            count = max(other.inputs * other.numbers for other in own)
            arena = rows.Arena(count, dtype, max(other.outputs * other.numbers for other in own))
        results.append(measure(case, arena, probes, mode.effort))
        progress(f"{case.kernel}, K = {case.tasks}, P = {case.numbers:,}")
    return {"cases": results, "fits": growth(results)}


def growth(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fits against P and against K. copy and perturb have no K, and one K makes no fit: those groups give nothing."""
    plain = [case for case in cases if case["layout"] == "one"]
    return fits(plain, "numbers", ("kernel", "tasks", "dtype", "threads")) + fits(
        plain, "tasks", ("kernel", "numbers", "dtype", "threads")
    )


def measure(case: Case, arena: rows.Arena, probes: Probes, effort: Effort) -> dict[str, Any]:
    with threads(case.threads), torch.no_grad():
        base, contenders = build(case, arena, probes)
        times = interleave(contenders, effort, base, [WORK] if WORK in contenders else [])
    return {
        **dataclasses.asdict(case),
        "tensors": 1 if case.layout == "one" else len(rows.shapes(case.layout)),
        "bytes": case.traffic,
        "operations": case.operations,
        "base": base,
        "times": times,
    }


def build(case: Case, arena: rows.Arena, probes: Probes) -> tuple[str, dict[str, Callable[[], Any]]]:
    """The name of the contender that ratios refer to, and all contenders. What they return is equal, but for that of the
    loops `FLOOR` and `WORK`."""
    matrix = arena.rows(case.inputs, case.numbers)
    out = arena.out(case.numbers)[0] if case.outputs else None
    if case.layout != "one":
        return ONE, _in_pieces(case, matrix, probes)
    floor = probes.read(list(matrix)) if out is None else probes.mix(list(matrix), out)
    contenders: dict[str, Callable[[], Any]] = {FLOOR: floor, OURS: _ours(case, matrix, out)}
    if case.products and (work := probes.multiply(list(matrix), 2 * case.products // case.inputs)) is not None:
        contenders[WORK] = work
    if case.dtype == "float32":  # in bfloat16 torch rounds every result, which is not the same work
        contenders[TORCH] = _torch(case, matrix, out)
    return FLOOR, contenders


def _weights(count: int) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.float64) / count


def _ours(case: Case, matrix: Tensor, out: Tensor | None) -> Callable[[], Any]:
    table, k, w = [[row] for row in matrix], case.tasks, _weights(case.tasks)
    if case.kernel == "gramian":
        return lambda: _native.gramian(table)
    if case.kernel == "gramian_pair":
        return lambda: _native.gramian_pair(table[:k], table[k:], cross=False)
    assert out is not None
    target = [out]
    works: dict[str, Callable[[], None]] = {
        "combine": lambda: _native.combine_(target, table, w),
        "combine_pair": lambda: _native.combine_pair_(target, table[:k], table[k:], w, 0.5 * w),
        "perturb": lambda: _native.perturb_(target, table[0], table[1], [0.05], False, 0.0),
        "copy": lambda: _native.copy_(target, table[0]),
    }
    return _giving(works[case.kernel], out)


def _torch(case: Case, matrix: Tensor, out: Tensor | None) -> Callable[[], Any]:
    """The same in torch's operations, in float32."""
    k, w = case.tasks, _weights(case.tasks).tolist()
    if case.kernel == "gramian":
        return lambda: matrix @ matrix.T
    if case.kernel == "gramian_pair":

        def pair() -> Tensor:
            g, f = matrix[:k], matrix[k:] - matrix[:k]
            return torch.block_diag(g @ g.T, f @ f.T)

        return pair
    assert out is not None
    target = [out]

    def add(row: Tensor, weight: float) -> None:
        torch._foreach_add_(target, [row], alpha=weight)

    def combine() -> None:
        torch._foreach_copy_(target, [matrix[0]])
        torch._foreach_mul_(target, w[0])
        for row, weight in zip(matrix[1:], w[1:], strict=True):
            add(row, weight)

    def combine_pair() -> None:
        torch._foreach_copy_(target, [matrix[0]])
        torch._foreach_mul_(target, 0.5 * w[0])
        for i in range(1, k):
            add(matrix[i], 0.5 * w[i])
        for i in range(k):
            add(matrix[k + i], 0.5 * w[i])

    def perturb() -> None:
        torch._foreach_copy_(target, [matrix[0]])
        add(matrix[1], 0.05)

    works = {
        "combine": combine, "combine_pair": combine_pair, "perturb": perturb,
        "copy": lambda: torch._foreach_copy_(target, [matrix[0]]),
    }  # fmt: skip
    return _giving(works[case.kernel], out)


def _giving(work: Callable[[], object], out: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        work()
        return out

    return call


def _in_pieces(case: Case, matrix: Tensor, probes: Probes) -> dict[str, Callable[[], Any]]:
    """The Gramian of rows in many tensors; in one tensor each; and through torch's dispatcher."""
    core = Core(probes, case.tasks)
    pieces = [rows.cut(row, case.layout) for row in matrix]
    return {
        ONE: core.gramian([[row] for row in matrix]),
        C: core.gramian(pieces),
        OURS: lambda: _native.gramian(pieces),
        TORCH: lambda: _cat_gramian(pieces),
    }


def _cat_gramian(pieces: list[list[Tensor]]) -> Tensor:
    joined = torch.stack([torch.cat([t.view(-1) for t in row]) for row in pieces])
    return joined @ joined.T
