"""Runs that are interrupted anywhere and continued equal those that were not, bit by bit; others are not continued."""
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

from helpers_training import (
    ARCHITECTURE,
    CONFIG,
    edited_checkpoint,
    history,
    network,
    press_ctrl_c,
    run,
    same,
    task,
    tensors,
)
from symbnn.errors import Refusal
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.layers import with_posteriors
from symbnn.symmetry.fields import field, flips
from symbnn.training.architectures import Architecture
from symbnn.training.checkpoints import load_network, load_tensors, read_checkpoint, save_network


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_resumed_between_epochs_equals_straight(tmp_path, optimizer, schedule):
    config = replace(CONFIG, optimizer=optimizer, schedule=schedule, select="best")
    straight = run(config, folder=tmp_path / "straight")
    first = run(config, folder=tmp_path / "stopped", callbacks=press_ctrl_c(1))
    assert (first.status, len(first.history)) == ("interrupted", 2)
    second = run(config, net=network(7), folder=tmp_path / "stopped", resume=True)
    assert second.status == "complete"
    assert history(second) == history(straight)
    assert same(tensors(second), tensors(straight))
    there, here = (read_checkpoint(tmp_path / name) for name in ("straight", "stopped"))
    assert same(there.tensors, here.tensors)
    assert any("exp_avg_sq" in name or "momentum_buffer" in name for name in here.tensors)


@pytest.mark.parametrize("step", [0, 2, 4])
@pytest.mark.parametrize("augmentation", ["full", "random"])
def test_resumed_inside_an_epoch_equals_straight(tmp_path, step, augmentation):
    config = replace(CONFIG, augmentation=augmentation, batch_size=4, epochs=2)
    straight = run(config, folder=tmp_path / "straight")
    net, forwards = network(), iter(range(10**6))
    at = step + 1  # the first call of the network is a check
    net.register_forward_hook(lambda *_: signal.raise_signal(signal.SIGINT) if next(forwards) == at else None)
    first = run(config, net=net, folder=tmp_path / "stopped")
    assert (first.status, first.history) == ("interrupted", [])
    progress = read_checkpoint(tmp_path / "stopped").description["progress"]
    assert (progress["epoch"], progress["step"], progress["status"]) == (0, step + 1, "interrupted")
    second = run(config, net=network(7), folder=tmp_path / "stopped", resume=True)
    assert history(second) == history(straight)
    assert same(read_checkpoint(tmp_path / "straight").tensors, read_checkpoint(tmp_path / "stopped").tensors)


def test_many_interruptions(tmp_path):
    """Ctrl-C in every third step, until it is done."""
    config = replace(CONFIG, batch_size=8, epochs=3)
    straight = run(config, folder=tmp_path / "straight")
    result, rounds = None, 0
    while result is None or result.status == "interrupted":
        net, forwards = network(), iter(range(10**6))
        net.register_forward_hook(lambda *_, n=forwards: signal.raise_signal(signal.SIGINT) if next(n) == 3 else None)
        result = run(config, net=net, folder=tmp_path / "stopped", resume=rounds > 0)
        rounds += 1
    assert rounds > 6
    assert history(result) == history(straight)
    assert same(tensors(result), tensors(straight))


def test_a_complete_run_is_not_trained_again_and_can_be_lengthened(tmp_path):
    straight = run(replace(CONFIG, epochs=6))
    first = run(folder=tmp_path)
    again = run(net=network(5), folder=tmp_path, resume=True)
    assert same(tensors(again), tensors(first))
    assert len(again.history) == 4
    longer = run(replace(CONFIG, epochs=6), net=network(5), folder=tmp_path, resume=True)
    assert same(tensors(longer), tensors(straight))
    with pytest.raises(Refusal, match="epochs 6 in the checkpoint, 4 now"):
        run(net=network(5), folder=tmp_path, resume=True)


def test_without_annealing_an_old_checkpoint_goes_on(tmp_path):
    """A setting that is newer than a checkpoint had its default when the run was started."""
    straight = run(folder=tmp_path / "straight")
    run(folder=tmp_path / "stopped", callbacks=press_ctrl_c(0))
    edited_checkpoint(tmp_path / "stopped", lambda description, tensors: description["config"].pop("kl_annealing"))
    with pytest.raises(Refusal, match="kl_annealing 0 in the checkpoint, 2 now"):
        run(replace(CONFIG, kl_annealing=2), folder=tmp_path / "stopped", resume=True)
    assert same(tensors(run(folder=tmp_path / "stopped", resume=True)), tensors(straight))


def test_a_checkpoint_of_version_0_1_goes_on(tmp_path):
    """Two settings had other names then, and the run is continued with them."""
    config = replace(CONFIG, dtype="float64", kl_annealing=2)

    def as_it_was(description, tensors):
        settings = description["config"]
        settings["precision"], settings["kl_warm_up"] = settings.pop("dtype"), settings.pop("kl_annealing")

    straight = run(config, folder=tmp_path / "straight")
    run(config, folder=tmp_path / "stopped", callbacks=press_ctrl_c(0))
    edited_checkpoint(tmp_path / "stopped", as_it_was)
    assert load_network(tmp_path / "stopped") is not None
    with pytest.raises(Refusal, match="dtype 'float64' in the checkpoint, 'float32' now"):
        run(replace(config, dtype="float32"), folder=tmp_path / "stopped", resume=True)
    assert same(tensors(run(config, net=network(5), folder=tmp_path / "stopped", resume=True)), tensors(straight))


@pytest.mark.parametrize("change, message", [
    ({"config": replace(CONFIG, seed=9)}, "seed 3 in the checkpoint, 9 now"),
    ({"config": replace(CONFIG, learning_rate=1.0)}, "learning_rate"),
    ({"data": task(seed=5)}, "data"),
    ({"action": field(flips(), (1, 4, 4))}, "action"),
    ({"architecture": Architecture("cnn", (1, 4, 4), 2, (4,))}, "architecture"),
    ({"net": network(family=FullGaussian)}, "family"),
    ({"resume": False}, "overwrites none"),
], ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_another_run_is_not_continued(tmp_path, change, message):
    run(replace(CONFIG, epochs=1), folder=tmp_path)
    before = sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir())
    with pytest.raises(Refusal, match=message):
        run(**{"config": CONFIG, "folder": tmp_path, "resume": True, **change})
    assert sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("edit, message", [
    (lambda d, t: d.pop("config"), "config None"),
    (lambda d, t: d.update(config=["epochs"]), "at config"),
    (lambda d, t: d["config"].pop("epochs"), "epochs 20"),  # the default
    (lambda d, t: d["config"].update(epochs="4"), "epochs '4'"),
    (lambda d, t: d.pop("progress"), "stands"),
    (lambda d, t: d.update(progress=[1, 2]), "at progress"),
    (lambda d, t: d["progress"].pop("step"), "nothing at progress.step"),
    (lambda d, t: d["progress"].update(epoch="1"), "'1' at progress.epoch"),
    (lambda d, t: d["progress"].update(epoch=9), "stands"),
    (lambda d, t: d["progress"].update(step=-1), "-1 at progress.step"),
    (lambda d, t: d["progress"].update(step=10**6), "stands"),
    (lambda d, t: d["progress"].update(seconds=None), "None at progress.seconds"),
    (lambda d, t: d.pop("history"), "stands"),
    (lambda d, t: d.update(history=[]), "stands"),
    (lambda d, t: d["history"][0].update(loss=1.0), "at history.0.loss"),
    (lambda d, t: d["history"][0].update(validation_nll="low"), "'low' at history.0.validation_nll"),
    (lambda d, t: t.pop("progress/sums"), "stands"),
    (lambda d, t: t.update({"optimizer/9.weight/exp_avg": torch.zeros(2)}), "optimiser"),
    (lambda d, t: t.update({"optimizer/exp_avg": torch.zeros(2)}), "optimiser"),
    (lambda d, t: t.pop("network/0.weight.posterior.loc"), "without"),
])
def test_an_edited_checkpoint_is_not_continued(tmp_path, edit, message):
    run(replace(CONFIG, epochs=1), folder=tmp_path)
    edited_checkpoint(tmp_path, edit)
    with pytest.raises(Refusal, match=message) as caught:
        run(folder=tmp_path, resume=True)
    assert "\n" not in str(caught.value)


def test_a_network_saved_outside_training_is_not_continued(tmp_path):
    save_network(tmp_path, network(), ARCHITECTURE)
    with pytest.raises(Refusal, match="outside training"):
        run(folder=tmp_path, resume=True)


def test_resume_needs_a_checkpoint(tmp_path):
    with pytest.raises(Refusal, match=r"checkpoint\.json"):
        run(folder=tmp_path, resume=True)


class OneLayerTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second, self.head = self.first, nn.Linear(16, 3)
        self.twin = nn.Linear(16, 3)
        self.twin.weight = self.head.weight

    def forward(self, x):
        h = torch.relu(self.second(torch.relu(self.first(x.flatten(1)))))
        return self.head(h) + self.twin(h)


def test_ties_are_saved_once_and_resumed(tmp_path):
    def net():
        torch.manual_seed(0)
        return with_posteriors(OneLayerTwice())

    straight = run(net=net(), architecture=None)
    run(net=net(), folder=tmp_path, architecture=None, callbacks=press_ctrl_c(1))
    stored = read_checkpoint(tmp_path)
    assert not any("second" in name or "twin.weight" in name for name in stored.tensors)
    resumed = run(net=net(), folder=tmp_path, resume=True, architecture=None)
    assert same(tensors(resumed), tensors(straight))
    other = net()
    load_tensors(other, read_checkpoint(tmp_path).part("network"))
    assert other.second is other.first and other.twin.weight is other.head.weight
    assert same(other.state_dict(), straight.network.state_dict())
