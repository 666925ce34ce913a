"""Posteriors on tensors of any module: draws, gradients, buffers, divergences, and the way back."""
import copy
import pickle

import pytest
import torch
from torch import nn

from helpers import seeded
from helpers_networks import BROUGHT, D, brought, by_definition, kept_in_lists
from helpers_posterior import KINDS, UNSEEN, Written, linear, refused
from symbnn.errors import Refusal
from symbnn.posterior.elbo import elbo
from symbnn.posterior.layers import kl_sum, posterior_mean_network, variational_tensors, with_posteriors
from symbnn.posterior.plans import execution_plan
from symbnn.posterior.real_targets import Gaussian
from symbnn.posterior.sampling import apply_weights, forward, mean_weights, predict, sample_weights
from tolerances import assert_close, within_standard_errors

NAMES = list(BROUGHT)


def made(name, **options):
    plain, x, plan = brought(name)
    return plain, with_posteriors(plain, **{"only": "*", "scale": 0.2, **options}), x, plan


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_draws_are_the_loop_with_the_plain_network(name, training):
    plain, network, x, plan = made(name)
    plain.train(training)
    network.train(training)
    assert set(variational_tensors(network)) == {name for name, _ in plain.named_parameters()}
    weights = sample_weights(network, 4, seeded(1))
    before = {key: value.clone() for key, value in weights.items()}
    expected, _ = by_definition(copy.deepcopy(plain).eval(), (x,), weights)
    for memory in (1, None):  # first, since a step in training mode moves buffers
        assert_close(predict(network, x, weights=weights, memory=memory), torch.stack(expected), UNSEEN)
    expected, moved = by_definition(plain, (x,), weights)
    assert str(execution_plan(network, x)).startswith(plan)
    assert_close(apply_weights(network, x, weights), torch.stack(expected), UNSEEN)
    for key, value in moved.named_buffers():
        assert_close(network.get_buffer(key), value, UNSEEN)
    assert all(torch.equal(value, before[key]) for key, value in weights.items())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_loop(name):
    plain, network, x, _ = made(name)
    plain.eval()
    network.eval()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    weights = sample_weights(network, 3, seeded(1))
    outputs = apply_weights(network, x, weights), torch.stack(by_definition(plain, (x,), weights)[0])
    ours, theirs = (torch.autograd.grad(y.square().sum(), parameters, retain_graph=True) for y in outputs)
    for a, b in zip(ours, theirs):
        assert_close(a, b, UNSEEN)
    assert all(slope.abs().max() > 0 for slope in ours if slope.numel() > 30)


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_and_through_files(name):
    plain, network, x, _ = made(name)
    plain.eval()
    network.eval()
    back = posterior_mean_network(network)
    assert [key for key, _ in back.named_parameters()] == [key for key, _ in plain.named_parameters()]
    assert_close(back(x), plain(x), 0)
    assert_close(apply_weights(network, x, mean_weights(network))[0], plain(x), UNSEEN)
    other = with_posteriors(plain, only="*", scale=0.7)
    other.load_state_dict(network.state_dict())
    again = copy.deepcopy(network).to(torch.float32).to(D)  # recurrent layers keep their weights twice
    for q in (other, copy.deepcopy(network)):
        assert torch.equal(predict(q, x, draws=2, generator=seeded()), predict(network, x, draws=2, generator=seeded()))
    assert_close(predict(again, x, draws=2, generator=seeded()), predict(network, x, draws=2, generator=seeded()), 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_divergences_are_the_sum_by_hand_and_the_elbo_has_gradients(name):
    plain, network, x, _ = made(name)
    normal = torch.distributions.Normal
    by_hand = sum(torch.distributions.kl_divergence(normal(w.detach(), 0.2), normal(0.0, 1.0)).sum()
                  for w in plain.parameters())  # a tied tensor once
    assert_close(kl_sum(network), by_hand, 1e-10)
    outputs = forward(network, x, 2, generator=seeded())
    bound = elbo(network, outputs, torch.zeros_like(outputs[0]), 6, likelihood=Gaussian(1.0))
    assert_close(bound.elbo, bound.expected_log_likelihood - by_hand / 6, 1e-10)
    bound.elbo.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("estimator", ["split", "flipout", "local"])
def test_estimators_run_or_say_which_does(name, estimator):
    _, network, x, plan = made(name)
    network.eval()
    refusal = None
    try:
        outputs = forward(network, x, 2, estimator, seeded())
    except Refusal as found:
        refusal = found
    if refusal is None:
        assert outputs.shape[:2] == (2 if estimator == "flipout" else 1, x.shape[0])
        assert estimator == "split" or plan == "all draws at once"
    else:
        assert "whole" in refusal.fix


def test_split_is_the_plain_network_on_each_run_of_rows():
    plain, network, x, _ = made("attention")
    weights = sample_weights(network, 3, seeded(1))
    runs = [by_definition(plain, (run,), {key: w[s : s + 1] for key, w in weights.items()})[0][0]
            for s, run in enumerate(x.chunk(3))]
    assert_close(forward(network, x, 3, "split", seeded(1))[0], torch.cat(runs), UNSEEN)


@pytest.mark.parametrize("layer", [
    nn.ConvTranspose1d(2, 4, 3, groups=2), nn.Conv3d(2, 2, 2), nn.ConvTranspose2d(2, 3, 2),
], ids=["transposed", "volumes", "images"])
def test_flipout_has_the_moments_of_draws(layer):
    """Mean and variance of each output, within standard errors; the variance in closed form since layers are linear."""
    network = with_posteriors(layer.to(D), only="*", scale=0.3)
    x = torch.randn(2, 2, *[3] * (layer.weight.ndim - 2), generator=seeded(), dtype=D)
    outputs = forward(network, x, 4000, "flipout", seeded(1)).detach()
    exact = predict(network, x, weights=mean_weights(network))[0]
    within_standard_errors(outputs.mean(0), exact, outputs.std(0) / 4000**0.5, k=5.5)
    squared = copy.deepcopy(layer)
    with torch.no_grad():
        squared.weight.fill_(0.09)
        squared.bias.fill_(0.09)
    variance = squared(x.square()).detach()
    within_standard_errors(outputs.var(0), variance, variance * (2 / 4000) ** 0.5, k=6)


def test_flipout_is_refused_where_signs_do_not_pass():
    for name in ("embedding", "norms"):
        _, network, x, plan = made(name)
        assert plan == "all draws at once"
        with pytest.raises(Refusal, match="linear in weights and inputs"):
            forward(network.eval(), x, 2, "flipout")


@pytest.mark.parametrize("family", KINDS, ids=lambda family: family.__name__)
def test_every_family_on_scalars_vectors_tables_and_recurrent_weights(family):
    plain, x = brought("bare")[:2]
    plain.rnn = nn.GRU(4, 2, batch_first=True).to(D)
    plain.run = lambda m, x: m.rnn(m.a.weight.shape[0] * 0 + x + m.place)[0] * m.scale + m.a(x)[..., :2]
    network = with_posteriors(plain, family, only="*", scale=0.1)
    weights = sample_weights(network, 3, seeded())
    assert_close(predict(network, x, weights=weights), torch.stack(by_definition(plain, (x,), weights)[0]), UNSEEN)
    kl_sum(network).backward()


def test_half_precision_and_partial_choices():
    plain = nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4), nn.Linear(4, 2)).bfloat16()
    network, x = with_posteriors(plain, only=[nn.Embedding, "2.bias"]), torch.randint(10, (6, 5))
    assert list(variational_tensors(network)) == ["0.weight", "2.bias"]
    assert all(p.requires_grad for p in network[1].parameters()) and network[2].weight.requires_grad
    weights = sample_weights(network, 3, seeded())
    expected = torch.stack(by_definition(plain, (x,), weights)[0])
    assert_close(predict(network, x, weights=weights).float(), expected.float(), 2e-2)


def test_one_part_after_the_other_with_families_of_their_own():
    plain = nn.Sequential(linear(), nn.Tanh(), linear(3, 2)).double()
    first = with_posteriors(plain, KINDS[1], 0.1, only="0.*")
    both = with_posteriors(first, scale=0.2, only="2.*")
    assert [type(tensor.posterior) for tensor in variational_tensors(both).values()] == [KINDS[1]] * 2 + [KINDS[0]] * 2
    x = torch.randn(4, 3, dtype=D)
    weights = sample_weights(both, 3, seeded())
    assert_close(predict(both, x, weights=weights), torch.stack(by_definition(plain, (x,), weights)[0]), UNSEEN)


def test_what_keeps_parameters_a_second_time_holds_no_old_ones():
    network = with_posteriors(Written(lambda m, x: m.a(x)[0], a=nn.LSTM(3, 2)), only="*")
    assert all(weight is getattr(network.a, name) for weight, name in zip(
        network.a._flat_weights, network.a._flat_weights_names))
    restored = pickle.loads(pickle.dumps(nn.Sequential(network.a)))
    assert list(variational_tensors(restored)) == [f"0.{name}" for name, _ in nn.LSTM(3, 2).named_parameters()]


def test_parameters_that_a_module_keeps_in_a_list():
    """Where `torch.func.functional_call` would go on with the old ones."""
    torch.manual_seed(0)
    plain, x = kept_in_lists().to(D), torch.randn(6, 4, dtype=D)
    network = with_posteriors(plain, only="*", scale=0.3)
    weights = sample_weights(network, 3, seeded())
    expected = torch.stack([x @ a + b for a, b in zip(weights["a"], weights["b"])])
    assert_close(predict(network, x, weights=weights), expected, UNSEEN)
    assert_close(posterior_mean_network(network)(x), plain(x), 0)


def test_attention_without_dropout_is_not_random():
    plain, x, _ = brought("encoder")
    network = with_posteriors(plain, only=["linear1.*", "norm2.*"], scale=0.2).eval()
    plan = execution_plan(network, x)
    assert plan.together, plan
    weights = sample_weights(network, 3, seeded())
    expected = torch.stack(by_definition(plain.eval(), (x,), weights)[0])
    assert_close(apply_weights(network, x, weights), expected, UNSEEN)


@pytest.mark.parametrize("only", ["a.weight", "a.bias", "a.extra", ["a.extra", "a.weight"]])
def test_a_forward_pass_meets_parameters_in_the_order_of_the_plain_network(only):
    plain, x, _ = brought("parameters by order")
    network = with_posteriors(plain, only=only, scale=0.2)
    weights = sample_weights(network, 3, seeded())
    assert_close(predict(network, x, weights=weights), torch.stack(by_definition(plain, (x,), weights)[0]), UNSEEN)
    back = posterior_mean_network(network)
    assert [name for name, _ in back.named_parameters()] == [name for name, _ in plain.named_parameters()]


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
def test_norms_of_weights_by_hooks():
    """Older forms of reparametrisation: a hook computes the weight before each pass."""
    for build, names in ((nn.utils.weight_norm, ["0.bias", "0.weight_g", "0.weight_v"]),
                         (nn.utils.spectral_norm, ["0.bias", "0.weight_orig"])):
        torch.manual_seed(0)
        plain, x = nn.Sequential(build(nn.Linear(4, 3))).eval(), torch.randn(6, 4)
        if build is nn.utils.weight_norm:
            assert "del network.0.weight" in refused(lambda plain=plain: with_posteriors(plain, only="*")).fix
            del plain[0].weight
        network = with_posteriors(plain, only="*", scale=0.2)
        assert list(variational_tensors(network)) == names
        weights = sample_weights(network, 3, seeded())
        assert_close(predict(network, x, weights=weights), torch.stack(by_definition(plain, (x,), weights)[0]), 1e-6)


def test_compiled_networks():
    plain, x, _ = brought("lstm")
    network = with_posteriors(torch.compile(plain, backend="eager"), only="a.weight*")
    weights = sample_weights(network, 2, seeded())
    assert all(name.startswith("a.weight") for name in weights)
    assert_close(predict(network, x, weights=weights), torch.stack(by_definition(plain, (x,), weights)[0]), UNSEEN)
