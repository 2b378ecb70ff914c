"""flatmtl: flat-minima training for multi-task PyTorch models.

>>> optimizer = flatmtl.FlatMTL(torch.optim.Adam(model.parameters(), lr=1e-3), aggregator="cagrad", rho=0.05)
>>> for x, y in loader:
...     losses = optimizer.step(lambda: [F.cross_entropy(o, t) for o, t in zip(model(x), y)])
"""

from . import _ops as _ops  # loads the library
from . import script as script
from ._step import NonFiniteError
from .aggregators import IMTLG, MGDA, Aggregator, CAGrad, FairGrad, Fixed, Mean, NashMTL, PCGrad, Sum
from .functional import aggregate, gramian, weights
from .optimizer import FlatMTL

__version__ = "0.1.0"

__all__ = [
    "IMTLG",
    "MGDA",
    "Aggregator",
    "CAGrad",
    "FairGrad",
    "Fixed",
    "FlatMTL",
    "Mean",
    "NashMTL",
    "NonFiniteError",
    "PCGrad",
    "Sum",
    "aggregate",
    "gramian",
    "script",
    "weights",
]  # fmt: skip
