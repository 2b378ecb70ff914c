"""Loading a spoiled state: a ValueError that names the entry, before anything has changed."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import flatmtl
import pytest
import torch
from digits import same
from flatmtl import flatness
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TwoHeads, batch, closure_of, two_heads
from torch import Tensor
from torch.optim import SGD

METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "fmtl": {"flat": flatness.FMTL(every=2)},
    "fsam": {"flat": "fsam"},
    "looksam": {"flat": "looksam"},
    "gradvac": {"aggregator": "gradvac"},
    "moco": {"aggregator": "moco"},
    "sdmgrad": {"aggregator": "sdmgrad"},
    "uw": {"weighting": "uw"},
}


def make(name: str) -> tuple[TwoHeads, flatmtl.FlatMTL]:
    model = two_heads()
    return model, flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), **METHODS[name])


def step(name: str, model: TwoHeads, optimizer: flatmtl.FlatMTL) -> None:
    closure = closure_of(model, *batch())
    optimizer.step(
        *([closure] if name != "sdmgrad" else [lambda _: closure()]), batches=[0] * 3 if name == "sdmgrad" else None
    )


@lru_cache
def trained(name: str) -> tuple[TwoHeads, flatmtl.FlatMTL, dict[str, Any]]:
    model, optimizer = make(name)
    step(name, model, optimizer)
    return model, optimizer, copy.deepcopy(optimizer.state_dict())


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something is, in nested dicts and lists."""
    found = [at]
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += paths(item, (*at, key))
    return found


def spoil(state: dict[str, Any], path: tuple[Any, ...], change: Any) -> Any:
    """Takes out what is at a path, or puts something else there."""
    inner: Any = state
    for key in path[:-1]:
        inner = inner[key]
    old = inner[path[-1]]
    if change == "missing":
        del inner[path[-1]]
    elif change == "longer":
        inner[path[-1]] = [*old, None] if isinstance(old, list) else [old]
    elif isinstance(change, str) and change == "wrong shape" and isinstance(old, Tensor):
        inner[path[-1]] = old.new_zeros((*old.shape, 2))
    else:
        inner[path[-1]] = change
    return old


CHANGES = ["missing", "longer", "wrong shape", None, "x", -1, 7, 0.5, float("nan"), True, [], {}, (), torch.zeros(1)]


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=40)  # each trains a step
@given(data=st.data())
def test_whatever_is_spoiled_is_refused_or_harmless(name: str, data: st.DataObject) -> None:
    model, optimizer, good = trained(name)
    state = copy.deepcopy(good)
    path = data.draw(st.sampled_from(paths(state["flatmtl"])[1:]), label="path")
    spoil(state["flatmtl"], path, copy.deepcopy(data.draw(st.sampled_from(CHANGES), label="change")))
    before = copy.deepcopy(optimizer.state_dict())
    refused = None
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        refused = str(error)
    if refused is not None:
        assert "state" in refused
        assert str(path[0]) in refused or path[0] == "states"
        assert same(before, optimizer.state_dict())
        return
    if path[0] != "tasks":  # others are refused by the next step
        step(name, model, optimizer)
    optimizer.load_state_dict(copy.deepcopy(good))


NAMED: list[tuple[str, tuple[Any, ...], Any, str]] = [
    ("none", ("steps",), "missing", r"state_dict\['flatmtl'\] has no 'steps'"),
    ("none", ("seed",), -1, "'seed' is -1; it must be an integer, at least 0 and below 9007199254740992"),
    ("none", ("roles",), "missing", "has no 'roles'"),
    ("none", ("roles", 2), 2, r"'roles'\[2\] is 2; it must be None, -1 \(shared\) or the number of one of the 2 tasks"),
    ("none", ("states",), "missing", "has no 'states'"),
    ("none", ("tasks",), 3, "'tasks' is 3; it must be None or a list"),
    ("fmtl", ("states", "flat", "name"), "missing", r"'states'\['flat'\] has no 'name'"),
    ("fmtl", ("states", "flat", "age"), "missing", "state of the flatness mode 'fmtl' has no 'age'"),
    ("fmtl", ("states", "flat", "age"), [1], r"'age' is \[1\]; it must be a list of 2 integers >= 0, one a task"),
    ("fmtl", ("states", "flat", "norm", 1), "x", r"'fmtl': 'norm' is \[.*, 'x'\]; it must be a list of 2 finite numbers"),
    ("fmtl", ("states", "flat", "orthogonal"), "longer", "'orthogonal' is .* must be a list of 2 rows, one a task"),
    ("fmtl", ("states", "flat", "orthogonal", 1, 0), "wrong shape", r"'orthogonal'\[1\]\[0\] is a float64 tensor of shape "
        r"\(8, 5, 2\); it must be a floating-point tensor of shape \(8, 5\), that of parameter 0"),
    ("fsam", ("states", "flat", "mean"), "missing", "state of the flatness mode 'fsam' has no 'mean'"),
    ("fsam", ("states", "flat", "mean", 1), 7, r"'mean'\[1\] is 7"),
    ("looksam", ("states", "flat", "orthogonal_norm"), "missing", "mode 'looksam' has no 'orthogonal_norm'"),
    ("looksam", ("states", "flat", "age"), True, "'age' is True; it must be an integer, at least 0"),
    ("looksam", ("states", "flat"), [], r"'states'\['flat'\] is \[\]; it must be a dict"),
    ("moco", ("states", "aggregator", "loss", "values"), "missing", "aggregator 'moco', 'loss' has no 'values'"),
    ("moco", ("states", "aggregator", "flat", "buffers"), "missing", "aggregator 'moco', 'flat' has no 'buffers'"),
    ("moco", ("states", "aggregator", "loss", "buffers", "0"), [None], r"'buffers'\['0'\] is \[None\]; .* list of 2"),
    ("moco", ("states", "aggregator", "loss", "buffers"), {"x": []}, r"'buffers'\['x'\]: there is no such parameter"),
    ("uw", ("states", "weighting", "values"), "missing", "state of the weighting 'uw' has no 'values'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "path", "change", "message"), NAMED)
def test_the_message_names_the_entry(name: str, path: tuple[Any, ...], change: Any, message: str) -> None:
    _, optimizer, good = trained(name)
    state = copy.deepcopy(good)
    spoil(state["flatmtl"], path, change)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)


def test_what_is_around_it() -> None:
    model, optimizer, good = trained("fsam")
    for path, change, message in (
        (("param_groups",), "missing", "state_dict has no 'param_groups'"),
        (("state",), "missing", "state_dict has no 'state'"),
        (("param_groups", 0, "params"), "missing", r"state_dict\['param_groups'\]\[0\] has no 'params'"),
        (("param_groups", 0, "rho"), -1, r"Invalid state_dict\['param_groups'\]\[0\]\['rho'\]: -1"),
    ):
        state = copy.deepcopy(good)
        spoil(state, path, change)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
    bare = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), flat="fsam")
    stateful = bare.flatmtl_state
    for broken in ({}, {"flatmtl": 3}):
        with pytest.raises(ValueError, match="flatmtl"):
            stateful.load_state_dict(broken)
    optimizer.states["flat"]["mean"][1] = torch.ones(1, dtype=torch.float64)  # would fit by broadcasting
    saved = optimizer.flatmtl_state.state_dict()
    optimizer.load_state_dict(copy.deepcopy(good))
    with pytest.raises(ValueError, match=r"'mean'\[1\] is a float64 tensor of shape \(1,\)"):
        stateful.load_state_dict(saved)
    assert bare.steps == 0


def test_buffers_of_another_dtype_and_layout_are_fitted() -> None:
    """As the flatness modes do: a checkpoint of a model in float32 goes on in float64."""
    model, _, good = trained("moco")
    state = copy.deepcopy(good)
    for family in ("loss", "flat"):
        for row in state["flatmtl"]["states"]["aggregator"][family]["buffers"].values():
            row[:] = [b.float().T.contiguous().T if b.dim() == 2 else b.float() for b in row]
    results = []
    for loaded in (good, state):
        other = copy.deepcopy(model)
        again = flatmtl.FlatMTL(SGD(other.parameters(), lr=0.1), aggregator="moco")
        again.load_state_dict(copy.deepcopy(loaded))
        step("moco", other, again)
        results.append([p.detach() for p in other.parameters()])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert not same(*results)


def test_shared_wins_over_loaded_roles() -> None:
    """docs: what a loaded state says of the parameters that `shared=` names, or does not, does not count."""
    found = two_heads()
    optimizer = flatmtl.FlatMTL(SGD(found.parameters(), lr=0.1))
    optimizer.step(closure_of(found, *batch()))
    state = optimizer.state_dict()
    assert state["flatmtl"]["roles"] == [-1, -1, 0, 0, 1, 1]
    expected, model = copy.deepcopy(found), copy.deepcopy(found)
    runs = []
    for net, loads in ((expected, False), (model, True)):
        shared = [net.trunk[0].weight, net.heads[0].bias]
        again = flatmtl.FlatMTL(SGD(net.parameters(), lr=0.1), shared=shared)  # type: ignore[arg-type]
        if loads:
            again.load_state_dict(copy.deepcopy(state))
            # trunk.bias and heads.0.bias are found anew
            assert again.state_dict()["flatmtl"]["roles"] == [-1, None, 0, None, 1, 1]
        again.step(closure_of(net, *batch(1)))
        assert again.state_dict()["flatmtl"]["roles"] == [-1, 0, 0, -1, 1, 1]
        runs.append([p.detach() for p in net.parameters()])
    assert same(*runs)
