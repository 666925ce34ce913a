"""Refusals: four parts in one paragraph; the checks of the common mistakes; packages asked for late."""
import copy
import pickle
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from helpers_ground import refusal_of
from symbnn.errors import (
    Attempts,
    Refusal,
    check_choice,
    check_count,
    check_kind,
    check_positive,
    check_seed,
    check_shape,
    check_tensor,
    optional,
    require,
    shortened,
)


def test_a_refusal_is_one_paragraph_with_four_parts_and_can_be_pickled():
    refusal = Refusal("x must be y.", got="z", cause="w", fix="v.")
    assert str(refusal) == "Expected: x must be y. Got: z. Likely cause: w. Fix: v."
    for twin in (pickle.loads(pickle.dumps(refusal)), copy.deepcopy(refusal)):
        assert (type(twin), str(twin)) == (Refusal, str(refusal))
        assert (twin.expected, twin.got, twin.cause, twin.fix) == ("x must be y.", "z", "w", "v.")


def test_what_is_required():
    require(True, "a", "b", "c", "d")
    refusal = refusal_of(lambda: require(False, "a", "b", "c", "d"))
    assert str(refusal) == "Expected: a. Got: b. Likely cause: c. Fix: d."


@pytest.mark.parametrize("value, kinds", [(1, int), (True, int), (nn.Linear(1, 1), nn.Module), ("a", (int, str)),
                                          (None, (int, type(None)))])
def test_values_of_the_right_kind_pass(value, kinds):
    assert check_kind(value, kinds, "a value", "another one") is None


@pytest.mark.parametrize("value, got, cause, fix", [
    (None, "None", "argument left out", "the fix"),
    (nn.Linear, "the class Linear", "a class where one of its values belongs", "the fix"),
    (3, "an int, 3", "arguments in another order", "the fix"),
    ([1, 2], "a list, [1, 2]", "arguments in another order", "Sequential(*layers)"),
    ((), "a tuple, ()", "arguments in another order", "Sequential(*layers)"),
    (torch.zeros(2), "a Tensor", "arguments in another order", "the fix"),
    ("a" * 100, "a str, '" + "a" * 59 + "...", "arguments in another order", "the fix"),
])
def test_values_of_another_kind_are_refused(value, got, cause, fix):
    near = {(list, tuple): "Sequential(*layers)"}
    refusal = refusal_of(lambda: check_kind(value, nn.Module, "the network", "the fix", near))
    assert refusal.expected == "a Module as the network"
    assert refusal.got == got and cause in refusal.cause and refusal.fix == fix


def test_several_kinds_are_named_with_their_articles():
    assert refusal_of(lambda: check_kind(0.5, (int, str, type(None)), "Size", "1")).expected == (
        "an int or a str or None as size")
    assert refusal_of(lambda: check_kind(0.5, int, "K", "K=64")).expected == "an int as K"


@pytest.mark.parametrize("value, fix", [
    ([1.0, 2.0], "torch.as_tensor(x)"), ((1.0,), "torch.as_tensor(x)"), (np.zeros(2), "torch.as_tensor(x)"),
    (np.float64(1), "torch.as_tensor(x)"), ({}, "x['inputs']"), (None, "a torch tensor as x"),
    (torch.zeros(2, 2).to_sparse(), "x.to_dense()"),
    (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged), "padding"),
])
def test_what_is_no_dense_tensor_is_refused(value, fix):
    refusal = refusal_of(lambda: check_tensor(value, "the inputs", "x", {dict: "x['inputs']"}))
    assert fix in refusal.fix and refusal.expected.endswith("as the inputs")
    if fix.startswith("torch.as_tensor"):  # the fix is what it says
        assert check_tensor(eval(fix, {"torch": torch, "x": value}), "the inputs", "x") is None
    if fix == "x.to_dense()":
        assert check_tensor(eval(fix, {"x": value}), "the inputs", "x") is None


@pytest.mark.parametrize("value, least", [(1, 1), (np.int64(3), 1), (0, 0), (-2, -2)])
def test_whole_numbers_pass(value, least):
    assert check_count(value, "n", "n=1", least) is None


@pytest.mark.parametrize("value, got, cause", [
    (0, "an int, 0", "smaller than expected"), (np.int64(0), f"an int64, {np.int64(0)!r}", "smaller than expected"),
    (2.0, "a float, 2.0", "// gives a whole number"), (True, "a bool, True", "arguments in another order"),
    ("3", "a str, '3'", "arguments in another order"), (None, "None", "left out"),
])
def test_what_is_no_count_is_refused(value, got, cause):
    refusal = refusal_of(lambda: check_count(value, "the number of samples", "draws=16"))
    assert refusal.expected == "a whole number of at least 1 as the number of samples" and refusal.fix == "draws=16"
    assert refusal.got == got and cause in refusal.cause


def test_least_is_the_least():
    assert "at least 2" in refusal_of(lambda: check_count(1, "n", "n=2", least=2)).expected
    assert check_count(2, "n", "n=2", least=2) is None


@pytest.mark.parametrize("value", [1, 0.5, np.float32(2), np.int64(3), 1e-300])
def test_positive_numbers_pass(value):
    assert check_positive(value, "the scale", "scale=0.1") is None


@pytest.mark.parametrize("value, got, cause", [
    (0, "an int, 0", "a zero"), (-1.0, "a float, -1.0", "a sign"), (float("nan"), "a float, nan", "division by zero"),
    (float("inf"), "a float, inf", "division by zero"), (True, "a bool, True", "arguments in another order"),
    ("0.1", "a str, '0.1'", "arguments in another order"), (None, "None", "left out"),
])
def test_what_is_no_positive_number_is_refused(value, got, cause):
    refusal = refusal_of(lambda: check_positive(value, "The scale", "scale=0.1"))
    assert refusal.expected == "a positive number as the scale" and refusal.fix == "scale=0.1"
    assert refusal.got == got and cause in refusal.cause


@pytest.mark.parametrize("value", [2**31, np.uint64(2**63), 10**30, pytest.param(10**5000, id="endless")])
def test_counts_have_an_upper_end(value):
    refusal = refusal_of(lambda: check_count(value, "The n", "n=2"))
    assert refusal.expected == "a whole number from 1 to 2147483647 as the n" and refusal.fix == "n=2"
    assert check_count(value, "n", "n=2", most=float("inf")) is None
    assert check_count(2**31 - 1, "n", "n=2") is None


@pytest.mark.parametrize("value", [1e300, 10**40, 10**400, pytest.param(10**5000, id="endless")])
def test_numbers_that_float32_does_not_hold_are_refused(value):
    for or_zero, sign in ((False, "a positive number"), (True, "a number of at least zero")):
        refusal = refusal_of(partial(check_positive, value, "n", "n=2", or_zero))
        assert refusal.expected.startswith(sign) and refusal.fix == "n=2"


@pytest.mark.parametrize("value", [-1, -1e-9, float("nan"), float("inf"), None, True])
def test_zero_is_taken_where_it_may_be(value):
    assert check_positive(0, "n", "n=2", or_zero=True) is None
    refusal = refusal_of(lambda: check_positive(value, "n", "n=2", or_zero=True))
    assert refusal.expected == "a number of at least zero as n"


@pytest.mark.parametrize("value", [0, 2**63 - 1, np.int64(3)])
def test_seeds_that_pass_are_taken_by_generators(value):
    assert check_seed(value) is None
    assert torch.Generator().manual_seed(int(value) + 2**32)  # the largest that is derived from one


@pytest.mark.parametrize("value", [-1, 2**63, 2**64, pytest.param(10**5000, id="endless"), 1.0, True, None, "1"])
def test_what_no_generator_takes_is_refused_as_a_seed(value):
    refusal = refusal_of(lambda: check_seed(value, "The seed"))
    assert "as the seed" in refusal.expected and refusal.fix.startswith("seed=")


@pytest.mark.parametrize("shape", [(), (3,), [1, 28, 28], (np.int64(2), 0)])
def test_shapes_pass(shape):
    assert check_shape(shape, "the shape", "(3,)") is None


@pytest.mark.parametrize("shape, least", [(3, 0), (3.0, 0), ("33", 0), (None, 0), ((2.0,), 0), ((True,), 0), ((-1,), 0),
                                          ((1, 0), 1), (torch.zeros(2), 0)])
def test_what_is_no_shape_is_refused(shape, least):
    refusal = refusal_of(lambda: check_shape(shape, "the shape", "(3,)", least))
    assert refusal.fix == "(3,)" and f"at least {least} as the shape" in refusal.expected


def test_choices():
    names = ("gaussian", "laplace")
    assert check_choice("laplace", iter(names), "the family") is None
    wrong = refusal_of(lambda: check_choice("laplas", names, "the family"))
    assert (wrong.expected, wrong.got, wrong.fix) == ("one of gaussian, laplace as the family", "'laplas'", "'laplace'")
    for value in ("", "zzz", None, 3, ["gaussian"]):  # nothing is near: the first
        assert refusal_of(lambda value=value: check_choice(value, names, "the family")).fix == "'gaussian'"


def test_long_values_are_cut():
    assert shortened("ab") == "'ab'"
    assert shortened(list(range(1000)), 10) == "[0, 1, 2, ..."


def test_optional_packages(tmp_path, monkeypatch):
    assert optional("json.decoder", "cli").JSONDecoder
    for name in ("no_such_package", "no_such_package.part"):
        refusal = refusal_of(lambda name=name: optional(name, "data"))
        assert refusal.expected == "the package no_such_package" and refusal.fix == "pip install 'symbnn[data]'"
    assert refusal_of(lambda: optional("json.no_such_part", "data")).expected == "the package json"
    (tmp_path / "package_in_need.py").write_text("import something_else_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_else"):  # not this package is missing
        optional("package_in_need", "data")
    assert "package_in_need" not in sys.modules


def test_what_fails_keeps_nothing_else_back():
    tried = Attempts()
    assert tried("one", lambda: 1) == 1 and tried.check("fix") is None
    assert tried("two", lambda: [][0]) is None and tried("three", lambda: 3) == 3
    refusal = refusal_of(lambda: tried.check("fix"))
    assert refusal.got.startswith("no two (IndexError: ") and refusal.fix == "fix"
    assert isinstance(refusal.__cause__, IndexError)
    tried("four", lambda: require(False, "a", "b", "c", "d"))
    assert refusal_of(lambda: tried.check("fix")).expected == "two, four"
    with pytest.raises(KeyboardInterrupt):
        tried("five", interrupt)
    alone = Attempts()
    alone("four", lambda: require(False, "a", "b", "c", "d"))
    assert refusal_of(lambda: alone.check("fix")).expected == "a"


def interrupt():
    raise KeyboardInterrupt
