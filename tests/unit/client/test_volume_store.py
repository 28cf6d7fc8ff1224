from __future__ import annotations

import json
import logging
import os
import stat
import time

import numpy as np
import pytest

from uharmony_client import volume_store
from uharmony_client.case_table import Case
from uharmony_client.site_data import prepare
from uharmony_client.volume_store import VolumeStore, entry_key, find_foreground
from uharmony_model.errors import DataError, StoreError

IMAGE = np.random.default_rng(0).normal(100, 20, (3, 4, 5)).astype("f4")
LABEL = np.random.default_rng(1).integers(0, 4, (3, 4, 5)).astype("u1")


@pytest.fixture
def case(write_nifti):
    return Case(
        case="c", patient="p", site="north", domain="north", modality=("T1",),
        image=(write_nifti("i.nii.gz", IMAGE),), label=write_nifti("l.nii.gz", LABEL),
    )  # fmt: skip


@pytest.fixture
def built():
    return []


@pytest.fixture
def store(tmp_path, built):
    return VolumeStore(tmp_path / "volumes", on_build=built.append)


def entries(store):
    return sorted(path.name for path in store.folder.iterdir())


def test_what_is_opened_is_what_was_prepared(store, case, study, config):
    volume = store.open(case, study.task, config)
    direct = prepare(case, study.task, config)
    np.testing.assert_array_equal(volume.image, direct.image)
    np.testing.assert_array_equal(volume.label, direct.label)
    assert volume.grid == direct.grid
    assert volume.spacing_mm == (2.0, 3.0, 4.0)
    assert volume.image.dtype == np.float32
    assert isinstance(volume.image, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        volume.image[0, 0, 0, 0] = 1
    store.verify(volume)


def test_a_case_is_prepared_once(store, case, study, config, built, monkeypatch):
    first = store.open(case, study.task, config)
    monkeypatch.setattr(volume_store, "prepare", lambda *_: pytest.fail("prepared again"))
    second = VolumeStore(store.folder, on_build=built.append).open(case, study.task, config)
    np.testing.assert_array_equal(first.image, second.image)
    assert built == [case]
    assert entries(store) == [first.key]


def test_foreground_lists_every_labelled_voxel_with_its_value(store, case, study, config):
    volume = store.open(case, study.task, config)
    assert volume.foreground.dtype == np.int32
    x, y, z, value = volume.foreground.T
    np.testing.assert_array_equal(np.asarray(volume.label)[x, y, z], value)
    assert len(volume.foreground) == np.count_nonzero(LABEL)
    assert len(np.unique(volume.foreground, axis=0)) == len(volume.foreground)


def test_foreground_is_capped_evenly_and_repeatably(monkeypatch):
    monkeypatch.setattr(volume_store, "FOREGROUND_PER_VALUE", 50)
    label = np.zeros((10, 10, 10), np.uint8)
    label[:5] = 1  # 500 voxels
    label[9, 9, :3] = 2
    first = find_foreground(label, "key")
    np.testing.assert_array_equal(first, find_foreground(label, "key"))
    assert not np.array_equal(first, find_foreground(label, "other"))
    assert np.count_nonzero(first[:, 3] == 1) == 50
    assert np.count_nonzero(first[:, 3] == 2) == 3
    assert len(np.unique(first, axis=0)) == 53
    # Evenly: the mean index of 50 of 0..4 has a standard deviation of 0.2.
    assert abs(first[first[:, 3] == 1, 0].mean() - 2) < 0.8


def test_a_case_without_label_has_no_foreground(store, case, study, config):
    volume = store.open(case.model_copy(update={"label": None}), study.task, config)
    assert volume.label is None
    assert volume.foreground.shape == (0, 4)


def test_the_key_follows_what_decides_the_content(case, study, config, write_nifti):
    task = study.task
    keys = {entry_key(case, task, config)}
    for update in (
        {"spacing_mm": (1.0, 1.0, 1.0)},
        {"classes": {"edema": (1, 3), "core": (2, 4)}},
        {"intensity": {"T1": task.intensity["T1"].model_copy(update={"nonzero": True})}},
    ):
        keys.add(entry_key(case, task.model_copy(update=update), config))
    for site in (
        config.model_copy(update={"label_map": {3: 1}}),
        config.model_copy(update={"annotated": ("edema",)}),
    ):
        keys.add(entry_key(case, task, site))
    keys.add(entry_key(case.model_copy(update={"label": None}), task, config))
    write_nifti("i.nii.gz", IMAGE + 1)
    keys.add(entry_key(case, task, config))
    write_nifti("l.nii.gz", LABEL[::-1].copy())
    keys.add(entry_key(case, task, config))
    assert len(keys) == 9


def test_the_key_does_not_follow_names_and_places(case, study, config, write_nifti):
    write_nifti("elsewhere/i.nii.gz", IMAGE)
    moved = case.model_copy(
        update={"case": "d", "patient": "q", "domain": "other", "split": "test"}
    )
    assert entry_key(moved, study.task, config) == entry_key(case, study.task, config)


def test_a_changed_file_gives_a_new_entry(store, case, study, config, write_nifti):
    before = store.open(case, study.task, config)
    write_nifti("i.nii.gz", IMAGE[::-1].copy())
    after = store.open(case, study.task, config)
    assert before.key != after.key
    assert not np.array_equal(before.image, after.image)


@pytest.mark.parametrize("name", ["image.npy", "label.npy", "foreground.npy", "record.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "empty", "header"])
def test_a_damaged_entry_is_built_again(store, case, study, config, built, caplog, name, damage):
    key = store.open(case, study.task, config).key
    path = store.folder / key / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        changed = {
            "truncated": content[:-1],
            "longer": content + b"x",
            "empty": b"",
            "header": b"XXXX" + content[4:],
        }
        path.write_bytes(changed[damage])
    with caplog.at_level(logging.WARNING):
        again = store.open(case, study.task, config)
    assert "preparing the case again" in caplog.text
    assert len(built) == 2
    assert path.read_bytes() == content
    store.verify(again)
    assert entries(store) == [key]


def test_a_record_of_another_entry_or_version_is_not_believed(store, case, study, config, built):
    key = store.open(case, study.task, config).key
    path = store.folder / key / "record.json"
    for change in ({"key": "0" * 64}, {"version": 0}):
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        store.open(case, study.task, config)
    assert len(built) == 3


def test_a_record_cannot_name_files_elsewhere(store, case, study, config, built):
    key = store.open(case, study.task, config).key
    path = store.folder / key / "record.json"
    record = json.loads(path.read_text())
    record["arrays"]["../../secret"] = record["arrays"].pop("label")
    path.write_text(json.dumps(record))
    store.open(case, study.task, config)
    assert len(built) == 2


def test_verify_finds_a_changed_byte_that_sizes_do_not_show(store, case, study, config):
    volume = store.open(case, study.task, config)
    path = store.folder / volume.key / "image.npy"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    store.open(case, study.task, config)
    with pytest.raises(StoreError, match=r"image\.npy: damaged"):
        store.verify(volume)


def test_entries_are_private(store, case, study, config):
    old = os.umask(0)
    try:
        volume = store.open(case, study.task, config)
    finally:
        os.umask(old)
    entry = store.folder / volume.key
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(entry.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in entry.iterdir()} == {0o600}


def test_names_of_patients_and_cases_are_not_stored(store, study, config, write_nifti):
    secret = Case(
        case="ERIKA", patient="MUSTERMANN", site="north", domain="north", modality=("T1",),
        image=(write_nifti("ERIKA.nii.gz", IMAGE, descrip=b"MUSTERMANN"),),
    )  # fmt: skip
    volume = store.open(secret, study.task, config)
    for path in (store.folder / volume.key).iterdir():
        assert b"ERIKA" not in path.read_bytes()
        assert b"MUSTERMANN" not in path.read_bytes()


def test_of_two_processes_the_slower_one_takes_what_is_there(
    store, case, study, config, monkeypatch
):
    fast = VolumeStore(store.folder)

    def prepare_while_another_does(*args):
        monkeypatch.setattr(volume_store, "prepare", prepare)
        fast.open(case, study.task, config)
        return prepare(*args)

    monkeypatch.setattr(volume_store, "prepare", prepare_while_another_does)
    volume = store.open(case, study.task, config)
    assert entries(store) == [volume.key]
    store.verify(volume)


def test_a_failed_build_leaves_nothing(store, case, study, config, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(StoreError, match="No space left"):
        store.open(case, study.task, config)
    assert entries(store) == []


def test_old_leftovers_go_and_young_ones_stay(tmp_path):
    folder = tmp_path / "volumes"
    for name, age in (("old", 2 * 86400), ("young", 60)):
        path = folder / f".{name}.tmp-x"
        path.mkdir(parents=True)
        os.utime(path, (time.time() - age,) * 2)
    VolumeStore(folder)
    assert [path.name for path in folder.iterdir()] == [".young.tmp-x"]


def test_unreadable_sources_and_stores_are_named(store, case, study, config, tmp_path):
    gone = case.model_copy(update={"image": (tmp_path / "gone.nii",)})
    with pytest.raises(DataError, match=r"gone\.nii: cannot be read"):
        store.open(gone, study.task, config)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="check the free space and the rights"):
        VolumeStore(tmp_path / "file" / "volumes")
