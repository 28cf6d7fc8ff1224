"""The comparison's arithmetic and words, and the report's small parts, without any training."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from uharmony_client.case_table import CaseTable
from uharmony_client.evaluate import CaseRow
from uharmony_client.local_store import LocalStore
from uharmony_client.site import Site
from uharmony_client.site_report import human_bytes, read_sent
from uharmony_client.site_results import Interval, compare, evaluate_site, label_of
from uharmony_model.errors import ConfigError, StoreError
from uharmony_service.page import number, points


@pytest.fixture
def site(config, study) -> Site:
    return Site(
        config=config,
        study=study,
        table=CaseTable(cases=()),
        domains=("north",),
        volumes={},
        store=LocalStore(config.store / "generations"),
        device=torch.device("cpu"),
    )


def rows(values: dict[str, tuple[float | None, ...]]) -> list[CaseRow]:
    """Dice by case, of the classes edema and core."""
    return [
        CaseRow(case, case, "north", "north", "test", 1, name, dice, None, None, None, None)
        for case, dices in values.items()
        for name, dice in zip(("edema", "core"), dices, strict=False)
    ]


def compared(site, federated, alone):
    where = site.config.store
    return compare(site, rows(federated), rows(alone), round_=3, federated_model=where)


def test_cases_are_paired_by_name_whatever_their_order(site):
    federated = {"a": (0.9, 0.5), "b": (0.6, 0.7), "c": (0.4, 0.8)}
    alone = {"c": (0.3, 0.7), "a": (0.8, 0.4), "b": (0.5, 0.6)}
    found = compared(site, federated, alone)
    # Every difference is 0.1, so every resample's mean is.
    for comparison in (*found.classes, found.overall):
        difference = comparison.difference
        assert difference.mean == pytest.approx(0.1)
        assert (difference.low, difference.high) == pytest.approx((0.1, 0.1))
        assert (difference.n, difference.patients) == (3, 3)
        assert comparison.word == "undecided"  # three patients decide nothing
    assert [c.name for c in found.classes] == ["edema", "core"]
    assert found.classes[0].federated.mean == pytest.approx((0.9 + 0.6 + 0.4) / 3)
    assert found.classes[1].alone.mean == pytest.approx((0.7 + 0.4 + 0.6) / 3)
    # worst first under the federated model: c 0.6, b 0.65, a 0.7
    assert [p.case for p in found.cases] == ["c", "b", "a"]
    assert [p.federated for p in found.cases] == pytest.approx([0.6, 0.65, 0.7])


def test_two_cases_give_the_interval_between_them(site):
    # Resamples of two are both the first (1/4), mixed (1/2), both the second (1/4).
    found = compared(site, {"a": (0.9,), "b": (0.5,)}, {"a": (0.5,), "b": (0.6,)})
    difference = found.overall.difference
    assert (difference.low, difference.mean, difference.high) == pytest.approx((-0.1, 0.15, 0.4))
    assert found.overall.word == "undecided"


def test_what_is_undefined_in_either_model_is_left_out(site):
    federated = {"a": (0.9, None), "b": (0.6, 0.7), "c": (None, None)}
    alone = {"a": (0.8, None), "b": (None, 0.5), "c": (None, None)}
    found = compared(site, federated, alone)
    edema, core = found.classes
    assert (edema.difference.n, edema.federated.n, edema.alone.n) == (1, 1, 1)
    assert edema.federated.mean == 0.9
    assert edema.word == "undecided"
    assert core.difference.mean == pytest.approx(0.2)
    assert [p.case for p in found.cases] == ["b", "a"]
    # Case b counts by the class that both models have.
    assert found.cases[0].federated == 0.7
    nothing = compared(site, {"c": (None, None)}, {"c": (None, None)})
    assert nothing.cases == ()
    assert nothing.overall.difference == Interval(None, None, None, 0, 0)


def test_equal_models_are_not_below(site):
    values = {name: (0.1 * i, 0.5) for i, name in enumerate("abcdefgh")}
    found = compared(site, values, values)
    assert found.overall.word == "not below"
    assert found.overall.difference.mean == 0


def test_the_same_rows_give_the_same_intervals(site):
    federated = {name: (0.1 * i, 0.5) for i, name in enumerate("abcdef")}
    alone = {name: (0.4, 0.1 * i) for i, name in enumerate("abcdef")}
    assert compared(site, federated, alone) == compared(site, federated, alone)


def test_cases_of_few_patients_decide_nothing(site):
    """Eight cases, each 0.1 better: of eight patients that is above, of five it is undecided."""
    better: dict[str, tuple[float | None, ...]] = dict.fromkeys("abcdefgh", (0.6, 0.6))
    worse: dict[str, tuple[float | None, ...]] = dict.fromkeys("abcdefgh", (0.5, 0.5))
    found = compared(site, better, worse).overall
    assert (found.difference.n, found.difference.patients, found.word) == (8, 8, "above")
    whose = dict(zip("abcdefgh", "12345555", strict=True))
    few = [dataclasses.replace(row, patient=whose[row.case]) for row in rows(better)]
    where = site.config.store
    found = compare(site, few, rows(worse), round_=3, federated_model=where).overall
    assert (found.difference.n, found.difference.patients, found.word) == (8, 5, "undecided")


def test_the_column_says_what_the_site_kept():
    assert label_of("federated") == "federated"
    assert "whole" in label_of("whole")
    assert "federated" not in label_of("local")


def test_rows_of_different_cases_are_not_compared(site):
    with pytest.raises(StoreError, match="different cases"):
        compared(site, {"a": (0.5, 0.5)}, {"b": (0.5, 0.5)})


def test_a_missing_or_damaged_model_is_told_apart(site, tmp_path):
    with pytest.raises(ConfigError, match="kept after the last round"):
        evaluate_site(site, tmp_path / "nothing")
    (tmp_path / "round.json").write_text("{")
    with pytest.raises(StoreError, match="not readable"):
        evaluate_site(site, tmp_path)
    (tmp_path / "round.json").write_text('{"round": -1}')
    with pytest.raises(ConfigError, match="round"):
        evaluate_site(site, tmp_path)


# --- the report's parts ------------------------------------------------------------------------


def test_points_have_a_sign_and_zero_has_none():
    texts = {0.0123: "+1.2", -0.0123: "\u22121.2", 0.0001: "0.0", -0.0004: "0.0", None: "\u2014"}
    assert {value: points(value) for value in texts} == texts


def test_sizes_and_numbers():
    sizes = {0: "0 bytes", 999: "999 bytes", 1000: "1.0 kB", 120_000_000: "120.0 MB"}
    assert {count: human_bytes(count) for count in sizes} == sizes
    assert human_bytes(10**16) == "10000.0 TB"
    assert (number(0.12345, 3), number(None, 3)) == ("0.123", "\u2014")


def test_a_ledger_is_added_up_by_study_and_bad_lines_are_counted(tmp_path):
    entries = [
        {"study": "s", "kind": "update", "bytes": 1000},
        {"study": "s", "kind": "update", "bytes": 1000},
        {"study": "s", "kind": "metrics", "bytes": 30},
        {"study": "other", "kind": "update", "bytes": 5},
    ]
    bad = [b"{", b"[]", b"7", b'{"study": "s"}', b"\xff\xfe", b"[" * 100_000,
           b'{"study": "s", "kind": "update", "bytes": "1"}',
           b'{"study": "s", "kind": "update", "bytes": true}']  # fmt: skip
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b"\n".join([*(json.dumps(e).encode() for e in entries), *bad]))
    sent = read_sent(path, "s")
    assert sent is not None
    assert (sent.messages, sent.bytes, sent.unreadable) == (3, 2030, len(bad))
    assert dict(sent.kinds) == {"update": 2, "metrics": 1}
    assert read_sent(tmp_path / "absent", "s") is None
