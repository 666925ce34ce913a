"""Laplace posteriors against closed forms, against second derivatives, and under groups."""
import warnings

import pytest
import torch
from torch import nn

from helpers import normal
from helpers_layerwise import NOISE, labels, started, with_factors
from symbnn.equivariance.averages import symmetrize
from symbnn.equivariance.bounds import push_forward_divergences
from symbnn.equivariance.expansion import expand
from symbnn.equivariance.mixture import OrbitMixture
from symbnn.equivariance.predictions import orbit_predictions
from symbnn.equivariance.projected_gradients import keep_invariant
from symbnn.equivariance.tied import tie
from symbnn.errors import Refusal
from symbnn.hidden_units.mutual_information import mutual_information
from symbnn.layerwise.kronecker import kronecker_factors
from symbnn.layerwise.laplace_posteriors import joint_laplace, laplace_posterior
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import MeanFieldGaussian
from symbnn.posterior.kronecker_gaussian import KroneckerGaussian
from symbnn.posterior.layers import kl_sum, posterior_mean_network, variational_tensors, with_posteriors
from symbnn.posterior.likelihoods import Bernoulli, Categorical, Poisson
from symbnn.posterior.point_mass import PointMass
from symbnn.posterior.priors import isotropic, per_tensor, random_means
from symbnn.posterior.real_targets import Gaussian
from symbnn.posterior.sampling import sample_weights
from symbnn.symmetry.fields import field, rotations
from symbnn.symmetry.networks import network_action, unit_permutations
from symbnn.training.evaluation import evaluate
from tolerances import assert_close

STRUCTURES = ["diagonal", pytest.param("kronecker", marks=with_factors), "blocks"]
QUIET = pytest.mark.filterwarnings("ignore:These weights are no mode:UserWarning")


def posteriors(network):
    return {name: tensor.posterior for name, tensor in variational_tensors(network).items()}


def covariance(law):
    root = law._root().detach()
    return root @ root.T


def mlp(seed=0):
    return started(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), seed)


def masses(plain, deviation=0.7):
    return with_posteriors(plain, PointMass, prior=isotropic(deviation))


def loss_hessian(network, x, y, likelihood, deviation):
    """The generalised Gauss-Newton matrix plus prior precision, by the definition: J^T H J, one datum at a time."""
    plain = posterior_mean_network(network)
    weights = {name: value.detach() for name, value in plain.named_parameters()}

    def term(row, target):
        def loss(f):
            return -likelihood.log_prob(f[None, None], target[None])[0, 0]

        jacobian = torch.func.jacrev(lambda w: torch.func.functional_call(plain, w, (row[None],))[0])(weights)
        J = torch.cat([part.flatten(1) for part in jacobian.values()], 1)
        return J.T @ torch.func.jacrev(torch.func.jacrev(loss))(plain(row[None])[0]).detach() @ J

    total = sum(term(row, target) for row, target in zip(x, y))
    return total + torch.eye(len(total)).double() / deviation**2


@pytest.mark.parametrize("noise", [NOISE, torch.tensor([0.3, 1.2]).double()])
def test_linear_regression_is_exact(noise):
    x, y, plain = normal(20, 3, seed=1), normal(20, 2, seed=2), nn.Linear(3, 2).double()
    network = masses(plain)
    Lambda = loss_hessian(network, x, y, Gaussian(noise), 0.7)
    scale = torch.as_tensor(noise, dtype=torch.float64).expand(2)
    right = torch.cat([((y / scale**2).T @ x).flatten(), (y / scale**2).sum(0)])
    mode = torch.linalg.solve(Lambda, right)
    nn.utils.vector_to_parameters(mode, plain.parameters())
    joint = joint_laplace(masses(plain), x, y, likelihood=Gaussian(noise))  # no warning: this is the mode
    assert (joint.law.mean - mode).abs().max() < 1e-10
    assert (covariance(joint.law) - torch.linalg.inv(Lambda)).abs().max() < 1e-10
    blocks = posteriors(laplace_posterior(masses(plain), x, y, likelihood=Gaussian(noise), structure="blocks"))
    assert_close(covariance(blocks["weight"]), torch.linalg.inv(Lambda[:6, :6]))


@QUIET
@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(NOISE)])
@pytest.mark.parametrize("batch_size", [3, 128])
def test_each_structure_is_its_part_of_the_precision(likelihood, batch_size):
    network, x = masses(mlp()), normal(11, 3, seed=1)
    y = labels(11) if isinstance(likelihood, Categorical) else normal(11, 3, seed=2)
    Lambda = loss_hessian(network, x, y, likelihood, 0.7)
    options = dict(likelihood=likelihood, batch_size=batch_size)
    assert_close(covariance(joint_laplace(network, x, y, **options).law), torch.linalg.inv(Lambda), 1e-10)
    diagonal = posteriors(laplace_posterior(network, x, y, **options))
    assert_close(torch.cat([law.variance.flatten() for law in diagonal.values()]), 1 / Lambda.diagonal())
    start = 0
    for name, law in posteriors(laplace_posterior(network, x, y, structure="blocks", **options)).items():
        place = slice(start, start + law.numel)
        assert_close(covariance(law), torch.linalg.inv(Lambda[place, place]), 1e-10)
        assert torch.equal(law.mean, posteriors(network)[name].mean)
        start += law.numel


@QUIET
@with_factors
@pytest.mark.parametrize("plain, shape", [
    (mlp(), (3,)), (started(nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))), (2, 3, 3)),
])
def test_kronecker_posteriors_invert_the_product_plus_the_prior(plain, shape):
    network, x = masses(plain), normal(10, *shape, seed=1)
    laws = posteriors(laplace_posterior(network, x, labels(10), structure="kronecker"))
    for name, ((A, B),) in kronecker_factors(network, x).items():
        assert type(laws[name]) is KroneckerGaussian
        precision = torch.kron(B, A) + torch.eye(len(A) * len(B)).double() / 0.7**2
        assert_close(covariance(laws[name]), torch.linalg.inv(precision), 1e-10)


@QUIET
@with_factors
def test_kronecker_posteriors_of_convolutions_have_the_order_of_their_weights():
    """One output pixel and Gaussian noise: the factors are exact, so the law is that of the block."""
    network = masses(started(nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten())))
    x, y, options = normal(9, 2, 2, 2, seed=1), normal(9, 3, seed=2), dict(likelihood=Gaussian(NOISE))
    kron, block = (posteriors(laplace_posterior(network, x, y, structure=structure, **options))["0.weight"]
                   for structure in ("kronecker", "blocks"))
    assert_close(covariance(kron), covariance(block))


@QUIET
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layers, chosen", [
    ("last", ["2.weight", "2.bias"]), (["0"], ["0.weight", "0.bias"]), (["2.weight"], ["2.weight"]), ("2", None)])
def test_some_layers_alone(structure, layers, chosen):
    network, x = masses(mlp()), normal(10, 3, seed=1)
    laws = posteriors(laplace_posterior(network, x, labels(10), structure=structure, layers=layers))
    every = posteriors(laplace_posterior(network, x, labels(10), structure=structure))
    kind = {"diagonal": MeanFieldGaussian, "kronecker": KroneckerGaussian, "blocks": FullGaussian}[structure]
    for name, law in laws.items():
        if name in (chosen or ["2.weight", "2.bias"]):
            assert type(law) is kind
            assert_close(covariance(law), covariance(every[name]))
        else:
            assert type(law) is PointMass and torch.equal(law.mean, posteriors(network)[name].mean)


@QUIET
def test_the_last_layer_is_the_one_that_is_called_last():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(4, 3), nn.Linear(3, 4)

        def forward(self, x):
            return self.head(self.body(x).tanh())

    found = joint_laplace(masses(Backwards()), normal(10, 3).float(), labels(10), layers="last")
    assert found.names == ("head.weight", "head.bias")


@QUIET
def test_a_shared_weight_has_the_curvature_of_all_its_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).tanh())

    network, x, y = masses(started(Twice())), normal(8, 3, seed=1), labels(8)
    assert len(variational_tensors(network)) == 3
    Lambda = loss_hessian(network, x, y, Categorical(), 0.7)
    names = [name for name, _ in posterior_mean_network(network).named_parameters()]
    joint = joint_laplace(network, x, y)
    assert list(joint.names) == names
    assert_close(covariance(joint.law), torch.linalg.inv(Lambda), 1e-10)


@QUIET
@pytest.mark.parametrize("structure", [*STRUCTURES, "joint"])
def test_only_an_invariant_mode_has_an_invariant_posterior(structure):
    plain = started(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)))
    network, turns, images = masses(plain), field(rotations(), (1, 3, 3)), normal(5, 1, 3, 3, seed=1)
    action, every = network_action(network, turns), torch.cat([turns.act(g, images) for g in range(4)])

    def invariant(network, x):
        if structure == "joint":
            return joint_laplace(network, x, labels(len(x))).is_invariant_under(action)
        laws = posteriors(laplace_posterior(network, x, labels(len(x)), structure=structure))
        return all(law.is_invariant_under(action.parameters[name]) for name, law in laws.items())

    fixed = symmetrize(network, action, "projection")
    assert invariant(fixed, every)
    assert not invariant(fixed, images) and not invariant(network, every)


@QUIET
@pytest.mark.parametrize("structure", ["diagonal", pytest.param("kronecker", marks=with_factors), "blocks"])
def test_a_posterior_at_a_moved_mode_is_the_moved_posterior(structure):
    """Closedness: what is computed at g theta from g D is the push-forward of what is computed at theta from D."""
    plain = started(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)))
    network, turns, images = masses(plain), field(rotations(), (1, 3, 3)), normal(5, 1, 3, 3, seed=1)
    action, moved = network_action(network, turns), masses(plain)
    for name, tensor in variational_tensors(moved).items():
        tensor.posterior = tensor.posterior.push_forward(action.parameters[name](1))
    here = posteriors(laplace_posterior(network, images, labels(5), structure=structure))
    there = posteriors(laplace_posterior(moved, turns.act(1, images), labels(5), structure=structure))
    for name, law in here.items():
        assert_close(covariance(law.push_forward(action.parameters[name](1))), covariance(there[name]), 1e-10)


def test_weights_that_are_no_mode_are_called_so():
    x, y = normal(30, 3, seed=1), labels(30)
    with pytest.warns(UserWarning, match=r"no mode: a Newton step would move each by \d"):
        laplace_posterior(masses(mlp(), 0.05), x, y)
    with pytest.warns(UserWarning, match="no mode"):
        joint_laplace(masses(mlp(), 0.05), x, y)
    plain = nn.Linear(3, 3).double()
    for parameter in plain.parameters():
        parameter.data.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        laplace_posterior(masses(plain), x.repeat(3, 1), torch.arange(3).repeat_interleave(30))  # the mode, by symmetry


@QUIET
def test_priors_and_frozen_laws_stay():
    network = masses(mlp())
    variational_tensors(network)["0.bias"].posterior = posteriors(network)["0.bias"].freeze()
    found = laplace_posterior(network, normal(9, 3), labels(9))
    assert not posteriors(found)["0.bias"].trainable and posteriors(found)["0.weight"].trainable
    for name, tensor in variational_tensors(found).items():
        assert_close(tensor.prior.variance, variational_tensors(network)[name].prior.variance)
    assert isinstance(posteriors(network)["0.weight"], PointMass)  # the network itself is left alone
    single = laplace_posterior(masses(mlp().float()), normal(9, 3).float(), labels(9), structure="blocks")
    assert posteriors(single)["0.weight"].mean.dtype == torch.float32


X, Y = normal(9, 3, seed=1), labels(9)
GOOD = masses(mlp())


@pytest.mark.parametrize("arguments, options, message", [
    ((mlp(), X, Y), {}, "a Bayesian network"), ((GOOD, X[:0], Y[:0]), {}, "one or more inputs"),
    ((GOOD, X.log(), Y), {}, "finite inputs"), ((GOOD, X, Y[:4]), {}, "4 targets for 9 inputs"),
    ((GOOD, X, Y + 3), {}, "integer label in 0 ... 2"), ((GOOD, X, normal(9, 3)), {}, "integer label"),
    ((GOOD, X, normal(9, 2)), dict(likelihood=Gaussian(0.1)), "targets of shape"),
    ((GOOD, X, normal(9, 3).log()), dict(likelihood=Gaussian(0.1)), "a target that is known"),
    ((GOOD, X, normal(9, 3).log()), dict(likelihood=Gaussian(0.1, nan_is_missing=True)), "a target that is known"),
    ((GOOD, X, Y), dict(likelihood=Categorical(ignore_index=0)), "a target that is known"),
    ((GOOD, X, Y), dict(likelihood=Poisson()), "whose curvature must be known"),
    ((GOOD, X, Y), dict(likelihood=Bernoulli()), "whose curvature must be known"),
    ((GOOD, X, Y), dict(structure="full"), r"joint_laplace\(network"),
    ((GOOD, X, Y), dict(structure="low"), "structure"),
    ((GOOD, X, Y), dict(layers=["1"]), "names of layers or tensors"),
    ((GOOD, X, Y), dict(layers=[]), "names of layers"),
    ((GOOD, X, Y), dict(layers=3), "a Sequence as the layers"), ((GOOD, X, Y), dict(batch_size=0), "batch size"),
    ((GOOD, X, Y), dict(memory_limit=100), "fits into 100 bytes"),
    ((GOOD, X, Y), dict(memory_limit=4000, structure="blocks"), 'structure="diagonal"'),
    ((with_posteriors(mlp(), PointMass, prior=per_tensor()), X, Y), {}, None),
    ((with_posteriors(mlp(), PointMass, prior=random_means(0)), X, Y), {}, "with means"),
])
@QUIET
def test_refusals(arguments, options, message):
    if message is None:
        assert laplace_posterior(*arguments, **options) is not None
        return
    with pytest.raises(Refusal, match=message):
        laplace_posterior(*arguments, **options)


@QUIET
def test_layers_that_have_no_such_structure_are_refused():
    wide = masses(nn.Linear(100, 50))
    with pytest.raises(Refusal, match="at most 4096 weights with all their correlations"):
        laplace_posterior(wide, normal(9, 100).float(), labels(9), structure="blocks")
    with pytest.raises(Refusal, match="at most 4096 weights"):
        joint_laplace(wide, normal(9, 100).float(), labels(9))
    turns = field(rotations(), (1, 4, 4))
    network = masses(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 3)).double())
    tied = tie(network, network_action(network, turns))
    with pytest.raises(Refusal, match="tied by a group"):
        laplace_posterior(tied, normal(9, 1, 4, 4), labels(9))


@QUIET
@with_factors
def test_grouped_convolutions_have_no_single_pair_of_factors():
    grouped = masses(started(nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(16, 3))))
    x = normal(9, 2, 3, 3)
    with pytest.raises(Refusal, match="grouped convolution"):
        laplace_posterior(grouped, x, labels(9), structure="kronecker")
    assert laplace_posterior(grouped, x, labels(9), structure="kronecker", layers="last") is not None


OPERATIONS = {
    "average": lambda network, action, x, y: symmetrize(network, action),
    "expansion": lambda network, action, x, y: expand(network, action, "block_diagonal"),
    "mixture": lambda network, action, x, y: OrbitMixture(network, action).log_densities(sample_weights(network, 2)),
    "defect": lambda network, action, x, y: orbit_predictions(network, x, action, draws=2),
    "divergence": lambda network, action, x, y: kl_sum(network),
    "bounds": lambda network, action, x, y: push_forward_divergences(network, action),
    "evaluate": lambda network, action, x, y: evaluate(network, (x, y), action, draws=2),
    "units": lambda network, action, x, y: mutual_information(network, unit_permutations(network, (1, 4, 4)),
                                                              "permanent", draws=2),
    "projected gradients": lambda network, action, x, y: keep_invariant(network, action),
}
ABSENT = {  # what the chapter's table says is not defined
    ("kronecker", "average"): "sum of Kronecker products",
    ("kronecker", "expansion"): "correlations between the blocks",
    ("blocks", "expansion"): "correlations between the blocks", ("blocks", "units"): "correlated",
    ("kronecker", "units"): "correlated", ("kronecker", "projected gradients"): "factors|turns the noise",
    ("blocks", "projected gradients"): "Cholesky factor",
}


@QUIET
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_table_of_operations(structure, operation):
    plain = started(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)))
    network, turns, images = masses(plain), field(rotations(), (1, 4, 4)), normal(5, 1, 4, 4, seed=1)
    action, x = network_action(network, turns), torch.cat([turns.act(g, images) for g in range(4)])
    mode = symmetrize(network, action, "projection")
    posterior, ask = laplace_posterior(mode, x, labels(20), structure=structure), OPERATIONS[operation]
    if (structure, operation) in ABSENT:
        with pytest.raises(Refusal, match=ABSENT[structure, operation]):
            ask(posterior, action, x, labels(20))
    else:
        ask(posterior, action, x, labels(20))
