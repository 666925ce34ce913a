"""Every chapter runs from its first cell to its last, with warnings as errors. One chapter, one test."""
import re

import pytest
from book import BOOK, chapters, read, run
from nbclient.exceptions import CellExecutionError


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", chapters(), ids=lambda path: path.relative_to(BOOK).with_suffix("").as_posix())
def test_chapter_runs(path):
    try:
        run(read(path), path.parent)
    except CellExecutionError as error:
        colourless = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
        pytest.fail(f"{path.name} stopped. {colourless}", pytrace=False)
