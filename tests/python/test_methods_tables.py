"""The tables of docs/methods.md on buffer methods and loss weightings name what there is, with its defaults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from flatmtl import _ops
from flatmtl.aggregators import BUFFER_AGGREGATORS
from flatmtl.weightings import WEIGHTINGS

DOCS = Path(__file__).parents[2] / "docs/methods.md"


def table(section: str) -> dict[str, dict[str, str]]:
    text = DOCS.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    lines = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    header = [cell.strip() for cell in lines[0]]
    rows = [dict(zip(header, (cell.strip() for cell in line), strict=True)) for line in lines[2:]]
    return {row["name"].strip("`"): row for row in rows}


@pytest.mark.parametrize(
    ("section", "classes"),
    [
        ("Buffer methods", BUFFER_AGGREGATORS),
        ("Loss weightings", WEIGHTINGS),
    ],
)
def test_names_classes_and_defaults(section: str, classes: dict) -> None:
    rows = table(section)
    assert set(rows) == set(classes)
    for name, row in rows.items():
        found = re.fullmatch(r"`(\w+)(?:\((.*)\))?`", row["class"])
        assert found is not None
        assert found[1] == classes[name].__name__
        fields = classes[name].__dataclass_fields__
        for option in filter(None, (found[2] or "").split(", ")):
            key, _, default = option.partition("=")
            if key != "...":
                assert key in fields
                assert not default or float(default) == fields[key].default
        paper = row["paper"]
        assert not paper or paper in (classes[name].__doc__ or ""), paper


def test_columns() -> None:
    for name, row in table("Buffer methods").items():
        cls = BUFFER_AGGREGATORS[name]
        assert row["buffers"] == ("yes" if cls.has_buffers else "no")
        assert row["losses"] == (cls.domain or "any")
    for name, row in table("Loss weightings").items():
        assert row["state"] == ("yes" if _ops.weighting_state_size(_ops.WEIGHTINGS[name], 2) else "no")
        assert row["losses"] == ("> m" if name == "famo" else WEIGHTINGS[name].domain or "any")
