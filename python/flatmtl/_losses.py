"""What a closure returns: checks, order of the tasks, and the edge of the graph where each loss's gradient starts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

Closure = Callable[..., Any]
Task = Hashable  # an index, or the key of a dict


@dataclass(eq=False)
class Loss:
    """One task's loss: its value, and where in the graph its gradient starts.

    `separable` is False if the loss is an element of a vector that was computed as a whole, so that the graph does not
    tell which parameters this element reaches.
    """

    task: Task
    value: Tensor
    edge: GradientEdge | None  # None for a loss that was asked for without its gradient
    separable: bool = True
    source: Tensor | None = None  # the tensor with this edge, if it is at hand: holds its graph


def is_per_task(closure: Any) -> bool:
    """Whether `closure` is a sequence or dict of closures, one a task."""
    return isinstance(closure, (Sequence, Mapping)) and not callable(closure)


def check_closures(closure: Any) -> None:
    items = closure.items() if isinstance(closure, Mapping) else enumerate(closure)
    count = 0
    for task, item in items:
        count += 1
        if not callable(item):
            raise TypeError(f"closure[{task!r}] must be callable, but is {type(item).__name__}")
    if count == 0:
        raise ValueError("closure is empty: expected one closure a task")


def takes_task(closure: Closure) -> bool:
    """Whether `closure` has a parameter named `task`."""
    function = getattr(closure, "__func__", closure)
    if type(function) is FunctionType and not vars(function):  # nothing wrapped: as below, at a tenth of the cost
        code = function.__code__
        return "task" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    try:
        return "task" in inspect.signature(closure).parameters
    except (TypeError, ValueError):  # builtins and the like have no signature
        return False


def tasks_of(container: Any) -> list[Task]:
    """The tasks' names, in order: keys of a dict, indices of anything else."""
    if isinstance(container, Mapping):
        for key in container:
            if not isinstance(key, (str, int)):
                raise TypeError(f"keys of the losses must be str or int, but {key!r} is {type(key).__name__}")
        return list(container)
    if isinstance(container, Tensor):
        return [0] if container.dim() == 0 else list(range(container.shape[0]))
    return list(range(len(container)))


def read_losses(container: Any, grad: bool = True, wanted: Collection[int] | None = None) -> list[Loss | None]:
    """Checks what a closure returned and gives one `Loss` a task, None for an absent one.

    Accepts a list, tuple, dict or 1-D tensor of losses, and a 0-d tensor as a single task. `grad` is False for losses
    computed without graphs. With `wanted` the others of these indices are not looked at, and None.
    """
    if isinstance(container, Tensor):
        return _read_tensor(container, grad, wanted)
    if isinstance(container, Mapping):
        values = list(container.values())
    elif isinstance(container, Sequence) and not isinstance(container, (str, bytes)):
        values = list(container)
    else:
        raise TypeError(
            "closure must return the task losses as a list, tuple, dict or 1-D tensor (or a 0-d tensor, one task), "
            f"but returned {type(container).__name__}"
        )
    tasks = tasks_of(container)
    if not values:
        raise ValueError("closure returned no losses")
    return [
        None if value is None or (wanted is not None and i not in wanted) else read_loss(task, value, grad)
        for i, (task, value) in enumerate(zip(tasks, values, strict=True))
    ]


def read_loss(task: Task, value: Any, grad: bool = True) -> Loss:
    """Checks the loss of one task."""
    check_scalar(task, value)
    if not grad:
        return Loss(task, value.detach(), None)
    _check_differentiable(f"loss of task {task!r}", value)
    edge = GradientEdge(value.grad_fn, value.output_nr)
    scalar = _follow_element(edge)
    start = scalar or edge
    return Loss(task, value.detach(), start, scalar is not None, value if start is edge else None)


def check_scalar(task: Task, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"loss of task {task!r} must be a tensor, but is {type(value).__name__}")
    if value.dim() != 0:
        raise ValueError(f"loss of task {task!r} must be a scalar, but has shape {tuple(value.shape)}")


def _read_tensor(vector: Tensor, grad: bool, wanted: Collection[int] | None) -> list[Loss | None]:
    if vector.dim() == 0:
        return [read_loss(0, vector, grad)]
    if vector.dim() != 1:
        raise ValueError(f"a tensor of losses must have 0 or 1 dimensions, but has shape {tuple(vector.shape)}")
    if vector.shape[0] == 0:
        raise ValueError("closure returned no losses")
    if not grad:
        return [Loss(i, value, None) for i, value in enumerate(vector.detach().unbind())]
    _check_differentiable("the tensor of losses", vector)
    scalars = _scalars_of(get_gradient_edge(vector), vector.shape[0])
    losses: list[Loss | None] = []
    for i in range(vector.shape[0]):
        if wanted is not None and i not in wanted:
            losses.append(None)
        elif scalars is not None:
            losses.append(Loss(i, vector.detach()[i], scalars[i]))
        else:
            separable = vector.shape[0] == 1
            with torch.enable_grad():
                losses.append(Loss(i, vector.detach()[i], get_gradient_edge(vector[i]), separable))
    return losses


def _check_differentiable(what: str, value: Tensor) -> None:
    if value.is_complex():
        raise TypeError(f"{what} is complex ({value.dtype}); losses must be real")
    if not value.requires_grad:
        raise RuntimeError(
            f"{what} has no graph (requires_grad is False): it does not depend on any parameter that requires grad, "
            "or the closure ran it under no_grad, detached it or called .item()"
        )
    if value.grad_fn is None:
        raise RuntimeError(f"{what} is a leaf tensor, not computed from the model")


def _node_name(node: Any) -> str:
    return str(node.name()).rsplit("::", 1)[-1]


def _numel(edge: GradientEdge) -> int | None:
    """Elements of the tensor at an edge, where autograd says."""
    try:
        shape = edge.node._input_metadata[edge.output_nr].shape
    except (AttributeError, IndexError):
        return None
    return int(torch.Size(shape).numel())


def _inputs(node: Any) -> list[GradientEdge] | None:
    """Edges to the inputs of a node; None if one of them needs no gradient."""
    edges = [GradientEdge(n, nr) for n, nr in node.next_functions if n is not None]
    return edges if len(edges) == len(node.next_functions) else None


_RESHAPES = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0", "SqueezeBackward0",
             "SqueezeBackward1", "SqueezeBackward2", "CloneBackward0", "AliasBackward0", "ExpandBackward0"}  # fmt: skip


def _scalars_of(edge: GradientEdge, length: int) -> list[GradientEdge] | None:
    """The scalars that a 1-D tensor of `length` losses was stacked or concatenated from; None if it was not."""
    node = edge.node
    name = _node_name(node)
    if name in ("StackBackward0", "CatBackward0"):
        edges = _inputs(node)
        if edges is None or len(edges) != length or any(_numel(e) != 1 for e in edges):
            return None
        return [_through_reshapes(e) for e in edges]
    if name in ("AliasBackward0", "CloneBackward0", "ViewBackward0"):
        edges = _inputs(node)
        return _scalars_of(edges[0], length) if edges and _numel(edges[0]) == length else None
    return None


def _through_reshapes(edge: GradientEdge) -> GradientEdge:
    """Back over reshapes of one element. They do not change which parameters are reached."""
    while _node_name(edge.node) in _RESHAPES:
        edges = _inputs(edge.node)
        if not edges or _numel(edges[0]) != 1:
            break
        edge = edges[0]
    return edge


def _follow_element(edge: GradientEdge) -> GradientEdge | None:
    """Where a 0-d loss starts: itself, or the scalar it was, if it is an element of a stack. None if it is an element
    of a vector that was computed as a whole."""
    start = _through_reshapes(edge)
    node: Any = start.node
    name = _node_name(node)
    if name == "SelectBackward0":
        index, parents = node._saved_index, _inputs(node)
    elif name == "UnbindBackward0":
        index, parents = start.output_nr, _inputs(node)
    else:
        return edge
    if not parents:
        return None
    length = _numel(parents[0])
    if length is None:
        return None
    if length == 1:
        return edge
    if index >= length:  # a negative index is saved as a huge unsigned number
        index -= 2**64 - length if index >= 2**63 else 0
    scalars = _scalars_of(parents[0], length)
    return scalars[index] if scalars is not None and 0 <= index < length else None


def gradients(
    losses: Sequence[Loss], inputs: Sequence[Tensor], scale: float, retain_graph: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of the sum of the losses times `scale`, None for inputs that they do not reach."""
    edges = [loss.edge for loss in losses if loss.edge is not None]
    seeds = None if scale == 1.0 else [seed_of(edge, scale) for edge in edges]  # None: ones
    starts: Any = edges
    if all(type(loss.source) is Tensor for loss in losses):  # with tensors torch has less to do
        starts = [loss.source for loss in losses]
    return torch.autograd.grad(starts, inputs, grad_outputs=seeds, retain_graph=retain_graph, allow_unused=True)


def gradients_of_each(losses: Sequence[Loss], inputs: Sequence[Tensor], scale: float) -> list[list[Tensor | None]]:
    """The gradients of every loss by one batched backward (vmap over the vector-Jacobian products). Frees the graph."""
    edges = [loss.edge for loss in losses if loss.edge is not None]
    reached = [leaves(edge) for edge in edges]
    seeds = []
    for k, edge in enumerate(edges):
        meta = edge.node._input_metadata[edge.output_nr]
        seed = torch.zeros((len(edges), *meta.shape), dtype=meta.dtype, device=meta.device)
        seed[k] = scale
        seeds.append(seed)
    grads = torch.autograd.grad(edges, inputs, grad_outputs=seeds, is_grads_batched=True, allow_unused=True)
    return [
        [None if g is None or x not in found else g[k] for g, x in zip(grads, inputs, strict=True)]
        for k, found in enumerate(reached)
    ]


def seed_of(edge: GradientEdge, scale: float) -> Tensor:
    """The gradient to start with at `edge`."""
    meta = edge.node._input_metadata[edge.output_nr]
    return torch.full(tuple(meta.shape), scale, dtype=meta.dtype, device=meta.device)


def nodes(edges: Iterable[GradientEdge], stop: Iterable[Any] = ()) -> Iterator[Any]:
    """The nodes of the graph behind the edges, each once, without looking behind those in `stop`."""
    seen, todo = {*stop}, [edge.node for edge in edges]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        todo.extend(n for n, _ in node.next_functions if n is not None)


def leaves(edge: GradientEdge, stop: Iterable[Any] = ()) -> set[Tensor]:
    """The leaf tensors that the graph behind `edge` reaches, without looking behind the nodes in `stop`."""
    return {node.variable for node in nodes([edge], stop) if hasattr(node, "variable")}


def check_graph(losses: Iterable[Loss | None]) -> None:
    """Refuses graphs in which `torch.autograd.grad` would leave out parameters without a word."""
    for node in nodes(loss.edge for loss in losses if loss is not None and loss.edge is not None):
        if _node_name(node) == "CheckpointFunctionBackward":
            raise RuntimeError(
                "the closure uses torch.utils.checkpoint with use_reentrant=True, whose parameters get no gradient of "
                "a single task; use use_reentrant=False"
            )


def like_container(container: Any, values: list[Tensor | None]) -> Any:
    """`values`, one a task, in a container of the kind that the closure returned."""
    if isinstance(container, Tensor):
        return values[0] if container.dim() == 0 else container.detach().clone()
    if isinstance(container, Mapping):
        return dict(zip(container, values, strict=True))
    if isinstance(container, tuple):
        make: Any = type(container)
        return make(*values) if hasattr(container, "_fields") else tuple(values)
    return list(values)


def mean_container(first: Any, rest: Sequence[Any]) -> Any:
    """The mean, task by task, of containers that `like_container` made; a task's None are left out."""
    columns = zip(*(values(container) for container in (first, *rest)), strict=True)
    found = [[value for value in column if value is not None] for column in columns]
    means = [torch.stack(column).mean() if column else None for column in found]
    if isinstance(first, Tensor) and first.dim() == 1:
        return torch.stack([mean for mean in means if mean is not None])
    return like_container(first, means)


def values(container: Any) -> list[Tensor | None]:
    """The losses in a container, one a task."""
    if isinstance(container, Tensor):
        return [container] if container.dim() == 0 else list(container.unbind())
    return list(container.values()) if isinstance(container, Mapping) else list(container)


def describe(container: Any) -> str:
    """The shape of a container of losses, for the message when it changes between passes."""
    if isinstance(container, Tensor):
        return f"a tensor of shape {tuple(container.shape)}"
    if isinstance(container, Mapping):
        return f"a dict with keys {list(container)!r}"
    if isinstance(container, Sequence):
        return f"a {type(container).__name__} of {len(container)}"
    return f"a {type(container).__name__}"
