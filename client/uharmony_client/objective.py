"""What a step of training learns from: the loss on one draw of a site's cases.

The loop of `training_steps` is the same for all; an objective draws what it needs, by site, round
and step, and gives a loss. What it moves beside the network (a teacher, a queue) it carries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from uharmony_model.losses import segmentation_loss
from uharmony_model.patches import Batch, StoredVolume, draw_batch
from uharmony_model.randomness import numpy_generator
from uharmony_model.study import Study
from uharmony_model.training_settings import View
from uharmony_model.unseen_view import viewed

Carried = Mapping[str, Tensor]


@dataclass(frozen=True)
class LocalData:
    """What a site trains on: opened volumes, the domain index of each, the classes annotated.

    `unlabelled` are training cases whose labels are not there or may not be used; `names` tell
    them, and what was prepared from them, from all others.
    """

    site: str
    volumes: Sequence[StoredVolume]
    domains: Sequence[int]
    annotated: Tensor
    unlabelled: Sequence[StoredVolume] = ()
    unlabelled_domains: Sequence[int] = ()
    names: Sequence[str] = ()

    @property
    def cases(self) -> int:
        """Training cases, with a label or without."""
        return len(self.volumes) + len(self.unlabelled)


class Objective(Protocol):
    """One way to learn. `drop` asks for a pass with all residuals at zero."""

    @property
    def site(self) -> str:
        """Whose cases they are."""

    def loss(self, network: nn.Module, round_: int, step: int, *, drop: bool) -> Tensor:
        """The loss of one step, a scalar."""

    def moved(self, network: nn.Module, round_: int, step: int) -> None:
        """Told after the optimiser has moved the network."""

    def carried(self) -> Carried:
        """What has to be kept from step to step and from round to round."""

    def restore(self, carried: Carried) -> None:
        """Put that back."""

    def outlives(self) -> Carried:
        """What of it is carried into the next round."""

    @property
    def share(self) -> float:
        """How much of what it saw taught it something, in [0, 1]: part of the update's weight."""

    @property
    def growth(self) -> float | None:
        """How far what cases without labels teach may weigh by now, in [0, 1]; a public number.

        None where the update counts in full: labels taught.
        """


class Supervised:
    """Labelled patches and the segmentation loss over the classes that the site annotates."""

    share, growth = 1.0, None

    def __init__(self, data: LocalData, study: Study) -> None:
        self.data, self.study = data, study

    @property
    def site(self) -> str:
        """The site of the cases."""
        return self.data.site

    def loss(self, network: nn.Module, round_: int, step: int, *, drop: bool) -> Tensor:
        """Dice plus cross-entropy of one batch."""
        image, label, domain = self.draw(network, round_, step)
        if drop and self.study.plan.harmonized:
            view = self.study.harmonization.unseen_view
            image = self._viewed(image, view, (round_, step, "unseen-view"))
        logits = network(image, domain, drop=drop)
        annotated = self.data.annotated.to(image.device)
        return segmentation_loss(logits, label, self.study.task, annotated)

    def draw(self, network: nn.Module, round_: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Patches (B, C, D, H, W), labels (B, D, H, W) and domains (B,) on the network's device."""
        data, study = self.data, self.study
        where = (study.seed, data.site, round_, step)
        batch = draw_batch(data.volumes, study.task, study.training, *where)
        image, label, domain = on_device(network, batch, data.domains)
        training = study.training
        seen = self._viewed(image, training.views, (round_, step, "view"), training.view_share)
        return seen, label, domain

    def _viewed(
        self, image: Tensor, view: View, where: tuple[int, int, str], share: float = 1.0
    ) -> Tensor:
        """A share of a batch as an unknown scanner would show it."""
        study = self.study
        draws = [
            numpy_generator(study.seed, self.site, *where, sample) for sample in range(len(image))
        ]
        return viewed(image, study.task, view, draws, share)

    def moved(self, network: nn.Module, round_: int, step: int) -> None:
        """Nothing else moves."""

    def carried(self) -> Carried:
        """Nothing."""
        return {}

    def restore(self, carried: Carried) -> None:
        """Nothing to put back."""

    def outlives(self) -> Carried:
        """Nothing."""
        return {}


def on_device(
    network: nn.Module, batch: Batch, domains: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch with the domain of each sample, where the network is."""
    device = next(network.parameters()).device
    domain = torch.tensor([domains[case] for case in batch.cases], device=device)
    return batch.image.to(device), batch.label.to(device), domain
