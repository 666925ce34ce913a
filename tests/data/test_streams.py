"""Streams: how many data, the same order again, augmentation, several inputs, refusals."""
import itertools
import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from helpers import seeded
from symbnn.data.batches import moving_pairs
from symbnn.data.containers import Pairs, as_pairs
from symbnn.data.splits import Split
from symbnn.data.streams import Stream, StreamEpoch, as_source
from symbnn.errors import Refusal
from symbnn.posterior.calls import Inputs
from symbnn.posterior.likelihoods import Categorical
from symbnn.posterior.real_targets import Gaussian
from symbnn.symmetry.fields import field, rotations, shifts

X, Y = torch.rand(23, 1, 4, 4, generator=seeded()), torch.arange(23) % 3
ROWS = TensorDataset(X, Y)


class Lines(IterableDataset):
    """Rows one by one, as from a file; what reads it twice gets it twice."""

    def __init__(self, count=23, sized=False):
        self.count, self.epochs = count, []
        if sized:
            self.__class__ = SizedLines

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        return ((X[i % 23], int(Y[i % 23])) for i in range(self.count))


class SizedLines(Lines):
    def __len__(self):
        return self.count


class Shaky(TensorDataset):
    """Rows with noise from the three generators that pipelines draw from."""

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return x + torch.rand(()) + np.random.rand() + random.random(), y  # noqa: NPY002


def epoch_of(source, epoch=0, seed=0, **options):
    stream = source if isinstance(source, Stream) else Stream(source)
    return list(StreamEpoch(stream, seed, epoch, **options))


# How many


@pytest.mark.parametrize(("source", "num_data", "sizes"), [
    (lambda: DataLoader(ROWS, 5), 23, [5, 5, 5, 5, 3]),
    (lambda: DataLoader(ROWS, 11), 23, [11, 12]),
    (lambda: DataLoader(ROWS, 5, drop_last=True, shuffle=True), 23, [5] * 4),
    (lambda: DataLoader(ROWS, 1), 23, [1] * 23),
    (lambda: DataLoader(Subset(ROWS, range(6)), 4), 6, [4, 2]),
    (lambda: Stream(DataLoader(ROWS, sampler=SubsetRandomSampler(range(10)), batch_size=4), 10), 10, [4, 4, 2]),
    (lambda: Stream(DataLoader(ROWS, sampler=RandomSampler(ROWS, num_samples=8), batch_size=4), 23), 23, [4, 4]),
    (lambda: Stream(DataLoader(ROWS, batch_sampler=BatchSampler(SequentialSampler(ROWS), 9, False)), 23), 23,
     [9, 9, 5]),
    (lambda: Stream(Lines(), 23, batch_size=10), 23, [10, 10, 3]),
    (lambda: Stream(Lines(sized=True), batch_size=11), 23, [11, 12]),
    (lambda: Stream(DataLoader(Lines(), 6), 23), 23, [6, 6, 6, 5]),
    (lambda: Stream(lambda epoch: zip(X.split(7), Y.split(7)), 23), 23, [7, 7, 7, 2]),
    (lambda: Stream(lambda epoch: itertools.repeat((X, Y)), 10**6, steps=3), 10**6, [23] * 3),
    (lambda: Stream([(X[:12].numpy(), Y[:12].tolist()), (X[12:], Y[12:])], 23), 23, [12, 11]),
    (lambda: Stream([{"label": Y, "image": X}], 23), 23, [23]),
])
def test_numbers_of_data_and_of_batches(source, num_data, sizes):
    stream = source() if isinstance(source(), Stream) else Stream(source())
    epoch = StreamEpoch(stream, 0, 0)
    found = [len(targets) for _, targets in epoch]
    assert (epoch.num_examples, found) == (num_data, sizes)
    assert len(found) <= len(epoch) and epoch.smallest <= min(found)


def test_rows_of_the_last_batch_are_joined_whole():
    seen = torch.cat([inputs for inputs, _ in epoch_of(DataLoader(ROWS, 11))])
    assert torch.equal(seen, X)
    both = Stream([({"a": X[:22], "b": X[:22, 0]}, Y[:22]), ({"a": X[22:], "b": X[22:, 0]}, Y[22:])], 23)
    ((inputs, targets),) = StreamEpoch(both, 0, 0)
    assert torch.equal(inputs.kwargs["a"], X) and torch.equal(inputs.kwargs["b"], X[:, 0]) and torch.equal(targets, Y)


# The same order again


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.processes)])
@pytest.mark.parametrize("generator", [None, "its own"])
def test_an_epoch_is_a_function_of_seed_and_number(workers, generator):
    own = torch.Generator().manual_seed(5) if generator else None
    loader = DataLoader(Shaky(X, Y), 6, shuffle=True, num_workers=workers, generator=own)

    def read(seed, epoch):
        return torch.cat([pair.inputs for pair in Stream(loader).read(seed, epoch)])

    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    state = own and own.get_state()
    first = read(1, 2)
    torch.randn(3), random.random()
    assert torch.equal(read(1, 2), first)
    assert not torch.equal(read(1, 3), first) and not torch.equal(read(2, 2), first)
    torch.set_rng_state(before[0]), random.setstate(before[1])
    read(0, 0), next(Stream(loader).read(0, 0))  # also where reading ends early
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002
    assert own is None or torch.equal(own.get_state(), state)


@pytest.mark.parametrize("sampler", [
    lambda: WeightedRandomSampler(torch.ones(23), 23), lambda: SubsetRandomSampler(range(23)),
    lambda: RandomSampler(ROWS, replacement=True),
])
def test_samplers_that_draw_are_repeated(sampler):
    stream = Stream(DataLoader(ROWS, 5, sampler=sampler()), 23)
    first, again, later = (torch.cat([pair.inputs for pair in stream.read(0, epoch)]) for epoch in (4, 4, 5))
    assert torch.equal(first, again) and not torch.equal(first, later)


def test_who_wants_to_know_the_epoch_is_told():
    lines = Lines()
    list(Stream(lines, 23).read(0, 7))
    list(Stream(DataLoader(lines, 5), 23).read(0, 8))
    assert lines.epochs == [7, 8]


# Groups


@pytest.mark.parametrize("batch", [1, 5, 11, 23])
def test_full_augmentation_has_every_pair_once(batch):
    action, stream = field(rotations(), (1, 4, 4)), Stream(DataLoader(ROWS, batch, shuffle=True))
    moving = moving_pairs(stream.first(), "full", action, None, Categorical())
    epoch = StreamEpoch(stream, 0, 0, moving, "full")
    inputs, labels = map(torch.cat, zip(*epoch))
    orbit = torch.stack([action.act(g, X) for g in action.group.elements()], 1)
    matches = (inputs[:, None, None] == orbit).flatten(3).all(3)
    assert epoch.num_examples == len(inputs) == 4 * 23
    assert (matches.sum((1, 2)) == 1).all() and (matches.sum(0) == 1).all()
    assert torch.equal(matches.any(2).int().argmax(1) % 3, labels)
    assert [len(y) for _, y in epoch] == [len(y) for _, y in epoch_of(stream) for _ in range(4)]


@pytest.mark.parametrize("action", [field(rotations(), (1, 4, 4)), field(shifts(4), (1, 4, 4))], ids=repr)
@pytest.mark.parametrize("augmentation", ["full", "random"])
def test_targets_move_with_their_inputs(action, augmentation):
    fields = Stream(DataLoader(TensorDataset(X, X.square()), 6, shuffle=True))
    moving = moving_pairs(fields.first(), augmentation, action, action, Gaussian(0.1))
    epoch = StreamEpoch(fields, 0, 0, moving, augmentation, Gaussian(0.1))
    assert all(torch.equal(y, x.square()) for x, y in epoch)
    firsts = [inputs for inputs, _ in epoch]
    assert all(torch.equal(again, inputs) for (again, _), inputs in zip(epoch, firsts))
    assert not torch.equal(torch.cat(firsts)[:23], torch.cat([inputs for inputs, _ in epoch_of(fields)]))


# Several inputs


def test_inputs_of_several_tensors():
    data = ({"image": X.double().numpy(), "size": Y[:, None].float()}, Y)
    stream = as_source(data, 8)
    assert isinstance(stream, Stream) and stream.num_data == 23
    inputs, targets = epoch_of(stream, dtype=torch.float32)[0]
    assert isinstance(inputs, Inputs) and {leaf.dtype for leaf in inputs.rows()} == {torch.float32}
    assert torch.equal(inputs.kwargs["size"][:, 0], targets.float())
    assert isinstance(as_pairs(data), Pairs) and isinstance(as_pairs((X, Y)), Split)
    assert isinstance(as_source((X, Y), 8), Split) and isinstance(as_source(ROWS, 8), Split)
    assert as_source(Lines(sized=True), 8).batch_size == 8


@pytest.mark.parametrize("columns", [
    {"input_ids": X, "attention_mask": X[:, 0], "labels": Y}, {"labels": Y, "a": X, "b": X},
])
def test_columns_by_name(columns):
    (inputs, targets), = epoch_of(Stream([columns], 23))
    assert torch.equal(targets, Y) and "labels" not in inputs.kwargs and len(inputs.kwargs) == 2


# Refusals


@pytest.mark.parametrize(("make", "said"), [
    (lambda: Stream([(X, Y)]), "num_data=60000"), (lambda: Stream(Lines()), "num_data=60000"),
    (lambda: Stream(iter([(X, Y)]), 23), "which can be read once"), (lambda: Stream((X, Y), 0), "at least 1"),
    (lambda: Stream(((X[i], Y[i]) for i in range(3)), 23), "which can be read once"), (lambda: Stream(3), "a int"),
    (lambda: Stream("data.csv"), "a str"), (lambda: Stream(X), "lie in memory"), (lambda: Stream(None), "NoneType"),
    (lambda: Stream([(X, Y)], "all"), "number of data"), (lambda: Stream([(X, Y)], 2.5), "number of data"),
    (lambda: Stream([(X, Y)], 23, steps=0), "steps"), (lambda: Stream([(X, Y)], 23, batch_size=0), "batch_size"),
    (lambda: Stream(DataLoader(ROWS, sampler=SubsetRandomSampler(range(10)))), "num_data=23"),
    (lambda: Stream(DataLoader(ROWS, batch_sampler=[[0, 1], [2, 3]])), "num_data=23"),
])
def test_what_is_no_stream_is_refused_when_it_is_made(make, said):
    with pytest.raises(Refusal, match=said):
        make()


@pytest.mark.parametrize(("source", "said"), [
    ([], "at least one batch"), (lambda epoch: iter(()), "at least one batch"),
    (DataLoader(Subset(ROWS, range(3)), 4, drop_last=True), "drop_last"),
    ([(X[0], 1)], "batch_size=128"), ([X], "pairs"), ([(X, Y, Y)], "a tuple of 3"), ([{"x": X}], "mapping"),
    ([(X, Y[:4])], "each"), ([(X / 0, Y)], "NaN or infinity"), ([(["a"] * 23, Y)], "numbers"),
    ([((X, X[:3]), Y)], "as many rows"), ([({"a": X / 0, "b": X}, Y)], "NaN or infinity"),
    (lambda epoch: [(X[:12], Y[:12])], "ended early"), (lambda epoch: [(X[:12], Y[:12])] * 3, "number of data"),
    (lambda epoch: [(X[:12], Y[:12]), (X[:11, :, :2], Y[:11])], "batch 2 of epoch 1"),
    (lambda epoch: [(X[:12], Y[:12]), (X[:11] / 0, Y[:11])], "batch 2 of epoch 1"),
    (lambda epoch: [(X[:12], Y[:12]), (X[:11], X[:11])], "of one shape in all batches"),
    (lambda epoch: [(X[:12], Y[:12]), ((X[:11], X[:11]), Y[:11])], "of one shape in all batches"),
    (lambda epoch: [(X[:12], Y[:12]), (X[:11], Y[:11] + 1)], r"label"),
])
def test_what_a_source_gives_is_looked_at(source, said):
    stream = source if isinstance(source, DataLoader) else Stream(source, 23)
    with pytest.raises(Refusal, match=said):
        epoch_of(stream, shape=(3,))


def test_an_epoch_of_so_many_steps_that_ends_early_is_refused():
    with pytest.raises(Refusal, match=r"got 2|2 batches"):
        epoch_of(Stream(lambda epoch: [(X, Y)] * 2, 100, steps=3))
