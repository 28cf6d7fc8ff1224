from __future__ import annotations

import itertools

import pytest
import torch

from uharmony_model.errors import ConfigError
from uharmony_model.targets import to_targets
from uharmony_model.task import Task
from uharmony_model.unlabelled.pseudo_label import (
    PseudoLabel,
    agreeing,
    known,
    pasted,
    pseudo_label,
)

INTENSITY = {"ct": {"policy": "window"}}
EXCLUSIVE = Task.model_validate({"classes": {"liver": [4, 9], "spleen": 2}, "intensity": INTENSITY})
OVERLAPPING = Task.model_validate(
    {
        "classes": {"whole": [1, 2, 4], "core": [1, 4]},
        "overlapping": True,
        "intensity": INTENSITY,
    }
)
ONE_CLASS = Task.model_validate({"classes": {"tumour": 1}, "intensity": INTENSITY})
SPACE = (2, 3, 2)


def _exclusive_logits(*probabilities: tuple[float, ...]) -> torch.Tensor:
    """Logits (1, C, 1, 1, W) of W voxels with the given probabilities of C channels."""
    return torch.tensor(probabilities).log().T[None, :, None, None, :]


def _random(task: Task, seed: int, batch: int = 2) -> PseudoLabel:
    generator = torch.Generator().manual_seed(seed)
    channels = (len(task.classes),) if task.overlapping else ()
    shape = (batch, *channels, *SPACE)
    label = torch.randint(2 if task.overlapping else task.outputs, shape, generator=generator)
    label = label.bool() if task.overlapping else label
    return PseudoLabel(label, torch.rand(shape, generator=generator) < 0.6)


def _box(seed: int, shape: tuple[int, ...] = (2, *SPACE)) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def _voxels(label: torch.Tensor) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(extent) for extent in label.shape)))


def test_exclusive_label_is_the_most_probable_channel_where_it_is_probable_enough():
    logits = _exclusive_logits((0.96, 0.03, 0.01), (0.02, 0.94, 0.04), (0.01, 0.02, 0.97))
    made = pseudo_label(logits, EXCLUSIVE)
    assert made.label.dtype == torch.int64
    assert made.label.tolist() == [[[[0, 1, 2]]]]
    assert made.certain.tolist() == [[[[True, False, True]]]]
    assert pseudo_label(logits, EXCLUSIVE, threshold=0.9).certain.all()
    assert made.share == pytest.approx(2 / 3)


def test_overlapping_label_is_certain_on_either_side():
    p = torch.tensor([[0.97, 0.94, 0.5, 0.06, 0.03], [0.03, 0.96, 0.1, 0.9, 0.6]])
    made = pseudo_label(torch.logit(p)[None, :, None, None, :], OVERLAPPING)
    assert made.label.shape == made.certain.shape == (1, 2, 1, 1, 5)
    assert made.label[0, :, 0, 0].tolist() == [
        [True, True, False, False, False],
        [False, True, False, True, True],
    ]
    assert made.certain[0, :, 0, 0].tolist() == [
        [True, False, False, False, True],
        [True, True, False, False, False],
    ]
    assert made.share == pytest.approx(4 / 10)


def test_a_probability_that_equals_the_threshold_is_enough():
    # Two equal logits, or one of 0, give exactly one half.
    assert pseudo_label(torch.zeros(1, 2, *SPACE), ONE_CLASS, threshold=0.5).certain.all()
    assert pseudo_label(torch.zeros(1, 2, *SPACE), OVERLAPPING, threshold=0.5).certain.all()
    assert not pseudo_label(torch.zeros(1, 2, *SPACE), OVERLAPPING, threshold=0.51).certain.any()


@pytest.mark.parametrize("task", [EXCLUSIVE, OVERLAPPING])
def test_no_gradient_and_nothing_believed_that_is_no_number(task):
    logits = torch.full((1, task.outputs, *SPACE), 9.0)
    logits[:, 0] = -9.0
    logits[..., 0] = torch.nan
    made = pseudo_label(logits.requires_grad_(), task, threshold=0.4)
    assert not made.label.requires_grad
    assert not made.certain.requires_grad
    assert not made.certain[..., 0].any()
    assert made.certain[..., 1].all()


def test_confidence_is_judged_in_float32():
    # sigmoid(2.90625) = 0.94815; in bfloat16 both it and 0.95 are 0.94922, and it would do.
    logits = torch.full((1, 2, *SPACE), 2.90625, dtype=torch.bfloat16)
    assert (logits.sigmoid() >= 0.95).all()
    assert not pseudo_label(logits, OVERLAPPING).certain.any()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not pseudo_label(logits, OVERLAPPING).certain.any()


def test_an_annotation_is_certain_everywhere():
    label = torch.tensor([0, 2, 4, 9, 7, 0], dtype=torch.uint8).view(1, 1, 2, 3)
    made = known(label, EXCLUSIVE)
    assert made.label.flatten().tolist() == [0, 2, 1, 1, 0, 0]
    assert made.certain.all()
    assert made.share == 1.0
    assert made.values(EXCLUSIVE).dtype == torch.uint8
    assert made.values(EXCLUSIVE).flatten().tolist() == [0, 2, 4, 4, 0, 0]


@pytest.mark.parametrize("task", [EXCLUSIVE, OVERLAPPING])
def test_masks_of_an_annotation_are_its_targets(task):
    label = torch.arange(12, dtype=torch.uint8).view(2, 1, 2, 3)
    assert torch.equal(known(label, task).masks(task), to_targets(label, task))


def test_the_share_counts_voxels():
    certain = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    certain[0, 0, 0, 0] = certain[0, 1, 1, :] = True
    assert PseudoLabel(torch.zeros(1, 2, 2, 2, dtype=torch.int64), certain).share == 3 / 8


@pytest.mark.parametrize("task", [EXCLUSIVE, OVERLAPPING])
def test_pasting_takes_label_and_certainty_from_the_same_side(task):
    into, of, box = _random(task, 1), _random(task, 2), _box(3)
    made = pasted(into, of, box)
    for voxel in _voxels(made.label):
        source = of if box[(voxel[0], *voxel[-3:])] else into
        assert made.label[voxel] == source.label[voxel]
        assert made.certain[voxel] == source.certain[voxel]


@pytest.mark.parametrize("task", [EXCLUSIVE, OVERLAPPING])
@pytest.mark.parametrize("shape", [SPACE, (1, *SPACE), (1, 1, 1, 2), (2, 1, 1, 1)])
def test_a_mask_to_paste_by_broadcasts(task, shape):
    into, of, box = _random(task, 1), _random(task, 2), _box(4, shape)
    made = pasted(into, of, box)
    whole = pasted(into, of, box.broadcast_to(2, *SPACE).clone())
    assert torch.equal(made.label, whole.label)
    assert torch.equal(made.certain, whole.certain)


@pytest.mark.parametrize("shape", [(2, 1, *SPACE), (3, *SPACE), (2, 2, 2, 2)])
def test_a_mask_that_does_not_fit_is_refused(shape):
    into, of = _random(EXCLUSIVE, 1), _random(EXCLUSIVE, 2)
    with pytest.raises(ConfigError, match="mask to paste by"):
        pasted(into, of, torch.ones(shape, dtype=torch.bool))
    with pytest.raises(ConfigError, match="int64"):
        pasted(into, of, torch.ones((2, *SPACE), dtype=torch.int64))
    with pytest.raises(ConfigError, match="same patches"):
        pasted(into, _random(EXCLUSIVE, 2, batch=1), _box(3))


@pytest.mark.parametrize("direct_certain", [False, True])
@pytest.mark.parametrize("task", [EXCLUSIVE, OVERLAPPING])
def test_guidance_keeps_what_both_say(task, direct_certain):
    merged, direct = _random(task, 5), _random(task, 6)
    made = agreeing(merged, direct, direct_certain=direct_certain)
    assert torch.equal(made.label, merged.label)
    seen = set()
    for voxel in _voxels(made.label):
        same = merged.label[voxel] == direct.label[voxel]
        sure = bool(merged.certain[voxel]), bool(direct.certain[voxel])
        seen.add((bool(same), *sure))
        expected = same and sure[0] and (sure[1] or not direct_certain)
        assert made.certain[voxel] == expected
    assert len(seen) == 8  # every case has occurred


def test_guidance_is_merged_from_the_parts_of_the_unlabelled_image():
    # A voxel each: from u outside the box, from u inside, and one where the two views differ.
    confident, unsure = 0.99, 0.6

    def teacher(*voxels: tuple[int, float]) -> PseudoLabel:
        rows = []
        for channel, p in voxels:
            row = [(1 - p) / 2] * 3
            row[channel] = p
            rows.append(tuple(row))
        return pseudo_label(_exclusive_logits(*rows), EXCLUSIVE)

    of_ul = teacher((1, confident), (0, confident), (2, confident), (1, unsure))
    of_lu = teacher((0, confident), (2, confident), (0, confident), (0, confident))
    of_u = teacher((1, confident), (2, unsure), (1, confident), (1, confident))
    box = torch.tensor([False, True, False, False]).view(1, 1, 1, 4)
    made = agreeing(pasted(into=of_ul, of=of_lu, mask=box), of_u)
    assert made.label.flatten().tolist() == [1, 2, 2, 1]
    assert made.certain.flatten().tolist() == [True, True, False, False]


def test_what_does_not_fit_is_refused():
    label = torch.zeros(1, *SPACE, dtype=torch.int64)
    certain = torch.ones(1, *SPACE, dtype=torch.bool)
    with pytest.raises(ConfigError, match="certainty of shape"):
        PseudoLabel(label, certain[..., :1])
    with pytest.raises(ConfigError, match=r"torch\.float32"):
        PseudoLabel(label, certain.float())
    with pytest.raises(ConfigError, match=r"torch\.uint8"):
        PseudoLabel(label.to(torch.uint8), certain)
    with pytest.raises(ConfigError, match="exclusive"):
        _random(OVERLAPPING, 0).masks(EXCLUSIVE)
    with pytest.raises(ConfigError, match="overlapping"):
        PseudoLabel(label, certain).masks(OVERLAPPING)
    with pytest.raises(ConfigError, match="whole, core"):
        _random(OVERLAPPING, 0).values(OVERLAPPING)
