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

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _aggregator_state, _ops
from ._options import CoreMethod, by_name, quoted

_LARGEST_SEED = 2**53
_ALIGNED_SCALES = ("min", "median", "rmse")  # in the order of flatmtl.h


class Aggregator(CoreMethod):
    """Base class. A method of the C core is one frozen dataclass here: its fields are the method's options."""

    name: ClassVar[str]

    @property
    def number(self) -> int:
        """The method's number in the C core (`flatmtl_method` in flatmtl.h) and in `torch.ops.flatmtl`."""
        return _ops.METHODS[self.name]

    def check_state(self, state: dict[str, Any], num_tasks: int, params: Sequence[Tensor]) -> None:
        """Raises ValueError where a loaded state does not fit the number of tasks or the parameters."""
        _aggregator_state.check(self, state, num_tasks)

    def state_size(self, num_tasks: int) -> int:
        """How many numbers the method keeps from step to step for one call; 0 for most methods."""
        return _ops.state_size(self.number, num_tasks)

    def new_state(self, num_tasks: int) -> Tensor | None:
        """A fresh state: zeros, (state_size,) float64 on the CPU; None for methods that keep nothing."""
        size = self.state_size(num_tasks)
        return torch.zeros(size, dtype=torch.float64) if size else None

    def weights(self, gramian: Tensor, *, draw: int = 0, state: Tensor | None = None) -> Tensor:
        """Weights w(G), (K,) float64 on the CPU; see `flatmtl.weights`."""
        from . import functional

        return functional.weights(gramian, self, draw=draw, state=state)

    def __call__(
        self, rows: Tensor | Sequence[Sequence[Tensor]], *, draw: int = 0, state: Tensor | None = None
    ) -> Tensor | list[Tensor]:
        """The update SUM_i w_i g_i of the rows g; see `flatmtl.aggregate`."""
        from . import functional

        return functional.aggregate(rows, self, draw=draw, state=state)


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

    No options. Cost: a Cholesky factorisation, or a pseudo-inverse where G is singular, O(K^3). The direction is
    invariant up to its sign, the length is not. Projections are all of one sign: non-conflicting unless 1' G^+ d is
    negative.

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


@dataclass(frozen=True)
class GradVac(Aggregator):
    """Gradient vaccine: each gradient is turned towards the others up to the cosines usual between them; their sum.

    For each task i, g_i' = g_i; for the other tasks j in random order: with phi = cos(g_i', g_j) and a target t_ij, if
    phi < t_ij the multiple of g_j is added to g_i' that makes the cosine t_ij; then t_ij += beta (phi - t_ij). The
    update is SUM_i g_i'. With targets of 0, as at the start, this is PCGrad. The granularity is the whole model, one
    cosine for all shared parameters; the paper also has one a layer and one a matrix. A zero gradient, and a g_i' that
    has vanished, leaves the targets alone. Targets count as at most 1 - 1e-6, where the added multiple is finite.

    Options: beta = 0.01 in [0, 1], the paper's, as other implementations report it (LibMTL and torchjd take 0.5); seed
    of the order, as `PCGrad`. State: the K x K targets, apart for each family of gradients. Cost O(K^3). Not invariant:
    each task's part scales with its gradient. Conflicts can remain.

    Wang et al., Gradient Vaccine, arXiv 2010.05874.
    """

    beta: float = 0.01
    seed: int | None = None

    name = "gradvac"

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", float(self.beta))
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"GradVac: beta is {self.beta}; it must be in [0, 1]")
        if self.seed is not None:
            object.__setattr__(self, "seed", _checked_seed(self.seed))

    def option_values(
        self, num_tasks: int, seed: int = 0, draw: int = 0, present: Sequence[int] | None = None
    ) -> list[float]:
        return [self.beta, float(_checked_seed(seed if self.seed is None else self.seed)), float(draw)]


@dataclass(frozen=True)
class AlignedMTL(Aggregator):
    """Independent component alignment: the matrix of gradients with all its singular values made equal.

    With the eigenvalues l_k and eigenvectors v_k of G: w = s^(1/2) SUM_k v_k (v_k'1) / l_k^(1/2), over the l_k above
    tolerance K max(l). The summands of the update are then orthogonal, of squared length s. Zero gradients get weight
    0.

    Options: scale: what s is, "min" the least of those eigenvalues (default, the authors'), "median" the lower median,
    "rmse" the mean; tolerance = 2^-23, the float32 rounding that the authors' code uses in float32 training. The sum of
    the aligned gradients, as the paper (torchjd takes their mean). Cost: an eigendecomposition, about 10 K^3. Not
    invariant. Conflicts can remain; with "min" the update is short where gradients are nearly collinear, and it jumps
    where an eigenvalue passes the tolerance.

    Senushkin et al., Independent Component Alignment for Multi-Task Learning, CVPR 2023.
    """

    scale: str = "min"
    tolerance: float = 2.0**-23

    name = "aligned_mtl"

    def __post_init__(self) -> None:
        if self.scale not in _ALIGNED_SCALES:
            raise ValueError(f"AlignedMTL: scale is {self.scale!r}; it must be one of {quoted(_ALIGNED_SCALES)}")
        object.__setattr__(self, "tolerance", float(self.tolerance))
        if not 0.0 <= self.tolerance < 1.0:
            raise ValueError(f"AlignedMTL: tolerance is {self.tolerance}; it must be in [0, 1)")

    def option_values(
        self, num_tasks: int, seed: int = 0, draw: int = 0, present: Sequence[int] | None = None
    ) -> list[float]:
        return [float(_ALIGNED_SCALES.index(self.scale)), self.tolerance]


@dataclass(frozen=True)
class _Preferring(Aggregator):
    """An aggregator with a preference, one number >= 0 a task; None for 1/K each."""

    preference: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.preference is None:
            return
        values = tuple(float(p) for p in self.preference)
        for i, p in enumerate(values):
            if not (p >= 0.0 and math.isfinite(p)):
                raise ValueError(f"{type(self).__name__}: preference[{i}] is {p}; it must be finite and at least 0")
        object.__setattr__(self, "preference", values)

    def option_values(
        self, num_tasks: int, seed: int = 0, draw: int = 0, present: Sequence[int] | None = None
    ) -> list[float]:
        if self.preference is None:
            return []
        if len(self.preference) != num_tasks:
            raise ValueError(
                f"{type(self).__name__} has a preference of {len(self.preference)} values for {num_tasks} tasks"
            )
        return list(self.preference if present is None else (self.preference[i] for i in present))


@dataclass(frozen=True)
class UPGrad(_Preferring):
    """Unconflicting projection of gradients: each gradient is projected on the dual cone, and the results are summed.

    The dual cone holds the vectors that conflict with no gradient. w = SUM_i argmin v'Gv over v >= p_i e_i. torchjd's
    absolute norm_eps and regularisation are left out: the projections are exact at every scale.

    Option: preference = p, one number >= 0 a task, 1/K each by default as in the paper; calls that join two gradients
    in the combinations "second" and "each" take 1/2. A zero gradient's weight is its preference. Cost: K active-set
    solves, up to O(K^4) in all. Not invariant: each task's part scales with its gradient. Non-conflicting.

    Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, arXiv 2406.16232.
    """

    name = "upgrad"


@dataclass(frozen=True)
class DualProj(_Preferring):
    """The mean gradient projected on the dual cone, the vectors that conflict with no gradient.

    w = argmin v'Gv over v >= p, exact at every scale.

    Option: preference = p, as `UPGrad`. Cost: an active-set solve, a few O(K^3). Not invariant. Non-conflicting.

    Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning, arXiv 1706.08840; with a preference, Quinton
    and Rey, arXiv 2406.16232.
    """

    name = "dualproj"


@dataclass(frozen=True)
class ConFIG(Aggregator):
    """Conflict-free gradients: equal cosines to all gradients, as long as the sum of the projections on it.

    With C_ij the cosines and v = C^+ 1: w_i = l v_i / d_i, l = SUM_i d_i (Cv)_i / 1'v. Weights can be negative. Zero
    gradients get weight 0; where C^+ 1 = 0, as for two opposite gradients, there is no such direction and all weights
    are 0 ("Pareto-stationary"). The direction is that of IMTL-G, up to its sign, where C has full
    rank.

    No options. Cost: a Cholesky factorisation, or a pseudo-inverse where C is singular, O(K^3). The direction is
    invariant, the length is not. Non-conflicting where C has full rank.

    Liu et al., ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks, arXiv 2408.11104.
    """

    name = "config"


@dataclass(frozen=True)
class NTKMTL(Aggregator):
    """Spectral balancing of the tasks' neural tangent kernels.

    w_i = (S / G_ii)^exponent, S the mean of the G_ii: with one batch (the paper's n = 1) the kernel of a task is the
    number G_ii. For an exponent of 1/2 all gradients are brought to the same length, their root mean square, and added.
    Zero gradients get weight 0 and do not count in S.

    NTKMTL-SR: with `FlatMTL(features=)` the gradients are those of the features; splits = n > 1 (the paper's 4) cuts the
    batch into n equal parts, and G_ii becomes the largest eigenvalue of task i's n x n Gramian over the parts.

    Options: exponent = 0.5 in [0, 1], the paper's; the authors' NYUv2 script has 0.75, their code K times the weights
    and the trace as S, sqrt(K) times the mean for 0.5. splits = 1. Cost O(K). With 0.5 the direction is invariant, the
    length is not. Conflicts remain.

    NTKMTL: Mitigating Task Imbalance in Multi-Task Learning from Neural Tangent Kernel Perspective, NeurIPS 2025.
    """

    exponent: float = 0.5
    splits: int = 1

    name = "ntkmtl"

    def __post_init__(self) -> None:
        object.__setattr__(self, "exponent", float(self.exponent))
        if not isinstance(self.splits, int) or self.splits < 1:
            raise ValueError(f"NTKMTL: splits is {self.splits!r}; it must be an integer >= 1")
        if not 0.0 <= self.exponent <= 1.0:
            raise ValueError(f"NTKMTL: exponent is {self.exponent}; it must be in [0, 1]")

    def option_values(
        self, num_tasks: int, seed: int = 0, draw: int = 0, present: Sequence[int] | None = None
    ) -> list[float]:
        return [self.exponent]


AGGREGATORS: dict[str, type[Aggregator]] = {
    cls.name: cls for cls in (
        Sum, Mean, Fixed, MGDA, PCGrad, CAGrad, IMTLG, NashMTL, FairGrad, GradVac, AlignedMTL, UPGrad, DualProj, ConFIG,
        NTKMTL,
    )
}  # fmt: skip

BUFFER_AGGREGATORS: dict[str, type[Aggregator]] = {}  # those that are no function of the Gramian: see buffers.py


def get_aggregator(aggregator: str | Aggregator, **options: Any) -> Aggregator:
    """An aggregator from its name and options, or the object itself.

    >>> get_aggregator("cagrad", c=0.2)
    CAGrad(c=0.2)
    """
    known = AGGREGATORS | BUFFER_AGGREGATORS
    return by_name(
        aggregator, Aggregator, known, options, kind="aggregator", example="CAGrad(c=0.4)", subject="an aggregator"
    )


def _checked_seed(seed: int) -> int:
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < _LARGEST_SEED:
        raise ValueError(f"seed is {seed!r}; it must be an integer, at least 0 and below 2^53")
    return seed
