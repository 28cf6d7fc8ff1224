"""How the numbers of a flat buffer become bytes, and back.

`fp32` is the raw little-endian buffer. `bf16` rounds to bfloat16, puts all low bytes before all
high ones, and compresses with zstd: on deltas about 0.35 of fp32, because the high bytes (sign,
exponent) repeat and the low ones (mantissa) do not.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import torch
import zstandard
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from uharmony_model.errors import PayloadError

CodecName = Literal["fp32", "bf16"]
Buffer = bytes | bytearray | memoryview

_LEVEL = 1  # higher levels gain next to nothing on mantissas and cost several times the time


def quantize(flat: Tensor, codec: CodecName) -> Tensor:
    """What `unpack(pack(flat))` gives, without the bytes; fp32 gives `flat` itself."""
    return flat if codec == "fp32" else flat.to(torch.bfloat16).float()


def digest(flat: Tensor) -> str:
    """SHA-256 of the little-endian float32 bytes of a flat buffer `(n,)`, in hex."""
    return hashlib.sha256(_little_endian(flat)).hexdigest()


def pack(flat: Tensor, codec: CodecName) -> memoryview | bytes:
    """The bytes of a flat float32 buffer `(n,)`; for fp32 they are a view of it."""
    raw = _little_endian(flat)
    if codec == "fp32" or not raw.nbytes:
        return raw
    half = flat.detach().cpu().to(torch.bfloat16).view(torch.int16).numpy().view("<u2")
    planes = np.empty((2, half.size), dtype=np.uint8)
    np.bitwise_and(half, 0xFF, out=planes[0], casting="unsafe")
    np.right_shift(half, 8, out=planes[1], casting="unsafe")
    packed: bytes = zstandard.ZstdCompressor(level=_LEVEL).compress(planes.data)
    return packed


def unpack(body: memoryview, numel: int, codec: CodecName) -> Tensor:
    """The flat float32 buffer `(numel,)`; for fp32 a view of `body` that must not be written to.

    `numel` is what the receiver expects, never only what the sender declared: it bounds what is
    allocated.

    Raises:
        PayloadError: the bytes are not exactly those of `numel` numbers.
    """
    if codec == "fp32" or not numel:
        if body.nbytes != 4 * numel:
            raise PayloadError(f"body has {body.nbytes} bytes, expected {4 * numel} for {numel}")
        if not numel:
            return torch.empty(0)
        # DLPack, because torch.frombuffer and from_numpy warn about read-only memory.
        return from_dlpack(np.frombuffer(body, dtype="<f4"))
    planes = np.frombuffer(_decompress(body, 2 * numel), dtype=np.uint8).reshape(2, numel)
    # A bfloat16 is the upper half of a float32.
    wide = np.zeros((numel, 4), dtype=np.uint8)
    wide[:, 2], wide[:, 3] = planes
    return torch.from_numpy(wide.reshape(-1).view("<f4"))


def _decompress(body: memoryview, size: int) -> bytes:
    try:
        # The frame's own claim is what the library allocates, and all it then accepts.
        declared = zstandard.get_frame_parameters(body).content_size
        if declared != size:
            raise PayloadError(f"compressed body declares {declared} bytes, expected {size}")
        raw: bytes = zstandard.ZstdDecompressor().decompress(body, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise PayloadError(f"compressed body is damaged: {str(error)[:100]}") from None
    return raw


def _little_endian(flat: Tensor) -> memoryview:
    if flat.dtype != torch.float32 or flat.ndim != 1:
        raise PayloadError(f"expected a flat float32 buffer, got {tuple(flat.shape)} {flat.dtype}")
    array = flat.detach().cpu().contiguous().numpy().astype("<f4", copy=False)
    return array.view(np.uint8).data
