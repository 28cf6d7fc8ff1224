"""Global-Local Union Alignment at one site or in one place: target-like images, aligned features.

    x'     source patch with the low amplitudes of a target (global); its label stays
    f', f  features of x' and of an unlabelled patch x_t, at the deepest level
    mu_c, var_c   of f' over the voxels of class c
    g      gap of f to the prototypes under p_t;  M = g / its 95 % quantile, at most 1 (local)
    L      = (L_seg(x) + L_seg(x')) / 2 + weight * ramp * mean((1 + M) g) over confident places

After the abstract of Su et al. 2022 (arXiv:2205.11888), whose formulas are not public: this form,
with amplitudes in the place of learned disentanglement and a mask from prototypes, is ours. In a
federation styles and prototypes are what sites gave; in one place they come from the batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uharmony_client.objective import Carried, LocalData
from uharmony_client.semi_supervised import SemiSupervised
from uharmony_model.alignment.feature_mask import mask_ramp
from uharmony_model.alignment.prototype_gap import (
    Prototypes,
    PrototypeSum,
    alignment_loss,
    class_members,
)
from uharmony_model.features import deepest_features
from uharmony_model.study import Study
from uharmony_model.unlabelled.amplitude import low_amplitude
from uharmony_model.unlabelled.pseudo_label import pseudo_label
from uharmony_model.unlabelled.study_style import half_width, style_floor

MEMORY = 0.95  # of the running prototypes of one place, a step
_NAMES = ("mean", "variance", "voxels")


class Alignment(SemiSupervised):
    """One step; `styles` and `prototypes` are those that sites gave, if any."""

    def __init__(
        self,
        data: LocalData,
        study: Study,
        styles: Sequence[Tensor] = (),
        prototypes: Prototypes | None = None,
    ) -> None:
        super().__init__(data, study)
        self._styles = list(styles)
        self._given = prototypes
        self._running: Prototypes | None = None

    def labelled_loss(self, network: nn.Module, round_: int, step: int, *, drop: bool) -> Tensor:
        """L_seg on source patches and on the same in a target's style."""
        task = self.study.task
        image, label, domain = self.labelled(network, round_, step)
        styled = self._styled(network, image, round_, step)
        with deepest_features(network) as seen:
            logits = network(image if styled is None else styled, domain, drop=drop)
        loss = self.supervised_on(logits, label)
        if styled is not None:
            loss = (self.supervised_on(network(image, domain, drop=drop), label) + loss) / 2
        features = seen.features.detach()
        members = class_members(label, task, features.shape[2:], self.data.annotated)
        self._remember(PrototypeSum.of_patient([(features, members)]).prototypes(1, 1))
        return loss

    def unlabelled_loss(self, network: nn.Module, round_: int, step: int, *, drop: bool) -> Tensor:
        """The masked gap between this patch's features and the prototypes."""
        task = self.study.task
        known = self._given if self._given is not None else self._running
        image, domain = self.unlabelled(network, round_, step)
        with deepest_features(network) as seen:
            logits = network(image, domain, drop=drop)
        features = seen.features
        sure = pseudo_label(logits, task, self.settings.threshold)
        certain = sure.certain if sure.certain.ndim == 5 else sure.certain[:, None]
        # Without prototypes nothing is learned. All logits take part, so that there is a gradient
        # where the encoder rests.
        nothing: Tensor = 0.0 * logits.sum()
        if known is None or not bool(known.present.any()):
            self.learned_from(0.0)
            return nothing
        self.learned_from(sure.share)
        probabilities = logits.sigmoid() if task.overlapping else logits.softmax(1)
        weights = _on_grid(probabilities, features)
        places = _on_grid(certain.float().amin(1, keepdim=True), features) >= 0.5
        strength = mask_ramp(self.progress(round_, step))
        return nothing + alignment_loss(features, weights, known, places, strength=strength)

    def _styled(self, network: nn.Module, image: Tensor, round_: int, step: int) -> Tensor | None:
        """The same patches as a target would show them; None where no style is known."""
        task, floor = self.study.task, style_floor(self.study.task)
        if self.settings.amplitude == "off":
            return None
        if self._styles:
            chosen = self.draws(round_, step, "style").integers(len(self._styles), size=len(image))
            style = torch.stack([self._styles[i] for i in chosen])
        elif self.data.unlabelled:
            other, _ = self.unlabelled(network, round_, step)
            style = low_amplitude(other[:, : task.channels], half_width(self.study), floor=floor)
        else:
            return None
        return self.in_style(image, style, round_, step, floor=floor)

    def _remember(self, new: Prototypes) -> None:
        """Running prototypes; a class that the batch lacks keeps what it had."""
        old = self._running
        if old is None:
            self._running = new
            return
        fresh, had = new.present, old.present
        keep = torch.where(fresh, torch.where(had, MEMORY, 0.0), 1.0)[:, None]
        self._running = Prototypes(
            mean=keep * old.mean + (1 - keep) * new.mean,
            variance=keep * old.variance + (1 - keep) * new.variance,
            voxels=torch.where(fresh, new.voxels, old.voxels),
        )

    def carried(self) -> Carried:
        """The running prototypes."""
        if self._running is None:
            return super().carried()
        values = (self._running.mean, self._running.variance, self._running.voxels)
        named = {f"prototypes/{k}": v.cpu() for k, v in zip(_NAMES, values, strict=True)}
        return {**super().carried(), **named}

    def restore(self, carried: Carried) -> None:
        """Put them back."""
        super().restore(carried)
        self._running = None
        if f"prototypes/{_NAMES[0]}" in carried:
            self._running = Prototypes(*(carried[f"prototypes/{name}"] for name in _NAMES))


def _on_grid(values: Tensor, features: Tensor) -> Tensor:
    """The means of values (B, J, D, H, W) over the cells of a coarser grid."""
    d, h, w = features.shape[2:]
    return F.adaptive_avg_pool3d(values, (d, h, w))
