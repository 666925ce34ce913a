"""The exact condition under which a window that slides along an axis commutes with reversals, turns and shifts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from .axes import Grid, Still
from .features import Site

class Window(NamedTuple):
    """A window that slides along one axis: tap `j` of output `o` reads pixel `o*stride - before + j*dilation`."""

    kernel: int
    stride: int = 1
    before: int = 0  # pixels of padding before the first pixel
    after: int = 0  # and behind the last
    dilation: int = 1
    ceil: bool = False  # torch's ceil_mode

    def outputs(self, size: int) -> int:
        """The number of outputs on an axis of `size` pixels, as torch counts them."""
        steps, rest = divmod(size + self.before + self.after - self.dilation * (self.kernel - 1) - 1, self.stride)
        return steps + 1 + (self.ceil and rest > 0 and (steps + 1) * self.stride < size + self.before)

    def end(self, size: int) -> int:
        """How many pixels the last tap of the last output lies behind the last pixel (negative: before it)."""
        return (self.outputs(size) - 1) * self.stride - self.before + self.dilation * (self.kernel - 1) - (size - 1)

    def is_symmetric(self, size: int) -> bool:
        """Whether a reversed image is read at the same pixels by the reversed kernel: the window ends as it starts."""
        return self.end(size) == self.before

    def covers(self, size: int) -> bool:
        """Whether one output reads every pixel once and no padding."""
        return (self.kernel, self.dilation, self.before, self.outputs(size)) == (size, 1, 0, 1)

    def __str__(self) -> str:
        return (f"kernel {self.kernel}, stride {self.stride}, padding {self.before}+{self.after}, "
                f"dilation {self.dilation}")


def per_axis(value: Any, ndim: int) -> list:
    """A setting for each of so many axes, from one for all of them or one for each."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * ndim if len(values) == 1 else values


def convolution_windows(kernel: Sequence[int], stride: Any = 1, padding: Any = 0, dilation: Any = 1) -> list[Window]:
    """The window that a convolution slides along each axis; `padding` may be "same" or "valid"."""
    ndim, reach = len(kernel), [d * (k - 1) for k, d in zip(kernel, per_axis(dilation, len(kernel)))]
    if padding == "same":  # torch adds what is odd behind
        ends = [(r // 2, r - r // 2) for r in reach]
    else:
        ends = [(p, p) for p in per_axis(0 if isinstance(padding, str) else padding, ndim)]
    return [Window(k, s, *end, d) for k, s, end, d in zip(kernel, per_axis(stride, ndim), ends, per_axis(dilation, ndim))]


Axes = Sequence[Grid | Still]  # the axes along which a window slides


def slide(site: Site, axes: Axes, windows: Sequence[Window], wraps: bool = False, alike: bool = False) -> list[Grid | Still]:
    """The axes behind windows that slide along these, refused where they do not commute.

    `wraps` says that padding is circular, so that pixels are counted modulo the size; `alike` that all taps of the
    window are the same, as in pools, so that one window over the whole axis does not notice shifts.
    """
    sizes = tuple(_pixels(axis) for axis in axes)
    for window, size in zip(windows, sizes):
        if window.outputs(size) < 1:
            most = (size + window.before + window.after - 1) // window.dilation + 1
            site.refuse(_where(window, sizes), "a window that is larger than the padded image",
                        f"kernel_size={most} or less, or a larger image")
    for k, (axis, window) in enumerate(zip(axes, windows)):
        if isinstance(axis, Grid):
            _check_axis(site, axes, windows, k, sizes, wraps or axis.border != (0, 0), alike)
    return [_behind(axis, window.outputs(size), size) for axis, window, size in zip(axes, windows, sizes)]


def _pixels(axis: Grid | Still) -> int:
    return axis.pixels if isinstance(axis, Grid) else axis.size


def _behind(axis: Grid | Still, new: int, old: int) -> Grid | Still:
    if isinstance(axis, Still):
        return Still(new)
    ndim = axis.space.ndim
    return Grid(axis.space.resampled((old,) * ndim, (new,) * ndim), axis.axis, new, axis.copy)


def _check_axis(site: Site, axes: Axes, windows: Sequence[Window], k: int, sizes: tuple[int, ...], wraps: bool,
                alike: bool) -> None:
    """Refuse a window along one axis of a grid that some element notices."""
    axis, window, size = axes[k], windows[k], sizes[k]
    assert isinstance(axis, Grid)
    places = {its.axis: j for j, its in enumerate(axes) if isinstance(its, Grid) and its.copy == axis.copy}
    for g in site.ledger.group.generators():
        point = axis.space.point(g)
        source = places.get(int(point.index[axis.axis]))
        if source is None:
            site.refuse(_where(window, sizes), f"'{axis.space.name}' exchanges this axis with one that the window does not "
                        "slide along", "a window along both axes, or flips() or half_turns(), which keep the axes")
        if windows[source] != window:
            site.refuse(f"{window} along one axis and {windows[source]} along the other",
                        f"'{axis.space.name}' exchanges the two axes, and a turned kernel meets the other's settings",
                        f"the same settings along both axes, such as kernel_size={window.kernel} and "
                        f"stride={window.stride}, or flips() or half_turns(), which keep the axes")
        if int(point.sign[axis.axis]) < 0:
            _check_reversal(site, window, axis, sizes, size, wraps)
        shift = axis.space.shift(g)[axis.axis]
        if shift % size and not (alike and window.covers(size)):
            _check_shift(site, window, sizes, size, shift, wraps)


def _where(window: Window, sizes: tuple[int, ...]) -> str:
    return f"{window} on the size {sizes}"


def _check_reversal(site: Site, window: Window, axis: Grid, sizes: tuple[int, ...], size: int, wraps: bool) -> None:
    end = window.end(size)
    gap = end - window.before
    if gap % size if wraps else gap:
        site.refuse(_where(window, sizes),
                    f"'{axis.space.name}' reverses an axis, along which the window starts {window.before} pixels before "
                    f"the image and ends {f'{end} behind it' if end >= 0 else f'{-end} before its end'}, so the turned "
                    "image is read at other pixels",
                    _symmetric_alternative(window, size))


def _symmetric_alternative(window: Window, size: int) -> str:
    if window.before != window.after:
        return f"kernel_size={window.kernel + 1}, an odd one, or padding that is equal on both sides, such as padding=0"
    near = range(max(1, size - window.stride), size + window.stride)
    sizes = [n for n in near if window.outputs(n) > 0 and window.is_symmetric(n)]
    span = size + 2 * window.before - window.dilation * (window.kernel - 1) - 1
    other = f"an image of {' or '.join(map(str, sizes))} pixels when it comes to this layer, or " if sizes else ""
    return f"{other}a stride that divides {span}, which is size + 2 padding - dilation (kernel - 1) - 1"


def _check_shift(site: Site, window: Window, sizes: tuple[int, ...], size: int, shift: int, wraps: bool) -> None:
    if not wraps and (window.before > 0 or window.end(size) > 0):
        site.refuse(_where(window, sizes), "pixels that a circular shift moves over the border, where other padding is",
                    "padding_mode='circular' for a convolution, padding=0 and a kernel that tiles the image for a pool")
    if window.outputs(size) * window.stride != size:
        site.refuse(_where(window, sizes),
                    f"{window.outputs(size)} outputs at stride {window.stride}, which do not close the circle",
                    f"padding and stride with {size} = outputs times stride, such as stride=1 and padding='same' for a "
                    "convolution, kernel_size=stride for a pool")
    if shift % window.stride:
        site.refuse(_where(window, sizes),
                    f"a shift by {shift} pixels, which is no whole number of outputs at stride {window.stride}",
                    "shifts(n, step) with a step that is a multiple of the product of all strides up to this layer")
