"""The intertwining equation for whole networks, and the networks that have no action."""
import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_structure

from helpers_symmetry import Call, batch, randomised
from symbnn.errors import Refusal
from symbnn.posterior.layers import variational_tensors, with_posteriors
from symbnn.posterior.sampling import predict
from symbnn.symmetry.actions import Action, check_action, natural_action, regular_channels, sign_change
from symbnn.symmetry.fields import (
    FieldAction,
    SpatialAction,
    field,
    flips,
    half_turns,
    point_symmetries,
    rotations,
    rotations_and_flips,
    shifts,
    time_reversal,
)
from symbnn.symmetry.groups import Cyclic, Dihedral, Permutations, Product
from symbnn.symmetry.networks import NetworkAction, intertwining_error, network_action, unit_permutations
from symbnn.symmetry.signed_permutations import SignedPermutation
from tolerances import exact32, exact64

IMAGE = (2, 8, 8)
SPACES = {"C4": rotations, "D4": rotations_and_flips, "flips": flips, "half turns": half_turns}


class Residual(nn.Module):
    """Functions in place of layers, two residual sums, batch norms, a mean as head."""

    def __init__(self, channels=8):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.first = nn.Conv2d(channels, 2 * channels, 3, padding="same", padding_mode="replicate")
        self.inner = nn.BatchNorm2d(2 * channels)
        self.second = nn.Conv2d(2 * channels, channels, 1, bias=False)
        self.shortcut, self.head = nn.Conv2d(channels, channels, 1), nn.Linear(channels, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        y = self.second(torch.relu(self.inner(self.first(x))))
        x = torch.add(self.shortcut(x), y) + x
        return self.head(F.avg_pool2d(x.relu(), 2).mean(dim=(-2, -1)))


class Functional(nn.Module):
    """Every function and method that is understood, once."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8, 6)

    def forward(self, x):
        x = F.gelu(self.a(x)) * 0.5 + 1
        x = 2 - F.avg_pool2d(torch.sigmoid(x), 3, 1, 1)
        x = F.adaptive_max_pool2d(F.silu(self.b(x)), 4)
        x = -F.adaptive_avg_pool2d(x, (2, 2)).tanh() / 3
        y = x.amax((2, 3), keepdim=True).flatten(1) - torch.flatten(F.max_pool2d(x, 2), 1) + x.mean([2, 3])
        return F.log_softmax(self.c(F.dropout(y, 0.1, self.training)), dim=-1)


def cnn(flat, mode="zeros"):
    head = [nn.Flatten(), nn.Linear(64, 16), nn.ReLU()] if flat else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, padding_mode=mode), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding="same", padding_mode=mode), nn.SiLU(), nn.AvgPool2d(2), *head, nn.Linear(16, 5))


def strided():
    return nn.Sequential(nn.Conv2d(2, 8, 2, stride=2), nn.GELU(),
                         nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Softplus(),
                         nn.Conv2d(8, 16, 3, padding=2, dilation=2, groups=4), nn.LayerNorm([16, 4, 4]), nn.ELU(),
                         nn.MaxPool2d(2), nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.3), nn.Linear(64, 5))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 16), nn.LayerNorm(16), nn.Tanh(),
                         nn.Linear(16, 5), nn.LogSoftmax(dim=1))


def dense_output():
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 5, padding=2))


NETWORKS = {"CNN, mean head": lambda: cnn(False), "CNN, flat head": lambda: cnn(True), "MLP": mlp, "residual": Residual,
            "strided, grouped": strided, "functional": Functional, "image to image": dense_output}


@pytest.mark.parametrize("hidden", ["trivial", "regular"])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", NETWORKS)
def test_intertwining_under_turns_and_flips(name, space, hidden):
    network, source = randomised(NETWORKS[name]()), field(SPACES[space](), IMAGE)
    if name == "strided, grouped" and space == "D4" and hidden == "regular":
        with pytest.raises(Refusal, match="groups"):
            network_action(network, source, hidden=hidden)
        return
    if name == "functional" and space == "D4" and hidden == "regular":
        with pytest.raises(Refusal, match="a multiple of 8 channels, blocks for each element of D4"):
            network_action(network, source, hidden=hidden)
        return
    action = network_action(network, source, hidden=hidden)
    assert network(batch(IMAGE)).std() > 0.05
    assert intertwining_error(network, action, batch(IMAGE)) < exact64
    assert set(action.parameters) == {*dict(network.named_parameters()), *dict(network.named_buffers())}
    for moves in action.parameters.values():
        check_action(moves)
    if name == "image to image":
        assert isinstance(action.output, FieldAction) and action.output.shape == (3, 8, 8)
    twin = pickle.loads(pickle.dumps(action))
    assert all(twin.parameters[name].agrees_with(moves) for name, moves in action.parameters.items())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_check_notices_wrong_actions(name):
    """One parameter at a time is left where it is: the error is then far above rounding, unless it does not move."""
    network, x = randomised(NETWORKS[name]()), batch(IMAGE)
    action = network_action(network, field(rotations(), IMAGE))
    for parameter, moves in action.parameters.items():
        still = Action.trivial(action.group, moves.shape)
        asleep = NetworkAction(action.group, action.input, action.output, {**action.parameters, parameter: still},
                               action.layers, action.channels)
        assert moves.agrees_with(still) or intertwining_error(network, asleep, x) > 1e-4, parameter


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("hidden", ["trivial", "regular"])
def test_circular_shifts(flat, hidden):
    network, source = randomised(cnn(flat, "circular")), field(shifts(2, step=4), IMAGE)
    assert intertwining_error(network, network_action(network, source, hidden=hidden), batch(IMAGE)) < exact64
    with pytest.raises(Refusal, match="whole number of outputs"):
        network_action(network, field(shifts(8), IMAGE))
    with pytest.raises(Refusal, match="padding_mode='circular'"):
        network_action(cnn(flat), source)


def test_time_reversal():
    network = randomised(nn.Sequential(nn.Conv1d(2, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.AvgPool1d(2),
                                       nn.Conv1d(8, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)))
    for hidden in ("trivial", "regular"):
        action = network_action(network, field(time_reversal(), (2, 16)), hidden=hidden)
        assert intertwining_error(network, action, batch((2, 16))) < exact64


@pytest.mark.parametrize("name", ["CNN, mean head", "CNN, flat head", "MLP", "residual", "functional"])
def test_unit_permutations_keep_the_function(name):
    network, x = randomised(NETWORKS[name]()), batch(IMAGE)
    action = unit_permutations(network, IMAGE)
    assert intertwining_error(network, action, x) < exact64
    free = [c for c in action.channels if c not in ("input", "output")]
    assert action.group == Product(*(Permutations(action.channels[c].numel) for c in free))
    (g,) = action.group.sample(1, torch.Generator().manual_seed(0))
    moved = action.act(g, dict(network.named_parameters()))
    assert any(not torch.equal(moved[n], p) for n, p in network.named_parameters())


def test_residual_sums_tie_classes():
    action = unit_permutations(Residual(), IMAGE)
    assert list(action.channels) == ["input", "stem", "first", "output"]
    assert action.layers == {"stem": ("input", "stem"), "norm": ("stem", "stem"), "first": ("stem", "first"),
                             "inner": ("first", "first"), "shortcut": ("stem", "stem"), "second": ("first", "stem"),
                             "head": ("stem", "output")}


def test_depthwise_convolutions_tie_what_they_read_and_write():
    network = randomised(nn.Sequential(nn.Conv2d(2, 8, 1), nn.Tanh(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
                                       nn.Flatten(), nn.Linear(288, 3)))
    action = unit_permutations(network, IMAGE)
    assert action.layers["2"] == ("0", "0") and action.group == Product(Permutations(8))
    assert intertwining_error(network, action, batch(IMAGE)) < exact64


def test_a_thousand_units_a_layer():
    wide = nn.Linear(20, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 3)
    network = nn.Sequential(*wide).double()
    action = unit_permutations(network, (20,))
    elements = action.group.sample(2, torch.Generator().manual_seed(0))
    assert intertwining_error(network, action, batch((20,)), elements) < exact64


def test_pixel_permutations_of_a_flat_input():
    network, source = randomised(mlp()), field(rotations(), IMAGE)
    by_pixels = Action(Cyclic(4), IMAGE, source.rule, "the same, not known to be a field")
    first, second = (network_action(network, action) for action in (source, by_pixels))
    assert first.parameters["1.weight"].agrees_with(second.parameters["1.weight"])
    assert intertwining_error(network, second, batch(IMAGE)) < exact64
    flat = nn.Sequential(*list(network)[1:])
    assert intertwining_error(flat, network_action(flat, source.flattened()), batch((128,))) < exact64
    with pytest.raises(Refusal, match="spatial axes"):
        network_action(cnn(True), by_pixels)


@pytest.mark.parametrize("ndim", [2, 3])
def test_vector_fields_turn_with_the_lattice(ndim):
    """Channels are the components of vectors, at both ends: f(rho(g) x) is rho(g) f(x) with the weights moved."""
    conv, space = (nn.Conv2d, nn.Conv3d)[ndim - 2], point_symmetries(ndim)
    vectors = field(space, (ndim,) + (4,) * ndim, natural_action(space.group))
    network = randomised(nn.Sequential(conv(ndim, 4, 3, padding=1), nn.Tanh(), conv(4, ndim, 3, padding=1)))
    action = network_action(network, vectors, output=vectors)
    assert action.output.agrees_with(vectors) and action.group.order == (8, 48)[ndim - 2]
    assert intertwining_error(network, action, batch(vectors.shape)) < exact64
    assert not action.parameters["2.bias"].is_unsigned()  # a bias of vectors has to be zero to be invariant
    with pytest.raises(Refusal, match="which changes signs"):
        network_action(nn.Sequential(nn.ReLU(), network), vectors, output=vectors)


def test_signs_through_odd_activations():
    still, hidden = Action.trivial(Cyclic(2), (4,)), {"0": sign_change(6)}

    def network(activation, *more):
        return randomised(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), activation, *more, nn.Linear(6, 2)))

    for activation in (nn.Tanh(), nn.Softsign(), nn.Tanhshrink(), nn.Hardtanh(-2, 2), nn.Identity(), nn.Dropout()):
        odd = network(activation)
        assert intertwining_error(odd, network_action(odd, still, hidden=hidden), batch((4,))) < exact64
    for activation in (nn.ReLU(), nn.GELU(), nn.Sigmoid(), nn.Hardtanh(0, 1), nn.LayerNorm(6), nn.Softmax(1)):
        with pytest.raises(Refusal, match="which changes signs"):
            network_action(network(activation), still, hidden=hidden)
    for shifted in (lambda x: x + 1, lambda x: torch.relu(x)):
        with pytest.raises(Refusal, match="which changes signs"):
            network_action(network(Call(shifted)), still, hidden=hidden)
    odd = network(Call(lambda x: -torch.tanh(x) / 3))
    assert intertwining_error(odd, network_action(odd, still, hidden=hidden), batch((4,))) < exact64
    conv = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6, 2))
    with pytest.raises(Refusal, match="maximum"):
        network_action(conv, field(SpatialAction.trivial(Cyclic(2), 2), (1, 4, 4)), hidden=hidden)


def test_given_outputs_and_hidden_actions():
    network, source = randomised(cnn(False)), field(rotations(), IMAGE)
    output = Action(Cyclic(4), (5,), lambda g: SignedPermutation.sending([*((i + g) % 4 for i in range(4)), 4]))
    chosen = {"4": regular_channels(Cyclic(4), 4)}
    for hidden in (chosen, lambda name, n: chosen.get(name, Action.trivial(Cyclic(4), (n,)))):
        action = network_action(network, source, hidden=hidden, output=output)
        assert action.output.agrees_with(output) and action.channels["4"] is chosen["4"]
        assert action.channels["0"].agrees_with(Action.trivial(Cyclic(4), (8,)))
        assert intertwining_error(network, action, batch(IMAGE)) < exact64
    channels = Action(Cyclic(4), (3,), lambda g: SignedPermutation([0, 1, 2], [1, (-1) ** g, 1]))
    images = randomised(dense_output())
    action = network_action(images, source, output=field(rotations(), (3, 8, 8), channels))
    assert action.output.channels is channels
    assert intertwining_error(images, action, batch(IMAGE)) < exact64


def test_a_network_that_is_one_layer_and_one_without_weights():
    layer = randomised(nn.Conv2d(2, 3, 3, padding=1))
    action = network_action(layer, field(rotations(), IMAGE))
    assert set(action.parameters) == {"weight", "bias"} and action.layers == {"": ("input", "output")}
    assert intertwining_error(layer, action, batch(IMAGE)) < exact64
    pool = nn.AdaptiveAvgPool2d(1)
    assert intertwining_error(pool, network_action(pool, field(rotations(), IMAGE)), batch(IMAGE)) < exact64


def test_layers_used_twice():
    class Twice(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.stem, self.conv, self.head = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.conv(torch.relu(self.conv(self.stem(x)))).mean((2, 3)))

    network = randomised(Twice(8))
    turns = network_action(network, field(rotations(), IMAGE), hidden="regular")
    for action in (turns, unit_permutations(network, IMAGE)):
        assert intertwining_error(network, action, batch(IMAGE)) < exact64
    assert list(unit_permutations(network, IMAGE).channels) == ["input", "stem", "output"]


def test_layers_used_twice_in_different_ways():
    class Twice(nn.Module):
        def __init__(self, wide):
            super().__init__()
            self.wide, self.layer = wide, nn.Linear(8, 8)

        def forward(self, x):
            if self.wide:
                return self.layer(F.avg_pool2d(x, (4, 2)).flatten(1)) + self.layer(F.avg_pool2d(x, (2, 4)).flatten(1))
            return self.layer(torch.tanh(self.layer(F.avg_pool2d(x, (4, 2)).flatten(1))))

    source = field(flips(), (2, 8, 4))
    with pytest.raises(Refusal, match=r"layer: Linear.*an axis that stays beside one that is moved"):
        network_action(Twice(True), source)
    network = randomised(Twice(False))  # the second call ties what the layer writes to what it reads
    action = network_action(network, source)
    assert action.output.agrees_with(Action.product(Action.trivial(Cyclic(2), (4,)), time_reversal().on(2)).flattened())
    assert intertwining_error(network, action, batch((2, 8, 4))) < exact64


def test_shared_tensors():
    network = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    network[2].weight = network[0].weight
    with pytest.raises(Refusal, match="hidden units to permute"):  # all of them are tied to the input
        unit_permutations(network, (6,))
    randomised(network)
    action = network_action(network, sign_change(6))
    assert action.parameters.keys() == dict(network.named_parameters(remove_duplicate=False)).keys()
    assert action.parameters["2.weight"].agrees_with(action.parameters["0.weight"])
    assert intertwining_error(network, action, batch((6,))) < exact64
    network.insert(0, nn.Linear(6, 6).double())  # now they are tied to a class that is free
    units = unit_permutations(network, (6,))
    assert units.group == Product(Permutations(6)) and intertwining_error(network, units, batch((6,))) < exact64


def test_draw_axes_and_dtypes():
    network = cnn(False)
    action = network_action(network, field(rotations(), IMAGE), hidden="regular")
    draws = {name: torch.randn(3, 2, *p.shape) for name, p in network.named_parameters()}
    for name, moved in action.act(1, draws).items():
        assert moved.shape == draws[name].shape
        assert torch.equal(moved[2, 1], action.parameters[name].act(1, draws[name][2, 1]))
    assert intertwining_error(network, action, batch(IMAGE).float()) < exact32


def test_modes_and_weights_are_left_as_they_were():
    network = randomised(cnn(True)).train()
    network[2].eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    intertwining_error(network, network_action(network, field(rotations(), IMAGE)), batch(IMAGE))
    assert network.training and network[1].training and not network[2].training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_a_nan_is_reported_as_an_error():
    network = randomised(cnn(True))
    network[0].weight.data[0, 0, 0, 0] = torch.nan
    error = intertwining_error(network, network_action(network, field(rotations(), IMAGE)), batch(IMAGE))
    assert not error < exact64


def test_networks_of_variational_layers():
    from symbnn.posterior.layers import with_posteriors
    from symbnn.posterior.sampling import apply_weights, sample_weights

    network = randomised(nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                                       nn.Linear(128, 5)))
    bayesian = with_posteriors(network)
    plain = network_action(network, field(rotations(), IMAGE), hidden="regular")
    action = network_action(bayesian, field(rotations(), IMAGE), hidden="regular")
    assert action.layers == plain.layers and action.parameters.keys() == plain.parameters.keys()
    assert all(moves.agrees_with(plain.parameters[name]) for name, moves in action.parameters.items())
    weights = sample_weights(bayesian, 2, torch.Generator().manual_seed(0))

    def forward(x, tensors):
        return apply_weights(bayesian, x, tensors)

    assert forward(batch(IMAGE), weights).shape == (2, 3, 5)
    assert intertwining_error(bayesian, action, batch(IMAGE), tensors=weights, forward=forward) < exact64
    units = unit_permutations(with_posteriors(randomised(mlp())), IMAGE)
    assert units.group == Product(Permutations(32), Permutations(16))


class WithParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.layer(x) * self.scale


class Unused(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.Tanh())
        self.register_parameter("spare", nn.Parameter(torch.ones(3)))


class TwoInputs(nn.Module):
    def forward(self, x, y):
        return x + y


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Odd(nn.Conv2d):
    """A subclass may compute anything, so it is no convolution."""

    def forward(self, x):
        return super().forward(x.flip(-1))


def time_flips():
    """The other axis is flipped."""
    return SpatialAction(Cyclic(2), 2, lambda g: SignedPermutation([0, 1], [(-1) ** g, 1]), lambda g: (0, 0),
                         "up-down flips")


def on_image(network, space=rotations, size=8, **options):
    return lambda: network_action(network, field(space(), (2, size, size)), **options)


def on_vector(network, **options):
    return lambda: network_action(network, Action.trivial(Cyclic(2), (4,)), **options)


REFUSED = {
    "even kernel, same padding": (on_image(nn.Sequential(nn.ReLU(), nn.Conv2d(2, 1, 4, padding="same"))),
                                  r"'1: Conv2d.*starts 1 .*ends 2 .*kernel_size=5"),
    "stride that does not divide": (on_image(nn.Conv2d(2, 1, 3, 2, 1)), r"an image of 7 or 9 pixels.*divides 7"),
    "pool that does not divide": (on_image(nn.MaxPool2d(2), size=7), r"MaxPool2d.*an image of 6 or 8 pixels"),
    "unequal kernel": (on_image(nn.Conv2d(2, 1, (1, 3), padding=(0, 1))), "exchanges the two axes"),
    "unequal stride": (on_image(nn.Conv2d(2, 1, 1, stride=(1, 7))), "exchanges the two axes"),
    "unequal adaptive pool": (on_image(nn.AdaptiveAvgPool2d((2, 1))), "exchanges the axes"),
    "non-square image": (lambda: network_action(cnn(True), field(rotations(), (2, 8, 6))), "equal length"),
    "linear on a map": (on_image(nn.Linear(8, 2)), "Flatten"),
    "1-D layer on an image": (on_image(nn.Conv1d(2, 1, 3)), r"shapes \(2, 2, 8, 8\).*Expected 2D .unbatched. or 3D"),
    "batch norm of another kind": (on_image(nn.BatchNorm1d(2)), "BatchNorm1d, which raises.*expected 2D or 3D input"),
    "layer norm over rows": (on_image(nn.LayerNorm(8)), r"tears apart.*LayerNorm\(\[2, 8, 8\]\)"),
    "unknown layer": (on_image(nn.ConvTranspose2d(2, 1, 3, 2, 1, 1)), "ConvTranspose2d.*output_padding=0"),
    "unknown operator": (on_image(Call(torch.special.bessel_j0)), "no action is known.*@rule"),
    "subclass": (on_image(Odd(2, 1, 3)), r"flip, which depends on the order along an axis that the group moves"),
    "flatten of the batch": (on_image(nn.Flatten(0)), r"Flatten\(1\)"),
    "mean over one axis": (on_image(Call(lambda x: x.mean(-1))), r"a mean over one axis.*x.mean\(\(-2, -1\)\)"),
    "indices of maxima": (on_image(nn.MaxPool2d(2, return_indices=True)), "positions of maxima"),
    "broadcast sum": (on_image(Call(lambda x: x + F.max_pool2d(x, 2))),
                      r"size of tensor a \(8\) must match the size of tensor b \(4\)"),
    "softmax over pixels": (on_image(nn.Softmax(dim=-1)), "dim=1"),
    "two inputs and one action": (on_image(TwoInputs()),
                                  "missing 1 required positional argument.*one action for each input"),
    "two inputs that move in two ways": (lambda: network_action(
        TwoInputs(), tuple(field(space(), IMAGE) for space in (flips, time_flips))), "features that move in two ways"),
    "branching on data": (on_image(Branching()), "torch.export cannot trace.*an if or a loop"),
    "a parameter that is not used": (on_vector(Unused()), "'spare'"),
    "regular channels that do not divide": (on_image(nn.Sequential(nn.Conv2d(2, 6, 3), nn.Conv2d(6, 1, 3)),
                                                     hidden="regular"), "8 channels in layer '0'"),
    "misspelt hidden": (on_vector(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), hidden="trivia"),
                        "Got: 'trivia'.*Fix: 'trivial'"),
    "hidden class that does not exist": (on_vector(nn.Linear(4, 2), hidden={"9": sign_change(2)}), "'9'"),
    "hidden action of another size": (on_vector(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)),
                                                hidden={"0": sign_change(2)}), r"shape \(3,\)"),
    "output of another size": (on_vector(nn.Linear(4, 2), output=sign_change(3)), r"shape \(2,\)"),
    "output that the head does not have": (on_image(nn.Flatten(), output=Action.trivial(Cyclic(4), (128,))),
                                           "by which the network's output moves"),
    "input that is no action": (lambda: network_action(nn.Linear(3, 1), Action(Cyclic(4), (3,), lambda g: (
        SignedPermutation.sending([(i + g) % 3 for i in range(3)])))), r"rho\(a\) rho\(b\)"),
    "space that is no action": (lambda: network_action(cnn(True), field(SpatialAction(
        Cyclic(3), 2, rotations().point, rotations().shift, "a third of a turn"), IMAGE)), r"rho\(a\) rho\(b\)"),
    "group convolution": (on_image(nn.Sequential(nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 1, groups=2)), hidden="regular"),
                          "channels in pieces of 3, of which none is a multiple of 4"),
    "group convolution of given channels": (on_image(nn.Sequential(nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 1, groups=2)),
                                                     hidden={"0": regular_channels(Cyclic(4), 2)}),
                                            "tears apart the groups"),
    "no hidden units": (lambda: unit_permutations(nn.Linear(4, 2), (4,)), "hidden units"),
    "weights of another network": (lambda: network_action(nn.Linear(4, 2), Action.trivial(Cyclic(2), (4,))).act(
        1, {"0.weight": torch.zeros(2, 4)}), "0.weight"),
}


NOW_KNOWN = {  # what only the operators of a graph tell: layers, functions and parameters of the network's own
    "layer norm over pixels": nn.LayerNorm([8, 8]), "transposed convolution": nn.ConvTranspose2d(2, 1, 3),
    "product of features": Call(lambda x: x * x), "reshape": Call(lambda x: x.view(-1, 128)),
    "two results": Call(lambda x: (x, torch.tanh(x).mean((1, 2, 3)))),
    "a dictionary": Call(lambda x: {"a": [x, -x], "b": x.sum(1)}),
    "groups of a convolution": nn.Sequential(nn.Conv2d(2, 8, 1), nn.Tanh(), nn.Conv2d(8, 8, 3, groups=2),
                                             nn.Conv2d(8, 2, 1)),
}


@pytest.mark.parametrize("hidden", ["trivial", "regular"])
@pytest.mark.parametrize("space", [rotations, flips])
@pytest.mark.parametrize("name", NOW_KNOWN)
def test_what_the_graph_of_operators_tells(name, space, hidden):
    network = randomised(copy.deepcopy(NOW_KNOWN[name]))
    action = network_action(network, field(space(), IMAGE), hidden=hidden)
    assert tree_structure(action.output) == tree_structure(network(batch(IMAGE)))
    assert intertwining_error(network, action, batch(IMAGE)) < exact64
    if name == "groups of a convolution":
        moves = {name for name, its in action.parameters.items() if name in ("0.bias", "2.bias")
                 and not its.agrees_with(Action.trivial(action.group, its.shape))}
        assert moves == ({"0.bias", "2.bias"} if hidden == "regular" else set())


def test_a_reshape_that_cuts_rows():
    network = Call(lambda x: x.view(-1, 64, 2))
    try:
        action = network_action(network, field(rotations(), IMAGE))
    except Refusal:
        return
    assert intertwining_error(network, action, batch(IMAGE)) < exact64


def test_parameters_outside_layers():
    network = randomised(WithParameter())
    for source in (sign_change(4), natural_action(Permutations(4))):
        for output in (None, source):
            action = network_action(network, source, output=output)
            assert intertwining_error(network, action, batch((4,))) < exact64
    assert action.parameters["scale"].agrees_with(source)


@pytest.mark.parametrize("form", [tuple, lambda pair: dict(zip("xy", pair))])
def test_several_inputs(form):
    sources = field(flips(), IMAGE), field(flips(), (2, 1, 8))
    action = network_action(TwoInputs(), form(sources))
    assert action.input == form(sources) and action.output.agrees_with(sources[0])
    assert intertwining_error(TwoInputs(), action, form([batch(its.shape) for its in sources])) < exact64


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    refused, words = REFUSED[name]
    with pytest.raises(Refusal, match=words):
        refused()


def test_groups_of_a_convolution_that_the_group_respects():
    network = randomised(nn.Sequential(nn.Conv2d(2, 8, 1), nn.Tanh(), nn.Conv2d(8, 16, 3, padding=1, groups=4),
                                       nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)))
    action = network_action(network, field(rotations(), IMAGE), hidden="regular")
    assert intertwining_error(network, action, batch(IMAGE)) < exact64
    blocks = natural_action(Permutations(4))
    group = Permutations(4)
    units = {"0": Action.product(blocks, Action.trivial(group, (2,))).flattened(),
             "2": Action.product(blocks, Action.trivial(group, (4,))).flattened()}
    within = {name: Action.product(Action.trivial(Cyclic(n), (4,)), regular_channels(Cyclic(n), m)).flattened()
              for name, n, m in (("0", 2, 1), ("2", 2, 2))}
    swap = field(SpatialAction.trivial(Cyclic(2), 2), IMAGE)
    assert intertwining_error(network, network_action(network, swap, hidden=within), batch(IMAGE)) < exact64
    still = field(SpatialAction.trivial(group, 2), IMAGE)
    assert intertwining_error(network, network_action(network, still, hidden=units), batch(IMAGE)) < exact64


def test_regular_channels_of_a_dihedral_group_by_hand():
    """A first layer with tied regular kernels gives a network that is invariant at fixed weights."""
    network = randomised(nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                       nn.Linear(8, 3)))
    action = network_action(network, field(rotations_and_flips(), (1, 6, 6)), hidden="regular")
    elements = Dihedral(4).elements()
    weights = {name: torch.stack([action.parameters[name].act(g, p.detach()) for g in elements]).mean(0)
               for name, p in network.named_parameters()}
    x = batch((1, 6, 6))
    y = torch.func.functional_call(network, weights, (x,))
    for g in elements:
        assert (torch.func.functional_call(network, weights, (action.input.act(g, x),)) - y).abs().max() < exact64
    assert (network(action.input.act((1, 0), x)) - network(x)).abs().max() > 1e-3


@pytest.mark.parametrize("order", [4, 7])
def test_the_error_is_looked_for_at_every_generator_and_in_a_listed_group_at_every_element(order):
    """An action that is right but for one element; beyond 64 elements, for one generator."""
    layer = randomised(nn.Linear(order, 2))
    right = network_action(layer, natural_action(Permutations(order)))
    x = torch.randn(3, order, dtype=torch.float64)
    assert intertwining_error(layer, right, x) < exact64
    for bad in (right.group.generators() if order > 4 else right.group.elements()[1:]):
        output = Action(right.group, (2,), lambda g, bad=bad: SignedPermutation([g == bad, g != bad], [1, 1]))
        assert intertwining_error(layer, dataclasses.replace(right, output=output), x) > 1e-3


class TwoNames(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2, 3)
        self.second = self.first

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


@pytest.mark.parametrize("tied", [False, True])
def test_ties_have_one_action_and_a_check_leaves_the_network_alone(tied):
    network = randomised(TwoNames())
    if tied:  # by assignment
        network.second = randomised(nn.Conv2d(2, 2, 3, padding=1))
        network.second.weight = network.first.weight
    source, x = field(rotations(), (2, 4, 4)), batch((2, 4, 4))
    action = network_action(network, source)
    modes, state, out = network.training, dict(network.state_dict()), network(x)
    kept = {name: value.clone() for name, value in state.items()}
    assert intertwining_error(network, action, x) < exact64
    assert torch.equal(network(x), out)
    assert all(torch.equal(value, kept[name]) for name, value in network.state_dict().items())
    assert all(isinstance(layer.weight, nn.Parameter) for layer in (network.first, network.second))
    assert network.training == modes
    bayesian = with_posteriors(network)
    again = network_action(bayesian, source)
    assert again.parameters.keys() == action.parameters.keys()
    weights = {name: tensor.posterior.mean[None].detach() for name, tensor in variational_tensors(bayesian).items()}
    known = {name: weights[name] for name in again.parameters if name in weights}
    assert intertwining_error(bayesian, again, x, tensors=known,
                              forward=lambda x, tensors: predict(bayesian, x, weights=tensors)) < exact64
