"""Symmetrisation: averages against direct minimisation, invariance bit by bit, the mixture and its information."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from symbnn.equivariance.averages import average, symmetrize, symmetrize_
from symbnn.equivariance.metrics import defect_unbiased, nll
from symbnn.equivariance.mixture import OrbitMixture, orbit_average
from symbnn.equivariance.predictions import orbit_predictions
from symbnn.equivariance.projected_gradients import drift
from symbnn.errors import Refusal
from symbnn.posterior.block_gaussian import BlockGaussian
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.layers import kl_sum, variational_tensors, with_posteriors
from symbnn.posterior.likelihoods import Categorical
from symbnn.posterior.log_normal import LogNormal
from symbnn.posterior.point_mass import PointMass
from symbnn.posterior.priors import isotropic, random_means
from symbnn.posterior.sampling import apply_weights, mean_weights, predict, sample_weights
from symbnn.symmetry.actions import Action, natural_action, regular_channels, sign_change
from symbnn.symmetry.fields import field, flips, rotations, rotations_and_flips, shifts, time_reversal
from symbnn.symmetry.groups import Cyclic, Symmetric
from symbnn.symmetry.networks import network_action, unit_permutations
from symbnn.symmetry.signed_permutations import SignedPermutation
from tolerances import assert_close, exact32, exact64, within_standard_errors

KINDS = ("geometric", "arithmetic", "projection")
FOUND = 1e-6  # what L-BFGS leaves of the distance to a minimum: the root of float64 rounding in the cost, and some room


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def plane_turns(extra=1):
    """C4 turning the plane of the first two coordinates, with signs; the others stay."""
    turn = SignedPermutation.direct_sum(SignedPermutation([1, 0], [-1, 1]), SignedPermutation.identity(extra))

    def rule(g):
        return SignedPermutation.identity(2 + extra) if g == 0 else turn @ rule(g - 1)

    return Action(Cyclic(4), (2 + extra,), rule, "plane turns")


EXCHANGE = natural_action(Symmetric(3))
KERNEL = Action.product(regular_channels(Cyclic(4)), Action.trivial(Cyclic(4), (2,)), rotations().kernel(2, 2))


def members():
    """(family, action) where the averages exist: signs, permutations, blocks, masks, correlations, shared scales."""
    full = torch.linalg.cholesky(normal(3, 3, seed=3) @ normal(3, 3, seed=3).T + torch.eye(3, dtype=torch.float64))
    mask = torch.tensor([1, 1, 1])
    loc, log_scale = normal(3, seed=1), 0.5 * normal(3, seed=2)
    kernel, blocks = normal(4, 2, 2, 2, seed=4), 0.5 * normal(4, 2, 1, 1, seed=5)
    return {
        "gaussian, signs": (MeanFieldGaussian(loc, log_scale), plane_turns()),
        "gaussian, S3": (MeanFieldGaussian(loc, log_scale), EXCHANGE),
        "gaussian, one scale": (MeanFieldGaussian(loc, torch.tensor([-0.3]).double()), EXCHANGE),
        "lognormal, S3": (LogNormal(loc, log_scale, mask), EXCHANGE),
        "block, kernels": (BlockGaussian(kernel, blocks), KERNEL),
        "full, signs": (FullGaussian(loc, full), plane_turns()),
        "full, S3": (FullGaussian(loc, full), EXCHANGE),
    }


def pushes(family, action):
    return [family.push_forward(action(g)).freeze() for g in action.group.elements()]


def minimiser(start, cost):
    """The member that L-BFGS finds, with the cost evaluated by `Family.kl` alone."""
    found = copy.deepcopy(start)
    optimiser = torch.optim.LBFGS(found.parameters(), max_iter=1000, tolerance_grad=1e-11, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        value = cost(found)
        value.backward()
        return value

    optimiser.step(closure)
    return found


def assert_same_law(actual, expected, tolerance=exact64):
    assert type(actual) is type(expected)
    for (name, value), (_, wanted) in zip(actual.named_parameters(), expected.named_parameters(), strict=True):
        assert value.shape == wanted.shape, name
        triangle = torch.tril if name == "factor" else torch.clone
        assert_close(triangle(value), triangle(wanted), tolerance)


def w2_between_logs(r, p):
    """W_2^2 of independent laws of one location-scale family, up to the variance of the noise in the second term."""
    return (r.loc - p.loc).square().sum() + (r._total((r.log_scale.exp() - p.log_scale.exp()) ** 2))


@pytest.mark.parametrize("case", members())
@pytest.mark.parametrize("kind", ["geometric", "arithmetic"])
def test_averages_minimise_the_mean_divergence(case, kind):
    family, action = members()[case]
    pushed = pushes(family, action)
    cost = {"geometric": lambda r: sum(r.kl(p) for p in pushed), "arithmetic": lambda r: sum(p.kl(r) for p in pushed)}
    best = minimiser(family, cost[kind])
    assert_same_law(average(family, action, kind), best, FOUND)


@pytest.mark.parametrize("family", [MeanFieldGaussian, Laplace, LogNormal, BlockGaussian])
def test_projection_minimises_the_mean_transport_cost(family):
    if family is BlockGaussian:
        start, action = members()["block, kernels"]
    else:
        loc, log_scale = normal(3, seed=1), 0.5 * normal(3, seed=2)
        mask = (torch.ones(3),) if family is LogNormal else ()
        start, action = family(loc, log_scale, *mask), EXCHANGE
    pushed = pushes(start, action)
    best = minimiser(start, lambda r: sum(w2_between_logs(r, p) for p in pushed))
    assert_same_law(average(start, action, "projection"), best, FOUND)


def test_projection_of_a_full_covariance_averages_symmetric_roots():
    family, action = members()["full, signs"]

    def root(p):
        values, vectors = torch.linalg.eigh((p.scale_tril @ p.scale_tril.T).detach())
        return vectors * values.sqrt() @ vectors.T

    found = average(family, action, "projection")
    assert_close(root(found), sum(root(p) for p in pushes(family, action)) / 4)
    diagonal = MeanFieldGaussian(normal(3), 0.4 * normal(3, seed=1))
    as_full = FullGaussian(diagonal.loc.detach(), diagonal.scale.detach().diag())
    assert_close(average(as_full, action, "projection").scale, average(diagonal, action, "projection").scale)


@pytest.mark.parametrize("case", members())
@pytest.mark.parametrize("kind", KINDS)
def test_averages_are_invariant_and_idempotent(case, kind):
    family, action = members()[case]
    found = average(family, action, kind)
    assert found.shape == family.shape and found.log_prob(found.mean).isfinite()
    for g in action.group.elements():
        assert_same_law(found.push_forward(action(g)), found)
    assert_same_law(average(found, action, kind), found)
    assert_same_law(average(family.push_forward(action(action.group.elements()[1])), action, kind), found)
    assert any((a - b).abs().max() > 0.01 for a, b in zip(found.parameters(), family.parameters()))  # it did something


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_compensation_identities(seed):
    """The two identities of the theorem at a random member r, so at its minimisers too."""
    q, r = (MeanFieldGaussian(normal(3, seed=seed + k), 0.5 * normal(3, seed=seed + k + 1)) for k in (0, 2))
    action = plane_turns()
    pushed, geometric, arithmetic = pushes(q, action), average(q, action), average(q, action, "arithmetic")
    assert_close(sum(r.kl(p) for p in pushed) / 4, r.kl(geometric) + sum(geometric.kl(p) for p in pushed) / 4, 1e-10)
    assert_close(sum(p.kl(r) for p in pushed) / 4, arithmetic.kl(r) + sum(p.kl(arithmetic) for p in pushed) / 4, 1e-10)


def test_geometric_average_beats_laws_outside_the_family():
    """(i) holds for every r: a full covariance cannot do better than the mean-field average."""
    q, action = MeanFieldGaussian(normal(3), 0.5 * normal(3, seed=1)), plane_turns()
    pushed = pushes(q, action)
    start = FullGaussian(torch.zeros(3).double(), torch.eye(3).double())
    best = minimiser(start, lambda r: sum(r.kl(p) for p in pushed))
    assert_close(best.scale_tril @ best.scale_tril.T, average(q, action).variance.diag(), FOUND)
    assert_close(best.loc, average(q, action).loc, FOUND)


def test_means_far_from_zero_and_tiny_scales():
    """@eq-arithmetic-variance: a difference of second moments would lose the variance, float32 the weights."""
    means = torch.tensor([1e7 + 0.3, 1e7 + 1.1], dtype=torch.float64)
    found = average(MeanFieldGaussian(means, torch.full_like(means, -14)), natural_action(Symmetric(2)), "arithmetic")
    assert_close(found.variance, [0.16] * 2, exact32)
    tiny = MeanFieldGaussian(torch.tensor([1.0, 2.0]), torch.tensor([-60.0, -60.0]))
    assert_close(average(tiny, natural_action(Symmetric(2))).log_scale, [-60.0, -60.0], exact32)
    assert_close(average(tiny, natural_action(Symmetric(2))).loc, [1.5, 1.5], exact32)
    assert average(tiny, natural_action(Symmetric(2))).loc.dtype == torch.float32


# Networks


def convolutional(family=MeanFieldGaussian, channels=(4, 4), norm=True, prior=None, scale=0.2):
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(1, channels[0], 3, padding=1), *[nn.BatchNorm2d(channels[0])] * norm, nn.Tanh(),
        nn.Conv2d(channels[0], channels[1], 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(channels[1], 3),
    ).double()
    if norm:
        plain(normal(20, 1, 6, 6, seed=9))
        nn.init.normal_(plain[1].weight, generator=seeded(3))
        nn.init.normal_(plain[1].bias, generator=seeded(4))
    network = with_posteriors(plain.eval(), family, scale=scale, prior=prior)
    return spread(network)


@torch.no_grad()
def spread(network):
    """Scales that differ from weight to weight."""
    for k, tensor in enumerate(variational_tensors(network).values()):
        for name, value in tensor.posterior.named_parameters():
            if name == "log_scale":
                value.add_(0.3 * normal(*value.shape, seed=k))
            elif name == "factor":
                value.add_(0.05 * normal(*value.shape, seed=k).tril())
    return network


def dense(inputs=4, hidden=8, out=4, family=MeanFieldGaussian, **options):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, out)).double()
    return spread(with_posteriors(plain, family, **({"scale": 0.3} | options)))


def series():
    torch.manual_seed(0)
    around = dict(padding=1, padding_mode="circular")
    layers = [nn.Conv1d(2, 6, 3, **around), nn.ReLU(), nn.Conv1d(6, 4, 3, **around), nn.Tanh(), nn.Flatten()]
    return spread(with_posteriors(nn.Sequential(*layers, nn.Linear(24, 3)).double(), scale=0.2))


ON_SET = natural_action(Symmetric(4))


def two_sets(name, size):
    return Action(ON_SET.group, (size,), lambda g: SignedPermutation.direct_sum(ON_SET(g), ON_SET(g)), "two sets")


NETWORKS = {
    "C4 trivial": lambda: (convolutional(), dict(input=field(rotations(), (1, 6, 6)))),
    "C4 regular": lambda: (convolutional(), dict(input=field(rotations(), (1, 6, 6)), hidden="regular")),
    "D4 regular": lambda: (convolutional(channels=(8, 8)),
                           dict(input=field(rotations_and_flips(), (1, 6, 6)), hidden="regular")),
    "flips": lambda: (convolutional(), dict(input=field(flips(), (1, 6, 6)), hidden="regular")),
    "circular shifts": lambda: (series(), dict(input=field(shifts(3, step=2, ndim=1), (2, 6)))),
    "time reversal": lambda: (series(), dict(input=field(time_reversal(), (2, 6)), hidden="regular")),
    "set, invariant": lambda: (dense(), dict(input=ON_SET)),
    "set, equivariant": lambda: (dense(), dict(input=ON_SET, output=ON_SET)),
    "two sets": lambda: (dense(), dict(input=ON_SET, output=ON_SET, hidden=two_sets)),
    "odd": lambda: (dense(), dict(input=sign_change(4), output=sign_change(4), hidden=lambda _, n: sign_change(n))),
    "even": lambda: (dense(), dict(input=sign_change(4))),
}


def pair(case):
    network, how = NETWORKS[case]()
    return network, network_action(network, **how)


@torch.no_grad()
def defect(network, action, weights=None):
    """The largest change of outputs under the group, at the mean weights unless others are given."""
    x, weights = normal(3, *action.input.shape, seed=7), weights or mean_weights(network)
    f = torch.stack([action.output.act(action.group.inverse(g), apply_weights(network, action.input.act(g, x), weights))
                     for g in action.group.elements()])
    return (f - f[0]).abs().max().item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", NETWORKS)
def test_networks_of_every_group_become_invariant(case, kind):
    network, action = pair(case)
    before = copy.deepcopy(network.state_dict())
    found = symmetrize(network, action, kind)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert drift(network, action).relative > 0.01 and drift(found, action).absolute == 0
    assert defect(network, action) > 0.005
    assert_close(defect(found, action), 0.0)
    for name, tensor in variational_tensors(network).items():
        alone = average(tensor.posterior, action.parameters[name], kind)
        assert_same_law(variational_tensors(found)[name].posterior, alone)


@pytest.mark.parametrize("family", [Laplace, BlockGaussian, FullGaussian])
def test_networks_of_other_families(family):
    network = dense(2, 3, 2, family) if family is FullGaussian else convolutional(family, norm=False)
    acting = natural_action(Symmetric(2)) if family is FullGaussian else field(rotations(), (1, 6, 6))
    action = network_action(network, acting, hidden="trivial" if family is FullGaussian else "regular")
    found = symmetrize(network, action, "projection")
    assert defect(network, action) > 0.005
    assert_close(defect(found, action), 0.0)
    for name, tensor in variational_tensors(found).items():
        for g in action.group.elements():
            assert_same_law(tensor.posterior.push_forward(action.parameters[name](g)), tensor.posterior)
            scale = tensor.posterior.scale.detach()
            assert_close(action.parameters[name].absolute().act(g, scale), scale)


def test_in_place_keeps_the_parameters_and_the_priors():
    network, action = convolutional(prior=random_means(0)), None
    action = network_action(network, field(rotations(), (1, 6, 6)), hidden="regular")
    expected, ids = symmetrize(network, action), {name: id(p) for name, p in network.named_parameters()}
    priors = {name: value.clone() for name, value in network.state_dict().items() if ".prior." in name}
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    assert symmetrize_(network, action) is network
    assert {name: id(p) for name, p in network.named_parameters()} == ids
    assert all(torch.equal(network.state_dict()[name], value) for name, value in priors.items())
    for (name, value), (_, wanted) in zip(network.state_dict().items(), expected.state_dict().items(), strict=True):
        assert torch.equal(value, wanted), name
    assert all(p.requires_grad and p.grad_fn is None for p in network.parameters())
    kl_sum(network).backward()
    optimiser.step()
    assert not torch.equal(network[0].weight.posterior.loc, expected[0].weight.posterior.loc)


def test_frozen_posteriors_are_averaged_too():
    network, action = pair("set, invariant")
    expected = symmetrize(network, action)[0].weight.posterior
    network[0].weight.posterior = network[0].weight.posterior.freeze()
    found = symmetrize(network, action)[0].weight.posterior
    assert torch.equal(found.loc, expected.loc) and torch.equal(found.log_scale, expected.log_scale)
    assert not list(found.parameters())


def test_norms_are_averaged_within_their_orbits():
    network, action = pair("C4 regular")
    found = symmetrize(network, action)
    for part in ("weight", "bias", "running_mean", "running_var"):
        before, after = getattr(network[1], part), getattr(found[1], part)
        assert before.std() > 0.001
        assert_close(after, before.mean().expand(4))
    assert torch.equal(found[1].num_batches_tracked, network[1].num_batches_tracked)


def test_some_tensors_only():
    network, action = pair("C4 regular")
    found = symmetrize(network, action, only=["0.weight", "1.running_var"])
    changed = {name.split(".posterior")[0] for name, value in found.state_dict().items()
               if not torch.equal(value, network.state_dict()[name])}
    assert changed == {"0.weight", "1.running_var"}
    everything = symmetrize(network, action, only=list(action.parameters))
    assert all(torch.equal(a, b) for a, b in zip(everything.state_dict().values(),
                                                 symmetrize(network, action).state_dict().values(), strict=True))


def test_float32_networks():
    network, action = pair("C4 regular")
    single = symmetrize(copy.deepcopy(network).float(), action, "arithmetic")
    assert all(p.dtype == torch.float32 for p in single.parameters()) and drift(single, action).absolute == 0
    for p, wanted in zip(single.parameters(), symmetrize(network, action, "arithmetic").parameters(), strict=True):
        assert_close(p, wanted, exact32)


def test_permutations_of_units_collapse_them_without_enumeration():
    network = dense(4, 100, 3)
    action = unit_permutations(network, (4,))
    q = variational_tensors(network)["0.weight"].posterior
    for kind in KINDS:
        found = variational_tensors(symmetrize(network, action, kind))["0.weight"].posterior
        assert torch.equal(found.loc, found.loc[:1].expand(100, 4))
        assert torch.equal(found.log_scale, found.log_scale[:1].expand(100, 4))
        if kind == "arithmetic":
            assert_close(found.loc[0], q.loc.mean(0))
            assert_close(found.variance[0], (q.variance + q.loc**2).mean(0) - q.loc.mean(0) ** 2)
    with pytest.raises(Refusal, match="listed only up to"):
        OrbitMixture(network, action)


REFUSED = {
    "kind": (lambda: average(*members()["gaussian, S3"], "harmonic"), "misspelt"),
    "laplace": (lambda: average(Laplace(normal(3), normal(3)), EXCHANGE), "free location"),
    "laplace moments": (lambda: average(Laplace(normal(3), normal(3)), EXCHANGE, "arithmetic"), "free location"),
    "mask": (lambda: average(LogNormal(normal(3), normal(3), torch.tensor([1, -1, 1])), EXCHANGE), "sign mask"),
    "shape": (lambda: average(members()["gaussian, S3"][0], natural_action(Symmetric(4))), "another tensor"),
    "one mean": (lambda: average(MeanFieldGaussian(torch.zeros(1), torch.zeros(3)), EXCHANGE), "mean for each weight"),
    "flattened": (lambda: average(MeanFieldGaussian(*torch.zeros(2, 2, 2)), natural_action(Symmetric(4))),
                  "another tensor"),
    "blocks": (lambda: average(BlockGaussian(torch.zeros(2, 2), torch.zeros(2, 1)), Action(
        Symmetric(4), (2, 2), SignedPermutation.sending, "all")), "each block onto one block"),
    "names": (lambda: symmetrize(*pair("C4 regular"), only=["9.weight"]), "misspelt"),
    "other network": (lambda: symmetrize(dense(), pair("C4 regular")[1]), "another network|another tensor"),
    "input action": (lambda: symmetrize(dense(), ON_SET), r"network_action\(network, action\)"),
    "one draw": (lambda: OrbitMixture(*pair("set, invariant")).mutual_information(1), "two draws"),
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


def test_nothing_is_written_when_one_tensor_is_refused():
    network, action = pair("set, invariant")
    posterior = Laplace(*(p.detach() for p in network[2].bias.posterior.parameters()))
    network[2].bias.posterior = posterior
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(Refusal, match="free location"):
        symmetrize_(network, action)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


# The mixture


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
    exchange = natural_action(Symmetric(2))
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
    with pytest.raises(Refusal, match="softmax"):
        orbit_average(type(plain)(plain.probabilities.log(), plain.elements, plain.mode))


# The symmetrised ELBO


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
    swap = natural_action(Symmetric(2))
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


def test_a_count_of_batches_is_left_alone():
    plain = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(2, 2))
    plain[1].num_batches_tracked.fill_(2**24 + 1)  # no float32
    network = with_posteriors(plain)
    action = network_action(network, field(rotations(), (1, 4, 4)))
    assert symmetrize(network, action)[1].num_batches_tracked == 2**24 + 1


def test_point_masses_have_a_projection_and_no_other_average():
    network = with_posteriors(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 2)), PointMass)
    action = network_action(network, field(rotations(), (1, 4, 4)))
    made = symmetrize(network, action, "projection")
    assert all(t.posterior.is_invariant_under(action.parameters[n]) for n, t in variational_tensors(made).items())
    for kind in ("geometric", "arithmetic"):
        with pytest.raises(Refusal, match='barycentre="projection"'):
            symmetrize(network, action, kind)
