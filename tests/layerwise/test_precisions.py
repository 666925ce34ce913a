"""Precisions that are learned: the steps, the two rules, the schedule, what is pruned, the report."""
import math
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from helpers import normal
from helpers_layerwise import convolutional, fitted_pair, labels, started, with_factors, with_precisions
from symbnn.data.splits import Split
from symbnn.errors import Refusal
from symbnn.layerwise.evidence import LaplaceApproximation, laplace, log_precisions, set_log_precisions
from symbnn.layerwise.kronecker import KroneckerCurvature
from symbnn.layerwise.precisions import (
    PrecisionUpdates,
    elbo_precisions,
    equivariance_picture,
    equivariance_table,
    evidence_precisions,
    learned_equivariance,
    posterior_dimensions,
    raise_evidence,
)
from symbnn.layerwise.relaxed_networks import pathways, relaxed_network
from symbnn.posterior.block_gaussian import BlockGaussian
from symbnn.posterior.elbo import elbo
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.layers import kl_sum, posterior_mean_network, variational_tensors, with_posteriors
from symbnn.posterior.point_mass import PointMass
from symbnn.posterior.priors import isotropic, per_tensor
from symbnn.posterior.sampling import forward
from symbnn.training.config import TrainingConfig
from symbnn.training.loop import train
from tolerances import assert_close


@with_factors
@pytest.mark.parametrize("curvature", ["exact", "full"])
def test_the_evidence_rises_in_every_step_to_its_stationary_point(curvature):
    fitted, at = fitted_pair(curvature)
    at = {name: value + 3 for name, value in at.items()}  # twenty steps go two thirds of the way at most
    values = [fitted.log_evidence(raise_evidence(fitted, at, steps)).item() for steps in range(21)]
    assert values[0] == fitted.log_evidence(at).item() and all(b > a for a, b in pairwise(values))
    steps = raise_evidence(fitted, at, 1)
    assert all(abs(abs(float(steps[name] - at[name])) - 0.1) < 1e-6 for name in at)  # Adam's first step is its rate
    best = at
    for _ in range(4):
        best = raise_evidence(fitted, best, 200, 0.05)
    gamma = fitted.effective_dimensions(best)
    for name, value in best.items():
        assert_close(float(value.exp() * fitted.squared_norms[name]) / gamma[name], 1.0, 1e-3)  # of 800 steps of Adam


def test_maximum_a_posteriori_is_the_elbo_of_point_masses():
    network, x, y = with_precisions(convolutional()), normal(9, 1, 8, 8), labels(9)
    loss = -elbo(network, forward(network, x), y, 40).elbo
    loss.backward()
    locs = {name: tensor.posterior.loc for name, tensor in variational_tensors(network).items()}
    plain = posterior_mean_network(network)
    penalty = sum(value.exp() * plain.get_parameter(name).square().sum()
                  for name, value in log_precisions(network).items())
    (F.cross_entropy(plain(x), y) + penalty / (2 * 40)).backward()
    for name, loc in locs.items():
        assert_close(loc.grad, plain.get_parameter(name).grad)


@pytest.mark.parametrize("family", [MeanFieldGaussian, Laplace, BlockGaussian, FullGaussian])
def test_the_elbos_precision_minimises_the_divergence(family):
    plain = started(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))

    def prior(name, posterior):
        return MeanFieldGaussian(torch.zeros(posterior.shape).double(), torch.zeros(posterior.shape).double(),
                                 trainable=False)

    network = with_posteriors(plain, family, 0.3, prior)
    best = elbo_precisions(network)
    set_log_precisions(network, best)
    least, step = kl_sum(network).item(), 1e-3
    for name, value in best.items():
        around = []
        for shift in (-step, step):
            set_log_precisions(network, {name: value + shift})
            around.append(kl_sum(network).item())
        set_log_precisions(network, {name: value})
        assert min(around) > least and abs(around[1] - around[0]) < 1e-3 * (sum(around) - 2 * least)
    gamma = posterior_dimensions(network)
    for name, tensor in variational_tensors(network).items():
        square = tensor.posterior.mean.detach().square().sum()
        assert_close(gamma[name], best[name].exp() * square)


def test_the_elbo_refuses_point_masses():
    network = with_posteriors(nn.Linear(3, 2), PointMass)
    for ask in (elbo_precisions, posterior_dimensions):
        with pytest.raises(Refusal, match=r"point|Point"):
            ask(network)


DATA = Split(normal(60, 1, 6, 6).float(), labels(60))


MAP = TrainingConfig(epochs=9, batch_size=30, estimator="whole", draws=1, augmentation="none", evaluation_draws=1)


def small(family=PointMass, seed: int = 0, prior=None):
    start = torch.Generator().manual_seed(seed)
    plain = relaxed_network("FC+CONV", (1, 6, 6), 3, channels=(2,), strides=(2,), generator=start)
    return with_posteriors(plain, family, 0.01, prior or isotropic())


def test_updates_keep_their_schedule_and_ceiling():
    network, calls = small(), []

    def rule(network):
        calls.append(log_precisions(network)["layer1.conv.filter.weight"].item())
        return {name: value + 1.5 for name, value in log_precisions(network).items()}

    updates = PrecisionUpdates(rule, first=2, every=3, ceiling=4.0)
    train(network, DATA, MAP, callbacks=updates)
    assert [each["epoch"] for each in updates.history] == [2, 5, 8]
    assert_close(torch.tensor(calls), torch.tensor([0.0, 1.5, 3.0]), 1e-6)  # stored as a float32 log-scale
    assert set(updates.history[-1]) == {"epoch", *variational_tensors(network)}
    assert all(math.isclose(value, 4.0, rel_tol=1e-6) for value in log_precisions(network).values())


@with_factors
def test_a_run_that_is_continued_equals_one_that_was_not(tmp_path):
    rule = partial(evidence_precisions, inputs=DATA.inputs, targets=DATA.labels)
    two, four = replace(MAP, epochs=2), replace(MAP, epochs=4)
    straight = train(small(), DATA, four, callbacks=PrecisionUpdates(rule, 2, 1)).network
    train(small(), DATA, two, callbacks=PrecisionUpdates(rule, 2, 1), folder=tmp_path)
    resumed = train(small(seed=5), DATA, four, callbacks=PrecisionUpdates(rule, 2, 1), folder=tmp_path,
                    resume=True).network
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in straight.state_dict().items())
    assert log_precisions(straight)["layer1.fc.dense.weight"] != 0


def bars(count: int, where: bool) -> Split:
    """Noisy 6 x 6 images of a bar: its direction, and with `where` also the half in which it begins."""
    generator = torch.Generator().manual_seed(0)
    images, kind = 0.3 * torch.randn(count, 1, 6, 6, generator=generator), labels(count, 2)
    places, shapes = torch.randint(6, (count, 2), generator=generator), torch.zeros(2, 6, 6)
    shapes[0, 0, :3] = shapes[1, :3, 0] = 1.5
    for image, k, (row, column) in zip(images, kind, places.tolist()):
        image[0] += shapes[k].roll((row, column), (0, 1))
    return Split(images, kind + 2 * (places[:, 1] >= 3) if where else kind)


def learn(where: bool):
    data = bars(400, where)
    plain = relaxed_network("FC+CONV", (1, 6, 6), 4, channels=(4,), strides=(1,),
                            generator=torch.Generator().manual_seed(0))
    network = with_posteriors(plain, PointMass)
    updates = PrecisionUpdates(partial(evidence_precisions, inputs=data.inputs, targets=data.labels,
                                         curvature="sampled"), 10, 3)
    config = TrainingConfig(epochs=80, batch_size=100, estimator="whole", draws=1, learning_rate=0.02,
                            schedule="cosine", augmentation="none", evaluation_draws=1)
    train(network, data, config, callbacks=updates)
    report = learned_equivariance(network, laplace(network, data.inputs, data.labels))
    return {row.path: row for row in report}, updates.history


@with_factors
def test_an_unneeded_path_is_pruned_and_a_needed_one_is_not():
    rows, history = learn(where=False)
    grown = [each["layer1.fc.dense.weight"] for each in history]
    assert all(b > a for a, b in pairwise(grown[4:])) and grown[-1] > 6
    assert rows["fc"].pruned and not rows["conv"].pruned and rows["conv"].share > 0.9
    assert rows["fc"].norm < 0.1 * rows["conv"].norm
    rows, history = learn(where=True)
    assert not rows["fc"].pruned and rows["fc"].share > 0.7 and history[-1]["layer1.fc.dense.weight"] < 6


def test_report_by_widths():
    network = small(MeanFieldGaussian, prior=per_tensor(1.4))
    for tensor in variational_tensors(network).values():  # biases too: norms of several tensors
        nn.init.normal_(tensor.posterior.loc, generator=torch.Generator().manual_seed(3))
    set_log_precisions(network, elbo_precisions(network))
    rows = learned_equivariance(network)
    gamma, precisions = posterior_dimensions(network), log_precisions(network)
    assert [(row.layer, row.path) for row in rows] == [("layer1", "conv"), ("layer1", "fc")]
    for row in rows:
        names = pathways(network)["layer1"][row.path]
        tensors = [variational_tensors(network)[name] for name in names]
        assert row.weights == sum(tensor.posterior.numel for tensor in tensors)
        assert_close(row.effective_dimension, sum(gamma[name] for name in names))
        square = sum(tensor.posterior.mean.detach().double().square().sum() for tensor in tensors)
        assert_close(row.norm**2 / square, torch.tensor(1.0), 1e-5)  # float32
        assert_close(row.log_precision * row.weights, sum(
            precisions[name] * tensor.posterior.numel for name, tensor in zip(names, tensors)))
    assert_close(sum(row.share for row in rows), 1.0)
    table = equivariance_table(rows)
    assert table.count("\n") == 3 and "| layer1 | conv |" in table
    with pytest.raises(Refusal, match=r"point|Point"):
        learned_equivariance(small())
    with pytest.raises(Refusal, match="empty report"):
        equivariance_picture([])
    with pytest.raises(Refusal, match="relaxed layers"):
        learned_equivariance(with_posteriors(nn.Linear(3, 2)))


@settings(max_examples=20)
@given(st.floats(-3, 30), st.floats(-3, 30))
@example(3.66, 3.66)  # half a dimension of 20 weights, which is kept
def test_what_counts_as_pruned(first, second):
    """Of a spectrum that is known: gamma of a path with eigenvalue 1 for each weight is weights / (1 + d)."""
    network = small()
    tensors = variational_tensors(network)
    precisions = {name: first if ".conv." in name else second for name in tensors}
    set_log_precisions(network, {name: torch.tensor(value) for name, value in precisions.items()})
    one = torch.ones(1).double()
    known = KroneckerCurvature({
        name: ((torch.ones(tensor.posterior.numel).double(), one),) for name, tensor in tensors.items()})
    fitted = LaplaceApproximation(0.0, {name: one[0] for name in tensors}, known)
    rows = learned_equivariance(network, fitted)
    gamma = [row.weights / (1 + math.exp(precisions[f"layer1.{row.path}.{'filter' if row.path == 'conv' else 'dense'}"
                                                    ".weight"])) for row in rows]
    for row, value in zip(rows, gamma):
        assert_close(row.effective_dimension / value, 1.0, 1e-5)  # priors hold their scales in float32
        assert row.pruned is (value < min(1, row.weights / 100) or value < 0.01 * sum(gamma))


def test_picture():
    network = small(MeanFieldGaussian)
    rows = learned_equivariance(network)
    figure = equivariance_picture([row._replace(pruned=row.path == "fc") for row in rows])
    shares, precisions = figure.axes
    assert_close(sum(bar.get_width() for bar in shares.patches), sum(row.share for row in rows))
    assert {line.get_marker() for line in precisions.lines if len(line.get_xdata())} == {"o", "x"}
    assert "share of the effective dimension" in shares.get_xlabel()


def test_options_that_make_no_sense_are_refused():
    fitted, at = fitted_pair("full", 4)
    for options, words in (({"steps": -1}, "number of steps"), ({"learning_rate": 0.0}, "positive learning rate"),
                           ({"steps": 2.0}, "number of steps")):
        with pytest.raises(Refusal, match=words):
            raise_evidence(fitted, at, **options)
    with pytest.raises(Refusal, match=r"laplace\(network, inputs, targets\)"):
        raise_evidence(at, at)
    with pytest.raises(Refusal, match=r"PrecisionUpdates\(elbo_precisions\)"):
        PrecisionUpdates(at)
    for options in ({"first": 0}, {"every": 0}, {"every": 1.5}):
        with pytest.raises(Refusal, match="number of epochs"):
            PrecisionUpdates(elbo_precisions, **options)
    with pytest.raises(Refusal, match=r"laplace\(network, inputs, targets\)"):
        learned_equivariance(small(MeanFieldGaussian), at)


def test_the_picture_needs_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(Refusal, match=r"symbnn\[plots\]"):
        equivariance_picture(learned_equivariance(small(MeanFieldGaussian)))
