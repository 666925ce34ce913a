"""Relaxed layers and networks: the mean of paths, sub-sampling, lifting, counts of the source, variational twins."""
import copy
import pickle

import pytest
import torch
from torch import nn

from helpers import normal, seeded
from helpers_layerwise import randomised
from symbnn.errors import Refusal
from symbnn.layerwise.paths import (
    convolution_path,
    dense_path,
    matrix_of,
)
from symbnn.layerwise.relaxed_networks import (
    CHANNELS,
    STRIDES,
    Lift,
    MaximumOfCopies,
    PerCopy,
    Relaxed,
    Subsample,
    path_kinds,
    pathways,
    relaxed_layer,
    relaxed_network,
)
from symbnn.posterior.independent import Laplace
from symbnn.posterior.layers import posterior_mean_network, variational_tensors, with_posteriors
from symbnn.posterior.sampling import apply_weights, forward, mean_weights, sample_weights
from symbnn.symmetry.actions import Action, regular_channels
from symbnn.symmetry.fields import field, rotations, rotations_and_flips, translations
from symbnn.symmetry.orbits import Orbits
from tolerances import assert_close, exact32, exact64

KINDS = ("FC", "CONV", "FC+CONV", "F-FC", "F-FC+CONV", "S-FC", "S-CONV", "S-FC+S-CONV")
LIFTED = ("C4-CONV", "C4-CONV+CONV+F-FC", "D4-CONV+S-FC")
each_kind = pytest.mark.parametrize("kind", KINDS + LIFTED)
double = {"dtype": torch.float64}


def drawn(*shape, dtype=torch.float64):
    """Inputs whose seed is not that of any weights."""
    return normal(*shape, seed=1, dtype=dtype)


def small(kind, seed=0, dtype=torch.float64):
    """Two layers on 8 x 8 pixels, with every weight and bias drawn, so that no zero hides anything."""
    network = relaxed_network(kind, (2, 8, 8), 3, (3, 4), (1, 2), generator=seeded(seed), dtype=dtype)
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter.copy_(0.3 * normal(*parameter.shape, seed=100 + i))
    return network


@pytest.mark.parametrize(
    ("kind", "total"),
    [("FC", 133_635_690), ("CONV", 338_770), ("FC+CONV", 133_865_010), ("F-FC", 1_542_625), ("F-FC+CONV", 1_771_945),
     ("S-FC", 831_820), ("S-CONV", 287_910), ("S-FC+S-CONV", 933_990)],
)
def test_totals_of_the_source(kind, total):
    network = relaxed_network(kind, (3, 32, 32), 10, device="meta")
    assert sum(parameter.numel() for parameter in network.parameters()) == total
    assert network(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)


def test_channels_and_strides_of_the_source():
    assert CHANNELS == tuple(10 * times for times in (1, 2, 2, 4, 4, 8, 8, 16))
    assert STRIDES == (1, 2, 1, 2, 1, 2, 2, 2)


@each_kind
def test_no_convolution_of_a_network_pads(kind):
    convolutions = [module for module in small(kind).modules() if isinstance(module, nn.Conv2d)]
    assert convolutions or kind == "FC"
    for module in convolutions:
        assert (module.padding, module.padding_mode, module.stride) == ((0, 0), "zeros", (1, 1))


def test_bases_are_buffers_of_the_network_s_type():
    for dtype in (torch.float32, torch.float64):
        network = relaxed_network("S-FC+S-CONV", (1, 8, 8), 3, (2, 2), (1, 2), dtype=dtype)
        bases = {name: value for name, value in network.named_buffers()}
        shapes = {name: tuple(value.shape) for name, value in bases.items()}
        assert shapes == {
            "layer1.s_conv.basis": (4, 9), "layer2.s_conv.basis": (4, 9), "layer1.s_fc.basis_in": (32, 64),
            "layer1.s_fc.basis_out": (32, 64), "layer2.s_fc.basis_in": (32, 64), "layer2.s_fc.basis_out": (8, 16)}
        assert {value.dtype for value in bases.values()} == {dtype}
        assert bases.keys() <= network.state_dict().keys()
    alone = relaxed_network("S-CONV", (1, 8, 8), 3, (2,), (1,))
    assert alone.layer1.s_conv.basis.shape == (7, 9)


@pytest.mark.parametrize("kind", ["FC", "CONV"])
def test_dense_and_convolution_start_with_twice_the_variance_over_the_fan_in(kind):
    layer = relaxed_layer(kind, 20, 24, (4, 4), generator=seeded(), **double)
    weight, bias = layer.parameters()
    fan_in = weight[0].numel()
    assert abs(weight.square().mean() * fan_in / 2 - 1) < 4 * (0.8 / weight.numel()) ** 0.5
    assert not bias.any()


def test_the_head_starts_with_the_variance_of_its_activations():
    network = relaxed_network("CONV", (1, 2, 2), 40, (30,), (1,), generator=seeded(), **double)
    for layer, gain in [(network.hidden, 2), (network.head, 1)]:
        weight = layer.weight
        assert abs(weight.square().mean() * weight.shape[1] / gain - 1) < 4 * (0.8 / weight.numel()) ** 0.5
        assert not layer.bias.any()


@each_kind
def test_a_seed_gives_one_network_and_uses_nobody_s_numbers(kind):
    def make(seed):
        return relaxed_network(kind, (1, 4, 4), 3, (2, 3), (1, 2), generator=seeded(seed))

    before = torch.random.get_rng_state()
    first, again, other = make(0), make(0), make(1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    different = [name for (name, a), b in zip(first.named_parameters(), other.parameters()) if not torch.equal(a, b)]
    assert different == [name for name, _ in first.named_parameters() if "bias" not in name]


@pytest.mark.parametrize("kind", ["CONV", "S-CONV", "FC", "F-FC", "S-FC"])
def test_which_paths_commute_with_circular_shifts(kind):
    layer, x = randomised(relaxed_layer(kind, 2, 3, (6, 4), **double)), drawn(3, 2, 6, 4)
    gaps = [(layer(x.roll(shift, (-2, -1))) - layer(x).roll(shift, (-2, -1))).abs().max()
            for shift in [(1, 0), (0, 1), (3, 2)]]
    if kind in ("CONV", "S-CONV"):
        assert max(gaps) < exact64 * layer(x).abs().max().clamp(min=1)
    else:
        assert min(gaps) > 0.1


class Times(nn.Module):
    """x times a number."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        return self.number * x


def test_a_relaxed_layer_is_the_mean_of_its_paths():
    x = drawn(3, 2, 4, 4)
    assert_close(Relaxed({"a": Times(1)}, {})(x), x)
    assert_close(Relaxed({}, {"a": Times(5)})(x), 5 * x)
    assert_close(Relaxed({"a": Times(1)}, {"b": Times(2)})(x), 1.5 * x)
    assert_close(Relaxed({"a": Times(1), "b": Times(2)}, {"c": Times(6)})(x), 3 * x)
    free = Times(6)
    free.forward = lambda x: 6 * x[..., :2, :2]
    sampled = Relaxed({"a": Times(1), "b": Times(-3)}, {"c": free}, Subsample(2))
    assert sampled.paths == ("a", "b", "c")
    assert_close(sampled(x), (Subsample(2)(-2 * x) + 6 * x[..., :2, :2]) / 3)
    for wrong in [({}, {}), ({"a": Times(1)}, {"a": Times(2)})]:
        with pytest.raises(Refusal, match="one or more paths"):
            Relaxed(*wrong)


def test_covariance_of_the_prior():
    """@prp-relaxed-prior, from the derivative of the written-out layer with respect to its weights."""
    size, d_fc, d_conv = (3, 3), 0.7, 2.5
    layer = Relaxed({"conv": convolution_path(1, 2, **double)}, {"fc": dense_path(1, 2, size, size, **double)})
    names = ["conv.filter.weight", "fc.dense.weight"]
    covariance = 0
    for name, precision in zip(names, (d_conv, d_fc)):
        weight = layer.get_parameter(name)
        columns = []
        for i in range(weight.numel()):
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.zero_()
                weight.view(-1)[i] = 1
            columns.append(matrix_of(layer, (1, *size)).detach().flatten())
        E = torch.stack(columns, 1)
        covariance = covariance + E @ E.T / precision
    space = translations(*size)
    orbits = Orbits(Action.product(field(space, (2, *size)), field(space, (1, *size))))
    expanded = orbits.expand(torch.eye(orbits.dimension, **double)).view(orbits.dimension, -1)
    assert_close(covariance, (torch.eye(162, **double) / d_fc + expanded.T @ expanded / d_conv) / 4)
    P = expanded.T @ (expanded / orbits.sizes[:, None])
    away = torch.eye(162, **double) - P
    assert_close((away @ covariance).trace(), (162 - 18) / (4 * d_fc))
    assert_close(covariance.trace(), (162 / d_fc + 18 * 9 / d_conv) / 4)


def test_pathways_names_every_weight_of_the_layers_once():
    for kind in KINDS + LIFTED:
        network = small(kind)
        found = pathways(network)
        assert list(found) == ["layer1", "layer2"]
        for layer, paths in found.items():
            assert set(paths) == {path.lower().replace("-", "_") for path in kind.split("+")}
            for path, names in paths.items():
                assert names == [f"{layer}.{path}.{name}" for name, _ in
                                 network.get_submodule(f"{layer}.{path}").named_parameters()] != []
        listed = [name for paths in found.values() for names in paths.values() for name in names]
        head = {"hidden.weight", "hidden.bias", "head.weight", "head.bias"}
        assert sorted([*listed, *head]) == sorted(name for name, _ in network.named_parameters())
        assert pathways(with_posteriors(network)) == found


def test_pathways_of_one_layer_and_of_none():
    layer = relaxed_layer("S-FC+S-CONV", 1, 1, (4, 4))
    assert pathways(layer) == {"": {"s_conv": ["s_conv.mix.weight", "s_conv.mix.bias"],
                                    "s_fc": ["s_fc.u.weight", "s_fc.u_bias.weight", "s_fc.v.weight"]}}
    other = pathways(relaxed_layer("C4-CONV+CONV", 1, 1, (4, 4)))[""]  # one name is the end of the other
    assert other["conv"] == ["conv.filter.weight", "conv.filter.bias"]
    with pytest.raises(Refusal, match="relaxed layers"):
        pathways(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("stride", [2, 3])
def test_subsample_takes_the_offset_with_the_largest_value(stride):
    x = drawn(60, 2, 6, 12)
    y = Subsample(stride)(x)
    offsets = set()
    for image, found in zip(x, y):
        parts = {(i, j): image[:, i::stride, j::stride] for i in range(stride) for j in range(stride)}
        best = max(parts, key=lambda offset: float(parts[offset].max()))
        assert torch.equal(found, parts[best])
        offsets.add(best)
    assert len(offsets) == stride**2  # every offset was chosen by some image


def test_subsample_of_shifted_images_is_shifted():
    x = drawn(6, 3, 8, 8)
    for shift in [(1, 0), (0, 3), (5, 6)]:
        for before, after in zip(Subsample(2)(x), Subsample(2)(x.roll(shift, (-2, -1)))):
            assert any(torch.equal(after, before.roll((i, j), (-2, -1))) for i in range(4) for j in range(4))


def test_subsample_leaves_and_refuses():
    x = drawn(2, 1, 6, 9)
    assert Subsample(1)(x) is x
    with pytest.raises(Refusal, match=r"multiples of the stride 2. Got: 6 x 9 pixels.*pad\(x, \(0, 1, 0, 0\)\)"):
        Subsample(2)(x)
    assert Subsample(2)(torch.nn.functional.pad(x, (0, 1, 0, 0))).shape == (2, 1, 3, 5)
    with pytest.raises(Refusal, match="as the stride"):
        Subsample(0)


@each_kind
def test_no_example_depends_on_another(kind):
    network, x = small(kind), drawn(6, 2, 8, 8)
    alone = torch.cat([network(image[None]) for image in x])
    assert_close(network(x), alone)
    moved = x.clone()
    moved[1:] *= 100
    assert_close(network(moved)[:1], alone[:1])


@pytest.mark.parametrize("kind", ["CONV", "S-CONV", "C4-CONV", "FC+CONV", "F-FC"])
def test_invariance_of_networks_that_leave_one_pixel(kind):
    network = relaxed_network(kind, (1, 8, 8), 3, (3, 4, 5), (2, 1, 4), generator=seeded(), **double)
    x = drawn(6, 1, 8, 8)
    y = network(x)
    assert y.std() > 1e-3
    gaps = [(network(x.roll(shift, (-2, -1))) - y).abs().max() for shift in [(1, 0), (0, 3), (5, 2)]]
    if kind in ("FC+CONV", "F-FC"):
        assert min(gaps) > 1e-3
    else:
        assert max(gaps) < exact64


@pytest.mark.parametrize("space", [rotations(), rotations_and_flips()], ids=["C4", "D4"])
def test_lifting_makes_a_permutation_of_copies(space):
    action, order = field(space, (2, 5, 5)), space.group.order
    lift, x = Lift(action), drawn(3, 2, 5, 5)
    shared = randomised(PerCopy(convolution_path(2, 3, **double), order))
    mixing = randomised(convolution_path(2 * order, 3 * order, **double))
    before, after = regular_channels(space.group, 2), regular_channels(space.group, 3)
    y = shared(lift(x))
    assert torch.equal(lift(x)[:, :2], x)  # the copy of the identity
    for g in space.group.elements():
        turned = lift(action.act(g, x))
        assert torch.equal(turned, before(g)(lift(x), 1))
        assert_close(shared(turned), after(g)(y, 1))
        assert_close(MaximumOfCopies(order)(shared(turned)), MaximumOfCopies(order)(y))
        if g != space.group.identity():
            assert (mixing(turned) - after(g)(mixing(lift(x)), 1)).abs().max() > 0.1


@pytest.mark.parametrize(("kind", "space"), [("C4-CONV", rotations()), ("D4-CONV", rotations_and_flips())])
def test_networks_of_shared_convolutions_are_invariant(kind, space):
    x = drawn(4, 2, 8, 8)
    action = field(space, (2, 8, 8))
    for paths, invariant in [(kind, True), (f"{kind}+CONV", False), (f"{kind}+F-FC", False)]:
        network = small(paths)
        gaps = [(network(action.act(g, x)) - network(x)).abs().max() for g in space.group.generators()]
        if invariant:
            assert max(gaps) < 100 * exact64
        else:
            assert min(gaps) > 0.01


def test_three_paths_after_lifting():
    layer = relaxed_layer("C4-CONV+CONV+F-FC", 2, 3, (4, 4), 2, **double)
    assert layer.c4_conv.inner.filter.weight.shape == (3, 2, 3, 3)
    assert layer.conv.filter.weight.shape == (12, 8, 3, 3)
    assert layer.f_fc.channels == (12, 8)
    layer = randomised(layer)
    x = drawn(3, 8, 4, 4)
    total = torch.cat([layer.c4_conv.inner(x[:, 2 * i: 2 * i + 2]) for i in range(4)], 1) + layer.conv(x)
    sampled = torch.cat([Subsample(2)(total[:, 3 * i: 3 * i + 3]) for i in range(4)], 1)  # each copy by itself
    assert_close(layer(x), (sampled + layer.f_fc(x)) / 3)


def test_lifted_networks_are_copied_and_pickled():
    network, x = small("C4-CONV+CONV+F-FC"), drawn(2, 2, 8, 8)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(x), network(x))


def test_network_by_hand():
    network, x = small("F-FC+CONV"), drawn(5, 2, 8, 8)
    h = x
    for layer, stride in ((network.layer1, 1), (network.layer2, 2)):
        h = ((layer.f_fc(h) + Subsample(stride)(layer.conv(h))) / 2).relu()
    h = h.mean((-2, -1))
    assert network.hidden.weight.shape == (16, 4)
    assert_close(network(x), network.head(network.hidden(h).relu()))


@each_kind
def test_every_weight_is_used(kind):
    network = small(kind)
    network(drawn(16, 2, 8, 8)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@each_kind
def test_types_and_states(kind):
    network = small(kind, dtype=torch.float32)
    other = relaxed_network(kind, (2, 8, 8), 3, (3, 4), (1, 2))
    other.load_state_dict(network.state_dict())
    x = drawn(4, 2, 8, 8, dtype=torch.float32)
    assert network(x).dtype == torch.float32
    assert torch.equal(other(x), network(x))
    assert_close(network(x), small(kind)(x.double()), exact32)


SOUND = {"input_shape": (1, 8, 8), "classes": 3, "channels": (2, 2), "strides": (1, 2)}


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [("fc", {}, "Fix: 'FC'"), ("", {}, "one of FC"), ("FC+", {}, "one of FC"), ("FC+FC", {}, "Fix: 'FC'"),
     (None, {}, "kind of a relaxed network"), ("C4-CONV+FC+D4-CONV", {}, r"Fix: 'C4-CONV\+FC'"),
     ("FC", {"strides": (1,)}, r"strides=\(1, 1\)"), ("FC", {"strides": (1, 3)}, "multiples of the stride 3"),
     ("CONV", {"input_shape": (8, 8)}, "channels, height, width"), ("CONV", {"input_shape": 8}, "shape of one input"),
     ("CONV", {"channels": (), "strides": ()}, r"channels=\(8, 16\)"), ("CONV", {"classes": 2.5}, "number of classes"),
     ("S-FC", {"strides": (4, 4)}, "multiples of the stride 4")],
    ids=str,
)
def test_refusals(kind, options, words):
    relaxed_network("FC", **SOUND)
    with pytest.raises(Refusal, match=words):
        relaxed_network(kind, **SOUND | options)


@pytest.mark.parametrize(("kind", "options"), [("FC", {}), ("C4-CONV+FC", {}), ("FC", {"strides": (1, 1)}),
                                               ("FC", {"channels": (8, 16)})])
def test_advised_networks_are_built(kind, options):
    assert relaxed_network(kind, **SOUND | options)(drawn(2, 1, 8, 8, dtype=torch.float32)).shape == (2, 3)


def test_layers_of_other_kinds_are_refused():
    with pytest.raises(Refusal, match=r"field\(rotations\(\), \(1, 28, 28\)\)"):
        Lift(rotations())
    with pytest.raises(Refusal, match="the paths"):
        Relaxed([Times(1)], {})
    with pytest.raises(Refusal, match="relaxed_network"):
        pathways("FC+CONV")


def test_kinds():
    assert path_kinds("C4-CONV+CONV+F-FC") == ("C4-CONV", "CONV", "F-FC")


@each_kind
def test_variational_twins(kind):
    network, x = small(kind), drawn(5, 2, 8, 8)
    bayesian = with_posteriors(network, scale=0.1)
    assert list(variational_tensors(bayesian)) == [name for name, _ in network.named_parameters()]
    assert_close(apply_weights(bayesian, x, mean_weights(bayesian)), network(x)[None])
    assert torch.equal(posterior_mean_network(bayesian)(x), network(x))
    weights = sample_weights(bayesian, 3, seeded(2))
    together = apply_weights(bayesian, x, weights)
    assert together.shape == (3, 5, 3)
    plain = copy.deepcopy(network)
    for s in range(3):  # each draw, by itself, in the plain network
        plain.load_state_dict({name: weight[s] for name, weight in weights.items()}, strict=False)
        assert_close(together[s], plain(x))
    assert (together[0] - together[1]).abs().max() > 1e-3


@each_kind
@pytest.mark.parametrize(("estimator", "draws"), [("whole", 3), ("split", 1), ("flipout", 3), ("local", 1)])
def test_estimators_agree_with_the_plain_network_as_scales_vanish(kind, estimator, draws):
    network, x = small(kind), drawn(5, 2, 8, 8)
    outputs = forward(with_posteriors(network, scale=1e-30), x, 3, estimator, seeded(3))
    assert outputs.shape == (draws, 5, 3)
    assert_close(outputs, network(x).expand(draws, 5, 3), 10 * exact64)


def test_twins_of_another_family_train():
    network = with_posteriors(small("F-FC+CONV"), Laplace, 0.1)
    forward(network, drawn(4, 2, 8, 8), 2, "split", seeded()).square().sum().backward()
    assert all(parameter.grad.any() for parameter in network.parameters())
