"""The book's apparatus: citations, cross-references, links, the table of contents, docstrings."""
import importlib
import inspect
import re
from functools import cache
from pathlib import Path
from types import FunctionType

import pytest
import yaml

import api
from book import BOOK, INDEX, LIBRARY, README, ROOT, chapters, read
from helpers_adapters import stand_in_for_torchvision

CROSS_REFERENCES = ("eq", "sec", "fig", "tbl", "thm", "lem", "cor", "prp", "def", "exm", "cnj", "lst")
MODULES = [".".join(path.relative_to(LIBRARY).with_suffix("").parts) for path in sorted(LIBRARY.rglob("*.py"))
           if not path.stem.startswith("_")]


def prose(source: str) -> str:
    """Markdown without its code, in which an @ is a decorator and a bracket an index."""
    source = re.sub(r"^(```+).*?^\1", "", source, flags=re.M | re.S)
    return re.sub(r"(`+).*?\1", "", source, flags=re.S)


def cells(path: Path, kind: str) -> list[str]:
    return [cell.source for cell in read(path).cells if cell.cell_type == kind]


def text(path: Path) -> str:
    """What a chapter says: its Markdown cells, and the captions of its figures."""
    captions = re.findall(r"^#\| *fig-cap: *(.*)$", "\n".join(cells(path, "code")), re.M)
    return prose("\n\n".join(cells(path, "markdown") + captions))


def mentions(path: Path) -> list[str]:
    """Every @key of a chapter, citations and cross-references alike."""
    return re.findall(r"(?<![\w@.])@([A-Za-z][\w-]*\w)", text(path))


def is_cross_reference(key: str) -> bool:
    return key.split("-")[0] in CROSS_REFERENCES and "-" in key


@cache
def labels(path: Path) -> list[str]:
    """Every label that a chapter defines: {#sec-...}, {#eq-...}, {#thm-...}, and `#| label:` of figures and tables."""
    in_code = re.findall(r"^#\| *label: *([\w-]+)", "\n".join(cells(path, "code")), re.M)
    return re.findall(r"\{[^{}]*#([A-Za-z][\w-]*)[^{}]*\}", text(path)) + in_code


def bibliography() -> list[str]:
    return re.findall(r"^@\w+\{([^,\s]+),", (ROOT / "references.bib").read_text(), re.M)


each_chapter = pytest.mark.parametrize(
    "path", chapters(), ids=lambda path: path.relative_to(BOOK).with_suffix("").as_posix()
)


@each_chapter
def test_citations_are_in_the_bibliography(path):
    unknown = {key for key in mentions(path) if not is_cross_reference(key)} - set(bibliography())
    assert not unknown, f"{path.name} cites {sorted(unknown)}, which references.bib does not have"


@each_chapter
def test_cross_references_resolve(path):
    known = {label for chapter in chapters() for label in labels(chapter)}
    broken = {key for key in mentions(path) if is_cross_reference(key)} - known
    assert not broken, f"{path.name} refers to {sorted(broken)}, which no chapter defines"


def test_labels_and_keys_are_unique():
    defined = [label for path in chapters() for label in labels(path)]
    keys = bibliography()
    twice = {name for names in (defined, keys) for name in names if names.count(name) > 1}
    assert not twice, f"defined more than once: {sorted(twice)}"


@each_chapter
def test_chapter_begins_with_a_labelled_title(path):
    first = cells(path, "markdown")[0]
    assert path == INDEX or re.match(r"# \S.* \{#sec-[\w-]+\}\n\n> \S", first), (
        f"{path.name} begins with {first[:80]!r} and not with '# Title {{#sec-name}}' and a sentence behind '> '"
    )


def contents() -> list[str]:
    """The pages of the site, in the order of the sidebar."""
    book = yaml.safe_load((ROOT / "_quarto.yml").read_text())["book"]
    return [page for part in book["chapters"] for page in (part["chapters"] if isinstance(part, dict) else [part])]


def test_contents_list_every_page_once_and_the_chapters_of_a_room_in_their_order():
    existing = [path.relative_to(ROOT).as_posix() for path in chapters() if path != INDEX]
    assert sorted(contents()) == sorted(["index.md", *existing, *(f"api/{page}.md" for page in api.pages())])
    rooms = {Path(page).parent for page in existing}
    assert [page for page in contents() if Path(page).parent in rooms] == sorted(
        existing, key=lambda page: min(contents().index(other) for other in existing
                                       if Path(other).parent == Path(page).parent)), (
        "the chapters of a room do not stand together in the order of their files")


def test_parts_of_theory_come_behind_what_they_build_on():
    rooms = list(dict.fromkeys(Path(page).parent.name for page in contents() if page.startswith("nbs/")))
    theory = [room for room in rooms if room[:2] in ("1_", "2_", "3_", "4_", "5_")]
    assert theory == sorted(theory)


def test_what_the_navigation_names_is_a_page():
    book = yaml.safe_load((ROOT / "_quarto.yml").read_text())["book"]
    assert {item["href"] for item in book["navbar"]["left"]} <= set(contents())
    assert all((ROOT / path).exists() for path in (book["favicon"], book["open-graph"]["image"]))


@pytest.mark.parametrize("path", [*chapters(), README], ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    source = prose(path.read_text()) if path == README else text(path)
    targets = re.findall(r"\]\(([^)\s]+)\)", source)
    local = [target.split("#")[0] for target in targets if not re.match(r"\w+:|#", target)]
    broken = [target for target in local if not (path.parent / target).exists()]
    assert not broken, f"{path.name} links to {broken}, which do not exist"


@each_chapter
def test_pictures_have_a_caption_or_an_alternative_text(path):
    """The site takes the caption where there is no alternative text."""
    code = [cell for cell in read(path).cells if cell.cell_type == "code"]
    bare = [number for number, cell in enumerate(code) if not re.search(r"^#\| *fig-(cap|alt):", cell.source, re.M)
            and any("image/png" in output.get("data", {}) for output in cell.outputs)]
    assert not bare, f"{path.name}: code cells {bare} draw without fig-cap and fig-alt"
    assert not re.search(r"!\[\]\(", text(path)), f"{path.name} has a picture without an alternative text"


@each_chapter
def test_lines_of_code_fit_the_page(path):
    lines = [line for source in cells(path, "code") for line in source.split("\n") if not line.startswith("#|")]
    wide = [line for line in lines if len(re.sub(r" *# pyright: .*", "", line)) > 120]
    assert not wide, f"{path.name}: {wide}"


@each_chapter
def test_dollars_are_mathematics(path):
    """Neither a minus sign in dollars before a number, nor a dollar that opens nothing."""
    odd = re.findall(r".{0,20}(?:\$[-−+±]\$|[-−]\$\d+(?:\.\d+)?(?![^$\n]*\$)).{0,20}", text(path))
    assert not odd, f"{path.name}: {odd}"


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_have_no_references_of_the_book(module):
    source = (LIBRARY / f"{module.replace('.', '/')}.py").read_text()
    raw = re.findall(rf"@(?:{'|'.join(CROSS_REFERENCES)})-[\w-]+", source)
    assert not raw, f"symbnn.{module} says {raw}, which only Quarto resolves"


def test_the_list_of_theorems_is_complete():
    [listing] = [path for path in chapters() if path.stem == "07_theorems"]
    stored = "".join(str(cell.get("outputs", "")) for cell in read(listing).cells)
    kinds = ("def", "thm", "prp", "cor", "lem")
    missing = [label for path in chapters() for label in labels(path) if label.split("-")[0] in kinds
               and f"#{label})" not in stored]
    assert not missing, f"07_theorems lists no {missing}: run `python tools/book.py build nbs/00_start/07_theorems.md`"


@pytest.mark.parametrize("path", [path for path in chapters() if path.parent.name == "results"], ids=lambda p: p.stem)
def test_results_open_with_their_verdict(path):
    """In bold before the first heading: in the text, or in what its first code cell shows."""
    first = next((number for number, cell in enumerate(read(path).cells) if cell.source.startswith("## ")), 2)
    said = "\n".join(cell.source + str(cell.get("outputs", "")) for cell in read(path).cells[:first])
    assert re.search(r"\*\*.{40,}\*\*", said), f"{path.name} begins without its verdict"


def documented(cls: type, name: str) -> bool:
    """Whether a method has a docstring, its own or that of the base class in this package which it implements."""
    bases = [base for base in cls.__mro__ if base.__module__.startswith("symbnn") and name in vars(base)]
    return any(inspect.getdoc(vars(base)[name]) for base in bases)


@pytest.mark.parametrize("module", MODULES)
def test_public_names_have_docstrings(module):
    with stand_in_for_torchvision():
        module = importlib.import_module(f"symbnn.{module}")
    missing = [] if module.__doc__ else [module.__name__]
    for name, value in vars(module).items():
        ours = getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
        if not ours or not isinstance(value, (type, FunctionType)):
            continue
        doc = value.__doc__ or ""
        if not doc or doc.startswith(f"{name}("):  # what a dataclass writes for itself
            missing.append(name)
        if isinstance(value, type):
            kinds = (FunctionType, property, classmethod, staticmethod)
            methods = [key for key, item in vars(value).items() if isinstance(item, kinds) and not key.startswith("_")]
            missing += [f"{name}.{key}" for key in methods if not documented(value, key)]
    assert not missing, f"no docstring: {', '.join(missing)}"
