"""Step 1 of the data's way: volume.nii.gz to a prepared volume.

Canonical orientation (RAS voxel axes), then the study's spacing in mm, then the intensity policy
of each channel's modality. Nothing is guessed: what does not fit the study is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uharmony_client.case_table import Case
from uharmony_client.grids import Grid, plan_grid, same_grid, to_stored_grid
from uharmony_client.intensity import apply_intensity
from uharmony_client.nifti import LoadedVolume, load_volume
from uharmony_client.site_config import SiteConfig
from uharmony_client.volume_header import VolumeHeader
from uharmony_model.errors import DataError
from uharmony_model.presence import present_channels
from uharmony_model.task import Task

_WHOLE = 1e-3  # how far a label may be from a whole number; float files carry scaling errors


@dataclass(frozen=True)
class Volume:
    """A prepared case: image (C, D, H, W) float32, label (D, H, W) uint8 or None, RAS axes."""

    image: NDArray[np.float32]
    label: NDArray[np.uint8] | None
    grid: Grid


def prepare(case: Case, task: Task, config: SiteConfig) -> Volume:
    """Load and preprocess a case.

    Raises:
        DataError: a file, its grid, its values or its modality does not fit the study.
    """
    present_in(case, task, config)
    image, grid = prepare_image(
        case.image,
        channel_modalities(case.modality, task, config.modality_map, case.case),
        task,
        config.resources.max_voxels,
        missing=config.lacks(task),
    )
    if case.label is None:
        return Volume(image, None, grid)
    loaded = load_volume(case.label, config.resources.max_voxels, max_channels=1)
    if not same_grid(grid.header, loaded.header):
        raise DataError(
            f"{case.label}: {_describe(loaded.header)} is not the grid of {case.image[0]}: "
            f"{_describe(grid.header)}; resample the label to the image"
        )
    label = _to_label(loaded.array, case.label, config.label_map, config.label_values(task))
    return Volume(image, to_stored_grid(label, grid), grid)


def prepare_image(
    paths: Sequence[Path],
    modalities: Sequence[str],
    task: Task,
    max_voxels: int,
    *,
    missing: Collection[str] = (),
) -> tuple[NDArray[np.float32], Grid]:
    """Load the channels, one or more a file, onto one stored grid; `modalities` one a channel.

    With `task.presence` each goes to the place of its modality; the others, and those of a
    `missing` modality, are zero.

    Raises:
        DataError: a file is unusable, or the channels do not lie on one grid.
    """
    grid: Grid | None = None
    channels: list[NDArray[np.float32]] = []
    for path in paths:
        loaded = load_volume(path, max_voxels, max_channels=task.channels)
        try:
            grid = grid or plan_grid(loaded.header, task.spacing_mm, max_voxels)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        if not same_grid(grid.header, loaded.header):
            raise DataError(
                f"{path}: {_describe(loaded.header)} is not the grid of {paths[0]}: "
                f"{_describe(grid.header)}; resample the channels to one grid"
            )
        here = modalities[len(channels) :]
        channels += [
            to_stored_grid(channel, grid) for channel in _channels_of(loaded, path, here, missing)
        ]
        del loaded  # or the next file would lie in memory beside it
    if grid is None or len(channels) != len(modalities):
        expected = (
            f"{len(modalities)} modalities are named"
            if task.presence
            else f"the study has {task.channels}"
        )
        raise DataError(f"{', '.join(map(str, paths))}: {len(channels)} channels; {expected}")
    for channel, modality in zip(channels, modalities, strict=True):
        with np.errstate(over="ignore", invalid="ignore"):
            apply_intensity(channel, task.intensity[modality])
        if not np.isfinite(channel).all():
            raise DataError(f"{paths[0]}: voxels too large to be scaled as {modality}")
    if task.presence:
        named = dict(zip(modalities, channels, strict=True))
        nothing = np.zeros(grid.shape, dtype=np.float32)
        channels = [
            nothing if name in missing else named.get(name, nothing) for name in task.intensity
        ]
    return (np.stack(channels) if len(channels) > 1 else channels[0][None]), grid


def present_in(case: Case, task: Task, config: SiteConfig) -> tuple[bool, ...]:
    """Which of the study's channels this site has of a case, (C,).

    Raises:
        DataError: none, or its modalities do not fit the study.
        ConfigError: what the site declares missing does not fit the study.
    """
    lacking = config.lacks(task)
    named = channel_modalities(case.modality, task, config.modality_map, case.case)
    try:
        return present_channels(task, [name for name in named if name not in lacking])
    except DataError as error:
        raise DataError(f"{case.case}: {error}") from None


def channel_modalities(
    named: Sequence[str], task: Task, modality_map: Mapping[str, str], what: str
) -> tuple[str, ...]:
    """The study's modality of each channel; one name stands for all channels.

    With `task.presence` these are the channels that are there, each a modality of its own.

    Raises:
        DataError: no modality is named and the study has several, or one is not in the study.
    """
    known = ", ".join(task.intensity)
    names = [modality_map.get(name, name) for name in named]
    if not names and len(task.intensity) == 1:
        names = list(task.intensity)
    if not names:
        raise DataError(f"{what}: names no modality; the study has {known}")
    for name in names:
        if name not in task.intensity:
            raise DataError(
                f"{what}: modality {name!r:.80} is not in the study, which has {known}; "
                "rename it in modality_map"
            )
    if task.presence:
        if len(set(names)) != len(names):
            raise DataError(f"{what}: a modality is named twice; the study has one channel of each")
        return tuple(names)
    if len(names) == 1:
        names *= task.channels
    if len(names) != task.channels:
        raise DataError(f"{what}: {len(names)} modalities for {task.channels} channels")
    return tuple(names)


def _channels_of(
    loaded: LoadedVolume, path: Path, modalities: Sequence[str], missing: Collection[str]
) -> list[NDArray[np.float32]]:
    array = loaded.array if loaded.array.ndim == 4 else loaded.array[None]
    for number, channel in enumerate(array):
        # Some exports hold zeros in the place of what was never acquired.
        if number < len(modalities) and modalities[number] in missing:
            continue
        if channel.min() == channel.max():
            raise DataError(f"{path}: every voxel has the value {channel.max():g}; export it again")
    return list(array)


def _to_label(
    values: NDArray[np.float32], path: Path, label_map: Mapping[int, int], allowed: frozenset[int]
) -> NDArray[np.uint8]:
    """Site's numbers to the study's label values, each of which must be declared."""
    label = np.zeros(values.shape, dtype=np.uint8)
    for k in range(values.shape[2]):  # slice by slice: the copies stay small
        whole = np.rint(values[:, :, k])
        if np.abs(values[:, :, k] - whole).max() > _WHOLE:
            raise DataError(f"{path}: label values are not whole numbers; is this the image?")
        for value in map(int, np.unique(whole).tolist()):
            mapped = label_map.get(value, value)
            if mapped not in allowed:
                raise DataError(
                    f"{path}: label value {value} is no class that this site annotates (values "
                    f"{', '.join(map(str, sorted(allowed)))}); map it in label_map, to 0 for "
                    "background"
                )
            if mapped:
                label[:, :, k][whole == value] = mapped
    return label


def _describe(header: VolumeHeader) -> str:
    corner = ", ".join(f"{value:.3f}" for value in header.affine[:3, 3])
    spacing = " x ".join(f"{value:.3f}" for value in header.spacing_mm)
    return f"{' x '.join(map(str, header.shape))} voxels of {spacing} mm from ({corner})"
