"""The papers of the project: workflow, citation, changelog and the guide for contributors say what the settings say."""
import re

import pytest
import yaml

from book import LIBRARY, ROOT
from lowest import pythons, settings

TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
PAPERS = ("CHANGELOG.md", "CONTRIBUTING.md")


def jobs() -> dict:
    return yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]


def commands(job: dict) -> str:
    return "\n".join(step.get("run", "") for step in job["steps"])


def test_the_workflow_tests_every_python_with_pinned_and_with_lowest_versions():
    matrix = jobs()["test"]["strategy"]["matrix"]
    assert matrix["python"] == pythons()
    assert matrix["versions"] == [named[1] for named in re.finditer(r"matrix.versions == '(\w+)'", str(jobs()["test"]))]


def test_the_other_jobs_use_pythons_of_the_settings():
    asked = [step["with"]["python-version"] for job in jobs().values() for step in job["steps"] if "python" in
             step.get("uses", "")]
    assert set(asked) - {"${{ matrix.python }}"} <= set(pythons()) and len(asked) == len(jobs())


def test_the_workflow_installs_each_extra_and_none():
    extras = {key.removesuffix("_requirements") for key in settings() if key.endswith("_requirements")} - {"dev"}
    assert set(jobs()["extras"]["strategy"]["matrix"]["extra"]) == extras | {"all", "none"}


def test_commands_of_the_workflow_exist():
    text = "\n".join(commands(job) for job in jobs().values())
    made = re.findall(r"make PYTHON=python (\w+)", text)
    assert len(made) == 3 and set(made) <= TARGETS
    assert all((ROOT / path).exists() for path in re.findall(r"\S+\.(?:py|txt)\b", text))


def test_the_citation_is_of_this_version():
    cited, ours = yaml.safe_load((ROOT / "CITATION.cff").read_text()), settings()
    assert (cited["version"], cited["repository-code"]) == (ours["version"], ours["git_url"])
    assert cited["title"].startswith(f"{ours['title']}: ") and cited["authors"] == [{"name": ours["author"]}]
    assert ", ".join(cited["keywords"]) == ours["keywords"]


def family(author: dict) -> str:
    return " ".join(filter(None, (author.get("name-particle"), author["family-names"])))


@pytest.mark.parametrize("number", range(3))
def test_the_papers_are_those_of_the_bibliography(number):
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"][number]
    [name] = paper["identifiers"]
    found = [entry for entry in re.split(r"^@", (ROOT / "references.bib").read_text(), flags=re.M)
             if f"{{{name['value'].removeprefix('arXiv:')}}}" in entry]
    assert len(found) == 1 and paper["url"].endswith(name["value"].removeprefix("arXiv:"))
    theirs = dict(re.findall(r"^ *(\w+) *= \{(.*)\},$", found[0], re.M))
    assert paper["title"] == re.sub(r"[{}]", "", theirs["title"]) and str(paper["year"]) == theirs["year"]
    authors = [f"{family(author)}, {author['given-names']}" for author in paper["authors"]]
    assert authors == theirs["author"].split(" and ")
    assert paper.get("collection-title") == (theirs.get("booktitle") and re.sub(r"[{}]", "", theirs["booktitle"]))
    assert str(paper.get("volume")) == theirs.get("volume", "None")


def test_the_changelog_begins_with_this_version():
    [newest, *_] = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest == settings()["version"]


@pytest.mark.parametrize("name", PAPERS)
def test_what_the_papers_name_exists(name):
    text, url = (ROOT / name).read_text(), settings()["git_url"]
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert all(link.startswith(("https://", "#")) for link in links), "shown outside the repository, too"
    within = [link.partition("#")[0] for link in links if link.startswith(url + "/")]
    assert all((ROOT / link.removeprefix(f"{url}/blob/{settings()['branch']}/")).exists() for link in within)
    assert set(re.findall(r"`make (?:\w+=\S+ )*([a-z]+)", text)) <= TARGETS


def test_the_rooms_of_the_walks_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rooms = [path.name for path in LIBRARY.iterdir() if path.is_dir() and not path.name.startswith("_")]
    named = re.findall(rf"`({'|'.join(rooms)})\.([a-z_]+)[.`]", text)
    assert len(named) > 2 * 10
    missing = [".".join(pair) for pair in named if not (LIBRARY / pair[0] / f"{pair[1]}.py").exists()]
    assert not missing, f"CONTRIBUTING.md walks through {missing}, which do not exist"
