"""Core dependencies and extras: every module is imported without what the extras bring."""
import json
import subprocess
import sys
from importlib.metadata import packages_distributions

from book import ROOT
from lowest import normal, requirements, settings

SCRIPT = """
import importlib, json, pkgutil, sys
for name in json.loads(sys.argv[1]):
    sys.modules[name] = None  # as if it were not installed
import symbnn
for module in pkgutil.walk_packages(symbnn.__path__, "symbnn."):
    try:
        importlib.import_module(module.name)
    except symbnn.Refusal as refusal:
        typed = module.name in ("symbnn.cli", "symbnn.commands", "symbnn.table_commands")
        other = module.name.startswith("symbnn.adapters.") and "pip install 'symbnn[" in refusal.fix
        if not other and (not typed or "symbnn[cli]" not in refusal.fix):
            print(f"{module.name}: {refusal}")
    except ImportError as error:
        print(f"{module.name}: {error}")
"""


def optional() -> set[str]:
    """The top-level modules that only extras bring."""
    core = {normal(line) for line in settings()["requirements"].split()}
    brought = {normal(line) for line in requirements()} - core
    return {name for name, packages in packages_distributions().items() if {normal(its) for its in packages} & brought}


def test_every_module_is_imported_without_extras():
    command = [sys.executable, "-c", SCRIPT, json.dumps(sorted(optional()))]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert not found.stdout, found.stdout


def test_the_command_says_what_to_install():
    script = "import sys; sys.modules['tyro'] = None; from symbnn.__main__ import main; sys.exit(main())"
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (2, "") and "pip install 'symbnn[cli]'" in found.stderr
    assert found.stderr.startswith("symbnn: Expected: the package tyro") and found.stderr.count("\n") == 1


def test_what_extras_bring_is_known():
    assert {"sklearn", "pooch", "joblib", "matplotlib"} <= optional()
    assert not {"torch", "numpy", "scipy", "jaxtyping", "safetensors", "symbnn"} & optional()
