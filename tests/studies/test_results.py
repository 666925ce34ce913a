"""Results: what is written is read again, pairs, and the verdict on a comparison."""
import csv
import json
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from symbnn.errors import Refusal
from symbnn.studies.catalogue import STUDIES
from symbnn.studies.grids import DEMO, Comparison, Study
from symbnn.studies.methods import read_method
from symbnn.studies.results import (
    FILES,
    JUDGED,
    Difference,
    Verdict,
    budgets,
    check_save,
    paired,
    provenance,
    read_results,
    save,
    verdict,
    verdicts,
)
from symbnn.studies.tables import METRICS, run_rows, table
from symbnn.studies.tasks import Setup
from tolerances import exact64

ROOT = Path(__file__).parents[2]


def test_files_hold_everything_and_no_path(finished, tmp_path):
    study, records, work = finished
    written = save(study, records, tmp_path / "out", "symbnn reproduce tiny", {"more.png": Figure()})
    assert [path.name for path in written] == ["table.csv", "runs.csv", "study.json", "figure.png", "more.png"]
    rows = list(csv.DictReader(StringIO((tmp_path / "out" / "table.csv").read_text())))
    assert [float(row["accuracy"]) for row in rows] == [line["accuracy"] for line in table(study, records)]
    assert len(list(csv.DictReader(StringIO((tmp_path / "out" / "runs.csv").read_text())))) == 8
    whole = json.loads((tmp_path / "out" / "study.json").read_text(), parse_constant=pytest.fail)
    assert whole["command"] == "symbnn reproduce tiny" and whole["runs"] == 8 and whole["symbnn"] and whole["torch"]
    assert whole["code"] == [records[0]["code"]]
    assert Study.from_json(json.dumps(whole["study"])) == study
    assert whole["total"]["training_multiply_adds"] == sum(record["training_multiply_adds"] for record in records)
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")
    text = "".join(path.read_text() for path in (*work.glob("*.json"), *(tmp_path / "out").glob("*.[cj]s*")))
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


@pytest.mark.parametrize("damage, said", [
    (lambda folder: (folder / "study.json").unlink(), "study.json"),
    (lambda folder: (folder / "table.csv").unlink(), "table.csv"),
    (lambda folder: (folder / "table.csv").write_text("accuracy\n1.0\n"), "with other content"),
    (lambda folder: (folder / "table.csv").write_bytes(b"\xff\xfe"), "with other content"),
    (lambda folder: (folder / "study.json").write_text("{}"), "nothing at command"),
    (lambda folder: (folder / "study.json").write_text((folder / "study.json").read_text().replace("8", "9", 1)),
     "seal"),
])
def test_folders_without_results_are_refused(damage, said, finished, tmp_path):
    save(*finished[:2], tmp_path)
    damage(tmp_path)
    with pytest.raises(Refusal, match="symbnn reproduce NAME") as caught:
        read_results(tmp_path)
    assert said in caught.value.got


COMMITTED = sorted((ROOT / "results").glob("*/study.json"))


def test_there_are_committed_results():
    assert {path.parent.name for path in COMMITTED} == {name for name in STUDIES if not name.endswith("-full")}


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_results_are_of_the_study_that_has_their_name(path):
    study, rows = read_results(path.parent)
    whole = json.loads(path.read_text())
    assert study == STUDIES[path.parent.name] and whole["command"].startswith(f"symbnn reproduce {path.parent.name}")
    assert sum(row["runs"] for row in rows) >= whole["runs"] == len(study.runs())
    assert set(study.columns) <= rows[0].keys() and path.parent.name in provenance(path.parent)
    _, runs = read_results(path.parent, "runs.csv")
    assert len(runs) == sum(row["runs"] for row in rows) and set(study.columns) <= runs[0].keys()
    for name in study.columns:  # what stands in the tables is what the study says
        assert {str(row[name]) for row in rows} == {str(row[name]) for row in runs}


# Pairs and verdicts


def test_pairs_by_hand():
    rows = [{"m": m, "seed": s, "value": v} for m, s, v in (("a", 0, 1.0), ("a", 1, 5.0), ("b", 1, 3.0), ("b", 0, 2.0))]
    mean, error, count = paired(rows, "value", {"m": "a"}, {"m": "b"})
    assert (mean, count) == (0.5, 2) and error == pytest.approx(1.5, abs=exact64)
    assert paired(rows[1:3], "value", {"m": "a"}, {"m": "b"}) == Difference(2.0, None, 1)
    for bad in (rows[:3], [*rows, rows[0]], [*rows[:3], {**rows[3], "seed": 7}], rows[:2]):
        with pytest.raises(Refusal, match="paired one by one"):
            paired(bad, "value", {"m": "a"}, {"m": "b"})


@pytest.fixture
def compared():
    """A comparison of two seeds with invented results."""
    study = Comparison(Setup(channels=(2, 4), train_size=64), replace(DEMO, epochs=2, batch_size=64), small_epochs=3,
                       methods=("baseline", "regular", "regular+projected"), seeds=(0, 1)).study()
    rows = {"baseline": [(0.7, 1.0, 0.4, 0.02, 0.1), (0.8, 0.9, 0.3, 0.03, 0.2)],
            "regular": [(0.8, 0.8, 0.3, 0.05, 0.01), (0.9, 0.95, 0.2, 0.04, 0.02)],
            "regular+projected": [(0.6, 1.1, 0.5, 0.01, -1e-9), (0.8, 0.9, 0.3, 0.01, 0.0)]}
    names = (*JUDGED, "defect_unbiased")
    records = [{"rows": [dict(zip(names, rows[str(run.method)][run.seed]))], "training_multiply_adds": 6e6,
                "training_seconds": 2.0, "evaluation_seconds": 1.0, "training_images": 64} for run in study.runs()]
    return study, records


def test_the_verdict_is_paired_and_names_what_got_worse(compared):
    study, records = compared
    rows = run_rows(study, records)
    found = verdict(rows, {"method.name": "regular", "method.projected": False},
                    {"method.name": "baseline", "method.projected": False})
    assert found.defect_ratio == pytest.approx(10) and found.worse() == ["ece"]
    mean, error, pairs = found.differences["nll_nats"]
    assert (mean, error, pairs) == (pytest.approx(-0.075), pytest.approx(0.125), 2)
    assert str(found).splitlines() == [
        "defect 10 times smaller",
        "  better or equal: accuracy +0.1, NLL -0.08 ± 0.12, Brier -0.1",
        "  worse: cal. error +0.020 ± 0.010"]


def test_verdicts_come_with_what_each_method_trained(compared):
    study, records = compared
    lines = verdicts(study, records)
    assert lines[0] == "Against the baseline of equal budget (paired over 2 seeds, ± standard error):"
    assert [line.partition(":")[0] for line in lines[1:]] == ["regular", "regular+projected"]
    assert "no defect to be seen" in lines[2] and "worse: accuracy -0.050 ± 0.050, NLL" in lines[2]
    assert max(len(line) for text in lines for line in text.splitlines()) <= 80
    trained = budgets(study, records)
    assert trained[1] == f"  baseline: {study.points()[0].training.epochs} epochs, 6e+06 multiply-adds, 2 s"
    assert trained[3] == "  regular+projected: 3 epochs of the small network, then 2 epochs, 6e+06 multiply-adds, 2 s"
    assert all(str(read_method(line.split(":")[0].strip())) in line for line in trained[1:])


def test_one_seed_and_no_baseline_are_reported(compared):
    study, records = compared
    alone = replace(study, grids=study.grids[1:2], seeds=(0,))
    assert verdicts(alone, records[2:3]) == []
    pair = replace(study, grids=study.grids[:2], seeds=(0,))
    first, second = verdicts(pair, [records[0], records[2]])
    assert "one seed" in first and "accuracy +0.1, NLL -0.2" in second and "±" not in second


def test_a_larger_defect_is_called_so():
    same = {name: Difference(0.0, None, 1) for name in JUDGED}
    assert str(Verdict(0.5, same)).startswith("defect 2 times larger") and Verdict(0.5, same).worse() == []
    assert all(METRICS[name].better for name in JUDGED)


# When something cannot be had


def test_each_file_is_written_that_can_be(finished, tmp_path):
    study, records, _ = finished

    def fail():
        raise KeyError("label")

    with pytest.raises(Refusal, match=r"no more\.png \(KeyError: 'label'\)"):
        save(study, records, tmp_path, "", {"more.png": fail, "last.png": Figure})
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "last.png"}
    lacking = [{name: value for name, value in record.items() if name != "torch"} for record in records]
    with pytest.raises(Refusal, match=r"no study\.json \(KeyError: 'torch'\)"):
        save(study, lacking, tmp_path / "other")
    assert {path.name for path in (tmp_path / "other").iterdir()} == {*FILES} - {"study.json"}


def test_what_cannot_be_saved_is_known_before(tmp_path, monkeypatch):
    check_save(tmp_path / "new", ("orbit.png",))
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match="can be written to"):
        check_save(tmp_path / "file/out")
    for name in ("runs.csv", "orbit.png"):
        (tmp_path / name).mkdir()
        with pytest.raises(Refusal, match=rf"Got: {name} in"):
            check_save(tmp_path, ("orbit.png",))
        (tmp_path / name).rmdir()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(Refusal, match=r"symbnn\[plots\]"):
        check_save(tmp_path)


def test_a_verdict_without_some_scores_says_so(compared):
    study, records = compared
    for name in ("ece", "defect_unbiased"):
        records[3]["rows"][0][name] = None
    first, *others = verdicts(study, records)[1:]
    assert first.startswith("regular: defect not measured\n") and "not measured in all runs: cal. error" in first
    assert "Brier" in first and all("not measured" not in line for line in others)
    same = {name: Difference(0.0, None, 1) for name in JUDGED}
    for ratio in (0.0, -0.3):
        assert str(Verdict(ratio, same)).startswith("a defect, where the other has none")
