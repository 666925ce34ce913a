"""Permutations of hidden units: unit vectors, nearest modes against enumeration, bounds, alignment, paths."""
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from helpers import seeded
from helpers_hidden_units import double, perceptron, residual, weights_of
from symbnn.errors import Refusal
from symbnn.hidden_units.modes import (
    align,
    barrier,
    closest_pair,
    interpolate,
    mode_distance,
    nearest_mode,
    packing_distance,
    proximity_bound,
    units,
)
from symbnn.symmetry.fields import field, rotations
from symbnn.symmetry.networks import intertwining_error, network_action, unit_permutations
from tolerances import assert_close, exact32, exact64


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(16, 5)
    ).double()


NETWORKS = {
    "one layer": (lambda: perceptron(5, 6, 3), (5,)),
    "three layers": (lambda: perceptron(5, 3, 4, 2, 3), (5,)),
    "CNN": (convolutional, (1, 6, 6)),
    "residual": (residual, (1, 6, 6)),
}
each_network = pytest.mark.parametrize("name", NETWORKS)


def prepared(name):
    build, shape = NETWORKS[name]
    network = build()
    return network, unit_permutations(network, shape), weights_of(network)


def norm_of(weights):
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in weights.values()))


@each_network
def test_function_is_unchanged_by_the_nearest_mode_and_by_random_elements(name):
    network, action, weights = prepared(name)
    x = torch.randn(5, *NETWORKS[name][1], generator=seeded(1), dtype=torch.float64)
    elements = [nearest_mode(weights, action).element, *action.group.sample(5, seeded(2))]
    assert intertwining_error(network, action, x, elements) < exact64
    moved = action.act(elements[0], weights)
    assert any(not torch.equal(moved[key], weights[key]) for key in weights)


def test_units_of_a_perceptron_by_hand():
    _network, action, weights = prepared("three layers")
    u = units(weights, action, "2")  # four units, read three and are read by two
    incoming, outgoing = weights["2.weight"], weights["4.weight"].T
    expected = torch.cat([incoming, weights["2.bias"][:, None], outgoing], 1)
    assert_close(u.sort(1).values, expected.sort(1).values, 0)
    assert u.shape == (4, 3 + 1 + 2)


def test_units_of_kernels_and_of_columns_behind_a_flatten():
    _network, action, weights = prepared("CNN")
    second = units(weights, action, "3")
    parts = [weights["3.weight"].flatten(1), weights["5.weight"].view(5, 4, 4).transpose(0, 1).flatten(1)]
    assert_close(second.sort(1).values, torch.cat(parts, 1).sort(1).values, 0)
    first = units(weights, action, "0")
    parts = [weights["0.weight"].flatten(1), weights["3.weight"].transpose(0, 1).flatten(1)]
    parts += [weights[key][:, None] for key in ("0.bias", "1.weight", "1.bias")]
    assert_close(first.sort(1).values, torch.cat(parts, 1).sort(1).values, 0)


def test_units_of_tied_channels():
    _network, action, weights = prepared("residual")
    u = units(weights, action, "stem")
    read = [weights[key].transpose(0, 1).flatten(1) for key in ("first.weight", "third.weight", "head.weight")]
    written = [weights[key].flatten(1) for key in ("stem.weight", "second.weight", "fourth.weight")]
    vectors = [weights[key][:, None] for key in ("stem.bias", "norm.weight", "norm.bias", "second.bias", "fourth.bias")]
    assert_close(u.sort(1).values, torch.cat([*read, *written, *vectors], 1).sort(1).values, 0)


@each_network
def test_units_move_as_a_list(name):
    """units(rho(g) theta)[g[j]] = units(theta)[j], where the group moves this class alone; also for two units."""
    _network, action, weights = prepared(name)
    hidden = [key for key in action.channels if key not in ("input", "output")]
    for place, key in enumerate(hidden):
        g = list(action.group.identity())
        g[place] = action.group.groups[place].sample(1, seeded(3))[0]
        moved = units(action.act(tuple(g), weights), action, key)
        assert_close(moved[list(g[place])], units(weights, action, key), 0)


def test_units_of_draws():
    _network, action, weights = prepared("CNN")
    draws = {key: torch.stack([tensor, 2 * tensor, tensor + 1]) for key, tensor in weights.items()}
    stacked = units(draws, action, "3")
    assert stacked.shape == (3, *units(weights, action, "3").shape)
    assert_close(stacked[1], 2 * units(weights, action, "3"), 0)
    assert_close(stacked[2], 1 + units(weights, action, "3"), 0)


def test_units_with_running_statistics_and_counters():
    network, action, weights = prepared("residual")
    buffers = {key: tensor for key, tensor in network.named_buffers() if key in action.parameters}
    assert buffers["norm.num_batches_tracked"].shape == ()  # it belongs to no unit
    u = units({**weights, **buffers}, action, "stem")
    assert u.shape[1] == units(weights, action, "stem").shape[1] + 2
    drawn = {key: torch.stack([tensor, tensor]) for key, tensor in {**weights, **buffers}.items()}
    assert_close(units(drawn, action, "stem"), torch.stack([u, u]), 0)


@pytest.mark.parametrize("n", range(2, 7))
@pytest.mark.parametrize("seed", range(3))
def test_nearest_mode_against_all_permutations(n, seed):
    network = perceptron(2, n, 1, seed=seed)
    action, weights = unit_permutations(network, (2,)), weights_of(network)
    found = nearest_mode(weights, action)
    others = [g for g in action.group.elements() if g != action.group.identity()]
    distances = [mode_distance(weights, action, g) for g in others]
    assert_close(found.distance, min(distances))
    assert found.element == others[int(np.argmin(distances))] and found.exact and found.hidden == "0"
    assert_close(mode_distance(weights, action, found.element), min(distances))
    assert found.pair[0] < found.pair[1] and found.element[0][found.pair[0]] == found.pair[1]


@pytest.mark.parametrize("name", ["three layers", "CNN", "residual"])
def test_nearest_mode_of_deeper_networks_is_the_best_exchange(name):
    _network, action, weights = prepared(name)
    found = nearest_mode(weights, action)
    hidden = [key for key in action.channels if key not in ("input", "output")]
    best = {}
    for place, key in enumerate(hidden):
        n = action.channels[key].numel
        for i, j in itertools.combinations(range(n), 2):
            g = list(action.group.identity())
            images = list(range(n))
            images[i], images[j] = j, i
            g[place] = tuple(images)
            best[key] = min(best.get(key, math.inf), mode_distance(weights, action, tuple(g)))
    assert_close(found.distance, min(best.values()))
    assert not found.exact and best[found.hidden] == min(best.values())
    for key in hidden:
        assert_close(nearest_mode(weights, action, key).distance, best[key])


def test_a_joint_exchange_can_be_nearer_than_any_single_one():
    network = perceptron(1, 2, 2, 1, bias=False)
    weights = {"0.weight": double([0.0], [0.1]), "2.weight": 3 * torch.eye(2, dtype=torch.float64),
               "4.weight": double([0.0, 0.2])}
    action = unit_permutations(network, (1,))
    assert_close(nearest_mode(weights, action).distance, math.sqrt(4 * 9 + 2 * 0.01))
    assert_close(mode_distance(weights, action, ((1, 0), (1, 0))), math.sqrt(2 * 0.01 + 2 * 0.04))


@pytest.mark.parametrize("entries", [1, 7, 40, 2**22])
def test_closest_pair_does_not_depend_on_blocks(entries):
    u = torch.randn(37, 3, generator=seeded(4), dtype=torch.float64)
    distances = torch.linalg.vector_norm(u[:, None] - u, dim=-1)
    distances.fill_diagonal_(math.inf)
    i, j = divmod(int(distances.argmin()), 37)
    found = closest_pair(u, entries)
    assert_close(found[0], distances.min())
    assert found[1:] == (i, j)


@pytest.mark.parametrize("entries", [1, 2**22])
def test_ties_go_to_the_first_pair_and_duplicates_are_at_zero(entries):
    ties = double([3.0], [5.0], [0.0], [1.0], [10.0], [11.0])
    assert closest_pair(ties, entries) == (1.0, 2, 3)
    assert closest_pair(torch.ones(5, 2, dtype=torch.float64), entries) == (0.0, 0, 1)
    duplicates = torch.randn(6, 4, generator=seeded(), dtype=torch.float64)
    duplicates[5] = duplicates[2]
    assert closest_pair(duplicates, entries) == (0.0, 2, 5)


def test_small_distances_of_large_vectors_are_not_lost():
    """Inner products would cancel: 1e8 + 1 squared has no room for a distance of 1."""
    for dtype, size, tolerance in ((torch.float64, 1e9, exact64), (torch.float32, 2.0**20, exact32)):
        u = torch.full((40, 8), size, dtype=dtype) + 4 * torch.arange(40)[:, None]
        u[30] = u[10]
        u[30, 0] += 1
        assert_close(closest_pair(u)[0], 1.0, tolerance)
        assert closest_pair(u)[1:] == (10, 30)


def test_ten_thousand_units(monkeypatch):
    """Through the network's action; no block of distances above 32 MiB, each pair computed once."""
    network = perceptron(3, 10_000, 1)
    with torch.no_grad():
        network[0].weight[7777], network[0].bias[7777] = network[0].weight[42], network[0].bias[42]
        network[2].weight[0, 7777] = network[2].weight[0, 42] + 1e-7
    blocks, plain = [], torch.cdist

    def counted(a, b, **options):
        blocks.append(len(a) * len(b))
        return plain(a, b, **options)

    monkeypatch.setattr(torch, "cdist", counted)
    found = nearest_mode(weights_of(network), unit_permutations(network, (3,)))
    assert found.pair == (42, 7777)
    assert abs(found.distance / (math.sqrt(2) * 1e-7) - 1) < 1e-8  # 1e-7 itself is added with an error of 1e-18
    assert max(blocks) <= 2**22 and sum(blocks) < 0.6 * 10_000**2


@pytest.mark.parametrize("inputs, n, outputs", [(1, 2, 1), (1, 3, 1), (2, 5, 1), (6, 40, 4), (1, 300, 1)])
def test_bounds_hold_on_random_draws(inputs, n, outputs):
    network = perceptron(inputs, n, outputs)
    action = unit_permutations(network, (inputs,))
    for seed in range(20):
        generator = seeded(seed)
        weights = {key: torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * (1 + 5 * (seed % 3))
                   for key, tensor in weights_of(network).items()}
        bound, distance = proximity_bound(weights, action), nearest_mode(weights, action).distance
        for value in (bound.source, bound.packing, bound.mean, bound.exchange, bound.units):
            assert distance <= value * (1 + exact64)
        assert bound.packing <= bound.source
        assert bound.tightest == min(bound.source, bound.packing, bound.mean, bound.exchange, bound.units)


def test_bounds_against_their_formulas():
    network = perceptron(3, 5, 2)
    action, weights = unit_permutations(network, (3,)), weights_of(network)
    u = units(weights, action, "0")
    spread, order, norm = (u - u.mean(0)).norm().item(), 120, norm_of(weights)
    bound = proximity_bound(weights, action)
    assert_close(bound.source, 2 * 32 * norm / math.log(order))
    assert_close(bound.packing, 2 * spread / (order ** (1 / 24) - 1))  # 30 weights of units less 6 fixed directions
    assert_close(bound.mean, math.sqrt(2 * order / (order - 1)) * spread)
    assert_close(bound.exchange, 2 * spread / math.sqrt(4))
    assert_close(bound.units, math.sqrt(2) * 2 * (u - u.mean(0)).norm(dim=1).max() / (5 ** (1 / 6) - 1))
    squares = [mode_distance(weights, action, g) ** 2 for g in action.group.elements()]
    assert_close(bound.mean, math.sqrt(sum(squares) / (order - 1)))  # the mean over the group without its identity
    transpositions = [g for g in action.group.elements() if sum(i != k for i, k in enumerate(g[0])) == 2]
    squares = [mode_distance(weights, action, g) ** 2 for g in transpositions]
    assert_close(bound.exchange, math.sqrt(sum(squares) / len(squares)))


def test_bounds_of_two_hidden_layers_hold_for_the_whole_group():
    _network, action, weights = prepared("three layers")
    nearest = min(mode_distance(weights, action, g) for g in action.group.elements() if g != action.group.identity())
    bound = proximity_bound(weights, action)
    squares = [mode_distance(weights, action, g) ** 2 for g in action.group.elements()]
    assert_close(bound.mean, math.sqrt(sum(squares) / (len(squares) - 1)))
    assert nearest <= bound.tightest and nearest <= nearest_mode(weights, action).distance
    alone = [proximity_bound(weights, action, name).exchange for name in ("0", "2", "4")]
    assert_close(bound.exchange, min(alone), 0)


def test_the_bounds_from_means_are_attained():
    simplex = {"0.weight": 2 * torch.eye(4, dtype=torch.float64), "0.bias": torch.zeros(4, dtype=torch.float64),
               "2.weight": torch.zeros(1, 4, dtype=torch.float64), "2.bias": double(7.0)}
    network = perceptron(4, 4, 1)
    action = unit_permutations(network, (4,))
    assert_close(proximity_bound(simplex, action).exchange, nearest_mode(simplex, action).distance)
    network = perceptron(4, 2, 1)
    action = unit_permutations(network, (4,))
    distance = nearest_mode(weights_of(network), action).distance
    assert_close(proximity_bound(weights_of(network), action).mean, distance)


def test_packing_distance_at_extremes():
    assert_close(packing_distance(3.0, math.log(8), 3), 6.0)  # two balls across: 8^(1/3) - 1 = 1
    assert packing_distance(3.0, 1e6, 1) == 0.0 and packing_distance(3.0, 0.0, 1) == math.inf
    assert math.isfinite(packing_distance(1.0, 1e-12, 10**6))


@each_network
def test_align_undoes_a_permutation(name):
    _network, action, weights = prepared(name)
    for g in action.group.sample(4, seeded(5)):
        moved = action.act(g, weights)
        found = align(moved, weights, action)
        after = action.act(found, moved)
        if name in ("one layer", "CNN", "residual"):
            assert found == action.group.inverse(g)
        distance = norm_of({key: after[key] - weights[key] for key in weights})
        assert distance <= mode_distance(weights, action, g) * (1 + exact64)


@pytest.mark.parametrize("n", [2, 4, 6])
def test_align_is_the_best_of_all_permutations(n):
    network = perceptron(3, n, 2)
    action, weights = unit_permutations(network, (3,)), weights_of(network)
    other = weights_of(perceptron(3, n, 2, seed=1))

    def distance(g):
        moved = action.act(g, other)
        return norm_of({key: moved[key] - weights[key] for key in weights})

    assert_close(distance(align(other, weights, action)), min(map(distance, action.group.elements())))


def test_align_sweeps_until_no_class_improves():
    """Two layers of one network, permuted: one sweep gets nearer, more sweeps never further away."""
    network = perceptron(4, 6, 6, 3)
    action, weights, other = (
        unit_permutations(network, (4,)), weights_of(network), weights_of(perceptron(4, 6, 6, 3, seed=1)))

    def distance(sweeps):
        moved = action.act(align(other, weights, action, sweeps), other)
        return norm_of({key: moved[key] - weights[key] for key in weights})

    found = [distance(sweeps) for sweeps in (0, 1, 2, 50)]
    assert found[0] > found[1] >= found[2] >= found[3]
    final = action.act(align(other, weights, action), other)
    assert align(final, weights, action) == action.group.identity()


def test_interpolate_and_barrier():
    _network, _action, weights = prepared("CNN")
    other = {key: tensor + 1 for key, tensor in weights.items()}
    path = interpolate(weights, other, torch.tensor([0.0, 0.25, 1.0]))
    for key, tensor in weights.items():
        assert path[key].shape == (3, *tensor.shape) and path[key].dtype == tensor.dtype
        assert_close(path[key], torch.stack([tensor, tensor + 0.25, tensor + 1]))
    single = {key: tensor.float() for key, tensor in weights.items()}
    path = interpolate(single, single, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert all(tensor.dtype == torch.float32 for tensor in path.values())
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    assert_close(barrier(double(1.0, 3.0, 2.0, 5.0), t), 1.0)  # the line is at 2 where the loss is 3
    assert barrier(double(1.0, 0.0, 0.0, 5.0), t) == 0.0
    with pytest.raises(Refusal, match=r"same names and shapes.*'0\.weight'"):
        interpolate(weights, {key: tensor[None] for key, tensor in weights.items()}, t)


@pytest.mark.parametrize("nearest", [True, False])
def test_halfway_of_an_exchange_two_units_are_one(nearest):
    _network, action, weights = prepared("one layer")
    g = nearest_mode(weights, action).element if nearest else ((0, 4, 2, 3, 1, 5),)
    path = interpolate(weights, action.act(g, weights), torch.tensor([0.5]))
    u = units(path, action, "0")[0]
    i, j = (unit for unit in range(6) if g[0][unit] != unit)
    assert_close(u[i], u[j])
    assert_close(u[i], units(weights, action, "0")[[i, j]].mean(0))


def deep():
    return prepared("three layers")[1:]


@pytest.mark.parametrize(
    "call, words",
    {
        "a data symmetry": (lambda: units(weights_of(convolutional()), network_action(
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), field(rotations(), (1, 6, 6))), "0"),
            r"unit_permutations\(network, input_shape\)"),
        "no action": (lambda: units(deep()[1], deep()[0].group, "0"), r"unit_permutations\(network, input_shape\)"),
        "no such class": (lambda: units(*deep()[::-1], "1"), "hidden='0' or hidden='2' or hidden='4'"),
        "an output": (lambda: nearest_mode(*deep()[::-1], "output"), "the name of a hidden class"),
        "other names": (lambda: units({"9.weight": torch.ones(2)}, deep()[0], "0"), r"the names \['9.weight'\]"),
        "no weights": (lambda: units({}, deep()[0], "0"), "names of the plain network's parameters"),
        "a network": (lambda: units(perceptron(5, 3, 4, 2, 3), deep()[0], "0"),
                      r"dict\(network.named_parameters\(\)\)"),
        "another width": (lambda: units(weights_of(perceptron(5, 6, 4, 2, 3)), deep()[0], "0"),
                          r"'0.weight' of shape \(..., 3, 5\). Got: shape \(6, 5\)"),
        "draws": (lambda: nearest_mode({key: w[None] for key, w in deep()[1].items()}, deep()[0]),
                  "one sample at a time"),
        "one row": (lambda: closest_pair(torch.ones(1, 3)), "two or more"),
        "a list": (lambda: closest_pair([[1.0], [2.0]]), r"torch\.as_tensor\(u\)"),
        "infinite": (lambda: closest_pair(torch.tensor([[1.0], [math.inf], [2.0]])), "infinite entries in 1 of 3"),
        "one unit": (lambda: nearest_mode(weights_of(perceptron(3, 1, 2)), unit_permutations(
            perceptron(3, 1, 2), (3,))), "two hidden units"),
        "one unit, bound": (lambda: proximity_bound(weights_of(perceptron(3, 1, 2)), unit_permutations(
            perceptron(3, 1, 2), (3,))), "two hidden units"),
        "one unit beside others": (lambda: proximity_bound(weights_of(perceptron(3, 1, 4, 2)), unit_permutations(
            perceptron(3, 1, 4, 2), (3,)), "0"), "one unit in '0'"),
    }.values(),
)
def test_refusals(call, words):
    with pytest.raises(Refusal, match=words):
        call()


def test_channels_tied_to_themselves_are_refused_and_others_are_not():
    network = residual(tied=True)
    action, weights = unit_permutations(network, (1, 6, 6)), weights_of(network)
    with pytest.raises(Refusal, match=r"itself\.weight"):
        units(weights, action, "stem")
    with pytest.raises(Refusal, match=r"itself\.weight.*hidden='third'"):
        nearest_mode(weights, action)
    assert nearest_mode(weights, action, "third").hidden == "third"


def test_float32_and_float64_agree():
    _network, action, weights = prepared("CNN")
    single = {key: tensor.float() for key, tensor in weights.items()}
    first, second = nearest_mode(weights, action), nearest_mode(single, action)
    assert (first.hidden, first.pair, first.element) == (second.hidden, second.pair, second.element)
    assert_close(second.distance, first.distance, exact32)
    assert_close(proximity_bound(single, action).exchange, proximity_bound(weights, action).exchange, exact32)
    assert units(single, action, "0").dtype == torch.float32
