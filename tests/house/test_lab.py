"""JupyterLab on the book: `make lab` starts, opens twins as notebooks, and a save there keeps the two in step."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import nbformat
import pytest
from jupytext import TextFileContentsManager

from book import BOOK, ROOT, as_twin, read, read_twin, tidy

FRONT_END = {  # what JupyterLab writes into a notebook whose kernel runs
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python", "version": "3.12.1"},
}


@pytest.fixture
def lab(tmp_path):
    """Open and save a copy of a chapter as JupyterLab does, through Jupytext's contents manager."""
    shutil.copy(ROOT / "jupytext.toml", tmp_path)
    for chapter in ("index", "1_symmetry/01_groups"):
        for kind in (".md", ".ipynb"):
            shutil.copy(BOOK / f"{chapter}{kind}", tmp_path)
    return TextFileContentsManager(root_dir=str(tmp_path))


def opened(lab: TextFileContentsManager, name: str) -> nbformat.NotebookNode:
    """The notebook of a file, with what a running kernel changes in it."""
    notebook = lab.get(name)["content"]
    assert notebook.metadata.kernelspec.name == "python3", "JupyterLab would ask for a kernel"
    notebook.metadata.update(nbformat.from_dict(FRONT_END))
    for count, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.execution_count = count
    return notebook


@pytest.mark.parametrize("kind", [".md", ".ipynb"])
@pytest.mark.parametrize("chapter", ["index", "1_symmetry/01_groups"])
def test_a_save_changes_no_byte_of_the_twin_and_nothing_that_the_notebook_keeps(lab, chapter, kind):
    name = Path(chapter).name
    for _ in range(2):  # the second time from what the first one wrote
        lab.save({"type": "notebook", "content": opened(lab, name + kind)}, name + kind)
    folder = Path(lab.root_dir)
    assert (folder / f"{name}.md").read_bytes() == (BOOK / f"{chapter}.md").read_bytes()
    saved = read(folder / f"{name}.ipynb")
    tidy(saved)
    assert saved == read(BOOK / f"{chapter}.ipynb")


def test_an_edit_saved_in_jupyterlab_is_laid_out_as_the_book_lays_it_out(lab):
    notebook = opened(lab, "index.ipynb")
    notebook.cells[1:1] = [
        nbformat.v4.new_markdown_cell("Two cells of text in a row.\n\n---\n\n+ and a list"),
        nbformat.v4.new_markdown_cell("## A heading {#sec-heading}", metadata={"tags": ["remove"]}),
        nbformat.v4.new_code_cell("#| hide\n%matplotlib inline\n\n\ndef f(x):\n    return x", metadata={"tags": ["x"]}),
        nbformat.v4.new_code_cell("f'''```{f(1)}```'''"),
    ]
    lab.save({"type": "notebook", "content": notebook}, "index.ipynb")
    twin = Path(lab.root_dir) / "index.md"
    found = read_twin(twin)
    assert [cell.source for cell in found.cells] == [cell.source for cell in notebook.cells]
    assert as_twin(found) == twin.read_text(encoding="utf-8")


def command(*make: str) -> str:
    """The last command of `make`, which is not run."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    found = subprocess.run(["make", "--dry-run", f"BIN={Path(sys.executable).parent}", *make], cwd=ROOT, check=True,
                           capture_output=True, text=True, env=environment)
    return found.stdout.splitlines()[-1]


def test_the_administrator_is_let_in_and_nobody_else_is_given_the_option():
    assert ("--allow-root" in command("lab")) == (os.geteuid() == 0)
    assert "--allow-root" in command("lab", "USER_ID=0") and "--allow-root" not in command("lab", "USER_ID=1000")


@pytest.mark.processes
def test_make_lab_starts_and_opens_a_twin_as_a_notebook(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--no-browser --ServerApp.ip=127.0.0.1 --ServerApp.port={port} --ServerApp.port_retries=0 " \
        "--IdentityProvider.token=test"
    environment = {**os.environ, "HOME": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path)}
    said, found = tmp_path / "said.txt", None
    with said.open("w") as stream:
        server = subprocess.Popen(["sh", "-c", f"exec {command('lab')} {options}"], cwd=ROOT, env=environment,
                                  stderr=stream, start_new_session=True)
    try:
        while found is None and server.poll() is None:
            try:
                with urlopen(f"http://127.0.0.1:{port}/api/contents/nbs/index.md?token=test") as answer:
                    found = json.load(answer)
            except HTTPError as refused:
                pytest.fail(refused.read().decode(), pytrace=False)
            except URLError:  # not yet
                time.sleep(0.1)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    assert found is not None, said.read_text()
    cells = [(cell["cell_type"], cell["source"]) for cell in found["content"]["cells"]]
    assert cells == [(cell.cell_type, cell.source) for cell in read(BOOK / "index.ipynb").cells]
