"""What holds for every box that is drawn, and for both directions of every paste."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from uharmony_model.randomness import numpy_generator
from uharmony_model.unlabelled.copy_paste import draw_box, foreground_box, paste

sides = st.integers(1, 12)
sizes = st.tuples(sides, sides, sides)
large = st.tuples(*[st.integers(200, 400)] * 3)
volumes = st.floats(0.001, 1.0)
ratios = st.floats(1.0, 10.0)
seeds = st.integers(0, 2**31)


def box_of(seed: int, size: tuple[int, int, int], volume: float, ratio: float = 1 / 0.3):
    generator = numpy_generator(seed, "test box")
    return draw_box(generator, size, share=(volume, volume), aspect=(1 / ratio, ratio))


@given(seeds, sizes, volumes, ratios)
def test_a_box_lies_within_the_patch(seed, size, volume, ratio):
    box = box_of(seed, size, volume, ratio)
    for first, side, voxels in zip(box.start, box.size, size, strict=True):
        assert first >= 0
        assert side >= 1
        assert first + side <= voxels
    mask = box.mask(size)
    assert mask.shape == size
    assert int(mask.sum()) == math.prod(box.size)


@given(seeds, large, volumes, ratios)
def test_its_volume_is_the_one_drawn_but_for_rounding(seed, size, volume, ratio):
    box = box_of(seed, size, volume, ratio)
    # Each side is at most half a voxel from the one drawn; no side is below one voxel here.
    least = math.prod(side - 0.5 for side in box.size)
    most = math.prod(side + 0.5 for side in box.size)
    assert least <= volume * math.prod(size) * (1 + 1e-9)
    assert most >= volume * math.prod(size) * (1 - 1e-9)


@given(seeds, large, volumes, ratios)
def test_two_sides_are_in_a_ratio_within_the_aspect(seed, size, volume, ratio):
    box = box_of(seed, size, volume, ratio)
    # What the sides drawn were at least, or at most, before they were rounded.
    longest = max((side - 0.5) / n for side, n in zip(box.size, size, strict=True))
    shortest = min((side + 0.5) / n for side, n in zip(box.size, size, strict=True))
    assert longest <= ratio * shortest * (1 + 1e-9)


@given(seeds, sizes, st.integers(1, 3), st.booleans(), st.booleans())
def test_both_directions_hold_every_voxel_exactly_once(seed, size, samples, channels, single):
    shape = (samples, 2, *size) if channels else (samples, *size)
    count = math.prod(shape)
    first = torch.arange(count, dtype=torch.float32).reshape(shape)
    second = first + count
    mask = torch.from_numpy(numpy_generator(seed, "mask").random((samples, 1, *size)) < 0.5)
    mask = mask[0, 0] if single else mask
    there, back = paste(first, second, mask), paste(second, first, mask)
    held = torch.cat((there.flatten(), back.flatten())).sort().values
    assert torch.equal(held, torch.arange(2 * count, dtype=torch.float32))
    # Nothing moves: a voxel comes from the same place of one of the two.
    assert torch.equal(there % count, first)


@given(arrays(np.bool_, array_shapes(min_dims=3, max_dims=3, max_side=5)), seeds)
def test_the_box_around_foregrounds_is_the_smallest(first, seed):
    second = numpy_generator(seed, "second").random(first.shape) < 0.1
    box = foreground_box(torch.from_numpy(first), torch.from_numpy(second))
    voxels = {tuple(map(int, v)) for mask in (first, second) for v in np.argwhere(mask)}
    if not voxels:
        assert box is None
        return
    assert box is not None
    for axis in range(3):
        along = [voxel[axis] for voxel in voxels]
        assert box.start[axis] == min(along)
        assert box.start[axis] + box.size[axis] - 1 == max(along)
