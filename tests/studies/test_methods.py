"""What is done to a posterior, and when: values, triggers, moments, resuming, and what each method leaves invariant."""
import json
import math
import signal
from dataclasses import asdict, fields, replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symbnn.equivariance.metrics import defect_plugin
from symbnn.equivariance.predictions import orbit_predictions
from symbnn.equivariance.projected_gradients import drift
from symbnn.errors import Refusal
from symbnn.layerwise.evidence import log_precisions, set_log_precisions
from symbnn.layerwise.precisions import elbo_precisions, evidence_precisions
from symbnn.posterior.layers import variational_tensors
from symbnn.posterior.sampling import apply_weights, mean_weights, predict
from symbnn.studies import methods
from symbnn.studies.methods import (
    METHODS,
    Average,
    Baseline,
    Expansion,
    LearnedPrecisions,
    PredictionAverage,
    TiedNetwork,
    make_method,
    read_method,
    run_method,
    start_folder,
    training_accuracy,
)
from symbnn.studies.tasks import Setup, prepare
from symbnn.symmetry.networks import network_action
from symbnn.training.checkpoints import read_checkpoint
from symbnn.training.config import TrainingConfig
from symbnn.training.loop import train
from tolerances import assert_close, exact32

AVERAGES, EXPANSIONS = ([name for name, its in METHODS.items() if its is kind] for kind in (Average, Expansion))
TASK = prepare(Setup(channels=(2, 4), train_size=64), dtype=torch.float64)
CONFIG = TrainingConfig(epochs=4, batch_size=64, learning_rate=0.02, dtype="float64")
INPUTS = TASK.data.test.inputs[:10]


def build(factor, seed=0):
    return TASK.network(seed, factor, torch.float64)


def of_family(family):
    return partial(prepare(Setup(family=family, channels=(2, 4)), dtype=torch.float64).network, 0, dtype=torch.float64)


def run(method, config=CONFIG, make=build, **options):
    return run_method(method, make, TASK.data.train, config, action=TASK.action, prior=TASK.prior(), **options)


def numbers(trained):
    return [record._replace(seconds=0) for record in trained.history]


def orbit(network, draws=4):
    generator = torch.Generator().manual_seed(0)
    return orbit_predictions(network.eval(), INPUTS, network_action(network, TASK.action), draws, generator=generator)


def defect(network):
    return defect_plugin(orbit(network).probabilities)


@pytest.fixture
def optimizers(monkeypatch):
    """What the optimiser remembers at the start of each call of `train` in `run`, and after each epoch: how many
    parameters have a state."""
    real, seen = methods.train, []

    def spying(network, data, config, *, after=None, **options):
        seen.append(("begin", 0 if after is None else len(after.optimizer.state)))
        return real(network, data, config, after=after, **options | {
            "callbacks": lambda end: seen.append((end.record.epoch, len(end.optimizer.state)))})

    monkeypatch.setattr(methods, "train", spying)
    return seen


# Values


@given(st.sampled_from([*AVERAGES, *EXPANSIONS]), st.booleans(),
       st.one_of(st.integers(0, 10**6), st.floats(0.01, 0.99)))
def test_a_method_survives_json_and_its_own_name(name, projected, trigger):
    method = make_method(name, projected=projected, trigger=trigger)
    assert make_method(**json.loads(json.dumps(asdict(method)))) == method == read_method(str(method), trigger=trigger)


@pytest.mark.parametrize("name", METHODS)
def test_each_name_stands_for_one_class_with_its_own_options(name):
    method = make_method(name)
    assert type(method) is METHODS[name] and method.name == str(method) == name and read_method(name) == method
    assert make_method(**asdict(method)) == method
    options = {its.name for its in fields(method)} - {"name"}
    expected = {Average: {"trigger", "projected", "keep_moments"}, Expansion: {"trigger", "projected"},
                LearnedPrecisions: {"rule", "first", "every"}}
    assert options == expected.get(type(method), set())
    assert method.changes == (type(method) in (Average, Expansion)) and not (method.trigger or method.projected)


@pytest.mark.parametrize("wrong, reason", [
    (dict(name="magic"), "one of baseline.* as method"),
    (dict(name="geometric", trigger=-1), "accuracy between 0 and 1"),
    (dict(name="geometric", trigger=1.5), "accuracy between 0 and 1"),
    (dict(name="geometric", trigger=True), "of its type as trigger"),
    (dict(name="geometric", trigger="20"), "of its type as trigger"),
    (dict(name="baseline", trigger=5), "no other options of baseline than none"),
    (dict(name="tied", projected=True), "no other options of tied than none"),
    (dict(name="regular", trigger=1, keep_moments=True), "no other options of regular than trigger, projected"),
    (dict(name="learned_precisions", rule="guess"), "one of elbo, evidence.* as rule that precisions follow"),
    (dict(name="learned_precisions", every=0), "between updates of precisions"),
    (dict(name="learned_precisions", first=1.5), "of its type as first"),
    (dict(name="wide", rule="elbo"), "no other options of wide than none"),
])
def test_methods_that_cannot_be_meant_are_refused(wrong, reason):
    with pytest.raises(Refusal, match=reason):
        make_method(**wrong)


def test_a_class_has_its_own_names():
    with pytest.raises(Refusal, match=r"one of geometric, arithmetic, projection.* as method"):
        Average("regular")


@pytest.mark.parametrize("text", ["", "magic", "regular+magic", "+projected", "baseline+projected"])
def test_names_that_are_none_are_refused(text):
    with pytest.raises(Refusal):
        read_method(text)


def test_widths_are_those_of_the_networks():
    for name in METHODS:
        method = make_method(name)
        network = method.start(build, TASK.action)
        before, after = method.widths(4)
        assert variational_tensors(network)["0.weight"].posterior.shape[0] == 2 * before
        if method.changes:
            network = method.change(network, TASK.action).network
        assert variational_tensors(network)["0.weight"].posterior.shape[0] == 2 * after


# Triggers


@pytest.mark.parametrize("name", [*AVERAGES, "block_diagonal"])
def test_nothing_differs_before_the_trigger(name):
    plain, late = run(Baseline()), run(make_method(name, trigger=2))
    assert numbers(late)[:2] == numbers(plain)[:2]
    assert numbers(late)[2] != numbers(plain)[2] and len(late.history) == 4
    assert (plain.changed, late.changed, late.status) == (None, 2, "complete")


@pytest.mark.parametrize("trigger", [0, 4])
def test_averages_at_the_ends_of_a_run(trigger):
    trained = run(Average("projection", trigger=trigger))
    moved = drift(trained.network, network_action(trained.network, TASK.action)).relative
    assert trained.changed == trigger
    if trigger:
        assert moved < 1e-14
    else:
        assert 1e-6 < moved < drift(run(Baseline()).network, network_action(build(1), TASK.action)).relative


def test_an_expansion_at_the_end_is_the_orbit_average_of_the_baseline():
    small, expanded = run(Baseline()).network, run(Expansion("block_diagonal", trigger=4)).network
    turned = [apply_weights(small, TASK.action.act(g, INPUTS), mean_weights(small)) for g in range(4)]
    assert_close(apply_weights(expanded, INPUTS, mean_weights(expanded)), torch.stack(turned).mean(0))


@pytest.mark.parametrize("accuracies, changed", [([0.2, 0.49, 0.5, 0.9], 3), ([0.9] * 4, 1), ([0.1] * 4, None)])
def test_a_trigger_by_accuracy(accuracies, changed, monkeypatch):
    values = iter(accuracies)
    monkeypatch.setattr(methods, "training_accuracy", lambda *arguments: next(values))
    assert run(Average("geometric", trigger=0.5)).changed == changed


def test_training_accuracy_is_that_of_the_predictive_mean():
    network, data = run(Baseline()).network, TASK.data.train
    found = training_accuracy(network, data, torch.Generator().manual_seed(3), draws=5)
    outputs = predict(network, data.inputs, draws=5, generator=torch.Generator().manual_seed(3))
    assert found == (outputs.softmax(-1).mean(0).argmax(-1) == data.labels).double().mean().item()
    assert network.training


@pytest.mark.parametrize("keep", [False, True])
def test_moments_are_cleared_or_kept(keep, optimizers):
    run(Average("geometric", trigger=2, keep_moments=keep))
    every = 12  # locations and scales of weights and biases, of two convolutions and the head
    assert optimizers == [("begin", 0), (0, every), (1, every), ("begin", every if keep else 0), (2, every), (3, every)]


def test_moments_matter_to_what_follows_and_not_to_the_average():
    kept, cleared = (run(Average("geometric", trigger=2, keep_moments=keep)) for keep in (True, False))
    assert numbers(kept)[:2] == numbers(cleared)[:2] and numbers(kept)[3] != numbers(cleared)[3]


def test_an_expansion_has_a_new_optimiser(optimizers):
    run(Expansion("regular", trigger=2))
    assert optimizers == [("begin", 0), (0, 12), (1, 12), ("begin", 0), (2, 12), (3, 12)]


# Stopped and gone on with


def press_ctrl_c(at):
    """A `train` that presses Ctrl-C at the end of an epoch, whichever call that is in."""
    def pressing(network, data, config, **options):
        def stop(end):
            if end.record.epoch == at:
                signal.raise_signal(signal.SIGINT)

        return train(network, data, config, **options | {"callbacks": stop})

    return pressing


@pytest.mark.parametrize("method", [Average("geometric", trigger=2, keep_moments=True),
                                    Average("projection", trigger=2),
                                    Average("projection", projected=True, trigger=2),
                                    Expansion("block_diagonal", trigger=2), Expansion("regular", trigger=0),
                                    Average("geometric", trigger=0.15)], ids=str)
@pytest.mark.parametrize("at", range(4))
def test_a_run_that_is_stopped_and_resumed_is_the_same_run(method, at, tmp_path, monkeypatch):
    straight = run(method, folder=tmp_path / "straight")
    with monkeypatch.context() as patch:
        patch.setattr(methods, "train", press_ctrl_c(at))
        stopped = run(method, folder=tmp_path / "stopped")
    assert (stopped.status, len(stopped.history)) == ("complete" if at == 3 else "interrupted", at + 1)
    resumed = run(method, folder=tmp_path / "stopped")
    assert resumed.status == "complete" and resumed.changed == straight.changed
    assert numbers(resumed) == numbers(straight) == numbers(run(method))
    for one, other in zip(resumed.network.parameters(), straight.network.parameters(), strict=True):
        assert torch.equal(one, other)
    one, other = (read_checkpoint(tmp_path / name).tensors for name in ("straight", "stopped"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_kill_between_the_calls_repeats_nothing(tmp_path, monkeypatch):
    method, begun = Expansion("block_diagonal", trigger=2), []
    expected = numbers(run(method))
    train(build(1), TASK.data.train, CONFIG, action=TASK.action, folder=start_folder(tmp_path / "run"),
          until=lambda epochs, net: epochs == 2)
    monkeypatch.setattr(methods, "train", lambda network, *given, **options: begun.append(
        (options["folder"].name, options["resume"])) or train(network, *given, **options))
    resumed = run(method, folder=tmp_path / "run")
    assert begun == [("run-start", True), ("run", False)] and numbers(resumed) == expected
    first = read_checkpoint(tmp_path / "run-start").description
    assert first["progress"]["status"] == "stopped" and len(first["history"]) == 2


def test_a_run_may_begin_with_a_trained_network():
    small = run(Baseline()).network
    kept = {name: value.clone() for name, value in small.state_dict().items()}
    made = Expansion("block_diagonal").change(run(Baseline()).network, TASK.action, TASK.prior())
    expected = train(made.network, TASK.data.train, CONFIG, action=TASK.action)
    found = run(Expansion("block_diagonal"), network=small)
    assert numbers(found) == [record._replace(seconds=0) for record in expected.history] and found.changed == 0
    assert all(torch.equal(value, kept[name]) for name, value in small.state_dict().items())


# What is invariant, and how long


@pytest.mark.parametrize("name", [*AVERAGES, "regular", "row_rolled", "block_diagonal"])
@pytest.mark.parametrize("trigger", [0, 2])
def test_projected_gradients_keep_what_the_trigger_made(name, trigger):
    trained, free = (run(make_method(name, projected=projected, trigger=trigger)) for projected in (True, False))
    assert drift(trained.network, make_method(name).change(build(1), TASK.action).action).relative < 1e-15
    assert defect(free.network) > 0
    assert numbers(trained)[:trigger] == numbers(free)[:trigger] and numbers(trained)[3] != numbers(free)[3]
    hooks = [p._backward_hooks for p in trained.network.parameters()]
    assert not any(hooks)


def test_hooks_are_removed_when_training_fails():
    network = build(1)
    with pytest.raises(Refusal, match="finite"):
        run(Average("projection", projected=True), TrainingConfig(epochs=2, batch_size=64, learning_rate=1e38,
                                                                 dtype="float64"), make=lambda factor: network)
    assert not any(p._backward_hooks for p in network.parameters())


@pytest.mark.parametrize("name", ["tied", "tied_small"])
def test_every_draw_of_a_tied_network_is_invariant(name):
    probabilities = orbit(run(make_method(name)).network).probabilities
    assert_close(probabilities, probabilities[:, :, :1].expand_as(probabilities))
    assert probabilities.std(0).max() > 1e-3


def test_the_orbit_mixture_averages_predictions_and_nothing_else():
    network, plain = run(PredictionAverage()).network, run(Baseline()).network
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), plain.parameters()))
    predictions = orbit(network)
    mean = PredictionAverage().predictions(predictions).probabilities
    assert_close(mean, predictions.probabilities.mean(2, keepdim=True).expand_as(mean), exact32)
    assert Baseline().predictions(predictions) is predictions and defect_plugin(mean) == 0 < defect(network)


# Refusals


@pytest.mark.parametrize("method, make, reason", [
    (Expansion("row_constant", projected=True, trigger=2), build, "invariant network"),
    (Average("geometric", trigger=5), build, "trigger within"),
    (LearnedPrecisions(first=5), build, "in which precisions are learned"),
    (Average("arithmetic", trigger=2), of_family("laplace"), "exponential family"),
    (TiedNetwork(), lambda factor: build(1), "multiple of 4 channels"),
    (Expansion("block_diagonal"), of_family("lognormal"), "LogNormal"),
])
def test_refusals_come_before_training(method, make, reason, monkeypatch):
    monkeypatch.setattr(methods, "train", lambda *arguments, **others: pytest.fail("training began"))
    with pytest.raises(Refusal, match=reason):
        run(method, make=make)


def test_a_prior_that_is_not_invariant_cannot_be_kept_so():
    task = prepare(Setup(channels=(2, 4), prior="random_means"))
    Average("projection").check(lambda factor: task.network(0, factor), task.action, CONFIG)
    with pytest.raises(Refusal, match="prior"):
        Average("projection", projected=True).check(lambda factor: task.network(0, factor), task.action, CONFIG)


def test_the_guard_of_other_methods_does_nothing():
    with Baseline().guard(Baseline().change(build(1), TASK.action)) as nothing:
        assert nothing is None


# Precisions


PLAIN = TrainingConfig(epochs=3, batch_size=32, learning_rate=0.02, dtype="float64", augmentation="none", draws=2)


def relaxed(family):
    task = prepare(Setup(family=family, architecture="FC+CONV", channels=(2,), strides=(2,), group="none",
                         train_size=64), dtype=torch.float64)
    return task, lambda factor=1: task.network(0, factor, torch.float64)


@pytest.mark.parametrize("family, rule", [("gaussian", "elbo"), ("point", "evidence")])
def test_precisions_are_learnt_on_their_schedule(family, rule):
    """As by a callback of `train` that asks the rule, after epochs 1 and 3 of 3."""
    task, make = relaxed(family)
    method = LearnedPrecisions(rule=rule, first=1, every=2)
    found = run_method(method, make, task.data.train, PLAIN, action=task.action).network
    asked = []

    def by_hand(end):
        if end.epochs in (1, 3):
            asked.append(end.epochs)
            data, network = task.data.train, end.network
            set_log_precisions(network, elbo_precisions(network) if rule == "elbo" else evidence_precisions(
                network, data.inputs, data.labels, curvature="sampled"))

    expected = train(make(), task.data.train, PLAIN, action=task.action, callbacks=by_hand).network
    assert asked == [1, 3]
    for name, value in log_precisions(expected).items():
        assert_close(log_precisions(found)[name], value)
        assert (value - log_precisions(make())[name]).abs() > 1e-3, name
    for one, two in zip(found.parameters(), expected.parameters(), strict=True):
        assert_close(one, two)
    if rule == "elbo":  # learnt last, so at its optimum for the posterior as it is
        for name, value in elbo_precisions(found).items():
            assert_close(log_precisions(found)[name], value)


def test_precisions_stay_where_sgd_does_not_diverge():
    """A step on d w^2 / (2 N) multiplies w by 1 - rate d / N, which at the ceiling is 0; beyond -1 it diverges."""
    data, method = TASK.data.train, LearnedPrecisions(rule="elbo")
    sgd = replace(PLAIN, optimizer="sgd", learning_rate=0.5)
    d = math.exp(method.updates(data, sgd).ceiling)
    assert_close(1 - 0.5 * d / len(data), 0.0)
    assert method.updates(data, PLAIN).ceiling == 20.0
    assert Baseline().updates(data, sgd) is None


@pytest.mark.parametrize("family, rule, config, reason", [
    ("gaussian", "evidence", PLAIN, "point masses"),
    ("point", "elbo", PLAIN, "point masses"),
    ("point", "evidence", CONFIG, "without augmentation for the evidence"),
])
def test_precisions_are_refused_before_training(family, rule, config, reason, monkeypatch):
    monkeypatch.setattr(methods, "train", lambda *arguments, **others: pytest.fail("training began"))
    task, make = relaxed(family)
    with pytest.raises(Refusal, match=reason):
        run_method(LearnedPrecisions(rule=rule, first=1), make, task.data.train, config, action=task.action)
