"""Operations that only arrange numbers: axes are merged, split, exchanged, cut and joined."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .axes import Axis, Grid, Joint, Parts, Still, Unknown, axis_size, is_still, leaves, merge_grids
from .features import Features, Site, joined
from .operations import alike, as_features, broadcast, rule

CUT = "an axis that the group moves is cut, so that some features leave the piece that they belong to"


def position(site: Site, x: Features, dim: int, more: int = 0) -> int:
    """An axis counted from the front."""
    ndim = len(x.axes) + more
    if not -ndim <= dim < max(ndim, 1):
        site.refuse(f"dim={dim} on features of shape {x.shape}", "an axis that is not there", f"dim={ndim - 1}")
    return dim % max(ndim, 1)


def positions(site: Site, x: Features, dims: int | Sequence[int] | None) -> list[int]:
    """Several axes, all of them where none is named."""
    if dims is None or not isinstance(dims, int) and not dims:
        return list(range(len(x.axes)))
    return [position(site, x, dim) for dim in ((dims,) if isinstance(dims, int) else dims)]


@rule("view", "reshape", "_unsafe_view", "_reshape_alias")
def reshape(site: Site, x: Features, *shape: Any) -> Features:
    """New axes over the same numbers: some are merged, some are split."""
    sizes = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
    if sizes and isinstance(sizes[0], torch.dtype):
        return x
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = math.prod(x.shape) // known
    return Features(tuple(regrouped(site, [atom for axis in x.axes for atom in leaves(axis)], sizes)))


def regrouped(site: Site, atoms: list, sizes: Sequence[int]) -> list[Axis]:
    """The atoms, in this order, as axes of these lengths."""
    waiting, result = list(atoms), []
    for size in sizes:
        taken, left = [], size
        while left > 1 or left == 1 and waiting and waiting[0].size == 1 and size == 1:
            atom = waiting.pop(0)
            if left % atom.size:
                parts = site.ledger.split(atom, left) if atom.size % left == 0 else None
                if parts is None:
                    _cut_by_view(site, atom, left)
                atom, rest = parts  # type: ignore[misc]
                waiting.insert(0, rest)
            taken.append(atom)
            left //= atom.size
            if left == 1:
                break
        result.append(tuple(taken))
    if waiting and result:
        result[-1] = (*result[-1], *waiting)
    return result


def _cut_by_view(site: Site, atom: Any, length: int) -> None:
    site.refuse(f"an axis of {atom.size} features that is split at {length}",
                "a view that splits an axis into parts which the group does not keep",
                "a view that keeps the axis, or a group that leaves it as it is")


@rule("flatten")
def flatten(site: Site, x: Features, start_dim: int = 0, end_dim: int = -1) -> Features:
    """Several axes become one."""
    first, last = position(site, x, start_dim), position(site, x, end_dim)
    merged = tuple(atom for axis in x.axes[first:last + 1] for atom in leaves(axis))
    return Features((*x.axes[:first], merged, *x.axes[last + 1:]))


@rule("unflatten")
def unflatten(site: Site, x: Features, dim: int, sizes: Sequence[int], *unused: object) -> Features:
    """One axis becomes several."""
    dim, sizes = position(site, x, dim), list(sizes)
    if -1 in sizes:
        sizes[sizes.index(-1)] = x.shape[dim] // -math.prod(sizes)
    return Features((*x.axes[:dim], *regrouped(site, list(leaves(x.axes[dim])), sizes), *x.axes[dim + 1:]))


@rule("view_as", "reshape_as")
def view_as(site: Site, x: Features, other: Any) -> Features:
    """A view with the shape of another tensor."""
    return reshape(site, x, tuple(other.shape))


@rule("unsqueeze")
def unsqueeze(site: Site, x: Features, dim: int) -> Features:
    """A new axis of length one."""
    dim = position(site, x, dim, more=1)
    return Features((*x.axes[:dim], (), *x.axes[dim:]))


@rule("squeeze")
def squeeze(site: Site, x: Features, dims: int | Sequence[int] | None = None) -> Features:
    """Axes of length one are left out."""
    chosen = positions(site, x, dims)
    for k in chosen:
        if x.shape[k] == 1:
            site.ledger.still(site, x.axes[k], "an axis of one number that is left out", "the axis kept")
    return Features(tuple(axis for k, axis in enumerate(x.axes) if k not in chosen or axis_size(axis) != 1))


@rule("permute")
def permute(site: Site, x: Features, *dims: Any) -> Features:
    """The axes in another order."""
    order = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    return Features(tuple(x.axes[position(site, x, dim)] for dim in order))


@rule("transpose", "swapaxes", "swapdims")
def transpose(site: Site, x: Features, first: int, second: int) -> Features:
    """Two axes exchanged."""
    axes, (a, b) = list(x.axes), (position(site, x, first), position(site, x, second))
    axes[a], axes[b] = axes[b], axes[a]
    return Features(tuple(axes))


@rule("t", "numpy_T", "mT", "adjoint", "matrix_H", "T")
def transposed(site: Site, x: Features) -> Features:
    """A matrix transposed."""
    return transpose(site, x, -2, -1) if len(x.axes) > 1 else x._replace(parameter="")


@rule("movedim", "moveaxis")
def movedim(site: Site, x: Features, source: Any, target: Any) -> Features:
    """Axes moved to other places."""
    sources = [position(site, x, dim) for dim in ([source] if isinstance(source, int) else source)]
    targets = [position(site, x, dim) for dim in ([target] if isinstance(target, int) else target)]
    rest = iter([dim for dim in range(len(x.axes)) if dim not in sources])
    placed = dict(zip(targets, sources))
    return Features(tuple(x.axes[placed[k] if k in placed else next(rest)] for k in range(len(x.axes))))


@rule("expand", "broadcast_to", "expand_as")
def expand(site: Site, x: Any, sizes: Any, *unused: object, **options: object) -> Features:
    """Axes of length one repeated; nothing moves along the new ones."""
    x = as_features(site, x)
    sizes = list(sizes.shape) if isinstance(sizes, (Features, Tensor)) else list(sizes)
    axes = [()] * (len(sizes) - len(x.axes)) + list(x.axes)
    for k, (axis, size) in enumerate(zip(axes, sizes)):
        if size not in (-1, axis_size(axis)):
            axes[k] = _repeated(site, axis, size)
    return Features(tuple(axes))


def _repeated(site: Site, axis: Axis, size: int) -> Axis:
    """An axis along which one number is repeated: it does not notice how it is moved, unless by signs."""
    site.ledger.still(site, axis, "one number that is repeated", "the axis as it is")
    repeated = (site.ledger.unknown(size, ""),)
    site.ledger.unsigned(site, (repeated,), "one number beside features with signs")
    return repeated


@rule("repeat", "tile")
def repeat(site: Site, x: Any, *counts: Any) -> Features:
    """Whole copies side by side, along new slow axes."""
    x = as_features(site, x)
    numbers = list(counts[0] if len(counts) == 1 and not isinstance(counts[0], int) else counts)
    numbers = [1] * (len(x.axes) - len(numbers)) + numbers
    axes = [()] * (len(numbers) - len(x.axes)) + list(x.axes)
    return Features(tuple(axis if count == 1 else _repeated(site, axis, count) if axis_size(axis) == 1 else
                          (Still(count), *leaves(axis)) for axis, count in zip(axes, numbers)))


@rule("repeat_interleave")
def repeat_interleave(site: Site, x: Features, count: Any, dim: int | None = None, **options: object) -> Features:
    """Each number several times, along a new fast axis."""
    if not isinstance(count, int) or dim is None:
        site.refuse("counts that differ", "features that are repeated unlike", "one number of repetitions along one dim")
    dim = position(site, x, dim)  # type: ignore[arg-type]
    return Features((*x.axes[:dim], (*leaves(x.axes[dim]), Still(count)), *x.axes[dim + 1:]))


# --- pieces


@rule("select")
def select(site: Site, x: Any, dim: int, index: int) -> Any:
    """One place along an axis, which has to stay where it is."""
    if isinstance(x, Stacked) and dim % len(x.shape) == 0:
        return x.items[index]
    x = as_features(site, x)
    dim = position(site, x, dim)
    piece = _piece(site, x, dim, index % x.shape[dim], index % x.shape[dim] + 1)
    site.ledger.still(site, piece, CUT, "a mean over this axis, or a group that leaves it as it is")
    return Features((*x.axes[:dim], *x.axes[dim + 1:]))


@rule("slice", "narrow")
def slice_(site: Site, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Features:
    """Some places along an axis."""
    x = as_features(site, x)
    dim = position(site, x, dim)
    first, last, step = slice(start, end, step).indices(x.shape[dim])
    if step != 1:
        site.ledger.still(site, x.axes[dim], CUT, "all of the axis, or a group that leaves it as it is")
        piece: Axis = (Still(len(range(first, last, step))),)
    else:
        piece = _piece(site, x, dim, first, max(first, last))
    return Features((*x.axes[:dim], piece, *x.axes[dim + 1:]))


def _piece(site: Site, x: Features, dim: int, first: int, last: int) -> Axis:
    """The piece of an axis between two places."""
    axis, size = x.axes[dim], x.shape[dim]
    if (first, last) == (0, size):
        return axis
    ends = site.ledger.cut(axis, last)
    inner = None if ends is None else site.ledger.cut(ends[0], first)
    if inner is None:
        site.ledger.still(site, axis, CUT, "all of the axis, pieces that the group keeps, or a group that leaves it as it is")
        return (Still(last - first),)
    return inner[1]


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def split(site: Site, x: Features, how: Any, dim: int = 0) -> list[Features]:
    """Pieces of an axis."""
    dim = position(site, x, dim)
    empty = torch.empty(x.shape[dim], 0)
    name = site.operator
    cutter = torch.chunk if "chunk" in name else torch.tensor_split if "tensor_split" in name else torch.split
    ends, result = 0, []
    for piece in cutter(empty, how):
        ends += len(piece)
        result.append(slice_(site, x, dim, ends - len(piece), ends))
    return result


@rule("unbind")
def unbind(site: Site, x: Any, dim: int = 0) -> list:
    """All places of an axis."""
    return [select(site, x, dim, k) for k in range(x.shape[dim])]


@rule("cat", "concat", "concatenate")
def cat(site: Site, tensors: Sequence[Any], dim: int = 0) -> Features:
    """Pieces one behind the other; they agree on all other axes."""
    parts = [as_features(site, tensor) for tensor in tensors if tuple(tensor.shape) != (0,)]
    first, dim = parts[0], position(site, parts[0], dim)
    for other in parts[1:]:
        copies: dict = {}
        for k, (a, b) in enumerate(zip(first.axes, other.axes)):
            if k != dim:
                site.ledger.tie(site, a, b, copies)
    along = joined([part.axes[dim] for part in parts])
    return Features((*first.axes[:dim], along, *first.axes[dim + 1:]))


@rule("stack")
def stack(site: Site, tensors: Sequence[Any], dim: int = 0) -> Features:
    """Tensors along a new axis, on all of whose places they are moved alike."""
    parts = [as_features(site, tensor) for tensor in tensors]
    for other in parts[1:]:
        broadcast(site, parts[0], other, alike)
    dim = position(site, parts[0], dim, more=1)
    return Features((*parts[0].axes[:dim], (Still(len(parts)),), *parts[0].axes[dim:]))


class Stacked:
    """Several features under one name, such as the last states of several layers, each with axes of its own."""

    def __init__(self, items: Sequence[Features]) -> None:
        self.items = list(items)

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of the axes, the first one numbering the items."""
        return len(self.items), *self.items[0].shape


@rule("flip", "roll", "rot90", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "fliplr", "flipud", "diff")
def ordered(site: Site, x: Features, *arguments: Any, **options: Any) -> Features:
    """What depends on the order along an axis: nothing may move along it."""
    name = site.operator
    dims = {"roll": arguments[1:2], "rot90": arguments[1:2]}.get(name, arguments[:1])
    chosen = positions(site, x, dims[0] if dims and dims[0] is not None else options.get("dim", options.get("dims")))
    for dim in chosen:
        site.ledger.still(site, x.axes[dim], f"{name}, which depends on the order along an axis that the group moves",
                          "an operation that treats all places alike, or a group that leaves this axis as it is")
    return Features(tuple((Still(size),) if k in chosen else axis for k, (axis, size) in enumerate(zip(x.axes, x.shape))))


@rule("index_select")
def index_select(site: Site, x: Any, dim: int, index: Any) -> Features:
    """Places along an axis by their numbers."""
    x = as_features(site, x)
    dim = position(site, x, dim)
    if isinstance(index, Tensor) and index.ndim == 1 and torch.equal(index, torch.arange(len(index)) + index[:1]):
        return slice_(site, x, dim, int(index[0]), int(index[0]) + len(index))
    site.ledger.still(site, x.axes[dim], "places that are chosen by their numbers, along an axis that the group moves",
                      "all places, or a group that leaves this axis as it is")
    chosen = index.axes if isinstance(index, Features) else tuple((Still(size),) for size in index.shape)
    return Features((*x.axes[:dim], *chosen, *x.axes[dim + 1:]))


@rule("index")
def index(site: Site, x: Any, indices: Sequence[Any]) -> Features:
    """Indexing by tensors: one of them, along one axis."""
    x = as_features(site, x)
    chosen = [k for k, its in enumerate(indices) if its is not None]
    if len(chosen) != 1:
        for k in chosen:
            site.ledger.still(site, x.axes[k], "places that are chosen by their numbers, along an axis that is moved",
                              "all places, or a group that leaves this axis as it is")
        shape = torch.broadcast_shapes(*(tuple(indices[k].shape) for k in chosen))
        if any(isinstance(indices[k], Features) for k in chosen):
            site.refuse("several indices that depend on the input", "a lookup", "torch.gather, or a product with one-hot numbers")
        adjacent = chosen == list(range(chosen[0], chosen[-1] + 1))
        rest = [axis for k, axis in enumerate(x.axes) if k not in chosen]
        at = chosen[0] if adjacent else 0
        return Features((*rest[:at], *((Still(size),) for size in shape), *rest[at:]))
    return index_select(site, x, chosen[0], indices[chosen[0]])


@rule("gather", "scatter", "scatter_add", "index_add", "index_put", "sort", "topk", "argsort", "argmax", "argmin", "masked_select",
      "nonzero", "unique", "bincount", "one_hot", "bucketize", "searchsorted", "median", "mode", "kthvalue", "unfold", "im2col",
      "col2im", "diagonal", "diag", "diag_embed", "tril", "triu")
def positional(site: Site, x: Any, *arguments: Any, **options: Any) -> Features:
    """What depends on places along its axes: nothing may move but the batch stays."""
    name = site.operator
    site.refuse(f"a call of {name}", "an operation that depends on where features are, for which no rule is known",
                "a mean or a maximum over the axis, a product with a constant matrix, or a rule of your own: @rule(...)")
    raise AssertionError


# --- grids again


def as_grid(site: Site, axis: Axis) -> Grid | Still:
    """The one axis of a grid that an axis is, put together from blocks and pixels within them where it must be."""
    atoms = list(leaves(axis))
    while len(atoms) > 1 and isinstance(atoms[0], Grid) and not is_still(atoms[0]):
        coarse, fine = atoms[0], atoms[1]
        inner = Grid(coarse.space.without_shifts(), coarse.axis, fine.size, ("within", coarse.copy))
        site.ledger.tie(site, (fine,), (inner,))
        atoms[:2] = [merge_grids(coarse, inner)]
    if len(atoms) == 1 and isinstance(atoms[0], Grid):
        return atoms[0]
    if any(isinstance(atom, (Joint, Parts)) and not is_still(atom) for atom in atoms):
        _no_grid(site, axis)
    for atom in atoms:
        if not isinstance(atom, Unknown) and not is_still(atom):
            _no_grid(site, axis)
    site.ledger.still(site, axis, "positions along which a window slides", "a field of pixels")
    return Still(axis_size(axis))


def _no_grid(site: Site, axis: Axis) -> None:
    site.refuse("features without spatial axes",
                "the layer needs spatial axes that the action knows of, which are lost by a flattening and not known of an "
                "action that is no field",
                "field(space, (channels, *size)) as the action on inputs, and nn.Flatten after the last such layer")


@rule("pixel_shuffle")
def pixel_shuffle(site: Site, x: Features, factor: int) -> Features:
    """Channels become pixels within blocks."""
    *lead, channels, height, width = x.axes
    split_channels = regrouped(site, list(leaves(channels)), [axis_size(channels) // factor**2, factor, factor])
    rows = as_grid(site, (*leaves(height), *split_channels[1]))
    columns = as_grid(site, (*leaves(width), *split_channels[2]))
    return Features((*lead, split_channels[0], (rows,), (columns,)))


@rule("pixel_unshuffle")
def pixel_unshuffle(site: Site, x: Features, factor: int) -> Features:
    """Pixels within blocks become channels."""
    *lead, channels, height, width = x.axes
    rows, columns = (regrouped(site, list(leaves(axis)), [axis_size(axis) // factor, factor]) for axis in (height, width))
    return Features((*lead, (*leaves(channels), *rows[1], *columns[1]), rows[0], columns[0]))


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(site: Site, x: Features, groups: int) -> Features:
    """Channels of all groups in turn."""
    first, second = regrouped(site, list(leaves(x.axes[1])), [groups, x.shape[1] // groups])
    return Features((x.axes[0], (*second, *first), *x.axes[2:]))
