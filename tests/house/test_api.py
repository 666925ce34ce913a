"""The API reference: every public name once, with its signature and docstring, and each name of the face with its
example."""
import importlib
import inspect
import re
from functools import cache
from types import FunctionType

import pytest

import api
import symbnn
from book import LIBRARY, ROOT, chapters, shown
from helpers_adapters import stand_in_for_torchvision

MODULES = [".".join(path.relative_to(LIBRARY).with_suffix("").parts) for path in sorted(LIBRARY.rglob("*.py"))
           if not path.stem.startswith("_")]


@cache
def pages() -> dict[str, str]:
    return api.pages()


def public(module: str) -> set[str]:
    """The public functions and classes of an imported module."""
    it = importlib.import_module(f"symbnn.{module}")
    return {name for name, value in vars(it).items() if not name.startswith("_") and isinstance(value, (
        type, FunctionType)) and value.__module__ == it.__name__ and value.__name__ == name}


@cache
def sections(page: str) -> dict[str, str]:
    """The text of each section of a page, by its anchor."""
    parts = re.split(r"^#+ [^\n]*\{#([\w.-]+)(?: \.unnumbered)?\}$", pages()[page], flags=re.M)
    assert len(set(parts[1::2])) == len(parts[1::2]), f"an anchor of {page} is there twice"
    return dict(zip(parts[1::2], parts[2::2]))


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_of_a_module_is_read_from_its_source(module):
    [found] = [its for its in api.modules() if its.name == module]
    with stand_in_for_torchvision():
        assert public(module) <= {entry.name for entry in found.entries}
    assert all(entry.doc for entry in found.entries)
    assert found.chapter and (ROOT / found.chapter).exists() and found.page in api.PAGES


def test_every_public_name_is_in_the_index_once_and_described_once():
    names = [entry.name for module in api.modules() for entry in module.entries]
    listed = re.findall(r"^- \**\[`(\w+)`\]\((\w+)\.md#(\w+)\)", pages()["index"], re.M)
    assert sorted(name for name, _, _ in listed) == sorted(names) and len(set(names)) == len(names)
    for name, page, anchor in listed:
        assert name == anchor and "```python" in sections(page)[anchor], name
    full = [name for page in pages() for name in sections(page) if name in names]
    assert sorted(full) == sorted(names)


@pytest.mark.parametrize("name", symbnn.__all__)
def test_a_name_of_the_face_has_signature_example_and_source(name):
    text = sections("names")[name]
    assert f"{name}(" in text or f"class {name}" in text
    assert ">>> " in text and "import symbnn as sb" in text, f"sb.{name} has no example"
    path, first, last = re.search(r"/main/(symbnn/\S+\.py)#L(\d+)-L(\d+)\)", text).groups()
    lines = (ROOT / path).read_text().splitlines()[int(first) - 1 : int(last)]
    assert any(re.match(rf"(def|class) {name}\b", line) for line in lines)


def test_arguments_are_those_of_the_source():
    for name in ("train", "predict", "evaluate", "laplace"):
        asked = set(inspect.signature(getattr(symbnn, name)).parameters) - {"settings"}
        written = sections("names")[name].split("```")[1]
        assert all(re.search(rf"^ *(?:{name}\()?{argument}\b", written, re.M) for argument in asked), name


@pytest.mark.parametrize("arguments, parts", [
    ("a, b=(1, 2), *, c='x, y'", ["a", "b=(1, 2)", "*", "c='x, y'"]), ("", []), ("x: dict[str, int]", [
        "x: dict[str, int]"]),
])
def test_arguments_are_cut_outside_of_brackets_and_quotes(arguments, parts):
    assert api.split(arguments) == parts


def test_docstrings_read_as_they_are_written():
    assert api.prose("|f(x)| <= 2*a_b, `a_b*c`, [S, B] @x") == r"\|f(x)\| \<= 2\*a\_b, `a_b*c`, \[S, B\] \@x"


def test_links_of_the_reference_lead_to_a_page_and_an_anchor():
    for page, text in pages().items():
        for goal, anchor in re.findall(r"\]\((\w+)\.md#([\w-]+)\)", text):
            assert anchor in sections(goal), f"{page} links to {goal}#{anchor}"
    assert {place.split("#")[0] for place in api.links().values()} <= {f"api/{page}.md" for page in pages()}


def test_code_of_a_chapter_is_folded_by_its_kind_and_names_lead_to_the_reference():
    from book import read

    path = next(path for path in chapters() if path.stem == "01_groups")
    found = shown(read(path), path.relative_to(ROOT), api.clear())
    code = [cell.source for cell in found.cells if cell.cell_type == "code"]
    assert any('#| code-summary: "symbnn.symmetry.groups · Cyclic (45 lines)"' in source for source in code)
    assert not any(re.search(r"^#\| *(export|hide|default_exp)\b", source, re.M) for source in code)
    kinds = {re.match(r"#\| classes: (\w+)\n", source)[1] for source in code}
    assert {"exported", "check", "drawing", "setup"} == kinds
    assert all("#| fig-alt:" in source for source in code if "#| fig-cap:" in source)
    path = next(path for path in chapters() if path.stem == "04_which_method")
    text = "\n".join(cell.source for cell in shown(read(path), path.relative_to(ROOT), api.clear()).cells)
    assert "[`orbit_average`](../../api/equivariance.md#orbit_average)" in text
    assert f"raw/main/{path.relative_to(ROOT).as_posix()}" in text
