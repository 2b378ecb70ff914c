"""Loss terms of the multi-task literature that go with any aggregator."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["DummyGradientNorm"]

LossFunction = Callable[[Tensor, Tensor], Tensor]


class DummyGradientNorm(nn.Module):
    r"""DGR, dummy gradient norm regularization (2409.16651): features on which random heads have little left to learn.

    .. math::
        R_i = \frac{\lambda}{n} \sum_{j=1}^n \big\| \nabla_{\varphi_{ij}} L_i(\varphi_{ij}(z)) \big\|^2

    where z are the shared features and :math:`\varphi_{ij}` are n frozen, randomly initialised heads of task i. Add
    :math:`R_i` to the loss of task i; its gradient reaches the encoder that made z, and nothing else. Calling this costs
    n forwards and backwards of each head, and the backward through :math:`R_i` differentiates that backward (twice the
    heads' cost, no more passes through the encoder).

    Reconstructed: of the paper the abstract was read. Code that carries the method's name approximates the gradient of
    :math:`R_i` by a finite difference along :math:`\nabla_\varphi L`, adds it to the encoder's gradient behind the
    aggregator, and has :math:`\lambda = 0.1`, n = 1 as defaults; here the gradient is exact. To add it behind the aggregator,
    too::

        losses = optimizer.backward(closure)                       # .grad holds the aggregated update
        torch.stack(regularizer(model.trunk(x), y)).sum().backward()  # adds to it
        optimizer.step()

    That is then outside F-MTL's perturbed passes; as part of the losses it is inside.

    Args:
        heads: one module a task that maps features to outputs; the heads of your model will do. They are copied, and the
            copies initialised anew by the ``reset_parameters`` of their submodules.
        loss: the function (output, target) -> scalar, or one a task.
        weight: :math:`\lambda`, >= 0.
        dummies: n, heads a task, >= 1.
        seed: seed of the initialisation; torch's generators are then left alone. None draws from them.

    Raises:
        TypeError: a head is no module, or has parameters of its own but no ``reset_parameters``.
        ValueError: a number is out of range, or the counts of heads and losses differ.

    Example:
        >>> regularizer = DummyGradientNorm(model.heads, F.cross_entropy, weight=0.1)
        >>> def closure():
        ...     z = model.trunk(x)
        ...     losses = [F.cross_entropy(head(z), t) for head, t in zip(model.heads, y)]
        ...     return [loss + r for loss, r in zip(losses, regularizer(z, y))]
    """

    def __init__(
        self,
        heads: Sequence[nn.Module] | nn.ModuleList,
        loss: LossFunction | Sequence[LossFunction],
        *,
        weight: float = 0.1,
        dummies: int = 1,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if not (isinstance(weight, (int, float)) and 0.0 <= weight < float("inf")):
            raise ValueError(f"weight must be a finite number >= 0, but is {weight!r}")
        if not isinstance(dummies, int) or dummies < 1:
            raise ValueError(f"dummies must be an integer >= 1, but is {dummies!r}")
        if len(heads) == 0:
            raise ValueError("heads is empty: expected one a task")
        for i, head in enumerate(heads):
            _check_head(i, head)
        self.loss = [loss] * len(heads) if callable(loss) else list(loss)
        if len(self.loss) != len(heads):
            raise ValueError(f"loss has {len(self.loss)} functions, but there are {len(heads)} heads")
        self.weight = float(weight)
        copies = [nn.ModuleList(copy.deepcopy(head) for _ in range(dummies)) for head in heads]
        self.heads = nn.ModuleList(copies).requires_grad_(False)
        self.reset_parameters(seed)

    def reset_parameters(self, seed: int | None = None) -> None:
        """Draws the dummy heads anew."""
        devices = {p.device for p in self.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(list(devices), enabled=seed is not None), torch.no_grad():
            if seed is not None:
                torch.manual_seed(seed)
            for module in self.heads.modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()

    def forward(self, features: Tensor | Sequence[Tensor], targets: Sequence[Tensor | None]) -> list[Tensor]:
        """The terms :math:`R_i` to add to the losses.

        Args:
            features: what the heads read; a sequence of K if each task has features of its own.
            targets: K targets; None for a task that is absent from this batch.

        Returns:
            K scalars, 0 for an absent task. Without gradient mode, or if the features carry no graph, plain values.
        """
        tasks = len(self.heads)
        z = [features] * tasks if isinstance(features, Tensor) else list(features)
        for name, given in (("features", z), ("targets", targets)):
            if len(given) != tasks:
                raise ValueError(f"{name} has {len(given)} entries, but there are {tasks} heads")
        terms: list[Tensor] = []
        for i, (heads, loss, target) in enumerate(zip(self.heads, self.loss, targets, strict=True)):
            assert isinstance(heads, nn.ModuleList)
            if target is None:
                terms.append(z[i].new_zeros(()))
                continue
            norms = [_squared_gradient_norm(i, head, loss, z[i], target) for head in heads]
            terms.append(self.weight / len(norms) * torch.stack(norms).sum())
        return terms

    def extra_repr(self) -> str:
        return f"weight={self.weight}"


def _check_head(i: int, head: nn.Module) -> None:
    if not isinstance(head, nn.Module):
        raise TypeError(f"heads[{i}] must be a torch.nn.Module, but is {type(head).__name__}")
    if not any(True for _ in head.parameters()):
        raise ValueError(f"heads[{i}] has no parameters")
    for name, module in head.named_modules():
        own = list(module.parameters(recurse=False))
        if own and not callable(getattr(module, "reset_parameters", None)):
            where = f"heads[{i}]" + (f".{name}" if name else "")
            raise TypeError(
                f"{where} ({type(module).__name__}) has parameters but no reset_parameters() to draw them anew"
            )


def _squared_gradient_norm(i: int, head: nn.Module, loss: LossFunction, z: Tensor, target: Tensor) -> Tensor:
    """||d loss(head(z), target) / d head||^2, differentiable in z alone."""
    differentiable = torch.is_grad_enabled() and z.requires_grad
    if not differentiable:
        z = z.detach()
    # Leaves of this call alone: the frozen parameters stay without grad and are no one's to update.
    phi = {name: p.detach().requires_grad_() for name, p in head.named_parameters()}
    with torch.enable_grad():
        value = loss(torch.func.functional_call(head, phi, (z,)), target)
        if value.dim() != 0:
            raise ValueError(f"loss of task {i} must be a scalar, but has shape {tuple(value.shape)}")
        gradients = torch.autograd.grad(value, list(phi.values()), create_graph=differentiable, allow_unused=True)
        norm = torch.stack([g.square().sum() for g in gradients if g is not None]).sum()
    return norm if differentiable else norm.detach()
