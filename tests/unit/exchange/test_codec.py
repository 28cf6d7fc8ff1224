from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
import torch
import zstandard

from uharmony_model.errors import PayloadError
from uharmony_model.exchange.codec import digest, pack, quantize, unpack

VALUES = [0.0, -0.0, 1.0, -2.5, 1e-40, 3.0e38, 1 / 3, float("inf"), float("-inf"), 257 / 256]


def bits(flat: torch.Tensor) -> list[int]:
    return flat.view(torch.int32).tolist()


def rounded(value: float) -> int:
    """Bits of a float32 rounded to bfloat16, to nearest, ties to even, written out as integers."""
    word = int.from_bytes(struct.pack("<f", value), "little")
    low = word & 0xFFFF
    high = word >> 16
    if low > 0x8000 or (low == 0x8000 and high & 1):
        high += 1
    return high << 16


def test_fp32_is_the_raw_little_endian_buffer():
    flat = torch.tensor(VALUES)
    body = memoryview(pack(flat, "fp32"))
    assert bytes(body) == struct.pack(f"<{len(VALUES)}f", *VALUES)
    assert bits(unpack(body, len(VALUES), "fp32")) == bits(flat)


def test_fp32_keeps_every_bit_of_a_nan():
    flat = torch.tensor([0x7FC00001, -4194301], dtype=torch.int32).view(torch.float32)
    assert bits(unpack(memoryview(pack(flat, "fp32")), 2, "fp32")) == bits(flat)


def test_fp32_is_decoded_without_a_copy():
    body = bytearray(struct.pack("<2f", 1, 2))
    flat = unpack(memoryview(body), 2, "fp32")
    body[:4] = struct.pack("<f", 5)
    assert flat.tolist() == [5, 2]


def test_bf16_rounds_to_nearest_even_and_says_so_beforehand():
    flat = torch.tensor(VALUES)
    got = unpack(memoryview(pack(flat, "bf16")), len(VALUES), "bf16")
    assert [word & 0xFFFFFFFF for word in bits(got)] == [rounded(value) for value in VALUES]
    assert bits(quantize(flat, "bf16")) == bits(got)


def test_bf16_body_is_the_low_bytes_then_the_high_ones():
    body = pack(torch.tensor([1.0, -2.5, 257 / 256]), "bf16")
    raw = zstandard.ZstdDecompressor().decompress(bytes(body))
    words = [rounded(value) >> 16 for value in (1.0, -2.5, 257 / 256)]
    assert raw == bytes(word & 0xFF for word in words) + bytes(word >> 8 for word in words)


def test_quantize_is_stable_and_fp32_does_nothing():
    flat = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    once = quantize(flat, "bf16")
    assert torch.equal(quantize(once, "bf16"), once)
    assert (once - flat).abs().max() <= flat.abs().max() * 2**-8
    assert quantize(flat, "fp32") is flat


def test_digest_is_sha256_of_the_bytes_also_of_a_strided_view():
    flat = torch.tensor(VALUES)
    expected = hashlib.sha256(struct.pack(f"<{len(VALUES)}f", *VALUES)).hexdigest()
    assert digest(flat) == expected
    assert digest(torch.stack([flat, flat], dim=1)[:, 0]) == expected
    assert digest(torch.empty(0)) == hashlib.sha256(b"").hexdigest()
    assert digest(flat.clone().requires_grad_()) == expected


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_no_numbers_are_no_bytes(codec):
    assert bytes(pack(torch.empty(0), codec)) == b""
    assert unpack(memoryview(b""), 0, codec).shape == (0,)
    with pytest.raises(PayloadError, match="expected 0"):
        unpack(memoryview(b"x"), 0, codec)


@pytest.mark.parametrize("flat", [torch.zeros(2, 2), torch.zeros(2).double(), torch.tensor(1.0)])
def test_only_flat_float32_is_packed(flat):
    with pytest.raises(PayloadError, match="flat float32"):
        pack(flat, "fp32")
    with pytest.raises(PayloadError, match="flat float32"):
        pack(flat, "bf16")


@pytest.mark.parametrize("numel", [0, 1, 3])
def test_fp32_of_another_length_is_refused(numel):
    with pytest.raises(PayloadError, match=f"expected {4 * numel}"):
        unpack(memoryview(bytes(8)), numel, "fp32")


def frame(content: bytes, **options) -> bytes:
    return zstandard.ZstdCompressor(level=1, **options).compress(content)


UNKNOWN_SIZE = frame(bytes(6), write_content_size=False)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not zstd at all",
        frame(bytes(4)),
        frame(bytes(8)),
        UNKNOWN_SIZE,
        frame(bytes(6))[:-1],
        frame(bytes(6)) + b"\0",
        frame(bytes(6)) + frame(bytes(6)),
        b"\x50\x2a\x4d\x18" + struct.pack("<I", 6) + bytes(6),  # a frame to be skipped, of 6 bytes
    ],
)
def test_a_compressed_body_of_another_size_is_refused(body):
    with pytest.raises(PayloadError):
        unpack(memoryview(body), 3, "bf16")


def test_the_frames_own_claim_is_not_allocated():
    # A frame header that claims 2**60 bytes: without the check this is a MemoryError.
    huge = b"\x28\xb5\x2f\xfd" + bytes([0b11100000]) + struct.pack("<Q", 2**60) + b"\1\0\0"
    assert zstandard.get_frame_parameters(huge).content_size == 2**60
    with pytest.raises(PayloadError, match="declares 1152921504606846976 bytes, expected 6"):
        unpack(memoryview(huge), 3, "bf16")


def test_a_flat_buffer_survives_an_unaligned_body():
    body = memoryview(b"x" + struct.pack("<3f", 1, 2, 3))[1:]
    assert unpack(body, 3, "fp32").tolist() == [1, 2, 3]
    assert np.isclose(float(unpack(body, 3, "fp32").sum()), 6)
