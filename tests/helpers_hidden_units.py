"""Networks, weights and generators that the tests of hidden units share."""
import itertools

import torch
from torch import nn

from helpers import seeded
from symbnn.posterior.independent import MeanFieldGaussian
from symbnn.posterior.layers import variational_tensors, with_posteriors
from symbnn.posterior.priors import isotropic
from symbnn.symmetry.networks import unit_permutations


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def perceptron(*widths, seed=0, bias=True):
    """Linear layers with rectifiers between them, in float64."""
    torch.manual_seed(seed)
    layers = [nn.Linear(*pair, bias=bias) for pair in itertools.pairwise(widths)]
    return nn.Sequential(*itertools.chain(*((layer, nn.ReLU()) for layer in layers[:-1])), layers[-1]).double()


class Residual(nn.Module):
    """Two residual blocks on one set of channels; `tied` adds a layer from these channels to themselves."""

    def __init__(self, tied=False):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.first, self.second = nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.third, self.fourth = nn.Conv2d(4, 5, 1, bias=False), nn.Conv2d(5, 4, 1)
        self.itself = nn.Conv2d(4, 4, 1) if tied else nn.Identity()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = torch.relu(self.norm(self.stem(x)))
        h = torch.relu(h + self.second(torch.relu(self.first(h))))
        h = h + self.fourth(torch.relu(self.third(h)))
        return self.head((h + self.itself(h)).mean((-2, -1)))


def residual(tied=False):
    torch.manual_seed(0)
    network = Residual(tied).double()
    network(1 + 2 * torch.randn(20, 1, 6, 6, dtype=torch.float64))  # running statistics that differ between channels
    return network


def weights_of(network):
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def spread_means(network, separation, seed=0):
    """Means `separation` times standard normal, the same for every type of numbers."""
    noise = seeded(seed)
    with torch.no_grad():
        for tensor in variational_tensors(network).values():
            tensor.posterior.loc.copy_(separation * torch.randn(tensor.posterior.shape, generator=noise))
    return network


def two_layers(units=5, separation=0.7, inputs=4, family=MeanFieldGaussian, dtype=torch.float64, seed=0, prior=None):
    """A Bayesian network of one hidden layer whose units are `separation` deviations apart."""
    torch.manual_seed(seed)
    plain = nn.Sequential(nn.Linear(inputs, units), nn.Tanh(), nn.Linear(units, 1)).to(dtype)
    network = with_posteriors(plain, family, scale=1.0, prior=prior or isotropic(1.0))
    return spread_means(network, separation, seed)


def pooled_convolution(scale=0.3, dtype=torch.float64):
    """A Bayesian convolution of three channels, a mean over the pixels, and a linear layer."""
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    return with_posteriors(plain.to(dtype), MeanFieldGaussian, scale=scale, prior=isotropic(1.0))


def permuted(network, inputs=4):
    """The action that permutes the hidden units of a network of vectors."""
    return unit_permutations(network, (inputs,))


def moved_density(network, action, weights, g):
    """log q of the weights moved by g, through the families' own densities."""
    moved = action.act(g, weights)
    return sum(t.posterior.log_prob(moved[name]) for name, t in variational_tensors(network).items())
