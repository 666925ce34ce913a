"""The two simulations against known answers."""
import math

import pytest
import torch

from symbnn.hidden_units.two_weights import GaussianFit
from symbnn.posterior.layers import variational_tensors
from symbnn.studies import simulations
from symbnn.studies.runs import FUNCTIONS
from symbnn.studies.simulations import (
    SIMULATIONS,
    TWO_WEIGHT_METHODS,
    grid_predictive,
    two_weight_problem,
    two_weights,
    unit_network,
    width,
)
from tolerances import assert_close, exact64, within_standard_errors

# Width


def test_the_network_of_units():
    network = unit_network(50, 2.0, seed=3)
    for tensor in variational_tensors(network).values():
        assert tensor.posterior.loc.dtype == torch.float64
        assert_close(tensor.posterior.log_scale, torch.zeros(tensor.posterior.shape, dtype=torch.float64))
    means = variational_tensors(network)["0.weight"].posterior.loc.detach()
    within_standard_errors(means.square().mean(), 4.0, 4 * math.sqrt(2 / means.numel()))
    assert torch.equal(unit_network(50, 4.0, seed=3)[0].weight.posterior.loc, 2 * network[0].weight.posterior.loc)


def test_bias_is_against_the_exact_value_of_the_same_draws():
    exact = width(1, "permanent", units=5, separation=0.7)
    assert exact["bias"] == exact["bias_se"] == 0 and exact["ceiling"] == pytest.approx(math.log(120), abs=exact64)
    for method, sign in (("bethe", 1), ("capacity", -1), ("infonce", -1)):
        row = width(1, method, units=5, separation=0.7)
        assert_close(row["information"] - exact["information"], row["bias"])
        assert sign * row["bias"] > 4 * row["bias_se"] > 0
        assert_close(row["per_unit"] * 5, row["share"] * math.log(120))
        assert_close(row["information_se"] * math.sqrt(32), row["deviation"])
    assert width(1, "bethe", units=17, separation=0.7, draws=8)["bias"] is None
    assert width(2, "bethe", units=5, separation=0.7)["information"] != width(1, "bethe", 5, 0.7)["information"]


def test_wide_layers_reach_the_limit_of_single_units():
    """n d log(1 + s^2) / 2 on average over the means, for 300 units of six weights at s = 0.3."""
    found = torch.tensor([width(seed, "marginal", 300, 0.3, draws=8)["per_unit"] for seed in range(8)])
    limit = 3 * math.log(1.09)
    assert found.mean() < limit + 4 * found.std() / 8**0.5
    within_standard_errors(found.mean(), limit, found.std() / 8**0.5 + 0.05 * limit / 4)


# Two weights


def test_predictions_on_the_grid_of_a_linear_regression():
    model, x, y = two_weight_problem(1, slope=1.0, noise=0.5)
    axis, log_posterior, _ = model.grid()
    found = grid_predictive(model, axis, log_posterior, x, y)
    precision = 1 / 2 + model.x.square().sum() / 0.25
    mean, variance = (model.x @ model.y) / 0.25 / precision * x, x**2 / precision
    nll = -torch.distributions.Normal(mean, (variance + 0.25).sqrt()).log_prob(y)
    for one, other in zip(found, (mean, variance, nll)):
        assert_close(one, other, 1e3 * exact64)


def test_problems_are_drawn_from_their_model():
    model, x, y = two_weight_problem(4, slope=0.2, noise=1e-9)
    weights = torch.randn(2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert model.slope == 0.2 and len(model.x) == 16 and len(x) == 200 and x.abs().max() <= 1 and x.min() < -0.9
    assert_close(model.predict(weights, x), y, 1e-7)
    assert_close(model.predict(weights, model.x), model.y, 1e-7)
    noisy = two_weight_problem(4, slope=0.2, noise=0.5)
    residuals = noisy[2] - noisy[0].predict(weights, noisy[1])
    within_standard_errors(residuals.square().mean(), 0.25, 0.25 * math.sqrt(2 / 200))


@pytest.mark.parametrize("noise", (0.3, 1.0))
def test_gap_is_a_divergence_and_symmetrising_adds_the_information(noise):
    plain, after, best = (two_weights(1, method, 0.1, noise) for method in TWO_WEIGHT_METHODS)
    for row in (plain, after, best):
        assert abs(row["gap"] - row["kl"]) < 1e-3  # the grid's error, of second order in its step
        assert row["predictive_kl"] > 0 and row["kl_reverse"] > 0
        assert 0 <= row["information"] <= math.log(2) + exact64
        assert_close(row["nll"] - row["excess_nll"], plain["nll"] - plain["excess_nll"])
    assert_close(plain["gap"] - after["gap"], after["information"], 1e-9)
    assert best["gap"] < after["gap"] + 1e-6 and plain["distance"] == after["distance"]
    for name in ("mean_error", "sd_ratio", "nll", "predictive_kl"):  # the exchange leaves predictions as they are
        assert_close(plain[name], after[name], 1e-6)


def gaussian(location, scale):
    return GaussianFit(torch.tensor(location, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64), 0, 0)


def test_divergence_of_predictions_is_what_draws_say():
    model, x, _ = two_weight_problem(1, 0.1, 1.0)
    axis, log_posterior, _ = model.grid(8.0, 321)
    fit = gaussian((2.0, 1.0), (0.5, 0.9))
    log_q = simulations._log_density(fit, axis, symmetric=False)
    x, noise = x[:3], torch.Generator().manual_seed(0)
    found = simulations._predictive_kl(model, axis, log_posterior, log_q, x)
    assert_close(simulations._predictive_kl(model, axis, log_posterior, log_posterior, x), 0.0)
    weights = torch.cartesian_prod(axis, axis)[log_posterior.exp().flatten().multinomial(400, True, generator=noise)]
    y = model.predict(weights, x) + torch.randn(400, 3, generator=noise, dtype=torch.float64)
    inputs, targets = x.repeat(400), y.flatten()
    p, q = (grid_predictive(model, axis, density, inputs, targets)[2] for density in (log_posterior, log_q))
    within_standard_errors(found, (q - p).mean(), (q - p).view(400, 3).mean(1).std() / 400**0.5)
    assert found > 4 * (q - p).view(400, 3).mean(1).std() / 400**0.5


def test_the_symmetrised_density_by_hand():
    fit = gaussian((1.0, -1.0), (0.5, 2.0))
    axis = torch.tensor([-1.0, 0.5], dtype=torch.float64)
    first, second = (torch.distributions.Normal(m, s).log_prob(axis).exp() for m, s in ((1.0, 0.5), (-1.0, 2.0)))
    plain = first[:, None] * second
    assert_close(simulations._log_density(fit, axis, False).exp(), plain)
    assert_close(simulations._log_density(fit, axis, True).exp(), (plain + plain.T) / 2)


# The named ones


@pytest.mark.parametrize("name", SIMULATIONS)
def test_named_simulations_call_the_function_with_their_name(name):
    study = SIMULATIONS[name]
    assert FUNCTIONS[study.base.function].__name__ == name and study.x in study.columns
    assert {"width": 5 * 111, "two_weights": 240}[name] == len(study.runs())
