"""F-MTL in plain PyTorch: the algorithm to read, the baseline to compare with, and the oracle of the tests.

Nothing here uses flatmtl's C core. The solves are exact and in f64, and every file follows the papers' equations
(arXiv 2211.13723 for the step); :class:`FlatMTL` takes the settings of :class:`flatmtl.FlatMTL` that belong to the
algorithm and leaves out what surrounds it (checkpoints, per-task closures, error recovery, the record of a step).

    optimizer = flatmtl.reference.FlatMTL(torch.optim.Adam(model.parameters()), aggregator="cagrad", rho=0.05)
    losses = optimizer.step(lambda: [F.cross_entropy(o, t) for o, t in zip(model(x), y)])
"""

from .aggregators import METHODS, weights
from .buffers import Buffers
from .step import FlatMTL, aggregate, gramian, step_weights
from .weightings import METHODS as WEIGHTINGS
from .weightings import Weighting

__all__ = [
    "METHODS",
    "WEIGHTINGS",
    "Buffers",
    "FlatMTL",
    "Weighting",
    "aggregate",
    "gramian",
    "step_weights",
    "weights",
]
