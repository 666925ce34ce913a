"""Permanents: exact values against enumeration and Ryser, the promised sides, gradients, extreme entries, proposals."""
import itertools
import math

import pytest
import torch

from symbnn.errors import Refusal
from symbnn.hidden_units.permanents import (
    EXACT_UNITS,
    _subset_sums,
    log_bethe_permanent,
    log_capacity,
    log_permanent,
    propose,
)
from tolerances import assert_close, exact32, within_standard_errors

METHODS = (log_permanent, log_bethe_permanent, log_capacity)


def draw(*shape, seed=0, spread=1.0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def enumerated(log_a):
    """The sum over all permutations, and the marginals from it."""
    n = log_a.shape[-1]
    maps = torch.tensor(list(itertools.permutations(range(n))))
    terms = log_a[..., torch.arange(n), maps].sum(-1)
    total = terms.logsumexp(-1)
    share = (terms - total[..., None]).exp()
    return total, share @ torch.nn.functional.one_hot(maps, n).to(log_a).flatten(1)


def ryser(a):
    """perm(a) by inclusion and exclusion of columns, for numbers and not logarithms."""
    n = a.shape[-1]
    total = torch.zeros(a.shape[:-2], dtype=a.dtype)
    for chosen in itertools.product((0.0, 1.0), repeat=n):
        sign = (-1) ** (n - int(sum(chosen)))
        total = total + sign * (a @ torch.tensor(chosen, dtype=a.dtype)).prod(-1)
    return total


@pytest.mark.parametrize("n", range(1, 9))
def test_exact_equals_enumeration(n):
    log_a = draw(3, 2, n, n, seed=n, spread=2.0)
    found, (value, marginals) = log_permanent(log_a), enumerated(log_a)
    assert_close(found.value, value)
    assert_close(found.marginals, marginals.view(log_a.shape))
    assert found.residual.max() < 1e-12 and found.value.shape == (3, 2)


@pytest.mark.parametrize("n", (9, 12))
def test_exact_equals_ryser(n):
    log_a = draw(2, n, n, seed=n, spread=0.3)  # narrow: Ryser's alternating sum still has its digits
    assert_close(log_permanent(log_a).value, ryser(log_a.exp()).log(), 1e-10)


def test_exact_at_the_largest_size_and_in_pieces(monkeypatch):
    log_a = torch.zeros(EXACT_UNITS, EXACT_UNITS, dtype=torch.float64)
    assert_close(log_permanent(log_a).value, math.lgamma(EXACT_UNITS + 1))
    many = draw(5, 6, 6)
    whole, sizes = log_permanent(many).value, []
    monkeypatch.setattr("symbnn.hidden_units.permanents._subset_sums",
                        lambda a: (sizes.append(len(a)), _subset_sums(a))[1])
    assert_close(log_permanent(many, memory=1).value, whole)
    assert sizes == [1] * 5


def collections():
    """1,000 matrices: random, nearly singular, nearly permutations, nearly constant, far apart, with zeros."""
    generator = torch.Generator().manual_seed(5)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    eye = torch.eye(6, dtype=torch.float64)
    zeros = torch.where(uniform(150, 6, 6) < 0.35, -math.inf, uniform(150, 6, 6).log())
    triangle = torch.where(torch.ones(6, 6).triu() > 0, uniform(50, 6, 6).log(), -1e5)
    return {
        "random": uniform(150, 6, 6).log(),
        "singular": (uniform(150, 6, 1) * uniform(150, 1, 6) + 1e-9 * uniform(150, 6, 6)).log(),
        "permutation": (eye[torch.randperm(6, generator=generator)] + 1e-7 * uniform(150, 6, 6)).log(),
        "constant": 1e-6 * uniform(50, 6, 6),
        "spread": draw(100, 6, 6, seed=1, spread=5.0),
        "two": draw(50, 2, 2, seed=2),
        "equal two": 1e-3 * draw(50, 2, 2, seed=3),
        "three": draw(50, 3, 3, seed=4, spread=3.0),
        "underflow": draw(50, 6, 6, seed=5, spread=500.0),  # entries from exp(-1500) to exp(1500)
        "zeros": zeros,
        "triangle": triangle,
    }


MATRICES = collections()


def test_collection_has_a_thousand():
    assert sum(len(log_a) for log_a in MATRICES.values()) == 1000


@pytest.mark.parametrize("kind", MATRICES)
def test_both_sides_on_every_kind_of_matrix(kind):
    log_a = MATRICES[kind]
    n = log_a.shape[-1]
    exact, below, above = log_permanent(log_a).value, log_bethe_permanent(log_a).value, log_capacity(log_a).value
    possible = exact.isfinite()
    assert torch.equal(possible, enumerated(log_a)[0].isfinite())
    assert torch.equal(below[~possible], exact[~possible]) and torch.equal(above[~possible], exact[~possible])
    rounding = 1e-9 * exact[possible].abs().clamp(min=1)
    gap = (exact - below)[possible]
    assert (gap >= -rounding).all() and (gap <= n * math.log(2) / 2 + rounding).all()
    excess = (above - exact)[possible]
    assert (excess >= -rounding).all()
    if kind not in ("underflow",):  # there the scaling is stopped on its way; it is a bound all the same
        assert (excess <= n * math.log(n) - math.lgamma(n + 1) + 1e-3).all()


def test_sides_are_where_they_must_be():
    """Equal entries attain the capacity's bound, and the square root of two for two rows; far units close both gaps."""
    flat = torch.zeros(5, 5, dtype=torch.float64)
    assert_close(log_capacity(flat).value, 5 * math.log(5))
    assert_close(log_bethe_permanent(flat).value, 5 * math.log(5) + 20 * math.log(0.8))
    assert_close(log_bethe_permanent(flat[:2, :2]).value, 0.0)
    assert_close(log_bethe_permanent(flat[:1, :1] - 3.0).value, -3.0)
    far = torch.where(torch.eye(5) > 0, 0.0, -60.0).double()
    assert_close(log_bethe_permanent(far).value, 0.0)
    assert_close(log_capacity(far).value, 0.0, 1e-10)


def test_an_assignment_that_is_found_late():
    """Belief propagation passes through doubly stochastic marginals of wrong assignments before it settles."""
    log_a = draw(100, 6, 6, seed=6, spread=100.0)
    assert_close(log_bethe_permanent(log_a).value, log_permanent(log_a).value, 6 * math.log(2) / 2 / 100)
    assert (log_bethe_permanent(log_a).value <= log_permanent(log_a).value + 1e-8).all()


@pytest.mark.parametrize("method", METHODS)
def test_gradients_equal_finite_differences(method):
    options = {} if method is log_permanent else {"tolerance": 1e-13, "iterations": 5000}
    log_a = draw(5, 5, seed=7)
    found = method(log_a.requires_grad_(), **options)
    gradient = torch.autograd.grad(found.value, log_a)[0]
    step, log_a = 1e-5, log_a.detach()
    for j, k in itertools.product(range(5), repeat=2):
        shift = torch.zeros(5, 5, dtype=torch.float64)
        shift[j, k] = step
        slope = (method(log_a + shift, **options).value - method(log_a - shift, **options).value) / (2 * step)
        assert abs(slope - gradient[j, k]) <= 1e-5 * abs(gradient[j, k]) + 1e-9
    assert_close(gradient, found.marginals)


def far_units(separation, n, draws, seed=0):
    """Matrices of n units with six weights each, of deviation 1 around means of deviation `separation`."""
    means = draw(n, 6, seed=seed, spread=separation)
    return -(means + draw(draws, n, 6, seed=seed + 1) - means[:, None, None]).square().sum(-1).movedim(0, -1) / 2


@pytest.mark.parametrize("tolerance", (1e-1, 1e-3))
@pytest.mark.parametrize("method", (log_bethe_permanent, log_capacity))
@pytest.mark.parametrize("n", (3, 5, 8, 20))
def test_gradients_are_those_of_the_limit_at_every_tolerance(method, n, tolerance):
    """Against differences of converged values; a gradient taken where only the value is known is off by 1e-3."""
    for seed, separation in enumerate((0.0, 0.1, 0.3, 1.0, 2.0, 4.0)):
        log_a = far_units(separation, n, 4, seed).requires_grad_()
        direction, step = draw(4, n, n, seed=seed + 30), 1e-5
        (gradient,) = torch.autograd.grad(method(log_a, tolerance).value.sum(), log_a)
        most = 20_000 if method is log_bethe_permanent else 100  # scaling, after which Newton's steps converge
        above, below = (method(log_a + side * step * direction, 1e-13, most).value.detach() for side in (1, -1))
        slope = (above - below) / (2 * step)
        assert_close((gradient * direction).sum((-2, -1)), slope, 3e-7)


@pytest.mark.parametrize("method", (log_bethe_permanent, log_capacity))
def test_gradients_are_exact_where_the_sides_are(method):
    """Far units, and rows that all but one column excludes: both sides are the permanent, and so is their gradient."""
    for log_a in (far_units(12.0, 8, 3), torch.where(torch.eye(6).flip(0) > 0, draw(6, 6, seed=40), -80.0)):
        log_a.requires_grad_()
        found, exact = (torch.autograd.grad(f(log_a).value.sum(), log_a)[0] for f in (method, log_permanent))
        assert_close(found, exact, 1e-7)


def test_a_gradient_costs_no_bound():
    """Newton's steps lower the capacity's bound and leave it one, also where its infimum is at infinity."""
    for log_a in (far_units(0.5, 7, 5), far_units(3.0, 7, 5), MATRICES["triangle"], MATRICES["spread"]):
        plain, fine = log_capacity(log_a, 1e-2), log_capacity(log_a.clone().requires_grad_(), 1e-2)
        assert (fine.value <= plain.value + 1e-12 * plain.value.abs().clamp(min=1)).all()
        assert (fine.value >= log_permanent(log_a).value - 1e-9 * plain.value.abs().clamp(min=1)).all()
        assert fine.residual.max() < 1e-6 < plain.residual.max()
    with torch.no_grad():  # nothing is recorded, nothing is refined
        assert torch.equal(log_capacity(log_a.clone().requires_grad_(), 1e-2).value, plain.value)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_each_matrix_with_its_own_weight(method):
    log_a = draw(2, 3, 4, 4, seed=8).requires_grad_()
    weights = draw(2, 3, seed=9)
    found = method(log_a)
    (gradient,) = torch.autograd.grad((weights * found.value).sum(), log_a)
    assert_close(gradient, weights[..., None, None] * found.marginals)


def oscillating():
    """Matrices in which assignments compete: far spread (by the named seed too), and exact ties of large entries."""
    ties = torch.randint(-3, 1, (40, 4, 4), generator=torch.Generator().manual_seed(3)).double()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        named = 30 * torch.randn(1, 12, 12, dtype=torch.float64)
    return {"named": named, "spread": draw(40, 8, 8, seed=50, spread=20.0), "far": draw(40, 6, 6, seed=51, spread=60.0),
            "ties": 30 * ties, "near ties": 30 * ties + draw(40, 4, 4, seed=52), "units": 60 * (ties - ties.mT)}


@pytest.mark.parametrize("kind", oscillating())
def test_bethe_is_one_value_below_the_permanent_with_a_gradient_or_without(kind):
    """Also where messages oscillate, which a jump along the last change made worse, and where they alternate."""
    log_a = oscillating()[kind]
    exact = log_permanent(log_a).value
    rounding = 1e-9 * exact.abs().clamp(min=1)
    plain, fine = log_bethe_permanent(log_a), log_bethe_permanent(log_a.clone().requires_grad_())
    assert_close(fine.value, plain.value, 1e-4)
    assert fine.residual.max() < 1e-4
    for found in (plain, fine, *(log_bethe_permanent(log_a, t) for t in (1e-1, 1e-3)),
                  *(log_bethe_permanent(log_a, iterations=i) for i in (1, 5, 30))):
        assert (found.value <= exact + rounding).all()
    assert (exact - fine.value <= log_a.shape[-1] * math.log(2) / 2 + 0.02).all()


def test_gradients_where_messages_oscillate_are_finite_differences():
    log_a = oscillating()["named"].requires_grad_()
    (gradient,) = torch.autograd.grad(log_bethe_permanent(log_a).value.sum(), log_a)
    direction, step = draw(12, 12, seed=53), 1e-4
    above, below = (log_bethe_permanent(log_a.detach() + side * step * direction, 1e-12, 20_000).value
                    for side in (1, -1))
    assert_close((gradient * direction).sum(), ((above - below) / (2 * step))[0], 1e-5)


def test_a_gradient_that_has_not_settled_is_refused():
    log_a = oscillating()["named"]
    assert log_bethe_permanent(log_a, iterations=3).residual > 0.1  # a bound, and the residual tells
    with pytest.raises(Refusal, match="iterations=1000, log_permanent"):
        log_bethe_permanent(log_a.requires_grad_(), iterations=3)
    log_bethe_permanent(log_a, iterations=1000)
    for method in (log_bethe_permanent, log_capacity):
        with pytest.raises(Refusal, match="iterations=1000"):
            method(log_a.detach(), iterations=0)


@pytest.mark.parametrize("method", METHODS)
def test_scaling_a_row_or_a_column_moves_the_value_alone(method):
    log_a, row, column = draw(4, 5, 5, seed=10), draw(4, 5, 1, seed=11), draw(4, 1, 5, seed=12)
    before, after = method(log_a), method(log_a + 1e3 * row + 10 * column)
    tolerance = 1e-12 if method is log_permanent else 1e-5
    assert_close(after.value - before.value, (1e3 * row.sum(-2) + 10 * column.sum(-1))[:, 0], tolerance)
    assert_close(after.marginals, before.marginals, 10 * tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_single_precision_at_very_small_densities(method):
    log_a = (draw(3, 6, 6, seed=13) - 1e5).float()  # rounded to multiples of 1/128 as it is given
    found, expected = method(log_a), method(log_a.double())
    assert found.value.dtype == torch.float32 and found.value.isfinite().all()
    assert_close(found.value, expected.value, exact32)
    assert_close(found.marginals, expected.marginals, 1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_zero_permanents_and_their_gradients(method):
    log_a = draw(2, 4, 4, seed=14)
    log_a[0, 1] = -math.inf
    log_a[1, 2, 3] = -math.inf
    log_a.requires_grad_()
    found = method(log_a)
    assert found.value[0] == -math.inf and found.value[1].isfinite()
    (gradient,) = torch.autograd.grad(found.value[1], log_a)
    assert gradient.isfinite().all() and gradient[1, 2, 3].abs() < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_refusals(method):
    for broken in (torch.zeros(2, 3), torch.zeros(4), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(0, 0)):
        with pytest.raises(Refusal, match="square matrix"):
            method(broken)
    with pytest.raises(Refusal, match=r"torch\.as_tensor\(log_a\)"):
        method([[0.0]])
    for entry in (math.nan, math.inf):
        with pytest.raises(Refusal, match="finite"):
            method(torch.full((3, 3), entry))
    with pytest.raises(Refusal, match="log_bethe_permanent"):
        log_permanent(torch.zeros(EXACT_UNITS + 1, EXACT_UNITS + 1))


def test_iterations_are_limited_and_the_residual_tells():
    log_a = draw(20, 20, seed=15, spread=2.0)
    early, late = (log_bethe_permanent(log_a, iterations=i) for i in (2, 500))
    assert early.residual > 100 * late.residual and late.residual <= 1e-6
    values = [log_capacity(log_a, tolerance=0.0, iterations=i).value for i in (1, 3, 10, 100)]
    assert values == sorted(values, reverse=True) and values[-1] >= log_permanent(log_a).value


def test_proposals_have_their_probabilities():
    log_a = draw(1, 4, 4, seed=16)
    generator = torch.Generator().manual_seed(0)
    drawn, log_r = propose(log_bethe_permanent(log_a).marginals, 50_001, generator)
    assert torch.equal(drawn[0, 0], torch.arange(4))
    assert torch.equal(drawn.sort(-1).values, torch.arange(4).expand_as(drawn))
    kinds, which = drawn[0, 1:].unique(dim=0, return_inverse=True)
    chances = torch.stack([log_r[0, 1:][which == i][0].exp() for i in range(len(kinds))])
    assert_close(chances.sum(), 1.0)
    assert len(kinds) == 24
    frequency = which.bincount() / 50_000
    within_standard_errors(frequency, chances, (chances * (1 - chances) / 50_000).sqrt())
    own = (kinds == torch.arange(4)).all(-1)
    assert_close(log_r[0, 0].exp(), chances[own][0])


@pytest.mark.parametrize("spread", (0.5, 2.0))
def test_proposals_give_unbiased_permanents(spread):
    log_a = draw(2, 7, 7, seed=17, spread=spread)
    drawn, log_r = propose(log_bethe_permanent(log_a).marginals, 20_001, torch.Generator().manual_seed(1))
    terms = log_a[
        torch.arange(2)[:, None, None], drawn[:, 1:], torch.arange(7)].sum(-1)
    weight = (terms - log_r[:, 1:] - log_permanent(log_a).value[:, None]).exp()
    within_standard_errors(weight.mean(-1), torch.ones(2), weight.std(-1) / 20_000**0.5)


def test_proposals_follow_a_relabelling_of_rows():
    """r(s pi | s A) = r(pi | A): what makes the importance-sampled bound of the mutual information a lower bound."""
    log_a = draw(1, 5, 5, seed=18)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(2))
    marginals = log_bethe_permanent(log_a).marginals
    moved = log_bethe_permanent(log_a[:, order]).marginals
    assert_close(moved, marginals[:, order], 1e-5)
    one, two = (propose(m, 4001, torch.Generator().manual_seed(3)) for m in (marginals, moved))
    first = {tuple(p.tolist()): r.item() for p, r in zip(one[0][0], one[1][0])}
    second = {tuple(order[p].tolist()): r.item() for p, r in zip(two[0][0], two[1][0])}
    shared = first.keys() & second.keys()
    assert len(shared) > 60
    assert_close(torch.tensor([second[p] for p in shared]), torch.tensor([first[p] for p in shared]), 1e-4)
