"""Global-Local Union Alignment at one site or in one place: target-like images, aligned features.

    x'     source patch with the low amplitudes of a target (global); its label stays
    f', f  features of x' and of an unlabelled patch x_t, at the deepest level
    mu_c, var_c   of f' over the voxels of class c
    g      gap of f to the prototypes under p_t;  M = g / its 95 % quantile, at most 1 (local)
    m_c    mean of f weighted by (1 + M) p_t,c over confident places
    L      = (L_seg(x) + L_seg(x')) / 2 + weight * ramp * mean_c mean_ch (m_c - mu_c)^2 / var_c

`unlabelled.style: codes` makes x' by a style autoencoder (`code_styles`), `unlabelled.align` puts a
discriminator (`adversary`) in the place of g, or nothing.

After the abstract of Su et al. 2022 (arXiv:2205.11888), whose formulas are not public: this form,
with amplitudes in the place of learned disentanglement and a mask from prototypes, is ours. In a
federation styles and prototypes are what sites gave; in one place they come from the batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uharmony_client.adversary import Adversary, GivenAdversary
from uharmony_client.code_styles import CodeStyles
from uharmony_client.objective import Carried, LocalData
from uharmony_client.optimizer import PREFIX
from uharmony_client.semi_supervised import SemiSupervised
from uharmony_model.alignment.class_prototypes import Prototypes, PrototypeSum, class_members
from uharmony_model.alignment.feature_mask import mask_ramp
from uharmony_model.alignment.prototype_gap import alignment_loss
from uharmony_model.alignment.style_codes import StyleCodes
from uharmony_model.features import deepest_features
from uharmony_model.study import Study
from uharmony_model.unlabelled.amplitude import low_amplitude
from uharmony_model.unlabelled.pseudo_label import pseudo_label
from uharmony_model.unlabelled.study_style import half_width, style_floor

MEMORY = 0.95  # of the running prototypes of one place, a step
_NAMES = ("mean", "variance", "voxels")
_STYLE, _ADVERSARY = "style/", "discriminator/"


class Alignment(SemiSupervised):
    """One step; `styles`, `prototypes` and `codes` are those that sites gave, if any.

    `discriminator` is one that sites train together, by parameter; in one place there is an own.

    While the style autoencoder learns every site counts, as all are needed for it; a site without
    labels learns nothing else then.
    """

    def __init__(
        self,
        data: LocalData,
        study: Study,
        styles: Sequence[Tensor] = (),
        prototypes: Prototypes | None = None,
        codes: Sequence[StyleCodes] = (),
        discriminator: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(data, study)
        self._styles = list(styles)
        self._given = prototypes
        self._running: Prototypes | None = None
        self._codes = CodeStyles(study, codes) if study.learns_styles else None
        self._adversary: Adversary | GivenAdversary | None = None
        if self.settings.align == "discriminator":
            given = "discriminator" in study.statistics
            self._adversary = GivenAdversary(discriminator) if given else Adversary(study.seed)

    @property
    def share(self) -> float:
        """Of patches, as ever; all of it while styles are learned, which need no label."""
        return 1.0 if self._learns_styles(self._round) else super().share

    @property
    def growth(self) -> float | None:
        """As ever; while styles are learned all sites count in full."""
        return None if self._learns_styles(self._round) else super().growth

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
        if self._adversary is not None:
            self._adversary.saw_source(features)
        if self.settings.align != "prototypes":
            return loss
        members = class_members(label, task, features.shape[2:], self.data.annotated)
        self._remember(PrototypeSum.of_patient([(features, members)]).prototypes(1, 1))
        return loss

    def unlabelled_loss(self, network: nn.Module, round_: int, step: int, *, drop: bool) -> Tensor:
        """The masked gap between this patch's features and the prototypes, or to source features.

        Nothing where alignment is off, or as long as a site without labels learns styles alone.
        """
        task = self.study.task
        alone = not self.data.volumes and self._learns_styles(round_)
        if alone or self.settings.align == "off":
            self.learned_from(0.0)
            device = next(network.parameters()).device
            return torch.zeros((), device=device, requires_grad=True)
        known = self._given if self._given is not None else self._running
        image, domain = self.unlabelled(network, round_, step)
        with deepest_features(network) as seen:
            logits = network(image, domain, drop=drop)
        features = seen.features
        strength = mask_ramp(self.progress(round_, step))
        # All logits take part, so that there is a gradient where the encoder rests.
        nothing: Tensor = 0.0 * logits.sum()
        if self._adversary is not None:
            paid = self._adversary.fooling(features, strength)
            self.learned_from(0.0 if paid is None else 1.0)
            return nothing if paid is None else nothing + paid
        sure = pseudo_label(logits, task, self.settings.threshold)
        certain = sure.certain if sure.certain.ndim == 5 else sure.certain[:, None]
        if known is None or not bool(known.present.any()):
            self.learned_from(0.0)
            return nothing
        self.learned_from(sure.share)
        probabilities = logits.sigmoid() if task.overlapping else logits.softmax(1)
        weights = _on_grid(probabilities, features)
        places = _on_grid(certain.float().amin(1, keepdim=True), features) >= 0.5
        return nothing + alignment_loss(features, weights, known, places, strength=strength)

    def _styled(self, network: nn.Module, image: Tensor, round_: int, step: int) -> Tensor | None:
        """The same patches as a target would show them; None where no style is known."""
        task, floor = self.study.task, style_floor(self.study.task)
        if self.settings.amplitude == "off" or self._learns_styles(round_):
            return None
        if self._codes is not None:
            return self._in_codes(self._codes, network, image, round_, step)
        if self._styles:
            chosen = self.draws(round_, step, "style").integers(len(self._styles), size=len(image))
            style = torch.stack([self._styles[i] for i in chosen])
        elif self.data.unlabelled:
            other, _ = self.unlabelled(network, round_, step)
            style = low_amplitude(other[:, : task.channels], half_width(self.study), floor=floor)
        else:
            return None
        return self.in_style(image, style, round_, step, floor=floor)

    def _in_codes(
        self, styles: CodeStyles, network: nn.Module, image: Tensor, round_: int, step: int
    ) -> Tensor | None:
        """By the autoencoder; masks of presence stay."""
        channels, target = self.study.task.channels, None
        if self.data.unlabelled:
            target = self.unlabelled(network, round_, step)[0][:, :channels]
        draw = self.draws(round_, step, "style")
        changed = styles.styled(network, image[:, :channels], target, draw)
        return None if changed is None else torch.cat((changed, image[:, channels:]), 1)

    def moved(self, network: nn.Module, round_: int, step: int) -> None:
        """The steps of what learns beside the network, each with an optimiser of its own."""
        if self._codes is not None and self._codes.learns(round_):
            patches = []
            if self.data.volumes:
                patches.append(self.labelled(network, round_, step)[0])
            if self.data.unlabelled:
                patches.append(self.unlabelled(network, round_, step)[0])
            shown = [image[:, : self.study.task.channels] for image in patches]
            self._codes.learn(network, shown, self.draws(round_, step, "slices"))
        if self._adversary is not None:
            self._adversary.learn()

    def _learns_styles(self, round_: int) -> bool:
        return self._codes is not None and self._codes.learns(round_)

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
        """The running prototypes, and what learns beside the network."""
        found = dict(super().carried())
        if self._codes is not None:
            found |= {f"{_STYLE}{k}": v for k, v in self._codes.carried().items()}
        if self._adversary is not None:
            found |= {f"{_ADVERSARY}{k}": v for k, v in self._adversary.carried().items()}
        if self._running is None:
            return found
        values = (self._running.mean, self._running.variance, self._running.voxels)
        named = {f"prototypes/{k}": v.cpu() for k, v in zip(_NAMES, values, strict=True)}
        return {**found, **named}

    def outlives(self) -> Carried:
        """Without the moments of what has come to rest, or where a study keeps none."""
        found = super().outlives()
        kept = self.study.training.keep_optimizer
        gone: tuple[str, ...] = () if kept else (f"{_STYLE}{PREFIX}", f"{_ADVERSARY}{PREFIX}")
        gone += () if self._learns_styles(self._round + 1) else (_STYLE,)
        return {k: v for k, v in found.items() if not k.startswith(gone)}

    def restore(self, carried: Carried) -> None:
        """Put them back."""
        super().restore(carried)
        if self._codes is not None:
            self._codes.restore(_under(_STYLE, carried))
        if self._adversary is not None:
            self._adversary.restore(_under(_ADVERSARY, carried))
        self._running = None
        if f"prototypes/{_NAMES[0]}" in carried:
            self._running = Prototypes(*(carried[f"prototypes/{name}"] for name in _NAMES))


def _under(prefix: str, carried: Carried) -> Carried:
    own = {k: v for k, v in carried.items() if k.startswith(prefix)}
    return {k.removeprefix(prefix): v for k, v in own.items()}


def _on_grid(values: Tensor, features: Tensor) -> Tensor:
    """The means of values (B, J, D, H, W) over the cells of a coarser grid."""
    d, h, w = features.shape[2:]
    return F.adaptive_avg_pool3d(values, (d, h, w))
