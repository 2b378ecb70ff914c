"""Weights of the methods that turn, project or align gradients; see :mod:`flatmtl.reference.aggregators`.

C_ij are the cosines, d_i the lengths. Zero rows take no part.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps


def _nonzero(method: Callable[..., Tensor], otherwise: float = 0.0) -> Callable[..., Tensor]:
    """The method on the rows that are not zero; zero rows get the weight `otherwise`."""

    def weights(gramian: Tensor, **options: Any) -> Tensor:
        keep = gramian.diagonal() > 0
        w = torch.full_like(gramian[0], otherwise)
        if keep.any():
            w[keep] = method(gramian[keep][:, keep], **options)
        return w

    weights.__doc__ = method.__doc__
    return weights


def gradvac(
    gramian: Tensor, others: Callable[[int], list[int]], beta: float = 0.01, state: Tensor | None = None
) -> Tensor:
    """GradVac (2010.05874, Algorithm 1), whole model, the sum over tasks.

    g_i' = g_i; for the other tasks j in the order `others(i)`: with phi = cos(g_i', g_j), if phi < t_ij then

        g_i' += ||g_i'|| (t_ij sqrt(1 - phi^2) - phi sqrt(1 - t_ij^2)) / (||g_j|| sqrt(1 - t_ij^2)) g_j

    and in any case t_ij += beta (phi - t_ij). `state` holds t, (K, K) or (K * K,), changed in place.
    """
    targets = torch.zeros_like(gramian) if state is None else state.view_as(gramian)
    d = gramian.diagonal().sqrt()
    total = torch.zeros_like(d)
    for i in range(len(d)):
        c = torch.zeros_like(d)
        c[i] = 1
        for j in others(i):
            terms = c.abs() * d
            square = c @ gramian @ c
            if d[i] == 0 or d[j] == 0 or square <= 4 * EPS * len(d) * terms.sum() ** 2:
                continue
            norm = square.sqrt()
            phi = (gramian[j] @ c / norm / d[j]).clamp(-1, 1)
            t = targets[i, j].clamp(max=1 - 1e-6)
            if phi < t:
                sine = (1 - t**2).sqrt()
                c[j] += norm * (t * (1 - phi**2).sqrt() - phi * sine) / (d[j] * sine)
            targets[i, j] += beta * (phi - targets[i, j])
        total += c
    return total


def aligned_mtl(gramian: Tensor, scale: str = "min", tolerance: float = 2.0**-23) -> Tensor:
    """Aligned-MTL (CVPR 2023, Algorithm 1): w = B 1, B = sqrt(s) V L^(-1/2) V' over the eigenvalues that count."""
    values, vectors = torch.linalg.eigh(gramian / gramian.trace())
    keep = values > min(tolerance * len(values), 1 - 1e-12) * values.max()
    values, vectors = values[keep], vectors[:, keep]
    s = {"min": values.min(), "median": values.median(), "rmse": values.mean()}[scale]
    return (s / values).sqrt() * vectors.sum(0) @ vectors.T


def upgrad(gramian: Tensor, preference: object = None) -> Tensor:
    """UPGrad (2406.16232, section 3.2): w = SUM_i argmin v'Gv over v >= p_i e_i, p_i = 1/K by default."""
    return torch.stack([_project(gramian, row) for row in torch.diag(_preference(gramian, preference))]).sum(0)


def dualproj(gramian: Tensor, preference: object = None) -> Tensor:
    """DualProj (1706.08840): w = argmin v'Gv over v >= p."""
    return _project(gramian, _preference(gramian, preference))


def config(gramian: Tensor) -> Tensor:
    """ConFIG (2408.11104, eq. 2): along U^+ 1, U the unit gradients, as long as the sum of the projections on it.

    In the Gramian: U^+ 1 = U'v with v = C^+ 1.
    """
    d = gramian.diagonal().sqrt()
    cosines = gramian / d / d[:, None]
    ones = torch.ones_like(d)
    values, vectors = torch.linalg.eigh(cosines)
    keep = values > 16 * EPS * len(d) * values[-1]
    v = torch.linalg.solve(cosines, ones) if keep.all() else vectors[:, keep] / values[keep] @ vectors[:, keep].sum(0)
    square = v @ cosines @ v
    if square <= 64 * EPS * len(d) * (v.abs() @ cosines.abs() @ v.abs()) or (vectors[:, keep].sum(0) ** 2).sum() < EPS:
        return 0 * d
    return (d @ cosines @ v) / square * v / d


def ntkmtl(gramian: Tensor, exponent: float = 0.5) -> Tensor:
    """NTKMTL (NeurIPS 2025), n = 1: w_i = (mean_j G_jj / G_ii)^exponent."""
    square = gramian.diagonal()
    return (square.mean() / square) ** exponent


def _preference(gramian: Tensor, preference: object) -> Tensor:
    if preference is None:
        return torch.full_like(gramian[0], 1 / len(gramian))
    return torch.as_tensor(preference, dtype=torch.float64)


def _project(gramian: Tensor, lower: Tensor) -> Tensor:
    """argmin v'Gv over v >= lower: the projection of SUM_i lower_i g_i on the dual cone, in coefficients.

    With v = lower + y / d: the non-negative least squares problem min ||R(o + y)||, y >= 0, for a root R of the cosines
    (R'R = C) and o = d lower. Lawson and Hanson's method (1974): the most violated row enters; rows that would turn
    negative leave.
    """
    positive = gramian.diagonal() > 0
    d = torch.where(positive, gramian.diagonal().sqrt(), 1.0)
    cosines = torch.where(positive & positive[:, None], gramian / d / d[:, None], 0.0)
    offset = d * lower
    if not (positive & (offset > 0)).any():
        return lower.clone()
    size = offset.max()
    offset = offset / size
    values, vectors = torch.linalg.eigh(cosines)
    root = (values.clamp(min=0).sqrt() * vectors).T
    passive = torch.zeros_like(positive)
    y = torch.zeros_like(d)
    for _ in range(20 * len(d) + 20):
        pull = cosines @ (offset + y)
        violation = torch.where(passive | ~positive, 0.0, -pull / (cosines.abs() @ (offset + y)))
        entering = int(violation.nan_to_num().argmax())
        if not violation[entering] > 64 * EPS * len(d):
            break
        passive[entering] = True
        while passive.any():
            on = passive.nonzero().flatten()
            target = torch.linalg.lstsq(root[:, on], -(root @ offset)[:, None], driver="gelsd").solution[:, 0]
            if (target > 0).all():
                y[on] = target
                break
            old = y[on]
            steps = torch.where(target <= 0, old / (old - target).clamp(min=1e-300), torch.inf)
            y[on] = old + steps.min() * (target - old)
            out = on[int(steps.argmin())]
            y[out], passive[out] = 0, False
    return lower + size * y / d


PROJECTIONS: dict[str, Callable[..., Tensor]] = {
    "aligned_mtl": _nonzero(aligned_mtl),
    "upgrad": upgrad,
    "dualproj": dualproj,
    "config": _nonzero(config),
    "ntkmtl": _nonzero(ntkmtl),
}
