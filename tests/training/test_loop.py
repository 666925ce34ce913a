"""The loop: repeatable, interruptible, and right in what it optimises."""
import errno
import math
import signal
import sys
from dataclasses import replace

import pytest
import sympy as sp
import torch
from torch import nn

from helpers import seeded
from helpers_training import (
    ACTION,
    ARCHITECTURE,
    CONFIG,
    DATA,
    history,
    network,
    normed,
    press_ctrl_c,
    run,
    same,
    task,
    tensors,
)
from symbnn import files
from symbnn.data.batches import batches, epoch_generator
from symbnn.errors import Refusal
from symbnn.posterior.elbo import elbo
from symbnn.posterior.layers import kl_per_datum, posterior_mean_network, variational_tensors, with_posteriors
from symbnn.posterior.sampling import forward
from symbnn.training import objectives
from symbnn.training.architectures import build
from symbnn.training.checkpoints import load_network, load_tensors, optimizer_tensors, read_checkpoint
from symbnn.training.config import make_optimizer
from symbnn.training.loop import train
from tolerances import assert_close, exact32


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


def test_ctrl_c_without_a_folder_and_the_handler_afterwards():
    before = signal.getsignal(signal.SIGINT)
    assert run(callbacks=press_ctrl_c(0)).status == "interrupted"
    assert signal.getsignal(signal.SIGINT) is before

    def twice(end):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(callbacks=twice)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_best_epoch_is_selected(tmp_path):
    seen = {}

    def remember(end):
        seen[end.record.epoch] = {name: value.clone() for name, value in end.network.state_dict().items()}

    config = replace(CONFIG, select="best", learning_rate=0.3, epochs=8)
    result = run(config, folder=tmp_path / "a", callbacks=remember)
    best = min(result.history, key=lambda record: record.validation_nll).epoch
    assert best < 6  # or this test shows nothing
    assert same(tensors(result), seen[best])
    assert same(load_network(tmp_path / "a").state_dict(), seen[best])
    run(config, folder=tmp_path / "b", callbacks=press_ctrl_c(6))  # the best epoch lies before the interruption
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
    config = replace(CONFIG, epochs=1, learning_rate=1e-15, dtype="float64", kl_weight=0.5)
    record = run(config, net=net).history[0]
    found = torch.tensor([record.expected_log_likelihood, record.kl, record.elbo], dtype=torch.float64)
    assert_close(found, torch.stack([expected, kl, expected - 0.5 * kl]), 1e-8)  # scales of 1e-9 are not quite zero


def test_the_divergence_is_annealed(tmp_path, monkeypatch):
    """Its weight rises linearly over the steps of the first epochs, across an interruption; the record has it whole."""
    t, W, beta = sp.symbols("t W beta", positive=True)
    formula = beta * sp.Min(1, (t + 1) / W)
    weights, whole = [], objectives.elbo

    def noted(*arguments, kl_weight, **options):
        weights.append(kl_weight)
        return whole(*arguments, kl_weight=kl_weight, **options)

    monkeypatch.setattr(objectives, "elbo", noted)
    config = replace(CONFIG, kl_weight=0.5, kl_annealing=2)
    run(config, folder=tmp_path, callbacks=press_ctrl_c(0))
    result = run(config, folder=tmp_path, resume=True)
    steps = -(-4 * len(DATA) // 16)
    expected = [float(formula.subs({beta: 0.5, W: 2 * steps, t: step})) for step in range(4 * steps)]
    assert_close(torch.tensor(weights), torch.tensor(expected), exact32)
    assert expected[2 * steps - 2] < expected[2 * steps - 1] == expected[-1] == 0.5
    for record in result.history:
        assert record.elbo == pytest.approx(record.expected_log_likelihood - 0.5 * record.kl, rel=1e-12)


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
    def spoil(end):
        if end.epochs == 2:
            for group in end.optimizer.param_groups:
                group["factor"] = math.inf

    with pytest.raises(Refusal, match="stay finite"):
        run(folder=tmp_path, callbacks=spoil)
    kept = read_checkpoint(tmp_path)
    assert kept.description["progress"]["epoch"] == 2
    assert all(value.isfinite().all() for value in kept.tensors.values())
    with pytest.raises(Refusal, match="stay finite"):
        run(replace(CONFIG, learning_rate=1e30))


def test_a_parameter_that_breaks_in_the_last_step_is_not_saved(tmp_path):
    def spoil(end):
        if end.epochs == 2:
            next(end.network.parameters()).data[0] = math.nan

    with pytest.raises(Refusal, match="stay finite"):
        run(folder=tmp_path, callbacks=spoil)
    assert read_checkpoint(tmp_path).description["progress"]["epoch"] == 1


def test_a_disk_that_fills_up_later(tmp_path, monkeypatch):
    saves, real = [], files.os.replace

    def full(source, target):
        saves.append(target)
        if len(saves) > 5:  # who writes, then two files a checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    straight = run()
    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(Refusal, match="No space left"):
        run(folder=tmp_path)
    monkeypatch.undo()
    assert read_checkpoint(tmp_path).description["progress"]["epoch"] == 2
    assert same(tensors(run(net=network(3), folder=tmp_path, resume=True)), tensors(straight))


def test_callbacks_change_the_run_and_are_saved(tmp_path):
    def halve(end):
        with torch.no_grad():
            for tensor in variational_tensors(end.network).values():
                tensor.posterior.loc.mul_(0.5)
        end.optimizer.state.clear()

    straight = run(callbacks=halve)

    def halve_and_stop(end):
        halve(end)
        press_ctrl_c(1)(end)

    run(folder=tmp_path, callbacks=halve_and_stop)
    assert same(tensors(run(net=network(2), folder=tmp_path, resume=True, callbacks=halve)), tensors(straight))


# One run in two calls


def after_epochs(count):
    return lambda epochs, net: epochs == count


@pytest.mark.parametrize("options", [{}, {"optimizer": "sgd", "kl_annealing": 3}, {"augmentation": "random"}])
def test_two_calls_are_one_run(options):
    config = replace(CONFIG, schedule="cosine", **options)
    whole, first = run(config), run(config, until=after_epochs(2))
    assert first.status == "stopped" and history(first) == history(whole)[:2]
    second = run(config, net=first.network, after=first)
    assert second.status == "complete" and history(second) == history(whole)
    assert same(tensors(second), tensors(whole))


def test_a_network_takes_over_at_the_epoch_where_the_first_call_ended():
    """With the seeds and step sizes of that epoch, an optimiser of its own, and the history of both."""
    config, other = replace(CONFIG, schedule="cosine"), network(5)
    first = run(config, until=after_epochs(3))
    first.optimizer.state.clear()
    last = run(config, net=other, after=first)
    assert last.network is other and history(last)[:3] == history(first) and len(last.history) == 4
    by_hand = network(5)
    optimizer = make_optimizer(by_hand, config)
    data = batches(DATA, 16, "full", action=ACTION, generator=epoch_generator(3, 3))
    for step, (images, labels) in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 + math.cos(math.pi * (3 + step / len(data)) / 4)) / 2
        outputs = forward(by_hand, images, config.draws, config.estimator, epoch_generator(3, 3, f"noise/{step}"))
        optimizer.zero_grad()
        (-elbo(by_hand, outputs, labels, 4 * len(DATA)).elbo).backward()
        optimizer.step()
    for name, value in by_hand.state_dict().items():
        assert_close(last.network.state_dict()[name], value, exact32)


def test_moments_are_copied_and_never_given_to_other_parameters():
    first = run(until=after_epochs(1))
    held = optimizer_tensors(first.network, first.optimizer)
    moments = {name: value.clone() for name, value in held.items()}
    kept = run(net=network(5), after=first)
    assert same(optimizer_tensors(first.network, first.optimizer), moments)
    first.optimizer.state.clear()
    assert not same(tensors(run(net=network(5), after=first)), tensors(kept))
    first, wide = run(until=after_epochs(1)), with_posteriors(build(ARCHITECTURE.expanded(2), seeded()))
    with pytest.raises(Refusal, match=r"after\.optimizer\.state\.clear\(\)"):
        run(net=wide, architecture=None, after=first)


@pytest.mark.parametrize("killed", ["in the first", "between", "in the second"])
def test_each_of_two_calls_is_resumed_to_the_bit(killed, tmp_path):
    def both(one, two, stop_first=None, stop_second=None, **options):
        first = run(folder=one, until=after_epochs(2), callbacks=stop_first, **options)
        if first.status == "interrupted" or (killed == "between" and options.get("resume") is False):
            return first
        changed = network(7)
        load_tensors(changed, {name: value / 2 if value.is_floating_point() else value
                               for name, value in first.network.state_dict().items()})
        first.optimizer.state.clear()
        there = options.get("resume", False) and (two / "checkpoint.json").exists()
        return run(net=changed, folder=two, after=first, callbacks=stop_second, resume=there)

    straight = both(tmp_path / "a", tmp_path / "b")
    stops = {"in the first": {"stop_first": press_ctrl_c(0)}, "in the second": {"stop_second": press_ctrl_c(2)}}
    stopped = both(tmp_path / "c", tmp_path / "d", resume=False, **stops.get(killed, {}))
    assert stopped.status == ("stopped" if killed == "between" else "interrupted")
    again = both(tmp_path / "c", tmp_path / "d", resume=True)
    assert again.status == "complete" and history(again) == history(straight)
    assert same(tensors(again), tensors(straight))
    one, other = (read_checkpoint(tmp_path / name).tensors for name in ("b", "d"))
    assert same(one, other)


def test_what_until_has_ended_stays_ended(tmp_path):
    asked = []

    def once(epochs, net):
        asked.append(epochs)
        return epochs == 2

    first = run(folder=tmp_path, until=once)
    again = run(net=network(5), folder=tmp_path, resume=True, until=lambda epochs, net: pytest.fail("asked again"))
    assert asked == [1, 2] and again.status == "stopped" and same(tensors(again), tensors(first))
    assert read_checkpoint(tmp_path).description["progress"]["status"] == "stopped"
    whole = run(net=network(5), folder=tmp_path, resume=True)  # without it the run goes on to its end
    assert whole.status == "complete" and same(tensors(whole), tensors(run()))
    assert run(until=after_epochs(4)).status == "complete"  # the end is the end


def test_ctrl_c_in_the_epoch_where_until_ends_the_run_is_an_interruption(tmp_path):
    first = run(folder=tmp_path, until=after_epochs(2), callbacks=press_ctrl_c(1))
    assert first.status == "interrupted" and len(first.history) == 2
    again = run(folder=tmp_path, resume=True, until=after_epochs(2))
    assert again.status == "stopped" and same(tensors(again), tensors(first))


def test_a_run_goes_on_after_one_that_was_stopped():
    for before in (run(), run(callbacks=press_ctrl_c(1))):
        with pytest.raises(Refusal, match="stopped by `until`"):
            run(net=before.network, after=before)


def test_the_second_folder_is_of_its_own_first_epoch(tmp_path):
    def second(count, **options):
        first = run(until=after_epochs(count))
        return run(net=first.network, after=first, folder=tmp_path, **options)

    second(2, callbacks=press_ctrl_c(2))
    with pytest.raises(Refusal, match="begun 2 in the checkpoint, 1 now"):
        second(1, resume=True)
    with pytest.raises(Refusal, match="begun 2 in the checkpoint, None now"):
        run(folder=tmp_path, resume=True)


def test_the_best_epoch_is_one_of_the_second_call():
    poor, seen = network(5), {}
    with torch.no_grad():
        for tensor in variational_tensors(poor).values():
            tensor.posterior.loc.mul_(30)
    config = replace(CONFIG, epochs=6, select="best", learning_rate=0.3)
    first = run(config, until=after_epochs(3))
    first.optimizer.state.clear()

    def remember(end):
        seen[end.record.epoch] = {name: value.clone() for name, value in end.network.state_dict().items()}

    result = run(config, net=poor, after=first, callbacks=remember)
    values = [record.validation_nll for record in result.history]
    best = 3 + values[3:].index(min(values[3:]))
    assert min(values[:3]) < values[best] and best < 5  # or this test shows nothing
    assert result.network is poor and same(tensors(result), seen[best])


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
    run(net=with_dropout(), folder=tmp_path, architecture=None, callbacks=press_ctrl_c(1))
    torch.manual_seed(5)  # what the world does meanwhile
    resumed = run(net=with_dropout(), folder=tmp_path, resume=True, architecture=None)
    assert same(tensors(resumed), tensors(first))


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


def test_batch_normalisation_is_trained_and_saved(tmp_path):
    def normalised():
        torch.manual_seed(0)
        return with_posteriors(nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(),
                                             nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)))

    straight = run(net=normalised(), architecture=None)
    assert straight.network[1].num_batches_tracked == 4 * math.ceil(92 / 16) * 4  # training steps alone, and each draw
    run(net=normalised(), folder=tmp_path, architecture=None, callbacks=press_ctrl_c(1))
    resumed = run(net=normalised(), folder=tmp_path, resume=True, architecture=None)
    assert same(tensors(resumed), tensors(straight))


def test_the_bar_shows_the_parts(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(progress=True)
    shown = capsys.readouterr().err
    assert "epoch 4: ELBO -" in shown
    assert "KL" in shown
    assert "24/24" in shown
    run()
    assert capsys.readouterr().err == ""


def test_a_bar_needs_tqdm_and_nothing_else_does(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    run(replace(CONFIG, epochs=1))
    with pytest.raises(Refusal, match=r"pip install 'symbnn\[progress\]'"):
        run(progress=True)


def test_cuda(require_cuda):
    for dtype in ("float32", "bfloat16"):
        config = replace(CONFIG, device="cuda", dtype=dtype, epochs=30, learning_rate=2e-2)
        result = run(config)
        assert result.history[-1].validation_nll < 0.5
        assert next(result.network.parameters()).is_cuda


# Ended from outside, and validation that fails


@pytest.mark.parametrize("number", [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])])
def test_a_run_that_is_terminated_saves_like_one_after_ctrl_c(tmp_path, number):
    heard, before = [], signal.getsignal(number)
    signal.signal(number, lambda number, frame: heard.append(read_checkpoint(tmp_path).description["progress"]))
    try:
        result = run(folder=tmp_path, callbacks=lambda end: signal.raise_signal(number) if end.epochs == 2 else None)
    finally:
        signal.signal(number, before)
    assert result.status == "interrupted" and len(result.history) == 2
    assert [(its["epoch"], its["status"]) for its in heard] == [(2, "interrupted")]  # saved before it was handed on
    assert same(tensors(run(folder=tmp_path, resume=True)), tensors(run()))


class Broken(nn.Module):
    """NaN in evaluation mode, once it is switched on."""

    on = False

    def forward(self, x):
        return x * math.nan if self.on and not self.training else x


def breakable():
    return with_posteriors(nn.Sequential(nn.Flatten(), nn.Linear(16, 2), Broken()))


@pytest.mark.parametrize("select", ["last", "best"])
def test_an_epoch_whose_validation_fails_is_kept(tmp_path, select):
    def switch(end):
        end.network[2].on = end.epochs == 2

    config, options = replace(CONFIG, select=select), {"architecture": None, "folder": tmp_path}
    with pytest.raises(Refusal, match=r"after epoch 3, .*checkpoint of this epoch"):
        run(config, net=breakable(), callbacks=switch, **options)
    found = read_checkpoint(tmp_path)
    assert [record["validation_nll"] is None for record in found.description["history"]] == [False, False, True]
    assert all(tensor.isfinite().all() for tensor in found.tensors.values())
    assert len(run(config, net=breakable(), resume=True, **options).history) == 4


def test_a_failed_validation_without_a_folder_says_where_the_epoch_is():
    net = breakable()
    net[2].on = True
    with pytest.raises(Refusal, match="the network has the weights of this epoch"):
        run(net=net, architecture=None)
    assert len(run(net=net, architecture=None, validation=None).history) == 4


def test_a_missing_bar_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(Refusal, match=r"symbnn\[progress\]"):
        run(folder=tmp_path / "new", progress=True)
    assert not (tmp_path / "new").exists()
