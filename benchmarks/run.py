"""What symbnn costs, beside a loop over draws: one training step, its gradient variance and memory, and the metrics.

    python benchmarks/run.py                  # all parts; writes benchmarks/results/cpu.json
    python benchmarks/run.py step metrics     # some of them

Everything compared is timed in one run, interleaved, and reported as medians and ratios; absolute times depend on the
machine and on what else it does. The reference loop below is written here from the description of the public code of
arXiv 2606.26273: a Python loop over S weight draws shared by the batch, the KL recomputed for every draw, activation
before pooling, default memory layout, one backward pass through all draws; metrics in three separate passes.
"""
import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from peak import peak_megabytes
from torch import nn
from torch.nn import functional as F

from symbnn.equivariance.metrics import summarize
from symbnn.equivariance.predictions import orbit_predictions
from symbnn.posterior.layers import kl_sum, variational_tensors, with_posteriors
from symbnn.posterior.sampling import forward
from symbnn.symmetry.fields import field, rotations
from symbnn.symmetry.networks import network_action
from symbnn.training.architectures import multiply_adds

BATCH, DRAWS, CLASSES, SIZE = 128, 10, 10, (1, 28, 28)
NETWORKS = {"small": (32, 64), "expanded": (128, 256)}
RUNS = 16  # of the split estimator: the number whose gradient variance is compared below


def convolutional(channels, pool_first):
    """3x3 convolutions, each with 2x2 max-pooling and ReLU in the given order, global average pooling, linear head."""
    layers, before = [], SIZE[0]
    for after in channels:
        tail = [nn.MaxPool2d(2), nn.ReLU()] if pool_first else [nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(before, after, 3, padding=1), *tail]
        before = after
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, CLASSES))
    for name, parameter in network.named_parameters():  # the source's start: He weights, zero biases
        nn.init.zeros_(parameter) if "bias" in name else nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    return network


class LoopLayer(nn.Module):
    """A Gaussian layer as the loop needs it: a fresh draw and a fresh KL at every call."""

    def __init__(self, plain):
        super().__init__()
        self.plain = plain
        self.loc = nn.ParameterList([nn.Parameter(p.detach().clone()) for p in plain.parameters()])
        self.rho = nn.ParameterList([nn.Parameter(torch.full_like(p, -3.0)) for p in plain.parameters()])
        plain.requires_grad_(False)

    def forward(self, x):
        drawn, kl = [], 0.0
        for loc, rho in zip(self.loc, self.rho, strict=True):
            scale = F.softplus(rho)
            drawn.append(loc + scale * torch.randn_like(loc))
            kl = kl + (0.5 * (scale**2 + loc**2 - 1) - scale.log()).sum()
        return torch.func.functional_call(self.plain, dict(zip(["weight", "bias"], drawn, strict=True)), (x,)), kl


class LoopNetwork(nn.Module):
    def __init__(self, plain):
        super().__init__()
        self.layers = nn.ModuleList([LoopLayer(m) if list(m.parameters()) else m for m in plain])

    def forward(self, x):
        total = 0.0
        for layer in self.layers:
            if isinstance(layer, LoopLayer):
                x, kl = layer(x)
                total = total + kl
            else:
                x = layer(x)
        return x, total


def loop_loss(network, x, y, draws, num_data=20_000):
    nll = kl = 0.0
    for _ in range(draws):
        logits, one = network(x)
        nll, kl = nll + F.cross_entropy(logits, y), kl + one
    return (nll + kl / num_data) / draws


def our_loss(network, x, y, runs, num_data=20_000):
    logits = forward(network, x, runs, "split")
    return F.cross_entropy(logits[0], y) + kl_sum(network) / num_data


def pair(name):
    """The loop's network and ours, with the same means and scales."""
    torch.manual_seed(0)
    plain = convolutional(NETWORKS[name], pool_first=False)
    loop = LoopNetwork(plain)
    ours = convolutional(NETWORKS[name], pool_first=True)
    means = [p for layer in loop.layers if isinstance(layer, LoopLayer) for p in layer.loc]
    ours.load_state_dict(dict(zip(ours.state_dict(), means, strict=True)))
    return loop, with_posteriors(ours, scale=F.softplus(torch.tensor(-3.0)).item())


def batch(size=BATCH):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(size, *SIZE, generator=generator), torch.randint(CLASSES, (size,), generator=generator)


def interleaved(candidates, repeats):
    """Median seconds of each callable, called in turn `repeats` times after one warm-up round."""
    times = {name: [] for name in candidates}
    for repeat in range(repeats + 1):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def peak_gflops():
    """Attained single-precision rate of a large matrix product, in GFLOP/s: the denominator of the floors."""
    a = torch.randn(2048, 2048)
    seconds = interleaved({"product": lambda: a @ a}, 7)["product"]
    return 2 * 2048**3 / seconds / 1e9


def step(repeats):
    """One training step (loss and backward), S = 10 draws for the whole batch in a loop against the split estimator."""
    x, y = batch()
    rate = peak_gflops()
    report = {"matrix product, GFLOP/s": rate}
    for name in NETWORKS:
        loop, ours = pair(name)
        candidates = {
            f"loop, S={DRAWS}": lambda loop=loop: loop_loss(loop, x, y, DRAWS).backward(),
            f"split, K={RUNS}": lambda ours=ours: our_loss(ours, x, y, RUNS).backward(),
            "split, K=8": lambda ours=ours: our_loss(ours, x, y, 8).backward(),
            f"whole, S={DRAWS}": lambda ours=ours: (
                F.cross_entropy(forward(ours, x, DRAWS).flatten(0, 1), y.repeat(DRAWS)) + kl_sum(ours) / 20_000
            ).backward(),
            "flipout, S=1": lambda ours=ours: (
                F.cross_entropy(forward(ours, x, 1, "flipout")[0], y) + kl_sum(ours) / 20_000
            ).backward(),
        }
        seconds = interleaved(candidates, repeats if name == "small" else max(3, repeats // 3))
        # A multiply-add is two operations; the backward pass costs two products where the forward pass costs one.
        flops = 3 * 2 * BATCH * multiply_adds(convolutional(NETWORKS[name], True), SIZE)
        report[name] = {
            "milliseconds": {key: 1e3 * value for key, value in seconds.items()},
            "times faster than the loop": {key: seconds[f"loop, S={DRAWS}"] / value for key, value in seconds.items()},
            "GFLOP of one pass, forward and backward": flops / 1e9,
            "floor of one pass at the matrix-product rate, ms": flops / rate / 1e6,
        }
    return report


def gradients(loss, parameters, repeats):
    found = []
    for _ in range(repeats):
        grads = torch.autograd.grad(loss(), parameters)
        found.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(found)


def summed_variance(sample):
    """The variance summed over coordinates, and its standard error over the repeats."""
    squares = (sample - sample.mean(0)).square().sum(1)
    return squares.sum().item() / (len(squares) - 1), squares.std().item() / len(squares) ** 0.5


def variance(repeats):
    """Summed variance of the gradient in the means: at the start, and after 150 steps of training on these images."""
    from symbnn.data.sources import load

    split = load("fashion_mnist", train_size=2000).train
    generator = torch.Generator().manual_seed(2)
    torch.manual_seed(3)
    _, ours = pair("small")
    locs = [t.posterior.loc for t in variational_tensors(ours).values()]
    optimizer = torch.optim.AdamW(ours.parameters(), lr=3e-3, weight_decay=0.0)
    report = {}
    for stage in ("start", "after 150 steps"):
        if stage != "start":
            for _ in range(150):
                rows = torch.randint(len(split.labels), (BATCH,), generator=generator)
                optimizer.zero_grad()
                our_loss(ours, split.inputs[rows], split.labels[rows], RUNS).backward()
                optimizer.step()
        x, y = split.inputs[:BATCH], split.labels[:BATCH]
        estimators = {
            f"loop, S={DRAWS}": lambda: F.cross_entropy(forward(ours, x, DRAWS).flatten(0, 1), y.repeat(DRAWS)),
            **{f"split, K={k}": lambda k=k: F.cross_entropy(forward(ours, x, k, "split")[0], y) for k in (8, 16, 32)},
            "flipout, S=1": lambda: F.cross_entropy(forward(ours, x, 1, "flipout")[0], y),
        }
        found = {name: summed_variance(gradients(loss, locs, repeats)) for name, loss in estimators.items()}
        loop = found[f"loop, S={DRAWS}"][0]
        report[stage] = {
            "variance and its standard error": found,
            "worth in draws for the whole batch": {name: DRAWS * loop / value for name, (value, _) in found.items()},
        }
    return report


def memory_of(which, name):
    """Peak resident memory of one step above what was there before it, in MB (run in a process of its own)."""
    x, y = batch()
    loop, ours = pair(name)
    forward(ours, x[:2], 2, "split").sum().backward()
    loss = partial(loop_loss, loop, x, y, DRAWS) if which == "loop" else partial(our_loss, ours, x, y, RUNS)
    return peak_megabytes(lambda: loss().backward())[1]


def memory(repeats):
    """Peak memory of one step of each, in fresh processes."""
    report = {}
    for name in NETWORKS:
        for which in ("loop", "split"):
            command = [sys.executable, __file__, "--memory-of", which, name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            report[f"{name}, {which}, MB"] = float(done.stdout)
    return report


def loop_metrics(network, x, y, draws):
    """Three passes: accuracy and NLL; defect over the turns; symmetric KL and agreement over the turns."""
    def probabilities(inputs):
        parts = inputs.split(BATCH)
        return torch.cat([torch.stack([network(part)[0].softmax(-1) for _ in range(draws)]).mean(0) for part in parts])

    def over_turns():
        return torch.stack([probabilities(torch.rot90(x, k, (-2, -1))) for k in range(4)])

    def divergence(p, q):
        return F.kl_div(q.log(), p, reduction="batchmean")

    with torch.no_grad():
        first = probabilities(x)
        out = {"accuracy": (first.argmax(-1) == y).float().mean(), "nll": F.nll_loss(first.log(), y)}
        turned = over_turns()
        out["defect"] = (turned - turned[0]).square().sum(-1).mean()
        again = over_turns()
        pairs = [(again[0], again[k]) for k in range(1, 4)]
        out["symmetric KL"] = sum(divergence(p, q) + divergence(q, p) for p, q in pairs) / 6
        out["agreement"] = (again.argmax(-1) == again[0].argmax(-1)).float().mean()
    return out


def metrics(repeats, draws=16):
    """All metrics under four turns, T = 16 draws: three passes in a loop against one pass."""
    report = {}
    for name, images in (("small", 512), ("expanded", BATCH)):
        x, y = batch(images)
        loop, ours = pair(name)
        action = network_action(convolutional(NETWORKS[name], True), field(rotations(), SIZE))
        candidates = {
            "loop, three passes": lambda loop=loop, x=x, y=y: loop_metrics(loop, x, y, draws),
            **{f"one pass, {mode} draws": lambda mode=mode, ours=ours, action=action, x=x, y=y: summarize(
                orbit_predictions(ours, x, action, draws, mode), y) for mode in ("common", "shared")},
        }
        seconds = interleaved(candidates, 3)
        report[name] = {"images": images, "seconds": seconds, "times faster than the loop":
                        {key: seconds["loop, three passes"] / value for key, value in seconds.items()}}
    return report


PARTS = {"step": step, "variance": variance, "memory": memory, "metrics": metrics}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)}; default all")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cpu.json")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        print(memory_of(*arguments.memory_of))
        return
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts {sorted(unknown)}; there are {', '.join(PARTS)}")
    report = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    report["machine"] = {"processor": platform.machine(), "torch": torch.__version__, "threads": 1}
    for name in arguments.parts or PARTS:
        repeats = 200 if name == "variance" else arguments.repeats
        report[name] = {"command": f"python benchmarks/run.py {name}", "repeats": repeats, **PARTS[name](repeats)}
        print(name, json.dumps(report[name], indent=1), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    partial = arguments.output.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(arguments.output)


if __name__ == "__main__":
    main()
