"""Paired statistics of a study: two arms on the same test cases, and the word for the outcome.

Seeds are averaged in each case first, so that n is a number of cases and never of cases times
seeds. Intervals come from resampling patients, as two cases of one patient are not two patients.
Dice lies in [0, 1]; a point is a hundredth of it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from uharmony_model.errors import DataError
from uharmony_model.metrics import Word, paired_word
from uharmony_model.randomness import numpy_generator
from uharmony_simulation.rank_tests import holm, rank_biserial, signed_rank

Key = TypeVar("Key", bound=Hashable)

RESAMPLES = 10_000

Interval = tuple[float | None, float | None]


@dataclass(frozen=True)
class CaseScore:
    """One test case under one arm and seed; `dice` is the mean over its annotated classes.

    `at_home`: after the site's own last steps. `cell` names the conditions, the shift and its
    strength first: "invert 2.0, sites 4". A patient's name means the same person at every site.
    `by_class` holds the Dice of every class that was measured, of a class that the site does not
    annotate too where somebody knows the truth.
    """

    arm: str
    at_home: bool
    cell: str
    seed: int
    site: str
    case: str
    patient: str
    dice: float
    by_class: Mapping[str, float] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Cost:
    """What a run of an arm cost: bytes and seconds of all its sites together, in a round.

    The rounds are those of training: the weights that the last evaluation sends are not in it.
    `local_parameters` is the number of scalars that stay at a site. `kept` counts the sites by
    what they kept at their finale.
    """

    arm: str
    cell: str
    seed: int
    seconds_per_round: float
    bytes_up_per_round: float
    bytes_down_per_round: float
    local_parameters: int
    kept: Mapping[str, int]


@dataclass(frozen=True)
class Estimate:
    """A mean over sites of means over cases, with its 95 % interval; None without any case."""

    mean: float | None
    low: float | None
    high: float | None
    cases: int
    patients: int
    sites: int


@dataclass(frozen=True)
class Comparison:
    """An arm minus a reference on the cases both have, in Dice.

    `p` is of the signed-rank test, `p_holm` the same adjusted in its family, and `effect` the
    matched-pairs rank-biserial correlation in [-1, 1].
    """

    difference: Estimate
    p: float | None
    effect: float | None
    p_holm: float | None = None

    @property
    def word(self) -> Word:
        """What the interval allows to say."""
        return word(self.difference)


@dataclass(frozen=True)
class SeedSpread:
    """One arm's mean over sites, seed by seed: the mean and the range over the seeds."""

    mean: float | None
    low: float | None
    high: float | None
    seeds: int


@dataclass(frozen=True)
class _Value:
    site: str
    patient: str
    value: float


def word(difference: Estimate) -> Word:
    """What a paired difference allows to say; "undecided" without an interval."""
    return paired_word(difference.low, difference.high, difference.patients)


def estimate(
    scores: Iterable[CaseScore], *, site: str | None = None, resamples: int = RESAMPLES
) -> Estimate:
    """Mean Dice of one arm under one condition, over all sites alike or at one.

    Raises:
        DataError: a case stands twice under one seed, or a Dice is no number in [0, 1].
    """
    cases = _cases(scores, site)
    values = [
        _Value(place, patients, statistics.fmean(by_seed.values()))
        for (place, _, patients), by_seed in sorted(cases.items())
    ]
    return _estimate(values, resamples)


def compare(
    arm: Iterable[CaseScore],
    reference: Iterable[CaseScore],
    *,
    site: str | None = None,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Paired comparison of two arms under one condition, over all sites alike or at one.

    A case counts with the seeds that both arms have. The test and the effect size take one
    difference a patient, the mean of his or her cases, as they suppose independent pairs.

    Raises:
        DataError: a case stands twice under one seed, or a Dice is no number in [0, 1].
    """
    own, other = _cases(arm, site), _cases(reference, site)
    values: list[_Value] = []
    for key in sorted(own.keys() & other.keys()):
        seeds = sorted(own[key].keys() & other[key].keys())
        if seeds:
            mean = statistics.fmean(own[key][seed] - other[key][seed] for seed in seeds)
            # Equal arms differ by rounding once seeds are averaged; that is no difference.
            values.append(_Value(key[0], key[2], round(mean, 12)))
    pairs = _patient_means(values)
    return Comparison(_estimate(values, resamples), signed_rank(pairs), rank_biserial(pairs))


def in_family(family: Mapping[Key, Comparison]) -> dict[Key, Comparison]:
    """Comparisons that are asked together, each with its p adjusted after Holm."""
    adjusted = holm([comparison.p for comparison in family.values()])
    return {
        key: replace(comparison, p_holm=p)
        for (key, comparison), p in zip(family.items(), adjusted, strict=True)
    }


def seed_spread(scores: Iterable[CaseScore]) -> SeedSpread:
    """Mean over sites for every seed of one arm under one condition, then mean and range.

    The range is no interval: it tells how far a repetition of training alone may move a mean.
    """
    by_seed: dict[int, dict[str, list[float]]] = {}
    for score in scores:
        by_seed.setdefault(score.seed, {}).setdefault(score.site, []).append(score.dice)
    means = [
        statistics.fmean(statistics.fmean(found) for found in by_site.values())
        for by_site in by_seed.values()
    ]
    if not means:
        return SeedSpread(None, None, None, 0)
    return SeedSpread(statistics.fmean(means), min(means), max(means), len(means))


_Key = tuple[str, str, str]  # site, case, patient


def _cases(scores: Iterable[CaseScore], site: str | None) -> dict[_Key, dict[int, float]]:
    cases: dict[_Key, dict[int, float]] = {}
    for score in scores:
        if site is not None and score.site != site:
            continue
        where = f"{score.arm}, {score.cell}, seed {score.seed}, {score.site}, {score.case}"
        if not (math.isfinite(score.dice) and 0.0 <= score.dice <= 1.0):
            raise DataError(f"{where}: Dice is {score.dice}, expected 0 to 1; leave the case out")
        by_seed = cases.setdefault((score.site, score.case, score.patient), {})
        if score.seed in by_seed:
            raise DataError(f"{where}: stands twice; give one arm and condition, each case once")
        by_seed[score.seed] = score.dice
    return cases


def _patient_means(values: Sequence[_Value]) -> list[float]:
    by_patient: dict[str, list[float]] = {}
    for value in values:
        by_patient.setdefault(value.patient, []).append(value.value)
    return [round(statistics.fmean(found), 12) for _, found in sorted(by_patient.items())]


def _estimate(values: Sequence[_Value], resamples: int) -> Estimate:
    """Mean over sites of means over cases, and its percentile interval over patients.

    Sites count alike, whatever their numbers of cases. There is no interval of one patient.
    """
    patients = sorted({value.patient for value in values})
    sites = sorted({value.site for value in values})
    counted = (len(values), len(patients), len(sites))
    if not values:
        return Estimate(None, None, None, *counted)
    rows, columns = {p: i for i, p in enumerate(patients)}, {s: i for i, s in enumerate(sites)}
    sums = np.zeros((len(patients), len(sites)))
    counts = np.zeros_like(sums)
    for value in values:
        at = rows[value.patient], columns[value.site]
        sums[at] += value.value
        counts[at] += 1
    mean = float(round((sums.sum(axis=0) / counts.sum(axis=0)).mean(), 12))
    if len(patients) < 2:
        return Estimate(mean, None, None, *counted)
    drawn = _draws(_strata(patients, values), resamples)
    cases = drawn @ counts
    # A site without a patient in a draw, possible where sites share patients, sits that one out.
    at_site = np.divide(drawn @ sums, cases, out=np.zeros_like(cases), where=cases > 0)
    means = at_site.sum(axis=1) / (cases > 0).sum(axis=1)
    low, high = (float(round(bound, 12)) for bound in np.quantile(means, (0.025, 0.975)))
    return Estimate(mean, low, high, *counted)


_Strata = tuple[tuple[int, ...], ...]


def _strata(patients: Sequence[str], values: Sequence[_Value]) -> _Strata:
    """Patients by their site, as indices; sites that share a patient are one stratum.

    Each stratum is drawn from by itself, since which sites take part is no matter of chance.
    """
    group = {value.site: value.site for value in values}
    first: dict[str, str] = {}
    for value in values:
        other = first.setdefault(value.patient, value.site)
        old, new = group[value.site], group[other]
        if old != new:
            group = {site: new if name == old else name for site, name in group.items()}
    strata: dict[str, list[int]] = {}
    for index, patient in enumerate(patients):
        strata.setdefault(group[first[patient]], []).append(index)
    return tuple(sorted(tuple(members) for members in strata.values()))


@lru_cache(maxsize=8)
def _draws(strata: _Strata, resamples: int) -> npt.NDArray[np.float64]:
    """How often each patient is drawn `(resamples, patients)`, the same for every comparison.

    Equal draws keep one cell's comparisons alike, and are worth keeping: they cost more than all
    that follows.
    """
    drawn = np.zeros((resamples, sum(len(members) for members in strata)))
    for members in strata:
        generator = numpy_generator(0, "paired", "bootstrap", *members)
        size = len(members)
        drawn[:, members] = generator.multinomial(size, [1.0 / size] * size, size=resamples)
    drawn.flags.writeable = False
    return drawn
