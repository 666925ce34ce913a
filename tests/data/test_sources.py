"""Sources: the digits, folders, downloads, and the real files where they are."""
import dataclasses
import gzip
import hashlib
import os
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers_data import idx
from symbnn.data.idx import read_idx
from symbnn.data.sources import PARTS, SOURCES, Source, load
from symbnn.errors import Refusal


@pytest.fixture(scope="module")
def digits():
    return load()


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


def test_packages_that_are_missing_are_named(monkeypatch, mirror):
    monkeypatch.setitem(sys.modules, "pooch", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(Refusal, match=r"pip install 'symbnn\[data\]'"):
        load("mnist")
    with pytest.raises(Refusal, match=r"pip install 'symbnn\[data\]'"):
        load("digits")


def test_names_and_folders_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(Refusal, match="one of digits, mnist, fashion_mnist"):
        load("cifar10")
    with pytest.raises(Refusal, match="no folder for the digits"):
        load("digits", tmp_path)
    with pytest.raises(Refusal, match=f"lacks {', '.join(PARTS)}"):
        load("mnist", tmp_path)
    with pytest.raises(Refusal, match="is not a folder"):
        load("mnist", tmp_path / "absent")
    with pytest.raises(Refusal, match="download=False"):
        load("mnist", download=False)


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
    with pytest.raises(Refusal, match=r"train-images-idx3-ubyte.* t10k-images-idx3-ubyte of mnist") as caught:
        load("mnist", tiny)
    assert caught.value.fix == f"the name {PARTS[2]} for this file"


def test_files_of_another_data_set_are_named(tiny):
    for part in PARTS:
        (tiny / f"{part}.gz").rename(tiny / part)
        (tiny / part).write_bytes(gzip.decompress((tiny / part).read_bytes()))
    with pytest.raises(Refusal, match=r"train-images-idx3-ubyte of mnist") as caught:
        load("fashion_mnist", tiny)
    assert caught.value.fix == 'load("mnist", root) for this folder'


def test_one_changed_byte_and_one_missing_file_are_refused(tiny):
    path = tiny / f"{PARTS[3]}.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[-1] ^= 1
    path.write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(Refusal, match=r"t10k-labels.*unknown file of shape \(20,\)"):
        load("mnist", tiny)
    path.unlink()
    with pytest.raises(Refusal, match=f"which lacks {PARTS[3]}. Likely"):
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
    with pytest.raises(Refusal, match=r'ConnectionError.*no network.*load\("digits"\)'):
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
    with pytest.raises(Refusal, match=r"train-images.* of fashion_mnist as.*train-images.* of mnist"):
        load("fashion_mnist", mnist_folder())
