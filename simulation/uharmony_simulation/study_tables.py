"""The numbers of a study, computed once for its page, its JSON and its Markdown.

A block is one condition at one moment: after the last round, or with the sites' last steps at
home. Arms of a block are compared with the block's own references, so that all have spent the
same number of steps. The order of the rows that are given does not matter.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from uharmony_model.methods import METHODS
from uharmony_server.records import AT_HOME
from uharmony_server.summary import LOCAL
from uharmony_simulation.paired import (
    RESAMPLES,
    CaseScore,
    Comparison,
    Cost,
    Estimate,
    SeedSpread,
    compare,
    estimate,
    seed_spread,
)
from uharmony_simulation.rank_tests import holm

Key = TypeVar("Key", bound=Hashable)

REFERENCES = (LOCAL, "fedavg", "fedbn", "lg-fedavg", "pooled")

_SHIFT = re.compile(r"(?P<kind>[^,]*\S)\s+(?P<strength>-?\d+(?:\.\d+)?)(?P<rest>,.*)?")
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Swap:
    """One test case with its own site's `part`, and the mean over the other sites' parts."""

    arm: str
    cell: str
    part: str
    seed: int
    site: str
    case: str
    patient: str
    own: float
    swapped: float


@dataclass(frozen=True)
class MeanCost:
    """Costs of an arm in one condition: means over its runs; `kept` is summed over them."""

    seconds_per_round: float
    bytes_up_per_round: float
    bytes_down_per_round: float
    local_parameters: int
    kept: Mapping[str, int]


@dataclass(frozen=True)
class Row:
    """One arm in a block.

    `against` compares it with each reference over all sites, `gains` with training alone at each
    site; a reference or a site without common cases is missing.
    """

    arm: str
    over_sites: Estimate
    at_sites: Mapping[str, Estimate]
    seeds: SeedSpread
    against: Mapping[str, Comparison]
    gains: Mapping[str, Comparison]
    cost: MeanCost | None


@dataclass(frozen=True)
class Block:
    """All arms under one condition, after the last round or `at_home`."""

    cell: str
    at_home: bool
    sites: tuple[str, ...]
    references: tuple[str, ...]
    rows: tuple[Row, ...]

    def shown(self, arm: str) -> str:
        """An arm's name as tables of both moments have it."""
        return f"{arm}{AT_HOME}" if self.at_home else arm


@dataclass(frozen=True)
class SwapRow:
    """What it costs to give the sites each other's `part`: Dice with it minus Dice with their own.

    "below" says that the part carries what is particular to its site.
    """

    arm: str
    cell: str
    part: str
    over_sites: Comparison
    at_sites: Mapping[str, Comparison]


@dataclass(frozen=True)
class StudyTables:
    """Every number that a study's report prints."""

    cells: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    blocks: tuple[Block, ...]
    swaps: tuple[SwapRow, ...]


def study_tables(
    scores: Iterable[CaseScore],
    costs: Iterable[Cost] = (),
    swaps: Iterable[Swap] = (),
    *,
    resamples: int = RESAMPLES,
) -> StudyTables:
    """Compute every table of a study; arms and conditions that are missing have no entry.

    Holm's families are: in a block all arms against one reference; in a block all arms at all
    sites against training alone; in a condition all swapped parts, over all sites and by site.

    Raises:
        DataError: a case stands twice in a run, or a Dice is no number in [0, 1].
    """
    scores, costs, swaps = list(scores), list(costs), list(swaps)
    groups: dict[tuple[str, bool], dict[str, list[CaseScore]]] = {}
    for score in scores:
        block = groups.setdefault((score.cell, score.at_home), {})
        block.setdefault(score.arm, []).append(score)
    cells = _in_order(s.cell for s in scores)
    blocks = [
        _block(cell, at_home, groups[cell, at_home], costs, resamples)
        for cell in cells
        for at_home in (False, True)
        if (cell, at_home) in groups
    ]
    return StudyTables(
        cells=tuple(cells),
        arms=tuple(arms_in_order(s.arm for s in scores)),
        seeds=tuple(sorted({s.seed for s in scores})),
        blocks=tuple(blocks),
        swaps=tuple(_swap_rows(swaps, resamples)),
    )


def arms_in_order(arms: Iterable[str]) -> list[str]:
    """Arms in the order of the methods, then others by name."""
    known = {name: index for index, name in enumerate(METHODS)}
    return sorted(set(arms), key=lambda arm: (known.get(arm, len(known)), arm))


def shift_of(cell: str) -> tuple[str, float] | None:
    """The kind of shift, with all other conditions, and its strength; None where none is named.

    "invert 2.0, sites 4" is 2.0 of "invert, sites 4".
    """
    found = _SHIFT.fullmatch(cell)
    if found is None:
        return None
    return found["kind"] + (found["rest"] or ""), float(found["strength"])


def _in_order(cells: Iterable[str]) -> list[str]:
    """By name, and numbers in it by size."""

    def key(cell: str) -> list[tuple[float, str]]:
        parts = _NUMBER.split(cell)
        return [(float(p), "") if i % 2 else (0.0, p) for i, p in enumerate(parts)]

    return sorted(set(cells), key=lambda cell: (key(cell), cell))


def _block(
    cell: str,
    at_home: bool,
    by_arm: Mapping[str, Sequence[CaseScore]],
    costs: Sequence[Cost],
    resamples: int,
) -> Block:
    sites = tuple(sorted({score.site for scores in by_arm.values() for score in scores}))
    references = tuple(name for name in REFERENCES if name in by_arm)
    rows = []
    for arm in arms_in_order(by_arm):
        own = by_arm[arm]
        against = {
            name: compare(own, by_arm[name], resamples=resamples)
            for name in references
            if name != arm
        }
        alone = by_arm.get(LOCAL, ()) if arm != LOCAL else ()
        gains = {s: compare(own, alone, site=s, resamples=resamples) for s in sites}
        rows.append(
            Row(
                arm=arm,
                over_sites=estimate(own, resamples=resamples),
                at_sites={s: estimate(own, site=s, resamples=resamples) for s in sites},
                seeds=seed_spread(own),
                against={n: c for n, c in against.items() if c.difference.cases},
                gains={s: c for s, c in gains.items() if c.difference.cases},
                cost=_mean_cost([c for c in costs if (c.arm, c.cell) == (arm, cell)]),
            )
        )
    for name in references:
        found = _adjusted({r.arm: r.against[name] for r in rows if name in r.against})
        rows = [
            replace(r, against={**r.against, name: found[r.arm]}) if r.arm in found else r
            for r in rows
        ]
    gained = _adjusted({(r.arm, s): c for r in rows for s, c in r.gains.items()})
    rows = [replace(r, gains={s: gained[r.arm, s] for s in r.gains}) for r in rows]
    return Block(cell, at_home, sites, references, tuple(rows))


def _adjusted(family: Mapping[Key, Comparison]) -> dict[Key, Comparison]:
    adjusted = holm([comparison.p for comparison in family.values()])
    return {
        key: replace(comparison, p_holm=p)
        for (key, comparison), p in zip(family.items(), adjusted, strict=True)
    }


def _mean_cost(costs: Sequence[Cost]) -> MeanCost | None:
    if not costs:
        return None
    costs = sorted(costs, key=lambda c: c.seed)
    kept: dict[str, int] = {}
    for cost in costs:
        for name, count in cost.kept.items():
            kept[name] = kept.get(name, 0) + count
    return MeanCost(
        seconds_per_round=statistics.fmean(c.seconds_per_round for c in costs),
        bytes_up_per_round=statistics.fmean(c.bytes_up_per_round for c in costs),
        bytes_down_per_round=statistics.fmean(c.bytes_down_per_round for c in costs),
        local_parameters=max(c.local_parameters for c in costs),
        kept=dict(sorted(kept.items())),
    )


def _swap_rows(swaps: Sequence[Swap], resamples: int) -> list[SwapRow]:
    groups: dict[tuple[str, str, str], list[Swap]] = {}
    for swap in swaps:
        groups.setdefault((swap.cell, swap.arm, swap.part), []).append(swap)
    rows: list[SwapRow] = []
    for cell in _in_order(s.cell for s in swaps):
        arms = arms_in_order(s.arm for s in swaps if s.cell == cell)
        found = []
        for arm in arms:
            for part in sorted({p for c, a, p in groups if (c, a) == (cell, arm)}):
                group = groups[cell, arm, part]
                own = [_score(s, s.own) for s in group]
                other = [_score(s, s.swapped) for s in group]
                by_site = {
                    site: compare(other, own, site=site, resamples=resamples)
                    for site in sorted({s.site for s in group})
                }
                overall = compare(other, own, resamples=resamples)
                found.append(SwapRow(arm, cell, part, overall, by_site))
        family = _adjusted({(r.arm, r.part): r.over_sites for r in found})
        sites = _adjusted({(r.arm, r.part, s): c for r in found for s, c in r.at_sites.items()})
        rows += [
            replace(
                r,
                over_sites=family[r.arm, r.part],
                at_sites={s: sites[r.arm, r.part, s] for s in r.at_sites},
            )
            for r in found
        ]
    return rows


def _score(swap: Swap, dice: float) -> CaseScore:
    return CaseScore(
        arm=swap.arm,
        at_home=False,
        cell=swap.cell,
        seed=swap.seed,
        site=swap.site,
        case=swap.case,
        patient=swap.patient,
        dice=dice,
    )
