"""Distances between posteriors: closed forms against integration, bounds on total variation against the exact one."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import normal
from helpers_equivariance import LAWS, at_most
from symbnn.equivariance.bounds import through_information
from symbnn.equivariance.metrics import (
    orbit_jensen_shannon,
)
from symbnn.errors import Refusal
from symbnn.posterior.divergences import (
    bretagnolle_huber,
    hellinger,
    jensen_shannon,
    log_affinity,
    orbit_error,
    pinsker,
    through_jensen_shannon,
    total_variation,
    wasserstein2_squared,
)
from symbnn.posterior.families import FAMILIES
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.log_normal import LogNormal
from tolerances import assert_close, exact64

seeds = st.integers(0, 10_000)


def simplex(*shape, seed=0, concentration=0.5):
    """Random probability vectors along the last axis, some of them near corners."""
    logits = normal(*shape, seed=seed) / concentration
    return logits.softmax(-1)


@given(seeds, st.integers(2, 6))
def test_every_bound_covers_the_total_variation_of_finite_distributions(seed, classes):
    p, q = simplex(2, 200, classes, seed=seed)
    tv = total_variation(p, q)
    kl, affinity = (p * (p / q).log()).sum(-1).clamp_min(0), (p * q).sqrt().sum(-1).clamp_max(1)
    subsets = torch.tensor(list(itertools.product((0.0, 1.0), repeat=classes)), dtype=torch.float64)
    assert_close(tv, ((p - q) @ subsets.T).amax(1))  # the largest change of the probability of any event
    for bound in (pinsker(kl), bretagnolle_huber(kl), hellinger(affinity.log())):
        at_most(tv.square(), bound.square())
    at_most(hellinger(affinity.log()).square(), bretagnolle_huber(kl).square())
    at_most((p - q).square().sum(-1), 2 * tv.square())
    at_most(tv, math.sqrt(classes) / 2 * (p - q).norm(dim=-1))


@pytest.mark.parametrize("a", [0.0, 0.1, 0.3, 0.5])
def test_a_swapped_pair_attains_the_affinity_bound(a):
    p = torch.tensor([a, 1 - a], dtype=torch.float64)
    assert_close(total_variation(p, p.flip(0)), 1 - 2 * a)
    assert_close(hellinger((p * p.flip(0)).sqrt().sum().log()), 1 - 2 * a, 1e-7 if a == 0.5 else exact64)


def test_constants_of_the_small_gap():
    """Pinsker's and the information bound are equalities to first order for a pair that is almost even."""
    p = torch.tensor([0.5005, 0.4995], dtype=torch.float64)
    kl, information = (p * (p / p.flip(0)).log()).sum(), (p * (2 * p).log()).sum()
    for bound in (pinsker(kl), through_information(information)):
        assert 1 <= bound / 1e-3 < 1 + 1e-6
    assert_close(pinsker(torch.tensor(2.0)), 1.0)
    assert_close(through_information(torch.tensor(0.5)), 1.0)
    assert_close(bretagnolle_huber(torch.tensor(math.log(4 / 3), dtype=torch.float64)), 0.5)


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

    return total_variation(mass(m1, s1), mass(m2, s2))


@given(st.floats(-3, 3), st.floats(0.2, 3), st.floats(-3, 3), st.floats(0.2, 3))
def test_gaussians_on_the_line(m1, s1, m2, s2):
    q, p = (MeanFieldGaussian(*torch.tensor([[m], [math.log(s)]], dtype=torch.float64))
            for m, s in ((m1, s1), (m2, s2)))
    exact = gaussian_tv(m1, s1, m2, s2)
    for bound in (pinsker(q.kl(p)), bretagnolle_huber(q.kl(p)), hellinger(log_affinity(q, p))):
        at_most(exact, bound + 1e-7)  # of a root of a rounded difference
    assert_close(wasserstein2_squared(q, p), (m1 - m2) ** 2 + (s1 - s2) ** 2)


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
        assert abs(log_affinity(q, p).exp() - affinity) < 1e-5
        at_most(tv, hellinger(log_affinity(q, p)) + 1e-5)
        assert_close(log_affinity(q, p), log_affinity(p, q))
        z = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
        density = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
        cost = torch.trapezoid((quantile(q, z) - quantile(p, z)).square() * density, z)
        found = wasserstein2_squared(q, p)
        assert_close(found, cost, 1e-6)  # the kink of a Laplace quantile function at its median
        assert_close(found, wasserstein2_squared(p, q))


def test_laplace_affinity_at_its_limits():
    for d, gap in ((0.7, 0.0), (0.7, 1e-9), (0.0, 0.5), (30.0, 2.0)):
        q, p = one_weight("laplace", 0.0, 0.0), one_weight("laplace", d, gap)
        a, b = 0.5, math.exp(-gap) / 2
        middle = d * math.exp(-a * d) if gap < 1e-6 else (math.exp(-a * d) - math.exp(-b * d)) / (b - a)
        exact = math.sqrt(a * b) * ((math.exp(-a * d) + math.exp(-b * d)) / (a + b) + middle)
        assert abs(log_affinity(q, p) - math.log(exact)) < 1e-8  # of the equal-rate limit at 1e-9


@given(seeds)
def test_full_and_independent_gaussians_agree_and_bures_in_two_dimensions(seed):
    loc, log_scale = normal(2, 4, seed=seed), 0.5 * normal(2, 4, seed=seed + 1)
    plain = [MeanFieldGaussian(loc[k], log_scale[k]) for k in range(2)]
    full = [FullGaussian(loc[k], log_scale[k].exp().diag()) for k in range(2)]
    assert_close(log_affinity(*full), log_affinity(*plain))
    assert_close(wasserstein2_squared(*full), wasserstein2_squared(*plain))
    turn = torch.linalg.qr(normal(4, 4, seed=seed + 2)).Q  # one rotation of both laws changes nothing
    turned = [q.push_forward(turn) for q in full]
    assert_close(log_affinity(*turned), log_affinity(*full), 1e-10)
    assert_close(wasserstein2_squared(*turned), wasserstein2_squared(*full), 1e-10)
    one, two = (normal(2, 2, seed=seed + k).tril(-1) + normal(2, seed=seed + 9 + k).exp().diag() for k in range(2))
    q, p = (FullGaussian(torch.zeros(2).double(), root) for root in (one, two))
    first, second = one @ one.T, two @ two.T
    cross = (torch.trace(first @ second) + 2 * (torch.det(first) * torch.det(second)).sqrt()).sqrt()  # 2 x 2 only
    assert_close(wasserstein2_squared(q, p), torch.trace(first) + torch.trace(second) - 2 * cross, 1e-10)


def test_different_laws_are_refused():
    q = one_weight("gaussian", 0.0, 0.0)
    for other in (one_weight("laplace", 0.0, 0.0), MeanFieldGaussian(torch.zeros(2).double(), torch.zeros(2).double())):
        for function in (log_affinity, wasserstein2_squared):
            with pytest.raises(Refusal, match="one family"):
                function(q, other)
    masks = [LogNormal(torch.zeros(1), torch.zeros(1), torch.tensor([sign])) for sign in (1, -1)]
    with pytest.raises(Refusal, match="sign masks"):
        log_affinity(*masks)


@given(seeds, st.integers(2, 6), st.integers(2, 5))
def test_jensen_shannon_bounds_of_random_orbits(seed, turns, classes):
    means = simplex(100, turns, classes, seed=seed)
    js, tv = jensen_shannon(means), total_variation(means[:, :, None], means[:, None])
    slow = torch.tensor([[tv[n, g, h] for g in range(turns) for h in range(turns) if g != h] for n in range(100)])
    assert_close(orbit_error(means), slow.mean(1))
    at_most(orbit_error(means), through_jensen_shannon(means))
    at_most((means[:, :, None] - means[:, None]).square().sum(-1).mean((1, 2)), 2 * js)
    at_most(tv.amax((1, 2)), (turns * js).sqrt())
    at_most(js, min(math.log(turns), math.log(classes)))
    assert_close(js.mean(), orbit_jensen_shannon(means[None]))


def test_jensen_shannon_bounds_are_attained():
    almost = torch.tensor([[0.5005, 0.4995], [0.4995, 0.5005]], dtype=torch.float64)
    assert 1 <= through_jensen_shannon(almost) / orbit_error(almost) < 1 + 1e-6
    same = simplex(1, 1, 3).expand(1, 4, 3)
    assert orbit_error(same) == 0 and through_jensen_shannon(same) < 1e-7
    assert_close(orbit_error(torch.eye(4).double()), 1.0)


@pytest.mark.parametrize("shape", [(3, 4, 1), (3, 1, 4), (0, 4, 4), (0, 4), (4,)], ids=str)
@pytest.mark.parametrize("bound", [jensen_shannon, orbit_error, through_jensen_shannon], ids=lambda b: b.__name__)
def test_orbits_that_agree_whatever_they_are(bound, shape):
    with pytest.raises(Refusal, match="at least two group elements and two classes"):
        bound(torch.ones(shape) / max(1, shape[-1]))
