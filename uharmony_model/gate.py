"""The gate: how much of each domain a volume of no known domain gets.

    w = softmax_j(-||u - p_j||^2 / tau)         u (d,) a descriptor, p_j (d,) the prototype of j

U-Harmony (arXiv:2601.14605) has a soft gate over prototypes; its distance, its temperature and
whether it mixes parameters or outputs are not known to us. Ours: the distance in units of the
domains' common scale, tau from the prototypes themselves, and weights that mix the parameters, so
that one pass is enough. K domains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from uharmony_model.errors import ConfigError, DataError
from uharmony_model.prototypes import Prototype, common_scale, stacked_means

SHARPNESS = 4.0
"""The default tau is the median squared distance between prototypes, divided by this. So a volume
that lies on one of two prototypes gives the other a weight of e^-4, about 2 %, and one that lies
half-way gives both the same."""

Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Choice:
    """What a gate says of one volume: weights (K,) that sum to one, distances (K,), by domain.

    Distances are Euclidean, in units of the common scale.
    """

    domains: tuple[str, ...]
    weights: Vector
    distances: Vector

    @property
    def nearest(self) -> str:
        """The domain with the smallest distance; the first of equal ones."""
        return self.domains[int(self.distances.argmin())]

    @property
    def distance(self) -> float:
        """How far the nearest prototype is."""
        return float(self.distances.min())


@dataclass(frozen=True, eq=False)
class Gate:
    """Prototypes `means (K, d)` in units of `scale (d,)`, and the temperature tau."""

    domains: tuple[str, ...]
    means: Vector
    scale: Vector
    temperature: float

    @classmethod
    def of(cls, prototypes: Sequence[Prototype], *, temperature: float | None = None) -> Gate:
        """The gate over some prototypes; without a `temperature` they give it (see `SHARPNESS`).

        Raises:
            ConfigError: the prototypes do not fit each other, or the temperature is not positive.
        """
        means, scale = stacked_means(prototypes), common_scale(prototypes)
        tau = default_temperature(means / scale) if temperature is None else temperature
        if not (tau > 0 and math.isfinite(tau)):
            raise ConfigError(f"the gate's temperature is {tau}; expected above 0")
        return cls(tuple(p.domain for p in prototypes), means, scale, tau)

    def distances(self, descriptors: ArrayLike) -> Vector:
        """Distances (..., K) of descriptors (..., d) to the prototypes.

        Raises:
            DataError: the descriptors have another length, or are not finite.
        """
        u = np.asarray(descriptors, np.float64)
        if u.shape[-1:] != self.scale.shape or not np.isfinite(u).all():
            raise DataError(
                f"a descriptor of shape {u.shape}, expected {len(self.scale)} finite numbers; "
                "was it made with the prototypes' network and frame?"
            )
        apart = (u[..., None, :] - self.means) / self.scale
        return np.asarray(np.linalg.norm(apart, axis=-1), np.float64)

    def choose(self, descriptor: ArrayLike, kind: Literal["soft", "nearest"] = "soft") -> Choice:
        """Weigh the domains for one descriptor (d,); `nearest` gives all to one domain.

        Raises:
            DataError: the descriptor has another length, or is not finite.
        """
        distances = self.distances(descriptor)
        if kind == "nearest":
            weights = np.zeros(len(distances))
            weights[distances.argmin()] = 1.0
        else:
            # Less the smallest first: the exponent of a far volume would underflow for all.
            squared = np.square(distances)
            weights = np.exp(-(squared - squared.min()) / self.temperature)
            weights /= weights.sum()
        return Choice(self.domains, weights, distances)


def default_temperature(points: Vector) -> float:
    """The default tau of scaled prototypes (K, d), see `SHARPNESS`; 1 where they coincide."""
    first, second = np.triu_indices(len(points), k=1)
    squared = np.square(points[first] - points[second]).sum(-1)
    median = float(np.median(squared)) if squared.size else 0.0
    return median / SHARPNESS if median > 0 else 1.0
