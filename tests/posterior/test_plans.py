"""Plans: remembered while nothing changes, and found again when something does."""
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers import seeded
from helpers_posterior import UNSEEN, Written, linear, loop, made
from symbnn.posterior import plans
from symbnn.posterior.layers import with_posteriors
from symbnn.posterior.plans import execution_plan
from symbnn.posterior.sampling import apply_weights, mean_weights, predict, sample_weights
from tolerances import assert_close


def test_what_a_network_becomes_is_looked_at_again():
    plain, network, x, _ = made("tokens")
    assert execution_plan(network, x).together
    for module in (network[0], plain[0]):
        module.register_forward_pre_hook(lambda module, inputs: (inputs[0].transpose(0, 1),))
        module.register_forward_hook(lambda module, inputs, output: output.transpose(0, 1))
    weights = sample_weights(network, 3, seeded())
    assert_close(apply_weights(network, x, weights), loop(plain, x, weights), UNSEEN)
    assert not execution_plan(network, x).together
    twice = [predict(network, x, draws=3, memory=memory, generator=seeded(3)) for memory in (1, 10**9)]
    assert_close(*twice, UNSEEN)
    assert_close(twice[0], loop(plain, x, sample_weights(network, 3, seeded(3))), UNSEEN)


def flips_rows(y):
    y.copy_(y.flip(0).clone())


@pytest.mark.parametrize("change", [flips_rows, lambda y: None])
def test_hooks_that_change_what_they_see_are_run_draw_by_draw(change):
    plain, network, x, _ = made("mlp")
    seen = []
    for module in (network[1], plain[1]):
        module.register_forward_hook(lambda module, inputs, output: (seen.append(len(output)), change(output))[1])
    weights = sample_weights(network, 3, seeded())
    expected, before = loop(plain, x, weights), len(seen)
    assert_close(apply_weights(network, x, weights), expected, UNSEEN)
    calls = seen[before:]
    assert calls[-1] == (3 * len(x) if execution_plan(network, x).together else len(x))
    assert execution_plan(network, x).together == (calls == [3 * len(x)])  # a hook that looks is called once


def test_the_slow_way_is_said(caplog):
    _, network, x, _ = made("siamese")
    with caplog.at_level("WARNING", "symbnn"):
        predict(network, x, draws=2)
        predict(network, x, draws=2)
    assert [record.getMessage() for record in caplog.records] == [
        "Written: one draw at a time: its layers do not see the examples as rows, in their order"]


SETTINGS = {
    "a setting of a torch layer": lambda m: setattr(m.s, "dim", 0),
    "a layer of the same type": lambda m: setattr(m, "s", nn.Softmax(0)),
    "a function": lambda m: setattr(m, "run", lambda m, x: m.a(x).softmax(0)),
    "a configuration": lambda m: setattr(m.config, "dim", 0),
    "an entry of a dictionary": lambda m: m.table.update(dim=0),
    "a buffer of truth values": lambda m: m.mixing.fill_(True),
}


class Configured(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.s = linear(), nn.Softmax(-1)
        self.config, self.table, self.run = SimpleNamespace(dim=-1), {"dim": -1}, None
        self.register_buffer("mixing", torch.zeros((), dtype=torch.bool))

    def forward(self, x):
        if self.run is not None:
            return self.run(self, x)
        h = self.s(self.a(x)).softmax(self.config.dim).softmax(self.table["dim"])
        return torch.where(self.mixing, h.softmax(0), h)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_a_network_is_set_to_is_looked_at_again(name):
    torch.manual_seed(0)
    plain, x = Configured().double(), torch.randn(6, 3, dtype=torch.float64)
    network = with_posteriors(plain)
    weights = sample_weights(network, 3, seeded(1))
    for changed in (plain, network):
        assert_close(predict(network, x, weights=weights, memory=1), loop(plain, x, weights), UNSEEN)
        apply_weights(network, x, weights)
        if changed is network:
            SETTINGS[name](plain)
            SETTINGS[name](network)
    assert_close(apply_weights(network, x, weights), loop(plain, x, weights), UNSEEN)
    assert_close(predict(network, x, weights=weights, memory=1), loop(plain, x, weights), UNSEEN)


def test_an_annealed_number_is_not_looked_at_again_and_plans_are_few():
    network, x = with_posteriors(Written(lambda m, x: m.a(x) * m.temperature, a=linear())), torch.randn(6, 3)
    for step in range(100):
        network.temperature = 1.0 + step
        apply_weights(network, x, mean_weights(network))
    assert len(plans._PLANS[network]) == 1
    for length in range(1, 200):
        network.length = length  # a whole number may decide
        execution_plan(network, x)
    assert len(plans._PLANS[network]) <= plans._KEPT
