"""The orbit mixture: its density, draws and information, and what it adds to the ELBO."""

import copy
import math

import pytest
import torch
from torch import nn

from helpers import normal, seeded
from helpers_equivariance import FOUND, defect, dense, pair, pushes
from symbnn.equivariance.averages import average, symmetrize, symmetrize_
from symbnn.equivariance.metrics import defect_unbiased, nll
from symbnn.equivariance.mixture import OrbitMixture, orbit_average
from symbnn.equivariance.predictions import orbit_predictions
from symbnn.errors import Refusal
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.layers import kl_sum, variational_tensors, with_posteriors
from symbnn.posterior.likelihoods import Categorical
from symbnn.posterior.log_normal import LogNormal
from symbnn.posterior.priors import isotropic, random_means
from symbnn.posterior.sampling import apply_weights, predict, sample_weights
from symbnn.symmetry.actions import natural_action, regular_channels
from symbnn.symmetry.groups import Cyclic, Permutations
from symbnn.symmetry.networks import network_action, unit_permutations
from tolerances import assert_close, exact32, exact64, within_standard_errors

MIXED = {
    "gaussian": lambda: dense(4, 3, 2),
    "laplace": lambda: dense(4, 3, 2, Laplace),
    "lognormal": lambda: dense(4, 3, 2, LogNormal),
    "full": lambda: dense(4, 3, 2, FullGaussian),
}
RING = regular_channels(Cyclic(4))


def on_ring(name):
    network = MIXED[name]()
    return network, network_action(network, RING)


@pytest.mark.parametrize("name", MIXED)
def test_log_density_of_the_mixture(name):
    """Against push-forwards (of densities, by hand where the family is not closed), draw by draw."""
    network, action = on_ring(name)
    mixture = OrbitMixture(network, action)
    weights = mixture.sample(50, seeded(1))
    posteriors = {key: tensor.posterior for key, tensor in variational_tensors(network).items()}

    def density(g, key, q):
        if name == "lognormal":  # the mask moves too: a member with the moved mask
            unsigned = action.parameters[key].absolute()
            q = LogNormal(*(unsigned.act(g, value.expand(q.shape)) for value in (q.loc, q.log_scale)),
                          action.parameters[key].act(g, q.mask.expand(q.shape)))
            return q.log_prob(weights[key])
        return q.push_forward(action.parameters[key](g)).log_prob(weights[key])

    expected = [sum(density(g, key, q) for key, q in posteriors.items()) for g in action.group.elements()]
    assert_close(mixture.log_prob(weights), torch.stack(expected).logsumexp(0) - math.log(4))
    assert mixture.log_prob(weights).isfinite().all()
    if name != "lognormal":  # where some are -inf
        assert_close(mixture.log_densities(weights), torch.stack(expected))
    single = OrbitMixture(copy.deepcopy(network).float(), action)
    narrow = {key: value.float() for key, value in weights.items()}
    assert single.log_prob(narrow).dtype == torch.float64
    assert_close(single.log_prob(narrow), mixture.log_prob(weights), exact32)
    for g in action.group.elements():
        assert_close(mixture.log_prob(action.act(g, weights)), mixture.log_prob(weights))


def test_draws_of_the_mixture():
    """Moments of the mixture are means of moments; each draw is one of the turns of the draw in its place."""
    network, action = on_ring("gaussian")
    mixture, q = OrbitMixture(network, action), network[0].weight.posterior
    draws, plain = mixture.sample(40_000, seeded(1)), sample_weights(network, 40_000, seeded(1))
    turned = torch.stack([action.act(g, plain)["0.weight"] for g in action.group.elements()])
    distance = (turned - draws["0.weight"]).abs().amax((-2, -1))
    chosen = distance.argmin(0)
    assert (distance.amin(0) == 0).all()
    share = chosen.bincount(minlength=4) / 40_000
    within_standard_errors(share, 0.25, math.sqrt(0.25 * 0.75 / 40_000))
    assert (turned[chosen, torch.arange(40_000)] == draws["0.weight"]).all()
    first, variance = average(q, action.parameters["0.weight"], "arithmetic").mean, average(
        q, action.parameters["0.weight"], "arithmetic").variance
    within_standard_errors(draws["0.weight"].mean(0), first, (variance / 40_000).sqrt())
    squares = (draws["0.weight"] - first) ** 2
    within_standard_errors(squares.mean(0), variance, squares.std(0) / 200)


def grid_information(q, action):
    """I on a grid of two weights."""
    line = torch.linspace(-9, 9, 1801, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
    logs = torch.stack([p.log_prob(grid) for p in pushes(q, action)])
    value = logs[0].exp() * (logs[0] - logs.logsumexp(0) + math.log(len(logs)))
    return value.sum().item() * (line[1] - line[0]).item() ** 2


@pytest.mark.parametrize("family", [MeanFieldGaussian, Laplace])
def test_information_against_integration(family):
    q = family(torch.tensor([1.0, -0.3]).double(), torch.tensor([0.1, -0.4]).double())
    exchange = natural_action(Permutations(2))
    network = with_posteriors(nn.Linear(2, 1, bias=False).double(), family)
    network.weight.posterior = family(q.loc.view(1, 2), q.log_scale.view(1, 2))
    found = OrbitMixture(network, network_action(network, exchange)).mutual_information(20_000, seeded())
    exact = grid_information(q, exchange)
    assert 0.1 < exact < 0.6 and 0 < found.standard_error < 0.02
    within_standard_errors(found.value, exact, found.standard_error)
    if family is MeanFieldGaussian:  # (iii): the best invariant Gaussian bounds it, by a closed form
        best = average(q, exchange, "arithmetic")
        assert_close(q.kl(best), (best.log_scale - q.log_scale).sum())
        assert exact < q.kl(best) < q.kl(average(q, exchange))


def test_information_takes_as_many_draws_as_asked():
    network, action = on_ring("gaussian")
    mixture, generator = OrbitMixture(network, action), seeded(17)
    parts = [sample_weights(network, draws, generator) for draws in (64, 6)]  # 64 at once
    weights = {name: torch.cat([part[name] for part in parts]).detach() for name in parts[0]}
    with torch.no_grad():
        values = mixture.log_densities(weights)[0] - mixture.log_prob(weights)
    found = mixture.mutual_information(70, seeded(17))
    assert_close(found.value, values.mean())
    assert_close(found.standard_error, values.std() / math.sqrt(70))


def test_information_between_its_bounds():
    for case in ("set, invariant", "odd", "circular shifts", "C4 trivial"):
        network, action = pair(case)
        limit = math.log(action.group.order)
        found = OrbitMixture(network, action).mutual_information(200, seeded(17))
        assert 0.05 < found.value <= limit
        still = OrbitMixture(symmetrize(network, action), action).mutual_information(200, seeded(17))
        assert_close(still.value, 0.0)
        assert_close(still.standard_error, 0.0)


def test_information_knows_the_stabiliser():
    """A posterior fixed by the half turn: at most log(4 / 2), and that is reached when scales are small."""
    network, action = on_ring("gaussian")
    half = network_action(network, RING.pulled_back(Cyclic(2), lambda g: 2 * g))
    fixed = symmetrize(network, half)
    with torch.no_grad():
        for tensor in variational_tensors(fixed).values():
            tensor.posterior.log_scale.fill_(-6)
    found = OrbitMixture(fixed, action).mutual_information(100, seeded())
    assert_close(found.value, math.log(2))


def test_disjoint_supports_give_all_of_log_g():
    network, action = on_ring("lognormal")
    with torch.no_grad():
        network[0].weight.posterior.mask.copy_(torch.tensor([1, 1, 1, -1]))
    found = OrbitMixture(network, action).mutual_information(100, seeded())
    assert_close(found.value, math.log(4))
    assert found.standard_error == 0


def test_thousands_of_weights_in_float32():
    """Log-densities near 10^4: float32 would be off by thousandths; the same draws in float64 are the reference."""
    torch.manual_seed(0)
    single = with_posteriors(nn.Sequential(nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 3)), scale=1.0)
    with torch.no_grad():
        single[0].weight.posterior.loc.mul_(0.3)
    double, action = copy.deepcopy(single).double(), network_action(single, regular_channels(Cyclic(4), 16))
    weights = sample_weights(single, 64, seeded(17))  # the seed of the means would repeat their numbers
    wide = {name: value.double() for name, value in weights.items()}
    found, expected = (OrbitMixture(n, action).log_prob(w) for n, w in ((single, weights), (double, wide)))
    assert expected.abs().min() > 5000 and found.dtype == torch.float64
    assert_close(found, expected)
    information = OrbitMixture(single, action).mutual_information(64, seeded(17))
    assert 0.1 < information.value < math.log(4)
    with torch.no_grad():
        q = sum(tensor.posterior.log_prob(wide[name]) for name, tensor in variational_tensors(double).items())
    assert_close(information.value, (q - expected).mean(), exact64 * 1e4)  # a difference of numbers near 10^4


def test_log_density_is_differentiable():
    network, action = on_ring("gaussian")
    weights = {name: value.detach() for name, value in sample_weights(network, 5, seeded()).items()}
    mixture, loc = OrbitMixture(network, action), network[0].weight.posterior.loc
    mixture.log_prob(weights).sum().backward()
    step = torch.zeros_like(loc)
    step[1, 2] = 1e-6
    with torch.no_grad():
        loc.add_(step)
        high = mixture.log_prob(weights).sum()
        loc.sub_(2 * step)
        low = mixture.log_prob(weights).sum()
    assert_close(loc.grad[1, 2], (high - low) / 2e-6, FOUND)


@pytest.mark.parametrize("case", ["C4 trivial", "set, equivariant", "two sets", "odd"])
def test_predictive_of_the_mixture_is_exactly_equivariant(case):
    network, action = pair(case)
    mixture, weights = OrbitMixture(network, action), sample_weights(network, 3, seeded(1))
    x = normal(4, *action.input.shape, seed=2)

    def mean(x):
        with torch.no_grad():
            return apply_weights(network, x, mixture.orbit(weights)).mean(0)

    for g in action.group.generators():
        assert_close(mean(action.input.act(g, x)), action.output.act(g, mean(x)))
    assert defect(network, action, {name: w[:1] for name, w in weights.items()}) > 1e-3
    with torch.no_grad():  # and it is the orbit average of turned inputs
        turned = [action.output.act(g, apply_weights(network, action.input.act(action.group.inverse(g), x), weights))
                  for g in action.group.elements()]
    assert_close(apply_weights(network, x, mixture.orbit(weights)), torch.cat(turned))


def test_orbit_average_of_predictions():
    network, action = pair("C4 trivial")
    x, labels = normal(6, 1, 6, 6, seed=2), torch.arange(6) % 3
    plain = orbit_predictions(network, x, action, 4, generator=seeded(1))
    mixed = orbit_average(plain)
    assert mixed.probabilities.shape == plain.probabilities.shape and mixed.elements == plain.elements
    weights = OrbitMixture(network, action).orbit(sample_weights(network, 4, seeded(1)))
    expected = predict(network, x, weights=weights).softmax(-1).mean(0)
    assert_close(mixed.probabilities.mean(0), expected[:, None].expand(6, 4, 3))
    assert_close(mixed.probabilities[:, :, 1], plain.probabilities.mean(2))  # draw by draw
    assert defect_unbiased(plain.probabilities).value > 1e-6
    assert_close(defect_unbiased(mixed.probabilities).value, 0.0)
    assert nll(mixed.probabilities, labels) < nll(plain.probabilities, labels, over="orbit")  # Jensen
    with pytest.raises(Refusal, match=r"log-probabilities.*Fix: probabilities.exp\(\)"):
        orbit_average(type(plain)(plain.probabilities.log(), plain.elements, plain.mode))


def both_sides(network, action, x, y, draws=20_000):
    """L(q^G) - L(q) and I by independent routes, with the standard error of their difference, in nats."""
    tensors, mixture = variational_tensors(network), OrbitMixture(network, action)

    def log_likelihood(weights):
        return Categorical().log_prob(predict(network, x, weights=weights), y).sum(1)

    with torch.no_grad():
        plain = log_likelihood(sample_weights(network, draws, seeded(21))) - kl_sum(network)
        turned = mixture.sample(draws, seeded(22))
        prior = sum(tensor.prior.log_prob(turned[name]) for name, tensor in tensors.items())
        mixed = log_likelihood(turned) + prior - mixture.log_prob(turned)
    information = mixture.mutual_information(draws, seeded(23))
    error = math.sqrt((plain.var() + mixed.var()).item() / draws + information.standard_error**2)
    return (mixed.mean() - plain.mean()).item(), information.value, error


def ring_problem(prior, augmented=True, family=MeanFieldGaussian):
    torch.manual_seed(5)
    plain = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        plain[2].weight.mul_(4)
    network, action = with_posteriors(plain, family, scale=0.4, prior=prior), network_action(plain, RING)
    x = 2 * normal(6, 4, seed=6)
    with torch.no_grad():
        y = plain(x).argmax(-1)
    if augmented:
        x, y = torch.cat([action.input.act(g, x) for g in action.group.elements()]), y.repeat(4)
    return network, action, x, y


@pytest.mark.parametrize("family", [MeanFieldGaussian, Laplace])
def test_the_mixture_adds_its_information_to_the_elbo(family):
    gain, information, error = both_sides(*ring_problem(isotropic(1.0), family=family))
    assert 1 < information < math.log(4) - 0.01 and error < 0.12
    within_standard_errors(gain, information, error)


def test_with_an_equivariant_output():
    """Two classes that the group exchanges: the labels turn along (A2)."""
    torch.manual_seed(5)
    plain = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    swap = natural_action(Permutations(2))
    with torch.no_grad():
        plain[2].weight.mul_(4)
    action, x = network_action(plain, swap, output=swap), 2 * normal(4, 2, seed=6)
    y = plain(x).argmax(-1)
    x, labels = torch.cat([x, action.input.act((1, 0), x)]), torch.cat([y, 1 - y])
    network = with_posteriors(plain, scale=0.5)
    gain, information, error = both_sides(network, action, x, labels)
    assert information > 0.3
    within_standard_errors(gain, information, error)
    gain, information, error = both_sides(network, action, x, y.repeat(2))  # labels that do not turn
    assert abs(gain - information) > 10 * error


@pytest.mark.parametrize("case", ["prior", "augmentation"])
def test_the_elbo_theorem_needs_its_conditions(case):
    prior = random_means(0, spread=3.0) if case == "prior" else isotropic(1.0)
    gain, information, error = both_sides(*ring_problem(prior, augmented=case == "prior"))
    assert abs(gain - information) > 10 * error


def test_permutations_of_units_need_no_augmentation():
    network = dense(2, 4, 2)
    action, x, y = unit_permutations(network, (2,)), normal(6, 2, seed=1), torch.arange(6) % 2
    gain, information, error = both_sides(network, action, x, y)
    assert 1 < information < math.log(24)
    within_standard_errors(gain, information, error)
    weights = sample_weights(network, 3, seeded())
    with torch.no_grad():  # q^G computes the same functions
        outputs = apply_weights(network, x, OrbitMixture(network, action).orbit(weights)).view(24, 3, 6, 2)
        assert_close(outputs, apply_weights(network, x, weights).expand(24, 3, 6, 2))


def test_on_cuda(require_cuda):
    network, action = pair("C4 trivial")
    expected, weights = symmetrize(network, action), sample_weights(network, 5, seeded())
    density = OrbitMixture(network, action).log_prob(weights)
    network = network.to(require_cuda)
    there = {name: value.to(require_cuda) for name, value in weights.items()}
    assert_close(OrbitMixture(network, action).log_prob(there), density)
    assert OrbitMixture(network, action).mutual_information(20).value > 0.05
    assert OrbitMixture(network, action).sample(3, torch.Generator(require_cuda))["0.weight"].device.type == "cuda"
    for value, wanted in zip(symmetrize_(network, action).parameters(), expected.parameters(), strict=True):
        assert_close(value, wanted)


REFUSED = {
    "one draw": (lambda: OrbitMixture(*pair("set, invariant")).mutual_information(1),
                 "at least 2 as the number of draws"),
    "norms": (lambda: OrbitMixture(*pair("C4 regular")), "'1\\.[a-z_]*', which the group moves"),
    "mixture of another": (lambda: OrbitMixture(dense(), pair("C4 regular")[1]), "another network"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    call, message = REFUSED[case]
    with pytest.raises(Refusal, match=message):
        call()


def test_norms_that_one_generator_moves_are_refused():
    """Of S3 on three channels the exchange of two leaves these scales in place, the cycle does not."""
    plain = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2)).double()
    plain[1].weight.data.copy_(torch.tensor([1.0, 1.0, 2.0]))
    network = with_posteriors(plain).eval()
    with pytest.raises(Refusal, match=r"'1\.weight', which the group moves"):
        OrbitMixture(network, unit_permutations(network, (1, 4, 4)))
