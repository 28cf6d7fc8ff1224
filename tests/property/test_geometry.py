"""Orientation and resampling: exact inverses, and an independent slow reference."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nibabel.affines import apply_affine

from uharmony_client.grids import plan_grid, same_grid, to_input_grid, to_stored_grid
from uharmony_client.volume_header import VolumeHeader
from uharmony_model.errors import DataError

ORIENTATIONS = [
    (axes, signs)
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
MANY = 10**9
sizes = st.tuples(*[st.integers(1, 7)] * 3)
spacings = st.tuples(*[st.floats(0.4, 3.0)] * 3)


def header_of(
    shape, spacing=(1.0, 1.0, 1.0), axes=(0, 1, 2), signs=(1, 1, 1), turn=0.0, origin=0.0
):
    """A grid whose axis i runs along world axis axes[i] in direction signs[i], slightly turned."""
    matrix = np.zeros((3, 3))
    for i, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
        matrix[axis, i] = sign * spacing[i]
    c, s = np.cos(turn), np.sin(turn)
    matrix = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ matrix
    rows = np.column_stack([matrix, np.full(3, origin)]).astype(np.float32)
    return VolumeHeader(
        shape=shape,
        spacing_mm=spacing,
        sform_code=1,
        sform=tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in rows),
    )


def unique_values(shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@given(st.sampled_from(ORIENTATIONS), sizes, spacings, st.floats(-0.5, 0.5), st.integers(0, 3))
def test_without_resampling_the_way_back_is_bit_exact(orientation, shape, spacing, turn, channels):
    header = header_of(
        shape, spacing, axes=orientation[0], signs=orientation[1], turn=turn, origin=-17.0
    )
    grid = plan_grid(header, None, MANY)
    array = unique_values((channels, *shape) if channels else shape) * np.float32(1 / 3)
    stored = to_stored_grid(array, grid)
    assert not grid.resampled
    assert stored.shape[-3:] == grid.shape
    back = to_input_grid(stored, grid)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_stored_axes_are_right_anterior_superior_as_nibabel_finds_them(orientation):
    header = header_of(
        (3, 4, 5), (1.0, 2.0, 3.0), axes=orientation[0], signs=orientation[1], turn=0.3, origin=5.0
    )
    array = unique_values((3, 4, 5))
    grid = plan_grid(header, None, MANY)
    reference = nib.as_closest_canonical(nib.Nifti1Image(array, header.affine))
    np.testing.assert_array_equal(to_stored_grid(array, grid), reference.get_fdata())
    np.testing.assert_allclose(grid.affine, reference.affine, atol=1e-12)
    assert nib.aff2axcodes(grid.affine) == ("R", "A", "S")
    np.testing.assert_allclose(grid.spacing_mm, reference.header.get_zooms(), rtol=1e-6)


def test_all_48_orientations_differ():
    arrays = {
        to_stored_grid(
            unique_values((3, 3, 3)), plan_grid(header_of((3, 3, 3), (1.0,) * 3, *o), None, 99)
        ).tobytes()
        for o in ORIENTATIONS
    }
    assert len(arrays) == 48


def slow_linear(array, scale, offset, shape):
    """Trilinear by the definition, one voxel at a time, positions clamped to the voxel centres."""
    result = np.zeros(shape)
    for index in np.ndindex(*shape):
        position = [
            min(max(scale[a] * index[a] + offset[a], 0), array.shape[a] - 1) for a in range(3)
        ]
        for corner in itertools.product((0, 1), repeat=3):
            weight, place = 1.0, []
            for a in range(3):
                low = int(np.floor(position[a]))
                part = position[a] - low
                weight *= part if corner[a] else 1 - part
                place.append(min(low + corner[a], array.shape[a] - 1))
            result[index] += weight * array[tuple(place)]
    return result


def documented_axis(n, spacing, wanted):
    """Count and the position of the first voxel, as the module's docstring says."""
    if abs(spacing - wanted) <= 1e-3:
        return n, 1.0, 0.0
    count = max(1, int(np.ceil(n * spacing / wanted - 1e-3)))
    scale = wanted / spacing
    return count, scale, (n - 1) / 2 - scale * (count - 1) / 2


@given(sizes, spacings, spacings, st.integers(0, 2**32 - 1))
def test_resampling_is_the_documented_linear_interpolation(shape, spacing, wanted, seed):
    grid = plan_grid(header_of(shape, spacing), wanted, MANY)
    array = np.random.default_rng(seed).random(shape, dtype=np.float32)
    # The grid's own spacing is the float32 one of the file.
    axes = [documented_axis(*a) for a in zip(shape, grid.ras_spacing_mm, wanted, strict=True)]
    counts, scales, offsets = zip(*axes, strict=True)
    assert grid.shape == counts
    expected = slow_linear(array, scales, offsets, counts)
    np.testing.assert_allclose(to_stored_grid(array, grid), expected, atol=1e-5)


@given(sizes, spacings, spacings, st.sampled_from(ORIENTATIONS))
def test_the_resampled_field_covers_the_input_and_keeps_its_centre(shape, spacing, wanted, way):
    header = header_of(shape, spacing, axes=way[0], signs=way[1], turn=0.2, origin=11.0)
    grid = plan_grid(header, wanted, MANY)
    centre = apply_affine(header.affine, (np.array(shape) - 1) / 2)
    np.testing.assert_allclose(
        apply_affine(grid.affine, (np.array(grid.shape) - 1) / 2), centre, atol=1e-5
    )
    for n, s, m, w in zip(
        grid.ras_shape, grid.ras_spacing_mm, grid.shape, grid.spacing_mm, strict=True
    ):
        assert n * s - 2e-3 * max(s, w) <= m * w < n * s + w + 1e-6
    np.testing.assert_allclose(
        np.linalg.norm(grid.affine[:3, :3], axis=0), grid.spacing_mm, rtol=1e-6
    )


@given(st.sampled_from(ORIENTATIONS), st.tuples(*[st.integers(2, 9)] * 3), spacings, spacings)
def test_there_and_back_has_the_input_shape_and_keeps_what_is_linear(way, shape, spacing, wanted):
    header = header_of(shape, spacing, *way)
    grid = plan_grid(header, wanted, MANY)
    # World x + 2 y - z is linear on every grid, so interpolation must give it exactly, except
    # beyond the outermost centres, where values are held.
    field = np.indices(grid.shape).reshape(3, -1).T
    stored = (apply_affine(grid.affine, field) @ (1, 2, -1)).reshape(grid.shape).astype(np.float32)
    back = to_input_grid(stored, grid)
    assert back.shape == shape
    world = apply_affine(header.affine, np.indices(shape).reshape(3, -1).T)
    at = apply_affine(np.linalg.inv(grid.affine), world)
    inside = np.all((at >= 0) & (at <= np.array(grid.shape) - 1), axis=1)
    expected = world @ (1, 2, -1)
    np.testing.assert_allclose(back.reshape(-1)[inside], expected[inside], atol=1e-3)


@given(st.sampled_from(ORIENTATIONS), sizes, st.sampled_from([2, 3]))
def test_labels_survive_an_odd_refinement_and_the_way_back(way, shape, factor):
    """On a grid k times finer, k odd, each voxel's centre is a finer one's centre too."""
    factor = 2 * factor - 1
    header = header_of(shape, (1.5, 1.5, 1.5), *way)
    grid = plan_grid(header, (1.5 / factor,) * 3, MANY)
    label = np.random.default_rng(3).integers(0, 4, shape, dtype=np.uint8)
    stored = to_stored_grid(label, grid)
    assert stored.dtype == np.uint8
    assert grid.shape == tuple(factor * n for n in grid.ras_shape)
    np.testing.assert_array_equal(to_input_grid(stored, grid), label)
    np.testing.assert_array_equal(to_input_grid(stored > 1, grid), label > 1)


def test_nearly_the_target_spacing_is_not_resampled():
    grid = plan_grid(header_of((5, 5, 5), (1.0005, 1.0, 2.0)), (1.0, 1.0, 1.0), MANY)
    assert grid.shape == (5, 5, 10)
    assert grid.spacing_mm[0] == pytest.approx(1.0005)


def test_the_stored_grid_is_bounded_too():
    with pytest.raises(DataError, match=r"resources\.max_voxels"):
        plan_grid(header_of((100, 100, 100), (900.0,) * 3), (0.001,) * 3, 512**3)


def test_an_array_of_another_grid_is_refused():
    grid = plan_grid(header_of((3, 4, 5)), (0.5, 0.5, 0.5), MANY)
    for array, there in (
        (np.zeros((4, 4, 5)), to_stored_grid),
        (np.zeros((3, 4, 5)), to_input_grid),
    ):
        with pytest.raises(DataError, match="does not lie"):
            there(array, grid)


def test_a_grid_survives_json():
    grid = plan_grid(
        header_of((3, 4, 5), (0.7, 1.1, 2.3), (1, 0, 2), (-1, 1, 1), 0.1), (1, 1, 1), 999
    )
    assert type(grid).model_validate_json(grid.model_dump_json()) == grid


@pytest.mark.parametrize(
    ("shift", "same"), [(0.0, True), (0.09, True), (0.12, False), (2.0, False)]
)
def test_grids_are_the_same_up_to_a_tenth_of_a_voxel(shift, same):
    first, second = header_of((9, 9, 9)), header_of((9, 9, 9), origin=shift / np.sqrt(3))
    assert same_grid(first, second) is same


def test_grids_of_other_shape_spacing_or_direction_differ():
    first = header_of((9, 9, 9))
    assert not same_grid(first, header_of((9, 9, 8)))
    assert not same_grid(first, header_of((9, 9, 9), (1.0, 1.0, 1.05)))
    assert not same_grid(first, header_of((9, 9, 9), signs=(-1, 1, 1)))
    assert not same_grid(first, header_of((9, 9, 9), turn=0.05))
