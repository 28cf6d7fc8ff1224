from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.support.kill import killed_at
from uharmony_model.atomic import (
    recover,
    remove_directory,
    replace_directory,
    temporary_directory,
    write_atomic,
)
from uharmony_model.errors import StoreError


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def filled(final: Path, content: str) -> Path:
    temporary = temporary_directory(final)
    (temporary / "inner").mkdir()
    (temporary / "inner" / "a").write_text(content)
    (temporary / "b").write_text(content)
    return temporary


def both(content: str) -> dict[str, bytes]:
    return {"b": content.encode(), "inner/a": content.encode()}


def test_a_file_is_written_and_replaced_with_its_mode(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    assert path.stat().st_mode & 0o777 == 0o600
    write_atomic(path, memoryview(b"new"), mode=0o644)
    assert path.stat().st_mode & 0o777 == 0o644
    assert tree(tmp_path) == {"file": b"new"}


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_file_is_old_or_new_wherever_the_kill_falls(tmp_path, before):
    outcomes, at, done = set(), 0, False
    while not done:
        folder = tmp_path / str(at)
        folder.mkdir()
        if before is not None:
            write_atomic(folder / "file", before)
        with killed_at(at) as countdown:
            write_atomic(folder / "file", b"new")
        done = countdown.calls <= at
        recover(folder)
        after = tree(folder)
        assert after in ({"file": b"new"}, {} if before is None else {"file": before})
        outcomes.add(after.get("file"))
        at += 1
    assert outcomes == {before, b"new"}
    assert at > 5


@pytest.mark.parametrize("exists", [False, True])
def test_a_directory_is_old_or_new_wherever_the_kill_falls(tmp_path, exists):
    outcomes, at, done = set(), 0, False
    while not done:
        folder = tmp_path / str(at)
        folder.mkdir()
        final = folder / "generation"
        if exists:
            replace_directory(filled(final, "old"), final)
        temporary = filled(final, "new")
        with killed_at(at) as countdown:
            replace_directory(temporary, final)
        done = countdown.calls <= at
        recover(folder)
        after = tree(final)
        assert after in (both("new"), both("old") if exists else {})
        assert list(folder.iterdir()) in ([], [final])
        outcomes.add(after.get("b"))
        at += 1
    assert outcomes == {b"new", b"old" if exists else None}
    assert at > 8


def test_a_removed_directory_is_whole_or_gone_wherever_the_kill_falls(tmp_path):
    at, done = 0, False
    while not done:
        final = tmp_path / str(at) / "generation"
        final.parent.mkdir()
        replace_directory(filled(final, "old"), final)
        with killed_at(at) as countdown:
            remove_directory(final)
        done = countdown.calls <= at
        recover(final.parent)
        assert tree(final) in (both("old"), {})
        assert list(final.parent.iterdir()) in ([], [final])
        at += 1
    assert not final.exists()


def test_replacing_survives_an_earlier_kill_that_nobody_cleaned_up(tmp_path):
    final = tmp_path / "generation"
    replace_directory(filled(final, "first"), final)
    final.rename(tmp_path / ".generation.old")
    replace_directory(filled(final, "second"), final)
    assert tree(tmp_path) == {f"generation/{k}": v for k, v in both("second").items()}


def test_everything_is_synchronised_before_it_is_renamed(tmp_path, monkeypatch):
    events: list[int] = []
    renamed = -1
    final = tmp_path / "generation"
    temporary = filled(final, "new")
    inodes = {p.stat().st_ino for p in [temporary, *temporary.rglob("*")]}
    fsync, rename = os.fsync, os.rename

    def noting_fsync(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def noting_rename(*paths):
        events.append(renamed)
        rename(*paths)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    replace_directory(temporary, final)
    at = events.index(renamed)
    assert set(events[:at]) == inodes
    assert events[at + 1 :] == [tmp_path.stat().st_ino]


@pytest.mark.parametrize("name", ["fsync", "replace", "fchmod"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, name):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, name, full)
    with pytest.raises(StoreError, match=r"file: not written: No space left .* free space"):
        write_atomic(path, b"new")
    assert tree(tmp_path) == {"file": b"old"}


def test_a_directory_that_cannot_be_renamed_leaves_the_old_one(tmp_path, monkeypatch):
    final = tmp_path / "generation"
    replace_directory(filled(final, "old"), final)
    temporary = filled(final, "new")
    rename = os.rename

    def failing(source, target):
        if Path(source) == temporary:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(StoreError, match="Input/output error"):
        replace_directory(temporary, final)
    assert tree(final) == both("old")


def test_a_missing_folder_is_our_error(tmp_path):
    for call in (write_atomic, lambda path, _: temporary_directory(path)):
        with pytest.raises(StoreError, match="No such file or directory"):
            call(tmp_path / "nowhere" / "file", b"")


def test_recover_touches_nothing_else(tmp_path):
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / "file.tmp-1").write_text("x")
    (tmp_path / ".file.old.bak").write_text("x")
    (tmp_path / ".file.tmp-abc").write_text("half")
    (tmp_path / ".target.tmp-abc").symlink_to(tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "inner").write_text("x")
    recover(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        ".hidden",
        "file.tmp-1",
        ".file.old.bak",
        "kept",
    }
    assert (tmp_path / "kept" / "inner").exists()
    recover(tmp_path / "nowhere")


def test_a_temporary_directory_is_private(tmp_path):
    assert temporary_directory(tmp_path / "generation").stat().st_mode & 0o777 == 0o700
