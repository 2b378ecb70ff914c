"""Processes that form a group: started once, they run one check after another, in one process group."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

WAIT = 120  # seconds for one check


class RankPool:
    """`pool(check, *args)` calls check(rank, size, *args) in every process, and gives the list of what they return.

    With a `timeout` the check has a process group of its own, which it may spoil, and which has this timeout in seconds.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._fresh, self._count = True, 0
        self._folder = tempfile.TemporaryDirectory()

    def __call__(self, check: Callable[..., Any], *args: Any, timeout: float | None = None) -> list[Any]:
        if not self._processes:
            self._start()
        fresh, self._fresh = self._fresh or timeout is not None, timeout is not None
        self._count += 1  # a store is needed as long as its group
        store = os.path.join(self._folder.name, str(self._count)) if fresh else None
        for pipe in self._pipes:
            pipe.send((check, args, store, timeout or 60.0))
        results = self._collect(check.__name__)
        return [results[rank] for rank in range(self.size)]

    def _collect(self, name: str) -> dict[int, Any]:
        """What every rank returned; raises if one failed, and does not wait long for the others then."""
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        waiting = dict(zip(self._pipes, range(self.size), strict=True))
        deadline = time.monotonic() + WAIT
        while waiting:
            ready = wait(list(waiting), deadline - time.monotonic())
            if not ready:
                break
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[arg-type]
                try:
                    text, results[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    text = "died"
                if text:
                    errors[rank] = text
                    deadline = min(deadline, time.monotonic() + 5.0)
        errors |= dict.fromkeys(waiting.values(), "no answer")
        if errors:
            self.close()
            raise AssertionError(f"{name}\n" + "\n".join(f"rank {rank}: {errors[rank]}" for rank in sorted(errors)))
        return results

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")  # imports once for all
        context.set_forkserver_preload(["torch.distributed.fsdp", "flatmtl", "pytest"])
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, rank, self.size), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._fresh = True

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def _work(pipe: Connection, rank: int, size: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            check, args, store, timeout = pipe.recv()
        except EOFError:
            return
        try:
            if store is not None:
                if dist.is_initialized():
                    dist.destroy_process_group()
                dist.init_process_group(
                    "gloo", rank=rank, world_size=size, store=dist.FileStore(store, size),
                    timeout=datetime.timedelta(seconds=timeout),
                )  # fmt: skip
                dist.barrier()
            pipe.send((None, check(rank, size, *args)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))


@contextmanager
def pool(size: int) -> Iterator[RankPool]:
    ranks = RankPool(size)
    try:
        yield ranks
    finally:
        ranks.close()
