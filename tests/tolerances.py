"""The tolerances of the tests, named once, each with its reason.

A test says *which* kind of equality it asks for, never a bare number.
"""
import torch

# Two float64 evaluations of one real number along different routes: 4500 units of 2**-52, room for sums of a few
# thousand terms of order one. Anything that misses it is a different number, not another rounding.
exact64 = 1e-12

# The same in float32: 84 units of 2**-23, room for sums of a few hundred terms of order one (convolutions and
# matrix products in the small networks of the tests).
exact32 = 1e-5

# Standard errors that a Monte Carlo estimate may lie from its exact value. Seeds are fixed, so the chance of 6e-5
# (two-sided, Gaussian) is met once, when a seed is chosen, and never again.
standard_errors = 4


def _double(value) -> torch.Tensor:
    """A float64 tensor on the CPU; numbers of Python never pass through float32."""
    return torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()


def assert_close(actual, expected, tolerance: float = exact64) -> None:
    """Every entry of `actual` within `tolerance` of `expected`, relative to the larger of one and the largest entry
    of `expected` (so that small and large numbers are both judged by rounding, not by scale)."""
    actual, expected = _double(actual), _double(expected)
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)} against {tuple(expected.shape)}")
    if actual.numel() == 0:
        return
    gap = (actual - expected).abs()
    allowed = tolerance * max(1.0, expected.abs().max().item())
    if not bool((gap <= allowed).all()):  # not (gap > allowed).any(): a NaN must fail
        worst = int(torch.nan_to_num(gap, nan=torch.inf).argmax())
        raise AssertionError(
            f"{int((~(gap <= allowed)).sum())} of {gap.numel()} entries differ by more than {allowed:.3g}; "
            f"worst at flat index {worst}: {actual.flatten()[worst]:.17g} against {expected.flatten()[worst]:.17g}, "
            f"a difference of {gap.flatten()[worst]:.3g}"
        )


def within_standard_errors(estimate, exact, standard_error, k: float = standard_errors) -> None:
    """Every entry of a Monte Carlo `estimate` within `k` of its standard errors of the `exact` value."""
    estimate, exact, standard_error = map(_double, (estimate, exact, standard_error))
    estimate, exact, standard_error = torch.broadcast_tensors(estimate, exact, standard_error)
    # The floor is float64 rounding: where nothing is random (standard error 0) the two numbers are still computed.
    floor = exact64 * exact.abs().clamp(min=1.0)
    distance = (estimate - exact).abs() / (standard_error + floor / k)
    if not bool((distance <= k).all()):
        worst = int(torch.nan_to_num(distance, nan=torch.inf).argmax())
        raise AssertionError(
            f"{int((~(distance <= k)).sum())} of {distance.numel()} estimates lie more than {k} standard errors from "
            f"the exact value; worst at flat index {worst}: {estimate.flatten()[worst]:.8g} against "
            f"{exact.flatten()[worst]:.8g}, {distance.flatten()[worst]:.3g} standard errors of "
            f"{standard_error.flatten()[worst]:.3g}"
        )
