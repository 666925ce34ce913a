"""Expansions of networks that are no chain of layers: groups, concatenation, parameters outside layers, shared ones."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers import normal, seeded
from helpers_symmetry import randomised
from symbnn.equivariance.copies import graph_for, plan_copies
from symbnn.equivariance.expansion import expand, expanded_action
from symbnn.errors import Refusal
from symbnn.posterior.layers import posterior_mean_network, variational_tensors, with_posteriors
from symbnn.posterior.priors import random_means
from symbnn.posterior.sampling import apply_weights, mean_weights, predict, sample_weights
from symbnn.symmetry.actions import Action, natural_action
from symbnn.symmetry.fields import field, flips, rotations, rotations_and_flips
from symbnn.symmetry.groups import Permutations
from symbnn.symmetry.networks import intertwining_error, network_action
from tolerances import assert_close, exact64

INVARIANT = ("block_diagonal", "regular")


def head(read, *layers):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(read, 3))


class Sum(nn.Module):
    """A residual block."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return torch.relu(x + self.layers(x))


def grouped():
    return head(6, nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.ReLU())


def separable():
    """Depthwise and pointwise convolutions with batch norms, as in MobileNet, the depthwise one with two a channel."""
    return head(3, nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.BatchNorm2d(6),
                nn.ReLU6(), nn.Conv2d(6, 3, 1), nn.BatchNorm2d(3), nn.ReLU())


def group_normed():
    """A residual network whose norms have one group, two, and one a channel, none with gains."""
    block = Sum(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1),
                nn.GroupNorm(4, 4, affine=False))
    return head(4, nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(1, 4), block)


class Dense(nn.Module):
    """Layers that read all before them side by side, the input too, and a flattened head."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(5)
        self.second, self.head = nn.Conv2d(5, 2, 3, padding=1), nn.Linear(7 * 16, 3)

    def forward(self, x):
        y = torch.cat([x, torch.tanh(self.first(x))], 1)
        y = torch.cat([y, torch.tanh(self.second(self.norm(y)))], 1)
        return self.head(y.flatten(1))


class Scaled(nn.Module):
    """The block of ConvNeXt with a layer scale; its norm is over the channels, or a batch norm."""

    def __init__(self, norm):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(2, 4, 2, stride=2), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm = norm(4)
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.gamma, self.head = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        if isinstance(self.norm, nn.LayerNorm):
            y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        else:
            y = self.norm(self.depthwise(x)).permute(0, 2, 3, 1)
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return self.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


class Vision(nn.Module):
    """A vision transformer: class token, position embedding that the group moves, heads, a linear layer at the end.

    With torch's own attention and no norm nothing takes copies together."""

    def __init__(self, own=False):
        super().__init__()
        self.own, self.patches = own, nn.Conv2d(2, 4, 2, stride=2)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, 4)), nn.Parameter(torch.zeros(1, 5, 4))
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4) if own else nn.Identity()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        if own:
            del self.attention
        else:
            del self.qkv, self.out
        self.head = nn.Linear(4, 3)

    def attend(self, x):
        if not self.own:
            return self.attention(x, x, x, need_weights=False)[0]
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head((x + self.attend(self.norm(x)))[:, 0])


class Shuffled(nn.Module):
    """Groups that `forward` states, between two grouped convolutions."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1, groups=2)
        self.second, self.head = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.first(torch.relu(self.stem(x))))
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.head(torch.relu(self.second(x)).mean((-2, -1)))


class Bare(nn.Module):
    """All weights are parameters of the network itself, in products of several kinds."""

    def __init__(self):
        super().__init__()
        self.first, self.shift = nn.Parameter(torch.zeros(5, 32)), nn.Parameter(torch.zeros(5))
        self.inner, self.last = nn.Parameter(torch.zeros(5, 6)), nn.Parameter(torch.zeros(6, 3))

    def forward(self, x):
        y = torch.tanh(x.flatten(1) @ self.first.t() + self.shift)
        return torch.einsum("bi,io->bo", torch.tanh(y @ self.inner), self.last)


def both_ways():
    """A transposed convolution in groups, an instance norm, and a gain for each channel of an activation."""
    return head(4, nn.Conv2d(2, 4, 3, padding=1), nn.PReLU(4), nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2),
                nn.InstanceNorm2d(4, affine=True), nn.ReLU())


def shared():
    """One weight in two layers, one layer twice."""
    inner = nn.Conv2d(3, 3, 3, padding=1)
    network = head(3, nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), inner, nn.Tanh(), nn.Conv2d(3, 3, 3, padding=1),
                   nn.Tanh(), inner, nn.Tanh())
    network[4].weight = inner.weight
    return network


def bilinear():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.inner = nn.Linear(32, 3), nn.Linear(32, 4), nn.Bilinear(3, 4, 5)
            self.head = nn.Bilinear(5, 3, 2)

        def forward(self, x):
            a, b = torch.tanh(self.a(x.flatten(1))), torch.tanh(self.b(x.flatten(1)))
            return self.head(torch.tanh(self.inner(a, b)), a)

    return Pair()


class Factors(nn.Module):
    """Weights that are multiplied with each other before they meet a feature, as in adapters of low rank."""

    def __init__(self):
        super().__init__()
        shapes = ((5, 32), (4, 5), (6, 4), (3, 6))
        self.a, self.b, self.c, self.d = (nn.Parameter(torch.zeros(*shape)) for shape in shapes)

    def forward(self, x):
        hidden = torch.tanh(F.linear(x.flatten(1), self.a))
        return torch.tanh(torch.einsum("br,hr,oh->bo", hidden, self.b, self.c)) @ self.d.T + F.linear(
            hidden, self.d @ self.c @ self.b)


AVERAGES = {"grouped": grouped, "separable": separable, "group norms": group_normed, "concatenation": Dense,
            "layer scale": lambda: Scaled(nn.BatchNorm2d), "position embedding": Vision, "no layers": Bare,
            "transposed, instance norm": both_ways, "shared": shared, "bilinear": bilinear, "shuffled": Shuffled,
            "products of weights": Factors}
TOGETHER = {"ConvNeXt": lambda: Scaled(nn.LayerNorm), "ViT": lambda: Vision(own=True)}
NETWORKS = AVERAGES | TOGETHER
SPACES = {"C4": rotations, "D4": rotations_and_flips}


def pair(name, space="C4"):
    torch.manual_seed(0)
    network = randomised(NETWORKS[name]()).eval()
    return network, network_action(network, field(SPACES[space](), (2, 4, 4)))


@torch.no_grad()
def orbit(network, action, x):
    """Outputs at every turned input, turned back."""
    inverse = action.group.inverse
    return torch.stack([action.output.act(g, network(action.input.act(inverse(g), x)))
                        for g in action.group.elements()])


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", NETWORKS)
def test_equivariant_and_the_orbit_average(name, space):
    network, action = pair(name, space)
    x = normal(3, 2, 4, 4, seed=1)
    small = orbit(network, action, x)
    assert (small - small[0]).abs().max() > 1e-4
    for arrangement in INVARIANT:
        wide, acting = expand(network, action, arrangement)
        outputs = orbit(wide, action, x)
        assert_close(outputs, outputs[:1].expand_as(outputs))
        assert intertwining_error(wide, acting, x) < exact64
        again = expanded_action(wide, action)
        assert all(rule.agrees_with(again.parameters[key]) for key, rule in acting.parameters.items())
        if arrangement == "block_diagonal":
            away = (outputs[0] - small.mean(0)).abs().max()
            assert away < exact64 if name in AVERAGES else away > 1e-5
    assert {key: p.shape for key, p in network.named_parameters()} == {
        key: p.shape for key, p in pair(name, space)[0].named_parameters()}


@torch.no_grad()
def drawn(network, weights, k):
    """The plain network with one draw of all weights; `functional_call` mixes draws up where layers are shared."""
    network = copy.deepcopy(network)
    for key, drawn in weights.items():
        network.get_parameter(key).copy_(drawn[k])
    return network


@pytest.mark.parametrize("arrangement", INVARIANT)
@pytest.mark.parametrize("name", NETWORKS)
def test_posteriors_are_invariant_and_draws_are_those_of_the_plain_network(name, arrangement):
    network, action = pair(name)
    bayesian = with_posteriors(network, prior=random_means(0), only=lambda name, parameter: True)
    for tensor in variational_tensors(bayesian).values():
        nn.init.normal_(tensor.posterior.log_scale, -2.0, generator=seeded(3))
    wide, acting = expand(bayesian, action, arrangement)
    plain, x = expand(network, action, arrangement).network, normal(3, 2, 4, 4, seed=1)
    for key, tensor in variational_tensors(wide).items():
        assert tensor.shape == plain.get_parameter(key).shape
        for law in (tensor.posterior, tensor.prior):
            for g in action.group.generators():
                pushed = law.push_forward(acting.parameters[key](g))
                assert_close(pushed.mean, law.mean)
                assert_close(pushed.scale, law.scale)
    assert_close(apply_weights(wide, x, mean_weights(wide))[0], plain(x))
    assert_close(posterior_mean_network(wide)(x), plain(x))
    weights = sample_weights(wide, 2, seeded(4))
    assert_close(predict(wide, x, weights=weights), torch.stack([drawn(plain, weights, k)(x) for k in (0, 1)]))
    error = intertwining_error(wide, acting, x, tensors=weights, forward=lambda x, w: apply_weights(wide, x, w))
    assert error < exact64


def test_scales_follow_what_is_summed_over():
    """A sum over copies divides scales by sqrt|G|, whatever holds the weight; groups and embeddings sum over none."""
    for name, factors in {"grouped": {"0.weight": 1, "2.weight": 1, "6.weight": 0.5},
                          "concatenation": {"first.weight": 1, "head.weight": 0.5, "norm.weight": 1},
                          "position embedding": {"positions": 1, "token": 1, "head.weight": 0.5,
                                                 "attention.in_proj_weight": 0.5},
                          "no layers": {"first": 1, "shift": 1, "inner": 0.5, "last": 0.5},
                          "bilinear": {"a.weight": 1, "inner.weight": 0.25, "head.weight": 0.25}}.items():
        network, action = pair(name)
        bayesian = with_posteriors(network, scale=0.3, only=lambda name, parameter: True)
        for arrangement in INVARIANT:
            wide = variational_tensors(expand(bayesian, action, arrangement).network)
            for key, factor in factors.items():
                scales = wide[key].posterior.scale
                if (name, key) == ("concatenation", "head.weight"):  # columns of the input have no copies
                    assert_close(scales[:, :32], torch.full((3, 32), 0.3, dtype=torch.float64))
                    scales = scales[:, 32:]
                assert_close(scales, torch.full(scales.shape, 0.3 * factor, dtype=torch.float64))


def test_layers_state_their_new_widths():
    wide = expand(*pair("separable")).network
    assert (wide[1].in_channels, wide[1].out_channels, wide[1].groups) == (12, 24, 12)
    wide = expand(*pair("group norms")).network
    assert (wide[1].num_groups, wide[1].num_channels) == (4, 16)
    assert (wide[2].layers[1].num_groups, wide[2].layers[4].num_channels) == (8, 16)
    wide = expand(*pair("position embedding")).network
    assert wide.positions.shape == (1, 5, 16) and (wide.attention.num_heads, wide.attention.head_dim) == (8, 2)
    wide = expand(*pair("ConvNeXt")).network
    assert wide.norm.normalized_shape == (16,) and wide.gamma.shape == (16,)
    wide = expand(*pair("concatenation")).network
    assert wide.second.in_channels == 14 and wide.norm.num_features == 14  # two channels of the input stay


def test_shared_tensors_stay_shared():
    for network in (pair("shared")[0], with_posteriors(pair("shared")[0])):
        wide = expand(network, pair("shared")[1]).network
        assert tuple(wide[2].weight.shape) == (12, 12, 3, 3)
        assert wide[2].weight is wide[4].weight and wide[2] is wide[6] and wide[2].bias is not wide[4].bias


def test_embeddings_are_turned_copies():
    network, action = pair("position embedding")
    wide = expand(network, action).network
    for k, g in enumerate(action.group.elements()):
        assert_close(wide.positions[..., 4 * k:4 * k + 4], action.parameters["positions"].act(g, network.positions))
    assert not torch.equal(wide.positions[..., :4], wide.positions[..., 4:8])


def test_columns_behind_a_concatenation():
    network, action = pair("concatenation")
    _, copies = plan_copies(network, graph_for(network, action), action)
    read = copies.axes["second.weight"][1]
    assert read.labels.tolist() == [-1, -1, *(k for k in range(4) for _ in range(3))] and read.summed
    assert read.places.tolist() == [0, 1, *[2, 3, 4] * 4]
    written = copies.axes["second.weight"][0]
    assert written.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and not written.summed


def test_row_rolled():
    """Groups leave the depth as it is; a concatenation of two depths has none."""
    network, action = pair("separable")
    outputs = orbit(expand(network, action, "row_rolled").network, action, normal(3, 2, 4, 4))
    assert_close(outputs, outputs[:1].expand_as(outputs))
    network, action = pair("grouped")
    deep = nn.Sequential(*network[:2], nn.Conv2d(4, 4, 3, padding=1).double(), nn.ReLU(), *network[2:])
    with pytest.raises(Refusal, match=r"common factor with 4.*'4.weight' at depth 2"):
        expand(deep, network_action(deep, action.input), "row_rolled")
    with pytest.raises(Refusal, match=r"paths of one length.*'inner'|copies along two axes|copies along 3"):
        expand(*pair("bilinear"), "row_rolled")


class Through(nn.Module):
    """A network with one thing in it that has no expansion."""

    def __init__(self, what):
        super().__init__()
        self.what, self.first, self.last = what, nn.Linear(8, 4), nn.Linear(4, 3)
        if what == "input embedding":
            self.positions = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        x = x + self.positions if self.what == "input embedding" else x
        y = torch.relu(self.first(x))
        if self.what == "decoder":
            y = torch.relu(torch.relu(y @ self.first.weight) @ self.first.weight.t())
        if self.what == "outer":
            return self.last(y.sum(-1, keepdim=True) * y)
        if self.what == "width":
            y = y.view(-1, 4)
        return self.last(y)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = nn.Linear(8, 2), nn.Linear(8, 3), nn.Linear(6, 3)

    def forward(self, x):
        return self.last((torch.tanh(self.a(x))[:, :, None] * torch.tanh(self.b(x))[:, None]).flatten(1))


REFUSALS = {
    "input embedding": (lambda: Through("input embedding"), "'positions', which the group moves"),
    "decoder": (lambda: Through("decoder"), "layer 'first' from input|'first.weight', which makes hidden channels"),
    "width": (lambda: Through("width"), "that runs with copies.*in forward, x.flatten"),
    "outer product": (Outer, "layer 'a' from input to a.*products of all channels of two layers"),
    "parametrised": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)), nn.Linear(4, 2)),
                     r"remove_parametrizations\(network.get_submodule\('0'\), 'weight'\)"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    make, words = REFUSALS[name]
    network, sides = make(), natural_action(Permutations(2))
    action = network_action(network, Action.product(sides, Action.trivial(sides.group, (4,))).flattened())
    with pytest.raises(Refusal, match=words):
        expand(network, action)


def test_parametrisations_are_refused_with_what_can_be_typed():
    network, action = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 4)), nn.Linear(4, 2)), flips()
    with pytest.raises(Refusal) as refused:
        expand(network, network_action(network, natural_action(Permutations(2))))
    eval(refused.value.fix, {"torch": torch, "network": network})
    assert action and expand(network, network_action(network, natural_action(Permutations(2)))).network
