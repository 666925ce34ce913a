"""One small network for each rule that was wrong once, or is delicate: accepted and exact, or refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers_symmetry import random
from symbnn.errors import Refusal
from symbnn.symmetry.actions import Action, natural_action, sign_change
from symbnn.symmetry.fields import field, flips, rotations, shifts, time_reversal
from symbnn.symmetry.groups import Cyclic, Permutations
from symbnn.symmetry.networks import intertwining_error, network_action
from symbnn.symmetry.signed_permutations import SignedPermutation

IMAGE, FLIPPED = field(rotations(), (3, 6, 6)), field(flips(), (3, 6, 6))
CIRCLE, SERIES = field(shifts(6, 1, 1), (3, 6)), field(time_reversal(), (3, 6))
SIGNS, SET = sign_change(4), Action.product(natural_action(Permutations(4)), Action.trivial(Permutations(4), (3,)))
VECTOR, PLAIN = natural_action(Permutations(4)), Action.trivial(Cyclic(2), (5, 4))
MIXED = Action(Cyclic(2), (2, 2), lambda g: SignedPermutation(range(4), [1, 1 - 2 * g, 1 - 2 * g, 1]), "mixed")


class Net(nn.Module):
    """A function of a module with these layers, parameters (given by their shapes) and buffers."""

    def __init__(self, function, **held):
        super().__init__()
        self.function = function
        for name, value in held.items():
            if isinstance(value, tuple):
                value = nn.Parameter(torch.zeros(value))
            self.register_buffer(name, value) if type(value) is torch.Tensor else setattr(self, name, value)

    def forward(self, x):
        return self.function(self, x)


def error(function, action, hidden="trivial", **held):
    """How far the derived action is from exact, on weights of order one."""
    net = Net(function, **held).double().eval()
    torch.manual_seed(0)
    for parameter in net.parameters():
        parameter.data.normal_()
    return intertwining_error(net, network_action(net, action, hidden=hidden), random(3, *action.shape))


def windows(n, x):
    """Attention within windows of four pixels, as in Swin."""
    b, h, w, c = x.shape
    x = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
    return n.a(x, x, x)[0].view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)


def written(n, x):
    y = torch.tanh(n.a(x))
    y[:, 0] = y[:, 1] * 2
    view = y.flatten(1)
    y.add_(1.0)
    y[..., :1] += 0.5
    return n.b(view)


ORDER = torch.arange(1.0, 5)

EXACT = {
    "truth values have no sign": (lambda n, x: x.bool().double(), SIGNS, {}),
    "groups with signs": (
        lambda n, x: n.a(x.unsqueeze(2)).flatten(1),
        SIGNS,
        {"a": nn.Conv1d(4, 4, 1, groups=2, bias=False)},
    ),
    "depthwise with signs": (lambda n, x: n.a(x.unsqueeze(2)), SIGNS, {"a": nn.Conv1d(4, 8, 1, groups=4, bias=False)}),
    "transposed groups with signs": (
        lambda n, x: n.a(x.unsqueeze(2)),
        SIGNS,
        {"a": nn.ConvTranspose1d(4, 4, 1, groups=2, bias=False)},
    ),
    "absolute values of a joint action": (lambda n, x: x.abs(), MIXED, {}),
    "one mean after the other": (lambda n, x: n.a(torch.relu(x).mean(2).mean(2)), IMAGE, {"a": nn.Linear(3, 2)}),
    "narrow counts a length": (lambda n, x: x.narrow(1, 1, 2), IMAGE, {}),
    "a last place": (lambda n, x: x[:, [-1]], IMAGE, {}),
    "inner is over both last axes": (lambda n, x: torch.inner(x, n.p), SIGNS, {"p": (4, 4)}),
    "variance with keepdim by place": (lambda n, x: x.var((2, 3), False, True), IMAGE, {}),
    "running maxima": (lambda n, x: n.a(x).cummax(1)[0], SIGNS, {"a": nn.Linear(4, 3)}),
    "states from parameters": (
        lambda n, x: n.a(x, n.h.expand(-1, len(x), -1).contiguous())[0],
        PLAIN,
        {"a": nn.GRU(4, 4, 2, batch_first=True), "h": (2, 1, 4)},
    ),
    "states of one layer": (
        lambda n, x: n.b(n.a(x)[1].squeeze(0)),
        PLAIN,
        {"a": nn.GRU(4, 4, batch_first=True), "b": nn.Linear(4, 2)},
    ),
    "states in another order": (
        lambda n, x: n.a(x)[1].permute(1, 0, 2),
        PLAIN,
        {"a": nn.GRU(4, 4, 2, batch_first=True)},
    ),
    "writing through views": (written, PLAIN, {"a": nn.Linear(4, 5), "b": nn.Linear(25, 2)}),
    "gradients switched off": (lambda n, x: torch.no_grad()(n.a)(x), IMAGE, {"a": nn.Conv2d(3, 2, 1)}),
    "grids that stay": (lambda n, x: x + x.transpose(1, 2), Action.trivial(Cyclic(2), (4, 4)), {}),
    "a matrix of two grids": (
        lambda n, x: x.flatten(2) @ (n.p.flatten()[:, None] * n.p.flatten()),
        IMAGE,
        {"p": (6, 6)},
    ),
    "a product of cosines": (lambda n, x: F.cosine_similarity(x.unsqueeze(1), x.unsqueeze(2), dim=-1), SET, {}),
    "letters of length one": (lambda n, x: torch.einsum("bij,bij->bi", x, n.p), SET, {"p": (1, 1, 3)}),
    "products in a batch, summed": (lambda n, x: torch.addbmm(n.p, x, x.transpose(1, 2)), PLAIN, {"p": (5, 5)}),
    "patches": (lambda n, x: n.a(F.unfold(x, 3, padding=1).transpose(1, 2)).mean(1), IMAGE, {"a": nn.Linear(27, 2)}),
    "blocks": (
        lambda n, x: n.a(x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3)),
        IMAGE,
        {"a": nn.Linear(12, 2)},
    ),
    "pixels twice": (
        lambda n, x: n.a(x.repeat_interleave(2, 2).repeat_interleave(2, 3)),
        IMAGE,
        {"a": nn.Conv2d(3, 2, 3)},
    ),
    "pairs of tokens": (
        lambda n, x: n.a(torch.cat([x.repeat_interleave(4, 1), x.repeat(1, 4, 1)], -1)),
        SET,
        {"a": nn.Linear(6, 1)},
    ),
    "channels of zeros": (lambda n, x: F.pad(x, (1, 2)), SIGNS, {}),
    "crops": (lambda n, x: n.a(x) + x[:, :, 1:-1, 1:-1], IMAGE, {"a": nn.Conv2d(3, 3, 3)}),
    "the largest": (lambda n, x: n.a(x.topk(2, 1)[0].flatten(1)), SET, {"a": nn.Linear(6, 2)}),
    "sorted": (lambda n, x: n.a(x.sort(1)[0].flatten(1)), SET, {"a": nn.Linear(12, 2)}),
    "flips commute with flips": (lambda n, x: n.a(x) + n.a(x.flip(-1)).flip(-1), FLIPPED, {"a": nn.Conv2d(3, 3, 3)}),
    "both axes reversed": (lambda n, x: x.flip(2, 3), IMAGE, {}),
    "rolls commute with shifts": (lambda n, x: x.roll(2, 2), CIRCLE, {}),
    "batches one behind the other": (lambda n, x: torch.cat([x, -x], 0).chunk(2, 0)[1], SIGNS, {}),
    "windows of attention": (
        lambda n, x: windows(n, x.permute(0, 2, 3, 1)),
        IMAGE,
        {"a": nn.MultiheadAttention(3, 1, batch_first=True)},
    ),
}

REFUSED = {
    "a base that is a constant": (lambda n, x: torch.pow(n.c, x), VECTOR, {"c": ORDER}),
    "bounds that are constants": (lambda n, x: torch.clamp(x, min=n.c), VECTOR, {"c": ORDER}),
    "two bounds that are constants": (lambda n, x: torch.clamp(x, n.c, n.c + 1), VECTOR, {"c": ORDER}),
    "products so far, with signs": (lambda n, x: x.unsqueeze(1).repeat(1, 3, 1).cumprod(1), SIGNS, {}),
    "logarithms of sums so far": (lambda n, x: x.unsqueeze(1).repeat(1, 3, 1).logcumsumexp(1), SIGNS, {}),
    "pixels counted twice in a mean": (lambda n, x: F.pad(x, (1, 1), mode="circular").mean(2), CIRCLE, {}),
    "pixels counted twice in a pool": (
        lambda n, x: F.adaptive_avg_pool1d(F.pad(x, (1, 1), mode="circular"), 1),
        CIRCLE,
        {},
    ),
    "two paddings": (lambda n, x: F.pad(F.pad(x, (1, 2), mode="circular"), (1, 1)), SERIES, {}),
    "a distance with a small number": (lambda n, x: F.pairwise_distance(x, x * n.p), SIGNS, {"p": (4,)}),
    "a norm of columns": (lambda n, x: torch.linalg.norm(x, 1, (2, 3)), IMAGE, {}),
    "dropout that stays": (lambda n, x: F.dropout(x, 0.5), IMAGE, {}),
    "random numbers": (lambda n, x: x * torch.rand(()), IMAGE, {}),
    "a state that is kept": (lambda n, x: x * n.c.add_(1).sum(), IMAGE, {"c": torch.zeros(3)}),
    "bits": (lambda n, x: x.view(torch.int64).double(), SIGNS, {}),
    "two reductions": (lambda n, x: x.amin(2).logsumexp(2), IMAGE, {}),
    "one axis of two": (lambda n, x: x.mean(2).mean(1), IMAGE, {}),
    "one axis of a parameter": (lambda n, x: n.p.mean(2, keepdim=True) * (x + n.p), IMAGE, {"p": (3, 6, 6)}),
    "a constant along one axis": (lambda n, x: x + torch.arange(6.0), IMAGE, {}),
    "one grid beside itself": (lambda n, x: torch.cat([x, x], 2), IMAGE, {}),
    "a crop that is not square": (lambda n, x: F.adaptive_avg_pool2d(x[:, :, 1:-1], 1), IMAGE, {}),
    "a crop of a circle": (lambda n, x: x[:, :, 1:-1].mean(2), CIRCLE, {}),
    "one axis reversed": (lambda n, x: x.flip(2), IMAGE, {}),
    "batches in an output": (lambda n, x: torch.cat([x, x], 0), SIGNS, {}),
    "the largest along one axis": (lambda n, x: x.topk(2, 2)[0], IMAGE, {}),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_commutes_is_accepted_and_exact(name):
    """The action that is derived is exact."""
    function, action, held = EXACT[name]
    assert error(function, action, **held) <= 1e-11


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_commute_is_refused(name):
    """There is a refusal, and no other error."""
    function, action, held = REFUSED[name]
    with pytest.raises(Refusal):
        error(function, action, **held)


def test_layers_of_a_first_state_are_not_moved():
    """A parameter with a state for each layer is moved along its units alone, never along its layers."""
    net = Net(
        lambda n, x: n.a(x, n.h.expand(-1, len(x), -1).contiguous())[0],
        a=nn.GRU(4, 4, 2, batch_first=True),
        h=(2, 1, 4),
    )
    action = network_action(net.double(), PLAIN, hidden="regular")
    state = random(2, 1, 4)
    assert torch.equal(action.parameters["h"].act(1, state).sort(-1)[0], state.sort(-1)[0])
