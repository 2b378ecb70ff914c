"""Loads the shared object `_C` (the C core and its torch ops `torch.ops.flatmtl.*`) and describes the ops to torch."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

MINIMUM_TORCH = (2, 10)


def find_library() -> Path:
    """Where the shared object is: `FLATMTL_LIBRARY`, else next to this file, else where an editable install put it."""
    if path := os.environ.get("FLATMTL_LIBRARY"):
        if not Path(path).is_file():
            raise ImportError(f"flatmtl: there is no file {path}, which the environment variable FLATMTL_LIBRARY names")
        return Path(path)
    here = Path(__file__).parent / "_C.so"
    if here.is_file():
        return here
    spec = importlib.util.find_spec(f"{__package__}._C")
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ImportError(
            f"flatmtl: its compiled part {here} is missing. Run `pip install .` in flatmtl's source directory (`make` "
            "builds it without installing), or name a built _C.so in the environment variable FLATMTL_LIBRARY"
        )
    return Path(spec.origin)


def check_torch(version: str = torch.__version__) -> None:
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) < MINIMUM_TORCH:
        raise ImportError(
            f"flatmtl needs torch >= {MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]}; torch {version} is installed in "
            f"{Path(torch.__file__).parent}. Run `pip install --upgrade torch`"
        )


def _load() -> tuple[Path, ctypes.CDLL]:
    check_torch()
    path = find_library()
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        return path, ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(
            f"flatmtl: {path} could not be loaded into torch {torch.__version__}: {error}. Build it again with "
            "`pip install --force-reinstall --no-deps .` in flatmtl's source directory"
        ) from error


LIBRARY_PATH, core = _load()
core.flatmtl_method_name.restype = ctypes.c_char_p
core.flatmtl_weighting_name.restype = ctypes.c_char_p
core.flatmtl_buffer_method_name.restype = ctypes.c_char_p
core.flatmtl_version.restype = ctypes.c_char_p
core.flatmtl_isa.restype = ctypes.c_char_p


def _numbers(name_of: Any) -> dict[str, int]:
    numbers: dict[str, int] = {}
    while (name := name_of(len(numbers))) is not None:
        numbers[name.decode()] = len(numbers)
    return numbers


def state_size(method: int, num_tasks: int) -> int:
    """Doubles of state of one call of a method (`flatmtl_state_size`)."""
    count = ctypes.c_int64()
    if core.flatmtl_state_size(method, num_tasks, ctypes.byref(count), None) < 0:
        raise ValueError(f"flatmtl: no method {method} for {num_tasks} tasks")
    return count.value


# Numbers of the enums in flatmtl.h.
METHODS = _numbers(core.flatmtl_method_name)
WEIGHTINGS = _numbers(core.flatmtl_weighting_name)
BUFFER_METHODS = _numbers(core.flatmtl_buffer_method_name)
COMBINE = {"decomposed": 0, "direct": 1, "second": 2, "each": 3}
ACCUMULATE = {"auto": 0, "f64": 1}
FAMILY_SCALE = {None: 0, "none": 0, "rms": 1}
PARETO_STATIONARY = 1


def isa() -> str:
    """The instruction set that the C core uses: "base", "avx2", "avx512" or "neon"."""
    return str(core.flatmtl_isa().decode())


def weighting_state_size(weighting: int, num_tasks: int) -> int:
    """Numbers of state of a loss weighting."""
    count = ctypes.c_int64()
    if core.flatmtl_weighting_state_size(weighting, num_tasks, ctypes.byref(count), None) < 0:
        raise ValueError(f"num_tasks is {num_tasks}; it must be between 1 and 4096")
    return count.value


def buffer_state_size(method: int, num_tasks: int) -> int:
    """Numbers of state of a buffer method."""
    count = ctypes.c_int64()
    if core.flatmtl_buffer_state_size(method, num_tasks, ctypes.byref(count), None, None) < 0:
        raise ValueError(f"num_tasks is {num_tasks}; it must be between 1 and 4096")
    return count.value


# Fake kernels: dtypes and shapes of the results, for torch.compile, torch.export and meta tensors. The ops that change
# their arguments return nothing, and have nothing to say.

Function = TypeVar("Function", bound=Callable[..., Any])


def fake(name: str) -> Callable[[Function], Function]:
    register: Callable[[Function], Function] = torch.library.register_fake(name)
    return register


def _doubles(like: Tensor | None, *size: int | torch.SymInt) -> Tensor:
    if like is None:
        return torch.empty(size, dtype=torch.float64)
    return like.new_empty(size, dtype=torch.float64)


def _first(*lists: Sequence[Tensor]) -> Tensor | None:
    return next((tensors[0] for tensors in lists if tensors), None)


@fake("flatmtl::gramian")
def _(rows: list[Tensor], num_tasks: int, accumulate: int = 0) -> Tensor:
    return _doubles(_first(rows), num_tasks, num_tasks)


@fake("flatmtl::gramian_pair")
def _(
    loss_rows: list[Tensor], perturbed_rows: list[Tensor], num_tasks: int, accumulate: int = 0, cross: bool = True
) -> Tensor:
    return _doubles(_first(loss_rows), 2 * num_tasks, 2 * num_tasks)


@fake("flatmtl::sq_norms")
def _(rows: list[Tensor], num_tasks: int, params: list[Tensor], eta: float) -> Tensor:
    return _doubles(_first(rows), num_tasks)


@fake("flatmtl::weights")
def _(gramian: Tensor, method: int, options: list[float]) -> Tensor:
    return _doubles(gramian, gramian.shape[0])


@fake("flatmtl::weights_")
def _(gramian: Tensor, method: int, options: list[float], state: Tensor) -> Tensor:
    return _doubles(gramian, gramian.shape[0])


@fake("flatmtl::step_weights")
def _(
    gramian_pair: Tensor, perturbed_gramian: Tensor | None, method: int, options: list[float], combine: int,
    family_scale: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tasks = gramian_pair.shape[0] // 2
    status = gramian_pair.new_empty((2,), dtype=torch.int64)
    return _doubles(gramian_pair, tasks), _doubles(gramian_pair, tasks), status


@fake("flatmtl::step_weights_")
def _(
    gramian_pair: Tensor, perturbed_gramian: Tensor | None, method: int, options: list[float], combine: int,
    family_scale: int, state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tasks = gramian_pair.shape[0] // 2
    status = gramian_pair.new_empty((2,), dtype=torch.int64)
    return _doubles(gramian_pair, tasks), _doubles(gramian_pair, tasks), status


@fake("flatmtl::aggregate")
def _(rows: list[Tensor], num_tasks: int, method: int, options: list[float]) -> list[Tensor]:
    return [torch.empty_like(segment) for segment in rows[: len(rows) // num_tasks]]


@fake("flatmtl::perturb_")
def _(
    params: list[Tensor], saved: list[Tensor], grads: list[Tensor], scale: list[float], adaptive: bool, eta: float
) -> None: ...


@fake("flatmtl::copy_")
def _(to: list[Tensor], source: list[Tensor]) -> None: ...


@fake("flatmtl::combine_")
def _(out: list[Tensor], rows: list[Tensor], num_tasks: int, weights: Tensor) -> None: ...


@fake("flatmtl::combine_pair_")
def _(
    out: list[Tensor], loss_rows: list[Tensor], perturbed_rows: list[Tensor], num_tasks: int, loss_weights: Tensor,
    flat_weights: Tensor,
) -> None: ...  # fmt: skip


@fake("flatmtl::loss_weights")
def _(losses: Tensor, norms: Tensor | None, weighting: int, options: list[float], state: Tensor) -> Tensor:
    return _doubles(losses, losses.shape[0])


@fake("flatmtl::loss_observe")
def _(losses: Tensor, losses_after: Tensor, weighting: int, options: list[float], state: Tensor) -> None: ...


@fake("flatmtl::perturb")
def _(saved: list[Tensor], grads: list[Tensor], scale: list[float], adaptive: bool, eta: float) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in saved]


@fake("flatmtl::combine")
def _(rows: list[Tensor], num_tasks: int, weights: Tensor) -> list[Tensor]:
    return [torch.empty_like(segment) for segment in rows[: len(rows) // num_tasks]]


@fake("flatmtl::combine_pair")
def _(
    loss_rows: list[Tensor], perturbed_rows: list[Tensor], num_tasks: int, loss_weights: Tensor, flat_weights: Tensor
) -> list[Tensor]:
    return [torch.empty_like(segment) for segment in loss_rows[: len(loss_rows) // num_tasks]]


@fake("flatmtl::moving_average_")
def _(
    buffers: list[Tensor], loss_rows: list[Tensor], perturbed_rows: list[Tensor], num_tasks: int, loss_factors: Tensor,
    flat_factors: Tensor, keep: Tensor,
) -> None: ...  # fmt: skip


@fake("flatmtl::excess_")
def _(
    buffers: list[Tensor], loss_rows: list[Tensor], perturbed_rows: list[Tensor], num_tasks: int, loss_factors: Tensor,
    flat_factors: Tensor,
) -> Tensor:  # fmt: skip
    return _doubles(loss_factors, num_tasks)


@fake("flatmtl::cross_gramian")
def _(
    loss_rows: list[Tensor], perturbed_rows: list[Tensor], other_loss_rows: list[Tensor],
    other_perturbed_rows: list[Tensor], num_tasks: int, loss_factors: Tensor, flat_factors: Tensor,
) -> Tensor:  # fmt: skip
    return _doubles(loss_factors, num_tasks, num_tasks)


@fake("flatmtl::graddrop_")
def _(
    out: list[Tensor], loss_rows: list[Tensor], perturbed_rows: list[Tensor], num_tasks: int, loss_factors: Tensor,
    flat_factors: Tensor, leak: Tensor, seed: int, draw: int, call: int, position: int,
) -> None: ...  # fmt: skip


@fake("flatmtl::combine_buffers_")
def _(out: list[Tensor], buffers: list[Tensor], num_tasks: int, weights: Tensor) -> None: ...


@fake("flatmtl::buffer_factors")
def _(losses: Tensor, sq_norms: Tensor, state: Tensor, method: int, options: list[float]) -> tuple[Tensor, Tensor]:
    return _doubles(losses, losses.shape[0]), _doubles(losses, losses.shape[0])


@fake("flatmtl::buffer_weights")
def _(sums: Tensor, state: Tensor, method: int, options: list[float]) -> Tensor:
    return _doubles(sums, sums.shape[0])


@fake("flatmtl::buffer_update")
def _(
    rows: list[Tensor], num_tasks: int, losses: Tensor, method: int, options: list[float], call: int,
    buffers: list[Tensor], state: Tensor,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(segment) for segment in rows[: len(rows) // num_tasks]]
