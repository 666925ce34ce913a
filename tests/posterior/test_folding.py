"""Draws together: layers on runs of rows."""
import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from helpers_posterior import (
    KINDS,
    LAYER_IDS,
    LAYERS,
    Residual,
    Written,
    linear,
    loop,
    seeded,
    small_cnn,
    unchecked_shapes,
)
from symbnn.errors import Refusal
from symbnn.posterior.layers import posterior_mean_network, variational_tensors, with_posteriors
from symbnn.posterior.sampling import apply_weights, forward, mean_weights, predict, sample_weights
from tolerances import assert_close, exact64


@pytest.mark.parametrize("output", [lambda y: {"logits": y}, lambda y: (y, y), lambda y: [y], lambda y: None])
def test_outputs_of_other_kinds_are_refused_with_a_way_that_works(output):
    network, x = with_posteriors(Written(lambda m, x: output(m.a(x)), a=linear())), torch.randn(4, 3)
    for call in (lambda: predict(network, x, draws=2), lambda: forward(network, x, 2), lambda: forward(
            network, x, 2, "split")):
        with pytest.raises(Refusal, match=r"returns one tensor"):
            call()


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=LAYER_IDS)
@pytest.mark.parametrize("family", KINDS, ids=lambda family: family.__name__)
def test_bare_layer_round_trip_and_draws(layer, shape, family):
    layer, x = copy.deepcopy(layer).double(), torch.randn(shape, generator=seeded(), dtype=torch.float64)
    bayesian = with_posteriors(layer, family=family)
    assert_close(posterior_mean_network(bayesian).weight, bayesian.weight.posterior.mean, exact64)
    weights = sample_weights(bayesian, 3, seeded(1))
    together = apply_weights(bayesian, x, weights)
    assert_close(together, loop(layer, x, weights), exact64)


def test_shared_layer_and_residual_path():
    plain, x = Residual().double(), torch.randn(4, 5, dtype=torch.float64, generator=seeded())
    bayesian = with_posteriors(plain)
    assert set(variational_tensors(bayesian)) == {"first.weight", "first.bias"}
    weights = sample_weights(bayesian, 2, seeded())
    alone = functional_call(plain, {name: weight[1] for name, weight in weights.items()}, (x,))
    assert_close(apply_weights(bayesian, x, weights)[1], alone, exact64)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # raised inside the compiler
@unchecked_shapes()
def test_layers_compile():
    network, x = with_posteriors(small_cnn()), torch.randn(3, 1, 8, 8, generator=seeded(), dtype=torch.float64)
    weights = sample_weights(network, 2, seeded())
    compiled = torch.compile(lambda x, weights: apply_weights(network, x, weights), backend="eager")
    assert_close(compiled(x, weights), apply_weights(network, x, weights), exact64)


def test_layer_types_and_channels_last():
    network, x = with_posteriors(small_cnn()), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    assert type(network[0]) is nn.Conv2d
    assert type(network[7]) is nn.Linear
    layouts = []
    network[1].register_forward_hook(lambda module, inputs, output: layouts.append(inputs[0]))
    apply_weights(network, x, mean_weights(network))
    assert layouts[-1].is_contiguous(memory_format=torch.channels_last)
