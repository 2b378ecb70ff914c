"""Architectures and data methods of the field, in examples/architectures: F-MTL trains them as they are."""

import functools
import importlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import flatmtl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "architectures"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common")

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny tensors: on a busy machine threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def double():
    """float64 as the default, so that two computations of the same thing can be compared closely."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@functools.cache
def load(name):
    """The example as a module; the examples import each other as scripts do."""
    paths = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path[:] = paths


def random_banks():
    return [nn.Conv2d(i, o, 3, s, padding=1, bias=False) for i, o, s in ((1, 4, 1), (4, 8, 2), (8, 32, 2))]


def case(name):
    """The model, a little data and the losses of an example."""
    example = load(name)
    common = load("common")

    def pairs():
        data = common.digit_pairs(100, 20)
        return data._replace(train_x=data.train_x.to(torch.get_default_dtype()))

    torch.manual_seed(0)
    if name == "ctal":
        return example.Network(channels=4), example.dense_pairs(20, 10), example.losses
    if name == "rcm":
        single = torch.get_default_dtype() == torch.float32
        return example.Network(example.learn_banks(epochs=1) if single else random_banks()), pairs(), common.task_losses
    if name == "vmtl":
        return example.Network(), example.domains(100, 20), example.losses
    if name == "distillation":
        data = pairs()
        return example.Distilled(example.Network(), example.teach(data, epochs=1)), data, example.losses
    if name == "tfcl":
        return example.Network(), example.grouped_regression(), example.losses
    if name == "feature_variance":
        data = example.three_tasks()
        return (
            example.Network(),
            data._replace(train_x=data.train_x[:100], train_y=data.train_y[:100]),
            common.task_losses,
        )
    return example.Network(), pairs(), example.losses


MODELS = [name for name in NAMES if name != "data_cube"]


def test_every_example_is_in_the_table():
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(NAMES) == 9
    for name in NAMES:
        assert f"[`{name}.py`]({name}.py)" in table
        assert len((FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 120, name


@pytest.mark.parametrize("name", MODELS)
def test_trains_under_f_mtl(name):
    model, data, losses = case(name)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    curve = load("common").train(model, data, losses, flat=True, epochs=4, batch=25, lr=1e-2)
    assert sum(curve[-1]) < sum(curve[0])
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) > 0.8 * (len(before) - len(frozen))


@pytest.mark.parametrize("name", MODELS)
def test_without_a_radius_it_is_the_ordinary_training(name, double):
    """With the sum of losses and rho = 0, F-MTL must be what plain PyTorch does: parameters, buffers, random draws."""
    results = []
    for flat in (False, True):
        model, data, losses = case(name)
        data = data._replace(train_x=data.train_x.double())
        torch.manual_seed(1)
        load("common").train(model, data, losses, flat=flat, epochs=1, batch=25, rho=0.0, aggregator="sum")
        results.append((model.state_dict(), torch.get_rng_state()))
    (plain, draws), (flat, flat_draws) = results
    assert torch.equal(draws, flat_draws)
    for key, value in plain.items():
        torch.testing.assert_close(flat[key], value, rtol=1e-7, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_runs_alone(name):
    done = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == ["without F-MTL", "with F-MTL"]
    assert all("losses" in line and "test " in line for line in lines)


def test_compare_prints_both(capsys):
    common = load("common")
    threads = torch.get_num_threads()
    common.compare(lambda: load("distillation").Network(), common.digit_pairs(50, 20), epochs=1)
    torch.set_num_threads(threads)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("without F-MTL  losses 2.")
    assert second.startswith("with F-MTL     losses 2.")


# -- sparse mixture of experts ----------------------------------------------------------------------------------------


def test_experts_compute_only_what_is_sent_to_them():
    moe = load("sparse_moe")
    torch.manual_seed(0)
    layer = moe.SparseExperts(6, experts=5, tasks=2, top=2)
    seen = [0] * 5
    for e, expert in enumerate(layer.experts):
        expert.register_forward_hook(lambda _m, i, _o, e=e: seen.__setitem__(e, len(i[0])))
    z = torch.randn(11, 6)
    out, balance = layer(z, 1)
    assert sum(seen) == 11 * 2
    scores = layer.gates[1](z)
    for n in range(11):  # each row by the definition: softmax over its two best experts
        best = scores[n].argsort(descending=True)[:2]
        w = torch.softmax(scores[n, best], 0)
        expected = sum(w[i] * layer.experts[e](z[n : n + 1])[0] for i, e in enumerate(best))
        torch.testing.assert_close(out[n], expected)
    assert balance > 0
    with torch.no_grad():  # one expert for all rows: importance (N, 0, 0, 0, 0), squared variation E - 1
        single = moe.SparseExperts(6, experts=5, tasks=1, top=1)
        single.gates[0].weight.zero_()[2] = 1.0
        assert single(z.abs(), 0)[1].item() == pytest.approx(4.0)


def test_experts_that_nobody_chose_are_left_alone():
    moe = load("sparse_moe")
    torch.manual_seed(0)
    model = moe.Network(experts=4)
    data = load("common").digit_pairs(60, 10)
    for gate in model.mixture.gates:  # features are not negative: experts 2 and 3 always lose
        nn.init.constant_(gate.weight[:2], 1.0)
        nn.init.constant_(gate.weight[2:], -1.0)
    before = [p.detach().clone() for p in model.mixture.experts.parameters()]
    optimizer = flatmtl.FlatMTL(torch.optim.Adam(model.parameters(), lr=1e-3), rho=0.05)
    for rows in torch.arange(60).split(20):
        optimizer.step(lambda rows=rows: moe.losses(model, data.train_x[rows], data.train_y[rows]))
    after = list(model.mixture.experts.parameters())
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False] * 4 + [True] * 4
    for gate in model.mixture.gates:  # and then they are found
        nn.init.constant_(gate.weight[:2], -1.0)
        nn.init.constant_(gate.weight[2:], 1.0)
    optimizer.step(lambda: moe.losses(model, data.train_x, data.train_y))
    assert not any(torch.equal(a, b) for a, b in zip(before, model.mixture.experts.parameters(), strict=True))


# -- TAPS -------------------------------------------------------------------------------------------------------------


def test_taps_shares_a_layer_below_the_threshold_and_passes_the_gradient_through():
    taps = load("taps")
    torch.manual_seed(0)
    layer = taps.Adaptive(nn.Linear(5, 3), tasks=2)
    nn.init.normal_(layer.difference[0])
    x = torch.randn(7, 5)
    torch.testing.assert_close(layer(x, 0), F.linear(x, layer.layer.weight + layer.difference[0], layer.layer.bias))
    with torch.no_grad():
        layer.score[0].fill_(0.0999)
    assert torch.equal(layer(x, 0), layer.layer(x))
    assert torch.equal(layer(x, 1), layer.layer(x))  # a difference of 0
    layer(x, 0).sum().backward()
    # d/d indicator of sum(x (W + i D)' + b) is sum(x D'); the score takes it as its own
    assert layer.score[0].grad.item() == pytest.approx((x @ layer.difference[0].T).sum().item(), rel=1e-5)
    assert layer.difference[0].grad.abs().sum() == 0
    assert layer.score[1].grad is None


# -- CTAL -------------------------------------------------------------------------------------------------------------


def test_ctal_fuses_the_same_position_of_all_tasks():
    ctal = load("ctal")
    torch.manual_seed(0)
    module = ctal.AffinityModule(tasks=2, channels=4, positions=6)
    features = [torch.randn(3, 4, 2, 3) for _ in range(2)]
    for task in range(2):
        with torch.no_grad():  # the centre tap of one task alone
            module.fusion.weight.zero_()[:, task, 1, 1] = 1.0
            module.fusion.bias.zero_()
        fused = module.fused(features)
        f = features[task].flatten(2)
        for p, q in itertools.product(range(6), repeat=2):
            torch.testing.assert_close(fused[:, p, q], F.cosine_similarity(f[..., p], f[..., q], dim=1))
    module.gamma = 0.0
    assert all(torch.equal(a, b) for a, b in zip(module(features), features, strict=True))


# -- RCM --------------------------------------------------------------------------------------------------------------


def test_rcm_tasks_do_not_interfere():
    rcm = load("rcm")
    torch.manual_seed(0)
    model = rcm.Network(
        [nn.Conv2d(i, o, 3, s, padding=1, bias=False) for i, o, s in ((1, 4, 1), (4, 8, 2), (8, 32, 2))]
    )
    x, y = torch.rand(12, 1, 10, 10), torch.randint(10, (12,))
    layer = model.layers[0]
    assert not any(p.requires_grad for bank in (layer.bank for layer in model.layers) for p in bank.parameters())
    torch.testing.assert_close(layer.modulators[0][0](layer.bank(x)), layer.bank(x))  # starts as identity
    model.eval()
    before = model.of_task(x, 0)
    model.add_task()  # incremental: a third task, trained alone
    model.train()
    new = [p for n, p in model.named_parameters() if ".modulators.2." in n]
    optimizer = flatmtl.FlatMTL(torch.optim.Adam([*new, *model.heads[2].parameters()], lr=0.01), rho=0.05)
    values = [optimizer.step(lambda: [F.cross_entropy(model.of_task(x, 2), y)])[0].item() for _ in range(5)]
    assert values[-1] < values[0]
    model.eval()
    assert torch.equal(model.of_task(x, 0), before)


# -- VMTL -------------------------------------------------------------------------------------------------------------


def test_vmtl_divergence_and_priors():
    vmtl = load("vmtl")
    torch.manual_seed(0)
    q, p = [(torch.randn(4, 3), torch.rand(4, 3) + 0.1) for _ in range(2)]
    normal = [torch.distributions.Normal(m, v.sqrt()) for m, v in (q, p)]
    torch.testing.assert_close(vmtl.divergence(q, p), torch.distributions.kl_divergence(*normal))
    model = vmtl.Network(temperature=1e-4)  # cold: the mixture is one of the others, never the task itself
    posteriors = [(torch.full((2,), float(t)), torch.full((2,), 1.0 + t)) for t in range(3)]
    drawn = {model.prior(posteriors, 1, 0)[0][0].item() for _ in range(40)}
    assert drawn == {0.0, 2.0}
    data = vmtl.domains(20, 10)
    losses = vmtl.losses(vmtl.Network(), data.train_x, data.train_y)
    assert len(losses) == 3
    assert (data.train_y == data.train_y[:, :1]).all()


def test_vmtl_tasks_reach_each_other_through_the_encoder_alone():
    vmtl = load("vmtl")
    torch.manual_seed(0)
    model, data = vmtl.Network(), vmtl.domains(20, 10)
    loss = vmtl.losses(model, data.train_x, data.train_y)[0]
    loss.backward()
    reached = {n.split(".")[0] + "." + n.split(".")[1] for n, p in model.named_parameters() if p.grad is not None}
    assert reached == {"encoder.0", "encoder.2", "classifiers.0", "mixing.0"}


def test_vmtl_draws_the_same_in_every_pass():
    vmtl = load("vmtl")
    torch.manual_seed(0)
    model, data = vmtl.Network(), vmtl.domains(20, 10)
    optimizer = flatmtl.FlatMTL(torch.optim.SGD(model.parameters(), lr=0.1), rho=1e-6)
    optimizer.step(lambda: vmtl.losses(model, data.train_x, data.train_y))
    torch.testing.assert_close(optimizer.last["perturbed_losses"], optimizer.last["losses"], rtol=1e-4, atol=0)


# -- distillation -----------------------------------------------------------------------------------------------------


def test_distillation_distance():
    distillation = load("distillation")
    torch.manual_seed(0)
    student = distillation.Network()
    teacher = distillation.Network(tasks=1)
    model = distillation.Distilled(student, [teacher, teacher])
    x = torch.rand(9, 1, 10, 10)
    teacher.trunk.load_state_dict(student.trunk.state_dict())
    nn.init.eye_(model.adaptors[0].weight)
    with torch.no_grad():
        model.adaptors[1].weight.copy_(-3.0 * torch.eye(64))  # the opposite direction, whatever the length
    same, opposite = model.distances(x)
    assert same.item() == pytest.approx(0.0, abs=1e-10)
    assert opposite.item() == pytest.approx(4.0, rel=1e-5)
    (same + opposite).backward()
    assert all(p.grad is None for p in model.teachers.parameters())


# -- TFCL -------------------------------------------------------------------------------------------------------------


def test_tfcl_penalty_is_the_sum_of_the_smallest_eigenvalues(double):
    tfcl = load("tfcl")
    torch.manual_seed(0)
    w = torch.randn(6, 4, requires_grad=True)
    graph = torch.zeros(10, 10)
    for i, j in itertools.product(range(6), range(4)):
        for a, b in ((i, 6 + j), (6 + j, i)):
            graph[a, b] -= w[i, j].abs().item()
            graph[a, a] += w[i, j].abs().item()
    torch.testing.assert_close(tfcl.laplacian(w), graph)
    for k in (1, 2, 4, 10):
        expected = torch.linalg.eigvalsh(graph)[:k].sum()
        torch.testing.assert_close(tfcl.spectral_penalty(w, k), expected, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda v: tfcl.spectral_penalty(v, 3), w)
    blocks = torch.block_diag(torch.randn(2, 1), torch.randn(3, 2), torch.randn(1, 1))
    assert tfcl.spectral_penalty(blocks, 3).item() == pytest.approx(0.0, abs=1e-12)
    assert tfcl.spectral_penalty(blocks, 4).item() > 1e-3


# -- Data-CUBE --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_data_cube_tour_is_the_shortest(seed):
    cube = load("data_cube")
    g = torch.Generator().manual_seed(seed)
    s = torch.rand(6, 6, generator=g)
    s = (s + s.T) / 2

    def length(order):
        return sum(1 - s[a, b].item() for a, b in zip(order, [*order[1:], order[0]], strict=True))

    order = cube.tour(s)
    assert sorted(order) == list(range(6))
    assert length(order) == pytest.approx(min(map(length, itertools.permutations(range(6)))))


def test_data_cube_sampler_orders_tasks_and_samples():
    cube = load("data_cube")
    g = torch.Generator().manual_seed(0)
    task, difficulty = torch.randint(3, (100,), generator=g), torch.rand(100, generator=g)
    order = [2, 0, 1]
    sampler = cube.DataCube(task, difficulty, order, batch_size=4, levels=3)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(100))
    assert all(len(set(task[batch].tolist())) == 1 for batch in batches)
    assert [int(task[batch[0]]) for batch in batches[:6]] == order * 2
    for t in range(3):  # easy before difficult, level by level
        seen = torch.tensor([i for batch in batches for i in batch if task[i] == t])
        levels = difficulty[seen].tensor_split(3)
        assert levels[0].max() <= levels[1].min()
        assert levels[1].max() <= levels[2].min()
    assert list(sampler) != batches  # shuffled anew within a level


def test_data_cube_trains_with_absent_tasks():
    curve, _ = load("data_cube").main(flat=True, epochs=2)
    assert curve.shape == (2, 4)
    assert (curve[1] < curve[0]).all()


# -- feature variance -------------------------------------------------------------------------------------------------


def test_feature_variance_is_one_minus_the_correlation_ratio():
    from sklearn.feature_selection import f_classif

    measure = load("feature_variance").feature_variance
    g = torch.Generator().manual_seed(0)
    y = torch.randint(4, (200,), generator=g)
    z = torch.randn(200, 1, generator=g) + 0.7 * y[:, None]
    f = f_classif(z.numpy(), y.numpy())[0][0]  # (between / 3) / (within / 196)
    assert measure(z, y) == pytest.approx(1 / (1 + f * 3 / 196), rel=1e-4)
    many = torch.randn(200, 5, generator=g, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=torch.float64)).Q
    assert measure(3 * many @ rotation + 1, y) == pytest.approx(measure(many, y), rel=1e-10)
    assert measure(many, y) > 0.9  # labels tell nothing
    assert measure(F.one_hot(y).double(), y) == pytest.approx(0.0, abs=1e-12)
    assert measure(torch.ones(200, 2), y) != measure(torch.ones(200, 2), y)  # NaN: nothing varies
