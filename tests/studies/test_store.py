"""The store: what is found, refused, stale or interrupted; processes, backends, and one table whoever computes it."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import replace

import pytest
import torch

from helpers_studies import BASE, TINY, without_seconds
from symbnn.errors import Refusal
from symbnn.files import sole_writer
from symbnn.records import SEAL, write_record
from symbnn.studies import runs, store
from symbnn.studies.grids import DEMO, Comparison, Panel, Study
from symbnn.studies.methods import METHODS
from symbnn.studies.runs import FUNCTIONS, FunctionRun
from symbnn.studies.store import check, code_version, execute, predictions
from symbnn.studies.tables import as_csv, table
from symbnn.studies.tasks import Setup, evaluate_task

COMPARED = Comparison(Setup(channels=(2, 4), train_size=64), replace(DEMO, epochs=2, batch_size=64), small_epochs=3,
                      methods=("baseline", "regular"), seeds=(0,), evaluation_draws=4, images=20)


def files(folder):
    """The records in a folder."""
    return [path for path in folder.glob("*.json") if not path.name.startswith(".")]


# What is there


def test_studies_share_runs(finished, untrained):
    study, records, work = finished
    part = replace(study, title="another", grids=study.grids[1:], seeds=(1,), panels=(Panel("brier"),))
    assert execute(part, work) == [records[5], records[7]]


def test_a_changed_study_does_not_mix(finished, tmp_path):
    study, records, there = finished
    work = shutil.copytree(there, tmp_path / "work")
    other = replace(study, base=BASE.changed({"training.learning_rate": 0.01}), grids=study.grids[:1], seeds=(0,),
                    series=())
    before = {path.name for path in work.iterdir()}
    new = execute(other, work)
    assert {path.name for path in work.iterdir()} - before == {f"{name}.json" for name in check(other.runs(), None)}
    assert new[0]["rows"] != records[0]["rows"] and new[0]["run"]["training"]["learning_rate"] == 0.01


@pytest.mark.parametrize("edit", [
    lambda text: "", lambda text: "{}", lambda text: text[:-20], lambda text: text.replace('"seed": 0', '"seed": 5'),
    lambda text: re.sub('"accuracy": 0', '"accuracy": 1', text), lambda text: text.replace('"rows"', '"row"'),
])
def test_damaged_or_edited_records_are_refused(finished, tmp_path, edit, untrained):
    study, _, work = finished
    for path in files(work):
        (tmp_path / path.name).write_text(edit(path.read_text()) if '"seed": 0' in path.read_text()
                                          else path.read_text())
    with pytest.raises(Refusal, match="remove"):
        execute(study, tmp_path)


def sealed_again(path, target, edit):
    """Write a record elsewhere after `edit(record)`, with a valid seal."""
    record = {name: its for name, its in json.loads(path.read_text()).items() if name != SEAL}
    edit(record)
    write_record(target, record)


@pytest.mark.parametrize("edit, said", [
    (lambda record: record["run"]["training"].update(seed=5), "a record of another run: training seed 5 for 0"),
    (lambda record: record["run"]["method"].update(name="wide"), "method name 'wide' for 'baseline'"),
    (lambda record: record["run"]["setup"].update(dataset=5), "5 at dataset"),
    (lambda record: record.update(data_crc32=1), "a record of another data: 1 for"),
    (lambda record: record.update(rows=[]), "[] at rows"), (lambda record: record.update(rows=[{}]), "{} at rows.0"),
    (lambda record: record["rows"][0].update(accuracy=[1]), "at rows.0.accuracy"),
    (lambda record: record.update(evaluation_seconds=-1), "-1 at evaluation_seconds"),
    (lambda record: record.pop("device"), "nothing at device"), (lambda record: record.update(note="x"), "at note"),
    (lambda record: record.update(run=3), "3 at run"), (lambda record: record.pop("code"), "nothing at code"),
])
def test_records_of_something_else_are_refused(finished, tmp_path, edit, said, untrained):
    study, records, work = finished
    name = f"{records[0]['name']}.json"
    sealed_again(work / name, tmp_path / name, edit)
    with pytest.raises(Refusal, match="remove") as caught:
        execute(study, tmp_path)
    assert said in caught.value.got and not caught.value.got.count("\n")


def test_a_record_under_another_name_is_refused(finished, tmp_path, untrained):
    """A seed would count twice, or a method under another one's name."""
    study, records, work = finished
    for copied, place in ((records[1], "training seed 1 for 0"), (records[4], "for")):
        shutil.copy(work / f"{copied['name']}.json", tmp_path / f"{records[0]['name']}.json")
        with pytest.raises(Refusal, match="copied or renamed") as caught:
            execute(study, tmp_path)
        assert place in caught.value.got


def test_two_studies_do_not_work_in_one_folder_at_once(finished, tmp_path, untrained):
    study, _, work = finished
    with sole_writer(tmp_path), pytest.raises(Refusal, match="nobody else"):
        execute(study, tmp_path)
    with sole_writer(work):  # everything is there: nothing is written
        execute(study, work)


def test_other_images_under_one_name_are_another_run(tmp_path, monkeypatch):
    one = replace(TINY, grids=TINY.grids[:1], seeds=(0,), series=())
    first = check(one.runs(), None)
    monkeypatch.setattr(runs, "task_of", lambda run, root, real=runs.task_of: (real(run, root)[0], 5))
    assert not set(first) & set(check(one.runs(), None))


def test_a_record_with_a_new_setting_at_its_default_is_found(finished, tmp_path, untrained):
    """As an earlier version wrote it, whose code was the same."""
    study, records, work = finished
    for path in files(work):
        sealed_again(path, tmp_path / path.name, lambda record: (record["run"]["setup"].pop("start"),
                                                                 record["run"].pop("before")))
    assert execute(study, tmp_path)[0]["rows"] == records[0]["rows"]


# Code


def test_stale_records_are_said_and_done_again(finished, tmp_path):
    study, records, work = finished
    lines = []
    for number, path in enumerate(sorted(files(work))):
        code = "other" if number < 3 else records[0]["code"]
        sealed_again(path, tmp_path / path.name, lambda record, code=code: record.update(code=code))
    found = execute(study, tmp_path, report=lines.append)
    assert without_seconds(found) == without_seconds(records) and {record["code"] for record in found} == {
        code_version("symbnn.studies.runs")}
    assert "3 of 8 runs were made by other code and are done again" in lines
    assert sum(line.startswith("[") for line in lines) == len(list(tmp_path.iterdir())) - 5 == 3


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A module of a package of two, whose text can be changed."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/inner").mkdir()
    (tmp_path / "tiny/__init__.py").write_text("")
    (tmp_path / "tiny/inner/__init__.py").write_text("")
    texts = {"inner/runs": '"""Doc."""\nfrom ..base import f  # why\n\n\ndef g(x):\n    """Twice."""\n'
                           "    return 2 * f(x)\n",
             "base": "def f(x):\n    return x\n", "inner/tables": "from .runs import g\n"}
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(store, "PACKAGE", "tiny")

    def version(**changes):
        for name, text in (texts | {key.replace("_", "/"): value for key, value in changes.items()}).items():
            (tmp_path / "tiny" / f"{name}.py").write_text(text)
        store._read.cache_clear()
        return code_version("tiny.inner.runs")

    yield version, texts
    store._read.cache_clear()


def test_the_version_is_that_of_the_code_which_computes(library):
    version, texts = library
    first = version()
    assert version() == first == version(inner_tables="def anything():\n    return 1\n")
    text = texts["inner/runs"]
    assert version(inner_runs=text.replace("Twice", "Two times").replace("# why", "")) == first
    assert version(inner_runs=text.replace('"""Doc."""\n', "\n\n")) == version(inner_runs=text.replace("Doc", "A"))
    assert version(inner_runs=text.replace("2 *", "3 *")) != first != version(base="def f(x):\n    return -x\n")


def test_runs_do_not_depend_on_tables_and_commands():
    seen, left = set(), ["symbnn.studies.runs"]
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            left += store._read(name)[1]
    assert {"symbnn.training.loop", "symbnn.symmetry.groups", "symbnn.studies.methods"} <= seen
    assert not seen & {f"symbnn.{name}" for name in ("cli", "studies.tables", "studies.figures", "studies.store")}


def test_code_that_is_in_no_file_is_refused():
    with pytest.raises(Refusal, match="file of a module"):
        code_version("__main__")


# Executing


def test_an_interrupted_study_goes_on_run_by_run(finished, tmp_path, monkeypatch):
    study, records, _ = finished
    real, begun = runs.learn, []

    def stop_at_the_fourth(run, *given):
        begun.append(run)
        if len(begun) == 4:
            raise KeyboardInterrupt
        return real(run, *given)

    monkeypatch.setattr(runs, "learn", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        execute(study, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    resumed = execute(study, tmp_path)
    assert len(begun) == 4 + 5 and begun[4:] == study.runs()[3:]
    assert without_seconds(resumed) == without_seconds(records)
    assert as_csv(table(study, resumed)) == as_csv(table(study, records))


def test_checkpoints_of_finished_runs_are_kept_where_asked(finished, tmp_path):
    study, _, work = finished
    assert not [path for path in work.iterdir() if path.is_dir()]
    one = replace(study, grids=({"method.name": ("block_diagonal",), "method.trigger": (1,)},), seeds=(0,))
    (record,) = execute(one, tmp_path, keep=True)
    assert {path.name.removeprefix(record["name"]) for path in tmp_path.iterdir()} == {"", "-start", ".json"}


def test_what_comparisons_begin_with_is_trained_once(tmp_path, monkeypatch):
    trained, real = [], runs.run_method
    monkeypatch.setattr(runs, "run_method", lambda method, *given, **options: trained.append(
        (str(method), not (options["folder"] / "checkpoint.json").exists())) or real(method, *given, **options))
    methods = ("baseline", "regular", "block_diagonal")
    study = replace(COMPARED, methods=methods).study()
    records = execute(study, tmp_path)
    new = [name for name, begins in trained if begins]
    assert sorted(new) == ["baseline", "baseline", "block_diagonal", "regular"]
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    alone = execute(replace(COMPARED, methods=methods[2:]).study(), tmp_path / "alone", jobs=2)
    assert alone[0]["rows"] == records[2]["rows"]


def test_predictions_are_kept_beside_the_record(tmp_path):
    study = COMPARED.study()
    records = execute(study, tmp_path, keep=True)
    for run, record in zip(study.runs(), records):
        network = runs.learn(run, None, tmp_path).network
        metrics, expected = evaluate_task(network, runs.task_of(run, None)[0], images=20, draws=4)
        assert torch.equal(predictions(tmp_path, record), expected)
        assert {name: record["rows"][0][name] for name in metrics} == metrics
    (tmp_path / f"{records[0]['name']}.npy").unlink()
    with pytest.raises(Refusal, match="beside the record"):
        predictions(tmp_path, records[0])


def test_all_methods_run_in_a_comparison(tmp_path):
    names = tuple(name for name in METHODS if name != "learned_precisions")
    study = replace(COMPARED, methods=names).study()
    rows = table(study, execute(study, tmp_path))
    defects = {row["method.name"]: row["defect_unbiased"] for row in rows}
    assert list(defects) == list(names) and defects["regular"] < defects["baseline"] / 5
    assert abs(defects["tied"]) < 1e-12 and defects["orbit_mixture"] == 0


@pytest.mark.processes
@pytest.mark.parametrize("backend", ["loky", "dask"])
def test_parallel_runs_have_the_numbers_of_sequential_ones(finished, tmp_path, backend):
    study, records, _ = finished
    study, records, lines = replace(study, grids=study.grids[1:]), records[4:], []
    with ExitStack() as stack:
        with suppress(OSError):  # the port of Dask's pages is another program's, as beside a second study
            stack.enter_context(socket.create_server(("", 8787)))
        found = execute(study, tmp_path, jobs=2, backend=backend, report=lines.append)
    assert without_seconds(found) == without_seconds(records)
    assert len(lines) == len(list(tmp_path.iterdir())) == 4 and lines[-1].startswith("[4/4] ")


@pytest.mark.parametrize("change, options, reason", [
    ({}, {"backend": "threads"}, "as backend"),
    ({}, {"jobs": 0}, "number of jobs"),
    ({"evaluation.images": 5000}, {}, "5000 of 360"),
    ({"training.batch_size": 500}, {}, "batch"),
    ({"setup.family": "lognormal"}, {}, "LogNormal"),
    ({"setup.group": "shifts"}, {}, "circular"),
    ({"training.device": "tpu"}, {}, "device"),
    ({"training.epochs": 1, "setup.dataset": "nowhere.npz"}, {}, "nowhere"),
    ({"training.objective": "symmetrised", "setup.prior": "random_means"}, {}, "prior"),
    ({"training.objective": "symmetrised", "training.information_method": "permanent", "setup.channels": (32, 64)}, {},
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
    with pytest.raises(Refusal, match="trigger within"):
        execute(replace(TINY, grids=grids), tmp_path / "new")


def test_a_run_that_diverges_is_named(tmp_path):
    study = replace(TINY, base=BASE.changed({"training.learning_rate": 1e30}), grids=TINY.grids[:1], series=())
    with pytest.raises(Refusal, match=r"in the run with baseline, seed 0"):
        execute(study, tmp_path)
    assert not files(tmp_path)


@pytest.mark.parametrize("missing", ["dask", "ray"])
def test_a_missing_package_is_named(missing, tmp_path, monkeypatch):
    for name in ("distributed", "ray"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Refusal, match="pip install"):
        execute(replace(TINY, grids=({"method.name": ("wide",)},), series=()), tmp_path, backend=missing)


# Functions


CALLS = []


def toy(seed, a, b=0):
    """A row of numbers; every call is counted."""
    CALLS.append((seed, a, b))
    return {"value": a + 10.0 * b + seed, "odd": None if a == 2 else float(a)}


@pytest.fixture
def simulated(monkeypatch):
    """A study of a function."""
    CALLS.clear()
    monkeypatch.setitem(FUNCTIONS, "toy", toy)
    return Study("A toy", "none", FunctionRun("toy"), ({"a": (1, 2)}, {"a": (3,), "b": (0, 1)}), (0, 2), x="a",
                 panels=(Panel("value"),))


def test_calls_are_made_once(simulated, tmp_path):
    lines = []
    records = execute(simulated, tmp_path, report=lines.append)
    assert [record["rows"][0]["value"] for record in records] == [1, 3, 2, 4, 3, 5, 13, 15]
    assert len(CALLS) == len(list(tmp_path.iterdir())) == len(lines) == 8
    assert lines[-1].startswith("[8/8] a 3, b 1, seed 2: ")
    lines.clear()
    assert execute(simulated, tmp_path, report=lines.append) == records and len(CALLS) == 8
    assert lines == ["8 of 8 runs are there already"]
    more = execute(replace(simulated, seeds=(0, 1, 2)), tmp_path)
    assert len(CALLS) == 12 and {seed for seed, *_ in CALLS[8:]} == {1} and more[0] == records[0]


def test_another_function_has_calls_of_its_own(simulated, tmp_path, monkeypatch):
    execute(simulated, tmp_path)
    monkeypatch.setitem(FUNCTIONS, "other", toy)
    found = execute(replace(simulated, base=FunctionRun("other")), tmp_path)
    assert len(CALLS) == 16 and {record["run"]["function"] for record in found} == {"other"}


@pytest.mark.parametrize("edit, said", [
    (lambda record: record["run"].update(seed=5), "seed 5 for"), (lambda record: record.update(rows=[{}]), "at rows.0"),
    (lambda record: record["run"].update(settings=[]), "at settings"),
    (lambda record: record["run"].update(function="two"), "function 'two'"),
])
def test_files_of_calls_that_hold_something_else_are_refused(simulated, tmp_path, edit, said):
    execute(simulated, tmp_path)
    path = sorted(files(tmp_path))[0]
    sealed_again(path, path, edit)
    with pytest.raises(Refusal, match="remove") as caught:
        execute(simulated, tmp_path)
    assert said in caught.value.got


@pytest.mark.parametrize("base, said", [
    (FunctionRun("two_weights", (("method", "mean_field"), ("slope", "steep"), ("noise", 1.0))), "'steep' at slope"),
    (FunctionRun("two_weights", (("method", "symetrised"), ("slope", 0.1), ("noise", 1.0))), "'symetrised' at method"),
    (FunctionRun("two_weights", (("method", "mean_field"), ("slope", 0.1))), "nothing at noise"),
    (FunctionRun("two_weights", (("method", "mean_field"), ("slope", 0.1), ("noise", 1.0), ("nois", 1.0))), "at nois"),
])
def test_calls_that_a_function_does_not_take_are_refused_before_work(base, said):
    import symbnn.studies.simulations  # noqa: F401

    with pytest.raises(Refusal, match="settings of two_weights") as caught:
        check([base], None)
    assert said in caught.value.got


def test_calls_in_processes_give_the_same_rows(tmp_path):
    import symbnn.studies.simulations  # noqa: F401

    study = Study("Width", "none", FunctionRun("width"), ({"method": ("marginal", "infonce"), "units": (3,),
                                                           "separation": (1.0,)},), (0, 1), x="units")
    one, two = execute(study, tmp_path / "one"), execute(study, tmp_path / "two", jobs=2)
    for record in (*one, *two):
        record["rows"][0].pop("seconds")
    assert without_seconds(one) == without_seconds(two)


# Processes


def program(folder, *arguments):
    command = [sys.executable, "-m", "symbnn", "reproduce", *arguments]
    return subprocess.Popen(command, cwd=folder, env={**os.environ, "NO_COLOR": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)


def finished_runs(folder):
    return files(folder / "work")


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


@pytest.mark.processes
def test_a_stopped_process_goes_on_to_the_same_table(finished, tmp_path):
    study, records, _ = finished
    (tmp_path / "tiny.json").write_text(json.dumps(study.values()))
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
