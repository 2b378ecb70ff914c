"""Task-adaptive parameter sharing: each task adds weights of its own to the few layers where it needs them.

Wallingford et al., "Task Adaptive Parameter Sharing for Multi-Task Learning", CVPR 2022, arXiv 2203.16708.

A layer of task t uses W + [s_t >= 0.1] D_t: W is shared, the difference D_t and the score s_t are the task's own. The score's
gradient passes the threshold straight through, and an l1 penalty on the scores makes a task share all it can. The
threshold and the initial scores are those of the authors' code.

Simplified: a small network trained from scratch, all tasks at once (the paper's joint setting); no BatchNorm.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from common import compare, digit_pairs, task_losses
from torch import Tensor, nn

THRESHOLD, INITIAL_SCORE = 0.1, 0.15


class StraightThrough(torch.autograd.Function):
    """[score >= THRESHOLD], with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, score: Tensor) -> Tensor:
        return (score >= THRESHOLD).to(score.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Adaptive(nn.Module):
    """A convolution or linear layer, shared, with a difference and a score for each task."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, tasks: int) -> None:
        super().__init__()
        self.layer = layer
        self.difference = nn.ParameterList(torch.zeros_like(layer.weight) for _ in range(tasks))
        self.score = nn.ParameterList(torch.tensor(INITIAL_SCORE) for _ in range(tasks))

    def weight(self, task: int) -> Tensor:
        return self.layer.weight + StraightThrough.apply(self.score[task]) * self.difference[task]

    def forward(self, x: Tensor, task: int) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, self.weight(task), self.layer.bias)
        return F.conv2d(x, self.weight(task), self.layer.bias, self.layer.stride, self.layer.padding)


class Network(nn.Module):
    def __init__(self, tasks: int = 2) -> None:
        super().__init__()
        layers = (
            nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Linear(16 * 5 * 5, 64)
        )  # fmt: skip
        self.layers = nn.ModuleList(Adaptive(layer, tasks) for layer in layers)
        self.heads = nn.ModuleList(nn.Linear(64, 10) for _ in range(tasks))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.of_task(x, task) for task in range(len(self.heads))]

    def of_task(self, x: Tensor, task: int) -> Tensor:
        first, second, last = self.layers
        z = F.relu(second(F.relu(first(x, task)), task))
        return self.heads[task](F.relu(last(z.flatten(1), task)))

    def scores(self, task: int) -> Tensor:
        return torch.stack([layer.score[task] for layer in self.layers])


def losses(model: Network, x: Tensor, y: Tensor, sparsity: float = 0.5) -> list[Tensor]:
    return [loss + sparsity * model.scores(task).abs().mean() for task, loss in enumerate(task_losses(model, x, y))]


def adapted(model: Network) -> str:
    own = [int((model.scores(task) >= THRESHOLD).sum()) for task in range(len(model.heads))]
    return f"layers of {len(model.layers)} that a task adapted: {' '.join(map(str, own))}"


if __name__ == "__main__":
    compare(Network, digit_pairs(), losses, note=adapted)
