"""State of aggregators that learn from step to step (GradVac), as the optimizer keeps it.

A dictionary of "name", the method's, and one tensor a call of the aggregator within a step, of K x K matrices with a row
and a column a task: "loss", "flat" (m, K, K) for the families, with combine="second" also "both" (m, 2, 2), with "each"
"pairs" (K, m, 2, 2), one a task, and "loss" for the call that joins the tasks. A call that has not come yet has none. The
values are never changed: a step makes new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _state

if TYPE_CHECKING:
    from .aggregators import Aggregator

_CALLS = {
    "decomposed": ["loss", "flat"], "direct": ["loss"], "second": ["loss", "flat", "both"], "each": ["pairs", "loss"],
}  # fmt: skip


def _shape(aggregator: Aggregator, call: str, tasks: int) -> tuple[int, ...]:
    matrices = aggregator.state_size(1)
    return {"both": (matrices, 2, 2), "pairs": (tasks, matrices, 2, 2)}.get(call, (matrices, tasks, tasks))


def gather(
    state: dict[str, Any] | None, aggregator: Aggregator, combine: str, tasks: int, present: Sequence[int]
) -> Tensor | None:
    """What the tasks present need, as the op takes it: one vector, the calls in their order. None if nothing is kept."""
    if aggregator.state_size(1) == 0:
        return None
    parts = []
    for call in _CALLS[combine]:
        value = None if state is None else state.get(call)
        if value is None:
            value = torch.zeros(_shape(aggregator, call, tasks), dtype=torch.float64)
        parts.append(_of_present(value, call, present).reshape(-1))
    return torch.cat(parts)


def scatter(
    state: dict[str, Any] | None, aggregator: Aggregator, combine: str, tasks: int, present: Sequence[int], new: Tensor
) -> dict[str, Any]:
    """A new state: the old one with the entries of the tasks present replaced by what the op has left in `new`."""
    result = {"name": aggregator.name} | (state or {})
    index = torch.tensor(present)
    begin = 0
    for call in _CALLS[combine]:
        old = result.get(call)
        value = torch.zeros(_shape(aggregator, call, tasks), dtype=torch.float64) if old is None else old.clone()
        part = _of_present(value, call, present)
        part = new[begin : begin + part.numel()].view_as(part)
        begin += part.numel()
        if call == "both":
            value.copy_(part)
        elif call == "pairs":
            value[index] = part
        else:
            value[:, index[:, None], index] = part
        result[call] = value
    return result


def _of_present(value: Tensor, call: str, present: Sequence[int]) -> Tensor:
    index = torch.tensor(present)
    if call == "both":
        return value
    return value[index] if call == "pairs" else value[:, index][:, :, index]


def check(aggregator: Aggregator, state: dict[str, Any], tasks: int) -> None:
    """Raises ValueError where a state is not one of `tasks` tasks."""
    for call, value in state.items():
        if call == "name":
            continue
        shape = _shape(aggregator, call, tasks)
        if not isinstance(value, Tensor) or value.shape != shape or value.dtype != torch.float64:
            raise ValueError(
                f"state of the aggregator {aggregator.name!r}: {call!r} is {_state.shown(value)}, but {tasks} tasks need a "
                f"float64 tensor of shape {shape}"
            )
        if not bool((value.abs() <= 1).all()):
            raise ValueError(f"state of the aggregator {aggregator.name!r}: {call!r} holds values beyond [-1, 1]")
