"""FlatMTL in Hugging Face Transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..optimizer import FlatMTL
from ._common import check_accelerator, named, refuse, total, unwrapped


class FlatMTLMixin:
    """First base of a `transformers.Trainer` that trains on several losses.

    The optimizer that the Trainer makes, or is given, is wrapped in a `flatmtl.FlatMTL` with the options
    `flatmtl_options`, unless it is one. `compute_losses` gives the task losses. Their sum is the Trainer's loss, and the
    log has each as `loss_NAME`; in evaluation they are added up too. Clipping (`max_grad_norm`), accumulation (the
    losses are means over the micro-batches), schedulers, checkpoints and `resume_from_checkpoint` work as they do with
    any optimizer. In several processes (torchrun) the losses and gradients are means over them too, and
    `compute_losses` gets the model in DDP.

    >>> class MultiTaskTrainer(FlatMTLMixin, transformers.Trainer):
    ...     def compute_losses(self, model, inputs):
    ...         outputs = model(inputs["pixels"])
    ...         losses = {name: F.cross_entropy(outputs[name], inputs[f"{name}_labels"]) for name in ("digit", "even")}
    ...         return losses, outputs
    >>> trainer = MultiTaskTrainer(model, args, train_dataset=data, flatmtl_options={"rho": 0.05})

    Args:
        flatmtl_options: keyword arguments of `flatmtl.FlatMTL`.
    """

    def __init__(self, *args: Any, flatmtl_options: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self.flatmtl_options = dict(flatmtl_options or {})
        self._task_losses: dict[str, list[Tensor]] = {}  # since the last log
        self._micro_batches: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def compute_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, Any]:
        """The task losses, in a form that `FlatMTL.step` takes, and the model's outputs.

        By default the model returns its losses as "losses". Evaluated K + 1 times a step.
        """
        outputs = model(**inputs)
        losses = outputs.get("losses") if isinstance(outputs, Mapping) else None
        if losses is None:
            raise RuntimeError(
                f"flatmtl: {type(model).__name__} returned no 'losses'; define compute_losses(model, inputs), which "
                "returns the task losses and the outputs"
            )
        return losses, outputs

    # -- the Trainer's methods -------------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if not isinstance(self.optimizer, FlatMTL):  # type: ignore[has-type]
            self.optimizer = FlatMTL(self.optimizer, **self.flatmtl_options)  # type: ignore[has-type]
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        gpus = self.args.n_gpu  # type: ignore[attr-defined]
        refuse(gpus > 1, f"nn.DataParallel over {gpus} GPUs is not supported; start one process a GPU with torchrun")
        optimizer = unwrapped(self.optimizer, "the Trainer's optimizer")
        accelerator = self.accelerator  # type: ignore[attr-defined]
        check_accelerator(accelerator, optimizer, "let the Trainer wrap the model")
        model.train()
        self._micro_batches.append(self._prepare_inputs(inputs))  # type: ignore[attr-defined]
        if not accelerator.sync_gradients:  # all passes are made at the last micro-batch
            return torch.zeros((), device=self.args.device)  # type: ignore[attr-defined]
        batches, self._micro_batches = self._micro_batches, []

        def closure(micro: dict[str, Any]) -> Any:
            with self.compute_loss_context_manager():  # type: ignore[attr-defined]
                return self.compute_losses(model, micro)[0]

        losses = optimizer.backward(closure, accelerator.scaler, batches=batches)
        for task, loss in named(losses).items():
            self._task_losses.setdefault(task, []).append(loss)
        return total(losses)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        losses, outputs = self.compute_losses(model, inputs)
        return (total(losses), outputs) if return_outputs else total(losses)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            for task, values in self._task_losses.items():
                logs[f"loss_{task}"] = torch.stack(values).mean().item()
            self._task_losses = {}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
