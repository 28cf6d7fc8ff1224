from __future__ import annotations

import hashlib
import json
import os
import random
import stat
import zipfile
from pathlib import Path

import pytest

from uharmony_client import backup as module
from uharmony_client.backup import Contents, backup, restore
from uharmony_model.errors import StoreError

KEPT = {
    "identity/tls.key": b"-----BEGIN PRIVATE KEY-----\n",
    "identity/membership.json": b"{}",
    "generations/abc/round-000007/update.bin": bytes(range(256)) * 5000,
    "generations/abc/round-000007/local.safetensors": b"",
    "ledger/ledger.jsonl": b'{"seq": 1}\n',
    "models/abc/shared.safetensors": b"weights",
    "models/abc/sites/north.json": b"{}",
    "alone/abc/model/study.json": b"{}",
    "evaluations/abc/test-round-000010.csv": b"case,dice\n",
    "quarantine.json": b"{}",
}
LEFT_OUT = {
    "volumes/x/image.npy": b"voxels",
    "run/status.json": b"{}",
    "log/site.log": b"text",
    "models/.abc.tmp-1/shared.safetensors": b"half",
    "surprise.txt": b"?",
}


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def read_files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def store(tmp_path) -> Path:
    return write_files(tmp_path / "store", {**KEPT, **LEFT_OUT})


@pytest.fixture
def archive(tmp_path, store) -> Path:
    path = Path(tmp_path) / "site.zip"
    backup(store, path)
    return path


def test_what_lasts_comes_back_and_nothing_else(tmp_path, store):
    size = sum(len(content) for content in KEPT.values())
    assert backup(store, tmp_path / "site.zip") == Contents(len(KEPT), size)
    assert stat.S_IMODE((tmp_path / "site.zip").stat().st_mode) == 0o600
    assert restore(tmp_path / "site.zip", tmp_path / "new") == Contents(len(KEPT), size)
    assert read_files(tmp_path / "new") == KEPT
    for path in [tmp_path / "new", *(tmp_path / "new").rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "site.zip", "store"]


def test_equal_stores_give_equal_files(tmp_path, store, archive):
    for path in store.rglob("*"):
        os.utime(path, (1, 1))
    backup(store, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == archive.read_bytes()


def test_the_file_says_that_keys_are_inside_and_lists_every_digest(archive):
    with zipfile.ZipFile(archive) as source:
        manifest = json.loads(source.read("manifest.json"))
        assert all(info.compress_type == zipfile.ZIP_STORED for info in source.infolist())
    assert "private keys" in manifest["notice"]
    assert {f["name"]: (f["size"], f["sha256"]) for f in manifest["files"]} == {
        name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in KEPT.items()
    }


def test_a_backup_is_not_compressed_so_sizes_cannot_lie(tmp_path):
    write_files(tmp_path / "s", {"ledger/zeros": bytes(1 << 20)})
    backup(tmp_path / "s", tmp_path / "a.zip")
    assert (tmp_path / "a.zip").stat().st_size > 1 << 20


def test_an_empty_folder_inside_is_no_reason_to_keep_a_store(tmp_path):
    (tmp_path / "s" / "identity").mkdir(parents=True)
    with pytest.raises(StoreError, match="nothing to keep"):
        backup(tmp_path / "s", tmp_path / "a.zip")
    assert not (tmp_path / "a.zip").exists()


@pytest.mark.parametrize("what", ["file link", "folder link", "top link", "pipe"])
def test_a_store_with_anything_but_plain_files_is_refused(tmp_path, store, what):
    outside = write_files(tmp_path / "outside", {"secret": b"x"})
    if what == "file link":
        (store / "ledger" / "link").symlink_to(outside / "secret")
    elif what == "folder link":
        (store / "ledger" / "link").symlink_to(outside)
    elif what == "top link":
        (store / "quarantine.json").unlink()
        (store / "quarantine.json").symlink_to(outside / "secret")
    else:
        os.mkfifo(store / "ledger" / "pipe")
    with pytest.raises(StoreError):
        backup(store, tmp_path / "site.zip")
    assert not (tmp_path / "site.zip").exists()


def test_a_failed_backup_leaves_the_older_one(tmp_path, store, archive, monkeypatch):
    before = archive.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        backup(store, archive)
    assert archive.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_file_that_grows_meanwhile_ends_the_backup(tmp_path, store, monkeypatch):
    growing, inner = store / "ledger" / "ledger.jsonl", module._info

    def grow(name: str) -> zipfile.ZipInfo:
        if name == "ledger/ledger.jsonl":
            with growing.open("ab") as file:
                file.write(b"more")
        return inner(name)

    monkeypatch.setattr(module, "_info", grow)
    with pytest.raises(StoreError, match="changed while it was read"):
        backup(store, tmp_path / "a.zip")


def test_what_a_kill_left_behind_is_taken_away(tmp_path, store, archive):
    (tmp_path / ".site.zip.tmp-x").write_bytes(b"keys")
    write_files(tmp_path / ".new.tmp-y", {"identity/tls.key": b"keys"})
    backup(store, archive)
    restore(archive, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


# --- restore -----------------------------------------------------------------------------------


def test_nothing_is_ever_overwritten(tmp_path, store, archive):
    before = read_files(store)
    with pytest.raises(StoreError, match="is not empty"):
        restore(archive, store)
    assert read_files(store) == before
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").write_bytes(b"")
    for place in ("link", "file"):
        with pytest.raises(StoreError, match="is not empty"):
            restore(archive, tmp_path / place)


def test_an_empty_folder_takes_a_backup(tmp_path, archive):
    (tmp_path / "new").mkdir()
    restore(archive, tmp_path / "new")
    assert read_files(tmp_path / "new") == KEPT


@pytest.mark.parametrize("moment", ["_extract", "replace_directory"])
def test_an_interrupted_restore_leaves_nothing(tmp_path, archive, monkeypatch, moment):
    inner, calls = getattr(module, moment), []

    def fails(*arguments: object) -> None:
        calls.append(1)
        if moment == "replace_directory" or len(calls) == 4:
            raise KeyboardInterrupt
        inner(*arguments)

    monkeypatch.setattr(module, moment, fails)
    with pytest.raises(KeyboardInterrupt):
        restore(archive, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["site.zip", "store"]


def hostile(path: Path, entries, *, manifest=None) -> Path:
    """An archive with these (name or ZipInfo, content); the manifest is honest unless given."""
    with zipfile.ZipFile(path, "w") as target:
        files = []
        for entry, content in entries:
            target.writestr(entry, content)
            name = entry if isinstance(entry, str) else entry.filename
            digest = hashlib.sha256(content).hexdigest()
            files.append({"name": name, "size": len(content), "sha256": digest})
        text = json.dumps(manifest if manifest is not None else {"format": 1, "files": files})
        target.writestr("manifest.json", text)
    return path


def info(name: str, *, mode: int = stat.S_IFREG, compress: int = zipfile.ZIP_STORED):
    made = zipfile.ZipInfo(name)
    made.external_attr, made.compress_type = (mode | 0o777) << 16, compress
    return made


def refuse(tmp_path: Path, path: Path, match: str) -> None:
    before = sorted(str(p) for p in tmp_path.parent.rglob("*"))
    with pytest.raises(StoreError, match=match) as caught:
        restore(path, tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert sorted(str(p) for p in tmp_path.parent.rglob("*")) == before


def test_the_tests_own_archives_would_be_taken(tmp_path):
    restore(hostile(tmp_path / "a.zip", [("identity/key", b"x")]), tmp_path / "new")
    assert read_files(tmp_path / "new") == {"identity/key": b"x"}


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "identity/../../evil",
        "identity/../evil",
        "/etc/evil",
        "//evil",
        "identity//key",
        "identity/./key",
        "./identity/key",
        "identity\\..\\evil",
        "identity/\nkey",
        "identity/" + "k" * 300,
        "identity/" + "/".join("k" * 60 for _ in range(12)),
        "identity",
        "volumes/x",
        "evil",
        "quarantine.json/x",
        "identity/\u202ekey",
    ],
)
def test_names_outside_of_a_backup_are_refused(tmp_path, name):
    path = hostile(tmp_path / "a.zip", [("ledger/first", b"x"), (name, b"x")])
    refuse(tmp_path, path, "is no name that a backup holds")


@pytest.mark.parametrize("kind", ["S_IFLNK", "S_IFIFO", "S_IFCHR", "S_IFBLK", "S_IFDIR"])
def test_links_and_devices_are_refused(tmp_path, kind):
    entry = info("identity/key", mode=getattr(stat, kind))
    refuse(tmp_path, hostile(tmp_path / "a.zip", [(entry, b"/etc/passwd")]), "is no plain file")


def test_folders_are_refused(tmp_path):
    refuse(tmp_path, hostile(tmp_path / "a.zip", [("identity/", b"")]), "is no plain file")


def test_a_bomb_is_refused_before_it_is_opened(tmp_path):
    entry = info("identity/bomb", compress=zipfile.ZIP_DEFLATED)
    refuse(tmp_path, hostile(tmp_path / "a.zip", [(entry, bytes(10 << 20))]), "is compressed")


def test_entries_that_share_their_bytes_are_refused(tmp_path):
    """Many names for one megabyte: the sizes add up to more than the file has."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as target:
        target.writestr("ledger/0", bytes(1 << 20))
        first = target.infolist()[0]
        for number in range(1, 5):
            other = info(f"ledger/{number}")
            for field in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(other, field, getattr(first, field))
            target.filelist.append(other)
            target.NameToInfo[other.filename] = other
        target.writestr("manifest.json", "{}")
    refuse(tmp_path, tmp_path / "a.zip", "declares .* bytes of files|damaged")


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_a_name_that_occurs_twice_is_refused(tmp_path):
    path = hostile(tmp_path / "a.zip", [("identity/key", b"x"), ("identity/key", b"y")])
    refuse(tmp_path, path, "occurs twice")


def test_a_file_below_a_file_is_refused(tmp_path):
    path = hostile(tmp_path / "a.zip", [("identity/a", b"x"), ("identity/a/b", b"y")])
    refuse(tmp_path, path, "lies below a file")


KEY = {"name": "identity/key", "size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}


@pytest.mark.parametrize(
    ("manifest", "match"),
    [
        ({"files": [{**KEY, "sha256": "0" * 64}]}, "SHA-256 differs"),
        ({"files": [{**KEY, "size": 2}]}, "has not the size"),
        ({"files": []}, "does not name exactly"),
        ({"files": [KEY, {**KEY, "name": "identity/other"}]}, "does not name exactly"),
        ({"files": [KEY, KEY]}, "does not name exactly"),
        ({"files": [{**KEY, "size": -1}]}, "size"),
        ({"files": [{**KEY, "size": "1"}]}, "size"),
        ({"files": [KEY], "format": 2}, "format"),
        ({"files": [KEY], "more": 1}, "more"),
        ([], "manifest.json"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, manifest, match):
    path = hostile(tmp_path / "a.zip", [("identity/key", b"x")], manifest=manifest)
    refuse(tmp_path, path, match)


def test_an_archive_without_manifest_or_no_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as target:
        target.writestr("identity/key", b"x")
    refuse(tmp_path, tmp_path / "a.zip", r"no manifest\.json")
    (tmp_path / "b.zip").write_bytes(b"not a zip")
    refuse(tmp_path, tmp_path / "b.zip", "no backup")
    refuse(tmp_path, tmp_path / "absent.zip", "No such file")


def test_damage_anywhere_is_found_or_harmless(tmp_path, archive):
    """Sampled bit flips and cuts: either refused, or everything is as it was."""
    whole, draw = archive.read_bytes(), random.Random(0)  # noqa: S311
    outer = len(KEPT) * 120 + 4000
    refused = 0
    for trial in range(160):
        damaged = bytearray(whole)
        if trial % 4 == 0:
            del damaged[draw.randrange(len(damaged)) :]
        else:
            # Half of the flips in names, sizes and the manifest, which lie at the end.
            low = len(damaged) - outer if trial % 2 else 0
            damaged[draw.randrange(low, len(damaged))] ^= 1 << draw.randrange(8)
        path, place = tmp_path / f"{trial}.zip", tmp_path / f"new-{trial}"
        path.write_bytes(damaged)
        try:
            restore(path, place)
        except StoreError:
            assert not place.exists()
            refused += 1
        else:
            assert read_files(place) == KEPT
        path.unlink()
    assert refused > 100
