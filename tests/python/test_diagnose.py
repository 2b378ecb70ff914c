"""flatmtl.diagnose: closed forms, counts of conflicts, variance of features; and that the model is left as it was."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from typing import Any

import digits
import flatmtl
import numpy as np
import pytest
import torch
from torch import Tensor, nn


class Point(nn.Module):
    """A model that is one shared vector."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor(values, dtype=torch.float64))


def everything(model: nn.Module) -> Any:
    """Copies of all that must not change, and the .grad tensors themselves."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [p.grad for p in model.parameters()]
    return state, grads, [None if g is None else g.clone() for g in grads], torch.get_rng_state(), model.training


def check_untouched(model: nn.Module, before: Any) -> None:
    state, grads, values, rng, training = before
    assert digits.same(dict(model.state_dict()), state)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert digits.same([p.grad for p in model.parameters()], values)
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training == training


def test_quadratics_have_closed_forms() -> None:
    model = Point(1.0, -2.0, 0.5)
    x, rho = model.x.detach().clone(), 0.3
    hessians = [torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ([1.0, 2.0, 3.0], [4.0, 0.5, 0.1])]
    found = flatmtl.diagnose(model, lambda: {name: model.x @ h @ model.x / 2 for name, h in zip("ab", hessians, strict=True)}, rho=rho)  # fmt: skip
    g = [h @ x for h in hessians]
    f = [rho * h @ h @ x / (h @ x).norm() for h in hessians]
    rise = [rho * (h @ x).norm() + rho**2 / 2 * (h @ x) @ h @ (h @ x) / (h @ x).square().sum() for h in hessians]
    assert found.tasks == ["a", "b"]
    torch.testing.assert_close(found.losses, torch.stack([x @ h @ x / 2 for h in hessians]))
    torch.testing.assert_close(found.norms_loss, torch.stack([v.norm() for v in g]))
    torch.testing.assert_close(found.norms_flat, torch.stack([v.norm() for v in f]))
    torch.testing.assert_close(found.sharpness, torch.stack(rise))
    for cosine, (a, b) in ((found.cosine_loss, g), (found.cosine_flat, f)):
        torch.testing.assert_close(cosine[0, 1], a @ b / (a.norm() * b.norm()))
        torch.testing.assert_close(cosine.diagonal(), torch.ones(2, dtype=torch.float64))


def test_conflicts_are_counted_over_batches() -> None:
    """Linear losses, whose gradients a batch gives: a and b conflict in two of four, c is absent from one."""
    model = Point(0.0, 0.0)
    batches = [
        ([1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]),  # b and c conflict, a and c conflict
        ([1.0, 0.0], [-1.0, 1.0], [0.0, 1.0]),  # a and b
        ([1.0, 0.0], [-1.0, 0.0], None),  # a and b
        ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0]),
    ]

    def closure(batch: Any) -> list[Tensor | None]:
        return [None if v is None else model.x @ torch.tensor(v, dtype=torch.float64) for v in batch]

    found = flatmtl.diagnose(model, closure, batches=batches, rho=0.1)
    conflicts = found.conflicts_loss
    assert [conflicts[0, 1], conflicts[0, 2], conflicts[1, 2]] == pytest.approx([2 / 4, 1 / 3, 1 / 3])
    assert torch.equal(conflicts.triu(1), conflicts.T.triu(1))
    assert conflicts.diagonal().isnan().all()
    assert found.conflict_fraction() == pytest.approx(4 / 10)
    assert math.isnan(found.conflict_fraction("flat"))  # linear losses have no flat part
    torch.testing.assert_close(found.sharpness, 0.1 * found.norms_loss)
    with pytest.raises(ValueError, match="family is 'both'"):
        found.conflict_fraction("both")


def test_the_report_reads_and_is_json() -> None:
    rich_console = pytest.importorskip("rich.console")
    model = digits.net()
    closure: Callable[[Any], Any] = lambda batch: digits.losses_of(model, batch)  # noqa: E731
    found = flatmtl.diagnose(model, closure, batches=digits.batches(2), features=model.trunk)
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["tasks"] == ["digit", "even"]
    assert record["batches"] == 2
    assert record["conflicts_loss"][0][0] is None
    assert record["sharpness"] == found.sharpness.tolist()
    console = rich_console.Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(found)
    for text in (str(found), console.export_text()):
        for part in ("2 tasks, 2 batches, rho 0.05", "sharpness", "cosine of g", "cosine of f", "variance"):
            assert part in text
        assert f"{float(found.sharpness[0]):.4g}" in text


def test_one_task_and_no_radius() -> None:
    model = digits.net()
    closure = lambda: digits.losses_of(model, digits.batches(1)[0])["digit"]  # noqa: E731
    found = flatmtl.diagnose(model, closure, rho=0.0)
    assert found.sharpness.isnan().all()
    assert math.isnan(found.conflict_fraction())
    assert "cosine" not in str(found)


# -- variance of features ----------------------------------------------------------------------------------------------


def test_variance_of_features_is_numpys() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.a(x).square().mean(), self.b(x).square().mean()]

    torch.manual_seed(0)
    model = Two().double()
    batches = [torch.randn(n, 3, dtype=torch.float64) + 100 for n in (5, 8, 3)]  # a mean far from 0
    found = flatmtl.diagnose(model, model, batches=batches, features={"a": model.a, "b": model.b}).features
    assert found is not None
    with torch.no_grad():
        z = np.stack([layer(torch.cat(batches)).numpy() for layer in (model.a, model.b)])  # module, sample, feature
    for m, name in enumerate("ab"):
        assert found.variance[name] == pytest.approx(z[m].var(0).sum() / (z[m] ** 2).mean(0).sum(), rel=1e-9)
    assert found.across == pytest.approx(z.var(0).sum(1).mean() / (z**2).sum(2).mean(), rel=1e-9)
    alone = flatmtl.diagnose(model, model, batches=batches, features=[model.a]).features
    assert alone is not None
    assert math.isnan(alone.across)


def test_errors_of_features() -> None:
    model = digits.net()
    closure = lambda: digits.losses_of(model, digits.batches(1)[0])  # noqa: E731
    with pytest.raises(ValueError, match="module '0' was not called"):
        flatmtl.diagnose(model, closure, features=nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"features\['trunk'\] must be a torch.nn.Module, but is str"):
        flatmtl.diagnose(model, closure, features={"trunk": "trunk"})
    with pytest.raises(TypeError, match="features must be modules, but is int"):
        flatmtl.diagnose(model, closure, features=3)


# -- the model is left as it was ---------------------------------------------------------------------------------------


def fails(call: int, kind: str, closure: Callable[..., Any]) -> Callable[..., Any]:
    """The closure, which goes wrong in its call number `call`."""
    calls = 0

    def wrapped(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        losses = closure(*args)
        if calls == call:
            if kind == "raises":
                raise ZeroDivisionError
            if kind == "Ctrl-C":
                os.kill(os.getpid(), signal.SIGINT)
            return {task: loss * math.nan for task, loss in losses.items()}
        return losses

    return wrapped


@pytest.mark.parametrize("call", [1, 2, 5])
@pytest.mark.parametrize(
    ("kind", "error"),
    [("nothing", None), ("raises", ZeroDivisionError), ("Ctrl-C", KeyboardInterrupt), ("NaN", flatmtl.NonFiniteError)],
)
def test_the_model_is_left_as_it_was(kind: str, error: Any, call: int) -> None:
    model = digits.net(dropout=0.5)
    sum(digits.losses_of(model, digits.batches(1)[0]).values()).backward()  # type: ignore[union-attr]
    closure = fails(0 if kind == "nothing" else call, kind, lambda batch: digits.losses_of(model, batch))
    before, handler = everything(model), signal.getsignal(signal.SIGINT)
    if error is None:
        flatmtl.diagnose(model, closure, batches=digits.batches(3), features=None if call == 1 else model.trunk)
    else:
        with pytest.raises(error):
            flatmtl.diagnose(model, closure, batches=digits.batches(3))
    check_untouched(model, before)
    assert signal.getsignal(signal.SIGINT) is handler


def test_errors() -> None:
    model = digits.net()
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, but is list"):
        flatmtl.diagnose([], lambda: [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no parameter of the model requires grad"):
        flatmtl.diagnose(nn.ReLU(), lambda: [])
    with pytest.raises(ValueError, match="batches is empty"):
        flatmtl.diagnose(model, lambda batch: [], batches=[])
    with pytest.raises(ValueError, match="rho"):
        flatmtl.diagnose(model, lambda: [], rho=-1.0)


def test_the_progress_bar_is_on_stderr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    model = digits.net()
    closure = lambda: digits.losses_of(model, digits.batches(1)[0])  # noqa: E731
    monkeypatch.setenv("FORCE_COLOR", "1")
    flatmtl.diagnose(model, closure, progress=True)
    out, err = capsys.readouterr()
    assert "diagnosis" in err
    assert out == ""
    flatmtl.diagnose(model, closure)  # not a terminal
    assert capsys.readouterr() == ("", "")
