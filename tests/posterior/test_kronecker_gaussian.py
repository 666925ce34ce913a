"""Kronecker-factored covariances against the full covariance."""
import itertools

import pytest
import torch

from helpers import normal
from symbnn.errors import Refusal
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.kronecker_gaussian import KroneckerGaussian, two_sides
from symbnn.posterior.layers import VariationalTensor
from symbnn.symmetry.actions import Action, natural_action
from symbnn.symmetry.groups import Cyclic, Permutations
from symbnn.symmetry.signed_permutations import SignedPermutation
from tolerances import assert_close


def member(shape=(2, 3), seed=0):
    rows, columns = KroneckerGaussian.sides(shape)
    left, right = (normal(n, n, seed=seed + n) + 2 * torch.eye(n).double() for n in (rows, columns))
    return KroneckerGaussian(normal(*shape, seed=seed), left, right, normal(rows, columns, seed=seed + 3) - 1)


def covariance(q):
    root = q._root()
    return root @ root.T


def test_divergences_are_those_of_the_full_covariance():
    q, p = member(), member(seed=9)
    assert_close(q.kl(p), q.full().kl(p.full()))
    assert_close(q.kl(p.full()), q.full().kl(p.full()))
    assert_close(q.full().kl(p), q.full().kl(p.full()))


def test_signed_permutations_are_taken_apart_exactly_when_they_act_on_two_sides():
    """All 48 of three rows and one column, and of the 384 of a (2, 2) matrix those that are products."""
    found = 0
    for order in itertools.permutations(range(4)):
        for sign in itertools.product((1, -1), repeat=4):
            map = SignedPermutation(torch.tensor(order), torch.tensor(sign))
            sides = two_sides(map, 2, 2)
            dense = two_sides(map.matrix().double(), 2, 2)
            assert (sides is None) == (dense is None)
            if sides is not None:
                found += 1
                assert torch.equal(torch.kron(sides[0].matrix(), sides[1].matrix()), map.matrix())
                assert_close(torch.kron(*dense), map.matrix())
    assert found == 2 * 2 * 2**3  # two permutations a side; signs of two rows and two columns, of which one is shared
    with pytest.raises(Refusal, match="on the outputs and on the inputs"):
        member((2, 2)).push_forward(SignedPermutation([1, 0, 2, 3], [1, 1, 1, 1]))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 2)])
def test_a_push_forward_moves_the_covariance(shape):
    q = member(shape)
    rows, columns = KroneckerGaussian.sides(shape)
    rho = torch.kron(normal(rows, rows, seed=5), normal(columns, columns, seed=6))
    assert_close(covariance(q.push_forward(rho)), rho @ covariance(q) @ rho.T)


def test_the_law_is_invariant_whatever_its_factors_are():
    """Eigenvectors of a repeated eigenvalue may be any, and signs are free: the law is asked, not its parameters."""
    exchange = natural_action(Permutations(3))
    action = Action.product(Action.trivial(exchange.group, (2,)), exchange)
    shared = 0.5 * torch.ones(3, 3).double() + torch.eye(3).double()
    values, vectors = torch.linalg.eigh(shared)
    turn = torch.linalg.qr(normal(2, 2, seed=4)).Q
    vectors[:, :2] = vectors[:, :2] @ turn  # within the repeated eigenvalue
    scale = values.log().expand(2, 3) / 2
    q = KroneckerGaussian(torch.ones(2, 3).double(), torch.eye(2).double(), -vectors, scale)
    assert q.is_invariant_under(action)
    assert not KroneckerGaussian(normal(2, 3), q.left, q.right, scale).is_invariant_under(action)
    assert not KroneckerGaussian(q.loc, q.left, q.right, normal(2, 3)).is_invariant_under(action)
    swap = [1, 0, 2, 3, 4, 5]
    broken = Action(Cyclic(2), (2, 3), lambda g: SignedPermutation(swap if g else list(range(6)), [1] * 6))
    with pytest.raises(Refusal, match="Kronecker factors"):
        q.is_invariant_under(broken)


def test_what_is_no_member_is_refused():
    q = member()
    with pytest.raises(Refusal, match=r"left \(2, 2\), right \(3, 3\) and log_scale \(2, 3\)"):
        KroneckerGaussian(q.loc, q.right, q.left, q.log_scale)
    with pytest.raises(Refusal, match="an invertible matrix as `right`"):
        KroneckerGaussian(q.loc, q.left, torch.zeros(3, 3).double(), q.log_scale)
    with pytest.raises(Refusal, match="finite real numbers"):
        KroneckerGaussian(q.loc, q.left, q.right, q.log_scale + torch.inf)
    with pytest.raises(Refusal, match="at most 4096 inputs and outputs"):
        KroneckerGaussian.initial(torch.zeros(2, 5000), 0.1)
    with pytest.raises(Refusal, match="turns the noise"):
        q.parameter_actions(Action.trivial(Cyclic(2), (2, 3)))
    assert VariationalTensor(q, FullGaussian.initial(torch.zeros(2, 3).double(), 1.0)).kl() > 0
