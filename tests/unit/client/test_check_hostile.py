"""Files 31 to 39 of the list of hostile inputs, as a site meets them; 40 is in test_check_texts."""

from __future__ import annotations

import gzip
import io
import random
import time
import tracemalloc

import numpy as np
import pytest

from tests.support.nifti_files import nifti_bytes
from tests.unit.client.check_site import SHAPE, image_of, label_of, page, write_site
from uharmony_client.check import run_check
from uharmony_client.check.cases import look_at
from uharmony_client.check.rules import RULES
from uharmony_client.site_config import Resources, load_cases
from uharmony_client.site_data import prepare
from uharmony_model.errors import DataError

NAN, INF = float("nan"), float("inf")
SOUND = image_of(3)
# The mean is near 3e38, so one voxel is 6e38 away from it: more than float32 can hold.
EXTREME = np.full(SHAPE, 3e38, "f4")
EXTREME[1, 2, 3] = -3e38
U1 = (np.arange(720) % 200).reshape(SHAPE).astype("u1")


@pytest.fixture(autouse=True)
def _user(monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)


def with_voxel(value):
    array = SOUND.copy()
    array[1, 2, 3] = value
    return nifti_bytes(array)


def with_label(value, dtype="u1"):
    label = label_of(0).astype(dtype)
    label[0, 0, 0] = value
    return nifti_bytes(label)


# Numbers are those of the list of hostile files: 31 to 39.
HOSTILE = {
    "31 zero size": ("i3.nii", nifti_bytes(U1, dim=[3, 8, 0, 10, 1, 1, 1, 1]), "U104"),
    "31 negative": ("i3.nii", nifti_bytes(U1, dim=[3, 8, -9, 10, 1, 1, 1, 1]), "U104"),
    "31 seven": ("i3.nii", nifti_bytes(U1, dim=[7, 8, 9, 10, 1, 1, 1, 2]), "U104"),
    "32 giant": ("i3.nii", nifti_bytes(U1, dim=[3, *[32767] * 3, 1, 1, 1, 1])[:352], "U105"),
    "34 cut": ("i3.nii", gzip.compress(nifti_bytes(U1))[:-12], "U102"),
    "34 checksum": ("i3.nii", gzip.compress(nifti_bytes(U1))[:-8] + bytes(8), "U102"),
    "34 short": ("i3.nii", nifti_bytes(U1)[:-1], "U102"),
    "34 text": ("i3.nii", b"Erika Mustermann " * 50, "U103"),
    "35 affine NaN": ("i3.nii", nifti_bytes(U1, srow_y=[NAN, 0, 0, 0]), "U108"),
    "35 pixdim 0": ("i3.nii", nifti_bytes(U1, pixdim=[1.0, 0, 0, 0, 0, 0, 0, 0]), "U108"),
    "35 singular": (
        "i3.nii", nifti_bytes(U1, srow_x=[1.0, 1, 0, 0], srow_y=[1.0, 1, 0, 0]), "U108",
    ),
    "36 slope NaN": ("i3.nii", nifti_bytes(U1, scl_slope=NAN), "U107"),
    "36 slope Inf": ("i3.nii", nifti_bytes(U1, scl_slope=INF), "U107"),
    "37 voxel NaN": ("i3.nii", with_voxel(NAN), "U109"),
    "37 voxel Inf": ("i3.nii", with_voxel(-INF), "U109"),
    "37 constant": ("i3.nii", nifti_bytes(np.full(SHAPE, 7, "i2")), "U110"),
    "38 RGB": ("i3.nii", nifti_bytes(U1, datatype=128, bitpix=24), "U106"),
    "38 complex": ("i3.nii", nifti_bytes(U1, datatype=32, bitpix=64), "U106"),
    "38 int64 in the label": ("l3.nii", with_label(2**32 + 1, "i8"), "U115"),
    "38 beyond float32": ("i3.nii", nifti_bytes(SOUND.astype("f8") * 1e300), "U109"),
    "38 extreme range": ("i3.nii", nifti_bytes(EXTREME), "U116"),
    "39 label outside": ("l3.nii", with_label(4), "U115"),
    "39 label not whole": ("l3.nii", with_label(0.5, "f4"), "U115"),
    "39 label elsewhere": ("l3.nii", nifti_bytes(label_of(0), srow_x=[2.0, 0, 0, 11.0]), "U114"),
    "39 label smaller": ("l3.nii", nifti_bytes(label_of(0)[1:]), "U114"),
    "label missing its voxels": ("l3.nii", nifti_bytes(label_of(0))[:400], "U102"),
    "two channels": ("i3.nii", nifti_bytes(np.stack([SOUND, SOUND], -1)), "U104"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_volume_is_left_out_and_training_would_refuse_it(config, study, name):
    file, content, code = HOSTILE[name]
    write_site(config, {file: content})
    report = run_check(config, study)
    assert {row.refused for row in report.cases} == {None, code}
    assert report.cases[3].refused == code
    assert (report.quarantined, report.exit_code) == (1, 10)
    assert "Mustermann" not in page(report) + report.to_json()
    # The reference is training's own code.
    for row, case in zip(report.cases, load_cases(config).cases, strict=True):
        if row.refused is None:
            prepare(case, study.task, config)
        else:
            with pytest.raises(DataError):
                prepare(case, study.task, config)


def peak_and_seconds(config, study, case):
    tracemalloc.start()
    begin = time.monotonic()
    try:
        look = look_at(case, study.task, config)
        return look, tracemalloc.get_traced_memory()[1] / 2**20, time.monotonic() - begin
    finally:
        tracemalloc.stop()


def zeros_gz(first: bytes, mib: int) -> bytes:
    """A gzip of `first` and zeros after it, 2 GiB in about 2 MB."""
    piece = io.BytesIO()
    with gzip.GzipFile(fileobj=piece, mode="wb") as stream:
        stream.write(bytes(2**20))
    return gzip.compress(first) + piece.getvalue() * mib


@pytest.mark.parametrize(
    ("dims", "code"),
    [
        ([3, 8, 9, 10, 1, 1, 1, 1], "U102"),  # holds 2 GiB more than it declares
        ([3, 1290, 1290, 1290, 1, 1, 1, 1], "U105"),  # declares the 2 GiB
        ([3, 32767, 32767, 32767, 1, 1, 1, 1], "U105"),
    ],
)
def test_bombs_take_little_memory_and_time(config, study, dims, code):
    header = nifti_bytes(U1, dim=dims)[:352]
    write_site(config, {"i0.nii": zeros_gz(header, 2048)}, count=1)
    look, mib, seconds = peak_and_seconds(config, study, load_cases(config).cases[0])
    assert look.refused == code
    assert mib < 16
    assert seconds < 2


def test_a_bomb_within_the_limit_takes_what_it_declares(config, study):
    small = config.model_copy(update={"resources": Resources(max_voxels=256**3)})
    header = nifti_bytes(U1, dim=[3, 256, 256, 256, 1, 1, 1, 1])[:352]
    write_site(config, {"i0.nii": zeros_gz(header, 2048)}, count=1)
    look, mib, seconds = peak_and_seconds(small, study, load_cases(small).cases[0])
    assert look.refused == "U102"
    assert mib < 64 + 16  # 256^3 voxels of float32, and a piece of the file
    assert seconds < 2


def test_a_volume_beyond_the_memory_is_left_out(config, study, monkeypatch):
    def full(*_):
        raise MemoryError

    write_site(config, count=1)
    monkeypatch.setattr("uharmony_client.check.cases._to_label", full)
    assert look_at(load_cases(config).cases[0], study.task, config).refused == "U105"


def test_random_headers_end_in_a_finding_or_none(config, study):
    draw = random.Random(0)  # noqa: S311 - a fixed list of damages
    folder = write_site(config, count=1)
    case = load_cases(config).cases[0]
    content = nifti_bytes(SOUND, extension=bytes(32), qform_code=1)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(384)] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
        (folder / "i0.nii").write_bytes(damaged)
        look = look_at(case, study.task, config)
        assert {code for code, _ in look.found} <= RULES.keys()
        refused += look.refused is not None
    assert 0 < refused < 300
