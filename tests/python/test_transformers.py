"""flatmtl.integrations.transformers: the Trainer does what the plain loop does, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import digits
import flatmtl
import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from flatmtl.integrations.transformers import FlatMTLMixin  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


class Pictures(torch.utils.data.Dataset):
    def __init__(self, start: int, stop: int) -> None:
        self.parts = [part[start:stop] for part in digits.data()]

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return dict(zip(("pixels", "digit_labels", "even_labels"), (part[i] for part in self.parts), strict=True))


class MultiTaskTrainer(FlatMTLMixin, transformers.Trainer):
    def compute_losses(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Any, Any]:
        outputs = model(inputs["pixels"])
        return digits.losses(outputs, inputs["digit_labels"], inputs["even_labels"]), outputs


def arguments(path: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {"max_steps": 4, "learning_rate": 1e-2, "optim": "adamw_torch", "weight_decay": 0.01}
    settings |= {"logging_steps": 2, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 0}
    settings |= {"per_device_train_batch_size": 64, "remove_unused_columns": False, "use_cpu": True}
    settings |= {"label_names": ["digit_labels", "even_labels"], "dataloader_pin_memory": False}
    return transformers.TrainingArguments(str(path), **settings | options)


def trained(path: Path, model: nn.Module, cls: Any = MultiTaskTrainer, resume: Any = None, **options: Any) -> Any:
    args = arguments(path, **options)
    trainer = cls(model, args, train_dataset=Pictures(0, 256), flatmtl_options={"aggregator": "pcgrad", "rho": 0.1})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class InOrder(MultiTaskTrainer):
    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("clip", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_the_trainer_is_the_plain_loop(clip: float, micro: int, tmp_path: Path) -> None:
    model, other = digits.net(norm=micro == 1), digits.net(norm=micro == 1)
    steps: list[Any] = digits.batches(4) if micro == 1 else [digits.batches(4)[:2], digits.batches(4)[2:]]
    trainer = trained(
        tmp_path, model, InOrder, max_grad_norm=clip, gradient_accumulation_steps=micro, max_steps=len(steps),
        lr_scheduler_type="constant", logging_steps=len(steps),
    )  # fmt: skip
    decayed = trainer.get_decay_parameter_names(other)
    named = dict(other.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if n in decayed], "weight_decay": 0.01},
        {"params": [p for n, p in named.items() if n not in decayed], "weight_decay": 0.0},
    ]
    optimizer = flatmtl.FlatMTL(torch.optim.AdamW(groups, lr=1e-2), aggregator="pcgrad", rho=0.1)
    losses = digits.train(other, optimizer, steps, clip=clip or None, micro=micro > 1)
    assert digits.same(model.state_dict(), other.state_dict())

    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    for task in ("digit", "even"):
        mean = torch.stack([step[task] for step in losses]).mean()
        torch.testing.assert_close(log[f"loss_{task}"], mean.item())
    assert log["loss"] == pytest.approx(log["loss_digit"] + log["loss_even"], rel=1e-5)


def test_bf16_autocast(tmp_path: Path) -> None:
    """The passes run in autocast, parameters and gradients stay float32: the plain loop under torch.autocast."""
    seen = []

    class Watched(InOrder):
        def compute_losses(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Any, Any]:
            hook = model.trunk[0].register_forward_hook(lambda module, x, out: seen.append(out.dtype))
            try:
                return super().compute_losses(model, inputs)
            finally:
                hook.remove()

    model, other = digits.net(), digits.net()
    trainer = trained(
        tmp_path, model, Watched, bf16=True, max_grad_norm=0.5, weight_decay=0.0, lr_scheduler_type="constant",
        logging_steps=4,
    )  # fmt: skip
    optimizer = flatmtl.FlatMTL(torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0), aggregator="pcgrad",
                                rho=0.1)  # fmt: skip
    losses = digits.train(other, optimizer, digits.batches(4), clip=0.5, autocast=torch.bfloat16)
    assert seen == [torch.bfloat16] * 3 * 4
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert digits.same(model.state_dict(), other.state_dict())
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    for task in ("digit", "even"):
        assert log[f"loss_{task}"] == pytest.approx(float(torch.stack([step[task] for step in losses]).mean()))

    exact = digits.net()  # and not that of float32
    trained(tmp_path, exact, InOrder, max_grad_norm=0.5, weight_decay=0.0, lr_scheduler_type="constant")
    assert not digits.same(model.state_dict(), exact.state_dict())


def test_a_run_resumed_from_a_checkpoint_is_the_undisturbed_one(tmp_path: Path) -> None:
    """With dropout and a shuffled data set: the Trainer saves torch's generators and the order."""
    model = digits.net(dropout=0.3)
    trained(tmp_path, model, max_steps=8, save_strategy="steps", save_steps=5)
    resumed = digits.net(1, dropout=0.3)
    trained(tmp_path, resumed, resume=str(tmp_path / "checkpoint-5"), max_steps=8)
    assert digits.same(model.state_dict(), resumed.state_dict())


def test_it_learns_and_evaluates(tmp_path: Path) -> None:
    trainer = trained(tmp_path, digits.net(), max_steps=60)
    metrics = trainer.evaluate(Pictures(1280, 1797))
    pixels, digit, even = digits.data()
    trainer.model.eval()
    with torch.no_grad():
        outputs = trainer.model(pixels[1280:])
        losses = digits.losses_of(trainer.model, (pixels[1280:], digit[1280:], even[1280:]))
    assert (outputs["digit"].argmax(1) == digit[1280:]).double().mean() > 0.7
    assert metrics["eval_loss"] == pytest.approx(float(sum(losses.values())), rel=0.05)  # a mean over batches there


def test_a_model_may_return_its_losses(tmp_path: Path) -> None:
    class WithLosses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = digits.net()

        def forward(self, pixels: Tensor, digit_labels: Tensor, even_labels: Tensor) -> Any:
            return {"losses": digits.losses_of(self.net, (pixels, digit_labels, even_labels))}

    class Trainer(FlatMTLMixin, transformers.Trainer):
        pass

    model = WithLosses()
    trained(tmp_path, model, Trainer, max_steps=2)
    with pytest.raises(RuntimeError, match=r"Net returned no 'losses'; define compute_losses\(model, inputs\)"):
        Trainer(digits.net(), arguments(tmp_path)).compute_losses(digits.net(), {"pixels": digits.data()[0]})
