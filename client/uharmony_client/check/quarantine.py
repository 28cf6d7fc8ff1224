"""Cases that training passes over, because a file of theirs cannot be used.

<store>/quarantine.json   which cases, why, and what their files were like when they were looked at

The file names cases, so it stays in the store (0600). A case whose files have changed since, in
size or time, is not passed over: it is looked at again. Cases are taken out after the splits
are drawn, never before: a mended file must not move other patients from one split to another.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from pydantic import ValidationError

from uharmony_client.case_table import Case, CaseTable
from uharmony_model.atomic import write_atomic
from uharmony_model.errors import DataError, StoreError
from uharmony_model.frozen import Frozen

QUARANTINE_FILE = "quarantine.json"
MAX_SHARE = 0.2
MIN_TRAINING_CASES = 2
_MAX_BYTES = 64 << 20


class Stamp(Frozen):
    """A file as it was: size in bytes and time of change in ns; -1 where it was not there."""

    path: Path
    size: int
    mtime_ns: int


class Entry(Frozen):
    """Why a case is passed over: a code of `findings`, and its files at that time."""

    code: str
    files: tuple[Stamp, ...]


class Quarantine(Frozen):
    """quarantine.json; `study` is the digest of the study that the cases were looked at for."""

    study: str
    cases: dict[str, Entry]


def load_quarantine(store: Path, study: str | None = None) -> frozenset[str]:
    """The names of the cases to pass over: those whose files are still as they were.

    With a digest `study`, nothing is passed over that was found for another study.

    Raises:
        StoreError: the file is damaged.
    """
    held = _read(store)
    if held is None or (study is not None and held.study != study):
        return frozenset()
    return frozenset(
        name
        for name, entry in held.cases.items()
        if all(_stamp(stamp.path) == stamp for stamp in entry.files)
    )


def write_quarantine(store: Path, study: str, refused: Mapping[str, tuple[Case, str]]) -> None:
    """Write the whole list anew: by name, the case and the code of what is wrong with it.

    Raises:
        StoreError: the disk is full or the folder cannot be written.
    """
    held = Quarantine(
        study=study,
        cases={
            name: Entry(code=code, files=tuple(_stamp(path.absolute()) for path in _files(case)))
            for name, (case, code) in sorted(refused.items())
        },
    )
    try:
        store.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{store}: {error.strerror}; check the rights of its folder") from None
    write_atomic(store / QUARANTINE_FILE, held.model_dump_json().encode())


def without_quarantined(table: CaseTable, quarantined: Collection[str]) -> CaseTable:
    """The cases that are left. Give the table with its splits already drawn."""
    names = frozenset(quarantined)
    return CaseTable(cases=tuple(case for case in table.cases if case.case not in names))


def require_enough(table: CaseTable, quarantined: Collection[str]) -> None:
    """Refuse a quarantine that hides a fault of the whole site; the table has its splits.

    Raises:
        DataError: more than a fifth of the cases, or fewer than two training cases would be left.
    """
    out = sum(case.case in quarantined for case in table.cases)
    left = without_quarantined(table, quarantined).of(split="train")
    if out > MAX_SHARE * len(table.cases) or (out and len(left.cases) < MIN_TRAINING_CASES):
        raise DataError(
            f"{out} of {len(table.cases)} cases cannot be used, {len(left.cases)} are left to "
            f"train on; expected at most {MAX_SHARE:.0%} and at least {MIN_TRAINING_CASES}; "
            "mend the files or take the cases out of the table"
        )


def _read(store: Path) -> Quarantine | None:
    path = store / QUARANTINE_FILE
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > _MAX_BYTES:
            raise StoreError(f"{path}: too large for a list of cases; delete it and check again")
        return Quarantine.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        kind = type(error).__name__
        raise StoreError(f"{path}: not readable ({kind}); delete it and check again") from None


def _files(case: Case) -> tuple[Path, ...]:
    return case.image if case.label is None else (*case.image, case.label)


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError:
        return Stamp(path=path, size=-1, mtime_ns=-1)
    return Stamp(path=path, size=status.st_size, mtime_ns=status.st_mtime_ns)
