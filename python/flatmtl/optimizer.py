"""FlatMTL: F-MTL as a torch optimizer that wraps the one the user has."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import _checkpoint, _groups, _record, _settings, _sharded, _validation, _weighting
from ._checkpoint import FlatMTLState
from ._losses import Task
from ._protect import Buffers, HeldInterrupt, noted
from ._reserve import Reserve
from ._roles import Roles
from ._step import Step
from ._sync import Alone, connect
from ._task import NonFiniteError
from .aggregators import Aggregator
from .flatness import Flatness
from .weightings import Weighting

_HOOKS = (
    "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks",
)  # fmt: skip


class FlatMTL(Optimizer):
    r"""F-MTL (arXiv 2211.13723, Algorithm 1): multi-task training towards flat minima, around any optimizer.

    For every task i with loss :math:`l_i` of shared parameters :math:`\theta` and own parameters :math:`\psi_i`

    .. math::
        (g_i, h_i) &= \nabla l_i(\theta, \psi_i) \\
        (s_i, t_i) &= \nabla l_i(\theta + \rho_s g_i / \|g_i\|,\ \psi_i + \rho_t h_i / \|h_i\|), \quad f_i = s_i - g_i

    and the wrapped optimizer gets the gradient :math:`A(g_1 .. g_K) + A(f_1 .. f_K)` for :math:`\theta` and
    :math:`t_i` for :math:`\psi_i`, where A is the aggregator. A step of K tasks costs K + 1 forwards and 2K backwards
    (K forwards more if every task has its own closure), and 1 forward and K backwards if ``rho`` is 0.

    Shared and own parameters are found from the graphs of the losses: a parameter that two or more losses reach is
    shared, one that a single loss reaches is that task's own, and one that none reaches is left alone. Once shared, a
    parameter stays shared. With a single task every parameter is its own, and the step is SAM.

    While a step runs, BatchNorm's running statistics and other module buffers change in the unperturbed pass only, and
    torch's random generators replay it in the perturbed passes; after the step they stand where the unperturbed pass
    left them. If the step fails before the wrapped optimizer's own update begins (the closure raises, Ctrl-C, a
    non-finite gradient), parameters, ``.grad``, optimizer state, buffers and generators are as they were.

    Args:
        optimizer: the optimizer to wrap. Its ``param_groups``, ``defaults`` and ``state`` are also this one's. It may have
            been wrapped before, but is not a FlatMTL itself.
        aggregator: a name (``"cagrad"``) or an object (``flatmtl.CAGrad(c=0.4)``).
        weighting: a loss weighting in front of the aggregator, a name (``"uw"``) or an object of
            :mod:`flatmtl.weightings`: the step is that of the losses :math:`c_i l_i` with :math:`c` held constant, for
            shared and own parameters and both families. Alone with ``aggregator="sum"``.
        flat: where the perturbed gradients are taken: a name (``"fmtl"``, ``"sam"`` ...) or an object of
            :mod:`flatmtl.flatness`.
        every: makes the perturbed passes every so many steps and reuses flat gradients in between; the option of that
            name of the modes ``"fmtl"`` and ``"looksam"``.
        rho: radius of the perturbation, >= 0, or a pair (shared, task). Also a key of the param groups, where it wins; the
            rho that an earlier FlatMTL around the same optimizer gave to its groups is replaced. 0 is plain gradient
            aggregation, without perturbed passes.
        adaptive: ASAM (2102.11600): :math:`\epsilon = \rho\, T^2 g / \|T g\|` with :math:`T = |\theta| + \eta`, for
            every parameter, as the F-MTL authors' code does. Wants a larger rho (they use 2).
        eta: the :math:`\eta` of ASAM, >= 0. None is 0, and 0.01 for ``flat="asam"``.
        norm: ``"separate"`` (the paper): shared and own parameters move rho each; ``"joint"`` (the authors'
            Multi-MNIST code): one norm a task over both.
        combine: ``"decomposed"`` (the paper) A(g) + A(f); ``"direct"`` A(s); ``"second"`` A(A(g), A(f)); ``"each"``
            A(r_1 .. r_K) with r_i = A(g_i, f_i). Paper, section 4.3. None is the flatness mode's own: ``"direct"`` for
            SAMO and SGSU, ``"decomposed"`` for the others.
        family_scale: ``"rms"`` divides a family of gradients by its root mean square norm before A and multiplies
            afterwards, so that every method is homogeneous of degree 1 and the much smaller flat family is treated
            like the loss family; ``None`` is the raw method.
        max_norm: clips the combined gradient of the shared parameters to this norm, each family's with
            ``combine="decomposed"``, else the whole: what the Nash-MTL and FairGrad papers do, with 1.
        shared: parameters or modules that are shared, instead of finding them. Every other parameter is own and gets
            the sum of the t_i of the losses that reach it. What a loaded state says of them does not count.
        modules: modules whose buffers are to be protected, instead of all that the closure calls.
        features: the modules whose outputs the heads read. The K backwards of the losses stop there, the aggregator
            sees the gradients of the features, and one backward with their weighted sum gives the trunk's gradient
            (MGDA-UB, 1810.04650): K times cheaper in the trunk. Norms and cosines of the record are then those of the
            features' gradients. Works with ``rho=0``, and with ``flat="sam"``, ``"asam"`` or ``"fsam"`` and
            ``combine="direct"``; ``flat="mtcool"`` perturbs the features themselves.
        batched: ``True`` makes the backwards of one forward as a single batched one
            (``torch.autograd.grad(is_grads_batched=True)``); ``"passes"`` also makes the perturbed passes of all tasks
            as one, under ``torch.vmap`` over K copies of the parameters, of ``flat="fmtl"`` and ``"sgsu"``. Saves
            calls, not arithmetic: for small models with many tasks, and meant for GPUs; measure. Needs a vmap rule for
            every operation and no ``.item()`` in the closure, and rounds differently in the last bits.
        m_sharpness: with ``batches``, perturb along the gradient of each micro-batch instead of their mean.
        replay_rng: draw the same random numbers (dropout) in every pass of a step.
        nonfinite: ``"raise"`` :class:`NonFiniteError`, or ``"skip"`` the step: everything is put back, ``.grad`` is
            None for every parameter, and ``last["skipped"]`` is True.
        seed: seed of the methods that draw (PCGrad's order); with the number of the step it fixes the draws.
        accumulate: how the Gramians are summed, as for :func:`flatmtl.gramian`: ``"auto"`` or ``"f64"``.
        rows_dtype: ``torch.bfloat16`` keeps the gradients of float32 parameters in bfloat16 within a step, half of the
            memory. Each is rounded once, after means over micro-batches and ranks, and all that follows, norms too, is
            computed from the rounded one. A gradient is then off by about 2^-9 of its norm ||g||, and a flat gradient
            s - g by as much of ||g||, however small it is itself. Parameters of other dtypes keep their rows, and
            ``.grad`` has the parameter's dtype. Not with ``features=`` (but with ``flat="mtcool"``). None: every row
            in the dtype of its parameter.
        sync: how the ranks of a data-parallel training work together (docs/distributed.md). ``"exact"``: every rank
            perturbs with the mean gradient of all, as one process with the whole batch would; ``"local"``: each along
            its own gradient, and both families are averaged (m-sharpness). ``"auto"`` is "exact" where the model is
            wrapped in DistributedDataParallel or the parameters are DTensors (FSDP2), and no communication elsewhere;
            None is none.
        process_group: the group of the ranks; by default that of DDP or of the DTensors, or torch's default group.

    Example:
        >>> optimizer = flatmtl.FlatMTL(torch.optim.Adam(model.parameters(), lr=1e-3), aggregator="cagrad", rho=0.05)
        >>> losses = optimizer.step(lambda: [loss(out, y) for out, y in zip(model(x), targets)])
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        aggregator: str | Aggregator = "cagrad",
        weighting: str | Weighting | None = None,
        flat: str | Flatness = "fmtl",
        every: int | None = None,
        rho: float | tuple[float, float] = 0.05,
        adaptive: bool = False,
        eta: float | None = None,
        norm: str = "separate",
        combine: str | None = None,
        family_scale: str | None = "rms",
        max_norm: float | None = None,
        shared: Iterable[Tensor | nn.Module] | None = None,
        modules: Iterable[nn.Module] | None = None,
        features: nn.Module | Iterable[nn.Module] | None = None,
        batched: bool | str = False,
        m_sharpness: bool = False,
        replay_rng: bool = True,
        nonfinite: str = "raise",
        seed: int = 0,
        accumulate: str = "auto",
        rows_dtype: torch.dtype | None = None,
        sync: str | None = "auto",
        process_group: Any = None,
    ) -> None:
        # Not super().__init__: param_groups, defaults and state are the wrapped optimizer's.
        _groups.check_wrapped(optimizer, FlatMTL)
        _groups.check_duplicates(optimizer.param_groups)
        _groups.check_rho(rho, "rho")
        groups = _groups.without_rho(optimizer)
        self.settings = _settings.read(
            aggregator=aggregator, weighting=weighting, flat=flat, every=every, rho=rho, adaptive=adaptive, eta=eta,
            norm=norm, combine=combine, family_scale=family_scale, max_norm=max_norm, features=features, batched=batched,
            m_sharpness=m_sharpness, replay_rng=replay_rng, nonfinite=nonfinite, seed=seed, accumulate=accumulate,
            rows_dtype=rows_dtype, sync=sync,
        )  # fmt: skip
        self.nonfinite = nonfinite
        self.sync, self.process_group = sync, process_group
        self._ranks: Alone | None = None
        self._loaded: dict[str, Any] | None = None  # by `flatmtl_state`, and kept until the next step
        self.modules = None if modules is None else list(modules)
        self.roles = Roles(shared)
        self.tasks: list[Task] | None = None
        self.states: dict[str, Any] = {}
        self.steps = 0
        self.last: dict[str, Any] = {}
        self._after_update: _weighting.Observation | None = None
        self._reserve = Reserve()
        self.optimizer = optimizer
        for group in groups:
            group["rho"] = rho
        optimizer.defaults["rho"] = rho
        for hooks in _HOOKS:
            setattr(self, hooks, OrderedDict())
        self._warned_capturable_if_run_uncaptured = True
        self._patch_step_function()

    # -- the wrapped optimizer's, live in both directions ----------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the wrapped optimizer's; the group may have a `rho`."""
        if isinstance(param_group, dict) and "rho" in param_group:
            _groups.check_rho(param_group["rho"], "rho of the param group")
        if isinstance(param_group, dict) and not isinstance(param_group.get("params", ()), (Tensor, set)):
            param_group["params"] = list(param_group["params"])
            _groups.check_duplicates([param_group], first=len(self.param_groups))
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the wrapped optimizer's. Never needed: a step overwrites `.grad`."""
        self.optimizer.zero_grad(set_to_none)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """False: GradScaler unscales `.grad` and skips the update as it does for any optimizer.

        It asks for this first of all, so that here is where a closure handed to `GradScaler.step` can be refused: by
        the time `step` is called, the scale has been taken out of gradients that the closure has not made yet.
        """
        caller = sys._getframe(1)
        if caller.f_code is torch.amp.GradScaler.step.__code__ and caller.f_locals.get("args"):
            raise RuntimeError(
                "GradScaler.step(optimizer, closure): a closure must be given to FlatMTL, which scales its losses. Call "
                "optimizer.backward(closure, grad_scaler=scaler), then scaler.step(optimizer) and scaler.update()"
            )
        return False

    # -- the step --------------------------------------------------------------------------------------------------

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Any = None, *, batches: Iterable[Any] | None = None, validation: Any = None) -> Any:
        """Makes one F-MTL step, or, without a closure, applies `.grad` by the wrapped optimizer.

        Args:
            closure: evaluates the model and returns the task losses (list, tuple, dict or 1-D tensor of scalars; a 0-d
                tensor is one task; None stands for a task that is absent from this batch), without calling backward.
                It is called K + 1 times. If it has a parameter named `task`, it gets None in the unperturbed pass and
                the index or key of the one task wanted in a perturbed pass, and may return that loss alone. Or a
                sequence or dict of closures, one a task, each returning its own loss.
            batches: micro-batches, for a batch that does not fit at once. The closure is called as `closure(batch)` for
                each, and both families of gradients are means over them, as are the losses: the step of the one large
                batch, where the losses are means over their examples, the micro-batches of one size, and the model has
                no BatchNorm. A task that is absent from some takes the mean over the others.
            validation: for the weightings that need it (:mod:`flatmtl.main_task`), a function of no arguments that
                evaluates the main task on held-out data.

        Returns:
            The losses at the unperturbed point, detached, in the container that came.
        """
        if closure is None:
            if batches is not None:
                raise TypeError("batches are given without a closure that takes them")
            if validation is not None:
                raise TypeError("validation is given without a closure")
            with HeldInterrupt() as interrupt:
                return self._apply(interrupt)
        with HeldInterrupt() as interrupt:
            losses = self._backward(closure, batches, validation, None, interrupt)
            if not self.last["skipped"]:
                self._apply(interrupt)
        return losses

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def backward(
        self, closure: Any, grad_scaler: Any = None, *, batches: Iterable[Any] | None = None, validation: Any = None
    ) -> Any:
        """All of a step but the wrapped optimizer's update: parameters restored, the combined update in `.grad`.

        Clip, unscale or log between this and `step()`. `.grad` is overwritten, not accumulated.

        Args:
            closure, batches, validation: as for `step`.
            grad_scaler: a `torch.amp.GradScaler`. The losses are scaled, the perturbation is that of the unscaled
                gradients, and `.grad` holds the scaled update, or Inf if a pass overflowed (whatever `nonfinite` says;
                nothing else has then changed). Then `scaler.step(optimizer)` and `scaler.update()`, as usual. Raises
                TypeError where plain parameters stand beside DTensors, which torch's scaler cannot unscale.

        Returns:
            The losses, as `step`.
        """
        if isinstance(self.optimizer, FlatMTL):  # self is a wrapper that imitates this class, as Lightning's does
            return self.optimizer.backward(closure, grad_scaler, batches=batches, validation=validation)
        with HeldInterrupt() as interrupt:
            return self._backward(closure, batches, validation, grad_scaler, interrupt)

    def _backward(
        self, closure: Any, batches: Iterable[Any] | None, validation: Any, grad_scaler: Any, interrupt: HeldInterrupt
    ) -> Any:
        ranks = self._connected()
        with ranks.step():
            return self._backward_on(ranks, closure, batches, validation, grad_scaler, interrupt)

    def _connected(self) -> Alone:
        """What `sync` comes to, settled at the first call."""
        if self._ranks is None:
            self._ranks = connect(self.sync, self.process_group, self.settings.m_sharpness, self._all_tensors())
        return self._ranks

    def _backward_on(
        self, ranks: Alone, closure: Any, batches: Iterable[Any] | None, validation: Any, grad_scaler: Any,
        interrupt: HeldInterrupt,
    ) -> Any:  # fmt: skip
        with ranks.guard():
            _validation.check(self.settings.weighting, validation, closure, batches, type(ranks) is Alone)
            params = _groups.parameters(self)
            if batches is not None:
                batches = list(batches)
                if not batches:
                    raise ValueError("batches is empty: expected at least one micro-batch")
            scaled = grad_scaler is not None and grad_scaler.is_enabled()
            if scaled:
                _sharded.check_unscalable([(p.name, p.tensor) for p in params])
            loss_scale = 1.0
            if scaled:  # through scale(), which sets the scaler up at its first call
                loss_scale = float(grad_scaler.scale(torch.ones((), device=params[0].tensor.device)))
            step = Step(
                params, self.settings, self.roles, tasks=self.tasks, states=self.states, draw=self.steps,
                loss_scale=loss_scale, buffers=Buffers(self.modules), interrupt=interrupt, reserve=self._reserve,
                sync=ranks,
            )  # fmt: skip
        try:
            with ranks.guard():
                step.run(closure, batches, validation)
        except NonFiniteError:
            step.rollback()
            if not scaled and self.nonfinite == "raise":
                raise
            self._skip(step, scaled)
            return step.losses
        except BaseException:
            step.rollback()
            raise
        for p, update, old in zip(params, step.update, step.old_grads, strict=True):
            known = p.tensor in step.new_roles
            # a parameter that no loss ever reached is left alone
            p.tensor.grad = _sharded.like(p.tensor, update) if known else old
        self.roles.of = step.new_roles
        self.states = step.new_states
        self._after_update = _weighting.observation(step)
        self.tasks = [state.task for state in step.tasks]
        self.last, self._loaded = step.record, None
        self.steps += 1
        return step.losses

    def _skip(self, step: Step, scaled: bool) -> None:
        self.last = _record.skipped(step)
        self._after_update = None
        if scaled:
            step.overflow()
        else:
            for p in step.params:
                p.tensor.grad = None

    def _apply(self, interrupt: HeldInterrupt) -> Any:
        observe, self._after_update = self._after_update, None
        try:
            result = self.optimizer.step()
        except BaseException as error:
            noted(
                error,
                "flatmtl: raised inside the wrapped optimizer's own update; parameters and its state may be changed "
                "in part",
            )
            raise
        if observe is not None:
            with (self._ranks or Alone()).step():
                self.states = observe(self.states, interrupt)
        return result

    # -- state -----------------------------------------------------------------------------------------------------

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's `state` and `param_groups`, and `flatmtl`: roles, tasks, number of steps, seed.

        Tensors and plain values alone, so that `torch.load(weights_only=True)` takes it.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.optimizer.state_dict()
        state_dict["flatmtl"] = _checkpoint.own_state(self)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            result = post_hook(self, state_dict)
            if result is not None:
                state_dict = result
        return state_dict

    @property
    def flatmtl_state(self) -> FlatMTLState:
        """What torch.distributed.checkpoint leaves out of an optimizer's state, as a Stateful to save beside it."""
        return FlatMTLState(self)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a `state_dict` of this class, or a plain one of the wrapped optimizer (roles are then found anew).

        Roles that contradict `shared=` are not taken: it wins.

        Raises:
            ValueError: the state does not fit, or lacks something; the message names the entry, and nothing is changed.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            if result is not None:
                state_dict = dict(result)
        own = state_dict.pop("flatmtl", self._loaded)
        count = _checkpoint.check_groups(state_dict)
        for g, group in enumerate(state_dict["param_groups"]):
            if "rho" in group:
                _groups.check_rho(group["rho"], f"state_dict['param_groups'][{g}]['rho']")
        if own is not None:
            _checkpoint.check(self, own, count)
        rhos = [group.get("rho", self.defaults["rho"]) for group in self.param_groups]
        self.optimizer.load_state_dict(state_dict)
        for group, rho in zip(self.param_groups, rhos, strict=True):
            group.setdefault("rho", rho)
        _checkpoint.load_own_state(self, own)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _all_tensors(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def __getstate__(self) -> dict[str, Any]:
        left_out = (*_HOOKS, "step", "_after_update")  # schedulers patch step
        state = {k: v for k, v in self.__dict__.items() if k not in left_out}
        return {**state, "_ranks": None, "process_group": None}  # a process group cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._after_update = None
        for hooks in _HOOKS:
            self.__dict__.setdefault(hooks, OrderedDict())
        self._patch_step_function()

    def __repr__(self) -> str:
        s = self.settings
        return (
            f"FlatMTL(aggregator={s.aggregator!r}, weighting={s.weighting!r}, flat={s.flat!r}, adaptive={s.adaptive}, "
            f"eta={s.eta}, norm={s.norm!r}, "
            f"combine={s.combine!r}, family_scale={s.family_scale!r}, seed={s.seed},\n{self.optimizer!r})"
        )
