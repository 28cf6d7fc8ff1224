"""The site's comparison of two models, for a terminal and for machines."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from uharmony_client.site_results import Comparison, Interval, SiteResults
from uharmony_service.page import UNDEFINED


def results_json(results: SiteResults) -> str:
    """Means and intervals; per-case rows stand in the site's CSV files."""
    return json.dumps(
        {
            "round": results.round,
            "classes": [_plain(found) for found in (*results.classes, results.overall)],
        },
        indent=1,
    )


def results_view(results: SiteResults) -> RenderableType:
    """Dice of both models by class, with 95 % intervals over cases."""
    table = Table(title=f"Test Dice after round {results.round}", title_justify="left")
    for column in ("class", "n", "federated", "own, local-only", "difference", ""):
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
    note = "above, below, not below: with 95 % over cases; not below allows one Dice point"
    return Group(table, Text(note, style="dim"))


def _plain(found: Comparison) -> dict[str, object]:
    return {**asdict(found), "word": found.word}


def _shown(interval: Interval) -> str:
    if interval.mean is None or interval.low is None or interval.high is None:
        return UNDEFINED
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
