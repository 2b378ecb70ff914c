"""Conflict and sharpness of a model's tasks, measured without training it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._feature_variance import FeatureVariance, modules_of
from ._inspect import Untouched, arguments_of, evaluate, tracked
from ._losses import Task
from .optimizer import FlatMTL

_FAMILIES = ("loss", "flat")


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What `flatmtl.diagnose` found. Tensors are float64 on the CPU; NaN where something is undefined.

    `records` holds every batch's `FlatMTL.last`; the properties are means over the batches where a value is defined.
    Norms and cosines are of the gradients of the shared parameters, as in `FlatMTL.last`.
    """

    tasks: list[Task]
    rho: float | tuple[float, float]
    records: list[dict[str, Any]]
    features: FeatureVariance | None = None

    def _stack(self, name: str) -> Tensor:
        return torch.stack([record[name] for record in self.records])

    @property
    def losses(self) -> Tensor:
        """K."""
        return self._stack("losses").nanmean(0)

    @property
    def sharpness(self) -> Tensor:
        """Rise of each task's loss at its own perturbed point, l_i(theta + rho g_i/||g_i||) - l_i(theta). K."""
        return self._stack("sharpness").nanmean(0)

    @property
    def norms_loss(self) -> Tensor:
        """||g_i||. K."""
        return self._stack("norms_loss").nanmean(0)

    @property
    def norms_flat(self) -> Tensor:
        """||f_i||, of the change of the gradient at the perturbed point. K."""
        return self._stack("norms_flat").nanmean(0)

    @property
    def cosine_loss(self) -> Tensor:
        """Cosines between the tasks' gradients g. K x K."""
        return self._stack("cosine_loss").nanmean(0)

    @property
    def cosine_flat(self) -> Tensor:
        """Cosines between the flat parts f. K x K."""
        return self._stack("cosine_flat").nanmean(0)

    @property
    def conflicts_loss(self) -> Tensor:
        """Fraction of the batches in which two tasks' g have a negative inner product. K x K; NaN on the diagonal."""
        return self._conflicts("loss")

    @property
    def conflicts_flat(self) -> Tensor:
        """The same of f."""
        return self._conflicts("flat")

    def _conflicts(self, family: str) -> Tensor:
        cosine = self._stack(f"cosine_{family}")
        negative = torch.where(cosine.isnan(), math.nan, (cosine < 0).double()).nanmean(0)
        return negative.fill_diagonal_(math.nan)

    def conflict_fraction(self, family: str = "loss") -> float:
        """Fraction of all pairs of tasks, over all batches, that conflict: `family` is "loss" (g) or "flat" (f)."""
        if family not in _FAMILIES:
            raise ValueError(f"family is {family!r}; it must be 'loss' or 'flat'")
        first, second = torch.triu_indices(len(self.tasks), len(self.tasks), 1)
        pairs = self._stack(f"cosine_{family}")[:, first, second]
        pairs = pairs[~pairs.isnan()]
        return float((pairs < 0).double().mean()) if len(pairs) else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, None for NaN: ready for JSON."""
        names = ("losses", "sharpness", "norms_loss", "norms_flat", "cosine_loss", "cosine_flat")
        out: dict[str, Any] = {
            "tasks": list(self.tasks), "batches": len(self.records), "rho": self.rho,
            **{name: getattr(self, name).tolist() for name in (*names, "conflicts_loss", "conflicts_flat")},
            "conflict_fraction_loss": self.conflict_fraction("loss"),
            "conflict_fraction_flat": self.conflict_fraction("flat"),
        }  # fmt: skip
        if self.features is not None:
            out["feature_variance"] = self.features.variance
            out["feature_variance_across"] = self.features.across
        result: dict[str, Any] = _without_nan(out)
        return result

    # -- as text -----------------------------------------------------------------------------------------------------

    def _tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """(title, heads, rows) of each table."""
        names = [str(task) for task in self.tasks]
        columns = (self.losses, self.norms_loss, self.sharpness, self.norms_flat)
        rows = [
            [name, *(_number(column[i]) for column in columns)] for i, name in enumerate(names)
        ]  # fmt: skip
        title = f"{len(names)} tasks, {len(self.records)} batch{'es' * (len(self.records) != 1)}, rho {self.rho}"
        tables = [(title, ["task", "loss", "norm of g", "sharpness", "norm of f"], rows)]
        if len(names) > 1:
            for family, symbol in zip(_FAMILIES, "gf", strict=True):
                cosine, conflicts = getattr(self, f"cosine_{family}"), getattr(self, f"conflicts_{family}")
                if cosine.isnan().all():
                    continue
                cells = [
                    [name, *(_pair(cosine[i, j], conflicts[i, j]) if i != j else "" for j in range(len(names)))]
                    for i, name in enumerate(names)
                ]
                share = _percent(self.conflict_fraction(family))
                title = f"cosine of {symbol} (batches in conflict); over all pairs {share}"
                tables.append((title, ["", *names], cells))
        if self.features is not None:
            cells = [[name, f"{value:.3f}"] for name, value in self.features.variance.items()]
            if not math.isnan(self.features.across):
                cells.append(["across", f"{self.features.across:.3f}"])
            tables.append(("relative variance of features", ["module", "variance"], cells))
        return tables

    def __str__(self) -> str:
        parts = []
        for title, heads, rows in self._tables():
            widths = [max(len(row[c]) for row in [heads, *rows]) for c in range(len(heads))]
            lines = [
                "  ".join(
                    cell.rjust(w) if c else cell.ljust(w) for c, (cell, w) in enumerate(zip(row, widths, strict=True))
                )
                for row in [heads, *rows]
            ]
            parts.append("\n".join([title, *(line.rstrip() for line in lines)]))
        return "\n\n".join(parts)

    def __rich__(self) -> Any:
        """Tables, for `rich.print`."""
        from rich.console import Group
        from rich.table import Table

        parts: list[Any] = []
        for title, heads, rows in self._tables():
            table = Table()
            for c, head in enumerate(heads):
                table.add_column(head, justify="right" if c else "left")
            for row in rows:
                table.add_row(*row)
            parts += [title, table]
        return Group(*parts)


def diagnose(
    model: nn.Module,
    closure: Any,
    *,
    batches: Iterable[Any] | None = None,
    rho: float | tuple[float, float] = 0.05,
    adaptive: bool = False,
    eta: float = 0.0,
    norm: str = "separate",
    shared: Iterable[Tensor | nn.Module] | None = None,
    features: Any = None,
    replay_rng: bool = True,
    progress: bool | None = None,
) -> Diagnosis:
    """Measures how the tasks conflict and how sharp the model is for each, and leaves it as it was, bit for bit.

    A batch costs the passes of one F-MTL step, K + 1 forwards and 2K backwards, and one forward more with `features`.

    Args:
        model: its parameters are the ones that are perturbed. Train or eval mode is left to you.
        closure: returns the task losses, as for `FlatMTL.step`.
        batches: if given, the closure is called as `closure(batch)` for each; conflicts are then counted over them.
        rho, adaptive, eta, norm, shared, replay_rng: as for `FlatMTL`. rho=0 measures conflict alone.
        features: a module, or a sequence or dict of modules, whose outputs' variance is measured (`FeatureVariance`).
        progress: a bar on stderr (rich's or tqdm's, if installed). None: if it is a terminal.

    Returns:
        A `Diagnosis`: print it, or take `to_dict()`.

    Raises:
        NonFiniteError: a loss or a gradient is Inf or NaN.
        ValueError, TypeError: an argument is wrong. The model has not changed after any error.
    """
    arguments = arguments_of(batches)
    variance = None if features is None else FeatureVariance(modules_of(features))
    with Untouched(model) as untouched:
        optimizer = FlatMTL(
            torch.optim.SGD([p for p in untouched.params if p.requires_grad], lr=0.0), aggregator="sum", rho=rho,
            adaptive=adaptive, eta=eta, norm=norm, shared=shared, replay_rng=replay_rng,
        )  # fmt: skip
        records = []
        with tracked(arguments, "diagnosis", progress) as tracked_arguments:
            for argument in tracked_arguments:
                if variance is not None:
                    with variance.watching():
                        evaluate(closure, argument, untouched)
                with untouched.window():
                    if argument:
                        optimizer.backward(closure, batches=list(argument))
                    else:
                        optimizer.backward(closure)
                records.append(optimizer.last)
        assert optimizer.tasks is not None
        return Diagnosis(list(optimizer.tasks), rho, records, variance)


def _number(value: Tensor) -> str:
    return "-" if value.isnan() else f"{float(value):.4g}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.0f} %"


def _pair(cosine: Tensor, conflicts: Tensor) -> str:
    return "-" if cosine.isnan() else f"{float(cosine):.2f} ({_percent(float(conflicts))})"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
