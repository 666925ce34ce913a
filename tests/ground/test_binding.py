"""Networks for one call: what the copy holds, shares and leaves alone; deep copies; buffers; random numbers."""
import gc
import threading
import weakref
from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call

from helpers_ground import refusal_of
from symbnn.binding import (
    Placeholder,
    bind,
    copy_network,
    copy_tree,
    eager,
    layer_with,
    lead_over,
    modules_outside,
    own_buffers,
    plain_network,
    seeded_world,
)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()


def inputs(rows=5, seed=1):
    return torch.randn(rows, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def others(net, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, dtype=p.dtype, generator=generator) for name, p in net.named_parameters()}


def test_binding_is_a_functional_call():
    net, weights, x = network().eval(), others(network()), inputs()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    expected, own = functional_call(net, weights, x), net(x)
    assert torch.equal(bind(net, weights)(x), expected) and not torch.equal(expected, own)
    some = {"3.weight": weights["3.weight"]}
    assert torch.equal(bind(net, some)(x), functional_call(net, some, x))
    assert torch.equal(net(x), own) and all(torch.equal(value, before[n]) for n, value in net.state_dict().items())
    assert all(isinstance(p, nn.Parameter) for p in net.parameters())


def test_gradients_reach_the_given_tensors_alone():
    net, x = network().eval(), inputs()
    weights = {name: w.requires_grad_() for name, w in others(net).items()}
    bind(net, weights)(x).square().sum().backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in weights.values())
    assert all(p.grad is None for p in net.parameters())


def test_everything_else_is_shared():
    net = network()
    copy = bind(net, {"0.weight": torch.zeros(4, 3, dtype=torch.float64)})
    assert copy is not net and copy[0] is not net[0] and type(copy[0]) is nn.Linear
    assert copy[0].bias is net[0].bias and copy[3].weight is net[3].weight
    assert copy[1]._buffers is net[1]._buffers  # so that the statistics of a training step stay
    copy.train()(inputs())
    assert net[1].num_batches_tracked == 1


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_is_of_the_copy(training):
    net = network().train(training)
    net[2].train(not training)
    copy = bind(net, {}, evaluating=True)
    assert not any(module.training for module in copy.modules())
    assert (net.training, net[2].training) == (training, not training)
    copy.train()(inputs())
    assert copy[1]._buffers is not net[1]._buffers


def test_bound_buffers_keep_those_of_the_network():
    net, x = network().train(), inputs()
    bound = bind(net, {name: buffer.clone() for name, buffer in net.named_buffers()})
    bound(x)
    assert net[1].num_batches_tracked == 0 and bound[1].num_batches_tracked == 1
    torch.testing.assert_close(bound[1].running_mean, 0.1 * net[0](x).mean(0))


def test_two_names_of_one_layer_and_of_one_tensor():
    net = network()
    twice = nn.Sequential(OrderedDict(a=net[0], b=net[2], c=nn.Linear(4, 3).double(), d=net[0]))
    weight = torch.randn(4, 3, dtype=torch.float64)
    copy = bind(twice, {"d.weight": weight})
    assert copy.a is copy.d and copy.a.weight is weight
    assert [name for name, _ in modules_outside(twice)] == ["", "a", "b", "c", "d"]
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    bound = bind(tied, {"0.weight": torch.eye(3)})
    assert bound[0].weight is bound[1].weight and torch.equal(bound[1].weight, torch.eye(3))


def test_names_that_are_not_there_are_refused():
    refusal = refusal_of(lambda: bind(network(), {"0.weigth": torch.zeros(4, 3)}))
    assert "'0.weigth'" in refusal.got and "'0.weight'" in refusal.fix


class Hole(Placeholder):
    """A weight that has a posterior."""


def with_hole():
    net = network().eval()
    del net[0]._parameters["weight"]
    net[0].add_module("weight", Hole())
    return net


def test_placeholders_make_way_for_tensors_and_are_refused_without():
    net, x = with_hole(), inputs()
    weight = torch.randn(4, 3, dtype=torch.float64)
    expected = functional_call(network().eval(), {"0.weight": weight}, x)
    assert torch.equal(bind(net, {"0.weight": weight})(x), expected)
    assert isinstance(net[0]._modules["weight"], Hole) and "weight" not in net[0]._parameters
    assert [name for name, _ in modules_outside(net)] == ["", "0", "1", "2", "3"]
    refusal = refusal_of(lambda: bind(net, {"0.bias": net[0].bias}))
    assert "'0.weight'" in refusal.got and "sample_weights(network, 1)" in refusal.fix


Pair = namedtuple("Pair", "first second")


@dataclass
class Held:
    layer: nn.Module


HOLDERS = {  # how a module may hold another one, by the attribute and the way to call what it holds
    "list": (lambda layer: [layer], lambda held, x: held[0](x)),
    "nested": (lambda layer: {"a": [(1, layer)]}, lambda held, x: held["a"][0][1](x)),
    "named tuple": (lambda layer: Pair(layer, 1), lambda held, x: held.first(x)),
    "ordered dictionary": (lambda layer: OrderedDict(a=layer), lambda held, x: held["a"](x)),
    "defaultdict": (lambda layer: defaultdict(list, a=layer), lambda held, x: held["a"](x)),
    "deque": (lambda layer: deque([layer], 3), lambda held, x: held[0](x)),
    "set": (lambda layer: {layer}, lambda held, x: next(iter(held))(x)),
    "namespace": (lambda layer: SimpleNamespace(layer=layer), lambda held, x: held.layer(x)),
    "data class": (Held, lambda held, x: held.layer(x)),
    "bound method": (lambda layer: layer.forward, lambda held, x: held(x)),
    "partial": (lambda layer: partial(layer), lambda held, x: held(x)),
    "partial argument": (lambda layer: partial(lambda l, x: l(x), layer), lambda held, x: held(x)),
    "closure": (lambda layer: lambda x: layer(x), lambda held, x: held(x)),
    "default": (lambda layer: lambda x, l=layer: l(x), lambda held, x: held(x)),
    "keyword": (lambda layer: lambda x, *, l=layer: l(x), lambda held, x: held(x)),
    "weak reference": (weakref.ref, lambda held, x: held()(x)),
    "tensor": (lambda layer: [layer.weight], lambda held, x: x @ held[0].T),
}


class Holding(nn.Module):
    def __init__(self, hold, call):
        super().__init__()
        self.layer = nn.Linear(3, 3).double()
        self.held, self.call = hold(self.layer), call

    def forward(self, x):
        return self.call(self.held, x)


@pytest.mark.parametrize("kind", HOLDERS)
def test_what_attributes_hold_is_led_over(kind):
    net, x, weight = Holding(*HOLDERS[kind]), inputs(), torch.randn(3, 3, dtype=torch.float64)
    own = net(x)
    expected = x @ weight.T + (0 if kind == "tensor" else net.layer.bias)
    bound = bind(net, {"layer.weight": weight})
    gc.collect()  # weak references live as long as the copy
    torch.testing.assert_close(bound(x), expected, rtol=0, atol=1e-12)
    assert torch.equal(net(x), own) and type(bound.held) is type(net.held)
    twin = copy_network(net)
    with torch.no_grad():
        net.layer.weight.zero_()
    torch.testing.assert_close(twin(x), own, rtol=0, atol=1e-12)


def test_hooks_are_led_over():
    net = Holding(*HOLDERS["list"])
    net.register_forward_hook(lambda module, args, output, other=net.layer: output + other.weight.sum())
    weight = torch.ones(3, 3, dtype=torch.float64)
    bound = bind(net, {"layer.weight": weight})
    torch.testing.assert_close(bound(inputs()), inputs() @ weight.T + net.layer.bias + 9, rtol=0, atol=1e-12)


def test_what_holds_nothing_is_not_copied():
    net = network()
    net.settings, net.long = {"a": [1, 2]}, [nn.Tanh()] * 2000  # a long list is not searched
    copy = bind(net, {})
    assert copy.settings is net.settings and copy.long is net.long
    isolated = copy_tree(net, {}, isolated=True)
    assert isolated.settings == net.settings and isolated.settings is not net.settings
    assert isolated.settings["a"] is not net.settings["a"]


def test_cells_that_are_not_filled_yet():
    def outer():
        def inner():
            return late
        if False:
            late = 1
        return inner

    function = outer()
    assert lead_over(function, {}) is function


def test_changes_are_made_on_the_copy():
    net, seen = network(), []
    copy = copy_tree(net, {}, change=lambda copy, module: (seen.append(module), setattr(copy, "mark", 1)))
    assert {id(module) for module in seen} == {id(module) for module in net.modules()}
    assert copy[0].mark == 1 and not hasattr(net[0], "mark")


def test_compiled_parts_are_wrapped_again_or_unwrapped():
    net = network().eval()
    inner = torch.compile(net[0], backend="eager")
    whole = nn.Sequential(inner, net[2])
    weight, x = torch.randn(4, 3, dtype=torch.float64), inputs()
    expected = torch.tanh(x @ weight.T + net[0].bias)
    for compiled in (True, False):
        copy = copy_tree(whole, {id(net[0].weight): weight}, compiled=compiled)
        assert ("_orig_mod" in copy[0]._modules) == compiled
        torch.testing.assert_close(copy(x), expected, rtol=0, atol=1e-12)
    assert plain_network(inner) is net[0] is plain_network(net[0])


def test_threads_do_not_see_each_other():
    net, x, results = network().eval(), inputs(), {}
    weights = [others(net, seed) for seed in range(8)]

    def work(k):
        results[k] = [bind(net, weights[k])(x) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, found in results.items():
        assert all(torch.equal(y, functional_call(net, weights[k], x)) for y in found)


def test_functions_that_are_left_out_of_graphs():
    calls = []

    @eager
    def note(x):
        """Its own words."""
        calls.append(torch.compiler.is_compiling())
        return x + 1

    assert note.__doc__ == "Its own words." and torch.equal(note(torch.zeros(2)), torch.ones(2))
    compiled = torch.compile(lambda x: note(x * 2) * 2, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 6.0)) and calls == [False, False]


@pytest.mark.parametrize("wrong", [None, nn.Linear, [nn.Linear(1, 1)]])
def test_copies_of_what_is_no_network_are_refused(wrong):
    assert "network" in refusal_of(lambda: copy_network(wrong)).expected


def test_what_cannot_be_copied_is_named_and_the_fix_works():
    net = network()
    net[3].last = net(inputs())
    refusal = refusal_of(lambda: copy_network(net))
    assert "network.3.last" in refusal.got and refusal.fix.startswith("del network.3.last")
    net[3].lock = threading.Lock()
    assert "network.3" in refusal_of(lambda: copy_network(net)).fix
    del net[3].lock
    net[3].last = net[3].last.detach()
    assert copy_network(net)[3].last.shape == (5, 2)


def test_one_layer_with_other_weights():
    layer, weight = nn.Linear(3, 2).double(), torch.randn(2, 3, dtype=torch.float64)
    copy = layer_with(layer, {"weight": weight})
    assert copy.weight is weight and copy.bias is layer.bias and layer.weight is not weight


def test_clones_of_buffers_keep_views_of_one_memory():
    net = nn.Module()
    memory = torch.arange(6.0)
    net.register_buffer("whole", memory)
    net.register_buffer("part", memory[2:4])
    net.register_buffer("alone", torch.ones(2))
    net.register_buffer("same", net.alone)
    net.register_buffer("nothing", None)
    clones = own_buffers(net)
    assert len(clones) == 3
    whole, part = clones[id(net.whole)], clones[id(net.part)]
    whole[2] = 9
    assert part[0] == 9 and memory[2] == 2 and torch.equal(clones[id(net.alone)], torch.ones(2))


def test_the_worlds_generator_is_put_back():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded_world(torch.device("cpu"), 7):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with pytest.raises(ZeroDivisionError), seeded_world(torch.device("cpu"), 7):
        torch.rand(3) / (1 // 0)
    torch.manual_seed(5)
    torch.rand(3)
    after = torch.rand(3)
    torch.manual_seed(5)
    torch.rand(3)
    with seeded_world(torch.device("cpu"), 8):
        assert not torch.equal(torch.rand(3), first)
    assert torch.equal(torch.rand(3), after)
