"""Small models and closures that several test files train."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TwoHeads(nn.Module):
    """A trunk and `tasks` heads; optionally BatchNorm and dropout in the trunk."""

    def __init__(
        self,
        tasks: int = 2,
        width: int = 8,
        *,
        norm: bool = False,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(5, width, dtype=dtype), nn.Tanh()]
        if norm:
            layers.insert(1, nn.BatchNorm1d(width, dtype=dtype))
        if dropout:
            layers.append(nn.Dropout(dropout))
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(width, 3, dtype=dtype) for _ in range(tasks))

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x)
        return [head(z) for head in self.heads]


def two_heads(seed: int = 0, **options: object) -> TwoHeads:
    torch.manual_seed(seed)
    return TwoHeads(**options)  # type: ignore[arg-type]


def batch(
    seed: int = 0, tasks: int = 2, size: int = 16, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(size, 5, generator=g, dtype=dtype)
    return x, [torch.randint(0, 3, (size,), generator=g) for _ in range(tasks)]


def closure_of(model: nn.Module, x: Tensor, y: list[Tensor]) -> Callable[[], list[Tensor]]:
    return lambda: [F.cross_entropy(out, target) for out, target in zip(model(x), y, strict=True)]


def values(model: nn.Module) -> list[Tensor]:
    """Copies of all parameters."""
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
