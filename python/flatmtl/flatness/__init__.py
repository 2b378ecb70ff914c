"""Flatness modes: where the perturbed gradients of a step are taken.

A mode is an immutable value, its options and nothing else, like an aggregator: `FlatMTL(optimizer, flat="fmtl")`, or
`FlatMTL(optimizer, flat=FMTL(every=2))`. Its state, if it has one, is the optimizer's.

g_i and h_i are the gradients of task i's loss with respect to the shared parameters theta and its own ones psi_i, s_i
and t_i those at the perturbed point, f_i = s_i - g_i. Every mode gives s_i and t_i, and the aggregator makes the update
from the families g and f as `combine` says.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .._options import by_name
from ._base import Flatness
from .fmtl import FMTL
from .mtcool import MTCOOL
from .sam import ASAM, FSAM, GSAM, SAM, WSAM, LookSAM
from .samo import SAMO
from .sgsu import SGSU

__all__ = [
    "ASAM",
    "FLATNESS",
    "FMTL",
    "FSAM",
    "GSAM",
    "MTCOOL",
    "SAM",
    "SAMO",
    "SGSU",
    "WSAM",
    "Flatness",
    "LookSAM",
    "get_flatness",
]

FLATNESS: dict[str, type[Flatness]] = {
    cls.name: cls for cls in (FMTL, SAM, ASAM, GSAM, WSAM, FSAM, LookSAM, SAMO, MTCOOL, SGSU)
}


def get_flatness(flat: str | Flatness, every: int | None = None) -> Flatness:
    """A mode from its name, or the object itself; with `every`, if given, as its option."""
    flat = by_name(flat, Flatness, FLATNESS, {}, kind="flatness mode", example="FMTL(every=2)", subject="flat")
    if every is None:
        return flat
    if "every" not in flat.option_names():
        raise ValueError(f"flatness mode {flat.name!r} has no option every, which is {every!r}")
    mode: Any = flat
    changed: Flatness = replace(mode, every=every)
    return changed
