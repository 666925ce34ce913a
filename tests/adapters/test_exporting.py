"""Exported programs and files of ONNX give what `predict` gives; files are whole or not there."""
import copy

import numpy as np
import pytest
import torch
from torch import nn

from helpers import normal, seeded
from symbnn.adapters import exporting
from symbnn.adapters.exporting import export_onnx, export_program
from symbnn.equivariance.symmetric import bayesianize
from symbnn.errors import Refusal
from symbnn.posterior.ensembles import Ensemble
from symbnn.posterior.layers import with_posteriors
from symbnn.posterior.sampling import mean_weights, predict, sample_weights
from symbnn.symmetry.fields import rotations

IMAGES = normal(3, 1, 6, 6, dtype=torch.float32)
OTHERS = normal(7, 1, 6, 6, seed=1, dtype=torch.float32)


def network():
    torch.manual_seed(0)
    made = with_posteriors(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
                                         nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 3)), scale=0.2)
    made[1].running_mean.copy_(torch.arange(4.0))
    return made


class Several(nn.Module):
    """Two inputs and two outputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, first, second):
        return {"sum": self.layer(first) + second, "norm": second.norm(dim=1)}


class Branching(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x[:, :2]


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found), expected.detach().numpy(), rtol=1e-5, atol=1e-5)


def session(path):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    return runtime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_programs_give_what_predict_gives():
    model = network()
    weights = sample_weights(model, 3, seeded())
    before = copy.deepcopy(model.state_dict())
    close(export_program(model, IMAGES).module()(OTHERS).detach(), predict(model, OTHERS,
                                                                         weights=mean_weights(model))[0])
    program = export_program(model, IMAGES, weights=weights)
    close(program.module()(OTHERS).detach(), predict(model, OTHERS, weights=weights))
    assert program.module()(OTHERS[:1]).shape == (3, 1, 3)
    drawn = export_program(model, IMAGES, draws=3, generator=seeded())
    assert torch.equal(drawn.module()(OTHERS), program.module()(OTHERS))
    assert model.training and all(torch.equal(its, before[name]) for name, its in model.state_dict().items())


def test_a_program_is_kept_when_the_network_changes(tmp_path):
    pair = bayesianize(nn.Sequential(nn.Flatten(), nn.Linear(36, 2)), rotations(), (1, 6, 6))
    program = export_program(pair, IMAGES)
    found = program.module()(OTHERS)
    torch.export.save(program, tmp_path / "program.pt2")
    with torch.no_grad():
        for parameter in pair.network.parameters():
            parameter.add_(1)
    assert torch.equal(program.module()(OTHERS), found)
    close(torch.export.load(tmp_path / "program.pt2").module()(OTHERS).detach(), found)


def test_ensembles_and_several_inputs_and_outputs():
    members = Ensemble([nn.Linear(4, 2) for _ in range(3)])
    x = normal(5, 4, dtype=torch.float32)
    close(export_program(members, x[:2]).module()(x).detach(), members(x))
    model = with_posteriors(Several(), scale=0.2)
    weights = sample_weights(model, 2, seeded())
    pair = normal(5, 3, dtype=torch.float32), normal(5, 2, seed=1, dtype=torch.float32)
    found = export_program(model, tuple(each[:2] for each in pair), weights=weights).module()(*pair)
    expected = predict(model, pair, weights=weights)
    assert set(found) == set(expected)
    for name, values in expected.items():
        close(found[name].detach(), values)


class TestOnnx:
    """Files, read by onnxruntime."""

    @pytest.fixture(autouse=True)
    def packages(self):
        for package in ("onnx", "onnxscript"):
            pytest.importorskip(package, reason=f"{package} is not installed")

    @pytest.mark.parametrize("draws", [None, 3])
    def test_files_give_what_predict_gives(self, tmp_path, draws):
        model = network()
        weights = mean_weights(model) if draws is None else sample_weights(model, draws, seeded())
        path = export_onnx(model, IMAGES, tmp_path / "a" / "network.onnx", draws=draws, generator=seeded())
        expected = predict(model, OTHERS, weights=weights)
        for rows in (7, 1):
            [found] = session(path).run(["y"], {"x": OTHERS[:rows].numpy()})
            close(found, (expected[0] if draws is None else expected)[..., :rows, :])
        assert [each.name for each in path.parent.iterdir()] == ["network.onnx"]

    def test_several_inputs(self, tmp_path):
        model = with_posteriors(Several(), scale=0.2)
        weights = sample_weights(model, 2, seeded())
        pair = normal(5, 3, dtype=torch.float32), normal(5, 2, seed=1, dtype=torch.float32)
        path = export_onnx(model, tuple(each[:2] for each in pair), tmp_path / "network.onnx", weights=weights)
        found = session(path).run(None, {"x0": pair[0].numpy(), "x1": pair[1].numpy()})
        expected = predict(model, pair, weights=weights)
        assert len(found) == 2
        assert any(np.allclose(its, expected["sum"].numpy(), rtol=1e-5, atol=1e-5) for its in found)

    def test_a_file_is_there_whole_or_not_at_all(self, tmp_path, monkeypatch):
        path = tmp_path / "network.onnx"
        path.write_bytes(b"before")
        model = with_posteriors(nn.Sequential(nn.Flatten(), nn.Linear(36, 2)))

        def interrupted(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr(exporting, "_converted", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_onnx(model, IMAGES, path)
        assert path.read_bytes() == b"before" and [each.name for each in tmp_path.iterdir()] == ["network.onnx"]
        with pytest.raises(Refusal, match="name of the file"):
            export_onnx(model, IMAGES, tmp_path)
        monkeypatch.setattr(exporting, "_LIMIT", 10)
        with pytest.raises(Refusal, match="2 GiB"):
            export_onnx(model, IMAGES, path)

    def test_operators_that_onnx_has_not(self, tmp_path):
        class Foreign(nn.Linear):
            def forward(self, x):
                return torch.special.bessel_j0(super().forward(x))

        x = normal(2, 3, dtype=torch.float32)
        with pytest.raises(Refusal, match="operators that ONNX has"):
            export_onnx(with_posteriors(Foreign(3, 2), only=["*"]), x, tmp_path / "network.onnx")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "options", "said"), [
    ((nn.Linear(3, 2), normal(4, 3)), {}, "with_posteriors"),
    ((with_posteriors(nn.Linear(3, 2)), normal(1, 3).float()), {}, "two rows"),
    ((with_posteriors(nn.Linear(3, 2)), {"input": normal(4, 3).float()}), {}, "in the order"),
    ((with_posteriors(nn.Linear(3, 2)), normal(4, 3).float()), {"draws": 0}, "draws"),
    ((with_posteriors(nn.Linear(3, 2)), normal(4, 3).float()), {"draws": 2, "weights": {}}, "both"),
    ((Ensemble([nn.Linear(3, 2)]), normal(4, 3).float()), {"draws": 2}, "members are the samples"),
    ((with_posteriors(Branching(3, 2), only=["*"]), normal(4, 3).float()), {}, "torch.where"),
    ((with_posteriors(nn.Linear(3, 2)), normal(4, 5).float()), {}, "trace"),
])
def test_what_cannot_be_meant_is_refused(arguments, options, said):
    with pytest.raises(Refusal, match=said):
        export_program(*arguments, **options)
