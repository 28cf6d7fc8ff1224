"""The readers and the preparation on real volumes; skipped where they are not."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from tests.support.nifti_files import read_nifti
from uharmony_client.grids import to_input_grid
from uharmony_client.readers import read_cases
from uharmony_client.site_config import SiteConfig
from uharmony_client.site_data import prepare
from uharmony_client.volume_store import VolumeStore
from uharmony_model.evaluation_settings import Evaluation
from uharmony_model.task import Task

pytestmark = pytest.mark.data


@pytest.fixture
def site(tmp_path):
    return SiteConfig(name="here", cases=tmp_path, store=tmp_path)


@pytest.fixture
def hippocampus():
    return Task.model_validate(
        {
            "classes": {"anterior": 1, "posterior": 2},
            "intensity": {"MRI": {"policy": "zscore"}},
            "spacing_mm": (1, 1, 1),
        }
    )


@pytest.fixture
def sarcoma():
    return Task.model_validate(
        {
            "classes": {"tumour": 1},
            "intensity": {
                "CT": {"policy": "window"},
                "MRT1": {"policy": "percentile"},
                "PET": {"policy": "suv"},
            },
            "spacing_mm": (4, 4, 4),
        }
    )


def test_hippocampus_is_read_as_three_sites(real_volumes):
    table = read_cases(real_volumes / "hippocampus")
    assert len(table.cases) == 196
    assert table.sites == ("f_200k", "f_500", "u8_range")
    assert {case.modality for case in table.cases} == {("MRI",)}
    split = table.with_splits(Evaluation(), 0)
    for name in table.sites:
        cases = split.of(site=name).cases
        assert sum(c.split == "test" for c in cases) == int(0.3 * len(cases) + 0.5)


def test_hippocampus_cases_of_each_encoding_are_prepared(real_volumes, hippocampus, site, tmp_path):
    table = read_cases(real_volumes / "hippocampus")
    store = VolumeStore(tmp_path / "volumes")
    for name in table.sites:
        for case in table.of(site=name).cases[:3]:
            volume = store.open(case, hippocampus, site)
            assert abs(float(volume.image.mean())) < 1e-3
            assert abs(float(volume.image.std()) - 1) < 1e-3
            assert case.label is not None
            original = np.asarray(read_nifti(case.label).dataobj)
            assert volume.label is not None
            np.testing.assert_array_equal(
                to_input_grid(np.array(volume.label), volume.grid), original
            )
            assert len(volume.foreground) == np.count_nonzero(original)


def test_sarcoma_is_read_with_its_patients(real_volumes):
    table = read_cases(real_volumes / "sarcoma")
    assert len(table.cases) == 106
    assert len({case.patient for case in table.cases}) == 40
    split = table.with_splits(Evaluation(), 0)
    for patient in {case.patient for case in table.cases}:
        assert len({case.split for case in split.cases if case.patient == patient}) == 1


def test_sarcoma_modalities_lie_on_their_labels_grid(real_volumes, sarcoma, site):
    table = read_cases(real_volumes / "sarcoma")
    for modality in sarcoma.intensity:
        for case in [c for c in table.cases if c.modality == (modality,)][::8]:
            volume = prepare(case, sarcoma, site)
            assert volume.label is not None
            assert case.label is not None
            assert nib.aff2axcodes(volume.grid.affine) == ("R", "A", "S")
            assert -1 <= float(volume.image.min()) < float(volume.image.max()) <= 1
            # Nearest-neighbour resampling keeps a tumour's volume, up to its surface's voxels.
            label = read_nifti(case.label)
            before = np.count_nonzero(label.dataobj) * abs(np.linalg.det(label.affine[:3, :3]))
            after = np.count_nonzero(volume.label) * float(np.prod(volume.grid.spacing_mm))
            assert after == pytest.approx(before, rel=0.15)


def test_sarcoma_without_resampling_comes_back_exactly(real_volumes, sarcoma, site):
    table = read_cases(real_volumes / "sarcoma")
    own = sarcoma.model_copy(update={"spacing_mm": None})
    for case in table.cases[:6]:
        volume = prepare(case, own, site)
        assert volume.label is not None
        assert case.label is not None
        original = np.asarray(read_nifti(case.label).dataobj)
        assert volume.grid.flips == (True, True, False)
        np.testing.assert_array_equal(to_input_grid(volume.label, volume.grid), original)
