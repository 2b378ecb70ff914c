"""flatmtl.integrations.tensorboard: what is written is what the record holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import digits
import flatmtl
import pytest
import torch
from flatmtl.integrations.tensorboard import Logger, log


class Writer:
    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert (tag, step) not in self.scalars
        self.scalars[tag, step] = value


def test_the_record_is_written() -> None:
    model = digits.net()
    optimizer, writer = digits.flat(model), Writer()
    optimizer.step(lambda: digits.losses_of(model, digits.batches(1)[0]))
    log(writer, optimizer, 7)
    last = optimizer.last
    vectors = ("losses", "perturbed_losses", "sharpness", "norms_loss", "norms_flat", "weights_loss", "weights_flat")
    expected = {
        (f"flatmtl/{name}/{t}", 7): float(last[name][i]) for name in vectors for i, t in enumerate(last["tasks"])
    }
    for name in ("cosine_loss", "cosine_flat"):
        expected[f"flatmtl/{name}/digit-even", 7] = float(last[name][0, 1])
    for name in ("pareto_stationary_loss", "pareto_stationary_flat", "skipped"):
        expected[f"flatmtl/{name}", 7] = 0.0
    assert expected.items() <= writer.scalars.items()
    known = (*vectors, "cosine_loss", "cosine_flat", "pareto_stationary_loss", "pareto_stationary_flat", "skipped")
    others = {tag for tag, _ in writer.scalars if tag.split("/")[1] not in known}
    assert {tag.split("/")[1] for tag in others} <= set(last) - {"tasks"}


def test_undefined_values_are_left_out() -> None:
    model = digits.net()
    optimizer, writer = digits.flat(model, rho=0.0), Writer()
    optimizer.step(lambda: digits.losses_of(model, digits.batches(1)[0]) | {"absent": None})
    log(writer, optimizer, prefix="train")
    tags = {tag for tag, step in writer.scalars if step == 1}
    assert len(tags) == len(writer.scalars)
    assert "train/losses/even" in tags
    assert not any("absent" in tag or "flat/" in tag or "sharpness" in tag for tag in tags)


def test_a_hook_logs_every_nth_step() -> None:
    model = digits.net()
    optimizer, writer = digits.flat(model), Writer()
    optimizer.register_step_post_hook(Logger(writer, every=2))
    digits.train(model, optimizer, digits.batches(5))
    assert sorted({step for _, step in writer.scalars}) == [2, 4]
    with pytest.raises(ValueError, match="every is 0"):
        Logger(writer, every=0)


def test_errors() -> None:
    model = digits.net()
    with pytest.raises(RuntimeError, match="nothing to log before the first step"):
        log(Writer(), digits.flat(model))
    with pytest.raises(TypeError, match="but is Adam"):
        log(Writer(), torch.optim.Adam(model.parameters()))


def test_tensorboard_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model = digits.net()
    optimizer = digits.flat(model)
    recorded: list[Any] = []
    with SummaryWriter(tmp_path) as writer:
        optimizer.register_step_post_hook(Logger(writer))
        for batch in digits.batches(3):
            optimizer.step(lambda batch=batch: digits.losses_of(model, batch))
            recorded.append(optimizer.last["sharpness"][1])
    events = EventAccumulator(str(tmp_path)).Reload()
    scalars = events.Scalars("flatmtl/sharpness/even")
    assert [scalar.step for scalar in scalars] == [1, 2, 3]
    torch.testing.assert_close(torch.tensor([s.value for s in scalars]), torch.stack(recorded).float())
    assert isinstance(optimizer, flatmtl.FlatMTL)
