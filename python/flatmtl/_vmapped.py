"""The perturbed passes of several tasks as one: the closure under `torch.vmap` over stacked parameters.

The closure knows nothing of it: while it runs, every call of a torch function gets, in place of a parameter, its slice
of the stack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import _losses
from ._losses import Task


class _InPlaceOf(TorchFunctionMode):
    """Hands out other tensors where a call's arguments name these."""

    def __init__(self, others: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.others = others  # by id

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self._replaced(args), self._replaced(kwargs or {})
        if func is F.batch_norm and kwargs.get("training"):  # does not read its running statistics
            args = (args[0], None, None, *args[3:])
        return func(*args, **kwargs)

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.others.get(id(value), value)
        if type(value) in (tuple, list):
            return type(value)(self._replaced(x) for x in value)
        if type(value) is dict:
            return {key: self._replaced(x) for key, x in value.items()}
        return value


def losses(
    call: Callable[[], Any], tensors: Sequence[Tensor], stacks: Sequence[Tensor], tasks: Sequence[Task],
    wanted: Sequence[int], *, same_random: bool,
) -> Tensor:  # fmt: skip
    """The losses of the wanted tasks, (n,), with a graph: the k-th where each tensor has the value `stack[k]`.

    Args:
        call: evaluates the closure and gives the container of its losses.
        stacks: (n, *shape) for each of the tensors.
        tasks: names of all tasks, and `wanted` the places of n of them.
        same_random: whether all draw the same random numbers (dropout).
    """

    def run(*slices: Tensor) -> Tensor:
        with _InPlaceOf({id(t): s for t, s in zip(tensors, slices, strict=True)}):
            values = _losses.values(call())
        for i in wanted:
            value = values[i]
            if value is None:
                raise RuntimeError(f"loss of task {tasks[i]!r} is None in the perturbed pass only")
            _losses.check_scalar(tasks[i], value)
        return torch.stack([values[i] for i in wanted])  # type: ignore[misc]

    with torch.enable_grad():
        return torch.vmap(run, randomness="same" if same_random else "different")(*stacks).diagonal()
