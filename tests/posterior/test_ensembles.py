"""Ensembles: members together and apart, weights of chains, samples of posteriors, refusals."""
import pytest
import torch
from torch import nn

from helpers import seeded
from symbnn.data.splits import Split
from symbnn.errors import Refusal
from symbnn.posterior.ensembles import Ensemble
from symbnn.posterior.layers import posterior_mean_network, with_posteriors
from symbnn.posterior.sampling import predict, sample_weights
from symbnn.training.evaluation import evaluate
from tolerances import assert_close, exact64

X = torch.rand(7, 1, 6, 6, generator=seeded(), dtype=torch.float64)


def convolutional(seed, activation=nn.ReLU, **options):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, **options), activation(), nn.Dropout(0.5),
                            nn.Flatten(), nn.Linear(64, 3)).double()
    network(torch.rand(16, 1, 6, 6).double())
    return network.eval()


class Clipped(nn.Module):
    """Two settings that no tensor shows, of which one shows in large inputs only."""

    def __init__(self, top):
        super().__init__()
        self.layer, self.top = nn.Linear(3, 2), top

    def forward(self, x):
        return self.layer(x).clamp(max=self.top)


class Branching(nn.Module):
    """Control flow that looks at numbers, which cannot be mapped."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        y = self.layer(x)
        return y if y.sum() > 0 else {"low": y}["low"] * 2


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, scale=1.0):
        return {"logits": self.layer(x) * scale, "both": (x, self.layer(x))}


@torch.no_grad()
def test_members_together_are_members_apart():
    members = [convolutional(seed) for seed in range(5)]
    ensemble = Ensemble(members)
    for inputs in (X, X[:1], 100 * X):
        assert_close(ensemble(inputs), torch.stack([member(inputs) for member in members]), exact64)
    assert ensemble.together and ensemble[2] is members[2]
    members[1][0].weight.mul_(2)  # what is trained further is seen
    assert_close(ensemble(X), torch.stack([member(X) for member in members]), exact64)


@pytest.mark.parametrize("members", [
    [convolutional(0), convolutional(0, nn.GELU)], [convolutional(0), convolutional(0, eps=0.1)],
    [Clipped(100.0).eval(), Clipped(1000.0).eval()], [Branching().eval() for _ in range(3)],
], ids=["activation", "number", "attribute", "control flow"])
@torch.no_grad()
def test_members_that_only_look_alike_are_called_apart(members):
    ensemble = Ensemble(members)
    inputs = X if isinstance(members[0], nn.Sequential) else torch.rand(4, 3)
    for each in (inputs, 1e5 * inputs):
        assert torch.equal(ensemble(each), torch.stack([member(each) for member in members]))
    assert ensemble.together is False


def test_training_members_are_called_apart_and_gradients_reach_all():
    ensemble = Ensemble([convolutional(seed).train() for seed in range(3)])
    before = [member[1].running_mean.clone() for member in ensemble]
    ensemble(X).sum().backward()
    assert all(p.grad is not None for p in ensemble.parameters())
    assert not any(torch.equal(member[1].running_mean, mean) for member, mean in zip(ensemble, before))
    still = Ensemble([convolutional(seed) for seed in range(3)])
    still(X).square().sum().backward()
    apart = [convolutional(seed) for seed in range(3)]
    torch.stack([member(X) for member in apart]).square().sum().backward()
    assert still.together
    for ours, theirs in zip(still.parameters(), nn.ModuleList(apart).parameters()):
        assert_close(ours.grad, theirs.grad, exact64)


@torch.no_grad()
def test_outputs_of_any_form_have_the_axis_of_members_first():
    ensemble, x = Ensemble([Parts().eval() for _ in range(4)]), torch.rand(5, 3)
    for _ in range(2):
        found = ensemble(x, scale=2.0)
        assert found["logits"].shape == (4, 5, 2) and found["both"][1].shape == (4, 5, 2)
        torch.testing.assert_close(found["logits"][3], ensemble[3](x, scale=2.0)["logits"])


def test_weights_of_a_chain():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    chain = {"0.weight": torch.randn(6, 4, 3), "2.bias": torch.randn(6, 2)}
    stacked = Ensemble.of_weights(network, chain)
    listed = Ensemble.of_weights(network, [{name: value[m] for name, value in chain.items()} for m in range(6)])
    whole = Ensemble.of_weights(network, [member.state_dict() for member in stacked])
    for ensemble in (stacked, listed, whole):
        assert len(ensemble) == 6
        for m, member in enumerate(ensemble):
            assert torch.equal(member[0].weight, chain["0.weight"][m])
            assert torch.equal(member[2].bias, chain["2.bias"][m])
            assert torch.equal(member[0].bias, network[0].bias) and member[0].bias is not network[0].bias


def test_samples_of_a_posterior():
    network, x = with_posteriors(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).double()), torch.rand(
        5, 3).double()
    drawn = Ensemble.drawn(network, 6, seeded())
    weights = sample_weights(network, 6, seeded())
    with torch.no_grad():
        assert_close(drawn(x), predict(network, x, weights=weights), exact64)
    again = Ensemble.of_weights(posterior_mean_network(network), weights)
    assert all(torch.equal(a, b) for a, b in zip(drawn.parameters(), again.parameters()))


def test_members_are_drawn_with_replacement():
    ensemble = Ensemble([nn.Linear(2, 1) for _ in range(3)])
    drawn = ensemble.sample(3000, seeded())
    values = torch.stack([member.weight[0, 0] for member in drawn])
    shares = torch.stack([(values == member.weight[0, 0]).double().mean() for member in ensemble])
    assert ((shares - 1 / 3).abs() < 4 * (2 / 9 / 3000) ** 0.5).all() and shares.sum() == 1
    assert drawn[0] is not ensemble[0] and len(drawn.sample(2)) == 2


def test_an_ensemble_is_evaluated_as_its_members():
    ensemble = Ensemble([convolutional(seed) for seed in range(3)])
    data = Split(X, torch.arange(7) % 3)
    assert dict(evaluate(ensemble, data)) == dict(evaluate(list(ensemble), data))


@pytest.mark.parametrize(("make", "said"), [
    (lambda: Ensemble([]), "empty list"), (lambda: Ensemble(nn.Linear(2, 2)), "a single network"),
    (lambda: Ensemble([nn.Linear(2, 2), nn.Linear(2, 3)]), "one architecture"),
    (lambda: Ensemble([nn.Linear(2, 2), nn.Linear(2, 2, bias=False)]), "one architecture"),
    (lambda: Ensemble([nn.Linear(2, 2), nn.Linear(2, 2).double()]), "one architecture"),
    (lambda: Ensemble([nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))]), "one architecture"),
    (lambda: Ensemble([with_posteriors(nn.Linear(2, 2))]), "Ensemble.drawn"), (lambda: Ensemble([1]), "network"),
    (lambda: Ensemble(["a"]), "network"), (lambda: Ensemble(None), "NoneType"),
    (lambda: Ensemble([nn.Linear(2, 2), spoilt()]), "NaN or infinity"),
    (lambda: Ensemble.of_weights(nn.Linear(2, 2), {}), "as many members"),
    (lambda: Ensemble.of_weights(nn.Linear(2, 2), []), "state dicts"),
    (lambda: Ensemble.of_weights(nn.Linear(2, 2), [nn.Linear(2, 2)]), r"Ensemble\(networks\)"),
    (lambda: Ensemble.of_weights(nn.Linear(2, 2), {"weight": torch.rand(3, 2, 2), "bias": torch.rand(4, 2)}),
     "as many members"),
    (lambda: Ensemble.of_weights(nn.Linear(2, 2), {"kernel": torch.rand(3, 2, 2)}), "kernel"),
    (lambda: Ensemble.of_weights(nn.Linear(2, 2), nn.Linear(2, 2).state_dict()), "shapes"),
    (lambda: Ensemble.of_weights(with_posteriors(nn.Linear(2, 2)), []), "Ensemble.drawn"),
    (lambda: Ensemble.drawn(nn.Linear(2, 2), 3), "posterior|Bayesian"),
    (lambda: Ensemble([nn.Linear(2, 2)]).sample(0), "samples"),
])
def test_what_is_no_ensemble_is_refused(make, said):
    with pytest.raises(Refusal, match=said):
        make()


def spoilt():
    network = nn.Linear(2, 2)
    network.weight.data[0, 0] = torch.nan
    return network
