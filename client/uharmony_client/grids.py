"""Between a file's grid and the stored grid: RAS voxel axes, then the study's spacing, and back.

The way back is exact: the same shape and affine, and, where nothing was resampled, the same bits.

Resampling keeps the centre of the field of view. Along an axis of n voxels of s mm the new grid
has ceil(n s / s') voxels of exactly s' mm, so it covers the whole field and at most one voxel
more; positions beyond the first or last voxel centre take that voxel's value. There is no
smoothing before a coarser grid.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from nibabel.orientations import inv_ornt_aff, io_orientation
from numpy.typing import NDArray
from scipy import ndimage

from uharmony_client.volume_header import Triple, VolumeHeader
from uharmony_model.errors import DataError
from uharmony_model.frozen import Frozen

SAME_SPACING_MM = 1e-3


class Grid(Frozen):
    """What was done to a file's grid, enough to undo it.

    Stored axis i is the file's axis `axes[i]`, reversed where `flips[i]`. `ras_*` is the grid
    after that, `shape` and `spacing_mm` the stored one after resampling.
    """

    header: VolumeHeader
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    ras_shape: tuple[int, int, int]
    ras_spacing_mm: Triple
    shape: tuple[int, int, int]
    spacing_mm: Triple

    @property
    def resampled(self) -> bool:
        """Whether values were interpolated; otherwise they were only reordered."""
        return self.shape != self.ras_shape or self.spacing_mm != self.ras_spacing_mm

    @property
    def affine(self) -> NDArray[np.float64]:
        """(4, 4), stored voxel indices to RAS in mm."""
        orientation = np.array(
            [[self.axes.index(i), -1 if self.flips[self.axes.index(i)] else 1] for i in range(3)]
        )
        ras = self.header.affine @ inv_ornt_aff(orientation, self.header.shape)
        scale, offset = self._mapping()
        step = np.eye(4)
        step[:3, :3], step[:3, 3] = np.diag(scale), offset
        return np.asarray(ras @ step, dtype=np.float64)

    def _mapping(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Scale and offset: RAS index = scale * stored index + offset."""
        scale = np.array(self.spacing_mm) / np.array(self.ras_spacing_mm)
        offset = (np.array(self.ras_shape) - 1) / 2 - scale * (np.array(self.shape) - 1) / 2
        return scale, offset


def plan_grid(header: VolumeHeader, spacing_mm: Triple | None, max_voxels: int) -> Grid:
    """The stored grid of a file for a target spacing (None keeps the file's own).

    Raises:
        DataError: the stored grid would have more than `max_voxels` voxels.
    """
    affine = header.affine
    # Rows are the file's axes, values the RAS axis each is closest to and its direction.
    orientation = io_orientation(affine)
    axes = tuple(int(i) for i in np.argsort(orientation[:, 0]))
    flips = tuple(bool(orientation[i, 1] < 0) for i in axes)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    ras_shape = tuple(header.shape[i] for i in axes)
    ras_spacing = tuple(float(lengths[i]) for i in axes)
    shape, spacing = list(ras_shape), list(ras_spacing)
    for axis, wanted in enumerate(spacing_mm or ras_spacing):
        if abs(wanted - ras_spacing[axis]) > SAME_SPACING_MM:
            # The slack keeps rounding of the spacing from adding a voxel.
            shape[axis] = max(1, math.ceil(ras_shape[axis] * ras_spacing[axis] / wanted - 1e-3))
            spacing[axis] = wanted
    if math.prod(shape) > max_voxels:
        raise DataError(
            f"at the study's spacing the volume has {' x '.join(map(str, shape))} voxels; at most "
            f"{max_voxels} are allowed (resources.max_voxels)"
        )
    return Grid(
        header=header,
        axes=(axes[0], axes[1], axes[2]),
        flips=(flips[0], flips[1], flips[2]),
        ras_shape=(ras_shape[0], ras_shape[1], ras_shape[2]),
        ras_spacing_mm=(ras_spacing[0], ras_spacing[1], ras_spacing[2]),
        shape=(shape[0], shape[1], shape[2]),
        spacing_mm=(spacing[0], spacing[1], spacing[2]),
    )


def to_stored_grid(array: NDArray[Any], grid: Grid) -> NDArray[Any]:
    """From the file's grid to the stored one; (D, H, W) or (C, D, H, W), dtype kept.

    Integers and booleans (labels) take the nearest voxel, reals are interpolated linearly.
    """
    _expect(array, grid.header.shape, "the file's")
    lead = array.ndim - 3
    array = array.transpose(*range(lead), *(lead + axis for axis in grid.axes))
    array = np.ascontiguousarray(_flip(array, grid))
    if not grid.resampled:
        return array
    scale, offset = grid._mapping()
    return _interpolate(array, scale, offset, grid.shape)


def to_input_grid(array: NDArray[Any], grid: Grid) -> NDArray[Any]:
    """From the stored grid back to exactly the file's; (D, H, W) or (J, D, H, W), dtype kept.

    Give probabilities and decide afterwards: a label map that is resampled itself has steps.
    """
    _expect(array, grid.shape, "the stored")
    if grid.resampled:
        scale, offset = grid._mapping()
        array = _interpolate(array, 1 / scale, -offset / scale, grid.ras_shape)
    array = _flip(array, grid)
    lead = array.ndim - 3
    back = (lead + grid.axes.index(axis) for axis in range(3))
    return np.ascontiguousarray(array.transpose(*range(lead), *back))


def same_grid(first: VolumeHeader, second: VolumeHeader) -> bool:
    """Whether two files lie on one grid: equal shape, corners apart by at most a tenth of a voxel.

    Rounding alone moves corners by more than 0.1 mm when one of the files has a quaternion close
    to half a turn, the usual orientation of converted DICOM, so the bound is not sharper.
    """
    if first.shape != second.shape:
        return False
    corners = np.array([(*c, 1) for c in itertools.product(*((0, n - 1) for n in first.shape))])
    apart = np.linalg.norm((corners @ (first.affine - second.affine).T)[:, :3], axis=1)
    voxel = np.linalg.norm(first.affine[:3, :3], axis=0).min()
    return bool(apart.max() <= 0.1 * voxel)


def _flip(array: NDArray[Any], grid: Grid) -> NDArray[Any]:
    lead = array.ndim - 3
    return np.flip(array, axis=tuple(lead + axis for axis in range(3) if grid.flips[axis]))


def _interpolate(
    array: NDArray[Any],
    scale: NDArray[np.float64],
    offset: NDArray[np.float64],
    shape: tuple[int, int, int],
) -> NDArray[Any]:
    """Value at stored position i = value of `array` at scale * i + offset, per axis."""
    linear = np.issubdtype(array.dtype, np.floating)
    source = array if array.dtype != np.bool_ else array.view(np.uint8)
    flat = source.reshape(-1, *array.shape[-3:])
    result = np.empty((len(flat), *shape), dtype=source.dtype)
    for channel, target in zip(flat, result, strict=True):
        # A vector instead of a matrix makes scipy interpolate each axis on its own.
        ndimage.affine_transform(
            channel,
            scale,
            offset,
            output_shape=shape,
            output=target,
            order=1 if linear else 0,
            mode="nearest",
            prefilter=False,
        )
    return result.reshape(*array.shape[:-3], *shape).view(array.dtype)


def _expect(array: NDArray[Any], shape: tuple[int, int, int], which: str) -> None:
    if array.ndim not in (3, 4) or array.shape[-3:] != shape:
        raise DataError(f"array {array.shape} does not lie on {which} grid {shape}")
