"""Several processes with gloo: FSDP2 and tensor parallel parameters, and failures where passes hold collectives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import shard_checks as checks

CASES: list[tuple[dict[str, Any], str]] = [
    ({}, "all"),
    ({}, "kept"),
    ({}, "mixed"),
    ({}, "batches"),
    ({}, "closures"),
    ({"rho": 0.0}, "all"),
    ({"adaptive": True, "norm": "joint", "aggregator": "pcgrad"}, "all"),
    ({"flat": "sam", "combine": "direct", "aggregator": "cagrad"}, "all"),
    ({"flat": "looksam"}, "mixed"),
    ({"flat": "samo"}, "all"),
]


@pytest.mark.parametrize(("options", "form"), CASES, ids=str)
def test_equals_the_unsharded_run(two: ranks.RankPool, options: dict[str, Any], form: str) -> None:
    two(checks.equals_unsharded, options, form)


def test_four_ranks(four: ranks.RankPool) -> None:
    four(checks.equals_unsharded, {}, "all")  # the last rank's shards of the heads are empty
    four(checks.equals_unsharded, {}, "all", (2, 2))  # copies of shards (HSDP)
    four(checks.tensor_parallel)


def test_tensor_parallel(two: ranks.RankPool) -> None:
    two(checks.tensor_parallel)


def test_unused_and_foreign_parameters(two: ranks.RankPool) -> None:
    two(checks.unused_and_foreign_parameters)


def test_absent_tasks(two: ranks.RankPool) -> None:
    two(checks.absent_tasks)


def test_non_finite_on_one_rank(two: ranks.RankPool) -> None:
    two(checks.non_finite, False)
    two(checks.non_finite, True)


def test_grad_scaler(two: ranks.RankPool) -> None:
    two(checks.grad_scaler)


def test_grad_scaler_with_plain_parameters_is_refused(two: ranks.RankPool) -> None:
    two(checks.grad_scaler_with_plain_parameters)


def test_refused(two: ranks.RankPool) -> None:
    two(checks.refused)


def test_traffic_does_not_grow_with_the_parameters(two: ranks.RankPool) -> None:
    assert max(two(checks.equals_unsharded, {}, "all")) < 3000


def test_checkpoints_on_other_numbers_of_ranks(
    one: ranks.RankPool, two: ranks.RankPool, four: ranks.RankPool, tmp_path: Path
) -> None:
    for flat in ("fmtl", "looksam"):
        folder = str(tmp_path / flat)
        two(checks.saves, folder, flat, "fsdp")
        four(checks.loads, folder, flat, "fsdp")
        one(checks.loads, folder, flat, "fsdp")
    folder = str(tmp_path / "replicas")
    four(checks.saves, folder, "fmtl", "replicas")
    two(checks.loads, folder, "fmtl", "replicas")


TIMEOUT = 6.0  # of the process group


def test_a_rank_fails_where_passes_hold_collectives(two: ranks.RankPool) -> None:
    for form, at in (("all", 0), ("all", 1), ("ddp", 0)):
        two(checks.failure, at, form, TIMEOUT, timeout=TIMEOUT)


@pytest.mark.slow
def test_a_rank_fails_in_every_pass(two: ranks.RankPool, four: ranks.RankPool) -> None:
    for at in range(3):
        for form in ("all", "kept", "mixed", "ddp"):
            two(checks.failure, at, form, TIMEOUT, timeout=TIMEOUT)
        four(checks.failure, at, "all", TIMEOUT, timeout=TIMEOUT)
