"""Likelihoods against torch.distributions, and what they refuse."""
import pytest
import torch
from torch import nn

from helpers import seeded
from symbnn.equivariance.conditions import violations
from symbnn.errors import Refusal
from symbnn.posterior.layers import with_posteriors
from symbnn.posterior.likelihoods import Categorical, Gaussian
from symbnn.symmetry.actions import regular_channels
from symbnn.symmetry.groups import Cyclic
from symbnn.symmetry.networks import network_action
from tolerances import assert_close


def reference(outputs, targets, noise):
    return torch.distributions.Normal(outputs, noise).log_prob(targets).flatten(2).sum(-1)


def test_gaussian_likelihood():
    outputs = torch.randn(3, 5, 2, generator=seeded(), dtype=torch.float64)
    targets = torch.randn(5, 2, generator=seeded(1), dtype=torch.float64)
    expected = torch.distributions.Normal(outputs, 0.7).log_prob(targets)
    assert_close(Gaussian(0.7).log_prob(outputs, targets), expected.sum(-1))
    assert_close(Gaussian(0.7).log_prob(outputs[..., 0], targets[:, 0]), expected[..., 0])


@pytest.mark.parametrize("shape", [(), (1,), (2,), (4, 1), (1, 2), (4, 2)], ids=str)
def test_a_tensor_of_noise_and_its_gradients(shape):
    outputs = torch.randn(3, 5, 4, 2, generator=seeded(), dtype=torch.float64).requires_grad_()
    targets = torch.randn(5, 4, 2, generator=seeded(1), dtype=torch.float64)
    noise = (0.3 + torch.rand(shape, generator=seeded(2), dtype=torch.float64)).requires_grad_()
    likelihood = Gaussian(noise)
    found, expected = likelihood.log_prob(outputs, targets), reference(outputs, targets, noise)
    assert_close(found, expected)
    weights = torch.randn(3, 5, generator=seeded(3), dtype=torch.float64)
    slopes = [torch.autograd.grad((weights * each).sum(), [outputs, noise]) for each in (found, expected)]
    for mine, true in zip(*slopes):
        assert_close(mine, true, 1e-11)  # sums of some hundred terms of order ten
    curved = torch.randn(2, 3, generator=seeded(4), dtype=torch.float64).requires_grad_()
    one = (0.5 + torch.rand(3, generator=seeded(5), dtype=torch.float64)).requires_grad_()
    torch.autograd.gradcheck(lambda f, s: Gaussian(s).log_prob(f[None], targets[:2, :3, 0]), (curved, one))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("of_outputs", [torch.float32, torch.float64])
def test_noise_of_another_type_or_a_number_is_the_same_noise(dtype, of_outputs):
    outputs, targets = torch.zeros(1, 2, 3, dtype=of_outputs), torch.ones(2, 3, dtype=of_outputs)
    found = Gaussian(torch.tensor(2, dtype=dtype)).log_prob(outputs, targets)
    assert found.dtype == of_outputs
    assert torch.equal(found, Gaussian(2.0).log_prob(outputs, targets))
    assert torch.equal(found, Gaussian(torch.full((3,), 2, dtype=dtype)).log_prob(outputs, targets))
    assert Gaussian(1e-200).log_prob(targets[None].double(), targets.double()).isfinite().all()  # its square is 0


@pytest.mark.parametrize("shape", [(), (2,)], ids=str)
def test_a_learned_noise_reaches_the_maximum_of_likelihood(shape):
    outputs = torch.zeros(1, 50, 2, dtype=torch.float64)
    targets = torch.randn(50, 2, generator=seeded(8), dtype=torch.float64) * torch.tensor([3.0, 0.2])
    best = targets.square().mean((0, 1) if shape == () else 0).sqrt()  # closed form
    log_noise = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_noise], max_iter=100, tolerance_grad=1e-12, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        value = -Gaussian(log_noise.exp()).mean_log_likelihood(outputs, targets)
        value.backward()
        return value

    optimiser.step(loss)
    assert_close(log_noise.exp(), best, 1e-8)  # of an optimiser


@pytest.mark.parametrize("noise, outputs", [
    ((5,), (3, 5)),  # one for each datum
    ((1,), (3, 5)), ((3, 1, 1), (3, 5, 2)), ((5, 2), (3, 5, 2)), ((2,), (3, 5, 1)), ((3,), (3, 5, 2)),
], ids=str)
def test_noise_that_does_not_belong_to_the_coordinates_of_a_target_is_refused(noise, outputs):
    with pytest.raises(Refusal, match=r"one for each coordinate.*Fix: noise of shape"):
        Gaussian(torch.ones(noise)).log_prob(torch.zeros(outputs), torch.zeros(outputs[1:]))


@pytest.mark.parametrize("noise", [
    [0.1, 0.2], "0.3", None, 1j, float("inf"), torch.tensor(0.0), torch.tensor([0.3, -0.1]), torch.tensor([]),
    torch.tensor(float("nan")), torch.tensor([1.0, float("inf")]), torch.tensor(1j),
], ids=str)
def test_noise_that_is_no_standard_deviation_is_refused(noise):
    with pytest.raises(Refusal, match="positive standard deviation"):
        Gaussian(noise)


def test_noise_that_has_become_negative_is_refused():
    noise = torch.tensor([0.3, 0.2])
    likelihood = Gaussian(noise)
    noise[1] = -0.1
    with pytest.raises(Refusal, match="positive standard deviation"):
        likelihood.log_prob(torch.zeros(1, 4, 2), torch.zeros(4, 2))


def test_likelihoods_can_be_compared_and_hashed():
    noise = torch.ones(3)
    assert Gaussian(0.3) == Gaussian(0.3) and hash(Gaussian(0.3)) == hash(Gaussian(0.3))
    assert Gaussian(0.3) != Gaussian(0.4) and Gaussian(0.3) != Categorical() and Gaussian(1.0) != Gaussian(noise)
    assert Gaussian(noise) == Gaussian(noise) and hash(Gaussian(noise)) == hash(Gaussian(noise))
    assert Gaussian(noise) != Gaussian(noise.clone()) and len({Gaussian(noise), Gaussian(noise), Gaussian(0.3)}) == 2


@pytest.mark.parametrize(("outputs", "fix"), [
    ((2, 3, 1), r"nn\.Linear\(features, 2\)"), ((2, 3), r"nn\.Linear\(features, 2\)"),
    ((2, 3, 4, 5), r"x\.mean\(1\)"), ((2, 3, 4, 5, 6), r"AdaptiveAvgPool2d"),
], ids=str)
def test_outputs_that_are_no_logits_of_classes_are_refused(outputs, fix):
    with pytest.raises(Refusal, match=rf"at least two classes.*{fix}"):
        Categorical().log_prob(torch.zeros(outputs), torch.zeros(3, dtype=torch.int64))


def commuting(dtype=torch.float64, **noise):
    """What fails of a network whose three outputs are moved in a circle, for a Gaussian likelihood."""
    cycle = regular_channels(Cyclic(3))
    network = with_posteriors(nn.Linear(3, 3).double())
    action = network_action(nn.Linear(3, 3), cycle, output=cycle)
    x = torch.randn(4, 3, generator=seeded(), dtype=torch.float64)
    x, y = (torch.cat([cycle.act(g, each) for g in range(3)]) for each in (x, x.square()))
    return violations(network, action, x, y, likelihood=Gaussian(torch.tensor(**noise, dtype=dtype)))


def test_noise_has_to_commute_with_the_action_on_outputs():
    for same in (0.5, [0.5], [0.5, 0.5, 0.5]):
        assert commuting(data=same) == {}
    fault = commuting(data=[0.5, 0.5, 0.6])
    assert list(fault) == ["likelihood"] and "the same along each orbit of output coordinates" in fault["likelihood"]


@pytest.mark.parametrize("labels, message", [
    ([0, 1, -100], "labels from -100 to 1"),  # torch's cross-entropy counts this one as explained perfectly
    ([0, 1, 4], "labels from 0 to 4"),
    ([0, 1], "shape \\(2,\\)"),
    ([0.0, 1.0, 2.0], "float32"),
    ([[1, 0, 0, 0]] * 3, "one-hot"),
], ids=str)
def test_labels_that_are_none_are_refused(labels, message):
    with pytest.raises(Refusal, match=message):
        Categorical().log_prob(torch.zeros(2, 3, 4), torch.tensor(labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_likelihoods_of_half_precision_outputs_are_added_up_in_single(dtype):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 70_000, 10, generator=generator).to(dtype), torch.arange(70_000) % 10
    outputs, targets = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((2, 4, 300), (4, 300)))
    for likelihood, half, y in ((Categorical(), logits, labels), (Gaussian(0.05), outputs, targets)):
        found, expected = (likelihood.sum_log_likelihood(x, t).double() for x, t in ((half, y), (
            half.double(), y.double() if y.is_floating_point() else y)))
        assert found.isfinite() and abs(found - expected) <= 1e-4 * abs(expected)


def test_complex_labels_are_refused():
    with pytest.raises(Refusal, match="one integer label"):
        Categorical().log_prob(torch.zeros(1, 3, 2), torch.zeros(3, dtype=torch.complex64))
