"""One bad update of each kind gets one reason, and never an exception."""

from __future__ import annotations

import dataclasses
import math
import struct

import pytest
import torch

from tests.support import wire
from uharmony_model.exchange.payload import MAX_HEADER_BYTES, Kind, encode
from uharmony_model.exchange.schema import Schema
from uharmony_server.admission import (
    Admitted,
    AdmittedMetrics,
    Expected,
    Refusal,
    RefusalReason,
    admit,
    admit_metrics,
    norm_limit,
)

SCHEMA = Schema.of({"w": torch.zeros(2, 2), "b": torch.zeros(1)})
DIGEST = wire.schema_digest([("b", [1]), ("w", [2, 2])])
NUMBERS = [3.0, 0.0, -4.0, 0.0, 0.0]  # norm 5
EXPECTED = Expected(
    site="site-a",
    study=wire.STUDY,
    round=3,
    base=wire.BASE,
    schema=SCHEMA,
    codec="fp32",
    max_cases=100,
    norm_limit=50.0,
)
OTHER = "f" * 64
NAN, INF = float("nan"), float("inf")
TINY = 1e-42  # a denormal number in float32


def sent(numbers=NUMBERS, digest=DIGEST, **changes):
    return wire.payload(numbers, digest, **changes)


def with_text(old: str, new: str) -> bytes:
    header = wire.canonical(wire.manifest(5, DIGEST)).replace(old.encode(), new.encode())
    return wire.seal(wire.pad(header), struct.pack("<5f", *NUMBERS))


PICKLE = b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."
R = RefusalReason

REFUSED = {
    "1 NaN": (sent([3, NAN, -4, 0, 0]), R.NOT_FINITE),
    "1 NaN in the last place": (sent([3, 0, -4, 0, NAN]), R.NOT_FINITE),
    "2 +Inf": (sent([3, INF, -4, 0, 0]), R.NOT_FINITE),
    "2 -Inf": (sent([3, -INF, -4, 0, 0]), R.NOT_FINITE),
    "2 +Inf and -Inf": (sent([INF, -INF, 0, 0, 0]), R.NOT_FINITE),
    "4 norm times 1e6": (sent([n * 1e6 for n in NUMBERS]), R.NORM_TOO_LARGE),
    "4 the largest finite number": (sent([3.4e38] * 5), R.NORM_TOO_LARGE),
    "5 sign flipped times -11": (sent([n * -11 for n in NUMBERS]), R.NORM_TOO_LARGE),
    "6 one number for all": (sent([1.0]), R.WRONG_SCHEMA),
    "6 one number with its own schema": (
        sent([1.0], wire.schema_digest([("w", [1])])),
        R.WRONG_SCHEMA,
    ),
    "7 a tensor too many": (
        sent([*NUMBERS, 1.0], wire.schema_digest([("b", [1]), ("c", [1]), ("w", [2, 2])])),
        R.WRONG_SCHEMA,
    ),
    "8 a tensor missing": (sent(NUMBERS[:4], wire.schema_digest([("w", [2, 2])])), R.WRONG_SCHEMA),
    "9 float64": (
        wire.seal(
            wire.pad(wire.canonical(wire.manifest(5, DIGEST, codec="float64", body_bytes=40))),
            struct.pack("<5d", *NUMBERS),
        ),
        R.DAMAGED,
    ),
    "9 eight bytes a number": (
        wire.seal(
            wire.pad(wire.canonical(wire.manifest(5, DIGEST, body_bytes=40))),
            struct.pack("<5d", *NUMBERS),
        ),
        R.DAMAGED,
    ),
    "10 duplicate key": (with_text('"round":3', '"round":2,"round":3'), R.DAMAGED),
    "11 declares 2**40 numbers": (sent(numel=2**40, body_bytes=2**42), R.DAMAGED),
    "12 declares more than there is": (sent(NUMBERS[:1], numel=5, body_bytes=20), R.DAMAGED),
    "13 n = -9": (sent(values={"cases": -9}), R.BAD_CASE_COUNT),
    "13 n = 0": (sent(values={"cases": 0}), R.BAD_CASE_COUNT),
    "14 n = 1e12": (sent(values={"cases": 10**12}), R.BAD_CASE_COUNT),
    "14 n one above the limit": (sent(values={"cases": 101}), R.BAD_CASE_COUNT),
    "15 n = NaN": (with_text('"cases":12', '"cases":NaN'), R.DAMAGED),
    "15 n = true": (sent(values={"cases": True}), R.DAMAGED),
    "15 n as text": (sent(values={"cases": "12"}), R.DAMAGED),
    "15 n = 12.0": (sent(values={"cases": 12.0}), R.BAD_CASE_COUNT),
    "15 n = null": (sent(values={"cases": None}), R.BAD_CASE_COUNT),
    "15 no n": (sent(values={}), R.BAD_CASE_COUNT),
    "15 n below a threshold": (sent(values={"cases": "<11"}), R.BAD_CASE_COUNT),
    "17 from its own round": (sent(values={"cases": 12, "started_from": 3}), R.WRONG_ROUND),
    "17 from round -1": (sent(values={"cases": 12, "started_from": -1}), R.WRONG_ROUND),
    "17 from no number": (sent(values={"cases": 12, "started_from": None}), R.WRONG_ROUND),
    "16 round before": (sent(round=2), R.WRONG_ROUND),
    "17 round after": (sent(round=4), R.WRONG_ROUND),
    "18 another study": (sent(study=OTHER), R.WRONG_STUDY),
    "19 another site's name": (sent(site="site-b"), R.WRONG_SITE),
    "19 the server's name": (sent(site=""), R.WRONG_SITE),
    "20 replay of another run's same round": (sent(base=OTHER), R.WRONG_BASE),
    "20 no base": (sent(base=""), R.WRONG_BASE),
    "21 far too long": (sent() + bytes(MAX_HEADER_BYTES + 10_000), R.OVERSIZED),
    "22 nothing at all": (b"", R.DAMAGED),
    "23 pickle": (PICKLE, R.DAMAGED),
    "23 pickle for a header": (wire.seal(wire.pad(PICKLE), b""), R.DAMAGED),
    "23 pickle for a body": (
        wire.seal(wire.pad(wire.canonical(wire.manifest(5, DIGEST))), PICKLE),
        R.DAMAGED,
    ),
    "23 pickle for a site": (sent(site=PICKLE.decode("latin-1")), R.DAMAGED),
    "24 what torch.save writes": (b"PK\x03\x04" + bytes(200) + PICKLE, R.DAMAGED),
    "another kind": (sent(kind="model"), R.WRONG_KIND),
    "metrics instead": (sent([], "", kind="metrics"), R.WRONG_KIND),
    "another codec": (
        encode(
            kind=Kind.UPDATE,
            study=wire.STUDY,
            round=3,
            site="site-a",
            base=wire.BASE,
            codec="bf16",
            schema=SCHEMA,
            flat=torch.tensor(NUMBERS),
            values={"cases": 12},
        ),
        R.WRONG_CODEC,
    ),
    "a flipped bit": (sent()[:-1] + b"\x01", R.DAMAGED),
    "cut off": (sent()[:-1], R.DAMAGED),
    "no bytes": ("text", R.DAMAGED),
    "nothing": (None, R.DAMAGED),
}


def test_a_weight_that_is_not_told_is_none():
    answer = admit(sent(values={"cases": "equal", "started_from": 2}), EXPECTED)
    assert isinstance(answer, Admitted)
    assert (answer.cases, answer.started_from) == (None, 2)


@pytest.mark.parametrize(
    ("said", "counts"), [(0.0, 0.0), (1e-320, 0.0), (1e-40, 0.0), (1e-6, 1e-6), (0.5, 0.5)]
)
def test_next_to_nothing_that_taught_is_nothing(said, counts):
    answer = admit(sent(values={"cases": 12, "taught": said}), EXPECTED)
    assert isinstance(answer, Admitted)
    assert (answer.taught, answer.labelled) == (counts, False)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_reason(name):
    buffer, reason = REFUSED[name]
    answer = admit(buffer, EXPECTED)
    assert isinstance(answer, Refusal)
    assert answer.reason is reason, answer
    assert (answer.site, answer.round) == ("site-a", 3)
    assert answer.detail
    assert answer.detail.isprintable()
    assert answer.detail.isascii()
    assert len(answer.detail) <= 300


def test_the_reasons_that_bytes_can_cause_are_all_in_the_table():
    by_the_round = {R.DUPLICATE, R.SITE_ERROR, R.NOT_AGREED, R.LATE}
    published_only = {R.WRONG_BUDGET}  # in test_publication.py
    assert {reason for _, reason in REFUSED.values()} == set(R) - by_the_round - published_only


def test_an_honest_update_is_admitted():
    answer = admit(sent(), EXPECTED)
    assert isinstance(answer, Admitted)
    assert answer.flat.tolist() == NUMBERS
    assert (answer.site, answer.cases, answer.norm) == ("site-a", 12, 5.0)
    assert answer.bytes == len(sent())


def test_metrics_are_admitted_by_the_same_rules():
    values = {"test/site-a/ct/tumor/dice": 0.5, "test/site-a/ct/tumor/hd95_mm": None}
    honest = sent([], "", kind="metrics", values=values)
    answer = admit_metrics(honest, EXPECTED)
    assert isinstance(answer, AdmittedMetrics)
    assert (answer.site, dict(answer.values)) == ("site-a", values)
    refused = {
        R.WRONG_KIND: sent(),
        R.DAMAGED: honest[:-1],
        R.WRONG_SITE: sent([], "", kind="metrics", values=values, site="site-b"),
        R.WRONG_ROUND: sent([], "", kind="metrics", values=values, round=2),
        R.WRONG_BASE: sent([], "", kind="metrics", values=values, base=OTHER),
        R.WRONG_STUDY: sent([], "", kind="metrics", values=values, study=OTHER),
        R.WRONG_SCHEMA: sent(NUMBERS, kind="metrics", values=values),
        R.OVERSIZED: honest + bytes(MAX_HEADER_BYTES + 100),
    }
    for reason, buffer in refused.items():
        verdict = admit_metrics(buffer, EXPECTED)
        assert isinstance(verdict, Refusal)
        assert verdict.reason is reason


@pytest.mark.parametrize(
    ("numbers", "expected_norm"),
    [
        ([TINY] * 5, 0.0),  # 3 a flood of denormal numbers: harmless, and passed on as it is
        ([0.0] * 5, 0.0),
        ([-n for n in NUMBERS], 5.0),  # a sign flip alone is not seen by a norm
        ([n * 10 for n in NUMBERS], 50.0),  # exactly the limit
    ],
)
def test_what_is_let_through(numbers, expected_norm):
    answer = admit(sent(numbers), EXPECTED)
    assert isinstance(answer, Admitted)
    assert answer.flat.tolist() == list(struct.unpack("<5f", struct.pack("<5f", *numbers)))
    assert answer.norm == pytest.approx(expected_norm, abs=1e-30)


def test_without_history_there_is_no_norm_limit():
    answer = admit(sent([3e38] * 5), dataclasses.replace(EXPECTED, norm_limit=None))
    assert isinstance(answer, Admitted)
    assert answer.norm == pytest.approx(math.sqrt(5) * 3e38, rel=1e-6)  # above float32's range


@pytest.mark.parametrize("position", [0, 1, 65_535, 65_536, 199_999])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_one_number_among_many_is_found(position, bad):
    flat = torch.full((200_000,), 1e-3)
    flat[position] = bad
    schema = Schema.of({"w": flat})
    buffer = encode(
        kind=Kind.UPDATE,
        study=wire.STUDY,
        round=3,
        site="site-a",
        base=wire.BASE,
        schema=schema,
        flat=flat,
        values={"cases": 1},
    )
    answer = admit(buffer, dataclasses.replace(EXPECTED, schema=schema))
    assert isinstance(answer, Refusal)
    assert answer.reason is R.NOT_FINITE


def test_the_norm_is_that_of_float64():
    flat = torch.randn(300_001, generator=torch.Generator().manual_seed(5)) * 1e-3
    schema = Schema.of({"w": flat})
    buffer = encode(
        kind=Kind.UPDATE,
        study=wire.STUDY,
        round=3,
        site="site-a",
        base=wire.BASE,
        schema=schema,
        flat=flat,
        values={"cases": 1},
    )
    answer = admit(buffer, dataclasses.replace(EXPECTED, schema=schema))
    assert isinstance(answer, Admitted)
    assert answer.norm == pytest.approx(flat.double().square().sum().sqrt().item(), rel=1e-5)


def test_norm_limit_is_a_multiple_of_the_median():
    assert norm_limit([], 20) is None
    assert norm_limit([3.0, 1.0, 1000.0], 20) == 60.0
    assert norm_limit([1.0, 3.0], 20) == 40.0
    # Rounds that changed nothing say nothing about what is usual.
    assert norm_limit([0.0, 0.0, 1.0], 20) is None


def test_a_refusal_holds_no_foreign_control_characters():
    refusal = Refusal(
        site="a\n\x1b[31m\u202e",
        round=0,
        reason=RefusalReason.SITE_ERROR,
        detail='boom\n{"event":"approved"}\x00' + "x" * 10_000,
    )
    assert refusal.site == "a??[31m?"
    assert refusal.detail.startswith('boom?{"event":"approved"}?xxx')
    assert len(refusal.detail) == 300
    assert Refusal.model_validate_json(refusal.model_dump_json()) == refusal
