"""Flatness modes: where the perturbed gradients of a step are taken.

A mode is an immutable value, its options and nothing else, like an aggregator: `FlatMTL(optimizer, flat="fmtl")` or
`FlatMTL(optimizer, flat=FMTL())`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from ._step import Step


class Flatness:
    """Base class. A mode is one frozen dataclass; its fields are its options."""

    name: ClassVar[str]

    def perturb(self, step: Step) -> None:
        """The perturbed passes over the micro-batches `step.micro`: fills `perturbed` of every task in `step.present`.

        May leave the parameters moved; the step puts them back.
        """
        raise NotImplementedError

    def transform(self, step: Step, pair: Tensor) -> tuple[Tensor, Tensor] | None:
        """Coefficients (p, q), (K,) float64 each, of the flat gradients p_i g_i + q_i f_i that take the place of f_i.

        `pair` is the (2K, 2K) Gramian of (g, f), f = s - g, of the tasks in `step.present`. None leaves f_i as it is.
        """
        return None

    def check_state(self, state: dict[str, Any], num_tasks: int, params: Sequence[Tensor]) -> None:
        """Raises ValueError where a loaded state does not fit the number of tasks or the parameters."""


@dataclass(frozen=True)
class FMTL(Flatness):
    """F-MTL (arXiv 2211.13723, Algorithm 1): every task has its own perturbed point.

    s_i, t_i are the gradients of l_i at (theta + rho g_i/||g_i||, psi_i + rho h_i/||h_i||). Cost of K tasks: K + 1
    forwards, 2K backwards.
    """

    name = "fmtl"

    def perturb(self, step: Step) -> None:
        for state in step.present:
            step.move_along(state)
            step.passes.perturbed(step.micro, [state])
            step.point.restore(state.own)  # the shared ones are overwritten by the next task's move


FLATNESS: dict[str, type[Flatness]] = {cls.name: cls for cls in (FMTL,)}


def get_flatness(flat: str | Flatness) -> Flatness:
    """A mode from its name, or the object itself."""
    if isinstance(flat, Flatness):
        return flat
    if not isinstance(flat, str):
        raise TypeError(f"flat is a name, or an object like FMTL(), not {flat!r}")
    cls = FLATNESS.get(flat)
    if cls is None:
        close = difflib.get_close_matches(flat.lower(), FLATNESS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"there is no flatness mode {flat!r}.{hint} Known: {', '.join(map(repr, FLATNESS))}")
    return cls()
