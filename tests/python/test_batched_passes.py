"""batched="passes": all perturbed passes as one, under torch.vmap; the same step within rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flatmtl
import pytest
import torch
import torch.nn.functional as F
from models import batch, closure_of, equal, two_heads, values
from torch import Tensor, nn
from torch.optim import SGD

STEPS = 3


def trained(model: nn.Module, closure: Callable[[], Any], batched: object, **options: Any) -> list[Tensor]:
    """Parameters, buffers and the records' numbers after some steps."""
    torch.manual_seed(5)
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1, momentum=0.9), batched=batched, **options)  # type: ignore[arg-type]
    found = []
    for _ in range(STEPS):
        optimizer.step(closure)
        found += [optimizer.last[key] for key in ("losses", "perturbed_losses", "norms_flat", "weights_flat")]
    return [*values(model), *(b.clone() for b in model.buffers()), *found, torch.rand(2)]


def compare(
    make: Callable[[], nn.Module], closure_of: Callable[[nn.Module], Callable[[], Any]], **options: Any
) -> None:
    first, second = make(), make()
    before = [p.data_ptr() for p in second.parameters()]
    one_by_one = trained(first, closure_of(first), False, **options)
    together = trained(second, closure_of(second), "passes", **options)
    assert before == [p.data_ptr() for p in second.parameters()]
    for a, b in zip(one_by_one, together, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adaptive": True, "rho": 0.5},
        {"norm": "joint", "rho": (0.2, 0.1)},
        {"aggregator": "mgda", "combine": "direct", "weighting": "uw"},
        {"every": 2},
        {"flat": "sgsu"},
        {"replay_rng": False},
        {"maximize": True},
    ],
    ids=str,
)
def test_same_step(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = batch(tasks=3)
    options = dict(options)
    if options.pop("maximize", False):
        monkeypatch.setattr(SGD, "__init__", lambda *a, init=SGD.__init__, **k: init(*a, maximize=True, **k))
    compare(lambda: two_heads(tasks=3, norm=True), lambda model: closure_of(model, x, y), **options)


def test_one_forward_for_all_tasks() -> None:
    x, y = batch(tasks=3)
    calls = []
    model = two_heads(tasks=3)
    inner = closure_of(model, x, y)

    def closure() -> list[Tensor]:
        calls.append(1)
        return inner()

    flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), batched="passes").step(closure)
    assert len(calls) == 2


def test_dropout_draws_the_same_mask() -> None:
    x, y = batch()
    compare(lambda: two_heads(dropout=0.5), lambda model: closure_of(model, x, y))


def test_micro_batches_and_absent_tasks() -> None:
    parts = [batch(0, 3), batch(1, 3), batch(2, 3)]
    results = []
    for batched in (False, "passes"):
        model = two_heads(tasks=3)

        def closure(m: int, model: nn.Module = model) -> dict[str, Tensor | None]:
            losses = closure_of(model, *parts[m])()
            names: list[Tensor | None] = [None if (m, k) in ((0, 1), (2, 0)) else v for k, v in enumerate(losses)]
            return dict(zip("abc", names, strict=True))

        for m_sharpness in (False, True):
            optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), batched=batched, m_sharpness=m_sharpness)
            optimizer.step(closure, batches=[0, 1, 2])
        results.append([*values(model), optimizer.last["perturbed_losses"]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


class Pictures(nn.Module):
    """Convolution in channels_last, GroupNorm, attention, an embedding, weight norm, a tied and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
        self.norm = nn.GroupNorm(2, 8, dtype=torch.float64)
        self.batch_norm = nn.BatchNorm2d(8, dtype=torch.float64)
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
        self.tokens = nn.Embedding(5, 8, dtype=torch.float64)
        self.mix = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8, dtype=torch.float64))
        self.heads = nn.ModuleList(nn.Linear(8, 3, dtype=torch.float64) for _ in range(2))
        self.heads[1].bias = self.heads[0].bias
        self.heads[0].weight.requires_grad_(False)

    def forward(self, x: Tensor, words: Tensor) -> list[Tensor]:
        h = self.batch_norm(self.conv(x).relu()).flatten(2).transpose(1, 2)
        h = self.norm(self.attention(torch.cat([h, self.tokens(words)], 1)).mean(1))
        return [head(self.mix(h)) for head in self.heads]


def test_kinds_of_layers() -> None:
    def make() -> nn.Module:
        torch.manual_seed(3)
        return Pictures()

    g = torch.Generator().manual_seed(1)
    x = torch.randn(4, 2, 5, 5, generator=g, dtype=torch.float64).to(memory_format=torch.channels_last)
    words = torch.randint(0, 5, (4, 3), generator=g)
    targets = [torch.randint(0, 3, (4,), generator=g) for _ in range(2)]

    def closure_of(model: nn.Module) -> Callable[[], Any]:
        return lambda: torch.stack([F.cross_entropy(out, t) for out, t in zip(model(x, words), targets, strict=True)])

    compare(make, closure_of)


def test_autocast() -> None:
    x, y = batch(dtype=torch.float32)
    results = []
    for batched in (False, "passes"):
        model = two_heads(dtype=torch.float32)

        def closure(model: nn.Module = model) -> list[Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                return closure_of(model, x, y)()

        optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), batched=batched, rho=0.5)
        optimizer.step(closure)
        results.append(values(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flat": "sam"}, "flatness mode 'sam' the tasks have no points of their own"),
        ({"flat": "samo"}, "flatness mode 'samo'"),
        ({"features": nn.Linear(1, 1), "rho": 0.0}, "does not work with features="),
    ],
)
def test_options_that_do_not_go_with_it(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flatmtl.FlatMTL(SGD(two_heads().parameters(), lr=0.1), batched="passes", **options)
    with pytest.raises(ValueError, match=r"Invalid batched: 'all' \(expected one of False, True, 'passes'\)"):
        flatmtl.FlatMTL(SGD(two_heads().parameters(), lr=0.1), batched="all")


def test_what_vmap_cannot_do_changes_nothing() -> None:
    x, y = batch()
    model = two_heads()
    scripted = torch.jit.trace(model.trunk, x)  # its parameters are the model's
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), batched="passes")

    def through_script() -> list[Tensor]:
        z = scripted(x)
        return [F.cross_entropy(head(z), t) for head, t in zip(model.heads, y, strict=True)]

    def with_item() -> list[Tensor]:
        losses = closure_of(model, x, y)()
        return [loss * min(1.0, loss.item()) for loss in losses]

    before = values(model)
    with pytest.raises(RuntimeError, match=r"perturbed value of parameter .* did not come to the closure"):
        optimizer.step(through_script)
    with pytest.raises(RuntimeError, match="vmap"):
        optimizer.step(with_item)
    with pytest.raises(ValueError, match="one closure for all tasks"):
        optimizer.step([lambda: closure_of(model, x, y)()[0], lambda: closure_of(model, x, y)()[1]])
    assert equal(before, values(model))
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.steps == 0


def test_checkpointing_is_noticed() -> None:
    """Its recomputation happens in the backward, where the stacked parameters are out of reach."""
    x, y = batch()
    model = two_heads()

    def closure() -> list[Tensor]:
        z = torch.utils.checkpoint.checkpoint(model.trunk, x, use_reentrant=False)
        return [F.cross_entropy(head(z), t) for head, t in zip(model.heads, y, strict=True)]

    before = values(model)
    with pytest.raises(RuntimeError):
        flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), batched="passes").step(closure)
    assert equal(before, values(model))
