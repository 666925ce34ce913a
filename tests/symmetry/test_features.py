"""What flows between layers: shapes and actions of features, sets that stay together, ties of channel classes."""
import math

import pytest
import torch

from helpers_ground import refusal_of
from helpers_symmetry import assert_is_action
from symbnn.errors import Refusal
from symbnn.symmetry.actions import Action, natural_action, regular_channels, sign_change
from symbnn.symmetry.features import Features, Ledger, Site, moved_sets
from symbnn.symmetry.fields import field, flips, rotations, time_reversal
from symbnn.symmetry.groups import Cyclic, Permutations
from symbnn.symmetry.signed_permutations import SignedPermutation

MAP = Features(0, 8, rotations(), (3, 3), flat=False)
FLAT_MAP = Features(0, 8, rotations(), (3, 3))
VECTOR = Features(0, 8)
TABLE = Features(0, 8, flat=False, axes=(2, 4))


@pytest.mark.parametrize("x, shape, is_map", [(MAP, (8, 3, 3), True), (FLAT_MAP, (72,), False), (VECTOR, (8,), False),
                                              (TABLE, (2, 4), False)])
def test_shapes(x, shape, is_map):
    assert (x.shape, x.is_map, x.count) == (shape, is_map, math.prod(shape))
    action = x.action(regular_channels(Cyclic(4), 2))
    assert action.shape == shape
    assert_is_action(action)


def test_actions_follow_channels_and_grid():
    channels = regular_channels(Cyclic(4), 2)
    whole = field(rotations(), (8, 3, 3), channels)
    assert MAP.action(channels).agrees_with(whole) and FLAT_MAP.action(channels).agrees_with(whole.flattened())
    assert VECTOR.action(channels) is channels and TABLE.action(channels).agrees_with(channels)
    assert MAP.grid is MAP.space
    with pytest.raises(AssertionError, match="without spatial axes"):
        _ = VECTOR.grid


@pytest.mark.parametrize("sets, read", [
    ([[0, 1], [2, 3]], [1, 0]), ([[1, 0], [3, 2]], [1, 0]), ([[0, 3], [1, 2]], [1, 0]), ([[0, 2], [1, 3]], [0, 1]),
    ([[0, 1, 2, 3]], [0]), ([[0], [1], [2], [3]], [2, 3, 0, 1])])
def test_sets_that_are_carried_to_sets(sets, read):
    """By the map of four coordinates that reads i + 2."""
    found = moved_sets(SignedPermutation([2, 3, 0, 1], [1, -1, 1, 1]), torch.tensor(sets))
    assert found.tolist() == read


def test_sets_that_are_torn_apart():
    cycle = SignedPermutation([1, 2, 3, 0], [1] * 4)
    assert moved_sets(cycle, torch.tensor([[0, 1], [2, 3]])) is None
    assert moved_sets(cycle, torch.tensor([[0, 2], [1, 3]])).tolist() == [1, 0]


def test_ties_join_classes_whatever_their_order():
    for pairs in ([(0, 1), (2, 3), (1, 3)], [(3, 2), (3, 1), (1, 0)], [(2, 0), (3, 0), (1, 2)], [(0, 0), (1, 1)]):
        ledger = Ledger(Cyclic(2))
        for k in range(4):
            assert ledger.new_class(f"layer {k}", 4) == k
        for a, b in pairs:
            ledger.tie(a, b)
        joined = len(pairs) == 3
        assert [ledger.root(k) for k in range(4)] == ([0] * 4 if joined else [0, 1, 2, 3])  # the earliest is the root


def site(group=None, name="layer", label="layer: Linear(8, 4)"):
    ledger = Ledger(group or Cyclic(4))
    ledger.new_class("input", 8)
    return Site(ledger, name, label)


def test_a_layer_that_is_called_again_has_the_same_classes():
    here = site()
    assert here.write(VECTOR, 4) == 1 == here.write(VECTOR, 4) and here.ledger.layers == {"layer": (0, 1)}
    other = here.ledger.new_class("other", 8)
    assert here.write(Features(other, 8), 4) == 1 and here.ledger.root(other) == 0  # what it reads is tied
    narrow = here.ledger.new_class("narrow", 5)
    refusal = refusal_of(lambda: here.write(Features(narrow, 5), 4))
    assert "two calls on features of 8 and of 5 channels" in refusal.got and refusal.fix == "two layers"
    norm = site(name="norm")
    assert norm.write(VECTOR, 8, own=False) == 0 and norm.ledger.sizes == [8]


def test_a_site_refuses_in_the_name_of_its_layer():
    with pytest.raises(Refusal) as caught:
        site().refuse("what came", "why", "what to do")
    assert str(caught.value) == ("Expected: layers that commute with the group C4. Got: layer 'layer: Linear(8, 4)' "
                                 "with what came. Likely cause: why. Fix: what to do.")


def test_notes():
    here = site()
    here.forbid_signs(VECTOR, "a reason")
    here.declare("weight", lambda of: of(VECTOR))
    site_of_network = Site(here.ledger, "", "ReLU()")
    site_of_network.declare("bias", lambda of: of(VECTOR))
    assert here.ledger.unsigned == [(here, 0, "a reason")]
    assert [name for _, name, _ in here.ledger.parameters] == ["layer.weight", "bias"]
    rule = here.ledger.parameters[0][2]
    assert rule(lambda x: sign_change(x.channels)).shape == (8,)


def test_sets_are_asked_of_every_generator():
    """Of the two generators of S4 the exchange keeps {0, 1} and {2, 3}, the cycle does not."""
    here, sets = site(Permutations(4)), torch.tensor([[0, 1], [2, 3]])
    refusal = refusal_of(lambda: here.check_together(natural_action(Permutations(4)), sets))
    assert "tears apart" in refusal.cause and "dim=1" in refusal.fix
    here.check_together(natural_action(Permutations(4)), torch.arange(4)[:, None])
    still = Action.trivial(time_reversal().group, (4,))
    site(still.group).check_together(still, sets)
    site(Cyclic(2)).check_together(flips().on(1, 4).flattened(), torch.tensor([[0, 3], [1, 2]]))
