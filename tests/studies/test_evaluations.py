"""Evaluations: sweeps, bounds, paths, and that equal networks are measured once."""
import math
import sys
from dataclasses import replace

import pytest
import torch

from helpers_studies import BASE
from symbnn.equivariance.metrics import defect_plugin, defect_unbiased
from symbnn.equivariance.predictions import orbit_predictions
from symbnn.errors import Refusal
from symbnn.hidden_units.mutual_information import mutual_information
from symbnn.layerwise.evidence import laplace, log_precisions
from symbnn.layerwise.precisions import learned_equivariance
from symbnn.posterior.layers import kl_sum
from symbnn.posterior.likelihoods import Categorical
from symbnn.posterior.sampling import predict
from symbnn.studies import evaluations
from symbnn.studies.evaluations import Evaluation, measure, measure_once
from symbnn.studies.methods import Baseline, PredictionAverage, run_method
from symbnn.studies.runs import perform, task_of
from symbnn.studies.tasks import prepare
from symbnn.symmetry.networks import network_action, unit_permutations
from tolerances import assert_close, within_standard_errors


@pytest.mark.parametrize("change, reason", [
    (dict(draws=2), "need three"), (dict(images=0), "number of images"), (dict(repeats=0), "repeats of a sweep"),
    (dict(sweep=(1, 0)), "draws in a sweep"), (dict(split="train"), "split"), (dict(mode="magic"), "mode"),
    ({"information": 1}, "at least 2"), ({"information": -4}, "at least 2"), ({"information": True}, "as information"),
])
def test_evaluations_that_cannot_be_meant_are_refused(change, reason):
    with pytest.raises(Refusal, match=reason):
        Evaluation(**change)


@pytest.mark.parametrize("evaluation, reason", [
    (Evaluation(images=5000), "5000 of 360"), (Evaluation(images=9, paths=True), "relaxed layers"),
])
def test_what_a_network_does_not_have_is_refused(evaluation, reason):
    task, _ = task_of(BASE, None)
    with pytest.raises(Refusal, match=reason):
        evaluation.check(task.network(0), task)


def rows_of(network, task, run):
    return measure(network, task, run.evaluation, run.method, run.seed).rows


@pytest.fixture
def measured(monkeypatch):
    """What is measured, and not remembered."""
    seen, real = [], evaluations.measure
    monkeypatch.setattr(evaluations, "_ANSWERS", {})
    monkeypatch.setattr(evaluations, "measure", lambda *given: seen.append(given) or real(*given))
    return seen


def test_equal_networks_are_measured_once(measured):
    """Runs that train the same weights share their rows; any other weights, seed or evaluation has its own."""
    run = BASE.changed({"training.epochs": 1})
    same = run.changed({"training.evaluation_draws": run.training.evaluation_draws + 1})  # draws nothing for training
    first, second = (perform(each).record["rows"][0] for each in (run, same))
    assert len(measured) == 1 and first | {"validation_nll": 0} == second | {"validation_nll": 0}
    others = [run.changed(change) for change in (
        {"training.learning_rate": 0.04}, {"evaluation.draws": run.evaluation.draws + 1})]
    found = [perform(each).record["rows"][0] for each in others]
    assert len(measured) == 3
    assert len({row["nll_nats"] for row in (first, *found)}) == 3


def test_each_part_of_a_question_matters(measured):
    task, _ = task_of(BASE, None)
    asked = task.network(0), task, BASE.evaluation, BASE.method, 0
    first = measure_once(*asked)
    others = [(task.network(1), *asked[1:]), (*asked[:2], replace(BASE.evaluation, images=10), *asked[3:]),
              (*asked[:3], PredictionAverage(), 0), (*asked[:4], 1)]
    assert measure_once(*asked) is first and len(measured) == 1
    assert all(measure_once(*other).rows != first.rows for other in others) and len(measured) == 5


def test_what_is_remembered_is_bounded(measured, monkeypatch):
    monkeypatch.setattr(evaluations, "REMEMBERED", 2)
    task, _ = task_of(BASE, None)
    networks = [task.network(seed) for seed in (0, 1, 2)]
    for network in (*networks, networks[2], networks[1], networks[0]):
        measure_once(network, task, BASE.evaluation, BASE.method, 0)
    assert len(measured) == 4 and len(evaluations._ANSWERS) == 2  # the first one had been forgotten


@pytest.mark.parametrize("name", ["0.weight.posterior.loc", "0.weight.posterior.log_scale", "0.bias.prior.log_scale"])
def test_networks_that_differ_have_other_fingerprints(name):
    network = task_of(BASE, None)[0].network(0)
    before = evaluations._fingerprint(network)
    assert evaluations._fingerprint(network) == before
    tensor = network.state_dict()[name]
    tensor.view(-1)[0] += 1e-5
    assert evaluations._fingerprint(network) != before


def test_bounds_of_q_and_of_its_average():
    """Against the closed divergence, all six permutations, and the likelihood of many more draws."""
    run = BASE.changed({"setup.architecture": "mlp", "setup.channels": (3,), "setup.group": "none",
                         "setup.initial_scale": 0.3, "evaluation.information": 200})
    task, _ = task_of(run, None)
    network = task.network(0)
    (row,) = rows_of(network, task, run)
    assert_close(row["kl_of_q_nats"], kl_sum(network).detach().item())
    exact = mutual_information(network, unit_permutations(network, task.data.shape), "enumeration", 2000,
                               generator=torch.Generator().manual_seed(1))
    error = math.hypot(row["information_nats_se"], exact.standard_error)
    within_standard_errors(row["information_nats"], exact.value, error)
    outputs = predict(network, task.data.train.inputs, draws=400, generator=torch.Generator().manual_seed(2))
    fits = Categorical().log_prob(outputs, task.data.train.labels).mean(1)
    within_standard_errors(row["fit_nats"], fits.mean(), fits.std() / 16**0.5)
    assert_close(row["elbo_of_q"], row["fit_nats"] - row["kl_of_q_nats"] / 64)
    assert_close(row["elbo_of_mixture"] - row["elbo_of_q"], row["information_nats"] / 64)
    assert row["information_method"] == "permanent"
    assert_close(row["information_ceiling_nats"], math.log(6))


@pytest.mark.parametrize("family", ["gaussian", "point"])
def test_paths_and_the_evidence(family):
    """Against the report and the evidence asked for by hand."""
    run = BASE.changed({"setup.architecture": "FC+CONV", "setup.channels": (2, 3), "setup.strides": (2, 2),
                         "setup.group": "none", "setup.family": family, "evaluation.paths": True})
    task, _ = task_of(run, None)
    network, data = task.network(0), task.data.train
    (row,) = rows_of(network, task, run)
    fitted = laplace(network, data.inputs, data.labels, seed=0) if family == "point" else None
    for its in learned_equivariance(network, fitted):
        assert_close(row[f"{its.layer}/{its.path}/share"], its.share)
        assert_close(row[f"{its.layer}/{its.path}/log_precision"], its.log_precision)
    for layer in ("layer1", "layer2"):
        assert_close(row[f"{layer}/fc/share"] + row[f"{layer}/conv/share"], 1.0)
    if family == "point":
        assert_close(row["log_evidence"], fitted.log_evidence(log_precisions(network)).item() / 64)
    else:
        outputs = predict(network, data.inputs, draws=400, generator=torch.Generator().manual_seed(2))
        fits = Categorical().log_prob(outputs, data.labels).mean(1)
        exact = fits.mean() - kl_sum(network).item() / 64
        within_standard_errors(row["log_evidence"], exact, fits.std() / 16**0.5)


def test_a_sweep_takes_the_first_draws_of_each_repeat():
    run = BASE.changed({"evaluation.sweep": (1, 2, 8), "evaluation.repeats": 2, "evaluation.mode": "shared"})
    task = prepare(run.setup)
    network = run_method(Baseline(), lambda factor: task.network(0, factor), task.data.train, run.training,
                         action=task.action).network
    rows = rows_of(network, task, run)
    assert [(row["repeat"], row["draws"]) for row in rows] == [(0, 1), (0, 2), (0, 8), (1, 1), (1, 2), (1, 8)]
    generator = torch.Generator().manual_seed(1_000_003)
    found = orbit_predictions(network, task.data.test.inputs[:20], network_action(network, task.action), 8, "shared",
                              generator=generator).probabilities
    assert [row["defect_plugin"] for row in rows[:3]] == [defect_plugin(found[:draws]) for draws in (1, 2, 8)]
    assert rows[2]["defect_unbiased"] == defect_unbiased(found).value and "defect_unbiased" not in rows[0]
    assert rows[5]["defect_plugin"] != rows[2]["defect_plugin"]


@pytest.mark.parametrize("group", ["C4", "none"])
def test_what_is_measured_is_known_before(group):
    run = BASE.changed({"setup.group": group})
    row = perform(run).record["rows"][0]
    named = {name for name in row if not name.endswith(("_se", "_se_inputs"))}
    assert named | {"training_multiply_adds"} == set(run.results())


def test_the_evidence_of_paths_asks_for_its_package(monkeypatch):
    changes = {"setup.architecture": "F-FC+CONV", "setup.group": "none", "setup.prior": "per_tensor",
               "training.augmentation": "none", "evaluation.paths": True}
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    BASE.changed(changes).check(None)
    with pytest.raises(Refusal, match="Curvlinops"):
        BASE.changed(changes | {"setup.family": "point"}).check(None)
