"""How the plots of a study look: one colour and marker for each arm, plain axes, stable bytes.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart; no two methods
share both colour and marker, so that a plot can be read in grey. No state outside a figure is
changed.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from uharmony_model.methods import METHODS
from uharmony_service.page import printable

Format = Literal["png", "svg"]
Dash = Literal["-"] | tuple[float, Sequence[float]]

DPI = 160
WIDTH = 9.6  # inches
SMALL, PLAIN = 8.5, 9.5  # points
BLACK, GREY, INK = "#000000", "#7f7f7f", "#333333"
ORANGE, SKY, GREEN, BLUE = "#e69f00", "#56b4e9", "#009e73", "#0072b2"
VERMILION, PURPLE = "#d55e00", "#cc79a7"
COLOURS = (ORANGE, SKY, GREEN, PURPLE, VERMILION, BLUE, BLACK)
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++", "ooo")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
# The arms that a reader looks for; what is compared with is drawn broken.
_KNOWN: dict[str, tuple[str, str, Dash]] = {
    "local": (GREY, "s", (0, (5, 3))),
    "pooled": (BLACK, "D", (0, (1, 1.5))),
    "pooled-uharmony": (PURPLE, "D", (0, (1, 1.5))),
    "fedavg": (VERMILION, "v", "-"),
    "fedbn": (GREEN, "^", "-"),
    "lg-fedavg": (ORANGE, "P", "-"),
    "uharmony": (BLUE, "o", "-"),
}


@dataclass(frozen=True)
class Style:
    """How an arm is drawn."""

    colour: str
    marker: str
    dash: Dash


def style_of(arm: str) -> Style:
    """An arm's style, the same in every study; unknown arms go by their name alone."""
    if arm in _KNOWN:
        return Style(*_KNOWN[arm])
    others = [name for name in METHODS if name not in _KNOWN]
    index = others.index(arm) if arm in others else len(others) + sum(map(ord, arm))
    taken = {(colour, marker) for colour, marker, _ in _KNOWN.values()}
    pairs = [
        (colour, MARKERS[(i + turn) % len(MARKERS)])
        for turn in range(len(MARKERS))
        for i, colour in enumerate(COLOURS)
    ]
    free = [pair for pair in pairs if pair not in taken]
    return Style(*free[index % len(free)], "-")


def figure_of(height: float) -> Figure:
    """A figure of full width and this height, in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def clean(axes: Axes, grid: Literal["x", "y"]) -> None:
    """Grid lines along the values and no frame."""
    axes.grid(axis=grid, color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=SMALL, length=0)
    for side in ("top", "right", "left" if grid == "y" else "bottom"):
        axes.spines[side].set_visible(False)


def title(axes: Axes, text: str) -> None:
    """A panel's name."""
    axes.set_title(text_of(text), fontsize=PLAIN, fontweight="bold", loc="left")


def handle_of(label: str, style: Style | str, marker: str = "o") -> Line2D:
    """A line of a legend, by an arm's style or by colour and marker."""
    if isinstance(style, str):
        return Line2D([], [], color=style, marker=marker, linewidth=1.4, label=label)
    return Line2D(
        [], [], color=style.colour, marker=style.marker, linestyle=style.dash, label=label
    )


def legend(figure: Figure, handles: Sequence[Line2D | Patch], columns: int) -> None:
    """One legend below all panels."""
    figure.legend(
        handles=list(handles),
        loc="outside lower center",
        ncols=columns,
        fontsize=SMALL,
        frameon=False,
    )


def text_of(text: str, longest: int = 28) -> str:
    """A name in a picture: no formula is read in it, and only characters that the font has."""
    known = _characters()
    line = "".join(c if ord(c) in known else "\ufffd" for c in printable(text))
    short = line if len(line) <= longest else line[: longest - 1] + "\u2026"
    # Legends leave out what begins with an underscore.
    return (" " if short.startswith("_") else "") + short.replace("$", r"\$")


@lru_cache(maxsize=1)
def _characters() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def draw(figure: Figure, fmt: Format) -> bytes:
    """The figure as a file."""
    buffer = io.BytesIO()
    # Without a name, a date or random marks in the file, equal input gives equal bytes.
    empty = {"Software": None} if fmt == "png" else {"Date": None, "Creator": None}
    with mpl.rc_context({"svg.hashsalt": "uharmony"}):
        figure.savefig(buffer, format=fmt, dpi=DPI, facecolor="white", metadata=empty)
    return buffer.getvalue()
