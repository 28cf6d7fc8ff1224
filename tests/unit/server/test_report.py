"""The report: figures by hand, hostile text, nothing from outside, equal bytes for equal inputs."""

from __future__ import annotations

import base64
import itertools
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from uharmony_model.study import Study
from uharmony_server.admission import RefusalReason
from uharmony_server.curves import dot_chart, learning_curves, nice_ticks, slots
from uharmony_server.records import Record
from uharmony_server.report import ArmRefusal, Figure, write_report
from uharmony_server.summary import site_scores

HOSTILE = "<script>alert('x')</script>\"{{ 7*7 }}&\u202e\x1b"
VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """Tags, attributes and the text of table cells, with a check that elements nest."""

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

    def table(self, heading):
        """The first table whose header row holds this heading."""
        return next(t for t in self.tables if any(heading in cell for cell in t[0]))


def record(**changes):
    given = {
        "arm": "fedavg",
        "seed": 0,
        "round": 10,
        "site": "north",
        "domain": changes.get("site", "north"),
        "split": "test",
        "class_": "lesion",
        "n_cases": 4,
        "dice": 0.5,
        **changes,
    }
    return Record(**given)


RUN = [
    record(arm="local", dice=0.600, dice_low=0.5, dice_high=0.7, n_cases=9),
    record(arm="uharmony", dice=0.634, dice_low=0.55, dice_high=0.71, n_cases=9, hd95_mm=4.26),
    record(arm="local", site="valley", dice=0.500, n_cases=5),
    record(arm="uharmony", site="valley", dice=0.480, n_cases=5, surface_dice=0.8123),
    *[
        record(arm=arm, split="validation", round=n, dice=0.05 * n)
        for arm in ("local", "uharmony")
        for n in (2, 4, 10)
    ],
]


def study(**changes):
    return Study.model_validate(
        {
            "name": "trial",
            "task": {"classes": {"lesion": 1}, "intensity": {"T1": {"policy": "zscore"}}},
            "evaluation": {"surface_tolerance_mm": 1.5},
            **changes,
        }
    )


def written(tmp_path, records=RUN, **changes):
    path = tmp_path / "report.html"
    write_report(path, **{"title": "trial", "records": records, **changes})
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_the_table_holds_each_sites_score_interval_and_number_of_cases(tmp_path):
    _, page = written(tmp_path)
    header, north, valley, mean = page.tables[0]
    assert header == ["site", "n", "local", "uharmony"]
    assert north[:2] == ["north", "9"]
    assert north[3] == "0.6340.550\u2009\u2013\u20090.710"
    assert valley == ["valley", "5", "0.500", "0.480"]
    assert mean[2:] == ["0.550", "0.557"]


def test_gains_have_a_sign_a_colour_and_count_the_sites_that_lose(tmp_path):
    text, page = written(tmp_path)
    header, north, valley, mean = page.tables[1]
    assert header == ["site", "n", "uharmony"]
    assert north[2] == "+3.4"
    assert valley[2] == "\u22122.0"
    assert mean[2] == "+0.7"
    assert '<span class="up">+3.4</span>' in text
    assert '<span class="down">\u22122.0</span>' in text
    assert "1 of 2 sites at or above their own model; worst" in page.words


HIDDEN = [
    *[
        record(arm=arm, site="valley", n_cases="<11", dice=None, **changes)
        for arm in ("local", "uharmony")
        for changes in ({}, {"split": "validation", "round": 2})
    ],
    *[r for r in RUN if r.site == "north"],
]


def test_what_a_site_withholds_is_shown_as_that_and_is_in_no_mean(tmp_path):
    text, page = written(tmp_path, HIDDEN, study=study())
    _, _, valley, mean = page.tables[0]
    assert valley == ["valley", "<11", "<11", "<11"]
    assert mean == ["mean over sites", "1 of 2", "0.600", "0.634"]
    details = [row for row in page.table("HD95")[1:] if "<11" in row]
    assert [row[-6:] for row in details] == [["<11"] * 6] * 2
    assert "withheld by the site" in page.words
    assert "&lt;11" in text
    assert "> 9" in page.words  # test cases of all sites
    assert "withheld" not in written(tmp_path, RUN)[1].words


def test_the_charts_name_the_site_that_withholds_and_draw_nothing_for_it():
    dots = dot_chart(site_scores(HIDDEN), ["north", "valley"], ["local", "uharmony"])
    assert dots is not None
    assert [(row.site, len(row.dots), row.withheld) for row in dots.rows] == [
        ("north", 2, ""),
        ("valley", 0, "<11"),
    ]
    charts = learning_curves(HIDDEN, ["local", "uharmony"])
    assert [(c.site, len(c.lines), c.withheld) for c in charts] == [
        ("north", 2, ""),
        ("valley", 0, "<11"),
    ]


def test_without_a_local_arm_there_is_no_section_of_gains(tmp_path):
    text, _ = written(tmp_path, [r for r in RUN if r.arm != "local"])
    assert 'id="gains"' not in text
    assert "gained" not in text


def test_details_show_every_metric_its_unit_and_the_sign_for_undefined(tmp_path):
    _, page = written(tmp_path, study=study())
    table = page.table("HD95")
    assert table[0][4:] == [
        "surface Dicewithin 1.5 mm",
        "HD95mm",
        "lesion recall",
        "false positivesper case",
    ]
    assert table[1][0] == "north"
    assert table[2][0].strip() == "uharmony"  # the site's cell spans its arms
    assert table[2][3:] == ["\u2014", "4.3", "\u2014", "\u2014"]
    assert table[4][3] == "0.812"


def test_a_site_with_several_domains_has_a_row_for_each(tmp_path):
    _, page = written(
        tmp_path, [record(domain="mr-1", n_cases=2), record(domain="mr-2", n_cases=3, dice=0.75)]
    )
    assert page.tables[0][1][:3] == ["north", "5", "0.650"]  # (2 * 0.5 + 3 * 0.75) / 5
    rows = page.table("HD95")[1:]
    assert [row[-7].strip() for row in rows] == ["fedavg (mr-1)", "fedavg (mr-2)"]


def test_several_seeds_are_averaged_and_the_caption_says_so(tmp_path):
    text, page = written(tmp_path, [record(dice=0.4), record(dice=0.7, seed=1)])
    assert page.tables[0][1][2] == "0.550"
    assert "and the seeds" in text
    assert "and the seeds" not in written(tmp_path)[0]


def test_the_headline_says_what_became_of_the_studys_own_method(tmp_path):
    _, page = written(tmp_path, study=study(method="uharmony"))
    assert (
        "uharmony: mean test Dice 0.557 over 2 sites, +0.7 points against local-only models;"
        " 1 of 2 at or above their own." in page.words
    )


def test_refusals_are_named_and_their_absence_is_said(tmp_path):
    refusal = ArmRefusal(
        arm="fedavg",
        seed=3,
        site="valley",
        round=7,
        reason=RefusalReason.NORM_TOO_LARGE,
        detail="norm 812 > 41",
    )
    _, page = written(tmp_path, refusals=[refusal])
    assert page.table("reason")[1] == [
        *("valley", "fedavg", "3", "7"),
        *("norm_too_large", "norm 812 > 41"),
    ]
    assert "1 answer did not count. The run went on without it." in page.words
    assert "every answer of every site passed" in written(tmp_path)[1].words


def test_hostile_text_stays_text_wherever_it_stands(tmp_path):
    hostile_records = [
        r.model_copy(
            update={"site": HOSTILE, "domain": HOSTILE + "2", "arm": HOSTILE, "class_": HOSTILE}
        )
        for r in RUN
    ]
    text, page = written(
        tmp_path,
        hostile_records,
        title=HOSTILE,
        refusals=[
            SimpleNamespace(
                arm=HOSTILE, seed=0, site=HOSTILE, round=1, reason=HOSTILE, detail=HOSTILE
            )
        ],
        run_info={
            HOSTILE: HOSTILE,
            "g": {HOSTILE: HOSTILE},
            "t": [{HOSTILE: HOSTILE}],
            "l": [HOSTILE],
        },
        figures=[Figure(HOSTILE, HOSTILE, HOSTILE, HOSTILE, None, b"png")],
        attribution=HOSTILE,
    )
    plain = written(tmp_path, figures=[Figure("a", "s", "w", "c", None, b"png")])[1]
    assert set(page.tags) <= set(plain.tags) | {"tr", "td"}
    assert "script" not in page.tags
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "{{ 7*7 }}" in page.words
    assert "49" not in page.table("reason")[1][5]
    assert page.table("reason")[1][5].startswith("<script>alert('x')</script>")


def test_nothing_is_loaded_from_anywhere(tmp_path):
    text, page = written(
        tmp_path, study=study(), figures=[Figure("local", "north", "worst", "c", 0.3, b"\x89PNG")]
    )
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    for _, name, value in page.attributes:
        if name in ("src", "href", "srcset", "action", "data", "xlink:href"):
            assert value.startswith(("#", "data:image/png;base64,"))
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(v for t, n, v in page.attributes if t == "meta" and "default-src" in v)
    assert "default-src 'none'" in policy


def test_links_within_the_page_lead_somewhere(tmp_path):
    _, page = written(tmp_path)
    ids = [value for _, name, value in page.attributes if name == "id"]
    targets = [v[1:] for _, name, v in page.attributes if name == "href"]
    assert len(ids) == len(set(ids))
    assert targets
    assert set(targets) <= set(ids)


def test_pictures_are_embedded_whole_with_a_text_for_those_who_cannot_see_them(tmp_path):
    content = bytes(range(256)) * 40
    _, page = written(
        tmp_path, figures=[Figure("uharmony", "north", "median", "case-7", 0.61, content)]
    )
    image = {name: value for tag, name, value in page.attributes if tag == "img"}
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == content
    assert image["alt"].startswith("median test case of north under uharmony, Dice 0.610")
    assert "case-7" in page.words
    assert all(v for t, n, v in page.attributes if t == "svg" and n == "aria-label")


def test_equal_inputs_give_equal_bytes_and_the_order_of_records_does_not_matter(tmp_path):
    facts = {"threads": 1, "packages": {"torch": "2.13"}}
    once = written(tmp_path, run_info=facts, study=study())[0]
    assert written(tmp_path, run_info=facts, study=study())[0] == once
    assert written(tmp_path, RUN[::-1], run_info=facts, study=study())[0] == once


def test_classes_stand_in_the_order_of_the_study(tmp_path):
    classes = {"posterior": 2, "anterior": 1}
    task = {"classes": classes, "intensity": {"T1": {"policy": "zscore"}}}
    records = [record(class_=name) for name in ("other", "anterior", "posterior")]
    for given in (records, records[::-1]):
        text, _ = written(tmp_path, given, study=study(task=task))
        assert re.findall(r"<h3>(.+?)</h3>", text)[:3] == ["posterior", "anterior", "other"]


def test_provenance_shows_facts_groups_tables_digest_and_attribution(tmp_path):
    given = study()
    _, page = written(
        tmp_path,
        study=given,
        attribution="Data: somebody, CC BY 4.0",
        run_info={
            "peak_rss_mib": 1432,
            "gpu": None,
            "packages": {"torch": "2.13.0", "monai": "1.6.1"},
            "arms": [{"arm": "local", "seconds": 61.2}, {"arm": "fedavg", "weights": "ab" * 32}],
        },
    )
    assert given.digest in page.words
    assert "Data: somebody, CC BY 4.0" in page.words
    assert re.search(r"peak rss mib\s*1432", page.words)
    assert re.search(r"gpu\s*\u2014", page.words)
    assert "torch\xa02.13.0, monai\xa01.6.1" in page.words
    assert page.tables[-1] == [
        ["arm", "seconds", "weights"],
        ["local", "61.2", "\u2014"],
        ["fedavg", "\u2014", "ab" * 32],
    ]


def test_a_run_without_results_still_has_a_report(tmp_path):
    _, page = written(tmp_path, [])
    assert "No test results." in page.words
    assert "every answer of every site passed" in page.words


def test_curves_map_rounds_and_dice_linearly_onto_one_pair_of_axes():
    charts = learning_curves(
        [record(split="validation", round=n, dice=d) for n, d in ((2, 0.2), (6, 0.4), (10, 0.8))]
        + [record(split="validation", site="valley", round=2, dice=0.3)],
        ["fedavg"],
    )
    assert [chart.site for chart in charts] == ["north", "valley"]
    assert charts[0].y_ticks == charts[1].y_ticks
    (x0, y0), (x1, y1), (x2, y2) = (
        tuple(map(float, point.split(","))) for point in charts[0].lines[0].points.split()
    )
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert (y1 - y2) == pytest.approx(2 * (y0 - y1), abs=0.3)
    assert charts[0].lines[0].band == ""
    assert charts[0].lines[0].marks[2].title == "fedavg, round 10: 0.800"


def test_curves_over_seeds_are_a_mean_with_a_band():
    (chart,) = learning_curves(
        [
            record(split="validation", round=n, seed=seed, dice=0.4 + 0.2 * seed)
            for n in (1, 2)
            for seed in (0, 1)
        ],
        ["fedavg"],
    )
    (line,) = chart.lines
    assert "0.500" in line.marks[0].title
    heights = [float(point.split(",")[1]) for point in line.band.split()]
    middle = float(line.points.split()[0].split(",")[1])
    assert heights[0] == heights[1] < middle < heights[2] == heights[3]


def test_curves_without_validation_records_are_none():
    assert learning_curves([record()], ["fedavg"]) == []
    assert learning_curves([record(split="validation", dice=None)], ["fedavg"]) == []


def test_dots_stand_where_their_values_are():
    records = [
        record(arm="local", dice=0.6, dice_low=0.5, dice_high=0.8),
        record(arm="uharmony", dice=0.7),
    ]
    chart = dot_chart(site_scores(records), ["north"], ["local", "uharmony"])
    assert chart is not None
    local, uharmony = chart.rows[0].dots
    ticks = {tick.text: tick.at for tick in chart.ticks}
    assert local.x == pytest.approx(ticks["0.60"])
    assert local.low == pytest.approx(ticks["0.50"])
    assert local.high == pytest.approx(ticks["0.80"])
    assert uharmony.x == pytest.approx(ticks["0.70"])
    assert uharmony.low is None
    assert local.y < uharmony.y < chart.height
    assert dot_chart({}, ["north"], ["local"]) is None


def test_known_methods_keep_their_colour_whatever_stands_beside_them():
    alone, beside = slots(["uharmony"]), slots(["local", "mine", "uharmony", "yours"])
    assert alone["uharmony"] == beside["uharmony"]
    assert len(set(beside.values())) == 4


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.42, 0.43), (0.5, 0.5), (0.61, 0.97), (1.0, 40.0)]
)
def test_ticks_are_round_few_and_enclose_the_range(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-6
    assert ticks[-1] >= high - 1e-6
    assert 2 <= len(ticks) <= 9
    steps = {round(b - a, 9) for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1
    if high > low:
        # A round step is 1, 2 or 5 times a power of ten.
        assert f"{steps.pop():e}"[0] in "125"


def test_the_finale_is_no_round_more_and_a_second_measurement_is_said(tmp_path):
    home = [
        record(arm="uharmony", round=11, kept="whole", dice=0.7),
        record(arm="uharmony", site="valley", round=11, kept="local", dice=0.5),
    ]
    plain, _ = written(tmp_path, study=study())
    assert "<dt>rounds</dt><dd>10</dd>" in plain
    assert "once more" not in plain
    assert "nothing was chosen by it" in plain
    text, page = written(tmp_path, [*RUN, *home], study=study(finale={"steps": 3}))
    assert "<dt>rounds</dt><dd>10</dd>" in text
    assert "measured once" not in text
    assert "once more after the sites\u2019 own last steps" in page.words
