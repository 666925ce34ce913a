"""Families: one suite that every family passes; divergences against torch and Monte Carlo; closedness, exhaustively."""
import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributions as D

from late import ONE_MOVES, ORDERS, reordered
from symbnn.errors import Refusal
from symbnn.posterior.block_gaussian import BlockGaussian
from symbnn.posterior.families import FAMILIES
from symbnn.posterior.family import Family
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.log_normal import LogNormal
from symbnn.posterior.point_mass import PointMass
from symbnn.symmetry.actions import Action
from symbnn.symmetry.fields import rotations, rotations_and_flips
from symbnn.symmetry.groups import Cyclic
from symbnn.symmetry.signed_permutations import SignedPermutation
from tolerances import assert_close, exact32, exact64, within_standard_errors

SHAPE, SIZE = (3, 2), 6


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def lower(n: int, seed: int) -> torch.Tensor:
    return 0.5 * random((n, n), seed).tril(-1) + torch.diag(0.3 + random((n,), seed + 1).abs())


def members(shape: tuple[int, ...] = SHAPE, seed: int = 0, trainable: bool = True) -> dict[str, Family]:
    """A member of each family over `shape` in float64; "isotropic" keeps its parameters as numbers."""
    n = math.prod(shape)
    loc, log_scale, rows = random(shape, seed), 0.5 * random(shape, seed + 1) - 1, (shape[0], *[1] * (len(shape) - 1))
    mask = torch.where(random(shape, 99) < 0, -1, 1)
    number = torch.tensor(0.4 + 0.1 * (seed % 5), dtype=torch.float64)
    return {
        "gaussian": MeanFieldGaussian(loc, log_scale, trainable=trainable),
        "isotropic": MeanFieldGaussian(number, -number, shape=shape, trainable=trainable),
        "laplace": Laplace(loc, log_scale, trainable=trainable),
        "lognormal": LogNormal(loc - 1, log_scale, mask, trainable=trainable),
        "block": BlockGaussian(loc, 0.5 * random(rows, seed + 2) - 1, trainable=trainable),
        "full": FullGaussian(loc, lower(n, seed + 3), trainable=trainable),
    }


NAMES = list(members())
EXPONENTIAL = [name for name in NAMES if name != "laplace"]
each_family = pytest.mark.parametrize("name", NAMES)


def signed_permutations(n: int) -> list[SignedPermutation]:
    return [SignedPermutation(torch.tensor(order), torch.tensor(sign))
            for order in itertools.permutations(range(n)) for sign in itertools.product((1, -1), repeat=n)]


def orthogonal(n: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(random((n, n), seed)).Q


def image(matrix: torch.Tensor, theta: torch.Tensor, q: Family) -> torch.Tensor:
    return (theta.reshape(len(theta), -1) @ matrix.T).view(theta.shape)


# The suite that every family passes


@each_family
def test_starts_at_given_weights(name):
    mean = random(SHAPE, 5)
    for trainable in (True, False):
        q = type(members()[name]).initial(mean, 0.2, trainable=trainable)
        assert q.shape == SHAPE == tuple(q.scale.shape) == tuple(q.variance.shape) == tuple(q.mean.shape)
        assert_close(q.mean, mean)
        assert_close(q.scale, torch.full(SHAPE, 0.2, dtype=torch.float64))
        assert q.trainable is trainable and bool(list(q.parameters())) is trainable
    assert FAMILIES[{"isotropic": "gaussian"}.get(name, name)] is type(q)


@each_family
def test_same_names_trained_and_frozen(name):
    q = members()[name]
    frozen = q.freeze()
    assert set(q.state_dict()) == set(frozen.state_dict()) and not list(frozen.parameters()) and list(q.parameters())
    assert q.trainable and not frozen.trainable and "trainable=False" in repr(frozen)
    other = members(seed=7)[name].freeze()
    other.load_state_dict(q.state_dict())
    assert_close(other.log_prob(q.mean), q.log_prob(q.mean))
    q.load_state_dict(members(seed=7)[name].freeze().state_dict())
    assert not torch.equal(q.mean, other.mean)


@each_family
def test_copies(name):
    q = members()[name]
    buffer = io.BytesIO()
    torch.save(q.state_dict(), buffer)
    buffer.seek(0)
    loaded = members(seed=7)[name]
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for copied in (copy.deepcopy(q), pickle.loads(pickle.dumps(q)), loaded):
        assert type(copied) is type(q) and copied.shape == q.shape and copied.trainable is q.trainable
        assert torch.equal(copied.log_prob(q.mean), q.log_prob(q.mean))
        with torch.no_grad():
            copied.loc += 1
        assert not torch.equal(copied.mean, q.mean)


@each_family
def test_does_not_alias_its_arguments(name):
    mean = random(SHAPE, 5)
    q = type(members()[name]).initial(mean, 0.2)
    before = q.mean.detach().clone()
    mean += 1
    assert torch.equal(q.mean, before)


def check_everything_runs(q: Family, dtype: torch.dtype, device: str) -> None:
    theta = q.rsample(4, torch.Generator(device).manual_seed(0))
    prior = MeanFieldGaussian(torch.zeros((), dtype=dtype), torch.zeros((), dtype=dtype), shape=SHAPE).to(device)
    pushed = q.push_forward(SignedPermutation.identity(SIZE))
    values = [theta, q.log_prob(theta), q.entropy(), q.kl(prior), q.mean, q.scale, q.variance, pushed.mean]
    values.append(q.push_forward(torch.eye(SIZE, dtype=torch.float64)).mean)
    assert all(v.dtype == dtype and v.device.type == device and bool(v.isfinite().all()) for v in values)
    assert theta.shape == (4, *SHAPE) and q.log_prob(theta).shape == (4,) and q.kl(prior).shape == ()


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes(name, dtype):
    check_everything_runs(members()[name].to(dtype), dtype, "cpu")


@each_family
def test_on_cuda(name, require_cuda):
    q = members()[name].float()
    theta = q.rsample(4, seeded(0))
    moved = copy.deepcopy(q).to(require_cuda)
    check_everything_runs(moved, torch.float32, "cuda")
    assert_close(moved.log_prob(theta.to(require_cuda)), q.log_prob(theta), exact32)
    for map in (SignedPermutation.identity(SIZE), torch.eye(SIZE), torch.eye(SIZE, device=require_cuda)):
        assert moved.push_forward(map).mean.device.type == "cuda"


@each_family
def test_draws_are_transported_noise_and_repeat(name):
    q = members()[name]
    first, again = q.rsample(5, seeded(3)), q.rsample(5, seeded(3))
    assert torch.equal(first, again) and torch.equal(first, q.transport(q.noise(5, seeded(3))))
    assert not torch.equal(first, q.rsample(5, seeded(4)))
    first.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in q.parameters())
    assert not q.noise(5).requires_grad


@each_family
def test_moments_of_draws(name):
    q = members()[name].freeze()
    theta, n = q.rsample(200_000, seeded(1)), 200_000
    within_standard_errors(theta.mean(0), q.mean, theta.std(0) / math.sqrt(n))
    square = (theta - q.mean) ** 2
    within_standard_errors(square.mean(0), q.variance, square.std(0) / math.sqrt(n))
    log_prob = q.log_prob(theta)
    within_standard_errors(-log_prob.mean(), q.entropy(), log_prob.std() / math.sqrt(n))


@each_family
def test_density_is_torchs(name):
    q = members()[name]
    theta = q.rsample(6, seeded(2)).detach()
    reference = q.distribution()
    assert tuple(reference.event_shape) == SHAPE and tuple(reference.batch_shape) == ()
    assert_close(q.log_prob(theta), reference.log_prob(theta))
    assert_close(q.log_prob(theta.view(2, 3, *SHAPE)), reference.log_prob(theta).view(2, 3))
    assert_close(q.log_prob(theta[0]), reference.log_prob(theta[0]))


@each_family
def test_scalar_and_empty_batches(name):
    if name not in ("isotropic", "full"):
        q = type(members()[name]).initial(torch.tensor(0.7), 0.1)
        assert q.shape == () and q.rsample(3).shape == (3,) and q.log_prob(q.rsample(3)).shape == (3,)
        assert_close(q.log_prob(q.mean), q.distribution().log_prob(q.mean), exact32)


@each_family
def test_wrong_shapes_are_refused(name):
    q = members()[name]
    for wrong in (torch.zeros(2), torch.zeros(4, 2, 3), torch.zeros(SIZE), torch.zeros(())):
        with pytest.raises(Refusal, match="shape"):
            q.log_prob(wrong.double())
    with pytest.raises(Refusal, match="own tensor"):
        q.kl(members((2, 3))[name])


@each_family
def test_bad_parameters_are_refused(name):
    family = type(members()[name])
    for mean, scale in ((torch.tensor([math.nan, 1.0]), 0.1), (torch.zeros(2), 0.0), (torch.zeros(2), -1.0),
                        (torch.zeros(2), math.inf), (torch.zeros(2), torch.ones(3)), (torch.zeros(2), math.nan)):
        with pytest.raises(Refusal):
            family.initial(mean, scale)


@each_family
@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1.0, 1e10])
def test_no_nan_in_float32(name, scale):
    family = type(members()[name])
    mean = torch.tensor([0.0, 1.0, -3.0])
    for prior_scale in (1e-20, 1.0, 1e10):
        q = family.initial(mean, scale)
        own = family.initial(mean.abs() * torch.where(mean < 0, -1, 1), prior_scale, trainable=False)
        gaussian = MeanFieldGaussian.initial(torch.zeros(3), prior_scale, trainable=False)
        theta = q.rsample(3, seeded(0)).detach()
        values = [q.mean, q.scale, q.variance, theta, q.log_prob(theta), q.entropy(), q.kl(own), q.kl(gaussian)]
        assert not any(bool(v.isnan().any()) for v in values), [v.isnan().any().item() for v in values]
        double = copy.deepcopy(q).double()
        around = MeanFieldGaussian.initial(mean, prior_scale, trainable=False)
        for value, other in ((q.kl(own), own), (q.kl(gaussian), gaussian), (q.kl(around), around)):
            exact = double.kl(copy.deepcopy(other).double())
            if exact < 1e30:  # and where the value is a float32 it is right
                assert_close(value / exact.clamp(min=1.0), exact / exact.clamp(min=1.0), 1e-4)
        if name != "lognormal" or scale <= 1:  # exp(1e10) is no float
            (q.entropy() + q.kl(own) + q.rsample(3, seeded(0)).sum()).backward()
            assert not any(bool(p.grad.isnan().any()) for p in q.parameters())


@each_family
def test_symmetric_means_that_flipout_keeps_the_law(name):
    q = members()[name].freeze()
    theta = q.rsample(5, seeded(0))
    flipped = q.mean + (theta - q.mean) * torch.where(random(SHAPE, 3) < 0, -1, 1)
    assert q.symmetric is torch.allclose(q.log_prob(flipped), q.log_prob(theta), rtol=exact64)
    assert q.exponential is (name in EXPONENTIAL)


def test_log_normal_spread_below_the_smallest_float():
    q = LogNormal.initial(torch.tensor([0.5, -2.0]), 1e-25)  # the variance of the logarithms underflows
    q.kl(MeanFieldGaussian.initial(torch.zeros(2), 1.0)).backward()
    assert all(bool(p.grad.isfinite().all()) for p in q.parameters())


@each_family
def test_compiles(name):
    q, own = members()[name], members(seed=7, trainable=False)[name]
    prior = members(trainable=False)["isotropic"]
    noise = q.noise(3, seeded(0))
    theta = q.transport(noise).detach()

    def everything():
        return (q.transport(noise), q.log_prob(theta), q.entropy(), q.kl(prior), q.mean, q.variance, q.rsample(2).shape)

    torch._dynamo.reset()
    for compiled, direct in zip(torch.compile(everything, backend="aot_eager", fullgraph=True)(), everything()):
        assert_close(torch.tensor(compiled) if isinstance(compiled, tuple) else compiled, direct)
    whole = name != "lognormal"  # comparing two sign masks looks at their values
    assert_close(torch.compile(q.kl, backend="aot_eager", fullgraph=whole)(own), q.kl(own))
    torch._dynamo.reset()


# Divergences


def independent_reference(name: str, q: Family) -> D.Distribution:
    """The same law built from torch.distributions without the family's own `distribution`."""
    n = len(q.shape)
    if name == "full":
        return D.MultivariateNormal(q.loc.flatten(), q.scale_tril @ q.scale_tril.T)
    if name == "lognormal":  # a bijection changes no divergence: that of the logarithms
        return D.Independent(D.Normal(q.loc.expand(q.shape), q.log_scale.exp().expand(q.shape)), n)
    law = D.Laplace if name == "laplace" else D.Normal
    return D.Independent(law(q.loc.expand(q.shape), q.log_scale.exp().expand(q.shape)), n)


NORMAL = {"gaussian", "isotropic", "block"}
TORCH = ([(a, a) for a in NAMES] + [(a, b) for a in NORMAL for b in NORMAL if a != b] + [(a, "laplace") for a in NORMAL]
         + [("laplace", b) for b in NORMAL])
TORCH = sorted(set(TORCH))
MIXED = sorted([(a, b) for a in ("lognormal",) for b in (*NORMAL, "full")] + [("full", b) for b in NORMAL]
               + [(a, "full") for a in (*NORMAL, "laplace")])


@pytest.mark.parametrize("a, b", TORCH)
def test_divergence_is_torchs(a, b):
    q, p = members()[a], members(seed=7, trainable=False)[b]
    expected = D.kl_divergence(independent_reference(a, q), independent_reference(b, p))
    assert_close(q.kl(p), expected)


@pytest.mark.parametrize("a, b", [("full", b) for b in sorted(NORMAL)] + [(a, "full") for a in sorted(NORMAL)])
def test_divergence_of_full_and_mean_field_is_that_of_multivariate_normals(a, b):
    q, p = members()[a], members(seed=7, trainable=False)[b]
    laws = [D.MultivariateNormal(r.mean.flatten(), r.scale_tril @ r.scale_tril.T if name == "full" else
                                 torch.diag(r.variance.flatten())) for name, r in ((a, q), (b, p))]
    assert_close(q.kl(p), D.kl_divergence(*laws))


@pytest.mark.parametrize("a, b", TORCH + MIXED)
def test_divergence_by_monte_carlo(a, b):
    q, p = members((2,)), members((2,), seed=7, trainable=False)
    q, p = q[a].freeze(), p[b]
    n = 1_000_000
    theta = q.rsample(n, seeded(11))
    terms = q.log_prob(theta) - p.log_prob(theta)
    within_standard_errors(terms.mean(), q.kl(p), terms.std() / math.sqrt(n))


@each_family
def test_divergence_from_itself_is_zero(name):
    q = members()[name]
    assert_close(q.kl(q.freeze()), torch.tensor(0.0))


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


def test_divergences_without_a_finite_closed_form_are_refused():
    q, p = members(), members(seed=7, trainable=False)
    for a, b, reason in (("lognormal", "laplace", "no closed form"), ("full", "laplace", "no closed form"),
                         ("gaussian", "lognormal", "infinite"), ("laplace", "lognormal", "infinite"),
                         ("full", "lognormal", "infinite")):
        with pytest.raises(Refusal, match=reason):
            q[a].kl(p[b])
    flipped = LogNormal(p["lognormal"].loc, p["lognormal"].log_scale, -p["lognormal"].mask)
    with pytest.raises(Refusal, match="infinite"):
        q["lognormal"].kl(flipped)


# Natural parameters


@pytest.mark.parametrize("name", EXPONENTIAL)
def test_natural_parameters_and_back(name):
    q = members()[name]
    theta = q.rsample(20, seeded(2)).detach()
    natural = q.natural()
    back = type(q).from_natural(natural, trainable=False)
    assert back.shape == q.shape and not back.trainable
    assert_close(back.log_prob(theta), q.log_prob(theta), 1e-10)  # a matrix inverse costs some digits
    for key, value in back.natural().items():
        assert_close(value, natural[key], 1e-10)


def statistics(name: str, theta: torch.Tensor, natural: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(<eta, T(theta)>, log h(theta)) as the chapter defines them."""
    t, log_h = (theta.abs().log(), -theta.abs().log().flatten(1).sum(1)) if name == "lognormal" else (theta, 0.0)
    flat = t.flatten(1)
    if name == "full":
        quadratic = torch.einsum("bi,ij,bj->b", flat, natural["quadratic"], flat)
    else:
        quadratic = (natural["quadratic"] * t**2).expand(t.shape).flatten(1).sum(1)
    return (natural["linear"] * t).flatten(1).sum(1) + quadratic, log_h


@pytest.mark.parametrize("name", EXPONENTIAL)
def test_density_is_that_of_an_exponential_family(name):
    q = members()[name]
    theta = q.rsample(20, seeded(2)).detach()
    inner, log_h = statistics(name, theta, q.natural())
    normaliser = inner + log_h - q.log_prob(theta)  # the same for every theta
    assert_close(normaliser, normaliser[0].expand(20), 1e-11)


@pytest.mark.parametrize("name", EXPONENTIAL)
def test_pushed_natural_parameters_are_affine(name):
    """The action on natural parameters commutes with convex combinations (equation of pushed parameters)."""
    a, b = members()[name], members(seed=7)[name]
    if name == "lognormal":
        map = torch.diag(torch.linspace(0.5, 2.0, SIZE, dtype=torch.float64))  # a factor: linear, not a permutation
    else:
        map = SignedPermutation(torch.tensor([4, 5, 0, 1, 2, 3]), torch.tensor([1, -1, 1, 1, -1, 1]))
    halfway = {k: (a.natural()[k] + b.natural()[k]) / 2 if k != "mask" else a.mask for k in a.natural()}
    pushed = type(a).from_natural(halfway).push_forward(map).natural()
    for key, value in pushed.items():
        assert_close(value, (a.push_forward(map).natural()[key] + b.push_forward(map).natural()[key]) / 2, 1e-10)


def test_natural_refusals():
    with pytest.raises(Refusal, match="exponential"):
        members()["laplace"].natural()
    with pytest.raises(Refusal, match="exponential"):
        Laplace.from_natural({})
    for name in EXPONENTIAL:
        natural = members()[name].natural()
        with pytest.raises(Refusal, match="negative"):
            type(members()[name]).from_natural({**natural, "quadratic": -natural["quadratic"]})
    with pytest.raises(Refusal, match="float64"):
        MeanFieldGaussian.initial(torch.zeros(2), 1e-25).natural()


# Closedness


def generic_covariance(q: Family) -> torch.Tensor:
    """The covariance of some member of the family of `q` with independent weights, with unrelated scales."""
    scales = q.log_scale if isinstance(q, BlockGaussian) else q.mean
    return torch.diag((0.5 + random(tuple(scales.shape), 5).abs()).expand(q.shape).flatten())


def truth(q: Family, matrix: torch.Tensor) -> bool:
    """Whether the image is in the family, from moments or support and not from the code under test."""
    if isinstance(q, FullGaussian):
        return True
    if isinstance(q, LogNormal):
        theta = image(matrix, q.rsample(200, seeded(0)).detach(), q)
        return bool(q.log_prob(theta).isfinite().all())
    moved = matrix @ generic_covariance(q) @ matrix.T
    scale = moved.diagonal().max()
    if (moved - moved.diagonal().diag()).abs().max() > exact64 * scale:
        return False
    if isinstance(q, BlockGaussian):
        variance = moved.diagonal().view(q.shape)
        return all(float(variance[q.blocks == b].max() - variance[q.blocks == b].min()) <= exact64 * scale
                   for b in range(q.log_scale.numel()))
    return True


def check_closedness(q: Family, map) -> bool:
    """`is_closed_under` tells the truth, and `push_forward` is the law of the image or refuses."""
    matrix = map.matrix().double() if isinstance(map, SignedPermutation) else map
    closure = q.is_closed_under(map)
    assert bool(closure) == truth(q, matrix), closure.reason
    if not closure:
        with pytest.raises(Refusal, match="closed"):
            q.push_forward(map)
        return False
    pushed = q.push_forward(map)
    assert type(pushed) is type(q) and pushed.trainable == q.trainable and pushed.shape == q.shape
    theta = q.rsample(5, seeded(1)).detach()
    expected = q.log_prob(theta) - torch.linalg.slogdet(matrix).logabsdet
    loss = torch.linalg.cond(matrix) if isinstance(q, FullGaussian) else 1.0  # digits that solving for the noise costs
    assert_close(pushed.log_prob(image(matrix, theta, q)), expected, float(exact64 * loss))
    return True


@each_family
def test_all_signed_permutations_of_three_coordinates(name):
    q = members((3,), trainable=False)[name]
    closed = sum(check_closedness(q, p) for p in signed_permutations(3))
    assert closed == (6 if name == "lognormal" else 48)  # one choice of signs for each permutation keeps the mask


@pytest.mark.parametrize("mask", list(itertools.product((1, -1), repeat=3)))
def test_every_mask(mask):
    loc = torch.zeros(3, dtype=torch.float64)
    q = LogNormal(loc, loc, torch.tensor(mask), trainable=False)
    assert sum(check_closedness(q, p) for p in signed_permutations(3)) == 6


@pytest.mark.parametrize("scales, closed", [((2, 2), 384), ((2, 1), 128), ((1, 2), 128), ((1, 1), 384)])
def test_all_signed_permutations_of_four_coordinates_with_blocks(scales, closed):
    q = BlockGaussian(random((2, 2), 0), random(scales, 1), trainable=False)
    assert sum(check_closedness(q, p) for p in signed_permutations(4)) == closed


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


def test_storage_of_broadcast_parameters():
    zero, number = torch.zeros(()), torch.tensor(0.3)
    order = SignedPermutation(torch.tensor([1, 0, 2, 3]), torch.ones(4))
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


# Point masses


def test_a_point_mass_scores_the_priors_density():
    loc = random(SHAPE, 1)
    point = PointMass.initial(loc, 0.3)
    for name, prior in members(seed=7, trainable=False).items():
        inside = loc.abs() * prior.mask if name == "lognormal" else loc
        assert_close(PointMass(inside).kl(prior), -prior.log_prob(inside))
    prior = members(trainable=False)["gaussian"]
    point.kl(prior).backward()
    assert_close(point.loc.grad, (loc - prior.mean) / prior.variance)


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
    shift = SignedPermutation(torch.arange(SIZE).roll(3), -torch.ones(SIZE))
    action = Action(Cyclic(2), SHAPE, lambda g: shift if g else SignedPermutation.identity(SIZE))
    assert torch.equal(point.parameter_actions(action)["loc"].act(1, point.loc), point.push_forward(action(1)).loc)
    assert torch.equal(point.marginal(torch.tensor([4, 0])).loc, point.loc.flatten()[[4, 0]])


@pytest.mark.parametrize("ask", [lambda q: q.entropy(), lambda q: q.log_prob(q.loc), lambda q: q.distribution(),
                                 lambda q: q.kl(q), lambda q: members()["gaussian"].kl(q), lambda q: q.natural()])
def test_what_a_point_mass_does_not_have_is_refused(ask):
    with pytest.raises(Refusal):
        ask(PointMass(random(SHAPE, 1)))


# --- conditions over all generators, one of which alone breaks them


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


@pytest.mark.parametrize("order", ORDERS)
def test_a_scale_of_two_weights_that_one_generator_tears_apart(order):
    square = reordered(rotations_and_flips().on(2, 2), order)  # the flip keeps rows, the turn does not
    rows = MeanFieldGaussian(torch.zeros(2, 2), torch.zeros(2, 1))
    with pytest.raises(Refusal, match="as one number"):
        rows.parameter_actions(square)
    assert not BlockGaussian(torch.zeros(2, 2), torch.zeros(2, 1)).is_closed_under(square)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [MeanFieldGaussian, Laplace, LogNormal, BlockGaussian])
def test_sums_over_many_half_precision_weights_are_finite_and_right(kind, dtype):
    loc = torch.linspace(-2, 2, 90_000).view(300, 300).to(dtype)
    one, prior = kind.initial(loc, 0.05), kind.initial(torch.where(loc < 0, -1.0, 1.0).to(dtype), 1.0, trainable=False)
    exact = one.in_dtype(torch.float64).kl(prior.in_dtype(torch.float64))
    found = one.kl(prior)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)
    found.backward()
    assert one.loc.grad.dtype == dtype and one.loc.grad.isfinite().all()
    theta = one.rsample(2, torch.Generator().manual_seed(0)).detach()
    for value in (one.log_prob(theta), one.entropy()):
        assert value.dtype == torch.float32 and value.isfinite().all()


def test_kl_between_far_half_precision_members_does_not_overflow():
    far = [MeanFieldGaussian(torch.full((4,), mean).half(), torch.full((4,), log_scale).half())
           for mean, log_scale in ((300.0, 0.0), (0.0, -5.0))]
    exact = far[0].in_dtype(torch.float64).kl(far[1].in_dtype(torch.float64)).item()
    assert far[0].kl(far[1]).item() == pytest.approx(exact, rel=1e-5)


def test_members_in_another_type_share_the_gradient():
    member = MeanFieldGaussian.initial(torch.ones(3), 0.5)
    wide = member.in_dtype(torch.float64)
    assert wide.loc.dtype == torch.float64 and not list(wide.parameters()) and member.loc.dtype == torch.float32
    (wide.loc.sum() + wide.log_scale.sum()).backward()
    assert torch.equal(member.loc.grad, torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", [MeanFieldGaussian, Laplace, BlockGaussian, FullGaussian, LogNormal])
def test_densities_and_entropies_of_half_precision_are_those_of_the_same_law(family, dtype):
    """Far away, where a square or a distance overflows float16, and for a matrix, which torch does not solve in it."""
    member = family.initial(torch.full((4, 3), 0.25, dtype=dtype), 1e-3)
    whole = member.in_dtype(torch.float64)
    theta = torch.full((2, 4, 3), 0.75, dtype=dtype)
    found = member.log_prob(theta)
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert (found - whole.log_prob(theta.double())).abs().max() <= 1e-3 * found.abs().max()
    assert abs(member.entropy() - whole.entropy()) <= 1e-4 * abs(whole.entropy())
