"""The code of README.md and docs/*.md runs.

Blocks of one page share a namespace, which starts with `_names()`: a small model, its data and a closure, as the reader
has them. A block marked ```python is run; of one marked ```diff both sides are, the old one in a copy of the namespace.
HTML comments, invisible to the reader, steer this:

    <!-- skip: next "needs two GPUs" -->            the next block is not run
    <!-- skip: start --> ... <!-- skip: end -->     nor are all between
    <!-- invisible-code-block: python
    something = "run, but not shown"
    -->
    <!-- slow page -->                              the page is left out of `make test`

A page that imports an optional package (OPTIONAL) which is not installed is skipped from there on.
"""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any
from unittest import SkipTest

import flatmtl
import pytest
import torch
import torch.nn.functional as F
from models import TwoHeads, batch, closure_of
from sybil.document import Document
from sybil.evaluators.python import pad
from sybil.evaluators.skip import Skipper
from sybil.example import Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OPTIONAL = {
    "accelerate", "lightning", "matplotlib", "pytorch_optimizer", "rich", "scipy", "sklearn", "tensorboard", "torchjd",
    "tqdm", "transformers", "typer",
}  # fmt: skip


def _names() -> dict[str, Any]:
    """What every page finds defined."""
    torch.manual_seed(0)
    model = TwoHeads(dtype=torch.float32)
    loader = [batch(seed, dtype=torch.float32) for seed in range(3)]
    x, y = loader[0]
    closure = closure_of(model, x, y)
    rows = [torch.autograd.grad(loss, list(model.trunk.parameters()), retain_graph=True) for loss in closure()]
    return {
        "torch": torch, "nn": torch.nn, "F": F, "flatmtl": flatmtl, "model": model, "loader": loader, "x": x, "y": y,
        "targets": y, "closure": closure, "rows": rows,
    }  # fmt: skip


def _run_diff(example: Example) -> None:
    lines = example.parsed.splitlines(keepends=True)
    for sign, namespace in (("-", dict(example.namespace)), ("+", example.namespace)):
        side = "".join(line[1:] if line[0] in " +-" else line for line in lines if line[0] in (" ", "\n", sign))
        source = pad(side, example.line + example.parsed.line_offset)
        exec(compile(source, example.path, "exec", dont_inherit=True), namespace)


def _parse(page: Path) -> Document:
    parsers = [SkipParser(), PythonCodeBlockParser(), CodeBlockParser("diff", _run_diff)]
    return Document.parse(str(page), *parsers)


def _run(page: Path) -> int:
    """Runs a page; the number of blocks that ran."""
    document = _parse(page)
    module = types.ModuleType(f"page_{page.stem}")  # so that classes defined there can be pickled
    vars(module).update(_names())
    document.namespace = vars(module)
    sys.modules[module.__name__] = module
    ran = 0
    try:
        for example in document.examples():
            try:
                example.evaluate()
                ran += not isinstance(example.region.evaluator, Skipper)
            except SkipTest:  # of `skip: next "reason"`
                pass
            except ModuleNotFoundError as error:
                if error.name is None or error.name.partition(".")[0] not in OPTIONAL:
                    raise
                pytest.skip(f"{page.name}, line {example.line}: {error.name} is not installed")
    finally:
        del sys.modules[module.__name__]
    return ran


def _param(page: Path) -> Any:
    slow = re.search(r"^<!-- slow page -->$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return pytest.param(page, id=page.name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("page", [_param(page) for page in PAGES])
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # for what the blocks write
    with torch.random.fork_rng():
        _run(page)


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", prose):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


# -- of this file itself -----------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    page = path / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


def test_blocks_share_a_namespace_and_an_error_is_seen(tmp_path: Path) -> None:
    assert _run(write(tmp_path, "```python\na = 1\n```\n\n- in a list\n\n  ```python\n  assert a == 1\n  ```\n")) == 2
    page = write(tmp_path, "text\n\n```python\na = 1\n```\n\n```python\na = a + missing\n```\n")
    with pytest.raises(NameError, match="missing") as error:
        _run(page)
    assert error.traceback[-1].path == page
    assert error.traceback[-1].lineno + 1 == 8


def test_comments_hide_and_skip(tmp_path: Path) -> None:
    hidden = "<!-- invisible-code-block: python\na = 2\n-->\n\n```python\nassert a == 2\n```\n"
    assert _run(write(tmp_path, hidden)) == 2
    skipped = '<!-- skip: next "two GPUs" -->\n\n```python\n1 / 0\n```\n\n```python\na = 1\n```\n'
    assert _run(write(tmp_path, skipped)) == 1
    region = "<!-- skip: start -->\n\n```python\n1 / 0\n```\n\n<!-- skip: end -->\n\n```python\n1 / 0\n```\n"
    with pytest.raises(ZeroDivisionError):
        _run(write(tmp_path, region))


def test_both_sides_of_a_diff_run(tmp_path: Path) -> None:
    assert _run(write(tmp_path, "```diff\n a = 1\n-a = 2\n+a = 3\n```\n\n```python\nassert a == 3\n```\n")) == 2
    for side in "-+":
        with pytest.raises(ZeroDivisionError):
            _run(write(tmp_path, f"```diff\n a = 1\n{side}a / 0\n```\n"))


def test_only_optional_packages_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such"):
        _run(write(tmp_path, "```python\nimport no_such\n```\n"))
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(pytest.skip.Exception, match=r"page\.md, line 1: lightning is not installed"):
        _run(write(tmp_path, "```python\nimport lightning\n```\n"))
