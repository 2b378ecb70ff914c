"""Knowledge distillation for multi-task learning: the shared features, through small adaptors, match single-task ones.

Li and Bilen, "Knowledge Distillation for Multi-task Learning", ECCV workshops 2020, arXiv 2007.06889.

First one network is trained for each task alone, and frozen. The multi-task network then learns from its task losses
and, for each task, from the squared distance between the teacher's features and its own ones after a linear adaptor, both
normalised, so that no task's features weigh more for being larger. The adaptors are thrown away afterwards.

Simplified: one layer is matched, and the network is small.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from common import Data, compare, digit_pairs, task_losses, train, trunk
from torch import Tensor, nn


class Network(nn.Module):
    """A trunk with one head a task; teachers are such networks with one head."""

    def __init__(self, tasks: int = 2, width: int = 64) -> None:
        super().__init__()
        self.trunk = trunk(width)
        self.heads = nn.ModuleList(nn.Linear(width, 10) for _ in range(tasks))

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x)
        return [head(z) for head in self.heads]


class Distilled(nn.Module):
    """A network with its teachers and adaptors; evaluated, it is the network alone."""

    def __init__(self, network: Network, teachers: Sequence[Network], width: int = 64) -> None:
        super().__init__()
        self.network = network
        self.teachers = nn.ModuleList(teachers).requires_grad_(False)
        self.adaptors = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in teachers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.network(x)

    def distances(self, x: Tensor) -> list[Tensor]:
        z = self.network.trunk(x)
        return [
            (F.normalize(adaptor(z)) - F.normalize(teacher.trunk(x))).square().sum(1).mean()
            for adaptor, teacher in zip(self.adaptors, self.teachers, strict=True)
        ]


def losses(model: Distilled, x: Tensor, y: Tensor, weight: float = 1.0) -> list[Tensor]:
    both = zip(task_losses(model, x, y), model.distances(x), strict=True)
    return [loss + weight * distance for loss, distance in both]


def teach(data: Data, epochs: int = 12) -> list[Network]:
    """One trained network for each task."""
    teachers = []
    for task in range(data.train_y.shape[1]):
        torch.manual_seed(100 + task)
        teacher = Network(tasks=1)
        train(teacher, data._replace(train_y=data.train_y[:, task : task + 1]), flat=False, epochs=epochs)
        teachers.append(teacher)
    return teachers


if __name__ == "__main__":
    torch.set_num_threads(1)
    data = digit_pairs()
    teachers = teach(data)
    compare(lambda: Distilled(Network(), teachers), data, losses)
