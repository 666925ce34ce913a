"""Studies: identity of runs, resuming, parallel runs, tables, figures, the named ones."""
import csv
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path

import matplotlib.axes
import pytest
import torch

from symbnn.equivariance.metrics import defect_plugin, defect_unbiased
from symbnn.equivariance.predictions import orbit_predictions
from symbnn.errors import Refusal
from symbnn.hidden_units.mutual_information import mutual_information
from symbnn.layerwise.curvature import log_precisions
from symbnn.layerwise.evidence import laplace
from symbnn.layerwise.precisions import learned_equivariance
from symbnn.posterior.layers import kl_sum
from symbnn.posterior.likelihoods import Categorical
from symbnn.posterior.sampling import predict
from symbnn.studies.catalogue import FULL, SMALL, STUDIES, estimate, find_study
from symbnn.studies.experiments import Setup, evaluate, prepare
from symbnn.studies.methods import Method, run_method
from symbnn.studies.studies import (
    Evaluation,
    Panel,
    Spec,
    Study,
    catalogue,
    check,
    describe,
    execute,
    identity,
    measure,
    plain,
    run,
    studies,
    task_of,
    words,
)
from symbnn.studies.study_reports import (
    as_csv,
    as_markdown,
    costs,
    picture,
    provenance,
    read_results,
    run_rows,
    save,
    shown,
    table,
)
from symbnn.symmetry.networks import network_action, unit_permutations
from symbnn.training.architectures import Architecture, build, multiply_adds
from symbnn.training.config import TrainingConfig
from tolerances import assert_close, within_standard_errors

BASE = Spec(Setup(channels=(2, 4), train_size=64), TrainingConfig(epochs=2, batch_size=64, learning_rate=0.02),
            evaluation=Evaluation(images=20, draws=4))
TINY = Study("tiny", "none", BASE, ({"method.name": ("baseline", "orbit_mixture")},
                                    {"method.name": ("block_diagonal",), "method.trigger": (0, 1)}),
             seeds=(0, 1), series=("method.trigger",))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished study, its records and the folder of its runs."""
    work = tmp_path_factory.mktemp("runs")
    return TINY, execute(TINY, work), work


@pytest.fixture
def untrained(monkeypatch):
    """Nothing may be trained."""
    monkeypatch.setattr(studies, "run_method", lambda *arguments, **others: pytest.fail("training began"))


def without_seconds(records):
    return [{name: value for name, value in record.items() if not name.endswith("_seconds")} for record in records]


# Values


@pytest.mark.parametrize("name", STUDIES)
def test_studies_survive_json(name):
    study = STUDIES[name]
    assert Study.from_json(json.dumps(plain(study))) == study
    assert Study.from_json(json.dumps(plain(study), indent=1)).runs() == study.runs()


@pytest.mark.parametrize("change, reason", [
    ({"grids": ()}, "a grid"),
    ({"seeds": ()}, "seeds"),
    ({"seeds": (0, 0)}, "named once"),
    ({"seeds": (-1,)}, "not negative"),
    ({"x": "setup.group"}, "among what the grids vary"),
    ({"series": ("method.projected",)}, "among what the grids vary"),
    ({"grids": ({"method.name": ("baseline", "baseline")},), "series": ()}, "each run once"),
    ({"grids": ({"method.name": ("magic",)},), "series": ()}, "method is one of"),
    ({"grids": ({"method.title": ("a",)},), "series": ()}, "part and its field"),
    ({"grids": ({"network.depth": (1,)},), "series": ()}, "part and its field"),
    ({"grids": ({"setup.family": ("normal",)},), "series": ()}, "family is one of"),
])
def test_studies_that_cannot_be_meant_are_refused(change, reason):
    with pytest.raises(Refusal, match=reason):
        replace(TINY, **change)


@pytest.mark.parametrize("change, reason", [
    (dict(draws=2), "three draws"), (dict(images=0), "positive"), (dict(repeats=0), "positive"),
    (dict(sweep=(1, 0)), "positive"), (dict(split="train"), "split"), (dict(mode="magic"), "mode"),
    ({"information": 1}, "two draws or more"),
    ({"information": -4}, "two draws or more"),
])
def test_evaluations_that_cannot_be_meant_are_refused(change, reason):
    with pytest.raises(Refusal, match=reason):
        Evaluation(**change)


@pytest.mark.parametrize("edit", [
    lambda whole: whole.pop("title"), lambda whole: whole.update(colour="red"), lambda whole: whole.update(grids=3),
    lambda whole: whole["base"]["setup"].update(depth=3), lambda whole: (whole["base"].pop("setup") and None) or
    whole["base"].update(extra={}), lambda whole: whole.update(panels=[{"metrics": "accuracy"}]),
])
def test_edited_files_are_refused(edit, tmp_path):
    whole = plain(TINY)
    edit(whole)
    (tmp_path / "mine.json").write_text(json.dumps(whole))
    with pytest.raises(Refusal, match="JSON file as --show prints it"):
        find_study(str(tmp_path / "mine.json"))


@pytest.mark.parametrize("name, reason", [("magic", "study is one of prior"), ("nowhere.json", "read from a JSON")])
def test_unknown_studies_are_refused(name, reason):
    with pytest.raises(Refusal, match=reason):
        find_study(name)


def test_a_file_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "mine.json").write_text("title: mine")
    with pytest.raises(Refusal, match="JSON file as --show prints it"):
        find_study(str(tmp_path / "mine.json"))


def test_grids_give_every_combination_once_and_in_order():
    assert [(spec.method.name, spec.method.trigger) for spec in TINY.specs()] == [
        ("baseline", 0), ("orbit_mixture", 0), ("block_diagonal", 0), ("block_diagonal", 1)]
    assert [spec.training.seed for spec in TINY.runs()] == [0, 1] * 4
    changed = BASE.changed({"method.trigger": 3, "method.name": "geometric"})  # in whatever order
    assert changed.method == Method("geometric", trigger=3) and changed.setup == BASE.setup


# Identity


def test_a_run_is_its_settings_and_its_data():
    same = identity(BASE, 1)
    assert identity(BASE.changed({"training.device": "cpu"}), 1) == same == identity(Spec.from_json(plain(BASE)), 1)
    changes = [{"training.seed": 1}, {"setup.train_size": 65}, {"training.learning_rate": 0.1}, {"evaluation.draws": 5},
               {"method.name": "tied"}, {"method.name": "geometric", "method.keep_moments": True}]
    others = {identity(BASE.changed(change), 1) for change in changes} | {identity(BASE, 2), same}
    assert len(others) == len(changes) + 2
    nothing = '{"data_crc32": 7, "spec": {"evaluation": {}, "method": {}, "setup": {}, "training": {}}}'
    assert identity(Spec(), 7) == hashlib.sha256(nothing.encode()).hexdigest()[:24]  # defaults are not hashed


def test_settings_that_a_later_version_adds_leave_a_run_what_it_is(finished, tmp_path, untrained):
    study, records, work = finished
    for path in work.iterdir():  # as an earlier version wrote it
        record = json.loads(path.read_text())
        del record["spec"]["setup"]["start"], record["spec"]["method"]["keep_moments"]
        (tmp_path / path.name).write_text(json.dumps(record))
    assert without_seconds(execute(study, tmp_path))[0]["rows"] == records[0]["rows"]


def test_studies_share_runs(finished, untrained):
    study, records, work = finished
    part = replace(study, title="another", grids=study.grids[1:], seeds=(1,), panels=(Panel("brier"),))
    assert execute(part, work) == [records[5], records[7]]


def test_a_changed_study_does_not_mix(finished, tmp_path):
    study, records, work = finished
    other = replace(study, base=BASE.changed({"training.learning_rate": 0.01}), grids=study.grids[:1], seeds=(0,),
                    series=())
    before = {path.name for path in work.iterdir()}
    new = execute(other, work)
    assert {path.name for path in work.iterdir()} - before == {f"{name}.json" for name in check(other.runs(), None)}
    assert new[0]["rows"] != records[0]["rows"] and new[0]["spec"]["training"]["learning_rate"] == 0.01


@pytest.mark.parametrize("edit", [
    lambda text: "", lambda text: "{}", lambda text: text[:-20], lambda text: text.replace('"seed": 0', '"seed": 5'),
    lambda text: text.replace('"epochs": 2', '"epochs": 3'),
    lambda text: re.sub('"data_crc32": ', '"data_crc32": 1', text),
    lambda text: text.replace('"rows": [', '"rows": [], "r": ['),
])
def test_damaged_or_edited_records_are_refused(finished, tmp_path, edit, untrained):
    study, _, work = finished
    for path in work.iterdir():
        (tmp_path / path.name).write_text(edit(path.read_text()) if '"seed": 0' in path.read_text()
                                          else path.read_text())
    with pytest.raises(Refusal, match="remove"):
        execute(study, tmp_path)


# Running


def test_a_run_is_its_method_evaluated(finished):
    study, records, _ = finished
    spec = study.runs()[7]
    task = prepare(spec.setup)
    trained = run_method(spec.method, lambda factor: task.network(1, factor), task.data.train, spec.training,
                         action=task.action, prior=task.prior(), validation=task.data.validation)
    row = records[7]["rows"][0]
    metrics, _ = evaluate(trained.network, task, images=20, draws=4, seed=1)
    assert {name: row[name] for name in metrics} == metrics and row["changed"] == 1
    assert row["elbo"] == trained.history[-1].elbo and row["validation_nll"] == trained.history[-1].validation_nll
    costs = [3 * 4 * 64 * multiply_adds(task.network(0, factor), (1, 8, 8)) for factor in (1, 4)]
    assert [record["training_multiply_adds"] for record in records[::2]] == [
        2 * costs[0], 2 * costs[0], 2 * costs[1], sum(costs)]
    assert records[2]["rows"][0]["defect_unbiased"] == 0 < records[0]["rows"][0]["defect_unbiased"]


def test_equal_networks_are_measured_once(monkeypatch):
    """Runs that train the same weights share their rows; any other weights, seed or evaluation has its own."""
    measured, real = [], studies.measure
    monkeypatch.setattr(studies, "_MEASURED", {})
    monkeypatch.setattr(studies, "measure", lambda *given: measured.append(given) or real(*given))
    spec = BASE.changed({"training.epochs": 1, "method.name": "baseline", "setup.dataset": "digits"})
    same = spec.changed({"training.evaluation_draws": spec.training.evaluation_draws + 1})  # draws nothing for training
    first, second = (run(each)["rows"][0] for each in (spec, same))
    assert len(measured) == 1 and first | {"validation_nll": 0} == second | {"validation_nll": 0}
    others = [spec.changed(change) for change in (
        {"training.learning_rate": 0.04}, {"evaluation.draws": spec.evaluation.draws + 1})]
    found = [run(each)["rows"][0] for each in others]
    assert len(measured) == 3
    assert len({row["nll_nats"] for row in (first, *found)}) == 3


@pytest.mark.parametrize("name", ["0.weight.posterior.loc", "0.weight.posterior.log_scale", "0.bias.prior.log_scale"])
def test_networks_that_differ_have_other_fingerprints(name):
    network = studies.task_of(BASE, None)[0].network(0)
    before = studies._fingerprint(network)
    assert studies._fingerprint(network) == before
    tensor = network.state_dict()[name]
    tensor.view(-1)[0] += 1e-5
    assert studies._fingerprint(network) != before


def test_bounds_of_q_and_of_its_average():
    """Against the closed divergence, all six permutations, and the likelihood of many more draws."""
    spec = BASE.changed({"setup.architecture": "mlp", "setup.channels": (3,), "setup.group": "none",
                         "setup.initial_scale": 0.3, "evaluation.information": 200})
    task, _ = task_of(spec, None)
    network = task.network(0)
    (row,) = measure(network, task, spec)
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
    spec = BASE.changed({"setup.architecture": "FC+CONV", "setup.channels": (2, 3), "setup.strides": (2, 2),
                         "setup.group": "none", "setup.family": family, "evaluation.paths": True})
    task, _ = task_of(spec, None)
    network, data = task.network(0), task.data.train
    (row,) = measure(network, task, spec)
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


def test_runs_use_one_thread_and_give_it_back(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(studies, "_run", lambda spec, root: {})
    run(BASE)
    assert seen == [1, 3]


def test_an_interrupted_study_goes_on_run_by_run(finished, tmp_path, monkeypatch):
    study, records, _ = finished
    real, begun = studies.run, []

    def stop_at_the_fourth(spec, root):
        begun.append(spec)
        if len(begun) == 4:
            raise KeyboardInterrupt
        return real(spec, root)

    monkeypatch.setattr(studies, "run", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        execute(study, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    resumed = execute(study, tmp_path)
    assert len(begun) == 4 + 5 and begun[4:] == study.runs()[3:]
    assert without_seconds(resumed) == without_seconds(records)
    assert as_csv(table(study, resumed)) == as_csv(table(study, records))


@pytest.mark.parametrize("backend", ["loky", "dask"])
def test_parallel_runs_have_the_numbers_of_sequential_ones(finished, tmp_path, backend):
    study, records, _ = finished
    study, records, lines = replace(study, grids=study.grids[1:]), records[4:], []
    found = execute(study, tmp_path, jobs=2, backend=backend, report=lines.append)
    assert without_seconds(found) == without_seconds(records)
    assert len(lines) == len(list(tmp_path.iterdir())) == 4 and lines[-1].startswith("[4/4] ")


@pytest.mark.parametrize("change, options, reason", [
    ({}, {"backend": "threads"}, "backend is one of"),
    ({}, {"jobs": 0}, "number of jobs"),
    ({"evaluation.images": 5000}, {}, "5000 of 360"),
    ({"training.batch_size": 500}, {}, "batch"),
    ({"setup.family": "lognormal"}, {}, "LogNormal"),
    ({"setup.group": "shifts"}, {}, "circular"),
    ({"training.device": "tpu"}, {}, "device"),
    ({"training.epochs": 1, "setup.dataset": "nowhere.npz"}, {}, "nowhere"),
    ({"training.objective": "symmetrised", "setup.prior": "random_means"}, {}, "prior"),
    ({"training.objective": "symmetrised", "training.information": "permanent", "setup.channels": (32, 64)}, {},
     "exact permanent"),
    ({"evaluation.paths": True}, {}, "relaxed layers"),
    ({"evaluation.information": 8, "setup.architecture": "mlp", "setup.channels": ()}, {}, "unit"),
])
def test_refusals_come_before_anything_is_trained_or_written(change, options, reason, tmp_path, untrained):
    with pytest.raises(Refusal, match=reason):
        execute(replace(TINY, base=BASE.changed(change)), tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_trigger_after_the_end_is_refused_before_training(tmp_path, untrained):
    grids = ({"method.name": ("geometric",), "method.trigger": (0, 3)},)
    with pytest.raises(Refusal, match="trigger lies within"):
        execute(replace(TINY, grids=grids), tmp_path / "new")


def test_a_run_that_diverges_is_named(tmp_path):
    study = replace(TINY, base=BASE.changed({"training.learning_rate": 1e30}), grids=TINY.grids[:1], series=())
    with pytest.raises(Refusal, match=r"in the run with baseline, seed 0"):
        execute(study, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["dask", "ray"])
def test_a_missing_package_is_named(missing, tmp_path, monkeypatch):
    for name in ("distributed", "ray"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Refusal, match="pip install"):
        execute(replace(TINY, grids=({"method.name": ("wide",)},), series=()), tmp_path, backend=missing)


# Sweeps over draws


def test_a_sweep_takes_the_first_draws_of_each_repeat():
    spec = BASE.changed({"evaluation.sweep": (1, 2, 8), "evaluation.repeats": 2, "evaluation.mode": "shared"})
    task, rows = prepare(spec.setup), run(spec)["rows"]
    network = run_method(Method(), lambda factor: task.network(0, factor), task.data.train, spec.training,
                         action=task.action).network
    assert [(row["repeat"], row["draws"]) for row in rows] == [(0, 1), (0, 2), (0, 8), (1, 1), (1, 2), (1, 8)]
    generator = torch.Generator().manual_seed(1_000_003)
    found = orbit_predictions(network, task.data.test.inputs[:20], network_action(network, task.action), 8, "shared",
                              generator=generator).probabilities
    assert [row["defect_plugin"] for row in rows[:3]] == [defect_plugin(found[:draws]) for draws in (1, 2, 8)]
    assert rows[2]["defect_unbiased"] == defect_unbiased(found).value and "defect_unbiased" not in rows[0]
    assert rows[5]["defect_plugin"] != rows[2]["defect_plugin"]
    study = Study("sweep", "none", spec, ({"method.name": ("baseline",)},), seeds=(0,), x="draws")
    lines = table(study, [run(spec)])
    assert [(line["draws"], line["runs"]) for line in lines] == [(1, 2), (2, 2), (8, 2)]
    values = torch.tensor([rows[2]["defect_plugin"], rows[5]["defect_plugin"]], dtype=torch.float64)
    assert_close(torch.tensor([lines[2]["defect_plugin"], lines[2]["defect_plugin_sd"]], dtype=torch.float64),
                 torch.stack([values.mean(), values.std()]))
    assert lines[0]["defect_unbiased"] is None and picture(study, lines)


# Tables, figures, files


def test_the_table_has_means_and_deviations_over_seeds(finished):
    study, records, _ = finished
    lines, rows = table(study, records), run_rows(study, records)
    assert [(line["method.name"], line["method.trigger"], line["runs"]) for line in lines] == [
        ("baseline", 0, 2), ("orbit_mixture", 0, 2), ("block_diagonal", 0, 2), ("block_diagonal", 1, 2)]
    for place, line in enumerate(lines):
        values = torch.tensor([records[2 * place + seed]["rows"][0]["nll_nats"] for seed in (0, 1)],
                              dtype=torch.float64)
        assert_close(torch.tensor([line["nll_nats"], line["nll_nats_sd"]], dtype=torch.float64),
                     torch.stack([values.mean(), values.std()]))
    assert lines[0]["changed"] is None and lines[3]["changed"] == 1
    assert not any("seconds" in name or name.endswith("_se") for name in lines[0])
    assert [row["seed"] for row in rows] == [0, 1] * 4 and rows[3]["accuracy"] == records[3]["rows"][0]["accuracy"]


def test_files_hold_everything_and_no_path(finished, tmp_path):
    study, records, work = finished
    written = save(study, records, tmp_path / "out", "symbnn reproduce tiny")
    assert [path.name for path in written] == ["table.csv", "runs.csv", "study.json", "figure.png"]
    rows = list(csv.DictReader(StringIO((tmp_path / "out" / "table.csv").read_text())))
    assert [float(row["accuracy"]) for row in rows] == [line["accuracy"] for line in table(study, records)]
    assert len(list(csv.DictReader(StringIO((tmp_path / "out" / "runs.csv").read_text())))) == 8
    whole = json.loads((tmp_path / "out" / "study.json").read_text(), parse_constant=pytest.fail)
    assert whole["command"] == "symbnn reproduce tiny" and whole["runs"] == 8 and whole["symbnn"] and whole["torch"]
    assert Study.from_json(json.dumps(whole["study"])) == study
    assert whole["total"]["training_multiply_adds"] == sum(record["training_multiply_adds"] for record in records)
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")
    text = "".join(path.read_text() for path in (*work.iterdir(), *(tmp_path / "out").glob("*.[cj]s*")))
    assert str(work) not in text and str(tmp_path) not in text


def test_results_are_read_as_they_were_written(finished, tmp_path):
    study, records, _ = finished
    save(study, records, tmp_path)
    again, rows = read_results(tmp_path)
    assert again == study and [list(row.values()) for row in rows] == [
        [row.get(name) for name in rows[0]] for row in table(study, records)]
    assert {type(row["method.trigger"]) for row in rows} == {int} and {type(row["accuracy"]) for row in rows} == {float}
    same, runs = read_results(tmp_path, "runs.csv")
    assert same == study and [row["accuracy"] for row in runs] == [
        record["rows"][0]["accuracy"] for record in records] and runs[1]["seed"] == 1


def test_provenance_is_what_the_runs_took(finished, tmp_path):
    study, records, _ = finished
    save(study, [record | {"training_seconds": 90.0, "evaluation_seconds": 30.0} for record in records], tmp_path,
         "symbnn reproduce tiny")
    assert provenance(tmp_path) == (
        "symbnn reproduce tiny: 8 runs with seeds 0, 1; 12 minutes of training and 4 of evaluation on one thread each "
        "(cpu), 1.4 to 1.4 training seconds per training image")


def test_markdown_shows_settings_as_they_are_and_metrics_with_their_spread():
    rows = [{"trigger": 1, "rate": 0.03, "kept": True, "accuracy": 0.5, "accuracy_sd": 0.02, "nll": 1.25,
             "nll_sd": None},
            {"trigger": 0, "rate": 67776.0, "kept": False, "accuracy": None, "accuracy_sd": None, "nll": 2.0,
             "nll_sd": 0.5}]
    assert as_markdown(rows, {"trigger": "t", "rate": "r", "kept": "k", "accuracy": "a", "nll": "n"}).split("\n") == [
        "| t | r | k | a | n |", "| --- | --- | --- | --- | --- |", "| 1 | 0.03 | yes | 0.500 ± 0.020 | 1.25 |",
        "| 0 | 6.78e+04 | no |  | 2.00 ± 0.50 |"]


@pytest.mark.parametrize("damage", [lambda folder: (folder / "study.json").unlink(),
                                    lambda folder: (folder / "table.csv").unlink(),
                                    lambda folder: (folder / "study.json").write_text("{}")])
def test_folders_without_results_are_refused(damage, finished, tmp_path):
    save(*finished[:2], tmp_path)
    damage(tmp_path)
    with pytest.raises(Refusal, match=r"holds study\.json and table\.csv"):
        read_results(tmp_path)


COMMITTED = sorted((Path(__file__).parents[1] / "results").glob("*/study.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_results_are_of_the_study_that_has_their_name(path):
    study, rows = read_results(path.parent)
    whole = json.loads(path.read_text())
    assert study == STUDIES[path.parent.name] and whole["command"].startswith(f"symbnn reproduce {path.parent.name}")
    assert sum(row["runs"] for row in rows) >= whole["runs"] == len(study.runs())


def test_costs_are_per_training_image(finished):
    study, records, _ = finished
    for place, line in enumerate(costs(study, records)):
        mine = records[2 * place : 2 * place + 2]
        seconds = sum(record["training_seconds"] for record in mine) / 2
        assert_close(line["training_seconds_per_training_image"], seconds / 64)
        assert line["training_multiply_adds_per_training_image"] == mine[0]["training_multiply_adds"] / 64


@pytest.fixture
def curves(monkeypatch):
    """What is drawn: positions, means, spreads, and the label of each curve; and guide lines."""
    drawn, guides = [], []
    bars, plot = matplotlib.axes.Axes.errorbar, matplotlib.axes.Axes.plot

    def errorbar(self, x, y, errors, **options):
        drawn.append((list(x), list(y), list(errors), options["label"]))
        return bars(self, x, y, errors, **options)

    def line(self, x, y, style, **options):
        guides.append((list(x), list(y)))
        return plot(self, x, y, style, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "errorbar", errorbar)
    monkeypatch.setattr(matplotlib.axes.Axes, "plot", line)
    return drawn, guides


def test_the_figure_draws_the_table(curves, finished):
    study, records, _ = finished
    study = replace(study, x="method.trigger", series=("method.name",), panels=(Panel("nll_nats", slope=-1),))
    lines = [{**line, "method.trigger": line["method.trigger"] + 1} for line in table(study, records)]
    picture(study, lines)
    drawn, guides = curves
    assert [label for *_, label in drawn] == ["baseline", "orbit_mixture", "block_diagonal"]
    across, means, spreads, _ = drawn[2]
    assert across == [1, 2] and means == [line["nll_nats"] for line in lines[2:]]
    assert spreads == [line["nll_nats_sd"] for line in lines[2:]]
    assert guides == [([1], [lines[0]["nll_nats"]])]
    picture(study, lines[2:])
    assert guides[1] == ([1, 2], [lines[2]["nll_nats"], lines[2]["nll_nats"] / 2])
    picture(replace(study, panels=(Panel("nll_nats", "spread"),)), lines)
    assert drawn[-1][1] == [line["nll_nats_sd"] for line in lines[2:]]


def test_names_on_an_axis_are_places(curves, finished):
    study, records, _ = finished
    picture(replace(study, panels=(Panel("accuracy"),)), table(study, records))
    drawn, _ = curves
    assert [[round(place) for place in across] for across, *_ in drawn] == [[0, 1, 2], [2]]


def test_widths_are_numbers_on_an_axis_and_words_are_no_metrics():
    study = replace(TINY, grids=({"setup.channels": ((3,), (2, 4))},), seeds=(0,), x="setup.channels", series=())
    record = {"training_multiply_adds": 1, "training_seconds": 1.0, "evaluation_seconds": 1.0,
              "rows": [{"accuracy": 0.5, "information_method": "bethe"}]}
    rows = table(study, [record, record])
    assert [row["setup.channels"] for row in rows] == [3, "2 4"] and rows[0]["accuracy"] == 0.5
    assert "information_method" not in rows[0] and "bethe" in as_csv(run_rows(study, [record, record]))
    assert [describe(study, spec) for spec in study.runs()] == ["channels 3, seed 0", "channels 2 4, seed 0"]


def test_words_name_what_has_no_name_of_its_own():
    names = ("method.name", "method.trigger", "method.keep_moments", "method.projected", "setup.validation_size")
    assert words(names, ("geometric", 20, True, False, None)) == "geometric, trigger 20, keep moments"


def test_the_terminal_shows_the_figure_s_metrics(finished):
    study, records, _ = finished
    drawn = shown(study, records)
    assert [column.header for column in drawn.columns] == ["name", "trigger", "runs", "accuracy", "defect_unbiased"]
    assert drawn.row_count == 4


# The named studies


@pytest.mark.parametrize("base, name", [(SMALL, "methods"), (FULL, "methods-full")])
def test_equal_compute_is_equal(base, name):
    specs, shape = STUDIES[name].specs(), (1, 28, 28)
    small = Architecture("cnn", shape, 10, base.setup.channels)
    ratio = multiply_adds(build(small.expanded(4)), shape) / multiply_adds(build(small), shape)
    before = max(spec.method.trigger for spec in specs if spec.method.name == "block_diagonal")
    wanted = before + (base.training.epochs - before) * ratio
    assert math.floor(wanted) in {spec.training.epochs for spec in specs} or math.ceil(wanted) in {
        spec.training.epochs for spec in specs}


def test_the_full_studies_have_the_source_s_settings():
    assert FULL.setup.channels == (32, 64) and FULL.setup.train_size == 5000 and FULL.setup.prior_scale == 1.0
    its = FULL.training
    assert (its.optimizer, its.learning_rate, its.scale_rate, its.clip_norm) == ("sgd", 0.01, 10.0, 1.0)
    assert (its.estimator, its.draws, its.epochs, its.batch_size) == ("whole", 10, 500, 128)
    sweep = STUDIES["draws-full"].base.evaluation
    assert (sweep.sweep[-1], sweep.repeats, sweep.images) == (1024, 10, None)
    triggers = {spec.method.trigger for spec in STUDIES["timing-full"].specs()}
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


# Processes


def program(folder, *arguments):
    command = [sys.executable, "-c", "from symbnn.cli import main; main()", "reproduce", *arguments]
    return subprocess.Popen(command, cwd=folder, env={**os.environ, "NO_COLOR": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)


def finished_runs(folder):
    return [path for path in folder.glob("work/*.json") if not path.name.startswith(".")]


def stopped(folder, how, options, there):
    """Start the study and stop it after at least one more run; the process and its messages. A process that is faster
    than this test, on a busy machine, is started again without the runs that it has added."""
    before = set(finished_runs(folder))
    for _ in range(5):
        process = program(folder, *options)
        deadline = time.monotonic() + 200
        while len(finished_runs(folder)) <= there and time.monotonic() < deadline:
            time.sleep(0.02)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, how)  # what a terminal does
        _, err = process.communicate(timeout=200)
        if there < len(finished_runs(folder)) < 8:
            return process, err
        for path in set(finished_runs(folder)) - before:
            path.unlink()
        shutil.rmtree(folder / "out", ignore_errors=True)
    pytest.skip("every process had finished before it could be stopped: this machine is too busy for the test")


def test_a_stopped_process_goes_on_to_the_same_table(finished, tmp_path):
    study, records, _ = finished
    (tmp_path / "tiny.json").write_text(json.dumps(plain(study)))
    options, there = ["tiny.json", "--work", "work", "-o", "out", "--jobs"], 0
    for how, jobs in ((signal.SIGINT, "1"), (signal.SIGINT, "2"), (signal.SIGKILL, "1")):
        process, err = stopped(tmp_path, how, [*options, jobs], there)
        there = len(finished_runs(tmp_path))
        if how == signal.SIGINT:
            assert process.returncode == 130 and "Interrupted." in err and "same command" in err, err
            assert "Traceback" not in err
        assert not (tmp_path / "out").exists() and all(json.loads(path.read_text()) for path in finished_runs(tmp_path))
    process = program(tmp_path, *options, "1")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0 and f"{there} of 8 runs are there already" in err, err
    assert (tmp_path / "out/table.csv").read_text() == as_csv(table(study, records))
