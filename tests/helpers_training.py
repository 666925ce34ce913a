"""What the tests of the rooms on training share: a small task, a small network, and runs that are compared."""
import json
import signal

import torch
from torch import nn

from helpers import seeded
from symbnn.data.splits import Split
from symbnn.posterior.independent import MeanFieldGaussian
from symbnn.posterior.layers import with_posteriors
from symbnn.records import write_record
from symbnn.symmetry.fields import field, rotations
from symbnn.training.architectures import Architecture, build
from symbnn.training.checkpoints import DESCRIPTION, read_checkpoint, write_checkpoint
from symbnn.training.config import TrainingConfig
from symbnn.training.loop import train

ARCHITECTURE = Architecture("cnn", (1, 4, 4), 2, (3,))
ACTION = field(rotations(), (1, 4, 4))
CONFIG = TrainingConfig(epochs=4, batch_size=16, draws=4, learning_rate=1e-2, seed=3, device="cpu")


def task(n=23, seed=0):
    """Bright against dark images: learned in a few steps, and invariant."""
    images = torch.rand(n, 1, 4, 4, generator=seeded(seed))
    labels = torch.arange(n) % 2
    return Split(images + labels[:, None, None, None], labels)


DATA, VALIDATION = task(), task(10, 1)


def network(seed=0, family=MeanFieldGaussian):
    return with_posteriors(build(ARCHITECTURE, seeded(seed)), family)


def run(config=CONFIG, data=DATA, net=None, **options):
    options = {"action": ACTION, "validation": VALIDATION, "architecture": ARCHITECTURE} | options
    return train(net or network(), data, config, **options)


def tensors(result):
    return {name: value.clone() for name, value in result.network.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def history(result):
    return [record._replace(seconds=0) for record in result.history]


def press_ctrl_c(at):
    """A callback that presses Ctrl-C after an epoch."""
    return lambda end: signal.raise_signal(signal.SIGINT) if end.record.epoch == at else None


def normed(track=True):
    torch.manual_seed(0)
    return with_posteriors(nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4, track_running_stats=track),
                                         nn.ReLU(), nn.Dropout(0.2), nn.Linear(4, 3)))


def edited_checkpoint(folder, edit):
    """Write the checkpoint in `folder` again after `edit(description, tensors)`, with valid hashes."""
    checkpoint = read_checkpoint(folder)
    description, tensors = json.loads(json.dumps(checkpoint.description)), dict(checkpoint.tensors)
    edit(description, tensors)
    write_checkpoint(folder, tensors, {name: its for name, its in checkpoint.description.items() if name != "tensors"})
    description["tensors"] = read_checkpoint(folder).description["tensors"]
    write_record(folder / DESCRIPTION, description)
