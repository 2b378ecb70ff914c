"""The param groups of the optimizer that is wrapped: what FlatMTL refuses, the radii, and the parameters in them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from ._task import Parameter


def check_rho(rho: Any, what: str) -> None:
    pair = rho if isinstance(rho, (tuple, list)) else (rho, rho)
    if len(pair) != 2 or not all(isinstance(r, (int, float)) and 0.0 <= r < math.inf for r in pair):
        raise ValueError(f"Invalid {what}: {rho} (expected a finite number >= 0, or a pair (shared, task) of them)")


def check_wrapped(optimizer: Any, ours: type) -> None:
    """TypeError where the optimizer cannot be wrapped: it is none, or of `ours`, FlatMTL, or a framework's wrapper around
    one; it has a rho itself; or it evaluates closures in a way of its own."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, but is {type(optimizer).__name__}")
    inner: Any = optimizer
    while isinstance(inner, Optimizer):
        if isinstance(inner, ours):
            what = "is" if inner is optimizer else f"is a {type(optimizer).__name__} around"
            raise TypeError(f"optimizer {what} a FlatMTL already: give that one the options, or wrap its `optimizer`")
        makers = [vars(cls)["__init__"] for cls in type(inner).__mro__ if "__init__" in vars(cls)]
        if "rho" in getattr(inner, "defaults", ()) and any(
            "rho" in inspect.signature(make).parameters for make in makers
        ):
            raise TypeError(
                f"{type(inner).__name__} cannot be wrapped: it has a rho of its own in its param groups, where FlatMTL keeps "
                "the radius of the perturbation"
            )
        inner = getattr(inner, "optimizer", None)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("LBFGS cannot be wrapped: its step evaluates a closure of a single loss several times")


def without_rho(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The param groups that FlatMTL's rho is for: those that have none, or the one that an earlier FlatMTL around this
    optimizer gave them, which is in the defaults. Changes nothing."""
    left = optimizer.defaults.get("rho")
    groups = []
    for group in optimizer.param_groups:
        if "rho" not in group or (left is not None and group["rho"] == left):
            groups.append(group)
        else:
            check_rho(group["rho"], "rho of a param group")
    return groups


def check_duplicates(groups: Iterable[dict[str, Any]], first: int = 0) -> None:
    """Raises where a group lists a parameter twice, which torch only warns of: it would be perturbed and counted twice."""
    for g, group in enumerate(groups, first):
        names, seen = group.get("param_names"), dict[int, int]()
        for i, item in enumerate(group["params"]):
            name, p = item if isinstance(item, tuple) else (names[i] if names else None, item)
            before = seen.setdefault(id(p), i)
            if before != i:
                named = "" if name is None else f" ({name!r})"
                raise ValueError(
                    f"param_groups[{g}]['params'] lists a parameter twice: [{before}] and [{i}] are the same{named}"
                )


def parameters(optimizer: Optimizer) -> list[Parameter]:
    """Those that require grad, with their radii."""
    found: list[Parameter] = []
    index = -1
    for g, group in enumerate(optimizer.param_groups):
        rho = group.get("rho", optimizer.defaults.get("rho", 0.0))
        check_rho(rho, f"param_groups[{g}]['rho']")
        shared, task = rho if isinstance(rho, (tuple, list)) else (rho, rho)
        sign = -1.0 if group.get("maximize", False) else 1.0
        names = group.get("param_names")
        for i, p in enumerate(group["params"]):
            index += 1
            if not p.requires_grad:
                continue
            name = repr(names[i]) if names else f"param_groups[{g}]['params'][{i}]"
            if not p.is_floating_point():
                raise TypeError(f"parameter {name} is {p.dtype}; only real floating-point ones are supported")
            lr = float(group.get("lr", 0.0))
            found.append(Parameter(p, sign * shared, sign * task, name, index, lr))
    if not found:
        raise RuntimeError("no parameter of the optimizer requires grad")
    return found
