"""Architectures as values, initialisation, exact turns, and the count of multiply-adds."""

import json
import re
import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from helpers import seeded
from helpers_data import typed
from symbnn.equivariance.arrangements import ARRANGEMENT
from symbnn.equivariance.expansion import expand
from symbnn.errors import Refusal
from symbnn.layerwise.relaxed_networks import relaxed_network
from symbnn.posterior.layers import with_posteriors
from symbnn.posterior.sampling import apply_weights, mean_weights
from symbnn.symmetry.fields import field, rotations, rotations_and_flips
from symbnn.symmetry.networks import intertwining_error, network_action
from symbnn.training.architectures import PRESETS, Architecture, build, multiply_adds, weight_count
from tolerances import assert_close, exact64

each_preset = pytest.mark.parametrize("name", PRESETS)


@each_preset
def test_shapes_and_round_trip(name):
    architecture = PRESETS[name]
    again = Architecture(**json.loads(json.dumps(architecture.as_dict())))
    assert again == architecture
    assert hash(again) == hash(architecture)
    network, x = build(again, seeded()), torch.zeros(3, *architecture.input_shape)
    assert network(x).shape == (3, architecture.classes)
    assert apply_weights(with_posteriors(network), x, mean_weights(with_posteriors(network))).shape == (1, 3, 10)


@given(
    blocks=st.lists(st.integers(1, 5), min_size=1, max_size=3), size=st.integers(1, 24), classes=st.integers(1, 4)
)
def test_odd_sizes_are_refused_and_even_ones_built(blocks, size, classes):
    def make():
        return Architecture("cnn", (1, size, size), classes, tuple(blocks))

    if size % 2 ** len(blocks):
        with pytest.raises(Refusal, match="before pooling"):
            make()
    else:
        assert build(make())(torch.zeros(2, 1, size, size)).shape == (2, classes)


@pytest.mark.parametrize("size", [2**31, 10**30, pytest.param(10**5000, id="endless")])
@pytest.mark.parametrize("change", ["input_shape", "classes", "channels", "strides"])
def test_sizes_beyond_counting_are_refused(change, size):
    values = {"input_shape": (1, 8, 8), "classes": 2, "channels": (8, 8), "strides": (1, 2)}
    values[change] = size if change == "classes" else (1, size, size)
    with pytest.raises(Refusal, match=f"positive whole numbers up to 2147483647.*{change}="):
        Architecture("FC+CONV", **values)


@pytest.mark.parametrize("name", ["mlp", "cnn", "FC+CONV", "S-FC+CONV"])
@pytest.mark.parametrize("width", [10**6, 2**31 - 1])
def test_networks_that_no_memory_holds_are_refused_before_they_are_built(name, width):
    started = time.perf_counter()
    with pytest.raises(Refusal, match=r"a network of at most.*layers too wide"):
        build(Architecture(name, (1, 8, 8), 10, (width, width)))
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("name", ["small", "digits"])
@pytest.mark.parametrize("space", [rotations(), rotations_and_flips()], ids=["C4", "D4"])
def test_turns_are_exact(name, space):
    architecture = PRESETS[name]
    network = build(architecture, seeded(), torch.float64)
    images = torch.randn(2, *architecture.input_shape, generator=seeded(1), dtype=torch.float64)
    action = network_action(network, field(space, architecture.input_shape))
    assert intertwining_error(network, action, images) < exact64


def test_pooling_before_relu_is_the_source_s_network():
    architecture = PRESETS["digits"]
    network = build(architecture, seeded(), torch.float64)
    conv1, pool, relu, conv2, _, _, mean, flat, head = network
    late = nn.Sequential(conv1, relu, pool, conv2, relu, pool, mean, flat, head)
    x = torch.randn(4, 1, 8, 8, generator=seeded(1), dtype=torch.float64)
    assert torch.equal(network(x), late(x))


def test_expanded_is_the_same_network_with_more_channels():
    small = PRESETS["small"]
    assert small.expanded(4) == Architecture("cnn", (1, 28, 28), 10, (128, 256))
    network = build(small, seeded(), torch.float64)
    expanded = expand(network, network_action(network, field(rotations(), (1, 28, 28)))).network
    fresh = build(small.expanded(4), dtype=torch.float64)
    assert [type(layer) for layer in fresh] == [type(layer) for layer in expanded]
    left = fresh.load_state_dict(expanded.state_dict(), strict=False)  # without the marks of how it was expanded
    assert not left.missing_keys and all(name.endswith(ARRANGEMENT) for name in left.unexpected_keys)
    x = torch.randn(2, 1, 28, 28, generator=seeded(1), dtype=torch.float64)
    assert torch.equal(fresh(x), expanded(x))


def test_initialisation_keeps_the_variance_and_nobody_s_random_numbers():
    before = torch.random.get_rng_state()
    network = build(Architecture("mlp", (1, 16, 16), 300, (400, 500)), seeded())
    assert torch.equal(torch.random.get_rng_state(), before)
    for layer, gain in [(network[1], 2), (network[3], 2), (network[5], 1)]:
        wanted = gain / layer.weight.shape[1]
        relative = (layer.weight.var() / wanted - 1).abs().item()
        assert relative < 4 * (2 / layer.weight.numel()) ** 0.5  # four standard errors of a Gaussian sample variance
        assert not layer.bias.any()
    again = build(Architecture("mlp", (1, 16, 16), 300, (400, 500)), seeded())
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters()))


@each_preset
def test_multiply_adds_and_weights(name):
    architecture = PRESETS[name]
    network, macs, count = build(architecture), 0, 0
    if architecture.name == "mlp":
        widths = [64, *architecture.channels, architecture.classes]
        macs = sum(a * b for a, b in pairwise(widths))
        count = macs + sum(widths[1:])
    else:
        size, before = architecture.input_shape[1], 1
        for channels in architecture.channels:
            macs, count = macs + 9 * before * channels * size**2, count + 9 * before * channels + channels
            size, before = size // 2, channels
        macs, count = macs + before * 10, count + before * 10 + 10
    for each in (network, with_posteriors(network)):
        assert multiply_adds(each, architecture.input_shape) == macs
        assert weight_count(each) == count


def test_dtype():
    network = build(PRESETS["digits"], seeded(), torch.float64)
    assert_close(network[0].weight, build(PRESETS["digits"], seeded(), torch.float64)[0].weight)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float64}


@pytest.mark.parametrize("kind", ["FC", "S-FC+S-CONV", "C4-CONV+CONV+F-FC"])
def test_a_relaxed_network_is_named_by_its_paths(kind):
    shape, channels, strides = (1, 12, 12), (2, 4, 4, 6), (1, 2, 2, 1)  # 3 pixels are left, which two does not divide
    architecture = Architecture(kind, shape, 3, channels)
    assert architecture.strides == strides
    again = Architecture(**json.loads(json.dumps(architecture.as_dict())))
    assert again == architecture
    assert hash(again) == hash(architecture)
    x = torch.randn(2, *shape, generator=seeded(1), dtype=torch.float64)
    network = build(architecture, seeded(), torch.float64)
    expected = relaxed_network(kind, shape, 3, channels, strides, generator=seeded(), dtype=torch.float64)
    assert torch.equal(network(x), expected(x))
    assert architecture.expanded(2) == Architecture(kind, shape, 3, (4, 8, 8, 12), strides)
    assert multiply_adds(network, shape) == multiply_adds(with_posteriors(network), shape) > weight_count(network) / 2
    one_pixel = build(Architecture(kind, shape, 3, (2, 4), (3, 4)), dtype=torch.float64)
    assert one_pixel[: list(dict(one_pixel.named_children())).index("mean")](x).shape[-2:] == (1, 1)


def test_what_was_written_before_there_were_strides_is_the_same():
    assert PRESETS["small"].as_dict() == {
        "name": "cnn", "input_shape": (1, 28, 28), "classes": 10, "channels": (32, 64)}


RELAXED = {"name": "FC+CONV", "input_shape": (1, 8, 8), "classes": 3, "channels": (2, 4), "strides": ()}
POOLED = {"name": "cnn", "input_shape": (1, 28, 28), "classes": 10, "channels": (32, 64), "strides": ()}


@pytest.mark.parametrize("base, change, said", [
    (RELAXED, {"strides": (1,)}, r"one stride for each of the 2 entries of channels"),
    (RELAXED, {"strides": (1, 3)}, r"8 x 8 pixels and strides=\(1, 3\)"),
    (RELAXED, {"strides": (1, 2, 2)}, r"strides=\(1, 2, 2\) for channels=\(2, 4\)"),
    (RELAXED, {"strides": (1, 2.0)}, "of its type as strides"),
    (RELAXED, {"name": "FC+FC"}, "paths of a relaxed network"),
    (RELAXED, {"name": "FC+"}, r"'FC\+'"), (RELAXED, {"input_shape": (8, 8)}, "without a channel axis"),
    (RELAXED, {"channels": ()}, "at least one entry of channels"),
    (RELAXED, {"name": "cnn", "strides": (1, 2)}, "no strides for 'cnn'"),
    (RELAXED, {"name": "mlp", "strides": (1, 2)}, "no strides for 'mlp'"),
    (POOLED, {"name": "resnet"}, "'resnet'.*needs no Architecture"), (POOLED, {"classes": 0}, "classes=0"),
    (POOLED, {"channels": (8, 0)}, "positive whole numbers"), (POOLED, {"channels": ()}, "at least one convolution"),
    (POOLED, {"input_shape": (28, 28)}, "without a channel axis"), (POOLED, {"input_shape": ()}, "a shape left empty"),
    (POOLED, {"classes": 2.5}, "classes=2.5"), (POOLED, {"channels": (8, 8, 8)}, "7 x 7 before pooling 3 of 3"),
], ids=str)
def test_refusals(base, change, said):
    with pytest.raises(Refusal, match=said):
        Architecture(**base | change)


@pytest.mark.parametrize("base, change", [
    (RELAXED, {"strides": (1,)}), (RELAXED, {"strides": (1, 3)}), (RELAXED, {"input_shape": (8, 8)}),
    (RELAXED, {"channels": ()}), (POOLED, {"name": "resnet"}), (POOLED, {"channels": ()}),
    (POOLED, {"input_shape": (28, 28)}),
], ids=str)
def test_the_advice_on_settings_works(base, change):
    with pytest.raises(Refusal) as caught:
        Architecture(**base | change)
    advice = re.match(r"(\w+=(?:\([^)]*\)|\S+))", caught.value.fix)[1]
    Architecture(**base | change | typed(f"dict({advice})"))


def test_the_advice_on_sizes_and_strides_works():
    with pytest.raises(Refusal, match=r"padded to 32 x 32 pixels, or channels=\(8, 8\)"):
        Architecture("cnn", (1, 28, 28), 10, (8, 8, 8))
    assert Architecture("cnn", (1, 32, 32), 10, (8, 8, 8)) and Architecture("cnn", (1, 28, 28), 10, (8, 8))
    with pytest.raises(Refusal, match="no strides") as caught:
        Architecture("cnn", (1, 28, 28), 10, (8, 8), (1, 2))
    assert typed(caught.value.fix, Architecture=Architecture) == Architecture("cnn", (1, 28, 28), 10, (8, 8))
