from __future__ import annotations

import json
import logging
import struct
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from tests.support.nifti_files import nifti_bytes
from tests.unit.client.check_site import codes, image_of, page, write_site
from uharmony_client.check import run_check
from uharmony_client.check.texts import TEXT_FIELDS, header_texts, looks_personal, sidecars

ARRAY = image_of(0)
CANARIES = ("MUSTERMANN", "Erika", "19551224", "Klinikum", "4711008")


def extension(code: int, content: bytes) -> bytes:
    """A NIfTI extension: size and code before the content, a multiple of 16 bytes."""
    size = (8 + len(content) + 15) // 16 * 16
    return struct.pack("<2i", size, code) + content.ljust(size - 8, b"\0")


@pytest.mark.parametrize(
    "text",
    [
        "Mustermann^Erika", "MUSTERMANN ERIKA", "Mustermann, Erika", "Mustermann_Erika",
        "Müller Jörg", "scan_20190412", "12.04.2019", "2019-04-12", "MRN 12345678",
    ],
)  # fmt: skip
def test_names_dates_and_long_numbers_are_noticed(text):
    assert looks_personal(text)


@pytest.mark.parametrize(
    "text",
    ["", "FSL5.0", "TE=2.9;Time=113241.530", "BRATS_001", "hippocampus_204", "liver_12", "ct0001"],
)
def test_usual_names_are_not(text):
    assert not looks_personal(text)


@pytest.mark.parametrize("field", TEXT_FIELDS)
def test_every_text_field_of_a_header_is_named_and_not_shown(write_nifti, field):
    plain = header_texts(write_nifti("a.nii.gz", ARRAY, **{field: b"FSL5.0"}))
    assert plain == [("U501", f"{field} (6 bytes)")]
    personal = header_texts(write_nifti("b.nii", ARRAY, order=">", **{field: b"Meier^Al"}))
    assert personal == [("U502", f"{field} (8 bytes)")]


def test_empty_fields_are_no_finding(write_nifti):
    assert header_texts(write_nifti("a.nii", ARRAY)) == []


def test_extensions_are_listed_by_code_and_size(write_nifti):
    content = extension(2, b"MUSTERMANN") + extension(6, b"x" * 40)
    found = header_texts(write_nifti("a.nii", ARRAY, extension=content))
    assert found == [("U503", "code 2 (DICOM), 32 bytes"), ("U503", "code 6 (comment), 48 bytes")]


@pytest.mark.parametrize("size", [-1, 0, 7, 2**31 - 1])
def test_extensions_with_an_absurd_size_end_the_list(write_nifti, size):
    content = struct.pack("<2i", size, 2) + bytes(24)
    found = header_texts(write_nifti("a.nii", ARRAY, extension=content))
    assert found == [("U503", "32 bytes that are no proper extension")]


def test_padding_before_the_voxels_is_no_extension(write_nifti):
    assert header_texts(write_nifti("a.nii", ARRAY, extension=bytes(32))) == []


def test_an_extension_written_by_nibabel(tmp_path):
    image = nib.Nifti2Image(ARRAY, np.eye(4))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Erika"))
    nib.save(image, tmp_path / "a.nii.gz")
    assert header_texts(tmp_path / "a.nii.gz") == [("U503", "code 6 (comment), 16 bytes")]


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b\0", bytes(348), nifti_bytes(ARRAY)[:200]])
def test_files_that_are_no_volumes_have_no_texts(tmp_path, content):
    (tmp_path / "a.nii").write_bytes(content)
    assert header_texts(tmp_path / "a.nii") == []
    assert header_texts(tmp_path / "absent.nii") == []


def test_sidecars_are_searched_for_attributes_of_persons(tmp_path):
    volume = tmp_path / "a.nii.gz"
    content = {"x": [{"patientname": "Erika"}], "InstitutionName": "Klinikum", "EchoTime": 0.01}
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "a.txt").write_text("Erika")
    assert sidecars(volume) == [
        ("U504", ".json with InstitutionName, PatientName"),
        ("U505", "a .txt file"),
    ]
    (tmp_path / "a.txt").unlink()
    for harmless in ('{"EchoTime": 1}', "[]", "3"):
        (tmp_path / "a.json").write_text(harmless)
        assert sidecars(volume) == []
    for broken in ("{", "[" * 100_000, "\ud800".encode("utf-8", "surrogatepass")):
        (tmp_path / "a.json").write_bytes(broken if isinstance(broken, bytes) else broken.encode())
        assert sidecars(volume) == [("U505", "a .json file that cannot be read")]
    (tmp_path / "a.json").write_bytes(b" " * (2**20 + 1))
    assert sidecars(volume) == [("U505", "a large .json file")]


def test_no_canary_is_in_any_output(config, study, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    texts: dict[str, Any] = dict.fromkeys(TEXT_FIELDS, b"MUSTERMANN^Erika")
    image = nifti_bytes(ARRAY, extension=extension(2, b"MUSTERMANN 4711008"), **texts)
    broken = nifti_bytes(image_of(1), **texts)[:-5]
    name = "Klinikum/MUSTERMANN^Erika_19551224"
    rows = {
        0: {"case": "MUSTERMANN^Erika", "patient": "4711008", "image": f"{name}.nii"},
        1: {"case": "Erika 19551224", "patient": "Klinikum", "image": f"{name}b.nii"},
    }
    folder = config.cases.parent / "Klinikum"
    folder.mkdir(parents=True)
    (config.cases.parent / f"{name}.json").write_text(json.dumps({"PatientID": "4711008"}))
    write_site(config, {f"{name}.nii": image, f"{name}b.nii": broken}, rows=rows)
    report = run_check(config, study)
    assert {"U102", "U502", "U503", "U504", "U506"} <= codes(report)
    captured = capfd.readouterr()
    output = page(report) + report.to_json() + caplog.text + captured.out + captured.err
    for canary in CANARIES:
        assert canary.lower() not in output.lower()
    # The same texts do show where the site asks for them, so the search can find something.
    told = run_check(config, study, reveal=True)
    assert "MUSTERMANN^Erika" in told.to_json()
    assert "Erika 19551224" in page(told)


def test_pseudonyms_stay_between_runs_and_differ_between_sites(config, study):
    write_site(config)
    first = [row.case for row in run_check(config, study).cases]
    assert first == [row.case for row in run_check(config, study).cases]
    assert first[6].startswith("case 7 (")
    other = config.model_copy(update={"store": config.store.with_name("elsewhere")})
    assert first != [row.case for row in run_check(other, study).cases]
    assert (config.store / "check.key").stat().st_mode & 0o777 == 0o600
