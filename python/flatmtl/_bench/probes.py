"""What the machine gives: plain streams over memory and fused multiply-adds, on torch's threads.

`probe.c` is compiled for this CPU when a benchmark begins. Without a C compiler the probes are torch's own operations,
which give less than the machine can: `Probes.kind` says which it was.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=gnu11", "-shared", "-fPIC")


def _compile() -> ctypes.CDLL | None:
    compiler = shlex.split(os.environ.get("CC", "")) or [c for c in ("cc", "gcc", "clang") if shutil.which(c)][:1]
    if not compiler:
        return None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "probe.so"
        command = [*compiler, *FLAGS, "-o", str(target), str(Path(__file__).with_name("probe.c"))]
        try:
            subprocess.run(command, check=True, capture_output=True)
            return ctypes.CDLL(str(target))
        except (OSError, subprocess.CalledProcessError):
            return None


def _torch_pool() -> int | None:
    """The address of torch's parallel_for in C, which runs on the threads of torch.set_num_threads."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.is_file():
            try:
                return ctypes.cast(ctypes.CDLL(str(path)).torch_parallel_for, ctypes.c_void_p).value
            except AttributeError:
                return None
    return None


class Probes:
    """Streams over the memory of tensors of equal size. `kind` is "compiled" or "torch"."""

    def __init__(self, compiled: bool = True) -> None:
        self.pool = _torch_pool()
        self.library = _compile() if compiled and self.pool else None
        self.kind = "compiled" if self.library else "torch"
        self._sink = (ctypes.c_uint64 * 8)()
        if self.library:
            self.library.probe_fma.restype = ctypes.c_int64
            self.library.probe_multiply.restype = ctypes.c_float

    def read(self, rows: Sequence[Tensor]) -> Any:
        """A function without arguments that reads the contiguous tensors once, one after another."""
        if not self.library:
            return lambda: [row.view(-1).sum() for row in rows]
        function, table, count, size = self.library.probe_read, _table(rows), len(rows), _bytes(rows[0])
        return lambda: function(ctypes.c_void_p(self.pool), table, count, size, self._sink)

    def multiply(self, rows: Sequence[Tensor], products: int) -> Any:
        """A function that reads the tensors as `read` does, and for every two numbers read makes `products` multiply-adds
        in float32, at least 2; None without a compiler."""
        if not self.library:
            return None
        function, table, count, size = self.library.probe_multiply, _table(rows), len(rows), _bytes(rows[0])
        vectors = ctypes.c_int64(products * 4 // rows[0].element_size())  # of float32, for two of the rows'
        return lambda: function(ctypes.c_void_p(self.pool), table, count, size, vectors, self._sink)

    def mix(self, rows: Sequence[Tensor], out: Tensor) -> Any:
        """A function that reads all rows and writes `out`, in one pass. Of one row it is a copy."""
        if not self.library:

            def work() -> None:
                out.copy_(rows[0])
                for row in rows[1:]:
                    out.add_(row)

            return work
        function, table, count, size = self.library.probe_mix, _table(rows), len(rows), _bytes(rows[0])
        return lambda: function(ctypes.c_void_p(self.pool), table, count, size, ctypes.c_void_p(out.data_ptr()))

    def peak(self, threads: int, seconds: float = 0.2) -> float:
        """Most F32 operations a second (a multiply-add counts two) in several tries, with so many of torch's threads."""
        if not self.library:
            a = torch.randn(768, 768)
            return max(2 * 768**3 / _seconds(lambda: a @ a) for _ in range(8))
        best, iterations, tries, end = 0.0, 1 << 16, 0, time.perf_counter() + seconds
        while (tries := tries + 1) <= 8 or time.perf_counter() < end:
            begin = time.perf_counter()
            each = self.library.probe_fma(ctypes.c_void_p(self.pool), threads, ctypes.c_int64(iterations), self._sink)
            elapsed = time.perf_counter() - begin
            best = max(best, each * threads / elapsed)
            if elapsed < 0.01:
                iterations *= 2
        return best

    def bandwidth(self, megabytes: int, repeats: int = 7) -> dict[str, float]:
        """Bytes a second, best of several: reading, and the triad's traffic of two reads and a write."""
        n = max(megabytes << 20, 3 << 12) // 3 // 4096 * 1024
        buffers = torch.ones(3, n)
        read, triad = self.read(list(buffers)), self.mix(list(buffers[:2]), buffers[2])
        for work in (read, triad):
            work()
        total = buffers.nbytes
        return {
            "read": max(total / _seconds(read) for _ in range(repeats)),
            "triad": max(total / _seconds(triad) for _ in range(repeats)),
        }


def _seconds(work: Any) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _bytes(row: Tensor) -> ctypes.c_int64:
    assert row.is_contiguous()
    return ctypes.c_int64(row.nbytes)


def _table(rows: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(rows))(*(row.data_ptr() for row in rows))
