"""`python -m flatmtl bench`: its numbers mean what they say, its contenders do the same work, its record is whole."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from flatmtl import _authors, _native, reference
from flatmtl.__main__ import app
from flatmtl._bench import contenders, kernels, machine, plots, report, rows, run, settings, solvers, steps, timing
from flatmtl._bench.merge import merge
from flatmtl._bench.native import Core
from flatmtl._bench.probes import Probes
from flatmtl._bench.timing import Effort
from typer.testing import CliRunner

SHORT = Effort(0.0, 3, sample=1e-6)
TINY = dataclasses.replace(
    settings.QUICK, effort=SHORT, memory=4 << 20, kernel_tasks=(2, 3, 4), kernel_numbers=(300, 600, 1200),
    solver_tasks=(2, 3), aggregation_methods=("mgda",), aggregation_numbers=(100, 200, 400),
    step_numbers=(100, 200, 400), resnet_batch=2, model_steps=1, memory_width=16, batched_widths=(8,),
)  # fmt: skip


@pytest.fixture(scope="module")
def probes() -> Probes:
    return Probes()


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Of a run in which every case is tiny; steps but for the real models and the memory, which have their own tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "LAYOUTS", ("one", "500 x 400"))
        patch.setattr(solvers, "METHODS", ("mgda", "pcgrad"))
        patch.setattr(machine, "cores", lambda: 1)  # threads that wait for each other are slow on a busy machine
        patch.setattr(
            steps, "model_step", lambda name, tasks, *_: {
                "model": name, "tasks": tasks, "batch": 2, "size": 8, "numbers": 9, "threads": 1,
                "times": {n: {"median": 1.0, "lower": 1.0, "upper": 1.0, "ratio": timing.summary([2.0])} for n in (
                    steps.PASSES, steps.OURS, steps.REFERENCE)},
            },
        )  # fmt: skip
        peaks = {steps.SUM: 100, steps.OURS: 800, steps.NARROW: 550, steps.PLAIN: 400, steps.REFERENCE: 1500}
        patch.setattr(
            steps, "memory", lambda tasks, width: {
                "tasks": tasks, "width": width, "row": 100, "largest": 50, "peaks": peaks,
            },
        )  # fmt: skip
        calls: list[str] = []
        saved: list[set[str]] = []
        result = run.run(TINY, progress=calls.append, save=lambda part: saved.append(set(part)))
        assert len(calls) == run.count(TINY, settings.SECTIONS)
        assert [part & set(settings.SECTIONS) for part in saved] == [
            set(settings.SECTIONS[: n + 1]) for n in range(len(settings.SECTIONS))
        ]
    return json.loads(json.dumps(result))  # as it comes back from a file


@pytest.fixture(scope="module")
def page(record: dict) -> dict:
    return merge([record])


# -- timing -----------------------------------------------------------------------------------------------------------


def test_medians_quartiles_and_ratios() -> None:
    order: list[str] = []

    def sleeper(name: str, seconds: float):
        def work() -> None:
            order.append(name)
            time.sleep(seconds)

        return work

    found = timing.interleave({"a": sleeper("a", 1e-3), "b": sleeper("b", 4e-3)}, Effort(0.0, 6, sample=1e-9), "a")
    assert order[6:12] == ["a", "b", "b", "a", "a", "b"]  # after three calls of each to warm up
    assert len(order) == 2 * (3 + 6)
    assert found["a"]["rounds"] == 6
    for entry in found.values():
        assert entry["lower"] <= entry["median"] <= entry["upper"]
    assert found["a"]["lower"] >= 1e-3
    assert found["b"]["lower"] >= 4e-3
    assert "ratio" not in found["a"]
    assert found["b"]["ratio"]["median"] > 1.0


def test_ratios_to_other_contenders_are_taken_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, speed = 0.0, 1.0

    def worker(seconds: float, change: float = 1.0) -> Callable[[], None]:
        def work() -> None:
            nonlocal clock, speed
            clock += seconds * speed
            speed *= change

        return work

    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    works = {"a": worker(1.0), "b": worker(2.0), "c": worker(4.0)}
    found = timing.interleave(works, Effort(0.0, 4), "a", ["b"])
    assert found["c"]["ratio"]["median"] == pytest.approx(4.0)
    assert found["c"]["ratios"]["b"] == pytest.approx({"median": 2.0, "lower": 2.0, "upper": 2.0})
    assert found["a"]["ratios"]["b"]["median"] == pytest.approx(0.5)
    assert "b" not in found["b"]["ratios"]
    less = timing.interleave(works, Effort(0.0, 4), "a", less={"c": "b"})
    assert less["c"]["median"] == pytest.approx(2.0)
    assert less["c"]["ratio"]["median"] == pytest.approx(2.0)
    assert less["b"]["median"] == pytest.approx(2.0)


def test_short_work_is_repeated_within_a_sample() -> None:
    calls = 0

    def work() -> None:
        nonlocal calls
        calls += 1
        time.sleep(1e-3)

    found = timing.interleave({"a": work}, Effort(0.0, 2, sample=1e-2))
    assert calls >= 2 * 3
    assert found["a"]["lower"] >= 1e-3  # of one call, not of a sample


def test_summary_of_known_values() -> None:
    assert timing.summary([5.0, 1.0, 3.0, 2.0, 4.0]) == {"median": 3.0, "lower": 2.0, "upper": 4.0}


def test_power_law_of_synthetic_data() -> None:
    x = [1e3, 1e4, 1e5, 1e6]
    exact = timing.power_law(x, [3.0 * a**1.5 for a in x])
    assert exact is not None
    assert exact["exponent"] == pytest.approx(1.5)
    assert exact["factor"] == pytest.approx(3.0)
    assert exact["error"] == pytest.approx(0.0, abs=1e-9)
    # log y = u + (+d, -d, -d, +d) at u = 0, 1, 2, 3: the slope stays 1, the residuals are d each, S_uu = 5
    noisy = timing.power_law(
        [math.exp(u) for u in range(4)], [math.exp(u + d) for u, d in enumerate([0.1, -0.1, -0.1, 0.1])]
    )
    assert noisy is not None
    assert noisy["exponent"] == pytest.approx(1.0)
    assert noisy["error"] == pytest.approx(math.sqrt(4 * 0.01 / 2 / 5))
    assert timing.power_law([1.0, 2.0, 2.0], [1.0, 2.0, 2.1]) is None


def test_fits_group_cases() -> None:
    cases = [
        {"n": n, "k": k, "times": {"a": {"median": k * n**2}, "b": {"median": n}}} for n in (1, 2, 4) for k in (1, 5)
    ]
    found = {(f["contender"], f["k"]): (f["exponent"], f["factor"]) for f in timing.fits(cases, "n", ("k",))}
    assert found[("a", 5)] == (pytest.approx(2.0), pytest.approx(5.0))
    assert found[("b", 1)] == (pytest.approx(1.0), pytest.approx(1.0))
    assert len(found) == 4


# -- probes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("length", [1, 1000, 200_003])
def test_streams_touch_every_byte(compiled: bool, length: int) -> None:
    probes = Probes(compiled)
    x = torch.randint(0, 100, (3, length), dtype=torch.uint8)
    out = torch.zeros(length, dtype=torch.uint8)
    probes.mix(list(x), out)()
    expected = x[0] ^ x[1] ^ x[2] if probes.kind == "compiled" else x[0] + x[1] + x[2]
    assert torch.equal(out, expected)
    probes.read(list(x))()


@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 8, 10, 16, 40])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", ["gramian", "gramian_pair"])
def test_reading_and_multiplying_makes_the_products_of_a_gramian(
    kernel: str, tasks: int, dtype: str, probes: Probes
) -> None:
    """Ten sums that begin at 0 become 0.999 sum + 1 with each of their multiply-adds: their end counts them."""
    if probes.kind != "compiled":
        pytest.skip("no C compiler")
    lanes = probes.library.probe_fma(None, ctypes.c_int64(1), ctypes.c_int64(1), probes._sink) // 24
    case = kernels.Case(kernel, tasks, 1, dtype, 1)
    vectors = 80  # of each row: so many that every sum has as many multiply-adds
    x = torch.ones(case.inputs, vectors * lanes).view(getattr(torch, dtype))  # 1 in float32
    needed = {"gramian": tasks * (tasks + 1) // 2, "gramian_pair": tasks * (tasks + 1)}[kernel] * x.shape[1] // lanes
    with timing.threads(1):
        found = probes.multiply(list(x), 2 * case.products // case.inputs)()
    assert found == pytest.approx(10 * lanes * (1 - 0.999 ** (needed / 10)) / (1 - 0.999), rel=1e-4)


@pytest.mark.parametrize("length", [1, 5, 70, 1000, 20_003])
@pytest.mark.parametrize("products", [2, 3, 10, 20])
def test_reading_and_multiplying_reads_every_number(length: int, products: int, probes: Probes) -> None:
    if probes.kind != "compiled":
        pytest.skip("no C compiler")
    x = torch.ones(2, length)
    with timing.threads(1):
        work = probes.multiply(list(x), products)
        before = work()
        for place in [(row, i) for row in range(2) for i in {0, 1, length // 3, length // 2, length - 1} if i < length]:
            x[place] = 1e9
            assert work() != before, place
            x[place] = 1.0
        assert work() == before


def test_a_compiler_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    probes = Probes()
    assert probes.kind == "torch"
    assert probes.peak(1, 0.0) > 0
    assert probes.multiply([torch.ones(3)], 2) is None
    assert min(probes.bandwidth(1, 2).values()) > 0


def test_limits_are_within_reason(probes: Probes) -> None:
    with timing.threads(1):
        found = probes.bandwidth(4, 3)
        peak = probes.peak(1, 0.0)
    assert 1e6 < found["read"] < 1e13
    assert 1e6 < found["triad"] < 1e13
    assert 1e6 < peak < 1e12  # of one core


# -- contenders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", kernels.KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_do_what_torch_does(kernel: str, dtype: str, probes: Probes) -> None:
    case = kernels.Case(kernel, 1 if kernel in ("perturb", "copy") else 3, 1000, dtype, 1)
    arena = rows.Arena(case.inputs * 1000, getattr(torch, dtype), 1000)
    _, found = kernels.build(case, arena, probes)
    names = {kernels.FLOOR, kernels.OURS}
    if dtype == "float32":
        names.add(kernels.TORCH)
    if kernel.startswith("gramian") and probes.kind == "compiled":
        names.add(kernels.WORK)
    assert set(found) == names
    ours = found[kernels.OURS]().double().clone()
    if dtype == "float32":
        torch.testing.assert_close(found[kernels.TORCH]().double(), ours, rtol=1e-5, atol=1e-3)
    wide = kernels.Case(kernel, case.tasks, 1000, "float32", 1)
    exact = rows.Arena(arena.count, out=1000)
    exact.numbers.copy_(arena.numbers)
    expected = kernels.build(wide, exact, probes)[1][kernels.TORCH]().double()
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)


def test_traffic_and_operations() -> None:
    pair = kernels.Case("gramian_pair", 3, 100, "bfloat16", 1)
    assert pair.traffic == 6 * 100 * 2
    assert pair.operations == (2 * 12 + 3) * 100  # 12 products and sums, 3 differences
    assert kernels.Case("gramian", 3, 100, "float32", 1).operations == 2 * 6 * 100
    combine = kernels.Case("combine", 3, 100, "float32", 1)
    assert (combine.traffic, combine.operations) == (4 * 100 * 4, 6 * 100)


def test_the_c_interface(probes: Probes) -> None:
    x = rows.Arena(5 * 700_000).rows(5, 200_000)
    pieces = [rows.cut(row, "500 x 400") for row in x]
    core = Core(probes, 3)
    assert torch.equal(core.gramian(pieces[:3])(), _native.gramian(pieces[:3]))
    assert torch.equal(
        core.gramian_pair(pieces[:2], pieces[2:4])(), _native.gramian_pair(pieces[:2], pieces[2:4], cross=False)
    )
    w = torch.tensor([1.0, -2.0], dtype=torch.float64)
    core.combine(pieces[4], pieces[:2], w)()
    torch.testing.assert_close(x[4], x[0] - 2 * x[1])
    with pytest.raises(RuntimeError, match="status -9"):
        core.gramian([[torch.tensor([math.nan])]])()


@pytest.mark.parametrize(("layout", "tensors", "numbers"), [("ResNet-18", 62, 11_689_512), ("ViT", 152, 5_717_416)])
def test_layouts_are_the_published_networks(layout: str, tensors: int, numbers: int) -> None:
    assert len(rows.shapes(layout)) == tensors
    assert rows.numbers(layout) == numbers


def test_arena_rows_differ_and_repeat_nothing_early() -> None:
    arena = rows.Arena(2_500_000)
    x = arena.rows(2, 1_200_000)
    cosine = torch.nn.functional.cosine_similarity(x[0], x[1], dim=0)
    assert abs(float(cosine)) < 0.01
    assert float(x.std()) == pytest.approx(1.0, abs=0.01)
    with pytest.raises(ValueError, match="2500000"):
        arena.rows(3, 1_000_000)
    with pytest.raises(ValueError, match="0 numbers to write"):
        arena.out(1)


def test_timing_a_case_leaves_the_rows_alone(probes: Probes) -> None:
    for kernel in kernels.KERNELS:
        case = kernels.Case(kernel, 2, 1000, "float32", 1)
        arena = rows.Arena(4 * 1000, out=1000)
        before = arena.numbers.clone()
        kernels.measure(case, arena, probes, SHORT)
        assert torch.equal(arena.numbers, before), kernel


TOLERANCE = {contenders.REFERENCE: 1e-6, contenders.TORCHJD: 0.1, contenders.AUTHORS: 0.2, contenders.TORCH: 0.2}


@pytest.mark.parametrize("method", solvers.METHODS)
def test_solvers_agree(method: str) -> None:
    g = solvers.gramian(2)
    found, absent = contenders.solvers(method, 2)
    assert not set(found) & set(absent)
    ours = found[contenders.OURS](g)
    for name, solve in found.items():
        assert solvers.direction_difference(ours, solve(g), g) <= TOLERANCE.get(name, 1e-9), name


@pytest.mark.parametrize("method", ["sum", "pcgrad", "cagrad"])
def test_aggregations_agree(method: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 50, generator=generator)
    x[1] -= x[0]  # in conflict
    found, _ = contenders.aggregations(method, 2)
    if method == "pcgrad" and contenders.versions()[contenders.PYTORCH_OPTIMIZER]["version"]:
        assert contenders.PYTORCH_OPTIMIZER in found
    expected = reference.aggregate(x, method)
    for update in (call(x) for call in found.values()):
        torch.testing.assert_close(update / update.norm(), expected / expected.norm(), rtol=1e-3, atol=1e-4)


def test_direction_difference_of_known_updates() -> None:
    g = torch.eye(2, dtype=torch.float64)
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 2.0])
    assert solvers.direction_difference(a, b, g) == pytest.approx(math.sqrt(2))
    assert solvers.direction_difference(a, 2 * a, g) == 0


def test_what_is_missing_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("torchjd", "torchjd.aggregation", "pytorch_optimizer", "LibMTL", "LibMTL.weighting"):
        monkeypatch.setitem(sys.modules, package, None)
    versions = contenders.versions()
    assert versions["torchjd"]["version"] is None
    assert "torchjd" in versions["torchjd"]["absent"]
    found, absent = contenders.aggregations("pcgrad", 2)
    assert {"torchjd", "pytorch_optimizer"} <= set(absent)
    assert set(found) == {"flatmtl", "reference"}


def test_weightings_of_libmtl_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of LibMTL's interface, whose other parts cannot be imported."""
    package = tmp_path / "LibMTL"
    (package / "weighting").mkdir(parents=True)
    (package / "__init__.py").write_text("import no_such_module\n")
    (package / "weighting" / "__init__.py").write_text(
        "class MGDA:\n"
        "    def init_param(self): pass\n"
        "    def _compute_grad(self, losses, mode, rep_grad=False): raise AssertionError\n"
        "    def backward(self, losses, **options):\n"
        "        assert len(losses) == self.task_num and options['mgda_gn'] == 'none' and not self.rep_grad\n"
        "        self._compute_grad_dim()\n"
        "        self._reset_grad(self._compute_grad(losses, mode='backward').mean(0))\n"
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "LibMTL"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    found, absent = contenders.aggregations("mgda", 3)
    assert contenders.LIBMTL not in absent
    x = torch.randn(3, 5)
    torch.testing.assert_close(found[contenders.LIBMTL](x), x.mean(0))
    assert "LibMTL" not in sys.modules
    monkeypatch.delitem(sys.modules, "LibMTL.weighting")
    assert "NotImplementedError" in contenders.aggregations("ntkmtl", 3)[1][contenders.LIBMTL]


def test_methods_without_a_published_solver_say_so() -> None:
    with pytest.raises(ValueError, match="ntkmtl"):
        _authors.solver("ntkmtl")
    assert contenders.AUTHORS in contenders.solvers("ntkmtl", 2)[1]


# -- steps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["one", "500 x 400"])
def test_ready_rows_are_the_gradients_of_a_step(layout: str) -> None:
    count = 50 if layout == "one" else 200_000
    x = torch.randn(5, count, generator=torch.Generator().manual_seed(0))
    g, s = ([rows.cut(row, layout) for row in half] for half in (x[:2], x[2:4]))
    updates = []
    for optimizer in (steps.flatmtl.FlatMTL, reference.FlatMTL):
        ready = steps.ReadyRows(rows.cut(x[4], layout), g, s if not updates else [[t.clone() for t in r] for r in s])
        wrapped = optimizer(torch.optim.SGD(ready.params, lr=0.0), aggregator="sum", rho=0.05)
        updates.append(torch.cat([t.reshape(-1) for t in ready.step(wrapped)]))
        assert ready.calls == 3
        for p, before in zip(ready.params, rows.cut(x[4], layout), strict=True):
            assert torch.equal(p, before)
    for update in updates:  # SUM g + SUM (s - g)
        torch.testing.assert_close(update, x[2] + x[3], rtol=1e-5, atol=1e-5)


def test_a_real_model_is_stepped() -> None:
    entry = steps.model_step("transformer", 2, 2, 4, Effort(0.0, 1), 1)
    assert set(entry["times"]) == {steps.PASSES, steps.OURS, steps.REFERENCE}
    trained = steps.Trained("ResNet-18", 2, 2, 32)
    assert sum(p.numel() for p in trained.shared) == 11_689_512 - 513_000  # without the classifier
    assert [out.shape for out in trained.model(trained.x)] == [(2, 10), (2, 10)]


def test_long_tables_are_folded() -> None:
    short = report.Table("t", "A title.", ["a"], [["1"]] * report.LONG)
    long = report.Table("t", "A title.", ["a"], [["1"]] * (report.LONG + 1))
    assert short.markdown().startswith("A title.\n\n| a |")
    assert long.markdown().startswith("<details>\n<summary>A title.</summary>\n\n| a |")
    assert long.markdown().endswith("| 1 |\n\n</details>")


def test_batched_options_are_timed() -> None:
    entry = steps.batched_step(2, 8, Effort(0.0, 1), 1)
    assert list(entry["times"]) == ["batched=False", "batched=True", "batched='passes'"]
    (table,) = report._batched({"batched": [entry]})
    assert table.rows[0][:2] == ["2", "8"]
    assert len(table.columns) == len(table.rows[0]) == 7


def test_bare_passes_are_those_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = steps.Trained("transformer", 2, 2, 4)
    backwards: list[int] = []
    original = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (backwards.append(1), original(*a, **k))[1])
    forwards: list[int] = []
    trained.model.register_forward_hook(lambda *_: forwards.append(1))
    trained.bare()
    bare = len(forwards), len(backwards)
    forwards.clear(), backwards.clear()
    trained.optimizer(steps.OURS).step(trained.closure)
    assert (len(forwards), len(backwards)) == bare == (3, 4)


def test_passes_of_ready_rows_are_those_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 50)
    ready = steps.ReadyRows([x[6]], [[row] for row in x[:3]], [[row] for row in x[3:6]])
    backwards: list[int] = []
    original = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (backwards.append(1), original(*a, **k))[1])
    found = []
    for work in (ready.passes, lambda: ready.step(steps.flatmtl.FlatMTL(torch.optim.SGD(ready.params, lr=0.0)))):
        backwards.clear()
        work()
        found.append((ready.calls, len(backwards)))
    assert found == [(4, 6), (4, 6)]


@pytest.mark.slow
def test_peak_memory_in_rows() -> None:
    entry = steps.memory(3, 1024)
    peaks = entry["peaks"]
    if None in peaks.values():
        pytest.skip("no /proc")
    assert entry["row"] == 4 * 4 * (1024 * 1024 + 1024)
    beyond = (peaks[steps.OURS] - peaks[steps.SUM]) / entry["row"]
    assert 2 * 3 - 1.5 <= beyond <= 3 * (2 * 3 + 1)
    narrow = (peaks[steps.NARROW] - peaks[steps.SUM]) / entry["row"]
    assert narrow <= beyond - 1.5  # half of 2K rows, less one that is wide yet, is 2


# -- record, tables, pictures -------------------------------------------------------------------------------------------


def test_record(record: dict) -> None:
    assert record["mode"] == "quick"
    facts = record["machine"]
    assert facts["cores"] >= 1
    assert facts["isa"] in ("base", "avx2", "avx512", "neon")
    assert facts["torch"] == torch.__version__
    assert {case["kernel"] for case in record["kernels"]["cases"]} == set(kernels.KERNELS)
    assert {case["layout"] for case in record["kernels"]["cases"]} == {"one", "500 x 400"}
    assert {case["method"] for case in record["solvers"]["cases"]} == {"mgda", "pcgrad"}
    for section in ("kernels", "aggregation", "steps"):
        assert any(fit["against"] == "numbers" for fit in record[section]["fits"])
    for case in [*record["kernels"]["cases"], *record["solvers"]["cases"], *record["aggregation"]["cases"],
                 *record["steps"]["arithmetic"]]:  # fmt: skip
        for entry in case["times"].values():
            assert 0 < entry["lower"] <= entry["median"] <= entry["upper"]
            assert entry["rounds"] >= 3
    for case in record["solvers"]["cases"]:
        assert case["times"]["reference"]["difference"] < 1e-6


def test_tables(page: dict) -> None:
    found = report.tables(page)
    assert {table.name for table in found} == {
        "machine", "targets", "kernels", "layouts", "solvers", "aggregation", "arithmetic", "models", "batched",
        "memory", "growth",
    }  # fmt: skip
    for table in found:
        assert table.rows
        assert all(len(row) == len(table.columns) for row in table.rows), table.name
        assert all(isinstance(cell, str) for row in table.rows for cell in row)
    targets = {row[0]: row for table in found if table.name == "targets" for row in table.rows}
    memory = targets["peak memory in rows, flatmtl"]
    assert memory[2] == "7.00"
    narrow = targets["peak memory in rows, flatmtl, rows_dtype = bfloat16"]
    assert narrow[1:3] == ["<= 10005.00", "4.50"]
    assert targets["step / forwards and backwards, transformer, 3 heads"][2] == "2.000"
    if page["runs"][0]["probes"] == "compiled":
        kernel_rows = next(table for table in found if table.name == "kernels").rows
        assert {row[0] for row in kernel_rows if row[-2]} == {"gramian", "gramian_pair"}
        assert {"Gramian, K <= 10, float32 / read and multiply"} <= set(targets)


def test_targets_on_made_up_numbers() -> None:
    entry = {"median": 2.0, "lower": 2.0, "upper": 2.0, "ratio": timing.summary([1.5])}
    case = {"kernel": "gramian", "tasks": 16, "numbers": 10, "dtype": "float32", "layout": "one", "operations": 100,
            "bytes": 1, "threads": 1, "peak": 100.0}  # fmt: skip

    def ours(ratio: float) -> dict:
        return {kernels.OURS: {**entry, "ratios": {kernels.WORK: timing.summary([ratio])}}}

    section = {
        "cases": [
            {**case, "times": ours(1.25)},
            {**case, "threads": 2, "peak": 200.0, "times": {kernels.OURS: {**entry, "median": 3.0}}},
            {**case, "tasks": 3, "times": ours(1.0)},
            {**case, "tasks": 10, "times": ours(1.5)},
            {**case, "kernel": "gramian_pair", "tasks": 10, "times": ours(1.75)},
        ],
    }
    (table,) = report.targets({"kernels": section}, report.Table)
    rows_ = {row[0]: row[2:] for row in table.rows}
    assert rows_["Gramian of 16 rows or more, float32, share of the FMA peak"] == ["33 %", "50 % - 17 %", "2"]
    assert rows_["Gramian, K >= 16, float32 / read and multiply"] == ["1.25", "1.25 - 1.25", "1"]
    assert rows_["Gramian, K <= 10, float32 / read and multiply"] == ["1.25", "1.00 - 1.50", "2"]
    assert rows_["Gramian of g and f, K <= 10, float32 / read and multiply"] == ["1.75", "1.75 - 1.75", "1"]
    assert "Gramian of g and f, K >= 16, float32 / read and multiply" not in rows_
    assert rows_["all threads / one thread, any kernel"] == ["1.50", "1.50 - 1.50", "1"]
    assert rows_["Gramian of at most 10 rows, float32 / reading them"] == ["1.50", "1.50 - 1.50", "2"]


def test_a_busy_machine_is_said(record: dict) -> None:
    facts = record["machine"]
    for load, said in ((0.9, False), (1.1, True), (None, False)):
        text = report.busy(merge([{**record, "machine": {**facts, "cores": 2, "load": load}}]))
        assert (text is not None) == said
    assert "unknown" in report.tables(merge([{**record, "machine": {**facts, "load": None}}]))[0].rows[3][1]


def _with(record: dict, sections: dict, **facts: object) -> dict:
    """The record with these sections alone."""
    rest = {name: value for name, value in record.items() if name not in settings.SECTIONS}
    return {**rest, **sections, "machine": {**record["machine"], **facts}}


def test_of_several_records_the_last_that_has_a_part_gives_it(record: dict) -> None:
    kernel_cases = record["kernels"]["cases"]
    narrow = [{**case, "dtype": "bfloat16", "operations": 7} for case in kernel_cases if case["layout"] == "one"]
    memory = [{**entry, "row": 1000} for entry in record["steps"]["memory"]]
    limits = [{**limit, "peak": 3 * limit["peak"], "read": 5e9} for limit in record["limits"]]
    first = _with(record, {name: record[name] for name in settings.SECTIONS}, load=0.0)
    second = {
        **_with(record, {"kernels": {"cases": narrow}}, load=7.0, date="2001-02-03"), "limits": limits, "seconds": 600,
    }  # fmt: skip
    third = _with(record, {"steps": {"memory": memory, "models": []}, "solvers": {"cases": []}}, load=0.25)
    page = merge([first, second, third])
    assert [run["parts"] for run in page["runs"]] == [
        ["kernels.float32", "kernels.layouts", "aggregation", "steps.arithmetic", "steps.models", "steps.batched"],
        ["kernels.bfloat16"], ["solvers", "steps.memory"],
    ]  # fmt: skip
    assert page["steps"]["memory"] == memory
    assert page["steps"]["models"] == record["steps"]["models"]
    assert page["solvers"] == {"cases": []}
    peak = record["limits"][0]["peak"]
    for case in page["kernels"]["cases"]:
        assert case["peak"] == (3 * peak if case["dtype"] == "bfloat16" else peak)
        assert (case["operations"] == 7) == (case["dtype"] == "bfloat16")
    assert len(page["kernels"]["cases"]) == len(kernel_cases) + len(narrow)
    assert len(page["kernels"]["fits"]) == 2 * len(record["kernels"]["fits"])
    assert page["steps"]["fits"] == record["steps"]["fits"]
    rows_ = dict(report.tables(page)[0].rows)
    assert rows_["run 2: kernels.bfloat16"] == "quick, 2001-02-03, 10 min, load before 7.0"
    assert rows_["run 2, 1 thread"].startswith("read 5.0 GB/s")
    assert rows_["run 3: solvers, steps.memory"].endswith("load before 0.2")
    assert rows_["run 1, 1 thread"] == rows_["run 3, 1 thread"] != rows_["run 2, 1 thread"]
    said = report.busy(page)
    assert said is not None
    assert "7.0 before kernels.bfloat16 on" in said
    assert merge([second, first])["runs"][1]["parts"][0] == "kernels.float32"
    assert merge([third, first])["runs"] == merge([first])["runs"]  # nothing of it is left


def test_limits_that_a_record_keeps_with_its_kernels(record: dict) -> None:
    old = {name: value for name, value in record.items() if name not in ("limits", "probes")}
    old["kernels"] = {**record["kernels"], "limits": record["limits"], "probes": record["probes"]}
    assert merge([old]) == merge([record])


@pytest.mark.parametrize(
    "name", ["cpu", "cores", "threads", "system", "isa", "torch_isa", "python", "torch", "flatmtl"]
)
def test_records_of_different_machines_are_refused(name: str, record: dict) -> None:
    text = re.escape(f": {name} is {record['machine'][name]} and other")
    with pytest.raises(ValueError, match=f"^records 1 and 3 .*{text}$"):
        merge([record, record, _with(record, {}, **{name: "other"})])


def test_records_of_different_contenders_are_refused(record: dict) -> None:
    theirs = {**record["contenders"], "torchjd": {"version": "0.0.1"}}
    with pytest.raises(ValueError, match=r"torchjd is .* and 0\.0\.1"):
        merge([record, {**record, "contenders": theirs}])


def test_cells() -> None:
    assert [report.seconds(x) for x in (12.345, 0.0123, 1.5e-6, 2e-9)] == ["12.3 s", "12.3 ms", "1.50 µs", "2 ns"]
    assert report.spread({"median": 1.0, "lower": 0.5, "upper": 250.0}, report.ratio) == "1.00 (0.50 - 250)"


def test_tables_go_between_their_markers() -> None:
    table = report.Table("memory", "Title.", ["", "a"], [["x", "1 | 2"]])
    text = (
        "before\n<!-- bench: memory -->\nold\n<!-- bench: end -->\n<!-- bench: growth -->\nkept\n<!-- bench: end -->\n"
    )
    new = report.into(text, [table])
    assert "old" not in new
    assert "| x | 1 \\| 2 |" in new
    assert "kept" in new
    assert report.into(new, [table]) == new
    with pytest.raises(ValueError, match="markers"):
        report.into("no markers", [table])


def test_docs_have_a_place_for_every_table(page: dict) -> None:
    text = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    for table in report.tables(page):
        assert f"<!-- bench: {table.name} -->" in text
    report.into(text, report.tables(page))


def test_pictures(page: dict, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    few = [case for case in page["kernels"]["cases"] if case["kernel"] in ("gramian", "copy")]  # drawing takes time
    written = {
        path.name for path in plots.draw({**page, "kernels": {**page["kernels"], "cases": few}}, tmp_path / "new")
    }
    names = ("kernels_p", "kernels_k", "roofline", "solvers", "aggregation", "step")
    assert written == {f"bench_{name}.png" for name in names}
    for path in (tmp_path / "new").iterdir():
        assert path.read_bytes()[:4] == b"\x89PNG"
    assert plots.draw({}, tmp_path / "empty") == []


def test_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(settings.MODES, "quick", TINY)
    monkeypatch.setattr(solvers, "METHODS", ("mgda",))
    file, page = tmp_path / "record.json", tmp_path / "page.md"
    result = CliRunner().invoke(app, ["bench", "--quick", "--what", "solvers", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "A solve on a ready Gramian" in result.output
    record = json.loads(file.read_text())
    assert "kernels" not in record
    page.write_text("<!-- bench: solvers -->\n<!-- bench: end -->\n")
    result = CliRunner().invoke(app, ["bench-report", str(file), "--docs", str(page)])
    assert result.exit_code == 0, result.output
    assert "| mgda | 2 |" in page.read_text()
    monkeypatch.setattr(steps, "memory", lambda tasks, width: {
        "tasks": tasks, "width": width, "row": 100, "largest": 50, "peaks": {steps.SUM: None}})  # fmt: skip
    other = tmp_path / "other.json"
    what = ["--what", "kernels.layouts", "--what", "steps.memory"]
    monkeypatch.setattr(rows, "LAYOUTS", ("one", "500 x 400"))
    result = CliRunner().invoke(app, ["bench", "--quick", *what, "--json", str(other)])
    assert result.exit_code == 0, result.output
    found = json.loads(other.read_text())
    assert {case["layout"] for case in found["kernels"]["cases"]} == {"500 x 400"}
    assert set(found["steps"]) == {"memory", "fits"}
    result = CliRunner().invoke(app, ["bench-report", str(file), str(other)])
    assert result.exit_code == 0, result.output
    for text in ("run 1: solvers", "run 2: kernels.layouts, steps.memory", "A solve on a ready Gramian", "500 x 400"):
        assert text in result.output
    other.write_text(json.dumps({**found, "machine": {**found["machine"], "cpu": "another"}}))
    result = CliRunner().invoke(app, ["bench-report", str(file), str(other)])
    assert result.exit_code == 2
    assert "another" in result.output
    result = CliRunner().invoke(app, ["bench", "--quick", "--what", "kernels.bfloat16"])
    assert result.exit_code == 2
    assert "bfloat16" in result.output
    assert CliRunner().invoke(app, ["bench", "--quick", "--full"]).exit_code == 2
    assert CliRunner().invoke(app, ["bench", "--what", "everything"]).exit_code == 2
    with pytest.raises(ValueError, match="everything"):
        run.run(TINY, ["everything"])


def test_names_of_sections_and_their_parts() -> None:
    assert settings.chosen(["steps.memory", "kernels", "steps.models"]) == {
        "kernels": ("float32", "bfloat16", "layouts"), "steps": ("models", "memory"),
    }  # fmt: skip
    assert settings.chosen(["solvers"]) == {"solvers": ()}
    assert set(settings.chosen(settings.SECTIONS)) == set(settings.SECTIONS)
    for name in ("memory", "solvers.", "steps.kernels"):
        with pytest.raises(ValueError, match=name):
            settings.chosen([name])
    for section in settings.SECTIONS:  # the parts of a section are all of it
        names = [f"{section}.{part}" for part in settings.PARTS[section]] or [section]
        fixed = len(kernels.counts(settings.DEFAULT))
        assert sum(run.count(settings.DEFAULT, [name]) - fixed for name in names) == (
            run.count(settings.DEFAULT, [section]) - fixed
        )


def test_a_full_run_makes_nine_rounds_of_every_model(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[int] = []
    monkeypatch.setattr(steps, "model_step", lambda *arguments: rounds.append(arguments[4].rounds))
    for part, work in steps.plan(settings.FULL, ("models",)):
        assert part == "models"
        work(None)
    assert rounds == [9, 9, 9]


def test_probe_source_has_no_warnings() -> None:
    source = Path(kernels.__file__).with_name("probe.c")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    command = [compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-c", str(source), "-o", "/dev/null"]
    subprocess.run(command, check=True)
