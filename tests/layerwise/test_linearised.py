"""The linearised predictive against linear models, draws, quadrature and turned inputs."""
import math

import numpy as np
import pytest
import torch
from torch import nn

from helpers import normal, seeded
from helpers_layerwise import NOISE, labels, started, with_factors
from symbnn.equivariance.averages import symmetrize
from symbnn.equivariance.tied import tie
from symbnn.errors import Refusal
from symbnn.layerwise.laplace_posteriors import joint_laplace, laplace_posterior
from symbnn.layerwise.linearised import GaussianOutputs, expected_sigmoid, linearised, probit
from symbnn.posterior.block_gaussian import BlockGaussian
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.kronecker_gaussian import KroneckerGaussian
from symbnn.posterior.layers import posterior_mean_network, with_posteriors
from symbnn.posterior.likelihoods import Categorical
from symbnn.posterior.log_normal import LogNormal
from symbnn.posterior.point_mass import PointMass
from symbnn.posterior.priors import isotropic
from symbnn.posterior.real_targets import Gaussian
from symbnn.posterior.sampling import predict
from symbnn.symmetry.fields import field, rotations
from symbnn.symmetry.networks import network_action
from tolerances import assert_close, within_standard_errors

QUIET = pytest.mark.filterwarnings("ignore:These weights are no mode:UserWarning")


def gaussian_outputs(*shape, seed=0):
    root = normal(*shape, shape[-1], seed=seed + 1)
    return GaussianOutputs(normal(*shape, seed=seed), root @ root.mT)


@pytest.mark.parametrize("family", [MeanFieldGaussian, BlockGaussian, FullGaussian, KroneckerGaussian])
def test_a_linear_model_has_the_moments_of_its_draws(family):
    network, x = with_posteriors(nn.Linear(3, 2).double(), family, scale=0.3), normal(4, 3, seed=1)
    found = linearised(network, x, batch_size=3)
    draws = predict(network, x, draws=100_000, generator=seeded(0))
    within_standard_errors(draws.mean(0), found.mean, draws.std(0) / math.sqrt(len(draws)))
    centred = draws - found.mean
    products = centred[..., :, None] * centred[..., None, :]
    within_standard_errors(products.mean(0), found.covariance, products.std(0) / math.sqrt(len(draws)))


@QUIET
def test_covariances_are_jacobians_around_the_posterior():
    network = with_posteriors(started(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))), PointMass)
    x, new = normal(9, 3, seed=1), normal(5, 3, seed=2)
    plain = posterior_mean_network(network)
    weights = {name: value.detach() for name, value in plain.named_parameters()}
    jacobian = torch.func.jacrev(lambda w: torch.func.functional_call(plain, w, (new,)))(weights)
    J = torch.cat([part.flatten(2) for part in jacobian.values()], 2)
    joint = joint_laplace(network, x, labels(9))
    root = joint.law.scale_tril
    assert_close(linearised(joint, new).covariance, (J @ root) @ (J @ root).mT)
    assert_close(linearised(joint, new).mean, plain(new))
    last = laplace_posterior(network, x, labels(9), layers="last")
    variances = torch.cat([last[2].weight.posterior.variance.flatten(), last[2].bias.posterior.variance])
    assert_close(linearised(last, new).covariance, (J[..., -15:] * variances) @ J[..., -15:].mT)
    half = linearised(last.float(), new.float())
    assert half.mean.dtype == torch.float64
    assert_close(half.covariance, linearised(last.double(), new).covariance, 1e-5)


def test_targets_have_noise_on_top():
    outputs, y = gaussian_outputs(6, 2), normal(6, 2, seed=5)
    for noise in (NOISE, torch.tensor([0.2, 0.9]).double()):
        found = outputs.with_noise(Gaussian(noise))
        added = torch.as_tensor(noise, dtype=torch.float64).expand(2).square().diag()
        assert_close(found.covariance, outputs.covariance + added)
        law = torch.distributions.MultivariateNormal(outputs.mean, outputs.covariance + added)
        assert_close(found.log_prob(y), law.log_prob(y))


def test_one_logit_against_quadrature():
    points, weights = (torch.as_tensor(each) for each in np.polynomial.hermite_e.hermegauss(100))
    mean, variance = torch.linspace(-6, 6, 25).double()[:, None], torch.logspace(-4, 1.5, 12).double()
    exact = ((mean[..., None] + variance.sqrt()[:, None] * points).sigmoid() * weights).sum(-1) / weights.sum()
    found = expected_sigmoid(mean.expand(25, 12), variance.expand(25, 12))
    assert (found - exact).abs().max() < 0.02
    assert (found - mean.sigmoid()).abs().max() > 0.1  # what leaving the variance out would cost
    assert_close(expected_sigmoid(mean, torch.zeros_like(mean)), mean.sigmoid())


def test_probabilities_add_up_and_see_differences_alone():
    outputs = gaussian_outputs(50, 4)
    shifted = GaussianOutputs(outputs.mean + 3, outputs.covariance + 7)  # a shift, and noise, that all logits share
    assert_close(probit(outputs).sum(1), torch.ones(50))
    assert_close(probit(shifted), probit(outputs))
    assert_close(probit(outputs, paired=False).sum(1), torch.ones(50))
    assert (probit(shifted, paired=False) - probit(outputs, paired=False)).abs().max() > 0.01
    certain = GaussianOutputs(outputs.mean, torch.zeros_like(outputs.covariance))
    for paired in (True, False):
        assert_close(probit(certain, paired=paired), outputs.mean.softmax(-1))
    two = gaussian_outputs(50, 2)
    away = torch.tensor([1.0, -1.0]).double()
    assert_close(probit(two)[:, 0], expected_sigmoid(two.mean @ away, (two.covariance @ away) @ away))
    huge = GaussianOutputs(1e6 * outputs.mean, outputs.covariance)
    assert bool(probit(huge).isfinite().all())


@QUIET
@pytest.mark.parametrize("structure", ["diagonal", pytest.param("kronecker", marks=with_factors), "blocks"])
def test_an_invariant_posterior_predicts_equivariantly(structure):
    turn = field(rotations(), (1, 3, 3))
    plain = started(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)))
    network, images, test = with_posteriors(plain, PointMass), normal(5, 1, 3, 3, seed=1), normal(4, 1, 3, 3, seed=2)
    action, every = network_action(network, turn), torch.cat([turn.act(g, images) for g in range(4)])
    for mode, exact in ((symmetrize(network, action, "projection"), True), (network, False)):
        posterior = laplace_posterior(mode, every, labels(20), structure=structure)
        here, there = linearised(posterior, test), linearised(posterior, turn.act(1, test))
        gap = (there.covariance - here.covariance).abs().max() / here.covariance.abs().max()
        assert (gap < 1e-12 and (there.mean - here.mean).abs().max() < 1e-12) == exact
        assert exact or gap > 1e-2


def test_tied_gaussian_weights_have_gaussian_outputs():
    turn = field(rotations(), (1, 4, 4))
    network = with_posteriors(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double(), scale=0.3)
    tied, x = tie(network, network_action(network, turn)), normal(3, 1, 4, 4)
    draws, found = predict(tied, x, draws=50_000, generator=seeded(0)), linearised(tied, x)
    within_standard_errors(draws.var(0), found.covariance.diagonal(dim1=1, dim2=2),
                           (draws - found.mean).square().std(0) / math.sqrt(len(draws)))
    assert_close(linearised(tied, turn.act(1, x)).covariance, found.covariance)


@pytest.mark.parametrize("family", [Laplace, LogNormal])
def test_other_families_are_refused(family):
    plain = nn.Linear(3, 2).double()
    for parameter in plain.parameters():
        parameter.data.abs_()
    with pytest.raises(Refusal, match=f"Gaussian posteriors.*{family.__name__} of 'weight'"):
        linearised(with_posteriors(plain, family, prior=isotropic(1.0)), normal(4, 3))


@pytest.mark.parametrize("ask, message", [
    (lambda q, x: linearised(posterior_mean_network(q), x), "a Bayesian network"),
    (lambda q, x: linearised(q, x.log()), "finite inputs"), (lambda q, x: linearised(q, x[:0]), "one or more inputs"),
    (lambda q, x: linearised(q, x, batch_size=0), "batch size"), (lambda q, x: linearised(x, x), "the posterior"),
    (lambda q, x: linearised(q, x).with_noise(Categorical()), "whose noise is added"),
    (lambda q, x: linearised(q, x).log_prob(x), "targets of shape"), (lambda q, x: probit(x), "the outputs"),
    (lambda q, x: probit(GaussianOutputs(x[:, :1], x[:, :1, None])), "expected_sigmoid"),
    (lambda q, x: expected_sigmoid(x, -x.abs()), "variances of at least 0"),
])
def test_refusals(ask, message):
    with pytest.raises(Refusal, match=message):
        ask(with_posteriors(nn.Linear(3, 2).double()), normal(4, 3))
