"""Models as people have them: the step equals that of the reference, nothing moves in memory, and failures undo all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import flatmtl
import pytest
import torch
import torch.nn.functional as F
from flatmtl import reference
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

Losses = Callable[[nn.Module, int], list[Tensor]]


def regression(model: nn.Module, k: int) -> list[Tensor]:
    """Two heads on vectors of 5."""
    g = torch.Generator().manual_seed(k)
    x, y = torch.randn(12, 5, generator=g, dtype=torch.float64), torch.randn(2, 12, generator=g, dtype=torch.float64)
    return [(out.squeeze(-1) - t).square().mean() for out, t in zip(model(x), y, strict=True)]


def tokens(model: nn.Module, k: int) -> list[Tensor]:
    """Two heads on sequences of 7 tokens out of 11."""
    g = torch.Generator().manual_seed(k)
    x, y = torch.randint(0, 11, (6, 7), generator=g), torch.randint(0, 3, (2, 6), generator=g)
    return [F.cross_entropy(out, t) for out, t in zip(model(x), y, strict=True)]


def pictures(model: nn.Module, k: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(k)
    x = torch.randn(6, 3, 8, 8, generator=g, dtype=torch.float64).to(memory_format=torch.channels_last)
    y = torch.randint(0, 3, (2, 6), generator=g)
    return [F.cross_entropy(out, t) for out, t in zip(model(x), y, strict=True)]


class Heads(nn.Module):
    """A trunk and two heads."""

    def __init__(self, trunk: nn.Module, width: int, out: int = 1) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(width, out) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x)
        return [head(z) for head in self.heads]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(11, 6, padding_idx=0), nn.LSTM(6, 5, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.embed(x))[0][:, -1]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.embed(x)).mean(1)


class Tied(nn.Module):
    """One weight as embedding and as output layer of head 0: shared, reached twice by one loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.other = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.mix(self.embed(x).mean(1)).tanh()
        return [F.linear(z, self.embed.weight)[:, :3], self.other(z)]


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 6))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_() if self.use_reentrant else x
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        state = {**dict(self.inner.named_parameters()), **dict(self.inner.named_buffers())}
        return torch.func.functional_call(self.inner, state, (x,))


class Counting(nn.Module):
    """A buffer that a forward changes, and that changes the forward."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x * (1 + 0.1 * self.calls)).tanh()


def frozen() -> nn.Module:
    trunk = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6))
    trunk[0].requires_grad_(False)
    return Heads(trunk, 6)


def unused() -> nn.Module:
    model = Heads(nn.Sequential(nn.Linear(5, 6), nn.Tanh()), 6)
    model.extra = nn.Linear(3, 3)
    return model


def mlp(*middle: nn.Module) -> nn.Module:
    return Heads(nn.Sequential(nn.Linear(5, 8), *middle, nn.Tanh(), nn.Linear(8, 6)), 6)


def convolutions() -> nn.Module:
    trunk = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return Heads(trunk, 6, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


MODELS: dict[str, tuple[Callable[[], nn.Module], Losses]] = {
    "batch_norm": (lambda: mlp(nn.BatchNorm1d(8)), regression),
    "group_norm_channels_last": (convolutions, pictures),
    "dropout": (lambda: mlp(nn.Dropout(0.4)), regression),
    "lstm": (lambda: Heads(Recurrent(), 5, 3), tokens),
    "attention": (lambda: Heads(Attention(), 8, 3), tokens),
    "tied": (Tied, tokens),
    "frozen": (frozen, regression),
    "unused": (unused, regression),
    "weight_norm": (
        lambda: Heads(nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 6)), nn.Tanh()), 6),
        regression,
    ),
    "spectral_norm": (
        lambda: Heads(nn.Sequential(parametrizations.spectral_norm(nn.Linear(5, 6)), nn.Tanh()), 6),
        regression,
    ),
    "checkpoint": (lambda: Heads(Checkpointed(False), 6), regression),
    "functional_call": (lambda: Heads(Functional(), 6), regression),
    "counting": (lambda: Heads(Counting(), 6), regression),
}


def make(name: str) -> tuple[nn.Module, Losses]:
    torch.manual_seed(0)
    build, losses = MODELS[name]
    return build().double(), losses


def state(model: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for t in model.state_dict().values()]


# The reference restores the buffers of BatchNorm alone; the others are in test_buffers_change_as_without_perturbation.
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("counting", "spectral_norm")])
def test_equals_the_reference(name: str) -> None:
    results = []
    for cls in (flatmtl.FlatMTL, reference.FlatMTL):
        model, losses = make(name)
        optimizer: Any = cls(SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.2)
        pointers = [p.data_ptr() for p in model.parameters()]
        torch.manual_seed(7)
        for k in range(3):
            optimizer.step(lambda model=model, losses=losses, k=k: losses(model, k))
        assert [p.data_ptr() for p in model.parameters()] == pointers
        results.append([*state(model), torch.get_rng_state()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["counting", "spectral_norm", "batch_norm", "functional_call"])
def test_buffers_change_as_without_perturbation(name: str) -> None:
    model, losses = make(name)
    plain, _ = make(name)
    flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), rho=0.2).step(lambda: losses(model, 0))
    losses(plain, 0)
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("call", [1, 2])
def test_a_failure_undoes_all(name: str, call: int) -> None:
    model, losses = make(name)
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.2)
    optimizer.step(lambda: losses(model, 0))
    before, rng, calls = [*state(model)], torch.get_rng_state(), iter(range(9))
    inner = copy.deepcopy(optimizer.state_dict())

    def failing() -> list[Tensor]:
        values = losses(model, 1)
        if next(calls) == call:
            raise RuntimeError("injected")
        return values

    with pytest.raises(RuntimeError, match="injected"):
        optimizer.step(failing)
    assert all(map(torch.equal, before, state(model)))
    assert torch.equal(rng, torch.get_rng_state())
    after = optimizer.state_dict()
    assert inner["flatmtl"] == after["flatmtl"]
    for key, value in inner["state"].items():
        assert all(torch.equal(v, after["state"][key][n]) for n, v in value.items())


def test_unreached_and_frozen_parameters_keep_no_gradient() -> None:
    model, losses = make("unused")
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1, weight_decay=0.1), rho=0.2)
    before = [p.detach().clone() for p in model.extra.parameters()]  # type: ignore[union-attr]
    optimizer.step(lambda: losses(model, 0))
    for p, old in zip(model.extra.parameters(), before, strict=True):  # type: ignore[union-attr]
        assert p.grad is None
        assert torch.equal(p, old)
    model, losses = make("frozen")
    flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), rho=0.2).step(lambda: losses(model, 0))
    assert model.trunk[0].weight.grad is None  # type: ignore[index, union-attr]


def test_reentrant_checkpointing_says_what_is_wrong() -> None:
    # torch.autograd.grad passes its parameters by without a word (torch 2.13)
    torch.manual_seed(0)
    model = Heads(Checkpointed(True), 6).double()
    before = state(model)
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        optimizer.step(lambda: regression(model, 0))
    assert all(map(torch.equal, before, state(model)))


def test_compiled_module_equals_the_eager_one() -> None:
    results = []
    for compiled in (False, True):
        model, losses = make("batch_norm")
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), rho=0.2, modules=[model], shared=[model.trunk])  # type: ignore[list-item]
        for k in range(2):
            optimizer.step(lambda forward=forward, losses=losses, k=k: losses(forward, k))  # type: ignore[misc]
        results.append(state(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_parametrized_weights_stay_parametrized() -> None:
    model, losses = make("weight_norm")
    flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1)).step(lambda: losses(model, 0))
    assert parametrize.is_parametrized(model.trunk[0], "weight")  # type: ignore[index]
