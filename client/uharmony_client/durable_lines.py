"""Files of lines that only grow: a line is on the disk, or it is not there.

A failed write is taken back at once. A power cut can leave half a last line, which whoever opens
the file next has to deal with.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from uharmony_model.errors import StoreError


@contextmanager
def opened_for_adding(path: Path) -> Iterator[int]:
    """A descriptor for adding to a file of this user's own; no buffer that outlives a failure."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def add_line(file: int, line: bytes) -> int:
    """Add a line, durably or not at all, and say how many bytes it takes."""
    size, rest = os.fstat(file).st_size, memoryview(line + b"\n")
    try:
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    except BaseException:
        os.ftruncate(file, size)
        raise
    return len(line) + 1


def last_line(path: Path, end: int, longest: int) -> tuple[int, bytes]:
    """The last line before byte `end`, with its newline if it has one, and where it starts.

    Raises:
        StoreError: it is longer than `longest`.
    """
    with path.open("rb") as file:
        start, block = end, b""
        while start > 0:
            step = min(1 << 16, start)
            start -= step
            file.seek(start)
            block = file.read(step) + block
            found = block.rfind(b"\n", 0, len(block) - 1)
            if found >= 0:
                return start + found + 1, block[found + 1 :]
            if len(block) > longest:
                raise StoreError(f"{path}: a line of more than {longest} bytes; not a ledger")
        return 0, block
