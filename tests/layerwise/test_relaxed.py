"""Paths against the layers they are derived from, equivariance, sub-sampling, lifting, counts, variational twins."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from symbnn.errors import Refusal
from symbnn.layerwise.paths import (
    CHANNELS,
    STRIDES,
    FactoredPath,
    Lift,
    MaximumOfCopies,
    PerCopy,
    Relaxed,
    SparseConvolution,
    Subsample,
    TiedPath,
    anchor_basis,
    anchors,
    convolution_path,
    dense_path,
    matrix_of,
    path_kinds,
    pathways,
    relaxed_layer,
    relaxed_network,
)
from symbnn.posterior.independent import Laplace
from symbnn.posterior.layers import posterior_mean_network, variational_tensors, with_posteriors
from symbnn.posterior.sampling import apply_weights, forward, mean_weights, sample_weights
from symbnn.symmetry.actions import Action, regular_channels, sign_change
from symbnn.symmetry.fields import field, rotations, rotations_and_flips, shifts, translations
from symbnn.symmetry.groups import Cyclic
from symbnn.symmetry.orbits import Orbits
from tolerances import assert_close, exact32, exact64

KINDS = ("FC", "CONV", "FC+CONV", "F-FC", "F-FC+CONV", "S-FC", "S-CONV", "S-FC+S-CONV")
LIFTED = ("C4-CONV", "C4-CONV+CONV+F-FC", "D4-CONV+S-FC")
each_kind = pytest.mark.parametrize("kind", KINDS + LIFTED)
double = {"dtype": torch.float64}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def small(kind, seed=0, dtype=torch.float64):
    """Two layers on 8 x 8 pixels, with every weight and bias drawn, so that no zero hides anything."""
    network = relaxed_network(kind, (2, 8, 8), 3, (3, 4), (1, 2), generator=seeded(seed), dtype=dtype)
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter.copy_(0.3 * normal(*parameter.shape, seed=100 + i))
    return network


def randomised(path):
    with torch.no_grad():
        for i, parameter in enumerate(path.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=50 + i))
    return path


# Counts


@pytest.mark.parametrize(
    ("kind", "total"),
    [("FC", 133_635_690), ("CONV", 338_770), ("FC+CONV", 133_865_010), ("F-FC", 1_542_625), ("F-FC+CONV", 1_771_945),
     ("S-FC", 831_820), ("S-CONV", 287_910), ("S-FC+S-CONV", 933_990)],
)
def test_totals_of_the_source(kind, total):
    network = relaxed_network(kind, (3, 32, 32), 10, device="meta")
    assert sum(parameter.numel() for parameter in network.parameters()) == total
    assert network(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)


def test_channels_and_strides_of_the_source():
    assert CHANNELS == tuple(10 * times for times in (1, 2, 2, 4, 4, 8, 8, 16))
    assert STRIDES == (1, 2, 1, 2, 1, 2, 2, 2)


# Each path against the layer that it is


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, exact64), (torch.float32, exact32)])
def test_dense_path_is_the_formula(dtype, tolerance):
    path = dense_path(2, 3, (2, 3), (1, 2), generator=seeded(), dtype=dtype)
    with torch.no_grad():
        path.dense.bias.copy_(normal(6))
    x, W, b = normal(4, 2, 2, 3, dtype=dtype), path.dense.weight.view(3, 2, 2, 6), path.dense.bias.view(3, 2)
    assert_close(path(x).flatten(2), torch.einsum("aycx,bcx->bay", W, x.flatten(2)) + b, tolerance)
    assert_close(matrix_of(path, (2, 2, 3)).flatten(), W.flatten(), tolerance)


def test_matrix_of_leaves_out_the_bias_and_keeps_the_order_of_axes():
    path = randomised(convolution_path(2, 3, **double))
    matrix = matrix_of(path, (2, 3, 4))
    assert matrix.shape == (3, 3, 4, 2, 3, 4)
    x = normal(5, 2, 3, 4)
    expected = torch.einsum("aijcxy,bcxy->baij", matrix, x) + path.filter.bias[:, None, None]
    assert_close(path(x), expected)


def test_matrix_of_a_map_without_weights():
    expected = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).view(1, 2, 1, 2)
    assert torch.equal(matrix_of(nn.Sequential(nn.Identity()), (2,)), torch.eye(2))
    assert_close(matrix_of(Flip(), (1, 2)), expected)


def test_convolution_pads_explicitly_and_circularly():
    path = randomised(convolution_path(2, 3, **double))
    wrapped = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", **double)
    wrapped.load_state_dict(path.filter.state_dict())
    x = normal(4, 2, 5, 6)
    assert_close(path(x), wrapped(x))


@each_kind
def test_no_convolution_of_a_network_pads(kind):
    convolutions = [module for module in small(kind).modules() if isinstance(module, nn.Conv2d)]
    assert convolutions or kind == "FC"
    for module in convolutions:
        assert (module.padding, module.padding_mode, module.stride) == ((0, 0), "zeros", (1, 1))


def factored(path):
    """The tensors of a factored path with the indices of the formula: U[a,c,x], V[a,c,y]."""
    out, channels = path.channels
    U = path.u.weight.view(channels, out, -1).transpose(0, 1)
    V = path.v.weight.view(out, -1, channels).transpose(1, 2)
    return U, V


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, exact64), (torch.float32, exact32)])
def test_factored_path_is_the_dense_layer_of_its_factors(dtype, tolerance):
    path = randomised(FactoredPath(2, 3, (2, 3), (1, 4), generator=seeded(), dtype=dtype))
    U, V = factored(path)
    dense = dense_path(2, 3, (2, 3), (1, 4), dtype=dtype)
    with torch.no_grad():
        dense.dense.weight.copy_(torch.einsum("acx,acy->aycx", U, V).reshape(12, 12))
        shared = torch.einsum("acy,a->ay", V, path.u_bias.weight[:, 0]) + path.v_bias.weight[:, 0]
        dense.dense.bias.copy_(shared.flatten())
    x = normal(5, 2, 2, 3, dtype=dtype)
    assert path(x).shape == (5, 3, 1, 4)
    assert_close(path(x), dense(x), tolerance)
    assert_close(matrix_of(path, (2, 2, 3)).reshape(3, 4, 2, 6), torch.einsum("acx,acy->aycx", U, V), tolerance)


def test_sparse_factored_path_has_the_factors_of_its_bases():
    size_in, size_out = (4, 3), (2, 3)
    bases = [anchor_basis(size, anchors(size, math.prod(size) // 2)) for size in (size_in, size_out)]
    path = randomised(FactoredPath(2, 3, size_in, size_out, *bases, generator=seeded(), **double))
    assert path.v_bias is None
    Ut, Vt = factored(path)
    U, V = Ut @ bases[0], Vt @ bases[1]
    x = normal(5, 2, *size_in)
    z = torch.einsum("acx,bcx->bac", U, x.flatten(2)) + path.u_bias.weight
    assert_close(path(x).flatten(2), torch.einsum("acy,bac->bay", V, z))


def test_sparse_convolution_is_the_convolution_with_interpolated_filters():
    basis = anchor_basis((3, 3), anchors((3, 3), 7))
    path = randomised(SparseConvolution(2, 3, basis, generator=seeded(), **double))
    filters = (path.mix.weight.view(3, 2, 7) @ basis).view(3, 2, 3, 3)
    x = normal(5, 2, 4, 6)
    assert_close(path(x), F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), filters, path.mix.bias))


# Bases


@pytest.mark.parametrize(("size", "count"), [((3, 3), 7), ((4, 6), 12), ((2, 2), 2), ((1, 1), 1), ((5,), 3)])
def test_anchor_basis_is_the_formula(size, count):
    points = anchors(size, count)
    grid = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij"), -1)
    grid = grid.reshape(-1, len(size)) - (torch.tensor(size) - 1) / 2
    assert points.shape == (count, len(size))
    assert (points.abs() <= grid.amax(0)).all()
    K = torch.tensor([[math.exp(-float((a - b) @ (a - b)) / 2) for b in grid] for a in points], dtype=torch.float64)
    KZZ = torch.tensor([[math.exp(-float((a - b) @ (a - b)) / 2) for b in points] for a in points], dtype=torch.float64)
    # (K_ZZ + s^2) Phi = K_ZT, not its inverse: the system is as badly conditioned as two anchors are close
    assert_close((KZZ + 1e-4 * torch.eye(count, dtype=torch.float64)) @ anchor_basis(size, points), K)
    assert torch.equal(anchors(size, count), points)
    assert size == (1, 1) or not torch.equal(anchors(size, count, seed=1), points)


def test_frequency_and_noise_enter_the_basis():
    points = torch.tensor([[0.5, -0.25]], dtype=torch.float64)
    square = (torch.tensor([-0.5, 0.5], dtype=torch.float64) + 0.25).square()
    expected = (-4 * (0.25 + square) / 2).exp() / (1 + 0.09)
    assert_close(anchor_basis((1, 2), points, frequency=2.0, noise=0.3), expected[None])


def test_anchors_fill_their_box():
    points = anchors((5, 9), 4000)
    half = torch.tensor([2.0, 4.0], dtype=torch.float64)
    standard_error = half / 3**0.5 / 4000**0.5
    assert (points.mean(0).abs() < 4 * standard_error).all()
    assert (points.abs().amax(0) > 0.995 * half).all()


def test_bases_are_buffers_of_the_network_s_type():
    for dtype in (torch.float32, torch.float64):
        network = relaxed_network("S-FC+S-CONV", (1, 8, 8), 3, (2, 2), (1, 2), dtype=dtype)
        bases = {name: value for name, value in network.named_buffers()}
        shapes = {name: tuple(value.shape) for name, value in bases.items()}
        assert shapes == {
            "layer1.s_conv.basis": (4, 9), "layer2.s_conv.basis": (4, 9), "layer1.s_fc.basis_in": (32, 64),
            "layer1.s_fc.basis_out": (32, 64), "layer2.s_fc.basis_in": (32, 64), "layer2.s_fc.basis_out": (8, 16)}
        assert {value.dtype for value in bases.values()} == {dtype}
        assert bases.keys() <= network.state_dict().keys()
    alone = relaxed_network("S-CONV", (1, 8, 8), 3, (2,), (1,))
    assert alone.layer1.s_conv.basis.shape == (7, 9)


# Initial weights


def test_factors_start_uniformly():
    path = FactoredPath(20, 30, (5, 5), (6, 6), generator=seeded(), **double)
    for weight, variance in [(path.u.weight, 1 / 25), (path.v.weight, 1 / 20)]:
        bound = (3 * variance) ** 0.5
        assert 0.999 * bound < weight.abs().max() <= bound
        # the variance of the square of a uniform number is 4/5 of its variance squared
        assert abs(weight.square().mean() / variance - 1) < 4 * (0.8 / weight.numel()) ** 0.5
    assert not path.u_bias.weight.any()
    assert not path.v_bias.weight.any()


@pytest.mark.parametrize("kind", ["FC", "CONV"])
def test_dense_and_convolution_start_with_twice_the_variance_over_the_fan_in(kind):
    layer = relaxed_layer(kind, 20, 24, (4, 4), generator=seeded(), **double)
    weight, bias = layer.parameters()
    fan_in = weight[0].numel()
    assert abs(weight.square().mean() * fan_in / 2 - 1) < 4 * (0.8 / weight.numel()) ** 0.5
    assert not bias.any()


def test_the_head_starts_with_the_variance_of_its_activations():
    network = relaxed_network("CONV", (1, 2, 2), 40, (30,), (1,), generator=seeded(), **double)
    for layer, gain in [(network.hidden, 2), (network.head, 1)]:
        weight = layer.weight
        assert abs(weight.square().mean() * weight.shape[1] / gain - 1) < 4 * (0.8 / weight.numel()) ** 0.5
        assert not layer.bias.any()


def test_sparse_forms_start_as_the_least_squares_fit_to_a_dense_start():
    basis_in, basis_out = (anchor_basis(size, anchors(size, 4)) for size in ((3, 3), (2, 4)))
    sparse = FactoredPath(2, 3, (3, 3), (2, 4), basis_in, basis_out, generator=seeded(), **double)
    dense_u = torch.empty(6, 9, **double).uniform_(-(3 / 9) ** 0.5, (3 / 9) ** 0.5, generator=(generator := seeded()))
    dense_v = torch.empty(3, 2, 8, **double).uniform_(-(3 / 2) ** 0.5, (3 / 2) ** 0.5, generator=generator)
    found_v = factored(sparse)[1]
    for found, basis, dense in [(sparse.u.weight.view(6, 4), basis_in, dense_u), (found_v, basis_out, dense_v)]:
        assert_close((found @ basis - dense) @ basis.mT, torch.zeros_like(found), 1e3 * exact64)  # normal equations
    convolution = SparseConvolution(2, 3, basis_in, generator=seeded(), **double)
    dense = torch.empty(3, 2, 9, **double).uniform_(-(6 / 18) ** 0.5, (6 / 18) ** 0.5, generator=seeded())
    gap = (convolution.mix.weight.view(3, 2, 4) @ basis_in - dense) @ basis_in.mT
    assert_close(gap, torch.zeros_like(gap), 1e3 * exact64)


@each_kind
def test_a_seed_gives_one_network_and_uses_nobody_s_numbers(kind):
    def make(seed):
        return relaxed_network(kind, (1, 4, 4), 3, (2, 3), (1, 2), generator=seeded(seed))

    before = torch.random.get_rng_state()
    first, again, other = make(0), make(0), make(1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    different = [name for (name, a), b in zip(first.named_parameters(), other.parameters()) if not torch.equal(a, b)]
    assert different == [name for name, _ in first.named_parameters() if "bias" not in name]


# Equivariance


def test_convolutions_are_the_projections_of_dense_layers():
    size, channels = (3, 4), (2, 3)
    space = translations(*size)
    orbits = Orbits(Action.product(field(space, (channels[1], *size)), field(space, (channels[0], *size))))
    assert orbits.dimension == math.prod(channels) * math.prod(size)
    weight = matrix_of(dense_path(*channels, size, size, generator=seeded(), **double), (channels[0], *size))
    displaced = torch.stack([torch.stack([
        torch.stack([weight[:, i, j, :, (i + di) % 3, (j + dj) % 4] for i in range(3) for j in range(4)]).mean(0)
        for dj in range(4)], -1) for di in range(3)], -2)
    x = normal(5, 2, *size)
    by_torch = F.conv2d(F.pad(x, (0, 3, 0, 2), mode="circular"), displaced)
    assert_close(torch.einsum("aijcxy,bcxy->baij", orbits.project(weight), x), by_torch)
    for path in (convolution_path(*channels, generator=seeded(1), **double),
                 SparseConvolution(*channels, anchor_basis((3, 3), anchors((3, 3), 7)), generator=seeded(), **double)):
        written_out = matrix_of(path, (channels[0], *size))
        assert_close(orbits.project(written_out), written_out)


@pytest.mark.parametrize("kind", ["CONV", "S-CONV", "FC", "F-FC", "S-FC"])
def test_which_paths_commute_with_circular_shifts(kind):
    layer, x = randomised(relaxed_layer(kind, 2, 3, (6, 4), **double)), normal(3, 2, 6, 4)
    gaps = [(layer(x.roll(shift, (-2, -1))) - layer(x).roll(shift, (-2, -1))).abs().max()
            for shift in [(1, 0), (0, 1), (3, 2)]]
    if kind in ("CONV", "S-CONV"):
        assert max(gaps) < exact64 * layer(x).abs().max().clamp(min=1)
    else:
        assert min(gaps) > 0.1


@pytest.mark.parametrize("space", [translations(4, 4), rotations(), rotations_and_flips(), shifts(4)],
                         ids=["translations", "C4", "D4", "shifts"])
def test_tied_paths_are_equivariant_and_have_all_weights_that_may_be(space):
    action = space.on(4, 4)
    path = randomised(TiedPath(2, 3, action, action, **double))
    x = normal(3, 2, 4, 4)
    for g in action.group.elements():
        assert_close(path(action.act(g, x)), action.act(g, path(x)))
    characters = sum(int(action(g).matrix().trace()) ** 2 for g in action.group.elements())
    assert path.mix.in_features == 2 * characters // action.group.order
    orbits = Orbits(Action.product(action, action))
    written_out = matrix_of(path, (2, 4, 4)).movedim(3, 1)
    assert_close(orbits.expand(path.mix.weight.view(3, 2, -1)), written_out)


def test_tied_path_for_shifts_is_the_convolution():
    action = translations(3, 5).on(3, 5)
    convolution = randomised(convolution_path(2, 3, **double))
    path = TiedPath(2, 3, action, action, **double)
    orbits = Orbits(Action.product(action, action))
    with torch.no_grad():
        path.mix.weight.copy_(orbits.restrict(matrix_of(convolution, (2, 3, 5)).movedim(3, 1)).flatten(1))
        path.mix.bias.copy_(convolution.filter.bias)
    x = normal(4, 2, 3, 5)
    assert_close(path(x), convolution(x))


def test_tied_path_between_different_actions():
    source, target = rotations().on(4, 4), rotations().on(2, 2)
    path, x = randomised(TiedPath(2, 3, source, target, **double)), normal(3, 2, 4, 4)
    assert path(x).shape == (3, 3, 2, 2)
    for g in range(4):
        assert_close(path(source.act(g, x)), target.act(g, path(x)))


def test_tied_path_to_another_size_and_with_signs():
    signs, still = sign_change(3), Action.trivial(Cyclic(2), (2,))
    odd = randomised(TiedPath(2, 3, signs, sign_change(4), **double))
    x = normal(5, 2, 3)
    assert odd.mix.bias is None
    assert odd(x).shape == (5, 3, 4)
    assert_close(odd(-x), -odd(x))
    constant = randomised(TiedPath(1, 1, still, still, **double))
    assert constant.mix.in_features == 4
    assert constant.mix.bias is not None
    with pytest.raises(Refusal, match="Some map is equivariant"):
        TiedPath(1, 1, still, signs)
    with pytest.raises(Refusal, match="fits into memory"):
        TiedPath(1, 1, *[translations(32, 32).on(32, 32)] * 2)


def test_tied_path_starts_with_the_variance_of_its_fan_in():
    action = rotations().on(4, 4)  # 64 orbits of 16 x 16 pairs: as many inputs to an output as pixels, not as orbits
    weight = TiedPath(20, 30, action, action, generator=seeded(), **double).mix.weight
    assert abs(weight.square().mean() * 20 * 16 / 2 - 1) < 4 * (0.8 / weight.numel()) ** 0.5


# The mean of paths


class Flip(nn.Module):
    """Left-right."""

    def forward(self, x):
        return x.flip(-1)


class Times(nn.Module):
    """x times a number."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        return self.number * x


def test_a_relaxed_layer_is_the_mean_of_its_paths():
    x = normal(3, 2, 4, 4)
    assert_close(Relaxed({"a": Times(1)}, {})(x), x)
    assert_close(Relaxed({}, {"a": Times(5)})(x), 5 * x)
    assert_close(Relaxed({"a": Times(1)}, {"b": Times(2)})(x), 1.5 * x)
    assert_close(Relaxed({"a": Times(1), "b": Times(2)}, {"c": Times(6)})(x), 3 * x)
    free = Times(6)
    free.forward = lambda x: 6 * x[..., :2, :2]
    sampled = Relaxed({"a": Times(1), "b": Times(-3)}, {"c": free}, Subsample(2))
    assert sampled.paths == ("a", "b", "c")
    assert_close(sampled(x), (Subsample(2)(-2 * x) + 6 * x[..., :2, :2]) / 3)
    for wrong in [({}, {}), ({"a": Times(1)}, {"a": Times(2)})]:
        with pytest.raises(Refusal, match="at least one path"):
            Relaxed(*wrong)


def test_covariance_of_the_prior():
    """@prp-relaxed-prior, from the derivative of the written-out layer with respect to its weights."""
    size, d_fc, d_conv = (3, 3), 0.7, 2.5
    layer = Relaxed({"conv": convolution_path(1, 2, **double)}, {"fc": dense_path(1, 2, size, size, **double)})
    names = ["conv.filter.weight", "fc.dense.weight"]
    covariance = 0
    for name, precision in zip(names, (d_conv, d_fc)):
        weight = layer.get_parameter(name)
        columns = []
        for i in range(weight.numel()):
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.zero_()
                weight.view(-1)[i] = 1
            columns.append(matrix_of(layer, (1, *size)).detach().flatten())
        E = torch.stack(columns, 1)
        covariance = covariance + E @ E.T / precision
    space = translations(*size)
    orbits = Orbits(Action.product(field(space, (2, *size)), field(space, (1, *size))))
    expanded = orbits.expand(torch.eye(orbits.dimension, **double)).view(orbits.dimension, -1)
    assert_close(covariance, (torch.eye(162, **double) / d_fc + expanded.T @ expanded / d_conv) / 4)
    P = expanded.T @ (expanded / orbits.sizes[:, None])
    away = torch.eye(162, **double) - P
    assert_close((away @ covariance).trace(), (162 - 18) / (4 * d_fc))
    assert_close(covariance.trace(), (162 / d_fc + 18 * 9 / d_conv) / 4)


def test_pathways_names_every_weight_of_the_layers_once():
    for kind in KINDS + LIFTED:
        network = small(kind)
        found = pathways(network)
        assert list(found) == ["layer1", "layer2"]
        for layer, paths in found.items():
            assert set(paths) == {path.lower().replace("-", "_") for path in kind.split("+")}
            for path, names in paths.items():
                assert names == [f"{layer}.{path}.{name}" for name, _ in
                                 network.get_submodule(f"{layer}.{path}").named_parameters()] != []
        listed = [name for paths in found.values() for names in paths.values() for name in names]
        head = {"hidden.weight", "hidden.bias", "head.weight", "head.bias"}
        assert sorted([*listed, *head]) == sorted(name for name, _ in network.named_parameters())
        assert pathways(with_posteriors(network)) == found


def test_pathways_of_one_layer_and_of_none():
    layer = relaxed_layer("S-FC+S-CONV", 1, 1, (4, 4))
    assert pathways(layer) == {"": {"s_conv": ["s_conv.mix.weight", "s_conv.mix.bias"],
                                    "s_fc": ["s_fc.u.weight", "s_fc.u_bias.weight", "s_fc.v.weight"]}}
    other = pathways(relaxed_layer("C4-CONV+CONV", 1, 1, (4, 4)))[""]  # one name is the end of the other
    assert other["conv"] == ["conv.filter.weight", "conv.filter.bias"]
    with pytest.raises(Refusal, match="relaxed layers"):
        pathways(nn.Sequential(nn.Linear(2, 2)))


# Sub-sampling


@pytest.mark.parametrize("stride", [2, 3])
def test_subsample_takes_the_offset_with_the_largest_value(stride):
    x = normal(60, 2, 6, 12)
    y = Subsample(stride)(x)
    offsets = set()
    for image, found in zip(x, y):
        parts = {(i, j): image[:, i::stride, j::stride] for i in range(stride) for j in range(stride)}
        best = max(parts, key=lambda offset: float(parts[offset].max()))
        assert torch.equal(found, parts[best])
        offsets.add(best)
    assert len(offsets) == stride**2  # every offset was chosen by some image


def test_subsample_of_shifted_images_is_shifted():
    x = normal(6, 3, 8, 8)
    for shift in [(1, 0), (0, 3), (5, 6)]:
        for before, after in zip(Subsample(2)(x), Subsample(2)(x.roll(shift, (-2, -1)))):
            assert any(torch.equal(after, before.roll((i, j), (-2, -1))) for i in range(4) for j in range(4))


def test_subsample_leaves_and_refuses():
    x = normal(2, 1, 6, 9)
    assert Subsample(1)(x) is x
    with pytest.raises(Refusal, match="stride 2 on"):
        Subsample(2)(x)


@each_kind
def test_no_example_depends_on_another(kind):
    network, x = small(kind), normal(6, 2, 8, 8)
    alone = torch.cat([network(image[None]) for image in x])
    assert_close(network(x), alone)
    moved = x.clone()
    moved[1:] *= 100
    assert_close(network(moved)[:1], alone[:1])


@pytest.mark.parametrize("kind", ["CONV", "S-CONV", "C4-CONV", "FC+CONV", "F-FC"])
def test_invariance_of_networks_that_leave_one_pixel(kind):
    network = relaxed_network(kind, (1, 8, 8), 3, (3, 4, 5), (2, 1, 4), generator=seeded(), **double)
    x = normal(6, 1, 8, 8)
    y = network(x)
    assert y.std() > 1e-3
    gaps = [(network(x.roll(shift, (-2, -1))) - y).abs().max() for shift in [(1, 0), (0, 3), (5, 2)]]
    if kind in ("FC+CONV", "F-FC"):
        assert min(gaps) > 1e-3
    else:
        assert max(gaps) < exact64


# Lifting


@pytest.mark.parametrize("space", [rotations(), rotations_and_flips()], ids=["C4", "D4"])
def test_lifting_makes_a_permutation_of_copies(space):
    action, order = field(space, (2, 5, 5)), space.group.order
    lift, x = Lift(action), normal(3, 2, 5, 5)
    shared = randomised(PerCopy(convolution_path(2, 3, **double), order))
    mixing = randomised(convolution_path(2 * order, 3 * order, **double))
    before, after = regular_channels(space.group, 2), regular_channels(space.group, 3)
    y = shared(lift(x))
    assert torch.equal(lift(x)[:, :2], x)  # the copy of the identity
    for g in space.group.elements():
        turned = lift(action.act(g, x))
        assert torch.equal(turned, before(g)(lift(x), 1))
        assert_close(shared(turned), after(g)(y, 1))
        assert_close(MaximumOfCopies(order)(shared(turned)), MaximumOfCopies(order)(y))
        if g != space.group.identity():
            assert (mixing(turned) - after(g)(mixing(lift(x)), 1)).abs().max() > 0.1


@pytest.mark.parametrize(("kind", "space"), [("C4-CONV", rotations()), ("D4-CONV", rotations_and_flips())])
def test_networks_of_shared_convolutions_are_invariant(kind, space):
    x = normal(4, 2, 8, 8)
    action = field(space, (2, 8, 8))
    for paths, invariant in [(kind, True), (f"{kind}+CONV", False), (f"{kind}+F-FC", False)]:
        network = small(paths)
        gaps = [(network(action.act(g, x)) - network(x)).abs().max() for g in space.group.generators()]
        if invariant:
            assert max(gaps) < 100 * exact64
        else:
            assert min(gaps) > 0.01


def test_three_paths_after_lifting():
    layer = relaxed_layer("C4-CONV+CONV+F-FC", 2, 3, (4, 4), 2, **double)
    assert layer.c4_conv.inner.filter.weight.shape == (3, 2, 3, 3)
    assert layer.conv.filter.weight.shape == (12, 8, 3, 3)
    assert layer.f_fc.channels == (12, 8)
    layer = randomised(layer)
    x = normal(3, 8, 4, 4)
    total = torch.cat([layer.c4_conv.inner(x[:, 2 * i: 2 * i + 2]) for i in range(4)], 1) + layer.conv(x)
    sampled = torch.cat([Subsample(2)(total[:, 3 * i: 3 * i + 3]) for i in range(4)], 1)  # each copy by itself
    assert_close(layer(x), (sampled + layer.f_fc(x)) / 3)


def test_lifted_networks_are_copied_and_pickled():
    network, x = small("C4-CONV+CONV+F-FC"), normal(2, 2, 8, 8)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(x), network(x))


# Networks


def test_network_by_hand():
    network, x = small("F-FC+CONV"), normal(5, 2, 8, 8)
    h = x
    for layer, stride in ((network.layer1, 1), (network.layer2, 2)):
        h = ((layer.f_fc(h) + Subsample(stride)(layer.conv(h))) / 2).relu()
    h = h.mean((-2, -1))
    assert network.hidden.weight.shape == (16, 4)
    assert_close(network(x), network.head(network.hidden(h).relu()))


@each_kind
def test_every_weight_is_used(kind):
    network = small(kind)
    network(normal(16, 2, 8, 8)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@each_kind
def test_types_and_states(kind):
    network = small(kind, dtype=torch.float32)
    other = relaxed_network(kind, (2, 8, 8), 3, (3, 4), (1, 2))
    other.load_state_dict(network.state_dict())
    x = normal(4, 2, 8, 8, dtype=torch.float32)
    assert network(x).dtype == torch.float32
    assert torch.equal(other(x), network(x))
    assert_close(network(x), small(kind)(x.double()), exact32)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("fc", {}), ("", {}), ("FC+", {}), ("FC+FC", {}), ("C4-CONV+D4-CONV", {}), ("FC", {"strides": (1,)}),
     ("FC", {"strides": (1, 3)}), ("CONV", {"input_shape": (8, 8)}), ("CONV", {"channels": (), "strides": ()}),
     ("S-FC", {"strides": (4, 4)})],
    ids=str,
)
def test_refusals(kind, options):
    sound = {"input_shape": (1, 8, 8), "classes": 3, "channels": (2, 2), "strides": (1, 2)}
    relaxed_network("FC", **sound)
    with pytest.raises(Refusal):
        relaxed_network(kind, **sound | options)


def test_kinds():
    assert path_kinds("C4-CONV+CONV+F-FC") == ("C4-CONV", "CONV", "F-FC")


# Variational twins


@each_kind
def test_variational_twins(kind):
    network, x = small(kind), normal(5, 2, 8, 8)
    bayesian = with_posteriors(network, scale=0.1)
    assert list(variational_tensors(bayesian)) == [name for name, _ in network.named_parameters()]
    assert_close(apply_weights(bayesian, x, mean_weights(bayesian)), network(x)[None])
    assert torch.equal(posterior_mean_network(bayesian)(x), network(x))
    weights = sample_weights(bayesian, 3, seeded(2))
    together = apply_weights(bayesian, x, weights)
    assert together.shape == (3, 5, 3)
    plain = copy.deepcopy(network)
    for s in range(3):  # each draw, by itself, in the plain network
        plain.load_state_dict({name: weight[s] for name, weight in weights.items()}, strict=False)
        assert_close(together[s], plain(x))
    assert (together[0] - together[1]).abs().max() > 1e-3


@each_kind
@pytest.mark.parametrize(("estimator", "draws"), [("whole", 3), ("split", 1), ("flipout", 3), ("local", 1)])
def test_estimators_agree_with_the_plain_network_as_scales_vanish(kind, estimator, draws):
    network, x = small(kind), normal(5, 2, 8, 8)
    outputs = forward(with_posteriors(network, scale=1e-30), x, 3, estimator, seeded(3))
    assert outputs.shape == (draws, 5, 3)
    assert_close(outputs, network(x).expand(draws, 5, 3), 10 * exact64)


def test_twins_of_another_family_train():
    network = with_posteriors(small("F-FC+CONV"), Laplace, 0.1)
    forward(network, normal(4, 2, 8, 8), 2, "split", seeded()).square().sum().backward()
    assert all(parameter.grad.any() for parameter in network.parameters())
