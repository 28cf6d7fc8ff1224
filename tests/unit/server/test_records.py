"""Records as written and read, and the scores and gains made of them, against sums by hand."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from uharmony_model.errors import StoreError
from uharmony_server.records import Record, read_results, write_results
from uharmony_server.summary import (
    arms_of,
    last_test,
    mean_over_sites,
    score,
    site_gains,
    site_scores,
    summary_table,
)
from uharmony_service.page import points, printable


def record(**changes):
    given_ = {
        "arm": "fedavg",
        "seed": 0,
        "round": 10,
        "site": "north",
        "domain": "north",
        "split": "test",
        "class_": "lesion",
        "n_cases": 4,
        "dice": 0.5,
        **changes,
    }
    return Record(**given_)


shares = st.none() | st.floats(0, 1)
amounts = st.none() | st.floats(0, 1e6)
records = st.builds(
    Record,
    arm=st.text(max_size=12),
    seed=st.integers(0, 2**62),
    round=st.integers(0, 10_000),
    site=st.text(max_size=12),
    domain=st.text(max_size=12),
    split=st.sampled_from(["train", "validation", "test"]),
    class_=st.text(max_size=12),
    n_cases=st.integers(0, 10**6),
    dice=shares,
    dice_low=shares,
    dice_high=shares,
    surface_dice=shares,
    hd95_mm=amounts,
    lesion_recall=shares,
    fp_per_case=amounts,
)


@given(st.lists(records, max_size=5))
def test_results_are_read_as_they_were_written(tmp_path_factory, given_records):
    path = tmp_path_factory.mktemp("results") / "results.json"
    write_results(path, given_records)
    assert read_results(path) == given_records


def test_results_are_plain_json_with_the_key_class_and_null_for_undefined(tmp_path):
    write_results(tmp_path / "r.json", [record(dice=None, hd95_mm=3.25)])
    (found,) = json.loads((tmp_path / "r.json").read_text())
    assert found["class"] == "lesion"
    assert "class_" not in found
    assert found["dice"] is None
    assert found["hd95_mm"] == 3.25
    assert Record.model_validate(found) == record(dice=None, hd95_mm=3.25)


@pytest.mark.parametrize(
    "changes",
    [
        {"dice": 1.5},
        {"dice": float("nan")},
        {"hd95_mm": -1.0},
        {"hd95_mm": float("inf")},
        {"n_cases": -1},
        {"n_cases": "<11"},  # with a Dice
        {"n_cases": "<11", "dice": None, "dice_high": 0.5},
        {"n_cases": "few", "dice": None},
        {"split": "holdout"},
        {"site": "x" * 201},
        {"surprise": 1},
    ],
)
def test_a_record_that_cannot_be_is_refused(changes):
    with pytest.raises(ValidationError):
        record(**changes)


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '[{"arm": "a"}]', '[{"dice": NaN}]', "[" * 10_000, "\xff"]
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(StoreError, match=r"results\.json: not a list of records") as caught:
        read_results(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StoreError, match="no such file"):
        read_results(tmp_path / "results.json")


def test_only_the_last_test_round_of_each_run_counts():
    early, late = record(round=5, dice=0.9), record(round=10, dice=0.1)
    other_run = record(arm="local", round=5, dice=0.4)
    chosen = last_test([early, late, other_run, record(split="validation", round=99)])
    assert chosen == [late, other_run]


def test_a_score_is_the_mean_over_classes_seeds_and_weighted_domains():
    found = score(
        [
            record(class_="a", domain="old", n_cases=1, dice=0.2),
            record(class_="a", domain="new", n_cases=3, dice=0.6),
            record(class_="b", domain="old", n_cases=1, dice=None),
            record(class_="b", domain="new", n_cases=3, dice=0.9),
            record(class_="a", domain="old", n_cases=1, dice=0.3, seed=1),
        ]
    )
    first = ((0.2 * 1 + 0.6 * 3) / 4 + 0.9) / 2
    assert found.mean == pytest.approx((first + 0.3) / 2)
    assert found.cases == 1 + 3
    assert found.seeds == 2
    assert found.low is None
    assert found.high is None


def test_bounds_of_one_class_and_seed_are_the_bootstraps_own():
    found = score([record(dice_low=0.4, dice_high=0.62)])
    assert (found.low, found.mean, found.high) == (0.4, 0.5, 0.62)
    assert score([record(surface_dice=0.7, dice_low=0.4)], "surface_dice").low is None


def test_bounds_over_seeds_are_the_mean_bounds_and_missing_if_one_is():
    known = [
        record(dice_low=0.4, dice_high=0.6),
        record(seed=1, dice=0.7, dice_low=0.5, dice_high=0.9),
    ]
    found = score(known)
    assert found.low == pytest.approx(0.45)
    assert found.high == pytest.approx(0.75)
    assert score([*known, record(seed=2)]).low is None


def test_a_class_without_truth_leaves_an_undefined_score_with_its_cases():
    found = score([record(dice=None)])
    assert (found.mean, found.low, found.high, found.cases, found.seeds) == (None, None, None, 4, 0)


def test_gains_pair_the_seeds_and_leave_out_those_without_a_partner():
    gains = site_gains(
        [
            record(arm="local", seed=0, dice=0.50),
            record(arm="local", seed=1, dice=0.60),
            record(arm="uharmony", seed=0, dice=0.53),
            record(arm="uharmony", seed=1, dice=0.58),
            record(arm="uharmony", seed=2, dice=0.99),
            record(arm="fedavg", seed=2, dice=0.99),
        ]
    )
    assert set(gains) == {("north", "uharmony")}
    found = gains["north", "uharmony"]
    assert found.mean == pytest.approx((0.03 - 0.02) / 2)
    assert found.low == pytest.approx(-0.02)
    assert found.high == pytest.approx(0.03)
    assert found.seeds == 2


def test_gain_of_one_seed_claims_no_interval():
    found = site_gains([record(arm="local"), record(arm="fedbn", dice=0.75)])["north", "fedbn"]
    assert found.mean == pytest.approx(0.25)
    assert found.low is None
    assert found.high is None


def test_mean_over_sites_takes_the_sites_that_every_arm_has():
    scores = site_scores(
        [
            record(arm="a", site="x", dice=0.2),
            record(arm="a", site="y", dice=0.4),
            record(arm="a", site="z", dice=1.0),
            record(arm="b", site="x", dice=0.6),
            record(arm="b", site="y", dice=0.8),
            record(arm="b", site="z", dice=None),
        ]
    )
    means, common = mean_over_sites(scores, ["x", "y", "z"], ["a", "b"])
    assert common == ["x", "y"]
    assert means == {"a": pytest.approx(0.3), "b": pytest.approx(0.7)}
    assert mean_over_sites({}, ["x"], ["a"]) == ({"a": None}, [])


def test_arms_stand_in_the_order_of_the_methods_and_then_by_name():
    names = ["zeta", "uharmony", "fedavg", "alpha", "local"]
    found = arms_of([record(arm=name) for name in names])
    assert found == ["local", "fedavg", "uharmony", "alpha", "zeta"]


@pytest.mark.parametrize(
    ("difference", "text"),
    [
        (0.0123, "+1.2"),
        (-0.0123, "\u22121.2"),
        (0.0004, "0.0"),
        (-0.0004, "0.0"),
        (0.0, "0.0"),
        (None, "\u2014"),
    ],
)
def test_points_have_a_sign_unless_they_round_to_nothing(difference, text):
    assert points(difference) == text


def test_printable_takes_controls_and_direction_marks_away():
    hostile = "a\x1b[31mb\nc\u202ed\x00"
    assert printable(hostile) == "a\ufffd[31mb\ufffdc\ufffdd\ufffd"
    assert printable("x" * 1000, 10) == "x" * 10


def rendered(table):
    console = Console(width=120, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_terminal_table_shows_scores_gains_and_the_mean():
    text = rendered(
        summary_table(
            [
                record(arm="local", site="north", dice=0.5, n_cases=7),
                record(arm="uharmony", site="north", dice=0.6, n_cases=7),
                record(arm="local", site="valley", dice=0.7, n_cases=3),
                record(arm="uharmony", site="valley", dice=None, n_cases=3),
            ]
        )
    )
    lines = {line.split()[1]: line.split() for line in text.splitlines() if "\u2502" in line}
    assert lines["north"][3:8:2] == ["7", "0.500", "0.600"]
    assert "(+10.0)" in lines["north"]
    assert lines["valley"][7] == "\u2014"
    assert "1 of 2 sites" in text
    assert lines["mean"].count("0.500") == 1
    assert lines["mean"].count("0.600") == 1


def test_the_terminal_table_takes_hostile_names_as_text():
    text = rendered(summary_table([record(site="[bold]x[/bold]\x1b[2J", arm="[red]a")]))
    assert "[bold]x[/bold]" in text
    assert "[red]a" in text
    assert "\x1b" not in text


HALF_HIDDEN = [
    record(domain="mr", n_cases=20, dice=0.8),
    record(domain="ct", n_cases="<11", dice=None),
]


def test_a_withheld_domain_is_in_no_mean_and_beside_the_number_of_cases():
    found = score(HALF_HIDDEN)
    assert found.mean == pytest.approx(0.8)
    assert (found.cases, found.withheld) == (20, "<11")
    assert found.shown_cases == "20 + <11"
    assert score(HALF_HIDDEN[1:]).shown_cases == "<11"
    assert score(HALF_HIDDEN[:1]).shown_cases == "20"


def test_the_terminal_table_shows_what_is_withheld_and_says_so():
    hidden = record(site="south", domain="south", n_cases="<11", dice=None)
    text = rendered(summary_table([record(n_cases=20, dice=0.8), hidden]))
    (line,) = [line for line in text.splitlines() if "south" in line]
    assert line.count("<11") == 2
    assert "0." not in line
    assert "1 of 2 sites" in text
    assert "withheld" in text
    assert "withheld" not in rendered(summary_table([record()]))


def test_withheld_records_are_read_as_they_were_written(tmp_path):
    write_results(tmp_path / "r.json", HALF_HIDDEN)
    assert read_results(tmp_path / "r.json") == HALF_HIDDEN


def test_an_empty_run_has_an_empty_table():
    assert "site" in rendered(summary_table([]))
