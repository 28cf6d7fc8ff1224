"""Pictures of cases: which slices, which way round, in what proportion, and outlined where."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from matplotlib.image import imread

from uharmony_client.pictures import (
    CLASSES,
    MAX_BYTES,
    ONE_CLASS,
    chosen_slices,
    draw_case,
    outline,
)
from uharmony_model.errors import DataError

SHAPE = (24, 30, 18)


def box(shape=SHAPE, *ranges):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*r) for r in ranges)] = True
    return mask


TRUTH = box(SHAPE, (4, 10), (15, 25), (6, 12))[None]


def pixels(png):
    return imread(io.BytesIO(png))[..., :3]


def near(picture, colour, tolerance=0.12):
    """Where a picture has a colour given as #rrggbb."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.abs(picture - wanted).max(axis=-1) < tolerance


def body(picture):
    """Without the strips of titles and legend."""
    strip = int(0.36 / 9.0 * picture.shape[1]) + 2
    return picture[strip:-strip]


def draw(image=None, truth=TRUTH, prediction=TRUTH, spacing=(1.0, 1.0, 1.0), names=("lesion",)):
    image = np.random.default_rng(0).normal(size=SHAPE) if image is None else image
    return draw_case(image, truth, prediction, spacing, names)


def test_slices_go_through_the_largest_cross_section_of_the_truth():
    truth = box(SHAPE, (2, 12), (3, 9), (4, 8)) | box(SHAPE, (5, 6), (3, 20), (4, 17))
    # By hand: x = 5 has the second box besides; y 3 to 8 are equal, so the first; z 4 to 7 as well.
    assert chosen_slices(truth[None], np.zeros((1, *SHAPE), bool)) == (5, 3, 4)


def test_slices_fall_back_to_the_prediction_and_then_to_the_middle():
    empty = np.zeros((1, *SHAPE), bool)
    seen = box(SHAPE, (7, 8), (20, 21), (3, 4))[None]
    assert chosen_slices(empty, seen) == (7, 20, 3)
    assert chosen_slices(None, seen) == (7, 20, 3)
    assert chosen_slices(empty, empty) == (12, 15, 9)
    assert chosen_slices(None, empty) == (12, 15, 9)


def test_an_outline_has_the_length_and_the_corners_of_its_mask():
    mask = np.zeros((6, 8), dtype=bool)
    mask[2:5, 1:7] = True
    mask[3, 3] = False
    lines = outline(mask)
    lengths = np.abs(lines[:, 0] - lines[:, 1]).sum(axis=1)
    assert set(lengths) == {1.0}
    assert lengths.sum() == 2 * (3 + 6) + 4  # the box and the hole
    corners = lines.reshape(-1, 2)
    assert corners.min(axis=0).tolist() == [1, 2]  # (x, y) = (column, row)
    assert corners.max(axis=0).tolist() == [7, 5]
    assert len(outline(np.zeros((3, 3), dtype=bool))) == 0


def test_a_mask_at_the_border_is_outlined_there():
    assert len(outline(np.ones((2, 3), dtype=bool))) == 2 * (2 + 3)


def test_the_patients_right_front_and_top_are_where_a_radiologist_expects_them():
    image = np.zeros(SHAPE)
    image[-4:, -4:, -4:] = 1.0  # right, front, top in RAS
    nothing = np.zeros((1, *SHAPE), bool)
    here = box(SHAPE, (21, 22), (27, 28), (15, 16))[None]
    picture = body(pixels(draw(image, nothing, here)))
    bright = picture.min(axis=-1) > 0.9
    widths = np.array([SHAPE[0], SHAPE[0], SHAPE[1]])
    edges = np.concatenate([[0], np.cumsum(widths)]) / widths.sum() * picture.shape[1]
    for left, right in itertools.pairwise(edges):
        panel = bright[:, int(left) + 2 : int(right) - 2]
        rows, columns = np.nonzero(panel)
        # The corner fills the upper left; the letters at mid-height are much fewer.
        assert np.median(columns) < 0.25 * panel.shape[1]
        assert np.median(rows) < 0.5 * panel.shape[0]


def test_anisotropic_spacing_is_shown_in_proportion():
    image = np.ones(SHAPE)
    image[0, 0, 0] = 0.0
    empty = np.zeros((1, *SHAPE), bool)
    for spacing in ((1.0, 1.0, 1.0), (1.0, 1.0, 3.0), (2.0, 0.5, 1.0)):
        picture = body(pixels(draw(image, empty, empty, spacing)))
        bright = picture.min(axis=-1) > 0.9
        size = np.array(SHAPE) * spacing
        widths = size[[0, 0, 1]]
        scale = picture.shape[1] / widths.sum()
        middles = (np.cumsum(widths) - widths / 2) * scale
        for middle, height in zip(middles, size[[1, 2, 2]], strict=True):
            shown = bright[:, int(middle)].sum()
            assert shown == pytest.approx(min(height * scale, picture.shape[0]), rel=0.06)


def test_reference_and_prediction_are_outlined_in_their_colours():
    apart = box(SHAPE, (14, 20), (3, 9), (6, 12))[None]
    both = body(pixels(draw(np.zeros(SHAPE), TRUTH, apart)))
    assert near(both, ONE_CLASS[0]).sum() > 200
    assert near(both, ONE_CLASS[1]).sum() > 50
    only = body(pixels(draw(np.zeros(SHAPE), TRUTH, np.zeros_like(TRUTH))))
    assert near(only, ONE_CLASS[0]).sum() > 200
    assert near(only, ONE_CLASS[1]).sum() == 0
    without = pixels(draw(np.zeros(SHAPE), None, TRUTH))
    assert near(body(without), ONE_CLASS[1]).sum() > 50
    assert near(without, ONE_CLASS[0]).sum() == 0  # nor in the legend


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 1.0, 3.0), (2.0, 0.5, 1.0)])
def test_outlines_lie_where_their_voxels_are_shown(spacing):
    # The outlined box is the only bright thing, so its outline must frame the bright area.
    picture = body(pixels(draw(TRUTH[0].astype(float), None, TRUTH, spacing)))
    widths = (np.array(SHAPE) * spacing)[[0, 0, 1]]
    edges = np.concatenate([[0], np.cumsum(widths)]) / widths.sum() * picture.shape[1]
    for left, right in itertools.pairwise(edges):
        panel = picture[:, int(left) + 2 : int(right) - 2]
        line = np.argwhere(near(panel, ONE_CLASS[1]))
        # Without the letters, which stand at the panel's sides.
        bright = np.argwhere(panel.min(axis=-1) > 0.95)
        inside = bright[(bright >= line.min(axis=0)).all(1) & (bright <= line.max(axis=0)).all(1)]
        np.testing.assert_allclose(inside.min(axis=0), line.min(axis=0), atol=5)
        np.testing.assert_allclose(inside.max(axis=0), line.max(axis=0), atol=5)
        assert len(inside) > 0.8 * len(bright)


def test_each_class_has_its_own_pair_of_colours():
    masks = np.stack([TRUTH[0], box(SHAPE, (4, 10), (15, 25), (12, 16))])
    moved = np.roll(masks, 2, axis=2)
    picture = body(pixels(draw(np.zeros(SHAPE), masks, moved, names=("front", "back"))))
    for bright, dark in CLASSES[:2]:
        assert near(picture, bright, 0.08).any()
        assert near(picture, dark, 0.08).any()


def test_equal_cases_give_equal_bytes():
    assert draw() == draw()
    assert draw() != draw(prediction=np.roll(TRUTH, 1, axis=1))


def test_a_volume_of_clinical_size_stays_small():
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in (200, 220, 60)], indexing="ij")
    noise = np.random.default_rng(0).normal(0, 0.02, axes[0].shape)
    radius = np.sqrt(np.sum(np.square(axes), axis=0))
    image = np.where(radius < 0.9, 1.0 + 0.3 * np.sin(9 * axes[0]), 0) + noise
    truth = (np.sum(np.square(np.array(axes) - 0.2), axis=0) < 0.05)[None]
    png = draw(image, truth, np.roll(truth, 5, axis=1), (1.0, 1.0, 3.0))
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(png) <= MAX_BYTES
    assert pixels(png).shape[1] >= 600


@pytest.mark.parametrize(
    "image",
    [
        np.full(SHAPE, 7.0),
        np.full(SHAPE, np.nan),
        np.where(np.arange(24)[:, None, None] < 5, np.inf, np.ones(SHAPE)),
        np.zeros(SHAPE, dtype=np.float16),
        np.full(SHAPE, -3e38, dtype=np.float32),
    ],
    ids=["constant", "nan", "partly infinite", "half", "huge"],
)
def test_odd_images_are_drawn_without_a_warning(image):
    assert pixels(draw(image)).shape[2] == 3


@pytest.mark.parametrize("shape", [(1, 1, 1), (40, 2, 2), (2, 2, 300)])
def test_odd_shapes_are_drawn(shape):
    mask = np.ones((1, *shape), dtype=bool)
    assert draw(np.zeros(shape), mask, mask)[:4] == b"\x89PNG"


def test_class_names_are_text_and_no_formula():
    assert draw(names=(r"$\frac{oops",))[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("truth", "prediction"),
    [
        (TRUTH[0], TRUTH),
        (TRUTH, TRUTH[..., :-1]),
        (TRUTH, np.concatenate([TRUTH, TRUTH])),
    ],
)
def test_masks_off_the_images_grid_are_refused(truth, prediction):
    with pytest.raises(DataError, match=r"expected \(1, 24, 30, 18\)"):
        draw(truth=truth, prediction=prediction)
