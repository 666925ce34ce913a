"""Tables: names and units, spreads, means over seeds and repeats, what fits into 80 columns."""
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from helpers_studies import BASE, TINY
from symbnn.studies.grids import Study
from symbnn.studies.methods import Baseline
from symbnn.studies.results import SHOWN
from symbnn.studies.runs import FunctionRun, perform
from symbnn.studies.tables import (
    METRICS,
    Metric,
    Spread,
    as_csv,
    as_markdown,
    averages,
    costs,
    metric,
    run_rows,
    shown,
    spread,
    table,
)
from symbnn.studies.tasks import evaluate_task, prepare
from tolerances import assert_close


def text(table, width=80):
    """As a terminal of this width shows it."""
    console = Console(width=width, force_terminal=False, force_jupyter=False)
    with console.capture() as caught:
        console.print(table)
    return caught.get()


def test_every_metric_has_a_name_and_scores_a_direction():
    assert all(its.label and its.better in ("higher", "lower", "") for its in METRICS.values())
    found, _ = evaluate_task(prepare(BASE.setup).network(0), prepare(BASE.setup), images=20, draws=4, method=Baseline())
    scores = {name for name in found if "_se" not in name}
    assert scores <= METRICS.keys() and all(METRICS[name].unit for name in scores)
    undirected = {name for name in scores if not METRICS[name].better}  # how uncertain one should be is not said
    assert undirected == {f"{over}{name}" for over in ("", "orbit_")
                          for name in ("entropy_nats", "mutual_information_nats")}
    assert METRICS["ece"].heading == "cal. error ↓\nshare" and METRICS["kl"].heading == "KL\nnats a datum"
    assert METRICS["accuracy"].axis == "accuracy, share" and metric("my_own") == Metric("my own", "")


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


def test_a_sweep_has_a_row_for_each_number_of_draws():
    run = BASE.changed({"evaluation.sweep": (1, 2, 8), "evaluation.repeats": 2, "evaluation.mode": "shared"})
    study = Study("sweep", "none", run, ({"method.name": ("baseline",)},), seeds=(0,), x="draws")
    record = perform(run).record
    lines, rows = table(study, [record]), record["rows"]
    assert [(line["draws"], line["runs"]) for line in lines] == [(1, 2), (2, 2), (8, 2)]
    values = torch.tensor([rows[2]["defect_plugin"], rows[5]["defect_plugin"]], dtype=torch.float64)
    assert_close(torch.tensor([lines[2]["defect_plugin"], lines[2]["defect_plugin_sd"]], dtype=torch.float64),
                 torch.stack([values.mean(), values.std()]))
    assert lines[0]["defect_unbiased"] is None and lines[0]["defect_unbiased_sd"] is None


def test_averages_by_hand():
    rows = [{"a": a, "b": b, "seed": seed, "value": a + 10.0 * (b or 0) + seed, "odd": None if a == 2 else float(a),
             "kind": "word", "value_se": 1.0} for a, b in ((1, None), (2, None), (3, 0), (3, 1)) for seed in (0, 2)]
    first, second, third, fourth = averages(rows, ("a", "b"))
    assert first == {"a": 1, "b": None, "runs": 2, "value": 2.0, "value_sd": math.sqrt(2), "odd": 1.0, "odd_sd": 0.0}
    assert second["odd"] is None and second["odd_sd"] is None and fourth["value"] == 14 and third["b"] == 0
    assert averages(rows[:1], ("a", "b"))[0]["value_sd"] is None


def test_a_table_of_calls_has_their_settings():
    study = Study("toy", "none", FunctionRun("toy"), ({"a": (1, 2)}, {"a": (3,), "b": (0,)}), (0, 1), x="a")
    records = [{"rows": [{"value": run.value("a") + run.seed}], "evaluation_seconds": 1.0} for run in study.runs()]
    assert [(row["a"], row["b"], row["value"], row["runs"]) for row in table(study, records)] == [
        (1, None, 1.5, 2), (2, None, 2.5, 2), (3, 0, 3.5, 2)]
    assert run_rows(study, records)[1] == {"a": 1, "b": None, "seed": 1, "value": 2, "evaluation_seconds": 1.0}
    assert costs(study, records) == []


def test_markdown_shows_settings_as_they_are_and_metrics_with_their_spread():
    rows = [{"trigger": 1, "rate": 0.03, "kept": True, "accuracy": 0.5, "accuracy_sd": 0.02, "nll": 1.25,
             "nll_sd": None},
            {"trigger": 0, "rate": 67776.0, "kept": False, "accuracy": None, "accuracy_sd": None, "nll": 2.0,
             "nll_sd": 0.5}]
    assert as_markdown(rows, {"trigger": "t", "rate": "r", "kept": "k", "accuracy": "a", "nll": "n"}).split("\n") == [
        "| t | r | k | a | n |", "| --- | --- | --- | --- | --- |", "| 1 | 0.03 | yes | 0.500 ± 0.020 | 1.25 |",
        "| 0 | 6.78e+04 | no |  | 2.00 ± 0.50 |"]


def test_costs_are_per_training_image(finished):
    study, records, _ = finished
    for place, line in enumerate(costs(study, records)):
        mine = records[2 * place : 2 * place + 2]
        seconds = sum(record["training_seconds"] for record in mine) / 2
        assert_close(line["training_seconds_per_training_image"], seconds / 64)
        assert line["training_multiply_adds_per_training_image"] == mine[0]["training_multiply_adds"] / 64


def test_widths_are_numbers_on_an_axis_and_words_are_no_metrics():
    study = replace(TINY, grids=({"setup.channels": ((3,), (2, 4))},), seeds=(0,), x="setup.channels", series=())
    record = {"training_multiply_adds": 1, "training_seconds": 1.0, "evaluation_seconds": 1.0,
              "rows": [{"accuracy": 0.5, "information_method": "bethe"}]}
    rows = table(study, [record, record])
    assert [row["setup.channels"] for row in rows] == [3, "2 4"] and rows[0]["accuracy"] == 0.5
    assert "information_method" not in rows[0] and "bethe" in as_csv(run_rows(study, [record, record]))


def test_the_terminal_shows_the_figure_s_metrics(finished):
    study, records, _ = finished
    drawn = shown(study, table(study, records))
    assert [column.header for column in drawn.columns] == [
        "method", "trigger", "runs", "accuracy ↑\nshare", "defect ↓\nprobability²"]
    assert drawn.row_count == 4 and "block_diagonal" in text(drawn)


def test_a_comparison_fits_into_80_columns_on_one_line_each():
    study = replace(TINY, grids=({"method.name": ("baseline", "orbit_mixture", "block_diagonal")},), series=())
    values = {"accuracy": 0.9231, "nll_nats": 0.2478, "ece": 0.0523, "defect_unbiased": 0.00081}
    rows = [{"method.name": name, "runs": 3} | values | {f"{key}_sd": value / 3 for key, value in values.items()}
            for name in ("baseline", "orbit_mixture", "block_diagonal")]
    lines = text(shown(study, rows, ["method.name"], SHOWN)).splitlines()
    (line,) = (line for line in lines if "block_diagonal" in line)
    assert line.split() == ["block_diagonal", "0.92±0.31", "0.248±0.083", "0.052±0.017", "0.00081±0.00027"]
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
