"""Keep the three forms of a chapter in step: MyST Markdown twin, notebook with outputs, exported module.

    python tools/book.py build nbs/01_groups.md    # twin -> notebook, run it, export its module
    python tools/book.py build --no-run nbs/*.md   # the same without running
"""
import argparse
import hashlib
import os
import sys
from pathlib import Path

import jupytext
import nbformat

ROOT = Path(__file__).resolve().parents[1]
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def read_twin(twin: Path) -> nbformat.NotebookNode:
    """The notebook that a Markdown twin describes, with cell ids that depend on content alone."""
    notebook = jupytext.read(twin, fmt="md:myst")
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        cell.metadata = {}
        digest = hashlib.sha256(f"{cell.cell_type}\0{cell.source}".encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, -1) + 1
        cell.id = f"{digest}-{seen[digest]}"
    return notebook


def run(notebook: nbformat.NotebookNode) -> None:
    """Execute every cell, from the repository root, with warnings as errors."""
    from nbclient import NotebookClient

    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Drop what changes from run to run and says nothing: counts, timings, kernel versions."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            for output in cell.outputs:
                output.pop("execution_count", None)
                output.get("metadata", {}).clear()


def keep_outputs(notebook: nbformat.NotebookNode, previous: Path) -> None:
    """Outputs of cells that have not changed are carried over when nothing is run."""
    if previous.exists():
        old = {cell.id: cell for cell in nbformat.read(previous, as_version=4).cells}
        for cell in notebook.cells:
            if cell.cell_type == "code" and cell.id in old:
                cell.outputs = old[cell.id].outputs


def export(notebook_path: Path, library: Path = ROOT / "symbnn") -> None:
    """Write the chapter's module with nbdev; a chapter without `default_exp` writes none."""
    from nbdev.export import nb_export

    os.chdir(ROOT)
    nb_export(str(notebook_path), lib_path=str(library))


def build(twin: Path, execute: bool) -> None:
    notebook, path = read_twin(twin), twin.with_suffix(".ipynb")
    keep_outputs(notebook, path)
    if execute:
        nbformat.write(notebook, path)
        export(path)
        run(notebook)
    tidy(notebook)
    nbformat.write(notebook, path)
    export(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["build"])
    parser.add_argument("twins", nargs="+", type=Path)
    parser.add_argument("--no-run", action="store_true")
    arguments = parser.parse_args()
    for twin in arguments.twins:
        build(twin.resolve(), execute=not arguments.no_run)
        print("built", twin)
    return 0


if __name__ == "__main__":
    sys.exit(main())
