"""The arithmetic on parameters and gradients by torch's own operations: any device, dtype and layout.

Same functions as `_native`. Inner products and sums are accumulated in float64, piece by piece of about `PIECE` numbers
a row, so that no copy of a whole row is made. Devices without float64 (MPS) work in float32, with a warning: the
Gramian then has the accuracy of float32.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Row = Sequence[Tensor]
Rows = Sequence[Row]

PIECE = 1 << 20


@torch.no_grad()
def gramian(rows: Rows) -> Tensor:
    """G_ij = <x_i, x_j>, (K, K). Inf and NaN in the rows show in the result."""
    total = None
    for pieces in _pieces(rows):
        matrix = torch.stack([_wide(piece).reshape(-1) for piece in pieces])
        total = _add(total, matrix @ matrix.T)
    return _result(total, len(rows), len(rows))


@torch.no_grad()
def gramian_pair(loss_rows: Rows, perturbed_rows: Rows) -> Tensor:
    """Gramian of (g_1 .. g_K, f_1 .. f_K), f = perturbed - loss rows, (2K, 2K)."""
    count, total = len(loss_rows), None
    for pieces in _pieces([*loss_rows, *perturbed_rows]):
        loss, perturbed = pieces[:count], pieces[count:]
        flat = [_flat_gradient(g, s) for g, s in zip(loss, perturbed, strict=True)]
        matrix = torch.stack([x.reshape(-1) for x in [_wide(g) for g in loss] + flat])
        total = _add(total, matrix @ matrix.T)
    return _result(total, 2 * count, 2 * count)


@torch.no_grad()
def sq_norms(rows: Rows, params: Row | None = None, eta: float = 0.0) -> Tensor:
    """Squared norms (K,); with params those of (|params| + eta) x (ASAM)."""
    total = None
    for pieces in _pieces([*rows] if params is None else [*rows, params]):
        values = [_wide(piece) for piece in pieces]
        if params is not None:
            values = [value * (values[-1].abs() + eta) for value in values[:-1]]
        total = _add(total, torch.stack([value.square().sum() for value in values]))
    return _result(total, len(rows))


@torch.no_grad()
def perturb_(params: Row, saved: Row, grads: Row, scale: Sequence[float], adaptive: bool, eta: float) -> None:
    """params[t] = saved[t] + scale[t] * T^2 * grads[t], T = 1, or |saved[t]| + eta if adaptive."""
    for param, old, grad, factor in zip(params, saved, grads, scale, strict=True):
        for out, value, step in _pieces([[param], [old], [grad]]):
            value, step = _wide(value), _wide(step)
            if adaptive:
                step = (value.abs() + eta).square() * step
            out.copy_(value + step * factor)


@torch.no_grad()
def copy_(to: Row, from_: Row) -> None:
    """to[t] = from_[t], bit for bit."""
    for target, source in zip(to, from_, strict=True):
        target.copy_(source)


@torch.no_grad()
def combine_(out: Row, rows: Rows, weights: Tensor) -> None:
    """out[t] = SUM_i weights[i] rows[i][t]."""
    factors = weights.tolist()
    for target, *pieces in _pieces([out, *rows]):
        total = torch.zeros_like(_wide(target))
        for factor, x in zip(factors, pieces, strict=True):
            total += _wide(x) * factor
        target.copy_(total)


@torch.no_grad()
def combine_pair_(out: Row, loss_rows: Rows, perturbed_rows: Rows, loss_weights: Tensor, flat_weights: Tensor) -> None:
    """out[t] = SUM_i loss_weights[i] g_i[t] + flat_weights[i] (s_i - g_i)[t]."""
    count, a, b = len(loss_rows), loss_weights.tolist(), flat_weights.tolist()
    for target, *pieces in _pieces([out, *loss_rows, *perturbed_rows]):
        total = torch.zeros_like(_wide(target))
        for i, (g, s) in enumerate(zip(pieces[:count], pieces[count:], strict=True)):
            total += _wide(g) * a[i] + (_wide(s) - _wide(g)) * b[i]
        target.copy_(total)


@functools.cache
def _has_float64(device: str) -> bool:
    if device != "mps":
        return True
    warnings.warn(
        f"flatmtl: {device} has no float64; inner products are accumulated in float32 there, so that weights have its "
        "accuracy",
        stacklevel=3,
    )
    return False


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float64 if _has_float64(x.device.type) else torch.float32)


def _flat_gradient(g: Tensor, s: Tensor) -> Tensor:
    """f = s - g, rounded to float32 for float32 and narrower, to float64 for float64."""
    if g.dtype != torch.float64:
        g, s = g.float(), s.float()
    return _wide(s - g)


def _pieces(rows: Rows) -> Iterator[list[Tensor]]:
    """Views of the same piece of every row: slices of the first dimension, so that strides do not matter."""
    for segments in zip(*rows, strict=True):
        views = [x.reshape(1) if x.dim() == 0 else x for x in segments]
        size, numel = views[0].shape[0], views[0].numel()
        length = max(1, PIECE * size // max(numel, 1))
        for begin in range(0, size if numel else 0, length):
            yield [x[begin : begin + length] for x in views]


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _result(total: Tensor | None, *size: int) -> Tensor:
    if total is None:
        return torch.zeros(size, dtype=torch.float64)
    return total.to("cpu", torch.float64)
