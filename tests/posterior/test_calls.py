"""Calls with several inputs and several outputs: the loop over draws with the plain network, part by part."""
import copy
from collections import UserDict

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from helpers import seeded
from helpers_networks import Answer, D, Model, by_definition
from helpers_posterior import UNSEEN, linear, refused
from symbnn.equivariance.predictions import Equivariance, orbit_predictions
from symbnn.errors import Refusal
from symbnn.posterior import plans
from symbnn.posterior.calls import Inputs, as_inputs
from symbnn.posterior.elbo import elbo
from symbnn.posterior.layers import with_posteriors
from symbnn.posterior.plans import execution_plan
from symbnn.posterior.sampling import apply_weights, forward, predict, sample_weights
from symbnn.posterior.structures import leaves
from symbnn.symmetry.actions import Action
from symbnn.symmetry.groups import Cyclic
from tolerances import assert_close

X, Y = (torch.randn(6, 3, generator=seeded(s), dtype=D) for s in range(2))
MASK = torch.tensor([1, 0, 1, 1, 0, 1])
TABLE = torch.randn(4, 3, generator=seeded(2), dtype=D)


def two(m, x, y):
    return m.a(x) * m.b(y)


CALLS = {
    # name: (network, inputs, its arguments, its keywords, whether all draws run at once)
    "two tensors": (lambda: Written2(two), (X, Y), (X, Y), {}, True),
    "by keyword": (lambda: Written2(two), {"y": Y, "x": X}, (), {"x": X, "y": Y}, True),
    "both": (lambda: Written2(two), Inputs(X, y=Y), (X,), {"y": Y}, True),
    "a user's dictionary": (lambda: Written2(two), UserDict(x=X, y=Y), (), {"x": X, "y": Y}, True),
    "a table without rows": (lambda: Written2(lambda m, x, t: m.a(x) @ t.mT), (X, TABLE), (X, TABLE), {}, True),
    "a table as long as the batch": (lambda: Written2(lambda m, x, t: m.a(x) @ t.mT), (X, Y), (X, Y), {}, False),
    "a table that is shared, one row": (lambda: Written2(lambda m, x, t: m.a(x) + t.sum()), (X, TABLE[:1]),
                                        (X, TABLE[:1]), {}, True),
    "a table through a layer": (lambda: Written2(lambda m, x, t: x @ m.a(t).mT), (X, TABLE), (X, TABLE), {}, False),
    "a number, a word, nothing": (lambda: Written2(
        lambda m, x, k, way, no: k * m.a(x) if (way, no) == ("on", None) else x),
                                  (X, 2, "on", None), (X, 2, "on", None), {}, True),
    "a list": (lambda: Written2(lambda m, xs: m.a(xs[0]) - m.b(xs[1])), Inputs([X, Y]), ([X, Y],), {}, True),
    "a dictionary as one argument": (lambda: Written2(lambda m, d: m.a(d["u"])), Inputs({"u": X}), ({"u": X},), {},
                                     True),
    "a mask of integers": (lambda: Written2(lambda m, x, mask: m.a(x) * mask[:, None]), (X, MASK), (X, MASK), {}, True),
    "writes into the second": (lambda: Written2(lambda m, x, t: (t.mul_(2), m.a(x) + t.sum())[1]), (X, TABLE),
                               (X, TABLE), {}, True),
}


class Written2(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.a, self.b, self.run = linear(), linear(), run
        self.forward = self._forward if run.__code__.co_argcount > 3 else self.forward

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)

    _forward = forward


def same(ours, theirs):
    ours, theirs = leaves(ours), leaves(theirs)
    assert list(ours) == list(theirs)
    for place, leaf in ours.items():
        if isinstance(leaf, torch.Tensor):
            assert_close(leaf, theirs[place], UNSEEN)
        else:
            assert leaf == theirs[place]


def stack(found):
    from symbnn.posterior.structures import stacked

    return stacked(found)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("memory", [1, None])
def test_several_inputs_equal_the_loop(name, memory):
    build, x, args, kwargs, together = CALLS[name]
    torch.manual_seed(0)
    plain = build().double()
    network = with_posteriors(plain, scale=0.3)
    kept = [tensor.clone() for tensor in as_inputs(x).tensors()]
    assert execution_plan(network, x, True).together is together, execution_plan(network, x, True)
    weights = sample_weights(network, 18, seeded(1))
    expected = stack(by_definition(plain, args, weights, kwargs)[0])
    same(predict(network, x, weights=weights, memory=memory), expected)
    same(apply_weights(network, x, weights), expected)
    same(forward(network, x, 18, generator=seeded(1)), expected)
    assert all(torch.equal(*pair) for pair in zip(as_inputs(x).tensors(), kept))


@pytest.mark.parametrize("name", [
    name for name, case in CALLS.items() if case[-1] or name == "a table through a layer"])
@pytest.mark.parametrize("runs", [1, 4])
def test_split_cuts_what_has_rows(name, runs):
    build, x, *_ = CALLS[name]
    torch.manual_seed(0)
    plain = build().double()
    network, inputs = with_posteriors(plain, scale=0.3), as_inputs(x)
    weights = sample_weights(network, runs, seeded(1))
    padded = inputs.each_row(lambda rows: torch.cat([rows, rows[: -len(rows) % runs]]))
    parts = [by_definition(plain, run.args, {key: w[s : s + 1] for key, w in weights.items()}, run.kwargs)[0][0]
             for s, run in enumerate(padded.split(len(padded) // runs))]
    assert_close(forward(network, x, runs, "split", seeded(1))[0], torch.cat(parts)[:6], UNSEEN)


def pair(m, x):
    return m.a(x), m.b(x)


def by_row(m, x):
    return {"logits": m.a(x), "hidden": [torch.tanh(m.b(x)), None], "classes": m.a(x).argmax(-1), "k": 3, "on": True}


OUTPUTS = {
    # name: (forward pass, whether all draws run at once)
    "a pair": (pair, True), "a dictionary": (by_row, True),
    "the input again": (lambda m, x: (m.a(x), x), True),
    "no rows in one of them": (lambda m, x: (m.a(x), m.b(x).mean(0)), False),
    "a number without axes": (lambda m, x: {"loss": m.a(x).square().mean(), "y": m.b(x)}, False),
    "the number of rows": (lambda m, x: (m.a(x), len(x)), False),
    "a constant table": (lambda m, x: (m.a(x), torch.ones(8, 2, dtype=x.dtype)), False),
    "one that mixes rows": (lambda m, x: (m.a(x), m.b(x).flip(0)), False),
    "one that is off": (lambda m, x: (m.a(x), torch.relu(m.b(x) - 50).flip(0)), False),
    "masked": (lambda m, x: m.a(x).masked_fill(torch.eye(3, dtype=torch.bool)[0], -torch.inf), True),
    "not numbers in part": (lambda m, x: torch.cat([m.a(x), 0 * x / 0], 1), True),
    "an answer": (lambda m, x: Answer(m.a(x), (m.b(x),)), True),
}


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("memory", [1, None])
def test_several_outputs_equal_the_loop(name, memory):
    run, together = OUTPUTS[name]
    torch.manual_seed(0)
    plain = Written2(run).double()
    network = with_posteriors(plain, scale=0.3)
    plan = execution_plan(network, X, True)
    assert plan.together is together, plan
    weights = sample_weights(network, 18, seeded(1))
    expected = stack(by_definition(plain, (X,), weights)[0])
    found = predict(network, X, weights=weights, memory=memory)
    assert type(found) is type(expected)
    same_or_nan(found, expected)
    same_or_nan(apply_weights(network, X, weights), expected)


def same_or_nan(ours, theirs):
    for a, b in zip(leaves(ours).values(), leaves(theirs).values(), strict=True):
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=0, atol=UNSEEN, equal_nan=True)
        else:
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_model_with_keywords_a_mask_labels_and_an_answer():
    torch.manual_seed(0)
    plain = Model().double()
    network = with_posteriors(plain, only="*", scale=0.2)
    tokens, labels = torch.randint(10, (6, 5)), torch.randint(3, (6,))
    mask = torch.triu(torch.full((5, 5), -torch.inf, dtype=D), 1)
    x = {"tokens": tokens, "mask": mask, "labels": labels}
    weights = sample_weights(network, 5, seeded(1))
    expected, _ = by_definition(plain.eval(), (), weights, x)
    found = predict(network, x, weights=weights)
    assert isinstance(found, Answer) and found.loss.shape == (5,) and found.hidden[0].shape == (5, 6, 5, 4)
    same(found, stack(expected))
    assert torch.equal(predict(network, x, weights=weights, output="logits"), found.logits)
    assert torch.equal(predict(network, x, weights=weights, output=lambda y: y.hidden[1]), found.hidden[1])
    assert predict(network, {"tokens": tokens}, draws=2).loss is None
    logits = forward(network, x, 2, output="logits", generator=seeded())
    elbo(network, logits, labels, 6).elbo.backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


def test_the_part_that_is_meant_decides_on_the_plan():
    torch.manual_seed(0)
    plain = Written2(OUTPUTS["a constant table"][0]).double()
    network = with_posteriors(plain, scale=0.3)
    weights = sample_weights(network, 3, seeded())
    for output in (0, lambda y: y[0]):
        assert execution_plan(network, as_inputs(X, output), True).together
        expected = stack([y[0] for y in by_definition(plain, (X,), weights)[0]])
        assert_close(predict(network, X, weights=weights, output=output), expected, UNSEEN)
    for _ in range(4):
        predict(network, X, weights=weights, output=lambda y: y[1])
    assert len(plans._PLANS[network]) == 3  # a function that is written anew each time is the same question


def test_gradients_with_several_inputs_and_outputs():
    torch.manual_seed(0)
    plain = Written2(lambda m, x, t: (m.a(x) @ t.mT, m.b(x))).double()
    network, t = with_posteriors(plain, scale=0.3), TABLE.clone().requires_grad_()
    weights = sample_weights(network, 3, seeded(1))
    variables = [t, *network.parameters()]
    loss = [sum(leaf.square().sum() for leaf in tree_leaves(y)) for y in (
        apply_weights(network, (X, t), weights), stack([plain_call(plain, (X, t), weights, s) for s in range(3)]))]
    for a, b in zip(*(torch.autograd.grad(one, variables, retain_graph=True) for one in loss)):
        assert_close(a, b, UNSEEN)


def plain_call(plain, args, weights, s):
    return torch.func.functional_call(plain, {name: weight[s] for name, weight in weights.items()}, args)


@pytest.mark.parametrize(("x", "said"), [
    ((X, Y), "tuple of 2"), ({"z": X}, "keys"), (Inputs(X, z=Y), "unexpected keyword"),
])
def test_inputs_that_the_forward_pass_does_not_take(x, said):
    network = with_posteriors(linear().double())
    for call in (predict, forward):
        with pytest.raises(Refusal, match=said):
            call(network, x, draws=2)
    with pytest.raises(Refusal, match=said):
        apply_weights(network, x, sample_weights(network, 2))


@pytest.mark.parametrize(("x", "said"), [
    ((3, None), "tensor"), ({}, "tensor"), ((), "tensor"), ((X, X.to_sparse()), "sparse"),
    ((X[:0], Y[:0]), "at least one"), ({3: X}, "Inputs"), ([X, Y], r"\(x, y\)"), (Inputs("x"), "tensor"),
])
def test_what_is_no_batch(x, said):
    with pytest.raises(Refusal, match=said):
        as_inputs(x)


@pytest.mark.parametrize("output", ["logit", 5, lambda y: y.logits, lambda y: None, 1.5])
def test_parts_that_an_output_does_not_have(output):
    network = with_posteriors(Written2(lambda m, x: {"logits": m.a(x)}).double())
    refusal = refused(lambda: predict(network, X, draws=2, output=output))
    assert "output=" in refusal.fix
    if output == "logit":
        assert refusal.fix == "output='logits'"


def test_numbers_that_left_torch_are_refused():
    network = with_posteriors(Written2(lambda m, x: (m.a(x), m.a(x).mean().item())).double())
    refusal = refused(lambda: predict(network, X, draws=3))
    assert "output[1]" in refusal.got and predict(network, X, draws=3, output=0).shape == (3, 6, 3)


def test_rooms_that_need_one_tensor_say_so():
    network = with_posteriors(Written2(pair).double())
    still = Equivariance(Action.trivial(Cyclic(2), (3,)), Action.trivial(Cyclic(2), (3,)))
    with pytest.raises(Refusal, match="returns one tensor"):
        orbit_predictions(network, X, still, draws=2)
    with pytest.raises(Refusal, match="outputs"):
        elbo(network, forward(network, X, 2), torch.zeros(6), 6)


def test_copies_are_the_networks_own():
    """Shared inputs, too: what one draw writes there is not seen by the next, or by the caller."""
    plain = Written2(lambda m, x, t: (m.a(x) + t.add_(1).sum(), m.b(x))).double()
    network, t = with_posteriors(plain), TABLE.clone()
    weights = sample_weights(network, 3, seeded())
    expected = stack([plain_call(copy.deepcopy(plain), (X, t.clone()), weights, s) for s in range(3)])
    for memory in (1, 2000, None):
        same(predict(network, (X, t), weights=weights, memory=memory), expected)
    assert torch.equal(t, TABLE)


def test_what_has_rows_is_decided_once():
    """A shared tensor of one row stays shared where a piece of the batch has one row."""
    inputs = Inputs(X, TABLE[:1], [3])
    for part in (*inputs.split(1), inputs.split(4)[1], inputs.clone(), inputs.each_row(lambda rows: rows[:1])):
        assert part.batched == [True, False, False] and part.args[1].shape == (1, 3)
    assert len(inputs.split(1)[0]) == 1 and [len(part) for part in inputs.split(4)] == [4, 2]
