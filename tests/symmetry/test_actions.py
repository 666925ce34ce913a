"""Actions: the axioms for those that everything is built from, and rules that are none."""
import pytest
import torch

from helpers_ground import refusal_of
from helpers_symmetry import assert_can_be_sent, assert_is_action, random
from late import ORDERS, reordered
from symbnn.errors import Refusal
from symbnn.symmetry.actions import (
    Action,
    check_action,
    natural_action,
    regular_channels,
    sign_change,
    symmetric_tensors,
)
from symbnn.symmetry.fields import (
    flips,
    rotations,
)
from symbnn.symmetry.groups import Cyclic, Dihedral, Permutations, Product, Subgroup
from symbnn.symmetry.hyperoctahedral import Signed, proper_rotations
from symbnn.symmetry.signed_permutations import SignedPermutation

GROUPS = [Cyclic(1), Cyclic(4), Dihedral(4), Permutations(3), Product(Cyclic(2), Cyclic(3)),
          Subgroup(Dihedral(4), ((2, 0), (0, 1)))]
ACTIONS = [
    *(regular_channels(group, copies) for group in GROUPS for copies in (1, 3)),
    natural_action(Permutations(5)), natural_action(Permutations(40)), sign_change(4),
    natural_action(Signed(3)), natural_action(proper_rotations(3)), symmetric_tensors(natural_action(Signed(3))),
    Action.product(sign_change(2), regular_channels(Cyclic(2)), flips().kernel(3, 3)),
    natural_action(Permutations(3)).pulled_back(Product(Permutations(3), Cyclic(2)), lambda g: g[0]),
    Action.trivial(Cyclic(3), ()),
]


@pytest.mark.parametrize("action", ACTIONS, ids=repr)
def test_homomorphism(action):
    assert_is_action(action)


@pytest.mark.parametrize("action", [a for a in ACTIONS if "lambda" not in str(a.rule)], ids=repr)
def test_pickle_and_copy(action):
    assert_can_be_sent(action)


@pytest.mark.parametrize("group", GROUPS, ids=repr)
def test_regular_channels_follow_the_group(group):
    copies, elements = 2, group.elements()
    action = regular_channels(group, copies)
    x = random(group.order * copies)
    for g in elements:
        y = action.act(g, x)
        for i, h in enumerate(elements):
            for c in range(copies):
                assert y[group.index(group.compose(g, h)) * copies + c] == x[i * copies + c]


def test_large_groups_are_never_listed():
    units = natural_action(Permutations(1000))
    product = Action.product(units, units)
    (g,) = units.group.sample(1, torch.Generator().manual_seed(0))
    W = random(1000, 1000, dtype=torch.float32)
    order = torch.tensor(g)
    expected = torch.empty_like(W)
    expected[order[:, None], order] = W
    assert torch.equal(product.act(g, W), expected)
    assert not product._kept
    check_action(units)


THREE_OF_FOUR = Action(Cyclic(4), (3,), lambda g: SignedPermutation.sending([(i + g) % 3 for i in range(3)]))
REFUSED = {
    "product over two groups": (lambda: Action.product(sign_change(2), regular_channels(Cyclic(4))),
                                r"of one group.*of C2, C4.*pulled_back\(group"),
    "product of nothing": (lambda: Action.product(), r"of one group.*no action"),
    "element of another group": (lambda: rotations().on(5, 5)((1, 0)), "an element of C4"),
    "tensor of another shape": (lambda: rotations().on(5, 5).act(1, torch.zeros(2, 4, 4)),
                                r"ends in the axes \(5, 5\).*shape \(2, 4, 4\).*x of shape \(batch, 5, 5\)"),
    "rule of another size": (lambda: Action(Cyclic(2), (3,), lambda g: SignedPermutation.identity(2))(1),
                             r"have 3 coordinates.*2 coordinates for the element 1.*Action\(group, \(2,\), rule\)"),
    "rule that gives lists": (lambda: Action(Cyclic(2), (2,), lambda g: [1, 0])(1),
                              r"SignedPermutation\.sending\(images"),
    "a group that does not act": (lambda: check_action(THREE_OF_FOUR), r"rho\(a\) rho\(b\).*for a, b = \(1, 3\)"),
    "an identity that moves": (lambda: check_action(Action(
        Cyclic(2), (2,), lambda g: SignedPermutation([1, 0], [1, 1]))), "the identity moves coordinates"),
    "a large group that does not act": (lambda: check_action(Action(
        Permutations(9), (9,), lambda g: SignedPermutation.sending(g).inverse())), r"rule\(g\)\.inverse\(\)"),
    "a natural action of another group": (lambda: natural_action(Cyclic(4)), r"Permutations\(5\)"),
    "a natural action of a number": (lambda: natural_action(4), r"Permutations\(n\)"),
    "regular channels of a number": (lambda: regular_channels(4), r"Cyclic\(4\)"),
    "half a copy": (lambda: regular_channels(Cyclic(4), 2.0), "copies=2"),
    "no signs": (lambda: sign_change(0), r"sign_change\(8\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    refused, words = REFUSED[name]
    with pytest.raises(Refusal, match=words):
        refused()


def test_fixes_work():
    check_action(Action(Cyclic(3), (3,), THREE_OF_FOUR.rule))  # the group of the rule's own order
    check_action(Action(Permutations(9), (9,), lambda g: SignedPermutation.sending(g).inverse().inverse()))
    turns, x = rotations().on(3, 3), random(2, 9)
    refusal = refusal_of(lambda: turns.act(1, x))
    assert refusal.fix == "action.flattened().act(g, x)" and "flattened" in refusal.cause
    assert torch.equal(turns.flattened().act(1, x), turns.act(1, x.view(2, 3, 3)).flatten(1))
    two, four = sign_change(2), regular_channels(Cyclic(4))
    pulled = two.pulled_back(four.group, lambda g: g % 2)
    check_action(Action.product(pulled, four))


# --- conditions over all generators, one of which alone breaks them


def powers(step, of=lambda g: g):
    """The rule g -> step^of(g)."""
    def rule(g):
        result = SignedPermutation.identity(step.size)
        for _ in range(of(g)):
            result = step @ result
        return result
    return rule


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("one", [0, 1])
def test_every_generator_is_asked(one, order):
    """Of two generators, only the one in place `one` moves, negates or breaks anything."""
    two = Product(Cyclic(2), Cyclic(2))
    still = reordered(Action.trivial(two, (2,)), order)
    swap, signs = SignedPermutation([1, 0], [1, 1]), SignedPermutation([0, 1], [1, -1])
    moved, negated = (reordered(Action(two, (2,), powers(step, lambda g: g[one])), order) for step in (swap, signs))
    assert not still.agrees_with(moved) and not moved.agrees_with(still) and moved.agrees_with(moved)
    assert not negated.is_unsigned() and moved.is_unsigned()
    mixed = Product(Cyclic(2), Cyclic(3)) if one else Product(Cyclic(3), Cyclic(2))
    with pytest.raises(Refusal, match=r"rho\(a\) rho\(b\)"):  # an exchange has order 2, not 3
        check_action(reordered(Action(mixed, (2,), powers(swap, lambda g: g[one])), order))


def test_every_element_is_asked():
    """The exchange of two coordinates by element 1 alone: wrong at the last element of C4."""
    swap = SignedPermutation([1, 0], [1, 1])
    with pytest.raises(Refusal, match=r"rho\(a\) rho\(b\)"):
        check_action(Action(Cyclic(4), (2,), lambda g: swap if g == 1 else SignedPermutation.identity(2)))
