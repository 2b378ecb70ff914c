"""Reparameterised convolutions: a frozen filter bank that all tasks share, and a small modulator for each task.

Kanakis et al., "Reparameterizing Convolutions for Incremental Multi-Task Learning without Task Interference", ECCV 2020,
arXiv 2007.12540.

Every convolution becomes a frozen one, the filter bank, and a trainable 1 x 1 convolution of the task, weight-normalised
(the paper's normalised feature fusion, NFF); BatchNorm and head are the task's own, too. Tasks cannot interfere, and one can be
added later without a change to those that are there. With nothing shared to train, F-MTL is a flat minimum for each task.

Simplified: the bank is learned on single digits at the top left, in a few epochs, instead of on ImageNet; modulators start as
identity instead of the bank's singular vectors (response initialisation).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Data, compare, digit_halves, digit_pairs, np, train
from pictures import compose
from torch import Tensor, nn


class RCMConv2d(nn.Module):
    def __init__(self, bank: nn.Conv2d) -> None:
        super().__init__()
        self.bank = bank.requires_grad_(False)
        self.modulators = nn.ModuleList()

    def add_task(self) -> None:
        channels = self.bank.out_channels
        modulator = nn.Conv2d(channels, channels, 1, bias=False)
        nn.init.dirac_(modulator.weight)
        norm = nn.BatchNorm2d(channels)
        self.modulators.append(nn.Sequential(nn.utils.parametrizations.weight_norm(modulator), norm))

    def forward(self, x: Tensor, task: int) -> Tensor:
        return self.modulators[task](self.bank(x))


class Network(nn.Module):
    def __init__(self, banks: list[nn.Conv2d], tasks: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(RCMConv2d(bank) for bank in banks)
        self.heads = nn.ModuleList()
        for _ in range(tasks):
            self.add_task()

    def add_task(self) -> None:
        for layer in self.layers:
            layer.add_task()
        self.heads.append(nn.Linear(32 * 3 * 3, 10))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.of_task(x, task) for task in range(len(self.heads))]

    def of_task(self, x: Tensor, task: int) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x, task))
        return self.heads[task](x.flatten(1))


def learn_banks(epochs: int = 5, seed: int = 0) -> list[nn.Conv2d]:
    """Convolutions trained to name single digits."""
    torch.manual_seed(seed)
    images, labels = digit_halves(seed)[0]
    x = torch.from_numpy(compose(images, np.zeros_like(images), 10)).float()[:, None] / 16
    sizes = zip((1, 16, 32), (16, 32, 32), (1, 2, 2), strict=True)
    banks = [nn.Conv2d(i, o, 3, stride, padding=1, bias=False) for i, o, stride in sizes]
    layers = [layer for bank in banks for layer in (bank, nn.BatchNorm2d(bank.out_channels), nn.ReLU())]

    class Single(nn.Sequential):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [super().forward(x)]

    single = Single(*layers, nn.Flatten(), nn.Linear(32 * 3 * 3, 10))
    y = torch.from_numpy(labels)[:, None]
    train(single, Data(x, y, x, y), flat=False, epochs=epochs)
    return banks


if __name__ == "__main__":
    torch.set_num_threads(1)
    banks = learn_banks()
    compare(lambda: Network(banks), digit_pairs())
