"""Found by Python at its start: the gateway's process writes down all it reads and writes.

Bytes are taken where TLS ends, so the record is the complete decrypted traffic of each connection.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any


class _Tap:
    """A stream of which one method's bytes are also written to a file."""

    def __init__(self, stream: Any, path: Path) -> None:
        self._stream, self._path = stream, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _note(self, data: bytes) -> None:
        with self._path.open("ab") as file:
            file.write(data)

    async def read(self, size: int = -1) -> bytes:
        data: bytes = await self._stream.read(size)
        self._note(data)
        return data

    def write(self, data: bytes) -> None:
        self._note(data)
        self._stream.write(data)


def _record(folder: Path) -> None:
    from uharmony_server.gateway_connection import Connection

    numbers, begin = itertools.count(), Connection.__init__

    def tapped(self: Any, shared: Any, peer: Any, reader: Any, writer: Any) -> None:
        name = f"{os.getpid()}-{next(numbers):05d}-{peer.site or 'stranger'}"
        up, down = _Tap(reader, folder / f"{name}.up"), _Tap(writer, folder / f"{name}.down")
        begin(self, shared, peer, up, down)  # type: ignore[arg-type]

    Connection.__init__ = tapped  # type: ignore[method-assign]


if "uharmony_server.gateway" in sys.orig_argv and "UHARMONY_TEST_RECORD" in os.environ:
    _record(Path(os.environ["UHARMONY_TEST_RECORD"]))
