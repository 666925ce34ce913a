"""What is attacked: one folder of each kind that the library writes or reads, and how it is read."""
import gzip
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from symbnn.data.idx import read_idx
from symbnn.data.own_images import load_npz
from symbnn.data.splits import Split
from symbnn.posterior.layers import with_posteriors
from symbnn.studies.catalogue import find_study
from symbnn.studies.grids import Study
from symbnn.studies.results import provenance, read_results, save
from symbnn.studies.runs import FUNCTIONS, FunctionRun
from symbnn.studies.store import execute, stored
from symbnn.studies.tables import table
from symbnn.training.architectures import Architecture, build
from symbnn.training.checkpoints import load_network, read_checkpoint
from symbnn.training.loop import train

TINY = Architecture("mlp", (1, 2, 2), 2, (3,))
DATA = Split(torch.rand(8, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2)
SETTINGS: dict[str, Any] = {"batch_size": 4, "draws": 2, "augmentation": "none", "learning_rate": 0.01}


def network(seed: int = 0) -> nn.Module:
    """A Bayesian network of 23 weights."""
    return with_posteriors(build(TINY, torch.Generator().manual_seed(seed)))


def digest(net: nn.Module) -> str:
    """The same for the same parameters and buffers."""
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in net.state_dict().values())).hexdigest()


def trained(folder: Path, its: nn.Module | None = None, **others) -> Any:
    """A short training run, of this network or a new one, with its checkpoint in this folder."""
    return train(its or network(), DATA, epochs=3, folder=folder, architecture=TINY, **SETTINGS, **others)


def toy(seed: int, a: float) -> dict:
    """A simulation that takes no time."""
    return {"value": a + seed, "accuracy": 0.5}


STUDY = Study("A toy", "none", FunctionRun("toy"), ({"a": (1, 2)},), (0, 1), "a")


class Target(NamedTuple):
    """A kind of file: how it is made, how it is read, and whether it carries a seal or a checksum."""

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    sealed: bool


def _make_results(folder: Path) -> None:
    FUNCTIONS["toy"] = toy
    save(STUDY, execute(STUDY, folder / "work"), folder / "results", "symbnn reproduce toy")


def _read_results(folder: Path) -> Any:
    results = folder / "results"
    return read_results(results), read_results(results, "runs.csv"), provenance(results)


def _make_run(folder: Path) -> None:
    FUNCTIONS["toy"] = toy
    execute(STUDY, folder)


class DoneAgain(Exception):
    """A record that other code has made, whose run is repeated."""


def _read_run(folder: Path) -> Any:
    FUNCTIONS["toy"] = toy
    records = [record for run in STUDY.runs() if (record := stored(folder, run.name(None), run, None)) is not None]
    if len(records) < len(STUDY.runs()):
        raise DoneAgain
    return records, table(STUDY, records)


def _read_checkpoint(folder: Path) -> Any:
    return digest(load_network(folder)), read_checkpoint(folder).description


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


def _arrays() -> dict[str, np.ndarray]:
    images = np.random.default_rng(0).integers(0, 255, (12, 4, 4), dtype=np.uint8)
    return {"train_images": images, "train_labels": np.arange(12) % 3, "test_images": images[:6],
            "test_labels": np.arange(6) % 3}


def _read_images(folder: Path) -> Any:
    data = load_npz(folder / "mine.npz", validation_size=2)
    return [split.inputs.numpy().tobytes() + split.labels.numpy().tobytes() for split in (data.train, data.test)]


def _idx() -> bytes:
    images = _arrays()["train_images"]
    return struct.pack(">HBBIII", 0, 8, 3, *images.shape) + images.tobytes()


TARGETS = {
    "checkpoint": Target(lambda folder: (trained(folder), None)[1], _read_checkpoint, True),
    "run": Target(_make_run, _read_run, True),
    "results": Target(_make_results, _read_results, True),
    "study": Target(lambda folder: _write(folder / "study.json", json.dumps(STUDY.values()).encode()),
                    lambda folder: find_study(str(folder / "study.json")).values(), False),
    "npz": Target(lambda folder: np.savez_compressed(folder / "mine.npz", **_arrays()), _read_images, False),
    "idx": Target(lambda folder: _write(folder / "images", _idx()),
                  lambda folder: read_idx(folder / "images").tobytes(), False),
    "idx.gz": Target(lambda folder: _write(folder / "images.gz", gzip.compress(_idx())),
                     lambda folder: read_idx(folder / "images.gz").tobytes(), False),
}
