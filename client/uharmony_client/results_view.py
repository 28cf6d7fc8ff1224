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
            "local_only": results.own,
            "kept": results.kept,
            "before_finale": None if results.before is None else _plain(results.before),
            "classes": [_plain(found) for found in (*results.classes, results.overall)],
        },
        indent=1,
    )


def results_view(results: SiteResults) -> RenderableType:
    """Dice of both models by class, or of the one there is, with 95 % intervals over cases."""
    table = Table(title=f"Test Dice after round {results.round}", title_justify="left")
    columns = ("class", "n", results.label, "own, local-only", "difference", "")
    shown = columns if results.own else columns[:3]
    for column in shown:
        table.add_column(column)
    for found in (*results.classes, results.overall):
        cells = (
            Text(found.name),
            str(found.n),
            _shown(found.federated),
            _shown(found.alone),
            _shown(found.difference),
            found.word,
        )
        table.add_row(*cells[: len(shown)])
    lines = [Text(line) for line in (*own_lines(results), *finale_lines(results))]
    if not results.own:
        return Group(table, *lines)
    note = (
        "above, below, not below: with 95 % over patients, six at least; "
        "not below allows one Dice point"
    )
    return Group(table, *lines, Text(note, style="dim"))


def own_lines(results: SiteResults) -> list[str]:
    """Why there is no model of the site's own, where there is none."""
    if results.own:
        return []
    return [
        "This site trains on no label, so it has no model of its own to compare with: the model "
        "from the study is measured alone."
    ]


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
