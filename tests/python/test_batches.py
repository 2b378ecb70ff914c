"""Micro-batches: means over them equal the large batch; m-sharpness perturbs along each one's own gradient."""

from __future__ import annotations

import copy
from typing import Any

import flatmtl
import memory
import pytest
import torch
import torch.nn.functional as F
from flatmtl._task import RowMean
from models import TwoHeads, batch, two_heads, values
from torch import Tensor
from torch.optim import SGD

Batch = tuple[Tensor, list[Tensor]]


def split(x: Tensor, y: list[Tensor], parts: int) -> list[Batch]:
    return list(zip(x.chunk(parts), zip(*(t.chunk(parts) for t in y), strict=True), strict=True))  # type: ignore[arg-type]


def losses_of(model: TwoHeads, part: Batch) -> list[Tensor]:
    return [F.cross_entropy(out, t) for out, t in zip(model(part[0]), part[1], strict=True)]


@pytest.mark.parametrize("per_task", [False, True])
@pytest.mark.parametrize("rho", [0.0, 0.2])
def test_equals_the_large_batch(rho: float, per_task: bool) -> None:
    x, y = batch()
    results = []
    for parts in (1, 4):
        model = two_heads()
        optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), rho=rho, aggregator="mgda")
        closure = [lambda b, i=i, m=model: losses_of(m, b)[i] for i in range(2)] if per_task else None
        for _ in range(2):
            losses = optimizer.step(closure or (lambda b, m=model: losses_of(m, b)), batches=split(x, y, parts))
        results.append([*values(model), *losses, optimizer.last["weights_loss"], optimizer.last["losses"]])
    for one, four in zip(*results, strict=True):
        torch.testing.assert_close(four, one, rtol=1e-11, atol=1e-13)


def test_one_batch_is_no_batch_bit_for_bit() -> None:
    x, y = batch()
    a, b = two_heads(norm=True, dropout=0.2), two_heads(norm=True, dropout=0.2)
    torch.manual_seed(5)
    flatmtl.FlatMTL(SGD(a.parameters(), lr=0.1)).step(lambda: losses_of(a, (x, y)))
    torch.manual_seed(5)
    flatmtl.FlatMTL(SGD(b.parameters(), lr=0.1), m_sharpness=True).step(lambda p: losses_of(b, p), batches=[(x, y)])
    for s, t in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(s, t)


def test_m_sharpness_by_hand() -> None:
    # one linear model, one task: s = mean over micro-batches of the gradient at theta + rho g_m / ||g_m||
    x, target = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    start, rho, lr = torch.randn(3, dtype=torch.float64), 0.4, 0.1

    def gradient(theta: Tensor, part: slice) -> Tensor:
        return 2 * x[part].T @ (x[part] @ theta - target[part]) / 4

    expected = torch.zeros(3, dtype=torch.float64)
    for part in (slice(0, 4), slice(4, 8)):
        g = gradient(start, part)
        expected += gradient(start + rho * g / g.norm(), part) / 2
    theta = torch.nn.Parameter(start.clone())
    optimizer = flatmtl.FlatMTL(SGD([theta], lr=lr), rho=rho, m_sharpness=True)
    optimizer.step(lambda p: ((x[p] @ theta - target[p]) ** 2).mean(), batches=[slice(0, 4), slice(4, 8)])
    torch.testing.assert_close(theta.detach(), start - lr * expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("m_sharpness", [False, True])
def test_task_absent_from_some_micro_batches(m_sharpness: bool) -> None:
    # task 1 is in the second micro-batch alone: the mean over that one is its gradient
    x, y = batch()
    model, other = two_heads(), two_heads()
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), aggregator="sum", m_sharpness=m_sharpness)
    parts = split(x, y, 2)
    calls = []

    def closure(k: int) -> list[Tensor | None]:
        calls.append(k)
        losses: list[Tensor | None] = [*losses_of(model, parts[k])]
        return losses if k == 1 else [losses[0], None]

    losses = optimizer.step(closure, batches=[0, 1])
    alone = losses_of(other, parts[1])[1]
    torch.testing.assert_close(losses[1], alone.detach())
    assert calls.count(1) == 3  # the first micro-batch is not run again for task 1
    assert calls.count(0) == 2


@pytest.mark.parametrize("flat", ["fmtl", "sam"])
def test_losses_and_perturbed_losses_are_means_over_the_same_parts(flat: str) -> None:
    """Task 1 is masked in the first micro-batch: its loss and gradient are zero there, and no pass is made for it."""
    x, y = batch()
    model, parts, rho = two_heads(), split(x, y, 2), 0.3

    def closure(k: int, net: TwoHeads) -> list[Tensor]:
        first, second = losses_of(net, parts[k])
        return [first, second * k]

    before = copy.deepcopy(model)
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), m_sharpness=True, flat=flat, rho=rho, norm="joint")
    optimizer.step(lambda k: closure(k, model), batches=[0, 1])
    losses, perturbed = torch.zeros(2, 2, 2, dtype=torch.float64)
    for k in range(2):
        losses[k] = torch.stack(closure(k, before)).detach()
        for i in range(2):
            moved = copy.deepcopy(before)
            values_here = closure(k, moved)
            loss = values_here[i] if flat == "fmtl" else sum(values_here)
            params = list(moved.parameters())
            grads = torch.autograd.grad(loss, params, materialize_grads=True)  # type: ignore[arg-type]
            norm = torch.cat([g.flatten() for g in grads]).norm()
            with torch.no_grad():
                for p, g in zip(params, grads, strict=True):
                    p += rho * g / norm if norm > 0 else 0.0
            perturbed[k, i] = closure(k, moved)[i].detach()
    for key, expected in (("losses", losses), ("perturbed_losses", perturbed), ("sharpness", perturbed - losses)):
        torch.testing.assert_close(optimizer.last[key], expected.mean(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        # K = 3: rows g and s, the one that is added to a mean, and the copy of the parameters
        ({"rho": 0.0}, 3 + 1 + 1),
        ({}, 2 * 3 + 1 + 1),
        ({"flat": "sam"}, 2 * 3 + 1 + 1),
        ({"flat": "sam", "combine": "direct"}, 1 + 3 + 1 + 1),  # g is that of the sum
        ({"m_sharpness": True}, 2 * 3 + 2 * 3 + 1),  # and both families of one micro-batch
    ],
    ids=str,
)
def test_memory_does_not_grow_with_the_number_of_micro_batches(options: dict[str, Any], rows: int) -> None:
    peaks = []
    for parts in (2, 5):
        model = memory.Layers(tasks=3)
        optimizer = flatmtl.FlatMTL(SGD(model.parameters, lr=0.1), **options)
        batches = list(range(parts))
        optimizer.step(model.losses, batches=batches)  # roles, and what torch keeps
        peak = memory.peak_bytes(lambda o=optimizer, m=model, b=batches: o.backward(m.losses, batches=b))
        peaks.append(peak / model.row)
    assert peaks[1] <= peaks[0] + 0.05
    assert rows - 0.5 <= peaks[1] <= rows + model.slack


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 2e-15), (torch.float32, 1e-6), (torch.bfloat16, 0.04)])
def test_the_mean_that_is_taken_row_by_row(dtype: torch.dtype, error: float) -> None:
    """Of 500 rows, where some have no entry or none at all; and what was added is as it was."""
    g = torch.Generator().manual_seed(0)
    rows: list[list[Tensor | None]] = [
        [(1.0 + torch.randn(50, generator=g, dtype=torch.float64)).to(dtype) for _ in range(4)] for _ in range(500)
    ]
    for k, row in enumerate(rows):
        row[0] = row[0] if k % 3 else None
        row[1] = row[1] if k == 7 else None
        row[2] = None
    rows[0], rows[100] = [], []
    before = [[None if x is None else x.clone() for x in row] for row in rows]
    mean = RowMean()
    for row in rows:
        mean.add(row)
    for i, found in enumerate(mean.take()):
        present = [x for row in rows if row and (x := row[i]) is not None]
        if i == 2:
            assert found is None
            continue
        expected = torch.stack(present).double().sum(0) / len(rows)
        assert float((found.double() - expected).norm() / expected.norm()) <= error
    for row, old in zip(rows, before, strict=True):
        assert all(x is y or torch.equal(x, y) for x, y in zip(row, old, strict=True))


def test_a_mean_of_one_row_is_that_row() -> None:
    row = [torch.randn(3), None]
    mean = RowMean()
    mean.add(row)
    assert mean.take()[0] is row[0]


def test_errors() -> None:
    x, y = batch()
    model = two_heads()
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1))
    before = values(model)
    with pytest.raises(ValueError, match="batches is empty"):
        optimizer.step(lambda b: losses_of(model, b), batches=[])
    with pytest.raises(TypeError, match="without a closure"):
        optimizer.step(batches=[(x, y)])
    forms = iter([2, 1])
    with pytest.raises(RuntimeError, match=r"list of 2 .* but a list of 1 in another micro-batch"):
        optimizer.step(lambda b: losses_of(model, b)[: next(forms)], batches=split(x, y, 2))
    for a, b in zip(before, values(model), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"flat": "sam"}, {"rho": 0.0}, {"flat": "gsam", "m_sharpness": True}])
def test_batched_backwards_give_the_same_step(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = batch(tasks=3)
    results, calls = [], {False: 0, True: 0}
    gradient = torch.autograd.grad
    for batched in (False, True):

        def counted(*args: object, batched: bool = batched, **kwargs: object) -> object:
            calls[batched] += 1
            return gradient(*args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(torch.autograd, "grad", counted)
        model = two_heads(tasks=3)
        optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), batched=batched, aggregator="mgda", **options)  # type: ignore[arg-type]
        optimizer.step(lambda b, model=model: losses_of(model, b), batches=split(x, y, 2))
        results.append([*values(model), *optimizer.roles.state(list(model.parameters()))])
    assert calls[True] < calls[False]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
