"""Predictions over orbits against one forward pass for each draw, turn and input; what is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from helpers_equivariance import EQUIVARIANCE, SCORES, TWO_LOGITS, random_predictions, which_way_up
from symbnn.equivariance.metrics import (
    defect_plugin,
    defect_unbiased,
    summarize,
)
from symbnn.equivariance.predictions import (
    Equivariance,
    OrbitPredictions,
    check_labels,
    check_probabilities,
    orbit_predictions,
)
from symbnn.errors import Refusal
from symbnn.posterior.layers import with_posteriors
from symbnn.posterior.sampling import predict, sample_weights
from symbnn.symmetry.actions import Action
from symbnn.symmetry.fields import field, rotations
from symbnn.symmetry.groups import Cyclic
from symbnn.symmetry.networks import network_action
from symbnn.training.architectures import Architecture, build
from tolerances import assert_close, exact64

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
    with pytest.raises(Refusal, match=r"Got: 1\..*defect_plugin"):
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
    (lambda plain, network: nn.Linear, {}, "the class Linear"),
    (lambda plain, network: "net.pt", {}, "a str, 'net.pt'"),
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
    (lambda turns: Equivariance(turns, Action.trivial(Cyclic(2), (4,))), "an action of C4 on the outputs"),
], ids=["space", "classes", "groups"])
def test_actions_on_inputs_and_outputs_belong_together(setting, make, words):
    with pytest.raises(Refusal, match=words):
        make(setting[2].input)
    assert asked_of(setting).group == Cyclic(4)
