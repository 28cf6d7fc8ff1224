"""A study's page, JSON and Markdown: figures by hand, hostile text, equal bytes, gaps."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from typing import Any

import pytest

from tests.support.page import Page
from tests.support.study_scores import COST, MATRIX, SCORES, STRONG, SWAPS, WEAK, everything, run
from uharmony_simulation.paired import Cost
from uharmony_simulation.study_classes import LabelLoss
from uharmony_simulation.study_plots import SiteMatrix
from uharmony_simulation.study_report import write_study_report
from uharmony_simulation.study_summary import Failure, markdown_tables, summary_json
from uharmony_simulation.study_tables import Swap, study_tables

HOSTILE = "<script>alert('x')</script>\"{{ 7*777 }}&$\\frac{\u202e\x1b|_"


def page_of(path, **given):
    settings = {"title": "A study", "scores": SCORES, **given}
    tables = write_study_report(path, **settings)
    return Page(path.read_text(encoding="utf-8")), tables


def test_the_tables_hold_figures_by_hand(tmp_path):
    page, _ = page_of(tmp_path / "r.html", costs=[COST], swaps=SWAPS, matrices=[MATRIX])
    dice, against, gains, swaps, worse = range(5)
    # 0.5 + 0.01 * 3.5 + gain; sites count alike.
    alone = page.row(dice, "local")
    assert [cell[:5] for cell in alone[1:4]] == ["0.535"] * 3
    row = page.row(dice, "uharmony")
    assert [cell[:5] for cell in row[1:4]] == ["0.565", "0.595", "0.535"]
    assert row[4:] == ["\u20141 seed", "12.35", "1.5 MB", "2.5 MB", "14848"]
    assert page.row(dice, "fedavg")[5:] == ["\u2014"] * 4

    assert page.row(against, "fedavg")[1].startswith("0.0")
    found = page.row(against, "uharmony")[1]
    assert found.startswith("+3.0")
    assert "above" in found
    assert "n\u00a016" in found
    # The references are columns; an arm has nothing to be compared with in its own.
    assert page.row(against, "fedavg")[2] == "\u2014"
    assert [c.replace("against", "") for c in page.tables[against][0]] == ["arm", "local", "fedavg"]

    north, south = page.row(gains, "uharmony")[1:]
    assert north.startswith("+6.0")
    assert "above" in north
    assert south.startswith("0.0")
    assert "not below" in south
    assert "below" in page.row(gains, "fedavg")[2]

    lost = page.row(swaps, "uharmony")
    assert lost[1] == "phi"
    assert lost[3] == "\u2014"  # nothing was swapped at north
    assert page.tables[worse][1][2:4] == ["fedavg", "south"]
    assert page.tables[worse][1][4].startswith("\u22124.0")
    assert len(page.tables[worse]) == 2
    assert "sites left worse off1" in re.sub(r"\s+", " ", page.words).replace("off 1", "off1")


@pytest.mark.slow
def test_equal_input_in_any_order_gives_equal_bytes(tmp_path):
    given: dict[str, list[Any]] = {
        "scores": everything(),
        "costs": [COST, Cost("uharmony", STRONG, 1, 1.1, 2.0, 3.0, 4, {"own": 2})],
        "swaps": SWAPS,
        "matrices": [MATRIX, SiteMatrix("fedavg", WEAK, ("a",), ((0.5,),))],
        "failures": [Failure("fedavg", WEAK, "late", 1), Failure("fedavg", WEAK, "late")],
    }
    _, first = page_of(tmp_path / "one.html", **given)
    shuffler = random.Random(3)  # noqa: S311 - an order, no secret
    mixed = {k: shuffler.sample(v, len(v)) for k, v in given.items()}
    _, second = page_of(tmp_path / "two.html", **mixed)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    assert summary_json(first) == summary_json(second)
    assert markdown_tables(first) == markdown_tables(second)


def test_another_input_gives_other_bytes(tmp_path):
    page_of(tmp_path / "one.html", scores=everything())
    page_of(tmp_path / "two.html", scores=everything(scale=0.9))
    assert (tmp_path / "one.html").read_bytes() != (tmp_path / "two.html").read_bytes()


def test_hostile_text_stays_text(tmp_path):
    classes = {HOSTILE: 0.5, f"{HOSTILE}2": 0.4}
    rows = [
        *(replace(s, by_class=classes) for s in run("local", HOSTILE, [0.0] * 8, cell=HOSTILE)),
        *(replace(s, by_class=classes) for s in run(HOSTILE, HOSTILE, [0.01] * 8, cell=HOSTILE)),
        *run(HOSTILE, HOSTILE, [-0.02] * 8, cell=HOSTILE, at_home=True),
        *run(HOSTILE, HOSTILE, [-0.02] * 8, cell=f"{HOSTILE} 1.0"),
        *run(HOSTILE, HOSTILE, [-0.02] * 8, cell=f"{HOSTILE} 2.0"),
    ]
    page, tables = page_of(
        tmp_path / "r.html",
        title=HOSTILE,
        scores=rows,
        costs=[Cost(HOSTILE, HOSTILE, 0, 1.0, 1.0, 1.0, 1, {HOSTILE: 1})],
        matrices=[SiteMatrix(HOSTILE, HOSTILE, (HOSTILE,), ((0.5,),))],
        swaps=[Swap(HOSTILE, HOSTILE, HOSTILE, 0, HOSTILE, "c", "p", 0.5, 0.4)],
        facts={HOSTILE: {HOSTILE: [HOSTILE, None]}},
        attribution=HOSTILE,
        failures=[Failure(HOSTILE, HOSTILE, HOSTILE)],
        arm=HOSTILE,
        regimes={HOSTILE: None},
        losses=[LabelLoss(HOSTILE, f"{HOSTILE} 1.0", {HOSTILE: (HOSTILE,)})],
    )
    assert "script" not in page.tags
    assert not {n for _, n, _ in page.attributes if n.startswith("on")}
    assert "\x1b" not in page.words
    assert "\u202e" not in page.words
    assert "5439" not in page.words
    assert page.words.count("<script>") > 10
    table = markdown_tables(tables)
    assert "\\<script\\>" in table
    assert re.search(r"(?<!\\)[<>]", table) is None
    # Every line of a table has as many cells as its head: no foreign bar made one more.
    for block in table.split("\n\n"):
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(bars) == 1


def test_nothing_comes_from_outside(tmp_path):
    page, _ = page_of(tmp_path / "r.html", swaps=SWAPS, matrices=[MATRIX], scores=everything())
    sources = [v for _, name, v in page.attributes if name in ("src", "href")]
    assert all(v.startswith(("data:image/png;base64,", "#")) for v in sources)
    assert sum(v.startswith("data:") for v in sources) == 4  # gains, shift, matrix, swaps
    ids = {v for _, name, v in page.attributes if name == "id"}
    assert {v[1:] for v in sources if v.startswith("#")} <= ids
    assert "link" not in page.tags


def test_without_anything_there_is_a_page(tmp_path):
    page, tables = page_of(tmp_path / "r.html", scores=[])
    assert page.tables == []
    assert "No test case was measured yet" in page.words
    assert "cannot be said" in page.words
    assert json.loads(summary_json(tables))["blocks"] == []
    assert markdown_tables(tables) == "\n"


def test_missing_sites_and_references_are_said(tmp_path):
    scores = [*run("uharmony", "north", [0.0] * 8), *run("fedprox", "south", [0.0] * 8)]
    page, tables = page_of(tmp_path / "r.html", scores=scores)
    assert "1 of 2 sites" in page.row(0, "uharmony")[1]
    assert page.row(0, "uharmony")[3] == "\u2014"
    assert "No reference arm was run" in page.words
    assert "1 of 2 sites" in markdown_tables(tables)


def test_failures_and_harm_are_on_the_page(tmp_path):
    page, _ = page_of(
        tmp_path / "r.html", failures=[Failure("fedbn", STRONG, "answer refused: norm", 2)]
    )
    assert page.row(-1, STRONG) == [STRONG, "fedbn", "2", "answer refused: norm"]
    assert "Worse off than alone" not in page.words  # uharmony harms no site
    page, _ = page_of(tmp_path / "r.html", arm="fedavg", failures=[])
    assert "Worse off than alone: south." in page.words
    assert "No run failed" in page.words
    page, _ = page_of(tmp_path / "r.html")
    assert "No run failed" not in page.words  # nobody said so


def test_json_holds_the_numbers_of_the_tables():
    tables = study_tables(SCORES, [COST], SWAPS)
    text = summary_json(tables, title="t", matrices=[MATRIX], facts={"cores": 2})
    found = json.loads(text)
    row = next(r for r in found["blocks"][0]["rows"] if r["arm"] == "uharmony")
    assert row["over_sites"]["mean"] == pytest.approx(0.565)
    assert row["against"]["fedavg"]["difference"]["mean"] == pytest.approx(0.03)
    assert row["gains"]["south"]["word"] == "not below"
    assert row["cost"]["kept"] == {"local": 1, "own": 1}
    assert found["swaps"][1]["over_sites"]["word"] == "below"
    assert found["matrices"][0]["dice"] == [[0.8, 0.4], [None, 0.7]]
    assert found["facts"] == {"cores": 2}


def test_markdown_by_hand():
    lines = markdown_tables(study_tables(SCORES, [COST])).splitlines()
    assert lines[0] == f"### {STRONG}, after the last round"
    assert lines[2] == (
        "| arm | mean over sites | north | south | seeds | s/round | up/round "
        "| down a round of training | local scalars |"
    )
    row = next(line for line in lines if line.startswith("| uharmony | 0.565 ("))
    assert row.endswith("| 1 | 12.35 | 1.5 MB | 2.5 MB | 14848 |")
    gained = [line for line in lines if line.startswith("| uharmony | +6.0 (")]
    assert len(gained) == 1
    assert "n 8: above | 0.0 (" in gained[0]
