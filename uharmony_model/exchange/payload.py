"""The wire form of everything that crosses between site and server.

    magic           8 bytes
    header length   u32, little-endian, at most 1 MiB
    seal           32 bytes, SHA-256 of magic, length, header and the SHA-256 of the body
    header          canonical JSON of the manifest, then spaces up to a multiple of 64
    body            the flat buffer under the codec; may be empty

Nothing is unpickled. Whatever the sender declares is compared with what the receiver expects
before anything of that size is allocated. The body is hashed once: what comes out is in the seal,
and under fp32 it is the digest of the weights themselves.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeInt, ValidationError, model_validator
from torch import Tensor

from uharmony_model.errors import PayloadError
from uharmony_model.exchange.canonical import (
    Digest,
    OptionalDigest,
    canonical_json,
    explain,
    parse_canonical,
)
from uharmony_model.exchange.codec import Buffer, CodecName, digest, pack, quantize, unpack
from uharmony_model.exchange.schema import Schema
from uharmony_model.frozen import Frozen
from uharmony_model.training_settings import CANDIDATES

__all__ = [
    "Buffer",
    "CodecName",
    "Kind",
    "Manifest",
    "Opened",
    "Value",
    "decode",
    "decode_body",
    "digest",
    "encode",
    "max_payload_bytes",
    "open_payload",
    "quantize",
    "read_manifest",
]

MAGIC = b"\x89UHARM1\n"  # a first byte that is no text; a newline that text transfers would change
MAX_HEADER_BYTES = 1 << 20
_PREFIX = struct.Struct("<8sI32s")
_DIGEST_AT = _PREFIX.size - 32
_ALIGN = 64  # numbers in the body lie aligned in memory and can be used where they are
_CODEC_SLACK = 1024  # a compressed body may exceed 2 bytes a number by a little, never 4

# The only texts: a weight that is not told, a count below a site's threshold, and what a site kept
# at its finale.
_TEXTS = rf"^(equal|<[1-9][0-9]{{0,3}}|{'|'.join(CANDIDATES)})$"
Value = (
    Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
    | Annotated[float, Field(strict=True)]
    | Annotated[str, Field(strict=True, pattern=_TEXTS)]
    | None
)


class Kind(StrEnum):
    """What a payload is for."""

    UPDATE = "update"  # site to server: float32 delta, local - base
    MODEL = "model"  # server to site: the shared weights
    METRICS = "metrics"
    STATISTICS = "statistics"
    EXPERT = "expert"  # site to server: the residuals of its domains, by opt-in
    PROTOTYPE = "prototype"  # site to server: its domains' mean descriptors with noise, by opt-in


class Manifest(Frozen):
    """What a payload says about itself.

    `base` is the digest of the global weights it was made from, empty if there are none; `site`
    is empty when the server speaks.
    """

    format: Literal[1] = 1
    kind: Kind
    study: Digest
    round: Annotated[NonNegativeInt, Field(lt=2**31)]
    site: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]{0,63})?$")]
    base: OptionalDigest = ""
    codec: CodecName
    schema_digest: OptionalDigest
    numel: NonNegativeInt
    body_bytes: NonNegativeInt
    values: dict[Annotated[str, Field(pattern=r"^[ -~]{1,200}$")], Value] = Field(
        default_factory=dict
    )

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if not self.schema_digest and self.numel:
            raise ValueError("numbers without a schema")
        if (not self.numel or self.codec == "fp32") and self.body_bytes != 4 * self.numel:
            raise ValueError("body_bytes does not fit numel")
        return self


def max_payload_bytes(schema: Schema | None) -> int:
    """The longest payload that can be honest for a schema, whatever its codec."""
    return _PREFIX.size + MAX_HEADER_BYTES + (4 * schema.numel + _CODEC_SLACK if schema else 0)


def encode(
    *,
    kind: Kind,
    study: str,
    round: int,
    site: str,
    flat: Tensor | None = None,
    schema: Schema | None = None,
    base: str = "",
    codec: CodecName = "fp32",
    values: Mapping[str, Value] | None = None,
    body_digest: str = "",
) -> bytes:
    """The payload of a flat buffer `(n,)` of a schema, or of values alone.

    `body_digest` is for a caller who has hashed these weights already: `digest(flat)`, under fp32.

    Raises:
        PayloadError: the buffer is not of the schema, a value is neither a finite number nor
            one of the texts, or the header grows too long.
    """
    numel = 0 if flat is None else flat.numel()
    if (flat is None) != (schema is None) or (schema is not None and schema.numel != numel):
        wanted = "none" if schema is None else str(schema.numel)
        raise PayloadError(f"{kind}: {numel} numbers given, the schema wants {wanted}")
    body: memoryview | bytes = b"" if flat is None else pack(flat, codec)
    try:
        manifest = Manifest(
            kind=kind,
            study=study,
            round=round,
            site=site,
            base=base,
            codec=codec,
            schema_digest="" if schema is None else schema.digest,
            numel=numel,
            body_bytes=len(body),
            values=dict(values or {}),
        )
    except ValidationError as error:
        raise PayloadError(f"{kind}: not sent: {explain(error)}") from None
    header = canonical_json(manifest).encode()
    header = header.ljust(_padded(len(header)))
    if len(header) > MAX_HEADER_BYTES:
        raise PayloadError(f"{kind}: header of {len(header)} bytes, at most {MAX_HEADER_BYTES}")
    start = _PREFIX.pack(MAGIC, len(header), b"")[:_DIGEST_AT]
    if not body_digest or codec != "fp32":
        body_digest = hashlib.sha256(body).hexdigest()
    return b"".join((start, _seal(start, header, body_digest), header, body))


class Opened(NamedTuple):
    """A payload that is whole: `body` is a view of it, `digest` the SHA-256 of the body."""

    manifest: Manifest
    body: memoryview
    digest: str


def open_payload(buffer: Buffer, *, max_bytes: int) -> Opened:
    """Check a payload as a whole.

    Raises:
        PayloadError: a byte is damaged, missing or too many, or the manifest is not allowed.
    """
    view = memoryview(buffer).cast("B").toreadonly()
    if view.nbytes > max_bytes:
        raise PayloadError(f"payload of {view.nbytes} bytes, at most {max_bytes} are expected")
    if view.nbytes < _PREFIX.size:
        raise PayloadError(f"payload of {view.nbytes} bytes is shorter than its own prefix")
    magic, length, expected = _PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise PayloadError("payload does not begin like one; other software or other version")
    if length > min(MAX_HEADER_BYTES, view.nbytes - _PREFIX.size):
        raise PayloadError(f"payload declares a header of {length} bytes; refused")
    header, body = view[_PREFIX.size :][:length], view[_PREFIX.size + length :]
    body_digest = hashlib.sha256(body).hexdigest()
    if _seal(view[:_DIGEST_AT], header, body_digest) != expected:
        raise PayloadError("payload is damaged: its SHA-256 differs; send it again")
    text = bytes(header).rstrip(b" ")
    manifest = parse_canonical(Manifest, text, what="manifest", max_bytes=MAX_HEADER_BYTES)
    if length != _padded(len(text)) or body.nbytes != manifest.body_bytes:
        raise PayloadError(
            f"payload has {body.nbytes} bytes of body, its manifest declares {manifest.body_bytes}"
        )
    return Opened(manifest, body, body_digest)


def _seal(start: Buffer, header: Buffer, body_digest: str) -> bytes:
    check = hashlib.sha256(start)
    check.update(header)
    check.update(bytes.fromhex(body_digest))
    return check.digest()


def read_manifest(buffer: Buffer, *, max_bytes: int) -> Manifest:
    """The manifest of a payload that was checked as a whole, body included.

    Raises:
        PayloadError: as `open_payload`.
    """
    return open_payload(buffer, max_bytes=max_bytes).manifest


def decode_body(manifest: Manifest, body: memoryview, schema: Schema | None) -> Tensor:
    """The flat float32 buffer `(n,)` of an opened payload; read-only where it is a view.

    Raises:
        PayloadError: the payload was made for another schema, or its body is damaged.
    """
    expected = "" if schema is None else schema.digest
    numel = 0 if schema is None else schema.numel
    if manifest.schema_digest != expected or manifest.numel != numel:
        raise PayloadError(
            f"payload has schema {manifest.schema_digest[:12] or 'none'} with {manifest.numel} "
            f"numbers, expected {expected[:12] or 'none'} with {numel}; is it the same study?"
        )
    return unpack(body, numel, manifest.codec) if numel else torch.empty(0)


def decode(
    buffer: Buffer, *, kind: Kind, schema: Schema | None, max_bytes: int | None = None
) -> tuple[Manifest, Tensor]:
    """Check a payload and give its manifest and flat float32 buffer `(n,)`.

    Under fp32 the buffer is a view of the payload: read it, do not write to it.

    Raises:
        PayloadError: as `open_payload`, or the payload is of another kind or schema.
    """
    bound = max_payload_bytes(schema) if max_bytes is None else max_bytes
    manifest, body, _ = open_payload(buffer, max_bytes=bound)
    if manifest.kind != kind:
        raise PayloadError(f"payload is of kind {manifest.kind}, expected {kind}")
    return manifest, decode_body(manifest, body, schema)


def _padded(length: int) -> int:
    return -(-(_PREFIX.size + length) // _ALIGN) * _ALIGN - _PREFIX.size
