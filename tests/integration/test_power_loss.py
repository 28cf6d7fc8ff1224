"""Power cuts: after any of them what is read is old or new, and what was acknowledged is there."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.power_loss import Recorder, recorded
from uharmony_client.local_store import UNFINISHED, LocalStore, RoundKey
from uharmony_client.step_checkpoint import StepCheckpoint
from uharmony_model.atomic import make_directory, recover, write_atomic
from uharmony_model.exchange.schema import Schema, flatten
from uharmony_server.checkpoint import Checkpoint, load_latest, save

STATES = 200
STUDY = "5" * 64
Read = Callable[[Path], object]


def outcomes(recorder: Recorder, read: Read, tmp_path: Path) -> list[tuple[int, object]]:
    """What is read after each of many power cuts, beside how many writes were acknowledged."""
    rng = random.Random(7)  # noqa: S311 - a sample, no secret
    found = []
    for number, cut in enumerate(recorder.cuts(rng, STATES)):
        target = tmp_path / f"after-{number}"
        found.append((recorder.after(cut, rng, target), read(target)))
    return found


def check(recorder: Recorder, wanted: list[object], read: Read, tmp_path: Path) -> None:
    """`wanted[n]` is what the n-th acknowledged write leaves; a later one may have come through."""
    found = outcomes(recorder, read, tmp_path)
    assert len(recorder.acknowledged) == len(wanted) - 1
    for acknowledged, value in found:
        assert value in wanted[acknowledged : acknowledged + 2]
    # Each was seen, and the newer state was sometimes there before it was acknowledged.
    assert {str(value) for _, value in found} == {str(value) for value in wanted}
    assert any(value == wanted[n + 1] for n, value in found if n + 1 < len(wanted))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def test_a_file_is_old_or_new(disk, tmp_path):
    with recorded(disk) as recorder:
        for data in (b"one" * 50, b"two" * 90):
            write_atomic(disk / "file", data)
            recorder.acknowledge()
    check(recorder, [None, b"one" * 50, b"two" * 90], lambda d: content(d / "file"), tmp_path)


def plain(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def without_fsync_of_the_file(path: Path, data: bytes) -> None:
    path.with_name("new").write_bytes(data)
    path.with_name("new").rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def without_fsync_of_the_folder(path: Path, data: bytes) -> None:
    with path.with_name("new").open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    path.with_name("new").rename(path)


@pytest.mark.parametrize(
    ("write", "torn"),
    [(plain, True), (without_fsync_of_the_file, True), (without_fsync_of_the_folder, False)],
)
def test_the_disk_is_bad_enough_to_show_a_careless_writer(disk, tmp_path, write, torn):
    versions = [b"one" * 50, b"two" * 90]
    write_atomic(disk / "file", versions[0])
    with recorded(disk) as recorder:
        write(disk / "file", versions[1])
        recorder.acknowledge()
    found = outcomes(recorder, lambda d: content(d / "file"), tmp_path)
    assert any(value not in versions for _, value in found) is torn
    assert any(acknowledged and value != versions[1] for acknowledged, value in found)


def test_a_directory_that_was_made_is_there(disk, tmp_path):
    with recorded(disk) as recorder:
        make_directory(disk / "a" / "b" / "c")
        recorder.acknowledge()
    check(recorder, [False, True], lambda d: (d / "a" / "b" / "c").is_dir(), tmp_path)


def local(value: int) -> dict[str, torch.Tensor]:
    return {"phi@a": torch.full((40,), float(value))}


def generation(base: Path) -> object:
    """The newest round with its update and what it would carry on; damage would raise."""
    store = LocalStore(base / "site" / "store")
    newest = store.newest(STUDY)
    if newest == 0:
        return (0, None, None)
    found = [(b, data) for b in ("b", "c") if (data := store.update(RoundKey(STUDY, newest, b)))]
    carried = store.before(STUDY, newest + 1)
    assert carried is not None
    ((which, data),) = found
    assert data[:1] == which.encode()
    return (newest, data[:4], float(carried["phi@a"][39]))


def test_generations(disk, tmp_path):
    store = LocalStore(disk / "site" / "store")
    written: list[object] = [(0, None, None)]
    with recorded(disk) as recorder:
        # Five rounds, so that old ones are dropped; then round 5 again from other weights.
        for value, (round_, base) in enumerate([*((r, "b") for r in range(1, 6)), (5, "c")]):
            update = f"{base}{value:03d}".encode()
            store.write(RoundKey(STUDY, round_, base), update * 40, local(value))
            recorder.acknowledge()
            written.append((round_, update, float(value)))

    def read(base: Path) -> object:
        found = generation(base)
        recover(base / "site" / "store")
        assert generation(base) == found
        return found

    check(recorder, written, read, tmp_path)


def test_a_store_that_went_back_stays_back(disk, tmp_path):
    store = LocalStore(disk / "site" / "store")
    for round_ in (1, 2, 3):
        store.write(RoundKey(STUDY, round_, "b"), b"b000" * 40, local(round_))
    with recorded(disk) as recorder:
        store.write(RoundKey(STUDY, 2, "c"), b"c000" * 40, local(9), allow_rollback=True)
        recorder.acknowledge()
    wanted = [(3, b"b000", 3.0), (2, b"c000", 9.0)]
    check(recorder, [*wanted], generation, tmp_path)


def test_step_checkpoints(disk, tmp_path):
    network = nn.Conv3d(1, 2, 3)
    optimizer = torch.optim.AdamW(network.parameters())
    key = RoundKey(STUDY, 4, "b")

    def unfinished(base: Path):
        checkpoint = StepCheckpoint(base / "store", key, every=1)
        return checkpoint.of(network, optimizer, local(0))

    def fill(value: float) -> None:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.fill_(value)

    with recorded(disk) as recorder:
        for step in (1, 2, 3):
            fill(step)
            unfinished(disk).keep(step, step / 3)
            recorder.acknowledge()

    def read(base: Path) -> object:
        fill(0)
        found = unfinished(base).take_up()
        assert all((p == float(found[0])).all() for p in network.parameters())
        return found

    check(recorder, [(0, 0.0), (1, 1 / 3), (2, 2 / 3), (3, 1.0)], read, tmp_path)


def test_the_step_checkpoint_goes_with_the_generation_not_before_it(disk, tmp_path):
    store = LocalStore(disk / "store")
    make_directory(store.folder)
    write_atomic(store.folder / UNFINISHED, b"steps")
    with recorded(disk) as recorder:
        store.write(RoundKey(STUDY, 1, "b"), b"b001", local(1))
        recorder.acknowledge()

    def either(base: Path) -> bool:
        steps = content(base / "store" / UNFINISHED)
        return steps == b"steps" or LocalStore(base / "store").newest(STUDY) == 1

    assert all(found for _, found in outcomes(recorder, either, tmp_path))
    assert not (store.folder / UNFINISHED).exists()


def test_checkpoints_of_the_server(disk, tmp_path):
    tensors = {"conv.weight": torch.zeros(4, 3), "norm.bias": torch.zeros(5)}
    schema = Schema.of(tensors)
    flat = flatten(tensors, schema)
    folder = disk / "rounds"
    make_directory(folder)
    with recorded(disk) as recorder:
        for round_ in range(1, 6):
            save(folder, Checkpoint(round_, flat + round_, schema, STUDY, norms=(float(round_),)))
            recorder.acknowledge()

    def read(base: Path) -> object:
        found = load_latest(base / "rounds", STUDY, schema)
        return None if found is None else (found.round, found.norms, float(found.global_[3]))

    wanted = [None, *((r, (float(r),), float(r)) for r in range(1, 6))]
    check(recorder, list(wanted), read, tmp_path)
