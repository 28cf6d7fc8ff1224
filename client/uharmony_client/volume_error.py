"""Why a volume file is refused: a word that stays the same, and a text that names no file.

The text after the path holds numbers and names of types only, so it may be shown where the path,
which may hold a patient's name, may not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from uharmony_model.errors import DataError

Reason = Literal[
    "missing",  # no file, or no right to read it
    "damaged",  # ends early, holds more than it declares, fails its checksum
    "format",  # another format
    "dimensions",
    "too-large",
    "voxel-type",
    "scaling",
    "grid",  # voxel size, unit, position, direction
    "not-finite",
]


class VolumeError(DataError):
    """A volume that cannot be used; `reason` stays the same, `what` is the text without a path."""

    def __init__(self, path: Path, reason: Reason, what: str) -> None:
        super().__init__(path, reason, what)
        self.path, self.reason, self.what = path, reason, what

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"
