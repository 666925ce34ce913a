"""Closedness, exhaustively, and what every family is asked about maps."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import seeded
from helpers_posterior import SIZE, check_closedness, each_family, lower, members, random, refused, signed_permutations
from late import ONE_MOVES, ORDERS, reordered
from symbnn.errors import Refusal
from symbnn.posterior.block_gaussian import BlockGaussian
from symbnn.posterior.family import ContinuousFamily
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.log_normal import LogNormal
from symbnn.posterior.point_mass import PointMass
from symbnn.posterior.priors import isotropic
from symbnn.symmetry.actions import Action
from symbnn.symmetry.fields import rotations
from symbnn.symmetry.signed_permutations import SignedPermutation
from tolerances import assert_close


def orthogonal(n: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(random((n, n), seed)).Q


@each_family
def test_all_signed_permutations_of_three_coordinates(name):
    q = members((3,), trainable=False)[name]
    closed = sum(check_closedness(q, p) for p in signed_permutations(3))
    assert closed == (6 if name == "lognormal" else 48)  # one choice of signs for each permutation keeps the mask


@given(st.integers(0, 10_000))
@settings(max_examples=25)
def test_random_orthogonal_matrices(seed):
    matrix = orthogonal(4, seed)
    for name, q in members((2, 2), seed, trainable=False).items():
        assert check_closedness(q, matrix) is (name == "full")
        if name == "gaussian":  # no member is near: the closest lies at this divergence
            moved = matrix @ torch.diag(q.variance.flatten()) @ matrix.T
            assert (moved.diagonal().log().sum() - torch.linalg.slogdet(moved).logabsdet) / 2 > 1e-3
    assert check_closedness(BlockGaussian(random((2, 2), seed), random((1, 1), seed), trainable=False), matrix)
    assert check_closedness(FullGaussian(random((4,), seed), lower(4, seed)), random((4, 4), seed + 1))


@given(st.integers(0, 10_000))
@settings(max_examples=25)
def test_random_monomial_and_block_maps(seed):
    generator = seeded(seed)
    order = torch.randperm(4, generator=generator)
    factors = torch.exp(random((4,), seed)) * torch.where(random((4,), seed + 1) < 0, -1, 1)
    monomial = torch.diag(factors) @ torch.eye(4, dtype=torch.float64)[order]
    for name, q in members((2, 2), seed, trainable=False).items():
        closed = check_closedness(q, monomial)
        assert closed or name in ("lognormal", "block")
    q = members((2, 2), seed)["block"]
    within = torch.block_diag(2.0 * orthogonal(2, seed), 0.5 * orthogonal(2, seed + 1))
    assert check_closedness(q, within) and check_closedness(q, within[[2, 3, 0, 1]])
    assert not check_closedness(q, within[[0, 2, 1, 3]])
    assert not check_closedness(q, torch.block_diag(random((2, 2), seed), random((2, 2), seed + 1)))


@each_family
def test_push_forwards_compose_and_invert(name):
    q = members((4,))[name]
    mask = q.mask if name == "lognormal" else torch.ones(4, dtype=torch.int8)
    theta = q.rsample(5, seeded(0)).detach()
    maps = [SignedPermutation(torch.tensor(order), mask[list(order)] * mask) for order in ([1, 2, 3, 0], [2, 1, 0, 3])]
    first, second = maps
    both, one_by_one = q.push_forward(second @ first), q.push_forward(first).push_forward(second)
    moved = second(first(theta))
    assert_close(both.log_prob(moved), one_by_one.log_prob(moved))
    assert_close(q.push_forward(first).push_forward(first.inverse()).log_prob(theta), q.log_prob(theta))


@each_family
def test_push_forward_of_float32_and_frozen(name):
    q = members(trainable=False)[name].float()
    pushed = q.push_forward(SignedPermutation.identity(SIZE))
    assert not pushed.trainable and not list(pushed.parameters()) and pushed.mean.dtype == torch.float32
    assert not any(v.requires_grad for v in pushed.state_dict().values())
    assert all(p.is_leaf and p.requires_grad for p in members()[name].push_forward(torch.eye(SIZE)).parameters())


@each_family
def test_maps_that_do_not_act_are_refused(name):
    q = members()[name]
    for wrong in (SignedPermutation.identity(5), torch.eye(5), torch.eye(SIZE, dtype=torch.int64), torch.ones(SIZE),
                  [1.0], torch.full((SIZE, SIZE), math.nan)):
        with pytest.raises(Refusal, match="map"):
            q.is_closed_under(wrong)
    singular = torch.eye(SIZE, dtype=torch.float64)
    singular[0, 0] = 0
    assert "singular" in q.is_closed_under(singular).reason and not q.is_closed_under(singular)
    with pytest.raises(Refusal, match="singular"):
        q.push_forward(singular)


def test_a_whole_action():
    kernel = torch.randn(2, 1, 3, 3, generator=seeded(0))
    turns = rotations().kernel(3, 3)
    quarter = Action.product(Action.trivial(turns.group, (2, 1)), turns)
    one, row = torch.zeros(2, 1, 3, 3), torch.zeros(2, 1, 1, 1)
    assert MeanFieldGaussian(kernel, one).is_closed_under(quarter)
    assert BlockGaussian(kernel, row).is_closed_under(quarter)
    assert not LogNormal(one, one, torch.where(kernel < 0, -1, 1)).is_closed_under(quarter)
    assert LogNormal(one, one, torch.tensor(-1)).is_closed_under(quarter)
    with pytest.raises(Refusal, match="size 6"):
        members()["gaussian"].is_closed_under(quarter)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", ONE_MOVES)
def test_every_generator_is_asked(case, order):
    action, values = ONE_MOVES[case]
    action, values = reordered(action, order), torch.tensor(values, dtype=torch.float64)
    zero, signs = torch.zeros_like(values), torch.where(values > 1, -1, 1)
    for kind in (MeanFieldGaussian, Laplace):
        assert kind(zero, zero).is_invariant_under(action)
        assert not kind(values, zero).is_invariant_under(action)
        assert not kind(zero, values).is_invariant_under(action)
    assert not FullGaussian(zero, values.diag()).is_invariant_under(action)
    assert not PointMass(values).is_invariant_under(action)
    closure = LogNormal(zero, zero, signs).is_closed_under(action)
    assert not closure and "sign mask" in closure.reason
    with pytest.raises(Refusal, match="sign mask"):
        LogNormal(zero, zero, signs).parameter_actions(action)


def test_members_in_another_type_share_the_gradient():
    member = MeanFieldGaussian.initial(torch.ones(3), 0.5)
    wide = member.in_dtype(torch.float64)
    assert wide.loc.dtype == torch.float64 and not list(wide.parameters()) and member.loc.dtype == torch.float32
    (wide.loc.sum() + wide.log_scale.sum()).backward()
    assert torch.equal(member.loc.grad, torch.ones(3))


def test_what_refusals_of_families_advise_works():
    q = members()["gaussian"]
    theta = random((5, SIZE), 1)
    assert q.log_prob(eval(refused(lambda: q.log_prob(theta)).fix, {"theta": theta})).shape == (5,)
    other = members((2, 3))["gaussian"].freeze()
    fix = refused(lambda: q.kl(other)).fix.partition(", which")[0]
    assert q.kl(eval(fix, {"isotropic": isotropic, "name": "weight", "posterior": q})).isfinite()
    laplace, log_normal = members(seed=7)["laplace"], members()["lognormal"]
    fix = refused(lambda: log_normal.kl(laplace)).fix.partition(", which")[0]
    assert log_normal.kl(eval(fix.removeprefix("prior="), {"isotropic": isotropic})("weight", log_normal)).isfinite()
    tiny = MeanFieldGaussian.initial(torch.zeros(2), 1e-25)
    assert set(eval(refused(tiny.natural).fix, {"family": tiny, "torch": torch})) == {"linear", "quadratic"}
    rows = MeanFieldGaussian(torch.zeros(2, 2), torch.zeros(2, 1))
    square = rotations().on(2, 2)
    fix = refused(lambda: rows.parameter_actions(square)).fix.partition(": ")[2]
    whole = eval(fix, {"q": rows, "MeanFieldGaussian": MeanFieldGaussian})
    assert set(whole.parameter_actions(square)) == {"loc", "log_scale"}


class Halfway(ContinuousFamily):
    """A family that says neither where it starts, nor which maps keep it."""

    @property
    def mean(self):
        return torch.zeros(self.shape)


def test_what_a_family_has_not_said_is_not_taken_for_granted():
    q = Halfway((3,), True)
    assert "def initial(cls, mean, scale" in str(refused(lambda: Halfway.initial(torch.zeros(3), 0.1)))
    for name, asked in {"variance": lambda: q.variance, "transport": lambda: q.rsample(2),
                        "distribution": lambda: q.entropy(), "_pushed": lambda: q._pushed(torch.eye(3))}.items():
        told = str(refused(asked))
        assert f"defines `{name}`" in told and f"def {name}(self" in told and "Halfway" in told
    closure = q.is_closed_under(torch.eye(3))
    assert not closure and "does not say which maps keep it" in closure.reason
    assert "does not say" in str(refused(lambda: q.push_forward(torch.eye(3))))
    assert "each weight has parameters of its own" in str(refused(lambda: q.marginal(torch.arange(2))))
    assert "natural parameters" in str(refused(q.natural))
