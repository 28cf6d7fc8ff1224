"""Splits: by patient, from the split seed and the site alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uharmony_client.case_table import Case, CaseTable
from uharmony_model.errors import DataError
from uharmony_model.evaluation_settings import Evaluation

shares = st.tuples(st.floats(0, 0.45), st.floats(0, 0.45))


def make_case(name, patient, site="a", label=True, split=None):
    return Case(
        case=name,
        patient=patient,
        site=site,
        domain=site,
        image=(Path(f"{name}.nii"),),
        label=Path("l.nii") if label else None,
        split=split,
    )


def make_table(site, patients, cases_each=1):
    return CaseTable(
        cases=tuple(
            make_case(f"{site}-{p}-{c}", f"{site}-{p}", site)
            for p in range(patients)
            for c in range(cases_each)
        )
    )


def patients_in(table, split):
    return {case.patient for case in table.of(split=split).cases}


@given(st.integers(1, 40), st.integers(1, 3), shares, st.integers(0, 2**31))
def test_every_patient_is_in_one_split_and_counts_are_the_shares(patients, each, share, seed):
    evaluation = Evaluation(validation=share[0], test=share[1])
    table = make_table("a", patients, each).with_splits(evaluation, seed)
    sets = [patients_in(table, split) for split in ("train", "validation", "test")]
    assert sum(map(len, sets)) == patients == len(set.union(*sets))
    train, validation, test = map(len, sets)
    assert train >= 1
    if patients >= 3 and share[1] > 0:
        assert test >= 1
    if patients >= 4 and share[0] > 0:
        assert validation >= 1
    if patients >= 8:
        assert abs(test - share[1] * patients) <= max(0.5, 1 - share[1] * patients)
        assert abs(validation - share[0] * patients) <= max(0.5, 1 - share[0] * patients)
    if share == (0, 0):
        assert train == patients


@pytest.mark.parametrize("patients", [1, 2, 3, 4])
@pytest.mark.parametrize("share", [(0.0, 0.95), (0.95, 0.0), (0.49, 0.49)])
def test_someone_is_left_to_train_on(patients, share):
    evaluation = Evaluation(validation=share[0], test=share[1])
    table = make_table("a", patients).with_splits(evaluation, 0)
    assert len(patients_in(table, "train")) == 1


@given(st.integers(1, 20), st.integers(0, 20), st.integers(0, 1000))
def test_a_site_does_not_depend_on_other_sites_or_on_the_order(mine, others, seed):
    evaluation = Evaluation()
    alone = make_table("mine", mine).with_splits(evaluation, seed)
    together = CaseTable(
        cases=(*make_table("aa", others).cases, *reversed(make_table("mine", mine).cases))
    ).with_splits(evaluation, seed)
    assert {c.case: c.split for c in alone.cases} == {
        c.case: c.split for c in together.of(site="mine").cases
    }


def test_seed_and_site_choose_other_patients():
    def test_set(site, seed):
        table = make_table(site, 30).with_splits(Evaluation(), seed)
        return {patient.removeprefix(site) for patient in patients_in(table, "test")}

    assert test_set("a", 0) == test_set("a", 0)
    assert len({frozenset(test_set(site, seed)) for site in "abc" for seed in range(5)}) == 15


def test_every_patient_is_drawn_about_equally_often():
    counts: Counter[str] = Counter()
    for seed in range(300):
        counts.update(
            patients_in(make_table("a", 10).with_splits(Evaluation(test=0.3), seed), "test")
        )
    # 300 draws of 3 in 10: 90 expected, standard deviation 7.9
    assert all(abs(counts[f"a-{p}"] - 90) < 4 * 7.9 for p in range(10))


def test_written_splits_stay_and_half_written_ones_are_refused():
    written = [make_case("x", "x", split="test"), make_case("y", "y", split="train")]
    table = CaseTable(cases=tuple(written))
    assert table.with_splits(Evaluation(), 0) == table
    half = CaseTable(cases=(*written, make_case("z", "z")))
    with pytest.raises(DataError, match="2 of 3 labelled cases"):
        half.with_splits(Evaluation(), 0)


def test_cases_without_a_label_get_no_split():
    cases = [make_case(f"{i}", f"{i}") for i in range(5)]
    unlabelled = make_case("u", "0", label=False)
    table = CaseTable(cases=(*cases, unlabelled)).with_splits(Evaluation(), 0)
    assert table.cases[-1].split is None
    assert all(case.split for case in table.cases[:-1])


def test_a_patient_at_two_sites_is_refused():
    table = CaseTable(cases=(make_case("x", "p", "a"), make_case("y", "p", "b")))
    with pytest.raises(DataError, match="patient p is at the sites a, b"):
        table.with_splits(Evaluation(), 0)
