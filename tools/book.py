"""Keep the forms of the book in step: Markdown twin, notebook with its outputs, exported module, README.

    python tools/book.py build nbs/1_symmetry/01_groups.md    # twin -> notebook, run it, export its module
    python tools/book.py build --no-run nbs/*/*.md   # the same without running: outputs of unchanged cells are kept
    python tools/book.py all                       # every chapter in order, and README.md
    python tools/book.py readme                    # README.md alone, from nbs/index.ipynb
    python tools/book.py check                     # say what is out of step; writes nothing
    python tools/book.py site                      # _proc/, what `make docs` gives to Quarto
"""
import argparse
import ast
import base64
import difflib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

import jupytext
import nbformat
from jupytext.config import load_jupytext_configuration_file
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

sys.path.insert(0, str(Path(__file__).resolve().parent))
import api

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "nbs"
LIBRARY = ROOT / "symbnn"
INDEX = BOOK / "index.ipynb"
README = ROOT / "README.md"
PICTURE = "nbs/00_start/orbit.png"  # of the front page: the figure of the chapter `quickstart`
PAIRING = load_jupytext_configuration_file(str(ROOT / "jupytext.toml"))
METADATA = {  # of every notebook: what `nbdev_clean` and jupytext leave of it
    "jupytext": {"default_lexer": "ipython3"},
    "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"},
}

# Warnings are errors, in the notebooks and in the tests. The exceptions, as (message, category), each with its reason:
ALLOWED_WARNINGS: list[tuple[str, type[Warning]]] = [
    # torch.compile on exactly that release of Python, which it supports.
    ("Guards may run slower on Python 3.13.0", RuntimeWarning),
]


# Twin and notebook


def chapters(folder: Path = BOOK) -> list[Path]:
    """The notebooks of the book in their order."""
    return sorted(path for path in folder.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def read_twin(twin: Path) -> nbformat.NotebookNode:
    """The notebook that a Markdown twin describes, with cell ids that depend on content alone."""
    notebook = jupytext.read(twin, fmt="md:myst")
    notebook.metadata = nbformat.from_dict(METADATA)
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        cell.metadata, cell.source = {}, cell.source.strip("\n")
        digest = hashlib.sha256(f"{cell.cell_type}\0{cell.source}".encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, -1) + 1
        cell.id = f"{digest}-{seen[digest]}"
    return notebook


def as_twin(notebook: nbformat.NotebookNode) -> str:
    """The Markdown twin of a notebook, to the byte as JupyterLab saves it through Jupytext."""
    return jupytext.writes(notebook, fmt="md:myst", config=PAIRING)


def run(notebook: nbformat.NotebookNode, folder: Path = BOOK) -> None:
    """Execute every cell in `folder`, as Jupyter would, with warnings as errors and one thread."""
    prelude = ["import warnings", "warnings.simplefilter('error')"]
    prelude.append("warnings.filterwarnings('ignore', module='ipykernel')")  # the machinery around the chapter
    for message, category in ALLOWED_WARNINGS:
        prelude.append(f"warnings.filterwarnings('ignore', {message!r}, {category.__name__})")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    environment.pop("MPLBACKEND", None)  # figures are shown in the notebook, whatever the caller draws on
    notebook.cells.insert(0, nbformat.v4.new_code_cell("\n".join(prelude)))
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    kernel = client.create_kernel_manager()
    with tempfile.TemporaryDirectory() as sockets:  # files and not ports, for which kernels started together compete
        kernel.transport, kernel.ip = "ipc", os.path.join(sockets, "kernel")
        try:
            client.execute(env=environment)
        finally:
            del notebook.cells[0]


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Drop what changes from run to run and says nothing: counts, timings, kernel versions."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = None
                output.get("metadata", {}).clear()
                for kind, value in output.get("data", {}).items():
                    if kind.startswith("image/") and isinstance(value, str):
                        output.data[kind] = value.rstrip()


def keep_outputs(notebook: nbformat.NotebookNode, previous: Path) -> None:
    """Outputs of cells that have not changed are carried over when nothing is run."""
    if previous.exists():
        old = {cell.id: cell for cell in read(previous).cells}
        for cell in notebook.cells:
            if cell.cell_type == "code" and cell.id in old:
                cell.outputs = old[cell.id].outputs


# Module and index of symbols


def export(notebook_path: Path) -> None:
    """What `nbdev_export` does for one chapter: its module, if it has `default_exp`, and the index of symbols."""
    from nbdev.doclinks import _build_modidx
    from nbdev.export import nb_export

    os.chdir(ROOT)
    nb_export(str(notebook_path), lib_path=str(LIBRARY))
    _build_modidx()


def export_book(project: Path) -> None:
    """`nbdev_export` in `project`: every module, the version, and the index of symbols."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    environment.pop("IN_TEST", None)  # set by nbdev_test, and makes nbdev_export do nothing
    command = [sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()"]
    subprocess.run(command, cwd=project, env=environment, check=True)


def build(twin: Path, execute: bool) -> None:
    """Twin -> notebook and module. The module is written before the run, since the chapter's later cells may use it.

    The twin itself is laid out as JupyterLab would save it: in a twin that was saved there, nothing changes.
    """
    notebook, path = read_twin(twin), twin.with_suffix(".ipynb")
    twin.write_text(as_twin(notebook), encoding="utf-8")
    keep_outputs(notebook, path)
    if execute:
        nbformat.write(notebook, path)
        export(path)
        run(notebook, path.parent)
    tidy(notebook)
    nbformat.write(notebook, path)
    export(path)


# README


def readme(index: Path = INDEX) -> str:
    """README.md: the front page's text, its code, and what the code prints."""
    parts = []
    for cell in read(index).cells:
        if cell.cell_type == "markdown":
            parts.append(without_directives(cell.source))
        elif cell.cell_type == "code" and not is_hidden(cell):
            parts.append(f"```python\n{without_directives(cell.source)}\n```")
            printed = "".join(text_of(output) for output in cell.outputs).rstrip()
            if printed:
                parts.append(f"```\n{printed}\n```")
    parts.append("<!-- Generated from nbs/index.ipynb by tools/book.py. -->")
    return "\n\n".join(part for part in parts if part) + "\n"


def picture(chapter: Path = BOOK / "00_start" / "01_quickstart.ipynb") -> bytes:
    """The figure of the front page, from the chapter that draws it."""
    drawn = next(cell for cell in read(chapter).cells if cell.cell_type == "code" and draws(cell.source))
    found = next(output.data["image/png"] for output in drawn.outputs if "image/png" in output.get("data", {}))
    return base64.b64decode(found)


def without_directives(source: str) -> str:
    """The cell as a reader sees it outside Quarto: no `#|` lines, no heading labels, links from the root."""
    source = re.sub(r"^#\|.*\n?", "", source, flags=re.M)
    source = re.sub(r"^(#+ .*?) *\{[#.][^}]*\}$", r"\1", source, flags=re.M)
    return re.sub(r"\]\((?!\w+:|#|/)([^)]+)\)", lambda link: f"]({from_root(link[1])})", source).strip()


def from_root(link: str) -> str:
    """A link written in nbs/ as it reads from the root."""
    return os.path.relpath(BOOK / link, ROOT).replace(os.sep, "/")


def text_of(output: nbformat.NotebookNode) -> str:
    """The printed text of a cell's output."""
    if output.output_type == "stream":
        return output.text
    return output.get("data", {}).get("text/plain", "") + "\n" if output.output_type == "execute_result" else ""


# Site


def site(folder: Path = ROOT / "_proc") -> None:
    """What Quarto renders: the front page at the top, the chapters with their stored outputs, and the reference.

    `nbdev_docs` hides exported code behind its documentation and runs the cells that import something; in this book
    the code is what the text is about, and nothing needs to be run again. Exported code is folded under a line that
    says what it defines, and names in the text lead to the reference.
    """
    shutil.rmtree(folder, ignore_errors=True)
    places = api.clear()
    for path in chapters():
        page = folder / path.relative_to(ROOT)
        page.parent.mkdir(parents=True, exist_ok=True)
        if path != INDEX:
            nbformat.write(shown(read(path), path.relative_to(ROOT), places), page)
    for name in ("_quarto.yml", "references.bib", "nbs/styles.css", "nbs/favicon.svg", PICTURE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    front = unnumbered(outside(readme(), folder))
    (folder / "index.md").write_text(f"---\nrepo-actions: false\n---\n\n{front}", encoding="utf-8")
    api.write(folder / "api")


def shown(notebook: nbformat.NotebookNode, page: Path, places: dict[str, str]) -> nbformat.NotebookNode:
    """A chapter as the site has it: code folded by its kind, names linked, and a way to the notebook."""
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    module = re.search(r"^#\| *default_exp +([\w.]+)", code, re.M)
    notebook.cells = [cell for cell in notebook.cells if not re.search(r"^#\| *default_exp\b", cell.source, re.M)]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = with_options(cell, module[1] if module else None, page)
        else:
            cell.source = with_links(cell.source, page, places).replace("$\\blacksquare$", "$\\square$")
    title = notebook.cells[0]
    title.source = re.sub(r"(?m)^> .*$", lambda said: f"{said[0]}\n\n{way_to(page)}", title.source, count=1)
    return notebook


def with_options(cell: nbformat.NotebookNode, module: str | None, page: Path) -> str:
    """The source of a code cell with what Quarto is to do with it; nbdev's own directives are taken out."""
    source = re.sub(r"^#\| *(export\w*|hide|include: *false)\b.*\n?", "", cell.source, flags=re.M)
    lines = len([line for line in source.split("\n") if not line.startswith("#|")])
    kind, summary = kind_of(cell, source, module, page)
    options = [f"#| classes: {kind}"]
    if summary:
        size = f"{lines} line{'s' * (lines != 1)}"
        options += ["#| code-fold: true", f'#| code-summary: "{summary} ({size})"']
    if draws(source) and "#| fig-alt:" not in source:
        caption = re.search(r"^#\| *fig-cap:(.*(?:\n#\|  +.*)*)", source, re.M)
        options.append(f"#| fig-alt:{caption[1]}" if caption else "")
    return "\n".join([*filter(None, options), source])


def kind_of(cell: nbformat.NotebookNode, source: str, module: str | None, page: Path) -> tuple[str, str]:
    """The class of a code cell, and the line under which it is folded; empty where it stays open."""
    if re.search(r"^#\| *export", cell.source, re.M):
        return "exported", f"symbnn.{module} · {defined(source)}"
    if is_hidden(cell):
        return "setup", "Imports of the examples"
    if draws(source):
        return ("drawing", "") if page.parts[1] == "00_start" else ("drawing", "Code of the figure")
    if page.parts[1] == "results":
        return "setup", "Code of this page"
    return "check" if module else "example", ""


def defined(source: str) -> str:
    """What a cell defines, in a few words."""
    functions, values = [], []
    for node in ast.parse(re.sub(r"^[%!].*$", "pass", source, flags=re.M)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            functions.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            values += [ast.unparse(goal) for goal in (node.targets if isinstance(node, ast.Assign) else [node.target])]
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            values.append(ast.unparse(node.value.func))
    chosen = sorted(dict.fromkeys([*functions, *values]), key=lambda name: name.startswith("_"))  # private ones last
    others = len(chosen) - 3
    more = f" and {others} more" if others > 0 else ""
    return ", ".join(chosen[:3]).replace('"', "'") + more if chosen else "imports"


def way_to(page: Path) -> str:
    """The line under a chapter's title."""
    return f"::: {{.page-actions}}\n[Download this notebook]({repository('raw')}/{page.as_posix()})\n:::"


def repository(kind: str) -> str:
    """The address of files of the repository: "blob" is the page of a file, "raw" the file itself."""
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    return "{git_url}/{kind}/{branch}".format(**settings["DEFAULT"], kind=kind)


def with_links(source: str, page: Path, places: dict[str, str]) -> str:
    """Markdown in which the first mention of each public name, in backticks, leads to the reference."""
    seen: set[str] = set()

    def linked(found: re.Match) -> str:
        name = found["name"]
        if name is None or name not in places or name in seen:
            return found[0]
        seen.add(name)
        return f"[{found[0]}]({os.path.relpath(places[name], page.parent)})".replace(os.sep, "/")

    skipped = r"^```.*?^```|^#+ .*?$|\$\$.*?\$\$|\[[^\]]*\]\([^)]*\)"
    name = r"(?<!`)`(?:sb\.)?(?P<name>[A-Za-z]\w*)(?:\(\))?`(?!`)"
    return re.sub(rf"{skipped}|{name}", linked, source, flags=re.M | re.S)


def outside(text: str, folder: Path) -> str:
    """Markdown in which links to files that are not in `folder` lead to the repository."""

    def found(link: re.Match) -> str:
        return link[0] if (folder / link[1].split("#")[0]).exists() else f"]({repository('blob')}/{link[1]})"

    return re.sub(r"\]\((?!\w+:|#|/)([^)]+)\)", found, text)


def unnumbered(text: str) -> str:
    """A page whose title has no number."""
    return re.sub(r"^# (.*)$", r"# \1 {.unnumbered}", text, count=1, flags=re.M)


def is_hidden(cell: nbformat.NotebookNode) -> bool:
    """Whether a cell is for the machinery alone."""
    return cell.cell_type == "code" and re.search(r"^#\| *(hide\b|default_exp\b|include: *false)", cell.source, re.M)


# In step?


def twin_problems(path: Path) -> list[str]:
    """Where a notebook differs from its twin: in a cell, or in the layout in which JupyterLab would save the twin."""
    twin = path.with_suffix(".md")
    if not twin.exists():
        return [f"{path.name} has no twin {twin.name}: run `jupytext --sync {path.relative_to(ROOT)}`"]
    sides = read(path), read_twin(twin)
    ours, theirs = ([(cell.cell_type, cell.source.strip()) for cell in side.cells] for side in sides)
    for number, (one, other) in enumerate(zip(ours, theirs)):
        if one != other:
            lines = difflib.unified_diff(one[1].splitlines(), other[1].splitlines(), path.name, twin.name, lineterm="")
            return ["\n".join([f"{path.name} and {twin.name} differ at cell {number}:", *lines])]
    if len(ours) != len(theirs):
        return [f"{path.name} has {len(ours)} cells and {twin.name} has {len(theirs)}"]
    if twin.read_text(encoding="utf-8") != as_twin(sides[1]):
        name = twin.relative_to(ROOT)
        return [f"{twin.name} is laid out by hand: run `python tools/book.py build --no-run {name}`"]
    return []


def by_hand(library: Path = LIBRARY) -> list[Path]:
    """The files at the top of the package that no notebook exports."""
    return [path for name in ("__init__.py", "__main__.py", "py.typed") if (path := library / name).exists()]


def texts(library: Path) -> dict[str, str]:
    """Every file of a package, by its path in it."""
    return {path.relative_to(library).as_posix(): path.read_text() for path in sorted(library.rglob("*.py"))}


def module_problems() -> list[str]:
    """Where symbnn/ differs from what `nbdev_export` makes of the notebooks."""
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        shutil.copy(ROOT / "settings.ini", project)
        for path in chapters():
            copy = project / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        (project / "symbnn").mkdir()
        for path in by_hand():
            shutil.copy(path, project / "symbnn")
        export_book(project)
        fresh = texts(project / "symbnn")
    stored = texts(LIBRARY)
    return [
        f"symbnn/{name} " + ("differs from what the notebooks export" if name in fresh else "comes from no notebook")
        for name in sorted(fresh.keys() | stored.keys())
        if fresh.get(name) != stored.get(name)
    ]


def readme_problems() -> list[str]:
    """Where README.md differs from the front page, and its picture from that of the quickstart."""
    ours = {"README.md": (README, readme().encode()), PICTURE: (ROOT / PICTURE, picture())}
    return [f"{name} differs from the book: run `python tools/book.py readme`" for name, (path, content) in ours.items()
            if not path.exists() or path.read_bytes() != content]


def output_problems(path: Path) -> list[str]:
    """What a stored notebook must not hold (errors, warnings, paths of a machine), and what it must (its outputs)."""
    notebook, problems = read(path), []
    if not nbformat.validator.isvalid(notebook):
        problems.append(f"{path.name} is no valid notebook: run the chapter")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    here = {str(ROOT), str(Path.home()), tempfile.gettempdir()} - {"/"}
    for number, cell in enumerate(code):
        for output in cell.outputs:
            if output.output_type == "error":
                problems.append(f"{path.name}: code cell {number} stores an error: {output.ename}: {output.evalue}")
            if output.output_type == "stream" and output.name == "stderr":
                problems.append(f"{path.name}: code cell {number} stores standard error: {output.text.strip()[:200]}")
            if any(place + os.sep in str(output) for place in here):
                problems.append(f"{path.name}: code cell {number} stores a path of the machine it ran on")
        if draws(cell.source) and not any("image/png" in output.get("data", {}) for output in cell.outputs):
            problems.append(f"{path.name}: code cell {number} has a figure caption and no figure: run the chapter")
    if code and not any(cell.outputs for cell in code):
        problems.append(f"{path.name} has no outputs: run the chapter")
    return problems


def draws(source: str) -> bool:
    """Whether a cell promises a figure."""
    return re.search(r"^#\| *fig-cap:", source, re.M) is not None


def problems() -> list[str]:
    """Everything that is out of step."""
    each = [problem for path in chapters() for problem in twin_problems(path) + output_problems(path)]
    return each + module_problems() + readme_problems()


# Command line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("build", "all"):
        command = commands.add_parser(name)
        command.add_argument("--no-run", action="store_true", help="export only; keep the outputs of unchanged cells")
        if name == "build":
            command.add_argument("twins", nargs="+", type=Path)
    commands.add_parser("readme")
    commands.add_parser("check")
    commands.add_parser("site")
    arguments = parser.parse_args()

    if arguments.command == "check":
        found = problems()
        print("\n".join(found) if found else "Twins, notebooks, modules and README are in step.")
        return 1 if found else 0
    if arguments.command in ("build", "all"):
        every = sorted(BOOK.rglob("*.md"))
        for twin in arguments.twins if arguments.command == "build" else every:
            try:
                build(twin.resolve(), execute=not arguments.no_run)
            except CellExecutionError as error:
                print(f"{twin.name} stopped: {error}", file=sys.stderr)
                return 1
            print("built", twin.name, flush=True)
    if arguments.command == "all":
        export_book(ROOT)
    if arguments.command in ("readme", "all"):
        README.write_text(readme(), encoding="utf-8")
        (ROOT / PICTURE).write_bytes(picture())
    if arguments.command == "site":
        site()
    return 0


if __name__ == "__main__":
    sys.exit(main())
