"""The densities of units under the laws of units: against the families' own, permutation by permutation."""
import itertools
import math

import pytest
import torch
from torch import nn

from helpers import seeded
from helpers_hidden_units import moved_density, permuted, two_layers
from symbnn.hidden_units.modes import unit_coordinates
from symbnn.hidden_units.mutual_information import mutual_information
from symbnn.hidden_units.unit_densities import unit_log_densities
from symbnn.posterior.block_gaussian import BlockGaussian
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.layers import variational_tensors, with_posteriors
from symbnn.posterior.log_normal import LogNormal
from symbnn.posterior.priors import isotropic
from symbnn.posterior.sampling import sample_weights
from symbnn.symmetry.networks import unit_permutations
from tolerances import assert_close


def one_hidden(kind):
    torch.manual_seed(0)
    if kind == "convolutional":
        plain = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 9, 2))
        return plain, (1, 4, 4)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)), (3,)


@pytest.mark.parametrize("family", (MeanFieldGaussian, Laplace, LogNormal, BlockGaussian))
@pytest.mark.parametrize("kind", ("linear", "convolutional"))
def test_density_matrix_gives_the_density_of_every_permutation(family, kind):
    plain, shape = one_hidden(kind)
    network = with_posteriors(plain.double(), family, scale=0.4, prior=isotropic(1.0))
    if family is LogNormal:
        with torch.no_grad():
            for tensor in variational_tensors(network).values():
                tensor.posterior.mask.fill_(1)
    action = unit_permutations(network, shape)
    weights = sample_weights(network, 3, seeded())
    (hidden,) = (name for name in action.channels if name not in ("input", "output"))
    coordinates = unit_coordinates(action, hidden)
    log_a = unit_log_densities(network, weights, coordinates)
    own = moved_density(network, action, weights, action.group.identity())
    others = sum(tensor.posterior.log_prob(weights[name]) for name, tensor in variational_tensors(network).items()
                 if name not in coordinates)
    assert_close(log_a.diagonal(0, -2, -1).sum(-1) + others, own, 1e-10)
    if family is not BlockGaussian:  # each entry: the law of unit k at the weights of unit j
        laws = {name: variational_tensors(network)[name].posterior for name in coordinates}
        for j, k in itertools.product(range(3), repeat=2):
            entry = sum(laws[name].marginal(at[k]).log_prob(weights[name].flatten(1)[:, at[j]])
                        for name, at in coordinates.items())
            assert_close(log_a[:, j, k], entry, 1e-10)
    for images in itertools.permutations(range(3)):
        expected = moved_density(network, action, weights, (images,)) - own
        found = log_a[:, torch.arange(3), list(images)].sum(-1) - log_a.diagonal(0, -2, -1).sum(-1)
        assert_close(found, expected, 1e-10)


def test_log_normal_units_of_other_signs_have_no_density():
    network = two_layers(units=3, family=LogNormal)
    with torch.no_grad():
        mask = variational_tensors(network)["0.weight"].posterior.mask
        mask.fill_(1)
        variational_tensors(network)["0.bias"].posterior.mask.fill_(1)
        variational_tensors(network)["2.weight"].posterior.mask.fill_(1)
        mask[2, 1] = -1
    action = permuted(network)
    log_a = unit_log_densities(network, sample_weights(network, 2, seeded()), unit_coordinates(action, "0"))
    finite = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    assert torch.equal(log_a.isfinite(), finite.expand(2, 3, 3))
    for method in ("permanent", "bethe", "capacity"):
        found = mutual_information(network, action, method, draws=50, generator=seeded())
        assert math.isfinite(found.value) and found.value >= math.log(3) - 0.8 * (method == "capacity")


def test_laplace_in_pieces(monkeypatch):
    network = two_layers(units=4, family=Laplace)
    weights, coordinates = sample_weights(network, 3, seeded()), unit_coordinates(permuted(network), "0")
    whole = unit_log_densities(network, weights, coordinates)
    monkeypatch.setattr("symbnn.hidden_units.unit_densities._PIECE", 1)
    assert_close(unit_log_densities(network, weights, coordinates), whole)
