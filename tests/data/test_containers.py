"""Containers of pairs: what is read as the same split, and what is refused before it is used."""
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from helpers import seeded
from symbnn.data import containers
from symbnn.data.containers import Pairs, as_pairs, as_split, batch_pair, joined_batches
from symbnn.data.sources import load
from symbnn.data.splits import Split
from symbnn.errors import Refusal

X, Y = torch.randn(30, 2, 3, generator=seeded()), torch.arange(30) % 4


class Frame:
    """As a table of pandas has it."""

    def __init__(self, values):
        self.values = values

    def to_numpy(self):
        return self.values


class Items:
    """A data set whose items are what is given."""

    def __init__(self, items):
        self.items, self.read = items, []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        self.read.append(i)
        return self.items[i]


class Stream(IterableDataset):
    def __iter__(self):
        yield X[0], Y[0]


@pytest.mark.parametrize("data", [
    Split(X, Y), (X, Y), [X, Y], (X.numpy(), Y.numpy()), (X.numpy().astype(">f4"), Y.numpy().astype(">i8")),
    (X.tolist(), Y.tolist()), (Frame(X.numpy()), Frame(Y.numpy())), TensorDataset(X, Y),
    Subset(TensorDataset(X, Y), range(30)), Items([(X[i], int(Y[i])) for i in range(30)]),
    Items([{"pixels": X[i].numpy(), "label": int(Y[i])} for i in range(30)]),
    list(zip(X, Y.tolist())),
], ids=lambda data: type(data).__name__)
def test_containers_are_the_same_split(data):
    found = as_split(data)
    torch.testing.assert_close(found.inputs.float(), X)
    assert torch.equal(found.labels, Y)


def test_items_are_put_together_in_parts_and_read_once_more_than_the_first(monkeypatch):
    monkeypatch.setattr(containers, "AT_ONCE", 7)
    items = Items([(X[i], Y[i]) for i in range(30)])
    assert torch.equal(as_split(items).inputs, X)
    assert items.read == [0, *range(30)]


def test_real_targets_have_an_axis_and_others_stay_as_they_are():
    numbers = Y.double()
    for data in ((X, numbers), TensorDataset(X, numbers), (X, numbers[:, None])):
        assert as_split(data).targets.shape == (30, 1)
    assert as_split((X, Y > 1)).targets.shape == (30,)
    assert as_split((X.long(), Y)).inputs.dtype == torch.int64


@pytest.mark.parametrize(("data", "said"), [
    (load("digits"), r"data\.train"), (X, r"Split\(x, y\)"),
    (None, "NoneType"), (Stream(), "Stream"), ({"x": X}, "dict"), ("data.npz", "str"), ((X, Y, Y), "tuple"),
    ([], "list"),
    (TensorDataset(X, X, Y), "TensorDataset"), (([[1.0], [1.0, 2.0]], [0, 1]), "several lengths"),
    ((np.array(["a", "b"]), [0, 1]), "numbers for categories"), ((np.array([None, 1.0]), [0, 1]), "object"),
    ((X, Y[:4]), "one integer label for each"), ((X[:0], Y[:0]), "at least one"),
    ((X.numpy().astype(np.longdouble), Y), "longdouble|float128"),
    (Items([(torch.zeros(2), 0), (torch.zeros(3), 1), (torch.zeros(2), 0)]), "stack"),
    (Items([("a", 0)] * 3), "tuple and|str"),
    (Items([(X[i], Y[i], 0) for i in range(3)]), "Items"), ((X / 0, Y), "NaN or infinity"),
])
def test_what_is_no_data_is_refused(data, said):
    with pytest.raises(Refusal, match=said):
        as_split(data)


def test_parts_of_several_shapes_are_refused(monkeypatch):
    monkeypatch.setattr(containers, "AT_ONCE", 2)
    with pytest.raises(Refusal, match="one shape"):
        as_split(Items([(torch.zeros(2 + (i > 3)), 0) for i in range(6)]))


def test_what_does_not_fit_into_memory_is_refused_after_the_first_part(monkeypatch):
    monkeypatch.setattr("symbnn.memory.ROOM", 100)
    monkeypatch.setattr(containers, "AT_ONCE", 5)
    items = Items([(X[i], Y[i]) for i in range(30)])
    with pytest.raises(Refusal, match="read into memory"):
        as_split(items)
    assert len(items.read) == 6


# Several inputs


SIDES = [((X[i], X[i, 0]), int(Y[i])) for i in range(30)]
NAMED = [({"left": X[i], "right": X[i, 0]}, int(Y[i])) for i in range(30)]


@pytest.mark.parametrize("items", [SIDES, NAMED], ids=["tuples", "names"])
@pytest.mark.parametrize("wrapped", [Items, lambda items: DataLoader(items, 2), lambda items: DataLoader(items, 7)],
                         ids=["data set", "batches of two", "batches of seven"])
def test_several_inputs_of_each_item(items, wrapped, monkeypatch):
    monkeypatch.setattr(containers, "AT_ONCE", 2)  # as many rows as inputs: a list of two tensors is no list of rows
    found = as_pairs(wrapped(items))
    assert isinstance(found, Pairs) and torch.equal(found.targets, Y)
    assert all(map(torch.equal, found.inputs.rows(), (X, X[:, 0])))
    with pytest.raises(Refusal, match="inputs of several tensors"):
        as_split(wrapped(items))


def test_rows_in_a_list_are_one_input():
    square = torch.rand(3, 3, generator=seeded())
    found = batch_pair(([list(row) for row in square.tolist()], [0, 1, 2]))
    assert isinstance(found, Split) and torch.equal(found.inputs.float(), square)
    assert isinstance(as_pairs((list(square), [0, 1, 2])), Split)


def test_batches_of_one_and_of_two_inputs_do_not_go_together():
    with pytest.raises(Refusal, match="one shape"):
        joined_batches([as_pairs((X, Y)), as_pairs(((X, X), Y))])
