"""A patch lies where it may, for any volume, any patch size and any place of the foreground."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from uharmony_model.patches import cut, draw_batch, plan_patch
from uharmony_model.randomness import numpy_generator
from uharmony_model.task import Task
from uharmony_model.training_settings import Training

TASK = Task.model_validate(
    {"classes": {"organ": 1, "lesion": 2}, "intensity": {"ct": {"policy": "window"}}}
)
shapes = st.tuples(*[st.integers(1, 14)] * 3)
seeds = st.integers(0, 2**31)


@dataclass
class Volume:
    image: np.ndarray
    label: np.ndarray | None
    foreground: np.ndarray
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    present: tuple[bool, ...] = (True,)


def _volume(shape: tuple[int, int, int], seed: int) -> Volume:
    rng = np.random.default_rng(seed)
    label = rng.choice([0, 1, 2], p=[0.9, 0.07, 0.03], size=shape).astype(np.uint8)
    places = np.argwhere(label > 0)
    index = np.concatenate((places, label[label > 0][:, None]), axis=1).astype(np.int32)
    return Volume(rng.standard_normal((1, *shape)).astype(np.float32), label, index)


@given(shapes, shapes, seeds, st.booleans())
def test_a_patch_wastes_no_voxel(shape, size, seed, foreground):
    volume = _volume(shape, seed)
    plan = plan_patch([volume], TASK, size, numpy_generator(seed), foreground=foreground)
    for start, patch, extent in zip(plan.start, size, shape, strict=True):
        if patch <= extent:
            assert 0 <= start <= extent - patch
        else:
            # All of the volume is inside, with the odd voxel of padding behind it.
            assert -start == (patch - extent) // 2
    if foreground and len(volume.foreground):
        first, last = np.array(plan.start), np.array(plan.start) + np.array(size) - 1
        places = volume.foreground[:, :3]
        assert ((places >= first) & (places <= last)).all(axis=1).any()


@given(shapes, shapes, seeds, st.data())
def test_a_cut_is_the_padded_volume_at_its_place(shape, size, seed, data):
    volume = _volume(shape, seed)
    # Any box that shares at least one voxel with the volume.
    start = tuple(
        data.draw(st.integers(1 - n, extent - 1)) for n, extent in zip(size, shape, strict=True)
    )
    image, label = np.empty((1, *size), np.float32), np.empty(size, np.uint8)
    cut(volume, (start[0], start[1], start[2]), image, label)
    assert volume.label is not None
    inside = []
    for index in np.ndindex(*size):
        place = tuple(s + i for s, i in zip(start, index, strict=True))
        if all(0 <= p < extent for p, extent in zip(place, shape, strict=True)):
            assert image[(0, *index)] == volume.image[(0, *place)]
            assert label[index] == volume.label[place]
            inside.append(index)
    least = min(image[(0, *index)] for index in inside)
    for index in set(np.ndindex(*size)) - set(inside):
        assert image[(0, *index)] == least
        assert label[index] == 0


@given(shapes, seeds)
def test_a_changed_batch_is_finite_and_invents_no_class(shape, seed):
    volume = _volume(shape, seed)
    volume.spacing_mm = (0.6, 1.0, 5.0)
    training = Training(patch=(6, 5, 4), batch_size=4, augment=True)
    image, label, cases = draw_batch([volume], TASK, training, seed, "a", 1, 0)
    assert image.isfinite().all()
    assert set(label.unique().tolist()) <= {0, 1, 2}
    assert cases == (0, 0, 0, 0)
