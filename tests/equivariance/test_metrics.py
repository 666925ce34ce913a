"""Metrics against slow loops in float64, the defect against exact moments, orbit predictions against the slow way."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from symbnn.equivariance.metrics import (
    accuracy,
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
    Equivariance,
    OrbitPredictions,
    check_labels,
    check_probabilities,
    orbit_predictions,
)
from symbnn.errors import Refusal
from symbnn.estimates import Estimate
from symbnn.posterior.divergences import jensen_shannon, orbit_error, through_jensen_shannon
from symbnn.posterior.layers import with_posteriors
from symbnn.posterior.sampling import predict, sample_weights
from symbnn.symmetry.actions import Action, regular_channels
from symbnn.symmetry.fields import field, rotations
from symbnn.symmetry.groups import Cyclic
from symbnn.symmetry.networks import network_action
from symbnn.training.architectures import Architecture, build
from tolerances import assert_close as tensors_close
from tolerances import exact32, exact64, within_standard_errors

SCORES = (accuracy, nll, brier, ece)
EQUIVARIANCE = (defect_plugin, orbit_jensen_shannon, symmetric_kl, orbit_agreement)


def assert_close(actual, expected, tolerance=exact64):
    """As in `tolerances`, for Python floats too, without rounding them to float32."""
    actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    tensors_close(actual, expected, tolerance)


# --- slow references: Python floats and loops, nothing shared with the library ---

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


def random_predictions(S, N, G, C, seed, sharpness=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(S, N, G, C, generator=generator, dtype=torch.float64)
    return logits.softmax(-1).to(dtype), torch.randint(C, (N,), generator=generator)


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


# --- the unbiased defect against exact moments ---

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


# --- number types at the edge ---

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


# --- refusals ---

P0, Y0 = random_predictions(3, 4, 2, 3, 0)


@pytest.mark.parametrize("broken", [
    P0[0], P0[:0], P0.log(), -P0, P0 * 1.001, P0.argmax(-1), None, P0.masked_fill(P0 > 0.8, torch.nan),
    torch.tensor([1.5, -0.5, 0.0]).expand(3, 4, 2, 3), P0.masked_fill(P0 > 0.8, torch.inf), P0.float() * (1 + 1e-3),
])
def test_predictions_that_are_none_are_refused(broken):
    with pytest.raises(Refusal):
        check_probabilities(broken)
    for metric in SCORES:
        with pytest.raises(Refusal):
            metric(broken, Y0)
    for metric in (*EQUIVARIANCE, defect_unbiased):
        with pytest.raises(Refusal):
            metric(broken)
    with pytest.raises(Refusal):
        summarize(OrbitPredictions(broken, (0, 1), "common"), Y0)


@pytest.mark.parametrize("broken", [
    Y0[:2], torch.full((4,), 3), torch.full((4,), -1), Y0.double(), Y0 > 1, nn.functional.one_hot(Y0, 3),
    Y0.tolist(), Y0[:, None],
])
def test_labels_that_name_no_class_are_refused(broken):
    with pytest.raises(Refusal):
        check_labels(P0, broken)
    for metric in SCORES:
        with pytest.raises(Refusal):
            metric(P0, broken)
    with pytest.raises(Refusal):
        summarize(OrbitPredictions(P0, (0, 1), "common"), broken)


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


# --- all at once ---

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


# --- predictions over the orbit ---

def which_way_up():
    """A classifier of four turns, with the action that shifts its classes when the image is turned."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 4)
    plain, output = nn.Sequential(*layers).double(), regular_channels(Cyclic(4), 1)
    return plain, network_action(plain, field(rotations(), (1, 4, 4)), hidden="regular", output=output)


@pytest.fixture(scope="module")
def setting():
    plain, action = which_way_up()
    x = torch.randn(7, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return plain, with_posteriors(plain, scale=0.3), action, x


def slow_predictions(plain, network, action, x, draws, mode, batch_size, seed):
    """One forward pass for each draw, turn and input; weights drawn in the documented order."""
    generator, group = torch.Generator().manual_seed(seed), action.group
    result = torch.empty(draws, len(x), group.order, 4, dtype=torch.float64)
    common = sample_weights(network, draws, generator) if mode == "common" else None
    for k, g in enumerate(group.elements()):
        shared = sample_weights(network, draws, generator) if mode == "shared" else common
        for i in range(len(x)):
            if mode == "fresh" and i % batch_size == 0:
                shared = sample_weights(network, draws, generator)
            for s in range(draws):
                theta = {name: weight[s] for name, weight in shared.items()}
                logits = functional_call(plain, theta, (action.input.act(g, x[i])[None],))[0]
                back = action.output(g).matrix().T  # the inverse of an orthogonal matrix
                result[s, i, k] = back @ (logits.exp() / logits.exp().sum())
    return result.detach()


@pytest.mark.parametrize("mode", ["common", "shared", "fresh"])
def test_predictions_against_the_slow_way(setting, mode):
    found = orbit_predictions(setting[1], setting[3], setting[2], 3, mode, 3, torch.Generator().manual_seed(5))
    assert found.mode == mode and found.elements == setting[2].group.elements()
    assert_close(found.probabilities, slow_predictions(*setting, 3, mode, 3, 5), exact64)
    assert not found.probabilities.requires_grad


def test_draw_modes_share_what_they_say(setting):
    """A batch of one image, repeated: which rows agree tells which draws were shared."""
    _, network, action, x = setting
    same = x[:1].expand(4, -1, -1, -1)
    blank = torch.zeros_like(same)  # unmoved by turns
    generator = torch.Generator().manual_seed(0)
    for mode, over_inputs, over_turns in (("common", True, True), ("shared", True, False), ("fresh", False, False)):
        P = orbit_predictions(network, same, action, 5, mode, 2, generator).probabilities
        assert_close(P[:, 0], P[:, 1], exact64)  # within a batch
        assert torch.allclose(P[:, 0], P[:, 2], rtol=0, atol=exact64) == over_inputs
        turned = orbit_predictions(network, blank, action, 5, mode, 2, generator).probabilities
        forth = torch.stack([action.output.act(g, turned[:, :, k]) for k, g in enumerate(action.group.elements())], 2)
        assert torch.allclose(forth[:, :, 0], forth[:, :, 1], rtol=0, atol=exact64) == over_turns


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


def test_repeatable_and_float32(setting):
    plain, network, action, x = setting

    def run():
        return orbit_predictions(network, x, action, 3, "fresh", 3, torch.Generator().manual_seed(2)).probabilities

    assert torch.equal(run(), run())
    single = orbit_predictions(with_posteriors(plain.float(), scale=0.1), x.float(), action, 2)
    plain.double()
    assert single.probabilities.dtype == torch.float32
    check_probabilities(single.probabilities)


def test_progress_bar_counts_every_turned_input(setting, capsys):
    for mode in ("common", "shared"):
        orbit_predictions(setting[1], setting[3], setting[2], 2, mode, 3, progress=True)
        assert "28/28" in capsys.readouterr().err
    orbit_predictions(setting[1], setting[3], setting[2], 2)
    assert capsys.readouterr().err == ""


def test_requests_that_are_refused(setting):
    plain, network, action, x = setting
    broken = x.clone()
    broken[0, 0, 0, 0] = torch.nan
    requests = [
        (plain, x, action, 4), (network, broken, action, 4), (network, x[:, :, :3], action, 4),
        (network, x[:0], action, 4), (network, x.float(), action, 4), (network, x, action, 0),
        (network, x, action, 4, "both"), (network, x, action, 4, "fresh", 0),
    ]
    for request in requests:
        with pytest.raises(Refusal):
            orbit_predictions(*request)
    with pytest.raises(Refusal, match="draws=2 or fewer"):
        orbit_predictions(network, x, action, 9, memory=2 * 7 * 4 * 4 * 8)
    orbit_predictions(network, x, action, 2, memory=2 * 7 * 4 * 4 * 8)


def test_batch_statistics_and_dropout_are_off_in_either_mode():
    for layer in (nn.BatchNorm2d(2), nn.Dropout(0.5)):
        head = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)
        plain = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), layer, *head)
        action = network_action(plain.eval(), field(rotations(), (1, 4, 4)))
        network, x = with_posteriors(plain), torch.randn(5, 1, 4, 4)
        found = [orbit_predictions(mode, x, action, 2, generator=torch.Generator().manual_seed(0)).probabilities
                 for mode in (network.eval(), network.train())]
        check_probabilities(found[0])
        assert torch.equal(*found)
        assert network[1].training


def test_signs_on_the_output_and_other_outputs_are_refused(setting):
    _, _, action, x = setting
    plain = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1))
    maps = network_action(plain, field(rotations(), (1, 4, 4)))
    with pytest.raises(Refusal, match="logits"):
        orbit_predictions(with_posteriors(plain), x.float(), maps, 2)
    smaller, _ = which_way_up()
    smaller[4] = nn.Linear(16, 5).double()
    with pytest.raises(Refusal, match="logits"):
        orbit_predictions(with_posteriors(smaller), x, action, 2)


TWO_LOGITS = r"nn\.Linear\(features, 2\)"


@pytest.mark.parametrize("metric", [*SCORES, *EQUIVARIANCE, defect_unbiased, summarize], ids=lambda m: m.__name__)
def test_one_class_is_no_classification(metric):
    sure, zeros = torch.ones(4, 6, 4, 1, dtype=torch.float64), torch.zeros(6, dtype=torch.int64)
    arguments = [OrbitPredictions(sure, (0, 1, 2, 3), "common"), zeros] if metric is summarize else [sure]
    with pytest.raises(Refusal, match=f"single class.*{TWO_LOGITS}"):
        metric(*arguments, *[zeros] * (metric in SCORES))


@pytest.mark.parametrize("shape", [(3, 4, 1), (3, 1, 4), (0, 4, 4), (0, 4), (4,)], ids=str)
@pytest.mark.parametrize("bound", [jensen_shannon, orbit_error, through_jensen_shannon], ids=lambda b: b.__name__)
def test_orbits_that_agree_whatever_they_are(bound, shape):
    with pytest.raises(Refusal, match="two group elements and two classes"):
        bound(torch.ones(shape) / max(1, shape[-1]))


def test_one_logit_is_refused_before_the_first_prediction():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Tanh(), nn.Linear(3, 1))
    action, x = network_action(plain, field(rotations(), (1, 4, 4))), torch.full((5, 1, 4, 4), 0.5)
    network = with_posteriors(plain)
    network.register_forward_pre_hook(lambda *_: pytest.fail("predicted"))
    with pytest.raises(Refusal, match=f"two classes.*one logit.*{TWO_LOGITS}"):
        orbit_predictions(network, x, action, 2)


def test_an_action_on_inputs_alone_is_no_action_of_a_network(setting):
    _, network, action, x = setting
    for wrong in (action.input, action.group, None):
        with pytest.raises(Refusal, match=r"NetworkAction.*network_action\(network, action\)"):
            orbit_predictions(network, x, wrong, 2)


def test_outputs_for_pixels_are_called_that():
    plain = nn.Conv2d(1, 3, 3, padding=1)
    maps, x = network_action(plain, field(rotations(), (1, 6, 6))), torch.zeros(16, 1, 6, 6)
    with pytest.raises(Refusal, match=r"one vector of logits.*\(3, 6, 6\) of one input.*pixels.*nn\.Flatten"):
        orbit_predictions(with_posteriors(plain), x, maps, 4)


def test_cuda(require_cuda, setting):
    plain, network, action, x = setting
    network = with_posteriors(plain).to(require_cuda)
    found = orbit_predictions(network, x, action, 3)
    assert found.probabilities.device.type == "cuda"
    assert summarize(found, torch.zeros(7, dtype=torch.int64))["nll_nats"] > 0


# --- predictors whose weights no group moves ---

@pytest.fixture(scope="module")
def ensemble():
    """Networks with a stride and dropout, which have no action on weights, in training mode."""
    def member(seed):
        torch.manual_seed(seed)
        layers = nn.Conv2d(1, 3, 3, stride=2), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(3, 4)
        return nn.Sequential(*layers).double()

    members = [member(seed) for seed in range(3)]
    with pytest.raises(Refusal):
        network_action(members[0].eval(), field(rotations(), (1, 4, 4)))
    return [one.train() for one in members]


def asked_of(setting):
    """The actions on inputs and outputs alone."""
    return Equivariance(setting[2].input, setting[2].output)


@pytest.mark.parametrize("mode", ["common", "shared", "fresh"])
def test_only_inputs_and_outputs_have_to_be_acted_on(setting, mode):
    _, network, action, x = setting
    wanted, found = (orbit_predictions(network, x, its, 3, mode, 3, torch.Generator().manual_seed(5)).probabilities
                     for its in (action, asked_of(setting)))
    assert torch.equal(wanted, found)


@pytest.mark.parametrize("batch_size", [3, 256])
def test_ensembles_networks_and_functions_against_the_slow_way(setting, ensemble, batch_size):
    asked, x = asked_of(setting), setting[3]
    evaluated = [copy.deepcopy(one).eval() for one in ensemble]
    expected = torch.empty(3, 7, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        for s, one in enumerate(evaluated):
            for k in range(4):
                logits = one(torch.rot90(x, k, (-2, -1)))
                expected[s, :, k] = torch.roll(logits.exp() / logits.exp().sum(-1, keepdim=True), -k, -1)
    for several in (ensemble, tuple(evaluated), nn.ModuleList(ensemble), [lambda x, f=f: f(x) for f in evaluated]):
        found = orbit_predictions(several, x, asked, batch_size=batch_size)
        assert_close(found.probabilities, expected, exact64)
        assert not found.probabilities.requires_grad and found.mode == "common"
    for one in (ensemble[0], evaluated[0].forward, [ensemble[0]]):
        assert_close(orbit_predictions(one, x, asked, 1, batch_size=batch_size).probabilities, expected[:1], exact64)
    assert all(module.training for one in ensemble for module in one.modules())
    assert all(one[1].num_batches_tracked == 0 for one in ensemble)


def test_relaxed_networks_are_measured(setting):
    """Bayesian, with paths on whose weights no action is derived."""
    architecture = Architecture("FC+CONV", (1, 4, 4), 4, (2, 2))
    network = with_posteriors(build(architecture, torch.Generator().manual_seed(0), torch.float64), scale=0.3)
    with pytest.raises(Refusal):
        network_action(network, setting[2].input)
    found = orbit_predictions(network, setting[3], asked_of(setting), 8, generator=torch.Generator().manual_seed(0))
    weights = sample_weights(network, 8, torch.Generator().manual_seed(0))
    logits = predict(network, torch.rot90(setting[3], 1, (-2, -1)), weights=weights)
    assert_close(found.probabilities[:, :, 1], torch.roll(logits.softmax(-1), -1, -1), exact64)
    assert summarize(found, torch.zeros(7, dtype=torch.int64))["defect_unbiased"] > 0


def test_members_write_into_inputs_of_their_own(setting):
    def writes(x):
        return x.mul_(2).flatten(1)[:, :4]

    def reads(x):
        return x.flatten(1)[:, :4]

    P = orbit_predictions([writes, reads], setting[3], asked_of(setting)).probabilities
    assert_close(P[1:], orbit_predictions(reads, setting[3], asked_of(setting)).probabilities, exact64)


def test_functions_of_whole_numbers(setting):
    """Inputs that have no fractions, as tokens have none, give probabilities all the same."""
    x = torch.arange(112).view(7, 1, 4, 4)
    P = orbit_predictions(lambda x: -(x.flatten(1)[:, :4] / 112.0), x, asked_of(setting)).probabilities
    assert P.dtype == torch.get_default_dtype() and P.shape == (1, 7, 4, 4)
    check_probabilities(P)


def test_one_draw_has_a_defect_without_noise(setting, ensemble):
    P = orbit_predictions(ensemble[0], setting[3], asked_of(setting)).probabilities
    with pytest.raises(Refusal, match=r"1 draw.*defect_plugin"):
        defect_unbiased(P)
    assert defect_plugin(P) == pytest.approx((P[0] - P[0, :, :1]).square().sum(-1).mean().item(), rel=exact64)
    assert "defect_unbiased" not in summarize(orbit_predictions(ensemble[0], setting[3], asked_of(setting)),
                                              torch.zeros(7, dtype=torch.int64))


@pytest.mark.parametrize(("predictor", "options", "words"), [
    (lambda plain, network: plain, {"draws": 16}, r"draws=16.*with_posteriors\(network\).*defect_plugin"),
    (lambda plain, network: [plain] * 3, {"draws": 2}, "3 member"),
    (lambda plain, network: plain, {"mode": "shared"}, "mode='common'"),
    (lambda plain, network: [plain, network], {}, "list with a Bayesian network"),
    (lambda plain, network: network, {}, "draws=16"),
    (lambda plain, network: [], {}, "empty list"),
    (lambda plain, network: nn.Linear, {}, "A predictor is a network"),
    (lambda plain, network: "net.pt", {}, "A predictor is a network"),
    (lambda plain, network: [plain, copy.deepcopy(plain).float()], {}, "one device and of one type"),
    (lambda plain, network: lambda x: plain(x)[:, :3], {}, "one vector of logits"),
    (lambda plain, network: lambda x: plain(x).argmax(-1), {}, "one vector of logits"),
    (lambda plain, network: lambda x: plain(x).round().long(), {}, "int64"),
    (lambda plain, network: lambda x: plain(x).detach().numpy(), {}, "torch.as_tensor"),
    (lambda plain, network: [plain, lambda x: plain(x)[:, :3]], {}, "one tensor"),
    (lambda plain, network: nn.Sequential(plain, nn.Softmax(-1)), {}, "softmax as the last layer"),
    (lambda plain, network: with_posteriors(nn.Sequential(plain, nn.Softmax(-1))), {"draws": 4},
     "probabilities already"),
], ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "")
def test_predictors_and_draws_that_are_refused(setting, predictor, options, words):
    plain, network, action, x = setting
    with pytest.raises(Refusal, match=words):
        orbit_predictions(predictor(plain, network), x, action, **options)


def test_log_probabilities_are_logits(setting):
    plain, _, action, x = setting
    wanted, found = (orbit_predictions(f, x, action).probabilities
                     for f in (plain, nn.Sequential(plain, nn.LogSoftmax(-1))))
    assert_close(found, wanted, exact64)


@pytest.mark.parametrize(("make", "words"), [
    (lambda turns: Equivariance(rotations(), Action.trivial(Cyclic(4), (4,))), r"field\(space, \(C, H, W\)\)"),
    (lambda turns: Equivariance(turns, 4), r"Action\.trivial\(action\.group, \(classes,\)\)"),
    (lambda turns: Equivariance(turns, Action.trivial(Cyclic(2), (4,))), "One group acts"),
], ids=["space", "classes", "groups"])
def test_actions_on_inputs_and_outputs_belong_together(setting, make, words):
    with pytest.raises(Refusal, match=words):
        make(setting[2].input)
    assert asked_of(setting).group == Cyclic(4)
