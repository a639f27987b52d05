from __future__ import annotations

import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsieve.data import write_jsonl, write_lines
from gradsieve.errors import DataError, InvalidArgument
from gradsieve.types import Example


def examples(*raw):
    return [Example(str(i), (), line, "") for i, line in enumerate(raw)]


def test_raw_lines_are_written_byte_for_byte(tmp_path):
    path = tmp_path / "out.jsonl"
    assert write_jsonl(path, examples(b'{"a":  1}', b' {"b": "\xc3\xa9"}\r')) == 2
    assert path.read_bytes() == b'{"a":  1}\n {"b": "\xc3\xa9"}\r\n'


@given(st.lists(st.binary(max_size=20).filter(lambda line: b"\n" not in line)))
def test_any_lines_survive(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("any") / "lines"
    assert write_lines(path, iter(lines)) == len(lines)
    assert path.read_bytes().split(b"\n") == [*lines, b""]


def test_an_existing_file_is_replaced(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"old, and much longer than the new one")
    write_lines(str(path), [b"new"])
    assert path.read_bytes() == b"new\n"
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_the_new_file_has_ordinary_permissions(tmp_path):
    (tmp_path / "ordinary").touch()
    write_lines(tmp_path / "out", [b"x"])
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def failing():
    yield b"new"
    raise RuntimeError("the source failed")


def test_a_failure_midway_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="the source failed"):
        write_lines(path, failing())
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.jsonl"]


@pytest.mark.parametrize(
    ("code", "cure"), [(errno.ENOSPC, "free space or write to another disk"), (errno.EIO, "choose another path")]
)
def test_a_full_disk_is_an_error_with_a_cure_and_leaves_the_old_file(tmp_path, monkeypatch, code, cure):
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"old")

    def full(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError) as caught:
        write_lines(path, [b"new"])
    assert str(caught.value) == f"{path}: cannot be written: {os.strerror(code)}; {cure}"
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_data_reach_the_disk_before_the_rename(tmp_path, monkeypatch):
    path, seen = tmp_path / "out", []
    real = os.fsync

    def watch(handle):
        seen.append((path.exists(), os.fstat(handle).st_size > 0))
        real(handle)

    monkeypatch.setattr(os, "fsync", watch)
    write_lines(path, [b"x"])
    assert seen[0] == (False, True)
    assert seen[1][0] is True  # the folder, after the rename


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/out.jsonl", "No such file or directory; create the folder first"),
        ("file/out.jsonl", "Not a directory; choose a path below a folder"),
        ("folder", "Is a directory; name a file, not a folder"),
        ("x" * 300, "File name too long; choose a shorter name"),
    ],
)
def test_a_path_that_cannot_be_written_names_cause_and_cure(tmp_path, name, message):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError) as caught:
        write_lines(tmp_path / name, [b"x"])
    assert str(caught.value) == f"{tmp_path / name}: cannot be written: {message}"


def test_a_line_with_a_newline_is_refused(tmp_path):
    with pytest.raises(InvalidArgument, match=r"line 2 of .* must not hold a newline"):
        write_lines(tmp_path / "out", [b"fine", b"two\nlines"])
    assert os.listdir(tmp_path) == []


def test_a_name_that_promises_compression_is_refused(tmp_path):
    with pytest.raises(InvalidArgument, match=r"path must not end in .gz"):
        write_lines(tmp_path / "out.jsonl.gz", [b"x"])
