"""The report: one HTML file that a medical physicist opens offline and can print.

It holds its own style, charts (inline SVG) and pictures (data URIs), loads nothing and runs no
script. Names and refusal details come from the sites, so every text is escaped and stripped of
control characters. Equal inputs give equal bytes: no clock is read here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from uharmony_model.atomic import write_atomic
from uharmony_model.methods import METHODS
from uharmony_model.study import Study
from uharmony_server import curves
from uharmony_server.admission import Refusal
from uharmony_server.records import AT_HOME, Record
from uharmony_server.summary import (
    NO_SCORE,
    Score,
    arms_of,
    last_test,
    mean_over_sites,
    most_cases,
    reference_of,
    score,
    site_gains,
    site_scores,
    sites_of,
    value_or_withheld,
    withheld_of,
)
from uharmony_service.page import number, pages_of, points


@dataclass(frozen=True)
class Figure:
    """A picture of one test case: `which` says why this one, e.g. median or worst."""

    arm: str
    site: str
    which: str
    case: str
    dice: float | None
    png: bytes


class ArmRefusal(Refusal):
    """An answer that did not count, and under which arm and seed."""

    arm: str
    seed: int


@dataclass(frozen=True)
class Row:
    """One line of the details: a site (and domain), an arm, and the metrics of one class."""

    site: str
    domain: str
    arm: str
    cases: str
    metrics: tuple[Score, ...]


DETAILS = (
    ("dice", 3),
    ("surface_dice", 3),
    ("hd95_mm", 1),
    ("lesion_recall", 2),
    ("fp_per_case", 2),
)


def write_report(
    path: Path,
    *,
    title: str,
    records: Sequence[Record],
    refusals: Sequence[ArmRefusal] = (),
    run_info: Mapping[str, object] | None = None,
    figures: Sequence[Figure] = (),
    study: Study | None = None,
    attribution: str = "",
) -> None:
    """Write the report whole or not at all.

    `run_info` is shown as it is given: texts and numbers, mappings of them (a group), or lists
    of mappings (a table).

    Raises:
        StoreError: the disk is full or the folder cannot be written.
    """
    environment = pages_of("uharmony_server")
    environment.globals["value"] = value_or_withheld
    template = environment.get_template("report.html.jinja")
    html = template.render(
        title=title,
        attribution=attribution,
        **_results(records, study.task.class_names if study is not None else ()),
        **_context(study),
        headline=_headline(records, study),
        refusals=refusals,
        run_info=_sections(run_info or {}),
        figures=_grouped(figures),
    )
    write_atomic(path, html.encode("utf-8", "replace"), mode=0o644)


def _results(records: Sequence[Record], classes: Sequence[str]) -> dict[str, object]:
    arms, test = arms_of(records), last_test(records)
    sites, scores, gains = sites_of(test), site_scores(records), site_gains(records)
    means, common = mean_over_sites(scores, sites, arms)
    gain_means, gain_common = mean_over_sites(gains, sites, compared := _compared(arms))
    return {
        "arms": arms,
        "meanings": {arm: _meaning(arm) for arm in arms},
        "slots": curves.slots(arms),
        "sites": sites,
        "seeds": sorted({r.seed for r in records}),
        "rounds": max((r.round for r in records if r.kept is None), default=0),
        "scores": {s: {a: scores.get((s, a), NO_SCORE) for a in arms} for s in sites},
        "cases": {s: most_cases(_row(scores, s, arms)) for s in sites},
        "all_cases": _all_cases(scores, sites, arms),
        "withheld": withheld_of(records),
        "several_seeds": any(s.seeds > 1 for s in scores.values()),
        "means": means,
        "common": common,
        "compared": compared,
        "gains": {s: {a: gains.get((s, a), NO_SCORE) for a in compared} for s in sites},
        "gain_means": gain_means,
        "gain_common": gain_common,
        "findings": [_finding(a, sites, gains, gain_means) for a in compared if gains],
        "classes": _details(test, arms, classes),
        "dots": curves.dot_chart(scores, sites, arms),
        "curves": curves.learning_curves(records, arms),
        "geometry": curves,
    }


def _context(study: Study | None) -> dict[str, object]:
    return {
        "study": study,
        "tolerance": None if study is None else study.evaluation.surface_tolerance_mm,
        "digest": None if study is None else study.digest,
    }


def _headline(records: Sequence[Record], study: Study | None) -> str:
    """What became of the study's own method, in one sentence; empty when it was not run."""
    arms, scores = arms_of(records), site_scores(records)
    if study is None or study.method not in arms:
        return ""
    sites = sites_of(last_test(records))
    means, common = mean_over_sites(scores, sites, [study.method])
    if means[study.method] is None:
        return ""
    where = f"{len(common)} site{'s' if len(common) != 1 else ''}"
    text = f"{study.method}: mean test Dice {number(means[study.method], 3)} over {where}"
    gains = site_gains(records)
    known = [m for s in sites if (m := gains.get((s, study.method), NO_SCORE).mean) is not None]
    if not known:
        return text + "."
    mean = sum(known) / len(known)
    above = sum(gain >= 0 for gain in known)
    return (
        f"{text}, {points(mean)} points against local-only models;"
        f" {above} of {len(known)} at or above their own."
    )


def _row(scores: Mapping[tuple[str, str], Score], site: str, arms: Sequence[str]) -> list[Score]:
    return [scores[site, arm] for arm in arms if (site, arm) in scores]


def _all_cases(
    scores: Mapping[tuple[str, str], Score], sites: Sequence[str], arms: Sequence[str]
) -> str:
    """The cases of all sites; where some are withheld, that there are more than the known."""
    rows = [_row(scores, site, arms) for site in sites]
    known = sum(max(s.cases for s in row) for row in rows)
    return f"> {known}" if any(s.withheld for row in rows for s in row) else str(known)


def _meaning(column: str) -> str:
    arm = column.removesuffix(AT_HOME)
    meaning = METHODS[arm].meaning if arm in METHODS else ""
    if arm == column:
        return meaning
    return f"{meaning}; then each site's own last steps, and its choice by validation"


def _compared(arms: Sequence[str]) -> list[str]:
    return [arm for arm in arms if arm != (own := reference_of(arm)) and own in arms]


def _finding(
    arm: str,
    sites: Sequence[str],
    gains: Mapping[tuple[str, str], Score],
    means: Mapping[str, float | None],
) -> dict[str, object]:
    """How many sites an arm serves no worse than they serve themselves."""
    known = [
        (m, site) for site in sites if (m := gains.get((site, arm), NO_SCORE).mean) is not None
    ]
    worst = min(known, default=None)
    return {
        "arm": arm,
        "mean": means[arm],
        "not_below": sum(gain >= 0 for gain, _ in known),
        "known": len(known),
        "worst": None if worst is None or worst[0] >= 0 else worst,
    }


def _details(
    test: Sequence[Record], arms: Sequence[str], classes: Sequence[str]
) -> dict[str, list[Row]]:
    """Rows of every class, in the study's order of classes."""
    others = sorted({r.class_ for r in test} - set(classes))
    groups: dict[str, dict[tuple[str, str, int], list[Record]]] = {c: {} for c in classes}
    groups |= {name: {} for name in others}
    for record in test:
        key = (record.site, record.domain, arms.index(record.column))
        groups[record.class_].setdefault(key, []).append(record)
    details = {}
    for name, rows in groups.items():
        if not rows:
            continue
        details[name] = [
            Row(
                site=site,
                domain=domain if domain != site else "",
                arm=arms[arm],
                cases=score(found).shown_cases,
                metrics=tuple(score(found, metric) for metric, _ in DETAILS),
            )
            for (site, domain, arm), found in sorted(rows.items())
        ]
    return details


def _grouped(figures: Sequence[Figure]) -> dict[str, list[Figure]]:
    groups: dict[str, list[Figure]] = {}
    for figure in sorted(figures, key=lambda f: f.site):
        groups.setdefault(figure.site, []).append(figure)
    return groups


def _sections(run_info: Mapping[str, object]) -> dict[str, object]:
    """Plain facts, named groups of facts, and lists of like facts, each for its own table."""
    facts, groups, tables = {}, {}, {}
    for name, value in run_info.items():
        if isinstance(value, Mapping):
            groups[name] = dict(value)
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            columns = list(dict.fromkeys(column for row in value for column in row))
            rows = [[row.get(column) for column in columns] for row in value]
            tables[name] = {"columns": columns, "rows": rows}
        else:
            facts[name] = value
    return {"facts": facts, "groups": groups, "tables": tables}
