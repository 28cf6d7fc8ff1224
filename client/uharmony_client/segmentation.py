"""From one case's files to its segmentation, on exactly the grid of the files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uharmony_client.grids import Grid, to_input_grid
from uharmony_client.nifti import MAX_VOXELS
from uharmony_client.site_data import prepare_image
from uharmony_model.bundle import Model
from uharmony_model.errors import DataError
from uharmony_model.inference import predict_logits
from uharmony_model.presence import present_channels, with_presence
from uharmony_model.task import Task


@dataclass(frozen=True)
class Segmentation:
    """A result on the input's grid: labels (D, H, W) or masks (J, D, H, W), probabilities (J, ...).

    Only probabilities of foreground classes are kept, in the study's order.
    """

    label: NDArray[np.uint8]
    probabilities: NDArray[np.float32]
    grid: Grid


@dataclass(frozen=True)
class Prepared:
    """A case as the network takes it: (C, D, H, W), with its masks where the study has them."""

    source: Path
    image: Tensor
    grid: Grid


def prepare_case(
    images: Sequence[Path], modalities: Sequence[str], task: Task, max_voxels: int = MAX_VOXELS
) -> Prepared:
    """Read and normalise a case's channels.

    Raises:
        DataError: the volume is unusable or does not fit the study.
    """
    image, grid = prepare_image(images, modalities, task, max_voxels)
    present = present_channels(task, modalities)
    whole = with_presence(torch.from_numpy(image)[None], [present], task)[0]
    return Prepared(images[0], whole, grid)


def segment_prepared(
    model: Model,
    case: Prepared,
    domain: int | Tensor | None,
    device: torch.device,
    memory_gib: float | None = None,
) -> Segmentation:
    """Segment a case and bring the probabilities back to its grid before deciding.

    `domain` and `memory_gib` are as in `predict_logits`.

    Raises:
        DataError: what the network gives is not finite.
    """
    task = model.study.task
    logits = predict_logits(
        model.predictor,
        case.image,
        patch=model.study.training.patch,
        overlap=model.study.evaluation.overlap,
        domain=domain,
        device=device,
        memory_gib=memory_gib,
    )
    everything = logits.sigmoid() if task.overlapping else logits.softmax(dim=0)
    del logits
    if not bool(torch.isfinite(everything).all()):
        raise DataError(f"{case.source}: the network's output is not finite; is the model damaged?")
    there = to_input_grid(everything.numpy(), case.grid)
    foreground = there if task.overlapping else there[1:]
    return Segmentation(decide(there, task), foreground, case.grid)


def segment(
    model: Model,
    images: Sequence[Path],
    modalities: Sequence[str],
    domain: str | None,
    device: torch.device,
    max_voxels: int = MAX_VOXELS,
) -> Segmentation:
    """Segment one case under one of the model's domains, or with all residuals zero for None.

    Raises:
        DataError: the volume is unusable or does not fit the study.
    """
    case = prepare_case(images, modalities, model.study.task, max_voxels)
    index = None if domain is None else model.domains.index(domain)
    return segment_prepared(model, case, index, device)


def decide(probabilities: NDArray[np.float32], task: Task) -> NDArray[np.uint8]:
    """Label values (D, H, W) of the most probable class, or masks (J, D, H, W) above one half."""
    if task.overlapping:
        return (probabilities > 0.5).astype(np.uint8)
    values = np.array([0, *(group[0] for group in task.classes.values())], dtype=np.uint8)
    return np.asarray(values[probabilities.argmax(axis=0)], dtype=np.uint8)
