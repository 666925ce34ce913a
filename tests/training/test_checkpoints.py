"""Checkpoints come back bit by bit or are refused; what interrupts the writing leaves the previous one intact."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from symbnn import files
from symbnn.equivariance.arrangements import arrangement_of
from symbnn.equivariance.expansion import expand, expanded_action
from symbnn.errors import Refusal
from symbnn.posterior.families import FAMILIES
from symbnn.posterior.layers import with_posteriors
from symbnn.posterior.priors import fixed_means, isotropic, per_tensor, random_means
from symbnn.records import SEAL, write_record
from symbnn.symmetry.fields import field, rotations
from symbnn.symmetry.networks import network_action
from symbnn.training import checkpoints
from symbnn.training.architectures import PRESETS, Architecture, build
from symbnn.training.checkpoints import (
    DESCRIPTION,
    describe_network,
    has_checkpoint,
    load_network,
    load_tensors,
    network_tensors,
    read_checkpoint,
    save_network,
    write_checkpoint,
)

TINY = Architecture("cnn", (1, 4, 4), 3, (2,))


def made(architecture=TINY, family="gaussian", prior=None, dtype=torch.float32, seed=0):
    plain = build(architecture, torch.Generator().manual_seed(seed), dtype)
    return with_posteriors(plain, FAMILIES[family], prior=prior)


def equal(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_family_comes_back(tmp_path, family, dtype):
    network = made(family=family, dtype=dtype, prior=isotropic(0.7))
    save_network(tmp_path, network, TINY)
    assert equal(load_network(tmp_path), network)


@pytest.mark.parametrize(
    "prior",
    [per_tensor(2.0), random_means(5), fixed_means(dict(build(TINY).named_parameters()))],
    ids=["per_tensor", "random_means", "fixed_means"],
)
def test_every_prior_comes_back(tmp_path, prior):
    network = made(prior=prior)
    save_network(tmp_path, network, TINY, notes={"group": "C4"})
    assert equal(load_network(tmp_path), network)
    assert equal(load_network(str(tmp_path / DESCRIPTION)), network)
    assert read_checkpoint(tmp_path).description["notes"] == {"group": "C4"}


@pytest.mark.parametrize("prior", [None, random_means(5)], ids=["isotropic", "random"])
def test_an_expanded_network_comes_back(tmp_path, prior):
    action = network_action(build(TINY), field(rotations(), TINY.input_shape))
    expanded = expand(made(prior=prior), action).network
    save_network(tmp_path, expanded, TINY.expanded(4))
    assert equal(load_network(tmp_path), expanded)


def test_a_folder_holds_one_checkpoint(tmp_path):
    for seed in range(3):
        save_network(tmp_path, made(seed=seed), TINY)
        assert len(list(tmp_path.iterdir())) == 2
    assert equal(load_network(tmp_path), made(seed=2))


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("how", ["write", "replace"])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, failing, how):
    save_network(tmp_path, made(seed=0), TINY)
    calls = []
    real_fsync, real_replace = os.fsync, os.replace

    def full(real):
        def call(*arguments):
            calls.append(arguments)
            if len(calls) == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments)

        return call

    name, real = ("fsync", real_fsync) if how == "write" else ("replace", real_replace)
    monkeypatch.setattr(files.os, name, full(real))
    with pytest.raises(Refusal, match="No space left on device"):
        save_network(tmp_path, made(seed=1), TINY)
    monkeypatch.undo()
    assert equal(load_network(tmp_path), made(seed=0))
    assert not list(tmp_path.glob(".*"))  # no temporary file is left
    save_network(tmp_path, made(seed=1), TINY)
    assert equal(load_network(tmp_path), made(seed=1))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_killed_writer_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    save_network(tmp_path, made(seed=0), TINY)

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_network(tmp_path, made(seed=1), TINY)
    assert equal(load_network(tmp_path), made(seed=0))


def test_another_network_is_refused():
    tensors = network_tensors(made())
    tensors = {name.removeprefix("network/"): tensor for name, tensor in tensors.items()}
    wrong = {
        "another width": (made(Architecture("cnn", (1, 4, 4), 3, (4,))), r"\(2,\) torch.float32 for \(4,\)"),
        "another depth": (made(Architecture("mlp", (1, 4, 4), 3, (2,))), "without"),
        "another family": (made(family="full"), "without"),
        "another dtype": (made(dtype=torch.float64), "float32 for"),
        "another prior": (made(prior=random_means(0)), r"\(\) torch.float32 for"),
    }
    for network, message in wrong.values():
        before = {name: value.clone() for name, value in network.state_dict().items()}
        with pytest.raises(Refusal, match=message):
            load_tensors(network, tensors)
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    fewer = {name: tensor for name, tensor in tensors.items() if "bias" not in name}
    with pytest.raises(Refusal, match="without"):
        load_tensors(made(), fewer)


EDITS = {  # with a valid seal
    "a later version": ({"version": 2}, "version 2"),
    "no tensor entry": ({"tensors": "absent"}, "nothing at tensors"),
    "tensor entry of another type": ({"tensors": "file"}, "'file' at tensors"),
    "another architecture": ({"architecture": TINY.expanded(2).as_dict()}, "for"),
    "no architecture": ({"architecture": None}, "architecture None"),
    "unknown architecture field": ({"architecture": TINY.as_dict() | {"depth": 3}}, "at depth"),
    "architecture of another type": ({"architecture": ["cnn"]}, "at architecture"),
    "size as a text": ({"architecture": TINY.as_dict() | {"classes": "3"}}, "'3' at classes"),
    "unknown family": ({"family": "cauchy"}, "family cauchy"),
    "family of another type": ({"family": ["gaussian"]}, "at family"),
    "impossible size": ({"architecture": TINY.as_dict() | {"classes": 2**60}}, ""),
    "an entry that nobody reads": ({"familly": "point"}, "at familly"),
}


def spoil(folder: Path, how: str) -> None:
    description, file = folder / DESCRIPTION, next(folder.glob("*.safetensors"))
    text, data = description.read_text(), file.read_bytes()
    edited = {key: value for key, value in json.loads(text).items() if key != SEAL}
    if how == "no folder":
        description.unlink()
        file.unlink()
        folder.rmdir()
    elif how == "no description":
        description.unlink()
    elif how == "no tensors":
        file.unlink()
    elif how == "truncated tensors":
        file.write_bytes(data[: len(data) // 2])
    elif how == "empty tensors":
        file.write_bytes(b"")
    elif how == "flipped bit":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "truncated description":
        description.write_text(text[: len(text) // 2])
    elif how == "not text":
        description.write_bytes(b"\x80\x81\xff")
    elif how == "another format":
        description.write_text(json.dumps({"weights": 3}))
    elif how == "a list":
        description.write_text("[]")
    elif how == "a number that was edited":
        description.write_text(text.replace("1, 4, 4", "1, 4, 8").replace('"family": "gaussian"', '"family": "point"'))
    else:
        change, _ = EDITS[how]
        write_record(description, {key: value for key, value in {**edited, **change}.items() if value != "absent"})


@pytest.mark.parametrize(
    "how",
    ["no folder", "no description", "no tensors", "truncated tensors", "empty tensors", "flipped bit",
     "truncated description", "not text", "another format", "a list", "a number that was edited", *EDITS],
)
def test_damaged_checkpoints_are_refused_in_a_paragraph(tmp_path, how):
    folder = tmp_path / "run"
    save_network(folder, made(), TINY)
    spoil(folder, how)
    with pytest.raises(Refusal) as caught:
        load_network(folder)
    assert "\n" not in str(caught.value) and EDITS.get(how, ("", ""))[1] in caught.value.got


def test_a_valid_hash_of_no_safetensors_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.safetensors, "save", lambda tensors: b"not tensors")
    save_network(tmp_path, made(), TINY)
    with pytest.raises(Refusal, match="safetensors"):
        load_network(tmp_path)


def test_the_tensor_file_is_looked_for_in_the_folder_only(tmp_path):
    save_network(tmp_path / "a", made(), TINY)
    save_network(tmp_path / "b", made(seed=1), TINY)
    theirs = json.loads((tmp_path / "a" / DESCRIPTION).read_text())
    theirs["tensors"]["file"] = "../a/" + theirs["tensors"]["file"]
    (tmp_path / "b" / DESCRIPTION).write_text(json.dumps(theirs))
    with pytest.raises(Refusal):
        read_checkpoint(tmp_path / "b")


def test_a_network_of_one_s_own(tmp_path):
    network = with_posteriors(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    assert not has_checkpoint(tmp_path)
    write_checkpoint(tmp_path, network_tensors(network), describe_network(network, None))
    assert has_checkpoint(tmp_path)
    with pytest.raises(Refusal, match="on a network built as that one"):
        load_network(tmp_path)
    other = with_posteriors(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    load_tensors(other, read_checkpoint(tmp_path).part("network"))
    assert equal(other, network)


def test_notes_that_json_does_not_hold_are_refused_before_anything_is_written(tmp_path):
    save_network(tmp_path, made(seed=0), TINY)
    for value in (float("nan"), torch.zeros(2), tmp_path):
        with pytest.raises(Refusal, match="JSON values as notes"):
            save_network(tmp_path, made(seed=1), TINY, notes={"value": value})
    assert equal(load_network(tmp_path), made(seed=0)) and len(list(tmp_path.iterdir())) == 2


def test_an_old_file_that_cannot_be_removed_goes_with_the_next(tmp_path, monkeypatch):
    save_network(tmp_path, made(seed=0), TINY)

    real = Path.unlink

    def busy(self, missing_ok=False):
        if self.suffix == ".safetensors":
            raise PermissionError(errno.EACCES, "in use")
        real(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", busy)
    save_network(tmp_path, made(seed=1), TINY)
    monkeypatch.undo()
    assert equal(load_network(tmp_path), made(seed=1)) and len(list(tmp_path.iterdir())) == 3
    save_network(tmp_path, made(seed=2), TINY)
    assert len(list(tmp_path.iterdir())) == 2


def test_presets_have_a_family_by_name():
    for architecture in PRESETS.values():
        assert describe_network(made(architecture), architecture)["family"] == "gaussian"


def test_an_expansion_keeps_its_arrangement(tmp_path):
    action = network_action(build(TINY), field(rotations(), TINY.input_shape))
    save_network(tmp_path, expand(made(), action, "block_diagonal").network, TINY.expanded(4))
    back = load_network(tmp_path)
    assert arrangement_of(back) == "block_diagonal"
    expanded_action(back, action)
    write_record(tmp_path / DESCRIPTION, {**read_checkpoint(tmp_path).description, "arrangement": "diagonal"})
    with pytest.raises(Refusal, match="as the arrangement in"):
        load_network(tmp_path)
