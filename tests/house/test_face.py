"""The face: `import symbnn as sb`."""
import ast
import doctest
import inspect
import re
import subprocess
import sys

import pytest

import symbnn
from book import LIBRARY

NAMES = sorted(symbnn._MODULE_OF)


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there_and_has_a_docstring(name):
    value = getattr(symbnn, name)
    assert inspect.getdoc(value), f"sb.{name} has no docstring"
    assert value.__module__ == symbnn._MODULE_OF[name], f"sb.{name} is defined in {value.__module__}"


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_an_example_that_runs(name, capsys):
    [found] = doctest.DocTestFinder(recurse=False).find(getattr(symbnn, name), name, globs={})
    assert found.examples, f"sb.{name} has no example"
    assert doctest.DocTestRunner().run(found).failed == 0, capsys.readouterr().out


def test_about_forty_names_all_of_them_in_the_docstring_and_in_tab_completion():
    assert 30 <= len(NAMES) <= 60 and set(NAMES) <= set(dir(symbnn)) and sorted(symbnn.__all__) == NAMES
    assert set(re.findall(r"`([A-Za-z]\w*)`", symbnn.__doc__)) == set(NAMES)


def test_type_checkers_see_what_is_imported_at_run_time():
    tree = ast.parse((LIBRARY / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {name.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names}
    assert seen == symbnn._MODULE_OF


def test_import_is_light():
    heavy = ("torch", "numpy", "scipy", "matplotlib")
    found = run("-c", f"import sys, symbnn; print([name for name in {heavy} if name in sys.modules])")
    assert found.stdout.strip() == "[]", found.stdout + found.stderr


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no name 'expnd'"):
        _ = symbnn.expnd
    with pytest.raises(ImportError):
        from symbnn import expnd  # noqa: F401


def test_rooms_are_reached_from_the_face():
    found = run("-c", "import symbnn as sb; print(sb.posterior.__name__, sb.training.__name__)")
    assert found.stdout.split() == ["symbnn.posterior", "symbnn.training"], found.stderr


def test_python_dash_m():
    found = run("-m", "symbnn", "--version")
    assert found.returncode == 0 and symbnn.__version__ in found.stdout
