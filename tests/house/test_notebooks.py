"""Every chapter runs from its first cell to its last, with warnings as errors. One chapter, one test."""
import re

import pytest
from nbclient.exceptions import CellExecutionError

from book import BOOK, chapters, read, run


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", chapters(), ids=lambda path: path.relative_to(BOOK).with_suffix("").as_posix())
def test_chapter_runs(path):
    stopped = None
    try:
        run(read(path), path.parent)
    except CellExecutionError as error:
        stopped = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # without the colours of a terminal
    if stopped:
        pytest.fail(f"{path.name}: {stopped}", pytrace=False)
