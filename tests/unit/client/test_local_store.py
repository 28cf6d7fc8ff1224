"""Generations: whole or not at all, checked when read, three kept."""

from __future__ import annotations

import stat
from pathlib import Path

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
    store.write(key(1, "another beginning"), b"again", {"phi@a": torch.full((3,), -1.0)})
    assert store.update(key(1, "another beginning")) == b"again"
    found = store.before(STUDY, 2)
    assert found is not None
    assert torch.equal(found["phi@a"], torch.full((3,), -1.0))


@pytest.mark.parametrize("name", ["update.bin", "local.safetensors", "generation.json"])
def test_damage_is_noticed(tmp_path, name):
    store = LocalStore(tmp_path / "store")
    fill(store, 1)
    path = tmp_path / "store/round-000001" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError):
        _ = (store.update(key(1)), store.local(key(1)))


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
