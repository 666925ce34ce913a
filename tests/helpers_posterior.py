"""Networks and members of families that several tests of posteriors use, and the references that they share."""
import copy
import itertools
import math
from contextlib import contextmanager

import jaxtyping
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from helpers import seeded
from symbnn.errors import Refusal
from symbnn.posterior.block_gaussian import BlockGaussian
from symbnn.posterior.family import Family
from symbnn.posterior.full_gaussian import FullGaussian
from symbnn.posterior.independent import Laplace, MeanFieldGaussian
from symbnn.posterior.layers import variational_tensors, with_posteriors
from symbnn.posterior.log_normal import LogNormal
from symbnn.symmetry.signed_permutations import SignedPermutation
from tolerances import assert_close, exact64


@contextmanager
def unchecked_shapes():
    """Without the checks of shapes at run time (see conftest.py), which torch.compile cannot trace."""
    kept = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", kept)


TOGETHER, BY_DRAW, WHOLE = "all draws at once", "one draw at a time: ", "one draw at a time, on the whole batch"
UNSEEN = 1e-9  # float64, summed in another order


class Written(nn.Module):
    """A network whose forward pass is a function of its modules and the input."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.run(self, x)


def linear(inputs=3, outputs=3, **options):
    return nn.Linear(inputs, outputs, **options)


def frozen(module):
    return module.requires_grad_(False)


def shared_encoder():
    return Written(lambda m, x: (lambda a, b: (a - b).square())(*m.e(torch.cat(x.unbind(1), 0)).chunk(2)), e=linear())


def graph_by_edges(m, x):
    h = m.a(x)
    return m.b(torch.zeros_like(h).index_add(0, m.edges[1], h[m.edges[0]]))


def nodes_as_rows():
    network = Written(graph_by_edges, a=linear(), b=linear(3, 2))
    network.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]]))
    return network


def with_table():
    network = Written(lambda m, x: x @ m.a(m.table).mT, a=linear())
    network.register_buffer("table", torch.randn(4, 3))
    return network


class MaskedNorm(nn.Module):
    """Looks at its own layers, as a forward pass may."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([linear(), nn.Tanh(), linear()])
        self.aliases = [self.layers[0], self.layers[2]]

    def forward(self, x):
        assert next(self.parameters()).dtype == x.dtype
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                x = F.pad(x, (0, layer.in_features - x.shape[-1])).to(layer.weight.dtype)
                assert layer.weight.shape[1] == x.shape[-1]
            x = layer(x)
        return self.aliases[1](x)


IMAGE, VECTOR, SEQUENCE = (6, 2, 5, 5), (6, 3), (6, 5, 3)


conv = lambda *sizes, **options: nn.Conv2d(*sizes, 3, **options)  # noqa: E731


ZOO = {
    # name: (network, shape of inputs, plan)
    "mlp": (lambda: nn.Sequential(linear(3, 5), nn.ReLU(), linear(5, 2)), VECTOR, TOGETHER),
    "cnn": (lambda: nn.Sequential(conv(2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), linear(3, 2)), IMAGE, TOGETHER),
    "view after a convolution": (lambda: Written(lambda m, x: m.b((h := m.a(x)).view(h.size(0), -1)), a=conv(2, 3),
                                                 b=linear(27, 2)), IMAGE, TOGETHER),
    "view of the input": (lambda: Written(lambda m, x: m.a(x.view(len(x), -1)), a=linear(50, 2)), IMAGE, TOGETHER),
    "tokens": (lambda: nn.Sequential(linear(), nn.GELU(), linear(3, 2)), SEQUENCE, TOGETHER),
    "residual": (lambda: Written(lambda m, x: x + m.a(torch.tanh(m.a(x))), a=linear()), VECTOR, TOGETHER),
    "norms": (lambda: nn.Sequential(conv(2, 4), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.ReLU(), conv(4, 2)), IMAGE,
              TOGETHER),
    "copies as rows": (lambda: Written(lambda m, x: m.a(x.flatten(0, 1)).unflatten(0, x.shape[:2]).sum(1), a=linear()),
                       SEQUENCE, TOGETHER),
    "looks at its layers": (MaskedNorm, VECTOR, TOGETHER),
    "frozen recurrent": (lambda: Written(lambda m, x: m.b(m.a(x)[0][:, -1]), a=frozen(nn.LSTM(3, 4, batch_first=True)),
                                         b=linear(4, 2)), SEQUENCE, TOGETHER),
    "frozen bias": (lambda: Written(lambda m, x: m.a(x), a=(lambda a: (frozen(a.bias), a)[1])(linear())), VECTOR,
                    TOGETHER),
    "frozen weight": (lambda: Written(lambda m, x: m.a(x), a=(lambda a: (frozen(a.weight), a)[1])(conv(2, 3))), IMAGE,
                      TOGETHER),
    "attention over tokens": (lambda: Written(lambda m, x: F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x)),
                                              q=linear(), k=linear(), v=linear()), SEQUENCE, TOGETHER),
    "time first, linear": (lambda: Written(lambda m, x: torch.tanh(m.a(x.transpose(0, 1))).transpose(0, 1), a=linear()),
                           SEQUENCE, BY_DRAW),
    "time first, recurrent": (lambda: Written(lambda m, x: m.b(m.r(m.a(x.transpose(0, 1)))[0])[-1], a=linear(),
                                              r=frozen(nn.LSTM(3, 4)), b=linear(4, 2)), SEQUENCE, BY_DRAW),
    "channels first": (lambda: Written(lambda m, x: m.a(x.movedim(1, 0)).mean(0), a=linear()), SEQUENCE, BY_DRAW),
    "siamese": (shared_encoder, (6, 2, 3), BY_DRAW),
    "table without a batch": (with_table, VECTOR, BY_DRAW),
    "uses a weight itself": (lambda: Written(lambda m, x: F.linear(m.a(x), m.a.weight.mT), a=linear(3, 5)), VECTOR,
                             BY_DRAW),
    "penalty in the output": (lambda: Written(lambda m, x: m.a(x) + sum(p.norm() for p in m.parameters()), a=linear()),
                              VECTOR, BY_DRAW),
    "branch that starts at zero": (lambda: Written(lambda m, x: m.a(x) + m.gate.weight.sum() * m.a(x.flip(0)),
                                                   a=linear(), gate=frozen(nn.LayerNorm(1))), VECTOR, WHOLE),
    "nodes as rows": (nodes_as_rows, VECTOR, WHOLE),
    "attention over the batch": (lambda: Written(lambda m, x: (m.a(x) @ m.a(x).mT).softmax(-1) @ x, a=linear()), VECTOR,
                                 WHOLE),
    "centred over the batch": (lambda: Written(lambda m, x: (h := m.a(x)) - h.mean(0), a=linear()), VECTOR, WHOLE),
    "normed by the largest": (lambda: Written(lambda m, x: (h := m.a(x)) / h.abs().max(), a=linear()), VECTOR, WHOLE),
    "convolution along the batch": (lambda: Written(lambda m, x: m.a(x.T[None])[0].T, a=nn.Conv1d(3, 2, 3, padding=1)),
                                    VECTOR, WHOLE),
    "decides by a value": (lambda: Written(lambda m, x: h if (h := m.a(x)).mean() > 0.05 else -h, a=linear()), VECTOR,
                           WHOLE),
    "selects by a mask": (lambda: Written(lambda m, x: m.b(torch.relu(h)[h[:, 0] > -9]) if len(h := m.a(x)) else h,
                                          a=linear(), b=linear()), VECTOR, WHOLE),
    "fixed batch": (lambda: Written(lambda m, x: m.a(x.view(6, 3)), a=linear()), VECTOR, WHOLE),
    "no rows in the output": (lambda: Written(lambda m, x: m.a(x).mean(0), a=linear()), VECTOR, WHOLE),
    "squeezes": (lambda: Written(lambda m, x: m.a(x).squeeze(), a=linear(3, 1)), VECTOR, WHOLE),
}


def made(name, **options):
    build, shape, plan = ZOO[name]
    torch.manual_seed(0)
    plain = build().double()
    if name == "branch that starts at zero":
        nn.init.zeros_(plain.gate.weight)
    if name == "norms":
        plain.eval()
    return plain, with_posteriors(plain, scale=0.3, **options), torch.randn(shape, dtype=torch.float64), plan


def loop(plain, x, weights, state=None):
    """The definition: one plain network a draw."""
    draws = len(next(iter(weights.values())))
    state = dict(plain.state_dict()) if state is None else state
    plain = copy.deepcopy(plain)
    return torch.stack([
        functional_call(plain, {**state, **{name: weight[s] for name, weight in weights.items()}}, (x.clone(),))
        for s in range(draws)
    ])


SHAPE, SIZE = (3, 2), 6


def random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def lower(n: int, seed: int) -> torch.Tensor:
    return 0.5 * random((n, n), seed).tril(-1) + torch.diag(0.3 + random((n,), seed + 1).abs())


def members(shape: tuple[int, ...] = SHAPE, seed: int = 0, trainable: bool = True) -> dict[str, Family]:
    """A member of each family over `shape` in float64; "isotropic" keeps its parameters as numbers."""
    n = math.prod(shape)
    loc, log_scale, rows = random(shape, seed), 0.5 * random(shape, seed + 1) - 1, (shape[0], *[1] * (len(shape) - 1))
    mask = torch.where(random(shape, 99) < 0, -1, 1)
    number = torch.tensor(0.4 + 0.1 * (seed % 5), dtype=torch.float64)
    return {
        "gaussian": MeanFieldGaussian(loc, log_scale, trainable=trainable),
        "isotropic": MeanFieldGaussian(number, -number, shape=shape, trainable=trainable),
        "laplace": Laplace(loc, log_scale, trainable=trainable),
        "lognormal": LogNormal(loc - 1, log_scale, mask, trainable=trainable),
        "block": BlockGaussian(loc, 0.5 * random(rows, seed + 2) - 1, trainable=trainable),
        "full": FullGaussian(loc, lower(n, seed + 3), trainable=trainable),
    }


NAMES = list(members())


each_family = pytest.mark.parametrize("name", NAMES)


def signed_permutations(n: int) -> list[SignedPermutation]:
    return [SignedPermutation(torch.tensor(order), torch.tensor(sign))
            for order in itertools.permutations(range(n)) for sign in itertools.product((1, -1), repeat=n)]


def image(matrix: torch.Tensor, theta: torch.Tensor, q: Family) -> torch.Tensor:
    return (theta.reshape(len(theta), -1) @ matrix.T).view(theta.shape)


NORMAL = {"gaussian", "isotropic", "block"}


def generic_covariance(q: Family) -> torch.Tensor:
    """The covariance of some member of the family of `q` with independent weights, with unrelated scales."""
    scales = q.log_scale if isinstance(q, BlockGaussian) else q.mean
    return torch.diag((0.5 + random(tuple(scales.shape), 5).abs()).expand(q.shape).flatten())


def truth(q: Family, matrix: torch.Tensor) -> bool:
    """Whether the image is in the family, from moments or support and not from the code under test."""
    if isinstance(q, FullGaussian):
        return True
    if isinstance(q, LogNormal):
        theta = image(matrix, q.rsample(200, seeded(0)).detach(), q)
        return bool(q.log_prob(theta).isfinite().all())
    moved = matrix @ generic_covariance(q) @ matrix.T
    scale = moved.diagonal().max()
    if (moved - moved.diagonal().diag()).abs().max() > exact64 * scale:
        return False
    if isinstance(q, BlockGaussian):
        variance = moved.diagonal().view(q.shape)
        return all(float(variance[q.blocks == b].max() - variance[q.blocks == b].min()) <= exact64 * scale
                   for b in range(q.log_scale.numel()))
    return True


def check_closedness(q: Family, map) -> bool:
    """`is_closed_under` tells the truth, and `push_forward` is the law of the image or refuses."""
    matrix = map.matrix().double() if isinstance(map, SignedPermutation) else map
    closure = q.is_closed_under(map)
    assert bool(closure) == truth(q, matrix), closure.reason
    if not closure:
        with pytest.raises(Refusal, match="closed"):
            q.push_forward(map)
        return False
    pushed = q.push_forward(map)
    assert type(pushed) is type(q) and pushed.trainable == q.trainable and pushed.shape == q.shape
    theta = q.rsample(5, seeded(1)).detach()
    expected = q.log_prob(theta) - torch.linalg.slogdet(matrix).logabsdet
    loss = torch.linalg.cond(matrix) if isinstance(q, FullGaussian) else 1.0  # digits that solving for the noise costs
    assert_close(pushed.log_prob(image(matrix, theta, q)), expected, float(exact64 * loss))
    return True


LAYERS = [
    (nn.Linear(6, 3), (4, 6)),
    (nn.Linear(6, 3, bias=False), (4, 5, 6)),
    (nn.Conv1d(2, 4, 3, padding=2, dilation=2, padding_mode="reflect"), (4, 2, 9)),
    *[
        (nn.Conv2d(2, 4, 3, padding=1, padding_mode=mode, groups=groups, stride=stride, bias=bias), (4, 2, 8, 8))
        for mode, groups, stride, bias in [
            ("zeros", 1, 1, True), ("circular", 2, 1, True), ("reflect", 1, 2, False), ("replicate", 1, 1, True)
        ]
    ],
    (nn.Conv2d(2, 4, 3, padding="same", dilation=2), (4, 2, 8, 8)),
]


LAYER_IDS = [str(layer) for layer, _ in LAYERS]
KINDS = [MeanFieldGaussian, Laplace, LogNormal, BlockGaussian, FullGaussian]


def small_cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    ).double()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 5)

    def forward(self, x):
        return x + self.first(torch.tanh(self.first(x)))  # one layer used twice, and a path without any


def weighted_inputs():
    """A linear layer of three inputs whose weights and biases have different scales, and one input."""
    torch.manual_seed(2)
    network = with_posteriors(nn.Linear(3, 2).double())
    for tensor in variational_tensors(network).values():
        nn.init.normal_(tensor.posterior.log_scale, -0.5, generator=seeded(3))
    return network, torch.tensor([[1.0, -0.5, 2.0]]).double()


def refused(call):
    """The `Refusal` that a call raises."""
    with pytest.raises(Refusal) as found:
        call()
    return found.value
