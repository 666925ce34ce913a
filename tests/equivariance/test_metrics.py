"""Metrics against slow loops in float64, the defect against exact moments."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers_equivariance import EQUIVARIANCE, SCORES, TWO_LOGITS, random_predictions, which_way_up
from symbnn.equivariance.metrics import (
    accuracy,
    adaptive_calibration_error,
    brier,
    defect_plugin,
    defect_unbiased,
    ece,
    nll,
    orbit_agreement,
    orbit_jensen_shannon,
    summarize,
    symmetric_kl,
)
from symbnn.equivariance.predictions import (
    OrbitPredictions,
    orbit_predictions,
)
from symbnn.errors import Refusal
from symbnn.estimates import Estimate
from symbnn.posterior.layers import with_posteriors
from tolerances import assert_close, exact32, exact64, within_standard_errors


def lists(P):
    return P.double().tolist()


def mean_prediction(P, i, g):
    return [sum(draw[i][g][c] for draw in P) / len(P) for c in range(len(P[0][0][0]))]


def all_means(P):
    return [[mean_prediction(P, i, g) for g in range(len(P[0][0]))] for i in range(len(P[0]))]


def reference_scores(P, labels, over, bins=15):
    rows = [(m, y) for turns, y in zip(all_means(P), labels, strict=True)
            for m in (turns if over == "orbit" else turns[:1])]
    binned = [[] for _ in range(bins)]
    for m, y in rows:
        binned[min(int(max(m) * bins), bins - 1)].append((max(m), float(m.index(max(m)) == y)))
    gaps = [abs(sum(c for c, _ in b) - sum(a for _, a in b)) for b in binned]
    return {
        accuracy: sum(m.index(max(m)) == y for m, y in rows) / len(rows),
        nll: -sum(math.log(m[y]) for m, y in rows) / len(rows),
        brier: sum(sum((x - (c == y)) ** 2 for c, x in enumerate(m)) for m, y in rows) / len(rows),
        ece: sum(gaps) / len(rows),
    }


def kl(p, q):
    return sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))


def reference_equivariance(P):
    found = {metric: [] for metric in EQUIVARIANCE}
    for turns in all_means(P):
        plain, G = turns[0], len(turns)
        center = [sum(m[c] for m in turns) / G for c in range(len(plain))]
        found[orbit_jensen_shannon].append(sum(kl(m, center) for m in turns) / G)
        for g, m in enumerate(turns):
            found[defect_plugin].append(sum((x - y) ** 2 for x, y in zip(m, plain, strict=True)))
            if g > 0:
                found[symmetric_kl].append(kl(m, plain) + kl(plain, m))
                found[orbit_agreement].append(m.index(max(m)) == plain.index(max(plain)))
    return {metric: sum(values) / len(values) for metric, values in found.items()}


def reference_unbiased(P):
    """The mean over ordered pairs of different draws of <d_s, d_t>, averaged over inputs and turns."""
    S, N, G, C = len(P), len(P[0]), len(P[0][0]), len(P[0][0][0])
    total = 0.0
    for i in range(N):
        for g in range(G):
            d = [[P[s][i][g][c] - P[s][i][0][c] for c in range(C)] for s in range(S)]
            pairs = [(d[s], d[t]) for s in range(S) for t in range(S) if s != t]
            total += sum(x * y for one, other in pairs for x, y in zip(one, other, strict=True))
    return total / (N * G * S * (S - 1))


def reference_jackknife(P):
    S = len(P)
    without = [reference_unbiased(P[:s] + P[s + 1:]) for s in range(S)]
    middle = sum(without) / S
    return math.sqrt((S - 1) / S * sum((x - middle) ** 2 for x in without))

shapes = st.tuples(st.integers(3, 5), st.integers(2, 4), st.integers(2, 4), st.integers(2, 4), st.integers(0, 10**6))


@given(shapes)
def test_scores_against_loops(shape):
    P, labels = random_predictions(*shape)
    for over in ("identity", "orbit"):
        for metric, expected in reference_scores(lists(P), labels.tolist(), over).items():
            tolerance = exact32 if metric is ece else exact64  # torchmetrics bins in float32
            assert_close(metric(P, labels, over=over), expected, tolerance)


@given(shapes)
def test_equivariance_metrics_against_loops(shape):
    P, _ = random_predictions(*shape)
    for metric, expected in reference_equivariance(lists(P)).items():
        assert_close(metric(P), expected, exact64)


@given(shapes)
def test_unbiased_defect_and_jackknife_against_loops(shape):
    P, _ = random_predictions(*shape)
    value, error = defect_unbiased(P)
    assert_close(value, reference_unbiased(lists(P)), exact64)
    assert_close(error, reference_jackknife(lists(P)), exact64)
    by_inputs = torch.tensor([reference_unbiased(lists(P[:, [i]])) for i in range(P.shape[1])])
    over_inputs = defect_unbiased(P, error="inputs")
    assert_close(over_inputs.value, value, exact64)
    assert_close(over_inputs.standard_error, by_inputs.std() / math.sqrt(len(by_inputs)), exact32)


@given(shapes)
def test_plugin_is_unbiased_plus_sample_covariance(shape):
    P, _ = random_predictions(*shape)
    covariance = (P - P[:, :, :1]).var(0).sum(-1).mean().item()
    assert_close(defect_plugin(P), defect_unbiased(P).value + covariance / len(P), exact64)


@given(shapes)
def test_float32_agrees_with_float64(shape):
    P, labels = random_predictions(*shape, dtype=torch.float32)
    assert_close(tuple(defect_unbiased(P)), tuple(defect_unbiased(P.double())), exact32)
    for metric in (nll, brier):
        assert_close(metric(P, labels), metric(P.double(), labels), exact32)
    for metric in (defect_plugin, orbit_jensen_shannon, symmetric_kl):
        assert_close(metric(P), metric(P.double()), exact32)


@given(shapes)
def test_bounds(shape):
    P, labels = random_predictions(*shape, sharpness=8.0)
    mean = P.mean(0)
    tv = (mean - mean.mean(1, keepdim=True)).abs().sum(-1) / 2
    js = orbit_jensen_shannon(P)
    assert 0 <= js <= min(math.log(P.shape[2]), math.log(P.shape[3])) + exact64
    assert tv.square().mean() <= js / 2 + exact64
    assert 0 <= orbit_agreement(P) <= 1 and symmetric_kl(P) >= 0 and 0 <= brier(P, labels) <= 2
    same = P[:, :, :1].expand(P.shape)
    assert orbit_jensen_shannon(same) < exact64 and symmetric_kl(same) == defect_plugin(same) == 0
    assert orbit_agreement(same) == 1
    assert tuple(defect_unbiased(same)) == (0, 0)


def test_relabelling_turns_and_draws_changes_nothing():
    P, _ = random_predictions(5, 4, 4, 3, 0)
    shuffled = P[torch.randperm(5)][:, :, [0, 3, 1, 2]]
    for metric in EQUIVARIANCE:
        assert_close(metric(shuffled), metric(P), exact64)
    assert_close(tuple(defect_unbiased(shuffled)), tuple(defect_unbiased(P)), exact64)


def dirichlet_draws(alpha, draws, seed):
    torch.manual_seed(seed)
    return torch.distributions.Dirichlet(alpha).sample((draws,))


@pytest.fixture(scope="module")
def concentrations():
    generator = torch.Generator().manual_seed(0)
    base = 1 + 3 * torch.rand(20, 1, 4, dtype=torch.float64, generator=generator)
    return base.expand(20, 4, 4), base * (1 + torch.rand(20, 4, 4, dtype=torch.float64, generator=generator))


def test_invariant_posterior_at_eight_draws(concentrations):
    P = dirichlet_draws(concentrations[0], 8, 1)
    value, error = defect_unbiased(P)
    within_standard_errors(value, 0.0, error, k=3)
    assert defect_plugin(P) > 3 * error


def test_eight_draws_agree_with_4096_and_with_the_exact_defect(concentrations):
    mean = concentrations[1] / concentrations[1].sum(-1, keepdim=True)
    exact = (mean - mean[:, :1]).square().sum(-1).mean().item()
    few, many = (defect_unbiased(dirichlet_draws(concentrations[1], draws, 2)) for draws in (8, 4096))
    within_standard_errors(few.value, many.value, math.hypot(few.standard_error, many.standard_error))
    within_standard_errors(many.value, exact, many.standard_error)
    assert exact > 10 * many.standard_error


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("draws", [3, 8])
def test_expectations(concentrations, which, draws):
    alpha = concentrations[which]
    mean, total = alpha / alpha.sum(-1, keepdim=True), alpha.sum(-1)
    trace = (1 - mean.square().sum(-1)) / (total + 1)
    exact = (mean - mean[:, :1]).square().sum(-1).mean()
    bias = ((trace + trace[:, :1])[:, 1:].sum(1) / alpha.shape[1]).mean() / draws
    runs = dirichlet_draws(alpha, 300 * draws, 4).split(draws)
    found = torch.tensor([[defect_unbiased(run).value, defect_plugin(run)] for run in runs], dtype=torch.float64)
    error = found.std(0) / math.sqrt(len(runs))
    within_standard_errors(found.mean(0), torch.stack([exact, exact + bias]), error)
    jackknife = torch.tensor([defect_unbiased(run).standard_error for run in runs]).double()
    ratio = jackknife.square().mean() / found[:, 0].var()
    # exact expectation of the ratio: 2 (S - 1) / (S - 2) for an invariant posterior, never below 1
    assert ratio > 0.85 and (which == 1 or abs(ratio / (2 * (draws - 1) / (draws - 2)) - 1) < 0.25)
    inside = ((found[:, 0] - exact).abs() <= 2 * jackknife).double().mean()
    assert inside > 0.9


def test_underflow_is_clamped():
    P = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    floor = -math.log(torch.finfo(torch.float32).tiny)
    assert_close(nll(P, torch.tensor([1])), floor, exact32)
    assert_close(symmetric_kl(P), 2 * floor, exact32)
    assert_close(symmetric_kl(P.double()), -2 * math.log(torch.finfo(torch.float64).tiny), exact64)
    assert_close(orbit_jensen_shannon(P), math.log(2), exact64)


def test_calibration_of_rounded_and_certain_probabilities():
    above = torch.tensor([[[[1.0 + 1e-7, 0.0]], [[1.0, 0.0]], [[0.96, 0.04]], [[0.96, 0.04]]]])
    assert above.max() > 1
    # one bin, confidence 0.98, accuracy 0.5; torchmetrics alone would apply softmax, or put 1.0 in a bin of its own
    assert_close(ece(above, torch.tensor([0, 0, 1, 1])), 0.48, exact32)


def test_labels_of_any_integer_type():
    P, labels = random_predictions(3, 4, 2, 3, 0)
    assert accuracy(P, labels.to(torch.uint8)) == accuracy(P, labels.to(torch.int32)) == accuracy(P, labels)
    assert nll(P, labels.to(torch.int8)) == nll(P, labels)


P0, Y0 = random_predictions(3, 4, 2, 3, 0)


def test_too_little_for_the_question_is_refused():
    for metric in (*EQUIVARIANCE, defect_unbiased):
        with pytest.raises(Refusal, match="group element"):
            metric(P0[:, :, :1])
    for too_few in (P0[:1], P0[:2]):
        with pytest.raises(Refusal, match="draw"):
            defect_unbiased(too_few)
    with pytest.raises(Refusal):
        defect_unbiased(P0[:1], error="inputs")
    with pytest.raises(Refusal):
        defect_unbiased(P0[:, :1], error="inputs")
    with pytest.raises(Refusal):
        defect_unbiased(P0, error="both")
    with pytest.raises(Refusal):
        ece(P0, Y0, bins=0)
    with pytest.raises(Refusal):
        accuracy(P0, Y0, over="turns")


def test_summary():
    P, labels = random_predictions(4, 6, 4, 3, 1)
    found = summarize(OrbitPredictions(P, (0, 1, 2, 3), "common"), labels, bins=7)
    assert all(type(value) is float and math.isfinite(value) for value in found.values())
    for prefix, over in (("", "identity"), ("orbit_", "orbit")):
        for name, metric in (("accuracy", accuracy), ("nll_nats", nll), ("brier", brier)):
            assert found[prefix + name] == metric(P, labels, over=over)
            single = torch.tensor([metric(P[:, [i]], labels[[i]], over=over) for i in range(6)], dtype=torch.float64)
            assert_close(found[f"{prefix}{name}_se"], single.std() / math.sqrt(6), exact64)
        assert found[prefix + "ece"] == ece(P, labels, over=over, bins=7)
    for name, metric in (("orbit_jensen_shannon_nats", orbit_jensen_shannon), ("symmetric_kl_nats", symmetric_kl),
                         ("orbit_agreement", orbit_agreement), ("defect_plugin", defect_plugin)):
        assert found[name] == metric(P)
    assert Estimate(found["defect_unbiased"], found["defect_unbiased_se_draws"]) == defect_unbiased(P)
    assert found["defect_unbiased_se_inputs"] == defect_unbiased(P, error="inputs").standard_error


def test_summary_leaves_out_what_is_not_defined():
    P, labels = random_predictions(4, 6, 4, 3, 1)
    assert "defect_unbiased" not in summarize(OrbitPredictions(P[:2], (0, 1, 2, 3), "common"), labels)
    no_turns = summarize(OrbitPredictions(P[:, :, :1], (0,), "common"), labels)
    assert not any("defect" in name or "kl" in name for name in no_turns)
    one_input = summarize(OrbitPredictions(P[:, :1], (0, 1, 2, 3), "common"), labels[:1])
    assert not any(name.endswith(("_se", "_se_inputs")) for name in one_input)


@pytest.fixture(scope="module")
def setting():
    plain, action = which_way_up()
    x = torch.randn(7, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return plain, with_posteriors(plain, scale=0.3), action, x


def averaged():
    """`which_way_up` with its weights averaged over the group."""
    plain, action = which_way_up()
    parameters = dict(plain.named_parameters())
    with torch.no_grad():
        turned = [action.act(g, parameters) for g in action.group.elements()]
        for name, parameter in parameters.items():
            parameter.copy_(sum(one[name] for one in turned) / 4)
    return plain, action


def test_an_equivariant_network_is_seen_as_one(setting):
    """Weights averaged over the group and almost no noise: turned back, the predictions do not depend on the turn."""
    plain, action = averaged()
    predictions = orbit_predictions(with_posteriors(plain, scale=1e-14), setting[3], action, 3, "fresh")
    P = predictions.probabilities
    assert_close(P, P[:, :, :1].expand(P.shape), exact64)
    assert P[0, :, 0].std(-1).min() > 1e-3  # and they do depend on the class
    assert orbit_agreement(P) == 1 and defect_plugin(P) < exact64


def test_invariant_posterior_of_a_network_at_eight_draws():
    """An exactly invariant law whose draws are not invariant: the unbiased defect is 0, the plug-in one is not."""
    plain, action = averaged()
    network, x = with_posteriors(plain, scale=0.3), torch.randn(64, 1, 4, 4, dtype=torch.float64)
    P = orbit_predictions(network, x, action, 8, "fresh", 1, torch.Generator().manual_seed(0)).probabilities
    value, error = defect_unbiased(P)
    within_standard_errors(value, 0.0, error, k=3)
    assert defect_plugin(P) > 3 * error


def test_network_of_another_defect_agrees_with_many_draws(setting):
    _, network, action, x = setting
    generator = torch.Generator().manual_seed(0)
    few = defect_unbiased(orbit_predictions(network, x, action, 8, "common", generator=generator).probabilities)
    many = defect_unbiased(orbit_predictions(network, x, action, 4096, "shared", generator=generator).probabilities)
    within_standard_errors(few.value, many.value, math.hypot(few.standard_error, many.standard_error))
    assert many.value > 10 * many.standard_error


@pytest.mark.parametrize("metric", [*SCORES, *EQUIVARIANCE, defect_unbiased, summarize], ids=lambda m: m.__name__)
def test_one_class_is_no_classification(metric):
    sure, zeros = torch.ones(4, 6, 4, 1, dtype=torch.float64), torch.zeros(6, dtype=torch.int64)
    predicted = (lambda: OrbitPredictions(sure, (0, 1, 2, 3), "common")) if metric is summarize else (lambda: sure)
    with pytest.raises(Refusal, match=f"single class.*{TWO_LOGITS}"):
        metric(predicted(), *[zeros] * (metric in SCORES))


def test_the_summary_says_how_sure_the_network_is():
    P, labels = random_predictions(4, 6, 4, 3, 1)
    found = summarize(OrbitPredictions(P, (0, 1, 2, 3), "common"), labels, bins=7)
    for prefix, chosen, over in (("", P[:, :, :1], "identity"), ("orbit_", P, "orbit")):
        mean, turns = chosen.mean(0), chosen.shape[2]
        assert_close(found[f"{prefix}entropy_nats"], -(mean * mean.log()).sum(-1).mean(), exact64)
        each = -(chosen * chosen.log()).sum(-1).mean()
        assert_close(found[f"{prefix}mutual_information_nats"], found[f"{prefix}entropy_nats"] - each, exact64)
        assert found[f"{prefix}adaptive_ece"] == adaptive_calibration_error(P, labels, over, bins=7)
        confidence, predicted = mean.max(-1)
        wrong = (predicted != labels[:, None]).double().flatten()[confidence.flatten().argsort(descending=True)]
        area = (wrong.cumsum(0) / torch.arange(1, 6 * turns + 1)).mean()
        assert_close(found[f"{prefix}aurc"], area, exact64)
    assert not any("information" in name for name in summarize(OrbitPredictions(P[:1], (0, 1, 2, 3), "common"), labels))
