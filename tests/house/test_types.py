"""Types: pyright is content with the package, and finds a user's mistakes in calls of it."""
import json
import subprocess
import sys

from book import ROOT

CALLS = """
from torch import nn

import symbnn as sb

network: nn.Module = sb.bayesianize(nn.Linear(2, 1))
sb.bayesianize("network")  # mistake
sb.bayesianise(nn.Linear(2, 1))  # mistake
data = sb.load("digits")
pair: sb.Symmetric = sb.bayesianize(nn.Linear(2, 1), sb.rotations(), (1, 8, 8))
pair.expand("block_diagonal").check(data.test.inputs)
pair.expand("block-diagonal")  # mistake
pair.average("geometric").tie(3)  # mistake
pair.grow()  # mistake
sb.train(pair, data.train, epochs=3).history
sb.train(pair, data.train, epoch=3)  # mistake
sb.train(pair, data, epochs=3)  # mistake
sb.train(pair, data.train, dtype="float16")  # mistake
sb.evaluate(pair, data.test, draws=8)["accuracy"] + 1
sb.evaluate(pair, data.test, draws="8")  # mistake
sb.predict(network, data.test.inputs, draws=4).shape
sb.predict(network, data.test)  # mistake
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


def test_the_package_is_clean():
    found = [f"{its['file']}:{its['range']['start']['line'] + 1}: {its['message']}" for its in errors()]
    assert not found, "\n".join([f"{len(found)} errors", *found[:20]])


def test_mistakes_in_calls_are_found(tmp_path):
    (tmp_path / "calls.py").write_text(CALLS)
    wrong = [number for number, line in enumerate(CALLS.split("\n")) if line.endswith("# mistake")]
    assert sorted({its["range"]["start"]["line"] for its in errors(tmp_path / "calls.py")}) == wrong
