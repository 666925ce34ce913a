"""What it costs to keep the contract of draws: the trial, looking its plan up, and a step in which draws run together
or one at a time. One thread, float32, process seconds, medians.

    python benchmarks/plans.py          # writes benchmarks/results/plans.json
"""
import json
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn

from symbnn.posterior.layers import with_posteriors
from symbnn.posterior.plans import execution_plan
from symbnn.posterior.sampling import forward, predict


class TimeFirst(nn.Module):
    """A network whose layers see time before examples, so that its draws run one at a time."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(28, 128), nn.Linear(128, 10)

    def forward(self, x):
        return self.last(torch.relu(self.first(x.squeeze(1).transpose(0, 1)))).mean(0)


def networks():
    """Network and inputs by name."""
    images = torch.randn(128, 1, 28, 28)
    convolutions = [nn.Conv2d(1, 32, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1),
                    nn.MaxPool2d(2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    dense = [nn.Flatten(), nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10)]
    return {
        "convolutions [32, 64]": (nn.Sequential(*convolutions), images),
        "784-400-400-10": (nn.Sequential(*dense), images),
        "4-8-1": (nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(32, 4)),
        "time first, 28-128-10": (TimeFirst(), images),
    }


def milliseconds(call, repeats):
    """The median of the process's time for a call, in milliseconds."""
    found = []
    for _ in range(repeats):
        began = time.process_time()
        call()
        found.append(1e3 * (time.process_time() - began))
    return round(median(found), 3)


def main():
    """Measure every network and write what was found."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = {}
    for name, (plain, x) in networks().items():
        network = with_posteriors(plain)
        execution_plan(with_posteriors(plain), x)  # what torch sets up once

        def step(draws, estimator, network=network, x=x):
            forward(network, x, draws, estimator).square().mean().backward()

        rows[name] = {
            "plan": str(execution_plan(network, x)),
            "trial_ms": milliseconds(lambda plain=plain, x=x: execution_plan(with_posteriors(plain), x), 5),
            "lookup_ms": milliseconds(lambda network=network, x=x: execution_plan(network, x), 101),
            "split_step_8_ms": milliseconds(lambda: step(8, "split"), 9),
            "whole_step_8_ms": milliseconds(lambda: step(8, "whole"), 5),
            "predict_32_ms": milliseconds(lambda network=network, x=x: predict(network, x, draws=32), 5),
        }
        print(name, rows[name])
    path = Path(__file__).parent / "results" / "plans.json"
    path.write_text(json.dumps({"command": "python benchmarks/plans.py", "networks": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
