"""The ledger against a second reading of its lines with json, hashlib and Ed25519 alone."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support.kill import Killed, killed_at
from uharmony_client.ledger import Ledger, tensor_facts
from uharmony_client.ledger_check import show, verify
from uharmony_model.errors import StoreError
from uharmony_model.exchange.schema import Schema, flatten

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
PUBLIC = KEY.public_key()
STUDY = "a" * 64
TENSORS = {"w": torch.tensor([[1.0, -2.5]]), "b": torch.tensor([3.0])}
SCHEMA = Schema.of(TENSORS)


def opened(folder, key=KEY):
    return Ledger(folder / "ledger", key, clock=lambda: 1_700_000_000.9)


def add(ledger, number=1, **changes):
    fields = {"kind": "metrics", "study": STUDY, "round_": number, "to": "host:443"}
    return ledger.append(**{**fields, "data": b"message %d" % number, **changes})


def filled(folder, count=3):
    ledger = opened(folder)
    for number in range(1, count + 1):
        add(ledger, number)
    return folder / "ledger"


def problems(folder):
    return verify(folder, PUBLIC).problems


def test_an_entry_says_what_left_in_canonical_json_signed_and_chained(tmp_path):
    ledger = opened(tmp_path)
    facts = tensor_facts(flatten(TENSORS, SCHEMA), SCHEMA)
    add(ledger, 1, kind="update", tensors=facts, values={"cases": 12, "loss": 0.5})
    head = add(ledger, 2)
    first, second = (tmp_path / "ledger/ledger.jsonl").read_bytes().splitlines()
    fields = json.loads(first)
    signature = bytes.fromhex(fields.pop("signature"))
    PUBLIC.verify(signature, json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())
    assert fields == {
        "seq": 1,
        "time": "2023-11-14T22:13:20Z",
        "study": STUDY,
        "round": 1,
        "kind": "update",
        "to": "host:443",
        "bytes": 9,
        "sha256": hashlib.sha256(b"message 1").hexdigest(),
        "tensors": [
            {
                "name": name,
                "dtype": "float32",
                "shape": shape,
                "bytes": len(raw),
                "sha256": hashlib.sha256(raw).hexdigest(),
            }
            for name, shape, raw in (
                ("b", [1], struct.pack("<f", 3.0)),
                ("w", [1, 2], struct.pack("<2f", 1.0, -2.5)),
            )
        ],
        "values": {"cases": 12, "loss": 0.5},
        "text": "",
        "prev": "0" * 64,
        "key": PUBLIC.public_bytes_raw().hex(),
    }
    assert json.loads(second)["prev"] == hashlib.sha256(first).hexdigest()
    assert head == (2, hashlib.sha256(second).hexdigest())
    assert verify(tmp_path / "ledger", PUBLIC).head == head
    assert problems(tmp_path / "ledger") == ()


def test_the_files_are_this_users_alone(tmp_path):
    folder = filled(tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_it_goes_on_after_a_restart_and_a_resend_is_a_new_entry(tmp_path):
    folder = filled(tmp_path)
    assert add(opened(tmp_path), 3).seq == 4
    third, fourth = list(show(folder))[2:]
    assert third.sha256 == fourth.sha256
    assert problems(folder) == ()


def test_two_writers_take_turns(tmp_path):
    one, two = opened(tmp_path), opened(tmp_path)
    assert [add(ledger).seq for ledger in (one, two, two, one)] == [1, 2, 3, 4]
    assert problems(tmp_path / "ledger") == ()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("keep", [1, 200, -1])
def test_a_torn_last_line_is_set_aside_and_the_chain_goes_on(tmp_path, caplog, count, keep):
    folder = filled(tmp_path, count)
    path, head = folder / "ledger.jsonl", (folder / "head.json").read_bytes()
    size = path.stat().st_size
    add(opened(tmp_path), 9)
    torn = path.read_bytes()[size:][:keep]
    path.write_bytes(path.read_bytes()[:size] + torn)
    (folder / "head.json").write_bytes(head)  # it is written after the line
    assert len(problems(folder)) == 1
    assert add(opened(tmp_path), 9).seq == count + 1
    assert (folder / "torn-0001.txt").read_bytes() == torn
    assert "torn" in caplog.text
    assert problems(folder) == ()


def test_a_whole_last_line_whose_head_was_not_written_counts(tmp_path):
    folder = filled(tmp_path)
    head = (folder / "head.json").read_bytes()
    last = add(opened(tmp_path), 4)
    (folder / "head.json").write_bytes(head)
    assert opened(tmp_path).head == last
    assert json.loads((folder / "head.json").read_bytes())["seq"] == 4


def test_the_first_line_torn_leaves_an_empty_ledger(tmp_path):
    opened(tmp_path)
    (tmp_path / "ledger/ledger.jsonl").write_bytes(b'{"bytes":')
    assert add(opened(tmp_path)).seq == 1
    assert problems(tmp_path / "ledger") == ()


def damage_last(folder):
    path = folder / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-10] + b"x" * 9 + b"\n")


def cut_last(folder):
    path = folder / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize(
    "damage",
    [
        damage_last,
        cut_last,
        lambda folder: (folder / "ledger.jsonl").write_bytes(b""),
        lambda folder: (folder / "head.json").unlink(),
        lambda folder: (folder / "head.json").write_bytes(b"{}"),
    ],
)
def test_nothing_but_a_torn_line_is_repaired(tmp_path, damage):
    folder = filled(tmp_path)
    damage(folder)
    before = (folder / "ledger.jsonl").read_bytes()
    with pytest.raises(StoreError):
        opened(tmp_path)
    assert (folder / "ledger.jsonl").read_bytes() == before
    assert problems(folder)


def test_another_sites_folder_is_refused(tmp_path):
    filled(tmp_path)
    with pytest.raises(StoreError, match="key"):
        opened(tmp_path, OTHER)


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_leaves_the_ledger_as_it_was(tmp_path, monkeypatch, call):
    ledger = opened(tmp_path)
    add(ledger)
    before = (tmp_path / "ledger/ledger.jsonl").read_bytes()
    write = os.write

    def full(descriptor, *data):
        if data:
            write(descriptor, data[0][:50])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(StoreError, match="No space"):
            add(ledger, 2)
    assert (tmp_path / "ledger/ledger.jsonl").read_bytes() == before
    assert add(ledger, 2).seq == 2
    assert problems(tmp_path / "ledger") == ()


def test_killed_anywhere_in_an_entry_the_next_start_goes_on(tmp_path):
    for at in range(40):
        with killed_at(10**9):
            folder = tmp_path / str(at)
            ledger = opened(folder)
            add(ledger)
        with killed_at(at) as calls:
            add(ledger, 2)
        again = opened(folder)
        assert again.head.seq in (1, 2)
        assert add(again, 3).seq == again.head.seq
        assert problems(folder / "ledger") == ()
        if calls.calls <= at:
            return
    raise AssertionError("an entry never came to its end")


def test_killed_in_the_middle_of_a_line_the_next_start_sets_it_aside(tmp_path, monkeypatch):
    ledger = opened(tmp_path)
    head = add(ledger)
    write = os.write

    def killed(descriptor, data):
        write(descriptor, data[:77])
        raise Killed

    def nothing(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", killed)
        patch.setattr(os, "ftruncate", nothing)
        with pytest.raises(Killed):
            add(ledger, 2)
    again = opened(tmp_path)
    assert again.head == head
    assert len((tmp_path / "ledger/torn-0001.txt").read_bytes()) == 77
    assert add(again, 2).seq == 2
    assert problems(tmp_path / "ledger") == ()


def test_receipts_are_kept_for_entries_that_are_here_only(tmp_path):
    ledger = opened(tmp_path)
    heads = [add(ledger, number) for number in (1, 2, 3)]
    for head in heads[:2]:
        ledger.add_receipt(head.seq, head.sha256, "2023-11-14T22:13:21Z")
    lines = (tmp_path / "ledger/receipts.jsonl").read_text().splitlines()
    assert [json.loads(line)["seq"] for line in lines] == [1, 2]
    for seq, sha256 in ((4, "0" * 64), (1, heads[1].sha256), (0, "0" * 64), (3, "x")):
        with pytest.raises(StoreError):
            ledger.add_receipt(seq, sha256, "2023-11-14T22:13:21Z")
    assert problems(tmp_path / "ledger") == ()


def test_a_receipt_finds_what_a_forged_head_would_hide(tmp_path):
    ledger = opened(tmp_path)
    add(ledger, 1)
    old = (tmp_path / "ledger/head.json").read_bytes()
    last = add(ledger, 2)
    ledger.add_receipt(*last, "2023-11-14T22:13:21Z")
    folder = tmp_path / "ledger"
    cut_last(folder)
    (folder / "head.json").write_bytes(old)  # an older head, rightly signed
    (problem,) = problems(folder)
    assert "receipt" in problem


def test_another_key_and_a_doubled_number_are_named(tmp_path):
    folder = filled(tmp_path)
    filled(tmp_path / "copy")
    assert any("another key" in p for p in verify(folder, OTHER.public_key()).problems)
    path = folder / "ledger.jsonl"
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, first, *rest]))
    assert any("doubled" in problem for problem in problems(folder))


def test_a_line_of_another_history_of_the_same_site_is_found(tmp_path):
    folder = filled(tmp_path)
    other = tmp_path / "other"
    ledger = opened(other)
    add(ledger, 1)
    add(ledger, 22)
    lines = (folder / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    foreign = (other / "ledger/ledger.jsonl").read_bytes().splitlines(keepends=True)
    assert lines[0] == foreign[0]
    (folder / "ledger.jsonl").write_bytes(lines[0] + foreign[1] + lines[2])
    (problem,) = problems(folder)  # each line by itself is in order
    assert problem == "entry 3 (line 3) follows another line than the one before it"


def test_an_empty_ledger_is_whole_and_a_missing_one_with_a_head_is_not(tmp_path):
    opened(tmp_path)
    assert verify(tmp_path / "ledger", PUBLIC).entries == 0
    assert problems(tmp_path / "ledger") == ()
    folder = filled(tmp_path / "b")
    (folder / "ledger.jsonl").unlink()
    assert problems(folder)
