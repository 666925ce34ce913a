"""The named studies: their values, their settings against the source, names and titles, and what they cost."""
import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from helpers_studies import BASE
from symbnn.errors import Refusal
from symbnn.studies import catalogue
from symbnn.studies.catalogue import FULL, SMALL, STUDIES, estimate, find_study
from symbnn.studies.grids import Study
from symbnn.studies.runs import NetworkRun, task_of
from symbnn.studies.tasks import prepare
from symbnn.studies.titles import TITLES, listing
from symbnn.training.architectures import Architecture, build, multiply_adds
from tolerances import assert_close


@pytest.mark.parametrize("name", STUDIES)
def test_studies_survive_json(name):
    study = STUDIES[name]
    assert Study.from_json(json.dumps(study.values())) == study and study.title == TITLES[name]


def test_the_list_names_every_study_whole_within_80_columns():
    assert STUDIES.keys() == TITLES.keys()
    text = listing()
    assert set(re.findall(r"[\w-]+", text)) >= set(STUDIES) and max(map(len, text.splitlines())) <= 80
    assert all(title in " ".join(text.split()) for title in TITLES.values())


def test_the_list_needs_no_torch():
    code = ("import sys; sys.argv = ['symbnn', 'reproduce', '--list']; from symbnn.__main__ import main; main(); "
            "print('torch' in sys.modules)")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == f"{listing()}\nFalse\n" and found.stderr == ""


@pytest.mark.parametrize("name, reason", [
    ("magic", "one of prior.* as the study"), ("nowhere.json", "the file nowhere.json"),
])
def test_unknown_studies_are_refused(name, reason):
    with pytest.raises(Refusal, match=reason):
        find_study(name)


def test_a_file_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "mine.json").write_text("title: mine")
    with pytest.raises(Refusal, match="what symbnn reproduce --show"):
        find_study(str(tmp_path / "mine.json"))


def test_a_file_is_the_study_that_it_holds(tmp_path):
    study = replace(STUDIES["timing"], seeds=(7,))
    (tmp_path / "mine.json").write_text(json.dumps(study.values()))
    assert find_study(str(tmp_path / "mine.json")) == study and find_study("timing") == STUDIES["timing"]


@pytest.mark.parametrize("base, name", [(SMALL, "methods"), (FULL, "methods-full")])
def test_equal_compute_is_equal(base, name):
    points, shape = STUDIES[name].points(), (1, 28, 28)
    small = Architecture("cnn", shape, 10, base.setup.channels)
    ratio = multiply_adds(build(small.expanded(4)), shape) / multiply_adds(build(small), shape)
    before = max(run.method.trigger for run in points if run.method.name == "block_diagonal")
    wanted = before + (base.training.epochs - before) * ratio
    assert math.floor(wanted) in {run.training.epochs for run in points} or math.ceil(wanted) in {
        run.training.epochs for run in points}


def test_the_full_studies_have_the_source_s_settings():
    assert FULL.setup.channels == (32, 64) and FULL.setup.train_size == 5000 and FULL.setup.prior_scale == 1.0
    its = FULL.training
    assert (its.optimizer, its.learning_rate, its.scale_rate, its.clip_norm) == ("sgd", 0.01, 10.0, 1.0)
    assert (its.estimator, its.draws, its.epochs, its.batch_size) == ("whole", 10, 500, 128)
    sweep = STUDIES["draws-full"].base.evaluation
    assert (sweep.sweep[-1], sweep.repeats, sweep.images) == (1024, 10, None)
    triggers = {run.method.trigger for run in STUDIES["timing-full"].points()}
    assert triggers == {0, 20, 50, 100, 150}


def test_estimates_count_training_and_evaluation(finished):
    study, records, _ = finished
    trained = sum(record["training_multiply_adds"] for record in records)
    task, _ = task_of(BASE, None)
    passes = [multiply_adds(task.network(0, factor), (1, 8, 8)) for factor in (1, 4)]
    evaluated = 2 * 20 * 4 * 4 * (2 * passes[0] + 2 * passes[1])
    found = estimate(study, (0.01, 1e6))
    assert (found.runs, found.multiply_adds) == (8, trained + evaluated)
    assert_close(found.seconds, 8 * 2 * 4 * 0.01 + (trained + evaluated) / 1e6)
    whole = replace(study, base=BASE.changed({"training.estimator": "whole", "training.draws": 3}))
    assert estimate(whole, (0.01, 1e6)).multiply_adds == 3 * trained + evaluated


def test_speed_is_positive(monkeypatch):
    monkeypatch.setattr(catalogue, "prepare", lambda setup: prepare(replace(setup, train_size=64)))
    overhead, speed = catalogue.step_speed("cpu")
    assert overhead >= 0 < speed


def test_learned_precisions_are_of_the_family_that_their_rule_judges():
    for name, study in STUDIES.items():
        for run in study.points() if isinstance(study.base, NetworkRun) else ():
            rule = getattr(run.method, "rule", None)
            assert name.startswith("layerwise") == (rule is not None)
            assert rule is None or (rule == "evidence") == (run.setup.family == "point")
