"""A study that is finished, and a promise that nothing is trained."""
import pytest

from helpers_studies import TINY
from symbnn.studies import methods
from symbnn.studies.store import execute


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished study, its records and the folder of its runs."""
    work = tmp_path_factory.mktemp("runs")
    return TINY, execute(TINY, work), work


@pytest.fixture
def untrained(monkeypatch):
    """Nothing may be trained."""
    monkeypatch.setattr(methods, "train", lambda *arguments, **others: pytest.fail("training began"))
