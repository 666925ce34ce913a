"""Calibration errors by loops over bins, and of intervals by the definition; ties in any order."""
import itertools
import math

import numpy as np
import pytest
import torch

from helpers import normal, seeded
from symbnn.equivariance.calibration import interval_error, over_ties, reliability
from symbnn.equivariance.metrics import adaptive_calibration_error, ece
from symbnn.errors import Refusal
from tolerances import assert_close

P = normal(3, 50, 2, 4).softmax(-1)
LABELS = torch.randint(4, (50,), generator=seeded(1))


def adaptive(confidence, hits, bins):
    """By NumPy's split of the sorted predictions; no ties."""
    order = np.argsort(confidence)
    places = np.arange(len(order)) * bins // len(order)
    gaps = [hits[order[places == k]].sum() - confidence[order[places == k]].sum() for k in range(bins)]
    return sum(map(abs, gaps)) / len(order)


@pytest.mark.parametrize("over", ["identity", "orbit"])
@pytest.mark.parametrize("bins", [1, 7, 15, 200])
def test_the_adaptive_error_is_that_of_sorted_bins(over, bins):
    mean = (P if over == "orbit" else P[:, :, :1]).mean(0)
    truth = LABELS[:, None].expand(mean.shape[:2])
    confidence, predicted = mean.max(-1)
    expected = adaptive(confidence.flatten().numpy(), (predicted == truth).double().flatten().numpy(), bins)
    assert math.isclose(adaptive_calibration_error(P, LABELS, over, bins), expected, rel_tol=1e-12)
    by_class = [adaptive(mean[..., c].flatten().numpy(), (truth == c).double().flatten().numpy(), bins)
                for c in range(4)]
    found = adaptive_calibration_error(P, LABELS, over, bins, classwise=True)
    assert math.isclose(found, sum(by_class) / 4, rel_tol=1e-12)


def test_the_diagram_is_the_error():
    confidence, predicted = P.mean(0)[:, 0].max(-1)
    hits = predicted == LABELS
    found = reliability(confidence, hits, bins=10)
    assert math.isclose(found.error, ece(P, LABELS, bins=10), rel_tol=1e-12)
    assert found.number.sum() == 50 and (found.number > 0).all()
    for k, low in enumerate(sorted(set((confidence * 10).long().tolist()))):
        inside = (confidence * 10).long() == low
        assert_close(found.confidence[k], confidence[inside].mean())
        assert_close(found.accuracy[k], hits[inside].double().mean())
    equal = reliability(confidence, hits, bins=10, equal="mass")
    assert (equal.number == 5).all()


def test_ties_do_not_depend_on_the_order():
    confidence = torch.tensor([0.9] * 6 + [1.0] * 6)
    hits = torch.tensor([1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1])
    errors = {round(reliability(confidence[order], hits[order], 4, "mass").error, 12)
              for order in (torch.randperm(12, generator=seeded(s)) for s in range(20))}
    assert len(errors) == 1
    assert_close(over_ties(confidence, hits.double()), torch.tensor([4 / 6] * 6 + [5 / 6] * 6, dtype=torch.float64))


def test_a_calibrated_predictor_has_no_error_but_noise():
    confidence = torch.rand(200_000, generator=seeded()).double()
    hits = torch.rand(200_000, generator=seeded(1)).double() < confidence
    for equal in ("width", "mass"):
        assert reliability(confidence, hits, 10, equal).error < 4 * math.sqrt(10 / 200_000) / 2
    assert abs(reliability(confidence, confidence > 2, 10, "mass").error - confidence.mean()) < 1e-12


@pytest.mark.parametrize("n", [1, 2, 37])
def test_the_error_of_intervals_is_the_area_between_coverage_and_level(n):
    places = torch.rand(n, generator=seeded(n)).double()
    knots = torch.cat([torch.zeros(1), places.sort().values, torch.ones(1)]).double()
    area = 0.0
    for k, (a, b) in enumerate(itertools.pairwise(knots)):  # the share is k/n between the k-th place and the next
        share = torch.tensor(k / n, dtype=torch.float64)
        cut = share.clamp(a, b)
        area += ((cut - share).abs() + (a - share).abs()) / 2 * (cut - a) + (
            (b - share).abs() + (cut - share).abs()) / 2 * (b - cut)
    assert_close(interval_error(places), area)


@pytest.mark.parametrize(("call", "said"), [
    (lambda x, y: reliability(x * math.nan, y), "NaN"), (lambda x, y: reliability(x, y[1:]), "another split"),
    (lambda x, y: reliability(x[:, None], y), "flatten"), (lambda x, y: reliability(x[:0], y[:0]), "no predictions"),
    (lambda x, y: reliability(100 * x, y), "confidence / 100"), (lambda x, y: reliability(-x, y), "logits"),
    (lambda x, y: reliability(x, 3 * y), "predicted == labels"), (lambda x, y: reliability(x.tolist(), y), "as_tensor"),
    (lambda x, y: reliability(x, y, bins=0), "bins=15"), (lambda x, y: reliability(x, y, equal="size"), "equal"),
    (lambda x, y: interval_error(2 * x - 1), "2 \\* F - 1"), (lambda x, y: interval_error(x[:0]), "no predictions"),
    (lambda x, y: adaptive_calibration_error(P, LABELS, bins=0), "bins=15"),
    (lambda x, y: adaptive_calibration_error(P, LABELS, bins=0, classwise=True), "bins=15"),
    (lambda x, y: adaptive_calibration_error(P, LABELS, over="all"), "over"),
])
def test_what_is_no_confidence_is_refused(call, said):
    with pytest.raises(Refusal, match=said):
        call(torch.linspace(0, 1, 5), torch.tensor([0, 1, 0, 1, 1]))
