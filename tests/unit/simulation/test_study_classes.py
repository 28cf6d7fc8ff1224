"""Tables by class: figures by hand, classes that a site does not annotate, what is not there."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.support.page import Page
from tests.support.study_scores import STRONG, run
from uharmony_model.errors import DataError
from uharmony_simulation.paired import CaseScore
from uharmony_simulation.study_classes import LabelLoss, LossColumn
from uharmony_simulation.study_report import write_study_report
from uharmony_simulation.study_summary import markdown_tables, summary_json
from uharmony_simulation.study_tables import study_tables

WHOLE, LOST = "mixed 1, sites 2", "mixed 1, sites 2, labels lost 1"
LOSS = LabelLoss(LOST, WHOLE, {"north": ("head",), "south": ("tail",)})
ANNOTATED = {("north", "head"), ("south", "tail")}


def classes(arm, site, *, head=None, tail=None, cases=8, **where):
    """Cases with Dice by class `head` + 0.01 i and `tail` - 0.01 i; None leaves a class out."""
    scores = []
    for i, score in enumerate(run(arm, site, [0.0] * cases, **where)):
        found = {"head": head and head + 0.01 * i, "tail": tail and tail - 0.01 * i}
        by_class = {name: value for name, value in found.items() if value is not None}
        scores.append(replace(score, by_class=by_class))
    return scores


BOTH = [
    *classes("local", "north", head=0.50, tail=0.80),
    *classes("local", "south", head=0.60, tail=0.70),
    *classes("fedavg", "north", head=0.56, tail=0.78),
    *classes("fedavg", "south", head=0.64, tail=0.70),
]


def lost_and_whole(unseen=True):
    """fedavg loses 0.02 on a class that a site draws, and 0.3 on one that it does not draw."""
    scores: list[CaseScore] = []
    for site in ("north", "south"):
        scores += classes("fedavg", site, head=0.6, tail=0.7, cell=WHOLE)
        drawn: dict[str, float | None] = {}
        for name, dice in (("head", 0.6), ("tail", 0.7)):
            if (site, name) in ANNOTATED:
                drawn[name] = dice - 0.02
            else:
                drawn[name] = dice - 0.3 if unseen else None
        scores += classes("fedavg", site, **drawn, cell=LOST)
    return scores


def test_classes_by_hand():
    (table,) = study_tables(BOTH).classes
    assert (table.cell, table.classes) == (STRONG, ("head", "tail"))
    alone, fedavg = table.rows
    assert (alone.shown, fedavg.shown) == ("local", "fedavg")
    # 0.035 is the mean of 0.00 to 0.07; both sites count alike.
    assert alone.by_class["head"].dice.mean == pytest.approx(0.55 + 0.035)
    assert alone.by_class["tail"].dice.mean == pytest.approx(0.75 - 0.035)
    assert alone.by_class["head"].against is None
    head, tail = (fedavg.by_class[name].against for name in table.classes)
    assert head is not None
    assert tail is not None
    assert head.difference.mean == pytest.approx((0.06 + 0.04) / 2)
    assert tail.difference.mean == pytest.approx((-0.02 + 0.0) / 2)
    assert (head.word, tail.word) == ("above", "below")
    assert head.difference.cases == 16


def test_a_class_that_a_case_does_not_have_is_no_case_of_it():
    part = [
        replace(s, by_class={k: v for k, v in s.by_class.items() if k == "tail" or i % 2})
        for i, s in enumerate(BOTH)
    ]
    (table,) = study_tables(part).classes
    fedavg = table.rows[1].by_class
    assert (fedavg["head"].dice.cases, fedavg["tail"].dice.cases) == (8, 16)
    assert fedavg["head"].against is not None
    assert fedavg["head"].against.difference.cases == 8


def test_one_class_and_old_records_have_no_table():
    assert study_tables(run("local", "north", [0.0] * 8)).classes == ()
    one = classes("local", "north", head=0.5) + classes("fedavg", "north", head=0.6)
    assert study_tables(one).classes == ()


def test_moments_are_rows_compared_at_their_own_moment():
    home = [
        *classes("local", "north", head=0.70, tail=0.80, at_home=True),
        *classes("fedavg", "north", head=0.71, tail=0.81, at_home=True),
    ]
    (table,) = study_tables([*home, *BOTH]).classes
    assert [r.shown for r in table.rows] == ["local", "local +home", "fedavg", "fedavg +home"]
    found = table.rows[3].by_class["head"].against
    assert found is not None
    assert found.difference.mean == pytest.approx(0.01)


def test_each_arm_against_itself_with_all_labels():
    (table,) = study_tables(lost_and_whole(), losses=[LOSS]).losses
    assert (table.cell, table.all_labels) == (LOST, WHOLE)
    assert [(c.site, c.name, c.annotated) for c in table.columns] == [
        ("north", "head", True),
        ("north", "tail", False),
        ("south", "head", False),
        ("south", "tail", True),
    ]
    (row,) = table.rows
    for column in table.columns:
        found = row.cells[column].against
        assert found is not None
        assert found.difference.mean == pytest.approx(-0.02 if column.annotated else -0.3)
        assert (found.difference.cases, found.word) == (8, "below")
    assert row.cells[table.columns[1]].dice.mean == pytest.approx(0.7 - 0.3 - 0.035)
    assert not table.unmeasured


def test_over_sites_a_class_counts_where_it_is_annotated():
    found = {t.cell: t for t in study_tables(lost_and_whole(), losses=[LOSS]).classes}
    (row,) = found[LOST].rows
    assert row.by_class["head"].dice.mean == pytest.approx(0.6 - 0.02 + 0.035)
    assert row.by_class["head"].dice.cases == 8
    assert found[WHOLE].rows[0].by_class["head"].dice.cases == 16


def test_only_common_cases_and_seeds_are_paired():
    scores = lost_and_whole()
    moved = [replace(s, seed=1) if s.cell == WHOLE and s.site == "north" else s for s in scores]
    moved = [s for s in moved if not (s.cell == WHOLE and s.case in ("south-0", "south-1"))]
    (table,) = study_tables(moved, losses=[LOSS]).losses
    (row,) = table.rows
    assert row.cells[LossColumn("north", "head", True)].against is None
    south = row.cells[LossColumn("south", "head", False)]
    assert south.against is not None
    assert (south.dice.cases, south.against.difference.cases) == (8, 6)


def test_what_no_record_measured_is_said(tmp_path):
    scores = lost_and_whole(unseen=False)
    tables = write_study_report(tmp_path / "r.html", title="t", scores=scores, losses=[LOSS])
    (table,) = tables.losses
    assert table.unmeasured
    assert LossColumn("north", "tail", False) in table.columns
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "hold no Dice of some classes" in page.words
    shown = next(t for t in page.tables if t[0][1:] == ["north", "south"] and "not" in str(t[1]))
    assert shown[2][2:4] == ["\u2014", "\u2014"]
    line = markdown_tables(tables).split("each arm against itself")[1].splitlines()[4]
    assert line.split(" | ")[2:4] == ["\u2014", "\u2014"]


def test_without_the_same_arm_with_all_labels_there_is_dice_alone():
    scores = [s for s in lost_and_whole() if s.cell == LOST]
    (table,) = study_tables(scores, losses=[LOSS]).losses
    assert all(c.against is None for c in table.rows[0].cells.values())
    assert "| 0.615 (" in markdown_tables(study_tables(scores, losses=[LOSS]))
    assert study_tables(scores).losses == ()


def test_page_json_and_markdown_hold_the_same_figures(tmp_path):
    scores = [*BOTH, *lost_and_whole()]
    tables = write_study_report(tmp_path / "r.html", title="t", scores=scores, losses=[LOSS])
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    by_class = next(t for t in page.tables if t[0] == ["arm", "head", "tail"])
    assert by_class[1] == ["Dice", "against training alone"] * 2
    assert by_class[3][0] == "fedavg"
    assert [c[:5] for c in by_class[3][1::2]] == ["0.635", "0.705"]
    assert by_class[3][2].startswith("+5.0 above")
    assert "n\u00a016" in by_class[3][2]
    lost = next(t for t in page.tables if "not annotated" in str(t[1]))
    assert [c.replace("\n", "")[:5] for c in lost[2][1:]] == ["0.615", "0.365", "0.335", "0.645"]
    assert "\u221230.0 below" in lost[2][2]
    assert "hold no Dice" not in page.words

    found = json.loads(summary_json(tables))
    row = found["classes"][0]["rows"][1]
    assert (row["arm"], row["alone"]["arm"]) == ("fedavg", "local")
    assert row["by_class"]["head"]["against"]["word"] == "above"
    hidden = found["label_losses"][0]["rows"][0]["at_sites"][1]
    assert (hidden["site"], hidden["class"], hidden["annotated"]) == ("north", "tail", False)
    assert hidden["against"]["difference"]["mean"] == pytest.approx(-0.3)

    text = markdown_tables(tables)
    assert f"### {STRONG}, class by class" in text
    assert f"### {LOST}, each arm against itself with all labels ({WHOLE})" in text
    assert "| fedavg | 0.635 (" in text
    assert "north: tail (not annotated)" in text
    assert "| 0.365, \u221230.0 (" in text


def test_a_dice_of_a_class_outside_its_range_is_refused():
    wrong = [replace(s, by_class={"head": 1.5, "tail": 0.5}) for s in BOTH]
    with pytest.raises(DataError, match=r"Dice is 1\.5"):
        study_tables(wrong)


def test_scores_with_classes_can_stand_in_a_set():
    assert len({*BOTH, *BOTH}) == len(BOTH)
