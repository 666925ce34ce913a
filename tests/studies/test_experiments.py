"""Experiments as values: setups, own images, the comparison and its files."""
import csv
import json
import math
from dataclasses import asdict, replace
from io import StringIO

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symbnn.data.sources import load
from symbnn.data.transforms import vary
from symbnn.errors import Refusal
from symbnn.files import write_file
from symbnn.posterior.families import FAMILIES
from symbnn.studies.comparison import DEMO, Comparison, compare, epoch_cost, plan
from symbnn.studies.experiments import ARRAYS, PRIORS, SYMMETRIES, Setup, evaluate, load_npz, prepare
from symbnn.studies.methods import EXPANSIONS
from symbnn.studies.reports import (
    COLUMNS,
    Spread,
    conclusions,
    most_varying,
    results_json,
    runs_csv,
    save,
    spread,
    summary,
    verdict,
)
from symbnn.studies.studies import comparison as module
from symbnn.studies.studies import experiments
from symbnn.training.architectures import multiply_adds
from symbnn.training.checkpoints import load_network
from symbnn.training.config import TrainingConfig
from tolerances import assert_close

SETUP = Setup(channels=(2, 4), train_size=64)
TINY = Comparison(SETUP, replace(DEMO, epochs=2, batch_size=64), small_epochs=3, methods=("baseline", "regular"),
                  seeds=(0,), draws=4, images=20)


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
    ({"dataset": "cifar"}, "data set is one of digits"),
    ({"group": "S5"}, "group is one of C4"),
    ({"variant": "mirrored"}, "variant is one of plain"),
    ({"family": "normal"}, "family is one of gaussian"),
    ({"prior": "flat"}, "prior is one of isotropic"),
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
    found, predictions = evaluate(task.network(0), task, images=5, draws=4)
    assert predictions.shape == (5, 1, 40) and "defect_unbiased" not in found and found["nll_nats"] > 0


@pytest.mark.parametrize("change, reason", [
    ({"group": "shifts"}, "circular shift"),
    ({"architecture": "F-FC+CONV"}, "in its paths"),
    ({"architecture": "tree"}, "cnn or mlp"),
    ({"channels": (8, 8, 8, 8)}, "pool"),
    ({"train_size": 100_000}, "training"),
    ({"size": 0}, "positive number of pixels"),
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
    monkeypatch.setattr(experiments, "train", lambda *arguments, **others: pytest.fail("reached"))
    task = prepare(replace(SETUP, channels=channels))
    with pytest.raises(pytest.fail.Exception, match="reached"):
        experiments.fit(task.network(0), task, TrainingConfig(batch_size=64), threads=wanted)
    assert seen == [expected, 4]


# Images of one's own


def arrays(**changes):
    generator = np.random.default_rng(0)
    made = {
        "train_images": generator.integers(0, 256, (40, 8, 8), dtype=np.uint8), "train_labels": np.arange(40) % 3,
        "test_images": generator.integers(0, 256, (6, 8, 8), dtype=np.uint8), "test_labels": np.arange(6) % 3,
    }
    return {**made, **changes}


def test_own_images_are_read(tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays())
    data = load_npz(tmp_path / "mine.npz")
    assert data.shape == (1, 8, 8) and data.classes == ("0", "1", "2") and len(data.train) == 36
    assert_close(data.test.inputs[:, 0] * 255, arrays()["test_images"].astype(float), 1e-5)


def test_floats_and_channels_are_kept(tmp_path):
    images = np.random.default_rng(0).normal(size=(40, 3, 8, 8))
    np.savez(tmp_path / "mine.npz", **arrays(train_images=images, test_images=images[:6]))
    data = load_npz(tmp_path / "mine.npz", dtype=torch.float64)
    assert data.shape == (3, 8, 8)
    assert_close(data.test.inputs, images[:6])


WRONG = {
    "NaN": (arrays(train_images=np.full((40, 8, 8), np.nan)), "NaN"),
    "labels out of range": (arrays(test_labels=np.full(6, 7)), "label 7 in the test split"),
    "negative labels": (arrays(train_labels=np.full(40, -1)), "count from 0"),
    "flattened": (arrays(train_images=np.zeros((40, 64))), "shape"),
    "too few labels": (arrays(train_labels=np.zeros(3, int)), "shape"),
    "labels as floats": (arrays(train_labels=np.zeros(40)), "not integers"),
    "pixels as 16-bit": (arrays(train_images=np.zeros((40, 8, 8), np.uint16)), "uint16"),
    "other test shape": (arrays(test_images=np.zeros((6, 10, 10))), "one shape"),
    "objects": (arrays(train_labels=np.array([None] * 40)), "npz file"),
    "missing": ({"train_images": np.zeros((4, 8, 8))}, "npz file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arrays_are_refused(case, tmp_path):
    content, reason = WRONG[case]
    np.savez(tmp_path / "mine.npz", **content)
    with pytest.raises(Refusal, match=reason):
        load_npz(tmp_path / "mine.npz")


class Bomb:
    """Counts how often it is unpickled."""

    exploded = 0

    def __reduce__(self):
        return Bomb.explode, ()

    @staticmethod
    def explode():
        """What unpickling runs."""
        Bomb.exploded += 1


def test_reading_a_file_runs_nothing(tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays(train_labels=np.array([Bomb()] * 40, dtype=object)))
    with pytest.raises(Refusal, match="npz file"):
        load_npz(tmp_path / "mine.npz")
    assert not Bomb.exploded


@pytest.mark.parametrize("content", [None, b"", b"text", b"PK\x03\x04 truncated", b"\x93NUMPY"])
def test_wrong_files_are_refused(content, tmp_path):
    path = tmp_path / "mine.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Refusal, match=ARRAYS[0]) as caught:
        load_npz(path)
    assert str(tmp_path) not in str(caught.value)


# Equal budget


@pytest.mark.parametrize("estimator", ["split", "whole", "flipout"])
@pytest.mark.parametrize("group", ["C4", "D4"])
def test_budgets_are_equal_and_the_baseline_gets_no_less(group, estimator):
    training = replace(TINY.training, estimator=estimator)
    abelian = ("row_rolled",) if group == "C4" else ()
    methods = ("baseline", "wide", "orbit_mixture", "regular", "block_diagonal", *abelian)
    comparison = replace(TINY, setup=replace(SETUP, group=group), training=training, methods=methods)
    task = prepare(comparison.setup)
    plans = plan(comparison, task)
    order = task.action.group.order
    passes = {"split": 1, "whole": 8, "flipout": 16}[estimator]
    assert epoch_cost(task, 1, training) == 3 * passes * order * 64 * multiply_adds(task.network(0), (1, 8, 8))
    budget = 3 * epoch_cost(task, 1, training) + 2 * epoch_cost(task, order, training)
    for method, its in plans.items():
        assert its.multiply_adds == (its.small_epochs * epoch_cost(task, 1, training)
                                     + its.epochs * epoch_cost(task, its.order, training))
        assert budget <= its.multiply_adds < budget + epoch_cost(task, its.order, training)
        assert (its.multiply_adds == budget) or method in ("baseline", "wide", "orbit_mixture")


@pytest.mark.parametrize("change, reason", [
    ({"methods": ("magic",)}, "method is one of baseline"),
    ({"methods": ("regular", "regular")}, "once"),
    ({"methods": ()}, "not empty"),
    ({"seeds": (1, 1)}, "once"),
    ({"seeds": (-1,)}, "negative"),
    ({"split": "train"}, "split is one of test"),
    ({"draws": 2}, "three draws"),
    ({"small_epochs": 0}, "positive integer"),
    ({"images": 0}, "positive integer"),
    ({"expanded_learning_rate": 0.0}, "positive number"),
])
def test_comparisons_that_cannot_be_meant_are_refused(change, reason):
    with pytest.raises(Refusal, match=reason):
        replace(TINY, **change)


@pytest.mark.parametrize("change, reason", [
    ({"images": 5000}, "360"),
    ({"setup": replace(SETUP, family="lognormal")}, "LogNormal"),
    ({"setup": replace(SETUP, family="full"), "training": replace(TINY.training, estimator="flipout")}, "Flipout"),
    ({"setup": replace(SETUP, group="D4"), "methods": ("row_rolled",)}, "abelian"),
    ({"training": replace(TINY.training, batch_size=5000)}, "batch"),
    ({"setup": replace(SETUP, group="shifts")}, "circular"),
])
def test_refusals_come_before_anything_is_trained_or_written(change, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fit", lambda *arguments, **others: pytest.fail("training began"))
    with pytest.raises(Refusal, match=reason):
        compare(replace(TINY, **change), folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()


# Runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished comparison of two methods and two seeds, and its folder."""
    folder = tmp_path_factory.mktemp("comparison")
    return compare(replace(TINY, seeds=(0, 1)), folder=folder), folder


def test_finished_runs_are_used_again(finished, monkeypatch):
    results, folder = finished
    monkeypatch.setattr(module, "fit", lambda *arguments, **others: pytest.fail("training began"))
    again = compare(results.comparison, folder=folder)
    for mine, theirs in zip(results.runs, again.runs):
        assert mine.record == theirs.record and torch.equal(mine.predictions, theirs.predictions)


def test_runs_do_not_depend_on_the_folder(finished):
    results, _ = finished
    for mine, theirs in zip(compare(TINY).runs, results.runs):
        assert mine.record["metrics"] == theirs.record["metrics"]


def test_runs_are_what_their_checkpoints_predict(finished):
    results, folder = finished
    for run in results.runs:
        network = load_network(folder / f"{run.record['method']}-{run.record['seed']}")
        metrics, predictions = evaluate(network, results.task, images=20, draws=4, seed=run.record["seed"])
        assert metrics == run.record["metrics"] and torch.equal(predictions, run.predictions)


def test_another_device_or_more_seeds_are_the_same_comparison(finished, monkeypatch):
    results, folder = finished
    monkeypatch.setattr(module, "fit", lambda *arguments, **others: pytest.fail("training began"))
    compare(replace(results.comparison, training=replace(TINY.training, device="cpu"), seeds=(1,)), folder=folder)


@pytest.mark.parametrize("change, reason", [
    ({"small_epochs": 4}, "small_epochs=3 there, 4 now"),
    ({"draws": 5}, "draws=4 there, 5 now"),
    ({"setup": replace(SETUP, prior_scale=0.5)}, "prior_scale=1.0 there, 0.5 now"),
    ({"training": replace(TINY.training, learning_rate=0.5)}, "learning_rate"),
    ({"split": "validation"}, "split=test there, validation now"),
])
def test_other_settings_are_not_mixed_in(finished, change, reason):
    results, folder = finished
    before = sorted(folder.rglob("*"))
    with pytest.raises(Refusal, match=reason):
        compare(replace(results.comparison, **change), folder=folder)
    assert sorted(folder.rglob("*")) == before


def test_other_images_under_the_same_name_are_not_mixed_in(tmp_path):
    setup, training = replace(SETUP, dataset="mine.npz", train_size=None), replace(TINY.training, batch_size=32)
    comparison = replace(TINY, setup=setup, training=training, methods=("baseline",), images=6)
    np.savez(tmp_path / "mine.npz", **arrays())
    compare(comparison, folder=tmp_path / "out", root=tmp_path)
    np.savez(tmp_path / "mine.npz", **arrays(test_images=arrays()["test_images"][::-1]))
    with pytest.raises(Refusal, match="data_crc32"):
        compare(comparison, folder=tmp_path / "out", root=tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": 3}'])
def test_damaged_records_are_refused(content, tmp_path):
    (tmp_path / "baseline-0").mkdir()
    (tmp_path / "baseline-0" / "run.json").write_text(content)
    with pytest.raises(Refusal, match="baseline-0"):
        compare(TINY, folder=tmp_path)


def test_an_interrupted_comparison_goes_on_to_the_same_numbers(finished, tmp_path, monkeypatch):
    results, _ = finished
    fit, calls = module.fit, []

    def stop_in_the_second_stage(network, task, config, **others):
        calls.append(config.epochs)
        if len(calls) == 3:  # baseline, small, then the expanded network
            raise KeyboardInterrupt
        return fit(network, task, config, **others)

    monkeypatch.setattr(module, "fit", stop_in_the_second_stage)
    with pytest.raises(KeyboardInterrupt):
        compare(TINY, folder=tmp_path)
    assert (tmp_path / "baseline-0" / "run.json").exists() and not (tmp_path / "regular-0" / "run.json").exists()
    monkeypatch.setattr(module, "fit", fit)
    runs = compare(TINY, folder=tmp_path).runs
    assert [run.record["metrics"] for run in runs] == [run.record["metrics"] for run in results.runs[:2]]


def test_all_methods_run_and_share_the_small_network(tmp_path):
    methods = ("baseline", "wide", "orbit_mixture", *EXPANSIONS)
    compare(replace(TINY, methods=methods), folder=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{method}-0" for method in (*methods, "small")}


def test_double_precision_is_used_throughout():
    training = replace(TINY.training, precision="float64", epochs=1)
    results = compare(replace(TINY, methods=("regular",), training=training))
    assert results.runs[0].predictions.dtype == torch.float64


def test_an_expanded_network_is_invariant_and_stays_nearly_so(finished):
    results, _ = finished
    defects = {method: of["defect_unbiased"].mean for method, of in summary(results).items()}
    assert defects["regular"] < defects["baseline"] / 5


def test_nothing_is_half_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match="written"):
        write_file(tmp_path / "file" / "table.csv", b"content")
    with pytest.raises(Refusal, match="written"):
        compare(TINY, folder=tmp_path / "file")


# Reports


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=6))
def test_spread_is_mean_and_deviation(values):
    found, tensor = torch.tensor(spread(values), dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    assert_close(found, torch.stack([tensor.mean(), tensor.std()]))


@pytest.mark.parametrize("pair, text", [
    ((0.93147, 0.0123), "0.931 ± 0.012"), ((3.2e-6, 4e-7), "(3.20 ± 0.40)e-6"), ((-0.012, 0.5), "-0.01 ± 0.50"),
    ((0.5, None), "0.5"), ((1.5, 0.0), "1.5"), ((123.4, 10.0), "123 ± 10"), ((0.0, 1e-7), "(0.0 ± 1.0)e-7"),
    ((1.0, 1e-7), "1.00000000 ± 0.00000010"), ((-1234567.0, 300.0), "(-1.23457 ± 0.00030)e+6"),
    ((4.787, 1e-15), "4.79"),
])
def test_spreads_are_readable(pair, text):
    assert str(Spread(*pair)) == text


def test_the_verdict_is_paired(finished):
    results, _ = finished
    against, found = verdict(results, "regular"), summary(results)
    values = [run.record["metrics"]["accuracy"] for run in results.runs]
    assert against["accuracy_differences"] == [values[1] - values[0], values[3] - values[2]]
    ratio = found["baseline"]["defect_unbiased"].mean / found["regular"]["defect_unbiased"].mean
    assert against["defect_ratio"] == ratio
    assert any("regular against baseline" in line for line in conclusions(results))


def test_one_seed_and_no_baseline_are_reported(finished):
    results, _ = finished
    alone = results._replace(plans={"regular": results.plans["regular"]}, runs=results.runs[1:2])
    assert summary(alone)["regular"]["accuracy"].deviation is None
    assert json.loads(results_json(alone))["against_baseline"] == {}


def test_files_hold_every_run_and_no_path(finished, tmp_path):
    results, folder = finished
    written = save(results, tmp_path / "new", "symbnn compare")
    assert [path.name for path in written] == ["runs.csv", "comparison.json", "comparison.png"]
    rows = list(csv.DictReader(StringIO(runs_csv(results))))
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("baseline", "0"), ("regular", "0"), ("baseline", "1"), ("regular", "1")]
    assert all(float(row["accuracy"]) == run.record["metrics"]["accuracy"] for row, run in zip(rows, results.runs))
    whole = json.loads((tmp_path / "new" / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert set(whole["summary"]["baseline"]) == set(COLUMNS) and len(whole["runs"]) == 4
    assert whole["command"] == "symbnn compare" and whole["symbnn"] and whole["torch"]
    assert Setup(**whole["comparison"]["setup"]) == SETUP
    assert TrainingConfig(**whole["comparison"]["training"]) == results.comparison.training
    assert (tmp_path / "new" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    text = "".join(path.read_text() for path in (*folder.rglob("*.json"), *tmp_path.rglob("*.json")))
    assert str(folder.parent) not in text and str(tmp_path) not in text


def test_the_image_shown_varies_most():
    predictions = torch.full((5, 4, 2), 0.5)
    predictions[3, 0] = torch.tensor([0.0, 1.0])
    predictions[1, 0] = torch.tensor([0.4, 0.6])
    assert most_varying(predictions) == 3
