"""The ELBO of the symmetrised posterior: against draws from the mixture, and what is refused."""
import pytest
import torch

from helpers import seeded
from helpers_hidden_units import permuted, pooled_convolution, two_layers
from symbnn.equivariance.mixture import OrbitMixture
from symbnn.errors import Refusal
from symbnn.hidden_units.mutual_information import InformationEstimator
from symbnn.hidden_units.symmetrized_elbo import symmetrized_elbo
from symbnn.posterior.elbo import elbo
from symbnn.posterior.layers import variational_tensors
from symbnn.posterior.likelihoods import Categorical
from symbnn.posterior.priors import random_means
from symbnn.posterior.real_targets import Gaussian
from symbnn.posterior.sampling import apply_weights, sample_weights
from symbnn.symmetry.fields import field, rotations
from symbnn.symmetry.networks import network_action
from tolerances import assert_close, within_standard_errors


def direct_elbo(network, action, draws, log_likelihood, num_data):
    """The mean over draws of the mixture of log p(D | theta) + log p(theta) - log q^G(theta), a datum."""
    mixture = OrbitMixture(network, action)
    weights = mixture.sample(draws, seeded(20))
    prior = sum(t.prior.log_prob(weights[name]) for name, t in variational_tensors(network).items())
    return (log_likelihood(weights) + prior - mixture.log_prob(weights)).detach() / num_data


def test_symmetrised_elbo_of_permuted_units():
    network = two_layers(units=4)
    action, draws = permuted(network), 20_000
    x = torch.randn(10, 4, generator=seeded(21), dtype=torch.float64)
    y, likelihood = x.sum(1, keepdim=True).sin(), Gaussian(1.0)
    weights = sample_weights(network, draws, seeded(22))
    bound = elbo(network, apply_weights(network, x, weights), y, 10, likelihood=likelihood)
    found = symmetrized_elbo(bound, InformationEstimator(network, action), weights, 10)
    direct = direct_elbo(network, action, draws,
                         lambda w: likelihood.log_prob(apply_weights(network, x, w), y).flatten(1).sum(1), 10)
    assert found.elbo > bound.elbo + 0.05
    within_standard_errors(found.elbo, direct.mean(), 2**0.5 * direct.std() / draws**0.5)
    assert_close(found.elbo, found.expected_log_likelihood - found.kl)


def test_symmetrised_elbo_of_turned_images():
    network = pooled_convolution(scale=0.5)
    action, draws = network_action(network, field(rotations(), (1, 6, 6))), 4000
    images = torch.randn(3, 1, 6, 6, generator=seeded(23), dtype=torch.float64)
    x = torch.cat([action.input.act(g, images) for g in action.group.elements()])  # every turn: the bound needs it
    y, likelihood = torch.tensor([0, 1, 1]).repeat(4), Categorical()
    weights = sample_weights(network, draws, seeded(24))
    bound = elbo(network, apply_weights(network, x, weights), y, 12, likelihood=likelihood, kl_weight=0.5)
    found = symmetrized_elbo(bound, InformationEstimator(network, action), weights, 12, kl_weight=0.5)
    assert_close(found.elbo, found.expected_log_likelihood - 0.5 * found.kl)
    full = symmetrized_elbo(elbo(network, apply_weights(network, x, weights), y, 12, likelihood=likelihood),
                            InformationEstimator(network, action), weights, 12)
    direct = direct_elbo(network, action, draws,
                         lambda w: likelihood.log_prob(apply_weights(network, x, w), y).sum(1), 12)
    within_standard_errors(full.elbo, direct.mean(), 2**0.5 * direct.std() / draws**0.5)


def test_a_prior_that_the_group_moves_is_refused():
    network = two_layers(prior=random_means(0))
    bound = elbo(network, torch.zeros(1, 2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64), 2,
                 likelihood=Gaussian(1.0))
    estimator = InformationEstimator(network, permuted(network))
    with pytest.raises(Refusal, match="prior"):
        symmetrized_elbo(bound, estimator, sample_weights(network, 2, seeded()), 2)


def test_arguments_of_other_kinds_are_refused():
    network = two_layers()
    weights = sample_weights(network, 2, seeded())
    bound = elbo(network, torch.zeros(1, 2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64), 2,
                 likelihood=Gaussian(1.0))
    with pytest.raises(Refusal, match=r"InformationEstimator\(network, action\)"):
        symmetrized_elbo(bound, permuted(network), weights, 2)
    with pytest.raises(Refusal, match="number of data"):
        symmetrized_elbo(bound, InformationEstimator(network, permuted(network)), weights, 0)
