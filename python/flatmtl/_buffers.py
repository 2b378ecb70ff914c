"""The buffer methods inside a step: what they need, checked and gathered before anything changes; then, as the last
thing in a step, their buffers and the update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .buffers import BufferAggregator, MoCo, fresh_buffer

if TYPE_CHECKING:
    from ._step import Step

Rows = list[list[Tensor]]


@dataclass
class Family:
    """x_i = a_i g_i + b_i (s_i - g_i), or a_i g_i without perturbed rows; without the loss scale."""

    name: str
    rows: Rows
    perturbed: Rows | None
    a: Tensor
    b: Tensor
    squares: Tensor  # ||x_i||^2


class Plan:
    """One step of a buffer method. `write` cannot fail for reasons of the user's."""

    def __init__(
        self, step: Step, loss_rows: Rows, perturbed_rows: Rows | None, pair: Tensor, direct: Tensor | None,
        coefficients: tuple[Tensor, Tensor, Tensor],
    ) -> None:  # fmt: skip
        aggregator = step.settings.aggregator
        assert isinstance(aggregator, BufferAggregator)
        self.step, self.aggregator = step, aggregator
        self.at = [s.index for s in step.present]
        self.options = aggregator.option_values(
            len(step.tasks), seed=step.settings.seed, draw=step.draw, present=self.at
        )
        p, q, c = coefficients
        self.losses = torch.stack([s.loss.double() for s in step.present if s.loss is not None]).cpu() * c
        for state, loss in zip(step.present, self.losses.tolist(), strict=True):
            aggregator.check_loss(loss, state.task)
        unscale, count = 1.0 / step.loss_scale, len(c)
        squares = pair.diagonal().clone()
        if perturbed_rows is None:
            self.families = [Family("loss", loss_rows, None, c * unscale, c, squares[:count])]
        elif direct is not None:
            a, b = (1.0 + p) * c * unscale, q * c * unscale
            self.families = [Family("loss", loss_rows, perturbed_rows, a, b, direct.diagonal().clone())]
        else:
            self.families = [
                Family("loss", loss_rows, None, c * unscale, c, squares[:count]),
                Family("flat", loss_rows, perturbed_rows, p * c * unscale, q * c * unscale, squares[count:]),
            ]
        old = step.states.get("aggregator", {})
        self.memories = [self._memory(old.get(family.name)) for family in self.families]
        self.scales: list[float] = []
        self.keeps: list[Tensor] = []
        for family, memory in zip(self.families, self.memories, strict=True):
            self._factors(family, memory)
        new: dict[str, Any] = {"name": aggregator.name}
        for family, memory in zip(self.families, self.memories, strict=True):
            new[family.name] = {"values": memory["values"].reshape(-1), "buffers": memory["buffers"]}
        if any(len(memory["values"]) or memory["buffers"] for memory in self.memories):
            step.new_states = {**step.new_states, "aggregator": {**old, **new}}

    def _memory(self, old: dict[str, Any] | None) -> dict[str, Any]:
        """A copy of the numbers; the buffers themselves, in new lists."""
        step, total = self.step, len(self.step.tasks)
        values = self.aggregator.fresh_values(total) if old is None else old["values"].clone()
        buffers = {} if old is None else {key: list(row) for key, row in old["buffers"].items()}
        values = values.view(-1, total) if len(values) else values
        memory: dict[str, Any] = {"values": values, "buffers": buffers, "rows": [[] for _ in self.at]}
        memory["part"] = values[:, self.at].reshape(-1).contiguous() if len(values) else values
        for i in step.shared if self.aggregator.has_buffers else ():
            row = buffers.setdefault(str(step.params[i].index), [None] * total)
            for k, task in enumerate(self.at):
                like = step.tensors[i]
                row[task] = fresh_buffer(like) if row[task] is None else _fitted(row[task], like)
                memory["rows"][k].append(row[task])
        return memory

    def _factors(self, family: Family, memory: dict[str, Any]) -> None:
        """Multiplies a and b by what the method makes of losses and norms; notes what is kept of the buffers."""
        factors, keep = torch.ops.flatmtl.buffer_factors(
            self.losses, family.squares, memory["part"], self.aggregator.number, self.options
        )
        scale = 1.0
        if isinstance(self.aggregator, MoCo) and self.step.settings.family_scale == "rms":
            scale = float(family.squares.mean().sqrt())
            if not self.aggregator.normalize and scale > 0.0:
                factors = factors / scale
        family.a, family.b = family.a * factors, family.b * factors
        self.scales.append(scale * self.step.loss_scale)
        self.keeps.append(keep)

    # -- the last thing in a step ----------------------------------------------------------------------------------

    def write(self, target: list[Tensor]) -> list[Tensor]:
        """The update of the shared parameters, into `target`; returns the weights of each family."""
        if self.aggregator.name == "graddrop":
            return self._drop(target)
        write = {"moco": self._average, "db_mtl": self._average, "excess_mtl": self._excess, "sdmgrad": self._sdmgrad}
        weights = write[self.aggregator.name](target)
        for memory in self.memories:
            memory["values"][:, self.at] = memory["part"].view(-1, len(self.at))
        return weights

    def _weights(self, sums: Tensor, memory: dict[str, Any]) -> Tensor:
        w: Tensor = torch.ops.flatmtl.buffer_weights(sums, memory["part"], self.aggregator.number, self.options)
        return w

    def _drop(self, target: list[Tensor]) -> list[Tensor]:
        seed, draw = int(self.options[0]), int(self.options[1])
        leak = torch.tensor(self.options[2:], dtype=torch.float64)
        for call, family in enumerate(self.families):
            out = target if call == 0 else [torch.empty_like(t) for t in target]
            self._arithmetic.graddrop_(
                out, family.rows, family.perturbed, self._shared, family.a * self.step.loss_scale,
                family.b * self.step.loss_scale, leak, seed, draw, call,
            )  # fmt: skip
            for t, u in zip(target, out, strict=True):
                if t is not u:
                    t.add_(u)
        return [torch.full((len(self.at),), torch.nan, dtype=torch.float64) for _ in self.families]

    def _average(self, target: list[Tensor]) -> list[Tensor]:
        found, buffers, factors = [], [], []
        for family, memory, keep, scale in zip(self.families, self.memories, self.keeps, self.scales, strict=True):
            rows = memory["rows"]
            self._arithmetic.moving_average_(
                rows, family.rows, family.perturbed, self._shared, family.a, family.b, keep
            )
            gramian = self._arithmetic.gramian(rows, self._shared)
            sums = gramian if self.aggregator.name == "moco" else gramian.diagonal().contiguous()
            found.append(self._weights(sums, memory))
            buffers += rows
            factors.append(found[-1] * scale)
        self._arithmetic.combine_buffers_(target, buffers, self._shared, torch.cat(factors))
        return found

    def _excess(self, target: list[Tensor]) -> list[Tensor]:
        found = []
        for family, memory in zip(self.families, self.memories, strict=True):
            rows = memory["rows"]
            sums = self._arithmetic.excess_(rows, family.rows, family.perturbed, self._shared, family.a, family.b)
            found.append(self._weights(sums, memory))
        self._combine(target, self.families, found)
        return found

    def _sdmgrad(self, target: list[Tensor]) -> list[Tensor]:
        found, first = [], []
        for family, memory in zip(self.families, self.memories, strict=True):
            parts = [self._part(family, part) for part in self.step.parts]
            (_, _), (y, y_perturbed), (z, z_perturbed) = parts
            cross = self._arithmetic.cross_gramian(y, y_perturbed, z, z_perturbed, self._shared, family.a, family.b)
            found.append(self._weights(cross, memory))
            first.append(Family(family.name, *parts[0], family.a, family.b, family.squares))
        self._combine(target, first, found)
        return found

    def _part(self, family: Family, part: list[Any]) -> tuple[Rows, Rows | None]:
        """The family's rows in one of the batches; zeros where a task is absent from it."""
        none: list[Tensor | None] = [None] * len(self.step.tensors)
        states = [part[i] for i in self.at]
        rows = [self.step.point.row(s.grads or none, self._shared) for s in states]
        if family.perturbed is None:
            return rows, None
        return rows, [self.step.point.row(s.perturbed or none, self._shared) for s in states]

    def _combine(self, target: list[Tensor], families: list[Family], weights: list[Tensor]) -> None:
        """target = SUM over families and tasks of w_i x_i; the families share their rows."""
        scale, last = self.step.loss_scale, families[-1]
        a = sum(w * family.a for family, w in zip(families, weights, strict=True)) * scale
        b = weights[-1] * last.b * scale
        self._arithmetic.combine_(target, last.rows, last.perturbed, self._shared, torch.as_tensor(a), b)

    @property
    def _arithmetic(self) -> Any:
        return self.step.arithmetic

    @property
    def _shared(self) -> list[int]:
        return self.step.shared


def _fitted(buffer: Tensor, like: Tensor) -> Tensor:
    """A buffer as `fresh_buffer` would make it: itself, or a copy where it was loaded from another device, dtype or
    memory layout."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if (buffer.device, buffer.dtype, buffer.stride()) == (like.device, dtype, like.stride()):
        return buffer
    return torch.empty_like(like, dtype=dtype).copy_(buffer)
