"""The arithmetic on parameters and gradients by the C core: CPU tensors of float32, float64, bfloat16 or float16.

Same functions as `_generic`, which takes any device. Rows are K lists of T tensors, all of one dtype; results of the
size of K are CPU float64 tensors. Nothing is copied unless tensors lie in memory in an order of their own (an expanded
or sliced gradient, say): those, and only those, are brought into the order of the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import _ops  # noqa: F401  (loads the ops)

Row = Sequence[Tensor]
Rows = Sequence[Row]

ops = torch.ops.flatmtl


@torch.no_grad()
def gramian(rows: Rows, accumulate: int = 0) -> Tensor:
    """G_ij = <x_i, x_j>, (K, K). Inf and NaN in the rows show in the result. accumulate: `_ops.ACCUMULATE`."""
    return _read([*rows], lambda rows: ops.gramian(_flat(rows), len(rows), accumulate))


@torch.no_grad()
def gramian_pair(loss_rows: Rows, perturbed_rows: Rows, accumulate: int = 0, cross: bool = True) -> Tensor:
    """Gramian of (g_1 .. g_K, f_1 .. f_K), f = perturbed - loss rows, (2K, 2K); <g_i, f_j> = 0 without `cross`."""
    count = len(loss_rows)
    return _read(
        [*loss_rows, *perturbed_rows],
        lambda rows: ops.gramian_pair(_flat(rows[:count]), _flat(rows[count:]), count, accumulate, cross),
    )


@torch.no_grad()
def sq_norms(rows: Rows, params: Row | None = None, eta: float = 0.0) -> Tensor:
    """Squared norms (K,); with params those of (|params| + eta) x (ASAM)."""
    count = len(rows)
    return _read(
        [*rows] if params is None else [*rows, params],
        lambda all_rows: ops.sq_norms(_flat(all_rows[:count]), count, _flat(all_rows[count:]), eta),
    )


@torch.no_grad()
def perturb_(params: Row, saved: Row, grads: Row, scale: Sequence[float], adaptive: bool, eta: float) -> None:
    """params[t] = saved[t] + scale[t] * T^2 * grads[t], T = 1, or |saved[t]| + eta if adaptive."""
    _write(
        params, [saved, grads], lambda out, rows: ops.perturb_(list(out), rows[0], rows[1], list(scale), adaptive, eta)
    )


@torch.no_grad()
def copy_(to: Row, from_: Row) -> None:
    """to[t] = from_[t], bit for bit."""
    _write(to, [from_], lambda out, rows: ops.copy_(list(out), rows[0]))


@torch.no_grad()
def combine_(out: Row, rows: Rows, weights: Tensor) -> None:
    """out[t] = SUM_i weights[i] rows[i][t]."""
    weights = _weights(weights)
    _write(out, [*rows], lambda out, rows: ops.combine_(list(out), _flat(rows), len(rows), weights))


@torch.no_grad()
def combine_pair_(out: Row, loss_rows: Rows, perturbed_rows: Rows, loss_weights: Tensor, flat_weights: Tensor) -> None:
    """out[t] = SUM_i loss_weights[i] g_i[t] + flat_weights[i] (s_i - g_i)[t]."""
    count, a, b = len(loss_rows), _weights(loss_weights), _weights(flat_weights)
    _write(
        out,
        [*loss_rows, *perturbed_rows],
        lambda out, rows: ops.combine_pair_(list(out), _flat(rows[:count]), _flat(rows[count:]), count, a, b),
    )


@torch.no_grad()
def moving_average_(buffers: Rows, rows: Rows, perturbed: Rows | None, a: Tensor, b: Tensor, keep: Tensor) -> None:
    """y_i = x_i + keep_i (y_i - x_i) for the rows x_i = a_i g_i + b_i (s_i - g_i)."""
    ops.moving_average_(_flat(buffers), _flat(rows), _flat(perturbed or []), len(rows), a, b, keep)


@torch.no_grad()
def excess_(buffers: Rows, rows: Rows, perturbed: Rows | None, a: Tensor, b: Tensor) -> Tensor:
    """r = sqrt(r^2 + x^2); SUM_p x_ip^2 / r_ip, (K,)."""
    result: Tensor = ops.excess_(_flat(buffers), _flat(rows), _flat(perturbed or []), len(rows), a, b)
    return result


@torch.no_grad()
def cross_gramian(
    rows: Rows, perturbed: Rows | None, others: Rows, others_perturbed: Rows | None, a: Tensor, b: Tensor
) -> Tensor:
    """<x_i, y_j>, (K, K)."""
    count, flat = len(rows), perturbed is not None
    lists = [*rows, *others, *(perturbed or []), *(others_perturbed or [])]

    def call(lists: list[Row]) -> Tensor:
        x, y = _flat(lists[:count]), _flat(lists[count : 2 * count])
        s = _flat(lists[2 * count : 3 * count]) if flat else []
        t = _flat(lists[3 * count :]) if flat else []
        result: Tensor = ops.cross_gramian(x, s, y, t, count, a, b)
        return result

    return _read(lists, call)


@torch.no_grad()
def graddrop_(
    out: Row, rows: Rows, perturbed: Rows | None, a: Tensor, b: Tensor, leak: Tensor, seed: int, draw: int, call: int,
    position: int,
) -> None:  # fmt: skip
    """The update of GradDrop; `position` is the place of its first element in the whole vector."""
    count = len(rows)
    _write(
        out,
        [*rows, *(perturbed or [])],
        lambda out, rows: ops.graddrop_(
            list(out), _flat(rows[:count]), _flat(rows[count:]), count, a, b, leak, seed, draw, call, position
        ),
    )


@torch.no_grad()
def combine_buffers_(out: Row, buffers: Rows, weights: Tensor) -> None:
    """out[t] = SUM_i weights[i] buffers[i][t]."""
    ops.combine_buffers_(list(out), _flat(buffers), len(buffers), weights)
    increment_version(list(out))


def _flat(rows: Rows) -> list[Tensor]:
    if any(len(row) != len(rows[0]) for row in rows):
        raise ValueError(f"rows have different numbers of tensors: {[len(row) for row in rows]}")
    return [tensor for row in rows for tensor in row]


def _weights(weights: Tensor) -> Tensor:
    return weights.to("cpu", torch.float64).contiguous()


def _read(rows: list[Row], call: Callable[[list[Row]], Tensor]) -> Tensor:
    """Calls an op; where it refuses the tensors, once more with their layouts made equal, if that is what was wrong."""
    try:
        return call(rows)
    except RuntimeError:
        fitted = _fitted(rows, _order(rows[0])) if rows else rows
        if fitted is rows:
            raise
    return call(fitted)


def _write(out: Row, rows: list[Row], call: Callable[[Row, list[Row]], Any]) -> None:
    """As `_read`, for an op that overwrites the whole of `out`, and checks everything before it touches it."""
    try:
        call(out, rows)
    except RuntimeError:
        order = _order(out)
        dense = [_fit(target, like, copy=False) for target, like in zip(out, order, strict=True)]
        fitted = _fitted(rows, order)
        if fitted is rows and _same(dense, out):
            raise
        call(dense, fitted)
        for target, result in zip(out, dense, strict=True):
            if target is not result:
                target.copy_(result)
    increment_version(list(out))


def _order(row: Row) -> list[Tensor | None]:
    """Tensors without memory of the shapes of a row and strides that leave no gaps; None for sparse tensors."""
    return [torch.empty_like(t, device="meta") if t.layout == torch.strided else None for t in row]


def _fitted(rows: list[Row], order: list[Tensor | None]) -> list[Row]:
    """The rows with the strides of `order`; `rows` itself if there is nothing to change."""
    fitted: list[Row] = []
    for row in rows:
        if len(row) != len(order):
            return rows
        fitted.append([_fit(tensor, like) for tensor, like in zip(row, order, strict=True)])
    return rows if all(map(_same, rows, fitted)) else fitted


def _fit(tensor: Tensor, like: Tensor | None, copy: bool = True) -> Tensor:
    """The tensor, or a new one with the strides of `like` if it has others; untouched where it is wrong otherwise."""
    if like is None or tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.shape != like.shape:
        return tensor
    if tensor.stride() == like.stride():
        return tensor
    new = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype)
    return new.copy_(tensor) if copy else new


def _same(a: Row, b: Row) -> bool:
    return all(x is y for x, y in zip(a, b, strict=True))
