"""Data: what is refused, where files are found, splits, and augmentation over a group."""
import gzip
import hashlib
import os
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from symbnn.data.batches import batches, epoch_generator
from symbnn.data.sources import PARTS, SOURCES, Source, load, read_idx
from symbnn.data.sources import sources as module
from symbnn.data.splits import Dataset, Split, split_training, stratified_order
from symbnn.errors import Refusal
from symbnn.symmetry.actions import Action, natural_action, regular_channels
from symbnn.symmetry.fields import field, flips, rotations, rotations_and_flips, shifts
from symbnn.symmetry.groups import Cyclic, Symmetric
from symbnn.symmetry.signed_permutations import SignedPermutation
from tolerances import within_standard_errors


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits():
    return load()


# Splits and data sets


def a_split(n=6, shape=(1, 4, 4), classes=3):
    return Split(torch.rand(n, *shape, generator=seeded()), torch.arange(n) % classes)


@pytest.mark.parametrize(
    "inputs, labels, message",
    [
        (torch.rand(3, 2), torch.zeros(4).long(), "one integer label for each input"),
        (torch.rand(3, 2), torch.zeros(3, 2).long(), "one-hot labels"),
        (torch.rand(3), torch.zeros(3).long(), r"\(N, C, H, W\)"),
        (torch.rand(0, 2), torch.zeros(0).long(), "not empty"),
        (torch.rand(3, 0), torch.zeros(3).long(), "not empty"),
        (torch.ones(3, 2).byte(), torch.zeros(3).long(), "raw pixel bytes"),
        (torch.rand(3, 2), torch.zeros(3), "int64"),
        (torch.rand(3, 2), torch.tensor([0, -1, 2]), "label -1"),
        (torch.tensor([[0.0, 1.0], [torch.inf, 0.0]]), torch.tensor([0, 1]), "1 of 2 inputs, first in input 1"),
        (torch.tensor([[0.0, torch.nan], [torch.nan, 0.0]]), torch.tensor([0, 1]), "2 of 2 inputs, first in input 0"),
    ],
)
def test_bad_splits_are_refused(inputs, labels, message):
    with pytest.raises(Refusal, match=message):
        Split(inputs, labels)


def test_arrays_are_not_taken_for_tensors():
    with pytest.raises(Refusal, match="ndarray and Tensor"):
        Split(torch.rand(3, 1).numpy(), torch.arange(3))


@pytest.mark.parametrize("seed", [-1, 2**63, 0.5, "one"])
def test_seeds_that_are_none_are_refused(seed):
    with pytest.raises(Refusal, match="A seed is an integer"):
        split_training(Split(torch.rand(9, 1), torch.arange(9)), validation_size=3, seed=seed)


def test_bad_data_sets_are_refused():
    split, other = a_split(), a_split(shape=(1, 4, 5))
    with pytest.raises(Refusal, match="label 2 in the train split"):
        Dataset("toy", split, split.take(torch.tensor([0, 1])), split.take(torch.tensor([0])), ("a", "b"))
    with pytest.raises(Refusal, match="label 2 in the test split"):
        Dataset("toy", split.take(torch.tensor([0])), split.take(torch.tensor([1])), split, ("a", "b"))
    with pytest.raises(Refusal, match="one shape"):
        Dataset("toy", split, split, other, ("a", "b", "c"))
    with pytest.raises(Refusal, match="float64"):
        Dataset("toy", split, Split(split.inputs.double(), split.labels), split, ("a", "b", "c"))


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


@pytest.mark.parametrize("sizes", [(0, None), (200, None), (-1, 10), (30, 171), (30, 0), (30, -5), (250, 1)])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(Refusal, match="share the 200 training inputs"):
        split_training(numbered(), validation_size=sizes[0], train_size=sizes[1])


def test_digits(digits):
    from sklearn.datasets import load_digits

    raw = load_digits()
    assert [len(split) for split in (digits.train, digits.validation, digits.test)] == [1294, 143, 360]
    parts = torch.cat([split.inputs for split in (digits.train, digits.validation, digits.test)])
    assert sorted((parts * 16).byte().flatten(1).tolist()) == sorted(raw.data.astype(int).tolist())
    pairs = {(tuple(x), int(y)) for x, y in zip(raw.data.astype(int).tolist(), raw.target)}
    scaled = (16 * digits.test.inputs).flatten(1).int().tolist()
    assert {(tuple(x), int(y)) for x, y in zip(scaled, digits.test.labels)} <= pairs
    for seed in range(3):
        other = load("digits", seed=seed, train_size=500, dtype=torch.float64)
        assert torch.equal(other.test.inputs.float(), digits.test.inputs)
        assert (torch.bincount(other.train.labels) - 50).abs().max() <= 2
        assert other.train.inputs.dtype == torch.float64
        held = {x.numpy().tobytes() for x in other.test.inputs}
        assert not any(x.numpy().tobytes() in held for split in (other.train, other.validation) for x in split.inputs)


def test_names_and_folders_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(Refusal, match="one of digits, mnist, fashion_mnist"):
        load("cifar10")
    with pytest.raises(Refusal, match="not read from a folder"):
        load("digits", tmp_path)
    with pytest.raises(Refusal, match="lacks some of them"):
        load("mnist", tmp_path)
    with pytest.raises(Refusal, match="is not a folder"):
        load("mnist", tmp_path / "absent")
    with pytest.raises(Refusal, match="download=False"):
        load("mnist", download=False)


# IDX files


def idx(array: np.ndarray, code=0x08) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, code, array.ndim]) + sizes + array.astype(module.IDX_TYPES[code]).tobytes()


@given(st.lists(st.integers(0, 4), min_size=0, max_size=4), st.sampled_from(sorted(module.IDX_TYPES)), st.booleans())
@settings(deadline=None)
def test_idx_files_are_read_as_written(tmp_path_factory, shape, code, compressed):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape) % 100
    content = idx(array, code)
    path = tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(gzip.compress(content) if compressed else content)
    assert np.array_equal(read_idx(path), array)


@given(st.integers(0, 39), st.booleans())
@settings(deadline=None)
def test_every_truncation_is_refused_by_name(tmp_path_factory, length, compressed):
    content = idx(np.arange(24).reshape(2, 3, 4))
    path = tmp_path_factory.mktemp("idx") / "some-images"
    path.write_bytes(gzip.compress(content[:length]) if compressed else content[:length])
    with pytest.raises(Refusal, match="some-images is a complete IDX file"):
        read_idx(path)


def test_foreign_and_damaged_files_are_refused_by_name(tmp_path):
    path, content = tmp_path / "some-images", idx(np.arange(24).reshape(2, 3, 4))
    packed = gzip.compress(content)
    bad_sum = packed[:-8] + bytes(8)
    foreign = (content + b"\0", b"\x89PNG\r\n", b"\0\0\x07\x01" + content[4:], b"\1" + content)
    for broken in (*foreign, packed[:-1], packed[:5], bad_sum):
        path.write_bytes(broken)
        with pytest.raises(Refusal, match="some-images is a complete IDX file"):
            read_idx(path)
    with pytest.raises(Refusal, match="No such file"):
        read_idx(tmp_path / "absent")
    with pytest.raises(Refusal, match="cannot be read"):
        read_idx(tmp_path)


# A small data set under the name of MNIST, with its own checksums


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder with four small gzip files, which SOURCES describes correctly."""
    random = np.random.default_rng(0)
    arrays = [array for n in (40, 20) for array in (random.integers(0, 256, (n, 4, 4)), np.arange(n) % 10)]
    folder, contents = tmp_path / "files", [idx(array) for array in arrays]
    folder.mkdir()
    for part, content in zip(PARTS, contents):
        (folder / f"{part}.gz").write_bytes(gzip.compress(content, mtime=0))
    source = Source(
        classes=tuple("0123456789"),
        sha256=tuple(hashlib.sha256(content).hexdigest() for content in contents),
        md5=tuple(hashlib.md5((folder / f"{part}.gz").read_bytes()).hexdigest() for part in PARTS),
        mirrors=(),
    )
    monkeypatch.setitem(SOURCES, "mnist", source)
    return folder


def test_files_of_a_folder(tiny):
    data = load("mnist", tiny, validation_size=10)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [30, 10, 20]
    expected = torch.tensor(read_idx(tiny / f"{PARTS[2]}.gz")).float()[:, None] / 255
    assert torch.equal(data.test.inputs, expected)
    assert torch.equal(data.test.labels, torch.arange(20) % 10)
    everything = torch.cat([data.train.inputs, data.validation.inputs])
    training = torch.tensor(read_idx(tiny / f"{PARTS[0]}.gz")).float()[:, None] / 255
    assert sorted(everything.flatten(1).tolist()) == sorted(training.flatten(1).tolist())


def test_plain_and_recompressed_files_and_a_subfolder_are_the_same_data(tiny):
    for part in PARTS[:2]:
        (tiny / part).write_bytes(gzip.decompress((tiny / f"{part}.gz").read_bytes()))
        (tiny / f"{part}.gz").unlink()
    other = tiny / f"{PARTS[2]}.gz"
    other.write_bytes(gzip.compress(gzip.decompress(other.read_bytes()), compresslevel=1, mtime=7))
    first = load("mnist", tiny, validation_size=10)
    (tiny.parent / "mnist").symlink_to(tiny)
    second = load("mnist", str(tiny.parent), validation_size=10)
    assert torch.equal(first.train.inputs, second.train.inputs)


def test_swapped_files_are_named(tiny):
    a, b = tiny / f"{PARTS[0]}.gz", tiny / f"{PARTS[2]}.gz"
    a.rename(tiny / "x"), b.rename(a), (tiny / "x").rename(b)
    with pytest.raises(Refusal, match=r"train-images-idx3-ubyte.* t10k-images-idx3-ubyte of mnist"):
        load("mnist", tiny)


def test_one_changed_byte_and_one_missing_file_are_refused(tiny):
    path = tiny / f"{PARTS[3]}.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[-1] ^= 1
    path.write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(Refusal, match=r"t10k-labels.*unknown file of shape \(20,\)"):
        load("mnist", tiny)
    path.unlink()
    with pytest.raises(Refusal, match="lacks some of them"):
        load("mnist", tiny)


# Downloads, from a server of our own


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        self.server.requested.append(self.path)


@pytest.fixture
def mirror(tiny, tmp_path, monkeypatch):
    """A local server of the tiny files, and a cache folder; returns (server, cache)."""
    import pooch

    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(variable, "127.0.0.1")
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tiny)))
    server.requested = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    point_to(monkeypatch, f"http://127.0.0.1:{server.server_port}/")
    yield server, tmp_path / "cache" / "symbnn" / "mnist"
    server.shutdown()
    server.server_close()
    thread.join()


def point_to(monkeypatch, *mirrors, **changes):
    import dataclasses

    monkeypatch.setitem(SOURCES, "mnist", dataclasses.replace(SOURCES["mnist"], mirrors=mirrors, **changes))


def test_a_download_is_verified_and_cached(mirror, tiny):
    server, cache = mirror
    first = load("mnist", validation_size=10)
    assert sorted(path.name for path in cache.iterdir()) == sorted(f"{part}.gz" for part in PARTS)
    assert len(server.requested) == 4
    second = load("mnist", validation_size=10)
    assert len(server.requested) == 4
    given_folder = load("mnist", tiny, validation_size=10)
    for other in (second, given_folder):
        assert torch.equal(first.train.inputs, other.train.inputs)


def test_a_damaged_cache_is_fetched_again(mirror):
    server, cache = mirror
    load("mnist")
    damaged = cache / f"{PARTS[0]}.gz"
    damaged.write_bytes(damaged.read_bytes()[:-5])
    load("mnist")
    assert len(server.requested) == 5


def test_the_second_mirror_is_tried(mirror, monkeypatch):
    server, _ = mirror
    here = f"http://127.0.0.1:{server.server_port}/"
    point_to(monkeypatch, here + "absent/", here)
    assert len(load("mnist", validation_size=10).train) == 30


def test_a_wrong_download_is_refused_and_not_kept(mirror, monkeypatch):
    _, cache = mirror
    point_to(monkeypatch, *SOURCES["mnist"].mirrors, md5=("0" * 32,) * 4)
    with pytest.raises(Refusal, match=r"train-images.*published checksum.*hash.*other means"):
        load("mnist")
    assert not any(path.is_file() for path in cache.rglob("*"))


def test_no_network_and_an_unwritable_cache_are_refused(mirror, monkeypatch):
    _, cache = mirror
    cache.parent.parent.write_text("a file where the cache folder should be")
    with pytest.raises(Refusal, match="unwritable folder"):
        load("mnist")
    cache.parent.parent.unlink()
    point_to(monkeypatch, "http://127.0.0.1:9/")
    with pytest.raises(Refusal, match=r"ConnectionError.*no network.*embedded digits"):
        load("mnist")


# The real files, where they are


@pytest.mark.skipif(not Path(SOURCES["fashion_mnist"].installed).is_dir(), reason="FashionMNIST is not installed")
def test_fashion_mnist_as_installed():
    data = load("fashion_mnist", train_size=50_000, download=False)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [50_000, 6000, 10_000]
    assert (data.shape, len(data.classes)) == ((1, 28, 28), 10)
    assert torch.bincount(data.validation.labels).tolist() == [600] * 10
    assert torch.bincount(data.test.labels).tolist() == [1000] * 10
    assert data.classes[int(data.test.labels[0])] == "Ankle boot"
    assert (float(data.train.inputs.min()), float(data.train.inputs.max())) == (0.0, 1.0)


def mnist_folder() -> Path:
    folder = Path(os.environ.get("SYMBNN_MNIST", "no such folder"))
    if not folder.is_dir():
        pytest.skip("MNIST is absent: set SYMBNN_MNIST to a folder with its four files")
    return folder


def test_mnist_of_a_folder():
    data = load("mnist", mnist_folder())
    assert [len(split) for split in (data.train, data.validation, data.test)] == [54_000, 6000, 10_000]
    assert torch.bincount(data.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data.test.labels[:5].tolist() == [7, 2, 1, 0, 4]


def test_mnist_under_the_name_of_fashion_mnist_is_named():
    with pytest.raises(Refusal, match=r"has the content of train-images.* of fashion_mnist.*train-images.* of mnist"):
        load("fashion_mnist", mnist_folder())


# Augmentation


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
    permuting = natural_action(Symmetric(9))
    inputs, labels = epoch_of(split, 8, "random", action=permuting, generator=seeded(1))
    assert torch.equal(inputs.sort(1).values, split.inputs[labels].sort(1).values)
    assert len({tuple(row.argsort().tolist()) for row in inputs}) == 30
    with pytest.raises(Refusal, match="listed only up to"):
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
        with pytest.raises(Refusal, match="batch_size >= 1"):
            batches(split, size)
    for augmentation in ("full", "random"):
        with pytest.raises(Refusal, match="no action"):
            batches(split, 4, augmentation)
        with pytest.raises(Refusal, match=r"an action on shape \(2, 4, 6\)"):
            batches(split, 4, augmentation, action=field(flips(), (2, 4, 6)))
        with pytest.raises(Refusal, match="moves the classes"):
            batches(split, 4, augmentation, action=action, output=regular_channels(Cyclic(4)))
        batches(split, 4, augmentation, action=action, output=Action.trivial(Cyclic(4), (10,)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_lie_where_the_split_lies_and_are_the_same_there(digits):
    action = field(rotations_and_flips(), digits.shape)
    there = digits.to("cuda")
    for augmentation in ("full", "random", "none"):
        here = batches(digits.train, 100, augmentation, action=action, generator=seeded())
        for (x, y), (u, v) in zip(here, batches(there.train, 100, augmentation, action=action, generator=seeded())):
            assert u.is_cuda
            assert v.is_cuda
            assert torch.equal(x, u.cpu())
            assert torch.equal(y, v.cpu())


def test_the_members_of_a_class_are_shuffled():
    labels, seeds = torch.arange(8) % 2, 800
    first = torch.zeros(8)
    for seed in range(seeds):
        order = stratified_order(labels, seeded(seed))
        for label in (0, 1):
            first[order[labels[order] == label][0]] += 1
    within_standard_errors(first.double() / seeds, 1 / 4, (1 / 4 * 3 / 4 / seeds) ** 0.5)
