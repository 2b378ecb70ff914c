"""flatmtl.landscape: the points it evaluates, the pictures it draws; and that the model is left as it was."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import digits
import flatmtl
import pytest
import torch
from test_diagnose import check_untouched, everything, fails
from torch import Tensor, nn


class Seen(nn.Module):
    """A small network that notes its parameters at every evaluation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(2, 3, 2).double()
        self.linear = nn.Linear(4, 2).double()
        self.frozen = nn.Linear(4, 2).double().requires_grad_(False)
        self.norm = nn.BatchNorm1d(4).double()
        self.points: list[dict[str, Tensor]] = []

    def forward(self) -> list[Tensor]:
        self.points.append({name: p.detach().clone() for name, p in self.named_parameters()})
        return [self.conv.weight.square().sum(), self.linear.weight[0].sum()]


def test_directions_are_filter_normalised() -> None:
    model = Seen()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = flatmtl.landscape(model, model, distance=0.5, points=3)
    at = {
        (round(a / 0.5), round(b / 0.5)): {n: p - start[n] for n, p in point.items()}
        for (a, b), point in zip(torch.cartesian_prod(found.positions, found.positions).tolist(), model.points, strict=True)
    }  # fmt: skip
    first, second = at[1, 0], at[0, 1]
    for direction in (first, second):
        for name in ("conv.weight", "linear.weight"):
            filters = direction[name].flatten(1).norm(dim=1)
            torch.testing.assert_close(filters, 0.5 * start[name].flatten(1).norm(dim=1))
        for name in set(start) - {"conv.weight", "linear.weight"}:
            assert direction[name].count_nonzero() == 0, name
    for (i, j), move in at.items():
        for name, value in move.items():
            torch.testing.assert_close(value, i * first[name] + j * second[name])
    flat = [torch.cat([d[name].flatten() for name in sorted(d)]) for d in (first, second)]
    assert abs(flat[0] @ flat[1]) < 0.9 * flat[0].norm() * flat[1].norm()


def test_losses_are_those_at_the_points() -> None:
    """Oracle: the closure's own loss, computed from the parameters it was given. Axis 1 is the first direction."""
    model = Seen()
    found = flatmtl.landscape(model, model, points=5)
    grid = [
        [p["conv.weight"].square().sum() for p in model.points],
        [p["linear.weight"][0].sum() for p in model.points],
    ]
    torch.testing.assert_close(found.losses, torch.tensor(grid).double().reshape(2, 5, 5))
    torch.testing.assert_close(found.positions, torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]).double())
    assert torch.equal(found.center, torch.stack(model()).detach())
    line = flatmtl.landscape(model, model, points=5, dimensions=1)
    assert torch.equal(line.losses, found.losses[:, :, 2])  # the same first direction
    assert torch.equal(line.center, found.center)


def test_the_seed_decides() -> None:
    model = Seen()
    first, again, other = (flatmtl.landscape(model, model, dimensions=1, points=3, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.losses, again.losses)
    assert not torch.equal(first.losses, other.losses)
    assert first.to_dict()["losses"] == first.losses.tolist()


def test_every_point_has_the_same_masks_and_buffers() -> None:
    """With dropout and BatchNorm in train mode, the loss is a smooth function of the step."""
    model = digits.net(dropout=0.5)
    masks, means = [], []
    model.trunk[3].register_forward_hook(lambda m, args, out: masks.append(out == 0))
    model.trunk[1].register_forward_pre_hook(lambda m, args: means.append(m.running_mean.clone()))
    batch = digits.batches(1)[0]
    found = flatmtl.landscape(model, lambda: digits.losses_of(model, batch), dimensions=1, points=3, distance=1e-6)
    torch.testing.assert_close(found.losses, found.center[:, None].expand(2, 3), rtol=1e-4, atol=0)
    assert torch.equal(masks[0], masks[2])
    assert torch.equal(means[0], means[2])


def test_means_over_batches_where_a_task_is_present() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)

    def closure(batch: Any) -> dict[str, Tensor | None]:
        return {"a": model.weight.sum() * batch[0], "b": None if batch[1] is None else model.weight.sum() * batch[1]}

    found = flatmtl.landscape(model, closure, batches=[(1.0, None), (3.0, 5.0)], dimensions=1, points=3)
    direction = found.losses[0, 2] / 2 - 2  # +-2
    assert abs(direction) == pytest.approx(2.0)
    torch.testing.assert_close(found.losses[1], 5 * (2 + direction * found.positions))
    assert found.tasks == ["a", "b"]


@pytest.mark.parametrize(
    ("kind", "error"), [("nothing", None), ("raises", ZeroDivisionError), ("Ctrl-C", KeyboardInterrupt)]
)
def test_the_model_is_left_as_it_was(kind: str, error: Any) -> None:
    model = digits.net(dropout=0.5)
    sum(digits.losses_of(model, digits.batches(1)[0]).values()).backward()  # type: ignore[union-attr]
    batch = digits.batches(1)[0]
    closure = fails(4, kind, lambda: digits.losses_of(model, batch))
    before = everything(model)
    if error is None:
        flatmtl.landscape(model, lambda: digits.losses_of(model, batch), dimensions=1, points=5)
    else:
        with pytest.raises(error):
            flatmtl.landscape(model, closure, dimensions=1, points=5)
    check_untouched(model, before)


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes_module = pytest.importorskip("matplotlib.axes")
    drawn = []
    original = axes_module.Axes.contourf

    def contourf(self: Any, x: Any, y: Any, z: Any, **options: Any) -> Any:
        drawn.append((torch.as_tensor(x), torch.as_tensor(z), options))
        return original(self, x, y, z, **options)

    monkeypatch.setattr(axes_module.Axes, "contourf", contourf)
    model = Seen()
    plane = flatmtl.landscape(model, model, points=5)
    figure = plane.plot(tmp_path / "plane.png", maximum=float(plane.losses[0].median()))
    assert [axes.get_title() for axes in figure.axes[:2]] == ["0", "1"]
    for (_, z, options), losses in zip(drawn, plane.losses, strict=True):
        assert torch.equal(z, losses.T)  # rows are the second direction, the vertical one
        assert options["levels"][0] == pytest.approx(float(losses.min()))
    assert drawn[0][2]["levels"][-1] == pytest.approx(float(plane.losses[0].median()))
    line = flatmtl.landscape(model, model, points=5, dimensions=1)
    lines = line.plot(tmp_path / "line.png").axes[0].lines
    assert torch.equal(torch.as_tensor(lines[1].get_ydata()), line.losses[1])
    for name in ("plane.png", "line.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_non_finite_losses_are_kept_and_left_out_of_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = Seen()
    found = flatmtl.landscape(model, lambda: [1 / (model()[0] * 0), model()[1]], points=3)
    assert found.losses[0].isinf().all()
    found.plot(tmp_path / "plane.png")
    nothing = flatmtl.landscape(model, lambda: [model()[0] * math.nan], points=3)
    with pytest.raises(ValueError, match="nothing to draw"):
        nothing.plot()


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Seen()
    for options, message in [
        ({"dimensions": 3}, "dimensions is 3"),
        ({"points": 4}, "points is 4; it must be odd"),
        ({"distance": 0.0}, "distance is 0.0"),
        ({"batches": []}, "batches is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            flatmtl.landscape(model, model, **options)
    with pytest.raises(TypeError, match="loss of task 0 must be a scalar tensor, but is float"):
        flatmtl.landscape(model, lambda: [1.0])
    with pytest.raises(TypeError, match="but returned str"):
        flatmtl.landscape(model, lambda: "losses")
    found = flatmtl.landscape(model, model, points=3)
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        found.plot()
