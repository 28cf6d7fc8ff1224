"""Which pseudo-labels are reliable enough to be pasted from: hardness, threshold, queue.

After UST-RUN (Ma et al. 2025, arXiv:2505.24567) and its published code. For a student and a
teacher that segment the same unlabelled sample:

    hardness    h = 1 - Dice(student, teacher's pseudo-label)
    reliable    h < tau, tau_0 = 0.1: the sample enters a queue, first in, first out, of 10
    threshold   a sample enters   tau <- min(tau, max of h in the queue)
                else              tau <- min(1.0005 tau, tau_0)

Ours, each with its reason where it stands: classes that neither finds (`hardness`), samples that
are judged one after the other (`offer`), a lower bound of `_FLOOR` tau_0 for the threshold. Without
that bound a single sample of h = 0, which a foreground of a few voxels easily gives, makes tau 0
for ever. The published Dice is smoothed, so that its tau stays above 0, but needs tens of thousands
of steps to recover.

N entries, at most `capacity`; B samples; J classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from uharmony_model.errors import ConfigError, StoreError

TAU_0 = 0.1
CAPACITY = 10
PREFIX = "queue/"
"""What the names of a queue's tensors begin with in what a site carries."""

_GROWTH = 1.0005  # of the threshold, for a sample that does not enter
_FLOOR = 0.01  # least threshold, as a share of tau_0
_NAMES = ("images", "labels", "hardness", "threshold")

Size = tuple[int, int, int]


def hardness(first: Tensor, second: Tensor) -> Tensor:
    """`1 - Dice` of two segmentations (B, J, D, H, W) bool: (B,) float32, the mean over classes.

    A class that neither finds in a sample is left out of its mean: its Dice is undefined, and
    counted as agreement it would hide a class they disagree on. Where neither finds any class the
    hardness is 1: both may have missed everything, and there is nothing to paste. The published
    code gives an empty class a Dice of 0. That is the same for one class; with several, no patch
    that lacks a class would ever be reliable, and 3D patches often lack some. The published Dice
    is smoothed by one voxel, this one is not: both are ours.

    Raises:
        ConfigError: they are no two boolean masks of one shape.
    """
    if (
        first.shape != second.shape
        or first.ndim != 5
        or not first.dtype == second.dtype == torch.bool
    ):
        raise ConfigError(
            f"segmentations {first.dtype} {tuple(first.shape)} and {second.dtype} "
            f"{tuple(second.shape)}; expected two bool tensors (B, J, D, H, W) of one shape"
        )
    space = (2, 3, 4)
    both = (first & second).sum(space).double()
    either = (first.sum(space) + second.sum(space)).double()
    classes = (either > 0).sum(1)
    dice = (2 * both / either.clamp(min=1)).sum(1) / classes.clamp(min=1)
    return (1 - dice).float()


@dataclass(frozen=True, eq=False)
class ReliableQueue:
    """Reliable samples, oldest first, and the threshold the next one has to stay below.

    `images (N, C, D, H, W)` float32, `labels (N, D, H, W)` uint8: their pseudo-labels as label
    values; `hardness (N,)` float32. `ceiling` is tau_0. `threshold` is always a number that
    float32 holds, so that it is the same after it was stored. Everything is on the CPU.

    The published code also keeps which voxels of an entry its teacher was confident of, and only
    these count where it is pasted. Here an entry is taken whole; ours.

    Raises:
        ConfigError: the tensors do not fit each other, or a number is out of its range.
    """

    images: Tensor
    labels: Tensor
    hardness: Tensor
    threshold: float
    capacity: int = CAPACITY
    ceiling: float = TAU_0

    def __post_init__(self) -> None:
        if self.capacity < 1 or not 0 < self.ceiling <= 1:
            raise ConfigError(
                f"a queue of {self.capacity} entries with a threshold of {self.ceiling}; expected "
                "at least one entry, and a hardness above 0 and at most 1"
            )
        wrong = _unfit(self.images, self.labels, self.hardness)
        if wrong is None and len(self.images) > self.capacity:
            wrong = f"{len(self.images)} entries, expected at most {self.capacity}"
        if wrong is None and not 0 < self.threshold <= self.ceiling:
            wrong = f"a threshold of {self.threshold}, expected above 0 and at most {self.ceiling}"
        if wrong is not None:
            raise ConfigError(f"a reliable queue of {wrong}; make it with empty, offer or of")

    @classmethod
    def empty(
        cls, channels: int, size: Size, *, capacity: int = CAPACITY, ceiling: float = TAU_0
    ) -> ReliableQueue:
        """The queue that training starts with, for patches of `size` voxels: tau = tau_0."""
        return cls(
            images=torch.empty(0, channels, *size),
            labels=torch.empty(0, *size, dtype=torch.uint8),
            hardness=torch.empty(0),
            threshold=_single(ceiling),
            capacity=capacity,
            ceiling=ceiling,
        )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def floor(self) -> float:
        """The least threshold, float32; ours."""
        return _single(_FLOOR * self.ceiling)

    def offer(
        self, images: Tensor, labels: Tensor, hardness: Tensor, *, together: bool = False
    ) -> ReliableQueue:
        """The queue after these samples: (B, C, D, H, W), (B, D, H, W) and (B,), in their order.

        Each sample is judged by the threshold that the one before it left, so that a batch means
        the same as its samples one by one; ours. With `together` the samples are judged as in the
        published code: all by one threshold, which then moves once for the batch.

        Raises:
            ConfigError: the samples do not fit each other or the queue, or a hardness is not
                between 0 and 1.
        """
        wrong = _unfit(images, labels, hardness)
        patch = tuple(self.images.shape[1:])
        if wrong is None and tuple(images.shape[1:]) != patch:
            wrong = f"shape {tuple(images.shape)}, expected (B, C, D, H, W) with {patch} last"
        if wrong is not None:
            raise ConfigError(f"samples of {wrong}; offer patches like those of the queue")
        new = [float(value) for value in hardness.tolist()]
        if not all(0 <= value <= 1 for value in new):
            raise ConfigError(f"hardness is {new}; expected 1 - Dice, between 0 and 1")
        numbers = [float(value) for value in self.hardness.tolist()] + new
        places = list(range(len(self), len(numbers)))
        kept, threshold = list(range(len(self))), self.threshold
        for group in [places] if together else [[place] for place in places]:
            entering = [place for place in group if numbers[place] < threshold]
            if entering:
                kept = (kept + entering)[-self.capacity :]
                hardest = max(numbers[place] for place in kept)
                threshold = max(min(threshold, hardest), self.floor)
            elif group:
                threshold = min(_single(_GROWTH * threshold), _single(self.ceiling))
        if kept == list(range(len(self))):
            return replace(self, threshold=threshold)
        return replace(
            self,
            images=_chosen(self.images, images, kept),
            labels=_chosen(self.labels, labels, kept),
            hardness=_chosen(self.hardness, hardness, kept),
            threshold=threshold,
        )

    def tensors(self) -> dict[str, Tensor]:
        """What a site carries from round to round, float32 and uint8; `of` reads it again."""
        threshold = torch.tensor([self.threshold], dtype=torch.float32)
        values = (self.images, self.labels, self.hardness, threshold)
        return {PREFIX + name: value for name, value in zip(_NAMES, values, strict=True)}

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        channels: int,
        size: Size,
        *,
        capacity: int = CAPACITY,
        ceiling: float = TAU_0,
    ) -> ReliableQueue:
        """The queue of patches of `size` voxels that a site carried; other names are passed over.

        Raises:
            StoreError: a tensor is missing, or is not what such a queue holds.
        """
        missing = [PREFIX + name for name in _NAMES if PREFIX + name not in tensors]
        if missing:
            raise _damaged(f"{', '.join(missing)} missing")
        images, labels, numbers, tau = (tensors[PREFIX + name] for name in _NAMES)
        wrong = _unfit(images, labels, numbers)
        if wrong is not None:
            raise _damaged(wrong)
        if tuple(images.shape[1:]) != (channels, *size):
            raise _damaged(f"shape {tuple(images.shape)}, expected (N, {channels}, *{size})")
        if len(images) > capacity:
            raise _damaged(f"{len(images)} entries, expected at most {capacity}")
        if tau.dtype != torch.float32 or tau.shape != (1,):
            raise _damaged(f"{tau.dtype} threshold {tuple(tau.shape)}, expected float32 (1,)")
        if not 0 < tau.item() <= ceiling:
            raise _damaged(f"threshold {tau.item()}, expected above 0 and at most {ceiling}")
        # A comparison with NaN is false, so it is refused here too.
        if not bool(((numbers >= 0) & (numbers <= 1)).all() & torch.isfinite(images).all()):
            raise _damaged("numbers that are not finite, or a hardness outside of 0 to 1")
        return cls(images, labels, numbers, tau.item(), capacity=capacity, ceiling=ceiling)


def _unfit(images: Tensor, labels: Tensor, numbers: Tensor) -> str | None:
    """What is wrong with the dtypes and shapes of samples with each other; None for nothing."""
    kinds = (images.dtype, labels.dtype, numbers.dtype)
    count, space = images.shape[:1], images.shape[2:]
    fits = images.ndim == 5 and labels.shape == count + space and numbers.shape == count
    if kinds == (torch.float32, torch.uint8, torch.float32) and fits:
        return None
    return (
        f"images {images.dtype} {tuple(images.shape)}, labels {labels.dtype} "
        f"{tuple(labels.shape)}, hardness {numbers.dtype} {tuple(numbers.shape)}; expected float32 "
        "(N, C, D, H, W), uint8 (N, D, H, W), float32 (N,)"
    )


def _chosen(old: Tensor, new: Tensor, places: list[int]) -> Tensor:
    """Rows of `old` and then `new` by their places in both together, copied."""
    rows = [old[p] if p < len(old) else new[p - len(old)].detach().cpu() for p in places]
    return torch.stack(rows)


def _single(value: float) -> float:
    """The largest number of float32 that is not above `value`."""
    near = np.float32(value)
    return float(near if float(near) <= value else np.nextafter(near, np.float32(0)))


def _damaged(how: str) -> StoreError:
    return StoreError(
        f"the carried queue of reliable samples: {how}; go back to the round before, "
        "or start the study anew if its patches have changed"
    )
