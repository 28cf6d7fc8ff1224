"""A finding is a rule that applies, with the places where it does.

Texts and remedies are constants, and what is added to a finding holds numbers, names of header
fields and names from the study: no name of a case, a patient or a file can get in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from uharmony_client.check.rules import RULES, Rule, Severity


@dataclass(frozen=True)
class Detail:
    """Where a finding was made: a case by its pseudonym (None: not in a case), and what is there.

    `name` is the case's own name; it is filled only when the site asked for it.
    """

    case: str | None
    text: str
    name: str | None = None


@dataclass(frozen=True)
class Finding:
    """A rule that applies, once, with all places where it does."""

    number: int
    rule: Rule
    details: tuple[Detail, ...]


def number_findings(found: Iterable[tuple[str, Detail]]) -> tuple[Finding, ...]:
    """Join what was found by code and number it, the worst first, then by code."""
    places: dict[str, list[Detail]] = {}
    for code, detail in found:
        places.setdefault(code, []).append(detail)
    codes = sorted(places, key=lambda code: (-RULES[code].severity, code))
    return tuple(
        Finding(number, RULES[code], tuple(places[code])) for number, code in enumerate(codes, 1)
    )


def worst(findings: Iterable[Finding]) -> Severity:
    """The highest severity, a note where there is nothing."""
    return max((finding.rule.severity for finding in findings), default=Severity.NOTE)
