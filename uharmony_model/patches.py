"""Step 2 of the data's way: training patches, cut straight from memory-mapped volumes.

Which case, which place and which change: each patch draws from a generator of its own, seeded by
(study seed, site, round, step, sample). A patch therefore depends on nothing that ran before.
D, H, W are the axes of the stored RAS arrays: right, anterior, superior.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from uharmony_model.augment import change_intensity, covered_box, draw_geometry, mirrors, warp
from uharmony_model.errors import DataError
from uharmony_model.presence import drop_modalities, with_presence
from uharmony_model.randomness import numpy_generator
from uharmony_model.task import Task
from uharmony_model.training_settings import Training

Triple = tuple[int, int, int]


class StoredVolume(Protocol):
    """A preprocessed case; the arrays may be memory-mapped, and only what is needed is read."""

    @property
    def image(self) -> npt.NDArray[np.float32]:
        """Normalised intensities (C, D, H, W)."""

    @property
    def label(self) -> npt.NDArray[np.uint8] | None:
        """Label values (D, H, W), or None for a case without a label."""

    @property
    def foreground(self) -> npt.NDArray[np.int32]:
        """Labelled voxels, all or a sample of them (N, 4): indices along D, H, W and the value."""

    @property
    def present(self) -> Sequence[bool]:
        """Whether the case has each of its channels (C,)."""

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Size of a voxel along D, H, W."""


@dataclass(frozen=True)
class _Unlabelled:
    """A volume whose label is not looked at: background everywhere, and nothing to aim at."""

    image: npt.NDArray[np.float32]
    present: Sequence[bool]
    spacing_mm: tuple[float, float, float]

    @property
    def label(self) -> npt.NDArray[np.uint8]:
        return np.broadcast_to(np.uint8(0), self.image.shape[1:])

    @property
    def foreground(self) -> npt.NDArray[np.int32]:
        return np.empty((0, 4), dtype=np.int32)


def without_label(volume: StoredVolume) -> StoredVolume:
    """The same volume as an unlabelled case: its patches lie anywhere, their labels are zero."""
    return _Unlabelled(volume.image, volume.present, volume.spacing_mm)


@dataclass(frozen=True)
class PatchPlan:
    """Where a patch lies: the case, and its first voxel, negative where the volume is smaller."""

    case: int
    start: Triple


class Batch(NamedTuple):
    """`image (B, C, d, h, w)` float32, `label (B, d, h, w)` uint8, the index of each case.

    The image is what the network takes: with `task.presence` masks stand behind its channels.
    """

    image: Tensor
    label: Tensor
    cases: tuple[int, ...]


def draw_batch(
    volumes: Sequence[StoredVolume],
    task: Task,
    training: Training,
    seed: int,
    site: str,
    round_: int,
    step: int,
) -> Batch:
    """The patches of one training step, equal for equal arguments in any process.

    Raises:
        DataError: there is no case, one has no label, or its channels are not the study's.
    """
    if not volumes:
        raise DataError(f"site {site}: no training case, expected at least one; check its splits")
    size, count = training.patch, training.batch_size
    image = np.empty((count, task.channels, *size), dtype=np.float32)
    label = np.empty((count, *size), dtype=np.uint8)
    cases = []
    for sample in range(count):
        generator = numpy_generator(seed, site, round_, step, sample, "patch")
        wanted = is_foreground_patch(step * count + sample, training.foreground)
        plan = plan_patch(volumes, task, size, generator, foreground=wanted)
        volume = volumes[plan.case]
        if volume.image.shape[0] != task.channels:
            raise DataError(
                f"site {site}: case {plan.case} has {volume.image.shape[0]} channels, expected "
                f"{task.channels} as the study says; give one image per channel"
            )
        if training.augment:
            _cut_changed(volume, plan.start, image[sample], label[sample], generator, mirrors(task))
        else:
            cut(volume, plan.start, image[sample], label[sample])
        cases.append(plan.case)
    shown = torch.from_numpy(image)
    if task.presence:  # after the change of intensities, which would write into a missing channel
        present = torch.tensor([list(volumes[case].present) for case in cases])
        if training.modality_dropout:
            draw = numpy_generator(seed, site, round_, step, "modality-dropout")
            present = drop_modalities(present, training.modality_dropout, draw)
        shown = with_presence(shown, present, task)
    return Batch(shown, torch.from_numpy(label), tuple(cases))


def is_foreground_patch(number: int, share: float) -> bool:
    """Whether the patch of this number is to show foreground: `share` of any run of patches.

    Spread evenly rather than drawn, so that a batch of two at one half always holds one.
    """
    return int((number + 1) * share) > int(number * share)


def plan_patch(
    volumes: Sequence[StoredVolume],
    task: Task,
    size: Triple,
    generator: np.random.Generator,
    *,
    foreground: bool,
) -> PatchPlan:
    """Choose a case, each alike, and a place in it.

    A foreground patch holds a random voxel of a random class present in the case, each class
    alike, in its middle half as far as the volume's borders allow. Other patches, and those of a
    case without foreground, lie anywhere inside. Along an axis on which the volume is smaller
    than the patch, the volume lies in the patch's middle.
    """
    case = int(generator.integers(len(volumes)))
    volume = volumes[case]
    voxel = _foreground_voxel(volume.foreground, task, generator) if foreground else None
    start = []
    for axis, (patch, extent) in enumerate(zip(size, volume.image.shape[1:], strict=True)):
        room = extent - patch
        if room <= 0:
            start.append(-(-room // 2))
        elif voxel is None:
            start.append(int(generator.integers(room + 1)))
        else:
            jitter = int(generator.integers(-(patch // 4), patch // 4 + 1))
            start.append(min(max(int(voxel[axis]) - patch // 2 + jitter, 0), room))
    return PatchPlan(case, (start[0], start[1], start[2]))


def cut(
    volume: StoredVolume,
    start: Triple,
    image: npt.NDArray[np.float32],
    label: npt.NDArray[np.uint8],
) -> None:
    """Copy the box at `start` into `image (C, d, h, w)` and `label (d, h, w)`.

    What lies beyond the volume becomes label 0 and, in each channel, the least intensity of the
    part inside: for an image of a body that is air.

    Raises:
        DataError: the volume has no label.
    """
    if volume.label is None:
        raise DataError("a training case has no label; leave it out of the training split")
    source, target = [], []
    for first, length, extent in zip(start, label.shape, volume.label.shape, strict=True):
        low, high = max(first, 0), min(first + length, extent)
        source.append(slice(low, high))
        target.append(slice(low - first, high - first))
    inside = volume.image[(slice(None), *source)]
    if inside.shape != image.shape:
        image[...] = inside.min(axis=(1, 2, 3), keepdims=True)
        label[...] = 0
    image[(slice(None), *target)] = inside
    label[tuple(target)] = volume.label[tuple(source)]


def _cut_changed(
    volume: StoredVolume,
    start: Triple,
    image: npt.NDArray[np.float32],
    label: npt.NDArray[np.uint8],
    generator: np.random.Generator,
    mirror: bool,
) -> None:
    """Copy a patch and change it at random; the arrays are as in `cut`."""
    geometry = draw_geometry(generator, volume.spacing_mm, mirror=mirror)
    if geometry.matrix is None:
        cut(volume, start, image, label)
    else:
        size = (label.shape[0], label.shape[1], label.shape[2])
        box_start, box_size = covered_box(geometry.matrix, start, size)
        box_image = np.empty((image.shape[0], *box_size), dtype=np.float32)
        box_label = np.empty(box_size, dtype=np.uint8)
        cut(volume, box_start, box_image, box_label)
        box = torch.from_numpy(box_image), torch.from_numpy(box_label)
        moved, classes = warp(*box, geometry.matrix, size)
        image[...], label[...] = moved.numpy(), classes.numpy()
    if geometry.mirrored:
        image[...], label[...] = image[:, ::-1].copy(), label[::-1].copy()
    change_intensity(image, generator)


def _foreground_voxel(
    foreground: npt.NDArray[np.int32], task: Task, generator: np.random.Generator
) -> npt.NDArray[Any] | None:
    """Indices along D, H, W of a voxel of a class drawn from those present; None without any."""
    values = np.asarray(foreground[:, 3])
    held = np.zeros(256, dtype=bool)
    held[values] = True
    present = [list(group) for group in task.classes.values() if held[list(group)].any()]
    if not present:
        return None
    wanted = np.zeros(256, dtype=bool)
    wanted[present[int(generator.integers(len(present)))]] = True
    rows = np.flatnonzero(wanted[values])
    voxel: npt.NDArray[Any] = foreground[rows[int(generator.integers(len(rows)))], :3]
    return voxel
