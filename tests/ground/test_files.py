"""A file whole or not at all: full disks, Ctrl-C, folders that are files, readers meanwhile."""
import errno
import os
import resource
import threading
from pathlib import Path
from unittest.mock import patch

import pytest

from helpers_ground import fill_disk, refusal_of
from symbnn import files
from symbnn.files import check_folder, folder_refusal, write_file


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
    assert (tmp_path / "new" / "inside").is_dir() and not names(tmp_path / "new" / "inside")
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
