"""What a volume looks like to the first convolution: the vector by which a gate knows a scanner.

    u = [mu, log sigma]      per channel, over the whole output of the first convolution

Taken before any norm and with all residuals zero: a norm takes away the very mean and deviation
that tell scanners apart, and a residual would depend on the choice that u has to make. After BNE
(arXiv:2011.12672), which compares the statistics of all batch norms; the first layer alone, log
sigma, and the raw intensities are ours. C channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from uharmony_model.errors import DataError, NetworkError
from uharmony_model.harmonic_layer import HarmonicNorm
from uharmony_model.harmonize import CHANNEL_AXIS
from uharmony_model.segmentation_network import SegmentationNetwork

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
EPS = 1e-5  # added to a variance, as stage 1 of the harmonisation layer does
_LEAST_HALO = 4  # voxels around a window; enough for first kernels of up to 9 voxels

Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean (C,) and sum of squared deviations (C,) of some voxels, per channel."""

    count: int
    mean: Vector
    squares: Vector

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """The moments of `values (C, ...)`."""
        flat = values.flatten(1).to("cpu", torch.float64)
        mean = flat.mean(1)
        return cls(flat.shape[1], mean.numpy(), (flat - mean[:, None]).square().sum(1).numpy())

    def __add__(self, other: Moments) -> Moments:
        """The moments of both together, exact but for rounding.

        After Chan, Golub and LeVeque 1983, equation 1.5.
        """
        count = self.count + other.count
        apart = other.mean - self.mean
        return Moments(
            count,
            self.mean + apart * (other.count / count),
            self.squares + other.squares + apart**2 * (self.count * other.count / count),
        )

    @property
    def statistics(self) -> Vector:
        """`[mu, log sigma]` (2 C,), with the biased variance that instance norms use."""
        log_sigma = 0.5 * np.log(self.squares / self.count + EPS)
        return np.concatenate((self.mean, log_sigma))


def describe(
    network: SegmentationNetwork,
    image: Tensor | NDArray[Any],
    *,
    window: Sequence[int] | None = None,
    raw: NDArray[Any] | None = None,
) -> Vector:
    """The descriptor of one normalised `image (C, D, H, W)`, one vector a volume.

    `window` (D, H, W), in voxels, bounds what is computed at once; the result does not depend on
    it. `raw (C, D, H, W)` is the volume before normalisation: its quantiles are appended, since a
    z-score of each volume has taken its scanner's mean and scale away.

    Raises:
        NetworkError: a pass reaches no norm layer.
        DataError: the volume has voxels that are not finite.
    """
    volume = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    volume = volume.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(volume).all()):
        raise DataError("a volume to describe has voxels that are not finite; check its reading")
    parts = list(_stem_moments(network, volume, window))
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return np.concatenate((total.statistics, *(() if raw is None else (raw_quantiles(raw),))))


def raw_quantiles(raw: NDArray[Any]) -> Vector:
    """Five quantiles of each channel of `raw (C, D, H, W)`, on an asinh scale, as (5 C,).

    asinh is linear near zero and a signed logarithm far from it, so that HU, SUV and the arbitrary
    units of MR fit one scale. Ours.

    Raises:
        DataError: a voxel is not finite.
    """
    if not np.isfinite(raw).all():
        raise DataError("a raw volume has voxels that are not finite; check its reading")
    found = [np.quantile(channel.reshape(-1), QUANTILES) for channel in np.asarray(raw)]
    return np.arcsinh(np.concatenate(found).astype(np.float64))


def _stem_moments(
    network: SegmentationNetwork, volume: Tensor, window: Sequence[int] | None
) -> Iterator[Moments]:
    multiple = network.multiple or 1
    extents = tuple(volume.shape[1:])
    # Twice the strides is what every network accepts; what lies in the padding is not counted.
    padded = tuple(max(2, math.ceil(extent / multiple)) * multiple for extent in extents)
    filled = volume.amin(dim=(1, 2, 3), keepdim=True).repeat(1, *padded)
    filled[:, : extents[0], : extents[1], : extents[2]] = volume
    if window is None or network.multiple is None:
        edges = padded
    else:
        edges = tuple(max(multiple, edge // multiple * multiple) for edge in window)
    halo = math.ceil(_LEAST_HALO / multiple) * multiple
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    # A window whose start lies in the padding holds nothing to count.
    starts = [range(0, extent, edge) for extent, edge in zip(extents, edges, strict=True)]
    for corner in itertools.product(*starts):
        cut, keep = [], []
        for start, edge, size, extent in zip(corner, edges, padded, extents, strict=True):
            low, high = max(0, start - halo), min(size, start + edge + halo)
            cut.append(slice(low, high))
            keep.append((start - low, min(start + edge, extent) - low))
        piece = filled[(slice(None), *cut)]
        output = _before_first_norm(network, piece[None].to(device))
        yield Moments.of(output[(slice(None), *_cropped(piece, output, keep))])


def _cropped(piece: Tensor, output: Tensor, keep: Sequence[tuple[int, int]]) -> Iterator[slice]:
    """Where the voxels `keep` of a window lie in the output, which may be strided."""
    for size, made, (low, high) in zip(piece.shape[1:], output.shape[1:], keep, strict=True):
        stride = max(1, round(size / made))
        yield slice(low // stride, math.ceil(high / stride))


class _ReachedError(Exception):
    """The pass has come to the first norm; the rest of the network is not needed."""


def _before_first_norm(network: SegmentationNetwork, x: Tensor) -> Tensor:
    """What the first norm layer that a pass reaches is given, (C', D', H', W') for x (1, ...)."""
    caught: list[Tensor] = []

    def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, HarmonicNorm):
            axis = module.channel_axis
        else:
            axis = CHANNEL_AXIS[type(module)]
        caught.append(inputs[0].movedim(axis, 1))
        raise _ReachedError

    # All norms, not only harmonised ones: where the encoder keeps its own, the first harmonised
    # one comes too late, behind norms that have taken the scanner's statistics away.
    handles = [
        module.register_forward_pre_hook(stop)
        for module in network.modules()
        if isinstance(module, HarmonicNorm) or type(module) in CHANNEL_AXIS
    ]
    try:
        with torch.no_grad():
            network(x)
    except _ReachedError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if not caught or caught[0].ndim != 5:
        raise NetworkError(
            f"{type(network.network).__name__} has no norm over (B, C, D, H, W) behind its first "
            "convolution; a descriptor needs one"
        )
    return caught[0][0]
