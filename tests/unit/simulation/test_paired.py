"""Paired statistics against enumeration, closed testing and figures by hand."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uharmony_model.errors import DataError
from uharmony_simulation.paired import (
    CaseScore,
    Estimate,
    compare,
    estimate,
    seed_spread,
    word,
)
from uharmony_simulation.rank_tests import holm, rank_biserial, signed_rank


def score(case, dice, **changes):
    given = {
        "arm": "fedavg",
        "at_home": False,
        "cell": "invert 2.0, sites 2",
        "seed": 0,
        "site": "north",
        "case": case,
        "patient": changes.get("patient", case),
        "dice": dice,
        **changes,
    }
    return CaseScore(**given)


def arm(values, **changes):
    """One case a patient, named by its place."""
    return [score(f"{changes.get('site', 'n')}{i}", v, **changes) for i, v in enumerate(values)]


def test_holm_by_hand():
    # 4 * 0.005, 3 * 0.01, 2 * 0.03, then 0.04, which may not fall below what stands before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    # What was not tested belongs to no family.
    assert holm([0.01, None, 0.04]) == [pytest.approx(0.02), None, pytest.approx(0.04)]
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_bonferroni_test(p_values):
    # Marcus, Peritz and Gabriel 1976: an hypothesis falls when every intersection with it does.
    indices = range(len(p_values))
    families = [f for n in indices for f in itertools.combinations(indices, n + 1)]
    expected = [
        max(min(1.0, len(f) * min(p_values[j] for j in f)) for f in families if i in f)
        for i in indices
    ]
    assert holm(p_values) == pytest.approx(expected)


def enumerated_p(differences):
    """The share of choices of signs at least as extreme, by trying all; zeros after Pratt."""
    sizes = [abs(d) for d in differences]
    ranks = [sum(b < a for b in sizes) + (1 + sum(b == a for b in sizes)) / 2 for a in sizes]
    signed = [r for r, d in zip(ranks, differences, strict=True) if d]
    found = sum(r for r, d in zip(ranks, differences, strict=True) if d > 0)
    centre = sum(signed) / 2
    sums = [
        sum(itertools.compress(signed, s)) for s in itertools.product((0, 1), repeat=len(signed))
    ]
    return sum(abs(s - centre) >= abs(found - centre) for s in sums) / len(sums)


@pytest.mark.parametrize(
    "differences",
    [
        [0.03, -0.01, 0.05, 0.021, 0.07, 0.004, -0.012],  # neither tie nor zero
        [0.01, 0.01, -0.01, 0.02, 0.03, 0.03, 0.05, -0.02],  # ties
        [0.0, 0.0, 0.01, 0.02, -0.03, 0.04, 0.05, 0.06],  # zeros
        [0.0, 0.01, 0.01, 0.0, 0.02, 0.02, -0.01],
        [0.0, -0.5],
        [0.1],
    ],
)
def test_signed_rank_against_every_choice_of_signs(differences):
    assert signed_rank(differences) == pytest.approx(enumerated_p(differences))
    assert signed_rank([-d for d in differences]) == pytest.approx(enumerated_p(differences))


def test_signed_rank_of_zeros_and_of_many():
    assert signed_rank([]) is None
    assert signed_rank([0.0, 0.0, 0.0]) == 1.0
    assert signed_rank([0.01] * 20) == pytest.approx(
        2 / 2**20
    )  # one choice of signs, and its other
    # Beyond 50 pairs the normal law, after Pratt: the ranks 5 .. 60 stay above four zeros.
    ranks = range(5, 61)
    losses = {7, 20, 31, 50}
    values = [0.0] * 4 + [0.01 * (-r if r in losses else r) for r in ranks]
    deviation = math.sqrt(sum(r * r for r in ranks)) / 2
    distance = sum(ranks) / 2 - sum(losses)
    assert signed_rank(values) == pytest.approx(math.erfc(distance / deviation / math.sqrt(2)))


def test_rank_biserial_by_hand():
    assert rank_biserial([0.1, 0.2, 0.3]) == 1.0
    assert rank_biserial([-0.1, -0.2]) == -1.0
    assert rank_biserial([0.1, 0.2, -0.3]) == 0.0  # ranks 1 + 2 against 3
    assert rank_biserial([0.1, -0.4, 0.2]) == 0.0
    assert rank_biserial([0.0, 0.1, 0.2]) == pytest.approx(5 / 6)  # the zero keeps rank 1 of 6
    assert rank_biserial([0.0, 0.0]) == 0.0
    assert rank_biserial([0.2, 0.2, -0.1]) == pytest.approx((2.5 + 2.5 - 1) / 6)  # a tie
    assert rank_biserial([]) is None


def test_seeds_are_averaged_in_a_case_and_only_common_ones_count():
    own = [score("a", 0.6, seed=0), score("a", 0.8, seed=1), score("b", 0.5, seed=0)]
    other = [score("a", 0.5, seed=0), score("a", 0.6, seed=1), score("b", 0.5, seed=1)]
    own += [score("a", 0.0, seed=2), score("only here", 0.9)]
    found = compare(own, other)
    # a: the mean of 0.1 and 0.2; b has no seed in common.
    assert found.difference.mean == pytest.approx(0.15)
    assert (found.difference.cases, found.difference.patients, found.difference.sites) == (1, 1, 1)
    assert found.difference.low is None
    assert found.word == "undecided"


def test_repeated_seeds_do_not_narrow_the_interval():
    values = [0.5, 0.52, 0.61, 0.7, 0.66, 0.4, 0.58]
    once = compare(arm(values), arm([0.5] * 7))
    thrice = compare(
        [s for seed in range(3) for s in arm(values, seed=seed)],
        [s for seed in range(3) for s in arm([0.5] * 7, seed=seed)],
    )
    assert thrice == once
    assert once.difference.cases == 7


def bounds(found: Estimate) -> tuple[float, float]:
    assert found.low is not None
    assert found.high is not None
    return found.low, found.high


def width(found: Estimate) -> float:
    low, high = bounds(found)
    return high - low


def quantiles(means):
    """2.5 % and 97.5 % of an enumerated distribution."""
    return [float(bound) for bound in np.quantile(means, (0.025, 0.975))]


def test_interval_against_every_possible_draw():
    values = [0.1, 0.23, 0.37, 0.62, 0.9]
    found = estimate(arm(values))
    low, high = quantiles([statistics.fmean(d) for d in itertools.product(values, repeat=5)])
    assert found.mean == pytest.approx(statistics.fmean(values))
    assert bounds(found) == pytest.approx((low, high), abs=0.012)


def test_patients_are_drawn_with_all_their_cases():
    patients = {"p": [0.1, 0.12, 0.14, 0.11], "q": [0.5], "r": [0.9, 0.91], "s": [0.4, 0.42]}
    scores = [
        score(f"{name}{i}", dice, patient=name)
        for name, found in patients.items()
        for i, dice in enumerate(found)
    ]
    draws = itertools.product(patients.values(), repeat=4)
    low, high = quantiles([statistics.fmean(itertools.chain(*draw)) for draw in draws])
    found = estimate(scores)
    assert (found.cases, found.patients) == (9, 4)
    assert bounds(found) == pytest.approx((low, high), abs=0.015)
    alone = estimate([score(f"c{i}", s.dice) for i, s in enumerate(scores)])
    assert width(alone) < 0.8 * width(found)


def test_sites_count_alike_and_are_drawn_from_apart():
    north, south = [0.1, 0.2, 0.6], [0.8, 0.9, 0.7, 0.75]
    found = estimate(arm(north) + arm(south, site="south"))
    assert found.mean == pytest.approx((0.3 + 0.7875) / 2)
    means = [
        (statistics.fmean(n) + statistics.fmean(s)) / 2
        for n in itertools.product(north, repeat=3)
        for s in itertools.product(south, repeat=4)
    ]
    low, high = quantiles(means)
    assert bounds(found) == pytest.approx((low, high), abs=0.01)
    assert found.sites == 2
    assert estimate(arm(north) + arm(south, site="south"), site="south").cases == 4


def test_a_patient_at_two_sites_is_one_patient():
    # The same seven people at both sites, who gain at one what they lose at the other.
    gains = [0.01, 0.05, 0.09, 0.13, 0.17, 0.21, 0.25]
    own, other = [], []
    for i, gain in enumerate(gains):
        for site, sign in (("north", 1), ("south", -1)):
            own.append(score(f"c{i}", 0.5 + sign * gain, site=site, patient=f"p{i}"))
            other.append(score(f"c{i}", 0.5, site=site, patient=f"p{i}"))
    found = compare(own, other)
    # Whoever is drawn, the two sites cancel; drawn apart they would not.
    assert (found.difference.low, found.difference.high) == (0.0, 0.0)
    assert (found.difference.cases, found.difference.patients) == (14, 7)
    assert found.p == 1.0


def interval(low, high, patients=30):
    return Estimate(0.0, low, high, cases=patients, patients=patients, sites=1)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (interval(0.001, 0.02), "above"),
        (interval(0.0, 0.02), "not below"),  # holds zero
        (interval(-0.0099, 0.02), "not below"),
        (interval(-0.01, 0.02), "undecided"),
        (interval(-0.05, 0.06), "undecided"),
        (interval(-0.05, 0.0), "undecided"),
        (interval(-0.05, -0.001), "below"),
        (interval(-0.005, -0.001), "below"),  # within the margin, yet all of it below zero
        (interval(0.0, 0.0), "not below"),
        (interval(0.01, 0.02, patients=5), "undecided"),
        (interval(0.01, 0.02, patients=6), "above"),
        (interval(None, None), "undecided"),
    ],
)
def test_words(found, expected):
    assert word(found) == expected


def test_equal_arms_are_not_below_each_other():
    # 0.1 + 0.2 is not 0.3 in binary: seeds in another order must not make a difference.
    own = [s for i, seed in enumerate((0, 1, 2)) for s in arm([0.1 * (i + 1)] * 8, seed=seed)]
    found = compare(own, list(reversed(own)))
    assert (found.difference.mean, found.difference.low, found.difference.high) == (0.0, 0.0, 0.0)
    assert (found.p, found.effect, found.word) == (1.0, 0.0, "not below")


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=9))
def test_turned_round_a_comparison_changes_its_sign(pairs):
    own, other = arm([a for a, _ in pairs]), arm([b for _, b in pairs])
    one, two = compare(own, other, resamples=200), compare(other, own, resamples=200)
    assert one.difference.mean is not None
    assert two.difference.mean == pytest.approx(-one.difference.mean, abs=1e-9)
    low, high = bounds(one.difference)
    assert bounds(two.difference) == pytest.approx((-high, -low), abs=1e-9)
    assert low - 1e-9 <= one.difference.mean <= high + 1e-9
    assert one.p == pytest.approx(two.p)
    assert one.effect is not None
    assert two.effect == pytest.approx(-one.effect)


def test_the_order_of_rows_and_the_global_generator_do_not_matter():
    rows = arm([0.2, 0.8, 0.5, 0.61, 0.4]) + arm([0.3, 0.9], site="south")
    before = np.random.get_state(legacy=False)["state"]["key"].copy()  # noqa: NPY002 - that it is left alone
    assert estimate(reversed(rows)) == estimate(rows)
    assert (np.random.get_state(legacy=False)["state"]["key"] == before).all()  # noqa: NPY002


def test_seed_spread_by_hand():
    rows = [score("a", 0.6), score("b", 0.8), score("c", 0.3, site="south")]
    rows += [
        score("a", 0.8, seed=1),
        score("b", 0.8, seed=1),
        score("c", 0.4, seed=1, site="south"),
    ]
    found = seed_spread(rows)
    # Seed 0: (0.7 + 0.3) / 2; seed 1: (0.8 + 0.4) / 2.
    assert [found.mean, found.low, found.high] == pytest.approx([0.55, 0.5, 0.6])
    assert found.seeds == 2
    assert seed_spread([]).mean is None


def test_rows_that_cannot_be_true_are_refused():
    with pytest.raises(DataError, match="north, a: stands twice"):
        estimate([score("a", 0.5), score("a", 0.6)])
    for dice in (math.nan, 1.2, -0.1):
        with pytest.raises(DataError, match=r"north, a: Dice is .*expected 0 to 1"):
            estimate([score("a", dice)])


def test_nothing_in_common():
    found = compare(arm([0.5, 0.6]), arm([0.5], site="south"))
    assert found.difference == Estimate(None, None, None, 0, 0, 0)
    assert (found.p, found.effect, found.word) == (None, None, "undecided")
