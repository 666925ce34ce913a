"""Grids and feature maps: torch's own turns, flips and shifts; the axioms; sizes on which no group acts."""
import pytest
import torch

from helpers_ground import refusal_of
from helpers_symmetry import assert_can_be_sent, assert_is_action, random
from late import ORDERS, reordered
from symbnn.errors import Refusal
from symbnn.symmetry.actions import Action, check_action, regular_channels
from symbnn.symmetry.fields import (
    FieldAction,
    SpatialAction,
    field,
    flips,
    half_turns,
    rotations,
    rotations_and_flips,
    shifts,
    time_reversal,
    translations,
)
from symbnn.symmetry.groups import Cyclic, Dihedral, Product
from symbnn.symmetry.signed_permutations import SignedPermutation
from tolerances import assert_close, exact32, exact64

ACTIONS = [
    rotations().on(5, 5), rotations().on(4, 4), rotations_and_flips().on(4, 4), rotations_and_flips().kernel(3, 3),
    flips().on(3, 4), half_turns().on(3, 4), time_reversal().on(7), shifts(7).on(3, 7), shifts(3, step=-2).on(2, 6),
    shifts(4, ndim=1).on(2), translations(3, 2).on(3, 2), translations(4).on(4),
    SpatialAction.trivial(Dihedral(3), 2).on(2, 3),
    field(rotations_and_flips(), (16, 3, 3), regular_channels(Dihedral(4), 2)), field(rotations(), (3, 4, 4)),
]


@pytest.mark.parametrize("action", ACTIONS, ids=repr)
def test_homomorphism(action):
    assert_is_action(action)


@pytest.mark.parametrize("action", ACTIONS, ids=repr)
def test_pickle_and_copy(action):
    assert_can_be_sent(action)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, exact32), (torch.float64, exact64)])
def test_images_against_torch(dtype, tolerance):
    x = random(2, 3, 6, 6, dtype=dtype)
    turns = field(rotations_and_flips(), (3, 6, 6))
    for k in range(4):
        assert_close(field(rotations(), (3, 6, 6)).act(k, x), x.rot90(k, (-2, -1)), tolerance)
        assert_close(turns.act((k, 0), x), x.rot90(k, (-2, -1)), tolerance)
        assert_close(turns.act((k, 1), x), x.flip(-1).rot90(k, (-2, -1)), tolerance)
    assert_close(field(half_turns(), (3, 6, 6)).act(1, x), x.flip(-1, -2), tolerance)
    assert_close(field(flips(), (3, 6, 6)).act(1, x), x.flip(-1), tolerance)
    assert_close(field(shifts(3, step=2), (3, 6, 6)).act(2, x), x.roll(4, -1), tolerance)
    assert_close(field(translations(6, 6), (3, 6, 6)).act((1, 4), x), x.roll((1, 4), (-2, -1)), tolerance)
    assert_close(field(time_reversal(), (3, 6)).act(1, x[:, :, 0]), x[:, :, 0].flip(-1), tolerance)


def test_field_keeps_its_parts():
    channels = regular_channels(Cyclic(4), 2)
    action = field(rotations(), (8, 5, 5), channels)
    assert isinstance(action, FieldAction) and action.channels is channels
    assert action.size == (5, 5) and action.shape == (8, 5, 5) and action.numel == 200


REFUSED = {
    "non-square image": (lambda: rotations().on(28, 20), r"equal length.*\(28, 20\).*20 x 20 pixels"),
    "non-square kernel": (lambda: rotations_and_flips().kernel(3, 5), r"equal length.*3 x 3 pixels"),
    "shifts that do not close": (lambda: shifts(4).on(28, 28), r"come back to the start.*shifts\(28\)"),
    "wrong number of axes": (lambda: time_reversal().on(5, 5), r"as 'time reversal' moves, 1.*\(5, 5\)"),
    "another group's channels": (lambda: field(rotations(), (8, 5, 5), regular_channels(Dihedral(4))),
                                 "an action of C4, the group of the pixels"),
    "channels on two axes": (lambda: FieldAction(Action.trivial(Cyclic(4), (2, 4)), rotations(), (5, 5)),
                             "one axis of channels"),
    "another number of channels": (lambda: field(rotations(), (16, 5, 5), regular_channels(Cyclic(4), 2)),
                                   r"on 16 channels.*\(8, 5, 5\)"),
    "no axis of channels": (lambda: field(rotations(), (28, 28)), r"3 axes.*field\(space, \(1, 28, 28\)\)"),
    "a batch": (lambda: field(rotations(), (9, 1, 28, 28)), r"3 axes.*field\(space, \(1, 28, 28\)\)"),
    "a step that is no whole number": (lambda: shifts(4, step=1.5), "step=1"),
    "no axes": (lambda: shifts(4, ndim=0), "ndim=2 for images"),
    "half a pixel": (lambda: translations(4, 4.5), r"translations\(28, 28\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    refused, words = REFUSED[name]
    with pytest.raises(Refusal, match=words):
        refused()


def test_fixes_work():
    refusal = refusal_of(lambda: shifts(4).on(20, 28))
    general = "shifts(n, step) with n * step a multiple of 28"
    for fix in refusal.fix.replace(general, "shifts(4, step=7)").split(", or "):
        check_action(eval(fix).on(20, 28))
    for space in (flips(), half_turns()):
        check_action(space.on(28, 20))
    refusal = refusal_of(lambda: field(rotations(), (28, 28)))
    assert eval(refusal.fix.split(" for ")[0], {"field": field, "space": rotations()}).shape == (1, 28, 28)
    channels = regular_channels(Cyclic(4), 2)
    assert field(rotations(), (8, 5, 5), channels).channels is channels


# --- conditions over all generators, one of which alone breaks them


@pytest.mark.parametrize("order", ORDERS)
def test_every_generator_moves_a_grid(order):
    with pytest.raises(Refusal, match="equal length"):  # the flip would do
        reordered(rotations_and_flips(), order).on(4, 6)
    with pytest.raises(Refusal, match="equal length"):
        reordered(rotations_and_flips(), order).kernel(1, 3)
    by_axis = reordered(translations(4, 3), order)
    for size in ((4, 5), (3, 3)):  # shifts that close up along one axis alone
        with pytest.raises(Refusal, match="come back to the start"):
            by_axis.on(*size)
    still = SignedPermutation.identity(2)
    rows = SpatialAction(Product(Cyclic(4), Cyclic(3)), 2, lambda g: still, lambda g: (2 * g[0], 0), "rows")
    with pytest.raises(Refusal, match="come back to the start"):
        reordered(rows, order).on(6, 6)
    coarser = reordered(rows, order).resampled((8, 8), (4, 4))
    assert [coarser.shift(g) for g in ((1, 0), (0, 1), (3, 2))] == [(1, 0), (0, 0), (3, 0)]
