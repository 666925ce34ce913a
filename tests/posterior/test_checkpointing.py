"""Gradient checkpointing inside a network: the same gradient as without it, under every estimator."""
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from helpers import normal, seeded
from symbnn.posterior.elbo import elbo
from symbnn.posterior.layers import with_posteriors
from symbnn.posterior.plans import execution_plan
from symbnn.posterior.sampling import apply_weights, forward, sample_weights
from tolerances import assert_close


class Blocks(nn.Module):
    """Two blocks, whose activations are kept or computed again in the backward pass."""

    def __init__(self, between: nn.Module, again: bool):
        super().__init__()
        self.first, self.between, self.again = nn.Linear(6, 8), between, again
        self.second = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.convolution, self.last = nn.Conv1d(1, 2, 3, padding=1), nn.Linear(16, 3)

    def block(self, x):
        return self.between(torch.tanh(self.first(x)))

    def forward(self, x):
        if self.again:
            x = checkpoint(self.block, x, use_reentrant=False)
            x = checkpoint_sequential(self.second, 2, x, use_reentrant=False)
            x = checkpoint(self.convolution, x[:, None], use_reentrant=False)
        else:
            x = self.convolution(self.second(self.block(x))[:, None])
        return self.last(x.flatten(1))


BETWEEN = {"nothing": nn.Identity, "norm": lambda: nn.LayerNorm(8), "dropout": lambda: nn.Dropout(0.3),
           "batch norm": lambda: nn.BatchNorm1d(8)}


def slopes(between, again, outputs):
    """The gradient of all parameters, with `outputs` of a network and its inputs."""
    torch.manual_seed(0)
    network, x = with_posteriors(Blocks(BETWEEN[between](), again).double(), scale=0.1), normal(8, 6)
    torch.manual_seed(1)
    bound = elbo(network, outputs(network, x), torch.arange(8) % 3, 100)
    torch.manual_seed(2)  # what is drawn in the backward pass is what was drawn before
    (-bound.elbo).backward()
    assert execution_plan(network, x).together
    return torch.cat([its.grad.flatten() for its in network.parameters()])


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("estimator", ["whole", "split", "flipout", "local"])
def test_the_gradient_is_the_same(between, estimator):
    kept, again = (slopes(between, active, lambda network, x: forward(network, x, 4, estimator, seeded(3)))
                   for active in (False, True))
    assert_close(again, kept)
    assert kept.abs().max() > 1e-3


@pytest.mark.parametrize("between", BETWEEN)
def test_given_weights(between):
    kept, again = (slopes(between, active, lambda network, x: apply_weights(
        network, x, sample_weights(network, 3, seeded(3)))) for active in (False, True))
    assert_close(again, kept)


def test_activations_are_computed_again(monkeypatch):
    network, x, calls, block = with_posteriors(Blocks(nn.Identity(), True).double()), normal(8, 6), [], Blocks.block
    execution_plan(network, x)
    monkeypatch.setattr(Blocks, "block", lambda self, x: calls.append(1) or block(self, x))
    outputs = forward(network, x, 4, "split", seeded(0))
    assert len(calls) == 1
    outputs.square().sum().backward()
    assert len(calls) == 2 and all(its.grad is not None for its in network.parameters())
