"""Large networks: deriving the action, averaging over the group, and projecting gradients, with time and peak memory.

    python benchmarks/large.py                     # all parts, each in a process of its own
    python benchmarks/large.py derive average      # some of them
    python benchmarks/large.py --repeats 5

Process seconds on one thread, float32, medians. `floor`: reading and writing every number once, at the rate at which
this machine copies a tensor of that size, measured in the same process.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch
from peak import peak_megabytes
from torch import nn
from torch.nn import functional as F

from symbnn.equivariance.projected_gradients import keep_invariant
from symbnn.equivariance.symmetric import Symmetric, bayesianize
from symbnn.posterior.elbo import elbo
from symbnn.posterior.sampling import forward
from symbnn.symmetry.fields import field, rotations
from symbnn.symmetry.networks import network_action, unit_permutations

SIZE = (3, 33, 33)  # an odd size, which strides keep symmetric


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or a bottleneck of 1x1, 3x3, 1x1."""

    def __init__(self, read, width, stride, bottleneck):
        super().__init__()
        written = 4 * width if bottleneck else width
        shapes = [(read, width, 1), (width, width, 3), (width, written, 1)] if bottleneck else [
            (read, width, 3), (width, written, 3)]
        layers, moving = [], stride
        for before, after, size in shapes:
            step, moving = (moving, 1) if size == 3 else (1, moving)
            layers += [nn.Conv2d(before, after, size, step, size // 2, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.layers, self.shortcut = nn.Sequential(*layers[:-1]), nn.Identity()
        if stride > 1 or read != written:
            self.shortcut = nn.Sequential(nn.Conv2d(read, written, 1, stride, bias=False), nn.BatchNorm2d(written))

    def forward(self, x):
        return F.relu(self.layers(x) + self.shortcut(x))


def resnet(blocks, bottleneck, classes=10):
    """Four stages of residual blocks behind a 3x3 convolution; (2, 2, 2, 2) has 11, (3, 4, 6, 3) 24 million weights."""
    layers, read = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()], 64
    for stage, count in enumerate(blocks):
        for k in range(count):
            layers.append(Block(read, 64 * 2**stage, 2 if stage and not k else 1, bottleneck))
            read = 64 * 2**stage * (4 if bottleneck else 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(read, classes))


class Attention(nn.Module):
    """A block of a transformer: attention and two linear layers, each behind a norm."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.reads, self.writes = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        batch, tokens, width = x.shape
        parts = self.reads(self.norms[0](x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*parts.unbind(0))
        x = x + self.writes(y.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.wide(self.norms[1](x))


class VisionTransformer(nn.Module):
    """Patches of 4x4 pixels as tokens, with or without an embedding of their places, a mean over tokens, a head."""

    def __init__(self, places, width=384, layers=12, heads=6, patches=8, classes=10):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.places = nn.Parameter(torch.randn(1, patches**2, width) / 50) if places else None
        self.layers = nn.Sequential(*(Attention(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x if self.places is None else x + self.places
        return self.head(self.norm(self.layers(x)).mean(1))


def seconds(call):
    """What a call returns, and the process's time for it."""
    began = time.process_time()
    found = call()
    return found, time.process_time() - began


def copy_seconds(weights, passes, element=4):
    """The time in which this machine reads and writes so many numbers so many times, in seconds."""
    source = torch.zeros(weights * element, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return round(passes * statistics.median(seconds(lambda: target.copy_(source))[1] for _ in range(5)), 4)


def count(network):
    return sum(its.numel() for its in network.parameters())


def row(name, floor, case, repeats=1):
    """Run a case so often and say its time, memory and floor."""
    times, peaks = [], []
    for _ in range(repeats):
        (_, took), peak = peak_megabytes(lambda: seconds(case))
        times.append(took)
        peaks.append(peak)
    print(json.dumps({"case": name, "seconds": round(statistics.median(times), 3), "floor": floor,
                      "peak_MB": round(max(peaks))}), flush=True)


def derive(repeats):
    """The action on a ResNet-50 and on a transformer of 12 layers."""
    network_action(nn.Conv2d(1, 1, 3), field(rotations(), (1, 5, 5)))  # what torch sets up once
    image, patched = field(rotations(), SIZE), field(rotations(), (3, 32, 32))
    large = resnet((3, 4, 6, 3), bottleneck=True)
    cases = {
        f"ResNet-50, {count(large):,} weights, C4": lambda: network_action(large, image),
        "the same, regular channels": lambda: network_action(large, image, hidden="regular"),
        "the same, unit permutations": lambda: unit_permutations(large, SIZE)}
    for places in (False, True):
        network = VisionTransformer(places)
        name = f"transformer, {count(network):,} weights, {'with' if places else 'without'} places"
        cases[f"{name}, C4"] = lambda network=network: network_action(network, patched)
        cases[f"{name}, unit permutations"] = lambda network=network: unit_permutations(network, (3, 32, 32))
    for name, case in cases.items():
        row(name, None, case, repeats)


def small_pair(hidden="trivial"):
    """The network of 11 million weights and its action."""
    torch.manual_seed(0)
    return bayesianize(resnet((2, 2, 2, 2), bottleneck=False), rotations(), SIZE, hidden=hidden)


def average(repeats):
    """The average of a ResNet-18 under C4."""
    pair = small_pair()
    floor = copy_seconds(count(pair.network), 1)
    row(f"average, {count(pair.network):,} parameters, C4", floor, pair.average, repeats)
    row("drift", floor, pair.drift, repeats)
    row("check of the pair (four passes in float64)", floor, lambda: Symmetric(pair.network, pair.action), repeats)


def project(repeats):
    """Projected gradients of a ResNet-18 under C4: setting up, and what a step takes with and without them."""
    pair = small_pair().average("projection")
    floor = copy_seconds(count(pair.network), 1)
    row("projected gradients, set-up", floor, lambda: keep_invariant(pair.network, pair.action).remove(), repeats)
    x, labels = torch.randn(2, *SIZE), torch.tensor([0, 1])
    pair.network.train()

    def step():
        pair.network.zero_grad()
        elbo(pair.network, forward(pair.network, x, draws=1), labels, 100).elbo.neg().backward()

    step()
    plain, added = [], []
    for _ in range(max(repeats, 3)):
        plain.append(seconds(step)[1])
        with keep_invariant(pair.network, pair.action):
            added.append(seconds(step)[1] - plain[-1])
    print(json.dumps({"case": "step of 2 images", "seconds": round(statistics.median(plain), 3),
                      "added": round(statistics.median(added), 3), "floor_of_added": floor}), flush=True)


PARTS = {"derive": derive, "average": average, "project": project}


def main():
    """Each part in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--here", action="store_true", help="in this process")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.parts or PARTS:
        if given.here:
            PARTS[name](given.repeats)
        else:
            subprocess.run([sys.executable, __file__, name, "--here", "--repeats", str(given.repeats)], check=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
