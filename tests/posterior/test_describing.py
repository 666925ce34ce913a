"""The table of a network."""
import torch
from torch import nn

from helpers_networks import tied
from helpers_posterior import linear, refused
from symbnn.posterior.describing import describe
from symbnn.posterior.layers import with_posteriors
from symbnn.posterior.moped import moped


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
