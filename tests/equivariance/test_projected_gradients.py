"""Parameters under an action, drift, projected gradients that keep a posterior invariant."""

import copy
import math

import pytest
import sympy as sp
import torch
from torch import nn

from helpers import normal, seeded
from helpers_equivariance import bayesian, data, group_mean, put_in_fix, signed_mixture
from symbnn.equivariance.projected_gradients import drift, keep_invariant, parameter_actions
from symbnn.equivariance.tied import tie
from symbnn.errors import Refusal
from symbnn.posterior.block_gaussian import BlockGaussian
from symbnn.posterior.elbo import elbo
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.layers import variational_tensors, with_posteriors
from symbnn.posterior.log_normal import LogNormal
from symbnn.posterior.priors import random_means
from symbnn.posterior.real_targets import Gaussian
from symbnn.posterior.sampling import apply_weights, forward, mean_weights, sample_weights
from symbnn.symmetry.actions import Action
from symbnn.symmetry.fields import field, flips, rotations
from symbnn.symmetry.groups import Cyclic
from symbnn.symmetry.networks import network_action
from symbnn.symmetry.orbits import Orbits
from symbnn.symmetry.signed_permutations import SignedPermutation
from symbnn.training.config import TrainingConfig
from symbnn.training.loop import train
from tolerances import assert_close, exact64, within_standard_errors

FAMILIES = (MeanFieldGaussian, Laplace, LogNormal, BlockGaussian)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hidden", ["trivial", "regular"])
def test_parameters_move_as_the_push_forward_says(family, hidden):
    network, action = bayesian(family, hidden)
    put_in_fix(network, action) if family is LogNormal else None
    with torch.no_grad():
        for parameter in network.parameters():  # anything, so that a wrong action shows
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded(3), dtype=parameter.dtype))
    moves, parameters = parameter_actions(network, action), dict(network.named_parameters())
    assert list(moves) == list(parameters)
    for g in action.group.elements():
        for name, tensor in variational_tensors(network).items():
            pushed = tensor.posterior.push_forward(action.parameters[name](g))
            for key, value in pushed.named_parameters():
                full = f"{name}.posterior.{key}"
                assert moves[full].shape == tuple(parameters[full].shape)
                assert_close(moves[full].act(g, parameters[full]), value)


def test_signs_move_locations_and_not_scales():
    torch.manual_seed(0)
    network = with_posteriors(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double())
    hidden = Action(Cyclic(2), (3,), lambda g: SignedPermutation([0, 1, 2], [1 - 2 * g, 1, 1]), "one sign")
    action = network_action(network, Action.trivial(Cyclic(2), (2,)), hidden={"0": hidden})
    moves = parameter_actions(network, action)
    ones = torch.ones(3, 2, dtype=torch.float64)
    assert moves["0.weight.posterior.loc"].act(1, ones).tolist() == [[-1, -1], [1, 1], [1, 1]]
    assert torch.equal(moves["0.weight.posterior.log_scale"].act(1, ones), ones)


def test_parameters_of_norms_are_included():
    network, action = bayesian(norm=True, hidden="regular")
    moves = parameter_actions(network, action)
    assert {"1.weight", "1.bias"} < moves.keys() and "1.running_mean" not in moves
    assert Orbits(moves["1.weight"]).dimension == 1


def test_shared_parameters_move_as_one_or_are_refused():
    turns = rotations().kernel(3, 3)
    shared = MeanFieldGaussian(normal(3, 3), torch.zeros(()).double())
    assert shared.parameter_actions(turns)["log_scale"].shape == ()
    rows = MeanFieldGaussian(normal(3, 3), torch.zeros(3, 1).double())
    with pytest.raises(Refusal, match="tears apart"):
        rows.parameter_actions(turns)
    assert rows.parameter_actions(flips().kernel(3, 3))["log_scale"].shape == (3, 1)
    with pytest.raises(Refusal, match="tears apart"):  # one location cannot move with two signs
        MeanFieldGaussian(torch.zeros(1), torch.zeros(4), shape=(4,)).parameter_actions(signed_mixture())


def test_refused_parameter_actions():
    action = bayesian()[1]
    with pytest.raises(Refusal, match="triangular"):
        parameter_actions(with_posteriors(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten()), FullGaussian),
                          network_action(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten()),
                                         field(rotations(), (1, 4, 4))))
    with pytest.raises(Refusal, match="sign mask"):
        parameter_actions(bayesian(LogNormal)[0], action)
    with pytest.raises(Refusal, match="derived from"):
        parameter_actions(with_posteriors(nn.Sequential(nn.Linear(4, 4))), action)


def test_drift_is_the_distance_from_the_group_mean():
    network, action = bayesian(norm=True, hidden="regular")
    moves, away, total = parameter_actions(network, action), 0.0, 0.0
    for name, parameter in network.named_parameters():
        away += (parameter - group_mean(moves[name], parameter)).square().sum().item()
        total += parameter.square().sum().item()
    found = drift(network, action)
    assert_close(found.absolute, math.sqrt(away))
    assert_close(found.relative, math.sqrt(away / total))
    assert found.relative > 0.01
    assert drift(put_in_fix(network, action), action) == (0, 0)


def pixel_pair():
    """The network, action, datum and SymPy gradient of two pixels under exchange with a change of signs."""
    torch.manual_seed(0)
    layers = nn.Linear(2, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False)
    network = with_posteriors(nn.Sequential(*layers).double())
    swap = SignedPermutation([1, 0], [-1, -1])
    source = Action(Cyclic(2), (2,), lambda g: swap if g else SignedPermutation.identity(2), "exchange")
    action = network_action(network, source)
    eta = sp.symbols("mu1:4 lambda1:4")
    noise, datum = sp.symbols("e1:4"), sp.symbols("x1 x2 y")
    w1, w2, v = (eta[i] + sp.exp(eta[i + 3]) * noise[i] for i in range(3))
    loss = (datum[2] - v * sp.tanh(w1 * datum[0] + w2 * datum[1])) ** 2 / 2
    gradient = sp.lambdify((eta, noise, datum), [sp.diff(loss, parameter) for parameter in eta], "math")
    return network, action, gradient


def test_projected_gradient_is_the_formula_with_coupled_noise():
    network, action, gradient = pixel_pair()
    put_in_fix(network, action)
    names = ["0.weight.posterior.loc", "2.weight.posterior.loc", "0.weight.posterior.log_scale",
             "2.weight.posterior.log_scale"]
    eta = torch.cat([network.get_parameter(name).detach().flatten() for name in names]).tolist()
    noise, datum = normal(3, seed=4).tolist(), [0.8, -0.3, 0.5]
    here = gradient(eta, noise, datum)
    there = gradient(eta, [-noise[1], -noise[0], noise[2]], [-datum[1], -datum[0], datum[2]])
    expected = torch.tensor([here, there], dtype=torch.float64).mean(0)
    with keep_invariant(network, action):
        weights = {name: tensor.posterior.transport(torch.tensor(eps, dtype=torch.float64).view(1, 1, -1))
                   for (name, tensor), eps in zip(variational_tensors(network).items(), (noise[:2], noise[2:]))}
        out = apply_weights(network, torch.tensor([datum[:2]], dtype=torch.float64), weights)
        ((out - datum[2]) ** 2 / 2).sum().backward()
    found = torch.cat([network.get_parameter(name).grad.flatten() for name in names])
    assert_close(found, expected)
    assert (torch.tensor(here, dtype=torch.float64) - expected).abs().max() > 0.01


def noisy_gradient(network, x, noise):
    """Gradients by name of a nonlinear loss at given noise, no hooks."""
    weights = {name: tensor.posterior.transport(noise[name]) for name, tensor in variational_tensors(network).items()}
    loss = apply_weights(network, x, weights).logsumexp(-1).sin().sum()
    names, parameters = zip(*network.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hidden", ["trivial", "regular"])
def test_coupled_noise_equals_the_projection(family, hidden):
    network, action = bayesian(family, hidden)
    put_in_fix(network, action)
    x, generator = normal(2, 1, 4, 4), seeded(2)
    noise = {name: tensor.posterior.noise(1, generator) for name, tensor in variational_tensors(network).items()}
    moves = parameter_actions(network, action)

    def gaps():
        coupled = [noisy_gradient(network, action.input.act(g, x), action.act(g, noise))
                   for g in action.group.elements()]
        plain = noisy_gradient(network, x, noise)
        return {name: (sum(grads[name] for grads in coupled) / 4, Orbits(moves[name]).project(plain[name]))
                for name in plain}

    for mean, projection in gaps().values():
        assert_close(mean, projection)
    with torch.no_grad():
        network.get_parameter("0.weight.posterior.loc").add_(0.3 * normal(4, 1, 3, 3, seed=6))
    assert max((mean - projection).abs().max() for mean, projection in gaps().values()) > 1e-3


def test_unbiased_for_the_augmented_objective_and_less_noisy():
    """One linear layer with Gaussian likelihood, where the expected gradient over noise is known."""
    network = with_posteriors(nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False)).double(), scale=0.4)
    action = network_action(network, field(rotations(), (1, 2, 2)))
    posterior = put_in_fix(network, action)[1].weight.posterior
    x, y, draws = normal(3, 1, 2, 2, seed=1), normal(3, seed=2), 4000
    weights = posterior.rsample(draws, seeded(3))
    slopes = -(y - (weights @ x.flatten(1).T)[:, 0])[:, None] * x.flatten(1).T  # of half the squared error, (S, 4, 3)
    by_loc = slopes.mean(-1).detach()
    by_scale = (by_loc * (weights - posterior.loc)[:, 0]).detach()
    turned = torch.stack([action.input.act(g, x).flatten(1) for g in action.group.elements()])  # (4, 3, 4)
    expected_loc = -((y - turned @ posterior.loc[0])[..., None] * turned).mean((0, 1)).detach()
    expected_scale = (turned.square() * posterior.variance[0]).mean((0, 1)).detach()
    orbits = Orbits(parameter_actions(network, action)["1.weight.posterior.loc"])
    for samples, expected in ((by_loc, expected_loc), (by_scale, expected_scale)):
        ours = orbits.project(samples[:, None])[:, 0]
        within_standard_errors(ours.mean(0), expected, ours.std(0) / draws**0.5)
        with pytest.raises(AssertionError):  # without the projection it is another objective, of unturned images
            within_standard_errors(samples.mean(0), expected, samples.std(0) / draws**0.5)
        assert ours.var(0).sum() < 0.9 * samples.var(0).sum()


OPTIMISERS = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, 0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
}


def small(family=MeanFieldGaussian):
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    network = with_posteriors(plain, family, 0.2)
    action = network_action(network, field(rotations(), (1, 2, 2)))
    return put_in_fix(network, action), action


def noisy_steps(network, optimizer, steps):
    """Small batches in one position, one draw each, clipping."""
    generator, x, y = seeded(7), normal(12, 1, 2, 2, seed=8), normal(12, 2, seed=9)
    for step in range(steps):
        batch = torch.randint(12, (3,), generator=generator)
        optimizer.zero_grad()
        outputs = forward(network, x[batch], 1, "whole", generator)
        (-elbo(network, outputs, y[batch], 48, likelihood=Gaussian(0.5)).elbo).backward()
        if step % 2:
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        else:
            nn.utils.clip_grad_value_(network.parameters(), 0.5)
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_exactly_invariant_after_a_thousand_noisy_steps(name):
    network, action = small()
    start = copy.deepcopy(network)
    keep_invariant(network, action)
    noisy_steps(network, OPTIMISERS[name](network.parameters()), 1000)
    assert drift(network, action).absolute < exact64
    x = normal(5, 1, 2, 2)
    mean = mean_weights(network)
    assert_close(apply_weights(network, x, mean), apply_weights(network, torch.rot90(x, 1, (-2, -1)), mean))
    draw = sample_weights(network, 1, seeded())["1.weight"]
    assert (draw - torch.rot90(draw.view(1, 3, 2, 2), 1, (-2, -1)).flatten(2)).abs().max() > 0.01  # not tied
    moved = max((a - b).abs().max() for a, b in zip(network.parameters(), start.parameters()))
    assert moved > 0.1
    noisy_steps(start, OPTIMISERS[name](start.parameters()), 30)  # the deep copy has no hooks
    assert drift(start, action).relative > 1e-3


def test_lbfgs_stays_up_to_rounding():
    network, action = small()
    keep_invariant(network, action)
    optimizer = torch.optim.LBFGS(network.parameters(), lr=0.1, max_iter=20)
    x, y = normal(6, 1, 2, 2), normal(6, 2)

    def closure():
        optimizer.zero_grad()
        loss = -elbo(network, forward(network, x, 1, "whole", seeded(1)), y, 6, likelihood=Gaussian(0.5)).elbo
        loss.backward()
        return loss

    before = closure().item()
    optimizer.step(closure)
    assert closure().item() < before and drift(network, action).relative < exact64


def test_handle_removes_the_hooks():
    network, action = small()
    x = normal(2, 1, 2, 2)

    def off():
        network.zero_grad()
        apply_weights(network, x, sample_weights(network, 1, seeded())).square().sum().backward()
        weight = network[1].weight.posterior.loc
        return (weight.grad - Orbits(parameter_actions(network, action)["1.weight.posterior.loc"])
                .project(weight.grad)).abs().max()

    with keep_invariant(network, action):
        assert off() == 0
    assert off() > 1e-3
    handle = keep_invariant(network, action)
    assert off() == 0
    handle.remove()
    handle.remove()
    assert off() > 1e-3


def test_hooks_survive_a_change_of_dtype():
    network, action = bayesian()
    put_in_fix(network, action)
    keep_invariant(network, action)
    for dtype in (torch.float32, torch.float64, torch.float32):
        network.to(dtype)
        network.zero_grad()
        apply_weights(network, normal(2, 1, 4, 4).to(dtype), sample_weights(network, 1, seeded())).sum().backward()
        for name, move in parameter_actions(network, action).items():
            grad = network.get_parameter(name).grad
            assert grad.dtype == dtype and torch.equal(Orbits(move).project(grad), grad) and bool(grad.any())


def test_on_a_gpu(require_cuda):
    network, action = bayesian()
    put_in_fix(network, action)
    keep_invariant(network, action)
    network.to(require_cuda)
    weights = sample_weights(network, 1, torch.Generator(require_cuda))
    apply_weights(network, normal(2, 1, 4, 4).to(require_cuda), weights).sum().backward()
    torch.optim.Adam(network.parameters(), 0.1).step()
    assert drift(network, action).absolute < exact64
    tied = tie(network, action)
    assert tied[0].weight.posterior.rsample(1).is_cuda


def test_running_statistics_stay_invariant():
    network, action = bayesian(norm=True, hidden="regular")
    put_in_fix(network, action)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    with keep_invariant(network, action):
        for seed in range(3):
            x = normal(6, 1, 4, 4, seed=seed)
            optimizer.zero_grad()
            forward(network, x, 1, "whole", seeded(seed)).square().sum().backward()
            optimizer.step()
        norm = network[1]
        assert norm.running_mean.abs().min() > 0
        for value in (norm.running_mean, norm.running_var):
            assert torch.equal(value, value[:1].expand(4))
        norm.running_mean[0] += 1  # by hand; a prediction does not touch it
        kept = norm.running_mean.clone()
        forward(network.eval(), x, 1, "whole", seeded())
        assert torch.equal(norm.running_mean, kept)
    forward(network.train(), x, 1, "whole", seeded())
    assert not torch.equal(norm.running_mean, norm.running_mean[:1].expand(4))
    with pytest.raises(Refusal, match="running_mean"):
        keep_invariant(network, action)


def test_rounding_is_removed_and_more_is_refused():
    network, action = small()
    weight = network[1].weight.posterior.loc
    with torch.no_grad():
        weight[0, 0] += 1e-15
    assert drift(network, action).absolute > 0
    keep_invariant(network, action)
    assert drift(network, action).absolute == 0
    with torch.no_grad():
        weight[0, 0] += 1e-9
    before = weight.clone()
    with pytest.raises(Refusal, match="kept invariant"):
        keep_invariant(network, action)
    assert torch.equal(weight, before)


def test_refusals_name_the_condition():
    network, action = bayesian()
    with pytest.raises(Refusal, match=r"kept invariant.*symmetrize"):
        keep_invariant(network, action)
    network, action = bayesian(prior=random_means(0))
    with pytest.raises(Refusal, match="A3"):
        keep_invariant(put_in_fix(network, action), action)
    network, action = bayesian(prior=lambda name, q: MeanFieldGaussian(torch.zeros_like(q.loc), 0.1 * q.loc.detach(),
                                                                       trainable=False))
    with pytest.raises(Refusal, match="A3"):  # means agree, scales do not
        keep_invariant(put_in_fix(network, action), action)
    rows = {4: (1, 1, 3, 1), 2: (1, 1), 1: (1,)}  # a scale for each row of a kernel: turns send rows to columns
    network, action = bayesian(prior=lambda name, q: BlockGaussian(
        torch.zeros_like(q.loc), torch.linspace(0, 1, math.prod(rows[q.loc.ndim])).double().view(rows[q.loc.ndim]),
        trainable=False))
    with pytest.raises(Refusal, match="A3"):
        keep_invariant(put_in_fix(network, action), action)
    network, action = bayesian(LogNormal)
    with pytest.raises(Refusal, match="A4"):
        keep_invariant(network, action)
    network = with_posteriors(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double(), FullGaussian)
    action = network_action(network, field(rotations(), (1, 2, 2)))
    with torch.no_grad():
        network[1].weight.posterior.loc.zero_()
    with pytest.raises(Refusal, match="triangular"):
        keep_invariant(network, action)
    other = with_posteriors(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double())
    with pytest.raises(Refusal, match="derived from"):
        keep_invariant(other, action)


def test_a_refused_network_has_no_hooks():
    network, action = bayesian(prior=random_means(0))
    put_in_fix(network, action)
    with pytest.raises(Refusal):
        keep_invariant(network, action)
    assert all(not parameter._backward_hooks for parameter in network.parameters())


@pytest.mark.parametrize("estimator", ["split", "flipout"])
def test_training_needs_no_change(estimator):
    network, action = bayesian()
    put_in_fix(network, action)
    free = copy.deepcopy(network)
    config = TrainingConfig(epochs=2, batch_size=8, draws=2, estimator=estimator, augmentation="random", device="cpu",
                            learning_rate=1e-2)
    keep_invariant(network, action)
    result = train(network, data(), config, action=action.input)
    assert result.status == "complete" and drift(network, action).absolute == 0
    train(free, data(), config, action=action.input)
    assert drift(free, action).relative > 1e-3
