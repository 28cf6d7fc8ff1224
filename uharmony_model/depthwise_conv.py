"""Depthwise 3D convolution whose backward pass is convolutions too.

On a processor torch computes the gradients of a convolution with as many groups as channels by
its slow general path. Both are depthwise convolutions themselves, which its fast path knows: that
of x is dy with the kernel turned over, that of the kernel is the padded x with dy as the kernel.
Elsewhere torch's own convolution is used. The kernel's gradient is one float32 sum over the grid,
3e-5 of its largest entry off at 96^3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve x (B, C, D, H, W) with weight (C, 1, k, k, k), k odd; the size of the grid stays."""
    padding = weight.shape[-1] // 2
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not x.numel():
        return F.conv3d(x, weight, bias, padding=padding, groups=x.shape[1])
    y: Tensor = _Depthwise.apply(x, weight)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias.view(-1, 1, 1, 1)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv3d(x, weight, padding=weight.shape[-1] // 2, groups=x.shape[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        padding, channels = weight.shape[-1] // 2, x.shape[1]
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = F.conv3d(dy, weight.flip(2, 3, 4), padding=padding, groups=channels)
        if ctx.needs_input_grad[1]:
            # Every channel of every sample is a group with a kernel of the size of dy.
            wide = F.pad(x, (padding,) * 6).flatten(0, 1).unsqueeze(0)
            kernels = dy.flatten(0, 1).unsqueeze(1)
            each = F.conv3d(wide, kernels, groups=len(kernels))
            dw = each.view(len(x), *weight.shape).sum(0)
        return dx, dw
