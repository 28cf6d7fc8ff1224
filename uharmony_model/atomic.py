"""Files and directories that are, after a kill at any moment, either the old ones or the new ones.

What is being written lies beside its place under `.NAME.tmp-...`; a directory that is being
replaced waits under `.NAME.old`. `recover` takes away what a kill left behind, or brings it back.
One process writes to a folder at a time.
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
        old = final.parent / f".{final.name}.old"
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
    """Remove a directory, if it exists, so that a kill never leaves half of it under its name.

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
        shutil.rmtree(path)


def recover(folder: Path) -> None:
    """Clean up after a kill: call it once, before the first write, when nobody else writes here.

    Raises:
        StoreError: the folder cannot be read or written.
    """
    with _store_error(folder):
        for leftover in sorted(folder.iterdir()) if folder.is_dir() else []:
            found = _LEFTOVER.match(leftover.name)
            if not found:
                continue
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
