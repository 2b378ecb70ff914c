"""The loss of every task along random directions: loss landscapes, as arrays and as pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._inspect import Untouched, arguments_of, evaluate, tracked
from ._losses import Task


@dataclass(frozen=True, eq=False)
class Landscape:
    """What `flatmtl.landscape` found.

    `positions` are the N steps along a direction, float64. `losses` is K x N, or K x N x N with the first direction
    along its rows' axis (dimension 1) and the second along dimension 2; float64 on the CPU; Inf and NaN stand as they
    came.
    """

    tasks: list[Task]
    positions: Tensor
    losses: Tensor
    seed: int

    @property
    def center(self) -> Tensor:
        """The losses of the model itself, K."""
        return self.losses.flatten(1)[:, self.losses[0].numel() // 2]  # an odd number of points along each direction

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {
            "tasks": list(self.tasks),
            "positions": self.positions.tolist(),
            "losses": self.losses.tolist(),
            "seed": self.seed,
        }

    def plot(self, path: str | Path | None = None, *, maximum: float | None = None) -> Any:
        """Draws it with matplotlib: a line a task in 1-D, contours, one panel a task, in 2-D.

        Args:
            path: file to write, its format by its ending (.png, .pdf, .svg).
            maximum: losses above it are cut off; to compare pictures of several models. In 2-D each task has colours of
                its own, up to its largest loss.

        Returns:
            The matplotlib Figure, not registered with pyplot.

        Raises:
            ImportError: there is no matplotlib.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Landscape.plot needs matplotlib: pip install matplotlib") from error
        losses = self.losses.masked_fill(~self.losses.isfinite(), math.nan)
        if losses.isnan().all():
            raise ValueError("no loss of the landscape is finite: there is nothing to draw")
        count = len(self.tasks)
        if losses.dim() == 2:
            figure = Figure(figsize=(5, 3.5), layout="constrained")
            axes = figure.add_subplot()
            for task, line in zip(self.tasks, losses, strict=True):
                cut = line if maximum is None else line.masked_fill(line > maximum, math.nan)
                axes.plot(self.positions, cut, label=str(task))
            axes.set(xlabel="step along a filter-normalised random direction", ylabel="loss")
            axes.grid(alpha=0.3)
            axes.legend(title="task")
        else:
            figure = Figure(figsize=(4.1 * count, 3.4), layout="constrained")
            panels = figure.subplots(1, count, squeeze=False, sharex=True, sharey=True)[0]
            for axes, task, surface in zip(panels, self.tasks, losses, strict=True):
                _contours(figure, axes, self.positions, surface, maximum)
                axes.set(title=str(task), xlabel="first direction", aspect="equal")
            panels[0].set_ylabel("second direction")
        if path is not None:
            figure.savefig(path, dpi=110)
        return figure


def _contours(figure: Any, axes: Any, positions: Tensor, surface: Tensor, maximum: float | None) -> None:
    finite = surface[~surface.isnan()]
    if not len(finite):
        return
    low, high = float(finite.min()), float(finite.max())
    top = high if maximum is None else min(high, float(maximum))
    top = max(top, low + 1e-9 * max(abs(low), 1e-9))  # a plane still needs two levels
    levels = torch.linspace(low, top, 16).tolist()
    extend = "max" if high > top else "neither"
    # contourf wants Z[y, x]; x is the first direction
    drawn = axes.contourf(positions, positions, surface.T, levels=levels, cmap="viridis", extend=extend)
    axes.contour(positions, positions, surface.T, levels=levels, colors="white", linewidths=0.4, alpha=0.6)
    axes.plot(0, 0, "+", color="red", markersize=9)
    figure.colorbar(drawn, ax=axes, label="loss", ticks=levels[::5], format="%.3g")


def landscape(
    model: nn.Module,
    closure: Any,
    *,
    batches: Iterable[Any] | None = None,
    dimensions: int = 2,
    distance: float = 1.0,
    points: int = 21,
    seed: int = 0,
    progress: bool | None = None,
) -> Landscape:
    r"""Losses on a line or a plane through the model, in filter-normalised random directions (1712.09913, section 4).

    .. math:: L_i(\alpha, \beta) = l_i(\theta + \alpha\, d + \beta\, e),\quad
        d_j \leftarrow \frac{d_j}{\|d_j\|} \|\theta_j\|

    for every filter j: the slice along the first dimension of a parameter with two dimensions or more (an output channel
    of a convolution, a row of a linear layer). Directions are zero for parameters with fewer (biases, BatchNorm), and
    for those that do not require grad. Pictures of different models can be compared at the same `distance`.

    Every point is evaluated in the mode, train or eval, that the model is in, with the same random draws (dropout) and
    from the same buffers. In train mode BatchNorm takes the statistics of the batch. `.eval()` before is the usual way.

    Args:
        model: its parameters are moved, and put back bit for bit, with buffers and generators, whatever happens.
        closure: returns the task losses, as for `FlatMTL.step`; evaluated without gradients.
        batches: if given, the closure is called as `closure(batch)` for each, and losses are means over them.
        dimensions: 1 or 2. There are points ** dimensions evaluations.
        distance: the largest step along a direction; 1 moves a filter by its own norm.
        points: odd, at least 3, so that the model itself is the point in the middle.
        seed: of the directions. Drawn on the CPU: the same everywhere.
        progress: a bar on stderr (rich's or tqdm's, if installed). None: if it is a terminal.

    Returns:
        A `Landscape`: losses per task, `plot(path)`, `to_dict()`.

    Raises:
        ValueError, TypeError: an argument is wrong. Nothing has changed then.
    """
    if dimensions not in (1, 2):
        raise ValueError(f"dimensions is {dimensions!r}; it must be 1 or 2")
    if not isinstance(points, int) or points < 3 or points % 2 == 0:
        raise ValueError(f"points is {points!r}; it must be odd and at least 3, so that the model is in the middle")
    if not 0 < distance < math.inf:
        raise ValueError(f"distance is {distance!r}; it must be a finite number above 0")
    arguments = arguments_of(batches)
    # symmetric, so that 0 is met exactly
    positions = torch.arange(-(points // 2), points // 2 + 1, dtype=torch.float64) * (distance / (points // 2))
    tasks: list[Task] | None = None
    with Untouched(model) as untouched:
        generator = torch.Generator().manual_seed(seed)
        directions = [_direction(untouched.params, generator) for _ in range(dimensions)]
        grid = torch.cartesian_prod(*[positions] * dimensions).reshape(-1, dimensions).tolist()
        values = []
        with tracked(grid, "loss landscape", progress) as steps_of_points:
            for steps in steps_of_points:
                untouched.move(directions, steps)
                untouched.rewind()
                rows = []
                for argument in arguments:
                    found, row = evaluate(closure, argument, untouched)
                    if tasks is not None and found != tasks:
                        raise RuntimeError(f"closure returned losses of tasks {found!r}, but of {tasks!r} before")
                    tasks = found
                    rows.append(row)
                values.append(torch.tensor(rows, dtype=torch.float64).nanmean(0))
    losses = torch.stack(values, dim=1)
    return Landscape(tasks or [], positions, losses.reshape(len(losses), *[points] * dimensions), seed)


def _direction(params: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    out = []
    for p in params:
        dtype = torch.promote_types(p.dtype, torch.float32)
        if p.dim() < 2 or not p.requires_grad:
            out.append(torch.zeros((), dtype=dtype, device=p.device).expand(p.shape))
            continue
        random = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        filters = p.detach().to("cpu", torch.float64).reshape(len(p), -1)
        rows = random.reshape(len(p), -1)
        rows *= (filters.norm(dim=1) / rows.norm(dim=1))[:, None]
        out.append(random.to(p.device, dtype))
    return out
