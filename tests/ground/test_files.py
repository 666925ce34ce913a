"""A file whole or not at all: full disks, Ctrl-C, folders that are files, readers meanwhile."""
import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import patch

import pytest

from helpers_ground import fill_disk, refusal_of
from symbnn import files
from symbnn.errors import Refusal
from symbnn.files import LOCK, OWNER, check_folder, check_output, folder_refusal, sole_writer, write_file


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_files_are_written_with_their_folders(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    write_file(path, b"one")
    assert path.read_bytes() == b"one"
    write_file(path, b"two")
    assert path.read_bytes() == b"two" and names(tmp_path) == ["a", "a/b", "a/b/file.bin"]


@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
@pytest.mark.parametrize("before", [None, b"before"])
def test_a_full_disk(tmp_path, call, before):
    """The temporary file is gone, so that it does not fill the disk further."""
    path = tmp_path / "file.bin"
    if before:
        write_file(path, before)
    with patch(call, side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
        refusal = refusal_of(lambda: write_file(path, b"after"))
    assert "No space left" in refusal.got and str(tmp_path) in refusal.got
    assert refusal.cause == "a full disk" and "free some space" in refusal.fix and "intact" in refusal.fix
    assert names(tmp_path) == (["file.bin"] if before else [])
    assert not before or path.read_bytes() == before


def test_a_disk_that_takes_a_part(tmp_path):
    """The kernel itself stops the write: files are limited to 1000 bytes for the length of one call."""
    path = tmp_path / "file.bin"
    write_file(path, b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        refusal = refusal_of(lambda: write_file(path, bytes(100_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in refusal.got
    assert path.read_bytes() == b"before" and names(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
def test_ctrl_c_before_the_rename(tmp_path, call):
    path = tmp_path / "file.bin"
    write_file(path, b"before")
    with patch(call, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        write_file(path, b"after")
    assert path.read_bytes() == b"before" and names(tmp_path) == ["file.bin"]


def test_ctrl_c_after_the_rename(tmp_path):
    path, real = tmp_path / "file.bin", os.replace

    def interrupted(source, target):
        real(source, target)
        raise KeyboardInterrupt

    with patch("os.replace", interrupted), pytest.raises(KeyboardInterrupt):
        write_file(path, b"after")
    assert path.read_bytes() == b"after" and names(tmp_path) == ["file.bin"]


def test_a_file_where_the_folder_should_be_and_a_folder_where_the_file_should_be(tmp_path):
    write_file(tmp_path / "file", b"before")
    for path in (tmp_path / "file" / "new", tmp_path / "file" / "folder" / "new"):
        refusal = refusal_of(lambda path=path: write_file(path, b"after"))
        assert refusal.cause == "a file that has the name of the folder"
    (tmp_path / "folder").mkdir()
    refusal = refusal_of(lambda: write_file(tmp_path / "folder", b"after"))
    assert refusal.cause == "a folder that has the name of the file"
    assert names(tmp_path) == ["file", "folder"] and (tmp_path / "file").read_bytes() == b"before"


@pytest.mark.parametrize("number, cause, fix", [
    (errno.EACCES, "another user", "chmod u+w out"), (errno.EROFS, "read only", "another disk"),
    (errno.EDQUOT, "quota", "free some space"), (errno.EIO, "gone", "another folder"), (None, "gone", "another folder"),
])
def test_what_a_disk_says_is_translated(number, cause, fix):
    error = OSError(number, os.strerror(number)) if number else OSError("a driver's own words")
    refusal = folder_refusal(Path("out"), error)
    assert cause in refusal.cause and fix in refusal.fix and "at out" in refusal.got


def test_readers_see_the_old_file_or_the_new_one(tmp_path):
    path, contents, stop, seen = tmp_path / "file.bin", (b"a" * 200_000, b"b" * 300_000), threading.Event(), set()
    write_file(path, contents[0])

    def read():
        while not stop.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for k in range(50):
        write_file(path, contents[k % 2])
    stop.set()
    reader.join()
    assert seen and seen <= set(contents)


def test_folders_are_checked_before_work(tmp_path, monkeypatch):
    check_folder(tmp_path / "new" / "inside", 1000)
    assert not names(tmp_path)  # nothing is left, also of the folders that were made for the trial
    (tmp_path / "file").write_text("")
    assert "can be written" in refusal_of(lambda: check_folder(tmp_path / "file", 0)).expected
    usage = type("usage", (), {"free": 100 * 2**20})
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: usage)
    check_folder(tmp_path, 42 * 2**20)  # with the margin exactly what is free
    refusal = refusal_of(lambda: check_folder(tmp_path, 43 * 2**20))
    assert "102 MiB" in refusal.expected and "100 MiB free" in refusal.got and "free 2 MiB" in refusal.fix

    def forbidden(self, data):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.Path, "write_bytes", forbidden)
    assert "Permission denied" in refusal_of(lambda: check_folder(tmp_path, 0)).got


def test_a_disk_that_fills_up_on_the_way(tmp_path, monkeypatch):
    """The helper of the other rooms' tests."""
    fill_disk(monkeypatch, lambda path: path.name != "last")
    write_file(tmp_path / "first", b"1")
    assert "No space left" in refusal_of(lambda: write_file(tmp_path / "last", b"2")).got
    assert names(tmp_path) == ["first"]


def test_links_are_followed_and_stay(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for target in (tmp_path / "elsewhere" / "target", tmp_path / "not yet" / "there"):
        link = tmp_path / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        write_file(link, b"one")
        write_file(link, b"two")
        assert link.is_symlink() and target.read_bytes() == b"two"


def test_pipes_and_devices_take_what_comes_and_stay(tmp_path):
    pipe, seen = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: seen.append(pipe.read_bytes()))
    reader.start()
    write_file(pipe, b"x" * 200_000)  # more than a pipe holds
    reader.join()
    assert seen == [b"x" * 200_000] and stat.S_ISFIFO(pipe.stat().st_mode)
    write_file(Path("/dev/null"), b"gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_device_that_is_full_is_refused_and_stays():
    assert refusal_of(lambda: write_file(Path("/dev/full"), b"1")).cause == "a full disk"
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_a_refusal_leaves_no_folder(tmp_path):
    with patch("os.fsync", side_effect=OSError(errno.ENOSPC, "full")):
        refusal_of(lambda: write_file(tmp_path / "a" / "b" / "file", b"1"))
    assert not names(tmp_path)


def test_outputs_are_tried_before_work(tmp_path):
    (tmp_path / "mine").write_text("data")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    check_output(tmp_path / "new" / "table.csv", [tmp_path / "mine"])
    check_output(tmp_path / "mine")
    check_output(Path("/dev/null"))
    assert names(tmp_path) == ["link", "mine"] and (tmp_path / "mine").read_text() == "data"
    for path in (tmp_path / "mine", tmp_path / "link", tmp_path / "." / "mine"):
        assert "needs itself" in refusal_of(lambda path=path: check_output(path, [tmp_path / "mine"])).got
    assert "folder that has the name" in refusal_of(lambda: check_output(tmp_path)).cause
    assert "folder" in refusal_of(lambda: check_output(tmp_path / "mine" / "table.csv")).expected


def test_a_folder_has_one_writer(tmp_path):
    folder = tmp_path / "new" / "run"
    with sole_writer(folder):
        assert names(folder) == [LOCK, OWNER]
        refusal = refusal_of(lambda: sole_writer(folder).__enter__())
        assert f"process {os.getpid()}" in refusal.got and "since 2" in refusal.got
        (folder / OWNER).write_text("{}")  # as before the note was written
        assert "just begun" in refusal_of(lambda: sole_writer(folder).__enter__()).got
        with sole_writer(tmp_path / "other"):
            pass
        (folder / "result").write_text("1")
    assert names(tmp_path) == ["new", "new/run", "new/run/result"]
    with sole_writer(folder):  # and again
        pass


def test_a_writer_that_fails_lets_go_and_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError), sole_writer(tmp_path / "a" / "b"):
        raise RuntimeError
    assert not names(tmp_path)
    (tmp_path / "file").write_text("")
    assert "file that has the name" in refusal_of(lambda: sole_writer(tmp_path / "file").__enter__()).cause


def test_writers_wait_for_nobody_and_exclude_each_other(tmp_path):
    """Of many that try at once one at a time is in, although each removes the lock's file when it leaves."""
    inside, most, entered, refused = [], [], [], []

    def work():
        for _ in range(100):
            try:
                with sole_writer(tmp_path / "run"):
                    inside.append(1)
                    most.append(len(inside))
                    entered.append(1)
                    inside.pop()
            except Refusal as refusal:
                refused.append(refusal.expected.split(":")[0])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and len(entered) >= 4 and names(tmp_path) in ([], ["run"])
    assert set(refused) <= {"a folder that nobody else writes into"}


@pytest.mark.parametrize("action", [
    lambda folder: check_folder(folder, 0), lambda folder: write_file(folder / "file", b"")])
def test_a_folder_that_another_writer_removes_in_between_is_made_again(tmp_path, monkeypatch, action):
    named, times = files._temporary, [1, 2]

    def removed(path):
        if times:
            times.pop()
            path.parent.rmdir()
        return named(path)

    monkeypatch.setattr(files, "_temporary", removed)
    action(tmp_path / "run")
    assert not times


def test_a_killed_writer_holds_nothing_and_its_temporary_files_go(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from symbnn import files
os.replace = lambda source, target: os.kill(os.getpid(), signal.SIGKILL) if Path(target).name == "data" else os.rename(
    source, target)
with files.sole_writer(Path(sys.argv[1])):
    files.write_file(Path(sys.argv[1]) / "data", b"1")
"""
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")])
    assert killed.returncode == -signal.SIGKILL
    left = names(tmp_path / "run")
    assert LOCK in left and OWNER in left and any(name.endswith(".part") for name in left)
    (tmp_path / "run" / ".mine.part.txt").write_text("a user's own")
    with sole_writer(tmp_path / "run"):
        assert names(tmp_path / "run") == [LOCK, ".mine.part.txt", OWNER]
    assert names(tmp_path / "run") == [".mine.part.txt"]


def test_the_next_writer_of_a_file_removes_what_killed_ones_have_left(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    start = f".table.csv.{files._HOST}."
    for name in (f"{start}{ended.pid}-1.part", f"{start}{os.getppid()}-1.part", f"{start}{10**30}-1.part",
                 f"{start}x.part", f".table.csv.another_host.{ended.pid}-1.part",
                 f".other.csv.{files._HOST}.{ended.pid}-1.part"):
        (tmp_path / name).write_text("half")
    write_file(tmp_path / "table.csv", b"whole")
    left = set(names(tmp_path))
    assert f"{start}{ended.pid}-1.part" not in left and len(left) == 6 and "table.csv" in left


def test_threads_that_write_one_file_leave_a_whole_one(tmp_path):
    contents = [bytes([number]) * 100_000 for number in range(4)]
    threads = [threading.Thread(target=lambda data=data: [write_file(tmp_path / "file", data) for _ in range(20)])
               for data in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() in contents


def test_a_folder_that_cannot_be_made_whole_is_not_made_in_part(tmp_path):
    for call in (lambda: write_file(tmp_path / "a" / ("x" * 300) / "file", b"1"),
                 lambda: check_folder(tmp_path / "a" / ("x" * 300), 0),
                 lambda: sole_writer(tmp_path / "a" / ("x" * 300)).__enter__()):
        assert "longer" in refusal_of(call).cause
    assert not names(tmp_path)
