"""What flows along the edges of a network, and the ledger in which the operations note what they ask of its axes."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, NoReturn

from ..errors import Refusal
from .actions import Action
from .axes import (
    Absolute,
    Atom,
    AxesAction,
    Axis,
    Grid,
    Joint,
    Known,
    Parts,
    Still,
    Uncoupled,
    Unknown,
    absolute,
    axis_size,
    grid_moves,
    is_still,
    leaves,
    split_grid,
)
from .groups import Element, Group
from .signed_permutations import SignedPermutation


class Features(NamedTuple):
    """A tensor on an edge of a network's graph: how each of its axes is moved."""

    axes: tuple[Axis, ...]
    parameter: str = ""  # its name, where it is a parameter or buffer as it is
    opened: str = ""  # the reduction that has taken one of two axes which are exchanged, and has to take the other

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of the axes."""
        return tuple(map(axis_size, self.axes))


Copies = dict[object, object]  # which copy of a grid in one tensor is which in another


class Site(NamedTuple):
    """One operation in a network, where refusals point and where notes are taken."""

    ledger: "Ledger"
    operator: str  # by torch's name
    label: str  # of the layer or function, for refusals
    line: str = ""  # where it is called

    def refuse(self, received: str, cause: str, fix: str) -> NoReturn:
        """Raise the `Refusal` that names this operation and what it received."""
        where = f", {self.line}" if self.line else ""
        raise Refusal(f"layers that commute with the group {self.ledger.group.name}",
                      got=f"layer '{self.label}' with {received}{where}", cause=cause, fix=fix)


class Ledger:
    """What a walk along a network notes: axes that are moved alike, and what to check when all actions are chosen."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.unknowns: list[Unknown] = []  # in the order in which they were met
        self.layers: dict[str, tuple[Axis, Axis]] = {}  # layer -> the channels that it reads and writes
        self.checks: list[Callable[[], None]] = []
        self._numbers: dict[int, int] = {}

    def unknown(self, size: int, name: str, read: bool = False) -> Unknown:
        """A part of an axis that may move in any way."""
        unknown = Unknown(size, name, read)
        self._numbers[id(unknown)] = len(self.unknowns)
        self.unknowns.append(unknown)
        return unknown

    def write(self, axis: Axis, layer: str) -> None:
        """Name the channels that a layer writes."""
        for atom in leaves(axis):
            if isinstance(atom, Unknown) and atom.read:
                atom.name, atom.read = layer or atom.name, False

    # What is asked of axes

    def unsigned(self, site: Site, axes: Iterable[Axis], reason: str,
                 fix: str = "odd activations such as nn.Tanh() and average pools, or action.absolute(), without signs") -> None:
        """Note that these axes must not change signs."""
        axes = tuple(axes)

        def check() -> None:
            for atom in (atom for axis in axes for atom in leaves(axis)):
                action = _final_action(atom, self.group)
                if action is not None and not action.is_unsigned():
                    site.refuse(f"channels '{_name(atom)}' under '{action.name}', which changes signs", reason, fix)

        self.checks.append(check)

    def closed(self, site: Site, axes: Iterable[Axis], doing: str, fix: str) -> None:
        """Note that no element may exchange one of these axes with another one, for they are treated together."""
        axes = tuple(axes)

        def check() -> None:
            try:
                AxesAction(self.group, axes)
            except Uncoupled as error:
                site.refuse(f"features of which it takes only some axes, {tuple(map(axis_size, axes))}",
                            f"{error}, so it tears apart what moves together when it {doing}", fix)

        self.checks.append(check)

    def still(self, site: Site, axis: Axis, cause: str, fix: str) -> None:
        """Ask that nothing moves along this axis."""
        for atom in leaves(axis):
            inner = atom.of if isinstance(atom, Absolute) else atom
            if isinstance(inner, Unknown):
                inner.value = (Still(inner.size),)
            elif isinstance(inner, Parts):
                for piece in inner.pieces:
                    self.still(site, piece, cause, fix)
            elif not is_still(inner):
                site.refuse(f"an axis of length {axis_size(axis)}, along which {_moved_by(inner)}", cause, fix)

    def later(self, check: Callable[[], None]) -> None:
        """A check that is made when all actions are chosen."""
        self.checks.append(check)

    # Ties

    def bind(self, site: Site, unknown: Unknown, axis: Axis) -> None:
        """Say what an unknown is; where that contains itself, ask that both agree."""
        inside = [atom.of if isinstance(atom, Absolute) else atom for atom in leaves(axis)]
        if any(atom is unknown for atom in inside):
            self.agree(site, (unknown,), axis)
        elif (last := tuple(leaves(axis))) != (unknown,):
            unknown.value = last

    def agree(self, site: Site, a: Axis, b: Axis) -> None:
        """Note that two axes must be moved alike."""

        def check() -> None:
            try:
                first, second = AxesAction(self.group, (a,)), AxesAction(self.group, (b,))
                same = first.agrees_with(second)
            except Uncoupled:
                same = False
            if not same:
                site.refuse(f"features that move in two ways, {describe(a)} and {describe(b)}",
                            "one axis, or one weight, for what the group moves differently",
                            "features that move alike, as behind layers of their own, or two layers")

        self.checks.append(check)

    def tie(self, site: Site, a: Axis, b: Axis, copies: Copies | None = None) -> None:
        """From now on the two axes are moved alike. `copies` says which grid of `b` is which of `a`."""
        copies = {} if copies is None else copies
        left, right = deque(leaves(a)), deque(leaves(b))
        if axis_size(a) != axis_size(b):
            site.refuse(f"axes of length {axis_size(a)} and {axis_size(b)}", "an operation made for another size",
                        f"a layer of {axis_size(a)} features, or an action on inputs of the shape that the network is made for")
        for one, other in ((left, right), (right, left)):
            if len(one) == 1 and len(other) != 1 and isinstance(one[0], Unknown):
                return self.bind(site, one[0], tuple(other))
            if len(one) == 1 and len(other) != 1 and isinstance(one[0], Parts):
                return self._tie_pieces(site, one[0], tuple(other), copies, flipped=one is right)
        while left and right:
            x, y = left.popleft(), right.popleft()
            if x.size == y.size:
                self._tie_atoms(site, x, y, copies)
            elif min(x.size, y.size) == 1:
                self.still(site, (x if x.size == 1 else y,), "one number where several are expected", "axes of one length")
                (left if x.size > 1 else right).appendleft(x if x.size > 1 else y)
            else:
                big, small, stack = (x, y, left) if x.size > y.size else (y, x, right)
                parts = self.split(big, small.size) if big.size % small.size == 0 else None
                if parts is None:
                    return self.agree(site, (x, *left), (y, *right))
                stack.extendleft(reversed(parts))
                (right if stack is left else left).appendleft(small)
        for atom in (*left, *right):
            self.still(site, (atom,), "one number beside nothing", "axes of one length")

    def _tie_atoms(self, site: Site, x: Atom, y: Atom, copies: Copies) -> None:
        if x is y or x == y and not isinstance(x, Grid):
            return
        if isinstance(x, Unknown) and isinstance(y, Unknown):
            first, second = sorted((x, y), key=lambda its: (not its.name, its.read, self._numbers[id(its)]))
            second.value = (first,)
        elif isinstance(x, Unknown) or isinstance(y, Unknown):
            self.bind(site, x, (y,)) if isinstance(x, Unknown) else self.bind(site, y, (x,))  # type: ignore[arg-type]
        elif isinstance(x, Absolute) and isinstance(y, Absolute):
            self._tie_atoms(site, x.of, y.of, copies)
        elif isinstance(x, Absolute) or isinstance(y, Absolute):
            alone, other = (x, y) if isinstance(x, Absolute) else (y, x)
            assert isinstance(alone, Absolute)
            self._tie_atoms(site, alone.of, other, copies)
            self.unsigned(site, ((other,),), "features without signs beside others with signs")
        elif isinstance(x, Grid) and isinstance(y, Grid):
            same = (x.pixels, x.border) == (y.pixels, y.border) and grid_moves(x) == grid_moves(y)
            if not same or not is_still(x) and (x.axis != y.axis or copies.setdefault(y.copy, x.copy) != x.copy):
                site.refuse(f"features that move in two ways, {describe((x,))} and {describe((y,))}",
                            "axes of a grid that were exchanged, or two grids in one",
                            "features that move alike, without the transposition")
        elif isinstance(x, Parts) and isinstance(y, Parts):
            self._tie_pieces(site, x, (y,), copies)
        elif isinstance(x, Still) or isinstance(y, Still):
            self.still(site, (y if isinstance(x, Still) else x,), "an axis that stays beside one that is moved",
                       "features that move alike, or a group that leaves this axis as it is")
        else:
            self.agree(site, (x,), (y,))

    def _tie_pieces(self, site: Site, parts: Parts, other: Axis, copies: Copies, flipped: bool = False) -> None:
        """Tie an axis of pieces to one that is cut at the same places."""
        rest = other
        for piece in parts.pieces:
            pieces = self.cut(rest, axis_size(piece))
            if pieces is None:
                return self.agree(site, (parts,), other)
            first, rest = pieces
            self.tie(site, *((first, piece) if flipped else (piece, first)), copies)

    # Taking axes apart

    def split(self, atom: Atom, first: int) -> tuple[Atom, Atom] | None:
        """The factors of an atom, the slow one of this length; None where its action has no such factors."""
        rest = atom.size // first
        if isinstance(atom, Unknown):
            atom.value = (self.unknown(first, f"{atom.name}[0]", atom.read), self.unknown(rest, f"{atom.name}[1]", atom.read))
            return atom.value[0], atom.value[1]
        if isinstance(atom, Absolute):
            inner = self.split(atom.of, first)
            return None if inner is None else (absolute(inner[0]), absolute(inner[1]))
        if isinstance(atom, Grid) and not is_still(atom):
            return split_grid(atom, rest)
        if is_still(atom):
            return Still(first), Still(rest)
        return _factored(atom, first) if isinstance(atom, Known) else None

    def cut(self, axis: Axis, at: int) -> tuple[Axis, Axis] | None:
        """The pieces of an axis before and from a place; None where the group may move something across it."""
        total = axis_size(axis)
        if at in (0, total):
            return ((Still(0),), axis) if at == 0 else (axis, (Still(0),))
        atoms = tuple(leaves(axis))
        if all(map(is_still, atoms)):
            return (Still(at),), (Still(total - at),)
        first, rest = atoms[0], atoms[1:]
        step = axis_size(rest)
        if rest:
            ends = self.cut((first,), at // step) if at % step == 0 else None
            return None if ends is None else ((*ends[0], *rest), (*ends[1], *rest))
        if isinstance(first, Unknown):
            pieces = ((self.unknown(at, f"{first.name}[:{at}]", first.read),),
                      (self.unknown(total - at, f"{first.name}[{at}:]", first.read),))
            first.value = (Parts(pieces),)
            return pieces
        if isinstance(first, Absolute) and isinstance(first.of, Unknown):
            ends = self.cut((first.of,), at)
            return None if ends is None else (tuple(map(absolute, ends[0])), tuple(map(absolute, ends[1])))
        return self._cut_pieces(first, at) if isinstance(first, Parts) else None

    def _cut_pieces(self, parts: Parts, at: int) -> tuple[Axis, Axis] | None:
        before: list[Axis] = []
        for k, piece in enumerate(parts.pieces):
            size = axis_size(piece)
            if at < size:
                ends = self.cut(piece, at) if at else (None, piece)
                if ends is None:
                    return None
                first = [*before, ends[0]] if ends[0] is not None else before
                return _joined(first), _joined([ends[1], *parts.pieces[k + 1:]])
            before.append(piece)
            at -= size
        raise AssertionError("a place behind the end of an axis")


def _joined(pieces: Sequence[Axis]) -> Axis:
    return pieces[0] if len(pieces) == 1 else (Parts(tuple(pieces)),)


def joined(pieces: Sequence[Axis]) -> Axis:
    """One axis of pieces one behind the other, those that stay put together."""
    merged: list[Axis] = []
    for piece in pieces:
        if merged and all(map(is_still, (*leaves(merged[-1]), *leaves(piece)))):
            merged[-1] = (Still(axis_size(merged[-1]) + axis_size(piece)),)
        else:
            merged.append(piece)
    return _joined([piece for piece in merged if axis_size(piece)] or [(Still(0),)])


def _factored(atom: Known, first: int) -> tuple[Known, Known] | None:
    """The two actions of which this one is the product, where it is one."""
    rest = atom.size // first
    for g in atom.action.group.generators():
        if _factor_maps(atom.action, first, rest, g) is None:
            return None
    return (Known(Action(atom.action.group, (first,), _Factor(atom.action, first, rest, 0), atom.action.name), f"{atom.name}[0]"),
            Known(Action(atom.action.group, (rest,), _Factor(atom.action, first, rest, 1), atom.action.name), f"{atom.name}[1]"))


def _factor_maps(action: Action, first: int, rest: int, g: Element) -> tuple[SignedPermutation, SignedPermutation] | None:
    """The two signed permutations whose product is that of `g`, or None."""
    table = action(g)
    index, sign = table.index.view(first, rest), table.sign.view(first, rest)
    rows, columns = index[:, 0] // rest, index[0] % rest
    row_sign, column_sign = sign[:, 0], sign[0] * sign[0, 0]
    if not bool((index == rows[:, None] * rest + columns).all() and (sign == row_sign[:, None] * column_sign).all()):
        return None
    return SignedPermutation(rows, row_sign), SignedPermutation(columns, column_sign)


class _Factor(NamedTuple):
    """The rule of one factor of a product."""

    action: Action
    first: int
    rest: int
    which: int

    def __call__(self, g: Element) -> SignedPermutation:
        maps = _factor_maps(self.action, self.first, self.rest, g)
        assert maps is not None, "seen on the generators"
        return maps[self.which]


def _final_action(atom: Atom, group: Group) -> Action | None:
    """The action of an atom that can have signs, once it is chosen."""
    if isinstance(atom, Known):
        return atom.action
    if isinstance(atom, Joint):
        return atom.action
    if isinstance(atom, Parts):
        return AxesAction(group, ((atom,),)) if not _signless(atom) else None
    return None


def _signless(atom: Atom) -> bool:
    if isinstance(atom, Parts):
        return all(_signless(leaf) for piece in atom.pieces for leaf in leaves(piece))
    return isinstance(atom, (Still, Grid, Absolute)) or isinstance(atom, Known) and atom.action.is_unsigned()


def _name(atom: Atom) -> str:
    return atom.name if isinstance(atom, (Known, Unknown)) else _name(atom.of) if isinstance(atom, Absolute) else ""


def _moved_by(atom: Atom) -> str:
    if isinstance(atom, Grid):
        return f"'{atom.space.name}' moves pixels"
    action = atom.action if isinstance(atom, (Known, Joint)) else None
    return f"'{action.name}' moves '{_name(atom)}'" if action is not None else "features move"


def describe(axis: Axis) -> str:
    """In words how an axis is moved."""
    return " and ".join("not at all" if is_still(atom) else "by an action to be chosen" if isinstance(atom, Unknown) else
                        f"along axis {atom.axis} of {atom.pixels} pixels by '{atom.space.name}'" if isinstance(atom, Grid) else
                        f"by '{atom.action.name}'" if isinstance(atom, (Known, Joint)) else
                        f"as {_name(atom)} without signs" if isinstance(atom, Absolute) else "in pieces"
                        for atom in leaves(axis)) or "not at all"
