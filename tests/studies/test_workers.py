"""Workers: numbers that can be meant, schedulers that do not answer, workers that die, an end by signals."""
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import dask
import joblib
import pytest
from distributed import LocalCluster

from helpers_studies import TINY
from symbnn.errors import Refusal
from symbnn.studies import store
from symbnn.studies.grids import Panel, Study
from symbnn.studies.runs import FUNCTIONS, FunctionRun
from symbnn.studies.store import JOBS_PER_CPU, check_workers, code_version, execute

ADDRESS = "tcp://127.0.0.1:1"


@pytest.mark.parametrize("backend, jobs, address, reason", [
    ("threads", 1, None, "as backend"), ("loky", 0, None, "number of jobs"), ("loky", 2.0, None, "number of jobs"),
    ("loky", 10**6, None, "each of the"), ("dask", 10**6, None, "each of the"), ("ray", 10**6, None, "each of the"),
    ("loky", 1, ADDRESS, "backend with a scheduler"), ("dask", 2, ADDRESS, "has its own workers"),
])
def test_workers_that_cannot_be_meant_are_refused(backend, jobs, address, reason, tmp_path, untrained):
    with pytest.raises(Refusal, match=reason):
        execute(TINY, tmp_path / "new", backend=backend, jobs=jobs, address=address)
    assert not (tmp_path / "new").exists()


def test_some_more_jobs_than_cpus_are_allowed():
    check_workers("loky", JOBS_PER_CPU * joblib.cpu_count(), None)
    check_workers("dask", 1, ADDRESS)


@pytest.mark.parametrize("missing, options, extra", [
    ("joblib", {}, "studies"), ("tqdm", {"progress": True}, "progress"),
])
def test_missing_packages_are_refused_before_training(missing, options, extra, tmp_path, monkeypatch, untrained):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(Refusal, match=rf"symbnn\[{extra}\]"):
        execute(TINY, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_what_has_to_be_ready_is_asked_after_all_checks_and_before_training(tmp_path, untrained):
    def refuse():
        raise Refusal("a folder", got="none", cause="a", fix="b")

    with pytest.raises(Refusal, match="a folder"):
        execute(TINY, tmp_path, ready=refuse)
    with pytest.raises(Refusal, match="as family"):
        execute(replace(TINY, base=TINY.base.changed({"setup.family": "normal"})), tmp_path, ready=refuse)


# Schedulers


@pytest.fixture
def silent():
    """A port where connections are taken, and nothing is answered."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("address", [
    ADDRESS, "127.0.0.1:1", "tcp://nowhere.invalid:8786", "foo://127.0.0.1:1", "tcp://:x", "silent",
])
def test_schedulers_that_do_not_answer_are_refused(address, silent, tmp_path, monkeypatch, untrained):
    monkeypatch.setattr(store, "PATIENCE", 1)
    began = time.monotonic()
    with pytest.raises(Refusal, match="a scheduler that answers"):
        execute(TINY, tmp_path, backend="dask", address=silent if address == "silent" else address)
    assert time.monotonic() - began < 10


@pytest.mark.processes
def test_a_scheduler_without_workers_is_refused(tmp_path, monkeypatch, untrained):
    monkeypatch.setattr(store, "PATIENCE", 0.5)
    here = {"dashboard_address": "127.0.0.1:0", "scheduler_kwargs": {"dashboard": False}}  # any free port, no pages
    with LocalCluster(1, threads_per_worker=1, processes=False, **here) as cluster:
        cluster.scale(0)
        while cluster.scheduler.workers:
            time.sleep(0.05)
        with pytest.raises(Refusal, match="has a worker"):
            execute(TINY, tmp_path, backend="dask", address=cluster.scheduler_address)


# Workers that die


MODULE = '''
import os
import signal
import time
from pathlib import Path

from symbnn.studies.runs import simulation


@simulation
def fragile(seed, a, marks, deadly=""):
    """Every call leaves a mark; calls that are `deadly` end their worker, "once" the first time, "always" each time."""
    mark = Path(marks) / f"{a}"
    with mark.open("a") as file:
        file.write(f"{os.getpid()}\\\\n")
    count = len(mark.read_text().splitlines())
    time.sleep(0.2)
    if deadly == "always" or deadly == "once" and count == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if deadly == "asleep":
        time.sleep(300)
    return {"value": float(a)}
'''.replace("\\\\n", "\\n")


@pytest.fixture
def fragile(tmp_path, monkeypatch):
    """Runs the function on numbers, some of which are deadly to the worker; the records, or what is raised."""
    (tmp_path / "fragile_module.py").write_text(MODULE)
    (tmp_path / "marks").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fragile_module", raising=False)
    importlib.import_module("fragile_module")
    yield lambda grids: Study("Fragile", "none", FunctionRun("fragile", (("marks", str(tmp_path / "marks")),)), grids,
                              (0,), x="a", panels=(Panel("value"),))
    FUNCTIONS.pop("fragile")


def calls(tmp_path, a):
    return len((tmp_path / "marks" / str(a)).read_text().splitlines())


@pytest.mark.processes
def test_runs_of_a_dead_worker_are_done_again_once_and_all_others_are_kept(fragile, tmp_path):
    study, lines = fragile(({"a": (1, 2)}, {"a": (3,), "deadly": ("once",)}, {"a": (4,), "deadly": ("always",)},
                            {"a": (5,)})), []
    code_version("fragile_module")  # takes longer than these runs, and is remembered
    reason = r"died again when its run was alone.*in the run with a 4, always, seed 0 .*memory"
    with pytest.raises(Refusal, match=reason) as refused:
        execute(study, tmp_path / "work", jobs=2, report=lines.append)
    assert "a 3" not in refused.value.got and 1 <= calls(tmp_path, 4) <= 2 and 2 <= calls(tmp_path, 3) <= 3
    assert len(list((tmp_path / "work").glob("*.json"))) == 4 and all(calls(tmp_path, a) <= 2 for a in (1, 2, 5))
    said = [line for line in lines if line.startswith("A worker has died")]
    assert 1 <= len(said) <= 2 and "a 3, once" in "".join(said) and all(line.count("seed 0") <= 3 for line in said)


@pytest.mark.processes
def test_a_run_that_dask_gives_up_is_named_and_all_others_are_kept(fragile, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    study = fragile(({"a": (1,)}, {"a": (2,), "deadly": ("always",)}, {"a": (3, 4)}))
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}), pytest.raises(
            Refusal, match=r"died several times.*in the run with a 2, always, seed 0 .*memory"):
        execute(study, tmp_path / "work", jobs=2, backend="dask")
    assert len(list((tmp_path / "work").glob("*.json"))) == 3


# Ended by signals


SCRIPT = """
import sys
import fragile_module
from symbnn.studies.grids import Panel, Study
from symbnn.studies.runs import FunctionRun
from symbnn.studies.store import execute

study = Study("Fragile", "none", FunctionRun("fragile", (("marks", "marks"),)),
              ({"a": (1,)}, {"a": (2, 3), "deadly": ("asleep",)}), (0,), x="a", panels=(Panel("value"),))
execute(study, "work", jobs=2, report=print)
"""


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.processes
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="processes are looked up in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_the_process_that_waits_for_them(fragile, tmp_path, number):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    process = subprocess.Popen([sys.executable, "-u", "-c", SCRIPT], cwd=tmp_path, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    marks, deadline = tmp_path / "marks", time.monotonic() + 60
    while time.monotonic() < deadline and not (
            len(list(marks.iterdir())) == 3 and list((tmp_path / "work").glob("*.json"))):
        time.sleep(0.05)
    workers = {int(pid) for path in marks.iterdir() for pid in path.read_text().split()}
    process.send_signal(number)  # to this one alone, as a cluster does
    began = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 10 and len(workers) == 2 and not any(map(alive, workers)), err
    assert process.returncode == -number if number == signal.SIGTERM else "KeyboardInterrupt" in err
    assert "1 of 3 runs are finished" in out and len(list((tmp_path / "work").glob("*.json"))) == 1
