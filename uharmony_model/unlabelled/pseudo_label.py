"""What is taken for the truth of a patch, and where: labels of a teacher, or of a person.

    exclusive      y = argmax_c p_c,      certain where max_c p_c >= tau
    overlapping    y_j = [p_j > 1/2],     certain where p_j >= tau or p_j <= 1 - tau
    pasting        y = y_into (1 - M) + y_of M,  and `certain` alike
    guidance       y_w = y_ul (1 - M) + y_lu M,  certain where it is so and y_w = y_u

tau = 0.95 as in FixMatch (Sohn et al. 2020, arXiv:2001.07685). Pasting and symmetric guidance
(SymGD) are after MiDSS (Ma et al. 2024, arXiv:2404.08951): M is the box of the copy-paste, y_ul and
y_lu are the teacher's labels of the two mixed images, y_u its label of the image itself. The box
of x_ul is filled from the labelled image and so is all but the box of x_lu, so y_w is made of the
parts that the unlabelled image gave. Ours: one form for labels of both origins, in 3D.
B samples; J foreground classes in the task's order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uharmony_model.errors import ConfigError
from uharmony_model.targets import class_index, to_targets
from uharmony_model.task import Task


@dataclass(frozen=True, eq=False)
class PseudoLabel:
    """A label for each voxel, and whether it is to be believed.

    Exclusive classes: `label (B, D, H, W)` int64, the channel, 0 is background; `certain` bool of
    that shape. Overlapping classes: `label` and `certain`, both `(B, J, D, H, W)` bool.

    Raises:
        ConfigError: label and certainty do not fit together.
    """

    label: Tensor
    certain: Tensor

    def __post_init__(self) -> None:
        if self.label.shape != self.certain.shape or self.certain.dtype != torch.bool:
            raise ConfigError(
                f"a pseudo-label of shape {tuple(self.label.shape)} has {self.certain.dtype} "
                f"certainty of shape {tuple(self.certain.shape)}; expected booleans of its shape"
            )
        kind = {4: torch.int64, 5: torch.bool}.get(self.label.ndim)
        if self.label.dtype != kind:
            raise ConfigError(
                f"a pseudo-label is {self.label.dtype} of shape {tuple(self.label.shape)}; "
                "expected int64 (B, D, H, W) or, for overlapping classes, bool (B, J, D, H, W)"
            )

    @property
    def share(self) -> float:
        """Share of the voxels, or of the voxels' classes, that are certain, in [0, 1]."""
        return int(self.certain.sum()) / self.certain.numel()

    def values(self, task: Task) -> Tensor:
        """The uint8 label map (B, D, H, W), each class by the first of its label values.

        Raises:
            ConfigError: the classes overlap; one map cannot hold them, `masks` can.
        """
        self._require(task)
        if task.overlapping:
            raise ConfigError(
                f"one label map cannot hold overlapping classes ({', '.join(task.class_names)}); "
                "use the masks of the pseudo-label instead"
            )
        first = [0, *(group[0] for group in task.classes.values())]
        return torch.tensor(first, dtype=torch.uint8).to(self.label.device)[self.label]

    def masks(self, task: Task) -> Tensor:
        """Binary masks (B, J, D, H, W) of the foreground classes, certain or not.

        Raises:
            ConfigError: the label is of the other kind of task.
        """
        self._require(task)
        if task.overlapping:
            return self.label
        channels = torch.arange(1, task.outputs, device=self.label.device)
        return self.label[:, None] == channels.view(1, -1, 1, 1, 1)

    def _require(self, task: Task) -> None:
        if task.overlapping != (self.label.ndim == 5):
            kind = "overlapping" if task.overlapping else "exclusive"
            raise ConfigError(
                f"a pseudo-label of shape {tuple(self.label.shape)} does not fit a task with "
                f"{kind} classes; make it with the same task"
            )


def pseudo_label(logits: Tensor, task: Task, threshold: float = 0.95) -> PseudoLabel:
    """What `logits (B, J', D, H, W)` say, certain where a probability reaches `threshold`.

    No gradient flows through it. A voxel whose logits are not numbers is not certain.
    """
    scores = logits.detach().float()
    if task.overlapping:
        # sigmoid(|z|) is the larger of p and 1 - p: both sides are rounded alike.
        return PseudoLabel(scores > 0, scores.abs().sigmoid() >= threshold)
    confidence, channel = scores.softmax(dim=1).max(dim=1)
    return PseudoLabel(channel, confidence >= threshold)


def known(label: Tensor, task: Task) -> PseudoLabel:
    """A person's annotation `label (B, D, H, W)` uint8, certain everywhere, for all classes."""
    truth = to_targets(label, task) if task.overlapping else class_index(label, task)
    return PseudoLabel(truth, torch.ones_like(truth, dtype=torch.bool))


def pasted(into: PseudoLabel, of: PseudoLabel, mask: Tensor) -> PseudoLabel:
    """`into` outside of the mask and `of` inside, labels and certainty alike.

    `mask (B, D, H, W)` bool, or what broadcasts to it, is true where `of` is pasted.

    Raises:
        ConfigError: the two are of different shapes, or the mask is none for them.
    """
    _require_alike(into, of)
    batch, *space = into.label.shape[0], *into.label.shape[-3:]
    fits = mask.ndim <= 4 and all(
        extent in (1, wanted)
        for extent, wanted in zip(mask.shape[::-1], [*space[::-1], batch], strict=False)
    )
    if mask.dtype != torch.bool or not fits:
        raise ConfigError(
            f"a mask to paste by is {mask.dtype} of shape {tuple(mask.shape)}; expected bool "
            f"(B, D, H, W) = {(batch, *space)} or what broadcasts to it"
        )
    box = mask.to(into.label.device).expand(batch, *space)
    if into.label.ndim == 5:
        box = box[:, None]
    return PseudoLabel(
        torch.where(box, of.label, into.label), torch.where(box, of.certain, into.certain)
    )


def agreeing(
    merged: PseudoLabel, direct: PseudoLabel, *, direct_certain: bool = False
) -> PseudoLabel:
    """Symmetric guidance: `merged`, certain only where the `direct` label is the same.

    `merged` is `pasted(into=label of x_ul, of=label of x_lu, mask=M)`, `direct` the label of the
    whole image. With `direct_certain` the direct label must be certain there too, which MiDSS's
    published code asks for.

    Raises:
        ConfigError: the two are of different shapes.
    """
    _require_alike(merged, direct)
    certain = merged.certain & (merged.label == direct.label)
    return PseudoLabel(merged.label, certain & direct.certain if direct_certain else certain)


def _require_alike(one: PseudoLabel, other: PseudoLabel) -> None:
    if one.label.shape != other.label.shape:
        raise ConfigError(
            f"pseudo-labels of shapes {tuple(one.label.shape)} and {tuple(other.label.shape)} "
            "meet; expected the same patches of the same task"
        )
