"""The module for Lightning: the loss and the runs of `train`, checkpoints, what it refuses."""
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import normal, seeded
from helpers_adapters import stand_in_for_torchvision
from symbnn.data.splits import Split
from symbnn.equivariance.symmetric import bayesianize
from symbnn.errors import Refusal
from symbnn.posterior.elbo import ELBO
from symbnn.posterior.layers import kl_per_datum, with_posteriors
from symbnn.posterior.likelihoods import Categorical
from symbnn.posterior.real_targets import Gaussian
from symbnn.posterior.sampling import forward, predict
from symbnn.symmetry.actions import natural_action
from symbnn.symmetry.fields import rotations
from symbnn.symmetry.hyperoctahedral import Signed
from symbnn.training.loop import train
from symbnn.training.objectives import evidence_bound
from symbnn.training.state import predictive_nll

with stand_in_for_torchvision():
    pytest.importorskip("lightning", reason="lightning is not installed")

    from lightning import Trainer, seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint

    from symbnn.adapters.lightning_module import BayesianModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning's own use of torch
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode"),  # which `train` puts in training mode, too
]
INPUTS = normal(24, 1, 4, 4, dtype=torch.float32)
LABELS = torch.arange(24) % 3
NUMBERS = normal(24, 2, seed=1, dtype=torch.float32)


def plain(outputs=3, dropout=False):
    torch.manual_seed(0)
    middle = [nn.Dropout(0.5)] if dropout else []
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), *middle, nn.Linear(5, outputs))


def loader(targets=LABELS, batch_size=8):
    return DataLoader(TensorDataset(INPUTS, targets), batch_size=batch_size)


def trainer(epochs=3, **options):
    return Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
                   enable_model_summary=False, **{"enable_checkpointing": False, **options})


def fitted(module, targets=LABELS, epochs=3, validation=None, **options):
    run = trainer(epochs, **options)
    run.fit(module, loader(targets), validation)
    return run


def equal(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


SETTINGS = [
    {}, {"estimator": "whole", "draws": 2}, {"estimator": "local"}, {"estimator": "flipout", "draws": 2},
    {"kl_annealing": 2}, {"kl_weight": 0.3, "seed": 5}, {"optimizer": "sgd", "weight_decay": 0.1},
    {"schedule": "cosine", "scale_rate": 0.5}, {"objective": "symmetrised"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_run_is_that_of_train_to_the_bit(settings):
    ours, theirs = with_posteriors(plain()), with_posteriors(plain())
    how = {"learning_rate": 0.05, "draws": 4, **settings}
    result = train(ours, loader(), epochs=3, device="cpu", augmentation="none", **how)
    module = BayesianModule(theirs, num_data=24, **how)
    run = fitted(module)
    assert equal(ours, theirs) and not equal(ours, with_posteriors(plain()))
    for name in ("elbo", "expected_log_likelihood", "kl"):
        assert float(run.callback_metrics[name]) == pytest.approx(getattr(result.history[-1], name), rel=1e-5)


def test_dropout_and_a_network_in_evaluation_mode():
    for evaluating in (False, True):
        ours, theirs = (with_posteriors(plain(dropout=True)).train(not evaluating) for _ in range(2))
        train(ours, loader(), epochs=2, device="cpu", augmentation="none", draws=4)
        fitted(BayesianModule(theirs, num_data=24, draws=4), epochs=2)
        assert equal(ours, theirs) and theirs.training != evaluating


def test_what_a_likelihood_learns():
    ours, theirs = (with_posteriors(plain(2)) for _ in range(2))
    first, second = Gaussian(1.0, learn=True), Gaussian(1.0, learn=True)
    how = {"draws": 4, "learning_rate": 0.05, "noise_rate": 2.0}
    train(ours, loader(NUMBERS), likelihood=first, epochs=3, device="cpu", augmentation="none", **how)
    fitted(BayesianModule(theirs, num_data=24, likelihood=second, **how), NUMBERS)
    assert equal(ours, theirs) and equal(first, second) and second.noise.item() != 1.0


def test_an_objective_of_ones_own():
    def half(step):
        found = evidence_bound(step)
        return ELBO(found.expected_log_likelihood, found.kl, found.elbo / 2)

    ours, theirs = with_posteriors(plain()), with_posteriors(plain())
    how = {"draws": 4, "optimizer": "sgd", "learning_rate": 0.05}
    train(ours, loader(), objective=half, epochs=2, device="cpu", augmentation="none", **how)
    fitted(BayesianModule(theirs, num_data=24, objective=half, **how), epochs=2)
    assert equal(ours, theirs)


def test_random_augmentation_of_a_pair_is_that_of_train():
    ours, theirs = (bayesianize(plain(), rotations(), (1, 4, 4)) for _ in range(2))
    train(ours, loader(), epochs=2, device="cpu", augmentation="random", draws=4, learning_rate=0.05)
    fitted(BayesianModule(theirs, num_data=24, draws=4, learning_rate=0.05), epochs=2)
    assert equal(ours.network, theirs.network)


@pytest.mark.parametrize("augmentation", ["full", "random"])
def test_a_batch_is_moved_with_its_targets(augmentation):
    points = natural_action(Signed(2))
    pair = bayesianize(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)), points, output=points)
    seen = []

    def noting(step):
        seen.append(step)
        return evidence_bound(step)

    module = BayesianModule(pair, num_data=10, likelihood=Gaussian(1.0), objective=noting, augmentation=augmentation)
    inputs, targets = normal(5, 2, dtype=torch.float32), normal(5, 2, seed=1, dtype=torch.float32)
    module.bound((inputs, targets))
    [step] = seen
    elements = list(pair.group.elements())
    every = {g: (points.act(g, inputs), points.act(g, targets)) for g in elements}
    if augmentation == "full":
        assert step.num_data == 10 * 8
        assert torch.equal(step.inputs, torch.cat([every[g][0] for g in elements]))
        assert torch.equal(step.targets, torch.cat([every[g][1] for g in elements]))
        return
    assert step.num_data == 10
    used = [next(k for k, g in enumerate(elements) if torch.equal(every[g][0][row], step.inputs[row])
                 and torch.equal(every[g][1][row], step.targets[row])) for row in range(5)]
    assert len(set(used)) > 1


def test_the_loss_is_the_elbo_of_the_batch():
    network = with_posteriors(plain())
    module = BayesianModule(network, num_data=24, estimator="whole", draws=64, kl_weight=0.5)
    found = module.bound((INPUTS, LABELS))
    torch.testing.assert_close(found.kl, kl_per_datum(network, 24))
    torch.testing.assert_close(found.elbo, found.expected_log_likelihood - 0.5 * found.kl)
    with torch.no_grad():
        values = Categorical().log_prob(forward(network, INPUTS, 4096, generator=seeded()), LABELS).mean(1)
    error = float(values.std()) * math.sqrt(1 / 64 + 1 / 4096)
    assert abs(float(found.expected_log_likelihood.detach() - values.mean())) < 4 * error
    again = module.bound({"image": INPUTS, "label": LABELS})
    assert torch.equal(found.elbo, again.elbo) and not torch.equal(found.elbo, module.bound((INPUTS, LABELS), 1).elbo)


def test_validation_is_that_of_train():
    network, split = with_posteriors(plain(), scale=0.3), Split(INPUTS, LABELS)
    result = train(network, split, validation=split, epochs=1, batch_size=8, draws=4, device="cpu", augmentation="none")
    module = BayesianModule(network, num_data=24, draws=4)
    [found] = trainer().validate(module, loader(batch_size=7), verbose=False)
    assert found["validation_nll"] == pytest.approx(result.history[-1].validation_nll, rel=1e-5)
    [tested] = trainer().test(module, loader(batch_size=24), verbose=False)
    assert tested["test_nll"] == pytest.approx(found["validation_nll"], rel=1e-5)
    several = predictive_nll(network, split, 256, seeded())
    assert abs(several - found["validation_nll"]) < 0.1


class Two(nn.Module):
    """An image and a row of it."""

    def __init__(self):
        super().__init__()
        self.image, self.row = nn.Linear(16, 3), nn.Linear(4, 3)

    def forward(self, image, row):
        return self.image(image.flatten(1)) + self.row(row)


def test_several_inputs_of_a_loader():
    torch.manual_seed(0)
    ours, theirs = (with_posteriors(net, scale=0.3) for net in [Two()] for _ in range(2))
    items = DataLoader([((x, x[0, 0]), int(y)) for x, y in zip(INPUTS, LABELS)], batch_size=8)
    train(ours, items, epochs=2, draws=2, learning_rate=0.01, device="cpu", augmentation="none")
    trainer(2).fit(BayesianModule(theirs, num_data=24, draws=2, learning_rate=0.01), items)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


def test_predictions():
    network = with_posteriors(plain(), scale=0.3)
    module = BayesianModule(network, num_data=24, evaluation_draws=8)
    outputs = module(INPUTS)
    assert outputs.shape == (8, 24, 3) and not outputs.requires_grad
    for rows in (loader(), DataLoader(INPUTS, 8)):
        found = torch.cat(trainer().predict(module, rows))
        torch.testing.assert_close(found, outputs.softmax(-1).mean(0))
    fresh = predict(network, INPUTS, draws=2048, generator=seeded()).softmax(-1).mean(0)
    assert (found - fresh).abs().mean() < 0.1


def test_checkpoints_of_lightning(tmp_path):
    likelihood = Gaussian(1.0, learn=True)
    module = BayesianModule(with_posteriors(plain(2)), num_data=24, likelihood=likelihood, draws=4, learning_rate=0.05)
    run = fitted(module, NUMBERS)
    run.save_checkpoint(tmp_path / "run.ckpt")
    again = BayesianModule.load_from_checkpoint(tmp_path / "run.ckpt", network=with_posteriors(plain(2)),
                                                likelihood=Gaussian(1.0, learn=True))
    assert equal(module, again) and again.config == module.config and again.num_data == 24
    assert again.likelihood.noise.item() != 1.0
    other = BayesianModule.load_from_checkpoint(tmp_path / "run.ckpt", network=with_posteriors(plain(2)),
                                                likelihood=Gaussian(1.0, learn=True), draws=2)
    assert other.config.draws == 2
    with pytest.raises(RuntimeError, match="Error"):
        BayesianModule.load_from_checkpoint(tmp_path / "run.ckpt", network=with_posteriors(plain(3)),
                                            likelihood=Gaussian(1.0, learn=True))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_that_is_resumed_is_the_same_run(tmp_path):
    how = {"num_data": 24, "draws": 4, "learning_rate": 0.05, "kl_annealing": 3, "schedule": "cosine"}
    whole = with_posteriors(plain())

    def saving(name):
        return {"enable_checkpointing": True,
                "callbacks": [ModelCheckpoint(tmp_path / name, save_top_k=-1, filename="{epoch}")]}

    fitted(BayesianModule(whole, **how), epochs=4, **saving("whole"))
    later = with_posteriors(plain())
    seed_everything(99, verbose=False)
    path = tmp_path / "whole" / "epoch=1.ckpt"
    trainer(4, **saving("later")).fit(BayesianModule(later, **how), loader(), ckpt_path=path)
    assert equal(whole, later)


def test_lower_precision_is_for_the_outputs_alone():
    kinds = []

    def noting(step):
        kinds.append((step.outputs.dtype, torch.is_autocast_enabled("cpu")))
        return evidence_bound(step)

    fitted(BayesianModule(with_posteriors(plain()), num_data=24, draws=4, objective=noting), epochs=1,
           precision="bf16-mixed")
    assert set(kinds) == {(torch.float32, False)}
    module = BayesianModule(with_posteriors(plain()), num_data=24, draws=4)
    fitted(module, epochs=1, precision="64-true")
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float64}


@pytest.mark.parametrize(("arguments", "settings", "said"), [
    ((plain(), 24), {}, "with_posteriors"), ((with_posteriors(plain()), 0), {}, "num_data"),
    ((with_posteriors(plain()), 24), {"epochs": 3}, "max_epochs"),
    ((with_posteriors(plain()), 24), {"dtype": "float64"}, "precision"),
    ((with_posteriors(plain()), 24), {"learnig_rate": 0.1}, "learning_rate"),
    ((with_posteriors(plain()), 24), {"augmentation": "full"}, "Symmetric"),
    ((with_posteriors(plain()), 24), {"likelihood": "gaussian"}, "Gaussian"),
    ((with_posteriors(plain()), 24), {"objective": "elbow"}, "objective"),
])
def test_what_cannot_be_meant_is_refused(arguments, settings, said):
    with pytest.raises(Refusal, match=said):
        BayesianModule(*arguments, **settings)


def test_batches_that_do_not_fit_are_refused():
    module = BayesianModule(with_posteriors(plain()), num_data=24, draws=4)
    with pytest.raises(Refusal, match="TensorDataset"):
        trainer().fit(module, DataLoader(INPUTS, batch_size=8))
    with pytest.raises(Refusal, match="one integer label"):
        trainer().fit(module, loader(LABELS + 1))
    pair = BayesianModule(bayesianize(plain(), rotations(), (1, 4, 4)), num_data=24)
    with pytest.raises(Refusal, match="augmentation"):
        pair.bound(({"input": INPUTS}, LABELS))


def test_parameters_that_are_no_longer_finite_are_refused():
    module = BayesianModule(with_posteriors(plain()), num_data=24, draws=4, learning_rate=1e38, optimizer="sgd")
    with pytest.raises(Refusal, match="learning_rate=1e\\+37"):
        fitted(module)


def test_lengths_that_are_not_known_are_refused():
    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            return zip(INPUTS, LABELS)

    module = BayesianModule(with_posteriors(plain()), num_data=24, draws=4, kl_annealing=1)
    with pytest.raises(Refusal, match="limit_train_batches"):
        trainer().fit(module, DataLoader(Rows(), batch_size=8))
    module = BayesianModule(with_posteriors(plain()), num_data=24, draws=4, schedule="cosine")
    with pytest.raises(Refusal, match="max_steps"):
        trainer(-1).fit(module, loader())
