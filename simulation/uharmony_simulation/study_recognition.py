"""Does the gate know whom it knows? Shares of volumes it calls familiar or refuses, as a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_HEAD = (
    "| condition | arm | site | refused | familiar | refused, took part | familiar, took part | "
    "auto, took part | their own, took part |"
)


@dataclass(frozen=True)
class Recognition:
    """What the gate said at one site that was left out, and at those that took part.

    Shares of test volumes. `auto` and `own` are mean Dice at the sites that took part, served with
    `--domain auto` or with `--site`.
    """

    cell: str
    arm: str
    seed: int
    site: str
    refused: float | None
    refused_known: float | None
    familiar: float | None
    familiar_known: float | None
    auto: float | None
    own: float | None


def recognition(cell: str, arm: str, seed: int, record: Mapping[str, Any]) -> Recognition | None:
    """What a record says; None where no site was left out, or there is no gate."""
    unseen = record.get("unseen")
    if not unseen or not unseen.get("U4"):
        return None
    said, taking = unseen["U4"], " at the sites that took part"
    auto = [dice for site in unseen.get("known", {}).values() for dice in site.values()]
    own = [row["dice"] for row in record["cases"] if not row["at_home"] and row["dice"] is not None]
    return Recognition(
        cell=cell,
        arm=arm,
        seed=seed,
        site=unseen["site"],
        refused=said["refused"],
        refused_known=said[f"refused{taking}"],
        familiar=said.get("familiar"),
        familiar_known=said.get(f"familiar{taking}"),
        auto=statistics.fmean(auto) if auto else None,
        own=statistics.fmean(own) if own else None,
    )


def recognition_text(found: Sequence[Recognition]) -> str:
    """A Markdown section, empty where there is nothing to say."""
    if not found:
        return ""
    lines = ["### Whom the gate knows", "", _HEAD, "| --- |" + " ---: |" * 8]
    for row in sorted(found, key=lambda r: (r.cell, r.arm, r.site, r.seed)):
        shares = (row.refused, row.familiar, row.refused_known, row.familiar_known)
        cells = [*(_share(s) for s in shares), *(_dice(d) for d in (row.auto, row.own))]
        lines.append(f"| {row.cell} | {row.arm} | {row.site} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _share(value: float | None) -> str:
    return "—" if value is None else f"{100 * value:.0f} %"


def _dice(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"
