"""flatmtl.script.SGD and Adam: the steps of FlatMTL as modules that TorchScript compiles, saves and loads."""

import copy
import math

import flatmtl
import pytest
import torch
import torch.nn.functional as F
from models import equal, values
from trainer import Network, Trainer, batches, make_trainer

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
WRAPPED = {
    "sgd": ("SGD", {"lr": 0.1}, torch.optim.SGD, {}),
    "momentum": ("SGD", SGD | {"dampening": 0.1}, torch.optim.SGD, {}),
    "nesterov": ("SGD", SGD | {"nesterov": True}, torch.optim.SGD, {}),
    "adam": ("Adam", {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-6}, torch.optim.Adam, {}),
    "adamw": ("Adam", {"lr": 0.01, "weight_decay": 0.1}, torch.optim.AdamW, {"decoupled_weight_decay": True}),
}
METHOD = {
    "default": {},
    "pcgrad": {"aggregator": "pcgrad", "seed": 3, "family_scale": None},
    "fixed": {"aggregator": flatmtl.Fixed([0.5, 2.0]), "combine": "second"},
    "direct": {"aggregator": "mgda", "combine": "direct", "rho": (0.1, 0.02)},
    "each": {"aggregator": "imtl_g", "combine": "each", "norm": "joint"},
    "adaptive": {"adaptive": True, "eta": 0.01, "rho": 0.5},
    "plain": {"rho": 0.0},
}


def by_flatmtl(optimizer, options, method, count, dtype=torch.float32):
    """The same training by FlatMTL around torch's optimizer."""
    torch.manual_seed(0)
    model = Network(dtype=dtype)
    wrapped = flatmtl.FlatMTL(optimizer(model.parameters(), **options), shared=[model.trunk], **method)
    for x, y in batches(count):
        wrapped.step(lambda x=x.to(dtype), y=y: [F.cross_entropy(out, t) for out, t in zip(model(x), y, strict=True)])
    return model


def state_of(model):
    return [*values(model), *model.buffers()]


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_eager_steps_are_those_of_flatmtl(wrapped):
    kind, options, optimizer, extra = WRAPPED[wrapped]
    trainer = make_trainer(kind, **options, **extra)
    for x, y in batches(4):
        trainer.train_step(x, y)
    assert equal(state_of(trainer.model), state_of(by_flatmtl(optimizer, options, {}, 4)))


@pytest.mark.parametrize("method", METHOD)
def test_eager_steps_are_those_of_flatmtl_with_every_option(method):
    trainer = make_trainer(**SGD, **METHOD[method])
    for x, y in batches(4):
        trainer.train_step(x, y)
    assert equal(state_of(trainer.model), state_of(by_flatmtl(torch.optim.SGD, SGD, METHOD[method], 4)))


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_scripted_training_is_that_of_flatmtl(kind):
    """Not bit for bit: TorchScript differentiates and fuses in its own way."""
    kind, options, optimizer, extra = WRAPPED[kind]
    scripted = torch.jit.script(make_trainer(kind, dtype=torch.float64, **options, **extra))
    for x, y in batches(5):
        scripted.train_step(x.double(), y)
    expected = by_flatmtl(optimizer, options, {}, 5, torch.float64)
    for a, b in zip(state_of(scripted.model), state_of(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def gradients(params, seed):
    """Two rows: the trunk and the task's own head."""
    g = torch.Generator().manual_seed(seed)
    rows = [[torch.randn(p.shape, generator=g) for p in params] for _ in range(2)]
    for task in range(2):
        for i in range(len(params) - 4 + 2 * (1 - task), len(params) - 2 * task):
            rows[task][i] = None
    return rows


def fed(module, first, last):
    """Steps by given gradients, so that nothing depends on how TorchScript differentiates."""
    for seed in range(first, last):
        rows, perturbed = gradients(module.params, 2 * seed), gradients(module.params, 2 * seed + 1)
        for task in range(2):
            module.perturb(rows, task)
        module.step(rows, perturbed)


@pytest.mark.parametrize(("kind", "method"), [("adam", "default"), *(("momentum", method) for method in METHOD)])
def test_scripted_saved_and_loaded_steps_have_the_same_bits(kind, method, tmp_path):
    kind, options, *_ = WRAPPED[kind]
    options = options | METHOD[method]
    eager, scripted = make_trainer(kind, **options), torch.jit.script(make_trainer(kind, **options))
    fed(eager.optimizer, 0, 6)
    fed(scripted.optimizer, 0, 3)
    assert not equal(values(scripted.model), values(eager.model))
    scripted.save(tmp_path / "trainer.pt")
    loaded = torch.jit.load(tmp_path / "trainer.pt")
    fed(loaded.optimizer, 3, 6)
    assert equal(values(loaded.model), values(eager.model))
    assert loaded.optimizer.steps == 6
    # And by state_dict, into a module that is made anew.
    again = torch.jit.script(make_trainer(kind, init=1, **options))
    again.load_state_dict(scripted.state_dict())
    fed(again.optimizer, 3, 6)
    assert equal(values(again.model), values(eager.model))


def test_a_saved_step_can_be_stopped_in_the_middle(tmp_path):
    scripted = torch.jit.script(make_trainer(**SGD))
    before = values(scripted.model)
    scripted.optimizer.perturb(gradients(scripted.optimizer.params, 0), 1)
    assert not equal(values(scripted.model), before)
    scripted.save(tmp_path / "trainer.pt")
    loaded = torch.jit.load(tmp_path / "trainer.pt")
    loaded.optimizer.restore()
    assert equal(values(loaded.model), before)


def test_draws_are_those_of_the_step():
    """Three tasks, so that PCGrad has an order to draw."""
    aggregator = flatmtl.PCGrad(seed=5)
    params = [torch.zeros(2) for _ in range(2)]
    optimizer = torch.jit.script(
        flatmtl.script.SGD(params, params, 0.0, aggregator=aggregator, family_scale=None, rho=0.0)
    )
    rows = [[torch.tensor([0.1, 0.0]), torch.tensor(row)] for row in ([1.0, 0.3], [-1.0, 0.5], [-0.3, -1.5])]
    drawn = [optimizer.step(rows, [])[0] for _ in range(6)]
    for draw, weights in enumerate(drawn):
        assert torch.equal(weights, flatmtl.weights(flatmtl.gramian(rows), aggregator, draw=draw))
    assert len({tuple(weights.tolist()) for weights in drawn}) > 1


def test_numbers_can_be_set():
    scripted, eager = torch.jit.script(make_trainer(**SGD)), make_trainer(**SGD | {"lr": 0.02})
    scripted.optimizer.lr = 0.02
    fed(scripted.optimizer, 0, 1)
    fed(eager.optimizer, 0, 1)
    assert equal(values(scripted.model), values(eager.model))


def test_perturbation_has_the_radius_and_leaves_other_heads_alone():
    scripted = torch.jit.script(make_trainer(**SGD, rho=(0.3, 0.2)))
    optimizer, before = scripted.optimizer, values(scripted.model)
    rows = gradients(optimizer.params, 0)
    for task in (0, 1, 0):
        optimizer.perturb(rows, task)
        moved = [p.detach() - q for p, q in zip(optimizer.params, before, strict=True)]
        trunk, heads = moved[:-4], [moved[-4:-2], moved[-2:]]
        assert math.sqrt(sum(float(d.double().square().sum()) for d in trunk)) == pytest.approx(0.3, rel=1e-5)
        assert math.sqrt(sum(float(d.double().square().sum()) for d in heads[task])) == pytest.approx(0.2, rel=1e-5)
        assert not any(bool(d.any()) for d in heads[1 - task])
        for d, g in zip(moved, rows[task], strict=True):  # along the gradient
            if g is not None:
                cosine = F.cosine_similarity(d.flatten().double(), g.flatten().double(), dim=0)
                assert float(cosine) == pytest.approx(1.0, abs=1e-4)
    optimizer.restore()
    assert equal(values(scripted.model), before)


def test_batchnorm_changes_in_the_unperturbed_pass_alone():
    trainer = make_trainer(**SGD)
    norm = copy.deepcopy(trainer.model.trunk[1])
    x, y = batches(1)[0]
    trainer.train_step(x, y)
    assert trainer.model.trunk[1].num_batches_tracked == 1
    weight = Network().trunk[0].weight  # any value: what is compared is the rule
    torch.manual_seed(0)
    weight = Network().trunk[0].weight
    norm(x @ weight.T)
    assert equal(list(trainer.model.trunk[1].buffers()), list(norm.buffers()))


def test_a_task_that_is_absent():
    scripted, eager = torch.jit.script(make_trainer(**SGD)), make_trainer(**SGD)
    model = copy.deepcopy(eager.model)
    wrapped = flatmtl.FlatMTL(torch.optim.SGD(model.parameters(), **SGD), shared=[model.trunk])
    for (x, y), present in zip(batches(3), ((0, 1), (0,), (0, 1)), strict=True):
        for trainer in (eager, scripted):
            optimizer = trainer.optimizer
            losses = trainer(x, y)
            grads = [[None] * len(optimizer.params)] * 2
            for task in present:
                grads[task] = list(
                    torch.autograd.grad(losses[task], optimizer.params, retain_graph=True, allow_unused=True)
                )
                for i in range(len(optimizer.params) - 4, len(optimizer.params)):
                    if (i < len(optimizer.params) - 2) == (task == 1):  # TorchScript gives zeros
                        grads[task][i] = None
            perturbed = [[None] * len(optimizer.params)] * 2
            for task in present:
                optimizer.perturb(grads, task)
                perturbed[task] = list(torch.autograd.grad(trainer(x, y)[task], optimizer.params, allow_unused=True))
            weights = optimizer.step(grads, perturbed)
            assert [bool(w.isfinite()) for w in weights[0]] == [task in present for task in range(2)]
        wrapped.step(
            lambda x=x, y=y, present=present: [
                F.cross_entropy(out, t) if task in present else None
                for task, (out, t) in enumerate(zip(model(x), y, strict=True))
            ]
        )
        assert equal(values(eager.model), values(model))
    for a, b in zip(values(scripted.model), values(model), strict=True):
        torch.testing.assert_close(a, b)


def test_errors_change_nothing():
    trainer = make_trainer(**SGD)
    scripted = torch.jit.script(trainer)
    optimizer, before = scripted.optimizer, [t.clone() for t in scripted.state_dict().values()]
    rows, perturbed = gradients(optimizer.params, 0), gradients(optimizer.params, 1)

    def refused(text, function, *arguments):
        with pytest.raises(Exception, match=text):
            function(*arguments)
        optimizer.restore()
        assert equal([t.clone() for t in scripted.state_dict().values()], before)

    wrong = [list(rows[0]), list(rows[1])]
    wrong[1][0] = rows[1][0].clone()
    wrong[1][0].view(-1)[0] = torch.nan
    refused(r"task 1: the gradient is not finite \(-?nan\) in the unperturbed pass", optimizer.perturb, wrong, 1)
    optimizer.perturb(rows, 0)
    refused(r"task 1: the gradient is not finite", optimizer.perturb, wrong, 1)
    refused(r"task 1: the gradient is not finite \(-?nan\) in the unperturbed pass", optimizer.step, wrong, perturbed)
    refused(r"task 1: the gradient is not finite \(-?nan\) in the perturbed pass", optimizer.step, rows, wrong)
    refused("task is 2; there are 2 rows", optimizer.perturb, rows, 2)
    refused(r"grads\[1\] has 3 entries; there are", optimizer.perturb, [rows[0], rows[1][:3]], 0)
    refused("perturbed has 1 rows, grads has 2", optimizer.step, rows, perturbed[:1])
    refused("grads is empty", optimizer.step, [], [])
    wrong[1][0] = torch.ones(3)
    refused(r"grads\[1\]\[0\] has shape \[3\], params\[0\] has", optimizer.step, wrong, perturbed)


def test_constructor_says_what_is_wrong():
    model = Network()
    params = list(model.parameters())
    for text, arguments in {
        "params is empty": ([], []),
        r"params\[1\] is torch.float64 on cpu; all must be": ([params[0], torch.ones(2).double()], []),
        "1 of the tensors in shared are not in params": (params, [torch.ones(2)]),
        r"params\[0\] has shape \(2, 2\) and strides \(4, 2\)": ([torch.ones(2, 4)[:, ::2]], []),
    }.items():
        with pytest.raises(ValueError, match=text):
            flatmtl.script.SGD(*arguments)
    for text, options in {
        "Invalid rho: -1": {"rho": -1.0},
        "Invalid norm: 'both'": {"norm": "both"},
        "Invalid family_scale: 'none'": {"family_scale": "none"},
        "Invalid eta": {"eta": -1.0},
        "no aggregator 'nope'": {"aggregator": "nope"},
        "Invalid learning rate": {"lr": -1.0},
        "Nesterov momentum": {"nesterov": True},
    }.items():
        with pytest.raises(ValueError, match=text):
            flatmtl.script.SGD(params, [model.trunk], **options)
    with pytest.raises(ValueError, match="Invalid beta"):
        flatmtl.script.Adam(params, [model.trunk], betas=(1.0, 0.9))
    scripted = torch.jit.script(
        Trainer(model, flatmtl.script.SGD(params, [model.trunk], aggregator=flatmtl.Fixed([1])))
    )
    rows = gradients(params, 0)
    with pytest.raises(Exception, match="Fixed has 1 values for 2 tasks"):
        scripted.optimizer.step(rows, rows)


def test_the_op_that_returns_nothing_is_still_dropped():
    """Why this package calls the ops that return new tensors. If this fails, torch has mended it."""

    @torch.jit.script
    def copied(source: list[torch.Tensor]) -> list[torch.Tensor]:
        to = [torch.zeros_like(t) for t in source]
        torch.ops.flatmtl.copy_(list(to), list(source))
        return to

    assert copied([torch.ones(2)])[0].tolist() == [0.0, 0.0]
