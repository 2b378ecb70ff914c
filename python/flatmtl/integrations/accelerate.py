"""FlatMTL with Hugging Face Accelerate.

`accelerator.prepare` takes a FlatMTL as any optimizer. What `accelerator.backward(loss)` is for one loss, `backward` is
for the task losses; `accelerator.clip_grad_norm_`, `optimizer.step()`, schedulers, `save_state` and `load_state` follow
as usual. In several processes `accelerator.prepare` wraps the model in DDP, and FlatMTL averages over them (`sync="auto"`).
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from ..optimizer import FlatMTL
from ._common import check_accelerator, refuse, unwrapped

_micro_batches: WeakKeyDictionary[FlatMTL, list[Any]] = WeakKeyDictionary()


def backward(accelerator: Any, optimizer: Any, closure: Any, batch: Any = None) -> Any:
    """`FlatMTL.backward` on a prepared optimizer, with the accelerator's GradScaler if it has one.

    >>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    >>> for x, y in loader:
    ...     losses = backward(accelerator, optimizer, lambda: [F.cross_entropy(o, t) for o, t in zip(model(x), y)])
    ...     accelerator.clip_grad_norm_(model.parameters(), 1.0)
    ...     optimizer.step()

    Within `accelerator.accumulate(model)` the micro-batch is given as `batch`, and the closure takes it. All passes are
    made at the last micro-batch of a step, as `FlatMTL.step(closure, batches=...)` does.

    Args:
        accelerator: the `accelerate.Accelerator`.
        optimizer: what `accelerator.prepare` made of a `flatmtl.FlatMTL`.
        closure: as for `FlatMTL.step`; called as `closure(batch)` if there is a batch.
        batch: a micro-batch.

    Returns:
        The losses, as `FlatMTL.step`; None while micro-batches are gathered.

    Raises:
        RuntimeError: `gradient_accumulation_steps` without `batch`; several processes, but the model was not prepared;
            DeepSpeed, Megatron-LM, XLA, or FSDP version 1.
        TypeError: the optimizer is not a FlatMTL.
    """
    flat = unwrapped(optimizer, "optimizer")
    check_accelerator(accelerator, flat, "give the model to accelerator.prepare")
    steps = accelerator.gradient_accumulation_steps
    if batch is None:
        refuse(steps != 1, f"gradient_accumulation_steps is {steps}; call backward(..., closure, batch) then")
        return flat.backward(closure, accelerator.scaler)
    batches = _micro_batches.setdefault(flat, [])
    batches.append(batch)
    if not accelerator.sync_gradients:
        return None
    del _micro_batches[flat]
    return flat.backward(closure, accelerator.scaler, batches=batches)
