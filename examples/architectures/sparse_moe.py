"""Sparse mixture of experts with a gate for each task.

Gupta et al., "Sparsely Activated Mixture-of-Experts are Robust Multi-Task Learners", arXiv 2204.07689; the top-k gate and
its balancing term are those of Shazeer et al., "Outrageously Large Neural Networks", arXiv 1701.06538.

Experts are shared, gates are not: each task sends each example to the 2 experts that its own gate prefers, and an expert
computes only the rows that are sent to it. Simplified: experts are one layer on the features of a small convolutional
trunk instead of the feed-forward blocks of a transformer, and the gate adds no noise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import compare, digit_pairs, task_losses, trunk
from torch import Tensor, nn


class SparseExperts(nn.Module):
    """Experts that several gates share; `forward` returns the mixture for one task and its balancing term."""

    def __init__(self, width: int, experts: int, tasks: int, top: int = 2) -> None:
        super().__init__()
        self.top = top
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(experts))
        self.gates = nn.ModuleList(nn.Linear(width, experts, bias=False) for _ in range(tasks))

    def forward(self, z: Tensor, task: int) -> tuple[Tensor, Tensor]:
        scores, chosen = self.gates[task](z).topk(self.top, dim=-1)
        weights = scores.softmax(-1)  # over the chosen experts; all others have weight 0
        out = torch.zeros_like(z)
        for e, expert in enumerate(self.experts):
            rows, place = (chosen == e).nonzero(as_tuple=True)
            if len(rows):  # an expert that nobody chose stays out of the graph
                out = out.index_add(0, rows, weights[rows, place, None] * expert(z[rows]))
        importance = torch.zeros(len(self.experts)).index_add(0, chosen.flatten(), weights.flatten())
        return out, importance.var(unbiased=False) / importance.mean().square()  # squared coefficient of variation


class Network(nn.Module):
    def __init__(self, tasks: int = 2, experts: int = 6, width: int = 48) -> None:
        super().__init__()
        self.trunk = trunk(width)
        self.mixture = SparseExperts(width, experts, tasks)
        self.heads = nn.ModuleList(nn.Linear(width, 10) for _ in range(tasks))
        self.balance: list[Tensor] = []

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x)
        mixed = [self.mixture(z, task) for task in range(len(self.heads))]
        self.balance = [term for _, term in mixed]
        return [head(m) for head, (m, _) in zip(self.heads, mixed, strict=True)]


def losses(model: Network, x: Tensor, y: Tensor, balancing: float = 0.01) -> list[Tensor]:
    values = task_losses(model, x, y)  # also sets `balance`
    return [loss + balancing * term for loss, term in zip(values, model.balance, strict=True)]


@torch.no_grad()
def usage(model: Network, x: Tensor) -> list[list[float]]:
    """For each task the share of examples that each expert gets."""
    z = model.trunk(x)
    chosen = [gate(z).topk(model.mixture.top, -1).indices for gate in model.mixture.gates]
    return [F.one_hot(c, len(model.mixture.experts)).sum(1).float().mean(0).tolist() for c in chosen]


if __name__ == "__main__":
    compare(Network, digit_pairs(), losses)
