"""Tied weights: one value an orbit, every sample an equivariant network."""

import copy
import math

import pytest
import torch
from torch import nn

from helpers import normal, seeded
from helpers_equivariance import SIGNED_ACTIONS, bayesian, data, put_in_fix
from symbnn.equivariance.averages import symmetrize_
from symbnn.equivariance.metrics import defect_plugin
from symbnn.equivariance.mixture import OrbitMixture
from symbnn.equivariance.predictions import orbit_predictions
from symbnn.equivariance.projected_gradients import drift, keep_invariant
from symbnn.equivariance.tied import Tied, tie
from symbnn.errors import Refusal
from symbnn.posterior.block_gaussian import BlockGaussian
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.layers import kl_sum, posterior_mean_network, variational_tensors, with_posteriors
from symbnn.posterior.log_normal import LogNormal
from symbnn.posterior.priors import random_means
from symbnn.posterior.sampling import apply_weights, forward, mean_weights, sample_weights
from symbnn.symmetry.actions import Action, natural_action
from symbnn.symmetry.fields import field, rotations, rotations_and_flips
from symbnn.symmetry.groups import Cyclic, Permutations
from symbnn.symmetry.networks import network_action
from symbnn.symmetry.orbits import Orbits
from symbnn.symmetry.signed_permutations import SignedPermutation
from symbnn.training.architectures import Architecture, build, multiply_adds
from symbnn.training.checkpoints import load_network, load_tensors, read_checkpoint
from symbnn.training.config import TrainingConfig, make_optimizer
from symbnn.training.loop import train
from tolerances import assert_close, exact64, within_standard_errors


def tied_law(family=MeanFieldGaussian, action=None, trainable=True):
    orbits = Orbits(action or SIGNED_ACTIONS["C4 on a kernel"])
    loc, log_scale = normal(orbits.dimension, seed=1), 0.3 * normal(orbits.dimension, seed=2) - 1
    rest = (torch.where(normal(orbits.dimension) < 0, -1, 1),) if family is LogNormal else ()
    return Tied(family(loc, log_scale, *rest, trainable=trainable), orbits)


INDEPENDENT = (MeanFieldGaussian, Laplace, LogNormal)
SOME_ACTIONS = [SIGNED_ACTIONS[name] for name in ("C4 on a kernel", "some signs change", "D4", "all signs change")]


@pytest.mark.parametrize("family", INDEPENDENT)
@pytest.mark.parametrize("action", SOME_ACTIONS, ids=lambda action: action.name)
def test_draws_are_fixed_and_have_these_moments(family, action):
    law = tied_law(family, action)
    draws = law.rsample(4000, seeded(1)).detach()
    assert draws.shape == (4000, *action.shape) and law.shape == action.shape
    for g in action.group.generators():
        assert torch.equal(action.act(g, draws), draws)
    within_standard_errors(draws.mean(0), law.mean, law.variance.sqrt() / 4000**0.5)
    assert_close(law.variance, law.orbits.expand(law.base.variance).abs())
    assert bool((law.variance >= 0).all())
    other = law.orbits.orbit.diff(prepend=law.orbits.orbit[:1]) != 0  # neighbours of different orbits are independent
    if bool(other.any()) and law.orbits.dimension > 1:
        assert (draws.flatten(1)[:, other] != draws.flatten(1).roll(1, 1)[:, other]).all()


@pytest.mark.parametrize("family", INDEPENDENT)
def test_densities_are_those_of_the_orbit_coordinates(family):
    law = tied_law(family)
    prior = Tied(family(torch.zeros(3).double(), torch.zeros(3).double(), *(
        (law.base.mask,) if family is LogNormal else ()), trainable=False), law.orbits)
    draws = law.rsample(5000, seeded(4)).detach()
    coordinates = draws.flatten(1)[:, law.orbits.representatives]
    assert_close(law.log_prob(draws), law.base.log_prob(coordinates))
    ratio = (law.log_prob(draws) - prior.log_prob(draws)).detach()
    within_standard_errors(law.kl(prior), ratio.mean(), ratio.std() / 5000**0.5)
    within_standard_errors(law.entropy(), -law.log_prob(draws).mean(), law.log_prob(draws).std() / 5000**0.5)
    outside = draws[:2].clone()
    outside[0, 0, 0] += 1e-6
    assert law.log_prob(outside)[0] == -math.inf and law.log_prob(outside)[1].isfinite()
    assert law.log_prob(draws.view(50, 100, 3, 3)).shape == (50, 100)


def test_untied_priors_are_infinitely_far():
    law, full = tied_law(), MeanFieldGaussian(torch.zeros(3, 3).double(), torch.zeros(3, 3).double())
    with pytest.raises(Refusal, match="infinite"):
        law.kl(full)
    with pytest.raises(Refusal, match="infinite"):
        full.kl(law)
    rows = Action.product(natural_action(Permutations(3)), Action.trivial(Permutations(3), (3,)))
    with pytest.raises(Refusal, match="infinite"):  # as many orbits, other ones
        law.kl(Tied(law.base, Orbits(rows)))
    with pytest.raises(Refusal, match="one coordinate an orbit"):
        Tied(full, law.orbits)


def test_tied_laws_under_maps():
    law, turns = tied_law(), SIGNED_ACTIONS["C4 on a kernel"]
    assert law.is_closed_under(turns)
    pushed = law.push_forward(turns(1))
    assert torch.equal(pushed.base.loc, law.base.loc) and pushed.orbits is law.orbits
    minus = SignedPermutation(torch.arange(9), -torch.ones(9))
    assert torch.equal(law.push_forward(minus).mean, -law.mean)
    swapped = SignedPermutation.sending([1, 0, 2, 3, 4, 5, 6, 7, 8])
    assert not law.is_closed_under(swapped) and not law.is_closed_under(torch.eye(9))
    rings = SignedPermutation.sending([1, 2, 5, 0, 4, 8, 3, 6, 7])  # corners to edges and edges to corners
    assert law.is_closed_under(rings)
    assert_close(law.push_forward(rings).mean, rings(law.mean.flatten()).view(3, 3))
    moves = law.parameter_actions(turns)
    assert set(moves) == {"base.loc", "base.log_scale"}
    assert all(Orbits(move).dimension == 3 for move in moves.values())
    signed = tied_law(action=SIGNED_ACTIONS["some signs change"])
    assert signed.is_closed_under(SIGNED_ACTIONS["some signs change"])
    kept = signed.push_forward(SIGNED_ACTIONS["some signs change"](1))
    assert torch.equal(kept.base.loc, signed.base.loc)
    assert not signed.is_closed_under(SignedPermutation([0, 1, 3, 2], [1, 1, 1, 1]))  # into an orbit that vanishes
    half = signed.is_closed_under(SignedPermutation([0, 1, 2, 3], [-1, 1, 1, 1]))
    assert not half


def test_tied_laws_are_modules():
    law = tied_law()
    assert set(law.state_dict()) == {"base.loc", "base.log_scale"}
    assert law.to(torch.float32).rsample(2, seeded()).dtype == torch.float32
    frozen = law.freeze()
    assert not list(frozen.parameters()) and not frozen.trainable and len(list(law.parameters())) == 2
    copied = copy.deepcopy(law)
    assert copied.kl(law) == 0 and copied.base.loc is not law.base.loc


def test_tie_takes_representatives():
    network, action = bayesian(hidden="regular")
    tied = tie(network, action)
    for name, tensor in variational_tensors(tied).items():
        old, orbits = variational_tensors(network)[name], Orbits(action.parameters[name])
        assert torch.equal(tensor.posterior.mean.flatten()[orbits.representatives],
                           old.posterior.loc.flatten()[orbits.representatives])
        assert_close(tensor.posterior.variance, old.posterior.variance)
        assert_close(tensor.prior.variance, old.prior.variance)
        assert tensor.posterior.trainable and not tensor.prior.trainable
    assert drift(tied, action).absolute == 0 and drift(network, action).relative > 0
    invariant = put_in_fix(network, action)
    x = normal(3, 1, 4, 4)
    assert torch.equal(apply_weights(invariant, x, mean_weights(invariant)),
                       apply_weights(tie(invariant, action), x, mean_weights(tie(invariant, action))))
    assert kl_sum(tied) < kl_sum(invariant)
    assert all(type(tensor.posterior) is MeanFieldGaussian for tensor in variational_tensors(network).values())


@pytest.mark.parametrize("family", INDEPENDENT)
def test_every_draw_of_a_tied_network_is_equivariant(family):
    """Architecture or augmentation, through one function: the defect of single draws."""
    kept = ("trivial", rotations_and_flips()) if family is Laplace else ("regular", rotations())
    network, action = bayesian(family, *kept)
    put_in_fix(network, action)
    x = normal(6, 1, 4, 4)

    def defect_of_draws(network):
        probabilities = orbit_predictions(network, x, action, 5, generator=seeded(3)).probabilities
        return [defect_plugin(draw[None]) for draw in probabilities]

    assert max(defect_of_draws(tie(network, action))) < exact64**2
    assert min(defect_of_draws(network)) > 1e-6  # an invariant posterior has it in the mean only


def test_vanishing_orbits_of_a_network_are_zero():
    torch.manual_seed(0)
    network = with_posteriors(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double())
    hidden = Action(Cyclic(2), (3,), lambda g: SignedPermutation([0, 1, 2], [1 - 2 * g, 1, 1]), "one sign")
    tied = tie(network, network_action(network, Action.trivial(Cyclic(2), (2,)), hidden={"0": hidden}))
    weights = sample_weights(tied, 3, seeded())
    assert not weights["0.weight"][:, 0].any() and weights["0.weight"][:, 1:].all()


def test_tied_networks_train_save_and_resume(tmp_path):
    architecture = Architecture("cnn", (1, 4, 4), 3, (4,))

    def fresh():
        network = with_posteriors(build(architecture, seeded()), MeanFieldGaussian, 0.1)
        action = network_action(network, field(rotations(), (1, 4, 4)), hidden="regular")
        return tie(network, action), action

    config = TrainingConfig(epochs=2, batch_size=8, draws=2, device="cpu", learning_rate=1e-2)
    network, action = fresh()
    start = copy.deepcopy(network)
    options = {"action": action.input, "architecture": architecture, "folder": tmp_path / "run"}
    whole = train(network, data(), config, **(options | {"folder": None}))
    assert kl_sum(network) != kl_sum(start)
    one = TrainingConfig(**{**vars(config), "epochs": 1})
    train(fresh()[0], data(), one, **options)
    resumed = train(fresh()[0], data(), config, resume=True, **options)
    for name, value in whole.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], value)
    loaded = fresh()[0]
    load_tensors(loaded, read_checkpoint(tmp_path / "run").part("network"))
    weights = [sample_weights(net, 2, seeded(1)) for net in (loaded, network)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    with pytest.raises(Refusal, match="load_tensors"):
        load_network(tmp_path / "run")


def test_tied_networks_in_the_rest_of_the_library():
    network, action = bayesian(hidden="regular")
    tied = tie(network, action)
    x = normal(2, 1, 4, 4)
    plain = posterior_mean_network(tied)
    assert_close(plain(x), apply_weights(tied, x, mean_weights(tied))[0])
    assert_close(plain(torch.rot90(x, 1, (-2, -1))), plain(x))
    assert multiply_adds(tied, (1, 4, 4)) == multiply_adds(network, (1, 4, 4))
    with pytest.raises(Refusal, match="flipout"):
        forward(tied, x, 1, "flipout")
    for estimator in ("split", "local"):
        assert forward(tied, x, 2, estimator, seeded()).shape == (1, 2, 3)
    optimizer = make_optimizer(tied, TrainingConfig(weight_decay=0.1, scale_rate=0.5))
    scales = {id(tensor.posterior.base.log_scale) for tensor in variational_tensors(tied).values()}
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == scales
    keep_invariant(tied, action)  # an invariant network like any other


def test_tie_refuses():
    network, action = bayesian(norm=True)
    tie(network, action)
    network, action = bayesian(prior=random_means(0))
    with pytest.raises(Refusal, match="A3"):
        tie(network, action)
    network, action = bayesian(BlockGaussian)
    with pytest.raises(Refusal, match="share a scale"):
        tie(network, action)
    with pytest.raises(Refusal, match="derived from"):
        tie(with_posteriors(nn.Sequential(nn.Linear(4, 4))), action)


NORMS = {
    "batch norm": lambda: nn.BatchNorm2d(8), "batch statistics": lambda: nn.BatchNorm2d(8, affine=False),
    "batch gains": lambda: nn.BatchNorm2d(8, track_running_stats=False), "groups": lambda: nn.GroupNorm(2, 8),
    "one group": lambda: nn.GroupNorm(1, 8), "instances": lambda: nn.InstanceNorm2d(8, track_running_stats=True),
    "layer norm": lambda: nn.LayerNorm([8, 4, 4]),
}


def normed(norm, **options):
    """A network with a norm over regular channels, some of whose tensors have posteriors."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 3, padding=1), NORMS[norm](), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 3)).double().eval()
    network = with_posteriors(network, MeanFieldGaussian, 0.1, **options)
    return network, network_action(network, field(rotations(), (1, 4, 4)), hidden="regular")


def gap_of_draws(network, action):
    """The largest difference between outputs at turned and unturned inputs under one draw of the weights."""
    x, weights = normal(4, 1, 4, 4, seed=5), sample_weights(network, 3, seeded(6))
    outputs = apply_weights(network, x, weights)
    return max((apply_weights(network, action.input.act(g, x), weights) - outputs).abs().max().item()
               for g in action.group.elements())


@pytest.mark.parametrize("norm", NORMS)
def test_norms_that_stay_are_kept_and_others_refused(norm):
    network, action = normed(norm)
    others = {name: tensor for name, tensor in [*network[1].named_parameters(), *network[1].named_buffers()]
              if tensor.is_floating_point()}
    tied = tie(network, action)
    assert gap_of_draws(tied, action) < exact64 < 1e-6 < gap_of_draws(network, action)
    for key in others:
        assert torch.equal(getattr(tied[1], key), others[key])
    for key, tensor in others.items():
        kept = tensor.detach().clone()
        tensor.data += 1e-15 * normal(*tensor.shape)
        assert gap_of_draws(tie(network, action), action) < exact64  # rounding is removed
        tensor.data += 0.1 * normal(*tensor.shape).abs()
        before = tensor.detach().clone()
        with pytest.raises(Refusal, match=rf"'1\.{key}', which the group moves.*only=\['1\.{key}'\]"):
            tie(network, action)
        assert torch.equal(tensor, before)
        symmetrize_(network, action, only=[f"1.{key}"])
        assert gap_of_draws(tie(network, action), action) < exact64
        tensor.data.copy_(kept)


@pytest.mark.parametrize("choice", [{"only": ["3.*", "5.*"]}, {"skip": ["0.*"]}, {"skip": ["*.bias"]}], ids=str)
def test_layers_without_posteriors(choice):
    network, action = normed("batch norm", **choice)
    names = sorted({"0.weight", "0.bias", "3.bias", "5.bias"} - variational_tensors(network).keys())
    with pytest.raises(Refusal, match=f"{names[0]}.*which the group moves"):
        tie(network, action)
    with pytest.raises(Refusal, match=f"'{names[-1]}'|'{names[0]}'.*which the group moves.*orbit_average"):
        OrbitMixture(network, action)
    moved = [name for name in names if name != "5.bias"]
    symmetrize_(network, action, only=moved)
    tied = tie(network, action)
    assert gap_of_draws(tied, action) < exact64
    assert not set(moved) & variational_tensors(tied).keys()
    mixture, x = OrbitMixture(network, action), normal(4, 1, 4, 4, seed=5)
    assert gap_of_draws(network, action) > 1e-6
    weights = mixture.orbit(sample_weights(network, 3, seeded(6)))
    turned = apply_weights(network, torch.rot90(x, 1, (-2, -1)), weights).mean(0)
    assert_close(turned, apply_weights(network, x, weights).mean(0))


def test_norms_of_tied_networks_stay_in_training():
    network, action = normed("batch norm")
    for kept in (True, False):
        tied = tie(network, action).train()
        hooks = keep_invariant(tied, action) if kept else None
        x = normal(8, 1, 4, 4, seed=7)
        apply_weights(tied, x, sample_weights(tied, 1, seeded(8)))[0, :, 0].square().sum().backward()
        torch.optim.SGD(tied.parameters(), 0.01).step()
        moved = gap_of_draws(tied.eval(), action)
        assert moved < exact64 if hooks else moved > 1e-6
        assert tied[1].weight.std() > 0 and tied[1].running_mean.abs().max() > 0


def test_marginals_of_independent_families():
    index = torch.tensor([3, 0])
    law = LogNormal(normal(2, 2), torch.zeros(()).double(), torch.tensor([[1, 1], [1, -1]]))
    some = law.marginal(index)
    assert some.shape == (2,) and some.mask.tolist() == [-1, 1]
    assert torch.equal(some.loc, law.loc.flatten()[index]) and torch.equal(some.mean, law.mean.flatten()[index])
    with pytest.raises(Refusal, match="correlated"):
        FullGaussian.initial(normal(2, 2), 0.1).marginal(index)
