"""Ensembles under a group: operations on members, and the law of the defect against their number."""
import math

import pytest
import torch
from torch import nn

from helpers import seeded
from symbnn.equivariance.ensemble_orbits import (
    ensemble_defect,
    expand_members,
    orbit_ensemble,
    orbit_information,
    project_members,
    push_forward,
)
from symbnn.equivariance.metrics import defect_plugin, defect_unbiased
from symbnn.equivariance.predictions import Equivariance, OrbitOutputs, OrbitPredictions, orbit_outputs
from symbnn.errors import Refusal
from symbnn.posterior.ensembles import Ensemble
from symbnn.posterior.likelihoods import Poisson
from symbnn.posterior.real_targets import Gaussian
from symbnn.symmetry.actions import Action
from symbnn.symmetry.fields import field, rotations, rotations_and_flips
from symbnn.symmetry.networks import network_action
from tolerances import assert_close, exact64

X = torch.rand(5, 1, 6, 6, generator=seeded(), dtype=torch.float64)


def normed(seed):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1))
    network = network.double()
    network(torch.rand(16, 1, 6, 6).double())
    return network.eval()


TURN = field(rotations_and_flips(), (1, 6, 6))
ENSEMBLE = Ensemble([normed(seed) for seed in range(3)])
ACTION = network_action(ENSEMBLE[0], TURN, output=TURN)


@torch.no_grad()
def test_members_are_pushed_forward_exactly():
    for g in TURN.group.elements():
        moved = push_forward(ENSEMBLE, ACTION, g)
        assert_close(moved(TURN.act(g, X)), TURN.act(g, ENSEMBLE(X)), exact64)
    back = push_forward(push_forward(ENSEMBLE, ACTION, g), ACTION, TURN.group.inverse(g))
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), ENSEMBLE.state_dict().values()))


@pytest.mark.parametrize(("made", "count"), [
    (lambda: orbit_ensemble(ENSEMBLE, ACTION), 24), (lambda: project_members(ENSEMBLE, ACTION), 3),
    (lambda: expand_members(ENSEMBLE, ACTION), 3), (lambda: expand_members(ENSEMBLE, ACTION, "regular"), 3),
])
@torch.no_grad()
def test_what_makes_an_ensemble_equivariant(made, count):
    ensemble = made()
    assert len(ensemble) == count
    for g in TURN.group.elements():
        assert_close(ensemble(TURN.act(g, X)).mean(0), TURN.act(g, ensemble(X).mean(0)), exact64)
    before = ENSEMBLE(TURN.act(g, X)).mean(0) - TURN.act(g, ENSEMBLE(X).mean(0))
    assert before.abs().max() > 1e-3


@torch.no_grad()
def test_the_orbit_mixture_predicts_the_average_over_the_orbit():
    elements = TURN.group.elements()
    back = [TURN.act(TURN.group.inverse(g), ENSEMBLE(TURN.act(g, X)).mean(0)) for g in elements]
    expected = torch.stack(back).mean(0)
    assert_close(orbit_ensemble(ENSEMBLE, ACTION)(X).mean(0), expected, exact64)


def test_information_counts_coincidences():
    """log |G| where all are different; less where members are invariant, or images of each other."""
    assert orbit_information(ENSEMBLE, ACTION) == pytest.approx(math.log(8))
    one = Ensemble([normed(0), zeroed(normed(1))])  # one of two is invariant, to the bit
    assert orbit_information(one, ACTION) == pytest.approx(0.5 * math.log(8))
    images = Ensemble([*ENSEMBLE, *push_forward(ENSEMBLE, ACTION, TURN.group.elements()[3])])
    assert orbit_information(images, ACTION) == pytest.approx(math.log(8) + math.log(3) - math.log(6))


def zeroed(network):
    for parameter in network.parameters():
        nn.init.constant_(parameter, 0.5)
    return network


def linear_ensemble(count, generator, mean, deviation):
    weights = mean + deviation * torch.randn(count, 1, 4, generator=generator, dtype=torch.float64)
    template = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False)).double()
    return Ensemble.of_weights(template, {"1.weight": weights})


@pytest.mark.parametrize("favoured", [0.0, 0.4])
def test_the_law_of_the_defect(favoured):
    """Linear members whose moments are known: for 1, 3 and 50 members, from ensembles of 5."""
    generator, turn = seeded(1), field(rotations(), (1, 2, 2))
    inputs = torch.randn(3, 1, 2, 2, generator=generator, dtype=torch.float64)
    mean = favoured * torch.randn(1, 4, generator=generator, dtype=torch.float64)
    action = Equivariance(turn, Action.trivial(turn.group, (1,)))
    steps = torch.stack([turn.act(g, inputs) - inputs for g in turn.group.elements()], 1).flatten(2)
    b = (steps @ mean[0]).square().mean().item()
    spread = 0.25 * steps.square().sum(-1).mean().item()
    found = [orbit_outputs(linear_ensemble(5, generator, mean, 0.5), inputs, action) for _ in range(150)]
    for members in (1, 3, 50):
        values = torch.tensor([ensemble_defect(one, members).value for one in found])
        truth, error = b + spread / members, values.std().item() / 150**0.5
        assert abs(values.mean().item() - truth) < 4 * error
    large = [orbit_outputs(linear_ensemble(50, generator, mean, 0.5), inputs, action) for _ in range(100)]
    means = [one.outputs.mean(0) for one in large]
    plug_in = torch.tensor([(mean - mean[:, :1]).square().sum(-1).mean() for mean in means])
    assert abs(plug_in.mean() - (b + spread / 50)) < 4 * plug_in.std() / 10


def random_predictions(members=6):
    logits = torch.randn(members, 4, 4, 3, generator=seeded(), dtype=torch.float64)
    return OrbitPredictions(logits.softmax(-1), rotations().group.elements(), "common")


def test_it_joins_the_known_estimates():
    """For as many members as there are it is the plug-in defect, for ever more the unbiased one, with its error."""
    predictions = random_predictions()
    assert ensemble_defect(predictions, 6).value == pytest.approx(defect_plugin(predictions.probabilities), rel=1e-12)
    limit, known = ensemble_defect(predictions, 2 * 10**9), defect_unbiased(predictions.probabilities)
    assert limit.value == pytest.approx(known.value, rel=1e-6)
    assert limit.standard_error == pytest.approx(known.standard_error, rel=1e-6)
    squares = ensemble_defect(predictions, 1, invariant_law=True)
    assert squares.value == pytest.approx(ensemble_defect(predictions, 1).value, rel=1e-12)
    assert ensemble_defect(predictions, 4, invariant_law=True).value == pytest.approx(squares.value / 4, rel=1e-12)


def test_outputs_are_read_by_a_likelihood():
    outputs = OrbitOutputs(torch.randn(5, 3, 4, 2, generator=seeded()).double(), rotations().group.elements(), "common")
    plain, same = ensemble_defect(outputs, 2), ensemble_defect(outputs, 2, Gaussian(0.1))
    assert plain == same
    rates = OrbitOutputs(outputs.outputs.exp(), outputs.elements, "common")
    assert ensemble_defect(outputs, 2, Poisson()).value == pytest.approx(ensemble_defect(rates, 2).value, rel=1e-6)


@pytest.mark.parametrize(("call", "said"), [
    (lambda: push_forward(ENSEMBLE[0], ACTION, 1), "Ensemble"),
    (lambda: push_forward([ENSEMBLE[0]], ACTION, 1), "list"),
    (lambda: orbit_ensemble(ENSEMBLE, TURN), "network_action"),
    (lambda: project_members(Ensemble([nn.Linear(2, 2)]), ACTION), "derived for another network"),
    (lambda: orbit_information(Ensemble([nn.Linear(2, 2)]), ACTION), "derived for another network"),
    (lambda: expand_members(Ensemble([nn.Linear(2, 2)]), ACTION), "derived for another network"),
    (lambda: ensemble_defect(random_predictions(2), 3), "three members"),
    (lambda: ensemble_defect(random_predictions(), 0), "members=10"),
    (lambda: ensemble_defect(random_predictions(), 2, Gaussian(0.1)), "no likelihood"),
    (lambda: ensemble_defect(random_predictions().probabilities, 2), "orbit_predictions"),
])
def test_refusals(call, said):
    with pytest.raises(Refusal, match=said):
        call()
