"""`y = sum_p c_p z^p` with `z = (x - mean) * rstd`, for orders above 1, saving only x.

The polynomial adds no passes over the data: with S_p = sum(dy * z^p) over space and
g = dy * sum_p p c_p z^(p-1), the gradient of c_p is S_p, and both sums that the gradient of x
needs are linear in them:

    sum(g) = sum_p p c_p S_(p-1)     sum(g z) = sum_p p c_p S_p
    dx = rstd * (g - mean(g) - z * mean(g z))

Kernels are plain torch functions on rows: x, z, dy (R, n); mean, rstd (R, 1); c (P + 1, R, 1),
with R = B * C. They can be compiled, which fuses each into two sweeps; without a compiler the
same functions run as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

logger = logging.getLogger(__name__)

Forward = Callable[[Tensor, Tensor], Tensor]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def monomials(hermite: Tensor) -> Tensor:
    """Coefficients (P + 1, C) of He_p, probabilists', as coefficients of z^p.

    He_0 = 1, He_1 = z, He_2 = z^2 - 1, He_3 = z^3 - 3 z.
    """
    order = hermite.shape[0] - 1
    if order == 1:
        return hermite
    if order == 2:
        a0, a1, a2 = hermite
        return torch.stack((a0 - a2, a1, a2))
    a0, a1, a2, a3 = hermite
    return torch.stack((a0 - a2, a1 - 3 * a3, a2, a3))


def polynomial(
    x: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, coefficients: Tensor, *, compiled: bool
) -> Tensor:
    """Evaluate at every voxel of x (B, C, ...); mean and rstd (B, C), coefficients (P + 1, B, C).

    `z, mean, rstd` come from `standardise(x)`. The gradient of x is that of stage 1; what the
    coefficients owe to mean and rstd is theirs to propagate, or not.
    """
    kernels = _kernels(coefficients.shape[0] - 1, compiled)
    y: Tensor = _Polynomial.apply(x, z, mean, rstd, coefficients, kernels)  # type: ignore[no-untyped-call]
    return y


class _Polynomial(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor,
        mean: Tensor,
        rstd: Tensor,
        coefficients: Tensor,
        kernels: _Kernels,
    ) -> Tensor:
        ctx.save_for_backward(x, mean, rstd, coefficients)
        ctx.kernels = kernels
        rows = mean.numel()
        y = kernels.forward(_as(z, rows, -1), _as(coefficients, -1, rows, 1))
        return _as(y, *x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, coefficients = ctx.saved_tensors
        rows = mean.numel()
        dx, sums = ctx.kernels.backward(
            _as(dy, rows, -1),
            _as(x, rows, -1),
            _as(mean, rows, 1),
            _as(rstd, rows, 1),
            _as(coefficients, -1, rows, 1),
        )
        return _as(dx, *x.shape), None, None, None, _as(sums, *coefficients.shape), None


def _as(tensor: Tensor, *shape: int) -> Tensor:
    # Not `view`: on a view made here, in-place activations are an error; and torch.compile starts
    # anew when the shape of what is viewed changes, though the kernel sees rows.
    shaped: Tensor = torch.ops.aten._unsafe_view(tensor.contiguous(), shape)
    return shaped


@dataclass(frozen=True)
class _Kernels:
    forward: Forward
    backward: Backward


@cache
def _kernels(order: int, compiled: bool) -> _Kernels:
    # The order is fixed by closure: as an argument it would make torch.compile start anew.
    def forward(z: Tensor, c: Tensor) -> Tensor:
        y = torch.addcmul(c[order - 1], c[order], z)
        for p in range(order - 2, -1, -1):
            y = torch.addcmul(c[p], y, z)
        return y

    def backward(
        dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor]:
        z = (x - mean) * rstd
        weighted = dy
        sums = [dy.sum(1, keepdim=True)]
        for _ in range(order):
            weighted = weighted * z
            sums.append(weighted.sum(1, keepdim=True))
        slope = torch.addcmul((order - 1) * c[order - 1], order * c[order], z)
        for p in range(order - 2, 0, -1):
            slope = torch.addcmul(p * c[p], slope, z)
        size = x.shape[1]
        mean_g = sum((p * c[p] * sums[p - 1] for p in range(2, order + 1)), c[1] * sums[0]) / size
        mean_gz = sum((p * c[p] * sums[p] for p in range(2, order + 1)), c[1] * sums[1]) / size
        # Uncompiled, every name here is a tensor of x's size: the fewer live at once, the better.
        del weighted
        dx = dy * slope
        del slope
        dx = torch.addcmul(-rstd * mean_g, dx, rstd)
        dx = torch.addcmul(dx, z, -rstd * mean_gz)
        return dx, torch.stack(sums)

    if not compiled:
        return _Kernels(forward, backward)
    return _Kernels(_Compiled(forward), _Compiled(backward))


class _Compiled:
    """A kernel compiled at its first use; the plain one when that is not possible here."""

    unavailable = False  # of all kernels of this process: what fails for one fails for each

    def __init__(self, kernel: Callable[..., Any]) -> None:
        self.plain = kernel
        # Sizes stay symbols, else every level of a network compiles anew until torch gives up
        # without an error; fullgraph turns giving up into one.
        self.fused = torch.compile(kernel, dynamic=True, fullgraph=True)

    def __call__(self, *arguments: Tensor) -> Any:
        if not _Compiled.unavailable:
            try:
                return self.fused(*arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # torch raises many types here, some of them private
                _Compiled.unavailable = True
                reason = " ".join(str(error).split())[:200]
                logger.warning("polynomial kernels are not compiled, only slower: %s", reason)
        return self.plain(*arguments)
