"""One suite that every family passes, and divergences of every pair against torch and Monte Carlo."""
import copy
import io
import math
import pickle

import pytest
import torch
from torch import distributions as D

from helpers_posterior import NAMES, NORMAL, SHAPE, SIZE, each_family, members, random, seeded, unchecked_shapes
from symbnn.errors import Refusal
from symbnn.posterior.block_gaussian import BlockGaussian
from symbnn.posterior.families import FAMILIES
from symbnn.posterior.family import Family
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.log_normal import LogNormal
from symbnn.symmetry.signed_permutations import SignedPermutation
from tolerances import assert_close, exact32, exact64, within_standard_errors

EXPONENTIAL = [name for name in NAMES if name != "laplace"]


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


@each_family
@unchecked_shapes()
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


def independent_reference(name: str, q: Family) -> D.Distribution:
    """The same law built from torch.distributions without the family's own `distribution`."""
    n = len(q.shape)
    if name == "full":
        return D.MultivariateNormal(q.loc.flatten(), q.scale_tril @ q.scale_tril.T)
    if name == "lognormal":  # a bijection changes no divergence: that of the logarithms
        return D.Independent(D.Normal(q.loc.expand(q.shape), q.log_scale.exp().expand(q.shape)), n)
    law = D.Laplace if name == "laplace" else D.Normal
    return D.Independent(law(q.loc.expand(q.shape), q.log_scale.exp().expand(q.shape)), n)


TORCH = sorted({*[(a, a) for a in NAMES], *[(a, b) for a in NORMAL for b in NORMAL],
                *[(a, "laplace") for a in NORMAL], *[("laplace", b) for b in NORMAL]})
MIXED = sorted([(a, b) for a in ("lognormal",) for b in (*NORMAL, "full")] + [("full", b) for b in NORMAL]
               + [(a, "full") for a in (*NORMAL, "laplace")])


@pytest.mark.parametrize("a, b", TORCH)
def test_divergence_is_torchs(a, b):
    q, p = members()[a], members(seed=7, trainable=False)[b]
    expected = D.kl_divergence(independent_reference(a, q), independent_reference(b, p))
    assert_close(q.kl(p), expected)


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
