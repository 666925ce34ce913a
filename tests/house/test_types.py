"""Types: pyright is content with the package, and finds a user's mistakes in calls of it."""
import json
import subprocess
import sys

import pytest

from book import ROOT

CALLS = """
from torch import nn

import symbnn as sb

sb.bayesianize(nn.Linear(2, 1))
sb.bayesianize("network")  # mistake
sb.bayesianise(nn.Linear(2, 1))  # mistake
sb.TrainingConfig(epochs=3, estimator="local")
sb.TrainingConfig(epoch=3)  # mistake
sb.TrainingConfig(epochs="3")  # mistake
sb.TrainingConfig(estimator="locl")  # mistake
"""


def errors(*paths) -> list[dict]:
    """What pyright says about these files, or about the package where none are named."""
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, *map(str, paths)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode in (0, 1), found.stdout + found.stderr  # others: it could not work
    return [its for its in json.loads(found.stdout)["generalDiagnostics"] if its["severity"] == "error"]


@pytest.mark.xfail(strict=True, reason="the package is not clean yet; take this mark away when it is")
def test_the_package_is_clean():
    found = [f"{its['file']}:{its['range']['start']['line'] + 1}: {its['message']}" for its in errors()]
    assert not found, "\n".join([f"{len(found)} errors", *found[:20]])


def test_mistakes_in_calls_are_found(tmp_path):
    (tmp_path / "calls.py").write_text(CALLS)
    wrong = [number for number, line in enumerate(CALLS.split("\n")) if line.endswith("# mistake")]
    assert sorted({its["range"]["start"]["line"] for its in errors(tmp_path / "calls.py")}) == wrong
