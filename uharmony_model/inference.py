"""Logits of a whole volume, window by window, or in one pass where the memory allows it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn

from uharmony_model.undrawn import UndrawnFromShared

WINDOWS_PER_PASS = 2

MEMORY_MARGIN = 2.0
"""What a pass may need of memory, as a multiple of the outputs of its layers taken together: room
for what lies between layers and for the workspaces of convolutions. Ours."""


def predict_logits(
    network: nn.Module,
    image: Tensor | npt.NDArray[Any],
    *,
    patch: Sequence[int],
    overlap: float,
    domain: int | Tensor | None,
    device: torch.device | str,
    memory_gib: float | None = None,
) -> Tensor:
    """Logits (J', D, H, W), float32 on the CPU, of one normalised `image (C, D, H, W)`.

    A volume no larger than `patch` takes one pass. A larger one is covered by windows of that
    size which share `overlap` of their length, weighed by a Gaussian about their centres. Along
    an axis shorter than the patch the volume lies in the middle, padded with each channel's
    least intensity, as in training. `domain` is the index of the domain whose residuals count, or
    floating-point weights (K,) that mix those of all domains; None sets them to zero. Windows are
    stitched on the CPU: `device` holds a few windows at a time.
    The network has to lie on `device`; its training or evaluation mode is as before afterwards.

    With `memory_gib` a larger volume takes one pass too, if that is expected to fit into so many
    GiB of the device's memory (see `fits_whole`). Norms then see the whole volume's statistics,
    where in training they saw those of patches.
    """
    volume = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    volume = volume.detach().to("cpu", torch.float32)
    shape = tuple(volume.shape[1:])

    def forward(windows: Tensor) -> Tensor:
        logits: Tensor = network(windows.to(device), _rows(domain, len(windows), device))
        return logits.float()

    if memory_gib is not None and any(n > size for n, size in zip(shape, patch, strict=True)):
        whole = _whole_window(network, shape, patch)
        channels = len(volume)
        fits = fits_whole(
            network, channels, patch=patch, whole=whole, memory_gib=memory_gib, domain=domain
        )
        patch = whole if fits else patch
    padded, inside = _padded(volume, patch)
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


def fits_whole(
    network: nn.Module,
    channels: int,
    *,
    patch: Sequence[int],
    whole: Sequence[int],
    memory_gib: float,
    domain: int | Tensor | None = None,
) -> bool:
    """Whether one pass over `whole` (D, H, W) voxels is expected to fit into `memory_gib` GiB.

    An empty window of `patch` voxels goes through the network as one of this `domain`, and the
    bytes of every layer's output are counted. They grow with the voxels; see `MEMORY_MARGIN`.
    """
    # Of two passes one after the other, one counts.
    one = network.own if isinstance(network, UndrawnFromShared) else network
    bytes_per_voxel = _activation_bytes(one, channels, patch, domain) / math.prod(patch)
    return MEMORY_MARGIN * bytes_per_voxel * math.prod(whole) <= memory_gib * (1 << 30)


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


def _rows(domain: int | Tensor | None, count: int, device: torch.device | str) -> Tensor | None:
    """The domain of each of `count` windows: indices (B,), or rows of weights (B, K)."""
    if domain is None:
        return None
    if isinstance(domain, Tensor):
        return domain.to(device, torch.float32).expand(count, -1)
    return torch.full((count,), domain, device=device)


def _whole_window(
    network: nn.Module, shape: Sequence[int], patch: Sequence[int]
) -> tuple[int, ...]:
    """The smallest window that holds the volume, and that the network takes."""
    # The patch fits the strides, so its multiples do where nothing more is known of the network.
    multiple = getattr(network, "multiple", None)
    steps = patch if multiple is None else (multiple,) * len(patch)
    return tuple(
        max(edge, math.ceil(extent / step) * step)
        for edge, extent, step in zip(patch, shape, steps, strict=True)
    )


def _activation_bytes(
    network: nn.Module, channels: int, patch: Sequence[int], domain: int | Tensor | None
) -> int:
    total = 0

    def count(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal total
        if isinstance(output, Tensor):
            total += output.numel() * output.element_size()

    # Modules that hold others give what the last of these gave.
    leaves = [m for m in network.modules() if next(m.children(), None) is None]
    handles = [module.register_forward_hook(count) for module in leaves]
    window = torch.zeros(1, channels, *patch)
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    try:
        with evaluating(network), torch.no_grad():
            network(window.to(device), _rows(domain, 1, device))
    finally:
        for handle in handles:
            handle.remove()
    return total


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
