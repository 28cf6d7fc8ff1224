"""What a line of the ledger says, and which bytes its signature covers."""

from __future__ import annotations

import json
from typing import Annotated, Literal, NamedTuple, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import Field, NonNegativeInt, PositiveInt

from uharmony_model.errors import PayloadError
from uharmony_model.exchange.canonical import Digest, OptionalDigest, parse_canonical
from uharmony_model.exchange.payload import Value
from uharmony_model.frozen import Frozen

MAX_LINE = 8 << 20  # about 30 000 tensors

Time = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Signature = Annotated[str, Field(pattern=r"^([0-9a-f]{128})?$")]


class Head(NamedTuple):
    """The number of an entry and the SHA-256 of its line, without the newline."""

    seq: int
    sha256: str


class TensorFact(Frozen):
    """One tensor that left; the SHA-256 is of the float32 values that the receiver decodes."""

    name: Annotated[str, Field(min_length=1)]
    dtype: Literal["float32"] = "float32"
    shape: tuple[NonNegativeInt, ...]
    bytes: NonNegativeInt
    sha256: Digest


class Entry(Frozen):
    """One message that left. `bytes` and `sha256` are of the buffer as sent.

    `text` is a short message in full (a hello, a refusal); weights have `tensors` instead.
    """

    seq: PositiveInt
    time: Time
    study: OptionalDigest
    round: NonNegativeInt
    kind: Annotated[str, Field(pattern=r"^[a-z][a-z_]{0,39}$")]
    to: Annotated[str, Field(max_length=300)]
    bytes: NonNegativeInt
    sha256: Digest
    tensors: tuple[TensorFact, ...] = ()
    values: dict[str, Value] = Field(default_factory=dict)
    text: Annotated[str, Field(max_length=65536)] = ""
    prev: Digest
    key: PublicKey
    signature: Signature = ""


class SignedHead(Frozen):
    """The last entry that was written whole."""

    what: Literal["head"] = "head"
    seq: PositiveInt
    sha256: Digest
    key: PublicKey
    signature: Signature = ""


class Receipt(Frozen):
    """A head that the coordinator has acknowledged, as this site noted it down."""

    what: Literal["receipt"] = "receipt"
    seq: PositiveInt
    sha256: Digest
    when: Time
    key: PublicKey
    signature: Signature = ""


Line = TypeVar("Line", Entry, SignedHead, Receipt)


def signed_text(content: Entry | SignedHead | Receipt) -> bytes:
    """The bytes that are signed: the canonical JSON without the signature."""
    fields = content.model_dump(exclude={"signature"})
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def parse_line(model: type[Line], line: bytes) -> Line | None:
    """A line of the ledger's files, or None where it is not the canonical text of one."""
    try:
        return parse_canonical(model, line, what="line", max_bytes=MAX_LINE)
    except PayloadError:
        return None


def is_signed(content: Entry | SignedHead | Receipt, key: Ed25519PublicKey) -> bool:
    """Whether this key names itself in the content and has signed it."""
    if content.key != key.public_bytes_raw().hex():
        return False
    try:
        key.verify(bytes.fromhex(content.signature), signed_text(content))
    except InvalidSignature:
        return False
    return True
