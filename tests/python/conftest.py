"""Fixtures of several test files: pools of processes, started when first used."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ranks
import torch


def _pool(size: int) -> Iterator[ranks.RankPool]:
    if not torch.distributed.is_available():
        pytest.skip("torch without torch.distributed")
    with ranks.pool(size) as pool:
        yield pool


@pytest.fixture(scope="module")
def one() -> Iterator[ranks.RankPool]:
    yield from _pool(1)


@pytest.fixture(scope="module")
def two() -> Iterator[ranks.RankPool]:
    yield from _pool(2)


@pytest.fixture(scope="module")
def four() -> Iterator[ranks.RankPool]:
    yield from _pool(4)
