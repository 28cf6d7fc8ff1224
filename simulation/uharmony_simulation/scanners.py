"""Simulated scanners: a domain is one fixed set of image effects, and its strength is a number.

A scanner's parameters are drawn once from (study seed, domain) as a direction and multiplied by
the strength, so 0 is the identity, and twice the strength is twice every parameter. Only noise
and the phase of motion differ from case to case. The order is that of an acquisition: tissue
contrast, coil sensitivity, slices, in-plane blur, motion, k-space truncation, thermal noise.

Everything acts on a magnitude image: intensities relative to the volume's darkest value and its
99.5th percentile, so that air stays dark in all units (HU, SUV or arbitrary).

Arrays are `(D, H, W)` on RAS axes; lengths are in mm.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from monai.transforms.intensity.array import GibbsNoise, RandRicianNoise
from pydantic import Field, NonNegativeFloat
from scipy.ndimage import gaussian_filter1d

from uharmony_model.errors import ConfigError, DataError
from uharmony_model.frozen import Frozen
from uharmony_model.randomness import numpy_generator, numpy_state

Volume = npt.NDArray[np.float32]

Effect = Literal["contrast", "bias", "resolution", "noise"]
EFFECTS: tuple[Effect, ...] = get_args(Effect)

MAX_STRENGTH = 10.0
AIR = 0.05  # below this fraction of the range nothing is remapped: inverted contrast keeps dark air
SEGMENTS = 5  # pieces of the contrast curve
DEGREE = 3  # of the bias field's polynomial
AXES: tuple[Literal[0], Literal[1], Literal[2]] = (0, 1, 2)
MAX_GIBBS = 0.7  # MONAI keeps the frequencies within 1 - alpha of the largest radius
FWHM_PER_SIGMA = 2.0 * np.sqrt(2.0 * np.log(2.0))


class Scanner(Frozen):
    """One domain's parameters; all zero is the identity. It goes into the run's record as JSON."""

    domain: str
    strength: Annotated[float, Field(ge=0, le=MAX_STRENGTH)] = 0.0
    inverted: bool = False
    log_slopes: Annotated[tuple[float, ...], Field(min_length=SEGMENTS, max_length=SEGMENTS)] = (
        0.0,
    ) * SEGMENTS
    """Log slopes of the pieces of the monotone contrast curve."""
    bias: Annotated[tuple[float, ...], Field(min_length=19, max_length=19)] = (0.0,) * 19
    """Legendre coefficients of the log bias field, degree 1 to 3, in the order of `_bias_terms`."""
    slice_axis: Literal[0, 1, 2] = 2
    slice_mm: NonNegativeFloat = 0.0
    """How much thicker than the voxel a slice is."""
    blur_mm: NonNegativeFloat = 0.0
    """Full width at half maximum of the blur within a slice."""
    motion_mm: NonNegativeFloat = 0.0
    """Largest displacement along the phase-encoding axis while a part of k-space is read."""
    gibbs: Annotated[float, Field(ge=0, le=MAX_GIBBS)] = 0.0
    noise: NonNegativeFloat = 0.0
    """Deviation of the Rician noise as a fraction of the volume's intensity range."""

    @property
    def is_identity(self) -> bool:
        """Whether an image comes out as it went in."""
        amounts = (self.slice_mm, self.blur_mm, self.motion_mm, self.gibbs, self.noise)
        return not (self.inverted or any(self.log_slopes) or any(self.bias) or any(amounts))


def draw_scanner(
    study_seed: int,
    domain: str,
    strength: float,
    *,
    invert: bool = False,
    motion: bool = False,
    effects: Collection[Effect] = EFFECTS,
) -> Scanner:
    """Draw a domain's scanner: strength 1 is a plausible other scanner, 3 a hard one.

    `effects` limits it to some of its effects; the others are as at strength 0. `invert` turns the
    contrast over (T1-like to T2-like) at any strength above 0; without it, a domain turns over by
    itself somewhere above strength 1, or never.

    Raises:
        ConfigError: the strength is not within 0 to 10.
    """
    if not 0 <= strength <= MAX_STRENGTH:
        raise ConfigError(
            f"scanner strength of domain '{domain}': got {strength}, expected 0 (identity) to"
            f" {MAX_STRENGTH:g}; 1 is a plausible other scanner"
        )
    # All draws are made whatever the strength, so the direction depends on seed and domain alone.
    rng = numpy_generator(study_seed, domain, "scanner")
    slopes = rng.uniform(-0.6, 0.6, SEGMENTS)
    degrees = np.array([sum(term) for term in _bias_terms()])
    bias = rng.uniform(-0.15, 0.15, len(degrees)) / degrees
    tendency = rng.uniform(0.0, 1.0)
    axis: Literal[0, 1, 2] = AXES[int(rng.integers(3))]
    slice_mm, blur_mm = rng.uniform(1.0, 4.0), rng.uniform(0.5, 3.0)
    gibbs, noise, motion_mm = rng.uniform(0.1, 0.4), rng.uniform(0.01, 0.05), rng.uniform(1.0, 4.0)
    contrast, coil, blurred, rough = (
        strength if name in effects else 0.0 for name in ("contrast", "bias", "resolution", "noise")
    )
    return Scanner(
        domain=domain,
        strength=strength,
        inverted=strength > 0 and (invert or contrast * tendency > 1),
        log_slopes=tuple(float(value) for value in contrast * slopes),
        bias=tuple(float(value) for value in coil * bias),
        slice_axis=axis,
        slice_mm=blurred * slice_mm,
        blur_mm=blurred * blur_mm,
        motion_mm=strength * motion_mm if motion else 0.0,
        gibbs=min(blurred * gibbs, MAX_GIBBS),
        noise=rough * noise,
    )


def apply_scanner(
    scanner: Scanner,
    image: npt.NDArray[np.floating[Any]],
    spacing_mm: tuple[float, float, float],
    seed: int,
    case: str | int = 0,
) -> Volume:
    """What this scanner makes of an image `(D, H, W)`: same grid, float32, a new array.

    Raises:
        DataError: the image is not three-dimensional or not finite.
    """
    if image.ndim != 3 or image.size == 0:
        raise DataError(f"simulated scanner: expected an image (D, H, W), got shape {image.shape}")
    source: Volume = np.array(image, dtype=np.float32)
    if not np.isfinite(source).all():
        raise DataError("simulated scanner: the image holds NaN or infinity; clean it first")
    low, high = float(source.min()), float(np.percentile(source, 99.5))
    high = high if high > low else float(source.max())
    if scanner.is_identity or high <= low:
        return source
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    signal: npt.NDArray[np.float64] = (source.astype(np.float64) - low) / (high - low)
    if scanner.inverted or any(scanner.log_slopes):
        signal = _remap(signal, scanner)
    if any(scanner.bias):
        signal = signal * bias_field(scanner.bias, source.shape)
    if scanner.slice_mm:
        signal = _thicken(signal, scanner, spacing)
    if scanner.blur_mm:
        signal = _blur(signal, scanner, spacing)
    if scanner.motion_mm:
        signal = _move(signal, scanner, spacing, numpy_generator(seed, case, "scanner-motion"))
    if scanner.gibbs:
        # Tested at 0 above: MONAI's filter cuts the corners of 3D k-space even at alpha 0.
        signal = np.abs(np.asarray(GibbsNoise(alpha=scanner.gibbs)(signal[None]))[0])
    if scanner.noise:
        rician = RandRicianNoise(prob=1.0, std=scanner.noise, sample_std=False, dtype=np.float64)
        rician.set_random_state(state=numpy_state(seed, case, "scanner-noise"))
        signal = np.asarray(rician(signal[None]))[0]
    return (low + signal * (high - low)).astype(np.float32)


def bias_field(coefficients: tuple[float, ...], shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """The positive, smooth factor of the coil: exp of a Legendre polynomial over the volume."""
    matrix = np.zeros((DEGREE + 1,) * 3)
    for term, coefficient in zip(_bias_terms(), coefficients, strict=True):
        matrix[term] = coefficient
    x, y, z = (np.linspace(-1.0, 1.0, size) for size in shape)
    field: npt.NDArray[np.float64] = np.exp(np.polynomial.legendre.leggrid3d(x, y, z, matrix))
    return field


def _bias_terms() -> list[tuple[int, int, int]]:
    degrees = range(DEGREE + 1)
    terms = [(i, j, k) for i in degrees for j in degrees for k in degrees]
    return [term for term in terms if 1 <= sum(term) <= DEGREE]


def _remap(signal: npt.NDArray[np.float64], scanner: Scanner) -> npt.NDArray[np.float64]:
    heights = np.exp(np.asarray(scanner.log_slopes) - max(scanner.log_slopes))
    knots = np.concatenate([[0.0], np.cumsum(heights) / heights.sum()])
    tissue = (signal - AIR) / (1.0 - AIR)
    curve = np.interp(tissue, np.linspace(0.0, 1.0, SEGMENTS + 1), knots)
    # The brightest half per cent goes on at the last piece's slope, instead of saturating.
    curve += np.maximum(tissue - 1.0, 0.0) * (knots[-1] - knots[-2]) * SEGMENTS
    if scanner.inverted:
        curve = np.maximum(1.0 - curve, 0.0)
    remapped: npt.NDArray[np.float64] = np.where(signal > AIR, AIR + (1.0 - AIR) * curve, signal)
    return remapped


def _thicken(
    signal: npt.NDArray[np.float64], scanner: Scanner, spacing: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Average over contiguous slices of the given thickness, then interpolate back linearly."""
    axis, size = scanner.slice_axis, signal.shape[scanner.slice_axis]
    thickness = 1.0 + scanner.slice_mm / float(spacing[axis])  # in voxels
    starts = np.arange(0.0, size, thickness)
    voxel = np.arange(size)
    overlap = np.minimum(starts[:, None] + thickness, voxel + 1) - np.maximum(
        starts[:, None], voxel
    )
    weights = np.clip(overlap, 0.0, 1.0)  # (slices, voxels)
    # The last slice may hold a sliver only; its mean is over what there is.
    weights /= weights.sum(axis=1, keepdims=True)
    centres = starts + thickness / 2 - 0.5
    back = np.stack([np.interp(voxel, centres, row) for row in np.eye(len(starts))], axis=1)
    mixed = np.tensordot(back @ weights, signal, axes=(1, axis))
    return np.moveaxis(mixed, 0, axis)


def _blur(
    signal: npt.NDArray[np.float64], scanner: Scanner, spacing: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    # Not MONAI's GaussianSmooth: it pads with zeros, which darkens the border of a cropped organ.
    for axis in range(3):
        if axis != scanner.slice_axis:
            sigma = scanner.blur_mm / FWHM_PER_SIGMA / float(spacing[axis])
            signal = gaussian_filter1d(signal, sigma, axis=axis, mode="nearest")
    return signal


def _move(
    signal: npt.NDArray[np.float64],
    scanner: Scanner,
    spacing: npt.NDArray[np.float64],
    rng: np.random.Generator,
) -> npt.NDArray[np.float64]:
    """Read some runs of phase-encoding lines while the head is displaced: blur and ghosts."""
    axis = (scanner.slice_axis + 1) % 3
    size = signal.shape[axis]
    shift = np.zeros(size)
    for _ in range(3):
        start, length = int(rng.integers(size)), max(1, size // 8)
        shift[start : start + length] = rng.uniform(-1.0, 1.0) * scanner.motion_mm
    # fftfreq order: the centre of k-space, which carries the contrast, is read at rest.
    frequency = np.fft.fftfreq(size)
    shift[np.abs(frequency) < 0.05] = 0.0
    phase = np.exp(-2j * np.pi * frequency * shift / float(spacing[axis]))
    lines = [1, 1, 1]
    lines[axis] = size
    moved: npt.NDArray[np.float64] = np.abs(
        np.fft.ifft(np.fft.fft(signal, axis=axis) * phase.reshape(lines), axis=axis)
    )
    return moved
