"""Kronecker factors: by hand, against the full matrix, and the networks for which they would be wrong."""
import math
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers import normal
from helpers_layerwise import NOISE, convolutional, exact_case, flat, labels, relaxed, spectra, started, with_factors
from symbnn.errors import Refusal
from symbnn.layerwise import kronecker
from symbnn.layerwise.curvature import FullCurvature, KernelCurvature, full_curvature
from symbnn.layerwise.evidence import laplace, log_precisions
from symbnn.layerwise.kronecker import check_factors, factor_bytes, kronecker_curvature
from symbnn.layerwise.paths import TiedPath
from symbnn.posterior.layers import variational_tensors, with_posteriors
from symbnn.posterior.likelihoods import Categorical
from symbnn.posterior.point_mass import PointMass
from symbnn.posterior.real_targets import Gaussian
from symbnn.symmetry.fields import rotations
from tolerances import assert_close, within_standard_errors


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


@with_factors
def test_factors_are_means_over_positions_and_sums_over_data():
    plain = started(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3, stride=2), nn.Tanh(),
                                  nn.Flatten(), nn.Linear(18, 3)))
    x = normal(7, 1, 8, 8)
    fitted = spectra(kronecker_curvature(with_posteriors(plain, PointMass), x, batch_size=3))
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
    one, two = (spectra(kronecker_curvature(with_posteriors(each, PointMass), x)) for each in (grouped, apart))
    for kind in ("weight", "bias"):
        both = torch.cat([two[f"first.{kind}"], two[f"second.{kind}"]]).sort().values
        assert_close(one[f"0.{kind}"], both, 1e-10)  # of eigenvalues
        assert_close(one[f"3.{kind}"], two[f"head.{kind}"], 1e-10)


def without_cross_terms(curvature: FullCurvature | KernelCurvature, d) -> torch.Tensor:
    return sum(curvature.restricted([name]).log_det(d) for name in d)


@with_factors
def test_close_to_the_full_matrix():
    dense = started(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), gain=0.3)
    for plain, x in ((convolutional(gain=0.3), normal(300, 1, 8, 8)), (dense, normal(300, 6))):
        network = with_posteriors(plain, PointMass)
        d = {name: torch.tensor(2.0).double() for name in variational_tensors(network)}
        full, factors = full_curvature(network, x), kronecker_curvature(network, x).log_det(d)
        blocks = without_cross_terms(full, d)
        assert full.log_det(d) < blocks  # Fischer's inequality
        assert full.log_det(d) < factors < 1.45 * full.log_det(d)  # measured: 1.41 and 1.28 times
        assert abs(factors - blocks) < 0.1 * factors


@with_factors
@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(NOISE)])
def test_one_drawn_target_gives_the_factors_in_the_mean(likelihood):
    network, x, far = with_posteriors(started(nn.Linear(3, 4)), PointMass), normal(20, 3), torch.tensor(25.0).double()
    # At a huge precision log det(I + G / d) is the trace of G over d, which is linear in the estimate.

    def trace(**how):
        fitted = kronecker_curvature(network, x, likelihood, **how)
        return fitted.log_det({"weight": far, "bias": far}) * far.exp()

    drawn = torch.stack([trace(sampled=True, seed=seed) for seed in range(300)])
    assert drawn.std() > 0
    within_standard_errors(drawn.mean(), trace(), drawn.std() / math.sqrt(len(drawn)))


@with_factors
def test_batches_make_no_difference():
    network, x = with_posteriors(convolutional(), PointMass), normal(10, 1, 8, 8)
    one, other = (spectra(kronecker_curvature(network, x, batch_size=size)) for size in (3, 10))
    for name in one:
        assert_close(one[name], other[name], 1e-10)  # of eigenvalues


@with_factors
def test_a_network_of_one_layer_and_training_mode():
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    x = normal(12, 4)
    network(x)
    fitted = laplace(with_posteriors(network, PointMass).train(), x, labels(12))
    assert set(fitted.curvature.factors) == {"0.weight", "0.bias"}
    alone = with_posteriors(nn.Conv2d(2, 3, 1, groups=1, bias=False).double(), PointMass)
    with pytest.raises(Refusal, match="one vector of outputs"):
        kronecker_curvature(alone, normal(2, 2, 3, 3))
    layer = with_posteriors(nn.Linear(4, 3).double(), PointMass)
    assert set(kronecker_curvature(layer, x).factors) == {"weight", "bias"}


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
        kronecker_curvature(network, x, likelihood)


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
@pytest.mark.parametrize("how, match", [("function", "calls of their layers alone"), ("table", "1 inputs for 9 data")])
def test_uses_that_are_no_calls_on_the_data_are_refused(how, match):
    network = with_posteriors(started(Aside(how)), PointMass)
    for likelihood in (Categorical(), Gaussian(NOISE)):
        with pytest.raises(Refusal, match=match):
            kronecker_curvature(network, normal(9, 4), likelihood)


@with_factors
def test_a_frozen_tensor_leaves_the_factors_of_its_layer_as_they_are():
    def made(frozen: bool) -> nn.Module:
        plain = started(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)))
        plain[0].weight.requires_grad_(not frozen)
        plain[2].bias.requires_grad_(not frozen)
        return with_posteriors(plain, PointMass)

    for sampled in (False, True):
        some, every = (kronecker_curvature(made(frozen), normal(9, 4), sampled=sampled).factors
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
            laplace(network, x, y, curvature=curvature)
    laplace(network, x, y, curvature="full")


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
            laplace(network, x, y, likelihood=likelihood, curvature=curvature)
        laplace(network, x, y, likelihood=likelihood, curvature=curvature, sharing="expand")
    laplace(network, x, y, likelihood=likelihood, curvature="full")
    with pytest.raises(Refusal, match='sharing=None or sharing="expand"'):
        kronecker_curvature(network, x, likelihood, sharing="reduce")


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
        kronecker_curvature(with_posteriors(started(Silent()), PointMass), normal(9, 5, 4), Gaussian(NOISE))


@with_factors
def test_positions_of_convolutions_and_groups_are_no_sharing():
    pooled = started(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                   nn.Linear(3, 3)))
    on_pixels = rotations().on(4, 4)
    tied = started(nn.Sequential(TiedPath(1, 2, on_pixels, on_pixels), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)))
    for plain, x in ((pooled, normal(9, 1, 8, 8)), (relaxed("C4-CONV+F-FC"), normal(9, 1, 8, 8)),
                     (tied, normal(9, 1, 4, 4))):
        network = with_posteriors(plain, PointMass)
        one, two = (spectra(kronecker_curvature(network, x, sharing=how)) for how in (None, "expand"))
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
            kronecker_curvature(network, x, sharing="expand", batch_size=4)


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
    "unused.*which it does not call": Unused(),
    "one vector of outputs": nn.Conv2d(1, 3, 3),
}


@with_factors
@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own remark on even kernels
@pytest.mark.parametrize("reason", WRONG)
def test_networks_whose_factors_would_be_wrong_are_refused(reason):
    with pytest.raises(Refusal, match=reason):
        kronecker_curvature(with_posteriors(WRONG[reason].double(), PointMass), normal(6, 1, 8, 8))


@with_factors
def test_why_circular_padding_is_refused(monkeypatch):
    """Curvlinops takes it for zeros: without the refusal the marginal likelihood of a linear model is wrong."""
    layer = partial(nn.Conv2d, 1, 2, 3, padding=1, padding_mode="circular", bias=False)
    network, x, y, exact = exact_case(lambda: flat(layer()), (1, 4, 4))
    monkeypatch.setattr(kronecker, "_check_layer", lambda *_: None)
    fitted = laplace(network, x, y, likelihood=Gaussian(NOISE))
    assert abs(fitted.log_evidence(log_precisions(network)) - exact) > 1


def test_without_curvlinops_the_commands_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    with pytest.raises(Refusal, match=r"symbnn\[evidence\].*--no-deps curvlinops-for-pytorch==3\.0\.1"):
        kronecker_curvature(with_posteriors(nn.Linear(3, 2), PointMass), torch.zeros(2, 3))


@with_factors
def test_bytes_of_factors_are_known_before(monkeypatch):
    network, x, seen = with_posteriors(convolutional(), PointMass), normal(4, 1, 8, 8), []
    predicted = factor_bytes(network)
    assert predicted == {"0": 8 * (9**2 + 4**2), "2": 2 * 8 * (18**2 + 2**2), "5": 8 * (36**2 + 3**2)}
    eigenvalues = kronecker._eigenvalues
    monkeypatch.setattr(kronecker, "_eigenvalues", lambda factor: seen.append(factor.nbytes) or eigenvalues(factor))
    needed = check_factors(network, 2**30)
    kronecker_curvature(network, x, memory_limit=needed)
    assert sum(seen) == sum(predicted.values()) and needed == sum(seen) + 16 * 36**2
    with pytest.raises(Refusal, match=rf"36 rows of layer '5'.*memory_limit={needed}, at most 35 numbers"):
        kronecker_curvature(network, x, memory_limit=needed - 1)
    assert factor_bytes(with_posteriors(nn.Linear(5, 2), PointMass)) == {"": 4 * (25 + 4)}
