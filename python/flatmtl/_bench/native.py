"""The C core called as C code calls it: through ctypes, on tables of pointers that are made once."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _ops
from .probes import Probes

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class _Rows(ctypes.Structure):
    _fields_ = (
        ("dtype", ctypes.c_int), ("num_rows", ctypes.c_int32), ("num_segments", ctypes.c_int64),
        ("lengths", ctypes.c_void_p), ("data", ctypes.c_void_p),
    )  # fmt: skip


class _Vector(ctypes.Structure):
    _fields_ = (
        ("dtype", ctypes.c_int), ("num_segments", ctypes.c_int64), ("lengths", ctypes.c_void_p),
        ("data", ctypes.c_void_p),
    )  # fmt: skip


class _Context(ctypes.Structure):
    _fields_ = (
        ("parallel_for", ctypes.c_void_p), ("host", ctypes.c_void_p), ("workspace", ctypes.c_void_p),
        ("workspace_size", ctypes.c_size_t), ("accumulate", ctypes.c_int),
    )  # fmt: skip


class Core:
    """Calls of the C core on tensors that stay where they are. Each method returns a function without arguments."""

    def __init__(self, probes: Probes, num_tasks: int) -> None:
        size = ctypes.c_size_t()
        self._check(_ops.core.flatmtl_workspace_size(num_tasks, ctypes.byref(size), None))
        self._workspace = torch.empty(size.value + 64, dtype=torch.uint8)
        aligned = -(-self._workspace.data_ptr() // 64) * 64
        pool = ctypes.cast(probes.library.probe_parallel_for, ctypes.c_void_p).value if probes.library else None
        self._context = _Context(pool, probes.pool, aligned, size.value, 0)
        self._kept: list[Any] = []

    def gramian(self, rows: Sequence[Sequence[Tensor]]) -> Callable[[], Tensor]:
        out = torch.empty(len(rows), len(rows), dtype=torch.float64)
        return self._call("flatmtl_gramian", [self._rows(rows)], out)

    def gramian_pair(self, loss: Sequence[Sequence[Tensor]], flat: Sequence[Sequence[Tensor]]) -> Callable[[], Tensor]:
        out = torch.empty(2 * len(loss), 2 * len(loss), dtype=torch.float64)
        return self._call("flatmtl_gramian_pair", [self._rows(loss), self._rows(flat)], out, ctypes.c_int(0))

    def combine(
        self, out: Sequence[Tensor], rows: Sequence[Sequence[Tensor]], weights: Tensor
    ) -> Callable[[], Sequence[Tensor]]:
        function, context = _ops.core.flatmtl_combine, ctypes.byref(self._context)
        table, vector, values = self._rows(rows), self._vector(out), ctypes.c_void_p(weights.data_ptr())
        self._kept.append(weights)

        def work() -> Sequence[Tensor]:
            self._check(function(context, ctypes.byref(table), values, ctypes.byref(vector), None))
            return out

        return work

    def _call(self, name: str, tables: list[_Rows], out: Tensor, *options: Any) -> Callable[[], Tensor]:
        function, context = getattr(_ops.core, name), ctypes.byref(self._context)
        arguments, result = [ctypes.byref(table) for table in tables], ctypes.c_void_p(out.data_ptr())

        def work() -> Tensor:
            self._check(function(context, *arguments, *options, result, None))
            return out

        self._kept.append(tables)
        return work

    def _rows(self, rows: Sequence[Sequence[Tensor]]) -> _Rows:
        lengths = (ctypes.c_int64 * len(rows[0]))(*(t.numel() for t in rows[0]))
        data = (ctypes.c_void_p * (len(rows) * len(rows[0])))(*(t.data_ptr() for row in rows for t in row))
        self._kept += [lengths, data, rows]
        where = ctypes.addressof(lengths), ctypes.addressof(data)
        return _Rows(_DTYPES[rows[0][0].dtype], len(rows), len(rows[0]), *where)

    def _vector(self, out: Sequence[Tensor]) -> _Vector:
        table = self._rows([out])
        return _Vector(table.dtype, table.num_segments, table.lengths, table.data)

    def _check(self, status: int) -> None:  # a method, so that what is called keeps alive what the tables point to
        if status < 0:
            raise RuntimeError(f"the C core returned status {status}")
