"""The strong view of a patch: intensities change much, no voxel moves, a pseudo-label stays valid.

The strong branch of FixMatch (Sohn et al. 2020, arXiv:2001.07685) and of UST-RUN's symmetric
guidance. Kinds of change, ranges and chances are ours: those of `uharmony_model.augment` made
clearly wider, and blurring, which the weak view has not. Noise comes last, so that it is not
blurred away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from uharmony_model.errors import ConfigError

BLUR_CHANCE = 0.5
BLUR_SIGMA = (0.5, 1.5)  # voxels
CONTRAST_CHANCE = 0.8  # of contrast and brightness together
CONTRAST = (0.5, 1.5)  # factor about the channel's mean
BRIGHTNESS = (-0.3, 0.3)  # in units of the normalised image, which spans about [-1, 1]
GAMMA_CHANCE = 0.5
GAMMA = (0.5, 2.0)  # as likely below 1 as above
NOISE_CHANCE = 0.5
NOISE_DEVIATION = (0.05, 0.25)

_REACH = 3.0  # of the blur's kernel, in sigma


def strong_change(image: Tensor, generators: Sequence[np.random.Generator]) -> Tensor:
    """A changed copy of `image (B, C, D, H, W)`; sample i draws from `generators[i]` alone.

    Each channel changes by itself. A channel of one value stays as it is: an absent modality, the
    mask of one, or padding shows nothing.

    Raises:
        ConfigError: there is not one generator for each sample, or not five axes.
    """
    if image.dim() != 5 or len(generators) != len(image):
        raise ConfigError(
            f"{len(generators)} generators for an image {tuple(image.shape)}; expected "
            "(B, C, D, H, W) and one for each of its B samples"
        )
    changed = image.detach().clone()
    for sample, generator in zip(changed, generators, strict=True):
        for channel in sample:
            if bool(channel.amax() > channel.amin()):
                _change(channel, generator)
    return changed


def _change(channel: Tensor, generator: np.random.Generator) -> None:
    """Change `channel (D, H, W)` in place."""
    if generator.random() < BLUR_CHANCE:
        channel.copy_(_blurred(channel, generator.uniform(*BLUR_SIGMA)))
    if generator.random() < CONTRAST_CHANCE:
        factor, shift = generator.uniform(*CONTRAST), generator.uniform(*BRIGHTNESS)
        mean = channel.mean()
        channel.sub_(mean).mul_(factor).add_(mean).add_(shift)
    if generator.random() < GAMMA_CHANCE:
        _apply_gamma(channel, math.exp(generator.uniform(*np.log(GAMMA))))
    if generator.random() < NOISE_CHANCE:
        deviation = generator.uniform(*NOISE_DEVIATION)
        noise = generator.standard_normal(tuple(channel.shape), dtype=np.float32)
        channel.add_(torch.from_numpy(noise).to(channel), alpha=deviation)


def _apply_gamma(channel: Tensor, gamma: float) -> None:
    """Raise a channel to a power between its own minimum and maximum, which stay."""
    low = channel.amin()
    extent = channel.amax() - low
    if bool(extent > 0):
        # Rounding may leave the quotient a little above 1, never below 0.
        channel.sub_(low).div_(extent).pow_(gamma).mul_(extent).add_(low)


def _blurred(channel: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of `channel (D, H, W)`, `sigma` in voxels, one axis after the other.

    The border is repeated outwards: zeros, as MONAI's filter has them, would draw a frame that is
    on the patch and not on the patient.
    """
    reach = math.ceil(_REACH * sigma)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).to(channel)
    blurred = channel[None, None]
    for axis in range(3):
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = len(kernel)
        # F.pad counts from the last axis.
        padding = [0, 0, 0, 0, 0, 0]
        padding[2 * (2 - axis)] = padding[2 * (2 - axis) + 1] = reach
        padded = F.pad(blurred, padding, mode="replicate")
        blurred = F.conv3d(padded, kernel.view(shape))
    return blurred[0, 0]
