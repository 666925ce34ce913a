"""Intervals of a measured defect cover, and numbers of samples and inputs are the first that suffice."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import seeded
from symbnn.equivariance.confidence import (
    defect_interval,
    draws_needed,
    inputs_needed,
    inputs_radius,
    root_radius,
)
from symbnn.equivariance.metrics import defect_plugin
from symbnn.errors import Refusal
from symbnn.estimates import Estimate
from tolerances import assert_close, exact64, standard_errors, within_standard_errors

seeds = st.integers(0, 10_000)


def test_radii_by_hand():
    assert_close(root_radius(100, 4, "common"), math.sqrt(8 * 0.75 / 100 * math.log(40) / 2))
    assert_close(root_radius(100, 4, "shared"), math.sqrt(4 * 0.75 / 100 * math.log(40) / 2))
    assert root_radius(100, 4, "fresh") == root_radius(100, 4, "shared")
    assert_close(inputs_radius(50, 2, 0.9), math.sqrt(math.log(20) / 100))
    low, high = defect_interval(0.64, 10_000, 2, "common", 0.9)
    t = math.sqrt(4 / 10_000 * math.log(20) / 2)
    assert_close(high, (0.8 + t) ** 2)
    assert_close(low, (0.8 - t - 0.01) ** 2)
    wide = defect_interval(0.64, 10_000, 2, "common", 0.8, inputs=500)
    assert_close(wide, (low - inputs_radius(500, 2, 0.9), min(1.0, high + inputs_radius(500, 2, 0.9))))
    assert defect_interval(0.0, 10, 2, "common")[0] == 0 and defect_interval(0.9, 3, 2, "common")[1] == 1.0
    assert defect_interval(0.3, 100, 2, "common", inputs=5)[0] == 0  # a defect is never negative
    assert_close(Estimate(1.0, 0.5).interval(), (1 - 0.5 * 1.959963984540054, 1 + 0.5 * 1.959963984540054))


@pytest.mark.parametrize("mode", ["common", "shared", "fresh"])
def test_draws_and_inputs_needed_are_the_first_that_suffice(mode):
    for accuracy, order in ((0.3, 2), (0.05, 4), (0.02, 8)):
        draws, share = draws_needed(accuracy, order, mode), (order - 1) / order
        width = [root_radius(T, order, mode) + math.sqrt(2 * share / T) for T in (draws, draws - 1)]
        assert width[0] <= accuracy < width[1]
        inputs = inputs_needed(accuracy, order)
        assert inputs_radius(inputs, order) <= accuracy < inputs_radius(inputs - 1, order)


@given(seeds, st.integers(2, 5), st.integers(2, 4), st.integers(2, 4), st.sampled_from(["common", "shared"]))
def test_bounded_differences(seed, draws, turns, classes, mode):
    """No change of one independent draw moves the root of the plug-in defect by more than the constants allow."""
    generator = seeded(seed)
    P = torch.eye(classes).double()[torch.randint(classes, (draws, 3, turns), generator=generator)]
    squares = 0.0
    for which in range(1 if mode == "common" else turns):
        worst = 0.0
        for _ in range(30):
            Q = P.clone()
            new = torch.eye(classes).double()[torch.randint(classes, (3, turns), generator=generator)]
            if mode == "common":
                Q[0] = new
            else:
                Q[0, :, which] = new[:, which]
            worst = max(worst, abs(math.sqrt(defect_plugin(P)) - math.sqrt(defect_plugin(Q))))
        squares += draws * worst**2
    share = (turns - 1) / turns
    assert squares <= {"common": 8, "shared": 4}[mode] * share / draws + exact64


@pytest.mark.parametrize("mode,constant", [("common", 8), ("shared", 4)])
def test_bounded_differences_are_attained(mode, constant):
    """From one corner to the opposite: the identity against all turns, one draw in all."""
    turns, ends = 4, torch.eye(2).double()
    P = ends[[0, 1, 1, 1]].expand(1, 1, 4, 2)  # d = e_2 - e_1 for every turn
    squares = 0.0
    for which in range(1 if mode == "common" else turns):
        base = torch.zeros(turns, 2, dtype=torch.float64)
        if mode == "common":
            change = 2 * (P[0, 0] - P[0, 0, :1])  # to the opposite corner
        else:
            change = base.clone()
            change[which] = ends[1] - ends[0]
            change = change - change[:1]
        squares += change.square().sum(-1).mean().item()
    assert_close(squares, constant * (turns - 1) / turns)


def coin_tosses(chance, draws, inputs, generator):
    """One-hot predictions (draws, inputs, turns, 2): one toss for each draw and turn, the same for all inputs."""
    heads = torch.rand(draws, 1, len(chance), generator=generator, dtype=torch.float64) < chance
    return torch.stack([heads, ~heads], -1).double().expand(-1, inputs, -1, -1)


@pytest.mark.parametrize("chance", [[0.5, 0.5], [0.9, 0.2, 0.6, 0.5]])
@pytest.mark.parametrize("draws", [4, 40])
def test_guaranteed_intervals_cover(chance, draws):
    chance, generator, repeats = torch.tensor(chance, dtype=torch.float64), seeded(3), 400
    truth = 2 * (chance - chance[0]).square().mean().item()
    for confidence in (0.5, 0.95):
        plugins = [defect_plugin(coin_tosses(chance, draws, 2, generator)) for _ in range(repeats)]
        inside = sum(low <= truth <= high for low, high in (
            defect_interval(value, draws, len(chance), "shared", confidence) for value in plugins)) / repeats
        assert inside >= confidence
        narrow = [defect_interval(value, draws, len(chance), "shared", confidence) for value in plugins]
        assert all(0 <= low <= high <= 2 * (len(chance) - 1) / len(chance) for low, high in narrow)


def test_the_root_of_a_plugin_defect_deviates_less_than_mcdiarmid_says():
    """The tail at several levels, for an adversary: a fair coin for each draw and turn."""
    chance, generator, draws = torch.full((2,), 0.5).double(), seeded(1), 20
    roots = torch.tensor([defect_plugin(coin_tosses(chance, draws, 1, generator)) for _ in range(2000)]).sqrt().double()
    for confidence in (0.05, 0.3, 0.6, 0.9):
        outside = (roots - roots.mean()).abs() > root_radius(draws, 2, "shared", confidence)
        assert outside.double().mean() <= 1 - confidence


def test_inputs_interval_covers_the_distribution_behind_the_inputs():
    generator, repeats, inputs = seeded(2), 1000, 25
    values = (torch.rand(repeats, inputs, generator=generator) < 0.5).double()  # defects 0 or 1: two classes, C2
    outside = (values.mean(1) - 0.5).abs() > inputs_radius(inputs, 2, 0.9)
    assert outside.double().mean() <= 0.1
    half = (values.mean(1) - 0.5).abs() > inputs_radius(inputs, 2, 0.9) / 2
    assert half.double().mean() > 0.1  # half of it would not do: the adversary is within a factor of two
    intervals = [defect_interval(value, 10**9, 2, "common", 0.9, inputs) for value in values.mean(1).tolist()]
    assert sum(low <= 0.5 <= high for low, high in intervals) / repeats >= 0.9


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_draws_and_inputs_share_the_error_probability(confidence):
    """Half of it for each: log(4 / (1 - confidence)) in both half-widths, for two turns and a draw mode by hand."""
    plugin, draws, inputs = 0.3, 4000, 50_000
    share, logarithm = 1 / 2, math.log(4 / (1 - confidence))
    t = math.sqrt(8 * share / draws * logarithm / 2)
    wider = 2 * share * math.sqrt(logarithm / (2 * inputs))
    found = defect_interval(plugin, draws, 2, "common", confidence, inputs)
    assert_close(found.low, (math.sqrt(plugin) - t - math.sqrt(2 * share / draws)) ** 2 - wider)
    assert_close(found.high, (math.sqrt(plugin) + t) ** 2 + wider)


def test_normal_interval_covers_what_it_says():
    generator, repeats = seeded(5), 2000
    samples = torch.randn(repeats, 200, generator=generator, dtype=torch.float64)
    errors = samples.std(1) / math.sqrt(200)
    for confidence in (0.5, 0.9):
        ends = [Estimate(m, e).interval(confidence) for m, e in zip(samples.mean(1).tolist(), errors.tolist())]
        inside = sum(low <= 0 <= high for low, high in ends) / repeats
        within_standard_errors(inside, confidence, math.sqrt(confidence * (1 - confidence) / repeats), standard_errors)


def test_meaningless_requests_are_refused():
    for call in (lambda c: root_radius(5, 2, "common", c), lambda c: inputs_radius(5, 2, c),
                 lambda c: Estimate(0.0, 1.0).interval(c)):
        for confidence in (0.0, 1.0, 95, math.nan):
            with pytest.raises(Refusal, match=f"a confidence between 0 and 1.*confidence={confidence}"):
                call(confidence)
    with pytest.raises(Refusal, match=r"a percentage.*Fix: confidence=0.95"):
        root_radius(5, 2, "common", 95)
    with pytest.raises(Refusal, match="common, shared, fresh"):
        root_radius(5, 2, "both")
    with pytest.raises(Refusal, match=r"number of draws.*draws=16"):
        root_radius(0, 2, "common")
    with pytest.raises(Refusal, match="at least 2 as the order of the group"):
        inputs_radius(5, 1)
    with pytest.raises(Refusal, match="number of inputs"):
        inputs_radius(0, 2)
    with pytest.raises(Refusal, match=r"the unbiased defect, which may be.*defect_plugin"):
        defect_interval(-0.1, 5, 2, "common")
    for needed in (lambda accuracy: draws_needed(accuracy, 2, "common"), lambda accuracy: inputs_needed(accuracy, 2)):
        for accuracy in (0.0, -1.0, math.inf):
            with pytest.raises(Refusal, match="accuracy above 0"):
                needed(accuracy)
