"""The network of two weights: everything in closed form against sums over grids, the two fits, refusals."""
import math

import pytest
import torch
from torch import nn

from helpers import seeded
from helpers_hidden_units import double
from symbnn.errors import Refusal
from symbnn.hidden_units.two_weights import TwoWeights, exchange_information
from tolerances import assert_close, exact32


@pytest.fixture(scope="module")
def model():
    x = torch.linspace(-1, 1, 16, dtype=torch.float64)
    clean = TwoWeights(x, x).predict(double(1.0, -0.6), x)
    return TwoWeights(x, clean, slope=0.1, noise=0.8, prior=1.2)


def test_two_weights_predict_and_log_joint(model):
    w = torch.randn(4, 3, 2, generator=seeded(), dtype=torch.float64)
    activation = nn.LeakyReLU(0.1)
    expected = activation(w[..., :1] * model.x) + activation(w[..., 1:] * model.x)
    assert_close(model.predict(w, model.x), expected)
    likelihood = torch.distributions.Normal(expected, 0.8).log_prob(model.y).sum(-1)
    assert_close(model.log_joint(w), likelihood + torch.distributions.Normal(0, double(1.2)).log_prob(w).sum(-1))
    assert_close(model.log_joint(w.flip(-1)), model.log_joint(w))


def test_two_weights_grid_against_linear_regression(model):
    linear = TwoWeights(model.x, model.y, slope=1.0, noise=0.8, prior=1.2)
    covariance = 0.64 * torch.eye(16, dtype=torch.float64) + 2 * 1.44 * torch.outer(model.x, model.x)
    exact = torch.distributions.MultivariateNormal(torch.zeros_like(model.x), covariance).log_prob(model.y)
    axis, log_posterior, evidence = linear.grid(12.0, 641)
    assert_close(evidence, exact)
    assert_close(log_posterior.exp().sum() * (axis[1] - axis[0]) ** 2, 1.0)
    assert_close(log_posterior[400, 250], linear.log_joint(torch.stack([axis[400], axis[250]])) - exact)


def test_two_weights_moments_and_elbo(model):
    location, scale = double(0.5, -0.3), double(0.4, 0.7)
    z = torch.linspace(-9, 9, 3601, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / torch.exp(-(z**2) / 2).sum()
    x = double(-0.7, 0.4)
    values = [torch.where(w * x > 0, w * x, 0.1 * w * x) for w in (location + scale * z[:, None]).T[..., None]]
    means = [density @ value for value in values]
    variances = [density @ value**2 - mean**2 for value, mean in zip(values, means)]
    mean, variance = model.moments(location, scale, x)
    assert_close(mean, sum(means), exact32)  # the sum meets a kink: second order in a step of 0.005
    assert_close(variance, sum(variances), exact32)
    linear = TwoWeights(model.x, model.y, slope=1.0, noise=0.8, prior=1.2)
    precision = torch.eye(2, dtype=torch.float64) / 1.44 + (model.x @ model.x / 0.64)
    posterior = torch.distributions.MultivariateNormal(precision.inverse() @ (model.x @ model.y / 0.64).expand(2),
                                                       precision_matrix=precision)
    q = torch.distributions.MultivariateNormal(location, torch.diag(scale**2))
    gap = torch.distributions.kl_divergence(q, posterior)
    assert_close(linear.elbo(location, scale) + gap, linear.grid(12.0, 641)[2])


def test_two_weights_elbo_against_the_grid(model):
    location, scale = double(0.9, -0.4), double(0.3, 0.5)

    def error(points):
        axis, log_posterior, evidence = model.grid(8.0, points)
        parts = [torch.distributions.Normal(m, s).log_prob(axis) for m, s in zip(location, scale)]
        log_q = parts[0][:, None] + parts[1]
        divergence = (log_q.exp() * (log_q - log_posterior)).sum() * (axis[1] - axis[0]) ** 2
        return (evidence - divergence - model.elbo(location, scale)).item()

    assert 3.5 < error(321) / error(641) < 4.5  # nothing is left but the rule's error at the kinks, of second order
    assert abs(error(641)) < 1e-3


def test_exchange_information():
    assert_close(exchange_information(double(0.4, 0.4), double(0.3, 0.3)), 0.0)
    assert_close(exchange_information(double(5.0, -5.0), double(0.3, 0.5)), math.log(2))
    location, scale = double(0.5, -0.2), double(0.4, 0.7)
    axis = torch.linspace(-7, 7, 1401, dtype=torch.float64)
    parts = [torch.distributions.Normal(m, s).log_prob(axis) for m, s in zip(location, scale)]
    q = parts[0][:, None] + parts[1]
    expected = (q.exp() * (q - torch.logaddexp(q, q.T) + math.log(2))).sum() * (axis[1] - axis[0]) ** 2
    assert_close(exchange_information(location, scale), expected)
    assert_close(exchange_information(location.flip(0), scale.flip(0)), expected)


@pytest.mark.parametrize("noise, between", [(0.3, False), (1.2, True)])
def test_two_weights_fits(model, noise, between):
    model = TwoWeights(model.x, model.y, noise=noise)
    evidence = model.grid()[2]
    plain, both = model.fit(symmetrised=False), model.fit(symmetrised=True)
    assert_close(plain.elbo, model.elbo(plain.location, plain.scale))
    assert_close(both.elbo, model.elbo(both.location, both.scale) + exchange_information(both.location, both.scale))
    assert_close(both.information, exchange_information(both.location, both.scale))
    assert plain.elbo < both.elbo < evidence
    assert ((plain.location[0] - plain.location[1]).abs() < 1e-4) == between
    assert (both.location[0] - both.location[1]).abs() > 0.5
    for fit, symmetrised in ((plain, False), (both, True)):  # a stationary point of what was asked for
        location, log_scale = fit.location.clone().requires_grad_(), fit.scale.log().requires_grad_()
        value = model.elbo(location, log_scale.exp())
        value = value + exchange_information(location, log_scale.exp()) if symmetrised else value
        gradients = torch.autograd.grad(value, [location, log_scale])
        assert max(g.abs().max().item() for g in gradients) < exact32


def test_starts_are_in_units_of_the_prior(model):
    """The same problem in other units of weight and data has the same fit in these units."""
    seen = []

    class Recording(TwoWeights):
        def elbo(self, location, scale):
            seen.append(torch.stack([location, scale]).detach())
            return super().elbo(location, scale)

    other = Recording(model.x, 50 * model.y, noise=50 * model.noise, prior=50 * model.prior)
    first, second = model.fit(False), other.fit(False, starts=((1, -1),))
    assert_close(seen[0], 50 * model.prior * double([1.0, -1.0], [0.3, 0.3]))
    assert abs(first.elbo - second.elbo - 16 * math.log(50)) < exact32  # densities of 16 data in other units


@pytest.mark.parametrize(
    "call, words",
    {
        "a column": (lambda: TwoWeights(torch.ones(3, 1), torch.ones(3, 1)), "vectors x and y"),
        "lengths": (lambda: TwoWeights(torch.ones(3), torch.ones(4)), "one y for each x"),
        "lists": (lambda: TwoWeights([1.0], [1.0]), r"torch\.as_tensor\(x\)"),
        "no noise": (lambda: TwoWeights(torch.ones(3), torch.ones(3), noise=0.0), "deviation as noise"),
        "no prior": (lambda: TwoWeights(torch.ones(3), torch.ones(3), prior=math.nan), "positive standard deviation"),
        "a small grid": (lambda: TwoWeights(torch.ones(3), torch.ones(3)).grid(2.0, 41), "width=4.0, with points=81"),
        "cut off on one side": (lambda: TwoWeights(torch.ones(50), torch.full((50,), 1.9), noise=0.1).grid(2.0, 41),
                                "half_width=4.0"),
        "no grid": (lambda: TwoWeights(torch.ones(3), torch.ones(3)).grid(points=1), "at least 2"),
        "no nodes": (lambda: exchange_information(double(1.0, 0.0), double(1.0, 1.0), 1), "at least 2"),
    }.values(),
)
def test_refusals(call, words):
    with pytest.raises(Refusal, match=words):
        call()


def test_advised_columns_and_grids_work():
    x = torch.linspace(-1, 1, 3, dtype=torch.float64)
    column, model = x[:, None], TwoWeights(x, x)
    assert_close(TwoWeights(column.flatten(), column.flatten()).grid()[2], model.grid()[2])
    with pytest.raises(Refusal, match=r"half_width=8\.0, with points=321"):
        model.grid(4.0, 161)
    model.grid(8.0, 321)
