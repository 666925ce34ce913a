"""The memory of a machine, and what does not fit into it."""
import os

import pytest

from helpers_ground import refusal_of
from symbnn import memory
from symbnn.memory import UNKNOWN_MEMORY, check_memory, machine_memory


def without_sysconf(name):
    raise ValueError("unrecognized configuration name")


@pytest.mark.parametrize("limit, found", [("max", UNKNOWN_MEMORY), ("4096\n", 4096), ("0", UNKNOWN_MEMORY)])
def test_a_container_has_a_limit_of_its_own(limit, found, tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(memory, "_LIMITS", (str(tmp_path / "memory.max"), str(tmp_path / "absent")))
    if hasattr(os, "sysconf"):
        monkeypatch.setattr(os, "sysconf", without_sysconf)
    assert machine_memory() == found


def test_half_of_the_memory_is_the_limit(monkeypatch):
    monkeypatch.setattr(memory, "ROOM", 1000)
    assert check_memory(1000, "a network", "layers too wide", "channels=(8,)") is None
    refusal = refusal_of(lambda: check_memory(1001, "a network", "layers too wide", "channels=(8,)"))
    assert refusal.expected == "a network of at most 1,000 bytes, half of this machine's memory"
    assert (refusal.got, refusal.fix) == ("one of 1,001 bytes", "channels=(8,)")
    assert "more than" in refusal_of(lambda: check_memory(10**5000, "a network", "a", "b")).got
