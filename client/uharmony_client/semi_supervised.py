"""Objectives that learn from cases without labels too: what they share, and the plain ones.

L = L_sup + lambda(t/T) * L_u, with lambda of `ramp_up`. A site without labels has no L_sup, one
without unlabelled cases no L_u. Each network sees its weak view (the augmentation of all training)
and, where a rule has one, a strong view of the same patch.
"""

from __future__ import annotations

import copy
from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor, nn

from uharmony_client.objective import Carried, LocalData, Supervised, on_device
from uharmony_client.personal import by_name, from_names
from uharmony_model.errors import PartitionError, StoreError, TrainingError
from uharmony_model.losses import segmentation_loss
from uharmony_model.patches import draw_batch
from uharmony_model.presence import change_shown
from uharmony_model.randomness import numpy_generator
from uharmony_model.study import Study
from uharmony_model.unlabelled.amplitude import low_amplitude, mix_amplitude, mixing_ratio
from uharmony_model.unlabelled.masked_loss import consistency_loss, entropy_loss, masked_loss
from uharmony_model.unlabelled.pseudo_label import PseudoLabel, pseudo_label
from uharmony_model.unlabelled.strong import strong_change
from uharmony_model.unlabelled.teacher import move_teacher, ramp_up

TEACHER = "teacher/"


class SemiSupervised:
    """Draws both kinds of cases; `unlabelled_loss` is what a rule adds.

    Without labels a site's loss has the factor lambda(t/T) as a whole, which changes no step of
    AdamW; so it counts as `growth` in the federation's mean. That is ours.
    """

    def __init__(self, data: LocalData, study: Study) -> None:
        self.data, self.study, self.settings = data, study, study.unlabelled
        self._supervised = Supervised(data, study)
        self._others = LocalData(
            f"{data.site}/unlabelled", data.unlabelled, data.unlabelled_domains, data.annotated
        )
        self._labelled: tuple[Tensor, Tensor, Tensor]
        self._views: tuple[Tensor, Tensor]
        self._labels_of = self._views_of = (-1, -1)  # round and step of what was drawn last
        self._shares: list[float] = []
        self._round = 0

    @property
    def site(self) -> str:
        """The site of the cases."""
        return self.data.site

    @property
    def share(self) -> float:
        """The mean share of voxels that taught something; 0 in the warm-up."""
        if self.data.volumes:
            return 1.0
        if self._round <= self.study.warm_up or not self._shares:
            return 0.0
        return float(np.mean(self._shares))

    @property
    def growth(self) -> float | None:
        """lambda(t/T) at the end of the round, where there are no labels."""
        if self.data.volumes:
            return None
        return ramp_up(self.progress(self._round, self.study.training.local_steps))

    def loss(self, network: nn.Module, round_: int, step: int, *, drop: bool) -> Tensor:
        """The supervised loss where there are labels, and the rule's."""
        self._round = round_
        total: Tensor | None = None
        if self.data.volumes:
            total = self.labelled_loss(network, round_, step, drop=drop)
        if self.data.unlabelled:
            weight = self.settings.weight * ramp_up(self.progress(round_, step))
            added = weight * self.unlabelled_loss(network, round_, step, drop=drop)
            total = added if total is None else total + added
        if total is None:
            raise TrainingError(f"site {self.site}: no case to train on; add cases")
        return total

    def labelled_loss(self, network: nn.Module, round_: int, step: int, *, drop: bool) -> Tensor:
        """L_sup."""
        return self._supervised.loss(network, round_, step, drop=drop)

    @abstractmethod
    def unlabelled_loss(self, network: nn.Module, round_: int, step: int, *, drop: bool) -> Tensor:
        """L_u, before its weight."""

    def labelled(self, network: nn.Module, round_: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """A labelled batch: images, labels, domains; drawn once a step."""
        if self._labels_of != (round_, step):
            self._labelled = self._supervised.draw(network, round_, step)
            self._labels_of = (round_, step)
        return self._labelled

    def unlabelled(self, network: nn.Module, round_: int, step: int) -> tuple[Tensor, Tensor]:
        """The weak view of an unlabelled batch, and the domain of each sample; once a step."""
        if self._views_of != (round_, step):
            data, study = self._others, self.study
            where = (study.seed, data.site, round_, step)
            batch = draw_batch(data.volumes, study.task, study.training, *where)
            image, _, domain = on_device(network, batch, data.domains)
            self._views, self._views_of = (image, domain), (round_, step)
        return self._views

    def strong(self, image: Tensor, round_: int, step: int) -> Tensor:
        """The strong view of the same patches; masks of presence stay."""
        draws = [self.draws(round_, step, f"strong-{sample}") for sample in range(len(image))]
        return change_shown(image, self.study.task, lambda x: strong_change(x, draws))

    def in_style(
        self, image: Tensor, style: Tensor, round_: int, step: int, *, floor: float
    ) -> Tensor:
        """`image (B, C, D, H, W)` with its low amplitudes mixed with `style (B, C, ...)`.

        Masks of presence stay. A style without any amplitude beside the mean is that of a channel
        that shows nothing, an absent modality: there the image keeps its own.
        """
        channels, middle = self.study.task.channels, style.shape[-1] // 2
        shown, style = image[:, :channels], style.to(image)
        own = low_amplitude(shown, middle, floor=floor)
        varying = style.clone()
        varying[..., middle, middle, middle] = 0
        shows = varying.amax((2, 3, 4), keepdim=True) > 0
        progress = 1.0 if self.settings.amplitude == "full" else self.progress(round_, step)
        ratio = mixing_ratio(self.draws(round_, step, "ratio"), progress, len(image)).to(image)
        changed = mix_amplitude(shown, torch.where(shows, style, own), ratio, floor=floor)
        return torch.cat((changed, image[:, channels:]), 1)

    def supervised_on(self, logits: Tensor, label: Tensor) -> Tensor:
        """The segmentation loss over the classes that the site annotates."""
        annotated = self.data.annotated.to(label.device)
        return segmentation_loss(logits, label, self.study.task, annotated)

    def progress(self, round_: int, step: int) -> float:
        """How far all training is, t / T in [0, 1]; the steps at home are at its end."""
        training = self.study.training
        done = (round_ - 1) * training.local_steps + step
        return min(done / (training.rounds * training.local_steps), 1.0)

    def draws(self, round_: int, step: int, purpose: str) -> np.random.Generator:
        """A generator for one purpose of one step."""
        return numpy_generator(self.study.seed, self.site, round_, step, purpose)

    def learned_from(self, share: float) -> None:
        """Note the share of voxels that a step learned from."""
        self._shares.append(share)

    def moved(self, network: nn.Module, round_: int, step: int) -> None:
        """Nothing else moves."""

    def carried(self) -> Carried:
        """What this rule keeps; the shares are those of one round."""
        return {"shares": torch.tensor(self._shares, dtype=torch.float64)}

    def restore(self, carried: Carried) -> None:
        """Put it back in the middle of a round."""
        self._shares = carried["shares"].tolist() if "shares" in carried else []

    def outlives(self) -> Carried:
        """What is carried into the next round."""
        return {k: v for k, v in self.carried().items() if k != "shares"}


class WithTeacher(SemiSupervised):
    """With a second network that follows the first: an exponential moving average of it.

    It is the site's own and is carried from round to round, so that in a federation it follows the
    global model as this site goes on from it.
    """

    def __init__(self, data: LocalData, study: Study) -> None:
        super().__init__(data, study)
        self._teacher: nn.Module | None = None
        self._kept: Carried = {}

    def teacher(self, network: nn.Module) -> nn.Module:
        """The teacher; before its first step it is the network."""
        if self._teacher is None:
            self._teacher = copy.deepcopy(network)
            for parameter in self._teacher.parameters():
                parameter.requires_grad_(False)
            if self._kept:
                try:
                    self._teacher.load_state_dict(from_names(self._teacher, self._kept))
                except (PartitionError, RuntimeError) as error:
                    raise StoreError(f"site {self.site}: the kept teacher: {error}") from None
            self._teacher.train()  # as in the published code of UST-RUN
        return self._teacher

    def taught(self, network: nn.Module, image: Tensor, domain: Tensor) -> PseudoLabel:
        """The teacher's label of an image, without a gradient."""
        with torch.no_grad():
            logits = self.teacher(network)(image, domain)
        return pseudo_label(logits, self.study.task, self.settings.threshold)

    def moved(self, network: nn.Module, round_: int, step: int) -> None:
        """Let the teacher follow, where it has somebody to teach."""
        if not self.data.unlabelled:
            return
        done = (round_ - 1) * self.study.training.local_steps + step
        move_teacher(self.teacher(network), network, self.settings.teacher_decay, done)

    def carried(self) -> Carried:
        """The teacher by KEY[@DOMAIN]."""
        if self._teacher is None:
            return super().carried()
        state = {k: v.detach().cpu() for k, v in self._teacher.state_dict().items()}
        named = by_name(self._teacher, state)
        return {**super().carried(), **{f"{TEACHER}{k}": v for k, v in named.items()}}

    def restore(self, carried: Carried) -> None:
        """Put the teacher back."""
        super().restore(carried)
        self._teacher = None
        kept = {k: v for k, v in carried.items() if k.startswith(TEACHER)}
        self._kept = {k.removeprefix(TEACHER): v for k, v in kept.items()}


class MeanTeacher(WithTeacher):
    """Student and teacher are to agree on an unlabelled patch under different noise."""

    def unlabelled_loss(self, network: nn.Module, round_: int, step: int, *, drop: bool) -> Tensor:
        """Mean squared difference of their probabilities."""
        image, domain = self.unlabelled(network, round_, step)
        with torch.no_grad():
            wanted = self.teacher(network)(image, domain)
        seen = network(self.strong(image, round_, step), domain, drop=drop)
        self.learned_from(1.0)
        return consistency_loss(seen, wanted, self.study.task)


class FixMatch(SemiSupervised):
    """The confident label of the weak view is the truth of the strong view."""

    def unlabelled_loss(self, network: nn.Module, round_: int, step: int, *, drop: bool) -> Tensor:
        """Masked segmentation loss on the strong view."""
        image, domain = self.unlabelled(network, round_, step)
        with torch.no_grad():
            logits = network(image, domain)
        target = pseudo_label(logits, self.study.task, self.settings.threshold)
        self.learned_from(target.share)
        seen = network(self.strong(image, round_, step), domain, drop=drop)
        return masked_loss(seen, target, self.study.task)


class EntropyMin(SemiSupervised):
    """Predictions on unlabelled patches are to be sure."""

    def unlabelled_loss(self, network: nn.Module, round_: int, step: int, *, drop: bool) -> Tensor:
        """The mean entropy of a voxel."""
        image, domain = self.unlabelled(network, round_, step)
        self.learned_from(1.0)
        return entropy_loss(network(image, domain, drop=drop), self.study.task)


class AdaptiveStatistics(SemiSupervised):
    """AdaBN: what a site without labels sends weighs nothing; its norms take its own statistics."""

    @property
    def share(self) -> float:
        """Only labels count in the federation's mean."""
        return 1.0 if self.data.volumes else 0.0

    def unlabelled_loss(self, network: nn.Module, round_: int, step: int, *, drop: bool) -> Tensor:
        """Zero: a pass is enough for running statistics, where there are no labels to have them."""
        if self.data.volumes:
            return torch.zeros((), device=next(network.parameters()).device)
        image, domain = self.unlabelled(network, round_, step)
        logits: Tensor = network(image, domain, drop=drop)
        return 0.0 * logits.sum()
