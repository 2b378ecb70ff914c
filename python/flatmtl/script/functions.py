"""Gramian, weights, aggregation, loss weightings and task gradients for code under `torch.jit.script`."""

# No `from __future__ import annotations`: TorchScript reads the annotations.

import torch
from torch import Tensor


def gramian(rows: list[list[Tensor]]) -> Tensor:
    """Inner products of the rows, (K, K) float64."""
    result: Tensor = torch.ops.flatmtl.gramian(_flat(rows), len(rows))
    return result


def weights(gramian: Tensor, method: str, options: list[float], state: Tensor | None = None) -> Tensor:
    """Weights of an aggregator for a (K, K) Gramian, (K,) float64.

    state: of gradvac, (K * K,) float64, zeros at the start; changed in place. Without one it starts afresh.
    """
    if torch.is_grad_enabled() and gramian.requires_grad:
        raise RuntimeError("flatmtl.script: gramian requires grad; call this under torch.no_grad(), or detach it")
    double = gramian.to(torch.float64).contiguous()
    if state is None:
        result: Tensor = torch.ops.flatmtl.weights(double, method_number(method), options)
    else:
        result = torch.ops.flatmtl.weights_(double, method_number(method), options, state)
    return result


def aggregate(
    rows: list[list[Tensor]], method: str, options: list[float], state: Tensor | None = None
) -> list[Tensor]:  # fmt: skip
    """The update SUM_i w_i x_i, shaped like one row. state: as for `weights`."""
    if state is None:
        result: list[Tensor] = torch.ops.flatmtl.aggregate(_flat(rows), len(rows), method_number(method), options)
        return result
    # By fixed weights: TorchScript drops a mutating op that writes to the tensors of a copied list.
    solved = weights(
        gramian(rows), method, options, state
    )  # apart: TorchScript evaluates what tolist is called on twice
    values: list[float] = solved.tolist()
    update: list[Tensor] = torch.ops.flatmtl.aggregate(_flat(rows), len(rows), method_number("fixed"), values)
    return update


def buffer_update(
    rows: list[list[Tensor]], losses: Tensor, method: str, options: list[float], buffers: list[list[Tensor]],
    state: Tensor,
) -> list[Tensor]:  # fmt: skip
    """One step of GradDrop, MoCo, DB-MTL or ExcessMTL: the update, shaped like one row.

    `losses` is (K,); GradDrop and ExcessMTL do not look at it. `buffers` are K rows like `rows` (float32 for narrower
    ones) of zeros at first, and `state` `buffer_state(method, K)`; both are changed in place. GradDrop has no buffers:
    an empty list.
    """
    number = buffer_method_number(method)
    double = losses.detach().to(torch.float64).contiguous()
    memory: list[Tensor] = []
    for row in buffers:
        for tensor in row:
            if not tensor.is_contiguous():
                raise RuntimeError("flatmtl.script: buffers must be contiguous")
            memory.append(tensor)
    result: list[Tensor] = torch.ops.flatmtl.buffer_update(
        _flat(rows), len(rows), double, number, options, 0, memory, state
    )
    return result


def buffer_state(method: str, num_tasks: int) -> Tensor:
    """The state of a buffer method that starts afresh."""
    vectors = [0, 2, 1, 3, 2]
    return torch.zeros([vectors[buffer_method_number(method)] * num_tasks], dtype=torch.float64)


def buffer_method_number(method: str) -> int:
    """The number of a buffer method, by its name."""
    names = ["graddrop", "moco", "db_mtl", "excess_mtl", "sdmgrad"]
    for number, name in enumerate(names):
        if name == method:
            return number
    raise RuntimeError(f"flatmtl.script: there is no buffer method '{method}'. Known: '" + "', '".join(names) + "'")


def loss_weights(
    losses: Tensor, weighting: str, options: list[float], state: Tensor, norms: Tensor | None = None
) -> Tensor:
    """Weights of a loss weighting, (K,) float64, from (K,) losses and, for GradNorm and EMTL, norms of gradients.

    `state` is a contiguous float64 tensor on the CPU, changed in place; `loss_state` makes one.
    """
    double_norms: Tensor | None = None
    if norms is not None:
        double_norms = norms.detach().to(torch.float64).contiguous()
    double = losses.detach().to(torch.float64).contiguous()
    result: Tensor = torch.ops.flatmtl.loss_weights(double, double_norms, weighting_number(weighting), options, state)
    return result


def loss_observe(losses: Tensor, losses_after: Tensor, weighting: str, options: list[float], state: Tensor) -> None:
    """What FAMO learns from the losses of one batch before and after the update: changes `state` in place."""
    before = losses.detach().to(torch.float64).contiguous()
    after = losses_after.detach().to(torch.float64).contiguous()
    torch.ops.flatmtl.loss_observe(before, after, weighting_number(weighting), options, state)


def loss_state(weighting: str, num_tasks: int) -> Tensor:
    """The state of a weighting that starts afresh."""
    vectors = [0, 4, 5, 0, 0, 0, 2, 4, 4, 5, 1, 3, 0, 0]
    return torch.zeros([vectors[weighting_number(weighting)] * num_tasks], dtype=torch.float64)


def weighting_number(weighting: str) -> int:
    """The number of a loss weighting, by its name."""
    names = ["fixed", "uw", "dwa", "rlw", "si", "gls", "stch", "imtl_l", "famo", "gradnorm", "go4align", "slaw", "bmtl", "emtl"]  # fmt: skip
    for number, name in enumerate(names):
        if name == weighting:
            return number
    raise RuntimeError(f"flatmtl.script: there is no weighting '{weighting}'. Known: '" + "', '".join(names) + "'")


def gradients(losses: list[Tensor], params: list[Tensor]) -> list[list[Tensor | None]]:
    """The gradient of every loss, one row a loss and one entry a parameter. Frees the graph of the losses.

    An entry is None where the loss does not reach the parameter, or zeros: compiled code does not tell.
    """
    rows: list[list[Tensor | None]] = []
    for i, loss in enumerate(losses):
        row = torch.autograd.grad([loss], params, retain_graph=i + 1 < len(losses), allow_unused=True)
        rows.append(list(row))
    return rows


def method_number(method: str) -> int:
    """The number of an aggregator, by its name."""
    names = [
        "sum", "mean", "fixed", "mgda", "pcgrad", "cagrad", "imtl_g", "nash_mtl", "fairgrad", "gradvac",
        "aligned_mtl", "upgrad", "dualproj", "config", "ntkmtl",
    ]  # fmt: skip
    for number, name in enumerate(names):
        if name == method:
            return number
    raise RuntimeError(f"flatmtl.script: there is no aggregator '{method}'. Known: '" + "', '".join(names) + "'")


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
