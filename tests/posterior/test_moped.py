"""Scales and priors that look at the tensor, and MOPED."""
import pytest
import torch
from torch import nn

from helpers_posterior import linear, refused
from symbnn.posterior.block_gaussian import BlockGaussian
from symbnn.posterior.independent import Laplace
from symbnn.posterior.layers import kl_sum, variational_tensors, with_posteriors
from symbnn.posterior.log_normal import LogNormal
from symbnn.posterior.moped import moped
from symbnn.posterior.priors import centred, isotropic
from tolerances import assert_close


@pytest.mark.parametrize("family", [None, Laplace])
def test_moped_is_what_the_paper_says(family):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Embedding(10, 4), nn.LSTM(4, 3), nn.LayerNorm(3)).double()
    options = {} if family is None else {"family": family}
    network = with_posteriors(plain, only="*", **moped(0.2, 0.5, 1e-2), **options)
    pretrained = dict(plain.named_parameters())
    for name, tensor in variational_tensors(network).items():
        w = pretrained[name].detach()
        assert_close(tensor.posterior.mean, w, 0)
        assert_close(tensor.prior.mean, w, 0)
        assert_close(tensor.posterior.scale, (0.2 * w.abs()).clamp_min(1e-2), 1e-12)
        assert_close(tensor.prior.variance, torch.full_like(w, 0.25), 1e-12)
    if family is None:
        normal = torch.distributions.Normal
        kl = torch.distributions.kl_divergence
        by_hand = sum(kl(normal(w, (0.2 * w.abs()).clamp_min(1e-2)), normal(w, 0.5)).sum() for w in pretrained.values())
        assert_close(kl_sum(network), by_hand.detach(), 1e-10)


def test_scales_and_priors_of_a_name_and_a_tensor():
    plain = nn.Sequential(linear(), linear(3, 2))
    network = with_posteriors(plain, scale=lambda name, weight: 0.3 if name.endswith("bias") else 0.1 * weight.std(),
                              prior=lambda name, q: isotropic(2.0 if name.startswith("1") else 1.0)(name, q))
    tensors = variational_tensors(network)
    assert_close(tensors["0.bias"].posterior.scale, torch.full((3,), 0.3), 1e-6)
    assert_close(tensors["1.weight"].posterior.scale, (0.1 * plain[1].weight.std()).expand(2, 3), 1e-6)
    assert [float(t.prior.variance.flatten()[0]) for t in tensors.values()] == [1.0, 1.0, 4.0, 4.0]
    kept = plain[0].weight.clone()
    with_posteriors(plain, scale=lambda name, weight: weight.abs_().clamp_min_(0.1))  # writes into a copy
    assert torch.equal(plain[0].weight, kept)


@pytest.mark.parametrize(("call", "said"), [
    (lambda net: with_posteriors(net, scale=lambda name, w: 0.1 * w), "positive"),
    (lambda net: with_posteriors(net, scale=lambda name, w: w.abs()), "positive"),
    (lambda net: with_posteriors(net, scale=lambda name, w: "0.1"), "str"),
    (lambda net: with_posteriors(net, scale=lambda name, w: None), "None"),
    (lambda net: with_posteriors(net, scale=lambda w: 0.1), "TypeError"),
    (lambda net: with_posteriors(net, scale=lambda name, w: w.new_ones(7)), "broadcasts"),
    (lambda net: with_posteriors(net, scale=nn.Linear), "class"),
    (lambda net: with_posteriors(net, scale=lambda name, w: float("nan")), "positive"),
    (lambda net: with_posteriors(net, LogNormal, **moped()), "signs"),
    (lambda net: with_posteriors(nn.Conv2d(2, 2, 3), BlockGaussian, **moped()), "broadcasts"),
    (lambda net: moped(0.0), "positive"), (lambda net: moped(floor=-1), "positive"),
    (lambda net: moped(deviation=0), "positive"),
    (lambda net: centred(float("inf")), "positive"),
])
def test_scales_that_are_none_are_refused(call, said):
    network = linear()
    with torch.no_grad():
        network.bias.zero_()
    assert said in str(refused(lambda: call(network)))
