"""The loop: repeatable, resumable to the bit, refusing before work, and right in what it optimises."""

import errno
import json
import math
import signal
import sys
from dataclasses import asdict, replace

import pytest
import sympy as sp
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from symbnn.data.batches import batches, epoch_generator
from symbnn.data.sources import load
from symbnn.data.splits import Split
from symbnn.errors import Refusal
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import MeanFieldGaussian
from symbnn.posterior.layers import kl_per_datum, posterior_mean_network, variational_tensors, with_posteriors
from symbnn.posterior.log_normal import LogNormal
from symbnn.posterior.sampling import forward
from symbnn.symmetry.actions import Action
from symbnn.symmetry.fields import field, flips, rotations
from symbnn.symmetry.groups import Cyclic
from symbnn.symmetry.signed_permutations import SignedPermutation
from symbnn.training.architectures import Architecture, build
from symbnn.training.checkpoints import load_network, load_tensors, read_checkpoint
from symbnn.training.config import TrainingConfig, make_optimizer
from symbnn.training.loop import checkpoints, train
from symbnn.training.loop import loop as training
from tolerances import assert_close, exact32

ARCHITECTURE = Architecture("cnn", (1, 4, 4), 2, (3,))
ACTION = field(rotations(), (1, 4, 4))
CONFIG = TrainingConfig(epochs=4, batch_size=16, draws=4, learning_rate=1e-2, seed=3, device="cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def task(n=23, seed=0):
    """Bright against dark images: learnt in a few steps, and invariant."""
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
    return lambda epoch, net, optimizer: signal.raise_signal(signal.SIGINT) if epoch == at else None


@pytest.mark.parametrize("estimator", ["whole", "split", "flipout", "local"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_it_learns(estimator, optimizer):
    config = replace(CONFIG, epochs=20, estimator=estimator, optimizer=optimizer, learning_rate=3e-2)
    result = run(config)
    assert result.status == "complete"
    assert result.history[-1].elbo > result.history[0].elbo
    assert result.history[-1].validation_nll < 0.5 < result.history[0].validation_nll


def test_repeatable_whatever_else_is_drawn():
    first = tensors(run())
    torch.randn(17)
    before = torch.random.get_rng_state()
    assert same(tensors(run()), first)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not same(tensors(run(replace(CONFIG, seed=4))), first)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_resumed_between_epochs_equals_straight(tmp_path, optimizer, schedule):
    config = replace(CONFIG, optimizer=optimizer, schedule=schedule, select="best")
    straight = run(config, folder=tmp_path / "straight")
    first = run(config, folder=tmp_path / "stopped", callback=press_ctrl_c(1))
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


def test_ctrl_c_without_a_folder_and_the_handler_afterwards():
    before = signal.getsignal(signal.SIGINT)
    assert run(callback=press_ctrl_c(0)).status == "interrupted"
    assert signal.getsignal(signal.SIGINT) is before

    def twice(epoch, net, optimizer):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(callback=twice)
    assert signal.getsignal(signal.SIGINT) is before


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


def test_the_best_epoch_is_selected(tmp_path):
    seen = {}

    def remember(epoch, net, optimizer):
        seen[epoch] = {name: value.clone() for name, value in net.state_dict().items()}

    config = replace(CONFIG, select="best", learning_rate=0.3, epochs=8)
    result = run(config, folder=tmp_path / "a", callback=remember)
    best = min(result.history, key=lambda record: record.validation_nll).epoch
    assert best < 6  # or this test shows nothing
    assert same(tensors(result), seen[best])
    assert same(load_network(tmp_path / "a").state_dict(), seen[best])
    run(config, folder=tmp_path / "b", callback=press_ctrl_c(6))  # the best epoch lies before the interruption
    assert same(tensors(run(config, net=network(4), folder=tmp_path / "b", resume=True)), seen[best])


def test_validation_at_intervals():
    found = run(replace(CONFIG, evaluate_every=3)).history
    assert [record.validation_nll is not None for record in found] == [False, False, True, True]
    assert all(record.validation_nll is None for record in run(validation=None).history)


def test_the_record_is_the_objective():
    """With scales near zero and no learning to speak of, the parts are those of the mean network."""
    net = with_posteriors(build(ARCHITECTURE, seeded()).double(), scale=1e-9)
    plain = posterior_mean_network(net)
    turned = torch.cat([ACTION.act(g, DATA.inputs) for g in range(4)]).double()
    expected = -nn.functional.cross_entropy(plain(turned), DATA.labels.repeat(4))
    kl = kl_per_datum(net, 4 * len(DATA))
    config = replace(CONFIG, epochs=1, learning_rate=1e-15, precision="float64", kl_weight=0.5)
    record = run(config, net=net).history[0]
    found = torch.tensor([record.expected_log_likelihood, record.kl, record.elbo], dtype=torch.float64)
    assert_close(found, torch.stack([expected, kl, expected - 0.5 * kl]), 1e-8)  # scales of 1e-9 are not quite zero


def test_the_divergence_is_warmed_up(tmp_path, monkeypatch):
    """Its weight rises linearly over the steps of the first epochs, across an interruption; the record has it whole."""
    t, W, beta = sp.symbols("t W beta", positive=True)
    formula = beta * sp.Min(1, (t + 1) / W)
    weights, whole = [], training.elbo

    def noted(*arguments, kl_weight):
        weights.append(kl_weight)
        return whole(*arguments, kl_weight=kl_weight)

    monkeypatch.setattr(training, "elbo", noted)
    config = replace(CONFIG, kl_weight=0.5, kl_warm_up=2)
    run(config, folder=tmp_path, callback=press_ctrl_c(0))
    result = run(config, folder=tmp_path, resume=True)
    steps = -(-4 * len(DATA) // 16)
    expected = [float(formula.subs({beta: 0.5, W: 2 * steps, t: step})) for step in range(4 * steps)]
    assert_close(torch.tensor(weights), torch.tensor(expected), exact32)
    assert expected[2 * steps - 2] < expected[2 * steps - 1] == expected[-1] == 0.5
    for record in result.history:
        assert record.elbo == pytest.approx(record.expected_log_likelihood - 0.5 * record.kl, rel=1e-12)


def test_without_warm_up_an_old_checkpoint_goes_on(tmp_path):
    """A setting that is newer than a checkpoint had its default when the run was started."""
    straight = run(folder=tmp_path / "straight")
    run(folder=tmp_path / "stopped", callback=press_ctrl_c(0))
    edited_checkpoint(tmp_path / "stopped", lambda description, tensors: description["config"].pop("kl_warm_up"))
    with pytest.raises(Refusal, match="kl_warm_up 0 in the checkpoint, 2 now"):
        run(replace(CONFIG, kl_warm_up=2), folder=tmp_path / "stopped", resume=True)
    assert same(tensors(run(folder=tmp_path / "stopped", resume=True)), tensors(straight))


@pytest.mark.parametrize("augmentation, num_data", [("full", 4 * 23), ("random", 23), ("none", 23)])
def test_number_of_data(augmentation, num_data):
    net = network()
    kl = kl_per_datum(net, num_data).item()
    record = run(replace(CONFIG, epochs=1, augmentation=augmentation, learning_rate=1e-12), net=net).history[0]
    assert record.kl == pytest.approx(kl, rel=1e-4)


def test_every_epoch_has_an_order_of_its_own():
    seen, net = [], network()
    net.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].clone()))
    run(replace(CONFIG, epochs=2), net=net, validation=None)
    steps = (len(seen) - 1) // 2  # the first call is a check
    first, second = torch.cat(seen[1 : 1 + steps]), torch.cat(seen[1 + steps :])
    assert not torch.equal(first, second)
    together = [{tuple(row.flatten().tolist()) for row in epoch} for epoch in (first, second)]
    assert together[0] == together[1]  # all turns of all images, in another order
    assert len(together[0]) == 4 * len(DATA)


def test_parameter_groups_and_rates():
    net = network(family=FullGaussian)
    config = replace(CONFIG, scale_rate=10.0, weight_decay=0.3)
    means, scales = make_optimizer(net, config).param_groups
    posteriors = [tensor.posterior for tensor in variational_tensors(net).values()]
    assert {id(p) for p in means["params"]} == {id(posterior.loc) for posterior in posteriors}
    assert {id(p) for p in scales["params"]} == {id(posterior.factor) for posterior in posteriors}
    assert (means["factor"], scales["factor"]) == (1.0, 10.0)
    assert (means["weight_decay"], scales["weight_decay"]) == (0.3, 0.0)

    rates = []
    run(replace(config, schedule="cosine", epochs=2), callback=lambda e, n, optimizer: rates.append(
        [group["lr"] for group in optimizer.param_groups]))
    steps = math.ceil(4 * len(DATA) / config.batch_size)
    for epoch in range(2):
        factor = (1 + math.cos(math.pi * ((epoch + 1) * steps - 1) / (2 * steps))) / 2
        assert rates[epoch] == pytest.approx([1e-2 * factor, 1e-1 * factor])


def test_one_step_of_sgd_by_hand():
    net, reference = network(), network()
    config = replace(CONFIG, epochs=1, batch_size=23, augmentation="none", optimizer="sgd", clip_norm=None, draws=1)
    run(config, net=net)
    kl = kl_per_datum(reference, 23)
    (x, y), = batches(DATA, 23, generator=epoch_generator(config.seed, 0))
    noise = seeded(epoch_generator(config.seed, 0, "noise/0").initial_seed())
    loss = nn.functional.cross_entropy(forward(reference, x, 1, "split", noise)[0], y) + kl
    loss.backward()
    for trained, start in zip(net.parameters(), reference.parameters()):
        step = config.learning_rate * 1.9 * start.grad  # Nesterov: gradient plus 0.9 of the first momentum
        assert_close(trained, start - step, exact32)


def test_clipping_bounds_the_step():
    for clip, bound in [(1e-3, 1e-3), (None, math.inf)]:
        net = network()
        before = torch.cat([p.detach().flatten().clone() for p in net.parameters()])
        config = replace(CONFIG, epochs=1, batch_size=92, optimizer="sgd", learning_rate=1.0, clip_norm=clip)
        run(config, net=net)
        moved = (torch.cat([p.detach().flatten() for p in net.parameters()]) - before).norm()
        assert moved <= 1.9 * bound * 1.001
        assert clip is None or moved > 1.8 * bound


def test_an_infinite_elbo_is_refused_and_the_checkpoint_kept(tmp_path):
    def spoil(epoch, net, optimizer):
        if epoch == 1:
            for group in optimizer.param_groups:
                group["factor"] = math.inf

    with pytest.raises(Refusal, match="stay finite"):
        run(folder=tmp_path, callback=spoil)
    kept = read_checkpoint(tmp_path)
    assert kept.description["progress"]["epoch"] == 2
    assert all(value.isfinite().all() for value in kept.tensors.values())
    with pytest.raises(Refusal, match="stay finite"):
        run(replace(CONFIG, learning_rate=1e30))


def test_a_parameter_that_breaks_in_the_last_step_is_not_saved(tmp_path):
    def spoil(epoch, net, optimizer):
        if epoch == 1:
            next(net.parameters()).data[0] = math.nan

    with pytest.raises(Refusal, match="stay finite"):
        run(folder=tmp_path, callback=spoil)
    assert read_checkpoint(tmp_path).description["progress"]["epoch"] == 1


def test_a_disk_that_fills_up_later(tmp_path, monkeypatch):
    saves, real = [], checkpoints._write_bytes

    def full(path, data):
        saves.append(path)
        if len(saves) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data)

    straight = run()
    monkeypatch.setattr(checkpoints, "write_bytes", full)
    with pytest.raises(Refusal, match="No space left"):
        run(folder=tmp_path)
    monkeypatch.undo()
    assert read_checkpoint(tmp_path).description["progress"]["epoch"] == 2
    assert same(tensors(run(net=network(3), folder=tmp_path, resume=True)), tensors(straight))


def test_callbacks_change_the_run_and_are_saved(tmp_path):
    def halve(epoch, net, optimizer):
        with torch.no_grad():
            for tensor in variational_tensors(net).values():
                tensor.posterior.loc.mul_(0.5)
        optimizer.state.clear()

    straight = run(callback=halve)

    def halve_and_stop(epoch, net, optimizer):
        halve(epoch, net, optimizer)
        press_ctrl_c(1)(epoch, net, optimizer)

    run(folder=tmp_path, callback=halve_and_stop)
    assert same(tensors(run(net=network(2), folder=tmp_path, resume=True, callback=halve)), tensors(straight))


def test_a_network_that_a_callback_returns_is_trained_from_then_on():
    other = network(5)
    start = {name: value.clone() for name, value in other.state_dict().items()}
    seen = []

    def exchange(epoch, net, optimizer):
        seen.append((net, len(optimizer.state)))
        return other if epoch == 1 else None

    result, straight = run(replace(CONFIG, epochs=3), callback=exchange), run(replace(CONFIG, epochs=3))
    assert result.network is other is seen[2][0] and seen[0][0] is seen[1][0] is not other
    assert not same(tensors(result), start) and len(result.history) == 3
    assert history(result)[0] == history(straight)[0]
    assert history(result)[1].elbo == history(straight)[1].elbo  # of the old network's steps
    alone = run(replace(CONFIG, epochs=1), net=network(5))
    assert history(result)[1].validation_nll != history(straight)[1].validation_nll != history(alone)[0].validation_nll


def test_the_best_epoch_is_one_of_the_last_network():
    poor, seen = network(5), {}
    with torch.no_grad():
        for tensor in variational_tensors(poor).values():
            tensor.posterior.loc.mul_(30)

    def exchange(epoch, net, optimizer):
        seen[epoch] = {name: value.clone() for name, value in (poor if epoch == 2 else net).state_dict().items()}
        return poor if epoch == 2 else None

    result = run(replace(CONFIG, epochs=6, select="best", learning_rate=0.3), callback=exchange)
    values = [record.validation_nll for record in result.history]
    best = 2 + values[2:].index(min(values[2:]))
    assert min(values[:2]) < values[best] and best < 5  # or this test shows nothing
    assert result.network is poor and same(tensors(result), seen[best])


def test_a_run_in_a_folder_is_of_one_network(tmp_path):
    with pytest.raises(Refusal, match="one network"):
        run(folder=tmp_path, callback=lambda epoch, net, optimizer: network(5))


def with_dropout(p=0.3):
    """Random layers of every kind: a module, a function, and torch's own generator."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.dropout, self.head = nn.Linear(16, 6), nn.Dropout(p), nn.Linear(6, 3)

        def forward(self, x):
            h = torch.relu(self.hidden(x.flatten(1)))
            h = nn.functional.dropout(self.dropout(h), p, self.training)
            return self.head(h + 0.1 * torch.randn_like(h) * self.training)

    torch.manual_seed(0)
    return with_posteriors(Noisy())


def test_random_layers_follow_the_seed_and_leave_the_world_alone(tmp_path):
    first, again = with_dropout(), with_dropout()
    torch.manual_seed(1)
    first = run(net=first, architecture=None)
    torch.manual_seed(2)
    world = torch.get_rng_state()
    assert same(tensors(run(net=again, architecture=None)), tensors(first))
    assert torch.equal(torch.get_rng_state(), world)
    assert not same(tensors(run(replace(CONFIG, seed=4), net=with_dropout(), architecture=None)), tensors(first))
    run(net=with_dropout(), folder=tmp_path, architecture=None, callback=press_ctrl_c(1))
    torch.manual_seed(5)  # what the world does meanwhile
    resumed = run(net=with_dropout(), folder=tmp_path, resume=True, architecture=None)
    assert same(tensors(resumed), tensors(first))


def normed(track=True):
    torch.manual_seed(0)
    return with_posteriors(nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4, track_running_stats=track),
                                         nn.ReLU(), nn.Dropout(0.2), nn.Linear(4, 3)))


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
        run(net=net, architecture=None, callback=fail)
    assert not any(module.training for module in net.modules())


@pytest.mark.parametrize("rows", [33, 32, 34, 17])
def test_a_last_batch_of_one_joins_the_one_before(rows):
    data = task(rows)
    config = replace(CONFIG, batch_size=16, augmentation="none", epochs=2)
    made = batches(data, 16)
    sizes = [len(labels) for _, labels in made]
    assert sum(sizes) == rows
    assert min(sizes) == made.smallest > 1
    assert len(sizes) == len(made)
    result = train(normed(), data, config)
    assert result.status == "complete"
    assert all(math.isfinite(record.elbo) for record in result.history)


def test_batches_that_a_norm_cannot_take_are_refused_before_the_first_step():
    net = normed()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(Refusal, match="batch_size=2"):
        train(net, DATA, replace(CONFIG, batch_size=1, draws=1, augmentation="none"))
    with pytest.raises(Refusal, match="batch_size=2"):
        train(net, Split(DATA.inputs[:1], DATA.labels[:1]), replace(CONFIG, batch_size=1, draws=1, augmentation="none"))
    assert same(net.state_dict(), before)


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
    run(net=net(), folder=tmp_path, architecture=None, callback=press_ctrl_c(1))
    stored = read_checkpoint(tmp_path)
    assert not any("second" in name or "twin.weight" in name for name in stored.tensors)
    resumed = run(net=net(), folder=tmp_path, resume=True, architecture=None)
    assert same(tensors(resumed), tensors(straight))
    other = net()
    load_tensors(other, read_checkpoint(tmp_path).part("network"))
    assert other.second is other.first and other.twin.weight is other.head.weight
    assert same(other.state_dict(), straight.network.state_dict())


@pytest.mark.parametrize(("data", "said"), [
    (lambda: DataLoader(TensorDataset(DATA.inputs, DATA.labels), 8), "loader"),
    (lambda: (DATA.inputs.numpy(), DATA.labels.numpy()), "as_tensor"),
    (lambda: (DATA.inputs, DATA.labels), "as_tensor"),
    (lambda: TensorDataset(DATA.inputs, DATA.labels), r"DataLoader\(dataset"),
    (lambda: DATA.inputs, r"Split\(x, y\)"),
    (lambda: load("digits"), r"data\.train"), (lambda: {"x": DATA.inputs}, "Split"), (lambda: None, "NoneType"),
])
def test_data_in_another_container_are_refused_with_a_way_that_works(data, said):
    with pytest.raises(Refusal, match=said):
        train(network(), data(), CONFIG)
    if data() is not None:
        with pytest.raises(Refusal, match="validation is a Split"):
            train(network(), DATA, replace(CONFIG, augmentation="none"), validation=data())


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
    (nn.Sequential(nn.Flatten(), nn.Linear(16, 1)), r"nn\.Linear\(\.\.\., 2\)"),
])
def test_outputs_that_are_no_logits_are_refused_before_work(plain, said):
    with pytest.raises(Refusal, match=said):
        train(with_posteriors(plain), DATA, replace(CONFIG, augmentation="none"))


def test_a_network_with_nothing_to_train_is_refused():
    with pytest.raises(Refusal, match=r"requires_grad_\(True\)"):
        train(network().requires_grad_(False), DATA, CONFIG)


def test_batch_normalisation_is_trained_and_saved(tmp_path):
    def normalised():
        torch.manual_seed(0)
        return with_posteriors(nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(),
                                             nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)))

    straight = run(net=normalised(), architecture=None)
    assert straight.network[1].num_batches_tracked == 4 * math.ceil(92 / 16) * 4  # training steps alone, and each draw
    run(net=normalised(), folder=tmp_path, architecture=None, callback=press_ctrl_c(1))
    resumed = run(net=normalised(), folder=tmp_path, resume=True, architecture=None)
    assert same(tensors(resumed), tensors(straight))


@pytest.mark.parametrize("change", [
    {"epochs": 0}, {"epochs": 1.5}, {"batch_size": -1}, {"draws": 0}, {"draws": 17}, {"estimator": "vmap"},
    {"optimizer": "adam"}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}, {"learning_rate": "fast"},
    {"scale_rate": -1.0}, {"weight_decay": -0.1}, {"schedule": "linear"}, {"kl_weight": -1.0}, {"clip_norm": 0.0},
    {"kl_warm_up": -1}, {"kl_warm_up": 5}, {"kl_warm_up": 0.5},
    {"augmentation": "some"}, {"seed": -1}, {"seed": 0.5}, {"precision": "float16"}, {"evaluate_every": 0},
    {"evaluation_draws": 0}, {"select": "first"}, {"device": 3},
], ids=str)
def test_settings_that_cannot_be_meant(change):
    with pytest.raises(Refusal, match=next(iter(change)).split("_")[0]) as caught:
        TrainingConfig(**asdict(CONFIG) | change)
    assert "\n" not in str(caught.value)


def labels_from_one():
    return Split(DATA.inputs, DATA.labels + 1)


@pytest.mark.parametrize("change, message", [
    (lambda: {"net": build(ARCHITECTURE)}, "variational layers"),
    (lambda: {"action": None}, "needs an action"),
    (lambda: {"action": field(rotations(), (1, 6, 6))}, "needs an action"),
    (lambda: {"data": labels_from_one()}, "Every label has an output"),
    (lambda: {"validation": labels_from_one()}, "Every label has an output"),
    (lambda: {"validation": Split(torch.zeros(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64))}, "shape of training"),
    (lambda: {"net": with_posteriors(build(Architecture("mlp", (1, 6, 6), 2, (3,))))}, "takes the images"),
    (lambda: {"config": replace(CONFIG, batch_size=93)}, "not larger than"),
    (lambda: {"config": replace(CONFIG, select="best"), "validation": None}, "validation split"),
    (lambda: {"config": replace(CONFIG, device="quantum")}, "one that this machine has"),
    (lambda: {"config": replace(CONFIG, device="meta")}, "one that this machine has"),
    (lambda: {"config": replace(CONFIG, device="cuda:99")}, "one that this machine has"),
    (lambda: {"config": replace(CONFIG, precision="bfloat16")}, "for CUDA"),
    (lambda: {"config": replace(CONFIG, estimator="flipout"), "net": network(family=LogNormal)}, "Flipout"),
    (lambda: {"resume": True}, "resumed from a folder"),
    (lambda: {"notes": {"network": network()}}, "JSON values"),
    (lambda: {"notes": {"rate": float("nan")}}, "JSON values"),
])
def test_refused_before_work(change, message, monkeypatch):
    def no_work(self, images, labels):
        raise AssertionError("a step was done")

    monkeypatch.setattr(training._Run, "advance", no_work)
    with pytest.raises(Refusal, match=message) as caught:
        run(**change())
    assert "\n" not in str(caught.value)


def test_a_group_that_does_not_act_is_refused():
    shift = SignedPermutation(torch.arange(16).roll(1), torch.ones(16, dtype=torch.int8))

    def rule(g):
        return shift if g else SignedPermutation.identity(16)

    with pytest.raises(Refusal):  # a shift of order 16 is no action of C4
        run(action=Action(Cyclic(4), (1, 4, 4), rule))


@pytest.mark.parametrize("change, message", [
    ({"config": replace(CONFIG, seed=9)}, "seed 3 in the checkpoint, 9 now"),
    ({"config": replace(CONFIG, learning_rate=1.0)}, "learning_rate"),
    ({"data": task(seed=5)}, "data"),
    ({"action": field(flips(), (1, 4, 4))}, "action"),
    ({"architecture": Architecture("cnn", (1, 4, 4), 2, (4,))}, "architecture"),
    ({"net": network(family=FullGaussian)}, "family"),
    ({"resume": False}, "never overwrites"),
], ids=str)
def test_another_run_is_not_continued(tmp_path, change, message):
    run(replace(CONFIG, epochs=1), folder=tmp_path)
    before = sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir())
    with pytest.raises(Refusal, match=message):
        run(**{"config": CONFIG, "folder": tmp_path, "resume": True, **change})
    assert sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir()) == before


def edited_checkpoint(folder, edit):
    """Write the checkpoint in `folder` again after `edit(description, tensors)`, with a valid hash."""
    checkpoint = read_checkpoint(folder)
    description, tensors = json.loads(json.dumps(checkpoint.description)), dict(checkpoint.tensors)
    edit(description, tensors)
    del description["tensors"]
    checkpoints.write_checkpoint(folder, tensors, description)


@pytest.mark.parametrize("edit, message", [
    (lambda d, t: d.pop("config"), "config None"),
    (lambda d, t: d.update(config=["epochs"]), "config"),
    (lambda d, t: d["config"].pop("epochs"), "epochs 20"),  # the default
    (lambda d, t: d["config"].update(epochs="4"), "epochs '4'"),
    (lambda d, t: d.pop("progress"), "stands"),
    (lambda d, t: d.update(progress=[1, 2]), "stands"),
    (lambda d, t: d["progress"].pop("step"), "stands"),
    (lambda d, t: d["progress"].update(epoch="1"), "stands"),
    (lambda d, t: d["progress"].update(epoch=9), "stands"),
    (lambda d, t: d["progress"].update(step=-1), "stands"),
    (lambda d, t: d["progress"].update(step=10**6), "stands"),
    (lambda d, t: d["progress"].update(seconds=None, epoch=0), "stands"),
    (lambda d, t: d.pop("history"), "stands"),
    (lambda d, t: d.update(history=[]), "stands"),
    (lambda d, t: d["history"][0].update(loss=1.0), "stands"),
    (lambda d, t: d["history"][0].update(validation_nll="low"), "stands"),
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
    checkpoints.save_network(tmp_path, network(), ARCHITECTURE)
    with pytest.raises(Refusal, match="outside training"):
        run(folder=tmp_path, resume=True)


def test_resume_needs_a_checkpoint(tmp_path):
    with pytest.raises(Refusal, match=r"checkpoint\.json"):
        run(folder=tmp_path, resume=True)


def test_the_bar_shows_the_parts(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(progress=True)
    shown = capsys.readouterr().err
    assert "epoch 4: ELBO -" in shown
    assert "KL" in shown
    assert "24/24" in shown
    run()
    assert capsys.readouterr().err == ""


def test_cuda(require_cuda):
    for precision in ("float32", "bfloat16"):
        config = replace(CONFIG, device="cuda", precision=precision, epochs=30, learning_rate=2e-2)
        result = run(config)
        assert result.history[-1].validation_nll < 0.5
        assert next(result.network.parameters()).is_cuda
