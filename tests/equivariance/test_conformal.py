"""Conformal sets and intervals: the guarantee by repetition, the law of coverage, and every orientation."""
import math
from fractions import Fraction
from itertools import permutations

import pytest
import torch
from torch import nn

from helpers import normal, seeded
from symbnn.data.sources import load
from symbnn.equivariance.conformal import conformal_intervals, conformal_rank, conformal_sets
from symbnn.equivariance.measures import predictive_moments
from symbnn.equivariance.mixture import orbit_average
from symbnn.equivariance.predictions import OrbitOutputs, OrbitPredictions, orbit_outputs, orbit_predictions
from symbnn.equivariance.symmetric import bayesianize
from symbnn.errors import Refusal
from symbnn.posterior.layers import posterior_mean_network
from symbnn.posterior.real_targets import Gaussian
from symbnn.symmetry.actions import natural_action
from symbnn.symmetry.fields import field, point_symmetries, rotations
from symbnn.training.loop import train
from tolerances import assert_close, within_standard_errors

CALIBRATION, NEW, REPEATS = 29, 20, 1500


def law(coverage):
    """Mean and standard deviation of the number covered: beta-binomial."""
    k, n, m = conformal_rank(CALIBRATION, coverage), CALIBRATION, NEW
    return m * k / (n + 1), math.sqrt(m * k * (n + 1 - k) * (n + 1 + m) / ((n + 1) ** 2 * (n + 2)))


def labelled(seed):
    """Probabilities and labels that are drawn from others."""
    torch.manual_seed(seed)
    logits = torch.randn(REPEATS, CALIBRATION + NEW, 4).double()
    return logits.softmax(-1), torch.distributions.Categorical(logits=0.5 * logits).sample()


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.93])
def test_sets_cover_as_often_as_promised(coverage):
    covered = torch.tensor([
        conformal_sets(p[:CALIBRATION], y[:CALIBRATION], coverage, "threshold")
        .covered(p[CALIBRATION:], y[CALIBRATION:]).sum() for p, y in zip(*labelled(0))]).double()
    mean, deviation = law(coverage)
    within_standard_errors(covered.mean(), mean, deviation / math.sqrt(REPEATS))
    fourth = ((covered - mean) ** 4).mean()  # the standard error of a variance needs it
    error = ((fourth - deviation**4) / REPEATS).sqrt()
    within_standard_errors(((covered - mean) ** 2).mean(), deviation**2, error)


def test_adaptive_sets_cover_at_least_as_often_as_promised():
    """Their scores are tied where the label is the least probable class."""
    rules = [(conformal_sets(p[:CALIBRATION], y[:CALIBRATION], 0.8), p[CALIBRATION:], y[CALIBRATION:])
             for p, y in zip(*labelled(1))]
    shares = torch.tensor([rule.covered(p, y).double().mean() for rule, p, y in rules])
    mean, deviation = law(0.8)
    assert shares.mean() * NEW > mean - 4 * deviation / math.sqrt(REPEATS)


@pytest.mark.parametrize("scaled", [False, True])
def test_intervals_cover_whole_targets_as_often_as_promised(scaled):
    torch.manual_seed(2)
    spread = 0.1 + torch.rand(REPEATS, CALIBRATION + NEW, 2, 3).double()
    mean = torch.randn(REPEATS, CALIBRATION + NEW, 2, 3).double()
    y = mean + spread * torch.distributions.StudentT(2.0).sample(mean.shape)
    covered = []
    for m, s, t in zip(mean, spread, y):
        spreads = (s[:CALIBRATION], s[CALIBRATION:]) if scaled else (None, None)
        rule = conformal_intervals(m[:CALIBRATION], t[:CALIBRATION], 0.8, spreads[0])
        inside = rule.covered(m[CALIBRATION:], t[CALIBRATION:], spreads[1])
        low, high = rule.intervals(m[CALIBRATION:], spreads[1])
        assert torch.equal(inside, ((t[CALIBRATION:] - low) * (high - t[CALIBRATION:]) >= 0).flatten(1).all(1))
        covered.append(inside.sum())
    expected, deviation = law(0.8)
    within_standard_errors(torch.stack(covered).double().mean(), expected, deviation / math.sqrt(REPEATS))


def test_the_rank_is_exact_and_its_promise_kept():
    for data in range(1, 400):
        for percent in (50, 80, 90, 95, 99):
            exact = -((-(data + 1) * percent) // 100)
            if exact > data:
                with pytest.raises(Refusal, match="calibration data"):
                    conformal_rank(data, percent / 100)
                continue
            assert conformal_rank(data, percent / 100) == exact
            share = Fraction(exact, data + 1)
            assert Fraction(percent, 100) <= share < Fraction(percent, 100) + Fraction(1, data + 1)


@pytest.mark.parametrize("score", ["threshold", "adaptive"])
def test_sets_do_not_depend_on_how_classes_are_numbered(score):
    p = normal(40, 4).softmax(-1)
    p[3] = torch.tensor([0.1, 0.4, 0.4, 0.1])  # classes that enter together
    y = torch.randint(4, (40,), generator=seeded())
    rule = conformal_sets(p, y, 0.6, score)
    sets = rule.sets(p)
    for order in permutations(range(4)):
        moved = p[:, list(order)]
        labels = torch.tensor([order.index(int(label)) for label in y])
        again = conformal_sets(moved, labels, 0.6, score)
        assert again.threshold == rule.threshold and torch.equal(again.sets(moved), sets[:, list(order)])
    assert sets[3, 1] == sets[3, 2] and sets[3, 0] == sets[3, 3]


def test_the_scores_are_their_definitions():
    p, y = normal(19, 3).softmax(-1), torch.arange(19) % 3
    own = p.gather(1, y[:, None])
    assert_close(conformal_sets(p, y, 0.5, "threshold").threshold, (1 - own[:, 0]).sort().values[9])
    adaptive = (p * (p >= own)).sum(1)
    assert_close(conformal_sets(p, y, 0.5, "adaptive").threshold, adaptive.sort().values[9])
    y = normal(19, 2, seed=3)
    assert_close(conformal_intervals(torch.zeros(19, 2), y, 0.5).threshold, y.abs().amax(1).sort().values[9])


def biased(seed=0):
    """A classifier that is not equivariant, and labels that upright pictures have by its own probabilities."""
    torch.manual_seed(seed)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    with torch.no_grad():
        plain[1].weight.mul_(6)
    pair = bayesianize(plain, rotations(), (1, 4, 4), scale=0.1)
    x = normal(400, 1, 4, 4)
    found = pair.predictions(x, draws=8, generator=seeded())
    upright = found.probabilities[:, :, 0].mean(0)
    return found, torch.distributions.Categorical(probs=upright).sample()


@pytest.mark.parametrize("score", ["threshold", "adaptive"])
def test_equivariant_predictors_cover_the_same_inputs_in_each_orientation(score):
    found, labels = biased()
    inside = {}
    for name, its in (("alone", found), ("averaged", orbit_average(found))):
        first, rest = (OrbitPredictions(its.probabilities[:, rows], its.elements, its.mode)
                       for rows in (slice(199), slice(199, None)))
        rule = conformal_sets(first, labels[:199], 0.9, score)
        loose = conformal_sets(first.probabilities[:, :, 0].mean(0), labels[:199], 0.9, score)
        assert_close(loose.threshold, rule.threshold)
        inside[name] = rule.covered(rest, labels[199:])
        assert inside[name].shape == (201, 4)
    assert (inside["averaged"] == inside["averaged"][:, :1]).all()
    upright, turned = inside["alone"][:, 0].double().mean(), inside["alone"][:, 1:].double().mean(0)
    assert (turned < upright - 4 * math.sqrt(0.09 * 2 / 200)).all()


def test_an_expanded_network_covers_the_same_digits_in_each_orientation():
    """At its posterior means, where it is equivariant to rounding; the small network does not."""
    digits = load("digits", train_size=200, dtype=torch.float64)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)).double()
    small = bayesianize(plain, rotations(), digits.shape)
    train(small, digits.train, epochs=3, learning_rate=0.01, augmentation="none", dtype="float64")
    images, labels, inside = digits.test.inputs[:300], digits.test.labels[:300], {}
    for name, pair in (("small", small), ("expanded", small.expand())):
        found = orbit_predictions(posterior_mean_network(pair.network), images, pair.action)
        rule = conformal_sets(found.probabilities[0, :150, 0], labels[:150], 0.9)
        inside[name] = rule.covered(found, labels)[150:]  # of others than the datum that is the threshold
    assert (inside["expanded"] == inside["expanded"][:, :1]).all()
    assert inside["small"][:, 1].double().mean() < 0.75 < inside["small"][:, 0].double().mean()


def test_boxes_move_with_vectors():
    """Of an averaged predictor of a vector field; the boxes at a moved input, moved back, are those of the input."""
    space = point_symmetries(2)
    turn, flow = field(space, (1, 4, 4)), field(space, (2, 4, 4), natural_action(space.group))
    torch.manual_seed(0)
    pair = bayesianize(nn.Conv2d(1, 2, 3, padding=1).double(), turn, (1, 4, 4), output=flow)
    found = orbit_outputs(pair.network, normal(30, 1, 4, 4), pair.action, draws=4, generator=seeded())
    even = OrbitOutputs(found.outputs.mean(2, keepdim=True).expand_as(found.outputs), found.elements, "common")
    y = normal(30, 2, 4, 4, seed=5)
    widths = {}
    for name, its in (("alone", found), ("averaged", even)):
        mean, spread = predictive_moments(its, Gaussian(0.3))
        assert mean.shape == spread.shape == (30, 8, 2, 4, 4)
        rule = conformal_intervals(mean[:20, 0], y[:20], 0.8, spread[:20, 0])
        boxes = [torch.stack(rule.intervals(mean[20:, g], spread[20:, g])) for g in range(8)]
        widths[name] = max((box - boxes[0]).abs().max().item() for box in boxes)
        covered = torch.stack([rule.covered(mean[20:, g], y[20:], spread[20:, g]) for g in range(8)])
        assert name == "alone" or (covered == covered[:1]).all()
    assert widths["averaged"] < 1e-12 < 1e-3 < widths["alone"]


P, Y = normal(30, 3).softmax(-1), torch.arange(30) % 3
MEAN = normal(30, 1)


@pytest.mark.parametrize(("call", "said"), [
    (lambda: conformal_sets(P, Y, 90), "percentage"), (lambda: conformal_sets(P, Y, 1.0), "coverage"),
    (lambda: conformal_sets(P, Y, "0.9"), "coverage"), (lambda: conformal_sets(P[:8], Y[:8], 0.9), "at least 9"),
    (lambda: conformal_sets(P.log(), Y), "exp"), (lambda: conformal_sets(P[None], Y), "to calibrate on"),
    (lambda: conformal_sets(P[0], Y), "batch axis"), (lambda: conformal_sets(P, Y + 1), "count from 1"),
    (lambda: conformal_sets(P, Y, score="aps"), "adaptive"), (lambda: conformal_sets(P.tolist(), Y), "as_tensor"),
    (lambda: conformal_sets(P, Y).covered(P, Y[1:]), "labels"), (lambda: conformal_sets(P * math.nan, Y), "NaN"),
    (lambda: conformal_intervals(MEAN, MEAN[:, 0]), "targets\\[:, None\\]"),
    (lambda: conformal_intervals(MEAN, MEAN * math.nan), "finite"),
    (lambda: conformal_intervals(MEAN, MEAN, spread=0 * MEAN), "positive"),
    (lambda: conformal_intervals(MEAN[:0], MEAN[:0]), "at least one"),
    (lambda: conformal_intervals(MEAN[:8], MEAN[:8]), "at least 9"),
    (lambda: conformal_intervals(MEAN, MEAN).intervals(MEAN, MEAN.exp()), "no spread"),
    (lambda: conformal_intervals(MEAN, MEAN, spread=MEAN.exp()).intervals(MEAN), "a spread"),
    (lambda: conformal_intervals(MEAN.numpy(), MEAN), "as_tensor"),
])
def test_what_nothing_can_be_promised_for_is_refused(call, said):
    with pytest.raises(Refusal, match=said):
        call()
