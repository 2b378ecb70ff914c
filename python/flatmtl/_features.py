"""Features: the tensors that the heads read, as outputs of modules; gradients that stop there, and the trunk's after.

With z_i = d l_i / d Z the rows that an aggregator sees are the z_i. One backward from Z with SUM_i w_i z_i then gives
the trunk's gradient SUM_i w_i g_i, so that the K backwards pay for the heads alone (MGDA-UB, 1810.04650, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from . import _backend, _losses
from ._losses import Loss

if TYPE_CHECKING:
    from ._point import Point
    from ._task import TaskState


def read_modules(features: nn.Module | Iterable[nn.Module] | None) -> list[nn.Module] | None:
    if features is None:
        return None
    modules = [features] if isinstance(features, nn.Module) else list(features)
    for i, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"features[{i}] must be a module, whose output the heads read, but is {type(module).__name__}"
            )
    if not modules:
        raise ValueError("features is empty: expected the modules whose outputs the heads read")
    return modules


class Features:
    """Catches the outputs of the modules in one forward; adds `shift` to them if it is set."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = list(modules)
        self.shift: list[Tensor] | None = None
        self.outputs: list[Tensor | None] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.outputs = [None] * len(self.modules)
        handles = [m.register_forward_hook(self._hook(i)) for i, m in enumerate(self.modules)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, i: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            name = f"features[{i}] ({type(module).__name__})"
            if not isinstance(output, Tensor):
                raise TypeError(f"the output of {name} must be a tensor, but is {type(output).__name__}")
            if self.outputs[i] is not None:
                raise RuntimeError(f"{name} was called twice in one call of the closure")
            if self.shift is not None:
                output = output + self.shift[i]
            self.outputs[i] = output
            return output

        return hook

    def take(self) -> list[Tensor]:
        """The outputs of the forward that has just been made."""
        for i, output in enumerate(self.outputs):
            name = f"features[{i}] ({type(self.modules[i]).__name__})"
            if output is None:
                raise RuntimeError(f"{name} was not called by the closure")
            if not output.requires_grad:
                raise RuntimeError(f"the output of {name} has no graph: it depends on no parameter that requires grad")
        outputs, self.outputs = self.outputs, []
        return [output for output in outputs if output is not None]


class FeatureGradients:
    """Gradients of one forward that stop at the features, with the graph kept for the trunk's backward."""

    def __init__(self, features: list[Tensor], point: Point, loss_scale: float) -> None:
        self.features, self.point, self.loss_scale = features, point, loss_scale
        self.nodes = [z.grad_fn for z in features]
        below = set[Tensor]().union(*(_losses.leaves(get_gradient_edge(z)) for z in features))
        self.trunk = [i for i, t in enumerate(point.tensors) if t in below]
        self.rows: dict[int, list[Tensor]] = {}  # z_i by the task's index

    def differentiate(self, loss: Loss, state: TaskState) -> list[Tensor | None]:
        """z_i, and the gradients of the parameters above the features, one entry a parameter."""
        assert loss.edge is not None
        found = _losses.leaves(loss.edge, stop=self.nodes)
        above = [i for i, t in enumerate(self.point.tensors) if t in found]
        for i in above:
            if i in self.trunk:
                raise RuntimeError(
                    f"the loss of task {state.task!r} reaches parameter {self.point.params[i].name} both through the "
                    "features and beside them"
                )
        inputs = [*self.features, *(self.point.tensors[i] for i in above)]
        grads = _losses.gradients([loss], inputs, self.loss_scale, retain_graph=True)
        count = len(self.features)
        self.rows[state.index] = [
            torch.zeros_like(z) if g is None else g for z, g in zip(self.features, grads[:count], strict=True)
        ]
        out: list[Tensor | None] = [None] * len(self.point.tensors)
        for i, g in zip(above, grads[count:], strict=True):
            out[i] = None if g is None else self.point.fitted(i, g)
        through = any(g is not None for g in grads[:count])
        state.reached = sorted({i for i in above if out[i] is not None} | ({*self.trunk} if through else set()))
        return out

    def differentiate_all(self, loss: Loss, state: TaskState, retain_graph: bool) -> list[Tensor | None]:
        """z_i, and the gradients of all parameters."""
        inputs = [*self.features, *self.point.tensors]
        grads = _losses.gradients([loss], inputs, self.loss_scale, retain_graph)
        count = len(self.features)
        self.rows[state.index] = [
            torch.zeros_like(z) if g is None else g for z, g in zip(self.features, grads[:count], strict=True)
        ]
        out = [None if g is None else self.point.fitted(i, g) for i, g in enumerate(grads[count:])]
        state.reached = [i for i, g in enumerate(out) if g is not None]
        return out

    def gramian(self, indices: Sequence[int]) -> Tensor:
        """<z_i, z_j> of these tasks, (K, K) float64."""
        total = torch.zeros(len(indices), len(indices), dtype=torch.float64)
        for k, z in enumerate(self.features):
            total += _backend.choose(z, torch.empty_like(z)).gramian([[self.rows[i][k]] for i in indices])
        return total

    def spectra(self, indices: Sequence[int], splits: int) -> Tensor:
        """(K, K) diagonal: the largest eigenvalue of each task's Gramian over equal parts of the batch (NTKMTL-SR)."""
        for k, z in enumerate(self.features):
            if z.dim() == 0 or z.shape[0] % splits:
                raise ValueError(f"NTKMTL: splits is {splits}, but features[{k}] has a batch of {z.shape[:1]}")
        largest = []
        for i in indices:
            total = torch.zeros(splits, splits, dtype=torch.float64)
            for row in self.rows[i]:
                parts = row.reshape(splits, -1).double()
                total += (parts @ parts.T).cpu()
            largest.append(torch.linalg.eigvalsh(total)[-1])
        return torch.stack(largest).clamp(min=0.0).diag()

    def _check_apart(self) -> None:
        """Refuses a feature that is computed from another: the trunk's backward would count its gradient twice."""
        for k, z in enumerate(self.features if len(self.features) > 1 else []):
            inputs = [] if z.grad_fn is None else [n for n, _ in z.grad_fn.next_functions if n is not None]
            behind = set(_losses.nodes(GradientEdge(n, 0) for n in inputs))
            for j, other in enumerate(self.features):
                if j != k and (other is z or other.grad_fn in behind):
                    raise RuntimeError(
                        f"features[{k}] is computed from features[{j}], so that their gradients overlap: leave one out"
                    )

    def backward(self, indices: Sequence[int], weights: Tensor) -> dict[int, Tensor]:
        """SUM_i w_i g_i of the trunk's parameters, by one backward. Frees the graph."""
        self._check_apart()
        seeds = []
        for k, z in enumerate(self.features):
            seed = torch.empty_like(z, memory_format=torch.contiguous_format)
            backend = _backend.choose(z, torch.empty_like(z))
            backend.combine_([seed], [[self.rows[i][k].contiguous()] for i in indices], weights)
            seeds.append(seed)
        grads = torch.autograd.grad(
            self.features, [self.point.tensors[i] for i in self.trunk], seeds, allow_unused=True
        )
        return {i: self.point.fitted(i, g) for i, g in zip(self.trunk, grads, strict=True) if g is not None}
