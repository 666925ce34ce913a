"""The marginal likelihood: exact models, its terms and gradients, inputs of every type, data that are no data."""
import math
from functools import partial

import pytest
import torch
from torch import nn

from helpers import normal
from helpers_layerwise import (
    NOISE,
    convolutional,
    exact_case,
    fitted_pair,
    flat,
    labels,
    spectra,
    started,
    with_factors,
    with_precisions,
)
from symbnn.data.splits import Split
from symbnn.errors import Refusal
from symbnn.layerwise.curvature import FullCurvature, KernelCurvature, full_curvature
from symbnn.layerwise.evidence import laplace, log_precisions, set_log_precisions
from symbnn.layerwise.kronecker import KroneckerCurvature
from symbnn.layerwise.precisions import raise_evidence
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.layers import with_posteriors
from symbnn.posterior.likelihoods import Categorical
from symbnn.posterior.log_normal import LogNormal
from symbnn.posterior.point_mass import PointMass
from symbnn.posterior.priors import isotropic, random_means
from symbnn.posterior.real_targets import Gaussian
from tolerances import assert_close


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


@with_factors
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("curvature", ["exact", "full"])
def test_evidence_of_a_linear_model_is_exact(name, curvature):
    network, x, y, exact = exact_case(*LINEAR[name])
    fitted = laplace(network, x, y, likelihood=Gaussian(NOISE), curvature=curvature, batch_size=4)
    assert_close(fitted.log_evidence(log_precisions(network)), exact, 1e-10)  # of systems of equations


@pytest.mark.parametrize("name", SEVERAL)
def test_evidence_of_a_linear_model_with_several_precisions_is_exact(name):
    network, x, y, exact = exact_case(*SEVERAL[name])
    fitted = laplace(network, x, y, likelihood=Gaussian(NOISE), curvature="full", batch_size=4)
    assert_close(fitted.log_evidence(log_precisions(network)), exact, 1e-10)  # of systems of equations


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
def test_saturated_predictions_give_finite_numbers_in_float32():
    plain = convolutional().float()
    plain[5].weight.data *= 1e5
    network, x = with_posteriors(plain, PointMass), normal(12, 1, 8, 8).float()
    assert (plain(x).softmax(-1) == 0).any()
    for curvature in ("exact", "sampled", "full"):
        fitted = laplace(network, x, plain(x).argmax(-1), curvature=curvature)
        free = {name: value.requires_grad_() for name, value in log_precisions(network).items()}
        value = fitted.log_evidence(free)
        value.backward()
        assert value.isfinite() and all(each.grad.isfinite() for each in free.values())
        if curvature != "full":  # rounding gives a singular factor negative eigenvalues, whose logarithm may not exist
            factors = [factor for pairs in fitted.curvature.factors.values() for pair in pairs for factor in pair]
            assert all((factor >= 0).all() for factor in factors) and any((factor == 0).any() for factor in factors)


@with_factors
def test_precisions_agree_between_single_and_double():
    plain, x = convolutional(), normal(20, 1, 8, 8)
    values = [laplace(with_posteriors(plain.to(dtype), PointMass), x.to(dtype), labels(20)).log_evidence(
        log_precisions(with_posteriors(plain, PointMass))) for dtype in (torch.float64, torch.float32)]
    assert_close(values[1], values[0], 1e-5)  # float32, summed over a few hundred terms
    assert values[1].dtype == torch.float64


@with_factors
def test_on_cuda(require_cuda):
    network, x = with_posteriors(convolutional(), PointMass), normal(20, 1, 8, 8)
    values = []
    for device in ("cpu", require_cuda):
        moved = network.to(device)
        for curvature in ("exact", "full"):
            fitted = laplace(moved, x.to(device), labels(20).to(device), curvature=curvature)
            raised = raise_evidence(fitted, log_precisions(moved))
            values.append(fitted.log_evidence(raised).item())
    assert_close(torch.tensor(values[2:]), torch.tensor(values[:2]), 1e-8)  # twenty steps of Adam


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
    fitted = [laplace(network, x.to(dtype), y, likelihood=likelihood, curvature=curvature.split()[0])
              for dtype in types]
    kind = {"exact": KroneckerCurvature, "sampled": KroneckerCurvature, "full": FullCurvature}
    assert all(type(each.curvature) is kind.get(curvature, KernelCurvature) for each in fitted)
    d = log_precisions(network)
    values = torch.stack([each.log_evidence(d) for each in fitted])
    assert fitted[-1].curvature.log_det(d) > 1
    assert_close(values, values[-1].expand(len(types)))


NAN = [math.nan, math.inf]


@with_factors
@pytest.mark.parametrize("bad", NAN)
@pytest.mark.parametrize("curvature", ["exact", "sampled", "full"])
def test_data_that_are_not_finite_are_named(curvature, bad):
    plain = started(nn.Linear(4, 3))
    network, x, y = with_posteriors(plain, PointMass), normal(9, 4), normal(9, 3)
    broken, missing = x.clone(), y.clone()
    broken[0, 2] = broken[7, 1] = missing[8, 0] = bad
    with pytest.raises(Refusal, match=r"finite inputs.*2 of 9 inputs"):
        laplace(network, broken, labels(9), curvature=curvature)
    with pytest.raises(Refusal, match=r"one finite target for each input.*1 numbers not finite"):
        laplace(network, x, missing, likelihood=Gaussian(NOISE), curvature=curvature)
    for wrong in (labels(8), labels(300)):
        with pytest.raises(Refusal, match="one finite target for each input"):
            laplace(network, x, wrong, curvature=curvature)
    with pytest.raises(Refusal, match="one or more inputs"):
        laplace(network, x[:0], labels(0), curvature=curvature)
    network.weight.posterior.loc.data[0, 0] = bad
    with pytest.raises(Refusal, match=r"finite outputs of the network.*diverged"):
        laplace(network, x, labels(9), curvature=curvature)


@with_factors
@pytest.mark.parametrize("curvature", ["exact", "full"])
@pytest.mark.parametrize("shape", [(), (1,), (2,)], ids=str)
def test_evidence_with_a_tensor_of_noise(curvature, shape):
    """Outputs and targets in units of the noise have noise 1, up to the change of the targets' volume."""
    noise = (0.4 + torch.rand(shape, generator=torch.Generator().manual_seed(4))).double().requires_grad_()
    plain, x, y = started(nn.Linear(4, 2, bias=False)), normal(9, 4), normal(9, 2)
    scaled = started(nn.Linear(4, 2, bias=False))
    scales = noise.detach().expand(2)
    found = laplace(with_precisions(plain), x, y, likelihood=Gaussian(noise), curvature=curvature)
    standard = laplace(with_precisions(scaled), x, (y - plain(x).detach()) / scales + scaled(x).detach(),
                         likelihood=Gaussian(1.0), curvature="full").log_likelihood
    assert_close(found.log_likelihood, standard - 9 * scales.log().sum())
    d = {"weight": torch.tensor(0.3).double()}
    expected = sum(torch.linalg.slogdet(torch.eye(4).double() + x.T @ x / s**2 / d["weight"].exp()).logabsdet
                   for s in scales)
    assert_close(found.curvature.log_det(d), expected, 1e-10)
    assert not found.curvature.log_det(d).requires_grad


@with_factors
@pytest.mark.parametrize("curvature", ["exact", "full"])
def test_data_and_options_that_do_not_fit_are_refused_with_what_works(curvature):
    network = with_posteriors(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), PointMass)
    x, y, evaluate = normal(9, 4).float(), labels(9), partial(laplace, network, curvature=curvature)
    for dtype in (torch.float16, torch.float64, torch.int64, torch.uint8):
        with pytest.raises(Refusal, match=r"inputs\.to\(torch\.float32\)"):
            evaluate(x.to(dtype), y)
    for wrong in (x[:, :2], x[0], x[:, :, None]):
        with pytest.raises(Refusal, match="inputs that the network can read"):
            evaluate(wrong, y)
    for wrong in (x.numpy(), x.tolist(), None, Split(x, y), x[0, 0], [x], torch.utils.data.TensorDataset(x, y)):
        with pytest.raises(Refusal, match=r"inputs of all data|a real tensor of inputs"):
            evaluate(wrong, y)
    for wrong in (y.numpy(), y.tolist(), None, y[0]):
        with pytest.raises(Refusal, match=r"targets of all data|a real tensor of targets"):
            evaluate(x, wrong)
    with pytest.raises(Refusal, match=r"torch\.as_tensor\(inputs\)"):
        evaluate(x.numpy(), y)
    with pytest.raises(Refusal, match=r"split\.inputs and split\.labels"):
        evaluate(Split(x, y), y)
    split = Split(x, y)
    evaluate(torch.as_tensor(split.inputs.numpy()), split.labels)
    with pytest.raises(Refusal):
        evaluate(y, x)
    with pytest.raises(Refusal, match=r"laplace\(network, inputs, targets\)"):
        laplace(x, network, y, curvature=curvature)
    for options in ({"batch_size": 0}, {"batch_size": 2.0}, {"batch_size": None}, {"seed": None}, {"seed": -1}):
        with pytest.raises(Refusal, match="whole number"):
            evaluate(x, y, **options)


def test_precisions_are_finite_numbers_one_for_each_tensor():
    network = with_posteriors(nn.Linear(4, 3), PointMass)
    fitted, d = laplace(network, normal(9, 4).float(), labels(9), curvature="full"), log_precisions(network)
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
            set_log_precisions(network, wrong)
    assert log_precisions(network) == d


def test_precisions_of_other_priors_are_refused():
    for prior, family in ((random_means(0), MeanFieldGaussian), (isotropic(), Laplace), (isotropic(), LogNormal)):
        with pytest.raises(Refusal, match=r"N\(0, I / d\)"):
            log_precisions(with_posteriors(nn.Linear(3, 2), family, prior=prior))
    network = with_posteriors(nn.Linear(3, 2), prior=lambda name, posterior: MeanFieldGaussian(
        torch.zeros(posterior.shape), torch.linspace(0, 1, posterior.numel).view(posterior.shape), trainable=False))
    with pytest.raises(Refusal, match=r"N\(0, I / d\)"):
        log_precisions(network)
    with pytest.raises(Refusal, match="network's tensors"):
        set_log_precisions(network, {"other": torch.zeros(())})
    for family, prior in ((Laplace, isotropic()), (MeanFieldGaussian, random_means(0))):
        other = with_posteriors(nn.Linear(3, 2), family, prior=prior)
        before = other.weight.prior.log_scale.clone()
        with pytest.raises(Refusal, match=r"N\(0, I / d\)"):
            set_log_precisions(other, {"weight": torch.zeros(())})
        assert torch.equal(other.weight.prior.log_scale, before)
    with pytest.raises(Refusal, match="exact, sampled, full as the curvature"):
        laplace(network, normal(2, 3), labels(2), curvature="diagonal")
    with pytest.raises(Refusal, match="likelihood"):
        full_curvature(network, normal(2, 3).float(), object())
