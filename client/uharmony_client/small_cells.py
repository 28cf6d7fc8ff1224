"""Numbers over few patients stay at the site: what leaves in their place.

A cell is the cases of one domain in one split of this site. Below the site's threshold its count
leaves as `<11` (with the threshold in place of 11) and its means do not leave. Where one cell of
a split alone is withheld, a known total less the others would give it away; then the next
smallest is withheld too, under the same text, so that nobody can tell which of the two is small.
"""

from __future__ import annotations

from collections.abc import Mapping

from uharmony_client.policy import CASES, LOSS, TAUGHT, Policy
from uharmony_model.exchange.payload import Value
from uharmony_model.study import Study

EQUAL = "equal"  # in place of a weight that the site does not tell


def withheld(counts: Mapping[str, int], least: int) -> frozenset[str]:
    """Which domains of one split do not leave, from their numbers of cases."""
    small = {domain for domain, count in counts.items() if count < least}
    if len(small) == 1 and len(counts) > 1:
        others = counts.keys() - small
        small.add(min(others, key=lambda domain: (counts[domain], domain)))
    return frozenset(small)


def shown_count(count: int, least: int, *, hidden: bool = False) -> int | str:
    """A count as it leaves: the number, or `<11` when it is withheld."""
    return f"<{least}" if hidden or count < least else count


def update_values(
    cases: int,
    loss: float,
    study: Study,
    policy: Policy,
    *,
    share: float = 1.0,
    growth: float | None = None,
) -> dict[str, Value]:
    """The named values of an update made on `cases` training cases.

    The weight is the number where the study weighs by cases and the number may leave, else
    `equal`. The loss is a mean over steps on these cases, so the same threshold holds for it.
    `share`, in hundredths, times `growth` is a factor of the weight and leaves as `taught`; without
    a `growth` labels taught, and it leaves only where it is not 1. `growth` follows from the round
    alone; over fewer cases than the threshold the share counts as 1, or as 0 where nothing was
    trained.
    """
    enough = cases >= policy.min_cases
    told = max(round(share, 2), 0.01 * (share > 0)) if enough else float(share > 0)
    factor: dict[str, Value] = {}
    if growth is not None or told != 1:
        factor = {TAUGHT: told if growth is None else growth * told}
    return factor | {
        CASES: cases if enough and CASES in study.asks else EQUAL,
        LOSS: loss if enough else None,
    }
