"""Independent weights: known values, and parameters that are stored broadcast."""
import math

import pytest
import torch

from helpers_posterior import SHAPE, check_closedness, members, random
from late import ORDERS, reordered
from symbnn.errors import Refusal
from symbnn.posterior.block_gaussian import BlockGaussian
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.log_normal import LogNormal
from symbnn.symmetry.fields import rotations_and_flips
from symbnn.symmetry.signed_permutations import SignedPermutation
from tolerances import assert_close


def test_known_values():
    one = {"trainable": False}

    def number(value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float64)

    wide = MeanFieldGaussian(number(1), number(math.log(2)), **one)
    unit = MeanFieldGaussian(number(0), number(0), **one)
    assert_close(wide.kl(unit), number(2 - math.log(2)))
    assert_close(unit.kl(wide), number(math.log(2) - 0.25))
    a, b = Laplace(number(0), number(0), **one), Laplace(number(1), number(math.log(2)), **one)
    assert_close(a.kl(b), number(math.log(2) + math.exp(-1) / 2 - 0.5))
    log_normal = LogNormal(number(0), number(0), torch.tensor(1), **one)
    # -E log phi(X) - H with E X^2 = e^2: e^2/2 + log(2 pi)/2 - (1 + log(2 pi))/2
    assert_close(log_normal.kl(unit), number((math.exp(2) - 1) / 2))
    assert_close(unit.log_prob(number(0)), number(-math.log(2 * math.pi) / 2))
    assert_close(a.log_prob(number(0)), number(-math.log(2)))


def test_broadcast_parameters_count_every_weight():
    prior = members(trainable=False)["isotropic"]
    expanded = MeanFieldGaussian(prior.mean, prior.log_scale.expand(SHAPE), trainable=False)
    for q in (*members().values(), prior, expanded):
        assert_close(q.kl(prior), q.kl(expanded))
    assert_close(prior.entropy(), expanded.entropy())
    assert_close(prior.log_prob(random(SHAPE, 1)), expanded.log_prob(random(SHAPE, 1)))
    assert_close(prior.kl(members()["full"]), expanded.kl(members()["full"]))


@pytest.mark.parametrize("degrees", [1e-9, 1e-4, 30.0, 45.0, 89.9999])
def test_only_quarter_turns_keep_a_mean_field_family(degrees):
    a = math.radians(degrees)
    turn = torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=torch.float64)
    same_scales = MeanFieldGaussian(torch.zeros(2).double(), torch.zeros(2).double())
    for q in (same_scales, *(members((2,))[name] for name in ("gaussian", "isotropic", "laplace", "lognormal"))):
        assert not q.is_closed_under(turn)  # about the family, even where this member is invariant
    quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    for q in (same_scales, *(members((2,))[name] for name in ("gaussian", "isotropic", "laplace"))):
        assert check_closedness(q, quarter)


def test_storage_of_broadcast_parameters():
    zero, number = torch.zeros(()), torch.tensor(0.3)
    order = SignedPermutation([1, 0, 2, 3], [1, 1, 1, 1])
    flip = SignedPermutation(torch.arange(4), torch.tensor([-1, 1, 1, 1]))
    stretch = torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0]))
    centred, shifted = (MeanFieldGaussian(loc, number, shape=(2, 2), trainable=False) for loc in (zero, number))
    assert centred.push_forward(order).loc.shape == centred.push_forward(flip).log_scale.shape == ()
    assert centred.push_forward(flip).loc.shape == () and shifted.push_forward(order).loc.shape == ()
    assert torch.equal(shifted.push_forward(flip).loc, torch.tensor([[-0.3, 0.3], [0.3, 0.3]]))
    assert shifted.push_forward(flip).log_scale.shape == ()
    assert centred.push_forward(stretch).log_scale.shape == (2, 2) and centred.push_forward(stretch).loc.shape == ()
    block = BlockGaussian(torch.zeros(()), torch.zeros(2, 1), shape=(2, 2))
    assert block.push_forward(order).loc.shape == () and block.push_forward(order).log_scale.shape == (2, 1)
    one = LogNormal(zero, zero, torch.tensor(1), shape=(2, 2)).push_forward(order)
    assert one.loc.shape == one.log_scale.shape == one.mask.shape == ()


@pytest.mark.parametrize("order", ORDERS)
def test_a_scale_of_two_weights_that_one_generator_tears_apart(order):
    square = reordered(rotations_and_flips().on(2, 2), order)  # the flip keeps rows, the turn does not
    rows = MeanFieldGaussian(torch.zeros(2, 2), torch.zeros(2, 1))
    with pytest.raises(Refusal, match="as one number"):
        rows.parameter_actions(square)
    assert not BlockGaussian(torch.zeros(2, 2), torch.zeros(2, 1)).is_closed_under(square)


def test_kl_between_far_half_precision_members_does_not_overflow():
    far = [MeanFieldGaussian(torch.full((4,), mean).half(), torch.full((4,), log_scale).half())
           for mean, log_scale in ((300.0, 0.0), (0.0, -5.0))]
    exact = far[0].in_dtype(torch.float64).kl(far[1].in_dtype(torch.float64)).item()
    assert far[0].kl(far[1]).item() == pytest.approx(exact, rel=1e-5)
