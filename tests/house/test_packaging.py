"""What leaves the repository: source archive and wheel, each complete and without surplus, and tracked files."""
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from book import LIBRARY, README, ROOT

ADDED = "\n![picture](results/draws/figure.png) and `a[0](b)`\n\n```python\nrow[0](x)\n```\n"  # to README.md
PLACES = ["/" + place + "/" for place in ("work", "root", "farm")]
MACHINE = re.compile("|".join(PLACES))


def tracked() -> list[str]:
    """Every file of the repository, as a path from its root."""
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    return [name for name in found.stdout.split("\0") if (ROOT / name).is_file()]


def settings() -> dict[str, str]:
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    return dict(parser["DEFAULT"])


def make(kind: str, tree: Path, folder: Path) -> Path:
    """The archive that a build front end would get, without its environment and so without a network."""
    script = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    found = subprocess.run([sys.executable, "-c", script, str(folder)], cwd=tree, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Source archive of the tracked files, and the wheels made from it and from those files, all unpacked."""
    place = tmp_path_factory.mktemp("built")
    for name in tracked():
        copy = place / "tree" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy)
    with (place / "tree" / "README.md").open("a", encoding="utf-8") as readme:
        readme.write(ADDED)
    for name in ("archive", "wheel", "direct"):
        (place / f"{name}s").mkdir()
    with tarfile.open(make("sdist", place / "tree", place / "archives")) as archive:
        archive.extractall(place, filter="data")
    source = place / "symbnn-{version}".format(**settings())
    source.rename(place / "source")
    for name, tree in (("wheel", "source"), ("direct", "tree")):
        with zipfile.ZipFile(make("wheel", place / tree, place / f"{name}s")) as wheel:
            wheel.extractall(place / name)
    return place


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def package() -> set[str]:
    return {name for name in tracked() if name.startswith("symbnn/")}


def test_the_source_archive_holds_what_a_wheel_needs_and_no_more(built):
    found = {name for name in files(built / "source") if not name.startswith(("symbnn.egg-info/", "build/"))}
    named = {"LICENSE", "MANIFEST.in", "README.md", "constraints.txt", "pyproject.toml", "settings.ini", "setup.py"}
    assert found == package() | named | {"PKG-INFO", "setup.cfg"}


def test_the_wheel_holds_the_package_and_no_more(built):
    notes = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
    folder = "symbnn-{version}.dist-info".format(**settings())
    assert files(built / "wheel") == package() | {f"{folder}/{name}" for name in notes}
    assert files(built / "wheel") == files(built / "direct")
    for name in files(built / "wheel"):
        assert (built / "wheel" / name).read_bytes() == (built / "direct" / name).read_bytes(), name


def test_the_wheel_imports_and_starts_on_its_own(built):
    modules = sorted(name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in package()
                     if name.endswith(".py"))
    script = f"""
import importlib, sys
from importlib.metadata import distributions
sys.path.insert(0, {str(built / "wheel")!r})
sys.path.append({str(ROOT / "tests")!r})
from helpers_adapters import stand_in_for_torchvision
with stand_in_for_torchvision():
    for name in {modules}:
        assert importlib.import_module(name).__file__.startswith(sys.path[0]), name
[found] = distributions(name="symbnn", path=sys.path[:1])
[main] = found.entry_points.select(group="console_scripts", name="symbnn")
sys.argv = ["symbnn", "--version"]
main.load()()
"""
    found = subprocess.run([sys.executable, "-I", "-c", script], cwd=built, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("symbnn {version} ".format(**settings()))


def test_the_metadata_say_what_the_settings_say(built):
    [found] = importlib.metadata.distributions(name="symbnn", path=[str(built / "wheel")])
    its, ours = found.metadata, settings()
    assert its["Version"] == ours["version"] and its["Summary"] == ours["description"]
    assert its["License-Expression"] == "Apache-2.0" and its.get_all("License-File") == ["LICENSE"]
    assert not any(line.startswith("License ::") for line in its.get_all("Classifier"))
    assert its.get_all("Project-URL") == [f"Source, {ours['git_url']}", f"Issues, {ours['git_url']}/issues"]
    assert its["Description-Content-Type"] == "text/markdown"
    assert its["Requires-Python"] == f">={ours['min_python']}"
    extras = {key.removesuffix("_requirements"): its for key, its in ours.items() if key.endswith("_requirements")}
    assert set(its.get_all("Provides-Extra")) == extras.keys() | {"all"}
    everything = [*ours["requirements"].split(), *(line for its in extras.values() for line in its.split())]
    asked = [Requirement(line) for line in its.get_all("Requires-Dist")]
    assert {(line.name, str(line.specifier)) for line in asked} == {
        (line.name, str(line.specifier)) for line in map(Requirement, everything)}
    [whole] = [line for line in asked if 'extra == "all"' in str(line.marker)]
    assert whole.name == ours["lib_name"] and whole.extras == extras.keys() - {"dev"}
    core = [line.name for line in asked if not line.marker]
    assert core == [Requirement(line).name for line in ours["requirements"].split()]


def test_the_description_is_the_readme_with_links_that_lead_somewhere(built):
    [found] = importlib.metadata.distributions(name="symbnn", path=[str(built / "wheel")])
    text, url = found.metadata.get_payload() or found.metadata["Description"], settings()["git_url"]
    assert f"![picture]({url}/raw/main/results/draws/figure.png)" in text
    assert f"({url}/blob/main/nbs/3_equivariance/04_bounds.ipynb)" in text
    assert "`a[0](b)`" in text and "\nrow[0](x)\n" in text
    back = re.sub(rf"{re.escape(url)}/(raw|blob)/main/", "", text)
    assert back.strip() == (README.read_text(encoding="utf-8") + ADDED).strip()


def test_a_build_is_made_with_pinned_packages():
    pins, ours = (ROOT / "constraints.txt").read_text(), settings()
    for line in (line for key, its in ours.items() if key.endswith("requirements") for line in its.split()):
        name = Requirement(line).name
        assert name == ours["lib_name"] or re.search(rf"^{re.escape(name)}==", pins, re.M | re.I), f"{line} has no pin"


def test_extras_that_refusals_name_exist():
    extras = {key.removesuffix("_requirements") for key in settings() if key.endswith("_requirements")}
    code = "\n".join(path.read_text() for path in LIBRARY.rglob("*.py"))
    named = set(re.findall(r"optional\([^()]+?, \"(\w+)\"\)|pip install 'symbnn\[(\w+)\]'", code))
    found = {name for pair in named for name in pair if name}
    assert found and found <= extras - {"dev"}


def test_no_file_names_a_place_on_a_machine():
    for path in tracked():
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a picture
            continue
        found = MACHINE.search(text)
        assert not found, f"{path} names a place on a machine: {text[found.start():found.start() + 60]!r}"
