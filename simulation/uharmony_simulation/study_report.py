"""The report of a heterogeneity study: one HTML page that is read offline and printed.

The page holds its own style and pictures, loads nothing and runs no script. Every text is escaped.
Equal input gives equal bytes, in whatever order the rows come: no clock is read here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from uharmony_model.atomic import write_atomic
from uharmony_model.methods import METHODS
from uharmony_model.metrics import FEWEST_PATIENTS
from uharmony_service.page import pages_of
from uharmony_simulation.paired import CaseScore, Comparison, Cost
from uharmony_simulation.study_classes import LabelLoss
from uharmony_simulation.study_plots import (
    SiteMatrix,
    gain_plot,
    matrix_plot,
    shift_plot,
    swap_plot,
)
from uharmony_simulation.study_regimes import Regimes
from uharmony_simulation.study_summary import Failure, failure_order, matrix_order
from uharmony_simulation.study_tables import (
    Block,
    Row,
    StudyTables,
    Swap,
    SwapRow,
    study_tables,
)
from uharmony_simulation.study_text import amount, signed, small_p

OWN_METHOD = "uharmony"


@dataclass(frozen=True)
class _Finding:
    """What a block says of one arm: the word against every reference, and the sites it harms."""

    block: Block
    row: Row
    below: tuple[str, ...]
    undecided: tuple[str, ...]


def write_study_report(
    path: Path,
    *,
    title: str,
    scores: Sequence[CaseScore],
    costs: Sequence[Cost] = (),
    matrices: Sequence[SiteMatrix] = (),
    swaps: Sequence[Swap] = (),
    facts: Mapping[str, object] | None = None,
    attribution: str = "",
    failures: Sequence[Failure] | None = None,
    arm: str = OWN_METHOD,
    regimes: Regimes | None = None,
    losses: Sequence[LabelLoss] = (),
) -> StudyTables:
    """Write the page whole or not at all, and return the numbers that stand in it.

    `facts` is shown as it is given: texts and numbers, or mappings of them. `arm` is the one the
    summary at the top speaks of. Without `failures` the page does not say that there were none.
    `regimes` and `losses` are those of `study_tables`.

    Raises:
        DataError: a case stands twice in a run, or a Dice is no number in [0, 1].
        StoreError: the disk is full or the folder cannot be written.
    """
    tables = study_tables(scores, costs, swaps, regimes=regimes, losses=losses)
    environment = pages_of("uharmony_simulation")
    environment.globals |= {
        "signed": signed,
        "small_p": small_p,
        "amount": amount,
        "tint": _tint,
        "fewest": FEWEST_PATIENTS,
    }
    html = environment.get_template("study_report.html.jinja").render(
        title=title,
        attribution=attribution,
        tables=tables,
        cells=[(c, [b for b in tables.blocks if b.cell == c]) for c in tables.cells],
        classes={found.cell: found for found in tables.classes},
        losses={found.cell: found for found in tables.losses},
        several_alone=any(block.several_alone for block in tables.blocks),
        findings=_findings(tables, arm),
        arm=arm,
        meanings={a: METHODS[a].meaning for a in tables.arms if a in METHODS},
        shifts=[
            (at_home, kind, picture)
            for at_home in (False, True)
            for kind, picture in sorted(shift_plot(tables, at_home=at_home).items())
        ],
        gain_plots=_gain_plots(tables),
        matrix_plots=_matrix_plots(matrices),
        swap_cells=_by_cell(tables.swaps),
        swap_sites={
            c: sorted({s for row in rows for s in row.at_sites})
            for c, rows in _by_cell(tables.swaps).items()
        },
        swap_plots={c: swap_plot(rows) for c, rows in _by_cell(tables.swaps).items()},
        worse=[(b, r, s, g) for b in tables.blocks for r, s, g in _worse(b)],
        compared_alone=any(r.gains for b in tables.blocks for r in b.rows),
        told=failures is not None,
        failures=sorted(failures or (), key=failure_order),
        facts=dict(facts or {}),
    )
    write_atomic(path, html.encode("utf-8", "replace"), mode=0o644)
    return tables


def _tint(found: Comparison) -> str:
    """The class of a word on the page; what is undecided has no colour."""
    return {"above": "up", "below": "down"}.get(found.word, "")


def _findings(tables: StudyTables, arm: str) -> list[_Finding]:
    return [
        _Finding(
            block=block,
            row=row,
            below=tuple(s for s, c in row.gains.items() if c.word == "below"),
            undecided=tuple(s for s, c in row.gains.items() if c.word == "undecided"),
        )
        for block in tables.blocks
        for row in block.rows
        if row.arm == arm and row.against
    ]


def _worse(block: Block) -> list[tuple[Row, str, Comparison]]:
    """Each site that an arm leaves below training alone, the worst first."""
    found = [
        (row, site, gain)
        for row in block.rows
        for site, gain in row.gains.items()
        if gain.word == "below"
    ]
    return sorted(found, key=lambda f: (f[2].difference.mean or 0.0, f[0].arm, f[1]))


def _gain_plots(tables: StudyTables) -> dict[str, bytes]:
    plots = {}
    for cell in tables.cells:
        picture = gain_plot([b for b in tables.blocks if b.cell == cell])
        if picture is not None:
            plots[cell] = picture
    return plots


def _matrix_plots(matrices: Sequence[SiteMatrix]) -> dict[str, bytes]:
    by_cell: dict[str, list[SiteMatrix]] = {}
    for matrix in sorted(matrices, key=matrix_order):
        by_cell.setdefault(matrix.cell, []).append(matrix)
    plots = {cell: matrix_plot(found) for cell, found in by_cell.items()}
    return {cell: picture for cell, picture in plots.items() if picture is not None}


def _by_cell(rows: Sequence[SwapRow]) -> dict[str, list[SwapRow]]:
    cells: dict[str, list[SwapRow]] = {}
    for row in rows:
        cells.setdefault(row.cell, []).append(row)
    return cells
