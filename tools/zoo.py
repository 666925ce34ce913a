"""Which architectures have which symmetries, and which sizes of images keep quarter turns: the tables of the page.

    python tools/zoo.py
"""
import csv
import os
import sys
from io import StringIO
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "zoo"), str(ROOT / "tests")]

from architectures import LeNet, ResNet, UNet, ViT, mobilenet, vgg  # noqa: E402
from cells import matrix  # noqa: E402
from torch import nn  # noqa: E402

from symbnn.errors import Refusal  # noqa: E402
from symbnn.files import write_file  # noqa: E402
from symbnn.symmetry.fields import field, rotations  # noqa: E402
from symbnn.symmetry.networks import network_action  # noqa: E402

SIZES = range(8, 41)
SIZED = {"ResNet": ResNet, "VGG": vgg, "MobileNet": mobilenet, "U-Net": UNet, "LeNet": LeNet, "ViT": ViT}


def sizes(name: str) -> str:
    """The sizes on which an architecture has quarter turns."""
    shapes = {"LeNet": 1, "U-Net": 2}
    found = []
    for size in SIZES:
        network: nn.Module = ViT(size=size) if name == "ViT" and size % 2 == 0 else SIZED[name]()
        try:
            network_action(network, field(rotations(), (shapes.get(name, 3), size, size)))
            found.append(str(size))
        except Refusal:
            continue
    return " ".join(found)


def main() -> None:
    """Write both tables."""
    write(ROOT / "results" / "zoo" / "table.csv", [("architecture", "group", "outcome"), *matrix()])
    write(ROOT / "results" / "zoo" / "sizes.csv", [("architecture", "sizes"), *((name, sizes(name)) for name in SIZED)])


def write(path: Path, rows: list) -> None:
    """A table as CSV."""
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text.getvalue().encode())


if __name__ == "__main__":
    main()
