"""The forms of the book say the same: notebook, Markdown twin, exported module, README."""
from configparser import ConfigParser

import pytest

import symbnn
from book import BOOK, LIBRARY, ROOT, chapters, module_problems, output_problems, readme_problems, twin_problems

each_chapter = pytest.mark.parametrize(
    "path", chapters(), ids=lambda path: path.relative_to(BOOK).with_suffix("").as_posix()
)


def report(problems: list[str]) -> None:
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


@each_chapter
def test_twin(path):
    report(twin_problems(path))


def test_every_twin_has_its_notebook():
    alone = [path.name for path in BOOK.rglob("*.md") if not path.with_suffix(".ipynb").exists()]
    report([f"{name} has no notebook: run `make book`" for name in alone])


@each_chapter
def test_stored_outputs(path):
    report(output_problems(path))


def test_modules():
    report(module_problems())


def test_readme():
    report(readme_problems())


def test_version():
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    assert symbnn.__version__ == settings["DEFAULT"]["version"]


def test_the_package_imported_is_this_one():
    assert LIBRARY.samefile(next(iter(symbnn.__path__)))
