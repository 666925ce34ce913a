"""Training on loaders, streams and several inputs: the numbers of a split, resumed to the bit, in one memory."""
import resource
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from helpers import seeded
from helpers_training import ACTION, CONFIG, DATA, VALIDATION, history, network, press_ctrl_c, same, tensors
from symbnn.data.splits import Split
from symbnn.data.streams import Stream
from symbnn.errors import Refusal
from symbnn.posterior.calls import Inputs
from symbnn.posterior.layers import with_posteriors
from symbnn.posterior.likelihoods import Bernoulli, Categorical
from symbnn.posterior.real_targets import Gaussian
from symbnn.training import state
from symbnn.training.checkpoints import read_checkpoint
from symbnn.training.evaluation import evaluate
from symbnn.training.loop import train

ROWS = TensorDataset(DATA.inputs, DATA.labels)
PLAIN = replace(CONFIG, augmentation="none", epochs=3)


class Lines(IterableDataset):
    """Rows from a source that is read to its end."""

    def __iter__(self):
        return zip(DATA.inputs, DATA.labels)


SOURCES = {
    "loader": lambda: DataLoader(ROWS, 8, shuffle=True),
    "own generator": lambda: DataLoader(ROWS, 8, shuffle=True, generator=torch.Generator().manual_seed(9)),
    "workers": lambda: DataLoader(ROWS, 8, shuffle=True, num_workers=2),
    "lines": lambda: Stream(Lines(), 23, batch_size=8),
    "function": lambda: Stream(lambda epoch: ((DATA.inputs[rows], DATA.labels[rows]) for rows in torch.randperm(
        23).split(8)), 23),
}
QUICK = [pytest.param(name, marks=pytest.mark.processes if name == "workers" else ()) for name in SOURCES]


def run(source, config=PLAIN, net=None, **options):
    return train(net or network(), source, config, validation=VALIDATION, **options)


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("augmentation", ["none", "full"])
def test_runs_on_sources_are_resumed_to_the_bit(name, augmentation, tmp_path, monkeypatch):
    options = {"config": replace(PLAIN, augmentation=augmentation), "folder": tmp_path}
    if augmentation == "full":
        options["action"] = ACTION
    straight = run(SOURCES[name](), **options | {"folder": None})
    advance = state.RunState.advance

    def press(run, *batch):
        if (run.epoch, run.step) == (1, 0):
            signal.raise_signal(signal.SIGINT)
        advance(run, *batch)

    with monkeypatch.context() as patched:
        patched.setattr(state.RunState, "advance", press)
        assert run(SOURCES[name](), **options).status == "interrupted"
    progress = read_checkpoint(tmp_path).description["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 1)
    torch.randn(5)
    resumed = run(SOURCES[name](), net=network(5), resume=True, **options)
    assert straight.status == resumed.status == "complete"
    assert same(tensors(resumed), tensors(straight)) and history(resumed) == history(straight)
    assert history(straight)[-1].validation_nll < history(straight)[0].validation_nll


def test_a_loader_in_order_is_the_split_in_order():
    """One step an epoch, one sample for all rows: the sums of an epoch do not depend on the order."""
    config = replace(PLAIN, batch_size=23, estimator="whole", dtype="float64")
    on_split, on_loader = (run(source, config) for source in (DATA, DataLoader(ROWS, 23)))
    for ours, theirs in zip(on_split.history, on_loader.history):
        assert ours.elbo == pytest.approx(theirs.elbo, rel=1e-9) and ours.kl == pytest.approx(theirs.kl, rel=1e-9)


def test_the_divergence_is_divided_by_the_number_of_data():
    still = replace(PLAIN, epochs=1, learning_rate=1e-12)
    once, tenfold = (run(Stream(DataLoader(ROWS, 8), number), still).history[0].kl for number in (23, 230))
    assert once == pytest.approx(10 * tenfold, rel=1e-5)
    turned = run(DataLoader(ROWS, 8), replace(still, augmentation="full"), action=ACTION).history[0].kl
    assert once == pytest.approx(4 * turned, rel=1e-5)


def test_a_source_that_changed_is_not_gone_on_with(tmp_path):
    def source(shift, repeatable=True):
        return Stream([(DATA.inputs + shift, DATA.labels)], 23, repeatable=repeatable)

    run(source(0), folder=tmp_path / "a", callbacks=press_ctrl_c(0))
    with pytest.raises(Refusal, match="data"):
        run(source(1), folder=tmp_path / "a", resume=True)
    run(source(0, False), folder=tmp_path / "b", callbacks=press_ctrl_c(0))
    assert run(source(1, False), folder=tmp_path / "b", resume=True).status == "complete"


def test_a_source_that_ends_early_is_refused_and_the_checkpoint_kept(tmp_path):
    def read(epoch):
        return [(DATA.inputs[:12], DATA.labels[:12]), (DATA.inputs[12:], DATA.labels[12:])][:1 if epoch == 2 else 2]

    with pytest.raises(Refusal, match="ended early"):
        run(Stream(read, 23), folder=tmp_path)
    assert read_checkpoint(tmp_path).description["progress"]["epoch"] == 2


@pytest.mark.parametrize(("source", "said"), [
    (DataLoader(TensorDataset(DATA.inputs, DATA.labels + 9), 8), "label|outputs"),
    (DataLoader(TensorDataset(DATA.inputs, nn.functional.one_hot(DATA.labels)), 8), "argmax"),
    (DataLoader(TensorDataset(DATA.inputs[:, :, :2], DATA.labels), 8), "inputs of shape"),
    (DataLoader(TensorDataset(DATA.inputs), 8), "pairs"), (Stream([], 23), "at least one batch"),
    ([[1, 2], [3]], "and a target for each"), ((DATA.inputs, DATA.labels[:5]), "each"),
])
def test_what_cannot_be_trained_on_is_refused_before_work(source, said):
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(Refusal, match=said):
        run(source, net=net)
    assert same(net.state_dict(), before)


def test_labels_out_of_range_are_found_when_they_come():
    labels = DATA.labels.clone()
    labels[-1] = 7
    with pytest.raises(Refusal, match="label"):
        run(DataLoader(TensorDataset(DATA.inputs, labels), 8))
    missing = torch.full((23, 1), 0.5)
    missing[-1] = torch.nan
    net = with_posteriors(nn.Sequential(nn.Flatten(), nn.Linear(16, 1)))
    with pytest.raises(Refusal, match=r"finite|NaN"):
        train(net, DataLoader(TensorDataset(DATA.inputs, missing), 8), PLAIN, likelihood=Gaussian(0.1))


class Both(nn.Module):
    """Two inputs, one of them by name."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(16, 2), nn.Linear(4, 2)

    def forward(self, image, row):
        return self.left(image.flatten(1)) + self.right(row)


@pytest.mark.parametrize("kind", ["dictionary", "tuple", "inputs", "loader", "loader of tuples", "items"])
def test_networks_with_several_inputs_are_trained(kind, tmp_path):
    image, row = DATA.inputs, DATA.inputs[:, 0, 0]
    net = with_posteriors(Both())
    data = {"dictionary": ({"image": image, "row": row}, DATA.labels), "tuple": ((image, row), DATA.labels),
            "inputs": (Inputs(image, row=row), DATA.labels),
            "loader": DataLoader([({"image": x, "row": x[0, 0]}, y) for x, y in ROWS], 8),
            "loader of tuples": DataLoader([((x, x[0, 0]), y) for x, y in ROWS], 8),
            "items": [((x, x[0, 0]), y) for x, y in ROWS]}[kind]
    held = DataLoader([((x, x[0, 0]), y) for x, y in zip(VALIDATION.inputs, VALIDATION.labels)], 2)
    if kind != "loader of tuples":
        held = ({"image": VALIDATION.inputs, "row": VALIDATION.inputs[:, 0, 0]}, VALIDATION.labels)
    config = replace(PLAIN, epochs=30, learning_rate=0.05)
    result = train(net, data, config, validation=held)
    assert result.history[-1].validation_nll < min(0.5, result.history[0].validation_nll)
    if kind == "dictionary":
        halted = train(with_posteriors(Both()), data, config, folder=tmp_path, callbacks=press_ctrl_c(4))
        assert halted.status == "interrupted"
        again = [train(with_posteriors(Both()), data, config, folder=tmp_path, resume=True), halted][0]
        assert again.status == "complete"
        with pytest.raises(Refusal, match='augmentation="none"'):
            train(net, data, replace(config, augmentation="full"), action=ACTION)


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(0.3)])
def test_networks_with_several_inputs_are_evaluated(likelihood):
    """As the same network with both inputs in one tensor."""
    class OneTensor(Both):
        def forward(self, x):
            return super().forward(x[:, :16], x[:, 16:])

    net = with_posteriors(Both(), scale=0.1)
    joined = with_posteriors(OneTensor(), scale=0.1)
    joined.load_state_dict(net.state_dict())
    image, row = DATA.inputs, DATA.inputs[:, 0, 0]
    targets = DATA.labels if isinstance(likelihood, Categorical) else torch.rand(23, 2, generator=seeded())
    found = evaluate(net, ({"image": image, "row": row}, targets), likelihood=likelihood, draws=8)
    expected = evaluate(joined, (torch.cat([image.flatten(1), row], 1), targets), likelihood=likelihood, draws=8)
    assert found.keys() == expected.keys() and {"accuracy", "rmse"} & found.keys()
    assert all(found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6) for name in expected)
    for wrong in ({"predictor": Both()}, {"action": ACTION}, {"out_of_distribution": image}):
        with pytest.raises(Refusal, match="several tensors"):
            evaluate(**{"predictor": net, "data": ((image, row), targets), "likelihood": likelihood} | wrong)


def test_a_loader_is_evaluated_as_what_it_gives():
    net = network()
    assert dict(evaluate(net, DataLoader(ROWS, 8))) == dict(evaluate(net, DATA))


def test_a_validation_loader_is_read_once():
    loader = DataLoader(TensorDataset(VALIDATION.inputs, VALIDATION.labels), 3)
    ours, theirs = train(network(), DATA, PLAIN, validation=loader), run(DATA)
    assert [record.validation_nll for record in ours.history] == [record.validation_nll for record in theirs.history]


def test_two_million_rows_are_trained_on_in_the_memory_of_a_batch():
    """128 MB of inputs are read; the highest memory of the process grows by less than a quarter of that."""
    def rows(epoch, count=100, size=20_000):
        for number in range(count):
            x = torch.randn(size, 16, generator=seeded(number))
            yield x, (x[:, :1] > 0).float()

    net = with_posteriors(nn.Linear(16, 1))
    quick = replace(PLAIN, epochs=1, draws=2, learning_rate=0.05)
    train(net, Stream(lambda epoch: rows(epoch, 2), 40_000), quick, likelihood=Bernoulli())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = train(net, Stream(rows, 2_000_000), quick, likelihood=Bernoulli())
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024  # bytes, on Linux
    assert grown < 32e6
    assert result.history[0].kl * 2_000_000 > 0 and result.history[0].elbo > -0.4


def test_the_data_are_left_as_they_were():
    split = Split(DATA.inputs.clone(), DATA.labels.clone())
    run(DataLoader(TensorDataset(split.inputs, split.labels), 8))
    assert torch.equal(split.inputs, DATA.inputs)
