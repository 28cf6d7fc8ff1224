"""What the doctor says: for people as a page of text, for machines as JSON, and an exit code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from uharmony_client.check.findings import Detail, Finding, worst
from uharmony_client.check.leaving import Leaving
from uharmony_client.check.rules import Severity
from uharmony_client.check.together import ClassCount

_STYLES = {Severity.NOTE: "dim", Severity.WARNING: "yellow", Severity.ERROR: "red"}
_SHOWN = 8


@dataclass(frozen=True)
class CaseRow:
    """A case as the report names it. `counts` are voxels by label value."""

    case: str
    split: str | None
    refused: str | None
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    counts: Mapping[int, int] | None
    name: str | None = None


@dataclass(frozen=True)
class Report:
    """Everything one run of the doctor found. `study` is name and digest.

    `unlabelled` is how many of the training cases are learned from without a label.
    """

    site: str
    study: tuple[str, str] | None
    findings: tuple[Finding, ...]
    cases: tuple[CaseRow, ...]
    splits: Mapping[str, int]
    unlabelled: int
    classes: Mapping[str, ClassCount]
    quarantined: int
    machine: Mapping[str, str]
    leaving: Leaving | None
    seconds: float

    @property
    def severity(self) -> Severity:
        """The worst of the findings."""
        return worst(self.findings)

    @property
    def exit_code(self) -> int:
        """0 for nothing or notes, 10 for warnings, 11 for errors."""
        return self.severity.exit_code

    def to_json(self) -> str:
        """The same for machines; keys without a value are left out of places and cases."""
        study = None if self.study is None else {"name": self.study[0], "digest": self.study[1]}
        content: dict[str, Any] = {
            "site": self.site,
            "study": study,
            "severity": self.severity.word,
            "exit_code": self.exit_code,
            "findings": [
                {
                    "number": finding.number,
                    "code": finding.rule.code,
                    "severity": finding.rule.severity.word,
                    "text": finding.rule.text,
                    "remedy": finding.rule.remedy,
                    "where": [_filled(asdict(detail)) for detail in finding.details],
                }
                for finding in self.findings
            ],
            "cases": [_filled(asdict(row)) for row in self.cases],
            "splits": dict(self.splits),
            "unlabelled": self.unlabelled,
            "classes": {name: asdict(count) for name, count in self.classes.items()},
            "quarantined": self.quarantined,
            "machine": dict(self.machine),
            "leaving": None if self.leaving is None else asdict(self.leaving),
            "seconds": round(self.seconds, 3),
        }
        return json.dumps(content, indent=2)


def render(report: Report) -> RenderableType:
    """The page for people."""
    parts: list[RenderableType] = [Text(_heading(report), style="bold")]
    if report.classes:
        parts += [Text(), _class_table(report)]
    if report.findings:
        parts += [Text(), *(_finding(finding) for finding in report.findings)]
    parts += [Text(), Text("Machine", style="bold")]
    parts += [Text(f"  {name}: {fact}") for name, fact in report.machine.items()]
    if report.leaving is not None:
        parts += [Text(), *_leaving(report.leaving)]
    return Group(*parts, Text(), Text(_ending(report), style=_STYLES[report.severity]))


def _heading(report: Report) -> str:
    study = "no study yet" if report.study is None else f"study {report.study[0]}"
    splits = ", ".join(f"{n} {split}" for split, n in report.splits.items())
    out = f", {report.quarantined} left out" if report.quarantined else ""
    if report.unlabelled:
        splits += f"; {report.unlabelled} of train are taken without a label"
    cases = f"{len(report.cases)} cases{out}{f' ({splits})' if splits else ''}"
    return f"Site {report.site}, {study}: {cases}"


def _class_table(report: Report) -> Table:
    table = Table("class", "cases", "voxels", box=None, pad_edge=False)
    for name, count in report.classes.items():
        table.add_row(Text(name), f"{count.cases}", f"{count.voxels:,}")
    return table


def _finding(finding: Finding) -> Text:
    rule = finding.rule
    text = Text(f"{finding.number:>3}. {rule.code} {rule.severity.word}: ")
    text.stylize(_STYLES[rule.severity])
    text.append(rule.text)
    for line in _places(finding.details):
        text.append(f"\n       {line}")
    text.append(f"\n     > {rule.remedy}")
    return text


def _places(details: tuple[Detail, ...]) -> list[str]:
    lines = []
    for detail in details[:_SHOWN]:
        where = ", ".join(part for part in (detail.case, detail.name) if part)
        lines.append(": ".join(part for part in (where, detail.text) if part))
    more = len(details) - _SHOWN
    return [*lines, f"and {more} more (--json lists them)"] if more > 0 else lines


def _leaving(leaving: Leaving) -> list[Text]:
    if not leaving.scalars:
        return [Text("What leaves: nothing", style="bold")]
    lines = [Text("What leaves in a round", style="bold")]
    lines += [Text(f"  {part}: {count:,} numbers") for part, count in leaving.parts.items()]
    hidden = (
        f"  numbers of cases below {leaving.min_cases} leave as <{leaving.min_cases}, without means"
        if leaving.min_cases > 1
        else "  numbers of cases leave as they are (policy.min_cases: 1)"
    )
    return [
        *lines,
        Text(
            f"  {leaving.tensors} tensors, {leaving.bytes_up / 1e6:.2f} MB up and "
            f"{leaving.bytes_down / 1e6:.2f} MB down, before compression"
        ),
        Text(f"  values: {', '.join(leaving.values)}"),
        Text(hidden),
        Text(f"  statistics: {leaving.statistics}"),
        Text(f"  {leaving.stays:,} numbers of the model stay here"),
        *([Text(f"  kept in the store beside them: {leaving.carries}")] if leaving.carries else []),
        Text(f"  learned from: {leaving.learning}"),
        Text(f"  at home: {leaving.at_home}"),
        Text(f"  published at the end: {leaving.published}"),
    ]


def _ending(report: Report) -> str:
    count = dict.fromkeys(("error", "warning", "note"), 0)
    for finding in report.findings:
        count[finding.rule.severity.word] += 1
    found = ", ".join(f"{n} {word}{'s' if n != 1 else ''}" for word, n in count.items() if n)
    return f"{found or 'nothing found'}; {report.seconds:.1f} s"


def _filled(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if value is not None}
