"""What gradients, optimisers and the law of training keep of a symmetry."""

import pytest
import torch
from torch import nn

from helpers import normal, seeded
from helpers_equivariance import (
    BROKEN,
    CASES,
    CYCLE,
    PLANE,
    augmented,
    closed_noise,
    each_case,
    gap_of,
    network_of,
    noise_of,
    posteriors,
    shifting,
    transported,
    turning,
)
from symbnn.posterior.block_gaussian import BlockGaussian
from symbnn.posterior.elbo import elbo
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.layers import with_posteriors
from symbnn.posterior.likelihoods import Categorical
from symbnn.posterior.priors import isotropic
from symbnn.posterior.sampling import apply_weights
from symbnn.symmetry.signed_permutations import SignedPermutation
from tolerances import assert_close, exact64, within_standard_errors


def moved_network(network, plain, action, g, family=MeanFieldGaussian):
    """A network of the same architecture whose posterior is the push-forward of this one's."""
    moved = with_posteriors(plain, family)
    for name, posterior in posteriors(network).items():
        pushed = posterior.push_forward(action.parameters[name](g))
        posteriors(moved)[name].load_state_dict(pushed.state_dict())
    return moved


def gradient(network, noise, x, labels, num_data):
    network.zero_grad()
    outputs = apply_weights(network, x, transported(network, noise))
    (-elbo(network, outputs, labels, num_data, kl_weight=2.0).elbo).backward()
    return {name: (q.loc.grad.expand(q.shape), q.log_scale.grad.expand(q.shape))
            for name, q in posteriors(network).items()}


@each_case
@pytest.mark.parametrize("family", [MeanFieldGaussian, Laplace, BlockGaussian])
def test_the_gradient_moves_with_parameters_noise_and_batch(case, family):
    plain, _ = CASES[case]()
    network, action = network_of(case, family)
    x, labels, noise = normal(3, *action.input.shape), torch.tensor([0, 2, 1]), noise_of(network, 2)
    here = gradient(network, noise, x, labels, 12)
    for g in action.group.elements():
        moved = moved_network(network, plain, action, g, family)
        there = gradient(moved, action.act(g, noise), action.input.act(g, x),
                         Categorical().move(action.output, g, labels), 12)
        for name, (loc, log_scale) in here.items():
            move = action.parameters[name]
            assert_close(there[name][0], move.act(g, loc))
            assert_close(there[name][1], move.absolute().act(g, log_scale))


def averaged(network, action):
    """Put locations and log-scales on their orbit means."""
    elements = action.group.elements()
    for name, q in posteriors(network).items():
        move = action.parameters[name]
        for value, way in ((q.loc, move), (q.log_scale, move.absolute())):
            value.data = sum(way.act(g, value.data) for g in elements) / len(elements)


@pytest.mark.parametrize("case", ["shifts of inputs and classes", "turns of the plane", "C4 on images"])
def test_a_full_gradient_at_an_invariant_posterior_is_invariant(case):
    network, action = network_of(case)
    averaged(network, action)
    x, labels = normal(3, *action.input.shape), torch.tensor([0, 2, 1])
    full_x, full_labels = augmented(action, x, labels)
    noise = closed_noise(network, action, 2)

    def asymmetry(gradients):
        gaps = [action.parameters[name].act(g, loc) - loc for name, (loc, _) in gradients.items()
                for g in action.group.generators()]
        return max(gap.abs().max().item() for gap in gaps)

    assert asymmetry(gradient(network, noise, full_x, full_labels, len(full_x))) < exact64
    assert asymmetry(gradient(network, noise, x, labels, len(x))) > 1e-3  # without augmentation
    some = {name: value[:2] for name, value in noise.items()}
    assert asymmetry(gradient(network, some, full_x, full_labels, len(full_x))) > 1e-4  # with unclosed noise


OPTIMISERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "Nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, 0.03, weight_decay=0.1),
    "AMSGrad": lambda p: torch.optim.Adam(p, 0.03, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.03, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.02),
}
CLIPS = {"no clipping": lambda p: None, "by norm": lambda p: nn.utils.clip_grad_norm_(p, 0.3),
         "by value": lambda p: nn.utils.clip_grad_value_(p, 0.05)}


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", OPTIMISERS)
def test_coupled_runs_mirror_each_other(name, clip):
    """From eta with noise and from A eta with moved noise and batches: A times the trajectory, to rounding."""
    plain, action = turning()
    first, g = network_of("turns of the plane")[0], 1
    second = moved_network(first, plain, action, g)
    x, generator = normal(6, 2), seeded(5)
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    optimisers = [OPTIMISERS[name](network.parameters()) for network in (first, second)]
    for step in range(25):
        turns, rows = (torch.randint(high, (4,), generator=generator) for high in (4, 6))
        batch = torch.stack([PLANE.act(int(k), x[row]) for k, row in zip(turns, rows)])
        noise = noise_of(first, 2, seed=step)
        for network, optimiser, images, eps in ((first, optimisers[0], batch, noise),
                                                (second, optimisers[1], PLANE.act(g, batch), action.act(g, noise))):
            gradient(network, eps, images, labels[rows], 24)
            CLIPS[clip](network.parameters())
            optimiser.step()
    apart = 0.0
    for key, q in posteriors(first).items():
        other, mirrored = posteriors(second)[key], q.push_forward(action.parameters[key](g))
        assert_close(other.loc, mirrored.loc)
        assert_close(other.log_scale, mirrored.log_scale)
        apart = max(apart, (other.loc - q.loc).abs().max().item())
    assert apart > 0.1


@pytest.mark.parametrize("name", OPTIMISERS)
def test_which_maps_an_optimiser_commutes_with(name):
    start, gradients = normal(6), normal(5, 6, seed=1)
    signed = SignedPermutation(torch.tensor([2, 0, 1, 5, 3, 4]), torch.tensor([1, -1, 1, 1, -1, -1]))
    rotation = torch.linalg.qr(normal(6, 6, seed=2))[0]

    def end(start, gradients):
        parameter = nn.Parameter(start.clone())
        optimiser = OPTIMISERS[name]([parameter])
        for each in gradients:
            parameter.grad = each.clone()
            optimiser.step()
        return parameter.detach()

    assert torch.equal(end(signed(start), signed(gradients)), signed(end(start, gradients)))
    error = (end(start @ rotation.mT, gradients @ rotation.mT) - end(start, gradients) @ rotation.mT).abs().max()
    assert error < exact64 if name in ("SGD", "momentum", "Nesterov") else error > 1e-3


@pytest.mark.parametrize("name", OPTIMISERS)
def test_noise_free_training_stays_invariant(name):
    network, action = network_of("turns of the plane")
    averaged(network, action)
    full_x, full_labels = augmented(action, normal(3, 2), torch.tensor([0, 2, 1]))
    noise, optimiser = closed_noise(network, action, 3), OPTIMISERS[name](network.parameters())
    start = {key: q.loc.detach().clone() for key, q in posteriors(network).items()}
    for _ in range(30):
        gradient(network, noise, full_x, full_labels, len(full_x))
        optimiser.step()
    for key, q in posteriors(network).items():
        assert_close(action.parameters[key].act(1, q.loc), q.loc)
        assert_close(action.parameters[key].absolute().act(1, q.log_scale), q.log_scale)
    assert max((q.loc - start[key]).abs().max() for key, q in posteriors(network).items()) > 0.1


def runs_of_training(batches="pairs", start=0.0, optimiser="Adam", runs=1000, steps=25):
    """Class probabilities of one draw of each run at a test input, turned back: (runs, turns, classes)."""
    plain, action = shifting()
    by_run = torch.vmap(lambda weights, x: torch.func.functional_call(plain, weights, (x,)))
    generator, elements = seeded(6), range(4)
    x, labels = normal(6, 4, seed=1), torch.tensor([0, 2, 1, 1, 3, 0])
    every = torch.stack([CYCLE.act(g, x) for g in elements])
    classes = torch.stack([Categorical().move(CYCLE, g, labels) for g in elements])
    test = torch.stack([CYCLE.act(g, normal(4, seed=2)) for g in elements]).expand(runs, -1, -1)
    laws = {}
    for name, move in action.parameters.items():
        loc = start * normal(*move.shape, seed=8) + 0.5 * torch.randn(runs, *move.shape, generator=generator,
                                                                     dtype=torch.float64)
        laws[name] = MeanFieldGaussian(loc, torch.full_like(loc, -2.0))
    stepper = OPTIMISERS[optimiser]([p for q in laws.values() for p in q.parameters()])
    for _ in range(steps):
        turn, row = (torch.randint(high, (runs, 6), generator=generator) for high in (4, 6))
        if batches == "one turn each":
            row = torch.arange(6).expand(runs, -1)
        if batches == "data as given":
            turn = torch.zeros_like(turn)
        weights = {name: q.rsample(1, generator)[0] for name, q in laws.items()}
        logits = by_run(weights, every[turn, row]).transpose(1, 2)
        loss = nn.functional.cross_entropy(logits, classes[turn, row], reduction="none").mean(1).sum()
        loss = loss + sum(q.kl(isotropic()(name, q)) for name, q in laws.items()) / 24
        stepper.zero_grad()
        loss.backward()
        stepper.step()
    with torch.no_grad():
        weights = {name: q.rsample(1, generator)[0] for name, q in laws.items()}
        p = by_run(weights, test).softmax(-1)
    return torch.stack([CYCLE.act(CYCLE.group.inverse(g), p[:, g]) for g in elements], 1)


@pytest.mark.parametrize("optimiser", ["Nesterov", "Adam", "AdamW"])
@pytest.mark.parametrize("batches", ["pairs", "one turn each"])
def test_the_average_over_runs_is_equivariant(optimiser, batches):
    p = runs_of_training(batches, optimiser=optimiser)
    mean, error = gap_of(p)
    within_standard_errors(mean, torch.zeros_like(mean), error)
    assert (p[:, 1:] - p[:, :1]).abs().mean() > 0.05  # no single run is
    assert error.max() < 0.03


@pytest.mark.parametrize("broken", [{"batches": "data as given"}, {"start": 2.0}], ids=str)
def test_and_is_not_where_sampling_or_start_prefer_a_direction(broken):
    mean, error = gap_of(runs_of_training(**broken, steps=10))
    assert (mean.abs() / error).max() > BROKEN
