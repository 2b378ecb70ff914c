"""Evaluations of the user's closure within one step: losses and per-task gradients, at theta and at perturbed points.

Every call of a closure in the unperturbed pass is kept as a `Forward`: with its micro-batch, its tasks, and the random
state and module buffers it started from, so that it can be made again at another point with the same draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _losses, _sharded, _vmapped
from ._features import FeatureGradients, Features
from ._losses import Closure, Loss, Task
from ._point import Point
from ._protect import Buffers, HeldInterrupt, Pass
from ._sync import Alone
from ._task import Means, TaskState, check_losses, check_square


@dataclass(eq=False)
class Forward:
    """One call of a closure: `indices` are the tasks whose losses came from it."""

    closure: Closure
    arguments: tuple[Any, ...]
    start: Pass
    indices: list[int]

    def __post_init__(self) -> None:
        self.takes_task = _losses.takes_task(self.closure)


class Passes:
    """`batches`: arguments of the closure, one a micro-batch; None calls it once, without one."""

    def __init__(
        self, closure: Any, batches: Sequence[Any] | None, point: Point, *, buffers: Buffers, interrupt: HeldInterrupt,
        replay_rng: bool, loss_scale: float, roles_given: bool, sync: Alone, check_graph: bool = False,
        features: Features | None = None, batched: bool | str = False,
    ) -> None:  # fmt: skip
        self.sync, self.batched = sync, batched
        self.closure, self.point = closure, point
        self.arguments: list[tuple[Any, ...]] = [()] if batches is None else [(batch,) for batch in batches]
        self.buffers, self.interrupt, self.replay_rng = buffers, interrupt, replay_rng
        self.loss_scale, self.roles_given = loss_scale, roles_given
        self.forwards: list[list[Forward]] = [[] for _ in self.arguments]  # by micro-batch
        self.tasks: list[Task] = []
        self._containers: list[Any] = []
        self._form = ""
        self.sum: list[Tensor | None] | None = None
        self.check_graph = check_graph
        self.features = features
        self.stop_at_features = False  # whether gradients stop there; then found in `at_features`, with the graph
        self.at_features: FeatureGradients | None = None
        self._first: Pass | None = None
        if _losses.is_per_task(closure):
            _losses.check_closures(closure)
        if batched == "passes" and _losses.is_per_task(closure):
            raise ValueError("batched='passes' needs one closure for all tasks")
        if features is not None and (_losses.is_per_task(closure) or len(self.arguments) > 1):
            raise ValueError("features= needs one closure for all tasks, and no more than one of batches=")

    # -- at theta --------------------------------------------------------------------------------------------------

    def unperturbed(self, micro: Sequence[int], summed: bool = False) -> list[TaskState]:
        """Losses and gradients g_i, h_i, means over the micro-batches with these numbers; not checked for Inf and NaN.
        An absent task has the loss None.

        With `summed` one backward gives the gradient of the sum of the losses alone, to be found in `self.sum`, and
        what each loss reaches is read from its graph.
        """
        self.sync.enter(len(self.arguments))
        self.point.rounding.begin_pass(means=summed or self._takes_means(micro))
        means, sums = Means(len(micro)), Means(len(micro))
        for m in micro:
            total = TaskState("sum of the losses", -1) if summed else None
            self._unperturbed(m, means, total)
            if total is not None:
                sums.add(total)
        states = means.states()
        total = sums.states()[0] if summed else None
        self.point.check_unchanged()
        states = self.sync.unperturbed(states, total, len(self.arguments))
        self.sum = None if total is None else total.grads
        for row in [*(state.grads for state in states), self.sum or []]:
            self.point.narrow_(row)
        return states

    def _takes_means(self, micro: Sequence[int]) -> bool:
        """Of what one backward gives."""
        return len(micro) > 1 or type(self.sync) is not Alone

    def _unperturbed(self, m: int, means: Means, total: TaskState | None) -> None:
        if _losses.is_per_task(self.closure):
            container: Any = self.closure
            states = []
            for i, task in enumerate(_losses.tasks_of(container)):
                forward = Forward(container[task], self.arguments[m], self._start(), [])
                value = self._call(forward, None)
                loss = None if value is None else _losses.read_loss(task, value)
                self.sync.present([loss])
                states.append(self._state(forward, i, task, loss, alone=True))
                self._differentiate([loss], [states[-1]], means, total)
                self.forwards[m].append(forward)
        else:
            forward = Forward(self.closure, self.arguments[m], self._start(), [])
            container = self._call(forward, None)
            losses = _losses.read_losses(container)
            self.sync.present(losses)
            states = [
                self._state(forward, i, task, loss, alone=len(losses) == 1)
                for i, (task, loss) in enumerate(zip(_losses.tasks_of(container), losses, strict=True))
            ]
            self._differentiate(losses, states, means, total)
            self.forwards[m].append(forward)
        self._check_form(container, "another micro-batch")
        values = [s.loss for s in states]
        self._containers.append(_losses.like_container(container, values))
        self.tasks = [s.task for s in states]

    def _state(self, forward: Forward, index: int, task: Task, loss: Loss | None, *, alone: bool) -> TaskState:
        state = TaskState(task, index)
        if loss is None:
            return state
        if not (loss.separable or alone or self.roles_given):
            raise RuntimeError(
                f"loss of task {task!r} is an element of a vector computed as a whole, so the graph does not tell "
                "which parameters it reaches. Return the losses as separate scalars (or torch.stack of them), or "
                "name the shared parameters: FlatMTL(..., shared=...)"
            )
        forward.indices.append(index)
        state.loss = loss.value
        return state

    def _differentiate(
        self, losses: Sequence[Loss | None], states: Sequence[TaskState], means: Means, total: TaskState | None
    ) -> None:
        """The gradients of the losses of one forward, each to the means at once, so that rows of one micro-batch do not
        pile up; or, if `total` is given, of their sum, added to it."""
        pairs = [(loss, state) for loss, state in zip(losses, states, strict=True) if loss is not None]
        for loss, state in zip(losses, states, strict=True):
            if loss is None:
                means.add(state)
        everything = range(len(self.point.tensors))
        if self.check_graph:
            _losses.check_graph(losses)
        if total is None:
            batched = self._gradients_of_each([loss for loss, _ in pairs], everything)
            for k, (loss, state) in enumerate(pairs):
                last = k + 1 == len(pairs)
                if self.features is not None:
                    self._differentiate_at_features(loss, state, last)
                else:
                    grads = batched[k] if batched else self._gradients([loss], everything, retain_graph=not last)
                    state.reached = [i for i, g in enumerate(grads) if g is not None]
                    if batched:
                        batched[k] = []
                    state.grads = grads
                    del grads
                means.add(state)
            return
        if not pairs:
            return
        for loss, state in pairs:
            assert loss.edge is not None
            found = _losses.leaves(loss.edge)
            state.reached = [i for i, t in enumerate(self.point.tensors) if t in found]
            means.add(state)
        grads = self._gradients([loss for loss, _ in pairs], everything, retain_graph=False)
        total.loss = torch.stack([loss.value for loss, _ in pairs]).sum() + (0.0 if total.loss is None else total.loss)
        total.reached = [i for i, g in enumerate(grads) if g is not None]
        total.grads = [
            g if old is None else old if g is None else old + g
            for g, old in zip(grads, total.grads or [None] * len(grads), strict=True)
        ]

    def _differentiate_at_features(self, loss: Loss, state: TaskState, last: bool) -> None:
        """With gradients that stop there, or with those of the features beside those of the parameters."""
        assert self.features is not None
        if self.at_features is None:
            self.at_features = FeatureGradients(self.features.take(), self.point, self.loss_scale)
        with self.interrupt.window():
            if self.stop_at_features:
                state.grads = self.at_features.differentiate(loss, state)
            else:
                state.grads = self.at_features.differentiate_all(loss, state, retain_graph=not last)
                self.point.narrow_(state.grads)  # features= has one micro-batch and one process

    def losses(self) -> Any:
        """The unperturbed losses, detached, in the container that the closure returned; means over micro-batches."""
        first, *rest = self._containers
        return _losses.mean_container(first, rest) if rest else first

    # -- at another point ------------------------------------------------------------------------------------------

    def perturbed(self, micro: Sequence[int], states: Sequence[TaskState]) -> None:
        """Fills `perturbed` and `perturbed_loss` of the states with s_i, t_i at the point where the parameters stand.

        One closure for all tasks is called once a micro-batch, whatever the number of states.
        """
        means = self._begin_perturbed(micro)
        for m in micro:
            self._perturbed(m, {s.index: s for s in states}, means)
        self._accept_perturbed(means, states)

    def perturbed_together(
        self, micro: Sequence[int], states: Sequence[TaskState], stacks: Mapping[int, Tensor]
    ) -> None:
        """As `perturbed`, every task at a point of its own, in one forward and one backward a micro-batch: for the k-th
        state parameter i is `stacks[i][k]`."""
        means = self._begin_perturbed(micro)
        for m in micro:
            self._perturbed_together(m, states, stacks, means)
        self._accept_perturbed(means, states)

    def _begin_perturbed(self, micro: Sequence[int]) -> Means:
        self.sync.enter(len(self.arguments), perturbed=True)
        self.point.rounding.begin_pass(means=self._takes_means(micro))
        return Means(len(micro))

    def _accept_perturbed(self, means: Means, states: Sequence[TaskState]) -> None:
        self.point.check_unchanged()
        found = {mean.index: mean for mean in means.states()}
        del means  # and `mean.grads` below: so that narrowing frees what is wide
        for state in states:
            mean = found[state.index]
            state.perturbed_loss = mean.loss
            state.perturbed = [None] * len(self.point.tensors)
            for i in state.reached:
                g = mean.grads[i] if mean.grads else None
                if g is None and not self.stop_at_features:
                    g = torch.zeros_like(self.point.tensors[i])
                state.perturbed[i] = g
                del g
            mean.grads = []
        self.sync.perturbed(states)
        for state in states:
            self.point.narrow_(state.perturbed)
        check_losses([(s.task, s.perturbed_loss) for s in states if s.perturbed_loss is not None], "perturbed")
        for state in states:
            square = self.point.arithmetic.sq_norm(self.point.row(state.perturbed, state.own), state.own)
            check_square(square, state.task, "perturbed")

    def _perturbed(self, m: int, states: dict[int, TaskState], means: Means) -> None:
        found = {i: TaskState(s.task, i) for i, s in states.items()}
        for forward in self.forwards[m]:
            wanted = [i for i in forward.indices if i in states]
            losses = self._again(forward, wanted) if wanted else []
            everything = sorted({j for i in wanted for j in states[i].reached}) if self.batched else []
            batched = self._gradients_of_each(losses, everything)
            for k, (i, loss) in enumerate(zip(wanted, losses, strict=True)):
                part, reached = found.pop(i), states[i].reached
                part.loss = loss.value
                if self.stop_at_features:
                    self._differentiate_at_features(loss, part, False)
                    means.add(part)
                    continue
                if batched:
                    at = dict(zip(everything, batched[k], strict=True))
                    batched[k] = []
                    part.grads = self._spread(reached, [at.pop(j) for j in reached])
                    del at
                else:
                    grads = self._gradients([loss], reached, retain_graph=k + 1 < len(wanted))
                    part.grads = self._spread(reached, grads)
                    del grads
                means.add(part)
        for part in found.values():  # absent from this micro-batch
            means.add(part)

    def _spread(self, indices: Sequence[int], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """A row of the gradients of the parameters with these indices."""
        row: list[Tensor | None] = [None] * len(self.point.tensors)
        for i, grad in zip(indices, grads, strict=True):
            row[i] = grad
        return row

    def _perturbed_together(
        self, m: int, states: Sequence[TaskState], stacks: Mapping[int, Tensor], means: Means
    ) -> None:
        found = {s.index: TaskState(s.task, s.index) for s in states}
        (forward,) = self.forwards[m]
        at = [k for k, s in enumerate(states) if s.index in forward.indices]
        if not at:
            for part in found.values():
                means.add(part)
            return
        leaves = [(x if len(at) == len(states) else x[at]).detach().requires_grad_() for x in stacks.values()]
        forward.start.restore(rng=self.replay_rng)
        wanted = [states[k].index for k in at]
        table = _vmapped.losses(
            lambda: self._checked_call(forward), [self.point.leaves[i] for i in stacks], leaves, self.tasks, wanted,
            same_random=self.replay_rng,
        )  # fmt: skip
        with self.interrupt.window():
            grads = torch.autograd.grad(table, leaves, torch.full_like(table, self.loss_scale), allow_unused=True)
        gradients = dict(zip(stacks, grads, strict=True))
        del grads
        for row, k in enumerate(at):
            found[states[k].index].loss = table[row].detach()
            found[states[k].index].grads = [None] * len(self.point.tensors)
        for i in stacks:
            g = gradients.pop(i)
            for row, k in enumerate(at):
                if i not in states[k].reached:
                    continue
                if g is None:
                    raise RuntimeError(
                        f"batched='passes': the perturbed value of parameter {self.point.params[i].name} did not come "
                        "to the closure, which evaluates it where torch.overrides does not reach (TorchScript, a "
                        "torch.autograd.Function, compiled code)"
                    )
                found[states[k].index].grads[i] = self.point.fitted(i, g[row], self.point.rounding.fresh[i])
        for part in found.values():
            means.add(part)

    def _checked_call(self, forward: Forward) -> Any:
        value = self._call(forward, None)
        self._check_form(value, "a perturbed pass")
        return value

    def losses_here(self, micro: Sequence[int], states: Sequence[TaskState]) -> list[Tensor]:
        """Losses alone of the states' tasks where the parameters stand, means over the micro-batches: forwards without
        graphs."""
        self.sync.enter(len(self.arguments), perturbed=True)
        values: dict[int, list[Tensor]] = {s.index: [] for s in states}
        for m in micro:
            for forward in self.forwards[m]:
                wanted = [i for i in forward.indices if i in values]
                for i, value in zip(wanted, self._again(forward, wanted, grad=False) if wanted else [], strict=True):
                    values[i].append(value.value)
        self.point.check_unchanged()
        return self.sync.losses(states, [torch.stack(v).mean() if (v := values[s.index]) else None for s in states])

    def _again(self, forward: Forward, wanted: Sequence[int], grad: bool = True) -> list[Loss]:
        """The losses of the wanted tasks of a forward, made again from where it started."""
        forward.start.restore(rng=self.replay_rng)
        task = self.tasks[wanted[0]] if len(wanted) == 1 else None
        value = self._call(forward, task, grad)
        if _losses.is_per_task(self.closure):
            if value is None:
                raise RuntimeError(f"closure of task {task!r} returned None in the perturbed pass only")
            return [_losses.read_loss(task, value, grad)]
        if len(wanted) == 1 and isinstance(value, Tensor) and value.dim() == 0 and forward.takes_task:
            return [_losses.read_loss(task, value, grad)]
        self._check_form(value, "a perturbed pass")
        losses = _losses.read_losses(value, grad, wanted)
        found = []
        for i in wanted:
            loss = losses[i]
            if loss is None:
                raise RuntimeError(f"loss of task {self.tasks[i]!r} is None in the perturbed pass only")
            found.append(loss)
        return found

    def _check_form(self, container: Any, where: str) -> None:
        form = _losses.describe(container)
        if form != (self._form or form):
            raise RuntimeError(f"closure returned {self._form} in the unperturbed pass, but {form} in {where}")
        self._form = form

    # -- calls -----------------------------------------------------------------------------------------------------

    def _start(self) -> Pass:
        start = self.snapshot()
        if self._first is None:
            self._first = start
        return start

    def snapshot(self) -> Pass:
        """Random state and module buffers as they are now."""
        return Pass(self.buffers, self.point.devices)

    def rollback(self) -> None:
        """Random state and module buffers as they were before the first call."""
        if self._first is not None:
            self._first.restore()

    def _call(self, forward: Forward, task: Task | None, grad: bool = True) -> Any:
        features = nullcontext() if self.features is None else self.features.watching()
        torch.clear_autocast_cache()  # within an outer autocast it holds the parameters cast at another point
        try:
            with torch.set_grad_enabled(grad), self.buffers.watching(), features, self.interrupt.window():
                if forward.takes_task:
                    return forward.closure(*forward.arguments, task=task)
                return forward.closure(*forward.arguments)
        finally:
            torch.clear_autocast_cache()

    def _gradients(self, losses: Sequence[Loss], indices: Sequence[int], retain_graph: bool) -> list[Tensor | None]:
        """Gradients of the sum of the losses, times the loss scale."""
        leaves = [self.point.leaves[i] for i in indices]
        take = _sharded.gradients if self.point.sharded else _losses.gradients
        rooms = [self.point.room(i) for i in indices] if self.point.rounding.needed else []
        with self.interrupt.window():
            grads = list(take(losses, leaves, self.loss_scale, retain_graph))
        if not self.point.fit(grads, indices, self.point.rounding.fresh):
            self._fit_([grads], indices, rooms)
        return grads

    def _gradients_of_each(self, losses: Sequence[Loss], indices: Sequence[int]) -> list[list[Tensor | None]]:
        """The gradients of every loss by one batched backward; empty where that is not asked for."""
        if not self.batched or self.point.sharded or len(losses) < 2 or self.features is not None:
            return []
        with self.interrupt.window():
            rows = _losses.gradients_of_each(losses, [self.point.tensors[i] for i in indices], self.loss_scale)
        self._fit_(rows, indices)
        return rows

    def _fit_(
        self, rows: Sequence[list[Tensor | None]], indices: Sequence[int], rooms: Sequence[Tensor | None] = ()
    ) -> None:
        """Gradients as a step keeps them, parameter by parameter, so that what they replace is freed on the way."""
        dtypes = self.point.rounding.fresh
        for k, i in enumerate(indices):
            for row in rows:
                if (g := row[k]) is not None:
                    row[k] = self.point.fitted(i, g, dtypes[i], rooms[k] if rooms else None)
                del g
