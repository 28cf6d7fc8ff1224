from __future__ import annotations

import numpy as np
import pytest

from uharmony_client.case_table import Case
from uharmony_client.grids import to_input_grid
from uharmony_client.site_config import Resources
from uharmony_client.site_data import channel_modalities, prepare
from uharmony_model.errors import DataError
from uharmony_model.task import Task

IMAGE = np.random.default_rng(0).normal(100, 20, (3, 4, 5)).astype("f4")
LABEL = np.random.default_rng(1).integers(0, 4, (3, 4, 5)).astype("u1")
FLIPPED = {"srow_x": (-2.0, 0.0, 0.0, 14.0)}


def case_of(images, label=None, modality=("T1",)):
    return Case(
        case="c", patient="p", site="north", domain="north", modality=modality,
        image=tuple(images), label=label,
    )  # fmt: skip


@pytest.fixture
def task():
    return Task.model_validate(
        {
            "classes": {"edema": (1, 3), "core": 2},
            "intensity": {"T1": {"policy": "zscore"}, "CT": {"policy": "window"}},
        }
    )


def refused(case, task, config):
    with pytest.raises(DataError) as caught:
        prepare(case, task, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_image_is_reoriented_and_scaled(write_nifti, task, config):
    volume = prepare(case_of([write_nifti("i.nii.gz", IMAGE, **FLIPPED)]), task, config)
    scaled = (IMAGE - IMAGE.mean(dtype=float)) / IMAGE.std(dtype=float)
    np.testing.assert_allclose(volume.image[0], scaled[::-1], atol=1e-5)
    assert volume.image.dtype == np.float32
    assert volume.image.flags.c_contiguous
    assert volume.label is None
    assert volume.grid.spacing_mm == (2.0, 3.0, 4.0)


def test_a_label_keeps_its_values_and_follows_the_image(write_nifti, task, config):
    image = write_nifti("i.nii.gz", IMAGE, **FLIPPED)
    for dtype in ("u1", "i2", "f4"):
        label = write_nifti("l.nii.gz", LABEL.astype(dtype), **FLIPPED)
        volume = prepare(case_of([image], label), task, config)
        assert volume.label is not None
        assert volume.label.dtype == np.uint8
        np.testing.assert_array_equal(volume.label, LABEL[::-1])
        np.testing.assert_array_equal(to_input_grid(volume.label, volume.grid), LABEL)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_image_and_label_are_resampled_onto_one_grid(write_nifti, task, config, axis):
    # A slab whose intensity is its label: linear and nearest must put it in the same place.
    block = np.zeros((6, 6, 6), "u1")
    np.moveaxis(block, axis, 0)[2:4] = 2
    task = task.model_copy(update={"spacing_mm": (1.0, 1.0, 1.0)})
    image = write_nifti("i.nii", block.astype("f4") * 60 + 40)
    volume = prepare(case_of([image], write_nifti("l.nii", block), ("CT",)), task, config)
    assert volume.label is not None
    assert volume.image.shape[1:] == volume.label.shape == volume.grid.shape == (12, 18, 24)
    assert volume.grid.spacing_mm == (1.0, 1.0, 1.0)
    # Window maps 40 to 0 and 160 to 0.6; half way up the edge lies the label's border.
    np.testing.assert_array_equal(volume.image[0] > 0.3, volume.label == 2)
    assert set(np.unique(volume.label)) == {0, 2}


def test_label_map_renames_and_drops(write_nifti, task, config):
    raw = np.array([0, 1, 2, 3, 7, 1000], "i2").reshape(1, 2, 3)
    image = write_nifti("i.nii", IMAGE[:1, :2, :3].copy())
    label = write_nifti("l.nii", raw)
    mapped = config.model_copy(update={"label_map": {7: 2, 1000: 0}})
    volume = prepare(case_of([image], label), task, mapped)
    assert volume.label is not None
    assert volume.label.ravel().tolist() == [0, 1, 2, 3, 2, 0]


def test_a_label_may_be_swapped_with_another(write_nifti, task, config):
    raw = np.array([0, 1, 2, 2, 1, 0], "u1").reshape(1, 2, 3)
    image = write_nifti("i.nii", IMAGE[:1, :2, :3].copy())
    swap = config.model_copy(update={"label_map": {1: 2, 2: 1}})
    volume = prepare(case_of([image], write_nifti("l.nii", raw)), task, swap)
    assert volume.label is not None
    assert volume.label.ravel().tolist() == [0, 2, 1, 1, 2, 0]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (4, "label value 4 is no class that this site annotates (values 0, 1, 2, 3)"),
        (-1, "label value -1"),
        (257, "label value 257"),
        (1.5, "not whole numbers"),
        (2e9, "label value 2000000000"),
        (1e30, "label value"),
    ],
)
def test_undeclared_label_values_are_refused(write_nifti, task, config, value, expected):
    wrong = LABEL.astype("f4")
    wrong[1, 1, 1] = value
    case = case_of([write_nifti("i.nii", IMAGE)], write_nifti("l.nii", wrong))
    assert expected in refused(case, task, config)


def test_a_class_that_the_site_does_not_annotate_may_not_occur(write_nifti, task, config):
    case = case_of([write_nifti("i.nii", IMAGE)], write_nifti("l.nii", LABEL))
    only = config.model_copy(update={"annotated": ("edema",)})
    assert "label value 2" in refused(case, task, only)


def test_image_and_label_must_share_a_grid(write_nifti, task, config):
    image = write_nifti("i.nii", IMAGE)
    moved = write_nifti("moved.nii", LABEL, srow_x=(2.0, 0.0, 0.0, 11.0))
    message = refused(case_of([image], moved), task, config)
    assert str(image) in message
    assert str(moved) in message
    assert "(11.000, -20.000, 30.000)" in message
    smaller = write_nifti("smaller.nii", LABEL[:, :, :4].copy())
    assert "3 x 4 x 4" in refused(case_of([image], smaller), task, config)
    flipped = write_nifti("flipped.nii", LABEL, **FLIPPED)
    refused(case_of([image], flipped), task, config)


def test_rounding_of_a_grid_is_no_difference(write_nifti, task, config):
    image = write_nifti("i.nii", IMAGE)
    label = write_nifti("l.nii", LABEL, srow_x=(2.0001, 0.0, 0.0, 10.01))
    prepare(case_of([image], label), task, config)


@pytest.mark.parametrize("together", [True, False])
def test_channels_have_their_own_policies(write_nifti, task, config, together):
    task = task.model_copy(update={"channels": 2})
    both = np.stack([IMAGE, IMAGE * 3], axis=-1)
    files = (
        [write_nifti("both.nii", both)]
        if together
        else [write_nifti("0.nii", IMAGE), write_nifti("1.nii", IMAGE * 3)]
    )
    volume = prepare(case_of(files, modality=("T1", "CT")), task, config)
    assert volume.image.shape == (2, 3, 4, 5)
    scaled = (IMAGE - IMAGE.mean(dtype=float)) / IMAGE.std(dtype=float)
    np.testing.assert_allclose(volume.image[0], scaled, atol=1e-5)
    window = np.clip((IMAGE * 3 - 40) / 200, -1, 1)
    np.testing.assert_allclose(volume.image[1], window, atol=1e-5)


def test_wrong_channels_are_refused(write_nifti, task, config):
    two = write_nifti("two.nii", np.stack([IMAGE, IMAGE], axis=-1))
    one = write_nifti("one.nii", IMAGE)
    far = write_nifti("far.nii", IMAGE, srow_x=(2.0, 0.0, 0.0, 99.0))
    assert "2 channels" in refused(case_of([two]), task, config)
    assert "2 channels" in refused(case_of([one, one]), task, config)
    task = task.model_copy(update={"channels": 2})
    assert "1 channels" in refused(case_of([one]), task, config)
    assert "one grid" in refused(case_of([one, far]), task, config)
    assert "3 modalities" in refused(case_of([two], modality=("T1",) * 3), task, config)


def test_a_constant_image_is_refused(write_nifti, task, config):
    case = case_of([write_nifti("i.nii", np.full((3, 4, 5), 7, "i2"))])
    assert "every voxel has the value 7" in refused(case, task, config)


def test_voxels_that_overflow_when_scaled_are_refused(write_nifti, task, config):
    extreme = np.array([3.3e38, -3.3e38, 3.3e38, 3.3e38, 3.3e38, 3.3e38], "f4").reshape(1, 2, 3)
    message = refused(case_of([write_nifti("i.nii", extreme)]), task, config)
    assert "too large to be scaled as T1" in message


def test_the_limit_holds_for_file_and_stored_grid(write_nifti, task, config):
    case = case_of([write_nifti("i.nii", IMAGE)])
    small = config.model_copy(update={"resources": Resources(max_voxels=59)})
    assert "at most 59" in refused(case, task, small)
    fine = task.model_copy(update={"spacing_mm": (0.01, 0.01, 0.01)})
    message = refused(case, fine, config)
    assert "at the study's spacing" in message
    assert str(case.image[0]) in message


def test_modalities_are_found_renamed_or_refused(task):
    def names(named, renamed=None, task=task):
        return channel_modalities(named, task, renamed or {}, "case c")

    assert names(["CT"]) == ("CT",)
    assert names(["MRT1"], {"MRT1": "T1"}) == ("T1",)
    only = task.model_copy(update={"intensity": {"CT": task.intensity["CT"]}})
    assert names([], task=only) == ("CT",)
    assert names(["CT"], task=task.model_copy(update={"channels": 3})) == ("CT",) * 3
    with pytest.raises(DataError, match="case c: names no modality; the study has CT, T1"):
        names([])
    with pytest.raises(DataError, match="'PET' is not in the study, which has CT, T1"):
        names(["PET"])
