from __future__ import annotations

import os

import pytest

from tests.support.nifti_files import nifti_bytes
from tests.unit.client.check_site import COUNT, codes, image_of, write_site
from uharmony_client.check import load_quarantine, require_enough, run_check, without_quarantined
from uharmony_client.check.quarantine import QUARANTINE_FILE
from uharmony_client.site_config import load_cases
from uharmony_model.errors import DataError, StoreError

BAD = nifti_bytes(image_of(0))[:-1]


def splits_of(config, study):
    return load_cases(config).with_splits(study.evaluation, study.split_seed)


def test_bad_cases_are_passed_over_and_the_others_keep_their_splits(config, study):
    write_site(config)
    before = {case.case: case.split for case in splits_of(config, study).cases}
    write_site(config, {"i2.nii": BAD, "l5.nii": b""})
    report = run_check(config, study)
    held = load_quarantine(config.store, study.digest)
    assert held == {"c2", "c5"}
    assert report.quarantined == 2
    left = without_quarantined(splits_of(config, study), held)
    assert {case.case: case.split for case in left.cases} == {
        name: split for name, split in before.items() if name not in held
    }
    path = config.store / QUARANTINE_FILE
    assert path.stat().st_mode & 0o777 == 0o600
    assert config.store.stat().st_mode & 0o777 == 0o700


def test_a_changed_file_is_looked_at_again(config, study):
    folder = write_site(config, {"i2.nii": BAD, "i3.nii": BAD})
    run_check(config, study)
    assert load_quarantine(config.store) == {"c2", "c3"}
    (folder / "i2.nii").write_bytes(nifti_bytes(image_of(2)))
    status = (folder / "i3.nii").stat()
    os.utime(folder / "i3.nii", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert load_quarantine(config.store) == set()
    run_check(config, study)
    assert load_quarantine(config.store) == {"c3"}


def test_a_quarantine_of_another_study_does_not_count(config, study):
    write_site(config, {"i2.nii": BAD})
    run_check(config, study)
    assert load_quarantine(config.store, "0" * 64) == set()
    assert load_quarantine(config.store, study.digest) == {"c2"}


def test_more_than_a_fifth_is_refused_and_nothing_is_passed_over(config, study):
    # 2 of 10 are a fifth, 3 of 12 are more.
    write_site(config, {"i2.nii": BAD, "i3.nii": BAD}, count=10)
    assert run_check(config, study).quarantined == 2
    write_site(config, {f"i{n}.nii": BAD for n in (2, 3, 4)}, count=COUNT)
    report = run_check(config, study)
    assert "U190" in codes(report)
    assert (report.quarantined, report.exit_code) == (0, 11)
    assert load_quarantine(config.store) == set()


def test_two_training_cases_have_to_be_left(config, study):
    splits = {n: {"split": "train" if n < 3 else "test"} for n in range(COUNT)}
    write_site(config, {"i0.nii": BAD}, rows=splits)
    table = splits_of(config, study)
    require_enough(table, {"c0"})
    with pytest.raises(DataError, match="1 are left to train on"):
        require_enough(table, {"c0", "c1"})
    # A site that is small without a quarantine is not refused for it.
    require_enough(without_quarantined(table, {"c0", "c1"}), set())


def test_a_damaged_list_is_said(config):
    assert load_quarantine(config.store) == set()
    config.store.mkdir()
    for content in (b"", b"{}", b"[" * 10_000):
        (config.store / QUARANTINE_FILE).write_bytes(content)
        with pytest.raises(StoreError, match="delete it and check again"):
            load_quarantine(config.store)


def test_a_store_that_cannot_be_written_is_a_finding(config, study):
    write_site(config, {"i2.nii": BAD})
    config.store.write_bytes(b"a file where the folder should be")
    report = run_check(config, study)
    assert "U191" in codes(report)
    assert report.quarantined == 0
