"""The tests of the library with the lowest versions that settings.ini allows, on every Python that it allows.

    python tools/lowest.py                                 # on each of these Pythons that this machine has
    python tools/lowest.py 3.10 3.13                       # on these; one that is not here is a failure
    python tools/lowest.py 3.10 -- tests/test_groups.py    # what comes after -- goes to pytest

Each Python gets an environment of its own in build/lowest, which is removed afterwards. Where the lowest version has
no wheel for a Python, or other packages ask for more, the lowest one that can be installed is taken, and named. Tools
of the tests (the extra `dev`) are the newest that agree with these. The exit status is 1 where tests fail or versions
do not agree, and 3 where all that is wrong is that packages cannot be fetched.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from configparser import ConfigParser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / "build" / "lowest"
MISSING, NOT_FETCHED = "not on this machine", "packages could not be fetched"
STATUS_NOT_FETCHED = 3
WHEELS = ["--only-binary", ":all:"]  # what is compiled here shows what this compiler does


class NotFetched(Exception):
    """No index of packages answers."""


def uv(*arguments: object, **options: Any) -> str:
    """What uv prints. It ends with 1 where versions do not agree, and with 2 where it cannot ask for them."""
    command = [sys.executable, "-m", "uv", "--quiet", *map(str, arguments)]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, **options)
    if found.returncode == 2:
        raise NotFetched
    found.check_returncode()
    return found.stdout


def settings() -> dict[str, str]:
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def pythons() -> list[str]:
    """Every Python that the package supports: "3.10", ..."""
    first, last = (int(settings()[key].split(".")[1]) for key in ("min_python", "max_python"))
    return [f"3.{minor}" for minor in range(first, last + 1)]


def requirements() -> list[str]:
    """Of the package and of its extras, but for the tools of its developers."""
    kinds = {key: its for key, its in settings().items() if key.endswith("requirements") and not key.startswith("dev")}
    own = settings()["lib_name"]  # an extra that brings others along
    return sorted({line for its in kinds.values() for line in its.split() if normal(line) != own})


def interpreter(version: str) -> str | None:
    """The path of this Python, from PATH, from pyenv, or the one that runs; None where it is not here."""
    folder = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *folder.glob(f"{version}.*/bin/python"), sys.executable]
    asked = "import sys; print('%d.%d' % sys.version_info[:2])"
    for path in filter(None, candidates):
        found = subprocess.run([path, "-c", asked], capture_output=True, text=True)  # a shim of pyenv may lead nowhere
        if found.stdout.strip() == version:
            return str(path)
    return None


def lowest(python: str) -> dict[str, str]:
    """The lowest version of each requirement that can be installed on this Python together with the others."""
    found = uv("pip", "compile", "--resolution=lowest-direct", "--no-annotate", "--no-header", *WHEELS,
               f"--python={python}", "-", input="\n".join(requirements()))
    pins = dict(line.split("==") for line in found.split("\n") if "==" in line)
    elsewhere = {normal(line) for line in requirements() if ";" in line}  # a marker: of some Pythons alone
    return {name: pins[name] for name in sorted({normal(line) for line in requirements()})
            if name in pins or name not in elsewhere}


def normal(requirement: str) -> str:
    """The name of a requirement in its normal form, without extras and versions."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~;]", requirement)[0]).lower()


def higher(pins: dict[str, str]) -> list[str]:
    """Each pin that is not the lower bound itself, in words."""
    bounds = {normal(line): found[1] for line in requirements() if (found := re.search(r">=([\w.]+)", line))}
    return [f"{name} {pin} and not {bounds[name]}" for name, pin in pins.items()
            if name in bounds and not re.fullmatch(rf"{re.escape(bounds[name])}(\.0)*(\+\w+)?", pin)]


def tests() -> list[str]:
    """The files with tests of the library. Those that look at the book (by tools/book.py) do not ask for versions."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path) for path in files if not re.search(r"^(from|import) book\b", path.read_text(), re.M)]


def run(version: str, python: str, options: list[str]) -> bool:
    """Whether the tests pass on this Python with the lowest versions."""
    pins = lowest(python)
    print(f"Python {version}: " + ", ".join(f"{name} {pin}" for name, pin in pins.items()), flush=True)
    for line in higher(pins):
        print(f"Python {version}: {line}, which has no wheel for it or does not agree with the others", flush=True)
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{version}-", dir=ENVIRONMENTS) as name:  # two may run at once
        place, constraints = Path(name) / "venv", Path(name) / "lowest.txt"
        uv("venv", f"--python={python}", place)
        constraints.write_text("".join(f"{name}=={pin}\n" for name, pin in pins.items()))
        uv("pip", "install", f"--python={place}/bin/python", f"--constraint={constraints}", *WHEELS,
           "--editable", f"{ROOT}[dev]")
        # Old releases use what newer ones of other packages deprecate: that is no fault of either here.
        command = [place / "bin" / "python", "-m", "pytest", "-p", "no:cacheprovider",
                   "-W", "ignore::DeprecationWarning", *(options or tests())]
        return not subprocess.run(command, cwd=ROOT).returncode


def main(arguments: list[str]) -> int:
    """0 if the tests pass on every Python that was asked for; if none was, on each that this machine has; else 1, or 3
    where nothing else is wrong than that packages could not be fetched."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parser = ArgumentParser(description=__doc__.splitlines()[0], epilog="what comes after -- goes to pytest")
    parser.add_argument("versions", nargs="*", metavar="3.x", help="default: each that is on this machine")
    asked, outcomes = parser.parse_args(arguments[:end]).versions, {}
    if unknown := set(asked) - set(pythons()):
        parser.error(f"{', '.join(sorted(unknown))}: settings.ini allows {', '.join(pythons())}")
    for version in asked or pythons():
        python = interpreter(version)
        try:
            passed = python is not None and run(version, python, arguments[end + 1:])
            outcomes[version] = "passed" if passed else MISSING if python is None else "FAILED"
        except NotFetched:
            outcomes[version] = NOT_FETCHED
    for version, outcome in outcomes.items():
        print(f"Python {version} with the lowest versions: {outcome}")
    found = set(outcomes.values())
    wrong = found - {"passed", *([] if asked else [MISSING])}
    return STATUS_NOT_FETCHED if wrong == {NOT_FETCHED} else int("passed" not in found or bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
