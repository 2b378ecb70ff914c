"""torch.ops.flatmtl: results, error texts, what torch's compilers make of them, bit-equality, leaks."""

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import flatmtl
import gradients
import numpy as np
import pytest
import torch
from flatmtl import _ops
from gradients import DTYPES, assert_gramian, assert_row, flat, matrix, random_row, random_rows, vector

ops = torch.ops.flatmtl
SUM, FIXED, MGDA = (_ops.METHODS[name] for name in ("sum", "fixed", "mgda"))
PAIR = torch.tensor(
    [[4.0, 1.0, 0.1, 0.0], [1.0, 2.0, 0.0, 0.1], [0.1, 0.0, 0.02, 0.01], [0.0, 0.1, 0.01, 0.03]]
).double()
WEIGHTS = torch.tensor([0.75, -2.0], dtype=torch.float64)


# Arguments of every op, fresh ones at each call: some ops change them.
def arguments(name: str, dtype: torch.dtype = torch.float32) -> tuple:
    rows, other = flat(random_rows(2, 1, dtype)), flat(random_rows(2, 2, dtype))
    one, two, three = (random_row(seed, dtype) for seed in (3, 4, 5))
    return {
        "gramian": (rows, 2),
        "gramian_pair": (rows, other, 2),
        "sq_norms": (rows, 2, one, 0.25),
        "weights": (PAIR[:2, :2].contiguous(), MGDA, []),
        "step_weights": (PAIR, PAIR[:2, :2].contiguous(), MGDA, [], 1, 1),
        "aggregate": (rows, 2, FIXED, [0.5, 2.0]),
        "perturb_": (one, two, three, [0.1 * t for t in range(len(one))], True, 0.25),
        "copy_": (one, two),
        "combine_": (one, rows, 2, WEIGHTS),
        "combine_pair_": (one, rows, other, 2, WEIGHTS, 2 * WEIGHTS),
        "perturb": (two, three, [0.1 * t for t in range(len(one))], True, 0.25),
        "combine": (rows, 2, WEIGHTS),
        "combine_pair": (rows, other, 2, WEIGHTS, 2 * WEIGHTS),
    }[name]


NAMES = [
    "gramian", "gramian_pair", "sq_norms", "weights", "step_weights", "aggregate", "perturb", "combine", "combine_pair",
]  # fmt: skip
MUTATING = ["perturb_", "copy_", "combine_", "combine_pair_"]


def call(name: str, args: tuple) -> object:
    """What an op returns, or what it made of its first argument."""
    result = getattr(ops, name)(*args)
    return args[0] if name in MUTATING else result


def assert_same(a: object, b: object) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_gramians_agree_with_numpy(dtype, tasks):
    g, s = random_rows(tasks, 1, dtype), random_rows(tasks, 2, dtype)
    assert_gramian(ops.gramian(flat(g), tasks), matrix(g))
    f = gradients.differences(g, s)
    pair = ops.gramian_pair(flat(g), flat(s), tasks)
    assert_gramian(pair, np.concatenate([matrix(g), f]))
    pair[:tasks, tasks:] = pair[tasks:, :tasks] = 0.0
    assert_same(ops.gramian_pair(flat(g), flat(s), tasks, cross=False), pair)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_gramian_is_not_a_difference_of_inner_products(dtype):
    g = random_rows(3, 1, dtype)
    s = [[x + 1e-3 * torch.randn_like(x) for x in row] for row in g]
    flat_part = ops.gramian_pair(flat(g), flat(s), 3)[3:, 3:]
    assert_gramian(flat_part, gradients.differences(g, s))


@pytest.mark.parametrize("dtype", DTYPES)
def test_squared_norms_agree_with_numpy(dtype):
    rows, params = random_rows(3, 1, dtype), random_row(7, dtype)
    x, t = matrix(rows), np.abs(vector(params)) + 0.25
    np.testing.assert_allclose(ops.sq_norms(flat(rows), 3, [], 9.0), (x * x).sum(1), rtol=1e-13)
    np.testing.assert_allclose(ops.sq_norms(flat(rows), 3, params, 0.25), ((t * x) ** 2).sum(1), rtol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_agree_with_numpy(dtype):
    g, s, out = random_rows(2, 1, dtype), random_rows(2, 2, dtype), random_row(3, dtype)
    a, b = WEIGHTS.numpy(), 2 * WEIGHTS.numpy()
    ops.combine_(out, flat(g), 2, WEIGHTS)
    assert_row(out, a @ matrix(g), out)
    ops.combine_pair_(out, flat(g), flat(s), 2, WEIGHTS, 2 * WEIGHTS)
    assert_row(out, a @ matrix(g) + b @ (matrix(s) - matrix(g)), out)
    assert_row(ops.aggregate(flat(g), 2, FIXED, a.tolist()), a @ matrix(g), out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adaptive", [False, True])
def test_perturbation_agrees_with_numpy(dtype, adaptive):
    params, saved, grads = (random_row(seed, dtype) for seed in (1, 2, 3))
    scale = [0.5, -0.25, 1.0, 3.0, 0.0, 0.125]
    ops.perturb_(params, saved, grads, scale, adaptive, 0.25)
    factors = np.concatenate([np.full(p.numel(), c) for p, c in zip(params, scale, strict=True)])
    t = np.abs(vector(saved)) + 0.25 if adaptive else 1.0
    assert_row(params, vector(saved) + factors * t * t * vector(grads), params)


@pytest.mark.parametrize("dtype", DTYPES)
def test_copy_is_bit_for_bit(dtype):
    to, source = random_row(1, dtype), random_row(2, dtype)
    source[0][0], source[0][1] = float("nan"), -0.0
    ops.copy_(to, source)
    for a, b in zip(to, source, strict=True):
        assert_same(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


# Rows of bfloat16 and float16 beside float32: (op, its arguments with rows of that dtype).
NARROW = {
    "sq_norms": lambda g, s, one, p, q: ops.sq_norms(g, 2, p, 0.25),
    "perturb_": lambda g, s, one, p, q: (ops.perturb_(p, q, one, [0.1] * len(p), True, 0.25), p),
    "perturb": lambda g, s, one, p, q: ops.perturb(q, one, [0.1] * len(p), False, 0.25),
    "combine_": lambda g, s, one, p, q: (ops.combine_(p, g, 2, WEIGHTS), p),
    "combine_pair_": lambda g, s, one, p, q: (ops.combine_pair_(p, g, s, 2, WEIGHTS, 2 * WEIGHTS), p),
    "graddrop_": lambda g, s, one, p, q: (
        ops.graddrop_(p, g, s, 2, WEIGHTS, 2 * WEIGHTS, 0.1 * WEIGHTS.abs(), 1, 2, 0, 0), p,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NARROW)
def test_narrow_rows_beside_float32_are_those_values_in_float32(name, dtype):
    results = []
    for convert in (lambda row: row, lambda row: [x.float() for x in row]):
        g, s, one = flat(random_rows(2, 1, dtype)), flat(random_rows(2, 2, dtype)), random_row(5, dtype)
        results.append(NARROW[name](convert(g), convert(s), convert(one), random_row(3), random_row(4)))
    assert_same(*results)


def test_float32_rows_are_summed_in_float64():
    """A float32 sum of a million equal products is off by 1e-4 and more, and cancellation makes it worse."""
    x = torch.full((1_000_003,), 0.1)
    y = torch.where(torch.arange(x.numel()) % 2 == 0, 3.0, -3.0)
    y[-1] = 1e-3
    result = ops.gramian([x, y], 2)
    assert_gramian(result, matrix([[x], [y]]))
    assert abs(result[0, 1].item() - gradients.gramian(matrix([[x], [y]]))[0, 1]) < 1e-7
    assert abs((x @ y).item() - result[0, 1].item()) > 1e-7  # the same in float32


def test_channels_last():
    g = [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last) for _ in range(2)]
    assert_gramian(ops.gramian(g, 2), matrix([[x] for x in g]))
    (out,) = ops.aggregate(g, 2, SUM, [])
    assert out.stride() == g[0].stride()
    torch.testing.assert_close(out, g[0] + g[1])


def test_views_with_an_offset():
    base = torch.randn(100)
    rows = [base[3:13], base[40:50]]
    assert_gramian(ops.gramian(rows, 2), matrix([[x] for x in rows]))


def test_no_segments():
    assert_same(ops.gramian([], 3), torch.zeros(3, 3, dtype=torch.float64))
    assert_same(ops.gramian_pair([], [], 2), torch.zeros(4, 4, dtype=torch.float64))
    assert_same(ops.sq_norms([], 2, [], 0.0), torch.zeros(2, dtype=torch.float64))
    assert ops.aggregate([], 2, SUM, []) == []
    ops.copy_([], [])
    ops.perturb_([], [], [], [], False, 0.0)
    ops.combine_([], [], 2, WEIGHTS)
    ops.combine_pair_([], [], [], 2, WEIGHTS, WEIGHTS)


def test_kernels_let_inf_and_nan_through():
    rows = random_rows(3)
    rows[1][0][2] = float("inf")
    g = ops.gramian(flat(rows), 3)
    assert g[1, 1] == torch.inf
    assert torch.isfinite(g[::2, ::2]).all()
    rows[1][0][2] = float("nan")
    assert ops.sq_norms(flat(rows), 3, [], 0.0).isnan().tolist() == [False, True, False]
    assert ops.gramian_pair(flat(random_rows(3)), flat(rows), 3).diagonal().isnan().nonzero().tolist() == [[4]]


@pytest.mark.parametrize("name", ["perturb", "combine", "combine_pair"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_new_results_are_those_written_in_place(name, dtype):
    args, mutating = arguments(name, dtype), arguments(f"{name}_", dtype)
    assert_same(call(name, args), call(f"{name}_", mutating))
    assert_same(args, arguments(name, dtype))


def test_step_weights():
    a, b, status = ops.step_weights(PAIR, None, SUM, [], _ops.COMBINE["decomposed"], _ops.FAMILY_SCALE["rms"])
    assert_same(a, torch.ones(2, dtype=torch.float64))
    assert_same(b, torch.ones(2, dtype=torch.float64))
    assert_same(status, torch.zeros(2, dtype=torch.int64))
    nash = _ops.METHODS["nash_mtl"]
    antipodal = torch.zeros(4, 4, dtype=torch.float64)
    antipodal[:2, :2] = torch.eye(2)
    antipodal[2:, 2:] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    a, b, status = ops.step_weights(antipodal, None, nash, [], _ops.COMBINE["decomposed"], _ops.FAMILY_SCALE[None])
    torch.testing.assert_close(a, torch.ones(2, dtype=torch.float64))
    assert_same(b, torch.zeros(2, dtype=torch.float64))
    assert status.tolist() == [0, _ops.PARETO_STATIONARY]


# -- errors ------------------------------------------------------------------------------------------------------------

ERRORS = {
    "elements": (
        lambda: ops.gramian([torch.ones(n) for n in (3, 2, 4, 3, 2, 5)], 2),
        r"flatmtl::gramian: rows\[1\]\[2\] has 5 elements, rows\[0\]\[2\] has 4",
    ),
    "shape": (
        lambda: ops.gramian([torch.ones(6), torch.ones(2, 3)], 2),
        r"flatmtl::gramian: rows\[1\]\[0\] has shape \(2, 3\), rows\[0\]\[0\] has \(6,\)",
    ),
    "dtype within a row": (
        lambda: ops.gramian([torch.ones(2), torch.ones(2).double()], 1),
        r"flatmtl::gramian: rows\[0\]\[1\] is float64, rows\[0\]\[0\] is float32",
    ),
    "dtype of a row": (
        lambda: ops.gramian_pair([torch.ones(2)], [torch.ones(2).bfloat16()], 1),
        r"flatmtl::gramian_pair: perturbed_rows\[0\]\[0\] is bfloat16, loss_rows\[0\]\[0\] is float32",
    ),
    "rows wider than the result": (
        lambda: ops.combine_([torch.ones(2).bfloat16()], [torch.ones(2)] * 2, 2, WEIGHTS),
        r"flatmtl::combine_: rows\[0\]\[0\] is float32, out\[0\] is bfloat16",
    ),
    "narrow rows beside float64": (
        lambda: ops.combine_([torch.ones(2).double()], [torch.ones(2).bfloat16()] * 2, 2, WEIGHTS),
        r"flatmtl::combine_: rows\[0\]\[0\] is bfloat16, out\[0\] is float64",
    ),
    "narrow gradient beside float64": (
        lambda: ops.perturb_([torch.ones(2).double()], [torch.ones(2).double()], [torch.ones(2).half()], [1.0], False, 0.0),
        r"flatmtl::perturb_: grads\[0\] is float16, params\[0\] is float64",
    ),
    "float64 weights of narrow rows": (
        lambda: ops.sq_norms([torch.ones(2).bfloat16()], 1, [torch.ones(2).double()], 0.0),
        r"flatmtl::sq_norms: params\[0\] is float64, rows\[0\]\[0\] is bfloat16",
    ),
    "families of two dtypes": (
        lambda: ops.combine_pair_([torch.ones(2)], [torch.ones(2).half()], [torch.ones(2)], 1, WEIGHTS[:1], WEIGHTS[:1]),
        r"flatmtl::combine_pair_: perturbed_rows\[0\]\[0\] is float32, the tensors before it are float16",
    ),
    "narrow rows of two dtypes": (
        lambda: ops.combine_([torch.ones(2)], [torch.ones(2).half(), torch.ones(2).bfloat16()], 2, WEIGHTS),
        r"flatmtl::combine_: rows\[1\]\[0\] is bfloat16, the tensors before it are float16",
    ),
    "integers": (lambda: ops.gramian([torch.arange(3)], 1), r"rows\[0\]\[0\] is int64; float32, float64"),
    "complex": (lambda: ops.gramian([torch.ones(3) * 1j], 1), r"rows\[0\]\[0\] is complex64; float32"),
    "sparse": (lambda: ops.gramian([torch.eye(3).to_sparse()], 1), r"rows\[0\]\[0\] is not a strided tensor"),
    "gaps": (
        lambda: ops.gramian([torch.ones(3, 4)[:, ::2]], 1),
        r"rows\[0\]\[0\] has shape \(3, 2\) and strides \(4, 2\): its elements do not fill one block",
    ),
    "expanded": (lambda: ops.gramian([torch.ones(1).expand(3)], 1), r"shape \(3,\) and strides \(0,\)"),
    "order": (
        lambda: ops.gramian([torch.ones(3, 4), torch.ones(4, 3).t()], 2),
        r"rows\[1\]\[0\] has strides \(1, 3\), rows\[0\]\[0\] has \(4, 1\); their elements must lie in the same order",
    ),
    "not divisible": (lambda: ops.gramian([torch.ones(3)] * 5, 2), r"rows has 5 tensors, which 2 tasks do not divide"),
    "no tasks": (lambda: ops.gramian([torch.ones(3)], 0), r"num_tasks is 0; it must be between 1 and 4096"),
    "too many tasks": (lambda: ops.gramian([], 5000), r"num_tasks is 5000"),
    "other count": (
        lambda: ops.gramian_pair([torch.ones(3)] * 4, [torch.ones(3)] * 2, 2),
        r"perturbed_rows has 2 tensors, but loss_rows has 2 a row: expected 2 rows of 2",
    ),
    "out count": (
        lambda: ops.combine_([torch.ones(3)], [torch.ones(3)] * 4, 2, WEIGHTS),
        r"flatmtl::combine_: rows has 4 tensors, but out has 1: expected 2 rows of 1",
    ),
    "scale count": (
        lambda: ops.perturb_([torch.ones(3)], [torch.ones(3)], [torch.ones(3)], [], False, 0.0),
        r"flatmtl::perturb_: scale has 0 values, params has 1 tensors",
    ),
    "scale count of the new result": (
        lambda: ops.perturb([torch.ones(3)], [torch.ones(3)], [], False, 0.0),
        r"flatmtl::perturb: scale has 0 values, saved has 1 tensors",
    ),
    "weights shape of the new result": (
        lambda: ops.combine([torch.ones(3)] * 2, 2, torch.ones(3).double()),
        r"flatmtl::combine: weights has shape \(3,\); expected \(2,\)",
    ),
    "rows of the new result": (
        lambda: ops.combine_pair([torch.ones(3)] * 2, [torch.ones(2)] * 2, 2, WEIGHTS, WEIGHTS),
        r"flatmtl::combine_pair: perturbed_rows\[0\]\[0\] has 2 elements, loss_rows\[0\]\[0\] has 3",
    ),
    "weights dtype": (
        lambda: ops.combine_([torch.ones(3)], [torch.ones(3)] * 2, 2, torch.ones(2)),
        r"flatmtl::combine_: weights is float32; it must be float64",
    ),
    "weights shape": (
        lambda: ops.combine_([torch.ones(3)], [torch.ones(3)] * 2, 2, torch.ones(3).double()),
        r"flatmtl::combine_: weights has shape \(3,\); expected \(2,\)",
    ),
    "not square": (lambda: ops.weights(torch.ones(2, 3).double(), SUM, []), r"gramian must be a K x K matrix"),
    "odd": (lambda: ops.step_weights(torch.eye(3).double(), None, 0, [], 0, 0), r"gramian_pair must be a 2K x 2K"),
    "transposed": (lambda: ops.weights(torch.ones(2, 2).double()[:, :1].expand(2, 2), SUM, []), "is not contiguous"),
    "method": (lambda: ops.weights(torch.eye(2).double(), -1, []), r"flatmtl::weights: method is -1; it must be"),
    "combine": (lambda: ops.step_weights(PAIR, None, 0, [], 4, 0), r"combine is 4; it must be between 0 and 3"),
    "family scale": (lambda: ops.step_weights(PAIR, None, 0, [], 0, 2), r"family_scale is 2; it must be 0 or 1"),
    "option": (lambda: ops.weights(torch.eye(2).double(), _ops.METHODS["cagrad"], [1.5]), r"flatmtl::weights: .*1\.5"),
    "nan": (lambda: ops.weights(torch.tensor([[1.0, 0.0], [0.0, np.nan]]).double(), MGDA, []), r"row 1"),
    "nan rows": (lambda: ops.aggregate([torch.ones(2), torch.ones(2) * torch.inf], 2, MGDA, []), r"row 1"),
    "eta": (lambda: ops.sq_norms([torch.ones(2)], 1, [torch.ones(2)], -1.0), r"flatmtl::sq_norms: .*eta"),
    "direct": (lambda: ops.step_weights(PAIR, None, SUM, [], 1, 0), r"flatmtl::step_weights: .*perturbed_gramian"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_error_says_what_is_wrong(case):
    function, text = ERRORS[case]
    with pytest.raises(RuntimeError, match=text):
        function()


def test_output_that_overlaps_a_row_is_refused_and_left_alone():
    memory = torch.randn(10)
    before = memory.clone()
    with pytest.raises(RuntimeError, match=r"flatmtl::combine_: .*overlap"):
        ops.combine_([memory[:6]], [memory[4:]], 1, WEIGHTS[:1])
    with pytest.raises(RuntimeError, match=r"flatmtl::copy_: .*overlap"):
        ops.copy_([memory[:6]], [memory[4:]])
    assert_same(memory, before)


def test_a_row_that_is_wrong_leaves_the_output_alone():
    out = torch.zeros(3)
    with pytest.raises(RuntimeError, match="has 4 elements"):
        ops.combine_([out], [torch.ones(3), torch.ones(4)], 2, WEIGHTS)
    with pytest.raises(RuntimeError, match="weights"):
        ops.combine_([out], [torch.ones(3)] * 2, 2, torch.tensor([1.0, torch.nan]).double())
    assert_same(out, torch.zeros(3))


# -- torch's machinery -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES + MUTATING)
def test_opcheck(name):
    torch.library.opcheck(getattr(ops, name).default, arguments(name))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("sq_norms", (flat(random_rows(2)), 2, [], 0.0)),
        ("step_weights", (PAIR, None, SUM, [], 0, 0)),
        ("aggregate", ([x.to(memory_format=torch.channels_last) for x in torch.randn(2, 1, 3, 4, 5)], 2, SUM, [])),
        ("gramian", ([], 2)),
    ],
    ids=["no params", "no perturbed gramian", "channels last", "no segments"],
)
def test_opcheck_of_the_corners(name, args):
    torch.library.opcheck(getattr(ops, name).default, args)


def compiled_step(params, saved, g, s):
    """All ops in a row, as a step uses them."""
    pair = ops.gramian_pair(g, s, 2)
    a, b, _ = ops.step_weights(pair, None, MGDA, [], 0, 1)
    norms = ops.sq_norms(g, 2, params, 0.1)
    ops.perturb_(params, saved, g[: len(params)], [0.1] * len(params), True, 0.1)
    moved = [p * 2 for p in params]
    ops.copy_(params, saved)
    ops.combine_pair_(saved, g, s, 2, a, b)
    ops.combine_(params, s, 2, ops.weights(ops.gramian(s, 2), MGDA, []))
    return pair, norms, moved, ops.aggregate(g, 2, MGDA, [])


def step_arguments():
    # Without 0-d tensors: Inductor of torch 2.13 reads one that an op changes twice after the second change (torch's
    # own custom_op too).
    shapes = [(5,), (3, 4), (1,), (0,), (2100,)]
    one, two = random_row(1, shapes=shapes), random_row(2, shapes=shapes)
    return one, two, flat(random_rows(2, 3, shapes=shapes)), flat(random_rows(2, 4, shapes=shapes))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_equals_eager(backend):
    eager, compiled = step_arguments(), step_arguments()
    expected = compiled_step(*eager)
    torch._dynamo.reset()
    result = torch.compile(compiled_step, fullgraph=True, backend=backend)(*compiled)
    torch.testing.assert_close(result, expected)
    assert_same(compiled, eager)  # the changed arguments


def test_export():
    class Model(torch.nn.Module):
        def forward(self, g):
            return ops.gramian(g, 2), ops.aggregate(g, 2, MGDA, [])

    g = flat(random_rows(2))
    program = torch.export.export(Model(), (g,))
    assert_same(program.module()(g), Model()(g))


@pytest.mark.parametrize("name", NAMES)
def test_meta_results_have_the_shapes_and_strides_of_real_ones(name):
    args = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to("meta"), arguments(name))
    meta, real = (torch.utils._pytree.tree_leaves(x) for x in (call(name, args), call(name, arguments(name))))
    for m, r in zip(meta, real, strict=True):
        assert m.device.type == "meta"
        assert (m.shape, m.stride(), m.dtype) == (r.shape, r.stride(), r.dtype)


def test_backward_through_an_op_warns():
    rows = [x.requires_grad_() for x in flat(random_rows(2))]
    with torch.no_grad():
        assert not ops.gramian(rows, 2).requires_grad
    result = ops.gramian(rows, 2)
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        result.sum().backward()


# -- bit-equality, leaks, loading --------------------------------------------------------------------------------------

DIGEST = """
import hashlib, sys, torch
sys.path.insert(0, {package!r})
from flatmtl import _ops
ops, dtypes = torch.ops.flatmtl, (torch.float32, torch.float64, torch.bfloat16, torch.float16)
torch.set_num_threads({threads})
digest = hashlib.sha256()
weights = torch.tensor([0.3, -1.1, 0.7]).double()
for dtype in dtypes:
    for size in (7, 300_001):
        x = torch.randn(9, size, generator=torch.Generator().manual_seed(size)).to(dtype)
        g, s, (p, q, out) = [*x[:3].clone()], [*x[3:6].clone()], x[6:].clone()
        results = [ops.gramian(g, 3), ops.gramian_pair(g, s, 3), ops.sq_norms(g, 3, [p], 0.1)]
        results += ops.aggregate(g, 3, 1, [])
        ops.perturb_([out], [p], [q], [0.1], True, 0.1)
        results.append(out.clone())
        ops.combine_([out], g, 3, weights)
        results.append(out.clone())
        ops.combine_pair_([out], g, s, 3, weights, weights.flip(0))
        for result in [*results, out]:
            digest.update(result.contiguous().view(torch.uint8).numpy().tobytes())
print(_ops.isa(), digest.hexdigest())
"""


def digest(threads: int, isa: str | None) -> tuple[str, str]:
    code = DIGEST.format(package=str(Path(flatmtl.__file__).parents[1]), threads=threads)
    environment = dict(os.environ, FLATMTL_LIBRARY=str(_ops.LIBRARY_PATH))
    if isa is not None:
        environment["FLATMTL_ISA"] = isa
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, value = done.stdout.split()
    return name, value


def test_bits_do_not_depend_on_threads_or_instruction_set():
    isas = [
        isa for isa in ("base", "avx2", "avx512", "neon") if _ops.core.flatmtl_select_isa(isa.encode(), None) == 0
    ]  # those of this machine
    runs = [(1, None), (2, None), (3, None), *((2, isa) for isa in isas)]
    with ThreadPoolExecutor(3) as pool:  # most of the time is torch's start
        (chosen, expected), *others = pool.map(lambda run: digest(*run), runs)
    assert others == [(isa or chosen, expected) for _, isa in runs[1:]]
    assert _ops.core.flatmtl_select_isa(chosen.encode(), None) == 0


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_no_memory_is_lost():
    def calls(count: int) -> None:
        for _ in range(count):
            for name, args in every:
                call(name, args)
            with pytest.raises(RuntimeError):
                ops.gramian(wrong, 2)

    every = [(name, arguments(name)) for name in NAMES + MUTATING]
    wrong = [torch.ones(2), torch.ones(3)]
    calls(200)
    gc.collect()
    before = resident()
    calls(1500)
    gc.collect()
    # A leak of one tensor handle (over 100 bytes) a call would be 1.5 MB and more.
    assert resident() - before < 1_000_000


def test_version_counters_are_left_to_the_backend():
    params = [torch.zeros(3)]
    ops.copy_(params, [torch.ones(3)])
    assert params[0]._version == 0


def test_library_has_no_python_symbol_and_exports_the_c_interface():
    assert _ops.core.flatmtl_version().decode() == flatmtl.__version__
    with pytest.raises(AttributeError):
        _ops.core.fm_fail  # noqa: B018
    assert b"PyObject" not in _ops.LIBRARY_PATH.read_bytes()


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setenv("FLATMTL_LIBRARY", "/nowhere/_C.so")
    with pytest.raises(ImportError, match=r"/nowhere/_C\.so"):
        _ops.find_library()


def test_old_torch_is_refused():
    _ops.check_torch("2.10.0")
    _ops.check_torch("3.0.0a0+git")
    with pytest.raises(ImportError, match=r"flatmtl needs torch >= 2.10; torch 2.9.1\+cpu is installed"):
        _ops.check_torch("2.9.1+cpu")
