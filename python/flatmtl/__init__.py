"""flatmtl: flat-minima training for multi-task PyTorch models.

>>> optimizer = flatmtl.FlatMTL(torch.optim.Adam(model.parameters(), lr=1e-3), aggregator="cagrad", rho=0.05)
>>> for x, y in loader:
...     losses = optimizer.step(lambda: [F.cross_entropy(o, t) for o, t in zip(model(x), y)])
"""

from . import _ops as _ops  # loads the library
from . import flatness as flatness
from . import helpers as helpers
from . import metrics as metrics
from . import regularizers as regularizers
from . import script as script
from ._agreement import RankError
from ._diagnose import Diagnosis, diagnose
from ._landscape import Landscape, landscape
from ._task import NonFiniteError
from .aggregators import (
    IMTLG,
    MGDA,
    NTKMTL,
    Aggregator,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    FairGrad,
    Fixed,
    GradVac,
    Mean,
    NashMTL,
    PCGrad,
    Sum,
    UPGrad,
)  # fmt: skip
from .buffers import DBMTL, BufferAggregator, ExcessMTL, GradDrop, MoCo, SDMGrad
from .functional import aggregate, gramian, weights
from .main_task import HydaLearn, SLGrad
from .optimizer import FlatMTL
from .weightings import (
    BMTL,
    DWA,
    EMTL,
    FAMO,
    GLS,
    IMTLL,
    RLW,
    SI,
    SLAW,
    STCH,
    UW,
    FixedWeights,
    GO4Align,
    GradNorm,
    Weighting,
)  # fmt: skip

__version__: str = _ops.core.flatmtl_version().decode()

#: Prefix of the C library for CMake: -DCMAKE_PREFIX_PATH=$(python -c "import flatmtl; print(flatmtl.cmake_prefix_path)")
cmake_prefix_path: str = str(_ops.LIBRARY_PATH.parent)

__all__ = [
    "BMTL",
    "DBMTL",
    "DWA",
    "EMTL",
    "FAMO",
    "GLS",
    "IMTLG",
    "IMTLL",
    "MGDA",
    "NTKMTL",
    "RLW",
    "SI",
    "SLAW",
    "STCH",
    "UW",
    "Aggregator",
    "AlignedMTL",
    "BufferAggregator",
    "CAGrad",
    "ConFIG",
    "Diagnosis",
    "DualProj",
    "ExcessMTL",
    "FairGrad",
    "Fixed",
    "FixedWeights",
    "FlatMTL",
    "GO4Align",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "HydaLearn",
    "Landscape",
    "Mean",
    "MoCo",
    "NashMTL",
    "NonFiniteError",
    "PCGrad",
    "RankError",
    "SDMGrad",
    "SLGrad",
    "Sum",
    "UPGrad",
    "Weighting",
    "aggregate",
    "cmake_prefix_path",
    "diagnose",
    "flatness",
    "gramian",
    "helpers",
    "landscape",
    "metrics",
    "regularizers",
    "script",
    "weights",
]  # fmt: skip
