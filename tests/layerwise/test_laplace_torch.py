"""What laplace-torch has fitted, as posteriors of this library; and ours against theirs."""
import sys
import warnings
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import normal, seeded
from helpers_layerwise import labels, started
from symbnn.errors import Refusal
from symbnn.layerwise.laplace_posteriors import joint_laplace, laplace_posterior
from symbnn.layerwise.laplace_torch import from_laplace_torch
from symbnn.layerwise.linearised import linearised, probit
from symbnn.posterior.joint_gaussian import JointGaussian
from symbnn.posterior.layers import variational_tensors, with_posteriors
from symbnn.posterior.point_mass import PointMass
from symbnn.posterior.priors import isotropic
from symbnn.posterior.real_targets import Gaussian
from tolerances import assert_close, within_standard_errors

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:These weights are no mode:UserWarning"),
]


@pytest.fixture(scope="module")
def package():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import torchvision  # noqa: F401
        except (ImportError, RuntimeError):  # made for another build of torch; imported, and not used
            sys.modules.update({f"torchvision{its}": MagicMock() for its in ("", ".models", ".ops", ".transforms")})
        return pytest.importorskip("laplace", reason="laplace-torch is not installed")


def mlp():
    return started(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def cnn():
    return started(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)))


def fitted(package, plain, x, y, **options):
    la = package.Laplace(plain, "classification" if y.ndim == 1 else "regression", **options)
    la.fit(DataLoader(TensorDataset(x, y), batch_size=len(x)))
    return la


CASES = [(subset, structure) for subset in ("all", "last_layer") for structure in ("diag", "kron", "full")]


@pytest.mark.parametrize("make, shape", [(mlp, (4,)), (cnn, (1, 4, 4))])
@pytest.mark.parametrize("subset, structure", CASES)
@pytest.mark.parametrize("regression", [False, True])
def test_the_predictive_is_theirs(package, make, shape, subset, structure, regression):
    plain, x = make(), normal(30, *shape, seed=1)
    y = normal(30, 3, seed=2) if regression else labels(30)
    options = dict(sigma_noise=0.4) if regression else {}
    la = fitted(package, plain, x, y, subset_of_weights=subset, hessian_structure=structure, prior_precision=2.0,
                **options)
    new = normal(6, *shape, seed=3)
    found, (mean, covariance) = linearised(from_laplace_torch(la, plain), new), la._glm_predictive_distribution(new)
    assert_close(found.mean, mean)
    assert_close(found.covariance, covariance, 1e-10)
    if not regression:
        assert_close(probit(found, paired=False), la(new, link_approx="probit"), 1e-10)


@pytest.mark.parametrize("subset, structure", CASES)
def test_draws_have_the_variances_of_their_draws(package, subset, structure):
    plain, x = mlp(), normal(30, 4, seed=1)
    la = fitted(package, plain, x, labels(30), subset_of_weights=subset, hessian_structure=structure)
    found = from_laplace_torch(la, plain)
    theirs = la.sample(20_000, generator=seeded(0))
    names = [name for name in variational_tensors(found.network if isinstance(found, JointGaussian) else found)
             if subset == "all" or name.startswith("2")]
    if isinstance(found, JointGaussian):
        assert list(found.names) == names
        mean, variance = found.law.mean, found.law.variance.detach()
    else:
        laws = [variational_tensors(found)[name].posterior for name in names]
        mean, variance = (torch.cat([getattr(law, key).detach().flatten() for law in laws])
                          for key in ("mean", "variance"))
    within_standard_errors(theirs.mean(0), mean, theirs.std(0) / 20_000**0.5)
    within_standard_errors(theirs.var(0), variance, (theirs - mean).square().std(0) / 20_000**0.5)


@pytest.mark.parametrize("regression", [False, True])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_ours_are_theirs(package, subset, structure, regression):
    """One batch: then they add up no Kronecker factors."""
    plain, x = mlp(), normal(30, 4, seed=1)
    y = normal(30, 3, seed=2) if regression else labels(30)
    la = fitted(package, plain, x, y, subset_of_weights=subset, hessian_structure=structure, prior_precision=2.0,
                **(dict(sigma_noise=0.4) if regression else {}))
    network = with_posteriors(plain, PointMass, prior=isotropic(2.0**-0.5))
    options = dict(layers=subset.split("_")[0], **(dict(likelihood=Gaussian(0.4)) if regression else {}))
    ours = joint_laplace(network, x, y, **options) if structure == "full" else laplace_posterior(
        network, x, y, structure={"diag": "diagonal", "kron": "kronecker"}[structure], **options)
    new = normal(6, 4, seed=3)
    assert_close(linearised(ours, new).covariance, linearised(from_laplace_torch(la, plain), new).covariance,
                 1e-7 if structure == "full" else 1e-10)  # their full matrix passes through float32


def test_priors_are_theirs(package):
    plain, x = mlp(), normal(30, 4, seed=1)
    size = sum(parameter.numel() for parameter in plain.parameters())
    precision, centre = normal(size, seed=5).exp(), 0.1 * normal(size, seed=6)
    la = fitted(package, plain, x, labels(30), subset_of_weights="all", hessian_structure="diag",
                prior_precision=precision, prior_mean=centre)
    tensors = variational_tensors(from_laplace_torch(la, plain))
    assert_close(torch.cat([its.prior.variance.flatten() for its in tensors.values()]), 1 / precision)
    assert_close(torch.cat([its.prior.mean.flatten() for its in tensors.values()]), centre)


def test_frozen_parameters_stay_outside(package):
    plain, x = mlp(), normal(30, 4, seed=1)
    plain[0].requires_grad_(False)
    la = fitted(package, plain, x, labels(30), subset_of_weights="all", hessian_structure="diag")
    assert list(variational_tensors(from_laplace_torch(la, plain))) == ["2.weight", "2.bias"]


def test_refusals(package):
    plain, x = mlp(), normal(30, 4, seed=1)
    la = fitted(package, plain, x, labels(30), subset_of_weights="all", hessian_structure="diag")
    other = package.FunctionalLaplace(plain, "classification", n_subset=5)
    for wrong, network, message in (
            (plain, plain, "one of DiagLaplace.*a Sequential"), (other, plain, "a FunctionalLaplace"),
            (package.Laplace(plain, "classification", subset_of_weights="all", hessian_structure="kron"), plain,
             "an object that was fitted"),
            (la, started(mlp(), seed=4), "made for, at the weights"),
            (la, cnn(), "made for, at the weights"), (la, la, "network")):
        with pytest.raises(Refusal, match=message):
            from_laplace_torch(wrong, network)

    class DiagLaplace:
        n_data = 3

    with pytest.raises(Refusal, match="of laplace-torch"):
        from_laplace_torch(DiagLaplace(), plain)
