"""Losses for voxels that nobody labelled: believed where certain, firm, or steady; in float32.

Over voxels v (overlapping classes: v and classes j), with p the student's probabilities, y the
(pseudo-)label and m in {0, 1} where it is certain:

    cross-entropy    sum_v m CE(p, y) / sum_v 1
    soft Dice        1 - (2 sum_v m p_j y_j + s) / (sum_v m p_j + sum_v m y_j + s),   mean over j
    entropy          mean_v -sum_c p_c log p_c / log C
    consistency      mean_v,c (p_c - q_c)^2,   q the teacher's probabilities

The masked loss is after MiDSS (Ma et al. 2024, arXiv:2404.08951), as published: the sum of the
certain voxels' cross-entropy is divided by all voxels, as in FixMatch, so few certain voxels weigh
little; Dice has the mask as a factor of every product, in numerator and denominator, and an
uncertain voxel is in none of its sums. Ours: Dice has the convention of `uharmony_model.losses`
(sums over the batch, no squares, background left out, each overlapping class by itself), so that
with everything certain the loss is the supervised one.

Entropy minimisation is Grandvalet & Bengio 2005, per voxel and over its largest value as in ADVENT
(Vu et al. 2019, arXiv:1811.12833), without its adversary. Consistency is Mean Teacher's (Tarvainen
& Valpola 2017, arXiv:1703.01780). B samples, J foreground classes, J' channels of the logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from uharmony_model.task import Task
from uharmony_model.unlabelled.pseudo_label import PseudoLabel

_SMOOTH = 1e-5  # MONAI's, and so that of the supervised loss


def masked_loss(logits: Tensor, target: PseudoLabel, task: Task) -> Tensor:
    """Dice plus cross-entropy of `logits (B, J', D, H, W)` where `target` is certain, a scalar.

    With nothing certain it is exactly 0, and so is its gradient: each Dice quotient is s / s. The
    same holds for the Dice term of an overlapping class of which nothing is certain.

    Raises:
        ConfigError: the target is of the other kind of task.
    """
    truth = target.masks(task).float()
    with torch.autocast(logits.device.type, enabled=False):
        scores = logits.float()
        if task.overlapping:
            certain = target.certain.float()
            probabilities = scores.sigmoid()
            entropies = F.binary_cross_entropy_with_logits(scores, truth, reduction="none")
        else:
            certain = target.certain[:, None].float()
            probabilities = scores.softmax(dim=1)[:, 1:]
            entropies = F.cross_entropy(scores, target.label, reduction="none")[:, None]
        cross_entropy = (entropies * certain).mean()
        return _masked_dice(probabilities, truth, certain) + cross_entropy


def entropy_loss(logits: Tensor, task: Task) -> Tensor:
    """Mean entropy of the voxels of `logits (B, J', D, H, W)`, a scalar in [0, 1].

    1 is as undecided as can be: all channels alike, or, for overlapping classes, all at one half.
    """
    with torch.autocast(logits.device.type, enabled=False):
        scores = logits.float()
        if task.overlapping:
            yes = scores.sigmoid() * F.logsigmoid(scores)
            no = (-scores).sigmoid() * F.logsigmoid(-scores)
            return -(yes + no).mean() / math.log(2)
        logs = scores.log_softmax(dim=1)
        return -(logs.exp() * logs).sum(dim=1).mean() / math.log(logs.shape[1])


def consistency_loss(student: Tensor, teacher: Tensor, task: Task) -> Tensor:
    """Mean squared difference of the probabilities of two `logits (B, J', D, H, W)`, a scalar.

    The gradient reaches the student only.
    """
    with torch.autocast(student.device.type, enabled=False):
        p = _probabilities(student, task)
        q = _probabilities(teacher.detach(), task)
        return F.mse_loss(p, q)


def _masked_dice(probabilities: Tensor, truth: Tensor, certain: Tensor) -> Tensor:
    """One minus the soft Dice over certain voxels, a mean over J; all `(B, J or 1, D, H, W)`."""
    axes = (0, 2, 3, 4)
    believed = probabilities * certain
    common = (believed * truth).sum(axes)
    sizes = believed.sum(axes) + (truth * certain).sum(axes)
    return (1 - (2 * common + _SMOOTH) / (sizes + _SMOOTH)).mean()


def _probabilities(logits: Tensor, task: Task) -> Tensor:
    return logits.float().sigmoid() if task.overlapping else logits.float().softmax(dim=1)
