"""Orbit expansion: invariance of networks and posteriors, blocks against their formula, scales, priors, refusals."""

import copy
import dataclasses
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import seeded
from late import ORDERS, reordered
from symbnn.equivariance.arrangements import ARRANGEMENT, arrangement_of, block_turn
from symbnn.equivariance.expansion import expand, expanded_action
from symbnn.equivariance.projected_gradients import drift
from symbnn.errors import Refusal
from symbnn.posterior.block_gaussian import BlockGaussian
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.layers import posterior_mean_network, variational_tensors, with_posteriors
from symbnn.posterior.log_normal import LogNormal
from symbnn.posterior.priors import isotropic, random_means
from symbnn.posterior.sampling import apply_weights, mean_weights, sample_weights
from symbnn.symmetry.actions import Action, natural_action
from symbnn.symmetry.fields import field, flips, half_turns, rotations, rotations_and_flips, shifts, translations
from symbnn.symmetry.groups import Cyclic, Dihedral, Permutations, Product
from symbnn.symmetry.networks import NetworkAction, intertwining_error, network_action
from symbnn.training.checkpoints import load_tensors, network_tensors
from tolerances import assert_close, exact32, exact64

ARRANGEMENTS = ("regular", "row_rolled", "row_constant", "block_diagonal")
INVARIANT = ("regular", "block_diagonal")


def random_inputs(action, n=3):
    return torch.randn((n, *action.input.shape), generator=seeded(1), dtype=torch.float64)


def small_cnn(flat=False, out=5):
    torch.manual_seed(0)
    head = [nn.Flatten(), nn.Linear(16, out)] if flat else [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, out)]
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.ReLU(),
        *head,
    ).double()


class Residual(nn.Module):
    """A residual block with batch norms, and a direct path from the input to the output."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.outer = (nn.Conv2d(*c, 3, padding=1) for c in [(2, 4), (4, 4), (4, 4)])
        self.norm, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)
        self.head, self.skip = nn.Linear(4, 3), nn.Linear(2 * 36, 3, bias=False)

    def forward(self, x):
        h = torch.relu(self.norm(self.stem(x)))
        h = torch.relu(h + self.norm2(self.outer(torch.relu(self.inner(h)))))
        return self.head(h.mean((-2, -1))) + self.skip(torch.flatten(x, 1))


def residual():
    torch.manual_seed(0)
    network = Residual().double()
    network(2 + 3 * torch.randn(32, 2, 6, 6, dtype=torch.float64))
    nn.init.normal_(network.norm.weight)
    return network.eval()


def series():
    torch.manual_seed(0)
    circular = dict(padding=1, padding_mode="circular")
    return (
        nn.Sequential(
            nn.Conv1d(2, 3, 3, **circular),
            nn.BatchNorm1d(3),
            nn.Tanh(),
            nn.Conv1d(3, 4, 3, stride=2, **circular),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12, 5),
            nn.ReLU(),
            nn.Linear(5, 3),
        )
        .double()
        .eval()
    )


def mlp(out=4):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, out)]
    return nn.Sequential(*layers).double()


def to_images():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1)).double()


S4 = natural_action(Permutations(4))
CASES = {
    "cnn C4": lambda: network_pair(small_cnn(), field(rotations(), (1, 8, 8))),
    "cnn D4": lambda: network_pair(small_cnn(), field(rotations_and_flips(), (1, 8, 8))),
    "cnn flips": lambda: network_pair(small_cnn(), field(flips(), (1, 8, 8))),
    "cnn half turns": lambda: network_pair(small_cnn(), field(half_turns(), (1, 8, 8))),
    "cnn flattened C4": lambda: network_pair(small_cnn(flat=True), field(rotations(), (1, 8, 8))),
    "cnn flattened D4": lambda: network_pair(small_cnn(flat=True), field(rotations_and_flips(), (1, 8, 8))),
    "residual C4": lambda: network_pair(residual(), field(rotations(), (2, 6, 6))),
    "residual D4": lambda: network_pair(residual(), field(rotations_and_flips(), (2, 6, 6))),
    "series shifts": lambda: network_pair(series(), field(shifts(3, step=2, ndim=1), (2, 6))),
    "mlp S4": lambda: network_pair(mlp(), S4),
    "mlp S4 to S4": lambda: network_pair(mlp(), S4, S4),
    "mlp C4 pixels": lambda: network_pair(mlp(out=3), rotations().on(2, 2).flattened()),
    "images to images": lambda: network_pair(to_images(), field(rotations(), (1, 6, 6))),
}


def network_pair(network, acting, output=None):
    return network, network_action(network, acting, output=output)


@torch.no_grad()
def orbit(network, action, x):
    """Outputs at every turned input, turned back: equal along the first axis iff the network is equivariant there."""
    inverse = action.group.inverse
    return torch.stack(
        [action.output.act(g, network(action.input.act(inverse(g), x))) for g in action.group.elements()]
    )


def assert_invariant_family(family, rule, group, tolerance=exact64):
    for g in group.generators():
        pushed = family.push_forward(rule(g))
        assert_close(pushed.mean, family.mean, tolerance)
        assert_close(pushed.scale, family.scale, tolerance)


@pytest.mark.parametrize("arrangement", INVARIANT)
@pytest.mark.parametrize("case", CASES)
def test_equivariant_network_and_posterior(case, arrangement):
    network, action = CASES[case]()
    x = random_inputs(action)
    wide, acting = expand(network, action, arrangement)
    outputs = orbit(wide, action, x)
    assert_close(outputs, outputs[:1].expand_as(outputs))
    assert intertwining_error(wide, acting, x) < exact64
    small = orbit(network, action, x)
    assert (small - small[0]).abs().max() > 1e-3
    if arrangement == "block_diagonal":
        assert_close(outputs[0], small.mean(0))

    bayesian = with_posteriors(network, prior=random_means(0))
    for tensor in variational_tensors(bayesian).values():
        nn.init.normal_(tensor.posterior.log_scale, -2.0, generator=seeded(3))
    wide_bayesian, acting = expand(bayesian, action, arrangement)
    for name, tensor in variational_tensors(wide_bayesian).items():
        assert_invariant_family(tensor.posterior, acting.parameters[name], action.group)
        assert_invariant_family(tensor.prior, acting.parameters[name], action.group)
    assert_close(apply_weights(wide_bayesian, x, mean_weights(wide_bayesian))[0], wide(x))
    assert_close(posterior_mean_network(wide_bayesian)(x), wide(x))
    weights = sample_weights(wide_bayesian, 2, seeded(4))
    error = intertwining_error(
        wide_bayesian, acting, x, tensors=weights, forward=lambda x, w: apply_weights(wide_bayesian, x, w)
    )
    assert error < exact64


def test_row_constant_is_not_equivariant_and_row_rolled_is():
    network, action = CASES["cnn C4"]()
    x = random_inputs(action)
    constant, rolled = (
        orbit(expand(network, action, name).network, action, x) for name in ("row_constant", "row_rolled"))
    assert (constant - constant[0]).abs().max() > 1e-2
    assert_close(rolled, rolled[:1].expand_as(rolled))
    for case in ("cnn flips", "cnn half turns"):  # every element is its own inverse
        network, action = CASES[case]()
        outputs = orbit(expand(network, action, "row_constant").network, action, x)
        assert_close(outputs, outputs[:1].expand_as(outputs))


@pytest.mark.parametrize("depth", [1, 3])
def test_row_rolled_before_a_flattened_head(depth):
    torch.manual_seed(0)
    convolutions = [layer for k in range(depth) for layer in (nn.Conv2d(2 if k else 1, 2, 3, padding=1), nn.ReLU())]
    network = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(32, 2)).double()
    action = network_action(network, field(rotations(), (1, 4, 4)))
    (wide, acting), x = expand(network, action, "row_rolled"), random_inputs(action)
    outputs = orbit(wide, action, x)
    assert_close(outputs, outputs[:1].expand_as(outputs))
    assert intertwining_error(wide, acting, x) < exact64
    bayesian = expand(with_posteriors(network), action, "row_rolled").network
    for name, tensor in variational_tensors(bayesian).items():
        assert_invariant_family(tensor.posterior, acting.parameters[name], action.group)
    assert pickle.loads(pickle.dumps(acting)).parameters["0.weight"](1) == acting.parameters["0.weight"](1)


def circular_network(space, size, depth):
    """`depth` circular convolutions and a flattened head."""
    torch.manual_seed(0)
    convolution = {1: nn.Conv1d, 2: nn.Conv2d}[len(size)]
    around = dict(padding=1, padding_mode="circular")
    layers = [layer for k in range(depth) for layer in (convolution(2 if k else 1, 2, 3, **around), nn.Tanh())]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * math.prod(size), 2)).double()
    return network, network_action(network, field(space, (1, *size)))


@pytest.mark.parametrize("n, depth", [(5, 2), (5, 3), (7, 2), (7, 4)])
def test_row_rolled_takes_roots_of_elements(n, depth):
    """At depth l the copies move by g^l, and l^-1 differs from l modulo 5 or 7."""
    network, action = circular_network(shifts(n, ndim=1), (n,), depth)
    (wide, acting), x = expand(network, action, "row_rolled"), random_inputs(action)
    outputs = orbit(wide, action, x)
    assert_close(outputs, outputs[:1].expand_as(outputs))
    assert intertwining_error(wide, acting, x) < exact64
    for name, tensor in wide.named_parameters():
        assert_close(acting.parameters[name].act(1, tensor), tensor)
    assert (orbit(network, action, x) - network(x)).abs().max() > 1e-3


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_row_rolled_knows_the_exponent_of_a_product(depth, order):
    """C2 x C3 has common factor with 6, the exponent, whichever factor comes first: no roots at depths 2 and 3."""
    space = reordered(translations(2, 3), order)
    network, action = circular_network(space, (2, 3), depth)
    if math.gcd(depth, 6) > 1:
        with pytest.raises(Refusal, match="common factor with 6, the exponent"):
            expand(network, action, "row_rolled")
        return
    outputs = orbit(expand(network, action, "row_rolled").network, action, random_inputs(action))
    assert_close(outputs, outputs[:1].expand_as(outputs))


def test_row_rolled_in_a_residual_network_of_flips():
    network = residual()
    del network.skip
    network.skip = nn.Linear(72, 3, bias=False).double()
    action = network_action(network, field(flips(), (2, 6, 6)))
    outputs = orbit(expand(network, action, "row_rolled").network, action, random_inputs(action))
    assert_close(outputs, outputs[:1].expand_as(outputs))


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_blocks_are_the_kernels_turned_by_the_exponents_of_the_source(arrangement):
    network, action = CASES["cnn C4"]()
    wide = expand(network, action, arrangement).network
    exponent = {
        "regular": lambda i, j: 2 * i - j,
        "row_rolled": lambda i, j: i - j,
        "row_constant": lambda i, j: -j,
        "block_diagonal": lambda i, j: i,
    }[arrangement]
    first, inner, head = wide[0].weight, wide[3].weight, wide[-1].weight
    for i in range(4):
        assert_close(first[3 * i : 3 * i + 3], torch.rot90(network[0].weight, i, (-2, -1)))
        assert_close(wide[0].bias[3 * i : 3 * i + 3], network[0].bias)
        assert_close(head[:, 4 * i : 4 * i + 4], network[-1].weight / 4)
        for j in range(4):
            factor = 0.5 if arrangement != "block_diagonal" else float(i == j)
            expected = factor * torch.rot90(network[3].weight, exponent(i, j), (-2, -1))
            assert_close(inner[4 * i : 4 * i + 4, 3 * j : 3 * j + 3], expected)
    assert_close(wide[-1].bias, network[-1].bias)


GROUPS = [
    Cyclic(1),
    Cyclic(2),
    Cyclic(5),
    Dihedral(3),
    Dihedral(4),
    Permutations(3),
    Product(Cyclic(2), Cyclic(3)),
    Product(Cyclic(2), Cyclic(2)),
]


@given(st.sampled_from(GROUPS), st.data())
@settings(max_examples=100, deadline=None)
def test_block_condition(group, data):
    g, a, b = (data.draw(st.sampled_from(group.elements())) for _ in range(3))
    ga, gb = group.compose(g, a), group.compose(g, b)
    for arrangement in INVARIANT:
        assert block_turn(arrangement, group, ga, gb) == group.compose(g, block_turn(arrangement, group, a, b))
    if group.is_abelian:  # depth 1 in, depth 2 out
        g2a = group.compose(g, ga)
        assert block_turn("row_rolled", group, g2a, gb) == group.compose(g, block_turn("row_rolled", group, a, b))


@given(
    st.sampled_from([rotations(), rotations_and_flips(), flips(), half_turns()]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 3]),
    st.booleans(),
    st.sampled_from(INVARIANT),
    st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_random_convolutional_networks(space, hidden, out, kernel, flat, arrangement, seed):
    torch.manual_seed(seed)
    head = (
        [nn.Flatten(), nn.Linear(out * 16, 2)] if flat else [nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(out, 2)]
    )
    network = nn.Sequential(
        nn.Conv2d(2, hidden, kernel, padding=kernel // 2),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Conv2d(hidden, out, 3, padding=1),
        nn.ReLU(),
        *head,
    ).double()
    action = network_action(network, field(space, (2, 8, 8)))
    x = random_inputs(action, 2)
    wide = orbit(expand(network, action, arrangement).network, action, x)
    assert_close(wide, wide[:1].expand_as(wide))
    if arrangement == "block_diagonal":
        assert_close(wide[0], orbit(network, action, x).mean(0))


@pytest.mark.parametrize("family", [MeanFieldGaussian, Laplace, BlockGaussian])
@pytest.mark.parametrize("arrangement", INVARIANT)
def test_scales_of_every_layer(family, arrangement):
    network, action = CASES["cnn C4"]()
    bayesian = with_posteriors(network, family=family, scale=0.3)
    tensors = variational_tensors(expand(bayesian, action, arrangement).network)
    for which, start in (("posterior", 0.3), ("prior", None)):
        for name, factor in {"0.weight": 1, "0.bias": 1, "3.weight": 0.5, "8.weight": 0.5, "8.bias": 1}.items():
            small = getattr(variational_tensors(bayesian)[name], which)
            wide = getattr(tensors[name], which)
            assert type(wide) is type(small) and wide.trainable == small.trainable
            assert_close(wide.scale, factor * small.scale.flatten()[0].expand(wide.shape))
            assert start is None or abs(small.scale.flatten()[0].item() - start) < exact64
            assert wide.log_scale.numel() == 1 or small.log_scale.numel() > 1  # what was stored once still is
    if family is BlockGaussian:
        assert tensors["3.weight"].posterior.log_scale.numel() < tensors["3.weight"].posterior.numel
        assert all(tensor.posterior.blocks is not None for tensor in tensors.values())


@pytest.mark.parametrize("case, name", [("residual D4", "skip.weight"), ("mlp S4 to S4", "4.bias"),
                                        ("cnn flattened D4", "7.bias")])
@pytest.mark.parametrize("family", [MeanFieldGaussian, Laplace])
def test_variances_of_what_no_copy_meets_are_means_over_the_group(case, name, family):
    network, action = CASES[case]()
    bayesian = with_posteriors(network, family=family)
    for tensor in variational_tensors(bayesian).values():
        nn.init.normal_(tensor.posterior.log_scale, -1.0, generator=seeded(3))
    wide, acting = expand(bayesian, action).network, action.parameters[name].absolute()
    small = variational_tensors(bayesian)[name].posterior
    turned = torch.stack([acting.act(g, small.variance.detach()) for g in action.group.elements()])
    assert_close(variational_tensors(wide)[name].posterior.variance, turned.mean(0))
    assert case == "cnn flattened D4" or turned.std(0).max() > 0.05  # the group moves it


def test_divergence_of_regular_blocks():
    network, action = CASES["cnn D4"]()
    bayesian = with_posteriors(network)
    small, wide = variational_tensors(bayesian), variational_tensors(expand(bayesian, action).network)
    for name, factor in {"0.weight": 8, "0.bias": 8, "3.weight": 64, "8.bias": 1}.items():
        assert_close(wide[name].kl() / small[name].kl(), torch.tensor(float(factor)))


def test_tiny_scales_stay_finite():
    network, action = CASES["mlp S4 to S4"]()
    bayesian = with_posteriors(network.float(), scale=1e-30)
    for tensor in variational_tensors(bayesian).values():
        tensor.posterior.log_scale.data.fill_(-200.0)
    for tensor in variational_tensors(expand(bayesian, action, "block_diagonal").network).values():
        assert tensor.posterior.log_scale.isfinite().all() and (tensor.posterior.log_scale < -199).all()


def test_a_prior_builder_is_used():
    network, action = CASES["cnn C4"]()
    wide = expand(with_posteriors(network), action, prior=isotropic(2.0)).network
    for tensor in variational_tensors(wide).values():
        assert_close(tensor.prior.scale, torch.full(tensor.prior.shape, 2.0, dtype=torch.float64))
        assert not tensor.prior.trainable and not list(tensor.prior.parameters())


def test_single_precision_flags_and_the_small_network_are_kept():
    network, action = CASES["residual C4"]()
    network = network.float().train()
    network.inner.weight.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    wide = expand(network, action, "block_diagonal").network
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert wide.training and wide.norm.training
    assert not wide.inner.weight.requires_grad and wide.stem.weight.requires_grad
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert wide.norm.num_features == 16 and wide.norm.running_mean.shape == (16,) and wide.head.in_features == 16
    assert "norm.running_var" in dict(wide.named_buffers())
    x = random_inputs(action).float()
    assert_close(wide.eval()(x), orbit(network.eval(), action, x).mean(0), exact32)
    again = expand(network, action).network
    again.load_state_dict(wide.state_dict())
    assert torch.equal(again.eval()(x), wide(x))


def test_batch_norm_in_training_mode_normalises_each_copy_by_its_own_batch():
    network, action = CASES["residual C4"]()
    wide, x = expand(network, action, "block_diagonal").network.train(), random_inputs(action, 8)
    assert_close(wide(x), orbit(network.train(), action, x).mean(0))


def test_expanded_networks_train_and_are_saved():
    network, action = CASES["cnn C4"]()
    bayesian = expand(with_posteriors(network), action).network
    again = expand(with_posteriors(small_cnn()), action, "block_diagonal").network
    again.load_state_dict(bayesian.state_dict())
    x = random_inputs(action)
    weights = sample_weights(bayesian, 2, seeded())
    out = apply_weights(bayesian, x, weights)
    assert torch.equal(out, apply_weights(pickle.loads(pickle.dumps(bayesian)), x, weights))
    assert torch.equal(out, apply_weights(again, x, weights))
    out.square().mean().backward()
    assert all(tensor.posterior.loc.grad is not None for tensor in variational_tensors(bayesian).values())


def test_a_layer_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.again, self.head = (
                nn.Conv2d(1, 3, 3, padding=1),
                nn.Conv2d(3, 3, 3, padding=1),
                nn.Linear(3, 2),
            )

        def forward(self, x):
            h = torch.relu(self.again(torch.relu(self.again(torch.relu(self.first(x))))))
            return self.head(h.mean((-2, -1)))

    network = Twice().double()
    action = network_action(network, field(rotations(), (1, 6, 6)))
    for arrangement in INVARIANT:
        outputs = orbit(expand(network, action, arrangement).network, action, random_inputs(action))
        assert_close(outputs, outputs[:1].expand_as(outputs))


def test_on_a_gpu(require_cuda):
    network, action = CASES["residual C4"]()
    wide, x = expand(with_posteriors(network.cuda()), action, "block_diagonal").network, random_inputs(action).cuda()
    assert next(wide.parameters()).is_cuda
    assert_close(apply_weights(wide, x, mean_weights(wide))[0], orbit(network, action, x).mean(0))


class TestRefusals:
    def refused(self, words, network, action, *arguments):
        with pytest.raises(Refusal, match=words):
            expand(network, action, *arguments)

    def test_arrangement(self):
        self.refused("gcnn", *CASES["cnn C4"](), "gcnn")

    def test_action_on_the_inputs_alone(self):
        with pytest.raises(Refusal, match="whole network"):
            expand(small_cnn(), field(rotations(), (1, 8, 8)))

    def test_action_that_is_not_the_small_one(self):
        network, action = CASES["cnn C4"]()
        self.refused("hidden channels that stay", small_cnn(flat=True), network_action(network, action.input))
        self.refused("hidden channels that stay", *expand(network, action))

    @pytest.mark.parametrize(
        "network", [nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), nn.Conv2d(1, 2, 3), nn.ReLU()], ids=str
    )
    def test_nothing_hidden(self, network):
        self.refused("with hidden channels, of which", network, network_action(network, field(flips(), (1, 6, 6))))

    def test_row_rolled(self):
        self.refused("abelian", *CASES["cnn D4"](), "row_rolled")
        self.refused("7.weight' at depth 2", *CASES["cnn flattened C4"](), "row_rolled")
        self.refused("'outer'", *CASES["residual C4"](), "row_rolled")

    def test_residual_sum_with_the_input(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.hidden, self.head = nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(5, 2)

            def forward(self, x):
                return self.head(torch.relu(self.hidden(x + self.inner(x))))

        network = Tied()
        self.refused("'inner' from input to input", network, network_action(network, S4))

    @pytest.mark.parametrize("family", [LogNormal, FullGaussian])
    def test_family(self, family):
        network = mlp()
        bayesian = with_posteriors(network, family=family)
        self.refused(family.__name__, bayesian, network_action(bayesian, Action.trivial(Cyclic(2), (4,))))

    @pytest.mark.parametrize("order", ORDERS)
    def test_blocks_that_the_group_tears_apart(self, order):
        network, action = network_pair(small_cnn(), field(reordered(rotations_and_flips(), order), (1, 8, 8)))
        bayesian = with_posteriors(network)
        tensor = variational_tensors(bayesian)["0.weight"]
        rows = torch.zeros(3, 1, 3, 1, dtype=torch.float64)
        tensor.posterior = BlockGaussian(tensor.posterior.loc, rows)
        self.refused("block", bayesian, action)

    def test_expanded_action_of_another_network(self):
        network, action = CASES["cnn C4"]()
        with pytest.raises(Refusal, match="4 copies"):
            expanded_action(network, action)
        with pytest.raises(Refusal, match="4 copies"):
            expanded_action(expand(*CASES["cnn D4"]()).network, action)


def rolled_cnn() -> tuple[nn.Module, NetworkAction]:
    """A network with two hidden convolutions, under whose second copies move by g^2 if they are row_rolled."""
    network = with_posteriors(small_cnn().double(), prior=isotropic(1.0))
    return network, network_action(network, field(rotations(), (1, 8, 8)))


def copied(wide: nn.Module, small: nn.Module, action: NetworkAction) -> dict[str, nn.Module]:
    """The expanded network after everything that people do with networks."""
    other, file = "regular" if arrangement_of(wide) == "row_rolled" else "row_rolled", io.BytesIO()
    loaded, checkpointed, from_file = (expand(small, action, other).network for _ in range(3))
    loaded.load_state_dict(wide.state_dict())
    load_tensors(checkpointed, {n.removeprefix("network/"): t.clone() for n, t in network_tensors(wide).items()})
    torch.save(wide.state_dict(), file)
    file.seek(0)
    from_file.load_state_dict(torch.load(file, weights_only=True))
    return {"itself": wide, "deepcopy": copy.deepcopy(wide), "pickle": pickle.loads(pickle.dumps(wide)),
            "layers in a new container": nn.Sequential(*wide), "mean": posterior_mean_network(wide),
            "made Bayesian again": with_posteriors(posterior_mean_network(wide)), "half": copy.deepcopy(wide).half(),
            "state_dict": loaded, "file": from_file, "checkpoint": checkpointed}


def same(one: NetworkAction, other: NetworkAction) -> bool:
    return one.layers == other.layers and one.parameters.keys() == other.parameters.keys() and all(
        rule.agrees_with(other.parameters[name]) for name, rule in one.parameters.items())


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_the_action_is_that_of_the_arrangement(arrangement):
    """Of row_rolled it is another than of the others: the drift of an invariant expansion under that is not 0."""
    network, action = rolled_cnn()
    wide, acting = expand(network, action, arrangement)
    for how, its in copied(wide, network, action).items():
        assert arrangement_of(its) == arrangement, how
        assert same(expanded_action(its, action), acting), how
    others = {name: expand(network, action, name).action for name in ARRANGEMENTS}
    assert all(same(acting, others[name]) == ("row_rolled" not in (name, arrangement) or name == arrangement)
               for name in ARRANGEMENTS)


class StatesItsWidth(nn.Module):
    """A forward pass that depends on how many channels there are."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 3), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.second(torch.relu(self.first(x)))
        return self.head(torch.relu(x) if self.first.out_features < 4 else x.cumsum(1))


def test_what_is_returned_is_what_was_read():
    network = StatesItsWidth()
    with pytest.raises(Refusal, match="does not depend on the order of channels"):
        expand(network, network_action(network, S4))


def test_an_action_of_the_same_names_and_shapes_is_told_apart():
    """Pixels in another order: every tensor has the shape that the action expects."""
    network = mlp(out=3)
    turned = network_action(network, rotations().on(2, 2).flattened())
    mixed = dataclasses.replace(turned, parameters={**turned.parameters, "0.weight": network_action(
        network, rotations().on(2, 2).flattened().pulled_back(Cyclic(4), lambda g: -g % 4)).parameters["0.weight"]})
    with pytest.raises(Refusal, match="hidden channels that stay"):
        expand(network, mixed)
    expand(network, turned)


def without_marks(state: dict) -> dict:
    return {name: tensor for name, tensor in state.items() if not name.endswith(ARRANGEMENT)}


def strip(network: nn.Module) -> nn.Module:
    """Without marks, as a network that was built by hand."""
    for module in network.modules():
        module._buffers.pop(ARRANGEMENT, None)
        module._load_state_dict_pre_hooks.clear()
    return network


def test_a_network_without_a_mark():
    """Its arrangement is asked for where the action depends on it, and the fix that is named works."""
    network, action = rolled_cnn()
    wide, acting = expand(network, action, "row_rolled")
    bare = strip(copy.deepcopy(wide))
    with pytest.raises(Refusal, match=r'expand\(network, action, "row_rolled"\).*load the weights'):
        expanded_action(bare, action)
    mended = expand(network, action, "row_rolled").network
    mended.load_state_dict(bare.state_dict())  # an older state_dict, without marks
    assert same(expanded_action(mended, action), acting)
    assert drift(mended, acting).relative < 1e-12
    one_hidden = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.ReLU(), nn.Linear(3, 2))
    flat = network_action(one_hidden, field(rotations(), (1, 8, 8)))
    for arrangement in ARRANGEMENTS:
        wide, acting = expand(one_hidden, flat, arrangement)
        assert same(expanded_action(strip(wide), flat), acting)
    wide, acting = expand(*CASES["cnn D4"]())
    assert same(expanded_action(strip(wide), CASES["cnn D4"]()[1]), acting)  # not abelian, so never row_rolled


def test_an_arrangement_that_a_group_does_not_have():
    network, action = rolled_cnn()
    wide, by_flips = expand(network, action, "row_rolled").network, field(rotations_and_flips(), (1, 8, 8))
    with pytest.raises(Refusal, match="abelian"):
        expanded_action(wide, network_action(network, by_flips))


def test_older_states_are_loaded_and_contradictions_refused():
    network, action = rolled_cnn()
    wide, other = (expand(network, action, "block_diagonal").network for _ in range(2))
    other.load_state_dict(without_marks(wide.state_dict()))
    load_tensors(other, without_marks(wide.state_dict()))
    assert arrangement_of(other) == "block_diagonal" and arrangement_of(network) is None
    bare = strip(expand(network, action, "regular").network)
    load_tensors(bare, wide.state_dict())
    assert arrangement_of(bare) == "block_diagonal"
    mixed = nn.Sequential(*wide[:3], *expand(network, action, "row_rolled").network[3:])
    with pytest.raises(Refusal, match="block_diagonal and row_rolled"):
        expanded_action(mixed, action)
    next(buffer for name, buffer in wide.named_buffers() if name.endswith(ARRANGEMENT)).fill_(9)
    with pytest.raises(Refusal, match="number 9"):
        arrangement_of(wide)


WRONG_REQUESTS = {
    "input action": (lambda wide, action: (wide, action.input), r"network_action\(network, action\)"),
    "no action": (lambda wide, action: (wide, None), r"network_action\(network, action\)"),
    "swapped": (lambda wide, action: (action, wide), "arguments in another order"),
    "no network": (lambda wide, action: (None, action), "a torch network"),
    "in a container": (lambda wide, action: (nn.Sequential(nn.Identity(), wide), action), r"expand\(network"),
}


@pytest.mark.parametrize("case", WRONG_REQUESTS)
def test_wrong_arguments(case):
    network, action = rolled_cnn()
    arguments, fix = WRONG_REQUESTS[case]
    with pytest.raises(Refusal, match=fix):
        expanded_action(*arguments(expand(network, action).network, action))
    if "container" not in case:
        with pytest.raises(Refusal, match=fix):
            expand(*arguments(network, action))
