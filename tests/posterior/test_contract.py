"""The contract of draws: what a call gives is the loop over draws with the plain network, and nothing else happens."""

import copy
import sys
import threading
import weakref
from collections import OrderedDict, defaultdict, deque, namedtuple
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from symbnn.errors import Refusal
from symbnn.posterior import plans
from symbnn.posterior.layers import kl_per_datum, posterior_mean_network, variational_tensors, with_posteriors
from symbnn.posterior.plans import execution_plan
from symbnn.posterior.priors import isotropic
from symbnn.posterior.sampling import apply_weights, forward, mean_weights, predict, sample_weights
from tolerances import assert_close, exact64

TOGETHER, BY_DRAW, WHOLE = "all draws at once", "one draw at a time: ", "one draw at a time, on the whole batch"
UNSEEN = 1e-9  # float64, summed in another order


class Written(nn.Module):
    """A network whose forward pass is a function of its modules and the input."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.run(self, x)


def linear(inputs=3, outputs=3, **options):
    return nn.Linear(inputs, outputs, **options)


def frozen(module):
    return module.requires_grad_(False)


def shared_encoder():
    return Written(lambda m, x: (lambda a, b: (a - b).square())(*m.e(torch.cat(x.unbind(1), 0)).chunk(2)), e=linear())


def graph_by_edges(m, x):
    h = m.a(x)
    return m.b(torch.zeros_like(h).index_add(0, m.edges[1], h[m.edges[0]]))


def nodes_as_rows():
    network = Written(graph_by_edges, a=linear(), b=linear(3, 2))
    network.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]]))
    return network


def with_table():
    network = Written(lambda m, x: x @ m.a(m.table).mT, a=linear())
    network.register_buffer("table", torch.randn(4, 3))
    return network


class MaskedNorm(nn.Module):
    """Looks at its own layers, as a forward pass may."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([linear(), nn.Tanh(), linear()])
        self.aliases = [self.layers[0], self.layers[2]]

    def forward(self, x):
        assert next(self.parameters()).dtype == x.dtype
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                x = F.pad(x, (0, layer.in_features - x.shape[-1])).to(layer.weight.dtype)
                assert layer.weight.shape[1] == x.shape[-1]
            x = layer(x)
        return self.aliases[1](x)


IMAGE, VECTOR, SEQUENCE = (6, 2, 5, 5), (6, 3), (6, 5, 3)
conv = lambda *sizes, **options: nn.Conv2d(*sizes, 3, **options)  # noqa: E731
ZOO = {
    # name: (network, shape of inputs, plan)
    "mlp": (lambda: nn.Sequential(linear(3, 5), nn.ReLU(), linear(5, 2)), VECTOR, TOGETHER),
    "cnn": (lambda: nn.Sequential(conv(2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), linear(3, 2)), IMAGE, TOGETHER),
    "view after a convolution": (lambda: Written(lambda m, x: m.b((h := m.a(x)).view(h.size(0), -1)), a=conv(2, 3),
                                                 b=linear(27, 2)), IMAGE, TOGETHER),
    "view of the input": (lambda: Written(lambda m, x: m.a(x.view(len(x), -1)), a=linear(50, 2)), IMAGE, TOGETHER),
    "tokens": (lambda: nn.Sequential(linear(), nn.GELU(), linear(3, 2)), SEQUENCE, TOGETHER),
    "residual": (lambda: Written(lambda m, x: x + m.a(torch.tanh(m.a(x))), a=linear()), VECTOR, TOGETHER),
    "norms": (lambda: nn.Sequential(conv(2, 4), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.ReLU(), conv(4, 2)), IMAGE,
              TOGETHER),
    "copies as rows": (lambda: Written(lambda m, x: m.a(x.flatten(0, 1)).unflatten(0, x.shape[:2]).sum(1), a=linear()),
                       SEQUENCE, TOGETHER),
    "looks at its layers": (MaskedNorm, VECTOR, TOGETHER),
    "frozen recurrent": (lambda: Written(lambda m, x: m.b(m.a(x)[0][:, -1]), a=frozen(nn.LSTM(3, 4, batch_first=True)),
                                         b=linear(4, 2)), SEQUENCE, TOGETHER),
    "frozen bias": (lambda: Written(lambda m, x: m.a(x), a=(lambda a: (frozen(a.bias), a)[1])(linear())), VECTOR,
                    TOGETHER),
    "frozen weight": (lambda: Written(lambda m, x: m.a(x), a=(lambda a: (frozen(a.weight), a)[1])(conv(2, 3))), IMAGE,
                      TOGETHER),
    "attention over tokens": (lambda: Written(lambda m, x: F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x)),
                                              q=linear(), k=linear(), v=linear()), SEQUENCE, TOGETHER),
    "time first, linear": (lambda: Written(lambda m, x: torch.tanh(m.a(x.transpose(0, 1))).transpose(0, 1), a=linear()),
                           SEQUENCE, BY_DRAW),
    "time first, recurrent": (lambda: Written(lambda m, x: m.b(m.r(m.a(x.transpose(0, 1)))[0])[-1], a=linear(),
                                              r=frozen(nn.LSTM(3, 4)), b=linear(4, 2)), SEQUENCE, BY_DRAW),
    "channels first": (lambda: Written(lambda m, x: m.a(x.movedim(1, 0)).mean(0), a=linear()), SEQUENCE, BY_DRAW),
    "siamese": (shared_encoder, (6, 2, 3), BY_DRAW),
    "table without a batch": (with_table, VECTOR, BY_DRAW),
    "uses a weight itself": (lambda: Written(lambda m, x: F.linear(m.a(x), m.a.weight.mT), a=linear(3, 5)), VECTOR,
                             BY_DRAW),
    "penalty in the output": (lambda: Written(lambda m, x: m.a(x) + sum(p.norm() for p in m.parameters()), a=linear()),
                              VECTOR, BY_DRAW),
    "branch that starts at zero": (lambda: Written(lambda m, x: m.a(x) + m.gate.weight.sum() * m.a(x.flip(0)),
                                                   a=linear(), gate=frozen(nn.LayerNorm(1))), VECTOR, WHOLE),
    "nodes as rows": (nodes_as_rows, VECTOR, WHOLE),
    "attention over the batch": (lambda: Written(lambda m, x: (m.a(x) @ m.a(x).mT).softmax(-1) @ x, a=linear()), VECTOR,
                                 WHOLE),
    "centred over the batch": (lambda: Written(lambda m, x: (h := m.a(x)) - h.mean(0), a=linear()), VECTOR, WHOLE),
    "normed by the largest": (lambda: Written(lambda m, x: (h := m.a(x)) / h.abs().max(), a=linear()), VECTOR, WHOLE),
    "convolution along the batch": (lambda: Written(lambda m, x: m.a(x.T[None])[0].T, a=nn.Conv1d(3, 2, 3, padding=1)),
                                    VECTOR, WHOLE),
    "decides by a value": (lambda: Written(lambda m, x: h if (h := m.a(x)).mean() > 0.05 else -h, a=linear()), VECTOR,
                           WHOLE),
    "selects by a mask": (lambda: Written(lambda m, x: m.b(torch.relu(h)[h[:, 0] > -9]) if len(h := m.a(x)) else h,
                                          a=linear(), b=linear()), VECTOR, WHOLE),
    "fixed batch": (lambda: Written(lambda m, x: m.a(x.view(6, 3)), a=linear()), VECTOR, WHOLE),
    "no rows in the output": (lambda: Written(lambda m, x: m.a(x).mean(0), a=linear()), VECTOR, WHOLE),
    "squeezes": (lambda: Written(lambda m, x: m.a(x).squeeze(), a=linear(3, 1)), VECTOR, WHOLE),
}
NAMES = list(ZOO)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def made(name, **options):
    build, shape, plan = ZOO[name]
    torch.manual_seed(0)
    plain = build().double()
    if name == "branch that starts at zero":
        nn.init.zeros_(plain.gate.weight)
    if name == "norms":
        plain.eval()
    return plain, with_posteriors(plain, scale=0.3, **options), torch.randn(shape, dtype=torch.float64), plan


def loop(plain, x, weights, state=None):
    """The definition: one plain network a draw."""
    draws = len(next(iter(weights.values())))
    state = dict(plain.state_dict()) if state is None else state
    plain = copy.deepcopy(plain)
    return torch.stack([
        functional_call(plain, {**state, **{name: weight[s] for name, weight in weights.items()}}, (x.clone(),))
        for s in range(draws)
    ])


@pytest.mark.parametrize("name", NAMES)
def test_given_weights_and_fresh_draws_equal_the_loop(name):
    plain, network, x, plan = made(name)
    assert str(execution_plan(network, x)).startswith(plan)
    weights = sample_weights(network, 5, seeded(1))
    expected = loop(plain, x, weights)
    assert_close(apply_weights(network, x, weights), expected, UNSEEN)
    assert_close(forward(network, x, 5, "whole", seeded(1)), expected, UNSEEN)
    assert_close(apply_weights(network, x, mean_weights(network)), loop(plain, x, mean_weights(network)), UNSEEN)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("memory", [1, 3000, 2**30])
def test_predictions_equal_the_loop_whatever_the_memory(name, memory):
    plain, network, x, _ = made(name)
    network.train()
    plain.eval()
    weights = sample_weights(network, 18, seeded(1))
    kept = x.clone()
    assert_close(predict(network, x, weights=weights, memory=memory), loop(plain, x, weights), UNSEEN)
    fresh = [predict(network, x, draws=18, memory=size, generator=seeded(2)) for size in (memory, 10**9)]
    assert_close(*fresh, UNSEEN)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_those_of_the_loop(name):
    plain, network, x, _ = made(name)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    weights = sample_weights(network, 3, seeded(1))
    found = [torch.autograd.grad(y.square().sum(), parameters, retain_graph=True, allow_unused=True)
             for y in (apply_weights(network, x, weights), loop(plain, x, weights))]
    for ours, theirs in zip(*found):
        if theirs is not None:  # a frozen branch
            assert_close(ours, theirs, UNSEEN)


@pytest.mark.parametrize("name", [name for name in NAMES if ZOO[name][2] != WHOLE])
@pytest.mark.parametrize("runs", [1, 2, 3, 4])
def test_split_is_the_plain_network_on_each_run_of_rows(name, runs):
    plain, network, x, _ = made(name)
    weights = sample_weights(network, runs, seeded(1))
    padded = torch.cat([x, x[: -len(x) % runs]])
    parts = [loop(plain, run, {key: w[s : s + 1] for key, w in weights.items()})[0]
             for s, run in enumerate(padded.chunk(runs))]
    assert_close(forward(network, x, runs, "split", seeded(1))[0], torch.cat(parts)[: len(x)], UNSEEN)


@pytest.mark.parametrize("name", NAMES)
def test_estimators_with_noise_for_rows_ask_for_rows(name):
    _, network, x, plan = made(name)
    for estimator in ("flipout", "local"):
        if plan == TOGETHER and (estimator == "flipout" or name not in ("residual", "looks at its layers")):
            assert len(forward(network, x, 2, estimator, seeded())[0]) == len(x)
        else:  # "local" also refuses a layer that each input passes twice
            with pytest.raises(Refusal, match=r"split|whole"):
                forward(network, x, 2, estimator)
    if plan == WHOLE and name not in ("decides by a value", "selects by a mask"):  # a run of rows is a batch, too
        with pytest.raises(Refusal, match="whole"):
            forward(network, x, 2, "split")


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


def test_half_precision_equals_the_loop():
    torch.manual_seed(0)
    plain = nn.Sequential(linear(3, 8), nn.ReLU(), linear(8, 2)).bfloat16()
    network, x = with_posteriors(plain), torch.randn(5, 3).bfloat16()
    assert execution_plan(network, x).together
    weights = sample_weights(network, 3, seeded())
    assert_close(apply_weights(network, x, weights).float(), loop(plain, x, weights).float(), 2e-2)


def test_the_slow_way_is_said(caplog):
    _, network, x, _ = made("siamese")
    with caplog.at_level("WARNING", "symbnn"):
        predict(network, x, draws=2)
        predict(network, x, draws=2)
    assert [record.getMessage() for record in caplog.records] == [
        "Written: one draw at a time: its layers do not see the examples as rows, in their order"]


# --- nothing about a call leaks ---------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, active, reentrant):
        super().__init__()
        self.block, self.head = nn.Sequential(linear(3, 5), nn.Tanh(), nn.Dropout(0.5)), linear(5, 2)
        self.active, self.reentrant = active, reentrant

    def forward(self, x):
        h = checkpoint(self.block, x, use_reentrant=self.reentrant) if self.active else self.block(x)
        return self.head(h)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("estimator", ["whole", "split", "flipout", "local"])
def test_a_backward_pass_that_recomputes_has_its_weights(estimator, reentrant):
    def gradients(active):
        torch.manual_seed(0)
        network = with_posteriors(Checkpointed(active, reentrant).double())
        x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)  # reentrant: some input has a gradient
        torch.manual_seed(1)
        forward(network, x, 3, estimator, seeded()).square().sum().backward()
        return [parameter.grad for parameter in network.parameters()]

    for ours, theirs in zip(gradients(True), gradients(False)):
        assert_close(ours, theirs, exact64)


def hammered(calls, threads=4):
    """Run calls in threads that take turns as often as Python allows; what each gave, in order."""
    found, interval = [[None] * len(calls) for _ in range(threads)], sys.getswitchinterval()
    go = threading.Barrier(threads)

    def work(k):
        go.wait()
        for i in range(len(calls)):
            j = (i + k) % len(calls)
            found[k][j] = calls[j]()

    sys.setswitchinterval(1e-6)
    try:
        workers = [threading.Thread(target=work, args=(k,)) for k in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
    return found


@pytest.mark.parametrize("name", ["cnn", "norms", "time first, linear", "siamese"])
def test_threads_that_share_a_network_do_not_see_each_other(name):
    _, network, x, _ = made(name)
    network.train()
    calls = []
    for seed in range(12):
        part, weights = x[: 1 + seed % len(x)], sample_weights(network, 1 + seed % 4, seeded(seed))
        calls.append(lambda part=part, weights=weights: predict(network, part, weights=weights, memory=2000))
        if name != "norms":  # in training mode its statistics move
            calls.append(lambda part=part, weights=weights: apply_weights(network, part, weights).detach())
    expected = [call() for call in calls]
    for found in hammered(calls):
        for ours, theirs in zip(found, expected):
            assert_close(ours, theirs, UNSEEN)


def state(network):
    tensors = {name: value.clone() for name, value in network.state_dict().items()}
    return tensors, [module.training for module in network.modules()]


def same(before, after):
    return before[1] == after[1] and all(torch.equal(value, after[0][name]) for name, value in before[0].items())


class Counts(nn.Module):
    """A layer that changes a buffer in place, and one that it reassigns, in either mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.last = x.detach().mean()
        return x


@pytest.mark.parametrize("modes", ["train", "eval", "frozen norm"])
def test_a_prediction_changes_neither_buffers_nor_modes_nor_the_worlds_generator(modes):
    torch.manual_seed(0)
    network = with_posteriors(nn.Sequential(
        conv(2, 4), nn.BatchNorm2d(4), nn.Dropout(0.5), Counts(), nn.InstanceNorm2d(4, track_running_stats=True),
        nn.Flatten(), linear(36, 2)).double())
    network.train(modes != "eval")
    network[1].train(modes == "train")
    x, before, world = torch.randn(IMAGE, dtype=torch.float64), state(network), torch.get_rng_state()
    one, other = (predict(network, x, draws=4, memory=memory, generator=seeded()) for memory in (1, 10**9))
    assert_close(one, other, UNSEEN)
    assert_close(one, predict(copy.deepcopy(network).eval(), x, draws=4, generator=seeded()), UNSEEN)
    assert same(before, state(network))
    assert torch.equal(world, torch.get_rng_state())


def test_a_step_in_training_mode_moves_statistics_as_the_loop_does():
    torch.manual_seed(0)
    norms = nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None)
    plain = nn.Sequential(conv(2, 4), norms[0], nn.ReLU(), conv(4, 4), norms[1]).double()
    x = torch.randn(6, 2, 7, 7, dtype=torch.float64)
    for estimator, draws in (("whole", 3), ("split", 3)):
        network, looped = with_posteriors(plain), copy.deepcopy(plain)
        weights = sample_weights(network, draws, seeded())
        pieces = [x] * draws if estimator == "whole" else x.chunk(draws)
        tensors = [{name: weight[s] for name, weight in weights.items()} for s in range(draws)]
        expected = [functional_call(looped, one, (piece,)) for one, piece in zip(tensors, pieces)]
        found = forward(network, x, draws, estimator, seeded())
        assert_close(found.flatten(0, 1), torch.cat(expected), UNSEEN)
        for name, value in looped.named_buffers():
            assert_close(network.get_buffer(name), value, UNSEEN)


def test_batch_statistics_leave_two_rows_in_each_run():
    network = with_posteriors(nn.Sequential(linear(3, 4), nn.BatchNorm1d(4), linear(4, 2))).train()
    x = torch.randn(5, 3)
    assert torch.isfinite(forward(network, x, 4, "split")).all()
    assert len(forward(network, x[:2], 4, "split")[0]) == 2
    with pytest.raises(ValueError, match="more than 1 value"):
        forward(network, x[:1], 4, "split")
    assert len(predict(network, x[:1], draws=2)) == 2  # in evaluation mode one row is enough


def reads_a_constant(m, x):
    assert m.table.sum().item() > 0  # of the network, not of the inputs
    return m.a(x) * float(m.table[0, 0]) if m.table.tolist() else x


def test_looking_at_constants_is_no_looking_at_values():
    torch.manual_seed(0)
    plain, x = Written(reads_a_constant, a=linear()), torch.randn(6, 3)
    plain.register_buffer("table", torch.ones(2, 2))
    assert execution_plan(with_posteriors(plain), x).together
    for look in (lambda h: bool(torch.isfinite(h).all()), lambda h: h.tolist(), lambda h: h.numpy(), lambda h: h[h > 9],
                 lambda h: torch.equal(h, h), lambda h: h.nonzero()):
        network = with_posteriors(Written(lambda m, x, look=look: (h := m.a(x), look(h.detach()))[0], a=linear()))
        plan = execution_plan(network, x)
        assert plan.separable and not plan.in_pieces and not plan.together
        assert len(forward(network, x, 3, "split")[0]) == 6  # a run of rows is a batch of its own


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


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # raised inside the compiler
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_compiled_networks_predict_and_train(backend):
    plain, network, x, _ = made("mlp")
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    weights = sample_weights(compiled, 3, seeded())
    assert list(weights) == list(variational_tensors(network))
    assert_close(predict(compiled, x, weights=weights), loop(plain, x, weights), UNSEEN)
    for estimator in ("whole", "split", "flipout", "local"):
        ours, theirs = (forward(one, x, 2, estimator, seeded()) for one in (compiled, network))
        assert_close(ours, theirs, UNSEEN)
    apply_weights(compiled, x, weights).sum().backward()
    first = torch.compile(nn.Sequential(linear(), nn.ReLU()), backend=backend)
    inside = with_posteriors(nn.Sequential(first, linear()))
    assert len(predict(inside, x.float(), draws=2)) == 2
    in_place = with_posteriors(plain)
    in_place.compile(backend=backend)
    assert_close(apply_weights(in_place, x, weights), loop(plain, x, weights), UNSEEN)


# --- what a converted network keeps -----------------------------------------------------------------------------------


def test_conversion_keeps_what_a_layer_has():
    calls, layer = [], linear()
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    layer.register_full_backward_hook(lambda module, before, after: calls.append("backward"))
    layer.register_buffer("note", torch.ones(2))
    layer.inner = nn.Tanh()
    plain = nn.Sequential(layer, linear()).double()
    network, x = with_posteriors(plain), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(network[0].note, torch.ones(2, dtype=torch.float64))
    assert isinstance(network[0].inner, nn.Tanh)
    assert (network[0].in_features, network[0].weight.shape, network[0].weight.dtype, network[0].weight.device) == (
        3, (3, 3), torch.float64, torch.device("cpu"))
    weights = sample_weights(network, 2, seeded())
    out = apply_weights(network, x, weights)
    assert_close(out, loop(plain, x, weights), UNSEEN)
    calls.clear()
    out.sum().backward()
    assert calls == ["backward"] * 2  # the forward hook changes what it sees, so there is a call for each draw
    back = posterior_mean_network(network)
    assert torch.equal(back[0].note, plain[0].note)
    assert_close(back(x), plain(x), exact64)


def test_frozen_weights_stay_deterministic_and_frozen():
    plain = nn.Sequential(linear(), nn.ReLU(), linear(), nn.Linear(3, 2))
    plain[0].requires_grad_(False)
    plain[2].bias.requires_grad_(False)
    network = with_posteriors(plain)
    assert list(variational_tensors(network)) == ["2.weight", "3.weight", "3.bias"]
    assert not network[0].weight.requires_grad
    assert not network[2].bias.requires_grad
    back = posterior_mean_network(network)
    assert [p.requires_grad for p in back.parameters()] == [
        dict(plain.named_parameters())[name].requires_grad for name, _ in back.named_parameters()]
    variational_tensors(network)["3.weight"].posterior.requires_grad_(False)
    assert not posterior_mean_network(network)[3].weight.requires_grad


def test_ties_are_one_posterior():
    layer = linear()
    two_names = nn.Sequential(layer, nn.Tanh(), layer)
    assigned = nn.Sequential(linear(), nn.Tanh(), linear())
    assigned[2].weight = assigned[0].weight
    for plain, count in ((two_names, 2), (assigned, 3)):
        plain, x = plain.double(), torch.randn(4, 3, dtype=torch.float64)
        network = with_posteriors(plain)
        assert len(variational_tensors(network)) == count
        assert network[0].weight is network[2].weight
        weights = sample_weights(network, 3, seeded())
        expected = torch.stack([
            torch.tanh(x @ weights["0.weight"][s].T + weights["0.bias"][s]) @ weights["0.weight"][s].T
            + weights.get("2.bias", weights["0.bias"])[s] for s in range(3)])
        assert_close(apply_weights(network, x, weights), expected, UNSEEN)
        back = posterior_mean_network(network)
        assert back[0].weight is back[2].weight
        refused = {two_names: ("local",), assigned: ("local", "flipout")}  # flipout: one layer has one set of signs
        for estimator in refused[two_names if count == 2 else assigned]:
            with pytest.raises(Refusal, match=r"tied|twice"):
                forward(network, x, 2, estimator)


@pytest.mark.parametrize(("x", "said"), [
    ([[0.0, 1.0, 2.0]], "list"), ({"x": torch.zeros(1, 3)}, "dict"), ((torch.zeros(1, 3),) * 2, "tuple"),
    (torch.zeros(2, 3).numpy(), "as_tensor"), (iter([]), "loader"), (None, "NoneType"), (torch.zeros(()), "empty"),
    (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged), "NestedTensor"),
])
def test_inputs_of_other_kinds_are_refused_with_a_way_that_works(x, said):
    network = with_posteriors(linear())
    for call in (lambda: predict(network, x, draws=2), lambda: forward(network, x, 2), lambda: apply_weights(
            network, x, mean_weights(network))):
        with pytest.raises(Refusal, match=said):
            call()


@pytest.mark.parametrize("output", [lambda y: {"logits": y}, lambda y: (y, y), lambda y: [y], lambda y: None])
def test_outputs_of_other_kinds_are_refused_with_a_way_that_works(output):
    network, x = with_posteriors(Written(lambda m, x: output(m.a(x)), a=linear())), torch.randn(4, 3)
    for call in (lambda: predict(network, x, draws=2), lambda: forward(network, x, 2), lambda: forward(
            network, x, 2, "split")):
        with pytest.raises(Refusal, match=r"returns one tensor"):
            call()


def test_the_networks_own_errors_come_through():
    network = with_posteriors(linear())
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        predict(network, torch.zeros(4, 5), draws=2)


# --- kinds that an attack has found -----------------------------------------------------------------------------------


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


def test_a_forward_pass_may_take_gradients():
    """A force field: minus the gradient of an energy."""

    def force(m, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return -torch.autograd.grad(torch.tanh(m.a(x)).sum(), x, create_graph=True)[0]

    plain = Written(force, a=linear()).double()
    network, x = with_posteriors(plain), torch.randn(6, 3, dtype=torch.float64)
    weights = sample_weights(network, 3, seeded(1))
    assert_close(apply_weights(network, x, weights), loop(plain, x, weights), UNSEEN)
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


def reached(kind):
    """A network that reaches its layer in an unusual way."""

    class Reaching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = linear()
            layer = self.a
            ways = {
                "closure": lambda: lambda x: layer(x), "self": lambda: lambda x: self.a(x),
                "default": lambda: lambda x, layer=layer: layer(x), "weak": lambda: weakref.ref(layer),
                "partial": lambda: partial(lambda layer, x: layer(x), layer), "method": lambda: layer.forward,
                "list": lambda: [layer], "ordered": lambda: OrderedDict(layer=layer), "deque": lambda: deque([layer]),
                "named": lambda: namedtuple("Pair", "layer")(layer), "namespace": lambda: SimpleNamespace(layer=layer),
                "default dict": lambda: defaultdict(list, layer=layer), "set": lambda: {layer},
                "nested": lambda: {"layers": [(layer,)]}, "long": lambda: [layer] * 500,
            }
            self.way = ways[kind]()

        def forward(self, x):
            way = self.way
            while not callable(way) or isinstance(way, weakref.ref):
                if isinstance(way, weakref.ref):
                    way = way()
                elif isinstance(way, SimpleNamespace):
                    way = way.layer
                else:
                    way = next(iter(way.values() if isinstance(way, dict) else way))
            return way(x)

    return Reaching()


@pytest.mark.parametrize("kind", [
    "closure", "self", "default", "weak", "partial", "method", "list", "ordered", "deque", "named", "namespace",
    "default dict", "set", "nested", "long"])
def test_layers_are_found_wherever_they_are_kept(kind):
    torch.manual_seed(0)
    plain, x = reached(kind).double(), torch.randn(6, 3, dtype=torch.float64)
    network = with_posteriors(plain)
    weights = sample_weights(network, 3, seeded(1))
    expected = torch.stack([x @ w.T + b for w, b in zip(weights["a.weight"], weights["a.bias"])])
    assert_close(apply_weights(network, x, weights), expected, UNSEEN)
    assert_close(predict(network, x, weights=weights), expected, UNSEEN)
    with torch.no_grad():
        plain.a.weight.zero_()  # the converted network has nothing to do with it any more
    assert_close(posterior_mean_network(network)(x), apply_weights(network, x, mean_weights(network))[0], UNSEEN)


WRITES = {
    "weights, through data": lambda m, x: (m.a.weight.data.clamp_(-0.1, 0.1), m.a(x))[1],
    "the input, through data": lambda m, x: (x.data.mul_(2), m.a(x))[1],
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("memory", [1, 3000, None])
def test_forward_passes_that_write_change_only_their_own_copies(name, memory):
    torch.manual_seed(0)
    plain = Written(WRITES[name], a=linear()).double()
    network, x = with_posteriors(plain, scale=0.3), torch.randn(6, 3, dtype=torch.float64)
    weights = sample_weights(network, 18, seeded(1))
    kept = {key: weight.clone() for key, weight in weights.items()} | {"x": x.clone()}
    expected = loop(plain, x, {key: weight.detach().clone() for key, weight in weights.items()})
    assert_close(predict(network, x, weights=weights, memory=memory), expected, UNSEEN)
    assert all(torch.equal(value, kept[key]) for key, value in (*weights.items(), ("x", x)))


JOINS = {
    "gaps filled by the mean of the batch": lambda m, x: m.a(torch.where(x.isnan(), x.nanmean(0), x)),
    "outliers replaced": lambda m, x: (h := m.a(x)).where(h.abs() < 9, h.median(0).values),
    "summed by a column of numbers": lambda m, x: (h := m.a(x)) + torch.zeros_like(h).index_add(
        0, x[:, 0].abs().long().clamp(0, len(x) - 1), h),
    "picked by a column of numbers": lambda m, x: m.a(x)[x[:, 0].abs().long().clamp(0, len(x) - 1)],
}


@pytest.mark.parametrize("name", JOINS)
def test_rows_that_are_joined_for_some_values_only(name):
    torch.manual_seed(0)
    plain, quiet = Written(JOINS[name], a=linear()).double(), 0.01 * torch.rand(6, 3, dtype=torch.float64)
    network = with_posteriors(plain)
    predict(network, quiet, draws=2)
    loud = 30 * torch.randn(6, 3, dtype=torch.float64)
    loud[2, 1] = torch.nan if "gaps" in name else 1.0
    weights = sample_weights(network, 3, seeded(1))
    assert_close(predict(network, loud, weights=weights, memory=1), loop(plain, loud, weights), 1e-7)
    assert_close(apply_weights(network, loud, weights), loop(plain, loud, weights), 1e-7)


def test_small_columns_count():
    """In float32, where one column is a million times larger than the one that is mixed."""
    scale = torch.tensor([1e6, 1.0, 1.0])
    plain = Written(lambda m, x: m.a(x.float()) * scale + torch.cat([0 * x[:, :2], x[:, 2:].flip(0)], 1), a=linear())
    network, x = with_posteriors(plain), torch.randn(6, 3)
    weights = sample_weights(network, 3, seeded(1))
    for memory in (1, None):
        found = predict(network, x, weights=weights, memory=memory)
        assert_close(found[..., 1:], loop(plain, x, weights)[..., 1:], 1e-4)


def test_statistics_are_moved_once_where_a_hook_changes_what_it_sees():
    torch.manual_seed(0)
    plain = nn.Sequential(linear(), nn.BatchNorm1d(3), linear()).double()
    network, x = with_posteriors(plain), torch.randn(6, 3, dtype=torch.float64)
    network[0].register_forward_hook(lambda module, inputs, output: output.flip(0))
    apply_weights(network, x, sample_weights(network, 3, seeded()))
    assert network[1].num_batches_tracked == 3


class Recorded(nn.Module):
    """Its own forward pass uses what a hook, a method of it, has kept."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.kept = linear(), linear(), None
        self.a.register_forward_hook(self.keep)

    def keep(self, module, inputs, output):
        self.kept = output

    def forward(self, x):
        return self.b(self.a(x)) + self.kept


def test_hooks_belong_to_the_copy():
    torch.manual_seed(0)
    plain, x = Recorded().double(), torch.randn(6, 3, dtype=torch.float64)
    network = with_posteriors(plain)
    weights = sample_weights(network, 3, seeded(1))
    a = torch.stack([x @ w.T + b for w, b in zip(weights["a.weight"], weights["a.bias"])])
    expected = torch.stack([h @ w.T + b + h for h, w, b in zip(a, weights["b.weight"], weights["b.bias"])])
    assert_close(apply_weights(network, x, weights), expected, UNSEEN)
    assert_close(predict(network, x, weights=weights, memory=1), expected, UNSEEN)
    assert network.kept is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit is on its way out
def test_scripted_parts_are_evaluated_and_kept():
    torch.manual_seed(0)
    part = torch.jit.script(nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Dropout(0.5)))
    network, x = with_posteriors(nn.Sequential(linear(), part, linear())).train(), torch.randn(6, 3)
    weights = sample_weights(network, 3, seeded(1))
    before, world = {name: value.clone() for name, value in network.state_dict().items()}, torch.get_rng_state()
    one, other = (predict(network, x, weights=weights, memory=memory) for memory in (1, None))
    assert_close(one, other, 1e-5)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert part.training and torch.equal(world, torch.get_rng_state())


def test_predictions_do_not_touch_the_worlds_generator():
    """Other threads may be drawing from it."""
    network, x = with_posteriors(nn.Sequential(linear(), nn.Dropout(0.5), linear())), torch.randn(6, 3)
    calls = [lambda: torch.rand(64)] * 20 + [lambda: predict(copy.deepcopy(network), x, draws=2, generator=seeded())]
    drawn = torch.cat([value for found in hammered(calls * 5) for value in found if value.ndim == 1])
    assert len(drawn.unique()) > 0.999 * len(drawn)


def test_norms_under_two_names_and_views_of_one_memory():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3)
    plain = nn.Sequential(linear(), norm, linear(), norm, linear()).double()
    network, looped, x = with_posteriors(plain), copy.deepcopy(plain), torch.randn(6, 3, dtype=torch.float64)
    weights = sample_weights(network, 3, seeded(1))
    for s in range(3):
        functional_call(looped, {name: weight[s] for name, weight in weights.items()}, (x,))
    apply_weights(network, x, weights)
    assert_close(network[1].running_mean, looped[1].running_mean, UNSEEN)
    sharing = Written(lambda m, x: (m.whole.add_(1), m.a(x) + m.part.sum())[1], a=linear()).double()
    sharing.register_buffer("whole", torch.zeros(4, dtype=torch.float64))
    sharing.register_buffer("part", sharing.whole[:2])
    network = with_posteriors(sharing)
    assert_close(predict(network, x, weights=mean_weights(network))[0], sharing.a(x) + 2, UNSEEN)


@pytest.mark.parametrize(("arguments", "said"), [
    ({"draws": 2.0}, "whole number"), ({"draws": "2"}, "whole number"), ({"draws": 2, "memory": 1e6}, "whole bytes"),
    ({"weights": None}, "draws"), ({"weights": [1]}, "dictionary"), ({"weights": {}}, "every variational tensor"),
])
def test_arguments_of_other_kinds(arguments, said):
    with pytest.raises(Refusal, match=said):
        predict(with_posteriors(linear()), torch.zeros(2, 3), **arguments)


def test_networks_that_cannot_be_copied_are_refused():
    plain = nn.Sequential(linear())
    plain.last = plain(torch.zeros(2, 3))
    with pytest.raises(Refusal, match=r"detach"):
        with_posteriors(plain)


@pytest.mark.parametrize(("call", "said"), [
    (lambda: with_posteriors(None), "network"), (lambda: with_posteriors(nn.Linear), "class"),
    (lambda: with_posteriors([linear()]), r"nn\.Sequential"), (lambda: with_posteriors(linear(), 0.1), "scale=0.1"),
    (lambda: with_posteriors(linear(), "gaussian"), "MeanFieldGaussian"),
    (lambda: with_posteriors(linear(), scale="x"), "scale"),
    (lambda: with_posteriors(linear(), prior=isotropic), r"isotropic\(1\.0\)"),
    (lambda: with_posteriors(linear(), prior=1.0), r"isotropic\(1\.0\)"), (lambda: isotropic(0), "positive"),
    (lambda: with_posteriors(nn.Sequential(nn.LazyLinear(2), linear())), r"once"),
    (lambda: with_posteriors(nn.Sequential(linear(), nn.LazyBatchNorm1d())), r"once"),
    (lambda: kl_per_datum(with_posteriors(linear()), float("nan")), "positive"),
    (lambda: kl_per_datum(with_posteriors(linear()), None), "num_data"),
    (lambda: predict(torch.zeros(2, 3), with_posteriors(linear()), draws=2), "network"),
    (lambda: predict(with_posteriors(linear()), "x", draws=2), "tensor"),
    (lambda: forward(with_posteriors(linear()), torch.zeros(2, 3), generator=0), "manual_seed"),
    (lambda: sample_weights(None, 2), "network"),
])
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_everyday_mistakes_are_told_what_works(call, said):
    with pytest.raises(Refusal, match=said):
        call()
