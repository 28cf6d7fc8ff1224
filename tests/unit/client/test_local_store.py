"""Generations: whole or not at all, checked when read, three kept."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from uharmony_client.local_store import KEPT, LocalStore, RoundKey
from uharmony_model.errors import StoreError

STUDY = "s" * 64


def key(round_: int, base: str = "b") -> RoundKey:
    return RoundKey(STUDY, round_, base)


def fill(store: LocalStore, rounds: int) -> None:
    for r in range(1, rounds + 1):
        store.write(key(r), f"update {r}".encode(), {"phi@a": torch.full((3,), float(r))})


def test_a_round_is_found_by_its_whole_key(tmp_path):
    store = LocalStore(tmp_path / "store")
    fill(store, 2)
    assert store.update(key(2)) == b"update 2"
    assert store.update(key(2, "other base")) is None
    assert store.update(key(3)) is None
    with pytest.raises(StoreError, match="written for study"):
        store.update(RoundKey("t" * 64, 2, "b"))


def test_a_round_starts_from_the_newest_one_before_it(tmp_path):
    store = LocalStore(tmp_path / "store")
    fill(store, 3)
    for round_, expected in ((2, 1.0), (3, 2.0), (4, 3.0), (9, 3.0)):
        found = store.before(STUDY, round_)
        assert found is not None
        assert torch.equal(found["phi@a"], torch.full((3,), expected))


def test_a_newcomer_starts_at_any_round_without_parameters(tmp_path):
    assert LocalStore(tmp_path / "store").before(STUDY, 7) is None


def test_the_last_three_are_kept_and_an_older_round_is_refused(tmp_path):
    store = LocalStore(tmp_path / "store")
    fill(store, KEPT + 2)
    assert len(list((tmp_path / "store").iterdir())) == KEPT
    with pytest.raises(StoreError, match="keeps rounds"):
        store.before(STUDY, 2)
    assert store.before(STUDY, 1) is None  # a first round needs nothing from before


def test_a_study_that_starts_again_leaves_the_later_rounds_behind(tmp_path):
    store = LocalStore(tmp_path / "store")
    fill(store, KEPT + 2)
    again = {"phi@a": torch.full((3,), -1.0)}
    store.write(key(1, "another beginning"), b"again", again, allow_rollback=True)
    assert store.update(key(1, "another beginning")) == b"again"
    assert store.newest(STUDY) == 1
    found = store.before(STUDY, 2)
    assert found is not None
    assert torch.equal(found["phi@a"], torch.full((3,), -1.0))


@pytest.mark.parametrize("round_", [1, 4])
def test_nothing_goes_back_unless_the_operator_says_so(tmp_path, round_):
    store = LocalStore(tmp_path / "store")
    fill(store, KEPT + 2)
    before = {p: p.read_bytes() for p in store.folder.rglob("*") if p.is_file()}
    message = r"before rounds \[.*5\] .* policy.allow_rollback: true in site.yaml"
    with pytest.raises(StoreError, match=message):
        store.write(key(round_, "earlier"), b"again", {})
    assert {p: p.read_bytes() for p in store.folder.rglob("*") if p.is_file()} == before
    store.write(key(KEPT + 2, "the newest round again"), b"again", {})


def test_it_says_what_it_has_and_what_a_round_starts_from(tmp_path):
    store = LocalStore(tmp_path / "store")
    assert store.newest(STUDY) == 0
    assert [store.started_from(STUDY, r) for r in (1, 7)] == [0, 0]
    for round_ in (1, 2, 5):
        store.write(key(round_), b"update", {})
    assert store.newest(STUDY) == 5
    # Round 4 did not reach this site: round 5 began from 2, and 6 begins from 5.
    assert [store.started_from(STUDY, r) for r in (1, 2, 3, 5, 6, 99)] == [0, 1, 2, 2, 5, 5]
    with pytest.raises(StoreError, match="written for study"):
        store.newest("t" * 64)
    fill(LocalStore(tmp_path / "late"), KEPT + 2)
    with pytest.raises(StoreError, match="keeps rounds"):
        LocalStore(tmp_path / "late").started_from(STUDY, 2)


def test_a_generation_set_aside_by_a_cut_counts_until_its_successor_is_there(tmp_path):
    store = LocalStore(tmp_path / "store")
    fill(store, 2)
    (store.folder / "round-000002").rename(store.folder / ".round-000002.old")
    assert store.newest(STUDY) == 2
    assert store.started_from(STUDY, 3) == 2
    assert store.update(key(2)) == b"update 2"
    found = store.before(STUDY, 3)
    assert found is not None
    assert torch.equal(found["phi@a"], torch.full((3,), 2.0))


NAMES = ["update.bin", "local.safetensors", "generation.json"]


def damages(data: bytes) -> list[bytes | None]:
    """Bit flips at the ends and at sampled places, truncations, and no file at all."""
    rng = np.random.default_rng(11)
    found: list[bytes | None] = [None, b"", data[:-1], data[: len(data) // 2], data + b" "]
    for place in [0, len(data) - 1, *rng.integers(0, len(data), 60)]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        found.append(bytes(flipped))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_noticed(tmp_path, name):
    store = LocalStore(tmp_path / "store")
    fill(store, 2)
    path = tmp_path / "store/round-000002" / name
    for data in damages(path.read_bytes()):
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
        # Never an answer from a damaged round, never training it anew, never an earlier state.
        with pytest.raises(StoreError, match="damaged"):
            store.update(key(2))
        if name != "update.bin":
            with pytest.raises(StoreError, match="damaged"):
                store.local(key(2))
            with pytest.raises(StoreError, match="damaged"):
                store.before(STUDY, 3)
        if name == "generation.json":
            with pytest.raises(StoreError, match="damaged"):
                store.newest(STUDY)
    assert store.update(key(1)) == b"update 1"


def test_nobody_else_can_read_it(tmp_path):
    store = LocalStore(tmp_path / "store")
    fill(store, 1)
    folder = tmp_path / "store/round-000001"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_write_that_fails_leaves_the_round_before(tmp_path, monkeypatch):
    store = LocalStore(tmp_path / "store")
    fill(store, 1)

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(StoreError, match="No space"):
            store.write(key(2), b"update 2", {})
    assert store.update(key(2)) is None
    found = store.before(STUDY, 2)
    assert found is not None
    fill(store, 2)
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == [
        "round-000001",
        "round-000002",
    ]


@pytest.mark.parametrize("first", [2, 33])
def test_who_came_late_had_nothing_before(tmp_path, first):
    """What was made from nothing tells that there was nothing, however late it was made."""
    store = LocalStore(tmp_path / "store")
    store.write(key(first), b"u", {"phi@a": torch.ones(3)})
    assert store.started_from(STUDY, first) == 0
    assert store.before(STUDY, first) is None
    assert store.newest(STUDY, up_to=first - 1) == 0
    assert store.newest(STUDY, up_to=first) == store.newest(STUDY) == first
    for later in range(first + 1, first + KEPT):
        store.write(key(later), b"u", {})
    assert store.before(STUDY, first) is None
    store.write(key(first + KEPT), b"u", {})  # the round made from nothing is dropped now
    with pytest.raises(StoreError, match="keeps rounds"):
        store.before(STUDY, first + 1)


def test_a_round_made_anew_from_what_is_not_kept_claims_nothing(tmp_path):
    store = LocalStore(tmp_path / "store")
    fill(store, KEPT + 2)
    store.write(key(2), b"again", {}, allow_rollback=True)
    with pytest.raises(StoreError, match=r"keeps rounds \[2\]"):
        store.before(STUDY, 2)


def test_a_record_without_what_it_started_from_is_read_and_claims_nothing(tmp_path):
    """As they were written before: five facts, sealed with the SHA-256 of their canonical text."""
    store = LocalStore(tmp_path / "store")
    store.write(key(33), b"u", {"phi@a": torch.ones(3)})
    path = store.folder / "round-000033" / "generation.json"
    facts = json.loads(path.read_text())["facts"]
    assert facts.pop("started_from") == 0

    def canonical(content):
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    seal = hashlib.sha256(canonical(facts).encode()).hexdigest()
    path.write_text(canonical({"sha256": seal, "facts": facts}))
    assert store.update(key(33)) == b"u"
    assert store.newest(STUDY, up_to=32) == 0
    with pytest.raises(StoreError, match="keeps rounds"):
        store.before(STUDY, 33)


def test_the_mark_is_that_of_what_a_round_starts_from(tmp_path):
    one, other = LocalStore(tmp_path / "one"), LocalStore(tmp_path / "other")
    nothing = one.mark_before(2)
    fill(one, 1)
    fill(other, 1)
    mark = one.mark_before(2)
    assert nothing == one.mark_before(1) == hashlib.sha256(b"").hexdigest()
    assert mark == other.mark_before(2) != nothing
    fill(one, 2)  # a later round changes nothing of it
    assert one.mark_before(2) == mark
    other.write(key(1), b"update 1", {"phi@a": torch.zeros(3)})
    assert other.mark_before(2) != mark
