"""The loss: Dice plus cross-entropy over the classes a site annotates, in float32.

Unlabelled is not background: where a site does not annotate a class, its voxels may hold it.
Exclusive classes: the unannotated ones are added to background before the loss ("marginal loss",
after Shi et al. 2021, arXiv:2007.03868), so the site says nothing on how the two share their
probability. Overlapping classes: the channels that are not annotated are left out.
"""

from __future__ import annotations

import torch
from monai.losses.dice import DiceCELoss, DiceLoss
from torch import Tensor
from torch.nn import functional as F

from uharmony_model.errors import ConfigError
from uharmony_model.targets import (
    Annotated,
    annotated_classes,
    class_index,
    merge_unannotated,
    to_targets,
)
from uharmony_model.task import Task

# `batch=True`: intersections and sizes are summed over the batch before the quotient. A patch
# without foreground then still counts, through the false positives it adds; alone, its Dice term
# would be the constant 1. Background is no class of interest: cross-entropy alone sees it.
_EXCLUSIVE = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
_OVERLAPPING = DiceLoss(sigmoid=True, batch=True)


def segmentation_loss(
    logits: Tensor, label: Tensor, task: Task, annotated: Annotated | None = None
) -> Tensor:
    """Dice plus cross-entropy of `logits (B, J', D, H, W)` against `label (B, D, H, W)`, a scalar.

    `annotated (J,)` flags the foreground classes this site draws; None means all. The Dice term is
    one minus the soft Dice of each annotated class over the whole batch, averaged over classes;
    the cross-entropy term is averaged over voxels (exclusive) or voxels and classes (overlapping).

    Raises:
        ConfigError: no class is annotated, so there is nothing to learn from.
    """
    kept = annotated_classes(annotated, task)
    if not kept:
        raise ConfigError(
            f"no class is annotated, expected at least one of {', '.join(task.class_names)}; "
            "a site without labels cannot train"
        )
    loss: Tensor
    with torch.autocast(logits.device.type, enabled=False):
        if not task.overlapping:
            target = class_index(label, task, annotated)[:, None]
            loss = _EXCLUSIVE(merge_unannotated(logits.float(), kept), target)
            return loss
        # Not DiceCELoss: with more than one channel its cross-entropy is a softmax over channels.
        scores = logits.float()[:, kept]
        masks = to_targets(label, task)[:, kept].float()
        loss = _OVERLAPPING(scores, masks) + F.binary_cross_entropy_with_logits(scores, masks)
        return loss
