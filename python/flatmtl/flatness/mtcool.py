"""MT-COOL: flat minima of each task in the features that the others move."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ._base import Flatness

if TYPE_CHECKING:
    from .._step import Step


@dataclass(frozen=True)
class MTCOOL(Flatness):
    """MT-COOL (2309.12090): every task is differentiated at features that the other tasks have made worse.

    With Z the features (`FlatMTL(features=)`, the modules whose outputs the heads read) and z_j = d l_j / d Z:

        delta_i = rho SUM_{j != i} z_j / ||SUM_{j != i} z_j||;  s_i, t_i: gradients of l_i where the heads read Z + delta_i

    The parameters do not move. Reconstructed from the paper's abstract, which perturbs the features that come from the
    other tasks; its bilevel schedule over sub-models and its radii are not known. Option: rho, None for the first param
    group's. Cost: K + 1 forwards, 2K backwards.
    """

    rho: float | None = None

    name = "mtcool"
    uses_rho = False
    needs_features = True

    def __post_init__(self) -> None:
        if self.rho is not None and not 0.0 <= self.rho < math.inf:
            raise ValueError(f"MTCOOL: rho is {self.rho}; it must be None or a finite number >= 0")

    def perturb(self, step: Step) -> None:
        if not step.present:
            return
        features, at = step.passes.features, step.passes.at_features
        assert features is not None  # needs_features
        assert at is not None
        rho = abs(step.params[0].rho_shared) if self.rho is None else self.rho
        sign = step.params[0].sign
        rows = [at.rows[s.index] for s in step.present]
        if step.factors is not None:  # of a weighting: the rows of the losses c_i l_i
            rows = [[z * step.factor(k) for z in row] for k, row in enumerate(rows)]
        for state, row in zip(step.present, rows, strict=True):
            others = [other for other in rows if other is not row]
            total = [torch.stack(z).sum(0) for z in zip(*others, strict=True)] or [
                torch.zeros_like(z) for z in at.rows[state.index]
            ]
            norm = math.sqrt(sum(float(z.double().square().sum()) for z in total))
            features.shift = [z * (sign * rho / norm if norm > 0.0 else 0.0) for z in total]
            try:
                step.passes.perturbed(step.micro, [state])
            finally:
                features.shift = None
