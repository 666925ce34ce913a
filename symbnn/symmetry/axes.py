"""Every axis of a tensor carries an action: known, still, of a grid, or yet to be chosen; and what it takes that two are moved alike."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Union

import torch
from torch import Tensor

from .actions import Action
from .fields import FieldAction, GridAction, SpatialAction, field
from .groups import Element, Group
from .signed_permutations import SignedPermutation

# --- atoms


@dataclass(eq=False)
class Unknown:
    """A part of an axis whose action is not chosen yet; once chosen, or tied to others, `value` says what it is."""

    size: int
    name: str
    read: bool = False  # by a weight that has its name from what it writes
    value: "Axis | None" = None


class Still(NamedTuple):
    """A part of an axis that no element moves: the batch, time under a causal layer, a number of classes."""

    size: int


class Batch(Still):
    """The axis of examples, which are all moved by the same element."""


class Known(NamedTuple):
    """An axis moved by a given action on numbers in a row."""

    action: Action
    name: str = ""

    @property
    def size(self) -> int:
        """The number of coordinates."""
        return self.action.numel


class Grid(NamedTuple):
    """One axis of a grid of pixels; the group moves the axes of one `copy` of the grid together.

    With a `border` the pixels at the other end are repeated before and behind it, as circular padding does.
    """

    space: SpatialAction
    axis: int
    pixels: int
    copy: object = 0
    border: tuple[int, int] = (0, 0)

    @property
    def size(self) -> int:
        """The number of pixels, those of the border included."""
        return self.pixels + sum(self.border)


class Joint(NamedTuple):
    """One of several axes that an action mixes, so that they only move as a whole."""

    action: Action
    axis: int
    copy: object = 0

    @property
    def size(self) -> int:
        """The length of this axis."""
        return self.action.shape[self.axis]


class Absolute(NamedTuple):
    """Moved as another part of an axis is, but without its signs."""

    of: "Unknown | Known"

    @property
    def size(self) -> int:
        """The number of coordinates."""
        return self.of.size


class Parts(NamedTuple):
    """An axis of several pieces one behind the other, each moved within itself."""

    pieces: "tuple[Axis, ...]"

    @property
    def size(self) -> int:
        """The number of coordinates of all pieces."""
        return sum(map(axis_size, self.pieces))


Atom = Union[Unknown, Still, Known, Grid, Joint, Absolute, Parts]
Axis = tuple[Atom, ...]  # the product of its atoms, the first one slowest; empty for an axis of one coordinate


def axis_size(axis: Axis) -> int:
    """The length of an axis."""
    return math.prod(atom.size for atom in axis)


def absolute(atom: Atom) -> Atom:
    """The atom that is moved alike without signs."""
    if isinstance(atom, (Unknown, Known)):
        return Absolute(atom)
    if isinstance(atom, Parts):
        return Parts(tuple(tuple(map(absolute, leaves(piece))) for piece in atom.pieces))
    return atom


def leaves(axis: Axis) -> Iterator[Atom]:
    """The atoms of an axis with everything filled in that is known by now."""
    for atom in axis:
        inner = atom.of if isinstance(atom, Absolute) else atom
        if isinstance(inner, Unknown) and inner.value is not None:
            found = leaves(inner.value)
            yield from map(absolute, found) if isinstance(atom, Absolute) else found
        elif isinstance(atom, Parts):
            yield Parts(tuple(tuple(leaves(piece)) for piece in atom.pieces))
        elif not (isinstance(atom, Still) and atom.size == 1):
            yield atom


# --- what a grid does along one axis


def grid_moves(atom: Grid) -> tuple[tuple[int, int, int], ...]:
    """For each generator the axis that is read, its sense, and the shift in pixels."""
    found = []
    for g in atom.space.group.generators():
        point, shift = atom.space.point(g), atom.space.shift(g)[atom.axis] % atom.pixels
        found.append((int(point.index[atom.axis]), int(point.sign[atom.axis]), shift))
    return tuple(found)


def is_still(atom: Atom) -> bool:
    """Whether nothing moves along this part of an axis, as far as is known by now."""
    if isinstance(atom, Grid):
        return all(move == (atom.axis, 1, 0) for move in grid_moves(atom))
    if isinstance(atom, Known):
        return all(bool((atom.action(g).index == torch.arange(atom.size)).all()) and atom.action(g).is_unsigned
                   for g in atom.action.group.generators())
    if isinstance(atom, Parts):
        return all(is_still(leaf) for piece in atom.pieces for leaf in leaves(piece))
    return isinstance(atom, Still)


def split_grid(atom: Grid, fine: int) -> tuple[Grid, Grid] | None:
    """The grid of blocks of `fine` pixels and the grid within a block; None where shifts tear blocks."""
    if atom.border != (0, 0) or atom.pixels % fine or any(shift % fine for _, _, shift in grid_moves(atom)):
        return None
    coarse = atom.space.resampled((atom.pixels,) * atom.space.ndim, (atom.pixels // fine,) * atom.space.ndim)
    return (Grid(coarse, atom.axis, atom.pixels // fine, ("blocks", atom.copy)),
            Grid(atom.space.without_shifts(), atom.axis, fine, ("within", atom.copy)))


def merge_grids(coarse: Grid, fine: Grid) -> Grid:
    """The grid whose blocks and whose pixels within a block these are."""
    whole = coarse.space.resampled((coarse.pixels,) * coarse.space.ndim,
                                   (coarse.pixels * fine.pixels,) * coarse.space.ndim)
    return Grid(whole, coarse.axis, coarse.pixels * fine.pixels, ("merged", coarse.copy))


# --- the action on a whole tensor


class Uncoupled(Exception):
    """An axis without the one that some element exchanges it with."""

    def __init__(self, atom: "Grid | Joint") -> None:
        super().__init__(f"axis {atom.axis} of a grid under '{_mover(atom).name}', without the axes it is exchanged with")
        self.atom = atom


def _mover(atom: "Grid | Joint") -> "SpatialAction | Action":
    return atom.space if isinstance(atom, Grid) else atom.action


def _along(atom: Grid, g: Element) -> SignedPermutation:
    """How the pixels along one axis are read, once the axis that it comes from is in its place."""
    sense, shift, places = int(atom.space.point(g).sign[atom.axis]), atom.space.shift(g)[atom.axis], torch.arange(atom.size)
    if atom.border != (0, 0) and (shift % atom.pixels or sense < 0 and atom.border[0] != atom.border[1]):
        raise Uncoupled(atom)
    read = places if atom.border != (0, 0) else (places - shift) % atom.size
    read = read if sense > 0 else atom.size - 1 - read
    return SignedPermutation(read, torch.ones_like(read))


def _final(atom: Atom, group: Group) -> Atom:
    """An atom, all of whose actions are chosen, as one that is still, known, or of a grid."""
    if isinstance(atom, Absolute):
        assert isinstance(atom.of, Known), "an action that nobody has chosen"
        return Known(atom.of.action.absolute())
    if isinstance(atom, Parts):
        pieces = [AxesAction(group, (piece,), "piece") for piece in atom.pieces]
        return Known(Action(group, (atom.size,), partial(_one_behind_the_other, pieces), "pieces"))
    assert not isinstance(atom, Unknown), "an action that nobody has chosen"
    return atom


def _one_behind_the_other(pieces: Sequence[Action], g: Element) -> SignedPermutation:
    return SignedPermutation.direct_sum(*(piece(g) for piece in pieces))


class AxesAction(Action):
    """A group acting on a tensor axis by axis; axes of one grid are exchanged with each other.

    It is applied by indexing one axis after the other, so a table over all coordinates is made only where one asks for
    it. Raises `Uncoupled`, for the caller to explain, where an axis lacks the one that it is exchanged with.
    """

    def __init__(self, group: Group, axes: Sequence[Axis], name: str = "axes") -> None:
        self.axes = tuple(tuple(_final(atom, group) for atom in leaves(axis)) for axis in axes)
        self.factors: list[Atom] = []  # the atoms of all axes; those that only move together are one
        self._axis_of: list[int] = []
        for number, axis in enumerate(self.axes):
            for atom in axis:
                self.factors.append(atom)
                self._axis_of.append(number)
        self._join()
        self._places = [self._place(k, atom) for k, atom in enumerate(self.factors)]
        super().__init__(group, tuple(map(axis_size, self.axes)), self._table, name)
        for g in group.generators():
            self.reads(g)

    def _join(self) -> None:
        """Make one factor of the axes of a joint action, where all of them follow each other."""
        k = 0
        while k < len(self.factors):
            atom = self.factors[k]
            if isinstance(atom, Joint):
                ndim = len(atom.action.shape)
                found = self.factors[k:k + ndim]
                if [its for its in found if isinstance(its, Joint) and its.copy == atom.copy] != found or (
                        [its.axis for its in found] != list(range(ndim))):
                    raise Uncoupled(atom)
                self.factors[k:k + ndim] = [Known(atom.action.flattened())]
                self._axis_of[k:k + ndim] = [self._axis_of[k]]
            k += 1

    def _place(self, number: int, atom: Atom) -> dict[int, int]:
        """For a factor of a grid: the factors of the same copy by their axes, those of the same axis first."""
        if not isinstance(atom, Grid):
            return {}
        others = [(self._axis_of[k] != self._axis_of[number], k) for k, its in enumerate(self.factors)
                  if isinstance(its, Grid) and its.copy == atom.copy]
        return {self.factors[k].axis: k for _, k in sorted(others, reverse=True)} | {atom.axis: number}

    def reads(self, g: Element) -> list[tuple[int, SignedPermutation | None]]:
        """For each factor the one that it is read from, and the map of its coordinates (None: as they are)."""
        result = []
        for k, atom in enumerate(self.factors):
            if isinstance(atom, Grid):
                source = self._places[k].get(int(atom.space.point(g).index[atom.axis]))
                if source is None or self.factors[source].size != atom.size:
                    raise Uncoupled(atom)
                moves = _along(atom, g)
            else:
                source, moves = k, atom.action(g) if isinstance(atom, Known) else None
            plain = moves is None or moves.is_unsigned and bool((moves.index == torch.arange(moves.size)).all())
            result.append((source, None if plain else moves))
        return result

    def _table(self, g: Element) -> SignedPermutation:
        sizes = [atom.size for atom in self.factors]
        steps = [math.prod(sizes[k + 1:]) for k in range(len(sizes))]
        index, sign = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int8)
        for size, (source, moves) in zip(sizes, self.reads(g)):
            places = torch.arange(size) if moves is None else moves.index
            signs = torch.ones(size, dtype=torch.int8) if moves is None else moves.sign
            index = (index[:, None] + places * steps[source]).flatten()
            sign = (sign[:, None] * signs).flatten()
        return SignedPermutation(index, sign)

    def _move(self, g: Element, x: Tensor) -> Tensor:
        lead = x.ndim - len(self.shape)
        y = x.reshape(*x.shape[:lead], *(atom.size for atom in self.factors))
        reads = self.reads(g)
        y = y.permute(*range(lead), *(lead + source for source, _ in reads))
        for k, (_, moves) in enumerate(reads):
            y = y if moves is None else moves(y, lead + k)
        return y.reshape(x.shape)

    def flattened(self) -> Action:
        """The same action on the flattened tensor, of shape `(n,)`."""
        return AxesAction(self.group, (tuple(atom for axis in self.axes for atom in axis),), f"flattened {self.name}")

    def absolute(self) -> Action:
        """The action without its signs."""
        return AxesAction(self.group, [tuple(map(absolute, axis)) for axis in self.axes], f"unsigned {self.name}")

    def is_unsigned(self) -> bool:
        """Whether no element changes a sign (seen on generators)."""
        return all(atom.action.is_unsigned() for atom in self.factors if isinstance(atom, Known))


def axes_of(action: Action, name: str, copy: object = 0) -> tuple[Axis, ...]:
    """The axes of the tensors that an action moves, each with what is known of it."""
    if isinstance(action, AxesAction):
        return action.axes
    if isinstance(action, FieldAction):
        grid = [(Grid(action.space, axis, size, copy),) for axis, size in enumerate(action.size)]
        return ((Known(action.channels, name),), *grid)
    if isinstance(action, GridAction):
        return tuple((Grid(action.space, axis, size, copy),) for axis, size in enumerate(action.shape))
    if action.parts:
        several = len(action.parts) > 1
        return tuple(axis for k, part in enumerate(action.parts)
                     for axis in axes_of(part, f"{name}[{k}]" if several else name, (copy, k)))
    if len(action.shape) == 1:
        return ((Known(action, name),),)
    if is_still(Known(action.flattened())):
        return tuple((Known(Action.trivial(action.group, (size,)), f"{name}[{k}]"),) for k, size in enumerate(action.shape))
    return tuple((Joint(action, axis, copy),) for axis in range(len(action.shape)))


def action_on(group: Group, axes: Sequence[Axis], name: str = "axes") -> Action:
    """The action on tensors with these axes, all of whose actions are chosen."""
    whole = AxesAction(group, axes, name)
    first, *rest = whole.axes or ((),)
    grids = [axis[0] for axis in rest if len(axis) == 1 and isinstance(axis[0], Grid)]
    if rest and len(grids) == len(rest) == grids[0].space.ndim and not any(isinstance(atom, Grid) for atom in first) and (
            [(its.axis, its.copy, its.border) for its in grids] == [(k, grids[0].copy, (0, 0)) for k in range(len(rest))]):
        return field(grids[0].space, whole.shape, action_on(group, (first,)))
    if len(whole.axes) == 1 and len(whole.factors) == 1 and isinstance(whole.factors[0], Known) and (
            whole.factors[0].action.shape == whole.shape):
        return whole.factors[0].action
    if all(isinstance(atom, Still) for atom in whole.factors):
        return Action.trivial(group, whole.shape)
    return whole
