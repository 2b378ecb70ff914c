"""The device-generic backend against the native one, and against numpy; on the CPU, and on CUDA where there is one."""

import flatmtl
import gradients
import numpy as np
import pytest
import torch
from flatmtl import _generic, _native
from gradients import DTYPES, assert_gramian, matrix, random_row, random_rows

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
WEIGHTS = torch.tensor([0.5, -2.0, 1.0]).double()


def to(rows, device):
    return [[x.to(device) for x in row] for row in rows]


def assert_close(generic, native, tolerance=1e-12):
    """Equal up to rounding in float64, relative to the largest entry."""
    assert generic.device.type == "cpu"
    assert generic.dtype == torch.float64
    assert (generic - native).abs().max() <= tolerance * native.abs().max()


def assert_rows(generic, native):
    for a, b in zip(generic, native, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.cpu(), b, rtol=1.5 * torch.finfo(b.dtype).eps, atol=1e-12)


@pytest.fixture(params=[_generic.PIECE, 7], ids=["whole", "pieces"])
def piece(request, monkeypatch):
    monkeypatch.setattr(_generic, "PIECE", request.param)


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
class TestAgainstNative:
    def test_inner_products(self, dtype, device):
        g, s, params = random_rows(3, 1, dtype), random_rows(3, 2, dtype), random_row(3, dtype)
        dg, ds, dparams = to(g, device), to(s, device), to([params], device)[0]
        assert_close(_generic.gramian(dg), _native.gramian(g))
        assert_close(_generic.gramian_pair(dg, ds), _native.gramian_pair(g, s))
        assert_close(_generic.gramian_pair(dg, ds, cross=False), _native.gramian_pair(g, s, cross=False))
        assert_close(_generic.sq_norms(dg), _native.sq_norms(g))
        assert_close(_generic.sq_norms(dg, dparams, 0.25), _native.sq_norms(g, params, 0.25))

    def test_sums(self, dtype, device):
        g, s, out = random_rows(3, 1, dtype), random_rows(3, 2, dtype), random_row(3, dtype)
        device_out = [x.to(device).clone() for x in out]
        _generic.combine_(device_out, to(g, device), WEIGHTS)
        _native.combine_(out, g, WEIGHTS)
        assert_rows(device_out, out)
        _generic.combine_pair_(device_out, to(g, device), to(s, device), WEIGHTS, WEIGHTS.flip(0))
        _native.combine_pair_(out, g, s, WEIGHTS, WEIGHTS.flip(0))
        assert_rows(device_out, out)

    @pytest.mark.parametrize("adaptive", [False, True])
    def test_perturb_and_copy(self, dtype, device, adaptive):
        params, saved, grads = (random_row(seed, dtype) for seed in (1, 2, 3))
        device_params = [x.to(device).clone() for x in params]
        device_saved, device_grads = to([saved, grads], device)
        scale = [0.5, -0.25, 1.0, 3.0, 0.0, 0.125]
        _generic.perturb_(device_params, device_saved, device_grads, scale, adaptive, 0.25)
        _native.perturb_(params, saved, grads, scale, adaptive, 0.25)
        assert_rows(device_params, params)
        _generic.copy_(device_params, device_saved)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(device_params, saved, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flat_gradients_are_rounded_as_the_core_rounds_them(dtype):
    g = random_rows(3, 1, dtype)
    s = [[x + 1e-2 * torch.randn_like(x) for x in row] for row in g]
    expected = np.concatenate([matrix(g), gradients.differences(g, s)])
    assert_gramian(_generic.gramian_pair(g, s), expected)


def test_layouts():
    g = [torch.randn(3, 4), torch.randn(4, 3).t(), torch.randn(3, 8)[:, ::2], torch.ones(1, 4).expand(3, 4)]
    rows = [[x] for x in g]
    assert_gramian(_generic.gramian(rows), matrix(rows))
    base = torch.zeros(3, 8)
    _generic.combine_([base[:, ::2]], rows, torch.ones(4))
    torch.testing.assert_close(base[:, ::2], sum(g))
    assert not base[:, 1::2].any()


def test_no_segments():
    assert _generic.gramian([[], []]).tolist() == [[0, 0], [0, 0]]
    assert _generic.gramian_pair([[]], [[]]).shape == (2, 2)
    assert _generic.sq_norms([[], []], []).tolist() == [0, 0]
    _generic.combine_([], [[], []], torch.ones(2))
    _generic.combine_pair_([], [[]], [[]], torch.ones(1), torch.ones(1))
    _generic.perturb_([], [], [], [], True, 0.0)
    _generic.copy_([], [])


def test_inf_and_nan_show():
    rows = random_rows(3)
    rows[1][0][2] = torch.inf
    assert not torch.isfinite(_generic.gramian(rows)[1, 1])
    assert torch.isfinite(_generic.sq_norms(rows)).tolist() == [True, False, True]


def test_writes_are_seen_by_autograd():
    p = torch.ones(3, requires_grad=True)
    loss = (p * p).sum()
    _generic.perturb_([p], [torch.zeros(3)], [torch.ones(3)], [1.0], False, 0.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_device_without_float64_says_so(monkeypatch):
    _generic._has_float64.cache_clear()
    with pytest.warns(UserWarning, match="mps has no float64"):
        assert not _generic._has_float64("mps")
    assert _generic._has_float64("cuda")
    monkeypatch.setattr(_generic, "_has_float64", lambda device: False)
    rows = random_rows(3)
    assert_gramian(_generic.gramian(rows), matrix(rows), 1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_functions_on_cuda(dtype):
    rows = random_rows(3, dtype=dtype)
    device_rows = to(rows, "cuda")
    assert_close(flatmtl.gramian(device_rows), flatmtl.gramian(rows))
    out = flatmtl.aggregate(device_rows, "cagrad")
    assert all(x.is_cuda for x in out)
    assert_rows(out, flatmtl.aggregate(rows, "cagrad"))
