"""Nothing lost: whatever fails before the wrapped optimizer's update, all is bit-equal to before."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from typing import Any

import flatmtl
import pytest
import torch
import torch.nn.functional as F
from models import TwoHeads, batch, closure_of, equal, two_heads, values
from torch import Tensor, nn
from torch.optim import SGD, Adam


class Setup:
    """A trained-a-little model with BatchNorm, dropout, momentum and old `.grad`, and a picture of all its state."""

    def __init__(self, **options: Any) -> None:
        self.model = two_heads(norm=True, dropout=0.3)
        self.x, self.y = batch()
        self.optimizer = flatmtl.FlatMTL(Adam(self.model.parameters(), lr=0.05), **options)
        self.optimizer.step(self.closure)
        self.grads = [p.grad for p in self.model.parameters()]
        self.before = self.picture()

    def closure(self) -> list[Tensor]:
        return closure_of(self.model, self.x, self.y)()

    def picture(self) -> list[Any]:
        tensors = [
            *self.model.state_dict().values(), torch.get_rng_state(),
            *(p.grad for p in self.model.parameters() if p.grad is not None),
            *(v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)),
        ]  # fmt: skip
        return [[t.detach().clone() for t in tensors], copy.deepcopy(self.optimizer.state_dict()["flatmtl"])]

    def check_untouched(self) -> None:
        now = self.picture()
        assert equal(self.before[0], now[0])
        assert self.before[1] == now[1]
        assert all(p.grad is g for p, g in zip(self.model.parameters(), self.grads, strict=True))
        self.optimizer.step(self.closure)  # and it goes on


class Boom(Exception):
    pass


def raising_at(setup: Setup, call: int, error: BaseException, where: str) -> Callable[[], list[Tensor]]:
    """A closure whose `call`-th call raises, before its forward, after it, or in its backward."""
    calls = iter(range(100))

    def closure() -> list[Tensor]:
        k = next(calls)
        if k == call and where == "before":
            raise error
        losses = setup.closure()
        if k == call and where == "after":
            raise error
        if k == call and where == "backward":

            def hook(grad: Tensor) -> Tensor:
                raise error

            losses[min(k, 1)].register_hook(hook) if k == 0 else losses[k - 1].register_hook(hook)
        return losses

    return closure


@pytest.mark.parametrize("where", ["before", "after", "backward"])
@pytest.mark.parametrize("call", [0, 1, 2])
@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, MemoryError, SystemExit])
def test_exception_in_any_pass(error: type[BaseException], call: int, where: str) -> None:
    setup = Setup()
    with pytest.raises(error):
        setup.optimizer.step(raising_at(setup, call, error("injected"), where))
    setup.check_untouched()


@pytest.mark.parametrize("call", [0, 1, 2])
def test_sigint_during_a_forward(call: int) -> None:
    setup, calls = Setup(), iter(range(100))

    def closure() -> list[Tensor]:
        losses = setup.closure()
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # a second one must not break the clean-up
        return losses

    with pytest.raises(KeyboardInterrupt):
        setup.optimizer.step(closure)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    setup.check_untouched()


@pytest.mark.parametrize("operation", ["perturb_", "gramian_pair", "combine_pair_", "sq_norms", "copy_"])
def test_failure_or_interrupt_inside_our_own_operations(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flatmtl import _native

    original = getattr(_native, operation)
    for kind in ("error", "interrupt"):
        setup, calls = Setup(), iter(range(100))

        def faulty(*args: Any, kind: str = kind, calls: Any = calls, **kwargs: Any) -> Any:
            if next(calls) == 1 or operation in ("gramian_pair", "combine_pair_"):
                if kind == "error":
                    raise MemoryError("injected")
                os.kill(os.getpid(), signal.SIGINT)
            return original(*args, **kwargs)

        monkeypatch.setattr(_native, operation, faulty)
        with pytest.raises(MemoryError if kind == "error" else KeyboardInterrupt):
            setup.optimizer.step(setup.closure)
        monkeypatch.setattr(_native, operation, original)
        if kind == "error" or operation != "combine_pair_":  # held, then the finished step stands
            setup.check_untouched()


def test_sigint_is_held_during_the_wrapped_update(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, setup = Setup(), Setup()
    plain.optimizer.step(plain.closure)
    inner, original = setup.optimizer.optimizer, setup.optimizer.optimizer.step
    torch.set_rng_state(setup.before[0][len(setup.model.state_dict())])

    def step() -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return original()

    monkeypatch.setattr(inner, "step", step)
    with pytest.raises(KeyboardInterrupt):
        setup.optimizer.step(setup.closure)
    assert equal(values(plain.model), values(setup.model))  # the update is whole


def test_failure_inside_the_wrapped_update_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup()
    monkeypatch.setattr(setup.optimizer.optimizer, "step", lambda: (_ for _ in ()).throw(Boom("inner")))
    with pytest.raises(Boom) as caught:
        setup.optimizer.step(setup.closure)
    assert any("wrapped optimizer's own update" in note for note in caught.value.__notes__)


def nan_grad(loss: Tensor) -> Tensor:
    """The same value with a NaN gradient."""
    return loss + (loss * 0).sqrt()


@pytest.mark.parametrize("call", [0, 1, 2])
@pytest.mark.parametrize("task", [0, 1])
@pytest.mark.parametrize("kind", ["loss_nan", "loss_inf", "grad"])
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_nonfinite(policy: str, kind: str, task: int, call: int) -> None:
    if call and task != call - 1:
        return  # a perturbed pass reads its own task alone
    setup, calls = Setup(nonfinite=policy), iter(range(100))

    def closure() -> list[Tensor]:
        losses = setup.closure()
        if next(calls) == call:
            spoil = {"loss_nan": lambda v: v * float("nan"), "loss_inf": lambda v: v * float("inf"), "grad": nan_grad}
            losses[task] = spoil[kind](losses[task])
        return losses

    if policy == "raise":
        with pytest.raises(flatmtl.NonFiniteError, match=f"task {task}: .*{'perturbed' if call else 'unperturbed'}"):
            setup.optimizer.step(closure)
        setup.check_untouched()
    else:
        losses = setup.optimizer.step(closure)
        assert len(losses) == 2
        assert setup.optimizer.last["skipped"]
        assert all(p.grad is None for p in setup.model.parameters())
        for p, g in zip(setup.model.parameters(), setup.grads, strict=True):
            p.grad = g  # all else is as it was
        setup.check_untouched()


def bad_closures(setup: Setup) -> dict[str, tuple[Any, type[Exception], str]]:
    m = setup.model
    first = next(m.parameters())
    calls = iter(range(100))

    def changing(change: Callable[[], None], at: int = 0) -> Callable[[], list[Tensor]]:
        def closure() -> list[Tensor]:
            losses = setup.closure()
            if next(calls) == at:
                change()
            return losses

        return closure

    def in_place() -> None:
        with torch.no_grad():
            first.add_(1.0)

    def losing() -> Any:
        losses = setup.closure()
        return losses if next(calls) == 0 else losses[:1]

    def changing_container() -> Any:
        losses = setup.closure()
        return losses if next(calls) == 0 else tuple(losses)

    def vanishing() -> Any:
        losses: list[Any] = setup.closure()
        return losses if next(calls) == 0 else [None, losses[1]]

    return {
        "no tensor": (lambda: [1.0, 2.0], TypeError, "loss of task 0 must be a tensor, but is float"),
        "no container": (lambda: 3.0, TypeError, "must return the task losses"),
        "nothing": (lambda: None, TypeError, "returned NoneType"),
        "empty": (lambda: [], ValueError, "no losses"),
        "empty vector": (lambda: torch.zeros(0), ValueError, "no losses"),
        "matrix": (lambda: torch.zeros(2, 2), ValueError, r"shape \(2, 2\)"),
        "not scalar": (lambda: [v[None].expand(2) for v in setup.closure()], ValueError, r"task 0 .*shape \(2,\)"),
        "no graph": (lambda: [v.detach() for v in setup.closure()], RuntimeError, "task 0 has no graph"),
        "complex": (lambda: [v.to(torch.complex64) for v in setup.closure()], TypeError, "complex"),
        "backward in closure": (
            lambda: [(v.backward(), v)[1] for v in [sum(setup.closure())]] * 2, RuntimeError, "second time"),
        "fewer losses in a perturbed pass": (losing, RuntimeError, "a list of 2 in .* but a list of 1"),
        "other container in a perturbed pass": (changing_container, RuntimeError, "a list of 2 .* a tuple of 2"),
        "absent in a perturbed pass only": (vanishing, RuntimeError, "None in the perturbed pass only"),
        "more tasks than before": (lambda: [*setup.closure(), setup.closure()[0]], RuntimeError, "earlier steps had"),
        "changed in the unperturbed pass": (changing(in_place), RuntimeError, r"\[0\] was changed in place"),
        "changed in a perturbed pass": (changing(in_place, 1), RuntimeError, "was changed in place"),
        "no closures": ([], ValueError, "closure is empty"),
        "not callable": ([setup.closure, 3], TypeError, r"closure\[1\] must be callable"),
        "strange key": (lambda: dict(zip([(1,), (2,)], setup.closure(), strict=True)), TypeError, "str or int"),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(bad_closures(Setup())))
def test_bad_closure(name: str) -> None:
    setup = Setup()
    closure, error, match = bad_closures(setup)[name]
    with pytest.raises(error, match=match):
        setup.optimizer.step(closure)
    setup.check_untouched()


def test_sparse_and_complex_and_no_parameters() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = flatmtl.FlatMTL(SGD(table.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match=r"gradient of parameter param_groups\[0\]\['params'\]\[0\] is sparse"):
        optimizer.step(lambda: table(torch.tensor([1, 2])).sum())
    assert table.weight.grad is None
    weight = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"'w' is torch\.complex64"):
        flatmtl.FlatMTL(SGD([("w", weight)], lr=0.1)).step(lambda: weight.abs().sum())
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    with pytest.raises(RuntimeError, match="no parameter"):
        flatmtl.FlatMTL(SGD([frozen], lr=0.1)).step(lambda: frozen.sum())


# -- BatchNorm, buffers, RNG ------------------------------------------------------------------------------------------


def statistics_after_plain_forwards(forwards: int) -> list[Tensor]:
    model = two_heads(norm=True)
    for _ in range(forwards):
        model(batch()[0])
    return [b.clone() for b in model.buffers()]


@pytest.mark.parametrize("kind", ["plain", "scripted", "functional", "modules", "compiled_eager"])
def test_batchnorm_statistics_change_once_a_step(kind: str) -> None:
    model = two_heads(norm=True)
    x, y = batch()
    run: Any = model
    if kind == "scripted":
        run = torch.jit.script(model)
    elif kind == "functional":
        run = lambda x: torch.func.functional_call(model, dict(model.named_parameters()), (x,))  # noqa: E731
    elif kind == "compiled_eager":
        run = torch.compile(model, backend="eager")
    params = list(run.parameters() if kind == "scripted" else model.parameters())
    modules = [model.trunk] if kind == "modules" else None
    optimizer = flatmtl.FlatMTL(SGD(params, lr=0.0), modules=modules)
    optimizer.step(lambda: [F.cross_entropy(o, t) for o, t in zip(run(x), y, strict=True)])
    buffers = list(run.buffers() if kind == "scripted" else model.buffers())
    assert equal(buffers, statistics_after_plain_forwards(1))
    optimizer.step([lambda i=i: F.cross_entropy(run(x)[i], y[i]) for i in range(2)])
    assert equal(buffers, statistics_after_plain_forwards(3))


def test_modules_given_empty_protects_nothing() -> None:
    model = two_heads(norm=True)
    flatmtl.FlatMTL(SGD(model.parameters(), lr=0.0), modules=[]).step(closure_of(model, *batch()))
    assert int(model.trunk[1].num_batches_tracked) == 3


def test_any_buffer_that_a_forward_changes() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("average", torch.zeros(8, dtype=torch.float64))

        def forward(self, z: Tensor) -> Tensor:
            self.calls += 1
            self.average = 0.9 * self.average + z.detach().mean(0)  # another tensor in its place
            return z + 0.01 * self.calls

    model = two_heads()
    model.trunk.append(Counting())
    seen = []
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1))
    for k in range(3):
        optimizer.step(lambda: (seen.append(float(model.trunk[-1].calls)), closure_of(model, *batch())())[1])
        assert float(model.trunk[-1].calls) == k + 1
    assert seen == [0, 0, 0, 1, 1, 1, 2, 2, 2]  # a perturbed pass starts where the unperturbed one did


@pytest.mark.parametrize("replay", [True, False])
def test_dropout_masks_and_the_generator_afterwards(replay: bool) -> None:
    model = two_heads(dropout=0.5)
    x, y = batch()
    masks = []
    model.trunk[-1].register_forward_hook(lambda m, args, out: masks.append(out == 0))
    torch.manual_seed(7)
    closure_of(model, x, y)()
    after_one = torch.get_rng_state()
    masks.clear()
    torch.manual_seed(7)
    flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), replay_rng=replay).step(closure_of(model, x, y))
    assert torch.equal(torch.get_rng_state(), after_one)
    assert torch.equal(masks[0], masks[1]) is replay


def test_per_task_closures_replay_their_own_draws() -> None:
    model = two_heads(dropout=0.5)
    x, y = batch()
    masks: dict[int, list[Tensor]] = {0: [], 1: []}

    def closure(i: int) -> Tensor:
        z = model.trunk(x)
        masks[i].append(z == 0)
        return F.cross_entropy(model.heads[i](z), y[i])

    flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1)).step([lambda: closure(0), lambda: closure(1)])
    assert torch.equal(*masks[0])
    assert torch.equal(*masks[1])
    assert not torch.equal(masks[0][0], masks[1][0])


def test_storage_is_stable_and_versions_are_bumped() -> None:
    setup = Setup()
    pointers = [p.data_ptr() for p in setup.model.parameters()]
    held = setup.closure()  # a graph from before the step
    setup.optimizer.step(setup.closure)
    assert [p.data_ptr() for p in setup.model.parameters()] == pointers
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(held).backward()


def test_grad_scaler() -> None:
    x, y = batch()
    results = []
    for scaled in (False, True):
        model = two_heads()
        optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1), aggregator="nash_mtl", family_scale=None)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)
        for _ in range(3):
            optimizer.backward(closure_of(model, x, y), grad_scaler=scaler)
            if scaled:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        results.append(values(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("call", [0, 1])
def test_grad_scaler_overflow_skips_the_update(call: int) -> None:
    setup, calls = Setup(), iter(range(100))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def closure() -> list[Tensor]:
        losses = setup.closure()
        if next(calls) == call:
            losses[0] = nan_grad(losses[0])
        return losses

    setup.optimizer.backward(closure, grad_scaler=scaler)
    assert all(p.grad is not None and bool(p.grad.isinf().all()) for p in setup.model.parameters())
    scaler.step(setup.optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    for p, g in zip(setup.model.parameters(), setup.grads, strict=True):
        p.grad = g
    setup.check_untouched()


def test_no_reference_to_the_graph_is_kept() -> None:
    model = TwoHeads()
    optimizer = flatmtl.FlatMTL(SGD(model.parameters(), lr=0.1))
    losses = optimizer.step(closure_of(model, *batch()))
    assert all(v.grad_fn is None for v in losses)
    assert all(p.grad is not None and p.grad.grad_fn is None for p in model.parameters())
