"""Where mutated inputs come from: honest bytes, changed blindly or by their form.

All draws come from the generator that is given, so that an input can be made again.
"""

from __future__ import annotations

import gzip
import json
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.support import wire
from tests.support.nifti_files import FIELDS, nifti_bytes
from uharmony_client.volume_header import VolumeHeader, encode_volume
from uharmony_model.exchange.canonical import canonical_json
from uharmony_model.exchange.instruction import Instruction, Receipt
from uharmony_model.exchange.joining import EnrolmentRequest, JoinCode
from uharmony_model.exchange.payload import Kind, encode
from uharmony_model.exchange.schema import Schema

SCHEMA = Schema.of({"a": torch.zeros(8, 4), "b": torch.zeros(33)})
SITE, ROUND = "site-a", 3
_NUMBERS = (0, 1, -1, 7, 127, 128, 255, 256, 32767, 32768, 65535, 2**31 - 1, 2**31, 2**32, 2**63)
_TEXTS = ("", "x", "equal", "<11", "../../etc", "\u202e", "NaN", "é" * 40, "[" * 200, "\n", "\0")
_FLOATS = (0.0, -0.0, 1e-45, 1e38, -1e38, float("nan"), float("inf"), 1e300, 0.5)
# Of the right form, so that what is refused is the meaning.
_PLAUSIBLE: dict[str, tuple[Any, ...]] = {
    "kind": ("update", "model", "metrics", "statistics"),
    "study": ("f" * 64,),
    "base": ("f" * 64, ""),
    "round": (0, 2, 4, 2**31 - 1),
    "site": ("site-b", "", "server"),
    "codec": ("fp32", "bf16"),
    "schema_digest": ("f" * 64, ""),
    "numel": (0, 64, 66, 2**40),
    "body_bytes": (0, 256, 264, 2**42),
}
_BOMB = gzip.compress(bytes(64 << 20), 9)  # 64 MiB in 64 KiB, appended as a second gzip member


def payloads() -> list[bytes]:
    """Honest updates under both codecs, a model and metrics."""
    flat = torch.linspace(-1, 1, SCHEMA.numel)
    common: dict[str, Any] = {"study": wire.STUDY, "round": ROUND, "base": wire.BASE}
    metrics = {f"validation/{SITE}/ct/tumor/dice": 0.5, f"validation/{SITE}/ct/tumor/hd95": None}
    return [
        encode(kind=Kind.UPDATE, site=SITE, schema=SCHEMA, flat=flat, codec="fp32",
               values={"cases": 12, "started_from": 2}, **common),
        encode(kind=Kind.UPDATE, site=SITE, schema=SCHEMA, flat=flat, codec="bf16",
               values={"cases": "equal"}, **common),
        encode(kind=Kind.MODEL, site="server", schema=SCHEMA, flat=flat, **common),
        encode(kind=Kind.METRICS, site=SITE, values=metrics, **common),
    ]  # fmt: skip


def texts() -> list[tuple[str, bytes]]:
    """Honest texts that arrive from outside, with the name of what reads them."""
    receipt = Receipt(seq=9, sha256="a" * 64)
    order = Instruction(
        action="train", study=wire.STUDY, round=ROUND, base=wire.BASE, receipt=receipt
    )
    code = JoinCode(
        address="[2001:db8::1]:9092", ca_sha256="b" * 64, token="A" * 43, expires=2_000_000_000
    )
    csr = "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"
    request = EnrolmentRequest(token="A" * 43, csr=csr, node_key="B" * 120, ledger_key="c" * 64,
                               study=wire.STUDY)  # fmt: skip
    header = wire.canonical(wire.manifest(SCHEMA.numel, SCHEMA.digest))
    return [
        ("instruction", order.to_json().encode()),
        ("join code", code.to_text().encode()),
        ("enrolment", canonical_json(request).encode()),
        ("manifest", header),
    ]


def volumes() -> list[bytes]:
    """Honest volumes: types, byte orders, versions, compressed and not."""
    draws = np.random.default_rng(1)
    real = draws.normal(size=(5, 6, 7)).astype("f4")
    whole = draws.integers(-100, 100, (4, 4, 4)).astype("i2")
    header = VolumeHeader(nifti=2, shape=(4, 4, 4), spacing_mm=(1.0, 1.0, 1.0), sform_code=1,
                          sform=((1.0, 0, 0, 0), (0, 1.0, 0, 0), (0, 0, 1.0, 0)))  # fmt: skip
    extension = struct.pack("<ii", 32, 6) + b"no name stands in here!!"
    return [
        nifti_bytes(real),
        gzip.compress(nifti_bytes(real, extension=extension), 1),
        nifti_bytes(whole, order=">", scl_slope=0.5, scl_inter=3.0),
        nifti_bytes(np.ones((3, 3, 3, 2), "u1")),
        encode_volume(whole.astype("u1"), header),
    ]


def mutate(content: bytes, draw: random.Random, most: int = 6) -> bytes:
    """Blind changes: bits, bytes, numbers, and pieces taken out, doubled or put in."""
    data = bytearray(content)
    for _ in range(draw.randint(1, most)):
        size = len(data)
        if not size:
            return bytes(draw.randbytes(draw.randint(0, 64)))
        at, kind = draw.randrange(size), draw.randrange(7)
        span = min(size - at, draw.choice((1, 2, 4, 8, 32, 200)))
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at] = draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))
        elif kind == 2:
            form = draw.choice(("<h", ">h", "<i", ">i", "<q", ">q"))
            width = struct.calcsize(form) * 8
            number = draw.choice(_NUMBERS) * draw.choice((1, -1))
            number = (number + 2 ** (width - 1)) % 2**width - 2 ** (width - 1)
            data[at : at + width // 8] = struct.pack(form, number)
        elif kind == 3:
            data[at : at + 4] = struct.pack("<f", draw.choice(_FLOATS[:-2]))
        elif kind == 4:
            del data[at : at + span]
        elif kind == 5:
            data[at:at] = data[at : at + span] * draw.randint(1, 3)
        elif draw.random() < 0.2:
            del data[at:]
        else:
            data[at:at] = draw.randbytes(span)
    return bytes(data)


def mutated_payload(content: bytes, draw: random.Random) -> bytes:
    """A changed payload; mostly sealed again, since a broken seal tests nothing behind it."""
    choice = draw.random()
    if choice < 0.15:
        return mutate(content, draw)
    (length,) = struct.unpack("<I", content[8:12])
    header, body = content[wire.PREFIX :][:length], content[wire.PREFIX + length :]
    if choice < 0.6:
        fields = json.loads(header)
        for _ in range(draw.randint(1, 2)):
            _change(fields, draw)
        try:
            header = wire.pad(wire.canonical(fields))
        except UnicodeEncodeError:  # a lone surrogate; as bytes there is the blind change
            return mutate(content, draw)
        if draw.random() < 0.3:
            body = mutate(body, draw)
        return wire.seal(header, body)
    if choice < 0.8:
        return wire.seal(header, mutate(body, draw))
    header = mutate(header, draw)
    return wire.seal(wire.pad(header) if draw.random() < 0.8 else header, body)


def _change(fields: dict[str, Any], draw: random.Random) -> None:
    name = draw.choice(sorted(fields))
    values = fields.get("values")
    if name in _PLAUSIBLE and draw.random() < 0.5:
        fields[name] = draw.choice(_PLAUSIBLE[name])
    elif isinstance(values, dict) and draw.random() < 0.3:
        key = draw.choice(("cases", "started_from", draw.choice(_TEXTS)))
        values[key] = draw.choice((_value(draw), draw.randint(0, 200)))
    elif draw.random() < 0.1:
        del fields[name]
    elif draw.random() < 0.1:
        fields[draw.choice(_TEXTS)] = _value(draw)
    else:
        fields[name] = _value(draw)


def _value(draw: random.Random) -> Any:
    choices: tuple[Callable[[], Any], ...] = (
        lambda: draw.choice(_NUMBERS) * draw.choice((1, -1)),
        lambda: draw.choice(_TEXTS),
        lambda: draw.choice(_FLOATS),
        lambda: draw.choice((None, True, False, [], {}, [[]] * 9, {"a": 1})),
        lambda: "f" * draw.choice((63, 64, 65)),
        lambda: draw.choice(("update", "model", "metrics", "bf16", "fp32", SITE)),
    )
    return draw.choice(choices)()


def mutated_volume(content: bytes, draw: random.Random) -> bytes:
    """A changed volume; a compressed one mostly inside, and compressed again."""
    packed = content[:2] == b"\x1f\x8b"
    if packed and draw.random() < 0.3:
        return mutate(content, draw)
    inner = gzip.decompress(content) if packed else content
    changed = bytearray(inner)
    by_field = draw.random() < 0.7
    if by_field:
        for _ in range(draw.randint(1, 3)):
            _overwrite(changed, draw)
    if not by_field or draw.random() < 0.3:
        changed = bytearray(mutate(bytes(changed), draw, most=3))
    if not packed:
        return bytes(changed)
    return gzip.compress(bytes(changed), 1) + (_BOMB if draw.random() < 0.1 else b"")


def _overwrite(data: bytearray, draw: random.Random) -> None:
    """Another value in a field of a NIfTI-1 header, in either byte order."""
    at, form = FIELDS[draw.choice(sorted(FIELDS))]
    code = form[-1]
    if code == "s":
        width = int(form[:-1])
        data[at : at + width] = draw.randbytes(width)
        return
    at += struct.calcsize(code) * draw.randrange(int(form[:-1] or 1))
    order = draw.choice("<>")
    if code == "f":
        data[at : at + 4] = struct.pack(order + "f", draw.choice(_FLOATS[:-2]))
    else:
        width = 8 * struct.calcsize(code)
        raw = draw.choice(_NUMBERS) % 2**width
        data[at : at + width // 8] = raw.to_bytes(width // 8, "little" if order == "<" else "big")
