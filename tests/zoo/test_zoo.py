"""The zoo: every architecture under every group that makes sense for it works exactly, or is refused in words."""

import copy
import csv
import functools
from pathlib import Path

import pytest
import torch
from cells import CELLS, matrix
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map, tree_structure

from symbnn.equivariance.expansion import expand
from symbnn.errors import Refusal
from symbnn.posterior.layers import kl_sum, variational_tensors, with_posteriors
from symbnn.posterior.sampling import predict, sample_weights
from symbnn.symmetry.networks import intertwining_error, unit_permutations
from symbnn.training.checkpoints import load_tensors, read_checkpoint, save_network
from tolerances import assert_close, exact64

NAMES = list(CELLS)
REVERSED = "reverses an axis, along which the window starts 1 pixels before the image and ends 0 behind it"
REFUSED = {  # cell -> words of its refusal
    **{
        ("ResNet, 8 pixels", group): rf"stages.2.conv1: Conv2d.*{REVERSED}.*an image of 7 or 9 pixels"
        for group in ("quarter turns", "turns and flips", "left-right flips", "half turns")
    },
    **{
        (name, "time reversal"): f"'rnn: {kind}.*a recurrent layer, which depends on the order along time"
        for name, kind in (("LSTM", "LSTM"), ("GRU, two ways", "GRU"), ("RNN", "RNN"))
    },
    ("LeNet", "translations"): "conv1: Conv2d.*padding_mode='circular'",
}


def assert_trees_close(a, b):
    """The same structure, with the same numbers."""
    assert tree_structure(a) == tree_structure(b)
    for x, y in zip(tree_leaves(a), tree_leaves(b)):
        assert_close(x, y)


@functools.cache
def derived(name):
    network = CELLS[name].network()
    return network, CELLS[name].derive(network)


@pytest.mark.parametrize("name", NAMES, ids=", ".join)
def test_it_is_exact_or_refused(name):
    if name in REFUSED:
        with pytest.raises(Refusal, match=REFUSED[name]):
            derived(name)
        return
    network, action = derived(name)
    inputs = CELLS[name].inputs()
    out = tree_leaves(network(*inputs) if isinstance(inputs, tuple) else network(inputs))
    assert all(its.std() > 1e-3 for its in out)
    assert set(dict(network.named_parameters(remove_duplicate=False))) <= set(action.parameters)
    assert intertwining_error(network, action, inputs) <= exact64


UNITS = {name: cell for (name, _), cell in CELLS.items() if name != "ResNet, 8 pixels"}
NO_UNITS = {  # architecture -> words of the refusal
}


@pytest.mark.parametrize("name", UNITS)
def test_hidden_units_are_permuted(name):
    cell = UNITS[name]
    network, inputs = cell.network(), cell.inputs()
    if isinstance(cell.action, tuple) or cell.tokens:
        shape = (cell.action[0] if isinstance(cell.action, tuple) else cell.action).shape
        with pytest.raises(Refusal, match="a network that takes inputs of the shapes"):
            unit_permutations(network, shape)
        return
    if name in NO_UNITS:
        with pytest.raises(Refusal, match=NO_UNITS[name]):
            unit_permutations(network, cell.action.shape)
        return
    action = unit_permutations(network, cell.action.shape)
    assert (
        intertwining_error(network, action, inputs, action.group.sample(3, torch.Generator().manual_seed(0))) <= 1e-10
    )
    assert action.group.order > 1


def is_plain(network: nn.Module) -> bool:
    """Whether all weights are those of linear layers, convolutions and norms."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    return all(
        isinstance(layer, kinds) or not (layer._parameters or hasattr(layer, "parametrizations"))
        for layer in network.modules()
    )


PLAIN = [name for name, cell in CELLS.items() if name not in REFUSED and is_plain(cell.make())]


@pytest.mark.parametrize(
    "name",
    [name for name in PLAIN if name[1] not in ("turns and flips", "half turns", "left-right flips")],
    ids=", ".join,
)
def test_posteriors(name):
    """The same actions; predictions are those of one network after the other; KL in closed form."""
    cell = CELLS[name]
    network, action = derived(name)
    bayesian, x = with_posteriors(network).eval(), cell.inputs()
    its = cell.derive(bayesian)
    assert its.layers == action.layers and its.parameters.keys() == action.parameters.keys()
    assert all(moves.agrees_with(its.parameters[tensor]) for tensor, moves in action.parameters.items())
    with torch.no_grad():
        by_hand = 0
        for tensor in variational_tensors(bayesian).values():
            q, p = tensor.posterior, tensor.prior
            ratio = (2 * (q.log_scale - p.log_scale)).exp()
            by_hand += ((ratio + (q.mean - p.mean).square() / (2 * p.log_scale).exp() - 1 - ratio.log()) / 2).sum()
        assert_close(kl_sum(bayesian), by_hand)
        weights = sample_weights(bayesian, 2, torch.Generator().manual_seed(0))
        buffers, inputs = dict(network.named_buffers()), x if isinstance(x, tuple) else (x,)
        loop = [
            torch.func.functional_call(copy.deepcopy(network), {  # it leaves weights behind where layers are shared
                **buffers, **{key: w[k] for key, w in weights.items()}}, inputs)
            for k in (0, 1)
        ]
        assert_trees_close(predict(bayesian, x, weights=weights), tree_map(lambda *its: torch.stack(its), *loop))
        if isinstance(x, tuple) or isinstance(loop[0], dict):
            return
        g = action.group.generators()[-1]
        moved = predict(bayesian, action.input.act(g, x), weights={**weights, **action.act(g, weights)})
        if not buffers:  # running statistics move too, and are no weights
            assert_close(moved, action.output.act(g, torch.stack(loop)))


EXPANDED = [
    name
    for name, cell in CELLS.items()
    if name not in REFUSED
    and name[1] not in ("permutations", "turns and flips", "half turns", "left-right flips", "symmetries of the cube")
]  # and small groups
NOT_EXPANDED = {  # architecture -> words of the refusal
    "Siamese": "a network with several inputs",
    "two heads": "a network with several outputs",
    "parametrised": r"remove_parametrizations\(network.get_submodule\('0'\), 'weight'\)",
}
TOGETHER = ("ConvNeXt", "ViT", "ViT, no positions")  # layer norms and heads take the copies together


@pytest.mark.parametrize("name", EXPANDED, ids=", ".join)
def test_orbit_expansions(name):
    """Equivariant at fixed weights and, where no operation takes copies together, the orbit average."""
    cell = CELLS[name]
    network, action = derived(name)
    x = cell.inputs()
    if name[0] in NOT_EXPANDED:
        with pytest.raises(Refusal, match=NOT_EXPANDED[name[0]]):
            expand(network, action, "block_diagonal")
        return
    group = action.group
    elements = group.elements()
    for arrangement in ("block_diagonal", "regular"):
        wide, acting = expand(network, action, arrangement)
        assert intertwining_error(wide, acting, x) < exact64
        for key, tensor in [*wide.named_parameters(), *wide.named_buffers()]:
            if key in acting.parameters:
                assert_close(acting.parameters[key].act(group.generators()[-1], tensor), tensor)
        with torch.no_grad():
            y = wide(x)
            for g in elements:
                assert_close(wide(action.input.act(g, x)), action.output.act(g, y))
            if arrangement == "block_diagonal" and name[0] not in TOGETHER:
                orbit = [action.output.act(g, network(action.input.act(group.inverse(g), x))) for g in elements]
                assert_close(y, torch.stack(orbit).mean(0))



@pytest.mark.parametrize("name", ["layers and norms", "ResNet", "DeepSets"])
def test_checkpoints(name, tmp_path):
    full = next(its for its in NAMES if its[0] == name)
    network, action = derived(full)
    one, other = with_posteriors(network), with_posteriors(CELLS[full].make().double())
    save_network(tmp_path / "one", one, None)
    load_tensors(other, read_checkpoint(tmp_path / "one").part("network"))
    weights = [sample_weights(its, 2, torch.Generator().manual_seed(0)) for its in (one, other)]
    assert all(torch.equal(weights[1][key], value) for key, value in weights[0].items())
    x = CELLS[full].inputs()
    assert torch.equal(predict(one.eval(), x, weights=weights[0]), predict(other.eval(), x, weights=weights[1]))
    again = CELLS[full].derive(other)
    assert all(moves.agrees_with(again.parameters[key]) for key, moves in action.parameters.items())


def test_the_matrix_has_no_other_outcomes():
    some = [row for row in matrix(NAMES[3::16])]
    assert [row[:2] for row in some] == NAMES[3::16]
    assert all((row[2] == "works") != row[2].startswith("refused: ") for row in some)
    assert all((row[2] != "works") == (row[:2] in REFUSED) for row in some)
    with open(Path(__file__).parents[2] / "results" / "zoo" / "table.csv", newline="") as file:
        written = {(row["architecture"], row["group"]): row["outcome"] for row in csv.DictReader(file)}
    assert written.keys() == CELLS.keys() and all(written[row[:2]] == row[2] for row in some)
