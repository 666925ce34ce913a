"""Style that a machine can judge: ruff, the oldest Python's grammar, and which chapter may import which."""
import ast
import re
import subprocess
import sys

import pytest

from book import BOOK, LIBRARY, ROOT, chapters, read

SOURCES = [path for folder in ("symbnn", "tests", "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
NOT_AT_RUN_TIME = {"sympy", "nbdev", "jupytext", "pytest", "hypothesis", "IPython"}  # for the book and its tests


def test_ruff():
    command = [sys.executable, "-m", "ruff", "check", "--output-format=concise", "."]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_oldest_grammar(path):
    ast.parse(path.read_text(), path.name, feature_version=(3, 10))


def module_of(notebook) -> str | None:
    """The module that a chapter exports."""
    code = "\n".join(cell.source for cell in read(notebook).cells if cell.cell_type == "code")
    found = re.search(r"^#\| *default_exp +(\w+)", code, re.M)
    return found and found[1]


def imports(module: str) -> set[str]:
    """Every module that an exported one imports, those of this package by their own names."""
    found = set()
    for node in ast.walk(ast.parse((LIBRARY / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = "symbnn." + (node.module or "") if node.level else node.module or ""
            found |= {f"symbnn.{name.name}" for name in node.names} if whole in ("symbnn", "symbnn.") else {whole}
    return found


def test_chapters_import_only_from_chapters_above():
    modules = [module for path in chapters(BOOK) if (module := module_of(path))]
    for position, module in enumerate(modules):
        ours = {name.split(".")[1] for name in imports(module) if name.startswith("symbnn.")}
        below = ours & set(modules[position:])
        assert not below, f"symbnn.{module} imports from {sorted(below)}, which come later in the book"
        extra = {name.split(".")[0] for name in imports(module)} & NOT_AT_RUN_TIME
        assert not extra, f"symbnn.{module} imports {sorted(extra)}, which are not required to run the package"
