"""A convolution with more channels than it was trained with, which computes the old ones as before.

Libraries choose their kernels by the number of channels, and each sums in its own order: the same
rows of a larger tensor differ in the last bits. So the old part is computed with the old shape:

    more inputs     conv(x_old, W_old) + conv(x_new, W_new)      the second is zero where x_new is
    more outputs    conv(x, W_old) beside conv(x, W_new)
    both            old outputs take nothing of new inputs; new outputs take all

What has grown twice has an old part that is itself in two parts. The tensors and their names are
those of a plain convolution. Ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uharmony_model.u2net_blocks import DomainConv

Convolution = nn.Conv3d | nn.ConvTranspose3d | DomainConv
Run = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Parts:
    """Which inputs and outputs are old, and which are new; `inner` are the parts of the old one."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        old_in: Sequence[int],
        old_out: int,
        inner: Parts | None = None,
    ) -> None:
        new_in = [channel for channel in range(inputs) if channel not in set(old_in)]
        self.old_in = torch.tensor(list(old_in), dtype=torch.long)
        self.new_in = torch.tensor(new_in, dtype=torch.long)
        self.old_out, self.new_out, self.inner = old_out, outputs - old_out, inner

    def run(
        self, run: Run, x: Tensor, weight: Tensor, bias: Tensor | None, *, rows: int, columns: int
    ) -> Tensor:
        """Convolve x (B, C, D, H, W); axes `rows` and `columns` of the weight are O and C."""
        old_in, new_in = self.old_in.to(x.device), self.new_in.to(x.device)
        more_in = len(new_in) > 0
        old_weight = weight.narrow(rows, 0, self.old_out).contiguous()
        old_bias = None if bias is None else bias[..., : self.old_out]
        before = run
        if self.inner is not None:
            before = partial(self.inner.run, run, rows=rows, columns=columns)
        if more_in:
            old_x = x.index_select(1, old_in)
            y = before(old_x, old_weight.index_select(columns, old_in), old_bias)
        else:
            y = before(x, old_weight, old_bias)
        if self.new_out:
            new_weight = weight.narrow(rows, self.old_out, self.new_out).contiguous()
            new_bias = None if bias is None else bias[..., self.old_out :]
            return torch.cat((y, run(x, new_weight, new_bias)), dim=1)
        if more_in:
            new_x = x.index_select(1, new_in)
            y = y + run(new_x, old_weight.index_select(columns, new_in), None)
        return y


class GrownConv3d(nn.Conv3d):
    """A convolution in two parts."""

    parts: Parts

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.parts.run(super()._conv_forward, input, weight, bias, rows=0, columns=1)


class GrownConvTranspose3d(nn.ConvTranspose3d):
    """A transposed convolution in two parts, of the output size that its stride gives."""

    parts: Parts

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve (B, C, D, H, W)."""

        def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            y: Tensor = F.conv_transpose3d(
                x,
                weight,
                bias,
                self.stride,
                self.padding,  # type: ignore[arg-type]
                self.output_padding,
                self.groups,
                self.dilation,
            )
            return y

        return self.parts.run(run, input, self.weight, self.bias, rows=1, columns=0)


class GrownDomainConv(DomainConv):
    """A domain's own convolution in two parts, all of its domains alike."""

    parts: Parts

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (B, C, D, H, W), every sample with the kernel of its domain."""

        def run(part: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            outputs = weight.shape[1]
            given = weight.new_zeros(len(weight), outputs) if bias is None else bias
            # A plain one for this call, with these tensors in the place of its parameters.
            piece = DomainConv.__new__(DomainConv)
            tensors = {"weight": weight, "bias": given}
            piece.__dict__.update(self.__dict__, _parameters=tensors, outputs=outputs)
            return piece.forward(part)

        return self.parts.run(run, x, self.weight, self.bias, rows=1, columns=2)


def kernel_shape(convolution: Convolution) -> torch.Size:
    """The shape of its kernel; of one with domains, that of a single domain."""
    shape = convolution.weight.shape
    return shape[1:] if isinstance(convolution, DomainConv) else shape


def is_grown(convolution: nn.Module) -> bool:
    """Whether it computes in parts already."""
    return isinstance(convolution, GrownConv3d | GrownConvTranspose3d | GrownDomainConv)


def grown(convolution: Convolution, parts: Parts) -> nn.Module:
    """The same convolution, with the same parameters, in parts."""
    made: GrownConv3d | GrownConvTranspose3d | GrownDomainConv
    if isinstance(convolution, nn.Conv3d):
        made = GrownConv3d.__new__(GrownConv3d)
    elif isinstance(convolution, nn.ConvTranspose3d):
        made = GrownConvTranspose3d.__new__(GrownConvTranspose3d)
    else:
        made = GrownDomainConv.__new__(GrownDomainConv)
    made.__dict__.update(convolution.__dict__)
    made.parts = parts
    return made
