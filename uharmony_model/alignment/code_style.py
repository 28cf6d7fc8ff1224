"""Patches in the style of a code: what is measured of them, and what is made of them.

    z_bc     = mean of E_s over the middle slices of channel c of patch b
    x'_bc    = G(E_c(x_bc), z), slice by slice, with one code z for all slices of the channel
    a site   row c: mean and deviation of the slices' codes in channel c, each patient weighing the
             same (`uharmony_model.alignment.style_codes` with one cluster)

For the global stage of a GLUA-style method, after the abstract of Su et al. 2022
(arXiv:2205.11888), with the autoencoder of `style_autoencoder`. Ours: a code for each channel,
since channels are modalities; a channel that shows nothing, an absent modality, keeps its voxels.
B patches, C channels, S numbers of a code.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from uharmony_model.alignment.style_autoencoder import (
    StyleAutoencoder,
    slices_of,
    translate_volume,
    volume_styles,
)
from uharmony_model.alignment.style_codes import (
    MIN_PATIENTS,
    StyleCodes,
    sample_code,
    style_around,
    style_codes,
)
from uharmony_model.errors import ConfigError


def shows(image: Tensor) -> Tensor:
    """Which channels of `image (B, C, D, H, W)` are not one value, (B, C, 1, 1, 1) bool."""
    space = (2, 3, 4)
    return image.amax(space, keepdim=True) > image.amin(space, keepdim=True)


def showing_slices(image: Tensor, axis: int) -> Tensor:
    """The slices (n, 1, h, w) of all channels of `image (B, C, D, H, W)` that show something.

    Raises:
        ConfigError: see `slices_of`.
    """
    found = torch.cat([slices_of(patch, axis) for patch in image])
    return found[(found.amax((1, 2, 3)) > found.amin((1, 2, 3)))]


def patch_codes(autoencoder: StyleAutoencoder, image: Tensor, axis: int) -> Tensor:
    """A code (B, C, S) for each channel of `image (B, C, D, H, W)`, without a gradient.

    Raises:
        ConfigError: see `volume_styles`.
    """
    rows = [
        [volume_styles(autoencoder, channel[None], axis).mean(0) for channel in patch]
        for patch in image
    ]
    return torch.stack([torch.stack(row) for row in rows])


def in_codes(autoencoder: StyleAutoencoder, image: Tensor, codes: Tensor, axis: int) -> Tensor:
    """`image (B, C, D, H, W)` in the styles `codes (B, C, S)`, without a gradient.

    Raises:
        ConfigError: there is not one code for each channel, or see `translate_volume`.
    """
    if codes.shape[:2] != image.shape[:2]:
        raise ConfigError(
            f"style codes {tuple(codes.shape)} for an image {tuple(image.shape)}; expected one for "
            "each channel of each patch"
        )
    made = [
        torch.cat(
            [
                translate_volume(autoencoder, channel[None], code, axis)
                for channel, code in zip(patch, own, strict=True)
            ]
        )
        for patch, own in zip(image, codes, strict=True)
    ]
    return torch.where(shows(image), torch.stack(made), image)


def site_codes(
    codes: ArrayLike,
    patients: Sequence[str],
    generator: np.random.Generator,
    *,
    min_patients: int = MIN_PATIENTS,
) -> StyleCodes:
    """A site's styles, a row for each channel, from `codes (n, C, S)` of `patients[i]` each.

    Raises:
        ConfigError: there are fewer patients than `min_patients`, or see `style_codes`.
    """
    values = np.asarray(codes, np.float64)
    if values.ndim != 3 or not values.shape[1]:
        raise ConfigError(f"style codes {values.shape}; expected (n, C, S)")
    limits = {"clusters": 1, "min_patients": min_patients}
    rows = [
        style_codes(values[:, c], patients, generator, **limits) for c in range(values.shape[1])
    ]
    return _stacked(rows)


def drawn_codes(style: StyleCodes, generator: np.random.Generator) -> Tensor:
    """A code (C, S) for each channel about a site's, for all slices of a patch."""
    return torch.stack([sample_code(r.centroids, r.spread, generator) for r in _rows(style)])


def codes_around(given: Sequence[StyleCodes]) -> StyleCodes:
    """One wide style about all that sites gave, channel by channel: `style_around`.

    Raises:
        ConfigError: no site gave a style.
    """
    if not given:
        raise ConfigError("no site gave a style; without any there is nothing to draw around")
    channels = zip(*(_rows(style) for style in given), strict=True)
    return _stacked([style_around(rows) for rows in channels])


def _rows(style: StyleCodes) -> list[StyleCodes]:
    pairs = zip(style.centroids, style.spread, strict=True)
    return [StyleCodes(centre[None], spread[None]) for centre, spread in pairs]


def _stacked(rows: Sequence[StyleCodes]) -> StyleCodes:
    return StyleCodes(
        np.concatenate([row.centroids for row in rows]),
        np.concatenate([row.spread for row in rows]),
    )
