"""Batches: augmentation over a group, an order that depends on seed and epoch alone, refusals."""
import pytest
import torch

import symbnn.data.batches as module
from helpers import seeded
from helpers_data import typed
from symbnn.data.batches import batches, epoch_generator
from symbnn.data.sources import load
from symbnn.data.splits import Split
from symbnn.errors import Refusal
from symbnn.symmetry.actions import Action, natural_action, regular_channels
from symbnn.symmetry.fields import field, flips, rotations, rotations_and_flips, shifts
from symbnn.symmetry.groups import Cyclic, Permutations
from symbnn.symmetry.signed_permutations import SignedPermutation
from tolerances import within_standard_errors

ACTIONS = [
    field(rotations(), (2, 4, 4)),
    field(rotations_and_flips(), (2, 4, 4)),
    field(flips(), (2, 4, 4)),
    field(shifts(4), (2, 4, 4)),
    field(flips(), (2, 4, 4), Action.trivial(Cyclic(2), (2,))),
]


def toy(n=10):
    return Split(torch.rand(n, 2, 4, 4, generator=seeded()), torch.arange(n))


def orbit_of(split, action):
    return torch.stack([action.act(g, split.inputs) for g in action.group.elements()], 1)


def epoch_of(*arguments, **options):
    return [torch.cat(column) for column in zip(*batches(*arguments, **options))]


@pytest.mark.parametrize("action", ACTIONS, ids=repr)
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_full_augmentation_has_every_pair_once(action, shuffle, batch_size):
    split = toy()
    epoch = batches(split, batch_size, "full", action=action, generator=seeded(), shuffle=shuffle)
    assert epoch.num_examples == 10 * action.group.order
    assert len(epoch) == len(list(epoch)) == -(-epoch.num_examples // batch_size)
    inputs, labels = map(torch.cat, zip(*epoch))
    matches = (inputs[:, None, None] == orbit_of(split, action)).flatten(3).all(3)
    assert (matches.sum((1, 2)) == 1).all()
    assert (matches.sum(0) == 1).all()
    assert torch.equal(matches.any(2).int().argmax(1), labels)
    if not shuffle:
        assert torch.equal(inputs, orbit_of(split, action).flatten(0, 1))


def test_shuffling_mixes_images_and_elements():
    split, action = toy(50), field(rotations_and_flips(), (2, 4, 4))
    _, labels = epoch_of(split, 400, "full", action=action, generator=seeded())
    spread = labels.view(8, 50).double().mean(1)  # means of 50 labels; in order they would be 3 to 46
    within_standard_errors(spread, 24.5, (50**2 / 12 / 50) ** 0.5)


@pytest.mark.parametrize("action", ACTIONS, ids=repr)
def test_random_augmentation_has_every_image_once_and_uniform_elements(action):
    split, counts = toy(), torch.zeros(10, action.group.order)
    epochs = 300
    for e in range(epochs):
        inputs, labels = epoch_of(split, 4, "random", action=action, generator=epoch_generator(0, e))
        assert torch.equal(labels.sort().values, torch.arange(10))
        counts += (inputs[:, None] == orbit_of(split, action)[labels]).flatten(2).all(2)[labels.argsort()]
    p = 1 / action.group.order
    within_standard_errors(counts.double() / epochs, p, (p * (1 - p) / epochs) ** 0.5)
    within_standard_errors(counts.double().mean(0) / epochs, p, (p * (1 - p) / epochs / 10) ** 0.5)


def test_signs_and_a_group_too_large_to_list():
    split = Split(torch.rand(30, 9, generator=seeded()), torch.arange(30))
    permuting = natural_action(Permutations(9))
    inputs, labels = epoch_of(split, 8, "random", action=permuting, generator=seeded(1))
    assert torch.equal(inputs.sort(1).values, split.inputs[labels].sort(1).values)
    assert len({tuple(row.argsort().tolist()) for row in inputs}) == 30
    with pytest.raises(Refusal, match="elements to list"):
        batches(split, 8, "full", action=permuting)
    minus = SignedPermutation(torch.arange(9), -torch.ones(9, dtype=torch.int8))
    sign = Action(Cyclic(2), (9,), lambda g: minus if g else SignedPermutation.identity(9))
    inputs, _ = epoch_of(split, 60, "full", action=sign, shuffle=False)
    assert torch.equal(inputs[::2], split.inputs)
    assert torch.equal(inputs[1::2], -split.inputs)


def test_no_table_is_needed(monkeypatch):
    """Maps built for each batch give what the table of all maps gives."""
    split, action = toy(), field(rotations_and_flips(), (2, 4, 4))
    options = {"action": action}
    table = epoch_of(split, 16, "full", generator=seeded(), **options)
    monkeypatch.setattr(module, "TABLE_LIMIT", 0)
    lazily = epoch_of(split, 16, "full", generator=seeded(), **options)
    assert all(torch.equal(a, b) for a, b in zip(table, lazily))


@pytest.mark.parametrize("augmentation", ["full", "random", "none"])
def test_an_epoch_depends_on_seed_and_epoch_alone(augmentation):
    split, action = toy(), field(rotations(), (2, 4, 4))

    def epoch(e, seed=0):
        return batches(split, 3, augmentation, action=action, generator=epoch_generator(seed, e))

    straight = [[x for x, _ in epoch(e)] for e in range(3)]
    torch.rand(7)  # whatever else was drawn in between
    resumed = [x for x, _ in epoch(2)]
    assert all(torch.equal(a, b) for a, b in zip(straight[2], resumed))
    assert not torch.equal(torch.cat(straight[0]), torch.cat(straight[1]))
    assert not torch.equal(torch.cat([x for x, _ in epoch(0, seed=1)]), torch.cat(straight[0]))
    twice = epoch(0)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(twice, twice))


def test_streams_of_generators_differ():
    draws = {
        (seed, e, stream): float(torch.rand(1, generator=epoch_generator(seed, e, stream), dtype=torch.float64))
        for seed in range(12) for e in range(12) for stream in ("data", "weights")
    }
    assert len(set(draws.values())) == len(draws)
    assert draws[1, 11, "data"] == float(torch.rand(1, generator=epoch_generator(1, 11), dtype=torch.float64))


def test_batches_do_not_alias_the_data():
    split, action = toy(), field(rotations(), (2, 4, 4))
    before = split.inputs.clone()
    for augmentation in ("full", "random", "none"):
        for x, y in batches(split, 3, augmentation, action=action):
            x.zero_(), y.zero_()
    assert torch.equal(split.inputs, before)
    assert torch.equal(split.labels, torch.arange(10))


def test_augmentation_that_does_not_fit_is_refused_at_once():
    split, action = toy(), field(rotations(), (2, 4, 4))
    with pytest.raises(Refusal, match="full, random, none"):
        batches(split, 4, "always", action=action)
    for size in (0, -3):
        with pytest.raises(Refusal, match="batch_size=10"):
            batches(split, size)
    for augmentation in ("full", "random"):
        with pytest.raises(Refusal, match="no action") as caught:
            batches(split, 4, augmentation)
        advice = caught.value.fix.split(", or action=")[1].removesuffix(" for images")
        batches(split, 4, augmentation, action=typed(advice, field=field, rotations=rotations))
        with pytest.raises(Refusal, match=r"an action on shape \(2, 4, 6\)"):
            batches(split, 4, augmentation, action=field(flips(), (2, 4, 6)))
        with pytest.raises(Refusal, match="one integer label in 0"):
            batches(split, 4, augmentation, action=action, output=regular_channels(Cyclic(4)))
        batches(split, 4, augmentation, action=action, output=Action.trivial(Cyclic(4), (10,)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_lie_where_the_split_lies_and_are_the_same_there():
    digits = load()
    action = field(rotations_and_flips(), digits.shape)
    there = digits.to("cuda")
    for augmentation in ("full", "random", "none"):
        here = batches(digits.train, 100, augmentation, action=action, generator=seeded())
        for (x, y), (u, v) in zip(here, batches(there.train, 100, augmentation, action=action, generator=seeded())):
            assert u.is_cuda
            assert v.is_cuda
            assert torch.equal(x, u.cpu())
            assert torch.equal(y, v.cpu())
