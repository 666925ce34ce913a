"""Paths against the fully connected layers that they are derived from, their equivariance, bases and first weights."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers import normal, seeded
from helpers_layerwise import randomised
from symbnn.errors import Refusal
from symbnn.layerwise.paths import (
    FactoredPath,
    SparseConvolution,
    TiedPath,
    anchor_basis,
    anchors,
    convolution_path,
    dense_path,
    matrix_of,
)
from symbnn.symmetry.actions import Action, sign_change
from symbnn.symmetry.fields import field, rotations, rotations_and_flips, shifts, translations
from symbnn.symmetry.groups import Cyclic
from symbnn.symmetry.orbits import Orbits
from tolerances import assert_close, exact32, exact64

double = {"dtype": torch.float64}


def drawn(*shape, dtype=torch.float64):
    """Inputs whose seed is not that of any weights."""
    return normal(*shape, seed=1, dtype=dtype)


class Flip(nn.Module):
    """Left-right."""

    def forward(self, x):
        return x.flip(-1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, exact64), (torch.float32, exact32)])
def test_dense_path_is_the_formula(dtype, tolerance):
    path = dense_path(2, 3, (2, 3), (1, 2), generator=seeded(), dtype=dtype)
    with torch.no_grad():
        path.dense.bias.copy_(drawn(6))
    x, W, b = drawn(4, 2, 2, 3, dtype=dtype), path.dense.weight.view(3, 2, 2, 6), path.dense.bias.view(3, 2)
    assert_close(path(x).flatten(2), torch.einsum("aycx,bcx->bay", W, x.flatten(2)) + b, tolerance)
    assert_close(matrix_of(path, (2, 2, 3)).flatten(), W.flatten(), tolerance)


def test_matrix_of_leaves_out_the_bias_and_keeps_the_order_of_axes():
    path = randomised(convolution_path(2, 3, **double))
    matrix = matrix_of(path, (2, 3, 4))
    assert matrix.shape == (3, 3, 4, 2, 3, 4)
    x = drawn(5, 2, 3, 4)
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
    x = drawn(4, 2, 5, 6)
    assert_close(path(x), wrapped(x))


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
    x = drawn(5, 2, 2, 3, dtype=dtype)
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
    x = drawn(5, 2, *size_in)
    z = torch.einsum("acx,bcx->bac", U, x.flatten(2)) + path.u_bias.weight
    assert_close(path(x).flatten(2), torch.einsum("acy,bac->bay", V, z))


def test_sparse_convolution_is_the_convolution_with_interpolated_filters():
    basis = anchor_basis((3, 3), anchors((3, 3), 7))
    path = randomised(SparseConvolution(2, 3, basis, generator=seeded(), **double))
    filters = (path.mix.weight.view(3, 2, 7) @ basis).view(3, 2, 3, 3)
    x = drawn(5, 2, 4, 6)
    assert_close(path(x), F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), filters, path.mix.bias))


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


def test_factors_start_uniformly():
    path = FactoredPath(20, 30, (5, 5), (6, 6), generator=seeded(), **double)
    for weight, variance in [(path.u.weight, 1 / 25), (path.v.weight, 1 / 20)]:
        bound = (3 * variance) ** 0.5
        assert 0.999 * bound < weight.abs().max() <= bound
        # the variance of the square of a uniform number is 4/5 of its variance squared
        assert abs(weight.square().mean() / variance - 1) < 4 * (0.8 / weight.numel()) ** 0.5
    assert not path.u_bias.weight.any()
    assert not path.v_bias.weight.any()


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


def test_convolutions_are_the_projections_of_dense_layers():
    size, channels = (3, 4), (2, 3)
    space = translations(*size)
    orbits = Orbits(Action.product(field(space, (channels[1], *size)), field(space, (channels[0], *size))))
    assert orbits.dimension == math.prod(channels) * math.prod(size)
    weight = matrix_of(dense_path(*channels, size, size, generator=seeded(), **double), (channels[0], *size))
    displaced = torch.stack([torch.stack([
        torch.stack([weight[:, i, j, :, (i + di) % 3, (j + dj) % 4] for i in range(3) for j in range(4)]).mean(0)
        for dj in range(4)], -1) for di in range(3)], -2)
    x = drawn(5, 2, *size)
    by_torch = F.conv2d(F.pad(x, (0, 3, 0, 2), mode="circular"), displaced)
    assert_close(torch.einsum("aijcxy,bcxy->baij", orbits.project(weight), x), by_torch)
    for path in (convolution_path(*channels, generator=seeded(1), **double),
                 SparseConvolution(*channels, anchor_basis((3, 3), anchors((3, 3), 7)), generator=seeded(), **double)):
        written_out = matrix_of(path, (channels[0], *size))
        assert_close(orbits.project(written_out), written_out)


@pytest.mark.parametrize("space", [translations(4, 4), rotations(), rotations_and_flips(), shifts(4)],
                         ids=["translations", "C4", "D4", "shifts"])
def test_tied_paths_are_equivariant_and_have_all_weights_that_may_be(space):
    action = space.on(4, 4)
    path = randomised(TiedPath(2, 3, action, action, **double))
    x = drawn(3, 2, 4, 4)
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
    x = drawn(4, 2, 3, 5)
    assert_close(path(x), convolution(x))


def test_tied_path_between_different_actions():
    source, target = rotations().on(4, 4), rotations().on(2, 2)
    path, x = randomised(TiedPath(2, 3, source, target, **double)), drawn(3, 2, 4, 4)
    assert path(x).shape == (3, 3, 2, 2)
    for g in range(4):
        assert_close(path(source.act(g, x)), target.act(g, path(x)))


def test_tied_path_to_another_size_and_with_signs():
    signs, still = sign_change(3), Action.trivial(Cyclic(2), (2,))
    odd = randomised(TiedPath(2, 3, signs, sign_change(4), **double))
    x = drawn(5, 2, 3)
    assert odd.mix.bias is None
    assert odd(x).shape == (5, 3, 4)
    assert_close(odd(-x), -odd(x))
    constant = randomised(TiedPath(1, 1, still, still, **double))
    assert constant.mix.in_features == 4
    assert constant.mix.bias is not None
    with pytest.raises(Refusal, match="commutes with both actions"):
        TiedPath(1, 1, still, signs)
    with pytest.raises(Refusal, match="basis of at most"):
        TiedPath(1, 1, *[translations(32, 32).on(32, 32)] * 2)


def test_tied_path_starts_with_the_variance_of_its_fan_in():
    action = rotations().on(4, 4)  # 64 orbits of 16 x 16 pairs: as many inputs to an output as pixels, not as orbits
    weight = TiedPath(20, 30, action, action, generator=seeded(), **double).mix.weight
    assert abs(weight.square().mean() * 20 * 16 / 2 - 1) < 4 * (0.8 / weight.numel()) ** 0.5
