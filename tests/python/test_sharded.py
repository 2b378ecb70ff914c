"""Several processes with gloo: FSDP2 and tensor parallel parameters, and failures where passes hold collectives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ranks
import shard_checks as checks
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


@pytest.fixture(scope="module")
def two() -> Iterator[ranks.RankPool]:
    with ranks.pool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def four() -> Iterator[ranks.RankPool]:
    with ranks.pool(4) as pool:
        yield pool


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


def test_refused(two: ranks.RankPool) -> None:
    two(checks.refused)


def test_traffic_does_not_grow_with_the_parameters(two: ranks.RankPool) -> None:
    assert max(two(checks.equals_unsharded, {}, "all")) < 3000
