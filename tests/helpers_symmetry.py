"""What tests of several rooms need of symmetries: random numbers and networks, the axioms of an action."""
import copy
import pickle
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from symbnn.errors import Refusal
from symbnn.symmetry.actions import Action, check_action
from symbnn.symmetry.networks import NetworkAction, network_action


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    """Normal numbers that depend on shape and seed alone."""
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def assert_is_action(action: Action) -> None:
    """Products, inverses and the identity, of the action and of what is derived from it, on random numbers."""
    check_action(action)
    for derived in (action.flattened(), action.absolute()):
        check_action(derived)
    group = action.group
    a, b = group.sample(2, torch.Generator().manual_seed(3))
    x = random(2, *action.shape, seed=4)
    assert torch.equal(action.act(group.compose(a, b), x), action.act(a, action.act(b, x)))
    assert torch.equal(action.act(group.inverse(a), action.act(a, x)), x)
    assert torch.equal(action.act(group.identity(), x), x)


def assert_can_be_sent(action: Action) -> None:
    """A pickled and a copied action are the same action."""
    for twin in (pickle.loads(pickle.dumps(action)), copy.deepcopy(action)):
        assert twin.agrees_with(action) and twin.shape == action.shape


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that keep activations of order one, random running statistics, float64."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.is_floating_point():
            tensor.data.normal_(generator=generator).mul_(max(1, tensor[0].numel()) ** -0.5)
    return network.double()


def batch(shape: tuple[int, ...], seed: int = 1) -> torch.Tensor:
    """Three inputs of this shape."""
    return random(3, *shape, seed=seed)


def accepted(network: nn.Module, action: Action) -> NetworkAction | None:
    """The action on a network, None where it is refused."""
    try:
        return network_action(network, action)
    except Refusal:
        return None


class Call(nn.Module):
    """A function as a network."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def every(step: int, settings: Iterable, starts: tuple[int, ...] = (0,)) -> Iterator:
    """Every step-th setting: with a step coprime to the numbers of values, each value of each setting is met."""
    return (its for k, its in enumerate(settings) if k % step in starts)
