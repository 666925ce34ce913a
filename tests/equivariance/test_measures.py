"""Measures of regressions, fields and segmentations: against truth, against definitions, and what is refused."""
import math

import pytest
import torch
from torch import nn

from helpers import seeded
from symbnn.data.sources import load
from symbnn.equivariance.calibration import interval_error
from symbnn.equivariance.measures import crps, output_defect, summarize_outputs, variance_parts
from symbnn.equivariance.metrics import summarize
from symbnn.equivariance.predictions import Equivariance, OrbitOutputs, OrbitPredictions, orbit_outputs
from symbnn.equivariance.symmetric import bayesianize
from symbnn.errors import Refusal
from symbnn.posterior.layers import posterior_mean_network
from symbnn.posterior.likelihoods import Bernoulli, Categorical, Poisson
from symbnn.posterior.real_targets import Gaussian, HeteroscedasticGaussian, StudentT, heteroscedastic_action
from symbnn.symmetry.actions import Action, natural_action
from symbnn.symmetry.fields import field, point_symmetries, rotations
from symbnn.symmetry.groups import Cyclic
from symbnn.training.evaluation import evaluate
from symbnn.training.loop import train
from tolerances import assert_close, within_standard_errors

SHAPE = (1, 4, 4)
TURN = field(rotations(), SHAPE)


def vectors():
    space = point_symmetries(2)
    return field(space, SHAPE), field(space, (2, 4, 4), natural_action(space.group)), 2, Gaussian(0.3)


def told():
    return TURN, heteroscedastic_action(TURN), 2, HeteroscedasticGaussian()


TASKS = {  # actions on inputs and outputs, channels of the outputs, likelihood
    "gaussian": lambda: (TURN, TURN, 1, Gaussian(0.3)), "vectors": vectors, "two outputs": told,
    "student": lambda: (TURN, TURN, 1, StudentT(0.3)),
    "pixels": lambda: (TURN, field(rotations(), (3, 4, 4)), 3, Categorical()),
    "bernoulli": lambda: (TURN, TURN, 1, Bernoulli()), "poisson": lambda: (TURN, TURN, 1, Poisson()),
}


def made(name):
    turn, output, channels, likelihood = TASKS[name]()
    torch.manual_seed(0)
    pair = bayesianize(nn.Conv2d(1, channels, 3, padding=1).double(), turn, SHAPE, output=output)
    return pair, likelihood, torch.randn(2, *SHAPE, generator=seeded(), dtype=torch.float64)


@pytest.mark.parametrize("name", TASKS)
def test_the_unbiased_defect_covers_its_truth_at_the_nominal_rate(name):
    pair, likelihood, x = made(name)
    many = orbit_outputs(pair.network, x, pair.action, draws=20_000, generator=seeded(99))
    truth, error = output_defect(many, likelihood)
    inside, repetitions = 0, 500
    for seed in range(repetitions):
        found = orbit_outputs(pair.network, x, pair.action, draws=48, generator=seeded(seed))
        estimate = output_defect(found, likelihood)
        inside += abs(estimate.value - truth) <= 1.96 * math.hypot(estimate.standard_error, error)
    within_standard_errors(torch.tensor(inside / repetitions), 0.95, math.sqrt(0.95 * 0.05 / repetitions))


@pytest.mark.parametrize("name", TASKS)
def test_the_parts_of_the_variance_add_up_to_that_of_the_mixture(name):
    pair, likelihood, x = made(name)
    found = orbit_outputs(pair.network, x, pair.action, draws=5, generator=seeded())
    flat = found.outputs.transpose(1, 2).flatten(0, 1)  # draws and elements together
    means, variances = likelihood.mean(flat), likelihood.variance(flat)
    total = (variances + means.square()).mean(0) - means.mean(0).square()
    parts = variance_parts(found, likelihood)
    assert_close(torch.tensor(parts.total, dtype=torch.float64), total.mean())
    assert min(parts) >= 0 and parts.orbit > 0


def test_an_average_over_the_group_has_no_orbit_part_and_no_defect():
    pair, likelihood, x = made("vectors")
    found = orbit_outputs(pair.network, x, pair.action, draws=4, generator=seeded()).outputs
    averaged = found.mean(2, keepdim=True).expand_as(found).contiguous()
    still = OrbitOutputs(averaged, pair.action.group.elements(), "common")
    assert abs(output_defect(still, likelihood).value) < 1e-15 and variance_parts(still, likelihood).orbit < 1e-15


def test_the_score_of_a_mixture_is_its_definition():
    mean = torch.randn(3, 2, 1, generator=seeded()).double()
    scale = 0.2 + torch.rand(3, 2, 1, generator=seeded(1)).double()
    y = torch.randn(2, 1, generator=seeded(2)).double()
    mixture = torch.distributions.Normal(mean, scale)
    grid = torch.linspace(-12, 12, 240_001, dtype=torch.float64)
    for i in range(2):
        below = torch.distributions.Normal(mean[:, i], scale[:, i]).cdf(grid).mean(0)
        expected = torch.trapezoid((below - (grid >= y[i]).double()).square(), grid)
        assert_close(crps(mixture, y)[i, 0], expected, 1e-4)  # of a step on the grid
    sure = torch.distributions.Normal(mean[:1], torch.full_like(mean[:1], 1e-12))
    assert_close(crps(sure, y), (y - mean[0]).abs(), 1e-10)


@pytest.mark.parametrize("likelihood", [Gaussian(0.7), StudentT(0.7), HeteroscedasticGaussian()], ids=repr)
def test_intervals_of_the_right_predictive_cover_what_they_say(likelihood):
    n = 20_000
    outputs = torch.randn(8, 1, 2, generator=seeded()).double().expand(8, n, 2)
    outputs = outputs if isinstance(likelihood, HeteroscedasticGaussian) else outputs[..., :1]
    torch.manual_seed(1)
    drawn = likelihood.distribution(outputs).sample()[torch.randint(8, (n,)), torch.arange(n)]
    still = OrbitOutputs(outputs[:, :, None], (0,), "common")
    scores = summarize_outputs(still, drawn, likelihood)
    for level in (0.5, 0.9):
        share = torch.tensor(scores[f"coverage_{100 * level:.0f}"])
        within_standard_errors(share, level, math.sqrt(level * (1 - level) / n))
    assert "defect_unbiased" not in scores and abs(scores["rmse"] / scores["predictive_sd"] - 1) < 0.05


def test_missing_targets_and_ignored_labels_are_left_out():
    outputs = torch.randn(3, 4, 1, 2, generator=seeded()).double()
    y = torch.randn(4, 2, generator=seeded(1)).double()
    y[0, 1] = y[2] = float("nan")
    errors = (outputs[:, :, 0].mean(0) - y)[~y.isnan()]
    still = OrbitOutputs(outputs, (0,), "common")
    assert math.isclose(summarize_outputs(still, y, Gaussian(0.3, nan_is_missing=True))["rmse"],
                        errors.square().mean().sqrt().item())
    pixels = OrbitOutputs(torch.randn(3, 4, 1, 3, 5, 5, generator=seeded()), (0,), "common")
    predicted = pixels.outputs[:, :, 0].softmax(2).mean(0).argmax(1)
    labels = torch.randint(0, 3, (4, 5, 5), generator=seeded(3))
    labels[:, 0] = -1
    scores = summarize_outputs(pixels, labels, Categorical(-1))
    known = labels >= 0
    assert math.isclose(scores["accuracy"], (predicted == labels)[known].double().mean().item())
    unions = [(((predicted == c) & (labels == c))[known].sum() / ((predicted == c) | (labels == c))[known].sum()).item()
              for c in range(3)]
    assert math.isclose(scores["mean_iou"], sum(unions) / 3, rel_tol=1e-6)


@pytest.mark.parametrize("name", ["gaussian", "vectors", "student"])
def test_the_defect_of_a_linear_network_is_that_of_its_mean_weights(name):
    """Its mean prediction is known: turned inputs, turned back by hand, through the plain network at the means."""
    pair, likelihood, x = made(name)
    plain, action = posterior_mean_network(pair.network), pair.action
    with torch.no_grad():
        defects = [action.output.act(action.group.inverse(g), plain(action.input.act(g, x))) - plain(x)
                   for g in action.group.elements()]
    exact = torch.stack(defects).square().flatten(2).sum(-1).mean()
    estimate = output_defect(orbit_outputs(pair.network, x, action, draws=2000, generator=seeded()), likelihood)
    within_standard_errors(torch.tensor(estimate.value), exact, estimate.standard_error)


def test_an_expanded_vector_field_is_equivariant():
    """Under the symmetries of the square: at the mean weights to rounding, its predictive within standard errors."""
    data, space = load("flow", train_size=64, dtype=torch.float64), point_symmetries(2)
    turn, flow = field(space, data.shape), field(space, (2, 16, 16), natural_action(space.group))
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 3, 3, padding=1, padding_mode="circular"), nn.Tanh(),
              nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"))
    pair = bayesianize(nn.Sequential(*layers).double(), turn, data.shape, output=flow)
    train(pair, data.train, epochs=3, learning_rate=0.01, likelihood=Gaussian(0.3), batch_size=64, dtype="float64")
    wide, x = pair.expand("block_diagonal"), data.test.inputs[:4]
    plain = posterior_mean_network(wide.network)
    with torch.no_grad():
        for g in space.group.generators():
            assert_close(plain(turn.act(g, x)), flow.act(g, plain(x)))
    small, large = (
        output_defect(orbit_outputs(its.network, x, its.action, draws=16, generator=seeded()), Gaussian(0.3))
        for its in (pair, wide))
    assert abs(large.value) <= 4 * large.standard_error and small.value > 4 * small.standard_error
    scores = evaluate(pair, data.test, likelihood=Gaussian(0.3), draws=4)
    assert {"rmse", "crps", "orbit", "defect_unbiased"} <= set(scores) and "RMSE" in str(scores)


def test_cauchy_noise_has_no_mean_to_measure():
    pair, _, x = made("student")
    found = orbit_outputs(pair.network, x, pair.action, draws=4, generator=seeded())
    with pytest.raises(Refusal, match="one degree of freedom"):
        summarize_outputs(found, x, StudentT(0.3, df=1.0))


@pytest.mark.parametrize(("call", "said"), [
    (lambda found: summarize_outputs(found, torch.zeros(3, *SHAPE), Gaussian(0.3)), "2 targets"),
    (lambda found: summarize_outputs(found, torch.zeros(2, 2, 4, 4), Gaussian(0.3)), "shape"),
    (lambda found: summarize_outputs(found.outputs, torch.zeros(2, *SHAPE), Gaussian(0.3)), "orbit_outputs"),
    (lambda found: summarize_outputs(found, torch.zeros(2, *SHAPE), "gaussian"), "likelihood"),
    (lambda found: output_defect(OrbitOutputs(found.outputs[:2], found.elements, "common"), Gaussian(0.3)),
     "three draws"),
    (lambda found: output_defect(OrbitOutputs(found.outputs[:, :, :1], (0,), "common"), Gaussian(0.3)), "1 elements"),
])
def test_what_cannot_be_measured_is_refused(call, said):
    pair, _, x = made("gaussian")
    with pytest.raises(Refusal, match=said):
        call(orbit_outputs(pair.network, x, pair.action, draws=4, generator=seeded()))


def test_outputs_of_another_shape_than_the_action_are_refused():
    still = Action.trivial(Cyclic(4), (5,))
    with pytest.raises(Refusal, match="real outputs of shape"):
        orbit_outputs(nn.Conv2d(1, 1, 3, padding=1), torch.randn(2, *SHAPE), Equivariance(TURN, still))


def test_labels_of_pixels_have_the_scores_of_labels():
    """Calibration, risk-coverage and entropies of the known pixels, as if each were an input."""
    outputs = torch.randn(3, 4, 1, 3, 5, 5, generator=seeded()).double()
    labels = torch.randint(0, 3, (4, 5, 5), generator=seeded(3))
    labels[:, 0] = -1
    known = labels >= 0
    scores = summarize_outputs(OrbitOutputs(outputs, (0,), "common"), labels, Categorical(-1))
    P = outputs[:, :, 0].softmax(2).movedim(2, -1)[:, known][:, :, None]
    as_inputs = summarize(OrbitPredictions(P, (0,), "common"), labels[known])
    for name in ("accuracy", "ece", "adaptive_ece", "aurc", "entropy_nats", "mutual_information_nats"):
        assert math.isclose(scores[name], as_inputs[name], rel_tol=1e-12), name


def test_yes_or_no_has_the_scores_of_two_classes():
    outputs, labels = torch.randn(3, 9, 1, 1, generator=seeded()).double(), torch.arange(9)[:, None] % 2
    scores = summarize_outputs(OrbitOutputs(outputs, (0,), "common"), labels.double(), Bernoulli())
    p = outputs.sigmoid()
    as_inputs = summarize(OrbitPredictions(torch.cat([1 - p, p], -1), (0,), "common"), labels[:, 0])
    for name in ("accuracy", "nll_nats", "ece", "adaptive_ece", "aurc", "entropy_nats", "mutual_information_nats"):
        assert math.isclose(scores[name], as_inputs[name], rel_tol=1e-12), name


def test_the_interval_error_is_that_of_the_places():
    outputs, y = torch.zeros(1, 400, 1, 1), torch.randn(400, 1, generator=seeded()).double()
    right, narrow = (summarize_outputs(OrbitOutputs(outputs, (0,), "common"), y, Gaussian(scale))["interval_error"]
                     for scale in (1.0, 0.01))
    places = (2 * torch.distributions.Normal(0.0, 1.0).cdf(y) - 1).abs().flatten()
    assert math.isclose(right, interval_error(places), rel_tol=1e-9) and right < 4 / math.sqrt(400) and narrow > 0.45
