"""The estimators of scikit-learn: its own checks, pipelines, searches, copies, uncertainty."""
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from symbnn.adapters.scikit_learn import BayesianClassifier, BayesianRegressor
from symbnn.errors import Refusal
from symbnn.symmetry.fields import field, rotations

QUICK = {"hidden": (8,), "epochs": 30, "learning_rate": 0.03, "draws": 8, "random_state": 0}
X = np.random.default_rng(0).normal(size=(60, 3))
LABELS = np.where(X[:, 0] > 0, "up", "down")
NUMBERS = 100 + 20 * X[:, 0] + np.random.default_rng(1).normal(size=60)

pytestmark = pytest.mark.filterwarnings("ignore::symbnn.data.splits.OddData")  # that the checks of scikit-learn bring


@parametrize_with_checks([BayesianClassifier(**QUICK), BayesianRegressor(**QUICK)])
def test_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


def test_a_fit_is_a_function_of_its_random_state():
    first, second = (BayesianClassifier(**QUICK).fit(X, LABELS).predict_proba(X) for _ in range(2))
    before = torch.get_rng_state()
    other = BayesianClassifier(**{**QUICK, "random_state": 1}).fit(X, LABELS).predict_proba(X)
    assert np.array_equal(first, second) and not np.array_equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    generator = np.random.RandomState(0)
    drawn = [BayesianClassifier(**{**QUICK, "random_state": generator}).fit(X, LABELS).seed_ for _ in range(2)]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("estimator", [BayesianClassifier(**QUICK), BayesianRegressor(**QUICK)])
def test_copies(estimator):
    y = LABELS if isinstance(estimator, BayesianClassifier) else NUMBERS
    fitted = estimator.fit(X, y)
    again = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(again.predict(X), fitted.predict(X))
    assert clone(fitted).get_params() == fitted.get_params()
    with pytest.raises(NotFittedError):
        clone(fitted).predict(X)


def test_pipelines_and_searches():
    pipeline = make_pipeline(StandardScaler(), BayesianRegressor(**QUICK))
    assert cross_val_score(pipeline, X, NUMBERS, cv=3).min() > 0.8
    search = GridSearchCV(BayesianClassifier(**QUICK), {"hidden": [(), (8,)]}, cv=2).fit(X, LABELS)
    assert search.best_score_ > 0.85 and search.best_params_["hidden"] in ((), (8,))


def test_a_regressor_knows_its_uncertainty_in_the_units_of_its_targets():
    model = BayesianRegressor(**QUICK | {"epochs": 200, "draws": 64}).fit(X, NUMBERS)
    mean, std = model.predict(X, return_std=True)
    assert np.array_equal(mean, model.predict(X)) and std.shape == mean.shape == (60,)
    assert 0.7 < float(model.noise_) < 3 and (std > float(model.noise_)).all()
    covered = np.abs(NUMBERS - mean) < 1.645 * std
    assert covered.mean() > 0.8
    far = model.predict(100 * X, return_std=True)[1]
    assert far.mean() > 5 * std.mean()
    scaled = BayesianRegressor(**QUICK | {"epochs": 200, "draws": 64}).fit(X, 1000 * NUMBERS - 7)
    found = scaled.predict(X, return_std=True)
    np.testing.assert_allclose(found[0], 1000 * mean - 7, rtol=1e-6)
    np.testing.assert_allclose(found[1], 1000 * std, rtol=1e-5)


def test_several_targets_have_each_their_noise():
    y = np.stack([NUMBERS, 0.01 * NUMBERS[::-1]], 1)
    model = BayesianRegressor(**QUICK).fit(X, y)
    mean, std = model.predict(X, return_std=True)
    assert mean.shape == std.shape == (60, 2) and model.noise_.shape == (2,)
    assert std[:, 0].mean() > 10 * std[:, 1].mean()


@pytest.mark.parametrize("network", [
    nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), lambda columns, outputs: nn.Sequential(nn.Flatten(), nn.Linear(
        columns, outputs)),
])
def test_networks_of_ones_own_take_inputs_of_any_shape(network):
    images = np.random.default_rng(0).random((40, 1, 4, 4)).astype(np.float32)
    labels = np.arange(40) % 2
    images += labels[:, None, None, None]
    before = [p.clone() for p in network.parameters()] if isinstance(network, nn.Module) else []
    model = BayesianClassifier(network, epochs=60, learning_rate=0.05, random_state=0).fit(images, labels)
    assert model.score(images, labels) > 0.9
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters() if before else []))
    regressor = BayesianRegressor(lambda columns, outputs: nn.Sequential(nn.Flatten(), nn.Linear(columns, outputs)),
                                  epochs=60, learning_rate=0.05, random_state=0)
    assert regressor.fit(images, 10.0 * labels).score(images, 10.0 * labels) > 0.5


@pytest.mark.parametrize(("options", "said"), [
    ({"family": "cauchy"}, "family"), ({"epochs": 0}, "epochs"), ({"learning_rate": -1}, "learning_rate"),
    ({"settings": {"learnig_rate": 1}}, "learning_rate"), ({"prior_scale": -1.0}, "scale"),
    ({"settings": {"seed": 3}}, "random_state=3"), ({"settings": {"epochs": 3, "draws": 2}}, "epochs=3 in its place"),
    ({"settings": {"likelihood": None}}, "the likelihood of"), ({"action": "rotations"}, "rotations()"),
])
def test_settings_that_cannot_be_meant_are_refused(options, said):
    with pytest.raises(Refusal, match=said):
        BayesianClassifier(**QUICK | options).fit(X, LABELS)


def test_an_action_augments():
    images = np.random.default_rng(0).random((40, 1, 4, 4)).astype(np.float32)
    images[:20, :, 0] += 2  # bright at the top, or not
    labels, turned = np.arange(40) < 20, np.rot90(images, 2, (2, 3)).copy()

    def made(action):
        return BayesianClassifier(lambda columns, outputs: nn.Sequential(
            nn.Flatten(), nn.Linear(columns, 16), nn.ReLU(), nn.Linear(16, outputs)), epochs=80, learning_rate=0.02,
            random_state=0, action=action)

    plain, augmented = made(None).fit(images, labels), clone(made(rotations())).fit(images, labels)
    assert plain.score(images, labels) > 0.9 and plain.score(turned, labels) < 0.8
    assert augmented.score(images, labels) > 0.9 and augmented.score(turned, labels) > 0.9
    same = made(field(rotations(), (1, 4, 4))).fit(images, labels)
    assert np.array_equal(same.predict_proba(images), augmented.predict_proba(images))
    regressor = BayesianRegressor(lambda columns, outputs: nn.Sequential(nn.Flatten(), nn.Linear(columns, outputs)),
                                  epochs=3, random_state=0, action=rotations()).fit(images, labels * 1.0)
    assert regressor.predict(images).shape == (40,)
