"""A sample of every kind of fault; `make attack` makes ten thousand tries of each.

Of a kind whose tries take seconds the sample is slow; tests/studies/test_workers.py tries the same faster.
"""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from faults import KINDS, attack


@pytest.mark.parametrize("kind", [
    pytest.param(kind, id=kind.title, marks=[pytest.mark.slow] if kind.cost > 1 else []) for kind in KINDS])
def test_no_fault_is_answered_wrongly(kind):
    outcomes, failures = attack(kind, kind.sample)
    assert not failures, "\n".join(failures)
    assert sum(outcomes.values()) == kind.sample
