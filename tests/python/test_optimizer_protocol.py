"""FlatMTL as a torch.optim.Optimizer: groups, schedulers, hooks, state, torch's own optimizer inputs."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
from typing import Any

import flatmtl
import pytest
import torch
from flatmtl import _losses
from models import batch, closure_of, equal, two_heads, values
from torch import nn
from torch.optim import SGD, Adam


def make(model: nn.Module, **options: object) -> flatmtl.FlatMTL:
    return flatmtl.FlatMTL(Adam(model.parameters(), lr=0.05), **options)  # type: ignore[arg-type]


def test_groups_defaults_and_state_are_the_wrapped_optimizers() -> None:
    model = two_heads()
    inner = Adam(model.parameters(), lr=0.05)
    optimizer = flatmtl.FlatMTL(inner, rho=0.1)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.defaults is inner.defaults
    optimizer.param_groups[0]["lr"] = 0.5
    assert inner.param_groups[0]["lr"] == 0.5
    optimizer.step(closure_of(model, *batch()))
    assert optimizer.state is inner.state
    assert len(optimizer.state) == 6
    extra = nn.Parameter(torch.zeros(1))
    inner.add_param_group({"params": [extra]})
    assert optimizer.param_groups[1]["rho"] == 0.1  # a group added behind our back has a rho too
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "rho": 0.7})
    assert inner.param_groups[2]["rho"] == 0.7
    with pytest.raises(ValueError, match="Invalid rho of the param group: -1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "rho": -1})


def test_zero_grad_and_step_without_closure_apply_grad() -> None:
    model, plain = two_heads(), two_heads()
    x, y = batch()
    whole, halves = make(model), make(plain)
    for _ in range(2):
        a = whole.step(closure_of(model, x, y))
        b = halves.backward(closure_of(plain, x, y))
        assert [float(v) for v in a] == [float(v) for v in b]
        halves.step()
    assert equal(values(model), values(plain))
    halves.zero_grad()
    assert all(p.grad is None for p in plain.parameters())
    before = values(plain)
    halves.step()
    assert equal(before, values(plain))


@pytest.mark.parametrize("make_scheduler", [
    lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)),
], ids=["step", "onecycle", "cosine", "lambda"])  # fmt: skip
def test_schedulers(make_scheduler: object, recwarn: pytest.WarningsRecorder) -> None:
    lrs = []
    for wrap in (True, False):
        model = two_heads()
        inner = Adam(model.parameters(), lr=0.05)
        optimizer = flatmtl.FlatMTL(inner)
        scheduler = make_scheduler(optimizer if wrap else inner)  # type: ignore[operator]
        seen = []
        for _ in range(3):
            optimizer.step(closure_of(model, *batch()))
            scheduler.step()
            seen.append((inner.param_groups[0]["lr"], inner.param_groups[0]["betas"]))
        lrs.append(seen)
        copy.deepcopy(optimizer)  # schedulers patch step on the instance
    assert lrs[0] == lrs[1]
    assert len(set(lrs[0])) == 3
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_plateau_scheduler_takes_it() -> None:
    model = two_heads()
    optimizer = make(model)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] < 0.05


def test_hooks() -> None:
    model, (x, y), calls = two_heads(), batch(), []
    optimizer = make(model)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append("pre"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("post"))
    optimizer.optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append("inner"))
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("state pre"))
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "mark": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, s: calls.append(f"load pre {s.get('mark')}"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("load post"))
    optimizer.step(closure_of(model, x, y))
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert calls == ["pre", "inner", "post", "state pre", "load pre 1", "load post"]


@pytest.mark.parametrize("aggregator", ["cagrad", "pcgrad", "nash_mtl"])
def test_checkpoint_resumes_bit_equal(aggregator: str) -> None:
    def train(model: nn.Module, optimizer: flatmtl.FlatMTL, steps: range) -> None:
        for k in steps:
            optimizer.step(closure_of(model, *batch(k, tasks=4)))

    whole = two_heads(tasks=4)
    optimizer = make(whole, aggregator=aggregator, seed=5)
    train(whole, optimizer, range(4))

    model = two_heads(tasks=4)
    optimizer = make(model, aggregator=aggregator, seed=5)
    train(model, optimizer, range(2))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert set(saved["optimizer"]) == {"state", "param_groups", "flatmtl"}
    model = two_heads(seed=9, tasks=4)
    optimizer = make(model, aggregator=aggregator, rho=0.3)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.param_groups[0]["rho"] == 0.05
    train(model, optimizer, range(2, 4))
    assert equal(values(whole), values(model))


def test_plain_checkpoint_of_the_wrapped_optimizer_loads() -> None:
    model = two_heads()
    inner = Adam(model.parameters(), lr=0.01)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    inner.step()
    optimizer = make(two_heads(), rho=0.4)
    optimizer.load_state_dict(inner.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert optimizer.param_groups[0]["rho"] == 0.4
    assert len(optimizer.state) == 6
    back = Adam(two_heads().parameters())
    back.load_state_dict({k: v for k, v in optimizer.state_dict().items() if k != "flatmtl"})


@pytest.mark.parametrize("spoil", [
    lambda s: s["flatmtl"].update(version=99),
    lambda s: s["flatmtl"]["roles"].append(None),
    lambda s: s["flatmtl"].update(tasks=[0, 1, 2]),
    lambda s: s["param_groups"][0]["params"].append(77),
], ids=["version", "roles", "tasks", "shape"])  # fmt: skip
def test_bad_state_is_refused_and_changes_nothing(spoil: object) -> None:
    model = two_heads()
    optimizer = make(model)
    optimizer.step(closure_of(model, *batch()))
    state = copy.deepcopy(optimizer.state_dict())
    spoil(state)  # type: ignore[operator]
    state["param_groups"][0]["lr"] = 123.0
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="state"):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert str(before) == str(after)


def test_deepcopy_and_pickle_train_on_alike() -> None:
    model = two_heads()
    optimizer = make(model)
    optimizer.step(closure_of(model, *batch()))
    for clone in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        model2, optimizer2 = clone((model, optimizer))
        optimizer2.step(closure_of(model2, *batch(1)))
        model3, optimizer3 = clone((model, optimizer))
        optimizer3.step(closure_of(model3, *batch(1)))
        assert equal(values(model2), values(model3))
        assert not equal(values(model2), values(model))


def test_repr_names_the_options() -> None:
    text = repr(make(two_heads(), aggregator=flatmtl.CAGrad(c=0.2)))
    assert "CAGrad(c=0.2)" in text
    assert "lr: 0.05" in text


@pytest.mark.parametrize(("options", "error", "match"), [
    ({"rho": -0.1}, ValueError, "Invalid rho: -0.1"),
    ({"rho": float("nan")}, ValueError, "Invalid rho: nan"),
    ({"rho": (0.1, 0.2, 0.3)}, ValueError, "Invalid rho"),
    ({"eta": -1}, ValueError, "Invalid eta: -1"),
    ({"norm": "both"}, ValueError, "Invalid norm: 'both' .*'separate', 'joint'"),
    ({"combine": "sum"}, ValueError, "Invalid combine: 'sum'"),
    ({"family_scale": "max"}, ValueError, "Invalid family_scale: 'max'"),
    ({"nonfinite": "ignore"}, ValueError, "Invalid nonfinite: 'ignore'"),
    ({"seed": -1}, ValueError, "Invalid seed: -1"),
    ({"aggregator": "cagard"}, ValueError, "cagrad"),
    ({"aggregator": 3}, TypeError, "aggregator"),
    ({"shared": [3]}, TypeError, r"shared\[0\]"),
])  # fmt: skip
def test_bad_options(options: dict[str, object], error: type[Exception], match: str) -> None:
    inner = SGD(two_heads().parameters(), lr=0.1)
    with pytest.raises(error, match=match):
        flatmtl.FlatMTL(inner, **options)  # type: ignore[arg-type]
    assert "rho" not in inner.param_groups[0]
    assert "rho" not in inner.defaults


def test_shared_takes_a_single_parameter() -> None:
    model = two_heads()
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), shared=model.trunk[0].weight)  # type: ignore[arg-type]
    optimizer.step(closure_of(model, *batch()))
    assert optimizer.roles.state(list(model.parameters())) == [-1, 0, 0, 0, 1, 1]


def test_bad_optimizers() -> None:
    model = two_heads()
    with pytest.raises(TypeError, match="LBFGS"):
        flatmtl.FlatMTL(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer"):
        flatmtl.FlatMTL(model.parameters())  # type: ignore[arg-type]


def test_wrapping_again_takes_the_new_rho_where_the_user_gave_none() -> None:
    a, b, c = (nn.Parameter(torch.ones(1)) for _ in range(3))
    inner = SGD([{"params": [a]}, {"params": [b], "rho": 0.7}], lr=0.1)
    flatmtl.FlatMTL(inner, rho=0.1)
    inner.add_param_group({"params": [c]})
    assert [group["rho"] for group in inner.param_groups] == [0.1, 0.7, 0.1]
    second = flatmtl.FlatMTL(inner, rho=(0.3, 0.2))
    assert [group["rho"] for group in inner.param_groups] == [(0.3, 0.2), 0.7, (0.3, 0.2)]
    inner.param_groups[0]["rho"] = 0.9  # by hand: the user's from now on
    flatmtl.FlatMTL(pickle.loads(pickle.dumps(second)).optimizer, rho=0.5)
    third = flatmtl.FlatMTL(copy.deepcopy(inner), rho=0.5)
    assert [group["rho"] for group in third.param_groups] == [0.9, 0.7, 0.5]
    inner.param_groups[1]["rho"] = -1
    with pytest.raises(ValueError, match="Invalid rho of a param group: -1"):
        flatmtl.FlatMTL(inner, rho=0.5)
    assert [group["rho"] for group in inner.param_groups] == [0.9, -1, (0.3, 0.2)]
    assert inner.defaults["rho"] == (0.3, 0.2)


def test_optimizers_with_a_rho_of_their_own_are_refused() -> None:
    """Adadelta's is a decay; it was taken for the radius."""

    class Derived(torch.optim.Adadelta):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)  # type: ignore[arg-type]

    for cls in (torch.optim.Adadelta, Derived):
        inner = cls(two_heads().parameters())
        with pytest.raises(TypeError, match=f"{cls.__name__} cannot be wrapped: it has a rho of its own"):
            flatmtl.FlatMTL(inner)
        assert inner.param_groups[0]["rho"] == 0.9


class Framework(torch.optim.Optimizer):
    """A wrapper as frameworks have them."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


def test_nested_wraps_are_refused() -> None:
    optimizer = make(two_heads())
    with pytest.raises(
        TypeError, match="optimizer is a FlatMTL already: give that one the options, or wrap its `optimizer`"
    ):
        flatmtl.FlatMTL(optimizer)
    with pytest.raises(TypeError, match="optimizer is a Framework around a FlatMTL already"):
        flatmtl.FlatMTL(Framework(optimizer))


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_listed_twice_is_refused_by_name() -> None:
    model = two_heads()
    first, *rest = model.named_parameters()
    groups = [{"params": rest}, {"params": [first, ("again", first[1])]}]
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['params'\] .* \[0\] and \[1\] are the same \('again'\)"):
        flatmtl.FlatMTL(SGD(groups, lr=0.1))  # type: ignore[arg-type]
    optimizer = flatmtl.FlatMTL(SGD([p for _, p in rest], lr=0.1))
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['params'\] lists a parameter twice"):
        optimizer.add_param_group({"params": iter([first[1], first[1]])})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": iter([first[1]])})
    assert len(optimizer.param_groups[1]["params"]) == 1


# -- torch's own inputs for optimizers --------------------------------------------------------------------------------

common = pytest.importorskip("torch.testing._internal.common_optimizers", reason="needs expecttest")


class WrappedSGD(flatmtl.FlatMTL):
    """FlatMTL with the constructor of SGD, as the tables of torch's tests expect."""

    def __init__(self, params: object, lr: object = 1e-3, **kwargs: object) -> None:
        super().__init__(SGD(params, lr=lr, **kwargs), aggregator="mean")  # type: ignore[arg-type]


INFO = common.OptimizerInfo(
    WrappedSGD,
    optim_inputs_func=common.optim_inputs_func_sgd,
    optim_error_inputs_func=common.optim_error_inputs_func_sgd,
    step_requires_closure=True,
    supports_sparse=False,
    supports_complex=False,
)


@pytest.mark.parametrize("case", INFO.optim_inputs_func(torch.device("cpu")), ids=lambda c: c.desc or "default")
def test_torch_optimizer_inputs(case: object) -> None:
    """Every variant of SGD in torch's table lowers the losses, and resumes bit-equal from its state."""
    kwargs = dict(case.kwargs)  # type: ignore[attr-defined]
    kwargs["lr"] = torch.tensor(0.1) if isinstance(kwargs.get("lr"), torch.Tensor) else 0.1
    sign = -1.0 if kwargs.get("maximize") else 1.0

    def run(model: nn.Module, optimizer: flatmtl.FlatMTL, steps: int) -> list[float]:
        x, y = batch()
        return [float(sum(optimizer.step(lambda: [sign * v for v in closure_of(model, x, y)()]))) for _ in range(steps)]

    if kwargs.get("differentiable"):
        return
    model = two_heads()
    optimizer = INFO.optim_cls(list(model.parameters()), **kwargs)
    losses = run(model, optimizer, 6)
    assert sign * losses[-1] < sign * losses[0]
    other = copy.deepcopy(model)
    resumed = INFO.optim_cls(list(other.parameters()), **kwargs)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares the tensors otherwise
    assert run(model, optimizer, 3) == run(other, resumed, 3)
    assert equal(values(model), values(other))


@pytest.mark.parametrize(
    "case", INFO.optim_error_inputs_func(torch.device("cpu"), torch.float32), ids=lambda c: c.optimizer_error_input.desc
)
def test_torch_optimizer_error_inputs(case: object) -> None:
    given = case.optimizer_error_input  # type: ignore[attr-defined]
    params = [nn.Parameter(torch.randn(1, 1))] if given.params is None else given.params
    if case.error_type is UserWarning:  # type: ignore[attr-defined]
        # parameters listed twice: torch warns, and FlatMTL refuses them
        warns = pytest.warns(UserWarning, match=case.error_regex)  # type: ignore[attr-defined]
        with warns, pytest.raises(ValueError, match="lists a parameter twice"):
            INFO.optim_cls(params, **given.kwargs)
    else:
        with pytest.raises(case.error_type, match=case.error_regex):  # type: ignore[attr-defined]
            INFO.optim_cls(params, **given.kwargs)


def test_no_search_for_wrappers_without_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks at every object of the process, which takes longer than a small step."""

    def searched() -> list[object]:
        raise AssertionError

    monkeypatch.setattr(gc, "get_objects", searched)
    model = two_heads()
    flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1)).step(closure_of(model, *batch()))


class _Closures:
    def bound(self, task: object = None) -> None: ...

    def bound_without(self, other: object = None) -> None:
        task = other
        del task

    def __call__(self, *, task: object) -> None: ...


def _first(task: object) -> None: ...


def _keyword(x: object, *, task: object = None) -> None: ...


def _local(x: object) -> None:
    task = x
    del task


def _with_rest(*rest: object, **named: object) -> None: ...


@functools.wraps(_first)
def _wrapped(*args: object, **kwargs: object) -> None: ...


@pytest.mark.parametrize(
    ("closure", "takes"),
    [
        (_first, True), (_keyword, True), (_local, False), (_with_rest, False), (_wrapped, True),
        (lambda task: task, True), (lambda: None, False), (functools.partial(_keyword, 1), True), (_Closures(), True),
        (_Closures().bound, True), (_Closures().bound_without, False), (dict, False),
    ],
)  # fmt: skip
def test_closures_with_a_parameter_named_task_are_known(closure: Any, takes: bool) -> None:
    assert _losses.takes_task(closure) is takes
