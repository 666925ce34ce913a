"""Information about a symmetry: known answers, promised sides, gradients, subgroups, refusals."""
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from helpers import seeded
from helpers_hidden_units import moved_density, permuted, pooled_convolution, spread_means, two_layers
from symbnn.equivariance.mixture import OrbitMixture
from symbnn.errors import Refusal
from symbnn.estimates import Estimate
from symbnn.hidden_units.modes import unit_coordinates
from symbnn.hidden_units.mutual_information import (
    InformationEstimator,
    infonce,
    mutual_information,
)
from symbnn.hidden_units.permanents import log_bethe_permanent
from symbnn.hidden_units.unit_densities import unit_log_densities
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.layers import variational_tensors, with_posteriors
from symbnn.posterior.priors import isotropic
from symbnn.posterior.sampling import sample_weights
from symbnn.symmetry.actions import Action, natural_action, sign_change
from symbnn.symmetry.fields import field, rotations
from symbnn.symmetry.groups import Permutations
from symbnn.symmetry.networks import NetworkAction, network_action, unit_permutations
from symbnn.symmetry.signed_permutations import SignedPermutation
from tolerances import assert_close, exact32, exact64, within_standard_errors

# InfoNCE by itself


@pytest.mark.parametrize("rho", (0.0, 0.5, 0.8))
def test_infonce_on_two_correlated_gaussians(rho):
    draws, K, noise = 4000, 400, seeded(1)
    y = torch.randn(draws, K, generator=noise, dtype=torch.float64)
    x = rho * y[:, :1] + math.sqrt(1 - rho**2) * torch.randn(draws, 1, generator=noise, dtype=torch.float64)
    found = infonce(-((x - rho * y) ** 2) / (2 * (1 - rho**2)))
    bias = (1 / (1 - rho**2) - 1) / (2 * K)
    within_standard_errors(found.mean() + bias, -math.log(1 - rho**2) / 2, found.std() / draws**0.5)
    assert (found <= math.log(K) + 1e-12).all()


def test_infonce_by_hand():
    assert_close(infonce(torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64)), [math.log(2 / 4)])
    for single in (torch.zeros(3, 1), torch.zeros(()), [[0.0, 1.0]]):
        with pytest.raises(Refusal, match=r"negatives|torch\.as_tensor"):
            infonce(single)
    own, negatives = torch.zeros(3), torch.zeros(3, 1)
    assert_close(infonce(torch.cat([own[:, None], negatives], 1)), [0.0] * 3)  # as the refusal says


# Exact values


@pytest.mark.parametrize("mu", (0.0, 0.5, 1.5, 4.0))
def test_two_component_mixture_by_quadrature(mu):
    plain = nn.Sequential(nn.Linear(1, 1, bias=False)).double()
    network = with_posteriors(plain, MeanFieldGaussian, 1.0, isotropic(1.0))
    with torch.no_grad():
        network[0].weight.posterior.loc.fill_(mu)
    found = mutual_information(network, network_action(network, sign_change(1)), draws=10_000, generator=seeded(2))
    w = np.linspace(mu - 12, mu + 12, 20001)
    density = np.exp(-((w - mu) ** 2) / 2) / math.sqrt(2 * math.pi)
    exact = np.sum(density * (math.log(2) - np.logaddexp(0, -2 * mu * w))) * (w[1] - w[0])
    assert found.method == "enumeration" and found.kind == "exact" and found.within == 0
    within_standard_errors(found.value, exact, found.standard_error)


@pytest.mark.parametrize("family", (MeanFieldGaussian, Laplace))
def test_permanent_equals_enumeration_draw_by_draw(family):
    network = two_layers(family=family)
    weights = sample_weights(network, 20, seeded())
    permanent, listed = (InformationEstimator(network, permuted(network), m) for m in ("permanent", "enumeration"))
    assert_close(permanent.values(weights), listed.values(weights), 1e-10)
    mixture, q = OrbitMixture(network, permuted(network)), variational_tensors(network)
    own = sum(t.posterior.log_prob(weights[name]) for name, t in q.items())
    assert_close(permanent.values(weights), own - mixture.log_prob(weights), 1e-10)


@pytest.mark.parametrize("method",
                         ("permanent", "marginal", "infonce", "importance", "importance_upper", "enumeration"))
def test_an_invariant_posterior_knows_nothing(method):
    network = two_layers(separation=0.0)
    assert_close(mutual_information(network, permuted(network), method, draws=20, generator=seeded()).value, 0.0)


@pytest.mark.parametrize("method", ("permanent", "bethe", "capacity", "importance", "importance_upper", "enumeration"))
def test_far_units_know_everything(method):
    network = two_layers(separation=60.0)
    found = mutual_information(network, permuted(network), method, draws=20, generator=seeded())
    assert_close(found.ceiling, math.log(120))
    assert_close(found.value, math.log(120), 0.05 if method.startswith("importance") else 1e-6)


def test_what_single_units_know_by_hand():
    """One row of the matrix at a time: the density of a unit's weights under its law against the mean of all laws."""
    network = two_layers(units=3)
    action, weights = permuted(network), sample_weights(network, 4, seeded())
    estimator = InformationEstimator(network, action, "marginal")
    densities = unit_log_densities(network, weights, unit_coordinates(action, "0")).exp()
    expected = sum((densities[:, j, j] / densities[:, j].mean(-1)).log() for j in range(3))
    assert_close(estimator.values(weights), expected)
    assert estimator.kind == "upper" and estimator.within == math.inf
    far = two_layers(units=3, separation=60.0)
    found = mutual_information(far, permuted(far), "marginal", draws=5, generator=seeded())
    assert_close(found.value, 3 * math.log(3))


def repeated(weights, times):
    """Every draw `times` times, one after the other."""
    return {name: weight.detach().repeat_interleave(times, 0) for name, weight in weights.items()}


def check_moments(values, outcomes, chances):
    """Means and variances over repetitions of draws (S, times) against those of outcomes (S, O) with these chances."""
    outcomes, chances = torch.stack(outcomes, -1), torch.stack(chances, -1)
    assert_close(chances.sum(-1), torch.ones(len(chances)))
    mean = (chances * outcomes).sum(-1)
    centred = outcomes - mean[:, None]
    variance, fourth = ((chances * centred**k).sum(-1) for k in (2, 4))
    times = values.shape[1]
    within_standard_errors(values.mean(1), mean, (variance / times).sqrt())
    error = ((fourth - variance**2).clamp_min(0) / times).sqrt()
    within_standard_errors((values - mean[:, None]).square().mean(1), variance, error)
    assert (error < 0.01 * variance).any()  # of some draw, four errors are less than five percent


ORDERINGS = torch.tensor(list(itertools.permutations(range(3))))


def matrix_and_estimator(method):
    """Three draws of a network of three units, each many times: the estimates, and the matrix of log-densities."""
    times, network = 20_000, two_layers(units=3, separation=0.3)
    action, weights = permuted(network), sample_weights(network, 3, seeded(8))
    estimator = InformationEstimator(network, action, method, K=2)
    values = estimator.values(repeated(weights, times), seeded(9)).detach().view(3, times)
    log_a = unit_log_densities(network, weights, unit_coordinates(action, "0")).detach()
    products = torch.stack([log_a[:, order, torch.arange(3)].sum(-1) for order in ORDERINGS], -1)
    return values, log_a, products - products[:, :1]


def test_infonce_at_two_has_the_moments_of_six_equal_cases():
    values, _, products = matrix_and_estimator("infonce")
    outcomes = [math.log(2) - torch.logaddexp(products[:, 0], products[:, i]) for i in range(6)]
    check_moments(values, outcomes, [torch.full((3,), 1 / 6, dtype=torch.float64)] * 6)


def chances_by_hand(marginals):
    """The law of the proposals over the six permutations: columns in turn, rows that are left, 0.1 of them uniform."""
    n, mixed, found = 3, marginals * (1 - 0.1 / 3) + 0.1 / 9, []
    for order in ORDERINGS.tolist():
        chance, left = 1.0, list(range(n))
        for column, row in enumerate(order):
            chance = chance * mixed[:, row, column] / mixed[:, left, column].sum(-1)
            left.remove(row)
        found.append(chance)
    return torch.stack(found, -1)


@pytest.mark.parametrize("method", ("importance", "importance_upper"))
def test_importance_at_two_has_the_moments_of_all_cases(method):
    """The lower bound averages the identity and one proposal, the upper bound two proposals."""
    values, log_a, products = matrix_and_estimator(method)
    marginals = log_bethe_permanent(log_a - log_a.diagonal(0, -2, -1)[..., None], 1e-3).marginals
    chances = chances_by_hand(marginals)
    ratios = products - chances.log()
    pairs = [(0, i) for i in range(6)] if method == "importance" else list(itertools.product(range(6), repeat=2))
    outcomes = [math.lgamma(4) + math.log(2) - torch.logaddexp(ratios[:, i], ratios[:, j]) for i, j in pairs]
    weights = [chances[:, j] * (1.0 if method == "importance" else chances[:, i]) for i, j in pairs]
    check_moments(values, outcomes, weights)


def test_infonce_over_a_listed_group_has_the_moments_of_its_elements():
    """Exchanged inputs of one layer: the other element is e or g, with equal chances."""
    torch.manual_seed(0)
    network = with_posteriors(nn.Linear(2, 1, bias=False).double(), scale=0.7)
    action = network_action(network, natural_action(Permutations(2)))
    weights = sample_weights(network, 2, seeded(8))
    estimator = InformationEstimator(network, action, "infonce", K=2)
    assert not estimator.whole
    values = estimator.values(repeated(weights, 4000), seeded(9)).detach().view(2, 4000)
    posterior, drawn = network.weight.posterior, weights["weight"].detach()
    own, other = posterior.log_prob(drawn).detach(), posterior.log_prob(drawn.flip(-1)).detach()
    outcomes = [torch.zeros(2).double(), math.log(2) + own - torch.logaddexp(own, other)]
    distance = (values[..., None] - torch.stack(outcomes, -1)[:, None]).abs()
    assert distance.amin(-1).max() < exact64 and outcomes[1].abs().min() > 1e-3
    within_standard_errors(distance.argmin(-1).double().mean(1), 0.5, 0.5 / 4000**0.5)


def test_infonce_saturates():
    network = two_layers(separation=60.0)
    found = mutual_information(network, permuted(network), "infonce", K=7, draws=400, generator=seeded())
    assert found.value <= math.log(7) and found.value > math.log(7) - 0.1  # a draw may name the identity again


# Sides


SEPARATIONS = (0.0, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0)


@pytest.mark.parametrize("separation", SEPARATIONS)
def test_sides_with_the_same_draws(separation):
    """Bethe and capacity are on their sides of each draw; sampled bounds in the mean."""
    network = two_layers(units=8, separation=separation)
    action, weights = permuted(network), sample_weights(network, 300, seeded(3))

    def values(method, K=2):
        return InformationEstimator(network, action, method, K).values(weights, seeded(4)).detach()

    exact = values("permanent")
    assert exact.mean() <= math.lgamma(9) and (exact <= math.lgamma(9) + 1e-9).all()
    bethe, capacity = values("bethe") - exact, values("capacity") - exact
    assert (bethe >= -1e-6).all() and (bethe <= 4 * math.log(2) + 1e-6).all()
    assert (capacity <= 1e-6).all() and (capacity >= -(8 * math.log(8) - math.lgamma(9)) - 0.01).all()

    def beyond(method, K=2):
        difference = values(method, K) - exact
        return difference.mean(), 4 * difference.std() / 300**0.5 + 1e-9

    gap, error = beyond("marginal")
    assert gap >= -error and values("marginal").max() <= 8 * math.log(8) + 1e-9
    previous = -math.inf
    for K in (5, 20, 500):
        gap, error = beyond("infonce", K)
        assert gap <= error and gap >= previous - error
        assert values("infonce", K).max() <= math.log(K) + 1e-9
        previous = gap
    for K in (4, 64):
        gap, error = beyond("importance", K)
        assert gap <= error
        above, upper_error = beyond("importance_upper", K)
        assert above >= -upper_error
        assert above - gap < (2.0 if K == 4 else 1.0)


def test_importance_proposals_escape_the_saturation():
    network = two_layers(units=8, separation=1.5)
    action = permuted(network)
    plain, better = (mutual_information(network, action, m, K=20, draws=200, generator=seeded(5))
                     for m in ("infonce", "importance"))
    exact = mutual_information(network, action, "permanent", draws=200, generator=seeded(5))
    assert plain.value < math.log(20) < better.value - 5 and abs(better.value - exact.value) < 0.5


@pytest.mark.parametrize("method", ("importance", "importance_upper"))
def test_proposals_know_units_from_laws(method):
    """Each unit fits its own law and the next one's: the permanent is 2, of the identity and of one long cycle."""
    network = two_layers(units=6)
    log_a = torch.full((40, 6, 6), -50.0, dtype=torch.float64)
    for j in range(6):
        log_a[:, j, [j, (j + 1) % 6]] = 0.0
    values = InformationEstimator(network, permuted(network), method, K=300)._of_matrix(log_a, seeded(25))
    assert abs(values.mean() - (math.log(720) - math.log(2))) < 0.1


def test_first_order_bias_of_infonce():
    """I - I_K = chi / 2K with chi = E[q / q^G] - 1, where K is large against exp(I)."""
    network = two_layers(units=3, separation=0.25)
    action, weights = permuted(network), sample_weights(network, 40_000, seeded(6))
    exact = InformationEstimator(network, action, "permanent").values(weights).detach()
    K = 40
    gap = exact - InformationEstimator(network, action, "infonce", K).values(weights, seeded(7)).detach()
    predicted = (exact.exp() - 1) / (2 * K)
    difference = gap - predicted
    assert predicted.mean() > 8 * difference.std() / 200  # the bias is seen
    within_standard_errors(difference.mean(), 0.0, difference.std() / 200)


# Gradients


@pytest.mark.parametrize("method", ("permanent", "bethe", "marginal", "capacity", "enumeration"))
@pytest.mark.parametrize("family", (MeanFieldGaussian, Laplace))
def test_gradients_equal_finite_differences(method, family, monkeypatch):
    network = two_layers(units=4, separation=0.5, inputs=2, family=family)
    estimator = InformationEstimator(network, permuted(network, 2), method)

    def cost():
        return estimator.values(sample_weights(network, 3, seeded(8))).mean()

    parameters = dict(network.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(cost(), parameters.values(), allow_unused=True)))
    assert gradients["0.weight.posterior.loc"].abs().max() > 0.01
    assert gradients["2.weight.posterior.log_scale"].abs().max() > 0.01
    monkeypatch.setattr("symbnn.hidden_units.mutual_information._TOLERANCE", 1e-13)  # for the values alone
    for name in ("0.weight.posterior.loc", "0.bias.posterior.log_scale", "2.weight.posterior.loc"):
        flat = parameters[name].data.view(-1)
        for i in range(0, len(flat), 2):
            start, step = flat[i].item(), 1e-5
            with torch.no_grad():
                flat[i] = start + step
                above = cost()
                flat[i] = start - step
                below = cost()
                flat[i] = start
            slope, found = (above - below).item() / (2 * step), gradients[name].view(-1)[i].item()
            assert abs(slope - found) <= 1e-5 * max(abs(slope), 0.01)


def test_single_precision_networks_and_tiny_densities():
    """Log-densities near -100 000 a unit, in a float32 network, against the same network in float64."""
    single, double = (two_layers(units=4, inputs=300, separation=0.0, dtype=t) for t in (torch.float32, torch.float64))
    noise = seeded(9)
    for network in (single, double):
        with torch.no_grad():
            noise = seeded(9)
            for tensor in variational_tensors(network).values():
                tensor.posterior.loc.copy_(1 + 1e-3 * torch.randn(tensor.posterior.shape, generator=noise))
                tensor.posterior.log_scale.fill_(math.log(1e-3))
    weights = sample_weights(single, 5, seeded(10))
    wide = {name: w.double() for name, w in weights.items()}
    for method in ("permanent", "bethe", "marginal", "capacity"):
        one = InformationEstimator(single, permuted(single, 300), method).values(weights)
        two = InformationEstimator(double, permuted(double, 300), method).values(wide)
        assert one.dtype == torch.float64
        assert_close(one, two, 1e-3)
    far = {name: w + 0.15 for name, w in weights.items()}  # 150 deviations away
    log_a = unit_log_densities(single, far, unit_coordinates(permuted(single, 300), "0"))
    assert log_a.max() < -1e5 and log_a.isfinite().all()
    for method in ("permanent", "bethe", "capacity"):
        assert InformationEstimator(single, permuted(single, 300), method).values(far).isfinite().all()


def test_wide_layers_in_single_precision_agree(monkeypatch):
    network = two_layers(units=60, separation=0.5)
    weights = sample_weights(network, 3, seeded(11))
    monkeypatch.setattr("symbnn.hidden_units.mutual_information._TOLERANCE", 1e-6)
    for method in ("bethe", "capacity"):
        estimator = InformationEstimator(network, permuted(network), method)
        expected = estimator.values(weights)
        monkeypatch.setattr("symbnn.hidden_units.mutual_information._WIDE", 10)
        rounded = estimator.values(weights)
        monkeypatch.setattr("symbnn.hidden_units.mutual_information._WIDE", 256)
        assert not torch.equal(rounded, expected)
        assert_close(rounded, expected, 10 * exact32)  # a sum over 3,600 entries


# Deep networks, other groups, and the choice of a method


def deep(widths=(2, 3, 4, 3), scale=0.5):
    torch.manual_seed(0)
    hidden = [layer for n, m in itertools.pairwise(widths) for layer in (nn.Linear(n, m), nn.Tanh())]
    network = nn.Sequential(*hidden, nn.Linear(widths[-1], 1)).double()
    return spread_means(with_posteriors(network, MeanFieldGaussian, scale=scale, prior=isotropic(1.0)), 0.4)


def test_subgroups_of_deep_networks_bound_from_below():
    network = deep()
    action = unit_permutations(network, (2,))
    assert InformationEstimator(network, action).method == "enumeration"  # 3! 4! 3! = 864 elements
    part = InformationEstimator(network, action, "permanent")
    assert set(part.classes) == {"0", "4"} and part.kind == "lower" and part.method == "permanent"
    assert all(InformationEstimator(network, action, m).kind == "estimate" for m in ("bethe", "marginal"))
    assert InformationEstimator(network, action, "capacity").kind == "lower"
    assert all(InformationEstimator(network, action, m).within == math.inf for m in ("permanent", "bethe", "capacity"))
    assert InformationEstimator(network, action, "infonce").kind == "lower"
    weights = sample_weights(network, 200, seeded(12))
    whole = InformationEstimator(network, action, "enumeration").values(weights).detach()
    difference = whole - part.values(weights).detach()
    assert difference.mean() > 4 * difference.std() / 200**0.5
    bound = InformationEstimator(network, action, "infonce", K=64).values(weights, seeded(13))
    gap = bound.detach() - whole
    assert gap.mean() < 4 * gap.std() / 200**0.5


def test_the_subgroup_alone_is_exact():
    """The two outer layers of the network above as a group of their own, listed element by element."""
    network = deep()
    action = unit_permutations(network, (2,))
    weights = sample_weights(network, 20, seeded(14))
    found = InformationEstimator(network, action, "permanent").values(weights)
    same = (0, 1, 2, 3)
    ratios = [moved_density(network, action, weights, (a, same, b))
              for a in itertools.permutations(range(3)) for b in itertools.permutations(range(3))]
    own = moved_density(network, action, weights, action.group.identity())
    assert_close(found, own - torch.stack(ratios).logsumexp(0) + math.log(36), 1e-10)


def test_the_heavier_subgroup_is_taken():
    assert set(InformationEstimator(deep((2, 3, 8, 3)), unit_permutations(deep((2, 3, 8, 3)), (2,))).classes) == {"2"}


def test_data_symmetries_by_the_same_function():
    network = pooled_convolution()
    action = network_action(network, field(rotations(), (1, 6, 6)))
    found = mutual_information(network, action, draws=200, generator=seeded(15))
    expected = OrbitMixture(network, action).mutual_information(200, seeded(15))
    assert found.method == "enumeration" and found.ceiling == math.log(4) and 0 < found.value < math.log(4)
    assert_close(found.value, expected.value, 1e-10)
    assert_close(found.standard_error, expected.standard_error, 1e-10)


def test_infonce_on_a_small_group_tends_to_the_exact_value():
    network = pooled_convolution(scale=1.0)
    action = network_action(network, field(rotations(), (1, 6, 6)))
    weights = sample_weights(network, 150, seeded(16))
    exact = InformationEstimator(network, action).values(weights).detach()
    for K, near in ((3, 2.0), (100, 0.1)):
        gap = InformationEstimator(network, action, "infonce", K).values(weights, seeded(17)).detach() - exact
        assert gap.mean() <= 4 * gap.std() / 150**0.5 and gap.mean() >= -near


@pytest.mark.parametrize("units, method, kind", ((2, "permanent", "exact"), (16, "permanent", "exact"),
                                                 (17, "bethe", "upper"), (40, "bethe", "upper")))
def test_auto_chooses_by_size_and_says_so(units, method, kind):
    network = two_layers(units=units)
    found = mutual_information(network, permuted(network), draws=2, generator=seeded())
    assert (found.method, found.kind) == (method, kind) and f"{units} units" in found.reason
    assert method in str(found) and {"exact": "=", "upper": "≤"}[kind] in str(found)
    assert_close(found.within, 0.0 if kind == "exact" else units * math.log(2) / 2)
    assert_close(found.ceiling, math.lgamma(units + 1), 1e-10)


def test_how_far_the_sides_can_be():
    """Bethe by n log(2) / 2, the capacity by log(n^n / n!), summed over the layers."""
    network = two_layers(units=7)
    bethe, capacity = (InformationEstimator(network, permuted(network), method) for method in ("bethe", "capacity"))
    assert_close(bethe.within, 7 * math.log(2) / 2)
    assert_close(capacity.within, math.log(7**7 / math.factorial(7)))


def test_auto_elsewhere():
    alone = two_layers(units=1)
    assert mutual_information(alone, permuted(alone), draws=2).value == 0
    wide = deep((2, 3, 20, 3))
    assert InformationEstimator(wide, unit_permutations(wide, (2,))).method == "capacity"
    torch.manual_seed(0)
    full = with_posteriors(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double(), FullGaussian, 0.5,
                           isotropic(1.0))
    estimator = InformationEstimator(full, unit_permutations(full, (2,)), K=4)
    assert estimator.method == "infonce" and "FullGaussian" in estimator.reason
    assert estimator(draws=4, generator=seeded()).value <= math.log(4)


def test_standard_error_and_seed():
    network = two_layers()
    estimator = InformationEstimator(network, permuted(network))
    first, again = (estimator(300, seeded(18)) for _ in range(2))
    assert first.value == again.value
    values = estimator.values(sample_weights(network, 300, seeded(18))).detach()
    assert_close(first.value, values.mean())
    assert_close(first.standard_error, values.std() / 300**0.5)
    with pytest.raises(Refusal, match="needs two"):
        estimator(1)


def test_draws_are_taken_in_pieces(monkeypatch):
    network = two_layers()
    monkeypatch.setattr("symbnn.hidden_units.mutual_information._AT_ONCE", 50)
    seen = []

    def recorded(network, draws, generator):
        seen.append(sample_weights(network, draws, generator))
        return seen[-1]

    monkeypatch.setattr("symbnn.hidden_units.mutual_information.sample_weights", recorded)
    found = mutual_information(network, permuted(network), draws=5, generator=seeded())
    assert [len(weights["0.bias"]) for weights in seen] == [2, 2, 1]
    together = {name: torch.cat([weights[name] for weights in seen]) for name in seen[0]}
    values = InformationEstimator(network, permuted(network)).values(together)
    assert_close(found.value, values.mean())
    assert values.requires_grad and isinstance(found, Estimate)


# Refusals


def test_what_is_refused_and_what_is_proposed():
    network, wide, pooled = two_layers(), two_layers(units=21), pooled_convolution()
    for arguments, words in (
        ((network, permuted(network), "infonce", 2, 1), "at least 2 as the number K"),
        ((network, permuted(network), "importance", 2, 1), "at least 2 as the number K"),
        ((network, permuted(network), "exakt"), "misspelt"),
        ((wide, permuted(wide), "permanent"), 'method="bethe"'),
        ((pooled, network_action(pooled, field(rotations(), (1, 6, 6))), "bethe"), "enumeration"),
        ((network, permuted(two_layers(units=6))), "another network"),
        ((network, unit_permutations(deep(), (2,))), "another network"),
    ):
        with pytest.raises(Refusal, match=words):
            mutual_information(*arguments)


def test_correlated_families_are_refused_by_name():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    network = with_posteriors(plain, FullGaussian, 0.5, isotropic(1.0))
    with pytest.raises(Refusal, match="FullGaussian"):
        mutual_information(network, unit_permutations(network, (2,)), "permanent")


def test_an_action_that_changes_the_function_is_refused():
    network = two_layers(units=3)
    action = permuted(network)
    still = Action.trivial(action.group, action.parameters["2.weight"].shape)
    broken = NetworkAction(action.group, action.input, action.output, {**action.parameters, "2.weight": still},
                           action.layers, action.channels)
    with pytest.raises(Refusal, match="commutes"):
        mutual_information(network, broken)


class Residual(nn.Module):
    """A hidden layer added to itself: its square matrix belongs to two units at once."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x):
        """The output."""
        h = torch.tanh(self.first(x))
        return self.last(h + torch.tanh(self.inner(h)))


def test_an_action_that_is_wrong_for_one_generator_is_refused():
    network = with_posteriors(nn.Linear(4, 2).double())
    right = network_action(network, natural_action(Permutations(4)))
    for bad in right.group.generators():
        output = Action(right.group, (2,), lambda g, bad=bad: SignedPermutation([g == bad, g != bad], [1, 1]))
        with pytest.raises(Refusal, match="commutes with the group"):
            InformationEstimator(network, dataclasses.replace(right, output=output), "enumeration")


def test_units_tied_by_a_sum_are_left_to_infonce_or_enumeration():
    torch.manual_seed(0)
    network = with_posteriors(Residual().double(), MeanFieldGaussian, 0.5, isotropic(1.0))
    action = unit_permutations(network, (2,))
    with pytest.raises(Refusal, match="share weights"):
        InformationEstimator(network, action, "permanent")
    assert InformationEstimator(network, action).method == "enumeration"
    assert InformationEstimator(network, action, "infonce").method == "infonce"


@pytest.mark.parametrize("scales", ((1.0, 2.0, 3.0), (1.0, 1.0, 2.0)))  # the exchange of two leaves the second
def test_norms_with_parameters_are_refused(scales):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2))
    with torch.no_grad():
        plain[1].weight.copy_(torch.tensor(scales))
    network = with_posteriors(plain, MeanFieldGaussian, 0.5, isotropic(1.0)).eval()
    with pytest.raises(Refusal, match="a posterior for every weight that the group moves"):
        mutual_information(network, unit_permutations(network, (1, 4, 4)))


def test_on_a_gpu(require_cuda):
    network = two_layers(units=6).to(require_cuda)
    noise = torch.Generator(require_cuda).manual_seed(0)
    for method in ("permanent", "bethe", "capacity", "infonce", "importance"):
        found = mutual_information(network, permuted(network), method, draws=8, generator=noise)
        assert math.isfinite(found.value)


@pytest.mark.parametrize("norm", [nn.LayerNorm(5), nn.BatchNorm1d(5), nn.BatchNorm1d(5, affine=False)], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_fresh_norms_and_frozen_layers_do_not_count(norm, frozen):
    """A norm that treats all units alike leaves the exchange of units a symmetry; frozen weights know nothing."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh(), nn.Linear(5, 1)).double()
    if frozen:
        plain[0].weight.requires_grad_(False)
        with torch.no_grad():
            plain[0].weight.copy_(plain[0].weight[:1].expand(5, 4))  # all units alike
    network = with_posteriors(plain, MeanFieldGaussian, 1.0, isotropic(1.0)).train()
    action = unit_permutations(network, (4,))
    kept = {name: value.clone() for name, value in network.named_buffers()}
    found = mutual_information(network, action, draws=64, generator=seeded(1))
    assert found.method == "permanent"
    assert all(torch.equal(value, kept[name]) for name, value in network.named_buffers())
    exact = OrbitMixture(network, action).mutual_information(256, seeded(2))
    difference = abs(found.value - exact.value)
    assert difference < 4 * math.hypot(found.standard_error, exact.standard_error)


def test_units_without_any_posterior_are_named():
    plain = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    for layer in (plain[0], plain[2]):
        layer.requires_grad_(False)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(parameter.flatten()[0].item())
    network = with_posteriors(plain, MeanFieldGaussian, 1.0, isotropic(1.0))
    estimator = InformationEstimator(network, unit_permutations(network, (4,)))
    assert "no weight of the units of '0'" in estimator.subgroup.excluded
    assert not estimator.whole
