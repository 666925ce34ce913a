"""Networks of every kind that people bring, and the definition that draws are held to."""
import copy
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from helpers_posterior import Written

D = torch.float64
TOKENS, SEQUENCE, VECTOR = (6, 5), (6, 5, 4), (6, 4)


def embedding(**options):
    return nn.Embedding(10, 4, **options)


def attention():
    return nn.MultiheadAttention(4, 2, batch_first=True)


def encoder():
    return nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)


def tied():
    table, head = embedding(), nn.Linear(4, 10, bias=False)
    head.weight = table.weight
    return Written(lambda m, x: m.head(torch.tanh(m.table(x))), table=table, head=head)


def shared():
    layer = nn.Bilinear(4, 4, 4)
    return Written(lambda m, x: m.b(m.a(x, x), x), a=layer, b=layer)


class Tail(nn.Sequential):
    """A container with a parameter of its own, whose forward pass counts its parts."""

    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.Tanh())
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        assert len(self) == 2
        return super().forward(x) * self.scale


def by_order():
    """Its forward pass goes through its own parameters, whatever they are called."""
    network = nn.Linear(4, 4)
    network.extra = nn.Parameter(torch.randn(4))
    return Written(lambda m, x: sum((i + 1) * (x * p.sum()) ** (i + 1) for i, p in enumerate(m.a.parameters())),
                   a=network)


def kept_in_lists():
    network = Written(lambda m, x: x @ m.all[0] + m.all[1], a=nn.Parameter(torch.randn(4, 3)),
                      b=nn.Parameter(torch.randn(3)))
    network.all = [network.a, network.b]
    return network


ROWS, APART = "all draws at once", "one draw at a time"
BROUGHT = {  # name: (network, shape of the inputs; two numbers: tokens, plan)
    "embedding": (embedding, TOKENS, ROWS),
    "embedding with a largest norm": (lambda: embedding(max_norm=0.5), TOKENS, APART),
    "embedding bag": (lambda: nn.EmbeddingBag(10, 4), TOKENS, APART),
    "lstm": (lambda: Written(lambda m, x: m.a(x)[0], a=nn.LSTM(4, 3, 2, bidirectional=True, batch_first=True)),
             SEQUENCE, APART),
    "lstm with projections": (lambda: Written(lambda m, x: m.a(x)[0], a=nn.LSTM(4, 5, proj_size=3)), SEQUENCE, APART),
    "gru": (lambda: Written(lambda m, x: m.a(x)[0], a=nn.GRU(4, 3, batch_first=True)), SEQUENCE, APART),
    "rnn": (lambda: Written(lambda m, x: m.a(x)[1][0], a=nn.RNN(4, 3, bias=False, batch_first=True)), SEQUENCE, APART),
    "cells": (lambda: Written(lambda m, x: m.c(m.b(m.a(x)))[0], a=nn.RNNCell(4, 3), b=nn.GRUCell(3, 3), c=nn.LSTMCell(
        3, 2)), VECTOR, APART),
    "attention": (lambda: Written(lambda m, x: m.a(x, x, x)[0], a=attention()), SEQUENCE, APART),
    "attention, unpacked": (lambda: Written(lambda m, x: m.a(x, x[..., :3], x[..., :2])[0], a=nn.MultiheadAttention(
        4, 2, kdim=3, vdim=2, add_bias_kv=True, batch_first=True)), SEQUENCE, APART),
    "encoder": (encoder, SEQUENCE, APART),
    "stacked encoders": (lambda: nn.TransformerEncoder(encoder(), 2, enable_nested_tensor=False), SEQUENCE, APART),
    "transformer": (lambda: Written(lambda m, x: m.a(x, x.flip(1)), a=nn.Transformer(
        4, 2, 1, 1, 8, dropout=0.0, batch_first=True)), SEQUENCE, APART),
    "bilinear": (lambda: Written(lambda m, x: m.a(x, x.flip(-1)), a=nn.Bilinear(4, 4, 3)), SEQUENCE, APART),
    "transposed 1": (lambda: nn.ConvTranspose1d(5, 3, 3), SEQUENCE, ROWS),
    "transposed 2": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=2, stride=2), (6, 4, 5, 5), ROWS),
    "transposed 3": (lambda: nn.ConvTranspose3d(2, 3, 2), (3, 2, 4, 4, 4), ROWS),
    "volumes": (lambda: nn.Conv3d(2, 3, 2, padding=1), (3, 2, 4, 4, 4), ROWS),
    "norms": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.RMSNorm(4), nn.Linear(4, 4),
                                    nn.BatchNorm1d(4)), VECTOR, ROWS),
    "norms of channels": (lambda: nn.Sequential(nn.Conv1d(5, 4, 1), nn.GroupNorm(2, 4), nn.PReLU(4), nn.InstanceNorm1d(
        4, affine=True)), SEQUENCE, ROWS),
    "bare": (lambda: Written(lambda m, x: m.a(x + m.place) * m.scale, place=nn.Parameter(torch.randn(5, 4)),
                             scale=nn.Parameter(torch.tensor(0.5)), a=nn.Linear(4, 3)), SEQUENCE, APART),
    "a container with a parameter": (Tail, VECTOR, APART),
    "weight norm": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))), VECTOR, APART),
    "spectral norm": (lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))), VECTOR, APART),
    "orthogonal": (lambda: nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(4, 3))), VECTOR, APART),
    "list of parameters": (lambda: Written(lambda m, x: sum((i + 1) * (x @ w) for i, w in enumerate(m.a)),
                                           a=nn.ParameterList([torch.randn(4, 3) for _ in range(3)])), VECTOR, APART),
    "dictionary of parameters": (lambda: Written(lambda m, x: x @ m.a["u"] - 2 * (x @ m.a["v"]), a=nn.ParameterDict(
        {"v": torch.randn(4, 3), "u": torch.randn(4, 3)})), VECTOR, APART),
    "tied": (tied, TOKENS, ROWS),
    "one module under two names": (shared, VECTOR, APART),
    "parameters by order": (by_order, VECTOR, APART),
}


def inputs(shape):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(10, shape, generator=generator) if len(shape) == 2 and shape == TOKENS else torch.randn(
        shape, generator=generator, dtype=D)


def brought(name):
    build, shape, plan = BROUGHT[name]
    torch.manual_seed(0)
    return build().to(D), inputs(shape), plan


def by_definition(plain, args, weights, kwargs=None):
    """The outputs of one plain network a draw, in a list; what a pass writes into buffers stays for the next one."""
    plain, found = copy.deepcopy(plain), []
    for s in range(len(next(iter(weights.values())))):
        one = {name: weight[s].clone() for name, weight in weights.items()}
        found.append(functional_call(plain, one, tuple(copy.deepcopy(args)), dict(kwargs or {})))
    return found, plain


@dataclass
class Answer(OrderedDict):
    """An output as Hugging Face writes it: a dictionary with fields, without what is None."""

    logits: torch.Tensor
    hidden: tuple | None = None
    loss: torch.Tensor | None = None

    def __post_init__(self):
        for name in ("logits", "hidden", "loss"):
            if getattr(self, name) is not None:
                OrderedDict.__setitem__(self, name, getattr(self, name))

    def __setitem__(self, key, value):
        raise TypeError("not to be written")

    def update(self, *args, **kwargs):
        raise TypeError("not to be written")


class Model(nn.Module):
    """Keyword inputs, a mask without rows, several outputs."""

    def __init__(self):
        super().__init__()
        self.table, self.place = nn.Embedding(10, 4), nn.Parameter(torch.randn(5, 4))
        self.mix, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, tokens, mask=None, labels=None, scale=1.0):
        h = self.table(tokens) + self.place * scale
        mixed, _ = self.mix(h, h, h, attn_mask=mask)
        logits = self.head(mixed.mean(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return Answer(logits, (h, mixed), loss)


class Gated(nn.Module):
    """A value and a gate from one matrix, and a norm with random gains."""

    def __init__(self):
        super().__init__()
        self.both, self.norm, self.out = nn.Linear(2, 8), nn.LayerNorm(4), nn.Linear(4, 1)

    def forward(self, x):
        """The output."""
        value, gate = self.both(x).chunk(2, -1)
        return self.out(self.norm(value) * torch.sigmoid(gate))
