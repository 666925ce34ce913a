"""Orbits and projections against the mean over the group."""

import operator

import pytest
import sympy as sp
import torch
from torch import nn

from helpers import normal
from helpers_equivariance import SIGNED_ACTIONS, group_mean, signed_mixture, turned_vectors
from symbnn.symmetry.actions import Action, natural_action, regular_channels, sign_change
from symbnn.symmetry.axes import AxesAction, Grid, Known, Still
from symbnn.symmetry.fields import field, point_symmetries, rotations, rotations_and_flips, shifts
from symbnn.symmetry.groups import Cyclic, Permutations, Product
from symbnn.symmetry.networks import network_action, unit_permutations
from symbnn.symmetry.orbits import Orbits, independent
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


def _factor(action, k):
    return action.pulled_back(Product(Permutations(3), Cyclic(2)), operator.itemgetter(k))


def _grid(space, size, copy=0):
    return [(Grid(space, k, size, copy),) for k in range(space.ndim)]


C4, D4, CUBE = rotations(), rotations_and_flips(), point_symmetries(3)
NATURAL, SIGN = _factor(natural_action(Permutations(3)), 0), _factor(sign_change(2), 1)
VECTORS = natural_action(CUBE.group)
HALF = _factor(regular_channels(Cyclic(2), 2), 1)
SHIFTED = Product(Permutations(3), Cyclic(2))
FACTORED = {  # axes of a weight, and the sizes of the blocks that are moved independently
    "kernels": (AxesAction(C4.group, ((Still(2),), (Still(3),), *_grid(C4, 3))), [9]),
    "kernels first": (AxesAction(C4.group, (*_grid(C4, 3), (Still(2),))), [9]),
    "regular channels": (AxesAction(C4.group, ((Known(regular_channels(C4.group, 3)),), (Still(2),), *_grid(C4, 3))),
                         [36]),
    "vectors on the cube": (AxesAction(CUBE.group, ((Known(VECTORS),), (Still(2),), *_grid(CUBE, 2))), [24]),
    "flattened pixels": (AxesAction(D4.group, ((Still(3),), tuple(axis[0] for axis in _grid(D4, 3)))), [9]),
    "a field": (field(D4, (4, 3, 3)), [9]),
    "a field of regular channels": (field(C4, (8, 3, 3), regular_channels(C4.group, 2)), [36]),
    "two actors": (AxesAction(SHIFTED, ((Known(NATURAL),), (Known(HALF),), (Still(2),), (Known(SIGN),))), [3, 2]),
    "two actors, interleaved": (AxesAction(SHIFTED, ((Known(HALF),), (Known(NATURAL),), (Known(HALF),))), [3, 4]),
    "one that moves all": (AxesAction(SHIFTED, ((Known(HALF),), (Known(NATURAL),), (Known(HALF),), (Known(
        Action.product(NATURAL, HALF).flattened()),))), [576]),
    "one actor twice": (AxesAction(SHIFTED, ((Known(NATURAL),), (Known(NATURAL),), (Known(HALF),))), [9, 2]),
    "a product": (Action.product(_factor(sign_change(2), 1), _factor(natural_action(Permutations(3)), 0)), [1, 3]),
    "shifts by two": (shifts(2, step=2, ndim=1).on(4), [2]),
    "nothing moves": (Action.trivial(C4.group, (2, 3)), []),
}


@pytest.mark.parametrize("name", FACTORED)
def test_block_by_block_is_the_same_as_over_one_table(name):
    action, sizes = FACTORED[name]
    _, blocks = independent(action)
    assert sorted(its.numel for _, its in blocks) == sorted(sizes)
    orbits, whole = Orbits(action), Orbits(Action(action.group, action.shape, _Opaque(action)))
    assert orbits.dimension == whole.dimension and repr(orbits) == repr(whole)
    for a, b in zip(orbits.tables(), whole.tables(), strict=True):
        assert torch.equal(a, b)
    x = normal(2, 3, *action.shape)
    assert_close(orbits.restrict(x), whole.restrict(x))
    assert_close(orbits.project(x), whole.project(x))
    assert torch.equal(orbits.expand(whole.restrict(x)), whole.expand(whole.restrict(x)))
    assert torch.equal(orbits.restrict(orbits.project(x)), orbits.restrict(x))  # not one bit is lost
    for g in action.group.elements():
        assert torch.equal(action.act(g, orbits.project(x)), orbits.project(x))


class _Opaque:
    """The rule of an action, of whose axes nothing is known."""

    def __init__(self, action):
        self.action = action

    def __call__(self, g):
        return self.action(g)


def test_no_table_over_all_weights_is_made(monkeypatch):
    network = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                            nn.Linear(12, 2))
    for hidden, moved in {"trivial": 9, "regular": 36}.items():
        weights = network_action(network, field(C4, (8, 5, 5)), hidden=hidden).parameters["0.weight"]
        assert [its.numel for _, its in independent(weights)[1]] == [moved]
        monkeypatch.setattr(weights, "rule", lambda g: pytest.fail("a table over all weights"))
        orbits = Orbits(weights)
        assert orbits.project(normal(*weights.shape)).shape == weights.shape and "_whole" not in vars(orbits)
