"""The command line: what it says, what it writes, its exit statuses, and that mistakes leave nothing behind."""
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from symbnn import __version__, cli
from symbnn.data.sources import PARTS
from symbnn.errors import Refusal
from symbnn.posterior.layers import with_posteriors
from symbnn.studies.catalogue import STUDIES, Cost, find_study
from symbnn.studies.evaluations import Evaluation
from symbnn.studies.grids import Comparison, Panel, Study
from symbnn.studies.results import read_results
from symbnn.studies.runs import FUNCTIONS, FunctionRun, NetworkRun
from symbnn.studies.tables import METRICS
from symbnn.studies.tasks import Setup
from symbnn.studies.titles import listing
from symbnn.training.architectures import PRESETS, build
from symbnn.training.checkpoints import read_checkpoint, save_network
from symbnn.training.config import TrainingConfig
from symbnn.training.loop import checkpoints

NETWORK = ["--channels", "2,4", "--train-size", "64", "--batch-size", "64"]
TRAIN = ["train", *NETWORK, "--epochs", "2", "--learning-rate", "0.02"]
COMPARE = ["compare", *NETWORK, "--epochs", "2", "--small-epochs", "2", "--seeds", "0", "--evaluation-draws", "4",
           "--images", "20", "--methods", "baseline,regular"]


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    return lambda *arguments: CliRunner().invoke(cli.app, [str(argument) for argument in arguments], prog_name="symbnn")


def refused(found, reason: str) -> None:
    """One paragraph on standard error, exit status 2, no traceback."""
    assert found.exit_code == 2, found.output
    assert found.stdout == ""
    assert re.search(reason, found.stderr), found.stderr
    assert found.stderr.startswith("symbnn: ") and found.stderr.count("\n") == 1 and "Traceback" not in found.stderr
    assert "Received: " in found.stderr and "Fix: " in found.stderr


def save_arrays(path: Path, **changes) -> None:
    generator = np.random.default_rng(0)
    made = {
        "train_images": generator.integers(0, 256, (80, 8, 8), dtype=np.uint8), "train_labels": np.arange(80) % 3,
        "test_images": generator.integers(0, 256, (6, 8, 8), dtype=np.uint8), "test_labels": np.arange(6) % 3,
    }
    np.savez(path, **{**made, **changes})


# Help


def test_version(shell):
    found = shell("--version")
    assert found.exit_code == 0 and found.stdout.startswith(f"symbnn {__version__} (torch ")


@pytest.mark.parametrize("command", [[], ["train"], ["evaluate"], ["compare"], ["reproduce"]])
def test_help_explains_every_option_and_gives_examples(shell, command):
    found = shell(*command, "--help")
    assert found.exit_code == 0 and "Examples:" in found.stdout and "symbnn compare" in shell("--help").stdout
    assert shell(*command, "-h").stdout == found.stdout
    for line in re.findall(r"│ [ *]*(--[a-z-]+.*)│", found.stdout):
        explained = re.sub(r"--[a-z-]+|-\w\b|<\w+>|\*", "", line)
        assert len(explained.split()) > 1 or "--" not in line, f"{line!r} is not explained"


def test_every_option_of_the_library_is_an_option(shell):
    text = shell("train", "--help").stdout + shell("compare", "--help").stdout
    fields = set(cli.OPTIONS) - {"dataset"} | {"epochs", "seed", "seeds", "methods", "small_epochs", "precisions",
                                               "learned_from", "learned_every", "threads", "jobs"}
    missing = [name for name in fields if f"--{name.replace('_', '-')}" not in text]
    assert not missing


def test_defaults_are_those_of_the_library(shell, monkeypatch):
    seen = []
    monkeypatch.setattr(Comparison, "study", lambda comparison, root: seen.append(comparison) or sys.exit(0))
    assert shell("compare").exit_code == 0
    assert seen == [Comparison()]


# Train, evaluate, compare


SCORES = {f"{part}{name}" for part in ("", "orbit_") for name in ("accuracy", "nll_nats", "brier", "ece")} | {
    "defect_plugin", "defect_unbiased", "orbit_jensen_shannon_nats", "symmetric_kl_nats", "orbit_agreement"}


def test_train_evaluate_resume(shell, tmp_path):
    found = shell(*TRAIN, "-o", "runs/a")
    assert found.exit_code == 0, found.output
    assert "ELBO" in found.stdout and "nats a datum" in found.stdout and "symbnn evaluate runs/a" in found.stdout
    description = read_checkpoint(tmp_path / "runs/a").description
    assert description["notes"]["setup"]["channels"] == [2, 4] and description["notes"]["symbnn"] == __version__
    assert str(tmp_path) not in json.dumps(description)
    found = shell("evaluate", "runs/a", "--draws", "4", "--images", "30", "--csv", "m.csv", "--json", "m.json")
    assert found.exit_code == 0, found.output
    scores = [name for name in METRICS if name in SCORES]
    assert all(f" {METRICS[name].label} " in found.stdout for name in scores) and "nats" in found.stdout
    rows = list(csv.DictReader((tmp_path / "m.csv").read_text().splitlines()))
    assert list(rows[0]) == ["metric", "value", "standard_error", "unit"]
    assert [row["metric"] for row in rows] == scores
    whole = json.loads((tmp_path / "m.json").read_text())
    assert whole["metrics"]["accuracy"] == float(rows[0]["value"]) and whole["draws"] == 4
    longer = [*TRAIN[:-3], "3", *TRAIN[-2:]]
    assert shell(*longer, "-o", "runs/a", "--resume").exit_code == 0
    assert len(read_checkpoint(tmp_path / "runs/a").description["history"]) == 3


CHOSEN = {
    "variant": "shifted", "size": 10, "group": "none", "architecture": "S-FC+CONV", "strides": [2, 1],
    "prior": "per_tensor", "family": "gaussian", "augmentation": "none", "objective": "symmetrised",
    "information_method": "infonce", "information_draws": 3, "negatives": 5, "precisions": "elbo", "learned_from": 2,
    "learned_every": 3,
}


def stored(folder: Path) -> dict:
    """All settings that a checkpoint holds, by name."""
    description = read_checkpoint(folder).description
    method = description["notes"]["method"]
    learned = {"precisions": method.get("rule"), "learned_from": method.get("first"),
               "learned_every": method.get("every")}
    return description["notes"]["setup"] | description["config"] | learned


def options(values: dict) -> list[str]:
    """As typed in a shell."""
    typed = {name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in values.items()}
    return [str(part) for name, value in typed.items() for part in (f"--{name.replace('_', '-')}", value)]


def test_every_choice_is_an_option_and_reaches_the_checkpoint(shell, tmp_path):
    chosen = {name: value for name, value in CHOSEN.items() if name not in cli.OBJECTIVE}
    found = shell(*TRAIN, *options(chosen), "--standardized", "-o", "paths")
    assert found.exit_code == 0, found.output
    assert stored(tmp_path / "paths").items() >= {**chosen, "standardized": True}.items()
    chosen = {name: CHOSEN[name] for name in cli.OBJECTIVE} | {"architecture": "mlp", "group": "none"}
    found = shell(*TRAIN, *options(chosen), "-o", "units")
    assert found.exit_code == 0, found.output
    assert stored(tmp_path / "units").items() >= chosen.items() and not stored(tmp_path / "units")["standardized"]
    assert {its.name for its in fields(Setup)} <= cli.OPTIONS.keys()
    assert not any(f"--{name.replace('_', '-')}" in shell("compare", "--help").stdout for name in cli.OBJECTIVE)


PATHS = ["--architecture", "F-FC+CONV", "--group", "none", "--augmentation", "none", "--prior", "per_tensor",
         "--learned-from", "2", "--learned-every", "2"]
ROUTES = {
    "elbo": [*PATHS, "--precisions", "elbo"],
    "evidence": [*PATHS, "--precisions", "evidence", "--family", "point"],
    "units": ["--architecture", "mlp", "--objective", "symmetrised", "--information", "infonce"],
}


@pytest.mark.parametrize("route", ROUTES)
def test_a_run_with_learned_precisions_or_a_symmetrised_objective_is_resumed(shell, tmp_path, route):
    def trained(epochs: int, folder: str, *others: str) -> str:
        found = shell(*TRAIN, *ROUTES[route], "--threads", "1", "--epochs", epochs, "-o", folder, *others)
        assert found.exit_code == 0, found.output
        return found.stdout

    whole = trained(4, "whole")
    trained(3, "parts")
    resumed = trained(4, "parts", "--resume")
    one, other = (read_checkpoint(tmp_path / name).part("network") for name in ("whole", "parts"))
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    plain = shell(*TRAIN, *ROUTES[route], "--threads", "1", "--epochs", "4", "--precisions", "fixed", "--objective",
                  "elbo", "-o", "plain")
    other = read_checkpoint(tmp_path / "plain").part("network")
    assert plain.exit_code == 0 and not all(torch.equal(value, other[name]) for name, value in one.items())
    assert "effective dimension" not in plain.stdout
    rows = [line.strip() for line in whole.splitlines() if line.strip().startswith("layer")]
    assert (len(rows) == 5 and "f_fc" in rows[2]) if route != "units" else not rows
    assert resumed.replace("parts", "whole") == whole
    found = shell("evaluate", "parts", "--draws", "3", "--images", "20", "--json", "m.json")
    assert found.exit_code == 0, found.output
    assert [line.strip() for line in found.stdout.splitlines() if line.strip().startswith("layer")] == rows
    paths = json.loads((tmp_path / "m.json").read_text()).get("paths", [])
    assert [row["path"] for row in paths] == (["conv", "f_fc"] * 2 if rows else [])
    assert all(0 <= row["share"] <= 1 for row in paths)


def runs_of(folder: Path) -> dict[str, Path]:
    """The checkpoints of runs in a folder of `symbnn compare`, by method and seed."""
    return {path.name.rpartition("-")[0]: path for path in (folder / "runs").iterdir() if path.is_dir()
            and path.with_name(f"{path.name}.json").exists()}


def test_compare_shows_and_writes(shell, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    found = shell(*COMPARE, "-o", "out", "--data", "digits")
    assert found.exit_code == 0, found.output
    order = ["Against the baseline of equal budget", "regular: defect", "worse:", "cal. error ↓",
             "same training budget", "Written to out", "Next: symbnn evaluate"]
    places = [found.stdout.index(word) for word in order]
    assert places == sorted(places) and max(map(len, found.stdout.splitlines()[:12])) <= 80 and "…" not in found.stdout
    assert "[1/2] baseline" in found.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "runs", "table.csv", "runs.csv", "study.json", "figure.png", "orbit.png"}
    again = shell(*COMPARE, "-o", "out")
    assert again.exit_code == 0 and again.stdout == found.stdout and again.stderr == "2 of 2 runs are there already\n"
    folder = runs_of(tmp_path / "out")["regular-0"]
    assert shell("evaluate", folder, "--draws", "4", "--images", "20", "--json", "m.json").exit_code == 0
    _, rows = read_results(tmp_path / "out", "runs.csv")
    measured = json.loads((tmp_path / "m.json").read_text())["metrics"]
    assert {name: rows[1][name] for name in measured} == measured  # of the same seed
    other = shell(*COMPARE, "-o", "out", "--prior-scale", "0.5")
    assert other.exit_code == 0 and "there already" not in other.stderr and other.stdout != found.stdout


def test_the_command_is_noted_without_folders_of_the_machine(monkeypatch):
    folders = ["-o", "/home/me/runs/a", "--data=/data/mine.npz", "--data-folder", "~/idx"]
    typed = ["symbnn", "train", *folders, "--epochs", "2"]
    monkeypatch.setattr(sys, "argv", typed)
    assert cli._command() == "symbnn train -o a --data=mine.npz --data-folder idx --epochs 2"
    monkeypatch.setattr(sys, "argv", ["symbnn", "compare", "-o", "output/demo"])
    assert cli._command() == "symbnn compare -o output/demo"


def test_own_images_from_training_to_evaluation(shell, tmp_path):
    (tmp_path / "images").mkdir()
    save_arrays(tmp_path / "images/mine.npz")
    found = shell(*TRAIN, "--data", tmp_path / "images/mine.npz", "-o", "run")
    assert found.exit_code == 0, found.output
    assert str(tmp_path) not in json.dumps(read_checkpoint(tmp_path / "run").description)
    refused(shell("evaluate", "run", "--draws", "4"), "mine.npz")
    found = shell("evaluate", "run", "--draws", "4", "--data-folder", "images")
    assert found.exit_code == 0 and "mine.npz" in found.stdout


# Mistakes


MISTAKES = {
    "unknown data set": (["--data", "cifar"], "data set is one of digits"),
    "missing folder": (["--data", "mnist", "--data-folder", "nowhere"], "four IDX files"),
    "digits from a folder": (["--data-folder", "nowhere"], "not read from a folder"),
    "unknown group": (["--group", "S5"], "group is one of C4"),
    "a group that does not act": (["--group", "shifts"], "circular shift"),
    "unknown architecture": (["--architecture", "tree"], "cnn or mlp"),
    "channels": (["--channels", "2;4"], "integers with commas"),
    "too many poolings": (["--channels", "2,2,2,2"], "pool"),
    "unknown variant": (["--variant", "rolled"], "variant is one of plain"),
    "no pixels": (["--size", "0"], "positive number of pixels"),
    "strides of a cnn": (["--strides", "1,2"], "Strides belong to relaxed"),
    "strides": (["--strides", "1;2"], "--strides takes integers with commas"),
    "unknown family": (["--family", "normal"], "family is one of"),
    "unknown prior": (["--prior", "flat"], "prior is one of"),
    "unknown start": (["--start", "zero"], "start is one of"),
    "unknown estimator": (["--estimator", "magic"], "estimator is one of"),
    "unknown optimizer": (["--optimizer", "adam"], "optimizer is one of"),
    "no epochs": (["--epochs", "0"], "epochs is a positive integer"),
    "negative rate": (["--learning-rate", "-1"], "learning_rate"),
    "batch too large": (["--batch-size", "9999"], "[Bb]atch"),
    "training set too large": (["--train-size", "9999"], "training"),
    "device": (["--device", "abacus"], "device"),
    "threads": (["--threads", "-1"], "number of threads"),
    "jobs": (["--jobs", "0"], "number of jobs"),
    "missing own images": (["--data", "nowhere.npz"], "nowhere.npz"),
}


ALONE = {"threads": "train", "jobs": "compare"}  # options of one command


@pytest.mark.parametrize("command, mistake", [(command, mistake) for mistake in MISTAKES
                                              for command in ("train", "compare")
                                              if ALONE.get(mistake, command) == command])
def test_mistakes_are_refused_and_leave_nothing(shell, tmp_path, command, mistake):
    options, reason = MISTAKES[mistake]
    refused(shell(*(TRAIN if command == "train" else COMPARE), *options, "-o", "out"), reason)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert command == "train" or not (tmp_path / "out").exists()


IMPOSSIBLE = {
    "unknown objective": (["--objective", "iwae"], "objective is one of"),
    "unknown estimate": (["--information", "exact"], "information is one of"),
    "unknown rule": (["--precisions", "learnt"], "rule that precisions follow is one of elbo, evidence"),
    "never": (["--precisions", "elbo", "--learned-every", "0"], "between updates of precisions"),
    "evidence of turned images": (["--precisions", "evidence", "--family", "point"], "that of the training set"),
    "evidence of widths": (["--precisions", "evidence", "--augmentation", "none"], "evidence judges point masses"),
    "widths of points": (["--precisions", "elbo", "--family", "point"], "evidence judges point masses"),
    "precisions of priors with means": (["--precisions", "elbo", "--prior", "random_means"], r"prior N\(0, I / d\)"),
    "permutations of fixed priors": (["--objective", "symmetrised", "--prior", "random_means"], "prior is invariant"),
    "a relaxed network under turns": (["--architecture", "F-FC+CONV"], "symmetries in its paths"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_combinations_are_refused_before_training(shell, tmp_path, case):
    options, reason = IMPOSSIBLE[case]
    refused(shell(*TRAIN, *options, "-o", "out"), reason)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


IMAGES = {
    "NaN": ({"train_images": np.full((80, 8, 8), np.nan)}, "NaN"),
    "wrong shape": ({"train_images": np.zeros((80, 64))}, "shape"),
    "odd size": ({"train_images": np.zeros((80, 7, 7)), "test_images": np.zeros((6, 7, 7))}, "7 x 7"),
    "not square": ({"train_images": np.zeros((80, 8, 4)), "test_images": np.zeros((6, 8, 4))}, "square|8, 4|8 x 4"),
    "label out of range": ({"test_labels": np.full(6, 7)}, "label 7"),
    "negative label": ({"train_labels": np.full(80, -1)}, "label -1"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_images_that_cannot_be_used_are_refused(shell, tmp_path, case):
    changes, reason = IMAGES[case]
    save_arrays(tmp_path / "mine.npz", **changes)
    refused(shell(*TRAIN, "--data", "mine.npz", "-o", "out"), reason)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options, reason", [
    (["--methods", "magic"], "method is one of baseline"), (["--methods", ""], "method is one of"),
    (["--seeds", "one"], "integers with commas"), (["--seeds", "0,0"], "once"), (["--images", "9999"], "9999 of 360"),
    (["--split", "train"], "split is one of"), (["--evaluation-draws", "1"], "need three"),
    (["--family", "lognormal"], "LogNormal"),
])
def test_comparisons_that_cannot_be_are_refused(shell, tmp_path, options, reason):
    refused(shell(*COMPARE, *options, "-o", "out"), reason)
    assert not list(tmp_path.iterdir())


def test_a_truncated_file_is_refused_by_name(shell, tmp_path):
    (tmp_path / "data").mkdir()
    for name in PARTS:
        (tmp_path / "data" / name).write_bytes(b"\0\0\x08\x03" + bytes(8))
    refused(shell(*TRAIN, "--data", "mnist", "--data-folder", "data", "-o", "out"), "train-images-idx3-ubyte")


@pytest.fixture
def trained(shell):
    """A trained network in the folder `run`."""
    assert shell(*TRAIN, "-o", "run").exit_code == 0
    return shell


def test_a_folder_in_use_and_another_network_are_refused(trained, tmp_path):
    refused(trained(*TRAIN, "-o", "run"), "never overwrites")
    refused(trained(*TRAIN, "--channels", "4,4", "-o", "run", "--resume"), r"channels \[2, 4\] in the checkpoint")
    refused(trained(*TRAIN, "--prior-scale", "0.5", "-o", "run", "--resume"), "prior_scale 1.0 in the checkpoint")
    learnt = ("--precisions", "elbo", "--learned-from", "1")
    refused(trained(*TRAIN, *learnt, "-o", "run", "--resume"), "name 'baseline' in the checkpoint")
    refused(trained(*TRAIN, "--seed", "1", "-o", "run", "--resume"), "seed.0 in the checkpoint")
    refused(trained(*TRAIN, "-o", "other", "--resume"), "checkpoint")


def test_checkpoints_that_cannot_be_evaluated_are_refused(trained, tmp_path):
    refused(trained("evaluate", "nowhere"), "nowhere")
    refused(trained("evaluate", "run", "--draws", "0"), "draws")
    refused(trained("evaluate", "run", "--mode", "magic"), "mode")
    refused(trained("evaluate", "run", "--split", "train"), "split is one of")
    save_network(tmp_path / "saved", with_posteriors(build(PRESETS["digits"])), PRESETS["digits"])
    refused(trained("evaluate", "saved"), "notes without a setup")
    tensors = next((tmp_path / "run").glob("*.safetensors"))
    other = next((tmp_path / "saved").glob("*.safetensors"))
    tensors.write_bytes(other.read_bytes())
    refused(trained("evaluate", "run"), "other content")


def test_an_architecture_that_was_edited_is_another_network(trained, tmp_path):
    path = tmp_path / "run" / "checkpoint.json"
    description = json.loads(path.read_text())
    description["architecture"]["channels"] = [4, 4]
    path.write_text(json.dumps(description))
    refused(trained("evaluate", "run"), "checkpoint")


@pytest.mark.parametrize("command", [TRAIN, COMPARE])
def test_unwritable_folders_are_refused_before_training(shell, tmp_path, command):
    (tmp_path / "file").write_text("")
    refused(shell(*command, "-o", "file/out"), "a folder that can be written to")


@pytest.mark.parametrize("command", [TRAIN, COMPARE])
def test_full_disks_are_refused_before_training(shell, monkeypatch, command):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda folder: usage)
    refused(shell(*command, "-o", "out"), "MiB free")


def test_a_disk_that_fills_while_results_are_written(shell, tmp_path, monkeypatch):
    import errno

    write = checkpoints._write_bytes

    def full(path, data):
        if path.suffix == ".npy":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    monkeypatch.setattr(checkpoints, "_write_bytes", full)
    found = shell(*COMPARE, "-o", "out")
    assert found.exit_code == 2 and "No space left" in found.stderr and "Traceback" not in found.output
    assert not list(tmp_path.rglob("runs/*.json")) and not list(tmp_path.rglob("study.json"))


def test_wrong_usage_is_click_s_own_message(shell):
    found = shell("train")
    assert found.exit_code == 2 and "--output" in found.stderr
    assert shell("compare", "--no-such-option").exit_code == 2


# Reproduce


@pytest.fixture
def tiny(tmp_path):
    """A tiny study in the file tiny.json."""
    base = NetworkRun(Setup(channels=(2, 4), train_size=64), TrainingConfig(epochs=2, batch_size=64),
                      evaluation=Evaluation(images=20, draws=4))
    study = Study("A tiny study", "none", base, ({"method.name": ("baseline", "tied")},), seeds=(0, 1))
    (tmp_path / "tiny.json").write_text(json.dumps(study.values()))
    return study


def test_reproduce_runs_shows_and_writes(shell, tmp_path, tiny):
    found = shell("reproduce", "tiny.json", "--seeds", "0,2", "-o", "out", "--work", "work")
    assert found.exit_code == 0, found.output
    assert "A tiny study" in found.stdout and "± " in found.stdout and "Written to out: table.csv" in found.stdout
    assert found.stderr.count("accuracy") == 4 and "[4/4] tied, seed 2" in found.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"table.csv", "runs.csv", "study.json", "figure.png"}
    made = json.loads((tmp_path / "out/study.json").read_text())
    assert made["study"]["seeds"] == [0, 2] and len(list((tmp_path / "work").iterdir())) == 4
    table = (tmp_path / "out/table.csv").read_bytes()
    again = shell("reproduce", "tiny.json", "--seeds", "0,2", "--work", "work")
    assert again.exit_code == 0 and again.stderr == "4 of 4 runs are there already\n"
    assert (tmp_path / "results/tiny/table.csv").read_bytes() == table
    more = shell("reproduce", "tiny.json", "--work", "work", "-o", "out")
    assert "2 of 4 runs are there already" in more.stderr and "seed 1" in more.stderr


def test_a_study_that_is_shown_can_be_edited(shell, tmp_path):
    found = shell("reproduce", "methods", "--show", "--seeds", "7")
    read = Study.from_json(found.stdout)
    assert found.exit_code == 0 and find_study("methods") == replace(read, seeds=tuple(range(5)))
    assert json.loads(found.stdout)["seeds"] == [7] and not list(tmp_path.iterdir())
    shown = shell("reproduce", "methods", "--show", "--device", "cpu")
    assert json.loads(shown.stdout)["base"]["training"]["device"] == "cpu"


def test_the_list_is_shown_without_a_measurement(shell, monkeypatch):
    monkeypatch.setattr(cli, "step_speed", lambda: pytest.fail("measured"))
    found = shell("reproduce", "--list")
    assert found.exit_code == 0 and found.stdout == f"{listing()}\n"


def test_costs_are_shown_on_demand(shell, monkeypatch):
    def estimate(study, speed):
        assert speed == "measured"
        if study.base.training.estimator == "whole":
            raise Refusal("a", got="b", cause="c", fix="d")  # images that are not here
        return Cost(1, 12e12, 15120.0)

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(cli, "step_speed", lambda: "measured")
    monkeypatch.setattr(cli, "estimate", estimate)
    found = shell("reproduce", "--costs")
    assert found.exit_code == 0 and all(name in found.stdout for name in STUDIES)
    there = sum(isinstance(study.base, NetworkRun) and study.base.training.estimator != "shared"
                for study in STUDIES.values())
    assert found.stdout.count("1.2e+13") == found.stdout.count(" 4.2 ") == there < len(STUDIES) - 2
    assert "factor of up" in found.stdout and "…" not in found.stdout


@pytest.fixture
def toy(monkeypatch):
    """A simulation beside the named ones; its calls."""
    calls = []

    def toy(seed, a, b=0):
        calls.append((seed, a, b))
        return {"value": a + 10.0 * b + seed}

    toy.__module__ = "symbnn.studies.simulations"
    monkeypatch.setitem(FUNCTIONS, "toy", toy)
    monkeypatch.setitem(STUDIES, "toy", Study("A toy", "none", FunctionRun("toy"), (
        {"a": (1, 2)}, {"a": (3,), "b": (0, 1)}), (0, 2), x="a", panels=(Panel("value", logarithmic=False),)))
    return calls


def test_reproduce_runs_a_simulation(shell, tmp_path, toy):
    found = shell("reproduce", "toy", "--seeds", "0,1", "--work", "work")
    assert found.exit_code == 0, found.output
    assert "[8/8]" in found.stderr and "Written to results/toy: table.csv" in found.stdout
    study, rows = read_results(tmp_path / "results/toy", "runs.csv")
    assert study.seeds == (0, 1) and len(list((tmp_path / "work").iterdir())) == len(toy) == len(rows) == 8
    again = shell("reproduce", "toy", "--seeds", "0,1", "--work", "work", "-o", "out")
    assert again.exit_code == 0 and len(toy) == 8 and (tmp_path / "out/figure.png").exists()
    shown = shell("reproduce", "toy", "--show", "--seeds", "7")
    assert json.loads(shown.stdout)["seeds"] == [7] and Study.from_json(shown.stdout).base == FunctionRun("toy")


@pytest.mark.parametrize("option", (("--device", "cpu"), ("--data-folder", ".")))
def test_options_of_studies_that_train_are_refused(shell, tmp_path, toy, option):
    refused(shell("reproduce", "toy", *option), option[0])
    assert not toy and not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, reason", [
    ([], "study is named"), (["magic"], "study is one of prior"), (["nowhere.json"], "JSON file"),
    (["methods", "--jobs", "0"], "jobs"), (["methods", "--backend", "threads"], "backend is one of"),
    (["methods", "--seeds", "one"], "integers with commas"), (["methods", "--seeds", "0,0"], "named once"),
    (["prior", "--data-folder", "nowhere"], "four IDX files"), (["tiny.json", "--device", "abacus"], "device"),
])
def test_studies_that_cannot_be_are_refused(shell, tmp_path, tiny, arguments, reason):
    refused(shell("reproduce", *arguments), reason)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.json"]


def test_architecture_or_augmentation_in_one_command(shell, tmp_path):
    methods = "baseline,tied,block_diagonal+projected,geometric"
    found = shell(*COMPARE[:-1], methods, "-o", "out")
    assert found.exit_code == 0, found.output
    study, rows = read_results(tmp_path / "out")
    defects = {str(run.method): row["defect_plugin"] for run, row in zip(study.points(), rows)}
    assert defects["tied"] < 1e-12 < defects["geometric"] and defects["block_diagonal+projected"] < defects["baseline"]
    budgets = {str(run.method): row["training_multiply_adds"] for run, row in zip(study.points(), rows)}
    assert min(budgets.values()) == budgets["block_diagonal+projected"] > 0.7 * max(budgets.values())  # whole epochs
    assert [row["before.epochs"] for row in rows] == [None, None, 2, 2] and list(defects) == methods.split(",")


# Processes


def program(*arguments: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}
    command = [sys.executable, "-c", "from symbnn.cli import main; main()", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, **options)


@pytest.mark.processes
def test_a_process_refuses_with_status_2(tmp_path):
    process = program("train", "-o", "out", "--group", "S5", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("symbnn: The group is one of") and err.count("\n") == 1


@pytest.mark.processes
@pytest.mark.parametrize("command", [TRAIN, COMPARE])
def test_ctrl_c_leaves_what_is_finished_and_says_how_to_go_on(tmp_path, command):
    long = [part if part != "2" else "100000" for part in command]  # epochs that never end
    process = program(*long, "-o", "out", cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("checkpoint.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Interrupted." in err and "same command" in err and "Traceback" not in err
    folder = next(tmp_path.rglob("checkpoint.json")).parent
    assert read_checkpoint(folder).description["progress"]["status"] == "interrupted"
    assert not list(tmp_path.rglob("runs/*.json"))


def test_arrays_are_named_in_the_help(shell):
    text = shell("train", "--help").stdout
    assert all(f"{part}_{kind}" in text for part in ("train", "test") for kind in ("images", "labels"))
