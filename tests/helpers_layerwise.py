"""Networks, data and exact cases that the tests of layer-wise equivariance share."""
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from helpers import normal, seeded
from symbnn.layerwise.evidence import laplace, log_precisions, set_log_precisions
from symbnn.layerwise.kronecker import KroneckerCurvature
from symbnn.layerwise.relaxed_networks import relaxed_network
from symbnn.posterior.layers import variational_tensors, with_posteriors
from symbnn.posterior.point_mass import PointMass

with_factors = pytest.mark.skipif(find_spec("curvlinops") is None, reason="curvlinops-for-pytorch is not installed")
NOISE = 0.4


def labels(count, classes=3, seed=0):
    return torch.randint(classes, (count,), generator=seeded(seed))


def started(plain: nn.Module, seed: int = 0, gain: float = 0.5) -> nn.Module:
    """The network in float64 with weights that depend on the seed alone."""
    plain = plain.double()
    for place, parameter in enumerate(plain.parameters()):
        parameter.data = gain * normal(*parameter.shape, seed=100 * seed + place)
    return plain


def with_precisions(plain: nn.Module, seed: int = 0) -> nn.Module:
    """A network of point masses with a different precision for each tensor."""
    network = with_posteriors(plain, PointMass)
    set_log_precisions(network, {name: value for name, value in zip(
        variational_tensors(network), 0.7 * normal(len(variational_tensors(network)), seed=seed))})
    return network


def randomised(path):
    with torch.no_grad():
        for i, parameter in enumerate(path.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=50 + i))
    return path


def convolutional(**options) -> nn.Module:
    """Two convolutions (one grouped, with a stride) and a linear layer, 8 x 8 pixels to 3 classes: 227 weights."""
    return started(nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.Tanh(), nn.Flatten(),
        nn.Linear(36, 3)), **options)


def relaxed(kind: str) -> nn.Module:
    return relaxed_network(kind, (1, 8, 8), 3, channels=(2, 3), strides=(2, 2), dtype=torch.float64,
                           generator=torch.Generator().manual_seed(0))


def flat(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.Flatten())


def design(plain: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = {name: value.detach() for name, value in plain.named_parameters()}
    columns = torch.func.jacrev(lambda w: torch.func.functional_call(plain, w, (x,)))(weights)
    return {name: column.flatten(2).flatten(0, 1) for name, column in columns.items()}


def exact_case(made, shape, count: int = 9, seed: int = 0):
    """A network at its maximum a posteriori, its data, and the exact log evidence."""
    plain, x = started(made(), seed), normal(count, *shape, seed=seed + 1)
    network = with_precisions(plain, seed)
    columns, precisions = design(plain, x), log_precisions(network)
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


def fitted_pair(curvature: str, count: int = 30):
    network, x = with_precisions(convolutional(), seed=3), normal(count, 1, 8, 8)
    return laplace(network, x, labels(count), curvature=curvature), log_precisions(network)


def spectra(fitted: KroneckerCurvature) -> dict[str, torch.Tensor]:
    return {name: torch.cat([torch.outer(a, b).flatten() for a, b in pairs]).sort().values
            for name, pairs in fitted.factors.items()}
