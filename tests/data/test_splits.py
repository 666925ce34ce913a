"""Splits and data sets: what is refused and whether the advice works, and the stratified order."""
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import seeded
from helpers_data import typed
from symbnn.data.sources import load
from symbnn.data.splits import Dataset, Split, split_training, stratified_order
from symbnn.errors import Refusal
from tolerances import within_standard_errors

# Splits and data sets


def a_split(n=6, shape=(1, 4, 4), classes=3):
    return Split(torch.rand(n, *shape, generator=seeded()), torch.arange(n) % classes)


@pytest.fixture(scope="module")
def digits():
    return load()


@pytest.mark.parametrize(
    "inputs, targets, message",
    [
        (torch.rand(3, 2), torch.zeros(4).long(), "one integer label for each"),
        (torch.rand(3), torch.zeros(3).long(), r"\(N, C, H, W\)"),
        (torch.rand(0, 2), torch.zeros(0).long(), "at least one input"),
        (torch.rand(3, 0), torch.zeros(3).long(), "at least one number"),
        (torch.rand(3, 2), torch.zeros(3, 0), "at least one number"),
        (torch.tensor([[0.0, 1.0], [torch.inf, 0.0]]), torch.tensor([0, 1]), "1 of 2 inputs, first in input 1"),
        (torch.tensor([[0.0, torch.nan], [torch.nan, 0.0]]), torch.tensor([0, 1]), "2 of 2 inputs, first in input 0"),
    ],
)
def test_bad_splits_are_refused(inputs, targets, message):
    with pytest.raises(Refusal, match=message):
        Split(inputs, targets)


def test_the_advice_on_inputs_that_are_not_finite_works():
    inputs, targets = torch.tensor([[0.0, 1.0], [torch.inf, 0.0]]), torch.tensor([0, 1])
    with pytest.raises(Refusal) as caught:
        Split(inputs, targets)
    assert len(typed(caught.value.fix, inputs=inputs, targets=targets, Split=Split)) == 1


@pytest.mark.parametrize("targets, message, meant", [
    (torch.zeros(3, 2).long(), "one-hot labels", [0, 0, 0]), (torch.eye(3), "one-hot labels", [0, 1, 2]),
    (torch.arange(3.0), "another type of number", [0, 1, 2]), (torch.arange(3).byte(), "int64", [0, 1, 2]),
    (torch.tensor([True, False, True]), "int64", [1, 0, 1]),
    (torch.tensor([0.5, 1.5, 2.0]), "regression", None), (torch.zeros(3, 4, 4).long(), "every pixel", None),
    (torch.tensor([0, -1, 2]), "label -1", [0, 2]),
])
def test_targets_that_are_no_labels_are_targets_all_the_same(targets, message, meant):
    split = Split(torch.rand(3, 2), targets)
    with pytest.raises(Refusal, match=message) as caught:
        len(split.labels)
    if meant is not None:
        advice = caught.value.fix.split(", or ")[0]
        assert typed(advice, inputs=split.inputs, targets=targets, Split=Split).labels.tolist() == meant


def test_the_advice_on_two_classes_works():
    signs = Split(torch.rand(4, 1), torch.tensor([-1, 1, 1, -1]))
    with pytest.raises(Refusal, match="-1") as caught:
        len(signs.labels)
    two = caught.value.fix.removesuffix(" for two classes").split(", or ")[1]
    assert typed(two, inputs=signs.inputs, targets=signs.targets, Split=Split).labels.tolist() == [0, 1, 1, 0]


def test_whole_numbers_are_inputs_and_splits_of_a_regression_are_random():
    tokens = Split(torch.arange(40).reshape(20, 2), torch.randn(20, 1, generator=seeded()))
    train, validation = split_training(tokens, validation_size=5, seed=1)
    found = torch.cat([train.inputs, validation.inputs])[:, 0].sort().values
    assert train.inputs.dtype == torch.int64 and torch.equal(found, tokens.inputs[:, 0])
    assert Dataset("numbers", train, validation, validation).classes == ()
    with pytest.raises(Refusal, match="targets of one shape"):
        Dataset("numbers", train, validation, Split(tokens.inputs, tokens.targets.expand(20, 2)))


def test_arrays_are_not_taken_for_tensors():
    with pytest.raises(Refusal, match=r"ndarray.*torch\.as_tensor\(inputs\)"):
        Split(torch.rand(3, 1).numpy(), torch.arange(3))
    with pytest.raises(Refusal, match=r"ndarray.*torch\.as_tensor\(targets\)"):
        Split(torch.rand(3, 1), torch.arange(3).numpy())


@pytest.mark.parametrize("seed", [-1, 2**63, 0.5, "one"])
def test_seeds_that_are_none_are_refused(seed):
    with pytest.raises(Refusal, match=r"Expected: a .*seed"):
        split_training(Split(torch.rand(9, 1), torch.arange(9)), validation_size=3, seed=seed)


def test_bad_data_sets_are_refused():
    split, other = a_split(), a_split(shape=(1, 4, 5))
    with pytest.raises(Refusal, match="label 2 in the train split"):
        Dataset("toy", split, split.take(torch.tensor([0, 1])), split.take(torch.tensor([0])), ("a", "b"))
    with pytest.raises(Refusal, match="label 2 in the test split"):
        Dataset("toy", split.take(torch.tensor([0])), split.take(torch.tensor([1])), split, ("a", "b"))
    with pytest.raises(Refusal, match="one shape"):
        Dataset("toy", split, split, other, ("a", "b", "c"))
    with pytest.raises(Refusal, match="float64") as caught:
        Dataset("toy", split, Split(split.inputs.double(), split.labels), split, ("a", "b", "c"))
    double = Split(split.inputs.double(), split.labels)
    named, advice = caught.value.fix.split("=", 1)
    made = typed(advice, Split=Split, train=split, **{named: double})
    assert named == "validation" and torch.equal(made.inputs, split.inputs)
    with pytest.raises(Refusal, match="a Tensor"):
        Dataset("toy", split, split, split.inputs, ("a", "b", "c"))


def test_a_data_set_is_a_value(digits):
    copy = pickle.loads(pickle.dumps(digits)).to("cpu")
    assert torch.equal(copy.validation.inputs, digits.validation.inputs)
    assert (copy.shape, copy.classes) == (digits.shape, digits.classes)
    with pytest.raises(AttributeError):
        digits.name = "other"


# Stratified splits


@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.integers(0, 100))
@settings(deadline=None)
def test_every_prefix_is_stratified(labels, seed):
    labels = torch.tensor(labels)
    order = stratified_order(labels, seeded(seed))
    assert torch.equal(order.sort().values, torch.arange(len(labels)))
    sizes = torch.bincount(labels).double()
    prefix = torch.nn.functional.one_hot(labels[order], len(sizes)).cumsum(0)
    share = torch.arange(1, len(labels) + 1)[:, None] * sizes / len(labels)
    allowed = (1 + (sizes > 0).sum() * sizes / len(labels)) / 2
    assert ((prefix - share).abs() <= allowed + 1e-9).all()


def numbered(n=200, classes=7):
    return Split(torch.arange(float(n))[:, None], torch.arange(n) % classes)


def test_validation_is_disjoint_reproducible_and_independent_of_the_training_size():
    whole = numbered()
    train, validation = split_training(whole, validation_size=30, seed=4)
    assert sorted(train.inputs.flatten().tolist() + validation.inputs.flatten().tolist()) == list(range(200))
    for size in (1, 10, 100, 170):
        smaller, same = split_training(whole, validation_size=30, train_size=size, seed=4)
        assert torch.equal(same.inputs, validation.inputs)
        assert torch.equal(smaller.inputs, train.inputs[:size])
    _, other = split_training(whole, validation_size=30, seed=5)
    assert not torch.equal(other.inputs, validation.inputs)


@pytest.mark.parametrize("sizes, advice", [
    ((0, None), "validation_size=20"), ((200, None), "validation_size=20"), ((-1, 10), "validation_size=20"),
    ((250, 1), "validation_size=20"), ((0.1, None), "validation_size=20"),
    ((30, 171), "train_size=170, or fewer"), ((30, 0), "train_size=170"), ((30, -5), "train_size=170"),
])
def test_sizes_that_do_not_fit_are_refused(sizes, advice):
    with pytest.raises(Refusal) as caught:
        split_training(numbered(), validation_size=sizes[0], train_size=sizes[1])
    assert caught.value.fix == advice
    name, size = advice.removesuffix(", or fewer").split("=")
    options = {"validation_size": 30, name: int(size)}
    train, validation = split_training(numbered(), **options)
    assert len(train) + len(validation) == 200


def test_few_inputs_are_split_all_the_same():
    train, validation = split_training(numbered(2, 2))
    assert (len(train), len(validation)) == (1, 1)
    with pytest.raises(Refusal, match=r"1 training inputs.*two inputs"):
        split_training(numbered(1, 1))


def test_the_members_of_a_class_are_shuffled():
    labels, seeds = torch.arange(8) % 2, 800
    first = torch.zeros(8)
    for seed in range(seeds):
        order = stratified_order(labels, seeded(seed))
        for label in (0, 1):
            first[order[labels[order] == label][0]] += 1
    within_standard_errors(first.double() / seeds, 1 / 4, (1 / 4 * 3 / 4 / seeds) ** 0.5)
