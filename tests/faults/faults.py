"""Faults of many kinds, each drawn from a seed, and what may come of them: what is allowed has a name, all else is a
failure."""
import builtins
import inspect
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass
from functools import cache, partial
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from joblib.externals.loky import get_reusable_executor
from targets import TARGETS, TINY, DoneAgain, digest, network, trained
from torch import nn

from symbnn import cli, commands
from symbnn.commands import COMMANDS
from symbnn.errors import Refusal
from symbnn.files import write_file
from symbnn.posterior.sampling import predict
from symbnn.records import SEAL, sealed_text, write_record
from symbnn.studies.grids import Study
from symbnn.studies.runs import FunctionRun
from symbnn.studies.store import execute
from symbnn.training.checkpoints import load_network, save_network


class Kind(NamedTuple):
    """A kind of fault: what stands before the tries, and one try, which says what came of it."""

    title: str
    prepare: Callable[[Path], Any]
    once: Callable[[Any, random.Random, Path], str]
    sample: int = 60  # tries that the tests make
    cost: int = 1  # how many times fewer tries than of the others `make attack` makes


def attack(kind: Kind, tries: int, seed: int = 0) -> tuple[Counter, list[str]]:
    """How often each outcome came, and the failures with the number of their try."""
    outcomes, failures = Counter(), []
    with tempfile.TemporaryDirectory() as name:
        kept = Path(name) / "before"
        kept.mkdir()
        before = kind.prepare(kept)
        for number in range(tries):
            place = Path(name) / "try"
            place.mkdir()
            try:
                outcomes[kind.once(before, random.Random(f"{seed}/{kind.title}/{number}"), place)] += 1
            except Exception as error:
                failures.append(f"try {number}: {type(error).__name__}: {error}"[:300])
                outcomes["FAILED"] += 1
            shutil.rmtree(place, ignore_errors=True)
    return outcomes, failures


# Damaged files


def _prepared(name: str) -> Callable[[Path], Any]:
    def prepare(folder: Path) -> Any:
        TARGETS[name].make(folder)
        return folder, TARGETS[name].read(folder)

    return prepare


def _damaged(data: bytes, draw: random.Random) -> bytes:
    """Bytes with flipped bits, a part missing, doubled, zeroed or foreign."""
    raw = bytearray(data)
    start = draw.randrange(len(raw) + 1)
    length = draw.choice((1, 4, 64, len(raw)))
    how = draw.choice(("flip", "flip", "cut", "empty", "zero", "drop", "twice", "noise", "more"))
    if how == "flip":
        for _ in range(draw.choice((1, 1, 2, 8))):
            place = draw.randrange(len(raw))
            raw[place] ^= 1 << draw.randrange(8)
    elif how == "twice":
        raw[start:start] = raw[start : start + length]
    else:
        parts = {"cut": raw[:start], "empty": b"", "more": raw + draw.randbytes(length),
                 "zero": raw[:start] + bytes(len(raw[start : start + length])) + raw[start + length :],
                 "drop": raw[:start] + raw[start + length :],
                 "noise": raw[:start] + draw.randbytes(len(raw[start : start + length])) + raw[start + length :]}
        raw = bytearray(parts[how])
    return bytes(raw)


def _files(folder: Path) -> list[Path]:
    """What is read: not the records from which results were computed."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and "work" not in path.parts
                  and path.suffix != ".png")


def _read(name: str, place: Path, expected: Any, sealed: bool) -> str:
    """What reading gives: a refusal, the same, or, without a seal, something else of the same kind."""
    said = ""
    try:
        found = TARGETS[name].read(place)
    except Refusal as refusal:
        said = str(refusal)
    except DoneAgain:
        return "said to be of other code, and done again"
    if said:
        assert "\n" not in said and len(said) < 2000, f"a refusal that nobody reads: {said[:200]!r}"
        return "refused"
    if found == expected:
        return "the same"
    assert not sealed, "accepted with other content"
    return "other content of the right kind"


def _damage(name: str) -> Callable[[Any, random.Random, Path], str]:
    def once(before: Any, draw: random.Random, place: Path) -> str:
        folder, expected = before
        shutil.copytree(folder, place, dirs_exist_ok=True)
        path = draw.choice(_files(place))
        path.write_bytes(_damaged(path.read_bytes(), draw))
        return _read(name, place, expected, TARGETS[name].sealed)

    return once


# Mutated records

VALUES = (None, True, False, 0, -1, 1, 2.5, 10**30, -1e308, 1e-300, "", "x", "NaN", "../../x", "\ud800", [], {}, [[]],
          [None], {"a": 1}, {"": {}}, "é" * 300, [0] * 500)


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, its in inner for found in _places(its, (*path, key)))]


def _mutated(values: Any, draw: random.Random) -> Any:
    """JSON values with one place changed, left out, or with something new beside it."""
    values = json.loads(json.dumps(values))
    *way, last = draw.choice([place for place in _places(values) if place] or [("x",)])
    parent = values
    for key in way:
        parent = parent[key]
    how = draw.choice(("change", "change", "remove", "add", "rename", "wrap", "as text"))
    if how == "change":
        parent[last] = draw.choice(VALUES)
    elif how == "wrap":
        parent[last] = [parent[last]]
    elif how == "as text":
        parent[last] = str(parent[last])
    elif how == "remove":
        del parent[last]
    elif isinstance(parent, list):
        parent.append(draw.choice(VALUES))
    else:
        parent[f"{last}x"] = draw.choice(VALUES) if how == "add" else parent.pop(last)
    return values


def _text(values: Any, draw: random.Random, seal: bool) -> bytes:
    """The values as a file, now and then with what JSON does not have."""
    if seal and isinstance(values, dict):
        values.pop(SEAL, None)
        return sealed_text(values)
    text = json.dumps(values, indent=draw.choice((None, 1)))
    how = draw.random()
    if how < 0.05:
        text = text.replace("0", "NaN", 1) if "0" in text else text
    elif how < 0.1:
        text = "[" * 10**5 + text
    elif how < 0.15 and text.startswith("{"):
        text = text.replace("{", '{"twice": 1, "twice": 2, ', 1)
    return text.encode("utf-8", "surrogatepass")


def _mutate(name: str) -> Callable[[Any, random.Random, Path], str]:
    def once(before: Any, draw: random.Random, place: Path) -> str:
        folder, expected = before
        shutil.copytree(folder, place, dirs_exist_ok=True)
        path = draw.choice([path for path in _files(place) if path.suffix == ".json"])
        seal = TARGETS[name].sealed and draw.random() < 0.5
        values = json.loads(path.read_text())
        if seal:
            values.pop(SEAL)
        path.write_bytes(_text(_mutated(values, draw), draw, seal))
        return ("sealed again: " if seal else "") + _read(name, place, expected, TARGETS[name].sealed and not seal)

    return once


# Writers that are killed, and disks that are full

OPERATIONS = ("open", "mkdir", "rmdir", "unlink", "replace", "fsync")


def _kill_at(number: int, after: bool) -> None:
    """From now on this process is killed before, or after, so many operations on files."""
    left = [number]

    def counted(real: Callable) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments, **options)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    builtins.open = counted(builtins.open)


def _begun(action: Callable[[], Any]) -> int:
    """A child that does this; it ends with 0, with 2 after a refusal, with 3 after an error."""
    child = os.fork()
    if child == 0:
        status = 3
        try:
            action()
            status = 0
        except Refusal:
            status = 2
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return child


def _ended(child: int) -> int:
    """How a child has ended; the negative number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _networks(folder: Path) -> list[nn.Module]:
    """Five networks that are saved in turn; they are built once, which takes longer than to save one."""
    return [network(seed) for seed in range(5)]


def _whole(place: Path, *allowed: nn.Module) -> None:
    """A checkpoint that is one of these."""
    assert digest(load_network(place)) in map(digest, allowed), "another network"


def _two_files(place: Path) -> None:
    """The folder of a checkpoint in which nothing else was left behind."""
    assert len(list(place.iterdir())) == 2, f"left behind: {[path.name for path in place.iterdir()]}"


def _kill(before: list[nn.Module], draw: random.Random, place: Path) -> str:
    run, old, new = place / "run", *draw.sample(before, 2)
    save_network(run, old, TINY)
    number, after = draw.randrange(1, 30), draw.random() < 0.5
    status = _ended(_begun(lambda: (_kill_at(number, after), save_network(run, new, TINY))))
    assert status in (0, -signal.SIGKILL), f"status {status}"
    _whole(run, old, new)
    save_network(run, before[4], TINY)
    _whole(run, before[4])
    _two_files(run)
    return "finished first" if status == 0 else "killed; old or new, and nothing left behind"


def _full(before: list[nn.Module], draw: random.Random, place: Path) -> str:
    run, old, new = place / "run", *draw.sample(before, 2)
    save_network(run, old, TINY)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (draw.randrange(4000), limits[1]))
        save_network(run, new, TINY)
        outcome = "written"
    except Refusal:
        outcome = "refused; the old one is there"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    _whole(run, new if outcome == "written" else old)
    _two_files(run)
    return outcome


# Two at once


def _together(draw: random.Random, seconds: float, *actions: Callable[[], Any]) -> list[int]:
    """How children have ended that began within so many seconds of one another, when all of them were there."""
    gate, opened = os.pipe()
    waits = [draw.random() * seconds for _ in actions]
    children = [_begun(lambda wait=wait, action=action: (
        os.close(opened), os.read(gate, 1), time.sleep(wait), action())) for wait, action in zip(waits, actions)]
    os.close(opened)
    os.close(gate)
    return list(map(_ended, children))


def _writers(before: list[nn.Module], draw: random.Random, place: Path) -> str:
    """Two processes save in one folder."""
    run, networks = place / "run", draw.sample(before, 2)
    found = _together(draw, 0.03, *(partial(save_network, run, its, TINY) for its in networks))
    assert set(found) <= {0, 2} and 0 in found, f"statuses {found}"
    _whole(run, *(its for its, status in zip(networks, found) if status == 0))
    _two_files(run)
    return "one refused" if 2 in found else "one after the other"


def _reader(before: list[nn.Module], draw: random.Random, place: Path) -> str:
    """A process that reads while another one saves sees a whole checkpoint, each time."""
    run = place / "run"
    save_network(run, before[0], TINY)
    networks = draw.choices(before, k=10)
    child, ended = _begun(lambda: [save_network(run, its, TINY) for its in networks]), (0, 0)
    while ended == (0, 0):
        _whole(run, *before)
        ended = os.waitpid(child, os.WNOHANG)
    status = os.waitstatus_to_exitcode(ended[1])
    assert status == 0, f"status {status}"
    return "ten checkpoints, each look whole"


# Training, by two at once, and killed until it is complete


def _straight(folder: Path) -> tuple[nn.Module, nn.Module]:
    """A network, which children train, and what it is when it is trained."""
    trained(folder / "run")
    return network(), load_network(folder / "run")


def _trainings(before: tuple[nn.Module, nn.Module], draw: random.Random, place: Path) -> str:
    """Two processes train in one folder: one does, the other is refused."""
    fresh, expected = before
    found = _together(draw, 0.05, *2 * [partial(trained, place / "run", fresh)])
    assert sorted(found) == [0, 2], f"statuses {found}"
    _whole(place / "run", expected)
    return "one trained, one refused"


def _training(before: tuple[nn.Module, nn.Module], draw: random.Random, place: Path) -> str:
    run, (fresh, expected), kills, status = place / "run", before, -1, -signal.SIGKILL
    while status:
        kills += 1
        number, after, there = draw.randrange(1, 60), draw.random() < 0.5, (run / "checkpoint.json").exists()
        status = _ended(_begun(lambda number=number, after=after, there=there, alive=kills == 8: (
            alive or _kill_at(number, after), trained(run, fresh, resume=there))))
        assert status in (0, -signal.SIGKILL), f"status {status}"
    _whole(run, expected)
    _two_files(run)
    return f"killed {'once' if kills == 1 else 'twice or more' if kills else 'never'}; bit for bit the same"


# Outputs

PLACES = ("file", "missing/file", "folder", "link to a file", "link to nothing", "loop", "/dev/null", "/dev/full",
          "pipe", "file/below", "", "x" * 300, "new\nline", "é", "folder/..", ".")


def _output(before: Any, draw: random.Random, place: Path) -> str:
    """What stands where a file is written stays what it is: a link a link, a device a device."""
    (place / "file").write_bytes(b"old")
    (place / "folder").mkdir()
    (place / "link to a file").symlink_to("file")
    (place / "link to nothing").symlink_to("not there")
    (place / "loop").symlink_to("loop")
    name = draw.choice(PLACES)
    path = place / name
    if name == "pipe":
        os.mkfifo(path)
        threading.Thread(target=path.read_bytes, daemon=True).start()
    kind = _sort(path)
    try:
        draw.choice((lambda: write_file(path, b"new"), lambda: write_record(path, {"a": 1})))()
        outcome = "written"
    except Refusal:
        outcome = "refused"
    assert kind in (_sort(path), "nothing"), f"{name!r} was a {kind} and is a {_sort(path)}"
    assert outcome == "refused" or not path.is_file() or path.read_bytes() != b"old", "not written"
    assert not [found for found in place.rglob("*.part")], "left behind"
    return outcome


def _sort(path: Path) -> str:
    try:
        return "link" if path.is_symlink() else "folder" if path.is_dir() else "file" if path.is_file() else (
            "device" if path.exists() else "nothing")
    except OSError:
        return "nothing"


# Command lines

WORDS = ("-1", "0", "1", "2", "3", "7", "0.5", "1e400", "nan", "1" * 30, "18446744073709551616", "None", "true", "x",
         "é", "C4", "D4", "none", "mlp", "cnn", "F-CONV", "digits", "mine.npz", "test", "methods", "timing", "baseline",
         "regular", "elbo", "evidence", "point", "--help", "--", "-o", "out", "/dev/null", "a b", "*", "'", "\x07")


SOURCES = cache(inspect.getsource)  # where docstrings of options are read, which takes longer than all else


def _options(command: type) -> list[str]:
    own = [its for its in fields(command)]
    inner = [its for group in own if is_dataclass(group.default) for its in fields(group.default)]
    return [f"--{its.name.replace('_', '-')}" for its in (*own, *inner)]


def _line(draw: random.Random) -> list[str]:
    """A command with some of its options, and values that fit or do not."""
    name = draw.choice(list(COMMANDS))
    typed = [name]
    if draw.random() < 0.7:
        typed += {"train": ["-o", "out"], "evaluate": ["run"], "compare": [], "reproduce": ["timing"]}[name]
    for _ in range(draw.randrange(5)):
        typed += [draw.choice(_options(COMMANDS[name])), *draw.choices(WORDS, k=draw.choice((0, 1, 1, 1, 2)))]
    return typed


def _interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def _command(before: Any, draw: random.Random, place: Path) -> str:
    """Whatever is typed is a command, or refused in words; nothing is trained."""
    typed, here = _line(draw), Path.cwd()
    work = dict.fromkeys(("fit", "execute", "evaluate_task", "step_speed"), _interrupted)
    os.chdir(place)
    try:
        with (patch.multiple(commands, **work), patch("inspect.getsource", SOURCES), redirect_stdout(StringIO()),
              redirect_stderr(StringIO()) as said):
            status = cli.main(typed)
    finally:
        os.chdir(here)
    assert status in (0, 2, 130), f"status {status} of {typed}"
    assert "Traceback" not in said.getvalue(), f"a traceback of {typed}"
    left = [path.name for path in place.rglob("*")]
    assert status != 2 or not left, f"{left} left by {typed}"
    return {0: "done", 2: "refused", 130: "work would begin"}[status]


# Threads


def _threaded(folder: Path) -> Any:
    net = network()
    x = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    return net, x, [_prediction(net, x, k) for k in range(12)]


def _prediction(net: Any, x: torch.Tensor, k: int) -> torch.Tensor:
    return predict(net, x[: 1 + k % 6], draws=3, generator=torch.Generator().manual_seed(k))


@contextmanager
def often():
    """The interpreter changes between threads after every microsecond."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _threads(before: Any, draw: random.Random, place: Path) -> str:
    """Four threads predict with one network."""
    net, x, expected = before
    turns, wrong = [[draw.randrange(12) for _ in range(3)] for _ in range(4)], []

    def work(chosen: list[int]) -> None:
        for k in chosen:
            try:
                same = torch.equal(_prediction(net, x, k), expected[k])
            except Exception:
                same = False
            wrong.extend([] if same else [k])

    threads = [threading.Thread(target=work, args=(chosen,)) for chosen in turns]
    with often():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong, f"{len(wrong)} of 12 predictions are another network's"
    return "twelve predictions, each as alone"


# Workers


class Runs(NamedTuple):
    """A study on workers, the folder with the orders to die, and the records of runs that nobody disturbed."""

    study: Study
    orders: Path
    expected: list[dict]


def _runs(folder: Path) -> Runs:
    orders = folder / "orders"
    orders.mkdir()
    from mortal import mortal  # not before: it is known to all studies from then on

    run = FunctionRun(mortal.__name__, (("orders", str(orders)),))
    study = Study("Mortal", "none", run, ({"a": (1, 2, 3, 4)},), (0,), "a")
    return Runs(study, orders, [_lasting(record) for record in execute(study, folder / "work")])


def _lasting(record: dict) -> dict:
    return {key: value for key, value in record.items() if key != "evaluation_seconds"}


def _workers(before: Runs, draw: random.Random, place: Path) -> str:
    """A worker of two is killed during one of four runs or soon after it, once, or each time the run is done."""
    get_reusable_executor().shutdown(kill_workers=True)  # those of the try before, which a late kill may still await
    study, orders, expected = before
    often, doomed, names = draw.choice(("once", "always")), draw.randrange(4), [its["name"] for its in expected]
    order = orders / str(1 + doomed)
    order.write_text(f"{often} {draw.random() * 0.04}")
    said, lines = "", []
    try:
        found = execute(study, place, jobs=2, report=lines.append)
        assert list(map(_lasting, found)) == expected, "other records"
    except Refusal as refusal:
        said = refusal.got
    finally:
        order.unlink(missing_ok=True)
    lost = [k for k in range(4) if not (place / f"{names[k]}.json").exists()]
    assert bool(said) == bool(lost), f"runs {lost} are lost, and this is said: {said}"
    assert not lost or often == "always", f"lost after one kill: {said}"
    assert lost == [k for k in range(4) if f"a {1 + k}" in said], f"runs {lost} are lost, and others named: {said}"
    again = execute(study, place, jobs=2)
    assert list(map(_lasting, again)) == expected, "other records after all"
    return ("named; all others kept, and it too when done again" if lost
            else f"killed {often}, and done again" if any("has died" in line for line in lines)
            else f"killed {often}, too late for the runs")


KINDS = [Kind(f"damaged files: {name}", _prepared(name), _damage(name)) for name in TARGETS] + [
    Kind(f"mutated records: {name}", _prepared(name), _mutate(name))
    for name in ("checkpoint", "run", "results", "study")
] + [
    Kind("a writer killed at an operation on files", _networks, _kill, 15),
    Kind("a disk that is full", _networks, _full),
    Kind("two writers in one folder", _networks, _writers, 6),
    Kind("two trainings in one folder", _straight, _trainings, 3),
    Kind("a reader beside a writer", _networks, _reader, 3),
    Kind("training killed, and resumed", _straight, _training, 3),
    Kind("command lines", lambda folder: None, _command, 15),
    Kind("odd places for outputs", lambda folder: None, _output),
    Kind("threads that share a network", _threaded, _threads, 12),
    Kind("workers that are killed", _runs, _workers, 1, 100),  # new ones import torch: seven seconds
]
