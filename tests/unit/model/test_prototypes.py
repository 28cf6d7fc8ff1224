"""Prototypes, and the privacy of what is released, against formulas and brute force."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from uharmony_model.errors import ConfigError
from uharmony_model.prototypes import (
    MAX_RELEASED,
    Prototype,
    PublicFrame,
    clipped,
    common_scale,
    noise_deviation,
    prototype_of,
    publishable,
    release_prototype,
)
from uharmony_model.randomness import numpy_generator


def draw(n: int, d: int, *where: str) -> np.ndarray:
    return numpy_generator(0, "test", *where).standard_normal((n, d))


def released(domain: str, mean: tuple[float, ...], noise: float = 0.1) -> Prototype:
    return Prototype(domain=domain, mean=mean, patients=20, noise=noise, epsilon=1.0, delta=1e-5)


def test_a_prototype_is_the_mean_of_its_patients():
    prototype = prototype_of("a", [[1.0, 4.0], [3.0, 4.0], [8.0, 7.0]])
    assert prototype.mean == pytest.approx((4, 5))
    assert prototype.patients == 3
    assert prototype.spread == pytest.approx((9 + 1 + 16, 1 + 1 + 4))
    assert prototype.noise_norm == 0


def test_the_common_scale_is_pooled_within_domains():
    first = prototype_of("a", [[0.0, 5.0], [2.0, 5.0]])
    second = prototype_of("b", [[100.0, 5.0], [103.0, 5.0], [106.0, 5.0]])
    pooled = math.sqrt((2 + 18) / (1 + 2))
    assert common_scale([first, second]) == pytest.approx([pooled, pooled / 100])
    alone = [prototype_of("a", [[1.0]]), prototype_of("b", [[2.0]])]
    assert common_scale(alone) == pytest.approx([1.0])
    assert common_scale([released("a", (0.0,))]) == pytest.approx([1.0])
    with pytest.raises(ConfigError, match="one kind"):
        common_scale([alone[0], released("b", (0.0,))])


def test_prototypes_that_do_not_belong_together():
    with pytest.raises(ConfigError, match="all of one length"):
        common_scale([released("a", (0.0,)), released("b", (0.0, 1.0))])
    with pytest.raises(ConfigError, match="all of one length"):
        publishable([])
    with pytest.raises(ConfigError, match="each domain once"):
        publishable([released("a", (0.0,)), released("a", (1.0,))])


def test_a_private_prototype_has_noise_and_no_spread():
    with pytest.raises(ValidationError, match="noise and no spread"):
        Prototype(domain="a", mean=(0.0,), patients=20, spread=(1.0,), noise=0.1, epsilon=1)
    with pytest.raises(ValidationError, match="noise and no spread"):
        Prototype(domain="a", mean=(0.0,), patients=20, epsilon=1)
    with pytest.raises(ValidationError, match="spread has 2 numbers, mean 1"):
        Prototype(domain="a", mean=(0.0,), patients=20, spread=(1.0, 1.0))


def test_one_replaced_patient_moves_the_mean_by_no_more_than_the_sensitivity():
    """Brute force: every row replaced by every candidate, also ones far beyond the clip."""
    clip, d = 0.7, 3
    candidates = np.concatenate([draw(20, d), 1e6 * draw(20, d, "far"), np.zeros((1, d))])
    for n in (10, 17):
        rows = 2 * draw(n, d, "rows")
        rows[0] = -1e6 * np.eye(d)[0]
        candidates[-2] = 1e6 * np.eye(d)[0]  # straight against row 0
        base = clipped(rows, clip).mean(0)
        moves = []
        for index in range(n):
            for candidate in candidates:
                neighbour = rows.copy()
                neighbour[index] = candidate
                moves.append(np.linalg.norm(clipped(neighbour, clip).mean(0) - base))
        assert max(moves) <= 2 * clip / n * (1 + 1e-12)
        assert max(moves) == pytest.approx(2 * clip / n)  # the bound is reached, so it is no waste


def test_clipping_leaves_short_rows_and_directions():
    rows = np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert clipped(rows, 1.0) == pytest.approx(np.array([[0.6, 0.8], [0.3, 0.4], [0, 0]]))


def exact_delta(epsilon: float, sensitivity: float, sigma: float) -> float:
    """What a Gaussian mechanism really gives: Balle and Wang 2018, theorem 8."""
    phi = lambda t: 0.5 * math.erfc(-t / math.sqrt(2))  # noqa: E731
    half, rest = sensitivity / (2 * sigma), epsilon * sigma / sensitivity
    return phi(half - rest) - math.exp(epsilon) * phi(-half - rest)


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-9])
def test_the_deviation_keeps_the_budget(epsilon, delta):
    sigma = noise_deviation(40, epsilon=epsilon, delta=delta, clip=0.5)
    assert exact_delta(epsilon, 2 * 0.5 / 40, sigma) <= delta


def test_at_epsilon_1_half_the_deviation_would_not_keep_it():
    sigma = noise_deviation(40, epsilon=1, delta=1e-5, clip=0.5)
    assert exact_delta(1, 2 * 0.5 / 40, sigma / 2) > 1e-5


@pytest.mark.parametrize(("n", "expected"), [(156, 0.25), (500, 0.08), (50, 0.78)])
def test_the_norm_of_the_noise_at_16_numbers(n, expected):
    """sigma sqrt(d) with sigma = (2 / n) sqrt(2 ln(1.25e5)) = 9.690 / n."""
    rows = draw(n, 16)
    prototype = release_prototype("a", rows, epsilon=1, delta=1e-5)
    assert prototype.noise == pytest.approx(9.690 / n, rel=1e-3)
    assert prototype.noise_norm == pytest.approx(expected, abs=0.006)
    assert (prototype.patients, prototype.epsilon, prototype.delta) == (n, 1, 1e-5)


def test_noise_has_the_deviation_that_is_stated():
    rows, gauss = draw(20, 4), numpy_generator(0, "noise").normal
    draws = np.array(
        [
            release_prototype("a", rows, epsilon=0.5, delta=1e-4, clip=2.0, gauss=gauss).mean
            for _ in range(3000)
        ]
    )
    sigma = (2 * 2.0 / 20) * math.sqrt(2 * math.log(1.25 / 1e-4)) / 0.5
    exact = clipped(rows, 2.0).mean(0)
    # 12,000 draws: one standard error of a deviation is 0.65 %, of a mean 0.018 sigma.
    assert (draws - exact).std() == pytest.approx(sigma, rel=0.03)
    assert draws.mean(0) == pytest.approx(exact, abs=0.08 * sigma)
    correlations = np.corrcoef(draws.T)[np.triu_indices(4, k=1)]
    assert np.abs(correlations).max() < 0.08


def test_noise_is_the_system_s_and_disturbs_no_generator():
    rows = draw(20, 4)
    before = (random.getstate(), torch.get_rng_state())
    first, second = (release_prototype("a", rows, epsilon=1, delta=1e-5) for _ in range(2))
    assert first.mean != second.mean
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_what_is_released_lies_on_a_grid_that_depends_on_sigma_alone():
    prototype = release_prototype(
        "a", draw(20, 4), epsilon=1, delta=1e-5, gauss=lambda mean, _: mean
    )
    steps = np.array(prototype.mean) / 2.0 ** (math.floor(math.log2(prototype.noise)) - 10)
    np.testing.assert_array_equal(steps, np.round(steps))
    assert prototype.mean == pytest.approx(clipped(draw(20, 4), 1.0).mean(0), abs=prototype.noise)


@pytest.mark.parametrize(
    ("n", "d", "changes", "message"),
    [
        (9, 4, {}, "9 patients, expected at least 10"),
        (20, MAX_RELEASED + 1, {}, "17 numbers, expected 16 at most"),
        (20, 4, {"epsilon": 1.01}, "epsilon is 1.01"),
        (20, 4, {"epsilon": 0.0}, "epsilon is 0"),
        (20, 4, {"epsilon": math.nan}, "epsilon is nan"),
        (20, 4, {"delta": 0.0}, "delta is 0"),
        (20, 4, {"delta": 0.05}, "below 1/20"),
        (20, 4, {"clip": 0.0}, "clip is 0"),
        (20, 4, {"clip": math.inf}, "clip is inf"),
    ],
)
def test_releases_that_are_refused(n, d, changes, message):
    with pytest.raises(ConfigError, match=message):
        release_prototype("a", draw(n, d), **{"epsilon": 1.0, "delta": 1e-5, **changes})


@pytest.mark.parametrize("rows", [[1.0, 2.0], [[1.0, math.nan]], np.zeros((0, 3))])
def test_rows_that_are_no_descriptors(rows):
    with pytest.raises(ConfigError, match="one row a patient"):
        prototype_of("a", rows)


def test_noise_may_be_half_the_smallest_distance():
    """Distances 5 (true) between a and b; c is far away. Noise lengthens the square by 2 s^2 d."""

    def three(noise: float) -> list[Prototype]:
        apart = math.sqrt(25 + 2 * 2 * noise**2)
        return [
            released("a", (0.0, 0.0), noise),
            released("b", (0.0, apart), noise),
            released("c", (100.0, 0.0), noise),
        ]

    limit = 2.5 / math.sqrt(2)  # sigma sqrt(d) = 5 / 2
    assert publishable(three(0.999 * limit)) == (True, True, True)
    assert publishable(three(1.001 * limit)) == (False, False, False)
    mixed = [*three(0.1)[:2], released("c", (100.0, 0.0), 2 * limit)]
    assert publishable(mixed) == (True, True, False)
    assert publishable([released("a", (0.0,), 100.0)]) == (True,)


def test_a_public_frame_is_the_same_everywhere_and_makes_nothing_longer():
    frame = PublicFrame.of(40, seed=5, center=1.0, scale=2.0)
    again = PublicFrame.of(40, seed=5, center=1.0, scale=2.0)
    assert np.array_equal(frame.projection, again.projection)
    assert not np.array_equal(frame.projection, PublicFrame.of(40, seed=6).projection)
    np.testing.assert_allclose(frame.projection @ frame.projection.T, np.eye(16), atol=1e-12)
    rows = 1 + 2 * draw(2000, 40)  # one scale from the centre in each coordinate
    norms = np.linalg.norm(frame.rows(rows), axis=1)
    assert np.square(norms).mean() == pytest.approx(1.0, rel=0.05)
    np.testing.assert_allclose(frame.rows(rows[0]), frame.rows(rows)[0])


def test_a_frame_of_few_numbers_only_scales():
    frame = PublicFrame.of(4, seed=5, center=[1, 2, 3, 4], scale=[1, 1, 2, 2])
    np.testing.assert_allclose(frame.rows([2, 2, 5, 0]), np.array([1, 0, 1, -2]) / 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 0.0}, "scale above 0"),
        ({"center": math.nan}, "finite"),
        ({"center": [1, 2]}, "one number or 40"),
        ({"coordinates": 17}, "expected 1 to 16"),
        ({"coordinates": 0}, "expected 1 to 16"),
    ],
)
def test_frames_that_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        PublicFrame.of(40, seed=0, **changes)
