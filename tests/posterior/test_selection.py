"""Which tensors are chosen, and what is said where a choice cannot be meant."""
import re

import pytest
import torch
from torch import nn

from helpers_networks import tied
from helpers_posterior import Written, linear, refused
from symbnn.posterior.layers import kl_sum, posterior_mean_network, variational_tensors, with_posteriors
from symbnn.posterior.priors import per_tensor
from symbnn.posterior.sampling import predict
from symbnn.posterior.selection import chosen


class Brought(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.rnn = nn.Embedding(10, 4, padding_idx=0), nn.LSTM(4, 4)
        self.body, self.head = nn.Sequential(linear(4, 4), nn.LayerNorm(4)), linear(4, 2)
        self.place = nn.Parameter(torch.zeros(5, 4))


def names(network, **choices):
    return [place.plain for place in chosen(network, **choices)]


NETWORK = Brought()
ALL = [name for name, _ in NETWORK.named_parameters()]
LSTM = [name for name in ALL if name.startswith("rnn")]
USUAL = ["body.0.weight", "body.0.bias", "head.weight", "head.bias"]


@pytest.mark.parametrize(("choices", "expected"), [
    ({"only": "*"}, ALL), ({"only": ["*"]}, ALL),
    ({"only": ("head.*", "place")}, ["place", "head.weight", "head.bias"]),
    ({"only": "*.weight", "skip": "table.*"}, ["body.0.weight", "body.1.weight", "head.weight"]),
    ({"only": nn.LSTM}, LSTM), ({"only": nn.Sequential}, [name for name in ALL if name.startswith("body")]),
    ({"only": NETWORK.body}, [name for name in ALL if name.startswith("body")]),
    ({"only": NETWORK.place}, ["place"]), ({"only": lambda name, tensor: tensor.ndim == 2 and "rnn" not in name},
                                           ["place", "table.weight", "body.0.weight", "head.weight"]),
    ({"only": lambda name, _: re.match("h.*bias", name)}, ["head.bias"]),
    ({"skip": [nn.LSTM, nn.Embedding, "place"]}, USUAL),
    ({"skip": [nn.LSTM, nn.Embedding, NETWORK.place, "head.*"]}, USUAL[:2]),
    ({"only": [nn.Linear, nn.LayerNorm]}, [name for name in ALL if name[:4] in ("body", "head")]),
])
def test_choices(choices, expected):
    assert names(NETWORK, **choices) == expected


def test_the_default_is_what_it_was():
    plain = nn.Sequential(linear(), nn.LayerNorm(3), nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3), nn.PReLU())
    assert names(plain) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_frozen_tensors_stay_so_unless_asked_by_their_full_names():
    network = Brought()
    network.body.requires_grad_(False)
    assert "body.0.weight" not in names(network, only="*")
    assert names(network, only=["body.0.weight", "head.*"]) == ["body.0.weight", "head.weight", "head.bias"]
    made = with_posteriors(network, only="*")
    assert not any(parameter.requires_grad for parameter in made.body.parameters())
    asked = with_posteriors(network, only="body.0.weight")
    assert variational_tensors(asked)["body.0.weight"].posterior.loc.requires_grad
    assert not asked.body[0].bias.requires_grad
    fix = refused(lambda: chosen(network, only="body.*")).fix
    assert names(network, only=eval(re.match(r"only=(\[.*?\])", fix)[1])) == [n for n in ALL if n.startswith("body")]


def test_ties():
    network = tied()
    assert names(network, only="head.weight") == ["table.weight", "head.weight"] == names(network, only="table.*")
    assert len(variational_tensors(with_posteriors(network, only=nn.Embedding))) == 1
    for choices in ({"only": "*", "skip": "head.*"}, {"only": "*", "skip": nn.Embedding}, {"skip": "table.*"}):
        fix = refused(lambda choices=choices: chosen(network, **choices)).fix
        assert "table.weight" in fix and "head.weight" in fix
    network.other = linear()
    assert names(network, skip=["table.*", "head.*"]) == ["other.weight", "other.bias"]
    by_default = refused(lambda: chosen(Written(None, a=network.head, b=network.table)))
    assert "only=" in by_default.fix


SPECTRAL = nn.utils.parametrizations.spectral_norm(linear())


@pytest.mark.parametrize(("network", "choices", "said", "fixed"), [
    (NETWORK, {"only": "haed.weight"}, "matches none", "head.weight"),
    (NETWORK, {"only": "head"}, "matches none", "head.*"),
    (NETWORK, {"skip": "rnn"}, "matches none", "rnn.*"), (NETWORK, {"only": []}, "chooses none", "*"),
    (NETWORK, {"only": ["place", nn.Conv1d]}, "Conv1d", "*"), (NETWORK, {"only": linear()}, "Linear", "*"),
    (nn.Sequential(SPECTRAL), {"only": "0.weight"}, "matches none", "0.parametrizations.weight.*"),
    (SPECTRAL, {"only": "weight"}, "matches none", "parametrizations.weight.*"),
])
def test_choices_that_choose_nothing_are_told_what_would(network, choices, said, fixed):
    refusal = refused(lambda: chosen(network, **choices))
    assert said in refusal.got and repr(fixed)[1:-1] in refusal.fix
    [argument] = re.findall(r"(?:only|skip)=(\[.*?\])", refusal.fix)[:1]
    assert names(network, only=eval(argument))


@pytest.mark.parametrize(("choices", "said"), [
    ({"only": 3}, "an int"), ({"only": True}, "a bool"), ({"skip": {"head": 1}}, "dict"), ({"only": [None]}, "None"),
    ({"only": torch.Tensor}, "Tensor"), ({"only": lambda name: True}, "TypeError"),
    ({"only": "place", "skip": "place"}, "none"),
    ({"skip": "*"}, "without trainable"),
])
def test_choices_of_other_kinds(choices, said):
    refusal = refused(lambda: chosen(NETWORK, **choices))
    assert said in f"{refusal.got} {refusal.cause}"


def with_tensor(value, frozen=True):
    return Written(lambda m, x: m.a(x), a=linear(), odd=nn.Parameter(value, requires_grad=not frozen))


@pytest.mark.parametrize(("network", "choices", "said"), [
    (lambda: with_tensor(torch.zeros(2, dtype=torch.complex64), False), {"only": "*"}, "complex"),
    (lambda: with_tensor(torch.arange(3)), {"only": ["odd"]}, "int64"),
    (lambda: with_tensor(torch.zeros(3).to(torch.float8_e4m3fn)), {"only": ["odd"]}, "float8"),
    (lambda: with_tensor(torch.eye(3).to_sparse(), False), {"only": "*"}, "sparse"),
    (lambda: nn.Sequential(linear(), nn.LazyLinear(2)), {"only": "0.*"}, "no size"),
    (lambda: nn.Sequential(linear(), nn.LazyBatchNorm1d(affine=False)), {}, "no size"),
    (lambda: nn.Sequential(linear(), torch.jit.script(nn.Sequential(linear()))), {}, "RecursiveScriptModule"),
    (lambda: nn.Sequential(linear(), torch.jit.script(nn.Sequential(linear()))), {"only": "*"}, "scripted"),
    (lambda: torch.jit.script(linear()), {"only": "*"}, "scripted"),
])
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit is on its way out
def test_what_cannot_be_random_is_refused_before_any_work(network, choices, said):
    refusal = refused(lambda: with_posteriors(network(), **choices))
    assert said in f"{refusal.got} {refusal.expected}"


def test_what_cannot_be_random_can_be_skipped():
    network = with_tensor(torch.zeros(2, dtype=torch.complex64), False)
    fix = refused(lambda: with_posteriors(network, only="*")).fix
    skip = eval(re.search(r"skip=(\[.*?\])", fix)[1])
    assert list(variational_tensors(with_posteriors(network, only="*", skip=skip))) == ["a.weight", "a.bias"]
    assert len(variational_tensors(with_posteriors(with_tensor(torch.arange(3)), only="*"))) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_parts_that_are_skipped_run():
    scripted = torch.jit.script(nn.Sequential(linear()))
    network = with_posteriors(nn.Sequential(linear(), scripted), skip="1.*")
    assert predict(network, torch.rand(4, 3), draws=2).shape == (2, 4, 3)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_tensors_without_numbers_have_nothing_to_be_uncertain_of():
    network = with_posteriors(nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 2)))
    assert list(variational_tensors(network)) == ["1.bias"] and kl_sum(network) > 0
    assert predict(network, torch.rand(4, 3), draws=2).shape == (2, 4, 2)
    assert posterior_mean_network(network)[0].weight.shape == (0, 3)


def test_undecided_tensors_are_told_all_three_ways():
    network = nn.Sequential(linear(), nn.GRU(3, 3))
    fix = refused(lambda: with_posteriors(network)).fix
    for call in re.findall(r"with_posteriors\(network, .*?\]\)", fix):
        assert variational_tensors(eval(call, {"network": network, "with_posteriors": with_posteriors}))
    assert "requires_grad_(False)" in fix and len(re.findall("with_posteriors", fix)) == 2


def test_a_fan_in_is_read_only_where_the_shape_has_it():
    lstm = nn.Sequential(nn.LSTM(4, 3), nn.Linear(3, 2))
    prior = variational_tensors(with_posteriors(lstm, only="*", prior=per_tensor()))["0.weight_ih_l0"].prior
    assert torch.allclose(prior.variance, torch.tensor(0.25))
    for layer in (nn.Embedding(10, 4), nn.ConvTranspose2d(2, 4, 3), Written(None, a=nn.Parameter(torch.ones(2, 3)))):
        refusal = refused(lambda layer=layer: with_posteriors(layer, only="*", prior=per_tensor()))
        assert "isotropic(1.0)" in refusal.fix
