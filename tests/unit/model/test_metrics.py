from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from uharmony_model.metrics import (
    CaseMetrics,
    bootstrap_interval,
    dice,
    hd95_mm,
    lesion_recall_and_fp,
    measure_case,
    paired_word,
    surface_dice,
)
from uharmony_model.randomness import numpy_generator

SPACING = (0.7, 1.3, 3.0)


def _random_masks(
    seed: int, shape: tuple[int, int, int] = (5, 6, 4)
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random(shape) < 0.3, rng.random(shape) < 0.4


def _empty() -> np.ndarray:
    return np.zeros((4, 4, 4), dtype=bool)


def _dots(*voxels: tuple[int, int, int]) -> np.ndarray:
    mask = np.zeros((6, 6, 6), dtype=bool)
    for voxel in voxels:
        mask[voxel] = True
    return mask


def _surface(mask: np.ndarray) -> list[tuple[int, int, int]]:
    """Voxels of the mask with a face neighbour that is not in it, one by one."""
    voxels = {(int(i), int(j), int(k)) for i, j, k in np.argwhere(mask)}
    steps = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
    return [
        (i, j, k)
        for i, j, k in voxels
        if any((i + a, j + b, k + c) not in voxels for a, b, c in steps)
    ]


def _distances(source: np.ndarray, goal: np.ndarray, spacing: tuple[float, ...]) -> list[float]:
    """From every surface voxel of one mask to the nearest of the other, all pairs."""
    return [
        min(
            math.sqrt(sum((mm * (a - b)) ** 2 for a, b, mm in zip(p, q, spacing, strict=True)))
            for q in _surface(goal)
        )
        for p in _surface(source)
    ]


def _percentile_95(values: list[float]) -> float:
    """Linear between the order statistics at positions 0 .. n - 1."""
    ordered, position = sorted(values), 0.95 * (len(values) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


@pytest.mark.parametrize("seed", range(8))
def test_surface_metrics_against_all_pairs(seed):
    p, t = _random_masks(seed)
    there, back = _distances(p, t, SPACING), _distances(t, p, SPACING)
    for tolerance in (0.0, 0.75, 1.3, 2.0):
        within = sum(d <= tolerance + 1e-6 for d in there + back)
        expected = within / (len(there) + len(back))
        assert surface_dice(p, t, SPACING, tolerance) == pytest.approx(expected)
    expected = max(_percentile_95(there), _percentile_95(back))
    assert hd95_mm(p, t, SPACING) == pytest.approx(expected, rel=1e-5)


def test_a_shifted_plate_lies_its_shift_away():
    p, t = np.zeros((2, 9, 8, 8), dtype=bool)
    p[2], t[4] = True, True
    assert hd95_mm(p, t, (1.5, 1.0, 1.0)) == pytest.approx(3.0)
    assert surface_dice(p, t, (1.5, 1.0, 1.0), 3.0) == 1.0  # the tolerance itself is within
    assert surface_dice(p, t, (1.5, 1.0, 1.0), 2.99) == 0.0


def test_a_surface_ends_at_the_border_of_the_volume():
    full = np.ones((5, 5, 5), dtype=bool)
    inner = np.zeros_like(full)
    inner[1:4, 1:4, 1:4] = True
    # 98 voxels of the cube's outside lie 1, sqrt 2 or sqrt 3 from the inner cube's 26.
    assert surface_dice(full, inner, (1, 1, 1), 1.0) == pytest.approx((6 * 9 + 26) / (98 + 26))


def test_dice_is_its_formula():
    p, t = _random_masks(3)
    both = sum(bool(p[v] and t[v]) for v in itertools.product(*map(range, p.shape)))
    assert dice(p, t) == pytest.approx(2 * both / (p.sum() + t.sum()))
    assert dice(t, t) == 1.0


def test_undefined_is_none_and_never_a_number():
    something = _empty()
    something[1, 1, 1] = True
    assert dice(something, _empty()) is None
    assert dice(_empty(), _empty()) is None
    assert dice(_empty(), something) == 0.0
    assert surface_dice(something, _empty(), SPACING, 1.0) is None
    assert surface_dice(_empty(), _empty(), SPACING, 1.0) is None
    assert surface_dice(_empty(), something, SPACING, 1.0) == 0.0
    assert hd95_mm(something, _empty(), SPACING) is None
    assert hd95_mm(_empty(), something, SPACING) is None
    assert hd95_mm(_empty(), _empty(), SPACING) is None
    assert lesion_recall_and_fp(something, _empty()) == (None, 1)
    assert lesion_recall_and_fp(_empty(), _empty()) == (None, 0)
    assert lesion_recall_and_fp(_empty(), something) == (0.0, 0)


def test_voxels_that_touch_at_a_corner_are_one_lesion():
    truth = _dots((0, 0, 0), (1, 1, 1), (2, 2, 2))
    assert lesion_recall_and_fp(_dots((0, 0, 0)), truth) == (1.0, 0)
    apart = _dots((0, 0, 0), (2, 2, 2))
    assert lesion_recall_and_fp(_dots((0, 0, 0)), apart) == (0.5, 0)


def test_lesions_found_and_false_alarms_are_counted_by_component():
    truth = _dots((0, 0, 0), (0, 0, 3), (0, 3, 0), (5, 5, 5))
    # One prediction bridges two lesions, one lies beside a lesion without sharing a voxel, and
    # one, of two voxels touching at a corner, lies alone.
    prediction = _dots(
        (0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 4, 0), (3, 3, 3), (4, 4, 2), (5, 0, 5)
    )
    assert lesion_recall_and_fp(prediction, truth) == (0.5, 3)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_case_is_measured_class_by_class(kind):
    pairs = [_random_masks(seed, (9, 8, 7)) for seed in (5, 6)]
    empty = np.zeros_like(pairs[0][0])
    prediction = np.stack([pairs[0][0], pairs[1][0], pairs[0][0], empty])
    truth = np.stack([pairs[0][1], pairs[1][1], empty, pairs[0][1]])
    if kind == "torch":
        measured = measure_case(
            torch.from_numpy(prediction),
            torch.from_numpy(truth),
            SPACING,
            1.0,
            annotated=torch.tensor([True, False, True, True]),
        )
    else:
        flags = [True, False, True, True]
        measured = measure_case(prediction, truth, SPACING, 1.0, annotated=flags)
    recall, false_positives = lesion_recall_and_fp(*pairs[0])
    assert measured[0] == CaseMetrics(
        dice=dice(*pairs[0]),
        surface_dice=surface_dice(*pairs[0], SPACING, 1.0),
        hd95_mm=hd95_mm(*pairs[0], SPACING),
        lesion_recall=recall,
        fp_per_case=false_positives,
    )
    assert measured[1] == CaseMetrics()
    assert measured[2].dice is None
    assert measured[2].surface_dice is None
    assert measured[2].lesion_recall is None
    assert measured[2].fp_per_case == lesion_recall_and_fp(pairs[0][0], empty)[1] > 0
    assert measured[3] == CaseMetrics(
        dice=0.0, surface_dice=0.0, hd95_mm=None, lesion_recall=0.0, fp_per_case=0
    )


def test_the_quick_way_measures_dice_alone():
    p, t = _random_masks(7)
    (quick,) = measure_case(p[None], t[None], SPACING, 1.0, slow=False)
    assert quick == CaseMetrics(dice=dice(p, t))
    (nothing,) = measure_case(_empty()[None], _empty()[None], SPACING, 1.0)
    assert nothing == CaseMetrics(fp_per_case=0)


def test_the_interval_of_many_cases_is_the_normal_one():
    values = list(np.random.default_rng(0).normal(0.7, 0.1, size=400))
    mean, low, high = bootstrap_interval(values, 4000, numpy_generator(0, "bootstrap"))
    standard_error = np.std(values) / 20
    assert mean == pytest.approx(np.mean(values))
    assert low == pytest.approx(np.mean(values) - 1.96 * standard_error, abs=standard_error / 5)
    assert high == pytest.approx(np.mean(values) + 1.96 * standard_error, abs=standard_error / 5)


def test_the_interval_leaves_undefined_cases_out():
    assert bootstrap_interval([0.3], 50, numpy_generator(0)) == (0.3, 0.3, 0.3)
    assert bootstrap_interval([None, 0.3, None], 50, numpy_generator(0)) == (0.3, 0.3, 0.3)
    assert bootstrap_interval([], 50, numpy_generator(0)) == (None, None, None)
    assert bootstrap_interval([None], 50, numpy_generator(0)) == (None, None, None)


def test_the_interval_depends_on_its_generator_alone():
    values = [0.1, 0.5, 0.9, 0.7]
    first = bootstrap_interval(values, 100, numpy_generator(0, "a"))
    assert first == bootstrap_interval(values, 100, numpy_generator(0, "a"))
    assert first != bootstrap_interval(values, 100, numpy_generator(0, "b"))


@pytest.mark.parametrize(
    ("low", "high", "patients", "expected"),
    [
        (0.001, 0.05, 20, "above"),
        (0.0, 0.05, 20, "not below"),
        (-0.0099, 0.05, 20, "not below"),
        (-0.009, -0.001, 20, "below"),
        (-0.01, 0.05, 20, "undecided"),
        (-0.2, 0.2, 20, "undecided"),
        (-0.05, 0.0, 20, "undecided"),
        (-0.05, -0.001, 20, "below"),
        (0.3, 0.3, 6, "above"),
        (0.3, 0.3, 5, "undecided"),
        (-0.3, -0.2, 5, "undecided"),
        (None, None, 20, "undecided"),
    ],
)
def test_the_word_follows_from_the_interval_and_the_patients(low, high, patients, expected):
    assert paired_word(low, high, patients) == expected


def test_patients_are_drawn_with_all_of_their_cases():
    # Two patients: both the first (1/4), one each (1/2), both the second (1/4); the first has
    # three cases of 1, the second one case of 0, so the means are 1, 3/4 and 0.
    values, patients = [1.0, None, 1.0, 1.0, 0.0], ["a", "c", "a", "a", "b"]
    found = bootstrap_interval(values, 4000, numpy_generator(0, "p"), patients=patients)
    assert found == (0.75, 0.0, 1.0)
    # Drawn case by case the three ones would hardly ever be missing all at once: 1/256.
    assert bootstrap_interval(values, 4000, numpy_generator(0, "p"))[1] == 0.25


def test_with_a_case_a_patient_the_draws_are_those_of_cases():
    values, names = [0.1, 0.7, 0.4, 0.9], list("wxyz")
    by_case = bootstrap_interval(values, 500, numpy_generator(0))
    by_patient = bootstrap_interval(values, 500, numpy_generator(0), patients=names)
    assert by_patient == pytest.approx(by_case, abs=1e-12)
