"""A network with its action: methods are the functions underneath, no pair is wrong, mistakes are told what to type."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

from helpers import seeded
from late import ORDERS, reordered
from symbnn.equivariance.arrangements import arrangement_of
from symbnn.equivariance.averages import symmetrize
from symbnn.equivariance.bounds import push_forward_divergences
from symbnn.equivariance.expansion import expand
from symbnn.equivariance.metrics import defect_unbiased
from symbnn.equivariance.mixture import OrbitMixture
from symbnn.equivariance.predictions import orbit_predictions
from symbnn.equivariance.projected_gradients import drift
from symbnn.equivariance.symmetric import Symmetric, bayesianize
from symbnn.equivariance.tied import tie
from symbnn.errors import Refusal
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.layers import kl_sum, variational_tensors, with_posteriors
from symbnn.posterior.priors import isotropic, random_means
from symbnn.posterior.sampling import predict
from symbnn.symmetry.actions import Action, natural_action
from symbnn.symmetry.fields import SpatialAction, field, flips, rotations, rotations_and_flips
from symbnn.symmetry.groups import Cyclic, Permutations
from symbnn.symmetry.networks import intertwining_error, network_action, unit_permutations
from tolerances import assert_close, exact64

SHAPE = (1, 4, 4)
SPACES = {"C1": SpatialAction.trivial(Cyclic(1), 2), "C2": flips(), "C4": rotations(), "D4": rotations_and_flips()}
ARRANGEMENTS = ("regular", "row_rolled", "row_constant", "block_diagonal")
POINTS = natural_action(Permutations(4))


def plain(*middle):
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *middle, nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1), nn.ReLU(),
                         *head).double()


def inputs(count=5, shape=SHAPE):
    return torch.randn(count, *shape, dtype=torch.float64, generator=seeded(1))


@pytest.fixture(scope="module")
def pair():
    return bayesianize(plain(), rotations(), SHAPE, scale=0.1)


def equal_states(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def same(one, other):
    """Whether two actions are one."""
    return (one.group == other.group and one.input.agrees_with(other.input) and one.output.agrees_with(other.output)
            and one.layers == other.layers and one.parameters.keys() == other.parameters.keys()
            and all(rule.agrees_with(other.parameters[name]) for name, rule in one.parameters.items()))


# --- what it is made from ---

@pytest.mark.parametrize("made", [
    lambda network: Symmetric(network, rotations(), SHAPE),
    lambda network: Symmetric(network, rotations(), list(SHAPE)),
    lambda network: Symmetric(network, field(rotations(), SHAPE)),
    lambda network: Symmetric(network, field(rotations(), SHAPE), SHAPE),
    lambda network: Symmetric(network, network_action(network, field(rotations(), SHAPE))),
], ids=["space", "list", "field", "field and shape", "whole"])
def test_all_ways_give_the_action_of_the_network(made):
    network = with_posteriors(plain())
    pair = made(network)
    assert pair.network is network and pair.group == Cyclic(4)
    assert same(pair.action, network_action(network, field(rotations(), SHAPE)))


def test_actions_on_channels_and_outputs_are_passed_on():
    network = with_posteriors(nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 4)).double())
    for options in ({}, {"hidden": "regular"}, {"output": POINTS}, {"hidden": "regular", "output": POINTS}):
        wanted = network_action(network, POINTS, **options)
        assert same(Symmetric(network, POINTS, **options).action, wanted)
        assert same(bayesianize(nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 4)).double(), POINTS,
                                **options).action, wanted)


def test_nothing_is_changed_by_making_a_pair():
    network = with_posteriors(plain(nn.BatchNorm2d(4), nn.Dropout(0.5))).train()
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    pair = Symmetric(network, rotations(), SHAPE)
    pair.check(inputs())
    assert torch.equal(torch.get_rng_state(), state) and all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with pytest.raises(dataclasses.FrozenInstanceError):
        pair.network = network


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_check_does_not_depend_on_the_type(dtype):
    network = with_posteriors(plain(nn.BatchNorm2d(4))).to(dtype)
    pair = Symmetric(network, rotations(), SHAPE)
    wrong = network_action(network, field(flips(), SHAPE))
    with pytest.raises(Refusal, match="commute"):
        Symmetric(network, dataclasses.replace(pair.action, parameters={
            name: rule.pulled_back(Cyclic(4), lambda g: g % 2) for name, rule in wrong.parameters.items()}))
    assert next(network.parameters()).dtype == dtype


def test_bayesianize_is_posteriors_and_a_pair():
    options = dict(family=Laplace, scale=0.3, prior=random_means(3))
    alone, with_it = bayesianize(plain(), **options), bayesianize(plain(), rotations(), SHAPE, **options)
    wanted = with_posteriors(plain(), Laplace, 0.3, random_means(3))
    assert equal_states(alone, wanted) and equal_states(with_it.network, wanted)
    assert kl_sum(alone) == kl_sum(with_it.network) == kl_sum(wanted)
    assert isinstance(alone, nn.Module) and isinstance(with_it, Symmetric)
    assert equal_states(bayesianize(plain()), with_posteriors(plain()))


# --- the check ---

def test_its_own_weights_would_let_a_wrong_action_pass(pair):
    average = pair.average()
    still = dataclasses.replace(average.action, parameters={
        name: Action.trivial(rule.group, rule.shape) for name, rule in average.action.parameters.items()})
    means = {name: tensor.posterior.mean for name, tensor in variational_tensors(average.network).items()}
    assert intertwining_error(average.network, still, inputs(), tensors=means) < exact64
    with pytest.raises(Refusal, match=r"at random weights.*Symmetric\(network, action\.input\)"):
        Symmetric(average.network, still)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kept", [(1, 0), (0, 1)], ids=["turns alone", "flips alone"])
def test_a_mistake_in_one_generator_is_seen(order, kept):
    """Weights that follow the turns and not the flips, or the other way round."""
    network, space = with_posteriors(plain()), reordered(rotations_and_flips(), order)
    action = network_action(network, field(space, SHAPE))
    partly = {name: Action(action.group, rule.shape, lambda g, rule=rule: rule((kept[0] * g[0], kept[1] * g[1])))
              for name, rule in action.parameters.items()}
    with pytest.raises(Refusal, match="commute"):
        Symmetric(network, dataclasses.replace(action, parameters=partly))
    assert Symmetric(network, space, SHAPE).check(inputs()) < exact64


def test_parameters_without_posteriors_are_checked():
    """Norms over channels that the group permutes: their gains and running means have to move."""
    network = with_posteriors(plain(nn.BatchNorm2d(4)))
    with torch.no_grad():
        network[1].running_mean.normal_(generator=seeded())
    action = network_action(network, field(rotations(), SHAPE), hidden={"0": natural_channels()})
    Symmetric(network, action)
    for name in ("1.weight", "1.bias", "1.running_mean"):
        rule = action.parameters[name]
        wrong = {**action.parameters, name: Action.trivial(rule.group, rule.shape)}
        with pytest.raises(Refusal, match="commute"):
            Symmetric(network, dataclasses.replace(action, parameters=wrong))
    del wrong["1.weight"]
    with pytest.raises(Refusal, match=r"does not know .*1\.weight"):
        Symmetric(network, dataclasses.replace(action, parameters=wrong))


def natural_channels():
    """Quarter turns permute four channels in a circle."""
    return natural_action(Permutations(4)).pulled_back(Cyclic(4), lambda g: tuple((k + g) % 4 for k in range(4)))


def test_networks_that_share_weights():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.again = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.again.weight = self.inner.weight  # one tensor under two names
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            x = torch.tanh(self.inner(torch.tanh(self.inner(torch.tanh(self.first(x))))))
            return self.head(torch.tanh(self.again(x)))

    pair = bayesianize(Twice().double(), POINTS)
    assert pair.network.again.weight is pair.network.inner.weight
    x = inputs(shape=(4,))
    assert pair.check(x) < exact64 and pair.average().drift().relative < exact64
    assert pair.tie().check(x) < exact64


def test_a_layer_that_is_a_whole_network():
    layer = nn.Linear(4, 2).double()
    layer.bias.requires_grad_(False)  # a parameter without a posterior, whose name has no layer
    pair = bayesianize(layer, POINTS)
    assert pair.check(inputs(shape=(4,))) < exact64 and set(pair.action.parameters) == {"weight", "bias"}


def test_permutations_of_hidden_units():
    """A group that is not enumerated, and leaves inputs and outputs alone."""
    network = with_posteriors(nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2)).double())
    pair = Symmetric(network, unit_permutations(network, (4,)))
    assert pair.group.order == 362880 and pair.check(inputs(shape=(4,))) < exact64
    assert pair.average().drift().relative < exact64 < pair.drift().relative
    moved = {**pair.action.parameters, "0.bias": Action.trivial(pair.group, (9,))}
    with pytest.raises(Refusal, match="commute"):
        Symmetric(network, dataclasses.replace(pair.action, parameters=moved))


def test_running_statistics_that_are_not_finite():
    network = with_posteriors(plain(nn.BatchNorm2d(4)))
    network[1].running_var.fill_(torch.nan)
    with pytest.raises(Refusal, match="not finite"):
        Symmetric(network, rotations(), SHAPE)


# --- methods are the functions underneath ---

def test_pairs_are_what_the_functions_make(pair):
    network, action = pair.network, pair.action
    wanted = {
        "average": (symmetrize(network, action), action, pair.average()),
        "arithmetic": (symmetrize(network, action, "arithmetic"), action, pair.average("arithmetic")),
        "tied": (tie(network, action), action, pair.tie()),
        "expanded": (*expand(network, action, "block_diagonal"), pair.expand()),
        "regular": (*expand(network, action, "regular", isotropic(2.0)), pair.expand("regular", isotropic(2.0))),
    }
    for name, (its, acting, found) in wanted.items():
        assert isinstance(found, Symmetric) and found.network is not network, name
        assert equal_states(found.network, its) and same(found.action, acting), name
        assert kl_sum(found.network) == kl_sum(its), name
    assert len({tuple(tensor.flatten().tolist()[0] for tensor in its.state_dict().values() if tensor.numel())
                for its, *_ in wanted.values()}) == len(wanted)  # five different networks


@pytest.mark.parametrize("mode", ["common", "shared", "fresh"])
def test_predictions_and_defect(pair, mode):
    wanted = orbit_predictions(pair.network, inputs(), pair.action, 5, mode, 2, seeded(3))
    found = pair.predictions(inputs(), 5, mode, 2, seeded(3))
    assert torch.equal(found.probabilities, wanted.probabilities) and found.mode == mode
    assert found.elements == wanted.elements
    whole = orbit_predictions(pair.network, inputs(), pair.action, 5, mode, generator=seeded(3)).probabilities
    assert pair.defect(inputs(), 5, mode, seeded(3)) == defect_unbiased(whole)
    with pytest.raises(Refusal, match="memory=1 bytes"):
        pair.predictions(inputs(), 5, memory=1)


def test_a_bar_is_shown_where_it_is_asked_for(pair, capsys):
    pair.predictions(inputs(), 2, progress=True)
    assert "20/20" in capsys.readouterr().err


def test_other_measures(pair):
    found, wanted = pair.divergences(), push_forward_divergences(pair.network, pair.action)
    assert torch.equal(found.kl, wanted.kl) and found.kl.max() > 0
    assert pair.drift() == drift(pair.network, pair.action) and pair.drift().relative > 0
    means = {name: tensor.posterior.mean for name, tensor in variational_tensors(pair.network).items()}
    moved = pair.check(inputs()), intertwining_error(pair.network, pair.action, inputs(), tensors=means)
    assert moved[0] == moved[1] < exact64
    mixture = pair.mixture()
    assert isinstance(mixture, OrbitMixture) and mixture.network is pair.network and mixture.action is pair.action


def test_check_sees_a_layer_that_was_exchanged():
    pair = bayesianize(plain(), rotations(), SHAPE)
    pair.network[0].padding = (1, 0)
    pair.network[0]._reversed_padding_repeated_twice = [0, 0, 1, 1]
    assert pair.check(inputs()) > 1e-3
    with pytest.raises(Refusal, match="commute"):
        Symmetric(pair.network, pair.action)
    with pytest.raises(Refusal):
        Symmetric(pair.network, rotations(), SHAPE)


# --- expansions ---

@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("name", SPACES)
def test_the_pair_of_an_expansion(name, arrangement):
    pair = bayesianize(plain(), SPACES[name], SHAPE, scale=0.1)
    if name == "D4" and arrangement == "row_rolled":
        with pytest.raises(Refusal, match="abelian"):
            pair.expand(arrangement)
        return
    wide = pair.expand(arrangement)
    assert arrangement_of(wide.network) == arrangement and wide.group == pair.group
    assert same(wide.action, expand(pair.network, pair.action, arrangement).action)
    assert wide.check(inputs()) < exact64
    assert wide.network[0].out_channels == 4 * pair.group.order
    equivariant = arrangement != "row_constant" or name in ("C1", "C2")
    assert (wide.drift().relative < exact64) == equivariant
    if name != "C1":
        defect = wide.defect(inputs(), 64, generator=seeded())
        assert (abs(defect.value) < 4 * defect.standard_error) == equivariant


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("arrangement", ["regular", "block_diagonal"])
def test_expansions_with_the_generators_in_either_order(order, arrangement):
    wide = bayesianize(plain(), reordered(rotations_and_flips(), order), SHAPE).expand(arrangement)
    assert wide.check(inputs()) < exact64 and wide.drift().relative < exact64


def test_of_the_trivial_group_there_is_no_defect():
    pair = bayesianize(plain(), SPACES["C1"], SHAPE)
    with pytest.raises(Refusal, match="equivariance takes 2"):
        pair.defect(inputs(), 8)


# --- copies, devices, words ---

@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, lambda pair: pickle.loads(pickle.dumps(pair))],
                         ids=["deepcopy", "copy", "pickle"])
@pytest.mark.parametrize("change", [lambda pair: pair, lambda pair: pair.expand("row_rolled"), Symmetric.tie],
                         ids=["small", "expanded", "tied"])
def test_copies(pair, change, again):
    pair = change(pair)
    other = again(pair)
    assert isinstance(other, Symmetric) and equal_states(other.network, pair.network)
    assert same(other.action, pair.action) and (other.network is pair.network) == (again is copy.copy)
    found = [each.predictions(inputs(), 3, generator=seeded()).probabilities for each in (pair, other)]
    assert torch.equal(*found)
    assert arrangement_of(other.network) == arrangement_of(pair.network)


def test_it_is_itself_and_nothing_else(pair):
    other = Symmetric(pair.network, pair.action)
    assert pair == pair and pair != other and len({pair, other}) == 2
    replaced = dataclasses.replace(pair, network=other.network)
    assert replaced.network is pair.network and replaced.action is pair.action


def test_a_device(pair):
    assert pair.to("cpu") is pair and pair.to(torch.device("cpu")).network is pair.network


def test_cuda(require_cuda):
    pair = bayesianize(plain(), rotations(), SHAPE).to(require_cuda)
    assert next(pair.network.parameters()).is_cuda
    for each in (Symmetric(pair.network, pair.action), pair.expand("regular"), pair.average(), pair.tie()):
        assert next(each.network.parameters()).is_cuda and each.check(inputs().to(require_cuda)) < 1e-10
        assert each.predictions(inputs(), 4).probabilities.is_cuda
    there = pair.divergences().kl
    assert there.is_cuda and there.max() > 0
    assert_close(there, pair.to("cpu").divergences().kl)


def test_what_it_says(pair):
    counted = sum(tensor.numel() for tensor in variational_tensors(pair.network).values())
    text, ends = repr(pair), (str(SHAPE), "(3,)")
    for words in ("Sequential", f"{counted:,} weights", "MeanFieldGaussian", "C4", "quarter turns", *ends):
        assert words in text
    assert "expanded" not in text and "expanded as row_rolled" in repr(pair.expand("row_rolled"))


# --- mistakes ---

def full():
    return bayesianize(nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 2)).double(), POINTS, family=FullGaussian)


def wrong_layer():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.Flatten(), nn.Linear(2, 2))


BAYESIAN = with_posteriors(plain())
ACTION = network_action(BAYESIAN, field(rotations(), SHAPE))
MISTAKES = {
    "plain": (lambda: Symmetric(plain(), rotations(), SHAPE), r"bayesianize\(network, symmetry, shape\)"),
    "no shape": (lambda: Symmetric(BAYESIAN, rotations()), r"shape=\(C, H, W\)"),
    "no shape, plain": (lambda: bayesianize(plain(), rotations()), r"shape=\(C, H, W\)"),
    "shape of other data": (lambda: Symmetric(BAYESIAN, field(rotations(), SHAPE), (1, 8, 8)), r"shape=\(1, 4, 4\)"),
    "a number": (lambda: Symmetric(BAYESIAN, field(rotations(), SHAPE), 4), r"shape=\(C, H, W\)"),
    "not square": (lambda: Symmetric(BAYESIAN, rotations(), (1, 4, 6)), "by cropping"),
    "other channels": (lambda: Symmetric(BAYESIAN, rotations(), (3, 4, 4)), "to have 1 channels, but got 3"),
    "a group": (lambda: Symmetric(BAYESIAN, Cyclic(4), SHAPE), r"rotations\(\) with shape"),
    "a group, plain": (lambda: bayesianize(plain(), Cyclic(4), SHAPE), r"bayesianize\(network, rotations"),
    "a name": (lambda: Symmetric(BAYESIAN, "C4", SHAPE), r"rotations\(\)"),
    "nothing": (lambda: Symmetric(BAYESIAN, None), r"rotations\(\)"),
    "no network": (lambda: Symmetric(None, rotations(), SHAPE), "torch network"),
    "swapped": (lambda: Symmetric(rotations(), BAYESIAN, SHAPE), "another order"),
    "layers": (lambda: bayesianize([nn.Linear(4, 2)], POINTS), r"nn\.Sequential\(\*layers\)"),
    "whole action and shape": (lambda: Symmetric(BAYESIAN, ACTION, SHAPE), r"Symmetric\(network, action\.input, hid"),
    "whole action and hidden": (lambda: Symmetric(BAYESIAN, ACTION, hidden="regular"), "hidden='regular'"),
    "action of another": (lambda: Symmetric(with_posteriors(plain(nn.Conv2d(4, 4, 1))), ACTION),
                          "unknown to the action"),
    "does not commute": (lambda: bayesianize(wrong_layer(), rotations(), SHAPE), "'0: Conv2d"),
    "family in the symmetry's place": (lambda: bayesianize(plain(), MeanFieldGaussian), r"family=MeanFieldGaussian"),
    "scale in the symmetry's place": (lambda: bayesianize(plain(), 0.1), r"scale=0\.05"),
    "shape without symmetry": (lambda: bayesianize(plain(), shape=SHAPE), r"bayesianize\(network, rotations"),
    "hidden without symmetry": (lambda: bayesianize(plain(), hidden="regular"), r"bayesianize\(network, rotations"),
    "output without symmetry": (lambda: bayesianize(plain(), output=POINTS), r"bayesianize\(network, rotations"),
    "Bayesian already": (lambda: bayesianize(BAYESIAN, rotations(), SHAPE), "Bayesian already"),
    "family that is not closed": (lambda: full().expand(), "FullGaussian"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_what_to_type(mistake):
    call, words = MISTAKES[mistake]
    with pytest.raises(Refusal, match=words):
        call()


TAKEN_APART = {
    "Symmetric": lambda pair: Symmetric(pair, rotations(), SHAPE),
    "bayesianize": lambda pair: bayesianize(pair, rotations(), SHAPE),
    "expand": lambda pair: expand(pair, pair.action),
    "predict": lambda pair: predict(pair, inputs(), draws=2),
    "kl_sum": kl_sum,
    "drift": lambda pair: drift(pair, pair.action),
    "network_action": lambda pair: network_action(pair, field(rotations(), SHAPE)),
    "orbit_predictions": lambda pair: orbit_predictions(pair, inputs(), pair.action, 4),
}


@pytest.mark.parametrize("name", TAKEN_APART)
def test_a_pair_where_its_network_belongs(pair, name):
    with pytest.raises(Refusal, match=r"pair\.network"):
        TAKEN_APART[name](pair)


def test_a_pair_where_its_action_belongs(pair):
    for call in (drift, symmetrize, expand):
        with pytest.raises(Refusal, match=r"pair\.action"):
            call(pair.network, pair)


def test_the_fixes_work(pair):
    """Every fix that the mistakes name, typed."""
    pairs = [bayesianize(plain(), rotations(), (1, 28, 28)), Symmetric(BAYESIAN, rotations(), shape=SHAPE),
             Symmetric(BAYESIAN, ACTION.input), Symmetric(BAYESIAN, ACTION.input, hidden="trivial", output=None),
             Symmetric(pair.network, pair.action)]
    assert all(each.group == Cyclic(4) for each in pairs)
    assert isinstance(bayesianize(plain(), family=MeanFieldGaussian, scale=0.05), nn.Module)
