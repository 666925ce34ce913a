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
    """The module that a chapter exports, by its name in the package."""
    code = "\n".join(cell.source for cell in read(notebook).cells if cell.cell_type == "code")
    found = re.search(r"^#\| *default_exp +([\w.]+)", code, re.M)
    return found and found[1]


def imports(module: str) -> dict[str, set[str]]:
    """What an exported module imports: full names of modules, and the names that are taken from each."""
    found: dict[str, set[str]] = {}
    package = ["symbnn", *module.split(".")[:-1]]
    for node in ast.walk(ast.parse((LIBRARY / f"{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.Import):
            found.update({name.name: set() for name in node.names})
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            whole = ".".join([*above, *([node.module] if node.module else [])])
            found.setdefault(whole, set()).update(name.name for name in node.names)
    return found


BOOK_ORDER = [module for path in chapters(BOOK) if (module := module_of(path))]


@pytest.mark.parametrize("module", BOOK_ORDER)
def test_a_module_imports_only_from_modules_above(module):
    taken = imports(module)
    ours = {name.removeprefix("symbnn.") for name in taken if name.startswith("symbnn.")}
    unknown = ours - set(BOOK_ORDER)
    assert not unknown, f"symbnn.{module} imports {sorted(unknown)}, which no chapter exports"
    below = ours & set(BOOK_ORDER[BOOK_ORDER.index(module):])
    assert not below, f"symbnn.{module} imports from {sorted(below)}, which come later in the book"
    private = {f"{name}.{taken_name}" for name, names in taken.items() if name.startswith("symbnn")
               for taken_name in names if taken_name.startswith("_") and taken_name != "__version__"}
    assert not private, f"symbnn.{module} imports private names: {sorted(private)}"
    extra = {name.split(".")[0] for name in taken} & NOT_AT_RUN_TIME
    assert not extra, f"symbnn.{module} imports {sorted(extra)}, which are not required to run the package"


@pytest.mark.parametrize("path", [path for path in chapters(BOOK) if module_of(path)], ids=lambda path: path.stem)
def test_a_chapter_is_called_as_its_module(path):
    folder, name = (re.sub(r"^\d+[a-z]?_", "", part) for part in (path.parent.name, path.stem))
    assert module_of(path) in (name, f"{folder}.{name}")


def test_no_public_name_means_two_things():
    where: dict[str, list[str]] = {}
    for module in BOOK_ORDER:
        tree = ast.parse((LIBRARY / f"{module.replace('.', '/')}.py").read_text())
        for node in tree.body:
            overload = any("overload" in ast.unparse(its) for its in getattr(node, "decorator_list", ()))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and not overload:
                where.setdefault(node.name, []).append(module)
    twice = {name: modules for name, modules in where.items() if len(modules) > 1}
    assert not twice, f"public names defined in several modules: {twice}"
