from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.losses.dice import DiceCELoss

from uharmony_model.errors import ConfigError
from uharmony_model.losses import segmentation_loss
from uharmony_model.task import Task

INTENSITY = {"ct": {"policy": "window"}}
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
SHAPE = (2, 5, 4, 3)


def _logits(channels: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(SHAPE[0], channels, *SHAPE[1:], generator=generator)


def _label(values: list[int], seed: int = 1) -> torch.Tensor:
    drawn = np.random.default_rng(seed).choice(values, size=SHAPE)
    return torch.from_numpy(drawn.astype(np.uint8))


def _soft_dice_terms(p: np.ndarray, t: np.ndarray) -> list[float]:
    """1 - (2 sum p t + s) / (sum p + sum t + s) of each class over the whole batch, s = 1e-5."""
    return [
        1 - (2 * (p[:, j] * t[:, j]).sum() + 1e-5) / (p[:, j].sum() + t[:, j].sum() + 1e-5)
        for j in range(p.shape[1])
    ]


def test_all_annotated_is_plain_dice_and_cross_entropy():
    logits, label = _logits(4), _label([0, 2, 4, 7, 9])
    index = torch.zeros_like(label, dtype=torch.long)
    for value, channel in ((4, 1), (9, 1), (2, 2), (7, 3)):
        index[label == value] = channel
    plain = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    expected = plain(logits, index[:, None])
    assert torch.equal(segmentation_loss(logits, label, EXCLUSIVE), expected)
    assert torch.equal(segmentation_loss(logits, label, EXCLUSIVE, torch.ones(3)), expected)


def test_exclusive_loss_of_a_site_without_spleens_is_its_formula():
    logits, label = _logits(4), _label([0, 4, 7, 9])
    odds = np.exp(logits.numpy().astype(np.float64))
    p = odds / odds.sum(axis=1, keepdims=True)
    merged = np.stack((p[:, 0] + p[:, 2], p[:, 1], p[:, 3]), axis=1)
    liver, kidney = np.isin(label, (4, 9)), np.isin(label, (7,))
    truth = np.stack((~(liver | kidney), liver, kidney), axis=1)
    dice = np.mean(_soft_dice_terms(merged[:, 1:], truth[:, 1:]))
    cross_entropy = -np.log(merged)[truth].mean()
    loss = segmentation_loss(logits, label, EXCLUSIVE, torch.tensor([True, False, True]))
    assert loss.item() == pytest.approx(dice + cross_entropy, rel=1e-5)


def test_overlapping_loss_is_its_formula():
    logits, label = _logits(3), _label([0, 1, 2, 4])
    p = 1 / (1 + np.exp(-logits.numpy().astype(np.float64)[:, [0, 2]]))
    truth = np.stack((np.isin(label, (1, 2, 4)), np.isin(label, (4,))), axis=1)
    cross_entropy = -np.where(truth, np.log(p), np.log(1 - p)).mean()
    expected = np.mean(_soft_dice_terms(p, truth)) + cross_entropy
    loss = segmentation_loss(logits, label, OVERLAPPING, [True, False, True])
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("task", "channels"), [(EXCLUSIVE, 4), (OVERLAPPING, 3)])
def test_the_loss_is_float32_under_autocast(task, channels):
    logits, label = _logits(channels).bfloat16(), _label([0, 4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = segmentation_loss(logits, label, task, [True, False, True])
    assert loss.dtype == torch.float32
    assert torch.equal(loss, segmentation_loss(logits.float(), label, task, [True, False, True]))


@pytest.mark.parametrize(("task", "channels"), [(EXCLUSIVE, 4), (OVERLAPPING, 3)])
def test_extreme_logits_give_a_finite_gradient(task, channels):
    logits = (1e4 * _logits(channels)).requires_grad_()
    loss = segmentation_loss(logits, _label([0, 4]), task, [True, False, False])
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_a_site_that_annotates_nothing_cannot_train():
    with pytest.raises(ConfigError, match=r"no class is annotated.*liver, spleen, kidney"):
        segmentation_loss(_logits(4), _label([0]), EXCLUSIVE, [False, False, False])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("task", "channels"), [(EXCLUSIVE, 4), (OVERLAPPING, 3)])
def test_the_loss_is_the_same_on_a_device(task, channels):
    logits, label = _logits(channels), _label([0, 4])
    expected = segmentation_loss(logits, label, task, [True, False, True])
    found = segmentation_loss(logits.cuda(), label.cuda(), task, [True, False, True])
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-6)
