"""Unified copy-paste: a box of one patch replaces the same box of another, labels alike.

For an unlabelled patch x_u with pseudo-label p_u, a labelled one x_l with label y_l, and the mask
M of a box, after MiDSS (Ma et al. 2024, arXiv:2404.08951) and UST-RUN (Ma et al. 2025,
arXiv:2505.24567):

    x_ul = x_u (1 - M) + x_l M       p_ul = p_u (1 - M) + y_l M       paste(x_u, x_l, M)
    x_lu = x_l (1 - M) + x_u M       p_lu = y_l (1 - M) + p_u M       paste(x_l, x_u, M)

The two directions of one M hold every voxel of both patches exactly once. UST-RUN mixes the
hardest sample of the step before with a labelled one through the box around both foregrounds
(`foreground_box`).

The source is 2D: a rectangle of 2 to 40 % of a square image, with sides in a ratio uniform in 0.3
to 1/0.3, drawn anew until it fits. The 3D box is ours: see `draw_box`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from uharmony_model.errors import ConfigError

Size = tuple[int, int, int]


@dataclass(frozen=True)
class Box:
    """A box of a patch: its first voxel and its sides, in voxels along D, H, W."""

    start: Size
    size: Size

    def mask(self, size: Size) -> Tensor:
        """The box in a patch of `size` voxels: (D, H, W) bool, true inside.

        Raises:
            ConfigError: the box is empty or does not lie within the patch.
        """
        ends = [first + side for first, side in zip(self.start, self.size, strict=True)]
        within = all(end <= voxels for end, voxels in zip(ends, size, strict=True))
        if min(self.start) < 0 or min(self.size) < 1 or not within:
            raise ConfigError(
                f"a box of {self.size} voxels from {self.start} in a patch of {tuple(size)}; "
                "expected a box within the patch, so give the size that it was drawn for"
            )
        mask = torch.zeros(size, dtype=torch.bool)
        mask[tuple(slice(first, end) for first, end in zip(self.start, ends, strict=True))] = True
        return mask


def draw_box(
    generator: np.random.Generator,
    size: Size,
    *,
    share: tuple[float, float] = (0.02, 0.4),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Box:
    """A random box within a patch of `size` voxels: its volume, then its shape, then its place.

    The box's share of the patch's volume is uniform in `share`. Its sides, each as a share of the
    patch's side, are in proportions whose logarithms are uniform, so that no axis is preferred;
    between any two of them lies a ratio within `aspect` and within its reciprocal. Sides as shares,
    so that a flat patch gets flat boxes: ours, as the square image of the source is silent on it.

    A side that would exceed the patch becomes the patch's side, and the others grow alike until
    the volume is as drawn. That only brings the proportions nearer to one, so they stay within
    `aspect`, and no draw is repeated. Sides are rounded to whole voxels, at least one. All places
    where the box fits are equally likely.

    Raises:
        ConfigError: `size`, `share` or `aspect` describe no box.
    """
    if min(size) < 1:
        raise ConfigError(f"a patch of {tuple(size)} voxels; expected three sides of at least 1")
    if not 0 < share[0] <= share[1] <= 1:
        raise ConfigError(
            f"share is {share}; expected two shares of a patch's volume, in order, above 0 and at "
            "most 1"
        )
    if not 0 < aspect[0] <= 1 <= aspect[1] < math.inf:
        raise ConfigError(
            f"aspect is {aspect}; expected the least ratio of two sides, above 0 and at most 1, "
            "and the greatest, at least 1"
        )
    volume = generator.uniform(*share)
    spread = min(-math.log(aspect[0]), math.log(aspect[1]))
    sides = _fitted(volume, spread * generator.random(3))
    whole = np.maximum(np.rint(sides * np.array(size)), 1).astype(np.int64)
    first = generator.integers(0, np.array(size) - whole, endpoint=True)
    return Box(_triple(first), _triple(whole))


def paste(into: Tensor, of: Tensor, mask: Tensor) -> Tensor:
    """`into (1 - M) + of M`: the voxels of `of` where the mask is true, those of `into` elsewhere.

    It serves images and class masks (B, C, D, H, W) and label maps (B, D, H, W) alike: the mask
    has no channels of its own. One (D, H, W) is for all samples, one (B, D, H, W) or
    (B, 1, D, H, W) has one for each sample; B may be 1 there, which is for all samples again.
    A mask with four axes never means channels. `into` and `of` have one shape and one dtype; the
    values are taken over as they are. The mask goes to their device.

    Raises:
        ConfigError: the shapes or dtypes do not fit.
    """
    if into.shape != of.shape or into.dtype != of.dtype or into.ndim not in (4, 5):
        raise ConfigError(
            f"a {of.dtype} tensor {tuple(of.shape)} is pasted into a {into.dtype} one "
            f"{tuple(into.shape)}; expected two of one dtype and shape, (B, C, D, H, W) for images "
            "and (B, D, H, W) for label maps"
        )
    space = tuple(into.shape[-3:])
    leading = tuple(mask.shape[:-3])
    fits = leading in ((), (1,), (1, 1), (len(into),), (len(into), 1))
    if mask.dtype != torch.bool or tuple(mask.shape[-3:]) != space or not fits:
        raise ConfigError(
            f"a {mask.dtype} mask {tuple(mask.shape)} for tensors {tuple(into.shape)}; expected "
            f"bool of shape (D, H, W), (B, D, H, W) or (B, 1, D, H, W) with D, H, W = {space}"
        )
    samples = mask.reshape(leading[0] if leading else 1, *(1,) * (into.ndim - 4), *space)
    return torch.where(samples.to(into.device), of, into)


def foreground_box(first: Tensor, second: Tensor) -> Box | None:
    """The smallest box around the foregrounds of both masks (D, H, W) bool; None without any.

    Where only one has a foreground it is the box around that one. The published code takes a
    random box where neither has one; here the caller does, with `draw_box`.

    Raises:
        ConfigError: they are no two boolean masks of one shape.
    """
    if (
        first.shape != second.shape
        or first.ndim != 3
        or not first.dtype == second.dtype == torch.bool
    ):
        raise ConfigError(
            f"foregrounds {first.dtype} {tuple(first.shape)} and {second.dtype} "
            f"{tuple(second.shape)}; expected two bool masks (D, H, W) of one shape"
        )
    where = (first | second.to(first.device)).nonzero().cpu().numpy()
    if not len(where):
        return None
    low, high = where.min(axis=0), where.max(axis=0)
    return Box(_triple(low), _triple(high - low + 1))


def _fitted(volume: float, logs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sides (3,) with the product `volume`, in the proportions `exp(logs)`, none above 1."""
    free = np.ones(3, dtype=np.bool_)
    sides = np.zeros(3)
    while free.any():
        # Sides that are already 1 have the logarithm 0: the free ones make the volume alone.
        sides[free] = logs[free] + (math.log(volume) - logs[free].sum()) / free.sum()
        if not (sides > 0).any():
            break
        free &= sides <= 0
        sides = np.minimum(sides, 0.0)
    return np.exp(sides)


def _triple(values: npt.NDArray[np.int64]) -> Size:
    depth, height, width = (int(value) for value in values)
    return depth, height, width
