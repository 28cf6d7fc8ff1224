"""The gate by hand, on one axis."""

from __future__ import annotations

import math

import numpy as np
import pytest

from uharmony_model.errors import ConfigError, DataError
from uharmony_model.gate import SHARPNESS, Gate, default_temperature
from uharmony_model.prototypes import Prototype, prototype_of


def at(domain: str, *mean: float) -> Prototype:
    return Prototype(domain=domain, mean=mean, patients=20, noise=0.1, epsilon=1.0)


def test_weights_and_distances_by_hand():
    gate = Gate.of([at("a", 0.0), at("b", 2.0), at("c", 5.0)], temperature=2.0)
    choice = gate.choose([1.0])
    exponents = [math.exp(-1 / 2), math.exp(-1 / 2), math.exp(-16 / 2)]
    assert choice.weights == pytest.approx([e / sum(exponents) for e in exponents])
    assert choice.distances == pytest.approx([1, 1, 4])
    assert choice.domains == ("a", "b", "c")
    assert (choice.nearest, choice.distance) == ("a", 1.0)


def test_nearest_gives_all_to_one_domain():
    gate = Gate.of([at("a", 0.0, 0.0), at("b", 2.0, 0.0)])
    choice = gate.choose([1.5, 3.0], "nearest")
    assert choice.weights.tolist() == [0, 1]
    assert choice.nearest == "b"
    assert choice.distance == pytest.approx(math.hypot(0.5, 3))


def test_the_default_temperature_is_the_median_squared_distance_over_four():
    points = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])  # squares 25, 1, 18
    assert default_temperature(points) == 18 / SHARPNESS
    assert default_temperature(points[:1]) == 1.0
    assert default_temperature(np.zeros((3, 2))) == 1.0
    # At one of two prototypes, whatever their distance, the other weighs e^-4.
    weights = Gate.of([at("a", 0.0), at("b", 7.0)]).choose([7.0]).weights
    assert weights[0] / weights[1] == pytest.approx(math.exp(-4))


def test_distances_are_in_units_of_the_common_scale():
    first = prototype_of("a", [[-1.0, 0.0], [1.0, 20.0]])  # spread 2 and 200
    second = prototype_of("b", [[9.0, 0.0], [11.0, 20.0]])
    gate = Gate.of([first, second])
    assert gate.scale == pytest.approx([math.sqrt(2), math.sqrt(200)])
    assert gate.distances([0.0, 30.0]) == pytest.approx(
        [20 / math.sqrt(200), math.sqrt(100 / 2 + 400 / 200)]
    )
    assert gate.temperature == pytest.approx((100 / 2) / 4)


def test_a_volume_far_from_all_still_has_weights():
    choice = Gate.of([at("a", 0.0), at("b", 1.0)]).choose([1e6])
    assert choice.weights == pytest.approx([0, 1])
    assert Gate.of([at("a", 0.0)]).choose([1e6]).weights.tolist() == [1.0]


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperatures_that_are_refused(temperature):
    with pytest.raises(ConfigError, match="temperature is"):
        Gate.of([at("a", 0.0)], temperature=temperature)


@pytest.mark.parametrize("descriptor", [[1.0], [1.0, math.nan], 1.0])
def test_descriptors_that_do_not_fit(descriptor):
    with pytest.raises(DataError, match="expected 2 finite numbers"):
        Gate.of([at("a", 0.0, 0.0)]).choose(descriptor)
