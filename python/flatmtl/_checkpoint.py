"""What is FlatMTL's own in a checkpoint: its part of a state_dict, checked, and that of a distributed checkpoint, beside
what torch.distributed.checkpoint saves of an optimizer."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _sharded, _state
from ._roles import SHARED

if TYPE_CHECKING:
    from .optimizer import FlatMTL

VERSION = 1
_KINDS = ("aggregator", "weighting", "flat")


class FlatMTLState:
    """`optimizer.flatmtl_state`: a torch.distributed.checkpoint Stateful, to be saved beside the optimizer's state.

    torch's `get_optimizer_state_dict` keeps `state` and `param_groups` and drops the rest: the roles of the parameters,
    the tasks, the number of steps, the seed, and the states of methods. They are one object of bytes here, so that they
    load on any number of ranks; gradients that a method keeps between steps (LookSAM) are whole in it, on every rank.
    The optimizer that loads it has the same parameters in the same order.
    """

    def __init__(self, optimizer: FlatMTL) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """With sharded parameters all ranks call it together."""
        own = own_state(self._optimizer)
        own["states"] = _rows(own["states"], self._optimizer._all_tensors(), _whole)
        buffer = io.BytesIO()
        torch.save(own, buffer)
        return {"flatmtl": buffer.getvalue()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = _state.entry(state_dict, "flatmtl", "state of flatmtl_state")
        if not isinstance(saved, bytes):
            raise ValueError(f"state of flatmtl_state: 'flatmtl' is {_state.shown(saved)}; it must be bytes")
        own = torch.load(io.BytesIO(saved), weights_only=True)
        if isinstance(own, dict) and "states" in own:
            own["states"] = _rows(own["states"], self._optimizer._all_tensors(), _part)
        load_own_state(self._optimizer, own)
        self._optimizer._loaded = own  # torch's helper loads the wrapped optimizer's state afterwards


def own_state(optimizer: FlatMTL) -> dict[str, Any]:
    """What FlatMTL adds to the wrapped optimizer's state_dict."""
    return {
        "version": VERSION,
        "steps": optimizer.steps,
        "seed": optimizer.settings.seed,
        "tasks": None if optimizer.tasks is None else list(optimizer.tasks),
        "roles": optimizer.roles.state(optimizer._all_tensors()),
        "states": copy.deepcopy(optimizer.states),
    }


def load_own_state(optimizer: FlatMTL, own: dict[str, Any] | None) -> None:
    """Everything found anew, or what `own_state` gave."""
    if own is not None:
        check(optimizer, own)
    optimizer.steps, optimizer.tasks, optimizer.last, optimizer._ranks = 0, None, {}, None
    optimizer._after_update = optimizer._loaded = None
    optimizer.roles.of, optimizer.states = {}, {}
    if own is not None:
        optimizer.steps, optimizer.settings.seed = own["steps"], own["seed"]
        optimizer.tasks = None if own["tasks"] is None else list(own["tasks"])
        optimizer.roles.load(own["roles"], optimizer._all_tensors())
        optimizer.states = copy.deepcopy(own["states"])


def _rows(value: Any, params: Sequence[Tensor], change: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """A copy of the states of methods, with `change` made to every row of one tensor a parameter."""
    if isinstance(value, dict):
        return {key: _rows(item, params, change) for key, item in value.items()}
    if isinstance(value, list):
        if len(value) == len(params) and all(item is None or isinstance(item, Tensor) for item in value):
            return [None if item is None else change(param, item) for param, item in zip(params, value, strict=True)]
        return [_rows(item, params, change) for item in value]
    return value


def _whole(param: Tensor, shard: Tensor) -> Tensor:
    made: Any = _sharded.like(param, shard)
    return made.full_tensor().cpu() if _sharded.is_sharded(param) else made


def _part(param: Tensor, whole: Tensor) -> Tensor:
    if whole.shape != param.shape:  # refused by who checks the state
        return whole
    local = _sharded.local(param)
    return torch.empty_like(local, dtype=whole.dtype).copy_(_sharded.cut(param, whole))


def check(optimizer: FlatMTL, own: Any, count: int | None = None) -> None:
    """Raises ValueError, which names the entry, unless the optimizer can load `own`, the "flatmtl" of a state_dict.

    Args:
        count: the number of parameters in the rest of the state_dict, if it is there.
    """
    what = "state_dict['flatmtl']"
    version = own.get("version") if isinstance(own, dict) else None
    if version != VERSION:
        raise ValueError(f"{what} has version {_state.shown(version)}, but this flatmtl reads {VERSION}")
    _state.integer(own, "steps", what)
    _state.integer(own, "seed", what, 2**53)
    tasks = _state.entry(own, "tasks", what)
    if not (tasks is None or isinstance(tasks, (list, tuple))):
        raise ValueError(f"{what}: 'tasks' is {_state.shown(tasks)}; it must be None or a list")
    if tasks is not None and optimizer.tasks is not None and len(tasks) != len(optimizer.tasks):
        raise ValueError(f"{what} has {len(tasks)} tasks, but the optimizer has {len(optimizer.tasks)}")
    params = optimizer._all_tensors()
    num_tasks = 0 if tasks is None else len(tasks)
    _check_roles(_state.entry(own, "roles", what), f"{what}: 'roles'", num_tasks, len(params), count)
    states = _state.entry(own, "states", what)
    if not isinstance(states, dict):
        raise ValueError(f"{what}: 'states' is {_state.shown(states)}; it must be a dict")
    for kind, state in states.items():
        name = _state.entry(state, "name", f"{what}: 'states'[{kind!r}]")
        method = getattr(optimizer.settings, kind) if kind in _KINDS else None
        if method is None or method.name != name:
            raise ValueError(
                f"{what} holds the state of {kind} {_state.shown(name)}, but the optimizer has "
                f"{None if method is None else method.name!r}"
            )
        method.check_state(state, num_tasks, [_sharded.local(p) for p in params])


def check_groups(state_dict: dict[str, Any]) -> int:
    """The number of parameters in a state_dict of an optimizer; raises ValueError where its param_groups have no such
    form. Whether they fit is torch's to check."""
    groups = _state.entry(state_dict, "param_groups", "state_dict")
    if not isinstance(groups, (list, tuple)):
        raise ValueError(f"state_dict: 'param_groups' is {_state.shown(groups)}; it must be a list")
    _state.entry(state_dict, "state", "state_dict")
    return sum(len(_state.entry(group, "params", f"state_dict['param_groups'][{g}]")) for g, group in enumerate(groups))


def _check_roles(roles: Any, what: str, num_tasks: int, num_params: int, count: int | None) -> None:
    if not isinstance(roles, (list, tuple)):
        raise ValueError(f"{what} is {_state.shown(roles)}; it must be a list, with one entry a parameter")
    if len(roles) != num_params or count not in (None, len(roles)):
        raise ValueError(f"{what} is for {len(roles)} parameters, but the optimizer has {num_params}")
    for i, role in enumerate(roles):
        known = isinstance(role, int) and not isinstance(role, bool) and SHARED <= role < num_tasks
        if not (role is None or known):
            raise ValueError(
                f"{what}[{i}] is {_state.shown(role)}; it must be None, {SHARED} (shared) or the number of one of the "
                f"{num_tasks} tasks"
            )
