"""Which local-only arm an arm is compared with, from its settings to the tables and the page."""

from __future__ import annotations

import json

import pytest

from tests.support.page import Page
from tests.support.study_scores import run
from tests.support.tiny import tiny_study
from uharmony_simulation.study_regimes import Alone, alone_of, local_of_regime
from uharmony_simulation.study_report import write_study_report
from uharmony_simulation.study_summary import markdown_tables, summary_json
from uharmony_simulation.study_tables import study_tables

LONG = {"training": {"rounds": 9}}
# Dice over all cases above what is common to them.
LEVELS = {"local": 0.0, "local-long": 0.10, "uharmony": 0.03, "uharmony-long": 0.12}
REGIMES = {
    "local": "local",
    "local-long": "local-long",
    "uharmony": "local",
    "uharmony-long": "local-long",
}


def study(method, **changes):
    return tiny_study(method=method, **changes)


def scores(levels, **where):
    return [
        s
        for arm, level in levels.items()
        for site in ("north", "south")
        for s in run(arm, site, [level] * 8, **where)
    ]


def test_the_settings_decide_which_local_arm_it_is():
    layer = {"network": {"harmonization": {"domain_dropout": 0.0}}}
    found = local_of_regime(
        {
            "fedavg": study("fedavg"),
            "local-long": study("local", **LONG),
            "local": study("local"),
            "long": study("uharmony", **LONG),
            # What training alone does not know makes no other regime.
            "no-dropout": study("uharmony", **LONG, **layer),
            "momentum": study("uharmony", federation={"momentum": 0.5}),
            "prox": study("fedprox", training={"proximal": 0.5}),
            "longer": study("uharmony", training={"rounds": 10}),
            "finale": study("uharmony", finale={"steps": 5}),
        }
    )
    assert found == {
        "fedavg": "local",
        "local-long": "local-long",
        "local": "local",
        "long": "local-long",
        "no-dropout": "local-long",
        "momentum": "local",
        "prox": "local",
        "longer": None,
        "finale": None,
    }


def test_of_two_local_arms_with_equal_settings_the_one_called_local_counts():
    layer = {"network": {"harmonization": {"domain_dropout": 0.0}}}
    arms = {"a": study("local", **layer), "local": study("local"), "uharmony": study("uharmony")}
    assert local_of_regime(arms)["uharmony"] == "local"
    assert local_of_regime({k: v for k, v in arms.items() if k != "local"})["uharmony"] == "a"
    assert local_of_regime({"fedavg": study("fedavg")}) == {"fedavg": None}


@pytest.mark.parametrize(
    ("arm", "there", "expected"),
    [
        ("uharmony-long", {"local", "local-long"}, Alone("local-long")),
        ("uharmony-long", {"local"}, Alone("local", same_settings=False)),  # not trained yet
        ("uharmony-long", {"fedavg"}, None),
        ("local-long", {"local", "local-long"}, None),
        ("local", {"local"}, None),
        ("other", {"local", "local-long"}, Alone("local", same_settings=False)),
        ("unknown", {"local"}, Alone("local")),
    ],
)
def test_what_an_arm_is_compared_with(arm, there, expected):
    assert alone_of(arm, there, {**REGIMES, "other": None}) == expected


def test_gains_are_over_the_local_arm_of_the_same_regime():
    (block,) = study_tables(scores(LEVELS), regimes=REGIMES).blocks
    rows = {row.arm: row for row in block.rows}
    assert block.several_alone
    assert block.references == ("local",)
    for arm, gain in (("uharmony", 0.03), ("uharmony-long", 0.02)):
        assert rows[arm].against["local"].difference.mean == pytest.approx(gain)
        assert rows[arm].gains["south"].difference.mean == pytest.approx(gain)
    assert rows["uharmony-long"].alone == Alone("local-long")
    assert not rows["local-long"].against
    assert not rows["local"].gains
    # Without regimes the one called "local" is the reference of all.
    (block,) = study_tables(scores(LEVELS)).blocks
    rows = {row.arm: row for row in block.rows}
    assert not block.several_alone
    assert rows["uharmony-long"].gains["south"].difference.mean == pytest.approx(0.12)


def test_a_study_without_an_arm_called_local_is_compared_all_the_same():
    levels = {arm: level for arm, level in LEVELS.items() if arm.endswith("long")}
    (block,) = study_tables(scores(levels), regimes=REGIMES).blocks
    assert block.references == ("local",)
    row = next(r for r in block.rows if r.arm == "uharmony-long")
    assert row.against["local"].difference.mean == pytest.approx(0.02)


def test_another_moment_has_the_local_arm_of_that_moment():
    home = scores({"local-long": 0.2, "uharmony-long": 0.25}, at_home=True)
    _, block = study_tables([*scores(LEVELS), *home], regimes=REGIMES).blocks
    row = next(r for r in block.rows if r.arm == "uharmony-long")
    assert row.gains["north"].difference.mean == pytest.approx(0.05)


def test_the_reference_is_named_where_it_is_not_one_for_all(tmp_path):
    regimes = {**REGIMES, "fedavg": None}
    given = scores({**LEVELS, "fedavg": 0.01})
    tables = write_study_report(
        tmp_path / "r.html", title="t", scores=given, regimes=regimes, arm="uharmony-long"
    )
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "the same number of steps" not in page.words
    assert "the local-only arm of its own settings" in page.words
    assert "above local-long (+2.0)" in page.words
    _, against, gains, *_ = page.tables
    names = [row[0] for row in against[1:]]
    assert "uharmony-longalone: local-long" in names
    assert "fedavgalone: local, other settings" in names
    assert against[0][1] == "againsttraining alone"
    assert [row[0] for row in gains[1:]] == [n for n in names if "alone:" in n]

    lines = markdown_tables(tables).splitlines()
    assert "| arm | local-only model | against training alone | against fedavg |" in lines
    row = next(line for line in lines if line.startswith("| uharmony-long | local-long | +2.0"))
    assert row.count("n 16: above") == 2
    found = json.loads(summary_json(tables))["blocks"][0]["rows"]
    assert {r["arm"]: r["alone"] for r in found}["fedavg"] == {
        "arm": "local",
        "same_settings": False,
    }


def test_one_regime_needs_no_names(tmp_path):
    levels = {"local": 0.0, "uharmony": 0.03}
    write_study_report(tmp_path / "r.html", title="t", scores=scores(levels), regimes=REGIMES)
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "alone: " not in page.words
    assert "the same number of steps" in page.words
