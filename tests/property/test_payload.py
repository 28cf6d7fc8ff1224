"""Whatever is sent comes back, and no damage passes as anything but our error."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support import wire
from uharmony_model.errors import PayloadError
from uharmony_model.exchange.codec import CodecName, digest, quantize
from uharmony_model.exchange.payload import (
    Kind,
    decode,
    encode,
    max_payload_bytes,
    read_manifest,
)
from uharmony_model.exchange.schema import Schema, TensorSpec, flatten, unflatten

CODECS: st.SearchStrategy[CodecName] = st.sampled_from(["fp32", "bf16"])
NUMBERS = st.lists(st.floats(width=32, allow_nan=False), max_size=60)
NAMES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=20)
VALUES = st.dictionaries(
    NAMES,
    st.none() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False),
    max_size=5,
)


def schema_of(count: int) -> Schema:
    return Schema(tensors=(TensorSpec(name="w", shape=(count,)),))


def sent(numbers: list[float], codec: CodecName, values=None) -> bytes:
    return encode(
        kind=Kind.UPDATE,
        study=wire.STUDY,
        round=1,
        site="site-a",
        base=wire.BASE,
        codec=codec,
        schema=schema_of(len(numbers)),
        flat=torch.tensor(numbers, dtype=torch.float32),
        values=values or {"cases": 1},
    )


def words(flat: torch.Tensor) -> bytes:
    return flat.contiguous().view(torch.uint8).numpy().tobytes()


@given(NUMBERS, CODECS, VALUES)
def test_decode_inverts_encode_up_to_the_codec(numbers, codec, values):
    buffer = sent(numbers, codec, values)
    schema = schema_of(len(numbers))
    manifest, flat = decode(buffer, kind=Kind.UPDATE, schema=schema)
    assert words(flat) == words(quantize(torch.tensor(numbers, dtype=torch.float32), codec))
    assert manifest.values == values or values == {}
    assert [type(v) for _, v in sorted(manifest.values.items())] == [
        type(v) for _, v in sorted((values or {"cases": 1}).items())
    ]
    assert read_manifest(buffer, max_bytes=len(buffer)) == manifest
    assert len(buffer) <= max_payload_bytes(schema)
    if codec == "fp32":
        assert words(flat) == struct.pack(f"<{len(numbers)}f", *numbers)


@given(NUMBERS, CODECS, st.data())
def test_a_corrupted_byte_is_found(numbers, codec, data):
    buffer = bytearray(sent(numbers, codec))
    buffer[data.draw(st.integers(0, len(buffer) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(PayloadError):
        decode(buffer, kind=Kind.UPDATE, schema=schema_of(len(numbers)))


@given(NUMBERS, CODECS, st.binary(max_size=70), st.data())
def test_another_end_is_found(numbers, codec, extra, data):
    buffer = sent(numbers, codec)
    cut = buffer[: data.draw(st.integers(0, len(buffer)))] + extra
    if cut == buffer:
        return
    with pytest.raises(PayloadError):
        decode(cut, kind=Kind.UPDATE, schema=schema_of(len(numbers)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
FIELDS = st.sampled_from([*wire.manifest(0, ""), "another"])


@given(st.dictionaries(FIELDS, JSON, min_size=1, max_size=3))
@example({"numel": 2**40, "body_bytes": 2**42})
def test_any_manifest_with_a_correct_digest_is_read_exactly_or_refused(changes):
    schema = schema_of(2)
    content = wire.manifest(2, schema.digest) | changes
    header = wire.canonical(content)
    try:
        manifest, flat = decode(
            wire.seal(wire.pad(header), struct.pack("<2f", 1, 2)), kind=Kind.UPDATE, schema=schema
        )
    except PayloadError:
        return
    assert wire.canonical(manifest.model_dump(mode="json")) == header
    assert flat.tolist() == [1, 2]


@given(st.binary(max_size=300), st.binary(max_size=100))
def test_any_bytes_with_a_correct_digest_are_refused(header, body):
    for buffer in (header, wire.seal(header, body), wire.seal(wire.pad(header), body)):
        with pytest.raises(PayloadError):
            decode(buffer, kind=Kind.UPDATE, schema=schema_of(len(body) // 4))


@given(st.binary(max_size=200), st.integers(1, 60))
def test_any_compressed_body_is_read_exactly_or_refused(body, count):
    schema = schema_of(count)
    header = wire.canonical(wire.manifest(count, schema.digest, codec="bf16", body_bytes=len(body)))
    with pytest.raises(PayloadError):
        decode(wire.seal(wire.pad(header), body), kind=Kind.UPDATE, schema=schema)


SHAPES = st.dictionaries(NAMES, st.lists(st.integers(0, 4), max_size=3).map(tuple), max_size=6)


@given(SHAPES, st.integers(0, 2**32))
def test_unflatten_inverts_flatten(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    schema = Schema.of(state)
    flat = flatten(state, schema)
    back = unflatten(flat, schema)
    assert list(back) == sorted(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert digest(flatten(back, schema)) == digest(flat)
