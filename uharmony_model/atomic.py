"""Files and directories that are, after a kill at any moment, either the old ones or the new ones.

What is being written lies beside its place under `.NAME.tmp-...`; a directory that is being
replaced waits under `.NAME.old`. `recover` takes away what a kill left behind, or brings it back.
A call that returned is durable: a power cut does not undo it, and no order in which the disk
wrote what was not yet synchronised leaves half of anything. One process writes to a folder at a
time.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from uharmony_model.errors import StoreError

_LEFTOVER = re.compile(r"^\.(?P<name>.+)\.(?P<kind>tmp-[^.]+|old)$")


def write_atomic(path: Path, data: bytes | bytearray | memoryview, mode: int = 0o600) -> None:
    """Write one file so that a reader sees all of it or what was there before.

    Raises:
        StoreError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    with _store_error(path):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.tmp-", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
            os.replace(name, path)  # noqa: PTH105 - the same call for files here and below
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _fsync(path.parent)


def make_directory(path: Path, mode: int = 0o700) -> None:
    """Make a directory and those above it that are missing, so that a power cut leaves them.

    Raises:
        StoreError: a folder cannot be written.
    """
    with _store_error(path):
        missing: list[Path] = []
        at = path
        while not at.is_dir():
            missing.append(at)
            at = at.parent
        for folder in reversed(missing):
            folder.mkdir(mode=mode, exist_ok=True)
            # A directory's name is an entry of its parent: its own fsync does not keep it.
            _fsync(folder.parent)


def set_aside(final: Path) -> Path:
    """Where the whole old directory waits while another is put in the place of `final`."""
    return final.parent / f".{final.name}.old"


def temporary_directory(final: Path) -> Path:
    """Make a private (0700) empty directory beside `final`, to be filled and put in its place.

    Raises:
        StoreError: the folder cannot be written.
    """
    with _store_error(final):
        return Path(tempfile.mkdtemp(prefix=f".{final.name}.tmp-", dir=final.parent))


def replace_directory(temporary: Path, final: Path) -> None:
    """Make everything in `temporary` durable and put it in the place of `final`.

    Raises:
        StoreError: the disk is full or the folder cannot be written; `final` is untouched.
    """
    with _store_error(final):
        for folder, _, names in os.walk(temporary):
            for name in names:
                _fsync(Path(folder) / name)
            _fsync(Path(folder))
        old = set_aside(final)
        if old.exists() and not final.exists():
            # A write was cut between its two renames: this is the last one that was complete.
            os.rename(old, final)  # noqa: PTH104
        remove_directory(old)
        if final.exists():
            os.rename(final, old)  # noqa: PTH104
        try:
            os.rename(temporary, final)  # noqa: PTH104
        except OSError:
            if old.exists():
                os.rename(old, final)  # noqa: PTH104
            raise
        _fsync(final.parent)
        remove_directory(old)


def remove_directory(path: Path) -> None:
    """Remove a directory, if it exists, so that nothing ever leaves half of it under its name.

    Raises:
        StoreError: it cannot be removed.
    """
    with _store_error(path):
        if not path.exists():
            return
        if not _LEFTOVER.match(path.name):
            doomed = temporary_directory(path)
            os.rename(path, doomed)  # noqa: PTH104 - onto an empty directory, which is allowed
            path = doomed
        # Were the names not durable first, a power cut could undo them and keep the emptying.
        _fsync(path.parent)
        shutil.rmtree(path)


def recover(folder: Path) -> None:
    """Clean up after a kill: call it once, before the first write, when nobody else writes here.

    Raises:
        StoreError: the folder cannot be read or written.
    """
    with _store_error(folder):
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        leftovers = [(path, found) for path in paths if (found := _LEFTOVER.match(path.name))]
        if leftovers:
            # What stands in its place may be newer than the last fsync; `.old` is emptied below.
            _fsync(folder)
        for leftover, found in leftovers:
            final = folder / found["name"]
            if found["kind"] == "old" and not final.exists():
                # Killed between the two renames: the old one is the last that was complete.
                os.rename(leftover, final)  # noqa: PTH104
            elif leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _store_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise StoreError(
            f"{path}: not written: {reason}; check the free space and the rights of its folder"
        ) from error
