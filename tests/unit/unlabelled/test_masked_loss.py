from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from uharmony_model.errors import ConfigError
from uharmony_model.losses import segmentation_loss
from uharmony_model.task import Task
from uharmony_model.unlabelled.masked_loss import consistency_loss, entropy_loss, masked_loss
from uharmony_model.unlabelled.pseudo_label import PseudoLabel, known

INTENSITY = {"ct": {"policy": "window"}}
EXCLUSIVE = Task.model_validate({"classes": {"liver": [4, 9], "spleen": 2}, "intensity": INTENSITY})
OVERLAPPING = Task.model_validate(
    {
        "classes": {"whole": [1, 2, 4], "core": [1, 4], "enhancing": 4},
        "overlapping": True,
        "intensity": INTENSITY,
    }
)
TASKS = pytest.mark.parametrize("task", [EXCLUSIVE, OVERLAPPING], ids=["exclusive", "overlapping"])
SPACE = (3, 2, 2)
SMOOTH = 1e-5


def _logits(task: Task, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(2, task.outputs, *SPACE, generator=generator)


def _label(seed: int = 1) -> torch.Tensor:
    drawn = np.random.default_rng(seed).choice([0, 1, 2, 4, 9], size=(2, *SPACE))
    return torch.from_numpy(drawn.astype(np.uint8))


def _target(task: Task, certain: float, seed: int = 1) -> PseudoLabel:
    """An annotation of which a share of the voxels, or of their classes, is certain."""
    whole = known(_label(seed), task)
    drawn = torch.rand(whole.certain.shape, generator=torch.Generator().manual_seed(seed))
    return PseudoLabel(whole.label, drawn < certain)


def _slow(logits: np.ndarray, target: PseudoLabel, task: Task) -> float:
    """The masked loss in float64, voxel by voxel, leaving out what is not certain."""
    foreground = len(task.classes)
    common, predicted, true = ([0.0] * foreground for _ in range(3))
    cross_entropy, terms = 0.0, 0
    for b, *voxel in itertools.product(range(len(logits)), *(range(extent) for extent in SPACE)):
        at = tuple(voxel)
        z = [float(logits[(b, c, *at)]) for c in range(task.outputs)]
        odds = [math.exp(value) for value in z]
        for j in range(foreground):
            if task.overlapping:
                terms += 1
                p = odds[j] / (1 + odds[j])
                y = bool(target.label[(b, j, *at)])
                if not target.certain[(b, j, *at)]:
                    continue
                cross_entropy -= math.log(p if y else 1 - p)
            else:
                p = odds[1 + j] / sum(odds)
                y = int(target.label[(b, *at)]) == 1 + j
                if not target.certain[(b, *at)]:
                    continue
            common[j] += p * y
            predicted[j] += p
            true[j] += y
        if not task.overlapping:
            terms += 1
            if target.certain[(b, *at)]:
                cross_entropy -= math.log(odds[int(target.label[(b, *at)])] / sum(odds))
    dice = [
        1 - (2 * common[j] + SMOOTH) / (predicted[j] + true[j] + SMOOTH) for j in range(foreground)
    ]
    return sum(dice) / foreground + cross_entropy / terms


@TASKS
@pytest.mark.parametrize("certain", [0.1, 0.5, 1.0])
def test_it_is_the_loss_of_the_certain_voxels(task, certain):
    logits, target = _logits(task), _target(task, certain)
    assert 0 < target.share <= 1
    expected = _slow(logits.numpy(), target, task)
    assert masked_loss(logits, target, task).item() == pytest.approx(expected, rel=1e-5)


@TASKS
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_everything_certain_it_is_the_supervised_loss(task, seed):
    logits, label = _logits(task, seed), _label(seed)
    supervised = segmentation_loss(logits, label, task)
    assert masked_loss(logits, known(label, task), task).item() == pytest.approx(
        supervised.item(), abs=1e-5
    )


def test_with_everything_certain_one_class_is_the_supervised_loss_too():
    task = Task.model_validate({"classes": {"tumour": 1}, "intensity": INTENSITY})
    logits, label = _logits(task), _label()
    supervised = segmentation_loss(logits, label, task)
    assert masked_loss(logits, known(label, task), task).item() == pytest.approx(
        supervised.item(), abs=1e-5
    )


@TASKS
def test_the_gradient_is_the_slow_loss_differentiated_by_differences(task):
    logits, target = _logits(task), _target(task, 0.5)
    leaf = logits.clone().requires_grad_()
    masked_loss(leaf, target, task).backward()
    assert leaf.grad is not None
    values, width = logits.numpy().astype(np.float64), 1e-5
    for at in [(0, 0, 0, 0, 0), (1, 1, 2, 1, 0), (0, 2, 1, 1, 1), (1, 0, 1, 0, 1), (1, 2, 0, 1, 0)]:
        above, below = values.copy(), values.copy()
        above[at] += width
        below[at] -= width
        slope = (_slow(above, target, task) - _slow(below, target, task)) / (2 * width)
        assert leaf.grad[at].item() == pytest.approx(slope, abs=1e-6)


@TASKS
def test_what_is_not_certain_does_not_matter(task):
    logits, target = _logits(task), _target(task, 0.5)
    away = ~target.certain if task.overlapping else ~target.certain[:, None].expand_as(logits)
    other = torch.where(away, 5 * _logits(task, 7), logits)
    noise = _target(task, 1.0, seed=8)
    relabelled = PseudoLabel(torch.where(target.certain, target.label, noise.label), target.certain)
    assert not torch.equal(relabelled.label, target.label)
    leaf = logits.clone().requires_grad_()
    loss = masked_loss(leaf, target, task)
    loss.backward()
    assert torch.equal(masked_loss(other, target, task), loss)
    assert torch.equal(masked_loss(logits, relabelled, task), loss)
    assert leaf.grad is not None
    assert (leaf.grad[away] == 0).all()
    assert (leaf.grad[~away] != 0).all()
    assert not torch.equal(masked_loss(_logits(task, 7), target, task), loss)


@TASKS
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_nothing_certain_is_exactly_nothing_with_a_gradient_of_zero(task, scale):
    leaf = (scale * _logits(task)).requires_grad_()
    whole = known(_label(), task)
    loss = masked_loss(leaf, PseudoLabel(whole.label, torch.zeros_like(whole.certain)), task)
    assert loss.item() == 0.0
    loss.backward()
    assert leaf.grad is not None
    assert (leaf.grad == 0).all()


def test_the_cross_entropy_is_divided_by_all_voxels():
    # Undecided logits, background certain in a quarter of 24 voxels: p = 1/3 for each of 2 classes.
    target = known(torch.zeros(2, *SPACE, dtype=torch.uint8), EXCLUSIVE)
    certain = torch.zeros_like(target.certain)
    certain[0, 0] = certain[1, 0, 0] = True
    assert certain.sum() == 6
    loss = masked_loss(torch.zeros(2, 3, *SPACE), PseudoLabel(target.label, certain), EXCLUSIVE)
    dice = 1 - SMOOTH / (6 / 3 + SMOOTH)
    assert loss.item() == pytest.approx(dice + math.log(3) / 4, rel=1e-5)


def test_an_overlapping_class_of_which_nothing_is_certain_adds_nothing():
    logits, whole = _logits(OVERLAPPING), known(_label(), OVERLAPPING)
    certain = whole.certain.clone()
    certain[:, 1] = False
    leaf = logits.clone().requires_grad_()
    masked_loss(leaf, PseudoLabel(whole.label, certain), OVERLAPPING).backward()
    assert leaf.grad is not None
    assert (leaf.grad[:, 1] == 0).all()
    assert (leaf.grad[:, [0, 2]] != 0).all()


@TASKS
def test_the_losses_are_float32_under_autocast(task):
    logits, target = _logits(task).bfloat16(), _target(task, 0.5)
    plain = (
        masked_loss(logits.float(), target, task),
        entropy_loss(logits.float(), task),
        consistency_loss(logits.float(), _logits(task, 3), task),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = (
            masked_loss(logits, target, task),
            entropy_loss(logits, task),
            consistency_loss(logits, _logits(task, 3), task),
        )
    for one, other in zip(plain, cast, strict=True):
        assert other.dtype == torch.float32
        assert torch.equal(one, other)


def test_a_target_of_the_other_kind_is_refused():
    with pytest.raises(ConfigError, match="does not fit"):
        masked_loss(_logits(EXCLUSIVE), _target(OVERLAPPING, 1.0), EXCLUSIVE)
    with pytest.raises(ConfigError, match="does not fit"):
        masked_loss(_logits(OVERLAPPING), _target(EXCLUSIVE, 1.0), OVERLAPPING)


@TASKS
def test_entropy_is_one_when_undecided_and_none_when_sure(task):
    assert entropy_loss(torch.zeros(2, task.outputs, *SPACE), task).item() == pytest.approx(1.0)
    sure = torch.full((2, task.outputs, *SPACE), -1e4)
    sure[:, 0] = 1e4
    leaf = sure.requires_grad_()
    loss = entropy_loss(leaf, task)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-7)
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


def test_entropy_is_its_formula():
    p = [[0.7, 0.2, 0.1], [0.05, 0.9, 0.05]]
    logits = torch.tensor(p).log().T[None, :, None, None, :]
    terms = [-sum(q * math.log(q) for q in row) / math.log(3) for row in p]
    assert entropy_loss(logits, EXCLUSIVE).item() == pytest.approx(sum(terms) / 2, rel=1e-5)
    values = [0.8, 0.3, 0.99]
    logits = torch.logit(torch.tensor(values)).view(1, 3, 1, 1, 1)
    terms = [-(q * math.log2(q) + (1 - q) * math.log2(1 - q)) for q in values]
    assert entropy_loss(logits, OVERLAPPING).item() == pytest.approx(sum(terms) / 3, rel=1e-5)


@TASKS
def test_less_entropy_makes_the_probable_more_probable(task):
    leaf = _logits(task).requires_grad_()
    entropy_loss(leaf, task).backward()
    assert leaf.grad is not None
    moved = (leaf - leaf.grad).detach()
    before, after = (
        z.sigmoid().sub(0.5).abs() if task.overlapping else z.softmax(1).amax(1)
        for z in (leaf.detach(), moved)
    )
    assert (after >= before).all()
    assert after.sum() > before.sum()


def test_consistency_is_the_mean_squared_difference_of_probabilities():
    p, q = [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]], [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]
    student, teacher = (torch.tensor(rows).log().T[None, :, None, None, :] for rows in (p, q))
    expected = np.mean((np.array(p) - np.array(q)) ** 2)
    assert consistency_loss(student, teacher, EXCLUSIVE).item() == pytest.approx(expected, rel=1e-5)
    a, b = torch.tensor([0.9, 0.2, 0.5]), torch.tensor([0.4, 0.3, 0.5])
    student, teacher = (torch.logit(r).view(1, 3, 1, 1, 1) for r in (a, b))
    expected = (0.5**2 + 0.1**2) / 3
    assert consistency_loss(student, teacher, OVERLAPPING).item() == pytest.approx(
        expected, rel=1e-5
    )


@TASKS
def test_consistency_teaches_the_student_alone(task):
    student, teacher = _logits(task, 1).requires_grad_(), _logits(task, 2).requires_grad_()
    consistency_loss(student, teacher, task).backward()
    assert student.grad is not None
    assert (student.grad != 0).any()
    assert teacher.grad is None
    assert consistency_loss(teacher, teacher, task).item() == 0.0
