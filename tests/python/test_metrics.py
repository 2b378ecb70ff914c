"""Metrics against published tables, scikit-learn, plain loops and closed forms."""

import math

import flatmtl
import pytest
import torch
from flatmtl.metrics import brier_score, calibration_bins, delta_m, expected_calibration_error, predictive_entropy

# mIoU, pixel accuracy, absolute and relative depth error, mean and median angle, share within 11.25, 22.5 and 30 degrees
NYU_UP = [True, True, False, False, False, False, True, True, True]
NYU_STL = [38.30, 63.76, 0.6754, 0.2780, 25.01, 19.21, 30.14, 57.20, 69.15]
NYU = {  # tables 3 and 7 of 2211.13723
    "MGDA": ([30.47, 59.90, 0.6070, 0.2555, 24.88, 19.45, 29.18, 56.88, 69.36], 1.38),
    "F-MGDA": ([26.42, 58.78, 0.6078, 0.2353, 24.34, 18.45, 31.64, 58.86, 70.50], -0.33),
    "PCGrad": ([38.06, 64.64, 0.5550, 0.2325, 27.41, 22.80, 23.86, 49.83, 63.14], 3.97),
    "F-PCGrad": ([40.05, 65.42, 0.5429, 0.2243, 27.38, 23.00, 23.47, 49.35, 62.74], 3.14),
    "CAGrad": ([39.79, 65.49, 0.5486, 0.2250, 26.31, 21.58, 25.61, 52.36, 65.58], 0.20),
    "F-CAGrad": ([40.93, 66.68, 0.5285, 0.2162, 25.43, 20.39, 27.99, 54.82, 67.56], -3.78),
    "F-IMTL": ([40.42, 65.61, 0.5389, 0.2121, 25.03, 19.75, 28.90, 56.19, 68.72], -4.77),
    "F-STL": ([39.07, 64.21, 0.6183, 0.2514, 25.08, 18.72, 30.99, 58.29, 69.76], -3.17),
    "F-LS": ([40.28, 65.30, 0.5360, 0.2173, 27.14, 22.56, 24.45, 50.29, 63.57], 1.65),
}
# mIoU, pixel accuracy, absolute and relative depth error; the last digit of .0125 alone is worth 0.2 points of Δm
CITY_UP, CITY_STL = [True, True, False, False], [74.01, 93.16, 0.0125, 27.77]
CITY = {  # tables 4 and 5
    "MGDA": ([68.84, 91.54, 0.0309, 33.50], 44.14),
    "F-MGDA": ([73.77, 93.12, 0.0129, 27.44], 0.67),
    "PCGrad": ([75.13, 93.48, 0.0154, 42.07], 18.29),
    "F-PCGrad": ([75.77, 93.67, 0.0144, 39.60], 13.65),
    "CAGrad": ([75.16, 93.48, 0.0141, 37.60], 11.64),
    "F-CAGrad": ([76.02, 93.72, 0.0134, 34.64], 7.25),
    "IMTL": ([75.33, 93.49, 0.0135, 38.41], 11.10),
    "F-IMTL": ([76.63, 93.76, 0.0124, 31.17], 1.87),
    "LS": ([75.18, 93.49, 0.0155, 46.77], 22.60),
    "F-LS": ([74.99, 93.52, 0.0147, 41.32], 16.10),
    "direct": ([68.93, 91.41, 0.0130, 31.37], 6.43),
}


@pytest.mark.parametrize("method", NYU)
def test_delta_m_gives_the_published_nyuv2_rows(method):
    row, published = NYU[method]
    assert delta_m(row, NYU_STL, NYU_UP).item() == pytest.approx(published, abs=0.011)


@pytest.mark.parametrize("method", CITY)
def test_delta_m_gives_the_published_cityscapes_rows(method):
    row, published = CITY[method]
    # The table's Δm is of unrounded metrics (of ten epochs): rounding to 0.0001 alone may move it by this much.
    rounding = sum(100 * (half / s) for half, s in zip([0.005, 0.005, 5e-5, 0.005], CITY_STL, strict=True)) / 4
    assert delta_m(row, CITY_STL, CITY_UP).item() == pytest.approx(published, abs=0.005 + rounding)


def test_imtl_row_of_nyuv2_differs_from_what_its_metrics_give():
    # -0.76 is printed, from Nash-MTL's table on; the metrics printed beside it give -0.60.
    row = [39.35, 65.60, 0.5426, 0.2256, 26.02, 21.19, 26.2, 53.13, 66.24]
    assert delta_m(row, NYU_STL, NYU_UP).item() == pytest.approx(-0.60, abs=0.005)


def test_delta_m_sign_batch_and_mean_over_tasks():
    up, base = [True, False, False], [50.0, 2.0, 4.0]
    assert delta_m(base, base, up).item() == 0.0
    assert delta_m([55.0, 2.0, 4.0], base, up).item() == pytest.approx(-10 / 3)  # a higher accuracy is a gain
    assert delta_m([50.0, 2.2, 4.0], base, up).item() == pytest.approx(10 / 3)  # a higher error is a loss
    rows = torch.tensor([[55.0, 2.0, 4.0], [50.0, 2.2, 4.4]])
    assert delta_m(rows, base, up).tolist() == pytest.approx([-10 / 3, 20 / 3], abs=1e-5)
    # Metrics 1 and 2 are one task: ((-10) + (10 + 20) / 2) / 2 instead of (-10 + 10 + 20) / 3.
    both = [55.0, 2.2, 4.8]
    assert delta_m(both, base, up).item() == pytest.approx(20 / 3)
    assert delta_m(both, base, up, tasks=[0, 1, 1]).item() == pytest.approx(2.5)
    assert flatmtl.metrics.delta_m is delta_m


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], [1.0, 0.0], [True, False]), r"baseline\[1\] is 0.0, but must be positive"),
        (([1.0, math.nan], [1.0, 1.0], [True, False]), r"values\[1\] is nan"),
        (([1.0], [1.0, 1.0], [True, False]), r"values must have as many metrics .* \(2\), but has shape \(1,\)"),
        (([1.0, 2.0], [1.0], [True, False]), r"baseline must have"),
        (([], [], []), "higher_is_better is empty"),
    ],
)
def test_delta_m_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        delta_m(*arguments)


def random_predictions(seed, shape, classes, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(*shape, classes, generator=g, dtype=dtype)
    return logits.softmax(-1), torch.randint(classes, shape, generator=g)


def loop_ece(p, y, bins):
    """The definition, one prediction after the other."""
    inside = [[] for _ in range(bins)]
    for row, target in zip(p.tolist(), y.tolist(), strict=True):
        confidence = max(row)
        for b in range(bins):
            if b / bins < confidence <= (b + 1) / bins:
                inside[b].append((row.index(confidence) == target, confidence))
    total = 0.0
    for members in inside:
        if members:
            accuracy = sum(right for right, _ in members) / len(members)
            total += len(members) / len(p) * abs(accuracy - sum(c for _, c in members) / len(members))
    return total


@pytest.mark.parametrize("bins", [1, 7, 10, 15])
def test_ece_is_the_definitions(bins):
    p, y = random_predictions(bins, (2, 3, 211), 4)
    ece = expected_calibration_error(p, y, bins)
    assert ece.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            assert ece[i, j].item() == pytest.approx(loop_ece(p[i, j], y[i, j], bins), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bins_are_closed_on_the_right(dtype):
    # One prediction on every edge k/10 that a largest of ten probabilities can have.
    edges = [k / 10 for k in range(2, 11)]
    rows = [[e] + [(1 - e) / 9] * 9 for e in edges]
    p, y = torch.tensor(rows, dtype=dtype), torch.zeros(len(edges), dtype=torch.long)
    bins = calibration_bins(p, y)
    assert bins.counts.tolist() == [0] + [1] * 9
    assert bins.confidence[1:].tolist() == pytest.approx(edges, abs=1e-6)
    assert bins.accuracy[1:].tolist() == [1.0] * 9
    assert math.isnan(bins.accuracy[0])


def test_ece_closed_forms():
    # 100 predictions of confidence 0.75, 60 of them right
    p = torch.tensor([[0.75, 0.25]]).expand(100, 2)
    y = (torch.arange(100) >= 60).long()
    assert expected_calibration_error(p, y).item() == pytest.approx(0.15)
    certain = torch.eye(3)[[0, 1, 2, 0]]
    assert expected_calibration_error(certain, torch.tensor([0, 1, 2, 0])).item() == 0.0
    assert expected_calibration_error(certain, torch.tensor([1, 2, 0, 1])).item() == 1.0


def test_brier_score_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    for classes in (2, 5):
        p, y = random_predictions(classes, (97,), classes)
        expected = ((p - torch.eye(classes)[y]) ** 2).sum(-1).mean().item()
        assert brier_score(p, y).item() == pytest.approx(expected, abs=1e-14)
        if classes == 2:
            assert brier_score(p, y).item() == pytest.approx(2 * metrics.brier_score_loss(y, p[:, 1]), abs=1e-14)
    assert brier_score(torch.eye(4), torch.arange(4)).item() == 0.0
    assert brier_score(torch.eye(4), (torch.arange(4) + 1) % 4).item() == 2.0
    batch = random_predictions(1, (3, 50), 4)
    assert brier_score(*batch).tolist() == [brier_score(p, y).item() for p, y in zip(*batch, strict=True)]


def test_predictive_entropy():
    stats = pytest.importorskip("scipy.stats")
    p, _ = random_predictions(0, (4, 30), 6)
    torch.testing.assert_close(predictive_entropy(p), torch.from_numpy(stats.entropy(p.numpy(), axis=-1)))
    assert predictive_entropy(torch.eye(5)).tolist() == [0.0] * 5  # 0 ln 0 = 0
    assert predictive_entropy(torch.full((8,), 0.125)).item() == pytest.approx(math.log(8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reduced_precision_is_taken(dtype):
    p, y = random_predictions(3, (500,), 10, torch.float32)
    for metric in (expected_calibration_error, brier_score):
        assert metric(p.to(dtype), y).item() == pytest.approx(metric(p, y).item(), abs=0.02)


@pytest.mark.parametrize("metric", [expected_calibration_error, brier_score, calibration_bins])
def test_bad_input_is_named(metric):
    p, y = random_predictions(0, (2, 5), 3)
    with pytest.raises(ValueError, match=r"probabilities\[0, 0, \d\] is .*softmax"):
        metric(10 * p + 5, y)
    with pytest.raises(ValueError, match=r"probabilities\[1, 2\] sum to 0.5.*must sum to 1"):
        metric(torch.cat([p[:1], torch.stack([torch.cat([p[1, :2], 0.5 * p[1, 2:3], p[1, 3:]])])]), y)
    with pytest.raises(ValueError, match=r"probabilities\[0, 0, 0\] is nan"):
        metric(torch.full_like(p, math.nan), y)
    with pytest.raises(ValueError, match=r"target\[0, 0\] is 3, but there are 3 classes"):
        metric(p, torch.full_like(y, 3))
    with pytest.raises(TypeError, match=r"target must be a tensor of integer classes, but is torch.float32"):
        metric(p, y.float())
    with pytest.raises(TypeError, match=r"probabilities must be a floating-point tensor, but is torch.int64"):
        metric(y, y)
    with pytest.raises(ValueError, match=r"shapes \(2, 5, 3\) and \(5,\)"):
        metric(p, y[0])
    with pytest.raises(ValueError, match="target is empty"):
        metric(p[:, :0], y[:, :0])


def test_bins_are_checked():
    p, y = random_predictions(0, (5,), 3)
    with pytest.raises(ValueError, match="bins must be an integer >= 1, but is 0"):
        expected_calibration_error(p, y, bins=0)
