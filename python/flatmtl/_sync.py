"""Where the ranks of a data-parallel training meet within a step.

`Alone` is a process for itself. `Ranks` averages over a process group: "exact" after every pass, so that everything
from there on is what one process with the whole batch does, the same bits on every rank; "local" at the end of the
passes, which each rank makes along its own gradients (m-sharpness).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _buckets, _losses, _sharded
from ._agreement import Agreement
from ._task import TaskState
from ._wrappers import Wrappers, refuse_fsdp1

if TYPE_CHECKING:
    from ._settings import Settings
    from ._task import Parameter


class Alone:
    """One process. The interface of `Ranks`."""

    local = False
    traffic = 0

    def step(self) -> AbstractContextManager[None]:
        """Around a whole step."""
        return nullcontext()

    def guard(self) -> AbstractContextManager[None]:
        """Around what may raise on one rank alone."""
        return nullcontext()

    def start(self, params: Sequence[Parameter], settings: Settings, step: int) -> None:
        """Before the first pass of a step."""

    def enter(self, batches: int, perturbed: bool = False) -> None:
        """Before a pass."""

    def unperturbed(self, states: list[TaskState], total: TaskState | None, batches: int) -> list[TaskState]:
        """After the unperturbed pass: means over the ranks if "exact"; the parameters reached on any rank if "local".

        With `total`, the sum of the tasks, that alone has gradients.
        """
        return states

    def present(self, losses: Sequence[Any]) -> None:
        """After a forward: where backward passes are joint work (FSDP), the same losses must be None on all ranks."""

    def sum_shards(self, part: Tensor, groups: Sequence[Any]) -> Tensor:
        """`part` summed over the ranks of the groups, one after the other."""
        raise RuntimeError("sharded parameters without the ranks that hold the shards")

    def container(self, losses: Any, states: Sequence[TaskState]) -> Any:
        """The losses of the states in the container that the closure returned."""
        return losses

    def perturbed(self, states: Sequence[TaskState]) -> None:
        """After a perturbed pass: means over the ranks if "exact"."""

    def losses(self, states: Sequence[TaskState], values: list[Tensor | None]) -> list[Tensor]:
        """After forwards alone: as `perturbed`, of their losses."""
        return [value for value in values if value is not None]

    def both(self, states: list[TaskState], summed: bool) -> list[TaskState]:
        """After all passes: means of both families over the ranks if "local"."""
        return states

    def finish(self) -> None:
        """When nothing but the update remains."""


class Ranks(Alone):
    """The ranks of a process group.

    The mean of a task's losses and gradients is taken over all micro-batches of all ranks in which it is present.
    """

    def __init__(self, group: Any, local: bool, same_batches: bool, params: Sequence[Tensor]) -> None:
        self.wrappers = Wrappers(params)
        self.sharded = any(_sharded.is_sharded(p) for p in params)
        self.agreement = Agreement(group, params[0].device, self.sharded or self.wrappers.holds_collectives)
        self.local, self.same_batches = local, same_batches or self.sharded
        self._checked_params = self._checked_tasks = False
        self._weights: dict[int, float] = {}  # of this rank in the mean, by task

    @property
    def traffic(self) -> int:  # type: ignore[override]
        return self.agreement.traffic

    @contextmanager
    def step(self) -> Iterator[None]:
        self.agreement.begin()
        try:
            with self.wrappers.quiet():
                yield
        finally:
            self.wrappers.reshard()

    def guard(self) -> AbstractContextManager[None]:
        return self.agreement.guard()

    def start(self, params: Sequence[Parameter], settings: Settings, step: int) -> None:
        self._params = list(params)
        if not self._checked_params:
            self._check(params, f"{settings}, step {step}")
            self._checked_params = True

    def enter(self, batches: int, perturbed: bool = False) -> None:
        self.wrappers.reshard()  # the parameters may have moved
        if not (perturbed and self.local):
            self.agreement.enter(**self._numbers(batches))

    def _numbers(self, batches: int) -> dict[str, int]:
        return {"the number of micro-batches": batches if self.same_batches else 0}

    def unperturbed(self, states: list[TaskState], total: TaskState | None, batches: int) -> list[TaskState]:
        self.agreement.leave(**{"the number of tasks": len(states)}, **self._numbers(batches))
        if not self._checked_tasks:
            self._check_tasks([state.task for state in states])
            self._checked_tasks = True
        self._exchange(states if total is None else [*states, total], means=not self.local)
        if not self.local:
            self._average(states if total is None else [total], "grads")
        return states

    def present(self, losses: Sequence[Any]) -> None:
        if not self.sharded:
            return
        self.agreement.same(**{"the number of losses": len(losses)})
        hits = self._sum([float(loss is not None) for loss in losses])
        for i, hit in enumerate(hits):
            if 0 < hit < self.agreement.size:
                raise self.agreement.settled(
                    ValueError(
                        f"loss {i} is None on some ranks, but not on all: backward passes of sharded parameters are the "
                        "joint work of all ranks"
                    )
                )

    def sum_shards(self, part: Tensor, groups: Sequence[Any]) -> Tensor:
        total = part.to(self.agreement.device)
        for group in groups:
            self.agreement.sum_(total, group)
        return total.cpu()

    def container(self, losses: Any, states: Sequence[TaskState]) -> Any:
        values = [state.loss for state in states]
        if isinstance(losses, Tensor) and losses.dim() == 1:
            return torch.stack([value for value in values if value is not None])
        return _losses.like_container(losses, values)

    def perturbed(self, states: Sequence[TaskState]) -> None:
        if self.local:  # a task may be absent here, and its pass is left out: ranks agree after all of them
            return
        self.agreement.leave()
        self._average_perturbed(states)

    def losses(self, states: Sequence[TaskState], values: list[Tensor | None]) -> list[Tensor]:
        if self.local:
            return super().losses(states, values)
        self.agreement.leave()
        return self._mean_losses(states, values)

    def both(self, states: list[TaskState], summed: bool) -> list[TaskState]:
        if not self.local:
            return states
        self.agreement.leave()
        self._exchange(states, means=True)
        if not summed:
            self._average(states, "grads")
        if self._sum([float(any(state.perturbed for state in states))])[0]:
            self._average_perturbed([state for state in states if state.loss is not None])
        return states

    def finish(self) -> None:
        self.agreement.leave()

    # -- means -----------------------------------------------------------------------------------------------------

    def _exchange(self, states: Sequence[TaskState], means: bool) -> None:
        """The weight of this rank for each task, and which parameters it reaches on any rank; if `means` are wanted,
        its mean loss too."""
        size = len(self._params)
        table = torch.zeros(len(states), 2 + size, dtype=torch.float64)
        for row, state in zip(table, states, strict=True):
            if state.loss is None:
                continue
            row[0], row[1] = state.parts, state.parts * float(state.loss)
            row[[2 + i for i in state.reached]] = 1.0
        total = self.agreement.sum_(table.to(self.agreement.device)).cpu()
        for state, row in zip(states, total, strict=True):
            parts = float(row[0])
            mine = 0 if state.loss is None else state.parts
            self._weights[state.index] = mine / parts if parts else 0.0
            state.anywhere = [i for i, hit in enumerate(row[2:].tolist()) if hit]
            if means and parts:
                state.loss, state.reached = _like(float(row[1]) / parts, state.loss), state.anywhere

    def _average(self, states: Sequence[TaskState], family: str) -> None:
        """The rows "grads" or "perturbed" of the states become means over the ranks."""
        parts = []
        for state in states:
            row = getattr(state, family) or [None] * len(self._params)
            setattr(state, family, row)
            plain = [i for i in state.touched if not _sharded.is_sharded(self._params[i].tensor)]
            parts += [(row, i, self._weights[state.index]) for i in plain]  # FSDP has averaged the others
        _buckets.average(self.agreement, parts, [p.tensor for p in self._params])

    def _average_perturbed(self, states: Sequence[TaskState]) -> None:
        means = self._mean_losses(states, [state.perturbed_loss for state in states])
        for state, mean in zip(states, means, strict=True):
            state.perturbed_loss = mean
        self._average(states, "perturbed")

    def _mean_losses(self, states: Sequence[TaskState], values: Sequence[Tensor | None]) -> list[Tensor]:
        parts = [
            0.0 if value is None else self._weights[state.index] * float(value)
            for state, value in zip(states, values, strict=True)
        ]
        return [_like(mean, state.loss) for mean, state in zip(self._sum(parts), states, strict=True)]

    def _sum(self, values: list[float]) -> list[float]:
        total = self.agreement.sum_(torch.tensor(values, dtype=torch.float64, device=self.agreement.device))
        return [float(value) for value in total.tolist()]

    # -- once ------------------------------------------------------------------------------------------------------

    def _check(self, params: Sequence[Parameter], settings: str) -> None:
        """Raises on every rank unless all have the same parameters and options."""
        sums = [
            0.0 if _sharded.is_sharded(p.tensor) else float(p.tensor.detach().sum(dtype=torch.float64)) for p in params
        ]
        mine = [(p.name, str(p.tensor.dtype), tuple(p.tensor.shape), p.tensor.stride(), (p.rho_shared, p.rho_task))
                for p in params]  # fmt: skip
        every = self.agreement.objects((settings, mine, [repr(s) for s in sums], self.agreement.holds))
        self.agreement.holds = any(holds for *_, holds in every)
        for rank, (their_settings, theirs, their_sums, _) in enumerate(every):
            if their_settings != every[0][0]:
                raise self.agreement.settled(
                    ValueError(
                        f"options differ between ranks: {every[0][0]} on rank 0, {their_settings} on rank {rank}"
                    )
                )
            if len(theirs) != len(every[0][1]):
                raise self.agreement.settled(
                    ValueError(f"rank 0 has {len(every[0][1])} parameters, but rank {rank} has {len(theirs)}")
                )
            for k, (a, b) in enumerate(zip(every[0][1], theirs, strict=True)):
                if a != b or every[0][2][k] != their_sums[k]:
                    why = f"{a} on rank 0, {b} on rank {rank}" if a != b else "their values"
                    raise self.agreement.settled(
                        ValueError(
                            f"parameter {a[0]} differs between rank 0 and rank {rank}: {why}. Replicas must start "
                            "equal: use one seed, load one checkpoint, broadcast, or wrap the model in DDP"
                        )
                    )

    def _check_tasks(self, tasks: list[Any]) -> None:
        every = self.agreement.objects(tasks)
        for rank, theirs in enumerate(every):
            if theirs != every[0]:
                raise self.agreement.settled(
                    ValueError(
                        f"closure returned losses of tasks {every[0]!r} on rank 0, but {theirs!r} on rank {rank}"
                    )
                )


def _like(value: float, loss: Tensor | None) -> Tensor:
    if loss is None:
        return torch.tensor(value, dtype=torch.float64)
    return torch.tensor(value, dtype=loss.dtype, device=loss.device)


def connect(sync: str | None, process_group: Any, m_sharpness: bool, params: Sequence[Tensor]) -> Alone:
    """What `FlatMTL(sync=, process_group=)` asks for, when the first step begins."""
    refuse_fsdp1(params)
    sharded = [p for p in params if _sharded.is_sharded(p)]
    if sharded and sync in ("local", None):
        raise ValueError(f"sync={sync!r}: parameters are DTensors, whose gradients are of all ranks: use sync='exact'")
    if sync is None or (sync == "auto" and not (dist.is_available() and dist.is_initialized())):
        return Alone()
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(f"sync={sync!r} needs torch.distributed: call torch.distributed.init_process_group first")
    if sharded and process_group is None:
        mesh: Any = sharded[0].device_mesh  # type: ignore[attr-defined]
        process_group = mesh.get_group() if mesh.ndim == 1 else None
        if mesh.ndim > 1 and mesh.size() != dist.get_world_size():
            raise ValueError("the parameters' device mesh has several dimensions: give process_group= its ranks")
    elif sync == "auto" and process_group is None:
        ddp = Wrappers(params).ddp if dist.get_world_size() > 1 else []
        if not ddp:
            return Alone()
        process_group = ddp[0].process_group
    group = dist.group.WORLD if process_group is None else process_group
    if dist.get_rank(group) < 0:
        raise ValueError("this process is not a member of process_group")
    return Ranks(group, sync == "local", m_sharpness, params)
