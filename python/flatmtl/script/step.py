"""The F-MTL step as a module for `torch.jit.script`: everything but the rule by which parameters are updated."""

# No `from __future__ import annotations`: TorchScript reads the annotations.

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._ops import COMBINE, FAMILY_SCALE
from .._roles import _tensors
from ..aggregators import Aggregator, Fixed, PCGrad, get_aggregator


class Step(nn.Module):
    """Base of `SGD` and `Adam`; see there."""

    # TorchScript reads the annotations of the subclass alone: those of lists that may be empty stand there too.
    params: list[Tensor]
    buffers_: list[Tensor]
    options: list[float]
    saved: list[Tensor]
    saved_buffers: list[Tensor]
    shared: list[int]
    own: list[int]
    steps: Tensor
    updates: Tensor

    def __init__(
        self,
        params: Iterable[Tensor],
        shared: Iterable[Tensor | nn.Module],
        aggregator: str | Aggregator,
        rho: float | tuple[float, float],
        adaptive: bool,
        eta: float,
        norm: str,
        combine: str,
        family_scale: str | None,
        buffers: Iterable[Tensor],
        seed: int,
    ) -> None:
        super().__init__()
        self.params = list(params)
        self.buffers_ = list(buffers)
        _check_params(self.params)
        declared = _tensors(shared)
        missing = declared.difference(self.params)
        if missing:
            raise ValueError(f"flatmtl.script: {len(missing)} of the tensors in shared are not in params")
        self.shared = [i for i, p in enumerate(self.params) if p in declared]  # indices
        self.own = [i for i, p in enumerate(self.params) if p not in declared]
        chosen = get_aggregator(aggregator)
        self.method, self.aggregator_name = chosen.number, type(chosen).__name__
        if chosen.state_size(1):
            raise ValueError(
                f"aggregator {chosen.name!r} keeps a state from step to step, which flatmtl.script does not"
            )
        per_task = chosen.values if isinstance(chosen, Fixed) else getattr(chosen, "preference", None)
        self.is_pcgrad, self.is_fixed = isinstance(chosen, PCGrad), per_task is not None
        self.options = chosen.option_values(1 if per_task is None else len(per_task), seed=seed)
        self.rho_shared, self.rho_task = _radii(rho)
        self.adaptive, self.eta = bool(adaptive), float(eta)
        if not 0.0 <= self.eta < math.inf:
            raise ValueError(f"Invalid eta: {eta} (expected a finite number >= 0)")
        self.joint = _choice("norm", norm, {"separate": 0, "joint": 1}) == 1
        self.combine = _choice("combine", combine, COMBINE)
        self.family_scale = _choice("family_scale", family_scale, {None: 0, "rms": FAMILY_SCALE["rms"]})
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("updates", torch.zeros(len(self.params)))  # of every parameter; f32, as torch counts them
        self.saved = []
        self.saved_buffers = []

    @torch.jit.export
    def gradients(self, losses: list[Tensor]) -> list[list[Tensor | None]]:
        """The gradients of the losses, K rows with an entry for each of `params`: None or zeros where not reached."""
        rows: list[list[Tensor | None]] = []
        for i, loss in enumerate(losses):
            row = torch.autograd.grad([loss], self.params, retain_graph=i + 1 < len(losses), allow_unused=True)
            rows.append(list(row))
        return rows

    @torch.jit.export
    def perturb(self, grads: list[list[Tensor | None]], task: int) -> None:
        """Moves the parameters to the perturbed point of a task. Algorithm 1, step 2.

        The first call of a step keeps the parameters and the buffers as they are, for `restore`.

        Args:
            grads: the K rows of the unperturbed point, as `gradients` gives them. A row of None alone is a task that is
                absent from the batch.
            task: index of the task, 0 to K - 1.
        """
        with torch.no_grad():
            self._check(grads, "grads")
            if task < 0 or task >= len(grads):
                raise RuntimeError(f"flatmtl.script: task is {task}; there are {len(grads)} rows of gradients")
            own = self._own(grads[task])
            params = self.saved if len(self.saved) > 0 else self.params
            sq_shared = self._sq_norm(grads[task], self.shared, params, self.adaptive)
            sq_own = self._sq_norm(grads[task], own, params, self.adaptive)
            self._check_norm(sq_shared + sq_own, task, "unperturbed")
            if self.joint:
                sq_shared = sq_own = sq_shared + sq_own
            if len(self.saved) == 0:
                self._save()
            else:
                self._put_back()
            scale: list[float] = []
            for _ in self.shared:
                scale.append(self.rho_shared / math.sqrt(sq_shared) if sq_shared > 0.0 else 0.0)
            for _ in own:
                scale.append(self.rho_task / math.sqrt(sq_own) if sq_own > 0.0 else 0.0)
            moved = self.shared + own
            perturbed: list[Tensor] = torch.ops.flatmtl.perturb(
                [self.saved[i] for i in moved], self._row(grads[task], moved), scale, self.adaptive, self.eta
            )
            for k, i in enumerate(moved):
                self.params[i].copy_(perturbed[k])

    @torch.jit.export
    def restore(self) -> None:
        """Puts parameters and buffers back, bit for bit. For giving a step up; `step` does it by itself."""
        with torch.no_grad():
            self._put_back()
            self.saved = []
            self.saved_buffers = []

    @torch.jit.export
    def step(self, grads: list[list[Tensor | None]], perturbed: list[list[Tensor | None]]) -> Tensor:
        """Puts parameters and buffers back, combines the gradients and updates the parameters. Algorithm 1, steps 4 to 6.

        A gradient that is not finite is an error, raised before anything is updated.

        Args:
            grads: the K rows of the unperturbed point, as `perturb`.
            perturbed: row i is the gradient of loss i at the perturbed point of task i. Empty: plain aggregation.

        Returns:
            (2, K) float64: the weights of the loss and of the flat family, NaN where undefined.
        """
        with torch.no_grad():
            self.restore()
            self._check(grads, "grads")
            flat = len(perturbed) > 0 and (self.rho_shared != 0.0 or self.rho_task != 0.0)
            if flat:
                self._check(perturbed, "perturbed")
                if len(perturbed) != len(grads):
                    raise RuntimeError(f"flatmtl.script: perturbed has {len(perturbed)} rows, grads has {len(grads)}")
            present: list[int] = []
            for task, row in enumerate(grads):
                own = self._own(row)
                self._check_norm(
                    self._sq_norm(row, self.shared, self.params, self.adaptive)
                    + self._sq_norm(row, own, self.params, self.adaptive), task, "unperturbed",
                )  # fmt: skip
                if flat:
                    self._check_norm(
                        self._sq_norm(perturbed[task], self.shared, self.params, False)
                        + self._sq_norm(perturbed[task], own, self.params, False), task, "perturbed",
                    )  # fmt: skip
                if _reaches(row):
                    present.append(task)
            weights = torch.full((2, len(grads)), math.nan, dtype=torch.float64)
            indices: list[int] = []
            update: list[Tensor] = []
            if len(present) > 0 and len(self.shared) > 0:
                indices = indices + self.shared
                update = self._combine(grads, perturbed, present, weights, flat)
            for i in self.own:
                total: Tensor | None = None
                for task in present:
                    if grads[task][i] is not None:
                        part = self._row(perturbed[task] if flat else grads[task], [i])[0]
                        total = part if total is None else total + part
                if total is not None:
                    indices.append(i)
                    update.append(total)
            self._update(indices, update)
            for i in indices:
                self.updates[i] = self.updates[i] + 1
            self.steps.add_(1)
            return weights

    def _update(self, indices: list[int], update: list[Tensor]) -> None:
        """Updates params[indices[k]] by the combined gradient update[k]."""
        raise NotImplementedError

    def _combine(
        self, grads: list[list[Tensor | None]], perturbed: list[list[Tensor | None]], present: list[int],
        weights: Tensor, flat: bool,
    ) -> list[Tensor]:  # fmt: skip
        """The combined gradient of the shared parameters; writes the weights."""
        count = len(present)
        loss_rows: list[Tensor] = []
        perturbed_rows: list[Tensor] = []
        for task in present:
            loss_rows += self._row(grads[task], self.shared)
            if flat:
                perturbed_rows += self._row(perturbed[task], self.shared)
        # The ops empty the lists they are given: list(...) is theirs. Ops that return nothing are not used: TorchScript
        # drops them where the list they write to is a temporary.
        pair = torch.zeros(2 * count, 2 * count, dtype=torch.float64)
        perturbed_gramian: Tensor | None = None
        if flat:
            cross = self.combine >= 2  # second and each
            pair.copy_(torch.ops.flatmtl.gramian_pair(list(loss_rows), list(perturbed_rows), count, 0, cross))
            if self.combine == 1:
                perturbed_gramian = torch.ops.flatmtl.gramian(list(perturbed_rows), count)
        else:
            pair[:count, :count] = torch.ops.flatmtl.gramian(list(loss_rows), count)
        options = self.options
        if self.is_pcgrad:
            options = [options[0], float(self.steps.item())]
        if self.is_fixed:
            if len(options) != len(grads):
                raise RuntimeError(f"{self.aggregator_name} has {len(options)} values for {len(grads)} tasks")
            options = [options[task] for task in present]
        a, b, _ = torch.ops.flatmtl.step_weights(
            pair, perturbed_gramian, self.method, options, self.combine if flat else 0, self.family_scale
        )
        for k, task in enumerate(present):
            weights[0, task] = a[k]
            if flat:
                weights[1, task] = b[k]
        update: list[Tensor] = []
        if flat:
            update = torch.ops.flatmtl.combine_pair(list(loss_rows), list(perturbed_rows), count, a, b)
        else:
            update = torch.ops.flatmtl.combine(list(loss_rows), count, a)
        return update

    def _own(self, row: list[Tensor | None]) -> list[int]:
        """Indices of the own parameters that a loss reaches."""
        found: list[int] = []
        for i in self.own:
            if row[i] is not None:
                found.append(i)
        return found

    def _row(self, row: list[Tensor | None], indices: list[int]) -> list[Tensor]:
        """The gradients in the memory order of their parameters, zeros for None."""
        found: list[Tensor] = []
        for i in indices:
            grad = row[i]
            if grad is None:
                found.append(torch.zeros_like(self.params[i]))
            elif grad.stride() == self.params[i].stride():
                found.append(grad)
            else:
                found.append(torch.empty_like(self.params[i]).copy_(grad))
        return found

    def _sq_norm(self, row: list[Tensor | None], indices: list[int], params: list[Tensor], adaptive: bool) -> float:
        weights: list[Tensor] = []
        if adaptive:
            weights = [params[i] for i in indices]
        return float(torch.ops.flatmtl.sq_norms(self._row(row, indices), 1, weights, self.eta).item())

    def _save(self) -> None:
        self.saved = [p.clone() for p in self.params]
        self.saved_buffers = [b.clone() for b in self.buffers_]

    def _put_back(self) -> None:
        for i, saved in enumerate(self.saved):
            self.params[i].copy_(saved)
        for i, saved in enumerate(self.saved_buffers):
            self.buffers_[i].copy_(saved)

    def _check(self, rows: list[list[Tensor | None]], name: str) -> None:
        if len(rows) == 0:
            raise RuntimeError(f"flatmtl.script: {name} is empty; it must have a row for every task")
        for task, row in enumerate(rows):
            if len(row) != len(self.params):
                raise RuntimeError(
                    f"flatmtl.script: {name}[{task}] has {len(row)} entries; there are {len(self.params)} parameters"
                )
            for i, grad in enumerate(row):
                if grad is not None and grad.shape != self.params[i].shape:
                    raise RuntimeError(
                        f"flatmtl.script: {name}[{task}][{i}] has shape {grad.shape}, params[{i}] has "
                        f"{self.params[i].shape}"
                    )

    def _check_norm(self, square: float, task: int, point: str) -> None:
        if not math.isfinite(square):
            self.restore()
            raise RuntimeError(
                f"flatmtl.script: task {task}: the gradient is not finite ({square}) in the {point} pass; nothing was "
                "changed"
            )


def _reaches(row: list[Tensor | None]) -> bool:
    for grad in row:  # noqa: SIM110 (TorchScript has no generators)
        if grad is not None:
            return True
    return False


def _check_params(params: list[Tensor]) -> None:
    if not params:
        raise ValueError("flatmtl.script: params is empty")
    for i, p in enumerate(params):
        if p.device.type != "cpu" or p.dtype != params[0].dtype or not p.is_floating_point():
            raise ValueError(
                f"flatmtl.script: params[{i}] is {p.dtype} on {p.device}; all must be on the CPU and of one float dtype "
                f"(params[0] is {params[0].dtype})"
            )
        if p.stride() != torch.empty_like(p).stride():
            raise ValueError(
                f"flatmtl.script: params[{i}] has shape {tuple(p.shape)} and strides {p.stride()}: it does not fill one "
                "block of memory"
            )


def _radii(rho: float | tuple[float, float]) -> tuple[float, float]:
    pair = rho if isinstance(rho, (tuple, list)) else (rho, rho)
    if len(pair) != 2 or not all(isinstance(r, (int, float)) and 0.0 <= r < math.inf for r in pair):
        raise ValueError(f"Invalid rho: {rho} (expected a finite number >= 0, or a pair (shared, task) of them)")
    return float(pair[0]), float(pair[1])


def _choice(name: str, value: str | None, choices: Mapping[Any, int]) -> int:
    if value not in choices:
        raise ValueError(f"Invalid {name}: {value!r} (expected one of {', '.join(repr(c) for c in choices)})")
    return choices[value]
