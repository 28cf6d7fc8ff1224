"""Between label maps and classes: what a label map asks of the network, what logits say of it.

B samples; J foreground classes in the task's order; J' = channels of the logits: J when classes
overlap (sigmoid), 1 + J with background first when they are exclusive (softmax).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from uharmony_model.errors import ConfigError
from uharmony_model.task import Task

Annotated = Tensor | Sequence[bool]


def annotated_classes(annotated: Annotated | None, task: Task) -> list[int]:
    """Indices of the foreground classes a site annotates; all of them for None.

    Raises:
        ConfigError: there is not one flag for each class.
    """
    if annotated is None:
        return list(range(len(task.classes)))
    flags = annotated.tolist() if isinstance(annotated, Tensor) else list(annotated)
    if len(flags) != len(task.classes):
        raise ConfigError(
            f"annotated has {len(flags)} flags, expected one for each of the "
            f"{len(task.classes)} classes {', '.join(task.class_names)}"
        )
    return [j for j, flag in enumerate(flags) if flag]


def to_targets(label: Tensor, task: Task) -> Tensor:
    """Binary masks (B, J, D, H, W) of the classes in a uint8 label map (B, D, H, W)."""
    masks = label.new_zeros((label.shape[0], len(task.classes), *label.shape[1:]), dtype=torch.bool)
    for j, values in enumerate(task.classes.values()):
        for value in values:
            masks[:, j] |= label == value
    return masks


def class_index(label: Tensor, task: Task, annotated: Annotated | None = None) -> Tensor:
    """Channel of each voxel (B, D, H, W), int64, among background and the annotated classes.

    It fits the channels of `merge_unannotated`: 0 is everything that is no annotated class.

    Raises:
        ConfigError: the classes overlap, so that a voxel has no single class.
    """
    _require_exclusive(task, "class_index")
    table = torch.zeros(256, dtype=torch.long)
    groups = tuple(task.classes.values())
    for channel, j in enumerate(annotated_classes(annotated, task), start=1):
        table[list(groups[j])] = channel
    return table.to(label.device)[label.long()]


def merge_unannotated(logits: Tensor, annotated: Sequence[int]) -> Tensor:
    """Logits (B, 1 + A, D, H, W) of background-or-unannotated and the A annotated classes.

    The softmax of the result is the softmax of the exclusive `logits (B, 1 + J, D, H, W)` with the
    probabilities of background and of all unannotated classes added up: logsumexp adds them.
    """
    if len(annotated) == logits.shape[1] - 1:
        return logits
    kept = [1 + j for j in annotated]
    rest = [channel for channel in range(logits.shape[1]) if channel not in set(kept)]
    background = torch.logsumexp(logits[:, rest], dim=1, keepdim=True)
    return torch.cat((background, logits[:, kept]), dim=1)


def to_masks(logits: Tensor, task: Task, annotated: Annotated | None = None) -> Tensor:
    """Predicted binary masks (B, J, D, H, W); classes that are not annotated stay empty.

    Exclusive classes take the most probable channel, where unannotated classes count as
    background, as they do in the loss. Overlapping ones take every probability above one half.
    """
    kept = annotated_classes(annotated, task)
    shape = (logits.shape[0], len(task.classes), *logits.shape[2:])
    masks = torch.zeros(shape, dtype=torch.bool, device=logits.device)
    if task.overlapping:
        for j in kept:
            masks[:, j] = logits[:, j] > 0
        return masks
    winner = merge_unannotated(logits, kept).argmax(dim=1)
    for channel, j in enumerate(kept, start=1):
        masks[:, j] = winner == channel
    return masks


def to_label(logits: Tensor, task: Task, annotated: Annotated | None = None) -> Tensor:
    """Predicted uint8 label map (B, D, H, W): each class by the first of its label values.

    Raises:
        ConfigError: the classes overlap; one map cannot hold them, `to_masks` can.
    """
    _require_exclusive(task, "to_label")
    kept = annotated_classes(annotated, task)
    groups = tuple(task.classes.values())
    values = torch.tensor([0, *(groups[j][0] for j in kept)], dtype=torch.uint8)
    winner = merge_unannotated(logits, kept).argmax(dim=1)
    return values.to(logits.device)[winner]


def _require_exclusive(task: Task, name: str) -> None:
    if task.overlapping:
        raise ConfigError(
            f"{name} needs exclusive classes, got overlapping ones "
            f"({', '.join(task.class_names)}); use one mask per class instead"
        )
