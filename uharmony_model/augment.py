"""Moderate random changes of one training patch, all drawn from one generator.

One resampling does rotation and scaling together, in mm, so that voxels of unequal size are not
sheared. It reads the box of the volume that the turned patch covers: corners show anatomy and no
padding. MONAI's random transforms see the patch alone and take half as long again or more.
Ranges are ours, kept where a scan of the same anatomy could still look like this.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from uharmony_model.task import Task

FLIP_CHANCE = 0.5
WARP_CHANCE = 0.3
ROTATION_DEGREES = 15.0  # about each axis, either way
SCALE = (0.9, 1.1)  # one factor for all axes
INTENSITY_CHANCE = 0.3  # of a linear change, and on its own of a gamma change
GAIN = (0.9, 1.1)
SHIFT = (-0.1, 0.1)  # in units of the normalised image, which spans about [-1, 1]
GAMMA = (0.7, 1.5)
NOISE_CHANCE = 0.2
NOISE_DEVIATION = (0.0, 0.1)

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Geometry:
    """Where a patch's voxels come from.

    `matrix (3, 3)` maps an offset from the patch's centre to an offset in the volume, both in
    voxels along D, H, W; None leaves every voxel where it is.
    """

    mirrored: bool
    matrix: npt.NDArray[np.float64] | None


def draw_geometry(
    generator: np.random.Generator, spacing_mm: tuple[float, float, float], *, mirror: bool
) -> Geometry:
    """Draw a left-right flip (array axis 0 of a RAS volume), a rotation and a scaling."""
    mirrored = bool(generator.random() < FLIP_CHANCE) and mirror
    if generator.random() >= WARP_CHANCE:
        return Geometry(mirrored, None)
    angles = np.radians(generator.uniform(-ROTATION_DEGREES, ROTATION_DEGREES, size=3))
    turn = np.eye(3) * generator.uniform(*SCALE)
    for axis, angle in enumerate(angles):
        turn = turn @ _rotation(axis, float(angle))
    voxel = np.asarray(spacing_mm, dtype=np.float64)
    return Geometry(mirrored, turn * voxel[None, :] / voxel[:, None])


def mirrors(task: Task) -> bool:
    """Whether a flip keeps the classes: not when one of their names says left or right."""
    names = [name.lower() for name in task.class_names]
    words = {word for name in names for word in re.split(r"[_.\-]", name)}
    sided = any("left" in name or "right" in name for name in names)
    return not (sided or words & {"l", "r", "lt", "rt", "lh", "rh"})


def covered_box(
    matrix: npt.NDArray[np.float64], start: Triple, size: Triple
) -> tuple[Triple, Triple]:
    """Start and size of the smallest voxel box that the turned patch reads from.

    Its centre is the patch's: that one lies on a voxel or half-way between two, so rounding down
    on one side and up on the other moves both sides alike.
    """
    centre = np.asarray(start) + (np.asarray(size) - 1) / 2
    half = np.abs(matrix) @ ((np.asarray(size) - 1) / 2)
    low, high = np.floor(centre - half).astype(int), np.ceil(centre + half).astype(int)
    extent = high - low + 1
    return (int(low[0]), int(low[1]), int(low[2])), (int(extent[0]), int(extent[1]), int(extent[2]))


def warp(
    image: Tensor, label: Tensor, matrix: npt.NDArray[np.float64], size: Triple
) -> tuple[Tensor, Tensor]:
    """The patch out of its covered box `image (C, D, H, W)`, `label (D, H, W)`: linear, nearest."""
    # affine_grid counts in halves of the extents, about the centres, and in the order W, H, D.
    box = np.asarray(label.shape, dtype=np.float64)
    scaled = matrix * np.asarray(size)[None, :] / box[:, None]
    theta = np.concatenate((scaled[::-1, ::-1], np.zeros((3, 1))), axis=1)
    grid = F.affine_grid(torch.from_numpy(theta).float()[None], [1, 1, *size], align_corners=False)
    # "border" only catches the rounding of coordinates: the box covers them all.
    moved = F.grid_sample(
        image[None], grid, mode="bilinear", padding_mode="border", align_corners=False
    )[0]
    classes = F.grid_sample(
        label.float()[None, None], grid, mode="nearest", padding_mode="border", align_corners=False
    )[0, 0]
    return moved, classes.to(torch.uint8)


def change_intensity(image: npt.NDArray[np.float32], generator: np.random.Generator) -> None:
    """Change each channel of `image (C, D, H, W)` in place: gain and shift, gamma, noise."""
    for channel in image:
        if generator.random() < INTENSITY_CHANCE:
            channel *= generator.uniform(*GAIN)
            channel += generator.uniform(*SHIFT)
        if generator.random() < INTENSITY_CHANCE:
            _apply_gamma(channel, generator.uniform(*GAMMA))
        if generator.random() < NOISE_CHANCE:
            noise = generator.standard_normal(channel.shape, dtype=np.float32)
            noise *= generator.uniform(*NOISE_DEVIATION)
            channel += noise


def _apply_gamma(channel: npt.NDArray[np.float32], gamma: float) -> None:
    """Raise a channel to a power between its own minimum and maximum, which stay."""
    low = float(channel.min())
    extent = float(channel.max()) - low
    if extent <= 0:
        return
    channel -= low
    channel /= extent
    np.power(channel, np.float32(gamma), out=channel)
    channel *= extent
    channel += low


def _rotation(axis: int, angle: float) -> npt.NDArray[np.float64]:
    i, j = (other for other in range(3) if other != axis)
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = math.cos(angle)
    matrix[i, j], matrix[j, i] = -math.sin(angle), math.sin(angle)
    return matrix
