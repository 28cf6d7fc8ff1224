"""Whatever is done to a ledger's bytes, `verify` finds it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from uharmony_client.ledger import Ledger
from uharmony_client.ledger_check import verify

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
COUNT = 5
FILES = ("ledger.jsonl", "head.json", "receipts.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "ledger"
    ledger = Ledger(folder, KEY, clock=lambda: 1_700_000_000)
    for number in range(COUNT):
        head = ledger.append(
            kind="metrics",
            study="a" * 64,
            round_=number,
            to="host:443",
            data=b"message %d" % number,
            values={"cases": 12, "loss": 0.1 * number},
        )
    ledger.add_receipt(*head, "2023-11-14T22:13:21Z")
    assert verify(folder, KEY.public_key()).problems == ()
    return folder


def changed(whole: Path, name: str, data: bytes) -> tuple[str, ...]:
    folder = whole.parent / "changed"
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(data)
    found = verify(folder, KEY.public_key()).problems
    shutil.rmtree(folder)
    return found


@given(st.data())
@settings(max_examples=300)
def test_a_flipped_bit_anywhere(whole, data):
    name = data.draw(st.sampled_from(FILES))
    content = bytearray((whole / name).read_bytes())
    at = data.draw(st.integers(0, len(content) * 8 - 1))
    content[at // 8] ^= 1 << at % 8
    assert changed(whole, name, bytes(content))


@given(st.data())
def test_bytes_cut_off_or_added(whole, data):
    name = data.draw(st.sampled_from(FILES[:2]))
    content = (whole / name).read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    assert changed(whole, name, content[:at])
    extra = data.draw(st.binary(min_size=1, max_size=8))
    assert changed(whole, name, content[:at] + extra + content[at:])


@given(st.lists(st.integers(0, COUNT - 1), max_size=COUNT + 2))
def test_any_other_sequence_of_the_same_lines(whole, order):
    lines = (whole / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    found = changed(whole, "ledger.jsonl", b"".join(lines[i] for i in order))
    assert (found == ()) == (order == list(range(COUNT)))
