"""How the numbers of a study are written in Markdown and on its page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from uharmony_service.page import UNDEFINED, number, points, printable
from uharmony_simulation.paired import Comparison, Estimate
from uharmony_simulation.study_regimes import Alone


def difference(found: Comparison | None) -> str:
    """A comparison in one line: points, interval, p after Holm, effect size, n and word."""
    if found is None or found.difference.mean is None:
        return UNDEFINED
    return (
        f"{points(found.difference.mean)}{_bounds(found.difference)}, p {small_p(found.p_holm)},"
        f" r {signed(found.effect)}, n {found.difference.cases}: {found.word}"
    )


def short_difference(found: Comparison | None) -> str:
    """A comparison without its test: points, interval, n and word."""
    if found is None or found.difference.mean is None:
        return UNDEFINED
    estimated = found.difference
    return f"{points(estimated.mean)}{_bounds(estimated)}, n {estimated.cases}: {found.word}"


def signed(effect: float | None) -> str:
    """An effect size with its sign; zero has none."""
    if effect is None:
        return UNDEFINED
    text = f"{effect:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "\u2212")


def small_p(p: float | None) -> str:
    """A p-value as tables show it; what is too small for the digits is said to be so."""
    if p is None:
        return UNDEFINED
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def amount(value: float | None) -> str:
    """Bytes in the unit that suits them: 1 kB is 1000 B."""
    if value is None:
        return UNDEFINED
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.{0 if value >= 100 * size else 1}f} {unit}"
    return f"{value:.0f} B"


def dice(found: Estimate, sites: int) -> str:
    """A mean with its interval, and of how many sites it is where some are missing."""
    if found.mean is None:
        return UNDEFINED
    text = number(found.mean, 3)
    if found.low is not None and found.high is not None:
        text += f" ({number(found.low, 3)} to {number(found.high, 3)})"
    return text if found.sites == sites else f"{text}, {found.sites} of {sites} sites"


def compared(found: Comparison) -> dict[str, object]:
    """A comparison as JSON takes it, with its word."""
    return {**asdict(found), "word": found.word}


def alone_column(alone: Alone | None, *, several: bool) -> list[str]:
    """The arm that stands for training alone, in a column where it is not the same for all."""
    if not several:
        return []
    return [UNDEFINED if alone is None else alone.shown]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in GitHub's Markdown."""
    rows = [head, ["---", *("---:" for _ in head[1:])], *lines]
    shown = [row if i == 1 else [cell(text) for text in row] for i, row in enumerate(rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in shown)


def cell(text: str) -> str:
    """Foreign text as one cell: on one line, and nothing in it is markup."""
    return "".join("\\" + c if c in "\\|`*_[]<>&$~#!" else c for c in printable(text))


def _bounds(found: Estimate) -> str:
    if found.low is None or found.high is None:
        return ""
    return f" ({points(found.low)} to {points(found.high)})"
