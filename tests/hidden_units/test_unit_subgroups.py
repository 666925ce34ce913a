"""Classes of hidden units in networks that are no chain of layers: which are counted, and brute force over all."""
import itertools
import math

import pytest
import torch
from torch import nn

from helpers import seeded
from helpers_hidden_units import moved_density, spread_means
from helpers_networks import Gated
from symbnn.errors import Refusal
from symbnn.hidden_units.mutual_information import InformationEstimator, mutual_information
from symbnn.hidden_units.subgroups import hidden_classes, unit_subgroup
from symbnn.posterior.independent import MeanFieldGaussian
from symbnn.posterior.layers import with_posteriors
from symbnn.posterior.priors import isotropic
from symbnn.posterior.sampling import sample_weights
from symbnn.symmetry.fields import field, rotations
from symbnn.symmetry.networks import network_action, unit_permutations
from tolerances import assert_close


class Stream(nn.Module):
    """A residual stream and its blocks."""

    def __init__(self, width=3, blocks=(4,), to_itself=False):
        super().__init__()
        self.stem, self.head = nn.Linear(2, width), nn.Linear(width, 1)
        self.up = nn.ModuleList(nn.Linear(width, n) for n in blocks)
        self.down = nn.ModuleList(nn.Linear(n, width) for n in blocks)
        self.inner = nn.Linear(width, width) if to_itself else nn.Identity()

    def forward(self, x):
        """The output."""
        h = self.stem(x)
        h = h + torch.tanh(self.inner(h))
        for up, down in zip(self.up, self.down):
            h = h + down(torch.tanh(up(h)))
        return self.head(h)


class Attention(nn.Module):
    """Self-attention of some heads on a residual stream."""

    def __init__(self, width=4, heads=2):
        super().__init__()
        self.heads, self.stem, self.head = heads, nn.Linear(2, width), nn.Linear(width, 1)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        """The output."""
        h = self.stem(x)
        q, k, v = (its(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for its in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((h + self.o(y)).mean(1))


class Recurrent(nn.Module):
    """The last state of a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x):
        """The output."""
        return self.out(self.cell(x)[0][:, -1])


class Grouped(nn.Module):
    """A norm over groups of channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.out = nn.Conv2d(1, 4, 1), nn.GroupNorm(2, 4), nn.Linear(4, 1)

    def forward(self, x):
        """The output."""
        return self.out(torch.tanh(self.norm(self.stem(x))).mean((2, 3)))


class Mixer(nn.Module):
    """Units along tokens and along channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.out = nn.Linear(2, 3), nn.Linear(3, 1)
        self.tokens, self.back = nn.Linear(4, 3), nn.Linear(3, 4)

    def forward(self, x):
        """The output."""
        h = self.stem(x)
        return self.out((h + self.back(torch.tanh(self.tokens(h.transpose(1, 2)))).transpose(1, 2)).mean(1))


def bayesian(plain):
    """A posterior on every tensor, with means that differ from unit to unit."""
    torch.manual_seed(0)
    plain = plain.double()
    names = [name for name, _ in plain.named_parameters()]
    return spread_means(with_posteriors(plain, MeanFieldGaussian, 0.5, isotropic(1.0), only=names), 0.4)


NETWORKS = {
    "stream": (Stream, (2,), {"up.0"}), "two blocks": (lambda: Stream(3, (2, 3)), (2,), {"up.0", "up.1"}),
    "wide stream": (lambda: Stream(4, (2, 2)), (2,), {"stem"}), "gate and norm": (Gated, (2,), {"both[:4]"}),
    "heads": (Attention, (3, 2), {"stem"}), "one head": (lambda: Attention(3, 1), (3, 2), {"q", "v"}),
    "added to itself": (lambda: Stream(3, (4,), to_itself=True), (2,), {"up.0"}),
    "recurrent": (Recurrent, (4, 2), set()), "groups": (Grouped, (1, 2, 2), {"stem[0]"}),
    "mixer": (Mixer, (4, 2), {"stem", "tokens"}),
}


def integrand(network, action, weights, elements):
    """log q minus the log of its mean over these elements, by the families' own densities."""
    own = moved_density(network, action, weights, action.group.identity())
    logs = torch.stack([moved_density(network, action, weights, g) for g in elements])
    return own - logs.logsumexp(0) + math.log(len(logs))


def elements_of(subgroup, classes):
    """All permutations of the units of some classes."""
    sizes = subgroup.sizes.items()
    return list(itertools.product(*(itertools.permutations(range(n)) if name in classes else [tuple(range(n))]
                                    for name, n in sizes)))


@pytest.mark.parametrize("name", NETWORKS)
def test_permanents_are_the_sum_over_their_subgroup_and_alternating_over_all(name):
    make, shape, counted = NETWORKS[name]
    network = bayesian(make())
    action = unit_permutations(network, shape)
    subgroup, weights = unit_subgroup(network, action), sample_weights(network, 3, seeded(1))
    assert set(subgroup.apart) == counted
    assert {*subgroup.apart, *subgroup.left_out} == {name for name, n in hidden_classes(action).items() if n > 1}
    whole = integrand(network, action, weights, action.group.elements())
    part = integrand(network, action, weights, elements_of(subgroup, counted))
    alternating = InformationEstimator(network, action, "alternating")
    assert (alternating.kind, alternating.within) == ("exact", 0.0)
    assert_close(alternating.values(weights), whole, 1e-11)
    if counted:
        permanent = InformationEstimator(network, action, "permanent")
        assert_close(permanent.values(weights), part, 1e-11)
        assert permanent.kind == ("exact" if subgroup.whole else "lower")
    else:
        with pytest.raises(Refusal, match="belong to two units"):
            InformationEstimator(network, action, "permanent")


def test_what_is_left_out_is_named_with_the_reason():
    network = bayesian(Stream(3, (4, 4), to_itself=True))
    action = unit_permutations(network, (2,))
    found = mutual_information(network, action, draws=2, generator=seeded())
    assert (found.method, found.kind) == ("alternating", "exact")  # 3! listed beside two permanents of four units
    assert found.reason == "all 6 permutations of the units of 'stem', permanents of the units of 'up.0', 'up.1'"
    assert found.units == ("stem", "up.0", "up.1")
    part = mutual_information(network, action, "permanent", draws=2, generator=seeded())
    assert part.units == ("up.0", "up.1") and "'inner.weight' both reads and writes" in part.reason
    chain = unit_subgroup(bayesian(Stream(6, (3,))), unit_permutations(Stream(6, (3,)), (2,)))
    assert chain.left_out == {"up.0": "units of 'up.0' share 'up.0.weight' with those of 'stem'"}


def test_sampled_classes_bound_from_below_and_gain_on_the_permanent(monkeypatch):
    monkeypatch.setattr("symbnn.hidden_units.mutual_information._LISTED", 1)
    network = bayesian(Stream(4, (5,)))
    action = unit_permutations(network, (2,))
    weights = sample_weights(network, 60, seeded(2))
    estimators = {K: InformationEstimator(network, action, "alternating", K) for K in (2, 16)}
    assert all((its.kind, its.within) == ("lower", math.inf) for its in estimators.values())
    values = {K: its.values(weights, seeded(3)).detach() for K, its in estimators.items()}
    monkeypatch.undo()
    exact = InformationEstimator(network, action, "alternating").values(weights).detach()
    part = InformationEstimator(network, action, "permanent").values(weights).detach()

    def exceeds(high, low):
        difference = high - low
        return difference.mean() > -4 * difference.std() / 60**0.5

    assert exceeds(exact, values[16]) and exceeds(values[16], values[2]) and exceeds(values[2], part)
    assert (values[16] - part).mean() > 0.5 and (values[16] <= math.log(16) + math.lgamma(6) + 1e-9).all()


def test_wide_blocks_by_their_capacity_stay_below():
    network = bayesian(Stream(3, (17,)))
    action = unit_permutations(network, (2,))
    assert InformationEstimator(network, action).method == "capacity"
    alternating = InformationEstimator(network, action, "alternating")
    assert alternating.kind == "lower"
    weights = sample_weights(network, 4, seeded(1))
    assert (alternating.values(weights) > InformationEstimator(network, action, "capacity").values(weights)).all()


def test_gradients_of_alternating_equal_finite_differences():
    network = bayesian(Stream(2, (3,), to_itself=True))
    estimator = InformationEstimator(network, unit_permutations(network, (2,)), "alternating")

    def cost():
        return estimator.values(sample_weights(network, 3, seeded(8))).mean()

    parameters = dict(network.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(cost(), parameters.values(), allow_unused=True)))
    for name in ("stem.weight.posterior.loc", "down.0.weight.posterior.log_scale", "inner.weight.posterior.loc"):
        flat, step = parameters[name].data.view(-1), 1e-5
        start = flat[0].item()
        with torch.no_grad():
            flat[0] = start + step
            above = cost()
            flat[0] = start - step
            slope = (above - cost()).item() / (2 * step)
            flat[0] = start
        assert abs(slope - gradients[name].view(-1)[0].item()) <= 1e-5 * max(abs(slope), 0.01)


def test_many_layers_take_a_moment():
    layers = [layer for _ in range(40) for layer in (nn.Linear(2, 2), nn.Tanh())]
    network = bayesian(nn.Sequential(*layers, nn.Linear(2, 1)))
    found = unit_subgroup(network, unit_permutations(network, (2,)))
    assert len(found.apart) == 20 and len(found.left_out) == 20


def test_symmetries_of_the_data_have_no_units():
    network = bayesian(Grouped())
    turns = network_action(network, field(rotations(), (1, 2, 2)))
    found = unit_subgroup(network, turns)
    assert not found.sizes and not found.whole and "does not permute hidden units" in found.excluded
    with pytest.raises(Refusal, match="a group that permutes hidden units"):
        InformationEstimator(network, turns, "alternating")
    assert mutual_information(network, turns, draws=2, generator=seeded()).units == ()
