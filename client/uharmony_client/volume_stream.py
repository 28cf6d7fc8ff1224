"""The bytes of a volume file: decompressed only as far as they are read, and the fixed header."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uharmony_client.volume_error import VolumeError

HEADER_SIZES = {1: 348, 2: 540}
_MAX_RATIO = 1032  # deflate cannot compress further (zlib's technical notes)


@contextlib.contextmanager
def open_stream(path: Path) -> Iterator[tuple[Any, int]]:
    """The uncompressed stream and an upper bound of the bytes in it."""
    with path.open("rb") as raw:
        size = path.stat().st_size
        magic = raw.read(2)
        raw.seek(0)
        if magic == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=raw, mode="rb") as stream:
                yield stream, size * _MAX_RATIO
        else:
            yield raw, size


def read_block(stream: Any, path: Path) -> tuple[bytes, str, int]:
    """The fixed part of a header, its byte order and its version; nothing in it is checked.

    Raises:
        VolumeError: it is no NIfTI header, or not all of one.
    """
    start = stream.read(4)
    for order, (version, size) in itertools.product("<>", HEADER_SIZES.items()):
        if start == struct.pack(f"{order}i", size):
            block = start + stream.read(size - 4)
            if len(block) < size:
                what = "ends inside its header; copy or export it again"
                raise VolumeError(path, "damaged", what)
            return block, order, version
    raise VolumeError(path, "format", "is no NIfTI file; convert it to .nii or .nii.gz")
