"""The base class of `flatmtl.weightings`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _ops, _state
from ._options import CoreMethod


class Weighting(CoreMethod):
    """Base class. A weighting of the C core is one frozen dataclass here: its fields are the method's options."""

    name: ClassVar[str]
    #: Whether it needs the norms of the shared gradients.
    needs_norms: ClassVar[bool] = False
    #: Whether it learns from the losses after the update, of the same batch: one forward more a step.
    observes: ClassVar[bool] = False
    #: Which losses it is defined for: "" (all), ">= 0" or "> 0".
    domain: ClassVar[str] = ""

    def check_loss(self, loss: float, index: int, task: Any) -> None:
        """Raises ValueError, which names the task, for a loss that the method is not defined for."""
        if (self.domain == "> 0" and not loss > 0.0) or (self.domain == ">= 0" and not loss >= 0.0):
            raise ValueError(
                f"weighting {self.name!r} needs losses {self.domain}, but that of task {task!r} is {loss}; nothing was "
                "changed"
            )

    def check_state(self, state: dict[str, Any], num_tasks: int, params: Sequence[Tensor]) -> None:
        """Raises ValueError, which names the entry, where a loaded state does not fit the number of tasks."""
        _state.float64(state, "values", f"state of the weighting {self.name!r}", self.fresh_state(num_tasks).shape)

    @property
    def number(self) -> int:
        """The weighting's number in the C core (`flatmtl_weighting` in flatmtl.h) and in `torch.ops.flatmtl`."""
        return _ops.WEIGHTINGS[self.name]

    def fresh_state(self, num_tasks: int) -> Tensor:
        """State of a run that begins: (v * num_tasks,) float64 zeros, v vectors one after another."""
        return torch.zeros(_ops.weighting_state_size(self.number, num_tasks), dtype=torch.float64)

    @torch.no_grad()
    def __call__(
        self, losses: Tensor | Sequence[Any], *, norms: Tensor | Sequence[Any] | None = None, state: Tensor | None = None,
        draw: int = 0,
    ) -> Tensor:  # fmt: skip
        """The weights c of this step, (K,) float64 on the CPU; not differentiable.

        Args:
            losses: (K,), or a sequence of K numbers.
            norms: (K,) norms of the gradients, for the methods that need them (GradNorm, EMTL).
            state: of `fresh_state`, changed in place; None starts afresh.
            draw: number of the draw, for RLW.

        Raises:
            RuntimeError: a loss that the method is not defined for, Inf or NaN; the message names the row.
        """
        values = _vector("losses", losses)
        state = self.fresh_state(len(values)) if state is None else state
        if self.needs_norms and norms is None:
            raise TypeError(f"weighting {self.name!r} needs norms=, the norms of the tasks' gradients")
        options = self.option_values(len(values), draw=draw)
        result: Tensor = torch.ops.flatmtl.loss_weights(
            values, None if norms is None else _vector("norms", norms), self.number, options, state
        )
        return result

    @torch.no_grad()
    def observe(self, losses: Tensor | Sequence[Any], losses_after: Tensor | Sequence[Any], state: Tensor) -> None:
        """Learns from the losses of the same batch before and after the update; nothing unless `observes`."""
        values = _vector("losses", losses)
        options = self.option_values(len(values))
        torch.ops.flatmtl.loss_observe(values, _vector("losses_after", losses_after), self.number, options, state)

    def _check(self, name: str, ok: bool, must: str) -> None:
        if not ok:
            raise ValueError(f"{type(self).__name__}: {name} is {getattr(self, name)}; it must be {must}")

    def _positive(self, *names: str) -> None:
        for name in names:
            self._finite(name)
            self._check(name, getattr(self, name) > 0, "positive and finite")

    def _finite(self, *names: str) -> None:
        for name in names:
            object.__setattr__(self, name, float(getattr(self, name)))
            self._check(name, math.isfinite(getattr(self, name)), "finite")

    def _integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        ok = isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**53
        self._check(name, ok, f"an integer, at least {least}")


def _vector(name: str, values: Tensor | Sequence[Any]) -> Tensor:
    if not isinstance(values, Tensor):
        values = torch.tensor([float(value) for value in values], dtype=torch.float64)
    if values.dim() != 1 or len(values) == 0:
        raise ValueError(f"{name} has shape {tuple(values.shape)}; it must be (K,) with K >= 1")
    return values.detach().to("cpu", torch.float64).contiguous()
