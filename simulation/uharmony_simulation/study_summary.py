"""A study's numbers for programs (JSON) and for a repository's pages (GitHub's Markdown)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from uharmony_model.methods import METHODS
from uharmony_server.summary import LOCAL
from uharmony_service.page import UNDEFINED, number
from uharmony_simulation.paired import SeedSpread
from uharmony_simulation.study_class_text import (
    class_json,
    class_markdown,
    loss_json,
    loss_markdown,
)
from uharmony_simulation.study_plots import SiteMatrix
from uharmony_simulation.study_tables import Block, MeanCost, Row, StudyTables
from uharmony_simulation.study_text import (
    alone_column,
    amount,
    cell,
    compared,
    dice,
    difference,
    short_difference,
    table,
)

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
                "over_sites": compared(row.over_sites),
                "at_sites": {s: compared(c) for s, c in row.at_sites.items()},
            }
            for row in tables.swaps
        ],
        "classes": [class_json(found) for found in tables.classes],
        "label_losses": [loss_json(found) for found in tables.losses],
        "matrices": [asdict(m) for m in sorted(matrices, key=matrix_order)],
        "failures": [asdict(f) for f in sorted(failures, key=failure_order)],
    }
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"


def markdown_tables(tables: StudyTables) -> str:
    """The main tables: a section for each condition and moment, then classes and swapped parts.

    Differences are in points of Dice with their 95 % interval, p after Holm, the rank-biserial
    effect size r, and the word.
    """
    parts = []
    for block in tables.blocks:
        parts.append(f"### {cell(block.cell)}, {MOMENTS[block.at_home]}")
        parts += [_dice_table(block), _against_table(block), _gain_table(block)]
    for by_class in tables.classes:
        parts += [f"### {cell(by_class.cell)}, class by class", class_markdown(by_class)]
    for lost in tables.losses:
        what = f"{cell(lost.cell)}, each arm against itself with all labels"
        parts += [f"### {what} ({cell(lost.all_labels)})", loss_markdown(lost)]
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
        parts += ["### Swapped parts", table(head, lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


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
        "against": {n: compared(c) for n, c in row.against.items()},
        "gains": {s: compared(c) for s, c in row.gains.items()},
        "cost": None if row.cost is None else asdict(row.cost),
        "alone": None if row.alone is None else asdict(row.alone),
    }


def _dice_table(block: Block) -> str:
    head = ["arm", "mean over sites", *block.sites, "seeds", "s/round", "up/round"]
    head += ["down a round of training", "local scalars", *(["kept"] if block.at_home else [])]
    lines = [
        [
            block.shown(row.arm),
            dice(row.over_sites, len(block.sites)),
            *(dice(row.at_sites[site], 1) for site in block.sites),
            _spread(row.seeds),
            *_costs(row.cost, at_home=block.at_home),
        ]
        for row in block.rows
    ]
    return table(head, lines)


def _against_table(block: Block) -> str:
    several = block.several_alone
    lines = [
        [
            block.shown(row.arm),
            *alone_column(row.alone, several=several),
            *(difference(row.against.get(name)) for name in block.references),
        ]
        for row in block.rows
        if row.against
    ]
    head = ["arm", *(["local-only model"] if several else [])]
    head += [
        f"against {'training alone' if several and name == LOCAL else block.shown(name)}"
        for name in block.references
    ]
    return table(head, lines) if lines else ""


def _gain_table(block: Block) -> str:
    several = block.several_alone
    lines = [
        [
            block.shown(row.arm),
            *alone_column(row.alone, several=several),
            *(short_difference(row.gains.get(site)) for site in block.sites),
        ]
        for row in block.rows
        if row.gains
    ]
    alone = ["local-only model"] if several else []
    return table(["against training alone", *alone, *block.sites], lines) if lines else ""


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
