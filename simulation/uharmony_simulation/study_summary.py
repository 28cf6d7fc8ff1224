"""A study's numbers for programs (JSON) and for a repository's pages (GitHub's Markdown)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from uharmony_model.methods import METHODS
from uharmony_service.page import UNDEFINED, number, points, printable
from uharmony_simulation.paired import Comparison, Estimate, SeedSpread
from uharmony_simulation.study_plots import SiteMatrix
from uharmony_simulation.study_tables import Block, MeanCost, Row, StudyTables

MOMENTS = {False: "after the last round", True: "with the last steps at home"}


@dataclass(frozen=True)
class Failure:
    """A run that did not end, an answer that was refused, an attempt that did not help."""

    arm: str
    cell: str
    what: str
    seed: int | None = None


def summary_json(
    tables: StudyTables,
    *,
    title: str = "",
    matrices: Sequence[SiteMatrix] = (),
    facts: Mapping[str, object] | None = None,
    failures: Sequence[Failure] = (),
) -> str:
    """The numbers as JSON: Dice in [0, 1], every comparison with its word.

    `facts` holds what JSON can: texts, numbers, lists and mappings of them.
    """
    content = {
        "title": title,
        "facts": dict(facts or {}),
        "cells": tables.cells,
        "arms": tables.arms,
        "seeds": tables.seeds,
        "blocks": [
            {
                "cell": block.cell,
                "at_home": block.at_home,
                "sites": block.sites,
                "references": block.references,
                "rows": [_row(row) for row in block.rows],
            }
            for block in tables.blocks
        ],
        "swaps": [
            {
                "arm": row.arm,
                "cell": row.cell,
                "part": row.part,
                "over_sites": _compared(row.over_sites),
                "at_sites": {s: _compared(c) for s, c in row.at_sites.items()},
            }
            for row in tables.swaps
        ],
        "matrices": [asdict(m) for m in sorted(matrices, key=matrix_order)],
        "failures": [asdict(f) for f in sorted(failures, key=failure_order)],
    }
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"


def markdown_tables(tables: StudyTables) -> str:
    """The main tables, one section for each condition and moment.

    Differences are in points of Dice with their 95 % interval, p after Holm, the rank-biserial
    effect size r, and the word.
    """
    parts = []
    for block in tables.blocks:
        parts.append(f"### {_cell(block.cell)}, {MOMENTS[block.at_home]}")
        parts += [_dice_table(block), _against_table(block), _gain_table(block)]
    if tables.swaps:
        sites = sorted({site for row in tables.swaps for site in row.at_sites})
        head = ["condition", "arm", "swapped part", "over sites", *sites]
        lines = [
            [
                row.cell,
                row.arm,
                row.part,
                difference(row.over_sites),
                *(short_difference(row.at_sites.get(site)) for site in sites),
            ]
            for row in tables.swaps
        ]
        parts += ["### Swapped parts", _table(head, lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


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


def matrix_order(matrix: SiteMatrix) -> tuple[str, int, str, bool]:
    """Matrices by condition, then in the order of the methods."""
    known = list(METHODS)
    place = known.index(matrix.arm) if matrix.arm in known else len(known)
    return matrix.cell, place, matrix.arm, matrix.at_home


def failure_order(failure: Failure) -> tuple[str, str, int, str]:
    """Failures by condition, arm and seed."""
    return failure.cell, failure.arm, -1 if failure.seed is None else failure.seed, failure.what


def _row(row: Row) -> dict[str, object]:
    return {
        "arm": row.arm,
        "over_sites": asdict(row.over_sites),
        "at_sites": {s: asdict(e) for s, e in row.at_sites.items()},
        "seeds": asdict(row.seeds),
        "against": {n: _compared(c) for n, c in row.against.items()},
        "gains": {s: _compared(c) for s, c in row.gains.items()},
        "cost": None if row.cost is None else asdict(row.cost),
    }


def _compared(found: Comparison) -> dict[str, object]:
    return {**asdict(found), "word": found.word}


def _dice_table(block: Block) -> str:
    head = ["arm", "mean over sites", *block.sites, "seeds", "s/round", "up/round", "down/round"]
    head += ["local scalars", *(["kept"] if block.at_home else [])]
    lines = [
        [
            block.shown(row.arm),
            _dice(row.over_sites, len(block.sites)),
            *(_dice(row.at_sites[site], 1) for site in block.sites),
            _spread(row.seeds),
            *_costs(row.cost, at_home=block.at_home),
        ]
        for row in block.rows
    ]
    return _table(head, lines)


def _against_table(block: Block) -> str:
    lines = [
        [block.shown(row.arm), *(difference(row.against.get(name)) for name in block.references)]
        for row in block.rows
        if row.against
    ]
    head = ["arm", *(f"against {block.shown(name)}" for name in block.references)]
    return _table(head, lines) if lines else ""


def _gain_table(block: Block) -> str:
    lines = [
        [block.shown(row.arm), *(short_difference(row.gains.get(site)) for site in block.sites)]
        for row in block.rows
        if row.gains
    ]
    head = ["against training alone", *block.sites]
    return _table(head, lines) if lines else ""


def _dice(found: Estimate, sites: int) -> str:
    if found.mean is None:
        return UNDEFINED
    text = number(found.mean, 3)
    if found.low is not None and found.high is not None:
        text += f" ({number(found.low, 3)} to {number(found.high, 3)})"
    return text if found.sites == sites else f"{text}, {found.sites} of {sites} sites"


def _bounds(found: Estimate) -> str:
    if found.low is None or found.high is None:
        return ""
    return f" ({points(found.low)} to {points(found.high)})"


def _spread(seeds: SeedSpread) -> str:
    if seeds.seeds < 2:
        return str(seeds.seeds)
    return f"{seeds.seeds}: {number(seeds.low, 3)} to {number(seeds.high, 3)}"


def _costs(cost: MeanCost | None, *, at_home: bool) -> list[str]:
    if cost is None:
        return [UNDEFINED] * (5 if at_home else 4)
    kept = ", ".join(f"{name} {count}" for name, count in cost.kept.items()) or UNDEFINED
    return [
        f"{cost.seconds_per_round:.2f}",
        amount(cost.bytes_up_per_round),
        amount(cost.bytes_down_per_round),
        f"{cost.local_parameters}",
        *([kept] if at_home else []),
    ]


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---", *("---:" for _ in head[1:])], *lines]
    shown = [row if i == 1 else [_cell(text) for text in row] for i, row in enumerate(rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in shown)


def _cell(text: str) -> str:
    """Foreign text as one cell: on one line, and nothing in it is markup."""
    return "".join("\\" + c if c in "\\|`*_[]<>&$~#!" else c for c in printable(text))
