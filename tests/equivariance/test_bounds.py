"""Divergences of a posterior from its push-forwards over many groups; the bound by information."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from helpers import normal
from helpers_equivariance import LAWS, at_most
from symbnn.equivariance.bounds import push_forward_divergences, through_information
from symbnn.errors import Refusal
from symbnn.posterior.block_gaussian import BlockGaussian
from symbnn.posterior.divergences import bretagnolle_huber, hellinger, log_affinity, wasserstein2_squared
from symbnn.posterior.families import FAMILIES
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import MeanFieldGaussian
from symbnn.posterior.layers import VariationalTensor, with_posteriors
from symbnn.posterior.log_normal import LogNormal
from symbnn.posterior.priors import isotropic
from symbnn.symmetry.actions import Action, natural_action, regular_channels, sign_change
from symbnn.symmetry.fields import flips, half_turns, rotations, rotations_and_flips
from symbnn.symmetry.groups import Cyclic, Dihedral, Permutations, Product
from symbnn.symmetry.networks import NetworkAction, unit_permutations
from symbnn.symmetry.signed_permutations import SignedPermutation
from tolerances import assert_close, exact64

ACTIONS = {
    "C2 signs": sign_change(4), "C3": regular_channels(Cyclic(3)), "C4": rotations().on(3, 3), "C2": flips().on(2, 3),
    "half": half_turns().on(2, 3), "D4": rotations_and_flips().on(3, 3), "D3": regular_channels(Dihedral(3)),
    "S3": natural_action(Permutations(3)), "C2xC3": regular_channels(Product(Cyclic(2), Cyclic(3))),
}


class OneTensor(nn.Module):
    """A network of one tensor, for the divergences alone."""

    def __init__(self, posterior, prior=None):
        super().__init__()
        self.weight = VariationalTensor(posterior, prior or isotropic()("weight", posterior))


def on_weight(action):
    """The action of such a network, of which the bounds ask for the weight alone."""
    return NetworkAction(action.group, action, action, {"weight": action}, {}, {})


def member(name, shape, seed):
    loc, log_scale = normal(*shape, seed=seed), 0.3 * normal(*shape, seed=seed + 1) - 1
    if name == "full":
        return FullGaussian(loc, log_scale.exp().flatten().diag())
    if name == "lognormal":
        return LogNormal(loc, log_scale, torch.ones(shape))
    return FAMILIES[name](loc, log_scale)


@pytest.mark.parametrize("which", ACTIONS)
@pytest.mark.parametrize("name", LAWS)
def test_divergences_over_every_small_group(which, name):
    action = ACTIONS[which]
    if name == "lognormal" and not action.is_unsigned():
        with pytest.raises(Refusal, match="sign mask"):
            push_forward_divergences(OneTensor(member(name, action.shape, 0)), on_weight(action))
        return
    q, group = member(name, action.shape, 3), action.group
    kl, affinity, moves = push_forward_divergences(OneTensor(q), on_weight(action))
    assert kl[0] == 0 and abs(affinity[0]) < exact64 and moves["weight"][0] < exact64
    with torch.no_grad():
        for k, g in enumerate(group.elements()):
            moved = q.push_forward(action(g))
            assert_close(kl[k], min(moved.kl(q), q.kl(moved)), 1e-10)  # both directions
            assert_close(affinity[k], log_affinity(q, moved), 1e-10)
            assert_close(moves["weight"][k], wasserstein2_squared(q, moved), 1e-10)
            back = group.index(group.inverse(g))
            assert_close(affinity[back], affinity[k], 1e-10)
    at_most(hellinger(affinity).square(), bretagnolle_huber(kl).square())
    assert hellinger(affinity)[0] == 0 or name == "full"
    assert kl[1:].max() > 1e-2


@pytest.mark.parametrize("which", ACTIONS)
@pytest.mark.parametrize("name", ["gaussian", "laplace"])
def test_divergences_grow_with_asymmetry_and_start_at_zero(which, name):
    action, previous = ACTIONS[which], None
    loc = normal(*action.shape, seed=1)
    average = sum(action.act(g, loc) for g in action.group.elements()) / action.group.order
    for left in (0.0, 0.01, 0.1, 0.5, 1.0):
        q = FAMILIES[name](average + left * (loc - average), torch.full(action.shape, -1.0).double())
        kl, affinity, moves = push_forward_divergences(OneTensor(q), on_weight(action))
        now = torch.stack([kl, -affinity, moves["weight"]])[:, 1:]
        if previous is None:
            assert now.max() < exact64
        else:
            assert bool((now >= previous).all()) and (now > previous).any()
        previous = now


def test_single_precision_parameters_are_compared_in_double():
    action, loc = ACTIONS["C4"], normal(3, 3, seed=1).float()
    q = MeanFieldGaussian(loc, torch.full((3, 3), -1.3))
    single = push_forward_divergences(OneTensor(q), on_weight(action))
    double = push_forward_divergences(OneTensor(MeanFieldGaussian(q.loc.double(), q.log_scale.double())),
                                        on_weight(action))
    assert torch.equal(single.kl, double.kl) and torch.equal(single.log_affinity, double.log_affinity)
    assert q.loc.dtype == torch.float32


def test_block_gaussian_over_a_kernel():
    loc, action = normal(2, 3, 3, seed=0), Action.product(Action.trivial(Cyclic(4), (2,)), rotations().kernel(3, 3))
    block = BlockGaussian(loc, torch.tensor([[[-1.0]], [[0.3]]]).double())
    spread = MeanFieldGaussian(loc, torch.tensor([[[-1.0]], [[0.3]]]).double().expand(2, 3, 3))
    found = [push_forward_divergences(OneTensor(q), on_weight(action)) for q in (block, spread)]
    for ours, theirs in zip(found[0][:2], found[1][:2], strict=True):
        assert_close(ours, theirs)
    assert_close(found[0].wasserstein2_squared["weight"], found[1].wasserstein2_squared["weight"])


@given(st.floats(0, 4))
def test_information_covers_every_pair_of_copies(shift):
    """One weight under the sign flip: exact total variation, information by quadrature."""
    z = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    weights = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    information = torch.trapezoid(weights * (math.log(2) - torch.nn.functional.softplus(-2 * shift * (z + shift))), z)
    tv = math.erf(shift / math.sqrt(2))
    at_most(tv, through_information(information.clamp_min(0)) + 1e-6)


def test_large_groups_are_refused():
    wide = nn.Sequential(nn.Linear(2, 12), nn.ReLU(), nn.Linear(12, 2))
    with pytest.raises(Refusal):
        push_forward_divergences(with_posteriors(wide), unit_permutations(wide, (2,)))


def test_sign_flips_of_one_weight_against_the_exact_value():
    """The whole way: network, action, predictions of a probit-like toy, and a bound that is an equality."""
    q = MeanFieldGaussian(*torch.tensor([[0.4], [0.0]], dtype=torch.float64))
    kl, affinity, moves = push_forward_divergences(OneTensor(q), on_weight(sign_change(1)))
    assert_close(kl[1], 2 * 0.4**2)
    assert_close(affinity[1], -0.4**2 / 2)
    assert_close(moves["weight"][1], 0.8**2)  # E f moves by 0.8 for f(theta) = theta, Lipschitz 1: an equality
    assert SignedPermutation([0], [-1]) == sign_change(1)(1)
    at_most(math.erf(0.4 / math.sqrt(2)), hellinger(affinity[1]))
