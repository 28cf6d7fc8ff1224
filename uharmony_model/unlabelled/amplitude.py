"""TP-RAM: the style of an image is the amplitude of its lowest frequencies, and can be mixed.

After Ma et al. 2024 (MiDSS, arXiv:2404.08951), training-process-aware random amplitude mixing:

    A = |F(x)|,  P = arg F(x)
    A' = (1 - r) A + r A_style    on the centred box of 2b+1 bins an axis,    r ~ U(0, t/T)
    x' = F^-1(A' exp(i P))

Ours: three axes; F divided by the number of voxels, so that patches of different sizes compare and
the middle bin is the mean; at least one bin beside the mean on each side; `floor`, because the
source's images start at 0 and ours do not; no clipping to 0..255, because normalised intensities
have no common range. A box is ordered as by `fftshift`: frequencies -b..b in cycles per patch, the
mean in the middle. Since 2b+1 bins fit into every axis, bin k is in it exactly when -k is.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType

import numpy as np
import torch
from torch import Tensor

from uharmony_model.errors import ConfigError

HALF_WIDTH_PERCENT = 1
"""b in percent of the shortest axis, as in the source."""

_AXES = (-3, -2, -1)
_QUIET = 1e-6  # amplitude as a share of the root mean square; below it, the phase is rounding


def amplitude_half_width(size: Sequence[int]) -> int:
    """The b of a patch of `size` voxels: `max(1, floor(0.01 min(size)))`.

    The source has no lower limit. Its b is 2 at 256 pixels; at the 32 to 96 voxels of a patch in
    3D it would be 0, which mixes the mean alone.
    """
    return max(1, min(size) * HALF_WIDTH_PERCENT // 100)


def mixing_ratio(generator: np.random.Generator, progress: float, count: int) -> Tensor:
    """Draw `r ~ U(0, progress)` for `count` samples `(count,)`; `progress` is t/T.

    Mixing at full strength from the start is known to hurt; hence the growing range.

    Raises:
        ConfigError: `progress` is not in [0, 1].
    """
    if not 0 <= progress <= 1:
        raise ConfigError(f"progress is {progress}, expected 0 to 1; give t/T of the training")
    return torch.from_numpy(generator.uniform(0.0, progress, size=count)).float()


def low_amplitude(image: Tensor, half_width: int, *, floor: float = 0.0) -> Tensor:
    """The low-frequency amplitude `(B, C, 2b+1, 2b+1, 2b+1)` of `image (B, C, D, H, W)`.

    The middle bin is `|mean - floor|`. An amplitude has no sign: with a `floor` above some means,
    a dark and a bright image can have the same style. Give the least intensity there is, e.g. -1
    for images within [-1, 1], here and in `mix_amplitude` alike.

    Raises:
        ConfigError: the image is not of five axes, or the box does not fit into the patch.
    """
    return _low_spectrum(image, half_width, floor).abs()


def mix_amplitude(image: Tensor, style: Tensor, ratio: Tensor, *, floor: float = 0.0) -> Tensor:
    """`image (B, C, D, H, W)` with its low amplitude mixed with `style`, each phase kept.

    `style (B or 1, C, 2b+1, 2b+1, 2b+1)` is of `low_amplitude` with the same `floor`; `ratio (B,)`
    in [0, 1]. All that is not in the box stays as it is, and r = 0 gives the image back to the bit.

    The amplitude of a real image is the same at k and -k. A style that is not is made so by the
    mean of the two, because only then is the result real. A bin without amplitude has no phase;
    it gets 0. A channel of one value stays as it is: an absent modality, a mask or padding shows
    nothing whose style could change.

    Raises:
        ConfigError: style or ratio do not fit the image, or the box does not fit into the patch.
    """
    half_width = _half_width_of(image, style, ratio)
    low = _low_spectrum(image, half_width, floor)
    amplitude = low.abs()
    wanted = ((style + style.flip(_AXES)) / 2).to(amplitude)
    # The change alone goes through the inverse transform: rounding cannot reach the other bins.
    step = ratio.to(amplitude).view(-1, 1, 1, 1, 1) * (wanted - amplitude)
    changed = (image.amax(_AXES, keepdim=True) > image.amin(_AXES, keepdim=True)).to(amplitude)
    change = torch.zeros(image.shape, dtype=low.dtype, device=image.device)
    change[_bins(image, half_width)] = step * changed * _direction(low, image)
    difference: Tensor = torch.fft.ifftn(change, dim=_AXES, norm="forward").real
    return image + difference


def _direction(low: Tensor, image: Tensor) -> Tensor:
    """`exp(i P)` of each bin, 1 where the phase is nothing but rounding."""
    quiet = _QUIET * image.square().mean(_AXES, keepdim=True).sqrt()
    return torch.where(low.abs() <= quiet, torch.ones_like(low), torch.sgn(low))


def _low_spectrum(image: Tensor, half_width: int, floor: float) -> Tensor:
    """The box of the spectrum of `image - floor`, with `F(-k)` exactly the conjugate of `F(k)`."""
    if image.dim() != 5 or half_width < 0 or 2 * half_width + 1 > min(image.shape[2:]):
        raise ConfigError(
            f"low amplitude of half-width {half_width} in an image {tuple(image.shape)}; expected "
            "(B, C, D, H, W) with at least 2b+1 voxels an axis; take a smaller half-width"
        )
    spectrum: Tensor = torch.fft.fftn(image, dim=_AXES, norm="forward")
    low = spectrum[_bins(image, half_width)]
    # Where there is little amplitude, the phases of k and -k are apart by rounding, which a large
    # style would bring out.
    low = (low + low.flip(_AXES).conj()) / 2
    low[..., half_width, half_width, half_width] -= floor
    return low


def _bins(image: Tensor, half_width: int) -> tuple[EllipsisType | Tensor, ...]:
    """Index of the box in an unshifted spectrum, in the order of a shifted one."""
    steps = torch.arange(-half_width, half_width + 1, device=image.device)
    d, h, w = (steps % size for size in image.shape[2:])
    return (..., d[:, None, None], h[:, None], w)


def _half_width_of(image: Tensor, style: Tensor, ratio: Tensor) -> int:
    side = style.shape[-1] if style.dim() else 0
    fits = (
        image.dim() == style.dim() == 5
        and side % 2 == 1
        and style.shape[0] in (1, image.shape[0])
        and tuple(style.shape[1:]) == (image.shape[1], side, side, side)
        and ratio.shape == image.shape[:1]
    )
    if not fits:
        raise ConfigError(
            f"style {tuple(style.shape)} and ratio {tuple(ratio.shape)} for an image "
            f"{tuple(image.shape)}; expected (B or 1, C, 2b+1, 2b+1, 2b+1) and (B,) for "
            "(B, C, D, H, W); take the style from low_amplitude"
        )
    return side // 2
