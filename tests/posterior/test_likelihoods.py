"""Likelihoods against torch.distributions, and what they refuse."""
import pytest
import torch
from torch import nn

from helpers import seeded
from symbnn.equivariance.conditions import violations
from symbnn.errors import Refusal
from symbnn.posterior.layers import with_posteriors
from symbnn.posterior.likelihoods import Bernoulli, Categorical, Poisson
from symbnn.posterior.real_targets import Gaussian, HeteroscedasticGaussian, StudentT, heteroscedastic_action
from symbnn.symmetry.actions import natural_action, regular_channels
from symbnn.symmetry.fields import field, rotations
from symbnn.symmetry.groups import Cyclic
from symbnn.symmetry.hyperoctahedral import Signed
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


def test_likelihoods_say_how_they_were_made_and_not_what_they_learned():
    assert Gaussian(0.3).described() == "Gaussian(noise=0.3)"
    assert repr(Categorical(-1)) == "Categorical(ignore_index=-1)"
    learned = [Gaussian(noise, learn=True) for noise in (0.3, 0.4)]
    assert learned[0].described() == learned[1].described() != Gaussian(torch.ones(2), learn=True).described()
    assert StudentT(0.3, nan_is_missing=True).described() == "StudentT(noise=0.3, df=4.0, nan_is_missing=True)"


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


DRAWS = {  # likelihood, shape of outputs for one datum, targets
    "bernoulli": (Bernoulli(), (3,), torch.tensor([[0.0, 1, 1], [1, 0, 0]])),
    "bernoulli of whole numbers": (Bernoulli(), (1,), torch.tensor([[0], [1]])),
    "poisson": (Poisson(), (2, 2), torch.tensor([[[0.0, 3], [1, 2]]] * 2)),
    "student": (StudentT(0.7, df=3.0), (2,), torch.tensor([[0.3, -2.0], [5.0, 0.1]])),
    "gaussian": (Gaussian(0.2), (2,), torch.tensor([[0.3, -2.0], [5.0, 0.1]])),
}


@pytest.mark.parametrize("name", DRAWS)
def test_log_probabilities_are_those_of_torch_distributions(name):
    likelihood, shape, targets = DRAWS[name]
    targets = targets.double() if targets.is_floating_point() else targets
    outputs = torch.randn(3, 2, *shape, generator=seeded(), dtype=torch.float64)
    likelihood.check_targets(targets, shape)
    expected = likelihood.distribution(outputs).log_prob(targets.double()).flatten(2).sum(-1)
    assert_close(likelihood.log_prob(outputs, targets), expected)
    assert_close(likelihood.mean(outputs), likelihood.distribution(outputs).mean)


def test_means_and_variances_agree_with_samples():
    outputs = torch.tensor([0.4, -0.3], dtype=torch.float64).expand(1, 200_000, 2)
    torch.manual_seed(0)
    for likelihood in (Bernoulli(), Poisson(), Gaussian(0.5), StudentT(0.5, df=9.0)):
        draws = likelihood.distribution(outputs).sample()
        mean, variance = likelihood.mean(outputs)[0, 0], likelihood.variance(outputs)[0, 0]
        error = (variance / draws.shape[1]).sqrt()
        assert bool(((draws.mean(1)[0] - mean).abs() < 4 * error).all())
        spread = (draws[0] - mean).square()
        assert bool(((spread.mean(0) - variance).abs() < 4 * spread.std(0) / draws.shape[1]**0.5).all())


def test_labels_of_every_pixel_with_the_classes_first_or_last():
    logits = torch.randn(2, 3, 4, 5, 6, generator=seeded(), dtype=torch.float64)
    labels = torch.randint(0, 4, (3, 5, 6), generator=seeded(1))
    expected = torch.distributions.Categorical(logits=logits.movedim(2, -1)).log_prob(labels).flatten(2).sum(-1)
    assert_close(Categorical().log_prob(logits, labels), expected)
    assert_close(Categorical(class_axis=-1).log_prob(logits.movedim(2, -1), labels), expected)
    missing = labels.clone()
    missing[0, 0] = 255
    known = torch.distributions.Categorical(logits=logits[:, 0, :, 1:].movedim(1, -1)).log_prob(labels[0, 1:])
    assert_close(Categorical(255).log_prob(logits, missing)[:, 0], known.flatten(1).sum(-1))
    with pytest.raises(Refusal, match="one integer label"):
        Categorical().log_prob(logits, missing)


@pytest.mark.parametrize("make", [Gaussian, StudentT], ids=["gaussian", "student"])
def test_missing_targets_add_nothing_and_have_no_gradient(make):
    outputs = torch.randn(2, 3, 2, generator=seeded(), dtype=torch.float64).requires_grad_()
    targets = torch.randn(3, 2, generator=seeded(1), dtype=torch.float64)
    targets[1] = targets[2, 0] = float("nan")
    found = make(0.3, nan_is_missing=True).log_prob(outputs, targets)
    found.sum().backward()
    assert found[:, 1].abs().max() == 0 and outputs.grad[:, 1].abs().max() == 0 == outputs.grad[:, 2, 0].abs().max()
    assert outputs.grad.isfinite().all() and (outputs.grad[:, 0] != 0).all()
    assert_close(found[:, 2], make(0.3).log_prob(outputs[:, 2:, 1:], targets[2:, 1:])[:, 0])
    whole = HeteroscedasticGaussian(True).log_prob(torch.cat([outputs, outputs], 2), targets)
    assert whole[:, 1].abs().max() == 0 and whole.isfinite().all()


def test_targets_move_so_that_likelihoods_stay():
    turn = field(rotations(), (3, 4, 4))
    signs = natural_action(Signed(2))
    for likelihood, action, targets in (
        (Categorical(-1), turn, torch.randint(-1, 3, (5, 4, 4), generator=seeded())),
        (Categorical(), regular_channels(Cyclic(4)), torch.tensor([0, 1, 2, 3])),
        (Bernoulli(), signs, torch.tensor([[0, 1], [1, 1]])),
        (Bernoulli(), signs, torch.tensor([[False, True], [True, True]])),
        (Gaussian(0.2), signs, torch.randn(4, 2, generator=seeded())),
        (Gaussian(0.2, nan_is_missing=True), signs, torch.tensor([[float("nan"), 1.0]])),
        (HeteroscedasticGaussian(), heteroscedastic_action(signs), torch.randn(4, 2, generator=seeded())),
        (Poisson(), regular_channels(Cyclic(3)), torch.tensor([[0.0, 4.0, 2.0]])),
    ):
        outputs = torch.randn(2, len(targets), *action.shape, generator=seeded(1), dtype=torch.float64)
        before = likelihood.log_prob(outputs, targets)
        for g in action.group.elements():
            moved = likelihood.move(action, g, targets)
            assert moved.dtype == targets.dtype and moved.shape == targets.shape
            assert_close(likelihood.log_prob(action.act(g, outputs), moved), before)


@pytest.mark.parametrize("likelihood", [Categorical(), Poisson()], ids=repr)
def test_signs_that_nothing_can_have_are_refused(likelihood):
    with pytest.raises(Refusal, match="which changes signs"):
        likelihood.move(natural_action(Signed(2)), natural_action(Signed(2)).group.generators()[-1], torch.zeros(3, 2))


@pytest.mark.parametrize(("likelihood", "shape", "targets", "reason"), [
    (Categorical(), (3,), torch.tensor([0, 3]), "labels from 0 to 3"),
    (Categorical(), (3,), torch.tensor([0, -100]), "ignore_index=-100"),
    (Categorical(-1), (3,), torch.tensor([-1, -1]), "not ignored"),
    (Categorical(), (3,), torch.eye(3)[:2], "one-hot"),
    (Categorical(), (1,), torch.tensor([0, 1]), "Bernoulli"),
    (Bernoulli(), (1,), torch.tensor([0, 1]), r"targets\[:, None\]"),
    (Bernoulli(), (1,), torch.tensor([[-1.0], [1]]), "labels -1 and 1"),
    (Bernoulli(), (1,), torch.tensor([[float("nan")]]), "targets 0 or 1"),
    (Poisson(), (1,), torch.tensor([[0.5]]), "counts"), (Poisson(), (1,), torch.tensor([[-1.0]]), "counts"),
    (Poisson(), (1,), torch.tensor([[float("nan")]]), "counts"),
    (Gaussian(0.1), (1,), torch.tensor([0.1]), r"targets\[:, None\]"),
    (Gaussian(0.1), (2,), torch.zeros(3, 1), "shape"),
    (Gaussian(0.1), (1,), torch.tensor([[1]]), "Categorical"),
    (Gaussian(0.1), (1,), torch.tensor([[float("nan")]]), "nan_is_missing"),
    (Gaussian(0.1, nan_is_missing=True), (1,), torch.tensor([[float("inf")]]), "infinite"),
    (Gaussian(torch.ones(3)), (2,), torch.zeros(4, 2), "noise of shape"),
    (HeteroscedasticGaussian(), (3,), torch.zeros(4, 1), "even number"),
    (HeteroscedasticGaussian(), (2,), torch.zeros(4, 2), "shape"),
], ids=str)
def test_targets_that_do_not_belong_to_a_likelihood_are_refused(likelihood, shape, targets, reason):
    with pytest.raises(Refusal, match=reason):
        likelihood.check_targets(targets, shape)


@pytest.mark.parametrize("wrong", [lambda: Categorical(class_axis=2), lambda: Categorical("none"),
                                   lambda: StudentT(0.1, df=0.0), lambda: StudentT(-1.0)])
def test_settings_of_likelihoods_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(Refusal):
        wrong()
