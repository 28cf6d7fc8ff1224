"""Texts that may name people: header fields, extensions, sidecars, names of files and folders.

Nothing of what stands there is returned: only which fields are filled, how long they are, and
whether they look like a name, a date or a long number.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from uharmony_client.nifti import MAX_OFFSET
from uharmony_client.readers import stem
from uharmony_client.volume_error import VolumeError
from uharmony_client.volume_header import HEADERS
from uharmony_client.volume_stream import open_stream, read_block

TEXT_FIELDS = ("descrip", "aux_file", "db_name", "intent_name", "data_type")
_EXTENSION_KINDS = {2: "DICOM", 4: "AFNI", 6: "comment"}
_MAX_EXTENSIONS = 64
_MAX_SIDECAR_BYTES = 1 << 20
_OTHER_SIDECARS = (".txt", ".xml", ".csv", ".dcm", ".ima", ".par", ".html", ".pdf")

# Attributes of DICOM (PS3.15 annex E, the part that names people and places) in sidecars.
PERSONAL_KEYS = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientBirthTime", "PatientSex", "PatientAge",
    "PatientAddress", "PatientTelephoneNumbers", "OtherPatientIDs", "OtherPatientNames",
    "PatientMotherBirthName", "PatientComments", "PatientWeight", "EthnicGroup", "Occupation",
    "AccessionNumber", "AdmissionID", "StudyID", "StudyDate", "SeriesDate", "AcquisitionDate",
    "AcquisitionDateTime", "ContentDate", "InstitutionName", "InstitutionAddress",
    "InstitutionalDepartmentName", "StationName", "DeviceSerialNumber", "ReferringPhysicianName",
    "PerformingPhysicianName", "OperatorsName", "RequestingPhysician", "PhysiciansOfRecord",
    "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID",
)  # fmt: skip
_BY_LOWER = {key.lower(): key for key in PERSONAL_KEYS}

_YEAR, _MONTH, _DAY = r"(?:19|20)\d\d", r"(?:0[1-9]|1[0-2])", r"(?:0[1-9]|[12]\d|3[01])"
_GAP = r"[-._/]?"
_PERSONAL = re.compile(
    rf"\^|(?<!\d)(?:{_YEAR}{_GAP}{_MONTH}{_GAP}{_DAY}|{_DAY}{_GAP}{_MONTH}{_GAP}{_YEAR})(?!\d)"
    # two words as names are written, and numbers as long as those of patients
    r"|(?<![^\W\d_])[^\W\d_a-z][^\W\d_A-Z]{2,}[ ,_-]+[^\W\d_a-z][^\W\d_A-Z]{2,}(?![^\W\d_])"
    r"|(?<![^\W\d_])[A-Z]{3,}[ ,]+[A-Z]{3,}(?![^\W\d_])"
    r"|(?<!\d)\d{7,}(?!\d)"
)

Found = tuple[str, str]


def looks_personal(text: str) -> bool:
    """Whether a text has the form of a name, a date or a long number."""
    return _PERSONAL.search(text) is not None


def header_texts(path: Path) -> list[Found]:
    """Codes and descriptions of the texts in a volume's header and extensions."""
    try:
        with open_stream(path) as (stream, _):
            block, order, version = read_block(stream, path)
            fields = HEADERS[version](block, endianness=order, check=False).structarr
            return [*_fields(fields), *_extensions(stream, fields, len(block), order)]
    except (VolumeError, OSError, EOFError, zlib.error):
        return []  # what is wrong with the file is said where it is opened


def sidecars(path: Path) -> list[Found]:
    """Codes and descriptions of the files of the same name beside a volume."""
    found: list[Found] = []
    beside = path.with_name(stem(path.name))
    sidecar = beside.with_name(f"{beside.name}.json")
    if sidecar.is_file():
        found += _json_sidecar(sidecar)
    others = [e for e in _OTHER_SIDECARS if beside.with_name(f"{beside.name}{e}").is_file()]
    return found + [("U505", f"a {ending} file") for ending in others]


def file_names(paths: Iterable[Path], root: Path) -> list[Found]:
    """Codes and descriptions of names below the data folder that look like a person or a date."""
    files = folders = 0
    for path in paths:
        parts = path.relative_to(root).parts if path.is_relative_to(root) else (path.name,)
        files += looks_personal(stem(parts[-1]))
        folders += any(map(looks_personal, parts[:-1]))
    counts = ((files, "names of files"), (folders, "names of folders"))
    return [("U506", f"{count} {what}") for count, what in counts if count]


def _fields(fields: Any) -> Iterator[Found]:
    for name in TEXT_FIELDS:
        if name not in fields.dtype.names:  # NIfTI-2 has fewer
            continue
        content = bytes(fields[name]).strip(b"\0 ")
        if content:
            personal = looks_personal(content.decode("latin-1"))
            yield ("U502" if personal else "U501"), f"{name} ({len(content)} bytes)"


def _extensions(stream: Any, fields: Any, start: int, order: str) -> Iterator[Found]:
    begin = float(fields["vox_offset"])
    if not math.isfinite(begin) or not start + 4 < begin <= MAX_OFFSET:
        return
    stream.read(4)  # whether there are extensions; writers forget it, so the bytes are looked at
    left = int(begin) - start - 4
    for _ in range(_MAX_EXTENSIONS):
        frame = stream.read(8) if left >= 8 else b""
        if len(frame) < 8:
            return
        size, kind = struct.unpack(f"{order}2i", frame)
        if not 8 <= size <= left:
            if any(frame) or any(stream.read(left - 8)):
                yield "U503", f"{left} bytes that are no proper extension"
            return
        yield "U503", f"code {kind}{_kind(kind)}, {size} bytes"
        stream.read(size - 8)
        left -= size


def _kind(code: int) -> str:
    return f" ({_EXTENSION_KINDS[code]})" if code in _EXTENSION_KINDS else ""


def _json_sidecar(path: Path) -> list[Found]:
    try:
        if path.stat().st_size > _MAX_SIDECAR_BYTES:
            return [("U505", "a large .json file")]
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return [("U505", "a .json file that cannot be read")]
    keys = sorted(_personal_keys(content))
    # The names are those of our own list, never the file's.
    return [("U504", f".json with {', '.join(keys)}")] if keys else []


def _personal_keys(content: Any) -> set[str]:
    keys, waiting = set(), [content]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            keys |= {_BY_LOWER[k.lower()] for k in item if k.lower() in _BY_LOWER}
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
    return keys
