"""docs/migration.md: where two libraries implement one method, its numbers agree.

The "before" is the other library where it is on PyPI, and otherwise its documented algorithm, written here.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flatmtl
import pytest
import torch
from flatmtl._bench import contenders
from models import TwoHeads, batch, closure_of, two_heads, values
from torch import Tensor, nn
from torch.optim import SGD

STEPS = 4
K = 2


def close(a: nn.Module, b: nn.Module, start: Sequence[Tensor], tolerance: float) -> None:
    """Both went the same way from `start`: every parameter to `tolerance` of how far it moved, not of its size, which
    a few steps change by so little that an update of the wrong length would pass."""
    for ours, theirs, old in zip(values(a), values(b), start, strict=True):
        assert float((ours - theirs).norm()) <= tolerance * float((theirs - old).norm())


def opposed() -> tuple[TwoHeads, TwoHeads]:
    """Two copies of a model whose second head is the negated first: with equal labels their gradients conflict."""
    models = two_heads(), two_heads()
    with torch.no_grad():
        for model in models:
            for ours, first in zip(model.heads[1].parameters(), model.heads[0].parameters(), strict=True):
                ours.copy_(-first)
    return models


def equal_labels(seed: int, tasks: int = K) -> tuple[Tensor, list[Tensor]]:
    x, y = batch(seed, tasks)
    return x, [y[0]] * tasks


def train(model: TwoHeads, optimizer: flatmtl.FlatMTL, make: Callable[..., Any] = batch, tasks: int = K) -> list[float]:
    """Cosines of the first two tasks' gradients."""
    cosines = []
    for step in range(STEPS):
        optimizer.step(closure_of(model, *make(step, tasks)))
        if tasks > 1:
            cosines.append(float(optimizer.last["cosine_loss"][0, 1]))
    return cosines


# -- SAM ---------------------------------------------------------------------------------------------------------------


class TwoCalls:
    """The algorithm of SAM's two calls: first_step climbs by rho along the gradient, second_step returns and updates."""

    def __init__(
        self, params: Sequence[nn.Parameter], base: Callable[..., Any], rho: float, adaptive: bool, **kwargs: Any
    ):
        self.params, self.rho, self.adaptive, self.base = list(params), rho, adaptive, base(params, **kwargs)

    @torch.no_grad()
    def first_step(self) -> None:
        scaled = [(p.abs() if self.adaptive else 1.0) * p.grad for p in self.params]
        norm = torch.cat([g.flatten() for g in scaled]).norm() + 1e-12
        self.start = [p.clone() for p in self.params]
        for p in self.params:
            p += self.rho * (p.square() if self.adaptive else 1.0) * p.grad / norm
            p.grad = None

    @torch.no_grad()
    def second_step(self) -> None:
        for p, start in zip(self.params, self.start, strict=True):
            p.copy_(start)
        self.base.step()
        for p in self.params:
            p.grad = None


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_in_two_calls(adaptive: bool) -> None:
    model, old = two_heads(tasks=1), two_heads(tasks=1)
    start = values(model)
    before = TwoCalls(list(old.parameters()), SGD, 0.2, adaptive, lr=0.1, momentum=0.9)
    for step in range(STEPS):
        closure = closure_of(old, *batch(step, 1))
        closure()[0].backward()
        before.first_step()
        closure()[0].backward()
        before.second_step()
    train(model, flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.2, adaptive=adaptive), tasks=1)
    close(model, old, start, 1e-10)


@pytest.mark.parametrize("adaptive", [False, True])
def test_pytorch_optimizers_sam(adaptive: bool) -> None:
    """Summed losses are one task."""
    library = pytest.importorskip("pytorch_optimizer")
    model, old = two_heads(), two_heads()
    start = values(model)
    before = library.SAM(old.parameters(), SGD, rho=0.2, adaptive=adaptive, lr=0.1, momentum=0.9)
    after = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.2, adaptive=adaptive)
    for step in range(STEPS):
        losses = closure_of(old, *batch(step))

        def closure(losses: Any = losses) -> Tensor:
            before.zero_grad()
            loss = torch.stack(losses()).sum()
            loss.backward()
            return loss

        closure()
        before.step(closure)
        ours = closure_of(model, *batch(step))
        after.step(lambda ours=ours: torch.stack(ours()).sum().reshape(()))
    close(model, old, start, 1e-6)  # theirs adds 1e-12 to the norm, in single precision


# -- PCGrad ------------------------------------------------------------------------------------------------------------


class FlatPCGrad:
    """PCGrad's pc_backward: rows over all parameters, zero where a loss does not reach; projected; and merged: the mean
    where every loss reaches, the sum elsewhere."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.params = [p for group in optimizer.param_groups for p in group["params"]]

    def pc_backward(self, losses: Sequence[Tensor]) -> None:
        grads = [torch.autograd.grad(loss, self.params, retain_graph=True, allow_unused=True) for loss in losses]
        rows = [torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(row, self.params, strict=True)]) for row in grads]  # fmt: skip
        reached = [torch.cat([torch.full((p.numel(),), g is not None) for g, p in zip(row, self.params, strict=True)]) for row in grads]  # fmt: skip
        projected = []
        for i, row in enumerate(rows):
            for j, other in enumerate(rows):  # two tasks: there is one order
                if i != j and row @ other < 0:
                    row = row - (row @ other) / other.square().sum() * other
            projected.append(row)
        merged = torch.stack(projected).sum(0)
        merged = torch.where(torch.stack(reached).all(0), merged / len(rows), merged)
        for p, part in zip(self.params, merged.split([p.numel() for p in self.params]), strict=True):
            p.grad = part.reshape(p.shape)

    def step(self) -> None:
        self.optimizer.step()


@pytest.mark.parametrize("library", ["WeiChengTseng", "pytorch_optimizer, mean", "pytorch_optimizer, sum"])
def test_pc_backward(library: str) -> None:
    """Their rows run over the heads too: shared=model. Their mean is taken where all losses reach: the trunk's rate."""
    model, old = opposed()
    start = values(model)
    if library == "WeiChengTseng":
        before: Any = FlatPCGrad(SGD(old.parameters(), lr=0.1))
    else:
        pcgrad = pytest.importorskip("pytorch_optimizer").PCGrad
        before = pcgrad(SGD(old.parameters(), lr=0.1), reduction=library.split()[1])
    trunk_lr = 0.1 if library.endswith("sum") else 0.1 / K
    groups = [{"params": model.trunk.parameters(), "lr": trunk_lr}, {"params": model.heads.parameters()}]
    after = flatmtl.FlatMTL(SGD(groups, lr=0.1), aggregator="pcgrad", rho=0.0, shared=[model])
    for step in range(STEPS):
        before.pc_backward(closure_of(old, *equal_labels(step))())
        before.step()
    cosines = train(model, after, equal_labels)
    assert max(cosines) < 0  # there was something to project
    close(model, old, start, 1e-12)


# -- TorchJD -----------------------------------------------------------------------------------------------------------

C = 0.4


def exactly() -> Any:
    """Its projector without what it adds to the Gramian."""
    return pytest.importorskip("torchjd.linalg").QuadprogProjector(norm_eps=0.0, reg_eps=0.0)


TORCHJD: dict[str, tuple[Callable[[Any], Any], flatmtl.Aggregator, float, float]] = {
    # theirs, ours, factor of theirs, tolerance: wide where theirs iterates (CAGrad, FairGrad) or adds 1e-7 (ExcessMTL)
    "Sum": (lambda a: a.Sum(), flatmtl.Sum(), 1.0, 1e-12),
    "Mean": (lambda a: a.Mean(), flatmtl.Mean(), 1.0, 1e-12),
    "Constant": (lambda a: a.Constant(torch.tensor([0.3, 2.0], dtype=torch.float64)), flatmtl.Fixed([0.3, 2.0]), 1.0, 1e-12),
    "MGDA": (lambda a: a.MGDA(epsilon=1e-12, max_iters=10000), flatmtl.MGDA(), 1.0, 1e-10),
    "PCGrad": (lambda a: a.PCGrad(), flatmtl.PCGrad(), 1.0, 1e-12),
    "IMTLG": (lambda a: a.IMTLG(), flatmtl.IMTLG(), 1.0, 1e-10),
    "CAGrad": (lambda a: a.CAGrad(c=C, norm_eps=1e-12), flatmtl.CAGrad(c=C), 1 + C**2, 1e-4),
    "FairGrad": (lambda a: a.FairGrad(alpha=2.0), flatmtl.FairGrad(alpha=2.0), 1.0, 1e-5),
    "GradVac": (lambda a: a.GradVac(beta=0.5, eps=0.0), flatmtl.GradVac(beta=0.5), 1.0, 1e-10),
    "AlignedMTL": (lambda a: a.AlignedMTL(), flatmtl.AlignedMTL(), 1 / K, 1e-10),
    "AlignedMTL, sum": (
        lambda a: a.AlignedMTL(torch.ones(K).double(), "rmse"), flatmtl.AlignedMTL(scale="rmse"), 1.0, 1e-10,
    ),
    "UPGrad": (lambda a: a.UPGrad(projector=exactly()), flatmtl.UPGrad(), 1.0, 1e-10),
    "UPGrad, preference": (
        lambda a: a.UPGrad(torch.tensor([0.3, 2.0], dtype=torch.float64), exactly()), flatmtl.UPGrad([0.3, 2.0]), 1.0, 1e-10,
    ),
    "DualProj": (lambda a: a.DualProj(projector=exactly()), flatmtl.DualProj(), 1.0, 1e-10),
    "ConFIG": (lambda a: a.ConFIG(), flatmtl.ConFIG(), 1.0, 1e-10),
    "ExcessMTL": (
        lambda a: a.ExcessMTL(robust_step_size=0.5, n_warmup_steps=1), flatmtl.ExcessMTL(eta=0.5), 1 / K, 3e-4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(TORCHJD))
def test_torchjds_mtl_backward(name: str) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    autojac = pytest.importorskip("torchjd.autojac")
    make, aggregator, factor, tolerance = TORCHJD[name]
    try:
        theirs = make(aggregation)
    except ImportError as error:  # of a solver that TorchJD leaves to an extra
        pytest.skip(str(error))
    model, old = opposed()
    start = values(model)
    optimizer = SGD(old.parameters(), lr=0.1)
    for step in range(STEPS):
        x, y = equal_labels(step)
        features = old.trunk(x)
        losses = [nn.functional.cross_entropy(head(features), t) for head, t in zip(old.heads, y, strict=True)]
        autojac.mtl_backward(losses, features=features)
        autojac.jac_to_grad(old.trunk.parameters(), theirs)
        optimizer.step()
        optimizer.zero_grad()
    groups = [{"params": model.trunk.parameters(), "lr": 0.1 * factor}, {"params": model.heads.parameters()}]
    after = flatmtl.FlatMTL(SGD(groups, lr=0.1), aggregator=aggregator, rho=0.0, family_scale=None)
    assert max(train(model, after, equal_labels)) < 0
    close(model, old, start, tolerance)


# -- LibMTL ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def double() -> Iterator[None]:
    """LibMTL makes its buffers in torch's default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def libmtl(name: str, model: TwoHeads, tasks: int) -> Any:
    """A weighting of LibMTL, as its trainer makes it part of the model."""
    if importlib.util.find_spec("LibMTL") is None:
        pytest.skip("needs LibMTL")

    class Trained(getattr(contenders.libmtl_weightings(), name)):  # type: ignore[misc]
        def get_share_params(self) -> Any:
            return model.trunk.parameters()

        def zero_grad_share_params(self) -> None:
            model.trunk.zero_grad(set_to_none=False)

    weighting = Trained()
    weighting.task_num, weighting.device, weighting.rep_grad, weighting.epoch = tasks, torch.device("cpu"), False, 0
    weighting.init_param()
    return weighting


EPOCH, RATE = 2, 0.025
LIBMTL: dict[str, tuple[dict[str, Any], dict[str, Any], int, int, float]] = {
    # their options, ours, tasks, steps, tolerance
    "EW": ({}, {"aggregator": "sum"}, 3, STEPS, 1e-12),
    "GLS": ({}, {"aggregator": "sum", "weighting": "gls"}, 3, STEPS, 1e-12),
    "UW": ({}, {"aggregator": "sum", "weighting": flatmtl.UW(lr=RATE)}, 3, STEPS, 1e-8),
    "DWA": ({"T": 2.0}, {"aggregator": "sum", "weighting": flatmtl.DWA(epoch=EPOCH)}, 3, 4 * EPOCH, 1e-12),
    "MGDA": ({"mgda_gn": "none"}, {"aggregator": "mgda"}, 2, STEPS, 1e-12),
    "PCGrad": ({}, {"aggregator": "pcgrad"}, 2, STEPS, 1e-12),
    "CAGrad": ({"calpha": C, "rescale": 1}, {"aggregator": flatmtl.CAGrad(c=C)}, 3, STEPS, 1e-4),
    "IMTL": ({}, {"aggregator": "imtl_g", "weighting": flatmtl.IMTLL(lr=RATE)}, 2, STEPS, 1e-7),
    "GradVac": ({"beta": 0.0}, {"aggregator": flatmtl.GradVac(beta=0.0)}, 2, STEPS, 1e-10),
}


@pytest.mark.parametrize("name", list(LIBMTL))
def test_libmtls_weightings(name: str, double: None) -> None:
    theirs, ours, tasks, steps, tolerance = LIBMTL[name]
    model, old = opposed() if tasks == K else (two_heads(tasks=tasks), two_heads(tasks=tasks))
    start = values(model)
    weighting = libmtl(name, old, tasks)
    optimizer = SGD(old.parameters(), lr=0.1)
    learned = torch.optim.Adam([*weighting.parameters(), nn.Parameter(torch.zeros(1))], lr=RATE)
    weighting.train_loss_buffer = torch.zeros(tasks, steps).numpy()
    for step in range(steps):
        weighting.epoch = step // EPOCH
        losses = torch.stack(closure_of(old, *equal_labels(step, tasks))())
        weighting.train_loss_buffer[:, step // EPOCH] += losses.detach().numpy() / EPOCH
        optimizer.zero_grad()
        learned.zero_grad()
        weighting.backward(losses, **theirs)
        optimizer.step()
        learned.step()
    after = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), rho=0.0, family_scale=None, **ours)
    for step in range(steps):
        after.step(closure_of(model, *equal_labels(step, tasks)))
    close(model, old, start, tolerance)


# -- nash-mtl's WeightMethods ------------------------------------------------------------------------------------------


NORM = 0.05


def nash(gramian: Tensor) -> Tensor:
    """Two tasks: G alpha = 1/alpha has the root alpha_i = 1 / (||g_i|| sqrt(1 + cos)); the repository solves it on
    G/||G||_F."""
    norms = gramian.diagonal().sqrt()
    cosine = gramian[0, 1] / norms.prod()
    return gramian.norm().sqrt() / (norms * (1 + cosine).sqrt())


def test_weight_methods_nashmtl() -> None:
    """The shared gradient is clipped there; their weights multiply the heads' gradients too, so they are kept
    out by their learning rate."""
    model, old = two_heads(), two_heads()
    start = values(model)
    base = SGD(old.trunk.parameters(), lr=0.1)
    for step in range(STEPS):
        losses = closure_of(old, *batch(step))()
        shared = list(old.trunk.parameters())
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)]) for loss in losses
        ]
        gramian = torch.stack([torch.stack([a @ b for b in rows]) for a in rows])
        base.zero_grad()
        sum(w * loss for w, loss in zip(nash(gramian), losses, strict=True)).backward()  # type: ignore[union-attr]
        length = nn.utils.clip_grad_norm_(shared, NORM)
        assert length > NORM  # the clip decides
        base.step()
    groups = [{"params": model.trunk.parameters()}, {"params": model.heads.parameters(), "lr": 0.0}]
    after = flatmtl.FlatMTL(SGD(groups, lr=0.1), aggregator="nash_mtl", rho=0.0, max_norm=NORM)
    train(model, after)
    close(model, old, start, 1e-5)  # clip_grad_norm_ adds 1e-6 to the norm


# -- the tables of names -----------------------------------------------------------------------------------------------


def test_names_in_the_tables_exist() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "migration.md"
    if not page.exists():
        pytest.skip("no docs/migration.md here")
    classes = set(re.findall(r"`flatmtl\.(\w+)[(`]", page.read_text(encoding="utf-8")))
    assert len(classes) > 15
    missing = [name for name in classes if not hasattr(flatmtl, name)]
    assert not missing
