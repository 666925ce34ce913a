"""The symmetrised objective in the training loop: its value, its gradient, another group, resuming, refusals."""
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from helpers_training import edited_checkpoint
from symbnn.data.splits import Split
from symbnn.errors import Refusal
from symbnn.hidden_units.mutual_information import InformationEstimator, mutual_information
from symbnn.posterior.independent import MeanFieldGaussian
from symbnn.posterior.layers import variational_tensors, with_posteriors
from symbnn.posterior.priors import isotropic, random_means
from symbnn.symmetry.fields import field, flips, rotations
from symbnn.symmetry.networks import network_action, unit_permutations
from symbnn.training.config import TrainingConfig
from symbnn.training.loop import train
from tolerances import assert_close

SETTINGS = TrainingConfig(epochs=1, batch_size=12, augmentation="none", dtype="float64", draws=2,
                          objective="symmetrised", device="cpu", schedule="constant")


def network(prior=None, scale=0.3):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return with_posteriors(plain.double(), MeanFieldGaussian, scale=scale, prior=prior or isotropic(1.0))


def split():
    inputs = torch.randn(12, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Split(inputs, torch.arange(12) % 2)


def trained(config, **options):
    return train(network(), split(), config, **options)


def test_the_reported_divergence_has_the_gain_taken_off():
    plain, gained = (trained(replace(SETTINGS, objective=name)).history[0] for name in ("elbo", "symmetrised"))
    assert_close(gained.expected_log_likelihood, plain.expected_log_likelihood)  # one step, from the same draws
    fresh = network()
    exact = mutual_information(fresh, unit_permutations(fresh, (1, 6, 6)), draws=4000,
                               generator=torch.Generator().manual_seed(2))
    gain = (plain.kl - gained.kl) * 12
    assert 0 < gain <= math.log(24) + 1e-9 and abs(gain - exact.value) < 6 * exact.standard_error * (4000 / 4) ** 0.5
    assert_close(gained.elbo, gained.expected_log_likelihood - gained.kl)


def test_the_gain_is_maximised():
    """With a weight on the divergence that drowns the data, units stay apart only where being apart is paid for."""
    long = replace(SETTINGS, epochs=60, learning_rate=0.03, information_draws=8)
    ends = {}
    for name in ("elbo", "symmetrised"):
        end = trained(replace(long, objective=name)).network
        ends[name] = mutual_information(end, unit_permutations(end, (1, 6, 6)), draws=500,
                                        generator=torch.Generator().manual_seed(3))
    assert ends["symmetrised"].value > ends["elbo"].value + 0.1


def test_another_symmetry_and_its_method():
    model = network()
    turns = network_action(model, field(rotations(), (1, 6, 6)))
    plain = train(network(), split(), replace(SETTINGS, objective="elbo")).history[0]
    found = train(model, split(), replace(SETTINGS, information_method="enumeration"), symmetry=turns).history[0]
    assert 0 < (plain.kl - found.kl) * 12 <= math.log(4) + 1e-9


def test_samples_are_compared_with_as_many_negatives_as_asked():
    """InfoNCE with K elements never gains more than log K, and gains nearly that where units are far apart."""
    plain = train(network(scale=0.01), split(), replace(SETTINGS, objective="elbo")).history[0]
    for negatives in (2, 20):
        settings = replace(SETTINGS, information_method="infonce", information_draws=16, negatives=negatives)
        found = train(network(scale=0.01), split(), settings).history[0]
        gain = (plain.kl - found.kl) * 12
        assert 0.8 * math.log(negatives) < gain <= math.log(negatives) + 1e-9


def test_interrupted_runs_continue(tmp_path):
    once = trained(replace(SETTINGS, epochs=2, information_method="importance"), folder=tmp_path / "a")
    trained(replace(SETTINGS, information_method="importance"), folder=tmp_path / "b")
    twice = trained(replace(SETTINGS, epochs=2, information_method="importance"), folder=tmp_path / "b", resume=True)
    for one, two in zip(once.network.parameters(), twice.network.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_run_is_not_continued_under_another_symmetry(tmp_path):
    turns, mirrored = (network_action(network(), field(space, (1, 6, 6))) for space in (rotations(), flips()))

    def go_on(folder, epochs=2, config=SETTINGS, **options):
        config = replace(config, epochs=epochs, information_method="enumeration")
        return trained(config, folder=tmp_path / folder, resume=True, **options)

    def forget(folder):
        edited_checkpoint(tmp_path / folder, lambda description, tensors: description.pop("symmetry"))

    start = replace(SETTINGS, information_method="enumeration")
    trained(start, folder=tmp_path / "turns", symmetry=turns)
    for other in (None, mirrored):
        with pytest.raises(Refusal, match=r"symmetry .NetworkAction.* in the checkpoint, (None|.NetworkAction.*) now"):
            go_on("turns", symmetry=other)
    assert len(go_on("turns", symmetry=turns).history) == 2
    trained(start, folder=tmp_path / "units")
    with pytest.raises(Refusal, match="symmetry None in the checkpoint"):
        go_on("units", symmetry=turns)
    forget("units")  # as written before symmetries were stored
    assert len(go_on("units").history) == 2
    with pytest.raises(Refusal, match="symmetry None in the checkpoint"):
        go_on("units", epochs=3, symmetry=turns)
    plain = replace(start, objective="elbo")  # no symmetry is in it
    trained(plain, folder=tmp_path / "plain", symmetry=turns)
    assert len(go_on("plain", config=plain, symmetry=mirrored).history) == 2


def test_a_network_that_takes_over_is_asked_about_itself():
    second = network(scale=0.5)
    config = replace(SETTINGS, epochs=2)
    first = trained(config, until=lambda epochs, net: epochs == 1)
    first.optimizer.state.clear()
    result = train(second, split(), config, after=first)
    assert result.network is second
    fresh = InformationEstimator(network(scale=0.5), unit_permutations(second, (1, 6, 6)))
    assert fresh.classes and result.history[1].kl > 0
    assert any(tensor.posterior.loc.grad is not None for tensor in variational_tensors(second).values())


def test_refusals_come_before_the_first_step():
    with pytest.raises(Refusal, match="prior"):
        train(network(prior=random_means(0)), split(), SETTINGS)
    with pytest.raises(Refusal, match="as objective"):
        replace(SETTINGS, objective="symmetrical")
    with pytest.raises(Refusal, match="as information"):
        replace(SETTINGS, information_method="guess")
    with pytest.raises(Refusal, match="at least 2 as negatives"):
        replace(SETTINGS, information_method="infonce", negatives=1)
    with pytest.raises(Refusal, match="information_draws"):
        replace(SETTINGS, information_draws=0)
