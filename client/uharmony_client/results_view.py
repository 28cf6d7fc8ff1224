"""The site's comparison of two models, for a terminal and for machines."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from uharmony_client.site_results import Comparison, Interval, SiteResults
from uharmony_service.page import UNDEFINED, number, points


def results_json(results: SiteResults) -> str:
    """Means and intervals; per-case rows stand in the site's CSV files."""
    return json.dumps(
        {
            "round": results.round,
            "model": results.label,
            "kept": results.kept,
            "before_finale": None if results.before is None else _plain(results.before),
            "classes": [_plain(found) for found in (*results.classes, results.overall)],
        },
        indent=1,
    )


def results_view(results: SiteResults) -> RenderableType:
    """Dice of both models by class, with 95 % intervals over cases."""
    table = Table(title=f"Test Dice after round {results.round}", title_justify="left")
    for column in ("class", "n", results.label, "own, local-only", "difference", ""):
        table.add_column(column)
    for found in (*results.classes, results.overall):
        table.add_row(
            Text(found.name),
            str(found.difference.n),
            _shown(found.federated),
            _shown(found.alone),
            _shown(found.difference),
            found.word,
        )
    lines = [Text(line) for line in finale_lines(results)]
    note = (
        "above, below, not below: with 95 % over patients, six at least; "
        "not below allows one Dice point"
    )
    return Group(table, *lines, Text(note, style="dim"))


def finale_lines(results: SiteResults) -> list[str]:
    """What became of the federation's model at the site's finale; nothing without one."""
    lines = []
    if results.kept == "local":
        lines.append("This site kept its local-only model: both columns are models of its own.")
    elif results.kept == "federated":
        lines.append("This site kept the model of the federation as it was after the last round.")
    elif results.kept is not None:
        lines.append(f"After the last round this site trained at home and kept: {results.kept}.")
    before = results.before
    if before is not None and before.difference.mean is not None:
        found = before.difference
        lines.append(
            "The federation's model after the last round, without the steps at home: Dice "
            f"{number(before.federated.mean, 3)}, difference to local-only "
            f"{points(found.mean)} points ({points(found.low)} to {points(found.high)}), "
            f"{before.word}."
        )
    return lines


def _plain(found: Comparison) -> dict[str, object]:
    return {**asdict(found), "word": found.word}


def _shown(interval: Interval) -> str:
    if interval.mean is None or interval.low is None or interval.high is None:
        return UNDEFINED
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
