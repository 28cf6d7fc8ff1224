"""Metrics a site sends become records only when the study knows them."""

from __future__ import annotations

import pytest

from tests.support.tiny import tiny_study
from uharmony_model.errors import ExchangeError
from uharmony_server.admission import AdmittedMetrics
from uharmony_server.metrics import records_from_metrics

GOOD: dict[str, float | int | None] = {
    "test/alpha/alpha/blob/n_cases": 4,
    "test/alpha/alpha/blob/dice": 0.5,
    "test/alpha/alpha/blob/hd95_mm": None,
}


def read(values, method="uharmony", site="alpha"):
    return records_from_metrics(tiny_study(method=method), 3, AdmittedMetrics(site, values))


def test_one_record_for_each_class():
    (record,) = read(GOOD)
    assert (record.arm, record.round, record.site, record.class_) == (
        "uharmony",
        3,
        "alpha",
        "blob",
    )
    assert (record.n_cases, record.dice, record.hd95_mm) == (4, 0.5, None)


@pytest.mark.parametrize(
    "name",
    [
        "test/beta/beta/blob/dice",  # another site's
        "test/alpha/alpha/liver/dice",  # a class the study does not have
        "test/alpha/alpha/blob/age",  # no metric of ours
        "holdout/alpha/alpha/blob/dice",
        "dice",
        "test/alpha/alpha/blob/dice/more",
    ],
)
def test_unknown_names_are_refused(name):
    with pytest.raises(ExchangeError):
        read({**GOOD, name: 0.5})


@pytest.mark.parametrize(
    ("metric", "value"),
    [("dice", 1.5), ("dice", -0.1), ("n_cases", -3), ("n_cases", 2.5), ("hd95_mm", -1.0)],
)
def test_impossible_values_are_refused(metric, value):
    with pytest.raises(ExchangeError):
        read({**GOOD, f"test/alpha/alpha/blob/{metric}": value})


def test_a_withheld_domain_is_a_record_without_numbers():
    (record,) = read({"test/alpha/alpha/blob/n_cases": "<11"})
    assert (record.n_cases, record.withheld, record.dice) == ("<11", "<11", None)


@pytest.mark.parametrize(
    "values",
    [
        {"n_cases": "<11", "dice": 0.5},
        {"n_cases": "<11", "hd95_mm": 0.0},
        {"n_cases": "equal"},
        {"n_cases": 12, "dice": "<11"},
        {"n_cases": None},
    ],
)
def test_numbers_beside_a_withheld_count_are_refused(values):
    with pytest.raises(ExchangeError):
        read({f"test/alpha/alpha/blob/{k}": v for k, v in values.items()})


def test_a_metric_that_the_study_does_not_ask_for_is_refused():
    study = tiny_study(evaluation={"metrics": ["hd95_mm"]})
    for name in ("dice", "dice_low", "fp_per_case"):
        values = {"test/alpha/alpha/blob/n_cases": 12, f"test/alpha/alpha/blob/{name}": 0.5}
        with pytest.raises(ExchangeError):
            records_from_metrics(study, 3, AdmittedMetrics("alpha", values))


def test_a_count_is_needed():
    with pytest.raises(ExchangeError):
        read({"test/alpha/alpha/blob/dice": 0.5})


def test_where_cases_are_pooled_one_place_speaks_of_all_sites():
    values = {k.replace("alpha", "beta"): v for k, v in GOOD.items()}
    (record,) = read(values, method="pooled", site="pooled")
    assert record.site == "beta"
