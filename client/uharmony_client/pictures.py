"""A segmented case as one picture: three planes, reference and prediction outlined.

The planes go through the largest cross-section of the reference, in radiological orientation:
the patient's right is on the left. Arrays are `(D, H, W)` on RAS axes, D to the right, H to the
front, W to the top; masks are `(J, D, H, W)`; lengths are in mm.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from uharmony_model.errors import DataError

Mask = npt.NDArray[np.bool_]
Image = npt.NDArray[np.floating[Any]]

MAX_BYTES = 120_000
RESOLUTIONS = (110, 90, 75, 60)  # dots per inch, tried until the picture is small enough
WIDTH_INCHES, STRIP_INCHES = 9.0, 0.36
TEXT_POINTS = 11
# After Okabe and Ito, which colour-blind readers can tell apart; on grey images.
ONE_CLASS = ("#56b4e9", "#ffa726")  # reference, prediction
CLASSES = (  # prediction and, darker, reference
    ("#56b4e9", "#2f6f96"),
    ("#ffa726", "#9c6210"),
    ("#2ed3a2", "#17805f"),
    ("#f48fc5", "#9a4f79"),
    ("#f0e442", "#938b1c"),
    ("#ff7043", "#a3401f"),
)


@dataclass(frozen=True)
class Plane:
    """How an axis' slices are shown: `columns` and `rows` are axes, both drawn from their end."""

    name: str
    axis: int
    columns: int
    rows: int
    left: str
    right: str


@dataclass(frozen=True)
class Style:
    """A line: its width is in points, and a higher order lies on top."""

    colour: str
    width: float
    order: int


# Drawn from the end: R and A to the left of the picture, S and A to its top.
PLANES = (
    Plane("axial", 2, 0, 1, "R", "L"),
    Plane("coronal", 1, 0, 2, "R", "L"),
    Plane("sagittal", 0, 1, 2, "A", "P"),
)


def draw_case(
    image: Image,
    truth: npt.NDArray[Any] | None,
    prediction: npt.NDArray[Any],
    spacing_mm: Sequence[float],
    class_names: Sequence[str],
) -> bytes:
    """Draw a case as PNG; without a reference the planes go through the prediction.

    Raises:
        DataError: the masks do not lie on the image's grid, or are not one for each class.
    """
    expected = (len(class_names), *image.shape)
    for name, masks in (("reference", truth), ("prediction", prediction)):
        if masks is not None and (image.ndim != 3 or masks.shape != expected):
            raise DataError(
                f"picture: {name} has shape {masks.shape}, expected {expected}, one mask"
                " (D, H, W) for each class on the image's grid"
            )
    predicted: Mask = np.asarray(prediction, dtype=bool)
    reference: Mask | None = None if truth is None else np.asarray(truth, dtype=bool)
    figure = _figure(image, reference, predicted, spacing_mm, class_names)
    png = b""
    for resolution in RESOLUTIONS:
        buffer = io.BytesIO()
        # Without its name and version in the file, equal cases give equal bytes.
        figure.savefig(
            buffer, format="png", dpi=resolution, facecolor="black", metadata={"Software": None}
        )
        png = buffer.getvalue()
        if len(png) <= MAX_BYTES:
            break
    return png


def chosen_slices(truth: Mask | None, prediction: Mask) -> tuple[int, int, int]:
    """For each axis the slice with most reference; without any, of prediction, or the middle."""
    for masks in (truth, prediction):
        if masks is not None and masks.any():
            union = masks.any(axis=0)
            areas = [union.sum(axis=tuple(a for a in range(3) if a != axis)) for axis in range(3)]
            return (int(areas[0].argmax()), int(areas[1].argmax()), int(areas[2].argmax()))
    _, depth, height, width = prediction.shape
    return depth // 2, height // 2, width // 2


def outline(mask: Mask) -> npt.NDArray[np.float64]:
    """The voxel edges around a mask `(rows, columns)`, as segments `(N, 2, 2)` of (x, y).

    Voxel (r, c) covers [c, c+1] x [r, r+1]: the outline is what was segmented, not smoothed.
    """
    padded = np.pad(mask, 1)
    row, column = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    level = np.stack([np.stack([column, row], -1), np.stack([column + 1, row], -1)], 1)
    row, column = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    upright = np.stack([np.stack([column, row], -1), np.stack([column, row + 1], -1)], 1)
    return np.concatenate([level, upright]).astype(np.float64)


def _window(image: Image) -> tuple[float, float]:
    """The 1st and 99.5th percentile of the finite voxels: what is shown as black and white."""
    # A few hundred thousand voxels settle percentiles; a CT of 10^8 is not sorted for a picture.
    sample = image.ravel()[:: max(1, image.size // 500_000)]
    sample = sample[np.isfinite(sample)]
    if sample.size == 0:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(sample, [1.0, 99.5]))
    if high <= low:
        low, high = float(sample.min()), float(sample.max())
    return low, max(high, low + 1e-6 * max(1.0, abs(low)))


def _figure(
    image: Image,
    truth: Mask | None,
    prediction: Mask,
    spacing_mm: Sequence[float],
    class_names: Sequence[str],
) -> Figure:
    size_mm = [count * float(step) for count, step in zip(image.shape, spacing_mm, strict=True)]
    widths = [size_mm[plane.columns] for plane in PLANES]
    tallest = max(size_mm[plane.rows] for plane in PLANES)
    # One scale in mm for all three planes, so that they can be compared.
    height = float(np.clip(WIDTH_INCHES * tallest / sum(widths), 1.2, 6.0))
    figure = Figure(figsize=(WIDTH_INCHES, height + 2 * STRIP_INCHES))
    FigureCanvasAgg(figure)
    strip = STRIP_INCHES / (height + 2 * STRIP_INCHES)
    left, window = 0.0, _window(image)
    for plane, slice_ in zip(PLANES, _by_plane(chosen_slices(truth, prediction)), strict=True):
        width = size_mm[plane.columns] / sum(widths)
        axes = figure.add_axes((left, strip, width, 1.0 - 2 * strip))
        figure.text(
            left + width / 2,
            1.0 - strip / 2,
            f"{plane.name} {slice_ + 1}/{image.shape[plane.axis]}",
            color="white",
            fontsize=TEXT_POINTS,
            ha="center",
            va="center",
        )
        left += width
        _draw_plane(axes, plane, slice_, image, window, truth, prediction, size_mm)
    _add_legend(figure, _entries(truth is not None, class_names))
    return figure


def _by_plane(slices: tuple[int, int, int]) -> list[int]:
    return [slices[plane.axis] for plane in PLANES]


def _draw_plane(
    axes: Axes,
    plane: Plane,
    slice_: int,
    image: Image,
    window: tuple[float, float],
    truth: Mask | None,
    prediction: Mask,
    size_mm: Sequence[float],
) -> None:
    low, high = window
    shown = np.nan_to_num(_view(image, plane, slice_), nan=low, posinf=high, neginf=low)
    step_x = size_mm[plane.columns] / shown.shape[1]
    step_y = size_mm[plane.rows] / shown.shape[0]
    extent = (0.0, size_mm[plane.columns], size_mm[plane.rows], 0.0)
    axes.imshow(shown, cmap="gray", vmin=low, vmax=high, extent=extent, interpolation="auto")
    axes.set_axis_off()
    for index in range(len(prediction)):
        for masks, style in zip((truth, prediction), _styles(index, len(prediction)), strict=True):
            if masks is not None:
                lines = outline(_view(masks[index], plane, slice_)) * (step_x, step_y)
                axes.add_collection(
                    LineCollection(
                        lines.tolist(),
                        colors=style.colour,
                        linewidths=style.width,
                        capstyle="projecting",
                        zorder=style.order,
                    )
                )
    for text, x, align in ((plane.left, 0.03, "left"), (plane.right, 0.97, "right")):
        _write(axes, x, 0.5, text, align, "center")


def _view(volume: npt.NDArray[Any], plane: Plane, slice_: int) -> npt.NDArray[Any]:
    """One slice as it is displayed, (rows, columns) from the top left."""
    flat: npt.NDArray[Any] = np.take(volume, slice_, axis=plane.axis)
    # The two axes that are left keep their order, and columns come first in every plane.
    return flat[::-1, ::-1].T


def _write(axes: Axes, x: float, y: float, text: str, across: str, up: str) -> None:
    written = axes.text(
        x, y, text, transform=axes.transAxes, color="white", fontsize=TEXT_POINTS, ha=across, va=up
    )
    written.set_path_effects([patheffects.withStroke(linewidth=2, foreground="black")])


def _styles(index: int, count: int) -> tuple[Style, Style]:
    """How a class' reference and prediction are drawn: apart by colour, or by width."""
    if count == 1:
        return Style(ONE_CLASS[0], 2.8, 2), Style(ONE_CLASS[1], 1.5, 3)
    bright, dark = CLASSES[index % len(CLASSES)]
    return Style(dark, 4.5, 2), Style(bright, 1.3, 3)


def _entries(with_truth: bool, class_names: Sequence[str]) -> list[tuple[str, Style]]:
    styles = [_styles(index, len(class_names)) for index in range(len(class_names))]
    classes = [(name, style) for name, (_, style) in zip(class_names, styles, strict=True)]
    if not with_truth:
        return [(f"{name}: prediction", style) for name, style in classes]
    if len(class_names) == 1:
        reference, prediction = styles[0]
        return [(f"{class_names[0]}: reference", reference), ("prediction", prediction)]
    wide, narrow = Style("#777777", 4.5, 2), Style("#dddddd", 1.3, 3)
    return [*classes, ("wide: reference", wide), ("narrow: prediction", narrow)]


def _add_legend(figure: Figure, entries: Sequence[tuple[str, Style]]) -> None:
    legend = figure.legend(
        [Line2D([], [], color=s.colour, lw=s.width) for _, s in entries],
        [text for text, _ in entries],
        loc="lower center",
        ncols=len(entries),
        frameon=False,
        fontsize=TEXT_POINTS,
        labelcolor="white",
        borderaxespad=0.3,
        columnspacing=1.4,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
