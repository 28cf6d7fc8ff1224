"""A site's styles as a few points among 8-d style codes: what leaves in place of the codes.

    k-means of slice codes z_i, a slice weighing 1 / (slices of its patient)
    centroid_k = mean over patients of the patient's mean code in cluster k
    spread_k   = sqrt(mean over patients of their mean squared deviation from it), by number
    drawn code = centroid_k + scale spread_k n,   n ~ N(0, 1) cut off at 2, k uniform

For the global stage of a GLUA-style method, after the abstract of Su et al. 2022
(arXiv:2205.11888). DAR-UNet's public code clusters the slice codes of all target volumes (k = 6)
and decodes with one real code a cluster. Ours: only centroids and spreads leave, of clusters with
at least 5 patients; each patient weighs the same; drawing. A code of a slice is a patient's, and
their number tells of slices, so neither is given. What a centroid still tells is scanner and
protocol, which is its purpose. n slices, S numbers of a code, K clusters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from uharmony_model.errors import ConfigError, ExchangeError
from uharmony_model.exchange.schema import Schema, TensorSpec

CLUSTERS = 6
MIN_PATIENTS = 5
"""A cluster that fewer patients have slices in is not given."""

MAX_CLUSTERS = 64
MAX_CODE = 1000.0
"""No number of a code is farther from 0, nor a spread larger."""

CENTROIDS, SPREAD = "style_centroids", "style_spread"

_CUT = 2.0  # deviations; a decoder has not seen codes far out
_MAX_ITERATIONS = 100

Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class StyleCodes:
    """Centres `centroids (K, S)` of a site's styles, and deviations `spread (K, S)` about them."""

    centroids: Vector
    spread: Vector

    def state(self) -> dict[str, Tensor]:
        """The float32 tensors of `code_schema`."""
        return {
            CENTROIDS: torch.from_numpy(self.centroids.astype(np.float32)),
            SPREAD: torch.from_numpy(self.spread.astype(np.float32)),
        }


def style_codes(
    codes: ArrayLike,
    patients: Sequence[str],
    generator: np.random.Generator,
    *,
    clusters: int = CLUSTERS,
    min_patients: int = MIN_PATIENTS,
) -> StyleCodes:
    """The styles of slices with `codes (n, S)`, the i-th one of `patients[i]`.

    Raises:
        ConfigError: the codes are not finite (n, S), or not one a patient's name; or no cluster
            has slices of `min_patients` patients, so that nothing can be given.
    """
    values = np.asarray(codes, np.float64)
    if values.ndim != 2 or not values.size or len(values) != len(patients):
        raise ConfigError(
            f"style codes {values.shape} of {len(patients)} slices; expected (n, S), a patient each"
        )
    if not np.isfinite(values).all() or not 1 <= clusters <= MAX_CLUSTERS:
        raise ConfigError(
            f"{clusters} clusters of style codes, expected 1 to {MAX_CLUSTERS} of finite codes"
        )
    names, owner, slices = np.unique(np.asarray(patients), return_inverse=True, return_counts=True)
    chosen = k_means(values, 1 / slices[owner], clusters, generator)
    found = [_of_cluster(values[chosen == k], owner[chosen == k]) for k in range(clusters)]
    # By the first number and on: the order of k-means is drawn, and a small cluster leaves no gap.
    given = sorted(
        (tuple(centroid), tuple(spread))
        for centroid, spread, count in found
        if count >= max(1, min_patients)
    )
    if not given:
        raise ConfigError(
            f"no style cluster of {len(names)} patients has {max(1, min_patients)}; nothing of so "
            "few is shared: ask for fewer clusters, or give no style"
        )
    return StyleCodes(np.array([g[0] for g in given]), np.array([g[1] for g in given]))


def k_means(
    codes: Vector, weights: Vector, clusters: int, generator: np.random.Generator
) -> NDArray[np.intp]:
    """The cluster (n,) of each of `codes (n, S)`, 0 to `clusters - 1`, some perhaps empty.

    Lloyd 1982 with `weights (n,)`, from starts drawn as k-means++ does (Arthur and Vassilvitskii
    2007): with a probability that grows with the squared distance from those drawn before.
    """
    centres = codes[[generator.choice(len(codes), p=weights / weights.sum())]]
    while len(centres) < clusters:
        mass = weights * _squared(codes, centres).min(1)
        if not mass.sum() > 0:  # fewer different codes than clusters
            break
        centres = np.vstack((centres, codes[generator.choice(len(codes), p=mass / mass.sum())]))
    chosen: NDArray[np.intp] = _squared(codes, centres).argmin(1)
    for _ in range(_MAX_ITERATIONS):
        for k in range(len(centres)):
            if (chosen == k).any():  # an empty one stays where it was
                centres[k] = np.average(codes[chosen == k], axis=0, weights=weights[chosen == k])
        nearest = _squared(codes, centres).argmin(1)
        if (nearest == chosen).all():
            break
        chosen = nearest
    return chosen


def sample_code(
    centroids: Vector, spread: Vector, generator: np.random.Generator, *, scale: float = 1.0
) -> Tensor:
    """A style code (S,) float32 about one of `centroids (K, S)`, for a whole volume or a step.

    Raises:
        ConfigError: the shapes differ, or the scale is negative.
    """
    if centroids.ndim != 2 or not len(centroids) or centroids.shape != spread.shape or scale < 0:
        raise ConfigError(
            f"centroids {centroids.shape}, spread {spread.shape}, scale {scale}; expected (K, S) "
            "twice and a scale of at least 0"
        )
    k = int(generator.integers(len(centroids)))
    noise = np.clip(generator.standard_normal(centroids.shape[1]), -_CUT, _CUT)
    return torch.from_numpy((centroids[k] + scale * spread[k] * noise).astype(np.float32))


def style_around(given: Sequence[StyleCodes]) -> StyleCodes:
    """One wide style about all that sites gave, for a site that gives none: K = 1. Ours.

    Each site counts once: mean of its centroids; the spread holds what is within and between.

    Raises:
        ConfigError: no site gave a style.
    """
    if not given:
        raise ConfigError("no site gave a style; without any there is nothing to draw around")
    centre = np.mean([codes.centroids.mean(0) for codes in given], axis=0)
    squared = [
        (np.square(codes.spread) + np.square(codes.centroids - centre)).mean(0) for codes in given
    ]
    return StyleCodes(centre[None], np.sqrt(np.mean(squared, axis=0))[None])


def code_schema(clusters: int, style_dim: int) -> Schema:
    """What a site's styles look like on the wire: two tensors (K, S), no axis of space.

    Raises:
        ExchangeError: the number of clusters, which is the sender's word, is out of bounds.
    """
    if not 1 <= clusters <= MAX_CLUSTERS:
        raise ExchangeError(f"{clusters} style clusters, expected 1 to {MAX_CLUSTERS}")
    shape = (clusters, style_dim)
    return Schema(tensors=tuple(TensorSpec(name=n, shape=shape) for n in (CENTROIDS, SPREAD)))


def check_codes(state: Mapping[str, Tensor], clusters: int, style_dim: int) -> StyleCodes:
    """The styles of a site as they were received, K = `clusters` of S = `style_dim` numbers.

    Raises:
        ExchangeError: they are not the schema's tensors, or not finite, bounded and a spread.
    """
    expected = code_schema(clusters, style_dim)
    if set(state) != {CENTROIDS, SPREAD} or Schema.of(state) != expected:
        got = {name: tuple(tensor.shape) for name, tensor in sorted(state.items())}
        raise ExchangeError(
            f"styles {str(got)[:200]}, expected {CENTROIDS} and {SPREAD} ({clusters}, {style_dim})"
        )
    centroids, spread = (state[n].detach().cpu().double().numpy() for n in (CENTROIDS, SPREAD))
    # A comparison with a number that is not one is false, so these refuse it too.
    if not (np.abs(centroids) <= MAX_CODE).all():
        raise ExchangeError(f"a style centroid is not finite or beyond {MAX_CODE:g}")
    if not ((spread >= 0) & (spread <= MAX_CODE)).all():
        raise ExchangeError(f"a style spread is not finite, negative or beyond {MAX_CODE:g}")
    return StyleCodes(centroids, spread)


def _of_cluster(codes: Vector, owner: NDArray[np.intp]) -> tuple[Vector, Vector, int]:
    """Centroid (S,), spread (S,) and number of patients of one cluster's codes (m, S)."""
    members, inverse, slices = np.unique(owner, return_inverse=True, return_counts=True)
    if not len(members):
        nothing = np.zeros(codes.shape[1])
        return nothing, nothing, 0
    weights = 1 / (slices[inverse] * len(members))
    centroid = weights @ codes
    spread = np.sqrt(weights @ np.square(codes - centroid))
    return centroid, spread, len(members)


def _squared(codes: Vector, centres: Vector) -> Vector:
    """Squared distances (n, K)."""
    distances: Vector = np.square(codes[:, None] - centres).sum(-1)
    return distances
