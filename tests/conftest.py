"""What every test shares: one thread, warnings as errors, fixed random examples, skips that name their reason."""
import os

# Before torch is imported: two workers with two threads each are slower than two with one.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import pytest
import torch

import shapes
from book import ALLOWED_WARNINGS

# Before the package is imported.
if os.environ.get("SYMBNN_SHAPES", "1") == "1":
    shapes.install()

torch.set_num_threads(1)

# Hypothesis draws the same examples every time: a failure is a change of the code, never luck. More are drawn with
# `pytest --hypothesis-profile=search`.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """The exceptions to "warnings are errors", shared with the notebooks."""
    for message, category in ALLOWED_WARNINGS:
        config.addinivalue_line("filterwarnings", f"ignore:{message}:{category.__name__}")


@pytest.fixture(autouse=True)
def _shapes_are_judged() -> None:
    """The first calls of every function in every test, see tests/shapes.py."""
    shapes.begin_test()


@pytest.fixture
def require_cuda() -> torch.device:
    """A CUDA device; the test is skipped where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return torch.device("cuda")
