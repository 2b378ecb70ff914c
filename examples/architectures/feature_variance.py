"""How hard a task is for shared features, from their variance: a diagnostic that needs no test labels and no training.

The variance of the shared features splits into a part between the classes of a task and a part within them. The share within,

    difficulty_i = E |z - E[z | y_i]|^2 / E |z - E z|^2        in [0, 1],

is 0 where the features show nothing but the classes of task i, and near 1 where these tell nothing about the features, as for
labels at random. The same features serve all tasks, so that the numbers of one network are comparable, and a wide spread
says that the features belong to some tasks more than to others.

Reconstructed: the field uses feature variance as a measure of multi-task difficulty; no paper's exact formula was to be
had, and this is the classical within-class share of the variance (Fisher; one minus the correlation ratio).

The example trains one trunk on three tasks, the digit, its parity, and the digit with half of the labels drawn at random, and prints
the measure before and after, with and without F-MTL.
"""

from __future__ import annotations

import torch
from common import Data, accuracies, digit_halves, np, task_losses, train
from torch import Tensor, nn


def feature_variance(z: Tensor, y: Tensor) -> float:
    """Share of the variance of features z, N x D, that lies within the classes y, N integers."""
    z = z.detach().double()
    members = torch.nn.functional.one_hot(y).double()
    count = members.sum(0)
    means = (members.T @ z) / count.clamp(min=1)[:, None]
    total = (z - z.mean(0)).square().sum()
    if total == 0:
        return float("nan")  # constant features say nothing
    return ((z - means[y]).square().sum() / total).item()


def three_tasks(seed: int = 0) -> Data:
    """Digits, N x 64; targets N x 3: the digit, its parity, and the digit, half of the labels at random."""
    rng = np.random.default_rng(seed)
    parts: list[Tensor] = []
    for images, labels in digit_halves(seed):
        noisy = np.where(rng.random(len(labels)) < 0.5, rng.integers(10, size=len(labels)), labels)
        parts += [torch.from_numpy(images).flatten(1).float() / 16]
        parts += [torch.from_numpy(np.stack([labels, labels % 2, noisy], 1))]
    return Data(*parts)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 48), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(48, classes) for classes in (10, 2, 10))

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x)
        return [head(z) for head in self.heads]

    def difficulties(self, x: Tensor, y: Tensor) -> list[float]:
        z = self.trunk(x)
        return [feature_variance(z, target) for target in y.unbind(1)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    data = three_tasks()
    for flat in (False, True):
        torch.manual_seed(0)
        model = Network()
        before = model.difficulties(data.train_x, data.train_y)
        curve = train(model, data, task_losses, flat=flat, epochs=15)
        after = model.difficulties(data.train_x, data.train_y)
        values = (before, after, curve[-1])
        first, last, losses = (" ".join(f"{v:.3f}" for v in row) for row in values)
        scores = " ".join(f"{s:.1f}" for s in accuracies(model, data.test_x, data.test_y))
        name = "with F-MTL   " if flat else "without F-MTL"
        print(f"{name}  losses {losses}   feature variance {first} -> {last}   test accuracy, % {scores}")
