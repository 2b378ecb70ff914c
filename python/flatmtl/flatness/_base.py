"""The base class of flatness modes, and what several of them share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .._options import HasOptions

if TYPE_CHECKING:
    from .._step import Step
    from .._task import TaskState


class Flatness(HasOptions):
    """Base class. A mode is one frozen dataclass; its fields are its options."""

    name: ClassVar[str]
    #: Whether the perturbed points depend on rho, so that rho = 0 means no perturbed passes.
    uses_rho: ClassVar[bool] = True
    #: Whether a step leaves something for the next, so that it cannot be made once a micro-batch.
    has_state: ClassVar[bool] = False
    #: Whether every task has a point of its own that is known before the first perturbed pass (`Step.perturb_each`).
    points_known: ClassVar[bool] = False
    #: Whether `FlatMTL(features=)` must be given for the mode itself.
    needs_features: ClassVar[bool] = False
    #: What `combine=None` means.
    default_combine: ClassVar[str] = "decomposed"

    def needs_task_gradients(self, combine: str) -> bool:
        """Whether the g_i are needed one by one. If not, the unperturbed pass makes one backward, of their sum."""
        return True

    def works_at_features(self, combine: str) -> bool:
        """Whether perturbed gradients may stop at the features: one point for all tasks, and nothing but the s_i."""
        return False

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

    @property
    def needs_cross_products(self) -> bool:
        """Whether `transform` or `finish` look at the <g_i, f_j> in `pair`, which are 0 otherwise."""
        return type(self).transform is not Flatness.transform or type(self).finish is not Flatness.finish

    def finish(self, step: Step, pair: Tensor) -> None:
        """Called last: writes what the mode's state becomes to `step.new_states["flat"]`. May use up the gradients."""

    def check_state(self, state: dict[str, Any], num_tasks: int, params: Sequence[Tensor]) -> None:
        """Raises ValueError, which names the entry, where a loaded state does not fit the number of tasks or the
        parameters, or lacks something."""

    @property
    def _what(self) -> str:
        """The mode's state, for messages."""
        return f"state of the flatness mode {self.name!r}"


def sums(step: Step, pair: Tensor) -> tuple[float, float, float]:
    """<g, g>, <g, f>, <f, f> of the sums g and f over the present tasks, shared and own parameters together."""
    count = len(step.present)
    common = _common_products(step)
    if common is not None:
        pair = pair + common
    gg = float(pair[:count, :count].sum())
    gf = float(pair[:count, count:].sum())
    ff = float(pair[count:, count:].sum())
    for i in range(count):
        own = own_products(step, i)
        gg, gf, ff = gg + own[0], gf + own[1], ff + own[2]
    return gg, gf, ff


def _common_products(step: Step) -> Tensor | None:
    """Gramian of (h, t - h) between different tasks, (2K, 2K), of the own parameters that several losses reach, which
    there are with `shared=` only; None without."""
    present, count = step.present, len(step.present)
    reached = Counter(i for state in present for i in state.own)
    common = sorted(i for i, times in reached.items() if times > 1)
    if not common:
        return None
    rows = [step.point.row(state.grads, common) for state in present]
    perturbed = [step.point.row(state.perturbed, common) for state in present]
    c = torch.tensor([step.factor(i) for i in range(count)], dtype=torch.float64).repeat(2) / step.loss_scale
    between = 1.0 - torch.eye(count, dtype=torch.float64).repeat(2, 2)
    return step.arithmetic.gramian_pair(rows, perturbed, common) * torch.outer(c, c) * between


def own_products(step: Step, i: int) -> tuple[float, float, float]:
    """<h, h>, <h, t - h>, ||t - h||^2 of present task i's own parameters."""
    state = step.present[i]
    if not state.own:
        return 0.0, 0.0, 0.0
    h, t = step.point.row(state.grads, state.own), step.point.row(state.perturbed, state.own)
    factor = step.factor(i) / step.loss_scale
    pair = step.arithmetic.gramian_pair([h], [t], state.own) * (factor * factor)
    return float(pair[0, 0]), float(pair[0, 1]), float(pair[1, 1])


def orthogonal(step: Step, state: TaskState, c: float, factor: float = 1.0) -> list[Tensor | None]:
    """factor (s_i - c g_i) without the loss scale, parameter by parameter, in the dtype of the rows."""
    out: list[Tensor | None] = [None] * len(step.tensors)
    with torch.no_grad():
        for i in state.reached:
            g, s = state.grads[i], state.perturbed[i]
            assert g is not None
            g = step.point.wide(i, g)
            v = g * -c if s is None else torch.sub(step.point.wide(i, s), g, alpha=c)
            v = v if step.loss_scale == 1.0 else v / step.loss_scale
            out[i] = step.point.narrow(i, v if factor == 1.0 else v * factor)
    return out


def stored(step: Step, row: Sequence[Tensor | None]) -> list[Tensor | None]:
    """A row as a state keeps it: one entry a parameter of the param groups, frozen ones included, which may change."""
    out: list[Tensor | None] = [None] * (step.params[-1].index + 1)
    for p, x in zip(step.params, row, strict=True):
        out[p.index] = x
    return out


def recalled(step: Step, row: Sequence[Tensor | None]) -> list[Tensor | None]:
    """A stored row for the parameters of this step, on their devices; None for what it does not have."""
    found = [row[p.index] if p.index < len(row) else None for p in step.params]
    return [None if x is None else x.to(p.tensor.device) for x, p in zip(found, step.params, strict=True)]
