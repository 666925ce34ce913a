"""Which subgroup is left where a network breaks a group."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers_symmetry import random, randomised
from symbnn.errors import Refusal
from symbnn.symmetry.actions import Action, check_action, natural_action, regular_channels
from symbnn.symmetry.axes import AxesAction, Grid, Known, Still
from symbnn.symmetry.fields import (
    field,
    point_rotations,
    point_symmetries,
    rotations,
    rotations_and_flips,
    shifts,
    spelled,
)
from symbnn.symmetry.groups import Cyclic, Dihedral, Permutations, Product, Subgroup
from symbnn.symmetry.hyperoctahedral import Signed
from symbnn.symmetry.networks import intertwining_error, network_action
from symbnn.symmetry.subgroups import largest_subgroup
from tolerances import exact64

SQUARE = rotations_and_flips()
IMAGE = field(SQUARE, (1, 8, 8))
DIAGONAL = next(g for g in SQUARE.group.elements() if g[1] and SQUARE.point(g).index.tolist() == [1, 0]
                and bool((SQUARE.point(g).sign > 0).all()))


class Padded(nn.Module):
    """A convolution of an image that is padded by other numbers on the four sides."""

    def __init__(self, *sides):
        super().__init__()
        self.sides, self.layer = sides, nn.Conv2d(1, 2, 3)

    def forward(self, x):
        return self.layer(F.pad(x, self.sides)).mean((2, 3))


class Rows(nn.Module):
    """A recurrence that reads an image row by row, in one direction."""

    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(8, 3, batch_first=True)

    def forward(self, x):
        return self.layer(x.squeeze(1))[0][:, -1]


def strided(*layers):
    return nn.Sequential(nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


CASES = {  # network, generators of what is left, how the refusal spells it
    "stride 2 on an even size": (strided, (DIAGONAL,), f"action.restricted({DIAGONAL})"),
    "a recurrence over rows": (Rows, ((0, 1),), "flips() in place of 'quarter turns and flips'"),
    "padding on one side": (lambda: Padded(1, 0, 0, 0), ((2, 1),), "action.restricted((2, 1))"),
    "padding of one axis": (lambda: Padded(1, 1, 0, 0), ((2, 0), (0, 1)), "action.restricted((2, 0), (0, 1))"),
    "padding at the corner": (lambda: Padded(0, 1, 0, 1), (DIAGONAL,), f"action.restricted({DIAGONAL})"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_largest_subgroup_is_named_and_it_acts(name):
    make, generators, words = CASES[name]
    network = randomised(make()).eval()
    with pytest.raises(Refusal) as refused:
        network_action(network, IMAGE)
    left = Subgroup(Dihedral(4), generators)
    assert f"the largest subgroup that the network has, {left.order} of 8 elements: " in refused.value.fix
    assert refused.value.fix.rpartition("elements: ")[2] == words
    part = IMAGE.restricted(*generators)
    assert intertwining_error(network, network_action(network, part), random(3, 1, 8, 8)) < exact64
    for g in set(Dihedral(4).elements()) - set(left.elements()):  # and nothing else does
        with pytest.raises(Refusal):
            network_action(network, IMAGE.restricted(*generators, g))


def test_actions_on_hidden_channels_and_outputs_are_restricted_too():
    network = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                            nn.Linear(8, 8))
    output, hidden = regular_channels(SQUARE.group), {"0": regular_channels(SQUARE.group)}
    for options in ({"hidden": "regular"}, {"hidden": hidden, "output": output},
                    {"hidden": lambda name, size: hidden[name]}):
        with pytest.raises(Refusal, match=r"2 of 8 elements: action.restricted\("):
            network_action(network, IMAGE, **options)


def test_several_inputs_are_restricted_together():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = strided()

        def forward(self, x, y):
            return self.layer(x + y)

    with pytest.raises(Refusal, match=r"its.restricted\(.*\) for each of the actions"):
        network_action(Two(), (IMAGE, IMAGE))


def test_where_nothing_is_left_it_says_so():
    layer = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(32, 3))
    with pytest.raises(Refusal, match="no element of C4 but the identity is known") as refused:
        network_action(layer, field(rotations(), (1, 8, 8)))
    assert "largest subgroup" not in refused.value.fix


@pytest.mark.parametrize("action", [
    field(shifts(64), (1, 2, 64)), field(rotations(), (1, 8, 8)).pulled_back(Cyclic(2), lambda g: 2 * g)],
    ids=["more than 48 elements", "no proper subgroup"])
def test_other_groups_are_not_tried(action):
    with pytest.raises(Refusal) as refused:
        network_action(nn.Sequential(nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.Flatten()), action)
    assert "largest subgroup" not in str(refused.value) and "identity" not in str(refused.value)


def test_a_network_that_nobody_can_read_is_refused_as_before():
    class Ranks(nn.Module):
        def forward(self, x):
            return torch.argsort(x, dim=-1).double()

    with pytest.raises(Refusal, match="a call of argsort") as refused:
        network_action(Ranks(), IMAGE)
    assert "largest subgroup" not in str(refused.value) and "identity" not in str(refused.value)


def test_half_of_the_cube():
    cube = point_symmetries(3)
    layer = nn.Sequential(nn.Conv3d(1, 1, 2, stride=2), nn.AdaptiveAvgPool3d(1))
    network_action(layer, field(cube, (1, 4, 4, 4)))
    layer = nn.Sequential(nn.Conv3d(1, 1, 3, stride=2, padding=1), nn.AdaptiveAvgPool3d(1))
    with pytest.raises(Refusal, match="6 of 48 elements"):  # the axes may be exchanged, none may be reversed
        network_action(layer, field(cube, (1, 4, 4, 4)))


GROUPS = [Dihedral(4), Dihedral(6), Permutations(4), Product(Cyclic(4), Cyclic(2)), Cyclic(12), Signed(2)]


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_the_largest_is_found_for_every_subgroup_that_two_elements_generate(group):
    for pair in itertools.product(group.elements(), repeat=2):
        whole = set(Subgroup(group, pair).elements())
        found = largest_subgroup(group, lambda generators, whole=whole: whole.issuperset(generators))
        if len(whole) < group.order:
            assert set(Subgroup(group, found).elements()) == whole


def test_what_is_generated_need_not_hold():
    def one_at_a_time(generators):  # only cyclic subgroups
        return len(generators) < 2

    found = largest_subgroup(Dihedral(4), one_at_a_time)
    assert Subgroup(Dihedral(4), found).order == 4


@pytest.mark.parametrize(("group", "largest"), [(Product(*[Cyclic(2)] * 4), 8), (Product(*[Cyclic(2)] * 4), 4),
                                                (Product(Cyclic(4), Cyclic(2), Cyclic(2)), 8)], ids=str)
def test_the_largest_may_need_more_than_two_generators(group, largest):
    """Each element holds, all together do not: what is found is as large as is allowed, and nothing larger is said."""
    def few(generators):
        return Subgroup(group, generators).order <= largest

    assert Subgroup(group, largest_subgroup(group, few, 1000)).order == largest
    assert largest_subgroup(group, few, group.order) is None or largest == 8  # asked too much: nothing is said


def test_trying_ends():
    asked = []
    assert largest_subgroup(Dihedral(4), lambda generators: not asked.append(generators) and not generators, 3) is None
    assert len(asked) == 4  # the trivial subgroup, and three more


ACTIONS = {
    "field": field(SQUARE, (8, 4, 4), regular_channels(SQUARE.group)),
    "grid": SQUARE.on(5, 5),
    "product": Action.product(natural_action(Permutations(3)), natural_action(Permutations(3))),
    "axes": AxesAction(SQUARE.group, ((Known(regular_channels(SQUARE.group)),), (Still(2),), (Grid(SQUARE, 0, 3),),
                                      (Grid(SQUARE, 1, 3),))),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_restriction_is_the_same_action_of_fewer_elements(name):
    action = ACTIONS[name]
    g = action.group.generators()[0]
    part = action.restricted(g)
    check_action(part)
    assert type(part) is type(action) and part.group.order < action.group.order
    assert len(part.parts) == len(action.parts) and [len(its) for its in part.pieces()] == [
        len(its) for its in action.pieces()]
    grids = [atom for axis in getattr(part, "axes", ()) for atom in axis if isinstance(atom, Grid)]
    assert all(atom.space.group == part.group for atom in grids)
    x = random(2, *action.shape)
    for h in part.group.elements():
        assert part(h) == action(h) and torch.equal(part.act(h, x), action.act(h, x))
    with pytest.raises(Refusal, match="an element of"):
        action.restricted("turn")


def test_restrictions_are_spelled_by_the_name_of_what_they_are():
    assert spelled(SQUARE.restricted((1, 0))) == "rotations()"
    assert spelled(SQUARE.restricted((2, 0))) == "half_turns()"
    assert spelled(point_symmetries(2)) == "rotations_and_flips()"
    assert spelled(point_symmetries(2).restricted((-1, 2))) == ""  # upside down
    assert spelled(point_rotations(3)) == "point_rotations(3)" and spelled(shifts(4)) == ""
