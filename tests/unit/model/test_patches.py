from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from uharmony_model import augment
from uharmony_model.errors import DataError
from uharmony_model.patches import cut, draw_batch, is_foreground_patch, plan_patch
from uharmony_model.randomness import numpy_generator
from uharmony_model.task import Task
from uharmony_model.training_settings import Training

TASK = Task.model_validate(
    {"classes": {"organ": [1, 3], "lesion": 2}, "intensity": {"ct": {"policy": "window"}}}
)


@dataclass
class Volume:
    image: np.ndarray
    label: np.ndarray | None
    foreground: np.ndarray
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    present: tuple[bool, ...] = (True,)


def _index(label: np.ndarray) -> np.ndarray:
    places = np.argwhere(label > 0)
    return np.concatenate((places, label[label > 0][:, None]), axis=1).astype(np.int32)


def _numbered(shape: tuple[int, int, int], channels: int = 1) -> Volume:
    """Each voxel's intensity is its own number, so a patch tells where it is from."""
    numbers = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    label = np.zeros(shape, dtype=np.uint8)
    label[shape[0] // 2, 1:3, 2] = 1
    label[shape[0] // 2, 4, 2:] = 2
    image = np.stack([numbers + 10_000 * c for c in range(channels)])
    return Volume(image, label, _index(label))


def _training(**changes: Any) -> Training:
    plain: dict[str, Any] = {"patch": (4, 6, 5), "batch_size": 2, "augment": False}
    return Training.model_validate(plain | changes)


def test_a_patch_is_a_piece_of_its_volume():
    volumes = [_numbered((9, 10, 11)), _numbered((12, 8, 7))]
    for step in range(20):
        image, label, cases = draw_batch(volumes, TASK, _training(), 0, "a", 1, step)
        assert image.shape == (2, 1, 4, 6, 5)
        assert image.dtype == torch.float32
        assert label.shape == (2, 4, 6, 5)
        assert label.dtype == torch.uint8
        for sample, case in enumerate(cases):
            volume = volumes[case]
            assert volume.label is not None
            first = np.unravel_index(int(image[sample, 0, 0, 0, 0]), volume.label.shape)
            box = tuple(slice(f, f + n) for f, n in zip(first, (4, 6, 5), strict=True))
            np.testing.assert_array_equal(image[sample, 0], volume.image[0][box])
            np.testing.assert_array_equal(label[sample], volume.label[box])


def test_a_small_volume_lies_in_the_middle_of_its_least_intensity():
    volume = _numbered((2, 9, 3), channels=2)
    volume.image[1] -= 20_000
    task = TASK.model_copy(update={"channels": 2})
    training = _training(patch=(5, 6, 6), batch_size=1)
    image, label, _ = draw_batch([volume], task, training, 0, "a", 1, 0)
    assert volume.label is not None
    # 3 voxels are missing along the first axis and along the last: 1 before, 2 behind.
    first = int(image[0, 0, 1, 0, 1]) // 3 % 9
    inside = np.zeros((5, 6, 6), dtype=bool)
    inside[1:3, :, 1:4] = True
    for channel in range(2):
        piece = volume.image[channel][:, first : first + 6]
        np.testing.assert_array_equal(image[0, channel][inside].reshape(2, 6, 3), piece)
        assert (image[0, channel][~inside] == piece.min()).all()
    np.testing.assert_array_equal(
        label[0][inside].reshape(2, 6, 3), volume.label[:, first : first + 6]
    )
    assert not label[0][~inside].any()


@pytest.mark.parametrize("changed", [False, True])
def test_a_batch_is_a_function_of_its_arguments(changed):
    volumes = [_numbered((9, 10, 11)), _numbered((12, 8, 7))]
    training = _training(augment=changed, patch=(6, 6, 6))
    first = draw_batch(volumes, TASK, training, 0, "a", 1, 5)
    torch.rand(1)
    np.random.rand(1)  # noqa: NPY002 - the global generator, which must not matter
    torch_state, numpy_state = torch.get_rng_state(), repr(np.random.get_state())  # noqa: NPY002
    again = draw_batch(volumes, TASK, training, 0, "a", 1, 5)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert repr(np.random.get_state()) == numpy_state  # noqa: NPY002
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.label, again.label)
    assert first.cases == again.cases
    others = [(1, "a", 1, 5), (0, "b", 1, 5), (0, "a", 2, 5), (0, "a", 1, 6)]
    for seed, site, round_, step in others:
        other = draw_batch(volumes, TASK, training, seed, site, round_, step)
        assert not torch.equal(first.image, other.image)


def test_cases_are_drawn_alike():
    volumes = [_numbered((6, 6, 6)) for _ in range(4)]
    training = _training(patch=(2, 2, 2), batch_size=8)
    drawn = Counter(
        case for n in range(100) for case in draw_batch(volumes, TASK, training, 0, "a", 1, n).cases
    )
    # 200 of 800 each, give or take four standard deviations of the binomial.
    assert all(abs(drawn[case] - 200) < 4 * np.sqrt(800 * 0.25 * 0.75) for case in range(4))


def test_each_class_present_is_drawn_alike_however_rare():
    label = np.zeros((20, 20, 20), dtype=np.uint8)
    label[:10, :10, :10] = 3
    label[18, 18, 18] = 2
    volume = Volume(np.zeros((1, 20, 20, 20), np.float32), label, _index(label))
    holds = 0
    for n in range(400):
        plan = plan_patch([volume], TASK, (5, 5, 5), numpy_generator(0, n), foreground=True)
        piece = label[tuple(slice(s, s + 5) for s in plan.start)]
        assert piece.any()
        holds += int((piece == 2).any())
    assert holds == pytest.approx(200, abs=40)


def test_a_foreground_voxel_lies_in_the_middle_half():
    label = np.zeros((40, 40, 40), dtype=np.uint8)
    label[20, 21, 22] = 1
    volume = Volume(np.zeros((1, 40, 40, 40), np.float32), label, _index(label))
    offsets = set()
    for n in range(200):
        plan = plan_patch([volume], TASK, (8, 12, 9), numpy_generator(0, n), foreground=True)
        offset = tuple(v - s for v, s in zip((20, 21, 22), plan.start, strict=True))
        assert 2 <= offset[0] <= 6
        assert 3 <= offset[1] <= 9
        assert 2 <= offset[2] <= 6
        offsets.add(offset)
    assert len(offsets) > 50  # jittered, not always the same place


def test_without_foreground_any_place_will_do():
    label = np.zeros((6, 6, 6), dtype=np.uint8)
    volume = Volume(np.zeros((1, 6, 6, 6), np.float32), label, _index(label))
    starts = {
        plan_patch([volume], TASK, (5, 5, 5), numpy_generator(0, n), foreground=True).start
        for n in range(100)
    }
    assert starts == {(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)}


@pytest.mark.parametrize("share", [0.0, 0.25, 1 / 3, 0.5, 0.7, 1.0])
def test_the_foreground_share_is_kept_from_the_first_patch_on(share):
    for count in (1, 2, 7, 100, 1000):
        held = sum(is_foreground_patch(number, share) for number in range(count))
        assert abs(held - share * count) < 1 + 1e-6
    if share == 0.5:
        assert [is_foreground_patch(n, share) for n in range(6)] == [False, True] * 3


def test_image_and_label_are_changed_together(monkeypatch):
    monkeypatch.setattr(augment, "WARP_CHANCE", 1.0)
    monkeypatch.setattr(augment, "INTENSITY_CHANCE", 0.0)
    monkeypatch.setattr(augment, "NOISE_CHANCE", 0.0)
    blob = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((40, 36, 44)), 4)
    label = (blob > 0).astype(np.uint8)
    volume = Volume(blob[None].astype(np.float32), label, _index(label), (1.0, 1.2, 0.8))
    training = _training(patch=(24, 24, 24), batch_size=4, augment=True)
    image, changed, _ = draw_batch([volume], TASK, training, 0, "a", 1, 0)
    agree = ((image[:, 0] > 0) == (changed > 0)).float().mean()
    # Only voxels beside the zero crossing may differ: nearest against linear.
    assert agree > 0.95
    plain, _, _ = draw_batch(
        [volume], TASK, _training(patch=(24, 24, 24), batch_size=4), 0, "a", 1, 0
    )
    assert not torch.allclose(image, plain, atol=0.1 * blob.std())


def test_a_flip_reverses_the_first_axis(monkeypatch):
    for name in ("WARP_CHANCE", "INTENSITY_CHANCE", "NOISE_CHANCE"):
        monkeypatch.setattr(augment, name, 0.0)
    monkeypatch.setattr(augment, "FLIP_CHANCE", 1.0)
    volume = _numbered((9, 10, 11))
    plain = draw_batch([volume], TASK, _training(), 0, "a", 1, 0)
    flipped = draw_batch([volume], TASK, _training(augment=True), 0, "a", 1, 0)
    assert torch.equal(flipped.image, plain.image.flip(2))
    assert torch.equal(flipped.label, plain.label.flip(1))
    sided = TASK.model_copy(update={"classes": {"left-organ": (1, 3), "lesion": (2,)}})
    kept = draw_batch([volume], sided, _training(augment=True), 0, "a", 1, 0)
    assert torch.equal(kept.image, plain.image)


def test_memory_maps_are_only_read(tmp_path):
    volume = _numbered((9, 10, 11))
    arrays = {"image": volume.image, "label": volume.label, "foreground": volume.foreground}
    for name, array in arrays.items():
        assert array is not None
        np.save(tmp_path / f"{name}.npy", array)
    mapped = Volume(**{n: np.load(tmp_path / f"{n}.npy", mmap_mode="r") for n in arrays})
    training = _training(augment=True, batch_size=8)
    expected = draw_batch([volume], TASK, training, 0, "a", 1, 0)
    found = draw_batch([mapped], TASK, training, 0, "a", 1, 0)
    assert torch.equal(found.image, expected.image)
    assert torch.equal(found.label, expected.label)


def test_what_cannot_be_trained_on_is_refused():
    with pytest.raises(DataError, match="site a: no training case"):
        draw_batch([], TASK, _training(), 0, "a", 1, 0)
    with pytest.raises(DataError, match="2 channels, expected 1"):
        draw_batch([_numbered((9, 10, 11), channels=2)], TASK, _training(), 0, "a", 1, 0)
    volume = _numbered((9, 10, 11))
    volume.label = None
    with pytest.raises(DataError, match="no label"):
        draw_batch([volume], TASK, _training(), 0, "a", 1, 0)
    with pytest.raises(DataError, match="no label"):
        cut(volume, (0, 0, 0), np.empty((1, 2, 2, 2), np.float32), np.empty((2, 2, 2), np.uint8))
