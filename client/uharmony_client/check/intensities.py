"""Do a channel's numbers look like what the study's intensity policy takes them for?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from uharmony_client.check.texts import Found
from uharmony_client.intensity import apply_intensity
from uharmony_model.task import Intensity, Percentile, Suv, Window

_SAMPLE = 200_000  # voxels; a share or a percentile needs no more
_MIN_CONTRAST_HU = 50.0
_LOWEST_HU = -32768.0
_IN_WINDOW = 0.01
_LOWEST_SUV, _HIGHEST_SUV = -1.0, 1000.0  # rings of reconstruction; bladders reach some hundred
_SAFE_MAGNITUDE, _SAFE_RANGE = 1e30, 1e-30  # within, float32 cannot overflow when scaled


def unlike_the_policy(
    channel: NDArray[np.float32], low: float, high: float, policy: Intensity
) -> list[Found]:
    """What is odd about a channel (D, H, W) with the extremes `low` and `high`."""
    extremes = f"values from {low:g} to {high:g}"
    match policy:
        case Window():
            found = []
            if low >= 0 or low < _LOWEST_HU or high - low < _MIN_CONTRAST_HU:
                found.append(("U301", f"{extremes}; air is near -1000 HU"))
            inside = _sample(channel)
            share = float(np.mean((inside >= policy.low) & (inside <= policy.high)))
            if share < _IN_WINDOW:
                window = f"{policy.low:g} to {policy.high:g} HU"
                found.append(("U302", f"{share:.1%} of the voxels in {window}"))
            return found
        case Suv():
            odd = low < _LOWEST_SUV or high > _HIGHEST_SUV or high <= 1
            return [("U303", extremes)] if odd else []
        case Percentile():
            first, last = np.percentile(_sample(channel), [policy.low, policy.high])
            return [("U304", f"{first:g} is all but the extremes")] if first == last else []
    return []


def scales(channel: NDArray[np.float32], low: float, high: float, policy: Intensity) -> bool:
    """Whether the policy gives finite numbers. Extreme channels are scaled, in place, to see it."""
    if max(abs(low), abs(high)) < _SAFE_MAGNITUDE and high - low > _SAFE_RANGE:
        return True
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        apply_intensity(channel, policy)
    return bool(np.isfinite(channel).all())


def _sample(channel: NDArray[np.float32]) -> NDArray[np.float32]:
    """Evenly taken voxels; the channel has its first axis fastest, so its transpose is flat."""
    flat = channel.T.reshape(-1)
    return flat[:: max(1, flat.size // _SAMPLE)]
