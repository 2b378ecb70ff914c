"""Weights of the aggregators: w(G) from the Gramian G_ij = <g_i, g_j>, K x K; the update is then SUM_i w_i g_i.

Everything is f64 on the CPU and exact up to rounding. d_i = ||g_i|| = sqrt(G_ii), and C_ij = G_ij / (d_i d_j) are the
cosines. The solves are written in y_i = w_i d_i, the lengths of the summands, so that rows of very different length do
no harm. A method that has no finite solution gives zeros: the point is Pareto-stationary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import projections

EPS = torch.finfo(torch.float64).eps


def weights(
    gramian: Tensor, name: str, *, draw: int = 0, call: int = 0, state: Tensor | None = None, **options: Any
) -> Tensor:
    """The weights w(G) of the method called `name`.

    Args:
        gramian: (K, K), G_ij = <g_i, g_j>, finite.
        name: one of METHODS.
        draw, call: number of the optimizer's step and of the call within it, for methods that draw at random.
        state: of gradvac, its K x K targets, changed in place; None starts afresh.
        options: `values` (fixed), `seed` (pcgrad, gradvac), `c` (cagrad), `alpha` (fairgrad), `beta` (gradvac), `scale`
            and `tolerance` (aligned_mtl), `preference` (upgrad, dualproj), `exponent` (ntkmtl).

    Returns:
        (K,) f64.
    """
    if name not in METHODS:
        raise ValueError(f"unknown aggregator {name!r}; there are {', '.join(METHODS)}")
    gramian = gramian.detach().to("cpu", torch.float64)
    if gramian.dim() != 2 or gramian.shape[0] != gramian.shape[1] or len(gramian) == 0:
        raise ValueError(f"a Gramian is K x K, K >= 1; got {tuple(gramian.shape)}")
    if not gramian.isfinite().all():
        row = int((~gramian.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"the Gramian of row {row} is not finite")
    if name in ("pcgrad", "gradvac"):
        options |= {"draw": draw, "call": call}
    if name == "gradvac":
        options["state"] = state
    return METHODS[name](gramian, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Weights that do not look at the gradients


def unit(gramian: Tensor) -> Tensor:
    """The sum of the gradients: w = 1."""
    return torch.ones_like(gramian[0])


def mean(gramian: Tensor) -> Tensor:
    """w = 1/K."""
    return torch.full_like(gramian[0], 1 / len(gramian))


def fixed(gramian: Tensor, values: object) -> Tensor:
    """w = values, K numbers."""
    w = torch.as_tensor(values, dtype=torch.float64).clone()
    if w.shape != gramian[0].shape:
        raise ValueError(f"{len(gramian)} tasks, but values of shape {tuple(w.shape)}")
    return w


# ---------------------------------------------------------------------------------------------------------------------
# MGDA and CAGrad: points of least norm in a polytope


def mgda(gramian: Tensor) -> Tensor:
    """MGDA (Desideri 2012; Sener and Koltun, 1810.04650, eq. 3): argmin w'Gw subject to w >= 0, 1'w = 1.

    Wolfe's algorithm (1976). In y the problem is min y'Cy subject to y >= 0, u'y = 1 with u = 1/d, and the solution is
    where Cy >= (y'Cy) u. Rows that violate this enter the support one by one; rows whose y would turn negative leave.
    Zero rows share weight 1: the minimum is then 0.
    """
    zero = gramian.diagonal() == 0
    if zero.any():
        return zero.double() / zero.sum()
    cosines, d = _cosines(gramian)
    u = d.min() / d
    support = [int(d.argmin())]
    y = torch.zeros_like(d)
    y[support] = 1
    for _ in range(100 * len(d)):
        bound = (y @ cosines @ y) * u
        violation = (bound - cosines @ y) / (cosines.abs() @ y + bound)
        entering = int(violation.argmax())
        if entering in support or violation[entering] <= 8 * EPS * len(d):
            break
        support.append(entering)
        while True:
            target, _, _ = _on_face(cosines[support][:, support], u[support], 0 * u[support])
            if (target > 0).all():
                y[support] = target
                break
            if y[entering] == 0 and target[-1] <= 0:  # it entered through rounding alone
                return y * u / (y @ u)
            old = y[support]
            step = torch.where(target <= 0, old / (old - target).clamp(min=1e-300), torch.inf)
            y[support] = old + step.min() * (target - old)
            y[support.pop(int(step.argmin()))] = 0
    return y * u / (y @ u)


def cagrad(gramian: Tensor, c: float = 0.4) -> Tensor:
    """CAGrad (2110.14048): argmax_v min_i <g_i, v> subject to ||v - g_0|| <= c ||g_0||, g_0 the mean; then / (1 + c^2).

    By duality v = g_0 + (phi / ||g_w||) g_w with phi = c ||g_0|| and g_w = SUM_i w_i g_i, w in the simplex, of least
    <g_w, g_0> + phi ||g_w||. With t = ||g_w|| / phi, the optimality conditions say that g_w + t g_0 is the point of
    least norm in the polytope of the g_i + t g_0: a search for the one t at which ||g_w(t)|| = phi t (||g_w(t)|| / t
    decreases in t). On the face that holds the solution g_w(t) is affine in t, and t has a closed form.
    The correction is left out where 0 is in the polytope of the g_i: v = g_0.
    """
    b = mean(gramian)
    h = gramian @ b  # <g_i, g_0>
    phi = c * (b @ h).clamp(min=0).sqrt()
    w = mgda(gramian)
    if phi == 0 or _vanishes(w, gramian):
        return b / (1 + c**2)
    cosines, d = _cosines(gramian)
    t: Any = (w @ gramian @ w).sqrt() / phi
    lower: Any = t  # ||g_w|| is nowhere less than at this w
    upper: Any = torch.inf
    for _ in range(500):
        w = mgda(gramian + t * (h + h[:, None]) + t**2 * (b @ h))
        if (w @ gramian @ w).clamp(min=0).sqrt() > phi * t:
            lower = t
        else:
            upper = t
        on = w > 0
        p, p_square, r = _on_face(cosines[on][:, on], 1 / d[on], (h / d)[on])
        inside = phi**2 - (h / d)[on] @ r  # phi^2 less the square of the part of g_0 along the face
        if inside > 0:
            t = (p_square.clamp(min=0) / inside).sqrt()
            y = torch.zeros_like(d).index_put((on,), p - t * r)
            pull = cosines @ y + t * h / d  # <g_w + t g_0, g_i> / d_i, least and equal times d_i where y > 0
            level = (pull * d)[on].mean()
            size = cosines.abs() @ y.abs() + t * (h / d).abs()
            if (y >= 0).all() and ((pull - level / d) >= -64 * EPS * len(d) * size).all():
                w = y / d
                break
        if not lower < t < upper:
            t = 2 * lower if upper == torch.inf else (lower + upper) / 2
        if upper < torch.inf and upper - lower <= 4 * EPS * upper:
            break
    return (b + phi / (w @ gramian @ w).sqrt() * w) / (1 + c**2)


def _on_face(cosines: Tensor, u: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(p, p'Cp, r): p = argmin y'Cy subject to u'y = 1; argmin y'Cy / 2 + t eta'y is then p - t r."""
    n, scale = len(u), u.max()
    kkt = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    kkt[:n, :n], kkt[:n, n], kkt[n, :n] = cosines, -u / scale, u / scale
    right = torch.zeros(n + 1, 2, dtype=torch.float64)
    right[n, 0], right[:n, 1] = 1 / scale, eta
    solution = torch.linalg.solve(kkt, right)
    return solution[:n, 0], solution[n, 0] / scale, solution[:n, 1]


# ---------------------------------------------------------------------------------------------------------------------
# PCGrad


def pcgrad(gramian: Tensor, seed: int = 0, draw: int = 0, call: int = 0) -> Tensor:
    """PCGrad (2001.06782, Algorithm 1): every g_i is projected on the normal plane of each g_j it conflicts with, in a
    random order of the other tasks j; the projected gradients are summed.

    In coefficients, g_i' = SUM_k c_k g_k: c = e_i; for j in the order: if (Gc)_j < 0, c_j -= (Gc)_j / G_jj.
    """
    total = torch.zeros_like(gramian[0])
    for i in range(len(gramian)):
        c = torch.zeros_like(gramian[0])
        c[i] = 1
        for j in _others(i, len(gramian), seed, draw, call):
            inner = gramian[j] @ c
            if inner < 0:
                c[j] -= inner / gramian[j, j]
        total += c
    return total


def gradvac(gramian: Tensor, seed: int = 0, draw: int = 0, call: int = 0, **options: Any) -> Tensor:
    """GradVac in the random orders of :func:`pcgrad`; see :func:`projections.gradvac`."""
    return projections.gradvac(gramian, lambda i: _others(i, len(gramian), seed, draw, call), **options)


def _others(row: int, num_tasks: int, seed: int, draw: int, call: int) -> list[int]:
    """The other tasks in an order that (seed, draw, call, row) fix: Fisher-Yates on a counter-based generator."""
    state = 0
    for word in (seed, draw, call, row):
        state = _mix(state ^ _wrap(word + GOLDEN))
    order = [j for j in range(num_tasks) if j != row]
    for n, m in enumerate(range(len(order) - 1, 0, -1)):
        j = _mix(_wrap(state + (n + 1) * GOLDEN)) % (m + 1)
        order[m], order[j] = order[j], order[m]
    return order


GOLDEN = 0x9E3779B97F4A7C15


def _wrap(z: int) -> int:
    return z & 0xFFFFFFFFFFFFFFFF


def _mix(z: int) -> int:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014)."""
    z = _wrap((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9)
    z = _wrap((z ^ (z >> 27)) * 0x94D049BB133111EB)
    return z ^ (z >> 31)


# ---------------------------------------------------------------------------------------------------------------------
# Methods that balance the projections <g_i, update>


def imtl_g(gramian: Tensor) -> Tensor:
    """IMTL-G (Liu et al., ICLR 2021): equal projections on all unit gradients, 1'w = 1: w = G^+ d / (1'G^+ d).

    Zero rows get weight 0. Zeros where 1'G^+ d = 0.
    """
    w = torch.zeros_like(gramian[0])
    keep = gramian.diagonal() > 0
    if not keep.any():
        return w
    gramian = gramian[keep][:, keep]
    cosines, d = _cosines(gramian)
    spectrum = torch.linalg.eigvalsh(cosines)
    if spectrum[0] > 16 * EPS * len(d) * spectrum[-1]:
        inverse = torch.linalg.inv(cosines) / d / d[:, None]
    else:
        scale = gramian.trace()
        inverse = torch.linalg.pinv(gramian / scale, rtol=16 * EPS * len(d), hermitian=True) / scale
    w_keep = inverse @ d
    total = w_keep.sum()
    if abs(total) > 64 * EPS * len(d) * (inverse.abs() @ d).sum():
        w[keep] = w_keep / total
    return w


def nash_mtl(gramian: Tensor) -> Tensor:
    """Nash-MTL (2202.01017, eq. 2): the root w > 0 of Gw = 1/w, the Nash bargaining solution: FairGrad's alpha = 1."""
    return fairgrad(gramian, alpha=1.0)


def fairgrad(gramian: Tensor, alpha: float = 2.0) -> Tensor:
    """FairGrad (2402.15638, eq. 8): the root w > 0 of Gw = w^(-1/alpha), alpha-fair utilities <g_i, update>.

    With p = 1/alpha and b = d^(p-1) this is Cy = b y^(-p), where the convex y'Cy / 2 - SUM_i b_i y_i^(1-p) / (1-p) has
    its minimum (alpha = 1: log y_i). Newton's method; a step changes no y_i by more than the share r within which the
    Hessian less than doubles, so that the objective falls at every step. Zero rows get weight 0. Zeros where a
    non-negative combination of the other rows vanishes: there is then no minimum.
    """
    w = torch.zeros_like(gramian[0])
    keep = gramian.diagonal() > 0
    if not keep.any():
        return w
    cosines, d = _cosines(gramian[keep][:, keep])
    if _vanishes(mgda(cosines), cosines):
        return w
    p = 1 / alpha
    b = d ** (p - 1)
    r = 0.95 * (1 - 2 ** (-1 / (p + 1)))
    y = b ** (1 / (p + 1))  # the root for orthogonal rows
    for _ in range(2000):
        hessian = cosines + torch.diag(p * b * y ** (-p - 1))
        step = torch.linalg.solve(hessian, b * y**-p - cosines @ y)
        change = (step / y).abs().max()
        y = y + step * (r / change).clamp(max=1)
        if change < 1e-9:  # quadratic convergence: the step just taken leaves rounding alone
            break
    w[keep] = y / d
    return w


# ---------------------------------------------------------------------------------------------------------------------


def _cosines(gramian: Tensor) -> tuple[Tensor, Tensor]:
    """(C, d) of a Gramian without zero rows."""
    d = gramian.diagonal().sqrt()
    return gramian / d / d[:, None], d


def _vanishes(w: Tensor, gramian: Tensor) -> bool:
    """Whether SUM_i w_i g_i is 0 up to rounding: w'Gw against the size of its terms."""
    return bool(w @ gramian @ w <= 16 * EPS * len(w) * (w.abs() @ gramian.abs() @ w.abs()))


METHODS: dict[str, Callable[..., Tensor]] = {
    "sum": unit,
    "mean": mean,
    "fixed": fixed,
    "mgda": mgda,
    "pcgrad": pcgrad,
    "cagrad": cagrad,
    "imtl_g": imtl_g,
    "nash_mtl": nash_mtl,
    "fairgrad": fairgrad,
    "gradvac": gradvac,
    **projections.PROJECTIONS,
}
