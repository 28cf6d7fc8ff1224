"""Which candidate is kept, by either rule."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uharmony_client.finale_choice import choose, clearly, mean
from uharmony_model.training_settings import Candidate

Scores = dict[Candidate, dict[str, float]]


def cases(*dice: float) -> dict[str, float]:
    return {f"case-{i}": value for i, value in enumerate(dice)}


def test_best_takes_the_highest_mean_and_clear_only_what_exceeds_its_standard_error():
    dice: Scores = {
        "federated": cases(0.50, 0.60),
        "whole": cases(0.58, 0.54),  # +0.01 on average, deviation 0.14 / sqrt(2)
        "local": cases(0.10, 0.20),
    }
    assert choose(dice, "best") == "whole"
    assert choose(dice, "clear") == "federated"
    surely: Scores = {**dice, "between": cases(0.51, 0.611)}  # +0.0105, standard error 0.0005
    assert choose(surely, "clear") == "between"
    assert choose(surely, "best") == "between"


def test_one_case_is_never_clear():
    dice: Scores = {"federated": cases(0.1), "local": cases(0.9)}
    assert choose(dice, "clear") == "federated"
    assert choose(dice, "best") == "local"


@pytest.mark.parametrize("rule", ["best", "clear"])
def test_without_validation_cases_the_one_trained_on_most_is_kept(rule):
    assert choose({"federated": {}, "whole": {}, "local": {}}, rule) == "whole"
    assert choose({"federated": {}, "local": {}}, rule) == "federated"


def test_where_the_federated_model_is_no_candidate_both_rules_are_one():
    dice: Scores = {"whole": cases(0.4, 0.5), "local": cases(0.41, 0.5)}
    assert choose(dice, "clear") == choose(dice, "best") == "local"


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8))
def test_clearly_is_the_t_statistic_above_one(pairs):
    better, reference = cases(*(b for b, _ in pairs)), cases(*(r for _, r in pairs))
    found = [b - r for b, r in pairs]
    middle = math.fsum(found) / len(found)
    error = math.sqrt(math.fsum((d - middle) ** 2 for d in found) / (len(found) - 1) / len(found))
    if abs(middle - error) > 1e-12:
        assert clearly(better, reference) == (middle > error)


def test_the_mean_of_nothing_is_none():
    assert mean({}) is None
    assert mean(cases(0.25, 0.75)) == 0.5
