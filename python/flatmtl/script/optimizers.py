"""`SGD` and `Adam` with the F-MTL step, as modules for `torch.jit.script`.

The updates are torch's, operation by operation. Its own functions cannot be used: `torch.optim.sgd.sgd` can be scripted
and saved, but not loaded (torch 2.13).
"""

# No `from __future__ import annotations`: TorchScript reads the annotations.

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..aggregators import Aggregator
from .step import Step


class SGD(Step):
    r"""F-MTL with the update of `torch.optim.SGD`, as a module for `torch.jit.script`.

    Part of a module that also holds the model, it is scripted, saved and loaded with it: `params` then are the model's
    parameters there too (TorchScript keeps tensors that are one and the same so), and the loaded module trains on
    exactly where the saved one stood, in Python or in C++ without it. `lr` and the other numbers are attributes that can
    be set, in C++ by `setattr`.

    One step is: task gradients; for every task `perturb` and the task's gradient there; `step`.

    Example:
        >>> class Trainer(nn.Module):
        ...     def __init__(self, model):
        ...         super().__init__()
        ...         self.model = model
        ...         self.optimizer = flatmtl.script.SGD(model.parameters(), [model.trunk], lr=0.1)
        ...
        ...     def forward(self, x: Tensor, y: list[Tensor]) -> list[Tensor]:
        ...         return [F.cross_entropy(out, t) for out, t in zip(self.model(x), y)]
        ...
        ...     @torch.jit.export
        ...     def train_step(self, x: Tensor, y: list[Tensor]) -> list[Tensor]:
        ...         losses = self.forward(x, y)
        ...         grads = self.optimizer.gradients(losses)
        ...         perturbed: list[list[Tensor | None]] = []
        ...         for task in range(len(losses)):
        ...             self.optimizer.perturb(grads, task)
        ...             perturbed.append(self.optimizer.gradients([self.forward(x, y)[task]])[0])
        ...         self.optimizer.step(grads, perturbed)
        ...         return [loss.detach() for loss in losses]

    Args:
        params: the model's parameters: on the CPU, all of one dtype.
        shared: those that are shared, as parameters or modules. Every other is own: it gets the sum of the t_i. Has to
            be said here: a gradient in TorchScript is zeros where a loss does not reach, so that it cannot be found.
        lr, momentum, dampening, weight_decay, nesterov: as `torch.optim.SGD`.
        aggregator, rho, adaptive, eta, norm, combine, family_scale, seed: as `flatmtl.FlatMTL`.
        buffers: tensors that perturbed passes must not change, `model.buffers()`: BatchNorm's running statistics. They
            are kept by the first `perturb` of a step and put back by `step`.

    Dropout is not replayed: TorchScript cannot set the state of the generator. Random layers draw anew in every pass.
    """

    buffers_: list[Tensor]
    options: list[float]
    shared: list[int]
    own: list[int]
    saved: list[Tensor]
    saved_buffers: list[Tensor]
    momentum_buffer: Tensor

    def __init__(
        self,
        params: Iterable[Tensor],
        shared: Iterable[Tensor | nn.Module],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        aggregator: str | Aggregator = "cagrad",
        rho: float | tuple[float, float] = 0.05,
        adaptive: bool = False,
        eta: float = 0.0,
        norm: str = "separate",
        combine: str = "decomposed",
        family_scale: str | None = "rms",
        buffers: Iterable[Tensor] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(params, shared, aggregator, rho, adaptive, eta, norm, combine, family_scale, buffers, seed)
        torch.optim.SGD([torch.zeros(1)], lr, momentum, dampening, weight_decay, nesterov)  # checks the values
        self.lr, self.momentum, self.dampening = float(lr), float(momentum), float(dampening)
        self.weight_decay, self.nesterov = float(weight_decay), bool(nesterov)
        self.register_buffer("momentum_buffer", _state(self.params))

    def _update(self, indices: list[int], update: list[Tensor]) -> None:
        views = _views(self.momentum_buffer, self.params)
        for k, i in enumerate(indices):
            p, d = self.params[i], update[k]
            if self.weight_decay != 0.0:
                d = d.add(p, alpha=self.weight_decay)
            if self.momentum != 0.0:
                if self.updates[i] == 0:
                    views[i].copy_(d)
                else:
                    views[i].mul_(self.momentum).add_(d, alpha=1.0 - self.dampening)
                d = d.add(views[i], alpha=self.momentum) if self.nesterov else views[i]
            p.add_(d, alpha=-self.lr)


class Adam(Step):
    """F-MTL with the update of `torch.optim.Adam`, or of AdamW, as a module for `torch.jit.script`; see `SGD`.

    Args:
        lr, betas, eps, weight_decay: as `torch.optim.Adam`.
        decoupled_weight_decay: weight decay as in AdamW.
        params, shared, aggregator, rho, adaptive, eta, norm, combine, family_scale, buffers, seed: as `SGD`.
    """

    buffers_: list[Tensor]
    options: list[float]
    shared: list[int]
    own: list[int]
    saved: list[Tensor]
    saved_buffers: list[Tensor]
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def __init__(
        self,
        params: Iterable[Tensor],
        shared: Iterable[Tensor | nn.Module],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        aggregator: str | Aggregator = "cagrad",
        rho: float | tuple[float, float] = 0.05,
        adaptive: bool = False,
        eta: float = 0.0,
        norm: str = "separate",
        combine: str = "decomposed",
        family_scale: str | None = "rms",
        buffers: Iterable[Tensor] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(params, shared, aggregator, rho, adaptive, eta, norm, combine, family_scale, buffers, seed)
        torch.optim.Adam([torch.zeros(1)], lr, betas, eps, weight_decay)  # checks the values
        self.lr, self.eps, self.weight_decay = float(lr), float(eps), float(weight_decay)
        self.beta1, self.beta2 = float(betas[0]), float(betas[1])
        self.decoupled_weight_decay = bool(decoupled_weight_decay)
        self.register_buffer("exp_avg", _state(self.params))
        self.register_buffer("exp_avg_sq", _state(self.params))

    def _update(self, indices: list[int], update: list[Tensor]) -> None:
        first, second = _views(self.exp_avg, self.params), _views(self.exp_avg_sq, self.params)
        for k, i in enumerate(indices):
            p, d = self.params[i], update[k]
            if self.decoupled_weight_decay:
                p.mul_(1.0 - self.lr * self.weight_decay)
            elif self.weight_decay != 0.0:
                d = d.add(p, alpha=self.weight_decay)
            first[i].lerp_(d, 1.0 - self.beta1)
            second[i].mul_(self.beta2).addcmul_(d, d, value=1.0 - self.beta2)
            count = float(self.updates[i].item()) + 1.0
            denominator = (second[i].sqrt() / (1.0 - self.beta2**count) ** 0.5).add_(self.eps)
            p.addcdiv_(first[i], denominator, value=-self.lr / (1.0 - self.beta1**count))


def _state(params: list[Tensor]) -> Tensor:
    """Zeros for every element of the parameters, one after another."""
    return torch.zeros(sum(p.numel() for p in params), dtype=params[0].dtype)


def _views(state: Tensor, params: list[Tensor]) -> list[Tensor]:
    """A vector as tensors of the parameters' shapes."""
    views: list[Tensor] = []
    begin = 0
    for p in params:
        views.append(state[begin : begin + p.numel()].view(p.shape))
        begin += p.numel()
    return views
