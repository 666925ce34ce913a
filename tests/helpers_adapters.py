"""What tests of adapters to other libraries share."""
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import MagicMock

PARTS = ("", ".models", ".ops", ".transforms")


@contextmanager
def stand_in_for_torchvision() -> Iterator[None]:
    """Something in the place of a torchvision that is made for another build of torch: torchmetrics and Lightning
    import it when they find it, and use it for images alone."""
    kept = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "torchvision"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import torchvision  # noqa: F401
        except (ImportError, RuntimeError) as error:
            if not isinstance(error, ModuleNotFoundError):
                sys.modules.update({f"torchvision{part}": MagicMock() for part in PARTS})
    try:
        yield
    finally:
        for name in [name for name, module in sys.modules.items() if isinstance(module, MagicMock)]:
            if name.partition(".")[0] == "torchvision" and name not in kept:
                del sys.modules[name]
