"""A small file in which a running service says what it does: what `status` reads."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from uharmony_model.atomic import write_atomic
from uharmony_model.errors import StoreError
from uharmony_model.frozen import Frozen

_MAX_BYTES = 1 << 22


class Said(Frozen):
    """What is said; `updated` is when, in seconds since 1970."""

    updated: float = 0


Content = TypeVar("Content", bound=Said)


class BoardWriter(Generic[Content]):
    """Keeps the file up to date. The subclass names what there is to say."""

    def __init__(self, path: Path, first: Content) -> None:
        self._path, self._lock, self._said = path, threading.Lock(), first
        self.change()

    @property
    def said(self) -> Content:
        """What was said last, on the disk or not yet."""
        return self._said

    def change(self, *, at_most_every: float = 0.0, **values: object) -> None:
        """Set some values; they reach the disk at once, or after `at_most_every` seconds."""
        with self._lock:
            now = time.time()
            due = now - self._said.updated >= at_most_every
            if due:
                values["updated"] = now
            self._said = self._said.model_copy(update=values)
            if due:
                # A full disk must not end the work for the sake of `status`.
                with suppress(StoreError):
                    write_atomic(self._path, self._said.model_dump_json().encode())


def read_board(path: Path, kind: type[Content]) -> Content | None:
    """What was said last, or None when nothing was or the file is damaged."""
    if not path.is_file() or path.stat().st_size > _MAX_BYTES:
        return None
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError:
        return None
