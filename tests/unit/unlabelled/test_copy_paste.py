"""Boxes and copy-paste, against formulas, slow loops and the statistics of many draws."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from uharmony_model.errors import ConfigError
from uharmony_model.randomness import numpy_generator
from uharmony_model.unlabelled.copy_paste import Box, draw_box, foreground_box, paste

FINE = (2000, 2000, 2000)  # so fine that rounding to voxels hides nothing


def boxes(count: int, size: tuple[int, int, int] = FINE, **settings: tuple[float, float]):
    generator = numpy_generator(0, "test boxes")
    return [draw_box(generator, size, **settings) for _ in range(count)]


def bools(*shape: int, share: float = 0.5) -> torch.Tensor:
    return torch.from_numpy(numpy_generator(0, "bools", *shape).random(shape) < share)


def test_a_box_is_the_voxels_between_its_corners():
    mask = Box((1, 0, 2), (2, 3, 1)).mask((4, 3, 5))
    inside = {(d, h, w) for d in (1, 2) for h in (0, 1, 2) for w in (2,)}
    assert mask.dtype == torch.bool
    assert {tuple(v) for v in mask.nonzero().tolist()} == inside
    assert mask.shape == (4, 3, 5)


@pytest.mark.parametrize(
    "box",
    [
        Box((0, 0, 3), (1, 1, 3)),  # beyond the patch
        Box((-1, 0, 0), (1, 1, 1)),
        Box((0, 0, 0), (1, 0, 1)),
    ],
)
def test_a_box_that_does_not_fit_is_refused(box):
    with pytest.raises(ConfigError, match="within the patch"):
        box.mask((5, 5, 5))


def test_the_share_of_the_volume_is_uniform():
    shares = [math.prod(box.size) / math.prod(FINE) for box in boxes(2000)]
    assert stats.kstest(shares, stats.uniform(0.02, 0.38).cdf).pvalue > 0.01
    narrow = [math.prod(box.size) / math.prod(FINE) for box in boxes(500, share=(0.1, 0.2))]
    assert min(narrow) > 0.0999
    assert max(narrow) < 0.2001


def test_proportions_fill_the_aspect_and_prefer_no_axis():
    # So small that no side reaches the patch and is cut: all proportions are as drawn.
    drawn = boxes(3000, share=(0.01, 0.01))
    logs = np.log(np.array([box.size for box in drawn]))
    for i, j in itertools.combinations(range(3), 2):
        ratio = logs[:, i] - logs[:, j]
        assert abs(ratio).max() <= -math.log(0.3) + 0.01
        assert abs(ratio).max() > -math.log(0.3) - 0.1
        # The difference of two uniform numbers of 0 to a has a triangle for its density.
        triangle = stats.triang(0.5, loc=math.log(0.3), scale=-2 * math.log(0.3))
        assert stats.kstest(ratio, triangle.cdf).pvalue > 0.01


def test_equal_proportions_give_the_patchs_own_shape():
    box = draw_box(numpy_generator(0, "x"), (80, 40, 20), share=(0.125, 0.125), aspect=(1.0, 1.0))
    assert box.size == (40, 20, 10)  # each side is the cube root of 1/8, one half


def test_a_side_that_would_exceed_the_patch_stops_there_and_the_others_grow():
    cut = [box for box in boxes(1000, share=(0.3, 0.3)) if max(box.size) == FINE[0]]
    assert len(cut) > 20
    for box in cut:
        assert math.prod(box.size) / math.prod(FINE) == pytest.approx(0.3, rel=2e-3)


def test_the_whole_patch_and_the_smallest():
    assert draw_box(numpy_generator(0, "x"), (5, 6, 7), share=(1.0, 1.0)) == Box(
        (0, 0, 0), (5, 6, 7)
    )
    assert draw_box(numpy_generator(0, "x"), (1, 1, 1)) == Box((0, 0, 0), (1, 1, 1))


def test_every_place_is_equally_likely():
    drawn = boxes(3000, (6, 6, 6), share=(1 / 27, 1 / 27), aspect=(1.0, 1.0))
    assert {box.size for box in drawn} == {(2, 2, 2)}
    for axis in range(3):
        counts = np.bincount([box.start[axis] for box in drawn], minlength=5)
        assert len(counts) == 5
        assert stats.chisquare(counts).pvalue > 0.01


def test_the_same_generator_draws_the_same_boxes():
    assert boxes(5) == boxes(5)
    assert len(set(boxes(5))) == 5


@pytest.mark.parametrize(
    ("size", "settings", "what"),
    [
        ((4, 0, 4), {}, "patch"),
        ((4, 4, 4), {"share": (0.0, 0.4)}, "share"),
        ((4, 4, 4), {"share": (0.4, 0.02)}, "share"),
        ((4, 4, 4), {"share": (0.5, 1.5)}, "share"),
        ((4, 4, 4), {"share": (float("nan"), 0.4)}, "share"),
        ((4, 4, 4), {"aspect": (0.0, 2.0)}, "aspect"),
        ((4, 4, 4), {"aspect": (1.5, 2.0)}, "aspect"),
        ((4, 4, 4), {"aspect": (0.5, math.inf)}, "aspect"),
    ],
)
def test_settings_of_no_box_are_refused(size, settings, what):
    with pytest.raises(ConfigError, match=what):
        draw_box(numpy_generator(0, "x"), size, **settings)


@pytest.mark.parametrize("leading", [(), (1,), (1, 1), (2,), (2, 1)])
def test_images_class_masks_and_label_maps_are_pasted_voxel_by_voxel(leading):
    size = (2, 3, 4)
    mask = bools(*leading, *size)
    for channels, dtype in ((3, torch.float32), (2, torch.bool), (None, torch.uint8)):
        shape = (2, *size) if channels is None else (2, channels, *size)
        numbers = numpy_generator(0, "numbers", str(dtype)).integers(0, 200, (2, *shape))
        into, of = torch.from_numpy(numbers).to(dtype)
        pasted = paste(into, of, mask)
        assert pasted.dtype == dtype
        assert pasted.shape == shape
        for place in np.ndindex(*shape):
            sample, voxel = place[0], place[-3:]
            own = (
                ()
                if not leading
                else (sample if leading[0] == 2 else 0, *(0,) * (len(leading) - 1))
            )
            inside = bool(mask[(*own, *voxel)])
            assert pasted[place] == (of if inside else into)[place]


def test_a_mask_of_each_sample_is_not_taken_for_channels():
    # B = C = 2: plain broadcasting of (B, D, H, W) would pair samples with channels.
    into, of = torch.zeros(2, 2, 1, 1, 1), torch.ones(2, 2, 1, 1, 1)
    mask = torch.tensor([True, False]).reshape(2, 1, 1, 1)
    assert paste(into, of, mask).flatten().tolist() == [1, 1, 0, 0]


def test_what_is_pasted_keeps_its_values_and_gradients():
    # As a sum of products, 0 * inf and 0 * nan would spread over the seam.
    into = torch.full((1, 1, 1, 1, 2), math.inf)
    of = torch.ones(1, 1, 1, 1, 2, requires_grad=True)
    pasted = paste(into, of, torch.tensor([[[True, False]]]))
    assert pasted.flatten().tolist() == [1, math.inf]
    pasted[..., 0].sum().backward()
    assert of.grad is not None
    assert of.grad.flatten().tolist() == [1, 0]


@pytest.mark.parametrize(
    ("into", "of", "mask"),
    [
        (torch.zeros(2, 1, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2), bools(2, 2, 2)),
        (torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2).double(), bools(2, 2, 2)),
        (torch.zeros(2, 2, 2), torch.zeros(2, 2, 2), bools(2, 2, 2)),
        (torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2), torch.zeros(2, 2, 2)),
        (torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2), bools(2, 2, 3)),
        (torch.zeros(1, 3, 2, 2, 2), torch.zeros(1, 3, 2, 2, 2), bools(1, 3, 2, 2, 2)),
        (torch.zeros(2, 2, 2, 2), torch.zeros(2, 2, 2, 2), bools(3, 2, 2, 2)),
        (torch.zeros(2, 2, 2, 2), torch.zeros(2, 2, 2, 2), bools(2, 2)),
    ],
)
def test_what_does_not_fit_is_not_pasted(into, of, mask):
    with pytest.raises(ConfigError, match="expected"):
        paste(into, of, mask)


def test_the_box_around_two_foregrounds():
    first, second = torch.zeros(2, 4, 5, 6, dtype=torch.bool)
    assert foreground_box(first, second) is None
    first[1, 2, 3] = True
    assert foreground_box(first, second) == Box((1, 2, 3), (1, 1, 1))
    assert foreground_box(second, first) == Box((1, 2, 3), (1, 1, 1))
    second[3, 0, 5] = True
    box = foreground_box(first, second)
    assert box == Box((1, 0, 3), (3, 3, 3))
    assert not ((first | second) & ~box.mask((4, 5, 6))).any()


def test_foregrounds_that_do_not_fit_are_refused():
    for second in (torch.zeros(2, 2, 2), bools(2, 2, 3), bools(1, 2, 2, 2)):
        with pytest.raises(ConfigError, match="one shape"):
            foreground_box(bools(2, 2, 2), second)
