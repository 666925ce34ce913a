"""The bound through moments: at least the error, layers that stretch nothing, numbers of reads."""

import copy
import math
import random

import pytest
import torch
from torch import nn

from helpers import normal, seeded
from helpers_equivariance import at_most, classifier
from symbnn.equivariance.bounds import push_forward_divergences
from symbnn.equivariance.ledger import ledger
from symbnn.equivariance.lipschitz import is_contraction, stretch, through_lipschitz
from symbnn.equivariance.predictions import orbit_predictions
from symbnn.errors import Refusal
from symbnn.posterior.divergences import hellinger, total_variation
from symbnn.posterior.layers import variational_tensors, with_posteriors
from symbnn.symmetry.fields import field, half_turns, rotations
from symbnn.symmetry.networks import network_action
from tolerances import assert_close, exact64


def with_scale(plain, scale):
    return with_posteriors(plain, scale=scale)


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("scale", [1e-9, 0.3])
def test_lipschitz_bound_covers_the_error_of_a_small_network(circular, scale):
    plain = classifier(circular=circular)
    action = network_action(plain, field(rotations(), (1, 4, 4)))
    network, x = with_scale(plain, scale), normal(6, 1, 4, 4, seed=1)
    bound = through_lipschitz(network, action, x)
    P = orbit_predictions(network, x, action, 400 if scale > 0.1 else 1, generator=seeded(0)).probabilities.mean(0)
    error = total_variation(P, P[:, :1])
    assert bound.shape == error.shape == (6, 4) and error[:, 1:].min() > 1e-6
    assert bool((bound + exact64 >= error).all())


def test_lipschitz_bound_of_one_linear_layer_in_closed_form():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(9, 3)).double()
    action, x = network_action(plain, field(rotations(), (1, 3, 3))), normal(5, 1, 3, 3, seed=2)
    network = with_posteriors(plain, scale=0.2)
    W = plain[1].weight.detach()
    for k in range(4):
        moved = (action.parameters["1.weight"].act(k, W) - W).norm()
        assert_close(through_lipschitz(network, action, x)[:, k], moved * x.flatten(1).norm(dim=1) / math.sqrt(8))


def test_lipschitz_recursion_against_one_written_out():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 8),
                          nn.Tanh(), nn.Linear(8, 3)).double()
    action = network_action(plain, field(rotations(), (1, 4, 4)), hidden="regular")  # biases move as well
    network, x = with_posteriors(plain, scale=0.3), normal(2, 1, 4, 4, seed=1)
    posts = {name: t.posterior for name, t in variational_tensors(network).items()}
    r = {n: math.sqrt(q.mean.square().sum().item() + 0.09 * q.numel) for n, q in posts.items()}
    for k, g in enumerate(action.group.elements()):
        w = {n: (action.parameters[n].act(g, q.mean) - q.mean).norm().item() for n, q in posts.items()}
        for i in range(2):
            size = x[i].norm().item()
            gap1 = 3 * w["0.weight"] * size + 4 * w["0.bias"]  # 9 readers a pixel, 16 places
            size1 = 3 * r["0.weight"] * size + 4 * r["0.bias"]
            gap2 = r["4.weight"] * gap1 + w["4.weight"] * size1 + w["4.bias"]
            size2 = r["4.weight"] * size1 + r["4.bias"]
            gap3 = r["6.weight"] * gap2 + w["6.weight"] * size2 + w["6.bias"]
            assert_close(through_lipschitz(network, action, x)[i, k], gap3 / math.sqrt(8))


def as_matrix(function, shape):
    """The matrix of a linear map of inputs of this shape, without the example's axis."""
    with torch.no_grad():
        return function(torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)).flatten(1).T


def stretch_of(pool, shape, seed):
    """The largest factor by which a pool stretches distances: exact for means, seen on random pairs for maxima."""
    if "Avg" in type(pool).__name__:
        return torch.linalg.matrix_norm(as_matrix(pool, shape), 2).item()
    x, y = normal(2, 60, *shape, seed=seed)
    one = torch.zeros_like(x).flatten(1).scatter_(1, normal(60, math.prod(shape), seed=seed).argmax(1)[:, None], 9.0)
    y = torch.cat([y[:30], (x + one.view_as(x))[30:]])  # half of the pairs differ at one pixel
    return ((pool(x) - pool(y)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)).max().item()


def each_pool(draw):
    """Random settings of pools of one or two axes, most of which torch accepts, on inputs of up to 7 pixels."""
    ndim, kind = draw.choice((1, 2)), draw.choice(("Max", "Avg"))
    kernel = tuple(draw.randint(1, 4) for _ in range(ndim))
    stride = draw.choice((None, draw.randint(1, 4), tuple(draw.randint(1, 4) for _ in range(ndim))))
    options = {"padding": tuple(draw.randint(0, k // 2) for k in kernel), "ceil_mode": draw.random() < 0.5}
    if kind == "Max":
        options["dilation"] = draw.choice((1, 1, 2))
    else:
        options["count_include_pad"] = draw.random() < 0.5
    if kind == "Avg" and ndim == 2 and draw.random() < 0.6:
        options["divisor_override"] = draw.choice((-4, -1, 1, 2, 3, 4, 9))
    pool = getattr(nn, f"{kind}Pool{ndim}d")(kernel if draw.random() < 0.7 else kernel[0], stride, **options)
    return pool, (2, *(draw.randint(1, 7) for _ in range(ndim)))


def test_every_pool_that_passes_as_a_contraction_is_one():
    draw, accepted, rejected = random.Random(0), 0, 0
    for trial in range(1500):
        pool, shape = each_pool(draw)
        try:
            norm = stretch_of(pool, shape, trial)
        except RuntimeError:
            continue  # settings that torch refuses
        if is_contraction(pool):
            accepted += 1
            assert norm <= 1 + exact64 and not pool(torch.zeros(1, *shape)).any(), (pool, shape, norm)
        else:
            rejected += norm > 1 + exact64  # NaN where torch's window sees no pixel
    assert accepted > 300 and rejected > 200


class Doubled(nn.ReLU):
    def forward(self, x):
        return 2 * super().forward(x)


CONTRACTIONS = [nn.ReLU(), nn.ReLU(inplace=True), nn.Tanh(), nn.LeakyReLU(-1.0), nn.LeakyReLU(0.3), nn.Identity(),
                nn.Dropout(0.5).eval(), nn.Flatten(), nn.Flatten(1, 2), nn.Flatten(2), nn.MaxPool2d((2,), (3, 2)),
                nn.AvgPool2d(2, divisor_override=2), nn.AvgPool2d((1, 3), divisor_override=-2)]


STRETCHING = [nn.LeakyReLU(1.1), nn.LeakyReLU(-1.1), nn.LeakyReLU(math.nan), nn.Dropout(0.5), Doubled(), nn.Flatten(0),
              nn.Sigmoid(), nn.Softplus(), nn.ELU(2.0), nn.AvgPool2d(2, divisor_override=1), nn.MaxPool2d(2, 1),
              nn.MaxPool2d(2, 2, dilation=2), nn.AvgPool2d((3, 1), divisor_override=1), nn.PixelShuffle(1),
              nn.MaxPool2d(2, return_indices=True), nn.Dropout2d(0.5), nn.LPPool2d(2, 2)]


def test_layers_that_stretch_are_not_contractions():
    assert all(is_contraction(layer) for layer in CONTRACTIONS)
    assert not any(is_contraction(layer) for layer in STRETCHING)
    x, y = normal(2, 40, 2, 4, 6, seed=1) * torch.logspace(-2, 1, 40, dtype=torch.float64)[:, None, None, None]
    for layer in CONTRACTIONS:
        there, gap = (layer(z.clone()) for z in (x, y)), (x - y).flatten(1).norm(dim=1)
        at_most((next(there) - next(there)).flatten(1).norm(dim=1), gap)


def each_convolution(draw):
    ndim, mode = draw.choice((1, 2)), draw.choice(("zeros", "circular"))
    size = tuple(draw.randint(1, 5) for _ in range(ndim))
    numbers = [tuple(draw.randint(1, 3) for _ in range(ndim)) for _ in range(3)]
    padding = draw.choice(("same", "valid", tuple(draw.randint(0, n) for n in size)))
    stride = 1 if padding == "same" else numbers[1]
    groups = draw.choice((1, 2))
    layer = getattr(nn, f"Conv{ndim}d")(2, 2, numbers[0], stride, padding, numbers[2], groups, False, mode)
    return layer.double(), (2, *size)


def unit_taps(layer, shape):
    """The exact number of times that each pixel is read: the sum over outputs of the squares of taps of size one."""
    count = 0
    for tap in range(math.prod(layer.kernel_size)):
        one = copy.deepcopy(layer)
        one.weight.data.zero_()
        one.weight.data.flatten(2)[:, :, tap] = 1.0
        count = count + as_matrix(one, shape).square().sum(0) / (2 // layer.groups)
    return count.max().item()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch on its own speed
def test_kappa_is_the_root_of_the_largest_number_of_reads_and_covers_the_norm():
    """Against the map written out as a matrix: reads counted tap by tap, and the spectral norm of random weights."""
    draw, around, tight = random.Random(1), 0, 0.0
    for _ in range(400):
        layer, shape = each_convolution(draw)
        try:
            kappa = stretch(layer, (1, *shape))
            norm = torch.linalg.matrix_norm(as_matrix(layer, shape), 2).item()
        except RuntimeError:
            continue  # a window larger than the padded image, or padding that goes round more than once
        assert_close(kappa**2, unit_taps(layer, shape), 1e-9)
        at_most(norm, kappa * layer.weight.detach().norm())
        around += kappa**2 > math.prod(layer.kernel_size) + 0.5
        tight = max(tight, norm / max(1e-9, kappa * layer.weight.detach().norm().item()))  # 0 where no pixel is read
    assert around > 10 and tight > 0.99


@pytest.mark.parametrize("first, flat, reads", [
    (nn.Conv2d(1, 1, 1, padding=4, padding_mode="circular", bias=False), 144, 9),  # round three times along each axis
    (nn.Conv2d(1, 1, 3, padding=3, padding_mode="circular", bias=False), 64, 36),  # 18 reads of 4 pixels: at most 6
    (nn.Conv2d(1, 1, 2, stride=2, bias=False), 4, 1),  # four taps, each on pixels of its own
    (nn.Conv2d(1, 1, 1, padding=1, bias=False), 36, 1),
])
def test_the_bound_of_a_network_counts_reads(first, flat, reads):
    torch.manual_seed(0)
    plain = nn.Sequential(first, nn.Flatten(), nn.Linear(flat, 3, bias=False)).double()
    action, x = network_action(plain, field(half_turns(), (1, 4, 4))), normal(5, 1, 4, 4, seed=1)
    network = with_posteriors(plain, scale=0.3)
    posts = {name: t.posterior for name, t in variational_tensors(network).items()}
    r = {n: math.sqrt(q.mean.square().sum().item() + 0.09 * q.numel) for n, q in posts.items()}
    w = {n: (action.parameters[n].act(1, q.mean) - q.mean).norm().item() for n, q in posts.items()}
    slope = math.sqrt(reads) * (r["2.weight"] * w["0.weight"] + w["2.weight"] * r["0.weight"])
    assert_close(through_lipschitz(network, action, x)[:, 1], slope * x.flatten(1).norm(dim=1) / math.sqrt(8))


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(9, 3))

    def forward(self, x):
        return self.inner(x)


def test_lipschitz_refuses_what_it_does_not_know():
    head = nn.Flatten(), nn.Linear(9, 3)
    cases = [
        (Wrapped(), "a Wrapped"),
        (nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), *head), "layer '0', a Conv2d"),
        (nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Sigmoid(), *head), "layer '1', a Sigmoid"),
        (nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.MaxPool2d(3, 1, 1), *head), "layer '1', a MaxPool2d"),
        (nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.LeakyReLU(2.0), *head), "layer '1', a LeakyReLU"),
        (nn.Sequential(nn.Conv2d(1, 1, 3, padding=2), nn.AvgPool2d(5, 1, divisor_override=1), nn.Flatten(),
                       nn.Linear(1, 3)), "layer '1', a AvgPool2d"),
        (nn.Sequential(*head, nn.ReLU()), "as the last layer"),
    ]
    x = torch.randn(2, 1, 3, 3)
    for plain, words in cases:
        network, action = with_posteriors(plain), network_action(plain, field(rotations(), (1, 3, 3)))
        with pytest.raises(Refusal, match=rf"Lipschitz constants.*{words}.*Fix: hellinger\(push_forward_divergences"):
            through_lipschitz(network, action, x)
        assert hellinger(push_forward_divergences(network, action).log_affinity).shape == (4,)  # what is advised
        P = orbit_predictions(network, x, action, 2).probabilities
        assert "Lipschitz, Wasserstein" not in {bound.name for bound in ledger(network, action, P, inputs=None).bounds}
    frozen = nn.Sequential(nn.Flatten(), nn.Linear(9, 3), nn.ReLU(), nn.Linear(3, 3))
    frozen[1].requires_grad_(False)
    with pytest.raises(Refusal, match="layer '1', a Linear"):
        through_lipschitz(with_posteriors(frozen), network_action(frozen, field(rotations(), (1, 3, 3))), x)
    once = nn.Linear(9, 9)
    twice, action = nn.Sequential(nn.Flatten(), once, nn.ReLU(), once), network_action(
        nn.Sequential(nn.Flatten(), nn.Linear(9, 9)), field(rotations(), (1, 3, 3)))
    with pytest.raises(Refusal, match="used twice"):
        through_lipschitz(with_posteriors(twice), action, x)
    plain = nn.Sequential(*head)
    network, action = with_posteriors(plain), network_action(plain, field(rotations(), (1, 3, 3)))
    with pytest.raises(Refusal, match=r"\(N, 1, 3, 3\).*Fix: inputs\[None\]"):
        through_lipschitz(network, action, x[0])
    with pytest.raises(Refusal, match=r"reshape\(-1, \*\(1, 3, 3\)\)"):
        through_lipschitz(network, action, x.flatten(1))
    with pytest.raises(Refusal, match="NaN or infinity in 1 of 2 inputs"):
        through_lipschitz(network, action, torch.stack([x[0], x[1] / 0]))
    x[1, 0, 0, 0] = torch.nan
    assert through_lipschitz(network, action, x[x.isfinite().flatten(1).all(1)]).shape == (1, 4)  # what is advised
