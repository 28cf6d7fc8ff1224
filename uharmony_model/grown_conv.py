"""A convolution with more channels than it was trained with, which computes the old ones as before.

Libraries choose their kernels by the number of channels, and each sums in its own order: the same
rows of a larger tensor differ in the last bits. So the old part is computed with the old shape:

    more inputs     conv(x_old, W_old) + conv(x_new, W_new)      the second is zero where x_new is
    more outputs    conv(x, W_old) beside conv(x, W_new)
    both            old outputs take nothing of new inputs; new outputs take all

The tensors and their names are those of a plain convolution. Ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Run = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class _Parts:
    """Which inputs and outputs are old, and which are new."""

    def __init__(self, inputs: int, outputs: int, old_in: Sequence[int], old_out: int) -> None:
        new_in = [channel for channel in range(inputs) if channel not in set(old_in)]
        self.old_in = torch.tensor(list(old_in), dtype=torch.long)
        self.new_in = torch.tensor(new_in, dtype=torch.long)
        self.old_out, self.new_out = old_out, outputs - old_out

    def run(self, run: Run, x: Tensor, weight: Tensor, bias: Tensor | None, *, rows: int) -> Tensor:
        """Convolve x (B, C, D, H, W); the outputs are axis `rows` of the weight, 0 or 1."""
        columns = 1 - rows
        old_in, new_in = self.old_in.to(x.device), self.new_in.to(x.device)
        more_in = len(new_in) > 0
        old_weight = weight.narrow(rows, 0, self.old_out).contiguous()
        old_bias = None if bias is None else bias[: self.old_out]
        if more_in:
            old_x = x.index_select(1, old_in)
            y = run(old_x, old_weight.index_select(columns, old_in), old_bias)
        else:
            y = run(x, old_weight, old_bias)
        if self.new_out:
            new_weight = weight.narrow(rows, self.old_out, self.new_out).contiguous()
            new_bias = None if bias is None else bias[self.old_out :]
            return torch.cat((y, run(x, new_weight, new_bias)), dim=1)
        if more_in:
            new_x = x.index_select(1, new_in)
            y = y + run(new_x, old_weight.index_select(columns, new_in), None)
        return y


class GrownConv3d(nn.Conv3d):
    """A convolution in two parts."""

    parts: _Parts

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.parts.run(super()._conv_forward, input, weight, bias, rows=0)


class GrownConvTranspose3d(nn.ConvTranspose3d):
    """A transposed convolution in two parts, of the output size that its stride gives."""

    parts: _Parts

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

        return self.parts.run(run, input, self.weight, self.bias, rows=1)


def grown(
    convolution: nn.Conv3d | nn.ConvTranspose3d, old_in: Sequence[int], old_out: int
) -> GrownConv3d | GrownConvTranspose3d:
    """The same convolution, with the same parameters, in two parts.

    `old_in` are the places of the old inputs, `old_out` is the number of the old outputs, which
    come first.
    """
    made: GrownConv3d | GrownConvTranspose3d
    if isinstance(convolution, nn.Conv3d):
        made = GrownConv3d.__new__(GrownConv3d)
    else:
        made = GrownConvTranspose3d.__new__(GrownConvTranspose3d)
    made.__dict__.update(convolution.__dict__)
    made.parts = _Parts(convolution.in_channels, convolution.out_channels, old_in, old_out)
    return made
