"""Everyday wrong arguments: each is refused before any work, in words that say what to type; fixes are tried."""
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import symbnn as sb
from symbnn.data.batches import batches
from symbnn.data.splits import Split
from symbnn.equivariance.averages import average, symmetrize
from symbnn.equivariance.conditions import violations
from symbnn.equivariance.expansion import expand, expanded_action
from symbnn.equivariance.metrics import accuracy, ece, summarize
from symbnn.equivariance.mixture import OrbitMixture, orbit_average
from symbnn.equivariance.predictions import orbit_predictions
from symbnn.equivariance.projected_gradients import drift, keep_invariant
from symbnn.equivariance.tied import tie
from symbnn.errors import Refusal, check_choice, check_count, check_kind, check_positive, check_shape, check_tensor
from symbnn.hidden_units.mutual_information import mutual_information
from symbnn.posterior.elbo import elbo
from symbnn.posterior.independent import MeanFieldGaussian
from symbnn.posterior.layers import variational_tensors, with_posteriors
from symbnn.posterior.likelihoods import Categorical
from symbnn.posterior.real_targets import Gaussian
from symbnn.posterior.sampling import forward, predict
from symbnn.symmetry.actions import Action
from symbnn.symmetry.fields import field, flips, rotations
from symbnn.symmetry.groups import Cyclic
from symbnn.symmetry.networks import intertwining_error, network_action, unit_permutations
from symbnn.training.checkpoints import load_network, load_tensors, read_checkpoint, save_network

SHAPE = (1, 4, 4)
torch.manual_seed(0)
plain = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.ReLU(), nn.Linear(3, 2))
network, turns = with_posteriors(plain), field(rotations(), SHAPE)
action = network_action(network, turns)
x, y = torch.rand(4, *SHAPE), torch.tensor([0, 1, 1, 0])
loader = DataLoader(TensorDataset(x, y), batch_size=2)
found = orbit_predictions(network, x, action, 3)
outputs = forward(network, x, draws=2).detach()
tensor = variational_tensors(network)["1.weight"]

MAKE = r"network_action\(network, action\)"
FIELD = r"field\(rotations\(\), \(1, 28, 28\)\)"
CASES = {
    "groups": [
        (lambda: check_kind(None, int, "A", "one"), r"an int as A\. Got: None\."),
        (lambda: check_kind(Cyclic, Cyclic, "A", "Cyclic(4)"), r"the class Cyclic.*Cyclic\(4\)"),
        (lambda: check_tensor(torch.zeros(2, 2).to_sparse(), "A", "x"), r"x.to_dense\(\)"),
        (lambda: check_count(True, "n", "n=2"), "n=2"), (lambda: check_count(2.0, "n", "n=2"), "n=2"),
        (lambda: check_positive(True, "n", "n=2"), "n=2"), (lambda: check_positive(0.0, "n", "n=2"), "n=2"),
        (lambda: check_positive(float("inf"), "n", "n=2"), "n=2"), (lambda: check_positive("1", "n", "n=2"), "n=2"),
        (lambda: check_choice("c", ("a", "b"), "letter"), "one of a, b.* as letter"),
        (lambda: check_count(1, "n", "n=2", least=2), "at least 2"), (lambda: check_shape(3, "s", "(3,)"), r"\(3,\)"),
    ],
    "actions": [
        (lambda: field(None, SHAPE), FIELD), (lambda: field(rotations(), 5), FIELD),
        (lambda: field(SHAPE, rotations()), FIELD),
        (lambda: field(turns, SHAPE), "acts on inputs already"),
        (lambda: field(Cyclic(4), SHAPE), "an action of the group"),
        (lambda: field(rotations(), (1, -5, -5)), FIELD), (lambda: field(rotations(), (1, 5.0, 5.0)), FIELD),
        (lambda: field(rotations(), SHAPE, "trivial"), "regular_channels"),
        (lambda: rotations().on(5.0, 5.0), "28, 28"),
        (lambda: Action.trivial(Cyclic(4), 3), r"\(3,\)"), (lambda: Action.trivial(None, (3,)), r"Cyclic\(4\)"),
        (lambda: turns.act(1, x.numpy()), r"torch.as_tensor\(x\)"), (lambda: turns.act(x, 1), "torch tensor"),
    ],
    "network_actions": [
        (lambda: network_action(network, rotations()), FIELD), (lambda: network_action(network, None), r"field\(rot"),
        (lambda: network_action(network, "C4"), r"field\(rot"), (lambda: network_action(network, SHAPE), r"field\(rot"),
        (lambda: network_action(network, Cyclic(4)), "an action of the group"),
        (lambda: network_action(network, action), "action.input"),
        (lambda: network_action(turns, network), "torch network"),
        (lambda: network_action(None, turns), "torch network"),
        (lambda: network_action(list(network), turns), r"Sequential\(\*"),
        (lambda: network_action(nn.Linear, turns), "the class Linear"),
        (lambda: network_action(network, turns, hidden=turns), "hidden={name: action}"),
        (lambda: network_action(network, turns, output=rotations()), r"field\(space"),
        (lambda: unit_permutations(network, 3), r"\(n,\)"), (lambda: unit_permutations(network, None), r"\(n,\)"),
        (lambda: unit_permutations(network, ()), r"\(n,\)"),
        (lambda: unit_permutations(network, (1.0, 4, 4)), r"\(n,\)"),
        (lambda: unit_permutations(SHAPE, network), "Sequential|torch network"),
        (lambda: intertwining_error(network, turns, x), MAKE), (lambda: intertwining_error(network, None, x), MAKE),
        (lambda: intertwining_error(plain, action, x.numpy()), r"torch.as_tensor\(x\)"),
        (lambda: intertwining_error(plain, action, x[:0]), "at least one input"),
        (lambda: intertwining_error(plain, action, x, []), "at least one input"),
        (lambda: intertwining_error(plain, action, x, 1), r"\[g\]"),
        (lambda: intertwining_error(plain, action, x[:, :, :3]), r"ends in the axes \(1, 4, 4\)"),
    ],
    "objectives": [
        (lambda: elbo(network, None, y, 4), "torch tensor"),
        (lambda: elbo(network, outputs, y.numpy(), 4), "as_tensor"),
        (lambda: elbo(network, outputs, None, 4), "torch tensor"),
        (lambda: elbo(network, outputs, [0, 1, 1, 0], 4), "as_tensor"),
        (lambda: elbo(network, outputs, y, None), "num_data"),
        (lambda: elbo(network, outputs, y, loader), r"len\(loader"),
        (lambda: elbo(network, outputs, y, 4, likelihood=Categorical), r"likelihood=Categorical\(\)"),
        (lambda: elbo(network, outputs, y, 4, likelihood="categorical"), r"likelihood=Categorical\(\)"),
        (lambda: elbo(network, outputs, y, 4, kl_weight="1"), r"kl_weight=1\.0"),
        (lambda: elbo(None, outputs, y, 4), "network"),
        (lambda: Gaussian(torch.empty(2, device="meta")), "meta"),
        (lambda: Categorical().log_prob(outputs, None), "labels"),
        (lambda: Gaussian(0.1).log_prob(outputs, outputs[0].numpy()), "as_tensor"),
        (lambda: violations(network, turns, x, y), MAKE),
    ],
    "invariance": [
        (lambda: keep_invariant(network, None), MAKE), (lambda: keep_invariant(network, turns), MAKE),
        (lambda: tie(network, None), MAKE), (lambda: tie(network, turns), MAKE),
        (lambda: tie(action, network), "torch network"),
        (lambda: drift(network, None), MAKE), (lambda: drift(network, turns), MAKE),
        (lambda: drift(None, action), "torch network"),
    ],
    "symmetrize": [
        (lambda: symmetrize(network, turns), MAKE), (lambda: symmetrize(None, action), "torch network"),
        (lambda: symmetrize(network, rotations()), r"network_action\(network, field"),
        (lambda: symmetrize(network, action, only=3), r"only=\["), (lambda: OrbitMixture(network, None), MAKE),
        (lambda: average(tensor, action.parameters["1.weight"]), "tensor.posterior"),
        (lambda: average(action.parameters["1.weight"], tensor.posterior), r"action.parameters\[name\]"),
        (lambda: average(tensor.posterior, action), r"action.parameters\[name\]"),
        (lambda: orbit_average(found.probabilities), "predictions = orbit_predictions"),
        (lambda: OrbitMixture(network, action).mutual_information(2.5), "draws=256"),
        (lambda: OrbitMixture(network, action).log_prob(None), "sample_weights"),
        (lambda: OrbitMixture(network, action).log_prob({}), "sample_weights"),
    ],
    "metrics": [
        *[(lambda bad=bad: orbit_predictions(network, bad, action, 2), fix) for bad, fix in (
            (None, "torch tensor"),
            (x.tolist(), r"as_tensor\(inputs\)"), ((x, y), "as_tensor"), (loader, "for inputs, labels"),
            (x.numpy(), r"as_tensor\(inputs\)"), (x.to_sparse(), "to_dense"), (Split(x, y), "split.inputs"),
            (torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged), "padding"),
            (x.double(), r"inputs.to\(torch.float32\)"),
            (x.to("meta"), "data themselves"))],
        (lambda: orbit_predictions(network, x, turns, 2), MAKE),
        (lambda: orbit_predictions(None, x, action, 2), "network"),
        (lambda: orbit_predictions(network, x, action, 2.0), "draws=16"),
        (lambda: orbit_predictions(network, x, action, 2, batch_size="4"), "batch_size=256"),
        (lambda: orbit_predictions(network, x, action, 2, generator=0), "manual_seed"),
        (lambda: summarize(found.probabilities, y), "predictions = orbit_predictions"),
        (lambda: summarize(y, found), "predictions = orbit_predictions"),
        (lambda: summarize(found, y, bins=1.5), "bins=15"),
        (lambda: ece(found.probabilities, y, bins=0), "bins=15"),
        (lambda: accuracy(found, y), "predictions.probabilities"),
        (lambda: accuracy(found.probabilities.numpy(), y), r"as_tensor\(probabilities\)"),
        *[(lambda bad=bad: accuracy(found.probabilities, bad), fix) for bad, fix in (
            (y.numpy(), r"as_tensor\(labels\)"), ([0, 1, 1, 0], r"as_tensor\(labels\)"), (None, "torch tensor"))],
    ],
    "mutual_information": [
        (lambda: mutual_information(network, None), MAKE), (lambda: mutual_information(network, turns), MAKE),
        (lambda: mutual_information(action, network), "torch network"),
        (lambda: mutual_information(network, action, K=2.5), "K=64"),
        (lambda: mutual_information(network, action, K=None), "K=64"),
        (lambda: mutual_information(network, action, draws=2.5), "draws=64"),
        (lambda: mutual_information(network, action, draws="4"), "draws=64"),
        (lambda: mutual_information(network, action, generator=0), "manual_seed"),
    ],
    "expansion": [
        (lambda: expand(None, action), "torch network"), (lambda: expand(action, network), "torch network"),
        (lambda: expand(network, turns), MAKE), (lambda: expand(network, action, None), "block_diagonal"),
        (lambda: expanded_action(expand(network, action).network, turns), MAKE),
        (lambda: expanded_action(None, action), "network"),
    ],
    "checkpoints": [
        (lambda: load_network(None), "load_network"), (lambda: load_network(3), "load_network"),
        (lambda: load_network(network.state_dict()), "load_state_dict"), (lambda: load_network(network), "as it is"),
        (lambda: read_checkpoint(b"runs"), "read_checkpoint"), (lambda: load_tensors(network, None), "read_checkpoint"),
        (lambda: load_tensors(network.state_dict(), network), "load_state_dict"),
        (lambda: save_network(network, "runs", None), "save_network"),
        (lambda: save_network("runs", network, "small"), "PRESETS"),
    ],
    "data": [
        (lambda: batches(Split(torch.rand(2, 1, 4, 5), y[:2]), 2, "full"), r"field\(flips\(\), \(1, 4, 5\)\)"),
        (lambda: batches(Split(x, y), 2, "full"), r"field\(rotations\(\), \(1, 4, 4\)\)"),
        (lambda: batches(Split(x, y), 2, "full", action=rotations()), r"field\(space, \(1, 4, 4\)\)"),
        (lambda: Split(x, y.float()).labels, r"targets.long\(\)"),
        (lambda: sb.train(sb.bayesianize(nn.Sequential(nn.Flatten(), nn.Linear(16, 3))), Split(
            (255 * x).to(torch.uint8), y), batch_size=2, draws=1, augmentation="none"), "inputs / 255"),
    ],
}


@pytest.mark.parametrize(("call", "fix"), [
    pytest.param(*case, id=f"{module}-{number}")
    for module, cases in CASES.items() for number, case in enumerate(cases)])
def test_wrong_arguments_are_refused(call, fix):
    with pytest.raises(Refusal, match=fix):
        call()


def test_the_fixes_work():
    as_read = torch.as_tensor(x.double().numpy())
    assert orbit_predictions(network, as_read.to(torch.float32), action, 2).probabilities.shape == (2, 4, 4, 2)
    summarize(found, torch.as_tensor(y.tolist()), bins=15)
    assert average(tensor.posterior, action.parameters["1.weight"]).is_invariant_under(action.parameters["1.weight"])
    network_action(network, field(rotations(), SHAPE)), unit_permutations(network, SHAPE)
    network_action(network, turns, hidden={next(n for n in action.channels if n not in ("input", "output")):
                                           Action.trivial(turns.group, (3,))})
    elbo(network, outputs, torch.as_tensor(y.numpy()), num_data=len(loader.dataset), likelihood=Categorical())
    Split(nn.functional.one_hot(torch.randint(9, (4, 5))).float(), y)
    wide = Split(torch.rand(2, 1, 4, 5), y[:2])
    list(batches(wide, 2, "full", action=field(flips(), (1, 4, 5)))), list(batches(wide, 2, "none"))


def test_a_last_layer_with_two_outputs_has_an_action():
    """The advice for one logit and for outputs at positions."""
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.last(self.inner(x).mean(1))

    tokens = with_posteriors(Tokens())
    assert Categorical().log_prob(predict(tokens, torch.rand(4, 5, 4), draws=2), y).shape == (2, 4)
    with pytest.raises(Refusal, match=re.escape("x.mean(1)")):
        Categorical().log_prob(torch.zeros(2, 4, 5, 3), y)
    one = with_posteriors(nn.Sequential(nn.Flatten(), nn.Linear(16, 1)))
    with pytest.raises(Refusal, match=re.escape("nn.Linear(features, 2)")):
        orbit_predictions(one, x, network_action(one, turns), 2)
    assert isinstance(tensor.posterior, MeanFieldGaussian) and np.isfinite(found.probabilities.numpy()).all()
