"""Style clusters against a slow search, and the gates before anything of them leaves."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from uharmony_model.alignment.style_codes import (
    CENTROIDS,
    SPREAD,
    StyleCodes,
    check_codes,
    code_schema,
    k_means,
    sample_code,
    style_around,
    style_codes,
)
from uharmony_model.errors import ConfigError, ExchangeError
from uharmony_model.randomness import numpy_generator


def generator(*where: str) -> np.random.Generator:
    return numpy_generator(0, "test", *where)


def around(centre: float, n: int, *where: str) -> np.ndarray:
    return centre + 0.1 * generator(*where).standard_normal((n, 8))


def names(first: int, last: int) -> list[str]:
    return [f"p{number}" for number in range(first, last)]


def test_k_means_finds_the_best_parting_of_a_few_points():
    points = np.array([0.0, 0.3, 0.5, 4.0, 4.4, 9.0, 9.1])[:, None]

    def cost(chosen: np.ndarray) -> float:
        return sum(
            float(np.square(points[chosen == k] - points[chosen == k].mean()).sum())
            for k in set(chosen.tolist())
        )

    best = min(cost(np.array(way)) for way in itertools.product(range(3), repeat=len(points)))
    chosen = k_means(points, np.ones(len(points)), 3, generator())
    assert cost(chosen) == pytest.approx(best)


def test_fewer_different_codes_than_clusters():
    chosen = k_means(np.array([[0.0], [0.0], [1.0]]), np.ones(3), 6, generator())
    assert chosen[0] == chosen[1] != chosen[2]


def test_centroid_and_spread_count_each_patient_once():
    codes = np.array([[0.0, 1.0]] * 8 + [[2.0, 1.0], [4.0, 1.0]])
    found = style_codes(codes, ["a"] * 8 + ["b", "b"], generator(), clusters=1, min_patients=2)
    assert found.centroids[0] == pytest.approx([1.5, 1.0])
    assert found.spread[0] == pytest.approx([((1.5**2) / 2 + (0.5**2 + 2.5**2) / 4) ** 0.5, 0])


def test_two_styles_give_two_centroids():
    codes = np.concatenate((around(0, 30, "a"), around(5, 30, "b")))
    found = style_codes(codes, names(0, 60), generator(), clusters=2)
    assert found.centroids == pytest.approx(np.array([[0.0] * 8, [5.0] * 8]), abs=0.1)
    assert found.spread == pytest.approx(np.full((2, 8), 0.1), abs=0.05)


def test_a_cluster_of_few_patients_is_not_given():
    few = np.concatenate((around(0, 30, "a"), around(5, 40, "b")))
    four = names(0, 30) + [f"rare{number % 4}" for number in range(40)]
    found = style_codes(few, four, generator(), clusters=2)
    assert len(found.centroids) == len(found.spread) == 1
    assert found.centroids[0] == pytest.approx(np.zeros(8), abs=0.1)
    five = names(0, 30) + [f"rare{number % 5}" for number in range(40)]
    assert len(style_codes(few, five, generator(), clusters=2).centroids) == 2
    with pytest.raises(ConfigError, match="no style cluster of 4 patients has 5"):
        style_codes(few[30:], four[30:], generator())


def test_equal_generators_give_equal_styles():
    codes = generator("codes").standard_normal((80, 8))
    first, second = (style_codes(codes, names(0, 80), generator()) for _ in range(2))
    assert np.array_equal(first.centroids, second.centroids)
    assert np.array_equal(first.spread, second.spread)


def test_codes_that_cannot_be_clustered():
    with pytest.raises(ConfigError, match="a patient each"):
        style_codes(np.zeros((3, 8)), names(0, 2), generator())
    with pytest.raises(ConfigError, match="finite codes"):
        style_codes(np.full((3, 8), np.nan), names(0, 3), generator())
    with pytest.raises(ConfigError, match="0 clusters"):
        style_codes(np.zeros((3, 8)), names(0, 3), generator(), clusters=0)


def test_drawn_codes_lie_about_the_centroids():
    centroids, spread = np.array([[0.0] * 8, [10.0] * 8]), np.full((2, 8), 0.5)
    draw = generator()
    drawn = torch.stack([sample_code(centroids, spread, draw) for _ in range(400)])
    assert drawn.dtype == torch.float32
    second = drawn[:, 0] > 5
    assert 0.4 < second.float().mean() < 0.6
    assert (drawn[second] - 10).abs().max() <= 1.0
    assert (drawn[~second]).std() == pytest.approx(0.5 * 0.96, abs=0.03)  # cut off at 2
    exact = sample_code(centroids, spread, generator(), scale=0.0)
    assert exact.tolist() in centroids.tolist()
    with pytest.raises(ConfigError, match="expected"):
        sample_code(centroids, spread[:1], draw)


def test_the_style_around_all_others_holds_within_and_between():
    first = StyleCodes(np.array([[0.0], [2.0]]), np.array([[1.0], [1.0]]))
    second = StyleCodes(np.array([[5.0]]), np.array([[3.0]]))
    both = style_around([first, second])
    assert both.centroids == pytest.approx(np.array([[3.0]]))
    within_first = (1 + 9 + 1 + 1) / 2
    assert both.spread == pytest.approx(np.array([[((within_first + 9 + 4) / 2) ** 0.5]]))
    with pytest.raises(ConfigError, match="no site gave"):
        style_around([])


def test_what_is_shared_has_no_axis_of_space_and_tells_no_count_of_slices():
    codes = around(0, 200, "a")
    patients = [f"p{number % 20}" for number in range(200)]
    found = style_codes(codes, patients, generator(), clusters=1)
    state = found.state()
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        CENTROIDS: (1, 8),
        SPREAD: (1, 8),
    }
    assert code_schema(1, 8).numel == 16
    back = check_codes(state, 1, 8)
    assert back.centroids == pytest.approx(found.centroids, abs=1e-6)
    assert back.spread == pytest.approx(found.spread, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (CENTROIDS, torch.full((2, 8), torch.nan), "centroid is not finite"),
        (CENTROIDS, torch.full((2, 8), 2000.0), "beyond 1000"),
        (SPREAD, torch.full((2, 8), -0.1), "spread is not finite, negative"),
        (SPREAD, torch.full((2, 8), torch.nan), "spread is not finite"),
        (SPREAD, torch.full((2, 8), torch.inf), "spread is not finite"),
        (SPREAD, torch.zeros(3, 8), "expected style_centroids"),
        ("slices", torch.zeros(2, 8), "expected style_centroids"),
    ],
)
def test_received_styles_are_checked(name: str, value: torch.Tensor, words: str):
    good = {CENTROIDS: torch.zeros(2, 8), SPREAD: torch.zeros(2, 8)}
    check_codes(good, 2, 8)
    with pytest.raises(ExchangeError, match=words):
        check_codes({**good, name: value}, 2, 8)


@pytest.mark.parametrize("clusters", [0, -1, 65])
def test_the_senders_number_of_clusters_is_bounded(clusters: int):
    with pytest.raises(ExchangeError, match="style clusters, expected 1 to 64"):
        code_schema(clusters, 8)
