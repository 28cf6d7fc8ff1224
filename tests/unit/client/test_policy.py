"""What a site allows: every thing a study asks for beyond it is named, and the gate looks again."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tests.support.tiny import tiny_study
from uharmony_client.policy import (
    Policy,
    allowed_values,
    differences,
    require_allowed,
    shared_parts,
)
from uharmony_model.errors import ConfigError, ExchangeError
from uharmony_model.methods import METHODS, RESIDUALS, Part


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"uharmony-averaged"}))
def test_the_default_policy_allows_every_method_and_never_a_residual(method):
    study = tiny_study(method=method)
    assert differences(Policy(), study) == []
    assert not RESIDUALS & set(shared_parts(study))


def test_no_policy_allows_the_control_that_averages_residuals():
    lines = differences(Policy(), tiny_study(method="uharmony-averaged"))
    assert [line.split()[3].rstrip(",") for line in lines] == [
        "phi",
        "stem_residual",
        "depthwise_residual",
    ]


def test_the_parts_that_methods_share():
    assert shared_parts(tiny_study(method="local")) == ()
    assert shared_parts(tiny_study(method="fedbn")) == (Part.BACKBONE,)
    plain = (Part.BACKBONE, Part.NORM_AFFINE)
    assert shared_parts(tiny_study(method="fedavg")) == plain
    assert shared_parts(tiny_study(method="fedavg-bn")) == (*plain, Part.NORM_STATISTICS)
    assert shared_parts(tiny_study(method="silobn")) == plain
    assert shared_parts(tiny_study(method="gperxan")) == (Part.BACKBONE,)
    assert shared_parts(tiny_study(method="u2net")) == (Part.BACKBONE,)
    assert shared_parts(tiny_study(method="uharmony")) == (Part.BACKBONE, Part.POLYNOMIAL)


def test_each_thing_beyond_the_policy_has_a_line_of_its_own():
    policy = Policy(share=(Part.BACKBONE,), metrics=("dice", "loss"))
    lines = differences(
        policy, tiny_study(method="fedavg-bn", evaluation={"metrics": ["dice", "hd95_mm"]})
    )
    named = ("norm_affine", "norm_statistics", "hd95_mm", "cases")
    assert len(lines) == len(named)
    assert all(word in line for word, line in zip(named, lines, strict=True))


def test_a_study_that_asks_less_passes_a_narrow_policy():
    policy = Policy(share=(Part.BACKBONE,), metrics=("dice", "loss"))
    study = tiny_study(
        method="fedbn", federation={"weighting": "equal"}, evaluation={"metrics": ["dice"]}
    )
    require_allowed(policy, study)
    asks_cases = tiny_study(method="fedbn", evaluation={"metrics": ["dice"]})
    with pytest.raises(ConfigError, match="cases") as refused:
        require_allowed(policy, asks_cases)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "content",
    [
        {"share": ["phi"]},
        {"share": ["stem_residual"]},
        {"share": ["backbone", "backbone"]},
        {"metrics": ["age"]},
        {"metrics": ["dice", "dice"]},
        {"min_cases": 0},
        {"min_cases": 10_000},
        {"allow": True},
    ],
)
def test_a_policy_that_cannot_be_is_refused(content):
    with pytest.raises(ValidationError):
        Policy.model_validate(content)


NARROW = Policy(metrics=("dice",))


@pytest.mark.parametrize(
    "values",
    [
        {"test/a/a/blob/dice": 0.5, "test/a/a/blob/dice_low": 0.4, "test/a/a/blob/n_cases": 12},
        {"cases": "equal", "loss": None},
        {},
    ],
)
def test_allowed_values_pass_as_they_are(values):
    assert allowed_values(values, NARROW) is values


@pytest.mark.parametrize(
    "values",
    [
        {"cases": 12},
        {"loss": 0.5},
        {"test/a/a/blob/hd95_mm": 1.0},
        {"test/a/a/blob/age": 1.0},
        {"patient-name": 1},
        {"dice": 0.5},
        {"test/a/a/blob/extra/dice": 0.5},
        {"test/a/a/blob/dice": 0.5, "phi": 0.1},
    ],
)
def test_any_other_value_stops_the_message(values):
    with pytest.raises(ExchangeError, match="may not leave"):
        allowed_values(values, NARROW)


def test_the_intervals_of_dice_leave_only_with_dice():
    with pytest.raises(ExchangeError):
        allowed_values({"test/a/a/blob/dice_low": 0.4}, Policy(metrics=("hd95_mm",)))
