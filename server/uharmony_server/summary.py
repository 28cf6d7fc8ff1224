"""From records to the numbers of a table: one score a site and arm, and what each site gained.

The test split of every run's last round counts; no round is chosen by its test result. A site's
score is the mean over its classes, and over its domains by their numbers of cases. Domains whose
numbers a site withholds are in no mean.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from uharmony_model.methods import METHODS
from uharmony_server.records import AT_HOME, Record
from uharmony_service.page import number, points, printable

LOCAL = "local"


@dataclass(frozen=True)
class Score:
    """A mean over seeds with its interval, `cases` at the site and `seeds` that have a value.

    `withheld` is `<11` where the site does not tell the numbers of some or all of its cases.
    """

    mean: float | None
    low: float | None
    high: float | None
    cases: int
    seeds: int
    withheld: str = ""

    @property
    def shown_cases(self) -> str:
        """The number of cases, `<11`, or both, as a table shows it."""
        return shown_cases(self.cases, self.withheld)


NO_SCORE = Score(None, None, None, 0, 0)


def arms_of(records: Iterable[Record]) -> list[str]:
    """Columns of tables: arms in the order of the methods, then others, each before its finale."""
    known = {name: index for index, name in enumerate(METHODS)}
    columns = {r.column: r.arm for r in records}
    return sorted(columns, key=lambda c: (known.get(columns[c], len(known)), columns[c], c))


def reference_of(column: str) -> str:
    """What a column is compared with: the site alone, after as many steps."""
    return f"{LOCAL}{AT_HOME}" if column.endswith(AT_HOME) else LOCAL


def sites_of(records: Iterable[Record]) -> list[str]:
    """Sites by name."""
    return sorted({r.site for r in records})


def last_test(records: Iterable[Record]) -> list[Record]:
    """The test records of each run's last measured round."""
    test = [r for r in records if r.split == "test"]
    last: dict[tuple[str, int], int] = {}
    for record in test:
        run = (record.column, record.seed)
        last[run] = max(last.get(run, 0), record.round)
    return [r for r in test if r.round == last[r.column, r.seed]]


def metric_mean(records: Sequence[Record], metric: str) -> float | None:
    """One run at one site: the mean over classes of the case-weighted mean over domains."""
    by_class: dict[str, list[Record]] = {}
    for record in records:
        if getattr(record, metric) is not None:
            by_class.setdefault(record.class_, []).append(record)
    means = []
    for group in by_class.values():
        weights = [max(_count(r), 1) for r in group]
        means.append(statistics.fmean([getattr(r, metric) for r in group], weights))
    return statistics.fmean(means) if means else None


def score(records: Sequence[Record], metric: str = "dice") -> Score:
    """Put one site's records of one arm together over its classes, domains and seeds.

    Dice has the mean of its records' 95 % bounds: exact for one class and seed, and else no
    narrower than the interval of the mean, as deviations at most add up.
    """
    runs: dict[int, list[Record]] = {}
    for record in records:
        if getattr(record, metric) is not None:
            runs.setdefault(record.seed, []).append(record)
    bounds = ("dice_low", "dice_high") if metric == "dice" else ()
    mean, *interval = (
        _mean([metric_mean(run, name) for run in runs.values()]) for name in (metric, *bounds)
    )
    low, high = interval or (None, None)
    return Score(mean, low, high, _cases(records), len(runs), withheld_of(records))


def site_scores(records: Iterable[Record]) -> dict[tuple[str, str], Score]:
    """Test Dice by (site, arm); a pair that was not measured is missing."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in last_test(records):
        groups.setdefault((record.site, record.column), []).append(record)
    return {key: score(group) for key, group in groups.items()}


def site_gains(records: Iterable[Record]) -> dict[tuple[str, str], Score]:
    """Dice minus the local-only model's of equal steps, same site and seed, by (site, arm).

    Runs with a seed that the local arm does not have are left out. The interval is the range
    over seeds; for one seed there is none, as means alone do not tell chance from effect.
    """
    runs: dict[tuple[str, str, int], list[Record]] = {}
    for record in last_test(records):
        runs.setdefault((record.site, record.column, record.seed), []).append(record)
    dice = {key: metric_mean(group, "dice") for key, group in runs.items()}
    differences: dict[tuple[str, str], list[float]] = {}
    for (site, arm, seed), value in dice.items():
        base = dice.get((site, reference_of(arm), seed))
        if arm != reference_of(arm) and value is not None and base is not None:
            differences.setdefault((site, arm), []).append(value - base)
    gains = {}
    for (site, arm), values in differences.items():
        several = len(values) > 1
        cases = max(_cases(group) for key, group in runs.items() if key[:2] == (site, arm))
        gains[site, arm] = Score(
            mean=statistics.fmean(values),
            low=min(values) if several else None,
            high=max(values) if several else None,
            cases=cases,
            seeds=len(values),
        )
    return gains


def mean_over_sites(
    scores: dict[tuple[str, str], Score], sites: Sequence[str], arms: Sequence[str]
) -> tuple[dict[str, float | None], list[str]]:
    """Each arm's unweighted mean over the sites that every arm has, and those sites."""
    common = [
        site
        for site in sites
        if all(scores.get((site, arm), NO_SCORE).mean is not None for arm in arms)
    ]
    means: dict[str, float | None] = {}
    for arm in arms:
        values = [m for site in common if (m := scores[site, arm].mean) is not None]
        means[arm] = statistics.fmean(values) if values else None
    return means, common


def withheld_of(records: Iterable[Record]) -> str:
    """`<11` where any of the records is withheld (the largest threshold of several), or empty."""
    return max((r.withheld for r in records), key=lambda text: int(text[1:] or 0), default="")


def shown_cases(cases: int, withheld: str) -> str:
    """A number of cases beside what is withheld: `9`, `<11` or `9 + <11`."""
    if not withheld:
        return str(cases)
    return f"{cases} + {withheld}" if cases else withheld


def most_cases(scores: Iterable[Score]) -> str:
    """The cases of a site over its arms, which measure the same ones."""
    return max(scores, key=lambda s: (s.cases, s.withheld)).shown_cases


def value_or_withheld(found: Score, digits: int) -> str:
    """A mean; `<11` where the site withholds it; or the sign for undefined."""
    if found.mean is None and found.withheld and not found.cases:
        return found.withheld
    return number(found.mean, digits)


def summary_table(records: Sequence[Record]) -> Table:
    """Sites by arms on a terminal: mean test Dice over classes and seeds, and the gain."""
    arms, sites, scores = arms_of(records), sites_of(last_test(records)), site_scores(records)
    gains = site_gains(records)
    table = Table(title="Test Dice, mean over classes and seeds")
    table.add_column("site")
    table.add_column("n", justify="right")
    for arm in arms:
        table.add_column(Text(printable(arm)), justify="right")
    for site in sites:
        row = [scores.get((site, arm), NO_SCORE) for arm in arms]
        cells = [_cell(found, gains.get((site, arm))) for arm, found in zip(arms, row, strict=True)]
        table.add_row(Text(printable(site)), most_cases(row), *cells)
    if len(sites) > 1:
        means, common = mean_over_sites(scores, sites, arms)
        table.add_section()
        table.add_row(
            "mean",
            "" if len(common) == len(sites) else f"{len(common)} of {len(sites)} sites",
            *(Text(number(means[arm], 3), style="bold") for arm in arms),
        )
    notes = ["in brackets: points gained over the site's own local-only model"] if gains else []
    if any(found.withheld for found in scores.values()):
        notes.append("<N: withheld by the site; such sites or domains are in no mean")
    table.caption = "; ".join(notes) or None
    return table


def _cell(found: Score, gain: Score | None) -> Text:
    text = Text(value_or_withheld(found, 3))
    if gain is not None and gain.mean is not None:
        style = "green" if gain.mean > 0 else "red" if gain.mean < 0 else ""
        text.append(f" ({points(gain.mean)})", style=style)
    return text


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean, when all are defined."""
    defined = [value for value in values if value is not None]
    return statistics.fmean(defined) if defined and len(defined) == len(values) else None


def _cases(records: Sequence[Record]) -> int:
    """Cases measured at a site in one run: the classes share them, the domains add up."""
    per_domain: dict[str, int] = {}
    for record in records:
        per_domain[record.domain] = max(per_domain.get(record.domain, 0), _count(record))
    return sum(per_domain.values())


def _count(record: Record) -> int:
    """The cases a record's means are over; none where they are withheld."""
    return record.n_cases if isinstance(record.n_cases, int) else 0
