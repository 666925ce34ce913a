"""Posteriors of several kinds at equal cost of training, and what each way of symmetrising does to each.

    python benchmarks/posteriors.py                # three seeds; writes results/posteriors/table.csv and members.csv
    python benchmarks/posteriors.py --seeds 1 --passes 4 --folder /tmp/look

The task is digits in four orientations, 300 of them to learn from. The budget is a number of passes over all images in
all orientations: one network has all of them, each of four members a quarter. IVON takes one draw a step, mean-field
variational inference eight in one pass. Laplace posteriors cost one pass more.
"""
import argparse
import csv
import statistics
from io import StringIO
from pathlib import Path

import torch
from torch import nn

import symbnn as sb
from symbnn.data.batches import epoch_generator
from symbnn.data.splits import Split
from symbnn.equivariance.ensemble_orbits import ensemble_defect, expand_members, orbit_ensemble, project_members
from symbnn.equivariance.metrics import summarize
from symbnn.equivariance.mixture import orbit_average
from symbnn.equivariance.predictions import orbit_predictions
from symbnn.equivariance.projected_gradients import keep_invariant
from symbnn.errors import Refusal
from symbnn.files import write_file
from symbnn.layerwise.laplace_posteriors import laplace_posterior
from symbnn.posterior.ensembles import Ensemble
from symbnn.posterior.ivon import IVON
from symbnn.posterior.layers import posterior_mean_network, with_posteriors
from symbnn.posterior.point_mass import PointMass
from symbnn.posterior.priors import isotropic

RATE, BATCH, MEMBERS, DRAWS = 0.01, 25, 4, 64
SCORES = ("accuracy", "nll_nats", "ece", "defect")


def plain(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 16, 3, padding=1),
                         nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))


def pair_of(seed, shape, **how):
    return sb.bayesianize(plain(seed), sb.rotations(), shape, prior=isotropic(1.0), **how)


def trained(pair, data, passes, seed):
    sb.train(pair, data, epochs=passes, batch_size=BATCH, learning_rate=RATE, schedule="cosine",
             augmentation="full", seed=seed)
    return pair


def with_ivon(pair, data, passes, seed, action=None):
    """As many passes over the images in all orientations, with the natural gradient of one draw a step."""
    inputs, labels = orbits_of(pair, data)
    optimizer = IVON(pair.network, len(inputs), 0.1, beta2=0.9995, clip=0.01, action=action)
    for epoch in range(passes):
        generator = epoch_generator(seed, epoch)
        optimizer.learning_rate = 0.1 * (1 - epoch / passes) + 1e-3
        for rows in torch.randperm(len(inputs), generator=generator).split(BATCH):
            optimizer.update(inputs[rows], labels[rows], generator=generator)
    return pair


def orbits_of(pair, data):
    """Every image in every orientation, with its label."""
    inputs = torch.cat([pair.action.input.act(g, data.inputs) for g in pair.group.elements()])
    return inputs, data.labels.repeat(pair.group.order)


def laplace(pair, data, structure):
    """Around the network's means, with the curvature of all orientations."""
    found = laplace_posterior(pair.network, *orbits_of(pair, data), structure=structure)
    return sb.Symmetric(found, pair.action)


def scores_of(predictor, action, data, draws=None, mixed=False):
    generator = torch.Generator().manual_seed(9)
    found = orbit_predictions(predictor, data.inputs, action, draws, generator=generator)
    scores = summarize(orbit_average(found) if mixed else found, data.labels)
    known = draws is None  # every member is there, so the defect is what it is; of draws the plug-in one is biased
    defect = 0.0 if mixed else scores["defect_plugin" if known else "defect_unbiased"]
    return {**{name: scores[name] for name in SCORES[:3]}, "defect": defect}


def rows_of_pair(name, pair, test, point=False):
    """As it is, averaged, as an orbit mixture and expanded."""
    draws = None if point else DRAWS

    def network(its):
        return posterior_mean_network(its.network) if point else its.network

    yield name, "as trained", scores_of(network(pair), pair.action, test, draws)
    yield name, "orbit mixture", scores_of(network(pair), pair.action, test, draws, mixed=True)
    for how, change in (("average", lambda: pair.average("projection" if point else "geometric")),
                        ("expansion", pair.expand)):
        try:
            its = change()
        except Refusal as refusal:
            print(f"{name}, {how}: {refusal}")
        else:
            yield name, how, scores_of(network(its), its.action, test, draws)


def rows_of_members(name, members, action, test):
    yield name, "as trained", scores_of(members, action, test)
    yield name, "average", scores_of(project_members(members, action), action, test)
    yield name, "orbit mixture", scores_of(orbit_ensemble(members, action), action, test)
    yield name, "expansion", scores_of(expand_members(members, action), pair_action_wide(members, action), test)


def pair_action_wide(members, action):
    pair = sb.Symmetric(with_posteriors(members[0], PointMass), action)
    return pair.expand().action


def run(seed, passes):
    digits = sb.load("digits", train_size=300, seed=seed)
    data, test = Split(digits.train.inputs, digits.train.targets), digits.test
    point = trained(pair_of(seed, digits.shape, family=PointMass), data, passes, seed)
    yield from rows_of_pair("MAP", point, test, point=True)
    members = [trained(pair_of(100 * seed + m, digits.shape, family=PointMass), data, passes // MEMBERS, m)
               for m in range(2 * MEMBERS)]
    nets = [posterior_mean_network(its.network) for its in members]
    yield from rows_of_members(f"ensemble of {MEMBERS}", Ensemble(nets[:MEMBERS]), point.action, test)
    yield from rows_of_pair("mean field", trained(pair_of(seed, digits.shape), data, passes, seed), test)
    yield from rows_of_pair("IVON", with_ivon(pair_of(seed, digits.shape), data, passes, seed), test)
    for structure in ("diagonal", "kronecker"):
        its = laplace(point, data, structure)
        yield from rows_of_pair(f"Laplace, {structure}", its, test)
    even = pair_of(seed, digits.shape, family=PointMass).average("projection")
    with keep_invariant(even.network, even.action):
        trained(even, data, passes, seed)
    yield "MAP, projected", "as trained", scores_of(posterior_mean_network(even.network), even.action, test)
    its = laplace(even, data, "diagonal")
    yield "Laplace, diagonal, projected", "as trained", scores_of(its.network, its.action, test, DRAWS)
    yield from members_rows(nets, point.action, test)


def members_rows(nets, action, test):
    """The defect of one to eight members, and what the law of four says of it."""
    found = orbit_predictions(Ensemble(nets), test.inputs, action)
    few = orbit_predictions(Ensemble(nets[:MEMBERS]), test.inputs, action)
    for count in (1, 2, 4, 8):
        ours = summarize(orbit_predictions(Ensemble(nets[:count]), test.inputs, action), test.labels)
        yield "members", count, {"measured": ours["defect_plugin"], "of all": ensemble_defect(found, count).value,
                                 "of four": ensemble_defect(few, count).value,
                                 "error": ensemble_defect(few, count).standard_error}


def table(rows, columns):
    """Mean and standard error over seeds of every score."""
    groups = {}
    for name, how, scores in rows:
        groups.setdefault((name, how), []).append(scores)
    for (name, how), each in groups.items():
        found = {"posterior": name, "symmetrised": how, "seeds": len(each)}
        for column in columns:
            values = [scores[column] for scores in each]
            spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
            found |= {column: f"{statistics.mean(values):.6g}", f"{column}_se": f"{spread:.3g}"}
        yield found


def write(path, rows):
    text = StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=40)
    parser.add_argument("--folder", type=Path, default=Path("results/posteriors"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(asked.seeds):
        for row in run(seed, asked.passes):
            print(seed, *row[:2], {name: round(value, 4) for name, value in row[2].items()}, flush=True)
            rows.append(row)
    asked.folder.mkdir(parents=True, exist_ok=True)
    members = [row for row in rows if row[0] == "members"]
    write(asked.folder / "table.csv", list(table([row for row in rows if row[0] != "members"], SCORES)))
    write(asked.folder / "members.csv", list(table(members, members[0][2])))


if __name__ == "__main__":
    main()
