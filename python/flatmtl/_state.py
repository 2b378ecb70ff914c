"""Reading states that somebody may have spoiled: what is missing or of another kind is named in a ValueError."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def entry(state: dict[str, Any], key: str, what: str) -> Any:
    """state[key]. `what` names the state in the message."""
    if not isinstance(state, dict):
        raise ValueError(f"{what} is {shown(state)}; it must be a dict")
    if key not in state:
        raise ValueError(f"{what} has no {key!r}")
    return state[key]


def number(state: dict[str, Any], key: str, what: str) -> float:
    """A finite number >= 0."""
    value = entry(state, key, what)
    if not is_number(value):
        raise ValueError(f"{what}: {key!r} is {shown(value)}; it must be a finite number >= 0")
    return float(value)


def integer(state: dict[str, Any], key: str, what: str, limit: int | None = None) -> int:
    """An integer >= 0, below the limit if there is one."""
    value = entry(state, key, what)
    if not is_integer(value) or (limit is not None and value >= limit):
        below = "" if limit is None else f" and below {limit}"
        raise ValueError(f"{what}: {key!r} is {shown(value)}; it must be an integer, at least 0{below}")
    return int(value)


def one_a_task(state: dict[str, Any], key: str, what: str, num_tasks: int, integers: bool = False) -> None:
    """A list of numbers >= 0, one a task."""
    values = entry(state, key, what)
    ok = is_integer if integers else is_number
    if not isinstance(values, (list, tuple)) or len(values) != num_tasks or not all(ok(value) for value in values):
        kind = "integers" if integers else "finite numbers"
        raise ValueError(
            f"{what}: {key!r} is {shown(values)}; it must be a list of {num_tasks} {kind} >= 0, one a task"
        )


def float64(state: dict[str, Any], key: str, what: str, shape: Sequence[int]) -> Tensor:
    """A float64 tensor of that shape, of finite numbers."""
    value = entry(state, key, what)
    if not isinstance(value, Tensor) or value.dtype != torch.float64 or value.shape != torch.Size(shape):
        raise ValueError(f"{what}: {key!r} is {shown(value)}; it must be a float64 tensor of shape {tuple(shape)}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{what}: {key!r} holds Inf or NaN")
    return value


def rows(state: dict[str, Any], key: str, what: str, num_tasks: int, params: Sequence[Tensor]) -> None:
    """A list of rows, one a task: lists of one tensor, or None, a parameter. Parameters added later may lack."""
    value = entry(state, key, what)
    if not isinstance(value, list) or len(value) != num_tasks:
        raise ValueError(f"{what}: {key!r} is {shown(value)}; it must be a list of {num_tasks} rows, one a task")
    for k, one in enumerate(value):
        row(one, f"{what}: {key!r}[{k}]", params)


def row(value: Any, what: str, params: Sequence[Tensor]) -> None:
    """A list of one tensor, or None, a parameter."""
    if not isinstance(value, list) or len(value) > len(params):
        raise ValueError(f"{what} is {shown(value)}; it must be a list of {len(params)} tensors, one a parameter")
    for i, (item, p) in enumerate(zip(value, params, strict=False)):
        if item is not None:
            like(item, f"{what}[{i}]", p, i)


def like(value: Any, what: str, param: Tensor, index: int) -> None:
    """A floating-point tensor of the shape of a parameter."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape != param.shape:
        raise ValueError(
            f"{what} is {shown(value)}; it must be a floating-point tensor of shape {tuple(param.shape)}, that of parameter "
            f"{index}"
        )


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value < math.inf


def shown(value: Any) -> str:
    """A value for a message: tensors and containers by what they are, not by what they hold."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, (list, tuple, dict, bytes)) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, (list, tuple)):
        items = ", ".join(shown(item) for item in value)
        return f"[{items}]" if isinstance(value, list) else f"({items})"
    if isinstance(value, dict):
        return f"a dict with {', '.join(map(repr, value)) or 'nothing'}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
