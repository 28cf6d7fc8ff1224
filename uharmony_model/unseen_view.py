"""A patch as a scanner that nobody knows might have shown it.

Widening the intensities of the training data so that unknown scanners are met is after BigAug
(Zhang et al. 2020, arXiv:1906.03347): `training.views` does so to a share of the labelled patches,
with any method. `unseen_view` does so for the shared state alone, which is ours: an unseen site is
served with all residuals at zero, steps with domain dropout train that state, and with these views
they train it on changed scanners, while what describes a site's own domain learns from its images
as they are. Kinds and chances are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from uharmony_model.presence import change_shown
from uharmony_model.task import Task
from uharmony_model.training_settings import View
from uharmony_model.unlabelled.strong import strong_change

INVERT_CHANCE = 1 / 3  # of each channel: dark tissue becomes bright, as in another sequence


def viewed(
    image: Tensor,
    task: Task,
    view: View,
    generators: Sequence[np.random.Generator],
    share: float = 1.0,
) -> Tensor:
    """The network's input `image (B, C, D, H, W)` with each sample changed by this chance.

    Masks of presence stay, and so does every voxel's place.
    """
    if view == "plain":
        return image
    # All of them need no draw: what a seed gives does not hang on whether there is a choice.
    chosen = [i for i, one in enumerate(generators) if share == 1 or one.random() < share]
    if not chosen:
        return image
    draws = [generators[i] for i in chosen]
    found = image.clone()
    found[chosen] = change_shown(
        image[chosen], task, lambda x: unseen_view(x, draws, invert=view == "inverted")
    )
    return found


def unseen_view(
    image: Tensor, generators: Sequence[np.random.Generator], *, invert: bool = False
) -> Tensor:
    """A changed copy of `image (B, C, D, H, W)`; sample i draws from `generators[i]` alone.

    The strong change of intensities, and with `invert` some channels turned over before it between
    their own minimum and maximum. No voxel moves, so labels stay valid.

    Raises:
        ConfigError: there is not one generator for each sample, or not five axes.
    """
    turned = image.detach().clone()
    if invert:
        # That there are as many generators is checked below.
        for sample, generator in zip(turned, generators, strict=False):
            for channel in sample:
                if generator.random() < INVERT_CHANCE:
                    channel.copy_(channel.amin() + channel.amax() - channel)
    return strong_change(turned, generators)
