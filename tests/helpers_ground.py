"""What tests of several rooms need from the ground floor: refusals and full disks."""
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from symbnn.errors import Refusal


def refusal_of(action: Callable[[], object]) -> Refusal:
    """The `Refusal` that `action()` raises."""
    with pytest.raises(Refusal) as caught:
        action()
    return caught.value


def fill_disk(monkeypatch: pytest.MonkeyPatch, takes: Callable[[Path], bool]) -> None:
    """From now on the disk is full for every file that `takes(path)` says no to, when it is put in its place."""
    real = os.replace

    def replace(source, target):
        if not takes(Path(target)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        real(source, target)

    monkeypatch.setattr("symbnn.files.os.replace", replace)
