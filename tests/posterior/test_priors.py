"""Builders of priors."""
import pytest
import torch

from helpers_posterior import small_cnn
from symbnn.errors import Refusal
from symbnn.posterior.independent import Laplace
from symbnn.posterior.layers import variational_tensors, with_posteriors
from symbnn.posterior.log_normal import LogNormal
from symbnn.posterior.priors import fixed_means, isotropic, per_tensor, random_means


def test_priors():
    plain = small_cnn()
    fan = variational_tensors(with_posteriors(plain, prior=per_tensor(2.0, bias=3.0)))
    assert fan["3.weight"].prior.variance.unique().item() == pytest.approx(4.0 / 27)
    assert fan["7.bias"].prior.variance.unique().item() == pytest.approx(9.0)
    bayesian = [with_posteriors(plain, prior=random_means(seed)) for seed in (1, 1, 2)]
    random = [variational_tensors(network)["3.weight"].prior.mean for network in bayesian]
    assert torch.equal(random[0], random[1])
    assert not torch.equal(random[0], random[2])
    assert random[0].std() > 0.7
    fixed = variational_tensors(with_posteriors(plain, prior=fixed_means(plain.state_dict())))["7.weight"]
    assert torch.equal(fixed.prior.mean, plain[7].weight)
    with pytest.raises(Refusal, match="no entry"):
        with_posteriors(plain, prior=fixed_means({}))
    with pytest.raises(Refusal, match="keep their signs"):
        with_posteriors(plain, family=LogNormal, prior=random_means(0))
    laplace = variational_tensors(with_posteriors(plain, family=Laplace, prior=isotropic(0.3)))["7.weight"].prior
    assert isinstance(laplace, Laplace)
    assert laplace.variance.unique().item() == pytest.approx(0.09)
