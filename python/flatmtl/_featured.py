"""The end of a step whose gradients stop at the features: Gramian of the z_i, weights, one backward of the trunk.

It runs while the parameters stand where the graph was made, before they are put back.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _record
from ._clip import clip_factor
from ._task import check_square

if TYPE_CHECKING:
    from ._features import FeatureGradients
    from ._step import Step


def finish(step: Step) -> None:
    """Sets `step.update`, for the trunk, the shared parameters above the features and the tasks' own, and the record."""
    at, count = step.passes.at_features, len(step.present)
    assert at is not None or not count
    indices = [s.index for s in step.present]
    step.update = [None] * len(step.tensors)
    pair = torch.zeros(2 * count, 2 * count, dtype=torch.float64)
    nan = torch.full((count,), math.nan, dtype=torch.float64)
    weights, status = nan, torch.zeros(2, dtype=torch.int64)
    if at is not None and count:
        gramian = at.gramian(indices) * step.loss_scale**-2.0
        factors = torch.tensor([step.factor(k) for k in range(count)], dtype=torch.float64)
        gramian = gramian * torch.outer(factors, factors)
        for k, state in enumerate(step.present):
            check_square(float(gramian[k, k]), state.task, "perturbed" if step.flat else "unperturbed")
        pair[:count, :count] = gramian
        splits = getattr(step.settings.aggregator, "splits", 1)
        if splits > 1:
            gramian = at.spectra(indices, splits) * step.loss_scale**-2.0 * factors.square()
            pair[:count, :count] = gramian
        weights, _, status = step._weights(pair, gramian if step.flat else None)
        step.interrupt.check()
        _write(step, at, weights * factors if len(step.tasks) > 1 else factors, factors)
    step.record = _record.make(step, pair, weights, weights if step.flat else nan, status)


def _write(step: Step, at: FeatureGradients, weights: Tensor, factors: Tensor) -> None:
    out = step.point.saved
    rows = [s.perturbed if step.flat else s.grads for s in step.present]
    with step.interrupt.window():
        trunk = at.backward([s.index for s in step.present], weights)
    trunk_square = step.arithmetic.sq_norm(list(trunk.values()), list(trunk))
    check_square(trunk_square, "combination of the tasks", "perturbed" if step.flat else "unperturbed")
    if step.flat:
        step.point.restore()  # before the saved copies become the update
    for i, gradient in trunk.items():
        step.update[i] = out[i].copy_(gradient)
    above = [i for i in step.shared if i not in trunk and i not in at.trunk]
    if above:
        target = [out[i] for i in above]
        step.arithmetic.combine_(target, [step.point.row(r, above) for r in rows], None, above, weights, None)
        for i in above:
            step.update[i] = out[i]
    _clip(step, [*trunk, *above])
    for row, state, factor in zip(rows, step.present, factors.tolist(), strict=True):
        for i in state.own:
            if i in at.trunk or (own := row[i]) is None:
                continue
            own = own if factor == 1.0 else own * factor
            step.update[i] = out[i].copy_(own) if step.update[i] is None else out[i].add_(own)


def _clip(step: Step, indices: list[int]) -> None:
    """The combined gradient of the shared parameters to the norm max_norm at most."""
    if step.settings.max_norm is None:
        return
    update = [step.point.saved[i] for i in indices]
    square = step.arithmetic.sq_norm(update, indices) * step.loss_scale**-2.0
    factor = clip_factor(square, step.settings.max_norm)
    if factor != 1.0:
        for tensor in update:
            tensor.mul_(factor)
