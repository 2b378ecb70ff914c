"""F-MTL for code under `torch.jit.script`: the pieces as functions, and whole steps as modules.

>>> @torch.jit.script
... def update(rows: list[list[Tensor]]) -> list[Tensor]:
...     return flatmtl.script.aggregate(rows, "cagrad", [0.4])

The functions are those of `flatmtl` with types that TorchScript knows: `rows` is a list of K lists of tensors on the
CPU; `options` are numbers in the order of flatmtl.h (none: the defaults). `SGD` and `Adam` are optimizers as modules, to
be scripted, saved, loaded without Python and trained on there. All can be used in eager mode too.

TorchScript hands its lists to ops of torch's stable interface without a copy, and the op takes the tensors out of them,
so that the caller's list is left empty of tensors. What is here hands over a list of its own.
"""

from .functions import (
    aggregate,
    buffer_method_number,
    buffer_state,
    buffer_update,
    gradients,
    gramian,
    loss_observe,
    loss_state,
    loss_weights,
    method_number,
    weighting_number,
    weights,
)
from .optimizers import SGD, Adam

__all__ = [
    "SGD",
    "Adam",
    "aggregate",
    "buffer_method_number",
    "buffer_state",
    "buffer_update",
    "gradients",
    "gramian",
    "loss_observe",
    "loss_state",
    "loss_weights",
    "method_number",
    "weighting_number",
    "weights",
]
