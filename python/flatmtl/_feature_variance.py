"""Variance of features: how differently a layer sees the samples, and how differently the tasks' layers see one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class FeatureVariance:
    r"""Relative variances of the outputs of some modules, over all samples that were fed.

    .. math:: \text{variance}_m = \frac{\sum_d \mathrm{Var}_n z_{mnd}}{\sum_d \mathrm{E}_n z_{mnd}^2},\qquad
        \text{across} = \frac{\mathrm{E}_n \sum_d \mathrm{Var}_m z_{mnd}}{\mathrm{E}_{mn} \sum_d z_{mnd}^2}

    with sample n, feature d, module m; population variances. Both lie in [0, 1] and do not change when the features are
    scaled. A small `variance` means that the layer tells the samples hardly apart; a large `across`, defined where all
    modules give features of one shape, that tasks want different features of the same sample.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)
        self._count = dict.fromkeys(self.modules, 0)
        self._mean: dict[str, Tensor] = {}
        self._spread: dict[str, float] = dict.fromkeys(self.modules, 0.0)  # SUM_n SUM_d (z - mean)^2
        self._squares: dict[str, float] = dict.fromkeys(self.modules, 0.0)
        self._across, self._comparable = 0.0, len(self.modules) > 1
        self._batch: dict[str, list[Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Takes in what the modules give inside: the features of one batch."""
        self._batch = {name: [] for name in self.modules}

        def hook(name: str) -> Any:
            return lambda module, args, output: self._batch[name].append(_rows(name, output))

        handles = [module.register_forward_hook(hook(name)) for name, module in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        parts = {}
        for name, outputs in self._batch.items():
            if not outputs:
                raise ValueError(f"features: module {name!r} was not called by the closure")
            parts[name] = torch.cat(outputs)
            self._add(name, parts[name])
        self._comparable = self._comparable and len({part.shape for part in parts.values()}) == 1
        if self._comparable:
            self._across += float(torch.stack(list(parts.values())).var(0, correction=0).sum())

    def _add(self, name: str, rows: Tensor) -> None:
        """Merges the batch's mean and spread into those so far (Chan et al.)."""
        count, mean = len(rows), rows.mean(0)
        before = self._count[name]
        self._spread[name] += float((rows - mean).square().sum())
        self._squares[name] += float(rows.square().sum())
        if before:
            gap = mean - self._mean[name]
            self._spread[name] += float(gap.square().sum()) * before * count / (before + count)
            mean = self._mean[name] + gap * (count / (before + count))
        self._mean[name], self._count[name] = mean, before + count

    @property
    def variance(self) -> dict[str, float]:
        return {name: _ratio(self._spread[name], self._squares[name]) for name in self.modules}

    @property
    def across(self) -> float:
        """NaN for a single module, or modules with features of different shapes."""
        if not self._comparable:
            return math.nan
        return _ratio(self._across, sum(self._squares.values()) / len(self.modules))


def modules_of(features: Any) -> dict[str, nn.Module]:
    """`features=` as a dict: a module, or a sequence or dict of modules."""
    if isinstance(features, nn.Module) and not isinstance(features, (nn.ModuleList, nn.ModuleDict)):
        features = [features]
    if isinstance(features, (Mapping, nn.ModuleDict)):
        named = {str(name): module for name, module in features.items()}
    elif isinstance(features, Iterable):
        named = {str(i): module for i, module in enumerate(features)}
    else:
        raise TypeError(f"features must be modules, but is {type(features).__name__}")
    for name, module in named.items():
        if not isinstance(module, nn.Module):
            raise TypeError(f"features[{name!r}] must be a torch.nn.Module, but is {type(module).__name__}")
    if not named:
        raise ValueError("features holds no module")
    return named


def _rows(name: str, output: Any) -> Tensor:
    if isinstance(output, (list, tuple)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.dim() == 0:
        raise TypeError(f"features: module {name!r} must return a tensor with samples along its first dimension")
    return output.detach().to(torch.float64).flatten(1) if output.dim() > 1 else output.detach().double()[:, None]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan
