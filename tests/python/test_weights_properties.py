"""Properties of every aggregator on random and adversarial Gramians: finite, deterministic, and each one's own promise."""

from __future__ import annotations

import flatmtl
import pytest
import torch
from flatmtl import _ops
from flatmtl.aggregators import AGGREGATORS
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

F64 = torch.float64
NAMES = [name for name in _ops.METHODS if name != "fixed"]
STATIONARY = {"imtl_g", "nash_mtl", "fairgrad", "aligned_mtl", "config", "ntkmtl"}


@st.composite
def row_families(draw: st.DrawFn) -> Tensor:
    """K rows of small integers, so that zero, equal, opposite and dependent rows are common, of lengths far apart."""
    tasks, size = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    entries = draw(arrays(float, (tasks, size), elements=st.integers(-3, 3).map(float)))
    exponents = draw(arrays(float, (tasks, 1), elements=st.sampled_from([0.0, 0.0, 0.0, -40.0, 40.0])))
    scale = draw(st.sampled_from([1.0, 1e-100, 1e100]))
    return torch.from_numpy(entries * 2.0**exponents * scale)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)
@given(rows=row_families(), seed=st.integers(0, 2**53 - 1))
def test_weights_of_any_gramian(name: str, rows: Tensor, seed: int) -> None:
    gramian = rows @ rows.T
    options = {"seed": seed} if name in ("pcgrad", "gradvac") else {}
    aggregator = AGGREGATORS[name](**options)
    state = aggregator.new_state(len(rows))
    weights = flatmtl.weights(gramian, aggregator, state=state)
    assert weights.isfinite().all()
    assert torch.equal(weights, flatmtl.weights(gramian, aggregator))  # from a fresh state, as the first time
    if state is not None:
        assert (state.abs() <= 1).all()
    if not gramian.any():
        assert bool((weights == 0).all()) == (name in STATIONARY)
    size = gramian.abs() @ weights.abs()
    product = gramian @ weights
    if name in ("mgda", "nash_mtl", "fairgrad", "upgrad", "dualproj"):
        assert (product >= -1e-9 * size).all()
    if name == "mgda":
        assert (weights >= 0).all()
        assert abs(weights.sum() - 1) <= 1e-12
    if name in ("upgrad", "dualproj"):
        assert (weights >= 1 / len(rows) - 1e-15).all()
    if name in ("nash_mtl", "fairgrad"):
        power = -1.0 if name == "nash_mtl" else -0.5
        on = weights > 0
        assert ((product - weights**power).abs()[on] <= 1e-9 * size[on]).all()
    if name == "ntkmtl":
        lengths = (weights * gramian.diagonal().sqrt())[gramian.diagonal() > 0]
        assert ((lengths - lengths.mean()).abs() <= 1e-12 * lengths).all()
