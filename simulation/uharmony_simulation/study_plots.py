"""The plots of a study, each as the bytes of a picture for screen and paper.

Four questions, one plot each: how much the shift costs every arm, what each site gained over
training alone, what a site's model is worth elsewhere, and whether a swapped part is missed.
Whiskers are 95 % intervals; equal input gives equal bytes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from uharmony_model.metrics import MARGIN
from uharmony_service.page import number
from uharmony_simulation.paired import Comparison, Estimate
from uharmony_simulation.plot_style import (
    BLACK,
    BLUE,
    COLOURS,
    GREY,
    HATCHES,
    INK,
    PLAIN,
    SMALL,
    VERMILION,
    WIDTH,
    Format,
    clean,
    draw,
    figure_of,
    handle_of,
    legend,
    style_of,
    text_of,
    title,
)
from uharmony_simulation.study_order import arms_in_order, shift_of
from uharmony_simulation.study_tables import Block, StudyTables, SwapRow

UNSHIFTED = "none"
_IN_EVERY_PANEL = ("local", "pooled")
PANEL_ARMS = 6


@dataclass(frozen=True)
class SiteMatrix:
    """Mean test Dice of every site's model (rows) on every site's data (columns).

    `dice` has a row and a column for each of `sites`; None where it was not measured.
    """

    arm: str
    cell: str
    sites: tuple[str, ...]
    dice: tuple[tuple[float | None, ...], ...]
    at_home: bool = False


def shift_plot(tables: StudyTables, *, at_home: bool, fmt: Format = "png") -> dict[str, bytes]:
    """Mean Dice over sites against the strength of the shift, a picture for each kind of shift.

    The condition "none" with all else equal is strength 0 of every kind. Only arms that were run
    at two strengths or more are drawn. Many arms go into panels of a few, each with training alone
    and pooled training to compare.
    """
    kinds: dict[str, dict[str, list[tuple[float, Estimate]]]] = {}
    for block in tables.blocks:
        if block.at_home != at_home or (shift := shift_of(block.cell)) is None:
            continue
        for row in block.rows:
            if row.over_sites.mean is not None:
                by_arm = kinds.setdefault(shift[0], {})
                by_arm.setdefault(row.arm, []).append((shift[1], row.over_sites))
    unshifted = {b.cell: b for b in tables.blocks if b.at_home == at_home}
    pictures = {}
    for kind, by_arm in kinds.items():
        none = unshifted.get(UNSHIFTED + "".join(kind.partition(",")[1:]))
        for row in () if none is None else none.rows:
            if row.arm in by_arm and row.over_sites.mean is not None:
                by_arm[row.arm].append((0.0, row.over_sites))
        curves = {arm: curve for arm, curve in by_arm.items() if len(curve) > 1}
        if curves:
            pictures[kind] = draw(_shift_figure(kind, curves), fmt)
    return pictures


def gain_plot(blocks: Sequence[Block], fmt: Format = "png") -> bytes | None:
    """Dice minus training alone, in points, for each site and arm, of one condition's blocks.

    Hollow markers are undecided; None where nothing can be compared.
    """
    arms = arms_in_order(r.arm for b in blocks for r in b.rows if r.gains)
    sites = sorted({site for b in blocks for r in b.rows for site in r.gains})
    if not arms:
        return None
    height = 1.25 + 0.3 * len(arms)
    across = min(len(sites), 4)
    down = math.ceil(len(sites) / across)
    figure = figure_of(height * down)
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    shown = [axes for line in grid for axes in line]
    for axes, site in zip(shown, sites, strict=False):
        for index, arm in enumerate(arms):
            for block in blocks:
                row = next((r for r in block.rows if r.arm == arm), None)
                if row is not None and site in row.gains:
                    shift = (0.16 if block.at_home else -0.16) if len(blocks) > 1 else 0.0
                    marker = "D" if block.at_home else "o"
                    colour = BLUE if block.at_home else VERMILION
                    _dot(axes, row.gains[site], index + shift, marker, colour)
        axes.axvline(0, color=INK, linewidth=1)
        axes.axvline(-100 * MARGIN, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
        title(axes, site)
        axes.set_yticks(range(len(arms)), [text_of(arm) for arm in arms], fontsize=SMALL)
        axes.set_ylim(len(arms) - 0.4, -0.6)
        axes.set_xlabel("points against training alone", fontsize=SMALL)
        clean(axes, "x")
    for axes in shown[len(sites) :]:
        axes.set_visible(False)
    handles = [
        handle_of(
            "with the last steps at home" if block.at_home else "after the last round",
            BLUE if block.at_home else VERMILION,
            "D" if block.at_home else "o",
        )
        for block in blocks
    ]
    handles += [
        Line2D([], [], color=INK, marker="o", mfc="white", linestyle="none", label="undecided"),
        Line2D([], [], color=GREY, linestyle=(0, (4, 3)), label="one point below"),
    ]
    legend(figure, handles, len(handles))
    return draw(figure, fmt)


def matrix_plot(matrices: Sequence[SiteMatrix], fmt: Format = "png") -> bytes | None:
    """Every site's model on every site's data, a panel for each arm; None without a matrix."""
    if not matrices:
        return None
    across = min(len(matrices), 3)
    down = math.ceil(len(matrices) / across)
    cell = WIDTH / across
    figure = figure_of(down * (0.92 * cell + 0.2))
    grid = figure.subplots(down, across, squeeze=False)
    shown = [axes for line in grid for axes in line]
    for axes, matrix in zip(shown, matrices, strict=False):
        _matrix(axes, matrix)
    for axes in shown[len(matrices) :]:
        axes.set_visible(False)
    return draw(figure, fmt)


def swap_plot(rows: Sequence[SwapRow], fmt: Format = "png") -> bytes | None:
    """What another site's part costs, in points of Dice, for each part and site; bars hang down.

    None where nothing was swapped.
    """
    sites = sorted({site for row in rows for site in row.at_sites})
    if not sites:
        return None
    figure = figure_of(3.6)
    axes = figure.subplots()
    width = 0.8 / len(sites)
    for index, site in enumerate(sites):
        hatch = HATCHES[index % len(HATCHES)]
        colour = COLOURS[index % len(COLOURS)]
        for at, row in enumerate(rows):
            found = row.at_sites[site].difference if site in row.at_sites else None
            if found is None or found.mean is None:
                continue
            x = at - 0.4 + width * (index + 0.5)
            mean = 100 * found.mean
            axes.bar(x, mean, 0.9 * width, color=colour, hatch=hatch, edgecolor="white", zorder=2)
            if found.low is not None and found.high is not None:
                axes.vlines(x, 100 * found.low, 100 * found.high, color=INK, lw=1.2, zorder=3)
    axes.axhline(0, color=INK, linewidth=1)
    names = [f"{text_of(row.part.replace('_', ' '))}\n{text_of(row.arm)}" for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=SMALL)
    axes.set_ylabel("points, another site's part\nagainst one's own", fontsize=PLAIN)
    clean(axes, "y")
    handles = [
        Patch(
            facecolor=COLOURS[i % len(COLOURS)],
            hatch=HATCHES[i % len(HATCHES)],
            edgecolor="white",
            label=text_of(site),
        )
        for i, site in enumerate(sites)
    ]
    legend(figure, handles, min(len(handles), 6))
    return draw(figure, fmt)


def _shift_figure(kind: str, curves: Mapping[str, Sequence[tuple[float, Estimate]]]) -> Figure:
    arms = arms_in_order(curves)
    common = [arm for arm in arms if arm in _IN_EVERY_PANEL]
    others = [arm for arm in arms if arm not in common]
    panels = [
        common + others[i : i + PANEL_ARMS] for i in range(0, max(len(others), 1), PANEL_ARMS)
    ]
    across = min(len(panels), 2)
    down = math.ceil(len(panels) / across)
    figure = figure_of(3.9 * down)
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    shown = [axes for line in grid for axes in line]
    strengths = sorted({strength for curve in curves.values() for strength, _ in curve})
    # Whiskers of neighbours side by side, by a fraction of the closest two strengths.
    step = min(b - a for a, b in itertools.pairwise(strengths))
    for axes, panel in zip(shown, panels, strict=False):
        for index, arm in enumerate(panel):
            offset = step * 0.03 * (index - (len(panel) - 1) / 2)
            _curve(axes, arm, sorted(curves[arm], key=lambda point: point[0]), offset)
        axes.set_xticks(strengths, [f"{strength:g}" for strength in strengths], fontsize=SMALL)
        axes.set_xlabel(f"strength of the shift ({text_of(kind)})", fontsize=PLAIN)
        axes.set_ylabel("mean test Dice over sites", fontsize=PLAIN)
        axes.tick_params(labelbottom=True, labelleft=True)
        clean(axes, "y")
        axes.legend(
            handles=[handle_of(text_of(arm), style_of(arm)) for arm in panel],
            fontsize=SMALL,
            frameon=False,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
            ncols=4,
        )
    for axes in shown[len(panels) :]:
        axes.set_visible(False)
    return figure


def _curve(axes: Axes, arm: str, curve: Sequence[tuple[float, Estimate]], offset: float) -> None:
    style = style_of(arm)
    found = [(x + offset, p, p.mean) for x, p in curve if p.mean is not None]
    axes.plot(
        [x for x, _, _ in found],
        [mean for _, _, mean in found],
        color=style.colour,
        marker=style.marker,
        linestyle=style.dash,
        linewidth=1.6,
        markersize=6,
        markeredgecolor="white",
        markeredgewidth=0.7,
        zorder=3,
    )
    for x, point, _ in found:
        if point.low is not None and point.high is not None:
            axes.vlines(x, point.low, point.high, color=style.colour, lw=1.1, alpha=0.75, zorder=2)


def _dot(axes: Axes, gain: Comparison, y: float, marker: str, colour: str) -> None:
    found = gain.difference
    if found.mean is None:
        return
    if found.low is not None and found.high is not None:
        axes.hlines(y, 100 * found.low, 100 * found.high, color=colour, lw=1.4, zorder=2)
    face = "white" if gain.word == "undecided" else colour
    axes.plot(100 * found.mean, y, marker, ms=5, mec=colour, mfc=face, mew=1.3, zorder=3)


def _matrix(axes: Axes, matrix: SiteMatrix) -> None:
    count = len(matrix.sites)
    values = [[math.nan if v is None else v for v in row] for row in matrix.dice]
    axes.imshow(values, cmap="cividis", vmin=0.0, vmax=1.0)
    for row, line in enumerate(matrix.dice):
        for column, value in enumerate(line):
            colour = BLACK if value is None or value > 0.55 else "white"
            weight = "bold" if row == column else "normal"
            shown = number(value, 2)
            size = SMALL if count <= 6 else 6.5
            axes.text(
                column, row, shown, color=colour, ha="center", va="center", size=size, weight=weight
            )
        axes.add_patch(
            Rectangle((row - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=BLACK, linewidth=1.8)
        )
    names = [text_of(site, 14) for site in matrix.sites]
    axes.set_xticks(range(count), names, fontsize=SMALL, rotation=40, ha="right")
    axes.set_yticks(range(count), names, fontsize=SMALL)
    axes.set_xlabel("data of", fontsize=SMALL)
    axes.set_ylabel("model of", fontsize=SMALL)
    title(axes, f"{matrix.arm}, at home" if matrix.at_home else matrix.arm)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
