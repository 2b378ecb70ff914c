"""A whole F-MTL training step as a `torch.export` program, to be compiled ahead of time and run without Python.

>>> program = flatmtl.export.training_step(losses, dict(model.named_parameters()), (x, y0, y1), momentum=0.9)
>>> torch._inductor.aoti_compile_and_package(program, package_path="step.pt2")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ._ops import COMBINE, FAMILY_SCALE
from .aggregators import Aggregator, PCGrad, get_aggregator

Losses = Callable[..., Sequence[Tensor]]
Row = Sequence[Tensor | None]


def training_step(
    losses: Losses,
    params: Mapping[str, Tensor],
    batch: Sequence[Tensor],
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    shared: Iterable[str] | None = None,
    aggregator: str | Aggregator = "cagrad",
    rho: float | tuple[float, float] = 0.05,
    adaptive: bool = False,
    eta: float = 0.0,
    norm: str = "separate",
    combine: str = "decomposed",
    family_scale: str | None = "rms",
) -> torch.export.ExportedProgram:
    """Captures one step: K task gradients, the perturbed passes, aggregation, and the update of SGD with momentum.

    The program is called as `program.module()(params, momentum_buffers, lr, *batch)` and returns the losses at the
    unperturbed point, (K,). `params` and `momentum_buffers` are lists of tensors in the order of `params` here (of zeros
    before the first step; an empty list if `momentum` is 0); both are updated in place. `lr` is a 0-d tensor. From C++
    the same tensors are passed one after another. It calls `torch.ops.flatmtl`: flatmtl's shared object has to be loaded.

    If a gradient of shared parameters is not finite the call fails and nothing is updated.

    Args:
        losses: `losses(params, *batch)` computes the K scalar losses with the parameters it is given (a dict;
            `torch.func.functional_call` runs a module with them). It must be a pure function: dropout is frozen as it is
            traced, and running statistics of BatchNorm would be constants. It is traced on fake tensors.
        params: the parameters, by name: on the CPU, all of one float dtype. Only shapes and dtypes are used.
        batch: one batch, for shapes and dtypes. The program takes batches of these shapes only.
        momentum, weight_decay: as `torch.optim.SGD`.
        shared: names of the shared parameters; None: those that two or more losses reach.
        aggregator, rho, adaptive, eta, norm, combine, family_scale: as `flatmtl.FlatMTL`. PCGrad is refused: its draws
            depend on the number of the step.

    Raises:
        ValueError, TypeError: an argument is wrong; or a parameter that no loss reaches (leave it out).
    """
    step = _Step(
        losses, params, momentum, weight_decay, shared, get_aggregator(aggregator), rho, adaptive, eta, norm, combine,
        family_scale,
    )  # fmt: skip
    values = [p.detach() for p in params.values()]
    buffers = [torch.zeros_like(p) for p in values] if momentum else []
    arguments = (values, buffers, torch.zeros((), dtype=torch.float64), *batch)
    graph = make_fx(step, tracing_mode="fake")(*arguments)
    return torch.export.export(_Module(graph), arguments)


class _Module(nn.Module):
    def __init__(self, graph: torch.fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, params: list[Tensor], momentum_buffers: list[Tensor], lr: Tensor, *batch: Tensor) -> Tensor:
        result: Tensor = self.graph(params, momentum_buffers, lr, *batch)
        return result


class _Step:
    """The step in operations that can be captured: no numbers are taken out of tensors."""

    def __init__(
        self, losses: Losses, params: Mapping[str, Tensor], momentum: float, weight_decay: float,
        shared: Iterable[str] | None, aggregator: Aggregator, rho: float | tuple[float, float], adaptive: bool,
        eta: float, norm: str, combine: str, family_scale: str | None,
    ) -> None:  # fmt: skip
        self.losses, self.names = losses, list(params)
        first = next(iter(params.values()), None)
        if first is None:
            raise ValueError("flatmtl.export: params is empty")
        for name, p in params.items():
            if p.device.type != "cpu" or p.dtype != first.dtype or not p.is_floating_point():
                raise ValueError(
                    f"flatmtl.export: params[{name!r}] is {p.dtype} on {p.device}; all must be on the CPU and of one "
                    f"float dtype ({self.names[0]!r} is {first.dtype})"
                )
        torch.optim.SGD([torch.zeros(1)], 0.0, momentum, weight_decay=weight_decay)  # checks the values
        self.momentum, self.weight_decay = momentum, weight_decay
        self.declared = None if shared is None else set(shared)
        if self.declared is not None and (unknown := self.declared - set(self.names)):
            raise ValueError(f"flatmtl.export: shared names {sorted(unknown)}, which are not in params")
        if isinstance(aggregator, PCGrad):
            raise ValueError("flatmtl.export: PCGrad draws anew in every step, which a captured step cannot")
        self.aggregator = aggregator
        # Checks the other options, in the words of the optimizer.
        from .optimizer import FlatMTL

        FlatMTL(
            torch.optim.SGD([torch.zeros(1)], 0.0), aggregator=aggregator, rho=rho, adaptive=adaptive, eta=eta, norm=norm,
            combine=combine, family_scale=family_scale,
        )  # fmt: skip
        self.rho_shared, self.rho_task = rho if isinstance(rho, (tuple, list)) else (rho, rho)
        self.adaptive, self.eta, self.joint = adaptive, eta, norm == "joint"
        self.combine, self.family_scale = COMBINE[combine], FAMILY_SCALE[family_scale]

    def __call__(self, params: list[Tensor], buffers: list[Tensor], lr: Tensor, *batch: Tensor) -> Tensor:
        leaves = [p.detach().requires_grad_() for p in params]
        losses = self._losses(leaves, batch)
        rows: list[Row] = [
            torch.autograd.grad(loss, leaves, retain_graph=i + 1 < len(losses), allow_unused=True)
            for i, loss in enumerate(losses)
        ]
        reached = [sum(row[i] is not None for row in rows) for i in range(len(params))]
        for name, count in zip(self.names, reached, strict=True):
            if count == 0:
                raise ValueError(f"flatmtl.export: no loss reaches the parameter {name!r}; leave it out of params")
        shared = [
            i for i, name in enumerate(self.names)
            if (reached[i] > 1 if self.declared is None else name in self.declared)
        ]  # fmt: skip
        own = [[i for i in range(len(params)) if i not in shared and row[i] is not None] for row in rows]
        flat = self.rho_shared != 0.0 or self.rho_task != 0.0
        perturbed: list[Row] = rows
        if flat:
            perturbed = [self._perturbed(k, params, rows[k], shared, own[k], batch) for k in range(len(losses))]
        update: list[Tensor | None] = [None] * len(params)
        if shared:
            combined = self._combined(params, rows, perturbed, shared, flat)
            for i, combination in zip(shared, combined, strict=True):
                update[i] = combination
        for row, indices in zip(perturbed, own, strict=True):
            for i in indices:
                part, total = row[i], update[i]
                assert part is not None
                update[i] = part if total is None else total + part
        with torch.no_grad():
            # p - lr u, and not add_(u, alpha=-lr): Inductor of torch 2.13 drops alpha where u is a matrix product.
            for i, p in enumerate(params):
                u = update[i]
                assert u is not None
                if self.weight_decay:
                    u = u + p * self.weight_decay
                if self.momentum:
                    u = buffers[i].mul_(self.momentum).add_(u)
                p.sub_(u * lr)
        return torch.stack([loss.detach() for loss in losses])

    def _losses(self, values: list[Tensor], batch: Sequence[Tensor]) -> list[Tensor]:
        losses = list(self.losses(dict(zip(self.names, values, strict=True)), *batch))
        if not losses or any(not isinstance(loss, Tensor) or loss.dim() != 0 for loss in losses):
            raise TypeError("flatmtl.export: losses must return a sequence of scalar tensors, one a task")
        return losses

    def _perturbed(
        self, task: int, params: list[Tensor], row: Row, shared: list[int], own: list[int], batch: Sequence[Tensor]
    ) -> Row:
        """The gradient of one loss at its perturbed point."""
        squares = [self._sq_norm(params, row, indices) for indices in (shared, own)]
        if self.joint:
            squares = [squares[0] + squares[1]] * 2
        moved = [p.detach() for p in params]
        for indices, square, rho in zip((shared, own), squares, (self.rho_shared, self.rho_task), strict=True):
            scale = torch.where(square > 0, rho / square.sqrt(), 0.0)
            for i in indices:
                if (grad := row[i]) is not None:
                    p, direction = params[i].detach().double(), grad.double()
                    if self.adaptive:
                        direction = (p.abs() + self.eta).square() * direction
                    moved[i] = (p + scale * direction).to(params[i].dtype)
        leaves = [p.detach().requires_grad_() for p in moved]
        return torch.autograd.grad(self._losses(leaves, batch)[task], leaves, allow_unused=True)

    def _sq_norm(self, params: list[Tensor], row: Row, indices: list[int]) -> Tensor:
        pairs = [(g, params[i].detach()) for i in indices if (g := row[i]) is not None]
        if not pairs:
            return torch.zeros((), dtype=torch.float64)
        grads = [g.contiguous() for g, _ in pairs]
        if self.adaptive:
            return torch.ops.flatmtl.sq_norms(grads, 1, [p.contiguous() for _, p in pairs], self.eta)[0]
        # Not sq_norms: AOTInductor of torch 2.13 cannot hand over an empty list of tensors.
        return torch.ops.flatmtl.gramian(grads, 1)[0, 0]

    def _combined(
        self, params: list[Tensor], rows: list[Row], perturbed: list[Row], shared: list[int], flat: bool
    ) -> list[Tensor]:
        def matrix(of: list[Row]) -> list[Tensor]:
            return [
                torch.zeros_like(params[i]) if (g := row[i]) is None else g.contiguous() for row in of for i in shared
            ]

        ops, count = torch.ops.flatmtl, len(rows)
        loss_rows, perturbed_rows = matrix(rows), matrix(perturbed)
        options = self.aggregator.option_values(count)
        cross = self.combine in (COMBINE["second"], COMBINE["each"])
        pair = ops.gramian_pair(loss_rows, perturbed_rows, count, cross=cross)
        direct = ops.gramian(perturbed_rows, count) if self.combine == COMBINE["direct"] else None
        combine = self.combine if flat else COMBINE["decomposed"]
        a, b, _ = ops.step_weights(pair, direct, self.aggregator.number, options, combine, self.family_scale)
        result: Any = ops.combine_pair(loss_rows, perturbed_rows, count, a, b)
        return list(result)
