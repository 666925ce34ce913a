"""Figures: curves, guides and axes of a study; the image that varies most."""
from dataclasses import replace

import matplotlib.axes
import pytest
import torch

from helpers_studies import BASE
from symbnn.studies.figures import most_varying, orbit_picture, picture
from symbnn.studies.grids import Panel
from symbnn.studies.runs import task_of
from symbnn.studies.tables import table
from symbnn.studies.tasks import chosen_images


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


def test_an_axis_has_label_and_unit_and_the_figure_keeps_to_what_it_says(curves, finished):
    study, records, _ = finished
    figure = picture(replace(study, only=(("method.trigger", 0),), panels=(Panel("nll_nats"),)), table(study, records))
    assert figure.axes[0].get_ylabel() == "negative log-likelihood, nats"
    drawn, _ = curves
    assert [label for *_, label in drawn] == ["trigger 0"] and len(drawn[0][0]) == 3


def test_a_spread_of_single_runs_is_an_empty_panel(finished):
    study, records, _ = finished
    rows = [{**row, "nll_nats_sd": None} for row in table(study, records)]
    assert not picture(replace(study, panels=(Panel("nll_nats", "spread"),)), rows).axes[0].lines


def test_the_image_shown_varies_most():
    predictions = torch.full((5, 4, 2), 0.5)
    predictions[3, 0] = torch.tensor([0.0, 1.0])
    predictions[1, 0] = torch.tensor([0.4, 0.6])
    assert most_varying(predictions) == 3


def test_an_orbit_is_drawn_with_the_predictions_in_each_position():
    task, found = task_of(BASE, None)[0], torch.full((20, 4, 10), 0.1)
    found[7, 2] = torch.eye(10)[4]
    figure = orbit_picture(task, BASE.evaluation, {"one": found, "other": found.flip(1)})
    grid = [figure.axes[4 * row : 4 * row + 4] for row in range(3)]
    image = chosen_images(task, "test", 20).inputs[7]
    for place, axes in enumerate(grid[0]):
        turned = task.action.act(place, image).mean(0)
        assert torch.equal(torch.as_tensor(axes.images[0].get_array().data), turned)
    heights = [[bar.get_height() for bar in axes.patches] for axes in (grid[1][2], grid[2][1], grid[1][0])]
    assert heights[0] == heights[1] == torch.eye(10)[4].tolist() and len(set(heights[2])) == 1


def test_a_slope_begins_where_there_is_a_logarithm(curves, finished):
    study, records, _ = finished
    study = replace(study, x="method.trigger", series=(), panels=(Panel("nll_nats", slope=-1),))
    lines = [{**line, "method.trigger": place} for line, place in zip(table(study, records), (0, 1, 2, 4))]
    picture(study, lines)
    assert curves[1] == [([1, 2, 4], [lines[1]["nll_nats"] / place for place in (1, 2, 4)])]
    curves[1].clear()
    picture(study, lines[:1])
    assert not curves[1]
