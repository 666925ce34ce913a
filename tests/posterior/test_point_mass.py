"""Point masses: the prior's density as divergence, and every matrix as a map."""
import pytest
import torch

from helpers import seeded
from helpers_posterior import SHAPE, SIZE, members, random
from symbnn.errors import Refusal
from symbnn.posterior.point_mass import PointMass
from symbnn.symmetry.actions import Action
from symbnn.symmetry.groups import Cyclic
from symbnn.symmetry.signed_permutations import SignedPermutation
from tolerances import assert_close


def test_a_point_mass_scores_the_priors_density():
    loc = random(SHAPE, 1)
    point = PointMass.initial(loc, 0.3)
    for name, prior in members(seed=7, trainable=False).items():
        inside = loc.abs() * prior.mask if name == "lognormal" else loc
        assert_close(PointMass(inside).kl(prior), -prior.log_prob(inside))
    prior = members(trainable=False)["gaussian"]
    point.kl(prior).backward()
    assert_close(point.loc.grad, (loc - prior.mean) / prior.variance)


def test_a_point_at_which_the_prior_has_no_density_is_refused():
    prior, loc = members(trainable=False)["lognormal"], random(SHAPE, 1).abs()
    for factor in (0.0, -1.0):
        outside = loc * prior.mask
        outside.flatten()[3] *= factor
        with pytest.raises(Refusal, match="no density at this point"):
            PointMass(outside).kl(prior)
        with pytest.raises(Refusal, match="no density at this point"):
            PointMass(outside.to(torch.bfloat16)).kl(prior.in_dtype(torch.bfloat16))
    assert PointMass(loc * prior.mask).kl(prior).isfinite()
    tiny = PointMass(1e-30 * loc * prior.mask)
    assert tiny.kl(prior).isfinite()


def test_a_point_mass_draws_itself_and_leaves_the_generator_alone():
    point, generator = PointMass(random(SHAPE, 1)), seeded(0)
    draws = point.rsample(4, generator)
    assert torch.equal(draws, point.loc.detach().expand(4, *SHAPE)) and generator.get_state().equal(
        seeded(0).get_state())
    draws.sum().backward()
    assert torch.equal(point.loc.grad, torch.full(SHAPE, 4.0).double())
    assert not point.variance.any() and not point.scale.any() and list(point.state_dict()) == ["loc"]


def test_a_point_mass_moves_with_every_matrix():
    point, matrix = PointMass(random(SHAPE, 1), trainable=False), random((SIZE, SIZE), 2)
    assert_close(point.push_forward(matrix).loc.flatten(), matrix @ point.loc.flatten())
    assert not point.is_closed_under(torch.zeros(SIZE, SIZE).double())
    shift = SignedPermutation(torch.arange(SIZE).roll(3), -torch.ones(SIZE, dtype=torch.int64))
    action = Action(Cyclic(2), SHAPE, lambda g: shift if g else SignedPermutation.identity(SIZE))
    assert torch.equal(point.parameter_actions(action)["loc"].act(1, point.loc), point.push_forward(action(1)).loc)
    assert torch.equal(point.marginal(torch.tensor([4, 0])).loc, point.loc.flatten()[[4, 0]])


@pytest.mark.parametrize("ask", [lambda q: q.entropy(), lambda q: q.log_prob(q.loc), lambda q: q.distribution(),
                                 lambda q: q.kl(q), lambda q: members()["gaussian"].kl(q), lambda q: q.natural()])
def test_what_a_point_mass_does_not_have_is_refused(ask):
    with pytest.raises(Refusal):
        ask(PointMass(random(SHAPE, 1)))
