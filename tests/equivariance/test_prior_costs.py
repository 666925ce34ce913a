"""The cost of a prior: exact for linear regression, an equality for one curvature."""

import pytest
import torch

from helpers import normal
from helpers_equivariance import at_most, classifier
from symbnn.equivariance.prior_costs import conjugate_prior_gap, prior_cost, prior_gradient_gap
from symbnn.errors import Refusal
from symbnn.posterior.block_gaussian import BlockGaussian
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.layers import variational_tensors, with_posteriors
from symbnn.posterior.priors import fixed_means, isotropic, random_means
from symbnn.symmetry.fields import field, rotations
from symbnn.symmetry.networks import network_action
from tolerances import assert_close


def test_conjugate_gap_and_its_bound():
    for seed in range(10):
        X, y, m0 = normal(6, 4, seed=seed), normal(6, seed=seed + 50), normal(4, seed=seed + 99)
        orbit, targets = torch.cat([X.roll(k, 1) for k in range(4)]), y.repeat(4)
        noise, precision = 0.5 + seed / 5, torch.eye(4).double() * (0.2 + seed)
        precision = precision + 0.1 * (torch.eye(4).roll(1, 0) + torch.eye(4).roll(-1, 0)).double()  # circulant
        gram = orbit.T @ orbit / noise**2
        mean = torch.linalg.solve(gram + precision, orbit.T @ targets / noise**2 + precision @ m0)
        gaps = torch.stack([m0.roll(k) - m0 for k in range(4)])
        exact = torch.stack([mean.roll(k) - mean for k in range(4)])
        assert_close(conjugate_prior_gap(gram, precision, gaps), exact, 1e-10)
        concavity = torch.linalg.eigvalsh(gram + precision)[0].item() / len(orbit)
        at_most(exact.norm(dim=1), prior_cost((gaps @ precision).norm(dim=1), concavity, len(orbit)))


def test_prior_bound_is_an_equality_for_one_curvature():
    gap, precision, curvature, data = normal(4, seed=1), 0.7, 3.0, 20
    exact = conjugate_prior_gap(curvature * torch.eye(4).double(), precision * torch.eye(4).double(), gap).norm()
    assert_close(prior_cost(precision * gap.norm(), (curvature + precision) / data, data), exact)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(Refusal, match=f"strong concavity above 0.*concavity={wrong}"):
            prior_cost(gap.norm(), wrong, 5)
    for wrong in (0, 2.5):
        with pytest.raises(Refusal, match=r"number of data.*num_data=len\(labels\) \* action\.group\.order"):
            prior_cost(gap.norm(), 1.0, wrong)


def test_prior_gradient_gap():
    plain = classifier()
    action = network_action(plain, field(rotations(), (1, 4, 4)))
    assert prior_gradient_gap(with_posteriors(plain, prior=isotropic(0.3)), action).max() == 0
    prior = random_means(1, spread=0.4, deviation=0.3)
    for family in (MeanFieldGaussian, BlockGaussian, Laplace):
        network = with_posteriors(plain, family, 0.1, prior)
        found = prior_gradient_gap(network, action)
        assert found[0] == 0 and found[1:].min() > 0.1
        if family is not Laplace:
            m0 = {name: t.prior.mean for name, t in variational_tensors(network).items()}
            for k, g in enumerate(action.group.elements()):
                moved = action.act(g, m0)
                square = sum((moved[name] - m0[name]).square().sum() for name in m0)
                assert_close(found[k], square.sqrt() / 0.09, 1e-10)
    uneven = fixed_means({name: torch.zeros_like(p) for name, p in plain.named_parameters()}, 0.3)
    network = with_posteriors(plain, scale=0.1, prior=uneven)
    prior = network[0].weight.prior
    with torch.no_grad():
        prior.log_scale.data = prior.log_scale.expand(prior.shape) + 0.1 * normal(*prior.shape, seed=4)
    assert prior_gradient_gap(network, action)[1] > 1e-3  # scales that are not invariant are seen as well
