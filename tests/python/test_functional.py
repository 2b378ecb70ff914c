"""flatmtl.gramian, weights, aggregate, and the aggregator objects."""

import flatmtl
import numpy as np
import pytest
import torch
from flatmtl import _native, _ops
from flatmtl.aggregators import AGGREGATORS, get_aggregator
from gradients import DTYPES, assert_gramian, assert_row, matrix, random_row, random_rows

GRAMIAN = torch.tensor([[4.0, -1.0, 0.5], [-1.0, 2.0, 0.3], [0.5, 0.3, 1.0]]).double()
OPTIONS = {"fixed": {"values": [0.5, 2.0, -1.0]}}


@pytest.mark.parametrize("dtype", DTYPES)
def test_gramian_of_lists_and_of_a_matrix(dtype):
    rows = random_rows(3, dtype=dtype)
    assert_gramian(flatmtl.gramian(rows), matrix(rows))
    assert_gramian(flatmtl.gramian(tuple(tuple(row) for row in rows)), matrix(rows))
    x = torch.randn(3, 50).to(dtype)
    assert_gramian(flatmtl.gramian(x), matrix([[row] for row in x]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", AGGREGATORS)
def test_aggregate_is_the_weighted_sum(name, dtype):
    rows = random_rows(3, dtype=dtype)
    options = OPTIONS.get(name, {})
    weights = flatmtl.weights(flatmtl.gramian(rows), name, **options)
    assert weights.shape == (3,)
    assert weights.dtype == torch.float64
    out = flatmtl.aggregate(rows, name, **options)
    assert isinstance(out, list)
    assert_row(out, weights.numpy() @ matrix(rows), rows[0])
    x = torch.randn(3, 50).to(dtype)
    vector = flatmtl.aggregate(x, name, **options)
    assert vector.shape == (50,)
    weights = flatmtl.weights(flatmtl.gramian(x), name, **options)
    assert_row([vector], weights.numpy() @ matrix([[row] for row in x]), [vector])


def test_weights_of_two_tasks_in_closed_form():
    g = torch.tensor([[4.0, -1.0], [-1.0, 2.0]]).double()
    d = g.diagonal().sqrt().numpy()
    cosine = -1.0 / (d[0] * d[1])
    expected = {
        "sum": [1, 1],
        "mean": [0.5, 0.5],
        "mgda": [3 / 8, 5 / 8],
        "pcgrad": [1 + 1 / 4, 1 + 1 / 2],
        "imtl_g": [d[1] / d.sum(), d[0] / d.sum()],
        "nash_mtl": 1 / (d * np.sqrt(1 + cosine)),
    }
    for name, w in expected.items():
        np.testing.assert_allclose(flatmtl.weights(g, name), w, rtol=1e-12)
    w = flatmtl.weights(g, "fairgrad", alpha=3.0)
    np.testing.assert_allclose(g.double() @ w, w ** (-1 / 3), rtol=1e-10)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_objects_do_what_names_do(name):
    options = OPTIONS.get(name, {})
    aggregator = AGGREGATORS[name](**options)
    assert (aggregator.name, aggregator.number) == (name, _ops.METHODS[name])
    torch.testing.assert_close(aggregator.weights(GRAMIAN), flatmtl.weights(GRAMIAN, name, **options), rtol=0, atol=0)
    rows = random_rows(3)
    torch.testing.assert_close(aggregator(rows), flatmtl.aggregate(rows, aggregator), rtol=0, atol=0)
    assert get_aggregator(name, **options) == aggregator
    assert eval(repr(aggregator), vars(flatmtl)) == aggregator
    assert hash(aggregator) == hash(get_aggregator(name, **options))
    with pytest.raises(AttributeError):
        aggregator.c = 3


def test_every_method_of_the_core_has_a_class():
    assert set(AGGREGATORS) == set(_ops.METHODS)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_defaults_are_those_of_the_core(name):
    if name == "fixed":
        pytest.skip("has none")
    default = torch.ops.flatmtl.weights(GRAMIAN, _ops.METHODS[name], [])
    torch.testing.assert_close(flatmtl.weights(GRAMIAN, name), default, rtol=0, atol=0)


def test_options_reach_the_core():
    assert not torch.equal(flatmtl.weights(GRAMIAN, "cagrad", c=0.1), flatmtl.weights(GRAMIAN, "cagrad", c=0.9))
    assert flatmtl.weights(GRAMIAN, "fixed", values=[1, 2, 3]).tolist() == [1, 2, 3]
    assert flatmtl.CAGrad(c=0.2) != flatmtl.CAGrad()
    assert flatmtl.PCGrad(seed=3).option_values(2, seed=7, draw=5) == [3, 5]
    assert flatmtl.PCGrad().option_values(2, seed=7, draw=5) == [7, 5]
    assert flatmtl.Fixed([1, 2, 3]).option_values(3, present=[0, 2]) == [1, 3]
    conflict = torch.full((4, 4), -0.3).double() + 1.5 * torch.diag(torch.arange(1, 5)).double()
    drawn = {tuple(flatmtl.weights(conflict, "pcgrad", draw=draw).tolist()) for draw in range(20)}
    assert len(drawn) > 1
    assert torch.equal(flatmtl.weights(conflict, "pcgrad", draw=3), flatmtl.weights(conflict, "pcgrad", draw=3))


def test_odd_layouts():
    g = [torch.randn(3, 4), torch.randn(4, 3).t(), torch.randn(3, 8)[:, ::2], torch.ones(1, 4).expand(3, 4)]
    rows = [[x] for x in g]
    assert_gramian(flatmtl.gramian(rows), matrix(rows))
    for order in (rows, rows[::-1]):
        torch.testing.assert_close(flatmtl.aggregate(order, "sum"), [sum(g)])
    x = torch.randn(50, 3).t()
    torch.testing.assert_close(flatmtl.aggregate(x, "mean"), x.mean(0))


def test_no_segments_and_one_task():
    assert flatmtl.gramian([[], []]).tolist() == [[0, 0], [0, 0]]
    assert flatmtl.aggregate([[], []], "mgda") == []
    row = random_row(1)
    torch.testing.assert_close(flatmtl.aggregate([row], "mgda"), row)


def test_inputs_are_not_copied_or_changed():
    rows = random_rows(2)
    before = [[x.clone() for x in row] for row in rows]
    flatmtl.aggregate(rows, "mgda")
    torch.testing.assert_close(rows, before, rtol=0, atol=0)
    assert all(x._version == 0 for row in rows for x in row)


class TestBackendWrites:
    """The backend's writes: version counters, and outputs with gaps."""

    def test_backward_after_a_write_raises(self):
        p = torch.ones(3, requires_grad=True)
        loss = (p * p).sum()
        _native.copy_([p], [torch.zeros(3)])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_output_with_gaps(self):
        base = torch.zeros(4, 6)
        rows = [[torch.randn(4, 3)] for _ in range(2)]
        _native.combine_([base[:, ::2]], rows, torch.ones(2))
        torch.testing.assert_close(base[:, ::2], rows[0][0] + rows[1][0])
        assert not base[:, 1::2].any()

    def test_ragged_rows_are_refused(self):
        with pytest.raises(ValueError, match="different numbers"):
            _native.gramian([[torch.ones(2)] * 3, [torch.ones(2)]])


ONE = torch.ones(2)
ERRORS = {
    "ragged": (lambda: flatmtl.gramian([[ONE, ONE], [ONE]]), ValueError, r"rows\[1\] has 1 tensors, rows\[0\] has 2"),
    "elements": (
        lambda: flatmtl.gramian([[ONE, torch.ones(4)], [ONE, torch.ones(5)]]), ValueError,
        r"flatmtl.gramian: rows\[1\]\[1\] has 5 elements, rows\[0\]\[1\] has 4",
    ),
    "shape": (lambda: flatmtl.gramian([[torch.ones(2, 3)], [torch.ones(6)]]), ValueError, r"shape \(6,\), rows\[0\]"),
    "dtype": (lambda: flatmtl.aggregate([[ONE], [ONE.double()]], "sum"), TypeError, r"rows\[1\]\[0\] is torch.float64"),
    "integers": (lambda: flatmtl.gramian(torch.ones(2, 2).int()), TypeError, "is torch.int32; float32"),
    "device": (lambda: flatmtl.gramian([[ONE], [ONE.to("meta")]]), ValueError, r"rows\[1\]\[0\] is on meta, rows"),
    "sparse": (lambda: flatmtl.gramian([[torch.eye(2).to_sparse()]]), TypeError, "sparse"),
    "none": (lambda: flatmtl.gramian([[ONE], [None]]), TypeError, r"rows\[1\]\[0\] is None.*pass zeros"),
    "no tensor": (lambda: flatmtl.gramian([[1.0]]), TypeError, r"rows\[0\]\[0\] is of type float"),
    "list of tensors": (lambda: flatmtl.gramian([ONE, ONE]), TypeError, r"rows\[0\] is a tensor.*torch.stack"),
    "empty": (lambda: flatmtl.gramian([]), ValueError, "at least one row"),
    "vector": (lambda: flatmtl.gramian(ONE), ValueError, r"shape \(2,\); it must be K x P"),
    "grad": (lambda: flatmtl.gramian([[ONE.clone().requires_grad_()]]), RuntimeError, r"rows\[0\]\[0\] requires grad"),
    "grad matrix": (lambda: flatmtl.gramian(torch.ones(2, 2, requires_grad=True)), RuntimeError, "rows requires grad"),
    "grad gramian": (
        lambda: flatmtl.weights(torch.eye(2, requires_grad=True), "sum"), RuntimeError, "gramian requires grad",
    ),
    "not square": (lambda: flatmtl.weights(torch.ones(2, 3), "sum"), ValueError, r"shape \(2, 3\); it must be K x K"),
    "method": (lambda: flatmtl.aggregate([[ONE]], "CAGrad"), ValueError, "Did you mean 'cagrad'.*'nash_mtl'"),
    "option": (
        lambda: flatmtl.weights(GRAMIAN, "cagrad", alpha=2), TypeError,
        "'cagrad' has no option 'alpha'.*options are 'c'",
    ),
    "no option": (lambda: flatmtl.weights(GRAMIAN, "sum", c=2), TypeError, "'sum' has no option 'c'; it has no opt"),
    "class": (lambda: flatmtl.weights(GRAMIAN, flatmtl.CAGrad), TypeError, "a name, or an object like"),
    "object": (lambda: flatmtl.weights(GRAMIAN, flatmtl.CAGrad(), c=0.1), TypeError, "beside the object CAGrad"),
    "fixed": (lambda: flatmtl.weights(GRAMIAN, "fixed"), TypeError, "needs its option 'values'"),
    "fixed count": (lambda: flatmtl.weights(GRAMIAN, flatmtl.Fixed([1, 2])), ValueError, "2 values for 3 tasks"),
    "c": (lambda: flatmtl.CAGrad(c=1.0), ValueError, r"c is 1.0; it must be in \[0, 1\)"),
    "alpha": (lambda: flatmtl.FairGrad(alpha=0), ValueError, "alpha is 0.0"),
    "seed": (lambda: flatmtl.PCGrad(seed=-1), ValueError, "seed is -1"),
    "nan": (
        lambda: flatmtl.aggregate([[ONE], [ONE * torch.nan]], "sum"), RuntimeError, r"rows\[1\] holds Inf or NaN",
    ),
    "nan gramian": (lambda: flatmtl.weights(torch.eye(2) * torch.inf, "sum"), RuntimeError, "row 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_error_says_what_is_wrong(case):
    function, kind, text = ERRORS[case]
    with pytest.raises(kind, match=text):
        function()


def test_inputs_that_require_grad_are_fine_under_no_grad():
    rows = [[torch.randn(3, requires_grad=True)] for _ in range(2)]
    with torch.no_grad():
        (out,) = flatmtl.aggregate(rows, "sum")
    assert not out.requires_grad
