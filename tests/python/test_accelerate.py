"""flatmtl.integrations.accelerate: a loop with an Accelerator does what the plain loop does, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import digits
import pytest
import torch
from torch.utils.data import DataLoader

accelerate = pytest.importorskip("accelerate")

import accelerated  # noqa: E402
from accelerate.state import AcceleratorState, DistributedType  # noqa: E402
from flatmtl.integrations.accelerate import backward  # noqa: E402


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with accelerated.alone():
        yield


def run(count: int = 4, *, clip: float | None = None, norm: bool = True, **options: Any) -> tuple[Any, Any, list[Any]]:
    """Trains; the bare model, the FlatMTL and the losses."""
    loader = DataLoader(digits.batches(count), batch_size=None)
    parts = accelerated.prepared(digits.net(norm=norm), loader, **options)
    losses = accelerated.train(*parts, clip=clip)
    return parts[0].unwrap_model(parts[1]), parts[2].optimizer, losses


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("micro", [1, 3])
def test_the_accelerated_loop_is_the_plain_loop(micro: int, clip: float | None) -> None:
    model, optimizer, record = run(clip=clip, micro=micro, norm=micro == 1)
    steps: list[Any] = digits.batches(4) if micro == 1 else [digits.batches(4)[:3], digits.batches(4)[3:]]
    other = digits.net(norm=micro == 1)
    other_optimizer, losses = digits.plain(other, steps, decay=0.9, clip=clip, micro=micro > 1)
    assert digits.same(model.state_dict(), other.state_dict())
    assert digits.same(optimizer.state_dict(), other_optimizer.state_dict())
    assert digits.same(record, losses)


def test_bf16() -> None:
    """Accelerate runs the model, not the losses, in autocast."""
    model, _, record = run(mixed_precision="bf16")
    other = digits.net()
    optimizer = digits.flat(other)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    class Autocast(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> Any:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                outputs = other(pixels)
            return {name: output.float() for name, output in outputs.items()}

    for batch, losses in zip(digits.batches(4), record, strict=True):
        assert digits.same(optimizer.step(lambda batch=batch: digits.losses_of(Autocast(), batch)), losses)
        scheduler.step()
    assert digits.same(model.state_dict(), other.state_dict())


def test_a_run_resumed_from_save_state_is_the_undisturbed_one(tmp_path: Path) -> None:
    """With dropout: Accelerate saves torch's generators too."""

    def prepared(seed: int) -> tuple[Any, Any, Any]:
        accelerator = accelerate.Accelerator(cpu=True)
        model = digits.net(seed, dropout=0.3)
        model, optimizer = accelerator.prepare(model, digits.flat(model))
        return accelerator, model, optimizer

    def steps(accelerator: Any, model: Any, optimizer: Any, batches: list[Any]) -> None:
        for batch in batches:
            backward(accelerator, optimizer, lambda batch=batch: digits.losses_of(model, batch))
            optimizer.step()

    batches = digits.batches(6)
    accelerator, model, optimizer = prepared(0)
    steps(accelerator, model, optimizer, batches[:3])
    accelerator.save_state(str(tmp_path))
    steps(accelerator, model, optimizer, batches[3:])
    undisturbed = model.state_dict(), optimizer.state_dict()

    AcceleratorState._reset_state()
    accelerator, model, optimizer = prepared(1)
    accelerator.load_state(str(tmp_path))
    steps(accelerator, model, optimizer, batches[3:])
    assert digits.same((model.state_dict(), optimizer.state_dict()), undisturbed)


def test_errors() -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = digits.net()
    adam = accelerator.prepare(torch.optim.Adam(model.parameters()))
    with pytest.raises(TypeError, match=r"optimizer must be a flatmtl\.FlatMTL, but is AcceleratedOptimizer"):
        backward(accelerator, adam, lambda: [])
    flat = accelerator.prepare(digits.flat(model))
    with pytest.raises(RuntimeError, match="gradient_accumulation_steps is 2; call backward"):
        backward(accelerator, flat, lambda: [])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("DEEPSPEED", "Accelerate's DEEPSPEED is not supported: its backward pass takes one loss"),
        ("FSDP", "FSDP version 1 is not supported: set fsdp_version=2"),
    ],
)
def test_engines_are_refused(kind: str, message: str) -> None:
    """Neither runs here: an accelerator that says it is one."""

    class Engine:
        distributed_type = DistributedType[kind]
        is_fsdp2 = False

    with pytest.raises(RuntimeError, match=message):
        backward(Engine(), digits.flat(digits.net()), lambda: [])
