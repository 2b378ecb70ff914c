"""Which parameters are shared and which are one task's own: found from the losses' graphs, and remembered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

SHARED = -1


class Roles:
    """Role of every parameter: SHARED, or the index of the one task that reached it so far.

    Roles only grow: unknown -> one task's own -> shared, and never back. With `shared` given, exactly those parameters
    are shared and every other is own, whatever the graphs say.
    """

    def __init__(self, shared: Iterable[Tensor | nn.Module] | None = None) -> None:
        self.fixed = None if shared is None else _tensors(shared)
        self.of: dict[Tensor, int] = {}

    def grown(self, reached: Sequence[Iterable[Tensor]], roles: dict[Tensor, int] | None = None) -> dict[Tensor, int]:
        """The roles, those given or `self.of`, after task i's loss reached the parameters reached[i]. Changes
        neither."""
        roles = dict(self.of if roles is None else roles)
        for task, params in enumerate(reached):
            for p in params:
                if self.fixed is not None:
                    roles[p] = SHARED if p in self.fixed else roles.get(p, task)
                elif roles.setdefault(p, task) != task:
                    roles[p] = SHARED
        return roles

    def state(self, params: Sequence[Tensor]) -> list[int | None]:
        """One entry a parameter in the order of the param groups: None (never reached), SHARED or the task's index."""
        return [self.of.get(p) for p in params]

    def load(self, state: Sequence[int | None], params: Sequence[Tensor]) -> None:
        """Takes over what `state` gave. With `shared` given, that wins: a role that contradicts it is found anew."""
        loaded = {p: role for p, role in zip(params, state, strict=True) if role is not None}
        if (fixed := self.fixed) is not None:
            loaded = {p: role for p, role in loaded.items() if (role == SHARED) == (p in fixed)}
        self.of = loaded


def _tensors(items: Iterable[Any]) -> set[Tensor]:
    if isinstance(items, (nn.Module, Tensor)):
        items = [items]
    found: set[Tensor] = set()
    for i, item in enumerate(items):
        if isinstance(item, nn.Module):
            found.update(item.parameters())
        elif isinstance(item, Tensor):
            found.add(item)
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Tensor):  # named_parameters()
            found.add(item[1])
        else:
            raise TypeError(f"shared[{i}] must be a parameter or a module, but is {type(item).__name__}")
    return found
