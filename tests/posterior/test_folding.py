"""Draws together: layers on runs of rows."""
import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from helpers import seeded
from helpers_posterior import KINDS, LAYER_IDS, LAYERS, Residual, Written, linear, loop, small_cnn, unchecked_shapes
from symbnn.errors import Refusal
from symbnn.posterior.folding import bind_together, fold, uses_batch_statistics
from symbnn.posterior.layers import posterior_mean_network, variational_tensors, with_posteriors
from symbnn.posterior.sampling import apply_weights, forward, mean_weights, predict, sample_weights
from tolerances import assert_close, exact64


@pytest.mark.parametrize("output", [lambda y: {"logits": 1.0}, lambda y: (y, {y}), lambda y: [], lambda y: None])
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


def test_rows_that_draws_do_not_divide_are_refused():
    network = with_posteriors(nn.Linear(3, 2))
    weights = sample_weights(network, 2, seeded())
    bound = bind_together(network, weights)
    assert bound(torch.zeros(4, 3)).shape == (4, 2)
    for x in (torch.zeros(5, 3), torch.zeros(0, 3), torch.zeros(3)):
        with pytest.raises(Refusal, match="a number of rows that 2 draws"):
            bound(x)


@pytest.mark.parametrize("channels_last", [True, False])
def test_copies_of_a_batch(channels_last):
    x = torch.randn(3, 2, 5, 5, generator=seeded())
    folded = fold(x, 4, channels_last)
    assert torch.equal(folded.unflatten(0, (4, 3)), x.expand(4, *x.shape))
    assert folded.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert torch.equal(fold(x[:, 0, 0], 2, channels_last), x[:, 0, 0].repeat(2, 1))


def test_a_layer_in_the_copy_is_what_it_was():
    network = with_posteriors(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).train())
    bound = bind_together(network, sample_weights(network, 3, seeded()))
    assert isinstance(bound[0], nn.Linear) and bound[0].in_features == 3 and isinstance(bound[1], nn.BatchNorm1d)
    assert uses_batch_statistics(network) and not uses_batch_statistics(network.eval())
