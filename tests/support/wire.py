"""The wire form written down a second time, slowly, with nothing but the standard library.

Tests build payloads here, honest ones and hostile ones with a correct digest.
"""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

MAGIC = b"\x89UHARM1\n"
PREFIX = 8 + 4 + 32
STUDY = hashlib.sha256(b"study").hexdigest()
BASE = hashlib.sha256(b"base").hexdigest()


def canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")


def seal(header: bytes, body: bytes, *, magic: bytes = MAGIC, length: int | None = None) -> bytes:
    """A payload of any header and body whose digest is correct."""
    start = magic + struct.pack("<I", len(header) if length is None else length)
    return (
        start
        + hashlib.sha256(start + header + hashlib.sha256(body).digest()).digest()
        + header
        + body
    )


def resealed(payload: bytes) -> bytes:
    """The same payload with the seal that its bytes ask for."""
    (length,) = struct.unpack("<I", payload[8:12])
    header, body = payload[PREFIX:][:length], payload[PREFIX + length :]
    return seal(header, body, magic=payload[:8], length=length)


def pad(header: bytes) -> bytes:
    while (PREFIX + len(header)) % 64:
        header += b" "
    return header


def schema_digest(tensors: list[tuple[str, list[int]]]) -> str:
    content = {"tensors": [{"name": name, "shape": shape} for name, shape in tensors]}
    return hashlib.sha256(canonical(content)).hexdigest()


def manifest(numbers: int, digest: str, **changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = {
        "format": 1,
        "kind": "update",
        "study": STUDY,
        "round": 3,
        "site": "site-a",
        "base": BASE,
        "codec": "fp32",
        "schema_digest": digest,
        "numel": numbers,
        "body_bytes": 4 * numbers,
        "values": {"cases": 12},
    }
    return content | changes


def payload(numbers: list[float], digest: str, **changes: Any) -> bytes:
    """An fp32 payload; `changes` replace fields of the manifest, the digest stays correct."""
    body = struct.pack(f"<{len(numbers)}f", *numbers)
    header = canonical(manifest(len(numbers), digest, **changes))
    return seal(pad(header), body)
