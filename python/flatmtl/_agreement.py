"""How the ranks of a process group end a step alike: all go on, or all raise.

Between two agreements a rank works alone. One that fails there calls `failed`, which takes part in the agreement that
the others come to next, and every rank raises. Where the closure itself holds collectives (DDP that broadcasts buffers,
FSDP, SyncBatchNorm) the others may be waiting inside them: a rank that fails inside a pass then aborts the process group
instead, and the others raise when their collective fails, at the latest after the group's timeout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ._task import NonFiniteError

T = TypeVar("T")


class RankError(RuntimeError):
    """The step failed on another rank, or a rank was lost. `rank` is its number in the process group, -1 if unknown.

    This rank's parameters, `.grad`, optimizer state, buffers and random generators are as they were before the step.
    """

    def __init__(self, rank: int, message: str) -> None:
        self.rank = rank
        super().__init__(message)


class Agreement:
    """Status of the step, over the ranks of a group; and its collectives, whose payload it counts in `traffic`.

    `holds` says whether the closure may hold collectives of its own.
    """

    def __init__(self, group: Any, device: torch.device, holds: bool) -> None:
        self._group: Any = group
        self.device, self.holds = device, holds
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.traffic = 0  # bytes given to collectives since `begin`
        self._inside = self._settled = False

    @property
    def group(self) -> Any:
        if self._group is None:
            raise RuntimeError("the process group was aborted after a step failed on one of its ranks")
        return self._group

    def begin(self) -> None:
        """At the start of a step."""
        self.traffic, self._inside, self._settled = 0, False, False
        _ = self.group

    # -- collectives -----------------------------------------------------------------------------------------------

    def sum_(self, tensor: Tensor, group: Any = None) -> Tensor:
        """`tensor` summed over the ranks, in place; the same bits on all."""
        self.traffic += tensor.nbytes
        self.collective(lambda: dist.all_reduce(tensor, group=group or self.group))
        return tensor

    def start_sum_(self, tensor: Tensor) -> Any:
        """As `sum_`, in the background: call `wait` of the result."""
        self.traffic += tensor.nbytes
        return self.collective(lambda: dist.all_reduce(tensor, group=self.group, async_op=True))

    def objects(self, value: Any) -> list[Any]:
        """Every rank's value."""
        values: list[Any] = [None] * self.size
        self.collective(lambda: dist.all_gather_object(values, value, group=self.group))
        return values

    def collective(self, call: Callable[[], T]) -> T:
        """Calls it; if a rank is gone, or has given up, this one gives up too."""
        try:
            return call()
        except Exception as error:
            self.abort()
            raise RankError(-1, f"a rank failed or was lost, and the process group with it: {error}") from error

    # -- agreements ------------------------------------------------------------------------------------------------

    def enter(self, **numbers: int) -> None:
        """Before a pass."""
        if self.holds:
            self._agree(numbers)
        self._inside = True

    def leave(self, **numbers: int) -> None:
        """After a pass, or whatever else can fail on one rank alone. Raises on every rank if one failed, or if the
        numbers, two at most, are not the same on all."""
        self._agree(numbers)
        self._inside = False

    def same(self, **numbers: int) -> None:
        """As `leave`, within a pass."""
        self._agree(numbers)

    def settled(self, error: BaseException) -> BaseException:
        """`error`, which every rank raises."""
        self._settled = True
        return error

    def _agree(self, numbers: dict[str, int]) -> None:
        if self._status(0, list(numbers.values())):
            error = self._reasons(None)
            assert error is not None
            raise error
        for (name, value), same in zip(numbers.items(), self._same, strict=False):
            if not same:
                found = self.objects(value)
                raise self.settled(ValueError(f"{name} must be the same on all ranks, but is {found} on ranks 0, 1 .."))

    def _status(self, failed: int, numbers: list[int]) -> bool:
        """Whether a rank failed; leaves in `_same` which numbers are the same on all ranks."""
        status = [failed]
        for number in (*numbers, 0, 0)[:2]:
            status += [number, number * number]
        total = self.sum_(torch.tensor(status, dtype=torch.int64, device=self.device)).tolist()
        self._same = [total[1] ** 2 == self.size * total[2], total[3] ** 2 == self.size * total[4]]
        return bool(total[0])

    @contextmanager
    def guard(self) -> Iterator[None]:
        """What raises inside is made known to the other ranks; raises what they raise, if that weighs more."""
        try:
            yield
        except BaseException as error:
            other = self._failed(error)
            if other is not error:
                raise other from error
            raise

    def _failed(self, error: BaseException) -> BaseException:
        if self._settled or self._group is None:
            return error
        if self._inside and self.holds:
            self.abort()
            return error
        try:
            self._status(1, [])
            return self._reasons(error) or error
        except RankError:  # the group is gone; the first error says why
            return error

    def _reasons(self, error: BaseException | None) -> BaseException | None:
        """What this rank raises, given its own error: that, unless another rank's is graver than a non-finite number."""
        mine = None
        if error is not None:
            fields = (error.task, error.pass_, error.what, error.value) if isinstance(error, NonFiniteError) else None
            mine = (fields, f"{type(error).__name__}: {error}")
        self._settled = True
        found = [(rank, reason) for rank, reason in enumerate(self.objects(mine)) if reason is not None]
        other = [(rank, text) for rank, (fields, text) in found if fields is None]
        if error is not None and (not other or not isinstance(error, NonFiniteError)):
            return error
        if other:
            rank, text = other[0]
            return RankError(rank, f"the step failed on rank {rank}, and was undone on every rank: {text}")
        return NonFiniteError(*found[0][1][0])

    def abort(self) -> None:
        """Gives up the process group, so that no rank waits for this one longer than the group's timeout."""
        group, self._group, self._settled = self._group, None, True
        if group is None or not dist.is_initialized():
            return
        whole = group is dist.group.WORLD
        try:
            dist.distributed_c10d._abort_process_group(None if whole else group)
        except Exception:  # gone already
            return
