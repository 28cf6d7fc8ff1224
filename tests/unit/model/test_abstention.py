"""Abstention against distances that are computed with each patient really left out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from uharmony_model.abstention import AbstentionLimit, left_out_distances
from uharmony_model.errors import ConfigError
from uharmony_model.gate import Gate
from uharmony_model.prototypes import Prototype, prototype_of
from uharmony_model.randomness import numpy_generator


def rows() -> dict[str, np.ndarray]:
    generator = numpy_generator(0, "abstention")
    return {
        name: centre + generator.standard_normal((n, 3)) * [1, 2, 0.5]
        for name, centre, n in (("a", 0.0, 7), ("b", 4.0, 2), ("c", 4.5, 5))
    }


def by_brute_force(gate: Gate, cases: dict[str, np.ndarray], noise: dict[str, np.ndarray]):
    found = []
    for domain, values in cases.items():
        for index in range(len(values)):
            means = {
                name: (np.delete(other, index, 0) if name == domain else other).mean(0)
                + noise[name]
                for name, other in cases.items()
            }
            scaled = [(values[index] - mean) / gate.scale for mean in means.values()]
            found.append(min(np.linalg.norm(vector) for vector in scaled))
    return found


def test_each_patient_is_left_out_of_its_own_prototype():
    cases = rows()
    gate = Gate.of([prototype_of(name, values) for name, values in cases.items()])
    expected = by_brute_force(gate, cases, dict.fromkeys(cases, np.zeros(3)))
    assert left_out_distances(gate, cases) == pytest.approx(expected)
    kept_in = gate.distances(np.concatenate(list(cases.values()))).min(1)
    assert left_out_distances(gate, cases).max() > kept_in.max()


def test_the_noise_of_a_released_prototype_stays():
    cases = rows()
    noise = {name: 0.3 * value for name, value in zip(cases, np.eye(3), strict=True)}
    released = [
        Prototype(
            domain=name,
            mean=tuple((values.mean(0) + noise[name]).tolist()),
            patients=len(values),
            noise=0.3,
            epsilon=1.0,
        )
        for name, values in cases.items()
    ]
    gate = Gate.of(released)
    expected = by_brute_force(gate, cases, noise)
    assert left_out_distances(gate, cases) == pytest.approx(expected)


def test_the_limit_is_the_farthest_patient_and_a_margin():
    rule = AbstentionLimit.of([1.0, 3.0, 2.5], margin=0.2)
    assert rule.limit == pytest.approx(3.6)
    assert (rule.margin, rule.false_rate) == (0.2, 0)
    assert not rule.abstains(rule.limit)
    assert rule.abstains(np.nextafter(rule.limit, 9))
    assert rule.abstains(math.nan)


def test_nine_in_ten_patients_are_familiar():
    distances = np.arange(11, dtype=float)  # of 0 to 10 nine tenths of the way are 9
    rule = AbstentionLimit.of(distances[::-1])
    assert rule.familiar == pytest.approx(9)
    assert rule.knows(8.9)
    assert not rule.knows(9.1)
    assert not rule.knows(math.nan)
    assert AbstentionLimit(limit=1.0, margin=0.1).knows(5.0)  # nothing is said of it


@pytest.mark.parametrize(
    ("distances", "margin", "false"),
    [
        ([1.0, 3.1, 2.5], 0.2, 1),  # 3.1 > 1.2 * 2.5
        ([1.0, 3.1, 2.5], 0.25, 0),
        ([3.0, 3.0, 1.0], 0.0, 0),  # equal ones cover each other
        ([3.0, 2.9], 0.0, 1),
    ],
)
def test_false_abstentions_by_leaving_each_out(distances, margin, false):
    by_hand = sum(
        d > (1 + margin) * max(distances[:i] + distances[i + 1 :]) for i, d in enumerate(distances)
    )
    rule = AbstentionLimit.of(distances, margin=margin)
    assert rule.false_rate == by_hand / len(distances) == false / len(distances)
    assert rule.false_rate == false / len(distances)


@pytest.mark.parametrize(
    ("distances", "margin", "message"),
    [
        ([1.0], 0.1, "two or more"),
        ([1.0, math.inf], 0.1, "finite"),
        ([1.0, 2.0], -0.1, "margin is -0.1"),
        ([1.0, 2.0], math.nan, "margin is nan"),
    ],
)
def test_limits_that_are_refused(distances, margin, message):
    with pytest.raises(ConfigError, match=message):
        AbstentionLimit.of(distances, margin=margin)


def test_rows_that_cannot_be_left_out():
    gate = Gate.of([prototype_of("a", np.zeros((3, 2)))])
    with pytest.raises(ConfigError, match="two patients or more"):
        left_out_distances(gate, {"a": np.zeros((1, 2))})
    with pytest.raises(ConfigError, match="the gate has a"):
        left_out_distances(gate, {"b": np.zeros((3, 2))})
