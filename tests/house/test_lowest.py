"""Some of the tests pass with the lower bounds of settings.ini on this Python; `make lowest` runs all, on each."""
import os
import subprocess
import sys

import pytest

from book import ROOT
from lowest import STATUS_NOT_FETCHED

CHOICE = ("tests/ground", "tests/posterior/test_families.py", "tests/posterior/test_layers.py",
          "tests/symmetry/test_groups.py", "tests/symmetry/test_actions.py", "tests/training/test_old_checkpoints.py")


@pytest.mark.processes
@pytest.mark.timeout(1800)  # the first time the old versions are downloaded
def test_some_tests_pass_with_the_lowest_versions():
    version = f"3.{sys.version_info.minor}"
    command = [sys.executable, ROOT / "tools" / "lowest.py", version, "--", "--numprocesses=0", *CHOICE]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if found.returncode == STATUS_NOT_FETCHED:
        pytest.skip(f"the lowest versions cannot be fetched: {' '.join(found.stderr.split())[:300]}")
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-2000:]
