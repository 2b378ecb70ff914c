"""`optimizer.last`: what a step did, in CPU f64 tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _ops

if TYPE_CHECKING:
    from ._step import Step


def make(step: Step, pair: Tensor, weights_loss: Tensor, weights_flat: Tensor, status: Tensor) -> Any:
    """The record of a finished step. `pair` is the Gramian (2K x 2K) of the present tasks' (g, f)."""
    flat = step.flat
    at = [s.index for s in step.present]
    count, total = len(at), len(step.tasks)
    record = _empty(step)
    if flat:
        values = [math.nan if s.perturbed_loss is None else float(s.perturbed_loss) for s in step.present]
        record["perturbed_losses"] = _spread(values, at, total)
        record["sharpness"] = record["perturbed_losses"] - record["losses"]
    record["loss_weights"] = _spread([step.factor(k) for k in range(count)], at, total)
    if step.shared and count:
        families = [("loss", pair[:count, :count], weights_loss)]
        if flat:
            families.append(("flat", pair[count:, count:], weights_flat))
        for k, (family, gramian, weights) in enumerate(families):
            norms = gramian.diagonal().clamp(min=0.0).sqrt()
            if step.summed:  # the rows of the families were never apart
                norms = norms * math.nan
            cosine = (gramian / (norms[:, None] * norms)).clamp(-1.0, 1.0)  # NaN where a norm is 0
            record[f"norms_{family}"] = _spread(norms, at, total)
            if count == total:
                record[f"cosine_{family}"] = cosine
            else:
                index = torch.tensor(at)
                record[f"cosine_{family}"][index[:, None], index] = cosine
            record[f"weights_{family}"] = _spread(weights, at, total)
            record[f"pareto_stationary_{family}"] = bool(status[k] == _ops.PARETO_STATIONARY)
    return record


def skipped(step: Step) -> dict[str, Any]:
    """The record of a step that nonfinite="skip" left out."""
    return {**_empty(step), "skipped": True}


def _empty(step: Step) -> dict[str, Any]:
    total = len(step.tasks)
    with_loss = [i for i, s in enumerate(step.tasks) if s.loss is not None]

    def undefined(*shape: int) -> Tensor:
        return torch.full(shape, math.nan, dtype=torch.float64)

    return {
        "tasks": [s.task for s in step.tasks],
        "losses": _spread([float(step.tasks[i].loss) for i in with_loss], with_loss, total),  # type: ignore[arg-type]
        "perturbed_losses": undefined(total),
        "sharpness": undefined(total),
        "loss_weights": undefined(total),
        "norms_loss": undefined(total),
        "norms_flat": undefined(total),
        "cosine_loss": undefined(total, total),
        "cosine_flat": undefined(total, total),
        "weights_loss": undefined(total),
        "weights_flat": undefined(total),
        "pareto_stationary_loss": False,
        "pareto_stationary_flat": False,
        "skipped": False,
        "traffic_bytes": step.sync.traffic,
    }


def _spread(values: Sequence[float] | Tensor, at: Sequence[int], total: int) -> Tensor:
    """`values` at the positions `at`, NaN elsewhere."""
    found = torch.tensor(values, dtype=torch.float64) if not isinstance(values, Tensor) else values.double()
    if len(at) == total:  # of all tasks, in their order
        return found.clone() if found is values else found
    out = torch.full((total,), math.nan, dtype=torch.float64)
    out[list(at)] = found
    return out
