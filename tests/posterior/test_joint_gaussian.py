"""One Gaussian over all tensors of a network: its moments, its moves, and what it refuses."""
import pytest
import torch
from torch import nn

from helpers import normal, seeded
from symbnn.equivariance.averages import average
from symbnn.equivariance.predictions import orbit_outputs
from symbnn.errors import Refusal
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.joint_gaussian import JointGaussian
from symbnn.posterior.layers import posterior_mean_network, variational_tensors, with_posteriors
from symbnn.posterior.point_mass import PointMass
from symbnn.posterior.sampling import predict
from symbnn.symmetry.actions import natural_action
from symbnn.symmetry.groups import Permutations
from symbnn.symmetry.networks import network_action
from tolerances import assert_close, within_standard_errors


def network():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    return with_posteriors(plain, PointMass)


def joint(names=("0.weight", "2.weight")):
    of = network()
    size = sum(variational_tensors(of)[name].numel() for name in names)
    root = 0.3 * normal(size, size, seed=1).tril(-1) + normal(size, seed=2).exp().diag()
    return JointGaussian(of, names, FullGaussian(normal(size, seed=3), root))


def test_draws_have_the_covariance_and_leave_other_tensors_alone():
    q = joint()
    weights = {name: value.detach() for name, value in q.sample(100_000, seeded(0)).items()}
    assert list(weights) == list(variational_tensors(q.network))
    assert torch.equal(weights["0.bias"][7], variational_tensors(q.network)["0.bias"].posterior.mean)
    centred = q.joined(weights) - q.law.mean
    products = centred[:, :, None] * centred[:, None]
    root = q.law.scale_tril.detach()
    within_standard_errors(products.mean(0), root @ root.T, products.std(0) / len(products) ** 0.5)


def test_predictions_are_those_of_its_draws():
    q, x = joint(), normal(4, 3, seed=5)
    weights = {name: value.detach() for name, value in q.sample(6, seeded(1)).items()}
    expected = predict(q.network, x, weights=weights)
    assert_close(q.predict(x, draws=6, generator=seeded(1)), expected)
    members = q.members(6, seeded(1))
    assert_close(torch.stack([member(x) for member in members]), expected)
    exchange = network_action(q.network, natural_action(Permutations(3)))
    assert orbit_outputs(members, x, exchange).outputs.shape == (6, 4, 6, 1)


def test_moved_weights_have_the_moved_law_and_an_average_is_invariant():
    q = joint()
    exchange = network_action(q.network, natural_action(Permutations(3)))
    weights = q.sample(5, seeded(2))
    for g in exchange.group.generators():
        moved = {name: exchange.parameters[name].act(g, value) for name, value in weights.items()}
        assert_close(q.push_forward(exchange, g).log_prob(moved), q.log_prob(weights))
    assert not q.is_invariant_under(exchange)
    other = with_posteriors(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double())
    with pytest.raises(Refusal, match="derived from this very network"):
        q.push_forward(network_action(other, natural_action(Permutations(3))), exchange.group.identity())
    for kind in ("geometric", "arithmetic", "projection"):
        law = average(q.law, q.action(exchange), kind)
        found = JointGaussian(q.network, q.names, law)
        assert found.is_invariant_under(exchange)
    other = with_posteriors(posterior_mean_network(q.network), PointMass)
    variational_tensors(other)["0.weight"].posterior.loc.data.normal_()
    rest = ("0.bias", "2.weight", "2.bias")
    sizes = sum(variational_tensors(other)[name].numel() for name in rest)
    still = JointGaussian(other, rest, FullGaussian.initial(torch.zeros(sizes).double(), 1.0))
    assert not still.is_invariant_under(exchange)  # its own tensors are not moved; the weights beside them are


def test_marginals_are_blocks_of_the_covariance():
    q = joint()
    tensors, root = variational_tensors(q.marginals()), q.law.scale_tril.detach()
    whole = root @ root.T
    for name, place in (("0.weight", slice(0, 6)), ("2.weight", slice(6, 8))):
        part = tensors[name].posterior.scale_tril
        assert_close(part @ part.T, whole[place, place])
    assert isinstance(tensors["0.bias"].posterior, PointMass)


@pytest.mark.parametrize("names, size, message", [
    (("0.weight", "9.weight"), 8, "names of tensors"), ((), 0, "names of tensors"),
    (("0.weight", "0.weight"), 12, "each once"), (("0.weight",), 5, "a law of the 6 weights"),
])
def test_what_does_not_fit_is_refused(names, size, message):
    with pytest.raises(Refusal, match=message):
        JointGaussian(network(), names, FullGaussian.initial(torch.zeros(size or 1).double(), 1.0))
    with pytest.raises(Refusal, match="law of the weights"):
        JointGaussian(network(), ("0.weight",), PointMass(torch.zeros(6)))
