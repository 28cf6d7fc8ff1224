"""Simulated hospitals' cases: a standard brain, a little deformed, with lesions of known mask.

The brain is the MNI152 T1 template at 1 mm that nilearn carries in its package, so nothing is
downloaded. A case is the template under a smooth deformation of a few mm, with one to four
T1-hypointense lesions in white matter, sampled at the wanted spacing. It is fit to show that a
federation learns, not to claim anything about patients: there is one anatomy, and no pathology
but these lesions.

Arrays are `(D, H, W)` on RAS axes: D runs to the right, H to the front, W to the top.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.ndimage import distance_transform_edt, gaussian_filter, label, map_coordinates
from scipy.special import expit

from uharmony_model.errors import ConfigError
from uharmony_model.randomness import numpy_generator

Volume = npt.NDArray[np.float32]
Points = npt.NDArray[np.float64]

ATTRIBUTION = (
    "Brain template: ICBM 152 nonlinear 2009a, as carried by nilearn. Copyright Louis Collins,"
    " McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill University."
    " V. Fonov et al., Unbiased average age-appropriate atlases for pediatric studies, NeuroImage"
    " 54 (2011) 313-327; V. Fonov et al., Unbiased nonlinear average age-appropriate brain"
    " templates from birth to adulthood, NeuroImage 47 (2009) S102. Lesions, deformations and"
    " scanner effects are simulated; the template is an average, no one person's image."
)

MARGIN_MM = 4.0
MULTIPLE = 4  # of voxels per axis, so that small networks take the volume whole
CONTROL_MM = 32.0  # distance of the deformation's control points
LARGEST_SHIFT_MM = 4.0  # far below CONTROL_MM, so that the deformation does not fold
LESION_RADIUS_MM = (4.0, 9.0)
RADIUS_VOXELS = (1.6, 2.4)  # at the least
HALF_AXES = (0.75, 1.3)  # of a lesion, in radii
BUMPS = 0.25  # largest bump of its surface, in radii
REACH = HALF_AXES[1] * (1.0 + BUMPS)  # how far it goes from its centre, in radii
EDGE_MM = 0.7  # its fraction falls from 0.73 to 0.27 over twice this
SMALLEST_VOXELS = 4
ATTEMPTS = 40
FWHM_PER_SIGMA = 2.355

Lesion = tuple[tuple[slice, slice, slice], Points]
"""A box of the grid, and how much of each of its voxels the lesion fills."""


@dataclass(frozen=True, eq=False)
class SimulatedCase:
    """An image, its lesion mask, and where they lie."""

    image: Volume
    """`(D, H, W)`; white matter is near 0.87, air is 0."""
    label: npt.NDArray[np.uint8]
    """`(D, H, W)`; 1 is lesion."""
    affine: npt.NDArray[np.float64]
    """`(4, 4)`, voxel to mm in MNI space, RAS."""


class Anatomy:
    """The template, loaded once; every case is drawn from it by (seed, index)."""

    def __init__(
        self,
        spacing_mm: float = 3.0,
        *,
        lesion_radius_mm: tuple[float, float] | None = None,
    ) -> None:
        """Load and crop the template.

        Lesions have radii of 4 to 9 mm if not given, and larger ones on grids so coarse that
        these would be lost: 1.6 to 2.4 voxels, up to 12 mm.

        Raises:
            ConfigError: spacing or radius is out of range, or nilearn is not installed.
        """
        if not 1.0 <= spacing_mm <= 6.0:
            raise ConfigError(
                f"spacing of the simulated anatomy: got {spacing_mm} mm, expected 1 to 6 mm;"
                " coarser voxels do not hold the lesions"
            )
        if lesion_radius_mm is None:
            usual = zip(LESION_RADIUS_MM, RADIUS_VOXELS, strict=True)
            small, large = (max(mm, voxels * spacing_mm) for mm, voxels in usual)
            lesion_radius_mm = (min(small, 12.0), min(large, 12.0))
        if not max(2.0, spacing_mm) <= lesion_radius_mm[0] <= lesion_radius_mm[1] <= 12.0:
            raise ConfigError(
                f"lesion radius of the simulated anatomy: got {lesion_radius_mm[0]} to"
                f" {lesion_radius_mm[1]} mm, expected a range within {max(2.0, spacing_mm):g} to"
                " 12 mm; smaller ones are lost on this grid, larger ones leave white matter"
            )
        self.spacing_mm = float(spacing_mm)
        self.lesion_radius_mm = lesion_radius_mm
        t1, grey, white, affine = _load_template()
        fluid = (t1 > 0.1) & (grey < 0.1) & (white < 0.1)
        self._fluid_level = float(t1[fluid].mean())
        self._grey_level = float(t1[grey > 0.8].mean())
        inside = np.argwhere(t1 > 0.05)
        low, high = inside.min(axis=0), inside.max(axis=0) + 1
        crop = tuple(slice(int(start), int(stop)) for start, stop in zip(low, high, strict=True))
        # Averaging over the voxel's width before sampling; 1 mm is the template's own.
        sigma = np.sqrt(max(0.0, self.spacing_mm**2 - 1.0)) / FWHM_PER_SIGMA
        self._t1 = gaussian_filter(t1[crop], sigma, mode="constant")
        self._white = gaussian_filter(white[crop], sigma, mode="constant")
        # An average of many heads has no clean white matter in thin gyri, so depth places lesions.
        self._depth_mm = distance_transform_edt(white[crop] > 0.6).astype(np.float32)
        extent = np.array(self._t1.shape)
        steps = np.ceil((extent + 2 * MARGIN_MM) / self.spacing_mm / MULTIPLE).astype(int)
        self.shape: tuple[int, int, int] = tuple((steps * MULTIPLE).tolist())
        self._centre: Points = (extent - 1) / 2  # in voxels of the cropped template, which are mm
        origin = self._centre - (np.array(self.shape) - 1) / 2 * self.spacing_mm
        grid: Points = np.indices(self.shape, dtype=np.float64)
        self._grid: Points = grid * self.spacing_mm + origin[:, None, None, None]
        self.affine: Points = np.diag([*[self.spacing_mm] * 3, 1.0])
        self.affine[:3, 3] = affine[:3, :3] @ (origin + low) + affine[:3, 3]

    def case(self, seed: int, index: int, *, site: str = "") -> SimulatedCase:
        """The case of this number, the same whenever and in whatever order it is asked for."""
        rng = numpy_generator(seed, site, index, "anatomy")
        points = self._deformed(rng)
        tissue, white, depth_mm = (
            map_coordinates(template, points, order=1).astype(np.float64)
            for template in (self._t1, self._white, self._depth_mm)
        )
        brightness = 1.0 + 0.03 * self._smooth_noise(rng, 60.0)
        image = tissue * (brightness + 0.012 * self._smooth_noise(rng, 6.0))
        mask = np.zeros(self.shape, dtype=np.uint8)
        for box, fraction in self._lesions(rng, white, depth_mm):
            span = self._grey_level - self._fluid_level
            level = self._fluid_level + span * rng.uniform(0.3, 0.9)
            lesion = level + 0.04 * self._smooth_noise(rng, 8.0)[box]
            image[box] = (1.0 - fraction) * image[box] + fraction * lesion
            mask[box][fraction > 0.5] = 1
        return SimulatedCase(
            image=np.maximum(image, 0.0).astype(np.float32), label=mask, affine=self.affine.copy()
        )

    def _deformed(self, rng: np.random.Generator) -> Points:
        """Where in the template each voxel takes its tissue from, `(3, D, H, W)` in mm."""
        scale = 1.0 + rng.uniform(-0.04, 0.04, size=(3, 1, 1, 1))
        shift = np.stack([2.0 * self._smooth_noise(rng, CONTROL_MM) for _ in range(3)])
        shift = np.clip(shift, -LARGEST_SHIFT_MM, LARGEST_SHIFT_MM)
        centre = self._centre[:, None, None, None]
        points: Points = centre + (self._grid - centre) * scale + shift
        return points

    def _smooth_noise(self, rng: np.random.Generator, distance_mm: float) -> Points:
        """Noise of deviation 1 everywhere that changes over the given distance, `(D, H, W)`.

        Independent normal values at control points, spread by Gaussians along each axis.
        """
        bases = [_spread(size * self.spacing_mm, size, distance_mm) for size in self.shape]
        noise: Points = rng.standard_normal([basis.shape[1] for basis in bases])
        for basis in bases:  # each step takes the first axis away and appends the finished one
            noise = np.tensordot(noise, basis, axes=(0, 1))
        return noise

    def _lesions(self, rng: np.random.Generator, white: Points, depth_mm: Points) -> list[Lesion]:
        """One to four lesions that do not touch; fewer than drawn when no place is left."""
        wanted = int(rng.integers(1, 5))
        lesions: list[Lesion] = []
        free_mm = np.full(self.shape, np.inf)  # from the reach of the nearest lesion so far
        for _ in range(ATTEMPTS):
            if len(lesions) == wanted:
                break
            radius = rng.uniform(*self.lesion_radius_mm)
            clear = free_mm > REACH * radius + 2 * self.spacing_mm
            places = np.argwhere((depth_mm > 0.6 * radius) & clear)
            if len(places) == 0:
                continue
            centre = places[rng.integers(len(places))]
            box, fraction = self._blob(rng, centre, radius)
            fraction = _in_one_piece(fraction * np.clip((white[box] - 0.2) / 0.4, 0.0, 1.0))
            if np.count_nonzero(fraction > 0.5) < SMALLEST_VOXELS:
                continue
            lesions.append((box, fraction))
            distance_mm = np.sqrt((self._from(centre) ** 2).sum(axis=0))
            free_mm = np.minimum(free_mm, distance_mm - REACH * radius)
        return lesions

    def _blob(
        self, rng: np.random.Generator, centre: npt.NDArray[np.intp], radius_mm: float
    ) -> Lesion:
        """A bumpy ellipsoid around a voxel with a soft edge, 1 inside and 0 outside."""
        half = int(np.ceil((REACH * radius_mm + 8 * EDGE_MM) / self.spacing_mm))
        start = np.maximum(centre - half, 0).tolist()
        stop = np.minimum(centre + half + 1, self.shape).tolist()
        box = (slice(start[0], stop[0]), slice(start[1], stop[1]), slice(start[2], stop[2]))
        half_axes = radius_mm * rng.uniform(*HALF_AXES, size=(3, 1, 1, 1))
        rotation, _ = np.linalg.qr(rng.standard_normal((3, 3)))
        offset = self._from(centre)[(slice(None), *box)]
        along = np.tensordot(rotation, offset, axes=1) / half_axes
        outside = np.sqrt((along**2).sum(axis=0)) - 1.0
        bumps = np.clip(0.12 * self._smooth_noise(rng, 10.0)[box], -BUMPS, BUMPS)
        return box, expit(-(outside + bumps) * radius_mm / EDGE_MM)

    def _from(self, centre: npt.NDArray[np.intp]) -> Points:
        """Each voxel's offset from one voxel, `(3, D, H, W)` in mm."""
        offset: Points = self._grid - self._grid[(slice(None), *centre)][:, None, None, None]
        return offset


def _spread(extent_mm: float, size: int, distance_mm: float) -> Points:
    """Weights (voxels, control points) whose squares sum to one in every row."""
    controls = np.arange(-distance_mm, extent_mm + 2 * distance_mm, distance_mm)
    voxels = (np.arange(size) + 0.5) * extent_mm / size
    weights = np.exp(-0.5 * ((voxels[:, None] - controls) / (0.6 * distance_mm)) ** 2)
    basis: Points = weights / np.sqrt((weights**2).sum(axis=1, keepdims=True))
    return basis


def _in_one_piece(fraction: Points) -> Points:
    """Without the pieces beyond a sulcus: one lesion is one connected component."""
    pieces, count = label(fraction > 0.5, structure=np.ones((3, 3, 3)))
    if count <= 1:
        return fraction
    largest = 1 + int(np.argmax(np.bincount(pieces.ravel())[1:]))
    return np.where((pieces != 0) & (pieces != largest), 0.0, fraction)


def _load_template() -> tuple[Volume, Volume, Volume, npt.NDArray[np.float64]]:
    """T1, grey and white matter in [0, 1] on the 1 mm grid `(197, 233, 189)`, and its affine."""
    try:
        # Late: it takes seconds to import and only simulated anatomy needs it.
        from nilearn import datasets
    except ImportError:
        raise ConfigError(
            "simulated anatomy needs nilearn, which is not installed; run"
            ' pip install "uharmony[demo]", or give data of your own'
        ) from None
    t1 = datasets.load_mni152_template(resolution=1)
    grey = datasets.load_mni152_gm_template(resolution=1)
    white = datasets.load_mni152_wm_template(resolution=1)
    arrays = [np.asarray(volume.dataobj, dtype=np.float32) for volume in (t1, grey, white)]
    return arrays[0], arrays[1], arrays[2], np.asarray(t1.affine, dtype=np.float64)
