"""The coupled bound: exact for linear predictors, above the error of trained networks, guaranteed, refusals."""
import math

import pytest
import torch
from torch import nn

from helpers import normal, seeded
from helpers_equivariance import which_way_up
from symbnn.equivariance.coupled import coupled_bound, upper_limit
from symbnn.equivariance.predictions import orbit_outputs, orbit_predictions
from symbnn.equivariance.symmetric import bayesianize
from symbnn.errors import Refusal
from symbnn.posterior.divergences import hellinger
from symbnn.posterior.families import FAMILIES
from symbnn.posterior.layers import with_posteriors
from symbnn.posterior.likelihoods import Bernoulli, Categorical, Poisson
from symbnn.posterior.real_targets import Gaussian, HeteroscedasticGaussian, StudentT
from symbnn.symmetry.actions import natural_action
from symbnn.symmetry.fields import field, rotations
from symbnn.symmetry.groups import Permutations
from tolerances import assert_close, within_standard_errors

SHAPE = (1, 4, 4)
TURN = field(rotations(), SHAPE)


def linear(means, scales):
    """A linear predictor of two inputs that are exchanged."""
    pair = bayesianize(nn.Linear(2, 1, bias=False).double(), natural_action(Permutations(2)))
    posterior = pair.network.weight.posterior
    with torch.no_grad():
        posterior.loc.copy_(torch.tensor([means], dtype=torch.float64))
        posterior.log_scale.copy_(torch.tensor([scales], dtype=torch.float64).log())
    return pair


def folded(mean, scale):
    """E |N(mean, scale^2)|."""
    return scale * math.sqrt(2 / math.pi) * math.exp(-mean**2 / (2 * scale**2)) + mean * math.erf(
        mean / (scale * math.sqrt(2)))


@pytest.mark.parametrize(("means", "scales"), [((1.0, 0.6), (0.3, 0.4)), ((0.2, -0.9), (0.1, 0.5)),
                                               ((1.0, 1.0), (0.2, 0.6))])
@pytest.mark.parametrize("x", [(2.0, 5.0), (-1.0, 0.5)])
def test_of_a_linear_predictor_everything_is_known(means, scales, x):
    pair, noise = linear(means, scales), 0.5
    found = coupled_bound(pair.network, pair.action, torch.tensor([x]).double(), 2000, likelihood=Gaussian(noise),
                          generator=seeded())
    mu, sigma, inputs = (torch.tensor(v, dtype=torch.float64) for v in (means, scales, x))
    delta = ((mu - mu.flip(0)) * inputs).sum().item()
    spread = ((sigma - sigma.flip(0)) * inputs).norm().item()
    within_standard_errors(found.distance.value, folded(delta, spread), found.distance.standard_error)
    a, b = ((s * inputs).square().sum().add(noise**2).sqrt() for s in (sigma, sigma.flip(0)))
    assert folded(delta, max((a - b).abs().item(), 1e-12)) <= folded(delta, spread) + 1e-12  # W_1 of the predictives
    grid = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    densities = [torch.distributions.Normal((m * inputs).sum(), s).log_prob(grid).exp()
                 for m, s in ((mu, a), (mu.flip(0), b))]
    error = torch.trapezoid((densities[0] - densities[1]).abs(), grid).item() / 2
    assert error <= found.total_variation.value + 4 * found.total_variation.standard_error
    assert found.total_variation.value <= found.guaranteed and error <= found.guaranteed
    assert error <= hellinger(pair.divergences().log_affinity)[1] + 1e-9  # data processing, with any likelihood
    shifts = delta + spread * torch.randn(10**6, generator=seeded(1)).double()
    exact = torch.erf(shifts.abs() / (2 * math.sqrt(2) * noise))
    within_standard_errors(found.total_variation.value, exact.mean(), found.total_variation.standard_error + 1e-3)


def test_it_is_tight_where_scales_are_invariant():
    pair = linear((1.0, 0.6), (0.3, 0.3))
    found = coupled_bound(pair.network, pair.action, torch.tensor([[2.0, 5.0]]).double(), 16, likelihood=Gaussian(0.5))
    assert_close(found.distance.value, 1.2)
    assert_close(found.measured, 1.2)
    assert found.distance.standard_error < 1e-12


@pytest.mark.parametrize("family", ["gaussian", "laplace"])
def test_it_is_above_the_error_that_predictions_show(family):
    """In expectation; the error of many draws is itself too large by noise."""
    plain, action = which_way_up()
    network = with_posteriors(plain, FAMILIES[family], scale=0.2)
    x = normal(6, *action.input.shape)
    found = coupled_bound(network, action, x, 400, generator=seeded())
    means = orbit_predictions(network, x, action, 4000, generator=seeded(1)).probabilities.mean(0)
    error = ((means[:, 1:] - means[:, :1]).abs().sum(-1) / 2).mean().item()
    bound = found.total_variation
    assert found.measured <= bound.value <= found.guaranteed
    assert error <= bound.value + 4 * bound.standard_error and bound.value < 4 * error


def test_the_mean_of_moved_draws_is_the_prediction_at_moved_inputs():
    """What is compared with is right: the same mean difference as from predictions over orbits."""
    torch.manual_seed(0)
    pair = bayesianize(nn.Conv2d(1, 1, 3, padding=1).double(), TURN, SHAPE, output=TURN, scale=0.01)
    x = normal(3, *SHAPE)
    found = coupled_bound(pair.network, pair.action, x, 512, likelihood=Gaussian(1.0), generator=seeded())
    means = orbit_outputs(pair.network, x, pair.action, 4000, generator=seeded(1)).outputs.mean(0)
    assert abs(found.measured - (means[:, 1:] - means[:, :1]).abs().mean()) < 2e-3 < found.measured / 4


@pytest.mark.parametrize("name", ["labels", "pixels", "yes or no", "field", "heavy tails"])
def test_every_task_has_one_and_invariant_posteriors_have_none(name):
    likelihood = {"field": Gaussian(0.3), "heavy tails": StudentT(0.3), "yes or no": Bernoulli()}.get(
        name, Categorical())
    torch.manual_seed(0)
    if name == "labels":
        pair = bayesianize(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double(), rotations(), SHAPE, scale=0.2)
    else:
        channels = 2 if name == "pixels" else 1
        pair = bayesianize(nn.Conv2d(1, channels, 3, padding=1).double(), TURN, SHAPE, scale=0.2,
                           output=field(rotations(), (channels, 4, 4)))
    x, even = normal(4, *SHAPE), pair.average()
    found, none = (coupled_bound(its.network, its.action, x, 64, likelihood=likelihood, generator=seeded())
                   for its in (pair, even))
    assert 0.01 < found.total_variation.value <= found.guaranteed <= 1 and not found.vacuous
    assert none.total_variation.value < 1e-12 and none.measured < 1e-12
    limit = 7 * math.log(80) / (3 * 63)
    assert none.guaranteed <= limit + 1e-12
    real = name in ("field", "heavy tails")
    assert (found.distance is not None) == real and (not real or found.measured <= found.distance.value)


def test_all_pairs_are_those_of_each_element_as_the_first():
    """The mean over all pairs of different elements, from the same noise; of two elements there is one pair."""
    torch.manual_seed(0)
    pair = bayesianize(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double(), rotations(), SHAPE, scale=0.2)
    x, posterior = normal(4, *SHAPE), pair.network[1].weight.posterior
    found = coupled_bound(pair.network, pair.action, x, 16, generator=seeded(), pairs="all")
    noise, bias = (its.posterior.noise(16, generator) for generator in [seeded()]
                   for its in (pair.network[1].weight, pair.network[1].bias))
    offset = pair.network[1].bias.posterior.loc + pair.network[1].bias.posterior.scale * bias
    p = []
    for g in range(4):
        its = posterior.push_forward(pair.action.parameters["1.weight"](g))
        logits = torch.einsum("scd,nd->snc", its.loc + its.scale * noise, x.flatten(1)) + offset[:, None]
        p.append(logits.softmax(-1))
    expected = torch.stack([(a - b).abs().sum(-1) / 2 for i, a in enumerate(p) for b in p[:i]]).mean().item()
    assert_close(found.total_variation.value, expected)
    assert found.pairs == "all" and found.measured <= found.total_variation.value
    two = linear((1.0, 0.6), (0.3, 0.4))
    both = [coupled_bound(two.network, two.action, torch.tensor([[2.0, 5.0]]).double(), 16, likelihood=Gaussian(0.5),
                          generator=seeded(), pairs=pairs) for pairs in ("identity", "all")]
    assert both[0].total_variation == both[1].total_variation
    with pytest.raises(Refusal, match="identity, all"):
        coupled_bound(pair.network, pair.action, x, 16, pairs="some")


@pytest.mark.parametrize("p", [0.003, 0.05, 0.5])
def test_the_limit_holds_as_often_as_promised(p):
    draws, confidence = 128, 0.9
    values = (torch.rand(2000, draws, generator=seeded()) < p).double()
    limits = torch.tensor([upper_limit(its, confidence) for its in values], dtype=torch.float64)
    assert (limits >= p).double().mean() >= confidence - 4 * math.sqrt(0.1 * 0.9 / 2000)
    log = math.log(2 / 0.1)
    assert (limits <= values.mean(1) + math.sqrt(log / (2 * draws)) + 1e-12).all()


def test_the_limit_is_the_smaller_of_two_formulas():
    x = torch.rand(50, generator=seeded()).double()
    log = math.log(40)
    hoeffding = x.mean() + math.sqrt(log / 100)
    bernstein = x.mean() + math.sqrt(2 * x.var() * math.log(80) / 50) + 7 * math.log(80) / (3 * 49)
    assert_close(upper_limit(x), min(hoeffding, bernstein))
    assert_close(upper_limit(torch.zeros(200)), 7 * math.log(80) / (3 * 199))
    assert upper_limit(x * 0 + 1) == 1


def conv(**options):
    return bayesianize(nn.Conv2d(1, 1, 3, padding=1).double(), TURN, SHAPE, output=TURN, **options)


@pytest.mark.parametrize(("call", "said"), [
    (lambda: coupled_bound(conv(only=["bias"]).network, conv(only=["bias"]).action, normal(2, *SHAPE), 8,
                           likelihood=Gaussian(0.1)), "without a posterior"),
    (lambda: coupled_bound(conv().network, conv().action, normal(2, *SHAPE), 8, likelihood=Poisson()), "formula"),
    (lambda: coupled_bound(conv().network, conv().action, normal(2, *SHAPE), 8,
                           likelihood=Gaussian(torch.rand(1, 4, 4) + 0.1)), "noise"),
    (lambda: coupled_bound(conv().network, conv().action, normal(2, *SHAPE), 1, likelihood=Gaussian(0.1)), "draws"),
    (lambda: coupled_bound(conv().network, conv().action, normal(2, *SHAPE), 8, likelihood="gaussian"), "likelihood"),
    (lambda: coupled_bound(conv().network, conv().action, normal(2, *SHAPE), 8, likelihood=Gaussian(0.1),
                           confidence=95), "confidence"),
    (lambda: coupled_bound(nn.Conv2d(1, 1, 3), conv().action, normal(2, *SHAPE), 8), "posterior"),
    (lambda: coupled_bound(conv().network, conv().action, normal(2, *SHAPE), 8,
                           likelihood=HeteroscedasticGaussian()), "formula"),
    (lambda: upper_limit(torch.tensor([0.5])), "at least two"),
    (lambda: upper_limit(torch.tensor([0.5, 2])), "0 and 1"),
    (lambda: upper_limit(torch.tensor([0.5, math.nan])), "0 and 1"),
])
def test_what_has_no_such_bound_is_refused(call, said):
    with pytest.raises(Refusal, match=said):
        call()
