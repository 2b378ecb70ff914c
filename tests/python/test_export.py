"""flatmtl.export: a training step as an exported program, in Python and, compiled ahead of time, in C++."""

import os
import shutil
import subprocess
from pathlib import Path

import flatmtl
import flatmtl.export
import pytest
import torch
import torch.nn.functional as F
from flatmtl import _ops
from models import batch, closure_of, two_heads
from torch import Tensor, nn

SOURCE = Path(__file__).resolve().parents[1] / "libtorch"


def program_of(model, x, y, **options):
    def losses(params, x, *y):
        outputs = torch.func.functional_call(model, params, (x,))
        return [F.cross_entropy(out, target) for out, target in zip(outputs, y, strict=True)]

    return flatmtl.export.training_step(losses, dict(model.named_parameters()), (x, *y), **options)


def fresh(model, momentum=True):
    """Parameters, momentum buffers and learning rate, as the program takes them."""
    params = [p.detach().clone() for p in model.parameters()]
    buffers = [torch.zeros_like(p) for p in params] if momentum else []
    return params, buffers, torch.tensor(0.1, dtype=torch.float64)


OPTIONS = {
    "default": ({}, {"momentum": 0.9, "weight_decay": 0.01}),
    "adaptive": ({"adaptive": True, "eta": 0.01, "rho": (0.5, 0.2), "norm": "joint"}, {}),
    "direct": ({"aggregator": "mgda", "combine": "direct", "family_scale": None}, {"momentum": 0.5}),
    "plain": ({"rho": 0.0, "aggregator": flatmtl.Fixed([2.0, 0.5])}, {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_program_is_the_step_of_flatmtl(name):
    options, sgd = OPTIONS[name]
    model = two_heads()
    x, y = batch()
    step = program_of(model, x, y, **options, **sgd).module()
    params, buffers, lr = fresh(model, "momentum" in sgd)
    before = [p.clone() for p in params]
    optimizer = flatmtl.FlatMTL(torch.optim.SGD(model.parameters(), lr=0.1, **sgd), **options)
    for seed in range(3):
        x, y = batch(seed)
        losses = step(params, buffers, lr, x, *y)
        expected = optimizer.step(closure_of(model, x, y))
        torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-12, atol=0)
        for p, q in zip(params, model.parameters(), strict=True):
            torch.testing.assert_close(p, q.detach(), rtol=1e-10, atol=1e-13)
    assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_shared_parameters_can_be_named_and_the_learning_rate_changes():
    model = two_heads()
    x, y = batch()
    named = [name for name, _ in model.named_parameters() if name.startswith("trunk.0.weight")]
    step = program_of(model, x, y, shared=named).module()
    params, _, lr = fresh(model, momentum=False)
    lr.fill_(0.03)
    optimizer = flatmtl.FlatMTL(torch.optim.SGD(model.parameters(), lr=0.03), shared=[model.trunk[0].weight])
    step(params, [], lr, x, *y)
    optimizer.step(closure_of(model, x, y))
    for p, q in zip(params, model.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-10, atol=1e-13)


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = two_heads()
    x, y = batch()
    step = program_of(model, x, y, momentum=0.9).module()
    state = fresh(model)
    before = [t.clone() for t in state[0] + state[1]]
    with pytest.raises(RuntimeError, match=r"flatmtl::step_weights: .*row 0"):
        step(*state, x * torch.nan, *y)
    assert all(torch.equal(a, b) for a, b in zip(state[0] + state[1], before, strict=True))


def test_errors():
    model = two_heads()
    x, y = batch()
    for text, options in {
        "PCGrad draws anew": {"aggregator": "pcgrad"},
        r"shared names \['nope'\]": {"shared": ["nope"]},
        "Invalid rho: -1": {"rho": -1.0},
        "Invalid norm": {"norm": "both"},
        "Invalid momentum": {"momentum": -1.0},
    }.items():
        with pytest.raises(ValueError, match=text):
            program_of(model, x, y, **options)
    with pytest.raises(ValueError, match="no loss reaches the parameter 'b'"):
        flatmtl.export.training_step(
            lambda params, x: [(params["a"] * x).sum()] * 2, {"a": torch.ones(2), "b": torch.ones(2)}, (torch.ones(2),)
        )
    with pytest.raises(TypeError, match="must return a sequence of scalar tensors"):
        flatmtl.export.training_step(lambda params, x: [params["a"] * x], {"a": torch.ones(2)}, (torch.ones(2),))
    with pytest.raises(ValueError, match=r"params\['b'\] is torch.float64"):
        flatmtl.export.training_step(
            lambda params: [], {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.float64)}, ()
        )


class State(nn.Module):
    """What the compiled step is called with, for a program that reads TorchScript."""

    def __init__(self, tensors: list[Tensor], batches: list[list[Tensor]]) -> None:
        super().__init__()
        self.tensors, self.batches = tensors, batches

    @torch.jit.export
    def state(self) -> list[Tensor]:
        return self.tensors

    @torch.jit.export
    def batch(self, i: int) -> list[Tensor]:
        return self.batches[i]


def run(*command):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(1200)  # it compiles twice: half a minute on an idle machine
@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_compiled_ahead_of_time_and_run_without_python(tmp_path):
    model = two_heads(dtype=torch.float32)
    data = [batch(seed, dtype=torch.float32) for seed in range(5)]
    program = program_of(model, data[0][0], data[0][1], momentum=0.9)
    package = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "step.pt2"),
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
    )
    params, buffers, lr = fresh(model)
    state = State([*params, *buffers, lr], [[x, *y] for x, y in data])
    torch.jit.script(state).save(tmp_path / "state.pt")

    run("cmake", "-S", SOURCE, "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}")
    run("cmake", "--build", tmp_path, "--target", "train_aot")
    printed = run(tmp_path / "train_aot", _ops.LIBRARY_PATH, package, tmp_path / "state.pt", 5, tmp_path / "out.pt")

    optimizer = flatmtl.FlatMTL(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    expected = [optimizer.step(closure_of(model, x, y)) for x, y in data]
    losses = torch.tensor([[float(v) for v in line.split()] for line in printed.splitlines()])
    torch.testing.assert_close(losses, torch.tensor(expected), rtol=1e-5, atol=0)
    trained = torch.jit.load(tmp_path / "out.pt").state()
    for p, q in zip(trained[: len(params)], model.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=1e-5, atol=1e-6)
    for p, q in zip(trained[len(params) : -1], optimizer.state.values(), strict=True):
        torch.testing.assert_close(p, q["momentum_buffer"], rtol=1e-4, atol=1e-6)
