"""A patch as a scanner that nobody knows might have shown it: what zero residuals learn from.

An unseen site is served with all residuals at zero. Steps with domain dropout train that state, on
scanners that are all known; with these views they train it on changed ones, while what describes a
site's own domain learns from its images as they are. Widening the intensities of the training data
so that unknown scanners are met is after BigAug (Zhang et al. 2020, arXiv:1906.03347); doing so for
the shared state alone is ours, as are kinds and chances.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from uharmony_model.unlabelled.strong import strong_change

INVERT_CHANCE = 1 / 3  # of each channel: dark tissue becomes bright, as in another sequence


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
