"""The geometry of the report's two kinds of chart; the template draws it as inline SVG.

Inline SVG follows the page's colours and fonts, in the dark and on paper too, needs no plotting
library at the coordinator, and all its text passes the template's escaping.
Coordinates are SVG units, rounded so that equal records give equal bytes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from uharmony_server.records import AT_HOME, Record
from uharmony_server.summary import NO_SCORE, Score, metric_mean, withheld_of
from uharmony_service.page import number, printable

WIDTH, HEIGHT = 380.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 40.0, 10.0, 10.0, 32.0
ROW, GROUP_GAP, NAME_WIDTH = 15.0, 14.0, 170.0
DOT_WIDTH = 900.0

# Colours of Okabe and Ito, which stay apart for colour-blind readers; a dash or a marker besides.
SLOTS = {
    "local": 0,
    "pooled": 1,
    "pooled-uharmony": 2,
    "fedavg": 3,
    "fedbn": 4,
    "uharmony": 5,
}
OTHER_SLOTS = (6, 7, 8)


@dataclass(frozen=True)
class Tick:
    """A grid line and its label."""

    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A measured value; `title` appears when the pointer rests on it."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Line:
    """One arm's curve. `band` is the range over seeds, empty for one seed."""

    arm: str
    slot: int
    points: str
    band: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class LineChart:
    """One site's validation Dice against the round; `withheld` is `<11` where it is not told."""

    site: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    withheld: str = ""


@dataclass(frozen=True)
class Dot:
    """One arm at one site: a dot and, where it is known, its interval."""

    arm: str
    slot: int
    x: float
    y: float
    low: float | None
    high: float | None
    title: str


@dataclass(frozen=True)
class DotRow:
    """A site's name and its dots; `withheld` is `<11` where it tells none."""

    site: str
    top: float
    height: float
    dots: tuple[Dot, ...]
    withheld: str = ""


@dataclass(frozen=True)
class DotChart:
    """All sites' test Dice side by side."""

    height: float
    ticks: tuple[Tick, ...]
    rows: tuple[DotRow, ...]


def slots(arms: Sequence[str]) -> dict[str, int]:
    """A colour for each arm, the same in every report for the methods known by name."""
    plain = [arm.removesuffix(AT_HOME) for arm in arms]
    others = list(dict.fromkeys(arm for arm in plain if arm not in SLOTS))
    free = {arm: OTHER_SLOTS[i % len(OTHER_SLOTS)] for i, arm in enumerate(others)}
    return {a: SLOTS.get(p, free.get(p, 0)) for a, p in zip(arms, plain, strict=True)}


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers whose first and last enclose the range."""
    span = max(high - low, 1e-9)
    raw = span / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= 0.8 * raw)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [round(step * index, 10) for index in range(first, max(last, first + 1) + 1)]


def learning_curves(records: Sequence[Record], arms: Sequence[str]) -> list[LineChart]:
    """A chart for each site that has validation records, all on the same axes."""
    values: dict[str, dict[str, dict[int, list[float]]]] = {}
    runs: dict[tuple[str, str, int, int], list[Record]] = {}
    for record in records:
        if record.split == "validation" and record.kept is None:  # a choice is no point of a curve
            key = (record.site, record.arm, record.round, record.seed)
            runs.setdefault(key, []).append(record)
    for (site, arm, round_, _), group in sorted(runs.items()):
        mean = metric_mean(group, "dice")
        if mean is not None:
            rounds = values.setdefault(site, {}).setdefault(arm, {})
            rounds.setdefault(round_, []).append(mean)
    if not values:
        return []
    every = [v for a in values.values() for r in a.values() for seeds in r.values() for v in seeds]
    rounds_seen = [n for a in values.values() for r in a.values() for n in r]
    x_range = (min(rounds_seen), max(max(rounds_seen), min(rounds_seen) + 1))
    y_values = nice_ticks(min(every), max(every), 7)
    x_values = [t for t in nice_ticks(*x_range) if t == int(t) and x_range[0] <= t <= x_range[1]]

    def x(value: float) -> float:
        share = (value - x_range[0]) / (x_range[1] - x_range[0])
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        share = (value - y_values[0]) / (y_values[-1] - y_values[0])
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    chosen = slots(arms)
    charts = []
    hidden: dict[str, list[Record]] = {}
    for record in records:
        if record.split == "validation" and record.withheld:
            hidden.setdefault(record.site, []).append(record)
    for site in sorted(values.keys() | hidden.keys()):
        lines = []
        for arm in arms:
            rounds = values.get(site, {}).get(arm, {})
            if not rounds:
                continue
            means = {n: statistics.fmean(seeds) for n, seeds in sorted(rounds.items())}
            lines.append(
                Line(
                    arm=arm,
                    slot=chosen[arm],
                    points=" ".join(f"{x(n)},{y(v)}" for n, v in means.items()),
                    band=_band([(x(n), y(min(s)), y(max(s))) for n, s in sorted(rounds.items())]),
                    marks=tuple(
                        Mark(x(n), y(v), f"{printable(arm)}, round {n}: {number(v, 3)}")
                        for n, v in means.items()
                    ),
                )
            )
        charts.append(
            LineChart(
                site=site,
                x_ticks=tuple(Tick(x(t), f"{t:g}") for t in x_values),
                y_ticks=tuple(Tick(y(t), f"{t:.2f}") for t in y_values),
                lines=tuple(lines),
                withheld=withheld_of(hidden.get(site, ())),
            )
        )
    return charts


def dot_chart(
    scores: Mapping[tuple[str, str], Score], sites: Sequence[str], arms: Sequence[str]
) -> DotChart | None:
    """Every site's test Dice as dots with intervals, or None when nothing is defined."""
    shown = [s for s in scores.values() if s.mean is not None]
    if not shown:
        return None
    bounds = [v for s in shown for v in (s.mean, s.low, s.high) if v is not None]
    ticks = nice_ticks(min(bounds), max(bounds), 7)

    def x(value: float) -> float:
        share = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return round(NAME_WIDTH + share * (DOT_WIDTH - NAME_WIDTH - 20), 1)

    chosen, top, rows = slots(arms), 24.0, []
    for site in sites:
        dots: list[Dot] = []
        for arm in arms:
            found = scores.get((site, arm))
            if found is None or found.mean is None:
                continue
            dots.append(
                Dot(
                    arm=arm,
                    slot=chosen[arm],
                    x=x(found.mean),
                    y=top + GROUP_GAP / 2 + ROW * (len(dots) + 0.5),
                    low=None if found.low is None else x(found.low),
                    high=None if found.high is None else x(found.high),
                    title=f"{printable(site)}, {printable(arm)}: {number(found.mean, 3)}"
                    f" ({number(found.low, 3)} to {number(found.high, 3)})",
                )
            )
        height = ROW * max(len(dots), 1) + GROUP_GAP
        marks = [scores.get((site, arm), NO_SCORE).withheld for arm in arms]
        rows.append(DotRow(site, top, height, tuple(dots), next(filter(None, marks), "")))
        top += height
    return DotChart(top + 4, tuple(Tick(x(t), f"{t:.2f}") for t in ticks), tuple(rows))


def _band(columns: Sequence[tuple[float, float, float]]) -> str:
    """A closed outline along the highest values and back along the lowest."""
    if all(low == high for _, low, high in columns):
        return ""
    outline = [(x, high) for x, _, high in columns] + [(x, low) for x, low, _ in columns[::-1]]
    return " ".join(f"{x},{y}" for x, y in outline)
