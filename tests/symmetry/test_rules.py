"""The rules of single layers and functions: pools, convolutions in groups, and every rule of the tables."""
import itertools
import operator
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers_symmetry import Call, accepted, batch, randomised
from late import ORDERS, reordered
from symbnn.errors import Refusal
from symbnn.symmetry.actions import Action, natural_action, regular_channels
from symbnn.symmetry.fields import SpatialAction, field, flips, half_turns, rotations, shifts, time_reversal
from symbnn.symmetry.groups import Cyclic, Permutations
from symbnn.symmetry.networks import intertwining_error, network_action
from symbnn.symmetry.rules import FUNCTION_RULES, LAYER_RULES
from symbnn.symmetry.signed_permutations import SignedPermutation
from tolerances import exact64

VISIBLE = 1e-6  # a failure of the equation for random weights of order one, far above rounding


@pytest.mark.parametrize("layer", [nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d])
def test_adaptive_pools_always_reverse(layer):
    torch.manual_seed(0)
    for size, outputs in itertools.product(range(1, 12), range(1, 12)):
        pool, x = layer(outputs), torch.randn(3, 1, size, dtype=torch.float64)
        action = network_action(pool, field(time_reversal(), (1, size)))
        assert action.output.shape == (1, outputs)
        assert intertwining_error(pool, action, x) < exact64


@pytest.mark.parametrize("layer", [nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d])
def test_adaptive_pools_under_shifts(layer):
    torch.manual_seed(0)
    seen = {True: 0, False: 0}
    for size, outputs, step in itertools.product((4, 6, 9), range(1, 7), range(1, 4)):
        if size % step == 0:
            pool, x = layer(outputs), torch.randn(4, 1, size, dtype=torch.float64)
            action = accepted(pool, field(shifts(size // step, step, ndim=1), (1, size)))
            seen[action is not None] += 1
            y, there = pool(x), pool(x.roll(step, -1))
            closest = min((there - y.roll(t, -1)).abs().max() for t in range(outputs))
            assert closest < exact64 if action else closest > VISIBLE
            assert action is None or intertwining_error(pool, action, x) < exact64
    assert min(seen.values()) > 5


def test_channels_that_do_not_fit_are_refused():
    with pytest.raises(Refusal, match="made for 3"):
        network_action(nn.Conv2d(3, 1, 3), field(rotations(), (1, 4, 4)))
    with pytest.raises(Refusal, match="made for 17"):
        network_action(nn.Linear(17, 1), Action.trivial(rotations().group, (16,)))


@pytest.mark.parametrize("order", ORDERS)
def test_groups_of_a_convolution_that_one_generator_tears(order):
    """Of S4 on four channels the exchange keeps {0, 1} and {2, 3}, the cycle does not."""
    channels = reordered(natural_action(Permutations(4)), order)
    source = field(SpatialAction.trivial(channels.group, 2), (4, 3, 3), channels)
    with pytest.raises(Refusal, match="tears the convolution's groups apart"):
        network_action(nn.Conv2d(4, 4, 1, groups=2), source, output=field(source.space, (4, 3, 3), channels))


@pytest.mark.parametrize("signs", [[1, 1, -1, -1], [1, -1, 1, 1], [1, -1, -1, 1]])
@pytest.mark.parametrize("index", [[0, 1, 2, 3], [2, 3, 0, 1], [3, 2, 1, 0]])
def test_signs_that_differ_between_the_groups_of_a_convolution(index, signs):
    step = SignedPermutation(index, signs)
    powers = [SignedPermutation.identity(4), step, step @ step, step @ step @ step]
    channels = Action(Cyclic(4), (4,), powers.__getitem__)
    source = field(SpatialAction.trivial(channels.group, 2), (4, 3, 3), channels)
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 4, 2, groups=2).double(), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    action = network_action(layer, source, output=field(source.space, (4, 2, 2), channels))
    assert intertwining_error(layer, action, x) < exact64


# Every rule of the tables on actions that may mix all axes of a plain shape

LAYER_SETTINGS = {
    nn.Softmax: [(dim,) for dim in range(-3, 4)], nn.LogSoftmax: [(dim,) for dim in range(-3, 4)],
    nn.Linear: [(n, 3) for n in (2, 3, 4, 6, 12, 24)], nn.LayerNorm: [(6,), (4,), (3,), ((2, 3),), ((2, 3, 4),)],
    nn.BatchNorm1d: [(2,), (3,), (6,), (12,)], nn.BatchNorm2d: [(2,), (3,)], nn.Conv1d: [(2, 3, 1), (3, 2, 3, 1, 1)],
    nn.Conv2d: [(2, 3, 1), (1, 1, 1)], nn.Flatten: [(1, end) for end in (-1, 1, 2, 3)] + [(2,), (0,)],
    **dict.fromkeys((nn.MaxPool1d, nn.AvgPool1d, nn.MaxPool2d, nn.AvgPool2d), ((1,), (2,))),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d), ((1,),)),
}
FUNCTION_SETTINGS = {
    **dict.fromkeys((F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, "softmax", "log_softmax"),
                    tuple({"dim": dim} for dim in range(-3, 4))),
    **dict.fromkeys((torch.flatten, "flatten"),
                    tuple({"start_dim": first, "end_dim": last} for first in (0, 1, 2) for last in (-1, 1, 2, 3))),
    **dict.fromkeys((torch.mean, "mean", torch.sum, "sum", torch.amax, "amax"),
                    ({}, *({"dim": dim, "keepdim": keep} for dim in (0, 1, 2, -1, (1, 2), (1, 2, 3), ())
                           for keep in (False, True)))),
    F.dropout: [{"training": False}],
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_", operator.sub, torch.sub, "sub",
                     operator.mul, operator.truediv, torch.mul, torch.div, "mul", "div"), ((0.7,), "itself")),
    **dict.fromkeys((F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d), ({"kernel_size": 1}, {"kernel_size": 2})),
    **dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_max_pool1d, F.adaptive_max_pool2d),
                    ({"output_size": 1},)),
}


def calls():
    """Every layer and function of the tables, with settings, as networks."""
    for kind in LAYER_RULES:
        for arguments in LAYER_SETTINGS.get(kind, [()]):
            yield f"{kind.__name__}{arguments}", kind(*arguments)
    for function in FUNCTION_RULES:
        for given in FUNCTION_SETTINGS.get(function, [{}]):
            args, kwargs = ((), given) if isinstance(given, dict) else (given, {})
            title = function if isinstance(function, str) else f"{function.__module__}.{function.__name__}"
            yield f"{title}{given}", Call(partial(call, function, args, kwargs))


def call(function, args, kwargs, x):
    args = (torch.tanh(x),) if args == "itself" else args
    x = x * 1.0  # what works in place works on a copy
    return getattr(x, function)(*args, **kwargs) if isinstance(function, str) else function(x, *args, **kwargs)


def powers(permutation, shape, signs=None):
    """The cyclic group that one signed permutation of the flattened shape generates, as a plain action."""
    move = SignedPermutation(permutation, torch.ones(len(permutation)) if signs is None else signs)
    elements, power = [SignedPermutation.identity(len(permutation))], move
    while power != elements[0]:
        elements, power = [*elements, power], power @ move
    return Action(Cyclic(len(elements)), shape, elements.__getitem__, "powers of one permutation")


def plain_actions(shape, seed):
    """Permutations that mix all axes, that respect lines along one axis, or all axes, and one with signs."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.arange(torch.Size(shape).numel()).view(shape)

    def shuffle(n):
        return torch.randperm(n, generator=generator)

    found = [powers(shuffle(grid.numel()), shape)]
    for axis in range(len(shape)):  # the lines along this axis are shuffled, and each is in its own way
        rows = grid.movedim(axis, -1).reshape(-1, shape[axis])
        rows = torch.stack([row[shuffle(len(row))] for row in rows[shuffle(len(rows))]])
        found.append(powers(rows.view(grid.movedim(axis, -1).shape).movedim(-1, axis).flatten(), shape))
        found.append(powers(grid.index_select(axis, shuffle(shape[axis])).flatten(), shape))
    signs = 1 - 2 * torch.randint(2, (grid.numel(),), generator=generator)
    small = [action for action in found if action.group.order <= 60] + [powers(grid.flatten(), shape)]
    return [*small, powers(grid.flatten(), shape, signs), powers(grid.flip(0).flatten(), shape, signs * signs.flip(0))]


@pytest.mark.filterwarnings("ignore:dropout2d. Received")  # it says how it reads other shapes
@pytest.mark.parametrize("shape", [(6,), (2, 3), (3, 2), (2, 3, 4)])
def test_whatever_is_accepted_on_plain_actions_commutes(shape):
    """Sums over one axis, softmaxes and whatever else treats an axis apart, under actions that mix axes."""
    x, applied, softmaxes = batch(shape), set(), 0
    actions = [action for seed in range(4 - len(shape)) for action in plain_actions(shape, seed)]
    for name, network in calls():
        network = randomised(network.eval())
        for source in actions:
            try:
                action = network_action(network, source)
            except Refusal:
                continue
            try:
                network(x)
            except (RuntimeError, IndexError, ValueError):
                continue  # torch does not take the shape
            applied.add(name)
            softmaxes += "oftmax" in name
            assert intertwining_error(network, action, x) < exact64, (name, source)
    assert len(applied) > 50 and softmaxes > 20 * len(shape)


@pytest.mark.parametrize("axis, dim", [(0, 1), (1, 2), (1, -1), (0, -2)])
def test_a_softmax_is_accepted_exactly_where_lines_stay_lines(axis, dim):
    shape, accepted = (3, 4), []
    for action in plain_actions(shape, 5):
        lines = torch.arange(12).view(shape).movedim(axis, -1).reshape(-1, shape[axis])
        kept = all(any(set(action(1).index[line].tolist()) == set(other.tolist()) for other in lines)
                   for line in lines) and action.is_unsigned() if action.group.order > 1 else True
        try:
            network_action(nn.Softmax(dim), action)
        except Refusal:
            accepted.append(False)
        else:
            accepted.append(True)
        assert accepted[-1] == kept, action
    assert True in accepted and False in accepted


def test_softmaxes_on_fields_and_flat_features():
    """Channels of a field always; rows of pixels where the group carries rows to rows; flattened features."""
    channels = regular_channels(Cyclic(2), 1)
    for space, dim, allowed in ((flips, 1, True), (flips, -1, True), (flips, 2, True), (half_turns, 3, True),
                                (flips, -3, True), (flips, 0, False), (flips, 4, False), (flips, -4, False)):
        network, source = nn.Softmax(dim), field(space(), (2, 4, 4), channels)
        if allowed:
            assert intertwining_error(network, network_action(network, source), batch((2, 4, 4))) < exact64
        else:
            with pytest.raises(Refusal, match=f"dim={dim} on features of shape.*Fix: dim=1"):
                network_action(network, source)
    for dim in (1, -3):
        network = nn.Sequential(nn.Softmax(dim), nn.Flatten(), nn.LogSoftmax(-1))
        source = field(rotations(), (2, 4, 4))
        assert intertwining_error(network, network_action(network, source), batch((2, 4, 4))) < exact64
    for dim in (2, 3):
        with pytest.raises(Refusal, match=r"Softmax.*tears apart .*dim=1"):
            network_action(nn.Softmax(dim), field(rotations(), (2, 4, 4)))
    mixed = Action(Cyclic(4), (4, 4), rotations().on(4, 4), "turns of a plain table")
    for layer in (nn.Softmax(1), nn.LogSoftmax(2), nn.Dropout1d()):
        with pytest.raises(Refusal, match="tears apart"):
            network_action(layer, mixed)
    action = network_action(nn.Tanh(), mixed)
    assert action.output.shape == (4, 4) and intertwining_error(nn.Tanh(), action, batch((4, 4))) < exact64
