"""Variational layers: conversion, weights as arguments, estimators against exact gradients, prediction in pieces."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call

from symbnn.errors import Refusal
from symbnn.posterior.block_gaussian import BlockGaussian
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.layers import (
    kl_per_datum,
    kl_sum,
    posterior_mean_network,
    variational_tensors,
    with_posteriors,
)
from symbnn.posterior.log_normal import LogNormal
from symbnn.posterior.priors import fixed_means, isotropic, per_tensor, random_means
from symbnn.posterior.sampling import apply_weights, forward, mean_weights, predict, sample_weights
from tolerances import assert_close, exact64, within_standard_errors

LAYERS = [
    (nn.Linear(6, 3), (4, 6)),
    (nn.Linear(6, 3, bias=False), (4, 5, 6)),
    (nn.Conv1d(2, 4, 3, padding=2, dilation=2, padding_mode="reflect"), (4, 2, 9)),
    *[
        (nn.Conv2d(2, 4, 3, padding=1, padding_mode=mode, groups=groups, stride=stride, bias=bias), (4, 2, 8, 8))
        for mode, groups, stride, bias in [
            ("zeros", 1, 1, True), ("circular", 2, 1, True), ("reflect", 1, 2, False), ("replicate", 1, 1, True)
        ]
    ],
    (nn.Conv2d(2, 4, 3, padding="same", dilation=2), (4, 2, 8, 8)),
]
LAYER_IDS = [str(layer) for layer, _ in LAYERS]
FAMILIES = [MeanFieldGaussian, Laplace, LogNormal, BlockGaussian, FullGaussian]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def loop(plain, x, weights):
    """What every call promises: the plain network, one draw after the other."""
    draws = len(next(iter(weights.values())))
    one = [{name: weight[s] for name, weight in weights.items()} for s in range(draws)]
    return torch.stack([functional_call(plain, tensors, (x,)) for tensors in one])


def small_cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    ).double()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 5)

    def forward(self, x):
        return x + self.first(torch.tanh(self.first(x)))  # one layer used twice, and a path without any


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=LAYER_IDS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_bare_layer_round_trip_and_draws(layer, shape, family):
    layer, x = copy.deepcopy(layer).double(), torch.randn(shape, generator=seeded(), dtype=torch.float64)
    bayesian = with_posteriors(layer, family=family)
    assert_close(posterior_mean_network(bayesian).weight, bayesian.weight.posterior.mean, exact64)
    weights = sample_weights(bayesian, 3, seeded(1))
    together = apply_weights(bayesian, x, weights)
    assert_close(together, loop(layer, x, weights), exact64)


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


def test_shared_layer_and_residual_path():
    plain, x = Residual().double(), torch.randn(4, 5, dtype=torch.float64, generator=seeded())
    bayesian = with_posteriors(plain)
    assert set(variational_tensors(bayesian)) == {"first.weight", "first.bias"}
    weights = sample_weights(bayesian, 2, seeded())
    alone = functional_call(plain, {name: weight[1] for name, weight in weights.items()}, (x,))
    assert_close(apply_weights(bayesian, x, weights)[1], alone, exact64)


def test_layer_object_used_under_two_names_stays_one():
    layer = nn.Linear(3, 3)
    bayesian = with_posteriors(nn.Sequential(layer, nn.Tanh(), layer))
    assert bayesian[0] is bayesian[2]
    assert len(variational_tensors(bayesian)) == 2


class Subclass(nn.Linear):
    pass


def tied():
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    return network


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


def test_eval_does_not_change_whether_weights_are_random():
    network, x = with_posteriors(small_cnn()), torch.randn(2, 1, 4, 4, dtype=torch.float64)
    outputs = [forward(mode, x, draws=2, generator=seeded()) for mode in (network.train(), network.eval())]
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0][0], outputs[0][1])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
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


def test_priors():
    plain = small_cnn()
    fan = variational_tensors(with_posteriors(plain, prior=per_tensor(2.0, bias=3.0)))
    assert fan["3.weight"].prior.variance.unique().item() == pytest.approx(4.0 / 27)
    assert fan["7.bias"].prior.variance.unique().item() == pytest.approx(9.0)
    bayesian = [with_posteriors(plain, prior=random_means(seed)) for seed in (1, 1, 2)]
    random = [variational_tensors(network)["3.weight"].prior.mean for network in bayesian]
    assert torch.equal(random[0], random[1])
    assert not torch.equal(random[0], random[2])
    assert random[0].std() > 0.7
    fixed = variational_tensors(with_posteriors(plain, prior=fixed_means(plain.state_dict())))["7.weight"]
    assert torch.equal(fixed.prior.mean, plain[7].weight)
    with pytest.raises(Refusal, match="no entry"):
        with_posteriors(plain, prior=fixed_means({}))
    with pytest.raises(Refusal, match="keeps its sign"):
        with_posteriors(plain, family=LogNormal, prior=random_means(0))
    laplace = variational_tensors(with_posteriors(plain, family=Laplace, prior=isotropic(0.3)))["7.weight"].prior
    assert isinstance(laplace, Laplace)
    assert laplace.variance.unique().item() == pytest.approx(0.09)


def test_weights_of_another_network_are_refused():
    network, x = with_posteriors(small_cnn()), torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    with pytest.raises(Refusal, match=r"0\.bias"):
        apply_weights(network, x, {k: v for k, v in mean_weights(network).items() if k != "0.bias"})
    with pytest.raises(Refusal, match="shapes or numbers"):
        apply_weights(network, x, mean_weights(network) | {"7.bias": torch.zeros(2, 2)})
    with pytest.raises(Refusal, match="with_posteriors"):
        sample_weights(small_cnn(), 2)
    with pytest.raises(Refusal, match="draws=0"):
        sample_weights(network, 0)


def test_network_that_reshapes_the_batch_is_looped_over_and_has_no_rows_to_cut():
    plain, x = nn.Sequential(nn.Linear(2, 4), nn.Flatten(0)).double(), torch.randn(3, 2, dtype=torch.float64)
    network = with_posteriors(plain)
    weights = sample_weights(network, 2, seeded())
    assert_close(apply_weights(network, x, weights), loop(plain, x, weights), exact64)
    with pytest.raises(Refusal, match="no row for each row"):
        forward(network, x, 2, "split")


# --- estimators -------------------------------------------------------------------------------------------------------


def linear_problem(kind):
    """A network that is linear in its weights, f = design @ theta, so that the expected squared error is known."""
    torch.manual_seed(1)
    if kind == "linear":
        plain, x = nn.Linear(3, 1), torch.randn(8, 3)
    else:  # every position's output counts through the sum: shared kernels make the positions dependent
        plain = nn.Sequential(nn.Conv2d(1, 1, 2), nn.AvgPool2d(3, divisor_override=1), nn.Flatten())
        x = torch.randn(8, 1, 4, 4)
    plain, x = plain.double(), x.double()
    network, y = with_posteriors(plain, scale=0.5), torch.randn(8, 1, dtype=torch.float64)
    columns = []
    means = mean_weights(network)
    zeros = {name: torch.zeros_like(weight) for name, weight in means.items()}
    for name, weight in means.items():
        for position in itertools.product(*map(range, weight.shape[1:])):
            unit = zeros[name].clone()
            unit[(0, *position)] = 1.0
            columns.append(apply_weights(network, x, zeros | {name: unit})[0, :, 0])
    return network, x, y, torch.stack(columns, -1).detach()


def posterior_parameters(network):
    tensors = variational_tensors(network).values()
    return [t.posterior.loc for t in tensors] + [t.posterior.log_scale for t in tensors]


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize(
    ("estimator", "draws"), [("whole", 1), ("whole", 4), ("split", 4), ("split", 3), ("flipout", 2), ("local", 4)]
)
def test_estimators_are_unbiased(kind, estimator, draws):
    network, x, y, design = linear_problem(kind)
    parameters = posterior_parameters(network)
    half = len(parameters) // 2
    mean = torch.cat([p.flatten() for p in parameters[:half]])
    variance = torch.cat([(2 * p).exp().flatten() for p in parameters[half:]])
    exact_loss = 0.5 * ((y[:, 0] - design @ mean).square() + design.square() @ variance).mean()
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(exact_loss, parameters)])
    generator, found = seeded(5), []
    for _ in range(3000):
        out = forward(network, x, draws, estimator, generator)
        loss = 0.5 * (out - y).square().mean()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    found = torch.stack(found)
    within_standard_errors(found.mean(0), exact, found.std(0) / len(found) ** 0.5, k=4.5)  # several entries


def location_variance(network, x, y, repeats, draws, estimator):
    generator, found = seeded(6), []
    locs = posterior_parameters(network)[: len(variational_tensors(network))]
    for _ in range(repeats):
        loss = 0.5 * (forward(network, x, draws, estimator, generator) - y).square().mean()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, locs)]))
    return torch.stack(found).var(0).sum()


def test_split_and_flipout_have_lower_variance_than_whole_at_equal_cost():
    network, _, _, _ = linear_problem("convolution")
    x = torch.randn(64, 1, 4, 4, generator=seeded(7), dtype=torch.float64)
    y = torch.randn(64, 1, generator=seeded(8), dtype=torch.float64)
    one, two, split, flipout = (
        location_variance(network, x, y, 400, draws, estimator)
        for estimator, draws in [("whole", 1), ("whole", 2), ("split", 8), ("flipout", 1)]
    )
    assert split < one / 4  # one pass each; the derivation gives 8 where the covariance dominates
    assert flipout < two / 4  # two passes each


def test_local_is_exact_for_the_head_and_does_not_touch_convolutions():
    network = with_posteriors(small_cnn(), scale=0.3)
    x = torch.randn(1, 1, 8, 8, generator=seeded(), dtype=torch.float64)
    many = x.expand(6000, -1, -1, -1)  # each row its own draw in both estimators
    split, local = (forward(network, many, len(many), name, seeded(1))[0].detach() for name in ("split", "local"))
    error = 2 * split.var(0) * (4 / 6000) ** 0.5  # heavy tails: twice a Gaussian's error of a difference of variances
    within_standard_errors(local.var(0), split.var(0), error)
    within_standard_errors(local.mean(0), split.mean(0), (split.var(0) * 2 / 6000).sqrt())


def test_local_refuses_a_layer_used_twice_and_leaves_sequences_to_split():
    with pytest.raises(Refusal, match="used twice"):
        forward(with_posteriors(Residual()), torch.randn(4, 5), 2, "local")
    network, x = with_posteriors(nn.Linear(3, 2)), torch.randn(4, 6, 3)
    assert torch.equal(forward(network, x, 2, "local", seeded()), forward(network, x, 2, "split", seeded()))


class Several(nn.Module):
    """Sums what one linear layer makes of the vectors of an example, folded into its rows or in one call each."""

    def __init__(self, folded, bias):
        super().__init__()
        self.layer, self.folded = nn.Linear(2, 1, bias=bias), folded

    def forward(self, x):
        if self.folded:
            return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]).sum(1)
        return sum(self.layer(vector) for vector in x.unbind(1))


@pytest.mark.parametrize("folded", [True, False], ids=["folded", "calls"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("estimator", ["whole", "split", "flipout", "local"])
def test_weights_that_an_example_meets_several_times_are_the_same_weights(folded, bias, estimator):
    network = with_posteriors(Several(folded, bias).double(), scale=0.5)
    x = torch.randn(1, 3, 2, generator=seeded(), dtype=torch.float64)
    many = x.expand(6000, -1, -1)
    draws = {"whole": 1, "split": 6000, "flipout": 1, "local": 6000}[estimator]
    if estimator == "local" and not folded:
        with pytest.raises(Refusal, match="used twice"):
            forward(network, many, draws, estimator)
        return
    if draws == 1:  # an independent draw for each repetition
        out = forward(network, x, 6000, estimator, seeded(1)).detach()[:, 0, 0]
    else:
        out = forward(network, many, draws, estimator, seeded(1)).detach()[0, :, 0]
    exact = 0.25 * (x.sum(1).square().sum() + 9 * bias)  # Var sum_t (w x_t + b), standard deviation 0.5
    within_standard_errors(out.var(), exact, exact * (2 / 6000) ** 0.5)


def test_local_draws_the_output_of_a_layer_without_bias():
    network, x = with_posteriors(nn.Linear(3, 2, bias=False).double(), scale=0.5), torch.ones(1, 3, dtype=torch.float64)
    out = forward(network, x.expand(6000, -1), 1, "local", seeded(1)).detach()[0]  # one draw, and yet no two rows equal
    exact = torch.full((2,), 3 * 0.25, dtype=torch.float64)
    within_standard_errors(out.var(0), exact, exact * (2 / 6000) ** 0.5)


def weighted_inputs():
    """A linear layer of three inputs whose weights and biases have different scales, and one input."""
    torch.manual_seed(2)
    network = with_posteriors(nn.Linear(3, 2).double())
    for tensor in variational_tensors(network).values():
        nn.init.normal_(tensor.posterior.log_scale, -0.5, generator=seeded(3))
    return network, torch.tensor([[1.0, -0.5, 2.0]]).double()


def test_local_is_the_standard_deviation_times_the_noise_number_by_number():
    network, x = weighted_inputs()
    x = torch.cat([x, -2 * x, torch.zeros_like(x), torch.randn(5, 3, generator=seeded(), dtype=torch.float64)])
    weight, bias = (tensor.posterior for tensor in variational_tensors(network).values())
    exact = (x.square() @ weight.variance.T + bias.variance).sqrt()
    centred = forward(network, x, 1, "local", seeded(4))[0] - (x @ weight.mean.T + bias.mean)
    source = seeded(4)
    sample_weights(network, 1, source)  # what comes from the generator before
    noise = torch.randn(8, 2, generator=source, dtype=torch.float64)
    assert_close(centred / noise, exact)


@pytest.mark.parametrize("estimator", ["whole", "split", "flipout", "local"])
def test_outputs_have_the_exact_variance(estimator):
    network, x = weighted_inputs()
    count, generator = 20_000, seeded(5)
    weight, bias = (tensor.posterior for tensor in variational_tensors(network).values())
    variance = (x.square() @ weight.variance.T + bias.variance)[0]
    if estimator in ("whole", "flipout"):
        out = forward(network, x, count, estimator, generator)[:, 0]
    else:
        out = forward(network, x.expand(count, -1), count, estimator, generator)[0]
    within_standard_errors(out.mean(0), x[0] @ weight.mean.T + bias.mean, (variance / count).sqrt())
    within_standard_errors(out.var(0), variance, variance * (2 / count) ** 0.5)  # five percent are five errors


@pytest.mark.parametrize("estimator", ["whole", "split", "flipout", "local"])
def test_an_empty_batch_is_refused(estimator):
    with pytest.raises(Refusal, match="not empty"):
        forward(with_posteriors(nn.Linear(2, 1)), torch.zeros(0, 2), 3, estimator)


def test_flipout_refuses_rows_that_belong_to_no_example():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x):
            return self.layer(x[::2])

    with pytest.raises(Refusal, match="no row for each row"):
        forward(with_posteriors(Halves()), torch.zeros(4, 2), 1, "flipout")


@pytest.mark.parametrize("family", [LogNormal, FullGaussian])
def test_flipout_refuses_families_whose_noise_depends_on_signs(family):
    with pytest.raises(Refusal, match="Flipout"):
        forward(with_posteriors(nn.Linear(2, 2), family=family), torch.zeros(3, 2), 1, "flipout")


def test_flipout_rows_have_the_right_marginal_law():
    network = with_posteriors(nn.Conv2d(2, 2, 2).double(), scale=0.5)
    x = torch.randn(1, 2, 3, 3, generator=seeded(), dtype=torch.float64)
    whole = forward(network, x, 20_000, "whole", seeded(1)).detach()[:, 0].flatten(1)
    flipout = forward(network, x, 20_000, "flipout", seeded(2)).detach()[:, 0].flatten(1)
    assert_close(flipout.T.cov(), whole.T.cov(), 0.15)  # the joint law over positions, not only the variances
    within_standard_errors(flipout.mean(0), whole.mean(0), (whole.var(0) * 2 / 20_000).sqrt())


def test_unknown_estimator_is_refused():
    with pytest.raises(Refusal, match="misspelt"):
        forward(with_posteriors(nn.Linear(2, 2)), torch.zeros(1, 2), estimator="antithetic")


@pytest.mark.parametrize(("rows", "runs"), [(8, 4), (7, 4), (3, 8), (1, 4)])
def test_split_uses_one_draw_for_each_run_of_rows(rows, runs):
    network = with_posteriors(nn.Linear(2, 1).double())
    x = torch.ones(rows, 2, dtype=torch.float64)
    out = forward(network, x, runs, "split", seeded())
    assert out.shape == (1, rows, 1)
    size = -(-rows // min(runs, rows))
    assert len(out.unique()) == -(-rows // size)
    assert all(len(run.unique()) == 1 for run in out[0].split(size))


# --- prediction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [1, 5_000, 100_000, 2**30])
def test_prediction_does_not_depend_on_the_memory_budget(memory):
    network, x = with_posteriors(small_cnn()), torch.randn(9, 1, 8, 8, generator=seeded(), dtype=torch.float64)
    expected = predict(network, x, draws=21, generator=seeded(1))
    assert expected.shape == (21, 9, 2)
    assert not expected.requires_grad
    assert_close(predict(network, x, draws=21, memory=memory, generator=seeded(1)), expected, exact64)
    weights = sample_weights(network, 21, seeded(2))
    assert_close(predict(network, x, weights=weights, memory=memory), apply_weights(network, x, weights), exact64)


class WritesIntoItsInput(nn.Module):
    """Not the same when applied twice."""

    def forward(self, x):
        return x.mul_(0.5).add_(1.0)


@pytest.mark.parametrize("memory", [1, 5_000, 2**30])
def test_a_network_that_writes_into_its_input_spoils_neither_the_inputs_nor_the_next_draws(memory):
    network = with_posteriors(nn.Sequential(WritesIntoItsInput(), nn.Linear(6, 3)).double())
    x = torch.randn(10, 6, dtype=torch.float64, generator=seeded(0))
    kept, weights = x.clone(), sample_weights(network, 21, seeded(1))
    expected = torch.stack([(0.5 * x + 1) @ w.T + b for w, b in zip(weights["1.weight"], weights["1.bias"])])
    assert_close(predict(network, x, weights=weights, memory=memory), expected, exact64)
    with torch.inference_mode():
        assert_close(predict(network, x, weights=weights, memory=memory), expected, exact64)
    assert torch.equal(x, kept)


def test_prediction_needs_draws_or_weights():
    network, x = with_posteriors(small_cnn()), torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    for arguments in ({}, {"draws": 2, "weights": mean_weights(network)}, {"draws": 2, "memory": 0}):
        with pytest.raises(Refusal, match="draws"):
            predict(network, x, **arguments)
    with pytest.raises(Refusal, match="not empty"):
        predict(network, x[:0], draws=2)
    with pytest.raises(Refusal, match="At least one draw"):
        predict(network, x, draws=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # raised inside the compiler
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


def test_half_precision_and_tiny_scales_stay_finite():
    network = with_posteriors(small_cnn(), scale=1e-12).float()
    out = forward(network, torch.randn(2, 1, 8, 8), 2)
    (out.square().mean() + kl_per_datum(network, 10)).backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())
    assert forward(network.bfloat16(), torch.randn(2, 1, 8, 8).bfloat16(), 2).dtype == torch.bfloat16


@pytest.mark.parametrize("estimator", ["whole", "split", "flipout", "local"])
def test_cuda_agrees_with_cpu(estimator, require_cuda):
    network, x = with_posteriors(small_cnn(), scale=1e-9), torch.randn(4, 1, 8, 8, dtype=torch.float64)
    expected = forward(network, x, 2, estimator)
    assert_close(forward(network.cuda(), x.cuda(), 2, estimator).cpu(), expected, 1e-6)
