"""The pieces of a step as functions: Gramian, weights, aggregation.

`rows` is a K x P tensor, or a sequence of K sequences of T tensors (`[autograd.grad(l, params) for l in losses]`):
float32, float64, bfloat16 or float16, all of one dtype, device and, tensor by tensor, shape. Nothing is concatenated.
CPU tensors are read where they lie by the C core (those whose elements lie in an order of their own are copied first),
those of other devices by torch's own operations on the device; the K x K solves are done on the CPU. Sums are
accumulated in float64; of many long rows on the CPU in float32 within blocks (see `gramian`).

The functions are not differentiable: outside `torch.no_grad()` they refuse tensors that require grad.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _generic, _native, _ops
from .aggregators import Aggregator, get_aggregator
from .buffers import BufferAggregator

Rows = Tensor | Sequence[Sequence[Tensor]]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def gramian(rows: Rows, *, accumulate: str = "auto") -> Tensor:
    """Inner products of the rows, G_ij = <x_i, x_j>.

    Args:
        rows: a K x P tensor, or a sequence of K sequences of tensors.
        accumulate: "auto" sums in float32 within blocks of 512 numbers and in float64 across them, where there are 4
            rows or more (2 of bfloat16 or float16) of 98304 numbers or more, not float64, on the CPU, and nothing over-
            or underflows: up to twice as fast, off by less than 1e-8 |x_i||x_j| for rows like gradients (float32; 1e-7
            for bfloat16 and float16) and by 3e-6 at worst. "f64" sums in float64 always.

    Returns:
        (K, K), float64, on the CPU. Inf and NaN in a row show in the result.

    Raises:
        ValueError, TypeError: rows that do not fit together; the message names the first.
        RuntimeError: a tensor requires grad and grad mode is on.
    """
    matrix = _read_rows("gramian", rows)
    products: Tensor = _backend(matrix).gramian(matrix, _accumulate("gramian", accumulate))
    return products


def weights(
    gramian: Tensor, method: str | Aggregator, *, draw: int = 0, state: Tensor | None = None, **options: Any
) -> Tensor:
    """Weights of an aggregator, w(G).

    Args:
        gramian: (K, K) symmetric, positive semidefinite; the lower triangle is read. Any float dtype and device.
        method: a name ("mgda"), with its options as keywords, or an object (`flatmtl.CAGrad(c=0.2)`).
        draw: number of the draw, for methods that draw (PCGrad, GradVac).
        state: what a method that learns from step to step (GradVac) has learnt, as `Aggregator.new_state` makes it;
            changed in place, and left alone on an error. None starts afresh and forgets.

    Returns:
        (K,), float64, on the CPU. All 0 where the method has no finite solution (the rows are Pareto-stationary).

    Raises:
        ValueError, TypeError: not a K x K matrix; unknown method or option; a state of another size or dtype.
        RuntimeError: the Gramian holds Inf or NaN (the message names the row), or requires grad in grad mode.
    """
    aggregator = get_aggregator(method, **options)
    if isinstance(aggregator, BufferAggregator):
        raise TypeError(f"flatmtl.weights: aggregator {aggregator.name!r} is no function of the Gramian")
    gramian = torch.as_tensor(gramian)
    if gramian.dim() != 2 or gramian.shape[0] != gramian.shape[1] or len(gramian) == 0:
        raise ValueError(f"flatmtl.weights: gramian has shape {tuple(gramian.shape)}; it must be K x K with K >= 1")
    if not gramian.is_floating_point():
        raise TypeError(f"flatmtl.weights: gramian is {gramian.dtype}; it must be a float dtype")
    _check_no_grad("weights", "gramian", gramian)
    return _weights("weights", gramian, aggregator, draw, state)


def aggregate(
    rows: Rows, method: str | Aggregator, *, draw: int = 0, state: Tensor | None = None, accumulate: str = "auto",
    **options: Any,
) -> Tensor | list[Tensor]:  # fmt: skip
    """The update of an aggregator, SUM_i w_i x_i with w = w(G).

    Args:
        rows: a K x P tensor, or a sequence of K sequences of tensors.
        method, draw, state, options: as for `weights`.
        accumulate: as for `gramian`.

    Returns:
        A P-vector, or a list shaped like one row, in the rows' dtype and on their device.

    Raises:
        ValueError, TypeError: as `gramian` and `weights`.
        RuntimeError: a row holds Inf or NaN (the message names it), or a tensor requires grad and grad mode is on.
    """
    aggregator = get_aggregator(method, **options)
    if isinstance(aggregator, BufferAggregator):
        return aggregator(rows, draw=draw)
    matrix = _read_rows("aggregate", rows)
    backend = _backend(matrix)
    products = backend.gramian(matrix, _accumulate("aggregate", accumulate))
    for i, square in enumerate(products.diagonal().tolist()):
        if not math.isfinite(square):
            raise RuntimeError(f"flatmtl.aggregate: rows[{i}] holds Inf or NaN (its squared norm is {square})")
    values = _weights("aggregate", products, aggregator, draw, state)
    with torch.no_grad():
        out = [torch.empty_like(tensor) for tensor in matrix[0]]
    backend.combine_(out, matrix, values)
    return out[0] if isinstance(rows, Tensor) else out


def _weights(function: str, gramian: Tensor, aggregator: Aggregator, draw: int, state: Tensor | None) -> Tensor:
    with torch.no_grad():
        gramian = gramian.to("cpu", torch.float64).contiguous()
        options = aggregator.option_values(len(gramian), draw=draw)
        values: Tensor
        if state is None:
            values = torch.ops.flatmtl.weights(gramian, aggregator.number, options)
        else:
            _check_state(function, state, aggregator, len(gramian))
            values = torch.ops.flatmtl.weights_(gramian, aggregator.number, options, state)
    return values


def _check_state(function: str, state: Tensor, aggregator: Aggregator, tasks: int) -> None:
    size = aggregator.state_size(tasks)
    if size == 0:
        raise ValueError(f"flatmtl.{function}: {aggregator.name} has no state, but one was given")
    if state.dtype != torch.float64 or state.device.type != "cpu" or tuple(state.shape) != (size,):
        raise ValueError(
            f"flatmtl.{function}: state is {state.dtype} of shape {tuple(state.shape)} on {state.device}; "
            f"{aggregator.name} needs a torch.float64 one of shape ({size},) on the CPU for {tasks} tasks "
            "(new_state() makes it)"
        )


def _accumulate(function: str, name: str) -> int:
    if name not in _ops.ACCUMULATE:
        raise ValueError(f'flatmtl.{function}: accumulate is {name!r}; it must be "auto" or "f64"')
    return _ops.ACCUMULATE[name]


def _backend(matrix: list[list[Tensor]]) -> ModuleType:
    on_cpu = not matrix[0] or matrix[0][0].device.type == "cpu"
    return _native if on_cpu else _generic


def _check_no_grad(function: str, name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"flatmtl.{function}: {name} requires grad, and the result would not be differentiable. Call it under "
            "torch.no_grad(), or detach the tensors"
        )


def _read_rows(function: str, rows: Rows) -> list[list[Tensor]]:
    """The rows as K lists of T tensors that fit together."""
    if isinstance(rows, Tensor):
        if rows.dim() != 2 or len(rows) == 0:
            raise ValueError(
                f"flatmtl.{function}: rows has shape {tuple(rows.shape)}; it must be K x P with K >= 1, or a "
                "sequence of K sequences of tensors"
            )
        _check_no_grad(function, "rows", rows)
        matrix = [[row] for row in rows.detach()]
    else:
        matrix = [_read_row(function, i, row) for i, row in enumerate(rows)]
        if not matrix:
            raise ValueError(f"flatmtl.{function}: rows is empty; it must hold at least one row")
    for i, row in enumerate(matrix):
        if len(row) != len(matrix[0]):
            raise ValueError(f"flatmtl.{function}: rows[{i}] has {len(row)} tensors, rows[0] has {len(matrix[0])}")
        for t, tensor in enumerate(row):
            _check_tensor(function, f"rows[{i}][{t}]", tensor, f"rows[0][{t}]", matrix[0][t], matrix[0][0])
    return matrix


def _read_row(function: str, i: int, row: Any) -> list[Tensor]:
    if isinstance(row, Tensor):
        raise TypeError(
            f"flatmtl.{function}: rows[{i}] is a tensor; it must be a sequence of tensors. Pass torch.stack(rows) or "
            "[[row] for row in rows]"
        )
    tensors = list(row)
    for t, tensor in enumerate(tensors):
        if tensor is None:
            raise TypeError(
                f"flatmtl.{function}: rows[{i}][{t}] is None, a gradient that the loss does not reach; pass zeros "
                "(torch.autograd.grad has materialize_grads=True)"
            )
        if not isinstance(tensor, Tensor):
            raise TypeError(f"flatmtl.{function}: rows[{i}][{t}] is of type {type(tensor).__name__}, not a tensor")
    return tensors


def _check_tensor(function: str, name: str, tensor: Tensor, other: str, expected: Tensor, first: Tensor) -> None:
    _check_no_grad(function, name, tensor)
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"flatmtl.{function}: {name} is {tensor.dtype}; float32, float64, bfloat16 and float16 work")
    if tensor.layout != torch.strided:
        raise TypeError(f"flatmtl.{function}: {name} is sparse ({tensor.layout}); convert it with to_dense()")
    if tensor.dtype != first.dtype:
        raise TypeError(f"flatmtl.{function}: {name} is {tensor.dtype}, rows[0][0] is {first.dtype}")
    if tensor.device != first.device:
        raise ValueError(f"flatmtl.{function}: {name} is on {tensor.device}, rows[0][0] on {first.device}")
    if tensor.shape != expected.shape:
        if tensor.numel() != expected.numel():
            what = f"has {tensor.numel()} elements, {other} has {expected.numel()}"
        else:
            what = f"has shape {tuple(tensor.shape)}, {other} has {tuple(expected.shape)}"
        raise ValueError(f"flatmtl.{function}: {name} {what}")
