"""Alignment without an adversary: target features are brought to the prototypes of their classes.

    g(p)  = sum_c p_c(p) * mean_ch (f(p) - mu_c)^2 / (var_c + eps)       over classes that exist
    M(p)  = min(g / q95(g), 1)                                           the mask, detached
    m_c   = sum_p w_c(p) f(p) / sum_p w_c(p),   w_c = (1 + strength M) p_c     over confident places
    loss  = mean_c mean_ch (m_c - mu_c)^2 / (var_c + eps)                over classes that are seen

mu_c and var_c (C,) are mean and biased variance of source-like features over the voxels of class
c, p_c the predicted probability, detached: else to name a voxel by another class would be a way to
a smaller loss. A class is seen where its probabilities over confident places add up to one.

GLUA-style: places with a larger gap weigh more, after the abstract of Global-Local Union Alignment
(arXiv:2205.11888); these formulas are ours. The mean over places is drawn to the prototype, not
each place: that pulled all features of a patch to one point, background first as most places are
background, and the target's foreground was lost with it (docs/evidence.md). B samples, C channels,
J' classes as channels of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uharmony_model.alignment.class_prototypes import Prototypes
from uharmony_model.errors import TrainingError

EPS = 1e-3  # or a channel constant in a class would decide alone; for features of unit scale

QUANTILE = 0.95  # of the gap, from where the mask is 1

SEEN = 1.0  # places of a class, by the sum of its probabilities


def gap(
    features: Tensor, probabilities: Tensor, prototypes: Prototypes, eps: float = EPS
) -> Tensor:
    """The gap g (B, 1, ...) of features (B, C, ...) under probabilities (B, J', ...).

    Both are on one grid; bring probabilities there by their means over its cells. A class that
    does not exist adds nothing, and the others' probabilities stay as they are: a voxel of a class
    nobody knows has a gap near 0. The gradient flows to the features alone.

    Raises:
        TrainingError: grid, classes or channels do not fit.
    """
    classes, channels = prototypes.mean.shape
    grid = features.shape[2:]
    if features.shape[1] != channels or probabilities.shape != (features.shape[0], classes, *grid):
        raise TrainingError(
            f"features of shape {tuple(features.shape)} and probabilities of "
            f"{tuple(probabilities.shape)}; expected {channels} channels and {classes} classes on "
            "one grid"
        )
    dtype = torch.promote_types(features.dtype, torch.float32)
    values, weights = features.to(dtype), probabilities.detach().to(dtype)
    column = (1, channels, *(1 for _ in grid))
    total = (values * 0).sum(1, keepdim=True)  # not plain zeros: a gradient even without classes
    for j in torch.nonzero(prototypes.present).flatten().tolist():
        mean = prototypes.mean[j].detach().to(values).view(column)
        variance = prototypes.variance[j].detach().to(values).view(column)
        distance = ((values - mean).square() / (variance + eps)).mean(1, keepdim=True)
        total = total + weights[:, j : j + 1] * distance
    return total


def gap_mask(gap: Tensor) -> Tensor:
    """M (B, 1, ...) in [0, 1]: the gap over its 95 % quantile in the batch, at most 1, detached.

    Where the quantile is 0, any gap at all is 1.
    """
    values = gap.detach()
    top = torch.quantile(values.flatten(), QUANTILE)
    return (values / top.clamp_min(torch.finfo(values.dtype).tiny)).clamp(max=1)


def alignment_loss(
    features: Tensor,
    probabilities: Tensor,
    prototypes: Prototypes,
    certain: Tensor,
    *,
    strength: float = 1.0,
) -> Tensor:
    """How far the classes' masked means lie from their prototypes, over the places `certain` flags.

    `certain` is (B, 1, ...). 0 with a gradient of zeros where no class is seen there. `strength` 0
    leaves the mask out.

    Raises:
        TrainingError: grid, classes or channels do not fit.
    """
    found = gap(features, probabilities, prototypes)
    if certain.shape != found.shape or certain.dtype != torch.bool:
        raise TrainingError(
            f"certain is {tuple(certain.shape)} {certain.dtype}; "
            f"expected {tuple(found.shape)} torch.bool"
        )
    masses = probabilities.detach().to(found.dtype) * certain
    weights = masses * (1 + strength * gap_mask(found))
    places = (0, *range(2, features.ndim))
    distances = []
    for j in torch.nonzero(prototypes.present).flatten().tolist():
        if float(masses[:, j].sum()) < SEEN:
            continue
        weight = weights[:, j : j + 1]
        mean = (weight * features.to(found.dtype)).sum(places) / weight.sum()
        wanted = prototypes.mean[j].detach().to(mean)
        variance = prototypes.variance[j].detach().to(mean)
        distances.append(((mean - wanted).square() / (variance + EPS)).mean())
    # Not plain zeros: a gradient even where no class is seen.
    return torch.stack(distances).mean() if distances else 0.0 * found.sum()
