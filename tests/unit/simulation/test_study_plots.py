"""A study's plots: what they draw, in which colours, and that equal input gives equal bytes."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from tests.support.study_scores import MATRIX, SWAPS, everything, run
from uharmony_model.methods import METHODS
from uharmony_simulation.plot_style import style_of
from uharmony_simulation.study_plots import gain_plot, matrix_plot, shift_plot, swap_plot
from uharmony_simulation.study_tables import study_tables


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def coloured(png, colour):
    """Pixels that have this colour but for rounding."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels(png).astype(int) - wanted).max(axis=2) <= 3).sum())


def test_every_method_has_a_style_of_its_own():
    styles = [(style_of(arm).colour, style_of(arm).marker) for arm in METHODS]
    assert len(set(styles)) == len(METHODS)
    assert style_of("something else") == style_of("something else")


def test_plots_draw_what_they_are_given():
    tables = study_tables(everything(), swaps=SWAPS)
    picture = shift_plot(tables, at_home=False)
    assert list(picture) == ["invert, sites 2"]
    assert coloured(picture["invert, sites 2"], style_of("uharmony").colour) > 200
    assert coloured(picture["invert, sites 2"], style_of("lg-fedavg").colour) == 0
    assert shift_plot(tables, at_home=True) == {}  # one strength is no curve

    # What was not shifted is strength 0: with one more strength there is a curve.
    gamma = run("uharmony", "north", [0.0] * 8, cell="gamma 1.0, sites 2")
    none = run("uharmony", "north", [0.1] * 8, cell="none, sites 2")
    other = run("uharmony", "north", [0.1] * 8, cell="none, sites 4")
    assert shift_plot(study_tables([*gamma, *other]), at_home=False) == {}
    assert list(shift_plot(study_tables([*gamma, *none]), at_home=False)) == ["gamma, sites 2"]

    gains = gain_plot(tables.blocks[1:2])
    assert gains is not None
    assert coloured(gains, "#0072b2") == 0  # nothing at home
    assert gain_plot([]) is None

    matrix = matrix_plot([MATRIX])
    assert matrix is not None
    assert matrix_plot([]) is None
    # 0.8 and 0.7 are in the yellow half of the map, 0.4 in the blue half.
    shown = pixels(matrix).astype(int)
    assert (shown[:, :, 0] > shown[:, :, 2] + 40).sum() > 1.4 * (
        shown[:, :, 2] > shown[:, :, 0] + 10
    ).sum()

    assert swap_plot(tables.swaps) is not None
    assert swap_plot([]) is None


def test_plots_as_svg_hold_no_date_and_are_equal():
    tables = study_tables(everything())
    first, second = (gain_plot(tables.blocks[1:2], "svg") for _ in range(2))
    assert first is not None
    assert first == second
    assert first.lstrip().startswith(b"<?xml")
    assert b"date" not in first.lower()
