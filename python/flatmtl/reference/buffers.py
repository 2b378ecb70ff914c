"""The aggregators that are no function of the Gramian, in plain PyTorch on a (K, P) matrix of gradients.

    method = Buffers("moco", beta=0.5)
    update = method(gradients, losses)        # step by step; what it remembers is in the object

Written from the papers' equations as `flatmtl.buffers` states them, in f64.
"""

from typing import Any

import torch
from torch import Tensor

from .aggregators import GOLDEN, _mix, _wrap


class Buffers:
    """One run of the method called `name`, for one family of gradients."""

    def __init__(self, name: str, **options: Any) -> None:
        self.name, self.options, self.memory = name, options, {}
        self.weights: Tensor | None = None

    def __call__(self, *rows: Tensor, losses: Any = None, draw: int = 0, call: int = 0) -> Tensor:
        x = [r.detach().double() for r in rows]
        if losses is not None:
            losses = torch.as_tensor(losses, dtype=torch.float64)
        if self.name == "graddrop":
            return graddrop(x[0], draw, call, **self.options)
        if self.name == "sdmgrad":
            self.weights, update = sdmgrad(*x, self.memory, **self.options)
        else:
            method = {"moco": moco, "db_mtl": db_mtl, "excess_mtl": excess_mtl}[self.name]
            self.weights, update = method(x[0], losses, self.memory, **self.options)
        return update


def graddrop(x: Tensor, draw: int, call: int, seed: int = 0, leak: Any = 0.0) -> Tensor:
    """2010.06808, Algorithm 1."""
    state = 0
    for word in (seed, draw, call, 0):
        state = _mix(state ^ _wrap(word + GOLDEN))
    u = [((_mix(_wrap(state + (p + 1) * GOLDEN)) >> 11) + 0.5) / 2**53 for p in range(x.shape[1])]
    uniform = torch.tensor(u, dtype=torch.float64)
    mass = x.abs().sum(0)
    purity = torch.where(mass > 0, 0.5 * (1 + x.sum(0) / mass), 0.5)
    keep = ((purity > uniform) & (x > 0)) | ((purity < uniform) & (x < 0))
    leaks = torch.as_tensor(leak, dtype=torch.float64).expand(len(x))[:, None]
    return ((leaks + (1 - leaks) * keep) * x).sum(0)


def moco(x, losses, memory, beta=0.5, beta_decay=0.5, gamma=0.1, gamma_decay=0.5, rho=0.0, normalize=True):
    """2210.12624, with the direction l_i x_i / ||x_i|| and the softmax of the authors' shared code."""
    k = len(x)
    t = memory["t"] = memory.get("t", 0) + 1
    y = memory.get("y", torch.zeros_like(x))
    weights = memory.get("lambda", torch.full((k,), 1 / k, dtype=torch.float64))
    if normalize:
        norms = x.norm(dim=1, keepdim=True)
        x = torch.where(norms > 0, losses[:, None] * x / norms, 0.0)
    y = memory["y"] = y - beta * t**-beta_decay * (y - x)
    gramian = y @ y.T + rho * torch.eye(k, dtype=torch.float64)
    weights = memory["lambda"] = torch.softmax(weights - gamma * t**-gamma_decay * gramian @ weights, 0)
    return weights, y.T @ weights


def db_mtl(x, losses, memory, beta=0.9, decay=0.0):
    """2308.12029, Algorithm 1."""
    t = memory["t"] = memory.get("t", 0) + 1
    x = x / losses[:, None]
    y = memory["y"] = x + beta * t**-decay * (memory.get("y", torch.zeros_like(x)) - x)
    norms = y.norm(dim=1)
    weights = torch.where(norms > 0, norms.max() / norms, 0.0)
    return weights, y.T @ weights


def excess_mtl(x, losses, memory, eta=0.01):
    """2402.02009, Algorithm 1; the multiplicative weights by their logarithms."""
    h = memory["h"] = memory.get("h", torch.zeros_like(x)) + x**2
    e = torch.where(h > 0, x**2 / h.sqrt(), 0.0).sum(1)
    first = memory.setdefault("first", e)
    log_w = memory["log_w"] = memory.get("log_w", torch.zeros_like(e)) + eta * e / first
    weights = len(x) * torch.softmax(log_w, 0)
    return weights, x.T @ weights


def sdmgrad(x, y, z, memory, lam=0.3, lr=10.0, momentum=0.5, iterations=20):
    """2305.18409, Algorithm 1."""
    k = len(x)
    cross = y @ z.T
    scale = cross.diagonal().abs().mean()
    u = memory.get("u", torch.full((k,), 1 / k, dtype=torch.float64))
    velocity = torch.zeros_like(u)
    for _ in range(iterations if scale > 0 else 0):
        velocity = momentum * velocity + cross / scale @ (u + lam / k)
        u = simplex(u - lr * velocity)
    memory["u"] = u
    weights = (u + lam / k) / (1 + lam)
    return weights, x.T @ weights


def simplex(u: Tensor) -> Tensor:
    """The nearest point of the probability simplex, by bisection for the shift."""
    low, high = u.min() - 1, u.max()
    for _ in range(200):
        t = (low + high) / 2
        low, high = (t, high) if (u - t).clamp(min=0).sum() > 1 else (low, t)
    w = (u - high).clamp(min=0)
    return w / w.sum()
