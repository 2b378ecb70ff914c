"""Loss weightings: methods that weigh the losses of K tasks, c_1 .. c_K, and need no inner products of gradients.

A weighting is an immutable value: its options, and nothing else. `FlatMTL(optimizer, weighting=UW(), aggregator="sum")`
uses it alone, with another aggregator in front of it: the step is that of the losses c_i l_i with c held constant, for
shared and own parameters, and for the flat family with the same c. What a method remembers is in the optimizer and its
`state_dict`. Alone: `c = UW()(losses, state=state)` with `state = UW().fresh_state(K)`, which the call changes in place.

In the docstrings, a weighting is *invariant* if multiplying one task's loss by a positive number changes no update (once
learned weights have settled, where they are learned). No weighting is non-conflicting: a sum of weighted gradients can
always conflict with one of them. Costs beside the model's own are O(K) numbers unless it says otherwise. Methods whose
formula needs positive losses raise an error that names the task. "Step" means a step that the task was present in: one
that is absent (its loss is None, or zero with a zero gradient) takes no part, sums run over the others, and its state
stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ._options import by_name
from ._weighting_base import Weighting
from .aggregators import _checked_seed


@dataclass(frozen=True)
class FixedWeights(Weighting):
    """c_i = values[i]. Free. Not invariant.

    Option: values, one finite number >= 0 a task. Unlike the aggregator `Fixed` it stands in front of any aggregator, and
    weighs the heads too.
    """

    values: tuple[float, ...]

    name = "fixed"

    def __post_init__(self) -> None:
        values = tuple(float(w) for w in self.values)
        if not values:
            raise ValueError("FixedWeights needs at least one weight")
        for i, w in enumerate(values):
            if not 0.0 <= w < math.inf:
                raise ValueError(f"FixedWeights: values[{i}] is {w}; it must be >= 0 and finite")
        object.__setattr__(self, "values", values)

    def option_values(
        self, num_tasks: int, seed: int = 0, draw: int = 0, present: Sequence[int] | None = None
    ) -> list[float]:
        return _per_task("FixedWeights", "values", self.values, num_tasks, present)


@dataclass(frozen=True)
class UW(Weighting):
    """Uncertainty weighting: minimise SUM_i exp(-s_i) l_i / 2 + s_i / 2 over the log-variances s too.

    c_i = exp(-s_i) / 2 with the s_i before this step's update of s, one step of Adam. Fixed point: exp(s_i) = l_i, so
    that c_i = 1 / (2 l_i).

    Options: lr = 0.025, of s, and initial = -0.5, as the comparison in the Nash-MTL authors' code. Cost: 4 K numbers of
    state. Invariant at the fixed point.

    Kendall, Gal and Cipolla, Multi-Task Learning Using Uncertainty to Weigh Losses, arXiv 1705.07115.
    """

    lr: float = 0.025
    initial: float = -0.5

    name = "uw"

    def __post_init__(self) -> None:
        self._positive("lr")
        self._finite("initial")


@dataclass(frozen=True)
class DWA(Weighting):
    """Dynamic weight average: tasks whose loss falls more slowly weigh more.

    c = K softmax(r / T), r_i = mean loss of the task's last epoch / that of the one before; r_i = 1 before there are two.
    Losses must be >= 0.

    Options: temperature = 2, the paper's T; epoch = 25, the number of steps in an epoch. The paper means true epochs:
    set epoch=len(loader) for those. 25 is the window of the Nash-MTL authors' code. Cost: 5 K numbers of state.
    The weights do not depend on the losses' units, so that the update does: not invariant.

    Liu, Johns and Davison, End-to-End Multi-Task Learning with Attention, arXiv 1803.10704.
    """

    temperature: float = 2.0
    epoch: int = 25

    name = "dwa"
    domain = ">= 0"

    def __post_init__(self) -> None:
        self._positive("temperature")
        self._integer("epoch", 1)


@dataclass(frozen=True)
class RLW(Weighting):
    """Random loss weighting: c = softmax(z), z standard normal and fresh at every step; SUM c = 1.

    Option: seed; None takes the optimizer's (0 outside of one). A draw depends on the seed, the number of the step and
    the task's place among those present alone, so that ranks and resumed runs draw the same. Free. Not invariant.

    Lin, Ye and Zhang, Reasonable Effectiveness of Random Weighting, arXiv 2111.10603.
    """

    seed: int | None = None

    name = "rlw"

    def __post_init__(self) -> None:
        if self.seed is not None:
            object.__setattr__(self, "seed", _checked_seed(self.seed))

    def option_values(
        self, num_tasks: int, seed: int = 0, draw: int = 0, present: Sequence[int] | None = None
    ) -> list[float]:
        return [float(_checked_seed(seed if self.seed is None else self.seed)), float(draw)]


@dataclass(frozen=True)
class SI(Weighting):
    """Scale-invariant: minimise SUM_i log l_i; c_i = 1 / l_i. Losses must be > 0. No options. Free. Invariant.

    The baseline of that name in the Nash-MTL paper, arXiv 2202.01017.
    """

    name = "si"
    domain = "> 0"


@dataclass(frozen=True)
class GLS(Weighting):
    """Geometric loss strategy: minimise (PROD_i l_i)^(1/K); c_i = (PROD l)^(1/K) / (K l_i). Losses must be > 0.

    No options. Free. The direction is invariant, the length is not.

    Chennupati et al., MultiNet++, arXiv 1904.08492.
    """

    name = "gls"
    domain = "> 0"


@dataclass(frozen=True)
class STCH(Weighting):
    """Smooth Tchebycheff scalarisation: minimise K mu log SUM_i exp(log(l_i / z_i) / mu), for mu -> 0 the largest.

    c_i = K softmax(log(l / z) / mu)_i / l_i. z_i is the task's nadir, its mean loss in epoch number `warmup`; up to the
    end of that epoch c_i = 1 / l_i (SUM log l). Losses must be > 0.

    Options: mu = 1; warmup = 4 epochs, as LibMTL; epoch = 25, the number of steps in an epoch: set epoch=len(loader) for
    true ones. Cost: 2 K numbers of state. Invariant.

    Lin et al., Smooth Tchebycheff Scalarization for Multi-Objective Optimization, arXiv 2402.19078.
    """

    mu: float = 1.0
    epoch: int = 25
    warmup: int = 4

    name = "stch"
    domain = "> 0"

    def __post_init__(self) -> None:
        self._positive("mu")
        self._integer("epoch", 1)
        self._integer("warmup", 0)


@dataclass(frozen=True)
class IMTLL(Weighting):
    """Impartial multi-task learning, the loss part: minimise SUM_i exp(s_i) l_i - s_i over s too.

    c_i = exp(s_i) with the s_i before this step's update of s, one step of Adam; s_i = 0 at first. Fixed point: c_i =
    1 / l_i. Losses must be > 0.

    Option: lr = 0.001, of s. The paper trains s with the model's own learning rate: set it to yours. Cost: 4 K numbers
    of state. Invariant at the fixed point. The paper's whole method is `weighting="imtl_l", aggregator="imtl_g"`.

    Liu et al., Towards Impartial Multi-task Learning, ICLR 2021.
    """

    lr: float = 0.001

    name = "imtl_l"
    domain = "> 0"

    def __post_init__(self) -> None:
        self._positive("lr")


@dataclass(frozen=True)
class FAMO(Weighting):
    """Fast adaptive multitask optimisation: all losses should fall at the same rate, log l by log l.

    c_i = z_i / ((l_i - m_i) C) with z = softmax(xi) and C so that SUM c = 1. After the update the losses of the same
    batch are evaluated once more, without gradients, and xi takes a step of Adam along J_softmax' (log(l - m) before less
    after) + gamma xi. Losses must stay above m: the step raises an error before it if one does not; one that the update
    itself has brought to m counts as 2^-52 of its distance before.

    Options: lr = 0.025, of xi; gamma = 0.01, its weight decay (the authors' default and Cityscapes; 0.001 for NYUv2,
    CelebA and QM9; 0 for their toy problem); min_losses, the m_i, 0 each. Cost: one forward a step and 4 K numbers of
    state. Invariant up to the length of the update (for m = 0; SUM c = 1).

    Liu et al., FAMO: Fast Adaptive Multitask Optimization, arXiv 2306.03792.
    """

    lr: float = 0.025
    gamma: float = 0.01
    min_losses: tuple[float, ...] | None = None

    name = "famo"
    observes = True

    def __post_init__(self) -> None:
        self._positive("lr")
        self._finite("gamma")
        self._check("gamma", self.gamma >= 0.0, ">= 0")
        if self.min_losses is not None:
            object.__setattr__(self, "min_losses", tuple(float(m) for m in self.min_losses))
            for i, m in enumerate(self.min_losses):
                if not math.isfinite(m):
                    raise ValueError(f"FAMO: min_losses[{i}] is {m}; it must be finite")

    def check_loss(self, loss: float, index: int, task: Any) -> None:
        floor = 0.0 if self.min_losses is None else self.min_losses[index]
        if not loss - floor > 0.0:
            raise ValueError(
                f"weighting 'famo' needs losses above their lower bound, but that of task {task!r} is {loss}, its bound "
                f"{floor} (min_losses); nothing was changed"
            )

    def option_values(
        self, num_tasks: int, seed: int = 0, draw: int = 0, present: Sequence[int] | None = None
    ) -> list[float]:
        count = num_tasks if present is None else len(present)
        floors = [0.0] * count
        if self.min_losses is not None:
            floors = _per_task("FAMO", "min_losses", self.min_losses, num_tasks, present)
        return [self.lr, self.gamma, *floors]


@dataclass(frozen=True)
class GradNorm(Weighting):
    """GradNorm: the weighted gradients' norms are driven to a common value, higher for tasks that lag behind.

    n_i = c_i ||g_i||, target_i = mean(n) r_i^alpha, r_i = (l_i / l_i(0)) / mean of those; c takes a step of Adam along
    ||g_i|| sign(n_i - target_i), is kept positive (at least 1e-6 of the mean) and scaled to SUM c = K. c is used before
    this step's update of it; 1 at first. Losses must be > 0.

    ||g_i|| are the norms of the gradients of all shared parameters, where the paper takes the last shared layer: nobody
    has to name a layer, and the norms are there already.

    Options: alpha = 1.5, the paper's for NYUv2; lr = 0.025, of c, chosen as UW's. Cost: 5 K numbers of state.
    Invariant up to the length of the update (SUM c = K), once c has settled.

    Chen et al., GradNorm, arXiv 1711.02257.
    """

    alpha: float = 1.5
    lr: float = 0.025

    name = "gradnorm"
    domain = "> 0"
    needs_norms = True

    def __post_init__(self) -> None:
        self._finite("alpha")
        self._check("alpha", self.alpha >= 0.0, ">= 0")
        self._positive("lr")


@dataclass(frozen=True)
class GO4Align(Weighting):
    """Group optimisation for alignment: tasks are grouped by their risk, and a group has one weight.

    q_i <- q_i exp(-eta l_i), scaled to sum 1 (uniform at first); risks q_i SUM_j l_j / l_i; c_i is the mean risk of
    the task's group, by the exact k-means clustering of the K risks into `groups`. Losses must be > 0.

    Options: eta = 1e-4 and groups = 1, as the authors' script; with 1 group all tasks weigh the same, so choose more.
    Cost: O(groups K^2) operations, K numbers of state. Not invariant.

    Shen et al., GO4Align: Group Optimization for Multi-Task Alignment, arXiv 2404.06486.
    """

    eta: float = 1e-4
    groups: int = 1

    name = "go4align"
    domain = "> 0"

    def __post_init__(self) -> None:
        self._finite("eta")
        self._check("eta", self.eta >= 0.0, ">= 0")
        self._integer("groups", 1)


@dataclass(frozen=True)
class SLAW(Weighting):
    """Scaled loss approximate weighting: losses that vary more, and so have larger gradients, weigh less.

    c_i = K (1 / s_i) / SUM_j 1 / s_j, s_i the standard deviation of the task's loss by exponential moving averages, at
    least 1e-6 of its mean. 1 at a task's first step.

    Option: beta = 0.99, of the averages, as the authors' code. Cost: 3 K numbers of state. Invariant up to the length
    of the update (SUM c = K).

    Crawshaw and Košecká, SLAW: Scaled Loss Approximate Weighting, arXiv 2109.08218.
    """

    beta: float = 0.99

    name = "slaw"

    def __post_init__(self) -> None:
        self._finite("beta")
        self._check("beta", 0.0 <= self.beta < 1.0, "in [0, 1)")


@dataclass(frozen=True)
class BMTL(Weighting):
    """Balanced multi-task learning: minimise SUM_i exp(l_i / T), so that larger losses weigh more.

    c = K softmax(l / T): the gradient of the sum, divided by its mean weight, so that the length of the step does not
    grow with exp.

    Option: temperature = 50. Reconstructed: the paper's abstract was read alone; h(l) = exp(l / T) and T = 50 are from
    memory, and the division by the mean weight is ours. Free. Not invariant.

    Liang and Zhang, A Simple General Approach to Balance Task Difficulty in Multi-Task Learning, arXiv 2002.04792.
    """

    temperature: float = 50.0

    name = "bmtl"

    def __post_init__(self) -> None:
        self._positive("temperature")


@dataclass(frozen=True)
class EMTL(Weighting):
    """Equitable multi-task learning: the tasks' contributions l_i / ||g_i|| are to become equal.

    r_i = (l_i / ||g_i||) / mean of those; c = argmin ||w - 1||^2 + strength Var(w r) subject to SUM w = K, in closed
    form; c > 0 always, and c_i proportional to ||g_i|| / l_i for a large strength. ||g_i|| are the norms of the shared
    gradients; a zero gradient gets 1 and takes no part. Losses must be > 0.

    Option: strength = 1. Reconstructed: the paper's abstract was read alone. It defines the contribution and adds its
    variance as a penalty; the objective here is the simplest that does so. Free. Not invariant for a finite strength.

    Yuan et al., Equitable Multi-task Learning, arXiv 2306.09373.
    """

    strength: float = 1.0

    name = "emtl"
    domain = "> 0"
    needs_norms = True

    def __post_init__(self) -> None:
        self._finite("strength")
        self._check("strength", self.strength >= 0.0, ">= 0")


WEIGHTINGS: dict[str, type[Weighting]] = {
    cls.name: cls
    for cls in (FixedWeights, UW, DWA, RLW, SI, GLS, STCH, IMTLL, FAMO, GradNorm, GO4Align, SLAW, BMTL, EMTL)
}


def get_weighting(weighting: str | Weighting, **options: Any) -> Weighting:
    """A weighting from its name and options, or the object itself.

    >>> get_weighting("dwa", epoch=100)
    DWA(temperature=2.0, epoch=100)
    """
    from . import main_task

    table: dict[str, type[Weighting]] = {**WEIGHTINGS, "hydalearn": main_task.HydaLearn, "slgrad": main_task.SLGrad}
    return by_name(
        weighting, Weighting, table, options, kind="weighting", example="UW(lr=0.025)", subject="a weighting"
    )


def _per_task(
    cls: str, option: str, values: tuple[float, ...], num_tasks: int, present: Sequence[int] | None
) -> list[float]:
    if len(values) != num_tasks:
        raise ValueError(f"{cls} has {len(values)} {option} for {num_tasks} tasks")
    return list(values if present is None else (values[i] for i in present))
