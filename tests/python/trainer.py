"""A two-task network and its training as one module for TorchScript. Shared by tests."""

import flatmtl
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Network(nn.Module):
    """A trunk with BatchNorm and two heads."""

    def __init__(self, width: int = 8, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, width, bias=False), nn.BatchNorm1d(width), nn.Tanh()).to(dtype)
        self.heads = nn.ModuleList([nn.Linear(width, 3, dtype=dtype) for _ in range(2)])

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x)
        outputs: list[Tensor] = []
        for head in self.heads:
            outputs.append(head(z))
        return outputs


class Trainer(nn.Module):
    """The network and its optimizer."""

    def __init__(self, model: nn.Module, optimizer: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.optimizer = optimizer

    def forward(self, x: Tensor, y: list[Tensor]) -> list[Tensor]:
        losses: list[Tensor] = []
        for out, target in zip(self.model(x), y):  # noqa: B905 (TorchScript knows no strict)
            losses.append(F.cross_entropy(out, target))
        return losses

    @torch.jit.export
    def train_step(self, x: Tensor, y: list[Tensor]) -> Tensor:
        losses = self.forward(x, y)
        grads = self.optimizer.gradients(losses)
        perturbed: list[list[Tensor | None]] = []
        for task in range(len(losses)):
            self.optimizer.perturb(grads, task)
            perturbed.append(self.optimizer.gradients([self.forward(x, y)[task]])[0])
        self.optimizer.step(grads, perturbed)
        return torch.stack([loss.detach() for loss in losses])


def make_trainer(kind: str = "SGD", init: int = 0, dtype: torch.dtype = torch.float32, **options: object) -> Trainer:
    torch.manual_seed(init)
    model = Network(dtype=dtype)
    build = getattr(flatmtl.script, kind)
    return Trainer(model, build(model.parameters(), [model.trunk], buffers=model.buffers(), **options))


def batches(count: int, seed: int = 0, size: int = 16) -> list[tuple[Tensor, list[Tensor]]]:
    g = torch.Generator().manual_seed(100 + seed)
    return [
        (torch.randn(size, 5, generator=g), [torch.randint(0, 3, (size,), generator=g) for _ in range(2)])
        for _ in range(count)
    ]
