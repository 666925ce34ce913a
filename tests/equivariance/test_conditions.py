"""Four conditions and augmentation: what an invariant posterior predicts, and which condition fails with what loss."""

import math
import re

import pytest
import torch
from torch import nn

from helpers import normal, seeded
from helpers_equivariance import (
    BROKEN,
    CYCLE,
    PLANE,
    augmented,
    closed_noise,
    each_case,
    gap_of,
    network_of,
    noise_of,
    posteriors,
    transported,
)
from late import ORDERS, reordered
from symbnn.equivariance.conditions import moved_tensors, violations
from symbnn.errors import Refusal
from symbnn.posterior.block_gaussian import BlockGaussian
from symbnn.posterior.elbo import elbo
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.layers import variational_tensors, with_posteriors
from symbnn.posterior.likelihoods import Categorical
from symbnn.posterior.log_normal import LogNormal
from symbnn.posterior.priors import isotropic, random_means
from symbnn.posterior.real_targets import Gaussian
from symbnn.posterior.sampling import apply_weights, sample_weights
from symbnn.symmetry.actions import Action, natural_action
from symbnn.symmetry.groups import Cyclic, Permutations
from symbnn.symmetry.networks import network_action
from symbnn.symmetry.signed_permutations import SignedPermutation
from tolerances import assert_close, standard_errors, within_standard_errors

CLASSES = Categorical()
MIRRORED = Action(Cyclic(4), (1,), lambda g: SignedPermutation(torch.zeros(1), torch.tensor([(-1) ** g])), "sign")


@each_case
@pytest.mark.parametrize("family", [MeanFieldGaussian, Laplace, FullGaussian])
def test_turning_the_input_moves_the_posterior(case, family):
    network, action = network_of(case, family)
    x = normal(4, *action.input.shape)
    weights = {name: draw.detach() for name, draw in sample_weights(network, 7, seeded(1)).items()}

    def predictive_mean(inputs, draws):
        return apply_weights(network, inputs, draws).softmax(-1).mean(0)

    for g in action.group.elements():
        there = predictive_mean(action.input.act(g, x), weights)
        here = predictive_mean(x, action.act(action.group.inverse(g), weights))
        assert_close(there, action.output.act(g, here))
        if case == "hidden units":
            assert_close(there, predictive_mean(x, weights))  # a weight-space symmetry: no posterior predicts otherwise


@each_case
@pytest.mark.parametrize("family", [MeanFieldGaussian, Laplace])
def test_draws_of_the_push_forward_are_moved_draws(case, family):
    network, action = network_of(case, family)
    noise = noise_of(network, 3)
    for g in action.group.elements():
        for name, posterior in posteriors(network).items():
            move = action.parameters[name]
            pushed = posterior.push_forward(move(g))
            assert_close(pushed.transport(move.act(g, noise[name])), move.act(g, posterior.transport(noise[name])))


def test_the_exact_posterior_of_linear_regression():
    x, y = normal(3, 4), normal(3, seed=1)
    turns = [CYCLE(g).matrix() for g in range(4)]

    def posterior(x, y):
        precision = x.mT @ x / 0.4**2 + torch.eye(4, dtype=torch.float64)
        return torch.linalg.solve(precision, x.mT @ y / 0.4**2), precision

    mean, precision = posterior(torch.cat([x @ turn.mT for turn in turns]), y.repeat(4))
    alone, alone_precision = posterior(x, y)
    for turn in turns[1:]:
        assert_close(turn @ mean, mean)
        assert_close(turn @ precision @ turn.mT, precision)
        assert (turn @ alone - alone).abs().max() > 0.1
        assert (turn @ alone_precision @ turn.mT - alone_precision).abs().max() > 0.1


class Stretched(nn.Identity):
    def forward(self, x):
        return torch.cat([4 * x[..., :1], x[..., 1:]], -1)


class Opposite(nn.Module):
    def forward(self, z):
        return torch.cat([z, -z], -1)


class ClassWeights(Categorical):
    def log_prob(self, outputs, targets):
        return torch.tensor([4.0, 1.0, 1.0, 1.0], dtype=outputs.dtype)[targets] * super().log_prob(outputs, targets)


def train_to_convergence(network, x, labels, noise, likelihood=CLASSES):
    optimiser = torch.optim.LBFGS(network.parameters(), max_iter=400, tolerance_grad=1e-10, tolerance_change=0,
                                  history_size=30, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        outputs = apply_weights(network, x, transported(network, noise))
        loss = -elbo(network, outputs, labels, len(x), likelihood=likelihood).elbo
        loss.backward()
        return loss

    optimiser.step(closure)
    closure()
    assert max(p.grad.abs().max() for p in network.parameters()) < 1e-7


def measured_gap(network, x, on_inputs, on_classes, draws=10_000):
    """Gaps of the predictive mean with common draws, as estimates and standard errors."""
    with torch.no_grad():
        weights = sample_weights(network, draws, seeded(9))
        turned = [apply_weights(network, x @ a.mT, weights).softmax(-1) @ b for a, b in zip(on_inputs, on_classes)]
    return gap_of(torch.stack(turned, 1).flatten(2))


def softmax_regression(family=MeanFieldGaussian, prior=None, likelihood=CLASSES, augment=True, front=nn.Identity,
                       start=None):
    """Four features and classes, shifted together; random start. Gap with its errors, and the conditions that fail."""
    linear = nn.Linear(4, 4).double()
    for k, p in enumerate(linear.parameters()):
        p.data = normal(*p.shape, seed=10 + k) if start is None else start(p)
    network = with_posteriors(nn.Sequential(front(), linear), family, scale=0.5, prior=prior)
    action = network_action(nn.Sequential(nn.Identity(), linear), CYCLE, output=CYCLE)
    x, labels = normal(6, 4, seed=12), torch.randint(4, (6,), generator=seeded(13))
    if augment:
        x, labels = augmented(action, x, labels)
    train_to_convergence(network, x, labels, closed_noise(network, action, 24), likelihood)
    turns = [CYCLE(g).matrix() for g in range(4)]
    found = measured_gap(network, normal(3, 4, seed=14), turns, turns)
    return *found, violations(network, action, x, labels, likelihood=likelihood)


def reflected(family, degrees):
    """Two classes in the plane, mirrored in a line at an angle; noise that rotations do not change."""
    a = math.radians(2 * degrees)
    mirror = torch.tensor([[math.cos(a), math.sin(a)], [math.sin(a), -math.cos(a)]], dtype=torch.float64)
    along = torch.tensor([math.cos(a / 2), math.sin(a / 2)], dtype=torch.float64)
    x = 3 * normal(8, 1, seed=15) * along + 0.3 * normal(8, 2, seed=16)
    labels = (x @ along > 0).long()
    network = with_posteriors(nn.Sequential(nn.Linear(2, 1, bias=False).double(), Opposite()), family, scale=0.5)
    circle = torch.arange(32, dtype=torch.float64) * 2 * math.pi / 32
    radii = torch.tensor([0.4, 0.8, 1.2, 1.6, 2.2], dtype=torch.float64)
    noise = radii[:, None, None] * torch.stack([circle.cos(), circle.sin()], -1)
    train_to_convergence(network, torch.cat([x, x @ mirror]), labels.repeat(2), {"0.weight": noise.reshape(-1, 1, 2)})
    unmoved = torch.eye(2, dtype=torch.float64)
    found = measured_gap(network, normal(3, 2, seed=17), [unmoved, mirror], [unmoved] * 2, draws=40_000)
    closed = network[0].weight.posterior.is_closed_under(mirror)
    return *found, {} if closed else {"family": closed.reason}


def constant(value):
    return lambda p: torch.full_like(p, value)


def random_signs(p):
    return torch.where(normal(*p.shape, seed=18) > 0, 0.5, -0.5).double()


HOLDING = {
    "all conditions": lambda: softmax_regression(),
    "log-normal, one sign": lambda: softmax_regression(LogNormal, start=constant(0.5)),
    "mean field, mirror at 45 degrees": lambda: reflected(MeanFieldGaussian, 45),
    "full covariance, mirror at 30 degrees": lambda: reflected(FullGaussian, 30),
}
FAILING = {
    "scaled feature": ({"intertwining"}, lambda: softmax_regression(front=Stretched)),
    "class weights": ({"likelihood"}, lambda: softmax_regression(likelihood=ClassWeights())),
    "random prior means": ({"prior"}, lambda: softmax_regression(prior=random_means(0))),
    "random signs": ({"family", "prior"}, lambda: softmax_regression(LogNormal, start=random_signs)),
    "no augmentation": ({"augmentation"}, lambda: softmax_regression(augment=False)),
    "mean field, mirror at 30 degrees": ({"family"}, lambda: reflected(MeanFieldGaussian, 30)),
}


@pytest.mark.parametrize("name", HOLDING)
def test_equivariant_where_all_conditions_hold(name):
    mean, error, failing = HOLDING[name]()
    assert failing == {}
    within_standard_errors(mean, torch.zeros_like(mean), error)
    assert error.max() < 0.01  # so that a gap worth speaking of would be seen


@pytest.mark.parametrize("name", FAILING)
def test_not_equivariant_where_one_fails(name):
    expected, experiment = FAILING[name]
    mean, error, failing = experiment()
    assert set(failing) == expected
    assert (mean.abs() / error).max() > BROKEN > standard_errors


def complete(case="C4 on images", family=MeanFieldGaussian):
    """A network, its action and augmented data; all conditions hold."""
    network, action = network_of(case, family)
    x, labels = augmented(action, normal(3, *action.input.shape), torch.tensor([0, 2, 1]))
    return network, action, x, labels


@each_case
@pytest.mark.parametrize("family", [MeanFieldGaussian, Laplace, BlockGaussian])
def test_no_violations(case, family):
    network, action, x, labels = complete(case, family)
    assert violations(network, action, x, labels) == {}
    assert violations(network.float(), action, x.float(), labels) == {}
    order = torch.randperm(len(x), generator=seeded())
    assert violations(network.double(), action, x[order], labels[order]) == {}


def test_a_weight_space_symmetry_needs_no_augmentation():
    network, action = network_of("hidden units")
    assert violations(network, action, normal(3, 3), torch.tensor([0, 2, 1])) == {}


def signed_regression(targets=None):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    action = network_action(plain, PLANE, output=MIRRORED)
    x, y = normal(3, 2), normal(3, 1, seed=1)
    x = torch.cat([PLANE.act(g, x) for g in range(4)])
    y = torch.cat([MIRRORED.act(g, y) for g in range(4)]) if targets is None else targets
    return violations(with_posteriors(plain), action, x, y, likelihood=Gaussian(0.3))


def test_targets_that_change_sign():
    assert signed_regression() == {}
    assert set(signed_regression(targets=normal(3, 1, seed=1).repeat(4, 1))) == {"augmentation"}
    assert signed_regression(targets=torch.zeros(12, 1, dtype=torch.float64)) == {}  # minus zero is zero


def test_on_a_gpu(require_cuda):
    network, action, x, labels = complete()
    assert violations(network.cuda(), action, x.cuda(), labels.cuda()) == {}
    assert set(violations(network, action, x[:-1].cuda(), labels[:-1].cuda())) == {"augmentation"}


def test_each_violation_has_its_reason():
    network, action, x, labels = complete()
    missing = violations(network, action, x[:-1], labels[:-1])
    assert set(missing) == {"augmentation"} and "g = 1" in missing["augmentation"]
    other = torch.where(torch.arange(12) == 4, (labels + 1) % 3, labels)
    assert set(violations(network, action, x, other)) == {"augmentation"}  # the images alone are closed
    doubled = torch.cat([x, x[:1]]), torch.cat([labels, labels[:1]])
    assert set(violations(network, action, *doubled)) == {"augmentation"}  # how often a pair occurs counts

    tensor = variational_tensors(network)["2.weight"]
    prior = tensor.prior
    tensor.prior = random_means(1)("2.weight", tensor.posterior)
    reason = violations(network, action, x, labels)
    assert set(reason) == {"prior"} and "'2.weight'" in reason["prior"] and "nats" in reason["prior"]
    tensor.prior = prior
    tensor.prior.log_scale.data = tensor.prior.log_scale.expand(tensor.prior.shape).clone()
    tensor.prior.log_scale.data[0, 0, 0, 0] += 1e-3
    assert set(violations(network, action, x, labels)) == {"prior"}

    network, action, x, labels = complete()
    network[2].weight.posterior = LogNormal.initial(network[2].weight.posterior.mean, 0.1)
    reason = violations(network, action, x, labels)
    assert set(reason) == {"family"} and "LogNormal of '2.weight'" in reason["family"]
    network[2].weight.prior = isotropic()("2.weight", network[2].weight.posterior)  # with the same signs
    assert "leaves its family" in violations(network, action, x, labels)["prior"]


class Shaded(nn.ReLU):
    """An activation that knows where it is: its threshold grows from left to right, by a millionth."""

    def forward(self, x):
        return super().forward(x - 1e-6 * torch.arange(x.shape[-1], dtype=x.dtype))


class Weighted(Gaussian):
    """A Gaussian that knows the last output better than the others."""

    def log_prob(self, outputs, targets):
        return super().log_prob(outputs * torch.tensor([1, 1, 2]), targets * torch.tensor([1, 1, 2]))


@pytest.mark.parametrize("order", ORDERS)
def test_every_generator_is_asked_for_violations(order):
    """S3 on three inputs and three outputs; what the exchange of two leaves in place and the cycle does not."""
    acting = reordered(natural_action(Permutations(3)), order)
    network = with_posteriors(nn.Linear(3, 3).double(), prior=isotropic(1.0))
    action = network_action(network, acting, output=acting)
    x = torch.stack([acting.act(g, torch.tensor([1.0, 2.0, 4.0]).double()) for g in acting.group.elements()])
    assert violations(network, action, x, x, likelihood=Gaussian(1.0)) == {}

    assert set(violations(network, action, x, x, likelihood=Weighted(1.0))) == {"likelihood"}
    two = torch.tensor([[1.0, 2.0, 4.0], [2.0, 1.0, 4.0]]).double()
    assert set(violations(network, action, two, two, likelihood=Gaussian(1.0))) == {"augmentation"}
    assert set(violations(network, action, x, x * torch.tensor([1, 1, 2]), likelihood=Gaussian(1.0))) == {
        "augmentation"}

    bias = variational_tensors(network)["bias"]
    uneven = torch.tensor([0.0, 0.0, 1.0]).double()
    bias.prior = MeanFieldGaussian(uneven, torch.zeros(3).double(), trainable=False)
    (reason,) = violations(network, action, x, x, likelihood=Gaussian(1.0)).values()
    assert float(re.search(r"is ([\d.]+) nats", reason)[1]) == 1.0  # (1 + 1) / 2 after the cycle, 0 after the exchange
    bias.prior = isotropic(1.0)("bias", bias.posterior)
    bias.posterior = LogNormal(uneven, uneven, torch.tensor([1, 1, -1]))
    bias.prior = isotropic(1.0)("bias", bias.posterior)
    assert {"family"} <= set(violations(network, action, x, x, likelihood=Gaussian(1.0))) <= {"family", "prior"}


def test_an_action_that_does_not_intertwine():
    network, action, x, labels = complete()
    other = nn.Sequential(*[nn.GELU() if isinstance(layer, nn.ReLU) else layer for layer in network])
    assert violations(other, action, x, labels) == {}  # any pointwise activation
    network[1] = Shaded()
    reason = violations(network, action, x, labels)
    assert set(reason) == {"intertwining"} and "differs" in reason["intertwining"]


def test_refusals():
    _, action, x, labels = complete()
    plain = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    signed, zeros = network_action(plain, PLANE, output=PLANE), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(Refusal, match="permute"):
        violations(with_posteriors(plain), signed, normal(4, 2), zeros)
    linear = with_posteriors(nn.Sequential(nn.Linear(2, 3)).double())
    with pytest.raises(Refusal, match=r"'0.weight' of shape \(3, 2\) in the network, of shape \(3, 1, 3, 3\) in the"):
        violations(linear, action, x, labels)
    with pytest.raises(Refusal, match=r"'weight' of shape .* unknown to the action.*derived from another network"):
        violations(with_posteriors(nn.Linear(2, 3).double()), action, x, labels)
    with pytest.raises(Refusal, match="posteriors"):
        violations(nn.Linear(2, 3), action, x, labels)
    own = network_action(linear, Action.trivial(Cyclic(2), (2,)))  # as the refusals advise
    assert set(moved_tensors(linear, own)) == {"0.weight", "0.bias"}


def test_labels_move_as_unit_vectors_do():
    labels = torch.tensor([0, 3, 1, 2, 2])
    for g in range(4):
        moved = CYCLE.act(g, nn.functional.one_hot(labels, 4).double())
        assert torch.equal(Categorical().move(CYCLE, g, labels), moved.argmax(-1))
    assert torch.equal(Categorical().move(CYCLE, 1, torch.tensor([0])), torch.tensor([1]))
    assert_close(Gaussian(1.0).move(PLANE, 1, torch.tensor([[1.0, 2.0]])), torch.tensor([[-2.0, 1.0]]))
