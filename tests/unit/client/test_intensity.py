from __future__ import annotations

import numpy as np
import pytest

from uharmony_client.intensity import apply_intensity
from uharmony_model.task import Percentile, Suv, Window, ZScore


def applied(values, policy):
    channel = np.array(values, dtype=np.float32).reshape(-1, 1, 1)
    apply_intensity(channel, policy)
    return channel.ravel()


def test_window_clips_and_maps_to_minus_one_and_one():
    policy = Window(policy="window", low=-160, high=240)
    expected = [-1, -1, (40 - 40) / 200, (140 - 40) / 200, 1, 1]
    np.testing.assert_allclose(applied([-1000, -160, 40, 140, 240, 3000], policy), expected)


def test_suv_has_zero_at_the_bottom():
    expected = [-1, -1, 0, 1, 1]
    np.testing.assert_allclose(applied([-2, 0, 5, 10, 50], Suv(policy="suv", high=10)), expected)


def test_percentile_uses_the_volumes_own_percentiles():
    policy = Percentile(policy="percentile", low=10, high=90)
    values = np.arange(101.0)  # percentile q is q
    expected = np.clip((values - 50) / 40, -1, 1)
    np.testing.assert_allclose(applied(values, policy), expected, atol=1e-6)


def test_rounding_does_not_leave_the_range():
    values = np.random.default_rng(0).lognormal(5, 1, 10_000)
    for high in (90, 97.3, 99.5):
        result = applied(values, Percentile(policy="percentile", low=0.7, high=high))
        assert -1 <= result.min() < -0.999999
        assert 0.999999 < result.max() <= 1


def test_percentile_of_a_nearly_constant_volume_uses_its_range():
    policy = Percentile(policy="percentile", low=10, high=90)
    result = applied([0] * 99 + [4], policy)
    np.testing.assert_allclose(result, [-1] * 99 + [1])


def test_zscore_over_all_voxels():
    values = [0.0, 2.0, 4.0, 6.0]
    expected = (np.array(values) - 3) / np.sqrt(5)
    np.testing.assert_allclose(applied(values, ZScore(policy="zscore")), expected, rtol=1e-6)


def test_zscore_over_nonzero_voxels_leaves_zeros():
    result = applied([0.0, 2.0, 0.0, 6.0], ZScore(policy="zscore", nonzero=True))
    np.testing.assert_allclose(result, [0, -1, 0, 1], rtol=1e-6)


def test_zscore_of_a_small_object_in_much_air():
    values = np.concatenate([np.zeros(10_000), np.tile([4999.0, 5001.0], 50)])
    result = applied(values, ZScore(policy="zscore", nonzero=True))
    np.testing.assert_allclose(result[-2:], [-1, 1], rtol=1e-3)
    assert not result[:-100].any()


@pytest.mark.parametrize("nonzero", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e6, -3.7])
def test_zscore_of_one_value_is_zero_not_nan(value, nonzero):
    result = applied([value] * 1001, ZScore(policy="zscore", nonzero=nonzero))
    np.testing.assert_allclose(result, 0, atol=1e-6 * abs(value))


def test_zscore_is_exact_far_from_zero():
    """float32 sums would lose the deviation of 1 around 1e5."""
    values = 1e5 + np.tile([-1.0, 1.0], 50_000)
    result = applied(values, ZScore(policy="zscore"))
    np.testing.assert_allclose(result[:2], [-1, 1], atol=1e-2)
