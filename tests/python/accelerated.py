"""The loop with an Accelerator, in one process and in several. Needs Accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import accelerate
import digits
import torch
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from flatmtl.integrations.accelerate import backward
from torch import nn


@contextmanager
def alone() -> Iterator[None]:
    """Accelerate keeps its state in singletons; the next Accelerator is to start anew."""
    try:
        yield
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def prepared(model: nn.Module, loader: Any, *, micro: int = 1, **options: Any) -> tuple[Any, ...]:
    """(accelerator, model, optimizer, loader, scheduler), on the CPU."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=micro, **options)
    optimizer = digits.flat(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return accelerator, *accelerator.prepare(model, optimizer, loader, scheduler)


def train(
    accelerator: Any, model: nn.Module, optimizer: Any, loader: Any, scheduler: Any, clip: float | None = None
) -> list[Any]:
    """An epoch; the losses of its steps."""
    record = []
    for batch in loader:
        with accelerator.accumulate(model):
            if accelerator.gradient_accumulation_steps == 1:
                losses = backward(accelerator, optimizer, lambda batch=batch: digits.losses_of(model, batch))
            else:
                losses = backward(accelerator, optimizer, lambda batch: digits.losses_of(model, batch), batch)
            assert (losses is not None) == accelerator.sync_gradients
            if losses is not None:
                record.append(losses)
                if clip is not None:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
    return record


def force_fsdp2(state: Any) -> None:
    """Accelerate has FSDP for GPUs only: tells its state that this is one."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
