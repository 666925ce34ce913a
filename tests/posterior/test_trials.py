"""Trials on a few rows: what they find, and what must not mislead them."""
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers import seeded
from helpers_posterior import UNSEEN, Written, linear, loop, made
from symbnn.posterior.layers import with_posteriors
from symbnn.posterior.plans import execution_plan
from symbnn.posterior.sampling import apply_weights, forward, predict, sample_weights
from tolerances import assert_close


@pytest.mark.parametrize("x", [
    torch.zeros(6, 5, 3), torch.ones(6, 5, 3), torch.randn(1, 5, 3), torch.full((6, 5, 3), torch.nan),
], ids=["zeros", "ones", "one row", "nan"])
def test_inputs_that_tell_nothing_do_not_mislead(x):
    plain, network, real, _ = made("time first, linear")
    apply_weights(network, x.double(), sample_weights(network, 2, seeded()))  # the first look at the network
    weights = sample_weights(network, 4, seeded(1))
    assert_close(apply_weights(network, real, weights), loop(plain, real, weights), UNSEEN)
    narrow = with_posteriors(plain, scale=1e-9)  # draws that hardly differ
    apply_weights(narrow, x.double(), sample_weights(narrow, 2, seeded()))
    assert_close(apply_weights(narrow, real, weights), loop(plain, real, weights), UNSEEN)


def test_a_trial_in_the_networks_own_precision():
    """Code that insists on float32 cannot be tried in float64."""
    for run, together in ((lambda m, x: m.a(x.float()), True),
                          (lambda m, x: m.a(x.float().transpose(0, 1)).transpose(0, 1), False)):
        torch.manual_seed(0)
        plain, x = Written(run, a=linear()), torch.randn(4, 5, 3)
        network = with_posteriors(plain)
        assert execution_plan(network, x).together is together
        weights = sample_weights(network, 3, seeded())
        assert_close(apply_weights(network, x, weights), loop(plain, x, weights), 1e-5)


def test_networks_that_are_off_can_be_trained():
    torch.manual_seed(0)
    off = nn.Sequential(linear(3, 1), nn.ReLU(), linear(1, 2))  # one unit: in most trials off for all rows
    assert execution_plan(with_posteriors(off), torch.rand(6, 3)).together
    constant = with_posteriors(Written(lambda m, x: 0 * m.a(x), a=linear()))
    plan = execution_plan(constant, torch.rand(6, 3))
    assert not plan.together and "do not depend" in str(plan)
    assert len(forward(constant, torch.rand(6, 3), 3, "split")[0]) == 6


class RandomDepth(nn.Module):
    """Drops examples at random in training mode, with torch's own generator."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        keep = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(0.5) if self.training else 1.0
        return x + keep * F.dropout(self.inner(x), 0.2, self.training)


def test_dropout_does_not_hide_where_rows_are_and_other_noise_runs_draw_by_draw():
    torch.manual_seed(0)
    x = torch.randn(6, 5, 3)
    dropouts = nn.Sequential(linear(), nn.Dropout(0.3), Written(lambda m, x: F.dropout(m.a(x), 0.2, m.training),
                                                              a=linear()))
    plan = execution_plan(with_posteriors(dropouts).train(), x)
    assert plan.together and plan.random
    first = Written(lambda m, x: F.dropout(m.a(x.transpose(0, 1)).transpose(0, 1), 0.2, m.training), a=linear())
    assert not execution_plan(with_posteriors(first).train(), x).together
    for noisy in (RandomDepth(linear()), Written(lambda m, x: m.a(x)[torch.randperm(len(x))], a=linear()),
                  Written(lambda m, x: m.a(x) + torch.rand(len(x), 1, 1).argsort(0), a=linear()),
                  Written(lambda m, x: m.a(x) * torch.bernoulli(torch.tensor(0.5)), a=linear())):
        network = with_posteriors(noisy).train()
        plan = execution_plan(network, x)
        assert not plan.together and not plan.in_pieces and plan.random
        assert len(forward(network, x, 3, "split")[0]) == 6
        assert execution_plan(with_posteriors(RandomDepth(linear())).eval(), x).together
    coins = forward(with_posteriors(Written(lambda m, x: 0 * m.a(x) + torch.rand(()), a=linear())), x, 50)
    assert len(coins[:, 0, 0, 0].unique()) == 50  # a coin for each draw, as in the loop


class ScaledBackward(torch.autograd.Function):
    """The identity, whose gradient is divided by the norm of all rows' gradients."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, slope):
        return slope / slope.norm()


def clipped(h):
    if h.requires_grad:
        h.register_hook(lambda slope: slope.clamp(-slope.abs().mean(), slope.abs().mean()))
    return h


GRADIENTS = {
    "a function with a gradient of its own": lambda m, x: ScaledBackward.apply(m.a(x)),
    "a hook on a tensor": lambda m, x: clipped(m.a(x)),
    "a value that has a gradient alone": lambda m, x: (h := m.a(x)) + (h.mean(0) - h.mean(0).detach()),
    "a branch on gradients": lambda m, x: (h := m.a(x)) - (h.mean(0) if torch.is_grad_enabled() else 0),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_decide_too(name):
    torch.manual_seed(0)
    plain = Written(GRADIENTS[name], a=linear()).double()
    network, x = with_posteriors(plain), torch.randn(6, 3, dtype=torch.float64)
    parameters, weights = list(network.parameters()), sample_weights(network, 3, seeded(1))
    ours, theirs = apply_weights(network, x, weights), loop(plain, x, weights)
    assert_close(ours, theirs, UNSEEN)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), parameters, retain_graph=True) for y in (ours, theirs))):
        assert_close(a, b, UNSEEN)
    with torch.no_grad():
        assert_close(predict(network, x, weights=weights, memory=1), loop(plain, x, weights), UNSEEN)


MODES = {
    "a norm as a function": lambda m, x: F.batch_norm(m.a(x), m.n.running_mean, m.n.running_var, training=m.n.training),
    "a branch on a child's mode": lambda m, x: (h := m.a(x)) - h.mean(0) if m.b.training else m.a(x),
}


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("training", [True, False])
def test_code_that_asks_for_the_mode_of_a_child(name, training):
    torch.manual_seed(0)
    plain = Written(MODES[name], a=linear(), b=nn.Sequential(nn.Tanh()), n=nn.BatchNorm1d(3)).double().train(training)
    network, x = with_posteriors(plain), torch.randn(6, 3, dtype=torch.float64)
    weights = sample_weights(network, 3, seeded(1))
    assert_close(apply_weights(network, x, weights), loop(plain, x, weights), UNSEEN)
    assert_close(predict(network, x, weights=weights, memory=1), loop(plain.eval(), x, weights), UNSEEN)


class Filled(nn.Module):
    """Keeps what it has seen first: a buffer that is filled, a table by length, a list of what it has seen."""

    def __init__(self):
        super().__init__()
        self.a, self.table, self.seen = linear(), {}, []
        self.register_buffer("mean", None)

    def forward(self, x):
        if self.mean is None:
            self.mean = x.detach().mean(0)
        shift = self.table.setdefault(x.shape[1], torch.ones(x.shape[1], dtype=x.dtype))
        self.seen.append(len(x))
        return self.a(x - self.mean) + shift


def test_trials_leave_nothing_behind_and_predictions_no_buffers():
    torch.manual_seed(0)
    network, x = with_posteriors(Filled()), torch.randn(6, 3)
    execution_plan(network, x)
    assert network.mean is None and not network.table and not network.seen
    predict(network, x, draws=2)
    assert network.mean is None
    weights = sample_weights(network, 2, seeded())
    expected = torch.stack([(x - x.mean(0)) @ w.T + b + 1 for w, b in zip(weights["a.weight"], weights["a.bias"])])
    assert_close(predict(network, x, weights=weights), expected, 1e-5)


def test_small_columns_count():
    """In float32, where one column is a million times larger than the one that is mixed."""
    scale = torch.tensor([1e6, 1.0, 1.0])
    plain = Written(lambda m, x: m.a(x.float()) * scale + torch.cat([0 * x[:, :2], x[:, 2:].flip(0)], 1), a=linear())
    network, x = with_posteriors(plain), torch.randn(6, 3)
    weights = sample_weights(network, 3, seeded(1))
    for memory in (1, None):
        found = predict(network, x, weights=weights, memory=memory)
        assert_close(found[..., 1:], loop(plain, x, weights)[..., 1:], 1e-4)
