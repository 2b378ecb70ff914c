"""Aggregators: methods that turn the gradients of K tasks into one update, SUM_i w_i g_i with weights w = w(G) that
depend on the gradients through their Gramian G_ij = <g_i, g_j> alone.

An aggregator is an immutable value: its options, and nothing else. `FlatMTL(optimizer, aggregator=CAGrad(c=0.2))`
uses it in training; `CAGrad(c=0.2)(rows)` aggregates the rows of a matrix; `CAGrad(c=0.2).weights(gramian)` gives w.
The solves are in the C core, exact and in float64.

In the docstrings, d_i = ||g_i||. *Invariant* says what happens to the update if one task's gradient is multiplied by a
positive number. *Non-conflicting* methods never give an update with a negative inner product with some g_i. Costs are
those of the solve, beside one pass over the gradients for the Gramian, K (K + 1) / 2 inner products, and one for the
sum.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from . import _ops

_LARGEST_SEED = 2**53


class Aggregator:
    """Base class. A method of the C core is one frozen dataclass here: its fields are the method's options."""

    name: ClassVar[str]

    @property
    def number(self) -> int:
        """The method's number in the C core (`flatmtl_method` in flatmtl.h) and in `torch.ops.flatmtl`."""
        return _ops.METHODS[self.name]

    @property
    def options(self) -> dict[str, Any]:
        return {field: getattr(self, field) for field in self.option_names()}

    @classmethod
    def option_names(cls) -> list[str]:
        return [field.name for field in fields(cls)]  # type: ignore[arg-type]

    def option_values(
        self, num_tasks: int, seed: int = 0, draw: int = 0, present: Sequence[int] | None = None
    ) -> list[float]:
        """The options as the C core takes them.

        Args:
            num_tasks: the number of tasks.
            seed: seed of methods that draw and have none of their own.
            draw: number of the draw (of the optimizer's step) for methods that draw.
            present: the tasks that take part, if not all of them.
        """
        return [float(value) for value in self.options.values()]

    def check_state(self, state: dict[str, Any], num_tasks: int, params: Sequence[Tensor]) -> None:
        """Raises ValueError where a loaded state does not fit the number of tasks or the parameters."""

    def weights(self, gramian: Tensor, *, draw: int = 0) -> Tensor:
        """Weights w(G), (K,) float64 on the CPU; see `flatmtl.weights`."""
        from . import functional

        return functional.weights(gramian, self, draw=draw)

    def __call__(self, rows: Tensor | Sequence[Sequence[Tensor]], *, draw: int = 0) -> Tensor | list[Tensor]:
        """The update SUM_i w_i g_i of the rows g; see `flatmtl.aggregate`."""
        from . import functional

        return functional.aggregate(rows, self, draw=draw)


@dataclass(frozen=True)
class Sum(Aggregator):
    """w_i = 1: the gradient of the sum of the losses. Free. A task counts as much as its scale; conflicts remain."""

    name = "sum"


@dataclass(frozen=True)
class Mean(Aggregator):
    """w_i = 1/K: the gradient of the mean of the losses. Free. A task counts as much as its scale; conflicts remain."""

    name = "mean"


@dataclass(frozen=True)
class Fixed(Aggregator):
    """w_i = values[i]: the gradient of a weighted sum of the losses. Free. Not invariant; conflicts remain.

    Option: values, one finite number a task. In the combinations "second" and "each", the calls that join two gradients
    rather than K add them (weights 1, 1).
    """

    values: tuple[float, ...]

    name = "fixed"

    def __post_init__(self) -> None:
        values = tuple(float(w) for w in self.values)
        if not values:
            raise ValueError("Fixed needs at least one weight")
        for i, w in enumerate(values):
            if not math.isfinite(w):
                raise ValueError(f"Fixed: values[{i}] is {w}; it must be finite")
        object.__setattr__(self, "values", values)

    def option_values(
        self, num_tasks: int, seed: int = 0, draw: int = 0, present: Sequence[int] | None = None
    ) -> list[float]:
        if len(self.values) != num_tasks:
            raise ValueError(f"Fixed has {len(self.values)} values for {num_tasks} tasks")
        return list(self.values if present is None else (self.values[i] for i in present))


@dataclass(frozen=True)
class MGDA(Aggregator):
    """Multiple-gradient descent: the shortest vector of the gradients' convex hull.

    w = argmin w'Gw over w >= 0, SUM w = 1. The update is 0 exactly at Pareto-stationary points, and <update, g_i> >=
    ||update||^2 for every task. Zero gradients share weight 1, and the update is 0 then.

    No options. Cost: an active-set solve, a few O(K^3). Not invariant: tasks with small gradients dominate.
    Non-conflicting. Weights sum to 1; multiply by K to compare with a sum of losses.

    Désidéri, Multiple-gradient descent algorithm, C. R. Math. 2012; Sener and Koltun, arXiv 1810.04650.
    """

    name = "mgda"


@dataclass(frozen=True)
class PCGrad(Aggregator):
    """Gradient surgery: each gradient loses its components against the gradients that it conflicts with; their sum.

    For each task i: c = e_i; for the other tasks j in random order, if p = (Gc)_j < 0: c_j -= p / G_jj. w = SUM_i c.

    Option: seed, of the order; None takes the optimizer's (0 outside of one). A draw depends on the seed, the number of
    the step, the call within the step and the task alone, so that ranks and resumed runs draw the same. The sum over
    tasks, not the mean, as the paper. Cost O(K^3). Not invariant: each task's part scales with its gradient.
    Non-conflicting for two tasks, not for more.

    Yu et al., Gradient Surgery for Multi-Task Learning, arXiv 2001.06782.
    """

    seed: int | None = None

    name = "pcgrad"

    def __post_init__(self) -> None:
        if self.seed is not None:
            object.__setattr__(self, "seed", _checked_seed(self.seed))

    def option_values(
        self, num_tasks: int, seed: int = 0, draw: int = 0, present: Sequence[int] | None = None
    ) -> list[float]:
        return [float(_checked_seed(seed if self.seed is None else self.seed)), float(draw)]


@dataclass(frozen=True)
class CAGrad(Aggregator):
    """Conflict-averse gradient: the best worst-case improvement among the updates near the mean gradient g_0.

    max over u with ||u - g_0|| <= c ||g_0|| of min_i <g_i, u>, divided by 1 + c^2. With b = 1/K and phi = c sqrt(b'Gb):
    v = argmin over the simplex of v'Gb + phi sqrt(v'Gv); w = (b + phi v / sqrt(v'Gv)) / (1 + c^2). Where the minimum of
    v'Gv is 0 the second term is left out.

    Option: c = 0.4 in [0, 1), as the F-MTL authors' code and the paper's NYUv2 runs; c = 0 is the mean. The division by
    1 + c^2 is the authors' rescale=1. Cost: an active-set and Newton solve, a few O(K^3). Not invariant. Conflicts can
    remain, fewer for larger c.

    Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, arXiv 2110.14048.
    """

    c: float = 0.4

    name = "cagrad"

    def __post_init__(self) -> None:
        object.__setattr__(self, "c", float(self.c))
        if not 0.0 <= self.c < 1.0:
            raise ValueError(f"CAGrad: c is {self.c}; it must be in [0, 1)")


@dataclass(frozen=True)
class IMTLG(Aggregator):
    """Impartial multi-task learning, the gradient part: equal projections of the update onto the tasks' directions.

    (Gw)_i / d_i equal for all i, SUM w = 1: w = G^+ d / (1' G^+ d). Weights can be negative. Zero gradients get
    weight 0; where 1' G^+ d = 0 there is no solution and all weights are 0 ("Pareto-stationary").

    No options. Cost: an eigendecomposition, O(K^3). The direction is invariant, the length is not. Projections are all
    of one sign: non-conflicting unless 1' G^+ d is negative.

    Liu et al., Towards Impartial Multi-task Learning, ICLR 2021.
    """

    name = "imtl_g"


@dataclass(frozen=True)
class NashMTL(Aggregator):
    """Nash bargaining: the update that maximises the sum of the logarithms of the tasks' improvements.

    G w = 1/w (element by element), w > 0: the exact root, by Newton's method. ||update|| = sqrt(K) always; inside
    `FlatMTL`, family_scale="rms" restores the scale of the gradients. Zero gradients get weight 0; where a non-negative
    combination of gradients vanishes there is no solution and all weights are 0 ("Pareto-stationary").

    No options: the paper's iterations and its reuse of old weights have no place in an exact solve. Cost: about ten
    O(K^3). Invariant. Non-conflicting.

    Navon et al., Multi-Task Learning as a Bargaining Game, arXiv 2202.01017.
    """

    name = "nash_mtl"


@dataclass(frozen=True)
class FairGrad(Aggregator):
    """alpha-fair improvements: the update that maximises SUM_i <g_i, u>^(1 - alpha) / (1 - alpha).

    G w = w^(-1/alpha) (element by element), w > 0: the exact root, by Newton's method. Homogeneous of degree
    (1 - alpha) / (1 + alpha): for alpha > 1 the update grows as gradients shrink; inside `FlatMTL`, family_scale="rms"
    makes it degree 1. Not multiplied by K, unlike the authors' code. Zero gradients get weight 0; where a non-negative
    combination of gradients vanishes there is no solution and all weights are 0 ("Pareto-stationary").

    Option: alpha = 2 > 0, as in the authors' runs; 1 is Nash-MTL, towards infinity max-min. Cost: about ten O(K^3).
    Invariant for alpha = 1 only. Non-conflicting.

    Ban and Ji, Fair Resource Allocation in Multi-Task Learning, arXiv 2402.15638.
    """

    alpha: float = 2.0

    name = "fairgrad"

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", float(self.alpha))
        if not (self.alpha > 0.0 and math.isfinite(self.alpha)):
            raise ValueError(f"FairGrad: alpha is {self.alpha}; it must be positive and finite")


AGGREGATORS: dict[str, type[Aggregator]] = {
    cls.name: cls for cls in (Sum, Mean, Fixed, MGDA, PCGrad, CAGrad, IMTLG, NashMTL, FairGrad)
}


def get_aggregator(aggregator: str | Aggregator, **options: Any) -> Aggregator:
    """An aggregator from its name and options, or the object itself.

    >>> get_aggregator("cagrad", c=0.2)
    CAGrad(c=0.2)
    """
    if isinstance(aggregator, Aggregator):
        if options:
            raise TypeError(f"options {_quoted(options)} beside the object {aggregator!r}, which has its own")
        return aggregator
    if not isinstance(aggregator, str):
        raise TypeError(f"an aggregator is a name, or an object like CAGrad(c=0.4), not {aggregator!r}")
    cls = AGGREGATORS.get(aggregator)
    if cls is None:
        close = difflib.get_close_matches(aggregator.lower(), AGGREGATORS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"there is no aggregator {aggregator!r}.{hint} Known: {_quoted(AGGREGATORS)}")
    names = cls.option_names()
    unknown = [name for name in options if name not in names]
    if unknown:
        has = f"its options are {_quoted(names)}" if names else "it has no options"
        raise TypeError(f"aggregator {aggregator!r} has no option {_quoted(unknown)}; {has}")
    if aggregator == "fixed" and "values" not in options:
        raise TypeError("aggregator 'fixed' needs its option 'values', one number a task: Fixed([0.5, 2.0])")
    return cls(**options)


def _quoted(names: Any) -> str:
    return ", ".join(repr(name) for name in names)


def _checked_seed(seed: int) -> int:
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < _LARGEST_SEED:
        raise ValueError(f"seed is {seed!r}; it must be an integer, at least 0 and below 2^53")
    return seed
