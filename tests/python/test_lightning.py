"""flatmtl.integrations.lightning: the Trainer does what the plain loop does, bit for bit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import digits
import flatmtl
import pytest
import torch
from torch.utils.data import DataLoader

lightning = pytest.importorskip("lightning.pytorch")

from flatmtl.integrations import lightning as integration  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Automatic(integration.FlatMTLMixin, lightning.LightningModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.net = digits.net(**options)
        self.passes: list[bool] = []
        self.outputs: list[Any] = []
        self.autocast: list[bool] = []  # in backward passes

    def training_losses(self, batch: Any, batch_idx: int) -> Any:
        self.passes.append(self.perturbed_pass)
        losses = digits.losses_of(self.net, batch)
        losses["digit"].register_hook(lambda grad: self.autocast.append(torch.is_autocast_enabled("cpu")))
        self.log("digit", losses["digit"], on_step=False, on_epoch=True, batch_size=len(batch[0]))
        return losses

    def configure_optimizers(self) -> Any:
        optimizer = digits.flat(self.net)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs.append(outputs)


class Manual(lightning.LightningModule):
    def __init__(self, clip: float | None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net, self.clip = digits.net(), clip

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        if self.clip is None:
            losses = optimizer.step(lambda: digits.losses_of(self.net, batch))
        else:
            losses = optimizer.backward(lambda: digits.losses_of(self.net, batch))
            self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")
            integration.apply(optimizer)
        assert list(losses) == ["digit", "even"]

    def configure_optimizers(self) -> Any:
        return digits.flat(self.net)


def trainer(path: Path, **options: Any) -> Any:
    settings = {"max_epochs": 1, "logger": False, "enable_checkpointing": False} | options
    return lightning.Trainer(
        default_root_dir=path, accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False,
        **settings,
    )  # fmt: skip


def loader(count: int, size: int = 64) -> DataLoader[Any]:
    return DataLoader(digits.batches(count, size), batch_size=None)


def fitted(path: Path, module: Any, count: int = 4, size: int = 64, **options: Any) -> Any:
    run = trainer(path, **options)
    run.fit(module, loader(count, size))
    return run


@pytest.mark.parametrize(
    "case",
    [pytest.param("plain", marks=pytest.mark.slow), "clipped", "bf16", "f16 with GradScaler", "accumulated"],
)
def test_automatic_optimization_is_the_plain_loop(case: str, tmp_path: Path) -> None:
    module, model = Automatic(), digits.net()
    optimizer = digits.flat(model)
    options: dict[str, Any] = {}
    ours: dict[str, Any] = {}
    steps: list[Any] = digits.batches(4)
    if case == "clipped":
        options, ours = {"gradient_clip_val": 0.5}, {"clip": 0.5}
    elif case == "bf16":
        options, ours = {"precision": "bf16-mixed"}, {"autocast": torch.bfloat16}
    elif case == "f16 with GradScaler":  # a scale that overflows at first, so that a step is skipped
        scaler, other = (torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=2) for _ in range(2))
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], "gradient_clip_val": 0.5}
        ours = {"autocast": torch.float16, "scaler": other, "clip": 0.5}
    elif case == "accumulated":
        module, model = Automatic(norm=False), digits.net(norm=False)
        optimizer = digits.flat(model)
        options, ours = {"accumulate_grad_batches": 3}, {"micro": True}
        steps = [digits.batches(4)[:3], digits.batches(4)[3:]]

    run = fitted(tmp_path, module, **options)
    losses = digits.train(model, optimizer, steps, **ours)

    assert digits.same(module.net.state_dict(), model.state_dict())
    assert digits.same(run.optimizers[0].state_dict()["flatmtl"], optimizer.state_dict()["flatmtl"])
    assert run.global_step == len(steps)
    assert module.autocast
    assert not any(module.autocast)
    seen = [output for output in module.outputs if output]
    assert digits.same([output["losses"] for output in seen], losses)
    sums = [float(sum(loss.values())) for loss in losses]
    assert [float(output["loss"]) for output in seen] == pytest.approx(sums, rel=1e-6)
    if case == "f16 with GradScaler":
        assert scaler.get_scale() == other.get_scale() < 2.0**22
        assert optimizer.steps < len(steps)


def test_perturbed_passes_are_marked_and_do_not_log(tmp_path: Path) -> None:
    module = Automatic()
    run = fitted(tmp_path, module, count=2)
    assert module.passes == [False, True, True] * 2
    means = [output["losses"]["digit"] for output in module.outputs]
    torch.testing.assert_close(run.callback_metrics["digit"], torch.stack(means).mean())


@pytest.mark.parametrize("clip", [None, 0.5])
def test_manual_optimization_is_the_plain_loop(clip: float | None, tmp_path: Path) -> None:
    module, model = Manual(clip), digits.net()
    run = fitted(tmp_path, module)
    optimizer = digits.flat(model)
    digits.train(model, optimizer, digits.batches(4), clip=clip)
    assert digits.same(module.net.state_dict(), model.state_dict())
    assert digits.same(run.optimizers[0].state_dict(), optimizer.state_dict())
    assert run.global_step == 4


def test_a_run_resumed_from_a_checkpoint_is_the_undisturbed_one(tmp_path: Path) -> None:
    whole = Automatic()
    undisturbed = fitted(tmp_path, whole, max_epochs=4)
    first, second = Automatic(), Automatic(seed=1)
    run = fitted(tmp_path, first, max_epochs=2)
    run.save_checkpoint(tmp_path / "half.ckpt")
    run = trainer(tmp_path, max_epochs=4)
    run.fit(second, loader(4), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert digits.same(second.net.state_dict(), whole.net.state_dict())
    assert digits.same(run.optimizers[0].state_dict(), undisturbed.optimizers[0].state_dict())


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    module = Automatic()
    fitted(tmp_path, module, count=20, max_epochs=4)
    pixels, digit, even = digits.data()
    module.eval()
    with torch.no_grad():
        outputs = module.net(pixels[1280:])
    assert (outputs["digit"].argmax(1) == digit[1280:]).double().mean() > 0.85
    assert (outputs["even"].argmax(1) == even[1280:]).double().mean() > 0.85


# -- errors ------------------------------------------------------------------------------------------------------------


def test_the_bases_must_be_in_order() -> None:
    with pytest.raises(TypeError, match="before LightningModule in the bases of Wrong"):

        class Wrong(lightning.LightningModule, integration.FlatMTLMixin):
            pass


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    class Adam(Automatic):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

    class NotDefined(integration.FlatMTLMixin, lightning.LightningModule):
        def configure_optimizers(self) -> Any:
            self.layer = torch.nn.Linear(1, 1)
            return flatmtl.FlatMTL(torch.optim.Adam(self.parameters()))

    class OwnZeroGrad(Automatic):
        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            optimizer.zero_grad()

    class OwnStep(Automatic):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure)

    class NotAutomatic(Automatic):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    for cls, kind, message in [
        (Adam, TypeError, "configure_optimizers must be a flatmtl.FlatMTL, but is LightningAdam"),
        (NotDefined, NotImplementedError, r"NotDefined must define training_losses\(batch, batch_idx\)"),
        (OwnZeroGrad, RuntimeError, "optimizer_zero_grad of the LightningModule is overridden"),
        (OwnStep, RuntimeError, "optimizer_step of the LightningModule is overridden"),
        (NotAutomatic, RuntimeError, "in manual optimization leave it out"),
    ]:
        with pytest.raises(kind, match=message):
            fitted(tmp_path, cls(), count=1)
