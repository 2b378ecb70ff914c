"""Metrics of the multi-task literature: relative performance drop (Δm %), calibration error, Brier score, entropy.

All take tensors of any device, compute in float64, and are batched over leading dimensions: seeds, epochs or tasks can be
given at once. None keeps a state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CalibrationBins",
    "brier_score",
    "calibration_bins",
    "delta_m",
    "expected_calibration_error",
    "predictive_entropy",
]


def delta_m(
    values: Tensor | Sequence[float],
    baseline: Tensor | Sequence[float],
    higher_is_better: Sequence[bool],
    *,
    tasks: Sequence[int] | None = None,
) -> Tensor:
    r"""Δm %: mean relative change of a multi-task model against single-task baselines. **Lower is better.**

    .. math:: \Delta m = \frac{1}{M} \sum_{j=1}^M (-1)^{[\text{higher is better}_j]}\ 100\, \frac{v_j - s_j}{s_j}

    0 is the baseline and negative values are gains. This is the sign of the tables in the F-MTL paper (2211.13723) and of
    those in CAGrad, Nash-MTL, FAMO and FairGrad; the formula printed in some papers, the F-MTL paper's included, has the
    opposite sign. Papers report the mean over the last epochs of each epoch's Δm; that differs a little from the Δm of
    the mean metrics.

    Args:
        values: (..., M), the model's metrics.
        baseline: (M) or any shape that broadcasts with `values`: the single-task metrics. Positive.
        higher_is_better: the direction of each of the M metrics.
        tasks: for each metric the number of its task: the mean is then taken within each task first and over the tasks
            second, as 1904.08918 defines it. By default every metric weighs the same, as in the tables named above.

    Returns:
        float64 of shape (...), in per cent.

    Raises:
        ValueError: shapes do not fit, or a number is not finite, or a baseline is not positive.

    Example:
        >>> delta_m([75.2, 0.015], [74.0, 0.0125], higher_is_better=[True, False])
        tensor(9.1892, dtype=torch.float64)
    """
    v, s = (torch.as_tensor(t, dtype=torch.float64) for t in (values, baseline))
    s = s.to(v.device)
    count = len(higher_is_better)
    for name, t in (("values", v), ("baseline", s)):
        if t.dim() == 0 or t.shape[-1] != count:
            raise ValueError(
                f"{name} must have as many metrics in the last dimension as higher_is_better has ({count}), "
                f"but has shape {tuple(t.shape)}"
            )
        if not bool(torch.isfinite(t).all()):
            where, value = _first(t, ~torch.isfinite(t))
            raise ValueError(f"{name}{where} is {value}")
    if count == 0:
        raise ValueError("higher_is_better is empty: expected at least one metric")
    if not bool((s > 0).all()):
        where, value = _first(s, s <= 0)
        raise ValueError(f"baseline{where} is {value}, but must be positive")
    sign = torch.tensor([-100.0 if higher else 100.0 for higher in higher_is_better], dtype=torch.float64)
    change = sign.to(v.device) * (v - s) / s
    if tasks is None:
        return change.mean(-1)
    if len(tasks) != count:
        raise ValueError(f"tasks has {len(tasks)} entries, but there are {count} metrics")
    numbers = sorted(set(tasks))
    columns = [[j for j, task in enumerate(tasks) if task == number] for number in numbers]
    return torch.stack([change[..., own].mean(-1) for own in columns], -1).mean(-1)


class CalibrationBins(NamedTuple):
    """What a reliability diagram shows: (..., bins) each, float64; accuracy and confidence of an empty bin are NaN."""

    counts: Tensor
    accuracy: Tensor
    confidence: Tensor


def calibration_bins(probabilities: Tensor, target: Tensor, bins: int = 10) -> CalibrationBins:
    """Counts, accuracy and mean confidence in equal-width, right-closed bins of confidence (0, 1/bins], ..., (1-1/bins, 1].

    Confidence is the largest predicted probability; a prediction counts as right if its argmax is the target.

    Args:
        probabilities: (..., N, C), each row non-negative with sum 1: `logits.softmax(-1)`.
        target: (..., N) integer classes in [0, C).
        bins: number of bins, at least 1.

    Raises:
        TypeError, ValueError: as for the arguments above, naming the first offending entry.
    """
    correct, confidence, member = _binned(probabilities, target, bins)
    count = member.sum(-2)
    sums = (torch.einsum("...nb,...n->...b", member, t) for t in (correct, confidence))
    accuracy, mean = (t / count for t in sums)
    return CalibrationBins(count, accuracy, mean)


def expected_calibration_error(probabilities: Tensor, target: Tensor, bins: int = 10) -> Tensor:
    r"""ECE (1706.04599): :math:`\sum_b \frac{n_b}{N} |\text{accuracy}_b - \text{confidence}_b|`.

    Ten equal-width, right-closed bins by default, as in the F-MTL authors' evaluation. They report it per task, and also
    for the tasks' predictions concatenated.

    Args:
        probabilities, target, bins: as for `calibration_bins`.

    Returns:
        float64 of shape (...), in [0, 1].
    """
    correct, confidence, member = _binned(probabilities, target, bins)
    gap = torch.einsum("...nb,...n->...b", member, correct - confidence)
    return gap.abs().sum(-1) / target.shape[-1]


def brier_score(probabilities: Tensor, target: Tensor) -> Tensor:
    r"""Brier score over all classes: mean of :math:`\sum_c (p_c - [c = \text{target}])^2`, in [0, 2].

    For two classes that is twice the binary Brier score.

    Args:
        probabilities, target: as for `calibration_bins`.

    Returns:
        float64 of shape (...).
    """
    p = _check(probabilities, target)
    right = p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    # sum p^2 - 2 p_t + 1 would cancel; this does not.
    others = p.scatter(-1, target.unsqueeze(-1), 0.0)
    return ((1.0 - right) ** 2 + (others**2).sum(-1)).mean(-1)


def predictive_entropy(probabilities: Tensor) -> Tensor:
    r"""Entropy of each prediction, :math:`-\sum_c p_c \ln p_c`, in nats: 0 for a certain one, ln C for a uniform one.

    For an ensemble give the mean of its members' probabilities.

    Args:
        probabilities: (..., C), each row non-negative with sum 1.

    Returns:
        float64 of shape (...): one value a prediction, as for the histograms of in-domain and out-of-domain data.
    """
    return torch.special.entr(_check_probabilities(probabilities)).sum(-1)


def _binned(probabilities: Tensor, target: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins must be an integer >= 1, but is {bins!r}")
    p = _check(probabilities, target)
    confidence, predicted = p.max(-1)
    # Edges are rounded to the input's precision: a float32 0.3 then lies on the edge 3/10, and belongs to the bin below it.
    edges = (torch.arange(1, bins, dtype=torch.float64) / bins).to(probabilities.dtype).double().to(p.device)
    member = torch.nn.functional.one_hot(torch.bucketize(confidence, edges), bins).double()
    return (predicted == target).double(), confidence, member


def _check(probabilities: Tensor, target: Tensor) -> Tensor:
    p = _check_probabilities(probabilities)
    if (
        not isinstance(target, Tensor)
        or target.is_floating_point()
        or target.is_complex()
        or target.dtype == torch.bool
    ):
        kind = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target must be a tensor of integer classes, but is {kind}")
    if p.dim() < 2 or target.shape != p.shape[:-1]:
        raise ValueError(
            f"probabilities must be (..., N, C) and target (..., N), but they have shapes {tuple(p.shape)} and "
            f"{tuple(target.shape)}"
        )
    if target.shape[-1] == 0:
        raise ValueError("target is empty: expected at least one prediction")
    wrong = (target < 0) | (target >= p.shape[-1])
    if bool(wrong.any()):
        where, value = _first(target, wrong)
        raise ValueError(f"target{where} is {value}, but there are {p.shape[-1]} classes (leave ignored labels out)")
    return p


def _check_probabilities(probabilities: Tensor) -> Tensor:
    if not isinstance(probabilities, Tensor) or not probabilities.is_floating_point():
        kind = probabilities.dtype if isinstance(probabilities, Tensor) else type(probabilities).__name__
        raise TypeError(f"probabilities must be a floating-point tensor, but is {kind}")
    if probabilities.dim() == 0 or probabilities.shape[-1] == 0:
        raise ValueError(f"probabilities must be (..., C), but has shape {tuple(probabilities.shape)}")
    p = probabilities.detach().double()
    total = p.sum(-1)
    slack = max(1e-5, 2 * p.shape[-1] * torch.finfo(probabilities.dtype).eps)
    outside = ~((p >= 0) & (p <= 1 + slack))  # NaN too
    if bool(outside.any()):
        where, value = _first(p, outside)
        raise ValueError(f"probabilities{where} is {value}, but must be in [0, 1] (give logits.softmax(-1))")
    off = (total - 1).abs() > slack
    if bool(off.any()):
        where, value = _first(total, off)
        raise ValueError(f"probabilities{where} sum to {value}, but must sum to 1 (give logits.softmax(-1))")
    return p.clamp(max=1.0)


def _first(t: Tensor, mask: Tensor) -> tuple[str, float | int]:
    """Index, as text, and value of the first entry that the mask names."""
    index = tuple(int(i) for i in mask.nonzero()[0])
    return f"[{', '.join(map(str, index))}]" if index else "", t[index].item()
