"""Updates of a hostile or broken site, each for this coordinator and for Flower's FedAvg.

The numbers are those of the list of bad inputs in docs/hostile_input.md.
"""

from __future__ import annotations

import io
import pickle  # noqa: TID251 - made here, to see that nothing reads it
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from benchmarks.hostile_forms import (
    CASES,
    COUNT,
    DIGEST,
    SHAPES,
    Answer,
    Asked,
    Case,
    Gadget,
    carried,
    claims,
    fedavg,
    floats,
    huge,
    object_array,
    raw,
    two_records,
)
from tests.support import wire
from uharmony_server.admission import RefusalReason as R

_NAN, _INF = float("nan"), float("inf")


def cases(marker: Path) -> list[Case]:
    """All cases; a pickle that is executed makes `marker`."""
    return [*_numbers(), *_shapes(), *_weights(), *_contexts(), *_code(marker), *_messages()]


def _set(asked: Asked, value: float) -> list[float]:
    return [value, *asked.delta[1:]]


def _flower_set(value: float) -> Answer:
    def answer(asked: Asked) -> RecordDict:
        arrays = asked.arrays()
        arrays["a"] = arrays["a"].copy()
        arrays["a"][0] = value
        return fedavg(arrays)

    return answer


def _scaled(number: str, name: str, factor: float, reason: R | None, note: str = "") -> Case:
    return Case(
        number,
        name,
        lambda q: carried(q.payload([factor * d for d in q.delta])),
        lambda q: fedavg(q.arrays(factor)),
        reason,
        note,
    )


def _numbers() -> list[Case]:
    def both(asked: Asked) -> bytes:
        return asked.payload([_INF, -_INF, *asked.delta[2:]])

    def tiny(asked: Asked) -> RecordDict:
        flat = floats(asked.weights) + np.full(COUNT, 1e-42, dtype=np.float32)
        return fedavg({"a": flat[:3], "w": flat[3:].reshape(2, 2)})

    return [
        Case("1", "one NaN", lambda q: carried(q.payload(_set(q, _NAN))), _flower_set(_NAN),
             R.NOT_FINITE),
        Case("2", "one +Inf", lambda q: carried(q.payload(_set(q, _INF))), _flower_set(_INF),
             R.NOT_FINITE),
        Case("2", "one -Inf", lambda q: carried(q.payload(_set(q, -_INF))), _flower_set(-_INF),
             R.NOT_FINITE),
        Case("2", "+Inf and -Inf", lambda q: carried(both(q)), _flower_set(_INF), R.NOT_FINITE),
        Case("3", "denormal numbers only", lambda q: carried(q.payload([1e-42] * COUNT)), tiny,
             None, "harmless, and flushing them would change what the site signed"),
        _scaled("4", "norm times 1e6", 1e6, R.NORM_TOO_LARGE),
        _scaled("5", "sign flipped, times 10", -10.0, None,
                "within the norm bound (20 x the median); a norm cannot see a direction"),
        _scaled("5", "sign flipped, times 100", -100.0, R.NORM_TOO_LARGE),
    ]  # fmt: skip


def _shapes() -> list[Case]:
    def replaced(**arrays: Any) -> Answer:
        return lambda q: fedavg({**q.arrays(), **arrays})

    def cast(kind: str) -> Answer:
        return lambda q: fedavg({n: a.astype(kind) for n, a in q.arrays().items()})

    def extra(asked: Asked) -> bytes:
        digest = wire.schema_digest([*SHAPES, ("x", [1])])
        return asked.payload([*asked.delta, 1.0], digest)

    def missing(asked: Asked) -> bytes:
        return asked.payload(list(asked.delta[:3]), wire.schema_digest([SHAPES[0]]))

    def wide(asked: Asked) -> bytes:
        body = struct.pack(f"<{COUNT}d", *asked.delta)
        fields = {"study": asked.study, "round": asked.round, "site": asked.site,
                  "base": asked.base, "body_bytes": len(body)}  # fmt: skip
        return wire.seal(wire.pad(wire.canonical(wire.manifest(COUNT, DIGEST, **fields))), body)

    def lying(asked: Asked) -> RecordDict:
        arrays = asked.arrays()
        return fedavg({"a": claims(arrays["a"], (999, 999)), "w": arrays["w"]})

    return [
        Case("6", "one number where three belong", lambda q: carried(q.payload([5.0])),
             replaced(a=floats([5.0])), R.WRONG_SCHEMA),
        Case("7", "a tensor too many", lambda q: carried(extra(q)), replaced(x=floats([1.0])),
             R.WRONG_SCHEMA),
        Case("8", "a tensor missing", lambda q: carried(missing(q)),
             lambda q: fedavg({"a": q.arrays()["a"]}), R.WRONG_SCHEMA),
        Case("9", "float64", lambda q: carried(wide(q)), cast("f8"), R.DAMAGED),
        Case("9", "complex64", lambda q: carried(q.payload(codec="complex64")),
             cast("c8"), R.DAMAGED),
        Case("9", "object array", lambda q: carried(q.payload(codec="object")),
             lambda q: fedavg({**q.arrays(), "a": object_array()}), R.DAMAGED),
        Case("10", "a key twice",
             lambda q: carried(q.with_header('"round":', '"round":1,"round":')), two_records,
             R.DAMAGED),
        Case("11", "declares 2^40 numbers",
             lambda q: carried(q.payload(numel=2**40, body_bytes=2**42)),
             lambda q: fedavg({**q.arrays(), "a": huge()}), R.DAMAGED),
        Case("12", "declared and real size differ",
             lambda q: carried(q.payload([1.0], numel=COUNT, body_bytes=4 * COUNT)), lying,
             R.DAMAGED),
    ]  # fmt: skip


def _weights() -> list[Case]:
    def told(number: str, name: str, value: Any, flower: int | float, reason: R) -> Case:
        return Case(number, name, lambda q: carried(q.payload(values={"cases": value})),
                    lambda q: fedavg(q.arrays(), flower), reason)  # fmt: skip

    return [
        told("13", "n = -9", -9, -9, R.BAD_CASE_COUNT),
        told("14", "n = 1e12", 10**12, 10**12, R.BAD_CASE_COUNT),
        Case("15", "n = NaN",
             lambda q: carried(q.with_header(f'"cases":{CASES}', '"cases":NaN')),
             lambda q: fedavg(q.arrays(), _NAN), R.DAMAGED),
        told("15", "n = true", True, 1, R.DAMAGED),
        told("15", "n = '12'", "12", CASES, R.DAMAGED),
    ]  # fmt: skip


def _contexts() -> list[Case]:
    """FedAvg's form has no round, study or site: what stands beside is the honest update."""

    def honest(asked: Asked) -> RecordDict:
        return fedavg(asked.arrays())

    def case(number: str, name: str, reason: R, **how: Any) -> Case:
        return Case(number, name, lambda q: carried(q.payload(**how)), honest, reason)

    return [
        Case("16", "the round before", lambda q: carried(q.payload(round=q.round - 1)), honest,
             R.WRONG_ROUND),
        Case("17", "the round after", lambda q: carried(q.payload(round=q.round + 1)), honest,
             R.WRONG_ROUND),
        case("18", "another study's update", R.WRONG_STUDY, study="f" * 64),
        case("18", "made from other weights", R.WRONG_BASE, base="f" * 64),
        case("19", "another site's name", R.WRONG_SITE, site="north"),
        Case("20", "the same answer twice", lambda q: carried(q.payload()), honest, R.DUPLICATE,
             "counted once", twice=True),
        Case("21", "longer than any honest update",
             lambda q: carried(q.payload() + bytes((1 << 20) + 10_000)),
             lambda q: fedavg({**q.arrays(), "a": np.zeros(1 << 18, np.float32)}), R.OVERSIZED),
        Case("22", "nothing at all", lambda q: carried(b""),
             lambda q: fedavg({**q.arrays(), "a": raw(b"")}), R.DAMAGED),
    ]  # fmt: skip


def _code(marker: Path) -> list[Case]:
    blob = pickle.dumps(Gadget(marker))
    saved = io.BytesIO()
    torch.save({"w": torch.zeros(1), "gadget": Gadget(marker)}, saved)

    def flower(content: bytes) -> Answer:
        return lambda q: fedavg({**q.arrays(), "a": raw(content)})

    def in_header(asked: Asked) -> bytes:
        return wire.seal(wire.pad(blob), asked.body)

    def in_body(asked: Asked) -> bytes:
        fields = {"study": asked.study, "round": asked.round, "site": asked.site,
                  "base": asked.base}  # fmt: skip
        return wire.seal(wire.pad(wire.canonical(wire.manifest(COUNT, DIGEST, **fields))), blob)

    text = blob.decode("latin-1")
    places: dict[str, Callable[[Asked], bytes]] = {
        "as the payload": lambda q: blob,
        "as the header": in_header,
        "as the body": in_body,
        "as the site": lambda q: q.payload(site=text),
        "as the study": lambda q: q.payload(study=text),
        "as n": lambda q: q.payload(values={"cases": text}),
        "as a value's name": lambda q: q.payload(values={"cases": CASES, text: 1}),
    }

    def case(place: str, make: Callable[[Asked], bytes]) -> Case:
        return Case("23", f"pickle {place}", lambda q: carried(make(q)), flower(blob), R.DAMAGED)

    return [
        *(case(place, make) for place, make in places.items()),
        Case("24", "a checkpoint of torch.save that executes", lambda q: carried(saved.getvalue()),
             flower(saved.getvalue()), R.DAMAGED),
    ]  # fmt: skip


def _messages() -> list[Case]:
    """Flower messages that are not what an answer looks like."""

    def records(content: Callable[[Asked], Any]) -> Answer:
        return lambda q: RecordDict({"payload": content(q)})

    def two(asked: Asked) -> RecordDict:
        array = Array("uint8", (1,), "uharmony.payload", b"x")
        return RecordDict({"payload": ArrayRecord({"payload": array, "more": array})})

    deep = "[" * 3000
    return [
        Case("-", "no record at all", lambda q: RecordDict(), lambda q: RecordDict(),
             R.SITE_ERROR),
        Case("-", "numbers in place of the payload",
             records(lambda q: MetricRecord({"payload": 1})),
             lambda q: RecordDict({"arrays": MetricRecord({"a": 1})}), R.SITE_ERROR),
        Case("-", "two arrays", two, two_records, R.SITE_ERROR),
        Case("-", "a refusal of 3000 brackets",
             lambda q: RecordDict({"refusal": ConfigRecord({"json": deep})}),
             lambda q: RecordDict({"config": ConfigRecord({"json": deep})}), R.SITE_ERROR),
    ]  # fmt: skip
