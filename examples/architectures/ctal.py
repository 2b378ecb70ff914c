"""Cross-task affinity learning for dense prediction.

Sinodinos and Armanfard, "Cross-Task Affinity Learning for Multitask Dense Scene Predictions", WACV 2025, arXiv 2401.11124.

Every task first predicts from features of its own. The affinity matrices of those features (cosines between all pairs of
positions) are interleaved position by position and fused by a grouped convolution, one group a position, so that the fusion
costs few parameters; the fused affinities then propagate every task's features, blended with the unpropagated ones.

Simplified: single convolutions instead of bottleneck blocks, one scale, full resolution. The two dense tasks are
made of pictures of two digits: to which digit a pixel belongs (3 classes), and how bright the left digit is there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Data, compare, digit_halves, np
from pictures import compose
from torch import Tensor, nn

SIDE = 10


def dense_pairs(train: int = 120, test: int = 400, seed: int = 0) -> Data:
    """Pictures N x 1 x 10 x 10; targets N x 2 x 10 x 10: class of each pixel, and brightness of the left digit."""
    rng = np.random.default_rng(seed)
    parts: list[Tensor] = []
    for (images, _), n in zip(digit_halves(seed), (train, test), strict=True):
        left, right = (images[rng.integers(len(images), size=n)] for _ in range(2))
        alone = [compose(a, b, SIDE) for a, b in ((left, 0 * right), (0 * left, right))]
        kind = np.where(alone[1] > alone[0], 2, 1) * (np.maximum(*alone) > 4)
        parts += [torch.from_numpy(np.maximum(*alone)).float()[:, None] / 16]
        parts += [torch.from_numpy(np.stack([kind, alone[0] / 16], 1)).float()]
    return Data(*parts)


class AffinityModule(nn.Module):
    """Maps each task's features, N x C x H x W, to features that the fused affinities have propagated."""

    def __init__(self, tasks: int, channels: int, positions: int, gamma: float = 0.5) -> None:
        super().__init__()
        self.gamma = gamma
        self.value = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(tasks))
        self.fusion = nn.Conv2d(tasks * positions, positions, 3, padding=1, groups=positions)

    def fused(self, features: list[Tensor]) -> Tensor:
        """N x HW x HW; row p holds the affinities of position p with all others."""
        n, _, height, width = features[0].shape
        unit = [F.normalize(f.flatten(2), dim=1) for f in features]
        affinity = [(u.transpose(1, 2) @ u).view(n, -1, height, width) for u in unit]
        # position by position: the channels of one group are the same position's in all tasks
        return self.fusion(torch.stack(affinity, 2).flatten(1, 2)).flatten(2)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        spread = self.fused(features).transpose(1, 2)
        propagated = [(value(f).flatten(2) @ spread).view_as(f) for value, f in zip(self.value, features, strict=True)]
        return [self.gamma * p + (1 - self.gamma) * f for p, f in zip(propagated, features, strict=True)]


class Network(nn.Module):
    def __init__(self, outputs: tuple[int, ...] = (3, 1), channels: int = 12) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU())
        self.own = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()) for _ in outputs
        )
        self.first = nn.ModuleList(nn.Conv2d(channels, c, 1) for c in outputs)
        self.affinity = AffinityModule(len(outputs), channels, SIDE * SIDE)
        self.last = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Conv2d(channels, c, 3, padding=1)) for c in outputs)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Initial and final predictions."""
        z = self.trunk(x)
        features = [own(z) for own in self.own]
        initial = [head(f) for head, f in zip(self.first, features, strict=True)]
        return initial, [head(f) for head, f in zip(self.last, self.affinity(features), strict=True)]


def losses(model: Network, x: Tensor, y: Tensor) -> list[Tensor]:
    """Both predictions of a task are supervised."""
    predictions = model(x)
    return [
        torch.stack([F.cross_entropy(p[0], y[:, 0].long()) for p in predictions]).sum(),
        torch.stack([F.l1_loss(p[1][:, 0], y[:, 1]) for p in predictions]).sum(),
    ]


@torch.no_grad()
def evaluate(model: Network, x: Tensor, y: Tensor) -> list[float]:
    _, (kind, brightness) = model(x)
    right = (kind.argmax(1) == y[:, 0]).float().mean().item()
    return [100 * right, (brightness[:, 0] - y[:, 1]).abs().mean().item()]


if __name__ == "__main__":
    compare(Network, dense_pairs(), losses, evaluate=evaluate, what="test pixel accuracy, %, and mean error")
