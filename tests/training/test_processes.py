"""Several processes: one run, the same objective, noise of their own; interrupted, resumed, and ended together."""
import logging
import os
import signal
import socket
import subprocess
import sys
import zlib
from dataclasses import replace
from datetime import timedelta

import pytest
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
from symbnn.data.splits import Split
from symbnn.equivariance.averages import symmetrize_
from symbnn.equivariance.projected_gradients import drift, keep_invariant
from symbnn.equivariance.tied import tie
from symbnn.errors import Refusal
from symbnn.posterior.layers import variational_tensors, with_posteriors
from symbnn.posterior.likelihoods import Categorical
from symbnn.symmetry.networks import network_action
from symbnn.training import ranks as ranks_module
from symbnn.training.architectures import build
from symbnn.training.callbacks import EarlyStopping
from symbnn.training.checkpoints import read_checkpoint
from symbnn.training.loop import train
from symbnn.training.processes import launch
from symbnn.training.ranks import ALONE, Ranks, joined_ranks
from symbnn.training.shares import shares_of
from symbnn.training.state import RunState

POINT = replace(CONFIG, epochs=2, optimizer="sgd", learning_rate=1e-2, dtype="float64", schedule="cosine")


def nearly_a_point():
    return with_posteriors(build(ARCHITECTURE, seeded(0), torch.float64), scale=1e-12)


def checksum(net):
    return zlib.crc32(b"".join(value.cpu().numpy().tobytes() for value in net.state_dict().values()))


def invariant():
    """An invariant network, and how it moves."""
    plain = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
                          nn.Flatten(), nn.Linear(128, 2))
    torch.manual_seed(0)
    for layer in (plain[0], plain[2], plain[5]):
        nn.init.normal_(layer.weight, std=0.2)
    net = with_posteriors(plain)
    action = network_action(net, ACTION, hidden="regular")
    symmetrize_(net, action, "projection")
    return net, action


def drifts():
    """How far projected and tied weights are from Fix(G) after 100 small steps."""
    config = replace(CONFIG, epochs=17, learning_rate=1e-3, batch_size=16)
    net, action = invariant()
    with keep_invariant(net, action):
        result = train(net, DATA, config, action=ACTION)
    assert len(result.history) == 17
    tied = tie(*invariant())
    train(tied, DATA, replace(config, epochs=2), action=ACTION)
    draw = {name: tensor.posterior.rsample(1)[0] for name, tensor in variational_tensors(tied).items()}
    away = max((action.parameters[name].act(1, its) - its).abs().max().item() for name, its in draw.items())
    return drift(net, action).absolute, away, checksum(net)


def raising(net, where):
    """Raises in the third call of one rank."""
    calls = iter(range(10**6))

    def hook(*_):
        if joined_ranks().rank == where and next(calls) == 3:
            raise ValueError("broken here")

    net.register_forward_hook(hook)
    return net


def refused(call):
    try:
        call()
    except (Refusal, ValueError) as error:
        return str(error)
    return ""


def in_several(folder):
    """What the tests look at, in every process."""
    logging.getLogger("symbnn").setLevel(logging.ERROR)
    ranks = joined_ranks()
    found = {"point": tensors(run(POINT, net=nearly_a_point())),
             "accumulated": tensors(run(replace(POINT, accumulate=2), net=nearly_a_point()))}
    called = []

    def change(end):
        called.append(end.record.epoch)
        with torch.no_grad():
            next(end.network.parameters()).mul_(0.5)
        end.optimizer.state.clear()

    result = run(CONFIG, net=network(ranks.rank), callbacks=[change])
    found["histories"] = ranks.all([record[:5] for record in history(result)])
    found["states"], found["called"] = ranks.all(checksum(result.network)), ranks.all(called)
    early = run(replace(CONFIG, epochs=9, learning_rate=1.0), callbacks=EarlyStopping(patience=1))
    found["early"] = ranks.all(len(early.history))
    normal = normed()
    train(normal, task(40), replace(CONFIG, epochs=2, batch_size=20, augmentation="none"))
    found["norms"], found["norm"] = ranks.all(checksum(normal)), normal[2].running_mean.clone()

    straight = run(folder=folder / "straight", net=network())
    first = run(folder=folder / "stopped", net=network(), callbacks=press_ctrl_c(1) if ranks.rank == ranks.count - 1 or
                ranks.first else ())
    found["interrupted"] = ranks.all((first.status, len(first.history)))
    second = run(folder=folder / "stopped", net=network(7), resume=True)
    found["resumed"] = ranks.all(same(tensors(straight), tensors(second)) and history(straight) == history(second))
    found["best"] = ranks.all(checksum(run(replace(CONFIG, select="best")).network))
    found["broken"] = ranks.all(refused(lambda: run(net=raising(network(), 1))))
    found["other"] = ranks.all(refused(lambda: run(data=task(seed=ranks.rank))))
    found["few"] = ranks.all(refused(lambda: run(replace(CONFIG, batch_size=1, draws=1))))
    found["drifts"] = ranks.all(drifts())
    return found


def check_several(found, folder, count):
    alone = tensors(run(POINT, net=nearly_a_point()))
    for name in ("point", "accumulated"):
        for key, value in found[name].items():
            assert torch.allclose(value, alone[key], rtol=1e-9, atol=1e-11), (name, key)
    assert len(set(found["states"])) == len(set(found["norms"])) == len(set(found["best"])) == 1
    assert all(its == found["histories"][0] for its in found["histories"]) and len(found["histories"][0]) == 4
    assert found["called"] == [[0, 1, 2, 3]] + [[]] * (count - 1)
    assert len(set(found["early"])) == 1 and found["early"][0] < 9
    assert found["norm"].abs().max() > 0
    assert found["interrupted"] == [("interrupted", 2)] * count and found["resumed"] == [True] * count
    assert "broken here" in found["broken"][1] and all("gave up" in text for text in found["broken"][:1])
    assert all("differ in data" in text for text in found["other"])
    assert all("for each of" in text for text in found["few"])
    assert found["drifts"] == [(0.0, 0.0, found["drifts"][0][2])] * count
    assert read_checkpoint(folder / "stopped").description["processes"] == [[0, 0, count]]


@pytest.mark.processes
@pytest.mark.timeout(500)
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_in_several_processes(count, tmp_path):
    check_several(launch(count, in_several, tmp_path, threads=1), tmp_path, count)


def drifts_of_all():
    return joined_ranks().all(drifts())


@pytest.mark.processes
@pytest.mark.timeout(300)
def test_four_processes_stay_invariant():
    assert len(set(found := launch(4, drifts_of_all, threads=1))) == 1 and found[0][:2] == (0.0, 0.0)


@pytest.mark.parametrize("estimator", ["whole", "split"])
def test_the_expected_gradient_is_that_of_one_process(estimator):
    config = replace(CONFIG, estimator=estimator, batch_size=12, dtype="float64", augmentation="none", draws=2)
    data, net = Split(DATA.inputs[:12].double(), DATA.targets[:12]), network().double()

    def sampled(count, pieces, epochs):
        """Gradients of the batch in so many steps, summed over the shares of simulated processes."""
        states = [RunState(net, data, replace(config, accumulate=pieces), Categorical(), None, None, {}, None, None,
                           torch.device("cpu"), Ranks(rank, count)) for rank in range(count)]
        found = []
        for epoch in epochs:
            total = 0
            for state in states:
                state.epoch = epoch
                counted = state.gradient(data.inputs, data.targets)
                assert counted[2] == len(range(state.ranks.rank, 12, count))
                total = total + torch.cat([its.grad.flatten() for its in net.parameters()])
            found.append(total)
        return torch.stack(found)

    one = sampled(1, 1, range(300))
    for several in (sampled(3, 1, range(300, 600)), sampled(1, 3, range(600, 900)), sampled(2, 2, range(900, 1200))):
        error = (one.var(0) / 300 + several.var(0) / 300).sqrt()
        away = (one.mean(0) - several.mean(0)).abs() / error.clamp_min(1e-12)
        assert away.max() < 5 and several.var(0).sum() < one.var(0).sum() + 1e-12


def test_pieces_are_one_batch_where_samples_do_not_matter():
    alone = tensors(run(POINT, net=nearly_a_point()))
    pieces = tensors(run(replace(POINT, accumulate=3), net=nearly_a_point()))
    assert all(torch.allclose(pieces[name], alone[name], rtol=1e-9, atol=1e-11) for name in alone)
    assert not same(tensors(run()), tensors(run(replace(CONFIG, accumulate=3))))
    with pytest.raises(Refusal, match="accumulate=17"):
        replace(CONFIG, accumulate=17)


def test_shares_are_the_rows():
    x, y = torch.arange(7.0)[:, None], torch.arange(7)
    assert shares_of(x, y)[0].inputs is x and shares_of(x, y, ALONE, 1)[0].weight == 1.0
    for count, pieces in ((2, 1), (3, 2), (8, 1), (4, 4)):
        found = [share for rank in range(count) for share in shares_of(x, y, Ranks(rank, count), pieces)]
        assert sorted(torch.cat([share.targets for share in found]).tolist()) == list(range(7))
        assert all(torch.equal(share.inputs[:, 0], share.targets.float()) for share in found)
        assert abs(sum(share.weight for share in found) - 1) < 1e-12


def killed(folder):
    """One process is killed in the third epoch."""
    rank = joined_ranks().rank

    def hook(*_):
        if rank == 1 and (folder / "run" / "checkpoint.json").exists() and next(calls) == 20:
            os.kill(os.getpid(), signal.SIGKILL)

    net, calls = network(), iter(range(10**6))
    net.register_forward_hook(hook)
    run(replace(CONFIG, epochs=200), net=net, folder=folder / "run")


@pytest.mark.processes
@pytest.mark.timeout(300)
def test_a_killed_process_ends_the_others_and_the_checkpoint_is_whole(tmp_path, caplog):
    with pytest.raises(Refusal, match="process 1, which ended with exit code -9"):
        launch(2, killed, tmp_path, threads=1)
    stored = read_checkpoint(tmp_path / "run")
    epochs = stored.description["progress"]["epoch"]
    assert 0 < epochs < 200 and stored.description["processes"] == [[0, 0, 2]]
    with caplog.at_level(logging.WARNING, "symbnn"):
        result = run(replace(CONFIG, epochs=200), net=network(5), folder=tmp_path / "run", resume=True,
                     until=lambda done, net: done == epochs + 1)
    assert result.status == "stopped" and "in 1 process where it had 2" in caplog.text
    assert read_checkpoint(tmp_path / "run").description["processes"] == [[0, 0, 2], [epochs, 0, 1]]


def fails():
    raise Refusal("nothing", got="something", cause="a test", fix="none")


@pytest.mark.processes
@pytest.mark.timeout(300)
def test_what_a_function_refuses_is_refused():
    with pytest.raises(Refusal, match="Got: something"):
        launch(2, fails, threads=1)


def test_what_cannot_be_launched():
    for wrong in (lambda: launch(2, lambda: 1), lambda: launch(0, fails), lambda: launch(2, 3),
                  lambda: launch(2, fails, threads=0)):
        with pytest.raises(Refusal):
            wrong()


SCRIPT = """
import sys
sys.path[:0] = sys.argv[1:]
from helpers_training import history, run, tensors
from symbnn.training.ranks import joined_ranks
result = run()
if joined_ranks().first:
    print(joined_ranks().count, result.status, len(result.history))
"""


@pytest.mark.processes
@pytest.mark.timeout(300)
def test_torchrun_joins_by_itself(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(tmp_path / "script.py"), *map(str, sys.path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert found.returncode == 0 and found.stdout.split() == ["2", "complete", "4"], found.stderr


def test_processes_that_cannot_be_joined_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Refusal, match="no RANK, MASTER_ADDR, MASTER_PORT"):
        run()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(ranks_module, "PATIENCE", timedelta(seconds=1))
    for name, value in {"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Refusal, match="WORLD_SIZE"):
        run()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert joined_ranks() == ALONE
    monkeypatch.setenv("WORLD_SIZE", "-3")
    with pytest.raises(Refusal, match="WORLD_SIZE"):
        run()
