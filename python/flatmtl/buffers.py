"""Aggregators that are no function of the Gramian: they look at single elements of the gradients, or remember a vector
a task (buffers, K times the memory of the shared parameters, of each family).

Used by name or as objects like the others of `flatmtl.aggregators`, with `combine="decomposed"` or `"direct"`; the loss
family and the flat family have memories of their own, in the optimizer and its `state_dict`. Alone, a call takes the
losses where the method needs them, and a memory that it changes in place:

>>> memory = flatmtl.MoCo().fresh_memory(rows)
>>> update = flatmtl.MoCo()(rows, losses=losses, memory=memory)

Docstrings as in `flatmtl.aggregators`; x_i is the gradient of task i, l_i its loss. A task that is absent takes no part,
and its memory stays as it is; counts are of the task's own steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _ops, _state
from .aggregators import BUFFER_AGGREGATORS, Aggregator, _checked_seed

Memory = dict[str, Any]


class BufferAggregator(Aggregator):
    """Base class. A method of the C core is one frozen dataclass here: its fields are the method's options."""

    #: Whether it has one vector a task.
    has_buffers: ClassVar[bool] = True
    #: Whether the losses matter, and which it is defined for: "", ">= 0" or "> 0".
    domain: ClassVar[str] = ""
    #: Independent micro-batches that a step needs; 0: any number.
    batches: ClassVar[int] = 0

    @property
    def number(self) -> int:
        """The method's number in the C core (`flatmtl_buffer_method` in flatmtl.h) and in `torch.ops.flatmtl`."""
        return _ops.BUFFER_METHODS[self.name]

    def fresh_values(self, num_tasks: int) -> Tensor:
        """The numbers of a fresh memory: (v * num_tasks,) float64 zeros."""
        return torch.zeros(self.state_size(num_tasks), dtype=torch.float64)

    def fresh_memory(self, rows: Tensor | Sequence[Sequence[Tensor]]) -> Memory:
        """Memory of a run that begins, for rows like these: {"values": (v K,) float64, "buffers": K lists of tensors}."""
        from . import functional

        matrix = functional._read_rows("aggregate", rows)
        buffers = [[fresh_buffer(t) for t in row] for row in matrix] if self.has_buffers else []
        return {"values": self.fresh_values(len(matrix)), "buffers": buffers}

    def state_size(self, num_tasks: int) -> int:
        return _ops.buffer_state_size(self.number, num_tasks)

    def weights(self, gramian: Tensor, *, draw: int = 0, state: Tensor | None = None) -> Tensor:
        raise TypeError(f"aggregator {self.name!r} is no function of the Gramian")

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self, rows: Tensor | Sequence[Sequence[Tensor]], *, losses: Any = None, memory: Memory | None = None,
        draw: int = 0,
    ) -> Tensor | list[Tensor]:  # fmt: skip
        """One step: the update for the rows, (K, P) or K lists of CPU tensors.

        Args:
            losses: (K,), for MoCo and DB-MTL.
            memory: of `fresh_memory`, changed in place; None starts afresh.
            draw: number of the draw, for GradDrop.
        """
        from . import functional

        matrix = [[t.contiguous() for t in row] for row in functional._read_rows("aggregate", rows)]
        count = len(matrix)
        if self.domain and losses is None:
            raise TypeError(f"aggregator {self.name!r} needs losses=, one number a row")
        numbers = torch.zeros(count) if losses is None else torch.as_tensor(losses)
        memory = self.fresh_memory(matrix) if memory is None else memory
        out: list[Tensor] = torch.ops.flatmtl.buffer_update(
            [t for row in matrix for t in row], count, numbers.detach().to("cpu", torch.float64).contiguous(), self.number,
            self.option_values(count, draw=draw), 0, [t for row in memory["buffers"] for t in row], memory["values"],
        )  # fmt: skip
        return out[0] if isinstance(rows, Tensor) else out

    def check_loss(self, loss: float, task: Any) -> None:
        """Raises ValueError, which names the task, for a loss that the method is not defined for."""
        if (self.domain == "> 0" and not loss > 0.0) or (self.domain == ">= 0" and not loss >= 0.0):
            raise ValueError(
                f"aggregator {self.name!r} needs losses {self.domain}, but that of task {task!r} is {loss}; nothing was "
                "changed"
            )

    def check_state(self, state: dict[str, Any], num_tasks: int, params: Sequence[Tensor]) -> None:
        """Raises ValueError, which names the entry, where a loaded state does not fit the number of tasks or the
        parameters, or lacks something."""
        for family in ("loss", "flat"):
            memory = state.get(family)
            if memory is None:
                continue
            what = f"state of the aggregator {self.name!r}, {family!r}"
            _state.float64(memory, "values", what, (self.state_size(num_tasks),))
            buffers = _state.entry(memory, "buffers", what)
            if not isinstance(buffers, dict):
                raise ValueError(f"{what}: 'buffers' is {_state.shown(buffers)}; it must be a dict")
            for key, tensors in buffers.items():
                where = f"{what}: 'buffers'[{key!r}]"
                if key not in map(str, range(len(params))):
                    raise ValueError(f"{where}: there is no such parameter; the optimizer has {len(params)}")
                if not isinstance(tensors, list) or len(tensors) != num_tasks:
                    raise ValueError(
                        f"{where} is {_state.shown(tensors)}; it must be a list of {num_tasks}, one a task"
                    )
                for k, tensor in enumerate(tensors):
                    if tensor is not None:
                        _state.like(tensor, f"{where}[{k}]", params[int(key)], int(key))

    def _in(
        self, name: str, low: float, high: float, must: str, open_low: bool = False, open_high: bool = True
    ) -> None:
        value = float(getattr(self, name))
        object.__setattr__(self, name, value)
        above = value > low if open_low else value >= low
        below = value < high if open_high else value <= high
        if not (above and below):
            raise ValueError(f"{type(self).__name__}: {name} is {value}; it must be {must}")


def fresh_buffer(like: Tensor) -> Tensor:
    """Zeros like a parameter or gradient: float64 for float64, float32 for the others."""
    return torch.zeros_like(like, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


@dataclass(frozen=True)
class GradDrop(BufferAggregator):
    """Gradient sign dropout: where the tasks disagree on the sign of an element, one sign is kept, at random.

    P = (1 + SUM_i x_i / SUM_i |x_i|) / 2 and U uniform on (0, 1), in each element; x_i stays where P > U and x_i > 0, or
    P < U and x_i < 0, and becomes leak_i x_i elsewhere. The update is the sum. Where all x_i are 0 it is 0.

    Options: seed, None takes the optimizer's (0 outside of one): a draw depends on the seed, the number of the step, the
    family and the place of the element alone; leak = 0, a number in [0, 1] or one a task, the paper's name for what is
    let through. The paper drops gradients of activations; this is the form for parameters of the CAGrad and FAMO authors,
    summed and not averaged. Cost: two passes over the gradients. Not invariant. Conflicts can remain. Homogeneous of
    degree 1. The record has no weights (NaN).

    Chen et al., Just Pick a Sign, arXiv 2010.06808.
    """

    seed: int | None = None
    leak: float | tuple[float, ...] = 0.0

    name = "graddrop"
    has_buffers = False

    def __post_init__(self) -> None:
        if self.seed is not None:
            object.__setattr__(self, "seed", _checked_seed(self.seed))
        leaks = (self.leak,) if isinstance(self.leak, (int, float)) else tuple(float(v) for v in self.leak)
        for value in leaks:
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"GradDrop: leak is {value}; it must be in [0, 1]")
        object.__setattr__(self, "leak", float(self.leak) if isinstance(self.leak, (int, float)) else leaks)

    def option_values(
        self, num_tasks: int, seed: int = 0, draw: int = 0, present: Sequence[int] | None = None
    ) -> list[float]:
        if isinstance(self.leak, tuple):
            if len(self.leak) != num_tasks:
                raise ValueError(f"GradDrop has {len(self.leak)} values of leak for {num_tasks} tasks")
            leak = list(self.leak if present is None else (self.leak[i] for i in present))
        else:
            leak = [self.leak] * (num_tasks if present is None else len(present))
        return [float(_checked_seed(seed if self.seed is None else self.seed)), float(draw), *leak]


@dataclass(frozen=True)
class MoCo(BufferAggregator):
    """Multi-objective gradient correction: MGDA's weights, by one step an iteration, on tracked gradients.

    y_i <- y_i - beta_t (y_i - l_i x_i / ||x_i||); lambda <- softmax(lambda - gamma_t (Y Y' + rho I) lambda); the update is
    SUM_i lambda_i y_i. beta_t = beta t^-beta_decay, gamma_t = gamma t^-gamma_decay; y = 0 and lambda = 1/K at first. A
    zero gradient adds nothing to y. Losses must be >= 0.

    Options: beta = 0.5, beta_decay = 0.5, gamma = 0.1, gamma_decay = 0.5, rho = 0, as the authors' shared code, which
    also multiplies the direction by the loss and takes softmax where the paper projects on the simplex (taken from notes
    on it, not read in the paper); normalize=False tracks x_i itself. Cost: K vectors, one Gramian of them. Inside
    `FlatMTL` family_scale="rms" multiplies the update by the gradients' root mean square norm, so that it is of degree 1.
    Not invariant (l_i counts). Conflicts can remain.

    Fernando et al., Mitigating Gradient Bias in Multi-objective Learning, arXiv 2210.12624.
    """

    beta: float = 0.5
    beta_decay: float = 0.5
    gamma: float = 0.1
    gamma_decay: float = 0.5
    rho: float = 0.0
    normalize: bool = True

    name = "moco"
    domain = ">= 0"

    def __post_init__(self) -> None:
        self._in("beta", 0.0, 1.0, "in (0, 1]", open_low=True, open_high=False)
        for name in ("beta_decay", "gamma", "gamma_decay", "rho"):
            self._in(name, 0.0, math.inf, ">= 0 and finite")
        object.__setattr__(self, "normalize", bool(self.normalize))


@dataclass(frozen=True)
class DBMTL(BufferAggregator):
    """Dual-balancing: gradients of the logarithms of the losses, averaged over steps, all brought to the largest norm.

    y_i <- x_i / l_i + beta_t (y_i - x_i / l_i), beta_t = beta t^-decay, y = 0 at first; the update is SUM_i w_i y_i, w_i =
    max_j ||y_j|| / ||y_i||. A zero buffer (2^-500 of the longest or less) gets weight 0. Losses must be > 0. The flat
    family is divided by the same l_i.

    Options: beta = 0.9, decay = 0, as the authors'. Cost: K vectors. Invariant up to the length of the update (the largest
    norm is that of the gradients of log l_i, which no unit of a loss changes: invariant). Conflicts can remain.
    Homogeneous of degree 1 in the gradients.

    Lin et al., Dual-Balancing for Multi-Task Learning, arXiv 2308.12029.
    """

    beta: float = 0.9
    decay: float = 0.0

    name = "db_mtl"
    domain = "> 0"

    def __post_init__(self) -> None:
        self._in("beta", 0.0, 1.0, "in [0, 1)")
        self._in("decay", 0.0, math.inf, ">= 0 and finite")


@dataclass(frozen=True)
class ExcessMTL(BufferAggregator):
    """Excess risks: tasks that are far from converged weigh more, however noisy their labels.

    r_ip = sqrt(SUM over steps of x_ip^2), e_i = SUM_p x_ip^2 / r_ip, divided by its value at the task's first step; w_i <-
    w_i exp(eta e_i), scaled to SUM w = K; the update is SUM_i w_i x_i.

    Option: eta = 0.01, the authors' default (their example for Office-31 takes 1). Cost: K vectors, one pass. Invariant:
    w is, so that each task's part scales with it. Conflicts can remain. Homogeneous of degree 1 (a factor common to all
    steps).

    He et al., Robust Multi-Task Learning with Excess Risks, arXiv 2402.02009.
    """

    eta: float = 0.01

    name = "excess_mtl"

    def __post_init__(self) -> None:
        self._in("eta", 0.0, math.inf, ">= 0 and finite")


@dataclass(frozen=True)
class SDMGrad(BufferAggregator):
    """Stochastic direction-oriented multi-objective gradient: a common direction near the mean, without bias from noise.

    Three independent batches give x, y and z. u minimises ||g_u + lambda g_0||^2 / 2 over the simplex, g_0 the mean: by
    `iterations` of stochastic gradient descent along A (u + lambda / K), A_ij = <y_i, z_j> / mean |<y_k, z_k>|, from the u
    of the last step on. The update is (SUM_i u_i x_i + lambda x_0) / (1 + lambda).

    `optimizer.step(closure, batches=[b1, b2, b3])`: the three batches in that order, each with perturbed points of its
    own; own parameters take the mean over the three. A task must be in the first to get an update.

    Options: lam = 0.3 (the paper's lambda for segmentation), lr = 10, momentum = 0.5 (starting at 0 in every step, which
    is ours), iterations = 20, as the authors' code, whose three batches are one by mistake. Cost: three times the passes,
    K^2 inner products. Not invariant. Conflicts can remain. Homogeneous of degree 1.

    Xiao, Ban and Ji, Direction-oriented Multi-objective Learning, arXiv 2305.18409.
    """

    lam: float = 0.3
    lr: float = 10.0
    momentum: float = 0.5
    iterations: int = 20

    name = "sdmgrad"
    has_buffers = False
    batches = 3

    def __post_init__(self) -> None:
        self._in("lam", 0.0, math.inf, ">= 0 and finite")
        self._in("lr", 0.0, math.inf, "positive and finite", open_low=True)
        self._in("momentum", 0.0, 1.0, "in [0, 1)")
        if not isinstance(self.iterations, int) or not 1 <= self.iterations <= 1_000_000:
            raise ValueError(f"SDMGrad: iterations is {self.iterations}; it must be an integer in [1, 1000000]")

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self, rows: Any, others: Any = None, third: Any = None, *, memory: Memory | None = None, **_: Any
    ) -> Tensor | list[Tensor]:
        """One step for the rows x, y, z of three batches; memory as for the other methods."""
        from . import functional

        if others is None or third is None:
            raise TypeError("aggregator 'sdmgrad' needs the rows of three independent batches")
        x, y, z = (functional._read_rows("aggregate", r) for r in (rows, others, third))
        memory = self.fresh_memory(x) if memory is None else memory
        backend = functional._backend(x)
        one = torch.ones(len(x), dtype=torch.float64)
        cross = backend.cross_gramian(y, None, z, None, one, one)
        w = torch.ops.flatmtl.buffer_weights(cross, memory["values"], self.number, self.option_values(len(x)))
        out = [torch.empty_like(t) for t in x[0]]
        backend.combine_(out, x, w)
        return out[0] if isinstance(rows, Tensor) else out


BUFFER_AGGREGATORS.update({cls.name: cls for cls in (GradDrop, MoCo, DBMTL, ExcessMTL, SDMGrad)})
