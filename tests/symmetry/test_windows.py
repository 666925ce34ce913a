"""Which windows commute: the condition against brute force, in both directions."""
import itertools
import re

import pytest
import sympy as sp
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from helpers_ground import refusal_of
from helpers_symmetry import accepted, every
from late import ORDERS, reordered
from symbnn.errors import Refusal
from symbnn.symmetry.fields import (
    SpatialAction,
    field,
    flips,
    rotations,
    rotations_and_flips,
    shifts,
    time_reversal,
)
from symbnn.symmetry.groups import Cyclic, Product
from symbnn.symmetry.networks import intertwining_error, network_action
from symbnn.symmetry.windows import Window
from tolerances import exact64

VISIBLE = 1e-6  # a failure of the equation for random weights of order one, far above rounding


def reads(size, window, mode):
    """For every output and tap the pixel that is read, found by padding and unfolding an image of its own indices."""
    pixels = torch.arange(1.0, size + 1)[None, None]
    if mode == "zeros":
        padded = F.pad(pixels, (window.before, window.after))  # 0 stands for padding
    else:
        padded = F.pad(pixels, (window.before, window.after), mode=mode)
    first = torch.arange(window.outputs(size))[:, None] * window.stride
    return padded[0, 0][first + torch.arange(window.kernel) * window.dilation]


def mirrored(table, size):
    """The reads of the reversed image by the reversed kernel, put in order of the reversed outputs."""
    flipped = table.flip(0, 1)
    return torch.where(flipped == 0, flipped, size + 1 - flipped)


@pytest.mark.parametrize("mode", ["zeros", "circular", "replicate"])
def test_reversal_of_convolutions_by_brute_force(mode):
    """Nothing accepted fails, and what is refused fails, but for windows whose differing reads all meet padding."""
    torch.manual_seed(0)
    counts = {True: 0, False: 0, "unseen": 0}
    for size, kernel, padding, stride, dilation in every(11, itertools.product(
            range(1, 8), range(1, 5), range(3), range(1, 4), range(1, 3))):
        if size + 2 * padding <= dilation * (kernel - 1) or (mode != "zeros" and not 0 < padding <= size):
            continue
        layer = nn.Conv1d(1, 1, kernel, stride, padding, dilation, padding_mode=mode).double()
        action = accepted(layer, field(time_reversal(), (1, size)))
        x = torch.randn(3, 1, size, dtype=torch.float64)
        with torch.no_grad():
            weights = {"weight": layer.weight.flip(-1), "bias": layer.bias}
            there = torch.func.functional_call(layer, weights, (x.flip(-1),))
            error = (there - layer(x).flip(-1)).abs().max().item()
        table = reads(size, Window(kernel, stride, padding, padding, dilation), mode)
        assert (error < exact64) == torch.equal(table, mirrored(table, size)), (size, kernel, padding, stride, dilation)
        counts[action is not None] += 1
        if action is not None:
            assert error < exact64 and intertwining_error(layer, action, x) == error
        elif error < VISIBLE:
            counts["unseen"] += 1
            assert padding > 0
    assert min(counts[True], counts[False]) >= 6 and counts["unseen"] <= (0 if mode == "circular" else 4), counts


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch on its own speed
@pytest.mark.parametrize("dilation, kernel", [(1, 1), (1, 2), (1, 3), (1, 4), (2, 2), (2, 3), (3, 2), (3, 4)])
def test_same_padding(dilation, kernel):
    torch.manual_seed(0)
    layer = nn.Conv1d(1, 1, kernel, padding="same", dilation=dilation).double()
    action = accepted(layer, field(time_reversal(), (1, 9)))
    assert (action is not None) == (dilation * (kernel - 1) % 2 == 0)
    x = torch.randn(2, 1, 9, dtype=torch.float64)
    weights = {"weight": layer.weight.flip(-1), "bias": layer.bias}
    error = (torch.func.functional_call(layer, weights, (x.flip(-1),)) - layer(x).flip(-1)).abs().max().item()
    assert error < exact64 if action else error > VISIBLE


@pytest.mark.parametrize("layer", [nn.MaxPool1d, nn.AvgPool1d])
def test_reversal_of_pools_by_brute_force(layer):
    torch.manual_seed(0)
    for size, kernel, stride, ceil in every(11, itertools.product(
            range(1, 10), range(1, 5), range(1, 5), (False, True))):
        for padding in range(kernel // 2 + 1):
            if size + 2 * padding < kernel:
                continue
            pool = layer(kernel, stride, padding, ceil_mode=ceil)
            x = torch.randn(8, 1, size, dtype=torch.float64)
            action = accepted(pool, field(time_reversal(), (1, size)))
            window = Window(kernel, stride, padding, padding, 1, ceil)
            assert pool(x).shape[-1] == window.outputs(size)
            error = (pool(x.flip(-1)) - pool(x).flip(-1)).abs().max().item()
            assert (action is not None) == window.is_symmetric(size)
            assert error < exact64 if action else error > VISIBLE or padding > 0


@pytest.mark.parametrize("build", [
    lambda k, s, p: nn.Conv1d(1, 1, k, s, p), lambda k, s, p: nn.Conv1d(1, 1, k, s, p, padding_mode="circular"),
    lambda k, s, p: nn.MaxPool1d(k, s, p), lambda k, s, p: nn.AvgPool1d(k, s, p, ceil_mode=True)],
    ids=["zeros", "circular", "max pool", "average pool"])
def test_shifts_by_brute_force(build):
    """What is accepted commutes; what is refused has no circular shift of its output that would match."""
    torch.manual_seed(0)
    seen = {True: 0, False: 0}
    for size, kernel, stride, step in every(5, itertools.product(
            (4, 6), range(1, 5), range(1, 4), range(1, 4)), (0, 2)):
        for padding in range(kernel // 2 + 1):
            if size % step or size + 2 * padding < kernel:
                continue
            layer = build(kernel, stride, padding).double()
            source = field(shifts(size // step, step, ndim=1), (1, size))
            action, x = accepted(layer, source), torch.randn(32, 1, size, dtype=torch.float64)
            seen[action is not None] += 1
            if action is not None:
                assert intertwining_error(layer, action, x) < exact64
            elif padding == 0 or isinstance(layer, nn.Conv1d):  # clipped pools may be others: 3 at stride 3 as 2 at 2
                with torch.no_grad():
                    y, there = layer(x), layer(x.roll(step, -1))
                closest = min((there - y.roll(t, -1)).abs().max() for t in range(y.shape[-1]))
                assert closest > VISIBLE, (size, kernel, stride, step, padding)
    assert min(seen.values()) > 3


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_images_under_turns(data):
    """Random two-dimensional layers: accepted means exact, refused means that the turned response differs."""
    pair = st.one_of(st.integers(1, 4).map(lambda n: (n, n)), st.tuples(st.integers(1, 4), st.integers(1, 4)))
    side = st.integers(3, 7)
    size = data.draw(st.one_of(side.map(lambda n: (n, n)), st.tuples(side, side)))
    space = data.draw(st.sampled_from([rotations(), rotations_and_flips(), flips()]))
    kernel, stride = data.draw(pair), data.draw(st.sampled_from([(1, 1), (2, 2), (1, 2), (3, 3)]))
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    assume(all(n + 2 * p >= k for n, p, k in zip(size, padding, kernel)))
    torch.manual_seed(data.draw(st.integers(0, 10)))
    mode = data.draw(st.sampled_from(["zeros", "circular"]))
    layer = nn.Conv2d(2, 3, kernel, stride, padding, padding_mode=mode).double()
    try:
        source = field(space, (2, *size))
    except Refusal:
        assert size[0] != size[1] and space != flips()
        return
    action, x = accepted(layer, source), torch.randn(2, 2, *size, dtype=torch.float64)
    if action is not None:
        assert intertwining_error(layer, action, x) < exact64
        return
    with torch.no_grad():
        y = layer(x)
        try:
            turn, turn_kernel = space.on(*y.shape[-2:]), space.kernel(*kernel)
        except Refusal:
            return  # output or kernel are not square, so there is nothing to compare with
        assume(min(y.shape[-2:]) > 1)  # along an axis of one output the stride has no meaning
        errors = []
        for g in space.group.generators():
            weights = {"weight": turn_kernel.act(g, layer.weight), "bias": layer.bias}
            there = torch.func.functional_call(layer, weights, (source.act(g, x),))
            errors.append((there - turn.act(g, y)).abs().max().item())
    assert max(errors) > VISIBLE


def test_the_printed_condition_is_the_one_that_is_used():
    H, k, s, p, d = sp.symbols("H k s p d", integer=True)
    condition = sp.lambdify((H, k, s, p, d), sp.Eq(sp.Mod(H + 2 * p - d * (k - 1) - 1, s), 0), "math")
    for size, kernel, stride, padding, dilation in itertools.product(
            range(1, 12), range(1, 6), range(1, 5), range(3), range(1, 3)):
        if size + 2 * padding > dilation * (kernel - 1):
            window = Window(kernel, stride, padding, padding, dilation)
            assert window.is_symmetric(size) == condition(size, kernel, stride, padding, dilation)
            assert window.outputs(size) == F.conv1d(torch.zeros(1, 1, size), torch.zeros(1, 1, kernel), None, stride,
                                                    padding, dilation).shape[-1]


def test_a_larger_window_than_the_image_is_refused():
    for size, padding, dilation, most in ((4, 0, 1, 4), (4, 1, 2, 3), (7, 0, 3, 3)):
        with pytest.raises(Refusal, match="Kernel size can't be greater than actual input size"):
            network_action(nn.Conv2d(1, 1, most + 1, 1, padding, dilation), field(rotations(), (1, size, size)))
        assert network_action(nn.Conv2d(1, 1, most, 1, padding, dilation), field(rotations(), (1, size, size)))


def fixed(layer, space, size):
    """The fix of the refusal of a layer on a square image."""
    return refusal_of(lambda: network_action(layer, field(space, (1, size, size)))).fix


def test_fixes_work():
    even = nn.Conv2d(1, 1, 4, padding="same")
    kernel = int(re.match(r"kernel_size=(\d+)", fixed(even, rotations(), 8))[1])
    for layer in (nn.Conv2d(1, 1, kernel, padding="same"), nn.Conv2d(1, 1, 4, padding=0)):
        assert accepted(layer, field(rotations(), (1, 8, 8)))
    for size, kernel, stride, padding in every(17, itertools.product(
            range(5, 10), range(1, 6), range(2, 5), range(3))):
        layer = nn.Conv2d(1, 1, kernel, stride, padding)
        if accepted(layer, field(flips(), (1, size, size))) is None:
            fix = fixed(layer, flips(), size)
            sizes = re.match(r"an image of (\d+)(?: or (\d+))? pixels", fix)
            assert all(accepted(layer, field(flips(), (1, int(n), int(n)))) for n in sizes.groups() if n)
            span = int(re.search(r"divides (\d+)", fix)[1])
            for divisor in (d for d in range(1, span + 1) if span % d == 0):
                assert accepted(nn.Conv2d(1, 1, kernel, divisor, padding), field(flips(), (1, size, size)))
    unequal = fixed(nn.Conv2d(1, 1, (3, 5), padding="same"), rotations(), 8)
    assert "kernel_size=3 and stride=1" in unequal
    assert accepted(nn.Conv2d(1, 1, 3, stride=1, padding="same"), field(rotations(), (1, 8, 8)))
    assert "padding_mode='circular'" in fixed(nn.Conv2d(1, 1, 3, padding=1), shifts(8), 8)
    assert accepted(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), field(shifts(8), (1, 8, 8)))
    strided = nn.Conv2d(1, 1, 3, 2, 1, padding_mode="circular")
    assert "the product of all strides" in fixed(strided, shifts(8), 8)
    assert accepted(strided, field(shifts(4, step=2), (1, 8, 8)))


# --- conditions over all generators, one of which alone breaks them

ROWS_AND_FLIPS = SpatialAction(Product(Cyclic(4), Cyclic(2)), 2, lambda g: flips().point(g[1]),
                               lambda g: (2 * g[0], 0), "shifts of rows and left-right flips")
ONE_BREAKS = {  # a layer that all generators but one would let pass, by the words of its refusal
    "the shift meets padding": (nn.Conv2d(1, 1, (3, 1), padding=(1, 0)), ROWS_AND_FLIPS, "other padding"),
    "the shift is no output": (nn.Conv2d(1, 1, (4, 1), (4, 1)), ROWS_AND_FLIPS, "no whole number of outputs"),
    "the flip reads others": (nn.Conv2d(1, 1, (1, 3), (1, 2)), ROWS_AND_FLIPS, "reverses an axis"),
    "the shift in a pool": (nn.AdaptiveAvgPool2d((2, 8)), ROWS_AND_FLIPS, "no whole number of outputs"),
    "the turn of a kernel": (nn.Conv2d(1, 1, (1, 3), padding=(0, 1)), rotations_and_flips(), "exchanges the two axes"),
    "the turn of a pool": (nn.AdaptiveMaxPool2d((4, 2)), rotations_and_flips(), "exchanges the axes"),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", ONE_BREAKS)
def test_every_generator_is_asked(case, order):
    layer, space, words = ONE_BREAKS[case]
    with pytest.raises(Refusal, match=words):
        network_action(layer, field(reordered(space, order), (1, 8, 8)))


@pytest.mark.parametrize("order", ORDERS)
def test_a_layer_that_every_generator_lets_pass(order):
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 1, (2, 3), (2, 1), padding=(0, 1)).double()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    action = network_action(layer, field(reordered(ROWS_AND_FLIPS, order), (1, 8, 8)))
    assert intertwining_error(layer, action, x) < exact64
