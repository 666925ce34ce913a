"""Simulations: grids and rows that are kept, averages and pairs by hand, the two named ones against known answers."""
import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from symbnn import cli, simulations
from symbnn.errors import Refusal
from symbnn.hidden_units.two_weights import GaussianFit
from symbnn.posterior.layers import variational_tensors
from symbnn.simulations import Simulation, read_rows, save_rows, simulate
from symbnn.studies.results import paired
from symbnn.studies.simulations import (
    SIMULATIONS,
    TWO_WEIGHT_METHODS,
    grid_predictive,
    two_weight_problem,
    two_weights,
    unit_network,
    width,
)
from symbnn.studies.tables import averages
from symbnn.studies.grids import Panel
from tolerances import assert_close, exact64, within_standard_errors

CALLS = []


def toy(seed, a, b=0):
    CALLS.append((seed, a, b))
    return {"value": a + 10.0 * b + seed, "threads": torch.get_num_threads(), "odd": None if a == 2 else float(a)}


def study(**changes):
    values = {"title": "A toy", "source": "none", "run": toy, "grids": ({"a": (1, 2)}, {"a": (3,), "b": (0, 1)}),
              "seeds": (0, 2), "x": "a", "series": ("b",), "panels": (Panel("value", logarithmic=False),)}
    return Simulation(**{**values, **changes})


@pytest.fixture(autouse=True)
def no_calls():
    CALLS.clear()


# The machinery


def test_points_are_those_of_all_grids_in_order():
    assert study().points() == [{"a": 1}, {"a": 2}, {"a": 3, "b": 0}, {"a": 3, "b": 1}]
    assert study().columns == ("a", "b")


def test_rows_are_computed_once_on_one_thread(tmp_path):
    threads, lines = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        rows = simulate(study(), tmp_path, report=lines.append)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert [(row["a"], row.get("b"), row["seed"]) for row in rows] == [
        (1, None, 0), (1, None, 2), (2, None, 0), (2, None, 2), (3, 0, 0), (3, 0, 2), (3, 1, 0), (3, 1, 2)]
    assert [row["value"] for row in rows] == [1, 3, 2, 4, 3, 5, 13, 15] and {row["threads"] for row in rows} == {1}
    assert len(CALLS) == len(list(tmp_path.iterdir())) == len(lines) == 8 and lines[-1] == "[8/8] a 3, b 1, seed 2"
    lines.clear()
    assert simulate(study(), tmp_path, report=lines.append) == rows and len(CALLS) == 8
    assert lines == ["8 of 8 rows are there already"]
    more = simulate(study(seeds=(0, 1, 2)), tmp_path)
    assert len(CALLS) == 12 and {seed for seed, *_ in CALLS[8:]} == {1}
    assert [row["seed"] for row in more[:3]] == [0, 1, 2]


def test_another_function_has_rows_of_its_own(tmp_path):
    def other(seed, a, b=0):
        return {"value": -1.0}

    simulate(study(), tmp_path)
    assert {row["value"] for row in simulate(study(run=other), tmp_path)} == {-1.0}


def test_an_interruption_keeps_finished_rows(tmp_path):
    def stop(line):
        if line.startswith("[3/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(study(), tmp_path, report=stop)
    assert len(list(tmp_path.iterdir())) == 3
    before = len(CALLS)
    assert len(simulate(study(), tmp_path)) == 8 and len(CALLS) == before + 5


@pytest.mark.parametrize("damage", ("{", "{}", "other settings", "no results"))
def test_files_that_hold_something_else_are_refused(tmp_path, damage):
    simulate(study(), tmp_path)
    path = sorted(tmp_path.iterdir())[0]
    row = json.loads(path.read_text())
    edited = {"other settings": {**row, "seed": 5}, "no results": {**row, "results": {}}}
    path.write_text(json.dumps(edited[damage]) if damage in edited else damage)
    with pytest.raises(Refusal, match="finished run holds its settings"):
        simulate(study(), tmp_path)


@pytest.mark.processes
def test_processes_give_the_same_rows(tmp_path):
    small = study(run=width, grids=({"method": ("marginal", "infonce"), "units": (3,), "separation": (1.0,)},))
    one, two = simulate(small, tmp_path / "one"), simulate(small, tmp_path / "two", jobs=2)
    for row in (*one, *two):
        row.pop("seconds")
    assert one == two


@pytest.mark.parametrize("changes", ({"grids": ()}, {"seeds": ()}, {"seeds": (0, 0)}, {"seeds": (-1,)},
                                     {"grids": ({"a": (1, 1)},)}, {"grids": ({"a": (1,)}, {"a": (1,)})}))
def test_simulations_that_cannot_be_are_refused(changes):
    with pytest.raises(Refusal, match="names each point once"):
        study(**changes)


@pytest.mark.parametrize("jobs", (0, -1, 1.5, True))
def test_jobs_are_positive(tmp_path, jobs):
    with pytest.raises(Refusal, match="positive integer"):
        simulate(study(), tmp_path, jobs=jobs)
    assert not CALLS


def test_averages_by_hand(tmp_path):
    first, second, third, fourth = averages(study(), simulate(study(), tmp_path))
    assert first | {"threads": 1, "threads_sd": 0} == {
        "a": 1, "b": None, "runs": 2, "value": 2.0, "value_sd": math.sqrt(2), "threads": 1, "threads_sd": 0,
        "odd": 1.0, "odd_sd": 0.0}
    assert second["odd"] is None and second["odd_sd"] is None and fourth["value"] == 14 and third["b"] == 0
    single = averages(study(seeds=(0,)), simulate(study(seeds=(0,)), tmp_path))
    assert single[0]["value"] == 1 and single[0]["value_sd"] is None and single[0]["runs"] == 1


def test_what_is_written_is_read_again(tmp_path):
    rows = simulate(study(), tmp_path / "work")
    written = save_rows(study(only=(("b", 1),)), rows, tmp_path / "out", "symbnn reproduce toy")
    assert [path.name for path in written] == ["table.csv", "simulation.json", "figure.png"]
    made = read_rows(tmp_path / "out")
    assert made["rows"] == rows and made["command"] == "symbnn reproduce toy"
    assert made["simulation"]["run"] == "toy" and made["simulation"]["seeds"] == [0, 2]
    lines = (tmp_path / "out/table.csv").read_text().splitlines()
    assert lines[0].startswith("a,b,runs,value,value_sd") and len(lines) == 5
    with pytest.raises(Refusal, match=r"holds simulation\.json"):
        read_rows(tmp_path)
    (tmp_path / "simulation.json").write_text('{"rows": [], "simulation": {"seeds": [0]}}')
    with pytest.raises(Refusal, match="no rows"):
        read_rows(tmp_path)


def test_pairs_by_hand():
    rows = [{"m": m, "seed": s, "value": v} for m, s, v in (("a", 0, 1.0), ("a", 1, 5.0), ("b", 1, 3.0), ("b", 0, 2.0))]
    mean, error, count = paired(rows, "value", {"m": "a"}, {"m": "b"})
    assert (mean, count) == (0.5, 2) and error == pytest.approx(1.5, abs=exact64)
    for bad in (rows[:3], [*rows, rows[0]], [*rows[:3], {**rows[3], "seed": 7}]):
        with pytest.raises(Refusal, match="paired one by one"):
            paired(bad, "value", {"m": "a"}, {"m": "b"})


# Width


def test_the_network_of_units():
    network = unit_network(50, 2.0, seed=3)
    for tensor in variational_tensors(network).values():
        assert tensor.posterior.loc.dtype == torch.float64
        assert_close(tensor.posterior.log_scale, torch.zeros(tensor.posterior.shape, dtype=torch.float64))
    means = variational_tensors(network)["0.weight"].posterior.loc.detach()
    within_standard_errors(means.square().mean(), 4.0, 4 * math.sqrt(2 / means.numel()))
    assert torch.equal(unit_network(50, 4.0, seed=3)[0].weight.posterior.loc, 2 * network[0].weight.posterior.loc)


def test_bias_is_against_the_exact_value_of_the_same_draws():
    exact = width(1, "permanent", units=5, separation=0.7)
    assert exact["bias"] == exact["bias_se"] == 0 and exact["ceiling"] == pytest.approx(math.log(120), abs=exact64)
    for method, sign in (("bethe", 1), ("capacity", -1), ("infonce", -1)):
        row = width(1, method, units=5, separation=0.7)
        assert_close(row["information"] - exact["information"], row["bias"])
        assert sign * row["bias"] > 4 * row["bias_se"] > 0
        assert_close(row["per_unit"] * 5, row["share"] * math.log(120))
        assert_close(row["information_se"] * math.sqrt(32), row["deviation"])
    assert width(1, "bethe", units=17, separation=0.7, draws=8)["bias"] is None
    assert width(2, "bethe", units=5, separation=0.7)["information"] != width(1, "bethe", 5, 0.7)["information"]


def test_wide_layers_reach_the_limit_of_single_units():
    """n d log(1 + s^2) / 2 on average over the means, for 300 units of six weights at s = 0.3."""
    found = torch.tensor([width(seed, "marginal", 300, 0.3, draws=8)["per_unit"] for seed in range(8)])
    limit = 3 * math.log(1.09)
    assert found.mean() < limit + 4 * found.std() / 8**0.5
    within_standard_errors(found.mean(), limit, found.std() / 8**0.5 + 0.05 * limit / 4)


# Two weights


def test_predictions_on_the_grid_of_a_linear_regression():
    model, x, y = two_weight_problem(1, slope=1.0, noise=0.5)
    axis, log_posterior, _ = model.grid()
    found = grid_predictive(model, axis, log_posterior, x, y)
    precision = 1 / 2 + model.x.square().sum() / 0.25
    mean, variance = (model.x @ model.y) / 0.25 / precision * x, x**2 / precision
    nll = -torch.distributions.Normal(mean, (variance + 0.25).sqrt()).log_prob(y)
    for one, other in zip(found, (mean, variance, nll)):
        assert_close(one, other, 1e3 * exact64)


def test_problems_are_drawn_from_their_model():
    model, x, y = two_weight_problem(4, slope=0.2, noise=1e-9)
    weights = torch.randn(2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert model.slope == 0.2 and len(model.x) == 16 and len(x) == 200 and x.abs().max() <= 1 and x.min() < -0.9
    assert_close(model.predict(weights, x), y, 1e-7)
    assert_close(model.predict(weights, model.x), model.y, 1e-7)
    noisy = two_weight_problem(4, slope=0.2, noise=0.5)
    residuals = noisy[2] - noisy[0].predict(weights, noisy[1])
    within_standard_errors(residuals.square().mean(), 0.25, 0.25 * math.sqrt(2 / 200))


@pytest.mark.parametrize("noise", (0.3, 1.0))
def test_gap_is_a_divergence_and_symmetrising_adds_the_information(noise):
    plain, after, best = (two_weights(1, method, 0.1, noise) for method in TWO_WEIGHT_METHODS)
    for row in (plain, after, best):
        assert abs(row["gap"] - row["kl"]) < 1e-3  # the grid's error, of second order in its step
        assert row["predictive_kl"] > 0 and row["kl_reverse"] > 0
        assert 0 <= row["information"] <= math.log(2) + exact64
        assert_close(row["nll"] - row["excess_nll"], plain["nll"] - plain["excess_nll"])
    assert_close(plain["gap"] - after["gap"], after["information"], 1e-9)
    assert best["gap"] < after["gap"] + 1e-6 and plain["distance"] == after["distance"]
    for name in ("mean_error", "sd_ratio", "nll", "predictive_kl"):  # the exchange leaves predictions as they are
        assert_close(plain[name], after[name], 1e-6)


def gaussian(location, scale):
    return GaussianFit(torch.tensor(location, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64), 0, 0)


def test_divergence_of_predictions_is_what_draws_say():
    model, x, _ = two_weight_problem(1, 0.1, 1.0)
    axis, log_posterior, _ = model.grid(8.0, 321)
    fit = gaussian((2.0, 1.0), (0.5, 0.9))
    log_q = simulations._log_density(fit, axis, symmetric=False)
    x, noise = x[:3], torch.Generator().manual_seed(0)
    found = simulations._predictive_kl(model, axis, log_posterior, log_q, x)
    assert_close(simulations._predictive_kl(model, axis, log_posterior, log_posterior, x), 0.0)
    weights = torch.cartesian_prod(axis, axis)[log_posterior.exp().flatten().multinomial(400, True, generator=noise)]
    y = model.predict(weights, x) + torch.randn(400, 3, generator=noise, dtype=torch.float64)
    inputs, targets = x.repeat(400), y.flatten()
    p, q = (grid_predictive(model, axis, density, inputs, targets)[2] for density in (log_posterior, log_q))
    within_standard_errors(found, (q - p).mean(), (q - p).view(400, 3).mean(1).std() / 400**0.5)
    assert found > 4 * (q - p).view(400, 3).mean(1).std() / 400**0.5


def test_the_symmetrised_density_by_hand():
    fit = gaussian((1.0, -1.0), (0.5, 2.0))
    axis = torch.tensor([-1.0, 0.5], dtype=torch.float64)
    first, second = (torch.distributions.Normal(m, s).log_prob(axis).exp() for m, s in ((1.0, 0.5), (-1.0, 2.0)))
    plain = first[:, None] * second
    assert_close(simulations._log_density(fit, axis, False).exp(), plain)
    assert_close(simulations._log_density(fit, axis, True).exp(), (plain + plain.T) / 2)


# The named ones, and the command


@pytest.mark.parametrize("name", SIMULATIONS)
def test_named_simulations_are_json(name):
    simulation = SIMULATIONS[name]
    assert json.loads(json.dumps(simulation.plain())) == simulation.plain()
    assert simulation.run.__name__ == name and simulation.x in simulation.columns
    assert {*simulation.series, *(setting for setting, _ in simulation.only)} <= set(simulation.columns)


COMMITTED = sorted((Path(__file__).parents[1] / "results").glob("*/simulation.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_rows_are_of_the_simulation_that_has_their_name(path):
    made, simulation = read_rows(path.parent), SIMULATIONS[path.parent.name]
    assert made["simulation"] == simulation.plain()
    assert made["command"].startswith(f"symbnn reproduce {path.parent.name}")
    assert len(made["rows"]) == len(simulation.points()) * len(simulation.seeds)
    assert len((path.parent / "table.csv").read_text().splitlines()) == 1 + len(simulation.points())


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """Run a command in an empty folder, with a simulation of its own beside the named ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SIMULATIONS, "toy", study())
    return lambda *arguments: CliRunner().invoke(cli.app, list(arguments), prog_name="symbnn")


def test_reproduce_runs_a_simulation(shell, tmp_path):
    found = shell("reproduce", "toy", "--seeds", "0,1", "--work", "work")
    assert found.exit_code == 0, found.output
    assert "[8/8]" in found.stderr and "Written to results/toy: table.csv" in found.stdout.replace("\\", "/")
    made = read_rows(tmp_path / "results/toy")
    assert made["simulation"]["seeds"] == [0, 1] and len(list((tmp_path / "work").iterdir())) == len(CALLS) == 8
    again = shell("reproduce", "toy", "--seeds", "0,1", "--work", "work", "-o", "out")
    assert again.exit_code == 0 and len(CALLS) == 8 and (tmp_path / "out/figure.png").exists()


def test_reproduce_shows_and_lists_simulations(shell, monkeypatch, tmp_path):
    found = shell("reproduce", "toy", "--show", "--seeds", "7")
    assert found.exit_code == 0 and json.loads(found.stdout)["seeds"] == [7] and not list(tmp_path.iterdir())
    monkeypatch.setattr(cli, "STUDIES", {})
    monkeypatch.setattr(cli, "step_speed", lambda: None)
    listed = shell("reproduce", "--list")
    assert listed.exit_code == 0 and "toy" in listed.stdout and "two_weights" in listed.stdout


@pytest.mark.parametrize("option", (("--device", "cpu"), ("--backend", "dask"), ("--data-folder", "."),
                                    ("--scheduler", "tcp://here:1")))
def test_options_of_studies_are_refused(shell, tmp_path, option):
    found = shell("reproduce", "toy", *option)
    assert found.exit_code == 2 and option[0] in found.stderr and not CALLS and not list(tmp_path.iterdir())
