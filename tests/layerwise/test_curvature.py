"""The Gauss-Newton matrix: squared Jacobians, its two sides, the root of the softmax, memory, what is refused."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers import normal
from helpers_layerwise import NOISE, convolutional, labels, relaxed, started, with_factors, with_precisions
from symbnn.errors import Refusal
from symbnn.layerwise.curvature import (
    FullCurvature,
    KernelCurvature,
    _data_side,
    _output_root,
    _weights_side,
    full_curvature,
    network_at_means,
)
from symbnn.layerwise.evidence import LaplaceApproximation, laplace, log_precisions
from symbnn.layerwise.kronecker import kronecker_curvature
from symbnn.posterior.layers import variational_tensors, with_posteriors
from symbnn.posterior.likelihoods import Categorical
from symbnn.posterior.point_mass import PointMass
from symbnn.posterior.real_targets import Gaussian
from tolerances import assert_close


def test_the_full_matrix_is_a_sum_of_squared_jacobians():
    plain, x = started(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3))), normal(9, 3)
    expected = torch.zeros(17, 17).double()
    for row in x:
        outputs = plain(row)
        gradients = [torch.cat([g.flatten() for g in torch.autograd.grad(f, list(plain.parameters()),
                                                                         retain_graph=True)]) for f in outputs]
        p, J = outputs.softmax(-1).detach(), torch.stack(gradients)
        expected += J.T @ (p.diag() - torch.outer(p, p)) @ J
    assert_close(full_curvature(with_posteriors(plain, PointMass), x, batch_size=3).matrix, expected)


TWO_SIDED = {
    "dense": lambda: started(nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 3))),
    "convolution, pooled": lambda: started(nn.Sequential(
        nn.CircularPad2d(1), nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))),
    "F-FC+CONV": lambda: relaxed("F-FC+CONV"), "lifted": lambda: relaxed("C4-CONV+F-FC"),
}


def both_sides(network, x, likelihood=Categorical(), split: int = 4):
    plain = network_at_means(network, x, likelihood)
    sizes = {name: plain.get_parameter(name).numel() for name in variational_tensors(network)}
    with torch.no_grad():
        return [side(plain, sizes, x.split(split), likelihood) for side in (_weights_side, _data_side)]


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(NOISE)])
@pytest.mark.parametrize("name", TWO_SIDED)
def test_both_sides_have_one_determinant(name, likelihood):
    network, x = with_precisions(TWO_SIDED[name](), seed=4), normal(11, 1, 8, 8)
    weights, data = both_sides(network, x, likelihood)
    at = {name: value + 1 for name, value in log_precisions(network).items()}
    assert weights.log_det(at) > 1
    assert_close(data.log_det(at) / weights.log_det(at), torch.tensor(1.0), 1e-10)  # of eigenvalues
    for some in [[each] for each in at] + [list(at)[:2], list(at)[-2:]]:
        assert_close(data.restricted(some).log_det(at), weights.restricted(some).log_det(at), 1e-10)
    gammas = [LaplaceApproximation(0.0, {}, each).effective_dimensions(at) for each in (weights, data)]
    whole = sum(kernel / at[each].exp() for each, kernel in zip(data.names, data.kernels))
    inverse = torch.linalg.inv(whole + torch.eye(len(whole)).double())
    for each, kernel in zip(data.names, data.kernels):
        assert_close(gammas[0][each], gammas[1][each], 1e-10)
        assert_close(gammas[1][each], (inverse @ kernel).trace() / at[each].exp(), 1e-10)
        assert 0 < gammas[1][each] < min(variational_tensors(network)[each].posterior.numel, len(whole))


def test_the_root_of_the_softmax():
    outputs = torch.cat([normal(5, 4), 30 * normal(5, 4, seed=1), normal(1, 4) * 1e5])
    root, p = _output_root(outputs, Categorical()), outputs.softmax(-1)
    assert root.shape == (11, 4, 3) and (root.triu(1) == 0).all()
    assert_close(root @ root.mT, torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
    sure = torch.tensor([[0.0, -40.0, -41.0]]).double()  # 1 - p_1 is lost to rounding, and p_1 (1 - p_1) is not
    rest = math.exp(-40) + math.exp(-41)
    found = _output_root(sure, Categorical())
    assert_close((found @ found.mT)[0, 0, 0] / (rest / (1 + rest) ** 2), torch.tensor(1.0))
    assert_close(_output_root(outputs, Gaussian(0.5))[3], 2 * torch.eye(4).double())


def test_the_smaller_side_that_fits_is_taken():
    network, d = with_precisions(convolutional()), log_precisions(with_precisions(convolutional()))
    few, many = normal(20, 1, 8, 8), normal(114, 1, 8, 8)  # 2 rows each, and 227 weights
    kernel, matrix = full_curvature(network, few), full_curvature(network, many)
    assert kernel.kernels.shape == (6, 40, 40) and matrix.matrix.shape == (227, 227)
    assert type(full_curvature(network, many[:113])) is KernelCurvature
    gaussian = full_curvature(network, few, Gaussian(NOISE))
    assert gaussian.kernels.shape == (6, 60, 60)
    weights, data = 56 * 227**2 + 16 * 2 * 227, 88 * 40**2 + 24 * 2 * 108
    assert data < weights < 88 * 226**2
    other = full_curvature(network, many[:113], memory_limit=weights)  # its smaller side is too large
    assert type(other) is FullCurvature
    cut = full_curvature(network, few, memory_limit=data)  # batches of one datum
    assert_close(cut.kernels, kernel.kernels)
    assert_close(full_curvature(network, many[:113], memory_limit=2**30).log_det(d), other.log_det(d), 1e-10)
    with pytest.raises(Refusal, match=rf"227 weights.*or at most 19 inputs, or memory_limit={data}"):
        full_curvature(network, few, memory_limit=data - 1)
    full_curvature(network, few[:19], memory_limit=data - 1)
    with pytest.raises(Refusal, match=rf"at most 226 weights, or at most 90 inputs, or memory_limit={weights}"):
        full_curvature(network, many, memory_limit=weights - 1)
    full_curvature(network, many[:90], memory_limit=weights - 1)
    with pytest.raises(Refusal, match=r"two or more classes\. Got: one output"):
        full_curvature(with_posteriors(nn.Linear(3, 1).double(), PointMass), normal(2, 3))


def test_hundreds_of_thousands_of_weights_and_few_data():
    plain = started(nn.Sequential(nn.Flatten(), nn.Linear(64, 2000), nn.Tanh(), nn.Linear(2000, 100), nn.Tanh(),
                                  nn.Linear(100, 3)), gain=0.05)
    network, x = with_precisions(plain), normal(8, 1, 8, 8)
    fitted = laplace(network, x, labels(8), curvature="full")
    assert type(fitted.curvature) is KernelCurvature and sum(its.posterior.numel for its in variational_tensors(
        network).values()) > 330_000
    assert 0 < sum(fitted.effective_dimensions(log_precisions(network)).values()) < 16


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
    found, expected = (full_curvature(network, each) for each in (x, plain[0](x)))
    d = log_precisions(network)
    assert found.log_det(d) > 1
    assert_close(found.log_det(d), expected.log_det(d))


@with_factors
@pytest.mark.parametrize("fit", [full_curvature, kronecker_curvature])
def test_one_logit_has_no_evidence(fit):
    with pytest.raises(Refusal, match=r"two or more classes.*nn\.Linear\(features, 2\)"):
        fit(with_posteriors(started(nn.Linear(4, 1)), PointMass), normal(9, 4))


class LateRoot(nn.Module):
    """Finite outputs without a finite slope at 0."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return self.linear(x).abs().sqrt()


@with_factors
@pytest.mark.parametrize("fit", [full_curvature, kronecker_curvature])
def test_gradients_that_are_not_finite_are_named(fit):
    x = normal(9, 4)
    x[8] = 0
    with pytest.raises(Refusal, match="without a slope"):
        fit(with_posteriors(started(LateRoot()), PointMass), x)
