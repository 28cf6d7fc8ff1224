"""Numbers over few patients stay: counts, means, the weight and the loss, around the threshold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.tiny import tiny_study
from uharmony_client.evaluate import CaseRow, summarise
from uharmony_client.policy import Policy
from uharmony_client.site import Site
from uharmony_client.small_cells import shown_count, update_values, withheld

COUNTS = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 40), min_size=1)


@pytest.mark.parametrize(
    ("counts", "hidden"),
    [
        ({"a": 11}, ""),
        ({"a": 10}, "a"),
        ({"a": 12, "b": 30}, ""),
        ({"a": 3, "b": 30, "c": 20}, "ac"),  # the next smallest goes with it
        ({"a": 3, "b": 20, "c": 20}, "ab"),  # of equals the first by name
        ({"a": 3, "b": 4, "c": 20}, "ab"),  # two already hide each other
        ({"a": 3, "b": 30}, "ab"),
    ],
)
def test_which_domains_are_withheld(counts, hidden):
    assert withheld(counts, 11) == set(hidden)


@given(COUNTS, st.integers(1, 30))
def test_no_small_count_can_be_worked_out_from_a_known_total(counts, least):
    hidden = withheld(counts, least)
    assert all(counts[d] >= least for d in counts.keys() - hidden)
    assert len(hidden) != 1 or len(counts) == 1
    assert bool(hidden) == any(n < least for n in counts.values())


@given(COUNTS)
def test_a_threshold_of_one_hides_nothing(counts):
    assert withheld(counts, 1) == frozenset()


def test_a_count_as_it_leaves():
    assert [shown_count(10, 11), shown_count(11, 11)] == ["<11", 11]
    assert shown_count(50, 5, hidden=True) == "<5"


@pytest.mark.parametrize(
    ("cases", "weighting", "least", "expected"),
    [
        (11, "cases", 11, {"cases": 11, "loss": 0.5}),
        (10, "cases", 11, {"cases": "equal", "loss": None}),
        (10, "cases", 1, {"cases": 10, "loss": 0.5}),
        (50, "equal", 11, {"cases": "equal", "loss": 0.5}),
    ],
)
def test_the_values_of_an_update(cases, weighting, least, expected):
    study = tiny_study(federation={"weighting": weighting})
    assert update_values(cases, 0.5, study, Policy(min_cases=least)) == expected


def rows(domain: str, dice: list[float | None], split="test", hd95=4.0, classes=("blob",)):
    return [
        CaseRow(
            case=f"{domain}-{split}-{i}",
            patient=f"{i}",
            site="north",
            domain=domain,
            split=split,
            round=3,
            class_name=name,
            dice=value,
            surface_dice=None,
            hd95_mm=hd95 if i < 10 else None,
            lesion_recall=None,
            fp_per_case=0,
        )
        for i, value in enumerate(dice)
        for name in classes
    ]


def summary(given_rows, policy=None, **changes):
    site = SimpleNamespace(
        name="north",
        study=tiny_study(**changes),
        config=SimpleNamespace(policy=policy or Policy()),
    )
    return summarise(given_rows, cast("Site", site))


def test_a_small_domain_leaves_as_its_threshold_and_nothing_else():
    found = summary(rows("mr", [0.5] * 10))
    assert found == {"test/north/mr/blob/n_cases": "<11"}
    assert summary(rows("mr", [0.5] * 10), Policy(min_cases=12))["test/north/mr/blob/n_cases"] == (
        "<12"
    )


def test_a_large_domain_leaves_with_its_means_but_for_those_over_few_cases():
    found = summary(rows("mr", [0.25, 0.75] * 6))
    prefix = "test/north/mr/blob/"
    assert found[prefix + "n_cases"] == 12
    assert found[prefix + "dice"] == pytest.approx(0.5)
    assert 0.25 <= found[prefix + "dice_low"] <= 0.5 <= found[prefix + "dice_high"] <= 0.75
    assert found[prefix + "fp_per_case"] == 0
    assert found[prefix + "hd95_mm"] is None  # defined in 10 of 12
    assert summary(rows("mr", [0.5] * 12), Policy(min_cases=10))[prefix + "hd95_mm"] == 4.0


def test_a_dice_defined_in_few_cases_leaves_no_interval_either():
    found = summary(rows("mr", [0.5] * 10 + [None] * 5))
    prefix = "test/north/mr/blob/"
    assert found[prefix + "n_cases"] == 15
    assert [found[prefix + n] for n in ("dice", "dice_low", "dice_high")] == [None] * 3


def test_the_neighbour_of_a_lone_small_domain_is_withheld_in_that_split_only():
    given_rows = rows("ct", [0.5] * 3) + rows("mr", [0.5] * 20) + rows("pet", [0.5] * 30)
    given_rows += rows("mr", [0.5] * 20, split="validation")
    found = summary(given_rows)
    counts = {k: v for k, v in found.items() if k.endswith("n_cases")}
    assert counts == {
        "test/north/ct/blob/n_cases": "<11",
        "test/north/mr/blob/n_cases": "<11",
        "test/north/pet/blob/n_cases": 30,
        "validation/north/mr/blob/n_cases": 20,
    }
    assert not [k for k in found if k.startswith("test/north/mr/") and not k.endswith("n_cases")]


def test_cases_are_counted_once_however_many_classes_there_are():
    assert summary(rows("mr", [0.5] * 6, classes=("blob", "rim"))) == {
        "test/north/mr/blob/n_cases": "<11",
        "test/north/mr/rim/n_cases": "<11",
    }


@pytest.mark.parametrize(("share", "told"), [(0.374, 0.37), (0.0, 0.0), (1.0, None)])
def test_the_share_that_taught_is_told_over_enough_cases_alone(share, told):
    study = tiny_study(method="ust-run-fed")
    enough = update_values(11, 0.5, study, Policy(), share=share)
    assert enough.get("taught") == told
    few = update_values(10, 0.5, study, Policy(), share=share)
    assert few.get("taught") == (0.0 if share == 0 else None)


def test_a_site_that_no_label_taught_says_so_even_when_it_counts_in_full():
    study = tiny_study(method="ust-run-fed")
    assert update_values(11, 0.5, study, Policy(), growth=1.0)["taught"] == 1.0
    assert "taught" not in update_values(11, 0.5, study, Policy())


@pytest.mark.parametrize("share", [0.0, 0.001, 0.374, 1.0])
@pytest.mark.parametrize("growth", [0.0067, 0.5])
def test_what_a_site_may_weigh_by_now_reaches_small_sites_too(share, growth):
    study = tiny_study(method="ust-run-fed")
    shares = {0.0: 0.0, 0.001: 0.01, 0.374: 0.37, 1.0: 1.0}
    enough = update_values(11, 0.5, study, Policy(), share=share, growth=growth)
    assert enough["taught"] == pytest.approx(growth * shares[share])
    few = update_values(10, 0.5, study, Policy(), share=share, growth=growth)
    assert few["taught"] == (growth if share else 0.0)


def test_only_what_the_study_asks_for_leaves():
    found = summary(rows("mr", [0.5] * 12), evaluation={"metrics": ["fp_per_case"]})
    assert set(found) == {"test/north/mr/blob/n_cases", "test/north/mr/blob/fp_per_case"}
