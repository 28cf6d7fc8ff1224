"""Which of a study's channels a case has, and how the network is told.

With `task.presence` every modality of `task.intensity` is one input channel, in the order of their
names. A site has the channels it has: a missing one is zero, and so is its mask, a constant channel
of ones and zeros that goes in beside the images:

    input (B, 2C, D, H, W) = C images, then C masks

So a CT site and a PET site train one network with tensors of one shape, and a channel that a site
never has adds nothing to what its stem computes, whatever others have made of that channel's
kernel. Modality dropout hides channels in training, so that one model serves all subsets. After
the union of modalities of FedUniBrain; masks and dropout per sample are ours.

An instance norm directly behind the first convolution takes a constant out again, but for the
volume's borders: there the masks say little, and the zero channel itself has to tell. A way around
the norm (a residual block's skip, the free second stage of the harmonisation layer) lets them
through. A stem for each set of modalities needs nothing of this: methods that keep the first block
or its residuals at the site have it, as each site trains its own with its own masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from uharmony_model.errors import DataError
from uharmony_model.task import Task


def input_channels(task: Task) -> int:
    """Channels that the network takes: the images, and their masks where the study has them."""
    return 2 * task.channels if task.presence else task.channels


def present_channels(task: Task, modalities: Sequence[str]) -> tuple[bool, ...]:
    """Which of the study's channels are there in a case of these modalities, (C,).

    Raises:
        DataError: none of them is.
    """
    if not task.presence:
        return (True,) * task.channels
    present = tuple(name in modalities for name in task.intensity)
    if not any(present):
        raise DataError(
            f"no channel is left of {', '.join(modalities) or 'a case without modalities'}; the "
            f"study has {', '.join(task.intensity)}: a case needs at least one that is not missing"
        )
    return present


def change_shown(image: Tensor, task: Task, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A copy of the network's input with its images (B, C, D, H, W) changed, its masks as they are.

    `change` works on the processor.
    """
    found, channels = image.clone(), task.channels
    found[:, :channels] = change(image[:, :channels].cpu()).to(image.device)
    return found


def with_presence(image: Tensor, present: Tensor | Sequence[Sequence[bool]], task: Task) -> Tensor:
    """What the network takes of `image (B, C, D, H, W)`; without `task.presence` it is the image.

    Channels whose `present (B, C)` is false become zero, whatever stood in them.

    Raises:
        DataError: there is not one flag for each channel.
    """
    if not task.presence:
        return image
    flags = torch.as_tensor(present, dtype=torch.bool)
    if flags.shape != image.shape[:2]:
        raise DataError(
            f"presence has shape {tuple(flags.shape)} for an image of {tuple(image.shape[:2])} "
            "samples and channels; give one flag for each"
        )
    there = flags.to(image.device)[(..., *(None,) * (image.ndim - 2))]
    # Chosen and not multiplied: a channel that is not there may hold anything.
    shown = torch.where(there, image, image.new_zeros(()))
    return torch.cat((shown, there.to(image.dtype).expand_as(image)), dim=1)


def drop_modalities(present: Tensor, chance: float, generator: np.random.Generator) -> Tensor:
    """Hide each channel of `present (B, C)` with this chance, but never all of a sample.

    Where all would go, the one with the largest draw stays: each is as likely as the others.
    """
    draws = torch.from_numpy(generator.random(tuple(present.shape)))
    highest = torch.where(present, draws, torch.zeros_like(draws)).amax(dim=1, keepdim=True)
    return present & (draws >= highest.clamp(max=chance))
