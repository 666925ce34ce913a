"""Data for ArviZ: shapes and names, log-likelihoods, its own functions on them, what is refused."""
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from helpers import normal, seeded
from symbnn.adapters.arviz_data import inference_data
from symbnn.equivariance.symmetric import bayesianize
from symbnn.errors import Refusal
from symbnn.posterior.ensembles import Ensemble
from symbnn.posterior.layers import with_posteriors
from symbnn.posterior.likelihoods import Bernoulli, Categorical, Likelihood, Poisson
from symbnn.posterior.real_targets import Gaussian, HeteroscedasticGaussian
from symbnn.posterior.sampling import apply_weights, predict, sample_weights
from symbnn.symmetry.fields import rotations

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of ArviZ, about its own next version
    az = pytest.importorskip("arviz", reason="arviz is not installed")

INPUTS = normal(12, 3)
LABELS = torch.arange(12) % 3
CASES = {
    "labels": (Categorical(), 3, LABELS), "yes or no": (Bernoulli(), 2, (normal(12, 2, seed=1) > 0).double()),
    "counts": (Poisson(), 1, normal(12, 1, seed=1).abs().round()), "numbers": (Gaussian(0.5), 2, normal(12, 2, seed=1)),
    "noise of its own": (HeteroscedasticGaussian(), 4, normal(12, 2, seed=1)),
}


def network(outputs=3):
    torch.manual_seed(0)
    return with_posteriors(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double(), scale=0.3)


def drawn(found):
    """The weights in a group of ArviZ, (draws, *shape)."""
    return {name: torch.tensor(its.values).flatten(0, 1) for name, its in found.posterior.data_vars.items()}


@pytest.mark.parametrize("case", CASES)
def test_arrays_are_those_of_the_likelihood(case):
    likelihood, outputs, targets = CASES[case]
    model = network(outputs)
    found = inference_data(model, (INPUTS, targets), likelihood, draws=24, chains=3)
    weights = drawn(found)
    assert set(weights) == {"0.weight", "0.bias", "2.weight", "2.bias"} and weights["0.weight"].shape == (24, 4, 3)
    expected = likelihood.log_prob(apply_weights(model, INPUTS, weights), targets).detach()
    logs = found.log_likelihood["targets"]
    assert logs.dims == ("chain", "draw", "datum") and logs.shape == (3, 8, 12)
    torch.testing.assert_close(torch.tensor(logs.values).flatten(0, 1), expected, rtol=1e-10, atol=1e-10)
    assert np.array_equal(found.observed_data["targets"].values, targets.numpy())
    assert found.posterior_predictive["targets"].shape == (3, 8, *targets.shape)
    assert found.posterior_predictive["targets"].dims[:3] == ("chain", "draw", "datum")


def test_weights_are_draws_of_the_posterior():
    model = network()
    found = drawn(inference_data(model, (INPUTS, LABELS), draws=400, seed=3))
    same = sample_weights(model, 400, seeded(3))
    assert all(torch.equal(found[name], same[name]) for name in same)
    other = drawn(inference_data(model, (INPUTS, LABELS), draws=400, seed=4))
    assert not torch.equal(other["0.bias"], found["0.bias"])


def test_drawn_targets_have_the_moments_of_the_predictive():
    likelihood, targets = Gaussian(0.5), normal(12, 2, seed=1)
    model, draws = network(2), 4000
    found = inference_data(model, (INPUTS, targets), likelihood, draws=draws)
    values = torch.tensor(found.posterior_predictive["targets"].values).flatten(0, 1)
    outputs = apply_weights(model, INPUTS, drawn(found)).detach()
    expected = outputs.var(0, correction=0) + 0.25
    assert ((values.mean(0) - outputs.mean(0)).abs() < 4.5 * 0.5 / math.sqrt(draws)).all()
    within = values - outputs
    assert abs(float(within.var()) - 0.25) < 4.5 * 0.25 * math.sqrt(2 / within.numel())
    assert ((values.var(0) - expected).abs() < 0.2 * expected).all()
    before = torch.get_rng_state()
    again = inference_data(model, (INPUTS, targets), likelihood, draws=draws)
    assert torch.equal(torch.tensor(again.posterior_predictive["targets"].values).flatten(0, 1), values)
    assert torch.equal(torch.get_rng_state(), before)


def test_leave_one_out_of_a_posterior_that_is_exact():
    targets = 0.5 + normal(30, 1, seed=2)
    plain = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(plain.weight, float(targets.sum()) / 31)
    found = inference_data(with_posteriors(plain, scale=31**-0.5), (torch.ones(30, 1).double(), targets), Gaussian(1.0),
                           draws=4000)
    mean, variance = (targets.sum() - targets) / 30, 1 + 1 / 30
    exact = (-0.5 * math.log(2 * math.pi * variance) - (targets - mean) ** 2 / (2 * variance)).sum()
    loo = az.loo(found)
    assert abs(float(getattr(loo, "elpd_loo", None) or loo.elpd) - float(exact)) < 0.1
    weight = az.summary(found, round_to=6).iloc[0]
    assert abs(float(weight["mean"]) - plain.weight.item()) < 4 / math.sqrt(31 * 4000)
    assert float(weight["r_hat"]) < 1.01


@pytest.mark.skipif(not hasattr(az, "waic"), reason="this version of ArviZ has no WAIC")
def test_waic_is_that_of_the_log_likelihoods():
    found = inference_data(network(), (INPUTS, LABELS), draws=2000)
    logs = torch.tensor(found.log_likelihood["targets"].values).flatten(0, 1)
    expected = (logs.logsumexp(0) - math.log(2000) - logs.var(0, correction=0)).sum()
    assert abs(float(az.waic(found).elpd_waic) - float(expected)) < 1e-6


def test_an_ensemble_has_its_members_as_draws():
    members = [nn.Linear(3, 3).double() for _ in range(6)]
    ensemble = Ensemble(members)
    found = inference_data(ensemble, (INPUTS, LABELS), chains=2)
    assert torch.equal(torch.tensor(found.posterior["weight"].values)[1, 0], members[3].weight.detach())
    expected = Categorical().log_prob(torch.stack([member(INPUTS) for member in members]), LABELS).detach()
    torch.testing.assert_close(torch.tensor(found.log_likelihood["targets"].values).flatten(0, 1), expected)
    with pytest.raises(Refusal, match="6 members"):
        inference_data(ensemble, (INPUTS, LABELS), draws=4)


def test_a_pair_and_chosen_tensors():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    pair = bayesianize(plain, rotations(), (1, 4, 4))
    found = inference_data(pair, (normal(5, 1, 4, 4), LABELS[:5]), draws=8, chains=2, tensors=["1.bias"],
                           predictive=False)
    assert list(found.posterior.data_vars) == ["1.bias"] and not hasattr(found, "posterior_predictive")
    outputs = predict(pair.network, normal(5, 1, 4, 4).float(), weights=sample_weights(pair.network, 8, seeded()))
    torch.testing.assert_close(torch.tensor(found.log_likelihood["targets"].values).flatten(0, 1),
                               Categorical().log_prob(outputs, LABELS[:5]))


class Own(Likelihood):
    def log_prob(self, outputs, targets):
        return -(outputs - targets).square().sum(-1)


def test_a_likelihood_of_ones_own():
    data = INPUTS, normal(12, 3, seed=1)
    found = inference_data(network(), data, Own(), draws=4, chains=2, predictive=False)
    assert found.log_likelihood["targets"].shape == (2, 2, 12)
    with pytest.raises(Refusal, match="distribution"):
        inference_data(network(), data, Own(), draws=4)


@pytest.mark.parametrize(("change", "said"), [
    ({"q": nn.Linear(3, 3)}, "with_posteriors"), ({"draws": 10}, "draws=12"), ({"draws": 0}, "draws"),
    ({"tensors": ["0.weights"]}, "0.weight"), ({"tensors": []}, "0.weight"), ({"likelihood": "gaussian"}, "Gaussian"),
    ({"data": (INPUTS, LABELS + 1)}, "integer label"), ({"seed": -1}, "seed"),
])
def test_what_cannot_be_meant_is_refused(change, said):
    arguments = {"q": network(), "data": (INPUTS, LABELS), "draws": 8, **change}
    with pytest.raises(Refusal, match=said):
        inference_data(**arguments)
