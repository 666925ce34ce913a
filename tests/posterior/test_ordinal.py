"""Ordered levels: probabilities against differences of sigmoids, learned thresholds, measures, and refusals."""
import pytest
import torch
from torch import nn

from helpers import seeded
from symbnn.equivariance.entropies import entropy_parts
from symbnn.equivariance.measures import summarize_outputs
from symbnn.equivariance.predictions import OrbitOutputs
from symbnn.equivariance.symmetric import bayesianize
from symbnn.errors import Refusal
from symbnn.posterior.ordinal import Ordinal
from symbnn.symmetry.actions import natural_action
from symbnn.symmetry.fields import field, rotations
from symbnn.symmetry.hyperoctahedral import Signed
from symbnn.training.loop import train
from tolerances import assert_close

CUTS = [-1.0, 0.5, 2.0]


def probabilities(outputs, cuts=CUTS):
    below = torch.sigmoid(torch.as_tensor(cuts, dtype=outputs.dtype) - outputs[..., None])
    ends = torch.zeros_like(below[..., :1])
    return torch.cat([ends, below, ends + 1], -1).diff(dim=-1)


@pytest.mark.parametrize("shape", [(1,), (2, 3)], ids=str)
def test_levels_have_the_probabilities_between_thresholds(shape):
    outputs = torch.randn(3, 5, *shape, generator=seeded(), dtype=torch.float64)
    levels = torch.randint(4, (5, *shape), generator=seeded(1))
    its, expected = Ordinal(4, CUTS).double(), probabilities(outputs)
    assert_close(its.distribution(outputs).probs, expected, 1e-7)  # thresholds are kept as single numbers
    each = expected.gather(-1, levels.expand(3, *levels.shape)[..., None])[..., 0].log()
    assert_close(its.log_prob(outputs, levels), each.flatten(2).sum(-1), 1e-6)
    numbers = torch.arange(4.0, dtype=torch.float64)
    mean = (expected * numbers).sum(-1)
    assert_close(its.mean(outputs), mean, 1e-6)
    assert_close(its.variance(outputs), (expected * (numbers - mean[..., None]).square()).sum(-1), 1e-6)


def test_two_levels_are_yes_or_no():
    outputs = torch.randn(2, 6, 1, generator=seeded())
    targets = torch.tensor([0, 1, 1, 0, 1, 0])[:, None]
    expected = torch.distributions.Bernoulli(logits=outputs).log_prob(targets.float())[..., 0]
    torch.testing.assert_close(Ordinal(2).log_prob(outputs, targets), expected)


def test_the_start_makes_all_levels_equally_probable():
    found = Ordinal(7).distribution(torch.zeros(1, 1, 1)).probs
    torch.testing.assert_close(found, torch.full_like(found, 1 / 7))


def test_thresholds_stay_in_order_and_reach_the_shares_of_the_levels():
    """Without inputs the best thresholds are the logits of the shares of levels below them."""
    levels = torch.tensor([0] * 50 + [1] * 10 + [2] * 25 + [3] * 15)[:, None]
    its = Ordinal(4)
    climb = torch.optim.Adam(its.parameters(), lr=0.5, maximize=True)
    for rate in (0.5, 0.01):
        climb.param_groups[0]["lr"] = rate
        for _ in range(500):
            climb.zero_grad()
            its.mean_log_likelihood(torch.zeros(1, 100, 1), levels).backward()
            climb.step()
            assert (its.thresholds.diff() > 0).all()
    torch.testing.assert_close(its.thresholds.detach(), torch.tensor([0.5, 0.6, 0.85]).logit(), rtol=1e-3, atol=1e-3)


def test_thresholds_are_trained_with_a_network_unless_they_are_fixed():
    x = torch.randn(200, 1, generator=seeded())
    noise = torch.rand(200, 1, generator=seeded(1)).logit()
    levels = torch.bucketize(3 * x + noise, torch.tensor([-2.0, 0.0, 4.0]))
    kept = {}
    for learn in (True, False):
        its, network = Ordinal(4, learn=learn), bayesianize(nn.Linear(1, 1))
        train(network, (x, levels), epochs=100, batch_size=50, learning_rate=0.03, likelihood=its, augmentation="none")
        kept[learn] = its.thresholds.detach()
    torch.testing.assert_close(kept[False], Ordinal(4).thresholds.detach())
    gaps = kept[True].diff()
    assert 1.2 < gaps[1] / gaps[0] < 3.5  # true: 2


def test_measures_of_levels():
    outputs = torch.randn(4, 30, 2, 1, generator=seeded(), dtype=torch.float64)
    levels = torch.randint(4, (30, 1), generator=seeded(1))
    its, found = Ordinal(4, CUTS), OrbitOutputs(outputs, (0, 1), "common")
    scores = summarize_outputs(found, levels, its)
    mean = probabilities(outputs[:, :, 0]).mean(0)[:, 0]
    assert scores["nll_nats"] == pytest.approx(-mean.gather(1, levels).log().mean().item(), rel=1e-6)
    assert scores["accuracy"] == (mean.argmax(1) == levels[:, 0]).double().mean().item()
    expected = (mean @ torch.arange(4.0, dtype=torch.float64) - levels[:, 0])
    assert scores["mae"] == pytest.approx(expected.abs().mean().item(), rel=1e-6)
    assert scores["rmse"] == pytest.approx(expected.square().mean().sqrt().item(), rel=1e-6)
    assert scores["entropy_nats"] == pytest.approx(-(mean * mean.log()).sum(1).mean().item(), rel=1e-6)
    assert {"aleatoric", "epistemic", "orbit", "defect_unbiased"} <= scores.keys()
    assert entropy_parts(found, its).orbit.shape == (30, 1)


def test_levels_move_with_their_places_and_signs_are_refused():
    turn = field(rotations(), (1, 4, 4))
    levels = torch.randint(3, (5, 1, 4, 4), generator=seeded())
    moved = Ordinal(3).move(turn, 1, levels)
    assert torch.equal(moved, turn.act(1, levels)) and moved.dtype == levels.dtype
    with pytest.raises(Refusal, match="changes signs"):
        Ordinal(3).check_moves(natural_action(Signed(2)))


@pytest.mark.parametrize("make", [
    lambda: Ordinal(1), lambda: Ordinal(2.5), lambda: Ordinal(3, [0.0]), lambda: Ordinal(3, [1.0, 1.0]),
    lambda: Ordinal(3, [0.0, float("inf")]),
])
def test_what_is_no_scale_of_levels_is_refused(make):
    with pytest.raises(Refusal, match="levels"):
        make()


@pytest.mark.parametrize("targets, fix", [
    (torch.tensor([[1], [3]]), r"Ordinal\(4\)"), (torch.tensor([[-1], [0]]), "targets - 1"),
    (torch.tensor([[0.5], [1.0]]), "levels"), (torch.tensor([[float("nan")], [1.0]]), "levels"),
    (torch.tensor([1, 2]), r"targets\[:, None\]"),
], ids=str)
def test_targets_that_are_no_levels_are_refused(targets, fix):
    with pytest.raises(Refusal, match=fix):
        Ordinal(3).check_targets(targets, (1,))
    with pytest.raises(Refusal):
        Ordinal(3).log_prob(torch.zeros(1, 2, 1), targets)


def test_it_says_how_it_was_made():
    assert Ordinal(5).described() == "Ordinal(5)"
    assert Ordinal(3, [0.0, 1.0], learn=False).described() == "Ordinal(3, thresholds=[0.0, 1.0], learn=False)"
