"""Axes and what they take to move alike: ties, splits, cuts; the action of a tensor's axes against its full table."""
import math

import pytest
import torch

from helpers_ground import refusal_of
from helpers_symmetry import assert_can_be_sent, assert_is_action, random
from symbnn.errors import Refusal
from symbnn.symmetry.actions import Action, natural_action, regular_channels, sign_change
from symbnn.symmetry.axes import (
    Absolute,
    AxesAction,
    Grid,
    Joint,
    Known,
    Parts,
    Still,
    Uncoupled,
    Unknown,
    absolute,
    action_on,
    axes_of,
    axis_size,
    is_still,
    merge_grids,
    resolved,
    split_grid,
)
from symbnn.symmetry.features import Features, Ledger, Site, in_words, joined
from symbnn.symmetry.fields import FieldAction, field, flips, rotations, rotations_and_flips, shifts, time_reversal
from symbnn.symmetry.groups import Cyclic, Permutations
from symbnn.symmetry.signed_permutations import SignedPermutation


def site(group=None, label="layer: Linear(8, 4)", line=""):
    return Site(Ledger(group or Cyclic(2)), "linear", label, line)


def settle(site):
    for check in site.ledger.checks:
        check()


def grid(space, size, copy=0):
    return [(Grid(space, axis, size, copy),) for axis in range(space.ndim)]


SIGNS, SWAP = Known(sign_change(2), "signs"), Known(regular_channels(Cyclic(2), 1), "swap")
TURN = Known(regular_channels(Cyclic(4), 1), "turn")

# --- the action of axes


def all_axes():
    """Axes of all kinds, by what they are."""
    turns, both = rotations(), rotations_and_flips()
    mixed = Action(Cyclic(4), (2, 2), rotations().on(2, 2), "turns of a plain table")
    return {
        "still": (Cyclic(2), [(Still(3),), (), (Still(2),)]), "known": (Cyclic(2), [(SIGNS,), (SWAP,), (Still(2),)]),
        "products in one axis": (Cyclic(2), [(SIGNS, Still(2), SWAP)]),
        "grid": (Cyclic(4), [(TURN,), *grid(turns, 3)]),
        "grid, axes exchanged": (Cyclic(4), [*grid(turns, 3)[::-1], (TURN,)]),
        "flattened grid": (both.group, [(*grid(both, 3)[0], *grid(both, 3)[1], Still(2))]),
        "two grids": (Cyclic(4), [*grid(turns, 3, "a"), *grid(turns, 2, "b")]),
        "shifts": (shifts(4).group, [(Still(2),), *grid(shifts(4), 4)]),
        "border": (Cyclic(2), [(Grid(time_reversal(), 0, 4, 0, (1, 1)),), (SIGNS,)]),
        "blocks": (Cyclic(4), [tuple(axis) for axis in zip(*(split_grid(its, 2) for (its,) in grid(turns, 4)))]),
        "parts": (Cyclic(2), [(Parts(((SIGNS,), (Still(1),), (SWAP, Still(2)))), SWAP)]),
        "absolute": (Cyclic(2), [(Absolute(SIGNS), SWAP), (SIGNS,)]),
        "joint": (Cyclic(4), [(Joint(mixed, 0),), (Joint(mixed, 1),), (TURN,)]),
    }


@pytest.mark.parametrize("name", all_axes())
def test_indexing_is_the_full_table(name):
    group, axes = all_axes()[name]
    action = AxesAction(group, axes)
    assert action.shape == tuple(map(axis_size, axes))
    assert_is_action(action)
    assert_can_be_sent(action)
    x = random(2, 3, *action.shape)
    for g in group.elements():
        table = action(g)
        expected = x.flatten(2)[..., table.index] * table.sign
        assert torch.equal(action.act(g, x), expected.view(x.shape))
        assert torch.equal(action.flattened().act(g, x.flatten(2)), expected)
        assert torch.equal(action.absolute().act(g, x).flatten(2), x.flatten(2)[..., table.index])
    assert action.absolute().is_unsigned()
    assert action.is_unsigned() == all(action(g).is_unsigned for g in group.elements())


def test_signs_of_a_joint_action():
    signs = Action(Cyclic(2), (2, 2), lambda g: SignedPermutation([0, 1, 2, 3], [1, (-1) ** g, 1, 1]), "one sign")
    atom = Joint(signs, 0)
    assert isinstance(absolute(atom), Joint)
    assert absolute(atom).action.is_unsigned()


def test_axes_that_are_exchanged_come_together():
    (first,), (second,) = grid(rotations(), 3)
    AxesAction(Cyclic(4), [(first,), (second,)])
    for axes in ([(first,)], [(first,), (second._replace(copy=1),)], [(first,), (second._replace(pixels=2),)]):
        with pytest.raises(Uncoupled, match="without the axes it is exchanged with"):
            AxesAction(Cyclic(4), axes)
    mixed = Action(Cyclic(4), (2, 2), rotations().on(2, 2))
    for axes in ([(Joint(mixed, 0),)], [(Joint(mixed, 1),), (Joint(mixed, 0),)], [(Joint(mixed, 0),), (Still(2),)]):
        with pytest.raises(Uncoupled):
            AxesAction(Cyclic(4), axes)
    with pytest.raises(Uncoupled):  # a border that a shift crosses
        AxesAction(shifts(4, ndim=1).group, [(Grid(shifts(4, ndim=1), 0, 4, 0, (1, 1)),)])


PERMUTED = natural_action(Permutations(3))
GIVEN = [
    field(rotations(), (4, 3, 3), regular_channels(Cyclic(4), 1)), field(shifts(2, 2), (1, 4, 4)), rotations().on(3, 3),
    sign_change(4), Action.trivial(Cyclic(2), (2, 3)), Action.product(PERMUTED, Action.trivial(Permutations(3), (2,))),
    Action.product(PERMUTED, PERMUTED), Action(Cyclic(4), (2, 2), rotations().on(2, 2), "plain"),
    field(rotations(), (1, 3, 3)).flattened(), AxesAction(Cyclic(2), [(SIGNS, SWAP), (Still(2),)]),
]


@pytest.mark.parametrize("action", GIVEN, ids=repr)
def test_there_and_back(action):
    again = action_on(action.group, axes_of(action, "input"))
    assert again.shape == action.shape and again.agrees_with(action)
    assert isinstance(again, FieldAction) == isinstance(action, FieldAction)


def test_grids_of_one_axis_are_split_and_merged():
    for space, size, fine in ((rotations(), 6, 2), (rotations(), 6, 3), (flips(), 4, 2), (shifts(2, 2), 4, 2)):
        for (atom,) in grid(space, size):
            coarse, within = split_grid(atom, fine)
            assert (coarse.pixels, within.pixels) == (size // fine, fine)
            assert merge_grids(coarse, within).pixels == size
        whole = AxesAction(space.group, grid(space, size))
        pairs = [split_grid(its, fine) for (its,) in grid(space, size)]
        assert AxesAction(space.group, pairs).agrees_with(whole)
        assert AxesAction(space.group, [(merge_grids(*pair),) for pair in pairs]).agrees_with(whole)
    assert split_grid(grid(rotations(), 6)[0][0], 4) is None
    assert split_grid(grid(shifts(4), 4)[1][0], 2) is None  # a shift by one pixel tears blocks of two
    assert split_grid(Grid(time_reversal(), 0, 4, 0, (1, 1)), 2) is None


# --- ties


def test_ties_join_whatever_their_order():
    for pairs in ([(0, 1), (2, 3), (1, 3)], [(3, 2), (3, 1), (1, 0)], [(2, 0), (3, 0), (1, 2)], [(0, 0), (1, 1)]):
        here = site()
        unknowns = [here.ledger.unknown(4, f"layer {k}") for k in range(4)]
        for a, b in pairs:
            here.ledger.tie(here, (unknowns[a],), (unknowns[b],))
        ends = [next(resolved((its,))) for its in unknowns]
        assert ends == [unknowns[0]] * 4 if len(pairs) == 3 else ends == unknowns  # the earliest stays


def test_names_of_writers_come_before_names_of_readers():
    here = site()
    reader, writer = here.ledger.unknown(4, "head:1", read=True), here.ledger.unknown(4, "stem")
    here.ledger.tie(here, (reader,), (writer,))
    assert list(resolved((reader,))) == [writer] and writer.value is None


def test_an_unknown_takes_what_it_is_tied_to():
    for axis in ((SIGNS,), (SIGNS, Still(2)), (Parts(((SIGNS,), (Still(2),))),), (Grid(time_reversal(), 0, 4),)):
        for order in (1, -1):
            here = site()
            unknown = here.ledger.unknown(axis_size(axis), "hidden")
            here.ledger.tie(here, *[(unknown,), axis][::order])
            assert tuple(resolved((unknown,))) == tuple(resolved(axis))


def test_factors_meet_factors():
    """An unknown axis of 2 x 3 x 2 against a known one of 6 x 2: it is split where the other is."""
    here = site(Cyclic(2))
    left = here.ledger.unknown(4, "a"), here.ledger.unknown(3, "b")
    right = here.ledger.unknown(2, "c"), here.ledger.unknown(6, "d")
    here.ledger.tie(here, left, right)
    assert [its.size for its in resolved(left)] == [its.size for its in resolved(right)] == [2, 2, 3]
    assert tuple(resolved(left)) == tuple(resolved(right))
    for unknown in here.ledger.unknowns:
        if unknown.value is None:
            unknown.value = (Known(Action.trivial(Cyclic(2), (unknown.size,))),)
    assert AxesAction(Cyclic(2), [left]).agrees_with(AxesAction(Cyclic(2), [right]))


def test_a_known_product_is_split_into_its_factors():
    here, both = site(), Action.product(SIGNS.action, SWAP.action).flattened()
    first, second = here.ledger.split(Known(both), 2)
    assert first.action.agrees_with(SIGNS.action) and second.action.agrees_with(SWAP.action)
    assert here.ledger.split(Known(regular_channels(Cyclic(4), 1)), 2) is None  # a cycle of four is no product
    assert here.ledger.split(Known(Action.trivial(Cyclic(2), (6,))), 3) == (Still(3), Still(2))
    alone = here.ledger.split(Absolute(Known(both)), 2)
    assert alone == (Absolute(first), Absolute(second)) or all(isinstance(its, Absolute) for its in alone)


@pytest.mark.parametrize("wrong", [
    ((Known(natural_action(Permutations(4))),), (Known(natural_action(Permutations(4)).absolute()),), False),
    ((Known(sign_change(4)),), (Known(Action.trivial(Cyclic(2), (4,)).absolute(), "other"),), True),
    ((Known(regular_channels(Cyclic(2), 2)),), (SWAP, Still(2)), False),
    ((Parts(((SIGNS,), (SWAP,))),), (Known(sign_change(4)),), True),
    ((Parts(((SIGNS,), (SIGNS,))),), (Known(sign_change(4)),), False)], ids=str)
def test_agreement_is_checked_at_the_end(wrong):
    a, b, differs = wrong
    group = a[0].action.group if isinstance(a[0], Known) else Cyclic(2)
    here = site(group)
    if not differs:
        here.ledger.tie(here, a, b)
        settle(here)
        return
    refusal = refusal_of(lambda: (here.ledger.tie(here, a, b), settle(here)))  # at once where it can be seen
    said = isinstance(a[0], Parts) or in_words(a) in refusal.got  # of pieces the one that moves in another way
    assert ("move in two ways" in refusal.got and said) or "along which" in refusal.got


def test_refused_ties():
    turns = grid(rotations(), 3)
    for a, b, words in (((Still(3),), (Still(4),), "length 3 and 4"), (turns[0], turns[1], "exchanged, or two grids"),
                        (turns[0], grid(flips(), 3)[0], "two grids in one"), ((Still(2),), (SIGNS,), "stays beside")):
        here = site(Cyclic(4))
        with pytest.raises(Refusal, match=words):
            here.ledger.tie(here, a, b)
    here, copies = site(Cyclic(4)), {}
    here.ledger.tie(here, turns[0], grid(rotations(), 3, "other")[0], copies)
    assert copies == {"other": 0}
    with pytest.raises(Refusal, match="two grids in one"):  # its second axis is of a third grid
        here.ledger.tie(here, grid(rotations(), 3, "third")[1], grid(rotations(), 3, "other")[1], copies)


def test_absolute_beside_signs():
    here = site()
    free = here.ledger.unknown(2, "hidden")
    here.ledger.tie(here, (Absolute(free),), (Absolute(SIGNS),))
    assert tuple(resolved((free,))) == (SIGNS,)
    here.ledger.tie(here, (Absolute(SWAP),), (SWAP,))
    settle(here)
    here.ledger.tie(here, (Absolute(SIGNS),), (SIGNS,))
    with pytest.raises(Refusal, match=r"changes signs.*without signs beside others"):
        settle(here)


# --- cuts


def test_cuts_of_what_stays_and_of_what_is_free():
    here = site()
    assert here.ledger.cut((Still(6),), 4) == ((Still(4),), (Still(2),))
    assert here.ledger.cut((SIGNS,), 0) == ((Still(0),), (SIGNS,))
    free = here.ledger.unknown(6, "hidden")
    (first,), (second,) = here.ledger.cut((free,), 4)
    assert (first.name, second.name) == ("hidden[:4]", "hidden[4:]") and (first.size, second.size) == (4, 2)
    assert tuple(resolved((free,))) == (Parts(((first,), (second,))),)
    third = here.ledger.cut((free,), 2)
    assert axis_size(third[0]) == 2 and axis_size(third[1]) == 4  # within the first piece
    assert [axis_size(piece) for piece in next(resolved((free,))).pieces] == [2, 4, 2] or axis_size((free,)) == 6
    assert list(map(axis_size, here.ledger.cut((SIGNS, Still(3)), 3))) == [3, 3]  # signs cross no cut
    assert here.ledger.cut((SWAP, Still(3)), 3) is None and here.ledger.cut((SWAP,), 1) is None
    assert here.ledger.cut((Still(3), SIGNS), 2) == ((Still(1), SIGNS), (Still(2), SIGNS))


def test_pieces_are_joined_again():
    assert joined([(Still(2),), (Still(3),)]) == (Still(5),)
    assert joined([(SIGNS,), (Still(1),), (Still(1),)]) == (Parts(((SIGNS,), (Still(2),))),)
    assert joined([(SIGNS,), (Still(0),)]) in ((SIGNS,), (Parts(((SIGNS,), (Still(0),))),))
    axis = (Parts(((SIGNS,), (SWAP,), (Still(2),))),)
    here = site()
    assert here.ledger.cut(axis, 2) == ((SIGNS,), (Parts(((SWAP,), (Still(2),))),))
    first, second = here.ledger.cut(axis, 4)
    assert AxesAction(Cyclic(2), [joined([first, second])]).agrees_with(AxesAction(Cyclic(2), [axis]))


def test_pieces_are_tied_to_what_is_cut_alike():
    here = site()
    free = here.ledger.unknown(6, "hidden")
    here.ledger.tie(here, (Parts(((SIGNS,), (here.ledger.unknown(4, "rest"),))),), (free,))
    assert next(resolved((free,))).pieces[0] == (SIGNS,)
    other = here.ledger.unknown(2, "a"), here.ledger.unknown(3, "b")
    here.ledger.tie(here, other, (Parts(((Still(2),), (Still(4),))),))
    settle_all(here)
    settle(here)


def settle_all(here):
    for unknown in here.ledger.unknowns:
        if unknown.value is None:
            unknown.value = (Still(unknown.size),)


# --- small things


def test_features_have_the_lengths_of_their_axes():
    x = Features(((Still(2),), (SIGNS, Still(3)), ()))
    assert x.shape == (2, 6, 1) and math.prod(x.shape) == 12 and is_still(Still(7)) and not is_still(SIGNS)
    assert is_still(Unknown(2, "")) is False


@pytest.mark.parametrize("line, where", [("", ""), ("net.py:3: y = f(x)", ", net.py:3: y = f(x)")])
def test_a_site_refuses_in_the_name_of_its_layer(line, where):
    with pytest.raises(Refusal) as caught:
        site(Cyclic(4), line=line).refuse("what came", "why", "what to do")
    assert str(caught.value) == ("Expected: layers that commute with the group C4. Got: layer 'layer: Linear(8, 4)' "
                                 f"with what came{where}. Likely cause: why. Fix: what to do.")


def test_notes_are_checked_when_all_is_chosen():
    here = site()
    free = here.ledger.unknown(2, "hidden")
    here.ledger.unsigned(here, [(free,)], "a reason")
    free.value = (SIGNS,)
    refusal = refusal_of(lambda: settle(here))
    assert "channels 'signs' under 'sign change', which changes signs" in refusal.got and refusal.cause == "a reason"
    here = site(Cyclic(4))
    here.ledger.closed(here, grid(rotations(), 3)[:1], "sums", "all of them")
    refusal = refusal_of(lambda: settle(here))
    assert "tears apart what moves together when it sums" in refusal.cause and refusal.fix == "all of them"
    here = site(Cyclic(4))
    here.ledger.closed(here, grid(rotations(), 3), "sums", "all of them")
    settle(here)


def test_what_has_to_stay():
    here = site()
    free = here.ledger.unknown(2, "hidden")
    here.ledger.still(here, (free,), "why", "what")
    assert free.value == (Still(2),)
    here.ledger.still(here, (Parts(((Still(1),), (here.ledger.unknown(2, "x"),))),), "why", "what")
    for axis, words in (((SIGNS,), "'sign change' moves 'signs'"),
                        (grid(flips(), 3)[1], "'left-right flips' moves pixels")):
        assert words in refusal_of(lambda axis=axis: here.ledger.still(here, axis, "why", "what")).got
