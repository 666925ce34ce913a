"""The table of a network."""
import torch
from torch import nn

from helpers_networks import tied
from helpers_posterior import linear, refused
from symbnn.equivariance.symmetric import Symmetric
from symbnn.posterior.describing import describe
from symbnn.posterior.layers import with_posteriors
from symbnn.posterior.moped import moped
from symbnn.symmetry.actions import sign_change
from symbnn.symmetry.networks import network_action, unit_permutations


def test_every_tensor_has_a_line():
    torch.manual_seed(0)
    plain = nn.Sequential(linear(), nn.GRU(3, 3), nn.LayerNorm(3))
    plain[2].bias.requires_grad_(False)
    described = describe(with_posteriors(plain, only=["0.*", "1.weight*"], **moped(0.1)))
    lines = {line.name: line for line in described.lines}
    assert set(lines) == {name for name, _ in plain.named_parameters()}
    assert lines["0.weight"].path == "runs of rows" and lines["1.weight_hh_l0"].path == "one draw at a time"
    assert lines["2.weight"].posterior == "deterministic, trained" and lines["2.bias"].posterior.endswith("frozen")
    assert lines["1.weight_ih_l0"].shape == (9, 3) and "around its start" in lines["0.weight"].prior
    assert "S passes" in described.cost and "1.weight_ih_l0" in described.cost
    assert len(str(described).splitlines()) == len(lines) + 2


def test_an_action_has_a_column():
    torch.manual_seed(0)
    network = with_posteriors(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), skip="2.bias")
    action = network_action(network, sign_change(3))
    table = describe(network, action=action)
    lines = {line.name: line.action for line in table.lines}
    assert lines == {"0.weight": "rows still, columns by sign change (input)", "0.bias": "still", "2.weight": "still",
                     "2.bias": "still"}
    assert str(table).splitlines()[0].split() == ["tensor", "shape", "posterior", "prior", "path", "action"]
    assert "action" not in str(describe(network)) and all(not line.action for line in describe(network).lines)
    assert describe(Symmetric(network, action)).lines == table.lines
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert describe(plain, action=unit_permutations(plain, (3,))).lines[1].action == "by S4 (0)"
    other = network_action(linear(), sign_change(3))
    for call in (lambda: describe(network, action=other), lambda: describe(network, action=sign_change(3)),
                 lambda: describe(Symmetric(network, action), action=action)):
        assert "action" in refused(call).expected


def test_ties_and_plain_networks_and_measured_costs():
    network = with_posteriors(tied(), only="*")
    assert [line.name for line in describe(network).lines] == ["table.weight = head.weight"]
    assert "no tensor has a posterior" in str(describe(tied()))
    tokens = torch.randint(10, (6, 5))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert "times a plain pass" in describe(network, tokens, draws=4).cost
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert "all draws at once" in describe(with_posteriors(linear()), torch.rand(4, 3)).cost
    compiled = torch.compile(with_posteriors(linear()), backend="eager")
    assert [line.name for line in describe(compiled).lines] == ["weight", "bias"]
    for wrong in (None, linear):
        assert "network" in refused(lambda wrong=wrong: describe(wrong)).expected
