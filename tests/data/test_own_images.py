"""Images of one's own: what is read from an .npz file, and what is refused."""
import numpy as np
import pytest
import torch

from symbnn.data.own_images import load_npz
from symbnn.errors import Refusal
from tolerances import assert_close


def arrays(**changes):
    generator = np.random.default_rng(0)
    made = {
        "train_images": generator.integers(0, 256, (40, 8, 8), dtype=np.uint8), "train_labels": np.arange(40) % 3,
        "test_images": generator.integers(0, 256, (6, 8, 8), dtype=np.uint8), "test_labels": np.arange(6) % 3,
    }
    return {**made, **changes}


def test_own_images_are_read(tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays())
    data = load_npz(tmp_path / "mine.npz")
    assert data.shape == (1, 8, 8) and data.classes == ("0", "1", "2") and len(data.train) == 36
    assert_close(data.test.inputs[:, 0] * 255, arrays()["test_images"].astype(float), 1e-5)


def test_floats_and_channels_are_kept(tmp_path):
    images = np.random.default_rng(0).normal(size=(40, 3, 8, 8))
    np.savez(tmp_path / "mine.npz", **arrays(train_images=images, test_images=images[:6]))
    data = load_npz(tmp_path / "mine.npz", dtype=torch.float64)
    assert data.shape == (3, 8, 8)
    assert_close(data.test.inputs, images[:6])


WRONG = {
    "NaN": (arrays(train_images=np.full((40, 8, 8), np.nan)), "NaN"),
    "labels out of range": (arrays(test_labels=np.full(6, 7)), "label 7 in the test split"),
    "negative labels": (arrays(train_labels=np.full(40, -1)), "count from 0"),
    "flattened": (arrays(train_images=np.zeros((40, 64))), "shape"),
    "too few labels": (arrays(train_labels=np.zeros(3, int)), "one integer label for each"),
    "labels as floats": (arrays(train_labels=np.zeros(40)), "not integers"),
    "pixels as 16-bit": (arrays(train_images=np.zeros((40, 8, 8), np.uint16)), "uint16"),
    "other test shape": (arrays(test_images=np.zeros((6, 10, 10))), "one shape"),
    "objects": (arrays(train_labels=np.array([None] * 40)), "npz file"),
    "missing": ({"train_images": np.zeros((4, 8, 8))}, "npz file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arrays_are_refused(case, tmp_path):
    content, reason = WRONG[case]
    np.savez(tmp_path / "mine.npz", **content)
    with pytest.raises(Refusal, match=reason):
        load_npz(tmp_path / "mine.npz")


class Bomb:
    """Counts how often it is unpickled."""

    exploded = 0

    def __reduce__(self):
        return Bomb.explode, ()

    @staticmethod
    def explode():
        """What unpickling runs."""
        Bomb.exploded += 1


def test_reading_a_file_runs_nothing(tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays(train_labels=np.array([Bomb()] * 40, dtype=object)))
    with pytest.raises(Refusal, match="npz file"):
        load_npz(tmp_path / "mine.npz")
    assert not Bomb.exploded


@pytest.mark.parametrize("content", [None, b"", b"text", b"PK\x03\x04 truncated", b"\x93NUMPY"])
def test_wrong_files_are_refused(content, tmp_path):
    path = tmp_path / "mine.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Refusal, match="train_images") as caught:
        load_npz(path)
    assert str(tmp_path) not in str(caught.value)
