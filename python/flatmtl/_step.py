"""One step up to the combined update: losses -> per-task gradients -> Gramians -> weights -> update.

The order of the paper's Algorithm 1 (arXiv 2211.13723). The closure is evaluated in `_passes`, parameters are moved and
put back in `_point`, and the flatness mode decides where the perturbed gradients are taken. Arithmetic on parameters
and gradients is in `_arithmetic`, the K-sized solves are always in the C core.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _aggregator_state, _featured, _ops, _record, _sharded, _validation, _weighting
from ._buffers import Plan
from ._clip import clipped
from ._features import Features
from ._losses import Task
from ._passes import Passes
from ._point import Move, Point
from ._protect import Buffers, HeldInterrupt
from ._reserve import Reserve
from ._roles import SHARED, Roles
from ._settings import Settings
from ._sync import Alone
from ._task import Means, Parameter, TaskState, check_losses, check_square
from .buffers import BufferAggregator

if TYPE_CHECKING:
    pass


class Step:
    """One step. `run` ends with `update` set and the parameters as they were; `rollback` undoes a step that failed.

    States of methods are values: a step reads `states` and leaves what they become in `new_states`, so that a step that
    fails has changed nothing.
    """

    def __init__(
        self, params: Sequence[Parameter], settings: Settings, roles: Roles, *, tasks: Sequence[Task] | None,
        states: dict[str, Any], draw: int, loss_scale: float, buffers: Buffers, interrupt: HeldInterrupt,
        reserve: Reserve, sync: Alone | None = None,
    ) -> None:  # fmt: skip
        self.sync = sync or Alone()
        self.params = list(params)
        self.settings, self.roles, self.draw, self.loss_scale = settings, roles, draw, loss_scale
        self.known_tasks, self.states, self.new_states = tasks, states, dict(states)
        self.buffers, self.interrupt = buffers, interrupt
        self.flat = not settings.flat.uses_rho or any(p.rho_shared != 0.0 or p.rho_task != 0.0 for p in params)
        self.point = Point(params, self.sync, reserve, settings.rows_dtype)
        self.summed = self.flat and not settings.flat.needs_task_gradients(settings.combine) and not settings.weighting
        self.summed = self.summed and not self.point.sharded  # FSDP hides which parameters a graph reaches
        self.buffered = isinstance(settings.aggregator, BufferAggregator)
        self.summed = self.summed and not self.buffered
        if settings.batched == "passes" and (self.point.sharded or not isinstance(self.sync, Alone)):
            raise ValueError("batched='passes' works in one process and without DTensors")
        if self.buffered and self.point.sharded:
            raise ValueError(f"aggregator {settings.aggregator.name!r} does not work with sharded parameters")
        self.featured = settings.features is not None and not settings.flat.needs_features
        if settings.features is not None and not isinstance(self.sync, Alone):
            raise ValueError("features= works in one process: the ranks' features are not the same (sync=)")
        if self.featured and self.flat and not settings.flat.works_at_features(settings.combine):
            raise ValueError(f"features= with flatness mode {settings.flat.name!r} needs rho = 0 in every param group")
        self.point.arithmetic.accumulate = _ops.ACCUMULATE[settings.accumulate]
        self.tensors = self.point.tensors
        self.arithmetic = self.point.arithmetic
        self.old_grads = [t.grad for t in self.point.leaves]
        for t in self.point.leaves:
            t.grad = None  # so that a backward inside the closure cannot add to it
        self.passes: Passes | Any = None
        self.validation: Any = None
        self.micro: Sequence[int] = ()
        self.tasks: list[TaskState] = []  # all of them
        self.present: list[TaskState] = []  # those that take part
        self.parts: list[list[TaskState]] = []  # of each batch, for an aggregator that wants them apart
        self.factors: list[float] | None = None  # of the losses of the present tasks; None: 1 each
        self.shared: list[int] = []  # indices of the shared parameters that a loss of this step reaches
        self.new_roles = dict(roles.of)
        self.losses: Any = None
        self.update: list[Tensor | None] = []
        self.record: dict[str, Any] = {}

    # -- the order of a step ---------------------------------------------------------------------------------------

    def run(self, closure: Any, batches: Sequence[Any] | None = None, validation: Any = None) -> None:
        self.validation = validation
        features = None if self.settings.features is None else Features(self.settings.features)
        self.passes = Passes(
            closure, batches, self.point, buffers=self.buffers, interrupt=self.interrupt,
            replay_rng=self.settings.replay_rng, loss_scale=self.loss_scale, roles_given=self.roles.fixed is not None,
            sync=self.sync, check_graph=any(t not in self.roles.of for t in self.tensors), features=features,
            batched=self.settings.batched,
        )  # fmt: skip
        self.passes.stop_at_features = self.featured and not self.flat
        self.passes.closure = _validation.prepare(self, closure, validation)
        self.sync.start(self.params, self.settings, self.draw)
        count = len(self.passes.arguments)
        wanted = getattr(self.settings.aggregator, "batches", 0)
        if wanted and count != wanted:
            raise ValueError(
                f"aggregator {self.settings.aggregator.name!r} needs {wanted} independent micro-batches, "
                f"step(closure, batches=...), but got {count if batches is not None else 'none'}"
            )
        one_by_one = (self.settings.m_sharpness and self.flat and count > 1) or wanted > 1
        self.point.rounding.begin_step(means=one_by_one or self.sync.local)
        groups = [[m] for m in range(count)] if one_by_one else [list(range(count))]
        means = Means(len(groups))
        for micro in groups:
            part = self._gradients(micro)
            if wanted:
                self.parts.append([copy.copy(state) for state in part])
            for state in part:
                means.add(state)
        if len(groups) > 1 or self.sync.local:
            self.tasks = self.sync.both(means.states(), self.summed)
            self.losses = self.sync.container(self.passes.losses(), self.tasks)
            self.point.rounding.end_means()
            for state in [*self.tasks, *(state for part in self.parts for state in part)]:
                self.point.narrow_(state.grads)
                self.point.narrow_(state.perturbed)
            self._find_roles()
            self._measure()
        if not self.featured:
            self._finish()
        self.sync.finish()
        self.record["traffic_bytes"] = self.sync.traffic

    def _gradients(self, micro: Sequence[int]) -> list[TaskState]:
        """Gradients of some micro-batches: unperturbed, and at points that are perturbed along them."""
        self.micro = micro
        self.tasks = self.passes.unperturbed(micro, self.summed)
        self.losses = self.sync.container(self.passes.losses(), self.tasks)
        check_losses([(s.task, s.loss) for s in self.tasks if s.loss is not None], "unperturbed")
        self._check_tasks()
        after = self.passes.snapshot()
        self._find_roles()
        self._measure()
        self.passes.stop_at_features = self.featured
        if self.flat and self.featured:
            self.passes.at_features = None  # those of the perturbed pass are other tensors
        if self.flat:
            self.settings.flat.perturb(self)
        if self.summed:  # only now the tasks' own gradients are known
            self._measure()
        if self.featured:  # while the graph of the trunk is there
            _featured.finish(self)
        if self.flat:
            if not self.featured:
                self.point.restore()
            after.restore()
        return self.tasks

    def _check_tasks(self) -> None:
        tasks = [state.task for state in self.tasks]
        if self.known_tasks is not None and tasks != list(self.known_tasks):
            raise RuntimeError(
                f"closure returned losses of tasks {tasks!r}, but earlier steps had {list(self.known_tasks)!r} "
                "(return None for a task that is absent from a batch)"
            )

    def _find_roles(self) -> None:
        """Which parameters are shared and which are one task's own."""
        leaves = self.point.leaves
        final = [self.new_roles.get(t) == SHARED for t in leaves]
        reached = [[leaves[i] for i in s.touched if not final[i]] for s in self.tasks]
        self.new_roles = self.roles.grown(reached, self.new_roles)
        role = [self.new_roles.get(t) for t in leaves]
        for state in self.tasks:
            state.own = [i for i in state.reached if role[i] != SHARED]
        hit_any = {i for s in self.tasks for i in s.touched}
        self.shared = [i for i, r in enumerate(role) if r == SHARED and i in hit_any]

    def _measure(self) -> None:
        """Norms of the unperturbed gradients; which tasks are present: those with a loss, unless loss and gradient are
        zero."""
        adaptive = self.settings.adaptive
        if self.summed:
            self.present = [s for s in self.tasks if s.loss is not None and not self._zero(s, s.perturbed)]
            return
        self.present = []
        states = [s for s in self.tasks if s.loss is not None]
        squares = self.sq_norms([self.point.row(s.grads, self.shared) for s in states], self.shared, adaptive)
        for state, square in zip(states, squares, strict=True):
            state.sq_shared = square
            state.sq_own = self.sq_norm(self.point.row(state.grads, state.own), state.own, adaptive)
            check_square(state.sq_shared + state.sq_own, state.task, "unperturbed")
            if not self._zero(state, state.grads):
                self.present.append(state)
        self.factors = _weighting.factors(self)

    def _zero(self, state: TaskState, gradients: list[Tensor | None]) -> bool:
        """Whether the loss and its gradient are zero; False where `gradients` is empty, not known yet."""
        if not gradients or float(state.loss) != 0.0:  # type: ignore[arg-type]
            return False
        for indices in (self.shared, state.own):
            if self.sq_norm(self.point.row(gradients, indices), indices, False) != 0.0:
                return False
        at = self.passes.at_features
        return at is None or float(at.gramian([state.index])) == 0.0

    # -- what flatness modes use -----------------------------------------------------------------------------------

    def sq_norm(self, row: list[Tensor], indices: Sequence[int], adaptive: bool) -> float:
        """Squared norm of a row, ASAM-weighted if adaptive."""
        return self.sq_norms([row], indices, adaptive)[0] if indices else 0.0

    def sq_norms(self, rows: list[list[Tensor]], indices: Sequence[int], adaptive: bool) -> list[float]:
        """`sq_norm` of every row."""
        params = [self.point.saved[i] for i in indices] if adaptive else None
        return self.arithmetic.sq_norms(rows, indices, params, self.settings.eta)

    def factor(self, i: int) -> float:
        """The factor of the loss of present task i."""
        return 1.0 if self.factors is None else self.factors[i]

    def summed_gradient(self) -> tuple[list[Tensor], list[int]]:
        """SUM_i c_i (g_i, h_i) with the losses' factors c: one tensor for every parameter of `self.shared + own`, and
        own, the own parameters of all tasks. Not to be written to."""
        own = sorted({i for s in self.present for i in s.own})
        indices = [*self.shared, *own]
        if self.passes.sum is not None:
            row = self.point.row(self.passes.sum, indices)
        elif len(self.present) == 1 and self.factors is None:
            row = self.point.row(self.present[0].grads, indices)
        else:
            rows = [self.point.row(s.grads, indices) for s in self.present]
            factors = torch.tensor([self.factor(k) for k in range(len(rows))], dtype=torch.float64)
            row = [torch.empty_like(self.tensors[i]) if rows else self.point.zeros(i) for i in indices]
            if rows:
                self.arithmetic.combine_(row, rows, None, indices, factors, None)
        square = self.arithmetic.sq_norm(row, indices)
        check_square(square, "sum of the losses", "unperturbed")
        return row, own

    def along(self, state: TaskState) -> Move:
        """To (theta + rho g_i/||g_i||, psi_i + rho h_i/||h_i||): Algorithm 1, step 2."""
        row = self.point.row(state.grads, self.shared + state.own)
        return self.along_row(row, state.own, state.sq_shared, state.sq_own)

    def along_row(self, row: Sequence[Tensor], own: Sequence[int], sq_shared: float, sq_own: float) -> Move:
        """To saved + rho row/||row||, or its ASAM form.

        Args:
            row: one tensor for every parameter of `self.shared + own`.
            sq_shared, sq_own: squared norms of the two parts of the row (`sq_norm`). With norm="separate" each part
                moves on its own sphere, with "joint" both on one. A part with norm 0 stays.
        """
        shared_norm, own_norm = math.sqrt(sq_shared), math.sqrt(sq_own)
        if self.settings.norm == "joint":
            shared_norm = own_norm = math.sqrt(sq_shared + sq_own)
        shared_scale = 1.0 / shared_norm if shared_norm else 0.0
        own_scale = 1.0 / own_norm if own_norm else 0.0
        scales = [self.params[i].rho_shared * shared_scale for i in self.shared]
        scales += [self.params[i].rho_task * own_scale for i in own]
        return Move([*self.shared, *own], row, scales, self.settings.adaptive, self.settings.eta)

    def perturb_each(self, states: Sequence[TaskState], move: Callable[[TaskState], Move]) -> None:
        """The perturbed passes of tasks at points of their own."""
        if self.settings.batched == "passes" and len(states) > 1:
            moves = [move(s) for s in states]
            indices = sorted({*self.shared, *(i for s in states for i in s.reached)})
            self.passes.perturbed_together(self.micro, states, self.point.stack(indices, moves))
            return
        for state in states:
            self.point.move(move(state))
            self.passes.perturbed(self.micro, [state])
            self.point.restore(state.own)  # the shared ones are overwritten by the next task's move

    # -- weights and update ----------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Gramians of both families, their weights, and the combined update."""
        count, flat = len(self.present), self.flat
        loss_rows = [] if self.summed else [self.point.row(s.grads, self.shared) for s in self.present]
        perturbed_rows = [self.point.row(s.perturbed, self.shared) for s in self.present] if flat else None
        nan = torch.full((count,), math.nan, dtype=torch.float64)
        pair = torch.zeros(2 * count, 2 * count, dtype=torch.float64)
        a, b, status = nan, nan, torch.zeros(2, dtype=torch.int64)
        c = (
            torch.ones(count, dtype=torch.float64)
            if self.factors is None
            else torch.tensor(self.factors, dtype=torch.float64)
        )
        p, q = torch.zeros(count, dtype=torch.float64), torch.ones(count, dtype=torch.float64)
        plan: Plan | None = None
        if count:
            pair, direct = self._gramians(loss_rows, perturbed_rows)
            if self.factors is not None:
                pair = pair * torch.outer(c.repeat(2), c.repeat(2))
                direct = None if direct is None else direct * torch.outer(c, c)
            changed = self.settings.flat.transform(self, pair) if flat else None
            if changed is not None:
                p, q = changed
                pair = _transformed(pair, p, q)
                direct = None if direct is None else _sum_of_families(pair)
            if self.shared and self.buffered:
                plan = Plan(self, loss_rows, perturbed_rows, pair, direct, (p, q, c))
            elif self.shared:
                a, b, status = self._weights(pair, direct)
        if plan is not None:
            self._combine(loss_rows, perturbed_rows, a, None, (p, q, c), plan)
            a, *rest = plan.write([self.point.saved[i] for i in self.shared])  # changes buffers: the last thing
            b = rest[0] if rest else a if flat else nan
        elif self.summed:  # SUM a_i s_i
            self._combine(perturbed_rows or [], None, a * c, None, (p, q, c))
        elif flat:  # SUM a_i g_i + b_i (p_i g_i + q_i f_i)
            self._combine(loss_rows, perturbed_rows, (a + b * p) * c, b * q * c, (p, q, c))
        else:
            b = nan
            self._combine(loss_rows, None, a * c, None, (p, q, c))
        self.record = _record.make(self, pair, a, b, status)
        if flat and count:
            self.settings.flat.finish(self, pair)

    def _gramians(
        self, loss_rows: list[list[Tensor]], perturbed_rows: list[list[Tensor]] | None
    ) -> tuple[Tensor, Tensor | None]:
        """The Gramian of (g, f), (2K, 2K), and that of s for combine="direct"; without the loss scale. <g_i, f_j> is 0
        where nothing looks at it."""
        count = len(self.present)
        direct = None
        pair = torch.zeros(2 * count, 2 * count, dtype=torch.float64)
        if perturbed_rows is None:
            pair[:count, :count] = self.arithmetic.gramian(loss_rows, self.shared)
        elif self.summed:
            direct = self.arithmetic.gramian(perturbed_rows, self.shared)
            for square, state in zip(direct.diagonal().tolist(), self.present, strict=True):
                check_square(square, state.task, "perturbed")
        else:
            cross = self.settings.combine in ("second", "each") or self.settings.flat.needs_cross_products
            pair = self.arithmetic.gramian_pair(loss_rows, perturbed_rows, self.shared, cross)
            if self.settings.combine == "direct":
                direct = self.arithmetic.gramian(perturbed_rows, self.shared)
        squares = pair.diagonal().tolist()
        for i, state in enumerate(self.present):
            check_square(squares[i], state.task, "unperturbed")
            check_square(squares[count + i], state.task, "perturbed")
        unscale = self.loss_scale**-2.0
        if unscale == 1.0:
            return pair, direct
        return pair * unscale, None if direct is None else direct * unscale

    def _weights(self, pair: Tensor, direct: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of the loss family and of the flat family, and their statuses."""
        aggregator, old, tasks = self.settings.aggregator, self.states.get("aggregator"), len(self.tasks)
        present = [s.index for s in self.present]
        options = aggregator.option_values(tasks, seed=self.settings.seed, draw=self.draw, present=present)
        combine, perturbed = self.settings.combine, direct
        if not self.flat:  # one call, of the loss family
            combine, perturbed = "direct", pair[: len(present), : len(present)].contiguous()
        state = _aggregator_state.gather(old, aggregator, combine, tasks, present)
        arguments = [
            pair, perturbed, aggregator.number, options, _ops.COMBINE[combine],
            _ops.FAMILY_SCALE[self.settings.family_scale],
        ]  # fmt: skip
        if state is None:
            a, b, status = torch.ops.flatmtl.step_weights(*arguments)
        else:
            a, b, status = torch.ops.flatmtl.step_weights_(*arguments, state)
            self.new_states["aggregator"] = _aggregator_state.scatter(old, aggregator, combine, tasks, present, state)
        if self.settings.max_norm is not None and not self.featured:  # there the rows are not the parameters'
            families = not self.flat or combine == "decomposed"
            a, b = clipped(a, b, pair, direct, self.settings.max_norm, families=families)
        return a, b, status

    def _combine(
        self, loss_rows: list[list[Tensor]], perturbed_rows: list[list[Tensor]] | None, loss_weights: Tensor,
        flat_weights: Tensor | None, own_factors: tuple[Tensor, Tensor, Tensor],
        plan: Plan | None = None,
    ) -> None:  # fmt: skip
        """The update: the weighted rows for shared parameters; for own ones t_i, or h_i if there are no perturbed ones,
        as (p, q, c) change it. Takes over the saved copies."""
        out = self.point.saved
        self.update = [None] * len(self.tensors)
        self.interrupt.check()
        if self.present and self.shared:
            target = [out[i] for i in self.shared]
            if plan is None:
                self.arithmetic.combine_(target, loss_rows, perturbed_rows, self.shared, loss_weights, flat_weights)
            for i in self.shared:
                self.update[i] = out[i]
        with torch.no_grad():
            factors = zip(*(x.tolist() for x in own_factors), strict=True)
            for state, (p, q, c) in zip(self.present, factors, strict=True):
                for i in state.own:
                    gradient = self.point.wide(i, self._own_update(state, i, p, q))
                    if c != 1.0:
                        gradient = gradient * c
                    if self.update[i] is None:
                        self.update[i] = out[i].copy_(gradient)
                    else:  # only with shared=: an own parameter that several losses reach
                        out[i].add_(gradient)

    def _own_update(self, state: TaskState, i: int, p: float, q: float) -> Tensor:
        """h_i, or h_i + p h_i + q (t_i - h_i): t_i itself where p = 0 and q = 1."""
        t = self.point.zeros(i)  # kept where only micro-batches reach it in which the task is absent
        if self.flat:
            t = t if (perturbed := state.perturbed[i]) is None else perturbed
            if (p, q) == (0.0, 1.0):
                return t
        h = state.grads[i]
        assert h is not None
        return self.point.wide(i, h) * (1.0 + p - q) + self.point.wide(i, t) * q if self.flat else h

    # -- undoing ---------------------------------------------------------------------------------------------------

    def rollback(self) -> None:
        """Everything as it was before the step, bit for bit."""
        self.point.rollback()
        if self.passes is not None:
            self.passes.rollback()
        for t, grad in zip(self.point.leaves, self.old_grads, strict=True):
            t.grad = grad

    def overflow(self) -> None:
        """After `rollback`: Inf in the `.grad` of every parameter that was reached, for GradScaler to see."""
        hit = {i for s in self.tasks for i in s.reached}  # none if every task is absent from this rank
        for i, (t, out) in enumerate(zip(self.point.leaves, self.point.saved, strict=True)):
            if not hit or i in hit:
                t.grad = _sharded.like(t, out.fill_(math.inf))


def _transformed(pair: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Gramian of (g_i, p_i g_i + q_i f_i) from that of (g, f)."""
    count = len(p)
    t = torch.zeros_like(pair)
    t[:count, :count] = torch.eye(count, dtype=pair.dtype)
    t[count:, :count], t[count:, count:] = p.diag(), q.diag()
    return t @ pair @ t.T


def _sum_of_families(pair: Tensor) -> Tensor:
    """Gramian of g_i + f_i from that of (g, f)."""
    count = len(pair) // 2
    cross = pair[:count, count:]
    return pair[:count, :count] + cross + cross.T + pair[count:, count:]
