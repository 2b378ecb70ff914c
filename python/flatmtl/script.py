"""Gramian, weights and aggregation for code under `torch.jit.script`.

>>> @torch.jit.script
... def update(rows: list[list[Tensor]]) -> list[Tensor]:
...     return flatmtl.script.aggregate(rows, "cagrad", [0.4])

The functions of `flatmtl` with types that TorchScript knows: `rows` is a list of K lists of tensors on the CPU;
`options` are numbers in the order of flatmtl.h (none: the defaults). They can be called in eager mode too.

TorchScript hands its lists to ops of torch's stable interface without a copy, and the op takes the tensors out of them,
so that the caller's list is left empty of tensors. These functions hand over a list of their own.
"""

# No `from __future__ import annotations`: TorchScript reads the annotations.

import torch
from torch import Tensor


def gramian(rows: list[list[Tensor]]) -> Tensor:
    """Inner products of the rows, (K, K) float64."""
    result: Tensor = torch.ops.flatmtl.gramian(_flat(rows), len(rows))
    return result


def weights(gramian: Tensor, method: str, options: list[float]) -> Tensor:
    """Weights of an aggregator for a (K, K) Gramian, (K,) float64."""
    if torch.is_grad_enabled() and gramian.requires_grad:
        raise RuntimeError("flatmtl.script: gramian requires grad; call this under torch.no_grad(), or detach it")
    double = gramian.to(torch.float64).contiguous()
    result: Tensor = torch.ops.flatmtl.weights(double, method_number(method), options)
    return result


def aggregate(rows: list[list[Tensor]], method: str, options: list[float]) -> list[Tensor]:
    """The update SUM_i w_i x_i, shaped like one row."""
    result: list[Tensor] = torch.ops.flatmtl.aggregate(_flat(rows), len(rows), method_number(method), options)
    return result


def method_number(method: str) -> int:
    """The number of an aggregator, by its name."""
    names = ["sum", "mean", "fixed", "mgda", "pcgrad", "cagrad", "imtl_g", "nash_mtl", "fairgrad"]
    for number, name in enumerate(names):
        if name == method:
            return number
    raise RuntimeError("flatmtl.script: there is no aggregator " + method + "; known: " + ", ".join(names))


def _flat(rows: list[list[Tensor]]) -> list[Tensor]:
    flat: list[Tensor] = []
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise RuntimeError(f"flatmtl.script: rows[{i}] has {len(row)} tensors, rows[0] has {len(rows[0])}")
        for tensor in row:
            if torch.is_grad_enabled() and tensor.requires_grad:
                raise RuntimeError(
                    "flatmtl.script: the rows require grad; call this under torch.no_grad(), or detach them"
                )
            flat.append(tensor.contiguous())
    return flat
