"""Simulated cases: where they lie, what their lesions are, and that they repeat."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from nilearn import datasets
from scipy.ndimage import label

from uharmony_model.errors import ConfigError
from uharmony_simulation import anatomy
from uharmony_simulation.anatomy import ATTRIBUTION, Anatomy

TOUCHING = np.ones((3, 3, 3))


@pytest.fixture(scope="module")
def coarse():
    return Anatomy(5.0)


@pytest.fixture(scope="module")
def cases(coarse):
    return [coarse.case(0, index) for index in range(20)]


@pytest.fixture(scope="module")
def white():
    """White matter of the template at 1 mm, and the map from mm to its voxels."""
    template = datasets.load_mni152_wm_template(resolution=1)
    return np.asarray(template.dataobj), np.linalg.inv(template.affine)


def test_a_case_is_an_image_and_a_mask_on_one_grid(coarse, cases):
    for case in cases:
        assert case.image.shape == case.label.shape == coarse.shape == (32, 40, 36)
        assert case.image.dtype == np.float32
        assert case.label.dtype == np.uint8
        assert set(np.unique(case.label)) == {0, 1}
        assert np.isfinite(case.image).all()
        assert case.image.min() == 0
        assert 0.85 < case.image.max() < 1.2


def test_a_case_repeats_and_differs_by_seed_index_and_site(coarse, cases):
    again = coarse.case(0, 3)
    np.testing.assert_array_equal(again.image, cases[3].image)
    np.testing.assert_array_equal(again.label, cases[3].label)
    for other in (coarse.case(1, 3), coarse.case(0, 4), coarse.case(0, 3, site="b")):
        assert np.abs(other.image - again.image).max() > 0.1
        assert (other.label != again.label).any()


def test_lesions_are_one_to_four_separate_pieces_of_a_few_voxels(cases):
    counts = []
    for case in cases:
        pieces, count = label(case.label, structure=TOUCHING)
        counts.append(count)
        assert np.bincount(pieces.ravel())[1:].min() >= 4
    assert set(counts) == {1, 2, 3, 4}


def test_lesions_never_touch_even_where_there_is_little_room(coarse):
    white = np.ones(coarse.shape)
    room = np.zeros(coarse.shape)
    room[8:24, 12:28, 10:26] = 100.0  # 80 mm wide, for up to four lesions of up to 39 mm
    counts = []
    for seed in range(40):
        mask = np.zeros(coarse.shape, dtype=bool)
        lesions = coarse._lesions(np.random.default_rng(seed), white, room)
        for box, fraction in lesions:
            mask[box] |= fraction > 0.5
        assert label(mask, structure=TOUCHING)[1] == len(lesions) >= 1
        counts.append(len(lesions))
    assert max(counts) >= 3


def test_lesions_are_as_large_as_their_radii_allow(cases):
    # Half-axes of 0.75 to 1.3 radii and bumps of a quarter; white matter may cut a part away.
    # At 5 mm the radii are 8 to 12 mm.
    largest = 4 / 3 * np.pi * (12 * 1.3 * 1.25) ** 3
    sizes = []
    for case in cases:
        pieces, _ = label(case.label, structure=TOUCHING)
        sizes += (np.bincount(pieces.ravel())[1:] * 5.0**3).tolist()
    assert max(sizes) < largest
    assert 4 / 3 * np.pi * 7**3 < np.median(sizes) < 4 / 3 * np.pi * 12**3


def test_lesions_lie_in_white_matter_of_the_template(cases, white):
    volume, to_voxel = white
    inside = []
    for case in cases:
        where = np.argwhere(case.label)
        mm = where @ case.affine[:3, :3].T + case.affine[:3, 3]
        voxel = np.rint(mm @ to_voxel[:3, :3].T + to_voxel[:3, 3]).astype(int)
        inside.append(volume[tuple(voxel.T)].mean())
    # The deformation of some mm moves the case against the template, hence not 1.
    assert np.mean(inside) > 0.7
    assert volume.mean() < 0.1  # what a random place would give


def test_lesions_are_darker_than_white_matter_and_no_threshold_finds_them(cases):
    for case in cases:
        lesion = case.image[case.label > 0]
        assert 0.3 < lesion.mean() < 0.75
        around = np.percentile(case.image, 95)  # clean white matter
        assert around - lesion.mean() > 0.15
    best = 0.0
    for low in np.arange(0.2, 0.6, 0.1):
        for high in np.arange(low + 0.1, 0.8, 0.1):
            overlap = [(c.image > low) & (c.image < high) for c in cases]
            scores = [
                2 * (found & (c.label > 0)).sum() / (found.sum() + c.label.sum())
                for found, c in zip(overlap, cases, strict=True)
            ]
            best = max(best, float(np.mean(scores)))
    assert best < 0.2


def test_the_affine_puts_the_brain_where_the_template_has_it(cases):
    template = datasets.load_mni152_template(resolution=1)
    volume = np.asarray(template.dataobj)

    def centre_mm(image, affine):
        mass = np.array([(axis * image).sum() for axis in np.indices(image.shape)]) / image.sum()
        return affine[:3, :3] @ mass + affine[:3, 3]

    expected = centre_mm(volume, template.affine)
    found = np.mean([centre_mm(c.image, c.affine) for c in cases[:8]], axis=0)
    np.testing.assert_allclose(found, expected, atol=2.0)
    np.testing.assert_array_equal(cases[0].affine[:3, :3], 5.0 * np.eye(3))


def test_the_brain_fits_with_a_margin_and_without_a_large_one(cases):
    for case in cases:
        where = np.argwhere(case.image > 0.2)
        low, high = where.min(axis=0), where.max(axis=0)
        assert (low >= 0).all()
        assert (low <= 5).all()
        assert (high >= np.array(case.image.shape) - 6).all()


def test_heads_differ_by_some_mm_but_not_more(coarse):
    points = [coarse._deformed(np.random.default_rng(seed)) - coarse._grid for seed in range(5)]
    for shift in points:
        assert 1.0 < np.abs(shift).max() < 4.0 + 0.04 * 110
    # A fold would turn the Jacobian's determinant negative somewhere.
    for shift in points:
        gradient = np.stack(
            [np.stack(np.gradient(shift[axis], 5.0), axis=-1) for axis in range(3)], axis=-2
        )
        assert np.linalg.det(np.eye(3) + gradient).min() > 0.3


def test_noise_has_deviation_one_everywhere(coarse):
    rng = np.random.default_rng(0)
    fields = np.stack([coarse._smooth_noise(rng, 30.0) for _ in range(300)])
    deviation = fields.std(axis=0)
    assert deviation.shape == coarse.shape
    # 300 draws know a deviation to 4 %, and the extremes of many places lie at 4 of those.
    assert 0.8 < deviation.min() < deviation.max() < 1.2
    assert np.abs(np.diff(fields, axis=1)).mean() < 0.25


@pytest.mark.slow
def test_the_default_spacing_gives_a_small_volume():
    case = Anatomy().case(0, 0)
    assert case.image.shape == (52, 64, 56)
    assert case.label.sum() > 0
    np.testing.assert_array_equal(np.diag(case.affine), [3, 3, 3, 1])


@pytest.mark.parametrize("spacing", [0.5, 7.0, float("nan")])
def test_a_spacing_out_of_range_is_refused(spacing):
    with pytest.raises(ConfigError, match="expected 1 to 6 mm"):
        Anatomy(spacing)


@pytest.mark.parametrize("radius", [(1.0, 9.0), (9.0, 4.0), (4.0, 30.0), (float("nan"), 9.0)])
def test_a_lesion_radius_out_of_range_is_refused(radius):
    with pytest.raises(ConfigError, match="within 2 to 12 mm"):
        Anatomy(1.5, lesion_radius_mm=radius)


def test_lesions_smaller_than_a_voxel_are_refused():
    with pytest.raises(ConfigError, match="within 5 to 12 mm"):
        Anatomy(5.0, lesion_radius_mm=(4.0, 9.0))


@pytest.mark.parametrize(
    ("spacing", "radii"), [(2.0, (4, 9)), (3.0, (4.8, 9)), (5.0, (8, 12)), (6.0, (9.6, 12))]
)
def test_lesions_keep_to_some_voxels_on_coarse_grids(spacing, radii, monkeypatch):
    template = np.zeros((40, 40, 40), np.float32)
    template[5:35, 5:35, 5:35] = 0.9
    template[20:, 5:35, 5:35] = 0.3
    grey = np.where(template > 0.8, 1.0, 0.0).astype(np.float32)
    monkeypatch.setattr(
        anatomy, "_load_template", lambda: (template, grey, np.zeros_like(grey), np.eye(4))
    )
    assert Anatomy(spacing).lesion_radius_mm == pytest.approx(radii)


def test_without_nilearn_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "nilearn", None)
    with pytest.raises(ConfigError, match=r"uharmony\[demo\]"):
        Anatomy(5.0)


def test_the_attribution_names_the_template_and_its_holder():
    for part in ("ICBM 152", "McConnell Brain Imaging Centre", "Fonov", "nilearn", "simulated"):
        assert part in ATTRIBUTION
