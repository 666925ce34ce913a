"""Averages over a group against direct minimisation; networks become invariant bit by bit."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import normal
from helpers_equivariance import FOUND, NETWORKS, ON_SET, convolutional, defect, dense, pair, pushes
from symbnn.equivariance.averages import average, symmetrize, symmetrize_
from symbnn.equivariance.mixture import OrbitMixture
from symbnn.equivariance.projected_gradients import drift
from symbnn.errors import Refusal
from symbnn.posterior.block_gaussian import BlockGaussian
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.layers import kl_sum, variational_tensors, with_posteriors
from symbnn.posterior.log_normal import LogNormal
from symbnn.posterior.point_mass import PointMass
from symbnn.posterior.priors import random_means
from symbnn.symmetry.actions import Action, natural_action, regular_channels
from symbnn.symmetry.fields import field, rotations
from symbnn.symmetry.groups import Cyclic, Permutations
from symbnn.symmetry.networks import network_action, unit_permutations
from symbnn.symmetry.signed_permutations import SignedPermutation
from tolerances import assert_close, exact32, exact64

KINDS = ("geometric", "arithmetic", "projection")


def plane_turns(extra=1):
    """C4 turning the plane of the first two coordinates, with signs; the others stay."""
    turn = SignedPermutation.direct_sum(SignedPermutation([1, 0], [-1, 1]), SignedPermutation.identity(extra))

    def rule(g):
        return SignedPermutation.identity(2 + extra) if g == 0 else turn @ rule(g - 1)

    return Action(Cyclic(4), (2 + extra,), rule, "plane turns")


EXCHANGE = natural_action(Permutations(3))
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
    far = MeanFieldGaussian(means, torch.full_like(means, -14))
    found = average(far, natural_action(Permutations(2)), "arithmetic")
    assert_close(found.variance, [0.16] * 2, exact32)
    tiny = MeanFieldGaussian(torch.tensor([1.0, 2.0]), torch.tensor([-60.0, -60.0]))
    assert_close(average(tiny, natural_action(Permutations(2))).log_scale, [-60.0, -60.0], exact32)
    assert_close(average(tiny, natural_action(Permutations(2))).loc, [1.5, 1.5], exact32)
    assert average(tiny, natural_action(Permutations(2))).loc.dtype == torch.float32


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
    acting = natural_action(Permutations(2)) if family is FullGaussian else field(rotations(), (1, 6, 6))
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
    with pytest.raises(Refusal, match="at most 10000 elements to list"):
        OrbitMixture(network, action)


REFUSED = {
    "kind": (lambda: average(*members()["gaussian, S3"], "harmonic"), "misspelt"),
    "laplace": (lambda: average(Laplace(normal(3), normal(3)), EXCHANGE), "free location"),
    "laplace moments": (lambda: average(Laplace(normal(3), normal(3)), EXCHANGE, "arithmetic"), "free location"),
    "mask": (lambda: average(LogNormal(normal(3), normal(3), torch.tensor([1, -1, 1])), EXCHANGE), "sign mask"),
    "shape": (lambda: average(members()["gaussian, S3"][0], natural_action(Permutations(4))), "another tensor"),
    "one mean": (lambda: average(MeanFieldGaussian(torch.zeros(1), torch.zeros(3)), EXCHANGE), "mean for each weight"),
    "flattened": (lambda: average(MeanFieldGaussian(*torch.zeros(2, 2, 2)), natural_action(Permutations(4))),
                  "another tensor"),
    "blocks": (lambda: average(BlockGaussian(torch.zeros(2, 2), torch.zeros(2, 1)), Action(
        Permutations(4), (2, 2), SignedPermutation.sending, "all")), "each block onto one block"),
    "names": (lambda: symmetrize(*pair("C4 regular"), only=["9.weight"]),
              r"only=\['9.weight'\].*Fix: only=\['7.weight'\], or others among 0.bias, 0.weight"),
    "other network": (lambda: symmetrize(dense(), pair("C4 regular")[1]), "another network|another tensor"),
    "input action": (lambda: symmetrize(dense(), ON_SET), r"network_action\(network, action\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    call, message = REFUSED[case]
    with pytest.raises(Refusal, match=message):
        call()


def test_nothing_is_written_when_one_tensor_is_refused():
    network, action = pair("set, invariant")
    posterior = Laplace(*(p.detach() for p in network[2].bias.posterior.parameters()))
    network[2].bias.posterior = posterior
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(Refusal, match="free location"):
        symmetrize_(network, action)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


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
