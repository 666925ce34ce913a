"""Checkpoints that earlier versions wrote are read, and mean what they meant. Beside stands how each was made."""
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from symbnn.data.splits import Split
from symbnn.equivariance.arrangements import Arrangement, arrangement_of
from symbnn.posterior.families import FAMILIES
from symbnn.posterior.layers import kl_sum, posterior_mean_network, variational_tensors
from symbnn.posterior.sampling import apply_weights
from symbnn.symmetry.fields import field, rotations
from symbnn.training.architectures import Architecture
from symbnn.training.checkpoints import load_network, read_checkpoint
from symbnn.training.config import TrainingConfig
from symbnn.training.loop import train
from tolerances import assert_close, exact32

FOLDER = Path(__file__).parent / "checkpoint_0.1"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
INPUTS = torch.linspace(-1, 1, 3 * 16).reshape(3, 1, 4, 4)
TURNS = field(rotations(), (1, 4, 4))


def logits(network, deviations):
    """Of the network with every weight so many standard deviations above its posterior mean."""
    posteriors = {name: tensor.posterior for name, tensor in variational_tensors(network).items()}
    weights = {name: (its.mean + deviations * its.variance.sqrt())[None] for name, its in posteriors.items()}
    return apply_weights(network.eval(), INPUTS, weights)[0].detach()


@pytest.mark.parametrize("name", EXPECTED)
def test_an_old_network_predicts_what_it_predicted(name):
    network, expected = load_network(FOLDER / name), EXPECTED[name]
    assert_close(logits(network, 0), torch.tensor(expected["means"]), exact32)
    assert_close(logits(network, 1), torch.tensor(expected["above"]), exact32)
    assert_close(kl_sum(network), torch.tensor(expected["kl"]), exact32)


def test_every_family_was_stored_in_its_own_numbers():
    """A checkpoint that equals another one tests nothing."""
    stored = [path.read_bytes() for path in FOLDER.rglob("*.safetensors")]
    assert len(set(stored)) == len(stored) == len(EXPECTED)


def test_every_old_folder_is_compared():
    folders = {path.parent.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("checkpoint.json")}
    assert folders == EXPECTED.keys()


@pytest.mark.parametrize("family", ["gaussian", "laplace", "lognormal", "block", "full", "point"])
def test_the_families_of_old_have_their_names(family):
    tensors = variational_tensors(load_network(FOLDER / "families" / family)).values()
    assert {type(tensor.posterior) for tensor in tensors} == {FAMILIES[family]}


@pytest.mark.parametrize("arrangement", ["regular", "row_rolled", "row_constant", "block_diagonal"])
def test_the_arrangements_of_old_have_their_marks(arrangement):
    assert arrangement in get_args(Arrangement)
    assert arrangement_of(load_network(FOLDER / "arrangements" / arrangement)) == arrangement


def test_an_old_run_goes_on(tmp_path):
    shutil.copytree(FOLDER / "trained", tmp_path, dirs_exist_ok=True)
    stored, network = read_checkpoint(tmp_path).description, load_network(tmp_path)
    config = replace(TrainingConfig.from_dict(stored["config"]), epochs=2)
    found = train(network, Split(INPUTS, torch.arange(3)), config, action=TURNS, folder=tmp_path, resume=True,
                  architecture=Architecture(**stored["architecture"]))
    assert [record.epoch for record in found.history] == [0, 1]
    assert found.history[0]._asdict() == stored["history"][0]
    moved = posterior_mean_network(network)(INPUTS) - torch.tensor(EXPECTED["trained"]["means"])
    assert 0 < moved.abs().max() < 0.1
