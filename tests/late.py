"""Conditions over all generators of a group that one of them alone breaks, with the generators in either order.

A loop over the generators that stops after the first passes every test in which the first one breaks the condition;
asked in both orders, it fails one of the two.
"""
import dataclasses

from symbnn.symmetry.actions import Action, natural_action
from symbnn.symmetry.fields import SpatialAction, rotations_and_flips, translations
from symbnn.symmetry.groups import Subgroup, Permutations

ORDERS = (1, -1)  # as they are, and back to front


def reordered(acting: Action | SpatialAction, order: int) -> Action | SpatialAction:
    """The same action of the same group, which lists its generators in this order."""
    group = Subgroup(acting.group, acting.group.generators()[::order])
    if isinstance(acting, SpatialAction):
        return dataclasses.replace(acting, group=group)
    return acting.pulled_back(group, lambda g: g)


CUBE = translations(2, 2, 2).on(2, 2, 2).flattened()
ONE_MOVES = {  # an action, and numbers that all of its generators but one leave in place
    "S3, the cycle": (natural_action(Permutations(3)), [1.0, 1.0, 2.0]),
    "S5, the cycle": (natural_action(Permutations(5)), [1.0, 1.0, 3.0, 2.0, 4.0]),
    "D4, the turn": (rotations_and_flips().on(2, 2).flattened(), [1.0, 1.0, 2.0, 2.0]),
    "D4, the flip": (rotations_and_flips().on(4, 4).flattened(), [1.0 + (i in (1, 7, 14, 8)) for i in range(16)]),
    "C2 x C2 x C2, the first": (CUBE, [1.0] * 4 + [2.0] * 4),
    "C2 x C2 x C2, the last": (CUBE, [1.0, 2.0] * 4),
}
