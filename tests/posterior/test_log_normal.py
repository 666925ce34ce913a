"""Log-normal weights: sign masks, and spreads at the edge of a float."""
import itertools

import pytest
import torch

from helpers_posterior import check_closedness, signed_permutations
from symbnn.posterior.independent import MeanFieldGaussian
from symbnn.posterior.log_normal import LogNormal


def test_log_normal_spread_below_the_smallest_float():
    q = LogNormal.initial(torch.tensor([0.5, -2.0]), 1e-25)  # the variance of the logarithms underflows
    q.kl(MeanFieldGaussian.initial(torch.zeros(2), 1.0)).backward()
    assert all(bool(p.grad.isfinite().all()) for p in q.parameters())


@pytest.mark.parametrize("mask", list(itertools.product((1, -1), repeat=3)))
def test_every_mask(mask):
    loc = torch.zeros(3, dtype=torch.float64)
    q = LogNormal(loc, loc, torch.tensor(mask), trainable=False)
    assert sum(check_closedness(q, p) for p in signed_permutations(3)) == 6
