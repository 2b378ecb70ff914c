"""The F-MTL step (arXiv 2211.13723, Algorithm 1) in plain PyTorch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .aggregators import weights
from .weightings import Weighting

Rows = Tensor | Sequence[Sequence[Tensor]]  # K x P, or K sequences of tensors
Solver = Callable[[Tensor], Tensor]  # weights from a Gramian
CHUNK = 65536  # elements of a row that are widened to f64 at a time: no large temporaries


def gramian(rows: Rows) -> Tensor:
    """G_ij = <g_i, g_j> of K rows, (K, K) f64 on the CPU, with products and sums in f64."""
    rows = [[row] for row in rows] if isinstance(rows, Tensor) else rows
    device = rows[0][0].device if len(rows[0]) else "cpu"
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=device)
    for tensors in zip(*rows, strict=True):
        for chunks in zip(*(t.detach().reshape(-1).split(CHUNK) for t in tensors), strict=True):
            block = torch.stack(chunks).double()
            total.addmm_(block, block.T)
    return total.cpu()


def combine(rows: Sequence[Sequence[Tensor]], weights: Tensor) -> list[Tensor]:
    """SUM_i w_i g_i, in the form of one row."""
    numbers = weights.tolist()
    total = list(torch._foreach_mul(list(rows[0]), numbers[0])) if len(rows[0]) else []
    for row, number in zip(rows[1:], numbers[1:], strict=True):
        if total:
            torch._foreach_add_(total, list(row), alpha=number)
    return total


@torch.no_grad()
def aggregate(rows: Rows, name: str, **options: Any) -> Tensor | list[Tensor]:
    """A(g_1 .. g_K) = SUM_i w_i(G) g_i: a P-vector of a K x P tensor, else a list of tensors like one row."""
    w = weights(gramian(rows), name, **options)
    return combine([[row] for row in rows], w)[0] if isinstance(rows, Tensor) else combine(rows, w)


# ---------------------------------------------------------------------------------------------------------------------
# The aggregator as the step calls it


class _Calls:
    """A = w(G), with the family scale; counts its calls within a step for the methods that draw at random, and keeps
    the state of each call for those that learn."""

    def __init__(
        self, aggregator: str | Solver, family_scale: str | None, draw: int, options: dict[str, Any],
        states: dict[int, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.aggregator, self.family_scale, self.draw, self.options = aggregator, family_scale, draw, options
        self.call, self.states = 0, {} if states is None else states

    def __call__(self, gramian: Tensor, pair: bool = False) -> Tensor:
        """w(G); `pair` marks a call with two rows that are not tasks, where fixed weights mean their sum."""
        if self.family_scale == "rms" and gramian.trace() > 0:  # w(G / s^2), s^2 = tr G / K: A(f) = s A(f / s)
            gramian = gramian / (gramian.trace() / len(gramian))
        call, self.call = self.call, self.call + 1
        if not isinstance(self.aggregator, str):
            return self.aggregator(gramian)
        if pair and self.aggregator == "fixed":
            return torch.ones(2, dtype=torch.float64)
        options = {k: v for k, v in self.options.items() if not (pair and k == "preference")}  # one number a task
        state = (
            self.states.setdefault(call, torch.zeros_like(gramian, device="cpu"))
            if self.aggregator == "gradvac"
            else None
        )
        return weights(gramian, self.aggregator, draw=self.draw, call=call, state=state, **options)


def step_weights(
    gramian_pair: Tensor,
    perturbed_gramian: Tensor | None,
    name: str,
    *,
    combine: str = "decomposed",
    family_scale: str | None = "rms",
    draw: int = 0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Weights (a, b) of the update SUM_i a_i g_i + b_i f_i, from Gramians alone.

    Args:
        gramian_pair: (2K, 2K), the Gramian of g_1 .. g_K, f_1 .. f_K.
        perturbed_gramian: (K, K), the Gramian of s_i = g_i + f_i; used by "direct" alone.
    """
    calls = _Calls(name, family_scale, draw, options)
    k = len(gramian_pair) // 2
    loss, cross, flat = gramian_pair[:k, :k], gramian_pair[:k, k:], gramian_pair[k:, k:]
    if combine == "direct":
        assert perturbed_gramian is not None, "direct needs the Gramian of s"
        a = calls(perturbed_gramian)
        return a, a.clone()
    if combine == "each":
        pairs = [calls(gramian_pair[[i, k + i]][:, [i, k + i]], pair=True) for i in range(k)]
        u, v = torch.stack(pairs).T
        mixed = torch.outer(u, v) * cross
        z = calls(torch.outer(u, u) * loss + mixed + mixed.T + torch.outer(v, v) * flat)
        return z * u, z * v
    a, b = calls(loss), calls(flat)
    if combine == "second":
        both = torch.stack([a @ loss @ a, a @ cross @ b, a @ cross @ b, b @ flat @ b]).reshape(2, 2)
        w = calls(both, pair=True)
        return w[0] * a, w[1] * b
    return a, b


# ---------------------------------------------------------------------------------------------------------------------


class FlatMTL:
    """F-MTL around a torch optimizer; see :class:`flatmtl.FlatMTL` for the arguments.

    For every task i with loss l_i, theta the parameters that two or more losses reach, psi_i those that only l_i does:

        (g_i, h_i) = grad l_i(theta, psi_i)
        (s_i, t_i) = grad l_i(theta + rho g_i / ||g_i||, psi_i + rho h_i / ||h_i||),    f_i = s_i - g_i

    and the optimizer gets A(g_1 .. g_K) + A(f_1 .. f_K) as the gradient of theta and t_i as that of psi_i. The variants
    (section 4.3): "direct" A(s), "second" A(A(g), A(f)), "each" A(r_1 .. r_K) with r_i = A(g_i, f_i).

    BatchNorm's running statistics are put back after a perturbed pass, and the random numbers of the unperturbed pass
    are drawn again in it. Left out: closures per task, radii per param group, checkpoints of the roles and of the
    number of the step, recovery of the random state and of BatchNorm after an exception (parameters are put back).

    Args:
        aggregator: a name, or a function from a (K, K) Gramian to K weights.
        options: of the aggregator, for example {"c": 0.2}.
        weighting: a :class:`Weighting`; the step is then that of the losses c_i l_i with c held constant.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        aggregator: str | Solver = "cagrad",
        options: dict[str, Any] | None = None,
        weighting: Weighting | None = None,
        rho: float | tuple[float, float] = 0.05,
        adaptive: bool = False,
        eta: float = 0.0,
        norm: str = "separate",
        combine: str = "decomposed",
        family_scale: str | None = "rms",
        shared: Iterable[Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        for value, choices in (
            (norm, ("separate", "joint")),
            (combine, ("decomposed", "direct", "second", "each")),
            (family_scale, ("rms", None)),
        ):
            if value not in choices:
                raise ValueError(f"{value!r} is none of {choices}")
        self.optimizer = optimizer
        self.aggregator, self.options = aggregator, dict(options or {})
        if aggregator in ("pcgrad", "gradvac"):
            self.options.setdefault("seed", seed)
        self.weighting = weighting
        self.rho_shared, self.rho_task = rho if isinstance(rho, tuple) else (rho, rho)
        self.adaptive, self.eta, self.norm = adaptive, eta, norm
        self.combine, self.family_scale = combine, family_scale
        self.declared = None if shared is None else set(shared)
        self.shared: set[Tensor] = self.declared or set()
        self.steps = 0
        self.states: dict[int, Tensor] = {}  # of the aggregator, by the number of its call in a step

    def step(self, closure: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """`backward(closure)`, then the wrapped optimizer's step. Returns the losses at the unperturbed point."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        random = _random_state(params)
        losses = self.backward(closure)
        self.optimizer.step()
        if self.weighting is not None and self.weighting.name == "famo":
            after = _random_state(params)
            _set_random_state(random)
            with _batch_norm_kept(), torch.no_grad():
                self.weighting.observe([float(loss) for loss in losses], [float(loss) for loss in closure()])
            _set_random_state(after)
        return losses

    def backward(self, closure: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """Writes the update to `.grad` of every parameter that a loss reaches, None to that of the others."""
        params = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        random = _random_state(params)
        with torch.enable_grad():
            losses = list(closure())
            after = _random_state(params)
            reached = []  # per task: {parameter: gradient}
            for i, loss in enumerate(losses):
                grads = torch.autograd.grad(loss, params, retain_graph=i + 1 < len(losses), allow_unused=True)
                reached.append({p: g for p, g in zip(params, grads, strict=True) if g is not None})
        losses = [loss.detach() for loss in losses]  # frees the graph

        if self.declared is None:
            self.shared |= {p for p in params if sum(p in grads for grads in reached) > 1}
        theta = [p for p in params if p in self.shared and any(p in grads for grads in reached)]
        own = [[p for p in grads if p not in self.shared] for grads in reached]
        g = [[grads[p] if p in grads else torch.zeros_like(p) for p in theta] for grads in reached]
        h = [[grads[p] for p in psi] for grads, psi in zip(reached, own, strict=True)]
        del reached
        c = [1.0] * len(losses)
        if self.weighting is not None:
            norms = gramian(g).diagonal().sqrt().tolist()
            c = self.weighting([float(loss) for loss in losses], norms, draw=self.steps)
        calls = _Calls(self.aggregator, self.family_scale, self.steps, self.options, self.states)
        self.steps += 1
        if self.rho_shared == self.rho_task == 0:
            g, own_updates = _times(c, g), _times(c, h)
            update = combine(g, calls(gramian(g)))
        else:
            s, own_updates = [], []
            for i, psi in enumerate(own):
                _set_random_state(random)
                with self._perturbed(theta, g[i], psi, h[i]), _batch_norm_kept(), torch.enable_grad():
                    found = torch.autograd.grad(closure()[i], theta + psi, allow_unused=True)
                grads = [torch.zeros_like(p) if d is None else d for p, d in zip(theta + psi, found, strict=True)]
                s.append(grads[: len(theta)])
                own_updates.append(grads[len(theta) :])
            _set_random_state(after)
            g, s, own_updates = _times(c, g), _times(c, s), _times(c, own_updates)
            update = self._combine(g, s, calls) if theta else []

        for p in params:
            p.grad = None
        for p, u in zip(theta, update, strict=True):
            p.grad = u
        for psi, t in zip(own, own_updates, strict=True):
            for p, u in zip(psi, t, strict=True):
                p.grad = u if p.grad is None else p.grad + u
        return losses

    @contextmanager
    def _perturbed(self, theta: list[Tensor], g: list[Tensor], psi: list[Tensor], h: list[Tensor]) -> Iterator[None]:
        """theta + eps, psi + eps: eps = rho g / ||g||; adaptive (ASAM): rho T^2 g / ||T g||, T = |theta| + eta."""
        saved = [p.detach().clone() for p in theta + psi]
        directions = [d.clone() for d in g + h]
        sizes = [s.abs().add_(self.eta) for s in saved] if self.adaptive else []
        if sizes:
            torch._foreach_mul_(directions, sizes)
        square = [d.double().square().sum() for d in directions]  # of T g, per tensor
        shared, task = (float(sum(part)) ** 0.5 for part in (square[: len(theta)], square[len(theta) :]))
        if self.norm == "joint":
            shared = task = (shared**2 + task**2) ** 0.5
        if sizes:
            torch._foreach_mul_(directions, sizes)
        scale = [self.rho_shared / shared if shared > 0 else 0.0] * len(theta)
        scale += [self.rho_task / task if task > 0 else 0.0] * len(psi)
        with torch.no_grad():
            torch._foreach_mul_(directions, scale)
            torch._foreach_add_(theta + psi, directions)
        del directions, sizes
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(theta + psi, saved)

    @torch.no_grad()
    def _combine(self, g: list[list[Tensor]], s: list[list[Tensor]], calls: _Calls) -> list[Tensor]:
        if self.combine == "direct":
            return combine(s, calls(gramian(s)))
        for s_i, g_i in zip(s, g, strict=True):
            torch._foreach_sub_(s_i, g_i)
        f = s
        if self.combine == "each":
            r = [combine(pair, calls(gramian(pair), pair=True)) for pair in zip(g, f, strict=True)]
            return combine(r, calls(gramian(r)))
        pair = [combine(g, calls(gramian(g))), combine(f, calls(gramian(f)))]
        both = calls(gramian(pair), pair=True) if self.combine == "second" else torch.ones(2)
        return combine(pair, both)


def _times(c: Sequence[float], rows: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[c_i * x for x in row] for c_i, row in zip(c, rows, strict=True)]


@contextmanager
def _batch_norm_kept() -> Iterator[None]:
    """Puts back the running statistics of every BatchNorm that runs inside."""
    saved: dict[torch.nn.Module, list[Tensor]] = {}

    def save(module: torch.nn.Module, _: object) -> None:
        if isinstance(module, torch.nn.modules.batchnorm._NormBase) and module not in saved:
            saved[module] = [b.clone() for b in module.buffers(recurse=False)]

    hook = torch.nn.modules.module.register_module_forward_pre_hook(save)
    try:
        yield
    finally:
        hook.remove()
        for module, values in saved.items():
            for b, value in zip(module.buffers(recurse=False), values, strict=True):
                b.copy_(value)


def _random_state(params: list[Tensor]) -> list[tuple[torch.device | None, Tensor]]:
    """States of the CPU's generator and of those of the parameters' CUDA devices."""
    devices = {p.device for p in params if p.device.type == "cuda"}
    return [(None, torch.get_rng_state())] + [(d, torch.cuda.get_rng_state(d)) for d in devices]


def _set_random_state(states: list[tuple[torch.device | None, Tensor]]) -> None:
    for device, state in states:
        torch.set_rng_state(state) if device is None else torch.cuda.set_rng_state(state, device)
