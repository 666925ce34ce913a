"""What is said of an action: right about what stays still, and the names of what moves."""
import pytest
import torch
from torch import nn

from helpers_networks import Gated
from symbnn.symmetry.actions import natural_action, sign_change
from symbnn.symmetry.fields import field, flips, rotations, shifts
from symbnn.symmetry.groups import Permutations
from symbnn.symmetry.hyperoctahedral import Signed
from symbnn.symmetry.networks import network_action, unit_permutations
from symbnn.symmetry.words import action_in_words


def images(*layers):
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(8), nn.ReLU(), *layers)


CASES = {
    "turned": lambda: network_action(images(nn.Flatten(), nn.Linear(128, 2)), field(rotations(), (1, 4, 4)),
                                     hidden="regular"),
    "flipped": lambda: network_action(images(nn.Flatten(), nn.Linear(128, 2)), field(flips(), (1, 4, 4))),
    "shifted": lambda: network_action(images(nn.Flatten(), nn.Linear(128, 2)), field(shifts(4), (1, 4, 4))),
    "signs": lambda: network_action(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), sign_change(3),
                                    hidden={"0": sign_change(4)}),
    "inputs": lambda: network_action(nn.Linear(3, 2), natural_action(Permutations(3))),
    "vectors": lambda: network_action(nn.Linear(3, 2), natural_action(Signed(3))),
    "units": lambda: unit_permutations(Gated(), (2,)),
}
SAID = {
    "turned": {"0.weight": "rows by 2 x C4 (0), columns still, kernel by quarter turns", "0.bias": "by 2 x C4 (0)",
               "1.running_var": "by 2 x C4", "4.weight": "rows still, columns by (2 x C4 (0)) x (quarter turns)"},
    "flipped": {"0.weight": "rows still, columns still, kernel by left-right flips", "0.bias": "still",
                "4.weight": "rows still, columns by 8 still x (left-right flips)"},
    "shifted": {"0.weight": "still", "4.weight": "rows still, columns by 8 still x (shifts by 1)"},
    "signs": {"0.weight": "rows by sign change (0), columns by sign change (input)", "0.bias": "by sign change (0)"},
    "inputs": {"weight": "rows still, columns by S3 (input)"},
    "vectors": {"weight": "rows still, columns by B3 (input)"},
    "units": {"both.weight": "rows in pieces 4 by S4 (both[:4]) then 4 by S4, columns still", "norm.weight": "by S4",
              "out.weight": "rows still, columns by S4 (both[:4])", "out.bias": "still"},
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_said(name):
    action = CASES[name]()
    said = action_in_words(action)
    assert list(said) == list(action.parameters)
    assert {key: said[key] for key in SAID[name]} == SAID[name]


@pytest.mark.parametrize("name", CASES)
def test_still_is_said_of_what_no_element_moves_and_of_nothing_else(name):
    action = CASES[name]()
    for key, words in action_in_words(action).items():
        moves = action.parameters[key]
        x = torch.arange(moves.numel, dtype=torch.float64).view(moves.shape) + 1
        moved = [moves.act(g, x) for g in action.group.generators()]
        both = words.count("sign change") == 2  # of rows and of columns, which cancel
        assert (words == "still" or both) == all(torch.equal(its, x) for its in moved), key
        if "rows still" in words:  # a sum over all other axes keeps its rows
            rest = tuple(range(1, x.ndim))
            assert all(torch.equal(its.abs().sum(rest), x.sum(rest)) for its in moved), key
