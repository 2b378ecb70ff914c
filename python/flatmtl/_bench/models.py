"""Networks with several heads, in ordinary torch modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm around a shortcut (He et al., arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


class ResNet18(nn.Module):
    """ResNet-18 with a linear head for each entry of `classes`; `width` 64 is the published network."""

    def __init__(self, classes: Sequence[int], width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        ]  # fmt: skip
        inputs = width
        for stage in range(4):
            for block in range(2):
                outputs, stride = width << stage, 2 if stage and not block else 1
                layers.append(Block(inputs, outputs, stride))
                inputs = outputs
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.heads = nn.ModuleList(nn.Linear(inputs, n) for n in classes)

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x)
        return [head(z) for head in self.heads]


class Transformer(nn.Module):
    """A transformer encoder over tokens; its mean output goes to a linear head for each entry of `classes`."""

    def __init__(
        self, classes: Sequence[int], width: int = 128, depth: int = 4, heads: int = 4, vocabulary: int = 1000,
        length: int = 32,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokens, self.length, self.vocabulary = nn.Embedding(vocabulary, width), length, vocabulary
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.trunk = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.heads = nn.ModuleList(nn.Linear(width, n) for n in classes)

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(self.tokens(x) + self.positions).mean(1)
        return [head(z) for head in self.heads]


class Perceptron(nn.Module):
    """Three layers of `width`, with a linear head for each entry of `classes`."""

    def __init__(self, classes: Sequence[int], width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(width, width), nn.ReLU())))
        self.heads = nn.ModuleList(nn.Linear(width, n) for n in classes)

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x)
        return [head(z) for head in self.heads]


class VisionTransformer(nn.Module):
    """The parameters of ViT-Ti/16 (Touvron et al., arXiv 2012.12877): their shapes are used, it is not run."""

    def __init__(self, width: int = 192, depth: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 197, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True, norm_first=True)
        self.trunk = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1000)
