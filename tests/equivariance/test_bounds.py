"""Bounds: at least the exact quantity on random distributions, equal where they should be, 0 where nothing moves."""
import copy
import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from symbnn.equivariance import bounds as B
from symbnn.equivariance.metrics import defect_plugin, orbit_jensen_shannon
from symbnn.equivariance.predictions import orbit_predictions
from symbnn.errors import Refusal
from symbnn.posterior.block_gaussian import BlockGaussian
from symbnn.posterior.families import FAMILIES
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.layers import VariationalTensor, variational_tensors, with_posteriors
from symbnn.posterior.log_normal import LogNormal
from symbnn.posterior.priors import fixed_means, isotropic, random_means
from symbnn.symmetry.actions import Action, natural_action, regular_channels, sign_change
from symbnn.symmetry.fields import field, flips, half_turns, rotations, rotations_and_flips
from symbnn.symmetry.groups import Cyclic, Dihedral, Product, Permutations
from symbnn.symmetry.networks import network_action, unit_permutations
from symbnn.symmetry.signed_permutations import SignedPermutation
from tolerances import assert_close, exact64, standard_errors, within_standard_errors

seeds = st.integers(0, 10_000)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def simplex(*shape, seed=0, concentration=0.5):
    """Random probability vectors along the last axis, some of them near corners."""
    logits = normal(*shape, seed=seed) / concentration
    return logits.softmax(-1)


def at_most(lower, upper):
    """Ordered, up to float64 rounding."""
    assert bool((torch.as_tensor(lower) <= torch.as_tensor(upper) + exact64).all())


# --- total variation from KL and affinity ---

@given(seeds, st.integers(2, 6))
def test_every_bound_covers_the_total_variation_of_finite_distributions(seed, classes):
    p, q = simplex(2, 200, classes, seed=seed)
    tv = B.total_variation(p, q)
    kl, affinity = (p * (p / q).log()).sum(-1).clamp_min(0), (p * q).sqrt().sum(-1).clamp_max(1)
    subsets = torch.tensor(list(itertools.product((0.0, 1.0), repeat=classes)), dtype=torch.float64)
    assert_close(tv, ((p - q) @ subsets.T).amax(1))  # the largest change of the probability of any event
    for bound in (B.pinsker(kl), B.bretagnolle_huber(kl), B.hellinger(affinity.log())):
        at_most(tv.square(), bound.square())
    at_most(B.hellinger(affinity.log()).square(), B.bretagnolle_huber(kl).square())
    at_most((p - q).square().sum(-1), 2 * tv.square())
    at_most(tv, math.sqrt(classes) / 2 * (p - q).norm(dim=-1))


@pytest.mark.parametrize("a", [0.0, 0.1, 0.3, 0.5])
def test_a_swapped_pair_attains_the_affinity_bound(a):
    p = torch.tensor([a, 1 - a], dtype=torch.float64)
    assert_close(B.total_variation(p, p.flip(0)), 1 - 2 * a)
    assert_close(B.hellinger((p * p.flip(0)).sqrt().sum().log()), 1 - 2 * a, 1e-7 if a == 0.5 else exact64)


def test_constants_of_the_small_gap():
    """Pinsker's and the information bound are equalities to first order for a pair that is almost even."""
    p = torch.tensor([0.5005, 0.4995], dtype=torch.float64)
    kl, information = (p * (p / p.flip(0)).log()).sum(), (p * (2 * p).log()).sum()
    for bound in (B.pinsker(kl), B.through_information(information)):
        assert 1 <= bound / 1e-3 < 1 + 1e-6
    assert_close(B.pinsker(torch.tensor(2.0)), 1.0)
    assert_close(B.through_information(torch.tensor(0.5)), 1.0)
    assert_close(B.bretagnolle_huber(torch.tensor(math.log(4 / 3), dtype=torch.float64)), 0.5)


# --- closed forms of the families ---

def gaussian_tv(m1, s1, m2, s2):
    """Exact total variation of two normals on the line, from the crossings of their densities."""
    a, b = 1 / s2**2 - 1 / s1**2, 2 * (m1 / s1**2 - m2 / s2**2)
    c = m2**2 / s2**2 - m1**2 / s1**2 + 2 * math.log(s2 / s1)
    if abs(a) < 1e-12:
        roots = [] if abs(b) < 1e-12 else [-c / b]
    else:
        centre, radius = -b / (2 * a), math.sqrt(max(0.0, b * b - 4 * a * c)) / (2 * abs(a))
        roots = [centre - radius, centre + radius]

    def mass(m, s):
        cuts = [0.0, *((1 + math.erf((r - m) / (s * math.sqrt(2)))) / 2 for r in roots), 1.0]
        return torch.tensor([cuts[k + 1] - cuts[k] for k in range(len(cuts) - 1)], dtype=torch.float64)

    return B.total_variation(mass(m1, s1), mass(m2, s2))


@given(st.floats(-3, 3), st.floats(0.2, 3), st.floats(-3, 3), st.floats(0.2, 3))
def test_gaussians_on_the_line(m1, s1, m2, s2):
    q, p = (MeanFieldGaussian(*torch.tensor([[m], [math.log(s)]], dtype=torch.float64))
            for m, s in ((m1, s1), (m2, s2)))
    exact = gaussian_tv(m1, s1, m2, s2)
    for bound in (B.pinsker(q.kl(p)), B.bretagnolle_huber(q.kl(p)), B.hellinger(B.log_affinity(q, p))):
        at_most(exact, bound + 1e-7)  # of a root of a rounded difference
    assert_close(B.wasserstein2_squared(q, p), (m1 - m2) ** 2 + (s1 - s2) ** 2)


LAWS = [name for name in FAMILIES if name != "point"]  # a point mass has no density


def one_weight(name, loc, log_scale):
    loc, log_scale = torch.tensor([[loc], [log_scale]], dtype=torch.float64)
    if name == "lognormal":
        return LogNormal(loc, log_scale, torch.tensor([-1]))
    return FullGaussian(loc, log_scale.exp()[:, None]) if name == "full" else FAMILIES[name](loc, log_scale)


def quantile(q, z):
    """The quantile function at the normal probability of `z`, written here, to integrate the monotone plan."""
    if isinstance(q, Laplace):
        return q.loc - q.scale * z.sign() * (math.log(2) + torch.special.log_ndtr(-z.abs()))
    return -(q.loc - q.scale * z).exp() if isinstance(q, LogNormal) else q.loc + q.scale.flatten() * z


@pytest.mark.parametrize("name", LAWS)
@settings(max_examples=10)
@given(st.floats(-1, 1), st.floats(-1, 0.3), st.floats(-1, 1), st.floats(-1, 0.3))
def test_affinity_and_distance_by_integration(name, l1, s1, l2, s2):
    q, p = one_weight(name, l1, s1), one_weight(name, l2, s2)
    line = torch.linspace(-40, 40, 40_001, dtype=torch.float64)
    grid = -line.exp() if name == "lognormal" else line
    jacobian = line.exp() if name == "lognormal" else torch.ones_like(line)
    inside = grid.abs() > 0
    with torch.no_grad():
        logs = torch.stack([m.log_prob(grid[inside][:, None]) for m in (q, p)])
        affinity, tv = (torch.trapezoid(values * jacobian[inside], line[inside]) for values in (
            (logs.sum(0) / 2).exp(), (logs[0].exp() - logs[1].exp()).abs() / 2))
        # the kinks of Laplace densities and of |q - p| cost the square of the step, 4e-6
        assert abs(B.log_affinity(q, p).exp() - affinity) < 1e-5
        at_most(tv, B.hellinger(B.log_affinity(q, p)) + 1e-5)
        assert_close(B.log_affinity(q, p), B.log_affinity(p, q))
        z = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
        density = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
        cost = torch.trapezoid((quantile(q, z) - quantile(p, z)).square() * density, z)
        found = B.wasserstein2_squared(q, p)
        assert_close(found, cost, 1e-6)  # the kink of a Laplace quantile function at its median
        assert_close(found, B.wasserstein2_squared(p, q))


def test_laplace_affinity_at_its_limits():
    for d, gap in ((0.7, 0.0), (0.7, 1e-9), (0.0, 0.5), (30.0, 2.0)):
        q, p = one_weight("laplace", 0.0, 0.0), one_weight("laplace", d, gap)
        a, b = 0.5, math.exp(-gap) / 2
        middle = d * math.exp(-a * d) if gap < 1e-6 else (math.exp(-a * d) - math.exp(-b * d)) / (b - a)
        exact = math.sqrt(a * b) * ((math.exp(-a * d) + math.exp(-b * d)) / (a + b) + middle)
        assert abs(B.log_affinity(q, p) - math.log(exact)) < 1e-8  # of the equal-rate limit at 1e-9


@given(seeds)
def test_full_and_independent_gaussians_agree_and_bures_in_two_dimensions(seed):
    loc, log_scale = normal(2, 4, seed=seed), 0.5 * normal(2, 4, seed=seed + 1)
    plain = [MeanFieldGaussian(loc[k], log_scale[k]) for k in range(2)]
    full = [FullGaussian(loc[k], log_scale[k].exp().diag()) for k in range(2)]
    assert_close(B.log_affinity(*full), B.log_affinity(*plain))
    assert_close(B.wasserstein2_squared(*full), B.wasserstein2_squared(*plain))
    turn = torch.linalg.qr(normal(4, 4, seed=seed + 2)).Q  # one rotation of both laws changes nothing
    turned = [q.push_forward(turn) for q in full]
    assert_close(B.log_affinity(*turned), B.log_affinity(*full), 1e-10)
    assert_close(B.wasserstein2_squared(*turned), B.wasserstein2_squared(*full), 1e-10)
    one, two = (normal(2, 2, seed=seed + k).tril(-1) + normal(2, seed=seed + 9 + k).exp().diag() for k in range(2))
    q, p = (FullGaussian(torch.zeros(2).double(), root) for root in (one, two))
    first, second = one @ one.T, two @ two.T
    cross = (torch.trace(first @ second) + 2 * (torch.det(first) * torch.det(second)).sqrt()).sqrt()  # 2 x 2 only
    assert_close(B.wasserstein2_squared(q, p), torch.trace(first) + torch.trace(second) - 2 * cross, 1e-10)


def test_different_laws_are_refused():
    q = one_weight("gaussian", 0.0, 0.0)
    for other in (one_weight("laplace", 0.0, 0.0), MeanFieldGaussian(torch.zeros(2).double(), torch.zeros(2).double())):
        for function in (B.log_affinity, B.wasserstein2_squared):
            with pytest.raises(Refusal, match="one family"):
                function(q, other)
    masks = [LogNormal(torch.zeros(1), torch.zeros(1), torch.tensor([sign])) for sign in (1, -1)]
    with pytest.raises(Refusal, match="sign masks"):
        B.log_affinity(*masks)


# --- over groups ---

ACTIONS = {
    "C2 signs": sign_change(4), "C3": regular_channels(Cyclic(3)), "C4": rotations().on(3, 3), "C2": flips().on(2, 3),
    "half": half_turns().on(2, 3), "D4": rotations_and_flips().on(3, 3), "D3": regular_channels(Dihedral(3)),
    "S3": natural_action(Permutations(3)), "C2xC3": regular_channels(Product(Cyclic(2), Cyclic(3))),
}


class OneTensor(nn.Module):
    """A network of one tensor, for the divergences alone."""

    def __init__(self, posterior, prior=None):
        super().__init__()
        self.weight = VariationalTensor(posterior, prior or isotropic()("weight", posterior))


class TensorAction:
    """An action on one tensor, with what the bounds ask of a network's action."""

    def __init__(self, action):
        self.group, self.parameters = action.group, {"weight": action}


def member(name, shape, seed):
    loc, log_scale = normal(*shape, seed=seed), 0.3 * normal(*shape, seed=seed + 1) - 1
    if name == "full":
        return FullGaussian(loc, log_scale.exp().flatten().diag())
    if name == "lognormal":
        return LogNormal(loc, log_scale, torch.ones(shape))
    return FAMILIES[name](loc, log_scale)


@pytest.mark.parametrize("which", ACTIONS)
@pytest.mark.parametrize("name", LAWS)
def test_divergences_over_every_small_group(which, name):
    action = ACTIONS[which]
    if name == "lognormal" and not action.is_unsigned():
        with pytest.raises(Refusal, match="sign mask"):
            B.push_forward_divergences(OneTensor(member(name, action.shape, 0)), TensorAction(action))
        return
    q, group = member(name, action.shape, 3), action.group
    kl, affinity, moves = B.push_forward_divergences(OneTensor(q), TensorAction(action))
    assert kl[0] == 0 and abs(affinity[0]) < exact64 and moves["weight"][0] < exact64
    with torch.no_grad():
        for k, g in enumerate(group.elements()):
            moved = q.push_forward(action(g))
            assert_close(kl[k], min(moved.kl(q), q.kl(moved)), 1e-10)  # both directions
            assert_close(affinity[k], B.log_affinity(q, moved), 1e-10)
            assert_close(moves["weight"][k], B.wasserstein2_squared(q, moved), 1e-10)
            back = group.index(group.inverse(g))
            assert_close(affinity[back], affinity[k], 1e-10)
    at_most(B.hellinger(affinity).square(), B.bretagnolle_huber(kl).square())
    assert B.hellinger(affinity)[0] == 0 or name == "full"
    assert kl[1:].max() > 1e-2


@pytest.mark.parametrize("which", ACTIONS)
@pytest.mark.parametrize("name", ["gaussian", "laplace"])
def test_divergences_grow_with_asymmetry_and_start_at_zero(which, name):
    action, previous = ACTIONS[which], None
    loc = normal(*action.shape, seed=1)
    average = sum(action.act(g, loc) for g in action.group.elements()) / action.group.order
    for left in (0.0, 0.01, 0.1, 0.5, 1.0):
        q = FAMILIES[name](average + left * (loc - average), torch.full(action.shape, -1.0).double())
        kl, affinity, moves = B.push_forward_divergences(OneTensor(q), TensorAction(action))
        now = torch.stack([kl, -affinity, moves["weight"]])[:, 1:]
        if previous is None:
            assert now.max() < exact64
        else:
            assert bool((now >= previous).all()) and (now > previous).any()
        previous = now


def test_single_precision_parameters_are_compared_in_double():
    action, loc = ACTIONS["C4"], normal(3, 3, seed=1).float()
    q = MeanFieldGaussian(loc, torch.full((3, 3), -1.3))
    single = B.push_forward_divergences(OneTensor(q), TensorAction(action))
    double = B.push_forward_divergences(OneTensor(MeanFieldGaussian(q.loc.double(), q.log_scale.double())),
                                        TensorAction(action))
    assert torch.equal(single.kl, double.kl) and torch.equal(single.log_affinity, double.log_affinity)
    assert q.loc.dtype == torch.float32


def test_block_gaussian_over_a_kernel():
    loc, action = normal(2, 3, 3, seed=0), Action.product(Action.trivial(Cyclic(4), (2,)), rotations().kernel(3, 3))
    block = BlockGaussian(loc, torch.tensor([[[-1.0]], [[0.3]]]).double())
    spread = MeanFieldGaussian(loc, torch.tensor([[[-1.0]], [[0.3]]]).double().expand(2, 3, 3))
    found = [B.push_forward_divergences(OneTensor(q), TensorAction(action)) for q in (block, spread)]
    for ours, theirs in zip(found[0][:2], found[1][:2], strict=True):
        assert_close(ours, theirs)
    assert_close(found[0].wasserstein2_squared["weight"], found[1].wasserstein2_squared["weight"])


@given(st.floats(0, 4))
def test_information_covers_every_pair_of_copies(shift):
    """One weight under the sign flip: exact total variation, information by quadrature."""
    z = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    weights = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    information = torch.trapezoid(weights * (math.log(2) - torch.nn.functional.softplus(-2 * shift * (z + shift))), z)
    tv = math.erf(shift / math.sqrt(2))
    at_most(tv, B.through_information(information.clamp_min(0)) + 1e-6)


# --- predictions ---

@given(seeds, st.integers(2, 6), st.integers(2, 5))
def test_jensen_shannon_bounds_of_random_orbits(seed, turns, classes):
    means = simplex(100, turns, classes, seed=seed)
    js, tv = B.jensen_shannon(means), B.total_variation(means[:, :, None], means[:, None])
    slow = torch.tensor([[tv[n, g, h] for g in range(turns) for h in range(turns) if g != h] for n in range(100)])
    assert_close(B.orbit_error(means), slow.mean(1))
    at_most(B.orbit_error(means), B.through_jensen_shannon(means))
    at_most((means[:, :, None] - means[:, None]).square().sum(-1).mean((1, 2)), 2 * js)
    at_most(tv.amax((1, 2)), (turns * js).sqrt())
    at_most(js, min(math.log(turns), math.log(classes)))
    assert_close(js.mean(), orbit_jensen_shannon(means[None]))


def test_jensen_shannon_bounds_are_attained():
    almost = torch.tensor([[0.5005, 0.4995], [0.4995, 0.5005]], dtype=torch.float64)
    assert 1 <= B.through_jensen_shannon(almost) / B.orbit_error(almost) < 1 + 1e-6
    same = simplex(1, 1, 3).expand(1, 4, 3)
    assert B.orbit_error(same) == 0 and B.through_jensen_shannon(same) < 1e-7
    assert_close(B.orbit_error(torch.eye(4).double()), 1.0)


# --- Lipschitz ---

def classifier(seed=0, circular=False):
    torch.manual_seed(seed)
    mode = "circular" if circular else "zeros"
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode=mode), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                         nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def with_scale(plain, scale):
    return with_posteriors(plain, scale=scale)


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("scale", [1e-9, 0.3])
def test_lipschitz_bound_covers_the_error_of_a_small_network(circular, scale):
    plain = classifier(circular=circular)
    action = network_action(plain, field(rotations(), (1, 4, 4)))
    network, x = with_scale(plain, scale), normal(6, 1, 4, 4, seed=1)
    bound = B.through_lipschitz(network, action, x)
    P = orbit_predictions(network, x, action, 400 if scale > 0.1 else 1, generator=seeded(0)).probabilities.mean(0)
    error = B.total_variation(P, P[:, :1])
    assert bound.shape == error.shape == (6, 4) and error[:, 1:].min() > 1e-6
    assert bool((bound + exact64 >= error).all())


def test_lipschitz_bound_of_one_linear_layer_in_closed_form():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(9, 3)).double()
    action, x = network_action(plain, field(rotations(), (1, 3, 3))), normal(5, 1, 3, 3, seed=2)
    network = with_posteriors(plain, scale=0.2)
    W = plain[1].weight.detach()
    for k in range(4):
        moved = (action.parameters["1.weight"].act(k, W) - W).norm()
        assert_close(B.through_lipschitz(network, action, x)[:, k], moved * x.flatten(1).norm(dim=1) / math.sqrt(8))


def test_lipschitz_recursion_against_one_written_out():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 8),
                          nn.Tanh(), nn.Linear(8, 3)).double()
    action = network_action(plain, field(rotations(), (1, 4, 4)), hidden="regular")  # biases move as well
    network, x = with_posteriors(plain, scale=0.3), normal(2, 1, 4, 4, seed=1)
    posts = {name: t.posterior for name, t in variational_tensors(network).items()}
    r = {n: math.sqrt(q.mean.square().sum().item() + 0.09 * q.numel) for n, q in posts.items()}
    for k, g in enumerate(action.group.elements()):
        w = {n: (action.parameters[n].act(g, q.mean) - q.mean).norm().item() for n, q in posts.items()}
        for i in range(2):
            size = x[i].norm().item()
            gap1 = 3 * w["0.weight"] * size + 4 * w["0.bias"]  # 9 readers a pixel, 16 places
            size1 = 3 * r["0.weight"] * size + 4 * r["0.bias"]
            gap2 = r["4.weight"] * gap1 + w["4.weight"] * size1 + w["4.bias"]
            size2 = r["4.weight"] * size1 + r["4.bias"]
            gap3 = r["6.weight"] * gap2 + w["6.weight"] * size2 + w["6.bias"]
            assert_close(B.through_lipschitz(network, action, x)[i, k], gap3 / math.sqrt(8))


def as_matrix(function, shape):
    """The matrix of a linear map of inputs of this shape, without the example's axis."""
    with torch.no_grad():
        return function(torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)).flatten(1).T


def stretch_of(pool, shape, seed):
    """The largest factor by which a pool stretches distances: exact for means, seen on random pairs for maxima."""
    if "Avg" in type(pool).__name__:
        return torch.linalg.matrix_norm(as_matrix(pool, shape), 2).item()
    x, y = normal(2, 60, *shape, seed=seed)
    one = torch.zeros_like(x).flatten(1).scatter_(1, normal(60, math.prod(shape), seed=seed).argmax(1)[:, None], 9.0)
    y = torch.cat([y[:30], (x + one.view_as(x))[30:]])  # half of the pairs differ at one pixel
    return ((pool(x) - pool(y)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)).max().item()


def each_pool(draw):
    """Random settings of pools of one or two axes, most of which torch accepts, on inputs of up to 7 pixels."""
    ndim, kind = draw.choice((1, 2)), draw.choice(("Max", "Avg"))
    kernel = tuple(draw.randint(1, 4) for _ in range(ndim))
    stride = draw.choice((None, draw.randint(1, 4), tuple(draw.randint(1, 4) for _ in range(ndim))))
    options = {"padding": tuple(draw.randint(0, k // 2) for k in kernel), "ceil_mode": draw.random() < 0.5}
    if kind == "Max":
        options["dilation"] = draw.choice((1, 1, 2))
    else:
        options["count_include_pad"] = draw.random() < 0.5
    if kind == "Avg" and ndim == 2 and draw.random() < 0.6:
        options["divisor_override"] = draw.choice((-4, -1, 1, 2, 3, 4, 9))
    pool = getattr(nn, f"{kind}Pool{ndim}d")(kernel if draw.random() < 0.7 else kernel[0], stride, **options)
    return pool, (2, *(draw.randint(1, 7) for _ in range(ndim)))


def test_every_pool_that_passes_as_a_contraction_is_one():
    draw, accepted, rejected = random.Random(0), 0, 0
    for trial in range(1500):
        pool, shape = each_pool(draw)
        try:
            norm = stretch_of(pool, shape, trial)
        except RuntimeError:
            continue  # settings that torch refuses
        if B._is_contraction(pool):
            accepted += 1
            assert norm <= 1 + exact64 and not pool(torch.zeros(1, *shape)).any(), (pool, shape, norm)
        else:
            rejected += norm > 1 + exact64  # NaN where torch's window sees no pixel
    assert accepted > 300 and rejected > 200


class Doubled(nn.ReLU):
    def forward(self, x):
        return 2 * super().forward(x)


CONTRACTIONS = [nn.ReLU(), nn.ReLU(inplace=True), nn.Tanh(), nn.LeakyReLU(-1.0), nn.LeakyReLU(0.3), nn.Identity(),
                nn.Dropout(0.5).eval(), nn.Flatten(), nn.Flatten(1, 2), nn.Flatten(2), nn.MaxPool2d((2,), (3, 2)),
                nn.AvgPool2d(2, divisor_override=2), nn.AvgPool2d((1, 3), divisor_override=-2)]
STRETCHING = [nn.LeakyReLU(1.1), nn.LeakyReLU(-1.1), nn.LeakyReLU(math.nan), nn.Dropout(0.5), Doubled(), nn.Flatten(0),
              nn.Sigmoid(), nn.Softplus(), nn.ELU(2.0), nn.AvgPool2d(2, divisor_override=1), nn.MaxPool2d(2, 1),
              nn.MaxPool2d(2, 2, dilation=2), nn.AvgPool2d((3, 1), divisor_override=1), nn.PixelShuffle(1),
              nn.MaxPool2d(2, return_indices=True), nn.Dropout2d(0.5), nn.LPPool2d(2, 2)]


def test_layers_that_stretch_are_not_contractions():
    assert all(B._is_contraction(layer) for layer in CONTRACTIONS)
    assert not any(B._is_contraction(layer) for layer in STRETCHING)
    x, y = normal(2, 40, 2, 4, 6, seed=1) * torch.logspace(-2, 1, 40, dtype=torch.float64)[:, None, None, None]
    for layer in CONTRACTIONS:
        there, gap = (layer(z.clone()) for z in (x, y)), (x - y).flatten(1).norm(dim=1)
        at_most((next(there) - next(there)).flatten(1).norm(dim=1), gap)


def each_convolution(draw):
    ndim, mode = draw.choice((1, 2)), draw.choice(("zeros", "circular"))
    size = tuple(draw.randint(1, 5) for _ in range(ndim))
    numbers = [tuple(draw.randint(1, 3) for _ in range(ndim)) for _ in range(3)]
    padding = draw.choice(("same", "valid", tuple(draw.randint(0, n) for n in size)))
    stride = 1 if padding == "same" else numbers[1]
    groups = draw.choice((1, 2))
    layer = getattr(nn, f"Conv{ndim}d")(2, 2, numbers[0], stride, padding, numbers[2], groups, False, mode)
    return layer.double(), (2, *size)


def unit_taps(layer, shape):
    """The exact number of times that each pixel is read: the sum over outputs of the squares of taps of size one."""
    count = 0
    for tap in range(math.prod(layer.kernel_size)):
        one = copy.deepcopy(layer)
        one.weight.data.zero_()
        one.weight.data.flatten(2)[:, :, tap] = 1.0
        count = count + as_matrix(one, shape).square().sum(0) / (2 // layer.groups)
    return count.max().item()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch on its own speed
def test_kappa_is_the_root_of_the_largest_number_of_reads_and_covers_the_norm():
    """Against the map written out as a matrix: reads counted tap by tap, and the spectral norm of random weights."""
    draw, around, tight = random.Random(1), 0, 0.0
    for _ in range(400):
        layer, shape = each_convolution(draw)
        try:
            kappa = B._stretch(layer, (1, *shape))
            norm = torch.linalg.matrix_norm(as_matrix(layer, shape), 2).item()
        except RuntimeError:
            continue  # a window larger than the padded image, or padding that goes round more than once
        assert_close(kappa**2, unit_taps(layer, shape), 1e-9)
        at_most(norm, kappa * layer.weight.detach().norm())
        around += kappa**2 > math.prod(layer.kernel_size) + 0.5
        tight = max(tight, norm / max(1e-9, kappa * layer.weight.detach().norm().item()))  # 0 where no pixel is read
    assert around > 10 and tight > 0.99


@pytest.mark.parametrize("first, flat, reads", [
    (nn.Conv2d(1, 1, 1, padding=4, padding_mode="circular", bias=False), 144, 9),  # round three times along each axis
    (nn.Conv2d(1, 1, 3, padding=3, padding_mode="circular", bias=False), 64, 36),  # 18 reads of 4 pixels: at most 6
    (nn.Conv2d(1, 1, 2, stride=2, bias=False), 4, 1),  # four taps, each on pixels of its own
    (nn.Conv2d(1, 1, 1, padding=1, bias=False), 36, 1),
])
def test_the_bound_of_a_network_counts_reads(first, flat, reads):
    torch.manual_seed(0)
    plain = nn.Sequential(first, nn.Flatten(), nn.Linear(flat, 3, bias=False)).double()
    action, x = network_action(plain, field(half_turns(), (1, 4, 4))), normal(5, 1, 4, 4, seed=1)
    network = with_posteriors(plain, scale=0.3)
    posts = {name: t.posterior for name, t in variational_tensors(network).items()}
    r = {n: math.sqrt(q.mean.square().sum().item() + 0.09 * q.numel) for n, q in posts.items()}
    w = {n: (action.parameters[n].act(1, q.mean) - q.mean).norm().item() for n, q in posts.items()}
    slope = math.sqrt(reads) * (r["2.weight"] * w["0.weight"] + w["2.weight"] * r["0.weight"])
    assert_close(B.through_lipschitz(network, action, x)[:, 1], slope * x.flatten(1).norm(dim=1) / math.sqrt(8))


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(9, 3))

    def forward(self, x):
        return self.inner(x)


def test_lipschitz_refuses_what_it_does_not_know():
    head = nn.Flatten(), nn.Linear(9, 3)
    cases = [
        Wrapped(), nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), *head),
        nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Sigmoid(), *head),
        nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.MaxPool2d(3, 1, 1), *head),
        nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.LeakyReLU(2.0), *head),
        nn.Sequential(nn.Conv2d(1, 1, 3, padding=2), nn.AvgPool2d(5, 1, divisor_override=1), nn.Flatten(),
                      nn.Linear(1, 3)),
        nn.Sequential(*head, nn.ReLU()),
    ]
    for plain in cases:
        action = network_action(plain, field(rotations(), (1, 3, 3)))
        with pytest.raises(Refusal, match="Lipschitz bound"):
            B.through_lipschitz(with_posteriors(plain), action, torch.randn(2, 1, 3, 3))
    once = nn.Linear(9, 9)
    twice, action = nn.Sequential(nn.Flatten(), once, nn.ReLU(), once), network_action(
        nn.Sequential(nn.Flatten(), nn.Linear(9, 9)), field(rotations(), (1, 3, 3)))
    with pytest.raises(Refusal, match="used twice"):
        B.through_lipschitz(with_posteriors(twice), action, torch.randn(2, 1, 3, 3))


# --- priors ---

def test_conjugate_gap_and_its_bound():
    for seed in range(10):
        X, y, m0 = normal(6, 4, seed=seed), normal(6, seed=seed + 50), normal(4, seed=seed + 99)
        orbit, targets = torch.cat([X.roll(k, 1) for k in range(4)]), y.repeat(4)
        noise, precision = 0.5 + seed / 5, torch.eye(4).double() * (0.2 + seed)
        precision = precision + 0.1 * (torch.eye(4).roll(1, 0) + torch.eye(4).roll(-1, 0)).double()  # circulant
        gram = orbit.T @ orbit / noise**2
        mean = torch.linalg.solve(gram + precision, orbit.T @ targets / noise**2 + precision @ m0)
        gaps = torch.stack([m0.roll(k) - m0 for k in range(4)])
        exact = torch.stack([mean.roll(k) - mean for k in range(4)])
        assert_close(B.conjugate_prior_gap(gram, precision, gaps), exact, 1e-10)
        concavity = torch.linalg.eigvalsh(gram + precision)[0].item() / len(orbit)
        at_most(exact.norm(dim=1), B.prior_cost((gaps @ precision).norm(dim=1), concavity, len(orbit)))


def test_prior_bound_is_an_equality_for_one_curvature():
    gap, precision, curvature, data = normal(4, seed=1), 0.7, 3.0, 20
    exact = B.conjugate_prior_gap(curvature * torch.eye(4).double(), precision * torch.eye(4).double(), gap).norm()
    assert_close(B.prior_cost(precision * gap.norm(), (curvature + precision) / data, data), exact)
    for wrong in ((0.0, 5), (-1.0, 5), (1.0, 0), (float("nan"), 5)):
        with pytest.raises(Refusal, match="concave"):
            B.prior_cost(gap.norm(), *wrong)


def test_prior_gradient_gap():
    plain = classifier()
    action = network_action(plain, field(rotations(), (1, 4, 4)))
    assert B.prior_gradient_gap(with_posteriors(plain, prior=isotropic(0.3)), action).max() == 0
    prior = random_means(1, spread=0.4, deviation=0.3)
    for family in (MeanFieldGaussian, BlockGaussian, Laplace):
        network = with_posteriors(plain, family, 0.1, prior)
        found = B.prior_gradient_gap(network, action)
        assert found[0] == 0 and found[1:].min() > 0.1
        if family is not Laplace:
            m0 = {name: t.prior.mean for name, t in variational_tensors(network).items()}
            for k, g in enumerate(action.group.elements()):
                moved = action.act(g, m0)
                square = sum((moved[name] - m0[name]).square().sum() for name in m0)
                assert_close(found[k], square.sqrt() / 0.09, 1e-10)
    uneven = fixed_means({name: torch.zeros_like(p) for name, p in plain.named_parameters()}, 0.3)
    network = with_posteriors(plain, scale=0.1, prior=uneven)
    prior = network[0].weight.prior
    with torch.no_grad():
        prior.log_scale.data = prior.log_scale.expand(prior.shape) + 0.1 * normal(*prior.shape, seed=4)
    assert B.prior_gradient_gap(network, action)[1] > 1e-3  # scales that are not invariant are seen as well


# --- draws and inputs ---

def test_radii_by_hand():
    assert_close(B.root_radius(100, 4, "common"), math.sqrt(8 * 0.75 / 100 * math.log(40) / 2))
    assert_close(B.root_radius(100, 4, "shared"), math.sqrt(4 * 0.75 / 100 * math.log(40) / 2))
    assert B.root_radius(100, 4, "fresh") == B.root_radius(100, 4, "shared")
    assert_close(B.inputs_radius(50, 2, 0.9), math.sqrt(math.log(20) / 100))
    low, high = B.defect_interval(0.64, 10_000, 2, "common", 0.9)
    t = math.sqrt(4 / 10_000 * math.log(20) / 2)
    assert_close(high, (0.8 + t) ** 2)
    assert_close(low, (0.8 - t - 0.01) ** 2)
    wide = B.defect_interval(0.64, 10_000, 2, "common", 0.8, inputs=500)
    assert_close(wide, (low - B.inputs_radius(500, 2, 0.9), min(1.0, high + B.inputs_radius(500, 2, 0.9))))
    assert B.defect_interval(0.0, 10, 2, "common")[0] == 0 and B.defect_interval(0.9, 3, 2, "common")[1] == 1.0
    assert B.defect_interval(0.3, 100, 2, "common", inputs=5)[0] == 0  # a defect is never negative
    assert_close(B.normal_interval(1.0, 0.5), (1 - 0.5 * 1.959963984540054, 1 + 0.5 * 1.959963984540054))


@pytest.mark.parametrize("mode", ["common", "shared", "fresh"])
def test_draws_and_inputs_needed_are_the_first_that_suffice(mode):
    for accuracy, order in ((0.3, 2), (0.05, 4), (0.02, 8)):
        draws, share = B.draws_needed(accuracy, order, mode), (order - 1) / order
        width = [B.root_radius(T, order, mode) + math.sqrt(2 * share / T) for T in (draws, draws - 1)]
        assert width[0] <= accuracy < width[1]
        inputs = B.inputs_needed(accuracy, order)
        assert B.inputs_radius(inputs, order) <= accuracy < B.inputs_radius(inputs - 1, order)


@given(seeds, st.integers(2, 5), st.integers(2, 4), st.integers(2, 4), st.sampled_from(["common", "shared"]))
def test_bounded_differences(seed, draws, turns, classes, mode):
    """No change of one independent draw moves the root of the plug-in defect by more than the constants allow."""
    generator = seeded(seed)
    P = torch.eye(classes).double()[torch.randint(classes, (draws, 3, turns), generator=generator)]
    squares = 0.0
    for which in range(1 if mode == "common" else turns):
        worst = 0.0
        for _ in range(30):
            Q = P.clone()
            new = torch.eye(classes).double()[torch.randint(classes, (3, turns), generator=generator)]
            if mode == "common":
                Q[0] = new
            else:
                Q[0, :, which] = new[:, which]
            worst = max(worst, abs(math.sqrt(defect_plugin(P)) - math.sqrt(defect_plugin(Q))))
        squares += draws * worst**2
    share = (turns - 1) / turns
    assert squares <= {"common": 8, "shared": 4}[mode] * share / draws + exact64


@pytest.mark.parametrize("mode,constant", [("common", 8), ("shared", 4)])
def test_bounded_differences_are_attained(mode, constant):
    """From one corner to the opposite: the identity against all turns, one draw in all."""
    turns, ends = 4, torch.eye(2).double()
    P = ends[[0, 1, 1, 1]].expand(1, 1, 4, 2)  # d = e_2 - e_1 for every turn
    squares = 0.0
    for which in range(1 if mode == "common" else turns):
        base = torch.zeros(turns, 2, dtype=torch.float64)
        if mode == "common":
            change = 2 * (P[0, 0] - P[0, 0, :1])  # to the opposite corner
        else:
            change = base.clone()
            change[which] = ends[1] - ends[0]
            change = change - change[:1]
        squares += change.square().sum(-1).mean().item()
    assert_close(squares, constant * (turns - 1) / turns)


def coin_tosses(chance, draws, inputs, generator):
    """One-hot predictions (draws, inputs, turns, 2): one toss for each draw and turn, the same for all inputs."""
    heads = torch.rand(draws, 1, len(chance), generator=generator, dtype=torch.float64) < chance
    return torch.stack([heads, ~heads], -1).double().expand(-1, inputs, -1, -1)


@pytest.mark.parametrize("chance", [[0.5, 0.5], [0.9, 0.2, 0.6, 0.5]])
@pytest.mark.parametrize("draws", [4, 40])
def test_guaranteed_intervals_cover(chance, draws):
    chance, generator, repeats = torch.tensor(chance, dtype=torch.float64), seeded(3), 400
    truth = 2 * (chance - chance[0]).square().mean().item()
    for confidence in (0.5, 0.95):
        plugins = [defect_plugin(coin_tosses(chance, draws, 2, generator)) for _ in range(repeats)]
        inside = sum(low <= truth <= high for low, high in (
            B.defect_interval(value, draws, len(chance), "shared", confidence) for value in plugins)) / repeats
        assert inside >= confidence
        narrow = [B.defect_interval(value, draws, len(chance), "shared", confidence) for value in plugins]
        assert all(0 <= low <= high <= 2 * (len(chance) - 1) / len(chance) for low, high in narrow)


def test_the_root_of_a_plugin_defect_deviates_less_than_mcdiarmid_says():
    """The tail at several levels, for an adversary: a fair coin for each draw and turn."""
    chance, generator, draws = torch.full((2,), 0.5).double(), seeded(1), 20
    roots = torch.tensor([defect_plugin(coin_tosses(chance, draws, 1, generator)) for _ in range(2000)]).sqrt().double()
    for confidence in (0.05, 0.3, 0.6, 0.9):
        outside = (roots - roots.mean()).abs() > B.root_radius(draws, 2, "shared", confidence)
        assert outside.double().mean() <= 1 - confidence


def test_inputs_interval_covers_the_distribution_behind_the_inputs():
    generator, repeats, inputs = seeded(2), 1000, 25
    values = (torch.rand(repeats, inputs, generator=generator) < 0.5).double()  # defects 0 or 1: two classes, C2
    outside = (values.mean(1) - 0.5).abs() > B.inputs_radius(inputs, 2, 0.9)
    assert outside.double().mean() <= 0.1
    half = (values.mean(1) - 0.5).abs() > B.inputs_radius(inputs, 2, 0.9) / 2
    assert half.double().mean() > 0.1  # half of it would not do: the adversary is within a factor of two
    intervals = [B.defect_interval(value, 10**9, 2, "common", 0.9, inputs) for value in values.mean(1).tolist()]
    assert sum(low <= 0.5 <= high for low, high in intervals) / repeats >= 0.9


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_draws_and_inputs_share_the_error_probability(confidence):
    """Half of it for each: log(4 / (1 - confidence)) in both half-widths, for two turns and a draw mode by hand."""
    plugin, draws, inputs = 0.3, 4000, 50_000
    share, logarithm = 1 / 2, math.log(4 / (1 - confidence))
    t = math.sqrt(8 * share / draws * logarithm / 2)
    wider = 2 * share * math.sqrt(logarithm / (2 * inputs))
    found = B.defect_interval(plugin, draws, 2, "common", confidence, inputs)
    assert_close(found.low, (math.sqrt(plugin) - t - math.sqrt(2 * share / draws)) ** 2 - wider)
    assert_close(found.high, (math.sqrt(plugin) + t) ** 2 + wider)


def test_normal_interval_covers_what_it_says():
    generator, repeats = seeded(5), 2000
    samples = torch.randn(repeats, 200, generator=generator, dtype=torch.float64)
    errors = samples.std(1) / math.sqrt(200)
    for confidence in (0.5, 0.9):
        ends = [B.normal_interval(m, e, confidence) for m, e in zip(samples.mean(1).tolist(), errors.tolist())]
        inside = sum(low <= 0 <= high for low, high in ends) / repeats
        within_standard_errors(inside, confidence, math.sqrt(confidence * (1 - confidence) / repeats), standard_errors)


def test_meaningless_requests_are_refused():
    for confidence in (0.0, 1.0, 95):
        for call in (lambda c: B.root_radius(5, 2, "common", c), lambda c: B.inputs_radius(5, 2, c),
                     lambda c: B.normal_interval(0, 1, c)):
            with pytest.raises(Refusal, match="confidence"):
                call(confidence)
    with pytest.raises(Refusal, match="mode"):
        B.root_radius(5, 2, "both")
    with pytest.raises(Refusal, match="draw"):
        B.root_radius(0, 2, "common")
    with pytest.raises(Refusal, match="two group elements"):
        B.inputs_radius(5, 1)


# --- the ledger ---

@pytest.fixture(scope="module")
def setting():
    plain = classifier()
    return plain, network_action(plain, field(rotations(), (1, 4, 4))), normal(5, 1, 4, 4, seed=1)


def test_ledger_has_every_number(setting):
    plain, action, x = setting
    network = with_posteriors(plain, scale=0.3)
    P = orbit_predictions(network, x, action, 60, generator=seeded(0)).probabilities
    book = B.ledger(network, action, P, x, (0.08, 0.01))
    values, divergences = {b.name: b.value for b in book.bounds}, B.push_forward_divergences(network, action)
    expected = {
        "KL, Pinsker": B.pinsker(divergences.kl)[1:].mean(),
        "KL, Bretagnolle–Huber": B.bretagnolle_huber(divergences.kl)[1:].mean(),
        "Hellinger affinity": B.hellinger(divergences.log_affinity)[1:].mean(),
        "orbit Jensen–Shannon": B.through_jensen_shannon(P.mean(0)).mean(),
        "Lipschitz, Wasserstein": B.through_lipschitz(network, action, x)[:, 1:].mean(),
        "information": math.sqrt(0.2),
    }
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(values[name], value)
    assert_close(book.error, B.orbit_error(P.mean(0)).mean())
    assert book.binding.value == min(values.values()) and all(b.vacuous == (b.value >= 1) for b in book.bounds)
    assert any(b.vacuous for b in book.bounds) and not all(b.vacuous for b in book.bounds)
    assert all(b.value >= book.error for b in book.bounds if b.name != "information")
    assert B.ledger(network, action, P, information=(0.75, 0.0)).bounds[-1] == ("information", math.sqrt(1.5), True)
    without = B.ledger(network, action, P)
    assert {b.name for b in without.bounds} == expected.keys() - {"information", "Lipschitz, Wasserstein"}


def test_ledger_standard_error(setting):
    plain, action, x = setting
    network = with_posteriors(plain, scale=0.3)
    books = [B.ledger(network, action, orbit_predictions(network, x, action, 64, generator=seeded(s)).probabilities)
             for s in range(60)]
    spread = torch.tensor([book.error for book in books]).double().std().item()
    typical = math.sqrt(sum(book.standard_error**2 for book in books) / 60)
    assert abs(typical / spread - 1) < standard_errors / math.sqrt(2 * 59)


@pytest.mark.parametrize("draws", [2, 7, 32])
def test_ledger_standard_error_where_the_error_is_linear(draws):
    """Turns that raise one class in every draw: the error is a mean of draws, the jackknife its standard error."""
    plain = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    network, action = with_posteriors(plain), network_action(plain, field(flips(), (1, 2, 2)))
    raised = torch.rand(draws, 3, generator=seeded(3), dtype=torch.float64) / 2
    first = torch.stack([torch.full_like(raised, 0.3), 0.3 + raised], -1)
    book = B.ledger(network, action, torch.stack([first, 1 - first], -1))
    assert_close(book.error, raised.mean())
    assert_close(book.standard_error, raised.mean(1).std() / math.sqrt(draws))


def test_ledger_of_an_invariant_posterior_is_zero(setting):
    plain, action, x = setting
    network = with_posteriors(plain, scale=0.3)
    with torch.no_grad():
        for name, tensor in variational_tensors(network).items():
            loc = tensor.posterior.loc
            loc.copy_(sum(action.parameters[name].act(g, loc) for g in action.group.elements()) / 4)
    P = orbit_predictions(network, x, action, 40, generator=seeded(0)).probabilities
    book = B.ledger(network, action, P, x, (0.0, 0.0))
    values = {bound.name: bound.value for bound in book.bounds}
    assert book.error > 1e-3  # noise of 40 draws, which the bounds know to be noise
    for name in values.keys() - {"orbit Jensen–Shannon"}:
        assert values[name] < 1e-6, name  # roots of rounded zeros


def test_ledger_with_permuted_classes_and_single_precision(setting):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 4))
    action = network_action(plain, field(rotations(), (1, 4, 4)), hidden="regular",
                            output=regular_channels(Cyclic(4), 1))
    network, x = with_posteriors(plain, scale=0.5), torch.randn(4, 1, 4, 4, generator=seeded(0))
    P = orbit_predictions(network, x, action, 300, generator=seeded(1)).probabilities
    single, double = B.ledger(network, action, P, x), B.ledger(network.double(), action, P.double(), x.double())
    for one, two in zip(single.bounds, double.bounds, strict=True):
        assert_close(one.value, two.value, 1e-5)
        assert one.value >= single.error


def test_ledger_refusals(setting):
    plain, action, x = setting
    network = with_posteriors(plain, scale=0.3)
    P = orbit_predictions(network, x, action, 4).probabilities
    for wrong in (P[0], P[:1], P[:, :, :2]):
        with pytest.raises(Refusal, match="Predictions"):
            B.ledger(network, action, wrong)
    with pytest.raises(Refusal, match="other inputs"):
        B.ledger(network, action, P, x[:2])
    with pytest.raises(Refusal, match=r"Bounds compare.*LogNormal for '0.weight'.*sign mask"):
        B.ledger(with_posteriors(plain, LogNormal), action, P)
    other = network_action(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double(), field(rotations(), (1, 4, 4)))
    with pytest.raises(Refusal, match="another network"):
        B.ledger(network, other, P)
    torch.manual_seed(0)
    same_names = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 5),
                               nn.Tanh(), nn.Linear(5, 3)).double()
    with pytest.raises(Refusal, match="another network"):
        B.ledger(network, network_action(same_names, field(rotations(), (1, 4, 4))), P)
    with pytest.raises(Refusal, match="variational"):
        B.ledger(plain, action, P)


def test_large_groups_are_refused():
    wide = nn.Sequential(nn.Linear(2, 12), nn.ReLU(), nn.Linear(12, 2))
    with pytest.raises(Refusal):
        B.push_forward_divergences(with_posteriors(wide), unit_permutations(wide, (2,)))


def test_cuda(require_cuda, setting):
    plain, action, x = setting
    network, x = with_posteriors(plain, scale=0.3).to(require_cuda), x.to(require_cuda)
    P = orbit_predictions(network, x, action, 20).probabilities
    book = B.ledger(network, action, P, x)
    assert all(math.isfinite(bound.value) for bound in book.bounds)
    assert B.prior_gradient_gap(network, action).max() == 0


def test_sign_flips_of_one_weight_against_the_exact_value():
    """The whole way: network, action, predictions of a probit-like toy, and a bound that is an equality."""
    q = MeanFieldGaussian(*torch.tensor([[0.4], [0.0]], dtype=torch.float64))
    kl, affinity, moves = B.push_forward_divergences(OneTensor(q), TensorAction(sign_change(1)))
    assert_close(kl[1], 2 * 0.4**2)
    assert_close(affinity[1], -0.4**2 / 2)
    assert_close(moves["weight"][1], 0.8**2)  # E f moves by 0.8 for f(theta) = theta, Lipschitz 1: an equality
    assert SignedPermutation([0], [-1]) == sign_change(1)(1)
    at_most(gaussian_tv(0.4, 1, -0.4, 1), B.hellinger(affinity[1]))
