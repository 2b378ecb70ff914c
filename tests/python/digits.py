"""Two tasks on scikit-learn's handwritten digits, for tests that train for real: which digit, and is it even?"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import flatmtl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn


@lru_cache(maxsize=1)
def data() -> tuple[Tensor, Tensor, Tensor]:
    """Pixels in [0, 1], 1797 x 64; the digits; whether they are even."""
    pixels, digits = load_digits(return_X_y=True)
    labels = torch.from_numpy(digits)
    return torch.from_numpy(pixels).float() / 16, labels, 1 - labels % 2


def batches(count: int, size: int = 64) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [tuple(part[i * size : (i + 1) * size] for part in data()) for i in range(count)]  # type: ignore[misc]


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0, norm: bool = True) -> None:
        super().__init__()
        layers = [nn.Linear(64, 32), *([nn.BatchNorm1d(32)] if norm else []), nn.ReLU(), nn.Dropout(dropout)]
        self.trunk = nn.Sequential(*layers)
        self.digit = nn.Linear(32, 10)
        self.even = nn.Linear(32, 2)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        z = self.trunk(pixels)
        return {"digit": self.digit(z), "even": self.even(z)}


def net(seed: int = 0, **options: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**options)


def losses(outputs: dict[str, Tensor], digit: Tensor, even: Tensor) -> dict[str, Tensor]:
    return {"digit": F.cross_entropy(outputs["digit"], digit), "even": F.cross_entropy(outputs["even"], even)}


def losses_of(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    return losses(model(batch[0]), batch[1], batch[2])


def flat(model: nn.Module, **options: Any) -> flatmtl.FlatMTL:
    return flatmtl.FlatMTL(torch.optim.Adam(model.parameters(), lr=1e-2), aggregator="pcgrad", **options)


def train(
    model: nn.Module, optimizer: flatmtl.FlatMTL, steps: list[Any], *, clip: float | None = None,
    autocast: torch.dtype | None = None, scaler: torch.amp.GradScaler | None = None, micro: bool = False,
) -> list[Any]:  # fmt: skip
    """The plain loop, which the frameworks must agree with bit for bit. `micro`: a step is a list of micro-batches."""

    def closure(batch: Any) -> Any:
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            return losses_of(model, batch)

    record = []
    for batch in steps:
        record.append(optimizer.backward(closure, scaler, batches=batch if micro else [batch]))
        if scaler is not None:
            scaler.unscale_(optimizer)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    return record


def plain(
    model: nn.Module, steps: list[Any], *, decay: float = 1.0, sync: str | None = "auto", **options: Any
) -> tuple[flatmtl.FlatMTL, list[Any]]:
    """Trains by the plain loop, the learning rate times `decay` after every step; the optimizer and the losses."""
    optimizer = flat(model, sync=sync)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, decay)
    record = []
    for step in steps:
        record += train(model, optimizer, [step], **options)
        scheduler.step()
    return optimizer, record


def same(a: Any, b: Any) -> bool:
    """Whether two state dicts (nested, of modules or optimizers) are equal bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
