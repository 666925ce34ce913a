"""Tasks as values: setups, the groups that act, what training costs, training with a description, evaluation."""
import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symbnn.data.sources import load
from symbnn.data.transforms import vary
from symbnn.errors import Refusal
from symbnn.layerwise.evidence import laplace
from symbnn.layerwise.precisions import learned_equivariance
from symbnn.posterior.families import FAMILIES
from symbnn.posterior.layers import with_posteriors
from symbnn.studies import tasks
from symbnn.studies.methods import Baseline, Expansion, LearnedPrecisions, PredictionAverage
from symbnn.studies.tasks import (
    PRIORS,
    SYMMETRIES,
    Setup,
    check_training,
    chosen_images,
    epoch_cost,
    evaluate_task,
    fit,
    path_reports,
    prepare,
    read_notes,
    using_threads,
)
from symbnn.training.architectures import PRESETS, build, multiply_adds
from symbnn.training.checkpoints import read_checkpoint, save_network
from symbnn.training.config import TrainingConfig

SETUP = Setup(channels=(2, 4), train_size=64)
CONFIG = TrainingConfig(epochs=1, batch_size=64)


# Setups


@given(
    group=st.sampled_from(sorted(SYMMETRIES)), family=st.sampled_from(sorted(FAMILIES)),
    prior=st.sampled_from(sorted(PRIORS)),
    channels=st.lists(st.integers(1, 64), min_size=1, max_size=3).map(tuple), scale=st.floats(1e-3, 1.0),
)
def test_a_setup_survives_json(group, family, prior, channels, scale):
    setup = Setup(group=group, family=family, prior=prior, channels=channels, initial_scale=scale)
    assert Setup(**json.loads(json.dumps(asdict(setup)))) == setup


@pytest.mark.parametrize("change, reason", [
    ({"dataset": "cifar"}, "one of digits.* as data set"),
    ({"group": "S5"}, "one of C4.* as group"),
    ({"variant": "mirrored"}, "one of plain.* as variant"),
    ({"family": "normal"}, "one of gaussian.* as family"),
    ({"prior": "flat"}, "one of isotropic.* as prior"),
    ({"initial_scale": -1.0}, "initial scale"),
    ({"prior_scale": math.nan}, "prior's scale"),
])
def test_setups_that_cannot_be_meant_are_refused(change, reason):
    with pytest.raises(Refusal, match=reason):
        Setup(**change)


def test_a_setup_names_a_variant_and_the_absence_of_a_symmetry():
    task = prepare(replace(SETUP, variant="quadrant", size=8, group="none"))
    expected = vary(load("digits", train_size=64), "quadrant", 8)
    assert torch.equal(task.data.test.inputs, expected.test.inputs) and len(task.data.classes) == 40
    assert task.action.group.order == 1 and task.checksum() != prepare(SETUP).checksum()
    found, predictions = evaluate_task(task.network(0), task, images=5, draws=4)
    assert predictions.shape == (5, 1, 40) and "defect_unbiased" not in found and found["nll_nats"] > 0


@pytest.mark.parametrize("change, reason", [
    ({"group": "shifts"}, "circular shift"),
    ({"architecture": "F-FC+CONV"}, "in its paths"),
    ({"architecture": "tree"}, '"cnn", "mlp"'),
    ({"channels": (8, 8, 8, 8)}, "pool"),
    ({"train_size": 100_000}, "training"),
    ({"size": 0}, "size of the images"),
])
def test_tasks_that_cannot_be_are_refused(change, reason):
    with pytest.raises(Refusal, match=reason):
        prepare(Setup(**change))


@pytest.mark.parametrize("group, order", [("C4", 4), ("D4", 8), ("flips", 2), ("half_turns", 2)])
def test_the_groups_act(group, order):
    assert prepare(replace(SETUP, group=group)).action.group.order == order


def test_networks_depend_on_the_seed_alone():
    task = prepare(SETUP)
    first, again, other = (task.network(seed)[0].weight.posterior.loc for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("channels, wanted, expected", [((2, 4), None, 1), ((256, 256), None, 4), ((2, 4), 3, 3)])
def test_threads_are_for_large_steps_and_given_back(channels, wanted, expected, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(tasks, "train", lambda *arguments, **others: pytest.fail("reached"))
    task = prepare(replace(SETUP, channels=channels))
    with pytest.raises(pytest.fail.Exception, match="reached"):
        fit(task.network(0), task, TrainingConfig(batch_size=64), threads=wanted)
    assert seen == [expected, 4]


def test_threads_are_given_back_after_an_error():
    before, seen = torch.get_num_threads(), []

    def fail():
        with using_threads(before + 1):
            seen.append(torch.get_num_threads())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [before + 1] and torch.get_num_threads() == before


@pytest.mark.parametrize("estimator, passes", [("split", 1), ("local", 1), ("whole", 8), ("flipout", 16)])
@pytest.mark.parametrize("group, augmentation, copies", [("C4", "full", 4), ("D4", "full", 8), ("C4", "none", 1)])
def test_an_epoch_costs_three_passes_of_what_the_estimator_makes(estimator, passes, group, augmentation, copies):
    task = prepare(replace(SETUP, group=group))
    config = TrainingConfig(estimator=estimator, augmentation=augmentation)
    each = multiply_adds(task.network(0, 2), (1, 8, 8))
    assert epoch_cost(task, 2, config) == 3 * passes * copies * 64 * each


# Training with a description


def test_a_checkpoint_notes_setup_and_method_and_is_resumed_with_these_alone(tmp_path):
    task = prepare(replace(SETUP, group="none", prior="per_tensor"))
    config = replace(CONFIG, augmentation="none", batch_size=32)
    method = LearnedPrecisions(first=1, every=1)
    fit(task.network(0), task, config, method=method, folder=tmp_path, notes={"mine": 1})
    checkpoint = read_checkpoint(tmp_path)
    assert read_notes(checkpoint) == (task.setup, method) and checkpoint.description["notes"]["mine"] == 1
    longer, options = replace(config, epochs=2), {"folder": tmp_path, "resume": True}
    with pytest.raises(Refusal, match="every 1 in the checkpoint, 2 now"):
        fit(task.network(0), task, longer, method=LearnedPrecisions(first=1, every=2), **options)
    with pytest.raises(Refusal, match="name 'learned_precisions' in the checkpoint, 'baseline' now"):
        fit(task.network(0), task, longer, **options)
    other = task._replace(setup=replace(task.setup, prior_scale=0.5))
    with pytest.raises(Refusal, match=r"prior_scale 1\.0 in the checkpoint, 0.5 now"):
        fit(task.network(0), other, longer, method=method, **options)
    assert len(fit(task.network(5), task, longer, method=method, **options).history) == 2


def test_checkpoints_without_notes_are_refused(tmp_path):
    save_network(tmp_path, with_posteriors(build(PRESETS["digits"])), PRESETS["digits"])
    with pytest.raises(Refusal, match="notes without a setup"):
        read_notes(read_checkpoint(tmp_path))


@pytest.mark.parametrize("method", [Expansion(), PredictionAverage()])
def test_what_does_not_leave_a_network_as_it_is_cannot_be_fitted(method):
    task = prepare(SETUP)
    with pytest.raises(Refusal, match="leaves the network what it is"):
        fit(task.network(0), task, CONFIG, method=method)


@pytest.mark.parametrize("change, reason", [({"batch_size": 500}, "500 of 256"), ({"device": "abacus"}, "device"),
                                            ({"estimator": "flipout"}, "flipout")])
def test_what_training_would_refuse_is_known_before(change, reason):
    with pytest.raises(Refusal, match=reason):
        check_training(prepare(replace(SETUP, family="full")), replace(CONFIG, **change))


# Evaluation


def test_a_method_is_evaluated_by_its_own_predictions():
    task = prepare(SETUP)
    plain, means = evaluate_task(task.network(0), task, images=10, draws=4, method=Baseline())
    mixed, mean = evaluate_task(task.network(0), task, images=10, draws=4, method=PredictionAverage())
    assert evaluate_task(task.network(0), task, images=10, draws=4)[0] == plain and mixed["defect_plugin"] == 0
    assert torch.allclose(mean, means.mean(1, keepdim=True).expand_as(means)) and plain["defect_plugin"] > 0


def test_splits_are_named_and_have_so_many_images():
    task = prepare(SETUP)
    assert torch.equal(chosen_images(task, "validation", 3).inputs, task.data.validation.inputs[:3])
    assert len(chosen_images(task, "test", None)) == 360
    with pytest.raises(Refusal, match="361 of 360"):
        chosen_images(task, "test", 361)
    with pytest.raises(Refusal, match=r"one of test, validation.* as split"):
        chosen_images(task, "train", 1)


@pytest.mark.parametrize("family", ["gaussian", "point"])
def test_paths_of_points_are_judged_by_the_laplace_approximation(family):
    task = prepare(replace(SETUP, architecture="FC+CONV", channels=(2, 3), strides=(2, 2), group="none", family=family))
    network, data = task.network(0), task.data.train
    reports, found = path_reports(network, task, seed=3)
    expected = laplace(network, data.inputs, data.labels, seed=3) if family == "point" else None
    assert reports == learned_equivariance(network, expected) and (found is None) == (family == "gaussian")
    with pytest.raises(Refusal, match="relaxed layers"):
        path_reports(prepare(SETUP).network(0), prepare(SETUP))
