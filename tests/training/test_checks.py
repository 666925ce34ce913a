"""What training refuses before its first step, with advice that works, and the modes in which it leaves a network."""
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from helpers_training import ACTION, ARCHITECTURE, CONFIG, DATA, VALIDATION, network, normed, run, same
from symbnn.data.sources import load
from symbnn.data.splits import Split
from symbnn.errors import Refusal
from symbnn.posterior.layers import with_posteriors
from symbnn.posterior.log_normal import LogNormal
from symbnn.symmetry.actions import Action
from symbnn.symmetry.fields import field, rotations
from symbnn.symmetry.groups import Cyclic
from symbnn.symmetry.signed_permutations import SignedPermutation
from symbnn.training import state
from symbnn.training.architectures import Architecture, build
from symbnn.training.config import TrainingConfig
from symbnn.training.loop import train


@pytest.mark.parametrize("before", ["train", "eval", "norm in eval", "norm frozen, all in eval"])
def test_modes_are_kept_and_frozen_norms_stay(before):
    net = normed()
    net.train(before in ("train", "norm in eval"))
    if "norm" in before:
        net[2].eval()
    if "frozen" in before:
        net[2].requires_grad_(False)
    modes, kept = [module.training for module in net.modules()], net[2].running_mean.clone()
    run(net=net, architecture=None, validation=VALIDATION)
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(net[2].running_mean, kept) == ("norm" in before)


def test_a_run_leaves_modes_as_they_were_when_it_fails():
    net = normed().eval()

    def fail(*_):
        raise KeyError("a callback's own error")

    with pytest.raises(KeyError):
        run(net=net, architecture=None, callbacks=fail)
    assert not any(module.training for module in net.modules())


def test_batches_that_a_norm_cannot_take_are_refused_before_the_first_step():
    net = normed()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(Refusal, match="batch_size=2"):
        train(net, DATA, replace(CONFIG, batch_size=1, draws=1, augmentation="none"))
    with pytest.raises(Refusal, match="batch_size=2"):
        train(net, Split(DATA.inputs[:1], DATA.labels[:1]), replace(CONFIG, batch_size=1, draws=1, augmentation="none"))
    assert same(net.state_dict(), before)


@pytest.mark.parametrize(("data", "said"), [
    (lambda: iter([(DATA.inputs, DATA.labels)]), r"Stream\(source"),
    (lambda: (DATA.inputs.numpy(), DATA.labels.numpy(), DATA.labels), "Split"),
    (lambda: DATA.inputs, r"Split\(x, y\)"),
    (lambda: load("digits"), r"data\.train"), (lambda: {"x": DATA.inputs}, "Split"), (lambda: None, "NoneType"),
])
def test_data_in_another_container_are_refused_with_a_way_that_works(data, said):
    with pytest.raises(Refusal, match=said):
        train(network(), data(), CONFIG)
    if data() is not None:
        with pytest.raises(Refusal, match=r"Split of inputs .* as validation"):
            train(network(), DATA, replace(CONFIG, augmentation="none"), validation=data())


@pytest.mark.parametrize("other", [
    (DATA.inputs.numpy(), DATA.labels.numpy()), [DATA.inputs, DATA.labels], TensorDataset(DATA.inputs, DATA.labels),
    Subset(TensorDataset(DATA.inputs, DATA.labels), range(len(DATA))),
])
def test_runs_on_containers_are_runs_on_the_split(other):
    config = replace(CONFIG, augmentation="none", epochs=1)
    expected, found = (train(network(), its, config, validation=its) for its in (DATA, other))
    assert same(expected.network.state_dict(), found.network.state_dict())
    assert expected.history[0].validation_nll == found.history[0].validation_nll


def test_the_advice_on_data_works():
    dataset = TensorDataset(DATA.inputs, DATA.labels)
    for size in (1000, 8):
        made = Split(*map(torch.cat, zip(*DataLoader(dataset, size))))
        assert torch.equal(made.inputs, DATA.inputs) and torch.equal(made.labels, DATA.labels)


@pytest.mark.parametrize(("options", "said"), [
    ({"config": {"epochs": 2}}, r"TrainingConfig\(\*\*"), ({"config": ACTION}, "action=action"),
    ({"config": DATA.labels}, r"Split\(inputs, labels\)"), ({"config": 3}, "TrainingConfig"),
    ({"action": rotations()}, r"field\(space"), ({"action": "C4"}, "field"),
    ({"symmetry": ACTION}, "unit_permutations"),
    ({"architecture": "cnn"}, "Architecture"), ({"net": [1]}, "network"),
])
def test_arguments_of_other_kinds_are_refused(options, said):
    with pytest.raises(Refusal, match=said):
        run(**options)


def test_tables_are_told_about_augmentation():
    table = Split(torch.randn(20, 12), torch.arange(20) % 3)
    with pytest.raises(Refusal, match='augmentation="none"') as caught:
        train(with_posteriors(nn.Linear(12, 3)), table, TrainingConfig(batch_size=10))
    assert "field" not in str(caught.value)


@pytest.mark.parametrize(("plain", "said"), [
    (nn.Conv2d(1, 3, 3), "AdaptiveAvgPool2d"),
    (nn.Sequential(nn.Flatten(), nn.Linear(16, 1)), r"nn\.Linear\(features, 2\)"),
])
def test_outputs_that_are_no_logits_are_refused_before_work(plain, said):
    with pytest.raises(Refusal, match=said):
        train(with_posteriors(plain), DATA, replace(CONFIG, augmentation="none"))


def test_a_network_with_nothing_to_train_is_refused():
    with pytest.raises(Refusal, match=r"requires_grad_\(True\)"):
        train(network().requires_grad_(False), DATA, CONFIG)


def labels_from_one():
    return Split(DATA.inputs, DATA.labels + 1)


@pytest.mark.parametrize("change, message", [
    (lambda: {"net": build(ARCHITECTURE)}, "whose weights have posteriors"),
    (lambda: {"action": None}, "an action on one input"),
    (lambda: {"action": field(rotations(), (1, 6, 6))}, "an action on one input"),
    (lambda: {"data": labels_from_one()}, "one for each output"),
    (lambda: {"validation": labels_from_one()}, "one for each output"),
    (lambda: {"validation": Split(torch.zeros(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64))}, "as in training"),
    (lambda: {"net": with_posteriors(build(Architecture("mlp", (1, 6, 6), 2, (3,))))}, "takes inputs of shape"),
    (lambda: {"config": replace(CONFIG, batch_size=93)}, "no larger than"),
    (lambda: {"config": replace(CONFIG, select="best"), "validation": None}, "validation split"),
    (lambda: {"config": replace(CONFIG, device="quantum")}, "a device that this machine has"),
    (lambda: {"config": replace(CONFIG, device="meta")}, "a device that this machine has"),
    (lambda: {"config": replace(CONFIG, device="cuda:99")}, "a device that this machine has"),
    (lambda: {"config": replace(CONFIG, dtype="bfloat16")}, "a CUDA device for bfloat16"),
    (lambda: {"config": replace(CONFIG, estimator="flipout"), "net": network(family=LogNormal)}, "a LogNormal"),
    (lambda: {"resume": True}, "a folder to resume"),
    (lambda: {"notes": {"network": network()}}, "JSON values"),
    (lambda: {"notes": {"rate": float("nan")}}, "JSON values"),
])
def test_refused_before_work(change, message, monkeypatch):
    def no_work(self, images, labels):
        raise AssertionError("a step was done")

    monkeypatch.setattr(state.RunState, "advance", no_work)
    with pytest.raises(Refusal, match=message) as caught:
        run(**change())
    assert "\n" not in str(caught.value)


def test_a_group_that_does_not_act_is_refused():
    shift = SignedPermutation(torch.arange(16).roll(1), torch.ones(16, dtype=torch.int8))

    def rule(g):
        return shift if g else SignedPermutation.identity(16)

    with pytest.raises(Refusal):  # a shift of order 16 is no action of C4
        run(action=Action(Cyclic(4), (1, 4, 4), rule))
