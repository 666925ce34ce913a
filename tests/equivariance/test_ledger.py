"""The ledger has every number, and its standard error is that of the measured error."""

import math

import pytest
import torch
from torch import nn

from helpers import normal, seeded
from helpers_equivariance import classifier
from symbnn.equivariance.bounds import push_forward_divergences
from symbnn.equivariance.coupled import coupled_bound
from symbnn.equivariance.ledger import ledger
from symbnn.equivariance.lipschitz import through_lipschitz
from symbnn.equivariance.predictions import orbit_predictions
from symbnn.equivariance.prior_costs import prior_gradient_gap
from symbnn.errors import Refusal
from symbnn.estimates import Estimate
from symbnn.posterior.divergences import bretagnolle_huber, hellinger, orbit_error, pinsker, through_jensen_shannon
from symbnn.posterior.independent import MeanFieldGaussian
from symbnn.posterior.layers import variational_tensors, with_posteriors
from symbnn.posterior.log_normal import LogNormal
from symbnn.symmetry.actions import regular_channels
from symbnn.symmetry.fields import field, flips, rotations
from symbnn.symmetry.groups import Cyclic
from symbnn.symmetry.networks import network_action
from tolerances import assert_close, standard_errors


@pytest.fixture(scope="module")
def setting():
    plain = classifier()
    return plain, network_action(plain, field(rotations(), (1, 4, 4))), normal(5, 1, 4, 4, seed=1)


def test_ledger_has_every_number(setting):
    plain, action, x = setting
    network = with_posteriors(plain, scale=0.3)
    P = orbit_predictions(network, x, action, 60, generator=seeded(0)).probabilities
    book = ledger(network, action, P, x, Estimate(0.08, 0.01))
    values, divergences = {b.name: b.value for b in book.bounds}, push_forward_divergences(network, action)
    expected = {
        "KL, Pinsker": pinsker(divergences.kl)[1:].mean(),
        "KL, Bretagnolle–Huber": bretagnolle_huber(divergences.kl)[1:].mean(),
        "Hellinger affinity": hellinger(divergences.log_affinity)[1:].mean(),
        "orbit Jensen–Shannon": through_jensen_shannon(P.mean(0)).mean(),
        "Lipschitz, Wasserstein": through_lipschitz(network, action, x)[:, 1:].mean(),
        "information": math.sqrt(0.2),
    }
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(values[name], value)
    assert_close(book.error, orbit_error(P.mean(0)).mean())
    assert book.binding.value == min(values.values()) and all(b.vacuous == (b.value >= 1) for b in book.bounds)
    assert any(b.vacuous for b in book.bounds) and not all(b.vacuous for b in book.bounds)
    assert all(b.value >= book.error for b in book.bounds if b.name != "information")
    informed = ledger(network, action, P, information=Estimate(0.75, 0.0))
    assert informed.bounds[-1] == ("information", math.sqrt(1.5), True)
    coupled = coupled_bound(network, action, x, 64, generator=seeded(2), pairs="all")
    assert ledger(network, action, P, coupled=coupled).bounds[-1] == ("coupled, guaranteed", coupled.guaranteed, False)
    with pytest.raises(Refusal, match='pairs="all"'):
        ledger(network, action, P, coupled=coupled_bound(network, action, x, 8))
    without = ledger(network, action, P)
    assert {b.name for b in without.bounds} == expected.keys() - {"information", "Lipschitz, Wasserstein"}


def test_ledger_standard_error(setting):
    plain, action, x = setting
    network = with_posteriors(plain, scale=0.3)
    books = [ledger(network, action, orbit_predictions(network, x, action, 64, generator=seeded(s)).probabilities)
             for s in range(60)]
    spread = torch.tensor([book.error for book in books]).double().std().item()
    typical = math.sqrt(sum(book.standard_error**2 for book in books) / 60)
    assert abs(typical / spread - 1) < standard_errors / math.sqrt(2 * 59)


@pytest.mark.parametrize("draws", [2, 7, 32])
def test_ledger_standard_error_where_the_error_is_linear(draws):
    """Turns that raise one class in every draw: the error is a mean of draws, the jackknife its standard error."""
    plain = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    network, action = with_posteriors(plain), network_action(plain, field(flips(), (1, 2, 2)))
    raised = torch.rand(draws, 3, generator=seeded(3), dtype=torch.float64) / 2
    first = torch.stack([torch.full_like(raised, 0.3), 0.3 + raised], -1)
    book = ledger(network, action, torch.stack([first, 1 - first], -1))
    assert_close(book.error, raised.mean())
    assert_close(book.standard_error, raised.mean(1).std() / math.sqrt(draws))


def test_ledger_of_an_invariant_posterior_is_zero(setting):
    plain, action, x = setting
    network = with_posteriors(plain, scale=0.3)
    with torch.no_grad():
        for name, tensor in variational_tensors(network).items():
            loc = tensor.posterior.loc
            loc.copy_(sum(action.parameters[name].act(g, loc) for g in action.group.elements()) / 4)
    P = orbit_predictions(network, x, action, 40, generator=seeded(0)).probabilities
    book = ledger(network, action, P, x, Estimate(0.0, 0.0))
    values = {bound.name: bound.value for bound in book.bounds}
    assert book.error > 1e-3  # noise of 40 draws, which the bounds know to be noise
    for name in values.keys() - {"orbit Jensen–Shannon"}:
        assert values[name] < 1e-6, name  # roots of rounded zeros


def test_ledger_with_permuted_classes_and_single_precision(setting):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 4))
    action = network_action(plain, field(rotations(), (1, 4, 4)), hidden="regular",
                            output=regular_channels(Cyclic(4), 1))
    network, x = with_posteriors(plain, scale=0.5), torch.randn(4, 1, 4, 4, generator=seeded(0))
    P = orbit_predictions(network, x, action, 300, generator=seeded(1)).probabilities
    single, double = ledger(network, action, P, x), ledger(network.double(), action, P.double(), x.double())
    for one, two in zip(single.bounds, double.bounds, strict=True):
        assert_close(one.value, two.value, 1e-5)
        assert one.value >= single.error


def test_ledger_refusals(setting):
    plain, action, x = setting
    network = with_posteriors(plain, scale=0.3)
    P = orbit_predictions(network, x, action, 4).probabilities
    for wrong, words in ((P[0], "shape"), (P[:1], "at least 2 samples"), (P[:, :, :2], "all 4 elements.*Got: 2")):
        with pytest.raises(Refusal, match=rf"{words}.*orbit_predictions.*probabilities"):
            ledger(network, action, wrong)
    with pytest.raises(Refusal, match=r"the 5 inputs that were predicted. Got: 2 inputs"):
        ledger(network, action, P, x[:2])
    with pytest.raises(Refusal, match=r"a tuple, \(0.1, 0.01\).*Fix: Estimate\(value, standard_error\)"):
        ledger(network, action, P, x, (0.1, 0.01))
    with pytest.raises(Refusal, match=r"moved copy.*LogNormal for '0.weight'.*sign mask"):
        ledger(with_posteriors(plain, LogNormal), action, P)
    ledger(with_posteriors(plain, MeanFieldGaussian), action, P)  # what the refusal advises
    other = network_action(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double(), field(rotations(), (1, 4, 4)))
    with pytest.raises(Refusal, match="another network"):
        ledger(network, other, P)
    torch.manual_seed(0)
    same_names = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 5),
                               nn.Tanh(), nn.Linear(5, 3)).double()
    with pytest.raises(Refusal, match="another network"):
        ledger(network, network_action(same_names, field(rotations(), (1, 4, 4))), P)
    with pytest.raises(Refusal, match="posteriors"):
        ledger(plain, action, P)


def test_cuda(require_cuda, setting):
    plain, action, x = setting
    network, x = with_posteriors(plain, scale=0.3).to(require_cuda), x.to(require_cuda)
    P = orbit_predictions(network, x, action, 20).probabilities
    book = ledger(network, action, P, x)
    assert all(math.isfinite(bound.value) for bound in book.bounds)
    assert prior_gradient_gap(network, action).max() == 0
