"""FlatMTL in Lightning (`lightning.pytorch` or `pytorch_lightning`, 2.x).

In automatic optimization Lightning's own closure runs `training_step`, `zero_grad` and `backward` once, for one loss.
F-MTL needs the task losses apart and evaluates them several times, so `FlatMTLMixin` makes its passes within
`training_step` and turns `zero_grad` and `backward` off; clipping, hooks, precision plugins, schedulers, callbacks and
checkpoints work as they do with any optimizer.

In several processes (`Trainer(strategy="ddp")`, or a ModelParallelStrategy with FSDP2) FlatMTL averages over them.

In manual optimization nothing is needed but `self.optimizers().step(closure)`; to clip in between there is `apply`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..optimizer import FlatMTL
from ._common import check_processes, refuse, total, unwrapped

_OVERRIDDEN = "{0} of the LightningModule is overridden; it must call super().{0}(...)"


class FlatMTLMixin:
    """First base of a LightningModule whose `configure_optimizers` gives a `flatmtl.FlatMTL`.

    `training_losses(batch, batch_idx)` takes the place of `training_step` and returns the task losses, as a closure of
    `FlatMTL.step` does. It is evaluated K + 1 times a step, so `self.log` counts in the first pass only, and what else
    may happen only once belongs behind `if not self.perturbed_pass:`. `training_step` gives the sum of the losses as
    "loss", and the losses as "losses", to `on_train_batch_end`. With `accumulate_grad_batches` all passes are made at
    the last micro-batch, as `FlatMTL.step(closure, batches=...)` does; at the others there is no loss yet (several
    processes: a "loss" of 0, which Lightning asks for).

    >>> class Net(FlatMTLMixin, lightning.LightningModule):
    ...     def training_losses(self, batch, batch_idx):
    ...         x, y = batch
    ...         return {"digit": F.cross_entropy(self.digit(x), y[0]), "even": F.cross_entropy(self.even(x), y[1])}
    ...     def configure_optimizers(self):
    ...         return flatmtl.FlatMTL(torch.optim.Adam(self.parameters()), rho=0.05)
    """

    #: Whether `training_losses` is being evaluated at perturbed parameters.
    perturbed_pass: bool = False

    _stepping = False  # inside optimizer_step
    _micro_batches: list[tuple[Any, int]]
    _kept: tuple[Tensor, ...] = ()  # parameters that have a .grad after the passes

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._micro_batches = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[cls.__mro__.index(FlatMTLMixin) :: -1]:
            if base.__name__ == "LightningModule":
                raise TypeError(f"FlatMTLMixin must stand before LightningModule in the bases of {cls.__name__}")

    def training_losses(self, batch: Any, batch_idx: int) -> Any:
        """To be defined: the task losses of a batch, in a form that `FlatMTL.step` takes."""
        raise NotImplementedError(f"{type(self).__name__} must define training_losses(batch, batch_idx)")

    # -- Lightning's hooks -----------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any] | None:
        trainer = self.trainer  # type: ignore[attr-defined]
        optimizer = self._checked_optimizer()
        batches = self._micro_batches
        batches.append((batch, batch_idx))
        if not self._stepping:  # Lightning gathers micro-batches; the passes are made at the last one
            refuse(len(batches) >= trainer.accumulate_grad_batches, _OVERRIDDEN.format("optimizer_step"))
            # None in several processes is an error of Lightning's
            return None if trainer.world_size == 1 else {"loss": torch.zeros((), device=self.device)}  # type: ignore[attr-defined]
        self._micro_batches = []
        plugin = trainer.precision_plugin
        seen = set()

        def closure(micro: tuple[Any, int]) -> Any:
            self.perturbed_pass = micro[1] in seen
            seen.add(micro[1])
            with plugin.train_step_context():
                return self.training_losses(*micro)

        try:
            # Lightning has entered autocast; backward passes and F-MTL's own arithmetic do not belong there.
            with torch.autocast(self.device.type, enabled=False):  # type: ignore[attr-defined]
                losses = optimizer.backward(closure, getattr(plugin, "scaler", None), batches=batches)
        finally:
            self.perturbed_pass = False
        params = (p for group in optimizer.param_groups for p in group["params"])
        self._kept = tuple(p for p in params if p.grad is not None)
        loss = total(losses) * trainer.accumulate_grad_batches  # which Lightning divides it by
        return {"loss": loss, "losses": losses}

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the gradients are there."""
        refuse(
            self._stepping and any(p.grad is None for p in self._kept),
            _OVERRIDDEN.format("optimizer_zero_grad") + " and not clear the gradients",
        )

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Does nothing: Lightning calls it between `training_step` and `backward`."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        self._stepping = True
        try:
            with _closure_first(unwrapped(optimizer, "the optimizer of configure_optimizers")):
                super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)  # type: ignore[misc]
        finally:
            self._stepping = False

    def log(self, *args: Any, **kwargs: Any) -> None:
        if not self.perturbed_pass:
            super().log(*args, **kwargs)  # type: ignore[misc]

    # -- checks ----------------------------------------------------------------------------------------------------

    def _checked_optimizer(self) -> FlatMTL:
        trainer = self.trainer  # type: ignore[attr-defined]
        refuse(
            not self.automatic_optimization,  # type: ignore[attr-defined]
            "FlatMTLMixin is for automatic optimization; in manual optimization leave it out and call "
            "self.optimizers().step(closure)",
        )
        strategy = type(trainer.strategy).__name__
        refuse(strategy.startswith("DeepSpeed"), f"{strategy} is not supported: its backward pass takes one loss")
        optimizers = self.optimizers()  # type: ignore[attr-defined]
        optimizer = unwrapped(optimizers, "the optimizer of configure_optimizers")
        check_processes(optimizer, trainer.world_size, 'use Trainer(strategy="ddp")')
        return optimizer


def apply(optimizer: Any) -> None:
    """In manual optimization: applies the `.grad` that `backward` left, as `step()` without a closure.

    Lightning's own `self.optimizers().step()` passes an empty closure on, which FlatMTL refuses; a step past Lightning
    would not be counted in `trainer.global_step`.

    >>> optimizer = self.optimizers()
    >>> losses = optimizer.optimizer.backward(closure)
    >>> self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
    >>> flatmtl.integrations.lightning.apply(optimizer)

    Args:
        optimizer: what `self.optimizers()` gave.
    """
    with _closure_first(unwrapped(optimizer, "optimizer")):
        optimizer.step()


@contextmanager
def _closure_first(optimizer: FlatMTL) -> Iterator[None]:
    """Inside, `optimizer.step(closure)` is that of torch's own optimizers: it calls the closure once, then updates."""
    before = optimizer.__dict__.get("step")  # a scheduler has put its own there
    original = optimizer.step

    def step(closure: Any = None) -> Any:
        result = None if closure is None else closure()
        original()
        return result

    optimizer.step = step  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        if before is None:
            del optimizer.step
        else:
            optimizer.step = before  # type: ignore[method-assign]
