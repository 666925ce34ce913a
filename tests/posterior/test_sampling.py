"""The contract of draws: what a call gives is the loop over draws with the plain network, and nothing else happens."""
import copy
import itertools
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
from torch.utils.checkpoint import checkpoint

from helpers import seeded
from helpers_posterior import (
    IMAGE,
    TOGETHER,
    UNSEEN,
    WHOLE,
    ZOO,
    Written,
    conv,
    linear,
    loop,
    made,
    small_cnn,
    unchecked_shapes,
    weighted_inputs,
)
from symbnn.errors import Refusal
from symbnn.posterior.layers import kl_per_datum, posterior_mean_network, variational_tensors, with_posteriors
from symbnn.posterior.plans import execution_plan
from symbnn.posterior.sampling import apply_weights, forward, mean_weights, predict, sample_weights
from tolerances import assert_close, exact64, within_standard_errors

ZOO_NAMES = list(ZOO)


def state(network):
    tensors = {name: value.clone() for name, value in network.state_dict().items()}
    return tensors, [module.training for module in network.modules()]


def same(before, after):
    return before[1] == after[1] and all(torch.equal(value, after[0][name]) for name, value in before[0].items())


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_given_weights_and_fresh_draws_equal_the_loop(name):
    plain, network, x, plan = made(name)
    assert str(execution_plan(network, x)).startswith(plan)
    weights = sample_weights(network, 5, seeded(1))
    expected = loop(plain, x, weights)
    assert_close(apply_weights(network, x, weights), expected, UNSEEN)
    assert_close(forward(network, x, 5, "whole", seeded(1)), expected, UNSEEN)
    assert_close(apply_weights(network, x, mean_weights(network)), loop(plain, x, mean_weights(network)), UNSEEN)


@pytest.mark.parametrize("name", ZOO_NAMES)
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


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_gradients_equal_those_of_the_loop(name):
    plain, network, x, _ = made(name)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    weights = sample_weights(network, 3, seeded(1))
    found = [torch.autograd.grad(y.square().sum(), parameters, retain_graph=True, allow_unused=True)
             for y in (apply_weights(network, x, weights), loop(plain, x, weights))]
    for ours, theirs in zip(*found):
        if theirs is not None:  # a frozen branch
            assert_close(ours, theirs, UNSEEN)


@pytest.mark.parametrize("name", [name for name in ZOO_NAMES if ZOO[name][2] != WHOLE])
@pytest.mark.parametrize("runs", [1, 2, 3, 4])
def test_split_is_the_plain_network_on_each_run_of_rows(name, runs):
    plain, network, x, _ = made(name)
    weights = sample_weights(network, runs, seeded(1))
    padded = torch.cat([x, x[: -len(x) % runs]])
    parts = [loop(plain, run, {key: w[s : s + 1] for key, w in weights.items()})[0]
             for s, run in enumerate(padded.chunk(runs))]
    assert_close(forward(network, x, runs, "split", seeded(1))[0], torch.cat(parts)[: len(x)], UNSEEN)


@pytest.mark.parametrize("name", ZOO_NAMES)
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


def test_half_precision_equals_the_loop():
    torch.manual_seed(0)
    plain = nn.Sequential(linear(3, 8), nn.ReLU(), linear(8, 2)).bfloat16()
    network, x = with_posteriors(plain), torch.randn(5, 3).bfloat16()
    assert execution_plan(network, x).together
    weights = sample_weights(network, 3, seeded())
    assert_close(apply_weights(network, x, weights).float(), loop(plain, x, weights).float(), 2e-2)


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


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # raised inside the compiler
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@unchecked_shapes()
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


def test_the_networks_own_errors_come_through():
    network = with_posteriors(linear())
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        predict(network, torch.zeros(4, 5), draws=2)


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
    ({"draws": 2.0}, "whole number"), ({"draws": "2"}, "whole number"), ({"draws": 2, "memory": 1e6}, "whole number"),
    ({"weights": None}, "draws"), ({"weights": [1]}, "dictionary"), ({"weights": {}}, "missing"),
])
def test_arguments_of_other_kinds(arguments, said):
    with pytest.raises(Refusal, match=said):
        predict(with_posteriors(linear()), torch.zeros(2, 3), **arguments)


def test_eval_does_not_change_whether_weights_are_random():
    network, x = with_posteriors(small_cnn()), torch.randn(2, 1, 4, 4, dtype=torch.float64)
    outputs = [forward(mode, x, draws=2, generator=seeded()) for mode in (network.train(), network.eval())]
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0][0], outputs[0][1])


@pytest.mark.parametrize("layer, shape", [(nn.Linear(4, 2), (3, 4)), (nn.Conv2d(1, 2, 3), (3, 1, 5, 5))], ids=str)
def test_inputs_of_another_type_than_the_weights_are_refused(layer, shape):
    network, x = with_posteriors(layer), torch.zeros(shape, dtype=torch.float64)
    for call in (lambda: predict(network, x, draws=2), lambda: forward(network, x)):
        with pytest.raises(Refusal, match=r"Fix: inputs\.to\(torch\.float32\)"):
            call()
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes|channels"):  # another error stays as it is
        predict(network, x.float().flatten(1)[:, None, None, :3].expand(-1, 3, 3, 3), draws=2)


def test_weights_of_another_network_are_refused():
    network, x = with_posteriors(small_cnn()), torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    with pytest.raises(Refusal, match=r"0\.bias"):
        apply_weights(network, x, {k: v for k, v in mean_weights(network).items() if k != "0.bias"})
    with pytest.raises(Refusal, match=r"shapes|numbers of samples"):
        apply_weights(network, x, mean_weights(network) | {"7.bias": torch.zeros(2, 2)})
    with pytest.raises(Refusal, match="with_posteriors"):
        sample_weights(small_cnn(), 2)
    with pytest.raises(Refusal, match="number of samples"):
        sample_weights(network, 0)


def test_network_that_reshapes_the_batch_is_looped_over_and_has_no_rows_to_cut():
    plain, x = nn.Sequential(nn.Linear(2, 4), nn.Flatten(0)).double(), torch.randn(3, 2, dtype=torch.float64)
    network = with_posteriors(plain)
    weights = sample_weights(network, 2, seeded())
    assert_close(apply_weights(network, x, weights), loop(plain, x, weights), exact64)
    with pytest.raises(Refusal, match="no row for each row"):
        forward(network, x, 2, "split")


def linear_problem(kind):
    """A network that is linear in its weights, f = design @ theta, so that the expected squared error is known."""
    torch.manual_seed(1)
    if kind == "linear":
        plain, x = nn.Linear(3, 1), torch.randn(8, 3)
    else:  # every position's output counts through the sum: shared kernels make the positions dependent
        plain = nn.Sequential(nn.Conv2d(1, 1, 2), nn.AvgPool2d(3, divisor_override=1), nn.Flatten())
        x = torch.randn(8, 1, 4, 4)
    plain, x = plain.double(), x.double()
    network, y = with_posteriors(plain, scale=0.5), torch.randn(8, 1, dtype=torch.float64)
    columns = []
    means = mean_weights(network)
    zeros = {name: torch.zeros_like(weight) for name, weight in means.items()}
    for name, weight in means.items():
        for position in itertools.product(*map(range, weight.shape[1:])):
            unit = zeros[name].clone()
            unit[(0, *position)] = 1.0
            columns.append(apply_weights(network, x, zeros | {name: unit})[0, :, 0])
    return network, x, y, torch.stack(columns, -1).detach()


def posterior_parameters(network):
    tensors = variational_tensors(network).values()
    return [t.posterior.loc for t in tensors] + [t.posterior.log_scale for t in tensors]


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize(
    ("estimator", "draws"), [("whole", 1), ("whole", 4), ("split", 4), ("split", 3), ("flipout", 2), ("local", 4)]
)
def test_estimators_are_unbiased(kind, estimator, draws):
    network, x, y, design = linear_problem(kind)
    parameters = posterior_parameters(network)
    half = len(parameters) // 2
    mean = torch.cat([p.flatten() for p in parameters[:half]])
    variance = torch.cat([(2 * p).exp().flatten() for p in parameters[half:]])
    exact_loss = 0.5 * ((y[:, 0] - design @ mean).square() + design.square() @ variance).mean()
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(exact_loss, parameters)])
    generator, found = seeded(5), []
    for _ in range(3000):
        out = forward(network, x, draws, estimator, generator)
        loss = 0.5 * (out - y).square().mean()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    found = torch.stack(found)
    within_standard_errors(found.mean(0), exact, found.std(0) / len(found) ** 0.5, k=4.5)  # several entries


def location_variance(network, x, y, repeats, draws, estimator):
    generator, found = seeded(6), []
    locs = posterior_parameters(network)[: len(variational_tensors(network))]
    for _ in range(repeats):
        loss = 0.5 * (forward(network, x, draws, estimator, generator) - y).square().mean()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, locs)]))
    return torch.stack(found).var(0).sum()


def test_split_and_flipout_have_lower_variance_than_whole_at_equal_cost():
    network, _, _, _ = linear_problem("convolution")
    x = torch.randn(64, 1, 4, 4, generator=seeded(7), dtype=torch.float64)
    y = torch.randn(64, 1, generator=seeded(8), dtype=torch.float64)
    one, two, split, flipout = (
        location_variance(network, x, y, 400, draws, estimator)
        for estimator, draws in [("whole", 1), ("whole", 2), ("split", 8), ("flipout", 1)]
    )
    assert split < one / 4  # one pass each; the derivation gives 8 where the covariance dominates
    assert flipout < two / 4  # two passes each


@pytest.mark.parametrize("estimator", ["whole", "split", "flipout", "local"])
def test_outputs_have_the_exact_variance(estimator):
    network, x = weighted_inputs()
    count, generator = 20_000, seeded(5)
    weight, bias = (tensor.posterior for tensor in variational_tensors(network).values())
    variance = (x.square() @ weight.variance.T + bias.variance)[0]
    if estimator in ("whole", "flipout"):
        out = forward(network, x, count, estimator, generator)[:, 0]
    else:
        out = forward(network, x.expand(count, -1), count, estimator, generator)[0]
    within_standard_errors(out.mean(0), x[0] @ weight.mean.T + bias.mean, (variance / count).sqrt())
    within_standard_errors(out.var(0), variance, variance * (2 / count) ** 0.5)  # five percent are five errors


@pytest.mark.parametrize("estimator", ["whole", "split", "flipout", "local"])
def test_an_empty_batch_is_refused(estimator):
    with pytest.raises(Refusal, match="at least one input"):
        forward(with_posteriors(nn.Linear(2, 1)), torch.zeros(0, 2), 3, estimator)


def test_unknown_estimator_is_refused():
    with pytest.raises(Refusal, match="one of whole, split, flipout, local"):
        forward(with_posteriors(nn.Linear(2, 2)), torch.zeros(1, 2), estimator="antithetic")


@pytest.mark.parametrize(("rows", "runs"), [(8, 4), (7, 4), (3, 8), (1, 4)])
def test_split_uses_one_draw_for_each_run_of_rows(rows, runs):
    network = with_posteriors(nn.Linear(2, 1).double())
    x = torch.ones(rows, 2, dtype=torch.float64)
    out = forward(network, x, runs, "split", seeded())
    assert out.shape == (1, rows, 1)
    size = -(-rows // min(runs, rows))
    assert len(out.unique()) == -(-rows // size)
    assert all(len(run.unique()) == 1 for run in out[0].split(size))


@pytest.mark.parametrize("memory", [1, 5_000, 100_000, 2**30])
def test_prediction_does_not_depend_on_the_memory_budget(memory):
    network, x = with_posteriors(small_cnn()), torch.randn(9, 1, 8, 8, generator=seeded(), dtype=torch.float64)
    expected = predict(network, x, draws=21, generator=seeded(1))
    assert expected.shape == (21, 9, 2)
    assert not expected.requires_grad
    assert_close(predict(network, x, draws=21, memory=memory, generator=seeded(1)), expected, exact64)
    weights = sample_weights(network, 21, seeded(2))
    assert_close(predict(network, x, weights=weights, memory=memory), apply_weights(network, x, weights), exact64)


class WritesIntoItsInput(nn.Module):
    """Not the same when applied twice."""

    def forward(self, x):
        return x.mul_(0.5).add_(1.0)


@pytest.mark.parametrize("memory", [1, 5_000, 2**30])
def test_a_network_that_writes_into_its_input_spoils_neither_the_inputs_nor_the_next_draws(memory):
    network = with_posteriors(nn.Sequential(WritesIntoItsInput(), nn.Linear(6, 3)).double())
    x = torch.randn(10, 6, dtype=torch.float64, generator=seeded(0))
    kept, weights = x.clone(), sample_weights(network, 21, seeded(1))
    expected = torch.stack([(0.5 * x + 1) @ w.T + b for w, b in zip(weights["1.weight"], weights["1.bias"])])
    assert_close(predict(network, x, weights=weights, memory=memory), expected, exact64)
    with torch.inference_mode():
        assert_close(predict(network, x, weights=weights, memory=memory), expected, exact64)
    assert torch.equal(x, kept)


def test_prediction_needs_draws_or_weights():
    network, x = with_posteriors(small_cnn()), torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    for arguments, got in (({}, "neither"), ({"draws": 2, "weights": mean_weights(network)}, "both"),
                           ({"draws": 2, "memory": 0}, "memory of a prediction")):
        with pytest.raises(Refusal, match=got):
            predict(network, x, **arguments)
    with pytest.raises(Refusal, match="at least one input"):
        predict(network, x[:0], draws=2)
    with pytest.raises(Refusal, match="at least 1"):
        predict(network, x, draws=0)


def test_half_precision_and_tiny_scales_stay_finite():
    network = with_posteriors(small_cnn(), scale=1e-12).float()
    out = forward(network, torch.randn(2, 1, 8, 8), 2)
    (out.square().mean() + kl_per_datum(network, 10)).backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())
    assert forward(network.bfloat16(), torch.randn(2, 1, 8, 8).bfloat16(), 2).dtype == torch.bfloat16


@pytest.mark.parametrize("estimator", ["whole", "split", "flipout", "local"])
def test_cuda_agrees_with_cpu(estimator, require_cuda):
    network, x = with_posteriors(small_cnn(), scale=1e-9), torch.randn(4, 1, 8, 8, dtype=torch.float64)
    expected = forward(network, x, 2, estimator)
    assert_close(forward(network.cuda(), x.cuda(), 2, estimator).cpu(), expected, 1e-6)
