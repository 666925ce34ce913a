"""Threads that share one network get what each would get alone, to the bit, while the interpreter changes between them
as often as it can."""
import sys
import threading
from copy import deepcopy

import pytest
import torch
from torch import nn

from helpers import seeded
from symbnn.equivariance.predictions import Equivariance, orbit_predictions
from symbnn.posterior import plans
from symbnn.posterior.layers import with_posteriors
from symbnn.posterior.sampling import apply_weights, forward, mean_weights, predict, sample_weights
from symbnn.symmetry.actions import Action
from symbnn.symmetry.fields import field, rotations

THREADS, ROUNDS = 4, 12


class Shifted(nn.Module):
    """A network that keeps what it has seen, and compares examples."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(16, 4), None

    def forward(self, x):
        self.seen = self.layer(x.flatten(1))
        return self.seen - self.seen.mean(0)


def hooked(net):
    net[1].register_forward_hook(lambda module, arguments, output: None)
    return net


NETWORKS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)),
    "convolutions": lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
                                          nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)),
    "hooks": lambda: hooked(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))),
    "looks at rows": Shifted,
}


def inputs(thread, turn):
    """Shapes that change, so that plans are made and forgotten while others are used."""
    return torch.rand(2 + (thread + turn) % 5, 1, 4, 4, generator=seeded(100 * thread + turn))


def shared(name):
    torch.manual_seed(0)
    return with_posteriors(NETWORKS[name]().eval(), scale=0.5)


ACTION = field(rotations(), (1, 4, 4))
TURNED = Equivariance(ACTION, Action.trivial(ACTION.group, (3,)))
CALLS = {
    "predict": lambda net, x, seed: predict(net, x, draws=5, memory=4096, generator=seeded(seed)),
    "given weights": lambda net, x, seed: predict(net, x, weights=sample_weights(net, 3, seeded(seed))),
    "forward": lambda net, x, seed: forward(net, x, 3, generator=seeded(seed)),
    "split": lambda net, x, seed: forward(net, x[:4], 2, "split", seeded(seed)),
    "mean": lambda net, x, seed: apply_weights(net, x, mean_weights(net)),
    "orbit": lambda net, x, seed: orbit_predictions(net, x, TURNED, 3, generator=seeded(seed)).probabilities,
}


def work(net, call, thread):
    return [CALLS[call](net, inputs(thread, turn), turn).detach() for turn in range(ROUNDS)]


@pytest.fixture
def often():
    """The interpreter changes between threads after every microsecond."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("few", [False, True], ids=["plans kept", "plans forgotten"])
@pytest.mark.parametrize("name, call", [
    (name, call) for name in NETWORKS for call in CALLS
    if name != "looks at rows" or call not in ("split", "orbit")])  # it compares examples, and has other outputs
def test_threads_share_a_network(name, call, few, often, monkeypatch):
    monkeypatch.setattr(plans, "_KEPT", 2 if few else 64)
    net, found, errors = shared(name), {}, []
    alone = [work(deepcopy(net), call, thread) for thread in range(THREADS)]
    start = threading.Barrier(THREADS)

    def run(thread):
        try:
            start.wait()
            found[thread] = work(net, call, thread)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(thread,)) for thread in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for thread, expected in enumerate(alone):
        assert len(found[thread]) == ROUNDS
        assert all(torch.equal(one, other) for one, other in zip(found[thread], expected))
