"""Training on targets of every kind: bounds that are known, noise that is learned, targets that move, runs resumed."""
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from helpers import seeded
from helpers_training import press_ctrl_c, same
from symbnn.data.splits import Split
from symbnn.equivariance.symmetric import bayesianize
from symbnn.errors import Refusal
from symbnn.posterior.layers import variational_tensors, with_posteriors
from symbnn.posterior.likelihoods import Bernoulli, Categorical, Poisson
from symbnn.posterior.real_targets import Gaussian, HeteroscedasticGaussian, StudentT
from symbnn.symmetry.actions import natural_action
from symbnn.symmetry.fields import field, rotations
from symbnn.symmetry.hyperoctahedral import Signed
from symbnn.training import state
from symbnn.training.config import TrainingConfig
from symbnn.training.loop import train

X = torch.randn(40, 3, generator=seeded())
IMAGES = torch.randn(12, 1, 4, 4, generator=seeded(1))
REAL = X[:, :1] * 2 + 0.3 * torch.randn(40, 1, generator=seeded(2))
TASKS = {  # likelihood anew for each run, outputs of a linear network, inputs, targets
    "gaussian": (lambda: Gaussian(0.3), 1, X, REAL),
    "learned noise": (lambda: Gaussian(0.5, learn=True), 2, X, torch.cat([REAL, 3 * REAL], 1)),
    "two learned noises": (lambda: Gaussian(torch.ones(2), learn=True), 2, X, torch.cat([REAL, -REAL], 1)),
    "missing": (lambda: Gaussian(0.3, nan_is_missing=True), 1, X, REAL.where(REAL > -1, torch.nan)),
    "student": (lambda: StudentT(0.3, learn=True), 1, X, REAL), "two outputs": (HeteroscedasticGaussian, 2, X, REAL),
    "bernoulli": (Bernoulli, 2, X, (X[:, :2] > 0).float()), "poisson": (Poisson, 1, X, X[:, :1].exp().round()),
    "labels": (Categorical, 3, X, torch.arange(40) % 3),
}
CONFIG = TrainingConfig(epochs=3, batch_size=10, learning_rate=0.05, augmentation="none", device="cpu", draws=2)


def trained(name, config=CONFIG, **options):
    make, outputs, inputs, targets = TASKS[name]
    torch.manual_seed(0)
    network, likelihood = with_posteriors(nn.Linear(inputs.shape[1], outputs)), make()
    data = Split(inputs, targets)
    return train(network, data, config, likelihood=likelihood, validation=data, **options), likelihood


@pytest.mark.parametrize("name", TASKS)
def test_runs_that_are_resumed_are_the_same_to_the_bit(name, tmp_path):
    whole, learned = trained(name)
    halted, _ = trained(name, folder=tmp_path, callbacks=press_ctrl_c(0))
    assert halted.status == "interrupted"
    resumed, again = trained(name, folder=tmp_path, resume=True)
    assert same(whole.network.state_dict(), resumed.network.state_dict())
    assert same(learned.state_dict(), again.state_dict())
    assert [its._replace(seconds=0) for its in whole.history] == [its._replace(seconds=0) for its in resumed.history]
    assert whole.history[-1].elbo > whole.history[0].elbo and math.isfinite(whole.history[-1].validation_nll)


def test_a_run_with_another_likelihood_is_not_gone_on_with(tmp_path):
    trained("gaussian", folder=tmp_path)
    network, data = with_posteriors(nn.Linear(3, 1)), Split(X, REAL)
    for other in (Gaussian(0.4), Gaussian(0.3, learn=True), StudentT(0.3)):
        with pytest.raises(Refusal, match="likelihood"):
            train(network, data, CONFIG, likelihood=other, validation=data, folder=tmp_path, resume=True)


def test_a_noise_that_is_learned_is_the_one_that_made_the_data():
    n, noise = 4000, 0.3
    x = torch.randn(n, 2, generator=seeded())
    y = x @ torch.tensor([[1.0], [-2.0]]) + noise * torch.randn(n, 1, generator=seeded(1))
    likelihood, network = Gaussian(1.0, learn=True), with_posteriors(nn.Linear(2, 1))
    train(network, (x, y), CONFIG, epochs=12, batch_size=100, likelihood=likelihood, schedule="cosine")
    residual = (y - x @ torch.linalg.lstsq(x, y).solution).square().mean().sqrt()  # the maximum of likelihood
    assert abs(likelihood.noise.item() - residual) < 0.005
    assert abs(likelihood.noise.item() - noise) < 4 * noise / math.sqrt(2 * n)


def test_the_bound_of_a_conjugate_model_reaches_its_evidence():
    n, noise, prior = 50, 0.5, 1.0
    x = torch.randn(n, 1, generator=seeded(), dtype=torch.float64)
    y = 0.7 * x + noise * torch.randn(n, 1, generator=seeded(1), dtype=torch.float64)
    network = with_posteriors(nn.Linear(1, 1, bias=False))
    tensor = next(iter(variational_tensors(network).values()))
    prior = tensor.prior.scale.item()
    covariance = noise**2 * torch.eye(n, dtype=torch.float64) + prior**2 * x @ x.T
    evidence = torch.distributions.MultivariateNormal(torch.zeros(n, dtype=torch.float64), covariance).log_prob(y[:, 0])
    likelihood = Gaussian(noise)
    config = replace(CONFIG, epochs=400, batch_size=n, dtype="float64", schedule="cosine", draws=8, estimator="whole")
    train(network, (x, y), config, likelihood=likelihood)
    posterior = tensor.posterior
    m, s = posterior.loc.item(), posterior.scale.item()
    fit = likelihood.log_prob((m * x)[None], y).sum() - n * s**2 * x.square().mean() / (2 * noise**2)  # E theta^2
    bound = (fit - posterior.kl(tensor.prior)).item()
    assert 0 <= evidence.item() - bound < 0.02  # nats, of an optimiser


@pytest.mark.parametrize("augmentation", ["full", "random"])
def test_targets_move_with_their_inputs(augmentation, monkeypatch):
    """A field that commutes with turns is, of every augmented input, that field; only its action on outputs is told."""
    seen, whole = [], state.RunState.parts

    def noted(run, inputs, targets, noise):
        seen.append(torch.equal(targets, inputs.square()))
        return whole(run, inputs, targets, noise)

    monkeypatch.setattr(state.RunState, "parts", noted)
    turn = field(rotations(), (1, 4, 4))
    pair = bayesianize(nn.Conv2d(1, 1, 3, padding=1), turn, (1, 4, 4), output=turn)
    data = Split(IMAGES, IMAGES.square())
    for network, action in ((pair, None), (pair.network, pair.action)):
        train(network, data, CONFIG, epochs=1, augmentation=augmentation, likelihood=Gaussian(0.5), action=action)
    assert all(seen)
    seen.clear()
    train(pair, data, CONFIG, epochs=1, augmentation=augmentation, likelihood=Gaussian(0.5), action=turn)
    assert not all(seen)  # an action on inputs alone says that targets stay


def test_pixels_tokens_and_vectors_are_trained():
    segments = (IMAGES[:, 0] > 0).long()
    segments[0, 0, 0] = -1
    turn = field(rotations(), (1, 4, 4))
    pixels = bayesianize(nn.Conv2d(1, 2, 3, padding=1), turn, (1, 4, 4), output=field(rotations(), (2, 4, 4)))
    tokens = with_posteriors(nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 2)), only=["*"])
    vectors = natural_action(Signed(3))
    moved = bayesianize(nn.Linear(3, 3, bias=False), vectors, output=vectors)
    for network, inputs, targets, likelihood, augmentation in (
        (pixels, IMAGES, segments, Categorical(ignore_index=-1), "full"),
        (tokens, torch.arange(60).reshape(20, 3) % 7, torch.arange(20) % 2, Categorical(), "none"),
        (moved, X, 2 * X, Gaussian(0.3, learn=True), "full"),
    ):
        result = train(network, Split(inputs, targets), CONFIG, likelihood=likelihood, augmentation=augmentation)
        assert result.history[-1].elbo > result.history[0].elbo


@pytest.mark.parametrize(("likelihood", "targets", "said"), [
    (Categorical(), REAL, "one logit for two classes"), (Gaussian(0.3), REAL.expand(40, 2), "shape"),
    (Gaussian(0.3), REAL.log(), "NaN"), (Gaussian(0.3), (REAL > 0).long(), "real numbers"),
    (Bernoulli(), REAL, "targets 0 or 1"), (Poisson(), REAL, "counts"),
    (HeteroscedasticGaussian(), REAL, "even number"),
    ("gaussian", REAL, "Likelihood"), (Gaussian(torch.ones(2)), REAL, "noise of shape"),
])
def test_targets_that_do_not_fit_are_refused_before_work(likelihood, targets, said, tmp_path):
    network = with_posteriors(nn.Linear(3, 1))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(Refusal, match=said):
        train(network, Split(X, targets), CONFIG, likelihood=likelihood, folder=tmp_path / "new")
    assert same(network.state_dict(), before) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["gaussian", "learned noise"])
def test_two_calls_are_one_call(name):
    whole, learned = trained(name)
    make, outputs, inputs, targets = TASKS[name]
    torch.manual_seed(0)
    network, likelihood, data = with_posteriors(nn.Linear(inputs.shape[1], outputs)), make(), Split(inputs, targets)
    options = {"likelihood": likelihood, "validation": data}
    first = train(network, data, CONFIG, until=lambda epochs, network: epochs == 1, **options)
    second = train(network, data, CONFIG, after=first, **options)
    assert same(whole.network.state_dict(), network.state_dict())
    assert same(learned.state_dict(), likelihood.state_dict())
    assert [its.elbo for its in whole.history] == [its.elbo for its in second.history]


def test_the_best_epoch_has_its_noise():
    seen = []
    make, outputs, inputs, targets = TASKS["learned noise"]
    likelihood, network, data = make(), with_posteriors(nn.Linear(3, outputs)), Split(inputs, targets)
    result = train(network, data, CONFIG, likelihood=likelihood, validation=data, select="best", noise_rate=20.0,
                   callbacks=lambda *_: seen.append(likelihood.noise.item()))
    best = min(range(3), key=lambda i: result.history[i].validation_nll)
    assert likelihood.noise.item() == seen[best]
