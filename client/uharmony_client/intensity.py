"""The study's intensity policies: what a voxel's number means, per modality.

Each takes and gives one channel (D, H, W) float32 and works in place.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from uharmony_model.task import Intensity, Percentile, Suv, Window, ZScore


def apply_intensity(channel: NDArray[np.float32], policy: Intensity) -> None:
    """Rescale a channel in place as its modality's policy says."""
    match policy:
        case Window():
            _to_unit(channel, policy.low, policy.high)
        case Suv():
            _to_unit(channel, 0.0, policy.high)
        case Percentile():
            low, high = np.percentile(channel, [policy.low, policy.high])
            if low == high:  # nearly all voxels are one value, the rest is what there is to see
                low, high = channel.min(), channel.max()
            _to_unit(channel, float(low), float(high))
        case ZScore():
            _zscore(channel, nonzero=policy.nonzero)


def _to_unit(channel: NDArray[np.float32], low: float, high: float) -> None:
    """Clip to [low, high] and map linearly to [-1, 1]."""
    if low == high:
        channel[:] = 0
        return
    np.clip(channel, low, high, out=channel)
    channel -= np.float32((low + high) / 2)
    channel /= np.float32((high - low) / 2)
    np.clip(channel, -1, 1, out=channel)  # rounding may have gone beyond by 1e-7


def _zscore(channel: NDArray[np.float32], *, nonzero: bool) -> None:
    """Zero mean and unit deviation over the chosen voxels; the others (zeros) stay 0."""
    count = np.count_nonzero(channel) if nonzero else channel.size
    if count == 0:
        return
    # Slice by slice in float64: exact far from zero, without a copy of twice the volume's size.
    # Zeros add nothing to the first sum, and as much as they are to the second.
    mean = sum(float(plane.sum(dtype=np.float64)) for plane in channel) / count
    squares = 0.0
    for plane in channel:
        apart = np.subtract(plane, mean, dtype=np.float64)
        squares += float(np.square(apart, out=apart).sum())
    deviation = math.sqrt(max(squares - (channel.size - count) * mean**2, 0.0) / count)
    outside = channel == 0 if nonzero else None
    channel -= np.float32(mean)
    # One value has no contrast; what its deviation then is (about 1e-16 of it) is rounding.
    channel /= np.float32(deviation if deviation > 1e-9 * abs(mean) else 1.0)
    if outside is not None:
        channel[outside] = 0
