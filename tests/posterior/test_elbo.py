"""The ELBO: no gap where q is the posterior, and invariance on augmented data."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from helpers import seeded
from symbnn.errors import Refusal
from symbnn.posterior.elbo import elbo
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import MeanFieldGaussian
from symbnn.posterior.layers import VariationalTensor, kl_sum, variational_tensors, with_posteriors
from symbnn.posterior.likelihoods import Categorical
from symbnn.posterior.priors import fixed_means, isotropic
from symbnn.posterior.real_targets import Gaussian
from symbnn.posterior.sampling import apply_weights, forward, sample_weights
from symbnn.symmetry.fields import field, rotations
from symbnn.symmetry.networks import network_action
from tolerances import assert_close, within_standard_errors

NOISE, TAU = 0.4, 1.3
GAP = 1e-10  # what the gap to the evidence may be: differences of sums of a few hundred nats, through a Cholesky factor


def regression(rows, weights, seed):
    """Data, the exact posterior's mean and covariance, and the log evidence."""
    X = torch.randn(rows, weights, generator=seeded(seed), dtype=torch.float64)
    y = torch.randn(rows, generator=seeded(seed + 1), dtype=torch.float64)
    eye = torch.eye(weights, dtype=torch.float64)
    covariance = torch.linalg.inv(X.mT @ X / NOISE**2 + eye / TAU**2)
    marginal = NOISE**2 * torch.eye(rows, dtype=torch.float64) + TAU**2 * X @ X.mT
    evidence = torch.distributions.MultivariateNormal(torch.zeros_like(y), marginal).log_prob(y)
    return X, y, (covariance @ X.mT @ y / NOISE**2)[None], covariance, evidence


def network_with(posterior):
    network = with_posteriors(nn.Linear(posterior.shape[-1], 1, bias=False).double())
    network.weight = VariationalTensor(posterior, isotropic(TAU)("weight", posterior))
    return network


def exact_elbo_per_datum(network, X, y):
    """By `elbo` itself at the mean, and E|y - X theta|^2 = |y - X mu|^2 + tr(X Sigma X^T) for the rest."""
    posterior = network.weight.posterior
    root = posterior.scale_tril if isinstance(posterior, FullGaussian) else posterior.scale.flatten().diag()
    at_mean = apply_weights(network, X, {"weight": posterior.mean[None]})
    parts = elbo(network, at_mean, y[:, None], len(y), likelihood=Gaussian(NOISE))
    return parts.elbo - (X @ root).square().sum() / (2 * NOISE**2) / len(y)


@pytest.mark.parametrize("weights", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_no_gap_at_the_posterior(weights, seed):
    X, y, mean, covariance, evidence = regression(9, weights, seed)
    posterior = FullGaussian(mean, torch.linalg.cholesky(covariance))
    gap = evidence - len(y) * exact_elbo_per_datum(network_with(posterior), X, y)
    assert abs(gap) < GAP


@given(shift=st.floats(-2, 2), stretch=st.floats(0.2, 3))
def test_the_gap_is_the_divergence_to_the_posterior(shift, stretch):
    X, y, mean, covariance, evidence = regression(9, 3, 4)
    root = torch.linalg.cholesky(covariance)
    posterior, other = FullGaussian(mean, root), FullGaussian(mean + shift, stretch * root)
    gap = evidence - len(y) * exact_elbo_per_datum(network_with(other), X, y)
    expected = other.kl(posterior)
    assert abs(gap - expected) < GAP * (1 + expected)


@pytest.mark.parametrize("estimator", ["whole", "split"])
def test_the_monte_carlo_estimate(estimator):
    X, y, mean, covariance, _ = regression(8, 3, 5)
    network = network_with(FullGaussian(mean + 0.1, 1.2 * torch.linalg.cholesky(covariance)))
    exact, generator = exact_elbo_per_datum(network, X, y), seeded(6)
    with torch.no_grad():
        found = torch.stack([
            elbo(network, forward(network, X, 4, estimator, generator), y[:, None], 8, likelihood=Gaussian(NOISE)).elbo
            for _ in range(2000)
        ])
    within_standard_errors(found.mean(), exact, found.std() / 2000**0.5)


def test_parts_and_divisors():
    network = with_posteriors(nn.Linear(3, 4).double(), prior=isotropic(0.5))
    x, labels = torch.randn(6, 3, generator=seeded(), dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    outputs = forward(network, x, 5, generator=seeded(1))
    parts = elbo(network, outputs, labels, num_data=600, kl_weight=0.25)
    assert_close(parts.kl, kl_sum(network) / 600)
    assert_close(parts.elbo, parts.expected_log_likelihood - 0.25 * parts.kl)
    by_hand = torch.distributions.Categorical(logits=outputs).log_prob(labels)
    assert_close(parts.expected_log_likelihood, by_hand.mean())
    assert_close(Categorical().sum_log_likelihood(outputs, labels), by_hand.sum(1).mean())
    twice = elbo(network, outputs.repeat(1, 2, 1), labels.repeat(2), num_data=600, kl_weight=0.25)
    assert_close(twice.elbo, parts.elbo)  # a larger batch does not change the scale


def cnn():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("augmented", [True, False])
@pytest.mark.parametrize("kl_weight", [1.0, 0.0, 7.0])
def test_invariant_on_augmented_data_only(augmented, kl_weight):
    """The draws of the moved posterior are the moved draws, so the two estimates are equal, not only their means."""
    network = with_posteriors(cnn(), scale=0.3)
    for tensor in variational_tensors(network).values():
        nn.init.normal_(tensor.posterior.log_scale, -1, generator=seeded(2))
    images, labels = torch.randn(5, 1, 4, 4, generator=seeded(3), dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    on_images = field(rotations(), (1, 4, 4))
    action = network_action(cnn(), on_images)
    if augmented:
        images, labels = torch.cat([on_images.act(g, images) for g in range(4)]), labels.repeat(4)
    weights = sample_weights(network, 3, seeded(4))
    values = []
    for g in range(4):
        moved = with_posteriors(cnn())
        for name, tensor in variational_tensors(network).items():
            owner = moved.get_submodule(name.rpartition(".")[0])
            pushed = tensor.posterior.push_forward(action.parameters[name](g))
            setattr(owner, name.rpartition(".")[2], VariationalTensor(pushed, isotropic()(name, pushed)))
        outputs = apply_weights(moved, images, action.act(g, weights))
        values.append(elbo(moved, outputs, labels, len(labels), kl_weight=kl_weight).elbo)
    spread = (max(values) - min(values)).item()
    assert spread < 1e-12 if augmented else spread > 1e-3


def test_a_prior_that_is_not_invariant_breaks_it():
    posterior = MeanFieldGaussian(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2))
    swapped = MeanFieldGaussian(torch.tensor([[2.0, 1.0]]), torch.zeros(1, 2))
    prior = fixed_means({"weight": torch.tensor([[1.0, 0.0]])})
    assert posterior.kl(prior("weight", posterior)) != swapped.kl(prior("weight", swapped))


def test_refusals():
    network = with_posteriors(nn.Linear(3, 4))
    labels = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(Refusal, match="axis of draws"):
        elbo(network, torch.zeros(6, 4), labels, 6)
    with pytest.raises(Refusal, match="number of data"):
        elbo(network, torch.zeros(1, 6, 4), labels, 0)
    with pytest.raises(Refusal, match="shape of the outputs"):  # (S, B, 1) against (B,) would broadcast to (S, B, B)
        elbo(network, torch.zeros(1, 6, 1), torch.zeros(6), 6, likelihood=Gaussian(1.0))
    for noise in (0.0, -1.0, float("nan")):
        with pytest.raises(Refusal, match="positive standard deviation"):
            Gaussian(noise)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_of_the_divergence_that_cannot_be_meant(weight):
    network, targets = with_posteriors(nn.Linear(3, 4)), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(Refusal, match="kl_weight"):
        elbo(network, torch.zeros(1, 2, 4), targets, 2, kl_weight=weight)
