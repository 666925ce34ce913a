"""Parts of an entropy: by the definition of mutual information, for labels of inputs, of pixels, and yes or no."""
import math

import pytest
import torch
from torch import nn

from helpers import normal, seeded
from symbnn.equivariance.entropies import entropy_parts
from symbnn.equivariance.measures import uncertainties, variance_parts
from symbnn.equivariance.metrics import orbit_jensen_shannon
from symbnn.equivariance.predictions import OrbitOutputs, OrbitPredictions, orbit_outputs
from symbnn.equivariance.symmetric import bayesianize
from symbnn.errors import Refusal
from symbnn.posterior.likelihoods import Bernoulli, Categorical, Poisson
from symbnn.posterior.real_targets import Gaussian
from symbnn.symmetry.fields import field, rotations
from tolerances import assert_close

P = normal(5, 7, 4, 3).mul(2).softmax(-1)  # draws, inputs, turns, classes
PREDICTED = OrbitPredictions(P, (0, 1, 2, 3), "common")


def information(joint):
    """I(row; column) of a joint law, by the definition."""
    apart = joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)
    return (torch.special.xlogy(joint, joint) - torch.special.xlogy(joint, apart)).sum()


def by_definition(p):
    """Aleatoric, epistemic, orbit and total of one label, p (draws, turns, classes)."""
    draws, turns, _ = p.shape
    each = torch.stack([-(x * x.log()).sum() for x in p.flatten(0, 1)]).mean()
    within = torch.stack([information(p[:, g] / draws) for g in range(turns)]).mean()
    between = information(p.mean(0) / turns)
    mean = p.mean((0, 1))
    return each, within, between, -(mean * mean.log()).sum()


def test_the_parts_are_mutual_informations_and_add_up():
    parts = entropy_parts(PREDICTED)
    for i in range(7):
        expected = by_definition(P[:, i])
        assert_close(torch.stack([*(part[i] for part in parts), parts.total[i]]), torch.stack(expected))
        assert_close(sum(expected[:3]), expected[3])
    assert_close(parts.orbit.mean(), orbit_jensen_shannon(P))


@pytest.mark.parametrize("class_axis", [1, -1])
def test_labels_of_pixels_are_labels(class_axis):
    logits = P.log().reshape(5, 1, 7, 4, 3).permute(0, 1, 3, 4, 2)  # one input of seven pixels
    outputs = logits if class_axis == 1 else logits.movedim(3, -1)
    found = entropy_parts(OrbitOutputs(outputs, (0, 1, 2, 3), "common"), Categorical(class_axis=class_axis))
    for part, expected in zip(found, entropy_parts(PREDICTED)):
        assert_close(part, expected[None])


def test_yes_or_no_is_a_label_of_two_classes():
    logits = normal(5, 7, 4, 2)
    found = entropy_parts(OrbitOutputs(logits, (0, 1, 2, 3), "common"), Bernoulli())
    for output in range(2):
        p = logits[..., output].sigmoid()
        expected = entropy_parts(OrbitPredictions(torch.stack([1 - p, p], -1), (0, 1, 2, 3), "common"))
        for part, its in zip(found, expected):
            assert_close(part[:, output], its)


def test_what_each_part_is_zero_for():
    certain = torch.eye(3).double()[torch.randint(3, (5, 7, 4), generator=seeded())]
    assert entropy_parts(OrbitPredictions(certain, (0, 1, 2, 3), "common")).aleatoric.abs().max() == 0
    one_draw = entropy_parts(OrbitPredictions(P[:1], (0, 1, 2, 3), "common"))
    assert one_draw.epistemic.max() < 1e-15 < one_draw.orbit.min()
    even = P.mean(2, keepdim=True).expand_as(P).contiguous()
    averaged = entropy_parts(OrbitPredictions(even, (0, 1, 2, 3), "common"))
    assert averaged.orbit.max() < 1e-15
    assert_close(averaged.total, entropy_parts(PREDICTED).total)


def test_uncertainties_of_inputs_as_they_are():
    found, still = uncertainties(PREDICTED), entropy_parts(OrbitPredictions(P[:, :, :1], (0,), "common"))
    assert_close(found["total"], torch.special.entr(P[:, :, 0].mean(0)).sum(-1))
    assert_close(found["epistemic"], still.epistemic)
    assert_close(found["orbit"], entropy_parts(PREDICTED).orbit)
    assert list(uncertainties(OrbitPredictions(P[:1, :, :1], (0,), "common"))) == ["total"]


def test_uncertainties_of_fields_are_variances():
    turn = field(rotations(), (1, 4, 4))
    torch.manual_seed(0)
    pair = bayesianize(nn.Conv2d(1, 1, 3, padding=1).double(), turn, (1, 4, 4), output=turn)
    outputs = orbit_outputs(pair.network, normal(3, 1, 4, 4), pair.action, draws=6, generator=seeded())
    found = uncertainties(outputs, Gaussian(0.3))
    its = outputs.outputs[:, :, 0].flatten(2)
    assert_close(found["epistemic"], its.var(0, correction=0).mean(1))
    assert_close(found["total"], its.var(0, correction=0).mean(1) + 0.09)
    assert_close(found["orbit"].mean(), variance_parts(outputs, Gaussian(0.3)).orbit)


@pytest.mark.parametrize(("call", "said"), [
    (lambda: entropy_parts(P), "orbit_predictions"),
    (lambda: entropy_parts(OrbitOutputs(P, (0, 1, 2, 3), "common"), "labels"), "likelihood"),
    (lambda: entropy_parts(OrbitOutputs(P, (0, 1, 2, 3), "common"), Gaussian(0.1)), "variance_parts"),
    (lambda: entropy_parts(OrbitOutputs(P, (0, 1, 2, 3), "common"), Poisson()), "variance_parts"),
    (lambda: entropy_parts(OrbitOutputs(P * math.nan, (0, 1, 2, 3), "common")), "finite"),
])
def test_what_has_no_entropy_is_refused(call, said):
    with pytest.raises(Refusal, match=said):
        call()
