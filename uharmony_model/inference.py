"""Logits of a whole volume, window by window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn

WINDOWS_PER_PASS = 2


def predict_logits(
    network: nn.Module,
    image: Tensor | npt.NDArray[Any],
    *,
    patch: Sequence[int],
    overlap: float,
    domain: int | None,
    device: torch.device | str,
) -> Tensor:
    """Logits (J', D, H, W), float32 on the CPU, of one normalised `image (C, D, H, W)`.

    A volume no larger than `patch` takes one pass. A larger one is covered by windows of that
    size which share `overlap` of their length, weighed by a Gaussian about their centres. Along
    an axis shorter than the patch the volume lies in the middle, padded with each channel's
    least intensity, as in training. `domain` is the index of the domain whose residuals count;
    None sets them to zero. Windows are stitched on the CPU: `device` holds a few windows at a time.
    The network has to lie on `device`; its training or evaluation mode is as before afterwards.
    """
    volume = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    volume = volume.detach().to("cpu", torch.float32)
    shape = tuple(volume.shape[1:])
    padded, inside = _padded(volume, patch)

    def forward(windows: Tensor) -> Tensor:
        index = None if domain is None else torch.full((len(windows),), domain, device=device)
        logits: Tensor = network(windows.to(device), index)
        return logits.float()

    with evaluating(network), torch.no_grad():
        if all(extent <= size for extent, size in zip(shape, patch, strict=True)):
            logits = forward(padded[None]).cpu()
        else:
            stitched = sliding_window_inference(
                padded[None],
                roi_size=tuple(patch),
                sw_batch_size=WINDOWS_PER_PASS,
                predictor=forward,
                overlap=overlap,
                mode="gaussian",
                sw_device=device,
                device="cpu",
            )
            assert isinstance(stitched, Tensor)  # noqa: S101 - one output, as `forward` has one
            logits = stitched
    return logits[0][(slice(None), *inside)].contiguous()


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside, in its own earlier mode after."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _padded(volume: Tensor, patch: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
    """The volume in the middle of at least `patch` voxels, and where it lies."""
    extents = tuple(volume.shape[1:])
    padded = [max(size, extent) for size, extent in zip(patch, extents, strict=True)]
    before = [(size - extent) // 2 for size, extent in zip(padded, extents, strict=True)]
    inside = tuple(slice(b, b + extent) for b, extent in zip(before, extents, strict=True))
    if tuple(padded) == extents:
        return volume, inside
    # Not the padding of MONAI's inferer: it has one value for all channels.
    result = volume.amin(dim=(1, 2, 3), keepdim=True).repeat(1, *padded)
    result[(slice(None), *inside)] = volume
    return result, inside
