"""Windows that slide along grids: convolutions and their transposes, pools, padding and interpolation."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .axes import Axis, Grid, Still, axis_size, grid_moves, is_still, leaves
from .contractions import layer_of, note_layer, with_bias
from .features import Features, Site
from .operations import as_features, rule
from .reductions import NO_MAXIMUM, Places
from .views import as_grid, regrouped
from .windows import Window, convolution_windows, per_axis, slide


def spatial(site: Site, x: Features, ndim: int, ahead: int = 2) -> list[Grid | Still]:
    """The last axes, along which a window slides."""
    if len(x.axes) != ndim + ahead:
        site.refuse(f"features of {len(x.axes)} axes", f"the layer needs {ndim} spatial axes behind batch and channels, which "
                    "are lost by a flattening and not known of an action that is no field",
                    "field(space, (channels, *size)) as the action on inputs, and nn.Flatten after the last such layer")
    return [as_grid(site, axis) for axis in x.axes[ahead:]]


def _grouped(site: Site, channels: Axis, groups: int) -> tuple[Axis, Axis]:
    """Groups, and channels within each."""
    size = axis_size(channels)
    if groups == 1:
        return (), channels
    if size == groups:
        return channels, ()
    first, second = regrouped(site, list(leaves(channels)), [groups, size // groups])
    return first, second


def _kernel(site: Site, weight: Features, axes: Sequence[Grid | Still]) -> None:
    """The kernel is turned and flipped as the grid, and not shifted."""
    copies: dict = {}
    for own, axis in zip(weight.axes[2:], axes):
        size = axis_size(own)
        site.ledger.tie(site, (Still(size),) if isinstance(axis, Still) or is_still(axis._replace(pixels=size, border=(0, 0),
                        space=axis.space.without_shifts())) else
                        (Grid(axis.space.without_shifts(), axis.axis, size, ("kernel", axis.copy)),), own, copies)


@rule("conv1d", "conv2d", "conv3d")
def convolution(site: Site, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
                groups: int = 1) -> Features:
    """Convolution: `W -> P_out W P_in^-1`, with the kernels turned or flipped."""
    x, weight = as_features(site, x), as_features(site, weight)
    ndim = len(weight.axes) - 2
    windows = convolution_windows(weight.shape[2:], stride, padding, dilation)
    if len(x.axes) == ndim + 2 and all(window._replace(dilation=1) == Window(1) for window in windows):
        return _of_each_pixel(site, x, weight, bias, groups)
    axes = spatial(site, x, ndim)
    windows = [_with_border(site, window, axis) for window, axis in zip(windows, axes)]
    behind = slide(site, axes, windows)
    _channels(site, x.axes[1], weight.axes[0], weight.axes[1], groups)
    _kernel(site, weight, axes)
    note_layer(site, weight, x.axes[1], weight.axes[0])
    return with_bias(site, Features((x.axes[0], weight.axes[0], *((axis,) for axis in behind))), bias, dim=1)


def _of_each_pixel(site: Site, x: Features, weight: Features, bias: Any, groups: int) -> Features:
    """A kernel of one pixel: a linear map of the channels, whatever moves the pixels."""
    _channels(site, x.axes[1], weight.axes[0], weight.axes[1], groups)
    for axis in weight.axes[2:]:
        site.ledger.still(site, axis, "one pixel", "one pixel")
    note_layer(site, weight, x.axes[1], weight.axes[0])
    return with_bias(site, Features((x.axes[0], weight.axes[0], *x.axes[2:])), bias, dim=1)


def _with_border(site: Site, window: Window, axis: Grid | Still) -> Window:
    """A window on an axis with a border: the border is its circular padding."""
    if isinstance(axis, Still) or axis.border == (0, 0):
        return window
    if window.before or window.after:
        site.refuse(f"{window} behind circular padding", "two paddings", "one padding: padding_mode='circular'")
    return window._replace(before=axis.border[0], after=axis.border[1])


def _channels(site: Site, reads: Axis, written: Axis, inner: Axis, groups: int) -> None:
    """Channels read and written by a weight with groups: the groups of both are moved alike, as blocks."""
    read_groups, read_inner = _grouped(site, reads, groups)
    write_groups, _ = _grouped(site, written, groups)
    if groups > 1:
        site.ledger.tie(site, read_groups, write_groups)
    if read_inner:
        site.ledger.tie(site, read_inner, inner)
    else:
        site.ledger.still(site, inner, "one channel", "one channel")


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(site: Site, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
                           output_padding: Any = 0, groups: int = 1, dilation: Any = 1) -> Features:
    """Transposed convolution, whose weight has the channels that it reads first."""
    x, weight = as_features(site, x), as_features(site, weight)
    ndim, kernel = len(weight.axes) - 2, weight.shape[2:]
    axes, behind = spatial(site, x, ndim), []
    settings = list(zip(kernel, *(per_axis(value, ndim) for value in (stride, padding, output_padding, dilation))))
    for k, (axis, setting) in enumerate(zip(axes, settings)):
        behind.append(_spread(site, axes, settings, k, axis, *setting))
    _kernel(site, weight, axes)
    read_groups, _ = _grouped(site, x.axes[1], groups)
    _grouped(site, weight.axes[0], groups)
    site.ledger.tie(site, x.axes[1], weight.axes[0])
    site.ledger.write(weight.axes[1], layer_of(weight.parameter))
    written: Axis = weight.axes[1] if groups == 1 else (*read_groups, *weight.axes[1])
    note_layer(site, weight, x.axes[1], written)
    return with_bias(site, Features((x.axes[0], written, *((axis,) for axis in behind))), bias, dim=1)


def _spread(site: Site, axes: Sequence[Grid | Still], settings: list, k: int, axis: Grid | Still, kernel: int, stride: int,
            padding: int, extra: int, dilation: int) -> Grid | Still:
    """The axis behind a transposed window, refused where some element notices it."""
    size = axis.pixels if isinstance(axis, Grid) else axis.size
    new = (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + extra + 1
    if isinstance(axis, Still):
        return Still(new)
    where = f"kernel {kernel}, stride {stride}, padding {padding}, output padding {extra} on the size {size}"
    places = {its.axis: j for j, its in enumerate(axes) if isinstance(its, Grid)}
    for g in site.ledger.group.generators():
        point, shift = axis.space.point(g), axis.space.shift(g)[axis.axis] % size
        source = places.get(int(point.index[axis.axis]))
        if source is None or settings[source] != settings[k]:
            site.refuse(where, f"'{axis.space.name}' exchanges axes that have other settings", "the same settings along both axes")
        if int(point.sign[axis.axis]) < 0 and extra:
            site.refuse(where, f"'{axis.space.name}' reverses an axis, at whose end alone there is output padding",
                        "output_padding=0, with a kernel of the stride's size")
        if shift and not (new == size * stride and padding == extra == 0 and dilation * (kernel - 1) < stride):
            site.refuse(where, "windows that overlap or do not close the circle, on which pixels are shifted",
                        f"kernel_size={stride}, padding=0")
    return Grid(axis.space.resampled((size,) * axis.space.ndim, (new,) * axis.space.ndim) if new == size * stride else
                axis.space, axis.axis, new, axis.copy)


# --- pools


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d")
def average_pool(site: Site, x: Features, kernel: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
                 count_include_pad: bool = True, divisor_override: Any = None) -> Features:
    """Average pools; they act on every channel alike."""
    return _pool(site, x, kernel, stride, padding, 1, ceil_mode)


@rule("max_pool1d", "max_pool2d", "max_pool3d")
def maximum_pool(site: Site, x: Features, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
                 ceil_mode: bool = False) -> Features:
    """Maximum pools."""
    site.ledger.unsigned(site, x.axes, NO_MAXIMUM)
    return _pool(site, x, kernel, stride, padding, dilation, ceil_mode)


@rule("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices")
def maximum_pool_with_places(site: Site, x: Features, *arguments: Any, **options: Any) -> tuple:
    """Maximum pools that give the positions of maxima too."""
    return maximum_pool(site, x, *arguments, **options), Places()


def _ndim(site: Site) -> int:
    return int(next(letter for letter in site.operator if letter.isdigit()))


def _pool(site: Site, x: Features, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Features:
    ndim = _ndim(site)
    axes, stride = spatial(site, x, ndim), kernel if stride is None or stride == [] else stride
    settings = zip(*(per_axis(value, ndim) for value in (kernel, stride, padding, dilation)))
    windows = [_with_border(site, Window(k, s, p, p, d, ceil_mode), axis) for (k, s, p, d), axis in zip(settings, axes)]
    return Features((*x.axes[:2], *((axis,) for axis in slide(site, axes, windows, alike=True))))


@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
      "adaptive_max_pool3d")
def adaptive_pool(site: Site, x: Features, size: Any) -> Any:
    """Adaptive pools, whose windows are symmetric for every size."""
    if "max" in site.operator:
        site.ledger.unsigned(site, x.axes, NO_MAXIMUM)
    ndim = _ndim(site)
    axes = spatial(site, x, ndim)
    new = [own if want is None else want for want, own in zip(per_axis(size, ndim), map(axis_size, x.axes[2:]))]
    behind = [_adapted(site, axes, new, k) for k in range(ndim)]
    result = Features((*x.axes[:2], *((axis,) for axis in behind)))
    return (result, Places()) if "max" in site.operator else result


def _adapted(site: Site, axes: Sequence[Grid | Still], new: Sequence[int], k: int) -> Grid | Still:
    axis, size = axes[k], tuple(new)
    if isinstance(axis, Still):
        return Still(new[k])
    places = {its.axis: j for j, its in enumerate(axes) if isinstance(its, Grid) and its.copy == axis.copy}
    for g in site.ledger.group.generators():
        source = places.get(int(axis.space.point(g).index[axis.axis]))
        if source is None or new[source] != new[k]:
            site.refuse(f"the output size {size}", f"'{axis.space.name}' exchanges the axes",
                        f"output_size={size[0]}, the same along both axes")
        shift = axis.space.shift(g)[axis.axis]
        if new[k] > 1 and shift * new[k] % axis.pixels:
            step = axis.pixels // math.gcd(axis.pixels, new[k])
            site.refuse(f"the output size {size} on the size {tuple(map(axis_size, [(its,) for its in axes]))}",
                        f"a shift by {shift} pixels, which is no whole number of outputs",
                        f"output_size=1, or shifts by a multiple of {step} pixels when they come to this layer")
    return Grid(axis.space.resampled((axis.pixels,) * axis.space.ndim, (new[k],) * axis.space.ndim), axis.axis, new[k], axis.copy)


# --- padding and interpolation


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
      "replication_pad2d", "replication_pad3d")
def pad(site: Site, x: Any, ends: Sequence[int], mode: Any = "constant", value: Any = 0) -> Features:
    """Padding: the same at both ends of an axis that is reversed; around a circle where pixels are shifted."""
    x = as_features(site, x)
    if site.operator != "pad":
        mode, value = ("constant", 0 if isinstance(mode, str) else mode) if "constant" in site.operator else ("reflect", 0)
    axes = list(x.axes)
    pairs = {len(axes) - 1 - k: (ends[2 * k], ends[2 * k + 1]) for k in range(len(ends) // 2)}
    if mode == "constant" and value not in (0, None):
        site.ledger.unsigned(site, axes, "padding with a number that has a sign")
    for k, (before, after) in pairs.items():
        if (before, after) != (0, 0):
            axes[k] = _padded(site, axes, pairs, k, mode)
    return Features(tuple(axes))


def _padded(site: Site, axes: Sequence[Axis], pairs: dict[int, tuple[int, int]], k: int, mode: str) -> Axis:
    before, after = pairs[k]
    if not any(isinstance(atom, Grid) for atom in leaves(axes[k])):
        site.ledger.still(site, axes[k], "padding along an axis that the group moves", "no padding along this axis")
        return (Still(axis_size(axes[k]) + before + after),)
    axis = as_grid(site, axes[k])
    if isinstance(axis, Still):
        return (Still(axis.size + before + after),)
    where = f"padding {before}+{after} on the size {axis.size}"
    others = {leaf.axis: j for j, its in enumerate(axes) for leaf in leaves(its) if isinstance(leaf, Grid) and leaf.copy == axis.copy}
    for source, sense, shift in grid_moves(axis):
        if pairs.get(others.get(source, -1), (0, 0)) != (before, after):
            site.refuse(where, f"'{axis.space.name}' exchanges axes that are padded differently", "the same padding along both axes")
        if sense < 0 and before != after and mode != "circular":
            site.refuse(where, f"'{axis.space.name}' reverses an axis", f"padding that is equal on both sides, such as {before}+{before}")
        if shift and mode != "circular":
            site.refuse(where, "pixels that a circular shift moves over the border, where other padding is", 'mode="circular"')
    if mode == "circular" and axis.border == (0, 0):
        return (axis._replace(border=(before, after)),)
    return (axis._replace(pixels=axis.size + before + after, border=(0, 0)),)


@rule(*(f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "trilinear3d",
                                        "bicubic2d")), *(f"_upsample_nearest_exact{n}d" for n in (1, 2, 3)),
      "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
def interpolation(site: Site, x: Features, *arguments: Any, **options: Any) -> Features:
    """Interpolation, a linear map of each axis: it is measured on the axis whether it commutes with the group."""
    axes = spatial(site, x, _ndim(site))
    behind: list[Grid | Still] = []
    for k, axis in enumerate(axes):
        matrix = _resampling(site, axes, k, arguments, options)
        size = len(matrix)
        if isinstance(axis, Still):
            behind.append(Still(size))
            continue
        if axis.border != (0, 0):
            site.refuse("circular padding", "interpolation of a padded image", "padding behind it")
        new = Grid(axis.space.resampled((axis.pixels,) * axis.space.ndim, (size,) * axis.space.ndim), axis.axis, size, axis.copy)
        _check_resampling(site, axes, k, matrix, new)
        behind.append(new)
    sizes = {axis.axis: its.size for axis, its in zip(axes, behind) if isinstance(axis, Grid)}
    for axis, its in zip(axes, behind):
        if isinstance(axis, Grid) and any(sizes.get(source) != its.size for source, _, _ in grid_moves(axis)):
            site.refuse(f"the output size {tuple(its.size for its in behind)}", f"'{axis.space.name}' exchanges the axes",
                        "the same factor along both axes")
    return Features((*x.axes[:2], *((axis,) for axis in behind)))


def _resampling(site: Site, axes: Sequence[Grid | Still], k: int, arguments: Sequence[Any], options: dict) -> Tensor:
    """The matrix of the operation along one axis, measured."""
    sizes = [its.pixels if isinstance(its, Grid) else its.size for its in axes]
    n = sizes[k]
    place = [1] * len(sizes)
    place[k] = n
    one = torch.eye(n, dtype=torch.float64).view(n, 1, *place).expand(n, 1, *sizes)
    operator = getattr(torch.ops.aten, site.operator)
    out = operator(one.contiguous(), *arguments, **options)
    for dim in range(len(sizes)):
        out = out if dim == k else out.select(2 + dim if dim < k else 3, 0)
    return out.reshape(n, -1).T


def _check_resampling(site: Site, axes: Sequence[Grid | Still], k: int, matrix: Tensor, new: Grid) -> None:
    """Refuse a linear map of an axis that does not commute with reversals and shifts."""
    axis = axes[k]
    assert isinstance(axis, Grid)
    where = f"{site.operator} from {axis.pixels} to {new.pixels} pixels"
    for (_, sense, shift), (_, _, after) in zip(grid_moves(axis), grid_moves(new)):
        moved = matrix.roll(after, 0).roll(shift, 1) if shift else matrix
        moved = moved.flip(0, 1) if sense < 0 else moved
        exact = shift * new.pixels % axis.pixels == 0
        if not exact or not torch.allclose(moved, matrix, atol=1e-9):
            factor = max(1, round(new.pixels / axis.pixels))
            site.refuse(where, f"'{axis.space.name}' moves pixels to which other weights belong",
                        f"a whole factor, such as scale_factor={factor}, with mode='bilinear' or average pooling where it shrinks")

