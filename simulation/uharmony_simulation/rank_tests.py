"""Rank tests of paired differences, their effect size, and the correction for asking often."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

EXACT_PAIRS = 50


def signed_rank(differences: Sequence[float]) -> float | None:
    """Two-sided p of Wilcoxon's signed-rank test (1945); None without a pair.

    Zeros are handled after Pratt (1959): they take part in the ranking, not in the sums. Where
    every difference is zero nothing speaks against equality and p is 1. Exact up to 50 pairs,
    ties and zeros too; beyond, the normal approximation.
    """
    if not differences:
        return None
    if not any(differences):
        return 1.0
    values = np.asarray(differences, dtype=np.float64)
    sizes = np.abs(values)
    # With ties or zeros scipy tries all signs up to 13 pairs, in seconds, and approximates beyond.
    if len(values) <= EXACT_PAIRS and (len(np.unique(sizes)) < len(sizes) or not sizes.all()):
        return _exact_p(values)
    return float(min(1.0, stats.wilcoxon(values, zero_method="pratt").pvalue))


def rank_biserial(differences: Sequence[float]) -> float | None:
    """Matched-pairs rank-biserial correlation; None without a pair.

    After Kerby (2014): the share of the sum of ranks that is in favour, less the share against.
    Ours: zeros keep their ranks, as in `signed_rank`, and count for neither side.
    """
    if not differences:
        return None
    values = np.asarray(differences, dtype=np.float64)
    ranks = stats.rankdata(np.abs(values))
    return float((ranks[values > 0].sum() - ranks[values < 0].sum()) / ranks.sum())


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p of one family, step-down after Holm (1979); what was not tested stays None."""
    tested = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[index] = largest
    return adjusted


def _exact_p(values: npt.NDArray[np.float64]) -> float:
    """The share of all choices of signs whose sum of ranks is as far from the middle."""
    # Ranks of ties are halves, so twice a rank is a whole number and sums can be counted.
    ranks = np.rint(2 * stats.rankdata(np.abs(values))).astype(np.int64)
    found = int(ranks[values > 0].sum())
    ranks = ranks[values != 0]
    total = int(ranks.sum())
    ways = np.zeros(total + 1)
    ways[0] = 1.0
    for rank in ranks:
        ways[rank:] += ways[:-rank].copy()
    tail = ways[max(found, total - found) :].sum() / ways.sum()
    return float(min(1.0, 2 * tail))
