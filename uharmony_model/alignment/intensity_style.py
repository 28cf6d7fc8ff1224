"""A site's intensity style: how its foreground intensities are distributed, in a few knots.

    Q(k)    k = 0: mean of the air;  k = 1 .. K-1: quantile of the foreground at p_k,
            p_k evenly spaced from 0.005 to 0.995
    y       = (1 - strength) x + strength m(x),   m piecewise linear, m(own Q(k)) = target Q(k)

The first and plainest global stage of a GLUA-style method, after the abstract of Su et al. 2022
(arXiv:2205.11888), which asks for target-like images from source images. All of it is ours; the map
is histogram matching in the manner of Nyul and Udupa 1999. It needs no network and no training.

The map never falls, so it cannot invert a contrast: where the target shows dark what the source
shows bright (CT and T2-weighted MR, say), `style_autoencoder` is the one that can.

Air, on a normalised image: the voxels at or below `b + 0.05 (t - b)` with b and t the 0.5th and
99.5th percentile of the channel. A clipped window, SUV or percentile policy puts air at -1 exactly,
a z-score at its least values. A crop without air loses its darkest voxels to the air knot, which
the map takes along with the rest. Under `zscore` with `nonzero` the zeros are outside by the
policy's own word, and lie among the foreground's values: then `outside` is 0. C channels, K knots.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uharmony_model.errors import ConfigError, DataError, ExchangeError
from uharmony_model.exchange.schema import Schema, TensorSpec
from uharmony_model.prototypes import MIN_PATIENTS
from uharmony_model.task import Intensity, ZScore

KNOTS = 65
LOW, HIGH = 0.005, 0.995
"""The outermost quantiles; a volume's extremes are single voxels, noisy and a patient's own."""

AIR_MARGIN = 0.05
"""Share of a channel's range, above its floor, that is still air."""

MAX_INTENSITY = 100.0
"""No quantile of a normalised image lies farther from 0; a z-score of 100 is no style."""

QUANTILES = "intensity_quantiles"

_TIE = 1e-6  # knots closer than this share of their range are one: float32 cannot part them
_LEAST_KNOTS = 3

Vector = NDArray[np.float64]


def outside_value(policy: Intensity) -> float | None:
    """The value of the voxels that a policy itself puts outside, None where it names none."""
    return 0.0 if isinstance(policy, ZScore) and policy.nonzero else None


def probabilities(knots: int = KNOTS) -> Vector:
    """At which shares of the foreground the quantiles are taken, (K - 1,).

    Raises:
        ConfigError: there are too few knots for the air and a range.
    """
    if knots < _LEAST_KNOTS:
        raise ConfigError(f"{knots} knots, expected at least {_LEAST_KNOTS}: air and a range")
    return np.linspace(LOW, HIGH, knots - 1)


def quantile_function(
    image: NDArray[np.float32], knots: int = KNOTS, *, outside: float | None = None
) -> Vector:
    """The knots (C, K) of one normalised `image (C, D, H, W)`, non-decreasing in each channel.

    With `outside`, the voxels of that value are no foreground and all others are; the air knot is
    then the first quantile again, and means nothing.

    Raises:
        ConfigError: there are too few knots.
        DataError: a voxel is not finite, or a channel has one value only (a modality that the
            case lacks): there is no style in it, so leave the case out.
    """
    shares = probabilities(knots)
    found = np.empty((len(image), knots))
    for index, channel in enumerate(image):
        values = np.asarray(channel).reshape(-1)
        if not np.isfinite(values).all():
            raise DataError(f"channel {index} has voxels that are not finite; check its reading")
        bright, air = _foreground(values, index, outside)
        found[index, 1:] = np.quantile(bright.astype(np.float64), shares)
        # A mean in float64 of float32 values can end a rounding above them.
        found[index, 0] = min(found[index, 1], air.mean(dtype=np.float64) if air.size else np.inf)
    return found


class QuantileSum:
    """The mean style of a site's patients; each counts once, however many volumes it has."""

    def __init__(self) -> None:
        self._sums: dict[str, Vector] = {}
        self._volumes: dict[str, int] = {}

    @property
    def patients(self) -> int:
        """How many patients were added."""
        return len(self._sums)

    def add(self, patient: str, quantiles: Vector) -> None:
        """Add the knots (C, K) of one volume of a patient.

        Raises:
            DataError: they are not finite or not non-decreasing, or not shaped like those before.
        """
        values = np.array(quantiles, np.float64)
        before = next(iter(self._sums.values()), values)
        if values.ndim != 2 or values.shape != before.shape or _flaw(values) is not None:
            raise DataError(
                f"quantiles {values.shape}; expected non-decreasing finite ones of one shape "
                f"(C, K), here {before.shape}; take them from quantile_function"
            )
        self._sums[patient] = self._sums.get(patient, 0.0) + values
        self._volumes[patient] = self._volumes.get(patient, 0) + 1

    def mean(self, min_patients: int = MIN_PATIENTS) -> Vector:
        """The mean knots (C, K) over patients, summed in float64 in the order of their names.

        Raises:
            ConfigError: there are fewer patients than `min_patients`; nothing is told of them.
        """
        if self.patients < max(1, min_patients):
            raise ConfigError(
                f"{self.patients} patients, expected at least {max(1, min_patients)}; an intensity "
                "style of so few is not shared"
            )
        total = sum(self._sums[name] / self._volumes[name] for name in sorted(self._sums))
        mean: Vector = np.asarray(total, np.float64) / self.patients
        # Equal knots can part by a rounding in the wrong direction.
        return np.maximum.accumulate(mean, axis=1)


def to_style(
    image: Tensor, own: Vector, target: Vector, strength: float, *, outside: float | None = None
) -> Tensor:
    """`image (C, D, H, W)`, or a patch of it, with the target's intensities; float32 again.

    `own (C, K)` are the knots of the whole volume, so that all its patches are mapped alike;
    `target (C, K)` those of the style. `strength` 0 leaves the image as it is, 1 maps it fully.
    Beyond the outermost knots the map goes on with the slope of the whole foreground. Voxels of
    the value `outside` stay.

    Raises:
        ConfigError: the strength is not in [0, 1], or the shapes do not fit.
        DataError: the image's own knots are not an increasing function.
        ExchangeError: the target's are not.
    """
    if not 0 <= strength <= 1:
        raise ConfigError(f"strength is {strength}, expected 0 (as it is) to 1 (fully mapped)")
    if own.shape != target.shape or own.ndim != 2 or len(own) != len(image):
        raise ConfigError(
            f"own quantiles {own.shape}, target {target.shape}, image {tuple(image.shape)}; "
            "expected (C, K), (C, K) and (C, D, H, W)"
        )
    if (flaw := _flaw(own)) is not None:
        raise DataError(f"own quantiles: {flaw}; take them from quantile_function")
    if (flaw := _flaw(target)) is not None:
        raise ExchangeError(f"target quantiles: {flaw}")
    mapped = torch.empty_like(image)
    for index, channel in enumerate(image):
        x, y = (torch.from_numpy(k).to(image.device) for k in _knots(own[index], target[index]))
        values = channel.double()
        styled = (1 - strength) * values + strength * _interpolate(values, x, y)
        if outside is not None:
            styled = torch.where(channel == outside, values, styled)
        mapped[index] = styled.to(image.dtype)
    return mapped


def quantile_schema(channels: int, knots: int = KNOTS) -> Schema:
    """What a site's intensity style looks like on the wire: one tensor (C, K), no axis of space."""
    return Schema(tensors=(TensorSpec(name=QUANTILES, shape=(channels, knots)),))


def quantile_state(mean: Vector) -> dict[str, Tensor]:
    """A mean of `QuantileSum` as the float32 tensors of `quantile_schema`."""
    return {QUANTILES: torch.from_numpy(mean.astype(np.float32))}


def check_quantiles(state: Mapping[str, Tensor], channels: int, knots: int = KNOTS) -> Vector:
    """The knots (C, K) of a style that was received.

    Raises:
        ExchangeError: it is not the schema's tensor, or its numbers are no intensity style.
    """
    expected = quantile_schema(channels, knots)
    if set(state) != {QUANTILES} or Schema.of(state) != expected:
        got = {name: tuple(tensor.shape) for name, tensor in sorted(state.items())}
        raise ExchangeError(
            f"intensity style {str(got)[:200]}, expected {QUANTILES} ({channels}, {knots}) float32"
        )
    values: Vector = state[QUANTILES].detach().cpu().double().numpy()
    if (flaw := _flaw(values)) is not None:
        raise ExchangeError(f"intensity style: {flaw}")
    return values


def _foreground(
    values: NDArray[np.float32], index: int, outside: float | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The foreground of a channel (n,), and its air."""
    if outside is not None:
        values = values[values != np.float32(outside)]
    if not values.size or values.min() == values.max():
        raise DataError(
            f"channel {index} has one value only; there is no style in it, leave the case out"
        )
    if outside is not None:
        return values, values[:0]
    floor, top = np.percentile(values, [0.5, 99.5])
    if floor == top:  # nearly all voxels are one value, the rest is what there is to see
        floor, top = values.min(), values.max()
    bright = values > floor + AIR_MARGIN * (top - floor)
    return values[bright], values[~bright]


def _flaw(knots: Vector) -> str | None:
    """Why knots (C, K) are no intensity style; None where they are."""
    if not np.isfinite(knots).all():
        return "a number is not finite"
    if not (np.abs(knots) <= MAX_INTENSITY).all():
        return f"a number is beyond {MAX_INTENSITY:g}, expected normalised intensities"
    if (np.diff(knots, axis=1) < 0).any():
        return "a quantile is below the one before it"
    # Equal ends would map a whole image onto one value.
    if not (knots[:, -1] > knots[:, 1]).all():
        return "all quantiles of a channel are equal"
    return None


def _knots(own: Vector, target: Vector) -> tuple[Vector, Vector]:
    """Strictly increasing x, and y, with a knot added at each end for what lies beyond.

    Knots at one x (a clipped end, say) become one, at the mean of their targets.
    """
    gap = _TIE * (own[-1] - own[0])
    groups: list[list[int]] = []
    for index in range(len(own)):
        if groups and own[index] - own[groups[-1][0]] <= gap:
            groups[-1].append(index)
        else:
            groups.append([index])
    x = np.array([own[group].mean() for group in groups])
    y = np.array([target[group].mean() for group in groups])
    width = own[-1] - own[1]
    height = target[-1] - target[1]
    return (
        np.concatenate(([x[0] - width], x, [x[-1] + width])),
        np.concatenate(([y[0] - height], y, [y[-1] + height])),
    )


def _interpolate(values: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Piecewise linear through (x, y), continued with the outer slopes."""
    segment = torch.searchsorted(x, values.contiguous(), right=True).clamp(1, len(x) - 1) - 1
    slope = (y[1:] - y[:-1]) / (x[1:] - x[:-1])
    result: Tensor = y[segment] + (values - x[segment]) * slope[segment]
    return result
