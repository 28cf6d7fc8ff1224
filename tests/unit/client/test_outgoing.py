"""The gate: what leaves is written down first, and what may not leave does not."""

from __future__ import annotations

import hashlib
import struct

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support import wire
from uharmony_client.ledger import Ledger
from uharmony_client.ledger_check import show, verify
from uharmony_client.outgoing import Outgoing
from uharmony_client.policy import Policy
from uharmony_model.errors import ExchangeError, PayloadError, StoreError
from uharmony_model.exchange.payload import Kind, encode
from uharmony_model.exchange.schema import Schema

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SCHEMA = Schema.of({"w": torch.zeros(2, 2), "b": torch.zeros(1)})
NUMBERS = [3.0, 0.0, -4.0, 0.1, 0.0]


def sent(**changes):
    fields = {
        "kind": Kind.UPDATE,
        "study": wire.STUDY,
        "round": 3,
        "site": "site-a",
        "base": wire.BASE,
        "schema": SCHEMA,
        "flat": torch.tensor(NUMBERS),
        "values": {"cases": 12, "loss": 0.5, "started_from": 2},
    }
    return encode(**{**fields, **changes})


def metrics(**values):
    named = {f"test/north/mr/blob/{k}": v for k, v in values.items()}
    return sent(kind=Kind.METRICS, schema=None, flat=None, values=named)


@pytest.fixture
def gate(tmp_path):
    return Outgoing(Ledger(tmp_path / "ledger", KEY), Policy(), to="host:443")


def entries(gate):
    assert verify(gate.ledger.folder, KEY.public_key()).problems == ()
    return list(show(gate.ledger.folder))


def bfloat16(number: float) -> bytes:
    """Round to nearest, ties to even, on the bits of the float32."""
    bits = struct.unpack("<I", struct.pack("<f", number))[0]
    bits += 0x7FFF + (bits >> 16 & 1)
    return struct.pack("<I", bits & 0xFFFF0000)


@pytest.mark.parametrize(
    ("codec", "raw"),
    [("fp32", lambda n: struct.pack("<f", n)), ("bf16", bfloat16)],
)
def test_an_update_is_written_down_as_the_receiver_decodes_it(gate, codec, raw):
    data = sent(codec=codec)
    assert gate.payload(data, SCHEMA) is data
    (entry,) = entries(gate)
    assert (entry.kind, entry.study, entry.round, entry.to) == (
        "update",
        wire.STUDY,
        3,
        "host:443",
    )
    assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert entry.values == {"cases": 12, "loss": 0.5, "started_from": 2}
    pieces = {"b": NUMBERS[:1], "w": NUMBERS[1:]}
    assert {t.name: t.sha256 for t in entry.tensors} == {
        name: hashlib.sha256(b"".join(map(raw, piece))).hexdigest()
        for name, piece in pieces.items()
    }


def test_metrics_and_texts_are_written_down(gate):
    gate.payload(metrics(n_cases="<11"), None)
    assert gate.text("refusal", wire.STUDY, 4, "caf\u00e9") == "caf\u00e9"
    first, second = entries(gate)
    assert (first.kind, first.tensors) == ("metrics", ())
    assert first.values == {"test/north/mr/blob/n_cases": "<11"}
    assert (second.kind, second.round, second.text, second.bytes) == ("refusal", 4, "caf\u00e9", 5)
    assert second.sha256 == hashlib.sha256("caf\u00e9".encode()).hexdigest()


@pytest.mark.parametrize("with_ledger", [True, False])
@pytest.mark.parametrize(
    ("data", "schema"),
    [
        (sent(kind=Kind.EXPERT), SCHEMA),
        (sent(kind=Kind.MODEL), SCHEMA),
        (sent(kind=Kind.METRICS), SCHEMA),
        (sent(schema=None, flat=None), None),
        (sent(values={"cases": 12, "patient": 1}), SCHEMA),
        (sent(values={"test/north/mr/blob/dice": 0.5}), SCHEMA),
        (metrics(age=50), None),
        (sent(kind=Kind.METRICS, schema=None, flat=None, values={"cases": 3}), None),
        (sent()[:-1], SCHEMA),
        (sent(), Schema.of({"w": torch.zeros(2, 2), "phi": torch.zeros(1)})),
        (sent(), None),
    ],
)
def test_nothing_else_leaves_and_nothing_is_written_down(gate, data, schema, with_ledger):
    out = gate if with_ledger else Outgoing(None, Policy())
    with pytest.raises(ExchangeError):
        out.payload(data, schema)
    assert entries(gate) == []


def test_a_value_that_the_site_does_not_allow_stops_the_message(gate):
    out = Outgoing(gate.ledger, Policy(metrics=("dice",)))
    with pytest.raises(ExchangeError, match="loss"):
        out.payload(sent(values={"loss": 0.5}), SCHEMA)
    with pytest.raises(ExchangeError, match="hd95_mm"):
        out.payload(metrics(dice=0.5, hd95_mm=1.0), None)
    assert entries(gate) == []


def test_the_norm_is_measured_once_more():
    assert Outgoing(None, Policy(clip_norm=5.01)).payload(sent(), SCHEMA)
    with pytest.raises(ExchangeError, match="norm"):
        Outgoing(None, Policy(clip_norm=4.0)).payload(sent(), SCHEMA)
    endless = sent(flat=torch.tensor([float("nan")] * 5))
    with pytest.raises(ExchangeError, match="norm"):
        Outgoing(None, Policy(clip_norm=4.0)).payload(endless, SCHEMA)


@pytest.mark.parametrize("text", ["x" * 70_000, "\ud800"])
def test_a_text_that_no_message_can_be_does_not_leave(gate, text):
    with pytest.raises(ExchangeError):
        gate.text("hello", wire.STUDY, 0, text)
    assert entries(gate) == []


def test_what_cannot_be_written_down_does_not_leave(gate, monkeypatch):
    def full(**_: object) -> None:
        raise StoreError("no space")

    monkeypatch.setattr(gate.ledger, "append", full)
    with pytest.raises(StoreError):
        gate.payload(sent(), SCHEMA)
    with pytest.raises(StoreError):
        gate.text("hello", wire.STUDY, 0, "{}")


def test_a_damaged_payload_is_named_as_such(gate):
    with pytest.raises(PayloadError, match="damaged"):
        gate.payload(sent()[:-1] + b"x", SCHEMA)
