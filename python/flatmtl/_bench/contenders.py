"""Other libraries' code for the same methods. Each is optional: what is not installed, or does not run, is named."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import random
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import flatmtl

from .. import _authors, reference

OURS, REFERENCE, TORCHJD, AUTHORS = "flatmtl", "reference", "torchjd", "papers' code"
LIBMTL, PYTORCH_OPTIMIZER, TORCH = "LibMTL", "pytorch_optimizer", "torch"

Solve = Callable[[Tensor], Tensor]  # weights from a Gramian (K, K) float64, or the update from rows (K, P)
Make = Callable[[], Solve]

_PACKAGES = {TORCHJD: "torchjd", LIBMTL: "LibMTL", PYTORCH_OPTIMIZER: "pytorch_optimizer"}
_SOLVERS_OF_PAPERS = ("scipy", "cvxpy")

# Methods whose orders are drawn: libraries draw differently, and the results differ with the order.
RANDOM = ("pcgrad", "gradvac")


def versions() -> dict[str, dict[str, Any]]:
    """Of every contender its `version`, None where it is `absent`, and then why."""
    found: dict[str, dict[str, Any]] = {
        OURS: {"version": flatmtl.__version__},
        REFERENCE: {"version": flatmtl.__version__},
        TORCH: {"version": torch.__version__},
    }
    for name, package in _PACKAGES.items():
        try:
            libmtl_weightings() if name == LIBMTL else importlib.import_module(package)
            found[name] = {"version": importlib.metadata.version(package)}
        except Exception as error:  # a library may fail at import in ways of its own
            found[name] = {"version": None, "absent": f"{type(error).__name__}: {error}"}
    solvers = [name for name in _SOLVERS_OF_PAPERS if importlib.util.find_spec(name)]
    labels = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in solvers)
    found[AUTHORS] = {"version": f"as described there; {labels or 'without scipy and cvxpy'}"}
    return found


def solvers(method: str, tasks: int) -> tuple[dict[str, Solve], dict[str, str]]:
    """Functions that give the method's weights from a ready Gramian; and why other contenders are absent."""
    found: dict[str, Make] = {OURS: lambda: lambda g: flatmtl.weights(g, method)}
    if method in reference.METHODS:
        found[REFERENCE] = lambda: lambda g: reference.weights(g, method)
    found[TORCHJD] = lambda: _torchjd_weights(_torchjd(method, tasks))
    found[AUTHORS] = lambda: _authors.solver(method)
    return _that_run(found, torch.eye(tasks, dtype=torch.float64))


def aggregations(method: str, tasks: int) -> tuple[dict[str, Solve], dict[str, str]]:
    """Functions that give the method's update, (P,), from float32 rows (K, P); and why other contenders are absent."""
    found: dict[str, Make] = {OURS: lambda: lambda rows: _tensor(flatmtl.aggregate(rows, method))}
    if method in reference.METHODS:
        found[REFERENCE] = lambda: lambda rows: _tensor(reference.aggregate(rows, method))
    found[TORCHJD] = lambda: _torchjd(method, tasks)
    found[TORCH] = lambda: _torch(method)
    found[LIBMTL] = lambda: _libmtl(method, tasks)
    if method == "pcgrad":
        found[PYTORCH_OPTIMIZER] = _pytorch_optimizer
    rows = torch.randn(tasks, 4 * tasks, generator=torch.Generator().manual_seed(0))
    return _that_run(found, rows)


def _tensor(update: Tensor | list[Tensor]) -> Tensor:
    return update  # type: ignore[return-value]  # a list for rows that are lists


def _that_run(found: dict[str, Make], argument: Tensor) -> tuple[dict[str, Solve], dict[str, str]]:
    """Those that can be made and run once on `argument`. Others lack the method, are not installed, or lack an optional
    dependency of theirs, and libraries say so by exceptions of any kind."""
    running: dict[str, Solve] = {}
    absent: dict[str, str] = {}
    for name, make in found.items():
        try:
            work = make()
            with torch.no_grad():
                work(argument)
            running[name] = work
        except Exception as error:
            if name in (OURS, REFERENCE):
                raise
            absent[name] = f"{type(error).__name__}: {error}"
    return running, absent


def _torch(method: str) -> Solve:
    """J @ J.T, the solver of the method's published code, and a product with J."""
    if method == "sum":
        return lambda rows: rows.sum(0)
    if method == "mean":
        return lambda rows: rows.mean(0)
    solve = _authors.solver(method)
    return lambda rows: solve((rows @ rows.T).double()).float() @ rows


def _torchjd(method: str, tasks: int) -> Any:
    """torchjd's aggregator with flatmtl's options."""
    theirs = importlib.import_module("torchjd.aggregation")
    factories: dict[str, Callable[[], Any]] = {
        "sum": lambda: theirs.Sum(),
        "mean": lambda: theirs.Mean(),
        "mgda": lambda: theirs.MGDA(),
        "pcgrad": lambda: theirs.PCGrad(),
        "cagrad": lambda: theirs.CAGrad(c=0.4),
        "imtl_g": lambda: theirs.IMTLG(),
        "nash_mtl": lambda: _nash(theirs.NashMTL(n_tasks=tasks)),
        "fairgrad": lambda: theirs.FairGrad(alpha=2.0),
        "gradvac": lambda: theirs.GradVac(beta=0.01),
        "aligned_mtl": lambda: theirs.AlignedMTL(),
        "upgrad": lambda: theirs.UPGrad(),
        "dualproj": lambda: theirs.DualProj(),
        "config": lambda: theirs.ConFIG(),
    }
    if method not in factories:
        raise NotImplementedError(f"torchjd has no {method}")
    return factories[method]()


def _nash(aggregator: Any) -> Solve:
    """As at the first step: it starts from the last result otherwise."""

    def call(rows: Tensor) -> Tensor:
        aggregator.reset()
        update: Tensor = aggregator(rows)
        return update

    return call


def _torchjd_weights(aggregator: Any) -> Solve:
    """The weighting alone. Where it wants the rows, it gets a K x K factor of the Gramian, and the product is undone."""
    if hasattr(aggregator, "gramian_weighting"):

        def weights(gramian: Tensor) -> Tensor:
            with torch.no_grad():
                result: Tensor = aggregator.gramian_weighting(gramian)
            return result

        return weights

    def through_rows(gramian: Tensor) -> Tensor:
        factor = torch.linalg.cholesky(gramian)
        return torch.linalg.solve(factor.T, aggregator(factor))

    return through_rows


_LIBMTL_NAMES = {"mgda": "MGDA", "pcgrad": "PCGrad", "cagrad": "CAGrad", "gradvac": "GradVac",
                 "fairgrad": "FairGrad", "upgrad": "UPGrad", "aligned_mtl": "Aligned_MTL",
                 "nash_mtl": "Nash_MTL"}  # fmt: skip
_LIBMTL_OPTIONS = {"mgda_gn": "none", "calpha": 0.4, "rescale": 1, "beta": 0.01, "GradVac_beta": 0.01, "GradVac_group_type": 0,
                   "FairGrad_alpha": 2.0, "update_weights_every": 1, "optim_niter": 20, "max_norm": 1.0,
                   "UPGrad_norm_eps": 1e-4, "UPGrad_reg_eps": 1e-4}  # fmt: skip


def libmtl_weightings() -> Any:
    """LibMTL.weighting, without the rest of LibMTL where that cannot be imported: 1.1.5 needs a module that torchvision
    removed, and its weightings do not."""
    try:
        return importlib.import_module("LibMTL.weighting")
    except ImportError:
        spec = importlib.util.find_spec("LibMTL")
        if spec is None or spec.submodule_search_locations is None:
            raise
    package = types.ModuleType("LibMTL")
    package.__path__ = list(spec.submodule_search_locations)
    for name in [name for name in sys.modules if name.partition(".")[0] == "LibMTL"]:
        del sys.modules[name]
    sys.modules["LibMTL"] = package
    try:
        return importlib.import_module("LibMTL.weighting")
    finally:
        del sys.modules["LibMTL"]  # so that an import by somebody else fails as before


def _libmtl(method: str, tasks: int) -> Solve:
    """A weighting of LibMTL that is handed the rows, in place of computing them, and whose update is taken."""
    if method not in _LIBMTL_NAMES:
        raise NotImplementedError(f"LibMTL forms no rows for {method}, or has no such method")
    base = getattr(libmtl_weightings(), _LIBMTL_NAMES[method])

    class HandedRows(base):  # type: ignore[misc, valid-type]
        def _compute_grad_dim(self) -> None:
            pass

        def _compute_grad(self, losses: Any, mode: str, rep_grad: bool = False) -> Tensor:
            rows: Tensor = self.rows
            return rows

        def _reset_grad(self, new_grads: Tensor) -> None:
            self.update = new_grads

    weighting = HandedRows()
    weighting.task_num, weighting.device, weighting.rep_grad = tasks, torch.device("cpu"), False
    weighting.init_param()
    losses = [torch.ones(()) for _ in range(tasks)]

    def call(rows: Tensor) -> Tensor:
        weighting.rows = rows
        weighting.backward(losses, **_LIBMTL_OPTIONS)
        update: Tensor = weighting.update
        return update

    return call


def _pytorch_optimizer() -> Solve:
    """The projection of its PCGrad, which sums what it projects."""
    theirs = importlib.import_module("pytorch_optimizer")
    optimizer = theirs.PCGrad(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1), reduction="sum")

    def call(rows: Tensor) -> Tensor:
        update: Tensor = optimizer.project_conflicting(list(rows), [torch.ones(1)] * len(rows))
        return update

    return call


def seed(number: int) -> None:
    """For the libraries that draw from the global generators."""
    random.seed(number)
    torch.manual_seed(number)
