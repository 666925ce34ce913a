"""Full covariances against torch's multivariate normal."""
import pytest
import torch
from torch import distributions as D

from helpers_posterior import NORMAL, members
from tolerances import assert_close


@pytest.mark.parametrize("a, b", [("full", b) for b in sorted(NORMAL)] + [(a, "full") for a in sorted(NORMAL)])
def test_divergence_of_full_and_mean_field_is_that_of_multivariate_normals(a, b):
    q, p = members()[a], members(seed=7, trainable=False)[b]
    laws = [D.MultivariateNormal(r.mean.flatten(), r.scale_tril @ r.scale_tril.T if name == "full" else
                                 torch.diag(r.variance.flatten())) for name, r in ((a, q), (b, p))]
    assert_close(q.kl(p), D.kl_divergence(*laws))
