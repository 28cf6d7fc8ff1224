"""A site's own folder as one file, and back: what no one else could give a site again.

    backup.zip   identity/ generations/ ledger/ models/ alone/ evaluations/ quarantine.json
                 manifest.json, last: every file with its size and SHA-256

Stored, not compressed, so that no size in it can promise more than the file has. Prepared volumes
are left out, they are made again; so are logs. THE SITE'S PRIVATE KEYS ARE INSIDE: whoever has the
file can speak for the site. The digests find damage, not forgery.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import stat
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from pydantic import Field, NonNegativeInt, ValidationError

from uharmony_model.atomic import remove_directory, replace_directory, temporary_directory
from uharmony_model.errors import StoreError
from uharmony_model.exchange.canonical import Digest, explain
from uharmony_model.frozen import Frozen

FOLDERS = ("identity", "generations", "ledger", "models", "alone", "evaluations")
FILES = ("quarantine.json",)
MANIFEST = "manifest.json"
NOTICE = (
    "This file holds the site's private keys. Keep it as you keep passwords: "
    "whoever has it can speak for the site."
)
MAX_FILES = 200_000
_MAX_MANIFEST_BYTES = 64 << 20
_MAX_NAME = 512
_CHUNK = 1 << 20
_UNFINISHED = re.compile(r"^\..+\.tmp-[^.]+$")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # equal stores give equal files; a zip's time starts here
_REGULAR = (stat.S_IFREG | 0o600) << 16
_ENCRYPTED = 0x1


class _Entry(Frozen):
    name: Annotated[str, Field(min_length=1, max_length=_MAX_NAME)]
    size: NonNegativeInt
    sha256: Digest


class _Manifest(Frozen):
    format: Literal[1] = 1
    notice: str = NOTICE
    files: Annotated[tuple[_Entry, ...], Field(max_length=MAX_FILES)]


@dataclass(frozen=True)
class Contents:
    """What a backup holds."""

    files: int
    bytes: int


def backup(store: Path, archive: Path) -> Contents:
    """Write the store's lasting part to one file (0600), durable, whole or not at all.

    Stop the site's service first: a file that changes while it is read ends the backup.

    Raises:
        StoreError: the store has nothing to keep, holds a link or a device, changes meanwhile, or
            the file cannot be written.
    """
    entries: list[_Entry] = []
    with _new_file(archive) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as target:
            for name, path in _kept(store):
                entries.append(_add(target, name, path))
            if not entries:
                raise StoreError(f"{store}: nothing to keep in it; give the folder of a site")
            text = _Manifest(files=tuple(entries)).model_dump_json(indent=1)
            target.writestr(_info(MANIFEST), text.encode())
        if len(entries) > MAX_FILES or len(text) > _MAX_MANIFEST_BYTES:
            raise StoreError(f"{store}: {len(entries)} files, at most {MAX_FILES} can be kept")
    return Contents(len(entries), sum(entry.size for entry in entries))


def restore(archive: Path, store: Path) -> Contents:
    """Bring a backup back into an empty or absent store, whole or not at all.

    Raises:
        StoreError: the store is not empty; the file is damaged, or holds anything that a backup
            does not hold; the disk is full.
    """
    _require_empty(store)
    try:
        size = archive.stat().st_size
        store.parent.mkdir(parents=True, exist_ok=True)
        with archive.open("rb") as file, zipfile.ZipFile(file) as source:
            infos = _checked(source, archive, size)
            manifest = _manifest(source, infos, archive)
            _clear(store)
            temporary = temporary_directory(store)
            try:
                for entry in manifest.files:
                    _extract(source, infos[entry.name], entry, temporary, archive)
                replace_directory(temporary, store)
            except BaseException:
                remove_directory(temporary)
                raise
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{archive}: not restored: {error.strerror or error}") from None
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        EOFError,
        NotImplementedError,
        OverflowError,
        RuntimeError,
        ValueError,
        struct.error,
    ) as error:
        raise _refused(archive, f"damaged, or no backup ({type(error).__name__})") from None
    return Contents(len(manifest.files), sum(entry.size for entry in manifest.files))


# --- writing -----------------------------------------------------------------------------------


@contextmanager
def _new_file(final: Path) -> Iterator[BinaryIO]:
    """A private file that takes its place under `final` when it is complete and durable."""
    temporary: Path | None = None
    try:
        _clear(final)
        descriptor, name = tempfile.mkstemp(prefix=f".{final.name}.tmp-", dir=final.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(final)
        folder = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StoreError(
            f"{final}: backup not written: {error.strerror or error}; an older one is untouched"
        ) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _clear(final: Path) -> None:
    """Take away what a kill left beside `final`: there are keys in it."""
    for leftover in final.parent.glob(f".{glob.escape(final.name)}.tmp-*"):
        if leftover.is_dir() and not leftover.is_symlink():
            remove_directory(leftover)
        else:
            leftover.unlink()


def _kept(store: Path) -> Iterator[tuple[str, Path]]:
    """Names and paths of the files to keep, sorted; unfinished writes are not among them."""
    for name in FOLDERS:
        if (store / name).is_symlink() or (store / name).is_dir():
            yield from _below(name, store / name)
    for name in FILES:
        if (store / name).is_symlink() or (store / name).exists():
            yield name, store / name


def _below(prefix: str, folder: Path) -> Iterator[tuple[str, Path]]:
    if folder.is_symlink():
        raise StoreError(f"{folder}: is a link; a backup holds files only, replace it by its files")
    for path in sorted(folder.iterdir()):
        if _UNFINISHED.match(path.name):
            continue
        name = f"{prefix}/{path.name}"
        if path.is_dir() and not path.is_symlink():
            yield from _below(name, path)
        else:
            yield name, path


def _add(target: zipfile.ZipFile, name: str, path: Path) -> _Entry:
    _require_safe(name, path)
    # O_NONBLOCK: a pipe in the folder must not keep the backup waiting.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise StoreError(
            f"{path}: not readable: {error.strerror}; a backup holds plain files only, and the "
            "service has to be stopped while it is made"
        ) from None
    with os.fdopen(descriptor, "rb") as file:
        before = os.fstat(file.fileno())
        if not stat.S_ISREG(before.st_mode):
            raise StoreError(f"{path}: is no plain file; take it out of the store")
        check, size = hashlib.sha256(), 0
        with target.open(_info(name), "w", force_zip64=True) as out:
            while chunk := file.read(_CHUNK):
                check.update(chunk)
                size += len(chunk)
                out.write(chunk)
        after = os.fstat(file.fileno())
    if size != before.st_size or before.st_mtime_ns != after.st_mtime_ns:
        raise StoreError(f"{path}: changed while it was read; stop the service and try again")
    return _Entry(name=name, size=size, sha256=check.hexdigest())


def _info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, date_time=_EPOCH)
    info.external_attr = _REGULAR
    return info


# --- reading what nobody vouches for -----------------------------------------------------------


def _checked(source: zipfile.ZipFile, archive: Path, size: int) -> dict[str, zipfile.ZipInfo]:
    """The entries by name, once each of them is one that a backup may hold."""
    infos: dict[str, zipfile.ZipInfo] = {}
    if len(source.infolist()) > MAX_FILES + 1:
        raise _refused(archive, f"{len(source.infolist())} entries, at most {MAX_FILES}")
    total = 0
    for info in source.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        if info.orig_filename != info.filename or info.is_dir() or kind not in (0, stat.S_IFREG):
            raise _refused(archive, f"entry {info.orig_filename!r:.80} is no plain file")
        if info.filename != MANIFEST:
            _require_safe(info.filename, archive)
        if info.filename in infos:
            raise _refused(archive, f"entry {info.filename!r:.80} occurs twice")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise _refused(archive, f"entry {info.filename!r:.80} is compressed")
        if info.flag_bits & _ENCRYPTED:
            raise _refused(archive, f"entry {info.filename!r:.80} is encrypted")
        total += info.file_size
        infos[info.filename] = info
    if total > size:
        raise _refused(archive, f"declares {total} bytes of files in a file of {size} bytes")
    for name in infos:
        parents = name.split("/")[:-1]
        if any("/".join(parents[: i + 1]) in infos for i in range(len(parents))):
            raise _refused(archive, f"entry {name!r:.80} lies below a file")
    return infos


def _manifest(
    source: zipfile.ZipFile, infos: dict[str, zipfile.ZipInfo], archive: Path
) -> _Manifest:
    if MANIFEST not in infos or infos[MANIFEST].file_size > _MAX_MANIFEST_BYTES:
        raise _refused(archive, f"no {MANIFEST} of an honest size")
    try:
        manifest = _Manifest.model_validate_json(source.read(MANIFEST), strict=True)
    except ValidationError as error:
        raise _refused(archive, f"{MANIFEST}: {explain(error)}") from None
    names = [entry.name for entry in manifest.files]
    if len(set(names)) != len(names) or {*names, MANIFEST} != infos.keys():
        raise _refused(archive, f"{MANIFEST} does not name exactly the files that are there")
    for entry in manifest.files:
        if entry.size != infos[entry.name].file_size:
            raise _refused(archive, f"{entry.name!r:.80} has not the size that {MANIFEST} names")
    return manifest


def _extract(
    source: zipfile.ZipFile, info: zipfile.ZipInfo, entry: _Entry, folder: Path, archive: Path
) -> None:
    path = folder.joinpath(*entry.name.split("/"))
    for parent in reversed(path.relative_to(folder).parents[:-1]):
        (folder / parent).mkdir(mode=0o700, exist_ok=True)
    check, left = hashlib.sha256(), entry.size
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as out, source.open(info) as file:
        while chunk := file.read(min(_CHUNK, left + 1)):
            left -= len(chunk)
            if left < 0:
                raise _refused(archive, f"{entry.name!r:.80} is longer than declared")
            check.update(chunk)
            out.write(chunk)
    if left or check.hexdigest() != entry.sha256:
        raise _refused(archive, f"{entry.name!r:.80}: its SHA-256 differs from {MANIFEST}")


def _require_safe(name: str, where: Path) -> None:
    """A relative name of plain parts, below one of the folders that a backup holds."""
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in parts)
    known = (parts[0] in FOLDERS and len(parts) > 1) or name in FILES
    if not (plain and known and len(name) <= _MAX_NAME and name.isprintable() and "\\" not in name):
        raise StoreError(f"{where}: {name!r:.80} is no name that a backup holds; refused")


def _require_empty(store: Path) -> None:
    if store.is_symlink() or (store.exists() and (not store.is_dir() or any(store.iterdir()))):
        raise StoreError(
            f"{store}: is not empty; restore into a new folder, nothing is ever overwritten"
        )
    if os.path.ismount(store):
        raise StoreError(
            f"{store}: is a mount, which cannot be put in place in one step; restore into a folder "
            "below it and name that one in site.yaml"
        )


def _refused(archive: Path, why: str) -> StoreError:
    return StoreError(f"{archive}: not restored: {why}; nothing was written, take another backup")
