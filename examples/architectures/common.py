"""What the examples of this folder share: data from scikit-learn's digits, a small trunk, training with and without F-MTL."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flatmtl
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1]))
from pictures import draw_pairs

Losses = Callable[[Any, Tensor, Tensor], list[Tensor]]


class Data(NamedTuple):
    train_x: Tensor
    train_y: Tensor  # N x K: one target a task
    test_x: Tensor
    test_y: Tensor


def digit_halves(seed: int = 0) -> list[tuple[Any, Any]]:
    """scikit-learn's 1,797 digits as two (images, labels), uint8 N x 8 x 8 and int64: for training and for testing."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    return [(digits.images[half].astype(np.uint8), digits.target[half]) for half in np.array_split(order, 2)]


def digit_pairs(train: int = 600, test: int = 1000, seed: int = 0) -> Data:
    """Pictures of two digits, N x 1 x 10 x 10 in [0, 1]; task 1 names the left one, task 2 the right one."""
    rng = np.random.default_rng(seed)
    parts = [draw_pairs(half, half, n, 10, rng) for half, n in zip(digit_halves(seed), (train, test), strict=True)]
    (train_x, train_y), (test_x, test_y) = parts
    return Data(train_x.float() / 16, train_y, test_x.float() / 16, test_y)


def trunk(features: int = 64) -> nn.Sequential:
    """From pictures, N x 1 x 10 x 10, to N x features."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 5 * 5, features), nn.ReLU(),
    )  # fmt: skip


def task_losses(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Cross-entropy of each task, for a model that returns one output a task."""
    return [F.cross_entropy(output, target) for output, target in zip(model(x), y.unbind(1), strict=True)]


@torch.no_grad()
def accuracies(model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    """Per cent right, for each task."""
    return [100 * (o.argmax(1) == t).float().mean().item() for o, t in zip(model(x), y.unbind(1), strict=True)]


def train(
    model: nn.Module, data: Data, losses: Losses = task_losses, *, flat: bool, epochs: int = 12, lr: float = 3e-3,
    batch: int = 50, rho: float = 0.02, aggregator: str = "cagrad", seed: int = 0,
) -> list[list[float]]:  # fmt: skip
    """Trains in place, with F-MTL or on the sum of the losses; returns the mean losses of each epoch.

    The model and its losses are the same in both; only the two branches below differ.
    """
    optimizer: Any = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    if flat:
        optimizer = flatmtl.FlatMTL(optimizer, aggregator=aggregator, rho=rho)
    generator = torch.Generator().manual_seed(seed)
    curve = []
    for _ in range(epochs):
        model.train()
        seen = []
        for rows in torch.randperm(len(data.train_x), generator=generator).split(batch):
            x, y = data.train_x[rows], data.train_y[rows]
            if flat:
                values = optimizer.step(lambda x=x, y=y: losses(model, x, y))
            else:
                values = losses(model, x, y)
                optimizer.zero_grad()
                torch.stack(values).sum().backward()
                optimizer.step()
            seen.append(torch.stack([v.detach() for v in values]))
        curve.append(torch.stack(seen).mean(0).tolist())
    model.eval()
    return curve


def report(flat: bool, curve: Any, scores: Sequence[float], what: str = "test accuracy, %", note: str = "") -> None:
    """Prints the losses of the first and the last epoch, and test scores."""
    first, last = (" ".join(f"{v:.3f}" for v in row) for row in (curve[0], curve[-1]))
    name, scored = "with F-MTL   " if flat else "without F-MTL", " ".join(f"{s:.4g}" for s in scores)
    print(f"{name}  losses {first} -> {last}   {what} {scored}  {note}".rstrip(), flush=True)


def compare(
    make: Callable[[], nn.Module], data: Data, losses: Losses = task_losses, *,
    evaluate: Callable[[Any, Tensor, Tensor], Sequence[float]] = accuracies, what: str = "test accuracy, %",
    note: Callable[[Any], str] = lambda model: "", seed: int = 0, **options: Any,
) -> None:  # fmt: skip
    """Trains two models of the same initial weights, without and with F-MTL, and prints a line for each."""
    torch.set_num_threads(1)  # the models are too small to gain from more
    for flat in (False, True):
        torch.manual_seed(seed)
        model = make()
        curve = train(model, data, losses, flat=flat, seed=seed, **options)
        report(flat, curve, evaluate(model, data.test_x, data.test_y), what, note(model))
