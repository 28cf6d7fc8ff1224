from __future__ import annotations

import gzip
import json
import re
from typing import Any

import numpy as np
import pytest

from tests.support.nifti_files import nifti_bytes
from tests.unit.client.check_site import COUNT, SHAPE, codes, image_of, label_of, page, write_site
from uharmony_client.check import run_check
from uharmony_client.check.findings import Detail, number_findings
from uharmony_client.check.intensities import scales, unlike_the_policy
from uharmony_client.check.rules import _TABLE, RULES, Severity
from uharmony_model.networks import build_network
from uharmony_model.study import Study
from uharmony_model.task import Percentile, Suv, Window, ZScore

SOUND = image_of(3)
# The mean is near 3e38, so one voxel is 6e38 away from it: more than float32 can hold.
EXTREME = np.full(SHAPE, 3e38, "f4")
EXTREME[1, 2, 3] = -3e38


@pytest.fixture(autouse=True)
def _user(monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)


def with_label(value, dtype="u1"):
    label = label_of(0).astype(dtype)
    label[0, 0, 0] = value
    return nifti_bytes(label)


def of(study, **changes):
    return Study.model_validate({**study.model_dump(), **changes})


def test_a_sound_site_has_nothing_but_notes(config, study):
    write_site(config)
    calls = []
    report = run_check(config, study, on_case=lambda *told: calls.append(told))
    assert report.exit_code == 0, page(report)
    assert calls == [("north", number, COUNT) for number in range(COUNT)]
    # 12 patients, test 0.3 and validation 0.1 rounded half up
    assert dict(report.splits) == {"test": 4, "validation": 1, "train": 7}
    assert (report.classes["edema"].cases, report.classes["edema"].voxels) == (12, 36)
    assert report.classes["core"].voxels == 36
    assert report.quarantined == 0
    assert report.cases[0].counts == {0: 720 - 6, 1: 2, 2: 3, 3: 1}
    content = json.loads(report.to_json())
    assert content["severity"] == "note"
    assert [f["number"] for f in content["findings"]] == list(range(1, len(report.findings) + 1))
    assert all(f["remedy"] for f in content["findings"])
    assert "U411" in codes(report)


def test_the_codes_are_unique_and_sorted():
    assert [row[0] for row in _TABLE] == sorted(RULES)


def test_findings_are_joined_and_the_worst_comes_first():
    found = [("U203", Detail("a", "x")), ("U408", Detail(None, "")), ("U203", Detail("b", "y"))]
    first, second = number_findings(found)
    assert (first.number, first.rule.code, first.rule.severity) == (1, "U408", Severity.ERROR)
    assert [detail.case for detail in second.details] == ["a", "b"]
    assert [s.exit_code for s in Severity] == [0, 10, 11]


def test_modalities_and_channels_have_to_be_the_studys(config, study):
    two = study.task.model_dump() | {
        "channels": 2,
        "intensity": {"T1": {"policy": "zscore"}, "CT": {"policy": "window"}},
    }
    rows = {
        0: {"image": "i0.nii|i1.nii", "modality": "T1|CT"},
        1: {"image": "i1.nii|i2.nii", "modality": "T1|PT"},
        2: {"image": "i2.nii", "modality": "T1|CT"},
        3: {"image": "i3.nii|odd.nii", "modality": "T1|CT"},
    }
    odd = nifti_bytes(image_of(9), srow_x=[2.0, 0, 0, 99.0])
    write_site(config, {"odd.nii": odd}, count=4, rows=rows)
    report = run_check(config, of(study, task=two))
    assert [row.refused for row in report.cases] == [None, "U113", "U111", "U112"]
    # Three of four cannot be left out.
    assert "U190" in codes(report)
    assert (report.quarantined, report.exit_code) == (0, 11)


def test_without_a_study_volumes_are_looked_at_all_the_same(config):
    write_site(config, {"i1.nii": b"", "l2.nii": with_label(300, "u2")})
    report = run_check(config, None)
    assert [row.refused for row in report.cases[:4]] == [None, "U103", "U115", None]
    assert report.cases[0].counts == {0: 714, 1: 2, 2: 3, 3: 1}
    assert not (config.store / "quarantine.json").exists()
    assert report.leaving is None
    assert "no study yet" in page(report)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"srow_x": [0.05, 0, 0, 0]}, "U201"),
        ({"srow_z": [0, 0, 11.0, 0]}, "U201"),
        ({"srow_x": [0.3, 0, 0, 0]}, "U202"),
        ({"srow_x": [-2.0, 0, 0, 0]}, "U203"),
        ({"srow_x": [1.8, -0.9, 0, 0], "srow_y": [0.9, 2.7, 0, 0]}, "U204"),
        ({"sform_code": 0}, "U205"),
        ({"qform_code": 1, "quatern": [0.0, 0, 0], "qoffset": [10.0, -20, 40]}, "U206"),
    ],
)
def test_odd_grids(config, study, fields, code):
    files = {"i3.nii": nifti_bytes(SOUND, **fields), "l3.nii": nifti_bytes(label_of(3), **fields)}
    write_site(config, files)
    report = run_check(config, study)
    assert code in codes(report)
    assert report.cases[3].refused is None


def test_equal_orientations_agree(config, study):
    fields: dict[str, Any] = {"qform_code": 1, "quatern": [0.0, 0, 0], "qoffset": [10.0, -20, 30]}
    write_site(config, {"i3.nii": nifti_bytes(SOUND, **fields)})
    assert not codes(run_check(config, study)) & {"U201", "U202", "U203", "U204", "U205", "U206"}


HU = np.linspace(-1000, 1500, 1000, dtype="f4").reshape(10, 10, 10)


@pytest.mark.parametrize(
    ("channel", "policy", "expected"),
    [
        (HU, Window(policy="window"), []),
        (HU + 1024, Window(policy="window"), ["U301"]),
        (HU / 2500, Window(policy="window"), ["U301"]),
        (HU * 3, Window(policy="window", low=5000, high=6000), ["U302"]),
        ((HU + 1000) / 100, Suv(policy="suv"), []),
        ((HU + 1000) * 10, Suv(policy="suv"), ["U303"]),
        ((HU + 1000) / 2500, Suv(policy="suv"), ["U303"]),
        (HU, Suv(policy="suv"), ["U303"]),
        (HU, Percentile(policy="percentile"), []),
        (np.where(HU.max() == HU, HU, np.float32(3)), Percentile(policy="percentile"), ["U304"]),
        (HU, ZScore(policy="zscore"), []),
    ],
)
def test_intensities_against_the_policy(channel, policy, expected):
    low, high = float(channel.min()), float(channel.max())
    assert [code for code, _ in unlike_the_policy(channel, low, high, policy)] == expected


def test_only_extreme_channels_are_scaled_to_see_whether_it_works():
    channel = HU.copy()
    assert scales(channel, -1000, 1500, ZScore(policy="zscore"))
    np.testing.assert_array_equal(channel, HU)
    assert not scales(EXTREME.copy(), -3e38, 3e38, ZScore(policy="zscore"))
    assert scales(EXTREME.copy(), -3e38, 3e38, Window(policy="window"))


def test_duplicates_are_found_under_another_header_and_compression(config, study):
    again = gzip.compress(nifti_bytes(image_of(0), order=">", descrip=b"another"))
    splits = ["train", "train", "train", "test", "validation", *["train"] * 7]
    rows = {n: {"split": split} for n, split in enumerate(splits)}
    rows[1] |= {"patient": "p0"}
    write_site(config, {f"i{n}.nii": again for n in (1, 2, 3)}, rows=rows)
    report = run_check(config, study)
    found = {f.rule.code: [str(d.case) for d in f.details] for f in report.findings}
    assert found["U401"][0].startswith("case 2 (")
    assert found["U402"][0].startswith("case 3 (")
    assert found["U403"][0].startswith("case 4 (")
    assert report.exit_code == 11


def test_what_the_cases_lack_together(config, study):
    empty = nifti_bytes(np.zeros(SHAPE, "u1"))
    no_core = label_of(0) * (label_of(0) != 2)
    content = {f"l{n}.nii": nifti_bytes(no_core) for n in range(COUNT)} | {"l1.nii": empty}
    rows = {n: {"split": "train", "patient": f"c{n}"} for n in range(COUNT)}
    write_site(config, content, rows=rows | {2: {"label": "", "patient": "c2"}})
    large = study.training.model_dump() | {"patch": (16, 8, 8)}
    report = run_check(config, of(study, training=large))
    expected = {"U004", "U207", "U404", "U405", "U406", "U409", "U410"}
    assert expected <= codes(report)
    absent = next(f for f in report.findings if f.rule.code == "U406")
    assert [d.text for d in absent.details] == ["core"]


def test_a_table_that_cannot_be_read_is_a_finding_without_names(config, study):
    folder = write_site(config)
    (folder / "i4.nii").unlink()
    report = run_check(config, study)
    assert "U001" in codes(report)
    assert report.exit_code == 11
    assert not re.search(r"\bc4\b", report.to_json())  # not a part of a digest
    assert "c4" in run_check(config, study, reveal=True).to_json()
    config.cases.write_text("case,site,image\nc,south,i1.nii\n")
    assert "U002" in codes(run_check(config, study))


def test_annotated_classes_have_to_be_in_the_study(config, study):
    write_site(config)
    wrong = config.model_copy(update={"annotated": ("liver",)})
    report = run_check(wrong, study)
    assert "U003" in codes(report)
    assert report.exit_code == 11


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_what_leaves_is_counted_as_the_network_has_it(config, study, codec):
    shared = of(study, method="fedavg", codec={"up": codec})
    write_site(config)
    leaving = run_check(config, shared).leaving
    assert leaving is not None
    network = build_network(shared, ("north",), seed=0)
    # Plain averaging of a network without buffers shares every parameter.
    expected = sum(p.numel() for p in network.parameters())
    assert leaving.scalars == sum(leaving.parts.values()) == expected
    assert leaving.bytes_up == expected * {"fp32": 4, "bf16": 2}[codec]
    assert leaving.bytes_down == expected * 4
    assert leaving.stays == 0


def test_nothing_leaves_when_everything_is_local(config, study):
    write_site(config)
    report = run_check(config, of(study, method="local"))
    assert report.leaving is not None
    assert report.leaving.scalars == 0
    assert report.leaving.values == ()
    assert "What leaves: nothing" in page(report)


def test_a_study_that_asks_for_too_much_is_an_error(config, study):
    write_site(config)
    policy = config.policy.model_copy(update={"share": ("polynomial",)})
    report = run_check(config.model_copy(update={"policy": policy}), study)
    assert "U702" in codes(report)
    assert report.exit_code == 11
