"""Orbits and projections, parameters under an action, projected gradients, drift, tied weights."""

import copy
import math
import operator

import pytest
import sympy as sp
import torch
from torch import nn

from symbnn.data.splits import Split
from symbnn.equivariance.metrics import defect_plugin
from symbnn.equivariance.predictions import orbit_predictions
from symbnn.equivariance.projected_gradients import drift, keep_invariant, parameter_actions
from symbnn.equivariance.tied import Tied, tie
from symbnn.errors import Refusal
from symbnn.posterior.block_gaussian import BlockGaussian
from symbnn.posterior.elbo import elbo
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.layers import kl_sum, posterior_mean_network, variational_tensors, with_posteriors
from symbnn.posterior.likelihoods import Gaussian
from symbnn.posterior.log_normal import LogNormal
from symbnn.posterior.priors import random_means
from symbnn.posterior.sampling import apply_weights, forward, mean_weights, sample_weights
from symbnn.symmetry.actions import Action, natural_action, regular_channels, sign_change
from symbnn.symmetry.fields import field, flips, rotations, rotations_and_flips, shifts
from symbnn.symmetry.groups import Cyclic, Product, Permutations
from symbnn.symmetry.networks import network_action, unit_permutations
from symbnn.symmetry.orbits import Orbits
from symbnn.symmetry.signed_permutations import SignedPermutation
from symbnn.training.architectures import Architecture, build, multiply_adds
from symbnn.training.checkpoints import load_network, load_tensors, read_checkpoint
from symbnn.training.config import TrainingConfig, make_optimizer
from symbnn.training.loop import train
from tolerances import assert_close, exact32, exact64, within_standard_errors


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def turned_vectors():
    """C4 turning two channels as it turns a vector, beside two channels that its generator negates."""
    quarter, negate = torch.tensor([[0.0, -1.0], [1.0, 0.0]]), -torch.eye(2)
    matrix = torch.block_diag(quarter, negate)
    step = SignedPermutation.from_matrix(matrix)

    def rule(g):
        result = SignedPermutation.identity(4)
        for _ in range(g):
            result = step @ result
        return result

    return Action(Cyclic(4), (4,), rule, "vectors")


def signed_mixture():
    """C2 that exchanges coordinates 0 and 1 with a minus sign, fixes 2, negates 3."""
    swap = SignedPermutation([1, 0, 2, 3], [-1, -1, 1, -1])
    return Action(Cyclic(2), (4,), lambda g: swap if g else SignedPermutation.identity(4), "signed mixture")


def flips_and_units():
    group = Product(Cyclic(2), Permutations(3))
    space = flips().on(2, 3).pulled_back(group, operator.itemgetter(0))
    units = natural_action(Permutations(3)).pulled_back(group, operator.itemgetter(1))
    return Action.product(units, space)


ACTIONS = {
    "C4 on a kernel": rotations().on(3, 3),
    "C4 on regular channels and a kernel": Action.product(
        regular_channels(Cyclic(4), 2), Action.trivial(Cyclic(4), (2,)), rotations().on(2, 2)
    ),
    "D4": field(rotations_and_flips(), (2, 4, 4)),
    "flips": field(flips(), (1, 3, 5)),
    "shifts": field(shifts(6, 1), (1, 2, 6)),
    "all signs change": sign_change(5),
    "vectors": turned_vectors(),
    "some signs change": signed_mixture(),
    "S4 on rows and columns": Action.product(natural_action(Permutations(4)), natural_action(Permutations(4))),
    "C2 x S3": flips_and_units(),
    "trivial group": Action.trivial(Cyclic(1), (2, 3)),
    "a number": Action.trivial(Cyclic(4), ()),
}
every_action = pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS.keys())


def group_mean(action, x):
    return torch.stack([action.act(g, x) for g in action.group.elements()]).mean(0)


@every_action
def test_projection_is_the_mean_over_the_group(action):
    orbits, x = Orbits(action), random(2, 3, *action.shape)
    assert_close(orbits.project(x), group_mean(action, x))
    assert_close(orbits.project(x.float()), group_mean(action, x), exact32)
    assert orbits.project(x.float()).dtype == torch.float32


@every_action
def test_dimension_is_the_mean_character(action):
    order = sp.Integer(action.group.order)
    traces = [int(action(g).matrix().trace()) for g in action.group.elements()]
    orbits = Orbits(action)
    assert orbits.dimension == sum(map(sp.Integer, traces)) / order
    projector = orbits.project(torch.eye(action.numel, dtype=torch.float64).view(-1, *action.shape))
    assert_close(projector.reshape(action.numel, action.numel).trace(), float(orbits.dimension))


@every_action
def test_projection_is_idempotent_bit_by_bit_and_self_adjoint(action):
    orbits, x, y = Orbits(action), random(*action.shape, seed=1), random(*action.shape, seed=2)
    projected = orbits.project(x)
    assert torch.equal(orbits.project(projected), projected)
    for g in action.group.elements():
        assert torch.equal(action.act(g, projected), projected)  # equal bit by bit within an orbit
    assert_close((projected * y).sum(), (x * orbits.project(y)).sum())


@every_action
def test_restrict_and_expand_are_inverse(action):
    orbits = Orbits(action)
    z = random(5, 2, orbits.dimension)
    assert orbits.expand(z).shape == (5, 2, *action.shape)
    assert torch.equal(orbits.restrict(orbits.expand(z)), z)
    assert int(orbits.sizes.sum()) == int((orbits.orbit < orbits.dimension).sum())
    assert bool((orbits.sign[orbits.representatives] == 1).all())


def test_orbits_with_both_signs_vanish():
    assert Orbits(sign_change(5)).dimension == 0
    assert Orbits(turned_vectors()).dimension == 0
    orbits = Orbits(signed_mixture())
    assert_close(orbits.project(torch.tensor([1.0, 3.0, 5.0, 7.0])), torch.tensor([-1.0, 1.0, 5.0, 0.0]))


def test_permutations_of_many_units_without_listing_them():
    network = build(Architecture("mlp", (20,), 3, (512, 512)))
    action = unit_permutations(network, (20,))
    first, middle, _ = (name for name in action.parameters if name.endswith("weight"))
    into = Orbits(action.parameters[first])
    assert into.dimension == 20  # one number for each input: all units alike
    x = random(512, 20)
    assert_close(into.project(x), x.mean(0).expand(512, 20))
    between = Orbits(action.parameters[middle])
    assert between.dimension == 1  # rows and columns are permuted independently
    w = random(512, 512)
    assert_close(between.project(w), w.mean().expand(512, 512))


def test_projection_has_the_right_gradient():
    orbits = Orbits(ACTIONS["D4"])
    x = random(*orbits.shape).requires_grad_()
    assert torch.autograd.gradcheck(orbits.project, x)


# Parameters under an action


def plain_cnn(norm=False, dtype=torch.float64):
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(4)] if norm else []
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *norms, nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
                         nn.Flatten(), nn.Linear(64, 3)).to(dtype)


def bayesian(family=MeanFieldGaussian, hidden="trivial", space=None, prior=None, **options):
    network = with_posteriors(plain_cnn(**options), family, 0.1, prior)
    return network, network_action(network, field(space or rotations(), (1, 4, 4)), hidden=hidden)


def put_in_fix(network, action):
    """Project all parameters, and the masks of log-normal weights and their priors on one sign."""
    for tensor in variational_tensors(network).values():
        if isinstance(tensor.posterior, LogNormal):
            tensor.posterior.mask.fill_(1)
            tensor.prior.mask.fill_(1)
    with torch.no_grad():
        for name, move in parameter_actions(network, action).items():
            parameter = network.get_parameter(name)
            parameter.copy_(Orbits(move).project(parameter))
    return network


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
    shared = MeanFieldGaussian(random(3, 3), torch.zeros(()).double())
    assert shared.parameter_actions(turns)["log_scale"].shape == ()
    rows = MeanFieldGaussian(random(3, 3), torch.zeros(3, 1).double())
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


# Projected gradients


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
    noise, datum = random(3, seed=4).tolist(), [0.8, -0.3, 0.5]
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
    x, generator = random(2, 1, 4, 4), seeded(2)
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
        network.get_parameter("0.weight.posterior.loc").add_(0.3 * random(4, 1, 3, 3, seed=6))
    assert max((mean - projection).abs().max() for mean, projection in gaps().values()) > 1e-3


def test_unbiased_for_the_augmented_objective_and_less_noisy():
    """One linear layer with Gaussian likelihood, where the expected gradient over noise is known."""
    network = with_posteriors(nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False)).double(), scale=0.4)
    action = network_action(network, field(rotations(), (1, 2, 2)))
    posterior = put_in_fix(network, action)[1].weight.posterior
    x, y, draws = random(3, 1, 2, 2, seed=1), random(3, seed=2), 4000
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
    generator, x, y = seeded(7), random(12, 1, 2, 2, seed=8), random(12, 2, seed=9)
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
    x = random(5, 1, 2, 2)
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
    x, y = random(6, 1, 2, 2), random(6, 2)

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
    x = random(2, 1, 2, 2)

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
        apply_weights(network, random(2, 1, 4, 4).to(dtype), sample_weights(network, 1, seeded())).sum().backward()
        for name, move in parameter_actions(network, action).items():
            grad = network.get_parameter(name).grad
            assert grad.dtype == dtype and torch.equal(Orbits(move).project(grad), grad) and bool(grad.any())


def test_on_a_gpu(require_cuda):
    network, action = bayesian()
    put_in_fix(network, action)
    keep_invariant(network, action)
    network.to(require_cuda)
    weights = sample_weights(network, 1, torch.Generator(require_cuda))
    apply_weights(network, random(2, 1, 4, 4).to(require_cuda), weights).sum().backward()
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
            x = random(6, 1, 4, 4, seed=seed)
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


def data(n=16):
    return Split(random(n, 1, 4, 4).float(), torch.arange(n) % 3)


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


# Tied weights


def tied_law(family=MeanFieldGaussian, action=None, trainable=True):
    orbits = Orbits(action or ACTIONS["C4 on a kernel"])
    loc, log_scale = random(orbits.dimension, seed=1), 0.3 * random(orbits.dimension, seed=2) - 1
    rest = (torch.where(random(orbits.dimension) < 0, -1, 1),) if family is LogNormal else ()
    return Tied(family(loc, log_scale, *rest, trainable=trainable), orbits)


INDEPENDENT = (MeanFieldGaussian, Laplace, LogNormal)
SOME_ACTIONS = [ACTIONS[name] for name in ("C4 on a kernel", "some signs change", "D4", "all signs change")]


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
    with pytest.raises(Refusal, match="infinite"):  # as many orbits, other ones
        law.kl(Tied(law.base, Orbits(Action.product(natural_action(Permutations(3)), Action.trivial(Permutations(3), (3,))))))
    with pytest.raises(Refusal, match="one coordinate an orbit"):
        Tied(full, law.orbits)


def test_tied_laws_under_maps():
    law, turns = tied_law(), ACTIONS["C4 on a kernel"]
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
    signed = tied_law(action=ACTIONS["some signs change"])
    assert signed.is_closed_under(ACTIONS["some signs change"])
    kept = signed.push_forward(ACTIONS["some signs change"](1))
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
    x = random(3, 1, 4, 4)
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
    x = random(6, 1, 4, 4)

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
    x = random(2, 1, 4, 4)
    plain = posterior_mean_network(tied)
    assert_close(plain(x), apply_weights(tied, x, mean_weights(tied))[0])
    assert_close(plain(torch.rot90(x, 1, (-2, -1))), plain(x))
    assert multiply_adds(tied, (1, 4, 4)) == multiply_adds(network, (1, 4, 4))
    with pytest.raises(Refusal, match="Flipout"):
        forward(tied, x, 1, "flipout")
    for estimator in ("split", "local"):
        assert forward(tied, x, 2, estimator, seeded()).shape == (1, 2, 3)
    optimizer = make_optimizer(tied, TrainingConfig(weight_decay=0.1, scale_rate=0.5))
    scales = {id(tensor.posterior.base.log_scale) for tensor in variational_tensors(tied).values()}
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == scales
    keep_invariant(tied, action)  # an invariant network like any other


def test_tie_refuses():
    network, action = bayesian(norm=True, hidden="regular")
    with pytest.raises(Refusal, match=r"no posterior.*1\.weight"):
        tie(network, action)
    plain = plain_cnn()
    plain.insert(1, nn.BatchNorm2d(4, affine=False).double())
    network = with_posteriors(plain)
    with pytest.raises(Refusal, match="running_mean"):
        tie(network, network_action(network, field(rotations(), (1, 4, 4)), hidden="regular"))
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


def test_marginals_of_independent_families():
    index = torch.tensor([3, 0])
    law = LogNormal(random(2, 2), torch.zeros(()).double(), torch.tensor([[1, 1], [1, -1]]))
    some = law.marginal(index)
    assert some.shape == (2,) and some.mask.tolist() == [-1, 1]
    assert torch.equal(some.loc, law.loc.flatten()[index]) and torch.equal(some.mean, law.mean.flatten()[index])
    with pytest.raises(Refusal, match="correlated"):
        FullGaussian.initial(random(2, 2), 0.1).marginal(index)
