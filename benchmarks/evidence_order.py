"""Why the Laplace evidence ranks a convolutional and a fully connected network as it does (symbnn.layerwise.evidence).

    python benchmarks/evidence_order.py --root FOLDER_OF_MNIST          # both parts
    python benchmarks/evidence_order.py --root FOLDER_OF_MNIST few      # or one; results/evidence_order.json is updated

The task is `digit` of the study `layerwise`: a digit in a random quadrant, and the label is the digit. Each network is
trained as in the study (for `few` with precisions that start at 1, and ten times the epochs); then its precisions are
taken towards the stationary point of the evidence and its weights, by L-BFGS, towards the maximum of the log posterior,
in turns. Before and after, the same weights are judged by Kronecker factors and by the Gauss-Newton matrix; how far
they were from stationary is recorded ("gap": of a log-precision before the last turn; "gradient": norm of the log
posterior's gradient; "rise": of the log posterior in the last turn).

few     200 images and half the channels, where the Gauss-Newton matrix is exact, from the side of the data; also
        without the terms between tensors, and without those between layers; precisions by its evidence
study   the study's 8000 images, where its determinant is bounded by stochastic Lanczos quadrature; precisions by the
        evidence of Kronecker factors

One thread; float64 for `few`, float32 for `study`.
"""
import argparse
import json
import math
import time
from functools import partial
from pathlib import Path

import torch

from symbnn.data.splits import Split
from symbnn.layerwise.evidence import laplace, log_precisions, set_log_precisions
from symbnn.layerwise.precisions import PrecisionUpdates, evidence_precisions
from symbnn.posterior.layers import posterior_mean_network, variational_tensors
from symbnn.studies.tasks import Setup, prepare
from symbnn.training.config import TrainingConfig
from symbnn.training.loop import train

PARTS = ("few", "study")
LIMIT = 2**34  # bytes
WIDTHS = {"few": (4, 8, 16), "study": (8, 16, 32)}
IMAGES, EPOCHS = {"few": 200, "study": 8000}, {"few": 400, "study": 40}
PRIORS = {"few": "isotropic", "study": "per_tensor"}  # for so few images the prior of the study is too narrow
KINDS = ("CONV", "FC")
ROUTES, ROUNDS, STEPS = {"few": "full", "study": "exact"}, {"few": 2, "study": 3}, {"few": 100, "study": 30}


def trained(part, kind, channels, root, seed):
    """A network, trained as in the study, and its task."""
    task = prepare(Setup(
        "mnist", IMAGES[part], variant="digit", size=16, standardized=True, group="none", architecture=kind,
        channels=channels, strides=(2, 2, 2), family="point", prior=PRIORS[part], initial_scale=0.02,
        validation_size=1000), root=root)
    network, data = task.network(seed), task.data.train
    epochs = EPOCHS[part]
    rule = partial(evidence_precisions, inputs=data.inputs, targets=data.labels, curvature="sampled")
    config = TrainingConfig(epochs=epochs, batch_size=128, draws=1, estimator="whole", learning_rate=0.01,
                            schedule="cosine", augmentation="none", evaluate_every=100_000, seed=seed)
    train(network, data, config, callback=PrecisionUpdates(rule, epochs // 4, max(2, epochs // 20)))
    return network, task


def climb(network, data, steps):
    """Take the weights up their log posterior by L-BFGS; how much it rose, and the gradient's norm, in nats."""
    plain = posterior_mean_network(network).eval().requires_grad_(True)
    weights = {name: plain.get_parameter(name) for name in variational_tensors(network)}
    d = {name: float(value.exp()) for name, value in log_precisions(network).items()}
    count = len(data.labels)
    optimizer = torch.optim.LBFGS(list(weights.values()), max_iter=steps, max_eval=2 * steps, history_size=30,
                                  tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        fit = torch.nn.functional.cross_entropy(plain(data.inputs), data.labels)
        value = fit + sum(d[name] * weight.square().sum() for name, weight in weights.items()) / (2 * count)
        value.backward()
        return value

    before = loss().item()
    optimizer.step(loss)
    after = loss().item()
    for name, tensor in variational_tensors(network).items():
        tensor.posterior.loc.data.copy_(weights[name].data)
    norm = math.hypot(*(weight.grad.norm().item() for weight in weights.values()))
    return {"rise": count * (before - after), "gradient": count * norm}


def towards_stationary(network, fitted, furthest=2.0):
    """Move the log-precisions to log(gamma / |theta|^2), by `furthest` at most; the largest distance before."""
    at, gaps = log_precisions(network), {}
    for name, gamma in fitted.effective_dimensions(at).items():
        gaps[name] = math.log(max(gamma, 1e-12) / max(float(fitted.squared_norms[name]), 1e-12)) - float(at[name])
    set_log_precisions(network, {name: (at[name] + max(-furthest, min(gap, furthest))).clamp(max=20.0)
                                 for name, gap in gaps.items()})
    return max(abs(gap) for name, gap in gaps.items() if at[name] < 20)


@torch.no_grad()
def results(network, task):
    """Accuracy and negative log-likelihood on 2000 test images, as in the study."""
    chosen, dtype = task.data.test, next(iter(variational_tensors(network).values())).posterior.loc.dtype
    outputs = posterior_mean_network(network).eval()(chosen.inputs[:2000].to(dtype))
    labels = chosen.labels[:2000]
    return {"accuracy": (outputs.argmax(-1) == labels).double().mean().item(),
            "nll": torch.nn.functional.cross_entropy(outputs, labels).item()}


def layers_of(names):
    """The tensors of each layer."""
    found = {}
    for name in names:
        found.setdefault(name.split(".")[0], []).append(name)
    return list(found.values())


def judge(network, data, full_log_dets):
    """The parts of the evidence in nats a datum; `full_log_dets(network, log_precisions)` gives some determinants."""
    d, count = log_precisions(network), len(data.labels)
    fitted = laplace(network, data.inputs, data.labels, curvature="exact", memory_limit=LIMIT)
    penalty = sum(float(d[name].exp() * square) for name, square in fitted.squared_norms.items())
    base = (fitted.log_likelihood - penalty / 2) / count
    dets = {"Kronecker": float(fitted.curvature.log_det(d))} | full_log_dets(network, d)
    return {"log_likelihood": fitted.log_likelihood / count, "penalty": penalty / 2 / count,
            "evidence": {name: base - value / 2 / count for name, value in dets.items()}, "log_det": dets,
            "effective dimension, Kronecker": sum(fitted.effective_dimensions(d).values())}


def exact_log_dets(data, network, d):
    """From the Gauss-Newton matrix on these data."""
    with torch.no_grad():
        curvature = laplace(network, data.inputs, data.labels, curvature="full", memory_limit=LIMIT).curvature
        return {"tensors": sum(float(curvature.restricted([name]).log_det(d)) for name in d),
                "layers": sum(float(curvature.restricted(names).log_det(d)) for names in layers_of(d)),
                "full": float(curvature.log_det(d))}


def stages(part, kind, channels, root, seed=0):
    """The rows of results of one network: as trained, and after turns of its weights and precisions."""
    network, task = trained(part, kind, channels, root, seed)
    data = task.data.train
    if part == "few":
        network, data = network.double(), Split(data.inputs.double(), data.labels)
    log_dets = partial({"few": exact_log_dets, "study": estimated_log_dets}[part], data)
    common, began = {"part": part, "kind": kind, "channels": channels, "images": len(data.labels)}, time.process_time()

    def row(stage, **more):
        found = common | {"stage": stage} | judge(network, data, log_dets) | results(network, task) | more
        return found | {"seconds": time.process_time() - began}

    yield row("trained")
    climb(network, data, STEPS[part])
    for _ in range(ROUNDS[part]):
        gap = towards_stationary(network, laplace(network, data.inputs, data.labels, curvature=ROUTES[part],
                                                  memory_limit=LIMIT))
        climbed = climb(network, data, STEPS[part])
    yield row(f"stationary by {ROUTES[part]}", gap=gap, **climbed)


class GaussNewton:
    """D^-1/2 G D^-1/2 times a vector, for all data, in batches."""

    def __init__(self, network, data, d, batch_size=500):
        self.plain = posterior_mean_network(network).eval()
        self.weights = {name: self.plain.get_parameter(name).detach() for name in d}
        self.scales = {name: float((-value / 2).exp()) for name, value in d.items()}
        self.batches = data.inputs.split(batch_size)
        self.sizes = [weight.numel() for weight in self.weights.values()]

    def __call__(self, vector):
        pieces = vector.split(self.sizes)
        tangent = {name: (self.scales[name] * piece).view(weight.shape).to(weight)
                   for (name, weight), piece in zip(self.weights.items(), pieces)}
        total = torch.zeros_like(vector)
        for x in self.batches:
            outputs = partial(self._outputs, x)
            value, moved = torch.func.jvp(outputs, (self.weights,), (tangent,))
            p = value.softmax(-1)
            _, pull = torch.func.vjp(outputs, self.weights)
            back = pull(p * (moved - (p * moved).sum(-1, keepdim=True)))[0]
            total += torch.cat([self.scales[name] * back[name].flatten().double() for name in self.weights])
        return total

    def _outputs(self, x, weights):
        return torch.func.functional_call(self.plain, weights, (x,))


def quadrature(diagonal, beside):
    """The first weight of the Gauss rule of a Jacobi matrix, applied to log(1 + x)."""
    T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    T += torch.diag(torch.tensor(beside), 1) + torch.diag(torch.tensor(beside), -1)
    values, vectors = torch.linalg.eigh(T)
    return float(vectors[0].square() @ values.clamp(min=0).log1p())


@torch.no_grad()
def lanczos_log_det(product, size, probes, steps, seed=0):
    """Bounds of log det(I + A) from stochastic Lanczos quadrature: (lower, upper, their standard error).

    The even derivatives of log(1 + x) are negative, so for each probe the Gauss rule is an upper bound, and the
    Gauss-Radau rule with a node at 0, below all eigenvalues, a lower one. Probes are random signs.
    """
    generator, lower, upper = torch.Generator().manual_seed(seed), [], []
    for _ in range(probes):
        basis = [torch.randint(2, (size,), generator=generator).double().mul(2).sub(1) / math.sqrt(size)]
        diagonal, beside = [], []
        for _ in range(steps):
            vector = product(basis[-1])
            diagonal.append(float(vector @ basis[-1]))
            for _ in range(2):  # twice is enough
                for one in basis:
                    vector -= (vector @ one) * one
            beside.append(float(vector.norm()))
            basis.append(vector / beside[-1])
        upper.append(size * quadrature(diagonal, beside[:-1]))
        pivot = diagonal[0]  # of the Cholesky factorisation; the last one has to vanish
        for step in range(1, steps):
            pivot = diagonal[step] - beside[step - 1] ** 2 / pivot
        lower.append(size * quadrature([*diagonal, beside[-1] ** 2 / pivot], beside))
    lower, upper = torch.tensor(lower), torch.tensor(upper)
    return lower.mean().item(), upper.mean().item(), ((lower + upper) / 2).std().item() / math.sqrt(probes)


def estimated_log_dets(data, network, d, probes=2, steps=40):
    """Bounds by stochastic Lanczos quadrature, two standard errors to the safe side, named for the evidence."""
    product = GaussNewton(network, data, d)
    lower, upper, error = lanczos_log_det(product, sum(product.sizes), probes, steps)
    return {"full, at most": lower - 2 * error, "full, at least": upper + 2 * error}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="default: all of them")
    parser.add_argument("--root", type=Path, required=True, help="folder with the four files of MNIST")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "evidence_order.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for part in arguments.parts or PARTS:
        for kind in KINDS:
            for row in stages(part, kind, WIDTHS[part], arguments.root):
                print(json.dumps(row), flush=True)
                keep(arguments.output, part, row)


def keep(path, part, row):
    """Put a row into the file, in place of an older one of the same network and stage."""
    report = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    rows = report["parts"].setdefault(part, {"rows": []})
    rows["command"] = f"python benchmarks/evidence_order.py --root FOLDER_OF_MNIST {part}"
    rows["torch"] = torch.__version__
    rows["rows"] = [old for old in rows["rows"] if (old["kind"], old["stage"]) != (row["kind"], row["stage"])] + [row]
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
