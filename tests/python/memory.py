"""Memory in bytes, as torch's profiler counts it, and a model to count its rows of gradients with. Shared by tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def peak_bytes(work: Callable[[], object]) -> int:
    """Largest number of bytes in torch's CPU memory while `work` runs, above that before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class Layers:
    """A trunk of equal layers, small heads and a batch of two examples: all memory that counts is rows.

    `row` is a row of float32 gradients of the trunk in bytes, and `slack` that of some layers' temporaries, in rows.
    """

    def __init__(self, tasks: int = 3, width: int = 128, layers: int = 12) -> None:
        torch.manual_seed(0)
        self.trunk = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
        self.heads = nn.ModuleList(nn.Linear(width, 2) for _ in range(tasks))
        self.x, self.y = torch.randn(2, width), torch.randint(2, (tasks, 2))
        self.row = 4 * layers * (width * width + width)
        self.slack = 3 * 4 * width * width / self.row

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.trunk.parameters(), *self.heads.parameters()]

    def losses(self, batch: int = 0) -> list[Tensor]:
        """Of micro-batches that differ."""
        z = self.trunk(self.x + batch)
        return [F.cross_entropy(head(z), t) for head, t in zip(self.heads, self.y, strict=True)]
