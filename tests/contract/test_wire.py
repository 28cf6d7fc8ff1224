"""The bytes on the wire, built here a second time from struct, json and hashlib alone.

`tests/golden/update_payload.txt` holds the same bytes in hex. A change of either is a change of
the exchange format: raise the manifest's `format` and say so in the changelog.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import torch
import zstandard

from uharmony_model.exchange.instruction import Instruction
from uharmony_model.exchange.payload import CodecName, Kind, decode, digest, encode
from uharmony_model.exchange.schema import Schema, flatten

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "update_payload.txt"

STATE = {
    "network.conv.weight": torch.tensor([[1.0, -2.0], [0.5, 0.15625]]),
    "network.conv.bias": torch.tensor([3.0]),
}
NUMBERS = [3.0, 1.0, -2.0, 0.5, 0.15625]  # by name: bias before weight
STUDY, BASE = "a1" * 32, "b2" * 32
SCHEMA_TEXT = (
    '{"tensors":[{"name":"network.conv.bias","shape":[1]},'
    '{"name":"network.conv.weight","shape":[2,2]}]}'
)


def expected_payload(codec: str, body: bytes) -> bytes:
    fields = {
        "base": BASE,
        "body_bytes": len(body),
        "codec": codec,
        "format": 1,
        "kind": "update",
        "numel": 5,
        "round": 7,
        "schema_digest": hashlib.sha256(SCHEMA_TEXT.encode()).hexdigest(),
        "site": "site-a",
        "study": STUDY,
        "values": {"cases": 12, "loss": 0.25, "note": None},
    }
    header = json.dumps(fields, separators=(",", ":")).encode("ascii")
    header += b" " * (-(44 + len(header)) % 64)
    start = b"\x89UHARM1\n" + struct.pack("<I", len(header))
    check = hashlib.sha256(start + header + hashlib.sha256(body).digest()).digest()
    return start + check + header + body


def sent(codec: CodecName) -> bytes:
    schema = Schema.of(STATE)
    return encode(
        kind=Kind.UPDATE,
        study=STUDY,
        round=7,
        site="site-a",
        base=BASE,
        codec=codec,
        schema=schema,
        flat=flatten(STATE, schema),
        values={"loss": 0.25, "cases": 12, "note": None},
    )


def test_an_fp32_update_has_exactly_these_bytes():
    assert sent("fp32") == expected_payload("fp32", struct.pack("<5f", *NUMBERS))


def test_they_are_those_of_the_golden_file():
    golden = bytes.fromhex(GOLDEN.read_text())
    assert golden == expected_payload("fp32", struct.pack("<5f", *NUMBERS))
    manifest, flat = decode(golden, kind=Kind.UPDATE, schema=Schema.of(STATE))
    assert flat.tolist() == NUMBERS
    assert (manifest.round, manifest.values["cases"]) == (7, 12)


def test_a_bf16_update_has_these_bytes_up_to_the_compressor():
    # The upper two bytes of each float32; all numbers here are exact in bfloat16.
    halves = [struct.pack("<f", number)[2:] for number in NUMBERS]
    planes = bytes(half[0] for half in halves) + bytes(half[1] for half in halves)
    buffer = sent("bf16")
    header_length = struct.unpack("<I", buffer[8:12])[0]
    body = buffer[44 + header_length :]
    assert zstandard.ZstdDecompressor().decompress(body) == planes
    assert buffer == expected_payload("bf16", body)


def test_the_schema_and_the_weights_have_these_digests():
    schema = Schema.of(STATE)
    assert schema.digest == hashlib.sha256(SCHEMA_TEXT.encode()).hexdigest()
    raw = struct.pack("<5f", *NUMBERS)
    assert digest(flatten(STATE, schema)) == hashlib.sha256(raw).hexdigest()


def test_an_instruction_has_this_text():
    fields = {
        "action": "evaluate",
        "base": BASE,
        "final": True,
        "receipt": None,
        "round": 7,
        "splits": ["validation", "test"],
        "study": STUDY,
    }
    instruction = Instruction(
        action="evaluate",
        study=STUDY,
        round=7,
        base=BASE,
        final=True,
        splits=("validation", "test"),
    )
    assert instruction.to_json() == json.dumps(fields, separators=(",", ":"))
