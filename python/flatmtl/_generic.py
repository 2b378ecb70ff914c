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

from . import _random

Row = Sequence[Tensor]
Rows = Sequence[Row]

PIECE = 1 << 20


@torch.no_grad()
def gramian(rows: Rows, accumulate: int = 0) -> Tensor:
    """G_ij = <x_i, x_j>, (K, K). Inf and NaN in the rows show in the result. In float64 whatever accumulate says."""
    total = None
    for pieces in _pieces(rows):
        matrix = torch.stack([_wide(piece).reshape(-1) for piece in pieces])
        total = _add(total, matrix @ matrix.T)
    return _result(total, len(rows), len(rows))


@torch.no_grad()
def gramian_pair(loss_rows: Rows, perturbed_rows: Rows, accumulate: int = 0, cross: bool = True) -> Tensor:
    """Gramian of (g_1 .. g_K, f_1 .. f_K), f = perturbed - loss rows, (2K, 2K); <g_i, f_j> = 0 without `cross`."""
    count, total = len(loss_rows), None
    for pieces in _pieces([*loss_rows, *perturbed_rows]):
        loss, perturbed = pieces[:count], pieces[count:]
        flat = [_flat_gradient(g, s) for g, s in zip(loss, perturbed, strict=True)]
        matrix = torch.stack([x.reshape(-1) for x in [_wide(g) for g in loss] + flat])
        families = [matrix] if cross else [matrix[:count], matrix[count:]]
        total = _add(total, torch.block_diag(*(family @ family.T for family in families)))
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


# The buffer methods, whose rows are x_i = a_i g_i + b_i (s_i - g_i).


def _mixed(pieces: Sequence[Tensor], count: int, a: Tensor, b: Tensor) -> list[Tensor]:
    """x_i of one piece, from the pieces of g and, if there are any, of s."""
    wide = [_wide(piece) for piece in pieces]
    if len(wide) == count:
        return [g * factor for g, factor in zip(wide, a.tolist(), strict=True)]
    return [g * i + (s - g) * j for g, s, i, j in zip(wide[:count], wide[count:], a.tolist(), b.tolist(), strict=True)]


@torch.no_grad()
def moving_average_(buffers: Rows, rows: Rows, perturbed: Rows | None, a: Tensor, b: Tensor, keep: Tensor) -> None:
    """y_i = x_i + keep_i (y_i - x_i)."""
    count = len(rows)
    for pieces in _pieces([*buffers, *rows, *(perturbed or [])]):
        for y, x, kept in zip(pieces[:count], _mixed(pieces[count:], count, a, b), keep.tolist(), strict=True):
            y.copy_(x + (_wide(y) - x) * kept)


@torch.no_grad()
def excess_(buffers: Rows, rows: Rows, perturbed: Rows | None, a: Tensor, b: Tensor) -> Tensor:
    """r = sqrt(r^2 + x^2); SUM_p x_ip^2 / r_ip, (K,)."""
    count, total = len(rows), None
    for pieces in _pieces([*buffers, *rows, *(perturbed or [])]):
        sums = []
        for root, x in zip(pieces[:count], _mixed(pieces[count:], count, a, b), strict=True):
            now = (_wide(root).square() + x.square()).sqrt()
            root.copy_(now)
            sums.append((x.square() / torch.where(now > 0, now, 1.0)).sum())
        total = _add(total, torch.stack(sums))
    return _result(total, count)


@torch.no_grad()
def cross_gramian(
    rows: Rows, perturbed: Rows | None, others: Rows, others_perturbed: Rows | None, a: Tensor, b: Tensor
) -> Tensor:
    """<x_i, y_j>, (K, K)."""
    count, total = len(rows), None
    width = count if perturbed is None else 2 * count
    for pieces in _pieces([*rows, *(perturbed or []), *others, *(others_perturbed or [])]):
        x = torch.stack([v.reshape(-1) for v in _mixed(pieces[:width], count, a, b)])
        y = torch.stack([v.reshape(-1) for v in _mixed(pieces[width:], count, a, b)])
        total = _add(total, x @ y.T)
    return _result(total, count, count)


@torch.no_grad()
def graddrop_(
    out: Row, rows: Rows, perturbed: Rows | None, a: Tensor, b: Tensor, leak: Tensor, seed: int, draw: int, call: int,
    position: int,
) -> None:  # fmt: skip
    """The update of GradDrop; `position` is the place of its first element in the whole vector."""
    count, start = len(rows), _random.start_sequence(seed, draw, call, 0)
    for target, *pieces in _pieces([out, *rows, *(perturbed or [])]):
        x = _mixed(pieces, count, a, b)
        total, mass = sum(x), sum(v.abs() for v in x)
        u = _random.signed_units(start, position, target.numel(), target.device).view(target.shape)
        bound = u.to(x[0].dtype) * mass
        sign = (total > bound).to(x[0].dtype) - (total < bound).to(x[0].dtype)
        kept = [torch.where(v * sign > 0, v, v * part) for v, part in zip(x, leak.tolist(), strict=True)]
        target.copy_(torch.as_tensor(sum(kept)))
        position += target.numel()


@torch.no_grad()
def combine_buffers_(out: Row, buffers: Rows, weights: Tensor) -> None:
    """out[t] = SUM_i weights[i] buffers[i][t]."""
    combine_(out, buffers, weights)


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
