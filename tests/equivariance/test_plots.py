"""Plots show the numbers they should, in the axes they are given, and refuse what they cannot show."""
import sys

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from helpers import normal, seeded
from symbnn.equivariance.calibration import reliability
from symbnn.equivariance.measures import interval_places, label_confidences, predictive_moments, summarize_outputs
from symbnn.equivariance.metrics import summarize
from symbnn.equivariance.plots import plot_orbit, plot_reliability, plot_risk_coverage
from symbnn.equivariance.predictions import OrbitOutputs, OrbitPredictions
from symbnn.errors import Refusal
from symbnn.posterior.likelihoods import Bernoulli, Categorical, Poisson
from symbnn.posterior.real_targets import Gaussian
from tolerances import assert_close

matplotlib.use("Agg")
P = OrbitPredictions(normal(3, 20, 4, 5).softmax(-1), (0, 1, 2, 3), "common")
LABELS = torch.randint(5, (20,), generator=seeded())
FIELD = OrbitOutputs(normal(3, 20, 4, 2, 3), (0, 1, 2, 3), "common")
REAL = normal(20, 2, 3, seed=4)


@pytest.fixture
def axes():
    return Figure().subplots()


def line(axes, number):
    return tuple(map(np.asarray, axes.get_lines()[number].get_data()))


def test_reliability_of_labels(axes):
    assert plot_reliability(P, LABELS, bins=4, axes=axes) is axes
    found = reliability(*label_confidences(P, LABELS), 4, "mass")
    assert_close(line(axes, 1)[0], found.confidence)
    assert_close(line(axes, 1)[1], found.accuracy)
    assert f"{found.error:.3f}" in axes.get_legend().get_texts()[0].get_text()
    assert "confidence" in axes.get_xlabel() and "accuracy" in axes.get_ylabel()


def test_reliability_of_real_targets(axes):
    plot_reliability(FIELD, REAL, Gaussian(0.3), axes=axes)
    places = interval_places(FIELD, REAL, Gaussian(0.3))
    level, share = line(axes, 1)
    for l, s in zip(level[1:-1], share[1:-1]):
        assert abs((places <= l).double().mean() - s) < 1e-6
    error = summarize_outputs(FIELD, REAL, Gaussian(0.3))["interval_error"]
    assert f"{error:.3f}" in axes.get_legend().get_texts()[0].get_text() and "level" in axes.get_xlabel()


def test_risk_coverage_of_labels(axes):
    plot_risk_coverage(P, LABELS, axes=axes)
    coverage, risk = line(axes, 0)
    found = summarize(P, LABELS)
    assert_close(risk.mean(), found["aurc"])
    assert_close(risk[-1], 1 - found["accuracy"])
    assert coverage[-1] == 1 and (line(axes, 1)[1] <= risk + 1e-12).all()


def test_risk_coverage_of_real_targets_has_their_unit(axes):
    y = REAL.clone()
    y[3], y[5, 0] = torch.nan, torch.nan
    plot_risk_coverage(FIELD, y, Gaussian(0.3, nan_is_missing=True), unit="kelvin", axes=axes)
    coverage, risk = line(axes, 0)
    mean = FIELD.outputs[:, :, 0].mean(0)
    every = (mean - y).square().flatten(1).nanmean(1)
    assert len(coverage) == 19 and "RMSE in kelvin" in axes.get_ylabel()
    assert_close(risk[-1] ** 2, every[~every.isnan()].mean())


def test_orbits_of_class_probabilities(axes):
    plot_orbit(P, [7, 2], classes="abcde", axes=axes)
    heights = np.array([bar.get_height() for bar in axes.patches]).reshape(-1, 2, 4)
    assert_close(heights.sum(0), np.ones((2, 4)))
    assert_close(heights[:5], P.probabilities.mean(0)[[7, 2]].permute(2, 0, 1))
    assert [text.get_text() for text in axes.get_xticklabels()] == ["7", "2"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list("abcde")


def test_small_classes_are_shown_together(axes):
    p = torch.tensor([0.9, 0.04, 0.03, 0.03], dtype=torch.float64)
    sure = OrbitPredictions(p.expand(1, 3, 2, 4), (0, 1), "common")
    plot_orbit(sure, axes=axes)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["0", "others"]
    assert_close(axes.patches[-1].get_height(), 0.1)


def test_orbits_of_numbers(axes):
    plot_orbit(FIELD, (4,), Gaussian(0.3), coordinate=5, unit="kelvin", axes=axes)
    mean, deviation = (value[4].flatten(1)[:, 5] for value in predictive_moments(FIELD, Gaussian(0.3)))
    points, _, (bars,) = axes.containers[0]
    assert_close(points.get_ydata().astype(float), mean)
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    assert_close(ends, torch.stack([mean - 2 * deviation, mean + 2 * deviation], 1))
    assert axes.get_ylabel().endswith("kelvin")


@pytest.mark.parametrize(("likelihood", "shape"), [(Bernoulli(), (2,)), (Categorical(), (3, 2, 2))], ids=repr)
def test_other_labels_are_shown_too(likelihood, shape):
    outputs = OrbitOutputs(normal(3, 8, 2, *shape), (0, 1), "common")
    targets = torch.arange(8)[:, None].expand(8, 2) % 2 if len(shape) == 1 else torch.zeros(8, 2, 2).long()
    for axes in (plot_orbit(outputs, (0,), likelihood, coordinate=1), plot_reliability(outputs, targets, likelihood),
                 plot_risk_coverage(outputs, targets, likelihood)):
        assert axes.get_xlabel()
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize(("call", "said"), [
    (lambda axes: plot_orbit(P, (20,), axes=axes), "place of an input"),
    (lambda axes: plot_orbit(P, 3, axes=axes), "inputs=\\(0,\\)"),
    (lambda axes: plot_orbit(P, (), axes=axes), "at least one input"),
    (lambda axes: plot_orbit(P, (0.5,), axes=axes), "whole number"),
    (lambda axes: plot_orbit(P, classes="ab", axes=axes), "5 names"),
    (lambda axes: plot_orbit(FIELD, likelihood=Gaussian(0.1), classes="ab", axes=axes), "unit="),
    (lambda axes: plot_orbit(FIELD, likelihood=Gaussian(0.1), coordinate=6, axes=axes), "coordinate"),
    (lambda axes: plot_orbit(P.probabilities, axes=axes), "orbit_predictions"),
    (lambda axes: plot_orbit(P, axes=axes.figure), "figure.gca"), (lambda axes: plot_orbit(P, axes=3), "axes"),
    (lambda axes: plot_orbit(P, likelihood="labels", axes=axes), "likelihood"),
    (lambda axes: plot_reliability(P, LABELS + 1, axes=axes), "labels"),
    (lambda axes: plot_reliability(P, LABELS[1:], axes=axes), "labels"),
    (lambda axes: plot_reliability(FIELD, REAL[1:], Gaussian(0.1), axes=axes), "20 targets"),
    (lambda axes: plot_reliability(FIELD, REAL.abs().round(), Poisson(), axes=axes), "central intervals"),
    (lambda axes: plot_risk_coverage(FIELD, REAL[1:], Gaussian(0.1), axes=axes), "20 targets"),
    (lambda axes: plot_risk_coverage(FIELD, REAL * torch.nan, Gaussian(0.1), axes=axes), "NaN"),
])
def test_what_cannot_be_shown_is_refused(call, said, axes):
    with pytest.raises(Refusal, match=said):
        call(axes)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(Refusal, match="symbnn\\[plots\\]"):
        plot_reliability(P, LABELS)
