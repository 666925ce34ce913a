"""Callbacks: what they are told, early stopping, tables and loggers, objectives of one's own."""
import csv
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers import seeded
from helpers_training import CONFIG, DATA, history, network, press_ctrl_c, run, same, tensors
from symbnn.errors import Refusal
from symbnn.posterior.elbo import ELBO
from symbnn.posterior.layers import kl_per_datum, with_posteriors
from symbnn.posterior.real_targets import Gaussian
from symbnn.training.callbacks import CSVLog, EarlyStopping, EpochEnd, TensorBoardLog, log_to
from symbnn.training.checkpoints import load_network, read_checkpoint
from symbnn.training.loop import train
from symbnn.training.objectives import evidence_bound
from symbnn.training.resume import EpochRecord


def end_of(values, **options):
    records = [EpochRecord(e, value or 0.0, value or 0.0, 0.1, value, 0.0) for e, value in enumerate(values)]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    return EpochEnd(records, network(), optimizer, Gaussian(0.5), **{"config": CONFIG} | options)


def test_several_callbacks_are_told_the_record():
    seen, again = [], []
    result = run(callbacks=[lambda end: seen.append((end.record, end.epochs, end.network)),
                            lambda end: again.append(end.metrics)])
    assert [record for record, *_ in seen] == result.history
    assert [epochs for _, epochs, _ in seen] == [1, 2, 3, 4] and seen[0][2] is result.network
    assert again[-1]["validation_nll"] == result.history[-1].validation_nll and again[0]["learning_rate"] == 1e-2


def test_true_ends_a_run_and_nothing_else_does(tmp_path):
    ended = run(folder=tmp_path, callbacks=lambda end: end.epochs == 2)
    assert ended.status == "complete" and len(ended.history) == 2
    assert len(run(callbacks=lambda end: 1).history) == len(run(callbacks=lambda end: "yes").history) == 4
    again = run(net=network(5), folder=tmp_path, resume=True, callbacks=lambda end: pytest.fail("asked again"))
    assert again.status == "complete" and same(tensors(again), tensors(ended))
    onwards = run(net=network(5), folder=tmp_path, resume=True)  # without a callback it goes on
    assert len(onwards.history) == 4 and same(tensors(onwards), tensors(run()))


def test_a_run_that_was_ended_keeps_its_best_epoch(tmp_path):
    config, seen = replace(CONFIG, select="best", learning_rate=0.3, epochs=12), {}

    def remember(end):
        seen[end.record.epoch] = {name: value.clone() for name, value in end.network.state_dict().items()}

    result = run(config, folder=tmp_path, callbacks=[remember, EarlyStopping(2)])
    best = min(result.history, key=lambda record: record.validation_nll).epoch
    assert len(result.history) == best + 3 < 12
    assert same(tensors(result), seen[best]) and same(load_network(tmp_path).state_dict(), seen[best])


def test_early_stopping_is_resumed_to_the_bit(tmp_path):
    config = replace(CONFIG, learning_rate=0.3, epochs=12)
    straight = run(config, callbacks=EarlyStopping(2))
    assert 3 < len(straight.history) < 12
    run(config, folder=tmp_path, callbacks=[press_ctrl_c(1), EarlyStopping(2)])
    resumed = run(config, net=network(4), folder=tmp_path, resume=True, callbacks=EarlyStopping(2))
    assert history(resumed) == history(straight) and same(tensors(resumed), tensors(straight))


@pytest.mark.parametrize(("values", "options", "ends"), [
    ([1.0, 0.9, 0.8], {"patience": 1}, False), ([1.0, 1.0], {"patience": 1}, True),
    ([1.0, 1.1, 1.2], {"patience": 2}, True), ([1.0, 1.1, 0.9], {"patience": 2}, False),
    ([1.0, 0.99, 0.98], {"patience": 2, "min_delta": 0.05}, True), ([1.0, None, 1.1], {"patience": 2}, False),
    ([1.0, None, 1.1, None, 1.1], {"patience": 2}, True), ([-1.0, -0.9], {"patience": 1, "metric": "elbo"}, False),
    ([-0.9, -1.0], {"patience": 1, "metric": "elbo"}, True),
    ([-0.9, -1.0], {"patience": 1, "metric": "expected_log_likelihood"}, True),
    ([0.5, 0.5], {"patience": 1, "metric": "kl"}, True), ([0.5, math.inf], {"patience": 1}, True),
])
def test_when_early_stopping_ends(values, options, ends):
    assert EarlyStopping(**options)(end_of(values)) is ends


def test_early_stopping_looks_at_the_epochs_of_its_own_network():
    assert not EarlyStopping(1)(end_of([0.1, 0.9], begun=1)) and EarlyStopping(1)(end_of([0.1, 0.9]))


@pytest.mark.parametrize(("call", "said"), [
    (lambda: EarlyStopping(0), "patience=10"), (lambda: EarlyStopping(min_delta=-1), "min_delta"),
    (lambda: EarlyStopping(metric="accuracy"), "validation_nll"), (lambda: EarlyStopping()(end_of([None])),
     "validation=data.validation"), (lambda: run(callbacks=3), "functions"), (lambda: run(callbacks=[3]), "functions"),
    (lambda: run(callbacks="loud"), "functions"), (lambda: log_to(3), "log_metrics"),
    (lambda: run(validation=None, callbacks=EarlyStopping()), "validation=data.validation"),
])
def test_refusals(call, said):
    with pytest.raises(Refusal, match=said):
        call()


def test_validation_at_intervals_is_waited_for():
    assert not EarlyStopping(1)(end_of([None], config=replace(CONFIG, evaluate_every=2)))


# Tables and loggers


def test_the_table_is_whole_after_each_epoch_and_after_a_resumed_run(tmp_path):
    path, lengths = tmp_path / "tables" / "run.csv", []

    def read(end=None):
        with path.open() as file:
            lengths.append(len(rows := list(csv.DictReader(file))))
        return rows

    run(folder=tmp_path / "run", callbacks=[CSVLog(path), read, press_ctrl_c(1)])
    result = run(net=network(5), folder=tmp_path / "run", resume=True, callbacks=[CSVLog(path), read])
    assert lengths == [1, 2, 3, 4]
    rows = read()
    assert [float(row["elbo"]) for row in rows] == [record.elbo for record in result.history]
    assert [float(row["validation_nll"]) for row in rows] == [record.validation_nll for record in result.history]
    run(validation=None, callbacks=CSVLog(path))
    assert {row["validation_nll"] for row in read()} == {""}


def test_loggers_of_two_kinds_are_told():
    seen = []
    lightning = SimpleNamespace(log_metrics=lambda metrics, step=None: seen.append(("l", step, metrics["elbo"])))
    weights_and_biases = SimpleNamespace(log=lambda metrics, step=None: seen.append(("w", step, metrics["elbo"])))
    result = run(replace(CONFIG, epochs=2), callbacks=[log_to(lightning), log_to(weights_and_biases)])
    first, second = (record.elbo for record in result.history)
    assert seen == [("l", 1, first), ("w", 1, first), ("l", 2, second), ("w", 2, second)]


def test_a_learned_noise_is_among_the_metrics():
    seen, targets = [], torch.randn(23, 1, generator=seeded())
    net = with_posteriors(nn.Sequential(nn.Flatten(), nn.Linear(16, 1)))
    result = train(net, (DATA.inputs, targets), epochs=2, augmentation="none", batch_size=8, likelihood=Gaussian(
        0.5, learn=True), callbacks=lambda end: seen.append(end.metrics["noise"]))
    assert len(seen) == 2 and seen[-1] == pytest.approx(result.likelihood.noise.item())
    assert "noise" not in end_of([1.0]).metrics


def test_tensorboard_has_the_metrics(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(folder=tmp_path / "run", callbacks=[TensorBoardLog(tmp_path / "board"), press_ctrl_c(1)])
    result = run(net=network(5), folder=tmp_path / "run", resume=True, callbacks=TensorBoardLog(tmp_path / "board"))
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    found = events.Scalars("elbo")
    assert [event.step for event in found] == [1, 2, 3, 4]
    assert [event.value for event in found] == pytest.approx([record.elbo for record in result.history], rel=1e-6)


# Objectives of one's own


def doubled(step):
    """The ELBO with twice the divergence."""
    parts = evidence_bound(step)
    return parts._replace(elbo=parts.expected_log_likelihood - 2 * step.kl_weight * parts.kl)


def test_an_objective_of_ones_own_is_maximised(tmp_path):
    """Twice the divergence is the setting kl_weight=2, to rounding; the record has the ELBO."""
    config = replace(CONFIG, dtype="float64")
    by_setting, by_function = run(replace(config, kl_weight=2.0)), run(config, objective=doubled)
    for name, value in tensors(by_setting).items():
        torch.testing.assert_close(tensors(by_function)[name], value, rtol=1e-9, atol=1e-12)
    assert not same(tensors(by_function), tensors(run(config)))
    for ours, theirs in zip(by_function.history, by_setting.history):
        assert ours.elbo == pytest.approx(theirs.elbo + theirs.kl, rel=1e-9)


def test_an_objective_of_ones_own_is_told_the_step():
    seen = []

    def noted(step):
        seen.append((step.inputs.shape[1:], step.outputs.shape[-1], step.num_data, step.kl_weight))
        assert kl_per_datum(step.network, step.num_data) == evidence_bound(step).kl
        return evidence_bound(step)

    plain, own = run(replace(CONFIG, kl_annealing=1)), run(replace(CONFIG, kl_annealing=1), objective=noted)
    assert same(tensors(plain), tensors(own))
    assert seen[0] == ((1, 4, 4), 2, 4 * len(DATA), 1 / 6) and seen[-1][-1] == 1.0


def test_a_run_with_another_objective_is_not_gone_on_with(tmp_path):
    run(folder=tmp_path, objective=doubled, callbacks=press_ctrl_c(1))
    assert read_checkpoint(tmp_path).description["own_objective"].endswith("test_callbacks.doubled")
    with pytest.raises(Refusal, match="own_objective"):
        run(folder=tmp_path, resume=True)
    assert run(folder=tmp_path, resume=True, objective=doubled).status == "complete"


@pytest.mark.parametrize(("objective", "said"), [
    (lambda step: step.outputs.mean(), "ELBO"), (lambda step: None, "ELBO"),
    (lambda step: ELBO(*(step.outputs.mean(0).mean(0),) * 3), "single numbers"),
    (lambda step: ELBO(*(torch.zeros(()),) * 3), "depends on the parameters"),
    (lambda step: ELBO(0.0, 0.0, 0.0), "single numbers"), (3, "objective"), ("elb", "objective"),
])
def test_what_is_no_objective_is_refused(objective, said):
    with pytest.raises(Refusal, match=said):
        run(objective=objective)


def test_two_objectives_are_refused():
    with pytest.raises(Refusal, match="one objective"):
        run(replace(CONFIG, objective="symmetrised"), objective=doubled)
