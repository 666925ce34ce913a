"""Queries, keys and values in one tensor, told apart by a view; axes of known actions cut where nothing crosses."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers_symmetry import random
from symbnn.errors import Refusal
from symbnn.symmetry.actions import Action, natural_action, regular_channels
from symbnn.symmetry.groups import Cyclic, Permutations, Product
from symbnn.symmetry.networks import intertwining_error, network_action, unit_permutations
from symbnn.symmetry.signed_permutations import SignedPermutation
from tolerances import exact64


class Attention(nn.Module):
    """Two heads of two channels from one matrix, which `parts` takes apart."""

    def __init__(self, parts, width=12):
        super().__init__()
        self.parts, self.qkv, self.out = parts, nn.Linear(2, width), nn.Linear(4, 3)

    def forward(self, x):
        """The mean over the tokens."""
        q, k, v = self.parts(self.qkv(x))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


def unbound(y):
    return y.view(*y.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)


def selected(y):
    y = y.unflatten(-1, (3, 4)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    return [y[k].unflatten(-1, (2, 2)).transpose(1, 2) for k in (0, 1, -1)]


def from_the_end(y):
    y = y.reshape(*y.shape[:2], 3, 2, 2)
    return [its.transpose(1, 2) for its in (y[:, :, 0], y[:, :, 1], y[:, :, 2])]


def chunked(y):
    return [its.unflatten(-1, (2, 2)).transpose(1, 2) for its in y.chunk(3, -1)]


class Heads(nn.Module):
    """torch's own attention, whose queries, keys and values have one matrix."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        """The mean over the tokens."""
        return self.out(self.a(x, x, x, need_weights=False)[0].mean(1))


def exact(network, action):
    """How far the action is from exact on random weights, over all of a small group."""
    tensors = {name: random(*moves.shape, seed=k) for k, (name, moves) in enumerate(action.parameters.items())}
    elements = action.group.elements()
    return intertwining_error(network.double(), action, random(3, *action.input.shape), elements, tensors=tensors,
                              forward=lambda x, own: torch.func.functional_call(network, own, (x,)))


@pytest.mark.parametrize("parts", (unbound, selected, from_the_end, chunked))
def test_channels_of_queries_and_of_values_are_permuted_apart(parts):
    network = Attention(parts)
    action = unit_permutations(network, (5, 2))
    names = [name for name in action.channels if name.startswith("qkv")]
    assert action.group == Product(*[Permutations(2)] * 3) and len(names) == 3  # heads, channels of q and k, and of v
    assert exact(network, action) <= exact64


def test_torchs_own_attention_has_them_too():
    network = Heads()
    action = unit_permutations(network, (5, 4))
    assert action.group.order == 2**3 * 24 and exact(network, action) <= exact64  # and the rows of a.out_proj


@pytest.mark.parametrize("parts", (
    lambda y: (lambda z: (z[:, :, 0], z[:, :, 1], z[:, :, 2] + 0 * z.sum(2)))(y.view(*y.shape[:2], 3, 2, 2)),
    lambda y: torch.tanh(y.view(*y.shape[:2], 3, 2, 2)).unbind(2)))
def test_a_view_that_is_used_as_a_whole_is_a_product(parts):
    network = Attention(lambda y: [its.transpose(1, 2) for its in parts(y)])
    action = unit_permutations(network, (5, 2))
    assert action.group == Product(*[Permutations(2)] * 2) and exact(network, action) <= exact64


def test_an_action_on_all_packed_channels_is_taken_apart():
    network = Attention(unbound)
    three = Action.product(Action.trivial(Cyclic(2), (3,)), Action.trivial(Cyclic(2), (2,)),
                           regular_channels(Cyclic(2))).flattened()
    plain = Action.trivial(Cyclic(2), (5, 2))
    action = network_action(network, plain, hidden={"qkv": three})
    assert exact(network, action) <= exact64
    assert not action.parameters["qkv.bias"].agrees_with(Action.trivial(Cyclic(2), (12,)))
    torn = regular_channels(Cyclic(2), 6)
    with pytest.raises(Refusal):
        network_action(network, plain, hidden={"qkv": torn})


def blocks(g):
    """Exchanges within the first three and within the last two of five coordinates, the last one with a sign."""
    return SignedPermutation([1, 0, 2, 4, 3], [1, 1, 1, -1, -1]) if g else SignedPermutation.identity(5)


def test_a_known_axis_is_cut_where_nothing_crosses():
    action = Action(Cyclic(2), (5,), blocks, "blocks")
    assert action.cut(0, 3)(1) == SignedPermutation([1, 0, 2], [1, 1, 1])
    assert action.cut(3, 2)(1) == SignedPermutation([1, 0], [-1, -1])
    assert action.cut(0, 2) is not None and action.cut(0, 4) is None and action.cut(1, 2) is None

    class Cut(nn.Module):
        def __init__(self, at):
            super().__init__()
            self.at, self.a, self.b = at, nn.Linear(at, 4), nn.Linear(5 - at, 4, bias=False)

        def forward(self, x):
            first, second = x.split([self.at, 5 - self.at], -1)
            return torch.relu(self.a(first)) + self.b(second)

    network = Cut(3)
    assert exact(network, network_action(network, action)) <= exact64
    with pytest.raises(Refusal, match="is cut"):
        network_action(Cut(4), action)
    assert natural_action(Permutations(4)).cut(0, 2) is None
