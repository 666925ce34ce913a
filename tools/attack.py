"""Everything that was tried to break the library's files, records, processes and threads, and what came of it.

    python tools/attack.py                       # ten thousand tries of every kind; of workers, which import torch, 100
    python tools/attack.py --tries 100           # a look
    python tools/attack.py --only writer study   # kinds whose names have one of these words
    python tools/attack.py --table results/attack/table.csv

A failure is printed with the number of its try, which the seed repeats. The exit status is 1 if there is one.
"""
import csv
import os
import sys
import time
from argparse import ArgumentParser
from io import StringIO
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "faults"), str(ROOT / "tests")]

import torch  # noqa: E402

from faults import KINDS, attack  # noqa: E402
from symbnn.files import write_file  # noqa: E402


def main() -> int:
    """Make the tries, print a line for each outcome, and write the table."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--table", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows, failed = [("fault", "outcome", "tries")], 0
    for kind in KINDS:
        if asked.only and not any(word in kind.title for word in asked.only):
            continue
        began = time.perf_counter()
        outcomes, failures = attack(kind, max(1, asked.tries // kind.cost), asked.seed)
        print(f"{kind.title}: {sum(outcomes.values())} tries in {time.perf_counter() - began:.0f} s", flush=True)
        for outcome, count in sorted(outcomes.items()):
            print(f"    {count:6d}  {outcome}")
            rows.append((kind.title, outcome, str(count)))
        for failure in failures[:20]:
            print(f"    {failure}")
        failed += len(failures)
    if asked.table:
        text = StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_file(asked.table, text.getvalue().encode())
    print(f"{failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
