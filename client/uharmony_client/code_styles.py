"""Styles by codes at one site: the autoencoder's steps while it learns, its images afterwards.

    rounds 1 .. style_rounds   L = sum of weighted terms of `style_losses`, on a few slices a step
    later rounds               x' = G(E_c(x), z), z a code that a site gave, or of a patch at hand

The autoencoder lies beside the network (`training_network`), so it is shared, kept and stored as
the network is; only the moments of its optimiser are carried here. Foreign codes, while it learns:
where there are labelled and unlabelled patches, those of the other kind; else those of own slices
under a random contrast, since no site sees another's. Both, and the optimiser's rate, are ours;
there is no image discriminator. Many steps between two exchanges let a site with one style drift
(docs/methods.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from uharmony_client.objective import Carried
from uharmony_client.optimizer import moments, restore_moments
from uharmony_model.alignment.code_style import (
    drawn_codes,
    in_codes,
    patch_codes,
    showing_slices,
    shows,
    site_codes,
)
from uharmony_model.alignment.style_autoencoder import StyleAutoencoder
from uharmony_model.alignment.style_codes import StyleCodes
from uharmony_model.alignment.style_losses import (
    random_contrast,
    reconstruction_losses,
    restyling_loss,
    weighted_sum,
)
from uharmony_model.errors import TrainingError
from uharmony_model.networks import STYLE, autoencoder_of
from uharmony_model.study import Study
from uharmony_model.task import Task
from uharmony_model.unlabelled.study_style import style_axis

SLICES = 4  # of each kind of patches, a step; the source's batch
RATE = 1e-3  # ten times the source's, which takes far more steps
BETAS = (0.5, 0.9)  # the source's
CLIP = 1.0


class CodeStyles:
    """For one round of one site; `given` are the styles that sites gave, if any."""

    def __init__(self, study: Study, given: Sequence[StyleCodes] = ()) -> None:
        self._study, self._given = study, list(given)
        self._axis = style_axis(study.task)
        self._adam: tuple[torch.optim.Adam, StyleAutoencoder] | None = None
        self._kept: Carried = {}

    def learns(self, round_: int) -> bool:
        """Whether the autoencoder learns in a round; it rests afterwards."""
        return round_ <= self._study.style_rounds

    def learn(
        self, network: nn.Module, patches: Sequence[Tensor], draw: np.random.Generator
    ) -> None:
        """One step on slices of one or two kinds of `patches (B, C, D, H, W)`.

        Raises:
            TrainingError: the loss is not finite.
        """
        autoencoder = autoencoder_of(network)
        found = [self._drawn(image, draw) for image in patches]
        some = [slices for slices in found if len(slices)]
        if not some:
            return
        x = torch.cat(some)
        other = x.flip(0) if len(some) > 1 else random_contrast(x.flip(0), draw)
        adam = self._optimizer(autoencoder)
        # A round that trains one block of the network alone lets all else rest.
        autoencoder.requires_grad_(True)
        with torch.no_grad():
            foreign = autoencoder.encode_style(other)
        terms = reconstruction_losses(autoencoder, x, foreign)
        loss = weighted_sum({**terms, "restyling": restyling_loss(autoencoder, x, draw)})
        if not math.isfinite(loss.item()):
            raise TrainingError(
                f"the style autoencoder's loss is {loss.item()}; check the intensity policy"
            )
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(autoencoder.parameters(), CLIP)
        adam.step()
        adam.zero_grad()  # the network's own step is not to find them

    def styled(
        self, network: nn.Module, image: Tensor, target: Tensor | None, draw: np.random.Generator
    ) -> Tensor | None:
        """`image (B, C, D, H, W)` in given styles, or of `target` patches; None without any."""
        autoencoder = autoencoder_of(network)
        if self._given:
            chosen = draw.integers(len(self._given), size=len(image))
            codes = torch.stack([drawn_codes(self._given[i], draw) for i in chosen])
            return in_codes(autoencoder, image, codes, self._axis)
        if target is None:
            return None
        codes = patch_codes(autoencoder, target, self._axis)
        changed = in_codes(autoencoder, image, codes, self._axis)
        return torch.where(shows(target), changed, image)

    def carried(self) -> Carried:
        """The moments of the autoencoder's optimiser."""
        return self._kept if self._adam is None else moments(*self._adam)

    def restore(self, carried: Carried) -> None:
        """Put them back."""
        self._adam, self._kept = None, carried

    def _drawn(self, image: Tensor, draw: np.random.Generator) -> Tensor:
        found = showing_slices(image, self._axis)
        if not len(found):
            return found
        return found[torch.from_numpy(draw.integers(len(found), size=SLICES)).to(found.device)]

    def _optimizer(self, autoencoder: StyleAutoencoder) -> torch.optim.Adam:
        if self._adam is None:
            adam = torch.optim.Adam(autoencoder.parameters(), lr=RATE, betas=BETAS)
            restore_moments(adam, autoencoder, self._kept)
            self._adam = adam, autoencoder
        return self._adam[0]


def measured_codes(
    network: nn.Module,
    shared: Mapping[str, Tensor],
    images: Iterable[tuple[str, Tensor]],
    task: Task,
    draw: np.random.Generator,
    least: int,
) -> StyleCodes:
    """A site's codes: mean and deviation over its patients, by the autoencoder in `shared`.

    `images` are patches (B, C, D, H, W) with the patient they are of.

    Raises:
        ConfigError: there are fewer than `least` patients.
    """
    autoencoder = autoencoder_of(network)
    own = {k.removeprefix(STYLE): v for k, v in shared.items() if k.startswith(STYLE)}
    autoencoder.load_state_dict(own)
    device, axis = next(autoencoder.parameters()).device, style_axis(task)
    found: list[Tensor] = []
    owner: list[str] = []
    for patient, image in images:
        found.append(patch_codes(autoencoder, image.to(device), axis).cpu())
        owner += [patient] * len(image)
    return site_codes(torch.cat(found).numpy(), owner, draw, min_patients=least)
