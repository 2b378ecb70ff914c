"""Task-feature collaborative learning: group tasks and features together, and let no group teach another.

Yang et al., "Task-Feature Collaborative Learning with Application to Personalized Attribute Prediction", arXiv 2004.13930.

The weights W of linear models, features x tasks, are the edges of a bipartite graph between features and tasks. Its Laplacian
L(|W|) has as many zero eigenvalues as the graph has components, so that the sum of its k smallest eigenvalues is 0 exactly
where W is block-diagonal with k blocks. That sum is the regulariser: min <L(|W|), U> over 0 <= U <= I with trace k, solved by
the eigenvectors of the k smallest eigenvalues; for given U it is linear in |W|, which is what the losses see.

Simplified: the paper's base model, without its extension for overlapping features; gradient steps on W instead of
proximal ones. Data: three groups of two tasks, each reading features of its own, few and noisy examples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Data, compare
from torch import Tensor, nn

GROUPS, TASKS_EACH, FEATURES_EACH = 3, 2, 8


def grouped_regression(train: int = 40, test: int = 1000, noise: float = 1.0, seed: int = 0) -> Data:
    g = torch.Generator().manual_seed(seed)
    blocks = [torch.randn(FEATURES_EACH, TASKS_EACH, generator=g) for _ in range(GROUPS)]
    w, parts = torch.block_diag(*blocks), []
    for n in (train, test):
        x = torch.randn(n, len(w), generator=g)
        parts += [x, x @ w + noise * torch.randn(n, w.shape[1], generator=g)]
    return Data(*parts)


def laplacian(w: Tensor) -> Tensor:
    """Of the bipartite graph with edges |w|, features x tasks: (features + tasks) squared."""
    corner = w.abs()
    a = torch.cat([F.pad(corner, (len(w), 0)), F.pad(corner.T, (0, w.shape[1]))])
    return torch.diag(a.sum(1)) - a


def spectral_penalty(w: Tensor, groups: int) -> Tensor:
    """Sum of the `groups` smallest eigenvalues of the Laplacian; 0 if w has that many blocks."""
    graph = laplacian(w)
    vectors = torch.linalg.eigh(graph.detach().double()).eigenvectors[:, :groups]
    u = (vectors @ vectors.T).to(w.dtype)
    return (graph * u).sum()


class Network(nn.Module):
    """Linear models; the weight of each task is a parameter of its own."""

    def __init__(self, features: int = GROUPS * FEATURES_EACH, tasks: int = GROUPS * TASKS_EACH) -> None:
        super().__init__()
        self.tasks = nn.ModuleList(nn.Linear(features, 1, bias=False) for _ in range(tasks))

    def weights(self) -> Tensor:
        return torch.cat([task.weight for task in self.tasks]).T

    def forward(self, x: Tensor) -> list[Tensor]:
        return [task(x).squeeze(1) for task in self.tasks]


def losses(model: Network, x: Tensor, y: Tensor, strength: float = 1.0) -> list[Tensor]:
    """The penalty joins all tasks, so that their weights are shared parameters."""
    errors = [F.mse_loss(o, t) for o, t in zip(model(x), y.unbind(1), strict=True)]
    penalty = spectral_penalty(model.weights(), GROUPS)
    return [error + strength / len(errors) * penalty for error in errors]


@torch.no_grad()
def evaluate(model: Network, x: Tensor, y: Tensor) -> list[float]:
    return [F.mse_loss(o, t).item() for o, t in zip(model(x), y.unbind(1), strict=True)]


@torch.no_grad()
def outside(model: Network) -> float:
    """Share of the weights' absolute sum that lies outside the true blocks."""
    blocks = torch.block_diag(*[torch.ones(FEATURES_EACH, TASKS_EACH)] * GROUPS)
    w = model.weights().abs()
    return ((1 - blocks) * w).sum().item() / w.sum().item()


if __name__ == "__main__":
    compare(
        Network, grouped_regression(), losses, evaluate=evaluate, what="test errors",
        note=lambda model: f"weight outside the blocks {outside(model):.2f}", epochs=120, batch=40, lr=3e-2,
    )  # fmt: skip
