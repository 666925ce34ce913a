"""The fit of one Gaussian to two modes: its divergence against grids, and the minima that descents find."""
import itertools
import math

import pytest
import torch

from helpers_hidden_units import double
from symbnn.hidden_units.unimodal import mixture_kl
from tolerances import assert_close, exact32


def descend(distance, coordinates, start):
    location, log_scale = double(start[0]).requires_grad_(), double(math.log(start[1])).requires_grad_()
    optimizer = torch.optim.LBFGS([location, log_scale], max_iter=300, tolerance_grad=1e-11, tolerance_change=1e-15,
                                  line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = mixture_kl(location, log_scale.exp(), distance, coordinates).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return abs(location.item()), log_scale.exp().item(), loss().item()


@pytest.mark.parametrize(
    "location, scale, distance, dimension", [(0.4, 0.8, 3.0, 1), (-1.2, 1.3, 5.0, 1), (0.5, 1.1, 4.0, 2)]
)
def test_mixture_kl_against_a_grid(location, scale, distance, dimension):
    """KL of a product Gaussian and the mixture along (1, ..., 1) / sqrt k, summed on a grid of the plane or line."""
    axis = torch.linspace(-12, 12, 961, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(*[axis] * dimension, indexing="ij"), -1)
    u = torch.full((dimension,), dimension**-0.5, dtype=torch.float64)

    def log_normal(mean, deviation):
        return torch.distributions.Normal(mean, deviation).log_prob(points).sum(-1)

    q = log_normal(location * u, scale)
    p = torch.logaddexp(log_normal(-distance / 2 * u, 1.0), log_normal(distance / 2 * u, 1.0)) - math.log(2)
    expected = (q.exp() * (q - p)).sum() * (axis[1] - axis[0]) ** dimension
    found = mixture_kl(torch.tensor(location, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64), distance,
                       dimension)
    assert_close(found, expected)


def test_mixture_kl_in_closed_cases():
    one = double(1.0)
    assert_close(mixture_kl(double(0.0), one, 0.0), [0.0])
    assert_close(mixture_kl(double(0.3), double(1.4), 0.0, 5), [0.045 + 5 * ((1.96 - 1) / 2 - math.log(1.4))])
    assert_close(mixture_kl(double(15.0), one, 30.0), [math.log(2)])
    grid = mixture_kl(double(0.0, 1.0)[:, None], double(1.0, 2.0, 3.0), double(1.0, 2.0, 3.0))
    assert grid.shape == (2, 3)
    assert_close(grid[1, 2], mixture_kl(double(1.0), double(3.0), 3.0)[0])


@pytest.mark.parametrize("distance", [3.0, 4.75, 5.0, 5.5, 5.7, 8.0, 12.0])
def test_fits_of_two_modes_with_one_coordinate(distance):
    """Whatever the start, one of two minima; the centre at every distance; the other from 4.82 and better from 5.60."""
    locations, scales = (0.0, 0.8, distance / 3, distance / 2, distance), (0.5, 1.0, 2.0, distance / 2)
    found = [descend(distance, 1, start) for start in itertools.product(locations, scales)]
    middle = [fit for fit in found if fit[0] < 1e-4]
    mode = [fit for fit in found if fit[0] > 0.3 * distance]
    assert middle and len(middle) + len(mode) == len(found)
    for group in (middle, mode):
        assert all(abs(fit[2] - group[0][2]) < 1e-8 for fit in group)
    assert bool(mode) == (distance > 4.82)
    if mode:
        assert (mode[0][2] < middle[0][2]) == (distance > 5.6)


@pytest.mark.parametrize("coordinates, threshold", [(2, 3.74), (4, 3.21), (64, 2.94)])
def test_several_coordinates_have_one_threshold(coordinates, threshold):
    for distance in (threshold - 0.04, threshold + 0.04):
        starts = itertools.product((0.05, distance / 2), (0.8, 1.5))
        found = [descend(distance, coordinates, start) for start in starts]
        assert all((fit[0] > 0.1) == (distance > threshold) for fit in found)


def test_float32_and_float64_agree():
    assert_close(mixture_kl(torch.tensor(0.5), torch.tensor(1.2), 3.0),
                 mixture_kl(double(0.5), double(1.2), 3.0)[0], exact32)
