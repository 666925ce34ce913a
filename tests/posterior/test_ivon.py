"""Variational online Newton: the package ivon-opt on the same noise, moved problems, exact resumption, refusals."""
import copy
import io
import math

import pytest
import torch
from torch import nn

from helpers import normal, seeded
from symbnn.equivariance.averages import symmetrize
from symbnn.errors import Refusal
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.ivon import IVON
from symbnn.posterior.layers import posterior_mean_network, variational_tensors, with_posteriors
from symbnn.posterior.likelihoods import Categorical
from symbnn.posterior.priors import isotropic, random_means
from symbnn.posterior.real_targets import Gaussian
from symbnn.posterior.sampling import apply_weights
from symbnn.symmetry.fields import field, rotations
from symbnn.symmetry.networks import network_action
from tolerances import assert_close, within_standard_errors

N, DEVIATION, SCALE = 40, 0.8, 0.1


def mlp(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def bayesian(plain=None, scale=SCALE, prior=None):
    return with_posteriors(plain or mlp(), scale=scale, prior=prior or isotropic(DEVIATION))


def data(count=N):
    return normal(count, 4, seed=1), torch.arange(count) % 3


def parameters(network):
    return {name: (its.posterior.loc.detach().clone(), its.posterior.log_scale.detach().clone())
            for name, its in variational_tensors(network).items()}


def standard(network, draws, seed):
    return {name: torch.randn(draws, *its.shape, generator=seeded(seed + place), dtype=its.dtype)
            for place, (name, its) in enumerate(variational_tensors(network).items())}


def split(vector, network):
    tensors = variational_tensors(network)
    parts = vector.split([its.numel() for its in tensors.values()])
    return {name: part.view(its.shape) for part, (name, its) in zip(parts, tensors.items())}


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("clip", [math.inf, 0.05])
def test_the_numbers_are_those_of_ivon_opt(draws, rescale, clip):
    theirs_of = pytest.importorskip("ivon", reason="ivon-opt is not installed").IVON
    (x, y), plain, network = data(), mlp(), bayesian()
    delta = 1 / (N * DEVIATION**2)
    hess_init = 1 / (N * SCALE**2) - delta
    theirs = theirs_of(plain.parameters(), lr=0.05, ess=N, hess_init=hess_init, beta1=0.9, beta2=0.95,
                       weight_decay=delta, mc_samples=draws, clip_radius=clip, rescale_lr=rescale)
    ours = IVON(network, N, 0.05 * (hess_init + delta if rescale else 1), beta1=0.9, beta2=0.95, clip=clip)
    for step in range(25):
        torch.manual_seed(step)
        vectors = [torch.randn(theirs._numel, dtype=torch.float64) for _ in range(draws)]  # what theirs will draw
        torch.manual_seed(step)
        for _ in range(draws):
            with theirs.sampled_params(train=True):
                theirs.zero_grad()
                nn.functional.cross_entropy(plain(x), y).backward()
        theirs.step()
        parts = [split(vector, network) for vector in vectors]
        weights = ours.sample(draws, noise={name: torch.stack([part[name] for part in parts]) for name in parts[0]})
        (-Categorical().mean_log_likelihood(apply_weights(network, x, weights), y)).backward()
        ours.step()
        hessian = split(theirs.param_groups[0]["hess"], network)
        for (name, (loc, log_scale)), parameter in zip(parameters(network).items(), plain.parameters()):
            assert_close(loc, parameter)
            assert_close(ours.hessian[name], hessian[name])
            assert_close((-2 * log_scale).exp(), N * (hessian[name] + delta), 1e-11)


def pair():
    plain = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)).double()
    network, turns = bayesian(plain), field(rotations(), (1, 3, 3))
    return network, network_action(network, turns), turns


def moved_network(network, action, g):
    found = copy.deepcopy(network)
    for name, tensor in variational_tensors(found).items():
        tensor.posterior = tensor.posterior.push_forward(action.parameters[name](g))
    return found


def test_a_moved_problem_with_moved_noise_has_the_moved_trajectory():
    network, action, turns = pair()
    for g in (1, 2, 3):
        here, there = copy.deepcopy(network), moved_network(network, action, g)
        x, y = normal(12, 1, 3, 3, seed=2), torch.arange(12) % 3
        runs = [IVON(its, 12, 0.1, beta2=0.9, clip=0.5) for its in (here, there)]
        for step in range(10):
            noise = standard(here, 2, 10 * step)
            moved = {name: action.parameters[name].act(g, value) for name, value in noise.items()}
            for run, inputs, its in zip(runs, (x, turns.act(g, x)), (noise, moved)):
                weights = run.sample(2, noise=its)
                (-Categorical().mean_log_likelihood(apply_weights(run.network, inputs, weights), y)).backward()
                run.step()
        images, found = parameters(moved_network(here, action, g)), parameters(there)
        assert any((found[name][0] - parameters(here)[name][0]).abs().max() > 0.1 for name in found)
        for name in found:
            assert_close(found[name][0], images[name][0], 1e-11)
            assert_close(found[name][1], images[name][1], 1e-11)


def test_signs_and_places_are_moved_exactly():
    """With gradients that are moved to the bit, so is everything else."""
    network = with_posteriors(nn.Linear(3, 2, bias=False).double(), scale=SCALE)
    other, order = copy.deepcopy(network), torch.tensor([4, 0, 5, 2, 1, 3])
    sign = torch.tensor([1.0, -1, -1, 1, -1, 1]).double()

    def act(value):
        return (value.flatten(-2)[..., order] * sign).view(value.shape)

    posterior = variational_tensors(other)["weight"].posterior
    posterior.loc.data = act(posterior.loc.data)
    first, second = IVON(network, N, 0.1, beta2=0.9), IVON(other, N, 0.1, beta2=0.9)
    coefficients = normal(2, 3, seed=3)
    for step in range(20):
        noise = normal(1, 2, 3, seed=100 + step)
        for run, moved, linear in ((first, noise, coefficients), (second, act(noise), act(coefficients))):
            weight = run.sample(noise={"weight": moved})["weight"]
            (weight.square() / 2 + linear * weight).sum().backward()
            run.step()
    assert torch.equal(act(first.network.weight.posterior.loc), second.network.weight.posterior.loc)
    scales = first.network.weight.posterior.log_scale, second.network.weight.posterior.log_scale
    assert torch.equal(scales[0].flatten()[order], scales[1].flatten())
    assert torch.equal(act(first.momentum["weight"]), second.momentum["weight"])


def test_projection_keeps_a_run_invariant_and_without_it_the_noise_breaks_it():
    network, action, turns = pair()
    images, labels = normal(6, 1, 3, 3, seed=2), torch.arange(6) % 3
    x, y = torch.cat([turns.act(g, images) for g in range(4)]), labels.repeat(4)
    invariant = symmetrize(network, action)
    for project in (True, False):
        run = IVON(copy.deepcopy(invariant), 24, 0.1, beta2=0.9, action=action if project else None)
        for step in range(15):
            run.update(x, y, generator=seeded(step))
        kept = all(its.posterior.is_invariant_under(action.parameters[name])
                   for name, its in variational_tensors(run.network).items())
        assert kept == project


def test_the_curvature_is_unbiased():
    """E[g eps / sigma] = E[l''], here of a quartic, whose second derivative has a known mean."""
    network = with_posteriors(nn.Linear(1, 1, bias=False).double(), scale=0.5, prior=isotropic(2.0))
    posterior = network.weight.posterior
    posterior.loc.data.fill_(0.7)
    run = IVON(network, N, 0.1)
    count = 200_000
    weight = run.sample(count, seeded(0))["weight"]
    weight.pow(4).sum().backward()
    values = (weight.grad * run._noise["weight"] / 0.5).flatten()
    exact = 12 * (0.7**2 + 0.5**2)
    within_standard_errors(values.mean(), torch.tensor(exact).double(), values.std() / math.sqrt(count))


def test_precisions_stay_positive_whatever_the_estimates():
    network = bayesian()
    run = IVON(network, N, 1e-3, beta2=0.5)
    for step in range(30):
        before = {name: value.clone() for name, value in run.hessian.items()}
        weights = run.sample(noise=standard(network, 1, step))
        sum((-1e4 * weight.square()).sum() for weight in weights.values()).backward()  # strongly concave
        run.step()
        delta = 1 / (N * DEVIATION**2)
        for name, value in run.hessian.items():
            assert bool((value + delta >= (before[name] + delta) / 2).all())


def test_a_prior_with_means_and_scales_pulls_towards_them():
    """Without data the optimum is the prior."""
    network = bayesian(prior=random_means(3, spread=1.0, deviation=0.3), scale=0.1)
    run = IVON(network, N, 0.2, beta1=0.0, beta2=0.9)
    for step in range(400):
        weights = run.sample(generator=seeded(step))
        sum(0 * weight.sum() for weight in weights.values()).backward()
        run.step()
    for tensor in variational_tensors(network).values():
        assert_close(tensor.posterior.mean, tensor.prior.mean, 1e-9)
        assert_close(tensor.posterior.scale, tensor.prior.scale, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_resumed_run_is_the_same_to_the_bit(dtype):
    (x, y), straight = data(), bayesian(mlp(dtype))
    x = x.to(dtype)
    run = IVON(straight, N, 0.1, beta2=0.9)
    for step in range(10):
        run.update(x, y, generator=seeded(step))
        if step == 4:
            buffer = io.BytesIO()
            torch.save({"network": straight.state_dict(), "optimizer": run.state_dict()}, buffer)
    buffer.seek(0)
    kept = torch.load(buffer, weights_only=True)
    other = bayesian(mlp(dtype))
    resumed = IVON(other, N, 0.1, beta2=0.9)
    other.load_state_dict(kept["network"])
    resumed.load_state_dict(kept["optimizer"])
    for step in range(5, 10):
        resumed.update(x, y, generator=seeded(step))
    assert resumed.count == run.count == 10
    for name, (loc, log_scale) in parameters(straight).items():
        assert torch.equal(loc, parameters(other)[name][0]) and torch.equal(log_scale, parameters(other)[name][1])


def test_training_lowers_the_loss_and_the_result_is_a_mean_field_gaussian():
    (x, y), network = data(), bayesian()
    run = IVON(network, N, 0.3)
    losses = [run.update(x, y, draws=4, generator=seeded(step)) for step in range(150)]
    assert losses[-1] < losses[0] - 0.1
    assert all(type(its.posterior) is MeanFieldGaussian and its.posterior.trainable
               for its in variational_tensors(network).values())
    regression = IVON(bayesian(), N, 0.1)
    assert math.isfinite(regression.update(x, normal(N, 3), Gaussian(0.5)))


@pytest.mark.parametrize("make, message", [
    (lambda: IVON(mlp(), N, 0.1), "a Bayesian network"), (lambda: IVON(bayesian(), 0, 0.1), "number of data"),
    (lambda: IVON(bayesian(), N, 0.0), "learning rate"), (lambda: IVON(bayesian(), N, math.nan), "learning rate"),
    (lambda: IVON(bayesian(), N, 0.1, beta1=1.0), "beta1"), (lambda: IVON(bayesian(), N, 0.1, beta2=-0.1), "beta2"),
    (lambda: IVON(bayesian(), N, 0.1, beta2="0.9"), "beta2"),
    (lambda: IVON(bayesian(), N, 0.1, clip=0), "bound of single"),
    (lambda: IVON(bayesian(scale=2.0), N, 0.1), "scales of '0.weight' below those of the prior"),
    (lambda: IVON(with_posteriors(mlp(), FullGaussian), N, 0.1), "a MeanFieldGaussian as posterior"),
    (lambda: IVON(with_posteriors(mlp(), Laplace), N, 0.1), "a MeanFieldGaussian as posterior"),
    (lambda: IVON(frozen(), N, 0.1), "a frozen one of '0.bias'"),
    (lambda: IVON(bayesian(), N, 0.1, action=3), "The action|the action"),
    (lambda: IVON(bayesian(), N, 0.1, action=pair()[1]), "action"),
    (lambda: IVON(bayesian(), N, 0.1).step(), "weights that were sampled"),
    (lambda: without_gradient(), "gradients of the sampled weights"),
    (lambda: IVON(bayesian(), N, 0.1).sample(0), "number of samples"),
    (lambda: IVON(bayesian(), N, 0.1).sample(2, noise=standard(bayesian(), 1, 0)), "noise of the shapes"),
    (lambda: IVON(bayesian(), N, 0.1).update(*data(), likelihood=3), "likelihood"),
    (lambda: IVON(bayesian(), N, 0.1).load_state_dict({}), "a state with"),
    (lambda: IVON(bayesian(), N, 0.1).load_state_dict(3), "state"),
    (lambda: IVON(bayesian(), N, 0.1).load_state_dict(IVON(bayesian(), N + 1, 0.1).state_dict()), "41 data"),
    (lambda: IVON(bayesian(), N, 0.1).load_state_dict(IVON(pair()[0], N, 0.1).state_dict()), "another network"),
])
def test_refusals(make, message):
    with pytest.raises(Refusal, match=message):
        make()


def frozen():
    network = bayesian()
    tensor = variational_tensors(network)["0.bias"]
    tensor.posterior = tensor.posterior.freeze()
    return network


def without_gradient():
    run = IVON(bayesian(), N, 0.1)
    run.sample()
    run.step()


def test_a_step_that_cannot_be_made_changes_nothing():
    network = bayesian()
    run, before, (x, y) = IVON(network, N, 0.1), parameters(network), data()
    with pytest.raises(Refusal, match="finite gradients"):
        run.update(x * math.inf, y)
    assert run.count == 0
    for name, (loc, log_scale) in parameters(network).items():
        assert torch.equal(loc, before[name][0]) and torch.equal(log_scale, before[name][1])
    assert posterior_mean_network(network)(x).isfinite().all()
