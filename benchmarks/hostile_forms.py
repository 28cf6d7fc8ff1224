"""The two forms of an answer to a round: this project's payload, and what a FedAvg site sends.

Payloads are written by the second writer of the wire form in tests/support, so that the seal is
right and only the one thing that a case is about is wrong.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from tests.support import wire
from uharmony_server.admission import RefusalReason

SHAPES: tuple[tuple[str, list[int]], ...] = (("a", [3]), ("w", [2, 2]))
COUNT = 7
DIGEST = wire.schema_digest(list(SHAPES))
CASES = 12  # of training, at the hostile site


@dataclass(frozen=True)
class Asked:
    """What the hostile site was asked, and what an honest one would send back."""

    study: str
    round: int
    site: str
    base: str
    weights: tuple[float, ...]
    delta: tuple[float, ...]

    def payload(
        self, numbers: list[float] | None = None, digest: str = DIGEST, **how: Any
    ) -> bytes:
        """An update in this project's form; `how` replaces fields of the manifest."""
        fields = {"study": self.study, "round": self.round, "site": self.site, "base": self.base}
        chosen = list(self.delta) if numbers is None else numbers
        return wire.payload(chosen, digest, **{**fields, "values": {"cases": CASES}, **how})

    def with_header(self, old: str, new: str) -> bytes:
        """The honest update with another text in its header, sealed correctly."""
        fields = {"study": self.study, "round": self.round, "site": self.site, "base": self.base}
        header = wire.canonical(wire.manifest(COUNT, DIGEST, **fields)).decode()
        if old not in header:
            raise ValueError(f"{old} is not in the header; the case would test nothing")
        return wire.seal(wire.pad(header.replace(old, new).encode()), self.body)

    @property
    def body(self) -> bytes:
        """The honest numbers as they travel."""
        return struct.pack(f"<{COUNT}f", *self.delta)

    def arrays(self, factor: float = 1.0) -> dict[str, NDArray[Any]]:
        """What a FedAvg site sends: whole weights, here base + factor * delta."""
        flat = floats(self.weights) + np.float32(factor) * floats(self.delta)
        return {"a": flat[:3], "w": flat[3:].reshape(2, 2)}


Answer = Callable[[Asked], RecordDict]


@dataclass(frozen=True)
class Case:
    """One bad input. `reason` None: it is admitted, for the reason that `note` gives."""

    number: str
    name: str
    ours: Answer
    flower: Answer
    reason: RefusalReason | None
    note: str = ""
    twice: bool = False


def carried(data: bytes) -> RecordDict:
    """A payload as a site sends it."""
    array = Array("uint8", (len(data),), "uharmony.payload", data)
    return RecordDict({"payload": ArrayRecord({"payload": array})})


def fedavg(arrays: Mapping[str, NDArray[Any] | Array], weight: int | float = CASES) -> RecordDict:
    """A FedAvg reply of these arrays and this number of examples."""
    made = {name: a if isinstance(a, Array) else Array(a) for name, a in arrays.items()}
    return RecordDict(
        {"arrays": ArrayRecord(made), "metrics": MetricRecord({"num-examples": weight})}
    )


class Gadget:
    """Unpickled, this makes a folder: how the tests see whether anything was executed."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.mkdir, (self.marker,)


def floats(numbers: Sequence[float]) -> NDArray[Any]:
    """Numbers as float32."""
    return np.array(numbers, dtype=np.float32)


def raw(content: bytes) -> Array:
    """An array of three numbers whose bytes are these."""
    return Array("float32", (3,), "numpy.ndarray", content)


def claims(array: NDArray[Any], shape: tuple[int, ...]) -> Array:
    """An array that says that it has another shape."""
    return Array("float32", shape, "numpy.ndarray", Array(array).data)


def object_array() -> Array:
    """An array of Python objects, which numpy writes as a pickle."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([1, "x", None], dtype=object), allow_pickle=True)
    return Array("object", (3,), "numpy.ndarray", buffer.getvalue())


def huge() -> Array:
    """An npy file of a few bytes that declares 4 TiB."""
    buffer = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return Array("float32", (1 << 40,), "numpy.ndarray", buffer.getvalue() + bytes(16))


def two_records(asked: Asked) -> RecordDict:
    """An answer with two sets of arrays, which hold the same names."""
    content = fedavg(asked.arrays())
    content["more"] = ArrayRecord({name: Array(a) for name, a in asked.arrays().items()})
    return content
