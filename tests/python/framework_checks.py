"""What every rank checks for test_framework_ranks.py: two processes with half of the batch each train as one does with
all of it. Functions of (rank, size, ...) that `RankPool` runs."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import digits
import pytest
import torch
import torch.distributed as dist
from sync_checks import same_bits
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor, Tensor]


@contextmanager
def launched(rank: int, size: int) -> Iterator[None]:
    """The environment that torchrun gives. The process group is there already."""
    ours = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    ours |= {"OMP_NUM_THREADS": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update({name: str(value) for name, value in ours.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def free_port() -> int:
    """For a store that nobody uses; the same on all ranks."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = [s.getsockname()[1]]
    dist.broadcast_object_list(port)
    return int(port[0])


def net(seed: int = 0, **options: Any) -> nn.Module:
    return digits.net(seed, **{"norm": False} | options).double()


def data(count: int) -> Batch:
    pixels, digit, even = (part[:count] for part in digits.data())
    return pixels.double(), digit, even


def alone(steps: list[Any], decay: float = 1.0, **options: Any) -> tuple[nn.Module, list[Any]]:
    """The plain loop in this process alone."""
    model = net()
    _, losses = digits.plain(model, steps, decay=decay, sync=None, **options)
    return model, losses


def equal_models(a: nn.Module, b: nn.Module) -> None:
    for (name, s), t in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(s, t, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
    assert same_bits(*a.parameters())


def equal_shards(sharded: nn.Module, whole: nn.Module) -> None:
    """Of a model in FSDP2."""
    for s, t in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert isinstance(s, torch.distributed.tensor.DTensor)
        torch.testing.assert_close(s.full_tensor(), t, rtol=1e-9, atol=1e-11)


# -- Accelerate --------------------------------------------------------------------------------------------------------


def accelerate_loop(rank: int, size: int, micro: int, folder: str) -> None:
    """Batches of 32 dealt out by Accelerate are steps of 64; a run resumed from save_state ends where it would have."""
    import accelerated
    from accelerate.state import AcceleratorState
    from flatmtl.integrations.accelerate import backward

    def prepared(seed: int) -> Any:
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data(32 * size * 4)), batch_size=32)
        parts = accelerated.prepared(net(seed), loader, micro=micro)
        assert parts[0].num_processes == size
        return parts

    with accelerated.alone(), launched(rank, size):
        accelerator, model, *others = prepared(0)
        assert isinstance(model, nn.parallel.DistributedDataParallel)
        record = accelerated.train(accelerator, model, *others, clip=0.5)
        pieces = list(zip(*(part.split(32 * size) for part in data(32 * size * 4)), strict=True))
        steps: list[Any] = pieces if micro == 1 else [pieces[k : k + micro] for k in range(0, 4, micro)]
        # Accelerate steps the scheduler once a process
        other, losses = alone(steps, 0.9**size, clip=0.5, micro=micro > 1)
        equal_models(accelerator.unwrap_model(model), other)
        for a, b in zip(record, losses, strict=True):
            torch.testing.assert_close(a, b)

        accelerator.save_state(folder)
        accelerated.train(accelerator, model, *others)
        AcceleratorState._reset_state()
        accelerator, resumed, *others = prepared(1)
        accelerator.load_state(folder)
        accelerated.train(accelerator, resumed, *others)
        assert digits.same(model.state_dict(), resumed.state_dict())

        bare = net()
        with pytest.raises(RuntimeError, match=r"2 processes, .*each would train for itself; give the model to"):
            backward(accelerator, digits.flat(bare), lambda: digits.losses_of(bare, pieces[0]), pieces[0])


def accelerate_fsdp(rank: int, size: int) -> None:
    import accelerate
    import accelerated

    with accelerated.alone(), launched(rank, size):
        accelerated.force_fsdp2(accelerate.Accelerator(cpu=True).state)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data(32 * size * 4)), batch_size=32)
        parts = accelerated.prepared(net(), loader)
        accelerated.train(*parts, clip=0.5)
        pieces = list(zip(*(part.split(32 * size) for part in data(32 * size * 4)), strict=True))
        equal_shards(parts[1], alone(pieces, 0.9**size, clip=0.5)[0])


# -- Lightning ---------------------------------------------------------------------------------------------------------


def lightning_fit(rank: int, size: int, form: str, folder: str) -> None:
    """Batches of 32 on every rank: steps of 64."""
    import lightning.pytorch as pl
    from flatmtl.integrations.lightning import FlatMTLMixin
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    class Automatic(FlatMTLMixin, pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net(rank if form == "ddp" else 0)  # DDP makes them equal

        def configure_model(self) -> None:
            if form == "fsdp" and not hasattr(self, "done"):
                self.done = fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def training_losses(self, batch: Any, batch_idx: int) -> Any:
            losses = digits.losses_of(self.net, batch)
            self.log_dict(losses, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(batch[0]))
            return losses

        def configure_optimizers(self) -> Any:
            return digits.flat(self.net)

    class Manual(Automatic):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().step(lambda: digits.losses_of(self.net, batch))

    options: dict[str, Any] = {"gradient_clip_val": 0.5} if form == "ddp" else {}
    if form == "accumulated":
        options["accumulate_grad_batches"] = 2
    strategy: Any = DDPStrategy(process_group_backend="gloo")
    if form == "fsdp":
        strategy = ModelParallelStrategy(size, 1, process_group_backend="gloo")
    module = Manual() if form == "manual" else Automatic()
    parts = torch.utils.data.TensorDataset(*data(256))
    sampler: Any = torch.utils.data.DistributedSampler(parts, size, rank, shuffle=False)  # Lightning's would shuffle
    with launched(rank, size):
        trainer = pl.Trainer(
            max_epochs=1, logger=False, enable_checkpointing=False, default_root_dir=folder, accelerator="cpu",
            devices=size, enable_progress_bar=False, enable_model_summary=False, strategy=strategy,
            plugins=[TorchElasticEnvironment()], **options,
        )  # fmt: skip
        assert trainer.world_size == size
        trainer.fit(module, torch.utils.data.DataLoader(parts, batch_size=32, sampler=sampler))
    pieces = list(zip(*(part.split(64) for part in data(256)), strict=True))
    micro = form == "accumulated"
    steps: list[Any] = [pieces[:2], pieces[2:]] if micro else pieces
    other, losses = alone(steps, clip=options.get("gradient_clip_val"), micro=micro)
    assert trainer.global_step == len(steps)
    if form == "fsdp":
        equal_shards(module.net, other)
    else:
        equal_models(module.net, other)
    if form == "ddp":
        mean = torch.stack([loss["digit"] for loss in losses]).mean()
        torch.testing.assert_close(trainer.callback_metrics["digit"], mean, check_dtype=False)


# -- Transformers' Trainer ---------------------------------------------------------------------------------------------


def trainer_class() -> Any:
    import transformers
    from flatmtl.integrations.transformers import FlatMTLMixin

    class MultiTaskTrainer(FlatMTLMixin, transformers.Trainer):
        def compute_losses(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Any, Any]:
            outputs = model(inputs["pixels"])
            return digits.losses(outputs, inputs["digit"], inputs["even"]), outputs

        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return MultiTaskTrainer


def trainer_of(cls: Any, model: nn.Module, folder: str, steps: int, micro: int = 1, **options: Any) -> Any:
    import transformers

    examples = [dict(zip(("pixels", "digit", "even"), row, strict=True)) for row in zip(*data(256), strict=True)]
    arguments = transformers.TrainingArguments(
        folder, max_steps=steps, learning_rate=1e-2, optim="adamw_torch", weight_decay=0.0, max_grad_norm=0.5,
        lr_scheduler_type="constant", logging_steps=steps, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=32, gradient_accumulation_steps=micro, remove_unused_columns=False, use_cpu=True,
        ddp_backend="gloo", dataloader_pin_memory=False, **options,
    )  # fmt: skip
    return cls(model, arguments, train_dataset=examples, flatmtl_options={"aggregator": "pcgrad"})


def trainer_run(rank: int, size: int, micro: int, folder: str) -> None:
    """Batches of 32 dealt out by the Trainer are steps of 64; a run resumed from a checkpoint is the undisturbed one."""
    import accelerated

    pieces = list(zip(*(part.split(64) for part in data(256)), strict=True))
    steps: list[Any] = pieces if micro == 1 else [pieces[:2], pieces[2:]]

    def trained(seed: int, resume: str | None = None) -> Any:
        with accelerated.alone():
            trainer = trainer_of(
                trainer_class(), net(seed), folder, len(steps), micro, save_strategy="steps", save_steps=len(steps) // 2
            )
            assert trainer.args.world_size == size
            trainer.train(resume_from_checkpoint=resume)
            assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
        return trainer

    with launched(rank, size):
        trainer = trained(0)
        other, losses = alone(steps, clip=0.5, micro=micro > 1)
        equal_models(trainer.model, other)
        log = next(entry for entry in trainer.state.log_history if "loss" in entry)
        for task in ("digit", "even"):
            assert log[f"loss_{task}"] == pytest.approx(float(torch.stack([loss[task] for loss in losses]).mean()))
        assert log["loss"] == pytest.approx(log["loss_digit"] + log["loss_even"], rel=1e-4)
        resumed = trained(1, os.path.join(folder, f"checkpoint-{len(steps) // 2}"))
        assert digits.same(trainer.model.state_dict(), resumed.model.state_dict())


def trainer_fsdp(rank: int, size: int, folder: str) -> None:
    """FSDP2, forced on the CPU as for Accelerate."""
    import accelerated

    class Forced(trainer_class()):  # type: ignore[misc]
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            assert self.args.fsdp_plugin_args["fsdp_version"] == 2
            assert not self.is_fsdp_enabled
            accelerated.force_fsdp2(self.accelerator.state)
            self.is_fsdp_enabled = True

    pieces = list(zip(*(part.split(64) for part in data(256)), strict=True))
    with launched(rank, size), accelerated.alone():
        trainer = trainer_of(Forced, net(), folder, len(pieces), save_strategy="no", fsdp=True)
        trainer.train()
        equal_shards(trainer.model, alone(pieces, clip=0.5)[0])
