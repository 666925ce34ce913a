"""Settings: what cannot be meant is refused, keywords and dataclass agree, old names are read; the optimiser."""
import inspect
import json
import math
from dataclasses import asdict, fields, replace
from typing import get_type_hints

import pytest
import torch

from helpers_data import typed
from helpers_training import CONFIG, DATA, network, run, same, tensors
from symbnn.errors import Refusal
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.layers import variational_tensors
from symbnn.training.config import RENAMED, TrainingConfig, TrainingSettings, make_optimizer
from symbnn.training.loop import train


@pytest.mark.parametrize("change", [
    {"epochs": 0}, {"epochs": 1.5}, {"batch_size": -1}, {"draws": 0}, {"draws": 17}, {"estimator": "vmap"},
    {"optimizer": "adam"}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}, {"learning_rate": "fast"},
    {"scale_rate": -1.0}, {"weight_decay": -0.1}, {"schedule": "linear"}, {"kl_weight": -1.0}, {"clip_norm": 0.0},
    {"kl_annealing": -1}, {"kl_annealing": 5}, {"kl_annealing": 0.5},
    {"augmentation": "some"}, {"seed": -1}, {"seed": 0.5}, {"dtype": "float16"}, {"learning_rate": True},
    {"evaluate_every": 0},
    {"evaluation_draws": 0}, {"select": "first"}, {"device": 3},
    {"seed": 2**63}, {"seed": 2**64}, {"epochs": 10**30}, {"batch_size": 10**30},
    {"draws": 2**40, "estimator": "whole"},
    {"evaluation_draws": 10**30}, {"negatives": 10**30}, {"kl_annealing": 10**30}, {"evaluate_every": 10**30},
    {"learning_rate": 10**400}, {"learning_rate": 1e300}, {"scale_rate": math.inf}, {"weight_decay": 10**400},
    {"kl_weight": math.inf}, {"kl_weight": 1e39}, {"clip_norm": math.nan},
], ids=str)
def test_settings_that_cannot_be_meant(change):
    with pytest.raises(Refusal, match=next(iter(change)).split("_")[0]) as caught:
        TrainingConfig(**asdict(CONFIG) | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [
    {"epochs": 0}, {"batch_size": 2.0}, {"learning_rate": -1.0}, {"weight_decay": "none"}, {"clip_norm": 0.0},
    {"kl_annealing": 9}, {"kl_annealing": 0.5}, {"draws": 17}, {"seed": -1},
], ids=str)
def test_the_advice_on_settings_works(change):
    with pytest.raises(Refusal) as caught:
        replace(CONFIG, **change)
    advice = caught.value.fix.split(", or ")[0]
    assert advice.startswith(next(iter(change)))
    replace(CONFIG, **typed(f"dict({advice})"))


def test_a_device_that_is_no_name():
    with pytest.raises(Refusal, match='device="cpu"'):
        TrainingConfig(device=torch.device("cpu"))


def test_the_keywords_are_the_fields():
    """The two lists of settings agree in names, types and order; no setting but `objective`, a function at times, is
    an argument of `train`."""
    wanted = [pair for pair in get_type_hints(TrainingConfig).items() if pair[0] != "objective"]
    assert list(get_type_hints(TrainingSettings).items()) == wanted
    assert TrainingSettings.__required_keys__ == frozenset()
    arguments = {name for name in inspect.signature(train).parameters if name != "settings"}
    assert arguments & {field.name for field in fields(TrainingConfig)} == {"objective"}


def test_settings_are_given_as_keywords():
    wanted = tensors(run())
    keywords = {name: value for name, value in asdict(CONFIG).items() if value != getattr(TrainingConfig(), name)}
    assert len(keywords) > 3
    assert same(tensors(run(None, **keywords)), wanted)
    other = replace(CONFIG, seed=8, epochs=1)
    found = run(other, seed=CONFIG.seed, epochs=CONFIG.epochs)  # keywords replace what the configuration says
    assert same(tensors(found), wanted)
    assert (other.seed, other.epochs) == (8, 1)


@pytest.mark.parametrize("settings, advice", [
    ({"learnig_rate": 0.01}, "learning_rate=0.01"), ({"epoch": 3}, "epochs=3"), ({"batchsize": 8}, "batch_size=8"),
    ({"precision": "float64"}, "dtype='float64'"), ({"kl_warm_up": 2}, "kl_annealing=2"),
    ({"valdation": None}, "validation=None"), ({"zzz": 1}, "TrainingConfig(), whose fields are the settings"),
])
def test_settings_that_there_are_not_are_refused_with_the_nearest(settings, advice):
    with pytest.raises(Refusal) as caught:
        run(CONFIG, **settings)
    assert caught.value.fix == advice
    assert caught.value.got.startswith(next(iter(settings)))


def test_a_keyword_that_cannot_be_meant_is_refused_before_work():
    with pytest.raises(Refusal, match=r"as learning_rate.*-1"):
        run(CONFIG, learning_rate=-1.0)


def test_settings_of_earlier_versions_are_read():
    today = asdict(replace(CONFIG, dtype="float64", kl_annealing=2))
    names = {new: old for old, new in RENAMED.items()}
    old = json.loads(json.dumps({names.get(name, name): value for name, value in today.items()}))
    assert {"precision", "kl_warm_up"} <= old.keys() and not {"dtype", "kl_annealing"} & old.keys()
    assert TrainingConfig.from_dict(old) == TrainingConfig.from_dict(today) == TrainingConfig(**today)
    assert TrainingConfig.from_dict({}) == TrainingConfig()
    assert TrainingConfig.from_dict({"estimator": "shared"}).estimator == "whole"
    with pytest.raises(Refusal, match="epochs=3"):
        TrainingConfig.from_dict({"epoch": 3})


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
    run(replace(config, schedule="cosine", epochs=2), callbacks=lambda end: rates.append(
        [group["lr"] for group in end.optimizer.param_groups]))
    steps = math.ceil(4 * len(DATA) / config.batch_size)
    for epoch in range(2):
        factor = (1 + math.cos(math.pi * ((epoch + 1) * steps - 1) / (2 * steps))) / 2
        assert rates[epoch] == pytest.approx([1e-2 * factor, 1e-1 * factor])
