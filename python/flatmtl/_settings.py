"""The options of `FlatMTL`: what they come to, and which do not go together."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import _ops
from ._features import read_modules
from .aggregators import Aggregator, get_aggregator
from .buffers import BufferAggregator
from .flatness import Flatness, get_flatness
from .weightings import Weighting, get_weighting


@dataclass
class Settings:
    """Options of the step; see `FlatMTL`."""

    aggregator: Aggregator
    weighting: Weighting | None
    flat: Flatness
    adaptive: bool
    eta: float
    norm: str
    combine: str
    family_scale: str | None
    max_norm: float | None
    features: list[nn.Module] | None
    batched: bool | str
    m_sharpness: bool
    replay_rng: bool
    seed: int
    accumulate: str = "auto"
    rows_dtype: torch.dtype | None = None


def read(
    *, aggregator: str | Aggregator, weighting: str | Weighting | None, flat: str | Flatness, every: int | None, rho: Any,
    adaptive: bool, eta: float | None, norm: str, combine: str | None, family_scale: str | None, max_norm: float | None,
    features: Any, batched: bool | str, m_sharpness: bool, replay_rng: bool, nonfinite: str, seed: int, accumulate: str,
    rows_dtype: torch.dtype | None, sync: str | None,
) -> Settings:  # fmt: skip
    """The settings that these arguments of `FlatMTL` come to; ValueError or TypeError where one is out of its range or
    two do not go together. `nonfinite` and `sync` are checked alone."""
    if eta is not None and not (isinstance(eta, (int, float)) and 0.0 <= eta < math.inf):
        raise ValueError(f"Invalid eta: {eta} (expected a finite number >= 0)")
    mode = get_flatness(flat, every)
    if mode.name == "asam":
        adaptive, eta = True, 0.01 if eta is None else eta
    combine = mode.default_combine if combine is None else combine
    _check_choice("norm", norm, ("separate", "joint"))
    _check_choice("combine", combine, _ops.COMBINE)
    _check_choice("family_scale", family_scale, ("rms", None))
    if max_norm is not None and not (isinstance(max_norm, (int, float)) and 0.0 < max_norm < math.inf):
        raise ValueError(f"Invalid max_norm: {max_norm} (expected None or a finite number > 0)")
    _check_choice("batched", batched, (False, True, "passes"))
    if batched == "passes" and not mode.points_known:
        raise ValueError(f"batched='passes': in flatness mode {mode.name!r} the tasks have no points of their own")
    if batched == "passes" and features is not None:
        raise ValueError("batched='passes' does not work with features=")
    _check_choice("nonfinite", nonfinite, ("raise", "skip"))
    _check_choice("accumulate", accumulate, _ops.ACCUMULATE)
    _check_rows_dtype(rows_dtype)
    _check_choice("sync", sync, ("auto", "exact", "local", None))
    if not (isinstance(seed, int) and 0 <= seed < 2**53):
        raise ValueError(f"Invalid seed: {seed} (expected an integer in [0, 2^53))")
    if sync == "local" and mode.has_state:
        raise ValueError(f"sync='local': flatness mode {mode!r} keeps gradients of whole steps")
    weighting = None if weighting is None else get_weighting(weighting)
    aggregator = get_aggregator(aggregator)
    if isinstance(aggregator, BufferAggregator):
        given = {"features": features is not None, "max_norm": max_norm is not None}
        _check_buffers(aggregator, combine, sync, [name for name, value in given.items() if value])
    if sync == "local" and weighting is not None and weighting.observes:
        raise ValueError(f"sync='local': weighting {weighting!r} learns from losses that only \"exact\" makes equal")
    if m_sharpness and mode.has_state:
        raise ValueError(f"m_sharpness=True: flatness mode {mode!r} keeps gradients of whole steps")
    if rows_dtype is not None and features is not None and not mode.needs_features:
        raise ValueError(
            "rows_dtype= with features=: the rows are then the features' gradients, which stay as they are"
        )
    return Settings(
        aggregator, weighting, mode, bool(adaptive), float(eta or 0.0), norm, combine, family_scale,
        max_norm, _read_features(features, mode, combine, rho, aggregator), batched, bool(m_sharpness),
        bool(replay_rng), seed, accumulate, rows_dtype,
    )  # fmt: skip


def _check_buffers(aggregator: BufferAggregator, combine: str, sync: str | None, given: list[str]) -> None:
    """What a method that is no function of the Gramian does not go with."""
    if combine not in ("decomposed", "direct"):
        raise ValueError(f"aggregator {aggregator.name!r} works with combine='decomposed' or 'direct', not {combine!r}")
    if given:
        raise ValueError(f"aggregator {aggregator.name!r} does not work with {given[0]}=")
    if sync == "local" and (aggregator.batches or aggregator.has_buffers):
        raise ValueError(f"aggregator {aggregator.name!r} does not work with sync='local'")


def _read_features(
    features: Any, mode: Flatness, combine: str, rho: Any, aggregator: Aggregator
) -> list[nn.Module] | None:
    modules = read_modules(features)
    if modules is None and mode.needs_features:
        raise ValueError(f"flatness mode {mode.name!r} needs features=, the modules whose outputs the heads read")
    if modules is None and getattr(aggregator, "splits", 1) > 1:
        raise ValueError(f"{aggregator!r}: splits needs features=, the modules whose outputs the heads read")
    plain = mode.uses_rho and (max(rho) if isinstance(rho, (tuple, list)) else rho) == 0.0
    if modules is not None and not (mode.needs_features or plain or mode.works_at_features(combine)):
        raise ValueError(
            f"features= with flatness mode {mode.name!r} and combine={combine!r}: gradients that stop at the "
            "features work with rho=0, and with flat='sam', 'asam' or 'fsam' and combine='direct'"
        )
    return modules


def _check_rows_dtype(dtype: Any) -> None:
    if dtype is None or dtype is torch.bfloat16:
        return
    why = ""
    if dtype is torch.float16:
        why = "; float16 holds nothing above 65504 and rounds to multiples of 6e-8, too little for gradients"
    raise ValueError(f"Invalid rows_dtype: {dtype!r} (expected None or torch.bfloat16{why})")


def _check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    if value not in choices:
        raise ValueError(f"Invalid {name}: {value!r} (expected one of {', '.join(repr(c) for c in choices)})")
