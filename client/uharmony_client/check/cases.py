"""One case, looked at as training will see it: refused by the same code, for the same reasons.

Nothing is resampled and nothing is stored; one volume is in memory at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from nibabel.affines import obliquity
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from uharmony_client.case_table import Case
from uharmony_client.check.intensities import scales, unlike_the_policy
from uharmony_client.check.rules import VOLUME_CODES
from uharmony_client.check.texts import Found, header_texts, sidecars
from uharmony_client.grids import Grid, plan_grid, same_grid
from uharmony_client.nifti import MAX_CHANNELS, LoadedVolume, load_volume
from uharmony_client.site_config import SiteConfig
from uharmony_client.site_data import _to_label, channel_modalities
from uharmony_client.volume_error import VolumeError
from uharmony_client.volume_header import VolumeHeader
from uharmony_model.errors import DataError
from uharmony_model.task import Task

_SANE_MM = (0.1, 10.0)
_ANISOTROPY = 10.0
_OBLIQUE_DEGREES = 15.0
_ANY_LABEL = frozenset(range(256))


@dataclass
class CaseLook:
    """What was seen of a case. `refused` is the code for which training would refuse it.

    `shape` and `spacing_mm` are those of the file, `stored` those of the study's grid; `counts` are
    voxels by label value after `label_map`, `digest` is of the voxels, whatever the header says.
    """

    case: Case
    refused: str | None = None
    found: list[Found] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    stored: tuple[int, ...] = ()
    channels: int = 0
    counts: Mapping[int, int] | None = None
    digest: str | None = None

    @property
    def voxels(self) -> int:
        """Voxels of the larger of the two grids, one channel; 0 where nothing could be read."""
        return max(math.prod(shape) if shape else 0 for shape in (self.shape, self.stored))


class _RefusedError(Exception):
    def __init__(self, code: str, text: str) -> None:
        super().__init__(code, text)
        self.code, self.text = code, text


def look_at(case: Case, task: Task | None, config: SiteConfig) -> CaseLook:
    """Open a case's files and say everything that is worth saying about them."""
    look = CaseLook(case)
    for path in (*case.image, *([] if case.label is None else [case.label])):
        look.found += header_texts(path) + sidecars(path)
    try:
        _look_at_volumes(look, task, config)
    except _RefusedError as error:
        look.refused = error.code
        look.found.append((error.code, error.text))
    except VolumeError as error:
        what = "label" if error.path == case.label else "image"
        look.refused = VOLUME_CODES[error.reason]
        look.found.append((look.refused, f"the {what} {error.what}"))
    except MemoryError:
        look.refused = "U105"
        look.found.append(("U105", "does not fit in memory"))
    return look


def _look_at_volumes(look: CaseLook, task: Task | None, config: SiteConfig) -> None:
    case = look.case
    modalities = None if task is None else _modalities(case, task, config)
    lacking = frozenset[str]() if task is None else config.lacks(task)
    if modalities is not None and lacking.issuperset(modalities):
        raise _RefusedError("U111", "no channel is left that is not declared missing")
    header = _look_at_images(look, task, modalities, lacking, config.resources.max_voxels)
    if case.label is None:
        return
    loaded = load_volume(case.label, config.resources.max_voxels, max_channels=1)
    if not same_grid(header, loaded.header):
        raise _RefusedError("U114", f"label {_grid(loaded.header)}, image {_grid(header)}")
    look.counts = _counts(loaded, look, task, config)
    if sum(look.counts.values()) == look.counts.get(0, 0):
        look.found.append(("U405", "background only"))


def _modalities(case: Case, task: Task, config: SiteConfig) -> Sequence[str]:
    try:
        return channel_modalities(case.modality, task, config.modality_map, case.case)
    except DataError:
        count = len(case.modality)
        raise _RefusedError(
            "U113", f"{count} named for {task.channels} channels of {', '.join(task.intensity)}"
        ) from None


def _look_at_images(
    look: CaseLook,
    task: Task | None,
    modalities: Sequence[str] | None,
    lacking: frozenset[str],
    max_voxels: int,
) -> VolumeHeader:
    grid: Grid | None = None
    digest = hashlib.sha256()
    most = MAX_CHANNELS if task is None else task.channels
    for number, path in enumerate(look.case.image, 1):
        loaded = load_volume(path, max_voxels, max_channels=most)
        if grid is None:
            grid = _plan(look, loaded.header, task, max_voxels)
        if not same_grid(grid.header, loaded.header):
            text = f"image {number} {_grid(loaded.header)}, image 1 {_grid(grid.header)}"
            raise _RefusedError("U112", text)
        array = loaded.array if loaded.array.ndim == 4 else loaded.array[None]
        # Of the voxels, not the file: a new header or another compression hides no duplicate.
        digest.update(repr(array.shape).encode())
        digest.update(np.ascontiguousarray(array.transpose(0, 3, 2, 1)).data)
        for channel in array:
            named = () if modalities is None else modalities[look.channels : look.channels + 1]
            look.channels += 1
            if not lacking.intersection(named):
                _look_at_channel(look, channel, task, modalities)
        del loaded, array, channel  # or the next file would lie in memory beside it
    if modalities is not None and look.channels != len(modalities):
        raise _RefusedError("U111", f"{look.channels} channels; expected {len(modalities)}")
    look.digest = digest.hexdigest()
    if grid is None:  # the case table allows no case without an image
        raise _RefusedError("U101", "no image")
    return grid.header


def _look_at_channel(
    look: CaseLook,
    channel: NDArray[np.float32],
    task: Task | None,
    modalities: Sequence[str] | None,
) -> None:
    low, high = float(channel.min()), float(channel.max())
    if low == high:
        raise _RefusedError("U110", f"channel {look.channels} is {low:g} everywhere")
    if task is None or modalities is None or look.channels > len(modalities):
        return
    modality = modalities[look.channels - 1]
    policy = task.intensity[modality]
    look.found += [
        (code, f"channel {look.channels} as {modality}: {text}")
        for code, text in unlike_the_policy(channel, low, high, policy)
    ]
    if not scales(channel, low, high, policy):
        raise _RefusedError("U116", f"channel {look.channels} as {modality}: too large")


def _plan(look: CaseLook, header: VolumeHeader, task: Task | None, max_voxels: int) -> Grid:
    """The stored grid, and what is odd about the file's."""
    try:
        grid = plan_grid(header, None if task is None else task.spacing_mm, max_voxels)
    except DataError as error:
        raise _RefusedError("U105", str(error)) from None
    look.shape, look.stored = header.shape, grid.shape
    affine = header.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    look.spacing_mm = tuple(round(float(value), 4) for value in spacing)
    text = " x ".join(f"{value:g}" for value in look.spacing_mm) + " mm"
    if spacing.min() < _SANE_MM[0] or spacing.max() > _SANE_MM[1]:
        look.found.append(("U201", text))
    if spacing.max() > _ANISOTROPY * spacing.min():
        look.found.append(("U202", text))
    if np.linalg.det(affine[:3, :3]) < 0:
        look.found.append(("U203", "left-handed"))
    angle = math.degrees(float(obliquity(affine).max()))
    if angle > _OBLIQUE_DEGREES:
        look.found.append(("U204", f"{angle:.0f} degrees"))
    if not header.sform_code and not header.qform_code:
        look.found.append(("U205", "neither sform nor qform"))
    elif header.sform_code and header.qform_code and not _agree(header):
        look.found.append(("U206", "sform and qform"))
    return grid


def _agree(header: VolumeHeader) -> bool:
    """Whether sform and qform put every voxel at the same place, as far as voxels count."""
    try:
        by_quaternion = header.model_copy(update={"sform_code": 0})
        return same_grid(header, by_quaternion)
    except (HeaderDataError, ValueError):
        return False


def _counts(
    loaded: LoadedVolume, look: CaseLook, task: Task | None, config: SiteConfig
) -> dict[int, int]:
    """Voxels by label value, in the study's numbers where there is a study."""
    path = look.case.label
    if path is None:
        return {}
    allowed = _ANY_LABEL if task is None else config.label_values(task)
    try:
        label = _to_label(loaded.array, path, config.label_map, allowed)
    except DataError as error:
        text = str(error).removeprefix(f"{path}: ")
        if task is None:
            text = "values that are not whole numbers from 0 to 255"
        raise _RefusedError("U115", text) from None
    # Plane by plane: bincount makes integers of eight bytes.
    total = np.zeros(256, dtype=np.int64)
    for plane in label:
        total += np.bincount(plane.ravel(), minlength=256)
    return {int(value): int(total[value]) for value in np.flatnonzero(total)}


def _grid(header: VolumeHeader) -> str:
    shape = " x ".join(map(str, header.shape))
    spacing = " x ".join(f"{value:g}" for value in np.round(header.spacing_mm, 3))
    corner = ", ".join(f"{value:.1f}" for value in header.affine[:3, 3])
    return f"{shape} voxels of {spacing} mm from ({corner})"
