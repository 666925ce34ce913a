"""Orbits and projections, parameters under an action, projected gradients, drift, tied weights."""

import operator

import pytest
import sympy as sp
import torch

from symbnn.actions import (
    Action,
    SignedPermutation,
    field,
    flips,
    natural_action,
    regular_channels,
    rotations,
    rotations_and_flips,
    shifts,
    sign_change,
)
from symbnn.groups import Cyclic, Product, Symmetric
from symbnn.invariance import Orbits
from symbnn.models import Architecture, build
from symbnn.network_actions import unit_permutations
from tolerances import assert_close, exact32


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def turned_vectors():
    """C4 turning two channels as it turns a vector, beside two channels that its generator negates."""
    quarter, negate = torch.tensor([[0.0, -1.0], [1.0, 0.0]]), -torch.eye(2)
    matrix = torch.block_diag(quarter, negate)
    step = SignedPermutation.from_matrix(matrix)

    def rule(g):
        result = SignedPermutation.identity(4)
        for _ in range(g):
            result = step @ result
        return result

    return Action(Cyclic(4), (4,), rule, "vectors")


def signed_mixture():
    """C2 that exchanges coordinates 0 and 1 with a minus sign, fixes 2, negates 3."""
    swap = SignedPermutation([1, 0, 2, 3], [-1, -1, 1, -1])
    return Action(Cyclic(2), (4,), lambda g: swap if g else SignedPermutation.identity(4), "signed mixture")


def flips_and_units():
    group = Product(Cyclic(2), Symmetric(3))
    space = flips().on(2, 3).pulled_back(group, operator.itemgetter(0))
    units = natural_action(Symmetric(3)).pulled_back(group, operator.itemgetter(1))
    return Action.product(units, space)


ACTIONS = {
    "C4 on a kernel": rotations().on(3, 3),
    "C4 on regular channels and a kernel": Action.product(
        regular_channels(Cyclic(4), 2), Action.trivial(Cyclic(4), (2,)), rotations().on(2, 2)
    ),
    "D4": field(rotations_and_flips(), (2, 4, 4)),
    "flips": field(flips(), (1, 3, 5)),
    "shifts": field(shifts(6, 1), (1, 2, 6)),
    "all signs change": sign_change(5),
    "vectors": turned_vectors(),
    "some signs change": signed_mixture(),
    "S4 on rows and columns": Action.product(natural_action(Symmetric(4)), natural_action(Symmetric(4))),
    "C2 x S3": flips_and_units(),
    "trivial group": Action.trivial(Cyclic(1), (2, 3)),
    "a number": Action.trivial(Cyclic(4), ()),
}
every_action = pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS.keys())


def group_mean(action, x):
    return torch.stack([action.act(g, x) for g in action.group.elements()]).mean(0)


@every_action
def test_projection_is_the_mean_over_the_group(action):
    orbits, x = Orbits(action), random(2, 3, *action.shape)
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
    orbits, x, y = Orbits(action), random(*action.shape, seed=1), random(*action.shape, seed=2)
    projected = orbits.project(x)
    assert torch.equal(orbits.project(projected), projected)
    for g in action.group.elements():
        assert torch.equal(action.act(g, projected), projected)  # equal bit by bit within an orbit
    assert_close((projected * y).sum(), (x * orbits.project(y)).sum())


@every_action
def test_restrict_and_expand_are_inverse(action):
    orbits = Orbits(action)
    z = random(5, 2, orbits.dimension)
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
    x = random(512, 20)
    assert_close(into.project(x), x.mean(0).expand(512, 20))
    between = Orbits(action.parameters[middle])
    assert between.dimension == 1  # rows and columns are permuted independently
    w = random(512, 512)
    assert_close(between.project(w), w.mean().expand(512, 512))


def test_projection_has_the_right_gradient():
    orbits = Orbits(ACTIONS["D4"])
    x = random(*orbits.shape).requires_grad_()
    assert torch.autograd.gradcheck(orbits.project, x)
