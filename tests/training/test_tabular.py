"""Networks of a table's columns: units, runs that are restored, refusals."""
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn

from helpers import seeded
from symbnn.data.splits import Split
from symbnn.errors import Refusal
from symbnn.training.checkpoints import read_checkpoint
from symbnn.training.loop import train
from symbnn.training.tabular import TableRun, TableSetup, noted_table, restored, tabular_network
from tolerances import assert_close, exact64

pytest.importorskip("pandas", reason="pandas is not installed")
X = torch.randn(40, 3, generator=seeded(), dtype=torch.float64)
DATA = Split(torch.cat([100 + 20 * X[:, :2], torch.ones(40, 1)], 1), 5 - 3 * X[:, :1])


def test_the_units_are_in_the_first_and_the_last_layer():
    network = tabular_network(DATA, 1, (8,), True, seeded())
    inner = nn.Sequential(*list(network)[1:-1])
    mean, scale = DATA.inputs.mean(0), DATA.inputs.std(0, correction=0)
    scale[2] = 1  # a column that does not vary
    expected = DATA.targets.mean() + DATA.targets.std(correction=0) * inner((DATA.inputs - mean) / scale)
    assert_close(network(DATA.inputs), expected, exact64)
    assert {name for name, _ in network.named_parameters()} == {"1.weight", "1.bias", "3.weight", "3.bias"}
    assert len(list(tabular_network(DATA, 4, ()))) == 2


def file_of(folder, kind):
    path, x = folder / "mine.csv", X[:, 0].numpy()
    targets = {"regression": x * 3 + 0.25, "classification": np.where(x > 0, "up", "down"),
               "counts": np.round(np.exp(x)).astype(int)}[kind]
    rows = [f"{a},{b},{t}" for (a, b), t in zip(X[:, :2].tolist(), targets)]
    path.write_text("\n".join(["a,b,target", *rows]))
    return path


@pytest.mark.parametrize("kind", ["regression", "classification", "counts"])
def test_a_run_is_restored_from_its_checkpoint_and_its_file(tmp_path, kind):
    setup = TableSetup(task="counts" if kind == "counts" else None, hidden=(8,), test_share=0.25)
    run = TableRun.read(file_of(tmp_path, kind), setup)
    network, likelihood = run.network(3), run.likelihood()
    result = train(network, run.data.train, epochs=3, batch_size=8, augmentation="none", likelihood=likelihood,
                   validation=run.data.validation, folder=tmp_path / "run", notes=run.noted())
    assert result.history[-1].elbo > result.history[0].elbo
    stored = read_checkpoint(tmp_path / "run")
    found, name = noted_table(stored)
    assert name == "mine.csv" and asdict(found) == asdict(setup) | {"target": "target", "task": kind}
    again, same = restored(TableRun.read(tmp_path / name, found), stored)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in network.state_dict().items())
    assert all(torch.equal(value, same.state_dict()[key]) for key, value in likelihood.state_dict().items())
    path, first = tmp_path / name, "0.125,0.5,up" if kind == "classification" else "0.125,0.5,1"
    path.write_text(path.read_text().replace("a,b,target\n", f"a,b,target\n{first}\n"))
    other = TableRun.read(path, found)
    with pytest.raises(Refusal, match="checksum"):
        restored(other, stored)


@pytest.mark.parametrize(("options", "said"), [
    ({"hidden": (0,)}, "hidden"), ({"family": "cauchy"}, "family"), ({"prior": "flat"}, "prior"),
    ({"initial_scale": -1.0}, "initial_scale"), ({"prior_scale": 0.0}, "prior_scale"), ({"task": "ranking"}, "task"),
    ({"skip": "name"}, "skip"), ({"hidden": (2.5,)}, "hidden"),
])
def test_setups_that_cannot_be_meant_are_refused(options, said):
    with pytest.raises(Refusal, match=said):
        TableSetup(**options)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 20])
def test_shares_that_are_none_are_refused(tmp_path, share):
    with pytest.raises(Refusal, match=r"test_share=0\.2"):
        TableRun.read(file_of(tmp_path, "regression"), TableSetup(test_share=float(share)))


def test_data_without_columns_are_refused():
    for data in (Split(torch.rand(4, 1, 8, 8), torch.rand(4, 1)), Split(torch.ones(4, 2, dtype=torch.int64),
                                                                      torch.rand(4, 1))):
        with pytest.raises(Refusal, match="columns"):
            tabular_network(data, 1)
