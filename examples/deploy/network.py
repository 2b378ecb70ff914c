"""The two-task network and its data: in Python for training, as TorchScript for the program without Python."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pictures import draw_pairs

CANVAS = 10


class Network(nn.Module):
    """A convolutional trunk with BatchNorm, and a linear head for each digit of a picture."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = (1, width, 2 * width, 4 * width)
        for i, stride in enumerate((1, 2, 2)):
            convolution = nn.Conv2d(channels[i], channels[i + 1], 3, stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(channels[i + 1]), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * 3 * 3, 64), nn.ReLU())
        self.left, self.right = nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x)
        return self.left(features), self.right(features)


def load_data(seed: int = 0) -> dict[str, Tensor]:
    """Pictures (N x 1 x 10 x 10, float32) and labels (N x 2, int64) for training, fine-tuning and its test.

    The 1,797 digits of scikit-learn, real handwriting, are split first: 900 for training, 300 for fine-tuning, 597 for
    the test. Fine-tuning and test see them as another scanner would show them: dark ink on light paper, at 60 % contrast.
    """
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    data: dict[str, Tensor] = {}
    for name, part, count in (
        ("train", order[:900], 1500),
        ("tune", order[900:1200], 500),
        ("test", order[1200:], 1000),
    ):
        source = images[part], labels[part]
        x, y = draw_pairs(source, source, count, CANVAS, rng)
        x = x.float() / 16
        data[f"{name}_x"], data[f"{name}_y"] = (x if name == "train" else 1 - 0.6 * x), y
    return data


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    """Percent right, for each task."""
    model.eval()
    return [100 * (out.argmax(1) == y[:, i]).float().mean().item() for i, out in enumerate(model(x))]
