"""Detection of foreign inputs and risk against coverage: scikit-learn, brute force, known laws, refusals."""
import math
from itertools import pairwise, permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from helpers import seeded
from symbnn.equivariance.detection import detection
from symbnn.equivariance.selective import risk_coverage
from symbnn.errors import Refusal
from tolerances import assert_close, within_standard_errors

few = st.lists(st.integers(-2, 2), min_size=1, max_size=12)


@given(few, few)
def test_detection_is_scikit_learns_and_the_share_of_pairs(familiar, foreign):
    inside, outside = torch.tensor(familiar).double(), torch.tensor(foreign).double()
    found = detection(inside, outside)
    truth, scores = [0] * len(familiar) + [1] * len(foreign), familiar + foreign
    assert math.isclose(found.auroc, roc_auc_score(truth, scores), rel_tol=1e-12)
    assert math.isclose(found.aupr, average_precision_score(truth, scores), rel_tol=1e-12)
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert math.isclose(found.fpr95, fpr[tpr >= 0.95 - 1e-12][0], abs_tol=1e-12)
    pairs = outside[:, None] - inside
    assert math.isclose(found.auroc, ((pairs > 0).double() + (pairs == 0).double() / 2).mean().item(), rel_tol=1e-12)


def test_orientation_and_ends():
    low, high = torch.tensor([1.0, 2.0, -math.inf]), torch.tensor([3.0, math.inf])
    assert detection(low, high) == (1.0, 1.0, 0.0)
    assert detection(high, low).auroc == 0 and detection(high, low).fpr95 == 1
    nineteen = torch.tensor([1.0] * 19 + [-1.0])  # exactly 95 % are enough
    assert detection(torch.tensor([1.5, 0.0, 0.0, 0.0]), nineteen).fpr95 == 0.25
    same = detection(torch.ones(6), torch.ones(2))
    assert same == (0.5, 0.25, 1.0)  # a useless score


@pytest.mark.parametrize("delta", [0.0, 1.0, 2.5])
def test_two_gaussians(delta):
    normal = torch.distributions.Normal(0.0, 1.0)
    exact = normal.cdf(torch.tensor(delta / math.sqrt(2))).item()
    runs = torch.tensor([detection(torch.randn(300, generator=seeded(s)),
                                   delta + torch.randn(300, generator=seeded(1000 + s))).auroc for s in range(60)])
    within_standard_errors(runs.mean(), exact, runs.std() / math.sqrt(60))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=5))
def test_risk_coverage_is_the_expectation_over_orders(rows):
    losses = torch.tensor([loss for loss, _ in rows]).double()
    uncertainty = torch.tensor([u for _, u in rows])
    n = len(rows)
    taken = torch.arange(1, n + 1).double()
    every = [list(order) for order in permutations(range(n))]
    allowed = [o for o in every if all(uncertainty[a] <= uncertainty[b] for a, b in pairwise(o))]
    found = risk_coverage(losses, uncertainty)
    assert_close(found.risk, torch.stack([losses[o].cumsum(0) / taken for o in allowed]).mean(0))
    best = min((losses[o].cumsum(0) / taken).mean().item() for o in every)
    assert math.isclose(found.area - found.excess, best, abs_tol=1e-12) and found.excess >= -1e-12
    assert math.isclose(found.risk[-1], losses.mean(), abs_tol=1e-12)  # everything answered


@pytest.mark.parametrize(("call", "said"), [
    (lambda x: detection(x[:0], x), "no predictions"), (lambda x: detection(x, x[:0]), "no predictions"),
    (lambda x: detection(x * math.nan, x), "NaN"), (lambda x: detection(x, x * math.nan), "NaN"),
    (lambda x: detection(x[None], x), "flatten"), (lambda x: detection(x.numpy(), x), "as_tensor"),
    (lambda x: risk_coverage(x, x[1:]), "another split"), (lambda x: risk_coverage(x * math.nan, x), "NaN"),
    (lambda x: risk_coverage(x, x * math.nan), "NaN"), (lambda x: risk_coverage(x * math.inf, x), "finite"),
    (lambda x: risk_coverage(x[:0], x[:0]), "no predictions"),
])
def test_what_cannot_be_ranked_is_refused(call, said):
    with pytest.raises(Refusal, match=said):
        call(torch.arange(1.0, 5.0))
