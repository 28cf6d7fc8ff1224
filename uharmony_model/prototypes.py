"""A domain's prototype: the mean descriptor of its patients, and how it may leave a site.

A prototype of descriptors u_i (one row a patient) is p = sum_i u_i / n. What is released carries
differential privacy by the classical Gaussian mechanism (Dwork and Roth 2014, theorem A.1):

    rows clipped to norm c;   replacing one patient moves p by 2 c / n at most
    sigma = (2 c / n) sqrt(2 ln(1.25 / delta)) / epsilon       valid for epsilon <= 1, one release

That covers the prototype alone. Experts, and the limit of `uharmony_model.abstention`, are
trained on or computed from patients without such a claim. Fewer coordinates, a public projection
and the rule of `publishable` are ours. n patients, D numbers of a descriptor, d of a released one.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from uharmony_model.errors import ConfigError
from uharmony_model.frozen import Frozen
from uharmony_model.randomness import numpy_generator
from uharmony_model.task import Name

MIN_PATIENTS = 10
"""Nothing made of fewer patients leaves a site."""

MAX_RELEASED = 16
"""Numbers of a released prototype: its noise grows with their square root."""

_FLOOR = 0.01  # least scale of a coordinate, as a share of the largest

Vector = NDArray[np.float64]
Numbers = Annotated[tuple[float, ...], Field(min_length=1, max_length=4096)]


class Prototype(Frozen):
    """A domain's mean descriptor, of how many patients, and what was done to it.

    `spread` are the sums of squared deviations from the mean by coordinate; together with those of
    other domains they give the common scale. A released prototype has none: it would need noise of
    its own. `noise` is sigma of a coordinate, 0 where none was added.
    """

    domain: Name
    mean: Numbers
    patients: PositiveInt
    spread: tuple[NonNegativeFloat, ...] | None = None
    noise: NonNegativeFloat = 0.0
    epsilon: PositiveFloat | None = None
    delta: PositiveFloat | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Prototype:
        if self.spread is not None and len(self.spread) != len(self.mean):
            raise ValueError(f"spread has {len(self.spread)} numbers, mean {len(self.mean)}")
        if self.epsilon is not None and (self.spread is not None or not self.noise):
            raise ValueError("a private prototype has noise and no spread")
        return self

    @property
    def noise_norm(self) -> float:
        """Root mean square of the noise's norm, `sigma sqrt(d)`; its mean is a little below."""
        return self.noise * math.sqrt(len(self.mean))


@dataclass(frozen=True, eq=False)
class PublicFrame:
    """Coordinates in which prototypes are released: `z = P ((u - center) / scale) / sqrt(d)`.

    `center (D,)` and `scale (D,)` must be known without the patients whose rows are released: from
    phantoms, public volumes, or a convention. Taken from the rows, they would tell of them without
    any noise. `projection (d, D)` has orthonormal rows, so it makes no norm longer. A row that is
    one scale away from the centre in every coordinate has a norm of about one.
    """

    center: Vector
    scale: Vector
    projection: Vector

    @classmethod
    def of(
        cls,
        dimension: int,
        *,
        seed: int,
        coordinates: int = MAX_RELEASED,
        center: ArrayLike = 0.0,
        scale: ArrayLike = 1.0,
    ) -> PublicFrame:
        """The frame of descriptors of D = `dimension` numbers; `seed` is the study's.

        Raises:
            ConfigError: a scale is not positive, or the shapes do not fit.
        """
        try:
            middle = np.broadcast_to(np.asarray(center, np.float64), (dimension,))
            width = np.broadcast_to(np.asarray(scale, np.float64), (dimension,))
        except ValueError:
            raise ConfigError(f"center and scale must be one number or {dimension} each") from None
        if not (np.isfinite(middle).all() and np.isfinite(width).all() and (width > 0).all()):
            raise ConfigError("center must be finite and scale above 0; give public values")
        kept = min(coordinates, dimension)
        if not 1 <= kept <= MAX_RELEASED:
            raise ConfigError(f"{coordinates} coordinates; expected 1 to {MAX_RELEASED}")
        if kept == dimension:
            return cls(middle, width, np.eye(dimension))
        drawn = numpy_generator(seed, "prototype projection").standard_normal((dimension, kept))
        return cls(middle, width, np.linalg.qr(drawn)[0].T)

    def rows(self, descriptors: ArrayLike) -> Vector:
        """Descriptors (n, D), or one (D,), in this frame: (n, d) or (d,)."""
        standard = (np.asarray(descriptors, np.float64) - self.center) / self.scale
        projected: Vector = standard @ self.projection.T / math.sqrt(len(self.projection))
        return projected


def prototype_of(domain: str, rows: ArrayLike) -> Prototype:
    """The exact prototype of `rows (n, D)`, one row a patient, for use inside a site.

    Raises:
        ConfigError: there is no row, or a number is not finite.
    """
    values = _checked(rows)
    mean = values.mean(0)
    spread = np.square(values - mean).sum(0)
    return Prototype(
        domain=domain,
        mean=tuple(mean.tolist()),
        patients=len(values),
        spread=tuple(spread.tolist()),
    )


def release_prototype(
    domain: str,
    rows: ArrayLike,
    *,
    epsilon: float,
    delta: float,
    clip: float = 1.0,
    gauss: Callable[[float, float], float] | None = None,
) -> Prototype:
    """A prototype of `rows (n, d)` that may leave: (epsilon, delta)-private, for replace-one.

    One row a patient, in a `PublicFrame`; rows longer than `clip` are shortened to it. The count n
    is public, since neighbours have equal counts. The claim is for one release: a second one of
    the same patients adds its epsilon and delta. `gauss(mean, deviation)` draws one number.

    Raises:
        ConfigError: too few patients, too many numbers, or a budget that the theorem does not
            cover.
    """
    values = _checked(rows)
    count, dimension = values.shape
    require_patients(count)
    if dimension > MAX_RELEASED:
        raise ConfigError(
            f"a prototype of {dimension} numbers, expected {MAX_RELEASED} at most; project its "
            "rows with a PublicFrame, since noise grows with their number"
        )
    if not 0 < epsilon <= 1:
        raise ConfigError(f"epsilon is {epsilon}; expected above 0 and at most 1")
    if not 0 < delta < 1 / count:
        # From 1 / n on, publishing one patient's row as it is would count as private.
        raise ConfigError(f"delta is {delta}; expected above 0 and below 1/{count} patients")
    if not (clip > 0 and math.isfinite(clip)):
        raise ConfigError(f"clip is {clip}; expected a norm above 0")
    sigma = noise_deviation(count, epsilon=epsilon, delta=delta, clip=clip)
    if gauss is None:
        # Not from the study's seed: that is public, so anyone could draw the same noise and take
        # it off again. Every bit of it comes from the operating system.
        gauss = secrets.SystemRandom().gauss
    noisy = clipped(values, clip).mean(0) + np.array([gauss(0.0, sigma) for _ in range(dimension)])
    # The last bits of a sum of floats can tell which noise was possible (Mironov 2012). The grid
    # is a power of two, about a thousandth of sigma, which is public.
    grid = 2.0 ** (math.floor(math.log2(sigma)) - 10)
    rounded = np.round(noisy / grid) * grid
    return Prototype(
        domain=domain,
        mean=tuple(rounded.tolist()),
        patients=count,
        noise=sigma,
        epsilon=epsilon,
        delta=delta,
    )


def noise_deviation(count: int, *, epsilon: float, delta: float, clip: float = 1.0) -> float:
    """The noise's sigma in one coordinate of a prototype of `count` patients."""
    return 2 * clip / count * math.sqrt(2 * math.log(1.25 / delta)) / epsilon


def clipped(rows: Vector, clip: float) -> Vector:
    """`rows (n, d)`, those longer than `clip` shortened to it."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    shorter: Vector = rows * np.minimum(1.0, clip / np.maximum(norms, clip))
    return shorter


def require_patients(count: int) -> None:
    """Refuse to publish what is made of too few patients.

    Raises:
        ConfigError: there are fewer than `MIN_PATIENTS`.
    """
    if count < MIN_PATIENTS:
        raise ConfigError(
            f"{count} patients, expected at least {MIN_PATIENTS}; what is made of so few is not "
            "published"
        )


def publishable(prototypes: Sequence[Prototype]) -> tuple[bool, ...]:
    """Which prototypes are worth publishing: their noise is at most half the smallest distance.

    Give them as they were released: what is decided from exact ones would tell of the patients
    again. Noise lengthens a squared distance by the squared noise norms of both, which is taken
    off first. A single prototype has nothing that it could be mistaken for.

    Raises:
        ConfigError: they differ in the number of their coordinates.
    """
    means = stacked_means(prototypes)
    norms = np.array([prototype.noise_norm for prototype in prototypes])
    squared = np.square(means[:, None] - means).sum(-1)
    corrected = np.maximum(squared - norms[:, None] ** 2 - norms**2, 0.0)
    np.fill_diagonal(corrected, np.inf)
    half = 0.5 * math.sqrt(float(corrected.min()))
    return tuple(bool(norm <= half) for norm in norms)


def stacked_means(prototypes: Sequence[Prototype]) -> Vector:
    """The means (K, d) of K prototypes.

    Raises:
        ConfigError: there is none, or they differ in their coordinates or repeat a domain.
    """
    if len({len(prototype.mean) for prototype in prototypes}) != 1:
        lengths = sorted({len(prototype.mean) for prototype in prototypes})
        raise ConfigError(f"prototypes of {lengths} numbers; expected some, all of one length")
    names = [prototype.domain for prototype in prototypes]
    if len(set(names)) != len(names):
        raise ConfigError(f"prototypes of {', '.join(sorted(names)):.200}; name each domain once")
    return np.array([prototype.mean for prototype in prototypes], np.float64)


def common_scale(prototypes: Sequence[Prototype]) -> Vector:
    """A deviation by coordinate (d,), shared by all domains: pooled within them.

    `sqrt(sum_k spread_k / sum_k (n_k - 1))`, at least a hundredth of the largest, so that a
    coordinate that hardly varies does not decide alone (the floor is ours). Ones for released
    prototypes, whose frame has a scale of its own, and where nothing varies.

    Raises:
        ConfigError: some prototypes have a spread and others have none.
    """
    means = stacked_means(prototypes)
    spreads = [prototype.spread for prototype in prototypes if prototype.spread is not None]
    if not spreads:
        return np.ones(means.shape[1])
    if len(spreads) != len(prototypes):
        raise ConfigError("some prototypes are released and some exact; use one kind")
    freedom = sum(prototype.patients - 1 for prototype in prototypes)
    scale = np.sqrt(np.array(spreads, np.float64).sum(0) / max(freedom, 1))
    if not scale.any():
        return np.ones(means.shape[1])
    floored: Vector = np.maximum(scale, _FLOOR * scale.max())
    return floored


def _checked(rows: ArrayLike) -> Vector:
    values = np.asarray(rows, np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ConfigError(
            f"rows of shape {values.shape}; expected finite numbers (n, d), one row a patient"
        )
    return values
