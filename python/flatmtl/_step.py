"""One F-MTL step up to the combined update: losses -> per-task gradients -> Gramians -> weights -> update.

The order of the paper's Algorithm 1 (arXiv 2211.13723). Arithmetic on parameters and gradients is in the backend
(`_native`: the C core; `_generic`: torch's own operations), the K-sized solves are always in the C core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _backend, _losses, _ops, _record
from ._losses import Loss, Task
from ._protect import Buffers, HeldInterrupt, Pass
from ._roles import SHARED, Roles

if TYPE_CHECKING:
    from .aggregators import Aggregator


class NonFiniteError(RuntimeError):
    """A loss or a gradient is Inf or NaN. `task` names it, `pass_` is "unperturbed" or "perturbed"."""

    def __init__(self, task: Task, pass_: str, what: str, value: float) -> None:
        self.task, self.pass_, self.value = task, pass_, value
        super().__init__(
            f"task {task!r}: {what} is not finite ({value}) in the {pass_} pass; nothing was changed. "
            "If this task is absent from the batch, return None as its loss; nonfinite='skip' skips such steps"
        )


@dataclass
class Settings:
    """Options of the step; see `FlatMTL`."""

    aggregator: Aggregator
    adaptive: bool
    eta: float
    norm: str
    combine: str
    family_scale: str | None
    replay_rng: bool
    seed: int


@dataclass
class Parameter:
    """A parameter of the step: its radii (negative in groups that maximize) and its name for messages."""

    tensor: Tensor
    rho_shared: float
    rho_task: float
    name: str


@dataclass(eq=False)
class TaskState:
    """What a step knows of one task."""

    task: Task
    loss: Loss | None = None
    grads: list[Tensor | None] = field(default_factory=list)  # one a parameter, None where not reached
    own: list[int] = field(default_factory=list)  # indices of its own parameters
    own_perturbed: list[Tensor] = field(default_factory=list)  # t_i
    pass_index: int = 0  # which unperturbed pass it came from
    perturbed_loss: Tensor | None = None
    sq_shared: float = 0.0  # squared norms, ASAM-weighted if adaptive
    sq_own: float = 0.0


class Step:
    """One step. `run` ends with `update` set and the parameters as they were; `rollback` undoes a step that failed."""

    def __init__(
        self, params: Sequence[Parameter], settings: Settings, roles: Roles, *, draw: int, loss_scale: float,
        buffers: Buffers, interrupt: HeldInterrupt,
    ) -> None:  # fmt: skip
        self.params = list(params)
        self.tensors = [p.tensor for p in params]
        self.settings, self.roles, self.draw, self.loss_scale = settings, roles, draw, loss_scale
        self.buffers, self.interrupt = buffers, interrupt
        self.flat = any(p.rho_shared != 0.0 or p.rho_task != 0.0 for p in params)
        self.devices = sorted({t.device for t in self.tensors}, key=str)
        self.saved = [torch.empty_like(t) for t in self.tensors]
        self.groups = _backend.group(self.tensors, self.saved)
        self._copy(self.saved, self.tensors)
        self.versions = self._versions()
        self.old_grads = [t.grad for t in self.tensors]
        for t in self.tensors:
            t.grad = None  # so that a backward inside the closure cannot add to it
        self.passes: list[Pass] = []
        self.tasks: list[TaskState] = []
        self.losses: Any = None
        self.form = ""
        self.moved = False
        self.update: list[Tensor | None] = []
        self.record: dict[str, Any] = {}

    # -- passes --------------------------------------------------------------------------------------------------

    def run(self, closure: Any) -> None:
        self.closure = closure
        self.unperturbed()
        after = Pass(self.buffers, self.devices)
        self.find_roles()
        self.measure()
        if self.flat:
            for state in self.present:
                self.perturbed(state)
            self._copy(self.tensors, self.saved)
            self.moved, self.versions = False, self._versions()
            after.restore()
        self.finish()

    def unperturbed(self) -> None:
        """Losses at theta, and g_i, h_i = d loss_i / d (theta, psi_i)."""
        if _losses.is_per_task(self.closure):
            _losses.check_closures(self.closure)
            tasks = _losses.tasks_of(self.closure)
            for task in tasks:
                value = self._forward(self.closure[task], None)
                loss = None if value is None else _losses.read_loss(task, value)
                self._add_task(task, loss, retain_graph=False, alone=True)
            container = self.closure
        else:
            container = self._forward(self.closure, None)
            losses = _losses.read_losses(container)
            last = max((i for i, loss in enumerate(losses) if loss is not None), default=-1)
            for i, (task, loss) in enumerate(zip(_losses.tasks_of(container), losses, strict=True)):
                self._add_task(task, loss, retain_graph=i < last, alone=len(losses) == 1)
        self.form = _losses.describe(container)
        self.losses = _losses.like_container(container, [None if s.loss is None else s.loss.value for s in self.tasks])
        self._check_unchanged()
        self._check_losses([(s.task, s.loss.value) for s in self.tasks if s.loss is not None], "unperturbed")

    def _forward(self, closure: _losses.Closure, task: Task | None, start: Pass | None = None) -> Any:
        """Runs a closure: from where RNG and buffers stand, or, in a perturbed pass, from `start`."""
        watching = self.buffers.watching()
        if start is None:
            self.passes.append(Pass(self.buffers, self.devices))
        else:
            start.restore(rng=self.settings.replay_rng)
        with self.interrupt.window(), torch.enable_grad(), watching:
            return closure(task=task) if _losses.takes_task(closure) else closure()

    def _add_task(self, task: Task, loss: Loss | None, *, retain_graph: bool, alone: bool) -> None:
        state = TaskState(task, loss, pass_index=len(self.passes) - 1)
        if loss is not None:
            if not (loss.separable or alone) and self.roles.fixed is None:
                raise RuntimeError(
                    f"loss of task {task!r} is an element of a vector computed as a whole, so the graph does not tell "
                    "which parameters it reaches. Return the losses as separate scalars (or torch.stack of them), or "
                    "name the shared parameters: FlatMTL(..., shared=...)"
                )
            state.grads = self._gradients(loss, self.tensors, retain_graph, list(range(len(self.tensors))))
        self.tasks.append(state)

    def _gradients(
        self, loss: Loss, tensors: list[Tensor], retain_graph: bool, indices: Sequence[int]
    ) -> list[Tensor | None]:
        meta = loss.edge.node._input_metadata[loss.edge.output_nr]
        seed = torch.full(tuple(meta.shape), self.loss_scale, dtype=meta.dtype, device=meta.device)
        with self.interrupt.window():
            grads = torch.autograd.grad(
                [loss.edge], tensors, grad_outputs=[seed], retain_graph=retain_graph, allow_unused=True
            )
        return [
            None if g is None else _fitted(g, t, self.params[i].name)
            for g, t, i in zip(grads, tensors, indices, strict=True)
        ]

    def perturbed(self, state: TaskState) -> None:
        """s_i, t_i: the gradients at (theta + eps_shared_i, psi_i + eps_own_i). Algorithm 1, steps 2 and 3."""
        loss = state.loss
        assert loss is not None
        moved = self.shared + state.own
        shared_scale, own_scale = self._scales(state)
        scales = [self.params[i].rho_shared * shared_scale for i in self.shared]
        scales += [self.params[i].rho_task * own_scale for i in state.own]
        self.moved = True
        gradients = self._rows(state, self.shared) + self._rows(state, state.own)
        for group in self.groups:
            at = [k for k, i in enumerate(moved) if i in group]
            group.backend.perturb_(
                [self.tensors[moved[k]] for k in at], [self.saved[moved[k]] for k in at], [gradients[k] for k in at],
                [scales[k] for k in at], self.settings.adaptive, self.settings.eta,
            )  # fmt: skip
        self.versions = self._versions()
        perturbed = self._perturbed_loss(state)
        self._check_unchanged()
        reached = [i for i in moved if state.grads[i] is not None]
        grads = dict(
            zip(reached, self._gradients(perturbed, [self.tensors[i] for i in reached], False, reached), strict=True)
        )
        state.perturbed_loss = perturbed.value
        self._check_losses([(state.task, perturbed.value)], "perturbed")
        state.own_perturbed = [_or_zeros(grads[i], self.tensors[i]) for i in state.own]
        self._check_norm(self._sq_norm(state.own_perturbed, state.own, False), state.task, "perturbed")
        self.perturbed_rows[self.present.index(state)] = [
            self._zeros(i) if state.grads[i] is None else _or_zeros(grads[i], self.tensors[i]) for i in self.shared
        ]
        self._copy(self.tensors, self.saved, state.own)  # the shared ones are overwritten by the next perturbation

    def _perturbed_loss(self, state: TaskState) -> Loss:
        start = self.passes[state.pass_index]
        if _losses.is_per_task(self.closure):
            value = self._forward(self.closure[state.task], state.task, start)
            if value is None:
                raise RuntimeError(f"closure of task {state.task!r} returned None in the perturbed pass only")
            return _losses.read_loss(state.task, value)
        value = self._forward(self.closure, state.task, start)
        if isinstance(value, Tensor) and value.dim() == 0 and _losses.takes_task(self.closure):
            return _losses.read_loss(state.task, value)
        form = _losses.describe(value)
        if form != self.form:
            raise RuntimeError(f"closure returned {self.form} in the unperturbed pass, but {form} in a perturbed one")
        loss = _losses.read_losses(value)[[s.task for s in self.tasks].index(state.task)]
        if loss is None:
            raise RuntimeError(f"loss of task {state.task!r} is None in the perturbed pass only")
        return loss

    # -- roles, norms, weights -----------------------------------------------------------------------------------

    def find_roles(self) -> None:
        reached = [{t for t, g in zip(self.tensors, s.grads, strict=False) if g is not None} for s in self.tasks]
        self.new_roles = self.roles.grown(reached)
        role = [self.new_roles.get(t) for t in self.tensors]
        for state in self.tasks:
            hit = [i for i, g in enumerate(state.grads) if g is not None]
            state.own = [i for i in hit if role[i] != SHARED]
        hit_any = {i for s in self.tasks for i, g in enumerate(s.grads) if g is not None}
        self.shared = [i for i, r in enumerate(role) if r == SHARED and i in hit_any]

    def measure(self) -> None:
        """Norms of the unperturbed gradients; which tasks are present."""
        self._zero: dict[int, Tensor] = {}
        self.present: list[TaskState] = []
        for state in self.tasks:
            if state.loss is None:
                continue
            rows = self._rows(state, self.shared)
            own = self._rows(state, state.own)
            state.sq_shared = self._sq_norm(rows, self.shared, self.settings.adaptive)
            state.sq_own = self._sq_norm(own, state.own, self.settings.adaptive)
            self._check_norm(state.sq_shared + state.sq_own, state.task, "unperturbed")
            absent = float(state.loss.value) == 0.0 and self._sq_norm(rows, self.shared, False) == 0.0
            if absent and self._sq_norm(own, state.own, False) == 0.0:
                continue
            self.present.append(state)
        self.loss_rows = [self._rows(s, self.shared) for s in self.present]
        self.perturbed_rows: list[list[Tensor]] = [[] for _ in self.present]

    def finish(self) -> None:
        """Gramians of both families, their weights, and the combined update."""
        count = len(self.present)
        flat = self.flat
        nan = torch.full((count,), math.nan, dtype=torch.float64)
        pair = torch.zeros(2 * count, 2 * count, dtype=torch.float64)
        weights_loss, weights_flat, status = nan, nan, torch.zeros(2, dtype=torch.int64)
        if self.shared and count:
            direct = self._gramians(pair, flat)
            aggregator = self.settings.aggregator
            options = aggregator.option_values(
                len(self.tasks), seed=self.settings.seed, draw=self.draw,
                present=[i for i, s in enumerate(self.tasks) if s in self.present],
            )  # fmt: skip
            weights_loss, weights_flat, status = torch.ops.flatmtl.step_weights(
                pair, direct, aggregator.number, options,
                _ops.COMBINE[self.settings.combine if flat else "decomposed"],
                _ops.FAMILY_SCALE[self.settings.family_scale],
            )  # fmt: skip
            if not flat:
                weights_flat = nan
        self._combine(weights_loss, weights_flat if flat else None)
        self.record = _record.make(self, pair, weights_loss, weights_flat, status, flat)

    def _gramians(self, pair: Tensor, flat: bool) -> Tensor | None:
        """Fills `pair`, the Gramian of (g, f); returns that of s for combine="direct"."""
        count = len(self.present)
        needs_direct = flat and self.settings.combine == "direct"
        direct = torch.zeros(count, count, dtype=torch.float64) if needs_direct else None
        for group in self.groups:
            at = [k for k, i in enumerate(self.shared) if i in group]
            if not at:
                continue
            rows = [[row[k] for k in at] for row in self.loss_rows]
            if not flat:
                pair[:count, :count] += group.backend.gramian(rows)
                continue
            perturbed = [[row[k] for k in at] for row in self.perturbed_rows]
            pair += group.backend.gramian_pair(rows, perturbed)
            if direct is not None:
                direct += group.backend.gramian(perturbed)
        for i, state in enumerate(self.present):
            self._check_norm(float(pair[i, i]), state.task, "unperturbed")
            self._check_norm(float(pair[count + i, count + i]), state.task, "perturbed")
        unscale = self.loss_scale**-2.0
        pair *= unscale
        return direct * unscale if direct is not None else None

    def _combine(self, weights_loss: Tensor, weights_flat: Tensor | None) -> None:
        """The update: SUM a_i g_i + b_i f_i for shared parameters, t_i for own ones. Takes over the saved copies."""
        out = self.saved
        self.update = [None] * len(self.tensors)
        self.interrupt.check()
        for group in self.groups if self.present else ():
            at = [k for k, i in enumerate(self.shared) if i in group]
            if not at:
                continue
            target = [out[self.shared[k]] for k in at]
            rows = [[row[k] for k in at] for row in self.loss_rows]
            if weights_flat is None:
                group.backend.combine_(target, rows, weights_loss)
            else:
                perturbed = [[row[k] for k in at] for row in self.perturbed_rows]
                group.backend.combine_pair_(target, rows, perturbed, weights_loss, weights_flat)
            for k in at:
                self.update[self.shared[k]] = out[self.shared[k]]
        with torch.no_grad():
            for state in self.present:
                for k, i in enumerate(state.own):
                    gradient = state.grads[i] if weights_flat is None else state.own_perturbed[k]
                    assert gradient is not None
                    if self.update[i] is None:
                        self.update[i] = out[i].copy_(gradient)
                    else:  # only with shared=: an own parameter that several losses reach
                        out[i].add_(gradient)

    # -- undoing -------------------------------------------------------------------------------------------------

    def rollback(self) -> None:
        """Everything as it was before the step, bit for bit."""
        if self.moved or self._versions() != self.versions:
            self._copy(self.tensors, self.saved)
        if self.passes:
            self.passes[0].restore()
        for t, grad in zip(self.tensors, self.old_grads, strict=True):
            t.grad = grad

    def overflow(self) -> None:
        """After `rollback`: Inf in the `.grad` of every parameter that was reached, for GradScaler to see."""
        for i, (t, out) in enumerate(zip(self.tensors, self.saved, strict=True)):
            if any(s.grads and s.grads[i] is not None for s in self.tasks):
                t.grad = out.fill_(math.inf)

    # -- small things --------------------------------------------------------------------------------------------

    def _versions(self) -> list[tuple[int, int]]:
        return [(t._version, t.data_ptr()) for t in self.tensors]

    def _check_unchanged(self) -> None:
        for p, before, now in zip(self.params, self.versions, self._versions(), strict=True):
            if before != now:
                raise RuntimeError(f"parameter {p.name} was changed in place by the closure")

    def _copy(self, to: list[Tensor], source: list[Tensor], indices: Sequence[int] | None = None) -> None:
        for group in self.groups:
            at = group.indices if indices is None else [i for i in indices if i in group]
            if at:
                group.backend.copy_([to[i] for i in at], [source[i] for i in at])

    def _rows(self, state: TaskState, indices: Sequence[int]) -> list[Tensor]:
        return [self._zeros(i) if state.grads[i] is None else state.grads[i] for i in indices]  # type: ignore[misc]

    def _zeros(self, i: int) -> Tensor:
        if i not in self._zero:
            self._zero[i] = torch.zeros_like(self.tensors[i])
        return self._zero[i]

    def _sq_norm(self, row: list[Tensor], indices: Sequence[int], adaptive: bool) -> float:
        """Squared norm of a row over all groups."""
        total = 0.0
        for group in self.groups:
            at = [k for k, i in enumerate(indices) if i in group]
            if at:
                params = [self.saved[indices[k]] for k in at] if adaptive else None
                total += float(group.backend.sq_norms([[row[k] for k in at]], params, self.settings.eta)[0])
        return total

    def _scales(self, state: TaskState) -> tuple[float, float]:
        """1 / norm of the shared and of the own part, 0 where the norm is 0."""
        shared, own = math.sqrt(state.sq_shared), math.sqrt(state.sq_own)
        if self.settings.norm == "joint":
            shared = own = math.sqrt(state.sq_shared + state.sq_own)
        return (1.0 / shared if shared else 0.0), (1.0 / own if own else 0.0)

    def _check_norm(self, square: float, task: Task, pass_: str) -> None:
        if not math.isfinite(square):
            raise NonFiniteError(task, pass_, "the gradient", math.sqrt(square) if square > 0 else square)

    def _check_losses(self, losses: list[tuple[Task, Tensor]], pass_: str) -> None:
        if not losses:
            return
        numbers = torch.stack([value.double() for _, value in losses]).tolist()  # one synchronisation
        for (task, _), number in zip(losses, numbers, strict=True):
            if not math.isfinite(number):
                raise NonFiniteError(task, pass_, "the loss", number)


def _fitted(grad: Tensor, param: Tensor, name: str) -> Tensor:
    """`grad` in the memory layout of its parameter."""
    if grad.layout != torch.strided:
        raise RuntimeError(f"gradient of parameter {name} is sparse ({grad.layout}); dense gradients are required")
    if grad.stride() == param.stride():
        return grad
    return torch.empty_like(param).copy_(grad)


def _or_zeros(grad: Tensor | None, param: Tensor) -> Tensor:
    return torch.zeros_like(param) if grad is None else grad
