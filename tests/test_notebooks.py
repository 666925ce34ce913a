"""Every chapter runs from its first cell to its last, with warnings as errors. One chapter, one test."""
import pytest

from book import BOOK, chapters, read, run


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", chapters(), ids=lambda path: path.relative_to(BOOK).with_suffix("").as_posix())
def test_chapter_runs(path):
    run(read(path), path.parent)
