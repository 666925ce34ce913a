"""Outputs that are None or states, distances, ranks, Fourier transforms, autocast and tokens of one type."""
import pytest
import torch
from torch import nn

from helpers_symmetry import random
from symbnn.errors import Refusal
from symbnn.symmetry.actions import Action, natural_action, regular_channels, sign_change
from symbnn.symmetry.fields import field, flips, rotations, shifts
from symbnn.symmetry.groups import Cyclic, Permutations
from symbnn.symmetry.hyperoctahedral import Signed
from symbnn.symmetry.networks import intertwining_error, network_action
from tolerances import assert_close, exact64

GROUP = Permutations(4)
SET = Action.product(natural_action(GROUP), Action.trivial(GROUP, (3,)))  # four tokens of three features
SERIES = Action.product(Action.trivial(Cyclic(2), (5,)), sign_change(4).absolute())
VECTORS = Action.product(Action.trivial(Signed(3), (4,)), natural_action(Signed(3)))  # four vectors in space
IMAGE = field(rotations(), (2, 4, 4))


class Net(nn.Module):
    """A function of a module that holds layers and tensors."""

    def __init__(self, function, **held):
        super().__init__()
        self.function = function
        for name, value in held.items():
            is_buffer = isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)
            self.register_buffer(name, value) if is_buffer else setattr(self, name, value)

    def forward(self, x):
        """What the function makes of it."""
        return self.function(self, x)


def derived(function, action, hidden="trivial", output=None, **held):
    """The action on a network with weights of order one, and how far it is from exact."""
    net = Net(function, **held).double().eval()
    for k, parameter in enumerate(net.parameters()):
        parameter.data.copy_(random(*parameter.shape, seed=k))
    found = network_action(net, action, hidden=hidden, output=output)
    return found, intertwining_error(net, found, random(3, *action.shape))


# Structures of outputs


def test_none_stays_none():
    found, error = derived(lambda n, x: {"y": n.a(x), "no": None, "more": [None, x]}, SET, a=nn.Linear(3, 2))
    assert error <= exact64 and found.output["no"] is None and found.output["more"][0] is None
    assert not found.output["y"].agrees_with(Action.trivial(GROUP, (4, 2)))
    found, error = derived(lambda n, x: n.a(x, x, x, need_weights=False), SET,
                           a=nn.MultiheadAttention(3, 1, batch_first=True))
    assert error <= exact64 and found.output[1] is None


def test_a_network_of_no_outputs_and_an_action_on_none_are_refused():
    with pytest.raises(Refusal, match="returns None"):
        derived(lambda n, x: (None, None), SET)
    with pytest.raises(Refusal, match="no action for an output that is None"):
        derived(lambda n, x: (None, x), SET, output=(Action.trivial(GROUP, (2,)), None))


@pytest.mark.parametrize("kind", (nn.LSTM, nn.GRU, nn.RNN))
@pytest.mark.parametrize("layers, both", ((1, False), (2, True)))
def test_states_of_recurrent_layers_are_outputs(kind, layers, both):
    found, error = derived(lambda n, x: n.a(x), SERIES, a=kind(4, 4, layers, batch_first=True, bidirectional=both))
    assert error <= exact64
    states = found.output[1] if kind is nn.LSTM else (found.output[1],)
    assert all(its.shape == (4,) for its in states)  # behind layers and batch


@pytest.mark.parametrize("kind", (nn.LSTM, nn.GRU))
def test_states_move_as_they_are_told(kind):
    units = regular_channels(Cyclic(2), 2)
    through = Action.product(Action.trivial(Cyclic(2), (5,)), units)
    states = (units, units) if kind is nn.LSTM else units
    found, error = derived(lambda n, x: n.a(x), SERIES, output=(through, states), a=kind(4, 4, 2, batch_first=True))
    assert error <= exact64
    weight = found.parameters["a.weight_hh_l0"]
    assert not weight.agrees_with(Action.trivial(Cyclic(2), weight.shape))


def test_one_output_has_its_batch_first_and_no_moved_axis_stands_before_it():
    with pytest.raises(Refusal, match="batch that is not the first axis"):
        derived(lambda n, x: n.a(x)[1], SERIES, a=nn.GRU(4, 4, batch_first=True))
    with pytest.raises(Refusal, match="batch that is not the first axis"):
        derived(lambda n, x: (x, x.transpose(0, 1)), SET)


# Operators


def ranks(name, **options):
    return lambda n, x: getattr(torch, name)(x, dim=1, **options)


EXACT = {
    "distances in a set": (lambda n, x: torch.cdist(n.a(x), x), SET, {"a": nn.Linear(3, 3)}),
    "distances to prototypes": (lambda n, x: torch.cdist(x, n.p, p=1.0), SET, {"p": nn.Parameter(torch.zeros(5, 3))}),
    "distances of vectors": (lambda n, x: torch.cdist(x, x.flip(1), p=3.0), VECTORS, {}),
    "distances to vectors that move": (lambda n, x: torch.cdist(x, n.p), VECTORS,
                                       {"p": nn.Parameter(torch.zeros(5, 3))}),
    "medians": (lambda n, x: x.median(1).values, SET, {}),
    "medians without NaN": (lambda n, x: x.nanmedian(1)[0], SET, {}),
    "a quantile": (ranks("quantile", q=0.3), SET, {}),
    "quantiles": (lambda n, x: n.a(x).quantile(n.q, 1, keepdim=True).transpose(0, 1), SET,
                  {"a": nn.Linear(3, 2), "q": torch.tensor([0.25, 0.5], dtype=torch.float64)}),
    "quantiles without NaN": (ranks("nanquantile", q=0.3, keepdim=True, interpolation="lower"), SET, {}),
    "quantiles along features": (lambda n, x: x.quantile(0.3, -1), SET, {}),
    "sorted": (lambda n, x: n.a(torch.sort(x, dim=1, stable=True).values.flatten(1)), SET, {"a": nn.Linear(12, 2)}),
    "sorted along the first axis": (lambda n, x: n.a(torch.msort(x.transpose(0, 1)).transpose(0, 1)), SET,
                                    {"a": nn.Linear(3, 2)}),
    "frequencies of features": (lambda n, x: torch.fft.rfft(n.a(x)).abs(), SET, {"a": nn.Linear(3, 5)}),
    "frequencies cut and padded": (
        lambda n, x: torch.fft.irfft(torch.fft.fft(x, 6, -1).real + torch.fft.hfft(x, 6), 7, -1), SET, {}),
    "frequencies of two axes": (lambda n, x: torch.fft.ifft2(torch.fft.rfft2(x, (5, 4))).imag,
                                Action.product(natural_action(GROUP), Action.trivial(GROUP, (4, 4))), {}),
    "frequencies with signs": (lambda n, x: torch.fft.fftn(n.a(x), dim=1).real, Action.product(
        Action.trivial(Cyclic(2), (5,)), sign_change(4)), {"a": nn.Linear(4, 2, bias=False)}),
    "tokens of type zero": (lambda n, x: n.a(x) + n.t(torch.zeros(x.shape[:2], dtype=torch.long)), SET,
                            {"a": nn.Linear(3, 6), "t": nn.Embedding(2, 6)}),
    "tokens of the last type": (
        lambda n, x: n.a(x) + n.t(n.i.expand(len(x), 4)), SET,
        {"a": nn.Linear(3, 6), "t": nn.Embedding(2, 6), "i": torch.ones(1, 4, dtype=torch.long)}),
    "one type for all": (lambda n, x: n.a(x) + n.t(torch.tensor(1)), SET,
                         {"a": nn.Linear(3, 6), "t": nn.Embedding(2, 6)}),
    "one place many times": (lambda n, x: x @ n.p[torch.tensor([1, 1, 1])].T, SET,
                             {"p": nn.Parameter(torch.zeros(2, 3))}),
    "autocast": (lambda n, x: n.b(torch.autocast("cpu", torch.bfloat16)(lambda: torch.relu_(n.a(x)))()), SET,
                 {"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)}),
}

REFUSED = {
    "distances of what changes its sign": (lambda n, x: torch.cdist(x.unsqueeze(-1), n.p), sign_change(4), {
        "p": nn.Parameter(torch.zeros(3, 1))}, "differences of vectors"),
    "distances to places that stay": (lambda n, x: torch.cdist(x, n.c), VECTORS, {"c": torch.eye(3)[:2]}, "constant"),
    "a quantile along one axis of two": (lambda n, x: x.quantile(0.5, -1), IMAGE, {}, "exchange"),
    "a quantile with signs": (lambda n, x: x.quantile(0.5, 1), VECTORS, {}, "change of sign"),
    "an order of examples": (lambda n, x: torch.msort(x), SET, {}, "ranked along the batch"),
    "a quantile of all": (lambda n, x: torch.quantile(x, 0.5), SET, {}, "batch"),
    "an order that is learned": (lambda n, x: x.quantile(torch.sigmoid(n.q), 1), SET,
                                 {"q": nn.Parameter(torch.zeros(1))}, "order that is learned"),
    "frequencies of tokens": (lambda n, x: torch.fft.fft(x, dim=1).real, SET, {}, "mixes all frequencies"),
    "frequencies of pixels": (lambda n, x: torch.fft.rfft2(x).abs(), IMAGE, {}, "phases"),
    "frequencies under shifts": (lambda n, x: torch.fft.fft(x).abs(), field(shifts(4), (2, 4, 4)), {}, "phases"),
    "a complex constant": (lambda n, x: (x * torch.complex(n.o, n.c)).imag, field(flips(), (1, 4, 4)),
                           {"o": torch.ones(4, dtype=torch.float64), "c": torch.arange(4.0, dtype=torch.float64)},
                           "a mask, an encoding"),
    "tokens of two types": (lambda n, x: n.a(x) + n.t(torch.tensor([0, 1, 0, 1])), SET,
                            {"a": nn.Linear(3, 6), "t": nn.Embedding(2, 6)}, "stays beside one that is moved"),
    "one row of a table that moves": (lambda n, x: x[:, torch.tensor([1, 1])], SET, {}, "chosen by their numbers"),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_commutes_is_accepted_and_exact(name):
    function, action, held = EXACT[name]
    assert derived(function, action, **held)[1] <= 1e-12


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_is_refused_with_its_reason(name):
    function, action, held, reason = REFUSED[name]
    with pytest.raises(Refusal, match=reason):
        derived(function, action, **held)


def test_rows_that_are_repeated_carry_signs_along_their_features_alone():
    plain = Action.product(Action.trivial(Cyclic(2), (4,)), sign_change(3))
    found, error = derived(lambda n, x: x + n.t(torch.zeros(4, dtype=torch.long)), plain, t=nn.Embedding(2, 3))
    assert error <= 1e-12
    assert_close(found.parameters["t.weight"].act(1, torch.ones(2, 3)), -torch.ones(2, 3))
