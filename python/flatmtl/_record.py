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


# Dimensions, of one entry a task; 0: a flag.
_ENTRIES = {
    "losses": 1, "perturbed_losses": 1, "sharpness": 1, "loss_weights": 1, "norms_loss": 1, "norms_flat": 1,
    "cosine_loss": 2, "cosine_flat": 2, "weights_loss": 1, "weights_flat": 1, "pareto_stationary_loss": 0,
    "pareto_stationary_flat": 0, "skipped": 0,
}  # fmt: skip


def make(step: Step, pair: Tensor, weights_loss: Tensor, weights_flat: Tensor, status: Tensor) -> Any:
    """The record of a finished step. `pair` is the Gramian (2K x 2K) of the present tasks' (g, f)."""
    flat = step.flat
    at = [s.index for s in step.present]
    count, total = len(at), len(step.tasks)
    found: dict[str, Any] = {"losses": _losses(step)}
    if flat:
        values = [math.nan if s.perturbed_loss is None else float(s.perturbed_loss) for s in step.present]
        found["perturbed_losses"] = _spread(values, at, total)
        found["sharpness"] = found["perturbed_losses"] - found["losses"]
    found["loss_weights"] = _spread([step.factor(k) for k in range(count)], at, total)
    if step.shared and count:
        families = [("loss", pair[:count, :count], weights_loss)]
        if flat:
            families.append(("flat", pair[count:, count:], weights_flat))
        stationary = (status == _ops.PARETO_STATIONARY).tolist()
        for k, (family, gramian, weights) in enumerate(families):
            norms = gramian.diagonal().clamp(min=0.0).sqrt()
            if step.summed:  # the rows of the families were never apart
                norms = norms * math.nan
            cosine = (gramian / (norms[:, None] * norms)).clamp(-1.0, 1.0)  # NaN where a norm is 0
            found[f"norms_{family}"] = _spread(norms, at, total)
            if count < total:
                index, part = torch.tensor(at), cosine
                cosine = _undefined(total, total)
                cosine[index[:, None], index] = part
            found[f"cosine_{family}"] = cosine
            found[f"weights_{family}"] = _spread(weights, at, total)
            found[f"pareto_stationary_{family}"] = stationary[k]
    return _filled(step, found)


def skipped(step: Step) -> dict[str, Any]:
    """The record of a step that nonfinite="skip" left out."""
    return _filled(step, {"losses": _losses(step), "skipped": True})


def _losses(step: Step) -> Tensor:
    at = [i for i, s in enumerate(step.tasks) if s.loss is not None]
    return _spread([float(step.tasks[i].loss) for i in at], at, len(step.tasks))  # type: ignore[arg-type]


def _filled(step: Step, found: dict[str, Any]) -> dict[str, Any]:
    """A record with what was found, and undefined entries elsewhere."""
    record: dict[str, Any] = {"tasks": [s.task for s in step.tasks]}
    total = len(step.tasks)
    for key, dim in _ENTRIES.items():
        record[key] = found[key] if key in found else _undefined(*[total] * dim) if dim else False
    return {**record, "traffic_bytes": step.sync.traffic}


def _undefined(*shape: int) -> Tensor:
    return torch.full(shape, math.nan, dtype=torch.float64)


def _spread(values: Sequence[float] | Tensor, at: Sequence[int], total: int) -> Tensor:
    """`values` at the positions `at`, NaN elsewhere."""
    found = torch.tensor(values, dtype=torch.float64) if not isinstance(values, Tensor) else values.double()
    if len(at) == total:  # of all tasks, in their order
        return found.clone() if found is values else found
    out = _undefined(total)
    out[list(at)] = found
    return out
