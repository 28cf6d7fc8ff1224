"""What an honest payload is, and every way in which one can be dishonest."""

from __future__ import annotations

import json
import struct
import tracemalloc
from typing import Any

import pytest
import torch
import zstandard

from tests.support import wire
from uharmony_model.errors import PayloadError
from uharmony_model.exchange.payload import (
    MAX_HEADER_BYTES,
    Kind,
    Value,
    decode,
    encode,
    max_payload_bytes,
    open_payload,
    read_manifest,
)
from uharmony_model.exchange.schema import Schema

SCHEMA = Schema.of({"w": torch.zeros(2, 2), "b": torch.zeros(1)})
DIGEST = wire.schema_digest([("b", [1]), ("w", [2, 2])])
NUMBERS = [1.0, -2.0, 0.5, 4.0, 8.0]


def made(**changes):
    fields: dict[str, Any] = {
        "kind": Kind.UPDATE,
        "study": wire.STUDY,
        "round": 3,
        "site": "site-a",
        "base": wire.BASE,
        "codec": "fp32",
        "schema": SCHEMA,
        "flat": torch.tensor(NUMBERS),
        "values": {"cases": 12},
    }
    return encode(**(fields | changes))


def read(buffer):
    return decode(buffer, kind=Kind.UPDATE, schema=SCHEMA)


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_a_payload_comes_back(codec):
    manifest, flat = read(made(codec=codec))
    assert flat.tolist() == NUMBERS  # all of them are exact in bfloat16
    assert flat.dtype == torch.float32
    assert (manifest.kind, manifest.study, manifest.base) == (Kind.UPDATE, wire.STUDY, wire.BASE)
    assert (manifest.round, manifest.site, manifest.codec) == (3, "site-a", codec)
    assert manifest.values == {"cases": 12}
    assert read_manifest(made(codec=codec), max_bytes=10_000) == manifest


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_kind_of_buffer_is_read(kind):
    assert read(kind(made()))[1].tolist() == NUMBERS


def test_values_alone_travel_without_a_body():
    values: dict[str, Value] = {
        "dice/tumor": 0.25,
        "hd95_mm/tumor": None,
        "cases": 3,
        "whole": 2.0,
    }
    values |= {"weight": "equal", "few": "<11", "fewer": "<1", "many": "<9999"}
    sent = made(kind=Kind.METRICS, flat=None, schema=None, values=values)
    manifest, flat = decode(sent, kind=Kind.METRICS, schema=None)
    assert flat.shape == (0,)
    assert manifest.values == values
    assert type(manifest.values["cases"]) is int
    assert type(manifest.values["whole"]) is float


def test_an_empty_schema_travels():
    nothing = Schema.of({})
    sent = made(flat=torch.empty(0), schema=nothing)
    assert decode(sent, kind=Kind.UPDATE, schema=nothing)[1].shape == (0,)
    with pytest.raises(PayloadError, match="expected none"):
        decode(sent, kind=Kind.UPDATE, schema=None)


def test_the_body_lies_aligned_in_the_payload():
    for name in ("a", "ab", "abc", "a" * 60):
        sent = made(site=name)
        assert (len(sent) - 4 * len(NUMBERS)) % 64 == 0


def test_fp32_is_not_copied():
    sent = bytearray(made())
    _, flat = read(sent)
    sent[-4:] = struct.pack("<f", -1)
    assert flat[-1] == -1


def test_encode_takes_a_flat_that_requires_grad_or_is_strided():
    flat = torch.tensor([NUMBERS, NUMBERS]).t()[:, 0].requires_grad_()
    assert made(flat=flat) == made()


@pytest.mark.parametrize(
    "changes",
    [
        {"flat": torch.zeros(4)},
        {"flat": None},
        {"schema": None},
        {"flat": torch.zeros(5, 1)},
        {"values": {"loss": float("nan")}},
        {"values": {"loss": float("inf")}},
        {"values": {"cases": True}},
        {"values": {"cases": "3"}},
        {"values": {"cases": "Equal"}},
        {"values": {"cases": "equal\n"}},
        {"values": {"n": "<"}},
        {"values": {"n": "<0"}},
        {"values": {"n": "<011"}},
        {"values": {"n": "<12345"}},
        {"values": {"n": "<11 "}},
        {"values": {"a\nb": 1}},
        {"site": "../etc"},
        {"site": "a\n"},
        {"study": "x"},
        {"base": "0" * 63},
        {"round": -1},
        {"codec": "fp16"},
        {"values": {f"{i:0200}": i for i in range(6000)}},
    ],
)
def test_nothing_is_sent_that_would_be_refused(changes):
    with pytest.raises(PayloadError) as caught:
        made(**changes)
    assert "\n" not in str(caught.value)


def test_kind_schema_and_size_must_be_the_expected_ones():
    with pytest.raises(PayloadError, match="kind update, expected model"):
        decode(made(), kind=Kind.MODEL, schema=SCHEMA)
    other = Schema.of({"w": torch.zeros(2, 2), "c": torch.zeros(1)})
    with pytest.raises(PayloadError, match="same study"):
        decode(made(), kind=Kind.UPDATE, schema=other)
    with pytest.raises(PayloadError, match="at most 10"):
        decode(made(), kind=Kind.UPDATE, schema=SCHEMA, max_bytes=10)


def test_the_default_bound_follows_from_the_schema():
    assert max_payload_bytes(None) == 44 + MAX_HEADER_BYTES
    incompressible = torch.randn(70_000, generator=torch.Generator().manual_seed(0))
    schema = Schema.of({"w": incompressible})
    for codec in ("fp32", "bf16"):
        sent = made(flat=incompressible, schema=schema, codec=codec)
        assert len(sent) < max_payload_bytes(schema) < 4 * 70_000 + MAX_HEADER_BYTES + 2000
        decode(sent, kind=Kind.UPDATE, schema=schema)


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_every_single_corrupted_byte_is_found(codec):
    sent = made(codec=codec)
    for position in range(len(sent)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(sent)
            damaged[position] ^= flip
            with pytest.raises(PayloadError):
                read(damaged)


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_every_truncation_and_every_appended_byte_is_found(codec):
    sent = made(codec=codec)
    for length in range(len(sent)):
        with pytest.raises(PayloadError):
            read(sent[:length])
    for extra in (b"\0", b" ", b"\xff", sent):
        with pytest.raises(PayloadError):
            read(sent + extra)


def test_the_reference_payload_is_accepted():
    assert read(wire.payload(NUMBERS, DIGEST))[1].tolist() == NUMBERS


def header(text: str | bytes) -> bytes:
    return wire.pad(text.encode() if isinstance(text, str) else text)


def body(numbers: int = 5) -> bytes:
    return struct.pack(f"<{numbers}f", *range(numbers))


def text(**changes) -> str:
    return wire.canonical(wire.manifest(5, DIGEST, **changes)).decode()


FRAME = zstandard.ZstdCompressor().compress
BOMB = FRAME(bytes(1 << 26))  # 64 MiB of zeros in a few KiB

HOSTILE = {
    "numel 2**40": wire.payload(NUMBERS, DIGEST, numel=2**40),
    "numel and body 2**40": wire.payload(NUMBERS, DIGEST, numel=2**40, body_bytes=2**42),
    "numel 2**70": wire.payload(NUMBERS, DIGEST, numel=2**70, body_bytes=2**72),
    "body_bytes huge": wire.payload(NUMBERS, DIGEST, body_bytes=2**62),
    "numel negative": wire.payload(NUMBERS, DIGEST, numel=-5, body_bytes=-20),
    "numel broadcast": wire.payload([1.0], DIGEST),
    "numel of another body": wire.seal(header(text()), body(4)),
    "body longer than declared": wire.seal(header(text()), body(6)),
    "numbers without a schema": wire.payload(NUMBERS, ""),
    "another schema": wire.payload(NUMBERS, "0" * 64),
    "zstd bomb": wire.seal(header(text(codec="bf16", body_bytes=len(BOMB))), BOMB),
    "zstd of twice the numbers": wire.seal(
        header(text(codec="bf16", body_bytes=len(FRAME(bytes(20))))), FRAME(bytes(20))
    ),
    "bf16 with another numel": wire.seal(
        header(text(codec="bf16", numel=6, body_bytes=len(FRAME(bytes(10))))), FRAME(bytes(10))
    ),
    "bf16 that is raw": wire.seal(header(text(codec="bf16", body_bytes=20)), body()),
    "unknown codec": wire.payload(NUMBERS, DIGEST, codec="float64"),
    "codec pickle": wire.payload(NUMBERS, DIGEST, codec="pickle"),
    "unknown kind": wire.payload(NUMBERS, DIGEST, kind="code"),
    "unknown format": wire.payload(NUMBERS, DIGEST, format=2),
    "unknown field": wire.payload(NUMBERS, DIGEST, path="/etc/passwd"),
    "hostile field name": wire.payload(NUMBERS, DIGEST, **{"a\x1b[31m\n": 1}),
    "round negative": wire.payload(NUMBERS, DIGEST, round=-1),
    "round as text": wire.payload(NUMBERS, DIGEST, round="3"),
    "round as true": wire.payload(NUMBERS, DIGEST, round=True),
    "round as 3.0": wire.payload(NUMBERS, DIGEST, round=3.0),
    "site with a path": wire.payload(NUMBERS, DIGEST, site="../../etc"),
    "site with NUL": wire.payload(NUMBERS, DIGEST, site="a\0"),
    "site with a line": wire.payload(NUMBERS, DIGEST, site="a\n"),
    "site of 4 KB": wire.payload(NUMBERS, DIGEST, site="a" * 4096),
    "values a list": wire.payload(NUMBERS, DIGEST, values=[]),
    "values nested": wire.payload(NUMBERS, DIGEST, values={"cases": {"cases": 1}}),
    "value text": wire.payload(NUMBERS, DIGEST, values={"cases": "12"}),
    "value true": wire.payload(NUMBERS, DIGEST, values={"cases": True}),
    "value name with a line": wire.payload(NUMBERS, DIGEST, values={"a\nb": 1}),
    "no manifest": wire.seal(b"", body()),
    "a list for a manifest": wire.seal(header("[]"), body()),
    "not JSON": wire.seal(header("import os"), body()),
    "not UTF-8": wire.seal(header(b'{"site":"\xff\xfe"}'), body()),
    "a lone surrogate": wire.payload(NUMBERS, DIGEST, site="\ud800"),
    "UTF-16": wire.seal(header(text().encode("utf-16")), body()),
    "byte order mark": wire.seal(header(b"\xef\xbb\xbf" + text().encode()), body()),
    "NaN": wire.seal(header(text().replace("12", "NaN")), body()),
    "Infinity": wire.seal(header(text().replace("12", "Infinity")), body()),
    "1e999": wire.seal(header(text().replace("12", "1e999")), body()),
    "an integer of 100 000 digits": wire.seal(header(text().replace("12", "9" * 100_000)), body()),
    "duplicate key": wire.seal(header(text().replace('"round":3', '"round":2,"round":3')), body()),
    "keys in another order": wire.seal(
        header(json.dumps(dict(reversed(wire.manifest(5, DIGEST).items())))), body()
    ),
    "spaces": wire.seal(header(json.dumps(wire.manifest(5, DIGEST), sort_keys=True)), body()),
    "escaped letter": wire.seal(header(text().replace("site-a", "\\u0073ite-a")), body()),
    "another form of a number": wire.seal(header(text().replace("12", "12.50")), body()),
    "no padding": wire.seal(text().encode() + b" " * (1 + len(header(text())) % 2), body()),
    "64 spaces too many": wire.seal(header(text()) + b" " * 64, body()),
    "padding of tabs": wire.seal(header(text()).replace(b"  ", b"\t\t"), body()),
    "nested 10 000 deep": wire.seal(header("[" * 10_000 + "]" * 10_000), body()),
    "nested 300 000 deep": wire.seal(header('{"values":' * 100_000), body()),
    "an array of 500 000": wire.seal(header("[" + "0," * 500_000 + "0]"), body()),
    "header length 2**32 - 1": wire.seal(header(text()), body(), length=2**32 - 1),
    "header length beyond the end": wire.seal(header(text()), body(), length=2000),
    "header that swallows the body": wire.resealed(
        wire.seal(header(text()), body(), length=len(header(text())) + 20)
    ),
    "header above the limit": wire.seal(b" " * (MAX_HEADER_BYTES + 20), b""),
    "other magic": wire.seal(header(text()), body(), magic=b"\x89UHARM2\n"),
    "pickle": b"\x80\x04\x95" + made(),
    "zip, as torch.save writes": b"PK\x03\x04" + made(),
    "numpy": b"\x93NUMPY" + made(),
    "nothing": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_payload_is_refused_on_one_line_and_in_little_memory(name):
    bound = 8 * MAX_HEADER_BYTES  # parsing a header costs a few times its length, never more
    with pytest.raises(PayloadError):  # imports and caches of the first call are not its memory
        read(HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError) as caught:
            read(HOSTILE[name])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < bound, f"{peak} bytes"
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 400


def test_the_hostile_ones_have_a_correct_digest():
    # Otherwise the digest would be all that the table above tests.
    exempt = {"pickle", "zip, as torch.save writes", "numpy", "nothing"}
    # A header longer than all there is: refused before anything is hashed.
    exempt |= {name for name in HOSTILE if name.startswith(("header length", "header above"))}
    for name, sent in HOSTILE.items():
        if name not in exempt:
            assert wire.resealed(sent) == sent, name


def test_a_header_above_the_limit_is_not_even_hashed():
    with pytest.raises(PayloadError, match="declares a header of 1048596 bytes"):
        read(HOSTILE["header above the limit"])


def test_a_manifest_alone_is_checked_for_sense():
    with pytest.raises(PayloadError, match="numbers without a schema"):
        read_manifest(HOSTILE["numbers without a schema"], max_bytes=10_000)


def test_the_body_is_read_only():
    view = open_payload(bytearray(made()), max_bytes=10_000).body
    assert view.readonly
