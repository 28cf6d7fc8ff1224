from __future__ import annotations

import pytest
import torch

from uharmony_model.errors import ConfigError
from uharmony_model.targets import (
    annotated_classes,
    class_index,
    merge_unannotated,
    to_label,
    to_masks,
    to_targets,
)
from uharmony_model.task import Task

INTENSITY = {"t1": {"policy": "zscore"}}
EXCLUSIVE = Task.model_validate(
    {"classes": {"liver": [4, 9], "spleen": 2, "kidney": 7}, "intensity": INTENSITY}
)
OVERLAPPING = Task.model_validate(
    {
        "classes": {"whole": [1, 2, 4], "core": [1, 4], "enhancing": 4},
        "overlapping": True,
        "intensity": INTENSITY,
    }
)


def _row(values: list[float] | list[int], dtype: torch.dtype) -> torch.Tensor:
    """One sample whose voxels lie along the last axis: (1, 1, 1, n)."""
    return torch.tensor(values, dtype=dtype)[None, None, None]


def _logits(probabilities: list[float]) -> torch.Tensor:
    """Logits (1, J', 1, 1, 1) with this softmax."""
    return torch.tensor(probabilities).log()[None, :, None, None, None]


def test_each_class_is_the_union_of_its_label_values():
    label = _row([0, 2, 4, 7, 9, 1], torch.uint8)
    masks = to_targets(label, EXCLUSIVE)
    assert masks.shape == (1, 3, 1, 1, 6)
    assert masks.dtype == torch.bool
    assert masks[0, :, 0, 0].int().tolist() == [
        [0, 0, 1, 0, 1, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
    ]


def test_overlapping_classes_share_voxels():
    masks = to_targets(_row([0, 1, 2, 4], torch.uint8), OVERLAPPING)
    assert masks[0, :, 0, 0].int().tolist() == [[0, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]]


def test_an_unannotated_class_is_no_channel_of_its_own():
    label = _row([0, 2, 4, 7, 9], torch.uint8)
    assert class_index(label, EXCLUSIVE).flatten().tolist() == [0, 2, 1, 3, 1]
    assert class_index(label, EXCLUSIVE, [True, False, True]).flatten().tolist() == [0, 0, 1, 2, 1]


def test_merging_adds_probabilities():
    logits = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64, generator=_generator())
    p = logits.softmax(dim=1)
    merged = merge_unannotated(logits, [1]).softmax(dim=1)
    expected = torch.stack((p[:, 0] + p[:, 1] + p[:, 3], p[:, 2]), dim=1)
    torch.testing.assert_close(merged, expected)


def test_merging_changes_nothing_when_all_are_annotated():
    logits = torch.randn(1, 4, 2, 2, 2, generator=_generator())
    assert merge_unannotated(logits, [0, 1, 2]) is logits


def test_the_most_probable_class_wins():
    masks = to_masks(_logits([0.3, 0.4, 0.2, 0.1]), EXCLUSIVE)
    assert masks.flatten().tolist() == [True, False, False]
    assert not to_masks(_logits([0.4, 0.3, 0.2, 0.1]), EXCLUSIVE).any()


def test_unannotated_probability_counts_as_background_where_asked():
    logits = _logits([0.3, 0.4, 0.2, 0.1])
    # Background and spleen together have 0.5, more than the liver's 0.4.
    assert not to_masks(logits, EXCLUSIVE, [True, False, True]).any()
    assert to_label(logits, EXCLUSIVE).item() == 4
    assert to_label(logits, EXCLUSIVE, torch.tensor([True, False, True])).item() == 0


def test_overlapping_masks_are_probabilities_above_one_half():
    logits = torch.tensor([0.1, -0.1, 3.0])[None, :, None, None, None]
    assert to_masks(logits, OVERLAPPING).flatten().tolist() == [True, False, True]
    kept = to_masks(logits, OVERLAPPING, [False, True, True])
    assert kept.flatten().tolist() == [False, False, True]


def test_a_predicted_map_holds_each_class_by_its_first_value():
    logits = torch.eye(4).T.reshape(1, 4, 1, 1, 4) * 5
    label = to_label(logits, EXCLUSIVE)
    assert label.dtype == torch.uint8
    assert label.flatten().tolist() == [0, 4, 2, 7]
    without_spleen = to_label(logits, EXCLUSIVE, [True, False, True])
    assert without_spleen.flatten().tolist() == [0, 4, 0, 7]


def test_masks_and_map_agree():
    logits = torch.randn(2, 4, 3, 4, 5, generator=_generator())
    for annotated in (None, [True, False, True], [False, True, False]):
        masks = to_masks(logits, EXCLUSIVE, annotated)
        assert torch.equal(masks, to_targets(to_label(logits, EXCLUSIVE, annotated), EXCLUSIVE))


def test_overlapping_classes_have_no_single_map():
    with pytest.raises(ConfigError, match=r"to_label needs exclusive.*whole, core, enhancing"):
        to_label(torch.zeros(1, 3, 1, 1, 1), OVERLAPPING)
    with pytest.raises(ConfigError, match="class_index needs exclusive"):
        class_index(torch.zeros(1, 1, 1, 1, dtype=torch.uint8), OVERLAPPING)


def test_one_flag_for_each_class():
    assert annotated_classes(torch.tensor([1, 0, 1]), EXCLUSIVE) == [0, 2]
    assert annotated_classes(None, EXCLUSIVE) == [0, 1, 2]
    with pytest.raises(ConfigError, match="2 flags, expected one for each of the 3 classes"):
        annotated_classes([True, False], EXCLUSIVE)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
