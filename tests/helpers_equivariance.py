"""What tests of the chapters on equivariance share: random numbers, networks with actions, invariant starts."""

import operator

import pytest
import torch
from torch import nn

from helpers import normal, seeded
from symbnn.data.splits import Split
from symbnn.equivariance.metrics import (
    accuracy,
    brier,
    defect_plugin,
    ece,
    nll,
    orbit_agreement,
    orbit_jensen_shannon,
    symmetric_kl,
)
from symbnn.equivariance.projected_gradients import parameter_actions
from symbnn.posterior.families import FAMILIES
from symbnn.posterior.independent import MeanFieldGaussian
from symbnn.posterior.layers import variational_tensors, with_posteriors
from symbnn.posterior.likelihoods import Categorical
from symbnn.posterior.log_normal import LogNormal
from symbnn.posterior.sampling import apply_weights, mean_weights
from symbnn.symmetry.actions import Action, natural_action, regular_channels, sign_change
from symbnn.symmetry.fields import field, flips, rotations, rotations_and_flips, shifts, time_reversal
from symbnn.symmetry.groups import Cyclic, Permutations, Product
from symbnn.symmetry.networks import network_action, unit_permutations
from symbnn.symmetry.orbits import Orbits
from symbnn.symmetry.signed_permutations import SignedPermutation
from tolerances import exact64


def at_most(lower, upper):
    """Ordered, up to float64 rounding."""
    assert bool((torch.as_tensor(lower) <= torch.as_tensor(upper) + exact64).all())


LAWS = [name for name in FAMILIES if name not in ("point", "kronecker")]  # no density, and a suite of its own


def classifier(seed=0, circular=False):
    torch.manual_seed(seed)
    mode = "circular" if circular else "zeros"
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode=mode), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                         nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).double()


BROKEN = 10  # standard errors by which equivariance is lost where a condition is broken
CYCLE = regular_channels(Cyclic(4), 1)  # four coordinates, shifted

QUARTER = torch.tensor([[0, -1], [1, 0]])
PLANE = Action(Cyclic(4), (2,), lambda g: SignedPermutation.from_matrix(torch.matrix_power(QUARTER, g)), "plane")


def shifting():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    return network, network_action(network, CYCLE, output=CYCLE)


def turning():
    """Quarter turns of the plane, which change signs of weights and, through an odd activation, of hidden units."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return network, network_action(network, PLANE, hidden="regular")


def cnn(space):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1), nn.ReLU(), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(32, 3)).double()
    return network, network_action(network, field(space, (1, 4, 4)))


def units():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    return network, unit_permutations(network, (3,))


CASES = {
    "shifts of inputs and classes": shifting,
    "turns of the plane": turning,
    "C4 on images": lambda: cnn(rotations()),
    "D4 on images": lambda: cnn(rotations_and_flips()),
    "hidden units": units,
}

each_case = pytest.mark.parametrize("case", CASES)


def network_of(case, family=MeanFieldGaussian, scale=0.4):
    """A Bayesian network whose scales differ from weight to weight, and its action."""
    plain, action = CASES[case]()
    network = with_posteriors(plain, family, scale=scale)
    for k, tensor in enumerate(variational_tensors(network).values()):
        log_scale = getattr(tensor.posterior, "log_scale", None)
        if log_scale is not None:
            log_scale.data = log_scale.data + 0.3 * normal(*log_scale.shape, seed=k)
    return network, action


def posteriors(network):
    return {name: tensor.posterior for name, tensor in variational_tensors(network).items()}


def transported(network, noise):
    return {name: posterior.transport(noise[name]) for name, posterior in posteriors(network).items()}


def noise_of(network, draws, seed=3):
    generator = seeded(seed)
    return {name: posterior.noise(draws, generator) for name, posterior in posteriors(network).items()}


def augmented(action, x, labels):
    elements = action.group.elements()
    move = [Categorical().move(action.output, g, labels) for g in elements]
    return torch.cat([action.input.act(g, x) for g in elements]), torch.cat(move)


def closed_noise(network, action, draws, seed=4):
    elements, noise = action.group.elements(), noise_of(network, draws, seed)
    return {name: torch.cat([action.parameters[name].act(g, some) for g in elements]) for name, some in noise.items()}


def gap_of(p):
    """Mean and standard error over the first axis of the differences between turns, for predictions (., turns, .)."""
    gap = p[:, 1:] - p[:, :1]
    return gap.mean(0), gap.std(0) / len(gap) ** 0.5


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


SIGNED_ACTIONS = {
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


def group_mean(action, x):
    return torch.stack([action.act(g, x) for g in action.group.elements()]).mean(0)


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


def data(n=16):
    return Split(normal(n, 1, 4, 4).float(), torch.arange(n) % 3)


SCORES = (accuracy, nll, brier, ece)
EQUIVARIANCE = (defect_plugin, orbit_jensen_shannon, symmetric_kl, orbit_agreement)


def random_predictions(S, N, G, C, seed, sharpness=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(S, N, G, C, generator=generator, dtype=torch.float64)
    return logits.softmax(-1).to(dtype), torch.randint(C, (N,), generator=generator)


def which_way_up():
    """A classifier of four turns, with the action that shifts its classes when the image is turned."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 4)
    plain, output = nn.Sequential(*layers).double(), regular_channels(Cyclic(4), 1)
    return plain, network_action(plain, field(rotations(), (1, 4, 4)), hidden="regular", output=output)


TWO_LOGITS = r"nn\.Linear\(features, 2\)"
FOUND = 1e-6  # what L-BFGS leaves of the distance to a minimum: the root of float64 rounding in the cost, and some room


def pushes(family, action):
    return [family.push_forward(action(g)).freeze() for g in action.group.elements()]


def convolutional(family=MeanFieldGaussian, channels=(4, 4), norm=True, prior=None, scale=0.2):
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(1, channels[0], 3, padding=1), *[nn.BatchNorm2d(channels[0])] * norm, nn.Tanh(),
        nn.Conv2d(channels[0], channels[1], 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(channels[1], 3),
    ).double()
    if norm:
        plain(normal(20, 1, 6, 6, seed=9))
        nn.init.normal_(plain[1].weight, generator=seeded(3))
        nn.init.normal_(plain[1].bias, generator=seeded(4))
    network = with_posteriors(plain.eval(), family, scale=scale, prior=prior)
    return spread(network)


@torch.no_grad()
def spread(network):
    """Scales that differ from weight to weight."""
    for k, tensor in enumerate(variational_tensors(network).values()):
        for name, value in tensor.posterior.named_parameters():
            if name == "log_scale":
                value.add_(0.3 * normal(*value.shape, seed=k))
            elif name == "factor":
                value.add_(0.05 * normal(*value.shape, seed=k).tril())
    return network


def dense(inputs=4, hidden=8, out=4, family=MeanFieldGaussian, **options):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, out)).double()
    return spread(with_posteriors(plain, family, **({"scale": 0.3} | options)))


def series():
    torch.manual_seed(0)
    around = dict(padding=1, padding_mode="circular")
    layers = [nn.Conv1d(2, 6, 3, **around), nn.ReLU(), nn.Conv1d(6, 4, 3, **around), nn.Tanh(), nn.Flatten()]
    return spread(with_posteriors(nn.Sequential(*layers, nn.Linear(24, 3)).double(), scale=0.2))


ON_SET = natural_action(Permutations(4))


def two_sets(name, size):
    return Action(ON_SET.group, (size,), lambda g: SignedPermutation.direct_sum(ON_SET(g), ON_SET(g)), "two sets")


NETWORKS = {
    "C4 trivial": lambda: (convolutional(), dict(input=field(rotations(), (1, 6, 6)))),
    "C4 regular": lambda: (convolutional(), dict(input=field(rotations(), (1, 6, 6)), hidden="regular")),
    "D4 regular": lambda: (convolutional(channels=(8, 8)),
                           dict(input=field(rotations_and_flips(), (1, 6, 6)), hidden="regular")),
    "flips": lambda: (convolutional(), dict(input=field(flips(), (1, 6, 6)), hidden="regular")),
    "circular shifts": lambda: (series(), dict(input=field(shifts(3, step=2, ndim=1), (2, 6)))),
    "time reversal": lambda: (series(), dict(input=field(time_reversal(), (2, 6)), hidden="regular")),
    "set, invariant": lambda: (dense(), dict(input=ON_SET)),
    "set, equivariant": lambda: (dense(), dict(input=ON_SET, output=ON_SET)),
    "two sets": lambda: (dense(), dict(input=ON_SET, output=ON_SET, hidden=two_sets)),
    "odd": lambda: (dense(), dict(input=sign_change(4), output=sign_change(4), hidden=lambda _, n: sign_change(n))),
    "even": lambda: (dense(), dict(input=sign_change(4))),
}


def pair(case):
    network, how = NETWORKS[case]()
    return network, network_action(network, **how)


@torch.no_grad()
def defect(network, action, weights=None):
    """The largest change of outputs under the group, at the mean weights unless others are given."""
    x, weights = normal(3, *action.input.shape, seed=7), weights or mean_weights(network)
    f = torch.stack([action.output.act(action.group.inverse(g), apply_weights(network, action.input.act(g, x), weights))
                     for g in action.group.elements()])
    return (f - f[0]).abs().max().item()
