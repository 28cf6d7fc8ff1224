"""The discriminator of features: what the segmenter pays it, and its own steps in one place.

    segmenter       0.01 mean over target voxels of (1 + ramp * M) D(f_t)^2,  D resting
    discriminator   L_D on the same features, f' source-like 0 and f_t target 1; after that step

In a federation D comes with a round's weights and rests (`GivenAdversary`); its steps are the
server's, on the sites' gradients (`uharmony_model.alignment.shared_discriminator`). M is the local
feature mask of D's scores: places that D still tells apart count more. Weighting the fooling term
is **ours**: DAST multiplies the features themselves, and then needs D to predict. The source is not
known to us (arXiv:2205.11888); D, its polarity and 0.01 are DAST's (Yu et al. 2021).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from uharmony_client.objective import Carried
from uharmony_client.optimizer import PREFIX, moments, restore_moments
from uharmony_model.alignment.discriminator import (
    BETAS,
    RATE,
    FeatureDiscriminator,
    discriminator_term,
)
from uharmony_model.alignment.feature_mask import adversarial_mask, masked
from uharmony_model.alignment.shared_discriminator import discriminator_of
from uharmony_model.errors import StoreError

WEIGHT = 0.01  # of the fooling term, DAST's
_WEIGHTS = "weights/"


def fooling_loss(discriminator: FeatureDiscriminator, features: Tensor, strength: float) -> Tensor:
    """The segmenter's term for target features (B, C, d, h, w); the discriminator rests."""
    discriminator.requires_grad_(False)
    scores: Tensor = discriminator(features)
    squares = scores.to(torch.promote_types(scores.dtype, torch.float32)).square()
    return WEIGHT * masked(squares, adversarial_mask(scores), strength).mean()


class GivenAdversary:
    """One that other places train; without `weights` there is none yet, and nothing to pay."""

    def __init__(self, weights: Mapping[str, Tensor] | None) -> None:
        self._discriminator = None if weights is None else discriminator_of(weights)

    def saw_source(self, features: Tensor) -> None:
        """Nothing: what it learns from is measured of patches that are always the same."""

    def fooling(self, features: Tensor, strength: float) -> Tensor | None:
        """What the segmenter pays for target features (B, C, d, h, w) that are told apart."""
        if self._discriminator is None:
            return None
        return fooling_loss(self._discriminator.to(features.device), features, strength)

    def learn(self) -> None:
        """Nothing: its steps are the server's."""

    def carried(self) -> Carried:
        """Nothing: it comes with every round."""
        return {}

    def restore(self, carried: Carried) -> None:
        """Nothing to put back."""


class Adversary:
    """For one round of one place; its first values follow from `seed`."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._made: tuple[torch.optim.Adam, FeatureDiscriminator] | None = None
        self._kept: Carried = {}
        self._source: Tensor | None = None
        self._target: Tensor | None = None

    def saw_source(self, features: Tensor) -> None:
        """Features (B, C, d, h, w) of source patches of this step, in a target's style or not."""
        self._source = features.detach()

    def fooling(self, features: Tensor, strength: float) -> Tensor:
        """What the segmenter pays for target features (B, C, d, h, w) that are told apart."""
        self._target = features.detach()
        return fooling_loss(self._discriminator(features)[1], features, strength)

    def learn(self) -> None:
        """One step on what was seen since the last one; none where a side is missing."""
        source, target = self._source, self._target
        self._source = self._target = None
        if source is None or target is None:
            return
        adam, discriminator = self._discriminator(target)
        discriminator.requires_grad_(True)
        loss = discriminator_term(discriminator(source), False)
        loss = loss + discriminator_term(discriminator(target), True)
        adam.zero_grad()
        loss.backward()
        adam.step()

    def carried(self) -> Carried:
        """Its weights and the moments of its optimiser."""
        if self._made is None:
            return self._kept
        adam, discriminator = self._made
        state = {k: v.detach().cpu() for k, v in discriminator.state_dict().items()}
        return {**{f"{_WEIGHTS}{k}": v for k, v in state.items()}, **moments(adam, discriminator)}

    def restore(self, carried: Carried) -> None:
        """Put them back."""
        self._made, self._kept = None, carried

    def _discriminator(self, like: Tensor) -> tuple[torch.optim.Adam, FeatureDiscriminator]:
        if self._made is not None:
            return self._made
        made = FeatureDiscriminator(like.shape[1], seed=self._seed).to(like.device)
        known = {k: v for k, v in self._kept.items() if not k.startswith(PREFIX)}
        if known:
            try:
                made.load_state_dict({k.removeprefix(_WEIGHTS): v for k, v in known.items()})
            except RuntimeError as error:
                raise StoreError(f"the kept discriminator: {error}") from None
        adam = torch.optim.Adam(made.parameters(), lr=RATE, betas=BETAS)
        restore_moments(adam, made, self._kept)
        self._made = adam, made
        return self._made
