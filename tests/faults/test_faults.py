"""A sample of every kind of fault; `make attack` makes ten thousand tries of each."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from faults import KINDS, attack


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.title)
def test_no_fault_is_answered_wrongly(kind):
    outcomes, failures = attack(kind, kind.sample)
    assert not failures, "\n".join(failures)
    assert sum(outcomes.values()) == kind.sample
