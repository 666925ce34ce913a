"""Structures of tensors: taken apart, put together, and refused where that cannot be meant."""
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from helpers_networks import Answer
from helpers_posterior import refused
from symbnn.posterior.structures import check_structure, combined, each_tensor, leaves, one_tensor, stacked
from tolerances import assert_close

Pair = namedtuple("Pair", "a b")


class Named(dict):
    pass


@dataclass(frozen=True)
class Frozen:
    a: torch.Tensor
    b: object = None


@dataclass(slots=True)
class Slots:
    a: torch.Tensor
    b: object = None


@dataclass
class Checked:
    a: torch.Tensor
    b: object = None
    made: int = field(init=False, default=3)

    def __post_init__(self):
        assert self.a.ndim == 1, "made anew"


MADE = {
    "tensor": lambda a, b: a, "tuple": lambda a, b: (a, b), "list": lambda a, b: [a, (b, None, 3, "c", True, 0.5)],
    "dictionary": lambda a, b: {"a": a, 3: b}, "ordered": lambda a, b: OrderedDict(b=b, a=a),
    "named": lambda a, b: Pair(a, [b]), "of a class": lambda a, b: Named(a=a, b=b),
    "user": lambda a, b: UserDict(a=a, b=b), "frozen": lambda a, b: Frozen(a, {"b": b}),
    "slots": lambda a, b: Slots(a, b), "checked": lambda a, b: Checked(a, b),
    "namespace": lambda a, b: SimpleNamespace(a=a, b=b),
    "as Hugging Face": lambda a, b: Answer(a, (b, b)), "nested": lambda a, b: {"x": [Frozen(a, Pair(b, None))]},
    "of torch": lambda a, b: torch.max(torch.stack([a, b]), 0), "shape": lambda a, b: (a, b.shape, torch.float32),
    "not a number": lambda a, b: (a, float("nan")),
}


@pytest.mark.parametrize("name", MADE)
def test_stacked_in_place(name):
    torch.manual_seed(0)
    draws = [(torch.randn(3), torch.randn(3)) for _ in range(4)]
    values = [MADE[name](*pair) for pair in draws]
    together, first = stacked(values), leaves(values[0])
    assert type(together) is type(values[0])
    found = leaves(together)
    assert list(found) == list(first)
    for place, leaf in found.items():
        parts = [leaves(value)[place] for value in values]
        if isinstance(leaf, torch.Tensor):
            assert_close(leaf, torch.stack(parts), 0)
        else:
            assert leaf is parts[0]
    for place, leaf in leaves(each_tensor(lambda tensor: tensor + 1, values[0])).items():
        if isinstance(leaf, torch.Tensor):
            assert_close(leaf, first[place] + 1, 0)
            assert first[place] is leaves(values[0])[place]  # the value itself is as it was


def test_attributes_and_entries_of_an_answer_agree():
    together = stacked([Answer(torch.zeros(2), (torch.ones(3),)), Answer(torch.zeros(2), (torch.ones(3),))])
    assert together.logits is together["logits"] and together.hidden is together["hidden"]
    assert together.loss is None and list(together) == ["logits", "hidden"]
    assert list(OrderedDict(together)) == list(reversed(list(reversed(together))))


@pytest.mark.parametrize(("values", "said"), [
    ([(torch.zeros(2), 1), (torch.zeros(2), 2)], r"1 and 2 as output\[1\]"),
    ([{"a": torch.zeros(2), "loss": 0.1}, {"a": torch.zeros(2), "loss": 0.2}], r"output\['loss'\]"),
    ([(torch.zeros(2), None), (torch.zeros(2), torch.zeros(2))], "None"),
    ([(torch.zeros(2), 1), (torch.zeros(2), 1.0)], "1.0"),
    ([{"a": torch.zeros(2)}, {"b": torch.zeros(2)}], "parts"), ([torch.zeros(2), (torch.zeros(2),)], "parts"),
    ([torch.zeros(2), torch.zeros(3)], "shapes"), ([(torch.zeros(2),), (torch.zeros(3),)], "shapes"),
])
def test_what_differs_between_draws_is_refused(values, said):
    with pytest.raises(ValueError, match=said):
        stacked(values)


@pytest.mark.parametrize("y", [
    None, 3.0, (), {"a": None}, torch.distributions.Normal(torch.zeros(2), 1.0), (torch.zeros(2), np.zeros(2)),
    {torch.zeros(1)}, (torch.zeros(2), object()), nn.Linear(2, 2),
])
def test_outputs_without_tensors_or_with_foreign_objects_are_refused(y):
    assert "returns one tensor" in refused(lambda: check_structure(y)).expected


def test_one_tensor_where_one_is_needed():
    x = torch.zeros(2)
    assert one_tensor(x) is x and check_structure((x, None))[0] is x
    assert "output=" in refused(lambda: one_tensor({"logits": x})).fix
    assert combined(torch.cat, [x, x]).shape == (4,)
