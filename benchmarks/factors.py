"""What fitting Kronecker factors costs (symbnn.layerwise.kronecker): seconds and memory against the size of networks.

    python benchmarks/factors.py        # writes benchmarks/results/factors.json; a few minutes

Each network in a process of its own, one thread, float32, 200 random images of 16 x 16 pixels, ten classes. Memory is
the peak resident memory above what was there before, beside the bytes that `check_factors` predicts for the factors.
"""
import argparse
import json
import platform
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from peak import peak_megabytes

from symbnn.layerwise.evidence import laplace, log_precisions
from symbnn.layerwise.kronecker import check_factors
from symbnn.layerwise.relaxed_networks import relaxed_network
from symbnn.posterior.layers import variational_tensors, with_posteriors
from symbnn.posterior.point_mass import PointMass

IMAGES, SHAPE, CLASSES = 200, (1, 16, 16), 10
WIDTHS = {"CONV": (8, 16, 32), "F-FC+CONV": (2, 4, 8), "FC+CONV": (1, 2, 4)}


def measure(kind, width, curvature):
    """One fit."""
    generator = torch.Generator().manual_seed(0)
    plain = relaxed_network(kind, SHAPE, CLASSES, channels=(width, 2 * width), strides=(1, 2), generator=generator)
    network = with_posteriors(plain, PointMass)
    x, y = torch.randn(IMAGES, *SHAPE, generator=generator), torch.randint(CLASSES, (IMAGES,), generator=generator)
    laplace(network, x[:2], y[:2], curvature=curvature)  # whatever is set up once
    start = time.perf_counter()
    fitted, peak = peak_megabytes(partial(laplace, network, x, y, curvature=curvature))
    seconds = time.perf_counter() - start
    return {
        "weights": sum(tensor.posterior.numel for tensor in variational_tensors(network).values()),
        "seconds": seconds, "peak MB": peak,
        "predicted MB of factors": check_factors(network, 2**40) / 2**20,
        "log evidence": fitted.log_evidence(log_precisions(network)).item(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "factors.json")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        kind, width, curvature = arguments.one
        print(json.dumps(measure(kind, int(width), curvature)))
        return
    report = {"command": "python benchmarks/factors.py", "machine": {
        "processor": platform.machine(), "torch": torch.__version__, "threads": 1}, "networks": []}
    for kind, widths in WIDTHS.items():
        for width in widths:
            row = {"kind": kind, "channels": [width, 2 * width]}
            for curvature in ("exact", "sampled"):
                command = [sys.executable, __file__, "--one", kind, str(width), curvature]
                row[curvature] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            report["networks"].append(row)
            print(json.dumps(row), flush=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
