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
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from symbnn import __version__, cli, commands
from symbnn import files as whole_files
from symbnn.data.sources import PARTS
from symbnn.errors import Refusal
from symbnn.posterior.layers import with_posteriors
from symbnn.records import read_record, write_record
from symbnn.signals import CLOSED, TERMINATING
from symbnn.studies import methods, results, tasks
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

NETWORK = ["--channels", "2", "4", "--train-size", "64", "--batch-size", "64"]
TRAIN = ["train", *NETWORK, "--epochs", "2", "--learning-rate", "0.02"]
COMPARE = ["compare", *NETWORK, "--epochs", "2", "--small-epochs", "2", "--seeds", "0", "--evaluation-draws", "4",
           "--images", "20", "--methods", "baseline", "regular"]


class Found(NamedTuple):
    """What a command did."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments) -> Found:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return Found(code, *capsys.readouterr())

    return run


def refused(found, reason: str) -> None:
    """One paragraph on standard error, exit status 2, no traceback."""
    assert found.exit_code == 2, found.output
    assert found.stdout == ""
    assert re.search(reason, found.stderr), found.stderr
    assert found.stderr.startswith("symbnn: ") and found.stderr.count("\n") == 1 and "Traceback" not in found.stderr
    assert "Expected: " in found.stderr and "Got: " in found.stderr and "Fix: " in found.stderr


def misused(found, reason: str) -> None:
    """What the reader of options says itself: exit status 2, the reason, and where the help is."""
    assert found.exit_code == 2 and found.stdout == "", found.output
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", found.stderr).split())
    assert re.search(reason, text) and "--help" in text and "Traceback" not in text, text


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


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_help_explains_every_option_and_gives_examples(shell, command):
    found, whole = shell(command, "--help"), shell(command, "--help-all")
    assert found.exit_code == whole.exit_code == 0 and found.stderr == whole.stderr == ""
    assert shell(command, "-h") == found and f"symbnn {command}" in found.stdout.partition("Examples:")[2]
    options = re.split(r"\n[│ ]+(?=--?[a-z])", whole.stdout.partition("Examples:")[0])[1:]
    assert len(options) >= len(fields(commands.COMMANDS[command]))
    for option in options:
        words = re.sub(r"[│╭╮╰╯─]|\(default:.*|-{1,2}[a-z-]+|\{.*?\}|\b[A-Z]+\b|\[.*\]", " ", option).split()
        assert len(words) > 1, f"{option!r} is not explained"


def test_help_names_the_commands_and_fits_a_screen(shell, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert all(command in shell("--help").stdout for command in commands.COMMANDS) and shell() == shell("--help")
    assert all(shell(command, "--help").stdout.count("\n") <= 50 for command in commands.COMMANDS)
    whole = shell("train", "--help-all").stdout
    for its in (*fields(Setup), *fields(TrainingConfig)):
        option = f"--{its.name.replace('_', '-')}"
        assert option in whole and option in shell("train", "--help").stdout


def test_defaults_are_those_of_the_library(shell, monkeypatch):
    seen = []
    monkeypatch.setattr(Comparison, "study", lambda comparison, root: seen.append(comparison) or sys.exit(0))
    assert shell("compare").exit_code == 0
    assert seen == [Comparison()]
    monkeypatch.setattr(commands, "fit", lambda network, task, config, **others: seen.append((task.setup, config)) or
                        sys.exit(0))
    assert shell("train", "-o", "out").exit_code == 0
    assert seen[1:] == [(Setup(), TrainingConfig())]


# Settings from a file


def test_settings_come_from_a_file_and_what_is_typed_wins(shell, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(commands, "fit", lambda network, task, config, **others: seen.append((task.setup, config)) or
                        sys.exit(0))
    (tmp_path / "mine.yaml").write_text(
        "channels: [2, 4]\nstandardized: true\nlearning_rate: 1e-2\nclip_norm: null\nepochs: 3\n"
        "kl-weight: 0.5\nestimator: whole\n")
    assert shell("train", "--config", "mine.yaml", "-o", "out", "--epochs", "4").exit_code == 0
    assert shell("train", "-o", "out", "--epochs=4", "--config=mine.yaml").exit_code == 0
    setup = Setup(channels=(2, 4), standardized=True)
    config = TrainingConfig(learning_rate=0.01, epochs=4, kl_weight=0.5, estimator="whole")
    assert seen == [(setup, config)] * 2


def test_a_file_of_settings_for_a_command_with_a_name(shell, tmp_path):
    (tmp_path / "mine.yaml").write_text("seeds: [7, 8]\n")
    found = shell("reproduce", "methods", "--show", "--config", "mine.yaml")
    assert json.loads(found.stdout)["seeds"] == [7, 8]


@pytest.mark.parametrize("text, reason", [
    (None, "nowhere.yaml: .*No such file"), ("a: [", "slip of the pen"), ("- 1", "names with a number"),
    ("training:\n  epochs: 3", "settings in groups"), ("1: 2", "names with a number"), ("words", "names with a number"),
    ("epochs: 0", "whole number of at least 1 as epochs"),
])
def test_files_that_are_no_settings_are_refused(shell, tmp_path, text, reason):
    if text is not None:
        (tmp_path / "nowhere.yaml").write_text(text)
    refused(shell("train", "-o", "out", "--config", "nowhere.yaml"), reason)


@pytest.mark.parametrize("text, reason", [
    ("epoch: 3", "Unrecognized options: --epoch"), ("epochs: many", "many"), ("dtype: int", "invalid choice 'int'"),
])
def test_settings_of_a_file_are_read_as_what_is_typed(shell, tmp_path, text, reason):
    (tmp_path / "mine.yaml").write_text(text)
    misused(shell("train", "-o", "out", "--config", "mine.yaml"), reason)


# Train, evaluate, compare


SCORES = {f"{part}{name}" for part in ("", "orbit_") for name in (
    "accuracy", "nll_nats", "brier", "ece", "adaptive_ece", "aurc", "entropy_nats", "mutual_information_nats")} | {
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


OBJECTIVE = ("objective", "information_method", "information_draws", "negatives")
CHOSEN = {
    "variant": "shifted", "size": 10, "group": "none", "architecture": "S-FC+CONV", "strides": [2, 1],
    "prior": "per_tensor", "family": "gaussian", "augmentation": "none", "objective": "symmetrised",
    "information_method": "infonce", "information_draws": 3, "negatives": 5, "precisions": "elbo", "learned_from": 2,
    "learned_every": 3,
}


@pytest.mark.parametrize(("suffix", "task"), [
    (".csv", "regression"), (".npz", "regression"), (".parquet", "regression"), (".csv", "classification"),
    (".csv", "counts"),
])
def test_a_table_from_training_to_evaluation(shell, tmp_path, suffix, task):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    x = np.random.default_rng(0).normal(size=(60, 2))
    y = {"regression": x[:, 0] + 0.5, "classification": np.where(x[:, 0] > 0, "up", "down"),
         "counts": np.round(np.exp(x[:, 0])).astype(int)}[task]
    frame, file = pandas.DataFrame({"a": x[:, 0], "b": x[:, 1], "height": y}), tmp_path / f"mine{suffix}"
    if suffix == ".npz":
        np.savez(file, X=x, y=y)
    elif suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        frame.to_parquet(file)
    else:
        frame.to_csv(file, index=False)
    (tmp_path / "mine.toml").write_text("hidden = [8]\nbatch_size = 8\n")
    typed = ["train", file.name, "--config", "mine.toml", "--task", task, "--epochs", "2"]
    done = shell(*typed, "-o", "run")
    assert done.exit_code == 0 and f"{task} of" in done.stdout and "44 train, 4 validation, 12 test" in done.stdout
    assert "Next: symbnn evaluate run" in done.stdout
    again = shell(*typed, "-o", "run")
    refused(again, "a checkpoint in run")
    longer = shell(*typed[:-1], "4", "-o", "run", "--resume")
    assert longer.exit_code == 0 and "after 4 epochs" in longer.stdout
    measured = shell("evaluate", "run", "--json", "found.json", "--csv", "found.csv", "--draws", "8")
    assert measured.exit_code == 0 and "orbit" not in measured.stdout
    metrics = json.loads((tmp_path / "found.json").read_text())["metrics"]
    assert {"regression": "rmse", "classification": "accuracy", "counts": "rmse"}[task] in metrics
    assert "nll_nats" in (tmp_path / "found.csv").read_text()
    file.rename(tmp_path / f"other{suffix}")
    refused(shell("evaluate", "run"), f"mine{suffix}")


@pytest.mark.parametrize(("typed", "reason"), [
    (["train", "none.csv", "-o", "run"], "none.csv"), (["train", "mine.csv", "-o", "run", "--target", "x"], "target"),
    (["train", "mine.csv", "-o", "run", "--augmentation", "full"], "--augmentation none"),
    (["train", "mine.csv", "-o", "run", "--batch-size", "1000"], "--batch-size"),
    (["train", "mine.csv", "-o", "run", "--task", "classification"], "--task regression"),
])
def test_tables_that_cannot_be_trained_on_are_refused(shell, tmp_path, typed, reason):
    pytest.importorskip("pandas", reason="pandas is not installed")
    (tmp_path / "mine.csv").write_text("a,b\n" + "\n".join(f"{i},{i + 0.5}" for i in range(50)))
    refused(shell(*typed), reason)
    assert not (tmp_path / "run").exists()


def test_help_of_training_on_a_table(shell):
    found = shell("train", "mine.csv", "--help")
    assert found.exit_code == 0 and "on a table" in found.stdout and "--target" in found.stdout
    assert "--group" not in found.stdout and "mine.csv" in shell("train", "--help").stdout


def stored(folder: Path) -> dict:
    """All settings that a checkpoint holds, by name."""
    description = read_checkpoint(folder).description
    method = description["notes"]["method"]
    learned = {"precisions": method.get("rule"), "learned_from": method.get("first"),
               "learned_every": method.get("every")}
    return description["notes"]["setup"] | description["config"] | learned


def options(values: dict) -> list[str]:
    """As typed in a shell."""
    typed = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    return [str(part) for name, value in typed.items() for part in (f"--{name.replace('_', '-')}", *value)]


def test_every_choice_is_an_option_and_reaches_the_checkpoint(shell, tmp_path):
    chosen = {name: value for name, value in CHOSEN.items() if name not in OBJECTIVE}
    found = shell(*TRAIN, *options(chosen), "--standardized", "-o", "paths")
    assert found.exit_code == 0, found.output
    assert stored(tmp_path / "paths").items() >= {**chosen, "standardized": True}.items()
    chosen = {name: CHOSEN[name] for name in OBJECTIVE} | {"architecture": "mlp", "group": "none"}
    found = shell(*TRAIN, *options(chosen), "-o", "units")
    assert found.exit_code == 0, found.output
    assert stored(tmp_path / "units").items() >= chosen.items() and not stored(tmp_path / "units")["standardized"]
    assert not any(f"--{name.replace('_', '-')}" in shell("compare", "--help-all").stdout for name in OBJECTIVE)


PATHS = ["--architecture", "F-FC+CONV", "--group", "none", "--augmentation", "none", "--prior", "per_tensor",
         "--learned-from", "2", "--learned-every", "2"]
ROUTES = {
    "elbo": [*PATHS, "--precisions", "elbo"],
    "evidence": [*PATHS, "--precisions", "evidence", "--family", "point"],
    "units": ["--architecture", "mlp", "--objective", "symmetrised", "--information-method", "infonce",
              "--initial-scale", "0.5"],  # so wide that units overlap: elsewhere the gain has no gradient
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
    found = shell(*COMPARE, "-o", "out", "--dataset", "digits")
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


def test_the_command_is_noted_without_folders_of_the_machine():
    folders = ["-o", "/home/me/runs/a", "--dataset=/data/mine.npz", "--data-folder", "~/idx"]
    typed = ["train", *folders, "--epochs", "2"]
    assert cli._as_noted(typed) == "symbnn train -o a --dataset=mine.npz --data-folder idx --epochs 2"
    assert cli._as_noted(["compare", "-o", "output/demo"]) == "symbnn compare -o output/demo"


def test_own_images_from_training_to_evaluation(shell, tmp_path):
    (tmp_path / "images").mkdir()
    save_arrays(tmp_path / "images/mine.npz")
    found = shell(*TRAIN, "--dataset", tmp_path / "images/mine.npz", "-o", "run")
    assert found.exit_code == 0, found.output
    assert str(tmp_path) not in json.dumps(read_checkpoint(tmp_path / "run").description)
    refused(shell("evaluate", "run", "--draws", "4"), "mine.npz")
    found = shell("evaluate", "run", "--draws", "4", "--data-folder", "images")
    assert found.exit_code == 0 and "mine.npz" in found.stdout


# Mistakes


MISTAKES = {
    "unknown data set": (["--dataset", "cifar"], "one of digits.* as data set"),
    "missing folder": (["--dataset", "mnist", "--data-folder", "nowhere"], "IDX"),
    "digits from a folder": (["--data-folder", "nowhere"], "no folder for the digits"),
    "unknown group": (["--group", "S5"], "one of C4.* as group"),
    "a group that does not act": (["--group", "shifts"], "circular shift"),
    "unknown architecture": (["--architecture", "tree"], "\"cnn\", \"mlp\""),
    "too many poolings": (["--channels", "2", "2", "2", "2"], "pool"),
    "no pixels": (["--size", "0"], "size of the images"),
    "strides of a cnn": (["--strides", "1", "2"], "no strides for 'cnn'"),
    "unknown family": (["--family", "normal"], "one of gaussian.* as family"),
    "unknown prior": (["--prior", "flat"], "one of isotropic.* as prior"),
    "unknown start": (["--start", "zero"], "one of random, invariant as start"),
    "no epochs": (["--epochs", "0"], "whole number of at least 1 as epochs"),
    "negative rate": (["--learning-rate", "-1"], "learning_rate"),
    "batch too large": (["--batch-size", "9999"], "[Bb]atch"),
    "training set too large": (["--train-size", "9999"], "training"),
    "device": (["--device", "abacus"], "device"),
    "threads": (["--threads", "-1"], "number of threads"),
    "jobs": (["--jobs", "0"], "number of jobs"),
    "threads of a million": (["--threads", "1000000"], "from 1 to 1024 as the number of threads"),
    "seed of 64 bits": (["--seed", str(2**64)], "below 2..63 as seed"),
    "channels without end": (["--channels", str(10**30)], "positive whole numbers up to 2147483647"),
    "channels beyond memory": (["--architecture", "mlp", "--group", "none", "--channels", str(2**30), str(2**30)],
                               "a network of at most"),
    "pixels beyond memory": (["--size", "1000000"], "images of digits of at most"),
    "pixels without end": (["--size", str(10**30)], "size of the images"),
    "epochs without end": (["--epochs", str(10**30)], "as epochs"),
    "infinite rate": (["--learning-rate", "1e400"], "as learning_rate"),
    "no number": (["--learning-rate", "nan"], "as learning_rate"),
    "infinite scale": (["--prior-scale", "1e400"], "as the prior's scale"),
    "scale beyond float32": (["--initial-scale", "1e300"], "as the initial scale"),
    "missing own images": (["--dataset", "nowhere.npz"], "nowhere.npz"),
    "many jobs": (["--jobs", "1000000"], "each of the . CPUs"),
    "nothing to compare": (["--group", "none"], "group with more than one element"),
}


ALONE = {"threads": "train", "jobs": "compare", "threads of a million": "train", "many jobs": "compare",
         "seed of 64 bits": "train", "nothing to compare": "compare"}  # options of one command


@pytest.mark.parametrize("command, mistake", [(command, mistake) for mistake in MISTAKES
                                              for command in ("train", "compare")
                                              if ALONE.get(mistake, command) == command])
def test_mistakes_are_refused_and_leave_nothing(shell, tmp_path, command, mistake):
    options, reason = MISTAKES[mistake]
    refused(shell(*(TRAIN if command == "train" else COMPARE), *options, "-o", "out"), reason)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert command == "train" or not (tmp_path / "out").exists()


IMPOSSIBLE = {
    "never": (["--precisions", "elbo", "--learned-every", "0"], "between updates of precisions"),
    "evidence of turned images": (["--precisions", "evidence", "--family", "point"],
                                  "without augmentation for the evidence"),
    "evidence of widths": (["--precisions", "evidence", "--augmentation", "none"], "by the evidence for point masses"),
    "widths of points": (["--precisions", "elbo", "--family", "point"], "by the evidence for point masses"),
    "precisions of priors with means": (["--precisions", "elbo", "--prior", "random_means"], r"prior N\(0, I / d\)"),
    "permutations of fixed priors": (["--objective", "symmetrised", "--prior", "random_means"],
                                     "prior that is the same after"),
    "a relaxed network under turns": (["--architecture", "F-FC+CONV"], "symmetries in its paths"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_combinations_are_refused_before_training(shell, tmp_path, case):
    options, reason = IMPOSSIBLE[case]
    refused(shell(*TRAIN, *options, "-o", "out"), reason)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


NOISE = np.random.default_rng(0).random((80, 8, 8))
IMAGES = {
    "NaN": ({"train_images": np.full((80, 8, 8), np.nan)}, "NaN"),
    "wrong shape": ({"train_images": np.zeros((80, 64))}, "shape"),
    "odd size": ({"train_images": NOISE[..., :7, :7], "test_images": NOISE[:6, :7, :7]}, "7 x 7"),
    "not square": ({"train_images": NOISE[..., :4], "test_images": NOISE[:6, :, :4]}, "square|8, 4|8 x 4"),
    "label out of range": ({"test_labels": np.full(6, 7)}, "label 7"),
    "negative label": ({"train_labels": np.full(80, -1)}, "label -1"),
    "no label": ({"train_labels": np.where(np.arange(80) % 9, np.arange(80) % 3, 255)}, "the label 255 among 4"),
    "one label": ({"train_labels": np.zeros(80, int), "test_labels": np.zeros(6, int)}, "80 times the label 0"),
    "billions of classes": ({"train_labels": np.where(np.arange(80), 1, 10**9)}, "the label 1000000000"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_images_that_cannot_be_used_are_refused(shell, tmp_path, case):
    changes, reason = IMAGES[case]
    save_arrays(tmp_path / "mine.npz", **changes)
    refused(shell(*TRAIN, "--dataset", "mine.npz", "-o", "out"), reason)
    assert not (tmp_path / "out").exists()


def test_odd_images_are_noted_once(shell, tmp_path):
    changes = {"train_images": np.full((80, 8, 8), 7, np.uint8), "train_labels": np.arange(80) % 3 * 2}
    save_arrays(tmp_path / "mine.npz", **changes)
    found = shell(*TRAIN, "--dataset", "mine.npz", "-o", "out")
    assert found.exit_code == 0, found.output
    notes = [line for line in found.stderr.splitlines() if "note" in line]
    assert [line.split(":")[:2] for line in notes] == [["symbnn", " note"]] * 2, found.stderr
    assert "2 of the 5 classes of mine.npz" in notes[0] and "all 64 training inputs are equal" in notes[1]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_of_any_encoding_gets_its_table_and_the_file_is_written(trained, tmp_path, monkeypatch, encoding):
    streams = [TextIOWrapper(BytesIO(), encoding, write_through=True) for _ in range(2)]
    for name, stream in zip(("stdout", "stderr"), streams):
        monkeypatch.setattr(sys, name, stream)
    assert cli.main(["evaluate", "run", "--draws", "4", "--csv", "metrics.csv"]) == 0
    monkeypatch.undo()
    shown = streams[0].buffer.getvalue().decode(encoding)
    assert "accuracy" in shown and "accuracy" in (tmp_path / "metrics.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize("options, reason", [
    (["--methods", "magic"], "one of baseline.* as method"), (["--methods", ""], "a value for each option"),
    (["--seeds", "0", "0"], "once"), (["--images", "9999"], "9999 of 360"),
    (["--split", "train"], "one of test, validation as split"), (["--evaluation-draws", "1"], "need three"),
    (["--family", "lognormal"], "LogNormal"),
])
def test_comparisons_that_cannot_be_are_refused(shell, tmp_path, options, reason):
    refused(shell(*COMPARE, *options, "-o", "out"), reason)
    assert not list(tmp_path.iterdir())


def test_a_truncated_file_is_refused_by_name(shell, tmp_path):
    (tmp_path / "data").mkdir()
    for name in PARTS:
        (tmp_path / "data" / name).write_bytes(b"\0\0\x08\x03" + bytes(8))
    refused(shell(*TRAIN, "--dataset", "mnist", "--data-folder", "data", "-o", "out"), "train-images-idx3-ubyte")


@pytest.fixture
def trained(shell):
    """A trained network in the folder `run`."""
    assert shell(*TRAIN, "-o", "run").exit_code == 0
    return shell


def test_a_folder_in_use_and_another_network_are_refused(trained, tmp_path):
    refused(trained(*TRAIN, "-o", "run"), "overwrites none")
    refused(trained(*TRAIN, "--channels", "4", "4", "-o", "run", "--resume"), r"channels \[2, 4\] in the checkpoint")
    refused(trained(*TRAIN, "--prior-scale", "0.5", "-o", "run", "--resume"), "prior_scale 1.0 in the checkpoint")
    learnt = ("--precisions", "elbo", "--learned-from", "1")
    refused(trained(*TRAIN, *learnt, "-o", "run", "--resume"), "name 'baseline' in the checkpoint")
    refused(trained(*TRAIN, "--seed", "1", "-o", "run", "--resume"), "seed.0 in the checkpoint")
    refused(trained(*TRAIN, "-o", "other", "--resume"), "checkpoint")


def test_checkpoints_that_cannot_be_evaluated_are_refused(trained, tmp_path):
    refused(trained("evaluate", "nowhere"), "nowhere")
    refused(trained("evaluate", "run", "--draws", "0"), "draws")
    refused(trained("evaluate", "run", "--mode", "magic"), "mode")
    refused(trained("evaluate", "run", "--split", "train"), "one of test, validation as split")
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
    monkeypatch.setattr(whole_files.shutil, "disk_usage", lambda folder: usage)
    refused(shell(*command, "-o", "out"), "MiB free")


def test_a_disk_that_fills_while_results_are_written(shell, tmp_path, monkeypatch):
    import errno

    replaced = os.replace

    def full(source, target):
        if Path(target).suffix == ".npy":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replaced(source, target)

    monkeypatch.setattr(whole_files.os, "replace", full)
    found = shell(*COMPARE, "-o", "out")
    assert found.exit_code == 2 and "No space left" in found.stderr and "Traceback" not in found.output
    assert not list(tmp_path.rglob("runs/*.json")) and not list(tmp_path.rglob("study.json"))


@pytest.mark.parametrize("typed, reason", [
    (["train"], "--output"), (["compare", "--no-such-option"], "--no-such-option"), (["magic"], "magic"),
    (["train", "-o", "out", "--channels", "2;4"], "2;4"), (["compare", "--seeds", "one"], "one"),
    (["train", "-o", "out", "--estimator", "magic"], "invalid choice 'magic'"),
    (["train", "-o", "out", "--optimizer", "adam"], "invalid choice 'adam'"),
    (["train", "-o", "out", "--variant", "rolled"], "invalid choice 'rolled'"),
    (["train", "-o", "out", "--objective", "iwae"], "invalid choice 'iwae'"),
    (["train", "-o", "out", "--information-method", "exact"], "invalid choice 'exact'"),
    (["train", "-o", "out", "--precisions", "learnt"], "invalid choice 'learnt'"),
    (["reproduce", "methods", "--backend", "threads"], "invalid choice 'threads'"),
    (["reproduce", "methods", "--seeds", "one"], "one"),
])
def test_wrong_usage_is_answered_by_the_reader_of_options(shell, tmp_path, typed, reason):
    misused(shell(*typed), reason)
    assert not list(tmp_path.iterdir())


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
    found = shell("reproduce", "tiny.json", "--seeds", "0", "2", "-o", "out", "--work", "work")
    assert found.exit_code == 0, found.output
    assert "A tiny study" in found.stdout and "± " in found.stdout and "Written to out: table.csv" in found.stdout
    assert found.stderr.count("accuracy") == 4 and "[4/4] tied, seed 2" in found.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"table.csv", "runs.csv", "study.json", "figure.png"}
    made = json.loads((tmp_path / "out/study.json").read_text())
    assert made["study"]["seeds"] == [0, 2] and len(list((tmp_path / "work").iterdir())) == 4
    table = (tmp_path / "out/table.csv").read_bytes()
    again = shell("reproduce", "tiny.json", "--seeds", "0", "2", "--work", "work")
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
    monkeypatch.setattr(commands, "step_speed", lambda: pytest.fail("measured"))
    found = shell("reproduce", "--list")
    assert found.exit_code == 0 and found.stdout == f"{listing()}\n"


def test_costs_are_shown_on_demand(shell, monkeypatch):
    def estimate(study, speed):
        assert speed == "measured"
        if study.base.training.estimator == "whole":
            raise Refusal("a", got="b", cause="c", fix="d")  # images that are not here
        return Cost(1, 12e12, 15120.0)

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(commands, "step_speed", lambda: "measured")
    monkeypatch.setattr(commands, "estimate", estimate)
    found = shell("reproduce", "--costs")
    assert found.exit_code == 0 and all(name in found.stdout for name in STUDIES)
    there = sum(isinstance(study.base, NetworkRun) and study.base.training.estimator != "whole"
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
    found = shell("reproduce", "toy", "--seeds", "0", "1", "--work", "work")
    assert found.exit_code == 0, found.output
    assert "[8/8]" in found.stderr and "Written to results/toy: table.csv" in found.stdout
    study, rows = read_results(tmp_path / "results/toy", "runs.csv")
    assert study.seeds == (0, 1) and len(list((tmp_path / "work").iterdir())) == len(toy) == len(rows) == 8
    again = shell("reproduce", "toy", "--seeds", "0", "1", "--work", "work", "-o", "out")
    assert again.exit_code == 0 and len(toy) == 8 and (tmp_path / "out/figure.png").exists()
    shown = shell("reproduce", "toy", "--show", "--seeds", "7")
    assert json.loads(shown.stdout)["seeds"] == [7] and Study.from_json(shown.stdout).base == FunctionRun("toy")


@pytest.mark.parametrize("option", (("--device", "cpu"), ("--data-folder", ".")))
def test_options_of_studies_that_train_are_refused(shell, tmp_path, toy, option):
    refused(shell("reproduce", "toy", *option), option[0])
    assert not toy and not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [
    (*TRAIN, "-o", ""), (*TRAIN, "--output="), (*TRAIN, "-o="), ("evaluate", ""), ("compare", "--output", ""),
    ("reproduce", "timing", "--work", ""), ("train", "--config", "", "-o", "out"),
])
def test_an_empty_text_is_no_folder(shell, tmp_path, arguments):
    refused(shell(*arguments), "a value for each option")
    assert not list(tmp_path.iterdir())


def test_names_in_a_file_of_settings_stand_once(shell, tmp_path):
    (tmp_path / "mine.yaml").write_text("epochs: 1\nchannels: [2]\nepochs: 2\n")
    refused(shell("train", "-o", "out", "--config", "mine.yaml"), "'epochs' stands twice")
    os.mkfifo(tmp_path / "pipe.yaml")
    refused(shell("train", "-o", "out", "--config", "pipe.yaml"), "no file, but a folder or a device")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A trained network, and its images."""
    folder, generator = tmp_path_factory.mktemp("small"), np.random.default_rng(0)
    images = generator.random((60, 8, 8)).astype(np.float32)
    save_images(folder / "mine.npz", images)
    assert cli.main([*TRAIN[:3], "4", "--epochs", "1", "--batch-size", "20", "--dataset", str(folder / "mine.npz"),
                     "--validation-size", "10", "-o", str(folder / "run")]) == 0
    return folder


def save_images(path, images):
    labels = np.arange(len(images)) % 3
    np.savez(path, train_images=images, train_labels=labels, test_images=images[:30], test_labels=labels[:30])


def measured(small, *others):
    return ["evaluate", str(small / "run"), "--data-folder", str(small), "--draws", "4", *others]


def test_evaluation_knows_its_images(shell, small, tmp_path):
    assert shell(*measured(small)).exit_code == 0
    for place, change in (("train", lambda its: its + 0), ("other", lambda its: its[::-1])):
        (tmp_path / place).mkdir()
        save_images(tmp_path / place / "mine.npz", change(np.load(small / "mine.npz")["train_images"]))
    assert shell("evaluate", small / "run", "--data-folder", "train", "--draws", "4").exit_code == 0
    found = shell("evaluate", small / "run", "--data-folder", "other", "--draws", "4")
    refused(found, "by their checksum")
    assert "--other-data" in found.stderr
    assert shell("evaluate", small / "run", "--data-folder", "other", "--draws", "4", "--other-data").exit_code == 0


@pytest.mark.parametrize("others, reason", [
    (["--images", "-1"], "number of images"), (["--images", "0"], "number of images"),
    (["--images", "31"], "at most 30"),
    (["--csv", "{run}/checkpoint.json"], "needs itself"), (["--json", "{run}/../run/checkpoint.json"], "needs itself"),
    (["--csv", "a", "--json", "a"], "needs itself"), (["--csv", "{run}"], "folder that has the name of the file"),
    (["--csv", "{run}/checkpoint.json/a"], "file that has the name"), (["--csv", "{images}"], "needs itself"),
])
def test_what_evaluation_must_not_do_is_refused_first(shell, small, tmp_path, others, reason, monkeypatch):
    monkeypatch.setattr("symbnn.studies.tasks.orbit_predictions", None)
    before = {path.name: path.read_bytes() for path in (small / "run").iterdir()}
    names = {"run": small / "run", "images": small / "mine.npz"}
    refused(shell(*measured(small, *(part.format(**names) for part in others))), reason)
    assert {path.name: path.read_bytes() for path in (small / "run").iterdir()} == before
    assert not list(tmp_path.iterdir())


def test_evaluation_writes_to_what_is_there(shell, small, tmp_path):
    (tmp_path / "link.csv").symlink_to("behind.csv")
    assert shell(*measured(small, "--csv", "link.csv", "--json", "/dev/null")).exit_code == 0
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "behind.csv").read_text().startswith("metric,")
    if Path("/dev/full").exists():
        full = shell(*measured(small, "--csv", "/dev/full"))
        assert full.exit_code == 2 and "a full disk" in full.stderr and "accuracy" in full.stdout
        assert not Path("/dev/full").is_file()


@pytest.mark.parametrize("arguments, reason", [
    ([], "the name of a study"), (["magic"], "one of prior.* as the study"), (["nowhere.json"], "nowhere.json"),
    (["methods", "--jobs", "0"], "jobs"), (["methods", "--seeds", "0", "0"], "named once"),
    (["prior", "--data-folder", "nowhere"], "IDX"), (["tiny.json", "--device", "abacus"], "device"),
    (["tiny.json", "--scheduler", "tcp://127.0.0.1:1"], "backend with a scheduler"),
    (["tiny.json", "--backend", "dask", "--scheduler", "tcp://127.0.0.1:1"], "scheduler that answers"),
    (["tiny.json", "--backend", "dask", "--scheduler", "tcp://127.0.0.1:1", "--jobs", "2"], "its own workers"),
    (["tiny.json", "--jobs", "1000000"], "CPUs"), (["tiny.json", "-o", "tiny.json/out"], "can be written to"),
    (["tiny.json", "-o", "tiny.json"], "can be written to"),
])
def test_studies_that_cannot_be_are_refused(shell, tmp_path, tiny, arguments, reason):
    refused(shell("reproduce", *arguments), reason)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["tiny.json"]


def test_architecture_or_augmentation_in_one_command(shell, tmp_path):
    methods = ["baseline", "tied", "block_diagonal+projected", "geometric"]
    found = shell(*COMPARE[:-2], *methods, "-o", "out")
    assert found.exit_code == 0, found.output
    study, rows = read_results(tmp_path / "out")
    defects = {str(run.method): row["defect_plugin"] for run, row in zip(study.points(), rows)}
    assert defects["tied"] < 1e-12 < defects["geometric"] and defects["block_diagonal+projected"] < defects["baseline"]
    budgets = {str(run.method): row["training_multiply_adds"] for run, row in zip(study.points(), rows)}
    assert min(budgets.values()) == budgets["block_diagonal+projected"] > 0.7 * max(budgets.values())  # whole epochs
    assert [row["before.epochs"] for row in rows] == [None, None, 2, 2] and list(defects) == methods


# What is needed at the end


@pytest.mark.parametrize("command", [COMPARE, ["reproduce", "tiny.json", "--work", "work"]])
@pytest.mark.parametrize("missing, extra", [("matplotlib.figure", "plots"), ("joblib", "studies")])
def test_packages_that_are_needed_at_the_end_are_asked_for_before(shell, tiny, monkeypatch, command, missing, extra):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(methods, "train", lambda *given, **options: pytest.fail("training began"))
    refused(shell(*command, "-o", "out"), rf"symbnn\[{extra}\]")


@pytest.mark.parametrize("command", [[*TRAIN, *ROUTES["evidence"]], ["reproduce", "layerwise", "--work", "work"]])
def test_the_package_of_the_evidence_is_asked_for_before(shell, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    monkeypatch.setattr(tasks, "train", lambda *given, **options: pytest.fail("training began"))
    monkeypatch.setattr(methods, "train", lambda *given, **options: pytest.fail("training began"))
    monkeypatch.setattr(tasks, "load", lambda name, *given, real=tasks.load, **sizes: real(
        "digits", **sizes | {"train_size": 640, "validation_size": 64}))
    refused(shell(*command, "-o", "out"), "Curvlinops")


def test_a_figure_that_cannot_be_drawn_leaves_the_tables(shell, tiny, tmp_path, monkeypatch):
    def fail(*given):
        raise ValueError("no such axis")

    monkeypatch.setattr(results, "picture", fail)
    found = shell("reproduce", "tiny.json", "--work", "work", "-o", "out")
    assert found.exit_code == 2 and "no figure.png (ValueError: no such axis)" in found.stderr
    assert "Traceback" not in found.stderr and "accuracy" in found.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"table.csv", "runs.csv", "study.json"}


def test_a_comparison_without_predictions_or_defects_shows_the_rest(shell, tmp_path):
    assert shell(*COMPARE, "-o", "out").exit_code == 0
    for path in (tmp_path / "out/runs").glob("*.npy"):
        path.unlink()
    (tmp_path / "out/orbit.png").unlink()
    for path in (tmp_path / "out/runs").glob("*.json"):
        record = read_record(path, dict, "")
        record["rows"][0]["defect_unbiased"] = record["rows"][0]["ece"] = None
        write_record(path, record)
    found = shell(*COMPARE, "-o", "out")
    assert found.exit_code == 2 and "predictions beside the record" in found.stderr
    assert "regular: defect not measured" in found.stdout and "not measured in all runs: cal. error" in found.stdout
    assert "same training budget" in found.stdout and "Next: symbnn evaluate" in found.stdout
    assert (tmp_path / "out/figure.png").exists() and not (tmp_path / "out/orbit.png").exists()


# Interrupted


@pytest.fixture
def interrupted(shell, monkeypatch):
    """A command in whose work a signal arrives."""
    def run(*command, number=signal.SIGINT):
        def arrive(*given, **options):
            signal.raise_signal(number)
            pytest.fail("went on")

        for name in ("fit", "execute"):
            monkeypatch.setattr(commands, name, arrive)
        return shell(*command)

    return run


def test_what_is_there_is_said_after_an_interruption(trained, interrupted, tmp_path):
    found = interrupted(*TRAIN, "-o", "new")
    assert found.exit_code == 130 and "No checkpoint was written yet" in found.stderr and "--resume" not in found.stderr
    found = interrupted(*TRAIN, "-o", "run")
    assert "A checkpoint is in run; the same command with --resume goes on" in found.stderr
    assert "is in run; the same command goes on" in interrupted(*TRAIN, "-o", "run", "--resume").stderr
    assert "No run was finished yet" in interrupted(*COMPARE, "-o", "out").stderr
    (tmp_path / "out/runs").mkdir(parents=True)
    (tmp_path / "out/runs/a.json").write_text("{}")
    found = interrupted(*COMPARE, "-o", "out")
    assert "In out/runs: 1 finished run; the same command does what is left" in found.stderr


@pytest.mark.parametrize("number", TERMINATING)
def test_a_command_that_is_terminated_says_what_is_there(interrupted, number):
    before = signal.signal(number, signal.SIG_DFL)  # a run under nohup ignores SIGHUP, and would go on
    try:
        found = interrupted(*TRAIN, "-o", "new", number=number)
        assert found.exit_code == 128 + number and signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert f"Interrupted by {signal.Signals(number).name}. No checkpoint was written yet" in found.stderr


# Processes


def program(*arguments: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}
    command = [sys.executable, "-c", "import sys; from symbnn.cli import main; sys.exit(main())", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, **options)


@pytest.mark.processes
def test_a_process_refuses_with_status_2(tmp_path):
    process = program("train", "-o", "out", "--group", "S5", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("symbnn: Expected: one of C4") and err.count("\n") == 1


@pytest.mark.processes
@pytest.mark.parametrize("command, number", [(TRAIN, signal.SIGINT), (COMPARE, signal.SIGINT), (TRAIN, signal.SIGTERM)])
def test_signals_leave_what_is_finished_and_say_how_to_go_on(tmp_path, command, number):
    endless = ["--epochs", "100000", *(["--small-epochs", "100000"] if command is COMPARE else [])]
    process = program(*command, *endless, "-o", "out", cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("checkpoint.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    assert "Interrupted" in err and "same command" in err and "Traceback" not in err
    folder = next(tmp_path.rglob("checkpoint.json")).parent
    assert read_checkpoint(folder).description["progress"]["status"] == "interrupted"
    assert not list(tmp_path.rglob("runs/*.json"))


@pytest.mark.processes
@pytest.mark.parametrize("arguments", [["--help"], ["reproduce", "--list"]])
def test_a_reader_who_has_gone_ends_a_command_quietly(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "symbnn", *arguments]
    with open(writer, "w") as closed:
        found = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (found.returncode, found.stderr) == (CLOSED, "")


def test_arrays_are_named_in_the_help(shell):
    text = shell("train", "--help-all").stdout
    assert all(f"{part}_{kind}" in text for part in ("train", "test") for kind in ("images", "labels"))
