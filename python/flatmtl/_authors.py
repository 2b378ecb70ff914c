"""The solvers that the papers' published code uses, as described there: contenders of `flatmtl compare`.

Each takes a (K, K) f64 Gramian and gives K weights of the same meaning as flatmtl's, to the accuracy that its iteration
reaches. Absolute constants (1e-8, tolerances) are those of the published code. scipy, and cvxpy for Nash-MTL, are
imported when needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Solver = Callable[[Tensor], Tensor]


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ValueError(f"the authors' solver needs {package}: pip install {package}") from error


def solver(aggregator: str) -> Solver:
    """ValueError where the published code solves nothing, or a package is missing."""
    if aggregator not in _SOLVERS:
        raise ValueError(
            f"the authors' code has no solver of its own for {aggregator!r}, only for {', '.join(_SOLVERS)}"
        )
    modules, solve = _SOLVERS[aggregator]
    for module in modules:
        _need(module)
    return solve


def _mgda(gramian: Tensor) -> Tensor:
    """At most 20 projected-gradient steps with an exact line search, from the best pair of tasks."""
    k = len(gramian)
    if k == 1:
        return torch.ones_like(gramian[0])
    w, least = torch.zeros_like(gramian[0]), float("inf")
    for i in range(k):
        for j in range(i + 1, k):
            pair, value = _segment(gramian[i, i], gramian[i, j], gramian[j, j])
            if value < least:
                least, w = value, torch.zeros_like(gramian[0])
                w[i], w[j] = pair, 1 - pair
    for _ in range(20):
        direction = -(gramian @ w)
        direction = direction - direction.mean()
        limits = torch.where(direction < 0, -w, 1 - w) / direction  # where w + t direction leaves [0, 1]
        limits = limits[(direction != 0) & (limits > 1e-7)]
        point = _on_simplex(w + (limits.min() if len(limits) else 1.0) * direction)
        share, _ = _segment(w @ gramian @ w, w @ gramian @ point, point @ gramian @ point)
        new = share * w + (1 - share) * point
        if (new - w).square().sum() < 1e-5:
            break
        w = new
    return w


def _segment(aa: Tensor, ab: Tensor, bb: Tensor) -> tuple[float, float]:
    """(share of a, square) of the shortest vector between a and b; shares 0.999 and 0.001 at the ends."""
    a, m, b = float(aa), float(ab), float(bb)
    if m >= a:
        return 0.999, a
    if m >= b:
        return 0.001, b
    share = (b - m) / (a + b - 2 * m)
    return share, b + share * (m - b)


def _on_simplex(y: Tensor) -> Tensor:
    """Euclidean projection, by sorting."""
    ordered, _ = y.sort(descending=True)
    excess = (ordered.cumsum(0) - 1) / torch.arange(1, len(y) + 1, dtype=y.dtype)
    return (y - excess[(ordered > excess).nonzero()[-1, 0]]).clamp(min=0)


def _cagrad(gramian: Tensor, c: float = 0.4) -> Tensor:
    """scipy's SLSQP on the simplex, with 1e-8 under the roots."""
    optimize, g, k = _need("scipy.optimize"), gramian.numpy(), len(gramian)
    b = torch.full((k,), 1 / k, dtype=torch.float64).numpy()
    radius = c * (g.mean() + 1e-8) ** 0.5 + 1e-8
    sum_to_one = {"type": "eq", "fun": lambda x: 1 - x.sum()}
    x = optimize.minimize(
        lambda x: x @ g @ b + radius * (x @ g @ x + 1e-8) ** 0.5,
        b,
        method="SLSQP",
        bounds=[(0, 1)] * k,
        constraints=sum_to_one,
    ).x
    return torch.from_numpy((b + radius / ((x @ g @ x) ** 0.5 + 1e-8) * x) / (1 + c**2))


def _imtl_g(gramian: Tensor) -> Tensor:
    """alpha_2..K = g_1 U' (D U')^-1 with D_i = g_1 - g_i, U_i = u_1 - u_i, and torch.inverse; alpha_1 is the rest."""
    d = gramian.diagonal().sqrt()
    cross = gramian / d  # <g_i, u_j>
    d_u = cross[0, 0] - cross[0, 1:] - cross[1:, :1] + cross[1:, 1:]  # <D_i, U_j>
    rest = (cross[0, 0] - cross[0, 1:]) @ torch.inverse(d_u)
    return torch.cat([1 - rest.sum().reshape(1), rest])


def _nash_mtl(gramian: Tensor) -> Tensor:
    """At most 20 linearised convex programmes by ECOS or cvxpy's own choice, on G / ||G||_F, from ones.

    The published code returns the weights of G / ||G||_F; they are brought back to those of G.
    """
    cvxpy, np = _need("cvxpy"), _need("numpy")
    norm = float(gramian.norm())
    g, k = (gramian / norm).numpy(), len(gramian)
    alpha, before = cvxpy.Variable(k, nonneg=True), np.ones(k)
    slope = cvxpy.Parameter(k)
    products = cvxpy.log(alpha) + cvxpy.log(g @ alpha)
    objective = cvxpy.sum(g @ alpha) + slope @ alpha
    problem = cvxpy.Problem(cvxpy.Minimize(objective), [-products <= 0])
    options = {"solver": "ECOS", "max_iters": 100} if "ECOS" in cvxpy.installed_solvers() else {}
    for _ in range(20):
        slope.value = 1 / before + g.T @ (1 / (g @ before))  # of the concave part, at the last point
        try:
            problem.solve(**options)
        except cvxpy.error.SolverError:
            break
        if alpha.value is None:
            break
        change, before = np.linalg.norm(alpha.value - before), alpha.value.copy()
        if change < 1e-6 or np.linalg.norm(g @ before - 1 / (before + 1e-10)) < 1e-3:
            break
    return torch.from_numpy(before) / norm**0.5


def _fairgrad(gramian: Tensor, alpha: float = 2.0) -> Tensor:
    """scipy's least_squares (trust region) on the residual Gw - w^(-1/alpha), w > 0, from 1/K."""
    optimize, g, k = _need("scipy.optimize"), gramian.numpy(), len(gramian)
    start = torch.full((k,), 1 / k, dtype=torch.float64).numpy()
    result = optimize.least_squares(lambda w: g @ w - w ** (-1 / alpha), start, bounds=(0, float("inf")))
    return torch.from_numpy(result.x)


_SOLVERS: dict[str, tuple[tuple[str, ...], Solver]] = {
    "mgda": ((), _mgda),
    "cagrad": (("scipy.optimize",), _cagrad),
    "imtl_g": ((), _imtl_g),
    "nash_mtl": (("cvxpy",), _nash_mtl),
    "fairgrad": (("scipy.optimize",), _fairgrad),
}
