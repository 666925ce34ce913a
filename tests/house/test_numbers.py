"""Numbers that nobody means, through the whole face: each is refused before any work, whatever Python makes of it."""
import time

import pytest
import torch
from torch import nn

import symbnn as sb
from symbnn.data.batches import batches
from symbnn.data.splits import split_training
from symbnn.data.transforms import vary
from symbnn.errors import Refusal
from symbnn.posterior.priors import fixed_means
from symbnn.posterior.sampling import forward, sample_weights
from symbnn.studies.evaluations import Evaluation
from symbnn.studies.grids import Comparison
from symbnn.studies.methods import LearnedPrecisions
from symbnn.studies.tasks import Setup, evaluate_task, prepare

plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 3))
pair = sb.bayesianize(plain, sb.flips(), (1, 8, 8))
network, x, y = pair.network, torch.rand(6, 1, 8, 8), torch.arange(6) % 3
data, units = sb.Split(x, y), sb.unit_permutations(pair.network, (1, 8, 8))
points = sb.bayesianize(sb.relaxed_network("FC+CONV", (1, 8, 8), 3, (2,), (1,)), family=sb.PointMass)
digits = sb.load("digits", train_size=50)
ENDLESS = pytest.param(10**5000, id="endless")  # more digits than Python prints


def training(**settings):
    return sb.train(network, data, **{"epochs": 1, "batch_size": 8} | settings)


SEEDS = {
    "load": lambda n: sb.load("digits", seed=n), "split": lambda n: split_training(data, seed=n),
    "vary": lambda n: vary(digits, "turned", seed=n), "train": lambda n: training(seed=n),
    "evaluate": lambda n: sb.evaluate(pair, data, seed=n), "random_means": lambda n: sb.random_means(n),
    "laplace": lambda n: sb.laplace(points, x, y, seed=n), "comparison": lambda n: Comparison(seeds=(0, n)).study(),
    "task": lambda n: evaluate_task(network, prepare(Setup()), seed=n),
}
COUNTS = {
    "train size": lambda n: sb.load("digits", train_size=n), "samples": lambda n: sample_weights(network, n),
    "validation": lambda n: sb.load("digits", validation_size=n), "predict": lambda n: sb.predict(network, x, draws=n),
    "split": lambda n: forward(network, x, n, "split"), "flipout": lambda n: forward(network, x, n, "flipout"),
    "orbit": lambda n: sb.orbit_predictions(network, x, pair.action, n),
    "orbit batch": lambda n: sb.orbit_predictions(network, x, pair.action, 2, batch_size=n),
    "mutual information": lambda n: sb.mutual_information(network, units, draws=n),
    "negatives": lambda n: sb.mutual_information(network, units, draws=2, method="infonce", K=n),
    "laplace": lambda n: sb.laplace(points, x, y, batch_size=n), "batches": lambda n: batches(data, n),
    "channels": lambda n: sb.relaxed_network("FC+CONV", (1, 8, 8), 2, (n,), (1,)),
    "classes": lambda n: sb.relaxed_network("FC+CONV", (1, 8, 8), n, (2,), (1,)),
    "strides": lambda n: sb.relaxed_network("FC+CONV", (1, 8, 8), 2, (2,), (n,)),
    "pixels": lambda n: sb.relaxed_network("FC+CONV", (1, n, n), 2, (2,), (1,)),
    "field": lambda n: sb.field(sb.flips(), (1, n, n)), "size": lambda n: vary(digits, "turned", n),
    "setup": lambda n: prepare(Setup(channels=(n,))), "setup size": lambda n: prepare(Setup(size=n)),
    "evaluation": lambda n: Evaluation(images=n), "sweep": lambda n: Evaluation(sweep=(n,)),
    "repeats": lambda n: Evaluation(repeats=n), "information": lambda n: Evaluation(information=n),
    "small epochs": lambda n: Comparison(small_epochs=n), "precisions": lambda n: LearnedPrecisions(every=n),
    "images": lambda n: evaluate_task(network, prepare(Setup()), images=n),
    "epochs": lambda n: training(epochs=n), "draws": lambda n: training(draws=n),
    "rows": lambda n: training(batch_size=n), "evaluation draws": lambda n: training(evaluation_draws=n),
    "evaluations": lambda n: training(evaluate_every=n),
}
BYTES = {
    "orbit": lambda n: sb.orbit_predictions(network, x, pair.action, 2, memory=n),
    "predict": lambda n: sb.predict(network, x, draws=2, memory=n),
    "laplace": lambda n: sb.laplace(points, x, y, memory_limit=n),
    "data": lambda n: sb.elbo(network, forward(network, x), y, num_data=n),
}
SCALES = {
    "isotropic": sb.isotropic, "per tensor": sb.per_tensor, "bias": lambda s: sb.per_tensor(1.0, s),
    "spread": lambda s: sb.random_means(0, s), "fixed": lambda s: fixed_means({}, s), "noise": sb.Gaussian,
    "gaussian": lambda s: sb.bayesianize(plain, scale=s), "setup": lambda s: Setup(prior_scale=s),
    "log-normal": lambda s: sb.bayesianize(plain, scale=s, family=sb.LogNormal),
    "full": lambda s: sb.bayesianize(nn.Linear(3, 2), scale=s, family=sb.FullGaussian),
    "block": lambda s: sb.bayesianize(nn.Linear(3, 2), scale=s, family=sb.BlockGaussian),
    "start": lambda s: Setup(initial_scale=s), "rate": lambda s: training(learning_rate=s),
    "scale rate": lambda s: training(scale_rate=s), "decay": lambda s: training(weight_decay=s),
    "beta": lambda s: training(kl_weight=s), "clip": lambda s: training(clip_norm=s),
    "expanded rate": lambda s: Comparison(expanded_learning_rate=s),
    "kl": lambda s: sb.elbo(network, forward(network, x), y, num_data=6, kl_weight=s),
}


def refuses(call, value) -> None:
    started = time.perf_counter()
    with pytest.raises(Refusal) as caught:
        call(value)
    assert len(str(caught.value)) < 1000 and time.perf_counter() - started < 5


@pytest.mark.parametrize("value", [-1, 2**63, 2**64, 10**30, ENDLESS, 1.5, float("inf")])
@pytest.mark.parametrize("call", SEEDS.values(), ids=SEEDS)
def test_seeds(call, value):
    refuses(call, value)


@pytest.mark.parametrize("value", [-1, 2**40, 2**64, 10**30, ENDLESS, 1.5, float("inf"), float("nan")])
@pytest.mark.parametrize("call", COUNTS.values(), ids=COUNTS)
def test_counts_and_sizes(call, value):
    refuses(call, value)


@pytest.mark.parametrize("value", [-1, 0, 2**63, ENDLESS, float("inf"), float("nan")])
@pytest.mark.parametrize("call", BYTES.values(), ids=BYTES)
def test_numbers_of_64_bits(call, value):
    refuses(call, value)


@pytest.mark.parametrize("value", [-1.0, 1e39, 1e300, float("inf"), float("nan"), 10**400, ENDLESS, "1"])
@pytest.mark.parametrize("call", SCALES.values(), ids=SCALES)
def test_scales_and_rates(call, value):
    refuses(call, value)


@pytest.mark.parametrize("draws", [2**31 - 1, 2**30])
def test_samples_beyond_memory(draws):
    wide = sb.bayesianize(nn.Linear(1000, 1000))
    for call in (lambda: sample_weights(wide, draws), lambda: forward(wide, torch.rand(2, 1000), draws)):
        with pytest.raises(Refusal, match="samples of 1,001,000 weights of at most"):
            call()
