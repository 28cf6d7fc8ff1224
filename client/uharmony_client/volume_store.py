"""Prepared volumes on disk, memory-mapped: a case is preprocessed once, not in every round.

An entry is a folder named by the SHA-256 of everything that decides its content: the bytes of the
source files, the preprocessing, and the version of this code. So a changed file or study gives
another entry, and nothing here has to be told. Entries hold images: folders are 0700, files 0600.

    <store>/<key>/image.npy        (C, D, H, W) float32
                 /label.npy        (D, H, W) uint8, absent for a case without a label
                 /foreground.npy   (N, 4) int32: D, H, W index and label value
                 /record.json      shapes, sizes, digests, and the way back to the file's grid
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from uharmony_client.case_table import Case
from uharmony_client.grids import Grid
from uharmony_client.site_config import SiteConfig
from uharmony_client.site_data import Volume, channel_modalities, prepare, present_in
from uharmony_model.atomic import make_directory, remove_directory, temporary_directory
from uharmony_model.errors import DataError, StoreError
from uharmony_model.frozen import Frozen
from uharmony_model.randomness import numpy_generator
from uharmony_model.task import Task

log = logging.getLogger(__name__)

VERSION = 1  # raise it when preprocessing gives other numbers for the same input
FOREGROUND_PER_VALUE = 20_000
_LEFTOVER_S = 24 * 3600
_MAX_RECORD_BYTES = 1 << 20

ArrayName = Literal["image", "label", "foreground"]


class Piece(Frozen):
    """One array file of an entry."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int
    sha256: str


class Record(Frozen):
    """record.json: what the entry is and how to get back to the file's grid."""

    version: int
    key: str
    grid: Grid
    arrays: dict[ArrayName, Piece]


@dataclass(frozen=True)
class StoredVolume:
    """A prepared case; `image` and `label` are read-only memory maps.

    `foreground` (N, 4) holds D, H, W indices and label value, at most 20 000 rows a value, drawn
    evenly. `spacing_mm` is along D, H, W = right, anterior, superior. A channel that is not
    `present (C,)` is zero.
    """

    case: Case
    key: str
    image: NDArray[np.float32]
    label: NDArray[np.uint8] | None
    foreground: NDArray[np.int32]
    grid: Grid
    present: tuple[bool, ...]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Size of a voxel along D, H, W."""
        return self.grid.spacing_mm


class VolumeStore:
    """The folder of prepared volumes; `on_build` is told of each case before it is prepared."""

    def __init__(self, folder: Path, *, on_build: Callable[[Case], None] | None = None) -> None:
        self.folder = folder
        self._on_build = on_build
        with _store_error(folder):
            make_directory(folder)
            self._remove_leftovers()

    def open(self, case: Case, task: Task, config: SiteConfig) -> StoredVolume:
        """The prepared case, built first if it is not there or is damaged.

        Raises:
            DataError: the case does not fit the study.
            StoreError: the store cannot be written.
        """
        key = entry_key(case, task, config)
        present = present_in(case, task, config)
        entry = self.folder / key
        if entry.exists():
            try:
                return _load(entry, case, key, present)
            except StoreError as error:
                log.warning("%s; preparing the case again", error)
                remove_directory(entry)
        if self._on_build is not None:
            self._on_build(case)
        volume = prepare(case, task, config)
        with _store_error(self.folder):
            self._publish(volume, key, entry)
        return _load(entry, case, key, present)

    def verify(self, volume: StoredVolume) -> None:
        """Compare every byte of an entry with its digests; `open` looks at sizes only.

        Raises:
            StoreError: an array is not what was written.
        """
        entry = self.folder / volume.key
        for name, piece in _read_record(entry, volume.key).arrays.items():
            with _store_error(entry):
                digest = file_digest(entry / f"{name}.npy")
            if digest != piece.sha256:
                raise StoreError(f"{entry / name}.npy: damaged; delete the folder {entry}")

    def _publish(self, volume: Volume, key: str, entry: Path) -> None:
        temporary = temporary_directory(entry)
        try:
            arrays: dict[ArrayName, NDArray[Any]] = {"image": volume.image}
            if volume.label is not None:
                arrays["label"] = volume.label
            arrays["foreground"] = find_foreground(volume.label, key)
            pieces = {
                name: _write_array(temporary / f"{name}.npy", array)
                for name, array in arrays.items()
            }
            record = Record(version=VERSION, key=key, grid=volume.grid, arrays=pieces)
            _write_bytes(temporary / "record.json", record.model_dump_json().encode())
            _fsync(temporary)
            try:
                temporary.rename(entry)
            except OSError as error:
                # Another process was faster; what it wrote under this key is the same.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            _fsync(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        """Half-built entries of killed processes; younger ones may be another's work."""
        for leftover in self.folder.glob(".*.tmp-*"):
            if leftover.is_dir() and leftover.stat().st_mtime < time.time() - _LEFTOVER_S:
                shutil.rmtree(leftover, ignore_errors=True)


def entry_key(case: Case, task: Task, config: SiteConfig) -> str:
    """SHA-256 over the content of the case's files and all that decides how it is prepared."""
    modalities = channel_modalities(case.modality, task, config.modality_map, case.case)
    content = {
        "version": VERSION,
        "images": [_source_digest(path) for path in case.image],
        "label": None if case.label is None else _source_digest(case.label),
        "intensity": [task.intensity[name].model_dump(mode="json") for name in modalities],
        "spacing_mm": task.spacing_mm,
        "label_map": sorted(config.label_map.items()),
        "label_values": sorted(config.label_values(task)),
    }
    if task.presence:  # which channel of the files goes where, and which do not
        content |= {"modalities": modalities, "channels": list(task.intensity)}
        content |= {"missing": sorted(config.lacks(task))}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def find_foreground(label: NDArray[np.uint8] | None, key: str) -> NDArray[np.int32]:
    """Labelled voxels (N, 4), sorted; more than the cap of one value are drawn evenly."""
    rows = []
    for value in np.unique(label).tolist() if label is not None else ():
        if value == 0:
            continue
        flat = np.flatnonzero(label == value)
        if len(flat) > FOREGROUND_PER_VALUE:
            # Seeded by the content, so that every machine keeps the same voxels.
            draw = numpy_generator(0, key, "foreground", value)
            flat = np.sort(draw.choice(flat, FOREGROUND_PER_VALUE, replace=False))
        assert label is not None  # noqa: S101 - the loop is empty without one
        places = np.stack(np.unravel_index(flat, label.shape), axis=1)
        rows.append(np.column_stack([places, np.full(len(flat), value)]).astype(np.int32))
    return np.concatenate(rows) if rows else np.empty((0, 4), dtype=np.int32)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _source_digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _load(entry: Path, case: Case, key: str, present: tuple[bool, ...]) -> StoredVolume:
    record = _read_record(entry, key)
    arrays: dict[str, NDArray[Any]] = {}
    for name, piece in record.arrays.items():
        path = entry / f"{name}.npy"
        try:
            if path.stat().st_size != piece.bytes:
                raise StoreError(f"{path}: has not the size that was written")
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise StoreError(f"{path}: not readable ({type(error).__name__})") from None
        if array.shape != piece.shape or array.dtype != np.dtype(piece.dtype):
            raise StoreError(f"{path}: is not the array that was written")
        arrays[name] = array
    if not {"image", "foreground"} <= arrays.keys():
        raise StoreError(f"{entry}: arrays are missing from its record")
    # The foreground is read at every step, and small.
    foreground = np.array(arrays["foreground"])
    label = arrays.get("label")
    return StoredVolume(case, key, arrays["image"], label, foreground, record.grid, present)


def _read_record(entry: Path, key: str) -> Record:
    path = entry / "record.json"
    try:
        if path.stat().st_size > _MAX_RECORD_BYTES:
            raise StoreError(f"{path}: too large for a record")
        record = Record.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise StoreError(f"{path}: not readable ({type(error).__name__})") from None
    if record.key != key or record.version != VERSION:
        raise StoreError(f"{path}: belongs to another entry")
    return record


def _write_array(path: Path, array: NDArray[Any]) -> Piece:
    with _create(path) as file:
        np.save(file, array, allow_pickle=False)
    return Piece(
        shape=array.shape,
        dtype=array.dtype.str,
        bytes=path.stat().st_size,
        sha256=file_digest(path),
    )


def _write_bytes(path: Path, content: bytes) -> None:
    with _create(path) as file:
        file.write(content)


@contextmanager
def _create(path: Path) -> Iterator[Any]:
    """A new private file that is on the disk when the block ends."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _fsync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _store_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{folder}: {error.strerror or type(error).__name__}; "
            "check the free space and the rights of the store's folder"
        ) from error
