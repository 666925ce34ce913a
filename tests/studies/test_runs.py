"""Runs: values and names, what is trained before, checkpoints, and what one thread computes."""
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from helpers_studies import BASE, TINY
from symbnn.errors import Refusal
from symbnn.studies import runs, simulations
from symbnn.studies.methods import Average, Baseline, Expansion, LearnedPrecisions, run_method
from symbnn.studies.runs import FUNCTIONS, FunctionRun, NetworkRun, learn, perform, run_from_json, task_of
from symbnn.studies.tasks import evaluate_task, plain, prepare
from symbnn.training.architectures import multiply_adds
from symbnn.training.checkpoints import load_network, read_checkpoint

BEFORE = BASE.changed({"method.name": "block_diagonal", "training.epochs": 1, "before.epochs": 3})


# Values


def test_changes_of_a_method_keep_its_options_and_no_others():
    changed = BASE.changed({"method.trigger": 3, "method.name": "geometric"})  # in whatever order
    assert changed.method == Average("geometric", trigger=3) and changed.setup == BASE.setup
    same_kind = changed.changed({"method.name": "projection", "method.projected": True})
    assert same_kind.method == Average("projection", trigger=3, projected=True)
    assert changed.changed({"method.name": "regular"}).method == Expansion("regular")  # another kind, and no trigger
    assert changed.changed({"method.trigger": 1}).method == Average("geometric", trigger=1)
    learned = BASE.changed({"method.name": "learned_precisions", "method.rule": "evidence", "method.first": 2})
    assert learned.method == LearnedPrecisions(rule="evidence", first=2)
    assert (learned.value("method.first"), learned.value("method.trigger"), BASE.value("method.rule")) == (2, 0, None)


@pytest.mark.parametrize("change, reason", [
    ({"method.title": "a"}, "part and its field"), ({"network.depth": 1}, "part and its field"),
    ({"setup": 1}, "part and its field"), ({"method.name": "magic"}, "as method"),
    ({"method.trigger": 1}, "no other options of baseline than none"), ({"setup.family": "normal"}, "as family"),
    ({"before.epochs": 1}, "changes at its start"),
    ({"method.name": "geometric", "method.trigger": 1, "before.epochs": 1}, "changes at its start"),
])
def test_changes_that_cannot_be_meant_are_refused(change, reason):
    with pytest.raises(Refusal, match=reason):
        BASE.changed(change)


@pytest.mark.parametrize("run", [BASE, BEFORE, *TINY.runs()], ids=lambda run: run.label)
def test_runs_survive_json(run):
    assert run_from_json(json.loads(json.dumps(plain(run)))) == run
    seeded = run.with_seed(7)
    assert seeded.seed == 7 and seeded.with_seed(run.seed) == run and (run.before is None or seeded.before.seed == 7)


def test_a_run_is_its_settings_and_its_data(monkeypatch):
    monkeypatch.setattr(NetworkRun, "data", lambda self, root: 1)
    same = BASE.name(None)
    assert BASE.changed({"training.device": "cpu"}).name(None) == same == run_from_json(plain(BASE)).name(None)
    changes = [{"training.seed": 1}, {"setup.train_size": 65}, {"training.learning_rate": 0.1}, {"evaluation.draws": 5},
               {"method.name": "tied"}, {"method.name": "geometric"},
               {"method.name": "geometric", "method.keep_moments": True},
               {"method.name": "geometric", "before.epochs": 3}]
    others = {BASE.changed(change).name(None) for change in changes} | {same}
    monkeypatch.setattr(NetworkRun, "data", lambda self, root: 2)
    assert len(others | {BASE.name(None)}) == len(changes) + 2
    nothing = '{"data_crc32": 2, "run": {"evaluation": {}, "method": {}, "setup": {}, "training": {}}}'
    hashed = hashlib.sha256(nothing.encode()).hexdigest()[:16]  # defaults are not hashed
    assert NetworkRun().name(None) == f"baseline-0-{hashed}"


# Training and evaluation


def test_a_run_is_its_method_evaluated(finished):
    study, records, _ = finished
    run = study.runs()[7]
    task = prepare(run.setup)
    trained = run_method(run.method, lambda factor: task.network(1, factor), task.data.train, run.training,
                         action=task.action, prior=task.prior(), validation=task.data.validation)
    row = records[7]["rows"][0]
    metrics, _ = evaluate_task(trained.network, task, images=20, draws=4, seed=1)
    assert {name: row[name] for name in metrics} == metrics and row["changed"] == 1
    assert row["elbo"] == trained.history[-1].elbo and row["validation_nll"] == trained.history[-1].validation_nll
    costs = [3 * 4 * 64 * multiply_adds(task.network(0, factor), (1, 8, 8)) for factor in (1, 4)]
    assert [record["training_multiply_adds"] for record in records[::2]] == [
        2 * costs[0], 2 * costs[0], 2 * costs[1], sum(costs)]
    assert records[2]["rows"][0]["defect_unbiased"] == 0 < records[0]["rows"][0]["defect_unbiased"]


def test_what_was_trained_before_has_its_own_length_and_rate(tmp_path):
    run = BEFORE.changed({"before.learning_rate": 0.05, "evaluation.predictions": True})
    task, _ = task_of(run, None)
    build, data = lambda factor: task.network(0, factor), task.data.train
    assert (run.before.epochs, run.before.learning_rate, run.training.learning_rate) == (3, 0.05, 0.02)
    small = run_method(Baseline(), build, data, run.before, action=task.action).network
    large = run_method(run.method, build, data, run.training, action=task.action, network=small, prior=task.prior())
    found, predictions = perform(run, work=tmp_path)
    metrics, expected = evaluate_task(large.network, task, images=20, draws=4, seed=0)
    assert {name: found["rows"][0][name] for name in metrics} == metrics and torch.equal(predictions, expected)
    each = [3 * 4 * 64 * multiply_adds(task.network(0, factor), (1, 8, 8)) for factor in (1, 4)]
    assert found["training_multiply_adds"] == 3 * each[0] + each[1]
    assert {path.name for path in tmp_path.iterdir()} == {run.name(None), run.first().name(None)}
    assert perform(run, work=tmp_path).record["rows"] == found["rows"] == perform(run).record["rows"]


def test_what_several_runs_begin_with_has_one_name():
    others = [BEFORE.changed(change) for change in (
        {"method.name": "regular"}, {"training.learning_rate": 0.1}, {"training.epochs": 5}, {"evaluation.draws": 9})]
    assert {other.first().name(None) for other in others} == {BEFORE.first().name(None)}
    assert BEFORE.first().name(None) != BEFORE.with_seed(1).first().name(None) and BASE.first() is None


def test_a_checkpoint_of_a_run_is_a_network_of_its_own(tmp_path):
    run = BASE.changed({"method.name": "block_diagonal", "method.trigger": 1})
    learned = learn(run, None, tmp_path)
    network = load_network(tmp_path / run.name(None))
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in learned.network.state_dict().items())
    notes = read_checkpoint(tmp_path / run.name(None)).description["notes"]
    assert notes["method"] == plain(run.method) and notes["setup"] == plain(run.setup)


def test_runs_use_one_thread_and_give_it_back(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(runs, "learn", lambda *given: pytest.fail("reached"))
    with pytest.raises(pytest.fail.Exception, match="reached"):
        perform(BASE)
    assert seen == [1, 3]


def test_an_interruption_is_raised(monkeypatch):
    monkeypatch.setattr(runs, "run_method", lambda *given, **options: runs_result())

    def runs_result():
        return type("Trained", (), {"status": "interrupted"})

    with pytest.raises(KeyboardInterrupt):
        perform(BASE)


@pytest.mark.processes
@pytest.mark.parametrize("change", [{}, {"method.name": "block_diagonal", "method.trigger": 150}],
                         ids=["one call", "two calls"])
def test_a_killed_process_loses_an_epoch_at_most(change, tmp_path):
    """Killed twice in mid-training; each new process goes on from the epoch that was written last."""
    run = BASE.changed({"training.epochs": 300} | change)
    code = ("import sys, json; from pathlib import Path; from symbnn.studies.runs import perform, run_from_json; "
            "perform(run_from_json(json.loads(sys.argv[1])), work=Path(sys.argv[2]))")
    folders = [tmp_path / run.name(None), tmp_path / f"{run.name(None)}-start"]

    def progress():
        there = [path for folder in folders if (path := folder / "checkpoint.json").exists()]
        return json.loads(there[0].read_text())["progress"]["epoch"] if there else 0

    for kills in range(2):
        before = progress()
        process = subprocess.Popen([sys.executable, "-c", code, json.dumps(plain(run)), str(tmp_path)],
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        while process.poll() is None and progress() < min(before + 3 + 150 * kills, 299):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert progress() > before
    learned = learn(run, None, tmp_path)
    straight = learn(run, None, None)
    assert learned.summary == straight.summary
    for one, other in zip(learned.network.parameters(), straight.network.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("change, place", [
    ({"method.projected": True}, "projected False in the checkpoint, True now"),
    ({"method.name": "row_rolled"}, "name 'regular' in the checkpoint, 'row_rolled' now"),
    ({"setup.start": "invariant"}, "start 'random' in the checkpoint, 'invariant' now"),
])
def test_a_checkpoint_under_another_run_s_name_is_not_gone_on_with(change, place, tmp_path):
    """Copied or renamed folders; each of these runs would give the network of another one."""
    run = BASE.changed({"method.name": "regular"})
    other = run.changed(change)
    learn(run, None, tmp_path)
    shutil.copytree(tmp_path / run.name(None), tmp_path / other.name(None))
    with pytest.raises(Refusal) as caught:
        learn(other, None, tmp_path)
    assert place in caught.value.got


# Functions


def test_a_call_has_its_function_s_results():
    run = FunctionRun("two_weights", (("method", "mean_field"), ("slope", 0.1), ("noise", 1.0)), 3)
    record = run.job(None, None)().record
    assert record["rows"] == [simulations.two_weights(3, "mean_field", slope=0.1, noise=1.0)]
    assert record["run"] == run.values() and record["data_crc32"] is None
    assert run.value("slope") == 0.1 and run.value("draws") is None and run.source == "symbnn.studies.simulations"
    changed = run.changed({"slope": 0.2}).with_seed(5)
    assert changed.values() == {"function": "two_weights", "seed": 5,
                                  "settings": {"method": "mean_field", "slope": 0.2, "noise": 1.0}}
    assert run_from_json(json.loads(json.dumps(changed.values()))) == changed


def test_calls_use_one_thread(monkeypatch):
    monkeypatch.setitem(FUNCTIONS, "toy", lambda seed, a: {"threads": torch.get_num_threads(), "value": a + seed})
    torch.set_num_threads(2)
    try:
        assert FunctionRun("toy", (("a", 1),), 2).job(None, None)().record["rows"] == [{"threads": 1, "value": 3}]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_functions_that_are_not_there_are_refused():
    with pytest.raises(Refusal, match=r"one of width, two_weights.* as the simulation"):
        FunctionRun("magic").check(None)


@pytest.mark.parametrize("settings, reason", [
    ({"method": "bethe", "units": 4, "separaton": 1.0}, "nothing at separation"),
    ({"method": "bethe", "units": 4, "separation": 1.0, "draw": 3}, "3 at draw .a name that nothing reads"),
    ({"method": "bethee", "units": 4, "separation": 1.0}, "bethee. at method"),
    ({"method": "bethe", "units": 4.5, "separation": 1.0}, "4.5 at units"),
    ({"method": "bethe", "units": 4, "separation": "wide"}, "wide. at separation"),
    ({"method": "bethe", "units": None, "separation": 1}, "None at units"),
])
def test_settings_that_a_function_does_not_take_are_refused_before_a_call(settings, reason):
    with pytest.raises(Refusal, match=reason):
        FunctionRun("width", tuple(settings.items())).check(None)


def test_functions_without_types_take_what_their_names_say(monkeypatch):
    monkeypatch.setitem(FUNCTIONS, "toy", lambda seed, a, b=0: {"value": a})
    monkeypatch.setitem(FUNCTIONS, "open", lambda seed, **others: {"value": 1})
    FunctionRun("toy", (("a", "anything"),)).check(None)
    FunctionRun("open", (("c", 3),)).check(None)
    with pytest.raises(Refusal, match="at c "):
        FunctionRun("toy", (("a", 1), ("c", 2))).check(None)
    assert FunctionRun("toy").results() == FunctionRun("nowhere").results() == ("*",)


@pytest.mark.parametrize("its", [
    FunctionRun("width", (("method", "bethe"), ("units", 3), ("separation", 1.0))),
    FunctionRun("two_weights", (("method", "mean_field"), ("slope", 0.1), ("noise", 1.0))),
])
def test_functions_say_what_they_find(its):
    its.check(None)
    row = its.job(None, None)().record["rows"][0]
    assert {name for name in row if not name.endswith("_se")} == set(its.results())


def test_results_that_are_not_finite_are_left_out_and_named(monkeypatch):
    monkeypatch.setitem(FUNCTIONS, "toy", lambda seed: {"a": float("inf"), "b": float("nan"), "c": 1.0, "d": None})
    record = FunctionRun("toy").job(None, None)().record
    assert record["rows"] == [{"a": None, "b": None, "c": 1.0, "d": None}] and record["not_finite"] == ["a", "b"]
    monkeypatch.setitem(FUNCTIONS, "toy", lambda seed: {"a": 1.0, "d": None})
    assert "not_finite" not in FunctionRun("toy").job(None, None)().record


def test_a_trained_network_whose_metric_is_not_finite_keeps_the_others(monkeypatch):
    measured = runs.measure_once
    monkeypatch.setattr(runs, "measure_once", lambda *given: (found := measured(*given))._replace(
        rows=[row | {"nll_nats": float("inf")} for row in found.rows]))
    record = perform(BASE).record
    assert record["not_finite"] == ["nll_nats"] and record["rows"][0]["nll_nats"] is None
    assert 0 <= record["rows"][0]["accuracy"] <= 1
