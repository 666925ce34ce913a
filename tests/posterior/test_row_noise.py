"""Noise of single examples: flipout and local reparameterisation."""
import pytest
import torch
from torch import nn

from helpers import seeded
from helpers_posterior import Residual, small_cnn, weighted_inputs
from symbnn.errors import Refusal
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.layers import variational_tensors, with_posteriors
from symbnn.posterior.log_normal import LogNormal
from symbnn.posterior.sampling import forward, sample_weights
from tolerances import assert_close, within_standard_errors


def test_local_is_exact_for_the_head_and_does_not_touch_convolutions():
    network = with_posteriors(small_cnn(), scale=0.3)
    x = torch.randn(1, 1, 8, 8, generator=seeded(), dtype=torch.float64)
    many = x.expand(6000, -1, -1, -1)  # each row its own draw in both estimators
    split, local = (forward(network, many, len(many), name, seeded(1))[0].detach() for name in ("split", "local"))
    error = 2 * split.var(0) * (4 / 6000) ** 0.5  # heavy tails: twice a Gaussian's error of a difference of variances
    within_standard_errors(local.var(0), split.var(0), error)
    within_standard_errors(local.mean(0), split.mean(0), (split.var(0) * 2 / 6000).sqrt())


def test_local_refuses_a_layer_used_twice_and_leaves_sequences_to_split():
    with pytest.raises(Refusal, match="used twice"):
        forward(with_posteriors(Residual()), torch.randn(4, 5), 2, "local")
    network, x = with_posteriors(nn.Linear(3, 2)), torch.randn(4, 6, 3)
    assert torch.equal(forward(network, x, 2, "local", seeded()), forward(network, x, 2, "split", seeded()))


class Several(nn.Module):
    """Sums what one linear layer makes of the vectors of an example, folded into its rows or in one call each."""

    def __init__(self, folded, bias):
        super().__init__()
        self.layer, self.folded = nn.Linear(2, 1, bias=bias), folded

    def forward(self, x):
        if self.folded:
            return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]).sum(1)
        return sum(self.layer(vector) for vector in x.unbind(1))


@pytest.mark.parametrize("folded", [True, False], ids=["folded", "calls"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("estimator", ["whole", "split", "flipout", "local"])
def test_weights_that_an_example_meets_several_times_are_the_same_weights(folded, bias, estimator):
    network = with_posteriors(Several(folded, bias).double(), scale=0.5)
    x = torch.randn(1, 3, 2, generator=seeded(), dtype=torch.float64)
    many = x.expand(6000, -1, -1)
    draws = {"whole": 1, "split": 6000, "flipout": 1, "local": 6000}[estimator]
    if estimator == "local" and not folded:
        with pytest.raises(Refusal, match="used twice"):
            forward(network, many, draws, estimator)
        return
    if draws == 1:  # an independent draw for each repetition
        out = forward(network, x, 6000, estimator, seeded(1)).detach()[:, 0, 0]
    else:
        out = forward(network, many, draws, estimator, seeded(1)).detach()[0, :, 0]
    exact = 0.25 * (x.sum(1).square().sum() + 9 * bias)  # Var sum_t (w x_t + b), standard deviation 0.5
    within_standard_errors(out.var(), exact, exact * (2 / 6000) ** 0.5)


def test_local_draws_the_output_of_a_layer_without_bias():
    network, x = with_posteriors(nn.Linear(3, 2, bias=False).double(), scale=0.5), torch.ones(1, 3, dtype=torch.float64)
    out = forward(network, x.expand(6000, -1), 1, "local", seeded(1)).detach()[0]  # one draw, and yet no two rows equal
    exact = torch.full((2,), 3 * 0.25, dtype=torch.float64)
    within_standard_errors(out.var(0), exact, exact * (2 / 6000) ** 0.5)


def test_local_is_the_standard_deviation_times_the_noise_number_by_number():
    network, x = weighted_inputs()
    x = torch.cat([x, -2 * x, torch.zeros_like(x), torch.randn(5, 3, generator=seeded(), dtype=torch.float64)])
    weight, bias = (tensor.posterior for tensor in variational_tensors(network).values())
    exact = (x.square() @ weight.variance.T + bias.variance).sqrt()
    centred = forward(network, x, 1, "local", seeded(4))[0] - (x @ weight.mean.T + bias.mean)
    source = seeded(4)
    sample_weights(network, 1, source)  # what comes from the generator before
    noise = torch.randn(8, 2, generator=source, dtype=torch.float64)
    assert_close(centred / noise, exact)


def test_flipout_refuses_rows_that_belong_to_no_example():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x):
            return self.layer(x[::2])

    with pytest.raises(Refusal, match="no row for each row"):
        forward(with_posteriors(Halves()), torch.zeros(4, 2), 1, "flipout")


@pytest.mark.parametrize("family", [LogNormal, FullGaussian])
def test_flipout_refuses_families_whose_noise_depends_on_signs(family):
    with pytest.raises(Refusal, match="flipout"):
        forward(with_posteriors(nn.Linear(2, 2), family=family), torch.zeros(3, 2), 1, "flipout")


def test_flipout_rows_have_the_right_marginal_law():
    network = with_posteriors(nn.Conv2d(2, 2, 2).double(), scale=0.5)
    x = torch.randn(1, 2, 3, 3, generator=seeded(), dtype=torch.float64)
    whole = forward(network, x, 20_000, "whole", seeded(1)).detach()[:, 0].flatten(1)
    flipout = forward(network, x, 20_000, "flipout", seeded(2)).detach()[:, 0].flatten(1)
    assert_close(flipout.T.cov(), whole.T.cov(), 0.15)  # the joint law over positions, not only the variances
    within_standard_errors(flipout.mean(0), whole.mean(0), (whole.var(0) * 2 / 20_000).sqrt())
