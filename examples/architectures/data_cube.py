"""A data curriculum over tasks and samples, as a sampler: which task follows which, and the easy samples first.

Min et al., "Data-CUBE: Data Curriculum for Instruction-based Sentence Representation Learning", Findings of ACL 2024,
arXiv 2401.03563.

Over tasks: the order with the least interference between neighbours (1 - similarity), a travelling salesman's tour found by
simulated annealing. Over samples: from easy to difficult in levels; all tasks, in the order of the tour, finish a level
before the next one begins. A mini-batch holds one task.

Simplified: pictures instead of sentences; a task's similarity is the cosine of mean pictures, a sample's difficulty how much
nearer the mean of its class is than that of the next class. Tasks: digits turned by 0, 90, 180 and 270 degrees, a
head each. A step takes the batches of two neighbouring tasks; the loss of a task that is not there is None.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import flatmtl
import torch
import torch.nn.functional as F
from common import digit_halves, report
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

TASKS = 4


def tour(similarity: Tensor, steps: int = 2000, seed: int = 0) -> list[int]:
    """An order of the tasks that makes the sum of 1 - similarity over neighbours, around the circle, small."""
    distance, rng = (1 - similarity).tolist(), random.Random(seed)

    def length(order: list[int]) -> float:
        return sum(distance[a][b] for a, b in zip(order, order[1:] + order[:1], strict=True))

    order = best = list(range(len(distance)))
    for step in range(steps):
        heat = 0.1 * (1 - step / steps) + 1e-9
        i, j = sorted(rng.sample(range(len(order) + 1), 2))
        changed = order[:i] + order[i:j][::-1] + order[j:]
        if length(changed) < length(order) or rng.random() < math.exp((length(order) - length(changed)) / heat):
            order = changed
        best = min(best, order, key=length)
    return best


class DataCube(Sampler[list[int]]):
    """Mini-batches of the samples with these tasks and difficulties, level by level, and within a level along `order`."""

    def __init__(self, task: Tensor, difficulty: Tensor, order: list[int], batch_size: int, levels: int = 3) -> None:
        self.batch_size, self.generator = batch_size, torch.Generator().manual_seed(0)
        rows = [(task == t).nonzero().squeeze(1) for t in order]
        easy_first = [own[difficulty[own].argsort(stable=True)].tensor_split(levels) for own in rows]
        self.levels = [[split[level] for split in easy_first] for level in range(levels)]

    def __iter__(self) -> Iterator[list[int]]:
        for level in self.levels:
            orders = (torch.randperm(len(own), generator=self.generator) for own in level)
            batches = [own[order].split(self.batch_size) for own, order in zip(level, orders, strict=True)]
            for turn in range(max(map(len, batches))):
                yield from (own[turn].tolist() for own in batches if turn < len(own))

    def __len__(self) -> int:
        return sum(math.ceil(len(own) / self.batch_size) for level in self.levels for own in level)


def turned_digits(train: int = 400, seed: int = 0) -> list[TensorDataset]:
    """Data sets of (picture, 64; class; task) for training and for testing."""
    sets = []
    for (images, labels), n in zip(digit_halves(seed), (train, None), strict=True):
        x, y = torch.from_numpy(images[:n]).float() / 16, torch.from_numpy(labels[:n])
        pictures = torch.cat([x.rot90(turns, (1, 2)).flatten(1) for turns in range(TASKS)])
        sets.append(TensorDataset(pictures, y.repeat(TASKS), torch.arange(TASKS).repeat_interleave(len(y))))
    return sets


def measure(x: Tensor, y: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
    """Difficulty of each sample, and similarity of the tasks."""
    centre = torch.stack([torch.stack([x[(task == t) & (y == c)].mean(0) for c in range(10)]) for t in range(TASKS)])
    distance = (x[:, None] - centre[task]).norm(dim=2)
    own = distance.gather(1, y[:, None])
    other = distance.scatter(1, y[:, None], math.inf).min(1, keepdim=True).values
    mean = F.normalize(centre.mean(1) - centre.mean((0, 1)))
    return (own - other).squeeze(1), mean @ mean.T


def main(flat: bool, epochs: int = 12) -> tuple[Tensor, list[float]]:
    """Mean losses, epochs x tasks, and the tasks' test accuracies."""
    torch.manual_seed(0)
    train, test = turned_digits()
    difficulty, similarity = measure(*train.tensors)
    loader = DataLoader(train, batch_sampler=DataCube(train.tensors[2], difficulty, tour(similarity), 25))
    trunk = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    heads = nn.ModuleList(nn.Linear(64, 10) for _ in range(TASKS))
    adam = torch.optim.Adam([*trunk.parameters(), *heads.parameters()], lr=2e-3)
    optimizer = flatmtl.FlatMTL(adam, rho=0.02 if flat else 0.0)

    def losses(parts: dict[int, tuple[Tensor, Tensor]]) -> list[Tensor | None]:
        present = {t: F.cross_entropy(heads[t](trunk(x)), y) for t, (x, y) in parts.items()}
        return [present.get(t) for t in range(TASKS)]

    curve = []
    for _ in range(epochs):
        seen, batches = [], iter(loader)
        for pair in zip(batches, batches, strict=True):
            parts = {int(task[0]): (x, y) for x, y, task in pair}
            values = optimizer.step(lambda parts=parts: losses(parts))
            seen.append(torch.stack([torch.tensor(math.nan) if v is None else v for v in values]))
        curve.append(torch.stack(seen).nanmean(0))
    x, y, task = test.tensors
    right = [heads[t](trunk(x[task == t])).argmax(1) == y[task == t] for t in range(TASKS)]
    return torch.stack(curve), [100 * r.float().mean().item() for r in right]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for flat in (False, True):
        report(flat, *main(flat))
