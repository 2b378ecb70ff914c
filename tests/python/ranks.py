"""Processes that form a group: started once, they run one check after another, in one process group."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
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
        self._fresh = True

    def __call__(self, check: Callable[..., Any], *args: Any, timeout: float | None = None) -> list[Any]:
        if not self._processes:
            self._start()
        fresh, self._fresh = self._fresh or timeout is not None, timeout is not None
        with tempfile.TemporaryDirectory() as folder:
            store = os.path.join(folder, "store") if fresh else None
            for pipe in self._pipes:
                pipe.send((check, args, store, timeout or 60.0))
            results = []
            for rank, pipe in enumerate(self._pipes):
                if not pipe.poll(WAIT):
                    self.close()
                    raise AssertionError(f"rank {rank} of {check.__name__} hangs")
                try:
                    results.append(pipe.recv())
                except EOFError:
                    self.close()
                    raise AssertionError(f"rank {rank} of {check.__name__} died") from None
        errors = [f"rank {rank}:\n{text}" for rank, (text, _) in enumerate(results) if text]
        if errors:
            self._fresh = True
            raise AssertionError("\n".join(errors))
        return [value for _, value in results]

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
