"""`y = weight * z + bias` with `z = (x - mean) / sqrt(var + eps)`, per instance and channel.

The fast path of the harmonisation layer at order 1. One `native_group_norm` call over B*C groups
reads x once and gives z and its statistics; torch's own InstanceNorm3d goes through batch_norm
and is slower. Only x and the statistics are saved for the backward pass, and z becomes y in place.

Outputs are fresh tensors, never views: MONAI's activations work in place, and in-place work on a
view costs a copy of the gradient. x (B, C, ...) is contiguous; weight and bias are (B, C).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def standardise(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Standardised x, and mean and 1 / sqrt(var + eps) as (B, C). No gradient passes through."""
    groups = x.shape[0] * x.shape[1]
    size = x.numel() // groups
    with torch.no_grad():
        z, mean, rstd = torch.native_group_norm(x, None, None, 1, groups, size, groups, eps)
    return z, mean.view(x.shape[:2]), rstd.view(x.shape[:2])


def affine(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The layer when weight and bias do not depend on the statistics: one fused call."""
    y: Tensor = _Folded.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    return y


def affine_in_place(
    x: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """The layer when weight and bias are made from the statistics. z is overwritten by y.

    `z, mean, rstd` come from `standardise(x)`. The gradient of x is that of stage 1; what weight
    and bias owe to mean and rstd is theirs to propagate, or not.
    """
    y: Tensor = _InPlace.apply(x, z, mean, rstd, weight, bias)  # type: ignore[no-untyped-call]
    return y


class _Folded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        groups = weight.numel()
        y, mean, rstd = torch.native_group_norm(
            x, weight.reshape(-1), bias.reshape(-1), 1, groups, x.numel() // groups, groups, eps
        )
        ctx.save_for_backward(x, mean, rstd, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx, dw, db = _gradients(dy, ctx.saved_tensors, (needs_x, needs_weight, needs_bias))
        return dx, dw, db, None


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        per_channel = (*weight.shape, *(1,) * (x.ndim - 2))
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.mark_dirty(z)
        return torch.addcmul(bias.view(per_channel), z, weight.view(per_channel), out=z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, _, _, _, needs_weight, needs_bias = ctx.needs_input_grad
        dx, dw, db = _gradients(dy, ctx.saved_tensors, (needs_x, needs_weight, needs_bias))
        return dx, None, None, None, dw, db


def _gradients(
    dy: Tensor, saved: tuple[Tensor, ...], needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, mean, rstd, weight = saved
    groups = weight.numel()
    dx, dw, db = torch.ops.aten.native_group_norm_backward(
        dy.contiguous(),
        x,
        mean.view(1, groups),
        rstd.view(1, groups),
        weight.reshape(-1),
        1,
        groups,
        x.numel() // groups,
        groups,
        needed,
    )
    return (
        dx if needed[0] else None,
        dw.view(weight.shape) if needed[1] else None,
        db.view(weight.shape) if needed[2] else None,
    )
