"""Numbers with their errors: printing, means, intervals, subclasses; tolerances of rounding."""
import dataclasses
import math
import pickle
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers_ground import refusal_of
from symbnn.estimates import Estimate, Interval, at_least_single, rounding_tolerance, with_error, zero_tolerance
from tolerances import assert_close


@pytest.mark.parametrize("pair, text", [
    ((0.93147, 0.0123), "0.931 ± 0.012"), ((3.2e-6, 4e-7), "(3.20 ± 0.40)e-6"), ((-0.012, 0.5), "-0.01 ± 0.50"),
    ((0.5, None), "0.5"), ((1.5, 0.0), "1.5"), ((123.4, 10.0), "123 ± 10"), ((0.0, 1e-7), "(0.0 ± 1.0)e-7"),
    ((1.0, 1e-7), "1.00000000 ± 0.00000010"), ((-1234567.0, 300.0), "(-1.23457 ± 0.00030)e+6"),
    ((4.787, 1e-15), "4.79"), ((0.5, math.nan), "0.5"), ((0.5, math.inf), "0.5"), ((math.nan, 0.1), "nan"),
    ((math.inf, 0.1), "inf"), ((1e-9, 4e-5), "(0.0 ± 4.0)e-5"),
])
def test_numbers_and_errors_are_readable(pair, text):
    assert with_error(*pair) == text


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e6))
def test_what_is_printed_is_the_number_and_its_error(value, error):
    text = with_error(value, error)
    if " ± " not in text:
        assert error < 1e-9 * abs(value)
        return
    both, _, power = text.partition("e")
    printed_value, printed_error = (float(part) * 10.0 ** int(power or 0) for part in both.strip("()").split(" ± "))
    assert abs(printed_error - error) <= 0.051 * error  # two digits
    assert abs(printed_value - value) <= 0.051 * error + 1e-9 * abs(value)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=6))
def test_means_of_independent_values(values):
    found = Estimate.mean_of(values)
    assert_close(found.value, statistics.fmean(values))
    assert_close(found.standard_error, statistics.stdev(values) / math.sqrt(len(values)), 1e-9)
    assert Estimate.mean_of(torch.tensor(values, dtype=torch.float64)) == found


def test_one_value_says_nothing_about_its_error():
    found = Estimate.mean_of([0.5])
    assert found.value == 0.5 and math.isnan(found.standard_error) and str(found) == "0.5"
    for values in ([], torch.zeros(2, 2), torch.tensor(1.0)):
        refusal = refusal_of(lambda values=values: Estimate.mean_of(values))
        assert "at least one value" in refusal.expected
    assert Estimate.mean_of(torch.zeros(2, 2).flatten()) == Estimate(0.0, 0.0)  # the fix


def test_means_are_taken_in_double_precision_and_without_a_graph():
    values = torch.full((4096,), 100.0, dtype=torch.float16, requires_grad=True)
    assert Estimate.mean_of(values) == Estimate(100.0, 0.0)


def test_an_estimate_is_a_value():
    estimate = Estimate(0.5, 0.1)
    value, error = estimate
    assert (value, error) == (0.5, 0.1) == tuple(estimate)
    assert estimate == Estimate(0.5, 0.1, "exact") != Estimate(0.5, 0.1, "lower")
    assert pickle.loads(pickle.dumps(estimate)) == estimate and hash(estimate) == hash(Estimate(0.5, 0.1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        estimate.value = 1.0


@pytest.mark.parametrize("kind, text", [("exact", "0.50 ± 0.10"), ("lower", "≥ 0.50 ± 0.10"),
                                        ("upper", "≤ 0.50 ± 0.10"), ("estimate", "≈ 0.50 ± 0.10")])
def test_the_kind_is_printed(kind, text):
    assert str(Estimate(0.5, 0.1, kind)) == text
    assert Estimate(0.5, 0.1, kind).relation == {"exact": "="}.get(kind, text[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Information(Estimate):
    ceiling: float


def test_subclasses_add_fields():
    found = Information(value=0.5, standard_error=0.1, kind="lower", ceiling=0.7)
    assert str(found) == "≥ 0.50 ± 0.10" and tuple(found) == (0.5, 0.1) and found.ceiling == 0.7
    assert isinstance(found, Estimate) and found != Estimate(0.5, 0.1, "lower")
    assert pickle.loads(pickle.dumps(found)) == found and found.interval() == Estimate(0.5, 0.1).interval()


@pytest.mark.parametrize("confidence, z", [(0.95, 1.959963984540054), (0.5, 0.6744897501960817),
                                           (0.99, 2.5758293035489)])
def test_intervals(confidence, z):
    found = Estimate(1.0, 0.5).interval(confidence)
    assert isinstance(found, Interval)
    assert_close(found, (1 - 0.5 * z, 1 + 0.5 * z), 1e-10)
    assert Estimate(1.0, 0.5).interval() == Estimate(1.0, 0.5).interval(0.95)


@pytest.mark.parametrize("confidence", [0, 1, 95, -0.5, math.nan])
def test_impossible_confidences_are_refused(confidence):
    refusal = refusal_of(lambda: Estimate(0.0, 1.0).interval(confidence))
    assert str(confidence) in refusal.got and refusal.fix == "confidence=0.95"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tolerances_are_a_thousand_roundings(dtype):
    small, large = torch.tensor([1e-3, -2e-3], dtype=dtype), torch.tensor([1.0, -64.0], dtype=dtype)
    eps = torch.finfo(dtype).eps
    assert zero_tolerance(large) == rounding_tolerance(large) == 64e3 * eps
    assert_close(zero_tolerance(small), 2 * eps, 1e-2)  # of the largest entry
    assert rounding_tolerance(small) == 1e3 * eps  # of one, where all are small
    assert rounding_tolerance(large.clone().requires_grad_()) == 64e3 * eps


def test_half_precision_is_added_up_in_single():
    found = {dtype: at_least_single(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
    assert found == {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float32,
                     torch.float64: torch.float64}
