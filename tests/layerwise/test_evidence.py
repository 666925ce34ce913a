"""Evidence: exact models, full matrices, factors by hand, gradients, what is refused, and what is pruned."""
import math
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from symbnn.data.splits import Split
from symbnn.errors import Refusal
from symbnn.layerwise import evidence as E
from symbnn.layerwise import precisions as R
from symbnn.layerwise.paths import TiedPath, pathways, relaxed_network
from symbnn.posterior.block_gaussian import BlockGaussian
from symbnn.posterior.elbo import elbo
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.layers import kl_sum, variational_tensors, with_posteriors
from symbnn.posterior.likelihoods import Categorical, Gaussian
from symbnn.posterior.log_normal import LogNormal
from symbnn.posterior.point_mass import PointMass
from symbnn.posterior.priors import isotropic, per_tensor, random_means
from symbnn.posterior.sampling import forward
from symbnn.symmetry.fields import rotations
from symbnn.training.config import TrainingConfig
from symbnn.training.loop import train
from tolerances import assert_close, within_standard_errors

with_factors = pytest.mark.skipif(find_spec("curvlinops") is None, reason="curvlinops-for-pytorch is not installed")
NOISE = 0.4


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(count: int, classes: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))


def started(plain: nn.Module, seed: int = 0, gain: float = 0.5) -> nn.Module:
    """The network in float64 with weights that depend on the seed alone."""
    plain = plain.double()
    for place, parameter in enumerate(plain.parameters()):
        parameter.data = gain * normal(*parameter.shape, seed=100 * seed + place)
    return plain


def with_precisions(plain: nn.Module, seed: int = 0) -> nn.Module:
    """A network of point masses with a different precision for each tensor."""
    network = with_posteriors(plain, PointMass)
    E.set_log_precisions(network, {name: value for name, value in zip(
        variational_tensors(network), 0.7 * normal(len(variational_tensors(network)), seed=seed))})
    return network


def convolutional(**options) -> nn.Module:
    """Two convolutions (one grouped, with a stride) and a linear layer, 8 x 8 pixels to 3 classes: 227 weights."""
    return started(nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.Tanh(), nn.Flatten(),
        nn.Linear(36, 3)), **options)


class Pair(nn.Module):
    """The mean of a convolution and of a fully connected path, 1 x 4 x 4 pixels to two channels of them."""

    def __init__(self):
        super().__init__()
        self.pad, self.conv, self.fc = nn.CircularPad2d(1), nn.Conv2d(1, 2, 3), nn.Linear(16, 32)

    def forward(self, x):
        return (self.conv(self.pad(x)).flatten(1) + self.fc(x.flatten(1))) / 2


class Copies(nn.Module):
    """One convolution for three copies of the input, which are rows of its batch, and once more for their sum."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2, bias=False)

    def forward(self, x):
        y = self.conv(x.flatten(0, 1)).unflatten(0, (len(x), -1)).flatten(1)
        return torch.cat([y, self.conv(x.sum(1)).flatten(1)], 1)


# Models whose evidence is known: linear in the weights, with Gaussian noise


def design(plain: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = {name: value.detach() for name, value in plain.named_parameters()}
    columns = torch.func.jacrev(lambda w: torch.func.functional_call(plain, w, (x,)))(weights)
    return {name: column.flatten(2).flatten(0, 1) for name, column in columns.items()}


def flat(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.Flatten())


LINEAR = {  # where Kronecker factors are exact: one layer, one tensor, whose outputs are the targets
    "dense": (lambda: nn.Linear(4, 2, bias=False), (4,)),
    "shared over an axis": (lambda: flat(nn.Linear(4, 2, bias=False)), (5, 4)),
    "convolution": (lambda: flat(nn.Conv2d(2, 3, (2, 3), bias=False)), (2, 4, 5)),
    "stride, padding, dilation": (lambda: flat(nn.Conv2d(1, 2, 3, 2, 2, 2, bias=False)), (1, 6, 7)),
    "same": (lambda: flat(nn.Conv2d(1, 2, 3, padding="same", bias=False)), (1, 4, 4)),
    "grouped": (lambda: flat(nn.Conv2d(4, 6, 2, groups=2, bias=False)), (4, 3, 4)),
    "depthwise": (lambda: flat(nn.Conv2d(3, 6, (4, 1), groups=3, bias=False)), (3, 4, 1)),
    "circular, padded before": (
        lambda: nn.Sequential(nn.CircularPad2d(1), nn.Conv2d(1, 2, 3, bias=False), nn.Flatten()), (1, 4, 4)),
    "used on copies": (Copies, (3, 2, 3, 3)),
}
SEVERAL = {  # for the full matrix: several tensors
    "bias": (lambda: nn.Linear(4, 2), (4,)), "two paths": (Pair, (1, 4, 4)),
    "one dimension": (lambda: flat(nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular")), (2, 5)),
}


def exact_case(made, shape, count: int = 9, seed: int = 0):
    """A network at its maximum a posteriori, its data, and the exact log evidence."""
    plain, x = started(made(), seed), normal(count, *shape, seed=seed + 1)
    network = with_precisions(plain, seed)
    columns, precisions = design(plain, x), E.log_precisions(network)
    X = torch.cat(list(columns.values()), 1)
    D = torch.cat([precisions[name].exp().expand(column.shape[1]) for name, column in columns.items()])
    y = normal(len(X), seed=seed + 2)
    mode = torch.linalg.solve(X.T @ X / NOISE**2 + D.diag(), X.T @ y / NOISE**2)
    for name, piece in zip(columns, mode.split([c.shape[1] for c in columns.values()])):
        loc = variational_tensors(network)[name].posterior.loc
        loc.data = piece.view(loc.shape)
    covariance = NOISE**2 * torch.eye(len(y)).double() + (X / D) @ X.T
    exact = torch.distributions.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y)
    return network, x, y.view(count, -1), exact


@with_factors
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("curvature", ["exact", "full"])
def test_evidence_of_a_linear_model_is_exact(name, curvature):
    network, x, y, exact = exact_case(*LINEAR[name])
    fitted = E.laplace(network, x, y, likelihood=Gaussian(NOISE), curvature=curvature, batch_size=4)
    assert_close(fitted.log_evidence(E.log_precisions(network)), exact, 1e-10)  # of systems of equations


@pytest.mark.parametrize("name", SEVERAL)
def test_evidence_of_a_linear_model_with_several_precisions_is_exact(name):
    network, x, y, exact = exact_case(*SEVERAL[name])
    fitted = E.laplace(network, x, y, likelihood=Gaussian(NOISE), curvature="full", batch_size=4)
    assert_close(fitted.log_evidence(E.log_precisions(network)), exact, 1e-10)  # of systems of equations


# The factors, by hand


def factors_by_hand(plain: nn.Module, x: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(A, B) of every layer, from patches and from one backward pass for each datum and column of S."""
    seen, hooks = {}, []
    for name, layer in plain.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            hooks.append(layer.register_forward_hook(lambda m, i, o, name=name: seen.update({name: (m, i[0], o)})))
    found = {}
    for row in x:
        outputs = plain(row[None])
        p = outputs.softmax(-1)[0].detach()
        S = p.sqrt().diag() - torch.outer(p, p.sqrt())
        for name, (layer, a, out) in seen.items():
            if isinstance(layer, nn.Conv2d):
                patches = F.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride)[0].T
            else:
                patches = a
            gradients = [torch.autograd.grad(outputs[0] @ S[:, c], out, retain_graph=True)[0] for c in range(len(p))]
            g = torch.cat([each[0].flatten(1).T if each.ndim == 4 else each for each in gradients])
            A, B = found.get(name, (0, 0))
            found[name] = (A + patches.T @ patches / (len(patches) * len(x))).detach(), (B + g.T @ g).detach()
    for hook in hooks:
        hook.remove()
    return found


def spectra(fitted: E.KroneckerCurvature) -> dict[str, torch.Tensor]:
    return {name: torch.cat([torch.outer(a, b).flatten() for a, b in pairs]).sort().values
            for name, pairs in fitted.factors.items()}


@with_factors
def test_factors_are_means_over_positions_and_sums_over_data():
    plain = started(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3, stride=2), nn.Tanh(),
                                  nn.Flatten(), nn.Linear(18, 3)))
    x = normal(7, 1, 8, 8)
    fitted = spectra(E.kronecker_curvature(with_posteriors(plain, PointMass), x, batch_size=3))
    for name, (A, B) in factors_by_hand(plain, x).items():
        a, b = torch.linalg.eigvalsh(A), torch.linalg.eigvalsh(B)
        assert_close(fitted[f"{name}.weight"], torch.outer(a, b).flatten().sort().values, 1e-10)  # of eigenvalues
        assert_close(fitted[f"{name}.bias"], b, 1e-10)


@with_factors
def test_a_grouped_convolution_is_its_parts():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3), nn.Linear(16, 3)

        def forward(self, x):
            parts = [self.first(x[:, :2]), self.second(x[:, 2:])]
            return self.head(torch.cat(parts, 1).tanh().flatten(1))

    grouped = started(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)))
    apart, x = Parts().double(), normal(8, 4, 4, 4)
    for place, part in enumerate((apart.first, apart.second)):
        part.weight.data, part.bias.data = (value[2 * place:2 * place + 2] for value in (grouped[0].weight,
                                                                                          grouped[0].bias))
    apart.head.load_state_dict(grouped[3].state_dict())
    assert_close(apart(x), grouped(x))
    one, two = (spectra(E.kronecker_curvature(with_posteriors(each, PointMass), x)) for each in (grouped, apart))
    for kind in ("weight", "bias"):
        both = torch.cat([two[f"first.{kind}"], two[f"second.{kind}"]]).sort().values
        assert_close(one[f"0.{kind}"], both, 1e-10)  # of eigenvalues
        assert_close(one[f"3.{kind}"], two[f"head.{kind}"], 1e-10)


def without_cross_terms(curvature: E.FullCurvature | E.KernelCurvature, d) -> torch.Tensor:
    return sum(curvature.restricted([name]).log_det(d) for name in d)


@with_factors
def test_close_to_the_full_matrix():
    dense = started(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), gain=0.3)
    for plain, x in ((convolutional(gain=0.3), normal(300, 1, 8, 8)), (dense, normal(300, 6))):
        network = with_posteriors(plain, PointMass)
        d = {name: torch.tensor(2.0).double() for name in variational_tensors(network)}
        full, factors = E.full_curvature(network, x), E.kronecker_curvature(network, x).log_det(d)
        blocks = without_cross_terms(full, d)
        assert full.log_det(d) < blocks  # Fischer's inequality
        assert full.log_det(d) < factors < 1.45 * full.log_det(d)  # measured: 1.41 and 1.28 times
        assert abs(factors - blocks) < 0.1 * factors


def test_the_full_matrix_is_a_sum_of_squared_jacobians():
    plain, x = started(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3))), normal(9, 3)
    expected = torch.zeros(17, 17).double()
    for row in x:
        outputs = plain(row)
        gradients = [torch.cat([g.flatten() for g in torch.autograd.grad(f, list(plain.parameters()),
                                                                         retain_graph=True)]) for f in outputs]
        p, J = outputs.softmax(-1).detach(), torch.stack(gradients)
        expected += J.T @ (p.diag() - torch.outer(p, p)) @ J
    assert_close(E.full_curvature(with_posteriors(plain, PointMass), x, batch_size=3).matrix, expected)


# The two sides of the Gauss-Newton matrix


def relaxed(kind: str) -> nn.Module:
    return relaxed_network(kind, (1, 8, 8), 3, channels=(2, 3), strides=(2, 2), dtype=torch.float64,
                           generator=torch.Generator().manual_seed(0))


TWO_SIDED = {
    "dense": lambda: started(nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 3))),
    "convolution, pooled": lambda: started(nn.Sequential(
        nn.CircularPad2d(1), nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))),
    "F-FC+CONV": lambda: relaxed("F-FC+CONV"), "lifted": lambda: relaxed("C4-CONV+F-FC"),
}


def both_sides(network, x, likelihood=Categorical(), split: int = 4):
    plain = E._plain(network, x, likelihood)
    sizes = {name: plain.get_parameter(name).numel() for name in variational_tensors(network)}
    with torch.no_grad():
        return [side(plain, sizes, x.split(split), likelihood) for side in (E._weights_side, E._data_side)]


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(NOISE)])
@pytest.mark.parametrize("name", TWO_SIDED)
def test_both_sides_have_one_determinant(name, likelihood):
    network, x = with_precisions(TWO_SIDED[name](), seed=4), normal(11, 1, 8, 8)
    weights, data = both_sides(network, x, likelihood)
    at = {name: value + 1 for name, value in E.log_precisions(network).items()}
    assert weights.log_det(at) > 1
    assert_close(data.log_det(at) / weights.log_det(at), torch.tensor(1.0), 1e-10)  # of eigenvalues
    for some in [[each] for each in at] + [list(at)[:2], list(at)[-2:]]:
        assert_close(data.restricted(some).log_det(at), weights.restricted(some).log_det(at), 1e-10)
    gammas = [E.LaplaceApproximation(0.0, {}, each).effective_dimensions(at) for each in (weights, data)]
    whole = sum(kernel / at[each].exp() for each, kernel in zip(data.names, data.kernels))
    inverse = torch.linalg.inv(whole + torch.eye(len(whole)).double())
    for each, kernel in zip(data.names, data.kernels):
        assert_close(gammas[0][each], gammas[1][each], 1e-10)
        assert_close(gammas[1][each], (inverse @ kernel).trace() / at[each].exp(), 1e-10)
        assert 0 < gammas[1][each] < min(variational_tensors(network)[each].posterior.numel, len(whole))


def test_the_root_of_the_softmax():
    outputs = torch.cat([normal(5, 4), 30 * normal(5, 4, seed=1), normal(1, 4) * 1e5])
    root, p = E._output_root(outputs, Categorical()), outputs.softmax(-1)
    assert root.shape == (11, 4, 3) and (root.triu(1) == 0).all()
    assert_close(root @ root.mT, torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
    sure = torch.tensor([[0.0, -40.0, -41.0]]).double()  # 1 - p_1 is lost to rounding, and p_1 (1 - p_1) is not
    rest = math.exp(-40) + math.exp(-41)
    found = E._output_root(sure, Categorical())
    assert_close((found @ found.mT)[0, 0, 0] / (rest / (1 + rest) ** 2), torch.tensor(1.0))
    assert_close(E._output_root(outputs, Gaussian(0.5))[3], 2 * torch.eye(4).double())


def test_the_smaller_side_that_fits_is_taken():
    network, d = with_precisions(convolutional()), E.log_precisions(with_precisions(convolutional()))
    few, many = normal(20, 1, 8, 8), normal(114, 1, 8, 8)  # 2 rows each, and 227 weights
    kernel, matrix = E.full_curvature(network, few), E.full_curvature(network, many)
    assert kernel.kernels.shape == (6, 40, 40) and matrix.matrix.shape == (227, 227)
    assert type(E.full_curvature(network, many[:113])) is E.KernelCurvature
    gaussian = E.full_curvature(network, few, Gaussian(NOISE))
    assert gaussian.kernels.shape == (6, 60, 60)
    weights, data = 56 * 227**2 + 16 * 2 * 227, 88 * 40**2 + 24 * 2 * 108
    assert data < weights < 88 * 226**2
    other = E.full_curvature(network, many[:113], memory_limit=weights)  # its smaller side is too large
    assert type(other) is E.FullCurvature
    cut = E.full_curvature(network, few, memory_limit=data)  # batches of one datum
    assert_close(cut.kernels, kernel.kernels)
    assert_close(E.full_curvature(network, many[:113], memory_limit=2**30).log_det(d), other.log_det(d), 1e-10)
    with pytest.raises(Refusal, match=r"227 weights.*or at most 19 inputs"):
        E.full_curvature(network, few, memory_limit=data - 1)
    with pytest.raises(Refusal, match=r"at most 226 weights, or at most 90 inputs"):
        E.full_curvature(network, many, memory_limit=weights - 1)
    with pytest.raises(Refusal, match="one class"):
        E.full_curvature(with_posteriors(nn.Linear(3, 1).double(), PointMass), normal(2, 3))


def test_hundreds_of_thousands_of_weights_and_few_data():
    plain = started(nn.Sequential(nn.Flatten(), nn.Linear(64, 2000), nn.Tanh(), nn.Linear(2000, 100), nn.Tanh(),
                                  nn.Linear(100, 3)), gain=0.05)
    network, x = with_precisions(plain), normal(8, 1, 8, 8)
    fitted = E.laplace(network, x, labels(8), curvature="full")
    assert type(fitted.curvature) is E.KernelCurvature and sum(its.posterior.numel for its in variational_tensors(
        network).values()) > 330_000
    assert 0 < sum(fitted.effective_dimensions(E.log_precisions(network)).values()) < 16


@with_factors
@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(NOISE)])
def test_one_drawn_target_gives_the_factors_in_the_mean(likelihood):
    network, x, far = with_posteriors(started(nn.Linear(3, 4)), PointMass), normal(20, 3), torch.tensor(25.0).double()
    # At a huge precision log det(I + G / d) is the trace of G over d, which is linear in the estimate.

    def trace(**how):
        fitted = E.kronecker_curvature(network, x, likelihood, **how)
        return fitted.log_det({"weight": far, "bias": far}) * far.exp()

    drawn = torch.stack([trace(sampled=True, seed=seed) for seed in range(300)])
    assert drawn.std() > 0
    within_standard_errors(drawn.mean(), trace(), drawn.std() / math.sqrt(len(drawn)))


@with_factors
def test_batches_make_no_difference():
    network, x = with_posteriors(convolutional(), PointMass), normal(10, 1, 8, 8)
    one, other = (spectra(E.kronecker_curvature(network, x, batch_size=size)) for size in (3, 10))
    for name in one:
        assert_close(one[name], other[name], 1e-10)  # of eigenvalues


@with_factors
def test_a_network_of_one_layer_and_training_mode():
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    x = normal(12, 4)
    network(x)
    fitted = E.laplace(with_posteriors(network, PointMass).train(), x, labels(12))
    assert set(fitted.curvature.factors) == {"0.weight", "0.bias"}
    alone = with_posteriors(nn.Conv2d(2, 3, 1, groups=1, bias=False).double(), PointMass)
    with pytest.raises(Refusal, match="one vector of outputs"):
        E.kronecker_curvature(alone, normal(2, 2, 3, 3))
    layer = with_posteriors(nn.Linear(4, 3).double(), PointMass)
    assert set(E.kronecker_curvature(layer, x).factors) == {"weight", "bias"}


# The evidence in the precisions


def fitted_pair(curvature: str, count: int = 30):
    network, x = with_precisions(convolutional(), seed=3), normal(count, 1, 8, 8)
    return E.laplace(network, x, labels(count), curvature=curvature), E.log_precisions(network)


@with_factors
@pytest.mark.parametrize("curvature, count", [("exact", 30), ("sampled", 30), ("full", 30), ("full", 120)])
def test_gradients_are_finite_differences(curvature, count):
    fitted, at = fitted_pair(curvature, count)
    free = {name: value.clone().requires_grad_() for name, value in at.items()}
    fitted.log_evidence(free).backward()
    step = 1e-4
    for name in at:
        above, below = (fitted.log_evidence(at | {name: at[name] + shift}) for shift in (step, -step))
        # the error of a central difference is step^2 = 1e-8 times a third derivative
        assert_close((above - below) / (2 * step) / free[name].grad, torch.tensor(1.0), 1e-6)


@with_factors
def test_evidence_term_by_term():
    fitted, at = fitted_pair("exact")
    expected = fitted.log_likelihood
    for name, eigenvalues in spectra(fitted.curvature).items():
        d = at[name].exp()
        expected -= (d * fitted.squared_norms[name] + (eigenvalues + d).log().sum() - len(eigenvalues) * at[name]) / 2
    assert_close(fitted.log_evidence(at), expected)


@with_factors
def test_effective_dimensions():
    fitted, at = fitted_pair("exact")
    found = fitted.effective_dimensions(at)
    for name, eigenvalues in spectra(fitted.curvature).items():
        assert_close(found[name], (eigenvalues / (eigenvalues + at[name].exp())).sum())
        assert 0 < found[name] < len(eigenvalues)
    fitted, at = fitted_pair("full", 120)
    found, sizes = fitted.effective_dimensions(at), fitted.curvature.sizes
    D = torch.cat([at[name].exp().expand(size) for name, size in sizes.items()])
    inverse = torch.linalg.inv(fitted.curvature.matrix + D.diag()).diagonal()
    for (name, size), part in zip(sizes.items(), (D * inverse).split(list(sizes.values()))):
        assert_close(found[name], size - part.sum(), 1e-10)  # of an inverse
    fitted, at = fitted_pair("exact")
    far = fitted.effective_dimensions({name: torch.full_like(value, 60.0) for name, value in at.items()})
    assert all(0 < value < 1e-20 for value in far.values())  # relative digits survive a huge precision


@with_factors
@pytest.mark.parametrize("curvature", ["exact", "full"])
def test_the_evidence_rises_in_every_step_to_its_stationary_point(curvature):
    fitted, at = fitted_pair(curvature)
    at = {name: value + 3 for name, value in at.items()}  # twenty steps go two thirds of the way at most
    values = [fitted.log_evidence(R.raise_evidence(fitted, at, steps)).item() for steps in range(21)]
    assert values[0] == fitted.log_evidence(at).item() and all(b > a for a, b in pairwise(values))
    steps = R.raise_evidence(fitted, at, 1)
    assert all(abs(abs(float(steps[name] - at[name])) - 0.1) < 1e-6 for name in at)  # Adam's first step is its rate
    best = at
    for _ in range(4):
        best = R.raise_evidence(fitted, best, 200, 0.05)
    gamma = fitted.effective_dimensions(best)
    for name, value in best.items():
        assert_close(float(value.exp() * fitted.squared_norms[name]) / gamma[name], 1.0, 1e-3)  # of 800 steps of Adam


@with_factors
def test_saturated_predictions_give_finite_numbers_in_float32():
    plain = convolutional().float()
    plain[5].weight.data *= 1e5
    network, x = with_posteriors(plain, PointMass), normal(12, 1, 8, 8).float()
    assert (plain(x).softmax(-1) == 0).any()
    for curvature in ("exact", "sampled", "full"):
        fitted = E.laplace(network, x, plain(x).argmax(-1), curvature=curvature)
        free = {name: value.requires_grad_() for name, value in E.log_precisions(network).items()}
        value = fitted.log_evidence(free)
        value.backward()
        assert value.isfinite() and all(each.grad.isfinite() for each in free.values())
        if curvature != "full":  # rounding gives a singular factor negative eigenvalues, whose logarithm may not exist
            factors = [factor for pairs in fitted.curvature.factors.values() for pair in pairs for factor in pair]
            assert all((factor >= 0).all() for factor in factors) and any((factor == 0).any() for factor in factors)


@with_factors
def test_precisions_agree_between_single_and_double():
    plain, x = convolutional(), normal(20, 1, 8, 8)
    values = [E.laplace(with_posteriors(plain.to(dtype), PointMass), x.to(dtype), labels(20)).log_evidence(
        E.log_precisions(with_posteriors(plain, PointMass))) for dtype in (torch.float64, torch.float32)]
    assert_close(values[1], values[0], 1e-5)  # float32, summed over a few hundred terms
    assert values[1].dtype == torch.float64


@with_factors
def test_on_cuda(require_cuda):
    network, x = with_posteriors(convolutional(), PointMass), normal(20, 1, 8, 8)
    values = []
    for device in ("cpu", require_cuda):
        moved = network.to(device)
        for curvature in ("exact", "full"):
            fitted = E.laplace(moved, x.to(device), labels(20).to(device), curvature=curvature)
            raised = R.raise_evidence(fitted, E.log_precisions(moved))
            values.append(fitted.log_evidence(raised).item())
    assert_close(torch.tensor(values[2:]), torch.tensor(values[:2]), 1e-8)  # twenty steps of Adam


# Inputs of every number type


class Converted(nn.Module):
    """Divides pixels by 255 in float64 and ends in a plain network."""

    def __init__(self, plain):
        super().__init__()
        self.plain = plain

    def forward(self, x):
        return self.plain(x.to(torch.float64) / 255)


class OneHot(nn.Module):
    """Token ids to a flat one-hot code."""

    def forward(self, x):
        return torch.eye(7).double()[x.long()].flatten(1)


def pixels() -> tuple[nn.Module, torch.Tensor]:
    return Converted(convolutional()), torch.randint(256, (12, 1, 8, 8), generator=torch.Generator().manual_seed(1))


def tokens() -> tuple[nn.Module, torch.Tensor]:
    plain = started(nn.Sequential(OneHot(), nn.Linear(35, 4), nn.Tanh(), nn.Linear(4, 3)))
    return plain, torch.randint(7, (12, 5), generator=torch.Generator().manual_seed(1))


@with_factors
@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(NOISE)], ids=str)
@pytest.mark.parametrize("curvature", ["exact", "sampled", "full", "full from the data"])
@pytest.mark.parametrize("made", [pixels, tokens])
def test_evidence_does_not_depend_on_the_type_of_inputs(made, curvature, likelihood):
    plain, x = made()
    network = with_precisions(plain)
    y = labels(12) if isinstance(likelihood, Categorical) else normal(12, 3)
    x = x[:4] if curvature == "full from the data" else x.repeat(20, *[1] * (x.ndim - 1))
    y = y[:4] if curvature == "full from the data" else y.repeat(20, *[1] * (y.ndim - 1))
    types = torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64
    fitted = [E.laplace(network, x.to(dtype), y, likelihood=likelihood, curvature=curvature.split()[0])
              for dtype in types]
    kind = {"exact": E.KroneckerCurvature, "sampled": E.KroneckerCurvature, "full": E.FullCurvature}
    assert all(type(each.curvature) is kind.get(curvature, E.KernelCurvature) for each in fitted)
    d = E.log_precisions(network)
    values = torch.stack([each.log_evidence(d) for each in fitted])
    assert fitted[-1].curvature.log_det(d) > 1
    assert_close(values, values[-1].expand(len(types)))


class Table(nn.Module):
    """Token ids to the rows of a fixed table."""

    def __init__(self):
        super().__init__()
        self.register_buffer("rows", normal(7, 3, seed=3))

    def forward(self, x):
        return F.embedding(x, self.rows) if not x.is_floating_point() else x


@pytest.mark.parametrize("count", [4, 40])
def test_token_ids_have_the_curvature_of_their_embedding(count):
    plain = started(nn.Sequential(Table(), nn.Flatten(), nn.Linear(15, 3)))
    network, x = with_precisions(plain), torch.randint(7, (count, 5), generator=torch.Generator().manual_seed(1))
    found, expected = (E.full_curvature(network, each) for each in (x, plain[0](x)))
    d = E.log_precisions(network)
    assert found.log_det(d) > 1
    assert_close(found.log_det(d), expected.log_det(d))


# Data that are no data


NAN = [math.nan, math.inf]


@with_factors
@pytest.mark.parametrize("bad", NAN)
@pytest.mark.parametrize("curvature", ["exact", "sampled", "full"])
def test_data_that_are_not_finite_are_named(curvature, bad):
    plain = started(nn.Linear(4, 3))
    network, x, y = with_posteriors(plain, PointMass), normal(9, 4), normal(9, 3)
    broken, missing = x.clone(), y.clone()
    broken[0, 2] = broken[7, 1] = missing[8, 0] = bad
    with pytest.raises(Refusal, match=r"Inputs are finite.*2 of 9 inputs"):
        E.laplace(network, broken, labels(9), curvature=curvature)
    with pytest.raises(Refusal, match=r"one finite target for each input.*1 numbers not finite"):
        E.laplace(network, x, missing, likelihood=Gaussian(NOISE), curvature=curvature)
    for wrong in (labels(8), labels(300)):
        with pytest.raises(Refusal, match="one finite target for each input"):
            E.laplace(network, x, wrong, curvature=curvature)
    with pytest.raises(Refusal, match="some data"):
        E.laplace(network, x[:0], labels(0), curvature=curvature)
    network.weight.posterior.loc.data[0, 0] = bad
    with pytest.raises(Refusal, match=r"Outputs of a network.*diverged"):
        E.laplace(network, x, labels(9), curvature=curvature)


@with_factors
@pytest.mark.parametrize("fit", [E.full_curvature, E.kronecker_curvature])
def test_one_logit_has_no_evidence(fit):
    with pytest.raises(Refusal, match=r"two classes.*nn\.Linear\(features, 2\)"):
        fit(with_posteriors(started(nn.Linear(4, 1)), PointMass), normal(9, 4))


class LateRoot(nn.Module):
    """Finite outputs without a finite slope at 0."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return self.linear(x).abs().sqrt()


@with_factors
@pytest.mark.parametrize("fit", [E.full_curvature, E.kronecker_curvature])
def test_gradients_that_are_not_finite_are_named(fit):
    x = normal(9, 4)
    x[8] = 0
    with pytest.raises(Refusal, match="without a slope"):
        fit(with_posteriors(started(LateRoot()), PointMass), x)


# One noise for each output


@with_factors
@pytest.mark.parametrize("curvature", ["exact", "full"])
@pytest.mark.parametrize("shape", [(), (1,), (2,)], ids=str)
def test_evidence_with_a_tensor_of_noise(curvature, shape):
    """Outputs and targets in units of the noise have noise 1, up to the change of the targets' volume."""
    noise = (0.4 + torch.rand(shape, generator=torch.Generator().manual_seed(4))).double().requires_grad_()
    plain, x, y = started(nn.Linear(4, 2, bias=False)), normal(9, 4), normal(9, 2)
    scaled = started(nn.Linear(4, 2, bias=False))
    scales = noise.detach().expand(2)
    found = E.laplace(with_precisions(plain), x, y, likelihood=Gaussian(noise), curvature=curvature)
    standard = E.laplace(with_precisions(scaled), x, (y - plain(x).detach()) / scales + scaled(x).detach(),
                         likelihood=Gaussian(1.0), curvature="full").log_likelihood
    assert_close(found.log_likelihood, standard - 9 * scales.log().sum())
    d = {"weight": torch.tensor(0.3).double()}
    expected = sum(torch.linalg.slogdet(torch.eye(4).double() + x.T @ x / s**2 / d["weight"].exp()).logabsdet
                   for s in scales)
    assert_close(found.curvature.log_det(d), expected, 1e-10)
    assert not found.curvature.log_det(d).requires_grad


# Weights that meet in one datum


class Pooled(nn.Module):
    """One linear layer for all elements of a set, nodes or tokens, then a sum and a second layer."""

    def __init__(self, layout: str):
        super().__init__()
        self.first, self.last, self.layout = nn.Linear(4, 3), nn.Linear(3, 3), layout

    def forward(self, x):
        if self.layout == "rows":
            h = self.first(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        else:
            h = self.first(x)
        if self.layout == "attention":
            h = (h @ h.mT).softmax(-1) @ h
        return self.last(h.flatten(1, -2).tanh().sum(1))


class Again(nn.Module):
    """A layer that is called twice, a linear one or a convolution."""

    def __init__(self, layer, count: int):
        super().__init__()
        self.layer, self.last = layer, nn.Linear(count, 3)

    def forward(self, x):
        return self.last((self.layer(x) + self.layer(2 * x).tanh()).flatten(1))


class Bag(nn.Module):
    """One layer for the elements of a bag, then a function that joins what it gives for each."""

    def __init__(self, join, layer=None):
        super().__init__()
        self.layer, self.join = layer or nn.Linear(4, 3), join

    def forward(self, x):
        return self.join(self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]).flatten(2), x)


class Twofold(nn.Module):
    """A layer that is called on its own result, through a `where`."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        h = self.layer(x)
        return self.layer(torch.where(h > 0, h, torch.zeros_like(h)))


def masked(h, x):
    return h.masked_fill(x.abs().sum(-1, keepdim=True) == 0, 0.0).sum(1)


HIDDEN = {  # from a probe by NaN, or by one datum
    "where": (lambda: Bag(lambda h, x: torch.where(h > 0, h, torch.zeros_like(h)).sum(1)), (3, 4)),
    "where of two": (lambda: Bag(lambda h, x: torch.where(h[:, 0] > h[:, 1], h[:, 0], h[:, 1])), (2, 4)),
    "nan_to_num": (lambda: Bag(lambda h, x: h.nan_to_num().sum(1)), (3, 4)),
    "clip": (lambda: Bag(lambda h, x: torch.where(h.abs() < 100, h, 0 * h).sum(1)), (3, 4)),
    "route": (lambda: Bag(lambda h, x: h[torch.arange(len(h)), h[..., 0].argmax(1)]), (3, 4)),
    "mask": (lambda: Bag(masked), (3, 4)), "first": (lambda: Bag(lambda h, x: h[:, 0]), (3, 4)),
    "again": (Twofold, (3,)),
    "images": (lambda: Bag(lambda h, x: h.sum(1)[:, :3], nn.Conv2d(1, 2, 2)), (3, 1, 3, 3)),
}


@with_factors
@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(NOISE)], ids=str)
@pytest.mark.parametrize("name", HIDDEN)
def test_weights_that_meet_unseen_are_refused(name, likelihood):
    """A NaN that `where` stops, a mask that leaves the first datum one element, a use that nothing depends on."""
    made, shape = HIDDEN[name]
    network, x = with_posteriors(started(made()), PointMass), normal(9, *shape)
    if name == "mask":
        x[0, 1:] = 0
    with pytest.raises(Refusal, match=r'inputs for one datum.*curvature="full"; or sharing="expand"'):
        E.kronecker_curvature(network, x, likelihood)


class Aside(nn.Module):
    """A layer whose weight is also used by a function, or whose input has nothing to do with the data."""

    def __init__(self, how: str):
        super().__init__()
        self.layer, self.how = nn.Linear(4, 4), how
        self.register_buffer("table", normal(1, 4))

    def forward(self, x):
        if self.how == "function":
            return self.layer(x) + nn.functional.linear(x.tanh(), self.layer.weight)
        return x + self.layer(self.table)


@with_factors
@pytest.mark.parametrize("how, match", [("function", "every use of a weight"), ("table", "1 inputs for 9 data")])
def test_uses_that_are_no_calls_on_the_data_are_refused(how, match):
    network = with_posteriors(started(Aside(how)), PointMass)
    for likelihood in (Categorical(), Gaussian(NOISE)):
        with pytest.raises(Refusal, match=match):
            E.kronecker_curvature(network, normal(9, 4), likelihood)


@with_factors
def test_a_frozen_tensor_leaves_the_factors_of_its_layer_as_they_are():
    def made(frozen: bool) -> nn.Module:
        plain = started(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)))
        plain[0].weight.requires_grad_(not frozen)
        plain[2].bias.requires_grad_(not frozen)
        return with_posteriors(plain, PointMass)

    for sampled in (False, True):
        some, every = (E.kronecker_curvature(made(frozen), normal(9, 4), sampled=sampled).factors
                       for frozen in (True, False))
        assert list(some) == ["0.bias", "2.weight"]
        for name, pairs in some.items():
            assert all(torch.equal(a, b) for one, two in zip(pairs, every[name]) for a, b in zip(one, two))


@with_factors
def test_weights_tied_by_assignment_are_refused_by_factors():
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    plain[2].weight = plain[0].weight
    network, x, y = with_posteriors(started(plain), PointMass), normal(9, 4), labels(9)
    for curvature in ("exact", "sampled"):
        with pytest.raises(Refusal, match=r"0\.weight' and '2\.weight', which are one tensor"):
            E.laplace(network, x, y, curvature=curvature)
    E.laplace(network, x, y, curvature="full")


@with_factors
@pytest.mark.parametrize("curvature", ["exact", "full"])
def test_data_and_options_that_do_not_fit_are_refused_with_what_works(curvature):
    network = with_posteriors(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), PointMass)
    x, y, evaluate = normal(9, 4).float(), labels(9), partial(E.laplace, network, curvature=curvature)
    for dtype in (torch.float16, torch.float64, torch.int64, torch.uint8):
        with pytest.raises(Refusal, match=r"inputs\.to\(torch\.float32\)"):
            evaluate(x.to(dtype), y)
    for wrong in (x[:, :2], x[0], x[:, :, None]):
        with pytest.raises(Refusal, match="maps the inputs"):
            evaluate(wrong, y)
    for wrong in (x.numpy(), x.tolist(), None, Split(x, y), x[0, 0], [x], torch.utils.data.TensorDataset(x, y)):
        with pytest.raises(Refusal, match="inputs are one real tensor"):
            evaluate(wrong, y)
    for wrong in (y.numpy(), y.tolist(), None, y[0]):
        with pytest.raises(Refusal, match="targets are one real tensor"):
            evaluate(x, wrong)
    with pytest.raises(Refusal):
        evaluate(y, x)
    with pytest.raises(Refusal, match="inputs are one real tensor"):
        E.laplace(x, network, y, curvature=curvature)
    for options in ({"batch_size": 0}, {"batch_size": 2.0}, {"batch_size": None}, {"seed": None}, {"seed": -1}):
        with pytest.raises(Refusal, match="whole number"):
            evaluate(x, y, **options)


def test_precisions_are_finite_numbers_one_for_each_tensor():
    network = with_posteriors(nn.Linear(4, 3), PointMass)
    fitted, d = E.laplace(network, normal(9, 4).float(), labels(9), curvature="full"), E.log_precisions(network)
    numbers = {name: float(value) for name, value in d.items()}
    assert_close(fitted.log_evidence(numbers), fitted.log_evidence(d), 1e-12)
    assert fitted.effective_dimensions(numbers) == fitted.effective_dimensions(d)
    for wrong in (None, 1.0, network, {"weight": 0.0}, {**numbers, "bias": math.nan}, {**numbers, "bias": "1"},
                  {**numbers, "bias": torch.zeros(2)}):
        for ask in (fitted.log_evidence, fitted.effective_dimensions):
            with pytest.raises(Refusal, match="one finite log-precision for each tensor"):
                ask(wrong)
    for wrong in (None, [0.0], {"weight": math.nan}, {"weight": "1"}, {"weight": math.inf}):
        with pytest.raises(Refusal, match="one finite log-precision"):
            E.set_log_precisions(network, wrong)
    assert E.log_precisions(network) == d


MEETING = {
    "set": (lambda: Pooled("set"), (5, 4)), "grid": (lambda: Pooled("set"), (2, 3, 4)),
    "rows": (lambda: Pooled("rows"), (5, 4)), "attention": (lambda: Pooled("attention"), (5, 4)),
    "flattened": (lambda: nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(10, 3)), (5, 4)),
    "linear twice": (lambda: Again(nn.Linear(4, 4), 4), (4,)),
    "convolution twice": (lambda: Again(nn.Conv2d(1, 2, 2), 18), (1, 4, 4)),
}


@with_factors
@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(NOISE)], ids=str)
@pytest.mark.parametrize("name", MEETING)
def test_weights_that_meet_in_one_datum_have_to_be_asked_for(name, likelihood):
    made, shape = MEETING[name]
    network, x = with_posteriors(started(made()), PointMass), normal(9, *shape)
    y = labels(9) if isinstance(likelihood, Categorical) else normal(9, 3)
    for curvature in ("exact", "sampled"):
        with pytest.raises(Refusal, match=r'inputs for one datum.*curvature="full"; or sharing="expand"'):
            E.laplace(network, x, y, likelihood=likelihood, curvature=curvature)
        E.laplace(network, x, y, likelihood=likelihood, curvature=curvature, sharing="expand")
    E.laplace(network, x, y, likelihood=likelihood, curvature="full")
    with pytest.raises(Refusal, match="sharing is None or one of expand"):
        E.kronecker_curvature(network, x, likelihood, sharing="reduce")


class Silent(nn.Module):
    """All elements but the first are switched off by a ReLU, at these inputs."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)

    def forward(self, x):
        offsets = torch.tensor([100.0, *[-100.0] * (x.shape[1] - 1)], dtype=x.dtype)[:, None]
        return (self.first(x) + offsets).relu().sum(1)


@with_factors
def test_a_dead_unit_does_not_separate():
    with pytest.raises(Refusal, match="5 inputs for one datum"):
        E.kronecker_curvature(with_posteriors(started(Silent()), PointMass), normal(9, 5, 4), Gaussian(NOISE))


@with_factors
def test_positions_of_convolutions_and_groups_are_no_sharing():
    pooled = started(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                   nn.Linear(3, 3)))
    on_pixels = rotations().on(4, 4)
    tied = started(nn.Sequential(TiedPath(1, 2, on_pixels, on_pixels), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)))
    for plain, x in ((pooled, normal(9, 1, 8, 8)), (relaxed("C4-CONV+F-FC"), normal(9, 1, 8, 8)),
                     (tied, normal(9, 1, 4, 4))):
        network = with_posteriors(plain, PointMass)
        one, two = (spectra(E.kronecker_curvature(network, x, sharing=how)) for how in (None, "expand"))
        assert all(torch.equal(one[name], two[name]) for name in one)


class TokensFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 3)

    def forward(self, x):
        return self.first(x.transpose(0, 1)).mean(0)


class TwoSizes(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3)

    def forward(self, x):
        return self.first(x).mean((2, 3)) + self.first(x[..., :4, :4]).mean((2, 3))


@with_factors
def test_the_mean_over_positions_needs_one_number_of_them():
    for plain, shape in ((TokensFirst(), (5, 4)), (TwoSizes(), (1, 6, 6))):
        network, x = with_posteriors(started(plain), PointMass), normal(9, *shape)
        with pytest.raises(Refusal, match="same number of positions"):
            E.kronecker_curvature(network, x, sharing="expand", batch_size=4)


# What is refused


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(64, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.used(x.flatten(1))


CIRCULAR = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")
WRONG = {
    "CircularPad2d": nn.Sequential(CIRCULAR, nn.Flatten(), nn.Linear(128, 3)),
    "padding='same' in '0'": nn.Sequential(nn.Conv2d(1, 2, 2, padding="same"), nn.Flatten(), nn.Linear(128, 3)),
    "Conv1d": nn.Sequential(nn.Flatten(2), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(124, 3)),
    "each input by itself|by itself": nn.Sequential(Centred(), nn.Flatten(), nn.Linear(64, 3)),
    "unused": Unused(),
    "one vector of outputs": nn.Conv2d(1, 3, 3),
}


@with_factors
@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own remark on even kernels
@pytest.mark.parametrize("reason", WRONG)
def test_networks_whose_factors_would_be_wrong_are_refused(reason):
    with pytest.raises(Refusal, match=reason):
        E.kronecker_curvature(with_posteriors(WRONG[reason].double(), PointMass), normal(6, 1, 8, 8))


@with_factors
def test_why_circular_padding_is_refused(monkeypatch):
    """Curvlinops takes it for zeros: without the refusal the evidence of a linear model is wrong."""
    layer = partial(nn.Conv2d, 1, 2, 3, padding=1, padding_mode="circular", bias=False)
    network, x, y, exact = exact_case(lambda: flat(layer()), (1, 4, 4))
    monkeypatch.setattr(E, "_check_layer", lambda *_: None)
    fitted = E.laplace(network, x, y, likelihood=Gaussian(NOISE))
    assert abs(fitted.log_evidence(E.log_precisions(network)) - exact) > 1


def test_precisions_of_other_priors_are_refused():
    for prior, family in ((random_means(0), MeanFieldGaussian), (isotropic(), Laplace), (isotropic(), LogNormal)):
        with pytest.raises(Refusal, match=r"N\(0, I / d\)"):
            E.log_precisions(with_posteriors(nn.Linear(3, 2), family, prior=prior))
    network = with_posteriors(nn.Linear(3, 2), prior=lambda name, posterior: MeanFieldGaussian(
        torch.zeros(posterior.shape), torch.linspace(0, 1, posterior.numel).view(posterior.shape), trainable=False))
    with pytest.raises(Refusal, match=r"N\(0, I / d\)"):
        E.log_precisions(network)
    with pytest.raises(Refusal, match="network's tensors"):
        E.set_log_precisions(network, {"other": torch.zeros(())})
    with pytest.raises(Refusal, match="curvature is one of"):
        E.laplace(network, normal(2, 3), labels(2), curvature="diagonal")
    with pytest.raises(Refusal, match="likelihood"):
        E.full_curvature(network, normal(2, 3).float(), object())


def test_without_curvlinops_the_commands_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    with pytest.raises(Refusal, match=r"--no-deps curvlinops-for-pytorch==3\.0\.1"):
        E.kronecker_curvature(with_posteriors(nn.Linear(3, 2), PointMass), torch.zeros(2, 3))


@with_factors
def test_bytes_of_factors_are_known_before(monkeypatch):
    network, x, seen = with_posteriors(convolutional(), PointMass), normal(4, 1, 8, 8), []
    predicted = E.factor_bytes(network)
    assert predicted == {"0": 8 * (9**2 + 4**2), "2": 2 * 8 * (18**2 + 2**2), "5": 8 * (36**2 + 3**2)}
    eigenvalues = E._eigenvalues
    monkeypatch.setattr(E, "_eigenvalues", lambda factor: seen.append(factor.nbytes) or eigenvalues(factor))
    needed = E.check_factors(network, 2**30)
    E.kronecker_curvature(network, x, memory_limit=needed)
    assert sum(seen) == sum(predicted.values()) and needed == sum(seen) + 16 * 36**2
    with pytest.raises(Refusal, match=r"36 rows of layer '5'.*at most 35 numbers"):
        E.kronecker_curvature(network, x, memory_limit=needed - 1)
    assert E.factor_bytes(with_posteriors(nn.Linear(5, 2), PointMass)) == {"": 4 * (25 + 4)}


# Learning precisions


def test_maximum_a_posteriori_is_the_elbo_of_point_masses():
    network, x, y = with_precisions(convolutional()), normal(9, 1, 8, 8), labels(9)
    loss = -elbo(network, forward(network, x), y, 40).elbo
    loss.backward()
    locs = {name: tensor.posterior.loc for name, tensor in variational_tensors(network).items()}
    plain = E.posterior_mean_network(network)
    penalty = sum(value.exp() * plain.get_parameter(name).square().sum()
                  for name, value in E.log_precisions(network).items())
    (F.cross_entropy(plain(x), y) + penalty / (2 * 40)).backward()
    for name, loc in locs.items():
        assert_close(loc.grad, plain.get_parameter(name).grad)


@pytest.mark.parametrize("family", [MeanFieldGaussian, Laplace, BlockGaussian, FullGaussian])
def test_the_elbos_precision_minimises_the_divergence(family):
    plain = started(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))

    def prior(name, posterior):
        return MeanFieldGaussian(torch.zeros(posterior.shape).double(), torch.zeros(posterior.shape).double(),
                                 trainable=False)

    network = with_posteriors(plain, family, 0.3, prior)
    best = R.elbo_precisions(network)
    E.set_log_precisions(network, best)
    least, step = kl_sum(network).item(), 1e-3
    for name, value in best.items():
        around = []
        for shift in (-step, step):
            E.set_log_precisions(network, {name: value + shift})
            around.append(kl_sum(network).item())
        E.set_log_precisions(network, {name: value})
        assert min(around) > least and abs(around[1] - around[0]) < 1e-3 * (sum(around) - 2 * least)
    gamma = R.posterior_dimensions(network)
    for name, tensor in variational_tensors(network).items():
        square = tensor.posterior.mean.detach().square().sum()
        assert_close(gamma[name], best[name].exp() * square)


def test_the_elbo_refuses_point_masses():
    network = with_posteriors(nn.Linear(3, 2), PointMass)
    for ask in (R.elbo_precisions, R.posterior_dimensions):
        with pytest.raises(Refusal, match=r"point|Point"):
            ask(network)


DATA = Split(normal(60, 1, 6, 6).float(), labels(60))
MAP = TrainingConfig(epochs=9, batch_size=30, estimator="whole", draws=1, augmentation="none", evaluation_draws=1)


def small(family=PointMass, seed: int = 0, prior=None):
    start = torch.Generator().manual_seed(seed)
    plain = relaxed_network("FC+CONV", (1, 6, 6), 3, channels=(2,), strides=(2,), generator=start)
    return with_posteriors(plain, family, 0.01, prior or isotropic())


def test_updates_keep_their_schedule_and_ceiling():
    network, calls = small(), []

    def rule(network):
        calls.append(E.log_precisions(network)["layer1.conv.filter.weight"].item())
        return {name: value + 1.5 for name, value in E.log_precisions(network).items()}

    updates = R.PrecisionUpdates(rule, first=2, every=3, ceiling=4.0)
    train(network, DATA, MAP, callback=updates)
    assert [each["epoch"] for each in updates.history] == [2, 5, 8]
    assert_close(torch.tensor(calls), torch.tensor([0.0, 1.5, 3.0]), 1e-6)  # stored as a float32 log-scale
    assert set(updates.history[-1]) == {"epoch", *variational_tensors(network)}
    assert all(math.isclose(value, 4.0, rel_tol=1e-6) for value in E.log_precisions(network).values())


@with_factors
def test_a_run_that_is_continued_equals_one_that_was_not(tmp_path):
    rule = partial(R.evidence_precisions, inputs=DATA.inputs, targets=DATA.labels)
    two, four = replace(MAP, epochs=2), replace(MAP, epochs=4)
    straight = train(small(), DATA, four, callback=R.PrecisionUpdates(rule, 2, 1)).network
    train(small(), DATA, two, callback=R.PrecisionUpdates(rule, 2, 1), folder=tmp_path)
    resumed = train(small(seed=5), DATA, four, callback=R.PrecisionUpdates(rule, 2, 1), folder=tmp_path,
                    resume=True).network
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in straight.state_dict().items())
    assert E.log_precisions(straight)["layer1.fc.dense.weight"] != 0


def bars(count: int, where: bool) -> Split:
    """Noisy 6 x 6 images of a bar: its direction, and with `where` also the half in which it begins."""
    generator = torch.Generator().manual_seed(0)
    images, kind = 0.3 * torch.randn(count, 1, 6, 6, generator=generator), labels(count, 2)
    places, shapes = torch.randint(6, (count, 2), generator=generator), torch.zeros(2, 6, 6)
    shapes[0, 0, :3] = shapes[1, :3, 0] = 1.5
    for image, k, (row, column) in zip(images, kind, places.tolist()):
        image[0] += shapes[k].roll((row, column), (0, 1))
    return Split(images, kind + 2 * (places[:, 1] >= 3) if where else kind)


def learn(where: bool):
    data = bars(400, where)
    plain = relaxed_network("FC+CONV", (1, 6, 6), 4, channels=(4,), strides=(1,),
                            generator=torch.Generator().manual_seed(0))
    network = with_posteriors(plain, PointMass)
    updates = R.PrecisionUpdates(partial(R.evidence_precisions, inputs=data.inputs, targets=data.labels,
                                         curvature="sampled"), 10, 3)
    config = TrainingConfig(epochs=80, batch_size=100, estimator="whole", draws=1, learning_rate=0.02,
                            schedule="cosine", augmentation="none", evaluation_draws=1)
    train(network, data, config, callback=updates)
    report = R.learned_equivariance(network, E.laplace(network, data.inputs, data.labels))
    return {row.path: row for row in report}, updates.history


@with_factors
def test_an_unneeded_path_is_pruned_and_a_needed_one_is_not():
    rows, history = learn(where=False)
    grown = [each["layer1.fc.dense.weight"] for each in history]
    assert all(b > a for a, b in pairwise(grown[4:])) and grown[-1] > 6
    assert rows["fc"].pruned and not rows["conv"].pruned and rows["conv"].share > 0.9
    assert rows["fc"].norm < 0.1 * rows["conv"].norm
    rows, history = learn(where=True)
    assert not rows["fc"].pruned and rows["fc"].share > 0.7 and history[-1]["layer1.fc.dense.weight"] < 6


# The report


def test_report_by_widths():
    network = small(MeanFieldGaussian, prior=per_tensor(1.4))
    for tensor in variational_tensors(network).values():  # biases too: norms of several tensors
        nn.init.normal_(tensor.posterior.loc, generator=torch.Generator().manual_seed(3))
    E.set_log_precisions(network, R.elbo_precisions(network))
    rows = R.learned_equivariance(network)
    gamma, precisions = R.posterior_dimensions(network), E.log_precisions(network)
    assert [(row.layer, row.path) for row in rows] == [("layer1", "conv"), ("layer1", "fc")]
    for row in rows:
        names = pathways(network)["layer1"][row.path]
        tensors = [variational_tensors(network)[name] for name in names]
        assert row.weights == sum(tensor.posterior.numel for tensor in tensors)
        assert_close(row.effective_dimension, sum(gamma[name] for name in names))
        square = sum(tensor.posterior.mean.detach().double().square().sum() for tensor in tensors)
        assert_close(row.norm**2 / square, torch.tensor(1.0), 1e-5)  # float32
        assert_close(row.log_precision * row.weights, sum(
            precisions[name] * tensor.posterior.numel for name, tensor in zip(names, tensors)))
    assert_close(sum(row.share for row in rows), 1.0)
    table = R.equivariance_table(rows)
    assert table.count("\n") == 3 and "| layer1 | conv |" in table
    with pytest.raises(Refusal, match=r"point|Point"):
        R.learned_equivariance(small())
    with pytest.raises(Refusal, match="relaxed layers"):
        R.learned_equivariance(with_posteriors(nn.Linear(3, 2)))


@settings(max_examples=20)
@given(st.floats(-3, 30), st.floats(-3, 30))
@example(3.66, 3.66)  # half a dimension of 20 weights, which is kept
def test_what_counts_as_pruned(first, second):
    """Of a spectrum that is known: gamma of a path with eigenvalue 1 for each weight is weights / (1 + d)."""
    network = small()
    tensors = variational_tensors(network)
    precisions = {name: first if ".conv." in name else second for name in tensors}
    E.set_log_precisions(network, {name: torch.tensor(value) for name, value in precisions.items()})
    one = torch.ones(1).double()
    known = E.KroneckerCurvature({
        name: ((torch.ones(tensor.posterior.numel).double(), one),) for name, tensor in tensors.items()})
    fitted = E.LaplaceApproximation(0.0, {name: one[0] for name in tensors}, known)
    rows = R.learned_equivariance(network, fitted)
    gamma = [row.weights / (1 + math.exp(precisions[f"layer1.{row.path}.{'filter' if row.path == 'conv' else 'dense'}"
                                                    ".weight"])) for row in rows]
    for row, value in zip(rows, gamma):
        assert_close(row.effective_dimension / value, 1.0, 1e-5)  # priors hold their scales in float32
        assert row.pruned is (value < min(1, row.weights / 100) or value < 0.01 * sum(gamma))


def test_picture():
    network = small(MeanFieldGaussian)
    rows = R.learned_equivariance(network)
    figure = R.equivariance_picture([row._replace(pruned=row.path == "fc") for row in rows])
    shares, precisions = figure.axes
    assert_close(sum(bar.get_width() for bar in shares.patches), sum(row.share for row in rows))
    assert {line.get_marker() for line in precisions.lines if len(line.get_xdata())} == {"o", "x"}
    assert "share of the effective dimension" in shares.get_xlabel()
