"""The records of one or several runs as one page's: of every part the entries of the last record that has it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from . import kernels, steps
from .settings import PARTS

SAME = ("cpu", "cores", "threads", "system", "isa", "torch_isa", "python", "torch", "flatmtl")


def merge(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What tables and pictures are made of: `machine` and `contenders`, which the records share; `runs`, those that
    something is taken from, with what it is (`parts`) and their limits; the sections.

    ValueError for records of different machines or versions: it says what differs.
    """
    for number, record in enumerate(records[1:], 2):
        if differences := list(_differences(records[0], record)):
            raise ValueError(
                f"records 1 and {number} are not of one machine and its versions: {'; '.join(differences)}"
            )
    owner = {part: record for record in records for part in _parts(record)}
    page: dict[str, Any] = {
        "machine": records[-1]["machine"],
        "contenders": records[-1]["contenders"],
        "runs": [_run(r, parts) for r in records if (parts := [p for p, own in owner.items() if own is r])],
    }
    for section in PARTS:
        names = [name for name in _names(section) if name in owner]
        if not names:
            continue
        if names == [section]:
            page[section] = owner[section][section]
            continue
        found = {part: _entries(owner.get(f"{section}.{part}", {}), section, part) for part in PARTS[section]}
        if section == "kernels":
            cases = [case for entries in found.values() for case in entries]
            page[section] = {"cases": cases, "limits": _limits(owner[names[-1]]), "fits": kernels.growth(cases)}
        else:
            page[section] = {**found, "fits": steps.growth(found["arithmetic"])}
    return page


def _differences(first: dict[str, Any], other: dict[str, Any]) -> Iterable[str]:
    for name in SAME:
        yield from _difference(name, first["machine"][name], other["machine"][name])
    for name in {**first["contenders"], **other["contenders"]}:
        one, two = (record["contenders"].get(name, {}).get("version") for record in (first, other))
        yield from _difference(name, one, two)


def _difference(name: str, one: Any, two: Any) -> Iterable[str]:
    if one != two:
        yield f"{name} is {one} and {two}"


def _names(section: str) -> list[str]:
    return [f"{section}.{part}" for part in PARTS[section]] or [section]


def _parts(record: dict[str, Any]) -> Iterable[str]:
    """The parts that a record has entries of."""
    for section, parts in PARTS.items():
        if not parts and section in record:
            yield section
        yield from (f"{section}.{part}" for part in parts if _entries(record, section, part))


def _entries(record: dict[str, Any], section: str, part: str) -> list[dict[str, Any]]:
    """Those of kernels with the `peak` of their own run."""
    content = record.get(section, {})
    if section != "kernels":
        entries: list[dict[str, Any]] = content.get(part, [])
        return entries
    peaks = {limit["threads"]: limit["peak"] for limit in _limits(record)}
    cases = [case for case in content.get("cases", []) if kernels.part(case) == part]
    return [{**case, "peak": peaks[case["threads"]]} for case in cases]


def _limits(record: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = record.get("limits", record.get("kernels", {}).get("limits", []))  # as it once was
    return found


def _run(record: dict[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    whole = {section: _names(section) for section in PARTS}
    short = [
        name
        for section, names in whole.items()
        for name in ([section] if set(names) <= set(parts) else [n for n in names if n in parts])
    ]
    facts = record["machine"]
    return {
        "parts": short, "mode": record["mode"], "seconds": record["seconds"], "date": facts["date"],
        "load": facts["load"], "limits": _limits(record),
        "probes": record.get("probes", record.get("kernels", {}).get("probes")),
    }  # fmt: skip
