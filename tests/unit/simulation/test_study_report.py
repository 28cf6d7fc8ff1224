"""A study's page, JSON and Markdown: figures by hand, hostile text, equal bytes, gaps."""

from __future__ import annotations

import io
import json
import random
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from uharmony_model.methods import METHODS
from uharmony_simulation.paired import CaseScore, Cost
from uharmony_simulation.plot_style import style_of
from uharmony_simulation.study_plots import (
    SiteMatrix,
    gain_plot,
    matrix_plot,
    shift_plot,
    swap_plot,
)
from uharmony_simulation.study_report import write_study_report
from uharmony_simulation.study_summary import (
    Failure,
    amount,
    markdown_tables,
    signed,
    small_p,
    summary_json,
)
from uharmony_simulation.study_tables import Swap, shift_of, study_tables

HOSTILE = "<script>alert('x')</script>\"{{ 7*777 }}&$\\frac{\u202e\x1b|_"
VOID = {"meta", "img", "br"}
STRONG, WEAK = "invert 2.0, sites 2", "invert 1.0, sites 2"
# Dice above training alone, case by case: eight patients a site, all of one sign but for one arm.
GAINS = {
    ("fedavg", "north"): [0.03, 0.04, 0.05, 0.02, 0.06, 0.03, 0.05, 0.04],  # mean 0.04
    ("fedavg", "south"): [-0.03, -0.04, -0.05, -0.02, -0.06, -0.03, -0.05, -0.04],
    ("uharmony", "north"): [0.05, 0.06, 0.07, 0.04, 0.08, 0.05, 0.07, 0.06],  # mean 0.06
    ("uharmony", "south"): [0.001, -0.001, 0.002, -0.002, 0.003, -0.003, 0.001, -0.001],
}


class Page(HTMLParser):
    """Tags, attributes, tables as text, with a check that elements nest."""

    def __init__(self, text):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def row(self, table, name):
        """The cells of the row that begins with this name."""
        return next(row for row in self.tables[table] if row[0] == name)


def run(arm, site, gains, *, cell=STRONG, seed=0, at_home=False):
    return [
        CaseScore(
            arm=arm,
            at_home=at_home,
            cell=cell,
            seed=seed,
            site=site,
            case=f"{site}-{i}",
            patient=f"{site}-{i}",
            dice=0.5 + 0.01 * i + gain,
        )
        for i, gain in enumerate(gains)
    ]


SCORES = [
    *run("local", "north", [0.0] * 8),
    *run("local", "south", [0.0] * 8),
    *(s for (arm, site), gains in GAINS.items() for s in run(arm, site, gains)),
]
COST = Cost("uharmony", STRONG, 0, 12.345, 1.5e6, 2.5e6, 14848, {"own": 1, "local": 1})


def swap(site, gains, part="stem"):
    return [
        Swap("uharmony", STRONG, part, 0, site, f"{site}-{i}", f"{site}-{i}", 0.7, 0.7 + gain)
        for i, gain in enumerate(gains)
    ]


SWAPS = [
    *swap("north", [-0.2, -0.3, -0.25, -0.21, -0.31, -0.26]),
    *swap("south", [0.0] * 6, "phi"),
]
MATRIX = SiteMatrix("uharmony", STRONG, ("north", "south"), ((0.8, 0.4), (None, 0.7)))


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


def known(p: float | None) -> float:
    assert p is not None
    return p


def test_holm_families_are_columns_and_blocks():
    tables = study_tables(SCORES, swaps=SWAPS)
    (block,) = tables.blocks
    by_arm = {row.arm: row for row in block.rows}
    family = sorted(known(c.p) for row in block.rows for c in row.gains.values())
    assert len(family) == 4
    north = by_arm["uharmony"].gains["north"]
    below = [(4 - i) * p for i, p in enumerate(family) if p <= known(north.p)]
    assert north.p_holm == pytest.approx(min(1.0, max(below)))
    pair = by_arm["uharmony"].against["local"], by_arm["fedavg"].against["local"]
    small, large = sorted(pair, key=lambda c: known(c.p))
    assert small.p_holm == pytest.approx(min(1.0, 2 * known(small.p)))
    assert large.p_holm == pytest.approx(min(1.0, max(2 * known(small.p), known(large.p))))
    # The column of fedavg has two arms of its own: training alone and uharmony.
    assert sorted(a for a, row in by_arm.items() if "fedavg" in row.against) == [
        "local",
        "uharmony",
    ]


def test_arms_at_home_are_compared_with_references_at_home():
    home = [*run("local", "north", [0.1] * 8, at_home=True)]
    home += run("uharmony", "north", [0.12] * 8, at_home=True)
    tables = study_tables([*SCORES, *home], [COST])
    last, after = tables.blocks
    assert (last.at_home, after.at_home) == (False, True)
    row = next(r for r in after.rows if r.arm == "uharmony")
    assert row.gains["north"].difference.mean == pytest.approx(0.02)
    assert row.cost is not None
    assert row.cost.kept == {"local": 1, "own": 1}


def test_costs_are_means_over_runs_and_kept_is_a_count():
    other = Cost("uharmony", STRONG, 1, 14.345, 2.5e6, 3.5e6, 14848, {"own": 2})
    elsewhere = Cost("uharmony", WEAK, 0, 99.0, 9e9, 9e9, 1, {})
    (block,) = study_tables(SCORES, [other, COST, elsewhere]).blocks
    cost = next(r for r in block.rows if r.arm == "uharmony").cost
    assert cost is not None
    assert cost.seconds_per_round == pytest.approx(13.345)
    assert (cost.bytes_up_per_round, cost.bytes_down_per_round) == (2e6, 3e6)
    assert cost.kept == {"local": 1, "own": 3}


def everything(scale=1.0):
    weak = [s for (a, t), g in GAINS.items() for s in run(a, t, g, cell=WEAK)]
    again = [s for (a, t), g in GAINS.items() for s in run(a, t, [scale * x for x in g], seed=1)]
    home = run("local", "north", [0.0] * 8, at_home=True)
    return [*SCORES, *weak, *again, *home]


@pytest.mark.slow
def test_equal_input_in_any_order_gives_equal_bytes(tmp_path):
    given = {
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
    rows = [
        *run("local", HOSTILE, [0.0] * 8, cell=HOSTILE),
        *run(HOSTILE, HOSTILE, [0.01] * 8, cell=HOSTILE),
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
    assert lines[2].startswith("| arm | mean over sites | north | south | seeds | s/round |")
    row = next(line for line in lines if line.startswith("| uharmony | 0.565 ("))
    assert row.endswith("| 1 | 12.35 | 1.5 MB | 2.5 MB | 14848 |")
    gained = [line for line in lines if line.startswith("| uharmony | +6.0 (")]
    assert len(gained) == 1
    assert "n 8: above | 0.0 (" in gained[0]


def test_the_shift_is_read_from_the_name_of_a_condition():
    assert shift_of("invert 2.0, sites 4") == ("invert, sites 4", 2.0)
    assert shift_of("bias field 0.5") == ("bias field", 0.5)
    assert shift_of("gamma -1, sites 4, dropout 0.2") == ("gamma, sites 4, dropout 0.2", -1.0)
    for cell in ("sarcoma", "", "2.0", ", sites 4"):
        assert shift_of(cell) is None
    cells = [f"invert {s}" for s in ("10.0", "2.0", "1.5")]
    scores = [s for cell in cells for s in run("local", "north", [0.0] * 2, cell=cell)]
    assert study_tables(scores).cells == ("invert 1.5", "invert 2.0", "invert 10.0")


def test_amounts_and_small_p():
    found = [amount(v) for v in (0, 999, 1500, 123_456, 2_500_000, 3.2e9)]
    assert found == ["0 B", "999 B", "1.5 kB", "123 kB", "2.5 MB", "3.2 GB"]
    assert [small_p(p) for p in (0.0004, 0.001, 0.5, 1.0)] == ["< 0.001", "0.001", "0.500", "1.000"]


def test_signs_of_effects():
    found = [signed(v) for v in (0.004, -0.004, 0.5, -1.0, None)]
    assert found == ["0.00", "0.00", "+0.50", "\u22121.00", "\u2014"]


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def coloured(png, colour):
    """Pixels that have this colour but for rounding."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels(png).astype(int) - wanted).max(axis=2) <= 3).sum())


def test_every_method_has_a_style_of_its_own():
    styles = [(style_of(arm).colour, style_of(arm).marker) for arm in METHODS]
    assert len(set(styles)) == len(METHODS)
    assert style_of("something else") == style_of("something else")


def test_plots_draw_what_they_are_given():
    tables = study_tables(everything(), swaps=SWAPS)
    picture = shift_plot(tables, at_home=False)
    assert list(picture) == ["invert, sites 2"]
    assert coloured(picture["invert, sites 2"], style_of("uharmony").colour) > 200
    assert coloured(picture["invert, sites 2"], style_of("lg-fedavg").colour) == 0
    assert shift_plot(tables, at_home=True) == {}  # one strength is no curve

    # What was not shifted is strength 0: with one more strength there is a curve.
    gamma = run("uharmony", "north", [0.0] * 8, cell="gamma 1.0, sites 2")
    none = run("uharmony", "north", [0.1] * 8, cell="none, sites 2")
    other = run("uharmony", "north", [0.1] * 8, cell="none, sites 4")
    assert shift_plot(study_tables([*gamma, *other]), at_home=False) == {}
    assert list(shift_plot(study_tables([*gamma, *none]), at_home=False)) == ["gamma, sites 2"]

    gains = gain_plot(tables.blocks[1:2])
    assert gains is not None
    assert coloured(gains, "#0072b2") == 0  # nothing at home
    assert gain_plot([]) is None

    matrix = matrix_plot([MATRIX])
    assert matrix is not None
    assert matrix_plot([]) is None
    # 0.8 and 0.7 are in the yellow half of the map, 0.4 in the blue half.
    shown = pixels(matrix).astype(int)
    assert (shown[:, :, 0] > shown[:, :, 2] + 40).sum() > 1.4 * (
        shown[:, :, 2] > shown[:, :, 0] + 10
    ).sum()

    assert swap_plot(tables.swaps) is not None
    assert swap_plot([]) is None


def test_plots_as_svg_hold_no_date_and_are_equal():
    tables = study_tables(everything())
    first, second = (gain_plot(tables.blocks[1:2], "svg") for _ in range(2))
    assert first is not None
    assert first == second
    assert first.lstrip().startswith(b"<?xml")
    assert b"date" not in first.lower()
