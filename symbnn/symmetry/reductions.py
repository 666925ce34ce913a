"""Sums, means and maxima over axes, softmax, and norms."""

from collections.abc import Sequence
from typing import Any

from .axes import Axis, Grid, Joint, absolute, axis_size, is_still, leaves
from .contractions import TOGETHER, contract, letters, note_layer
from .features import Features, Site
from .operations import add, as_features, multiply, pointwise, rule, together
from .views import positions, regrouped, split

NO_MAXIMUM = "a maximum does not commute with a change of sign"
SIGNED_SUM = "a sum over features that change signs"


def reduced(site: Site, x: Features, dims: Any, keepdim: bool, kind: str) -> Features:
    """What is left when some axes are reduced to one number."""
    chosen = positions(site, x, dims)
    taken = [x.axes[k] for k in chosen]
    ends = [] if not x.opened else None
    opened = _is_open(site, taken)
    if x.opened and (x.opened != kind or opened):
        refuse_opened(site, x)
    if opened and ends is not None and (x.opened or keepdim):
        site.ledger.closed(site, taken, f"takes a {kind}", TOGETHER)
    axes = tuple(() if k in chosen else axis for k, axis in enumerate(x.axes) if keepdim or k not in chosen)
    return Features(axes, opened=kind if opened and not x.opened else "")


def _is_open(site: Site, taken: Sequence[Axis]) -> bool:
    """Whether an axis is left that some element exchanges with one of these."""
    grids = [atom for axis in taken for atom in leaves(axis) if isinstance(atom, (Grid, Joint)) and not is_still(atom)]
    for atom in grids:
        if isinstance(atom, Joint):
            return len([its for its in grids if its.copy == atom.copy]) < len(atom.action.shape)
        there = {its.axis for its in grids if its.copy == atom.copy}
        if any(int(atom.space.point(g).index[atom.axis]) not in there for g in atom.space.group.generators()):
            return True
    return False


def refuse_opened(site: Site, x: Features) -> None:
    """Say that only one of two axes which are exchanged has been reduced."""
    site.refuse(f"features of which a {x.opened} over one axis was taken, and not over the axis that it is exchanged with",
                "a reduction over some axes, where all that are exchanged with each other have to go together",
                "x.mean((-2, -1)) for images, or a group that keeps the axes apart, such as flips()")


def _dims(arguments: Sequence[Any], options: dict) -> tuple[Any, bool]:
    """The axes and whether they are kept, from the arguments of a reduction."""
    dims = options.get("dim", arguments[0] if arguments else None)
    keep = options.get("keepdim", arguments[1] if len(arguments) > 1 and isinstance(arguments[1], bool) else False)
    return (None if isinstance(dims, bool) else dims), keep


@rule("mean", "sum", "nansum", "nanmean")
def sums(site: Site, x: Any, *arguments: Any, **options: Any) -> Features:
    """A sum or a mean over axes."""
    x, (dims, keep) = as_features(site, x), _dims(arguments, options)
    site.ledger.unsigned(site, [x.axes[k] for k in positions(site, x, dims)], SIGNED_SUM)
    return reduced(site, x, dims, keep, "mean" if "mean" in site.operator else "sum")


@rule("amax", "amin", "logsumexp", "any", "all", "prod")
def extremes(site: Site, x: Any, *arguments: Any, **options: Any) -> Features:
    """A maximum over axes, and what else does not commute with signs."""
    x, (dims, keep) = as_features(site, x), _dims(arguments, options)
    site.ledger.unsigned(site, x.axes, NO_MAXIMUM)
    return reduced(site, x, dims, keep, "maximum" if "max" in site.operator else "product" if "prod" in site.operator else "minimum")


@rule("max", "min")
def extreme(site: Site, x: Any, *arguments: Any, **options: Any) -> Any:
    """A maximum over all, over one axis with its place, or of two tensors."""
    if arguments and not isinstance(arguments[0], int):
        return together(site, x, arguments[0])
    result = extremes(site, x, *arguments, **options)
    return result if not arguments and "dim" not in options else (result, Places())


class Places:
    """The positions of maxima: they are numbers of places, and no features."""


@rule("var", "std", "norm", "linalg_vector_norm", "frobenius_norm", "linalg_norm")
def spreads(site: Site, x: Any, *arguments: Any, **options: Any) -> Features:
    """Norms and deviations, which have no sign."""
    x, name = as_features(site, x), site.operator
    dims = options.get("dim", arguments[1] if "norm" in name and len(arguments) > 1 else
                       None if "norm" in name else arguments[0] if arguments else None)
    keep = options.get("keepdim", arguments[2] if "norm" in name and len(arguments) > 2 else False)
    dims = None if isinstance(dims, bool) else dims
    chosen = positions(site, x, dims)
    if "norm" not in name:
        site.ledger.unsigned(site, [x.axes[k] for k in chosen], "centring does not commute with a change of some signs")
    free = Features(tuple(tuple(map(absolute, leaves(axis))) for axis in x.axes))
    result = reduced(site, free, dims, keep, name)
    if result.opened:
        refuse_opened(site, result)
    return result


@rule("var_mean", "std_mean")
def moments(site: Site, x: Any, *arguments: Any, **options: Any) -> tuple[Features, Features]:
    """Variance and mean."""
    dims = {"dim": options.get("dim", arguments[0] if arguments else None), "keepdim": options.get("keepdim", False)}
    return spreads(site, x, **dims), sums(site, x, **dims)


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "softmin")
def softmax(site: Site, x: Features, dim: int, *unused: object, **options: object) -> Features:
    """A softmax along one axis."""
    axis = x.axes[positions(site, x, dim)[0]]
    site.ledger.unsigned(site, x.axes, "a function that is not odd does not commute with a change of sign")
    site.ledger.closed(site, (axis,), "takes a softmax along one axis",
                       "dim=1 on feature maps whose action is field(space, (channels, *size)), nn.Flatten(1) before the layer, "
                       "or a pointwise activation in its place")
    return Features(x.axes)


@rule("glu")
def gated(site: Site, x: Features, dim: int = -1) -> Features:
    """The first half of an axis, gated by the second one."""
    first, second = split(site._replace(operator="chunk"), x, 2, dim)
    return multiply(site, first, pointwise(site, second))


@rule("cosine_similarity")
def cosine_similarity(site: Site, x: Any, y: Any, dim: int = 1, eps: float = 1e-8) -> Features:
    """The cosine between vectors along an axis, in which signs cancel."""
    x, y = as_features(site, x), as_features(site, y)
    names = letters(len(x.axes))
    gone = names[positions(site, x, dim)[0]]
    return contract(site, x, names, y, names[len(x.axes) - len(y.axes):], names.replace(gone, ""))


@rule("pairwise_distance")
def pairwise_distance(site: Site, x: Features, y: Features, *unused: object) -> Features:
    """The distance between vectors along the last axis."""
    site.ledger.closed(site, x.axes[-1:], "takes a distance", TOGETHER)
    return Features(spreads(site._replace(operator="norm"), add(site, x, y), 2, [-1]).axes)


# --- norms

CENTRED = "centring does not commute with a change of some signs"


def _affine(site: Site, axes: Sequence[Axis], weight: Any, bias: Any) -> None:
    """A gain that has no signs and a shift along these axes."""
    for tensor, gain in ((weight, True), (bias, False)):
        if tensor is not None:
            for axis, own in zip(axes, as_features(site, tensor).axes):
                site.ledger.tie(site, tuple(map(absolute, leaves(axis))) if gain else axis, own)


@rule("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm")
def batch_norm(site: Site, x: Features, weight: Any, bias: Any, mean: Any, var: Any, *unused: object) -> Features:
    """Batch normalisation: shift and running mean move as the features do, gain and running variance without signs."""
    channels = x.axes[1]
    for tensor, signless in ((weight, True), (bias, False), (mean, False), (var, True)):
        if tensor is not None:
            own = as_features(site, tensor).axes[0]
            site.ledger.tie(site, tuple(map(absolute, leaves(channels))) if signless else channels, own)
    for tensor in (weight, mean):
        if isinstance(tensor, Features):
            note_layer(site, tensor, channels, channels)
    site.ledger.closed(site, (channels,), "normalises each channel", TOGETHER)
    rest = [axis for k, axis in enumerate(x.axes) if k != 1]
    site.ledger.unsigned(site, rest, "one mean of features that change signs")
    return Features(x.axes)


@rule("instance_norm")
def instance_norm(site: Site, x: Features, weight: Any, bias: Any, mean: Any, var: Any, *unused: object) -> Features:
    """Normalisation of each channel of each example."""
    site.ledger.closed(site, x.axes[2:], "normalises over all pixels", TOGETHER)
    return batch_norm(site, x, weight, bias, mean, var)


@rule("layer_norm", "native_layer_norm")
def layer_norm(site: Site, x: Features, shape: Sequence[int], weight: Any = None, bias: Any = None, *unused: object) -> Features:
    """Layer normalisation over trailing axes."""
    trailing = x.axes[-len(shape):]
    if tuple(shape) != tuple(map(axis_size, trailing)):
        site.refuse(f"features of shape {x.shape}", f"it is made for trailing axes of shape {tuple(shape)}",
                    f"nn.LayerNorm({list(x.shape[1:])}), over all axes behind the batch")
    site.ledger.unsigned(site, x.axes, CENTRED)
    site.ledger.closed(site, trailing, "normalises over trailing axes", f"nn.LayerNorm({list(x.shape[1:])}), over all axes "
                       "behind the batch")
    _affine(site, trailing, weight, bias)
    if isinstance(weight, Features):
        note_layer(site, weight, trailing[0], trailing[0])
    return Features(x.axes)


@rule("rms_norm")
def rms_norm(site: Site, x: Features, shape: Sequence[int], weight: Any = None, *unused: object) -> Features:
    """Division by the root mean square over trailing axes, and a gain."""
    trailing = x.axes[-len(shape):]
    site.ledger.closed(site, trailing, "normalises over trailing axes", TOGETHER)
    _affine(site, trailing, weight, None)
    if isinstance(weight, Features):
        note_layer(site, weight, trailing[0], trailing[0])
    return Features(x.axes)


@rule("group_norm", "native_group_norm")
def group_norm(site: Site, x: Features, groups: int, weight: Any = None, bias: Any = None, *unused: object) -> Features:
    """Normalisation over groups of channels, which have to be kept as blocks."""
    channels = x.axes[1]
    if 1 < groups < axis_size(channels):
        regrouped(site, list(leaves(channels)), [groups, axis_size(channels) // groups])
    site.ledger.unsigned(site, x.axes, CENTRED)
    site.ledger.closed(site, (channels, *x.axes[2:]) if groups < axis_size(channels) else x.axes[2:],
                       "normalises over groups of channels", TOGETHER)
    _affine(site, (channels,), weight, bias)
    if isinstance(weight, Features):
        note_layer(site, weight, channels, channels)
    return Features(x.axes)


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(site: Site, direction: Features, length: Features, dim: int = 0) -> Any:
    """A weight as direction and length; the length has no sign."""
    axes = list(direction.axes)
    for k, (axis, own) in enumerate(zip(axes, length.axes)):
        if axis_size(own) > 1:
            site.ledger.tie(site, tuple(map(absolute, leaves(axis))), own)
        else:
            site.ledger.still(site, own, "one length", "one length")
    free = [axis for axis, own in zip(axes, length.axes) if axis_size(own) == 1]
    site.ledger.closed(site, free, "takes the length", TOGETHER)
    result = Features(tuple(axes))
    return (result, Features(length.axes)) if "interface" in site.operator else result
