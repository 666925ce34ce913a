"""Evaluation with foreign data: scores that stay, detectors by their definition, and what is refused."""
import math

import pytest
import torch
from torch import nn

from helpers import normal, seeded
from symbnn.data.splits import Split
from symbnn.equivariance.detection import detection
from symbnn.equivariance.measures import uncertainties
from symbnn.equivariance.predictions import OrbitOutputs, orbit_outputs, orbit_predictions
from symbnn.equivariance.symmetric import bayesianize
from symbnn.errors import Refusal
from symbnn.posterior.likelihoods import Bernoulli, Categorical
from symbnn.posterior.real_targets import Gaussian
from symbnn.symmetry.fields import field, rotations
from symbnn.training.evaluation import evaluate

SHAPE = (1, 4, 4)
TURN = field(rotations(), SHAPE)
X, FAR = normal(12, *SHAPE, dtype=torch.float32), 5 * normal(9, *SHAPE, seed=1, dtype=torch.float32)


def task(name):
    """A pair, its likelihood and targets of twelve inputs."""
    torch.manual_seed(0)
    if name == "labels":
        pair = bayesianize(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), rotations(), SHAPE, scale=0.2)
        return pair, Categorical(), torch.arange(12) % 3
    channels = 2 if name == "pixels" else 1
    output = field(rotations(), (channels, 4, 4))
    pair = bayesianize(nn.Conv2d(1, channels, 3, padding=1), TURN, SHAPE, output=output, scale=0.2)
    if name == "pixels":
        return pair, Categorical(), (X[:, 0] > 0).long()
    return (pair, Gaussian(0.3), X) if name == "field" else (pair, Bernoulli(), (X > 0).float())


@pytest.mark.parametrize("name", ["labels", "pixels", "field", "yes or no"])
def test_foreign_data_add_detectors_and_change_nothing(name):
    pair, likelihood, targets = task(name)
    data, others = Split(X, targets), Split(FAR, targets[:9])
    alone = evaluate(pair, data, likelihood=likelihood, draws=6)
    both = evaluate(pair, data, likelihood=likelihood, draws=6, out_of_distribution=others)
    assert {key: both[key] for key in alone} == dict(alone)
    bare = evaluate(pair, data, likelihood=likelihood, draws=6, out_of_distribution=FAR)
    assert dict(bare) == dict(both)
    assert set(both) - set(alone) == {f"ood_{metric}_{reason}" for metric in ("auroc", "aupr", "fpr95")
                                      for reason in ("total", "epistemic", "orbit")}
    generator, over = seeded(), orbit_predictions if name == "labels" else orbit_outputs
    found = [uncertainties(over(pair.network, x, pair.action, 6, generator=generator), likelihood) for x in (X, FAR)]
    for reason in ("total", "epistemic", "orbit"):
        assert both[f"ood_auroc_{reason}"] == detection(found[0][reason], found[1][reason]).auroc
    assert "AUROC" in str(both) and "AUROC" not in str(alone)


def test_foreign_data_of_a_plain_function_have_one_uncertainty():
    found = evaluate(lambda x: x.flatten(1)[:, :3], Split(X, torch.arange(12) % 3),
                     out_of_distribution=Split(FAR, torch.zeros(9).long()))
    assert [key for key in found if key.startswith("ood_")] == ["ood_auroc_total", "ood_aupr_total", "ood_fpr95_total"]
    assert found["ood_auroc_total"] < 0.5  # larger logits are surer ones


def test_larger_inputs_of_a_linear_field_are_found_by_its_weights():
    """The variance over weights grows with the square of the input, the noise does not."""
    pair, likelihood, targets = task("field")
    found = evaluate(pair, Split(X, targets), likelihood=likelihood, out_of_distribution=(FAR, targets[:9]))
    assert found["ood_auroc_epistemic"] == 1 and found["ood_fpr95_epistemic"] == 0


def test_equal_uncertainties_tell_nothing():
    outputs = OrbitOutputs(torch.zeros(2, 5, 1, 1), (0,), "common")
    assert math.isclose(detection(*[uncertainties(outputs, Gaussian(0.5))["total"]] * 2).auroc, 0.5)


@pytest.mark.parametrize(("others", "said"), [
    (Split(torch.zeros(3, 1, 5, 5), torch.zeros(3).long()), "interpolate"), (3, "out of distribution"),
    (FAR[0, 0], "interpolate"), (FAR[:0], "or none"), (FAR * math.nan, "finite"), (FAR.double(), "float32"),
])
def test_what_is_no_foreign_data_is_refused(others, said):
    pair, likelihood, targets = task("labels")
    with pytest.raises(Refusal, match=said):
        evaluate(pair, Split(X, targets), likelihood=likelihood, out_of_distribution=others, draws=2)
