"""Orbits and projections against the mean over the group."""

import pytest
import sympy as sp
import torch

from helpers import normal
from helpers_equivariance import SIGNED_ACTIONS, group_mean, signed_mixture, turned_vectors
from symbnn.symmetry.actions import sign_change
from symbnn.symmetry.networks import unit_permutations
from symbnn.symmetry.orbits import Orbits
from symbnn.training.architectures import Architecture, build
from tolerances import assert_close, exact32

every_action = pytest.mark.parametrize("action", SIGNED_ACTIONS.values(), ids=SIGNED_ACTIONS.keys())


@every_action
def test_projection_is_the_mean_over_the_group(action):
    orbits, x = Orbits(action), normal(2, 3, *action.shape)
    assert_close(orbits.project(x), group_mean(action, x))
    assert_close(orbits.project(x.float()), group_mean(action, x), exact32)
    assert orbits.project(x.float()).dtype == torch.float32


@every_action
def test_dimension_is_the_mean_character(action):
    order = sp.Integer(action.group.order)
    traces = [int(action(g).matrix().trace()) for g in action.group.elements()]
    orbits = Orbits(action)
    assert orbits.dimension == sum(map(sp.Integer, traces)) / order
    projector = orbits.project(torch.eye(action.numel, dtype=torch.float64).view(-1, *action.shape))
    assert_close(projector.reshape(action.numel, action.numel).trace(), float(orbits.dimension))


@every_action
def test_projection_is_idempotent_bit_by_bit_and_self_adjoint(action):
    orbits, x, y = Orbits(action), normal(*action.shape, seed=1), normal(*action.shape, seed=2)
    projected = orbits.project(x)
    assert torch.equal(orbits.project(projected), projected)
    for g in action.group.elements():
        assert torch.equal(action.act(g, projected), projected)  # equal bit by bit within an orbit
    assert_close((projected * y).sum(), (x * orbits.project(y)).sum())


@every_action
def test_restrict_and_expand_are_inverse(action):
    orbits = Orbits(action)
    z = normal(5, 2, orbits.dimension)
    assert orbits.expand(z).shape == (5, 2, *action.shape)
    assert torch.equal(orbits.restrict(orbits.expand(z)), z)
    assert int(orbits.sizes.sum()) == int((orbits.orbit < orbits.dimension).sum())
    assert bool((orbits.sign[orbits.representatives] == 1).all())


def test_orbits_with_both_signs_vanish():
    assert Orbits(sign_change(5)).dimension == 0
    assert Orbits(turned_vectors()).dimension == 0
    orbits = Orbits(signed_mixture())
    assert_close(orbits.project(torch.tensor([1.0, 3.0, 5.0, 7.0])), torch.tensor([-1.0, 1.0, 5.0, 0.0]))


def test_permutations_of_many_units_without_listing_them():
    network = build(Architecture("mlp", (20,), 3, (512, 512)))
    action = unit_permutations(network, (20,))
    first, middle, _ = (name for name in action.parameters if name.endswith("weight"))
    into = Orbits(action.parameters[first])
    assert into.dimension == 20  # one number for each input: all units alike
    x = normal(512, 20)
    assert_close(into.project(x), x.mean(0).expand(512, 20))
    between = Orbits(action.parameters[middle])
    assert between.dimension == 1  # rows and columns are permuted independently
    w = normal(512, 512)
    assert_close(between.project(w), w.mean().expand(512, 512))


def test_projection_has_the_right_gradient():
    orbits = Orbits(SIGNED_ACTIONS["D4"])
    x = normal(*orbits.shape).requires_grad_()
    assert torch.autograd.gradcheck(orbits.project, x)
