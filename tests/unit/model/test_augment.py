from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import ndimage

from uharmony_model import augment
from uharmony_model.augment import change_intensity, covered_box, draw_geometry, mirrors, warp
from uharmony_model.randomness import numpy_generator
from uharmony_model.task import Task

SIZE = (6, 9, 8)
START = (7, 5, 6)


def _matrix(seed: int, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> np.ndarray:
    for step in itertools.count():
        geometry = draw_geometry(numpy_generator(seed, step), spacing, mirror=True)
        if geometry.matrix is not None:
            return geometry.matrix
    raise AssertionError


def _volume() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    image = np.stack([ndimage.gaussian_filter(rng.random((22, 24, 23)), 1.5) for _ in range(2)])
    return image.astype(np.float32), rng.integers(0, 5, size=(22, 24, 23)).astype(np.uint8)


def _warped(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    image, label = _volume()
    start, size = covered_box(matrix, START, SIZE)
    box = tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))
    moved, classes = warp(
        torch.from_numpy(image[(slice(None), *box)].copy()),
        torch.from_numpy(label[box].copy()),
        matrix,
        SIZE,
    )
    return moved.numpy(), classes.numpy()


def _source_positions(matrix: np.ndarray) -> np.ndarray:
    """Where each voxel of the patch comes from (3, d, h, w), voxel by voxel."""
    centre = np.array(START) + (np.array(SIZE) - 1) / 2
    positions = np.empty((3, *SIZE))
    for index in np.ndindex(*SIZE):
        offset = np.array(index) - (np.array(SIZE) - 1) / 2
        positions[:, index[0], index[1], index[2]] = centre + matrix @ offset
    return positions


@pytest.mark.parametrize("seed", range(4))
def test_a_warp_samples_the_volume_where_the_matrix_says(seed):
    matrix = _matrix(seed, (1.0, 0.8, 1.7))
    image, label = _volume()
    moved, classes = _warped(matrix)
    positions = _source_positions(matrix)
    for channel in range(2):
        expected = ndimage.map_coordinates(image[channel], positions, order=1)
        np.testing.assert_allclose(moved[channel], expected, atol=1e-4)
    # A voxel half-way between two may fall either way; the others may not.
    clear = (np.abs(positions - np.floor(positions) - 0.5) > 1e-3).all(axis=0)
    nearest = ndimage.map_coordinates(label, positions, order=0)
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(classes[clear], nearest[clear])


def test_the_identity_copies_the_patch():
    image, label = _volume()
    moved, classes = _warped(np.eye(3))
    box = tuple(slice(s, s + n) for s, n in zip(START, SIZE, strict=True))
    np.testing.assert_allclose(moved, image[(slice(None), *box)], atol=1e-5)
    np.testing.assert_array_equal(classes, label[box])


@pytest.mark.parametrize("seed", range(4))
def test_the_covered_box_holds_every_source_and_little_more(seed):
    matrix = _matrix(seed, (1.0, 0.8, 1.7))
    start, size = covered_box(matrix, START, SIZE)
    positions = _source_positions(matrix).reshape(3, -1)
    low, high = positions.min(axis=1), positions.max(axis=1)
    assert (np.array(start) <= low).all()
    assert (np.array(start) + np.array(size) - 1 >= high).all()
    assert (low - np.array(start) < 1).all()
    assert (np.array(start) + np.array(size) - 1 - high < 1).all()


def test_a_turn_is_a_turn_in_millimetres():
    spacing = np.array([0.5, 1.0, 4.0])
    for seed in range(5):
        millimetres = np.diag(spacing) @ _matrix(seed, (0.5, 1.0, 4.0)) @ np.diag(1 / spacing)
        scale = np.cbrt(np.linalg.det(millimetres))
        assert augment.SCALE[0] <= scale <= augment.SCALE[1]
        turn = millimetres / scale
        np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
        # Three turns of up to 15 degrees do not add up to more than 45.
        assert np.degrees(np.arccos((np.trace(turn) - 1) / 2)) <= 3 * augment.ROTATION_DEGREES


def test_chances_are_as_stated():
    drawn = [draw_geometry(numpy_generator(0, n), (1, 1, 1), mirror=True) for n in range(1000)]
    # Three standard deviations of a binomial share of 1000.
    assert np.mean([g.mirrored for g in drawn]) == pytest.approx(0.5, abs=0.048)
    assert np.mean([g.matrix is not None for g in drawn]) == pytest.approx(0.3, abs=0.044)
    never = [draw_geometry(numpy_generator(0, n), (1, 1, 1), mirror=False) for n in range(50)]
    assert not any(g.mirrored for g in never)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["liver", "spleen"], True),
        (["kidney_left", "kidney_right"], False),
        (["LeftKidney"], False),
        (["l-putamen", "r-putamen"], False),
        (["rectum", "lung"], True),
    ],
)
def test_no_flip_where_a_class_has_a_side(names, expected):
    task = Task.model_validate(
        {
            "classes": {name: n + 1 for n, name in enumerate(names)},
            "intensity": {"ct": {"policy": "window"}},
        }
    )
    assert mirrors(task) is expected


def test_gamma_keeps_order_and_ends(monkeypatch):
    monkeypatch.setattr(augment, "NOISE_CHANCE", 0.0)
    monkeypatch.setattr(augment, "INTENSITY_CHANCE", 1.0)
    monkeypatch.setattr(augment, "GAIN", (1.0, 1.0))
    monkeypatch.setattr(augment, "SHIFT", (0.0, 0.0))
    monkeypatch.setattr(augment, "GAMMA", (1.5, 1.5))
    ramp = np.linspace(-1, 3, 60, dtype=np.float32).reshape(1, 3, 4, 5)
    changed = ramp.copy()
    change_intensity(changed, numpy_generator(0))
    np.testing.assert_allclose(changed, 4 * ((ramp + 1) / 4) ** 1.5 - 1, rtol=1e-5, atol=1e-6)


def test_intensity_changes_stay_in_their_ranges(monkeypatch):
    monkeypatch.setattr(augment, "NOISE_CHANCE", 0.0)
    monkeypatch.setattr(augment, "INTENSITY_CHANCE", 1.0)
    monkeypatch.setattr(augment, "GAMMA", (1.0, 1.0))
    for seed in range(20):
        pair = np.array([0.0, 1.0], dtype=np.float32).reshape(1, 2, 1, 1)
        change_intensity(pair, numpy_generator(seed))
        shift, gain = float(pair[0, 0, 0, 0]), float(pair[0, 1, 0, 0] - pair[0, 0, 0, 0])
        assert -0.1 <= shift <= 0.1
        assert 0.9 - 1e-6 <= gain <= 1.1 + 1e-6


def test_noise_has_at_most_its_deviation(monkeypatch):
    monkeypatch.setattr(augment, "NOISE_CHANCE", 1.0)
    monkeypatch.setattr(augment, "INTENSITY_CHANCE", 0.0)
    deviations = []
    for seed in range(20):
        flat = np.zeros((1, 16, 16, 16), dtype=np.float32)
        change_intensity(flat, numpy_generator(seed))
        deviations.append(float(flat.std()))
    assert 0 < min(deviations) < max(deviations) < augment.NOISE_DEVIATION[1] * 1.05


def test_a_constant_patch_survives(monkeypatch):
    monkeypatch.setattr(augment, "INTENSITY_CHANCE", 1.0)
    constant = np.full((2, 4, 4, 4), -1.0, dtype=np.float32)
    change_intensity(constant, numpy_generator(0))
    assert np.isfinite(constant).all()
