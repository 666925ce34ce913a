"""One suite that every family passes, and divergences of every pair against torch and Monte Carlo."""
import copy
import io
import math
import pickle

import pytest
import torch
from family_suite import FamilySuite
from torch import distributions as D

from helpers import seeded
from helpers_posterior import NAMES, NORMAL, SHAPE, SIZE, each_family, members, random, unchecked_shapes
from symbnn.equivariance.averages import average, average_rule
from symbnn.equivariance.expansion import expansion_rule
from symbnn.equivariance.tied import Tied
from symbnn.errors import Refusal
from symbnn.hidden_units.unit_densities import UnitLaw, unit_rule
from symbnn.posterior.block_gaussian import BlockGaussian
from symbnn.posterior.divergences import log_affinity, wasserstein2_squared, wasserstein_rule
from symbnn.posterior.families import FAMILIES
from symbnn.posterior.family import Closure, ContinuousFamily, Family, monomial
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import IndependentFamily, Laplace, MeanFieldGaussian
from symbnn.posterior.kronecker_gaussian import KroneckerGaussian
from symbnn.posterior.log_normal import LogNormal
from symbnn.posterior.point_mass import PointMass
from symbnn.symmetry.actions import natural_action
from symbnn.symmetry.fields import flips, rotations
from symbnn.symmetry.groups import Permutations
from symbnn.symmetry.orbits import Orbits
from symbnn.symmetry.signed_permutations import SignedPermutation
from tolerances import assert_close, exact32, exact64, within_standard_errors

# The suite


class TestMeanFieldGaussian(FamilySuite):
    def member(self, shape, seed=0, trainable=True):
        return MeanFieldGaussian(random(shape, seed), 0.5 * random(shape, seed + 1) - 1, trainable=trainable)


class TestIsotropicGaussian(FamilySuite):
    """Parameters that are stored once for all weights."""

    refused = dict.fromkeys(("geometric", "arithmetic", "projection"), "mean for each weight")

    def member(self, shape, seed=0, trainable=True):
        number = torch.tensor(0.4 + 0.1 * seed, dtype=torch.float64)
        return MeanFieldGaussian(number, -number, shape=shape, trainable=trainable)


class TestLaplace(FamilySuite):
    refused = dict.fromkeys(("geometric", "arithmetic"), "exponential family.*no finite number of statistics")

    def member(self, shape, seed=0, trainable=True):
        return Laplace(random(shape, seed), 0.5 * random(shape, seed + 1) - 1, trainable=trainable)


class TestLogNormal(FamilySuite):
    refused = {"expansion": "log-normal weights cannot have mean zero"}

    def member(self, shape, seed=0, trainable=True):
        mask = torch.where(random(shape, 99) < 0, -1, 1) if len(shape) > 1 else torch.full(shape, -1)
        return LogNormal(random(shape, seed) - 1, 0.5 * random(shape, seed + 1) - 1, mask, trainable=trainable)

    def line(self, q):
        logs = torch.linspace(-12, 12, 100_001, dtype=torch.float64) * q.scale + q.loc
        return (q.mask * logs.exp())[:, None], logs.exp() * (logs[1] - logs[0])

    def network(self, plain, scale=0.3):
        """With positive weights, whose signs every permutation keeps."""
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.abs_()
        return super().network(plain, scale)

    def check_prior(self, q, prior):
        assert torch.equal(prior.mask, q.mask)
        assert_close(prior.loc.exp(), torch.tensor(0.7, dtype=torch.float64))  # the median of the magnitude

    def broken(self):
        return SignedPermutation([0, 1, 2], [1, 1, -1])


class TestBlockGaussian(FamilySuite):
    def member(self, shape, seed=0, trainable=True):
        return BlockGaussian(random(shape, seed), 0.5 * random((1,) * len(shape), seed + 1) - 1, trainable=trainable)

    def broken(self):
        return torch.diag(torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64))  # a block of unequal scales


class TestFullGaussian(FamilySuite):
    refused = {"expansion": "correlations between the blocks", "units": "weights are correlated"}

    def member(self, shape, seed=0, trainable=True):
        n = math.prod(shape)
        root = 0.3 / n**0.5 * random((n, n), seed + 2).tril(-1) + (0.5 * random((n,), seed + 1) - 1).exp().diag()
        return FullGaussian(random(shape, seed), root, trainable=trainable)

    def broken(self):
        return None


class TestKroneckerGaussian(FamilySuite):
    refused = {
        "expansion": "correlations between the blocks", "units": "weights are correlated",
        **dict.fromkeys(("geometric", "arithmetic", "projection"), "a sum of Kronecker products"),
    }

    def member(self, shape, seed=0, trainable=True):
        rows, columns = KroneckerGaussian.sides(shape)
        left, right = (0.3 / n**0.5 * random((n, n), seed + 2) + torch.eye(n).double() for n in (rows, columns))
        return KroneckerGaussian(random(shape, seed), left, right, 0.5 * random((rows, columns), seed + 1) - 1,
                                 trainable=trainable)

    def broken(self):
        return None  # one axis: every map acts on the outputs alone


class TestPointMass(FamilySuite):
    refused = {
        "density": "has a density", "kl": "has a density", "affinity": "which have none", "bound": "has a density",
        "geometric": "have no density", "arithmetic": "have no density", "units": "all of its mass lies at one point",
    }

    def member(self, shape, seed=0, trainable=True):
        return PointMass(random(shape, seed), trainable=trainable)

    def broken(self):
        return None


# Two families of somebody else: one with rules for most of the operations, one with none


class StudentT(IndependentFamily):
    """Independent Student-t weights of twelve degrees of freedom."""

    symmetric = True
    freedom = 12

    def _log_variance(self):
        return 2 * self.log_scale + math.log(self.freedom / (self.freedom - 2))

    def noise(self, draws, generator=None):
        normal = torch.randn((self.freedom + 1, draws, *self.shape), generator=generator, dtype=self.loc.dtype)
        return normal[0] / normal[1:].square().mean(0).sqrt()

    def distribution(self):
        return D.Independent(D.StudentT(self.freedom, self.mean, self.scale), len(self.shape))


@wasserstein_rule.register
def _wasserstein_of_student_t(q: StudentT, p: StudentT):
    return (q.mean - p.mean).square().sum() + (q.variance.sqrt() - p.variance.sqrt()).square().sum()


@average_rule.register(StudentT)
def _average_student_t(family, action, barycentre):
    if barycentre != "projection":
        raise Refusal("a projection", got=barycentre, cause="no other average is a Student-t law", fix="projection")
    scale = Orbits(action.absolute()).project(family.scale)
    return StudentT(Orbits(action).project(family.loc), scale.log(), trainable=family.trainable)


@expansion_rule.register(StudentT)
def _expand_student_t(family, widen):
    return StudentT(widen(family.loc), widen(family.log_scale, scales=True), trainable=family.trainable)


def _student_t_pairs(x, loc, log_scale):
    return D.StudentT(StudentT.freedom, loc, log_scale.exp()).log_prob(x[:, :, None]).sum(-1)


@unit_rule.register(StudentT)
def _student_t_units(posterior):
    return UnitLaw(_student_t_pairs, (posterior.loc, posterior.log_scale))


class TestStudentT(FamilySuite):
    refused = {
        "kl": "no closed form is known for this pair", "bound": "no closed form is known for this pair",
        "affinity": r"rule for the Hellinger affinity.*a StudentT.*affinity_rule\.register\(StudentT\)",
        "geometric": "no other average", "arithmetic": "no other average",
    }

    def member(self, shape, seed=0, trainable=True):
        return StudentT(random(shape, seed), 0.5 * random(shape, seed + 1) - 1, trainable=trainable)


class Gumbel(ContinuousFamily):
    """Independent Gumbel weights, which are skewed: closed under maps that permute weights and stretch them."""

    def __init__(self, loc, log_scale, *, trainable=True):
        super().__init__(loc.shape, trainable)
        self._hold("loc", loc)
        self._hold("log_scale", log_scale)

    @classmethod
    def initial(cls, mean, scale, trainable=True):
        return cls(mean, torch.full_like(mean, scale).log(), trainable=trainable)

    def distribution(self):
        return D.Independent(D.Gumbel(self.loc, self.log_scale.exp()), len(self.shape))

    @property
    def mean(self):
        return self.distribution().mean

    @property
    def variance(self):
        return self.distribution().variance

    def noise(self, draws, generator=None):
        exponential = torch.empty((draws, *self.shape)).exponential_(generator=generator)
        return -exponential.log().to(self.loc.dtype)

    def transport(self, noise):
        return self.loc + self.log_scale.exp() * noise

    def _closure(self, map):
        pair = monomial(map, self.loc)
        keeps = pair is not None and bool((pair[1] > 0).all())
        return Closure(keeps, "skewed weights may be permuted and stretched, and neither mixed nor turned over")

    def _pushed(self, map):
        index, factor = monomial(map, self.loc)
        loc, log_scale = (value.flatten()[index] for value in (self.loc, self.log_scale))
        return Gumbel((factor * loc).view(self.shape), (log_scale + factor.log()).view(self.shape),
                      trainable=self.trainable)


class TestGumbel(FamilySuite):
    """Nothing is registered, and each refusal says what is missing, for which class, and how it is added."""

    refused = {
        "affinity": r"the Hellinger affinity.*a Gumbel.*@affinity_rule\.register\(Gumbel\)",
        "wasserstein": r"the Wasserstein distance.*a Gumbel.*@wasserstein_rule\.register\(Gumbel\)",
        "expansion": r"orbit expansion.*a Gumbel.*'0\.weight'.*@expansion_rule\.register\(Gumbel\)",
        "units": "does not factorise.*a Gumbel, for which none is registered", "bound": "Hellinger affinity.*a Gumbel",
        **dict.fromkeys(("geometric", "arithmetic", "projection"),
                        r"the average over a group.*a Gumbel.*@average_rule\.register\(Gumbel\)"),
    }

    def member(self, shape, seed=0, trainable=True):
        return Gumbel(random(shape, seed), 0.5 * random(shape, seed + 1) - 1, trainable=trainable)


def test_a_subclass_has_the_rules_of_its_class():
    class Renamed(MeanFieldGaussian):
        pass

    q, p = (Renamed(random((3,), seed), random((3,), seed + 1)) for seed in (0, 7))
    plain = [MeanFieldGaussian(member.loc, member.log_scale) for member in (q, p)]
    assert_close(log_affinity(q, p), log_affinity(*plain))
    found = average(q, natural_action(Permutations(3)))
    assert type(found) is Renamed
    with pytest.raises(Refusal, match="two members of one family"):
        log_affinity(q, plain[1])


def test_no_family_takes_back_what_it_inherits():
    assert not issubclass(BlockGaussian, IndependentFamily) and "marginal" not in vars(BlockGaussian)
    assert not issubclass(PointMass, ContinuousFamily)
    assert not {"log_prob", "entropy", "distribution"} & vars(PointMass).keys()


def tied(action, seed):
    orbits = Orbits(action)
    return Tied(MeanFieldGaussian(random((orbits.dimension,), seed), random((orbits.dimension,), seed + 1)), orbits)


def test_tied_weights_have_the_rules_of_their_coordinates():
    kernel = rotations().kernel(3, 3)
    q, p = tied(kernel, 0), tied(kernel, 7)
    assert_close(log_affinity(q, p), log_affinity(q.base, p.base))
    noise = q.noise(100_000, seeded(1))
    cost = (q.transport(noise) - p.transport(noise)).square().flatten(1).sum(1)
    within_standard_errors(cost.mean(), wasserstein2_squared(q, p), cost.std() / math.sqrt(len(cost)))
    for kind in ("geometric", "arithmetic", "projection"):
        found = average(q, kernel, kind)
        assert type(found) is Tied and torch.equal(found.mean, q.mean)
    other = tied(flips().kernel(3, 3), 0)
    with pytest.raises(Refusal, match="two laws that tie the same weights"):
        log_affinity(q, other)


# Every family by name

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
