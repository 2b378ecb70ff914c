"""Loss weightings in plain Python: the weights c_i of the losses, task by task, as the papers state them.

    weigh = Weighting("dwa", epoch=10)
    c = weigh([0.7, 1.3])            # a None among the losses is an absent task, and gets None

`memory` has one dict a task, and nothing else is remembered.
"""

import itertools
import math
from typing import Any

from .aggregators import GOLDEN, _mix, _wrap

Losses = list[float | None]


class Weighting:
    """One run of the weighting called `name`, one of METHODS; options as the classes of `flatmtl.weightings`."""

    def __init__(self, name: str, **options: Any) -> None:
        self.name, self.options = name, options
        self.memory: list[dict[str, Any]] = []

    def __call__(self, losses: Losses, norms: list[float] | None = None, draw: int = 0) -> list[float | None]:
        if not self.memory:
            self.memory = [{} for _ in losses]
        at = [i for i, loss in enumerate(losses) if loss is not None]
        extra: dict[str, Any] = dict(self.options)
        if self.name in ("gradnorm", "emtl"):
            assert norms is not None
            extra["norms"] = [norms[i] for i in at]
        if self.name == "rlw":
            extra["draw"] = draw
        for option in ("values", "min_losses"):
            if extra.get(option) is not None:
                extra[option] = [extra[option][i] for i in at]
        found = METHODS[self.name]([losses[i] for i in at], [self.memory[i] for i in at], **extra)
        c: list[float | None] = [None] * len(losses)
        for i, value in zip(at, found, strict=True):
            c[i] = value
        return c

    def observe(self, before: Losses, after: Losses) -> None:
        """FAMO learns from the losses of the same batch before and after the update."""
        if self.name != "famo":
            return
        at = [i for i, loss in enumerate(before) if loss is not None]
        floors = self.options.get("min_losses") or [0.0] * len(before)
        famo_observe(
            [before[i] - floors[i] for i in at], [after[i] - floors[i] for i in at], [self.memory[i] for i in at],
            self.options.get("lr", 0.025), self.options.get("gamma", 0.01),
        )  # fmt: skip


def softmax(x: list[float]) -> list[float]:
    e = [math.exp(v - max(x)) for v in x]
    return [v / sum(e) for v in e]


def adam(memory: dict[str, Any], gradient: float, lr: float) -> float:
    """Adam's step, to subtract: betas 0.9 and 0.999, no epsilon."""
    t = memory["t"] = memory.get("t", 0) + 1
    m = memory["m"] = 0.9 * memory.get("m", 0.0) + 0.1 * gradient
    v = memory["v"] = 0.999 * memory.get("v", 0.0) + 0.001 * gradient**2
    return lr * (m / (1 - 0.9**t)) / math.sqrt(v / (1 - 0.999**t)) if v > 0 else 0.0


def fixed(losses, memory, values):
    return list(values)


def uw(losses, memory, lr=0.025, initial=-0.5):
    """1705.07115: SUM exp(-s) l / 2 + s / 2."""
    c = []
    for loss, m in zip(losses, memory, strict=True):
        s = m.setdefault("s", initial)
        c.append(math.exp(-s) / 2)
        m["s"] -= adam(m, -math.exp(-s) * loss / 2 + 1 / 2, lr)
    return c


def dwa(losses, memory, temperature=2.0, epoch=25):
    """1803.10704: the ratio of the mean losses of the last two epochs."""
    ratios = []
    for loss, m in zip(losses, memory, strict=True):
        history = m.setdefault("history", [])
        means = [
            sum(part) / epoch for k in range(len(history) // epoch) if (part := history[k * epoch : (k + 1) * epoch])
        ]
        ratios.append(means[-1] / means[-2] if len(means) > 1 else 1.0)
        history.append(loss)
    return [len(losses) * w for w in softmax([r / temperature for r in ratios])]


def rlw(losses, memory, seed=0, draw=0):
    """2111.10603: softmax of normal numbers (Box and Muller, on the counter-based generator of `pcgrad`)."""
    z = []
    for i in range(len(losses)):
        state = 0
        for word in (seed, draw, 0, i):
            state = _mix(state ^ _wrap(word + GOLDEN))
        u, v = (((_mix(_wrap(state + n * GOLDEN)) >> 11) + 0.5) / 2**53 for n in (1, 2))
        z.append(math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v))
    return softmax(z)


def si(losses, memory):
    """SUM log l."""
    return [1 / loss for loss in losses]


def gls(losses, memory):
    """1904.08492: the geometric mean."""
    mean = math.prod(losses) ** (1 / len(losses))
    return [mean / (len(losses) * loss) for loss in losses]


def stch(losses, memory, mu=1.0, epoch=25, warmup=4):
    """2402.19078: smooth Tchebycheff in log l - log z, z the mean loss in the epoch after the warm-up."""
    c = [1 / loss for loss in losses]
    ready = [i for i, m in enumerate(memory) if len(m.setdefault("history", [])) >= (warmup + 1) * epoch]
    nadir = {i: sum(memory[i]["history"][warmup * epoch :][:epoch]) / epoch for i in ready}
    if ready:
        for i, w in zip(ready, softmax([math.log(losses[i] / nadir[i]) / mu for i in ready]), strict=True):
            c[i] = len(ready) * w / losses[i]
    for loss, m in zip(losses, memory, strict=True):
        m["history"].append(loss)
    return c


def imtl_l(losses, memory, lr=0.001):
    """IMTL, ICLR 2021: SUM exp(s) l - s."""
    c = []
    for loss, m in zip(losses, memory, strict=True):
        c.append(math.exp(m.setdefault("s", 0.0)))
        m["s"] -= adam(m, c[-1] * loss - 1, lr)
    return c


def famo(losses, memory, lr=0.025, gamma=0.01, min_losses=None):
    """2306.03792, Algorithm 1: weights z / (l - m), scaled to sum 1."""
    distance = [loss - m for loss, m in zip(losses, min_losses or [0.0] * len(losses), strict=True)]
    z = softmax([m.setdefault("xi", 0.0) for m in memory])
    scale = sum(z_i / d for z_i, d in zip(z, distance, strict=True))
    return [z_i / d / scale for z_i, d in zip(z, distance, strict=True)]


def famo_observe(before, after, memory, lr, gamma):
    z = softmax([m["xi"] for m in memory])
    delta = [math.log(b) - math.log(a) for b, a in zip(before, after, strict=True)]
    for i, m in enumerate(memory):  # the i-th row of the Jacobian of softmax, times delta
        row = sum((z[i] * (i == j) - z[i] * z[j]) * delta[j] for j in range(len(z)))
        m["xi"] -= adam(m, row + gamma * m["xi"], lr)


def gradnorm(losses, memory, norms, alpha=1.5, lr=0.025):
    """1711.02257, Algorithm 1."""
    k = len(losses)
    for loss, m in zip(losses, memory, strict=True):
        m.setdefault("first", loss)
        m.setdefault("w", 1.0)
    total = sum(m["w"] for m in memory)
    c = [k * m["w"] / total for m in memory]
    n = [w * norm for w, norm in zip(c, norms, strict=True)]
    rates = [loss / m["first"] for loss, m in zip(losses, memory, strict=True)]
    targets = [sum(n) / k * (rate / (sum(rates) / k)) ** alpha for rate in rates]
    for i, m in enumerate(memory):
        sign = (n[i] > targets[i]) - (n[i] < targets[i])
        m["w"] = max(c[i] - adam(m, norms[i] * sign, lr), 1e-6)
    total = sum(m["w"] for m in memory)
    for m in memory:
        m["w"] *= k / total
    return c


def go4align(losses, memory, eta=1e-4, groups=1):
    """2404.06486; the clustering by trying every cut of the sorted risks."""
    for loss, m in zip(losses, memory, strict=True):
        m["log_q"] = m.get("log_q", 0.0) - eta * loss
    q = softmax([m["log_q"] for m in memory])
    risks = [q_i * sum(losses) / loss for q_i, loss in zip(q, losses, strict=True)]
    order = sorted(range(len(losses)), key=lambda i: risks[i])
    best, c = math.inf, []
    for cuts in itertools.combinations(range(1, len(order)), min(groups, len(order)) - 1):
        parts = [order[a:b] for a, b in itertools.pairwise([0, *cuts, len(order)])]
        means = [sum(risks[i] for i in part) / len(part) for part in parts]
        spread = sum((risks[i] - mean) ** 2 for part, mean in zip(parts, means, strict=True) for i in part)
        if spread < best:
            best = spread
            c = [next(mean for part, mean in zip(parts, means, strict=True) if i in part) for i in range(len(order))]
    return c


def slaw(losses, memory, beta=0.99):
    """2109.08218: 1 / standard deviation, by moving averages of l and l^2; 1 at a task's first step."""
    deviations = []
    for loss, m in zip(losses, memory, strict=True):
        if "mean" not in m:
            m["mean"], m["square"] = loss, loss**2
            deviations.append(None)
            continue
        m["mean"] = beta * m["mean"] + (1 - beta) * loss
        m["square"] = beta * m["square"] + (1 - beta) * loss**2
        deviations.append(max(math.sqrt(max(m["square"] - m["mean"] ** 2, 0.0)), 1e-6 * abs(m["mean"])))
    known = [s for s in deviations if s]
    return [len(known) / s / sum(1 / t for t in known) if s else 1.0 for s in deviations]


def bmtl(losses, memory, temperature=50.0):
    """2002.04792: SUM exp(l / T), over its mean weight."""
    return [len(losses) * w for w in softmax([loss / temperature for loss in losses])]


def emtl(losses, memory, norms, strength=1.0):
    """2306.09373, as reconstructed in `flatmtl.EMTL`: the normal equations with a multiplier for SUM w = K."""
    import torch

    at = [i for i, norm in enumerate(norms) if norm > 0]
    r = torch.tensor([losses[i] / norms[i] for i in at], dtype=torch.float64)
    k = len(at)
    r = r / r.mean()
    centre = torch.eye(k, dtype=torch.float64) - 1 / k
    hessian = torch.eye(k, dtype=torch.float64) + strength / k * r[:, None] * centre * r
    system = torch.ones(k + 1, k + 1, dtype=torch.float64)
    system[:k, :k], system[k, k] = hessian, 0.0
    right = torch.ones(k + 1, dtype=torch.float64)
    right[k] = k
    solution = torch.linalg.solve(system, right)
    c = [1.0] * len(losses)
    for i, value in zip(at, solution[:k].tolist(), strict=True):
        c[i] = value
    return c


METHODS = {
    f.__name__: f
    for f in (fixed, uw, dwa, rlw, si, gls, stch, imtl_l, famo, gradnorm, go4align, slaw, bmtl, emtl)
}  # fmt: skip
