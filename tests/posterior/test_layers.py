"""Conversion to a Bayesian network and back."""
import copy
import pickle
import re

import pytest
import torch
from torch import nn

from helpers import seeded
from helpers_posterior import KINDS, LAYER_IDS, LAYERS, UNSEEN, linear, loop, refused, small_cnn
from symbnn.errors import Refusal
from symbnn.posterior.layers import kl_per_datum, kl_sum, posterior_mean_network, variational_tensors, with_posteriors
from symbnn.posterior.priors import isotropic
from symbnn.posterior.sampling import apply_weights, forward, predict, sample_weights
from tolerances import assert_close, exact64


def test_conversion_keeps_what_a_layer_has():
    calls, layer = [], linear()
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    layer.register_full_backward_hook(lambda module, before, after: calls.append("backward"))
    layer.register_buffer("note", torch.ones(2))
    layer.inner = nn.Tanh()
    plain = nn.Sequential(layer, linear()).double()
    network, x = with_posteriors(plain), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(network[0].note, torch.ones(2, dtype=torch.float64))
    assert isinstance(network[0].inner, nn.Tanh)
    assert (network[0].in_features, network[0].weight.shape, network[0].weight.dtype, network[0].weight.device) == (
        3, (3, 3), torch.float64, torch.device("cpu"))
    weights = sample_weights(network, 2, seeded())
    out = apply_weights(network, x, weights)
    assert_close(out, loop(plain, x, weights), UNSEEN)
    calls.clear()
    out.sum().backward()
    assert calls == ["backward"] * 2  # the forward hook changes what it sees, so there is a call for each draw
    back = posterior_mean_network(network)
    assert torch.equal(back[0].note, plain[0].note)
    assert_close(back(x), plain(x), exact64)


def test_frozen_weights_stay_deterministic_and_frozen():
    plain = nn.Sequential(linear(), nn.ReLU(), linear(), nn.Linear(3, 2))
    plain[0].requires_grad_(False)
    plain[2].bias.requires_grad_(False)
    network = with_posteriors(plain)
    assert list(variational_tensors(network)) == ["2.weight", "3.weight", "3.bias"]
    assert not network[0].weight.requires_grad
    assert not network[2].bias.requires_grad
    back = posterior_mean_network(network)
    assert [p.requires_grad for p in back.parameters()] == [
        dict(plain.named_parameters())[name].requires_grad for name, _ in back.named_parameters()]
    variational_tensors(network)["3.weight"].posterior.requires_grad_(False)
    assert not posterior_mean_network(network)[3].weight.requires_grad


def test_ties_are_one_posterior():
    layer = linear()
    two_names = nn.Sequential(layer, nn.Tanh(), layer)
    assigned = nn.Sequential(linear(), nn.Tanh(), linear())
    assigned[2].weight = assigned[0].weight
    for plain, count in ((two_names, 2), (assigned, 3)):
        plain, x = plain.double(), torch.randn(4, 3, dtype=torch.float64)
        network = with_posteriors(plain)
        assert len(variational_tensors(network)) == count
        assert network[0].weight is network[2].weight
        weights = sample_weights(network, 3, seeded())
        expected = torch.stack([
            torch.tanh(x @ weights["0.weight"][s].T + weights["0.bias"][s]) @ weights["0.weight"][s].T
            + weights.get("2.bias", weights["0.bias"])[s] for s in range(3)])
        assert_close(apply_weights(network, x, weights), expected, UNSEEN)
        back = posterior_mean_network(network)
        assert back[0].weight is back[2].weight
        refused = {two_names: ("local",), assigned: ("local", "flipout")}  # flipout: one layer has one set of signs
        for estimator in refused[two_names if count == 2 else assigned]:
            with pytest.raises(Refusal, match=r"tied|twice"):
                forward(network, x, 2, estimator)


def test_networks_that_cannot_be_copied_are_refused():
    plain = nn.Sequential(linear())
    plain.last = plain(torch.zeros(2, 3))
    with pytest.raises(Refusal, match=r"detach"):
        with_posteriors(plain)


@pytest.mark.parametrize(("call", "said"), [
    (lambda: with_posteriors(None), "network"), (lambda: with_posteriors(nn.Linear), "class"),
    (lambda: with_posteriors([linear()]), r"nn\.Sequential"), (lambda: with_posteriors(linear(), 0.1), "scale=0.1"),
    (lambda: with_posteriors(linear(), "gaussian"), "MeanFieldGaussian"),
    (lambda: with_posteriors(linear(), scale="x"), "scale"),
    (lambda: with_posteriors(linear(), prior=isotropic), r"isotropic\(1\.0\)"),
    (lambda: with_posteriors(linear(), prior=1.0), r"isotropic\(1\.0\)"), (lambda: isotropic(0), "positive"),
    (lambda: with_posteriors(nn.Sequential(nn.LazyLinear(2), linear())), r"once"),
    (lambda: with_posteriors(nn.Sequential(linear(), nn.LazyBatchNorm1d())), r"once"),
    (lambda: kl_per_datum(with_posteriors(linear()), float("nan")), "positive"),
    (lambda: kl_per_datum(with_posteriors(linear()), None), "num_data"),
    (lambda: predict(torch.zeros(2, 3), with_posteriors(linear()), draws=2), "network"),
    (lambda: predict(with_posteriors(linear()), "x", draws=2), "tensor"),
    (lambda: forward(with_posteriors(linear()), torch.zeros(2, 3), generator=0), "manual_seed"),
    (lambda: sample_weights(None, 2), "network"),
])
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_everyday_mistakes_are_told_what_works(call, said):
    with pytest.raises(Refusal, match=said):
        call()


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=LAYER_IDS)
def test_conversion_keeps_function_dtype_and_training_flag(layer, shape):
    for dtype in (torch.float32, torch.float64):
        plain = copy.deepcopy(layer).to(dtype).eval()
        x = torch.randn(shape, generator=seeded(), dtype=dtype)
        back = posterior_mean_network(with_posteriors(plain))
        assert type(back) is type(plain)
        assert back.weight.dtype == dtype
        assert not back.training
        assert torch.equal(back(x), plain(x))


def test_layer_object_used_under_two_names_stays_one():
    layer = nn.Linear(3, 3)
    bayesian = with_posteriors(nn.Sequential(layer, nn.Tanh(), layer))
    assert bayesian[0] is bayesian[2]
    assert len(variational_tensors(bayesian)) == 2


class Subclass(nn.Linear):
    pass


def with_extra_parameter():
    layer = nn.Linear(3, 3)
    layer.gain = nn.Parameter(torch.ones(3))
    return layer


def with_own_forward():
    layer = nn.Linear(3, 3)
    layer.forward = lambda x: x
    return layer


def tied_to_norm():
    network = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    network[1].bias = network[0].bias
    return network


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3)), "LSTM"),
        (lambda: nn.Sequential(nn.Linear(3, 3), Subclass(3, 3)), "Subclass"),
        (lambda: nn.Sequential(nn.ConvTranspose2d(1, 1, 3)), "ConvTranspose2d"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "Parametrized"),
        (with_extra_parameter, "'gain'"),
        (with_own_forward, "forward pass of its own"),
        (tied_to_norm, "tied"),
        (nn.ReLU, "without trainable Linear"),
        (lambda: nn.Linear(3, 3).requires_grad_(False), "frozen"),
        (lambda: nn.Linear(3, 3, dtype=torch.complex64), "complex"),
        (lambda: with_posteriors(nn.Linear(3, 3)), "Bayesian already"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.Embedding(3, 3)), "'1'"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(network, named):
    with pytest.raises(Refusal, match=named):
        with_posteriors(network())


def test_conversion_leaves_the_original_alone():
    plain = small_cnn()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    bayesian = with_posteriors(plain)
    with torch.no_grad():
        for parameter in bayesian.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_plain_call_is_refused_in_either_mode(mode):
    network = with_posteriors(small_cnn())
    getattr(network, mode)()
    with pytest.raises(Refusal, match="predict"):
        network(torch.zeros(1, 1, 4, 4, dtype=torch.float64))


@pytest.mark.parametrize("family", KINDS, ids=lambda family: family.__name__)
def test_state_dict_contains_priors_and_restores_everything(family):
    plain, x = small_cnn(), torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=seeded())
    one = with_posteriors(plain, family=family, prior=isotropic(0.3))
    other = with_posteriors(plain, family=family, scale=0.2, prior=isotropic(0.9))
    assert any(".prior." in name for name in one.state_dict())
    assert not any(".prior." in name for name, _ in one.named_parameters())
    assert kl_sum(one) != kl_sum(other)
    other.load_state_dict(one.state_dict())
    assert kl_sum(one) == kl_sum(other)
    outputs = [forward(network, x, 2, generator=seeded()) for network in (one, other, pickle.loads(pickle.dumps(one)))]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_kl_is_a_sum_over_tensors_and_per_datum_divides_it():
    network = with_posteriors(small_cnn(), scale=0.1, prior=isotropic(0.5))
    normal = torch.distributions.Normal
    exact = sum(
        torch.distributions.kl_divergence(
            normal(t.posterior.loc, 0.1), normal(torch.zeros_like(t.posterior.loc), 0.5)
        ).sum()
        for t in variational_tensors(network).values()
    )
    assert_close(kl_sum(network), exact, 1e-10)
    assert_close(kl_per_datum(network, 50), exact / 50, 1e-10)
    with pytest.raises(Refusal, match="num_data=0"):
        kl_per_datum(network, 0)


def typed(fix):
    """The part of an advice that is code, up to the first comma or word that is none."""
    return re.split(r", (?:which|or)|, then|; ", fix)[0]


@pytest.mark.parametrize("network", [
    lambda: nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3)), lambda: nn.Sequential(nn.Linear(3, 3), Subclass(3, 3)),
    lambda: nn.Sequential(nn.Linear(3, 3), with_extra_parameter()), lambda: nn.Linear(3, 3).requires_grad_(False),
    lambda: with_posteriors(nn.Linear(3, 3)),
], ids=["recurrent", "subclass", "parameter", "frozen", "Bayesian"])
def test_what_a_refused_conversion_advises_works(network):
    network = network()
    fix = refused(lambda: with_posteriors(network)).fix
    found = eval(typed(fix), {"network": network, "with_posteriors": with_posteriors,
                              "posterior_mean_network": posterior_mean_network})
    assert variational_tensors(found if "with_posteriors(" in typed(fix) else with_posteriors(network))


def test_a_plain_network_and_a_number_are_told_what_works():
    network = nn.Linear(3, 3)
    fix = refused(lambda: variational_tensors(network)).fix
    assert variational_tensors(eval(fix.partition(" = ")[2], {"network": network, "with_posteriors": with_posteriors}))
    assert "with_posteriors(network, scale=0.3)" in refused(lambda: with_posteriors(network, 0.3)).fix
    assert "nn.Linear" not in refused(lambda: with_posteriors(network, nn.Linear)).fix
