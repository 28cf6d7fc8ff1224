from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import wire
from tests.support.kill import Countdown, Killed, killed_at
from uharmony_model.errors import StoreError
from uharmony_model.exchange.payload import digest
from uharmony_model.exchange.schema import Schema, flatten
from uharmony_server import checkpoint as module
from uharmony_server.admission import Refusal, RefusalReason
from uharmony_server.checkpoint import Checkpoint, load_latest, save

STATE = {"w": torch.arange(6.0).reshape(2, 3) / 7, "b": torch.tensor(1.5), "e": torch.empty(0)}
SCHEMA = Schema.of(STATE)


def made(number: int, **changes) -> Checkpoint:
    fields: dict[str, Any] = {
        "round": number,
        "global_": flatten(STATE, SCHEMA) + number,
        "schema": SCHEMA,
        "study": wire.STUDY,
        "norms": (0.1, 1 / 3),
        "refusals": (
            Refusal(site="a", round=number, reason=RefusalReason.NOT_FINITE, detail="NaN"),
        ),
        "records": ({"site": "a", "dice": None, "class": "tumor", "n": [1, 2.5]},),
        "bytes_up": (120, 340),
    }
    return Checkpoint(**(fields | changes))


def load(folder: Path) -> Checkpoint | None:
    return load_latest(folder, wire.STUDY, SCHEMA)


def assert_same(got: Checkpoint | None, expected: Checkpoint) -> None:
    assert got is not None
    assert torch.equal(got.global_, expected.global_)
    names = ("round", "schema", "study", "norms", "refusals", "records", "bytes_up", "digest")
    for name in names:
        assert getattr(got, name) == getattr(expected, name), name


def test_what_is_saved_is_loaded(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    path = save(folder, made(7))
    assert path == folder / "round-000007"
    assert_same(load(folder), made(7))
    assert made(7).digest == digest(made(7).global_)


def test_the_files_can_be_read_without_us(tmp_path):
    path = save(tmp_path, made(7))
    tensors = load_file(path / "weights.safetensors")
    assert torch.equal(tensors["w"], STATE["w"] + 7)
    state = json.loads((path / "state.json").read_text())["state"]
    assert (state["round"], state["study"], state["records"][0]["dice"]) == (7, wire.STUDY, None)
    assert {p.name for p in path.iterdir()} == {"weights.safetensors", "state.json"}


def test_nothing_is_none(tmp_path):
    assert load(tmp_path) is None
    assert load(tmp_path / "nowhere") is None


def test_the_newest_by_number_is_loaded_and_three_are_kept(tmp_path):
    for number in (8, 9, 10, 11):
        save(tmp_path, made(number))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "round-000009",
        "round-000010",
        "round-000011",
    ]
    assert_same(load(tmp_path), made(11))
    save(tmp_path, made(1_000_000))
    assert_same(load(tmp_path), made(1_000_000))


def test_an_empty_federation_state_is_saved(tmp_path):
    empty = Schema.of({})
    bare = Checkpoint(round=0, global_=torch.empty(0), schema=empty, study=wire.STUDY)
    save(tmp_path, bare)
    assert_same(load_latest(tmp_path, wire.STUDY, empty), bare)


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json"])
def test_any_flipped_byte_in_the_newest_is_found(tmp_path, name, caplog):
    save(tmp_path, made(1))
    path = save(tmp_path, made(2)) / name
    whole = path.read_bytes()
    fallen_back = 0
    caplog.set_level(logging.CRITICAL, logger="uharmony_server.checkpoint")
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x40
        path.write_bytes(damaged)
        got = load(tmp_path)
        assert got is not None
        fallen_back += got.round == 1
        # A flip that changes no number (in the padding of a header) may be accepted, as nothing
        # is lost; anything else is the state of the round before.
        assert_same(got, made(got.round))
    assert fallen_back > 0.95 * len(whole)


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json"])
@pytest.mark.parametrize("length", [0, 1, 50, -1])
def test_a_truncated_newest_falls_back_and_says_so(tmp_path, name, length, caplog):
    save(tmp_path, made(1))
    path = save(tmp_path, made(2)) / name
    path.write_bytes(path.read_bytes()[:length])
    assert_same(load(tmp_path), made(1))
    assert "round-000002: damaged" in caplog.text
    assert "falling back" in caplog.text


def test_missing_files_fall_back(tmp_path):
    save(tmp_path, made(1))
    (save(tmp_path, made(2)) / "weights.safetensors").unlink()
    (tmp_path / "round-000003").mkdir()
    assert_same(load(tmp_path), made(1))


def test_a_checkpoint_under_another_number_is_damaged(tmp_path):
    save(tmp_path, made(1)).rename(tmp_path / "round-000009")
    with pytest.raises(StoreError, match="none of 1 checkpoints"):
        load(tmp_path)


def test_when_none_is_whole_the_run_does_not_start_again_silently(tmp_path):
    for number in (1, 2):
        (save(tmp_path, made(number)) / "state.json").write_bytes(b"")
    with pytest.raises(StoreError, match="none of 2 checkpoints can be read"):
        load(tmp_path)


def test_another_study_or_schema_is_an_error_and_not_a_fall_back(tmp_path):
    save(tmp_path, made(1))
    with pytest.raises(StoreError, match="a changed study is a new study"):
        load_latest(tmp_path, "f" * 64, SCHEMA)
    with pytest.raises(StoreError, match="a changed study is a new study"):
        load_latest(tmp_path, wire.STUDY, Schema.of({"w": torch.zeros(7)}))


def test_a_round_that_is_done_again_replaces_its_damaged_checkpoint(tmp_path):
    save(tmp_path, made(1))
    (save(tmp_path, made(2)) / "state.json").write_bytes(b"")
    assert_same(load(tmp_path), made(1))
    again = made(2, norms=(9.0,))
    save(tmp_path, again)
    assert_same(load(tmp_path), again)


def test_stray_temporary_directories_are_cleaned(tmp_path):
    save(tmp_path, made(1))
    stray = tmp_path / ".round-000002.tmp-abc"
    stray.mkdir()
    (stray / "weights.safetensors").write_bytes(b"half")
    assert_same(load(tmp_path), made(1))
    assert [p.name for p in tmp_path.iterdir()] == ["round-000001"]


@pytest.mark.parametrize("existing", [(), (1,), (1, 2, 3), (1, 2, 3, 4)])
def test_old_or_new_wherever_the_kill_falls(tmp_path, existing, monkeypatch):
    """Also for round 4 done again; a kill within the weights' own writing leaves half a file."""
    active: list[Countdown] = []

    def half_then_whole(tensors, path):
        path.write_bytes(b"half")
        for countdown in active:
            countdown.step()
        save_file(tensors, path)

    monkeypatch.setattr(module, "save_file", half_then_whole)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # speed; the order is tested with atomic
    before = max(existing, default=None)
    outcomes, at, done = set(), 0, False
    while not done:
        folder = tmp_path / str(at)
        folder.mkdir()
        for number in existing:
            save(folder, made(number))
        with killed_at(at) as countdown:
            active.append(countdown)
            save(folder, made(4, norms=(4.0,)))
        done = countdown.calls <= at
        active.clear()
        got = load(folder)
        if got is None:
            assert before is None
        elif got.norms == (4.0,):
            assert_same(got, made(4, norms=(4.0,)))
        else:
            assert before is not None
            assert_same(got, made(before))
        outcomes.add(None if got is None else got.norms)
        assert all(not p.name.startswith(".") for p in folder.iterdir())
        save(folder, made(5))
        assert_same(load(folder), made(5))
        at += 1
    assert outcomes == {(4.0,), None if before is None else (0.1, 1 / 3)}


def test_the_kill_is_not_swallowed_by_our_own_error_handling():
    assert not issubclass(Killed, Exception)


@pytest.mark.parametrize(
    "changes",
    [
        {"records": ({"dice": float("nan")},)},
        {"records": ({"folder": Path("/x")},)},
        {"norms": (float("inf"),)},
        {"global_": torch.zeros(3)},
    ],
)
def test_what_is_no_state_is_refused_and_the_earlier_ones_stay(tmp_path, changes):
    save(tmp_path, made(1))
    with pytest.raises(StoreError, match="checkpoint not written"):
        save(tmp_path, made(2, **changes))
    assert_same(load(tmp_path), made(1))
    assert [p.name for p in tmp_path.iterdir()] == ["round-000001"]


@pytest.mark.parametrize("name", ["save_file", "replace_directory"])
def test_a_full_disk_leaves_the_earlier_ones_and_nothing_else(tmp_path, monkeypatch, name):
    save(tmp_path, made(1))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, name, full)
    with pytest.raises(StoreError, match="No space left"):
        save(tmp_path, made(2))
    assert [p.name for p in tmp_path.iterdir()] == ["round-000001"]
    assert_same(load(tmp_path), made(1))


def test_a_folder_that_cannot_be_made_is_our_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="checkpoint not written"):
        save(tmp_path / "file" / "inner", made(1))
