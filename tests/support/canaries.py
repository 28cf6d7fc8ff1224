"""Secrets to look for in bytes: every form in which they might have left, and the search."""

from __future__ import annotations

import base64
import gzip
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import zstandard

PREFIX = 8  # bytes by which candidates are found; no pattern is shorter
_MAX_INFLATED = 32 << 20
_ALIGNED = {0: 0, 1: 2, 2: 3}  # base64 characters that hold bits of the bytes before


def forms(secret: bytes) -> dict[str, bytes]:
    """The encodings of one secret, by name."""
    numbers = np.frombuffer(secret, "u1").astype("<f4")
    shorts = np.frombuffer(secret[: len(secret) // 2 * 2], "<i2").astype("<f4")
    found = {
        "raw": secret,
        "reversed": secret[::-1],
        "hex": secret.hex().encode(),
        "HEX": secret.hex().upper().encode(),
        "float32 of bytes": numbers.tobytes(),
        "float32 of bytes, 0 to 1": (numbers / np.float32(255)).tobytes(),
        "bfloat16 of bytes": brain(numbers),
        "float32 of int16": shorts.tobytes(),
        "bfloat16 of int16": brain(shorts),
        "utf-16": b"".join(bytes((b, 0)) for b in secret),
    }
    if secret.isalnum():
        found |= {"upper": secret.upper(), "lower": secret.lower()}
    for shift, skip in _ALIGNED.items():
        full = (shift + len(secret)) * 8 // 6
        for name, encode in (
            ("base64", base64.b64encode),
            ("base64url", base64.urlsafe_b64encode),
        ):
            found[f"{name} +{shift}"] = encode(bytes(shift) + secret)[skip:full]
    return found


def brain(numbers: np.ndarray) -> bytes:
    """The upper halves of float32 numbers, rounded to nearest even, as bfloat16 is."""
    bits = np.ascontiguousarray(numbers, "<f4").view("<u4").astype(np.uint64)
    half = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return half.astype("<u2").tobytes()


def windows(numbers: np.ndarray, size: int = 4) -> Iterator[np.ndarray]:
    """Rows of numbers that are telling: all different, none 0 or of size 1."""
    flat = np.ascontiguousarray(numbers, "<f4").reshape(-1)
    for start in range(0, flat.size - size + 1, size):
        part = flat[start : start + size]
        if len(set(part.tolist())) == size and not np.isin(np.abs(part), (0.0, 1.0)).any():
            yield part


def number_forms(part: np.ndarray) -> dict[str, bytes]:
    """The encodings of four float32 numbers."""
    raw = np.ascontiguousarray(part, "<f4").tobytes()
    rounded = b"".join(b"\0\0" + brain(part)[i : i + 2] for i in range(0, 2 * part.size, 2))
    found = {
        "float32": raw,
        "float32, big-endian": np.ascontiguousarray(part, ">f4").tobytes(),
        "float32 of bfloat16": rounded,
        "bfloat16": brain(part),
        "float64": np.asarray(part, "<f8").tobytes(),
        "hex": raw.hex().encode(),
    }
    for shift, skip in _ALIGNED.items():
        full = (shift + len(raw)) * 8 // 6
        found[f"base64 +{shift}"] = base64.b64encode(bytes(shift) + raw)[skip:full]
    return found


def streams(data: bytes, depth: int = 2) -> Iterator[bytes]:
    """The bytes, and all that can be decompressed from any place in them."""
    yield data
    if depth == 0:
        return
    for start in _starts(data):
        inner = _inflate(data[start:])
        if len(inner) >= PREFIX:
            yield from streams(inner, depth - 1)


class Search:
    """Looks for many patterns at once; `labels` maps each to the word that a hit gives."""

    def __init__(self, labels: Mapping[bytes, str]) -> None:
        self._labels = labels
        self._groups: dict[int, list[bytes]] = {}
        for pattern, label in labels.items():
            if len(pattern) < PREFIX:
                raise ValueError(f"{label}: {len(pattern)} bytes are too few to look for")
            first = struct.unpack("<Q", pattern[:PREFIX])[0]
            self._groups.setdefault(first, []).append(pattern)
        self._prefixes = np.array(sorted(self._groups), "<u8")

    def here(self, data: bytes) -> set[str]:
        """The labels of the patterns that stand anywhere in these bytes."""
        array, found = np.frombuffer(data, "u1"), set()
        for shift in range(PREFIX):
            size = (array.size - shift) // PREFIX * PREFIX
            if size <= 0 or not self._groups:
                break
            view = array[shift : shift + size].view("<u8")
            place = np.searchsorted(self._prefixes, view)
            place = np.minimum(place, self._prefixes.size - 1)
            for hit in np.flatnonzero(self._prefixes[place] == view):
                start = shift + int(hit) * PREFIX
                for pattern in self._groups[int(view[hit])]:
                    if data[start : start + len(pattern)] == pattern:
                        found.add(self._labels[pattern])
        return found

    def within(self, pieces: Iterable[bytes]) -> set[str]:
        """The labels found in any of the pieces, and in whatever in them can be decompressed."""
        found: set[str] = set()
        for piece in pieces:
            for stream in streams(piece):
                found |= self.here(stream)
        return found


def _starts(data: bytes) -> list[int]:
    array = np.frombuffer(data, "u1")
    if array.size < 4:
        return []
    first, second = array[:-1], array[1:]
    zlib_head = (first == 0x78) & ((first.astype("u2") * 256 + second) % 31 == 0)
    gzip_head = (first == 0x1F) & (second == 0x8B)
    zstd_head = (first == 0x28) & (second == 0xB5)
    found = np.flatnonzero(zlib_head | gzip_head | zstd_head)
    return [int(start) for start in found]


def _inflate(data: bytes) -> bytes:
    try:
        if data[:2] == b"\x1f\x8b":
            return zlib.decompressobj(wbits=31).decompress(data, _MAX_INFLATED)
        if data[:1] == b"\x28":
            return zstandard.ZstdDecompressor().decompressobj().decompress(data[:_MAX_INFLATED])
        return zlib.decompressobj().decompress(data, _MAX_INFLATED)
    except (zlib.error, zstandard.ZstdError):
        return b""


def compressed(data: bytes) -> dict[str, bytes]:
    """The bytes in each compression that the search undoes."""
    return {
        "zlib": zlib.compress(data),
        "gzip": gzip.compress(data),
        "zstd": zstandard.ZstdCompressor().compress(data),
        "zstd in zlib": zlib.compress(zstandard.ZstdCompressor().compress(data)),
    }
