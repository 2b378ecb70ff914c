"""Several processes with gloo: replicas and DDP, what they average, and how they fail."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import sync_checks as checks
import torch
from models import two_heads

OPTIONS: list[dict[str, Any]] = [
    {},
    {"rho": 0.0},
    {"aggregator": "pcgrad", "adaptive": True, "norm": "joint"},
    {"aggregator": "nash_mtl", "combine": "each"},
    {"aggregator": "cagrad", "combine": "direct", "family_scale": None},
]


FORMS = [(options, "closure") for options in OPTIONS] + [({}, form) for form in ("closures", "batches", "tensor")]


@pytest.mark.parametrize(("options", "form"), FORMS, ids=str)
def test_exact_is_one_process_with_the_whole_batch(two: ranks.RankPool, options: dict[str, Any], form: str) -> None:
    two(checks.equals_whole_batch, options, form)


def test_four_ranks(four: ranks.RankPool) -> None:
    four(checks.equals_whole_batch, {}, "closure")
    four(checks.absent_tasks)
    four(checks.reached_on_one_rank, "exact")
    four(checks.reached_on_one_rank, "local")
    four(checks.failure, 1, "Injected", "exact", False)
    four(checks.local_is_m_sharpness, {})


def test_absent_tasks(two: ranks.RankPool) -> None:
    two(checks.absent_tasks)


@pytest.mark.parametrize("sync", ["exact", "local"])
def test_parameters_reached_on_one_rank(two: ranks.RankPool, sync: str) -> None:
    two(checks.reached_on_one_rank, sync)


@pytest.mark.parametrize("options", [{}, {"norm": "joint", "adaptive": True}], ids=str)
def test_local_is_m_sharpness(two: ranks.RankPool, options: dict[str, Any]) -> None:
    two(checks.local_is_m_sharpness, options)


def test_ddp(two: ranks.RankPool) -> None:
    two(checks.ddp, {}, False)
    two(checks.ddp, {"find_unused_parameters": True}, False)
    two(checks.ddp, {"static_graph": True}, False)
    two(checks.ddp, {"broadcast_buffers": True}, True)


def test_nothing_is_sent_unless_asked_for(two: ranks.RankPool) -> None:
    two(checks.without_sync)


@pytest.mark.parametrize("sync", ["exact", "local"])
def test_a_rank_fails(two: ranks.RankPool, sync: str) -> None:
    for at in range(3):  # the unperturbed pass, and the two perturbed ones
        two(checks.failure, at, "Injected", sync, False)
    two(checks.failure, 1, "KeyboardInterrupt", sync, False)
    two(checks.failure, 2, "Injected", sync, True)


def test_a_rank_fails_outside_the_passes(two: ranks.RankPool) -> None:
    two(checks.failure_outside_passes)


@pytest.mark.parametrize("sync", ["exact", "local"])
def test_non_finite_on_one_rank(two: ranks.RankPool, sync: str) -> None:
    for nonfinite in ("raise", "skip"):
        for perturbed in (False, True):
            two(checks.non_finite, sync, nonfinite, perturbed)


@pytest.mark.parametrize("sync", ["exact", "local"])
def test_overflow_on_one_rank(two: ranks.RankPool, sync: str) -> None:
    two(checks.grad_scaler, sync)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("values", r"\['params'\]\[0\] differs between rank 0 and rank 1: their values"),
        ("options", "options differ between ranks: .*adaptive=False.* on rank 0, .*adaptive=True.* on rank 1"),
        ("rho", r"\(0.1, 0.1\)\) on rank 0, .*\(0.2, 0.2\)\) on rank 1"),
        ("tasks", r"tasks \['a', 'b'\] on rank 0, but \['b', 'a'\] on rank 1"),
        ("count", r"the number of tasks must be the same on all ranks, but is \[2, 1\]"),
        ("batches", r"the number of micro-batches must be the same on all ranks, but is \[2, 3\]"),
    ],
)
def test_what_must_be_the_same_on_all_ranks(two: ranks.RankPool, what: str, message: str) -> None:
    two(checks.disagreement, what, message)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_buckets_layouts_and_dtypes(two: ranks.RankPool, dtype: torch.dtype) -> None:
    two(checks.large_rows_and_layouts, dtype)


def test_traffic(two: ranks.RankPool) -> None:
    # docs/distributed.md: 2 (K P_shared + P_own) numbers, and small ones for agreements
    shared, own = checks.parts_of(two_heads(tasks=3))
    rows = (3 * shared + own) * 8
    for options, families in (({}, 2), ({"rho": 0.0}, 1)):
        passes = 1 + 3 * (families - 1)
        small = (passes + 1) * 5 * 8 + 3 * (2 + 8) * 8 + (3 * 8 if families == 2 else 0)
        assert two(checks.equals_whole_batch, options, "closure") == [families * rows + small] * 2


def test_needs_a_process_group() -> None:
    import flatmtl

    model = two_heads()
    optimizer = flatmtl.FlatMTL(torch.optim.SGD(model.parameters(), lr=0.1), sync="exact")
    with pytest.raises(RuntimeError, match="init_process_group"):
        optimizer.step(lambda: checks.losses_of(model, checks.batch()))
    with pytest.raises(ValueError, match="Invalid sync: 'always'"):
        flatmtl.FlatMTL(torch.optim.SGD(model.parameters(), lr=0.1), sync="always")
