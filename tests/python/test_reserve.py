"""The memory of a step's copy of the parameters: used again, but never while somebody has it."""

import copy
import pickle

import flatmtl
import pytest
import torch
from flatmtl._reserve import LEAST, Reserve

SIDE = 600  # squared, times 4 bytes: above LEAST


@pytest.fixture
def training():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(SIDE, SIDE))
    optimizer = flatmtl.FlatMTL(torch.optim.SGD([weight], lr=0.1))
    x = torch.randn(2, SIDE, SIDE)

    def closure():
        return [(weight * x[0]).square().mean(), (weight - x[1]).square().mean()]

    return weight, optimizer, closure


def places(training, steps, after=lambda weight: None):
    weight, optimizer, closure = training
    found = []
    for _ in range(steps):
        optimizer.step(closure)
        found.append(weight.grad.data_ptr())
        after(weight)
    return found


def test_two_places_in_turn(training):
    found = places(training, 6)
    assert found[0] != found[1]
    assert found == found[:2] * 3


def test_one_place_where_gradients_are_let_go_of(training):
    assert len(set(places(training, 4, lambda weight: setattr(weight, "grad", None)))) == 1


@pytest.mark.parametrize(
    "hold", [lambda g: g, lambda g: g.view(-1)[5:], lambda g: g.numpy(), lambda g: g.untyped_storage(), torch.clone],
    ids=["tensor", "view", "numpy", "storage", "clone"],
)  # fmt: skip
def test_gradients_that_somebody_keeps_stay_as_they_are(training, hold):
    held, values = [], []

    def after(weight):
        held.append(hold(weight.grad))
        values.append(weight.grad.clone())
        weight.grad = None

    found = places(training, 5, after)
    assert (len(set(found)) == 1) == (hold is torch.clone)
    for thing, value in zip(held, values, strict=True):
        if isinstance(thing, torch.UntypedStorage):
            thing = torch.empty(0).set_(thing, 0, value.shape, value.stride())
        flat = torch.as_tensor(thing).reshape(-1)
        assert torch.equal(flat, value.reshape(-1)[-len(flat) :])


def test_a_graph_that_saved_the_gradient(training):
    """As in a penalty on the gradient: what autograd has saved is kept, though no name is left."""
    weight, optimizer, closure = training
    optimizer.step(closure)
    factor = torch.ones(SIDE, SIDE, requires_grad=True)
    product, expected = (factor * weight.grad).sum(), weight.grad.clone()
    weight.grad = None
    for _ in range(3):
        optimizer.step(closure)
        weight.grad = None
    assert torch.equal(torch.autograd.grad(product, factor)[0], expected)


def test_a_step_that_fails_leaves_the_gradient(training):
    weight, optimizer, closure = training
    for _ in range(3):
        optimizer.step(closure)
    before, theta = weight.grad.clone(), weight.detach().clone()

    def failing():
        losses = closure()
        failing.calls += 1
        if failing.calls > 1:
            raise KeyError("in a perturbed pass")
        return losses

    failing.calls = 0
    for _ in range(2):
        failing.calls = 0
        with pytest.raises(KeyError):
            optimizer.step(failing)
        assert torch.equal(weight.grad, before)
        assert torch.equal(weight, theta)
    places(training, 2)


def test_the_same_bits_as_fresh_memory(training, monkeypatch):
    weight, _, _ = training
    theta = weight.detach().clone()
    places(training, 4)
    found = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(theta)
    monkeypatch.setattr("flatmtl._reserve._use_count", None)
    monkeypatch.setattr(weight, "grad", None)
    places(training, 4)
    assert torch.equal(weight, found)


class TestReserve:
    def test_small_parameters_and_other_devices(self):
        reserve = Reserve()
        small = torch.zeros(LEAST // 4 - 1)
        assert reserve.empty_like(0, small).untyped_storage().nbytes() == small.nbytes
        assert reserve.empty_like(0, torch.zeros(LEAST, device="meta")).device.type == "meta"
        assert not reserve._kept

    @pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last", "expanded"])
    def test_layouts(self, layout):
        like = {
            "contiguous": torch.zeros(4, 64, 40, 40),
            "transposed": torch.zeros(1000, 500).T,
            "channels_last": torch.zeros(4, 64, 40, 40).to(memory_format=torch.channels_last),
            "expanded": torch.zeros(1, 1000).expand(500, 1000),
        }[layout]
        reserve, expected = Reserve(), torch.empty_like(like)
        places = set()
        for _ in range(3):
            found = reserve.empty_like(3, like)
            assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)
            places.add(found.data_ptr())
            del found
        assert len(places) == 1

    def test_another_layout_or_dtype_takes_new_memory(self):
        reserve = Reserve()
        for like in (
            torch.zeros(600, 600),
            torch.zeros(600, 600).T[:, :599],
            torch.zeros(600, 600, dtype=torch.double),
        ):
            found = reserve.empty_like(0, like)
            assert (found.shape, found.dtype) == (like.shape, like.dtype)
            assert len(reserve._kept[0]) == 1  # what does not fit any more is given back

    def test_no_more_than_two_are_kept(self):
        reserve, like = Reserve(), torch.zeros(600, 600)
        held = [reserve.empty_like(0, like) for _ in range(5)]
        assert len({t.data_ptr() for t in held}) == 5
        assert len(reserve._kept[0]) == 2

    def test_copies_start_without(self, training):
        _, optimizer, _ = training
        places(training, 2)
        assert optimizer._reserve._kept
        for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert not other._reserve._kept

    def test_nothing_is_kept_where_torch_does_not_count(self, monkeypatch):
        monkeypatch.setattr("flatmtl._reserve._use_count", None)
        reserve = Reserve()
        assert reserve.empty_like(0, torch.zeros(600, 600)).shape == (600, 600)
        assert not reserve._kept

    def test_memory_shared_with_a_process_is_not_used_again(self):
        reserve, like = Reserve(), torch.zeros(600, 600)
        place = reserve.empty_like(0, like).share_memory_().data_ptr()
        assert reserve.empty_like(0, like).data_ptr() != place
