"""How much to measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .timing import Effort

PARTS: dict[str, tuple[str, ...]] = {
    "kernels": ("float32", "bfloat16", "layouts"), "solvers": (), "aggregation": (),
    "steps": ("arithmetic", "models", "batched", "memory"),
}  # fmt: skip
SECTIONS = tuple(PARTS)
CHOICES = tuple(name for section in PARTS for name in (section, *(f"{section}.{part}" for part in PARTS[section])))

Progress = Callable[[str], None]  # called when a case is done, with what comes next or was done


def chosen(what: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The sections named in `what`, in the order of a run, with their parts. ValueError for a name that there is not."""
    for name in what:
        if name not in CHOICES:
            raise ValueError(f"there is no {name!r} to measure; there are {', '.join(CHOICES)}")
    found = {}
    for section, parts in PARTS.items():
        own = tuple(part for part in parts if section in what or f"{section}.{part}" in what)
        if section in what or own:
            found[section] = own
    return found


@dataclass(frozen=True)
class Mode:
    """Sizes of one run. `memory` bounds the bytes of rows that a case may take."""

    name: str
    effort: Effort
    memory: int
    kernel_tasks: tuple[int, ...]
    kernel_numbers: tuple[int, ...]
    kernel_dtypes: tuple[str, ...]
    one_thread: bool
    solver_tasks: tuple[int, ...]
    aggregation_methods: tuple[str, ...]
    aggregation_tasks: tuple[int, ...]
    aggregation_numbers: tuple[int, ...]
    step_tasks: tuple[int, ...]
    step_numbers: tuple[int, ...]
    resnet_tasks: tuple[int, ...]
    resnet_batch: int
    resnet_size: int
    model_steps: int
    memory_width: int
    batched_widths: tuple[int, ...]


QUICK = Mode(
    "quick", Effort(0.1, 3), 160 << 20,
    kernel_tasks=(3, 8, 16), kernel_numbers=(100_000, 300_000, 1_000_000), kernel_dtypes=("float32",),
    one_thread=False,
    solver_tasks=(2, 5, 10, 20), aggregation_methods=("mgda", "cagrad"), aggregation_tasks=(3,),
    aggregation_numbers=(10_000, 100_000, 1_000_000), step_tasks=(3,), step_numbers=(100_000, 1_000_000),
    resnet_tasks=(2,), resnet_batch=4, resnet_size=32, model_steps=3, memory_width=512, batched_widths=(64,),
)  # fmt: skip
DEFAULT = Mode(
    "default", Effort(0.4, 5), 512 << 20,
    kernel_tasks=(2, 3, 5, 8, 10, 16, 40), kernel_numbers=(100_000, 1_000_000, 10_000_000),
    kernel_dtypes=("float32", "bfloat16"), one_thread=True,
    solver_tasks=(2, 3, 5, 10, 20, 40), aggregation_methods=("sum", "mgda", "pcgrad", "cagrad", "nash_mtl", "upgrad"),
    aggregation_tasks=(2, 3, 10), aggregation_numbers=(10_000, 100_000, 1_000_000, 10_000_000),
    step_tasks=(3, 10), step_numbers=(100_000, 1_000_000, 10_000_000),
    resnet_tasks=(2,), resnet_batch=64, resnet_size=64, model_steps=7, memory_width=1024, batched_widths=(64, 512),
)  # fmt: skip
FULL = Mode(
    "full", Effort(1.5, 7), 3 << 30,
    kernel_tasks=(2, 3, 5, 8, 10, 16, 40), kernel_numbers=(100_000, 1_000_000, 10_000_000, 100_000_000),
    kernel_dtypes=("float32", "bfloat16"), one_thread=True,
    solver_tasks=(2, 3, 5, 10, 20, 40),
    aggregation_methods=("sum", "mgda", "pcgrad", "cagrad", "imtl_g", "nash_mtl", "fairgrad", "upgrad"),
    aggregation_tasks=(2, 3, 5, 10, 20), aggregation_numbers=(10_000, 100_000, 1_000_000, 10_000_000),
    step_tasks=(3, 10), step_numbers=(100_000, 1_000_000, 10_000_000),
    resnet_tasks=(2, 10), resnet_batch=64, resnet_size=64, model_steps=9, memory_width=2048,
    batched_widths=(64, 256, 1024),
)  # fmt: skip
MODES = {mode.name: mode for mode in (QUICK, DEFAULT, FULL)}
