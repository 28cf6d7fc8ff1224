"""The numbers of a study, computed once for its page, its JSON and its Markdown.

A block is one condition at one moment: after the last round, or with the sites' last steps at
home. Arms of a block are compared with the block's own references, and with the local-only arm of
their own settings, so that both have spent the same number of steps. The order of the rows that
are given does not matter.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

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
    in_family,
    seed_spread,
)
from uharmony_simulation.study_classes import (
    ClassTable,
    LabelLoss,
    LossTable,
    class_tables,
    loss_tables,
)
from uharmony_simulation.study_order import arms_in_order, in_order, shown
from uharmony_simulation.study_regimes import Alone, Regimes, alone_of, several

REFERENCES = (
    *(LOCAL, "fedavg", "fedbn", "lg-fedavg", "pooled"),
    *("labelled-only", "labelled-only-fed"),
)


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
    site; a reference or a site without common cases is missing. `alone` is the arm that stands for
    training alone, also under `against["local"]`.
    """

    arm: str
    over_sites: Estimate
    at_sites: Mapping[str, Estimate]
    seeds: SeedSpread
    against: Mapping[str, Comparison]
    gains: Mapping[str, Comparison]
    cost: MeanCost | None
    alone: Alone | None = None


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
        return shown(arm, at_home=self.at_home)

    @property
    def several_alone(self) -> bool:
        """Whether the rows were compared with several arms that stand for training alone."""
        return several(row.alone for row in self.rows)


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
    classes: tuple[ClassTable, ...] = ()
    losses: tuple[LossTable, ...] = ()


def study_tables(
    scores: Iterable[CaseScore],
    costs: Iterable[Cost] = (),
    swaps: Iterable[Swap] = (),
    *,
    regimes: Regimes | None = None,
    losses: Iterable[LabelLoss] = (),
    resamples: int = RESAMPLES,
) -> StudyTables:
    """Compute every table of a study; arms and conditions that are missing have no entry.

    `regimes` names the local-only arm of each arm's own settings, as `local_of_regime` finds it;
    without it that is the arm called "local". `losses` tells which sites do not annotate what.

    Holm's families are: in a block all arms against one reference; in a block all arms at all
    sites against training alone; in a condition all swapped parts, over all sites and by site.

    Raises:
        DataError: a case stands twice in a run, or a Dice is no number in [0, 1].
    """
    scores, costs, swaps, losses = list(scores), list(costs), list(swaps), list(losses)
    regimes = regimes or {}
    groups: dict[tuple[str, bool], dict[str, list[CaseScore]]] = {}
    for score in scores:
        block = groups.setdefault((score.cell, score.at_home), {})
        block.setdefault(score.arm, []).append(score)
    cells = in_order(s.cell for s in scores)
    blocks = [
        _block(cell, at_home, groups[cell, at_home], costs, regimes, resamples)
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
        classes=tuple(class_tables(scores, regimes, losses, resamples)),
        losses=tuple(loss_tables(scores, losses, resamples)),
    )


def _block(
    cell: str,
    at_home: bool,
    by_arm: Mapping[str, Sequence[CaseScore]],
    costs: Sequence[Cost],
    regimes: Regimes,
    resamples: int,
) -> Block:
    sites = tuple(sorted({score.site for scores in by_arm.values() for score in scores}))
    arms = arms_in_order(by_arm)
    alone = {arm: alone_of(arm, by_arm, regimes) for arm in arms}
    there = {*by_arm} - {LOCAL} | {LOCAL for found in alone.values() if found is not None}
    references = tuple(name for name in REFERENCES if name in there)
    rows = []
    for arm in arms:
        own, found = by_arm[arm], alone[arm]
        others = {name: by_arm[name] for name in references if name not in (LOCAL, arm)}
        if found is not None:
            others = {LOCAL: by_arm[found.arm], **others}
        against = {n: compare(own, other, resamples=resamples) for n, other in others.items()}
        gains = {s: compare(own, others.get(LOCAL, ()), site=s, resamples=resamples) for s in sites}
        rows.append(
            Row(
                arm=arm,
                over_sites=estimate(own, resamples=resamples),
                at_sites={s: estimate(own, site=s, resamples=resamples) for s in sites},
                seeds=seed_spread(own),
                against={n: c for n, c in against.items() if c.difference.cases},
                gains={s: c for s, c in gains.items() if c.difference.cases},
                cost=_mean_cost([c for c in costs if (c.arm, c.cell) == (arm, cell)]),
                alone=found,
            )
        )
    for name in references:
        family = in_family({r.arm: r.against[name] for r in rows if name in r.against})
        rows = [
            replace(r, against={**r.against, name: family[r.arm]}) if r.arm in family else r
            for r in rows
        ]
    gained = in_family({(r.arm, s): c for r in rows for s, c in r.gains.items()})
    rows = [replace(r, gains={s: gained[r.arm, s] for s in r.gains}) for r in rows]
    return Block(cell, at_home, sites, references, tuple(rows))


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
    for cell in in_order(s.cell for s in swaps):
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
        family = in_family({(r.arm, r.part): r.over_sites for r in found})
        sites = in_family({(r.arm, r.part, s): c for r in found for s, c in r.at_sites.items()})
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
